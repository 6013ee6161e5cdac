"""Is what the README says what was measured and what the code does?"""

import dataclasses
import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest

import eval as eval_script
import grpo
import luffy
import prefixrl
import repo
import runs
import sft

ROOT = Path(grpo.__file__).parent
README = (ROOT / "README.md").read_text()
SCRIPTS = {"grpo.py": grpo, "repo.py": repo, "luffy.py": luffy, "prefixrl.py": prefixrl, "sft.py": sft, "eval.py": eval_script}


@pytest.mark.parametrize("file", ["bench/methods.py", "docs/hardware.py"])
def test_the_readmes_numbers_are_rendered(file):
    spec = importlib.util.spec_from_file_location(Path(file).stem, ROOT / file)
    writer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(writer)
    assert writer.readme_with(README) == README


def test_the_shipped_traces_are_as_many_as_the_readme_says():
    ledger = json.loads((ROOT / "tiny_model" / "traces" / "diary.ledger.json").read_text())
    solved = sum(len(problem["lines"]) for problem in ledger["problems"])
    said = re.search(r"for (\d+) of (\d+) hard problems in ([\d,]+) tries", README.replace("\n", " "))
    assert [int(number.replace(",", "")) for number in said.groups()] == [solved, len(ledger["problems"]), ledger["samples"]]


def test_links_and_tests_named_in_the_documentation_exist():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#]+)(?:#\w+)?\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
    named = re.findall(r"tests/\w+\.py", README + "".join(path.read_text() for path in ROOT.glob("*.py")))
    assert len(named) > 5
    for test in named:
        assert (ROOT / test).is_file(), test


def test_every_flag_in_the_readme_exists():
    flags = {field.name for script in SCRIPTS.values() for field in dataclasses.fields(script.Args)}
    flags |= {"model", "help", "write_jsonl", "build", "device"}  # alias, argparse's own, and those of tasks.py and bench_logprob.py
    used = set(re.findall(r"--(\w+)", README))
    assert len(used) > 20 and used <= flags


COMMANDS = [line.split("#")[0].strip() for line in README.replace("\\\n", "").splitlines()
            if re.match(r"    python \w+\.py", line) and "tasks.py" not in line]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme_parses(command, tmp_path, monkeypatch):
    """Their flags and values are taken; what they do is run in tests/test_cli.py, tests/test_resume.py and tests/test_reduction.py."""
    if "--resume_from_checkpoint" in command:
        pytest.skip("needs the run that it resumes: tests/test_resume.py")
    monkeypatch.chdir(tmp_path)
    _, file, *words = shlex.split(command)
    script = SCRIPTS[file]
    if words and not words[0].startswith("-"):  # a config file: the user's, or args.json of a run
        (tmp_path / words[0]).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / words[0]).write_text(json.dumps({"script": file, "args": {"seed": 7}} if "args.json" in words[0] else {"seed": 7}))
    assert isinstance(runs.parse_args(script.Args, script.__doc__, file, words), script.Args)


SOURCES = {name: (ROOT / name).read_text() for name in ("grpo.py", "luffy.py", "repo.py", "prefixrl.py", "sft.py")}
# [GRPO eq 3], [LUFFY code], [CHOICE RePO], [DEVIATES GRPO eq 3]: kind, paper, place
TAG = re.compile(r"\[(CHOICE |DEVIATES )?((?:Dr\. )?[A-Z]\w+)((?: [\w.]+)*)(?:, arXiv [\w.]+)?\]")


def tags(text):
    """(kind, paper, place) of every tag in a text; a name alone in brackets is none."""
    return {(kind.strip(), paper, place.strip()) for kind, paper, place in TAG.findall(text) if kind or place}


@pytest.mark.parametrize("script", SOURCES)
def test_every_paper_tag_is_declared_with_arxiv_id_and_version(script):
    """A paper X of a tag needs "X, ... arXiv NNNN.NNNNNvN" in the docstring of the script or of grpo.py; SFT is no paper."""
    papers = {paper for _, paper, _ in tags(SOURCES[script])} - {"SFT"}
    assert papers == {"grpo.py": {"GRPO", "DAPO", "Dr. GRPO"}, "luffy.py": {"GRPO", "DAPO", "Dr. GRPO", "LUFFY"}, "sft.py": set(),
                      "repo.py": {"GRPO", "DAPO", "Dr. GRPO", "RePO"}, "prefixrl.py": {"GRPO", "DAPO", "Dr. GRPO", "PrefixRL"}}[script]
    declared = SOURCES[script].split('"""')[1] + grpo.__doc__
    for paper in papers:
        name = rf"(?<!Dr\. )\b{re.escape(paper)}(?: (?:eq|sec) [\d.]+)?"
        assert re.search(name + r", [^.\[\]\n]*arXiv \d{4}\.\d{5}v\d", declared), paper


@pytest.mark.parametrize("script", SOURCES)
def test_every_equation_tag_has_a_test_that_names_it(script):
    """What a paper says has a test that checks it; a choice, a deviation and what only released code says are told in the docstring."""
    plain = {f"[{paper} {place}]" for kind, paper, place in tags(SOURCES[script]) if not kind and place != "code"}
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
    assert plain and not {tag for tag in plain if tag not in tests}
