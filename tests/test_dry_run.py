"""Does --dry_run show what a run would do, at the price that the ledger would charge, and do nothing?"""

import dataclasses
import json
import re
import types

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import common
import grpo
import luffy
import prefixrl
import repo
import sft
from engine import dry_run, models, run, sampling, tasks
from engine.flops import Flops

EASY = tasks.problems("diary", "train", "easy", 4)


@pytest.mark.parametrize("script", [grpo, luffy, repo, prefixrl, sft], ids=lambda script: script.__name__)
def test_it_exits_0_and_samples_trains_and_writes_nothing(run_script, tmp_path, monkeypatch, script):
    for module, name in ((common, "generate"), (sampling, "generate"), (run, "open_run"), (run, "save_model"), (run, "self_check")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("a dry run does this"))
    monkeypatch.setattr(script, "update", lambda *_: pytest.fail("a dry run trains"))
    code, out, err = run_script(script, "--dry_run", "--output_dir", "run", "--seed", 7)
    assert code == 0 and out.endswith("nothing was trained or written (--dry_run)\n"), err
    assert list(tmp_path.iterdir()) == []
    shown = dict(re.findall(r"^    (\w+) = (.*)$", out, re.MULTILINE))
    assert shown.keys() == script.Args.__dataclass_fields__.keys()
    assert (shown["seed"], shown["max_completion_length"], shown["output_dir"]) == ("7", "64", "run")
    assert re.findall(r"^  ([a-z -]+)$", out.split("\ndata\n")[0], re.MULTILINE) == [
        "model and data", *["off-policy knowledge"] * (script is not grpo), "rollout", *["loss"] * (script is not sft), "optimization",
        "evaluation and output"]


def parts(out):
    """{role: (number of tokens, text)} of what is printed, in order."""
    return {role: (int(num), text) for role, num, text in re.findall(r"^  \[(\w+)\] (\d+) tokens: (.*)$", out, re.MULTILINE)}


@pytest.fixture
def mine(tmp_path):
    """A data set of one row with a trace, and that row."""
    row = EASY[0]
    (tmp_path / "mine.jsonl").write_text(json.dumps({"prompt": row["prompt"], "answer": row["answer"], "trace": row["own_trace"]}))
    return "mine.jsonl", row


def test_the_segments_of_a_prefixrl_row_to_the_letter(run_script, mine):
    """The prefix is the first half of the trace's tokens; the prompt is the problem alone; what is trained is sampled."""
    file, row = mine
    code, out, err = run_script(prefixrl, "--dry_run", "--dataset_name", file, "--prefixed_only", "--prefix_min", 0.5, "--prefix_max", 0.5,
                                "--max_completion_length", 50)
    assert code == 0, err
    half = row["own_trace"].split()[: round(len(row["own_trace"].split()) / 2)]
    assert list(parts(out).items()) == [("prompt", (len(row["prompt"].split()), row["prompt"])), ("prefix", (len(half), " ".join(half))),
                                        ("trained", (50, "(at most; sampled by the policy)"))]


@pytest.mark.parametrize("script, taught", [(luffy, True), (sft, True), (repo, False), (grpo, False)])
def test_the_trace_is_trained_where_it_is(run_script, mine, script, taught):
    file, row = mine
    code, out, err = run_script(script, "--dry_run", "--dataset_name", file, "--max_completion_length", 50)
    assert code == 0, err
    trace = (len(row["own_trace"].split()) + 1, row["own_trace"] + " <eos>")
    assert parts(out) == {"prompt": (len(row["prompt"].split()), row["prompt"]),
                          "trained": trace if taught else (50, "(at most; sampled by the policy)")}
    assert "1 training rows, 0 evaluation rows; gold answers grade right as --reward boxed" in out


def test_a_plain_row_is_shown_only_when_no_row_of_the_step_has_a_prefix(run_script):
    for flags, roles in ((("--prefixes_per_trace", 0), ["prompt", "trained"]), ((), ["prompt", "prefix", "trained"])):
        code, out, err = run_script(prefixrl, "--dry_run", *flags)
        assert code == 0 and list(parts(out)) == roles, err


