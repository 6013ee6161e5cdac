"""Data: local files and hub data sets as problems (dicts of text), and the order in which training takes them."""

import ast
import contextlib
import functools
import hashlib
import json
import math
import random
import re
import tempfile
from decimal import Decimal
from pathlib import Path

from .data_files import READERS, read_file, shorten_floats
from .errors import BadArgument
from .grading import answer_span

PROMPT_COLUMNS, ANSWER_COLUMNS = ("prompt", "problem", "question"), ("answer", "solution", "ground_truth", "reward_model")
TRACE_COLUMNS = ("trace", "target", "completion", "generation")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # of an assistant's message, beside its content
NO_ANSWER = ("proof", "notfound")  # NuminaMath's words for a problem without a short answer
SPLITS = {"train": {"train", "training"}, "validation": {"validation", "valid", "val", "dev"},  # words in the names of files
          "test": {"test", "testing", "eval", "evaluation"}}
MOST_GROUPS = 8  # more difficulties are no groups


def unfold(value):
    """Messages, or a dict with ground_truth, for a text that is JSON of them, as csv files hold them; anything else as it is.

    Messages as Python prints them, in single quotes, become None.
    """
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        if re.match(r"\s*\[\{'(?:role|content)':", value):
            return None
        with contextlib.suppress(ValueError, RecursionError):
            read = json.loads(value)
            if are_messages(read) or isinstance(read, dict) and "ground_truth" in read:
                return read
    return value


def read_prompt(value):
    """A prompt as people store it, a string or chat messages -> messages that end with the user's, or None for anything else."""
    value = unfold(value)
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not (are_messages(value) and value[-1]["role"] == "user" and value[-1]["content"].strip()):
        return None
    return [{"role": turn["role"], "content": turn["content"]} for turn in value if turn["role"] != "system" or turn["content"].strip()]


def question(messages):
    """The text of a prompt without its system message: what traces are found by, what other prompts quote, what is logged."""
    return "\n".join(turn["content"] for turn in messages if turn["role"] != "system")


def read_trace(value):
    """A trace as people store it, a string or chat messages with one assistant's -> its text, or None for anything else.

    Thinking that stands apart, in `reasoning_content`, comes first, between <think> and </think>.
    """
    value = unfold(value)
    if are_messages(value):
        told = [turn for turn in value if turn["role"] == "assistant"]
        thought = next((turn[name] for turn in told for name in THOUGHTS if turn.get(name) is not None), "")
        if len(told) != 1 or not isinstance(thought, str):
            return None
        value = f"<think>\n{thought.strip()}\n</think>\n\n" * bool(thought.strip()) + told[0]["content"]
    return value if isinstance(value, str) and value.strip() else None


def are_messages(value):
    """Is it a list of {"role": system, user or assistant, "content": text}, the system's first if there is one?"""
    return (isinstance(value, list) and len(value) > 0
            and all(isinstance(turn, dict) and isinstance(turn.get("content"), str) for turn in value)
            and all(turn.get("role") in (("system",) if place == 0 else ()) + ("user", "assistant") for place, turn in enumerate(value)))


def read_gold(value, worked=False):
    r"""A gold answer as people store it -> its text, or None.

    The answer may be a number, True or False, or a dict with ground_truth (verl's column reward_model); '["5"]' is 5. <answer> tags,
    "The answer is" in front and quotes around a text are left out. In a text the answer is read in this order: the content of the last
    \boxed{}; x of a last line with "#### x" (GSM8K), 1,234 as 1234; the whole text, unless it is one of NO_ANSWER. worked: the text is
    a worked solution, whose sentences alone are no answer.
    """
    value = unfold(value)
    if isinstance(value, dict):
        value = value.get("ground_truth")
    if isinstance(value, str) and re.match(r"\s*\[ ?[\"']", value):  # a list of texts, as a text
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            read = ast.literal_eval(value.strip())
            value = read[0] if len(read) == 1 else None
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, (int, float, Decimal)):
        return number_text(value)
    if not isinstance(value, str) or value.strip().lower() in NO_ANSWER:
        return None
    value = re.sub(r"(?is)\A\s*<answer>(.*?)</answer>\s*\Z", r"\1", value)
    value = re.sub(r"(?i)\A\s*(?:(?:so|thus|therefore|hence),? )?(?:the )?(?:final |correct )?answer(?: is:?|:)\s+(?=\S)", "", value)
    if quoted := re.fullmatch(r'\s*"([^"\\\n]*)"\s*', value):
        value = quoted[1]
    marked = re.search(r"####([^\n#]*)(?:\nThe answer is\b[^\n]*)?\Z", value.rstrip())
    if re.search(r"\\boxed|\\fbox", value):
        return (answer_span(value) or "").strip() or None
    if marked:
        number = re.fullmatch(r"\s*([-+]?(?:\\?[$€£¥₹])? ?[-+]?[1-9]\d{0,2}(?:,\d{3})+)((?:\.\d+)?(?![\d,]).*)", marked[1])
        return (number[1].replace(",", "") + number[2] if number else marked[1]).strip() or None
    return None if worked and is_sentence(value) else value.strip() or None


