"""The life of a run: command line, run folder, log, checkpoints."""

import dataclasses
import importlib.util
import inspect
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
import typing
import uuid
import weakref
from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
import yaml
from transformers import HfArgumentParser

from common import BadArgument, RunError, eos_ids, weights_digest
from data import rows_digest
from logprob import choose_impl
from reward import RewardError, check_reward, one_line

# ---------------------------------------------------------------- command line


def stages(args_class):
    """{stage: [flags]} of a script, in its order: the comments in the source of `args_class` are the stages, tags of a variant are not."""
    found, stage = {}, None
    for heading, name in re.findall(r"^    (?:# (.+)|(\w+): )", inspect.getsource(args_class), re.MULTILINE):
        if name:
            found.setdefault(stage, []).append(name)
        elif not re.match(r"\w+\(\d+/\d+\)", heading):
            stage = heading
    return found


class HelpFormatter(ArgumentDefaultsHelpFormatter):
    """One line of names and type a flag: not each name with dashes too, nor the type behind each of them."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=36, width=120)

    def _format_action_invocation(self, action):
        names = ", ".join(name for name in action.option_strings if "-" not in name.lstrip("-"))
        kind = getattr(action.type, "__name__", "").replace("string_to_bool", "bool").upper()
        return f"{names} {self._format_args(action, kind)}".rstrip()


class Parser(HfArgumentParser):
    """HfArgumentParser that groups flags by stage, takes no abbreviated ones and reports an error in one line."""

    def __init__(self, args_class, description):
        fields, hints = args_class.__dataclass_fields__, typing.get_type_hints(args_class)
        self.nullable = {name for name in fields if type(None) in typing.get_args(hints[name])}
        groups = [dataclasses.make_dataclass("Stage", [
            (name, hints[name], dataclasses.field(default=fields[name].default, metadata=fields[name].metadata)) for name in names],
            namespace={"_argument_group_name": stage}) for stage, names in stages(args_class).items()]
        super().__init__(groups, description=description, usage="python %(prog)s [CONFIG] [--flag value ...]", allow_abbrev=False,
                         formatter_class=HelpFormatter, epilog="CONFIG: a YAML or JSON file of flags without their dashes, or args.json of "
                         "a run, to repeat it; flags given here win.")
        for action in self._actions:
            if action.option_strings[0].startswith("--no_"):
                action.help, action.default = f"turn off --{action.dest}", SUPPRESS  # the default is that of the flag itself

    def error(self, message):
        raise BadArgument(re.sub(r"^argument (--\w+)[^:]*:", r"\1:", message))

    def read_config(self, path, script):
        """A config file -> (its flags as on the command line, {flag: None} of those that are null).

        args.json of a run stands for its flags but --output_dir: a run that is repeated gets a folder of its own.
        Raises BadArgument, naming file and key.
        """
        record = load_config(path)
        if {"script", "args"} <= record.keys() and isinstance(record["args"], dict):
            if record["script"] != Path(script).name:
                raise BadArgument(f"{path}: is of a run of {record['script']}, not of {Path(script).name}")
            record = {key: value for key, value in record["args"].items() if key != "output_dir"}
        flags, nulls, keys = [], {}, {}
        for key, value in record.items():
            action = self._option_string_actions.get(f"--{key}")
            if action is None or action.nargs == 0:
                raise BadArgument(f"{path}: unknown key {key}; --help lists them")
            if action.dest in keys:
                raise BadArgument(f"{path}: {keys[action.dest]} and {key} are the same flag")
            keys[action.dest] = key
            if value is None and action.dest in self.nullable:
                nulls[action.dest] = None
                continue
            values = value if action.nargs == "+" and isinstance(value, list) else [value]
            kinds = (str,) if action.type is str or action.choices else (str, int, float)  # the string 1e-6 is what YAML reads it as
            if not values or not all(isinstance(value, kinds) for value in values):
                wanted = "text, in quotes where YAML reads it as something else" if kinds == (str,) else "one value"
                raise BadArgument(f"{path}: {key}: expected {wanted}, got {value!r}")
            given = [f"--{key}", *values] if action.nargs == "+" else [f"--{key}={value}"]
            try:
                self.parse_args(given)
            except BadArgument as error:
                raise BadArgument(f"{path}: {str(error).removeprefix('--')}") from error
            flags += given
        return flags, nulls


def load_config(path):
    """The mapping in a YAML or JSON file. Raises BadArgument for any other file, for what cannot be read, and for a key given twice."""
    if Path(path).suffix not in (".yaml", ".yml", ".json"):
        raise BadArgument(f"{path}: expected flags, or first a config file ending in .yaml, .yml, .json")
    if not Path(path).is_file():
        raise BadArgument(f"{path}: no such file")
    try:
        text = Path(path).read_text()
        if path.endswith(".json"):
            record = json.loads(text, object_pairs_hook=no_key_twice)
        else:
            record = yaml.safe_load(text)
            if isinstance(record, dict):
                no_key_twice((key.value, None) for key, _ in yaml.compose(text, yaml.SafeLoader).value)
    except (ValueError, OSError, yaml.YAMLError) as error:
        raise BadArgument(f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(record, dict):
        raise BadArgument(f"{path}: expected a mapping of flags to values, got {type(record).__name__}")
    return record


def no_key_twice(pairs):
    """(key, value) pairs -> dict. Raises ValueError for a key that comes again: YAML and JSON would take its last value unasked."""
    found = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key} is given more than once")
        found[key] = value
    return found


def parse_args(args_class, doc, script, argv=None):
    """Command line, behind a config file -> `args_class`; what stands later wins.

    A resumed run starts from the flags in its args.json; flags given now win and are named.
    """
    parser, argv, nulls = Parser(args_class, doc.strip().splitlines()[0]), sys.argv[1:] if argv is None else argv, {}
    if argv and not argv[0].startswith("-"):
        flags, nulls = parser.read_config(argv[0], script)
        argv = [*flags, *argv[1:]]
    parser.set_defaults(**nulls)
    given = vars(parser.parse_args(argv))
    if given.get("resume_from_checkpoint"):
        checkpoint = find_checkpoint(given["resume_from_checkpoint"], given["output_dir"])
        if not (checkpoint.parent / "args.json").is_file():
            raise BadArgument(f"--resume_from_checkpoint: {checkpoint.parent} has no args.json, so it is not a run folder")
        saved = json.loads((checkpoint.parent / "args.json").read_text())
        if saved["script"] != Path(script).name:
            raise BadArgument(f"--resume_from_checkpoint: {checkpoint} is a run of {saved['script']}")
        parser.set_defaults(**{name: value for name, value in saved["args"].items() if name in given} | nulls)
        given = vars(parser.parse_args(argv)) | {"resume_from_checkpoint": str(checkpoint), "output_dir": str(checkpoint.parent)}
        changed = [f"--{name} {saved['args'].get(name)} -> {value}" for name, value in plain(given).items()
                   if name not in ("resume_from_checkpoint", "output_dir") and saved["args"].get(name) != value]
        print(f"resuming {checkpoint}" + (f" with changed flags: {', '.join(changed)}" if changed else ""))
    return args_class(**given)


def plain(record):
    """A dict that strict JSON can hold: an infinite flag becomes the string "inf" (argparse reads it back), NaN null."""
    return {name: (None if math.isnan(value) else str(value)) if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in record.items()}


AT_LEAST = dict(  # the smallest value of each flag that has one
    num_hard=0, num_easy=0, prompts_per_step=1, num_generations=1, max_completion_length=1, max_prompt_length=1, generation_batch_size=1,
    beta=0, epsilon=0, epsilon_high=0, warmup_steps=0, weight_decay=0, num_iterations=1, num_minibatches=1, micro_batch_size=0,
    micro_batch_tokens=1, max_steps=1, eval_steps=0, eval_problems=1, num_generations_eval=1, logging_steps=1, save_steps=0,
    save_total_limit=1, save_completions_steps=0, prefixes_per_trace=0, plain_per_trace=0, max_rephrase_prompt_length=1)


def check_common_args(args):
    """Checks of training and evaluation: fill in the defaults that differ between the built-in task and real LLMs, refuse small values."""
    builtin = args.dataset_name is None
    if getattr(args, "learning_rate", 0) is None:
        args.learning_rate = 2e-4 if builtin else 1e-6
    if args.max_completion_length is None:
        args.max_completion_length = 64 if builtin else 1024
    for name, bound in AT_LEAST.items():
        value = getattr(args, name, None)
        if value is not None and not value >= bound:
            raise BadArgument(f"--{name} must be at least {bound}, got {value}")
    try:
        check_reward(args.reward, args.reward_fn)
    except ValueError as error:
        raise BadArgument(str(error)) from error
    try:
        choose_impl(args.logprob_impl, 0, "cuda" if torch.cuda.is_available() else "cpu")
    except ValueError as error:
        raise BadArgument(f"--logprob_impl: {error}") from error


def check_args(args):
    """Checks of a training script: refuse values that cannot work, and a folder in use."""
    check_common_args(args)
    for name in ("temperature", "learning_rate", "max_grad_norm"):
        if not 0 < getattr(args, name) < math.inf:
            raise BadArgument(f"--{name} must be a positive number, got {getattr(args, name)}")
    if args.num_generations == 1 and args.scale_rewards == "group":
        raise BadArgument("--num_generations 1 leaves no group to compare with: give at least 2, or --scale_rewards none")
    if args.prompts_per_step < args.num_minibatches:
        raise BadArgument(f"--num_minibatches {args.num_minibatches} needs as many prompts, got --prompts_per_step {args.prompts_per_step}")
    if args.report_to != "none" and importlib.util.find_spec(args.report_to) is None:
        raise BadArgument(f"--report_to {args.report_to} needs the package {args.report_to}: pip install {args.report_to}")
    if args.output_dir and not args.resume_from_checkpoint:
        refuse_used_folder(Path(args.output_dir))


def run_main(main):
    """Call `main` and turn its errors into one line and an exit code: 2 bad arguments, 1 run time, 130 interrupted."""
    try:
        main()
    except (BadArgument, RunError, RewardError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, BadArgument) else 1)
    except KeyboardInterrupt:
        print("interrupted; --resume_from_checkpoint RUN_FOLDER goes on from its last checkpoint", file=sys.stderr)
        sys.exit(130)


# ---------------------------------------------------------------- run folder


def open_run(args, script, model, train_rows, eval_rows):
    """Make the run folder and write args.json; returns its Path. A resumed run's metrics are trimmed to its checkpoint.

    args.json: script, args (the resolved flags), versions, git_commit, run_id (drawn once, kept by resuming), base_model
    (`common.weights_digest` before training) and data (`data.rows_digest` of training and evaluation rows).
    """
    if args.output_dir is None:
        data = args.task if args.dataset_name is None else Path(args.dataset_name).stem
        name = f"{Path(script).stem}-{data}-{time.strftime('%Y%m%d-%H%M%S')}"
        suffixes = [""] + [f"-{n}" for n in range(2, 100)]
        args.output_dir = next(str(path) for path in (Path("runs") / (name + suffix) for suffix in suffixes) if not path.exists())
    run_dir, rows = Path(args.output_dir), {"train": rows_digest(train_rows), "eval": rows_digest(eval_rows)}
    if args.resume_from_checkpoint:
        trim_metrics(run_dir, int(Path(args.resume_from_checkpoint).name.split("-")[1]))
        # What is loaded now are the checkpoint's weights. Runs begun before there were these records go on without them.
        saved = {"run_id": uuid.uuid4().hex, "base_model": None, "data": rows} | json.loads((run_dir / "args.json").read_text())
        if saved["data"]["train"] != rows["train"]:
            print(f"the training rows are not those that {run_dir} was trained on so far")
    else:
        saved = {"run_id": uuid.uuid4().hex, "base_model": weights_digest(model)}
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadArgument(f"--output_dir {run_dir}: {error.strerror}") from error
    flags = plain(asdict(args) | {"resume_from_checkpoint": None})
    record = {"script": Path(script).name, "args": flags, "versions": versions(), "git_commit": git_commit(), "run_id": saved["run_id"],
              "base_model": saved["base_model"], "data": rows}
    write_atomically(run_dir / "args.json", json.dumps(record, indent=2, allow_nan=False) + "\n")
    return run_dir


def refuse_used_folder(folder, flag="--output_dir"):
    """Nothing that exists is ever written over."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        hint = f", or go on with --resume_from_checkpoint {folder}" if flag == "--output_dir" else ""
        raise BadArgument(f"{flag} {folder} is in use: choose another{hint}")


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


