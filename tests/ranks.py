"""Two steps of every script on the ranks that started this file: what tests/test_distributed.py compares between numbers of ranks.

    torchrun --nproc_per_node=2 tests/ranks.py MODE OUT.pt              MODE: ddp or fsdp; without torchrun: one process
    torchrun --nproc_per_node=2 tests/ranks.py save|load FOLDER OUT.pt  a sharded checkpoint, and the optimizer's state in whole

Their tokens are not sampled: they are a function of the prompt, since ranks draw from streams of their own. Greedy ones are compared, too.
"""

import dataclasses
import importlib.util
import random
import sys
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from transformers import DynamicCache, get_scheduler

import common
import engine
import grpo
import gspo
import luffy
import prefixrl
import repo
import sft
from engine import checkpoints, data, ranks
from engine.flops import Flops
from engine.models import seed_everything
from engine.sampling import generate, left_pad, right_pad
from engine.scoring import score_completions

SMALL = dict(task="diary", num_hard=6, num_easy=6, prompts_per_step=4, num_generations=4, max_completion_length=60, micro_batch_tokens=500,
             eval_steps=0, generation_batch_size=6)
CASES = {  # name -> (script, flags)
    "grpo, two updates, KL": (grpo, dict(num_minibatches=2, num_iterations=2, beta=0.05, entropy_coef=0.01, loss_type="grpo")),
    "grpo, three prompts": (grpo, dict(prompts_per_step=3, mask_truncated_completions=True, micro_batch_tokens=200)),
    "grpo, one row": (grpo, dict(prompts_per_step=1, num_generations=1, scale_rewards="none", loss_type="dr_grpo", entropy_coef=0.01,
                           gradient_checkpointing=True)),
    "repo": (repo, dict(task="bills", num_easy=1, failure_threshold=0.5)),
    "luffy": (luffy, {}),
    "prefixrl": (prefixrl, dict(micro_batch_tokens=8192)),
    "sft": (sft, {}),
    "gspo, a rank without a row": (gspo, dict(prompts_per_step=1, num_generations=3, micro_batch_tokens=1, drop_zero_variance=False)),
} | ({
    "grpo, LoRA": (grpo, dict(num_minibatches=2, beta=0.05, lora_rank=4, lora_alpha=64)),
    "sft, LoRA": (sft, dict(lora_rank=4, lora_alpha=64, gradient_checkpointing=True)),
} if importlib.util.find_spec("peft") else {})


def replay(model, tokenizer, problems):
    """A stand-in for `generate`: right solutions and those of other problems, some cut off, by prompt and row of `generate`'s call."""
    right = {problem["prompt"]: tokenizer(problem["own_trace"])["input_ids"] + [tokenizer.eos_token_id] for problem in problems}

    def generate(input_ids, attention_mask, generation_config, **others):
        completions, budget = [], generation_config.max_new_tokens
        first = input_ids.storage_offset() // input_ids.shape[1]  # a rank's rows are a view of all rows
        for row, (ids, mask) in enumerate(zip(input_ids, attention_mask.bool()), first):
            prompt = tokenizer.decode(ids[mask])
            rng = random.Random(f"{prompt}/{row}")
            told = [solution for question, solution in right.items() if question in prompt and rng.random() < 0.4]
            drawn = (told or [rng.choice([*right.values()])])[0][: rng.choice([60, 60, 9])]
            while drawn[-1] != tokenizer.eos_token_id and len(drawn) < budget:  # to the limit, so that one call of generate is all
                drawn = drawn + rng.choice([*right.values()])[:-1]
            completions.append(torch.tensor([drawn[:budget]]))
        model(input_ids[:, -3:])  # the forward of a sharded model takes part in collective calls
        sampled = right_pad(completions, tokenizer.pad_token_id)
        return types.SimpleNamespace(sequences=torch.cat([input_ids, sampled], dim=1), cache=DynamicCache())

    return generate


