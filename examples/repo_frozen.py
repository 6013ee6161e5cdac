"""RePO whose retellings are sampled by the frozen initial policy. A fork of repo.py.

The initial policy stays a good reteller while the trained one drifts, and its retellings can be made once for all steps. They are less in
the trained policy's own words, which `rephrase/context_gap` shows. Retellings are scored under the policy that sampled them: with
--rephrase_ratio behavior the ratio is pi(o | q) / pi_0(o | P(q, k)).

    python examples/repo_frozen.py
"""

from dataclasses import dataclass
from itertools import compress  # RePO(1/11): for gate and retelling
from statistics import mean
from typing import Literal

import torch

import above  # noqa: F401
import common
import engine
from engine import arg


@dataclass
class Args(engine.TraceArgs):  # RePO(2/11): traces are inherited, too
    # RePO(3/11): when a solution is retold, and how the retelling is trained; in 150 steps the built-in task is learnt
    # off-policy knowledge
    reward_threshold: float = arg(0.5, "delta: rollouts, retellings and traces with a smaller reward are wrong", above=float("-inf"))
    keeps_initial_weights = True
    failure_threshold: float = arg(0.125, "rho: help a group when at least this share of its rollouts failed; above 1 = GRPO", above=0,
                                   formerly="failure_rate")
    rephrase_prompt: str | None = arg(None, "P: text with {prompt} and {trace}; default: built in", holds=("{prompt}", "{trace}"))
    rephrase_marker: str = arg("### Solution", "Text after which the retelling begins; all up to it is cut off")
    rephrase_ratio: Literal["question", "behavior", "stopgrad", "shaped"] = arg("question", "p over pi_old(o|q), pi_old(o|P), p, p + gamma")
    shaping_gamma: float = arg(0.1, "gamma of --rephrase_ratio shaped, a probability", above=0)
    require_correct_rephrase: bool = arg(True, "Replace a rollout only by a retelling that reaches the threshold")
    raw_trace: bool = arg(False, "Replace by the trace itself instead of a retelling, to see what retelling adds")
    max_rephrase_prompt_length: int = arg(4096, "Longest P(q, k) in tokens; groups with a longer one are not helped", least=1)
    max_steps: int = arg(150, "Steps: one batch of rollouts each", least=1)
    trace_limit_flag = property(lambda self: "max_completion_length" if self.raw_trace else "max_rephrase_prompt_length")
    # rollout
    num_generations: int = arg(8, "G: completions per prompt, the group", least=1)
    # loss
    loss_type: Literal["dapo", "grpo", "dr_grpo"] = arg("dapo", "Mean over tokens; of row means; sum / (rows x longest)")
    scale_rewards: Literal["group", "none"] = arg("group", "Divide advantages by the std of the group, or not")
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
    # RePO(4/11): what a rephrased token is compared with [CHOICE RePO]
    rephrased = batch.rephrased.unsqueeze(1)  # (B, 1) bool
    against = {"behavior": batch.behavior_logps, "stopgrad": logps.detach()}.get(args.rephrase_ratio, old_logps)  # (B, T) float32
    old_logps = torch.where(rephrased, against, old_logps)  # (B, T) float32
    # At the first update the ratio is 1 and the loss near 0, but its gradient is A grad log pi (docs/faq.md, question 1).
    ratio = torch.exp(logps - old_logps)  # (B, T) float32  [GRPO eq 3]
    epsilon_high = args.epsilon if args.epsilon_high is None else args.epsilon_high  # [DAPO sec 3.1]
    clipped = ratio.clamp(1 - args.epsilon, 1 + epsilon_high)  # (B, T) float32
    # RePO(5/11): or a weight without ratio and clip [CHOICE RePO]
    if args.rephrase_ratio == "shaped":
        ratio = torch.where(rephrased, logps.exp() / (logps.exp() + args.shaping_gamma), ratio)  # (B, T) float32
        clipped = torch.where(rephrased, ratio, clipped)  # (B, T) float32
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
        # RePO(6/11): of rephrased tokens; the gap is below 0 where the trace in the prompt made the retelling likelier
    } | engine.token_sums("rephrase", rephrased & mask, prob=logps.exp(), ratio=ratio, context_gap=logps - batch.behavior_logps)


@dataclass
class Batch(engine.Rows):
    """The rows of one step, from `rollout` to `update`: prompt_ids, prompt_mask (B, P), completion_ids, completion_mask (B, T) and these.

    batch[rows] are some of the rows, trimmed to the longest.
    """

    loss_mask: torch.Tensor  # (B, T) bool, the tokens that are trained
    advantages: torch.Tensor  # (B,) float32
    old_logps: torch.Tensor | None = None  # (B, T) float32; None: strictly on-policy, where pi_old is pi itself
    ref_logps: torch.Tensor | None = None  # (B, T) float32; None: no KL term
    rephrased: torch.Tensor | None = None  # (B,) bool  RePO(7/11): the replaced rows
    behavior_logps: torch.Tensor | None = None  # (B, T) float32, of rephrased tokens after P(q, k); else 0


