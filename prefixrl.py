"""PrefixRL, RL conditioned on prefixes of off-policy traces (Reuse your FLOPs, arXiv 2601.18795v2). Not the circuit PrefixRL of NVIDIA.

Somebody's right solution y of a hard problem q gives new *prompts*, never a target: the policy goes on from where y was cut.

    J = E_{q, h} E_{o ~ pi(. | q, y_1:h)} R(o)  +  E_q E_{o ~ pi(. | q)} R(o)                 [PrefixRL objective]
    a group = G rollouts of one (q, h); A_i = R_i - mean over it; the gradient of own tokens only, strictly on-policy

A prefix is an unfinished answer: the trace's first h token ids follow the prompt's ids, and nothing is decoded and encoded again.
Training on prefixed problems also lifts problems without a prefix ("back-generalisation"). Evaluation is always without.
Symbols and switches are those of grpo.py. The parts of the paper have names.

  cuts          Three different ones per trace, uniform in 40-80 % of its tokens (rounded), by (--seed, problem) [PrefixRL cuts].
  mixture       Three prefixed prompts to one plain, shuffled [PrefixRL cuts]. --prefixed_only leaves every plain one out.
  traces        The base's own, by rejection sampling (eval.py --save_traces); their FLOPs are charged as flops/traces. A foreign trace is
                tokenised once. Easy problems of the built-in task and problems without a trace stay plain [CHOICE PrefixRL].
  answers       A prefix that shows the answer, in a \\boxed, after #### or "answer is", or that earns the reward itself, is dropped.
                Prefix and continuation are graded as one answer [CHOICE PrefixRL].
  std, length   No division by std, mean over the tokens of the optimizer step, temperature 1, no KL [CHOICE PrefixRL].

Changes against grpo.py: (1) import, (2-4) flags and defaults, (5) prompts with prefixes, and metrics by prefix, (6) which the rollout
adds, (7) the training set.

    python prefixrl.py                     careless skill, with traces of the base itself
    python prefixrl.py --prefixed_only     back-generalisation: no training problem is ever seen without a prefix
"""

import random  # PrefixRL(1/7): cuts have a generator of their own
from dataclasses import dataclass
from typing import Literal

import torch

import common
import engine
from engine import arg


@dataclass
class Args(engine.TraceArgs):  # PrefixRL(2/7): traces are inherited, too
    # PrefixRL(3/7): how traces are cut; a skill, and as many hard problems as the base has traces
    # off-policy knowledge
    prefix_min: float = arg(0.4, "Shortest prefix, share of the trace's tokens, rounded", above=0, most="prefix_max")
    prefix_max: float = arg(0.8, "Longest prefix, share of the trace's tokens", below=1)
    prefixes_per_trace: int = arg(3, "Prefixed prompts per trace; 0 = none", least=0)
    plain_per_trace: int = arg(1, "Plain prompts per trace", least=0)
    prefixed_only: bool = arg(False, "Train on prefixed prompts alone")
    trace_style: Literal["teacher", "own", "self"] = arg("self", "Style of the built-in traces; self = sampled by the base")
    task: Literal["bills", "diary"] = arg("diary", "Built-in task: bills = missing knowledge, diary = careless skill")
    num_hard: int = arg(64, "Hard training problems of the built-in task", least=0)
    num_easy: int = arg(128, "Easy training problems of the built-in task", least=0)
    trace_limit_flag = None  # of any length: --max_prompt_length bounds what is used of it
    # rollout
    num_generations: int = arg(8, "G: completions per prompt, the group", least=1)
    # loss
    loss_type: Literal["dapo", "grpo", "dr_grpo"] = arg("dapo", "Mean over tokens; of row means; sum / (rows x longest)")
    scale_rewards: Literal["group", "none"] = arg("none", "Divide advantages by the std of the group, or not")  # PrefixRL(4/7)
    epsilon: float = arg(0.2, "Clip of the ratio: 1 - epsilon, and 1 + epsilon unless --epsilon_high is given", least=0)
    epsilon_high: float | None = arg(None, "Upper clip of the ratio; inf = none", least=0)
    beta: float = arg(0.0, "Weight of the KL to the initial policy, nats a token; 0 loads no reference model", least=0)
    entropy_coef: float = arg(0.0, "Weight of an entropy bonus, nats a token")
    mask_truncated_completions: bool = arg(False, "Train nothing on completions without EOS")
    drop_zero_variance: bool = arg(True, "Skip the computation of rows whose gradient is 0; the update is the same")
    # optimization
    num_iterations: int = arg(1, "Passes over each batch of rollouts", least=1)
    num_minibatches: int = arg(1, "Optimizer steps in a pass; 1 x 1 is strictly on-policy", least=1, most="prompts_per_step")


