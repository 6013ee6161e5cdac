"""LoRA: is the adapter all that is trained, is it right, and is it in every file that is read again?"""

import json
import os
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

import engine
import eval as evaluation
import families
import grpo
import sft
from engine import checkpoints, dry_run, lora, models, sampling, scoring
from engine.flops import Flops
from test_distributed import launch

peft = pytest.importorskip("peft", reason="LoRA needs the package peft")

SMALL = ("--task", "diary", "--num_hard", 4, "--num_easy", 8, "--prompts_per_step", 3, "--num_generations", 4, "--eval_steps", 0,
         "--learning_rate", 5e-3, "--max_completion_length", 24, "--beta", 0.01)


@pytest.fixture
def policy():
    """policy(**flags) -> (args, model with an adapter that is no longer 0, tokenizer)."""
    def load(trained=True, **flags):
        args = grpo.Args(**{"lora_rank": 4, "max_completion_length": 48} | flags)
        model, tokenizer = engine.load_policy(args)
        torch.manual_seed(1)
        for layer in lora.layers(model).values() if trained else ():
            torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.05)
        return args, model, tokenizer

    return load


@pytest.fixture
def small(tmp_path_factory):
    """small(family) -> the folder of a small random model."""
    def save(family):
        folder = tmp_path_factory.mktemp(family)
        families.save_small(families.small_config(family), folder, pad_is_eos=True)
        return str(folder)

    return save


@pytest.fixture
def adapter(policy, tmp_path_factory):
    """The folder of an adapter of the tiny model, that model, and a function that edits the config."""
    _, model, _ = policy()
    folder = tmp_path_factory.mktemp("adapter")
    lora.save_adapter(folder, model, model.state_dict())
    config = folder / lora.CONFIG
    return types.SimpleNamespace(folder=folder, model=model, edit=lambda **values: config.write_text(
        json.dumps(json.loads(config.read_text()) | values)))


def frozen(name, dtype="float32"):
    """A base as it is below an adapter: torch multiplies some views in another order where the weights need a gradient."""
    return models.load_model(name, dtype=dtype)[0].requires_grad_(False)


def rows_of(model, seed=0):
    """Four rows of two prompts, padded, within the vocabulary of any model here."""
    torch.manual_seed(seed)
    prompt_ids, completion_ids = torch.randint(5, 50, (2, 20)).repeat_interleave(2, dim=0), torch.randint(5, 50, (4, 9))
    prompt_mask, completion_mask = torch.ones(4, 20, dtype=torch.bool), torch.ones(4, 9, dtype=torch.bool)
    prompt_mask[:2, :3] = completion_mask[1::2, 5:] = False
    return engine.Rows(prompt_ids, prompt_mask, completion_ids, completion_mask)


def scores(model, impl="reference"):
    with torch.no_grad():
        return scoring.policy_logps(model, rows_of(model), types.SimpleNamespace(temperature=1.0, logprob_impl=impl))[0]


# ---------------------------------------------------------------- the model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", [None, "gpt2", "deepseek_v3"])
def test_a_fresh_adapter_changes_no_bit(policy, small, family, dtype):
    name = small(family) if family else "tiny_model"
    _, model, _ = policy(trained=False, model_name_or_path=name, dtype=dtype)
    base = frozen(name, dtype)
    if (family, dtype) == ("deepseek_v3", "bfloat16"):  # its experts are stored in bfloat16, and their products then rounded
        torch.testing.assert_close(scores(model), scores(base), atol=0.05, rtol=0)
    else:
        assert torch.equal(scores(model), scores(base))


