"""Does a run folder belong to one process, and is one without a checkpoint started?"""

import signal

import pytest

import grpo
import processes
from engine import BadArgument, files, run_folder
from faults import SMALL, metrics, the_error


def test_a_second_process_is_refused_until_the_first_is_dead(run_script, cut_run, tmp_path):
    (tmp_path / "fresh").mkdir()
    code = ("import sys, time\nfrom pathlib import Path\nfrom engine.files import lock\nfor name in sys.argv[1:]: lock(Path(name))\n"
            "print('locked', flush=True)\ntime.sleep(600)")
    other = processes.start("-c", code, cut_run, tmp_path / "fresh")
    while other.stdout != "locked\n":
        assert other.poll() is None
    before = (cut_run / "metrics.jsonl").read_bytes()
    for flags in (["--resume_from_checkpoint", "run"], ["--output_dir", "run", "--resume_from_checkpoint"],
                  [*SMALL, "--output_dir", "fresh"], [*SMALL, "--output_dir", "fresh", "--resume_from_checkpoint"]):
        code, _, err = run_script(grpo, *flags)
        assert code == 2 and f"is in use by process {other.pids[0]} on " in the_error(err)
    assert (cut_run / "metrics.jsonl").read_bytes() == before and [path.name for path in (tmp_path / "fresh").iterdir()] == [files.LOCK]
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert run_script(grpo, "--resume_from_checkpoint", "run")[0] == 0


def test_where_there_are_no_locks_it_says_so_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(37, "No locks available")))
    files.lock(tmp_path)
    assert "cannot be locked (No locks available)" in capsys.readouterr().out


def test_a_folder_that_was_taken_after_the_flags_were_checked_is_refused(tiny, tmp_path):
    args = grpo.Args(output_dir=str(tmp_path / "run"))
    run_folder.open_run(args, "grpo.py", {}, [], [])
    with pytest.raises(BadArgument, match="is in use: choose another"):
        run_folder.open_run(args, "grpo.py", {}, [], [])


def test_a_bare_resume_starts_a_run_that_is_not_there_and_one_that_has_no_checkpoint_yet(run_script, tmp_path):
    """The same command in a loop needs no first time; the run is that of the same flags without it."""
    flags = (*SMALL, "--max_steps", 2, "--eval_steps", 2, "--eval_problems", 1)
    assert run_script(grpo, *flags, "--output_dir", "plain")[0] == 0
    for seen in (False, True):
        if seen:  # as a kill in step 2 leaves it
            for file in (*(tmp_path / "run").glob("*.safetensors"), tmp_path / "run" / "report.html"):
                file.unlink(missing_ok=True)
        code, out, err = run_script(grpo, *flags, "--resume_from_checkpoint")
        assert code == 0 and "no checkpoint in run yet: starting from the first step" in out and "changed flags" not in out, err
        assert metrics(tmp_path / "run") == metrics(tmp_path / "plain") and len(metrics(tmp_path / "run")) == 3
        assert len((tmp_path / "run" / "completions" / "step-000001.jsonl").read_text().splitlines()) == 8
    code, _, err = run_script(grpo, *flags, "--resume_from_checkpoint")
    assert code == 2 and "run is finished and has no checkpoint to go on from" in the_error(err)
    (tmp_path / "run" / "model.safetensors").unlink()
    code, _, err = run_script(grpo, "--resume_from_checkpoint", "run")
    assert code == 2 and "no checkpoint in run yet; to start it again: --output_dir run --resume_from_checkpoint" in the_error(err)
