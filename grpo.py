"""GRPO, Group Relative Policy Optimization (DeepSeekMath, arXiv 2402.03300v3), with the switches of DAPO and Dr. GRPO.

For each prompt q the policy samples a group of G completions o_1..o_G, which earn rewards R_1..R_G:

    A_i  = (R_i - mean R) / (std R + eps)                                                     [GRPO sec 4.1.2]
    w_it = pi(o_it | q, o_i<t) / pi_old(o_it | q, o_i<t)                                      [GRPO eq 3]
    J    = E[ 1/G sum_i 1/|o_i| sum_t min(w A, clip(w, 1 - eps_low, 1 + eps_high) A) - beta k3 ]   [GRPO eq 3]
    k3   = exp(log pi_ref - log pi) - (log pi_ref - log pi) - 1                               [GRPO eq 4]

Axes: N prompts a step, G generations per prompt, B = N G rows, P prompt tokens, T completion tokens, V vocabulary.

Here against the papers (each is a flag):
  --loss_type dapo       mean over the tokens of the whole optimizer step [DAPO sec 3.3, arXiv 2503.14476v2]; `grpo` is eq 3
                         as printed; `dr_grpo` divides by a constant length [Dr. GRPO sec 3.2, arXiv 2503.20783v2]
  --epsilon_high         the upper clip on its own, 0.28 in DAPO [DAPO sec 3.1]; default: the same as --epsilon
  --scale_rewards none   no division by std [Dr. GRPO sec 3.2]
  --beta 0               no KL term and no reference model [DEVIATES GRPO eq 3] as DAPO and most later work
  population std         divides by G [CHOICE GRPO]; TRL, verl and LUFFY divide by G-1: advantages differ by sqrt(G/(G-1))
  truncated completions  earn 0 (--grade_truncated) and are trained on (--mask_truncated_completions) [CHOICE GRPO]

    python grpo.py --task diary            the built-in skill task: hard problems rise from 0 after about 20 steps
    python grpo.py                         the built-in knowledge task: easy stays right and hard at 0, since what is never
                                           sampled is never rewarded: the question that off-policy knowledge answers
"""

import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Literal

import torch
from tqdm import tqdm
from transformers import get_scheduler
from transformers.hf_argparser import HfArg

import common
import data
import estimate
import flags
import parallel
import runs
from common import policy_logps


