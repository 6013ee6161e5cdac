"""Data: files and hub data sets as rows, prompts and traces as token ids, and the order in which training takes them."""

import functools
import hashlib
import json
import math
import random
import re
from pathlib import Path

import parallel
import tasks
from common import BadArgument, encode_prompt, grade_rows, printable, render_prompt, traces_file
from reward import answer_span, gold_is_sound

PROMPT_COLUMNS, ANSWER_COLUMNS = ("prompt", "problem", "question"), ("answer", "solution", "ground_truth", "reward_model")
TRACE_COLUMNS = ("trace", "target", "completion", "generation")


def load_rows(args, tokenizer):
    """Training and evaluation rows of the built-in --task, or of --dataset_name and --eval_dataset_name.

    Each is a dict with prompt (str), answer, difficulty, prompt_ids and columns. The training rows of a script with --traces also have the
    off-policy solution (see `encode_traces`); evaluation rows never do.
    """
    evaluation = []
    if args.dataset_name is None:
        train = list(tasks.load_task(args.task, "train", {"hard": args.num_hard, "easy": args.num_easy}))
        if args.eval_steps:
            evaluation = list(tasks.load_task(args.task, "eval", dict.fromkeys(tasks.DIFFICULTIES, args.eval_problems)))
    else:
        column = getattr(args, "traces", "") is None  # the traces are the data set's
        train = dataset_rows(args.dataset_name, args.dataset_split, "--dataset_name", args.dataset_config, traces=column)
        if args.eval_steps and args.eval_dataset_name is not None:
            evaluation = dataset_rows(
                args.eval_dataset_name, args.eval_dataset_split, "--eval_dataset_name", args.eval_dataset_config)[: args.eval_problems]
    train = encode_rows(train, tokenizer, args)
    if evaluation:
        names = ("prompt", "answer", "difficulty", "prompt_ids", "columns")
        encoded = encode_rows(evaluation, tokenizer, args, "--eval_dataset_name")
        evaluation = [{name: row[name] for name in names} for row in encoded]
    return encode_traces(train, tokenizer, args) if hasattr(args, "traces") else train, evaluation


def encode_traces(rows, tokenizer, args):
    """Add to each row its off-policy solution: `trace` (str), `trace_ids` (EOS included) and `behavior_logps` of these ids, or None each.

    Traces come from --traces FILE, by prompt, or else from the data set's column, or from the built-in task in --trace_style. Token
    ids are taken from the file when this tokenizer reads them as the trace's text; otherwise the text is tokenised once.
    A trace that does not grade right, unless --keep_wrong_traces, or is longer than --max_completion_length is dropped with a printed
    count. Rows without a trace stay: what to do with them is the method's. Raises BadArgument when no trace is left.
    """
    found, file = {}, traces_file(args)
    source = args.traces or args.dataset_name or f"--trace_style {args.trace_style}"
    if file is not None:
        for record in read_dataset(file, "train", "--traces"):
            if not {"prompt", "trace"} <= record.keys():
                raise BadArgument(f"--traces {file}: needs columns prompt and trace, found {', '.join(record)}")
            messages, trace = read_prompt(record["prompt"]), read_trace(record["trace"])
            if messages and trace:
                found.setdefault(question(messages), record | {"trace": trace})
        if not any(row["prompt"] in found for row in rows):
            raise BadArgument(f"--traces {file}: none of its {len(found)} prompts is one of the {len(rows)} training prompts: "
                              "it is of another data set")
    column = f"{args.trace_style}_trace" if args.dataset_name is None else next((name for name in TRACE_COLUMNS if name in rows[0]), None)
    traced, wrong, too_long, retokenised = [], 0, 0, 0
    records = [found.get(row["prompt"], {}) if file is not None else {"trace": row.get(column)} for row in rows]
    texts = [record.get("trace") for record in records]
    rewards = grade_rows(texts, [text is not None for text in texts], rows, args.reward_fn or args.reward)
    for row, record, reward in zip(rows, records, rewards):
        trace, ids, logps = record.get("trace"), record.get("trace_ids"), record.get("logps")
        if trace is not None and reward != 1.0 and not args.keep_wrong_traces:
            wrong, trace = wrong + 1, None
        if trace is not None and not (ids and ids[-1] == tokenizer.eos_token_id
                                      and tokenizer.decode(ids[:-1], skip_special_tokens=True) == trace):
            retokenised += ids is not None
            ids, logps = tokenizer(trace, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id], None
        if trace is not None and len(ids) > args.max_completion_length:
            too_long, trace = too_long + 1, None
        known = trace is not None
        logps = logps if known and logps and len(logps) == len(ids) else None
        traced.append(row | {"trace": trace, "trace_ids": ids if known else None, "behavior_logps": logps})
    if not any(row["trace"] is not None for row in traced):
        wanted = "" if file or column else f"; needs a column {' or '.join(TRACE_COLUMNS)}, or give --traces"
        raise BadArgument(f"no trace is left of {source}: {wrong} do not grade right, {too_long} exceed --max_completion_length{wanted}")
    print(f"traces: {sum(row['trace'] is not None for row in traced)} of {len(rows)} problems have one ({source})")
    if wrong or too_long or retokenised:
        print(f"traces: dropped {wrong} that do not grade right and {too_long} longer than --max_completion_length "
              f"{args.max_completion_length}; tokenised {retokenised} anew")
    return traced


