"""Runs a training script as a process of its own, measures its time and memory, and keeps its records, for the benches."""

import ast
import gzip
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def machine():
    """Processor and cores of this machine."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")] or [platform.processor()]
    cores = len(os.sched_getaffinity(0))
    return f"{names[0]}, {cores} core{'s' * (cores > 1)}"


def code_version():
    """sha256 of the syntax trees of the scripts, common.py and engine/; comments, docstrings and layout do not count."""
    digest = hashlib.sha256()
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("engine/**/*.py")]):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
                del node.body[0]
        digest.update(f"{path.relative_to(ROOT)}\n{ast.dump(tree)}\n".encode())
    return digest.hexdigest()


def call(words, output, quiet=False):
    """Run the command `words` in the repository and return (seconds, peak MB), which the operating system measures.

    What the command prints goes to `output`; with `quiet` its progress goes to a file beside it. Exits when the command fails.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    progress = output.with_suffix(".err")
    began = time.perf_counter()
    with open(output, "w") as printed, open(progress if quiet else os.devnull, "w") as errors:
        process = subprocess.Popen([sys.executable, *words[1:]], cwd=ROOT, stdout=printed, stderr=errors if quiet else None)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{shlex.join(words)} failed" + (f": {progress.read_text()[-2000:]}" if quiet else ""))
    return round(time.perf_counter() - began, 1), round(usage.ru_maxrss / 1024)


def run(words, run_dir, folder, quiet=False):
    """Run the command `words` with --output_dir run_dir, a path in the repository, unless `folder` has a finished run already.

    `folder` gets metrics.jsonl.gz, args.json, the printed output (output.txt) and measured.json: the command, machine, code, wall time and
    peak resident memory. Files of an unfinished run in `run_dir` are removed. Exits when the command fails.
    """
    if folder.exists():
        return
    shutil.rmtree(ROOT / run_dir, ignore_errors=True)
    output, code = ROOT / f"{run_dir}.out", code_version()
    seconds, peak_memory_mb = call([*words, "--output_dir", str(run_dir)], output, quiet)
    measured = {"command": shlex.join(words), "machine": machine(), "code": code, "seconds": seconds, "peak_memory_mb": peak_memory_mb}
    unfinished = folder.parent / f".{folder.name}.tmp"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    (unfinished / "metrics.jsonl.gz").write_bytes(gzip.compress((ROOT / run_dir / "metrics.jsonl").read_bytes(), mtime=0))
    (unfinished / "args.json").write_text((ROOT / run_dir / "args.json").read_text().replace(f"{ROOT}/", ""))  # as on any machine
    shutil.copy(output, unfinished / "output.txt")
    (unfinished / "measured.json").write_text(json.dumps(measured, indent=1) + "\n")
    unfinished.rename(folder)


def load(folder):
    """(metrics records, measurement) of a finished run."""
    lines = gzip.decompress((folder / "metrics.jsonl.gz").read_bytes()).decode().splitlines()
    return [json.loads(line) for line in lines], json.loads((folder / "measured.json").read_text())
