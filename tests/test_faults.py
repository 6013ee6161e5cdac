"""Does a run survive what goes wrong around it: torn checkpoints, signals, a full disk, a second process, bad numbers, hostile files?"""

import ast
import contextlib
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import common
import eval as eval_script
import grpo
import luffy
import parallel
import prefixrl
import repo
import runs
import sft

ROOT = Path(grpo.__file__).parent
SMALL = ("--task", "diary", "--prompts_per_step", 2, "--num_generations", 4, "--num_hard", 4, "--num_easy", 4, "--eval_steps", 0,
         "--max_steps", 4, "--save_completions_steps", 1, "--max_completion_length", 24, "--learning_rate", 1e-3, "--output_dir", "run")
SCRIPTS = {"grpo": grpo, "repo": repo, "luffy": luffy, "prefixrl": prefixrl, "sft": sft}


def metrics(folder):
    """metrics.jsonl without clocks, as strict JSON."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line, parse_constant=pytest.fail).items() if "time" not in key} for line in lines]


def the_error(err, script="grpo.py"):
    """The one line of an error."""
    assert "Traceback" not in err
    line = err.strip().splitlines()[-1]
    assert line.startswith(f"{script}: error: ")
    return line


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run folder with checkpoints 2, 3 and 4, and all that it printed."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["grpo.py", *map(str, SMALL), "--save_steps", "1", "--save_total_limit", "3"])
        grpo.main()
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path):
    """A copy of that run, as a kill in its last step leaves it: checkpoints 2 and 3, no model."""
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    (tmp_path / "run" / "model.safetensors").unlink()
    return tmp_path / "run"


# ---------------------------------------------------------------- torn checkpoints


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    """The same size, one bit of another value."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


TEARS = {
    "no weights": lambda c: (c / "model.safetensors").unlink(),
    "cut weights": lambda c: truncate(c / "model.safetensors"),
    "changed weights": lambda c: flip(c / "model.safetensors"),
    "no optimizer": lambda c: (c / "optimizer.pt").unlink(),
    "cut optimizer": lambda c: truncate(c / "optimizer.pt"),
    "no tokenizer": lambda c: (c / "tokenizer.json").unlink(),
    "no state": lambda c: (c / "state.json").unlink(),
    "garbage state": lambda c: (c / "state.json").write_bytes(b"\x00\xff\x1b[2J"),
    "deep state": lambda c: (c / "state.json").write_text("[" * 100_000),
    "another state": lambda c: (c / "state.json").write_text('{"step": 3}'),
    "a file": lambda c: (shutil.rmtree(c), c.write_text("")),
    "empty": lambda c: [file.unlink() for file in c.iterdir()],
}


@pytest.mark.parametrize("tear", TEARS)
def test_a_torn_checkpoint_is_seen(run, capsys, tear):
    assert runs.find_checkpoint("latest", str(run), "grpo.py")[1].name == "checkpoint-3"
    TEARS[tear](run / "checkpoint-3")
    assert runs.find_checkpoint("latest", str(run), "grpo.py")[1].name == "checkpoint-2"
    printed = capsys.readouterr().out
    assert printed.startswith(f"skipping {run}/checkpoint-3, which is torn: ") and printed.count("\n") == 1 and "\x1b" not in printed
    with pytest.raises(common.BadArgument, match="checkpoint-3( is torn: |$)"):
        runs.find_checkpoint(str(run / "checkpoint-3"), None, "grpo.py")


def test_from_the_checkpoint_before_a_torn_one_it_ends_bit_equal(run_script, run, finished):
    """And what a kill left half-written is gone; the torn one is written anew."""
    truncate(run / "checkpoint-3" / "optimizer.pt")
    for name in (".checkpoint-4.tmp", ".model.tmp", ".checkpoint-1.old.tmp"):
        (run / name).mkdir()
        (run / name / "model.safetensors").write_text("half")
    (run / ".metrics.jsonl.tmp").write_text("half")
    code, out, err = run_script(grpo, "--output_dir", "run", "--resume_from_checkpoint")
    assert code == 0, err
    assert "skipping run/checkpoint-3" in out and "resuming run/checkpoint-2" in out
    assert metrics(run) == metrics(finished)
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in finished.iterdir())
    for name in ("model.safetensors", "checkpoint-3/optimizer.pt", "completions/step-000004.jsonl"):
        assert (run / name).read_bytes() == (finished / name).read_bytes()


