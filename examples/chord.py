"""CHORD, Controllable Harmonization of On- and Off-Policy RL via Dynamic Weighting (arXiv 2508.11408), with HPT's gate. A fork of grpo.py.

The loss is a mixture of RL on the policy's own samples and of imitation of somebody else's solution y, which counts less and less:

    L     = (1 - mu) L_GRPO + mu L_SFT                                                        [CHORD objective]
    L_SFT = - mean_t phi_t log p_t,   p_t = pi(y_t | q, y_<t),   phi = p (1 - p) without gradient   [CHORD weight]
    mu    = valley + (peak - valley) (1 + cos(pi s / decay)) / 2 in step s = 0 .. decay        [CHORD schedule]

phi spares what the policy knows already and what it holds impossible. --gate puts the rule of HPT, Hybrid Post-Training (arXiv
2509.04419), in the place of the schedule: mu = 1 for a group whose mean reward is at most the gate, else 0 [HPT gate]. The parts have
names, not numbers: both papers are known here from accounts, and CHORD from its released code. Other switches are those of grpo.py.

  mu, phi    The released example has both: mu rises to 0.5 in 200 steps and falls to 0.02 in 400. Here it falls in the 100 steps of the
             built-in task, and there is no warm-up [DEVIATES CHORD code]. CHORD-mu: --no_token_weight --mu_peak 0.9 --mu_valley 0.05
             --mu_decay_steps 200. CHORD-phi: --mu_peak 0.1 --mu_valley 0.1 [CHORD code].
  trace      A row of each group, in which the others are sampled. The released code takes the traces of other prompts from a set of their
             own [DEVIATES CHORD code]. A group without a trace is an ordinary one [CHOICE CHORD].
  baseline   A trace is graded, and stays out of the mean and the std of its group [CHORD objective].
  KL         and entropy bonus stay outside the mixture, and act on every row [CHOICE CHORD].
  means      L_GRPO and L_SFT are means over their own tokens of a batch: exactly with --loss_type dapo and one minibatch [CHOICE CHORD].
  HPT        --gate 0 imitates where no sample earned anything, and needs --no_token_weight [HPT gate].

Changes against grpo.py: (1-2) imports, (3) flags, (4) the loss of a trace's token, and the mixture, (5) metrics of traces, (6) fields
of the batch, (7) schedule, gate and baseline, (8) traces in the group, (9) the mixture, (10) the rows that are not sampled, (11) mu.

    python examples/chord.py
    python examples/chord.py --gate 0 --no_token_weight
"""

import math  # CHORD(1/11)
from dataclasses import dataclass
from typing import Literal

import torch

import above  # CHORD(2/11): common.py and engine/ are found  # noqa: F401
import common
import engine
from engine import arg


@dataclass
class Args(engine.TraceArgs):  # CHORD(3/11): traces are inherited, too, and the mixture
    # off-policy knowledge
    num_off_policy: int = arg(1, "Rows of each group that are the trace; 0 = none", least=0, below="num_generations")
    mu_peak: float = arg(0.5, "mu in the first step: the share of the loss that imitates", least=0, most=1)
    mu_valley: float = arg(0.02, "mu after the decay", least=0, most=1)
    mu_decay_steps: int = arg(100, "Steps in which mu falls from --mu_peak to --mu_valley", least=0)
    token_weight: bool = arg(True, "Weigh a trace's token by p (1 - p)")
    gate: float | None = arg(None, "Imitate in groups whose mean reward is at most this, and nowhere else, in place of mu; HPT: 0")
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
    # At the first update the ratio is 1 and the loss near 0, but its gradient is A grad log pi (docs/faq.md, question 1).
    ratio = torch.exp(logps - old_logps)  # (B, T) float32  [GRPO eq 3]
    epsilon_high = args.epsilon if args.epsilon_high is None else args.epsilon_high  # [DAPO sec 3.1]
    clipped = ratio.clamp(1 - args.epsilon, 1 + epsilon_high)  # (B, T) float32
    # The smaller of both products: which clip binds depends on the sign of A (tests/test_equations.py).
    token_loss = -torch.min(ratio * advantages, clipped * advantages)  # (B, T) float32  [GRPO eq 3]
    # CHORD(4/11): a trace's token is imitated, and both parts are mixed
    off_policy, prob = batch.off_policy.unsqueeze(1), logps.detach().exp()  # (B, 1) bool, (B, T) float32
    imitation = -logps * (prob * (1 - prob) if args.token_weight else 1)  # (B, T) float32  [CHORD weight]
    token_loss = torch.where(off_policy, imitation, token_loss) * batch.share.unsqueeze(1)  # (B, T) float32  [CHORD objective]
    clipped = torch.where(off_policy, ratio, clipped)  # (B, T) float32, for the metrics: a trace has no clip
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
    } | engine.token_sums("offpolicy", off_policy & mask, prob=prob, loss=token_loss)  # CHORD(5/11): of the traces


