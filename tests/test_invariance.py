"""Does the gradient depend on anything that it must not depend on: micro-batches, padding, row order, skipped rows?"""

import copy
import dataclasses

import pytest
import torch

import common
import engine
import grpo
from engine import scoring
from engine.flops import Flops


def train(model, batch, **flags):
    """Gradients, weights and metrics after one `update` with plain SGD; flags go to Args."""
    model = copy.deepcopy(model)
    args = grpo.Args(num_generations=4, max_grad_norm=1e9, **flags)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    metrics = grpo.update(model, optimizer, batch, args, Flops.of(model))
    return torch.cat([p.grad.flatten() for p in model.parameters()]), torch.cat([p.detach().flatten() for p in model.parameters()]), metrics


LOSS_TYPES = pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])


@LOSS_TYPES
def test_micro_batches_do_not_change_the_gradient(tiny, batch_of, mixed_triples, loss_type):
    batch = batch_of(mixed_triples, 4)
    cuts = [engine.micro_batches(tiny[0], batch, torch.arange(8), grpo.Args(micro_batch_tokens=tokens)) for tokens in (8192, 1, 150, 300)]
    assert list(map(len, cuts)) == [1, 8, 4, 2]
    whole, _, metrics = train(tiny[0], batch, loss_type=loss_type)
    assert whole.abs().max() > 1e-3
    for micro_batch_tokens in (1, 150, 300):
        cut, _, cut_metrics = train(tiny[0], batch, loss_type=loss_type, micro_batch_tokens=micro_batch_tokens)
        assert (cut - whole).abs().max() < 1e-6 * whole.norm()
        assert cut_metrics["loss"] == pytest.approx(metrics["loss"], abs=1e-6)
        assert cut_metrics["entropy"] == pytest.approx(metrics["entropy"], abs=1e-5)


@LOSS_TYPES
def test_more_padding_changes_nothing(tiny, batch_of, mixed_triples, loss_type):
    batch = batch_of(mixed_triples, 4)
    plain, _, _ = train(tiny[0], batch, loss_type=loss_type)
    left, right = torch.nn.functional.pad, torch.nn.functional.pad
    padded = dataclasses.replace(
        batch, prompt_ids=left(batch.prompt_ids, (7, 0)), prompt_mask=left(batch.prompt_mask, (7, 0)),
        completion_ids=right(batch.completion_ids, (0, 9)), completion_mask=right(batch.completion_mask, (0, 9)),
        loss_mask=right(batch.loss_mask, (0, 9)))
    torch.testing.assert_close(train(tiny[0], padded, loss_type=loss_type)[0], plain, atol=1e-6, rtol=0)


def test_row_order_within_a_group_changes_nothing(tiny, batch_of, mixed_triples):
    shuffled = [mixed_triples[i] for i in (2, 0, 3, 1, 7, 6, 5, 4)]
    torch.testing.assert_close(train(tiny[0], batch_of(shuffled, 4))[0], train(tiny[0], batch_of(mixed_triples, 4))[0], atol=1e-6, rtol=0)


@LOSS_TYPES
def test_skipping_zero_advantage_rows_changes_nothing(tiny, batch_of, mixed_triples, loss_type):
    """A group of equal rewards adds nothing to the gradient but its tokens stay in the denominator."""
    triples = mixed_triples[:4] + [(prompt, completion, 0) for prompt, completion, _ in mixed_triples[4:]]
    batch = batch_of(triples, 4)
    kept, kept_weights, metrics = train(tiny[0], batch, loss_type=loss_type, drop_zero_variance=False)
    dropped, dropped_weights, fewer = train(tiny[0], batch, loss_type=loss_type, drop_zero_variance=True)
    assert (metrics["frac_rows_trained"], fewer["frac_rows_trained"]) == (1.0, 0.5)
    torch.testing.assert_close(dropped, kept, atol=1e-6, rtol=0)
    torch.testing.assert_close(dropped_weights, kept_weights, atol=1e-6, rtol=0)


def test_a_step_without_any_signal_still_takes_adams_momentum_step(tiny, batch_of, mixed_triples):
    """With every row skipped the gradients are zeros, not None, so that AdamW moves exactly as if the rows had been computed."""
    weights = {}
    for drop in (True, False):
        model = copy.deepcopy(tiny[0])
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        args = grpo.Args(num_generations=4, drop_zero_variance=drop)
        flops = Flops.of(model)
        grpo.update(model, optimizer, batch_of(mixed_triples, 4), args, flops)
        before = model.model.norm.weight.detach().clone()
        metrics = grpo.update(model, optimizer, batch_of([(p, c, 1) for p, c, _ in mixed_triples], 4), args, flops)
        weights[drop] = model.model.norm.weight.detach()
        assert not torch.equal(before, weights[drop])
        assert metrics["grad_norm"] == 0.0
    torch.testing.assert_close(weights[True], weights[False], atol=1e-7, rtol=0)


def test_rows_are_not_skipped_when_they_have_another_gradient(tiny, batch_of, mixed_triples):
    """beta and entropy_coef give every row a gradient, whatever its advantage."""
    batch = batch_of([(p, c, 1) for p, c, _ in mixed_triples], 4)
    gradient, _, metrics = train(tiny[0], batch, entropy_coef=0.01)
    assert metrics["frac_rows_trained"] == 1.0 and gradient.abs().max() > 1e-5
    batch.ref_logps = torch.zeros(batch.completion_ids.shape)
    gradient, _, metrics = train(tiny[0], batch, beta=0.1)
    assert metrics["frac_rows_trained"] == 1.0 and gradient.abs().max() > 1e-5 and metrics["kl"] > 0