def test_a_named_torn_checkpoint_or_an_older_one_is_an_error(run_script, run):
    code, _, err = run_script(grpo, "--resume_from_checkpoint", "run/checkpoint-2")
    assert code == 2 and "run/checkpoint-2: the run has later checkpoints, up to run/checkpoint-3: remove them first" in the_error(err)
    truncate(run / "checkpoint-3" / "model.safetensors")
    code, _, err = run_script(grpo, "--resume_from_checkpoint", "run/checkpoint-3")
    assert code == 2 and "run/checkpoint-3 is torn: model.safetensors is not as it was written" in the_error(err)
    truncate(run / "checkpoint-2" / "model.safetensors")
    code, _, err = run_script(grpo, "--resume_from_checkpoint", "run")
    assert code == 2 and "no checkpoint in run is complete" in the_error(err)


def test_the_limit_never_takes_the_only_complete_checkpoint(tiny, tmp_path):
    """A torn later one does not count as one that is kept."""
    model, tokenizer = tiny
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)

    def save(step):
        runs.save_checkpoint(tmp_path, step, model, tokenizer, optimizer, scheduler, common.Flops.of(model), total_limit=1)

    save(1)
    save(3)
    assert [path.name for path in runs.checkpoints(tmp_path)] == ["checkpoint-3"]
    (tmp_path / "checkpoint-9").mkdir()
    (tmp_path / "checkpoint-9" / "state.json").write_text("{")
    save(4)
    assert [path.name for path in runs.complete_checkpoints(tmp_path)] == ["checkpoint-4"]
    truncate(tmp_path / "checkpoint-4" / "optimizer.pt")
    save(5)
    save(4)  # over the torn one; it is now the older of two
    assert [path.name for path in runs.complete_checkpoints(tmp_path)] == ["checkpoint-5"]


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


# ---------------------------------------------------------------- resuming without a checkpoint


def test_a_bare_resume_starts_a_run_that_is_not_there_and_one_that_has_no_checkpoint_yet(run_script, tmp_path):
    """The same command in a loop needs no first time; the run is that of the same flags without it."""
    flags = (*SMALL, "--max_steps", 2, "--eval_steps", 2, "--eval_problems", 1)
    assert run_script(grpo, *flags, "--output_dir", "plain")[0] == 0
    for seen in (False, True):
        if seen:  # as a kill in step 2 leaves it
            for file in (*(tmp_path / "run").glob("*.safetensors"), tmp_path / "run" / "curve.png"):
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