def group_advantages(rewards, num_generations, scale_rewards="group", eps=1e-6):
    """Score each completion against its own group. [GRPO sec 4.1.2]

    rewards (B,) float, the rows of one prompt adjacent; returns (B,) float32 with zero mean in each group.
    A group of equal rewards returns zeros: no signal (metric `frac_reward_zero_std`).
    Raises ValueError when B is not a multiple of num_generations.
    """
    if rewards.numel() % num_generations:
        raise ValueError(f"{rewards.numel()} rewards do not form groups of {num_generations}")
    groups = rewards.double().view(-1, num_generations)  # (N, G) float64, in which the mean of equal rewards is exact
    centred = groups - groups.mean(dim=1, keepdim=True)  # (N, G) float64
    if scale_rewards == "none":
        return centred.view(-1).float()  # (B,) float32
    std = groups.std(dim=1, correction=0, keepdim=True)  # (N, 1) float64  [CHOICE GRPO] divides by G, not G - 1
    return (centred / (std + eps)).view(-1).float()  # (B,) float32


def policy_loss(logps, entropy, batch, args, num_tokens, num_rows):
    """This micro-batch's share of the clipped objective of the whole optimizer step, negated. [GRPO eq 3]

    logps, entropy (B, T) float32 in nats, at the sampling temperature. num_tokens and num_rows () count the optimizer step, over all
    micro-batches and ranks, so that the shares add up to the same loss however the rows are cut (tests/test_invariance.py).
    Returns (loss (), {metric: (sum, count) over this micro-batch's tokens}).
    """
    mask, advantages = batch.loss_mask, batch.advantages.unsqueeze(1)  # (B, T) bool, (B, 1) float32
    old_logps = logps.detach() if batch.old_logps is None else batch.old_logps  # (B, T) float32
    # At the first update the ratio is 1 and the loss near 0, but its gradient is A grad log pi (docs/faq.md, question 1).
    ratio = torch.exp(logps - old_logps)  # (B, T) float32  [GRPO eq 3]
    epsilon_high = args.epsilon if args.epsilon_high is None else args.epsilon_high  # [DAPO sec 3.1]
    clipped = ratio.clamp(1 - args.epsilon, 1 + epsilon_high)  # (B, T) float32
    # The smaller of both products: which clip binds depends on the sign of A (tests/test_equations.py).
    token_loss = -torch.min(ratio * advantages, clipped * advantages)  # (B, T) float32  [GRPO eq 3]
    if batch.ref_logps is not None:
        kl = torch.exp(batch.ref_logps - logps) - (batch.ref_logps - logps) - 1  # (B, T) float32  [GRPO eq 4]
        token_loss = token_loss + args.beta * kl  # (B, T) float32
    if args.entropy_coef:
        token_loss = token_loss - args.entropy_coef * entropy  # (B, T) float32

    token_loss = token_loss * mask  # (B, T) float32
    if args.loss_type == "dapo":  # [DAPO sec 3.3]
        loss = token_loss.sum() / max(num_tokens, 1)  # () float32
    elif args.loss_type == "grpo":  # [GRPO eq 3]
        loss = (token_loss.sum(dim=1) / mask.sum(dim=1).clamp(min=1)).sum() / num_rows  # () float32
    else:  # [Dr. GRPO sec 3.2]
        loss = token_loss.sum() / (num_rows * args.max_completion_length)  # () float32
    num = mask.sum()  # ()
    return loss, {
        "clip_ratio/low_mean": (((clipped > ratio) & (advantages < 0) & mask).sum(), num),
        "clip_ratio/high_mean": (((clipped < ratio) & (advantages > 0) & mask).sum(), num),
        "entropy": ((entropy.detach() * mask).sum(), num),
        **({} if batch.ref_logps is None else {"kl": ((kl.detach() * mask).sum(), num)}),
    }