@dataclass
class Args:
    # model and data
    model_name_or_path: str = HfArg(default="tiny_model", aliases=["--model"], help="local folder or hub id; the default is built in")
    gguf_file: str | None = HfArg(default=None, help="GGUF file of that folder or hub id, dequantised")
    dtype: Literal["auto", "float32", "bfloat16"] = HfArg(default="auto", help="of compute, weights stay float32; auto: bfloat16 on a GPU")
    parallel: Literal["ddp", "fsdp"] = HfArg(default="ddp", help="with torchrun: whole model on every rank, or sharded by FSDP2")
    attn_implementation: str | None = HfArg(default=None, help="attention of transformers: eager, sdpa, ...")
    trust_remote_code: bool = HfArg(default=False, help="run the Python code that comes with a model")
    dataset_name: str | None = HfArg(default=None, help="local jsonl/json/csv/parquet file or hub data set; none: the built-in --task")
    dataset_config: str | None = HfArg(default=None, help="configuration of a hub data set, as main of GSM8K")
    dataset_split: str = HfArg(default="train", help="split of a hub data set")
    task: Literal["bills", "diary"] = HfArg(default="bills", help="built-in task: bills = missing knowledge, diary = careless skill")
    num_hard: int = HfArg(default=512, help="built-in task: hard training problems")
    num_easy: int = HfArg(default=256, help="built-in task: easy training problems")
    template: Literal["auto", "chat", "none", "r1", "qwen_math"] = HfArg(default="auto", help="of prompts; auto: chat if there is one")
    system_prompt: str | None = HfArg(default=None, help="system message of prompts that bring none; none: the template's")
    max_prompt_length: int = HfArg(default=1024, help="longer prompts are dropped, tokens")
    # rollout
    prompts_per_step: int = HfArg(default=12, help="prompts a step; rows = prompts x generations")
    num_generations: int = HfArg(default=8, help="completions per prompt: group size G")
    max_completion_length: int | None = HfArg(default=None, help="tokens; 64 for the built-in task, else 1024")
    temperature: float = HfArg(default=1.0, help="of sampling, and of the log-probs that are trained; 1: as the model is")
    generation_batch_size: int = HfArg(default=256, help="rows a call of generate, for memory")
    reward: Literal["boxed", "exact", "numeric", "choice", "math"] = HfArg(default="boxed", help="how the last \\boxed{} is graded")
    reward_fn: str | None = HfArg(default=None, help="own reward instead of --reward: PATH.py:FUNCTION, called as in TRL")
    grade_truncated: bool = HfArg(default=False, help="let completions without EOS earn a reward")
    # loss
    loss_type: Literal["dapo", "grpo", "dr_grpo"] = HfArg(default="dapo", help="mean over tokens; sequences, then rows; constant")
    scale_rewards: Literal["group", "none"] = HfArg(default="group", help="divide advantages by the group's std, or not")
    epsilon: float = HfArg(default=0.2, help="lower clip of the ratio, and upper unless --epsilon_high")
    epsilon_high: float | None = HfArg(default=None, help="upper clip of the ratio; inf: none")
    beta: float = HfArg(default=0.0, help="weight of the KL to the initial policy, nats a token; 0 loads no reference")
    entropy_coef: float = HfArg(default=0.0, help="weight of an entropy bonus, nats a token")
    mask_truncated_completions: bool = HfArg(default=False, help="no loss on rows without EOS")
    drop_zero_variance: bool = HfArg(default=True, help="skip the forward/backward of rows whose gradient is 0; the result is the same")
    # optimization
    learning_rate: float | None = HfArg(default=None, help="2e-4 for the built-in task, else 1e-6")
    lr_scheduler_type: Literal["constant", "constant_with_warmup", "linear", "cosine"] = HfArg(default="constant", help="of transformers")
    warmup_steps: int = HfArg(default=0, help="steps of linear warm-up of the learning rate")
    weight_decay: float = HfArg(default=0.0, help="of AdamW")
    max_grad_norm: float = HfArg(default=1.0, help="larger gradients are scaled down to this norm")
    num_iterations: int = HfArg(default=1, help="passes over each rollout batch")
    num_minibatches: int = HfArg(default=1, help="optimizer steps a pass; 1 x 1 is strictly on-policy")
    micro_batch_size: int = HfArg(default=0, help="rows a forward pass; 0: by --micro_batch_tokens")
    micro_batch_tokens: int = HfArg(default=8192, help="padded tokens a forward pass")
    logprob_impl: Literal["auto", "reference", "tiled", "triton"] = HfArg(default="auto", help="path of the log-probs; see logprob.py")
    gradient_checkpointing: bool = HfArg(default=False, help="less memory, one more forward")
    max_steps: int = HfArg(default=100, help="rollout batches")
    max_bad_steps: int = HfArg(default=10, help="steps in a row without a finite loss and gradient, after which the run stops")
    seed: int = HfArg(default=0, help="of data order and sampling")
    # evaluation and output
    eval_dataset_name: str | None = HfArg(default=None, help="as --dataset_name; the built-in task brings its own")
    eval_dataset_config: str | None = HfArg(default=None, help="configuration of a hub evaluation set")
    eval_dataset_split: str = HfArg(default="test", help="split of a hub evaluation set")
    eval_steps: int = HfArg(default=10, help="steps between evaluations; 0: never")
    eval_problems: int = HfArg(default=128, help="problems an evaluation; of the built-in task: per difficulty")
    num_generations_eval: int = HfArg(default=1, help="samples per evaluation problem, at --temperature")
    output_dir: str | None = HfArg(default=None, help="run folder; none: a fresh one under runs/")
    logging_steps: int = HfArg(default=1, help="steps between lines of metrics.jsonl")
    save_steps: int = HfArg(default=0, help="steps between checkpoints; 0: only the final model")
    save_total_limit: int = HfArg(default=2, help="checkpoints kept")
    save_completions_steps: int = HfArg(default=10, help="steps between files of rollouts in completions/; 0: none")
    resume_from_checkpoint: str | None = HfArg(
        default=None, metadata={"nargs": "?", "const": "latest"}, help="checkpoint or run folder; bare: the latest in --output_dir")
    dry_run: bool = HfArg(default=False, help="show settings, data, memory and FLOPs, and stop before training")
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = HfArg(default="none", help="who else gets metrics.jsonl")

    def __post_init__(self):
        flags.check_args(self)


