r"""The reward: one answer span, the last `\boxed{}` of a completion, compared with the gold answer, or a function of the user's.

Nothing that a model wrote is ever evaluated in this process: numbers are read by regular expressions into Fractions. Only math-verify
computes with it (`--reward math`), in a process of its own, which is killed when a comparison takes too long: this file, run as a
script, is that process, so it imports the standard library only, and math-verify there.
"""

import functools
import importlib.util
import json
import math
import numbers
import os
import re
import select
import signal
import subprocess
import sys
import traceback
from fractions import Fraction
from pathlib import Path

REWARDS = ("boxed", "exact", "numeric", "choice", "math")


class RewardError(Exception):
    """A reward cannot be computed: one line on stderr, exit code 1."""


def answer_span(text):
    r"""The content of the last `\boxed{...}` in `text`, or None. One span only, so naming several candidates earns nothing."""
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

    Beside what `parse_number` reads: 1{,}234, 1,\!234 and 1\,234; one leading currency sign; one unit at the end, which is dropped:
    a percent or degree sign (so 50% is 50, never 1/2), \text{...} or \mathrm{...} of at most three words, or one word of two letters
    or more after a space; cm^2 and km/h are units, "million" and "or" are not. Scientific notation is not read.
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
    r"""Fold what LaTeX writes in several ways: white space, $, \left \right, \dfrac, \!, \, and \text{...}."""
    text = re.sub(r"\\(left|right|!|,|;)(?![A-Za-z])", "", text.replace("$", ""))
    text = re.sub(r"\\text\{([^{}]*)\}", r"\1", text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac"))
    return re.sub(r"\s+", "", text).rstrip(".")


def is_words(text):
    """True for two letters or more and nothing else. math-verify reads "east" as e a s t, a product, which equals "seat"."""
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
    """The answer of `text` as a string that is the same for equal answers, to count votes by; None when there is nothing to grade.

    exact: the words · numeric: the number, units dropped · choice: the letter · boxed: the number, or the LaTeX after `normalise` ·
    math: as boxed, because math-verify compares pairs. Answers that `agree` without math-verify have one key; the reverse fails
    where white space hides a number: 1 / 2 has the key of 0.5. None also for an empty box, or one without number or letter.
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


def grade_all(texts, ended, rows, reward="boxed", grade_truncated=False):
    """Rewards of B completions as floats. One that was cut off earns 0 even if an answer is in it, unless grade_truncated.

    reward is one of REWARDS, which grades against row["answer"], or PATH.py:FUNCTION.
    """
    counted = [i for i, end in enumerate(ended) if end or grade_truncated]
    if reward in REWARDS:
        values = [grade(texts[i], rows[i]["answer"], reward) for i in counted]
    else:
        values = call_reward_fn(reward, [texts[i] for i in counted], [rows[i] for i in counted]) if counted else []
    rewards = [0.0] * len(texts)
    for i, value in zip(counted, values):
        rewards[i] = value
    return rewards


def gold_is_sound(answer, reward):
    """Does a gold answer grade right when it is given back? With math it must also be a number, words, or read by math-verify in time."""
    if not grade(f"\\boxed{{{answer}}}", answer, reward):
        return False
    if reward != "math" or parse_number(answer) is not None or is_words(answer):
        return True
    return len(answer) <= MATH_CHARACTERS and math_equal(answer, answer)


def check_reward(reward, reward_fn):
    """Raises ValueError, in one line, when --reward_fn cannot be loaded or --reward math lacks its package, which is not imported."""
    if reward_fn is not None:
        load_reward_fn(reward_fn)
    elif reward == "math" and importlib.util.find_spec("math_verify") is None:
        raise ValueError("--reward math needs the package math-verify: pip install math-verify")


# ---------------------------------------------------------------- math-verify in a process of its own

MATH_SECONDS = 5  # for one comparison; the median is 0.01
MATH_CHARACTERS = 1000  # longer answers earn nothing


class MathWorker:
    """Compares LaTeX with math-verify in a child process, started when first needed, killed when a comparison takes too long.

    math-verify's own time-outs are signals that Python handles between two bytecodes; `9^{9^{9^9}}` is one. The child is a session
    of its own, so Ctrl-C in the terminal reaches the parent only. It ends with its parent, however that ends: at the end of its
    input, and in the middle of a comparison by an alarm that the kernel delivers (tests/test_reward.py).
    """

    def __init__(self):
        self.process, self.timeouts = None, 0

    def equal(self, given, gold):
        """math-verify's verdict; False when it raises, when the child dies, or after MATH_SECONDS (both counted in `timeouts`)."""
        try:
            if self.process is None or self.process.poll() is not None:  # -P: no module of this folder is in the child's way
                self.process = subprocess.Popen([sys.executable, "-P", __file__, str(MATH_SECONDS + 1)], stdin=subprocess.PIPE,
                                                stdout=subprocess.PIPE, bufsize=0, start_new_session=True)
                if self.read(seconds=60) != b"r":
                    raise RewardError("--reward math: the process that runs math-verify does not start; try python -c 'import math_verify'")
            self.process.stdin.write(json.dumps([given, gold]).encode() + b"\n")
            verdict = self.read(MATH_SECONDS)
        except BaseException:  # Ctrl-C, say: the next answer must not be this one's
            self.stop()
            raise
        if not verdict:
            self.stop()
            self.timeouts += 1
        return verdict == b"1"

    def read(self, seconds):
        """One byte of the child's, or none when it is too late or dead."""
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        return self.process.stdout.read(1) if ready else b""

    def stop(self):
        """Kill the child; the next comparison starts another."""
        if self.process is not None:
            with self.process:
                self.process.kill()
            self.process = None


MATH = MathWorker()


@functools.lru_cache(maxsize=10_000)  # a group repeats itself
def math_equal(given, gold):
    """Are two answers equal by math-verify?"""
    return MATH.equal(given, gold)


def math_timeouts():
    """Comparisons that were given up since the process began."""
    return MATH.timeouts


def serve_math(seconds):
    """The child: one line [given, gold] in, one byte out, "1" or "0"; "r" first, when it is ready. Over `seconds` it ends itself."""
    from math_verify import LatexExtractionConfig, parse, verify

    verdicts, silence = os.fdopen(os.dup(1), "wb", buffering=0), os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)  # whatever sympy prints must not become a verdict
    os.dup2(silence, 2)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # without a handler an alarm ends the process, also inside one long bytecode

    def read(answer):  # LaTeX only: the other reader of math-verify is sympy's parse_expr, which evaluates
        return parse(f"\\boxed{{{answer}}}", [LatexExtractionConfig(boxed_match_priority=0)], fallback_mode="no_fallback",
                     extraction_mode="first_match", parsing_timeout=None)

    verdicts.write(b"r")
    for line in sys.stdin.buffer:
        signal.alarm(seconds)
        given, gold = json.loads(line)
        try:
            equal = verify(read(gold), read(given), timeout_seconds=None)
        except Exception:  # sympy raises anything; what cannot be compared is not equal
            equal = False
        signal.alarm(0)
        verdicts.write(b"1" if equal else b"0")


