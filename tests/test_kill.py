"""Does a run that is killed again and again, at any moment, end bit-equal to one that never was?

    python tests/test_kill.py [--kills 20] [--ranks 2 [--parallel fsdp]]      every script killed that often at random moments

The suite has a short version. The runs are processes of their own, forked from one that has imported everything, so that a kill costs no
start-up; nobody is asked and nothing cleaned up: SIGKILL. Of several ranks one is killed, and the others soon after, as by torchrun.
"""

import argparse
import contextlib
import importlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ("grpo", "repo", "luffy", "prefixrl", "sft")
FLAGS = ("--task diary --prompts_per_step 2 --num_hard 4 --num_easy 4 --eval_problems 1 --eval_steps 4 --save_steps 1 --learning_rate 1e-3 "
         "--save_completions_steps 1 --max_completion_length 64").split()
CLOCKS = ("step_time", "time/rollout", "time/update")


def serve():
    """The process that forks: a line [script, flags, folder, ranks] in; out the process of each rank, and, when all have ended, their
    statuses."""
    modules = {name: importlib.import_module(name) for name in (
        *SCRIPTS, "engine", "torch", "torch._dynamo", "matplotlib.pyplot", "transformers.conversion_mapping", "transformers.generation",
        "transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto", "transformers.tokenization_utils_tokenizers")}
    engine, torch = modules["engine"], modules["torch"]
    torch.set_num_threads(1)
    for line in sys.stdin:
        script, flags, folder, ranks = json.loads(line)
        children, port = [], free_port()
        for rank in range(ranks):
            children.append(os.fork())
            if children[-1] == 0:
                if ranks > 1:
                    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost",
                                   "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "kill"}  # what torchrun gives
                os.chdir(folder)
                for number, name in ((1, "out.txt"), (2, "err.txt")):
                    os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
                sys.argv = [f"{script}.py", *flags]
                code = 1
                try:
                    engine.launch(modules[script].main)
                    code = 0
                except SystemExit as stop:
                    code = stop.code
                finally:
                    sys.stdout.flush()
                    os._exit(code)
        print(json.dumps(children), flush=True)
        print(json.dumps([os.waitpid(child, 0)[1] for child in children]), flush=True)


