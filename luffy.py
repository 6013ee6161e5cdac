"""LUFFY, Learning to reason Under oFF-policY guidance (arXiv 2504.14945v5), as its authors released it.

Every group holds one whole solution of a teacher beside the policy's own samples, graded and compared like them:

    A_i = R_i - mean over all G, the teacher's included                                       [LUFFY advantage]
    J   = E[ sum_i sum_t f(p_it) A_i  (teacher's tokens)  +  sum_i sum_t w_it A_i  (own tokens) ] / Z   [LUFFY objective]
    f(p) = p / (p + gamma),  p = pi(o_it | q, o_i<t),  gamma = 0.1                            [LUFFY shaping]

Z is the number of rows of an optimizer step times --max_completion_length (--loss_type dr_grpo).
The weight of a token's gradient is d f / d log p = gamma p / (p + gamma)^2. It peaks at p = gamma and falls to 0 for p -> 0: LUFFY lifts
what the policy half knows and does not rescue what the policy holds impossible.

The parts of the paper have names; [LUFFY code] marks what only the released code says. Symbols, the objective of the group's own
samples and all other switches are those of grpo.py. Where this script differs from the paper:

  no division by std      The equation has one, the experiments do not [LUFFY code].
  no clip, of any token   Equation 6 keeps it for own tokens; ablation and released recipe remove it [LUFFY code].
  teacher's probability   is taken as 1, so the ratio is p itself before shaping [LUFFY code].
  entropy bonus           The released code adds 0.001 times the mean entropy of a micro-batch; the text says 0.01 [LUFFY code]. Here the
                          bonus is summed and divided as the rest of the loss is. 0.0003 weighs about the same at the released
                          sizes: 0.001 x 8192, the longest completion, / the completion tokens of a micro-batch of 32768 tokens.
  updates                 Two optimizer steps a batch, a constant rate, no KL [LUFFY code].
  weight decay 0          The released code has the 0.01 of its trainer (--weight_decay) [DEVIATES LUFFY code].
  --loss_type dr_grpo     sum / (rows x --max_completion_length). The released code divides by the length alone [DEVIATES LUFFY code]:
                          but for the bonus, the gradient has another size and the same direction.
  traces                  are graded again and dropped when wrong or too long: a wrong one would be pushed down. A problem without a
                          trace gets an ordinary group. With --num_off_policy 2 its traces take turns [CHOICE LUFFY].
  --shaping none          f(p) = p, mixed-policy GRPO. importance: f = min(p / p_teacher, c), for traces with log-probs.

Changes against grpo.py: (1-2) flags, (3-5) the released settings as defaults [LUFFY code], (6) the weight of teacher tokens, (7) its
metrics, (8) fields of the batch, (9) traces in the group, (10) marked for the loss, (11) a check, (12) the rows that are not sampled.

    python luffy.py                        missing knowledge, with a teacher in foreign words
    python luffy.py --task diary --trace_style own
"""

from dataclasses import dataclass
from typing import Literal

import torch

import common
import engine
from engine import arg


