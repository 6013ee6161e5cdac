"""The life of a run: its folder, log, checkpoints, and its end."""

import errno
import fcntl
import hashlib
import json
import math
import os
import pickle
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid
import weakref
from contextlib import contextmanager
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError
from tqdm import tqdm

import parallel
from common import BadArgument, RunError, eos_ids, printable, weights_digest
from data import rows_digest
from reward import RewardError, one_line

LATEST = "latest"  # what a bare --resume_from_checkpoint means
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """SIGINT or SIGTERM ended a run after a step: one line on stderr, exit code 128 + its number."""

    def __init__(self, number, message):
        super().__init__(message)
        self.number = number


def run_main(main):
    """Call `main` and turn its errors into one line and an exit code: 2 bad arguments, 1 run time, 130 Ctrl-C, 143 SIGTERM.

    Under torchrun it is called by every rank; what all of them meet, rank 0 says.
    """
    name, handlers = Path(sys.argv[0]).name, {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        parallel.start()
        main()
        parallel.finish()
    except (BadArgument, RunError, RewardError) as error:  # its words may be a file's
        if parallel.rank() == 0 or not isinstance(error, BadArgument):
            print(f"{name}: error: {printable(str(error))}" + (f" (rank {parallel.rank()})" if parallel.rank() else ""), file=sys.stderr)
        sys.exit(2 if isinstance(error, BadArgument) else 1)
    except Interrupted as error:
        if parallel.rank() == 0:
            print(f"{name}: {error}", file=sys.stderr)
        parallel.finish()  # the ranks have agreed to stop
        sys.exit(128 + error.number)
    except KeyboardInterrupt:  # not in training: RunLog.steps
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------- run folder


def open_run(args, script, model, train_rows, eval_rows):
    """Make and lock the run folder and write args.json; returns its Path. A resumed run's records are trimmed to its checkpoint.

    args.json: script, args (the resolved flags), ranks, versions, git_commit, run_id (drawn once, kept by resuming), base_model
    (`common.weights_digest` before training) and data (`data.rows_digest` of training and evaluation rows).
    """
    args.output_dir = parallel.gather([args.output_dir or fresh_folder(args, script)])[0]
    run_dir, rows = Path(args.output_dir), {"train": rows_digest(train_rows), "eval": rows_digest(eval_rows)}
    at_base = args.resume_from_checkpoint in (None, LATEST)  # otherwise what is loaded now are the checkpoint's weights
    saved = {"run_id": uuid.uuid4().hex, "base_model": weights_digest(model) if at_base else None, "data": rows}
    if parallel.rank() == 0:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadArgument(f"--output_dir {run_dir}: {error.strerror}") from error
        lock(run_dir)
        if args.resume_from_checkpoint:
            for rest in run_dir.glob(".*.tmp"):  # of a kill in the middle of a save
                shutil.rmtree(rest) if rest.is_dir() else rest.unlink()
            resumed = args.resume_from_checkpoint
            rewind(run_dir, -1 if resumed == LATEST else read_state(Path(resumed))["step"])
        else:
            refuse_used_folder(run_dir)  # again: another process may have come first since the flags were checked
        if (run_dir / "args.json").is_file():  # runs begun before there were these records go on without them
            saved |= json.loads((run_dir / "args.json").read_text())
        if saved["data"]["train"] != rows["train"]:
            print(f"the training rows are not those that {run_dir} was trained on so far")
        flags = plain(asdict(args) | {"resume_from_checkpoint": None})
        record = {"script": Path(script).name, "args": flags, "ranks": parallel.world_size(), "versions": versions(),
                  "git_commit": git_commit(), "run_id": saved["run_id"], "base_model": saved["base_model"], "data": rows}
        write_atomically(run_dir / "args.json", json.dumps(record, indent=2, allow_nan=False) + "\n")
    parallel.wait()
    return run_dir


def fresh_folder(args, script):
    """A folder under runs/ that does not exist yet, named after script, data and time."""
    data = args.task if args.dataset_name is None else Path(args.dataset_name).stem
    name = f"{Path(script).stem}-{data}-{time.strftime('%Y%m%d-%H%M%S')}"
    suffixes = [""] + [f"-{n}" for n in range(2, 100)]
    return next(str(path) for path in (Path("runs") / (name + suffix) for suffix in suffixes) if not path.exists())


def refuse_used_folder(folder, flag="--output_dir"):
    """Nothing that exists is ever written over."""
    if folder.exists() and (not folder.is_dir() or any(path.name != LOCK for path in folder.iterdir())):
        hint = f", or go on with --resume_from_checkpoint {folder}" if flag == "--output_dir" else ""
        raise BadArgument(f"{flag} {folder} is in use: choose another{hint}")


LOCK = ".lock"


def lock(run_dir):
    """Let no other process write to a run folder until this one ends, however it ends. Raises BadArgument when another one does.

    A POSIX record lock: of the process, so that it ends with it even where a child lives on, and is taken again without harm; for
    the same reason the file is never closed, which would give it up.
    """
    if parallel.rank():
        return  # rank 0 does it for all
    try:
        handle = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
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


def versions():
    """Versions of what decides the numbers of a run, for its record."""
    return {"python": sys.version.split()[0]} | {name: version(name) for name in ("torch", "transformers", "datasets", "numpy")}


def git_commit():
    """Commit of the code that runs, with "+" when code or base model have local changes; None outside a checkout."""
    def git(*words):
        return subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout.strip()
    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py", "tiny_model")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


@contextmanager
def writing(path, beside=None, hint=""):
    """Turn a failure to write `path`, a full disk say, into a RunError; what was written `beside` it is removed."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        cause = error.__context__ if isinstance(error, RuntimeError) else error  # torch.save says in its own words that a write failed
        if not isinstance(cause, (OSError, SafetensorError)):
            raise
        if beside is not None and beside.is_dir():
            shutil.rmtree(beside)
        elif beside is not None:
            beside.unlink(missing_ok=True)
        raise RunError(f"cannot write {path}: {getattr(cause, 'strerror', None) or str(cause).splitlines()[0]}{hint}") from error


def sync(*paths):
    """Force files or folders to the disk: what is renamed after its sync is whole even after a loss of power."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_atomically(path, text):
    """Write beside and rename, so that a reader never sees half a file; rank 0 does."""
    if parallel.rank():
        return
    beside = path.with_name(f".{path.name}.tmp")
    with writing(path, beside):
        beside.write_text(text)
        sync(beside)
        os.replace(beside, path)


def plain(record):
    """A dict that strict JSON can hold: an infinite flag becomes the string "inf" (argparse reads it back), NaN null."""
    return {name: (None if math.isnan(value) else str(value)) if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in record.items()}


def append_jsonl(path, records):
    """Append one strict JSON object per line and flush, on rank 0.

    What is not finite becomes null, and any text survives: non-ASCII is escaped.
    """
    if parallel.rank():
        return
    with writing(path), open(path, "a") as file:
        for record in records:
            record = {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()}
            file.write(json.dumps(record, allow_nan=False) + "\n")


def read_metrics(run_dir):
    """The records of metrics.jsonl, without a last line that a kill has cut short."""
    path, records = Path(run_dir) / "metrics.jsonl", []
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        if line.endswith("\n"):
            records.append(json.loads(line))
    return records


def rewind(run_dir, last_step):
    """Drop the records and completions of steps after `last_step`: a resumed run writes them again."""
    if (run_dir / "metrics.jsonl").exists():
        kept = [record for record in read_metrics(run_dir) if record["step"] <= last_step]
        write_atomically(run_dir / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in kept))
    for file in run_dir.glob("completions/step-*.jsonl"):
        if int(file.stem.removeprefix("step-")) > last_step:
            file.unlink()


