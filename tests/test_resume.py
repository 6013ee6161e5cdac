"""Does a resumed run end bit-equal to the run that was never stopped?"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import eval as eval_script
import grpo
import sft
from engine import models

SMALL = ("--task", "diary", "--prompts_per_step", 4, "--num_generations", 4, "--num_hard", 4, "--num_easy", 12, "--eval_problems", 4,
         "--eval_steps", 2, "--save_steps", 2, "--max_steps", 4, "--learning_rate", 1e-3, "--save_completions_steps", 1,
         "--max_completion_length", 24, "--temperature", 1.5)
CLOCKS = ("step_time", "time/rollout", "time/update")


def metrics(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in CLOCKS} for record in records]


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("extra", [
    (), ("--num_iterations", 2, "--num_minibatches", 2, "--lr_scheduler_type", "cosine", "--warmup_steps", 1, "--beta", 0.01)])
def test_resumed_run_is_bit_equal(run_script, tmp_path, extra):
    assert run_script(grpo, *SMALL, *extra, "--output_dir", "whole")[0] == 0
    # Take the run apart as a kill after step 3 would leave it: a later line in metrics.jsonl, no later checkpoint, no final model.
    (tmp_path / "whole").rename(tmp_path / "cut")
    expected_metrics, expected_weights = metrics(tmp_path / "cut"), weights(tmp_path / "cut")
    for name in ("checkpoint-4", "model.safetensors"):
        (tmp_path / "cut" / name).rename(tmp_path / name)
    lines = (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut" / "metrics.jsonl").write_text("".join(lines[:4]) + lines[4][:50])  # steps 0, 1, 2, 3 and a torn line

    code, out, err = run_script(grpo, "--resume_from_checkpoint", "cut")  # all other flags come from args.json
    assert code == 0, err
    assert "resuming cut/checkpoint-2" in out and "changed flags" not in out
    assert metrics(tmp_path / "cut") == expected_metrics
    assert [record["step"] for record in expected_metrics] == [0, 1, 2, 3, 4] and expected_metrics[3]["grad_norm"] > 0
    resumed = weights(tmp_path / "cut")
    assert resumed.keys() == expected_weights.keys()
    assert all(torch.equal(resumed[name], expected_weights[name]) for name in resumed)


def test_resuming_can_go_further_and_names_changed_flags(run_script, tmp_path):
    assert run_script(grpo, *SMALL, "--output_dir", "run", "--max_steps", 2)[0] == 0
    code, out, err = run_script(grpo, "--output_dir", "run", "--resume_from_checkpoint", "--max_steps", 3)
    assert code == 0, err
    assert "resuming run/checkpoint-2 with changed flags: --max_steps 2 -> 3" in out
    assert [record["step"] for record in metrics(tmp_path / "run")] == [0, 1, 2, 3]
    assert json.loads((tmp_path / "run" / "args.json").read_text())["args"]["max_steps"] == 3


def test_a_changed_rate_or_decay_acts_from_the_first_resumed_step(run_script, tmp_path):
    """The weights of the next step are those that AdamW takes with the new flags, not with those of the checkpoint."""
    assert run_script(grpo, *SMALL, "--eval_steps", 0, "--output_dir", "as before", "--max_steps", 2)[0] == 0
    for name in ("rate", "decay"):
        shutil.copytree(tmp_path / "as before", tmp_path / name)
    for name, flags in (("as before", ()), ("rate", ("--learning_rate", 1e-2)), ("decay", ("--weight_decay", 10.0))):
        assert run_script(grpo, "--output_dir", name, "--resume_from_checkpoint", "--max_steps", 3, *flags)[0] == 0
    assert [metrics(tmp_path / name)[-1]["learning_rate"] for name in ("as before", "rate", "decay")] == [1e-3, 1e-2, 1e-3]
    before, rate, decay = (weights(tmp_path / name)["model.norm.weight"] for name in ("as before", "rate", "decay"))
    start = load_file(tmp_path / "as before" / "checkpoint-2" / "model.safetensors")["model.norm.weight"]
    torch.testing.assert_close(rate - start, 10 * (before - start), atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(before - decay, 1e-3 * 10.0 * start, atol=1e-6, rtol=1e-3)


def test_two_equal_runs_are_bit_equal_and_another_seed_is_not(run_script, tmp_path):
    for folder, seed in (("a", 5), ("b", 5), ("c", 6)):
        assert run_script(grpo, *SMALL, "--max_steps", 2, "--seed", seed, "--output_dir", folder)[0] == 0
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b") != metrics(tmp_path / "c")


def test_resume_refuses_what_it_cannot_resume(run_script, tmp_path):
    code, _, err = run_script(grpo, "--resume_from_checkpoint", "nowhere")
    assert code == 2 and err.count("\n") == 1 and "no checkpoint in nowhere" in err
    folder = tmp_path / "bare" / "checkpoint-2"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text("{}")
    code, _, err = run_script(grpo, "--resume_from_checkpoint", "bare")
    assert code == 2 and "bare has no args.json" in err
    code, _, err = run_script(grpo, "--resume_from_checkpoint")
    assert code == 2 and "name the run folder, or give --output_dir" in err
    folder = tmp_path / "other" / "checkpoint-2"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text("{}")
    (tmp_path / "other" / "args.json").write_text(json.dumps({"script": "luffy.py", "args": {}}))
    code, _, err = run_script(grpo, "--resume_from_checkpoint", "other")
    assert code == 2 and "is a run of luffy.py" in err
    code, _, err = run_script(grpo, "--resume_from_checkpoint", "other", "--output_dir", "elsewhere")
    assert code == 2 and "--output_dir elsewhere: --resume_from_checkpoint other goes on in other" in err


def test_what_a_resumed_run_does_not_know_or_has_in_another_version_is_told(run_script, tmp_path):
    run_script(grpo, *SMALL, "--max_steps", 2, "--output_dir", "run")
    record = json.loads((tmp_path / "run" / "args.json").read_text())
    for changes, code, expected in (
            ({"args": record["args"] | {"my_flag": 5}}, 2, "unknown key my_flag"),
            ({"versions": record["versions"] | {"torch": "2.8.0"}, "ranks": 8}, 0,
             f"bits: torch 2.8.0 -> {torch.__version__}, ranks 8 -> 1"),
            ({"versions": ["2.8.0"]}, 0, "resuming run/checkpoint-2"),
            ({"data": record["data"] | {"eval": {"rows": 1, "sha256": "0"}}}, 0, "the evaluation rows are not those that run has had")):
        (tmp_path / "run" / "args.json").write_text(json.dumps(record | changes))
        got, out, err = run_script(grpo, "--resume_from_checkpoint", "run")
        assert got == code and expected in out + err, (out, err)


def test_a_run_is_not_resumed_with_fewer_steps_than_it_has_taken(run_script, tmp_path):
    run_script(grpo, *SMALL, "--max_steps", 2, "--output_dir", "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    code, _, err = run_script(grpo, "--resume_from_checkpoint", "run", "--max_steps", 1)
    assert code == 2 and err == "grpo.py: error: --max_steps 1 is less than the 2 steps of --resume_from_checkpoint run/checkpoint-2\n"
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_run_resumed_from_another_folder_uses_the_files_it_began_with(run_script, tmp_path, monkeypatch):
    """Also where that folder has others under the same relative paths; and another file that is named now is a changed flag."""
    problem = {"prompt": "Q: Pia has 2 stamps , Mon gets 3 . How many ? A:", "answer": "5"}
    for place, answer in (("a", "5"), ("b", "7")):
        shutil.copytree(Path(grpo.__file__).parent / "tiny_model", tmp_path / place / "m", ignore=shutil.ignore_patterns("traces"))
        (tmp_path / place / "d.jsonl").write_text(json.dumps(problem | {"answer": answer}) + "\n")
    (tmp_path / "b" / "m" / "config.json").write_text("another model")
    flags = ("--dataset_name", "d.jsonl", "--model", "m", "--prompts_per_step", 1, "--num_generations", 2, "--max_completion_length", 8)
    monkeypatch.chdir(tmp_path / "a")
    for output in ("whole", "cut"):
        assert run_script(grpo, *flags, "--save_steps", 1, "--max_steps", 2, "--save_completions_steps", 1, "--output_dir", output)[0] == 0
    shutil.rmtree("cut/checkpoint-2")
    monkeypatch.chdir(tmp_path / "b")
    code, out, err = run_script(grpo, "--resume_from_checkpoint", "../a/cut")
    assert code == 0 and "changed flags" not in out, err
    assert metrics(tmp_path / "a" / "cut") == metrics(tmp_path / "a" / "whole")
    lines = (tmp_path / "a" / "cut" / "completions" / "step-000002.jsonl").read_text().splitlines()
    assert {json.loads(line)["answer"] for line in lines} == {"5"}
    shutil.rmtree(tmp_path / "a" / "cut" / "checkpoint-2")
    code, out, _ = run_script(grpo, "--resume_from_checkpoint", "../a/cut", "--dataset_name", "d.jsonl")
    assert code == 0 and f"--dataset_name {tmp_path}/a/d.jsonl -> {tmp_path}/b/d.jsonl" in out
    (tmp_path / "a" / "d.jsonl").unlink()
    shutil.rmtree(tmp_path / "a" / "whole" / "checkpoint-2")
    code, _, err = run_script(grpo, "--resume_from_checkpoint", "../a/whole")
    assert code == 2 and f"--dataset_name {tmp_path}/a/d.jsonl: no such file" in err


def test_traces_begun_with_other_files_of_the_same_names_are_not_gone_on_with(run_script, tmp_path, monkeypatch):
    for place in ("a", "b"):
        shutil.copytree(Path(grpo.__file__).parent / "tiny_model", tmp_path / place / "m", ignore=shutil.ignore_patterns("traces"))
    flags = ("--model", "m", "--task", "diary", "--num_hard", 1, "--num_generations_eval", 2, "--max_tries", 2, "--save_traces")
    monkeypatch.chdir(tmp_path / "a")
    assert run_script(eval_script, *flags, "t.jsonl")[0] == 0
    ledger = json.loads((tmp_path / "a" / "t.ledger.json").read_text())
    (tmp_path / "a" / "t.ledger.json").write_text(json.dumps(ledger | {"done": False}))
    monkeypatch.chdir(tmp_path / "b")
    code, _, err = run_script(eval_script, *flags, "../a/t.jsonl")
    assert code == 2 and f"--model_name_or_path {tmp_path}/b/m: ../a/t.jsonl was begun with {tmp_path}/a/m" in err
    monkeypatch.chdir(tmp_path / "a")
    assert run_script(eval_script, *flags, "t.jsonl")[0] == 0


@pytest.mark.parametrize("kind, warmup, shares", [
    ("constant_with_warmup", 2, [0, 1 / 2, 1, 1]), ("linear", 1, [0, 1, 2 / 3, 1 / 3]),
    ("cosine", 0, [1, (2 + 2**0.5) / 4, 1 / 2, (2 - 2**0.5) / 4])])
def test_the_learning_rate_of_each_step_is_that_of_the_schedule(run_script, tmp_path, kind, warmup, shares):
    """As transformers has it: W steps up, then down to 0 after --max_steps; what is logged is what the step took."""
    flags = ("--eval_steps", 0, "--save_steps", 1, "--lr_scheduler_type", kind, "--warmup_steps", warmup, "--output_dir", "run")
    assert run_script(sft, "--task", "diary", "--num_hard", 4, "--num_easy", 0, "--prompts_per_step", 2, "--max_steps", 4,
                      "--save_total_limit", 4, "--learning_rate", 1e-3, *flags)[0] == 0
    assert [record["learning_rate"] for record in metrics(tmp_path / "run")] == pytest.approx([1e-3 * share for share in shares])
    base, first = (load_file(folder / "model.safetensors") for folder in (models.TINY_MODEL, tmp_path / "run" / "checkpoint-1"))
    assert all(torch.equal(first[name], weight) for name, weight in base.items()) == (shares[0] == 0)
