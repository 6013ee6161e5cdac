"""Per-token log-probs and entropies of given labels, without ever holding the (N, V) logits.

    logits  = logit_scale * (hidden @ weight.T + bias)                     Cohere and Granite scale, Phi has a bias
    logits  = softcap * tanh(logits / softcap)                             Gemma 2
    logp    = logits[label] / T - lse,   lse = log sum_v exp(logits[v] / T)
    entropy = lse - sum_v p[v] logits[v] / T,   p = exp(logits / T - lse)

`reference` is this definition. `tiled` and `triton` get the same numbers from tiles of the logits. Their forward pass folds each tile
into two sums a token, of the exponentials and of the logits weighted by them, and forgets the tile; only lse and entropy are saved.
Their backward pass computes each tile again and turns it at once into its share of the gradients. The price is four GEMMs of 2NHV
instead of three. The gain is memory: N x V floats for the logits and as many for their gradient.

The GEMMs are those of the vendor's library. Between them, `tiled` uses torch's own operations on tiles that stay in a core's cache, and
`triton` uses two small Triton kernels on much larger tiles.
"""

import functools
import os

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

CPU_TILE = 256, 512  # tokens x words: two float32 tiles are 1 MB and stay in the L2 cache of a core
GPU_TILE = 16384, 8192  # 512 MB in float32: large, so that GEMMs are; the best of ten on an H100 (results/logprob/h100.md)
SMALL_VOCABULARY = 4096  # up to here the logits are small and "auto" takes the reference (results/logprob/small_vocabulary.md)
IMPLS = ("auto", "reference", "tiled", "triton")


@functools.cache  # so that a fall-back is printed once
def choose_impl(impl, vocabulary, device):
    """Resolve "auto": the reference for a small vocabulary, else triton on CUDA and tiled elsewhere. Raises ValueError."""
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    if impl == "triton" and (triton is None or device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1"):
        raise ValueError("impl triton needs the package triton and a CUDA device (or TRITON_INTERPRET=1): use tiled")
    if impl != "auto":
        return impl
    if vocabulary > SMALL_VOCABULARY and device == "cuda" and triton is None:
        print("log-probs: the package triton is missing, so the slower tiled path runs (pip install triton)")
    return "reference" if vocabulary <= SMALL_VOCABULARY else "triton" if device == "cuda" and triton is not None else "tiled"


def token_logps(hidden, weight, labels, *, bias=None, temperature=1.0, softcap=None, logit_scale=1.0, impl="auto"):
    """Log-probs of `labels` and entropies from hidden states and the lm_head, per token.

    hidden (N, H), weight (V, H), labels (N,) int64, bias (V,) or None, all floating tensors of any dtype. Returns (logps, entropy),
    (N,) each, in nats, float32 (float64 when hidden is float64). Gradients reach hidden, weight and bias through both. All is computed
    in float32. Only on CUDA do the GEMMs take half-precision operands (inputs of such a dtype, or autocast's) and return float32.
    Raises ValueError for shapes that do not match, labels outside [0, V), or a temperature <= 0.
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
    device, gemm_dtype = hidden.device.type, hidden.dtype
    impl = choose_impl(impl, len(weight), device)
    if device != "cuda":  # the half-precision GEMMs of CPUs round their result
        gemm_dtype = torch.promote_types(gemm_dtype, torch.float32)
    elif torch.is_autocast_enabled(device):
        gemm_dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        if impl == "reference":
            return reference(hidden, weight, bias, labels, temperature, softcap, logit_scale)
        return TiledLogps.apply(hidden, weight, bias, labels, (temperature, softcap or 0.0, logit_scale), impl, gemm_dtype)


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
    """`reference` in tiles. The outer loop is over words, so that a slice of the head stays hot and its gradient is written once."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, scales, impl, gemm_dtype):
        ctx.set_materialize_grads(False)
        ctx.scales, ctx.impl, ctx.gemm_dtype = scales, impl, gemm_dtype
        fold = triton_fold if impl == "triton" else torch_fold
        inputs, dtype = hidden.to(gemm_dtype), torch.promote_types(gemm_dtype, torch.float32)  # (N, H)
        # Per token: logit / T of the label; origin of the exponentials; sums of exp(z - origin) and of (z - origin) exp(z - origin).
        logits, origin, total, weighted = sums = torch.zeros(4, len(hidden), dtype=dtype, device=hidden.device)  # (N,) each
        row_slices, word_slices, buffers = cut(hidden, weight, dtype)
        for words in word_slices:
            weight_slice, bias_slice = weight[words].to(gemm_dtype), None if bias is None else bias[words].to(dtype)  # (v, H), (v,)
            for rows in row_slices:
                z, spare = gemm_tile(inputs[rows], weight_slice, buffers)  # (n, v) each
                fold(z, spare, bias_slice, scales, labels[rows] - words.start, *sums[:, rows])
        lse, entropy = origin + total.log(), total.log() - weighted / total  # (N,) each
        ctx.save_for_backward(hidden, weight, bias, labels, lse, entropy)
        return logits - lse, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_logps, d_entropy):
        hidden, weight, bias, labels, lse, entropy = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        gradient = triton_gradient if ctx.impl == "triton" else torch_gradient
        inputs, dtype = hidden.to(ctx.gemm_dtype), lse.dtype  # (N, H)
        d_logps = torch.zeros_like(lse) if d_logps is None else d_logps.contiguous()  # (N,)
        d_entropy = None if d_entropy is None else d_entropy.contiguous()  # (N,)
        d_hidden = torch.zeros_like(hidden, dtype=dtype) if need_hidden else None  # (N, H)
        d_weight = torch.zeros_like(weight) if need_weight else None  # (V, H)
        d_bias = torch.zeros_like(bias, dtype=dtype) if need_bias else None  # (V,)
        row_slices, word_slices, buffers = cut(hidden, weight, dtype)
        for words in word_slices:
            weight_slice, bias_slice = weight[words].to(ctx.gemm_dtype), None if bias is None else bias[words].to(dtype)  # (v, H), (v,)
            in_place = need_weight and weight.dtype == dtype  # else the sum over tokens stays in float32 until it is complete
            d_weight_slice = d_weight[words] if in_place else torch.zeros_like(weight_slice, dtype=dtype) if need_weight else None
            for rows in row_slices:
                z, spare = gemm_tile(inputs[rows], weight_slice, buffers)  # (n, v) each
                upstream = d_logps[rows], None if d_entropy is None else d_entropy[rows]
                local = labels[rows] - words.start, lse[rows], entropy[rows]  # (n,) each
                d_z = gradient(z, spare, bias_slice, ctx.scales, *local, *upstream, ctx.gemm_dtype)  # (n, v)
                if need_bias:
                    d_bias[words] += d_z.sum(0, dtype=dtype)
                if need_hidden:
                    add_matmul(d_hidden[rows], d_z, weight_slice)
                if need_weight:
                    add_matmul(d_weight_slice, d_z.t(), inputs[rows])
            if need_weight and not in_place:
                d_weight[words] = d_weight_slice
        d_hidden, d_bias = d_hidden.to(hidden.dtype) if need_hidden else None, d_bias.to(bias.dtype) if need_bias else None
        return d_hidden, d_weight, d_bias, None, None, None, None


