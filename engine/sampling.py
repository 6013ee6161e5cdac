"""Sampling with HF generate: padding, masks by position, completions in calls of ever fewer rows."""

import copy

import torch
from transformers import DynamicCache, GenerationConfig, StoppingCriteria

from . import ranks
from .errors import RunError
from .models import autocast, body, print_once
from .scoring import distinct_prompts, first_rows, special_cache, tokens_computed


def left_pad(sequences, pad_id, device):
    """Token id lists -> (ids, mask), both (B, P) with P the longest; padding on the left, mask bool True on tokens."""
    longest = max(len(ids) for ids in sequences)
    ids = [[pad_id] * (longest - len(ids)) + list(ids) for ids in sequences]
    mask = [[False] * (longest - len(ids)) + [True] * len(ids) for ids in sequences]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def right_pad(chunks, value):
    """Stack tensors (b_i, T_i) into one (sum b_i, max T_i), filled with `value` on the right."""
    longest = max(chunk.shape[1] for chunk in chunks)
    return torch.cat([torch.nn.functional.pad(chunk, (0, longest - chunk.shape[1]), value=value) for chunk in chunks])


def pad(prompts, completions, tokenizer, device):
    """B prompts and B completions (lists of ids) -> prompt_ids, prompt_mask (B, P) and completion_ids, completion_mask (B, T)."""
    lengths = torch.tensor([len(ids) for ids in completions])  # (B,)
    completion_ids = right_pad([torch.tensor([ids]) for ids in completions], tokenizer.pad_token_id)  # (B, T)
    mask = torch.arange(completion_ids.shape[1]) < lengths.unsqueeze(1)  # (B, T) bool, by position
    return *left_pad(prompts, tokenizer.pad_token_id, device), completion_ids.to(device), mask.to(device)


def completion_mask(completion_ids, eos_ids):
    """(B, T) ids -> (B, T) bool: True up to and including the first EOS.

    By position, never by value: where pad equals eos, a mask by value would never train the model to stop (tests/test_masks.py).
    """
    is_eos = torch.isin(completion_ids, torch.tensor(eos_ids, device=completion_ids.device))  # (B, T)
    return is_eos.int().cumsum(dim=1) - is_eos.int() == 0


@ranks.inside_fsdp_forward
def generate(model, prompt_ids, prompt_mask, eos_ids, pad_id, max_new_tokens, temperature=1.0, top_p=1.0, batch_size=256,
             with_logps=False):
    """Sample one completion per row with HF generate. Returns (completion_ids, completion_mask), both (B, T).

    temperature 0 is greedy. A call of HF generate has at most `batch_size` rows. Each rank samples its share of the rows and returns
    those of all. `with_logps` adds the log-probs (B, T) that generate itself drew from, at a cost of (B, T, V) memory. The model's own
    generation_config is put aside meanwhile: generate fills every unset field from it, so an instruct model's top_k or
    repetition_penalty would change the policy unseen, and global defaults fill the rest, where top_k is 50 (tests/test_sampling.py).
    With --static_cache a GPU compiles the model once a shape, and rows that have ended are computed to the end.
    """
    static = getattr(model, "static_cache", False)
    generation_config = GenerationConfig(
        do_sample=temperature > 0, temperature=temperature or 1.0, top_p=top_p, top_k=0 if temperature else None, typical_p=1.0,
        num_beams=1, repetition_penalty=1.0, no_repeat_ngram_size=0, max_new_tokens=max_new_tokens, eos_token_id=eos_ids,
        pad_token_id=pad_id, use_cache=True, return_dict_in_generate=True, output_scores=with_logps,
        cache_implementation="static" if static else None)
    own_config, was_training = model.generation_config, model.training
    model.generation_config = generation_config
    model.eval()
    ids, logps, own = [], [], ranks.own_slice(len(prompt_ids))
    idle = own.start == own.stop
    if idle:  # fewer rows than ranks: sample one all the same, for the collective calls in it
        own = slice(0, 1)
    reason = special_cache(model)
    if reason and not with_logps and not static:
        print_once(f"{type(model).__name__} goes on computing rows that have ended: {reason}")
    try:
        with torch.no_grad(), autocast(model), ranks.keep_unsharded(model):
            for chunk_ids, chunk_mask in zip(prompt_ids[own].split(batch_size), prompt_mask[own].split(batch_size)):
                # Not synced: the layers stay whole, so each rank calls generate and the model as often as its own rows need.
                if not (reason or with_logps or static):
                    ids.append(generate_compacting(model, chunk_ids, chunk_mask, generation_config))
                    continue
                num_rows = len(chunk_ids)
                if static:
                    chunk_ids, chunk_mask = pad_to_few_shapes(chunk_ids, chunk_mask, pad_id, batch_size)
                output = model.generate(
                    input_ids=chunk_ids, attention_mask=chunk_mask.long(), generation_config=generation_config,
                    cache=None if static else prefill_shared_prompts(model, chunk_ids, chunk_mask), synced_gpus=False)
                ids.append(output.sequences[:num_rows, chunk_ids.shape[1] :])
                if with_logps:
                    log_probs = torch.stack(output.scores, dim=1)[:num_rows].float().log_softmax(-1)  # (b, T, V)
                    logps.append(log_probs.gather(-1, ids[-1].unsqueeze(-1)).squeeze(-1))
                del output  # and its cache, before the next call makes one
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise RunError(f"sampling from {type(model).__name__}: its logits are not finite") from error
    finally:
        model.generation_config = own_config
        model.train(was_training)
    completion_ids = right_pad(ranks.all_gather_list([] if idle else ids), pad_id).to(prompt_ids.device)
    mask = completion_mask(completion_ids, eos_ids)
    if not with_logps:
        return completion_ids, mask
    return completion_ids, mask, right_pad(ranks.all_gather_list([] if idle else logps), 0.0).to(prompt_ids.device)


