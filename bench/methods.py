"""Every method on the built-in tasks, three seeds each, measured and written to results/methods/.

    python bench/methods.py              run what is missing, then rewrite summary.json, curve.png and the README's tables
    python bench/methods.py --render     only rewrite them from results/methods/

Each run is its own process; its wall time and peak resident memory are the operating system's. A finished run is never repeated:
delete its folder to have it again. The tests check that the README's tables are what this script renders.
"""

import argparse
import json
import statistics
from pathlib import Path

import measure
from measure import ROOT

RESULTS = ROOT / "results" / "methods"
SEEDS = (0, 1, 2)
RUNS = {  # name of the run -> (task, command of one seed as the README prints it)
    "grpo-bills": ("bills", "grpo.py"),
    "repo-bills": ("bills", "repo.py"),
    "repo-rho-bills": ("bills", "repo.py --failure_rate 1"),
    "repo-behavior-bills": ("bills", "repo.py --rephrase_ratio behavior"),
    "repo-shaped-bills": ("bills", "repo.py --rephrase_ratio shaped"),
    "luffy-bills": ("bills", "luffy.py"),
    "sft-bills": ("bills", "sft.py"),
    "grpo-diary": ("diary", "grpo.py --task diary"),
    "repo-diary": ("diary", "repo.py --task diary"),
    "luffy-diary": ("diary", "luffy.py --task diary"),
    "sft-diary": ("diary", "sft.py --task diary"),
    "prefixrl-diary": ("diary", "prefixrl.py"),
    "prefixrl-only-diary": ("diary", "prefixrl.py --prefixed_only"),
}


def command(name, seed):
    """The words of one run's command."""
    return ["python", *RUNS[name][1].split(), "--seed", str(seed)]


def load(name):
    """[(metrics records, measurement)] of every committed seed of one run."""
    return [measure.load(folder) for folder in sorted(RESULTS.glob(f"{name}-seed*"))]


def summarize():
    """Numbers of the README's tables: lists over seeds, as measured."""
    summary = {}
    for name in RUNS:
        runs = load(name)
        last = [records[-1] for records, _ in runs]
        summary[name] = {
            "seeds": len(runs), "steps": last[0]["step"],
            "seconds": [measured["seconds"] for _, measured in runs],
            "peak_memory_mb": [measured["peak_memory_mb"] for _, measured in runs],
            "tflop": [record["flops/total"] / 1e12 for record in last],
            "tflop_traces": [record["flops/traces"] / 1e12 for record in last],
            "foreign": [record["eval/hard/foreign"] for record in last],
        }
        for difficulty in ("hard", "easy", "other"):
            key = f"eval/{difficulty}/avg@1"
            summary[name][difficulty] = {"before": [records[0][key] for records, _ in runs], "after": [record[key] for record in last]}
    return summary


def span(values, form="{:.0f}", scale=1.0):
    """Mean and, in brackets, the least and the greatest of a list."""
    low, mean, high = (form.format(scale * value) for value in (min(values), statistics.mean(values), max(values)))
    return mean if low == high else f"{mean} [{low}, {high}]"


