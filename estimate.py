"""What a run would do and cost, without doing it: --dry_run."""

import math

import torch

from common import Flops, compute_dtype, printable
from data import step_rows
from flags import stages
from logprob import CPU_TILE, GPU_TILE, choose_impl


def dry_run(args, model, tokenizer, train_rows, eval_rows):
    """Print what a run would do: settings, rows, one prompt by the roles of its tokens, memory and FLOPs. Nothing is sampled or written."""
    print("\nsettings\n" + printable("\n".join(settings(args))))
    print(f"\ndata\n  {len(train_rows)} training rows, {len(eval_rows)} evaluation rows; gold answers "
          + (f"are left to {args.reward_fn}" if args.reward_fn else f"grade right as --reward {args.reward}"))
    rows = step_rows(train_rows, args.prompts_per_step, args.seed, 0)
    shown = max(rows, key=lambda row: len(segments(row, tokenizer, args)))  # the first of those with a prefix, if there is one
    print("\na prompt of the first step")
    for role, num_tokens, text in segments(shown, tokenizer, args):
        print(f"  [{role}] {num_tokens} tokens: {printable(text)}")

    prompt_lengths, trace_lengths = ([len(row[name]) for row in train_rows if row.get(name)] for name in ("prompt_ids", "trace_ids"))
    prompt, trace = (round(sum(lengths) / max(1, len(lengths))) for lengths in (prompt_lengths, trace_lengths))
    print(f"\nmemory, with the longest prompt of {max(prompt_lengths)} tokens and completions of {args.max_completion_length}")
    for name, size in estimate_memory(model, args, max(prompt_lengths), args.max_completion_length, len(eval_rows)).items():
        print(f"  {name:<18}{size / 2**20:>12,.1f} MiB")
    before = Flops.of(model, args).metrics()["flops/total"]
    step = estimate_flops(model, args, prompt, args.max_completion_length, trace)
    print(f"\nFLOPs, with prompts of {prompt} tokens (the mean), completions of {args.max_completion_length} (the longest) and traces of "
          f"{trace} (the mean), every row trained" + ("" if getattr(args, "failure_rate", 2) > 1 else " and every group retold"))
    for name, value in step.items():
        if name.startswith("flops/") and value:
            print(f"  {name.removeprefix('flops/'):<18}{value:>12.3g} a step")
    total = before + args.max_steps * step["flops/total"]
    print(f"  {'all steps':<18}{total:>12.3g}" + (f", {before:.3g} of it for traces" if before else ""))
    print("\nnothing was trained or written (--dry_run)")


def settings(args):
    """The resolved flags as lines "name = value", under their stages."""
    lines = []
    for stage, names in stages(type(args)).items():
        lines += [f"  {stage}", *(f"    {name} = {getattr(args, name)}" for name in names)]
    return lines


def segments(row, tokenizer, args):
    """A training row as [(role, number of tokens, text)]: prompt, prefix and trained, the trace where that is what is trained."""
    cut = len(row["prompt_ids"]) - row.get("prefix_len", 0)
    parts = [("prompt", row["prompt_ids"][:cut]), ("prefix", row["prompt_ids"][cut:])]
    taught = row.get("trace_ids") if getattr(args, "num_off_policy", 0) else None
    parts = [(role, len(ids), tokenizer.decode(ids)) for role, ids in [*parts, ("trained", taught)] if ids]
    return parts if taught else [*parts, ("trained", args.max_completion_length, "(at most; sampled by the policy)")]