def test_masked_truncated_rows_leave_loss_and_token_count(tiny, batch_of, mixed_triples, monkeypatch):
    """--mask_truncated_completions: as if the row had no tokens, while its reward stays in the baseline of its group."""
    (model, tokenizer), whole = tiny, batch_of(mixed_triples, 4)
    prompts = [{"prompt_ids": ids[mask].tolist(), "difficulty": "all"} for ids, mask in zip(whole.prompt_ids[::4], whole.prompt_mask[::4])]
    rewards = [float(reward) for _, _, reward in mixed_triples]
    monkeypatch.setattr(common, "grade", lambda samples, args: [
        dataclasses.replace(sample, reward=reward) for sample, reward in zip(samples, rewards)])

    def rolled_out(cut, **flags):
        """The Batch of a rollout that samples the completions of `whole`, the rows `cut` without their EOS."""
        mask = whole.completion_mask.clone()
        mask[cut, mask[cut].sum(1) - 1] = False
        monkeypatch.setattr(common, "generate", lambda *_: (whole.completion_ids, mask))
        return grpo.rollout(model, None, tokenizer, prompts, grpo.Args(num_generations=4, **flags), None)[0]

    batch = rolled_out([2], mask_truncated_completions=True)
    assert torch.equal(batch.advantages, whole.advantages) and batch.loss_mask.any(dim=1).tolist() == [row != 2 for row in range(8)]
    emptied = dataclasses.replace(batch, completion_mask=batch.loss_mask)
    torch.testing.assert_close(train(model, batch)[0], train(model, emptied)[0], atol=1e-6, rtol=0)
    trained = train(model, rolled_out([2]))[0]
    assert (trained - train(model, batch)[0]).abs().max() > 1e-3
    gradient, _, metrics = train(model, rolled_out(list(range(8)), mask_truncated_completions=True))
    assert gradient.abs().max() == 0.0 and metrics["frac_rows_trained"] == 0.0


def test_two_minibatches_are_two_optimizer_steps_over_whole_groups(tiny, batch_of, mixed_triples):
    """The first group's step, then the second's, each with its own denominator, with the old log-probs of the start."""
    batch = batch_of(mixed_triples, 4)
    args = grpo.Args(num_generations=4, num_minibatches=2)
    model, flops = copy.deepcopy(tiny[0]), Flops.of(tiny[0])
    batch.old_logps = engine.compute_logps(model, batch, args, flops)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    grpo.update(model, optimizer, batch, args, flops)
    expected = copy.deepcopy(tiny[0])
    optimizer = torch.optim.AdamW(expected.parameters(), lr=1e-3)
    for rows in torch.arange(8).split(4):
        grpo.update(expected, optimizer, batch[rows], grpo.Args(num_generations=4), flops)
    for ours, theirs in zip(model.parameters(), expected.parameters()):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_a_non_finite_gradient_skips_the_optimizer_step(tiny, batch_of, mixed_triples):
    batch = batch_of(mixed_triples, 4)
    batch.advantages[0] = float("inf")
    before = torch.cat([p.detach().flatten() for p in tiny[0].parameters()])
    _, after, metrics = train(tiny[0], batch)
    assert metrics["skipped_updates"] == 1 and torch.equal(before, after)


def test_gradient_checkpointing_gives_the_same_gradient(tiny, batch_of, mixed_triples):
    batch = batch_of(mixed_triples, 4)
    plain, _, _ = train(tiny[0], batch)
    tiny[0].activation_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(train(tiny[0], batch, gradient_checkpointing=True)[0], plain, atol=1e-6, rtol=0)


@LOSS_TYPES
def test_the_log_prob_path_does_not_change_the_gradient(tiny, batch_of, mixed_triples, loss_type):
    batch = batch_of(mixed_triples, 4)
    reference, _, metrics = train(tiny[0], batch, loss_type=loss_type, logprob_impl="reference", entropy_coef=0.01)
    tiled, _, tiled_metrics = train(tiny[0], batch, loss_type=loss_type, logprob_impl="tiled", entropy_coef=0.01)
    assert (tiled - reference).abs().max() < 1e-6 * reference.norm()
    assert tiled_metrics["entropy"] == pytest.approx(metrics["entropy"], abs=1e-5)


@LOSS_TYPES
def test_sharing_prompts_does_not_change_the_gradient(tiny, batch_of, mixed_triples, monkeypatch, loss_type):
    """A step whose groups share their prompts against one that computes every row's prompt, whole and in micro-batches."""
    batch = batch_of([(prompt + " " + prompt, completion, reward) for prompt, completion, reward in mixed_triples], 4)
    shared = [train(tiny[0], batch, loss_type=loss_type, micro_batch_tokens=tokens)[0] for tokens in (8192, 400, 250)]
    monkeypatch.setattr(scoring, "tokens_computed", lambda num_prompts, num_rows, width, length: num_rows * (width + length))
    plain = train(tiny[0], batch, loss_type=loss_type)[0]
    for gradient in shared:
        assert not torch.equal(gradient, plain)  # they are computed in another way
        assert (gradient - plain).abs().max() < 1e-6 * plain.norm()


def test_the_papers_rule_charges_rows_that_are_skipped(tiny, batch_of, mixed_triples):
    batch, flops = batch_of(mixed_triples[:4] + [(prompt, text, 0) for prompt, text, _ in mixed_triples[4:]], 4), Flops.of(tiny[0])
    grpo.update(tiny[0], torch.optim.SGD(tiny[0].parameters(), lr=0.0), batch, grpo.Args(num_generations=4), flops)
    assert flops.spent["train"] == 3 * flops.forward(batch.lengths[:4].tolist())
    assert flops.spent["paper"] == 6 * flops.parameters * int(batch.lengths.sum())