# ---------------------------------------------------------------- the user's own


@functools.cache
def load_reward_fn(spec):
    """PATH.py:FUNCTION -> the function. Runs the file, once. Raises ValueError, in one line, when that cannot be done."""
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


def call_reward_fn(spec, texts, rows):
    """Call the user's function as TRL does, with lists of equal length: prompts, completions, and each column of the data.

    Returns a list of floats. Raises RewardError when the function raises, or does not return one finite number per completion.
    """
    columns = {name: [row["columns"][name] for row in rows] for name in rows[0]["columns"]}
    try:
        rewards = list(load_reward_fn(spec)(prompts=[row["prompt"] for row in rows], completions=list(texts), **columns))
    except Exception as error:  # it is the user's code
        line = traceback.extract_tb(error.__traceback__)[-1]
        raise RewardError(f"--reward_fn {spec}: {one_line(error)} ({Path(line.filename).name}, line {line.lineno}), "
                          f"called with {len(texts)} completions, the first {ascii(texts[0][:60])}") from error
    if len(rewards) != len(texts):
        raise RewardError(f"--reward_fn {spec}: returned {len(rewards)} rewards for {len(texts)} completions")
    for place, (reward, text) in enumerate(zip(rewards, texts)):
        if not isinstance(reward, numbers.Real) or not math.isfinite(reward):
            raise RewardError(f"--reward_fn {spec}: returned {ascii(reward)}, not a finite number, for completion {place} of {len(texts)}, "
                              f"{ascii(text[:60])}")
    return [float(reward) for reward in rewards]


def one_line(error):
    """Type and first line of an exception's message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


if __name__ == "__main__":
    serve_math(int(sys.argv[1]))