def group_advantages(rewards, num_generations, scale_rewards="group", eps=1e-6):
    """Score each completion against its own group. [GRPO sec 4.1.2]

    rewards (B,) float, the rows of one prompt adjacent; returns (B,) float32, zero mean per group, in units of the group's
    std (scale_rewards "group") or of the reward ("none" [Dr. GRPO sec 3.2]).
    A group of equal rewards returns zeros: no signal, not an error (metric `frac_reward_zero_std`).
    Raises ValueError when B is not a multiple of num_generations.
    """
    if rewards.numel() % num_generations:
        raise ValueError(f"{rewards.numel()} rewards do not form groups of {num_generations}")
    # In float64 the mean of equal float32 rewards is that reward; in float32 eight times 0.1 leaves a centred 7e-9.
    groups = rewards.double().view(-1, num_generations)  # (N, G) float64
    centred = groups - groups.mean(dim=1, keepdim=True)  # (N, G) float64
    if scale_rewards == "none":
        return centred.view(-1).float()  # (B,) float32
    spread = groups.std(dim=1, correction=0, keepdim=True)  # (N, 1) float64  [CHOICE GRPO] divides by G, not G-1
    return (centred / (spread + eps)).view(-1).float()  # (B,) float32


def policy_loss(logps, old_logps, advantages, completion_mask, args, num_tokens, num_rows, entropy, ref_logps=None):
    """This micro-batch's share of the clipped objective of the whole optimizer step, negated. [GRPO eq 3]

    logps, old_logps, entropy, ref_logps (B, T) float32 in nats, at the sampling temperature; advantages (B,) float32;
    completion_mask (B, T) bool. num_tokens and num_rows () count the whole step, over all micro-batches and ranks, so that
    shares add up to the same loss however the rows are cut (tests/test_invariance.py).
    Returns (loss (), {metric: (sum, count) over this micro-batch's tokens}).
    """
    # On the first update the ratio is 1 everywhere and the loss near 0, but its gradient is A grad log pi (README, FAQ 1).
    ratio = torch.exp(logps - old_logps)  # (B, T) float32  [GRPO eq 3]
    epsilon_high = args.epsilon if args.epsilon_high is None else args.epsilon_high  # [DAPO sec 3.1]
    clipped = ratio.clamp(1 - args.epsilon, 1 + epsilon_high)  # (B, T) float32
    advantages = advantages.unsqueeze(1)  # (B, 1) float32
    # min over both products, not a clamp of one: for A < 0 the pessimistic side is the other one (tests/test_equations.py)
    token_loss = -torch.min(ratio * advantages, clipped * advantages)  # (B, T) float32  [GRPO eq 3]
    kl = torch.zeros_like(logps)  # (B, T) float32
    if ref_logps is not None:
        kl = torch.exp(ref_logps - logps) - (ref_logps - logps) - 1  # (B, T) float32  [GRPO eq 4]
        token_loss = token_loss + args.beta * kl  # (B, T) float32
    if args.entropy_coef:
        token_loss = token_loss - args.entropy_coef * entropy  # (B, T) float32

    token_loss = token_loss * completion_mask  # (B, T) float32
    if args.loss_type == "dapo":  # [DAPO sec 3.3]
        loss = token_loss.sum() / max(num_tokens, 1)  # () float32
    elif args.loss_type == "grpo":  # [GRPO eq 3]
        loss = (token_loss.sum(dim=1) / completion_mask.sum(dim=1).clamp(min=1)).sum() / num_rows  # () float32
    else:  # [Dr. GRPO sec 3.2]
        loss = token_loss.sum() / (num_rows * args.max_completion_length)  # () float32
    num = completion_mask.sum()  # ()
    with torch.no_grad():
        means = {
            "clip_ratio/low_mean": (((clipped > ratio) & (advantages < 0) & completion_mask).sum(), num),
            "clip_ratio/high_mean": (((clipped < ratio) & (advantages > 0) & completion_mask).sum(), num),
            "entropy": ((entropy * completion_mask).sum(), num),
            "kl": ((kl * completion_mask).sum(), num),
        }
    return loss, means


@dataclass
class Batch:
    """One step's rows: what `rollout` hands to `update`."""

    prompt_ids: torch.Tensor  # (B, P) int64, left-padded
    prompt_mask: torch.Tensor  # (B, P) bool
    completion_ids: torch.Tensor  # (B, T) int64, right-padded
    completion_mask: torch.Tensor  # (B, T) bool, True up to and including the first EOS
    ended: torch.Tensor  # (B,) bool, False where a completion was cut off
    rewards: torch.Tensor  # (B,) float32
    advantages: torch.Tensor  # (B,) float32
    old_logps: torch.Tensor | None  # (B, T) float32; None: strictly on-policy
    loss_inputs: dict = field(default_factory=dict)  # name -> (B,) or (B, T): what else `policy_loss` takes


