"""Does the diff between two scripts show only the idea?"""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

import grpo

ROOT = Path(grpo.__file__).parent
spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)
GRPO, SCRIPTS = build.script("grpo"), ("grpo", *build.VARIANTS)
VARIANTS = pytest.mark.parametrize("name", build.VARIANTS)


def complaints(variant, title):
    """What is wrong with the numbered tags of a variant's source, as a list of sentences."""
    found, wrong = build.hunks(GRPO, variant), []
    wrong += [f"{hunk.header} carries no numbered tag" for hunk in found if not hunk.tags]
    tags = [tag[:3] for hunk in found for tag in hunk.tags]
    if tags != [(title, i + 1, len(tags)) for i in range(len(tags))]:
        wrong.append(f"tags are not {title}(1/{len(tags)}) to the last, once and in order: {tags}")
    if len(build.NUMBERED.findall(variant)) != len(tags):
        wrong.append("a numbered tag stands where nothing differs")
    told = re.search(r"^Changes against grpo\.py: (.*?)\n\n", ast.get_docstring(ast.parse(variant)), re.DOTALL | re.MULTILINE)
    numbers = [range(int(first), int(last or first) + 1) for first, last in re.findall(r"\((\d+)(?:-(\d+))?\)", told[1] if told else "")]
    if [i for span in numbers for i in span] != [i + 1 for i in range(len(tags))]:
        wrong.append(f"the docstring's list of changes does not count 1 to {len(tags)}: {[i for span in numbers for i in span]}")
    return wrong


def top_level(text):
    """Names of the functions, classes and constants of a script, in order."""
    tree = ast.parse(text).body
    return [getattr(node, "name", None) or node.targets[0].id for node in tree if hasattr(node, "name") or isinstance(node, ast.Assign)]


@VARIANTS
def test_every_hunk_has_its_numbered_tag_and_the_docstring_lists_them(name):
    assert complaints(build.script(name), build.VARIANTS[name]) == []


@VARIANTS
def test_the_skeleton_keeps_its_names_and_their_order(name):
    """SFT samples nothing, so it has no advantages and scores no rows; every other variant only adds."""
    missing = {"sft": {"group_advantages", "score_rows"}}.get(name, set())
    expected = [function for function in top_level(GRPO) if function not in missing]
    assert [function for function in top_level(build.script(name)) if function in top_level(GRPO)] == expected


def test_no_script_imports_another():
    for path in ROOT.glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        assert not imported & set(SCRIPTS), path.name


def test_the_generated_pages_are_current():
    """`python docs/build.py` writes them; the index holds the size of each diff, where too many lines is a remark, not a failure."""
    for path, text in build.pages().items():
        assert (ROOT / path).read_text() == text, f"{path} is out of date: python docs/build.py"


@VARIANTS
def test_the_hunks_are_the_whole_diff(name):
    """Replacing in grpo.py what each hunk removes by what it adds gives the variant, and every changed line is on its page."""
    lines, variant = build.body(GRPO)[0], build.body(build.script(name))[0]
    offset, start = 0, len(GRPO.splitlines()) - len(lines)
    for hunk in build.hunks(GRPO, build.script(name)):
        first, size = map(int, re.match(r"@@ -(\d+),(\d+) ", hunk.header).groups())
        place = first - 1 - start + offset
        assert lines[place : place + size] == [line[1:] for line in hunk.lines if line[0] != "+"]
        lines[place : place + size] = [line[1:] for line in hunk.lines if line[0] != "-"]
        offset += len(hunk.changed("+")) - len(hunk.changed("-"))
        assert "\n".join(hunk.lines) in build.page(name) and build.script(name).splitlines()[hunk.line - 1] not in hunk.changed("-")
    assert lines == variant


def test_hunks_less_than_four_unchanged_lines_apart_are_one():
    base = '"""Doc."""\n' + "".join(f"x{i} = {i}\n" for i in range(20))
    for apart, expected in ((3, 1), (4, 2)):
        variant = base.replace("x5 = 5", "x5 = 0").replace(f"x{6 + apart} = ", f"x{6 + apart} = -")
        assert len(build.hunks(base, variant)) == expected


@pytest.mark.parametrize("old, new, complaint", [
    ("  # LUFFY(7/11): a teacher", "  # a teacher", "carries no numbered tag"),
    ("    totals = {", "    total = None\n    totals = {", "carries no numbered tag"),
    ("# LUFFY(8/11)", "# LUFFY(7/11)", "once and in order"),
    ("# LUFFY(8/11)", "# LUFFY(8/12)", "once and in order"),
    ("# LUFFY(8/11)", "# RePO(8/11)", "once and in order"),
    ("    model.train()", "    model.train()  # LUFFY(12/12): nothing", "once and in order"),
    ("(8) its metrics", "its metrics", "does not count 1 to 11"),
    ("(6-7) the weight", "(6) the weight", "does not count 1 to 11"),
    ("Changes against grpo.py", "Changes", "does not count 1 to 11"),
])
def test_the_checker_sees_what_is_wrong(old, new, complaint):
    text = build.script("luffy")
    assert text.count(old) == 1
    assert any(complaint in wrong for wrong in complaints(text.replace(old, new), "LUFFY"))


def test_a_tag_on_an_unchanged_line_is_seen():
    text = build.script("luffy").replace("as its authors released it.", "# LUFFY(1/11): as its authors released it.")
    assert "a numbered tag stands where nothing differs" in complaints(text, "LUFFY")