def free_port():
    """A port that nobody listens on at the moment."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


class Server:
    """A forking process, and runs of it in a folder, by one rank or more."""

    def __init__(self, folder, ranks=1, parallel="ddp"):
        self.folder, self.ranks, self.parallel = Path(folder), ranks, parallel
        self.process = subprocess.Popen([sys.executable, __file__, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})

    def start(self, script, output_dir, *more):
        """Start a run that goes on with what is there; returns the process of each rank."""
        flags = [*FLAGS, *(() if script == "sft" else ("--num_generations", "4")), "--parallel", self.parallel, *more]
        flags += ["--output_dir", output_dir, "--resume_from_checkpoint"]
        self.process.stdin.write(json.dumps([script, flags, str(self.folder), self.ranks]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def end(self):
        """Wait for the run; 0, or the exit code of a rank that failed, or minus the signal that ended one."""
        return min(map(os.waitstatus_to_exitcode, json.loads(self.process.stdout.readline())), key=lambda code: (code >= 0, code == 0))

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


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


def kill_at_random(server, script, run_dir, rng, how, steps):
    """Go on with the run and kill it: "start", within a second; "step", within half a second of the end of one of the next steps;
    "save", within 30 ms of the beginning of a save. Returns what was seen of it; its exit code is 0 when it was faster."""
    goal = steps_saved(run_dir) + rng.choice((0, 1, 1, 2) if how == "step" else (1, 2))
    begun = left(run_dir)
    reached = {"start": lambda: True, "step": lambda: steps_saved(run_dir) >= goal and (run_dir / "metrics.jsonl").exists(),
               "save": lambda: steps_saved(run_dir, ".checkpoint-*.tmp") >= goal and not left(run_dir) & begun}[how]
    pids = server.start(script, run_dir.name, "--max_steps", str(steps))
    while not reached() and not (run_dir / "curve.png").exists():
        time.sleep(0.0005)
    time.sleep(rng.random() * {"start": 1.0, "step": 0.5, "save": 0.03}[how])
    for pid in rng.sample(pids, len(pids)):
        with contextlib.suppress(ProcessLookupError):  # a rank that has ended because another one died
            os.kill(pid, signal.SIGKILL)
        time.sleep(rng.random() * 0.5 * (len(pids) > 1))
    seen = {"exit": server.end(), "how": how, "step": steps_saved(run_dir)}
    return seen | {"half a checkpoint": bool(left(run_dir) - begun)}


def check_script(server, script, hows, steps, seed=0):
    """Kill a run once for each of `hows`, let it end, and compare it with one that was never killed. Returns what was seen."""
    whole, cut = server.folder / f"{script}-whole", server.folder / f"{script}-cut"
    server.start(script, whole.name, "--max_steps", str(steps))
    assert server.end() == 0, (server.folder / "err.txt").read_text()
    rng, seen = random.Random(f"{script}/{seed}"), []
    for how in hows:
        seen.append(kill_at_random(server, script, cut, rng, how, steps))
    server.start(script, cut.name, "--max_steps", str(steps))
    assert server.end() == 0, (server.folder / "err.txt").read_text()
    names, metrics, same = what_is_left(cut)
    expected_names, expected_metrics, expected = what_is_left(whole)
    assert metrics == expected_metrics
    assert [record["step"] for record in metrics] == list(range(steps + 1))
    assert names == expected_names  # nothing half-written, doubled or forgotten
    assert [name for name in expected if same[name] != expected[name]] == []
    return seen


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("kill"))
    yield server
    server.close()


@pytest.mark.parametrize("script, hows", [("grpo", ["save", "step"]), ("repo", ["step"]), ("luffy", ["save"]), ("prefixrl", ["step"]),
                                          ("sft", ["save"])])
def test_killed_at_random_moments_it_ends_bit_equal(server, script, hows):
    seen = check_script(server, script, hows, steps=4)
    assert [fate["exit"] for fate in seen] == [-signal.SIGKILL] * len(hows), seen  # the run was not too short to be killed


def test_killed_on_two_ranks_it_ends_bit_equal(tmp_path):
    server = Server(tmp_path, ranks=2)
    seen = check_script(server, "repo", ["save", "step"], steps=4)
    assert [fate["exit"] for fate in seen] == [-signal.SIGKILL] * 2, seen
    server.close()


def test_metrics_can_be_read_while_the_run_goes_on(server):
    """Every complete line parses, and there is one for a step before the next is done."""
    run_dir = server.folder / "read"
    (pid,) = server.start("grpo", run_dir.name, "--max_steps", "1000", "--save_steps", "0")
    while not (run_dir / "metrics.jsonl").exists() or (run_dir / "metrics.jsonl").read_bytes().count(b"\n") < 4:
        time.sleep(0.01)
    assert [record["step"] for record in records(run_dir)][:4] == [0, 1, 2, 3]
    os.kill(pid, signal.SIGKILL)
    assert server.end() == -signal.SIGKILL


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve()
    with tempfile.TemporaryDirectory() as folder:
        server = Server(folder, args.ranks, args.parallel)
        for script in SCRIPTS:
            began = time.monotonic()
            hows = random.Random(f"{script}/{args.seed}").choices(("start", "step", "save"), (1, 2, 2), k=args.kills)
            seen = check_script(server, script, hows, args.kills + 4, args.seed)
            killed = [fate for fate in seen if fate["exit"] == -signal.SIGKILL]
            print(f"{script}: bit-equal after {len(killed)} kills, with checkpoints {[fate['step'] for fate in killed]}; "
                  f"{sum(fate['half a checkpoint'] for fate in killed)} kills left half a checkpoint; {time.monotonic() - began:.0f} s",
                  flush=True)
        server.close()


if __name__ == "__main__":
    main()
