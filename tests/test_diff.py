"""Does the diff between two scripts show only the idea?"""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

import grpo
import sync

ROOT = Path(grpo.__file__).parent
spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)
GRPO = build.script("grpo")
VARIANTS = pytest.mark.parametrize("name", build.VARIANTS)
TAGGED = pytest.mark.parametrize("name", [name for name in build.VARIANTS if name != "sft"])  # sft.py takes away more than it adds


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


@TAGGED
def test_every_hunk_has_its_numbered_tag_and_the_docstring_lists_them(name):
    assert complaints(build.script(name), build.VARIANTS[name]) == []


@VARIANTS
def test_the_skeleton_keeps_its_names_and_their_order(name):
    """SFT samples nothing, so it has no advantages and no fields of its own in the batch; every other variant only adds."""
    missing = {"sft": {"group_advantages", "Batch"}}.get(name, set())
    expected = [function for function in top_level(GRPO) if function not in missing]
    assert [function for function in top_level(build.script(name)) if function in top_level(GRPO)] == expected


def test_the_generated_pages_are_current():
    """`python docs/build.py` writes them."""
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
    ("    # LUFFY(6/12): a teacher", "    # a teacher", "carries no numbered tag"),
    ("    totals = engine", "    total = None\n    totals = engine", "carries no numbered tag"),
    ("LUFFY(8/12)", "LUFFY(7/12)", "once and in order"),
    ("LUFFY(8/12)", "LUFFY(8/13)", "once and in order"),
    ("LUFFY(8/12)", "RePO(8/12)", "once and in order"),
    ("            loss.backward()", "            loss.backward()  # LUFFY(12/12): nothing", "once and in order"),
    ("(8) fields", "fields", "does not count 1 to 12"),
    ("(3-5) the released", "(3) the released", "does not count 1 to 12"),
    ("Changes against grpo.py", "Changes", "does not count 1 to 12"),
])
def test_the_checker_sees_what_is_wrong(old, new, complaint):
    text = build.script("luffy")
    assert text.count(old) == 1
    assert any(complaint in wrong for wrong in complaints(text.replace(old, new), "LUFFY"))


def test_a_tag_on_an_unchanged_line_is_seen():
    text = build.script("luffy").replace("as its authors released it.", "# LUFFY(1/12): as its authors released it.")
    assert "a numbered tag stands where nothing differs" in complaints(text, "LUFFY")


EDIT = [("centred", "centered"), ("    args = engine.parse_args(", "    torch.manual_seed(0)\n    args = engine.parse_args("),
        ("            loss.backward()\n", "            loss.backward()  # adds to the gradient\n")]  # sft.py has the second line only


@VARIANTS
def test_one_command_carries_an_edit_of_grpo_into_the_others(name, monkeypatch):
    """tests/sync.py: the diff before the edit is the diff after it, in every variant."""
    edited, variant = GRPO, build.script(name)
    for old, new in EDIT:
        edited = edited.replace(old, new)
    merged = sync.merge(GRPO, edited, variant, *["--ours"] * (name == "sft"))
    assert "torch.manual_seed(0)" in merged and ("# adds to the gradient" in merged or name == "sft") and "centred" not in merged
    if name != "sft":
        before, after = build.hunks(GRPO, variant), build.hunks(edited, merged)
        assert [hunk.changed("+") + hunk.changed("-") for hunk in before] == [hunk.changed("+") + hunk.changed("-") for hunk in after]
        monkeypatch.setitem(globals(), "GRPO", edited)
        assert complaints(merged, build.VARIANTS[name]) == []


@pytest.mark.parametrize("name, parent", [pair for forks in (build.FORKS, build.SIBLINGS) for pair in forks.items()])
def test_the_forks_in_examples_get_the_edit_of_their_parents(name, parent):
    old, edited = build.script(parent), GRPO
    for before, after in EDIT:
        edited = edited.replace(before, after)
    new = edited if parent == "grpo" else sync.merge(GRPO, edited, old)
    merged = sync.merge(old, new, build.script(name))
    assert "torch.manual_seed(0)" in merged and "# adds to the gradient" in merged and "centred" not in merged
    before, after = build.hunks(old, build.script(name)), build.hunks(new, merged)
    assert [hunk.changed("+") + hunk.changed("-") for hunk in before] == [hunk.changed("+") + hunk.changed("-") for hunk in after]


def test_an_edit_that_meets_a_change_of_a_variant_is_left_to_its_author():
    edited = GRPO.replace('arg("group", "Divide advantages', 'arg("group", "Scale advantages')
    assert sync.merge(GRPO, edited, build.script("luffy")) is None
    assert "Scale advantages" in sync.merge(GRPO, edited, build.script("repo"))


def test_tags_are_renumbered_where_a_hunk_is_new():
    text = build.script("repo").replace("            loss.backward()\n", "            # RePO(1/1): new\n            loss.backward()\n")
    assert len(build.NUMBERED.findall(sync.renumber(text))) == 12
    assert [tag[1:3] for tag in build.NUMBERED.findall(sync.renumber(text))] == [(str(i + 1), "12") for i in range(12)]
    fork = build.script("repo_overlap").replace("            loss.backward()\n", "            # Own(7/9)\n            loss.backward()\n")
    expected = fork.replace("Own(7/9)", "Own(1/1)")
    assert sync.renumber(fork, build.script("repo")) == expected != fork