def write_atomically(path, text):
    """Write beside and rename, so that a reader never sees half a file."""
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(text)
    os.replace(beside, path)


def append_jsonl(path, records):
    """Append one strict JSON object per line and flush; non-ASCII is escaped, so any text survives."""
    with open(path, "a") as file:
        file.writelines(json.dumps(plain(record), allow_nan=False) + "\n" for record in records)


def read_metrics(run_dir):
    """The records of metrics.jsonl, without a last line that a kill has cut short."""
    path, records = Path(run_dir) / "metrics.jsonl", []
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        if line.endswith("\n"):
            records.append(json.loads(line))
    return records


def trim_metrics(run_dir, last_step):
    """Drop the records of steps after `last_step`: a resumed run writes them again."""
    kept = [record for record in read_metrics(run_dir) if record["step"] <= last_step]
    write_atomically(Path(run_dir) / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in kept))


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
    """Writes metrics.jsonl, which --report_to is told too, completions/ and, at the end, curve.png and a short table of a run."""

    def __init__(self, run_dir, args):
        self.run_dir, self.args, self.first, self.last, self.report = run_dir, args, {}, {}, None
        records = read_metrics(run_dir)  # of a resumed run
        for metrics in records:
            self.remember(metrics)
        if args.report_to != "none":
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

    def step(self, metrics, rows, batch, texts):
        """Log a training step: metrics every --logging_steps and with every evaluation, rollouts every --save_completions_steps."""
        step, last = metrics["step"], metrics["step"] == self.args.max_steps
        if last or step % self.args.logging_steps == 0 or any(key.startswith("eval/") for key in metrics):
            self.write(metrics)
        if self.args.save_completions_steps and (last or step % self.args.save_completions_steps == 0):
            path = self.run_dir / "completions" / f"step-{step:06d}.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.unlink(missing_ok=True)  # a resumed run writes its steps again
            repeats = len(texts) // len(rows)
            values = zip(texts, batch.ended.tolist(), batch.rewards.tolist(), batch.advantages.tolist())
            append_jsonl(path, ({"prompt": rows[i // repeats]["prompt"], "answer": rows[i // repeats]["answer"], "completion": text,
                                 "ended": ended, "reward": reward, "advantage": advantage}
                                | ({"prefix": rows[i // repeats]["prefix"]} if rows[i // repeats].get("prefix") else {})
                                for i, (text, ended, reward, advantage) in enumerate(values)))

    def headline(self, metrics):
        """The few numbers of the progress bar."""
        evaluated = {key.removeprefix("eval/"): f"{value:.2f}" for key, value in self.last.items() if re.fullmatch(r"eval/.*/avg@\d+", key)}
        shown = {"reward": "reward", "zero_std": "frac_reward_zero_std", "loss": "loss"}
        return {label: f"{metrics[name]:.2f}" for label, name in shown.items() if name in metrics} | evaluated

    def finish(self):
        """Print the evaluation before and after, draw the curve, and say where everything is."""
        for key in self.last:
            if re.fullmatch(r"eval/.*/avg@\d+", key) and self.last[key + "_se"] is not None:
                print(f"{key:<20} {self.first[key]:6.3f} -> {self.last[key]:6.3f} +- {self.last[key + '_se']:.3f}")
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
    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    for label, points in series.items():
        if points:
            axes.plot(*zip(*points), label=label, alpha=0.5 if label == "training reward" else 1.0, marker="." if "eval" in label else None)
    axes.set(xlabel="step", ylabel="mean reward", ylim=(-0.03, 1.03))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(run_dir / "curve.png", dpi=150)
    pyplot.close(figure)


# ---------------------------------------------------------------- checkpoints


def save_model(folder, model, tokenizer):
    """Save an ordinary HF model folder; files appear in it one by one, each complete.

    Its generation_config is the model's own, but for the EOS ids: every one at which completions ended. The file is edited, since
    transformers refuses to save a changed config that contradicts itself, as published ones do (tests/test_cli.py).
    """
    beside = Path(folder) / ".model.tmp"
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside)
    generation_config = beside / "generation_config.json"
    generation_config.write_text(json.dumps(
        json.loads(generation_config.read_text()) | {"eos_token_id": eos_ids(model, tokenizer)}, indent=2) + "\n")
    tokenizer.save_pretrained(beside)
    for file in beside.iterdir():
        os.replace(file, Path(folder) / file.name)
    beside.rmdir()


def save_checkpoint(run_dir, step, model, tokenizer, optimizer, scheduler, flops, total_limit):
    """Write checkpoint-<step>: model, optimizer, scheduler, ledger. Written beside and renamed; the oldest over `total_limit` go.

    No random state is stored: every draw is a function of (seed, step).
    """
    beside, final = run_dir / f".checkpoint-{step}.tmp", run_dir / f"checkpoint-{step}"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    save_model(beside, model, tokenizer)
    torch.save({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, beside / "optimizer.pt")
    (beside / "state.json").write_text(json.dumps({"step": step, "num_tokens": flops.num_tokens, "flops": flops.spent}))
    for file in beside.iterdir():
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
    shutil.rmtree(final, ignore_errors=True)
    os.replace(beside, final)
    for old in checkpoints(run_dir)[:-total_limit]:
        shutil.rmtree(old)


def checkpoints(run_dir):
    """The complete checkpoint-N folders of a run, oldest first."""
    found = [path for path in Path(run_dir).glob("checkpoint-*") if path.name.split("-")[1].isdecimal() and (path / "state.json").exists()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def find_checkpoint(given, output_dir):
    """Resolve --resume_from_checkpoint: a checkpoint folder, a run folder, or "latest" = the newest in --output_dir."""
    path = Path(output_dir or "") if given == "latest" else Path(given)
    if given == "latest" and output_dir is None:
        raise BadArgument("--resume_from_checkpoint: name the run folder, or give --output_dir")
    found = [path] if (path / "state.json").exists() else checkpoints(path)
    if not found:
        raise BadArgument(f"--resume_from_checkpoint: no checkpoint in {path}")
    return found[-1]


def load_checkpoint(checkpoint, model, optimizer, scheduler, flops):
    """Load weights, optimizer, scheduler and ledger in place; returns the step to go on with."""
    from safetensors.torch import load_model as load_safetensors

    load_safetensors(model, Path(checkpoint) / "model.safetensors", device=str(model.device))
    state = torch.load(Path(checkpoint) / "optimizer.pt", weights_only=True, map_location=model.device)
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    progress = json.loads((Path(checkpoint) / "state.json").read_text())
    flops.spent.update(progress["flops"])
    flops.num_tokens = progress["num_tokens"]
    return progress["step"]
