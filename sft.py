"""SFT, supervised fine-tuning on off-policy traces: the baseline, and with any RL script after it (--model RUN_FOLDER) SFT -> RL.

    J = E_{q, k} sum_t log pi(k_t | q, k_<t) / sum_t 1        mean over the trace tokens of the optimizer step [SFT objective]

The skeleton, data, evaluation and ledger are those of grpo.py. Where grpo.py samples a group for each prompt, this script takes the
trace k of the prompt, each of the usable traces in a row of its own. The trained tokens are those of the trace and its EOS. Problems
without a trace are left out. Log-probs are at --temperature, as in all scripts and in the evaluation.

Against grpo.py: the loss has no advantages, no ratio and no clip; nothing is sampled; a batch gives one optimizer step.

    python sft.py                          missing knowledge: learnt, in the teacher's foreign words
    python sft.py --output_dir runs/sft && python grpo.py --model runs/sft
"""

from dataclasses import dataclass

import torch

import common
import engine
from engine import arg


@dataclass
class Args(engine.TraceArgs):  # model, data, traces, optimizer, evaluation and output are inherited: python sft.py --help
    # rollout
    prompts_per_step: int = arg(64, "N: traces in a step", least=1)
    # optimization
    learning_rate: float | None = arg(
        None, "Learning rate of AdamW", builtin=1e-3, otherwise=1e-5, above=0, below=float("inf"))
    max_steps: int = arg(120, "Steps: one optimizer step each; 120 = 10 epochs of the built-in task", least=1)


def policy_loss(logps, entropy, batch, args, num_tokens, num_rows):
    """This micro-batch's share of the mean negative log-likelihood of the step's trace tokens. [SFT objective]

    logps, entropy (B, T) float32 in nats; num_tokens () counts the whole step, over all micro-batches and ranks.
    Returns (loss (), {metric: (sum, count) over this micro-batch's tokens}).
    """
    mask = batch.completion_mask  # (B, T) bool
    token_loss = -logps * mask  # (B, T) float32  [SFT objective]
    loss = token_loss.sum() / max(num_tokens, 1)  # () float32  [SFT objective]
    num = mask.sum()  # ()
    return loss, {
        "entropy": ((entropy.detach() * mask).sum(), num),
    }


def rollout(model, tokenizer, problems):
    """The step's N traces as if they had been sampled, B = N. Returns (engine.Rows, the list of Samples behind them, metrics)."""
    samples = [common.trace_sample(problem) for problem in problems]
    padded = engine.pad([sample.prompt_ids for sample in samples], [sample.ids for sample in samples], tokenizer, model.device)
    batch = engine.Rows(*padded)
    return batch, samples, {"completions/mean_length": batch.completion_mask.sum(1).float().mean().item()}


def update(model, optimizer, batch, args, flops):
    """Train on one batch: one optimizer step. Returns metrics."""
    totals = engine.Totals()
    num_tokens, num_rows = int(batch.completion_mask.sum()), len(batch.lengths)
    engine.zero_grad(model)
    for rows in engine.micro_batches(model, batch, torch.arange(num_rows, device=model.device), args):  # (b,) int64
        part = batch[rows]
        logps, entropy = engine.policy_logps(model, part, args)  # (b, t) float32 each
        loss, sums = policy_loss(logps, entropy, part, args, num_tokens, num_rows)
        loss.backward()
        totals.add(loss, sums)
    engine.optimizer_step(model, optimizer, totals, args)
    flops.add("train", batch.lengths, passes=4 if args.gradient_checkpointing else 3)
    flops.add_paper_rule(batch.lengths, passes=3)
    return totals.metrics()


def main():
    args = engine.parse_args(Args, __doc__, __file__)
    model, tokenizer = engine.load_policy(args)
    train_problems, eval_problems = common.load_problems(args, tokenizer)
    train_problems = common.rows_of_traces(train_problems)
    run = engine.Run(args, __file__, model, tokenizer, train_problems, eval_problems,
                     evaluate=common.evaluation_metrics, trace_rows=1)
    for step, problems in run.steps():
        batch, samples, metrics = rollout(model, tokenizer, problems)
        metrics |= update(model, run.optimizer, batch, args, run.flops)
        run.record(step, samples, metrics)  # logs, evaluates and saves when each is due


if __name__ == "__main__":
    engine.launch(main)
