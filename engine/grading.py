r"""The reward: the answer of a completion, its last `\boxed{}`, compared with the gold answer, or a function of the user's.

Nothing that a model wrote is evaluated in this process (answers.py). Only math-verify computes with it, in another (math_verify.py).
"""

import contextlib
import copy
import functools
import importlib.util
import inspect
import math
import numbers
import sys
import traceback
from collections.abc import Mapping, Set
from pathlib import Path

import torch

from . import ranks
from .answers import answer_span, answer_value, is_words, math_question, parse_number, read_quantity, spell, split_unit
from .errors import RunError, one_line
from .math_verify import MATH_CHARACTERS, math_equal

REWARDS = ("boxed", "exact", "numeric", "choice", "math")


def agree(given, gold, reward):
    """Is the answer span `given` the answer `gold`? Where `answer_value` reads both alike; with math also where math-verify says so."""
    value = answer_value(gold, reward)
    return value is not None and answer_value(given, reward) == value or reward == "math" and agree_by_math(given, gold)


def agree_by_math(given, gold):
    """Is one answer the other by math-verify? It is lenient in ways that a policy finds; `math_question` says what it is not asked.

    Plain numbers, words and units are compared here: units that are named must be the same, and 50% is 50 and 0.5.
    """
    if is_words(given) or is_words(gold) or max(len(given), len(gold)) > MATH_CHARACTERS:
        return False
    (given, unit), (gold, wanted) = (split_unit(spell(text)) or (spell(text), "") for text in (given, gold))
    if unit != wanted and unit and wanted:
        return False
    number, right = parse_number(given), parse_number(gold)
    if number is None or right is None:
        question = math_question(given if number is None else str(number), gold if right is None else str(right))
        return question is not None and math_equal(*question)
    if unit == wanted or "percent" not in (unit, wanted):
        return number == right
    return number in ((right, right / 100) if wanted else (right, right * 100))


def grade(text, answer, reward="boxed"):
    """1.0 if the answer span of `text` is `answer` by the rule of `reward`, else 0.0."""
    span = answer_span(text)
    return float(span is not None and agree(span, answer, reward))


def answer_key(text, reward="boxed"):
    """The answer of `text` as a string that is the same for equal answers, for counting votes; None when there is nothing to grade.

    Answers that `agree` have one key and others have two, but for math: math-verify compares pairs.
    """
    span = answer_span(text)
    return None if span is None else answer_value(span, reward)


def grade_completions(texts, ended, problems, reward="boxed", grade_truncated=False, ids=None):
    """Rewards of B completions as floats; reward is one of REWARDS, or PATH.py:FUNCTION.

    The rules of REWARDS grade against problem["answer"]. With them a completion that was cut off earns 0 even with an answer in it,
    unless grade_truncated. A user's function is called with every completion, `ids` (lists of tokens) too. Each rank grades its
    share, so a time limit, or a reward with chance in it, is decided once for all ranks. A user's function always sees whole groups, the
    adjacent completions of a problem: a reward may compare them.
    """
    own = ranks.own_slice(len(texts)) if reward in REWARDS else own_groups(problems)
    counted = [i for i in range(len(texts))[own] if ended[i] or grade_truncated or reward not in REWARDS]
    if reward in REWARDS:
        values = [grade(texts[i], problems[i]["answer"], reward) for i in counted]
    else:
        values = call_reward_fn(reward, *([row[i] for i in counted] for row in (texts, ended, problems)), ids and [ids[i] for i in counted])
    rewards = dict.fromkeys(range(len(texts))[own], 0.0) | dict(zip(counted, values))
    return ranks.all_gather_list(list(rewards.values()))


def gold_is_sound(answer, reward):
    """Does a gold answer grade right when it is given back? With math it is also a number, words, or read by math-verify in time."""
    if not grade(f"\\boxed{{{answer}}}", answer, reward):
        return False
    return reward != "math" or read_quantity(answer) is not None or is_words(answer) or agree_by_math(answer, answer)


def check_reward(reward, reward_fn):
    """Raise ValueError, in one line, when --reward_fn cannot be loaded, or when the package of --reward math is missing."""
    if reward_fn is not None:
        check_reward_fn(reward_fn)
    elif reward == "math" and importlib.util.find_spec("math_verify") is None:
        raise ValueError("--reward math needs the package math-verify: pip install math-verify")


# ---------------------------------------------------------------- the user's own