# ---------------------------------------------------------------- Ctrl-C and SIGTERM


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


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(run_script, tmp_path, monkeypatch, finished, number, code):
    """--save_steps is 0; the step is whole; the command that is named goes on; the end is that of an uninterrupted run."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background of a script it is ignored
    try:
        with monkeypatch.context() as patch:
            patch.setattr(grpo, "rollout", interrupting([number]))
            got, out, err = run_script(grpo, *SMALL)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert got == code and "the trained model" not in out
    assert [path.name for path in runs.complete_checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    assert err.strip().splitlines()[-1].endswith("interrupted after step 2; go on with: python "
                                                 f"{grpo.__file__} --resume_from_checkpoint run")
    assert run_script(grpo, "--resume_from_checkpoint", "run")[0] == 0
    assert metrics(tmp_path / "run") == metrics(finished)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()


def test_a_signal_that_comes_while_the_ranks_agree_is_not_lost(run_script, tmp_path, monkeypatch):
    """It comes after its rank has told the others that none had come, and ends the run at the next time they agree."""
    gather, asked = parallel.gather, []

    def interrupted(items):
        gathered = gather(list(items))
        if items == [None]:
            asked.append(1)
            if len(asked) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
        return gathered

    monkeypatch.setattr(parallel, "gather", interrupted)
    code, _, err = run_script(grpo, *SMALL)
    assert code == 143 and "interrupted after step 3" in err.strip().splitlines()[-1]
    assert [path.name for path in runs.complete_checkpoints(tmp_path / "run")] == ["checkpoint-3"]


def test_a_second_ctrl_c_ends_a_real_process_at_once(tmp_path):
    """In the middle of a step of 16384 rows, with no checkpoint; the first one has said so."""
    process = subprocess.Popen(
        [sys.executable, ROOT / "grpo.py", *map(str, SMALL), "--prompts_per_step", "64", "--num_generations", "256"], cwd=tmp_path,
        stderr=subprocess.PIPE, env=os.environ | {"HF_HUB_OFFLINE": "1"}, preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.default_int_handler))  # as in a terminal: in the background of a script it is ignored
    for wanted in (b"training:", b"once more: at once, without"):
        seen = b""
        while wanted not in seen:
            more = os.read(process.stderr.fileno(), 1000)
            assert more, seen
            seen += more
        process.send_signal(signal.SIGINT)
    _, rest = process.communicate()
    assert process.returncode == -signal.SIGINT  # a shell shows 130
    assert runs.checkpoints(tmp_path / "run") == [] and b"go on with" not in rest and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_evaluation_says_no_word_of_resuming(run_script, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(common, "evaluate", interrupt)
    code, _, err = run_script(eval_script, "--task", "diary", "--eval_problems", 2)
    assert code == 130 and err.strip().splitlines()[-1] == "eval.py: interrupted" and "resume" not in err


# ---------------------------------------------------------------- a full disk


@contextlib.contextmanager
def file_limit(size):
    """A write beyond that size of a file fails in the kernel, as on a full disk; pytest's own report, too, hence no fixture."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_ends_the_run_in_one_line_and_leaves_the_last_checkpoint(run_script, run, finished):
    for limit in (1_000_000, 2_000_000):  # too little for the weights; for the optimizer
        with file_limit(limit):
            code, _, err = run_script(grpo, "--resume_from_checkpoint", "run")
        assert code == 1, err
        assert re.search(r"cannot write run/checkpoint-4: .*File too large.*; run/checkpoint-3 is complete$", the_error(err))
        assert [path.name for path in runs.complete_checkpoints(run)] == ["checkpoint-2", "checkpoint-3"]
        assert not list(run.glob(".*.tmp")) and not (run / "checkpoint-4").exists()
    assert run_script(grpo, "--resume_from_checkpoint", "run")[0] == 0
    assert metrics(run) == metrics(finished) and (run / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()


def test_a_full_disk_at_the_final_model_and_at_the_log(run_script, tmp_path):
    with file_limit(1_000_000):
        code, _, err = run_script(grpo, *SMALL, "--max_steps", 1)
    assert code == 1 and "cannot write run: " in the_error(err) and "File too large" in the_error(err)
    assert not list((tmp_path / "run").glob(".*.tmp")) and not list((tmp_path / "run").glob("*.safetensors"))
    (tmp_path / "old.json").write_text("old")
    with pytest.raises(common.RunError, match="cannot write .*m.jsonl: File too large"), file_limit(50):
        runs.append_jsonl(tmp_path / "m.jsonl", [{"text": "x" * 100}])
    with pytest.raises(common.RunError, match="cannot write .*old.json: File too large"), file_limit(50):
        runs.write_atomically(tmp_path / "old.json", "x" * 100)
    assert (tmp_path / "old.json").read_text() == "old" and not (tmp_path / ".old.json.tmp").exists()
    with pytest.raises(RuntimeError, match="other"), runs.writing(tmp_path / "x"):  # what is no failure to write stays what it is
        raise RuntimeError("other")


# ---------------------------------------------------------------- two processes


def test_a_second_process_is_refused_until_the_first_is_dead(run_script, run, tmp_path):
    (tmp_path / "fresh").mkdir()
    code = ("import runs, sys, time\nfrom pathlib import Path\nfor name in sys.argv[1:]: runs.lock(Path(name))\n"
            "print('locked', flush=True)\ntime.sleep(600)")
    other = subprocess.Popen([sys.executable, "-c", code, run, tmp_path / "fresh"], stdout=subprocess.PIPE, text=True,
                             env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert other.stdout.readline() == "locked\n"
    before = (run / "metrics.jsonl").read_bytes()
    for flags in (["--resume_from_checkpoint", "run"], ["--output_dir", "run", "--resume_from_checkpoint"],
                  [*SMALL, "--output_dir", "fresh"], [*SMALL, "--output_dir", "fresh", "--resume_from_checkpoint"]):
        code, _, err = run_script(grpo, *flags)
        assert code == 2 and f"is in use by process {other.pid} on " in the_error(err)
    assert (run / "metrics.jsonl").read_bytes() == before and [path.name for path in (tmp_path / "fresh").iterdir()] == [runs.LOCK]
    other.kill()
    other.communicate()
    assert run_script(grpo, "--resume_from_checkpoint", "run")[0] == 0


def test_where_there_are_no_locks_it_says_so_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs.fcntl, "lockf", lambda *_: (_ for _ in ()).throw(OSError(37, "No locks available")))
    runs.lock(tmp_path)
    assert "cannot be locked (No locks available)" in capsys.readouterr().out


def test_a_folder_that_was_taken_after_the_flags_were_checked_is_refused(tiny, tmp_path):
    args = grpo.Args(output_dir=str(tmp_path / "run"))
    runs.open_run(args, "grpo.py", tiny[0], [], [])
    with pytest.raises(common.BadArgument, match="is in use: choose another"):
        runs.open_run(args, "grpo.py", tiny[0], [], [])


# ---------------------------------------------------------------- numbers


def poisoned(module, patch, bad):
    """Make `policy_loss` of a script go wrong in the calls for which `bad(number)` is a value, which is then added to the loss."""
    policy_loss, calls = module.policy_loss, []

    def wrong(logps, *inputs, **more):
        loss, means = policy_loss(logps, *inputs, **more)
        calls.append(1)
        value = bad(len(calls))
        return (loss if value is None else loss + value if math.isinf(value) else loss + (logps * value).sum()), means

    patch.setattr(module, "policy_loss", wrong)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["gradient", "loss alone"])