@dataclass
class Batch(engine.Rows):
    """The rows of one step, from `rollout` to `update`: prompt_ids, prompt_mask (B, P), completion_ids, completion_mask (B, T) and these.

    batch[rows] are some of the rows, trimmed to the longest.
    """

    loss_mask: torch.Tensor  # (B, T) bool, the tokens that are trained
    advantages: torch.Tensor  # (B,) float32
    old_logps: torch.Tensor | None = None  # (B, T) float32; None: strictly on-policy, where pi_old is pi itself
    ref_logps: torch.Tensor | None = None  # (B, T) float32; None: no KL term


# PrefixRL(5/7): the prompts with prefixes, and metrics by prefix
def add_prefixes(problems, tokenizer, args):
    """Training problems: each plain, and each trace cut --prefixes_per_trace times. [PrefixRL cuts]

    A prefixed problem has `prefix` (str) and `prefix_ids`, with which its `prompt_ids` end: a prefix is prompt, and never trained.
    """
    plain, prefixed = [], []
    for problem in problems:
        traced = common.rows_of_traces([problem] if args.dataset_name or problem["difficulty"] != "easy" else [])
        plain += [problem | {"prefix_ids": [], "prefix_share": 0.0}] * (args.plain_per_trace * len(traced) if traced else 1)
        rng = random.Random(f"{args.seed}/prefix/{problem['prompt']}")  # [PrefixRL cuts]
        for row in traced:
            trace_ids = row["trace_ids"][:-1]  # without EOS
            least, most = round(args.prefix_min * len(trace_ids)), int(args.prefix_max * len(trace_ids) + 1e-9)  # [PrefixRL cuts]
            lengths = range(max(1, min(least, most)), most + 1)
            for prefix_ids in [trace_ids[:length] for length in rng.sample(lengths, min(args.prefixes_per_trace, len(lengths)))]:
                prefixed.append(row | {"prompt_ids": row["prompt_ids"] + prefix_ids, "prefix_ids": prefix_ids,  # [PrefixRL cuts]
                                       "prefix": tokenizer.decode(prefix_ids, skip_special_tokens=True),
                                       "prefix_share": len(prefix_ids) / len(trace_ids), "has_cut": True})
    prefixed = common.usable_prefixes(prefixed, args)
    cut = {row["prompt"] for row in prefixed}  # a problem may have lost all its prefixes
    print(f"prefixes: {len(prefixed)} prefixed prompts" + ("" if args.prefixed_only else f" and {len(plain)} plain ones"))
    kept = prefixed if args.prefixed_only else [row | {"has_cut": row["prompt"] in cut} for row in plain] + prefixed  # [PrefixRL objective]
    if not kept:
        raise engine.BadArgument("no prompt is left: no trace has a prefix, and there are no plain prompts")
    return kept


def prefix_metrics(samples, args, bins=4):
    """Mean reward with and without prefix of the problems that have both, the gap, and by prefix length."""
    rewards, shares, has_cut = (torch.tensor(values) for values in zip(*(
        (sample.reward, sample.problem["prefix_share"], sample.problem["has_cut"]) for sample in samples)))  # (B,) each
    bins = bins if args.prefix_min < args.prefix_max else 1
    width = (args.prefix_max - args.prefix_min) / bins
    place = ((shares - args.prefix_min) / max(width, 1e-9)).floor().clamp(0, bins - 1)  # (B,) float32
    picked = {"with_prefix": shares > 0, "without_prefix": has_cut & (shares == 0)}
    for index in range(bins):
        low = args.prefix_min + index * width
        picked[f"prefix_{low:.2f}_{low + width:.2f}"] = (shares > 0) & (place == index)
    metrics = {f"reward/{name}": rewards[rows].mean().item() for name, rows in picked.items() if rows.any()}
    if picked["with_prefix"].any() and picked["without_prefix"].any():
        metrics["reward/prefix_gap"] = metrics["reward/with_prefix"] - metrics["reward/without_prefix"]
    return metrics


