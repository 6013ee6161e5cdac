"""Is an output claimed before work begins, by one process, and is it noticed when the output goes away?"""

import json
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import eval as eval_script
import grpo
import processes
from engine import files, run_folder
from faults import SMALL, the_error

ROOT = Path(grpo.__file__).parent
COLLECT = ("--task", "diary", "--num_hard", 4, "--num_easy", 4, "--num_generations_eval", 4, "--max_completion_length", 48)


@pytest.fixture
def other(tmp_path):
    """other(*flags) starts eval.py as a process of its own, which works until the test ends."""
    started = []

    def start(*flags, until):
        started.append(processes.start("eval.py", *flags, cwd=tmp_path))
        while not until.exists():
            assert started[-1].poll() is None
            time.sleep(0.05)
        return started[-1]

    yield start
    for process in started:
        process.send_signal(signal.SIGKILL)
        process.wait()


def test_two_collectors_of_one_file_are_one(run_script, tmp_path, other):
    """The second is refused in one line and writes nothing; when the first is dead, the same command goes on with its file."""
    first = other(*COLLECT, "--max_tries", 10**6, "--save_traces", "t.jsonl", until=tmp_path / "t.ledger.json")
    code, _, err = run_script(eval_script, *COLLECT, "--max_tries", 8, "--save_traces", "t.jsonl")
    assert code == 2 and the_error(err, "eval.py") == "eval.py: error: --save_traces t.jsonl is in use"
    first.send_signal(signal.SIGKILL)
    first.wait()
    ledger = json.loads((tmp_path / "t.ledger.json").read_text())
    (tmp_path / "t.ledger.json").write_text(json.dumps(ledger | {"args": ledger["args"] | {"max_tries": 1}}))  # an end is near
    assert run_script(eval_script, *COLLECT, "--max_tries", 1, "--save_traces", "t.jsonl")[0] == 0
    texts = [json.loads(line)["trace"] for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert len(texts) == sum(len(problem["lines"]) for problem in json.loads((tmp_path / "t.ledger.json").read_text())["problems"])


@pytest.mark.parametrize("flag", ["--output_file", "--output_problems"])
def test_two_evaluations_with_one_output_are_one(run_script, tmp_path, other, monkeypatch, flag):
    """The second ends before it has loaded a model."""
    first = other("--task", "diary", "--num_generations_eval", 10**4, flag, "out", until=tmp_path / "out")
    monkeypatch.setattr(eval_script.engine, "load_policy", lambda args: pytest.fail("loaded"))
    code, _, err = run_script(eval_script, "--task", "diary", flag, "out")
    assert code == 2 and the_error(err, "eval.py") == f"eval.py: error: {flag} out is in use"
    first.send_signal(signal.SIGKILL)
    first.wait()
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert run_script(eval_script, "--task", "diary", "--eval_problems", 1, flag, "out")[0] == 0  # what it left is empty, and free
    assert (tmp_path / "out").stat().st_size


@pytest.mark.parametrize("path, expected", [("folder", "Is a directory"), ("nowhere/x", "No such file or directory"), (
    "/proc/x", "No such file or directory"), ("x" * 300, "File name too long"), ("link", "symbolic links"), ("full", "exists already")])
def test_an_output_that_cannot_be_written_is_found_before_the_work(run_script, tmp_path, monkeypatch, path, expected):
    (tmp_path / "folder").mkdir()
    (tmp_path / "full").write_text("precious")
    (tmp_path / "link").symlink_to("elsewhere")
    monkeypatch.setattr(eval_script.engine, "load_policy", lambda args: pytest.fail("loaded"))
    for flag in ("--output_file", "--output_problems"):
        code, _, err = run_script(eval_script, "--task", "diary", flag, path)
        assert code == 2 and expected in the_error(err, "eval.py")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder", "full", "link"]


def test_an_evaluation_that_fails_leaves_no_empty_file(run_script, tmp_path):
    for flags in (("--output_file", "x", "--output_problems", "y"), ("--save_traces", "t.jsonl")):
        assert run_script(eval_script, "--model", "nowhere", *flags)[0] == 2
    assert list(tmp_path.iterdir()) == []


def test_six_starts_in_one_second_get_six_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_folder.time, "strftime", lambda form: "now")
    with ThreadPoolExecutor(6) as pool:
        folders = list(pool.map(lambda _: run_folder.fresh_folder(grpo.Args(), "grpo.py"), range(6)))
    assert len(set(folders)) == 6 and all(Path(folder).is_dir() for folder in folders)


@pytest.mark.parametrize("change", [lambda run: run.rename(run.with_name("elsewhere")), shutil.rmtree, lambda run: (
    run.rename(run.with_name("elsewhere")), run.mkdir(), (run / ".lock").write_text("of another"))], ids=["moved", "deleted", "another's"])
def test_a_run_folder_that_goes_away_ends_the_run_in_one_line(run_script, tmp_path, monkeypatch, change):
    """At its next write; and nothing is written where the folder was."""
    rollout, calls = grpo.rollout, []

    def losing(*inputs):
        calls.append(1)
        if len(calls) == 2:
            change(tmp_path / "run")
        return rollout(*inputs)

    monkeypatch.setattr(grpo, "rollout", losing)
    code, _, err = run_script(grpo, *SMALL, "--save_steps", 1)
    assert code == 1 and the_error(err).endswith("cannot write run/metrics.jsonl: run/.lock was moved or deleted")
    assert len(calls) == 2 and [file.name for file in tmp_path.glob("run/*")] in ([], [".lock"])


def test_a_trace_file_that_goes_away_ends_collecting_in_one_line(run_script, tmp_path, monkeypatch):
    sample = eval_script.common.sample
    monkeypatch.setattr(eval_script.common, "sample", lambda *rest: ((tmp_path / "t.jsonl").unlink(missing_ok=True), sample(*rest))[1])
    code, _, err = run_script(eval_script, *COLLECT, "--max_tries", 8, "--save_traces", "t.jsonl")
    assert code == 1 and the_error(err, "eval.py").endswith("cannot write t.jsonl: t.jsonl was moved or deleted")
    assert not (tmp_path / "t.jsonl").exists()


def test_a_claim_survives_other_openings_of_its_file_and_ends_with_its_release(tmp_path, monkeypatch):
    """flock's promise, which a POSIX record lock does not give: closing another descriptor of the file keeps the claim."""
    path = tmp_path / "x"
    files.claim(path, "--x", fresh=True)
    path.write_text("open and closed")
    with monkeypatch.context() as context:
        context.setattr(files, "CLAIMED", {})  # as in another process: flock tells descriptors apart, not processes
        with pytest.raises(files.BadArgument, match="in use"):
            files.claim(path, "--x")
    files.release(failed=False)
    files.claim(path, "--x")
    files.release(failed=False)