def test_drops_are_shown(run_script, tmp_path):
    rows = [{"prompt": row["prompt"], "answer": row["answer"]} for row in EASY]
    rows += [{"prompt": None, "answer": "1"}, {"prompt": "why " * 99, "answer": "1"}, {"prompt": "why", "answer": "because"}]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = run_script(grpo, "--dry_run", "--dataset_name", "d.jsonl", "--max_prompt_length", 90, "--reward", "numeric")
    assert code == 0, err
    for line in ("dropped 1 of 7 rows whose prompt is missing", "dropped 1 of 6 prompts longer than", "dropped 1 of 6 rows whose gold",
                 "4 training rows"):
        assert line in out


@pytest.mark.parametrize("script, flags, trace_rows", [
    (grpo, {}, 0), (grpo, {"num_iterations": 2, "beta": 0.1, "gradient_checkpointing": True}, 0), (luffy, {}, 1),
    (luffy, {"num_off_policy": 3}, 3), (sft, {"prompts_per_step": 12}, 1),
])
def test_flops_are_those_of_the_ledger_of_a_real_step(tiny, monkeypatch, script, flags, trace_rows):
    """A step whose every prompt, completion and trace has the assumed length, rolled out and trained for real."""
    model, tokenizer = tiny
    args = script.Args(max_completion_length=20, max_steps=1, **flags)
    prompt_ids, trace = [5] * 11, [6] * 16 + [tokenizer.eos_token_id]
    problems = [{"prompt": "q", "answer": "1", "difficulty": "all", "prompt_ids": prompt_ids, "trace": "x", "trace_ids": trace,
                 "behavior_logps": None}] * args.prompts_per_step

    def full(model, prompt_ids, *_, **__):
        ids = torch.full((len(prompt_ids), 20), 7)
        return ids, torch.ones_like(ids, dtype=torch.bool)

    monkeypatch.setattr(common, "generate", full)
    monkeypatch.setattr(common, "grade", lambda samples, args: [  # every group has a signal
        dataclasses.replace(sample, reward=row % 2.0) for row, sample in enumerate(samples)])
    flops, optimizer = Flops.of(model), torch.optim.SGD(model.parameters(), lr=0.0)
    inputs = (model, tokenizer, problems) if script is sft else (model, model if args.beta else None, tokenizer, problems, args, flops)
    batch, _, _ = script.rollout(*inputs)
    script.update(model, optimizer, batch, args, flops)
    estimate = dry_run.estimate_flops(model, args, prompt=11, completion=20, trace=17, trace_rows=trace_rows)
    assert estimate == pytest.approx(flops.metrics(), rel=1e-12)


def test_flops_of_repo_by_hand(tiny):
    """12 prompts: 96 samples, all trained; 12 retellings, sampled and scored once more."""
    args, rule = repo.Args(), Flops.of(tiny[0]).forward
    metrics = dry_run.estimate_flops(tiny[0], args, prompt=20, completion=60, trace=30, stages=("rephrase",))
    assert metrics["flops/rollout"] == 96 * rule([80]) and metrics["flops/rephrase"] == 12 * rule([110])
    assert metrics["flops/train"] == pytest.approx(3 * 96 * rule([80]) + 12 * rule([110]))
    without = dry_run.estimate_flops(tiny[0], args, prompt=20, completion=60, trace=30)
    assert "flops/rephrase" not in without and without["flops/train"] == pytest.approx(3 * 96 * rule([80]))


@pytest.mark.parametrize("flags, asked", [((), True), (("--raw_trace",), False), (("--failure_threshold", 2), False)])
def test_retellings_are_planned_where_they_are_sampled(run_script, flags, asked):
    code, out, err = run_script(repo, "--dry_run", *flags)
    assert code == 0 and ("rephrase sample" in out) == asked, err


def test_the_printed_total_is_all_steps_and_what_the_traces_cost(run_script):
    code, out, err = run_script(prefixrl, "--dry_run", "--max_steps", 10)
    assert code == 0, err
    step, total, traces = (float(re.search(pattern, out)[1]) for pattern in (
        r"total +(\S+) a step", r"all steps +([\d.e+]+)", r", ([\d.e+]+) of it for traces"))
    assert total == pytest.approx(10 * step + traces, rel=0.01) and traces > 0


