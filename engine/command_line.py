"""The command line: flags grouped under headings, config files, and the flags of a run that is resumed."""

import argparse
import dataclasses
import difflib
import inspect
import json
import os
import re
import reprlib
import sys
import types
import typing
from pathlib import Path

import yaml

from .checkpoints import find_checkpoint
from .data_files import once
from .errors import BadArgument, naming, printable
from .files import plain, read_own
from .flags import LATEST, absolute

CODE_FLAGS = ("trust_remote_code", "reward_fn")  # run code, so only the command line sets them: a file may be foreign
TASK_FLAGS = ("task", "num_hard", "num_easy", "trace_style")  # of the built-in task alone
MOST_CONFIG_BYTES = 100_000  # YAML is read at 20 kB a second
REMOVED = {"micro_batch_size": "no longer exists: --micro_batch_tokens bounds a micro-batch"}
NO_FLAGS = REMOVED | {"config": "is no flag: a config file stands first, as in python grpo.py FILE.yaml --seed 1"}
NEEDS = {"max_tries": "save_traces", "traces_per_problem": "save_traces"}  # flag: the flag without which it says nothing
EXCLUDES = {"reward": "reward_fn", "trace_style": "traces"}  # flag: the flag beside which it says nothing
HEADINGS = ("model and data", "off-policy knowledge", "rollout", "loss", "optimization", "evaluation and output")