@pytest.mark.parametrize("family", [None, "gpt2"])  # gpt2: weights that are transposed
@pytest.mark.parametrize("impl, checkpointing", [("reference", False), ("tiled", False), ("tiled", True)])
def test_gradients_are_those_through_the_merged_weights(policy, small, family, impl, checkpointing):
    name = small(family) if family else "tiny_model"
    args, model, _ = policy(model_name_or_path=name, logprob_impl=impl)
    base, rows = models.load_model(name)[0], rows_of(model)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
    logps, entropy = engine.policy_logps(model, rows, args)
    (logps.sum() + 0.3 * entropy.sum()).backward()

    whole = dict(base.named_parameters())
    factors = {layer: [part["default"].weight.detach().clone().requires_grad_() for part in (module.lora_A, module.lora_B)]
               for layer, module in lora.layers(model).items()}
    for layer, (a, b) in factors.items():
        delta = 2 * b @ a  # alpha is twice the rank
        whole[f"{layer}.weight"] = whole[f"{layer}.weight"] + (delta.t() if family == "gpt2" else delta)
    mask = torch.cat([rows.prompt_mask, rows.completion_mask], dim=1)
    logits = functional_call(base, whole, kwargs=dict(
        input_ids=torch.cat([rows.prompt_ids, rows.completion_ids], dim=1), attention_mask=mask.long(), use_cache=False,
        position_ids=(mask.long().cumsum(1) - 1).clamp(min=0))).logits[:, 19:-1]
    log_probs = logits.log_softmax(-1)
    chosen = log_probs.gather(-1, rows.completion_ids.unsqueeze(-1)).squeeze(-1)
    ((chosen - 0.3 * (log_probs.exp() * log_probs).sum(-1)) * rows.completion_mask).sum().backward()
    torch.testing.assert_close(logps, chosen * rows.completion_mask, atol=1e-4, rtol=1e-5)
    for layer, module in lora.layers(model).items():
        for part, expected in zip((module.lora_A, module.lora_B), factors[layer]):
            assert expected.grad.norm() > 0.1
            assert (part["default"].weight.grad - expected.grad).norm() < 1e-4 * expected.grad.norm(), layer


def test_only_the_adapter_is_trained_and_stored_in_float32(policy):
    _, model, _ = policy(trained=False, dtype="bfloat16")
    for name, parameter in model.named_parameters():
        adapter = "lora_" in name
        assert parameter.requires_grad == adapter
        assert parameter.dtype == (torch.bfloat16 if "base_layer" in name else torch.float32), name
    assert {name.rpartition(".")[2] for name in lora.layers(model)} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight  # tied, and without an adapter
    assert scores(model).dtype == torch.float32


def test_the_same_seed_gives_the_same_adapter_and_disturbs_no_other_numbers(policy):
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first = engine.load_policy(grpo.Args(lora_rank=4))[0].state_dict()
    assert torch.equal(torch.rand(1), expected)
    second, other = (engine.load_policy(grpo.Args(lora_rank=4, seed=seed))[0].state_dict() for seed in (0, 1))
    name = "model.layers.0.mlp.up_proj.lora_A.default.weight"
    assert torch.equal(first[name], second[name]) and not torch.equal(first[name], other[name])


def test_named_layers_get_the_adapter_and_alpha_scales_it(policy):
    _, model, _ = policy(lora_targets=["q_proj", "layers.1.mlp.up_proj"], lora_alpha=3.0)
    assert sorted(lora.layers(model)) == sorted(
        [f"model.layers.{layer}.self_attn.q_proj" for layer in range(3)] + ["model.layers.1.mlp.up_proj"])
    assert {layer.scaling["default"] for layer in lora.layers(model).values()} == {0.75}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_reference_is_the_same_model_with_the_adapter_off(policy, dtype):
    """It holds no weight of its own, scores and samples as the base does, and leaves the adapter on."""
    args, model, tokenizer = policy(dtype=dtype)
    base = frozen("tiny_model", dtype)
    reference, same_tokenizer = engine.load_policy(args)
    assert same_tokenizer is tokenizer and reference is not model
    assert {id(parameter) for parameter in reference.parameters()} == {id(parameter) for parameter in model.parameters()}
    before = scores(model)
    for impl in ("reference", "tiled"):
        assert torch.equal(scores(reference, impl), scores(base, impl))
    assert torch.equal(scores(model), before) and not torch.allclose(before, scores(base), atol=0.1)
    prompts = sampling.left_pad([row[mask].tolist() for row, mask in zip(rows_of(model).prompt_ids, rows_of(model).prompt_mask)],
                                tokenizer.pad_token_id, "cpu")
    ids = [sampling.generate(each, *prompts, [1], 0, 12, temperature=0)[0].tolist() for each in (reference, base, model)]
    assert ids[0] == ids[1] != ids[2]
    with pytest.raises(ValueError, match="temperature"):  # on again after an error, too
        scoring.score_completions(reference, *(getattr(rows_of(model), name) for name in (
            "prompt_ids", "prompt_mask", "completion_ids", "completion_mask")), temperature=0)
    assert torch.equal(scores(model), before)


