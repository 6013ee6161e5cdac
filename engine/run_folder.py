"""The folder of a run: args.json, metrics.jsonl, completions/, and what a resumed run takes back."""

import json
import os
import time
import uuid
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from . import ranks
from .data import problems_digest
from .errors import BadArgument, naming, printable
from .files import git_commit, lock, plain, read_lines, read_record, refuse_used_folder, remove, versions, write_atomically
from .flags import absolute, defaults_of_changed
from .rollouts import rollout_files


def open_run(args, script, base, train_problems, eval_problems, start=0):
    """Make and lock the run folder and write args.json; returns its Path. A resumed run's records are trimmed to its checkpoint.

    base: `weights_digest` of the model as it was loaded. start: the step of that checkpoint; 0 without one.
    args.json: script, args (the resolved flags), defaults (of those that differ), ranks, versions, git_commit, run_id (drawn once, kept
    by resuming), base_model (the base of the first start) and data (`problems_digest` of training and evaluation problems).
    Raises BadArgument for another base than the run began with, if training reads the base (`keeps_initial_weights`).
    """
    args.output_dir = ranks.all_gather_list([args.output_dir or ranks.rank() or fresh_folder(args, script)])[0]
    run_dir = Path(args.output_dir)
    data = {"train": problems_digest(train_problems), "eval": problems_digest(eval_problems)}
    saved = {"run_id": uuid.uuid4().hex, "base_model": base, "data": data}
    if ranks.rank() == 0:
        with naming(f"--output_dir {run_dir}"):
            run_dir.mkdir(parents=True, exist_ok=True)
        lock(run_dir)
        if args.resume_from_checkpoint:
            for rest in run_dir.glob(".*.tmp"):  # of a kill in the middle of a save
                remove(rest)
            rewind(run_dir, start or -1, args.logging_steps)
        else:
            refuse_used_folder(run_dir)  # again: another process may have come first since the flags were checked
        begun = {}
        if (run_dir / "args.json").is_file():
            begun = read_record(run_dir / "args.json", {"run_id": "a text", "data": {"train": {}}})
            saved = {name: begun.get(name) for name in saved}
        if saved["base_model"] not in (None, base):
            words = f"--model_name_or_path {args.model_name_or_path}: its weights are not those that {run_dir} began with"
            if args.keeps_initial_weights:
                raise BadArgument(f"{words}, and training reads them, too")
            print(f"{words}; those of the checkpoint go on")
        for part, words in (("train", "training"), ("eval", "evaluation")):
            if saved["data"].get(part) not in (None, data[part]):
                print(f"the {words} rows are not those that {run_dir} has had so far")
        now = versions() | {"ranks": ranks.world_size()}
        known = begun.get("versions")
        before = now | (known if isinstance(known, dict) else {}) | {"ranks": begun.get("ranks", now["ranks"])}
        if changed := [f"{name} {before[name]} -> {value}" for name, value in now.items() if before[name] != value]:
            print(printable(f"{run_dir} goes on with other versions or ranks, so with other bits: {', '.join(changed)}"))
        flags = absolute(plain(asdict(args) | {"resume_from_checkpoint": None}))
        record = {"script": Path(script).name, "args": flags, "defaults": plain(defaults_of_changed(args)),
                  "ranks": ranks.world_size(), "versions": versions(), "git_commit": git_commit()} | saved | {"data": data}
        write_atomically(run_dir / "args.json", json.dumps(record, indent=2, allow_nan=False) + "\n")
    ranks.wait()
    return run_dir


def fresh_folder(args, script):
    """Make a folder under runs/, named after script, data and time. Of two runs that begin at once one makes it, the other the next."""
    data = args.task if args.dataset_name is None else Path(args.dataset_name).stem
    name = f"{Path(script).stem}-{data}-{time.strftime('%Y%m%d-%H%M%S')}"
    for suffix in ("", *(f"-{number}" for number in range(2, 100))):
        with suppress(FileExistsError):
            os.makedirs(f"runs/{name}{suffix}")
            return f"runs/{name}{suffix}"
    raise BadArgument(f"--output_dir: runs/{name} and 98 more exist already")


def read_metrics(run_dir):
    """The records of metrics.jsonl."""
    return read_lines(Path(run_dir) / "metrics.jsonl", {"step": "a whole number", str: "a number or null"})


def rewind(run_dir, last_step, logging_steps=1):
    """Drop records and completions of steps after `last_step`, which a resumed run writes again; say when earlier ones are not whole."""
    records = read_metrics(run_dir)
    kept = [record for record in records if record["step"] <= last_step]
    steps = [record["step"] for record in kept]
    if last_step >= logging_steps and (steps != sorted(set(steps)) or not steps or steps[-1] <= last_step - logging_steps):
        print(f"{run_dir / 'metrics.jsonl'}: records up to step {last_step} are missing or doubled")
    if records:
        write_atomically(run_dir / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in kept))
    for step, file in rollout_files(run_dir):
        if step > last_step:
            file.unlink()
