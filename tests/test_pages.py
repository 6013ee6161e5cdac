"""Do the pages of the methods show every equation beside its lines, name metrics that exist, and read well in a browser?"""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

import build
import equations
import source
from browser import Page, needs_browser

ROOT = Path(source.__file__).parents[1]
NAMES = list(build.TITLES)
METHODS = pytest.mark.parametrize("name", NAMES)
HTML = [f"docs/html/{name}.html" for name in ("index", *NAMES)]


# ---------------------------------------------------------------- every tag has its place


def misplaced(text, page, base=""):
    """What is wrong with the paper tags of a script on its page, as a list of sentences."""
    wrong, lines = [], text.splitlines()
    for tag in source.own_tags(text, base)[0]:
        part = re.search(rf"^### {re.escape(tag)}\n(.*?)^Lines: (.*?)$", page, re.MULTILINE | re.DOTALL)
        runs = source.tagged_lines(text, tag)
        wrong += [f"{tag} has no equation in docs/equations.py"] if tag not in equations.EQUATIONS else []
        wrong += [f"{tag} stands on no line of code"] if not runs else []
        wrong += [f"{tag} is not on the page"] if not part else []
        if part and runs:
            shown = [line.strip() for line in re.search(r"```python\n(.*?)\n```", part[1], re.DOTALL)[1].splitlines() if line != "…"]
            wrong += [f"{tag} is stale"] if shown != [line.strip() for first, last in runs for line in lines[first - 1 : last]] else []
            linked = [tuple(map(int, re.findall(r"\d+", place))) for place in re.findall(r"\[([\d–]+)\]", part[2])]
            wrong += [f"{tag} links to other lines"] if linked != [(first, last)[: 1 + (last > first)] for first, last in runs] else []
            wrong += [f"{tag} lacks its LaTeX"] if not all(f"$$\n{row}\n$$" in part[1] for row in equations.EQUATIONS[tag][1:]) else []
    links = re.search(r"^Lines where the paper is silent .*", page, re.MULTILINE)
    return wrong + [f"{tag} has no line link" for tag in source.own_tags(text, base)[1] for i, line in enumerate(lines, 1)
                    if tag in line and not re.search(rf"{re.escape(tag)} [^;]*#L{i}\)", links[0] if links else "")]


@pytest.mark.fast
@METHODS
def test_each_tag_of_the_code_has_its_place(name):
    assert misplaced(source.script(name), (ROOT / f"docs/{name}.md").read_text(), source.script("grpo") if name != "grpo" else "") == []


@pytest.mark.fast
def test_no_equation_is_without_code():
    assert sorted(equations.EQUATIONS) == sorted(tag for name in NAMES for tag in source.tags_of(name)[0])
    assert all(tag in equations.EQUATIONS for tag in equations.CHIEF.values())


@pytest.mark.fast
@pytest.mark.parametrize("old, new, complaint", [
    ("# () float32\n", "# () float32  [GRPO eq 9]\n", "[GRPO eq 9] has no equation in docs/equations.py"),
    ("# () float32\n", "# () float32  [GRPO eq 9]\n", "[GRPO eq 9] is not on the page"),
    ("[GRPO eq 4]\n        token", "\n        token", "[GRPO eq 4] stands on no line of code"),
    ("ratio = torch.exp(logps - old_logps)", "ratio = (logps - old_logps).exp()", "[GRPO eq 3] is stale"),
    ("import torch\n", "import torch\n\n", "[DAPO sec 3.3] links to other lines"),
    ("[CHOICE GRPO] divides by G", "divides by G [CHOICE GRPO eq 9]", "[CHOICE GRPO eq 9] has no line link"),
    ("        return centred.view", "        # [GRPO sec 4.1.2]\n        return centred.view", "[GRPO sec 4.1.2] is stale"),
])
def test_a_missing_tag_and_a_stale_line_are_seen(old, new, complaint):
    text = source.script("grpo")
    assert old in text, "the test itself is out of date"
    assert complaint in misplaced(text.replace(old, new, 1), (ROOT / "docs/grpo.md").read_text())


def test_more_than_ten_lines_beside_an_equation_are_refused():
    text = source.script("grpo").replace("def main():", "def main():  # [GRPO eq 4]")
    with pytest.raises(SystemExit, match=r"\[GRPO eq 4\] stands for more than 10 lines"):
        source.tagged_lines(text, "[GRPO eq 4]")


@pytest.mark.parametrize("tag", equations.EQUATIONS)
def test_latex_survives_a_code_host_and_becomes_mathml(tag):
    """A code host strips a backslash before punctuation, and a table cell ends at a bar. No command is left in the MathML."""
    web = needs_web()
    for line in equations.EQUATIONS[tag][1:]:
        assert not re.search(r"\\[^a-zA-Z]", line) and not set(line) & set("|<>#&$") and line.count("{") == line.count("}")
    text = web.mathml(tag)
    assert text.count("<math") == len(equations.EQUATIONS[tag]) - 1 and "\\" not in text


