"""What docs/build.py reads in the scripts: the diff between two of them, numbered tags, paper tags and the lines that carry a tag."""

import ast
import difflib
import functools
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
VARIANTS = {"luffy": "LUFFY", "repo": "RePO", "prefixrl": "PrefixRL", "sft": "SFT"}  # script -> name in its numbered tags
FORKS = {"repo_frozen": "repo", "repo_overlap": "repo", "gspo": "grpo"}  # script of examples/ -> its parent
SIBLINGS = {"dapo": "grpo", "chord": "grpo", "opsd": "grpo", "adaprefix": "prefixrl"}  # methods of examples/ -> their parents
APART, CONTEXT = 4, 2  # fewer unchanged lines than APART between two changes: one hunk; twice CONTEXT, so that none is shown twice
NUMBERED = re.compile(r"#.*?\b(\w+)\((\d+)/(\d+)\)(?:: (.+))?")  # name, i, n, text or nothing
PAPER = re.compile(r"\[(CHOICE |DEVIATES )?((?:Dr\. )?[A-Z]\w+)((?: [\w.]+)*)(?:, arXiv [\w.]+)?\]")  # kind, name, place
MOST_LINES, GAP = 10, 3  # of code beside an equation; as few lines between two tagged ones are shown, too


@dataclass
class Hunk:
    """One place where a variant differs: its lines as in `diff -U2`, and the numbered tags of the added ones."""

    header: str  # "@@ -129,4 +158,14 policy_loss"
    line: int  # of the variant, the first one changed
    lines: list[str]
    tags: list[tuple[str, int, int, str]]  # (name, i, n, text)

    def changed(self, sign):
        """The added ("+") or removed ("-") lines."""
        return [line[1:] for line in self.lines if line[0] == sign]


def path_of(name):
    """The file of a script, which may lie in examples/."""
    return ROOT / "examples" / f"{name}.py" if name in FORKS | SIBLINGS else ROOT / f"{name}.py"


@functools.cache
def script(name):
    """Source of a script."""
    return path_of(name).read_text()


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


@functools.cache
def hunks_of(name):
    """The Hunks of a variant against grpo.py."""
    return hunks(script("grpo"), script(name))


def counts(name):
    """(added, removed) lines of a variant outside the docstring."""
    return tuple(sum(len(hunk.changed(sign)) for hunk in hunks_of(name)) for sign in "+-")


def caption(hunk):
    """Numbered tags and their text, or else the place; then the paper tags of the hunk's added lines."""
    told = [f"{name}({i}/{n}): {PAPER.sub('', text).strip()}".removesuffix(": ") for name, i, n, text in hunk.tags]
    place = hunk.header.split("@@")[2].strip() or "imports"
    return " ".join([" · ".join(told) or place, *paper_tags("\n".join(hunk.changed("+")))])


def paper_tags(text):
    """Tags such as [GRPO eq 3] and [CHOICE GRPO] in a text, each once, in order."""
    return list(dict.fromkeys(match[0] for match in PAPER.finditer(text) if match[1] or match[3]))


def own_tags(text, inherited=""):
    """(what a paper says, choices and deviations): the tags of a script that the script it varies does not have."""
    tags = [tag for tag in paper_tags(text) if tag not in paper_tags(inherited) and "arXiv" not in tag]
    left_open = [tag for tag in tags if tag.startswith(("[CHOICE", "[DEVIATES"))]
    return [tag for tag in tags if tag not in left_open], left_open


def tags_of(name):
    """`own_tags` of a script against grpo.py."""
    return own_tags(script(name), "" if name == "grpo" else script("grpo"))


def tagged_lines(text, tag):
    """Runs [(first, last), ...] of the lines that compute an equation: what carries its tag, at most ten lines in all.

    A tag at the end of a line stands for the statement, or for the block that the line opens. A tag in a line of comment stands for the
    lines up to the next comment or blank line. A tag in a function's docstring stands for the function, if no other place has the tag.
    """
    lines, start = text.splitlines(), body(text)[1]
    nodes = [*ast.walk(ast.parse(text))]
    ends = {node.lineno: node.end_lineno for node in nodes if isinstance(node, ast.stmt) and not hasattr(node, "body")}
    documented = {(node.body[0].lineno, node.body[0].end_lineno): (node.body[1].lineno, node.body[-1].end_lineno) for node in nodes
                  if isinstance(node, ast.FunctionDef) and ast.get_docstring(node)}
    runs, whole = [], []
    for number, line in enumerate(lines[start:], start + 1):
        if tag not in line:
            continue
        docstring = next((place for place in documented if place[0] <= number <= place[1]), None)
        code = line.split("  #")[0].rstrip()
        if docstring:
            whole.append(documented[docstring])
        elif line.lstrip().startswith("#"):
            runs.append((number, next(i for i in range(number, len(lines)) if not lines[i].strip() or lines[i].lstrip().startswith("#"))))
        elif code.endswith(":"):
            deep = len(line) - len(line.lstrip())
            runs.append((number, next(i for i in range(number, len(lines)) if len(lines[i]) - len(lines[i].lstrip()) <= deep)))
        else:
            runs.append((number, ends.get(number, number)))
    merged = []
    for first, last in sorted(runs or whole):
        if merged and first - merged[-1][1] - 1 <= GAP:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    if sum(last - first + 1 for first, last in merged) > MOST_LINES:
        raise SystemExit(f"{tag} stands for more than {MOST_LINES} lines: {merged}")
    return merged


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


def tests_of(tag):
    """The tests that name a tag, as "file::function", but for those of the pages."""
    return [f"{file}::{function}" for file, function, source in all_tests() if tag in source and file != "test_pages.py"]
