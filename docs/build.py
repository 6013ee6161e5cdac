"""The generated parts of README.md, CONTRIBUTING.md, examples/ and docs/: methods, equations with lines and tests, diffs.

    python docs/build.py     write these parts anew; tests/test_diff.py checks that they are current

A generated part stands between `<!-- NAME: made by docs/build.py -->` and `<!-- end of NAME -->`. All other text is written by hand.
"""

import ast
import difflib
import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
VARIANTS = {"luffy": "LUFFY", "repo": "RePO", "prefixrl": "PrefixRL", "sft": "SFT"}  # script -> name in its numbered tags
FORKS = {"repo_frozen": "repo", "gspo": "grpo"}  # script of examples/ -> its parent
APART, CONTEXT = 4, 2  # fewer unchanged lines than APART between two changes: one hunk; twice CONTEXT, so that none is shown twice
IDEAS = {  # script -> what it does with somebody else's solution
    "grpo": "nothing: it learns from groups of its own samples",
    "repo": "retells it when a group fails, and learns from the retelling",
    "luffy": "puts it into every group, its tokens weighted by p/(p + γ)",
    "prefixrl": "goes on from its beginning, and trains only what it adds",
    "sft": "imitates it token by token",
}
MEASURED = {  # experiment -> (its task, {number of its summary: title})
    "hard_samples": ("bills", {"hard": "knowledge: hard", "other": "other tasks", "foreign": "foreign words"}),
    "hard_samples_diary": ("diary", {"hard": "skill: hard", "easy": "easy"}),
}
NUMBERED = re.compile(r"#.*?\b(\w+)\((\d+)/(\d+)\)(?:: (.+))?")  # name, i, n, text or nothing
PAPER = re.compile(r"\[(CHOICE |DEVIATES )?((?:Dr\. )?[A-Z]\w+)((?: [\w.]+)*)(?:, arXiv [\w.]+)?\]")  # kind, name, place


@dataclass
class Hunk:
    """One place where a variant differs: its lines as in `diff -U2`, and the numbered tags of the added ones."""

    header: str  # "@@ -129,4 +158,14 @@ policy_loss"
    line: int  # of the variant, the first one changed
    lines: list[str]
    tags: list[tuple[str, int, int, str]]  # (name, i, n, text)

    def changed(self, sign):
        """The added ("+") or removed ("-") lines."""
        return [line[1:] for line in self.lines if line[0] == sign]


def script(name):
    """Source of a script."""
    return (ROOT / f"{name}.py").read_text()


def body(text):
    """(lines after the module docstring, number of lines up to its end)."""
    end = ast.parse(text).body[0].end_lineno
    return text.splitlines()[end:], end


def enclosing(text, line):
    """Name of the top-level function or class that holds a line, or ""."""
    return next((node.name for node in ast.parse(text).body if hasattr(node, "name") and node.lineno <= line <= node.end_lineno), "")


def hunks(base, variant):
    """The diff between two sources outside their module docstrings, as a list of Hunks in order."""
    (old, old_start), (new, new_start) = body(base), body(variant)
    groups = []
    for kind, *span in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind != "equal":
            if not groups or span[0] - groups[-1][-1][1] >= APART:
                groups.append([])
            groups[-1].append(span)
    found = []
    for spans in groups:
        before, line = min(CONTEXT, spans[0][0]), new_start + spans[0][2] + 1
        place, lines = spans[0][0] - before, []
        for old_from, old_to, new_from, new_to in spans:
            lines += [" " + line for line in old[place:old_from]]
            lines += ["-" + line for line in old[old_from:old_to]] + ["+" + line for line in new[new_from:new_to]]
            place = old_to
        lines += [" " + line for line in old[place : place + CONTEXT]]
        old_size, new_size = (sum(line[0] != sign for line in lines) for sign in "+-")
        header = f"@@ -{old_start + spans[0][0] - before + 1},{old_size} +{line - before},{new_size} @@ {enclosing(variant, line)}"
        tags = [NUMBERED.search(line) for line in lines if line[0] == "+"]
        found.append(Hunk(header.rstrip(), line, lines, [(tag[1], int(tag[2]), int(tag[3]), tag[4] or "") for tag in tags if tag]))
    return found


def paper_tags(text):
    """Tags such as [GRPO eq 3] and [CHOICE GRPO] in a text, each once, in order."""
    return list(dict.fromkeys(match[0] for match in PAPER.finditer(text) if match[1] or match[3]))


def equations(docstring):
    """The paragraphs of a module docstring that are indented by four and hold a paper tag."""
    paragraphs = [part.splitlines() for part in docstring.split("\n\n")]
    return ["\n".join(lines) for lines in paragraphs if all(line.startswith("    ") for line in lines) and paper_tags("".join(lines))]


def caption(hunk):
    """Numbered tags and their text, or else the place; then the paper tags of the hunk's added lines."""
    told = [f"{name}({i}/{n}): {PAPER.sub('', text).strip()}".removesuffix(": ") for name, i, n, text in hunk.tags]
    place = hunk.header.split("@@")[2].strip() or "imports"
    return " ".join([" · ".join(told) or place, *paper_tags("\n".join(hunk.changed("+")))])


