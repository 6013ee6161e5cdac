"""Is a run whole on the disk, also when the disk is full?"""

import contextlib
import os
import re
import resource
from pathlib import Path

import pytest

import grpo
from engine import RunError, checkpoints, files
from faults import SMALL, metrics, the_error


def test_everything_is_on_the_disk_before_it_gets_its_name(run_script, tmp_path, monkeypatch):
    """Of each checkpoint: every file and the folder are synced, then it is renamed, then the run folder is synced."""
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append(("sync", Path(os.readlink(f"/proc/self/fd/{handle}")))), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda old, new: (done.append(("rename", Path(new).absolute())), replace(old, new)))
    assert run_script(grpo, *SMALL, "--save_steps", 1, "--max_steps", 1)[0] == 0
    final, beside = tmp_path / "run" / "checkpoint-1", tmp_path / "run" / ".checkpoint-1.tmp"
    place = done.index(("rename", final))
    synced = {path for kind, path in done[:place] if kind == "sync"}
    assert {beside, tmp_path / "run" / "metrics.jsonl"} | {beside / file.name for file in final.iterdir()} <= synced
    assert done[place + 1] == ("sync", tmp_path / "run")
    model = done.index(("rename", tmp_path / "run" / "model.safetensors"))
    assert ("sync", tmp_path / "run" / ".model.tmp" / "model.safetensors") in done[:model]
    assert ("rename", tmp_path / "run" / "tokenizer.json") in done[:model]  # the weights come last: with them the folder is complete


@contextlib.contextmanager
def file_limit(size):
    """A write beyond that size of a file fails in the kernel, as on a full disk; pytest's own report, too, hence no fixture."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_ends_the_run_in_one_line_and_leaves_the_last_checkpoint(run_script, cut_run, finished):
    for limit in (1_000_000, 2_000_000):  # too little for the weights; for the optimizer
        with file_limit(limit):
            code, _, err = run_script(grpo, "--resume_from_checkpoint", "run")
        assert code == 1, err
        assert re.search(r"cannot write run/checkpoint-4: .*File too large.*; run/checkpoint-3 is complete$", the_error(err))
        assert [path.name for path in checkpoints.complete_checkpoints(cut_run)] == ["checkpoint-2", "checkpoint-3"]
        assert not list(cut_run.glob(".*.tmp")) and not (cut_run / "checkpoint-4").exists()
    assert run_script(grpo, "--resume_from_checkpoint", "run")[0] == 0
    assert metrics(cut_run) == metrics(finished)
    assert (cut_run / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()


def test_a_full_disk_at_the_final_model_and_at_the_log(run_script, tmp_path):
    with file_limit(1_000_000):
        code, _, err = run_script(grpo, *SMALL, "--max_steps", 1)
    assert code == 1 and "cannot write run: " in the_error(err) and "File too large" in the_error(err)
    assert not list((tmp_path / "run").glob(".*.tmp")) and not list((tmp_path / "run").glob("*.safetensors"))
    (tmp_path / "old.json").write_text("old")
    with pytest.raises(RunError, match="cannot write .*m.jsonl: File too large"), file_limit(50):
        files.append_jsonl(tmp_path / "m.jsonl", [{"text": "x" * 100}])
    with pytest.raises(RunError, match="cannot write .*old.json: File too large"), file_limit(50):
        files.write_atomically(tmp_path / "old.json", "x" * 100)
    assert (tmp_path / "old.json").read_text() == "old" and not (tmp_path / ".old.json.tmp").exists()
    with pytest.raises(RuntimeError, match="other"), files.writing(tmp_path / "x"):  # what is no failure to write stays what it is
        raise RuntimeError("other")
