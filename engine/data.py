"""Data: local files and hub data sets as problems (dicts of text), and the order in which training takes them."""

import functools
import hashlib
import json
import math
import random
import re
from pathlib import Path

from . import tasks
from .errors import BadArgument
from .grading import answer_span

PROMPT_COLUMNS, ANSWER_COLUMNS = ("prompt", "problem", "question"), ("answer", "solution", "ground_truth", "reward_model")
TRACE_COLUMNS = ("trace", "target", "completion", "generation")


def read_prompt(value):
    """A prompt as people store it, a string or chat messages -> messages that end with the user's, or None for anything else."""
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not (are_messages(value) and value[-1]["role"] == "user" and value[-1]["content"].strip()):
        return None
    return [{"role": turn["role"], "content": turn["content"]} for turn in value]


def question(messages):
    """The text of a prompt without its system message: what traces are found by, what other prompts quote, what is logged."""
    return "\n".join(turn["content"] for turn in messages if turn["role"] != "system")


def read_trace(value):
    """A trace as people store it, a string or chat messages with one assistant's -> its text, or None for anything else."""
    if are_messages(value):
        told = [turn["content"] for turn in value if turn["role"] == "assistant"]
        value = told[0] if len(told) == 1 else None
    return value if isinstance(value, str) and value.strip() else None


def are_messages(value):
    """Is it a list of {"role": system, user or assistant, "content": text}, the system's first if there is one?"""
    return (isinstance(value, list) and len(value) > 0
            and all(isinstance(turn, dict) and isinstance(turn.get("content"), str) for turn in value)
            and all(turn.get("role") in (("system",) if place == 0 else ()) + ("user", "assistant") for place, turn in enumerate(value)))


def read_gold(value):
    r"""A gold answer as people store it -> its text, or None.

    The answer may be a number, True or False, or a dict with ground_truth (verl's column reward_model). In a text the answer is read in
    this order: the content of the last \boxed{}; x of a last line with "#### x" (GSM8K), without commas; the whole text.
    """
    if isinstance(value, dict):
        value = value.get("ground_truth")
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, (int, float)) and math.isfinite(value):
        return str(int(value) if value == int(value) else value)  # a CSV column with a gap holds floats
    if not isinstance(value, str):
        return None
    marked = re.search(r"####([^\n#]*)\s*\Z", value)
    text = answer_span(value) if "\\boxed{" in value else marked[1].replace(",", "") if marked else value
    return (text or "").strip() or None


def read_problems(name, split, flag, config=None, traces=False):
    """A local jsonl, json, csv or parquet file, or a hub data set, as problems with prompt, answer and difficulty ("all" without one).

    Columns are read by `read_prompt`, `read_gold` and, with `traces`, `read_trace`. `prompt` is the text of the question. Where the
    prompt was messages, `prompt_messages` are what is rendered. Rows whose prompt or gold is missing or of another type are dropped
    with a count. Traces of another type become None, with a count. Raises BadArgument for a missing column, or when no row is left.
    """
    records = read_dataset(name, split, flag, config)
    if not records:
        raise BadArgument(f"{flag} {name}: the data set is empty")
    columns, picked = list(records[0]), []
    for wanted in (PROMPT_COLUMNS, ANSWER_COLUMNS):
        found = [column for column in wanted if column in columns]
        if not found:
            raise BadArgument(f"{flag} {name}: needs a column {' or '.join(wanted)}, found {', '.join(columns)}")
        picked.append(found[0])
    prompt, answer = picked
    trace = next((column for column in TRACE_COLUMNS if column in columns), None) if traces else None
    rows, unread = [], {prompt: [], answer: [], trace: []}  # column -> numbers of the rows where it cannot be read, from 1
    for number, record in enumerate(records, 1):
        messages, gold = read_prompt(record[prompt]), read_gold(record[answer])
        if messages is None or gold is None:
            unread[prompt if messages is None else answer].append(number)
            continue
        row = record | {"prompt": question(messages), "answer": gold, "difficulty": str(record.get("difficulty", "all"))}
        if not isinstance(record[prompt], str):
            row["prompt_messages"] = messages
        if trace:
            row["trace"] = read_trace(record[trace])
            if row["trace"] is None and record[trace] is not None:
                unread[trace].append(number)
        rows.append(row)
    told = {column: f"{len(numbers)} of {len(records)} rows whose {column} is missing or of another type, e.g. row {numbers[0]}"
            for column, numbers in unread.items() if numbers}
    if not rows:
        raise BadArgument(f"{flag} {name}: no row is left: dropped {' and '.join(told.values())}")
    for column, what in told.items():
        print(f"{flag}: " + (f"no trace in {what}" if column == trace else f"dropped {what}"))
    return rows