@dataclass
class Args(engine.TraceArgs):  # LUFFY(1/12): traces are inherited, too
    # LUFFY(2/12): the teacher's rows, and how their tokens are weighted
    # off-policy knowledge
    num_off_policy: int = arg(1, "Rows of each group that are the trace; 0 = none", least=0, below="num_generations")
    shaping: Literal["shaped", "none", "importance"] = arg("shaped", "Weight of teacher tokens: p/(p+gamma), p, p/p_teacher")
    shaping_gamma: float = arg(0.1, "gamma of the shaped weight, a probability", above=0)
    importance_cap: float = arg(2.0, "Largest weight with --shaping importance", above=0)
    # rollout
    num_generations: int = arg(8, "G: completions per prompt, the group", least=1)
    # loss
    loss_type: Literal["dapo", "grpo", "dr_grpo"] = arg("dr_grpo", "Mean over tokens; of row means; sum / (rows x longest)")  # LUFFY(3/12)
    scale_rewards: Literal["group", "none"] = arg("none", "Divide advantages by the std of the group, or not")  # [LUFFY advantage]
    epsilon: float = arg(float("inf"), "Clip of the ratio: 1 - epsilon, and 1 + epsilon unless --epsilon_high is given", least=0)
    epsilon_high: float | None = arg(None, "Upper clip of the ratio; inf = none", least=0)
    beta: float = arg(0.0, "Weight of the KL to the initial policy, nats a token; 0 loads no reference model", least=0)
    entropy_coef: float = arg(0.0003, "Weight of an entropy bonus, nats a token")  # LUFFY(4/12) [LUFFY code]
    mask_truncated_completions: bool = arg(False, "Train nothing on completions without EOS")
    drop_zero_variance: bool = arg(True, "Skip the computation of rows whose gradient is 0; the update is the same")
    # optimization
    num_iterations: int = arg(1, "Passes over each batch of rollouts", least=1)
    num_minibatches: int = arg(2, "Optimizer steps in a pass; 1 x 1 is strictly on-policy", least=1, most="prompts_per_step")  # LUFFY(5/12)


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
    # LUFFY(6/12): a teacher's token counts by its probability alone, without clip [LUFFY shaping]
    off_policy, weight = batch.off_policy.unsqueeze(1), logps.exp()  # (B, 1) bool, (B, T) float32
    if args.shaping == "shaped":
        weight = weight / (weight + args.shaping_gamma)  # (B, T) float32
    elif args.shaping == "importance":
        weight = torch.exp(torch.minimum(logps - batch.behavior_logps, logps.new_tensor(args.importance_cap).log()))  # (B, T) float32
    ratio = torch.where(off_policy, weight, ratio)  # (B, T) float32  [LUFFY objective]
    clipped = torch.where(off_policy, ratio, clipped)  # (B, T) float32  [LUFFY objective]
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
        # LUFFY(7/12): teacher's and own tokens apart
    } | {name: sums for source, tokens in (("offpolicy", off_policy & mask), ("onpolicy", ~off_policy & mask))
         for name, sums in engine.token_sums(source, tokens, prob=logps.exp(), ratio=ratio, loss=token_loss).items()}


@dataclass
class Batch(engine.Rows):
    """The rows of one step, from `rollout` to `update`: prompt_ids, prompt_mask (B, P), completion_ids, completion_mask (B, T) and these.

    batch[rows] are some of the rows, trimmed to the longest.
    """

    loss_mask: torch.Tensor  # (B, T) bool, the tokens that are trained
    advantages: torch.Tensor  # (B,) float32
    old_logps: torch.Tensor | None = None  # (B, T) float32; None: strictly on-policy, where pi_old is pi itself
    ref_logps: torch.Tensor | None = None  # (B, T) float32; None: no KL term
    off_policy: torch.Tensor | None = None  # (B,) bool  LUFFY(8/12): the teacher's rows
    behavior_logps: torch.Tensor | None = None  # (B, T) float32, the teacher's own, for --shaping importance


def rollout(model, ref_model, tokenizer, problems, args, flops):
    """Sample and grade a group for each of N problems. Returns (Batch, the list of B Samples behind it, metrics)."""
    problems = [problem for problem in problems for _ in range(args.num_generations)]  # B of them, a group adjacent
    prompts = [problem["prompt_ids"] for problem in problems]
    # LUFFY(9/12): the first rows of a group are the teacher's trace; only the others are sampled, and paid for [LUFFY advantage]
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
    batch.off_policy = torch.tensor(off_policy, device=model.device)  # (B,) bool  LUFFY(10/12)
    if args.shaping == "importance":
        batch.behavior_logps = common.behavior_logps(batch, samples)  # (B, T) float32
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
    if args.shaping == "importance":  # LUFFY(11/12): check before anything is written
        common.require_behavior_logps(train_problems, "--shaping importance")
    run = engine.Run(args, __file__, model, tokenizer, train_problems, eval_problems,
                     evaluate=common.evaluation_metrics, trace_rows=args.num_off_policy)  # LUFFY(12/12)
    for step, problems in run.steps():
        batch, samples, metrics = rollout(model, ref_model, tokenizer, problems, args, run.flops)
        metrics |= update(model, run.optimizer, batch, args, run.flops)
        run.record(step, samples, metrics, batch.advantages)  # logs, evaluates and saves when each is due


if __name__ == "__main__":
    engine.launch(main)
