"""LoRA: small trained adapters beside frozen weights, by the package peft, which is imported where it is used.

A linear layer W x becomes W x + alpha / rank B A x [LoRA, arXiv 2106.09685v2 sec 4.1]. W is frozen; A (rank, in) is random and
B (out, rank) is 0 at first, so that a fresh adapter changes nothing. A and B and their moments are float32, without dropout.
"""

import contextlib
import importlib
import json
import os
import random
import re
import warnings
from pathlib import Path

import safetensors.torch
import torch
import transformers

from . import ranks
from .errors import BadArgument, RunError, one_line

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FILES = CONFIG, WEIGHTS, "base.json"
# What peft is told of an adapter's config. Other keys that are set, but for UNUSED ones, make it more than plain LoRA.
READ = ("r", "lora_alpha", "target_modules", "exclude_modules", "fan_in_fan_out", "use_rslora", "layers_to_transform", "layers_pattern",
        "rank_pattern", "alpha_pattern")
UNUSED = ("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "inference_mode", "lora_dropout",
          "megatron_core", "qalora_group_size", "init_lora_weights")
EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")  # peft takes layers of these names for the experts of a model
INITS = (None, True, False, "gaussian", "orthogonal", "eva")  # others change the base, too


def layers(model):
    """{name: layer} of the adapted layers of a model; {} without an adapter."""
    return getattr(model, "lora_layers", {})


def read_config(source):
    """The adapter_config.json of a local folder or hub id; None for a model that is no adapter. Raises ValueError for another kind."""
    file = transformers.utils.peft_utils.find_adapter_config_file(str(source))
    if file is None:
        return None
    try:
        with open(file, encoding="utf-8") as text:
            config = json.load(text)
        kind, base = config["peft_type"], config["base_model_name_or_path"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"its {CONFIG} cannot be read: {one_line(error)}") from error
    odd = [key for key, value in config.items() if key not in READ + UNUSED and value not in (None, False, "none", [], {})]
    if kind != "LORA" or odd or config.get("init_lora_weights", True) not in INITS:
        odd = odd or ["peft_type" if kind != "LORA" else "init_lora_weights"]
        raise ValueError(f"its {CONFIG} has {odd[0]} = {config[odd[0]]}: only plain LoRA is read")
    if not isinstance(base, str) or not base:
        raise ValueError(f"its {CONFIG} names no base_model_name_or_path")
    return config


def has_tokenizer(source):
    """Does an adapter's folder or hub id hold a tokenizer of its own, such as one with the chat template that it was trained with?"""
    return transformers.utils.cached_file(str(source), "tokenizer_config.json", _raise_exceptions_for_missing_entries=False,
                                          _raise_exceptions_for_connection_errors=False) is not None


def linear_types():
    """The classes of linear layers."""
    return torch.nn.Linear, transformers.pytorch_utils.Conv1D


def linear_layers(model):
    """The names that all-linear stands for: linear layers of the language model, without head, routers and experts."""
    inside, head = set(model.get_decoder().modules()), model.get_output_embeddings()
    names = EXPERTS if any(name.endswith(".experts") for name, _ in model.named_modules()) else ()
    return [name for name, module in model.named_modules() if type(module) in linear_types() and module in inside
            and module is not head and name.rpartition(".")[2] not in names]


def inject(model, **settings):
    """Put an adapter beside the layers that `settings` of peft's LoraConfig name, and freeze the rest; returns peft's LoraModel.

    Raises ValueError when nothing is adapted, or something else than the linear layers below the head.
    """
    try:
        peft = importlib.import_module("peft")
    except ImportError as error:
        raise ValueError(f"LoRA needs the package peft: pip install peft ({error})") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # GPT-2's Conv1D, which peft knows how to turn
        tuner = peft.LoraModel(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings), "default")
    model.lora_layers = {name: module for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}
    for name, layer in model.lora_layers.items():
        if not isinstance(layer.base_layer, linear_types()) or layer is model.get_output_embeddings():
            raise ValueError(f"{name} is not a linear layer below the head")
    return tuner


def add_adapter(model, args, base):
    """Adapt a model that is still on the CPU as --lora_rank, --lora_alpha and --lora_targets say. base: its digest, for the files."""
    targets = args.lora_targets or ["all-linear"]
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(random.Random(f"{args.seed}/lora").getrandbits(63))  # the same on every rank
            tuner = inject(model, r=args.lora_rank, lora_alpha=args.lora_alpha or 2 * args.lora_rank,
                           target_modules=linear_layers(model) if targets == ["all-linear"] else targets)
        missing = [target for target in targets if targets != ["all-linear"] and not any(
            f".{name}".endswith(f".{target}") for name in model.lora_layers)]
        if missing:
            raise ValueError(f"no layer is called {missing[0]}")
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise BadArgument(f"--lora_rank {args.lora_rank} --lora_targets {' '.join(targets)}: {reason}") from error
    config = tuner.peft_config["default"]
    config.target_modules, config.base_model_name_or_path = sorted(config.target_modules), args.model_name_or_path
    if Path(args.model_name_or_path).is_dir() and args.model_name_or_path != "tiny_model":
        config.base_model_name_or_path = os.path.abspath(args.model_name_or_path)
    model.base_digest = base
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    print(f"LoRA: {len(model.lora_layers)} layers of {type(model).__name__} have an adapter; {trained:,} weights are trained")


