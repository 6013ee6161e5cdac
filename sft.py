"""SFT, supervised fine-tuning on off-policy traces: the baseline, and with any RL script after it (--model RUN_FOLDER) SFT -> RL.

    J = E_{q, k} sum_t log pi(k_t | q, k_<t) / sum_t 1        mean over the trace tokens of the optimizer step [SFT objective]

The skeleton, data, evaluation and ledger are those of grpo.py; where that samples a group for each prompt, this takes the prompt's
trace k. The tokens trained are those of the trace and its EOS; problems without a trace are left out.

Changes against grpo.py: (1-4) flags, (5-6) the loss instead of advantages and ratio, (7) traces instead of rollouts, (8) no rows
without a trace.

    python sft.py                          the built-in knowledge task: learnt, in the teacher's foreign words
    python sft.py --output_dir runs/sft && python grpo.py --model runs/sft
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
    # SFT(1/8): traces instead of rollouts; class attributes that are no flags keep the rest of the script as it is
    # off-policy knowledge
    traces: str | None = HfArg(default=None, help="jsonl of eval.py --save_traces; none: the data set's column, or the built-in ones")
    trace_style: Literal["teacher", "own", "self"] = HfArg(default="teacher", help="of the built-in traces; self: sampled by the base")
    keep_wrong_traces: bool = HfArg(default=False, help="use traces that do not grade right, too; otherwise they are dropped")
    # rollout
    prompts_per_step: int = HfArg(default=64, help="traces a step")
    num_generations, num_off_policy, scale_rewards, beta, entropy_coef, num_iterations = 1, 1, "none", 0, 0, 1
    mask_truncated_completions, drop_zero_variance = False, False
    max_completion_length: int | None = HfArg(default=None, help="tokens; 64 for the built-in task, else 1024; longer traces are dropped")
    temperature: float = HfArg(default=1.0, help="of sampling, and of the log-probs that are trained; 1: as the model is")
    generation_batch_size: int = HfArg(default=256, help="rows a call of generate, for memory")
    reward: Literal["boxed", "exact", "numeric", "choice", "math"] = HfArg(default="boxed", help="how the last \\boxed{} is graded")
    reward_fn: str | None = HfArg(default=None, help="own reward instead of --reward: PATH.py:FUNCTION, called as in TRL")
    grade_truncated: bool = HfArg(default=False, help="let completions without EOS earn a reward")
    # SFT(2/8): no flags of the RL objective, and a higher rate
    # optimization
    learning_rate: float | None = HfArg(default=None, help="1e-3 for the built-in task, else 1e-5")
    lr_scheduler_type: Literal["constant", "constant_with_warmup", "linear", "cosine"] = HfArg(default="constant", help="of transformers")
    warmup_steps: int = HfArg(default=0, help="steps of linear warm-up of the learning rate")
    weight_decay: float = HfArg(default=0.0, help="of AdamW")
    max_grad_norm: float = HfArg(default=1.0, help="larger gradients are scaled down to this norm")
    # SFT(3/8): minibatches are the same thing as a smaller --prompts_per_step
    num_minibatches = 1
    micro_batch_size: int = HfArg(default=0, help="rows a forward pass; 0: by --micro_batch_tokens")
    micro_batch_tokens: int = HfArg(default=8192, help="padded tokens a forward pass")
    logprob_impl: Literal["auto", "reference", "tiled", "triton"] = HfArg(default="auto", help="path of the log-probs; see logprob.py")
    gradient_checkpointing: bool = HfArg(default=False, help="less memory, one more forward")
    # SFT(4/8): 10 epochs of the built-in task
    max_steps: int = HfArg(default=120, help="optimizer steps")
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
        # SFT(5/8): before the RL default is filled in
        if self.learning_rate is None:
            self.learning_rate = 1e-3 if self.dataset_name is None else 1e-5
        flags.check_args(self)


# SFT(6/8): the loss; there are no advantages
def policy_loss(logps, old_logps, advantages, completion_mask, args, num_tokens, num_rows, entropy):
    """This micro-batch's share of the mean negative log-likelihood of the step's trace tokens. [SFT objective]

    logps, entropy (B, T) float32 in nats; completion_mask (B, T) bool; num_tokens () of the whole step; the rest is not used.
    Returns (loss (), {metric: (sum, count) over this micro-batch's tokens}).
    """
    token_loss = -logps * completion_mask  # (B, T) float32
    num = completion_mask.sum()  # ()
    return token_loss.sum() / max(num_tokens, 1), {"entropy": ((entropy.detach() * completion_mask).sum(), num)}  # () float32


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


# SFT(7/8): the traces as a batch; nothing is sampled
def rollout(model, ref_model, tokenizer, rows, args, flops):
    """The step's traces as if they had been sampled. Returns (Batch, trace texts, metrics)."""
    prompt_ids, prompt_mask = common.left_pad([row["prompt_ids"] for row in rows], tokenizer.pad_token_id, model.device)
    trace_ids = [torch.tensor([row["trace_ids"]], device=model.device) for row in rows]
    completion_ids = common.right_pad(trace_ids, tokenizer.pad_token_id)  # (B, T)
    completion_mask = common.completion_mask(completion_ids, common.eos_ids(model, tokenizer))  # (B, T)
    ones = torch.ones(len(rows), device=model.device)  # (B,)
    batch = Batch(prompt_ids, prompt_mask, completion_ids, completion_mask, ones.bool(), ones, ones, None)
    return batch, [row["trace"] for row in rows], {"completions/mean_length": completion_mask.sum(1).float().mean().item()}


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
    # SFT(8/8): only what has a trace
    train_rows = [row for row in train_rows if row["trace"] is not None]
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
