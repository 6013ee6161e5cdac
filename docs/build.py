"""The generated parts of README.md, CONTRIBUTING.md, examples/ and docs/, and docs/html/, the pages of the methods for a browser.

    python docs/build.py     write them; tests/test_diff.py and tests/test_pages.py check that they are current

A generated part stands between `<!-- NAME: made by docs/build.py -->` and `<!-- end of NAME -->`. All other text is written by hand.
"""

import ast
import json
import re
import sys
import textwrap

import source
from equations import CHIEF, EQUATIONS
from source import FORKS, NUMBERED, ROOT, SIBLINGS, VARIANTS, body, caption, counts, hunks, hunks_of, script  # noqa: F401 (for the tests)

TITLES = {"grpo": "GRPO", "repo": "RePO", "luffy": "LUFFY", "prefixrl": "PrefixRL", "sft": "SFT"}
IDEAS = {  # script -> what it does with somebody else's solution
    "grpo": "nothing: it learns from groups of its own samples",
    "repo": "retells it when one of eight samples fails, and learns from the retelling",
    "luffy": "puts it into every group, its tokens weighted by p/(p + γ)",
    "prefixrl": "goes on from its beginning, and trains only what it adds",
    "sft": "imitates it token by token",
}
MEASURED = {  # experiment -> (its task, {number of its summary: title})
    "hard_samples": ("bills", {"hard": "knowledge: hard", "other": "other tasks", "foreign": "foreign words"}),
    "hard_samples_diary": ("diary", {"hard": "skill: hard", "easy": "easy"}),
}
SHOWN = {  # script -> the experiments whose figure and verdict stand on its page
    "grpo": ("hard_samples_diary_bases", "ablations_diary"),
    "repo": ("hard_samples_bases", "stability", "drift"),
    "luffy": ("stability", "ablations_repo"),
    "prefixrl": ("compute", "back_generalisation"),
    "sft": ("hard_samples_bases", "wrong_traces"),
}


def sizes():
    """Markdown: the size of each diff."""
    lines = ["| page | script | hunks | added | removed | changed |", "|---|---|---|---|---|---|"]
    for name, title in VARIANTS.items():
        added, removed = counts(name)
        lines.append(f"| [{title}]({name}.md) | [`{name}.py`](../{name}.py) | {len(hunks_of(name))} "
                     f"| {added} | {removed} | {added + removed} |")
    return "\n".join(lines)


def latex(tag):
    """Markdown: the lines of an equation."""
    return "\n\n".join(f"$$\n{line}\n$$" for line in EQUATIONS[tag][1:])


def cards():
    """Markdown: each method with its chief equation."""
    return "\n\n".join(f"**[{TITLES[name]}]({name}.md).** {EQUATIONS[tag][0]}\n\n{latex(tag)}" for name, tag in CHIEF.items())


def methods():
    """Markdown: what each script does, its size, and its final accuracy in per cent, mean over seeds; of the first base as it is."""
    summaries = {name: json.loads((ROOT / "results" / name / "summary.json").read_text())
                 for experiment in MEASURED for name in (experiment, f"{experiment}_bases")}
    titles = [title for _, columns in MEASURED.values() for title in columns.values()]
    lines = [f"| script | what it does with somebody else's solution | lines changed | {' | '.join(titles)} |",
             "|---" * (3 + len(titles)) + "|"]
    for name in ("base", *IDEAS):
        suffix = ("", "") if name == "base" else ("_bases", "-bases")
        numbers = [f"{summaries[experiment + suffix[0]][f'{task}/{name}{suffix[1]}'][number]['mean']:.0f}"
                   for experiment, (task, columns) in MEASURED.items() for number in columns]
        size = f"[{sum(counts(name))}](docs/{name}.md)" if name in VARIANTS else "–"
        start = "before training | | " if name == "base" else f"[`{name}.py`]({name}.py) | {IDEAS[name]} | {size} "
        lines.append(f"| {start}| {' | '.join(numbers)} |")
    return "\n".join(lines)


def lines_at(name, tag, folder=".."):
    """Markdown: links to the lines of an equation."""
    runs = source.tagged_lines(script(name), tag)
    return ", ".join(f"[{first}–{last}]({folder}/{name}.py#L{first}-L{last})" if last > first else
                     f"[{first}]({folder}/{name}.py#L{first})" for first, last in runs)


def code_of(name, tag):
    """The lines of an equation, as long as they are in the script but for the indentation that they share; … between two runs."""
    lines = script(name).splitlines()
    runs = [lines[first - 1 : last] for first, last in source.tagged_lines(script(name), tag)]
    return "\n…\n".join(textwrap.dedent("\n".join(run)) for run in runs)


def left_open(name):
    """Markdown: the lines where the script chooses and where it differs, by tag."""
    lines = script(name).splitlines()
    places = [f"{tag} " + ", ".join(f"[{i}](../{name}.py#L{i})" for i, line in enumerate(lines, 1) if tag in line)
              for tag in source.tags_of(name)[1]]
    return [f"Lines where the paper is silent or this code differs: {'; '.join(places)}."] if places else []


