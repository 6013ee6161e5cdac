"""report.html of a run folder: curves, changed flags, FLOPs and rollouts in one file that asks no network for anything.

    python -m engine.report RUN_DIR                         at any time, also while the run goes on
    python -m engine.report RUN_DIR RUN_DIR --output_file compare.html    curves of several runs together

Whatever comes from a file passes `text`, which is the one place where it is escaped. What is too long is cut, with a count.
"""

import argparse
import base64
import hashlib
import html
import math
import re
import sys
from collections import Counter, defaultdict, namedtuple
from pathlib import Path

from .errors import BadArgument, RunError, printable
from .files import read_record, write_atomically
from .flags import changed_flags
from .rollouts import groups_of, read_rollouts, rollout_files
from .run_folder import read_metrics

ROOM = 3_500_000  # bytes of rollouts in a page
MOST = {"runs": 8, "charts": 300, "points": 500, "flags": 300, "steps": 40, "groups": 64, "rows": 64, "characters": 4000, "tokens": 1000}
LEVELS = (0.9, 0.5, 0.2, 0.05)  # probabilities that bound the five shades of a token


class Html(str):
    """Text that is markup already; `element` makes it."""


def text(value):
    """Any text as ASCII markup that shows it: control characters, marks of direction and lone surrogates as \\x.., nothing is obeyed."""
    value = str(value)
    if not value.isprintable():
        value = "\n".join(printable(line) for line in value.split("\n"))
    return Html(html.escape(value).encode("ascii", "xmlcharrefreplace").decode())


def element(name, *content, **attributes):
    """An element; content and attributes that are not Html are escaped. `class_` is the attribute class."""
    words = "".join(f' {key.rstrip("_").replace("_", "-")}="{text(value)}"' for key, value in attributes.items() if value is not None)
    return Html(f"<{name}{words}>{''.join(part if type(part) is Html else text(part) for part in content)}</{name}>")


def cut(value, most):
    """A text of at most `most` characters, and the count of the others."""
    value = str(value)
    more = element("span", f" … {len(value) - most:,} more characters", class_="more")
    return Html(text(value[:most]) + more) if len(value) > most else text(value)


def left_out(count, what):
    """How many more there are of what is shown, as markup."""
    return element("p", f"{count:,} more {what} are left out here", class_="more") if count > 0 else Html("")


def number(value, digits=3):
    return "–" if value is None else f"{value:.{digits}g}"


Folder = namedtuple("Folder", "name record metrics completions")  # of a run; completions: [(step, path)]


def read_folder(path):
    """A run folder. Raises BadArgument, which names the file, where one is damaged."""
    record = read_record(path / "args.json", {"script": "a text", "args": {}})
    return Folder(path.resolve().name, record, read_metrics(path), rollout_files(path))


# ---------------------------------------------------------------- curves


def series(folder, key):
    """[(step, value, standard error or None)] of a metric, without nulls."""
    return [(line["step"], float(line[key]), line.get(f"{key}_se")) for line in folder.metrics if line.get(key) is not None]


def chart(lines, whole):
    """A picture of some [(step, value, error)], a colour each. whole: the axis is that of a share, 0 to 1."""
    points = [point for line in lines for point in line]
    ends = [value + sign * (error or 0) for _, value, error in points for sign in (-1, 1)]
    low, high = (0.0, 1.0) if whole and min(ends) > -0.2 and max(ends) < 1.2 else (min(ends), max(ends))
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-9):
        low, high = low - (abs(low) / 2 or 1), high + (abs(high) / 2 or 1)
    first, last = min(point[0] for point in points), max(point[0] for point in points)

    def place(step, value):
        share = (value - low) / (high - low)
        return f"{52 + 260 * (step - first) / max(1, last - first):.1f}", f"{132 - 122 * min(1.05, max(-0.05, share)):.1f}"

    drawn = [element("path", d="M52 10V132H312M52 71H312M52 10H312", class_="axis")]
    for y, value in ((14, high), (75, low + (high - low) / 2), (136, low)):
        drawn.append(element("text", number(value, 3 if 0.01 <= abs(value) < 1000 else 2), x=48, y=y, text_anchor="end"))
    for x, step, anchor in ((52, first, "start"), (312, last, "end")):
        drawn.append(element("text", f"step {step}" if step == first else step, x=x, y=150, text_anchor=anchor))
    for colour, line in enumerate(lines):
        every = max(1, math.ceil(len(line) / MOST["points"]))  # the caption says so
        line = line[::every] + (line[-1:] if line and (len(line) - 1) % every else [])
        dots = [place(step, value) for step, value, _ in line]
        bars = "".join(f"M{x} {place(step, value - error)[1]}V{place(step, value + error)[1]}"
                       for (step, value, error), (x, _) in zip(line, dots) if error)
        drawn.append(element("g", element("polyline", points=" ".join(map(",".join, dots)), data_steps=" ".join(str(p[0]) for p in line),
                                          data_values=" ".join(number(p[1], 4) for p in line)),
                             *([element("path", d=bars, class_="error")] if bars else []),
                             *([element("circle", cx=x, cy=y, r=2.2) for x, y in dots] if len(dots) <= 40 else []), class_=f"c{colour}"))
    return element("svg", *drawn, viewBox="0 0 320 156", role="img")


