"""The command line: flags by stage, config files, checks; a resumed run's own flags."""

import dataclasses
import importlib.util
import inspect
import json
import math
import re
import sys
import typing
from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter
from pathlib import Path

import torch
import yaml
from transformers import HfArgumentParser

from common import BadArgument, printable
from logprob import choose_impl
from reward import check_reward
from runs import LATEST, find_checkpoint, plain, refuse_used_folder

CODE_FLAGS = ("trust_remote_code", "reward_fn")  # flags that run code from files: never taken from args.json, which may be foreign


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
        run_dir, checkpoint, saved = find_checkpoint(given["resume_from_checkpoint"], given["output_dir"], Path(script).name)
        for name in CODE_FLAGS:
            if saved.get(name) and not given[name]:
                raise BadArgument(f"--resume_from_checkpoint {run_dir}: the run has --{name}, which runs code, and so is not taken from "
                                  "args.json: give it again")
        parser.set_defaults(**{name: value for name, value in saved.items() if name in given} | nulls)
        given = vars(parser.parse_args(argv)) | {"resume_from_checkpoint": str(checkpoint or LATEST), "output_dir": str(run_dir)}
        changed = [f"--{name} {saved.get(name)} -> {value}" for name, value in plain(given).items()
                   if saved and name not in ("resume_from_checkpoint", "output_dir") and saved.get(name) != value]
        print(printable((f"resuming {checkpoint}" if checkpoint else f"no checkpoint in {run_dir} yet: starting from the first step")
                        + (f" with changed flags: {', '.join(changed)}" if changed else "")))
    return args_class(**given)


AT_LEAST = dict(  # the smallest value of each flag that has one
    num_hard=0, num_easy=0, prompts_per_step=1, num_generations=1, max_completion_length=1, max_prompt_length=1, generation_batch_size=1,
    beta=0, epsilon=0, epsilon_high=0, warmup_steps=0, weight_decay=0, num_iterations=1, num_minibatches=1, micro_batch_size=0,
    micro_batch_tokens=1, max_steps=1, eval_steps=0, eval_problems=1, num_generations_eval=1, logging_steps=1, save_steps=0,
    save_total_limit=1, save_completions_steps=0, max_bad_steps=1, prefixes_per_trace=0, plain_per_trace=0, max_rephrase_prompt_length=1)


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
    if args.parallel == "fsdp" and not torch.distributed.is_initialized():
        raise BadArgument(f"--parallel fsdp needs many processes: torchrun --nproc_per_node=K {Path(sys.argv[0]).name} ...")
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
