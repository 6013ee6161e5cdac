"""Does a run see that a checkpoint is torn, and go on from the one before?"""

import functools
import json
import math
import os
import shutil

import pytest
import torch

import grpo
from engine import BadArgument, RunError, checkpoints
from engine.flops import Flops
from faults import metrics, the_error


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
def test_a_torn_checkpoint_is_seen(cut_run, capsys, tear):
    assert checkpoints.find_checkpoint("latest", str(cut_run), "grpo.py")[1].name == "checkpoint-3"
    TEARS[tear](cut_run / "checkpoint-3")
    assert checkpoints.find_checkpoint("latest", str(cut_run), "grpo.py")[1].name == "checkpoint-2"
    printed = capsys.readouterr().out
    assert printed.startswith(f"skipping {cut_run}/checkpoint-3, which is torn: ") and printed.count("\n") == 1 and "\x1b" not in printed
    with pytest.raises(BadArgument, match="checkpoint-3( is torn: |$)"):
        checkpoints.find_checkpoint(str(cut_run / "checkpoint-3"), None, "grpo.py")


def test_from_the_checkpoint_before_a_torn_one_it_ends_bit_equal(run_script, cut_run, finished):
    """And what a kill left half-written is gone; the torn one is written anew."""
    truncate(cut_run / "checkpoint-3" / "optimizer.pt")
    for name in (".checkpoint-4.tmp", ".model.tmp", ".checkpoint-1.old.tmp"):
        (cut_run / name).mkdir()
        (cut_run / name / "model.safetensors").write_text("half")
    (cut_run / ".metrics.jsonl.tmp").write_text("half")
    code, out, err = run_script(grpo, "--output_dir", "run", "--resume_from_checkpoint")
    assert code == 0, err
    assert "skipping run/checkpoint-3" in out and "resuming run/checkpoint-2" in out
    assert metrics(cut_run) == metrics(finished)
    assert sorted(path.name for path in cut_run.iterdir()) == sorted(path.name for path in finished.iterdir())
    for name in ("model.safetensors", "checkpoint-3/optimizer.pt", "completions/step-000004.jsonl"):
        assert (cut_run / name).read_bytes() == (finished / name).read_bytes()


def test_a_named_torn_checkpoint_or_an_older_one_is_an_error(run_script, cut_run):
    code, _, err = run_script(grpo, "--resume_from_checkpoint", "run/checkpoint-2")
    assert code == 2 and "run/checkpoint-2: the run has later checkpoints, up to run/checkpoint-3: remove them first" in the_error(err)
    truncate(cut_run / "checkpoint-3" / "model.safetensors")
    code, _, err = run_script(grpo, "--resume_from_checkpoint", "run/checkpoint-3")
    assert code == 2 and "run/checkpoint-3 is torn: model.safetensors is not as it was written" in the_error(err)
    truncate(cut_run / "checkpoint-2" / "model.safetensors")
    code, _, err = run_script(grpo, "--resume_from_checkpoint", "run")
    assert code == 2 and "no checkpoint in run is complete" in the_error(err)


def test_the_limit_never_takes_the_only_complete_checkpoint(tiny, tmp_path):
    """A torn later one does not count as one that is kept."""
    model, tokenizer = tiny
    optimizer = torch.optim.AdamW(model.parameters())

    def save(step):
        checkpoints.save_checkpoint(tmp_path, step, model, tokenizer, optimizer, Flops.of(model), total_limit=1)

    save(1)
    save(3)
    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == ["checkpoint-3"]
    (tmp_path / "checkpoint-9").mkdir()
    (tmp_path / "checkpoint-9" / "state.json").write_text("{")
    save(4)
    assert [path.name for path in checkpoints.complete_checkpoints(tmp_path)] == ["checkpoint-4"]
    truncate(tmp_path / "checkpoint-4" / "optimizer.pt")
    save(5)
    save(4)  # over the torn one; it is now the older of two
    assert [path.name for path in checkpoints.complete_checkpoints(tmp_path)] == ["checkpoint-5"]


