"""The figures of compare.py: a function takes {arm: its runs}, {arm: its name} and the file to write; it shows mean and range over seeds.

Each method has one of the colours of Okabe and Ito, which colour-blind readers can tell apart. Arms of one method differ by dashes.
"""

import itertools
import statistics
from pathlib import Path

COLOURS = {"grpo": "#888888", "repo": "#D55E00", "luffy": "#CC79A7", "prefixrl": "#0072B2", "sft": "#009E73", "sft-grpo": "#56B4E9",
           "repo-raw": "#E69F00", "base": "#000000", "repo-frozen": "#0072B2", "repo-overlap": "#009E73", "repo-steps": "#CC79A7"}
COLOURS |= {"dapo": COLOURS["grpo"], "chord": COLOURS["luffy"], "opsd": COLOURS["repo"], "adaprefix": COLOURS["prefixrl"]}  # of the parents
DASHES = ("-", "--", ":", "-.")


def styles(arms):
    """{arm: (colour, dashes)}: the colour of its method, and other dashes for each arm of one colour."""
    used, result = {}, {}
    for arm in arms:
        name = arm.split("/")[1]
        colour = COLOURS[max((method for method in COLOURS if f"{name}-".startswith(f"{method}-")), key=len)]
        result[arm] = colour, DASHES[used.get(colour, 0) % len(DASHES)]
        used[colour] = used.get(colour, 0) + 1
    return result


def rare_style(name):
    """(colour, dashes) of a method of rarity.py, METHOD or METHOD-NUMBER of traces."""
    method, _, num = name.rpartition("-") if name[-1].isdigit() else (name, "", "")
    return COLOURS[{"importance": "luffy", "grpo-long": "grpo"}.get(method, method)], {"1": ":", "3": "--"}.get(num, "-")