def test_a_bad_step_leaves_weights_and_moments_as_they_were(tiny, batch_of, mixed_triples, monkeypatch, value, capsys):
    model, batch = tiny[0], batch_of(mixed_triples, 4)
    optimizer, flops = torch.optim.AdamW(model.parameters(), lr=1e-3), common.Flops.of(model)
    args = grpo.Args(num_generations=4, num_minibatches=2)
    batch.old_logps = grpo.score_rows(model, batch, args, flops)
    grpo.update(model, optimizer, batch, args, flops)
    before = [value.clone() for value in model.parameters()], json.dumps(optimizer.state_dict(), default=torch.Tensor.tolist)
    poisoned(grpo, monkeypatch, lambda call: value)
    metrics = grpo.update(model, optimizer, batch, args, flops)
    assert metrics["skipped_updates"] == 2 and not math.isfinite(metrics["loss"])
    assert all(torch.equal(old, new) for old, new in zip(before[0], model.parameters()))
    assert json.dumps(optimizer.state_dict(), default=torch.Tensor.tolist) == before[1]
    assert all(math.isfinite(spent) for spent in flops.spent.values())
    assert capsys.readouterr().out.count("this optimizer step is skipped") == 2
    monkeypatch.undo()
    poisoned(grpo, monkeypatch, lambda call: value if call == 1 else None)
    assert grpo.update(model, optimizer, batch, args, flops)["skipped_updates"] == 1  # the other minibatch trains


