"""Do Ctrl-C, SIGTERM and a closed terminal end a run after its step, with a checkpoint, and a closed stdout not at all?"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import common
import eval as eval_script
import grpo
import processes
from engine import checkpoints, ranks
from faults import SMALL, metrics

ROOT = Path(grpo.__file__).parent


def interrupting(numbers, during=2):
    """A rollout that sends these signals to its own process in step `during`, and then does its work."""
    rollout, calls = grpo.rollout, []

    def interrupted(*inputs):
        calls.append(1)
        if len(calls) == during:
            for number in numbers:
                os.kill(os.getpid(), number)
        return rollout(*inputs)

    return interrupted


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(run_script, tmp_path, monkeypatch, finished, number, code):
    """--save_steps is 0; the step is whole; the command that is named goes on; the end is that of an uninterrupted run."""
    previous = signal.signal(number, signal.SIG_DFL)  # in the background of a script SIGINT is ignored, under nohup SIGHUP
    try:
        with monkeypatch.context() as patch:
            patch.setattr(grpo, "rollout", interrupting([number]))
            got, out, err = run_script(grpo, *SMALL)
    finally:
        signal.signal(number, previous)
    assert got == code and "the trained model" not in out
    assert [path.name for path in checkpoints.complete_checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    assert err.strip().splitlines()[-1].endswith("interrupted after step 2; go on with: python "
                                                 f"{grpo.__file__} --resume_from_checkpoint run")
    assert run_script(grpo, "--resume_from_checkpoint", "run")[0] == 0
    assert metrics(tmp_path / "run") == metrics(finished)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()


def test_a_signal_that_nohup_ignores_stays_ignored_after_another_one(run_script, monkeypatch):
    previous = [signal.signal(signal.SIGHUP, signal.SIG_IGN), signal.signal(signal.SIGTERM, signal.SIG_DFL)]
    try:
        rollout, seen = interrupting([signal.SIGTERM]), []
        monkeypatch.setattr(grpo, "rollout", lambda *inputs: (rollout(*inputs), seen.append(signal.getsignal(signal.SIGHUP)))[0])
        assert run_script(grpo, *SMALL)[0] == 143 and seen[-1] == signal.SIG_IGN  # during the run: `launch` restores all
    finally:
        for number, handler in zip((signal.SIGHUP, signal.SIGTERM), previous):
            signal.signal(number, handler)


def test_a_signal_that_comes_while_the_ranks_agree_is_not_lost(run_script, tmp_path, monkeypatch):
    """It comes after its rank has told the others that none had come, and ends the run at the next time they agree."""
    gather, asked = ranks.all_gather_list, []

    def interrupted(items):
        gathered = gather(list(items))
        if items == [None]:
            asked.append(1)
            if len(asked) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
        return gathered

    monkeypatch.setattr(ranks, "all_gather_list", interrupted)
    code, _, err = run_script(grpo, *SMALL)
    assert code == 143 and "interrupted after step 3" in err.strip().splitlines()[-1]
    assert [path.name for path in checkpoints.complete_checkpoints(tmp_path / "run")] == ["checkpoint-3"]


def test_a_second_ctrl_c_ends_a_real_process_at_once(tmp_path):
    """In the middle of a step of 16384 rows, with no checkpoint; the first one has said so."""
    code = ("import runpy, signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"  # as in a terminal, wherever this runs
            "sys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')")
    process = processes.start("-c", code, ROOT / "grpo.py", *SMALL, "--prompts_per_step", 64, "--num_generations", 256, cwd=tmp_path)
    for wanted in ("training:", "once more: at once, without"):
        while wanted not in process.stderr:
            assert process.poll() is None, process.stderr
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
    assert process.wait() == -signal.SIGINT  # a shell shows 130
    assert checkpoints.checkpoints(tmp_path / "run") == [] and "go on with" not in process.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_evaluation_says_no_word_of_resuming(run_script, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(common, "evaluate", interrupt)
    code, _, err = run_script(eval_script, "--task", "diary", "--eval_problems", 2)
    assert code == 130 and err.strip().splitlines()[-1] == "eval.py: interrupted" and "resume" not in err


@pytest.mark.parametrize("output", ["closed pipe", "full disk", "closed"])
def test_output_that_cannot_be_written_does_not_end_a_run(tmp_path, finished, output):
    """As `grpo.py | head -1`, `> /dev/full` and `>&-`: what would have been printed is lost, the log and the weights are not."""
    if output == "closed":  # from the start on
        done = subprocess.run([sys.executable, ROOT / "grpo.py", *map(str, SMALL)], cwd=tmp_path, check=False,
                              preexec_fn=lambda: (os.close(1), os.close(2)))
    else:
        code = ("import os, runpy, sys\nreader, writer = os.pipe()\nos.close(reader)\n"
                "target = writer if sys.argv[1] == 'closed pipe' else os.open('/dev/full', os.O_WRONLY)\n"
                "os.dup2(target, 1), os.dup2(target, 2)\nsys.argv = sys.argv[2:]\nrunpy.run_path(sys.argv[0], run_name='__main__')")
        done = processes.run("-c", code, output, ROOT / "grpo.py", *SMALL, cwd=tmp_path)
    assert done.returncode == 0
    assert metrics(tmp_path / "run") == metrics(finished)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()


def test_bad_input_keeps_its_exit_code_when_nobody_reads_it(tmp_path):
    code = ("import os, runpy, sys\nos.dup2(os.open('/dev/full', os.O_WRONLY), 2)\n"
            "sys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')")
    assert processes.run("-c", code, ROOT / "grpo.py", "--max_steps", 0, cwd=tmp_path, TAKE_DOWN="1").returncode == 2
