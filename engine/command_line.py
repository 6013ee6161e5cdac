"""The command line: flags grouped by stage, config files, and the flags of a run that is resumed."""

import dataclasses
import inspect
import json
import re
import sys
import typing
from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter
from pathlib import Path

import yaml
from transformers import HfArgumentParser

from .checkpoints import find_checkpoint
from .errors import BadArgument, printable
from .files import plain
from .flags import LATEST

CODE_FLAGS = ("trust_remote_code", "reward_fn")  # run code, so only the command line sets them: a file may be foreign
REMOVED = {"micro_batch_size": "--micro_batch_tokens bounds a micro-batch"}
STAGES = ("model and data", "off-policy knowledge", "rollout", "loss", "optimization", "evaluation and output")


def stages(args_class):
    """{stage: [flags]}: the comments in the sources of `args_class` and its bases are the stages; a script's own flags come first."""
    found, seen = {}, set()
    for each in args_class.__mro__[:-1]:
        stage = None
        for heading, name in re.findall(r"^    (?:# (.+)|(\w+): )", inspect.getsource(each), re.MULTILINE):
            if name and name in args_class.__dataclass_fields__ and name not in seen:
                found.setdefault(stage, []).append(name)
                seen.add(name)
            elif heading and not re.match(r"\w+\(\d+/\d+\)", heading):  # the numbered tags of a variant are no stages
                stage = heading
    return dict(sorted(found.items(), key=lambda item: STAGES.index(item[0]) if item[0] in STAGES else len(STAGES)))


class HelpFormatter(ArgumentDefaultsHelpFormatter):
    """One line for the names and the type of a flag, without a second spelling of each name."""

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
        self.renamed = renamed_flags(args_class)
        self.nullable = {name for name in fields if type(None) in typing.get_args(hints[name])}

        def field(name):
            metadata = {key: value for key, value in fields[name].metadata.items() if key not in ("bounds", "defaults", "formerly")}
            return name, hints[name], dataclasses.field(default=fields[name].default, metadata=metadata)

        groups = [dataclasses.make_dataclass("Stage", map(field, names), namespace={"_argument_group_name": stage})
                  for stage, names in stages(args_class).items()]
        super().__init__(groups, description=description, usage="python %(prog)s [CONFIG] [--flag value ...]", allow_abbrev=False,
                         formatter_class=HelpFormatter, epilog="CONFIG: a YAML or JSON file of flags without their dashes, or the "
                         "args.json of a run, which repeats the run. Flags on the command line win.")
        for action in self._actions:
            if action.option_strings[0].startswith("--no_"):
                action.help, action.default = f"Turn off --{action.dest}", SUPPRESS  # the default is that of the flag itself

    def error(self, message):
        raise BadArgument(re.sub(r"^argument (--\w+)[^:]*:", r"\1:", message))

    def parse_args(self, argv):
        for word in argv:
            name = str(word).split("=")[0].removeprefix("--")
            if str(word).startswith("--") and name in self.renamed:
                raise BadArgument(f"--{name} is now --{self.renamed[name]}")
            if str(word).startswith("--") and name in REMOVED:
                raise BadArgument(f"--{name} no longer exists: {REMOVED[name]}")
        return super().parse_args(argv)

    def words(self, record, source):
        """{flag: value} of a file -> (the flags as on the command line, {flag: None} of those that are null).

        Every value passes the same checks as on the command line. Raises BadArgument, naming file and key.
        """
        words, nulls, keys = [], {}, {}
        for key, value in record.items():
            action = self._option_string_actions.get(f"--{key}")
            if key not in self.renamed | REMOVED and (action is None or action.nargs == 0):
                raise BadArgument(f"{source}: unknown key {key}; --help lists them")
            dest = action.dest if action else key
            if dest in keys:
                raise BadArgument(f"{source}: {keys[dest]} and {key} are the same flag")
            keys[dest] = key
            if value is None and dest in self.nullable:
                nulls[dest] = None
                continue
            values = value if action and action.nargs == "+" and isinstance(value, list) else [value]
            text = action and (action.type is str or action.choices)
            if not values or not all(isinstance(value, str if text else (str, int, float)) for value in values):  # YAML reads 1e-6 as text
                wanted = "text, in quotes where YAML reads it as something else" if text else "one value"
                raise BadArgument(f"{source}: {key}: expected {wanted}, got {value!r}")
            given = [f"--{key}", *values] if len(values) > 1 else [f"--{key}={values[0]}"]
            try:
                self.parse_args(given)
            except BadArgument as error:
                raise BadArgument(f"{source}: {str(error).removeprefix('--')}") from error
            words += given
        return words, nulls

    def read_config(self, path, script, argv):
        """`words` of a config file, or of the args.json of a run without --output_dir: a repeated run gets a folder of its own."""
        record = load_config(path)
        if {"script", "args"} <= record.keys() and isinstance(record["args"], dict):
            if record["script"] != Path(script).name:
                raise BadArgument(f"{path}: is of a run of {record['script']}, not of {Path(script).name}")
            record = {key: value for key, value in known_flags(record["args"], path, self.renamed).items() if key != "output_dir"}
        return self.words(without_code(record, path, argv), path)


