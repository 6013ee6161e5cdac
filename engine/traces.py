"""Off-policy solutions ("traces"), from their file to the row of tokens that is trained."""

import itertools
import math
import re
from collections import Counter
from dataclasses import dataclass

from . import tasks
from .data import TRACE_COLUMNS, listed, question, read_dataset, read_gold, read_prompt, read_trace
from .errors import BadArgument
from .grading import agree, grade_completions
from .prompts import THINKING, after_tag, closed_thinking, end_of_turn, opened_tag, stop_ids


def traces_file(args):
    """Path of the trace file that a run uses, or None: --traces, or the built-in one of --trace_style self."""
    if getattr(args, "traces", None) is None and getattr(args, "trace_style", None) == "self" and args.dataset_name is None:
        if args.task not in tasks.SELF_TRACES:
            raise BadArgument(f"--trace_style self: the base never solves hard problems of --task {args.task}; take teacher or own")
        return str(tasks.SELF_TRACES[args.task])
    return getattr(args, "traces", None)


def read_traces(file):
    """A file of eval.py --save_traces, or one like it -> {text of the question: its records, with trace, answer and system message}."""
    found, unread = {}, []
    for number, record in enumerate(read_dataset(file, "train", "--traces"), 1):
        if not {"prompt", "trace"} <= record.keys():
            raise BadArgument(f"--traces {file}: needs columns prompt and trace, found {listed(record)}")
        messages, trace = read_prompt(record["prompt"]), read_trace(record["trace"])
        if messages and trace:
            own = {"trace": trace, "answer": read_gold(record.get("answer")), "system": system_of(messages)}
            found.setdefault(question(messages), []).append(record | own)
        else:
            unread.append((number, record["trace" if messages else "prompt"]))
    if unread:
        print(f"--traces: dropped {len(unread)} rows whose prompt or trace is missing or of another type, e.g. row {unread[0][0]}: "
              f"{ascii(unread[0][1])[:60]}")
    return found


def system_of(messages):
    """The system message of a prompt, or None."""
    return messages[0]["content"] if messages[0]["role"] == "system" else None


def find_traces(problems, args):
    """The records of each problem, a list of dicts with trace and perhaps trace_ids and logps; and where they come from.

    They come from --traces FILE, by prompt, or else from the data set's column, or from the built-in task in --trace_style. Where a file
    has a question with several system messages or answers, a problem gets the records with its own. Raises BadArgument for a file of
    which no prompt is a problem.
    """
    file, source = traces_file(args), args.traces or args.dataset_name or f"--trace_style {args.trace_style}"
    if file is None:
        column = "trace" if args.dataset_name is not None else f"{args.trace_style}_trace"
        return [[{"trace": problem[column]}] if problem.get(column) else [] for problem in problems], source
    found, records = read_traces(file), []
    if not found:
        raise BadArgument(f"--traces {file}: expected rows with prompt and trace, found none")
    if not any(problem["prompt"] in found for problem in problems):
        raise BadArgument(f"--traces {file}: none of its {len(found)} prompts is one of the {len(problems)} training prompts: "
                          "it is of another data set")
    for problem in problems:
        own = found.get(problem["prompt"], [])
        for name, value in (("system", system_of(problem.get("prompt_messages", [{"role": "user"}]))), ("answer", problem["answer"])):
            own = [record for record in own if record[name] == value] or own
        records.append(own)
    return records, source


@dataclass
class Row:
    """A trace as it is trained after its prompt."""

    text: str  # what is graded: its ids without their end, decoded in the prompt
    ids: list  # with the id that ends it
    logps: list | None  # of these ids, from the file
    anew: bool  # the file has other ids, which are not used
    cut_off: bool  # the file's ids have no end
    fault: str | None  # why it cannot be trained


