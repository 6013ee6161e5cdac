"""Writes the tables of experiments, tuning and tries, and the parts of docs/results.md and README.md that compare.py makes."""

import numpy as np

from experiments import EXPERIMENTS, RATES, SHORT, SIBLINGS, TRIES
from measure import ROOT
from run_numbers import NUMBERS, chosen, commands_of, differences, folders_of, seeds_of, tuning

PAGES = ("README.md", "docs/results.md", "docs/which.md")


def cell(number, digits):
    """mean [low, high]"""
    if number["mean"] is None:
        return "–"
    mean, low, high = (f"{number[part]:z.{digits}f}" for part in ("mean", "low", "high"))
    return mean if low == high else f"{mean} [{low}, {high}]"


def table(summary, columns):
    """Markdown: a line per arm, mean and 95 % interval over seeds."""
    lines = [f"| | seeds | {' | '.join(NUMBERS[name][0] for name in columns)} |", "|---" * (len(columns) + 2) + "|"]
    lines += [f"| {row['title']} | {row['seeds']} | {' | '.join(cell(row[name], NUMBERS[name][1]) for name in columns)} |"
              for row in summary.values()]
    return "\n".join(lines)


def comparison(summary, arm, columns=("hard", "easy", "other")):
    """Markdown: by how many points an arm is better than each other one, seed by seed, and the probability that it is."""
    lines = [f"| {summary[arm]['title']} against | " + " | ".join(
        f"{NUMBERS[name][0].removesuffix(', %')}, points | P({name} better), %" for name in columns) + " |",
        "|---" * (2 * len(columns) + 1) + "|"]
    for other in (each for each in summary if each != arm and summary[each]["seeds"] == summary[arm]["seeds"]):
        cells = []
        for name in columns:
            points, better = differences(summary[arm][name]["values"], summary[other][name]["values"])
            cells += [cell(points, 0), cell({part: 100 * better[part] for part in ("mean", "low", "high")}, 0)]
        lines.append(f"| {summary[other]['title']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def block(name, summary):
    """Markdown of an experiment: hypothesis, table, figure, commands of the first seed."""
    commands = [command for arm in summary for command in commands_of(next(iter(folders_of(arm).values())))]
    folded = ["<details>", f"<summary><code>python bench/compare.py {name}</code></summary>", "", *(f"    {each}" for each in commands), "",
              "</details>"]
    compared = [comparison(summary, EXPERIMENTS[name].against)] if EXPERIMENTS[name].against else []
    return "\n\n".join([f"*Hypothesis:* {EXPERIMENTS[name].hypothesis}", table(summary, EXPERIMENTS[name].columns), *compared,
                        f"![{EXPERIMENTS[name].title}](../results/{name}/figure.png)", "\n".join(folded)])


METHODS = {method: title for method, title in SHORT.items() if method != "repo-raw"} | SIBLINGS
CASES = {  # column of docs/which.md -> (number, its arms by method; the first that has runs counts)
    "facts": ("hard", ("bills/{}-bases", "bills/{}")),
    "facts, traces in own style": ("hard", ("bills/{}-own-bases", "bills/{}-own")),
    "facts, 30 % of the traces wrong": ("hard", ("bills/{}-wrong30",)),
    "kept after facts: other tasks": ("other", ("bills/{}-bases", "bills/{}")),
    "a skill": ("hard", ("diary/{}-bases", "diary/{}")),
    "kept after a skill: easy": ("easy", ("diary/{}-bases", "diary/{}")),
    "TFLOP to 50 % of a skill, three traces charged": (
        "tflop_to_50", ("diary/{}-few-once", "diary/{}-few", "diary/{}-fast")),  # GRPO needs none
}


def cases_table(summaries):
    """Markdown: a line per method, a column per case, and below them the experiments that have the numbers."""
    found, sources = {}, {}
    for case, (number, arms) in CASES.items():
        for method in METHODS:
            places = [(name, arm.format(method)) for arm in arms for name in summaries if arm.format(method) in summaries[name]]
            if places:
                name, arm = places[0]
                found[method, case] = cell(summaries[name][arm][number], NUMBERS[number][1])
                sources.setdefault(case, {})[name] = None
    lines = [f"| | {' | '.join(CASES)} |", "|---" * (len(CASES) + 1) + "|"]
    lines += [f"| {title} | {' | '.join(found.get((method, case), 'not known') for case in CASES)} |" for method, title in METHODS.items()]
    commands = [" ".join(f"`{name}`" for name in sources.get(case, ())) for case in CASES]
    return "\n".join([*lines, f"| `python bench/compare.py` | {' | '.join(commands)} |"])


def tuning_table():
    """Markdown: accuracy on hard problems of the tuning runs by arm and rate, the chosen rate in bold."""
    found = tuning()
    picked = chosen(found)
    lines = [f"| | {' | '.join(f'{rate:g}' for rate in RATES)} |", "|---" * (len(RATES) + 1) + "|"]
    for arm, rates in found.items():
        cells = [f"**{rates[rate]:.0f}**" if rate == picked[arm] else f"{rates[rate]:.0f}" for rate in RATES]
        lines.append(f"| `{arm}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def tries_table():
    """Markdown: a line per try with its cost and its outcome."""
    lines = ["| | of that for traces, TFLOP | TFLOP to 50 % | TFLOP | hard, % |", "|---|---|---|---|---|"]
    for run in (run for arm in TRIES for run in seeds_of(arm)):
        numbers = [NUMBERS[name][2](run) for name in ("tflop_traces", "tflop_to_50", "tflop", "hard")]
        cells = ["–" if np.isnan(number) else f"{number:.{digits}f}" for number, digits in zip(numbers, (2, 2, 2, 0))]
        lines.append(f"| `{commands_of(run.folder)[0].removeprefix('python ')}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def expected_output():
    """Markdown: the evaluations that the README's first command prints; empty without that run."""
    folder = folders_of("bills/repo-default").get(0)
    printed = (folder / "1-repo" / "output.txt").read_text().splitlines() if folder else []
    return "\n".join(f"    {line}" for line in printed if line.startswith("eval/"))


def with_blocks(text, blocks, maker="compare"):
    """`text` with new content between `<!-- NAME: made by bench/MAKER.py -->` and `<!-- end of NAME -->`; other text stays."""
    for name, content in blocks.items():
        start, end = f"<!-- {name}: made by bench/{maker}.py -->", f"<!-- end of {name} -->"
        if start in text:
            before, rest = text.split(start)
            text = f"{before}{start}\n\n{content}\n\n{end}{rest.split(end)[1]}"
    return text


def pages(summaries):
    """{page: its text with the generated parts made anew} from {experiment: its summary} and the runs."""
    blocks = {name: block(name, summary) for name, summary in summaries.items()} | {"tuning": tuning_table(), "tries": tries_table()}
    blocks["cases"] = cases_table(summaries)
    if printed := expected_output():
        blocks["expected output"] = printed
    return {page: with_blocks((ROOT / page).read_text(), blocks) for page in PAGES}