def table(summary):
    """The README's table, in Markdown."""
    titles = ("command", "seeds", "steps", "hard, % before → after", "easy", "other", "in foreign words, %", "TFLOP (of it traces)",
              "seconds", "peak MB")
    lines = []
    for task in dict.fromkeys(task for task, _ in RUNS.values()):
        lines += [f"Task `{task}`:", "", f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
        for name, row in summary.items():
            if RUNS[name][0] != task:
                continue
            cells = [f"{span(row[d]['before'], scale=100)} → {span(row[d]['after'], scale=100)}" for d in ("hard", "easy", "other")]
            traces = span(row["tflop_traces"], "{:.2f}")
            cells += [span(row["foreign"], scale=100), span(row["tflop"], "{:.2f}") + (f" ({traces})" if any(row["tflop_traces"]) else "")]
            cells += [span(row["seconds"]), span(row["peak_memory_mb"])]
            lines.append(f"| `{RUNS[name][1]}` | {row['seeds']} | {row['steps']} | {' | '.join(cells)} |")
        lines.append("")
    machines = sorted({measured["machine"] for name in RUNS for _, measured in load(name)})
    lines += ["`python COMMAND --seed SEED`: mean [least, greatest] over seeds, 128 held-out problems per difficulty without trace or",
              "prefix, one sample each at temperature 1. Foreign words: share of answers to hard problems that use the teacher's words.",
              "Times and memory are of the whole process, evaluations included, one thread each, with other jobs beside.",
              f"Machine: {'; '.join(machines)}."]
    return "\n".join(lines)


def expected_output():
    """What the first command of the README prints last, as a Markdown block."""
    lines = (RESULTS / "repo-bills-seed0" / "output.txt").read_text().splitlines()
    return "\n".join("    " + line for line in lines if line.startswith("eval/"))


def readme_with(text):
    """The README with its generated parts made anew from results/methods/."""
    for name, block in (("results", table(summarize())), ("expected output", expected_output())):
        start, end = f"<!-- {name}: made by bench/methods.py -->", f"<!-- end of {name} -->"
        before, rest = text.split(start)
        text = f"{before}{start}\n\n{block}\n\n{end}{rest.split(end)[1]}"
    return text


COLOURS = {"grpo": "#999999", "repo": "#D55E00", "luffy": "#CC79A7", "sft": "#009E73", "prefixrl": "#0072B2", "prefixrl-only": "#56B4E9"}
ABLATIONS = {"repo-rho-bills", "repo-behavior-bills", "repo-shaped-bills"}  # in the table, not in the figure


def draw():
    """results/methods/curve.png: accuracy on held-out hard problems against FLOPs, mean and range over seeds, one panel a task."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    titles = {"bills": "bills: knowledge the base lacks", "diary": "diary: a skill used carelessly"}
    for axis, task in zip(axes, titles):
        for name in (name for name in RUNS if RUNS[name][0] == task and name not in ABLATIONS):
            method = name.removesuffix(f"-{task}")
            curves = [[(record.get("flops/total"), 100 * record["eval/hard/avg@1"]) for record in records if "eval/hard/avg@1" in record]
                      for records, _ in load(name)]
            start = statistics.mean(records[1]["flops/traces"] for records, _ in load(name))  # the price of the traces, paid before step 1
            spent = [statistics.mean(curve[i][0] or start for curve in curves) / 1e12 for i in range(len(curves[0]))]
            values = [[curve[i][1] for curve in curves] for i in range(len(spent))]
            axis.fill_between(spent, [min(v) for v in values], [max(v) for v in values], color=COLOURS[method], alpha=0.2, linewidth=0)
            axis.plot(spent, [statistics.mean(v) for v in values], color=COLOURS[method], label=method)
        axis.set(title=titles[task], xlabel="TFLOP, rejection sampling and rephrasing included", ylim=(-3, 103))
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    axes[0].set_ylabel("right on held-out hard problems, %")
    figure.savefig(RESULTS / "curve.png", dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", action="store_true", help="run nothing")
    parser.add_argument("--run_seeds", nargs="*", type=int, default=[], help="only run these seeds; others may run beside")
    args = parser.parse_args()
    if not args.render:
        for seed in args.run_seeds or SEEDS:
            for name in RUNS:
                measure.run(command(name, seed), Path("runs") / f"methods-{name}-seed{seed}", RESULTS / f"{name}-seed{seed}")
    if args.run_seeds:
        return
    (RESULTS / "summary.json").write_text(json.dumps(summarize(), indent=1) + "\n")
    readme = ROOT / "README.md"
    readme.write_text(readme_with(readme.read_text()))
    draw()
    print(table(summarize()))


if __name__ == "__main__":
    main()
