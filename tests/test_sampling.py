"""Is what is sampled the policy itself, and nothing that a model's files or a default slipped in?"""

import pytest
import torch
from transformers import GenerationConfig

import common

POISON = {"top_k": 1, "top_p": 0.1, "repetition_penalty": 5.0, "temperature": 0.01, "do_sample": True, "no_repeat_ngram_size": 2,
          "min_new_tokens": 12, "bad_words_ids": [[40]], "suppress_tokens": [41]}


@pytest.fixture
def prompts(tiny):
    return common.left_pad([tiny[1]("Q: Reverse 3 , 41 , 7 ? A:")["input_ids"]] * 64, tiny[1].pad_token_id, "cpu")


def draw(model, prompts, **flags):
    torch.manual_seed(0)
    return common.sample(model, *prompts, [1], 0, 12, **flags)


def test_the_models_generation_config_does_not_leak(tiny, prompts):
    model, _ = tiny
    clean, _ = draw(model, prompts, temperature=4.0)
    assert len({tuple(row) for row in clean.tolist()}) > 32  # a real spread: top_k 1 would give one row
    model.generation_config = poisoned = GenerationConfig(**POISON)
    assert torch.equal(draw(model, prompts, temperature=4.0)[0], clean)
    assert model.generation_config is poisoned  # put back afterwards


def test_the_poison_would_be_seen(tiny, prompts):
    """The test above can fail: plain generate does take these values."""
    model, _ = tiny
    model.generation_config = GenerationConfig(**POISON)
    torch.manual_seed(0)
    with torch.no_grad():
        rows = model.generate(input_ids=prompts[0], attention_mask=prompts[1].long(), max_new_tokens=12, do_sample=True, temperature=4.0)
    assert len({tuple(row) for row in rows.tolist()}) == 1


def test_no_token_is_cut_from_the_tail(tiny, prompts):
    """transformers' global default is top_k 50: at a flat temperature more than 50 different first tokens must appear."""
    wide = [part.repeat(8, 1) for part in prompts]
    ids, _ = draw(tiny[0], wide, temperature=100.0)
    assert len(set(ids[:, 0].tolist())) > 50


def test_frequencies_match_the_distribution(tiny, prompts):
    """First-token frequencies of 4096 samples lie within 5 standard errors of the softmax."""
    model, _ = tiny
    with torch.no_grad():
        logits = model(input_ids=prompts[0][:1]).logits[0, -1]
    probabilities = torch.softmax(logits / 3.0, -1)
    wide = [part.repeat(64, 1) for part in prompts]
    torch.manual_seed(0)
    ids, _ = common.sample(model, *wide, [1], 0, 1, temperature=3.0, batch_size=4096)
    frequencies = torch.bincount(ids[:, 0], minlength=len(probabilities)) / len(ids)
    errors = (probabilities * (1 - probabilities) / len(ids)).sqrt().clamp(min=1 / len(ids))
    assert ((frequencies - probabilities).abs() / errors).max() < 5


def test_chunks_are_put_back_together(tiny, prompts):
    """Greedy rows do not depend on how many rows a call holds; shorter chunks are padded."""
    long = tiny[1]("Q: Tom buys 2 apple , 3 bread , 1 nut . Bill ? A:")["input_ids"]
    short = tiny[1]("Q: Largest of 5 , 31 , 7 ? A:")["input_ids"]
    inputs = common.left_pad([short, short, long], 0, "cpu")
    whole, mask = common.sample(tiny[0], *inputs, [1], 0, 40, temperature=0)
    cut, cut_mask = common.sample(tiny[0], *inputs, [1], 0, 40, temperature=0, batch_size=2)
    assert torch.equal(whole, cut) and torch.equal(mask, cut_mask)
    assert mask.sum(1)[0] < mask.sum(1)[2]


def test_length_limit_and_train_mode(tiny, prompts):
    model, _ = tiny
    model.train()
    ids, mask = draw(model, prompts, temperature=100.0)
    assert ids.shape[1] <= 12 and mask.any(dim=1).all()
    assert model.training


def test_the_step_decides_the_random_numbers(tiny, prompts):
    def at(seed, step, stream="train"):
        common.seed_everything(seed, step, stream)
        return torch.rand(4).tolist()

    assert at(0, 3) == at(0, 3)
    assert len({tuple(at(*key)) for key in ((0, 3), (0, 4), (1, 3), (0, 3, "eval"))}) == 4