# ---------------------------------------------------------------- what it costs


def test_a_frozen_weight_costs_no_gradient(policy):
    args, model, _ = policy(lora_targets=["q_proj", "down_proj"])
    flops, base = Flops.of(model), Flops.of(models.load_model("tiny_model")[0])
    trained = 3 * 4 * (96 + 96 + 288 + 96)
    assert (flops.weights, flops.frozen) == (base.weights + trained, base.weights) and base.frozen == 0
    lengths = torch.tensor([30, 20])
    for passes, without in ((1, 0), (2, 0), (3, 1), (4, 1)):
        flops.spent["train"] = 0
        flops.add("train", lengths, passes)
        assert flops.spent["train"] == passes * flops.forward([30, 20]) - without * 2 * base.weights * 50
    rows = rows_of(model)
    rows = engine.Rows(*(getattr(rows, name)[::2] for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")))
    with FlopCounterMode(display=False) as counter:
        engine.policy_logps(model, rows, args)[0].sum().backward()
    flops.spent["train"] = 0
    flops.add("train", torch.tensor([29, 29]), passes=3)
    # torch counts neither the gradients below the first adapter nor the head of the prompts.
    assert 0.8 < counter.get_total_flops() / flops.spent["train"] < 1


def test_memory_of_frozen_weights(policy):
    settings = types.SimpleNamespace(prompts_per_step=4, num_generations=8, generation_batch_size=16, num_generations_eval=1,
                                     keeps_initial_weights=True, micro_batch_tokens=1000, logprob_impl="reference",
                                     gradient_checkpointing=False)
    _, model, _ = policy(dtype="bfloat16", lora_targets=["q_proj"])
    sizes, words, trained = dry_run.estimate_memory(model, settings, 30, 20), 221 * 96, 3 * 4 * 192
    linear = 3 * (4 * 96 * 96 + 3 * 96 * 288)
    assert sizes["parameters"] == 2 * linear + 4 * (words + trained + 7 * 96)
    assert (sizes["gradients"], sizes["AdamW states"], sizes["bfloat16 weights"]) == (4 * trained, 8 * trained, 4 * trained)
    assert sizes["reference model"] == 0


# ---------------------------------------------------------------- files


def test_the_tokenizer_that_an_adapter_was_trained_with_is_read(adapter):
    """TRL, say, saves a chat template beside the adapter."""
    assert models.load_model(str(adapter.folder))[1].chat_template is None
    tokenizer = models.load_model("tiny_model")[1]
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(adapter.folder)
    assert models.load_model(str(adapter.folder))[1].chat_template == "{{ messages[0].content }}"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of four steps with a checkpoint every two."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    flags = (*SMALL, "--lora_rank", 4, "--max_steps", 4, "--save_steps", 2, "--output_dir", folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [grpo.__file__, *map(str, flags)])
        engine.launch(grpo.main)
    return folder


def records(folder):
    clocks = ("step_time", "time/rollout", "time/update")
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in record.items() if name not in clocks} for record in lines]