def rollout(model, ref_model, tokenizer, rows, args, flops):
    """Sample and grade a group for every prompt. Returns (Batch, completion texts, metrics)."""
    eos_ids = common.eos_ids(model, tokenizer)
    rows = [row for row in rows for _ in range(args.num_generations)]  # B = N G, the rows of one prompt adjacent
    prompt_ids, prompt_mask = common.left_pad([row["prompt_ids"] for row in rows], tokenizer.pad_token_id, model.device)
    completion_ids, completion_mask = common.sample(
        model, prompt_ids, prompt_mask, eos_ids, tokenizer.pad_token_id, args.max_completion_length, args.temperature,
        batch_size=args.generation_batch_size)
    lengths = prompt_mask.sum(1) + completion_mask.sum(1)  # (B,)
    flops.add("rollout", lengths)
    flops.add_paper(lengths, passes=1)

    texts, ended = common.completion_texts(tokenizer, completion_ids, completion_mask, eos_ids)
    rewards = common.score(texts, ended, rows, args)  # (B,)
    metrics, loss_inputs = common.rollout_metrics(rows, rewards, completion_mask, ended, args), {}
    advantages = group_advantages(rewards, args.num_generations, args.scale_rewards)  # (B,)

    batch = Batch(prompt_ids, prompt_mask, completion_ids, completion_mask, torch.tensor(ended, device=model.device),
                  rewards.to(model.device), advantages.to(model.device), None, loss_inputs)
    if args.num_iterations * args.num_minibatches > 1:  # otherwise the batch is on-policy and pi_old is pi itself
        batch.old_logps = score_rows(model, batch, args, flops)
    if ref_model is not None:
        batch.loss_inputs["ref_logps"] = score_rows(ref_model, batch, args, flops)
    return batch, texts, metrics


@torch.no_grad()
def score_rows(model, batch, args, flops):
    """Log-probs (B, T) float32 of a batch's completions under `model`, without gradient, in micro-batches."""
    logps = torch.zeros_like(batch.completion_mask, dtype=torch.float32)  # (B, T)
    lengths = batch.prompt_mask.sum(1) + batch.completion_mask.sum(1)  # (B,)
    for rows in common.micro_batches(model, batch, torch.arange(len(lengths)), args.micro_batch_size, args.micro_batch_tokens):
        prompt, completion = common.trim(batch, rows)
        logps[rows, : completion[0].shape[1]] = policy_logps(model, *prompt, *completion, args.temperature, args.logprob_impl)[0]
    flops.add("train", lengths)
    return parallel.sum_over_ranks(logps)