def counts(name):
    """(added, removed) lines of a variant outside the docstring."""
    found = hunks(script("grpo"), script(name))
    return tuple(sum(len(hunk.changed(sign)) for hunk in found) for sign in "+-")


def sizes():
    """Markdown: the size of each diff."""
    lines = ["| page | script | places | added | removed | changed |", "|---|---|---|---|---|---|"]
    for name, title in VARIANTS.items():
        added, removed = counts(name)
        lines.append(f"| [{title}]({name}.md) | [`{name}.py`](../{name}.py) | {len(hunks(script('grpo'), script(name)))} "
                     f"| {added} | {removed} | {added + removed} |")
    return "\n".join(lines)


def methods():
    """Markdown: what each script does, its size, and its final accuracy in per cent, mean over seeds."""
    summaries = {name: json.loads((ROOT / "results" / name / "summary.json").read_text()) for name in MEASURED}
    titles = [title for _, columns in MEASURED.values() for title in columns.values()]
    lines = [f"| script | what it does with somebody else's solution | lines changed | {' | '.join(titles)} |",
             "|---" * (3 + len(titles)) + "|"]
    for name in ("base", *IDEAS):
        numbers = [f"{summaries[experiment][f'{task}/{name}'][number]['mean']:.0f}"
                   for experiment, (task, columns) in MEASURED.items() for number in columns]
        size = f"[{sum(counts(name))}](docs/{name}.md)" if name in VARIANTS else "–"
        start = "before training | | " if name == "base" else f"[`{name}.py`]({name}.py) | {IDEAS[name]} | {size} "
        lines.append(f"| {start}| {' | '.join(numbers)} |")
    return "\n".join(lines)


@functools.cache
def all_tests():
    """[(file, function, its source)] of all tests, by file."""
    found = []
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        text = path.read_text()
        lines = text.splitlines()
        found += [(path.name, node.name, "\n".join(lines[node.lineno - 1 : node.end_lineno])) for node in ast.parse(text).body
                  if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    return found


def code_map(name):
    """Markdown: a script's paper tags with the lines that carry each tag and the tests that name it. A variant: only tags of its own."""
    lines, start = body(script(name))
    inherited = [] if name == "grpo" else paper_tags(script("grpo"))
    rows = ["| equation | lines | tests |", "|---|---|---|"]
    for tag in paper_tags(script(name)):
        if tag in inherited or tag.startswith(("[CHOICE", "[DEVIATES")) or "arXiv" in tag:  # only what a paper says, each tag once
            continue
        places = [f"[{i}](../{name}.py#L{i})" for i, line in enumerate(lines, start + 1) if tag in line]
        tests = [f"`{file}::{function}`" for file, function, source in all_tests() if tag in source]
        rows.append(f"| {tag} | {', '.join(places) or '–'} | {', '.join(tests) or '–'} |")
    return "\n".join(rows)


def questions():
    """Markdown: the first line of each test file, which is the question that the file answers."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    rows = [f"| `{path.name}` | {ast.get_docstring(ast.parse(path.read_text())).splitlines()[0]} |" for path in files]
    return "\n".join(["| file | question |", "|---|---|", *rows])


def diff(name):
    """Markdown: every hunk of a variant under its numbered tags."""
    added, removed = counts(name)
    found = hunks(script("grpo"), script(name))
    parts = [f"[`{name}.py`](../{name}.py) differs from [`grpo.py`](../grpo.py) in {len(found)} places outside the docstring: "
             f"{added} lines added, {removed} removed."]
    for hunk in found:
        parts += [f"### {caption(hunk)}", f"[line {hunk.line}](../{name}.py#L{hunk.line})",
                  "\n".join(["```diff", hunk.header, *hunk.lines, "```"])]
    return "\n\n".join(parts)


def forks():
    """Markdown: each fork of examples/ as a diff against its parent."""
    parts = []
    for name, parent in FORKS.items():
        text = (ROOT / "examples" / f"{name}.py").read_text()
        found = hunks(script(parent), text)
        parts += [f"## [`{name}.py`]({name}.py)", ast.get_docstring(ast.parse(text)).split("\n\n")[0],
                  f"{sum(len(hunk.changed(sign)) for hunk in found for sign in '+-')} changed lines of [`{parent}.py`](../{parent}.py):",
                  "\n".join(["```diff", *(line for hunk in found for line in (hunk.header, *hunk.lines)), "```"])]
    return "\n\n".join(parts)


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
    blocks = {"equations": "\n\n".join(equations(ast.get_docstring(ast.parse(script(name)), clean=False))), "code": code_map(name)}
    return with_blocks(f"docs/{name}.md", blocks | ({"diff": diff(name)} if name in VARIANTS else {}))


def pages():
    """{path relative to the repository: text} of every page with generated parts."""
    return {"README.md": with_blocks("README.md", {"methods": methods()}),
            "CONTRIBUTING.md": with_blocks("CONTRIBUTING.md", {"questions": questions()}),
            "examples/README.md": with_blocks("examples/README.md", {"forks": forks()}),
            "docs/README.md": with_blocks("docs/README.md", {"sizes": sizes()})} | {f"docs/{name}.md": page(name) for name in IDEAS}


def main():
    for path, text in pages().items():
        (ROOT / path).write_text(text)
        print(path)


if __name__ == "__main__":
    main()
