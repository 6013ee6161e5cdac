"""The ledger beside a file of traces: what collecting the traces has cost, and with which flags."""

from dataclasses import asdict
from pathlib import Path

from .command_line import known_flags, renamed_flags
from .errors import BadArgument, naming
from .files import claim, git_commit, plain, read_record, versions
from .flags import absolute

PROBLEM = {"prompt": "a text", "tries": "a whole number", "right": "a whole number", "lines": ["a whole number"]}
PRICE = {"flops": "a number", "flops_paper": "a number"}
LEDGER = PRICE | {"args": {}, "waves": "a whole number", "samples": "a whole number", "bytes": "a whole number", "done": "a truth value",
                  "problems": [PROBLEM]}


def flags_record(args):
    """The flags as they are written to files; one data set is its name, not a list of one."""
    flags = plain(asdict(args))
    return flags | ({"dataset_name": args.dataset_name[0]} if len(args.dataset_name or ()) == 1 else {})


def open_ledger(args, script):
    """The ledger of an unfinished --save_traces file, or a new one; claims the file, and makes it, empty, if it is not there.

    Raises BadArgument for a finished file, one without a ledger, one that lost what its ledger counts, or one begun with other flags.
    """
    path = Path(args.save_traces)
    claim(path, "--save_traces")
    ledger_path, size = path.with_suffix(".ledger.json"), path.stat().st_size if path.exists() else 0  # other ranks do not claim
    flags = absolute(flags_record(args))
    if not ledger_path.exists():
        if size:
            raise BadArgument(f"--save_traces {path} exists already, without a {ledger_path.name} to go on from")
        return {"script": Path(script).name, "args": flags, "versions": versions(), "git_commit": git_commit(),
                "source_model": args.model_name_or_path, "waves": 0, "samples": 0, "flops": 0.0, "flops_paper": 0.0, "bytes": 0,
                "done": False, "problems": []}
    ledger = read_record(ledger_path, LEDGER)
    if ledger["done"]:
        raise BadArgument(f"--save_traces {path} is complete: choose another file, or delete it and {ledger_path.name}")
    with naming(f"--save_traces {path}"):
        begun = absolute(known_flags(ledger["args"], renamed_flags(type(args))))
    for name, value in flags.items():
        if name != "save_traces" and value != begun.get(name):
            raise BadArgument(f"--{name} {value}: {path} was begun with {begun.get(name)}; "
                              "give the same flags, or choose another --save_traces")
    if size < ledger["bytes"]:
        raise BadArgument(f"--save_traces {path} has {size} bytes, but {ledger_path.name} counts {ledger['bytes']}")
    return ledger


def traces_flops(path):
    """FLOPs that collecting a trace file has cost: (flops, flops by PrefixRL's rule), from the ledger of eval.py --save_traces.

    0.0, 0.0 when no ledger lies beside the file: traces of unknown price, such as a teacher's.
    """
    ledger = Path(path).with_suffix(".ledger.json")
    if not ledger.exists():
        return 0.0, 0.0
    record = read_record(ledger.resolve(), PRICE)
    return record["flops"], record["flops_paper"]