UNREWARDED_STEPS = 20  # in a row, until a warning


def open_reporter(name, run_dir, purge_step=None):
    """Begin, or after resuming go on with, the record of a run in tensorboard, wandb or trackio: two functions (log, close).

    log(values, step) takes what a line of metrics.jsonl holds; close(exit_code) may be called more than once. The run's flags are its
    config, and its run_id keeps it one record. purge_step: the first step that a resumed run writes again. Only tensorboard can take
    back what was logged of it; the others have it twice, or keep the first. Raises RunError, in one line.
    """
    record = json.loads((run_dir / "args.json").read_text())
    flags, run_name, project = record["args"], f"{run_dir.name}-{record['run_id'][:8]}", run_dir.resolve().parent.name
    try:
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            from torch.utils.tensorboard.summary import hparams

            writer = SummaryWriter(run_dir, purge_step=purge_step)
            for summary in hparams(flags, {}):  # not add_hparams, which opens a folder of its own
                writer.file_writer.add_summary(summary)

            def log(values, step):
                for metric, value in values.items():
                    writer.add_scalar(metric, value, step)
                writer.flush()
            return log, lambda exit_code: writer.close()
        if name == "wandb":
            import wandb

            run = wandb.init(project=os.environ.get("WANDB_PROJECT", project), name=run_dir.name, id=record["run_id"], resume="allow",
                             config=flags, dir=run_dir)
            return run.log, lambda exit_code: run.finish(exit_code)
        import trackio

        run = trackio.init(project=project, name=run_name, resume="allow", config=flags)
        return run.log, lambda exit_code: run.finish()
    except Exception as error:  # wandb without a login, say; they raise anything
        raise RunError(f"--report_to {name}: {one_line(error)}") from error