def load_config(path):
    """The mapping in a YAML or JSON file. Raises BadArgument for any other file, for what cannot be read, and for a key given twice."""
    def no_key_twice(pairs):
        pairs = list(pairs)
        repeated = [key for place, (key, _) in enumerate(pairs) if key in dict(pairs[:place])]
        if repeated:  # YAML and JSON would take its last value unasked
            raise ValueError(f"{repeated[0]} is given more than once")
        return dict(pairs)

    if Path(path).suffix not in (".yaml", ".yml", ".json"):
        raise BadArgument(f"{path}: expected flags, or first a config file ending in .yaml, .yml, .json")
    if not Path(path).is_file():
        raise BadArgument(f"{path}: no such file")
    try:
        text = Path(path).read_text()
        if not path.endswith(".json") and any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise ValueError("aliases are not read")  # a few lines of them make gigabytes
        record = json.loads(text, object_pairs_hook=no_key_twice) if path.endswith(".json") else yaml.safe_load(text)
        if isinstance(record, dict) and not path.endswith(".json"):
            no_key_twice((key.value, None) for key, _ in yaml.compose(text, yaml.SafeLoader).value)
    except (ValueError, OSError, RecursionError, yaml.YAMLError) as error:
        raise BadArgument(f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(record, dict):
        raise BadArgument(f"{path}: expected a mapping of flags to values, got {type(record).__name__}")
    return record


def renamed_flags(args_class):
    """{old name: name} of the flags that had another name once."""
    return {field.metadata["formerly"]: field.name for field in dataclasses.fields(args_class) if field.metadata.get("formerly")}


def known_flags(saved, source, renamed):
    """The flags in the args.json of a run, renamed ones under their new names. Raises BadArgument for a removed one that was set."""
    for name in REMOVED:
        if saved.get(name):
            raise BadArgument(f"{source}: the run has --{name} {saved[name]}, which no longer exists: {REMOVED[name]}")
    return {renamed.get(name, name): value for name, value in saved.items() if name not in REMOVED}


def without_code(record, source, argv):
    """The flags of a file without those that run code. Raises BadArgument for one that the file sets and the command line does not."""
    for name in CODE_FLAGS:
        if record.get(name) and not any(str(word).split("=")[0] == f"--{name}" for word in argv):
            raise BadArgument(f"{source}: {name} runs code, and so is taken from the command line only: give --{name} again")
    return {name: value for name, value in record.items() if name not in CODE_FLAGS}


def parse_args(args_class, doc, script, argv=None):
    """Command line, after a config file if one is named -> `args_class`; what stands later wins.

    A resumed run starts from the flags in its args.json. Flags given now win and are printed.
    """
    parser, argv, nulls = Parser(args_class, doc.strip().splitlines()[0]), sys.argv[1:] if argv is None else argv, {}
    if argv and not argv[0].startswith("-"):
        flags, nulls = parser.read_config(argv[0], script, argv[1:])
        argv = [*flags, *argv[1:]]
    parser.set_defaults(**nulls)
    given = vars(parser.parse_args(argv))
    if given.get("resume_from_checkpoint"):
        run_dir, checkpoint, saved = find_checkpoint(given["resume_from_checkpoint"], given["output_dir"], Path(script).name)
        saved = known_flags(saved, f"--resume_from_checkpoint {run_dir}", parser.renamed)
        own = {name: value for name, value in without_code(saved, run_dir / "args.json", argv).items()
               if name in given and name not in (*nulls, "resume_from_checkpoint", "output_dir")}
        words, own_nulls = parser.words(own, run_dir / "args.json")
        parser.set_defaults(**own_nulls | nulls)
        given = vars(parser.parse_args(words + argv)) | {"resume_from_checkpoint": str(checkpoint or LATEST), "output_dir": str(run_dir)}
        changed = [f"--{name} {saved.get(name)} -> {value}" for name, value in plain(given).items()
                   if saved and name not in ("resume_from_checkpoint", "output_dir") and saved.get(name) != value]
        print(printable((f"resuming {checkpoint}" if checkpoint else f"no checkpoint in {run_dir} yet: starting from the first step")
                        + (f" with changed flags: {', '.join(changed)}" if changed else "")))
    return args_class(**given)
