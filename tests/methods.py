"""What the tests of the methods share: small data, losses of given numbers, and log-probs and FLOPs worked out by hand."""

import torch

import common
import sft


def with_eos(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]


def loaded(module, tokenizer, **flags):
    """(args, training problems) of a small built-in data set, hard problems first; a step takes them all."""
    group = {} if module is sft else {"num_generations": 4}
    args = module.Args(**{"task": "bills", "num_hard": 2, "num_easy": 1, "eval_steps": 0} | group | flags)
    problems = common.load_problems(args, tokenizer)[0]
    args.prompts_per_step = len(problems)
    return args, problems


def gradient_of(module, args, logps, advantages, old_logps=None, **fields):
    """(loss, d loss / d logps, metric sums) of a module's policy_loss; all tokens count, on-policy unless old_logps are given."""
    logps = torch.as_tensor(logps, dtype=torch.float32).clone().requires_grad_()
    old_logps = None if old_logps is None else torch.as_tensor(old_logps, dtype=torch.float32)
    mask = torch.ones(logps.shape, dtype=torch.bool)
    batch = module.Batch(None, None, None, None, mask, torch.as_tensor(advantages), old_logps, **fields)
    loss, sums = module.policy_loss(logps, torch.zeros(logps.shape), batch, args, num_tokens=logps.numel(), num_rows=len(logps))
    return loss.item(), torch.autograd.grad(loss, logps)[0], sums


def completions_of(batch):
    """The ids of each completion of a batch, by its mask, which must have no holes."""
    assert (batch.completion_mask.int().diff(dim=1) <= 0).all() and batch.completion_mask[:, 0].all()
    return [ids[mask].tolist() for ids, mask in zip(batch.completion_ids, batch.completion_mask)]


def prompts_of(batch):
    return [ids[mask].tolist() for ids, mask in zip(batch.prompt_ids, batch.prompt_mask)]


def logps_without_padding(model, prompt, completion):
    """Log-probs of one row's completion ids, from the model's logits, alone and unpadded."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits.float(), -1)[range(len(completion)), completion]


def flops_of(model, lengths):
    """By hand: 2 W D + 2 L A D^2 a sequence of D tokens."""
    return sum(2 * model.num_parameters() * d + 2 * 3 * 96 * d * d for d in lengths)
