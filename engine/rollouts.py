"""The lines of completions/, written and read: what a step has trained on, with the text and the log-prob of each token."""

import functools
import math
import re
from itertools import groupby

from . import ranks
from .errors import BadArgument
from .files import check_record, read_lines
from .flops import Flops
from .sampling import pad
from .scoring import Rows, compute_logps

MOST_FILE = 200_000_000  # bytes of a file of rollouts that is read
CONTEXT = 4  # tokens before a completion that its first token is decoded behind
LINE = {"prompt": "a text", "completion": "a text", "ended": "a truth value", "reward": "a number or null", "advantage": "a number or null",
        "source": "a text", "prefix": "a text", "trace": "a text", "tokens": ["a text"], "logps": ["a number or null"]}
OLDER = {"ended": True, "source": "rollout", "prefix": "", "trace": "", "tokens": [], "logps": []}  # of what older runs did not write


def token_pieces(tokenizer, ids, before=()):
    """The text that each token of `ids` adds to the text of the tokens before it; "" for all but the last token of one character.

    A token alone has no text of its own: it may be a part of a character, and its space depends on its neighbour.
    """
    ids = [*before, *ids]
    decode = functools.lru_cache(None)(lambda *part: tokenizer.decode(list(part), skip_special_tokens=False))
    pieces, start, done = [], max(0, len(before) - 1), len(before)
    for end in range(done + 1, len(ids) + 1):
        known, text = decode(*ids[start:done]) if done > start else "", decode(*ids[start:end])
        whole = len(text) > len(known) and (end == len(ids) or end - done >= 8 or not text.endswith("\ufffd"))
        pieces.append(text[len(known) :] if whole else "")
        if whole:
            start, done = done, end
    return pieces


def score_tokens(model, tokenizer, samples, args):
    """[{tokens: texts, logps: numbers or None}] of the samples under the model as it is now; all ranks must call it.

    One forward pass more. It draws no random number, and is not charged to the run's ledger of FLOPs.
    """
    scored = [{} for _ in samples]
    padded = pad([sample.problem["prompt_ids"] for sample in samples], [sample.ids for sample in samples], tokenizer, model.device)
    logps = compute_logps(model, Rows(*padded), args, Flops())  # (B, T) float32
    for sample, line, values in zip(samples if ranks.rank() == 0 else (), scored, logps.tolist()):
        line["tokens"] = token_pieces(tokenizer, sample.ids, sample.problem.get("prefix_ids", [])[-CONTEXT:])
        line["logps"] = [round(value, 4) + 0.0 if math.isfinite(value) else None for value in values[: len(sample.ids)]]
    return scored


def rollout_line(sample, advantage, tokens):
    """A sample as a line of completions/. The problem's prefix and, of what retells its trace, the trace stand there, too."""
    line = {"prompt": sample.problem["prompt"], "answer": sample.problem["answer"], "completion": sample.text, "ended": sample.ended,
            "reward": sample.reward, "advantage": advantage, "source": sample.source}
    more = {"prefix": sample.problem.get("prefix")}
    more["trace"] = sample.problem.get("trace") if sample.source not in ("rollout", "trace") else None
    return line | {name: value for name, value in more.items() if value} | tokens


def rollout_files(run_dir):
    """[(step, file of completions/)] of a run, the steps in order."""
    if (run_dir / "completions").is_symlink():
        raise BadArgument(f"{run_dir / 'completions'} is a symbolic link: a run's own folders are not followed")
    files = [(re.fullmatch(r"step-(\d{1,15})\.jsonl", file.name), file) for file in run_dir.glob("completions/step-*.jsonl")]
    return sorted((int(found[1]), file) for found, file in files if found)


def read_rollouts(path):
    """The lines of a file of completions/, with what older runs did not write."""
    if path.lstat().st_size > MOST_FILE:
        raise BadArgument(f"{path} has more than {MOST_FILE} bytes")
    lines = [OLDER | line for line in read_lines(path, {"prompt": "a text"})]
    for place, line in enumerate(lines, 1):
        check_record(line, LINE, f"{path} line {place}")
    return lines


def groups_of(lines, size):
    """The lines of a step by group: those of one prompt, `size` at most; groups that have a signal or a row from elsewhere come first."""
    same = [list(rows) for _, rows in groupby(lines, key=lambda line: (line["prompt"], line["prefix"]))]
    groups = [rows[start : start + size] for rows in same for start in range(0, len(rows), size)]
    return sorted(groups, key=lambda rows: (not any(row["advantage"] for row in rows), all(row["source"] == "rollout" for row in rows)))
