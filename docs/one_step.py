"""docs/one_step.ipynb: one step of GRPO, and RePO's replacement, in cells that print every stage with its real values.

    python docs/one_step.py     run the cells and write the notebook; tests/test_explain.py checks that its outputs are current

The cells are the text below, parted by lines `# %%`. A cell that begins with `# %% text` is prose.
"""

import contextlib
import io
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "docs" / "one_step.ipynb"

CELLS = '''
# %% text
# One step, by hand

This notebook is step 2 of `python grpo.py`, taken apart, and then what `repo.py` changes in it. Every number is
real: the tiny model samples, is graded and is trained. The functions are those of the scripts, and `python
grpo.py --explain` prints the same step from the inside. `python docs/one_step.py` has written this file.

# %% text
## 1. A policy and a batch of problems

# %%
import sys

sys.path[:0] = [".", ".."]  # from the root or from docs/

# %%
import math

import torch

import common
import engine
import grpo
import repo
from engine import data
from engine.flops import Flops
from engine.models import load_policy, seed_everything
from engine.rollouts import token_pieces

args = grpo.Args(threads=1)  # N = 12 prompts, G = 8 completions each
model, tokenizer = load_policy(args)
train_problems, _ = common.load_problems(args, tokenizer)
problems = data.step_problems(train_problems, args.prompts_per_step, args.seed, step=1)
print(f"{model.num_parameters():,} parameters; {len(train_problems)} training problems, {len(problems)} of them in this step")
problem = problems[3]
print("prompt      ", problem["prompt"])
print("prompt_ids  ", problem["prompt_ids"])
print("answer      ", problem["answer"], "  difficulty", problem["difficulty"])

# %% text
## 2. The rollout: G completions of each prompt

B = N G = 96 rows, those of a prompt adjacent. All chance of a step comes from (seed, step).

# %%
seed_everything(args.seed, 1)
every = [problem for problem in problems for _ in range(args.num_generations)]
prompts = [problem["prompt_ids"] for problem in every]
samples = common.sample(model, tokenizer, prompts, every, args)
group = slice(3 * args.num_generations, 4 * args.num_generations)
for sample in samples[group]:
    print(len(sample.ids), "tokens", "ended " if sample.ended else "cut off", sample.text)

# %% text
## 3. The reward

A completion earns 1 when its `\\\\boxed{}` holds the right answer. The tiny model solves easy problems and fails at
hard ones, so most groups agree with themselves.

# %%
samples = common.grade(samples, args)
rewards = torch.tensor([sample.reward for sample in samples])  # (B,)
for row, problem in zip(rewards.view(-1, args.num_generations).int().tolist(), problems):
    print(row, problem["difficulty"], "" if 0 < sum(row) < 8 else "- no signal")

# %% text
## 4. The advantage: each completion against its own group

$A_i = (R_i - \\\\text{mean}\\\\, R) / (\\\\text{std}\\\\, R + \\\\epsilon)$. A group of equal rewards gives 0.

# %%
advantages = grpo.group_advantages(rewards, args.num_generations)  # (B,)
own = rewards[group]
print("rewards   ", own.tolist())
print("mean, std ", round(own.mean().item(), 3), round(own.std(correction=0).item(), 3))
print("advantages", [round(a, 3) for a in advantages[group].tolist()])
print("of a group without signal", advantages[:8].tolist())

# %% text
## 5. The batch: prompts padded on the left, completions on the right

# %%
padded = engine.pad(prompts, [sample.ids for sample in samples], tokenizer, model.device)
batch = grpo.Batch(*padded, loss_mask=padded[-1], advantages=advantages)
for name, value in vars(batch).items():
    print(f"{name:<16}", "None" if value is None else f"{tuple(value.shape)} {value.dtype}".replace("torch.", ""))

# %% text
## 6. The log-probs of the sampled tokens

`logps` has a gradient. Only rows whose advantage is not 0 can have one in the end, so only these are computed.
The row of the wrong completion is shown.

# %%
rows = (advantages != 0).nonzero().flatten()  # (b,)
part = batch[rows]
logps, entropy = engine.policy_logps(model, part, args)  # (b, t) each
wrong = advantages[rows].argmin().item()
pieces = token_pieces(tokenizer, samples[rows[wrong]].ids)
print("logps", tuple(logps.shape), " mask", tuple(part.loss_mask.shape))
for piece, logp, spread in list(zip(pieces, logps[wrong].tolist(), entropy[wrong].tolist()))[:8]:
    print(f"{piece!r:>10}   prob {math.exp(logp):.3f}   log-prob {logp:6.2f}   entropy {spread:5.2f}")

# %% text
## 7. Ratio, clip and the loss of a token

At the first update pi_old is pi itself: the ratio is 1, nothing is clipped, and a token's loss is -A. Its gradient
is not 0: it is -A times the gradient of log pi.

# %%
old_logps = logps.detach()
ratio = torch.exp(logps - old_logps)
clipped = ratio.clamp(1 - args.epsilon, 1 + args.epsilon)
A = part.advantages.unsqueeze(1)
token_loss = -torch.min(ratio * A, clipped * A) * part.loss_mask
num_tokens = int(batch.loss_mask.sum())
loss, _ = grpo.policy_loss(logps, entropy, part, args, num_tokens, len(samples))
print("ratio      ", [round(value, 2) for value in ratio[wrong, :5].tolist()])
print("token_loss ", [round(value, 2) for value in token_loss[wrong, :5].tolist()])
print("loss       ", f"{token_loss.sum().item():.2f} / {num_tokens} tokens of the step = {(token_loss.sum() / num_tokens).item():.4f}")
print("policy_loss", f"{loss.item():.4f}")

# %% text
## 8. The gradient, its clip, and the step of AdamW

# %%
optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay)
totals = engine.Totals()
engine.zero_grad(model)
loss.backward()
totals.add(loss, {})
print("gradient norm", round(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item(), 3),
      " largest allowed (--max_grad_norm)", args.max_grad_norm)
engine.optimizer_step(model, optimizer, totals, args)
print("learning rate", args.learning_rate, " skipped updates", totals.skipped)

# %% text
## 9. What the step has done

The wrong completion is less likely now. A second update on the same batch would have ratios that are not 1, and
tokens beyond the clip would get no gradient any more.

# %%
with torch.no_grad():
    after, _ = engine.policy_logps(model, part, args)
ratio = torch.exp(after - old_logps)[wrong][part.completion_mask[wrong]]
print("log-prob of the wrong completion", round(old_logps[wrong].sum().item(), 1), "->", round(after[wrong].sum().item(), 1))
print("its ratios", [round(value, 2) for value in ratio.tolist()[:8]])
print("beyond the lower clip", int((ratio < 1 - args.epsilon).sum()), "of", len(ratio))

# %% text
# What RePO changes

A hard problem gives GRPO nothing: all samples fail. RePO lets the policy read somebody's solution, the trace, and
retell it. The retelling takes the place of the worst sample.

## 10. A group that fails

# %%
args = repo.Args(threads=1)
model, tokenizer = load_policy(args)
train_problems, _ = common.load_problems(args, tokenizer)
problem = data.step_problems(train_problems, args.prompts_per_step, args.seed, step=0)[10]
seed_everything(args.seed, 0)
ask = [problem] * args.num_generations
samples = common.grade(common.sample(model, tokenizer, [problem["prompt_ids"]] * len(ask), ask, args), args)
failed = [sample.reward < args.reward_threshold for sample in samples]
print("prompt", problem["prompt"], "  answer", problem["answer"])
for sample in samples[:3]:
    print(sample.reward, sample.text)
print("failed:", sum(failed), "of", len(failed), " the gate opens at", args.failure_threshold)

# %% text
## 11. The retelling

The policy reads P(q, k), the problem with the trace k, and answers in its own words. The gate lets the retelling in
only if it is right.

# %%
prompt = common.prompt_with_trace(tokenizer, problem, args)
print("trace     ", problem["trace"])
print("P(q, k)   ", tokenizer.decode(prompt))
(retelling,) = repo.retell(model, tokenizer, [problem], args, Flops.of(model))
print("retelling ", retelling.text)
print("reward    ", retelling.reward)
print("3-grams that it has from the trace:", round(common.ngram_overlap(retelling.text, problem["trace"]), 2))

# %% text
## 12. The replacement, and the advantages of the final group

# %%
worst = min(reversed(range(len(samples))), key=lambda row: samples[row].reward)
final = samples[:worst] + [retelling] + samples[worst + 1 :]
for name, rows in (("sampled", samples), ("final", final)):
    rewards = torch.tensor([sample.reward for sample in rows])
    advantages = repo.group_advantages(rewards, args.num_generations)
    print(f"{name:<8}", [int(reward) for reward in rewards.tolist()], [round(a, 2) for a in advantages.tolist()])

# %% text
## 13. The retelling is trained as an answer to q alone

It was sampled from P(q, k). The gap says how much likelier each word was with the trace in the prompt: the words that
the policy did not know have the largest gap, and the step lifts them.

# %%
alone = engine.pad([problem["prompt_ids"]], [retelling.ids], tokenizer, model.device)
given = engine.pad([retelling.prompt_ids], [retelling.ids], tokenizer, model.device)
with torch.no_grad():
    (q,), (qk,) = (engine.policy_logps(model, engine.Rows(*rows), args)[0] for rows in (alone, given))
pieces = token_pieces(tokenizer, retelling.ids)
for piece, a, b in list(zip(pieces, q.tolist(), qk.tolist()))[:10]:
    print(f"{piece!r:>10}   prob given q {math.exp(a):.3f}   given P(q, k) {math.exp(b):.3f}   gap {a - b:6.2f}")
print("mean gap", round((q - qk).mean().item(), 2))
'''


def cells():
    """[(is prose, text)] of CELLS."""
    parts = [part.split("\n", 1) for part in CELLS.replace("\\\\", "\\").split("# %%")[1:]]
    return [(head.strip() == "text", body.strip()) for head, body in parts]


def execute(texts):
    """What each of some cells prints, in one namespace."""
    space, printed = {"__name__": "notebook"}, []
    for text in texts:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(text, space)
        printed.append(out.getvalue())
    return printed


def notebook():
    """The notebook as JSON, with the outputs of its code cells."""
    found, made = iter(execute([text for prose, text in cells() if not prose])), []
    for place, (prose, text) in enumerate(cells()):
        cell = {"cell_type": "markdown" if prose else "code", "id": f"cell-{place}", "metadata": {},
                "source": text.splitlines(keepends=True)}
        if not prose:
            text = next(found).splitlines(keepends=True)
            output = [{"name": "stdout", "output_type": "stream", "text": text}] if text else []
            cell |= {"execution_count": sum(one["cell_type"] == "code" for one in made) + 1, "outputs": output}
        made.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    record = {"cells": made, "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(record, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    NOTEBOOK.write_text(notebook())
