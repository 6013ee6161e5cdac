"""Files: written whole or not at all, locked to one process, and with a record of what made them."""

import errno
import fcntl
import hashlib
import json
import math
import os
import platform
import shutil
import stat
import subprocess
import sys
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from safetensors import SafetensorError

from . import ranks
from .errors import BadArgument, RunError, printable


def refuse_used_folder(folder, flag="--output_dir"):
    """Raise BadArgument when a folder holds anything: nothing that exists is ever written over."""
    if folder.exists() and (not folder.is_dir() or any(path.name != LOCK for path in folder.iterdir())):
        hint = f", or go on with --resume_from_checkpoint {folder}" if flag == "--output_dir" else ""
        raise BadArgument(f"{flag} {folder} is in use: choose another{hint}")


def open_own(path, flags=os.O_RDONLY):
    """Open a file of a run folder; returns its descriptor. Raises BadArgument for a link, which may lead out of the folder, or a FIFO."""
    try:
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise BadArgument(f"{path} is a symbolic link: a run's own files are not followed") from error
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise BadArgument(f"{path} is not an ordinary file")
    return handle


def read_own(path):
    """The bytes of a file of a run folder, opened by `open_own`. Raises BadArgument for one that cannot be read."""
    try:
        with open(open_own(path), "rb") as file:
            return file.read()
    except OSError as error:
        raise BadArgument(f"{path}: {error.strerror}") from error


def own_folder(path):
    """Make a folder inside a run folder. Raises BadArgument for a link."""
    if path.is_symlink():
        raise BadArgument(f"{path} is a symbolic link: a run's own folders are not followed")
    path.mkdir(exist_ok=True)
    return path


LOCK = ".lock"


def lock(run_dir):
    """Let no other process write to a run folder until this one ends, however it ends. Raises BadArgument when another one does.

    The lock is a POSIX record lock. It belongs to the process, so it ends with the process even where a child lives on, and taking it
    again does no harm. Closing the file would give the lock up, so the file stays open.
    """
    if ranks.rank():
        return  # rank 0 does it for all
    try:
        handle = open_own(run_dir / LOCK, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise BadArgument(f"--output_dir {run_dir}: {error.strerror}") from error
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            print(f"{run_dir} cannot be locked ({error.strerror}): see to it that no other process uses it")
            return
        owner = printable(os.read(handle, 100).decode(errors="replace")) or "another process"
        raise BadArgument(f"--output_dir {run_dir} is in use by {owner}") from error
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"process {os.getpid()} on {platform.node()}".encode(), 0)


@contextmanager
def writing(path, beside=None, hint=""):
    """Turn a failure to write `path`, such as a full disk, into a RunError; remove what was written `beside` it."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        cause = error.__context__ if isinstance(error, RuntimeError) else error  # torch.save says in its own words that a write failed
        if not isinstance(cause, (OSError, SafetensorError)):
            raise
        if beside is not None and beside.is_dir():
            remove_tree(beside)
        elif beside is not None:
            beside.unlink(missing_ok=True)
        raise RunError(f"cannot write {path}: {getattr(cause, 'strerror', None) or str(cause).splitlines()[0]}{hint}") from error


def sync(*paths):
    """Force files or folders to the disk: a file that is renamed after its sync is whole even after a loss of power."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_atomically(path, text):
    """Write beside and rename, on rank 0, so that a reader never sees half a file."""
    if ranks.rank():
        return
    beside = path.with_name(f".{path.name}.tmp")
    with writing(path, beside):
        beside.write_text(text)
        sync(beside)
        os.replace(beside, path)


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


def remove_tree(path):
    """Remove a folder, or the link to a folder that was moved elsewhere."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def remove_folder(folder):
    """Remove a checkpoint under another name first: a kill half-way leaves no torn one."""
    if folder.exists() or folder.is_symlink():
        aside = folder.with_name(f".{folder.name}.old.tmp")
        remove_tree(aside)
        os.replace(folder, aside)
        remove_tree(aside)


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
