"""Mutate the files that a run leaves or that a user is sent, and see that every script works or ends in one line.

    python bench/fuzz.py                                        525 inputs on one core; writes results/fuzz.json
    python bench/fuzz.py --inputs 50 --seed 7 --output x.json

A run with checkpoints, a trace file with the ledger of an unfinished collection, and config files are made once. For each input a copy
is mutated in one or two places: a value takes another type, a huge number or an odd text, or disappears; a file is cut, filled with
bytes, linked elsewhere, or gives way to a folder or a FIFO. A script then works on the copy, in a fork of this process, which has
everything imported. Accepted are exit code 0, and code 1 or 2 with one line of error. Failures are a traceback, more than 10 seconds of
the processor's time, or 30 by the clock (a machine may be shared), a change outside the copy, and code that ran from a file.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import datasets  # noqa: E402, F401
import matplotlib.pyplot  # noqa: E402
import torch  # noqa: E402, F401
import transformers  # noqa: E402, F401

import engine  # noqa: E402
import eval as eval_script  # noqa: E402
import grpo  # noqa: E402
import prefixrl  # noqa: E402
from engine.files import git_commit, versions  # noqa: E402
from engine.models import load_model  # noqa: E402

SECONDS = (10, 30)  # of the processor, by the clock
SIZES = "--num_hard 2 --num_easy 4 --generation_batch_size 64"  # on the command line: huge ones are no fault
SMALL = f"--task diary {SIZES} --max_completion_length 16 --prompts_per_step 2 --num_generations 2 --max_steps 3 " \
        "--eval_steps 2 --eval_problems 1 --save_steps 1 --num_generations_eval 1 --save_completions_steps 1 --num_iterations 1 " \
        "--num_minibatches 1 --micro_batch_tokens 4096"
READ = f"--traces work/t.jsonl {SMALL} --max_completion_length 48 --output_dir work/new --dry_run"
COLLECT = f"--task diary {SIZES} --max_completion_length 48 --num_generations_eval 2 --max_tries 8 --save_traces work/t.jsonl"
USES = {  # a file, and what reads it
    "run/args.json": [(grpo, f"--resume_from_checkpoint work/run {SMALL}"), (grpo, f"work/run/args.json {SMALL} --output_dir work/new")],
    "run/checkpoint-2/state.json": [(grpo, f"--resume_from_checkpoint work/run/checkpoint-2 {SMALL}")],
    "run/metrics.jsonl": [(grpo, f"--resume_from_checkpoint work/run {SMALL}")],
    "t.ledger.json": [(eval_script, COLLECT), (prefixrl, READ)],
    "t.jsonl": [(eval_script, COLLECT), (prefixrl, READ)],
    "c.yaml": [(grpo, "work/c.yaml --dry_run")],
    "c.json": [(grpo, "work/c.json --dry_run")],
}
BESIDE = ["run/.lock", "run/completions", "run/report.html", "run/checkpoint-2", "run/checkpoint-2/optimizer.pt", "run/.metrics.jsonl.tmp",
          "run/checkpoint-2/model.safetensors", "run/checkpoint-3", "run/.checkpoint-3.tmp", "run/.model.tmp", "run/config.json"]
CONFIG = {"task": "diary", "num_hard": 2, "num_easy": 4, "learning_rate": 1e-4, "epsilon_high": "inf", "seed": 3, "template": "none",
          "eval_problems": 2, "drop_zero_variance": False, "system_prompt": None, "loss_type": "grpo"}
VALUES = [None, True, False, [], {}, [1], ["a", "b"], {"a": 1}, [[[[]]]], [None] * 1000, "", " ", "x" * 10_000, "outside/evil.py:f",
          "../outside", "/dev/zero", "/", "\0", "\ud800", "\x1b[2J", "a\nb", "nan", "-inf", "1e999", "9" * 5000, "--max_steps", "\u202e",
          "true", "os", 0, -1, 1, 2.5, -0.0, 1e-320, 1e308, float("inf"), float("nan"), 10**18, 2**63, -(10**18), 10**400]


def places(value, path=()):
    """The paths of all values inside a JSON value, itself included."""
    yield path
    for key, inside in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inside, (*path, key))


def mutate_value(value, rng):
    """Change a JSON value at one place; returns (value, what was done)."""
    *path, last = rng.choice([place for place in places(value) if place] or [(None,)])
    inside, how = value, rng.choice(["set", "set", "set", "delete", "rename"])
    for key in path:
        inside = inside[key]
    if last is None or how == "set" and rng.random() < 0.02:
        return rng.choice(VALUES), "whole"
    old = inside.pop(last) if how != "set" or isinstance(inside, dict) else inside[last]
    if how == "set":
        scaled = isinstance(old, (int, float)) and rng.random() < 0.2
        inside[last] = old * rng.choice([-1, 3, 1e6, 1e15]) if scaled else rng.choice(VALUES)
    elif how == "rename" and isinstance(inside, dict):
        inside[rng.choice(["", "x" * 300, "a\nb", "\0", "reward_fn", "trust_remote_code", f"{last}_"])] = old
    return value, f"{how} {'.'.join(map(str, (*path, last)))}"


def mutate_text(path, rng):
    """Change a value of a file of JSON, of lines of JSON, or of YAML, and write the file again."""
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    place = rng.randrange(len(lines))
    value, what = mutate_value(CONFIG.copy() if path.suffix == ".yaml" else json.loads(lines[place]), rng)
    lines[place] = json.dumps(value)
    if path.suffix == ".yaml" and isinstance(value, dict):
        lines = [f"{key}: {json.dumps(inside)}" for key, inside in value.items()]
    path.write_text("\n".join(lines) + "\n")
    return what


def mutate_file(path, rng):
    """Cut, fill or replace a file, or put something odd where none is."""
    content, how = path.read_bytes() if path.is_file() else b"", rng.choice(
        ["cut", "fill", "flip", "empty", "deep", "double", "linked", "dangling", "loop", "folder", "fifo", "gone"])
    changed = {"cut": lambda: content[: rng.randrange(len(content) + 1)], "empty": lambda: b"", "double": lambda: content * 2,
               "fill": lambda: rng.choice([b"\0", b"\xff\xfe", b"[", b"{}\n", b"\n", b'"', b"1"]) * rng.choice([1, 1000, 10**6]),
               "flip": lambda: bytes(byte ^ (rng.random() < 0.01) << rng.randrange(8) for byte in content[:100_000]),
               "deep": lambda: b'{"a":' * 10**5}
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    if how in changed:
        path.write_bytes(changed[how]())
    elif how == "fifo":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    elif how != "gone":
        path.symlink_to(path if how == "loop" else Path("outside").absolute() / ("precious" if how == "linked" else "new"))
    return how


def run(module, flags):
    """Run a script in a fork of this process; returns (its exit code, negative when it was killed after SECONDS, and what it printed)."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS[0], SECONDS[0]))
        output, code = os.open("printed", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 0
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.argv = [f"{module.__name__}.py", *flags.split()]
        try:
            engine.launch(module.main)
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            traceback.print_exc()
            code = 70
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    end, done = time.monotonic() + SECONDS[1], 0
    while not done and time.monotonic() < end:
        time.sleep(0.005)
        done, status = os.waitpid(pid, os.WNOHANG)
    if not done:
        os.killpg(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
    return os.waitstatus_to_exitcode(status), Path("printed").read_text(errors="replace")


def fault(name, code, printed):
    """What is wrong with an end, or None."""
    lines = [line for line in printed.replace("\r", "\n").splitlines() if line.strip()]
    if "Traceback" in printed:
        return "a traceback"
    if code not in (0, 1, 2):
        return f"exit code {code}" if code > 0 else "killed: too slow"
    if code and not (lines and lines[-1].startswith(f"{name}.py: error: ") and printed.count(f"{name}.py: error: ") == 1):
        return "no line of error"
    return None


def outside():
    """All that lies outside the copy, with its content."""
    files = {str(path): path.read_bytes() if path.is_file() else None for top in ("outside", "pristine") for path in Path(top).rglob("*")}
    return files | {"here": sorted(path.name for path in Path().iterdir())}


def prepare():
    """Make the files that are mutated, in pristine/, and see that every use of them works."""
    Path("outside").mkdir()
    Path("outside/precious").write_text('{"step": 1}\n')
    Path("outside/evil.py").write_text(f"open({str(Path('outside/marker').absolute())!r}, 'w')\n"
                                       "def f(completions, **_):\n    return [0] * len(completions)\n")
    Path("work").mkdir()
    Path("work/c.json").write_text(json.dumps(CONFIG))
    Path("work/c.yaml").write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in CONFIG.items()))
    code, printed = run(grpo, f"{SMALL} --max_steps 2 --output_dir work/run")
    assert code == 0, printed
    code, printed = run(eval_script, COLLECT)
    assert code == 0, printed
    ledger = json.loads(Path("work/t.ledger.json").read_text())
    for problem in ledger["problems"]:  # as a kill leaves them: the last wave is not in the ledger
        problem["tries"] = min(problem["tries"], 6)
    Path("work/t.ledger.json").write_text(json.dumps(ledger | {"done": False}) + "\n")
    Path("work").rename("pristine")
    for file, uses in USES.items():
        for module, flags in uses:
            shutil.copytree("pristine", "work")
            code, printed = run(module, flags)
            assert code == 0, (file, flags, printed)
            shutil.rmtree("work")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=525)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="one input, whose output is shown")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "fuzz.json")
    args = parser.parse_args()
    args.output = args.output.absolute()
    os.chdir(tempfile.mkdtemp())
    load_model("tiny_model")  # what is imported and computed once is so here, not in each child
    matplotlib.pyplot.figure().savefig("picture.png")
    Path("picture.png").unlink()
    prepare()
    began, ends, failures, slowest = time.monotonic(), {}, [], 0.0
    Path("printed").touch()
    before = outside() | {"here": sorted(["outside", "pristine", "printed", "work"])}
    for number in range(args.inputs) if args.only is None else [args.only]:
        rng = random.Random(f"{args.seed}/{number}")
        file = list(USES)[number % len(USES)]
        module, flags = rng.choice(USES[file])
        shutil.copytree("pristine", "work")
        done = []
        for _ in range(rng.choice([1, 1, 2])):
            target = Path("work") / (rng.choice(BESIDE) if file.startswith("run/") and rng.random() < 0.2 else file)
            ordinary = target == Path("work") / file and target.is_file() and not target.is_symlink()
            mutate = mutate_text if ordinary and rng.random() < 0.75 else mutate_file
            try:
                done.append(f"{target}: {mutate(target, rng)}")
            except (OSError, ValueError, RecursionError, IndexError):  # the first mutation has left nothing for the second
                break
        start = time.monotonic()
        code, printed = run(module, flags)
        slowest = max(slowest, time.monotonic() - start)
        wrong = fault(module.__name__, code, printed)
        if outside() != before:
            wrong = "a change outside the copy"
        ends.setdefault(file, Counter())["failed" if wrong else "worked" if code == 0 else "refused in one line"] += 1
        if number % 50 == 49:
            print(f"{number + 1} inputs after {time.monotonic() - began:.0f} s", flush=True)
        if wrong or args.only is not None:
            failures.append({"input": number, "mutations": done, "command": f"{module.__name__}.py {flags}", "wrong": wrong})
            print(json.dumps(failures[-1]), "\n", printed[-3000:])
            if wrong == "a change outside the copy":
                sys.exit("see above")
        shutil.rmtree("work")
    record = {"command": f"python bench/fuzz.py --inputs {args.inputs} --seed {args.seed}", "git_commit": git_commit(),
              "versions": versions(), "seconds": round(time.monotonic() - began, 1), "slowest_seconds": round(slowest, 1),
              "inputs": args.inputs, "ends": ends, "failures": failures}
    print(json.dumps(record, indent=1))
    if args.only is None:
        args.output.write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(bool(failures) and args.only is None)


if __name__ == "__main__":
    main()
