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

tiny_model/build.py trains and measures the model, and writes the data sets as plain jsonl.
"""

import random
import zlib
from pathlib import Path

from .errors import BadArgument

TASKS = ("bills", "diary")
DIFFICULTIES = ("easy", "hard", "other")
MOST_PROBLEMS = 10_000  # of a difficulty: there are not many more different ones
TINY_MODEL = Path(__file__).parents[1] / "tiny_model"
# Traces of hard problems that the base itself found by rejection sampling. It finds none for bills (docs/data.md).
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
# The base never ends a clause of its answer with ".", but a reader would not call a full stop foreign.
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
    """Read a prompt and write its solution in a style: "own" (the base's terse digits) or "teacher" (foreign words).

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
    """The built-in data set as a list of rows.

    counts: difficulty -> rows. Columns: prompt, answer (gold), difficulty, trace (off-policy solution text in `trace_style`,
    "teacher" or "own"), own_trace, teacher_trace. Train and eval never share a problem; `seed` draws other problems of the same split.
    """
    if trace_style not in ("teacher", "own"):
        raise ValueError(f"trace_style must be teacher or own, got {trace_style!r}")
    if max(counts.values()) > MOST_PROBLEMS:
        raise BadArgument(f"--task {task}: expected at most {MOST_PROBLEMS} problems of a difficulty, got {max(counts.values())}")
    if not any(counts.values()):
        raise BadArgument("--num_hard 0 --num_easy 0: no problem is left")
    rows = [row for difficulty, num in counts.items() for row in problems(task, split, difficulty, num, seed)]
    return [row | {"trace": row[f"{trace_style}_trace"]} for row in rows]
