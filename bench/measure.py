"""Run a training script as a process of its own, measure it, and keep its records; shared by methods.py and smollm2.py."""

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
    return f"{names[0]}, {len(os.sched_getaffinity(0))} cores"


def run(words, run_dir, folder):
    """Run the command `words` in the repository with --output_dir run_dir, unless `folder` has a finished run already.

    `folder` gets its metrics.jsonl, args.json, what it printed (output.txt) and measured.json: wall time and peak resident memory as
    the operating system has them. What an unfinished run left in `run_dir` is removed. Exits when the command fails.
    """
    if folder.exists():
        return
    shutil.rmtree(ROOT / run_dir, ignore_errors=True)
    (ROOT / run_dir).parent.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    with open(ROOT / f"{run_dir}.out", "w+") as printed:
        process = subprocess.Popen([sys.executable, *words[1:], "--output_dir", str(run_dir)], cwd=ROOT, stdout=printed)
        _, status, usage = os.wait4(process.pid, 0)
        printed.seek(0)
        output = printed.read()
    if status:
        sys.exit(f"{shlex.join(words)} failed")
    measured = {"command": shlex.join(words), "machine": machine(), "seconds": round(time.perf_counter() - began, 1),
                "peak_memory_mb": round(usage.ru_maxrss / 1024)}
    folder.mkdir(parents=True)
    for file in ("metrics.jsonl", "args.json"):
        shutil.copy(ROOT / run_dir / file, folder / file)
    (folder / "output.txt").write_text(output)
    (folder / "measured.json").write_text(json.dumps(measured, indent=1) + "\n")


def load(folder):
    """(metrics records, measurement) of a finished run."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return records, json.loads((folder / "measured.json").read_text())
