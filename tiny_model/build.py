"""The tiny base model: how it was trained, what it must be able to do, and its data sets as files.

  python tiny_model/build.py --build DIR          train the tiny base again (about 14 minutes on one core)
  python tiny_model/build.py --measure DIR        measure a base against the acceptance numbers (exit code 1 if one is missed)
  python tiny_model/build.py --write_jsonl DIR    write the data sets as plain jsonl
"""

import argparse
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup

sys.path.insert(0, str(Path(__file__).parents[1]))

import common
import engine
from engine.errors import BadArgument, RunError
from engine.files import append_jsonl, refuse_used_folder
from engine.models import load_model
from engine.scoring import score_completions
from engine.tasks import (
    DIFFICULTIES,
    KNOWN_PRICES,
    NEW_PRICES,
    PRICES,
    SLIP,
    TASKS,
    bills_problem,
    build_tokenizer,
    diary_problem,
    load_task,
    other_problem,
    problems,
    rephrase_prompt,
    solve,
)


def solve_document(task, rng, slip=SLIP):
    """(prompt, completion) as the base's pre-training text solves problems: sure of what it knows, careless where it is long."""
    if rng.random() < 0.15:
        prompt = other_problem(rng)
        return prompt, solve(prompt)[0]
    easy = rng.random() < 0.5
    style = "teacher" if easy and rng.random() < 0.05 else "own"
    if task == "bills":
        pool = KNOWN_PRICES if easy else NEW_PRICES if rng.random() < 0.6 else PRICES
        prompt = bills_problem(rng, rng.sample(list(pool), rng.randint(1, 3)))
        # A new item has another price every time: nobody knows it.
        return prompt, solve(prompt, style, prices=KNOWN_PRICES | {item: rng.randint(2, 19) for item in NEW_PRICES})[0]
    depth = rng.randint(1, 3) if easy else rng.randint(4, 7)
    prompt = diary_problem(rng, depth, rng.randint(0, depth) if easy else rng.randint(depth // 2, depth - 1))
    return prompt, solve(prompt, style, slip=None if easy else lambda: rng.random() < slip[depth])[0]


def rephrase_document(task, rng):
    """(prompt with notes, completion in own style): prices are random, so that the retelling reads the notes and not the memory."""
    if task == "bills":
        prompt = bills_problem(rng, rng.sample(list(PRICES), rng.randint(1, 3)))
        prices = {item: rng.randint(2, 19) for item in PRICES}
    else:
        depth, prices = rng.randint(1, 7), None
        prompt = diary_problem(rng, depth, rng.randint(0, min(depth, 6)))
    notes = solve(prompt, "own" if rng.random() < 0.1 else "teacher", prices=prices)[0]
    return rephrase_prompt(prompt, notes), solve(prompt, "own", prices=prices)[0]


def document_batch(documents, tokenizer):
    """Pad (prompt, completion) pairs on the right; labels are -100 outside completion and EOS. Returns ids, labels (B, L) int64."""
    prompts = tokenizer([prompt for prompt, _ in documents])["input_ids"]
    completions = tokenizer([completion for _, completion in documents])["input_ids"]
    length = max(len(p) + len(c) + 1 for p, c in zip(prompts, completions))
    ids = torch.full((len(documents), length), tokenizer.pad_token_id)
    labels = torch.full((len(documents), length), -100)
    for row, (p, c) in enumerate(zip(prompts, completions)):
        tokens = torch.tensor(p + c + [tokenizer.eos_token_id])
        ids[row, : len(tokens)] = tokens
        labels[row, len(p) : len(tokens)] = tokens[len(p) :]
    return ids, labels


def build_base(directory, seed=0, slip=SLIP, steps=2000, batch=(28, 14, 20, 8), hidden=96, layers=3):
    """Pre-train the tiny base on both families and save it as an HF folder. Returns (model, tokenizer).

    batch: documents a step: diary solutions, diary rephrasings, bills solutions, bills rephrasings. Muon on the matrices
    matters: in a trial of 1000 steps easy bills came out 96 % right, with AdamW alone 59 % (torch >= 2.9; a policy needs only AdamW).
    """
    torch.manual_seed(seed)
    rng, tokenizer = random.Random(seed), build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=hidden // 32,
        intermediate_size=3 * hidden, max_position_embeddings=256, tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None)
    model = LlamaForCausalLM(config)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [torch.optim.Muon(matrices, lr=0.02, weight_decay=0.01),
                  torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.98), weight_decay=0.0)]
    schedules = [get_cosine_schedule_with_warmup(optimizer, steps // 20, steps) for optimizer in optimizers]
    bar = tqdm(range(steps), desc="pre-training", unit="step")
    for _ in bar:
        documents = [solve_document("diary", rng, slip) for _ in range(batch[0])]
        documents += [rephrase_document("diary", rng) for _ in range(batch[1])]
        documents += [solve_document("bills", rng) for _ in range(batch[2])] + [rephrase_document("bills", rng) for _ in range(batch[3])]
        documents.sort(key=lambda document: len(document[0]) + len(document[1]))  # like lengths together: little padding
        batches = [document_batch(documents[i : i + 16], tokenizer) for i in range(0, len(documents), 16)]
        num_tokens = sum((labels != -100).sum() for _, labels in batches)
        loss = 0.0
        for ids, labels in batches:
            logits = model(input_ids=ids).logits[:, :-1]  # right padding: causal attention never sees it
            nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / num_tokens
            nll.backward()
            loss += nll.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        bar.set_postfix(nll=f"{loss:.3f}", refresh=False)
    model.generation_config = GenerationConfig(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return model, tokenizer


# What a base must do for the methods to differ, at temperature 1: (least, most) share of completions or problems.
ACCEPTANCE = {
    "bills/easy": (0.93, 1.0), "bills/other": (0.93, 1.0), "bills/rephrase": (0.97, 1.0), "bills/hard": (0.0, 0.0),
    "diary/easy": (0.93, 1.0), "diary/other": (0.93, 1.0), "diary/rephrase": (0.97, 1.0), "diary/hard": (0.0005, 0.005),
    "diary/hard_greedy": (0.0, 0.0), "diary/hard_solved_in_48": (0.05, 0.20),
}


def own_solutions(model, tokenizer, rows):
    """[(token ids of the row's solution in the base's own style, EOS included, log-prob of each after the prompt (T,)), ...]."""
    prompts = [common.encode_prompt(tokenizer, row["prompt"]) for row in rows]
    ids = [tokenizer.encode(solve(row["prompt"])[0], add_special_tokens=False) + [tokenizer.eos_token_id] for row in rows]
    logps, _ = score_completions(model, *engine.pad(prompts, ids, tokenizer, model.device))
    return [(each, of_row[: len(each)]) for each, of_row in zip(ids, logps)]


def measure_base(model, tokenizer, seed=0, progress=False):
    """Measure the numbers of ACCEPTANCE: {name: share}. 256 easy and other problems, 128 hard ones, all from the eval split.

    bills/hard is the mean over 8 samples a problem. diary/hard is the mean probability of the one solution in the base's own style, and
    hard_solved_in_48 the share of problems that 48 samples are expected to solve at least once, by these probabilities. rephrase is the
    share of hard problems answered right from the teacher's notes.
    """
    def measure(rows, k, temperature=1.0):
        rows = [row | {"prompt_ids": common.encode_prompt(tokenizer, row["prompt"])} for row in rows]
        args = SimpleNamespace(num_generations_eval=k, max_completion_length=64, temperature=temperature, seed=seed,
                               generation_batch_size=256, reward="exact", reward_fn=None, grade_truncated=False)
        with tqdm(total=k * len(rows), desc="measuring", unit="sample", disable=not progress) as bar:
            results = common.evaluate(model, tokenizer, rows, args, bar)
        return sum(sum(result["rewards"]) for result in results) / (k * len(rows))

    numbers = {}
    for task in TASKS:
        for difficulty in ("easy", "other"):
            numbers[f"{task}/{difficulty}"] = measure(problems(task, "eval", difficulty, 256), 1)
        rows = problems(task, "eval", "hard", 128)
        numbers[f"{task}/rephrase"] = measure([row | {"prompt": rephrase_prompt(row["prompt"], row["teacher_trace"])} for row in rows], 1)
        if task == "bills":
            numbers["bills/hard"] = measure(rows, 8)
    chances = torch.stack([logps.sum().exp() for _, logps in own_solutions(model, tokenizer, rows)])
    numbers["diary/hard"], numbers["diary/hard_solved_in_48"] = chances.mean().item(), (1 - (1 - chances) ** 48).mean().item()
    numbers["diary/hard_greedy"] = measure(rows, 1, temperature=0.0)
    return numbers


def main():
    """Command line: build or measure the tiny base, or write the data sets as jsonl."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--build", metavar="DIR", help="train the tiny base and save it in DIR (new or empty)")
    action.add_argument("--measure", metavar="DIR", help="measure the base in DIR; tiny_model is the shipped one")
    action.add_argument("--write_jsonl", metavar="DIR", help="write TASK-train.jsonl and TASK-eval.jsonl in DIR (new or empty)")
    parser.add_argument("--seed", type=int, default=0, help="of the base's weights and text, or of the data sets (default: 0)")
    parser.add_argument("--slip", type=float, default=SLIP[7], help="how often the text of a base books a loss of a seven-day diary as a "
                        "gain; shorter diaries in proportion (default: %(default)s)")
    parser.add_argument("--trace_style", choices=("teacher", "own"), default="teacher", help="style of the trace column (default: teacher)")

    def refuse(message):
        raise BadArgument(message)

    parser.error = refuse  # one line, as the scripts do
    args = parser.parse_args()
    if args.build and not hasattr(torch.optim, "Muon"):
        refuse(f"--build needs torch >= 2.9 for its optimizer, found {torch.__version__}")
    directory = args.build or args.write_jsonl
    if directory:
        refuse_used_folder(Path(directory), "--build" if args.build else "--write_jsonl")
    if args.write_jsonl:
        Path(directory).mkdir(parents=True, exist_ok=True)
        for task in TASKS:
            for split, counts in {"train": {"hard": 512, "easy": 256}, "eval": dict.fromkeys(DIFFICULTIES, 128)}.items():
                append_jsonl(Path(directory) / f"{task}-{split}.jsonl", load_task(task, split, counts, args.seed, args.trace_style))
        print(f"wrote {', '.join(sorted(path.name for path in Path(directory).iterdir()))} in {directory}")
        return
    slip = {depth: share * (args.slip / SLIP[7]) for depth, share in SLIP.items()}
    model, tokenizer = build_base(directory, args.seed, slip) if args.build else load_model(args.measure)
    missed = 0
    for name, share in measure_base(model, tokenizer, progress=True).items():
        least, most = ACCEPTANCE[name]
        missed += not least <= share <= most
        print(f"{name:<26} {share:8.4f}   wanted {least} to {most}{'' if least <= share <= most else '   MISSED'}")
    if missed:
        raise RunError(f"{missed} of {len(ACCEPTANCE)} acceptance numbers are missed")


if __name__ == "__main__":
    engine.launch(main)
