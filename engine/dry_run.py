"""What a run would do and cost, without doing it: --dry_run."""

import math

import torch

from . import lora
from .command_line import flag_groups
from .data import step_problems
from .errors import printable
from .flops import Flops, attention_layers
from .models import compute_dtype


def dry_run(args, model, tokenizer, train_problems, eval_problems, flops, stages=(), trace_rows=0):
    """Print what a run would do: settings, data, a prompt by the roles of its tokens, memory and FLOPs. Nothing is sampled or written.

    flops: the ledger before the first step; stages and trace_rows as in `Run`.
    """
    print("\nsettings\n" + "\n".join(map(printable, settings(args))))
    print(f"\ndata\n  {len(train_problems)} training rows, {len(eval_problems)} evaluation rows; gold answers "
          + (f"are left to {args.reward_fn}" if args.reward_fn else f"grade right as --reward {args.reward}"))
    problems = step_problems(train_problems, args.prompts_per_step, args.seed, 0)
    shown = max((segments(problem, tokenizer, args, trace_rows) for problem in problems), key=len)  # one with a prefix, if there is one
    print("\na prompt of the first step")
    for role, num_tokens, text in shown:
        print(f"  [{role}] {num_tokens} tokens: {printable(text)}")

    prompt_lengths, trace_lengths = ([len(p[name]) for p in train_problems if p.get(name)] for name in ("prompt_ids", "trace_ids"))
    prompt, trace = (round(sum(lengths) / max(1, len(lengths))) for lengths in (prompt_lengths, trace_lengths))
    longest = max(prompt_lengths)
    print(f"\nmemory, with the longest prompt of {longest} tokens and completions of {args.max_completion_length}")
    sizes = estimate_memory(model, args, longest, args.max_completion_length, len(eval_problems), trace_rows=trace_rows)
    for name, size in sizes.items():
        print(f"  {name:<18}{size / 2**20:>12,.1f} MiB")
    before = flops.metrics()["flops/total"]
    step = estimate_flops(model, args, prompt, args.max_completion_length, trace, stages, trace_rows)
    print(f"\nFLOPs, with prompts of {prompt} tokens (the mean), completions of {args.max_completion_length} (the longest) and traces of "
          f"{trace} (the mean), every row trained" + "".join(f" and every group with a {stage} sample" for stage in stages))
    for name, value in step.items():
        if name.startswith("flops/") and value:
            print(f"  {name.removeprefix('flops/'):<18}{value:>12.3g} a step")
    total = before + args.max_steps * step["flops/total"]
    print(f"  {'all steps':<18}{total:>12.3g}" + (f", {before:.3g} of it for traces" if before else ""))
    print("\nnothing was trained or written (--dry_run)")


def settings(args):
    """The resolved flags as lines "name = value", under their headings."""
    lines = []
    for heading, names in flag_groups(type(args)).items():
        lines += [f"  {heading}", *(f"    {name} = {getattr(args, name)}" for name in names)]
    return lines


def segments(problem, tokenizer, args, trace_rows=0):
    """A training problem as [(role, number of tokens, text)]: prompt, prefix and trained, the trace where a trace is trained."""
    prefix_ids = problem.get("prefix_ids", [])
    prompt_ids = problem["prompt_ids"][: len(problem["prompt_ids"]) - len(prefix_ids)]
    taught = problem.get("trace_ids") if trace_rows else None
    parts = [("prompt", prompt_ids), ("prefix", prefix_ids), ("trained", taught)]
    parts = [(role, len(ids), tokenizer.decode(ids)) for role, ids in parts if ids]
    return parts if taught else [*parts, ("trained", args.max_completion_length, "(at most; sampled by the policy)")]


def rows_of_a_step(args, trace_rows):
    """(rows of a step that are sampled, rows that are traces, updates that each row takes part in)."""
    group = getattr(args, "num_generations", trace_rows)  # SFT has no groups
    return args.prompts_per_step * (group - trace_rows), args.prompts_per_step * trace_rows, getattr(args, "num_iterations", 1)