def cut(hidden, weight, dtype):
    """(slices of the rows of hidden, slices of the rows of weight, two buffers that each hold the logits of the largest tile)."""
    num_rows, num_words = GPU_TILE if hidden.device.type == "cuda" else CPU_TILE
    row_slices = [slice(start, min(start + num_rows, len(hidden))) for start in range(0, len(hidden), num_rows)]
    word_slices = [slice(start, min(start + num_words, len(weight))) for start in range(0, len(weight), num_words)]
    return row_slices, word_slices, hidden.new_empty(2, min(num_rows, len(hidden)) * min(num_words, len(weight)), dtype=dtype)


def gemm_tile(hidden, weight, buffers):
    """(hidden @ weight.T, a spare tensor), both (n, v) in the dtype of the buffers that take them."""
    size = len(hidden), len(weight)
    z, spare = (buffer[: size[0] * size[1]].view(size) for buffer in buffers)
    precision = {} if hidden.dtype == z.dtype else {"out_dtype": z.dtype}
    return torch.mm(hidden, weight.t(), **precision, out=z), spare


def add_matmul(total, a, b):
    """total += a @ b with sums in the dtype of total."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


def torch_logits(z, bias, temperature, softcap, logit_scale):
    """Turn the result of the GEMM (n, v) into logits / temperature, in place."""
    if bias is not None:
        z.add_(bias)
    if softcap:
        z.mul_(logit_scale / softcap).tanh_().mul_(softcap / temperature)
    elif logit_scale != temperature:
        z.mul_(logit_scale / temperature)


def torch_fold(z, spare, bias, scales, labels, logits, origin, total, weighted):
    """Fold a tile (n, v) into the running sums (n,), in place. labels (n,) count from the tile's first word."""
    torch_logits(z, bias, *scales)
    inside = ((labels >= 0) & (labels < z.shape[1])).nonzero()[:, 0]
    logits[inside] = z[inside, labels[inside]]
    if not total.any():  # the first tile: later ones seldom rise far above its maximum
        origin += z.amax(dim=1)
    z -= origin.unsqueeze(1)
    exps, ones = torch.exp(z, out=spare), z.new_ones(z.shape[1])  # (n, v), (v,)
    sums = exps.mv(ones)  # (n,)  a product with ones is faster than a sum
    if not sums.max() <= 1e3:  # far above the origin: move it, for float32's sake
        rise = z.amax(dim=1).clamp_(min=0)  # (n,)
        torch.mul(weighted - rise * total, torch.exp(-rise), out=weighted)
        total *= torch.exp(-rise)
        origin += rise
        torch.exp(z.sub_(rise.unsqueeze(1)), out=exps)
        sums = exps.mv(ones)
    total += sums
    weighted += z.mul_(exps).mv(ones)