@dataclass
class Batch(engine.Rows):
    """The rows of one step, from `rollout` to `update`: prompt_ids, prompt_mask (B, P), completion_ids, completion_mask (B, T) and these.

    batch[rows] are some of the rows, trimmed to the longest.
    """

    loss_mask: torch.Tensor  # (B, T) bool, the tokens that are trained
    advantages: torch.Tensor  # (B,) float32
    old_logps: torch.Tensor | None = None  # (B, T) float32; None: strictly on-policy, where pi_old is pi itself
    ref_logps: torch.Tensor | None = None  # (B, T) float32; None: no KL term
    off_policy: torch.Tensor | None = None  # (B,) bool  CHORD(6/11): the traces
    share: torch.Tensor | None = None  # (B,) float32, what a row counts in the mixture


# CHORD(7/11): schedule, gate and baseline
def mu_at(step, args):
    """mu in a step, the first of which is 1. [CHORD schedule]"""
    past = min(1.0, (step - 1) / args.mu_decay_steps) if args.mu_decay_steps else 1.0
    return args.mu_valley + (args.mu_peak - args.mu_valley) * (1 + math.cos(math.pi * past)) / 2


def mix(batch, rewards, mu, args):
    """Compare own rows with own rows, and set what each row counts; rewards (B,) float. Returns the mean mu. [CHORD objective]"""
    off_policy, num_tokens, batch.share = batch.off_policy, batch.loss_mask.sum(dim=1), torch.ones_like(rewards)  # (B,) each
    for rows in torch.arange(len(rewards), device=rewards.device).view(-1, args.num_generations):  # (G,)
        own, taught = rows[~off_policy[rows]], rows[off_policy[rows]]
        if len(taught):
            weight = mu if args.gate is None else float(rewards[own].mean() <= args.gate)  # [HPT gate]
            batch.share[own], batch.share[taught] = 1 - weight, weight
            batch.advantages[own] = group_advantages(rewards[own], len(own), args.scale_rewards)
            batch.advantages[taught] = float(weight > 0)  # 0: the row is not computed
    mean_mu = batch.share[off_policy].sum().item() / max(1, int(off_policy.sum()))
    num_part = torch.where(off_policy, num_tokens[off_policy].sum(), num_tokens[~off_policy].sum())  # (B,)
    batch.share *= num_tokens.sum() / num_part  # each part is a mean over its own tokens  [CHORD objective]
    return mean_mu


def rollout(model, ref_model, tokenizer, problems, mu, args, flops):
    """Sample and grade a group for each of N problems. Returns (Batch, the list of B Samples behind it, metrics)."""
    problems = [problem for problem in problems for _ in range(args.num_generations)]  # B of them, a group adjacent
    prompts = [problem["prompt_ids"] for problem in problems]
    # CHORD(8/11): the first rows of a group are traces; only the others are sampled, and paid for
    off_policy = [i % args.num_generations < args.num_off_policy and problem["trace"] is not None for i, problem in enumerate(problems)]
    own = [problem for problem, off in zip(problems, off_policy) if not off]
    sampled = iter(common.sample(model, tokenizer, [problem["prompt_ids"] for problem in own], own, args, flops))
    samples = common.grade([common.trace_sample(problem, i % args.num_generations) if off else next(sampled)
                            for i, (problem, off) in enumerate(zip(problems, off_policy))], args)
    metrics = common.rollout_metrics(samples, args) | common.reward_by_source(samples, args)

    padded = engine.pad(prompts, [sample.ids for sample in samples], tokenizer, model.device)
    rewards = torch.tensor([sample.reward for sample in samples], device=model.device)  # (B,) float32
    unmasked = torch.tensor([sample.ended or not args.mask_truncated_completions for sample in samples], device=model.device)  # (B,) bool
    batch = Batch(*padded, loss_mask=padded[-1] & unmasked.unsqueeze(1),
                  advantages=group_advantages(rewards, args.num_generations, args.scale_rewards))
    batch.off_policy = torch.tensor(off_policy, device=model.device)  # (B,) bool  CHORD(9/11)
    metrics["offpolicy/mu"] = mix(batch, rewards, mu, args)
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
                     evaluate=common.evaluation_metrics, trace_rows=args.num_off_policy)  # CHORD(10/11)
    for step, problems in run.steps():
        batch, samples, metrics = rollout(model, ref_model, tokenizer, problems, mu_at(step, args), args, run.flops)  # CHORD(11/11)
        metrics |= update(model, run.optimizer, batch, args, run.flops)
        run.record(step, samples, metrics, batch.advantages)  # logs, evaluates and saves when each is due


if __name__ == "__main__":
    engine.launch(main)