@pytest.mark.parametrize("name", SCRIPTS)
def test_bad_steps_in_a_row_end_the_run_with_a_dump_and_a_checkpoint(run_script, tmp_path, monkeypatch, name, tiny):
    poisoned(SCRIPTS[name], monkeypatch, lambda call: float("nan"))
    place = SMALL.index("--num_generations")
    flags = SMALL[:place] + SMALL[place + 2 :] if name == "sft" else (*SMALL, "--no_drop_zero_variance")
    code, _, err = run_script(SCRIPTS[name], *flags, "--max_completion_length", 64, "--max_steps", 9, "--max_bad_steps", 2)
    assert code == 1, err
    assert "not finite in 2 steps in a row (--max_bad_steps): run/bad_step-2.pt" in the_error(err, f"{name}.py")
    assert [record["step"] for record in metrics(tmp_path / "run")] == [1, 2]
    assert {record[key] for record in metrics(tmp_path / "run") for key in ("loss", "grad_norm")} == {None}
    dump = torch.load(tmp_path / "run" / "bad_step-2.pt", weights_only=True)
    rows = 2 if name == "sft" else 8
    assert dump["step"] == 2 and math.isnan(dump["loss"]) and math.isnan(dump["grad_norm"])
    assert len(dump["prompts"]) == len(dump["completions"]) == len(dump["rewards"]) == len(dump["advantages"]) == rows
    assert dump["prompt_ids"].shape[0] == dump["completion_mask"].shape[0] == rows and dump["prompts"][0].startswith("Q:")
    (checkpoint,) = runs.complete_checkpoints(tmp_path / "run")
    saved = load_file(checkpoint / "model.safetensors")
    assert all(torch.equal(saved[key], value.cpu()) for key, value in tiny[0].state_dict().items() if key in saved)


def test_bad_steps_that_are_not_in_a_row_do_not_end_the_run(run_script, tmp_path, monkeypatch):
    poisoned(grpo, monkeypatch, lambda call: float("nan") if call % 2 else None)
    code, _, err = run_script(grpo, *SMALL, "--max_bad_steps", 2, "--no_drop_zero_variance")
    assert code == 0, err
    assert [record["skipped_updates"] for record in metrics(tmp_path / "run")] == [1, 0, 1, 0]


@pytest.fixture
def ends_at_once(tiny, tmp_path):
    """The tiny model with every token an EOS: each completion is empty."""
    model, tokenizer = tiny
    model.generation_config.eos_token_id = list(range(model.config.vocab_size))
    runs.save_model(tmp_path, model, tokenizer)
    for file in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (tmp_path / "mute").mkdir(exist_ok=True)
        (tmp_path / file).rename(tmp_path / "mute" / file)
    return "mute"


@pytest.mark.parametrize("case", ["all cut off", "cut off and masked", "empty completions", "group of one"])
def test_nothing_to_learn_from_is_no_error_and_leaves_no_nan(run_script, tmp_path, ends_at_once, case):
    flags = {"all cut off": ("--max_completion_length", 1), "group of one": ("--num_generations", 1, "--scale_rewards", "none"),
             "cut off and masked": ("--max_completion_length", 1, "--mask_truncated_completions", "--no_drop_zero_variance"),
             "empty completions": ("--model", ends_at_once)}[case]
    code, out, err = run_script(grpo, *SMALL, *flags, "--max_steps", 21 if case == "all cut off" else 2, "--eval_steps", 2,
                                "--eval_problems", 1)
    assert code == 0, err
    for record in metrics(tmp_path / "run")[1:]:  # as strict JSON
        assert record["skipped_updates"] == 0 and record["grad_norm"] == 0.0 and record["frac_reward_zero_std"] == 1.0
        assert record["entropy"] is None or case == "cut off and masked" and record["entropy"] == 0 or record["frac_rows_trained"] > 0
    if case == "empty completions":
        lines = (tmp_path / "run" / "completions" / "step-000001.jsonl").read_text().splitlines()
        assert all(json.loads(line)["completion"] == "" and json.loads(line)["ended"] for line in lines)
    warnings = [line for line in (out + err).splitlines() if line.startswith("warning: the reward was 0 in each of the last 20 steps")]
    assert len(warnings) == (case == "all cut off")
    assert all("100% of the completions are cut off (--max_completion_length)" in line for line in warnings)


def test_the_warning_of_no_reward_comes_once_and_never_for_sft(tmp_path, capsys):
    def warnings(rewards, **more):
        log = runs.RunLog(tmp_path, grpo.Args())
        for reward in rewards:
            rewarded = {} if reward is None else {"reward": reward}
            log.watch({"skipped_updates": 0, "completions/clipped_ratio": 0.0} | rewarded | more, [], None, [])
        return capsys.readouterr().out.count("warning: the reward was 0")

    assert warnings([0.0] * 19 + [0.1] + [0.0] * 19) == 0 and warnings([0.0] * 60) == 1
    assert warnings([None] * 40) == 0 and warnings([0.5] * 20, **{"onpolicy/reward": 0.0}) == 1  # LUFFY's teacher is always right


