"""Is what is sampled the policy itself, and nothing that a model's files or a default slipped in?"""

import itertools

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GenerationConfig, GPT2Config, GPT2LMHeadModel

import engine
import grpo
from engine import models, ranks, sampling, scoring

POISON = {"top_k": 1, "top_p": 0.1, "repetition_penalty": 5.0, "temperature": 0.01, "do_sample": True, "no_repeat_ngram_size": 2,
          "min_new_tokens": 12, "bad_words_ids": [[40]], "suppress_tokens": [41]}


@pytest.fixture
def prompts(tiny):
    return sampling.left_pad([tiny[1]("Q: Reverse 3 , 41 , 7 ? A:")["input_ids"]] * 64, tiny[1].pad_token_id, "cpu")


def draw(model, prompts, **flags):
    torch.manual_seed(0)
    return sampling.generate(model, *prompts, [1], 0, 12, **flags)


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
    ids, _ = sampling.generate(model, *wide, [1], 0, 1, temperature=3.0, batch_size=4096)
    frequencies = torch.bincount(ids[:, 0], minlength=len(probabilities)) / len(ids)
    errors = (probabilities * (1 - probabilities) / len(ids)).sqrt().clamp(min=1 / len(ids))
    assert ((frequencies - probabilities).abs() / errors).max() < 5


def test_chunks_are_put_back_together(tiny, prompts):
    """Greedy rows do not depend on how many rows a call holds; shorter chunks are padded."""
    long = tiny[1]("Q: Tom buys 2 apple , 3 bread , 1 nut . Bill ? A:")["input_ids"]
    short = tiny[1]("Q: Largest of 5 , 31 , 7 ? A:")["input_ids"]
    inputs = sampling.left_pad([short, short, long], 0, "cpu")
    whole, mask = sampling.generate(tiny[0], *inputs, [1], 0, 40, temperature=0)
    cut, cut_mask = sampling.generate(tiny[0], *inputs, [1], 0, 40, temperature=0, batch_size=2)
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
        models.seed_everything(seed, step, stream)
        return torch.rand(4).tolist()

    assert at(0, 3) == at(0, 3)
    assert len({tuple(at(*key)) for key in ((0, 3), (0, 4), (1, 3), (0, 3, "eval"))}) == 4


def test_each_rank_draws_from_a_stream_of_its_own_and_the_first_from_that_of_a_single_process(monkeypatch):
    def drawn():
        models.seed_everything(0, 3)
        return torch.rand(4).tolist()

    alone = drawn()
    monkeypatch.setattr(ranks, "rank", lambda: 1)
    assert drawn() == drawn() != alone
    monkeypatch.setattr(ranks, "rank", lambda: 0)
    assert drawn() == alone


