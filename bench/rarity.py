"""The map of rarity: what methods cost on bases that are right on hard problems once in some 10², 10³ and 10⁴ samples.

    python bench/rarity.py --prepare     bases (13 minutes of a core each), problems and traces; writes results/rarity/slip*
    python bench/rarity.py --tune        learning rates, by one rule for every method, on a seed of their own
    python bench/rarity.py               run what is missing, then write the map
    python bench/rarity.py --render      only write the map: figure.png, summary.json and its part of docs/results.md

One recipe makes the bases: in the text of a base, a seven-day diary books a loss as a gain with the probability --slip. Hard problems have
three gains and four losses, so that booking everything as a loss does not pay. How often a base is right on them is its probability of
the one right solution in its own style, which is exact. A trace is charged as many samples as it takes to be right once. Traces are drawn
from the training problems in proportion to these probabilities, as rejection sampling finds them.
"""

import argparse
import json
import math
import os
import random
import statistics
import sys

import figures
from compare import build_base, refuse_unlike, run_all
from experiments import (
    RARE,
    RARE_ARMS,
    RARE_KINDS,
    RARE_LEARNING_RATES,
    RARE_PROBLEMS,
    RARE_TRACES,
    RARE_TUNED,
    RATES,
    SEEDS,
    TUNING_SEED,
    rare_base,
    rare_traces,
)
from measure import ROOT
from pages import with_blocks
from run_numbers import RESULTS, hard_curve, neighbours, seeds_of, tflop_to

sys.path.insert(0, str(ROOT))

import common
import engine
from engine import tasks
from tiny_model.build import own_solutions

HARD, EASY, EVAL = 64, 32, {"hard": 96, "easy": 48, "other": 48}

# ---------------------------------------------------------------- bases, problems and traces


def balanced(split, num):
    """Rows of `num` different diaries of three gains and four losses."""
    rng, rows = random.Random(f"balanced/{split}"), {}
    while len(rows) < num:
        prompt = tasks.diary_problem(rng, 7, 4)
        if tasks.in_eval_split(prompt) == (split == "eval"):
            rows[prompt] = {"prompt": prompt, "answer": tasks.solve(prompt)[1], "difficulty": "hard"}
    return list(rows.values())


def write_problems():
    """Write the training problems, hard only and with easy ones, and the evaluation's."""
    def built_in(split, difficulty, num):
        return [{name: row[name] for name in ("prompt", "answer", "difficulty")} for row in tasks.problems("diary", split, difficulty, num)]

    hard = balanced("train", HARD)
    files = {"hard": hard, "mixed": hard + built_in("train", "easy", EASY),
             "eval": balanced("eval", EVAL["hard"]) + built_in("eval", "easy", EVAL["easy"]) + built_in("eval", "other", EVAL["other"])}
    for name, rows in files.items():
        write_rows(ROOT / RARE_PROBLEMS.format(name), rows)
    return hard


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_traces(slip, hard):
    """Write the first 1, 3 and 10 traces that a base would find, and slipX.json: how often the base is right, and what a try costs."""
    args = engine.ModelArgs(model_name_or_path=str(ROOT / rare_base(slip)))
    model, tokenizer = engine.load_policy(args)
    rows, flops = common.encode_problems(hard, tokenizer, args), engine.flops.Flops.of(model)
    solutions = own_solutions(model, tokenizer, rows)
    chances = [logps.sum().exp().item() for _, logps in solutions]
    traces = [{**row, "trace": tasks.solve(row["prompt"])[0], "trace_ids": ids, "logps": logps.tolist()}
              for row, (ids, logps) in zip(hard, solutions)]
    rng, found = random.Random(f"traces/{slip}"), []
    while len(found) < max(RARE_TRACES):
        (place,) = rng.choices(range(len(hard)), chances)
        if traces[place] not in found:
            found.append(traces[place])
    for num in RARE_TRACES:
        write_rows(ROOT / rare_traces(slip, num), found[:num])
    lengths = [len(row["prompt_ids"]) + len(ids) for row, (ids, _) in zip(rows, solutions)]
    chance = {"right": statistics.mean(chances), "flops_of_a_try": flops.forward(lengths) / len(lengths)}
    (RESULTS / "rarity" / f"slip{slip}.json").write_text(json.dumps(chance, indent=1) + "\n")