def torch_gradient(z, spare, bias, scales, labels, lse, entropy, d_logps, d_entropy, dtype):
    """Turn a tile (n, v) into the gradient of the GEMM's result, in `dtype`: d logp / d z_v = 1[v = label] - p_v and
    d entropy / d z_v = -p_v (log p_v + entropy), times the slope of soft-cap and scales."""
    torch_logits(z, bias, *scales)
    temperature, softcap, logit_scale = scales
    bend = 1 - (z * (temperature / softcap)) ** 2 if softcap else None  # (n, v)  of tanh
    slope = logit_scale / temperature
    z -= lse.unsqueeze(1)  # (n, v)  log p
    if d_entropy is None:
        z.exp_().mul_((-slope * d_logps).unsqueeze(1))
    else:
        p = torch.exp(z, out=spare)  # (n, v)
        z.add_(entropy.unsqueeze(1)).mul_(d_entropy.unsqueeze(1)).add_(d_logps.unsqueeze(1)).mul_(p).mul_(-slope)
    inside = ((labels >= 0) & (labels < z.shape[1])).nonzero()[:, 0]
    z[inside, labels[inside]] += slope * d_logps[inside]
    return (z if bend is None else z.mul_(bend)).to(dtype)


if triton is not None:

    @triton.jit
    def triton_logits(tile, bias, row, words, num_words, temperature, softcap, logit_scale):
        """`torch_logits` of a block of one row, and the slope of the soft-cap."""
        inside = words < num_words
        z = tl.load(tile + row * num_words + words, mask=inside, other=0.0) + tl.load(bias + words, mask=inside, other=0.0)
        z, bend = z * logit_scale, tl.full(z.shape, 1.0, tl.float32)
        if softcap > 0:
            tanh = 2.0 * tl.sigmoid(2.0 * z / softcap) - 1.0
            z, bend = softcap * tanh, 1.0 - tanh * tanh
        return z / temperature, bend

    @triton.jit
    def fold_kernel(tile, bias, temperature, softcap, logit_scale, labels, logits, origin, total, weighted, num_words, BLOCK: tl.constexpr):
        """`torch_fold`, one program a row, which is read once; the origin is the running maximum."""
        row = tl.program_id(0).to(tl.int64)  # so that offsets hold for tiles of any size
        label, top = tl.load(labels + row), tl.load(origin + row)
        row_total, row_weighted = tl.load(total + row), tl.load(weighted + row)
        top = tl.where(row_total > 0, top, -1e30)  # no word was read yet: logits of any size may come
        for first in range(0, num_words, BLOCK):
            words = first + tl.arange(0, BLOCK)
            z, _ = triton_logits(tile, bias, row, words, num_words, temperature, softcap, logit_scale)
            inside = words < num_words
            tl.store(logits + row + 0 * words, z, mask=(words == label) & inside)
            new_top = tl.maximum(top, tl.max(tl.where(inside, z, -float("inf"))))
            fade, shifted = tl.exp(top - new_top), z - new_top
            exps = tl.where(inside, tl.exp(shifted), 0.0)
            row_weighted = fade * (row_weighted + (top - new_top) * row_total) + tl.sum(shifted * exps)
            row_total, top = fade * row_total + tl.sum(exps), new_top
        tl.store(origin + row, top)
        tl.store(total + row, row_total)
        tl.store(weighted + row, row_weighted)

    @triton.jit
    def gradient_kernel(tile, out, bias, temperature, softcap, logit_scale, labels, lse, entropy, d_logps, d_entropy, num_words,
                        BLOCK: tl.constexpr):
        """`torch_gradient`, formed in float32 with the label's part in it, and rounded once."""
        row, words = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        z, bend = triton_logits(tile, bias, row, words, num_words, temperature, softcap, logit_scale)
        log_p, d_logp = z - tl.load(lse + row), tl.load(d_logps + row)
        d_z = tl.where(words == tl.load(labels + row), d_logp, 0.0) - tl.exp(log_p) * d_logp
        d_z -= tl.exp(log_p) * (log_p + tl.load(entropy + row)) * tl.load(d_entropy + row)
        d_z *= bend * (logit_scale / temperature)
        tl.store(out + row * num_words + words, d_z.to(out.dtype.element_ty), mask=words < num_words)


def triton_fold(z, spare, bias, scales, *sums):
    """`torch_fold` on a GPU."""
    bias = z.new_zeros(z.shape[1]) if bias is None else bias
    fold_kernel[(len(z),)](z, bias, *scales, *sums, z.shape[1], BLOCK=2048)


def triton_gradient(z, spare, bias, scales, labels, lse, entropy, d_logps, d_entropy, dtype):
    """`torch_gradient` on a GPU."""
    bias, d_entropy = (zeros if given is None else given for zeros, given in ((z.new_zeros(z.shape[1]), bias), (d_logps * 0, d_entropy)))
    d_z, grid = spare.view(-1).view(dtype)[: z.numel()].view_as(z), (len(z), triton.cdiv(z.shape[1], 2048))
    gradient_kernel[grid](z, d_z, bias, *scales, labels, lse, entropy, d_logps, d_entropy, z.shape[1], BLOCK=2048)
    return d_z
