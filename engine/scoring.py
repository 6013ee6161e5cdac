"""Scoring: log-probs of given completions under a model, and the micro-batches that they are computed in."""

import inspect
from dataclasses import dataclass, fields

import torch
from transformers import DynamicCache

from . import ranks
from .logprob import choose_impl, token_logps
from .models import autocast, body, print_once


@dataclass
class Rows:
    """B prompts and completions, padded. A script's Batch adds fields of shape (B,) or (B, T).

    batch[rows] are some of the rows without the padding that none of them needs. If `rows` is empty, batch[rows] has one masked token:
    the loss is 0, but the model still runs, so that all ranks make the same collective calls. The added fields then have no rows.
    """

    prompt_ids: torch.Tensor  # (B, P) int64, left-padded
    prompt_mask: torch.Tensor  # (B, P) bool
    completion_ids: torch.Tensor  # (B, T) int64, right-padded
    completion_mask: torch.Tensor  # (B, T) bool, True up to and including the first EOS

    @property
    def lengths(self):
        """Tokens of each row, prompt and completion: (B,) int64."""
        return self.prompt_mask.sum(1) + self.completion_mask.sum(1)

    def __getitem__(self, rows):
        some = rows if len(rows) else torch.zeros(1, dtype=torch.int64, device=self.prompt_mask.device)
        width = int(self.prompt_mask[some].sum(1).max())
        length = int(self.completion_mask[some].sum(1).max()) if len(rows) else 1
        part = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("prompt_ids", "prompt_mask"):
                value = value[some, -width:]  # (b, p)
            elif field.name in ("completion_ids", "completion_mask"):
                value = value[some, :length]  # (b, t)
            elif value is not None:
                value = value[rows, :length] if value.dim() == 2 else value[rows]  # (b, t) or (b,)
            part[field.name] = value
        if not len(rows):
            part["completion_mask"] = part["completion_mask"] & False
        return type(self)(**part)


def policy_logps(model, batch, args):
    """Log-probs and entropies of a batch's completions under `model`, with gradient: two tensors (B, T) float32 in nats."""
    return score_completions(model, batch.prompt_ids, batch.prompt_mask, batch.completion_ids, batch.completion_mask, args.temperature,
                             args.logprob_impl)


def compute_logps(model, batch, args, flops):
    """Log-probs (B, T) float32 of a batch's completions under `model`, without gradient, in micro-batches."""
    logps = torch.zeros_like(batch.completion_mask, dtype=torch.float32)  # (B, T)
    for rows in micro_batches(model, batch, torch.arange(len(logps)), args):
        part = batch[rows]
        with torch.no_grad():
            logps[rows, : part.completion_ids.shape[1]] = policy_logps(model, part, args)[0]
    flops.add("train", batch.lengths)
    return ranks.sum_over_ranks(logps)


