"""RePO, Rephrasing Policy Optimization (arXiv 2602.10819v1). Not Replay-Enhanced Policy Optimization, arXiv 2506.09340.

When a group fails, the policy reads somebody else's solution k, retells it in its own words, and learns from the retelling:

    o_1..o_G ~ pi(. | q),   gamma_fail = 1/G #{i: R(o_i) < delta}                             [RePO gate]
    if gamma_fail >= rho:  o_rep ~ pi(. | P(q, k));  the worst o_i becomes o_rep              [RePO replacement]
    then GRPO on the final group: advantages, ratio, clip; o_rep is scored as an answer to q  [RePO objective]

P(q, k) is a prompt that asks to understand k and then to tell it in one's own words. Symbols and switches are those of grpo.py.
The steps are tagged by name; they are known here from accounts of the paper, which leave the following open:

  rho      --failure_rate 0.125: one failed rollout of eight is enough, which learns earlier on the built-in task (docs/results.md); 1: all;
           above 1 nothing is replaced and this is GRPO [CHOICE RePO]
  delta    --reward_threshold 0.5: with rewards of 0 and 1 any value in (0, 1] is the same [CHOICE RePO]
  ratio    --rephrase_ratio question: pi(o | q) / pi_old(o | q), 1 at the first update like that of any own sample; behavior:
           over pi_old(o | P(q, k)), which sampled it; stopgrad: 1 throughout; shaped: p / (p + gamma) as LUFFY [CHOICE RePO]
  wrong    retellings replace nothing unless --require_correct_rephrase false [CHOICE RePO]
  ties     among the worst: the last one [CHOICE RePO]
  wording  of P: --rephrase_prompt; text up to --rephrase_marker is cut from the retelling, whose sampled ids are kept otherwise,
           so that it reads as an answer to q [CHOICE RePO]
  k itself takes the place of its retelling with --raw_trace, to see what retelling adds [CHOICE RePO]

Changes against grpo.py: (1) import, (2-3) flags, (4) their checks, (5-8) ratio of rephrased rows and its metrics, (9-10) gate and
replacement.

    python repo.py                         the built-in knowledge task: hard problems, which GRPO never solves, are learnt in own words
    python repo.py --task diary            the built-in skill task
"""

import time
from collections import defaultdict
from dataclasses import dataclass, field
from statistics import mean  # RePO(1/10): for its metrics
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
    # RePO(2/10): the knowledge, when it is used, and how
    # off-policy knowledge
    traces: str | None = HfArg(default=None, help="jsonl of eval.py --save_traces; none: the data set's column, or the built-in ones")
    trace_style: Literal["teacher", "own", "self"] = HfArg(default="teacher", help="of the built-in traces; self: sampled by the base")
    keep_wrong_traces: bool = HfArg(default=False, help="use traces that do not grade right, too; otherwise they are dropped")
    reward_threshold: float = HfArg(default=0.5, help="delta: a rollout with a smaller reward has failed")
    failure_rate: float = HfArg(default=0.125, help="rho: share of failed rollouts from which on a group is helped; above 1: GRPO")
    rephrase_ratio: Literal["question", "behavior", "stopgrad", "shaped"] = HfArg(default="question", help="ratio on rephrased tokens")
    shaping_gamma: float = HfArg(default=0.1, help="gamma of --rephrase_ratio shaped, a probability")
    require_correct_rephrase: bool = HfArg(default=True, help="replace a rollout only by a retelling that reaches the threshold")
    rephrase_prompt: str | None = HfArg(default=None, help="P: text with {prompt} and {trace}; none: REPHRASE_PROMPT, or the built-in one")
    rephrase_marker: str = HfArg(default="### Solution", help="what the retelling holds up to this marker is cut off")
    raw_trace: bool = HfArg(default=False, help="replace by the trace as it is instead of a retelling, to see what retelling adds")
    max_rephrase_prompt_length: int = HfArg(default=4096, help="groups with a longer P(q, k) are not helped, tokens")
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
    # RePO(3/10): by then the built-in task is learnt
    max_steps: int = HfArg(default=150, help="rollout batches")
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
        # RePO(4/10): refuse what cannot work
        for name in ("failure_rate", "shaping_gamma", "reward_threshold"):
            if not getattr(self, name) > 0:
                raise common.BadArgument(f"--{name} must be positive, got {getattr(self, name)}")
        if self.rephrase_prompt is not None and not ("{prompt}" in self.rephrase_prompt and "{trace}" in self.rephrase_prompt):
            raise common.BadArgument("--rephrase_prompt must contain {prompt} and {trace}")


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