# ---------------------------------------------------------------- files of others


class Malice:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


def test_the_malicious_pickle_is_one(tmp_path):
    pickle.loads(pickle.dumps(Malice(tmp_path / "marker"))).close()
    assert (tmp_path / "marker").exists()


def test_a_malicious_optimizer_is_refused(run_script, run, tmp_path):
    """Also where its hash is right."""
    checkpoint = run / "checkpoint-3"
    torch.save({"optimizer": Malice(tmp_path / "marker"), "scheduler": {}}, checkpoint / "optimizer.pt")
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").unlink()
    runs.seal(checkpoint, state)
    code, _, err = run_script(grpo, "--resume_from_checkpoint", "run")
    assert code == 2 and "run/checkpoint-3: optimizer.pt is refused: it is no file of plain tensors" in the_error(err)
    assert not (tmp_path / "marker").exists()


def test_weights_of_another_model_are_refused_in_one_line(run_script, run):
    shutil.copy(run / "checkpoint-3" / "optimizer.pt", run / "checkpoint-3" / "model.safetensors")
    (run / "checkpoint-3" / "state.json").write_text((run / "checkpoint-2" / "state.json").read_text().replace('"step": 2', '"step": 3'))
    state = json.loads((run / "checkpoint-3" / "state.json").read_text())
    (run / "checkpoint-3" / "state.json").unlink()
    runs.seal(run / "checkpoint-3", state)
    code, _, err = run_script(grpo, "--resume_from_checkpoint", "run")
    assert code == 2 and "run/checkpoint-3 does not fit: " in the_error(err)


def test_a_malicious_model_is_refused(run_script, tmp_path):
    shutil.copytree(ROOT / "tiny_model", tmp_path / "evil", ignore=shutil.ignore_patterns("*.safetensors", "traces"))
    torch.save({"model.norm.weight": Malice(tmp_path / "marker")}, tmp_path / "evil" / "pytorch_model.bin")
    for script in (grpo, eval_script):
        code, _, err = run_script(script, "--model", "evil")
        assert code == 2 and "--model_name_or_path evil: its weights are refused" in the_error(err, Path(script.__file__).name)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("script", [*SCRIPTS.values(), eval_script], ids=lambda script: script.__name__)
def test_code_of_a_model_runs_only_when_it_is_trusted(run_script, tmp_path, script):
    shutil.copytree(ROOT / "tiny_model", tmp_path / "coded")
    config = json.loads((tmp_path / "coded" / "config.json").read_text())
    (tmp_path / "coded" / "config.json").write_text(json.dumps(config | {
        "model_type": "coded", "auto_map": {"AutoConfig": "code.Coded", "AutoModelForCausalLM": "code.CodedModel"}}))
    (tmp_path / "coded" / "code.py").write_text(
        f"open({str(tmp_path / 'marker')!r}, 'w').close()\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Coded(LlamaConfig):\n    model_type = 'coded'\nclass CodedModel(LlamaForCausalLM):\n    config_class = Coded\n")
    flags = ("--model", "coded", *(() if script is eval_script else ("--dry_run",)))
    code, _, err = run_script(script, *flags)
    assert code == 2 and "--model_name_or_path coded: " in the_error(err, Path(script.__file__).name)
    assert not (tmp_path / "marker").exists()
    if script is grpo:
        assert run_script(script, *flags, "--trust_remote_code")[0] == 0
        assert (tmp_path / "marker").exists()