def settings_of(**changes):
    flags = dict(prompts_per_step=4, num_generations=8, generation_batch_size=16, num_generations_eval=1, num_minibatches=1,
                 micro_batch_tokens=1000, logprob_impl="reference", gradient_checkpointing=False, beta=0.0, keeps_initial_weights=False)
    return types.SimpleNamespace(**flags | changes)


def test_memory_of_the_tiny_model_by_hand(tiny):
    """0.38 M parameters: 3 layers of width 96, MLP 288; prompts of 30 and completions of 20 tokens, 20 rows in 1000 tokens."""
    words = len(tasks.vocabulary())
    weights = 3 * (4 * 96 * 96 + 3 * 96 * 288 + 2 * 96) + 96 + words * 96
    sizes = dry_run.estimate_memory(tiny[0], settings_of(), prompt=30, completion=20)
    assert sizes == {
        "parameters": 4 * weights, "gradients": 4 * weights, "AdamW states": 8 * weights, "reference model": 0, "bfloat16 weights": 0,
        "KV cache": 4 * 16 * 50 * 2 * 3 * 96, "sampled logits": 3 * 4 * 16 * words,
        "activations": 4 * 1000 * 3 * (12 * 96 + 4 * 288 + 50), "log-probs": 5 * 4 * 20 * 20 * words,
        "peak": 16 * weights + 4 * 1000 * 3 * (12 * 96 + 4 * 288 + 50) + 5 * 4 * 20 * 20 * words}
    more = settings_of(keeps_initial_weights=True, gradient_checkpointing=True, micro_batch_tokens=100, logprob_impl="tiled",
                       generation_batch_size=999)
    more = dry_run.estimate_memory(tiny[0], more, 30, 20, num_eval=50)
    assert more["reference model"] == 4 * weights and more["activations"] == 4 * 100 * (3 * 96 + 12 * 96 + 4 * 288 + 50)
    assert more["log-probs"] == 4 * (2 * 256 * 512 + 96 * words)
    assert more["KV cache"] == 4 * 50 * 50 * 2 * 3 * 96


@pytest.mark.parametrize("config", [
    LlamaConfig(vocab_size=50, hidden_size=96, num_hidden_layers=3, num_attention_heads=4, intermediate_size=288),
    LlamaConfig(vocab_size=50, hidden_size=128, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2, intermediate_size=512),
    GPT2Config(vocab_size=50, n_embd=128, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0, resid_pdrop=0, attn_pdrop=0, embd_pdrop=0),
], ids=["tiny", "grouped", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_activations_and_cache_are_within_a_quarter_of_what_torch_keeps(config, dtype):
    model = (GPT2LMHeadModel if isinstance(config, GPT2Config) else LlamaForCausalLM)(config)
    model.compute_dtype = dtype
    sizes = dry_run.estimate_memory(model, settings_of(micro_batch_tokens=400, generation_batch_size=4), prompt=40, completion=60)
    ids, weights, kept = torch.ones(4, 100, dtype=torch.int64), {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes(), tensor  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), models.autocast(model):
        mask = torch.arange(100) >= torch.tensor([[0], [9], [0], [30]])  # (4, 100), as of padded prompts
        hidden = model.base_model(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
    cast = [weight for name, weight in model.base_model.named_parameters()
            if weight.dim() == 2 and not name.startswith(("embed", "wte", "wpe"))]
    copies = 2 * sum(weight.numel() for weight in cast) if dtype == torch.bfloat16 else 0  # counted on their own
    assert sum(size for size, _ in kept.values()) - copies == pytest.approx(sizes["activations"], rel=0.25)
    with torch.no_grad(), models.autocast(model):
        cache = model(input_ids=ids, use_cache=True).cache
    share = 2 / 3 if dtype == torch.bfloat16 and isinstance(config, GPT2Config) else 1  # no rotary embeddings: its keys are bfloat16, too
    assert sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) == pytest.approx(sizes["KV cache"] * share)
    assert hidden.dtype == torch.float32  # the residual stream