def without_end(text, tokenizer):
    """A trace without this tokenizer's special ends behind it, as a sampler that writes special tokens leaves them."""
    marks = [re.escape(tokenizer.decode([index])) for index in stop_ids(tokenizer) if index in tokenizer.all_special_ids]
    return re.sub(rf"(?:\s*(?:{'|'.join(marks)}))+\s*\Z", "", text) if marks else text


def control_ids(tokenizer):
    """Ids that no trace may hold before its end: ends, and special tokens but those of unknown words and tags of thinking."""
    special = {index for index in tokenizer.all_special_ids if not re.search(THINKING, tokenizer.decode([index]), re.IGNORECASE)}
    return {*stop_ids(tokenizer), *(special - {tokenizer.unk_token_id})}  # an unknown word may share its id with EOS, as GPT-2's


def has_structure(ids, control, tokenizer):
    """Does a special token behind a word divide a turn, as those of channels do? Ends, BOS, padding and the like do not."""
    named = {getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad", "sep", "cls", "mask")}
    marks = control - named - {*stop_ids(tokenizer)}
    return not marks.isdisjoint(itertools.dropwhile(control.__contains__, ids))


def trace_row(record, prompt_ids, tokenizer, vocabulary, control, end):
    """A record of a trace file -> the Row of tokens that follows `prompt_ids`. vocabulary: all ids; control: those of `control_ids`.

    The file's ids are kept where this tokenizer reads them as the trace's text, an end comes last, and no special token but a tag of
    thinking stands before it. Otherwise the text is tokenised and given `end`; a tag that the prompt opens stands once, and is closed.
    """
    ids, tag, ends = record.get("trace_ids"), opened_tag(tokenizer, prompt_ids), stop_ids(tokenizer)
    text = without_end(record["trace"], tokenizer)
    known = isinstance(ids, list) and len(ids) > 0 and all(type(index) is int and index in vocabulary for index in ids)
    bare = ids[:-1] if known and ids[-1] in ends else ids  # without its end
    fits = known and not control & set(bare) and tokenizer.decode(bare, skip_special_tokens=True) == text
    ended = fits and len(bare) < len(ids)
    structured = known and not fits and has_structure(bare, control, tokenizer) and tokenizer.decode(bare, skip_special_tokens=True) == text
    kept = ended and (not text.lstrip().startswith(f"<{tag}>") if tag else after_tag(text, tag) == text)
    if not kept:
        bare = tokenizer(after_tag(text, tag), add_special_tokens=False)["input_ids"]
    before, row = (tokenizer.decode(each, skip_special_tokens=True) for each in (prompt_ids, prompt_ids + bare))
    read = row[len(before) :] if row.startswith(before) else tokenizer.decode(bare, skip_special_tokens=True)
    thinks = re.match(rf"\s*<(\w*{THINKING}\w*)>", text, re.IGNORECASE)
    cut_off = record.get("ended") is False or thinks and f"</{thinks[1]}>" not in text  # while thinking
    fault = ("were cut off" if cut_off else "think, where the template has closed thinking" if thinks and closed_thinking(
        tokenizer, prompt_ids) else "hold an end or another special token inside" if control & set(bare) or structured else None)
    return Row(text if read.strip() == text.strip() else read.strip(), ids if kept else bare + [end],
               read_logps(record.get("logps"), len(ids)) if kept else None, ids is not None and not kept,
               fits and not ended, fault)


def read_logps(values, num_tokens):
    """Log-probs of a trace file, or None unless each of its tokens has a number of at most 0, up to rounding."""
    if not isinstance(values, list) or len(values) != num_tokens:
        return None
    sound = all(isinstance(value, (int, float)) and not isinstance(value, bool) and -1e4 <= value <= 1e-4 for value in values)
    return values if sound else None


def encode_traces(problems, tokenizer, args):
    """Add to each problem its off-policy solution: `trace` (str), `trace_ids` (with their end) and `behavior_logps`, or None each.

    `other_traces` are the further ones that can be used, different from each other, with the same three names. `find_traces` says where
    they come from, `trace_row` how they become tokens. This row is graded, and dropped with a printed count unless it grades right or
    --keep_wrong_traces is given, and when it is longer than the flag that args.trace_limit_flag names. Problems without a trace stay: what
    to do with them is the method's. Raises BadArgument when no trace is left.
    """
    records, source = find_traces(problems, args)
    end, longest = end_of_turn(tokenizer, args.template), getattr(args, args.trace_limit_flag) if args.trace_limit_flag else math.inf
    vocabulary, control = set(tokenizer.get_vocab().values()), control_ids(tokenizer)
    work = [(problem, record, trace_row(record, problem["prompt_ids"], tokenizer, vocabulary, control, end))
            for problem, own in zip(problems, records) for record in own]
    enough, graded = getattr(args, "reward_threshold", 1.0), bool(args.reward_fn) or problems[0]["answer"] is not None
    rewards = [enough] * len(work)
    if graded:
        rewards = grade_completions([row.text for *_, row in work], [True] * len(work), [problem for problem, *_ in work],
                                    args.reward_fn or args.reward, ids=[row.ids for *_, row in work])
    traces, used, reasons = {id(problem): [] for problem in problems}, set(), {}
    for (problem, record, row), reward in zip(work, rewards):
        wrong = reward < enough
        faults = [row.fault, "do not grade right" * (wrong and not args.keep_wrong_traces), "were cut off" * (wrong and row.cut_off),
                  f"exceed --{args.trace_limit_flag} {longest}" * (len(row.ids) > longest),
                  "hold words unknown to the tokenizer" * (tokenizer.unk_token_id in row.ids[:-1])]
        if any(faults):
            reasons[id(record)] = next(filter(None, faults))
            continue
        used.add(id(record))
        if row.ids not in [trace["trace_ids"] for trace in traces[id(problem)]]:
            traces[id(problem)].append({"trace": row.text, "trace_ids": row.ids, "behavior_logps": row.logps})
    dropped = Counter(reason for record, reason in reasons.items() if record not in used)
    lost = " and ".join(f"{count} that {reason}" for reason, count in dropped.items())
    if not any(traces.values()):
        wanted = f"it has none; needs a column {' or '.join(TRACE_COLUMNS)}, or give --traces" if not work else ""
        raise BadArgument(f"no trace is left of {source}: {lost.replace(' that ', ' ')}{wanted}")
    num = sum(map(len, traces.values()))
    print(f"traces: {sum(map(bool, traces.values()))} of {len(problems)} problems have one ({source})"
          + (f", {num} in all" if num > sum(map(bool, traces.values())) else "")
          + ("" if graded else "; they are not graded, for want of an answer column"))
    anew = sum(row.anew for *_, row in work)
    bad_logps = sum(record.get("logps") is not None and row.logps is None and not row.anew for _, record, row in work)
    if lost or anew or bad_logps:
        print("traces: " + "; ".join(filter(None, (
            lost and f"dropped {lost}", anew and f"tokenised {anew} anew",
            bad_logps and f"left out the log-probs of {bad_logps}: expected a number of at most 0 for each of trace_ids"))))
    none = {"trace": None, "trace_ids": None, "behavior_logps": None}
    return [problem | (own[0] if own else none) | {"other_traces": own[1:]} for problem, own in ((p, traces[id(p)]) for p in problems)]


def shows_answer(text, answer):
    """Does a solution that is not finished show its answer: a box, or the gold answer after #### or "answer is"?"""
    if re.search(r"\\(?:boxed|fbox)", text):
        return True
    marks = re.finditer(r"####|<answer>|\banswers?(?: is| are)?\b[\s:=*]{0,4}", text, re.IGNORECASE)
    told = (text[mark.end() :][:200].split()[:8] for mark in marks)
    return answer is not None and any(agree(" ".join(words[:num]).strip(".,;:*"), answer, "boxed")
                                      for words in told for num in range(1, len(words) + 1))