def is_sentence(text):
    """Is a gold text a sentence or a worked solution, and not an answer?"""
    return isinstance(text, str) and len(text.split()) > 3 and re.search(r"\n|[.!?](\s|\Z)", text.strip()) is not None


def number_text(value):
    """A number as a text of digits: 3.0 -> 3, 1e-7 -> 0.0000001, the digits of a file as written; None for NaN and infinity."""
    if isinstance(value, int):
        return str(value)
    if not math.isfinite(value):
        return None
    try:
        written = Decimal(getattr(value, "written", str(value)))
    except ArithmeticError:  # an exponent of twenty digits
        return None
    if written == written.to_integral_value():  # a column with a gap holds floats
        return str(int(written))
    return f"{written:f}" if written.adjusted() > -100 else str(written)


def choose_column(columns, names, flag, given, where, needed=True):
    """The column that `given`, the value of a flag, names, or the first of `names` that exists; None where none is needed."""
    if given is not None and given not in columns:
        raise BadArgument(f"{flag} {given}: no such column in {where}, found {listed(columns)}")
    found = [name for name in names if name in columns]
    if needed and given is None and not found:
        raise BadArgument(f"{where}: needs a column {' or '.join(names)}, found {listed(columns)}; {flag} names another")
    return given or next(iter(found), None)


def listed(columns):
    """Names of columns for a message: one line, however many and whatever they are."""
    shown = [name if name.isprintable() else ascii(name) for name in columns]
    return ", ".join(shown[:20]) + (f" and {len(shown) - 20} more" if len(shown) > 20 else "")


def read_difficulties(records):
    """The group of each record: its difficulty, or "all" where the column is missing, numeric, or has more than MOST_GROUPS values."""
    values = [record.get("difficulty") for record in records]
    names = {str(value) for value in values if value is not None}
    if not names or len(names) > MOST_GROUPS or "all" in names or all(map(is_number, names)):
        return ["all"] * len(records)
    return [str(value) for value in values]


def is_number(text):
    """Is a text a number, such as 0.125?"""
    try:
        float(text)
    except ValueError:
        return False
    return True


def read_problems(name, split, flag, args, config=None, traces=False, gold=True):
    """A local file, a folder of files, or a hub data set, as problems with prompt, answer, difficulty and columns.

    The columns that --prompt_column, --answer_column and --trace_column name, or else the first that exist, are read by `read_prompt`,
    `read_gold` and, with `traces`, `read_trace`. `prompt` is the text of the question. Where the prompt was messages,
    `prompt_messages` are what is rendered. `columns` is the row as it stands, for --reward_fn. Rows whose prompt or gold is missing or
    of another type are dropped with a count. Traces of another type become None, with a count. Gold is only read with --reward_fn:
    one of another type is JSON text. gold=False: there may be no such column at all; answer is then None.
    Raises BadArgument for a missing column, or when no row is left.
    """
    records, where = read_dataset(name, split, flag, config), f"{flag} {name}"
    if not records:
        raise BadArgument(f"{where}: the data set is empty")
    columns, trace = list(records[0]), None
    prompt = choose_column(columns, PROMPT_COLUMNS, "--prompt_column", args.prompt_column, where)
    answer = choose_column(columns, ANSWER_COLUMNS, "--answer_column", args.answer_column, where, needed=gold and not args.reward_fn)
    if traces:
        trace = choose_column(columns, TRACE_COLUMNS, "--trace_column", args.trace_column, where, needed=False)
    rows, unread = [], {prompt: [], answer: [], trace: []}  # column -> what cannot be read, as (number of the row from 1, value)
    for number, (record, difficulty) in enumerate(zip(records, read_difficulties(records)), 1):
        asked, told = unfold(record[prompt]), record.get(trace)
        if args.prompt_column is not None and are_messages(asked) and asked[-1]["role"] == "assistant":  # a whole dialogue
            asked, told = asked[:-1], asked[-1:] if trace == prompt else told
        messages, right = read_prompt(asked), read_gold(record.get(answer), worked=answer in ("solution", "response"))
        if args.reward_fn and right is None and record.get(answer) is not None:
            right = json.dumps(record[answer], default=str)
        if messages is None or right is None and answer and not args.reward_fn:
            column = prompt if messages is None else answer
            unread[column].append((number, record[column]))
            continue
        row = {"prompt": question(messages), "answer": right, "difficulty": difficulty, "columns": record}
        if not isinstance(asked, str):
            row["prompt_messages"] = messages
        if trace:
            row["trace"] = read_trace(told)
            if row["trace"] is None and told is not None:
                unread[trace].append((number, told))
        rows.append(row)
    what = {column: f"{len(found)} of {len(records)} rows whose {listed([column])} is missing or of another type, e.g. row {found[0][0]}: "
                    f"{ascii(found[0][1])[:60]}; expected a text or {'a number' if column == answer else 'messages'}"
            for column, found in unread.items() if found}
    if not rows:
        raise BadArgument(f"{where}: no row is left: dropped {' and '.join(what.values())}")
    told = [row["answer"] for row in rows if is_sentence(row["answer"])]
    if told and not args.reward_fn:
        print(f"{flag}: {len(told)} of {len(rows)} gold answers are sentences, e.g. {ascii(told[0])[:60]}: only the same words are right; "
              "write the answer alone into a column for --answer_column, or give --reward_fn")
    for column, these in what.items():
        print(f"{flag}: " + (f"no trace in {these}" if column == trace else f"dropped {these}"))
    return rows