def read_traces(file):
    """A file of eval.py --save_traces, or one like it -> {text of the question: its first record with a prompt and a trace}."""
    found = {}
    for record in read_dataset(file, "train", "--traces"):
        if not {"prompt", "trace"} <= record.keys():
            raise BadArgument(f"--traces {file}: needs columns prompt and trace, found {', '.join(record)}")
        messages, trace = read_prompt(record["prompt"]), read_trace(record["trace"])
        if messages and trace:
            found.setdefault(question(messages), record | {"trace": trace})
    return found


def traces_file(args):
    """Path of the trace file that a run uses, or None: --traces, or the built-in one of --trace_style self."""
    if getattr(args, "traces", None) is None and getattr(args, "trace_style", None) == "self" and args.dataset_name is None:
        if args.task not in tasks.SELF_TRACES:
            raise BadArgument(f"--trace_style self: the base never solves hard problems of --task {args.task}; take teacher or own")
        return str(tasks.SELF_TRACES[args.task])
    return getattr(args, "traces", None)


def find_traces(problems, args):
    """A record of each problem with trace and perhaps trace_ids and logps, {} for a problem without one; and where traces come from.

    Traces come from --traces FILE, by prompt, or else from the data set's column, or from the built-in task in --trace_style. Raises
    BadArgument for a file of which no prompt is a problem.
    """
    file, source = traces_file(args), args.traces or args.dataset_name or f"--trace_style {args.trace_style}"
    if file is None:
        column = f"{args.trace_style}_trace"
        if args.dataset_name is not None:
            column = next((name for name in TRACE_COLUMNS if name in problems[0]), None)
        return [{"trace": problem[column]} if column else {} for problem in problems], source
    found = read_traces(file)
    if not any(problem["prompt"] in found for problem in problems):
        raise BadArgument(f"--traces {file}: none of its {len(found)} prompts is one of the {len(problems)} training prompts: "
                          "it is of another data set")
    return [found.get(problem["prompt"], {}) for problem in problems], source


def read_dataset(name, split, flag, config=None):
    """A local file or hub data set as a list of dicts; local files never touch the network, and have no configurations."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its errors are passed on below, in one line
    path = Path(name)
    kinds = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
    if path.suffix in kinds and not path.is_file():
        raise BadArgument(f"{flag} {name}: no such file")
    try:
        if path.is_file():
            if path.suffix not in kinds:
                raise BadArgument(f"{flag} {name}: expected a file ending in {', '.join(kinds)}")
            if config is not None:
                raise BadArgument(f"{flag.replace('_name', '_config')} {config}: {name} is a local file, which has no configurations")
            if path.stat().st_size == 0:
                return []
            # Not load_dataset, which reports every call to a counter on the network (tests/test_data.py).
            return list(getattr(datasets.Dataset, f"from_{kinds[path.suffix]}")(str(path)))
        return list(datasets.load_dataset(name, config, split=split))
    except BadArgument:
        raise
    except Exception as error:  # the loaders of `datasets` raise anything; its message is passed on
        reason = str(error.__cause__ or error).strip() or type(error).__name__
        raise BadArgument(f"{flag} {name}: {reason.splitlines()[0]}") from error


def problems_digest(problems):
    """{"rows": their number, "sha256": of prompt ids, gold answer and trace ids of each, in order}: did two runs have the same data?"""
    digest = hashlib.sha256()
    for problem in problems:
        digest.update(json.dumps([problem["prompt_ids"], problem["answer"], problem.get("trace_ids")]).encode() + b"\n")
    return {"rows": len(problems), "sha256": digest.hexdigest()}


def step_problems(problems, num, seed, step):
    """The `num` problems of one step: consecutive places in an endless stream of epochs, each shuffled by (seed, epoch)."""
    picked = []
    for place in range(step * num, (step + 1) * num):
        epoch, index = divmod(place, len(problems))
        picked.append(problems[epoch_order(len(problems), seed, epoch)[index]])
    return picked


@functools.lru_cache(maxsize=2)
def epoch_order(length, seed, epoch):
    """A permutation of range(length) that depends on (seed, epoch) only; cached, because a step asks for it once per problem."""
    order = list(range(length))
    random.Random(f"{seed}/{epoch}/order").shuffle(order)
    return order