# RePO(8/11): the retelling and the gate
REPHRASE_PROMPT = """{prompt}

Here is a solution that somebody else wrote:

{trace}

Read it until you understand it. Then solve the problem yourself, in your own words and in the way you would write it, without \
mentioning that solution. Write a line "### Solution" and after it your solution, which ends with the final answer in \\boxed{}."""


def retell(model, tokenizer, problems, args, flops):
    """The policy's own telling of the trace of each problem: a list of graded Samples, None where P(q, k) is too long."""
    if args.raw_trace:
        return common.grade([common.trace_sample(problem) for problem in problems], args)
    instruction = args.rephrase_prompt or (REPHRASE_PROMPT if args.dataset_name else None)  # None: that of the built-in task
    prompts = [common.prompt_with_trace(tokenizer, problem, args, instruction) for problem in problems]
    longest = min(args.max_rephrase_prompt_length, engine.models.max_positions(model) - args.max_completion_length)
    fits = [len(prompt) <= longest for prompt in prompts]
    samples = common.sample(model, tokenizer, [*compress(prompts, fits)], [*compress(problems, fits)], args, flops, "rephrase")
    graded = iter(common.grade(common.cut_before(args.rephrase_marker, samples, tokenizer), args))
    return [next(graded) if fit else None for fit in fits]


def help_failed_groups(model, tokenizer, samples, args, flops):
    """In each failed group the worst Sample becomes a retelling of the trace; returns (the final B samples, metrics)."""
    groups = [samples[start : start + args.num_generations] for start in range(0, len(samples), args.num_generations)]  # N lists of G
    failure = [mean(sample.reward < args.reward_threshold for sample in group) for group in groups]  # gamma_fail  [RePO gate]
    failed = [group for group, share in zip(groups, failure) if share >= args.failure_threshold and group[0].problem["trace"] is not None]
    retellings = retell(model, tokenizer, [group[0].problem for group in failed], args, flops)  # [RePO gate] [RePO replacement]
    metrics = common.retelling_metrics(retellings, failed, len(groups), args) | {"rephrase/failure_rate": mean(failure)}
    for group, retelling in zip(failed, retellings):  # [RePO replacement]
        if retelling and retelling.ids and (retelling.reward >= args.reward_threshold or not args.require_correct_rephrase):
            worst = min(reversed(range(len(group))), key=lambda row: group[row].reward)  # the last of equals [CHOICE RePO]
            group[worst] = retelling
    return [sample for group in groups for sample in group], metrics


def rollout(model, ref_model, tokenizer, problems, args, flops):
    """Sample and grade a group for each of N problems. Returns (Batch, the list of B Samples behind it, metrics)."""
    problems = [problem for problem in problems for _ in range(args.num_generations)]  # B of them, a group adjacent
    prompts = [problem["prompt_ids"] for problem in problems]
    samples = common.grade(common.sample(model, tokenizer, prompts, problems, args, flops), args)
    metrics = common.rollout_metrics(samples, args)
    # RePO(9/11): from here on the final group [RePO objective]
    sampled = samples
    samples, rephrase_metrics = help_failed_groups(ref_model, tokenizer, sampled, args, flops)
    metrics |= rephrase_metrics

    padded = engine.pad(prompts, [sample.ids for sample in samples], tokenizer, model.device)
    rewards = torch.tensor([sample.reward for sample in samples], device=model.device)  # (B,) float32
    unmasked = torch.tensor([sample.ended or not args.mask_truncated_completions for sample in samples], device=model.device)  # (B,) bool
    batch = Batch(*padded, loss_mask=padded[-1] & unmasked.unsqueeze(1),
                  advantages=group_advantages(rewards, args.num_generations, args.scale_rewards))
    # RePO(10/11): which rows were replaced, scored after P(q, k)
    batch.rephrased = torch.tensor([new is not old for new, old in zip(samples, sampled)], device=model.device)  # (B,) bool
    metrics["rephrase/replaced"] = int(batch.rephrased.sum()) * args.num_generations / len(samples)
    batch.behavior_logps = common.logps_as_sampled(ref_model, tokenizer, batch, samples, batch.rephrased, args, flops)  # (B, T) float32
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
    ref_model = engine.load_policy(args)[0]
    train_problems, eval_problems = common.load_problems(args, tokenizer)
    run = engine.Run(args, __file__, model, tokenizer, train_problems, eval_problems,
                     evaluate=common.evaluation_metrics,  # RePO(11/11)
                     stages=("rephrase",) * (args.failure_threshold <= 1 and not args.raw_trace))
    for step, problems in run.steps():
        batch, samples, metrics = rollout(model, ref_model, tokenizer, problems, args, run.flops)
        metrics |= update(model, run.optimizer, batch, args, run.flops)
        run.record(step, samples, metrics, batch.advantages)  # logs, evaluates and saves when each is due


if __name__ == "__main__":
    engine.launch(main)
