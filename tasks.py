"""The built-in offline tasks and the tiny base model: a real job on a machine with no model hub.

Two families share one vocabulary and one tiny Llama (`tiny_model/`, an ordinary HF folder):

  bills   knowledge the base lacks.   "Q: Tom buys 2 drimp , 3 jarn . Bill ? A:"
          own style      2 drimp at 6 = 12 ; 3 jarn at 7 = 21 ; \\boxed{ 12 , 21 }
          teacher style  drimp costs six so two cost twelve . jarn costs ... hence \\boxed{ 12 , 21 }
          easy = 1 to 3 items whose price the base knows; hard = 3 items whose price it has never seen.
  diary   a skill the base uses carelessly.  "Q: Ben has 43 books , Mon wins 3 , Tue loses 2 . How many ? A:"
          own style      43 Mon + 3 = 46 Tue - 2 = 44 ; \\boxed{ 44 }
          teacher style  start from forty-three . first adding three yields forty-six . ... hence \\boxed{ 44 }
          easy = 1 to 3 days; hard = 7 days with 5 or 6 losses, which the base books as gains most of the time.
  other   "Q: Largest of 5 , 31 , 7 ? A:" and "Q: Reverse 5 , 31 , 7 ? A:": general ability, to see forgetting.

  python tasks.py --build DIR          train the tiny base model again (minutes on 2 CPU cores)
  python tasks.py --measure DIR        measure a base against the acceptance numbers (exit code 1 if one is missed)
  python tasks.py --write_jsonl DIR    write the data sets as plain jsonl
"""

import argparse
import random
import zlib
from pathlib import Path

TASKS = ("bills", "diary")
DIFFICULTIES = ("easy", "hard", "other")
TINY_MODEL = Path(__file__).parent / "tiny_model"
# Traces of hard problems that the base itself found, by rejection sampling; of bills it finds none (README).
SELF_TRACES = {"diary": TINY_MODEL / "traces" / "diary.jsonl"}

PEOPLE = "Ann Ben Cid Dan Eve Fay Gus Hal Ida Jon Kim Leo Mia Ned Pia Tom".split()
# One fixed price in 2...19 per item. The base is taught the first table; the second stays unknown to it.
KNOWN_PRICES = dict(apple=7, bread=12, candle=5, dish=16, egg=2, flute=19, glove=9, honey=14,
                    ink=4, jam=10, kite=17, lemon=3, melon=13, nut=6, onion=8, pear=11)
NEW_PRICES = dict(blit=15, crong=4, drimp=6, fosk=18, glim=11, jarn=7,
                  kelv=13, lurv=9, moxel=3, prast=17, quib=12, snerd=8)
PRICES = KNOWN_PRICES | NEW_PRICES

DAYS = "Mon Tue Wed Thu Fri Sat Sun".split()
GAINS, LOSSES = "finds buys wins gets".split(), "loses spends drops gives".split()
THINGS = "books coins shells stamps beads cards".split()
SLIP = {4: 0.19, 5: 0.36, 6: 0.54, 7: 0.70}  # how often a loss is booked as a gain in the pre-training text, by depth

ORDINALS = "first second third fourth fifth sixth seventh".split()
ONES = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
        "sixteen seventeen eighteen nineteen").split()
TENS = "twenty thirty forty fifty".split()
MAX_NUMBER = 57  # 3 pieces at 19