def caption(lines):
    """What a chart of one run ends with; of evaluations, where it began, too. Where points are left out, how many."""
    (line, *_), most = lines, max(map(len, lines))
    (_, before, _), (_, after, error) = (line[0], line[-1]) if line else ((0, None, None),) * 2
    words = [f"{number(before)} → {number(after)} ± {number(error, 2)}" if error is not None else number(after)] * (len(lines) == 1)
    return ", ".join(words + [f"every {math.ceil(most / MOST['points'])}th of {most:,} points"] * (most > MOST["points"]))


def curves(folders):
    """Every metric of the runs, a chart each, grouped by the first part of its name."""
    keys = dict.fromkeys(key for folder in folders for line in folder.metrics for key in line if key != "step")
    keys = [key for key in keys if not (key.endswith("_se") and key[:-3] in keys)]
    order = sorted(keys, key=lambda key: (not key.startswith("eval/"), "/avg@" not in key, key != "reward"))
    drawn = {key: lines for key in order if any(lines := [series(folder, key) for folder in folders])}
    groups = defaultdict(list)
    for key, lines in list(drawn.items())[: MOST["charts"]]:
        stage, name = key.split("/", 1) if "/" in key else ("training", key)
        groups[stage].append(element("figure", element("figcaption", cut(name, 100), element("output", caption(lines))),
                                     chart(lines, stage in ("eval", "reward") or key == "reward")))
    parts = [Html(element("h3", cut(stage, 100)) + element("div", *figures, class_="grid")) for stage, figures in groups.items()]
    legend = [element("span", "● ", cut(folder.name, 100), "  ", class_=f"key c{i}") for i, folder in enumerate(folders)]
    return element("section", element("h2", "Curves"), *([element("p", *legend)] if len(folders) > 1 else []),
                   *(parts or ["no step is logged yet"]), left_out(len(drawn) - MOST["charts"], "metrics"))


# ---------------------------------------------------------------- tables


def table(head, rows):
    lines = [[element("th", name) for name in head], *([element("td", cell) for cell in row] for row in rows)]
    return element("table", *(element("tr", *cells) for cells in lines))


def costs(folder):
    """FLOPs by phase."""
    latest = folder.metrics[-1] if folder.metrics else {}
    spent = {key: float(value) for key, value in latest.items() if re.fullmatch(r"flops/(?!total$|paper$).+", key) and (value or 0) > 0}
    total = sum(spent.values()) or 1
    rows = [(cut(key.removeprefix("flops/"), 60), f"{value:.3g}", f"{value / total:.0%}",
             element("svg", element("rect", width=f"{100 * value / total:.1f}", height=6), viewBox="0 0 100 6", class_="bar c0"))
            for key, value in list(spent.items())[:50]]
    return table(("phase", "FLOPs", "share", ""), rows) if rows else element("p", "nothing is charged yet")


def about(folder):
    """Name, progress, changed flags and costs of a run."""
    args, step = folder.record["args"], folder.metrics[-1]["step"] if folder.metrics else 0
    facts = [f"{folder.record['script']}, step {step} of {args.get('max_steps')}", f"model {args.get('model_name_or_path')}", "data "
             f"{args.get('dataset_name') or args.get('task')}", f"seed {args.get('seed')}", f"commit {folder.record.get('git_commit')}"]
    flags = changed_flags(folder.record)
    shown = [(cut(name, 80), cut(value, 300), cut(default, 300)) for name, value, default in flags[: MOST["flags"]]]
    changed = table(("flag", "value", "default"), shown) if shown else element("p", "all flags have their defaults")
    return element("section", element("h1", cut(folder.name, 200)), element("p", cut(" · ".join(facts), 1000), class_="muted"), element(
        "div", element("div", element("h3", "Flags that differ from the defaults"), changed, left_out(len(flags) - len(shown), "flags")),
        element("div", element("h3", "FLOPs by phase"), costs(folder)), class_="pair"))