def policy_loss(logps, old_logps, advantages, completion_mask, args, num_tokens, num_rows, entropy, ref_logps=None,
                # RePO(5/10): rephrased (B,) bool; behavior_logps (B, T) float32, nats: of rephrased tokens under P(q, k)
                rephrased=None, behavior_logps=None):
    """This micro-batch's share of the clipped objective of the whole optimizer step, negated. [GRPO eq 3]

    logps, old_logps, entropy, ref_logps (B, T) float32 in nats, at the sampling temperature; advantages (B,) float32;
    completion_mask (B, T) bool. num_tokens and num_rows () count the whole step, over all micro-batches and ranks, so that
    shares add up to the same loss however the rows are cut (tests/test_invariance.py).
    Returns (loss (), {metric: (sum, count) over this micro-batch's tokens}).
    """
    # RePO(6/10): what the ratio of a rephrased row is taken against [CHOICE RePO]
    if rephrased is not None:
        rephrased = rephrased.unsqueeze(1)  # (B, 1) bool
        against = {"behavior": behavior_logps, "stopgrad": logps.detach()}.get(args.rephrase_ratio, old_logps)  # (B, T) float32
        old_logps = torch.where(rephrased, against, old_logps)  # (B, T) float32
    # On the first update the ratio is 1 everywhere and the loss near 0, but its gradient is A grad log pi (README, FAQ 1).
    ratio = torch.exp(logps - old_logps)  # (B, T) float32  [GRPO eq 3]
    epsilon_high = args.epsilon if args.epsilon_high is None else args.epsilon_high  # [DAPO sec 3.1]
    clipped = ratio.clamp(1 - args.epsilon, 1 + epsilon_high)  # (B, T) float32
    # RePO(7/10): or a weight without ratio and clip [CHOICE RePO]
    if rephrased is not None and args.rephrase_ratio == "shaped":
        ratio = torch.where(rephrased, logps.exp() / (logps.exp() + args.shaping_gamma), ratio)  # (B, T) float32
        clipped = torch.where(rephrased, ratio, clipped)  # (B, T) float32
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
        # RePO(8/10): how much likelier the retelling was with the notes than it is without
        if rephrased is not None:
            picked = rephrased & completion_mask  # (B, T) bool
            for name, values in {"prob": logps.exp(), "context_gap": logps - behavior_logps, "ratio": ratio}.items():
                means[f"rephrase/{name}"] = (values[picked].sum(), picked.sum())
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


# RePO(9/10): the gate, the retelling and the replacement
REPHRASE_PROMPT = """{prompt}

Here is a solution that somebody else wrote:

{trace}

Read it until you understand it. Then solve the problem yourself, in your own words and in the way you would write it, without \
mentioning that solution. Write a line "### Solution" and after it your solution, which ends with the final answer in \\boxed{}."""


def rephrase_prompt_ids(row, tokenizer, args):
    """P(q, k) as token ids: the problem and its trace in --rephrase_prompt, rendered like any prompt."""
    if args.rephrase_prompt is None and args.dataset_name is None:
        text = common.tasks.rephrase_prompt(row["prompt"], row["trace"])
    else:
        # Split first: a problem about \operatorname{trace} must not get its solution (tests/test_offpolicy.py).
        parts = (args.rephrase_prompt or REPHRASE_PROMPT).split("{trace}")
        text = row["trace"].join(part.replace("{prompt}", row["prompt"]) for part in parts)
    return common.encode_prompt(tokenizer, common.render_prompt(tokenizer, text, args.template, args.system_prompt))


