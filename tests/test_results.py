"""Is what the README says what was measured and what the code does?"""

import dataclasses
import importlib.util
import re
import shlex
from pathlib import Path

import pytest

import common
import eval as eval_script
import grpo
import luffy
import prefixrl
import repo
import sft

ROOT = Path(grpo.__file__).parent
README = (ROOT / "README.md").read_text()
SCRIPTS = {"grpo.py": grpo, "repo.py": repo, "luffy.py": luffy, "prefixrl.py": prefixrl, "sft.py": sft, "eval.py": eval_script}


def test_the_readmes_numbers_are_rendered_from_results():
    spec = importlib.util.spec_from_file_location("methods", ROOT / "bench" / "methods.py")
    methods = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(methods)
    assert methods.readme_with(README) == README


def test_links_and_tests_named_in_the_documentation_exist():
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
    named = re.findall(r"tests/\w+\.py", README + "".join(path.read_text() for path in ROOT.glob("*.py")))
    assert len(named) > 5
    for test in named:
        assert (ROOT / test).is_file(), test


def test_every_flag_in_the_readme_exists():
    flags = {field.name for script in SCRIPTS.values() for field in dataclasses.fields(script.Args)}
    flags |= {"model", "help", "write_jsonl", "build"}  # alias, argparse's own, and those of tasks.py
    used = set(re.findall(r"--(\w+)", README))
    assert len(used) > 20 and used <= flags


COMMANDS = [line.split("#")[0].strip() for line in README.splitlines() if re.match(r"    python \w+\.py", line) and "tasks.py" not in line]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme_parses(command, tmp_path, monkeypatch):
    """Their flags and values are taken; what they do is run in tests/test_cli.py, tests/test_resume.py and tests/test_reduction.py."""
    if "--resume_from_checkpoint" in command:
        pytest.skip("needs the run that it resumes: tests/test_resume.py")
    monkeypatch.chdir(tmp_path)
    _, file, *words = shlex.split(command)
    script = SCRIPTS[file]
    assert isinstance(common.parse_args(script.Args, script.__doc__, file, words), script.Args)


def test_every_paper_tag_is_declared_with_arxiv_id_and_version():
    """A tag [X eq n] or [X sec n] in a script needs "X ... arXiv NNNN.NNNNNvN" in that script's docstring."""
    source = (ROOT / "grpo.py").read_text()
    papers = {re.sub(r" (eq|sec) .*", "", tag) for tag in re.findall(r"\[(?:DEVIATES |CHOICE )?([A-Z][\w. ]*? (?:eq|sec) [\d.]+)", source)}
    assert papers == {"GRPO", "DAPO", "Dr. GRPO"}
    for paper, declared in {"GRPO": r"GRPO, .*arXiv \d{4}\.\d{5}v\d", "DAPO": r"\[DAPO sec 3\.3, arXiv \d{4}\.\d{5}v\d\]",
                            "Dr. GRPO": r"\[Dr\. GRPO sec 3\.2, arXiv \d{4}\.\d{5}v\d\]"}.items():
        assert re.search(declared, grpo.__doc__), paper


def test_every_equation_tag_has_a_test_that_names_it():
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_equations.py"))
    for tag in {f"[{tag}]" for tag in re.findall(r"\[((?:GRPO|DAPO|Dr\. GRPO) (?:eq|sec) [\d.]+)\]", (ROOT / "grpo.py").read_text())}:
        assert tag in tests, tag
