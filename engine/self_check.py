"""Before the first step: are sampled tokens scored as they were sampled?"""

import torch

from . import ranks
from .errors import RunError, one_line, printable
from .logprob import choose_impl
from .models import compute_dtype, eos_ids, seed_everything
from .sampling import generate, left_pad
from .scoring import Rows, policy_logps, score_completions


def self_check(model, tokenizer, problems, args):
    """Compare the log-probs that generate drew from with `policy_logps` of the same tokens. Prints a few lines; returns numbers.

    Samples 4 prompts twice, 64 tokens at most because it holds their logits. A wrong mask, position or temperature, a leaking
    generation_config, or a head that the fused path does not know shows here. Two more scorings see what both sides have alike: of the
    same tokens once more, which differs where the model is random in the mode that trains, and of one row with and without padding, which
    differs where the model reads its padding. The check runs in float32, which tells these faults from rounding, and then in the dtype
    of training; a sharded model is checked only in the latter, in which its layers are gathered, and so are frozen bfloat16 weights.
    Raises RunError when any token is 1e-3 nats away in float32, or the mean token 0.1 nats in bfloat16 (0.016 for SmolLM2-135M).
    """
    stop_ids, length, name = eos_ids(model, tokenizer), min(args.max_completion_length, 64), type(model).__name__
    vocabulary = model.get_output_embeddings().weight.shape[0]
    impl = choose_impl(args.logprob_impl, vocabulary, model.device.type)
    prompts = [problem["prompt_ids"] for problem in problems[:4]] * 2
    prompt_ids, prompt_mask = left_pad(prompts, tokenizer.pad_token_id, model.device)  # (8, P) each
    graded = sum(problem["answer"] is not None for problem in problems)
    gold = f"gold answers are left to {args.reward_fn}" if args.reward_fn else f"{graded} gold answers grade right"
    print(f"self-check: {gold}; log-probs by {impl}, {vocabulary} words")
    rounded = ranks.is_sharded(model) or any(parameter.dtype != torch.float32 for parameter in model.parameters())
    for dtype in dict.fromkeys((compute_dtype(model) if rounded else torch.float32, compute_dtype(model))):
        model.compute_dtype, exact = dtype, dtype == torch.float32
        seed_everything(args.seed, 0, "self_check")
        try:
            completion_ids, mask, drawn = generate(
                model, prompt_ids, prompt_mask, stop_ids, tokenizer.pad_token_id, length, args.temperature, with_logps=True)
            batch = Rows(prompt_ids, prompt_mask, completion_ids, mask)
            part = batch[prompt_mask.sum(1).argmin().unsqueeze(0)]  # the shortest prompt, unpadded
            padding = torch.zeros(1, 8, dtype=torch.bool, device=model.device)
            padded = Rows(torch.cat([padding.long() + tokenizer.pad_token_id, part.prompt_ids], dim=1),
                          torch.cat([padding, part.prompt_mask], dim=1), part.completion_ids, part.completion_mask)
            with torch.no_grad():
                scored, again, alone, beside = (policy_logps(model, rows, args)[0] for rows in (batch, batch, part, padded))
        except Exception as error:  # models of others fail in all ways
            raise RunError(f"self-check: {name} cannot be sampled and scored with log-probs by {impl}: {one_line(error)}") from error

        def away(logps, others, exact=exact):
            difference = (logps - others).abs()
            return float(difference.max() if exact else difference.mean())

        tolerance, reason = 1e-3 if exact else 0.1, "a wrong mask, position or temperature does this"
        if impl != "reference" and not away(scored[mask], drawn[mask]) <= tolerance:
            with torch.no_grad():
                reference = score_completions(model, prompt_ids, prompt_mask, completion_ids, mask, args.temperature, "reference")[0]
            if away(reference[mask], drawn[mask]) <= tolerance:
                reason = "logprob.py does not know its head: try --logprob_impl reference"
        faults = {
            "scores the same tokens {} apart when it scores them twice{}: it is random in the mode that trains"
            + (": leave out --gradient_checkpointing" if model.training else ""): away(scored[mask], again[mask]),
            "scores a row {} apart with and without padding{}: it reads its padding, and is wrong in batches": away(alone, beside),
            f"scores its own samples {{}} from how it drew them{{}}: {reason}": away(scored[mask], drawn[mask])}
        for fault, difference in faults.items():
            if not difference <= tolerance:
                raise RunError(f"self-check: {name} " + fault.format(f"{difference:.3g} nats", f" (tolerance {tolerance} in {dtype})"))
        ratio = "" if not exact else f", ratio = 1 to {float((scored - drawn)[mask].abs().expm1().max()):.0e}"
        print(f"self-check: re-scored = sampled log-probs to {difference:.0e} nats {'at most' if exact else 'in the mean'} "
              f"in {str(dtype).removeprefix('torch.')}{ratio}")
    completions = [ids[tokens] for ids, tokens in zip(completion_ids, mask)]
    ended = [bool(len(ids)) and int(ids[-1]) in stop_ids for ids in completions]
    mark = "self-check" if any(ended) or length < args.max_completion_length else "warning: all would be cut off"
    print(f"{mark}: {sum(ended)} of {len(ended)} completions end within {length} tokens\n"
          f"first prompt:     {printable(tokenizer.decode(prompt_ids[0][prompt_mask[0]]))}\n"
          f"first completion: {printable(tokenizer.decode(completions[0], skip_special_tokens=True))}")
    return {"logp_difference": difference, "ended": sum(ended) / len(ended)}