def equations(name):
    """Markdown: each paper tag of a script with its equation, the lines that compute it, and the tests that name it."""
    parts = []
    for tag in source.tags_of(name)[0]:
        tests = ", ".join(f"`{test}`" for test in source.tests_of(tag))
        parts += [f"### {tag}", EQUATIONS[tag][0], latex(tag), f"```python\n{code_of(name, tag)}\n```",
                  "Lines: " + lines_at(name, tag) + (f". Tests: {tests}." if tests else ".")]
    return "\n\n".join(parts + left_open(name))


def verdicts(name):
    """[(title, experiment, the paragraph of its verdict)] of the experiments on a method's page, from docs/results.md."""
    text, found = (ROOT / "docs" / "results.md").read_text(), []
    for experiment in SHOWN[name]:
        before, after = text.split(f"<!-- {experiment}: made by bench/compare.py -->")
        title = re.findall(r"^## (.+)", before, re.MULTILINE)[-1]
        verdict = next(part for part in after.split("\n\n") if part.startswith(("**Verdict", "**What they say")))
        found.append((title, experiment, re.sub(r"\]\(#", "](results.md#", " ".join(verdict.split()))))
    return found


def results(name):
    """Markdown: the figure and the verdict of each experiment on a method's page."""
    parts = []
    for title, experiment, verdict in verdicts(name):
        wrapped = textwrap.fill(verdict, 110, break_long_words=False, break_on_hyphens=False)
        parts += [f"### {title}", f"![{title}](../results/{experiment}/figure.png)", wrapped]
    return "\n\n".join([*parts, "[The results](results.md) hold the tables, intervals and commands."])


def questions():
    """Markdown: the first line of each test file, which is the question that the file answers."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    rows = [f"| `{path.name}` | {ast.get_docstring(ast.parse(path.read_text())).splitlines()[0]} |" for path in files]
    return "\n".join(["| file | question |", "|---|---|", *rows])


def diff(name):
    """Markdown: every hunk of a variant under its numbered tags."""
    added, removed = counts(name)
    parts = [f"[`{name}.py`](../{name}.py) differs from [`grpo.py`](../grpo.py) in {len(hunks_of(name))} hunks outside the docstring: "
             f"{added} lines added, {removed} removed."]
    for hunk in hunks_of(name):
        parts += [f"### {caption(hunk)}", f"[line {hunk.line}](../{name}.py#L{hunk.line})",
                  "\n".join(["```diff", hunk.header, *hunk.lines, "```"])]
    return "\n\n".join(parts)


def forks():
    """Markdown: each fork of examples/ as a diff against its parent."""
    parts = []
    for name, parent in FORKS.items():
        text = script(name)
        found = hunks(script(parent), text)
        parts += [f"## [`{name}.py`]({name}.py)", ast.get_docstring(ast.parse(text)).split("\n\n")[0],
                  f"{sum(len(hunk.changed(sign)) for hunk in found for sign in '+-')} changed lines of [`{parent}.py`](../{parent}.py):",
                  "\n".join(["```diff", *(line for hunk in found for line in (hunk.header, *hunk.lines)), "```"])]
    return "\n\n".join(parts)


def siblings():
    """Markdown: the size of each sibling's diff against its parent, and the diffs."""
    table, parts = ["| script | parent | hunks | changed |", "|---|---|---|---|"], []
    for name, parent in SIBLINGS.items():
        found = hunks(script(parent), script(name))
        table.append(f"| [`{name}.py`](../examples/{name}.py) | [`{parent}.py`](../{parent}.py) | {len(found)} "
                     f"| {sum(len(hunk.changed(sign)) for hunk in found for sign in '+-')} |")
        parts += [f"<details>\n<summary><code>diff {parent}.py examples/{name}.py</code></summary>",
                  "\n".join(["```diff", *(line for hunk in found for line in (hunk.header, *hunk.lines)), "```"]), "</details>"]
    return "\n\n".join(["\n".join(table), *parts])


def with_blocks(path, blocks):
    """The text of a page with new content between the markers of each block."""
    text = (ROOT / path).read_text()
    for name, content in blocks.items():
        start, end = f"<!-- {name}: made by docs/build.py -->", f"<!-- end of {name} -->"
        before, rest = text.split(start)
        text = f"{before}{start}\n\n{content}\n\n{end}{rest.split(end)[1]}"
    return text


def page(name):
    """The page of one script, in Markdown."""
    blocks = {"equations": equations(name), "results": results(name)}
    return with_blocks(f"docs/{name}.md", blocks | ({"diff": diff(name)} if name in VARIANTS else {}))


def pages():
    """{path relative to the repository: text} of every Markdown page with generated parts."""
    return {"README.md": with_blocks("README.md", {"methods": methods()}),
            "CONTRIBUTING.md": with_blocks("CONTRIBUTING.md", {"questions": questions()}),
            "examples/README.md": with_blocks("examples/README.md", {"forks": forks()}),
            "docs/siblings.md": with_blocks("docs/siblings.md", {"siblings": siblings()}),
            "docs/README.md": with_blocks("docs/README.md", {"cards": cards(), "sizes": sizes()})
            } | {f"docs/{name}.md": page(name) for name in IDEAS}


def main():
    for path, text in pages().items():
        (ROOT / path).write_text(text)
        print(path)
    try:
        import web
    except ModuleNotFoundError as error:
        sys.exit(f"docs/html/ needs {error.name.split('.')[0]}: pip install -r requirements-dev.txt")
    for path, text in web.pages().items():
        (ROOT / path).write_text(text)
        print(path)


if __name__ == "__main__":
    main()