def pad_to_few_shapes(prompt_ids, prompt_mask, pad_id, batch_size):
    """Prompts (b, P), repeated up to a power of two or `batch_size` rows, and padded to a multiple of 64: few shapes are compiled."""
    num_rows = min(2 ** (len(prompt_ids) - 1).bit_length(), batch_size)
    rows = torch.arange(num_rows, device=prompt_ids.device) % len(prompt_ids)
    left = (-prompt_ids.shape[1] % 64, 0)
    pad = torch.nn.functional.pad
    return pad(prompt_ids[rows], left, value=pad_id), pad(prompt_mask[rows], left, value=False)


class StopWhenFewActive(StoppingCriteria):
    """Stop a generate of more than 8 rows when at most three quarters of them go on."""

    def __init__(self, num_rows, eos_ids):
        self.ended, self.eos_ids = torch.zeros(num_rows, dtype=torch.bool, device=eos_ids.device), eos_ids

    def __call__(self, input_ids, scores, **kwargs):
        self.ended |= torch.isin(input_ids[:, -1], self.eos_ids)  # (b,)
        few = (4 * (~self.ended).sum() <= 3 * len(self.ended)) & (len(self.ended) > 8)  # () bool, on the device: nothing waits for it
        return few.expand(len(self.ended))  # (b,)


def generate_compacting(model, prompt_ids, prompt_mask, config):
    """Completions (B, T) of prompts (B, P) by calls of HF generate, each for the rows that have not ended yet, with their cache.

    HF generate computes every row until the longest has ended, and most rows end long before it. The distribution is the same. A seed
    draws other tokens than in one call, since fewer rows share the stream of random numbers (tests/test_sampling.py).
    """
    config, width, eos_ids = copy.copy(config), prompt_ids.shape[1], torch.tensor(config.eos_token_id, device=prompt_ids.device)
    longest = width + config.max_new_tokens
    completion_ids = prompt_ids.new_full((len(prompt_ids), config.max_new_tokens), config.pad_token_id)  # (B, max_new_tokens)
    rows, ids, mask = torch.arange(len(prompt_ids), device=prompt_ids.device), prompt_ids, prompt_mask.long()
    cache = prefill_shared_prompts(model, prompt_ids, prompt_mask)
    while len(rows) and ids.shape[1] < longest:
        config.max_new_tokens = longest - ids.shape[1]
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, cache=cache,
                                stopping_criteria=[StopWhenFewActive(len(rows), eos_ids)], synced_gpus=False)
        completion_ids[rows, : output.sequences.shape[1] - width] = output.sequences[:, width:]
        # A row goes on if it has no EOS; then all of its new tokens are real ones.
        active = (~torch.isin(output.sequences[:, width:], eos_ids).any(dim=1)).nonzero()[:, 0]  # (num_active,)
        mask = torch.nn.functional.pad(mask, (0, output.sequences.shape[1] - ids.shape[1]), value=1)[active]
        rows, ids, cache = rows[active], output.sequences[active], output.cache
        cache.batch_select_indices(active)
    return completion_ids[:, : int(completion_mask(completion_ids, config.eos_token_id).sum(1).max())]


def prefill_shared_prompts(model, prompt_ids, prompt_mask):
    """The cache of all but the last token of some prompts (B, P), each different one computed once; None where that saves too little."""
    prompts, width = distinct_prompts(model, prompt_ids, prompt_mask), prompt_ids.shape[1] - 1  # (B,), ()
    rows = first_rows(prompts)  # (num_prompts,)
    if tokens_computed(len(rows), len(prompts), width, 1) == len(prompts) * (width + 1):
        return None
    cache, attention_mask = DynamicCache(config=model.config.get_text_config(decoder=True)), prompt_mask[rows, :-1].long()
    body(model)(input_ids=prompt_ids[rows, :-1], attention_mask=attention_mask, cache=cache, use_cache=True,
                position_ids=(attention_mask.cumsum(dim=1) - 1).clamp(min=0))
    cache.batch_select_indices(prompts)
    return cache