class RunLog:
    """Writes metrics.jsonl, which --report_to is told too, completions/ and, at the end, curve.png and a short table of a run.

    It also ends a run early, when a signal asks for it or numbers go wrong: see `steps` and `watch`.
    """

    def __init__(self, run_dir, args):
        self.run_dir, self.args, self.first, self.last, self.report = run_dir, args, {}, {}, None
        self.stop, self.saved = None, False  # why the run ends early: a signal's number or a RunError; is this step in a checkpoint?
        self.bad_steps = self.unrewarded_steps = 0  # in a row
        records = read_metrics(run_dir)  # of a resumed run
        for metrics in records:
            self.remember(metrics)
        if args.report_to != "none" and parallel.rank() == 0:
            self.report, close = open_reporter(args.report_to, run_dir, records[-1]["step"] + 1 if records else None)
            self.close = weakref.finalize(self, close, 1)  # called when the run dies, however it does, short of a kill

    def remember(self, metrics):
        """Keep the first and the latest evaluation."""
        evaluated = {key: value for key, value in metrics.items() if key.startswith("eval/")}
        self.first, self.last = self.first or evaluated, evaluated or self.last

    def write(self, metrics):
        """Append one line to metrics.jsonl, and report it without its nulls."""
        append_jsonl(self.run_dir / "metrics.jsonl", [metrics])
        if self.report is not None:
            values = {name: metrics[name] for name, value in plain(metrics).items() if value is not None and name != "step"}
            self.report(values, step=metrics["step"])
        self.remember(metrics)

    def steps(self, start):
        """Iterator over the steps to go, from 0. From now on Ctrl-C and SIGTERM wait for a step and its checkpoint; a second one does not.

        A checkpoint is always that of a whole step, never one in the middle of an update. After it Interrupted is raised, or the
        RunError of a run that went wrong.
        """
        def ask(number, _):
            self.stop = self.stop or number
            for each in STOP_SIGNALS:  # the system ends the process, even where Python waits in a kernel
                signal.signal(each, signal.SIG_DFL)
            if parallel.rank() == 0:  # not print, which may be at work below this handler
                os.write(2, b"\nstopping after this step, with a checkpoint; once more: at once, without\n")

        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup, or in the background of a script
                signal.signal(number, ask)

        def until_stopped():
            for step in range(start, self.args.max_steps):
                yield step
                if self.saved and self.stops_on_some_rank():  # a signal may have come during the save
                    raise self.stop if isinstance(self.stop, RunError) else Interrupted(
                        self.stop, f"interrupted after step {step + 1}; go on with: {self.command_to_resume()}")
        return until_stopped()

    def stops_on_some_rank(self):
        """Does the run end early? All ranks agree on it, and on why, at the same places of a step."""
        agreed = next((stop for stop in parallel.gather([self.stop]) if stop is not None), None)
        if agreed is not None:  # or else a signal that came while the ranks gathered stays for the next time
            self.stop = agreed
        return agreed is not None

    def command_to_resume(self):
        """The command that goes on with this run; flags that run code must be given again."""
        many = ["torchrun", f"--nproc_per_node={parallel.world_size()}"]
        words = [*(many if parallel.world_size() > 1 else ["python"]), sys.argv[0], "--resume_from_checkpoint", str(self.run_dir)]
        words += ["--trust_remote_code"] * self.args.trust_remote_code
        return shlex.join(words + (["--reward_fn", self.args.reward_fn] if self.args.reward_fn else []))

    def should_save(self, step):
        """Is a checkpoint due after `step`, from 1? Every --save_steps and then at the end, and when the run of any rank ends early."""
        due = self.args.save_steps and (step % self.args.save_steps == 0 or step == self.args.max_steps)
        self.saved = self.stops_on_some_rank() or bool(due)
        return self.saved

    def step(self, metrics, rows, batch, texts):
        """Log a training step: metrics every --logging_steps and with every evaluation, rollouts every --save_completions_steps."""
        self.watch(metrics, rows, batch, texts)
        step, last = metrics["step"], metrics["step"] == self.args.max_steps
        if last or step % self.args.logging_steps == 0 or any(key.startswith("eval/") for key in metrics):
            self.write(metrics)
        if parallel.rank() == 0 and self.args.save_completions_steps and (last or step % self.args.save_completions_steps == 0):
            path = self.run_dir / "completions" / f"step-{step:06d}.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.unlink(missing_ok=True)  # a resumed run writes its steps again
            repeats = len(texts) // len(rows)
            values = zip(texts, batch.ended.tolist(), batch.rewards.tolist(), batch.advantages.tolist())
            append_jsonl(path, ({"prompt": rows[i // repeats]["prompt"], "answer": rows[i // repeats]["answer"], "completion": text,
                                 "ended": ended, "reward": reward, "advantage": advantage}
                                | ({"prefix": rows[i // repeats]["prefix"]} if rows[i // repeats].get("prefix") else {})
                                for i, (text, ended, reward, advantage) in enumerate(values)))

    def watch(self, metrics, rows, batch, texts):
        """Warn once when nothing is rewarded; after --max_bad_steps bad steps in a row write the last one down and end the run."""
        # LUFFY's reward is also the teacher's; SFT has none.
        self.unrewarded_steps = self.unrewarded_steps + 1 if metrics.get("onpolicy/reward", metrics.get("reward")) == 0 else 0
        if self.unrewarded_steps == UNREWARDED_STEPS:
            cut = metrics["completions/clipped_ratio"]
            tqdm.write(f"warning: the reward was 0 in each of the last {UNREWARDED_STEPS} steps. Likely reasons: "
                       + (f"{cut:.0%} of the completions are cut off (--max_completion_length); " if cut > 0.5 else "")
                       + "the prompt is not rendered as the model expects (--template), the answer is not where --reward looks for it "
                       "(read completions/), or the problems are out of the model's reach (README, FAQ 2)")
        self.bad_steps = self.bad_steps + 1 if metrics["skipped_updates"] else 0
        if self.bad_steps == self.args.max_bad_steps:
            path, repeats = self.run_dir / f"bad_step-{metrics['step']}.pt", len(texts) // len(rows)
            record = {field.name: getattr(batch, field.name) for field in fields(batch)}
            record |= {"step": metrics["step"], "loss": metrics["loss"], "grad_norm": metrics["grad_norm"], "completions": texts,
                       "prompts": [row["prompt"] for row in rows for _ in range(repeats)]}
            if parallel.rank() == 0:
                with writing(path, path), open(path, "wb") as file:
                    torch.save(record, file)
            self.stop = RunError(
                f"the loss or its gradient was not finite in {self.bad_steps} steps in a row (--max_bad_steps): {path} has the batch of "
                f"the last one, for torch.load; checkpoint-{metrics['step']} has the weights, which these steps did not touch")

    def headline(self, metrics):
        """The few numbers of the progress bar."""
        evaluated = {printable(key.removeprefix("eval/")): f"{value:.2f}"
                     for key, value in self.last.items() if re.fullmatch(r"eval/.*/avg@\d+", key)}
        shown = {"reward": "reward", "zero_std": "frac_reward_zero_std", "loss": "loss"}
        shown |= {"skipped": "skipped_updates"} if metrics["skipped_updates"] else {}
        return {label: f"{metrics[name]:.2f}" for label, name in shown.items() if name in metrics} | evaluated

    def finish(self):
        """Print the evaluation before and after, draw the curve, and say where everything is; rank 0 does."""
        if parallel.rank():
            return
        for key in self.last:
            if re.fullmatch(r"eval/.*/avg@\d+", key) and self.last[key + "_se"] is not None:
                print(f"{printable(key):<20} {self.first[key]:6.3f} -> {self.last[key]:6.3f} +- {self.last[key + '_se']:.3f}")
        plot_curve(self.run_dir)
        if self.report is not None:
            _, close, *_ = self.close.detach()
            close(0)
        print(f"the trained model and the records of the run are in {self.run_dir}")


def plot_curve(run_dir):
    """Draw curve.png (training reward and evaluation accuracy by step) from metrics.jsonl; says so and goes on without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("no curve.png: matplotlib is not installed (pip install matplotlib)")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = read_metrics(run_dir)
    series = {"training reward": [(r["step"], r["reward"]) for r in records if r.get("reward") is not None]}
    for key in sorted({key for record in records for key in record if re.fullmatch(r"eval/.*/avg@\d+", key)}):
        series[key] = [(r["step"], r[key]) for r in records if key in r]
    if not any(series.values()):
        print("no curve.png: nothing was sampled and nothing evaluated")
        return
    matplotlib.rcParams["text.parse_math"] = False  # a difficulty is text, also with dollars in it
    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    for label, points in series.items():
        if points:
            axes.plot(*zip(*points), label=printable(label), alpha=0.5 if label == "training reward" else 1.0,
                      marker="." if "eval" in label else None)
    axes.set(xlabel="step", ylabel="mean reward", ylim=(-0.03, 1.03))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    with writing(run_dir / "curve.png"):
        figure.savefig(run_dir / "curve.png", dpi=150)
    pyplot.close(figure)


# ---------------------------------------------------------------- checkpoints


def save_model(folder, model, tokenizer):
    """Save an ordinary HF model folder; files appear in it one by one, each complete, the weights last. Rank 0 writes."""
    weights, beside = parallel.full_state_dict(model), Path(folder) / ".model.tmp"
    if parallel.rank():
        return
    shutil.rmtree(beside, ignore_errors=True)
    with writing(folder, beside):
        write_model(beside, model, tokenizer, weights)
        files = sorted(beside.iterdir(), key=lambda file: file.suffix == ".safetensors")
        sync(*files)
        for file in files:
            os.replace(file, Path(folder) / file.name)
        beside.rmdir()
        sync(folder)


def write_model(folder, model, tokenizer, weights):
    """Write the files of a model folder, with the given state dict.

    Its generation_config is the model's own, but for the EOS ids: every one at which completions ended. The file is edited, since
    transformers refuses to save a changed config that contradicts itself, as published ones do (tests/test_cli.py).
    """
    model.save_pretrained(folder, state_dict=weights)
    generation_config = folder / "generation_config.json"
    generation_config.write_text(json.dumps(
        json.loads(generation_config.read_text()) | {"eos_token_id": eos_ids(model, tokenizer)}, indent=2) + "\n")
    tokenizer.save_pretrained(folder)


def save_checkpoint(run_dir, step, model, tokenizer, optimizer, scheduler, flops, total_limit):
    """Write checkpoint-<step>: model, optimizer, scheduler, ledger. Written beside and renamed; the oldest over `total_limit` go.

    No random state is stored: every draw is a function of (seed, step, rank). Rank 0 writes; of a sharded model each rank writes its
    slices of the optimizer's state, into optimizer/, which any number of ranks can read.
    """
    beside, final, weights = run_dir / f".checkpoint-{step}.tmp", run_dir / f"checkpoint-{step}", parallel.full_state_dict(model)
    if parallel.rank() == 0:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
    if parallel.is_sharded(model):
        parallel.wait()
        parallel.save_optimizer(beside / "optimizer", model, optimizer)
    if parallel.rank():
        return
    whole = complete_checkpoints(run_dir)
    with writing(final, beside, hint=f"; {whole[-1]} is complete" if whole else ""):
        write_model(beside, model, tokenizer, weights)
        states = {"scheduler": scheduler.state_dict()} | ({} if parallel.is_sharded(model) else {"optimizer": optimizer.state_dict()})
        with open(beside / "optimizer.pt", "wb") as file:
            torch.save(states, file)
        seal(beside, {"step": step, "num_tokens": flops.num_tokens, "flops": flops.spent})
        sync(*run_dir.glob("metrics.jsonl"))  # its lines must not be younger than the checkpoint
        remove_folder(final)  # a torn one
        os.replace(beside, final)
        sync(run_dir)
    for old in complete_checkpoints(run_dir)[:-total_limit]:
        remove_folder(old)


def remove_folder(folder):
    """Remove a checkpoint under another name first: a kill half-way leaves no torn one."""
    if folder.exists():
        aside = folder.with_name(f".{folder.name}.old.tmp")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(folder, aside)
        shutil.rmtree(aside)


HASHED_BYTES = 2**26  # larger files are known by their size only: reading them takes as long as loading


def digest(path):
    """Size of a file, and the SHA-256 of one of at most HASHED_BYTES, as they stand in state.json."""
    size = path.stat().st_size
    return {"size": size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest() if size <= HASHED_BYTES else None}


def seal(folder, state):
    """Write state.json, last: `state` and the digests of all other files; then force the folder to the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    named = {file.relative_to(folder).as_posix(): digest(file) for file in files}
    (folder / "state.json").write_text(json.dumps(state | {"files": named}))
    sync(*files, folder / "state.json", *{file.parent for file in files}, folder)


def read_state(checkpoint):
    """state.json of a checkpoint. Raises ValueError, in a few words, when a file of the checkpoint is missing, cut or changed."""
    try:
        state = json.loads((checkpoint / "state.json").read_text())
        step, files, _, _ = int(state["step"]), dict(state["files"]), int(state["num_tokens"]), dict(state["flops"])
    except OSError as error:
        raise ValueError(f"state.json: {error.strerror}") from None
    except (ValueError, LookupError, TypeError, RecursionError):
        raise ValueError("state.json cannot be read") from None
    present = {path.relative_to(checkpoint).as_posix(): path for path in checkpoint.rglob("*") if path.is_file()}
    for name in {"model.safetensors", "optimizer.pt"} | files.keys():
        if name not in present:
            raise ValueError(f"{name} is missing")
        if digest(present[name]) != files.get(name):
            raise ValueError(f"{name} is not as it was written")
    return state | {"step": step}


def checkpoints(run_dir):
    """The checkpoint-N folders of a run, complete or not, oldest first."""
    found = [path for path in Path(run_dir).glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def torn(checkpoint):
    """What is wrong with a checkpoint, in a few words, or None when it is complete."""
    try:
        read_state(checkpoint)
    except ValueError as error:
        return str(error)
    return None


def complete_checkpoints(run_dir):
    """The complete checkpoint-N folders of a run, oldest first."""
    return [checkpoint for checkpoint in checkpoints(run_dir) if torn(checkpoint) is None]


def find_checkpoint(given, output_dir, script):
    """Resolve --resume_from_checkpoint: returns (run folder, checkpoint, saved flags), and locks the folder.

    given: a checkpoint folder; a run folder, which means its latest complete one; or LATEST, the latest complete one of --output_dir.
    Torn ones are skipped with a printed line. The checkpoint is None when LATEST finds a run that was stopped before its first, or
    no run at all (the flags are {} then): the same command starts a run and goes on with it.
    """
    flag, path = "--resume_from_checkpoint", Path((output_dir or "") if given == LATEST else given)
    if given == LATEST and output_dir is None:
        raise BadArgument(f"{flag}: name the run folder, or give --output_dir")
    named = bool(re.fullmatch(r"checkpoint-\d+", path.name)) and not (path / "args.json").exists()
    run_dir = path.parent if named else path
    if given == LATEST and (not path.exists() or path.is_dir() and all(file.name.startswith(".") for file in path.iterdir())):
        return run_dir, None, {}
    if not path.is_dir():
        raise BadArgument(f"{flag}: no checkpoint in {path}")
    if not (run_dir / "args.json").is_file():
        raise BadArgument(f"{flag}: {run_dir} has no args.json, so it is not a run folder")
    try:
        record = json.loads((run_dir / "args.json").read_text())
        writer, saved = str(record["script"]), dict(record["args"])
    except (ValueError, LookupError, TypeError, RecursionError):
        raise BadArgument(f"{flag}: {run_dir / 'args.json'} cannot be read") from None
    if writer != script:
        raise BadArgument(f"{flag}: {path} is a run of {writer}")
    lock(run_dir)
    if named:
        if torn(path):
            raise BadArgument(f"{flag} {path} is torn: {torn(path)}")
        if path != complete_checkpoints(run_dir)[-1]:
            raise BadArgument(f"{flag} {path}: the run has later checkpoints, up to {complete_checkpoints(run_dir)[-1]}: remove them first")
        return run_dir, path, saved
    for checkpoint in reversed(checkpoints(run_dir)):
        if not torn(checkpoint):
            return run_dir, checkpoint, saved
        print(f"skipping {checkpoint}, which is torn: {printable(torn(checkpoint))}")
    if checkpoints(run_dir):
        raise BadArgument(f"{flag}: no checkpoint in {run_dir} is complete")
    if any(run_dir.glob("*.safetensors")):
        raise BadArgument(f"{flag}: {run_dir} is finished and has no checkpoint to go on from")
    if given != LATEST:
        raise BadArgument(f"{flag}: no checkpoint in {run_dir} yet; to start it again: --output_dir {run_dir} {flag}")
    return run_dir, None, saved


def load_checkpoint(checkpoint, model, optimizer, scheduler, flops):
    """Load weights, optimizer, scheduler and ledger in place; returns the step to go on with: 0 for None and for LATEST.

    Raises BadArgument when a file holds something else. Nothing in it is run: safetensors, and tensors and plain values only.
    """
    if checkpoint in (None, LATEST):
        return 0
    sharded = (Path(checkpoint) / "optimizer").is_dir()
    if sharded != parallel.is_sharded(model):
        mode = "fsdp" if sharded else "ddp"
        raise BadArgument(f"--resume_from_checkpoint {checkpoint} was written with --parallel {mode}: give the same")
    try:
        parallel.load_weights(model, Path(checkpoint) / "model.safetensors")
        state = torch.load(Path(checkpoint) / "optimizer.pt", weights_only=True, map_location=model.device)
        if sharded:
            parallel.load_optimizer(Path(checkpoint) / "optimizer", model, optimizer)
        else:
            optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        progress = read_state(Path(checkpoint))
    except pickle.UnpicklingError as error:
        raise BadArgument(f"--resume_from_checkpoint {checkpoint}: optimizer.pt is refused: it is no file of plain tensors") from error
    except (SafetensorError, OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadArgument(f"--resume_from_checkpoint {checkpoint} does not fit: {reason}") from error
    flops.spent.update(progress["flops"])
    flops.num_tokens = progress["num_tokens"]
    return progress["step"]