def axes(rows, columns, size, **options):
    """(figure, axes) of matplotlib, which is imported here: tables need none."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **options)


def curves(runs, name, scale=1.0, zeros=True):
    """[(step, mean tflop, [value of each run that has one])] at the steps where a run has the metric; without `zeros` 0 counts as none."""
    values = {}
    for point in (point for run in runs for point in run.points()):
        if point.get(name) is not None and (zeros or point[name]):
            values.setdefault(point["step"], []).append((point["tflop"], scale * point[name]))
    return [(step, statistics.mean(tflop for tflop, _ in pairs), [value for _, value in pairs]) for step, pairs in sorted(values.items())]


def draw_curve(axis, rows, colour, dashes, label, x="step", smooth=1, band=True):
    """A line of means and a band from least to greatest, each the mean of the last `smooth` of its own."""
    if x == "tflop":  # on a log scale: from the first evaluation that has cost something
        rows = [row for row in rows if row[1] > 0]
    places = [tflop if x == "tflop" else step for step, tflop, _ in rows]
    low, mean, high = ([statistics.mean(row[max(0, i - smooth + 1) : i + 1]) for i in range(len(rows))] for row in
                       ([bound(values) for *_, values in rows] for bound in (min, statistics.mean, max)))
    if band:
        axis.fill_between(places, low, high, color=colour, alpha=0.18, linewidth=0)
    axis.plot(places, mean, color=colour, linestyle=dashes, label=label, linewidth=1.6)
    axis.plot(places[-1:], mean[-1:], "o", color=colour, markersize=4)  # so that a line below another one shows where it ends


def finish(figure, grid, path, ink="black", legend=None, **options):
    """Thin grids, one legend, of the first axis unless another is given, and the file."""
    for axis in grid.flatten():
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = (legend or grid.flatten()[0]).get_legend_handles_labels()
    columns = min(len(labels), 4 if max(map(len, labels)) < 33 else 3)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, labelcolor=ink)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, **options)


ACCURACY = "eval/{}/avg@1"


def draw_accuracy(axis, runs, titles, difficulty, x, **options):
    """Accuracy of every arm on problems of one difficulty, in per cent, by step or by TFLOP."""
    for arm, (colour, dashes) in styles(runs).items():
        draw_curve(axis, curves(runs[arm], ACCURACY.format(difficulty), 100), colour, dashes, titles[arm], x)
    label = "TFLOP, all included" if x == "tflop" else "step"
    axis.set(ylim=(-3, 103), ylabel=f"right on {difficulty} problems, %", xlabel=label, **options)


def draw_metric(axis, runs, titles, name, label, scale=1.0, zeros=True):
    """Running mean of a metric of every arm that has it, by step."""
    for arm, (colour, dashes) in styles(runs).items():
        draw_curve(axis, curves(runs[arm], name, scale, zeros), colour, dashes, titles[arm], smooth=10)
    axis.set(xlabel="step, mean of 10", ylabel=label)


def draw_passes(axis, runs, titles):
    """pass@k of every arm on hard problems at the end, in per cent, by k."""
    for arm, (colour, dashes) in styles(runs).items():
        names = [name for name in runs[arm][0].evaluation["hard"] if name.startswith("pass@") and not name.endswith("_se")]
        rows = [(int(name.removeprefix("pass@")), 0.0, [100 * run.evaluation["hard"][name] for run in runs[arm]]) for name in names]
        draw_curve(axis, rows, colour, dashes, titles[arm])
    axis.set(xscale="log", xticks=[1, 2, 4, 8], xticklabels=[1, 2, 4, 8], ylim=(-3, 103), xlabel="k",
             ylabel="pass@k on hard problems, %")
    axis.minorticks_off()


def learning(runs, titles, path):
    """What is learnt: hard problems by FLOPs, by steps and by samples, easy and other ones, style; and how: entropy, gradient norm."""
    figure, grid = axes(2, 4, (13, 6.2))
    draw_passes(grid[0, 2], runs, titles)
    runs = {arm: seeds for arm, seeds in runs.items() if seeds[0].stages}  # all but the base, which has only an end
    draw_accuracy(grid[0, 0], runs, titles, "hard", "tflop", xscale="log")
    draw_accuracy(grid[0, 1], runs, titles, "hard", "step")
    draw_accuracy(grid[1, 0], runs, titles, "easy", "step")
    draw_accuracy(grid[1, 1], runs, titles, "other", "step")
    for arm, (colour, dashes) in styles(runs).items():
        draw_curve(grid[0, 3], curves(runs[arm], "eval/hard/foreign", 100), colour, dashes, titles[arm])
    grid[0, 3].set(ylim=(-3, 103), xlabel="step", ylabel="answers in foreign words, %")
    draw_metric(grid[1, 2], runs, titles, "entropy", "entropy, nats a token")
    draw_metric(grid[1, 3], runs, titles, "grad_norm", "gradient norm", zeros=False)
    grid[1, 3].set_yscale("log")
    finish(figure, grid, path, legend=grid[0, 2])


def real_model(runs, titles, path):
    """Accuracy on the problems that are trained, by FLOPs and by steps, and on easy ones; pass@k at the end."""
    figure, grid = axes(1, 4, (13, 3.6))
    draw_passes(grid[0, 3], runs, titles)
    runs = {arm: seeds for arm, seeds in runs.items() if seeds[0].stages}
    draw_accuracy(grid[0, 0], runs, titles, "hard", "tflop")
    draw_accuracy(grid[0, 1], runs, titles, "hard", "step")
    draw_accuracy(grid[0, 2], runs, titles, "easy", "step")
    finish(figure, grid, path, legend=grid[0, 3])


def gate(runs, titles, path):
    """Accuracy on hard and easy problems, how many groups are helped, and how often retelling is right."""
    figure, grid = axes(1, 4, (13, 3.4))
    draw_accuracy(grid[0, 0], runs, titles, "hard", "step")
    draw_accuracy(grid[0, 1], runs, titles, "easy", "step")
    draw_metric(grid[0, 2], runs, titles, "rephrase/replaced", "groups with a retelling, %", 100)
    draw_metric(grid[0, 3], runs, titles, "rephrase/success", "retellings right, %", 100)
    for axis in grid[0, 2:]:
        axis.set_ylim(-3, 103)
    finish(figure, grid, path)


def siblings(runs, titles, path):
    """Accuracy on hard problems by FLOPs and steps, on easy and other ones by steps. A sibling has its parent's colour."""
    figure, grid = axes(1, 4, (13, 3.6))
    draw_accuracy(grid[0, 0], runs, titles, "hard", "tflop", xscale="log")
    for axis, difficulty in zip(grid[0, 1:], ("hard", "easy", "other")):
        draw_accuracy(axis, runs, titles, difficulty, "step")
    finish(figure, grid, path)


