"""Per-token log-probabilities and entropies of a policy: the one place where they are computed.

This is the plain definition, which holds the (B, T, V) logits. Every script calls `policy_logps` and nothing else, so a
leaner implementation replaces its inside without touching an algorithm.
"""

import torch


def policy_logps(model, prompt_ids, prompt_mask, completion_ids, completion_mask, temperature=1.0):
    """Score given completions: log pi(o_t | q, o_<t) and the entropy of pi(. | q, o_<t), both at `temperature`.

    prompt_ids, prompt_mask (B, P) left-padded; completion_ids, completion_mask (B, T) right-padded, T >= 1.
    Returns (logps, entropy), each (B, T) float32 in nats and 0 where completion_mask is False. Gradients flow through both.
    The policy is what is sampled, so its logits are divided by the sampling temperature (tests/test_masks.py).
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    input_ids = torch.cat([prompt_ids, completion_ids], dim=1)  # (B, P+T)
    attention_mask = torch.cat([prompt_mask, completion_mask], dim=1).long()  # (B, P+T)
    # Learned positions shift under left padding unless they are passed; RoPE hides the mistake (tests/test_masks.py).
    position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)  # (B, P+T)
    logits = model(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False,
        logits_to_keep=completion_ids.shape[1] + 1,
    ).logits[:, :-1]  # (B, T, V)  position P-1+t predicts completion token t
    log_probs = torch.log_softmax(logits.float() / temperature, dim=-1)  # (B, T, V) float32
    logps = log_probs.gather(-1, completion_ids.unsqueeze(-1)).squeeze(-1)  # (B, T) float32
    entropy = -(log_probs.exp() * log_probs).sum(-1)  # (B, T) float32
    return logps.masked_fill(~completion_mask, 0.0), entropy.masked_fill(~completion_mask, 0.0)