# ---------------------------------------------------------------- rollouts


def tokens(line, gamma):
    """The tokens of a completion, shaded by log-prob; over each token of a trace stands its weight p / (p + gamma), if there is a gamma."""
    spans, sums, weighed = [], [], line["source"] == "trace" and gamma
    for piece, logp in list(zip(line["tokens"], line["logps"]))[: MOST["tokens"]]:
        prob = math.exp(min(0.0, logp)) if logp is not None else 1.0
        style = {"class_": f"p{sum(prob < level for level in LEVELS)}", "title": number(logp)}
        if weighed:
            sums.append(prob / (prob + gamma))
            spans.append(element("ruby", cut(piece or "◦", 200), element("rt", f"{sums[-1]:.2f}"), **style))
        else:
            spans.append(element("i", cut(piece or "◦", 200), **style))
    known = [value for value in line["logps"] if value is not None]
    words = f"tokens by log-prob: {len(line['tokens'])} tokens, mean {number(sum(known) / max(1, len(known)))} nats"
    words += f", mean weight p/(p+{number(gamma)}) = {sum(sums) / len(sums):.2f}" if sums else ""
    rest = len(line["tokens"]) - MOST["tokens"]
    return element("details", element("summary", words), element("div", *spans, class_="text"), left_out(rest, "tokens"), class_="tokens")


def marked(value, other):
    """A text in which the words that stand in `other`, too, are marked."""
    known, most = set(other.split()), MOST["characters"]
    words = [element("mark", word) if word in known else word for word in re.split(r"(\s+)", value[:most])]
    return element("div", *words, left_out(len(value) - most, "characters"), class_="text", dir="auto")


def row(line, count, gamma):
    """One completion, or `count` equal ones."""
    advantage, own = line["advantage"] or 0.0, line["completion"]
    level = "" if not advantage else f" {'up' if advantage > 0 else 'down'}{2 if abs(advantage) >= 1 else 1}"
    facts = [element("b", "no advantage" if line["advantage"] is None else f"advantage {advantage:+.3g}")]
    facts += [f"reward {number(line['reward'])}"] + [element("b", "cut off")] * (not line["ended"]) + [f"{count} × the same"] * (count > 1)
    facts = [part for fact in facts for part in (" · ", fact)][1:]
    if line["source"] != "rollout":
        facts += [" ", element("span", cut(line["source"], 40), class_="source")]
    if line["trace"]:
        body = element("div", element("div", element("h3", "trained on"), marked(own, line["trace"])),
                       element("div", element("h3", "the trace that it retells"), marked(line["trace"], own)), class_="pair")
    else:
        prefix = line["prefix"] if own.startswith(line["prefix"]) else ""
        given = [element("span", cut(prefix, MOST["characters"]), class_="prefix", title="given, not trained")] if prefix else []
        body = element("div", *given, cut(own[len(prefix) :], MOST["characters"]), class_="text", dir="auto")
    shaded = [tokens(line, gamma)] if line["logps"] else []
    return element("div", element("div", *facts, class_="facts"), body, *shaded, class_=f"row{level}")


def group(rows, gamma, is_open):
    """A prompt and its completions, sorted by advantage; equal ones are shown once."""
    rows, prompt, answer = sorted(rows, key=lambda line: -(line["advantage"] or 0.0)), rows[0]["prompt"], rows[0].get("answer")
    chips = [element("span", number(line["reward"])) for line in rows[:16]] + ["…"] * (len(rows) > 16)
    keys = [tuple(str(line[name]) for name in ("completion", "reward", "advantage", "source", "ended")) for line in rows]
    counts, first = Counter(keys), {key: line for key, line in reversed(list(zip(keys, rows)))}
    shown = list(counts)[: MOST["rows"]]
    return element("details", element("summary", element("span", *chips, class_="chips"), element("span", cut(prompt, 140))),
                   *([element("div", cut(prompt, MOST["characters"]), class_="text muted", dir="auto")] if len(prompt) > 140 else []),
                   *([element("p", "right answer: ", cut(answer, 200), class_="muted")] if answer is not None else []),
                   *(row(first[key], counts[key], gamma) for key in shown), left_out(len(counts) - len(shown), "completions"),
                   class_="group", **({"open": ""} if is_open else {}))


