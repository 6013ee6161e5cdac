"""Does a run survive numbers that are not finite, and steps in which there is nothing to learn?"""

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import common
import engine
import grpo
import luffy
import prefixrl
import repo
import sft
from engine import checkpoints, models, run
from engine.flops import Flops
from engine.run_log import RunLog
from faults import SMALL, metrics, the_error

ROOT = Path(grpo.__file__).parent


@pytest.mark.parametrize("needs", [lambda: torch.empty(2**60), lambda: [0] * 2**60,
                                   lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. Tried"))])
def test_a_machine_without_enough_memory_is_told_in_one_line(needs, capsys):
    assert run.exit_code(needs, "grpo.py") == 1
    printed, said = capsys.readouterr()
    assert printed == "" and said.count("\n") == 1
    assert said.startswith("grpo.py: error: rank 0 is out of memory; docs/faq.md, question 3, says what to lower: ")


def test_another_runtime_error_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        run.exit_code(lambda: torch.ones(2, 3) @ torch.ones(2, 3), "grpo.py")
SCRIPTS = {"grpo": grpo, "repo": repo, "luffy": luffy, "prefixrl": prefixrl, "sft": sft}


def poisoned(module, patch, bad):
    """Make `policy_loss` of a script go wrong in the calls for which `bad(number)` is a value, which is then added to the loss."""
    policy_loss, calls = module.policy_loss, []

    def wrong(logps, *inputs, **more):
        loss, sums = policy_loss(logps, *inputs, **more)
        calls.append(1)
        value = bad(len(calls))
        return (loss if value is None else loss + value if math.isinf(value) else loss + (logps * value).sum()), sums

    patch.setattr(module, "policy_loss", wrong)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["gradient", "loss alone"])
def test_a_bad_step_leaves_weights_and_moments_as_they_were(tiny, batch_of, mixed_triples, monkeypatch, value, capsys):
    model, batch = tiny[0], batch_of(mixed_triples, 4)
    optimizer, flops = torch.optim.AdamW(model.parameters(), lr=1e-3), Flops.of(model)
    args = grpo.Args(num_generations=4, num_minibatches=2)
    batch.old_logps = engine.compute_logps(model, batch, args, flops)
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
def test_bad_steps_in_a_row_end_the_run_with_a_checkpoint(run_script, tmp_path, monkeypatch, name, tiny):
    poisoned(SCRIPTS[name], monkeypatch, lambda call: float("nan"))
    place = SMALL.index("--num_generations")
    flags = SMALL[:place] + SMALL[place + 2 :] if name == "sft" else (*SMALL, "--no_drop_zero_variance")
    code, _, err = run_script(SCRIPTS[name], *flags, "--max_completion_length", 64, "--max_steps", 9, "--max_bad_steps", 2)
    assert code == 1, err
    assert "not finite in 2 steps in a row (--max_bad_steps): checkpoint-2 has the weights" in the_error(err, f"{name}.py")
    assert [record["step"] for record in metrics(tmp_path / "run")] == [1, 2]
    assert {record[key] for record in metrics(tmp_path / "run") for key in ("loss", "grad_norm")} == {None}
    (checkpoint,) = checkpoints.complete_checkpoints(tmp_path / "run")
    assert checkpoint.name == "checkpoint-2"
    saved = load_file(checkpoint / "model.safetensors")
    assert saved.keys() <= tiny[0].state_dict().keys() and len(saved) > 10
    assert all(torch.equal(tiny[0].state_dict()[key].cpu(), value) for key, value in saved.items())


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
    checkpoints.save_model(tmp_path, model, tokenizer)
    for file in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (tmp_path / "mute").mkdir(exist_ok=True)
        (tmp_path / file).rename(tmp_path / "mute" / file)
    return "mute"


def test_weights_that_are_not_finite_end_sampling_in_one_line(tiny):
    model, tokenizer = copy.deepcopy(tiny[0]), tiny[1]
    with torch.no_grad():
        model.get_output_embeddings().weight[0, 0] = math.nan
    with pytest.raises(engine.RunError, match="sampling from LlamaForCausalLM: its logits are not finite"):
        common.sample(model, tokenizer, [[5, 6]], [{"prompt": "q"}], grpo.Args())


@pytest.mark.parametrize("named", ["2", [[2]], 2.0, -1, [1, "2"]])
def test_an_end_that_is_no_id_is_one_line(tiny, named):
    model = copy.deepcopy(tiny[0])
    model.generation_config.eos_token_id = named
    with pytest.raises(engine.BadArgument, match="eos_token_id of its GenerationConfig is .*: expected ids"):
        models.eos_ids(model, tiny[1])


@pytest.mark.parametrize("case", ["all cut off", "cut off and masked", "empty completions"])
def test_nothing_to_learn_from_is_no_error_and_leaves_no_nan(run_script, tmp_path, ends_at_once, case):
    flags = {"all cut off": ("--max_completion_length", 1),
             "cut off and masked": ("--max_completion_length", 1, "--mask_truncated_completions", "--no_drop_zero_variance"),
             "empty completions": ("--model", ends_at_once)}[case]
    code, out, err = run_script(grpo, *SMALL, *flags, "--max_steps", 21 if case == "all cut off" else 2, "--eval_steps", 2,
                                "--eval_problems", 1)
    assert code == 0, err
    for record in metrics(tmp_path / "run")[1:]:  # as strict JSON
        assert record["skipped_updates"] == 0 and record["grad_norm"] == 0.0 and record["frac_reward_zero_std"] == 1.0
        assert record["frac_rows_trained"] == 0 and not record.keys() & {"entropy", "kl", "clip_ratio/low_mean", "clip_ratio/high_mean"}
    if case == "empty completions":
        lines = (tmp_path / "run" / "completions" / "step-000001.jsonl").read_text().splitlines()
        assert all(json.loads(line)["completion"] == "" and json.loads(line)["ended"] for line in lines)
    warnings = [line for line in (out + err).splitlines() if line.startswith("warning: the reward was 0 in each of the last 20 steps")]
    assert len(warnings) == (case == "all cut off")
    assert all("100% of the completions are cut off (--max_completion_length)" in line for line in warnings)


def test_the_warning_of_no_reward_comes_once_and_never_for_sft(tmp_path, capsys):
    def warnings(rewards, **more):
        log = RunLog(tmp_path, grpo.Args())
        for reward in rewards:
            rewarded = {} if reward is None else {"reward": reward}
            log.watch({"skipped_updates": 0, "completions/clipped_ratio": 0.0} | rewarded | more)
        return capsys.readouterr().out.count("warning: the reward was 0")

    assert warnings([0.0] * 19 + [0.1] + [0.0] * 19) == 0 and warnings([0.0] * 60) == 1
    assert warnings([None] * 40) == 0 and warnings([0.5] * 20, **{"onpolicy/reward": 0.0}) == 1  # LUFFY's teacher is always right


def test_no_library_chooses_its_number_of_threads_anew():
    """The order of a sum depends on it, and so do its last bits. Torch lets MKL choose (MKL_DYNAMIC) until a number is set."""
    code = ("import ctypes, os, torch, engine\nlib = ctypes.CDLL(os.path.join(os.path.dirname(torch.__file__), 'lib', 'libtorch_cpu.so'))\n"
            "def dynamic(): return lib.mkl_serv_get_dynamic(), torch.get_num_threads()\n"
            "print(*dynamic())\nengine.load_policy(engine.Args(eval_steps=0))\nprint(*dynamic())")
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True)
    if "mkl_serv_get_dynamic" in done.stderr:
        pytest.skip("this torch has no MKL")
    assert done.stdout.splitlines() == ["1 2", "0 2"], done.stderr
