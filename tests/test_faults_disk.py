"""Is a run whole on the disk, also when the disk is full?"""

import contextlib
import json
import os
import re
import resource
import subprocess
from pathlib import Path

import pytest

import eval as eval_script
import grpo
import processes
from engine import RunError, checkpoints, files
from faults import SMALL, metrics, the_error

ROOT = Path(grpo.__file__).parent


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


def test_on_a_small_file_system_every_end_is_one_line_and_no_half_checkpoint_stays(tmp_path):
    """Real ones, in a mount namespace: no inode for the lock, the log, a folder, a file of the tokenizer; no room for the weights."""
    code = """
import ctypes, os, subprocess, sys
import engine, grpo
own = {"setgroups": "deny", "uid_map": f"0 {os.getuid()} 1", "gid_map": f"0 {os.getgid()} 1"}  # as `unshare -rm`
assert ctypes.CDLL(None).unshare(0x10000000 | 0x20000) == 0  # CLONE_NEWUSER | CLONE_NEWNS
for name, value in own.items():
    with open(f"/proc/self/{name}", "w") as file:
        file.write(value)
subprocess.run(["mount", "--make-rprivate", "/"], check=True)
for option in sys.argv[2:]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", option, "tmpfs", "disk"], check=True)
    pid = os.fork()
    if pid == 0:
        os.chdir("disk")
        sys.argv = ["grpo.py", *sys.argv[1].split()]
        try:
            engine.launch(grpo.main)
        except SystemExit as stop:
            os._exit(stop.code)
        os._exit(70)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print("END", code, *sorted(os.path.join(top, name)[5:] for top, folders, _ in os.walk("disk") for name in folders), file=sys.stderr)
    subprocess.run(["umount", "disk"], check=True)
"""
    (tmp_path / "disk").mkdir()
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", tmp_path / "disk"], capture_output=True).returncode:
        pytest.skip("needs a mount namespace")
    done = processes.run("-c", code, " ".join(map(str, (*SMALL, "--save_steps", 1))), "nr_inodes=2", "nr_inodes=4", "nr_inodes=5",
                         "nr_inodes=7", "nr_inodes=12", "nr_inodes=21", "size=1500k", cwd=tmp_path)
    ends = re.split(r"END (.*)\n", done.stderr)
    assert len(ends) == 15 and "Traceback" not in done.stderr, done.stderr
    full = "No space left on device"
    expected = [f"--output_dir run/.lock: {full}", f"cannot write run/metrics.jsonl: {full}", f"cannot write run/completions: {full}",
                f"cannot write run/checkpoint-1: {full}", f"cannot write run/checkpoint-1: {full} (os error 28)",
                f"cannot write run/checkpoint-2: {full} (os error 28); run/checkpoint-1 is complete",
                f"cannot write run/checkpoint-1: Error while serializing: I/O error: {full} (os error 28)"]
    for printed, left, line in zip(ends[::2], ends[1::2], expected):
        assert printed.strip().splitlines()[-1] == f"grpo.py: error: {line}"
        code, *folders = left.split()
        assert code == ("2" if "output_dir" in line else "1")
        assert folders in (["run"], ["run", "run/completions"], ["run", "run/checkpoint-1", "run/completions"])


def test_traces_are_on_the_disk_before_the_ledger_that_counts_them(run_script, tmp_path, monkeypatch):
    """After a loss of power the file has at least what its ledger counts, so the same command goes on."""
    synced, fsync, replace, ledgers = [0], os.fsync, os.replace, []

    def recorded(handle):
        fsync(handle)
        if os.readlink(f"/proc/self/fd/{handle}") == str(tmp_path / "t.jsonl"):
            synced.append(os.fstat(handle).st_size)

    def replaced(old, new):
        if Path(new).name == "t.ledger.json":
            ledgers.append(json.loads(Path(old).read_text())["bytes"])
            assert synced[-1] == ledgers[-1] == (tmp_path / "t.jsonl").stat().st_size
        replace(old, new)

    monkeypatch.setattr(os, "fsync", recorded)
    monkeypatch.setattr(os, "replace", replaced)
    assert run_script(eval_script, "--task", "diary", "--num_hard", 0, "--num_easy", 3, "--num_generations_eval", 2, "--max_tries", 6,
                      "--save_traces", "t.jsonl")[0] == 0
    assert len(ledgers) > 1 and ledgers[-1] > 0