def own_groups(problems):
    """Slice of the completions that this rank grades: whole groups, as `ranks.own_slice`. A group is adjacent rows of one problem."""
    starts = [i for i, problem in enumerate(problems) if i == 0 or problem is not problems[i - 1]] + [len(problems)]
    own = ranks.own_slice(len(starts) - 1)
    return slice(starts[own.start], starts[own.stop])


def check_reward_fn(spec):
    """Load a user's function on every rank. Raises ValueError on every rank, in one line, when one rank cannot."""
    faults = []
    try:
        load_reward_fn(spec)
    except ValueError as error:
        faults = [f"{error} (rank {ranks.rank()})" if ranks.rank() else str(error)]
    for fault in ranks.all_gather_list(faults):
        raise ValueError(fault)


@contextlib.contextmanager
def torch_left_as_it_is():
    """Context for the user's code, which may switch gradients off or set another default dtype for a reward model of its own."""
    gradients, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_grad_enabled(gradients)
        torch.set_default_dtype(dtype)


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
        with torch_left_as_it_is():
            module_spec.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # it is the user's code
        raise ValueError(f"--reward_fn {spec}: {one_line(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"--reward_fn {spec}: {path} has no function {name}")
    if any(is_async(each) for each in (function, type(function).__call__) for is_async in (
            inspect.iscoroutinefunction, inspect.isasyncgenfunction)):
        raise ValueError(f"--reward_fn {spec}: {name} is async: expected a plain function that returns a number per completion")
    return function


def accepts(function, name):
    """Does a function take an argument of this name? One whose arguments are not known does not."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    named = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    return any(each.kind == each.VAR_KEYWORD or each.name == name and each.kind in named for each in parameters)


def as_number(reward):
    """A number or bool of Python, numpy or torch as a float; None for anything else, and for what is not finite in float32."""
    try:
        value = reward.item() if hasattr(reward, "item") else reward
        value = float(value) if isinstance(value, numbers.Real) else math.nan
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None
    return value if abs(value) < 2.0**127 else None


def call_reward_fn(spec, texts, ended, problems, ids=None):
    """Call the user's function as TRL does, with lists of equal length: prompts, completions, and each column as it stands in the data.

    Prompts and completions are texts. A function that names them, or takes **kwargs, also gets prompt, the data's column; completion_ids,
    the tokens; and ended, False for what was cut off, unless the data have a column ended. Returns a list of floats. Raises RunError
    when the function raises, or does not return one finite number per completion: None, TRL's "does not apply", is none.
    """
    if not texts:
        return []
    function = load_reward_fn(spec)
    columns = [copy.deepcopy(problem["columns"]) for problem in problems]  # the function may change what it gets
    given = {"ended": list(ended)} | {name: [row[name] for row in columns] for name in columns[0]}
    given |= {"prompts": [problem["prompt"] for problem in problems], "completions": list(texts)}
    given |= {"completion_ids": [list(row) for row in ids]} if ids else {}
    given = {name: column for name, column in given.items()
             if name not in ("prompt", "completion_ids", "ended") or accepts(function, name)}
    try:
        with torch_left_as_it_is():
            returned = function(**given)
            rewards = None if inspect.isawaitable(returned) else list(returned)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # it is the user's code
        line = traceback.extract_tb(error.__traceback__)[-1]
        raise RunError(f"--reward_fn {spec}: {one_line(error)} ({Path(line.filename).name}, line {line.lineno}), "
                       f"called with {len(texts)} completions, the first {ascii(texts[0][:60])}") from error
    if isinstance(returned, (Mapping, Set)) or hasattr(returned, "columns"):
        raise RunError(f"--reward_fn {spec}: returned a {type(returned).__name__}: expected a list of numbers")
    pending = [each for each in ([returned] if rewards is None else rewards) if inspect.isawaitable(each)]
    for each in filter(inspect.iscoroutine, pending):
        each.close()  # nobody waits for it
    if pending:
        raise RunError(f"--reward_fn {spec}: returned a {type(pending[0]).__name__}: expected numbers, of a function that is not async")
    if len(rewards) != len(texts):
        raise RunError(f"--reward_fn {spec}: returned {len(rewards)} rewards for {len(texts)} completions")
    values = [as_number(reward) for reward in rewards]
    if None in values:
        place = values.index(None)
        raise RunError(f"--reward_fn {spec}: returned {ascii(rewards[place])[:60]}, not a finite number, for completion {place} of "
                       f"{len(texts)}, {ascii(texts[place][:60])}")
    return values