def check_merged(folder, base, alpha_by_rank, rounded=False):
    """The weights in a run folder are those of its base, by name, plus those of its adapter."""
    merged, adapter = load_file(folder / "model.safetensors"), load_file(folder / "adapter" / lora.WEIGHTS)
    assert merged.keys() == base.keys()  # of tied weights one
    for name, weight in base.items():
        part = f"base_model.model.{name.removesuffix('weight')}lora_"
        if f"{part}A.weight" in adapter:
            weight = weight.bfloat16().float() if rounded else weight
            assert not torch.equal(merged[name], weight)
            weight = weight + alpha_by_rank * adapter[f"{part}B.weight"] @ adapter[f"{part}A.weight"]
        torch.testing.assert_close(merged[name], weight, atol=1e-7, rtol=1e-6)


def test_a_resumed_run_is_bit_equal(run, run_script, tmp_path):
    shutil.copytree(run, tmp_path / "cut")
    for name in ("checkpoint-4", "adapter"):
        shutil.rmtree(tmp_path / "cut" / name)
    (tmp_path / "cut" / "model.safetensors").unlink()
    code, out, err = run_script(grpo, "--resume_from_checkpoint", "cut")
    assert code == 0, err
    assert "resuming cut/checkpoint-2" in out and "changed flags" not in out
    assert records(tmp_path / "cut") == records(run) and any(record["kl"] > 0 for record in records(run))
    for name in ("model.safetensors", f"adapter/{lora.WEIGHTS}", f"adapter/{lora.CONFIG}", "adapter/base.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (run / name).read_bytes(), name
    assert not (run / "checkpoint-4" / "model.safetensors").exists()  # the base is not copied at each
    moments = torch.load(run / "checkpoint-4" / "optimizer.pt")["optimizer"]["state"]
    assert len(moments) == 2 * 21 and all(state["exp_avg"].dtype == torch.float32 for state in moments.values())
    digest = models.weights_digest(models.load_model("tiny_model")[0])
    assert json.loads((run / "args.json").read_text())["base_model"] == digest == json.loads((run / "adapter" / "base.json").read_text())


def test_the_merged_model_is_the_adapter(run):
    """Read by transformers and by peft themselves, and by the scripts."""
    merged, base = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (run, models.TINY_MODEL))
    before, expected = scores(base), scores(merged)
    by_peft = peft.PeftModel.from_pretrained(base, run / "adapter").eval().base_model.model
    assert not torch.allclose(before, expected, atol=1e-3)
    torch.testing.assert_close(scores(by_peft), expected, atol=1e-4, rtol=1e-5)
    assert torch.equal(scores(models.load_model(str(run))[0]), expected)
    for folder in (run / "adapter", run / "checkpoint-4"):
        model = models.load_model(str(folder))[0]
        assert not lora.layers(model) and all(parameter.requires_grad for parameter in model.parameters())
        torch.testing.assert_close(scores(model), expected, atol=1e-4, rtol=1e-5)
    check_merged(run, load_file(models.TINY_MODEL / "model.safetensors"), alpha_by_rank=2)
    assert json.loads((run / "config.json").read_text())["dtype"] == "float32"