def estimate_flops(model, args, prompt, completion, trace, stages=(), trace_rows=0):
    """The ledger's metrics after one step whose every prompt, sampled completion and trace has the given length, in tokens.

    Every row has a gradient. Each of `stages` samples one completion a group from a prompt as long as problem and trace.
    """
    flops, (num_sampled, num_traces, num_iterations) = Flops.of(model, stages=stages), rows_of_a_step(args, trace_rows)
    sampled = torch.full((num_sampled,), prompt + completion)
    rows = torch.cat([sampled, torch.full((num_traces,), prompt + trace)])  # (B,)
    flops.add_sampled("rollout", sampled)
    for stage in stages:
        extra = torch.full((args.prompts_per_step,), prompt + trace + completion)
        flops.add_sampled(stage, extra)
        flops.add("train", extra)  # scored once more, given the prompt that it was sampled from
    scored = (num_iterations * getattr(args, "num_minibatches", 1) > 1) + (getattr(args, "beta", 0) > 0)  # pi_old and pi_ref
    flops.add("train", rows, passes=scored)
    for _ in range(num_iterations):
        flops.add("train", rows, passes=4 if args.gradient_checkpointing else 3)
    flops.add_paper_rule(rows, passes=3 * num_iterations)
    return flops.metrics()


def estimate_memory(model, args, prompt, completion, num_eval=0, device=None, trace_rows=0):
    """Bytes of a run by what holds them, with rows of `prompt` + `completion` tokens; a rule of thumb, for a Llama.

    device: "cpu" or "cuda"; None: the model's.

    Fixed: 4 bytes a parameter, as much for its gradient, twice that for AdamW, and the initial weights where training reads them
    (--beta). Where --dtype is bfloat16, autocast adds its copies of the weights, one for prompts that rows share and one for completions.
    With --lora_rank frozen weights have no gradient, no state, no reference and no copy, and take 2 bytes where --dtype is bfloat16.
    Sampling: the KV cache, keys and values of L layers a token (with bfloat16 compute the keys stay float32: rotary embeddings),
    of the rows of one call of generate, and three times their last logits.
    Update: activations of one micro-batch, 12 H + 4 I float32 values a token and layer, or 36 H + 8 I bytes in bfloat16, where the
    residual stream and the norms stay float32. With --gradient_checkpointing the activations are H values, and one whole layer.
    Attention keeps the (T, T) mask of padded rows in every layer, and no other matrix. The head takes five times the logits of the
    completions ("reference"), or two tiles and its gradient. The peak is the fixed part and the larger of the other two.
    """
    from .logprob import CPU_TILE, GPU_TILE, choose_impl

    config, flops, value = model.config.get_text_config().per_layer_config[0], Flops.of(model), 4
    hidden, layers, vocabulary = config.hidden_size, config.num_hidden_layers, model.get_output_embeddings().weight.shape[0]
    mlp, keys = getattr(config, "intermediate_size", None) or 4 * hidden, sum(head_dim * kv for _, head_dim, kv in attention_layers(model))
    (num_sampled, num_traces, _), length = rows_of_a_step(args, trace_rows), prompt + completion
    drawn = min(args.generation_batch_size, max(num_sampled, num_eval * args.num_generations_eval))
    micro = min(max(1, args.micro_batch_tokens // length), (num_sampled + num_traces) // getattr(args, "num_minibatches", 1))
    fast = compute_dtype(model) == torch.bfloat16
    layer = 36 * hidden + 8 * mlp + 2 * length if fast else value * (12 * hidden + 4 * mlp + length)
    device = device or model.device.type
    impl = choose_impl(args.logprob_impl, vocabulary, device)
    tile = math.prod(GPU_TILE if device == "cuda" else CPU_TILE)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    sizes = {
        "parameters": sum(parameter.numel() * parameter.itemsize for parameter in model.parameters()),
        "gradients": value * trained, "AdamW states": 2 * value * trained,
        "reference model": value * flops.parameters if args.keeps_initial_weights and not lora.layers(model) else 0,
        "bfloat16 weights": 4 * trained if fast else 0,
        "KV cache": (6 if fast else 8) * drawn * length * keys, "sampled logits": 3 * value * drawn * vocabulary,
        "activations": micro * length * (layers * value * hidden + layer if args.gradient_checkpointing else layers * layer),
        "log-probs": value * (5 * micro * completion * vocabulary if impl == "reference" else 2 * tile + vocabulary * hidden)}
    fixed = sum(sizes[name] for name in ("parameters", "gradients", "AdamW states", "reference model", "bfloat16 weights"))
    return sizes | {"peak": fixed + max(sizes["KV cache"] + sizes["sampled logits"], sizes["activations"] + sizes["log-probs"])}
