"""The baseline's results: grpo.py on both built-in tasks, three seeds each, measured and written to results/baseline/.

    python bench/baseline.py             run what is missing, then rewrite summary.json, curve.png and the README's table
    python bench/baseline.py --render    only rewrite them from results/baseline/

Each run is its own process; its wall time and peak resident memory are the operating system's. A finished run is never repeated:
delete its folder to have it again. The tests check that the README's table is what this script renders.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results" / "baseline"
TASKS, SEEDS = ("diary", "bills"), (0, 1, 2)


def command(task, seed):
    """The command of one run, as the README prints it."""
    return ["python", "grpo.py", "--task", task, "--seed", str(seed)]


def machine():
    """Processor and cores of this machine."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")] or [platform.processor()]
    return f"{names[0]}, {len(os.sched_getaffinity(0))} cores"


def run(task, seed):
    """Run one job and keep its metrics.jsonl, args.json, what it printed and its measurement."""
    folder, run_dir = RESULTS / f"{task}-seed{seed}", Path("runs") / f"baseline-{task}-seed{seed}"
    if folder.exists():
        return
    shutil.rmtree(ROOT / run_dir, ignore_errors=True)
    (ROOT / "runs").mkdir(exist_ok=True)
    words = command(task, seed)
    began = time.perf_counter()
    with open(ROOT / "runs" / "baseline.out", "w+") as printed:
        process = subprocess.Popen([sys.executable, *words[1:], "--output_dir", str(run_dir)], cwd=ROOT, stdout=printed)
        _, status, usage = os.wait4(process.pid, 0)
        printed.seek(0)
        output = printed.read()
    if status:
        sys.exit(f"{' '.join(words)} failed")
    measured = {"command": " ".join(words), "machine": machine(), "seconds": round(time.perf_counter() - began, 1),
                "peak_memory_mb": round(usage.ru_maxrss / 1024)}
    folder.mkdir(parents=True)
    for name in ("metrics.jsonl", "args.json"):
        shutil.copy(ROOT / run_dir / name, folder / name)
    (folder / "output.txt").write_text(output)
    (folder / "measured.json").write_text(json.dumps(measured, indent=1) + "\n")


def load(task):
    """[(metrics records, measurement)] of every committed seed of one task."""
    folders = sorted(RESULTS.glob(f"{task}-seed*"))
    return [([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()],
             json.loads((folder / "measured.json").read_text())) for folder in folders]


def summarize():
    """Numbers of the README's table: lists over seeds, as measured."""
    summary = {}
    for task in TASKS:
        runs = load(task)
        last = [records[-1] for records, _ in runs]
        summary[task] = {
            "seeds": len(runs), "steps": last[0]["step"],
            "seconds": [measured["seconds"] for _, measured in runs],
            "peak_memory_mb": [measured["peak_memory_mb"] for _, measured in runs],
            "tflop": [record["flops/total"] / 1e12 for record in last],
            "zero_variance_groups": [statistics.mean(r["frac_reward_zero_std"] for r in records if r["step"] > 0) for records, _ in runs],
        }
        for difficulty in ("hard", "easy", "other"):
            key = f"eval/{difficulty}/avg@1"
            summary[task][difficulty] = {"before": [records[0][key] for records, _ in runs], "after": [record[key] for record in last]}
    return summary


def span(values, form="{:.0f}", scale=1.0):
    """Mean and, in brackets, the least and the greatest of a list."""
    low, mean, high = (form.format(scale * value) for value in (min(values), statistics.mean(values), max(values)))
    return mean if low == high else f"{mean} [{low}, {high}]"


def table(summary):
    """The README's table, in Markdown."""
    titles = "task", "steps", "hard, % before → after", "easy", "other", "groups without signal, %", "TFLOP", "seconds", "peak MB"
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for task, row in summary.items():
        cells = [f"{span(row[d]['before'], scale=100)} → {span(row[d]['after'], scale=100)}" for d in ("hard", "easy", "other")]
        cells += [span(row["zero_variance_groups"], scale=100), span(row["tflop"], "{:.2f}")]
        cells += [span(row["seconds"]), span(row["peak_memory_mb"])]
        lines.append(f"| `{task}` | {row['steps']} | {' | '.join(cells)} |")
    machines = sorted({measured["machine"] for task in TASKS for _, measured in load(task)})
    seeds = " and ".join(str(n) for n in sorted({row["seeds"] for row in summary.values()}))
    lines += ["", f"`python grpo.py --task TASK --seed SEED`, {seeds} seeds each: mean [least, greatest] over seeds, 128 held-out problems",
              "per difficulty, one sample each at temperature 1. Times and memory are of the whole process, evaluations included.",
              f"Machine: {'; '.join(machines)}."]
    return "\n".join(lines)


def expected_output():
    """What the first command of the README prints last, as a Markdown block."""
    lines = (RESULTS / "diary-seed0" / "output.txt").read_text().splitlines()
    return "\n".join("    " + line for line in lines if line.startswith("eval/"))


def readme_with(text):
    """The README with its generated parts made anew from results/baseline/."""
    for name, block in (("results", table(summarize())), ("expected output", expected_output())):
        start, end = f"<!-- {name}: made by bench/baseline.py -->", f"<!-- end of {name} -->"
        before, rest = text.split(start)
        text = f"{before}{start}\n\n{block}\n\n{end}{rest.split(end)[1]}"
    return text


def draw():
    """results/baseline/curve.png: accuracy on held-out problems by step, mean and range over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3.2), sharey=True, layout="constrained")
    titles = {"diary": "diary: a skill used carelessly", "bills": "bills: knowledge the base lacks"}
    for axis, task in zip(axes, TASKS):
        for difficulty, colour in (("easy", "#0072B2"), ("other", "#999999"), ("hard", "#D55E00")):
            key = f"eval/{difficulty}/avg@1"
            curves = [[(record["step"], 100 * record[key]) for record in records if key in record] for records, _ in load(task)]
            steps = [step for step, _ in curves[0]]
            values = [[curve[i][1] for curve in curves] for i in range(len(steps))]
            axis.fill_between(steps, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.2, linewidth=0)
            axis.plot(steps, [statistics.mean(v) for v in values], color=colour, label=f"{difficulty} problems")
        axis.set(title=titles[task], xlabel="step (12 prompts × 8 completions)", ylim=(-3, 103))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("right on held-out problems, %")
    axes[0].legend(loc="center right")
    figure.savefig(RESULTS / "curve.png", dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", action="store_true", help="run nothing")
    if not parser.parse_args().render:
        for seed in SEEDS:
            for task in TASKS:
                run(task, seed)
    (RESULTS / "summary.json").write_text(json.dumps(summarize(), indent=1) + "\n")
    readme = ROOT / "README.md"
    readme.write_text(readme_with(readme.read_text()))
    draw()
    print(table(summarize()))


if __name__ == "__main__":
    main()