def rephrase_failed_groups(model, tokenizer, rows, completion_ids, completion_mask, texts, ended, rewards, args, flops):
    """Replace the worst rollout of each failed group by the policy's retelling of its trace. [RePO gate] [RePO replacement]

    rows, texts, ended: lists of length B, completion_ids, completion_mask (B, T), rewards (B,), the rows of one prompt adjacent.
    Returns these five anew, `loss_inputs` for the loss, and metrics; nothing is sampled, and nothing changes, when no group fails.
    """
    size = args.num_generations
    failure = (rewards < args.reward_threshold).double().view(-1, size).mean(dim=1)  # (N,) float64  gamma_fail [RePO gate]
    failed, prompts, too_long = [], [], 0
    for group in (failure >= args.failure_rate).nonzero().flatten().tolist():
        row = rows[group * size]
        if row["trace"] is None:
            continue
        ids = row["prompt_ids"] if args.raw_trace else rephrase_prompt_ids(row, tokenizer, args)
        if len(ids) > args.max_rephrase_prompt_length:
            too_long += 1
        else:
            failed.append(group)
            prompts.append(ids)
    metrics = {"rephrase/failure_rate": failure.mean().item(), "rephrase/asked": len(failed) / len(failure),
               "rephrase/too_long": too_long / len(failure), "rephrase/replaced": 0.0}
    kept = completion_ids, completion_mask, texts, ended, rewards, {}, metrics
    if not failed:
        return kept
    stops, pad = common.eos_ids(model, tokenizer), tokenizer.pad_token_id
    prompt_ids, prompt_mask = common.left_pad(prompts, pad, model.device)
    if args.raw_trace:
        told, told_ended = [rows[group * size]["trace"] for group in failed], [True] * len(failed)
        told_ids = [rows[group * size]["trace_ids"] for group in failed]
    else:
        ids, mask = common.sample(  # by the current policy, every time: the retelling moves with it
            model, prompt_ids, prompt_mask, stops, pad, args.max_completion_length, args.temperature, batch_size=args.generation_batch_size)
        lengths = prompt_mask.sum(1) + mask.sum(1)  # (failed groups,)
        flops.add("rephrase", lengths)
        flops.add_paper(lengths, passes=1)
        told, told_ended = common.completion_texts(tokenizer, ids, mask, stops)
        told_ids = [row[row_mask].tolist() for row, row_mask in zip(ids, mask)]
        for i, text in enumerate(told):
            if args.rephrase_marker in text:  # only then are ids that were not sampled trained
                told[i] = text.rsplit(args.rephrase_marker, 1)[1].strip()
                told_ids[i] = tokenizer(told[i], add_special_tokens=False)["input_ids"] + told_ids[i][-1:] * told_ended[i]
    told_rewards = common.score(told, told_ended, [rows[group * size] for group in failed], args)
    good = told_rewards >= args.reward_threshold  # (failed groups,)
    used = [i for i in range(len(failed)) if told_ids[i] and (good[i] or not args.require_correct_rephrase)]
    group_lengths = completion_mask.sum(1).view(-1, size).float().mean(dim=1)  # (N,)
    metrics |= {"rephrase/success": good.float().mean().item(), "rephrase/replaced": len(used) / len(failure),
                "rephrase/overlap": mean(common.ngram_overlap(told[i], rows[group * size]["trace"]) for i, group in enumerate(failed)),
                "rephrase/length_ratio": mean(len(told_ids[i]) / group_lengths[group].item() for i, group in enumerate(failed))}
    if not used:
        return kept
    rephrased_ids = common.right_pad([torch.tensor([told_ids[i]], device=model.device) for i in used], pad)  # (replaced, T')
    lengths = torch.tensor([len(told_ids[i]) for i in used], device=model.device)  # (replaced,)
    rephrased_mask = torch.arange(rephrased_ids.shape[1], device=model.device) < lengths.unsqueeze(1)  # (replaced, T')
    as_sampled = Batch(prompt_ids[used], prompt_mask[used], rephrased_ids, rephrased_mask, None, None, None, None)
    # The last of the worst rows [CHOICE RePO], and the rows of the final group: sampled ones first, retellings after them.
    places = [failed[i] * size + size - 1 - int(rewards.view(-1, size)[failed[i]].flip(0).argmin()) for i in used]
    source = torch.arange(len(rows), device=model.device)  # (B,)
    source[places] = len(rows) + torch.arange(len(used), device=model.device)
    completion_ids = common.right_pad([completion_ids, rephrased_ids], pad)[source]  # (B, T)
    completion_mask = common.right_pad([completion_mask, rephrased_mask], False)[source]  # (B, T)
    behavior_logps = torch.zeros_like(completion_mask, dtype=torch.float32)  # (B, T)
    behavior_logps[places, : rephrased_ids.shape[1]] = score_rows(model, as_sampled, args, flops)
    texts, ended, rewards = list(texts), list(ended), rewards.clone()
    for place, i in zip(places, used):
        texts[place], ended[place], rewards[place] = told[i], told_ended[i], told_rewards[i]
    loss_inputs = {"rephrased": source >= len(rows), "behavior_logps": behavior_logps}
    return completion_ids, completion_mask, texts, ended, rewards, loss_inputs, metrics


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
    # RePO(10/10): the final group, and the metrics of the original one above
    completion_ids, completion_mask, texts, ended, rewards, loss_inputs, rephrase_metrics = rephrase_failed_groups(
        model, tokenizer, rows, completion_ids, completion_mask, texts, ended, rewards, args, flops)
    metrics |= rephrase_metrics
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