def rollout(model, ref_model, tokenizer, problems, args, flops):
    """Sample and grade a group for each of N problems. Returns (Batch, the list of B Samples behind it, metrics)."""
    problems = [problem for problem in problems for _ in range(args.num_generations)]  # B of them, a group adjacent
    prompts = [problem["prompt_ids"] for problem in problems]
    samples = common.grade(common.sample(model, tokenizer, prompts, problems, args, flops), args)
    metrics = common.rollout_metrics(samples, args) | prefix_metrics(samples, args)  # PrefixRL(6/7)

    padded = engine.pad(prompts, [sample.ids for sample in samples], tokenizer, model.device)
    rewards = torch.tensor([sample.reward for sample in samples], device=model.device)  # (B,) float32
    unmasked = torch.tensor([sample.ended or not args.mask_truncated_completions for sample in samples], device=model.device)  # (B,) bool
    batch = Batch(*padded, loss_mask=padded[-1] & unmasked.unsqueeze(1),
                  advantages=group_advantages(rewards, args.num_generations, args.scale_rewards))
    if args.num_iterations * args.num_minibatches > 1:
        batch.old_logps = engine.compute_logps(model, batch, args, flops)
    if args.beta:
        batch.ref_logps = engine.compute_logps(ref_model, batch, args, flops)
    return batch, samples, metrics


def update(model, optimizer, batch, args, flops):
    """Train on one batch: num_iterations x num_minibatches optimizer steps. Returns metrics."""
    active = batch.loss_mask.any(dim=1)  # (B,) bool, rows that can have a gradient; the others count in the denominators only
    if args.drop_zero_variance and args.beta == 0 and args.entropy_coef == 0:
        active &= batch.advantages != 0
    totals = engine.Totals()
    for minibatch in engine.minibatches(batch, args):  # (n,) int64, rows of whole groups
        num_tokens, num_rows = int(batch.loss_mask[minibatch].sum()), len(minibatch)
        trained = minibatch[active[minibatch]]  # (m,) int64
        engine.zero_grad(model)
        for rows in engine.micro_batches(model, batch, trained, args):  # (b,) int64
            part = batch[rows]
            logps, entropy = engine.policy_logps(model, part, args)  # (b, t) float32 each
            loss, sums = policy_loss(logps, entropy, part, args, num_tokens, num_rows)
            loss.backward()
            totals.add(loss, sums)
        engine.optimizer_step(model, optimizer, totals, args)
        flops.add("train", batch.lengths[trained], passes=4 if args.gradient_checkpointing else 3)
        flops.add_paper_rule(batch.lengths[minibatch], passes=3)
    return totals.metrics() | {"frac_rows_trained": active.float().mean().item()}


def main():
    args = engine.parse_args(Args, __doc__, __file__)
    model, tokenizer = engine.load_policy(args)
    ref_model = engine.load_policy(args)[0] if args.beta else None
    train_problems, eval_problems = common.load_problems(args, tokenizer)
    train_problems = add_prefixes(train_problems, tokenizer, args)  # PrefixRL(7/7): evaluation prompts never get prefixes
    run = engine.Run(args, __file__, model, tokenizer, train_problems, eval_problems,
                     evaluate=common.evaluation_metrics)
    for step, problems in run.steps():
        batch, samples, metrics = rollout(model, ref_model, tokenizer, problems, args, run.flops)
        metrics |= update(model, run.optimizer, batch, args, run.flops)
        run.record(step, samples, metrics, batch.advantages)  # logs, evaluates and saves when each is due


if __name__ == "__main__":
    engine.launch(main)
