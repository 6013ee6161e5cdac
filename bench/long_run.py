"""Does a long run grow? 2000 steps of the built-in task: resident memory and open files by step, written to results/long_run.{json,md}.

    python bench/long_run.py [--steps 2000]

Logging, completions, checkpoints and evaluations are on, as in a real run. The slope is that of a least-squares line over the last
half of the run; the first half is left out because allocators and caches still fill.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
FLAGS = ("--task diary --prompts_per_step 2 --num_generations 2 --num_hard 4 --num_easy 4 --max_completion_length 16 --eval_steps 100 "
         "--eval_problems 1 --save_steps 100 --save_completions_steps 50").split()


def slope(points):
    """Least-squares slope of (x, y) points."""
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points))
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


def observe(process, path):
    """[(step, resident KB, open files)] of a running process, about once in 20 steps, by the last line of its metrics.jsonl."""
    seen, page = [], os.sysconf("SC_PAGE_SIZE") // 1024
    while process.poll() is None:
        time.sleep(0.1)
        step = path.read_bytes().count(b"\n") - 1 if path.exists() else -1
        try:
            resident = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * page
            files = len(os.listdir(f"/proc/{process.pid}/fd"))
        except OSError:  # it has ended in between
            break
        if step >= 1 and (not seen or step >= seen[-1][0] + 20):
            seen.append((step, resident, files))
    return seen


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    steps = parser.parse_args().steps
    words = ["grpo.py", *FLAGS, "--max_steps", str(steps)]
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        process = subprocess.Popen([sys.executable, ROOT / words[0], *words[1:], "--output_dir", f"{folder}/run"],
                                   env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
        seen = observe(process, Path(folder) / "run" / "metrics.jsonl")
        seconds = time.monotonic() - began
    if process.returncode:
        sys.exit(f"{' '.join(words)} failed")
    half = [(step, resident) for step, resident, _ in seen if step >= steps // 2]
    files = [count for step, _, count in seen if step >= 100]
    record = {"command": " ".join(["python", *words]), "steps": steps, "seconds": round(seconds),
              "resident_mb_at_half": round(half[0][1] / 1024), "resident_mb_at_end": round(half[-1][1] / 1024),
              "slope_kb_per_100_steps": round(100 * slope(half), 1), "open_files": [min(files), max(files)],
              "seen": [dict(zip(("step", "resident_kb", "open_files"), row)) for row in seen]}
    (RESULTS / "long_run.json").write_text(json.dumps(record, indent=1) + "\n")
    (RESULTS / "long_run.md").write_text(
        f"`{record['command']}`, {record['seconds']} s on one thread (`python bench/long_run.py`)\n\n"
        "| steps | resident at half, MB | at the end, MB | slope over the last half, KB per 100 steps | open files after step 100 |\n"
        "|---|---|---|---|---|\n"
        f"| {steps} | {record['resident_mb_at_half']} | {record['resident_mb_at_end']} | {record['slope_kb_per_100_steps']} "
        f"| {min(files)} to {max(files)} |\n")
    print((RESULTS / "long_run.md").read_text())


if __name__ == "__main__":
    main()