def test_flags_that_run_code_are_not_taken_from_a_run_folder(run_script, run, tmp_path):
    record = json.loads((run / "args.json").read_text())
    (tmp_path / "evil.py").write_text(
        f"open({str(tmp_path / 'marker')!r}, 'w').close()\ndef f(completions, **_): return [0] * len(completions)")
    for name, value in (("reward_fn", "evil.py:f"), ("trust_remote_code", True)):
        (run / "args.json").write_text(json.dumps(record | {"args": record["args"] | {name: value}}))
        code, _, err = run_script(grpo, "--resume_from_checkpoint", "run")
        assert code == 2 and f"the run has --{name}, which runs code" in the_error(err)
    assert not (tmp_path / "marker").exists()
    (run / "args.json").write_text("[" * 100_000)
    code, _, err = run_script(grpo, "--resume_from_checkpoint", "run")
    assert code == 2 and "run/args.json cannot be read" in the_error(err)


def test_no_escape_of_a_file_reaches_the_terminal(run_script, tmp_path):
    """Prompts, gold answers, difficulties, column names and model output, in training, its curve, evaluation and errors."""
    escape = "\x1b]0;owned\x07\x1b[2J$\\frac$\x00\ud800"
    rows = [{"prompt": f"Q: {escape}", "answer": "3", "difficulty": escape}, {"prompt": "Q:", "answer": "3", "difficulty": "b"},
            {"prompt": "A:", "answer": "3", "difficulty": escape}, {"prompt": "x", "answer": "", "difficulty": escape}]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row).replace("\\ud800", "") + "\n" for row in rows))
    (tmp_path / "bad.jsonl").write_text(json.dumps({"a\x1b]0;owned\x07": 1}) + "\n")
    small = ("--dataset_name", "d.jsonl", "--max_completion_length", 8)
    code, out, err = run_script(grpo, *small, "--eval_dataset_name", "d.jsonl", "--eval_dataset_split", "train", "--max_steps", 2,
                                "--num_generations", 2, "--prompts_per_step", 2, "--output_dir", "run")
    assert code == 0 and "owned" in err and (tmp_path / "run" / "curve.png").exists(), err
    printed = [out + err]
    for script, flags in ((eval_script, (*small, "--num_generations_eval", 2)), (grpo, ("--dataset_name", "bad.jsonl")),
                          (grpo, (*small, "--dry_run", "--system_prompt", escape[:-2]))):
        _, out, err = run_script(script, *flags)
        printed.append(out + err)
        assert "owned" in printed[-1]
    assert not any(re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", text) for text in printed)


def test_completions_with_any_text_can_be_written_and_read(tmp_path):
    text = "\ud800\x00\x1b[2J\u2028\n\u202e"
    batch = types.SimpleNamespace(ended=torch.tensor([True]), rewards=torch.tensor([math.nan]), advantages=torch.tensor([0.0]))
    log = runs.RunLog(tmp_path, grpo.Args(save_completions_steps=1))
    log.step({"step": 1, "loss": 0.0, "skipped_updates": 0, text: 1}, [{"prompt": text, "answer": text}], batch, [text])
    (line,) = (tmp_path / "completions" / "step-000001.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "prompt": text, "answer": text, "completion": text, "ended": True, "reward": None, "advantage": 0.0}
    assert text in runs.read_metrics(tmp_path)[0]


def test_no_script_evaluates_what_a_file_holds():
    """No eval, exec or pickle, no shell, no torch.load of more than tensors; a file is run as code in one place, --reward_fn."""
    run_as_code = []
    for path in (*ROOT.glob("*.py"), *(ROOT / "bench").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name, keywords = ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                where = f"{path.name}:{node.lineno} {name}"
                assert name not in ("eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads"), where
                assert name != "torch.load" or keywords.get("weights_only") == "True", where
                assert "shell" not in keywords, where
                assert path.parent != ROOT or not name.startswith("Auto") or keywords.keys() & {"trust_remote_code", None}, where
                run_as_code += [path.name] * name.endswith("exec_module")
    assert run_as_code == ["reward.py"]


# ---------------------------------------------------------------- the table


def test_every_test_that_the_table_of_faults_names_exists():
    table = (ROOT / "docs" / "reliability.md").read_text()
    named = set(re.findall(r"`(tests/test_\w+\.py)::(test_\w+)`", table))
    assert len(named) > 20
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text(), (file, test)
    rows = [line for line in table.split("\n**A checkpoint**")[0].splitlines() if line.startswith("|")][2:]
    assert len(rows) > 20 and all("::test_" in row for row in rows)