def update(model, optimizer, batch, args, flops):
    """Train on one batch: num_iterations x num_minibatches optimizer steps. Returns metrics."""
    loss_mask = batch.completion_mask  # (B, T)
    if args.mask_truncated_completions:
        loss_mask = loss_mask & batch.ended.unsqueeze(1)
    lengths = batch.prompt_mask.sum(1) + batch.completion_mask.sum(1)  # (B,)
    trained = loss_mask.any(dim=1)  # (B,) rows that can have a gradient
    if args.drop_zero_variance and args.beta == 0 and args.entropy_coef == 0:
        trained &= batch.advantages != 0
    totals = {"loss": 0.0, "grad_norm": 0.0, "skipped_updates": 0}
    sums, counts = defaultdict(float), dict.fromkeys(("entropy", "kl", "clip_ratio/low_mean", "clip_ratio/high_mean"), 0)
    model.train()
    for _ in range(args.num_iterations):
        for groups in torch.arange(len(lengths), device=lengths.device).view(-1, args.num_generations).tensor_split(args.num_minibatches):
            minibatch = groups.flatten()
            # Every row of the step counts in the denominators, also those that are skipped below.
            num_tokens, num_rows = int(loss_mask[minibatch].sum()), len(minibatch)
            # Zeros, not None: AdamW must take its momentum step even when no row has a gradient (tests/test_invariance.py).
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
            active, minibatch_loss = minibatch[trained[minibatch]], 0.0
            for rows in common.micro_batches(model, batch, active, args.micro_batch_size, args.micro_batch_tokens):
                prompt, completion = common.trim(batch, rows)
                length = completion[0].shape[1]
                logps, entropy = policy_logps(model, *prompt, *completion, args.temperature, args.logprob_impl)  # (b, t) each
                old_logps = logps.detach() if batch.old_logps is None else batch.old_logps[rows, :length]
                loss_inputs = {name: value[rows, :length] if value.dim() == 2 else value[rows] for name, value in batch.loss_inputs.items()}
                mask = loss_mask[rows, :length]
                loss, means = policy_loss(
                    logps, old_logps, batch.advantages[rows], mask, args, num_tokens, num_rows, entropy, **loss_inputs)
                loss.backward()
                minibatch_loss += loss.item()
                for name, (value, count) in means.items():
                    sums[name] += value.item()
                    counts[name] = counts.get(name, 0) + count.item()
            flops.add("train", lengths[active], passes=4 if args.gradient_checkpointing else 3)
            flops.add_paper(lengths[minibatch], passes=3)
            grad_norm = parallel.clip_grad_norm(model, args.max_grad_norm)
            minibatch_loss = parallel.sum_over_ranks(torch.tensor(minibatch_loss, dtype=torch.float64, device=lengths.device)).item()
            totals["loss"] += minibatch_loss
            totals["grad_norm"] += grad_norm.item()
            if torch.isfinite(grad_norm + minibatch_loss):  # the same on every rank
                optimizer.step()
            else:  # weights and moments stay as if this update had not been due (tests/test_faults.py)
                totals["skipped_updates"] += 1
                tqdm.write(f"the loss is {minibatch_loss}, the gradient norm {grad_norm.item()}: this optimizer step is skipped")
    num_updates = args.num_iterations * args.num_minibatches
    sums, counts = parallel.sum_over_ranks(sums), parallel.sum_over_ranks(counts)
    totals["loss"] /= num_updates
    totals["grad_norm"] /= num_updates
    means = {name: sums[name] / count if count else float("nan") for name, count in counts.items()}
    return totals | means | {"frac_rows_trained": trained.float().mean().item()}


def main():
    args = flags.parse_args(Args, __doc__, __file__)
    model, tokenizer = common.load_policy(args)
    ref_model = common.load_policy(args)[0] if args.beta else None
    train_rows, eval_rows = data.load_rows(args, tokenizer)
    if args.dry_run:
        return estimate.dry_run(args, model, tokenizer, train_rows, eval_rows)
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay, fused=True)
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, args.warmup_steps, args.max_steps)
    flops = common.Flops.of(model, args)
    start = runs.load_checkpoint(args.resume_from_checkpoint, model, optimizer, scheduler, flops)
    run_dir = runs.open_run(args, __file__, model, train_rows, eval_rows)
    log = runs.RunLog(run_dir, args)
    common.self_check(model, tokenizer, train_rows, args)
    if start == 0 and eval_rows:
        log.write({"step": 0} | common.evaluation_metrics(model, tokenizer, eval_rows, args))

    bar = tqdm(log.steps(start), initial=start, total=args.max_steps, desc="training", unit="step", disable=parallel.rank() > 0)
    for step in bar:
        began = time.perf_counter()
        common.seed_everything(args.seed, step)
        rows = data.step_rows(train_rows, args.prompts_per_step, args.seed, step)
        batch, texts, metrics = rollout(model, ref_model, tokenizer, rows, args, flops)
        rolled_out = time.perf_counter()
        metrics |= {"step": step + 1, "learning_rate": scheduler.get_last_lr()[0]} | update(model, optimizer, batch, args, flops)
        scheduler.step()
        ended = time.perf_counter()
        metrics |= {"time/rollout": rolled_out - began, "time/update": ended - rolled_out, "step_time": ended - began} | flops.metrics()
        if eval_rows and (step + 1 == args.max_steps or (step + 1) % args.eval_steps == 0):
            metrics |= common.evaluation_metrics(model, tokenizer, eval_rows, args)
        log.step(metrics, rows, batch, texts)
        bar.set_postfix(log.headline(metrics))
        if log.should_save(step + 1):
            runs.save_checkpoint(run_dir, step + 1, model, tokenizer, optimizer, scheduler, flops, args.save_total_limit)
    runs.save_model(run_dir, model, tokenizer)
    log.finish()


if __name__ == "__main__":
    runs.run_main(main)
