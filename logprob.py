"""Per-token log-probs and entropies of given labels, without ever holding the (N, V) logits.

    logits  = logit_scale * (hidden @ weight.T + bias)                     Cohere and Granite scale, Phi has a bias
    logits  = softcap * tanh(logits / softcap)                             Gemma 2
    logp    = logits[label] / T - lse,   lse = log sum_v exp(logits[v] / T)
    entropy = lse - sum_v p[v] logits[v] / T,   p = exp(logits / T - lse)

`reference` is this definition, `tiled` the same numbers from tiles of the logits that stay in a core's cache. Its forward folds each
tile into two sums a token, of the exponentials and of the logits weighted by them, and forgets it; only lse and entropy are saved.
Its backward computes each tile again and turns it at once into its share of the gradients. The price is four GEMMs of 2NHV instead
of three, and the gain is memory: N x V floats for the logits and as many for their gradient.
"""

import torch

TILE = 256, 512  # tokens x words: two float32 tiles are 1 MB and stay in the L2 cache of a core
SMALL_VOCABULARY = 4096  # up to here the logits are small and "auto" takes the reference (results/logprob/small_vocabulary.md)
IMPLS = ("auto", "reference", "tiled")


def choose_impl(impl, vocabulary):
    """Resolve "auto": the reference for a small vocabulary, else tiled."""
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    return impl if impl != "auto" else "reference" if vocabulary <= SMALL_VOCABULARY else "tiled"


def policy_logps(model, prompt_ids, prompt_mask, completion_ids, completion_mask, temperature=1.0, impl="auto"):
    """Score given completions: log pi(o_t | q, o_<t) and the entropy of pi(. | q, o_<t), both at `temperature`.

    prompt_ids, prompt_mask (B, P) left-padded; completion_ids, completion_mask (B, T) right-padded, T >= 1.
    Returns (logps, entropy), each (B, T) float32 in nats and 0 where completion_mask is False. Gradients flow through both.
    The policy is what is sampled, so its logits are divided by the sampling temperature (tests/test_masks.py). "reference" takes
    the model's own logits; "tiled" takes its hidden states and `lm_head`, at completion positions only.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    input_ids = torch.cat([prompt_ids, completion_ids], dim=1)  # (B, P+T)
    attention_mask = torch.cat([prompt_mask, completion_mask], dim=1).long()  # (B, P+T)
    # Learned positions shift under left padding unless they are passed; RoPE hides the mistake (tests/test_masks.py).
    position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)  # (B, P+T)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids, "use_cache": False}
    if choose_impl(impl, model.get_output_embeddings().weight.shape[0]) == "reference":
        logits = model(**inputs, logits_to_keep=completion_ids.shape[1] + 1).logits[:, :-1]  # (B, T, V)  P-1+t predicts token t
        log_probs = torch.log_softmax(logits.float() / temperature, dim=-1)  # (B, T, V) float32
        logps = log_probs.gather(-1, completion_ids.unsqueeze(-1)).squeeze(-1)  # (B, T) float32
        entropy = -(log_probs.exp() * log_probs).sum(-1)  # (B, T) float32
        return logps.masked_fill(~completion_mask, 0.0), entropy.masked_fill(~completion_mask, 0.0)
    hidden = model.base_model(**inputs).last_hidden_state[:, prompt_ids.shape[1] - 1 : -1]  # (B, T, H)
    logps, entropy = token_logps(
        hidden[completion_mask], labels=completion_ids[completion_mask], temperature=temperature, impl="tiled", **lm_head(model))  # (N,)
    zeros = torch.zeros(completion_ids.shape, device=hidden.device)  # (B, T) float32
    return zeros.masked_scatter(completion_mask, logps), zeros.masked_scatter(completion_mask, entropy)


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


def token_logps(hidden, weight, labels, *, bias=None, temperature=1.0, softcap=None, logit_scale=1.0, impl="auto"):
    """Log-probs of `labels` and entropies from hidden states and the lm_head, per token.

    hidden (N, H), weight (V, H), labels (N,) int64, bias (V,) or None, all floating tensors of any dtype. Returns (logps, entropy),
    (N,) each, in nats, float32 (float64 when hidden is float64). Gradients reach hidden, weight and bias through both. Tiles are
    computed in float32 also for bfloat16 inputs and under autocast. Raises ValueError for shapes that do not match, labels outside
    [0, V), or a temperature that is not positive.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden must be (N, H) and weight (V, H), got {tuple(hidden.shape)} and {tuple(weight.shape)}")
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"labels must be (N,) with hidden (N, H), got {tuple(labels.shape)} and {tuple(hidden.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be (V,) with weight (V, H), got {tuple(bias.shape)} and {tuple(weight.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(weight):
        raise ValueError(f"labels must lie in [0, {len(weight)}), got {int(labels.min())} to {int(labels.max())}")
    function = reference if choose_impl(impl, len(weight)) == "reference" else TiledLogps.apply
    with torch.autocast(hidden.device.type, enabled=False):
        return function(hidden, weight, bias, labels, temperature, softcap, logit_scale)