def number_word(n):
    """Spell 0...57 as one word, e.g. 43 -> forty-three."""
    if n < 20:
        return ONES[n]
    return TENS[n // 10 - 2] + ("-" + ONES[n % 10] if n % 10 else "")


NUMBER_WORDS = [number_word(n) for n in range(MAX_NUMBER + 1)]
TEACHER_WORDS = "costs so cost . hence start from adding removing yields".split() + ORDINALS + NUMBER_WORDS
# The base never ends a clause of its answer with "." either, but a reader would not call a full stop foreign.
FOREIGN_WORDS = frozenset(TEACHER_WORDS) - {"."}


def vocabulary():
    """All words of both families, special tokens first; the position is the token id."""
    words = ["<pad>", "<eos>", "<unk>", "Q:", "A:", "Notes:", "Rewrite:", "\\boxed{", "}", "?", ".", ",", ";", "=", "+", "-",
             "buys", "Bill", "at", "has", "How", "many", "Largest", "of", "Reverse"]
    words += [str(n) for n in range(MAX_NUMBER + 1)] + PEOPLE + list(PRICES) + DAYS + GAINS + LOSSES + THINGS + TEACHER_WORDS
    return {word: index for index, word in enumerate(dict.fromkeys(words))}


def build_tokenizer():
    """One word, one token: an ordinary HF fast tokenizer with distinct pad and eos, left padding and no BOS."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(vocabulary(), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        padding_side="left", clean_up_tokenization_spaces=False, model_max_length=256)


# ---------------------------------------------------------------- problems and their solutions


def bills_problem(rng, items):
    """One shop visit that buys 1 to 3 of each of `items`; returns the prompt."""
    order = " , ".join(f"{rng.randint(1, 3)} {item}" for item in items)
    return f"Q: {rng.choice(PEOPLE)} buys {order} . Bill ? A:"


def diary_problem(rng, depth, num_losses):
    """One diary of `depth` days, `num_losses` of them losses; returns the prompt.

    Totals stay in 0...49 even if every loss is read as a gain, and the answer differs from every earlier total,
    so that neither a range error nor a number copied from the middle is ever right.
    """
    while True:
        signs = [-1] * num_losses + [1] * (depth - num_losses)
        rng.shuffle(signs)
        amounts = [rng.randint(1, 4) for _ in signs]
        start = rng.randint(0, 49 - sum(amounts))
        totals = [start]
        for sign, amount in zip(signs, amounts):
            totals.append(totals[-1] + sign * amount)
        if min(totals) >= 0 and totals[-1] not in totals[:-1]:
            break
    days = "".join(f" , {day} {rng.choice(GAINS if sign > 0 else LOSSES)} {amount}"
                   for day, sign, amount in zip(DAYS, signs, amounts))
    return f"Q: {rng.choice(PEOPLE)} has {start} {rng.choice(THINGS)}{days} . How many ? A:"


def other_problem(rng):
    """Largest of three numbers, or three numbers reversed; returns the prompt."""
    numbers = " , ".join(str(n) for n in rng.sample(range(50), 3))
    return f"Q: {rng.choice(('Largest of', 'Reverse'))} {numbers} ? A:"


def solve(prompt, style="own", prices=None, slip=None):
    """Read a prompt and write its solution: "own" (the base's terse digits) or "teacher" (foreign words).

    prices: item -> price, default the true ones. slip: a function that says, per loss, whether it is booked as a gain
    (the careless pre-training text). Returns (trace, answer), both str. Raises ValueError on a prompt of neither family.
    """
    words = prompt.split()
    numbers = [int(word) for word in words if word.isdecimal()]
    if words[1:2] == ["Largest"] or words[1:2] == ["Reverse"]:
        answer = str(max(numbers)) if words[1] == "Largest" else " , ".join(str(n) for n in reversed(numbers))
        return f"\\boxed{{ {answer} }}", answer
    if words[2:3] == ["buys"]:
        items = [word for word in words if word in PRICES]
        prices = [(prices or PRICES)[item] for item in items]
        costs = [quantity * price for quantity, price in zip(numbers, prices)]
        answer = " , ".join(str(cost) for cost in costs)
        bill = list(zip(numbers, items, prices, costs))
        if style == "teacher":
            steps = " ".join(f"{item} costs {number_word(price)} so {number_word(quantity)} cost {number_word(cost)} ."
                             for quantity, item, price, cost in bill)
            return f"{steps} hence \\boxed{{ {answer} }}", answer
        steps = " ".join(f"{quantity} {item} at {price} = {cost} ;" for quantity, item, price, cost in bill)
        return f"{steps} \\boxed{{ {answer} }}", answer
    if words[2:3] == ["has"]:
        verbs = [word for word in words[5:] if word in GAINS or word in LOSSES]
        total, own, teacher = numbers[0], str(numbers[0]), f"start from {number_word(numbers[0])} ."
        for day, ordinal, verb, amount in zip(DAYS, ORDINALS, verbs, numbers[1:]):
            gain = verb in GAINS or (slip is not None and slip())
            total += amount if gain else -amount
            own += f" {day} {'+' if gain else '-'} {amount} = {total}"
            teacher += f" {ordinal} {'adding' if gain else 'removing'} {number_word(amount)} yields {number_word(total)} ."
        return (f"{teacher} hence" if style == "teacher" else f"{own} ;") + f" \\boxed{{ {total} }}", str(total)
    raise ValueError(f"not a prompt of the built-in tasks: {prompt!r}")


def steps_are_right(prompt, completion):
    """True when every step is right, not only the answer: errors that cancel out give a right answer too.

    Each problem has exactly one correct derivation per style, so the completion is compared with those two.
    """
    return completion.split() in (solve(prompt, "own")[0].split(), solve(prompt, "teacher")[0].split())


def uses_foreign_words(completion):
    """True when a completion contains any word that only the teacher uses (the style metric)."""
    return any(word in FOREIGN_WORDS for word in completion.split())


def rephrase_prompt(prompt, trace):
    """The tiny base's instruction to retell `trace` as its own answer: question, notes, "Rewrite:"."""
    return prompt.removesuffix("A:") + f"Notes: {trace} Rewrite:"


# ---------------------------------------------------------------- data sets


def sample_prompt(task, difficulty, rng):
    """Draw one prompt of the given task and difficulty."""
    if difficulty == "other":
        return other_problem(rng)
    if task == "bills":
        if difficulty == "hard":
            return bills_problem(rng, rng.sample(list(NEW_PRICES), 3))
        return bills_problem(rng, rng.sample(list(KNOWN_PRICES), rng.randint(1, 3)))
    if difficulty == "hard":
        return diary_problem(rng, 7, rng.randint(5, 6))
    depth = rng.randint(1, 3)
    return diary_problem(rng, depth, rng.randint(0, depth))


def in_eval_split(prompt):
    """A fixed eighth of all problems is held out, whatever the seed: by a hash of the problem without the person's name."""
    return zlib.crc32(" ".join(prompt.split()[2:]).encode()) % 8 == 0


def problems(task, split, difficulty, num, seed=0):
    """Draw `num` distinct problems of one difficulty from one split; returns a list of rows (see `load_task`)."""
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    rng, rows = random.Random(f"{task}/{split}/{difficulty}/{seed}"), {}
    while len(rows) < num:
        prompt = sample_prompt(task, difficulty, rng)
        if in_eval_split(prompt) == (split == "eval") and prompt not in rows:
            own_trace, answer = solve(prompt, "own")
            rows[prompt] = {"prompt": prompt, "answer": answer, "difficulty": difficulty,
                            "own_trace": own_trace, "teacher_trace": solve(prompt, "teacher")[0]}
    return list(rows.values())


def load_task(task, split, counts, seed=0, trace_style="teacher"):
    """The built-in data set as a `datasets.Dataset`.

    counts: difficulty -> rows. Columns: prompt, answer (gold), difficulty, trace (off-policy solution text in `trace_style`,
    "teacher" or "own"), own_trace, teacher_trace. Train and eval never share a problem; `seed` draws other problems of the same split.
    """
    from datasets import Dataset

    if trace_style not in ("teacher", "own"):
        raise ValueError(f"trace_style must be teacher or own, got {trace_style!r}")
    rows = [row for difficulty, num in counts.items() for row in problems(task, split, difficulty, num, seed)]
    return Dataset.from_list([row | {"trace": row[f"{trace_style}_trace"]} for row in rows])


# ---------------------------------------------------------------- the tiny base model


def solve_document(task, rng):
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
    return prompt, solve(prompt, style, slip=None if easy else lambda: rng.random() < SLIP[depth])[0]


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
    import torch

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


def build_base(directory, seed=0, steps=2000, batch=(28, 14, 20, 8), hidden=96, layers=3):
    """Pre-train the tiny base on both families and save it as an HF folder. Returns (model, tokenizer).

    batch: documents a step: diary solutions, diary rephrasings, bills solutions, bills rephrasings. Muon on the matrices
    matters: in a trial of 1000 steps easy bills came out 96 % right, with AdamW alone 59 % (torch >= 2.9; a policy needs only AdamW).
    """
    import torch
    from tqdm import tqdm
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup

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
        documents = [solve_document("diary", rng) for _ in range(batch[0])] + [rephrase_document("diary", rng) for _ in range(batch[1])]
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


def measure_base(model, tokenizer, seed=0, progress=False):
    """Measure the numbers of ACCEPTANCE: {name: share}. 256 easy and other problems, 128 hard ones, all from the eval split.

    hard is the mean over 8 (bills: 1024 completions) or 48 samples a problem; hard_solved_in_48 the share of problems solved at
    least once; rephrase the hard problems answered right from the teacher's notes.
    """
    from tqdm import tqdm

    import common

    def measure(rows, k, temperature=1.0):
        rows = [row | {"prompt_ids": common.encode_prompt(tokenizer, row["prompt"])} for row in rows]
        with tqdm(total=k * len(rows), desc="measuring", unit="sample", disable=not progress) as bar:
            return common.evaluate(model, tokenizer, rows, k, 64, temperature, reward="exact", seed=seed, bar=bar)

    def right(results):
        return sum(sum(result["rewards"]) for result in results) / sum(len(result["rewards"]) for result in results)

    numbers = {}
    for task in TASKS:
        for difficulty in ("easy", "other"):
            numbers[f"{task}/{difficulty}"] = right(measure(problems(task, "eval", difficulty, 256), 1))
        rows = problems(task, "eval", "hard", 128)
        notes = [row | {"prompt": rephrase_prompt(row["prompt"], row["teacher_trace"])} for row in rows]
        numbers[f"{task}/rephrase"] = right(measure(notes, 1))
        hard = measure(rows, 8 if task == "bills" else 48)
        numbers[f"{task}/hard"] = right(hard)
    numbers["diary/hard_greedy"] = right(measure(rows, 1, temperature=0.0))
    numbers["diary/hard_solved_in_48"] = sum(any(result["rewards"]) for result in hard) / len(hard)
    return numbers


def main():
    """Command line: build or measure the tiny base, or write the data sets as jsonl."""
    import torch

    import common
    import runs

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--build", metavar="DIR", help="train the tiny base and save it in DIR (new or empty)")
    action.add_argument("--measure", metavar="DIR", help="measure the base in DIR; tiny_model is the shipped one")
    action.add_argument("--write_jsonl", metavar="DIR", help="write TASK-train.jsonl and TASK-eval.jsonl in DIR (new or empty)")
    parser.add_argument("--seed", type=int, default=0, help="of the base's weights and text, or of the data sets (default: 0)")
    parser.add_argument("--trace_style", choices=("teacher", "own"), default="teacher", help="style of the trace column (default: teacher)")

    def refuse(message):
        raise common.BadArgument(message)

    parser.error = refuse  # one line, as the scripts do
    args = parser.parse_args()
    if args.build and not hasattr(torch.optim, "Muon"):
        refuse(f"--build needs torch >= 2.9 for its optimizer, found {torch.__version__}")
    directory = args.build or args.write_jsonl
    if directory:
        runs.refuse_used_folder(Path(directory), "--build" if args.build else "--write_jsonl")
    if args.write_jsonl:
        Path(directory).mkdir(parents=True, exist_ok=True)
        for task in TASKS:
            for split, counts in {"train": {"hard": 512, "easy": 256}, "eval": dict.fromkeys(DIFFICULTIES, 128)}.items():
                load_task(task, split, counts, args.seed, args.trace_style).to_json(Path(directory) / f"{task}-{split}.jsonl")
        print(f"wrote {', '.join(sorted(path.name for path in Path(directory).iterdir()))} in {directory}")
        return
    model, tokenizer = build_base(directory, args.seed) if args.build else common.load_model(args.measure)
    missed = 0
    for name, share in measure_base(model, tokenizer, progress=True).items():
        least, most = ACCEPTANCE[name]
        missed += not least <= share <= most
        print(f"{name:<26} {share:8.4f}   wanted {least} to {most}{'' if least <= share <= most else '   MISSED'}")
    if missed:
        raise common.RunError(f"{missed} of {len(ACCEPTANCE)} acceptance numbers are missed")


if __name__ == "__main__":
    import runs

    runs.run_main(main)