@ranks.inside_fsdp_forward
def score_completions(model, prompt_ids, prompt_mask, completion_ids, completion_mask, temperature=1.0, impl="auto"):
    """Score given completions: log pi(o_t | q, o_<t) and the entropy of pi(. | q, o_<t), both at `temperature`.

    prompt_ids, prompt_mask (B, P) left-padded; completion_ids, completion_mask (B, T) right-padded, T >= 1.
    Returns (logps, entropy), each (B, T) float32 in nats and 0 where completion_mask is False. Gradients flow through both.
    The policy is what is sampled, so its logits are divided by the sampling temperature (tests/test_masks.py). "reference" takes
    the model's own logits. The other paths take its hidden states and `lm_head`, at completion positions only.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    impl = choose_impl(impl, model.get_output_embeddings().weight.shape[0], prompt_ids.device.type)
    outputs = logits_or_hidden(model, impl == "reference", prompt_ids, prompt_mask, completion_ids, completion_mask)
    if impl == "reference":
        log_probs = torch.log_softmax(outputs.float() / temperature, dim=-1)  # (B, T, V) float32
        logps = log_probs.gather(-1, completion_ids.unsqueeze(-1)).squeeze(-1)  # (B, T) float32
        entropy = -(log_probs.exp() * log_probs).sum(-1)  # (B, T) float32
        return logps.masked_fill(~completion_mask, 0.0), entropy.masked_fill(~completion_mask, 0.0)
    with autocast(model):
        logps, entropy = token_logps(
            outputs[completion_mask], labels=completion_ids[completion_mask], temperature=temperature, impl=impl,
            **lm_head(model))  # (tokens,)
    zeros = torch.zeros(completion_ids.shape, device=outputs.device)  # (B, T) float32
    return zeros.masked_scatter(completion_mask, logps), zeros.masked_scatter(completion_mask, entropy)


def logits_or_hidden(model, want_logits, prompt_ids, prompt_mask, completion_ids, completion_mask):
    """The model's logits (B, T, V), or else its hidden states (B, T, H), at the positions that predict the completions.

    Where it saves enough (`tokens_computed`) each different prompt is computed once, and its keys and values are repeated for its rows.
    Gradients flow through them (tests/test_invariance.py).
    """
    (num_rows, width), length = prompt_ids.shape, completion_ids.shape[1]
    attention_mask = torch.cat([prompt_mask, completion_mask], dim=1).long()  # (B, P+T)
    # Learned positions shift under left padding unless they are passed; RoPE hides the mistake (tests/test_masks.py).
    position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)  # (B, P+T)

    def last(keep, input_ids, attention_mask, position_ids, cache=None):
        inputs = dict(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, cache=cache,
                      use_cache=cache is not None)
        with autocast(model):
            return model(**inputs, logits_to_keep=keep).logits if want_logits else body(model)(**inputs).last_hidden_state[:, -keep:]

    prompts = distinct_prompts(model, prompt_ids, prompt_mask)  # (B,)
    num_prompts = int(prompts.max()) + 1
    if tokens_computed(num_prompts, num_rows, width, length) == num_rows * (width + length):
        input_ids = torch.cat([prompt_ids, completion_ids], dim=1)  # (B, P+T)
        return last(length + 1, input_ids, attention_mask, position_ids)[:, :-1]  # P-1+t predicts token t
    rows = first_rows(prompts)  # (num_prompts,)
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    first = last(1, prompt_ids[rows], attention_mask[rows, :width], position_ids[rows, :width], cache)[prompts]  # (B, 1, .)
    if length == 1:
        return first
    cache.batch_select_indices(prompts)
    rest = last(length - 1, completion_ids[:, :-1], attention_mask[:, :-1], position_ids[:, width:-1], cache)  # (B, T-1, .)
    return torch.cat([first, rest], dim=1)


def lm_head(model):
    """weight, bias, softcap and logit_scale of a HF causal LM's head, read from its module and config.

    Heads that transform the logits in ways unknown here are caught by the self-check of the scripts, which compares with the
    model's own logits. Raises ValueError for a head that is not linear.
    """
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    if not isinstance(head, torch.nn.Linear):
        raise ValueError(f"the head of {type(model).__name__} is a {type(head).__name__}, not a Linear; use --logprob_impl reference")
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere multiplies
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite divides
    return {"weight": head.weight, "bias": head.bias, "softcap": getattr(config, "final_logit_softcapping", None), "logit_scale": scale}


# ---------------------------------------------------------------- micro-batches


def minibatches(batch, args):
    """Yield the rows (n,) int64 of each optimizer step on a batch: num_iterations passes, each in num_minibatches parts of whole groups."""
    groups = torch.arange(len(batch.advantages), device=batch.advantages.device).view(-1, args.num_generations)  # (N, G)
    for _ in range(args.num_iterations):
        yield from (part.flatten() for part in groups.tensor_split(args.num_minibatches))


def micro_batches(model, batch, rows, args):
    """Cut some rows of a batch, given as indices (b,), into micro-batches: a list of index tensors, this rank's share of them.

    A micro-batch has as many rows as keep the tokens that a forward pass computes (`tokens_computed`) within
    --micro_batch_tokens, at least one row. Two orders are tried: by length, which pads least, and prompt by prompt, which shares most.
    The order that computes fewer tokens wins. Rows are dealt to the ranks in that order. Every rank gets the same number of
    micro-batches, the last ones empty, so that the ranks stay in step.
    """
    if not len(rows):
        return []
    widths, lengths = batch.prompt_mask[rows].sum(1).tolist(), batch.completion_mask[rows].sum(1).tolist()  # (b,) each
    prompts = distinct_prompts(model, batch.prompt_ids[rows], batch.prompt_mask[rows]).tolist()  # (b,)
    by_length = sorted(range(len(prompts)), key=lambda row: -(widths[row] + lengths[row]))
    by_prompt = sorted(by_length, key=lambda row: (-widths[row], prompts[row]))
    cuts, world_size = [], ranks.world_size()
    for order in (by_length, by_prompt):
        dealt, computed = [], 0
        for rank in range(world_size):
            batches, tokens = [], 0
            for row in order[rank::world_size]:
                grown = [*batches[-1], row] if batches else [row]
                num_prompts = len({prompts[i] for i in grown})
                wider = tokens_computed(num_prompts, len(grown), max(widths[i] for i in grown), max(lengths[i] for i in grown))
                if batches and wider <= args.micro_batch_tokens:
                    computed += wider - tokens
                    batches[-1], tokens = grown, wider
                else:
                    batches.append([row])
                    tokens = widths[row] + lengths[row]
                    computed += tokens
            dealt.append(batches)
        cuts.append((computed, dealt))
    dealt = min(cuts, key=lambda cut: cut[0])[1]
    own, most = dealt[ranks.rank()], max(map(len, dealt))
    return [rows[torch.tensor(picked, dtype=torch.int64, device=rows.device)] for picked in own + [[]] * (most - len(own))]


def tokens_computed(num_prompts, num_rows, width, length):
    """Padded tokens that a forward pass over rows of `num_prompts` different prompts computes; width and length are the longest.

    Rows of the same prompt compute it once if that saves at least a quarter: repeating its keys and values and a second, smaller
    forward pass cost something, too (results/step/).
    """
    plain, shared = num_rows * (width + length), num_prompts * width + num_rows * length
    return shared if shared <= 0.75 * plain else plain


def distinct_prompts(model, prompt_ids, prompt_mask):
    """Number each row's prompt (B, P): (B,) int64, equal for equal prompts, or all different where `model` cannot share them.

    Sharing needs a cache that holds keys and values of every token, and a model that is not sharded: each forward pass of a sharded
    model is a collective call, and ranks do not share equally often. What prevents sharing is printed once.
    """
    prompts = torch.unique(torch.cat([prompt_ids, prompt_mask], dim=1), dim=0, return_inverse=True)[1]  # (B,)
    cache = special_cache(model)
    reasons = {"a sharded model": ranks.is_sharded(model), cache: bool(cache),
               "no cache with --gradient_checkpointing": model.is_activation_checkpointing}
    if prompts.max() + 1 == len(prompts) or not any(reasons.values()):
        return prompts
    holding = ", ".join(reason for reason, holds in reasons.items() if holds)
    print_once(f"{type(model).__name__} computes the prompt of each row anew: {holding}")
    return torch.arange(len(prompts), device=prompts.device)


def first_rows(prompts):
    """One row of each different prompt: `prompts` (B,) from `distinct_prompts` -> (num_prompts,) int64."""
    rows = torch.empty_like(prompts[: int(prompts.max()) + 1])
    return rows.scatter_(0, prompts, torch.arange(len(prompts), device=prompts.device))


def special_cache(model):
    """Why rows of the model's cache cannot be picked and repeated, in words; "" where it holds keys and values of every token."""
    if "cache" not in inspect.signature(type(model).forward).parameters:
        return "its forward pass takes no cache"
    if not model._supports_default_dynamic_cache():
        return "it has a cache of its own"
    layers = {type(layer).__name__ for layer in DynamicCache(config=model.config.get_text_config(decoder=True)).layers}
    return "" if layers == {"DynamicLayer"} else f"its cache has {', '.join(sorted(layers))}"