def test_the_weights_of_a_checkpoint_are_one_file_whatever_their_size(tiny, tmp_path, monkeypatch):
    """transformers cuts large ones into files that no resume finds."""
    model, tokenizer = tiny
    monkeypatch.setattr(type(model), "save_pretrained", functools.partialmethod(type(model).save_pretrained, max_shard_size="100KB"))
    checkpoints.save_checkpoint(tmp_path, 1, model, tokenizer, torch.optim.AdamW(model.parameters()), Flops.of(model), total_limit=1)
    assert [path.name for path in checkpoints.complete_checkpoints(tmp_path)] == ["checkpoint-1"]


def damage(checkpoint, state=None, moments=None):
    """Change state.json, or the moments of the optimizer, of a checkpoint, and seal it as if it had been written so."""
    record = json.loads((checkpoint / "state.json").read_text()) | (state or {})
    (checkpoint / "state.json").unlink()
    if moments is not None:
        saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
        for values in saved["optimizer"]["state"].values():
            values["exp_avg"] = moments(values["exp_avg"])
        torch.save(saved, checkpoint / "optimizer.pt")
    del record["files"]
    checkpoints.seal(checkpoint, record)


@pytest.mark.parametrize("state, moments, expected", [
    (None, lambda moment: moment[..., :1].contiguous(), "exp_avg of model.embed_tokens.weight has the shape"),
    (None, lambda moment: moment * math.nan, "exp_avg of model.embed_tokens.weight is not finite"),
    ({"step": 1}, None, "state.json is of step 1"), ({"step": 10**18}, None, "state.json is of step 1000000000000000000"),
    ({"step": -5}, None, "state.json: step: expected a whole number, got -5"),
    ({"step": None}, None, "state.json: step: expected a whole number, got None"),
    ({"step": 2.0}, None, "state.json: step: expected a whole number, got 2.0"),
    ({"num_tokens": "many"}, None, "state.json: num_tokens: expected a number, got 'many'"),
    ({"flops": {"rollout": math.inf}}, None, "state.json: flops: rollout: expected a number, got inf"),
    ({"flops": {"rollout": None}}, None, "state.json: flops: rollout: expected a number, got None"),
    ({"flops": {"rollout": math.nan}}, None, "state.json: flops: rollout: expected a number, got nan"),
    ({"flops": [1]}, None, "state.json: flops: expected a dict, got [1]"),
])
def test_what_is_loaded_is_looked_at(run_script, cut_run, state, moments, expected):
    """A sealed checkpoint may be somebody else's: shapes, numbers and the step are checked, not only bytes."""
    for checkpoint in checkpoints.checkpoints(cut_run)[:-1]:
        shutil.rmtree(checkpoint)
    checkpoint = checkpoints.checkpoints(cut_run)[-1]
    damage(checkpoint, state, moments)
    code, out, err = run_script(grpo, "--resume_from_checkpoint", str(checkpoint))
    assert code == 2 and expected in the_error(err)


def test_the_files_do_not_set_the_rate(run_script, cut_run):
    """The learning rate in optimizer.pt may be anything; that of the flags, at this step of the schedule, is trained with."""
    checkpoint = checkpoints.checkpoints(cut_run)[-1]
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    saved["optimizer"]["param_groups"][0] |= {"lr": math.nan, "betas": (2.0, 3.0), "weight_decay": 9.0}
    torch.save(saved, checkpoint / "optimizer.pt")
    damage(checkpoint)
    code, _, err = run_script(grpo, "--resume_from_checkpoint", str(checkpoint))
    assert code == 0, err
    assert metrics(cut_run)[-1]["learning_rate"] == 1e-3


def test_weights_that_are_not_finite_are_not_saved(tiny, tmp_path):
    model, tokenizer = tiny
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    optimizer = torch.optim.AdamW(model.parameters())
    for save in (lambda: checkpoints.save_model(tmp_path, model, tokenizer),
                 lambda: checkpoints.save_checkpoint(tmp_path, 1, model, tokenizer, optimizer, Flops.of(model), 1)):
        with pytest.raises(RunError, match="nothing is saved, because model.norm.weight is not finite"):
            save()
    assert checkpoints.checkpoints(tmp_path) == [] and not (tmp_path / "model.safetensors").exists()
