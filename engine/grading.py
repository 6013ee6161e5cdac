r"""The reward: the answer of a completion, its last `\boxed{}`, compared with the gold answer, or a function of the user's.

Nothing that a model wrote is evaluated in this process: regular expressions read numbers into Fractions. Only math-verify computes with
it, in another process (math_verify.py).
"""

import functools
import importlib.util
import math
import numbers
import re
import sys
import traceback
from fractions import Fraction
from pathlib import Path

from . import ranks
from .errors import RunError, one_line
from .math_verify import MATH_CHARACTERS, math_equal

REWARDS = ("boxed", "exact", "numeric", "choice", "math")


def answer_span(text):
    r"""The content of the last `\boxed{...}` in `text`, or None. There is one span only, so naming several candidates earns nothing."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for end in range(start + len("\\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : end]
    return None


NUMBER = re.compile(r"([+-]?)(\d{1,3}(?:,\d{3})+|\d+)?(\.\d+)?(?:/(\d+))?", re.ASCII)


def parse_number(text):
    """Integer, decimal, a/b or 1,234 -> Fraction; anything else None. At most 100 characters; nothing is evaluated."""
    text = re.sub(r"^([+-]?)\\[dt]?frac\{(\d+)\}\{(\d+)\}$", r"\1\2/\3", text.strip().strip("$").strip(), flags=re.ASCII)
    match = NUMBER.fullmatch(text)
    if len(text) > 100 or not match or not (match[2] or match[3]) or match[4] and (match[3] or int(match[4]) == 0):
        return None
    value = Fraction((match[2] or "0").replace(",", "") + (match[3] or "")) / int(match[4] or 1)
    return -value if match[1] == "-" else value


UNIT = re.compile(r"(?:\s*\\?%|\s*°|\s*\^\\circ|\s*\^\{\\circ\}|\s*\\(?:text|mathrm)\{([A-Za-z/. ]+)\}|\s([A-Za-z]{2,}(?:/[A-Za-z]+)?))"
                  r"(?:\^\{?[23]\}?)?$")
NOT_UNITS = frozenset("hundred thousand million billion trillion dozen half third quarter pi or and not".split())


def parse_quantity(text):
    r"""A number with its unit -> the number as a Fraction, or None. Both sides are read alike, so 5 equals 5 cm.

    It also reads 1{,}234, 1,\!234 and 1\,234, one leading currency sign, and one unit at the end, which is dropped. A unit is a percent
    or degree sign (so 50% is 50, never 1/2), \text{...} or \mathrm{...} of at most three words, or one word of two letters or more after
    a space. cm^2 and km/h are units; "million" and "or" are not. Scientific notation is not read.
    """
    text = text.strip().strip("$").strip()
    if len(text) > 100:
        return None
    text = re.sub(r"(?<=\d)(?:\{,\}|,\\!|\\,)(?=\d{3})", ",", text)
    text = re.sub(r"\\[ ,;]|~", " ", text)
    text = re.sub(r"^([+-]?)\\?[$€£¥]\s*", r"\1", text)
    unit = UNIT.search(text)
    if unit:
        words = (unit[1] or unit[2] or "").lower().replace("/", " ").replace(".", " ").split()
        if len(words) > 3 or NOT_UNITS.intersection(words):
            return None
        text = text[: unit.start()]
    return parse_number(text)


def parse_choice(text):
    r"""The letter of B, (B), B., \text{B} or \textbf{(B)} -> "B"; anything else None."""
    text = text.strip().strip("$").strip()
    text = re.sub(r"^\\(?:text|textbf|mathrm|mathbf)\{([^{}]*)\}", r"\1", text).strip()
    match = re.fullmatch(r"([A-Z])\.?|\(([A-Z])\)\.?", text)
    return match and (match[1] or match[2])


def normalise(text):
    r"""Fold what LaTeX can write in several ways: white space, $, \left \right, \dfrac, \!, \, and \text{...}."""
    text = re.sub(r"\\(left|right|!|,|;)(?![A-Za-z])", "", text.replace("$", ""))
    text = re.sub(r"\\text\{([^{}]*)\}", r"\1", text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac"))
    return re.sub(r"\s+", "", text).rstrip(".")


def is_words(text):
    """True for two letters or more and nothing else. math-verify reads "east" as the product e a s t, which equals "seat"."""
    text = re.sub(r"\\(?:textbf|mathrm|mathbf)\{([^{}]*)\}", r"\1", normalise(text))
    return re.fullmatch(r"[A-Za-z]{2,}", text) is not None


def agree(given, gold, reward):
    """Is the answer span `given` the answer `gold`? [the rule of each --reward]

    exact: the same words · numeric: equal numbers, units dropped · choice: the same letter A-Z, upper case, alone ·
    boxed: equal numbers, or the same LaTeX after `normalise` · math: as boxed, or equal by math-verify; two plain numbers are
    compared here, exactly, and words as words.
    """
    if reward == "exact":
        return given.split() == gold.split()
    if reward in ("numeric", "choice"):
        parse = parse_quantity if reward == "numeric" else parse_choice
        return parse(gold) is not None and parse(given) == parse(gold)
    if parse_number(given) is not None and parse_number(gold) is not None:
        return parse_number(given) == parse_number(gold)
    if normalise(given) == normalise(gold):
        return True
    if reward == "boxed" or is_words(given) or is_words(gold) or max(len(given), len(gold)) > MATH_CHARACTERS:
        return False
    return math_equal(given, gold)


def grade(text, answer, reward="boxed"):
    """1.0 if the answer span of `text` is `answer` by the rule of `reward`, else 0.0."""
    span = answer_span(text)
    return float(span is not None and agree(span, answer, reward))


def answer_key(text, reward="boxed"):
    """The answer of `text` as a string that is the same for equal answers, for counting votes; None when there is nothing to grade.

    exact: the words · numeric: the number, units dropped · choice: the letter · boxed: the number, or the LaTeX after `normalise` ·
    math: as boxed, because math-verify compares pairs. Answers that `agree` without math-verify have one key. The reverse fails
    where white space hides a number: 1 / 2 has the key of 0.5. An empty box, or one without number or letter, has no key, too.
    """
    span = answer_span(text)
    if span is None:
        return None
    if reward == "exact":
        return " ".join(span.split()) or None
    if reward in ("numeric", "choice"):
        value = parse_quantity(span) if reward == "numeric" else parse_choice(span)
    else:
        value = parse_number(normalise(span))
        value = normalise(span) or None if value is None else value
    return None if value is None else str(value)


def grade_completions(texts, ended, problems, reward="boxed", grade_truncated=False):
    """Rewards of B completions as floats. A completion that was cut off earns 0 even with an answer in it, unless grade_truncated.

    reward is one of REWARDS, which grades against problem["answer"], or PATH.py:FUNCTION. Each rank grades its share, so a time limit,
    or a reward with chance in it, is decided once for all ranks.
    """
    own = ranks.own_slice(len(texts))
    texts, ended, problems = texts[own], ended[own], problems[own]
    counted = [i for i, end in enumerate(ended) if end or grade_truncated]
    if reward in REWARDS:
        values = [grade(texts[i], problems[i]["answer"], reward) for i in counted]
    else:
        values = call_reward_fn(reward, [texts[i] for i in counted], [problems[i] for i in counted]) if counted else []
    rewards = [0.0] * len(texts)
    for i, value in zip(counted, values):
        rewards[i] = value
    return ranks.all_gather_list(rewards)


def gold_is_sound(answer, reward):
    """Does a gold answer grade right when it is given back? With math it is also a number, words, or read by math-verify in time."""
    if not grade(f"\\boxed{{{answer}}}", answer, reward):
        return False
    if reward != "math" or parse_number(answer) is not None or is_words(answer):
        return True
    return len(answer) <= MATH_CHARACTERS and math_equal(answer, answer)


def check_reward(reward, reward_fn):
    """Raise ValueError, in one line, when --reward_fn cannot be loaded, or when the package of --reward math is missing."""
    if reward_fn is not None:
        load_reward_fn(reward_fn)
    elif reward == "math" and importlib.util.find_spec("math_verify") is None:
        raise ValueError("--reward math needs the package math-verify: pip install math-verify")


# ---------------------------------------------------------------- the user's own


@functools.cache
def load_reward_fn(spec):
    """PATH.py:FUNCTION -> the function. The file runs once. Raises ValueError, in one line, when the function cannot be loaded."""
    file, _, name = spec.rpartition(":")
    path = Path(file)
    if path.suffix != ".py" or not name.isidentifier():
        raise ValueError(f"--reward_fn {spec}: expected PATH.py:FUNCTION")
    if not path.is_file():
        raise ValueError(f"--reward_fn {spec}: no such file")
    module_spec = importlib.util.spec_from_file_location(f"reward_fn of {path}", path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses look themselves up there
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:  # it is the user's code
        raise ValueError(f"--reward_fn {spec}: {one_line(error)}") from error
    if not callable(getattr(module, name, None)):
        raise ValueError(f"--reward_fn {spec}: {path} has no function {name}")
    return getattr(module, name)


def call_reward_fn(spec, texts, problems):
    """Call the user's function as TRL does, with lists of equal length: prompts, completions, and each column of the data.

    Returns a list of floats. Raises RunError when the function raises, or does not return one finite number per completion.
    """
    columns = {name: [problem["columns"][name] for problem in problems] for name in problems[0]["columns"]}
    try:
        rewards = list(load_reward_fn(spec)(prompts=[problem["prompt"] for problem in problems], completions=list(texts), **columns))
    except Exception as error:  # it is the user's code
        line = traceback.extract_tb(error.__traceback__)[-1]
        raise RunError(f"--reward_fn {spec}: {one_line(error)} ({Path(line.filename).name}, line {line.lineno}), "
                          f"called with {len(texts)} completions, the first {ascii(texts[0][:60])}") from error
    if len(rewards) != len(texts):
        raise RunError(f"--reward_fn {spec}: returned {len(rewards)} rewards for {len(texts)} completions")
    for place, (reward, text) in enumerate(zip(rewards, texts)):
        if not isinstance(reward, numbers.Real) or not math.isfinite(reward):
            raise RunError(f"--reward_fn {spec}: returned {ascii(reward)}, not a finite number, for completion {place} of {len(texts)}, "
                              f"{ascii(text[:60])}")
    return [float(reward) for reward in rewards]