def is_prose(path):
    """Is a file a licence or a README, and not one that says which file is of which split?"""
    if not path.is_file() or path.suffix.lower() != ".md" and path.name.upper() not in ("LICENSE", "README", "NOTICE"):
        return False
    return not re.search(r"^configs:", path.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)


def files_of_split(folder, split):
    """The files of a split in a folder of nothing but data files; [] for a folder that `datasets` must read.

    The files of a split have its name in theirs, as for `datasets`. Where no file names a split, all of them are train.
    """
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith(".") and not is_prose(entry))
    if not all(entry.is_file() and entry.suffix in READERS for entry in entries):
        return []
    named = {entry: [kind for kind, words in SPLITS.items() if words & set(re.split(r"[^a-z]+", entry.stem.lower()))] for entry in entries}
    if any(len(kinds) > 1 for kinds in named.values()) or len({entry.stem for entry in entries}) < len(entries):
        return []  # of two splits, or one set in two formats
    return [entry for entry, kinds in named.items() if split in kinds or split == "train" and not any(named.values())]


def read_dataset(name, split, flag, config=None):
    """A local file, folder of files or hub data set as a list of dicts. What is local never touches the network or a cache."""
    path, where = Path(name), f"{flag} {name}"
    files = [path] if path.is_file() else files_of_split(path, split) if path.is_dir() else []
    if files and config is not None:
        raise BadArgument(f"{flag.replace('_name', '_config')} {config}: {name} is local, and has no configurations")
    if files:
        records = [record for file in files for record in read_file(file, where if file == path else f"{where}/{file.name}")]
        columns = dict.fromkeys(column for record in records for column in record)
        return [columns | record for record in records]
    if path.suffix in READERS and not path.is_dir():
        raise BadArgument(f"{where}: no such file")
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its errors are passed on below, in one line
    try:
        # A folder's files are read anew: the cache would know them by size and time.
        with tempfile.TemporaryDirectory() if path.is_dir() else contextlib.nullcontext() as cache:
            rows = datasets.load_dataset(name, config, split=split, **({"cache_dir": cache} if cache else {}))
            return shorten_floats(rows.features.arrow_schema, list(rows))
    except Exception as error:  # the loaders of `datasets` raise anything; its message is passed on
        reason = str(error.__cause__ or error).strip() or type(error).__name__
        raise BadArgument(f"{where}: {reason.splitlines()[0]}") from error


def problems_digest(problems):
    """{"rows": their number, "sha256": of prompt ids, gold answer and trace ids of each, in order}: did two runs have the same data?"""
    digest = hashlib.sha256()
    for problem in problems:
        digest.update(json.dumps([problem["prompt_ids"], problem["answer"], problem.get("trace_ids"),
                                  *(trace["trace_ids"] for trace in problem.get("other_traces", ()))]).encode() + b"\n")
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