def reference(hidden, weight, bias, labels, temperature, softcap, logit_scale):
    """The definition, which holds the (N, V) logits."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    bias = None if bias is None else bias.to(dtype)
    logits = logit_scale * torch.nn.functional.linear(hidden.to(dtype), weight.to(dtype), bias)  # (N, V)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)  # (N, V)
    log_probs = torch.log_softmax(logits / temperature, dim=-1)  # (N, V)
    return log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1), -(log_probs.exp() * log_probs).sum(-1)  # (N,) each


class TiledLogps(torch.autograd.Function):
    """`reference` in tiles."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, temperature, softcap, logit_scale):
        ctx.set_materialize_grads(False)
        ctx.scales = logit_scale, temperature, softcap
        logits = label_logits(hidden, weight, bias, labels, ctx.scales)  # (N,)
        top = logits.clone()  # (N,)  where the exponentials are taken from: the label, usually close enough to the maximum
        total, weighted = torch.zeros_like(top), torch.zeros_like(top)  # (N,)  sums of exp(z - top) and of (z - top) exp(z - top)
        ones, scratch = top.new_ones(TILE[1]), top.new_empty(TILE[0] * TILE[1])
        for rows, _, z, _ in logit_tiles(hidden, weight, bias, ctx.scales, shift=top):
            exps, ones_v = scratch[: z.numel()].view_as(z), ones[: z.shape[1]]  # (n, v), (v,)
            sums = torch.exp(z, out=exps).mv(ones_v)  # (n,)  a product with ones is faster than a sum
            if not sums.max() <= 1e3:  # far above the label: move the origin, for float32's sake
                rise = z.amax(dim=1).clamp_(min=0)  # (n,)
                weighted[rows] = (weighted[rows] - rise * total[rows]) * torch.exp(-rise)
                total[rows] *= torch.exp(-rise)
                top[rows] += rise
                sums = torch.exp(z.sub_(rise.unsqueeze(1)), out=exps).mv(ones_v)
            total[rows] += sums
            weighted[rows] += z.mul_(exps).mv(ones_v)
        lse, entropy = top + total.log(), total.log() - weighted / total  # (N,) each
        ctx.save_for_backward(hidden, weight, bias, labels, logits, lse, entropy)
        return logits - lse, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_logps, d_entropy):
        hidden, weight, bias, labels, logits, lse, entropy = ctx.saved_tensors
        logit_scale, temperature, softcap = ctx.scales
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        d_logps = torch.zeros_like(lse) if d_logps is None else d_logps
        slope = logit_scale / temperature
        # d logp / d z_v = 1[v = label] - p_v, and d entropy / d z_v = -p_v (log p_v + entropy). The label's term is added at the end.
        # Without an entropy gradient all of a row shares one factor, which scales (N, H) operands instead of (N, V) tiles.
        factor = slope * (d_logps if d_entropy is None else torch.ones_like(lse))  # (N,)
        scaled = hidden.to(lse.dtype) * factor.unsqueeze(1)  # (N, H)
        d_hidden = torch.zeros_like(hidden, dtype=lse.dtype) if need_hidden else None
        d_weight = torch.zeros_like(weight, dtype=lse.dtype) if need_weight else None
        d_bias = torch.zeros_like(bias, dtype=lse.dtype) if need_bias else None
        for rows, words, z, weight_slice in logit_tiles(hidden, weight, bias, ctx.scales, shift=lse):
            bend = None if softcap is None else 1 - ((z + lse[rows].unsqueeze(1)) * (temperature / softcap)) ** 2  # (n, v)  of tanh
            if d_entropy is None:
                z.exp_()  # (n, v)  p: the one elementwise pass
            else:
                p = z.exp()  # (n, v)
                z.add_(entropy[rows].unsqueeze(1)).mul_(d_entropy[rows].unsqueeze(1)).add_(d_logps[rows].unsqueeze(1)).mul_(p)
            if bend is not None:
                z.mul_(bend)
            if need_hidden:
                d_hidden[rows].addmm_(z, weight_slice, alpha=-1)
            if need_weight:
                d_weight[words].addmm_(z.t(), scaled[rows], alpha=-1)
            if need_bias:
                d_bias[words].addmv_(z.t(), factor[rows], alpha=-1)
        at_label = slope * d_logps * (1 if softcap is None else 1 - (logits * (temperature / softcap)) ** 2)  # (N,)
        if need_hidden:
            d_hidden = (d_hidden * factor.unsqueeze(1) + at_label.unsqueeze(1) * weight[labels]).to(hidden.dtype)
        if need_weight:
            d_weight = d_weight.index_add_(0, labels, at_label.unsqueeze(1) * hidden.to(lse.dtype)).to(weight.dtype)
        if need_bias:
            d_bias = d_bias.index_add_(0, labels, at_label).to(bias.dtype)
        return d_hidden, d_weight, d_bias, None, None, None, None