# ---------------------------------------------------------------- tuning


def tuned():
    """{arm: {rate: (TFLOP to 50 %, or inf if the run does not end above 50 %, minus the final accuracy)}} of the tuning runs."""
    found = {}
    for arm in RARE_TUNED:
        for rate in RATES:
            for each in seeds_of(f"tuning/{arm}-{rate}"):
                final = statistics.mean(hard_curve(each)[1][-3:])
                found.setdefault(arm, {})[rate] = (tflop_to(50)(each) if final > 50 else math.inf, -final)
    return found


def best(rates):
    """Of {rate: (TFLOP, minus the final accuracy)}, the rate of the least TFLOP, then of the best accuracy."""
    return min(rates, key=rates.get)


def to_try(rates):
    """The rates of an arm that are still to be run: one in the middle of RATES, then the neighbours of the best so far."""
    return neighbours(best(rates) if rates else RATES[len(RATES) // 2], rates, RATES)


def tune(jobs):
    """Run rates until the best one of each arm has both its neighbours of RATES, and print them."""
    while missing := [(arm, rate) for arm in RARE_TUNED for rate in sorted(to_try(tuned().get(arm, {})))]:
        run_all([(arm, TUNING_SEED, RESULTS, rate, f"tuning/{arm}-{rate}") for arm, rate in missing], jobs)
    for arm, rates in tuned().items():
        print(arm, rates, "->", best(rates))


# ---------------------------------------------------------------- the map


def chance_of(slip):
    """{"right": how often a base is right, "flops_of_a_try"}."""
    return json.loads((RESULTS / "rarity" / f"slip{slip}.json").read_text())


def charge(arm):
    """What the traces of an arm would have cost to sample, in TFLOP."""
    slip, name = arm.removeprefix("rare-").split("/")
    chance = chance_of(slip)
    num = int(name.split("-")[-1]) if name.split("-")[-1].isdigit() else 0
    return num * chance["flops_of_a_try"] / chance["right"] / 1e12


def summarize():
    """{arm: {"charge", "to_50": TFLOP of each seed or null, "hard", "easy", "other": per cent of each seed}} of the finished runs."""
    found, groups = {}, {}
    for arm in RARE_ARMS:
        if runs := seeds_of(arm, seeds=SEEDS):
            groups.setdefault((arm.split("/")[0], "/mixed-" in arm), []).extend(runs)  # of the same base and problems
            spent = [tflop_to(50)(each) for each in runs]
            found[arm] = {"charge": charge(arm), "to_50": [None if math.isnan(each) else each for each in spent]} | {
                difficulty: [100 * each.evaluation[difficulty]["avg@8"] for each in runs] for difficulty in EVAL}
    for runs in groups.values():
        refuse_unlike(runs)
    return found


def methods(kind):
    """{method: its title} of a kind of RARE_KINDS."""
    start, others = f"rare-{RARE[-1]}/{kind}", tuple(f"rare-{RARE[-1]}/{other}" for other in RARE_KINDS if other)
    return {arm.removeprefix(start): title for arm, (title, _) in RARE_ARMS.items()
            if arm.startswith(start) and (kind or not arm.startswith(others))}


def to_50(row, charged):
    """The median TFLOP to 50 % over seeds, those that never get there counted as the dearest; None = half of them or more."""
    spent = sorted(math.inf if each is None else each + charged * row["charge"] for each in row["to_50"])
    middle = statistics.median(spent)
    return None if math.isinf(middle) else middle


def cell(row):
    """TFLOP to 50 %, at hand / charged (seeds that get there); final accuracy on hard, easy and other problems, per cent."""
    if row is None:
        return "–"
    reached = sum(each is not None for each in row["to_50"])
    hand, charged = (to_50(row, charged) for charged in (False, True))
    cost = "never" if hand is None else f"{hand:.3f}" + (f" / {charged:.3f}" if row["charge"] else "")
    ends = " · ".join(f"{statistics.mean(row[difficulty]):.0f}" for difficulty in EVAL)
    return f"{cost} ({reached} of {len(row['to_50'])}); {ends}"


def table(summary, kind):
    """Markdown: a line per method, a column per base."""
    rarities = [f"right once in {1 / chance_of(slip)['right']:,.0f}" for slip in RARE]
    lines = [f"| | {' | '.join(rarities)} |", "|---" * (len(RARE) + 1) + "|"]
    for name, title in methods(kind).items():
        lines.append(f"| {title} | " + " | ".join(cell(summary.get(f"rare-{slip}/{kind}{name}")) for slip in RARE) + " |")
    return "\n".join(lines)


def tuning_table():
    """Markdown: TFLOP to 50 % and final accuracy on hard problems of the tuning runs, the chosen rate in bold."""
    lines = [f"| | {' | '.join(f'{rate:g}' for rate in RATES)} |", "|---" * (len(RATES) + 1) + "|"]
    for arm, rates in tuned().items():
        cells = {rate: f"{'–' if math.isinf(spent) else f'{spent:.3f}'}; {-final:.0f}" for rate, (spent, final) in rates.items()}
        cells[best(rates)] = f"**{cells[best(rates)]}**"
        lines.append(f"| `{arm}` | {' | '.join(cells.get(rate, '') for rate in RATES)} |")
    return "\n".join(lines)


def draw(summary, path):
    """TFLOP to 50 % against rarity, a line a method: a column a kind, traces at hand above and charged below."""
    figure, grid = figures.axes(2, len(RARE_KINDS), (13, 7), sharex=True, sharey="row")
    for row, charged in zip(grid, (False, True)):
        for axis, (kind, title) in zip(row, RARE_KINDS.items()):
            for name, method in methods(kind).items():
                points = []
                for slip in RARE:
                    entry = summary.get(f"rare-{slip}/{kind}{name}")
                    if entry and (cost := to_50(entry, charged)) is not None:
                        points.append((1 / chance_of(slip)["right"], cost))
                colour, dashes = figures.rare_style(name)
                if points:
                    axis.plot(*zip(*points), color=colour, linestyle=dashes, marker="o", markersize=4, label=method)
            axis.set(xscale="log", yscale="log", title=title)
        row[0].set_ylabel(f"TFLOP to 50 %, traces {'charged' if charged else 'at hand'}")
    for axis in grid[-1]:
        axis.set_xlabel("samples of the base for one right answer")
    figures.finish(figure, grid, path, legend=grid[0, list(RARE_KINDS).index("")])


def page(summary):
    """docs/results.md with the tables made anew."""
    tables = {f"rarity {kind.removesuffix('-') or 'hard'}": table(summary, kind) for kind in RARE_KINDS}
    return with_blocks((ROOT / "docs" / "results.md").read_text(), tables | {"rarity tuning": tuning_table()}, "rarity")


def render():
    summary = summarize()
    (RESULTS / "rarity" / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    draw(summary, RESULTS / "rarity" / "figure.png")
    (ROOT / "docs" / "results.md").write_text(page(summary))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS[:3], help="seeds to run")
    parser.add_argument("--jobs", type=int, default=2, help="number of runs at a time, with one thread each")
    mode = parser.add_mutually_exclusive_group()
    for name in ("prepare", "tune", "render"):
        mode.add_argument(f"--{name}", action="store_true")
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    hard = write_problems()
    if args.prepare:
        for slip in RARE:
            build_base(rare_base(slip))
            write_traces(slip, hard)
        return
    if args.tune:
        tune(args.jobs)
        return
    if not args.render:
        if missing := set(RARE_TUNED) - RARE_LEARNING_RATES.keys():
            sys.exit(f"rarity.py: error: {len(missing)} arms have no learning rate: run --tune, and enter what it prints in experiments.py")
        run_all([(arm, seed, RESULTS) for seed in args.seeds for arm in RARE_ARMS], args.jobs)
    render()


if __name__ == "__main__":
    main()