def estimate_flops(model, args, prompt, completion, trace):
    """The ledger's metrics after one step whose every prompt, sampled completion and trace has the given length, in tokens.

    Every row has a gradient and, with --failure_rate, every group is retold from a prompt as long as problem and trace.
    """
    flops, traced = Flops.of(model), args.prompts_per_step * getattr(args, "num_off_policy", 0)
    sampled = torch.full((args.prompts_per_step * args.num_generations - traced,), prompt + completion)
    rows = torch.cat([sampled, torch.full((traced,), prompt + trace)])  # (B,)
    flops.add("rollout", sampled)
    flops.add_paper(sampled, passes=1)
    if getattr(args, "failure_rate", 2) <= 1:
        retold = torch.full((args.prompts_per_step,), prompt + trace + completion)
        flops.add("rephrase", retold)
        flops.add_paper(retold, passes=1)
        flops.add("train", retold)  # scored once more, given what it was told from
    flops.add("train", rows, passes=(args.num_iterations * args.num_minibatches > 1) + (args.beta > 0))  # pi_old and pi_ref
    flops.add("train", rows, passes=args.num_iterations * (4 if args.gradient_checkpointing else 3))
    flops.add_paper(rows, passes=3 * args.num_iterations)
    return flops.metrics()


def estimate_memory(model, args, prompt, completion, num_eval=0, device=None):
    """Bytes of a run by what holds them, with rows of `prompt` + `completion` tokens; a rule of thumb, for a Llama.

    device: "cpu" or "cuda"; None: the model's.

    Fixed: 4 bytes a parameter, as much for its gradient, twice that for AdamW, and the reference model with --beta; where --dtype is
    bfloat16, autocast's copy of the weights.
    Sampling: the KV cache, keys and values of L layers a token (with bfloat16 compute the keys stay float32: rotary embeddings),
    of the rows of one call of generate, and three times their last logits.
    Update: activations of one micro-batch, 12 H + 4 I float32 values a token and layer, or 36 H + 8 I bytes in bfloat16, where the
    residual stream and the norms stay float32 (with --gradient_checkpointing H values, and one whole layer), where attention keeps no
    (T, T) matrix; and the head: five times the logits of the completions ("reference"), or two tiles
    and its gradient. The peak is what is fixed and the larger of the other two.
    """
    config, flops, value = model.config.get_text_config(), Flops.of(model), 4
    hidden, layers, vocabulary = config.hidden_size, flops.layers, model.get_output_embeddings().weight.shape[0]
    mlp, heads = getattr(config, "intermediate_size", None) or 4 * hidden, config.num_attention_heads
    key_width = flops.attention_width // heads * (getattr(config, "num_key_value_heads", None) or heads)
    rows, length = args.prompts_per_step * args.num_generations, prompt + completion
    calls = max(args.prompts_per_step * (args.num_generations - getattr(args, "num_off_policy", 0)), num_eval * args.num_generations_eval)
    drawn = min(args.generation_batch_size, calls)
    micro = min(args.micro_batch_size or max(1, args.micro_batch_tokens // length), rows // args.num_minibatches)
    fast = compute_dtype(model) == torch.bfloat16
    layer = 36 * hidden + 8 * mlp if fast else value * (12 * hidden + 4 * mlp)
    device = device or model.device.type
    impl = choose_impl(args.logprob_impl, vocabulary, device)
    tile = math.prod(GPU_TILE if device == "cuda" else CPU_TILE)
    sizes = {
        "parameters": value * flops.parameters, "gradients": value * flops.parameters, "AdamW states": 2 * value * flops.parameters,
        "reference model": value * flops.parameters if args.beta else 0, "bfloat16 weights": 2 * flops.parameters if fast else 0,
        "KV cache": (6 if fast else 8) * drawn * length * layers * key_width, "sampled logits": 3 * value * drawn * vocabulary,
        "activations": micro * length * (layers * value * hidden + layer if args.gradient_checkpointing else layers * layer),
        "log-probs": value * (5 * micro * completion * vocabulary if impl == "reference" else 2 * tile + vocabulary * hidden)}
    fixed = sum(sizes[name] for name in ("parameters", "gradients", "AdamW states", "reference model", "bfloat16 weights"))
    return sizes | {"peak": fixed + max(sizes["KV cache"] + sizes["sampled logits"], sizes["activations"] + sizes["log-probs"])}
