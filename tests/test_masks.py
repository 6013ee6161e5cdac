"""Is exactly the right set of tokens scored, at the right positions and temperature?"""

import copy

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GPT2Config, GPT2LMHeadModel

import common
import grpo
from engine import models, sampling, scoring
from engine.scoring import score_completions


@pytest.fixture
def gpt2():
    """A random GPT-2: learned positions, which RoPE models do not have, so that a shifted position shows."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=95, eos_token_id=96)
    model = GPT2LMHeadModel(config).eval()
    torch.nn.init.normal_(model.transformer.wpe.weight, std=0.5)
    return model


def padded(sequences, pad_id=0):
    return sampling.left_pad(sequences, pad_id, "cpu")


def test_completion_mask_ends_with_the_first_eos_by_position():
    ids = torch.tensor([[5, 6, 2, 2, 2], [5, 6, 7, 8, 9], [2, 5, 2, 5, 5], [5, 3, 6, 2, 0]])
    assert sampling.completion_mask(ids, [2]).int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 1, 0]]
    assert sampling.completion_mask(ids, [2, 3]).int().tolist()[3] == [1, 1, 0, 0, 0]


def test_pad_equal_to_eos_still_trains_the_stop(tiny):
    """The first EOS is scored and has a gradient; the padding after it, the same id, has none."""
    model, _ = tiny
    prompt_ids, prompt_mask = padded([[3, 9, 10]], pad_id=1)
    completion_ids = torch.tensor([[20, 21, 1, 1, 1]])
    mask = sampling.completion_mask(completion_ids, [1])
    logps, _ = score_completions(model, prompt_ids, prompt_mask, completion_ids, mask)
    assert (logps != 0).tolist() == [[True, True, True, False, False]]
    batch = grpo.Batch(prompt_ids, prompt_mask, completion_ids, mask, loss_mask=mask, advantages=torch.ones(1))
    loss, _ = grpo.policy_loss(logps, torch.zeros(1, 5), batch, grpo.Args(), num_tokens=3, num_rows=1)
    gradient = torch.autograd.grad(loss, logps)[0]
    torch.testing.assert_close(gradient, torch.tensor([[-1, -1, -1, 0, 0]]) / 3)


def test_padded_row_equals_unpadded_row_with_learned_positions(gpt2):
    prompts, completions = [[1, 2, 3, 4, 5, 6, 7], [8, 9]], torch.tensor([[11, 12, 13], [14, 15, 16]])
    mask = torch.ones(2, 3, dtype=torch.bool)
    together, _ = score_completions(gpt2, *padded(prompts), completions, mask)
    for row, prompt in enumerate(prompts):
        alone, _ = score_completions(gpt2, *padded([prompt]), completions[row : row + 1], mask[:1])
        torch.testing.assert_close(together[row], alone[0], atol=1e-5, rtol=0)


def test_generate_pads_right_with_learned_positions(gpt2):
    """Greedy completions of a short prompt are the same alone and beside a longer one."""
    together, _ = sampling.generate(gpt2, *padded([[1, 2, 3, 4, 5, 6, 7], [8, 9]]), [96], 0, 12, temperature=0)
    alone, _ = sampling.generate(gpt2, *padded([[8, 9]]), [96], 0, 12, temperature=0)
    assert together[1, : alone.shape[1]].tolist() == alone[0].tolist()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_rescored_equals_sampled_at_every_temperature(gpt2, temperature):
    """The log-probs that generate drew from, of rows of unequal prompts, are those that are trained."""
    torch.manual_seed(1)
    prompt_ids, prompt_mask = padded([[1, 2, 3, 4, 5], [8, 9], [7]] * 4)
    ids, mask, drawn = sampling.generate(gpt2, prompt_ids, prompt_mask, [96], 0, 10, temperature, with_logps=True)
    scored, _ = score_completions(gpt2, prompt_ids, prompt_mask, ids, mask, temperature)
    torch.testing.assert_close(scored[mask], drawn[mask], atol=1e-5, rtol=0)
    if temperature != 1.0:
        unscaled, _ = score_completions(gpt2, prompt_ids, prompt_mask, ids, mask)
        assert (unscaled - drawn)[mask].abs().max() > 0.01


def test_logps_and_entropy_are_those_of_the_softmax(gpt2):
    """Against log_softmax written out on one unpadded row."""
    logits = gpt2(torch.tensor([[1, 2, 3, 11, 12]])).logits[0] / 0.7
    logps, entropy = score_completions(gpt2, *padded([[1, 2, 3]]), torch.tensor([[11, 12]]), torch.ones(1, 2, dtype=torch.bool), 0.7)
    distribution = torch.distributions.Categorical(logits=logits[2:4])
    torch.testing.assert_close(logps[0], distribution.log_prob(torch.tensor([11, 12])))
    torch.testing.assert_close(entropy[0], distribution.entropy())
    with pytest.raises(ValueError, match="temperature"):
        score_completions(gpt2, *padded([[1]]), torch.tensor([[2]]), torch.ones(1, 1, dtype=torch.bool), 0.0)


def test_dropout_is_off_when_a_model_is_loaded(gpt2, tmp_path, tiny):
    """Old and new log-probs of the same tokens agree in train mode."""
    assert gpt2.config.resid_pdrop > 0
    gpt2.save_pretrained(tmp_path)
    tiny[1].save_pretrained(tmp_path)
    model, _ = models.load_model(str(tmp_path))
    model.train()
    inputs = (*padded([[1, 2, 3]]), torch.tensor([[11, 12]]), torch.ones(1, 2, dtype=torch.bool))
    assert torch.equal(score_completions(model, *inputs)[0], score_completions(model, *inputs)[0])


def test_every_eos_id_of_tokenizer_config_and_generation_config_ends_a_completion(tiny):
    model, tokenizer = copy.deepcopy(tiny[0]), tiny[1]
    model.config.eos_token_id = [1, 40]
    model.generation_config.eos_token_id = 41
    assert models.eos_ids(model, tokenizer) == [1, 40, 41]
    texts, ended = zip(*(common.decode(tokenizer, ids, [1, 40, 41]) for ids in ([30, 41], [30, 31, 32], [1], [])))
    assert ended == (True, False, True, False)
    assert texts == (tokenizer.decode([30]), tokenizer.decode([30, 31, 32]), "", "")


# Rows of three prompts of unequal length, two of them mixed up and one alone; one completion has a single token.
SHARED_PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [20, 21, 22, 23, 24, 25], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [30] * 10,
                  [20, 21, 22, 23, 24, 25], [20, 21, 22, 23, 24, 25], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [20, 21, 22, 23, 24, 25]]


def score_and_train(model, impl, length, monkeypatch, share):
    """(log-probs, entropies, gradient, tokens that the model's layers saw) of rows of SHARED_PROMPTS."""
    model.zero_grad()
    seen = []
    hook = model.transformer.wte.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].numel()))
    if not share:
        monkeypatch.setattr(scoring, "tokens_computed", lambda num_prompts, num_rows, width, length: num_rows * (width + length))
    completion_ids = torch.arange(40, 40 + 8 * length).view(8, length) % 90
    mask = torch.arange(length) < torch.tensor([length, 1, 2, 3, 1, 2, 3, length])[:, None]
    logps, entropy = score_completions(model, *padded(SHARED_PROMPTS), completion_ids, mask, 0.7, impl)
    (logps * torch.linspace(-1, 2, 8)[:, None] + 0.3 * entropy).sum().backward()
    hook.remove()
    monkeypatch.undo()
    return logps.detach(), entropy.detach(), torch.cat([p.grad.flatten() for p in model.parameters()]), sum(seen)


