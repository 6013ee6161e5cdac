"""Files: opened without following links, claimed by one process, written whole or not at all, and with a record of what made them."""

import errno
import fcntl
import hashlib
import json
import math
import os
import platform
import re
import reprlib
import shutil
import stat
import subprocess
import sys
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

from safetensors import SafetensorError

from . import ranks
from .errors import BadArgument, RunError, naming

LOCK = ".lock"  # in a run folder
MOST_BYTES = 2**30  # of a file that is read at once
KINDS = {
    "a whole number": lambda value: type(value) is int and 0 <= value < 2**63,
    "a number": lambda value: type(value) in (int, float) and 0 <= value < 1e300,
    "a number or null": lambda value: value is None or type(value) in (int, float) and abs(value) < 1e300,
    "a text": lambda value: isinstance(value, str),
    "a truth value": lambda value: isinstance(value, bool),
}


def open_own(path, flags=os.O_RDONLY):
    """Open a file of a run; returns its descriptor. Raises OSError for a link, which may lead out of the folder, and for a FIFO."""
    handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "is not an ordinary file")
    return handle


def read_own(path, most=MOST_BYTES):
    """The bytes of a file that is no link. Raises OSError for one that cannot be read, ValueError for more than `most` bytes."""
    with open(open_own(path), "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"found more than {most} bytes")
    return content


def check_record(value, kind, where):
    """Raise BadArgument, naming the field, unless a JSON value is of its kind: a key of KINDS, [kind], {field: kind} or {str: kind}."""
    if not (KINDS[kind](value) if isinstance(kind, str) else isinstance(value, type(kind))):
        words = kind if isinstance(kind, str) else f"a {type(kind).__name__}"
        raise BadArgument(f"{where}: expected {words}, got {reprlib.repr(value)}")
    if isinstance(kind, list):
        kind, value = {str: kind[0]}, dict(enumerate(value))
    if isinstance(kind, dict):
        for name in kind | value if str in kind else kind:
            if name is not str:
                check_record(value.get(name), kind.get(name, kind.get(str)), f"{where}: {name}")


def parse_record(content, kind, where):
    """The JSON value in `content`, bytes, if it is of its `kind`. Raises BadArgument that names the field."""
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadArgument(f"{where} cannot be read: it is no JSON") from error
    check_record(record, kind, where)
    return record


def read_record(path, kind):
    """The record in a JSON file of a run."""
    with naming(path):
        content = read_own(path)
    return parse_record(content, kind, path)


def read_lines(path, kind, size=None):
    """The records of a jsonl file of a run, of its first `size` bytes, [] without the file. A last line that a kill has cut is left out."""
    with naming(path):
        lines = read_own(path)[:size].splitlines(keepends=True) if os.path.lexists(path) else []
    return [parse_record(line, kind, f"{path} line {number}") for number, line in enumerate(lines, 1) if line.endswith(b"\n")]


CLAIMED = {}  # absolute path: (descriptor, path as given)


def claim(path, flag, fresh=False):
    """Keep other processes from a file until this one ends, however it ends. The file is made, empty, if it is not there.

    Raises BadArgument when the file is claimed already, when it cannot be written, and, with `fresh`, when it holds anything. Rank 0
    claims for all. The lock is flock's: it ends with its descriptor alone, whatever else this process opens and closes.
    """
    if ranks.rank() or not fresh and path.absolute() in CLAIMED:
        return
    with naming(f"{flag} {path}"):
        handle = open_own(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = f" by {os.read(handle, 100).decode(errors='replace')}" if path.name == LOCK else ""
        os.close(handle)
        raise BadArgument(f"{flag} {path.parent if owner else path} is in use{owner}") from error
    except OSError as error:
        print(f"{path} cannot be locked ({error.strerror}): see to it that no other process uses it")
    CLAIMED[path.absolute()] = handle, path
    if moved(path.absolute()) or fresh and path.stat().st_size:  # moved: a process that has just ended replaced the file, or took it away
        raise BadArgument(f"{flag} {path} exists already")


def moved(path):
    """Is a claimed file no longer at its path?"""
    return not os.path.exists(path) or not os.path.samestat(os.stat(path), os.fstat(CLAIMED[path][0]))


def release(failed):
    """Give up all claims. When the program has failed, files that have stayed empty go."""
    for path, (handle, _) in CLAIMED.items():
        if failed and not moved(path) and not path.stat().st_size:
            path.unlink()
        os.close(handle)
    CLAIMED.clear()


def lock(run_dir):
    """Claim a run folder by its file LOCK, which names the process."""
    claim(run_dir / LOCK, "--output_dir")
    if not ranks.rank():
        with writing(run_dir / LOCK):
            (run_dir / LOCK).write_text(f"process {os.getpid()} on {platform.node()}")


def refuse_used_folder(folder, flag="--output_dir"):
    """Raise BadArgument when a folder holds anything: nothing that exists is ever written over."""
    if folder.exists() and (not folder.is_dir() or any(path.name != LOCK for path in folder.iterdir())):
        hint = f", or go on with --resume_from_checkpoint {folder}" if (folder / "args.json").is_file() else ""
        raise BadArgument(f"{flag} {folder} is " + (f"in use: choose another{hint}" if folder.is_dir() else "a file: expected a folder"))


@contextmanager
def writing(path, beside=None, hint=""):
    """Turn a failure to write `path`, such as a full disk or a run folder that was moved, into a RunError; remove what lies `beside` it."""
    try:
        for claimed in filter(moved, CLAIMED):
            raise RunError(f"cannot write {path}: {CLAIMED[claimed][1]} was moved or deleted")
        yield
    except Exception as error:  # torch.save says in its own words that a write failed, and the tokenizer raises a bare Exception
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, (OSError, SafetensorError)) and not re.search(r"\(os error \d+\)", str(error)):
            raise
        if beside is not None:
            remove(beside)
        raise RunError(f"cannot write {path}: {getattr(cause, 'strerror', None) or str(cause).splitlines()[0]}{hint}") from error


def sync(*paths):
    """Force files or folders to the disk: a file that is renamed after its sync is whole even after a loss of power."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def write_atomically(path, text):
    """Write beside and rename, on rank 0, so that a reader never sees half a file, and a loss of power leaves the old one or the new."""
    if ranks.rank():
        return
    beside = path.with_name(f".{path.name}.tmp")
    with writing(path, beside):
        with open(open_own(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "w") as file:
            file.write(text)
        sync(beside)
        os.replace(beside, path)
        sync(path.parent)


def append_jsonl(path, records):
    """Append one strict JSON object per line, on rank 0. Numbers that are not finite become null; non-ASCII text is escaped."""
    if ranks.rank():
        return
    with writing(path), open(open_own(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "a") as file:
        for record in records:
            record = {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()}
            file.write(json.dumps(record, allow_nan=False) + "\n")


def plain(record):
    """A dict that strict JSON can hold: an infinite flag becomes the string "inf", which argparse reads back, and NaN becomes null."""
    return {name: (None if math.isnan(value) else str(value)) if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in record.items()}


def remove(path):
    """Remove a file, a folder, or a link, whatever is behind it; under another name first: a kill half-way leaves no torn checkpoint."""
    with suppress(OSError):
        path = path.rename(path.with_name(f".{path.name}.old.tmp"))
    with suppress(OSError):
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)


HASHED_BYTES = 2**26  # larger files are known by their size only: reading them takes as long as loading


def digest(path):
    """Size of a file, and the SHA-256 of one of at most HASHED_BYTES, as they stand in state.json."""
    size = path.stat().st_size
    return {"size": size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest() if size <= HASHED_BYTES else None}


def versions():
    """Versions of the packages that decide the numbers of a run."""
    return {"python": sys.version.split()[0]} | {name: version(name) for name in ("torch", "transformers", "datasets", "numpy")}


def git_commit():
    """Commit of the running code, with "+" when code or base model have local changes; None outside a checkout."""
    def git(*words):
        return subprocess.run(["git", *words], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True).stdout.strip()
    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py", "tiny_model")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