def drift(runs, titles, path):
    """Accuracy on hard and easy problems, how often retelling is right, and how much of the trace is in it."""
    figure, grid = axes(1, 4, (13, 3.6))
    draw_accuracy(grid[0, 0], runs, titles, "hard", "step")
    draw_accuracy(grid[0, 1], runs, titles, "easy", "step")
    draw_metric(grid[0, 2], runs, titles, "rephrase/success", "retellings right, %", 100)
    draw_metric(grid[0, 3], runs, titles, "rephrase/overlap", "their overlap with the trace, %", 100)
    finish(figure, grid, path)


def compute(runs, titles, path):
    """Accuracy on hard problems by FLOPs, rejection sampling included, and by steps."""
    figure, grid = axes(1, 2, (10, 4))
    draw_accuracy(grid[0, 0], runs, titles, "hard", "tflop")
    draw_accuracy(grid[0, 1], runs, titles, "hard", "step")
    finish(figure, grid, path)


def overview(panels, names, path, dark):
    """The README's first picture, a column per experiment: what is learnt (hard problems) and what is kept (the mean of easy and other
    ones) by FLOPs, for a light or a dark page."""
    import matplotlib

    figure, grid = axes(2, len(panels), (9, 5.6), sharey="row", sharex="col", height_ratios=(3, 2))
    ink = "#E6EDF3" if dark else "#1F2328"
    titles = {"hard_samples_bases": "bills: knowledge the base lacks", "hard_samples_diary_bases": "diary: a skill used carelessly"}
    for (learnt, kept), (name, runs) in zip(grid.T, panels.items()):
        for arm, (colour, _) in styles(runs).items():
            hard, easy, other = (curves(runs[arm], ACCURACY.format(difficulty), 100) for difficulty in ("hard", "easy", "other"))
            both = [(step, tflop, [(a + b) / 2 for a, b in zip(first, second)])
                    for (step, tflop, first), (_, _, second) in zip(easy, other, strict=True)]
            draw_curve(learnt, hard, colour, "-", names[arm.split("/")[1].removesuffix("-bases")], "tflop")
            draw_curve(kept, both, colour, "-", None, "tflop")
        learnt.set(xscale="log", ylim=(-3, 103))
        learnt.set_title(titles[name], color=ink)
        kept.set(ylim=(None, 103), xlabel="TFLOP so far, rephrasing and rejection sampling included")
        kept.xaxis.label.set_color(ink)
        kept.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        for axis in (learnt, kept):
            axis.tick_params(colors=ink, which="both")
            axis.spines[:].set_color(ink)
    grid[0, 0].set_ylabel("learnt: right on held-out\nhard problems, %", color=ink)
    grid[1, 0].set_ylabel("kept: right on easy\nand other ones, %", color=ink)
    finish(figure, grid, path, ink, transparent=True)


def stability(runs, titles, path):
    """Entropy, gradient norm and accuracy on easy and hard problems by step."""
    figure, grid = axes(1, 4, (13, 3.4))
    draw_metric(grid[0, 0], runs, titles, "entropy", "entropy, nats a token")
    draw_metric(grid[0, 1], runs, titles, "grad_norm", "gradient norm", zeros=False)
    draw_accuracy(grid[0, 2], runs, titles, "easy", "step")
    draw_accuracy(grid[0, 3], runs, titles, "hard", "step")
    grid[0, 1].set_yscale("log")
    finish(figure, grid, path)