def test_without_the_merged_model_the_run_folder_is_the_adapter(run, run_script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run_script(grpo, *SMALL, "--lora_rank", 4, "--max_steps", 4, "--no_save_merged", "--output_dir", "alone")
    assert code == 0, err
    assert not list(tmp_path.glob("alone/model*")) and not (tmp_path / "alone" / "adapter").exists()
    for name in (lora.WEIGHTS, lora.CONFIG, "base.json"):
        assert (tmp_path / "alone" / name).read_bytes() == (run / "adapter" / name).read_bytes(), name
    assert (tmp_path / "alone" / "tokenizer.json").read_bytes() == (run / "tokenizer.json").read_bytes()
    torch.testing.assert_close(scores(models.load_model("alone")[0]), scores(models.load_model(str(run))[0]), atol=1e-4, rtol=1e-5)
    code, out, err = run_script(grpo, "--resume_from_checkpoint", "alone")
    assert code == 2 and "alone is finished" in err
    code, out, err = run_script(grpo, *SMALL, "--lora_rank", 4, "--model", "alone", "--max_steps", 1, "--no_save_merged")
    assert code == 2 and "peft reads no adapter of an adapter" in err
    shutil.copy(run / "model.safetensors", "alone")
    code, out, err = run_script(evaluation, "--model", "alone")
    assert code == 2 and "holds both a model and an adapter_config.json" in err


@pytest.mark.parametrize("flag", ["--save_merged", "--no_save_merged"])
def test_resuming_with_the_other_form_leaves_one_model(run_script, tmp_path, monkeypatch, flag):
    monkeypatch.chdir(tmp_path)
    other = {"--save_merged": "--no_save_merged", "--no_save_merged": "--save_merged"}[flag]
    code, out, err = run_script(grpo, *SMALL, "--lora_rank", 4, "--max_steps", 2, "--save_steps", 2, other, "--output_dir", "r")
    assert code == 0, err
    code, out, err = run_script(grpo, "--resume_from_checkpoint", "r", "--max_steps", 4, flag)
    assert code == 0, err
    names = {path.name for path in (tmp_path / "r").iterdir()}
    merged, alone = {"model.safetensors", "config.json", "generation_config.json", "adapter"}, set(lora.FILES)
    assert names & (merged | alone) == (merged if flag == "--save_merged" else alone)
    torch.testing.assert_close(scores(models.load_model("r")[0]), scores(models.load_model("r/checkpoint-4")[0]), atol=1e-4, rtol=1e-5)


def test_an_adapter_on_an_adapter(run, run_script, tmp_path):
    """The second one is trained on the first, whose folder is its base."""
    code, out, err = run_script(sft, "--task", "diary", "--lora_rank", 2, "--lora_alpha", 2, "--model", os.path.relpath(run / "adapter"),
                                "--max_steps", 2, "--eval_steps", 0, "--num_hard", 2, "--num_easy", 2, "--prompts_per_step", 4,
                                "--learning_rate", 0.01, "--output_dir", "second")
    assert code == 0, err
    assert json.loads((tmp_path / "second" / "adapter" / lora.CONFIG).read_text())["base_model_name_or_path"] == str(run / "adapter")
    base = models.load_model(str(run / "adapter"))[0].state_dict()
    check_merged(tmp_path / "second", {name: base[name] for name in load_file(run / "model.safetensors")}, alpha_by_rank=1)
    merged, both = (models.load_model(name)[0] for name in ("second", "second/adapter"))
    torch.testing.assert_close(scores(merged), scores(both), atol=1e-4, rtol=1e-5)
    code, out, err = run_script(evaluation, "--model", "second/adapter", "--eval_problems", 2, "--max_completion_length", 9)
    assert code == 0 and "avg@8" in out, err


def test_a_merged_model_that_equals_its_base_is_an_error(policy, tmp_path, capsys):
    """Unless the adapter is 0 because no step had a gradient."""
    _, model, tokenizer = policy(trained=False)
    checkpoints.save_model(tmp_path, model, tokenizer)
    assert torch.equal(scores(models.load_model(str(tmp_path))[0]), scores(models.load_model("tiny_model")[0]))
    assert "LoRA: 21 of 21 layers have an adapter that no gradient has reached, such as model.layers.0" in capsys.readouterr().out
    checkpoints.save_model(tmp_path / "adapter", model, tokenizer, merge=False)
    assert "LoRA: 21 of 21 layers" in capsys.readouterr().out
    next(iter(lora.layers(model).values())).lora_B["default"].weight.data += 1e-20
    with pytest.raises(engine.RunError, match="the merged model equals its base"):
        checkpoints.save_model(tmp_path, model, tokenizer)


SHARDED = """
import sys
from pathlib import Path

import torch
from transformers import get_scheduler

sys.path.insert(0, sys.argv[1])
import engine, grpo
from engine import checkpoints, lora, ranks
from engine.flops import Flops

def main():
    folder, state = Path(sys.argv[2]), []
    for action in ("save", "load"):
        args = grpo.Args(parallel="fsdp", dtype="bfloat16", lora_rank=4, seed=len(state))
        model, tokenizer = engine.load_policy(args)
        optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=0.01, fused=True)
        scheduler, flops = get_scheduler("constant", optimizer), Flops.of(model, args)
        if action == "load":
            assert checkpoints.load_checkpoint(folder / "checkpoint-1", model, optimizer, scheduler, flops) == 1
        ids = torch.tensor([tokenizer("2 drimp at 6 = 12")["input_ids"]])
        rows = engine.Rows(ids[:, :2], ids[:, :2] >= 0, ids[:, 2:], ids[:, 2:] >= 0)
        for step in (1, 2)[len(state):]:
            engine.zero_grad(model)
            engine.policy_logps(model, rows, args)[0].sum().backward()
            ranks.clip_grad_norm(model, 1.0)
            optimizer.step()
            if step == 1:
                checkpoints.save_checkpoint(folder, 1, model, tokenizer, optimizer, flops, 1)
        state.append(ranks.full_state_dict(model))
    if ranks.rank() == 0:
        assert all(torch.equal(weight, state[1][name]) for name, weight in state[0].items()), "not bit-equal"
    checkpoints.save_model(folder, model, tokenizer)

engine.launch(main)
"""


def test_a_sharded_adapter_goes_on_bit_equal_and_is_merged(tmp_path):
    (tmp_path / "sharded.py").write_text(SHARDED)
    launch(tmp_path / "sharded.py", Path(engine.__file__).parents[1], tmp_path)
    check_merged(tmp_path, load_file(models.TINY_MODEL / "model.safetensors"), alpha_by_rank=2, rounded=True)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("flags, words", [
    (("--lora_rank", -1), "--lora_rank must be at least 0, got -1"),
    (("--lora_rank", 2, "--lora_alpha", 0), "--lora_alpha must be above 0, got 0.0"),
    (("--lora_rank", 2, "--lora_alpha", "nan"), "--lora_alpha: expected a number, got nan"),
    (("--lora_alpha", 2), "--lora_alpha needs --lora_rank"),
    (("--lora_targets", "q_proj"), "--lora_targets needs --lora_rank"),
    (("--no_save_merged",), "--no_save_merged needs --lora_rank"),
    (("--lora_rank", 2, "--lora_targets", "query"), "--lora_targets query: "),
    (("--lora_rank", 2, "--lora_targets", "q_proj", "query"), "no layer is called query"),
    (("--lora_rank", 2, "--lora_targets", "lm_head"), "lm_head is not a linear layer below the head"),
    (("--lora_rank", 2, "--lora_targets", "embed_tokens"), "model.embed_tokens is not a linear layer below the head"),
    (("--lora_rank", 2, "--lora_targets", "norm"), "--lora_targets norm: "),
    (("--lora_rank", 2, "--gguf_file", "m.gguf"), "--lora_rank does not go with --gguf_file"),
])
def test_bad_flags_are_one_line(refused, flags, words):
    assert words in refused(grpo, *flags)


def test_a_model_without_linear_layers_is_one_line(policy, monkeypatch):
    model, _ = models.load_model("tiny_model")
    model.model.layers = torch.nn.ModuleList()
    with pytest.raises(engine.BadArgument, match="--lora_rank 2 --lora_targets all-linear: "):
        lora.add_adapter(model, grpo.Args(lora_rank=2), {})


def test_without_peft_lora_and_adapters_are_refused(refused, adapter, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert "LoRA needs the package peft: pip install peft" in refused(grpo, "--lora_rank", 2)
    assert ", an adapter of tiny_model: LoRA needs the package peft" in refused(sft, "--model", adapter.folder)


@pytest.mark.parametrize("config, words", [
    ({"base_model_name_or_path": "no/where/else"}, ", an adapter of no/where/else: no such folder"),
    ({"base_model_name_or_path": None}, "names no base_model_name_or_path"),
    ({"peft_type": "IA3"}, "peft_type = IA3: only plain LoRA is read"),
    ({"use_dora": True}, "use_dora = True: only plain LoRA is read"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save = ['lm_head']: only plain LoRA is read"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights = pissa: only plain LoRA is read"),
    ({"a_flag_of_later": 1}, "a_flag_of_later = 1: only plain LoRA is read"),
    ({"r": 2}, "is of another base or other layers"),
    ({"r": -1}, ", an adapter of tiny_model: "),
    ({"r": "x"}, ", an adapter of tiny_model: "),
    ({"target_modules": ["q_proj"]}, "is of another base or other layers"),
    ({"target_modules": ["query"]}, ", an adapter of tiny_model: "),
])
def test_an_adapter_that_does_not_fit_is_one_line(refused, adapter, config, words):
    adapter.edit(**config)
    assert words in refused(grpo, "--model", adapter.folder)


def test_broken_files_of_an_adapter_are_one_line(refused, adapter, small):
    adapter.edit(base_model_name_or_path=str(adapter.folder))
    assert "the adapter is its own base" in refused(grpo, "--model", adapter.folder)
    for text in ("{", "[]", "[" * 100_000, '{"peft_type": "LORA"}'):
        (adapter.folder / lora.CONFIG).write_text(text)
        assert f"its {lora.CONFIG} cannot be read" in refused(grpo, "--model", adapter.folder)
    lora.save_adapter(adapter.folder, adapter.model, adapter.model.state_dict())
    adapter.edit(base_model_name_or_path=small("llama"))
    assert "is of another base or other layers" in refused(grpo, "--model", adapter.folder)
    adapter.edit(base_model_name_or_path="tiny_model")
    (adapter.folder / "base.json").write_text('{"sha256": "0"}')
    assert "was trained on other weights than this base's" in refused(grpo, "--model", adapter.folder)
    (adapter.folder / "base.json").unlink()  # as in adapters of others
    weights = load_file(adapter.folder / lora.WEIGHTS)
    save_file(weights | {min(weights): weights[min(weights)] * float("nan")}, adapter.folder / lora.WEIGHTS)
    assert "NaNs detected" in refused(grpo, "--model", adapter.folder)
    save_file(weights | {"base_model.model.lm_head.weight": torch.ones(2)}, adapter.folder / lora.WEIGHTS)
    assert "is of another base or other layers: base_model.model.lm_head.weight" in refused(grpo, "--model", adapter.folder)
    (adapter.folder / lora.WEIGHTS).write_bytes(b"torn")
    assert ", an adapter of tiny_model: " in refused(grpo, "--model", adapter.folder)
    (adapter.folder / lora.WEIGHTS).unlink()
    assert lora.WEIGHTS in refused(grpo, "--model", adapter.folder)
    assert "--gguf_file does not go with an adapter" in refused(grpo, "--model", adapter.folder, "--gguf_file", "m.gguf")


def test_the_config_of_an_adapter_runs_no_code(adapter, tmp_path, monkeypatch):
    (tmp_path / "foreign.py").write_text("raise SystemExit('code ran')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    adapter.edit(auto_mapping={"base_model_class": "Model", "parent_library": "foreign"})
    models.load_model(str(adapter.folder))
    assert "foreign" not in sys.modules


def test_a_checkpoint_and_the_flags_must_agree(run, refused):
    for flags, words in (((0,), "was written with --lora_rank: give the same"), ((8,), "does not fit: "),
                         ((4, "--lora_targets", "q_proj"), "does not fit: "), ((4, "--model", run), "was trained on other weights")):
        assert words in refused(grpo, "--resume_from_checkpoint", run, "--max_steps", 6, "--lora_rank", *flags)