def logit_tiles(hidden, weight, bias, scales, shift):
    """Yield (rows, words, z, weight slice) for all tiles, words outside and tokens inside, so that a slice of the weight stays hot.

    z (n, v) are the logits / temperature less shift (N,), as it stands when the tile is made, in a buffer that the next tile overwrites.
    """
    logit_scale, temperature, softcap = scales
    dtype = shift.dtype
    scale = logit_scale / (temperature if softcap is None else softcap)
    # Bias and shift ride in the GEMM as columns of their own: no pass over the tile.
    inputs = [hidden.to(dtype) * scale, shift.new_full((len(hidden), 1), scale), -shift.unsqueeze(1)]
    keep = [True, bias is not None, softcap is None]
    inputs = torch.cat([part for part, kept in zip(inputs, keep) if kept], dim=1)  # (N, H + 0...2)
    buffer = inputs.new_empty(TILE[0] * TILE[1])
    for first_word in range(0, len(weight), TILE[1]):
        words = slice(first_word, first_word + TILE[1])
        weight_slice = weight[words].to(dtype)  # (v, H)
        columns = [weight_slice, None if bias is None else bias[words].to(dtype).unsqueeze(1), shift.new_ones(len(weight_slice), 1)]
        columns = torch.cat([part for part, kept in zip(columns, keep) if kept], dim=1)  # (v, H + 0...2)
        for first_row in range(0, len(hidden), TILE[0]):
            rows = slice(first_row, first_row + TILE[0])
            z = buffer[: len(shift[rows]) * len(columns)].view(-1, len(columns))  # (n, v)
            if softcap is None:
                inputs[rows, -1] = -shift[rows]
                torch.mm(inputs[rows], columns.t(), out=z)
            else:
                torch.mm(inputs[rows], columns.t(), out=z).tanh_().mul_(softcap / temperature).sub_(shift[rows].unsqueeze(1))
            yield rows, words, z, weight_slice


def label_logits(hidden, weight, bias, labels, scales):
    """Logits / temperature (N,) of the labels alone: a row-wise dot product instead of a look into the tiles."""
    logit_scale, temperature, softcap = scales
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logits = torch.linalg.vecdot(hidden.to(dtype), weight[labels].to(dtype))  # (N,)
    logits = logit_scale * (logits if bias is None else logits + bias[labels].to(dtype))  # (N,)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)  # (N,)
    return logits / temperature