def two_steps(script, flags, mode):
    """(weights after two steps, metrics of each, ledger)."""
    known = {field.name for field in dataclasses.fields(script.Args)}
    args = script.Args(**{name: value for name, value in (SMALL | flags).items() if name in known}, parallel=mode)
    model, tokenizer = engine.load_policy(args)
    ref_model = engine.load_policy(args)[0] if getattr(args, "beta", 0) else None
    train_problems, _ = common.load_problems(args, tokenizer)
    if script is sft:
        train_problems = [problem for problem in train_problems if problem["trace"] is not None]
    elif script is prefixrl:
        train_problems = prefixrl.add_prefixes(train_problems, tokenizer, args)
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.generate = replay(model, tokenizer, train_problems)
    # Not AdamW, which turns the rounding of a gradient near 0 into a whole step.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.003, momentum=0.9)
    flops, records = Flops.of(model, args, ("rephrase",) if script is repo else ()), []
    for step in range(2):
        seed_everything(args.seed, step)
        problems = data.step_problems(train_problems, args.prompts_per_step, args.seed, step)
        if script is sft:
            batch, samples, metrics = script.rollout(model, tokenizer, problems)
        else:
            batch, samples, metrics = script.rollout(model, ref_model, tokenizer, problems, args, flops)
        metrics |= script.update(model, optimizer, batch, args, flops)
        del metrics["time/update"]
        records.append(metrics | {"texts": [sample.text for sample in samples]})
    checksums = None
    if mode == "ddp":
        checksums = ranks.all_gather_list([[float(weight.double().sum()) for weight in model.state_dict().values()]])
    return ranks.full_state_dict(model), records, flops.metrics(), checksums


def checkpoint(action, folder):
    """Train a sharded model on one sentence and save it in `folder`, or load what is there: the whole state of AdamW."""
    args = grpo.Args(parallel="fsdp")
    model, tokenizer = engine.load_policy(args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    scheduler, flops = get_scheduler("constant", optimizer), Flops.of(model, args)
    if action == "load":
        assert checkpoints.load_checkpoint(folder / "checkpoint-1", model, optimizer, scheduler, flops) == 1
    else:
        ids = torch.tensor([tokenizer("2 drimp at 6 = 12")["input_ids"]])
        score_completions(model, ids[:, :2], ids[:, :2] >= 0, ids[:, 2:], ids[:, 2:] >= 0)[0].sum().backward()
        optimizer.step()
        checkpoints.save_checkpoint(folder, 1, model, tokenizer, optimizer, flops, 1)
    return get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def greedy_completions(mode):
    """(completions (40, T) that generate itself makes, their mask, rows of each forward pass by rank): long problems first."""
    args = grpo.Args(task="diary", num_hard=20, num_easy=20, eval_steps=0, parallel=mode)
    model, tokenizer = engine.load_policy(args)
    prompts = sorted((problem["prompt_ids"] for problem in common.load_problems(args, tokenizer)[0]), key=lambda ids: -len(ids))
    prompts = left_pad(prompts, tokenizer.pad_token_id, model.device)
    calls = []
    model.model.layers[0].register_forward_pre_hook(lambda module, hidden: calls.append(len(hidden[0])))
    eos_ids = [*range(1, model.config.vocab_size, 20)]  # many, so that rows end at many lengths
    completions = generate(model, *prompts, eos_ids, tokenizer.pad_token_id, 60, temperature=0)
    return *completions, ranks.all_gather_list([calls])


if __name__ == "__main__":
    *work, out = sys.argv[1:]
    ranks.start()
    if work[0] in ("save", "load"):
        results = checkpoint(work[0], Path(work[1]))
    else:
        results = {name: two_steps(*case, work[0]) for name, case in CASES.items()}
        results["greedy completions"] = greedy_completions(work[0])
    if ranks.rank() == 0:
        torch.save(results, out)
    ranks.finish()