def read_prompt(value):
    """A prompt as people store it, a string or chat messages -> messages that end with the user's, or None for anything else."""
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not (are_messages(value) and value[-1]["role"] == "user" and value[-1]["content"].strip()):
        return None
    return [{"role": turn["role"], "content": turn["content"]} for turn in value]


def question(messages):
    """The text of a prompt without its system message: what traces are found by, what RePO's prompt quotes, what is logged."""
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

    A number, True or False; a dict with ground_truth (verl's column reward_model); a text with a \boxed{}: the content of the last one;
    a text whose last line holds "#### x" (GSM8K): x without commas; any other text as it stands.
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


def dataset_rows(name, split, flag, config=None, traces=False):
    """A local jsonl, json, csv or parquet file, or a hub data set, as rows with prompt, answer and difficulty ("all" if it has none).

    Columns are read by `read_prompt`, `read_gold` and, with `traces`, `read_trace`. `prompt` is the question's text; where the prompt was
    messages, `prompt_messages` are what is rendered. Rows whose prompt or gold is missing or of another type are dropped with a
    count; traces of another type become None, with a count. Raises BadArgument for a missing column, or when no row is left.
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


def encode_rows(rows, tokenizer, args, flag="--dataset_name"):
    """Add to each row `prompt_ids`, and `columns`, what a --reward_fn is given of it: all but prompt and traces.

    Over-long prompts and gold answers that do not grade right are dropped, with a printed count; --reward_fn does as it likes with gold.
    """
    kept, too_long, bad_gold, share = [], 0, [], parallel.share(len(rows))
    sound = parallel.gather([bool(args.reward_fn) or gold_is_sound(row["answer"], args.reward) for row in rows[share]])
    for row, gold_sound in zip(rows, sound):
        prompt = row.get("prompt_messages", row["prompt"])
        ids = encode_prompt(tokenizer, render_prompt(tokenizer, prompt, args.template, args.system_prompt))
        if len(ids) > args.max_prompt_length:
            too_long += 1
        elif not gold_sound:
            bad_gold.append(row["answer"])
        else:
            hidden = ("prompt", "prompt_messages", "own_trace", "teacher_trace", *TRACE_COLUMNS)
            columns = {name: value for name, value in row.items() if name not in hidden}
            kept.append(row | {"prompt_ids": ids, "columns": columns})
    if too_long:
        print(f"{flag}: dropped {too_long} of {len(rows)} prompts longer than --max_prompt_length {args.max_prompt_length}")
    if bad_gold:
        print(f"{flag}: dropped {len(bad_gold)} of {len(rows)} rows whose gold answer does not grade right as --reward {args.reward}, "
              f"e.g. {printable(bad_gold[0])!r}")
    if not kept:
        raise BadArgument(f"{flag}: no prompt is left of {len(rows)}")
    return kept


def rows_digest(rows):
    """{"rows": their number, "sha256": of prompt ids, gold answer and trace ids of each, in order}: did two runs have the same data?"""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row["prompt_ids"], row["answer"], row.get("trace_ids")]).encode() + b"\n")
    return {"rows": len(rows), "sha256": digest.hexdigest()}


def step_rows(rows, num, seed, step):
    """The `num` rows of one step: consecutive places in an endless stream of epochs, each shuffled by (seed, epoch)."""
    picked = []
    for place in range(step * num, (step + 1) * num):
        epoch, index = divmod(place, len(rows))
        picked.append(rows[epoch_order(len(rows), seed, epoch)[index]])
    return picked


@functools.lru_cache(maxsize=2)
def epoch_order(length, seed, epoch):
    """A permutation of range(length) that depends on (seed, epoch) only; kept, because a step asks for it per row."""
    order = list(range(length))
    random.Random(f"{seed}/{epoch}/order").shuffle(order)
    return order
