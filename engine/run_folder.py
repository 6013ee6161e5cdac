"""The folder of a run: args.json, metrics.jsonl, completions/, and what a resumed run takes back."""

import json
import os
import re
import time
import uuid
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from . import ranks
from .checkpoints import read_state
from .data import problems_digest
from .errors import BadArgument
from .files import check_record, git_commit, lock, plain, read_lines, read_record, refuse_used_folder, remove, versions, write_atomically
from .flags import LATEST, absolute, defaults_of_changed
from .models import weights_digest


def open_run(args, script, model, train_problems, eval_problems):
    """Make and lock the run folder and write args.json; returns its Path. A resumed run's records are trimmed to its checkpoint.

    args.json: script, args (the resolved flags), defaults (of those that differ), ranks, versions, git_commit, run_id (drawn once, kept
    by resuming), base_model (`weights_digest` before training) and data (`problems_digest` of training and evaluation problems).
    """
    args.output_dir = ranks.all_gather_list([args.output_dir or ranks.rank() or fresh_folder(args, script)])[0]
    run_dir = Path(args.output_dir)
    data = {"train": problems_digest(train_problems), "eval": problems_digest(eval_problems)}
    at_base = args.resume_from_checkpoint in (None, LATEST)  # otherwise the model has the weights of the checkpoint
    saved = {"run_id": uuid.uuid4().hex, "base_model": weights_digest(model) if at_base else None, "data": data}
    if ranks.rank() == 0:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadArgument(f"--output_dir {run_dir}: {error.strerror}") from error
        lock(run_dir)
        if args.resume_from_checkpoint:
            for rest in run_dir.glob(".*.tmp"):  # of a kill in the middle of a save
                remove(rest)
            resumed = args.resume_from_checkpoint
            rewind(run_dir, -1 if resumed == LATEST else read_state(Path(resumed))["step"], args.logging_steps)
        else:
            refuse_used_folder(run_dir)  # again: another process may have come first since the flags were checked
        if (run_dir / "args.json").is_file():  # runs begun before these records existed go on without them
            saved |= read_record(run_dir / "args.json", {})
            check_record(saved, {"run_id": "a text", "data": {"train": {}}}, run_dir / "args.json")
        if saved["data"]["train"] != data["train"]:
            print(f"the training rows are not those that {run_dir} was trained on so far")
        flags = absolute(plain(asdict(args) | {"resume_from_checkpoint": None}))
        record = {"script": Path(script).name, "args": flags, "defaults": plain(defaults_of_changed(args)),
                  "ranks": ranks.world_size(), "versions": versions(), "git_commit": git_commit(), "run_id": saved["run_id"],
                  "base_model": saved["base_model"], "data": data}
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
    for file in run_dir.glob("completions/step-*.jsonl"):
        step = re.fullmatch(r"step-(\d+)\.jsonl", file.name)
        if step and int(step[1]) > last_step:
            file.unlink()
