"""GSPO, Group Sequence Policy Optimization (arXiv 2507.18071v2). A fork of grpo.py.

    s_i = (pi(o_i | q) / pi_old(o_i | q)) ** (1 / |o_i|)                                      [GSPO eq 7]
    J   = E[ 1/G sum_i min(s_i A_i, clip(s_i, 1 - eps_low, 1 + eps_high) A_i) ]               [GSPO eq 5]

The ratio of a sequence is the geometric mean of its tokens' ratios, so clipping drops whole sequences, and every token of a sequence has
the same weight. The clip is narrow, since a mean over tokens moves little. With --num_minibatches 1 the ratio is 1 and this is GRPO.

    python examples/gspo.py --task diary --num_minibatches 4
"""

from dataclasses import dataclass
from typing import Literal

import torch

import above  # noqa: F401
import common
import engine
from engine import arg


@dataclass
class Args(engine.Args):  # model, data, optimizer, evaluation and output are inherited: python grpo.py --help
    # rollout
    num_generations: int = arg(8, "G: completions per prompt, the group", least=1)
    # loss
    loss_type: Literal["dapo", "grpo", "dr_grpo"] = arg("grpo", "Mean over tokens; of row means; sum / (rows x longest)")
    scale_rewards: Literal["group", "none"] = arg("group", "Divide advantages by the std of the group, or not")
    epsilon: float = arg(3e-4, "Clip of the ratio: 1 - epsilon, and 1 + epsilon unless --epsilon_high is given", least=0)
    epsilon_high: float | None = arg(4e-4, "Upper clip of the ratio; inf = none", least=0)
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
    log_ratio = ((logps - old_logps) * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)  # (B, 1) float32
    ratio = torch.exp(log_ratio).expand_as(mask)  # (B, T) float32  [GSPO eq 7]
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


def rollout(model, ref_model, tokenizer, problems, args, flops):
    """Sample and grade a group for each of N problems. Returns (Batch, the list of B Samples behind it, metrics)."""
    problems = [problem for problem in problems for _ in range(args.num_generations)]  # B of them, a group adjacent
    prompts = [problem["prompt_ids"] for problem in problems]
    samples = common.grade(common.sample(model, tokenizer, prompts, problems, args, flops), args)
    metrics = common.rollout_metrics(samples, args)

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
    run = engine.Run(args, __file__, model, tokenizer, train_problems, eval_problems,
                     evaluate=common.evaluation_metrics)
    for step, problems in run.steps():
        batch, samples, metrics = rollout(model, ref_model, tokenizer, problems, args, run.flops)
        metrics |= update(model, run.optimizer, batch, args, run.flops)
        run.record(step, samples, metrics, batch.advantages)  # logs, evaluates and saves when each is due


if __name__ == "__main__":
    engine.launch(main)
