"""Does a run stay inside its folder, whatever links and odd files lie in it?"""

import json
import os
import re
import shutil

import pytest

import grpo
from engine import checkpoints
from faults import metrics, the_error

MORE = ("--resume_from_checkpoint", "run")


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "completions", "args.json"])
@pytest.mark.parametrize("dangling", [False, True])
def test_no_file_of_a_run_is_followed_out_of_its_folder(run_script, cut_run, tmp_path, name, dangling):
    """Instead of the run's own file: a link to another one, or to one that does not exist. Nothing outside changes."""
    path, outside = cut_run / name, tmp_path / "outside"
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.rename(outside)
    if dangling and outside.exists():
        outside.unlink()
    elif not dangling and name == "completions":
        outside.mkdir()
        (outside / "step-000009.jsonl").write_text("precious")  # of a step that resuming would remove from the run's own folder
    elif not dangling and name == ".lock":
        outside.write_text("precious")
    path.symlink_to(outside)

    def content():
        return {str(path): path.read_bytes() for path in (outside, *outside.rglob("*")) if path.is_file()}

    before = content()
    code, _, err = run_script(grpo, *MORE)
    assert code in (1, 2) and ("symbolic link" in the_error(err) or "no args.json" in err)
    assert content() == before and outside.exists() != dangling


def test_a_report_is_not_written_through_a_link(run_script, with_report, cut_run, tmp_path):
    (tmp_path / "precious").write_text("keep")
    (cut_run / "report.html").unlink(missing_ok=True)
    (cut_run / "report.html").symlink_to(tmp_path / "precious")
    assert run_script(grpo, *MORE)[0] == 0
    assert (tmp_path / "precious").read_text() == "keep"


def test_a_checkpoint_that_was_moved_and_linked_back_works_and_is_removed_as_a_link(run_script, cut_run, tmp_path, finished):
    """On another disk, say. The run goes on from it, ends, and drops the link when its turn comes; the moved folder stays."""
    for step in (2, 3):
        shutil.move(cut_run / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
        (cut_run / f"checkpoint-{step}").symlink_to(tmp_path / f"checkpoint-{step}")
    code, _, err = run_script(grpo, *MORE, "--save_total_limit", 1)
    assert code == 0, err
    assert (cut_run / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
    assert [path.name for path in checkpoints.checkpoints(cut_run)] == ["checkpoint-4"]
    assert (tmp_path / "checkpoint-3" / "model.safetensors").exists()


def fifo(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


@pytest.mark.parametrize("change, expected", [
    (lambda run: fifo(run / "metrics.jsonl"), "metrics.jsonl: is not an ordinary file"),
    (lambda run: fifo(run / "args.json"), "no args.json"),
    (lambda run: [fifo(run / f"checkpoint-{step}" / "state.json") for step in (2, 3)], "no checkpoint in run is complete"),
    (lambda run: (run / "metrics.jsonl").write_text("garbage\n"), "metrics.jsonl line 1 cannot be read"),
    (lambda run: (run / "metrics.jsonl").write_text('{"step": 1}\n\n'), "metrics.jsonl line 2 cannot be read"),
    (lambda run: (run / "metrics.jsonl").write_bytes(b"\x00\n"), "metrics.jsonl line 1 cannot be read"),
    (lambda run: (run / "metrics.jsonl").write_bytes(b"\xff\xfe\n"), "metrics.jsonl line 1 cannot be read"),
    (lambda run: (run / "metrics.jsonl").write_text('{"reward": 1}\n'), "metrics.jsonl line 1: step: expected a whole number, got None"),
    (lambda run: (run / "metrics.jsonl").write_text('{"step": 1, "reward": "x"}\n'), "line 1: reward: expected a number or null, got 'x'"),
    (lambda run: (run / "metrics.jsonl").write_text("[" * 100_000 + "\n"), "metrics.jsonl line 1 cannot be read"),
], ids=lambda value: re.sub(r"\W+", "-", value) if isinstance(value, str) else "")
def test_odd_files_end_in_one_line(run_script, cut_run, change, expected):
    change(cut_run)
    code, _, err = run_script(grpo, *MORE)
    assert code in (1, 2) and expected in the_error(err)


def test_a_copy_among_the_completions_is_left_alone(run_script, cut_run, finished):
    odd = cut_run / "completions" / "step-000003 (copy).jsonl"
    odd.write_text("mine")
    assert run_script(grpo, *MORE)[0] == 0
    assert odd.read_text() == "mine" and metrics(cut_run) == metrics(finished)


@pytest.mark.parametrize("change", [
    lambda path, lines: path.unlink(), lambda path, lines: path.write_text("".join(lines[:1])),
    lambda path, lines: path.write_text("".join(lines[:2] + lines))], ids=["deleted", "cut", "doubled"])
def test_records_that_are_not_whole_are_told(run_script, cut_run, change):
    """The run goes on, since its weights are whole, and says what is wrong with its log."""
    path = cut_run / "metrics.jsonl"
    change(path, path.read_text().splitlines(keepends=True))
    code, out, _ = run_script(grpo, *MORE)
    assert code == 0 and "run/metrics.jsonl: records up to step 3 are missing or doubled" in out
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()][-1] == 4


def test_a_whole_log_is_not_told_of(run_script, cut_run):
    assert "missing or doubled" not in run_script(grpo, *MORE)[1]