def few_words(num_words):
    """A GPT-2 (learned positions) whose next word depends on all words before it and on where they are."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=num_words, bos_token_id=None, eos_token_id=None, n_positions=64, n_embd=16, n_layer=2,
                                       n_head=2)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def rows_computed(model):
    """(list that gets the number of rows of each forward pass from now on, its hook)."""
    calls = []
    return calls, model.register_forward_pre_hook(lambda module, args, inputs: calls.append(len(inputs["input_ids"])), with_kwargs=True)


def test_rows_that_go_on_after_a_cut_are_completed_as_if_there_had_been_none():
    """Greedy completions in waves against one call of generate: unequal prompts, rows that end at many different lengths."""
    model, generator = few_words(97), torch.Generator().manual_seed(0)
    prompts = sampling.left_pad([torch.randint(1, 95, (1 + row % 9,), generator=generator).tolist() for row in range(40)], 0, "cpu")
    eos_ids = list(range(2, 97, 12))
    whole, mask, _ = sampling.generate(model, *prompts, eos_ids, 0, 40, temperature=0, with_logps=True)
    calls, hook = rows_computed(model)
    waves, wave_mask = sampling.generate(model, *prompts, eos_ids, 0, 40, temperature=0)
    hook.remove()
    assert len(set(calls)) > 3 and calls == sorted(calls, reverse=True) and min(calls) < 20
    assert torch.equal(mask, wave_mask) and torch.equal(whole[mask], waves[wave_mask])
    assert (waves[~wave_mask] == 0).all()
    few, hook = rows_computed(model)
    sampling.generate(model, *(part[:8] for part in prompts), eos_ids, 0, 40, temperature=0)
    hook.remove()
    assert set(few) == {8}  # 8 rows are not worth a cut


def test_what_is_drawn_after_a_cut_is_the_policy():
    """Chi-square of 2 x 16384 completions, over all that are possible, against the probabilities that score_completions gives them."""
    model, stop = few_words(4), 2
    words = torch.tensor([*itertools.product(range(4), repeat=4)])  # (256, 4)
    completion_ids = torch.unique(words * sampling.completion_mask(words, [stop]), dim=0)  # (121, 4)
    mask = sampling.completion_mask(completion_ids, [stop])
    both = [[1, 2, 0, 1, 1], [2]]
    prompts = sampling.left_pad(both * 16384, 0, "cpu")
    calls, hook = rows_computed(model)
    torch.manual_seed(0)
    drawn, _ = sampling.generate(model, *prompts, [stop], 0, 4, temperature=1.3, batch_size=2**15)
    hook.remove()
    assert len(set(calls)) == 4  # cut after every word
    for row, prompt in enumerate(both):
        scored = [part.expand(len(completion_ids), -1) for part in sampling.left_pad([prompt], 0, "cpu")]
        with torch.no_grad():
            probabilities = scoring.score_completions(model, *scored, completion_ids, mask, 1.3, "reference")[0].double().sum(1).exp()
        assert probabilities.sum() == pytest.approx(1, abs=1e-5)
        counts = (drawn[row::2, None] == completion_ids).all(2).sum(0).double()  # (121,)
        assert counts.sum() == 16384
        expected = probabilities * 16384
        rare = expected < 10  # together one outcome
        expected, counts = (torch.cat([n[~rare], n[rare].sum()[None]]) for n in (expected, counts))
        freedom = len(expected) - 1
        assert freedom > 40
        assert ((counts - expected) ** 2 / expected).sum() < freedom + 4 * (2 * freedom) ** 0.5


def test_a_model_whose_cache_cannot_be_cut_is_sampled_in_one_call_and_says_so(capsys):
    scoring.print_once.cache_clear()
    torch.manual_seed(0)
    sliding = Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=97, hidden_size=16, intermediate_size=16, num_hidden_layers=2, head_dim=8,
                                                 num_attention_heads=2, num_key_value_heads=1, sliding_window=2))
    prompts = sampling.left_pad([[row] for row in range(5, 45)], 0, "cpu")
    calls, hook = rows_computed(sliding)
    for _ in range(2):
        sampling.generate(sliding, *prompts, list(range(2, 97, 6)), 0, 12, temperature=1.0)
    hook.remove()
    assert set(calls) == {40}
    assert capsys.readouterr().out.count("Gemma3ForCausalLM goes on computing rows that have ended: its cache has ") == 1
    xlnet = few_words(4)
    xlnet.__class__ = type("XLNetPolicy", (GPT2LMHeadModel,), {})  # transformers goes by the name
    assert scoring.special_cache(xlnet) == "it has a cache of its own"


def test_a_static_cache_draws_from_the_same_distribution(tiny):
    """Rows and widths that are padded: greedy completions, and the log-probs that sampling drew from, are those of scoring."""
    model, tokenizer = tiny
    texts = ["Q: Reverse 3 , 41 , 7 ? A:", "Q: Reverse 5 ? A:", "Q: Reverse 3 , 41 , 7 , 8 , 9 , 2 ? A:"]
    rows = sampling.left_pad([tokenizer(text)["input_ids"] for text in texts], tokenizer.pad_token_id, "cpu")
    ids, mask = sampling.generate(model, *rows, [1], 0, 12, temperature=0.0)
    model.static_cache = True
    static_ids, static_mask = sampling.generate(model, *rows, [1], 0, 12, temperature=0.0)
    assert torch.equal(static_ids, ids) and torch.equal(static_mask, mask)
    drawn_ids, drawn_mask, drawn = sampling.generate(model, *rows, [1], 0, 12, temperature=2.0, with_logps=True)
    scored, _ = scoring.score_completions(model, *rows, drawn_ids, drawn_mask, 2.0)
    assert len(drawn) == 3 and (scored - drawn)[drawn_mask].abs().max() < 1e-4


def test_a_model_that_cannot_be_compiled_is_refused_with_a_static_cache(tiny, monkeypatch):
    models.check_fit(*tiny, grpo.Args(static_cache=True))
    monkeypatch.setattr(type(tiny[0]), "_can_compile_fullgraph", False)
    with pytest.raises(engine.BadArgument, match="--static_cache: LlamaForCausalLM cannot be compiled"):
        models.check_fit(*tiny, grpo.Args(static_cache=True))


@pytest.mark.parametrize("rows, width, shape", [
    (1, 1, (1, 64)), (3, 64, (4, 64)), (33, 65, (64, 128)), (64, 100, (64, 128)), (65, 9, (99, 64))])
def test_few_shapes_are_compiled(rows, width, shape):
    ids, mask = torch.randint(5, 90, (rows, width)), torch.ones(rows, width, dtype=torch.bool)
    padded_ids, padded_mask = sampling.pad_to_few_shapes(ids, mask, 0, 99)  # at most 99 rows in a call
    assert padded_ids.shape == padded_mask.shape == shape
    assert torch.equal(padded_ids[:rows, -width:], ids) and padded_mask[:, -width:].all() and not padded_mask[:, :-width].any()
