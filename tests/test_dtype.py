"""Does --dtype bfloat16 compute in bfloat16, keep float32 where it matters, and train?"""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file

import engine
import grpo
from engine import models, sampling, self_check, tasks
from engine.flops import Flops
from engine.scoring import score_completions


@pytest.fixture
def fast():
    """(model, tokenizer) of the shipped base that computes in bfloat16."""
    return models.load_model("tiny_model", dtype="bfloat16")


@pytest.fixture
def scored_rows(tiny):
    """Prompts and sampled completions: the inputs of score_completions."""
    model, tokenizer = tiny
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in tasks.problems("diary", "train", "easy", 8, seed=3)]
    prompt_ids, prompt_mask = sampling.left_pad(prompts, tokenizer.pad_token_id, "cpu")
    torch.manual_seed(0)
    return prompt_ids, prompt_mask, *sampling.generate(
        model, prompt_ids, prompt_mask, models.eos_ids(model, tokenizer), tokenizer.pad_token_id, 40)


def test_auto_is_float32_on_a_cpu_and_weights_are_float32_always(tiny, fast):
    assert models.compute_dtype(fast[0]) == torch.bfloat16
    assert {parameter.dtype for model in (tiny[0], fast[0]) for parameter in model.parameters()} == {torch.float32}
    if not torch.cuda.is_available():
        assert models.compute_dtype(tiny[0]) == torch.float32


@pytest.mark.parametrize("impl", ["reference", "tiled"])
def test_log_probs_and_gradients_are_those_of_float32_but_for_rounding(tiny, fast, scored_rows, impl):
    gradients = []
    mask = scored_rows[3]
    values = [score_completions(model, *scored_rows, 1.0, impl) for model in (tiny[0], fast[0])]
    for (logps, entropy), model in zip(values, (tiny[0], fast[0])):
        assert logps.dtype == entropy.dtype == torch.float32
        (logps.sum() + entropy.sum()).backward()
        assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    (exact, _), (rounded, _) = values
    assert 1e-7 < (exact - rounded)[mask].abs().mean() < 0.02  # above: it is bfloat16 that computes
    assert torch.cosine_similarity(*gradients, dim=0) > 0.999


def test_logits_are_float32_and_made_of_float32_weights(fast, scored_rows):
    """Rounded to bfloat16, what is sampled from would not be what is scored."""
    model, ids = fast[0], scored_rows[0]
    with torch.no_grad(), models.autocast(model):
        logits, hidden = model(ids).logits, model.base_model(ids).last_hidden_state
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, hidden.float() @ model.get_output_embeddings().weight.T, rtol=1e-6, atol=1e-5)


def test_sampling_computes_in_bfloat16_too(tiny, fast, scored_rows):
    drawn = []
    for model, tokenizer in (tiny, fast):
        torch.manual_seed(0)
        eos_ids = models.eos_ids(model, tokenizer)
        drawn.append(sampling.generate(model, *scored_rows[:2], eos_ids, tokenizer.pad_token_id, 1, with_logps=True))
    (ids, _, exact), (same_ids, _, rounded) = drawn
    assert torch.equal(ids, same_ids) and not torch.equal(exact, rounded) and (exact - rounded).abs().max() < 0.05


def test_weights_that_sampling_has_cast_still_get_a_gradient(fast, scored_rows):
    """Autocast keeps the casts of one context: those made under no_grad, in generate, carry no gradient."""
    model, tokenizer = fast
    sampling.generate(model, *scored_rows[:2], models.eos_ids(model, tokenizer), tokenizer.pad_token_id, 2)
    score_completions(model, *scored_rows)[0].sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_a_small_learning_rate_moves_the_weights(fast, batch_of, mixed_triples):
    """1e-6, the step of AdamW, is lost in a bfloat16 weight of 0.1, whose next neighbour is 5e-4 away."""
    model, args = fast[0], grpo.Args(learning_rate=1e-6)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0)
    grpo.update(model, optimizer, batch_of(mixed_triples, 4), args, Flops.of(model))
    matrices = [name for name, weight in before.items() if weight.dim() == 2 and "embed" not in name and "lm_head" not in name]
    moved = [(model.state_dict()[name] != before[name]).float().mean() for name in matrices]
    assert min(moved) > 0.9


def test_the_self_check_looks_at_both_dtypes(fast, capsys, monkeypatch):
    model, tokenizer = fast
    rows = [row | {"prompt_ids": tokenizer(row["prompt"])["input_ids"]} for row in tasks.problems("diary", "train", "easy", 8)]
    args = grpo.Args(dtype="bfloat16")
    assert self_check.self_check(model, tokenizer, rows, args)["logp_difference"] < 1e-3
    assert models.compute_dtype(model) == torch.bfloat16
    out = capsys.readouterr().out
    assert "re-scored = sampled log-probs to" in out and "in the mean in bfloat16" in out
    honest = self_check.policy_logps

    def wrong_in(dtype):
        def scored(model, batch, args):
            logps, entropy = honest(model, batch, args)
            return logps - 0.2 * (models.compute_dtype(model) == dtype), entropy
        return scored

    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(self_check, "policy_logps", wrong_in(dtype))
        with pytest.raises(engine.RunError, match=f"0.2 nats from how it drew them .* in {dtype}"):
            self_check.self_check(model, tokenizer, rows, args)
        model.compute_dtype = torch.bfloat16


def test_a_run_in_bfloat16_learns_and_saves_float32(run_script, tmp_path):
    code, out, err = run_script(
        grpo, "--dtype", "bfloat16", "--task", "diary", "--prompts_per_step", 4, "--num_generations", 4, "--num_hard", 4, "--num_easy", 8,
        "--eval_steps", 0, "--max_steps", 2, "--beta", 0.01, "--gradient_checkpointing", "--output_dir", "run")
    assert code == 0 and "in the mean in bfloat16" in out, err
    assert {weight.dtype for weight in load_file(tmp_path / "run" / "model.safetensors").values()} == {torch.float32}
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2] and all(record["grad_norm"] > 0 for record in records)
