"""OPSD, On-Policy Self-Distillation (arXiv 2601.18734v2); SDFT (2601.19897) and SDPO (2601.20802) are near. A fork of grpo.py.

The policy answers q alone. A second reading of the same model, which sees somebody else's solution k, then says at each token of the
answer how it would have gone on, and the policy is drawn towards it:

    o_1..o_G ~ pi(. | q)
    L = mean over tokens of D(T_t, S_t),   S_t = pi(. | q, o_<t),   T_t = pi_0(. | P(q, k), o_<t) without gradient   [OPSD objective]
    D = beta KL(T || M) + (1 - beta) KL(S || M),   M = beta T + (1 - beta) S;   beta = 0: KL(T || S), 1: KL(S || T)   [OPSD divergence]

No reward is in it: tokens are told apart where GRPO has one number for an answer, also in a group that always fails. P(q, k) is RePO's
prompt, with the opposite use: nothing is sampled from it. The divergence is taken over the whole vocabulary, so the (B, T, V) log-probs
of a micro-batch are held (--micro_batch_tokens). The parts have names; [OPSD code] is the released code. The paper is known here from
its abstract, accounts and that code. Symbols and other switches are those of grpo.py.

  beta       --distillation_beta 0.5 [OPSD code].
  teacher    The initial policy, fixed [OPSD code], or the current one with --teacher current. SDFT and SDPO have a moving average.
  share      --distillation 1: no reward at all [OPSD objective]. Below, the rest of the loss is GRPO's. 0 is GRPO [CHOICE OPSD]. KL and
             entropy bonus stay outside the mixture [CHOICE OPSD].
  rows       G completions of a problem, as all scripts have. The paper has one [CHOICE OPSD]. Rows of a problem without a trace have no
             divergence [CHOICE OPSD].
  clip       The released code can cut each token's divergence off; here none does [CHOICE OPSD].
  temperature 1 in sampling and in both readings, where the released scripts have 1.1 or 1.2, top-p and top-k [DEVIATES OPSD code].
  wording    of P: --informed_prompt; default: the built-in task's, or one of our own [CHOICE OPSD].

Changes against grpo.py: (1-2) imports, (3) flags, (4) the loss, (5) its metric, (6) fields of the batch, (7) both readings and their
divergence, (8) informed prompts, (9) the teacher, (10) rows that need no reward, (11) FLOPs and readings, (12-13) the teacher.

    python examples/opsd.py --max_steps 150
"""

import math  # OPSD(1/13)
from dataclasses import dataclass
from typing import Literal

import torch

import above  # OPSD(2/13): common.py and engine/ are found  # noqa: F401
import common
import engine
from engine import arg


@dataclass
class Args(engine.TraceArgs):  # OPSD(3/13): traces are inherited, too, and how they inform
    # off-policy knowledge
    distillation: float = arg(1.0, "Share of the loss that is the divergence to the informed policy; the rest is GRPO's", least=0, most=1)
    distillation_beta: float = arg(0.5, "beta of the divergence: 0 = KL(T || S), 1 = KL(S || T)", least=0, most=1)
    teacher: Literal["initial", "current"] = arg("initial", "Policy that reads the trace")
    informed_prompt: str | None = arg(None, "P: text with {prompt} and {trace}; default: built in", holds=("{prompt}", "{trace}"))
    trace_limit_flag = "max_prompt_length"  # a trace is read in a prompt, not trained
    smallest_group = property(lambda self: 1 if self.distillation else 2)  # the divergence needs no advantage
    keeps_initial_weights = property(lambda self: bool(self.beta or self.distillation and self.teacher == "initial"))
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
    informed = batch.informed.unsqueeze(1)  # (B, 1) bool  OPSD(4/13): rows with a trace
    if args.distillation:
        mixed = (1 - args.distillation) * token_loss + args.distillation * batch.divergence  # (B, T) float32  [OPSD objective]
        token_loss = torch.where(informed, mixed, token_loss)  # (B, T) float32
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
    } | (engine.token_sums("informed", informed & mask, divergence=batch.divergence) if args.distillation else {})  # OPSD(5/13)


@dataclass
class Batch(engine.Rows):
    """The rows of one step, from `rollout` to `update`: prompt_ids, prompt_mask (B, P), completion_ids, completion_mask (B, T) and these.

    batch[rows] are some of the rows, trimmed to the longest.
    """

    loss_mask: torch.Tensor  # (B, T) bool, the tokens that are trained
    advantages: torch.Tensor  # (B,) float32
    old_logps: torch.Tensor | None = None  # (B, T) float32; None: strictly on-policy, where pi_old is pi itself
    ref_logps: torch.Tensor | None = None  # (B, T) float32; None: no KL term
    informed: torch.Tensor | None = None  # (B,) bool  OPSD(6/13): rows with a trace
    divergence: torch.Tensor | None = None  # (B, T) float32 with gradient, of a micro-batch
    readings = None  # engine.Rows, the completions after informed prompts; no field: P is longer than T, by which fields are trimmed