def merge_adapter(model, source, config, base):
    """Add the adapter of a folder or hub id to the weights of a model. Raises ValueError when it is not one for this model."""
    free = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tuner = inject(model, **{key: config[key] for key in READ if key in config})
    load_adapter(model, transformers.utils.cached_file(str(source), WEIGHTS), base)
    tuner.merge_and_unload(safe_merge=True)
    del model.lora_layers
    for parameter in free:
        parameter.requires_grad_(True)


def store_in_bfloat16(model):
    """Round the frozen weights that autocast rounds at each use: those of linear layers and experts, not of embeddings and head."""
    kept = {id(part) for module in (model.get_input_embeddings(), model.get_output_embeddings()) for part in module.parameters()}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            linear = isinstance(module, linear_types()) or parameter.dim() == 3 and name.endswith("experts")
            if linear and id(parameter) not in kept and not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()


def reference(model):
    """A second handle on the same model, which samples and scores with the adapter off: the policy before training, without a copy.

    The adapter is off inside `generate` and `score_completions` (`ranks.inside_fsdp_forward`).
    """
    @contextlib.contextmanager
    def adapter_off(model):
        for name, layer in layers(model).items():
            model.set_submodule(name, layer.base_layer)
        try:
            yield
        finally:
            for name, layer in layers(model).items():
                model.set_submodule(name, layer)

    handle = object.__new__(type(type(model).__name__, (type(model),), {"as_reference": adapter_off}))
    handle.__dict__ = model.__dict__
    return handle


# ---------------------------------------------------------------- files


def parameter_names(model):
    """{name of a tensor in peft's files: name of the parameter} of the adapter."""
    return {"base_model.model." + re.sub(r"(lora_[AB])\.default", r"\1", name): name
            for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_adapter(folder, model, weights):
    """Write peft's two files, from whole weights {parameter: tensor}, and base.json, the digest of the base."""
    model.peft_config["default"].save_pretrained(folder)
    tensors = {stored: weights[name].contiguous() for stored, name in parameter_names(model).items()}
    safetensors.torch.save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    (folder / "base.json").write_text(json.dumps(model.base_digest))


def load_adapter(model, file, base):
    """Load `save_adapter`'s or peft's tensors in place. Raises ValueError when they, or their base, are not those of the model."""
    names, weights, trained_on = parameter_names(model), safetensors.torch.load_file(file), Path(file).with_name("base.json")
    wrong = names.keys() ^ weights.keys() or {
        stored for stored, name in names.items() if model.get_parameter(name).shape != weights[stored].shape}
    if wrong:
        raise ValueError(f"{WEIGHTS} is of another base or other layers: {min(wrong)} of {len(wrong)} differs")
    if trained_on.is_file() and json.loads(trained_on.read_text())["sha256"] != base["sha256"]:
        raise ValueError(f"{WEIGHTS} was trained on other weights than this base's")
    ranks.set_weights(model, {name: weights[stored] for stored, name in names.items()})


def idle_layers(model, weights):
    """The names of adapted layers that no gradient has reached, whose B is still 0."""
    return [name for name in layers(model) if not weights[f"{name}.lora_B.default.weight"].any()]


def report_idle(model, weights):
    """Say how many layers have learnt nothing."""
    if idle := idle_layers(model, weights):
        print(f"LoRA: {len(idle)} of {len(layers(model))} layers have an adapter that no gradient has reached, such as {idle[0]}")


def merged(model, weights):
    """The whole weights {name: tensor} of an ordinary model, float32 on the CPU, from those of an adapted one.

    Raises RunError when an adapter that has been trained changes no weight.
    """
    weights = {name: weight.cpu().float() if weight.is_floating_point() else weight.cpu() for name, weight in weights.items()}
    trained, changed = len(idle_layers(model, weights)) < len(layers(model)), False
    for name, layer in layers(model).items():
        a, b = (weights.pop(f"{name}.lora_{part}.default.weight") for part in "AB")  # (rank, in), (out, rank)
        delta = layer.scaling["default"] * (b @ a)  # (out, in)
        before = weights[f"{name}.base_layer.weight"]
        weights[f"{name}.base_layer.weight"] = before + (delta.t() if isinstance(layer.base_layer, linear_types()[1]) else delta)
        changed = changed or not torch.equal(before, weights[f"{name}.base_layer.weight"])
    if trained and not changed:
        raise RunError("the merged model equals its base, though the adapter was trained: its steps are too small for float32")
    return {name.replace(".base_layer.", "."): weight for name, weight in weights.items()}