def rollouts(folder, room):
    """The rollouts of a run, the latest step first, then its first, then those between; at most `room` bytes."""
    args, files, parts, size = folder.record["args"], folder.completions, {}, 0
    group_size = args.get("num_generations") if type(args.get("num_generations")) is int else 1
    gamma = args.get("shaping_gamma") if args.get("shaping") == "shaped" else 0
    gamma = gamma if type(gamma) in (int, float) and 0 < gamma < 1e300 else 0
    every = max(1, math.ceil(len(files) / MOST["steps"]))
    for step, path in [file for file in dict.fromkeys([*files[-1:], *files[:1], *files[::-every]])]:
        groups = groups_of(read_rollouts(path), max(1, group_size))
        made, rewards = [], [row["reward"] for rows in groups for row in rows if row["reward"] is not None]
        for rows in groups[: MOST["groups"]]:
            one = group(rows, gamma, is_open=not parts and not made)
            size += len(one)
            if size > room:
                break
            made.append(one)
        if groups and not made:
            break
        signal = sum(any(row["advantage"] for row in rows) for rows in groups)
        words = f"step {step}: mean reward {number(sum(rewards) / max(1, len(rewards)))}, {signal} of {len(groups)} groups with a signal"
        parts[step] = element("details", element("summary", words), *made, left_out(len(groups) - len(made), "groups"),
                              class_="step", **({} if parts else {"open": ""}))
    note = ("Of each group: its rewards, and its completions by advantage. Green is reinforced, red is weakened. Groups with a signal "
            "stand first. Log-probs are those of the policy after the step, at the sampling temperature: the darker, the less likely.")
    return element("section", element("h2", "Rollouts of ", cut(folder.name, 100)), element("p", note, class_="muted"),
                   element("button", "open or close all tokens", hidden="", type="button"),
                   *(parts[step] for step in sorted(parts, reverse=True)), left_out(len(files) - len(parts), "steps of completions/"))


# ---------------------------------------------------------------- the page


def page(folders):
    """The page of some run folders as one text."""
    shown = folders[: MOST["runs"]]
    content = [*map(about, shown), left_out(len(folders) - len(shown), "runs"), curves(shown),
               *(rollouts(folder, ROOM // len(shown)) for folder in shown)]
    template = Path(__file__).with_suffix(".html").read_text()
    policy = "default-src 'none'; base-uri 'none'; form-action 'none'"
    for name in ("style", "script"):
        code = re.search(f"<{name}>(.*?)</{name}>", template, re.DOTALL)[1].encode()
        policy += f"; {name}-src 'sha256-{base64.b64encode(hashlib.sha256(code).digest()).decode()}'"
    filled = {"(policy)": policy, "(title)": cut(", ".join(folder.name for folder in shown), 200), "(content)": "\n".join(content)}
    return re.sub(r"\((policy|title|content)\)", lambda place: filled[place[0]], template)


def write_report(paths, file=None):
    """Write report.html into the first of some run folders, or another file; returns its path."""
    folders = [read_folder(Path(path)) for path in paths]
    write_atomically(file := Path(file or Path(paths[0], "report.html")), page(folders))
    return file


def main():
    parser = argparse.ArgumentParser(prog="python -m engine.report", description="Write report.html of a run folder.", allow_abbrev=False)
    parser.add_argument("run_dir", nargs="+", help="Run folder; the curves of several are drawn together")
    parser.add_argument("--output_file", help="Fresh file to write; default: report.html in the first run folder")
    args = parser.parse_args()
    try:
        if args.output_file and Path(args.output_file).exists():
            raise BadArgument(f"--output_file {args.output_file} exists already")
        print(f"wrote {printable(str(write_report(args.run_dir, args.output_file)))}")
    except (BadArgument, RunError, OSError) as error:
        print(f"report: error: {printable(str(error))}", file=sys.stderr)
        sys.exit(2 if isinstance(error, BadArgument) else 1)


if __name__ == "__main__":
    main()