def flag_groups(args_class):
    """{heading: [flags]}: the comments in the sources of `args_class` and its bases are the headings; a script's own flags come first."""
    found, seen = {}, set()
    for each in args_class.__mro__[:-1]:
        current = None
        for heading, name in re.findall(r"^    (?:# (.+)|(\w+): )", inspect.getsource(each), re.MULTILINE):
            if name and name in args_class.__dataclass_fields__ and name not in seen:
                found.setdefault(current, []).append(name)
                seen.add(name)
            elif heading and not re.match(r"\w+\(\d+/\d+\)", heading):  # the numbered tags of a variant are no headings
                current = heading
    return dict(sorted(found.items(), key=lambda item: HEADINGS.index(item[0]) if item[0] in HEADINGS else len(HEADINGS)))


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """One line for the names and the type of a flag."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=36, width=120)

    def _format_action_invocation(self, action):
        return f"{', '.join(action.option_strings)} {self._format_args(action, getattr(action.type, '__name__', '').upper())}".rstrip()


def reader(kind, nullable):
    """A function from a word of the command line to a value of a kind: bool, int, float or str; or None, for null, where that is one."""
    def read(text):
        if nullable and text in ("null", "~"):
            return None
        if kind is bool and text.lower() not in ("yes", "true", "1", "no", "false", "0"):
            raise argparse.ArgumentTypeError(f"expected yes or no, got {text!r}")
        return text.lower() in ("yes", "true", "1") if kind is bool else kind(text)

    read.__name__ = kind.__name__  # which argparse shows
    return read


class Parser(argparse.ArgumentParser):
    """The flags of a dataclass, grouped under headings. No flag is abbreviated, and an error is one line."""

    def __init__(self, args_class, description):
        super().__init__(description=description, usage="python %(prog)s [CONFIG] [--flag value ...]", allow_abbrev=False,
                         formatter_class=HelpFormatter, epilog="CONFIG: a YAML or JSON file of flags without their dashes, or the "
                         "args.json of a run, which repeats the run. Flags on the command line win.")
        hints, self.renamed = typing.get_type_hints(args_class), renamed_flags(args_class)
        for heading, names in flag_groups(args_class).items():
            group = self.add_argument_group(heading)
            for name in names:
                self.add_flag(group, args_class.__dataclass_fields__[name], hints[name])

    def add_flag(self, group, field, hint):
        """Add one field: a bool, int, float or str, a list of these, or None; or a Literal."""
        kinds = [kind for kind in typing.get_args(hint) or [hint] if kind is not type(None)]
        nullable = isinstance(hint, types.UnionType)
        if typing.get_origin(hint) is typing.Literal:
            options = {"choices": kinds}
        elif typing.get_origin(kinds[0]) is list:
            options = {"type": reader(typing.get_args(kinds[0])[0], nullable), "nargs": "+"}
        else:
            options = {"type": reader(kinds[0], nullable)} | ({"nargs": "?", "const": True} if kinds[0] is bool else {})
        options |= {name: field.metadata[name] for name in ("help", "nargs", "const") if name in field.metadata}
        group.add_argument(f"--{field.name}", *field.metadata.get("aliases", ()), default=field.default, **options)
        if field.default is True:
            group.add_argument(f"--no_{field.name}", dest=field.name, action="store_false", default=argparse.SUPPRESS,
                               help=f"Turn off --{field.name}")

    def error(self, message):
        raise BadArgument(re.sub(r"^argument (--\w+)[^:]*:", r"\1:", message))

    def known(self, name, kind="flag --"):
        """The action of a flag. Raises BadArgument, with a hint, for a name that is none; kind: what the name was."""
        action = self._option_string_actions.get(f"--{name}")
        if action is not None and (action.nargs != 0 or kind == "flag --"):
            return action
        if name in self.renamed | NO_FLAGS:
            raise BadArgument(f"--{name} " + (f"is now --{self.renamed[name]}" if name in self.renamed else NO_FLAGS[name]))
        flags = [*self._option_string_actions] if name and action is None else []
        close = [flag for flag in flags if flag.startswith(f"--{name}")] or difflib.get_close_matches(f"--{name}", flags)
        raise BadArgument(f"unknown {kind}{name}; " + (f"did you mean {close[0]}?" if close else "--help lists them"))

    def parse_args(self, argv):
        words = []
        for word in map(str, argv):
            if "\0" in word or word != word.encode(errors="replace").decode():
                raise BadArgument(f"expected text in UTF-8 without NUL, got {ascii(word)}")
            if word.startswith("--"):
                name, equals, value = word[2:].partition("=")
                self.known(name := name.replace("-", "_"))
                words.append(f"--{name}{equals}{value}")
            elif re.match(r"-[\d.]|-inf", word) and words and re.fullmatch(r"--\w+", words[-1]):
                words[-1] += f"={word}"  # argparse takes -1e-5 for a flag
            else:
                words.append(word)
        given = super().parse_args(words)
        vars(given).update({name: None for name, value in vars(given).items() if value == [None]})
        return given

    def words(self, record, argv):
        """{flag: value} of a file -> words of a command line, after the same checks. Flags that run code come from `argv` alone."""
        words, keys = [], {}
        for key, value in record.items():
            action = self.known(key, "key ")
            if keys.setdefault(action.dest, key) != key:
                raise BadArgument(f"{keys[action.dest]} and {key} are the same flag")
            values = value if action.nargs == "+" and isinstance(value, list) else [value]
            if not values or not all(each is None or isinstance(each, (str, int, float)) for each in values):
                raise BadArgument(f"{key}: expected one value, got {reprlib.repr(value)}")
            values = ["null" if each is None else re.sub(r"\A([+-]?)\.inf\Z", r"\1inf", str(each)) for each in values]  # .inf: YAML's
            words += [f"--{key}", *values] if len(values) > 1 else [f"--{key}={values[0]}"]
        of_file, typed = vars(self.parse_args(words)), {str(word).split("=")[0] for word in argv}
        for name in CODE_FLAGS:
            if of_file[name] and f"--{name}" not in typed:
                raise BadArgument(f"{name} runs code, and so is taken from the command line only: give --{name} again")
        return [word for word in words if word.split("=")[0].removeprefix("--") not in CODE_FLAGS]

    def read_config(self, path, script, argv):
        """`words` of a YAML or JSON file, or of the args.json of a run without --output_dir: a repeated run gets a folder of its own."""
        with naming(path):
            if Path(path).suffix not in (".yaml", ".yml", ".json"):
                raise ValueError("expected flags, or first a config file ending in .yaml, .yml, .json")
            text = read_own(os.path.realpath(path), MOST_CONFIG_BYTES).decode()
            record = json.loads(text, object_pairs_hook=once) if path.endswith(".json") else yaml.load(text, StrictYaml)
            if not isinstance(record, dict):
                raise ValueError(f"expected a mapping of flags to values, got {type(record).__name__}")
            if {"script", "args"} <= record.keys() and isinstance(record["args"], dict):
                if record["script"] != Path(script).name:
                    raise ValueError(f"is of a run of {record['script']}, not of {Path(script).name}")
                unsaid = ("output_dir", *TASK_FLAGS) if record["args"].get("dataset_name") is not None else ("output_dir",)
                record = {key: value for key, value in known_flags(record["args"], self.renamed).items() if key not in unsaid}
            return self.words(record, argv)


class StrictYaml(yaml.BaseLoader):
    """YAML of which every value is a text as it stands, as on the command line: no, 1e-6, 2024_01. Nothing at all is null."""

    def construct_scalar(self, node):
        return None if node.value == "" and node.style is None else super().construct_scalar(node)

    def construct_mapping(self, node, deep=False):
        return once(self.construct_pairs(node, deep=True))


def renamed_flags(args_class):
    """{old name: name} of the flags that had another name once."""
    return {field.metadata["formerly"]: field.name for field in dataclasses.fields(args_class) if field.metadata.get("formerly")}


def known_flags(saved, renamed):
    """The flags in the args.json of a run, renamed ones under their new names. Raises BadArgument for a removed one that was set."""
    for name in REMOVED:
        if saved.get(name):
            raise BadArgument(f"the run has --{name} {saved[name]}, which {REMOVED[name]}")
    return {renamed.get(name, name): value for name, value in saved.items() if name not in REMOVED}


def flags_of(words):
    """The names of the flags among the words of a command line."""
    return {str(word).split("=")[0].removeprefix("--").replace("-", "_") for word in words if str(word).startswith("--")}


def parse_args(args_class, doc, script, argv=None):
    """Command line, after a config file if one is named -> `args_class`; what stands later wins.

    A resumed run starts from the flags in its args.json. Flags given now win and are printed.
    """
    parser, argv = Parser(args_class, doc.strip().splitlines()[0]), sys.argv[1:] if argv is None else argv
    typed = flags_of(argv)
    if argv and not argv[0].startswith("-"):
        argv = parser.read_config(argv[0], script, argv[1:]) + argv[1:]
    given = vars(parser.parse_args(argv))
    if given.get("resume_from_checkpoint"):
        run_dir, checkpoint, saved = find_checkpoint(given["resume_from_checkpoint"], given["output_dir"], Path(script).name)
        with naming(f"--resume_from_checkpoint {run_dir}"):
            saved = absolute(known_flags(saved, parser.renamed))
        with naming(run_dir / "args.json"):
            words = parser.words({name: value for name, value in saved.items()
                                  if name not in ("resume_from_checkpoint", "output_dir")}, argv)
        given = vars(parser.parse_args(words + argv)) | {"resume_from_checkpoint": str(checkpoint or LATEST), "output_dir": str(run_dir)}
        changed = [f"--{name} {saved.get(name)} -> {value}" for name, value in absolute(plain(given)).items()
                   if saved and name not in ("resume_from_checkpoint", "output_dir") and saved.get(name) != value]
        print(printable((f"resuming {checkpoint}" if checkpoint else f"no checkpoint in {run_dir} yet: starting from the first step")
                        + (f" with changed flags: {', '.join(changed)}" if changed else "")))
    for name in TASK_FLAGS:
        if name in flags_of(argv) and given["dataset_name"] is not None:
            raise BadArgument(f"--{name} is a flag of the built-in task, and says nothing with --dataset_name: leave one of them out")
    for name, other in NEEDS.items():
        if name in typed and given[other] is None:
            raise BadArgument(f"--{name} says nothing without --{other}")
    for name, other in EXCLUDES.items():
        if name in typed and given[other] is not None:
            raise BadArgument(f"--{name} says nothing with --{other}")
    for name, other in (("dataset_split", "dataset_name"), ("eval_dataset_split", "eval_dataset_name")):
        names = given.get(other) if isinstance(given.get(other), list) else [given.get(other)]
        if name in typed and all(each is None or os.path.isfile(each) for each in names):
            raise BadArgument(f"--{name} says nothing without a data set that has splits: a local file is read whole")
    return args_class(**given)
