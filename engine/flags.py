"""The flags that all scripts share, and the bounds that values must keep. A script inherits them and adds those that its text reads."""

import dataclasses
import importlib.util
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from .errors import BadArgument
from .files import refuse_used_folder
from .grading import check_reward
from .logprob import choose_impl

LATEST = "latest"  # what a bare --resume_from_checkpoint means


def arg(default, help, *, aliases=(), builtin=None, otherwise=None, formerly=None, **bounds):
    """A flag: its default, what --help says of it, and what its value must hold.

    builtin, otherwise: the value of a flag that is not given, on the built-in task and on other data. formerly: an old name, which is
    refused with a hint. bounds: least (>=), above (>), most (<=), below (<), each a number or the name of another flag; holds, a tuple of
    strings that a text must contain. A flag that is None is not checked.
    """
    unknown = bounds.keys() - {"least", "above", "most", "below", "holds"}
    if unknown:
        raise TypeError(f"arg() got unknown bounds {', '.join(sorted(unknown))}")
    if otherwise is not None:
        help = f"{help}; {builtin} on the built-in task, else {otherwise}"
    return dataclasses.field(default=default, metadata={
        "aliases": list(aliases), "help": help, "bounds": bounds, "defaults": (builtin, otherwise), "formerly": formerly})


@dataclass
class ModelArgs:
    """Flags of every script: which model, which data, how completions are sampled and graded."""

    # model and data
    model_name_or_path: str = arg("tiny_model", "Local folder or hub id; tiny_model is built in", aliases=["--model"])
    gguf_file: str | None = arg(None, "GGUF file in that folder or hub id; it is dequantised")
    dtype: Literal["auto", "float32", "bfloat16"] = arg("auto", "Dtype of compute; weights stay float32; auto = bfloat16 on a GPU")
    parallel: Literal["ddp", "fsdp"] = arg("ddp", "Layout under torchrun: the whole model on every rank, or sharded by FSDP2")
    attn_implementation: str | None = arg(None, "Attention of transformers: eager, sdpa, ...")
    trust_remote_code: bool = arg(False, "Run the Python code that comes with a model")
    ignore_extra_weights: bool = arg(False, "Load a checkpoint that holds more than the model; one that lacks weights is refused")
    dataset_name: str | None = arg(None, "Local jsonl/json/csv/parquet file, folder of them, or hub data set; default: the built-in --task")
    dataset_config: str | None = arg(None, "Configuration of a hub data set, such as main of GSM8K")
    dataset_split: str = arg("train", "Split of a hub data set or folder")
    prompt_column: str | None = arg(None, "Column of prompts; default: prompt, problem or question")
    answer_column: str | None = arg(None, "Column of gold answers; default: answer, solution, ground_truth or reward_model")
    task: Literal["bills", "diary"] = arg("bills", "Built-in task: bills = missing knowledge, diary = careless skill")
    num_hard: int = arg(512, "Hard training problems of the built-in task", least=0)
    num_easy: int = arg(256, "Easy training problems of the built-in task", least=0)
    template: Literal["auto", "chat", "none", "r1", "qwen_math"] = arg("auto", "Template of prompts; auto = chat if the tokenizer has one")
    system_prompt: str | None = arg(None, "System message of prompts that bring none; default: the template's")
    max_prompt_length: int = arg(1024, "Longest prompt in tokens; longer ones are dropped", least=1)
    # rollout
    max_completion_length: int | None = arg(None, "Longest completion in tokens", builtin=64, otherwise=1024, least=1)
    temperature: float = arg(1.0, "Temperature of sampling, and of the log-probs that are trained", above=0, below=math.inf)
    generation_batch_size: int = arg(256, "Rows in a call of generate, for memory alone; TRL's flag of this name sizes the batch", least=1)
    static_cache: bool = arg(False, "Sample with a static cache, for which a GPU compiles the model: half a minute a shape, then fast")
    reward: Literal["boxed", "exact", "numeric", "choice", "math"] = arg("boxed", "Rule that grades the last \\boxed{}")
    reward_fn: str | None = arg(None, "Own reward instead of --reward: PATH.py:FUNCTION, called as in TRL")
    grade_truncated: bool = arg(False, "Grade completions without EOS, too; otherwise they earn 0; --reward_fn always gets them")
    logprob_impl: Literal["auto", "reference", "tiled", "triton"] = arg("auto", "Path of the log-probs; see engine/logprob.py")
    threads: int | None = arg(None, "CPU threads; default: OMP_NUM_THREADS, or 1 for a model below 10 M weights, or 1 a core", least=1)
    seed: int = arg(0, "Seed of data order and sampling")

    def __post_init__(self):
        check_model_args(self)