# ---------------------------------------------------------------- HTML


def needs_web():
    pytest.importorskip("latex2mathml", reason="latex2mathml is not installed: pip install -r requirements-dev.txt")
    pytest.importorskip("markdown_it", reason="markdown-it-py is not installed: pip install -r requirements-dev.txt")
    return importlib.import_module("web")


@pytest.mark.fast
def test_the_html_pages_are_current_and_whole():
    """One file each: no script, nothing loaded, every link leads to a file, small enough to send."""
    pages = needs_web().pages()
    assert {path.name for path in (ROOT / "docs/html").iterdir()} == {Path(path).name for path in pages}
    for path, text in pages.items():
        assert (ROOT / path).read_text() == text, f"{path} is out of date: python docs/build.py"
        assert len(text.encode()) < 1_500_000 and "<script" not in text
        assert all(target.startswith("data:") for target in re.findall(r'(?:src|data|xlink:href)="([^"]*)"', text))
        for target in re.findall(r'href="([^"#]+)', text):
            assert "://" in target or (ROOT / path).parent.joinpath(target).exists(), f"{path} links to {target}"


def test_colour_changes_no_character_of_a_script():
    web = needs_web()
    for name in NAMES:
        plain = [web.html.unescape(re.sub(r"</?[biq]>", "", line)) for line in web.coloured(name)]
        assert plain == source.script(name).splitlines()


@pytest.mark.parametrize("library", ["latex2mathml", "markdown_it"])
def test_a_missing_library_is_told_in_a_line(library, monkeypatch):
    monkeypatch.delitem(sys.modules, "web", raising=False)
    monkeypatch.setitem(sys.modules, "latex2mathml.converter" if library == "latex2mathml" else library, None)
    monkeypatch.setattr(build, "pages", dict)
    with pytest.raises(SystemExit, match=rf"^docs/html/ needs {library}: pip install -r requirements-dev.txt$"):
        build.main()


TOO_WIDE = """[...document.querySelectorAll(".line > code, .line, p, h1, h2, h3, td")].filter(box => box.scrollWidth > box.clientWidth + 1
  && getComputedStyle(box).overflowX == "visible" && !box.closest(".scroll")).map(box => box.textContent.slice(0, 40))"""
CUT = """[...document.querySelectorAll(".math, .lines, .pair > div")].filter(box => box.scrollHeight > box.clientHeight + 1)
  .map(box => box.textContent.slice(0, 40))"""
COLUMNS = """[...document.querySelectorAll(".pair")].map(pair => [...pair.children].filter(cell => cell.offsetHeight && cell.textContent)
  .map(cell => Math.round(cell.getBoundingClientRect().x)))"""


@needs_browser
@pytest.mark.parametrize("path", HTML)
def test_a_page_reads_well_in_a_browser(path):
    """Narrow and dark, wide and light: colours do not depend on the width, nor places on the colours."""
    for width, dark in ((400, True), (1400, False)):
        page = Page(ROOT / path, width, dark, script=False)
        assert page.console() == [] and page.requests() == []
        assert page.too_wide() <= 0 and page.evaluate(TOO_WIDE) == [] and page.evaluate(CUT) == []
        assert page.low_contrast() == []
        places = [tuple(cells) for cells in page.evaluate(COLUMNS)]
        assert bool(places) == (Path(path).stem in source.VARIANTS)
        if places and width == 400:
            assert len({place for cells in places for place in cells}) == 1
        elif places:
            (left, right), = {cells for cells in places if len(cells) == 2}
            assert left < 600 < right


# ---------------------------------------------------------------- what can go wrong


@METHODS
def test_the_metrics_of_the_page_are_written_by_the_script(name, run_script, tmp_path):
    """A run of one step; at least four rows, and each names a metric."""
    section = (ROOT / f"docs/{name}.md").read_text().split("## What can go wrong")[1].split("\n## ")[0]
    rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| ")][1:]
    named = [re.findall(r"`([^`]+)`", row[1]) for row in rows]
    assert len(rows) >= 4 and all(named)
    (checks,) = re.findall(r"^\| a check at the start \| (.*) \|$", (ROOT / "docs/README.md").read_text(), re.MULTILINE)
    checked = dict(zip(NAMES, re.findall(r"`(.*?)`", checks)))
    group = {"sft": [], "grpo": ["--beta", 0.01, "--num_generations", 4]}.get(name, ["--num_generations", 4])
    code, _, err = run_script(importlib.import_module(name), *group, "--prompts_per_step", 4, "--max_steps", 1, "--eval_steps", 1,
                              "--eval_problems", 1, "--output_dir", "run")
    assert code == 0, err
    written = set().union(*(json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()))
    assert {metric for metrics in named for metric in metrics} | {checked.get(name, "loss")} <= written