def wrong_traces(runs, titles, path):
    """Final accuracy by the share of wrong traces."""
    figure, grid = axes(1, 3, (9, 3.4), sharey=True)
    for axis, difficulty in zip(grid[0], ("hard", "easy", "other")):
        for method in dict.fromkeys(arm.split("/")[1].split("-")[0] for arm in runs):
            places, finals = [], []
            for arm in (arm for arm in runs if arm.split("/")[1].split("-")[0] == method):
                places.append(int(arm.partition("-wrong")[2] or 0))
                finals.append([100 * next(value for key, value in run.evaluation[difficulty].items() if key.startswith("avg@"))
                               for run in runs[arm]])
            label = titles[f"bills/{method}"].split(",")[0]
            axis.plot(places, [statistics.mean(values) for values in finals], color=COLOURS[method], marker="o", label=label)
            axis.vlines(places, [min(values) for values in finals], [max(values) for values in finals], color=COLOURS[method], alpha=0.5)
        axis.set(xlabel="wrong traces of hard problems, %", ylim=(-3, 103), ylabel=f"right on {difficulty} problems, %")
    finish(figure, grid, path)


def draw_prefixes(axis, runs):
    """Training reward of PrefixRL's runs with a prefix, in per cent, by the share of the trace that was given and by step: means."""
    names = sorted({name for run in runs for point in run.points() for name in point if name.startswith("reward/prefix_0")})
    for name, dashes in zip(names, itertools.cycle(DASHES)):
        low, high = name.removeprefix("reward/prefix_").split("_")
        label = f"{float(low):.0%} to {float(high):.0%}"
        draw_curve(axis, curves(runs, name, 100), COLOURS["prefixrl"], dashes, label, smooth=10, band=False)
    axis.set(xlabel="step, mean of 10", ylabel="training reward with prefix, %", ylim=(-3, 103))
    axis.legend(fontsize="small", title="prefix, share of the trace", title_fontsize="small")


def back_generalisation(runs, titles, path):
    """Without prefix: held-out accuracy by step and FLOPs; with prefix: training reward by the share of the trace that was given."""
    figure, grid = axes(1, 3, (10, 3.6))
    draw_accuracy(grid[0, 0], runs, titles, "hard", "step")
    draw_accuracy(grid[0, 1], runs, titles, "hard", "tflop")
    for axis in grid[0, :2]:
        axis.set_ylabel("right on held-out hard problems\nwithout prefix, %")
    draw_prefixes(grid[0, 2], runs["diary/prefixrl-only"])
    finish(figure, grid, path)


def prefixes_of_facts(runs, titles, path):
    """Held-out accuracy on hard and easy problems by step; training reward by the share of the trace that was given, for early cuts."""
    figure, grid = axes(1, 3, (10, 3.6))
    draw_accuracy(grid[0, 0], runs, titles, "hard", "step")
    draw_accuracy(grid[0, 1], runs, titles, "easy", "step")
    draw_prefixes(grid[0, 2], runs["bills/prefixrl-own"])
    finish(figure, grid, path)


def ablations(runs, titles, path):
    """Final accuracy on hard problems of each arm, every seed a dot, and how it was learnt."""
    figure, grid = axes(1, 2, (10, 0.6 + 0.42 * len(runs)), width_ratios=(1, 1))
    for place, (arm, (colour, _)) in enumerate(reversed(styles(runs).items())):
        values = [100 * next(value for key, value in run.evaluation["hard"].items() if key.startswith("avg@")) for run in runs[arm]]
        grid[0, 0].plot(values, [place] * len(values), "o", color=colour, alpha=0.5)
        grid[0, 0].plot(statistics.mean(values), place, "|", color=colour, markersize=18, markeredgewidth=2.5)
        areas = [statistics.mean(100 * point[ACCURACY.format("hard")] for point in run.points() if ACCURACY.format("hard") in point)
                 for run in runs[arm]]
        grid[0, 1].plot(areas, [place] * len(areas), "o", color=colour, alpha=0.5)
        grid[0, 1].plot(statistics.mean(areas), place, "|", color=colour, markersize=18, markeredgewidth=2.5)
    grid[0, 0].set_yticks(range(len(runs)), [titles[arm] for arm in reversed(runs)])
    grid[0, 1].set_yticks(range(len(runs)), [])
    grid[0, 0].set(xlabel="right on hard problems at the end, %", xlim=(-3, 103))
    grid[0, 1].set(xlabel="mean over the run's evaluations, %", xlim=(-3, 103))
    for axis in grid[0]:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