@dataclass
class Args(ModelArgs):
    """Flags that every training script has."""

    # rollout
    prompts_per_step: int = arg(12, "N: prompts in a step", least=1)
    # optimization
    learning_rate: float | None = arg(None, "Learning rate of AdamW", builtin=2e-4, otherwise=1e-6, above=0, below=math.inf)
    lr_scheduler_type: Literal["constant", "constant_with_warmup", "linear", "cosine"] = arg("constant", "Schedule of transformers")
    warmup_steps: int = arg(0, "Steps of linear warm-up of the learning rate", least=0)
    weight_decay: float = arg(0.0, "Weight decay of AdamW", least=0, below=math.inf)
    max_grad_norm: float = arg(1.0, "Largest norm of the gradient; larger gradients are scaled down to it", above=0, below=math.inf)
    micro_batch_tokens: int = arg(8192, "Padded tokens in a forward pass; fewer need less memory", least=1)
    lora_rank: int = arg(0, "Rank of the LoRA adapter that is trained instead of the weights; 0 = none; needs the package peft", least=0)
    lora_alpha: float | None = arg(None, "The adapter is scaled by alpha / rank; default: twice the rank", above=0, below=math.inf)
    lora_targets: list[str] | None = arg(None, "Names of the layers that get an adapter, such as q_proj v_proj; default: all-linear")
    save_merged: bool = arg(True, "With --lora_rank: save the merged model at the end, and the adapter beside it; or the adapter alone")
    gradient_checkpointing: bool = arg(False, "Recompute activations: less memory, one more forward pass")
    max_steps: int = arg(100, "Steps: one batch of rollouts each", least=1)
    max_bad_steps: int = arg(10, "Steps in a row with a skipped update, after which the run stops", least=1)
    # evaluation and output
    eval_dataset_name: str | None = arg(None, "Evaluation set, as --dataset_name; none: only the built-in task is evaluated")
    eval_dataset_config: str | None = arg(None, "Configuration of a hub evaluation set")
    eval_dataset_split: str = arg("test", "Split of a hub evaluation set or folder")
    eval_steps: int = arg(10, "Steps between evaluations; 0 = never", least=0)
    eval_problems: int = arg(128, "First problems of the evaluation set; per difficulty on the built-in task", least=1)
    num_generations_eval: int = arg(1, "Samples per evaluation problem, at --temperature", least=1)
    output_dir: str | None = arg(None, "Run folder; default: a fresh one under runs/")
    logging_steps: int = arg(1, "Steps between lines of metrics.jsonl", least=1)
    save_steps: int = arg(0, "Steps between checkpoints; 0 = only the final model", least=0)
    save_total_limit: int = arg(2, "Checkpoints that are kept", least=1)
    save_completions_steps: int = arg(10, "Steps between files of rollouts in completions/; 0 = none", least=0)
    resume_from_checkpoint: str | None = dataclasses.field(default=None, metadata={
        "nargs": "?", "const": LATEST, "help": "Checkpoint or run folder to go on with; bare: the latest in --output_dir"})
    dry_run: bool = arg(False, "Show settings, data, memory and FLOPs, and stop before training")
    explain: bool = arg(False, "Run steps until a group has a signal; print what each function computes in that step; write nothing")
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = arg("none", "Tracker that also gets metrics.jsonl")

    smallest_group = 2  # rows that an advantage compares; a script whose loss needs no advantage says 1

    @property
    def keeps_initial_weights(self):
        """Does training read the weights that it began with? A resumed run must then begin with the same."""
        return getattr(self, "beta", 0) > 0

    def __post_init__(self):
        super().__post_init__()
        check_training_args(self)


@dataclass
class TraceArgs(Args):
    """The flags of a script that learns from off-policy solutions."""

    # off-policy knowledge
    traces: str | None = arg(None, "Traces from eval.py --save_traces; default: the data set's column, or the built-in ones")
    trace_column: str | None = arg(None, "Column of traces; default: trace, target, completion or generation")
    trace_style: Literal["teacher", "own", "self"] = arg("teacher", "Style of the built-in traces; self = sampled by the base")
    keep_wrong_traces: bool = arg(False, "Keep traces that do not grade right; otherwise they are dropped")

    trace_limit_flag = "max_completion_length"  # the flag that bounds their length, or None


# ---------------------------------------------------------------- checks


def absolute(flags):
    """The flags as a record keeps them, local files and folders by their whole paths: they are the same ones from any other folder."""
    paths = {name: flags.get(name) for name in ("model_name_or_path", "dataset_name", "eval_dataset_name", "traces")}
    return flags | {name: os.path.abspath(path) for name, path in paths.items()
                    if isinstance(path, str) and path != "tiny_model" and os.path.exists(path)}