# OPSD(7/13): both readings, and how far they are apart
INFORMED_PROMPT = ("{prompt}\n\nHere is a solution that somebody else wrote:\n\n{trace}\n\nRead it until you understand it. Then solve "
                   "the problem yourself, in your own words, and end with the final answer in \\boxed{}.")


@engine.ranks.inside_fsdp_forward
def vocabulary_logps(model, rows, args):
    """Log-probs (B, T, V) float32 of every word at each place of the completions of engine.Rows, at the sampling temperature."""
    logits = engine.scoring.logits_or_hidden(model, True, rows.prompt_ids, rows.prompt_mask, rows.completion_ids, rows.completion_mask)
    return torch.log_softmax(logits.float() / args.temperature, dim=-1)  # (B, T, V) float32


def divergence(own, informed, beta):
    """D (B, T) of two readings, log-probs (B, T, V): Jensen-Shannon with weight beta, or a KL at its ends. [OPSD divergence]"""
    def kl(p, q):
        return (p.exp() * (p - q)).sum(dim=-1)  # (B, T) float32

    if beta in (0, 1):
        return kl(own, informed) if beta else kl(informed, own)  # [OPSD divergence]
    mixture = torch.logaddexp(informed + math.log(beta), own + math.log(1 - beta))  # (B, T, V) float32
    return beta * kl(informed, mixture) + (1 - beta) * kl(own, mixture)  # [OPSD divergence]


def read(model, teacher, part, reading, args):
    """Log-probs, entropies and divergences (b, t) of a micro-batch and of its completions after informed prompts."""
    if not args.distillation:
        return *engine.policy_logps(model, part, args), None
    with torch.no_grad():
        informed = vocabulary_logps(teacher, reading, args)  # (b, t, V) float32
    own = vocabulary_logps(model, part, args)  # (b, t, V) float32
    logps = own.gather(-1, part.completion_ids.unsqueeze(-1)).squeeze(-1)  # (b, t) float32
    return logps, -(own.exp() * own).sum(dim=-1), divergence(own, informed, args.distillation_beta)


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
    # OPSD(8/13): the same completions after prompts that show the trace
    informed = [args.distillation > 0 and problem["trace"] is not None for problem in problems]
    instruction = args.informed_prompt or (INFORMED_PROMPT if args.dataset_name else None)  # None: that of the built-in task
    informed_prompts = [common.prompt_with_trace(tokenizer, problem, args, instruction) if seen else problem["prompt_ids"]
                        for problem, seen in zip(problems, informed)]
    batch.informed = torch.tensor(informed, device=model.device)  # (B,) bool
    batch.readings = engine.Rows(*engine.pad(informed_prompts, [sample.ids for sample in samples], tokenizer, model.device))
    if args.num_iterations * args.num_minibatches > 1:
        batch.old_logps = engine.compute_logps(model, batch, args, flops)
    if args.beta:
        batch.ref_logps = engine.compute_logps(ref_model, batch, args, flops)
    return batch, samples, metrics


def update(model, teacher, optimizer, batch, args, flops):  # OPSD(9/13)
    """Train on one batch: num_iterations x num_minibatches optimizer steps. Returns metrics."""
    active = batch.loss_mask.any(dim=1)  # (B,) bool, rows that can have a gradient; the others count in the denominators only
    if args.drop_zero_variance and args.beta == 0 and args.entropy_coef == 0:
        active &= (batch.advantages != 0) | batch.informed  # OPSD(10/13): no reward is needed
    totals = engine.Totals()
    for minibatch in engine.minibatches(batch, args):  # (n,) int64, rows of whole groups
        num_tokens, num_rows = int(batch.loss_mask[minibatch].sum()), len(minibatch)
        trained = minibatch[active[minibatch]]  # (m,) int64
        flops.add("informed", batch.readings.lengths[trained] * bool(args.distillation))  # OPSD(11/13): the teacher's reading
        engine.zero_grad(model)
        for rows in engine.micro_batches(model, batch, trained, args):  # (b,) int64
            part = batch[rows]
            logps, entropy, part.divergence = read(model, teacher, part, batch.readings[rows], args)  # (b, t) float32 each
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
    ref_model = engine.load_policy(args)[0] if args.keeps_initial_weights else None  # OPSD(12/13)
    train_problems, eval_problems = common.load_problems(args, tokenizer)
    run = engine.Run(args, __file__, model, tokenizer, train_problems, eval_problems,
                     evaluate=common.evaluation_metrics)
    for step, problems in run.steps():
        batch, samples, metrics = rollout(model, ref_model, tokenizer, problems, args, run.flops)
        metrics |= update(model, ref_model if args.teacher == "initial" else model, run.optimizer, batch, args, run.flops)  # OPSD(13/13)
        run.record(step, samples, metrics, batch.advantages)  # logs, evaluates and saves when each is due


if __name__ == "__main__":
    engine.launch(main)