@pytest.mark.parametrize("impl", ["reference", "tiled"])
@pytest.mark.parametrize("length", [1, 3, 6])
def test_sharing_prompts_changes_neither_log_probs_nor_gradient(gpt2, monkeypatch, impl, length):
    """Left padding, learned positions, rows of one prompt apart from each other, groups of unequal size."""
    *plain, tokens = score_and_train(gpt2, impl, length, monkeypatch, share=False)
    *shared, fewer = score_and_train(gpt2, impl, length, monkeypatch, share=True)
    assert (tokens, fewer) == (8 * (12 + length), 3 * 12 + 8 * (length - 1))
    for ours, expected in zip(shared, plain):
        assert (ours - expected).abs().max() < 1e-6 * max(1, expected.norm())
    assert plain[2].norm() > 1


def test_a_model_whose_cache_cannot_be_shared_computes_every_prompt_and_says_so(gpt2, capsys):
    scoring.print_once.cache_clear()
    prompt_ids, prompt_mask = padded([[1, 2, 3]] * 4)
    assert scoring.distinct_prompts(gpt2, prompt_ids, prompt_mask).tolist() == [0, 0, 0, 0]
    assert scoring.distinct_prompts(gpt2, *padded([[0, 5, 6], [5, 6]])).tolist() != [0, 0]  # the pad id may be a token, too
    assert not capsys.readouterr().out
    sliding = Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=97, hidden_size=16, intermediate_size=16, num_hidden_layers=2, head_dim=8,
                                                 num_attention_heads=2, num_key_value_heads=1, sliding_window=2))
    checkpointed, sharded = copy.deepcopy(gpt2), copy.deepcopy(gpt2)
    checkpointed.activation_checkpointing_enable({"use_reentrant": False})
    sharded.__class__ = type("Sharded", (FSDPModule, GPT2LMHeadModel), {})  # as fully_shard does
    for model, reason in ((sliding, "SlidingWindow"), (checkpointed, "--gradient_checkpointing"), (sharded, "a sharded model")):
        assert scoring.distinct_prompts(model, prompt_ids, prompt_mask).tolist() == [0, 1, 2, 3]
        assert reason in capsys.readouterr().out
        assert scoring.distinct_prompts(model, prompt_ids, prompt_mask).tolist() == [0, 1, 2, 3]
        assert not capsys.readouterr().out  # once
        assert scoring.distinct_prompts(model, *padded([[1, 2, 3], [4]])).tolist() != [0, 0]


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_prompts_prefilled_once_draw_the_same_completions(gpt2, monkeypatch, temperature):
    """Against a prefill of every row, with learned positions and left padding; the seed decides the tokens, not the way."""
    prompts, drawn, calls = padded(SHARED_PROMPTS * 4), [], []
    hook = gpt2.transformer.wte.register_forward_hook(lambda module, inputs, output: calls.append(tuple(inputs[0].shape)))
    for _ in ("once", "every row"):
        torch.manual_seed(0)
        drawn.append(sampling.generate(gpt2, *prompts, [96], 0, 12, temperature, with_logps=True))
        monkeypatch.setattr(sampling, "tokens_computed", lambda num_prompts, num_rows, width, length: num_rows * (width + length))
    hook.remove()
    assert calls[:2] == [(3, 11), (32, 1)] and (32, 12) in calls
    assert torch.equal(drawn[0][0], drawn[1][0])
    torch.testing.assert_close(drawn[0][2], drawn[1][2], atol=1e-5, rtol=0)