def defaults_of_changed(args):
    """{flag: default} of the flags that do not have their default, for a record."""
    fields = {field.name: (field.default, *field.metadata.get("defaults", (None, None))) for field in dataclasses.fields(args)}
    usual = {name: plain if plain is not None else builtin if args.dataset_name is None else otherwise
             for name, (plain, builtin, otherwise) in fields.items()}
    return {name: default for name, default in usual.items() if getattr(args, name) != default}


def changed_flags(record):
    """[(flag, value, default)] of an args.json; of a run that kept no `defaults`, those of the flags that all scripts share."""
    known, flags, defaults = {field.name: field.default for field in dataclasses.fields(TraceArgs)}, record["args"], record.get("defaults")
    if not isinstance(defaults, dict):
        defaults = {name: known.get(name) for name, value in flags.items() if name not in known or value != known[name]}
    return [(name, flags.get(name), default) for name, default in defaults.items() if name != "output_dir"]


def check_bounds(args):
    """Fill in defaults that depend on the data, and refuse values outside the bounds of their flags."""
    compare = {"least": ("at least", lambda value, bound: value >= bound), "above": ("above", lambda value, bound: value > bound),
               "most": ("at most", lambda value, bound: value <= bound), "below": ("below", lambda value, bound: value < bound),
               "holds": ("text with", lambda value, bound: all(part in value for part in bound))}
    for field in dataclasses.fields(args):
        builtin, otherwise = field.metadata.get("defaults", (None, None))
        if getattr(args, field.name) is None and otherwise is not None:
            setattr(args, field.name, builtin if args.dataset_name is None else otherwise)
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if value == "" and field.name != "system_prompt":
            raise BadArgument(f"--{field.name}: expected a text, got an empty one")
        if isinstance(value, float) and math.isnan(value) or type(value) is int and abs(value) >= 2**31 and field.name != "seed":
            raise BadArgument(f"--{field.name}: expected a number{' below 2**31' * (type(value) is int)}, got {value}")
        for kind, bound in field.metadata.get("bounds", {}).items() if value is not None else ():
            words, holds = compare[kind]
            shown = " and ".join(bound) if kind == "holds" else bound
            if isinstance(bound, str):
                bound, shown = getattr(args, bound), f"--{bound} ({getattr(args, bound)})"
            if not holds(value, bound):
                raise BadArgument(f"--{field.name} must be {words} {shown}, got {value}")


def check_model_args(args):
    """Refuse flags of model, data and reward that cannot work."""
    check_bounds(args)
    for name in ("prompt_column", "answer_column", "trace_column"):
        if getattr(args, name, None) is not None and args.dataset_name is None:
            raise BadArgument(f"--{name} names a column of --dataset_name, which is not given")
    for name in ("dataset_config", "eval_dataset_name", "eval_dataset_config"):
        needed = "eval_dataset_name" if name == "eval_dataset_config" else "dataset_name"
        if getattr(args, name, None) is not None and getattr(args, needed) is None:
            raise BadArgument(f"--{name} needs --{needed}")
    if getattr(args, "trace_column", None) is not None and args.traces is not None:
        raise BadArgument("--trace_column does not go with --traces, which holds the traces")
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


def check_training_args(args):
    """Refuse flags of training that cannot work, and a folder in use."""
    if getattr(args, "num_generations", 2) < args.smallest_group and not (args.beta or args.entropy_coef):
        raise BadArgument("--num_generations 1 leaves no group to compare with: every advantage is 0; give at least 2")
    if args.warmup_steps and args.lr_scheduler_type == "constant":
        raise BadArgument("--warmup_steps needs --lr_scheduler_type constant_with_warmup, linear or cosine")
    for name in ("lora_alpha", "lora_targets"):
        if getattr(args, name) is not None and not args.lora_rank:
            raise BadArgument(f"--{name} needs --lora_rank")
    if not args.save_merged and not args.lora_rank:
        raise BadArgument("--no_save_merged needs --lora_rank")
    if args.lora_rank and args.gguf_file:
        raise BadArgument("--lora_rank does not go with --gguf_file: an adapter names its base by folder or hub id")
    if args.report_to != "none" and importlib.util.find_spec(args.report_to) is None:
        raise BadArgument(f"--report_to {args.report_to} needs the package {args.report_to}: pip install {args.report_to}")
    if args.output_dir and not args.resume_from_checkpoint:
        refuse_used_folder(Path(args.output_dir))
