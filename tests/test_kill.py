"""Does a run that is killed again and again, at any moment, end bit-equal to one that never was?

    python tests/test_kill.py [--kills 20] [--ranks 2 [--parallel fsdp]]      every script killed that often at random moments

The suite has a short version. Nobody is asked and nothing cleaned up: SIGKILL. Of several ranks one is killed, and the others soon after,
as by torchrun.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import tempfile
import time
from pathlib import Path

import pytest

import processes

SCRIPTS = ("grpo", "repo", "luffy", "prefixrl", "sft")
FLAGS = ("--task diary --prompts_per_step 2 --num_hard 2 --num_easy 6 --eval_problems 1 --eval_steps 4 --save_steps 1 --learning_rate 1e-3 "
         "--save_completions_steps 1 --max_completion_length 20 --temperature 1.5").split()
CLOCKS = ("step_time", "time/rollout", "time/update")


class Runs:
    """Runs in a folder, by one process or by ranks."""

    def __init__(self, folder, ranks=0, parallel="ddp"):
        self.folder, self.ranks, self.parallel = Path(folder), ranks, parallel

    def start(self, script, output_dir, *more):
        """Start a run that goes on with what is there; returns it."""
        flags = [*FLAGS, *(() if script == "sft" else ("--num_generations", "4")), "--parallel", self.parallel, *more]
        return processes.start(f"{script}.py", *flags, "--output_dir", output_dir, "--resume_from_checkpoint", cwd=self.folder,
                               ranks=self.ranks)

    def finish(self, script, output_dir, steps):
        """Go on with a run to its end."""
        run = self.start(script, output_dir, "--max_steps", str(steps))
        assert run.wait() == 0, run.stderr


def records(run_dir):
    """metrics.jsonl without the clocks."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in CLOCKS} for line in lines]


def what_is_left(run_dir):
    """All that must be equal: metrics without clocks, and the bytes of completions, weights, optimizer and of every other file's name."""
    files = {str(path.relative_to(run_dir)): path for path in run_dir.rglob("*") if path.is_file()}
    same = {name: path.read_bytes() for name, path in files.items() if path.suffix in (".safetensors", ".pt") or "step-" in name}
    return sorted(files), records(run_dir), same


def steps_saved(run_dir, names="checkpoint-*"):
    """The last step that has a checkpoint, or whose checkpoint is being written; 0 when there is none."""
    return max((int(path.name.split("-")[1].split(".")[0]) for path in run_dir.glob(names)), default=0)


def left(run_dir):
    """The inodes of half-written checkpoints."""
    return {entry.inode() for entry in os.scandir(run_dir) if entry.name.startswith(".checkpoint-")} if run_dir.exists() else set()


def kill_at_random(runs, script, run_dir, rng, how, steps):
    """Go on with the run and kill it: "start", within a second; "step", within half a second of the end of one of the next steps;
    "save", within 30 ms of the beginning of a save. Returns what was seen of it; its exit code is 0 when it was faster."""
    goal = steps_saved(run_dir) + rng.choice((0, 1, 1, 2) if how == "step" else (1, 2))
    begun = left(run_dir)
    reached = {"start": lambda: True, "step": lambda: steps_saved(run_dir) >= goal and (run_dir / "metrics.jsonl").exists(),
               "save": lambda: steps_saved(run_dir, ".checkpoint-*.tmp") >= goal and not left(run_dir) & begun}[how]
    run = runs.start(script, run_dir.name, "--max_steps", str(steps))
    while not reached() and not (run_dir / "model.safetensors").exists():
        time.sleep(0.002)
    time.sleep(rng.random() * {"start": 1.0, "step": 0.5, "save": 0.03}[how])
    for pid in rng.sample(run.pids, len(run.pids)):
        with contextlib.suppress(ProcessLookupError):  # a rank that has ended because another one died
            os.kill(pid, signal.SIGKILL)
        time.sleep(rng.random() * 0.5 * (len(run.pids) > 1))
    seen = {"exit": run.wait(), "how": how, "step": steps_saved(run_dir)}
    return seen | {"half a checkpoint": bool(left(run_dir) - begun)}


def check_script(runs, script, hows, steps, seed=0):
    """Kill a run once for each of `hows`, let it end, and compare it with one that was never killed. Returns what was seen."""
    whole, cut = runs.folder / f"{script}-whole", runs.folder / f"{script}-cut"
    runs.finish(script, whole.name, steps)
    rng, seen = random.Random(f"{script}/{seed}"), []
    for how in hows:
        seen.append(kill_at_random(runs, script, cut, rng, how, steps))
    runs.finish(script, cut.name, steps)
    names, metrics, same = what_is_left(cut)
    expected_names, expected_metrics, expected = what_is_left(whole)
    assert metrics == expected_metrics
    assert [record["step"] for record in metrics] == list(range(steps + 1))
    assert names == expected_names  # nothing half-written, doubled or forgotten
    assert [name for name in expected if same[name] != expected[name]] == []
    return seen


@pytest.mark.parametrize("script, hows", [("grpo", ["save", "step"]), ("repo", ["step"]), ("luffy", ["save"]), ("prefixrl", ["step"]),
                                          ("sft", ["save"])])
def test_killed_at_random_moments_it_ends_bit_equal(tmp_path, script, hows):
    seen = check_script(Runs(tmp_path), script, hows, steps=8)
    assert [fate["exit"] for fate in seen] == [-signal.SIGKILL] * len(hows), seen  # the run was not too short to be killed


def test_killed_on_two_ranks_it_ends_bit_equal(tmp_path):
    seen = check_script(Runs(tmp_path, ranks=2), "repo", ["save", "step"], steps=4)
    assert [fate["exit"] for fate in seen] == [-signal.SIGKILL] * 2, seen


def test_metrics_can_be_read_while_the_run_goes_on(tmp_path):
    """Every complete line parses, and there is one for a step before the next is done."""
    run_dir = tmp_path / "read"
    run = Runs(tmp_path).start("grpo", run_dir.name, "--max_steps", "1000", "--save_steps", "0")
    while not (run_dir / "metrics.jsonl").exists() or (run_dir / "metrics.jsonl").read_bytes().count(b"\n") < 4:
        time.sleep(0.01)
    assert [record["step"] for record in records(run_dir)][:4] == [0, 1, 2, 3]
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=0, help="0: one process without torchrun's variables")
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(folder, args.ranks, args.parallel)
        for script in SCRIPTS:
            began = time.monotonic()
            hows = random.Random(f"{script}/{args.seed}").choices(("start", "step", "save"), (1, 2, 2), k=args.kills)
            seen = check_script(runs, script, hows, args.kills + 4, args.seed)
            killed = [fate for fate in seen if fate["exit"] == -signal.SIGKILL]
            print(f"{script}: bit-equal after {len(killed)} kills, with checkpoints {[fate['step'] for fate in killed]}; "
                  f"{sum(fate['half a checkpoint'] for fate in killed)} kills left half a checkpoint; {time.monotonic() - began:.0f} s",
                  flush=True)


if __name__ == "__main__":
    main()
