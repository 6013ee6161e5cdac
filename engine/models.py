"""Models: loading, the dtype they compute in, the ids that end a completion, a digest of the weights, seeds."""

import hashlib
import pickle
import random
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from . import ranks
from .errors import BadArgument
from .tasks import TINY_MODEL

transformers.utils.logging.disable_progress_bar()  # the scripts show their own


def seed_everything(seed, step, stream="train"):
    """Seed torch from (seed, step, stream), so that any step can be replayed without the steps before it; each rank on its own."""
    rank = f"/{ranks.rank()}" if ranks.rank() else ""
    torch.manual_seed(random.Random(f"{seed}/{step}/{stream}{rank}").getrandbits(63))


def load_policy(args):
    """Load the model and tokenizer that a script's flags name; see `load_model`."""
    return load_model(args.model_name_or_path, args.attn_implementation, args.gguf_file, args.dtype, args.parallel == "fsdp",
                      args.trust_remote_code)


def load_model(name, attn_implementation=None, gguf_file=None, dtype="auto", shard=False, trust_remote_code=False):
    """Load a causal LM and its tokenizer with dropout off. Returns (model, tokenizer); the tokenizer pads on the left.

    The weights are float32: bfloat16 would round updates of 1e-6 away. name: "tiny_model" (built in), a local folder or a hub id.
    gguf_file: a file of llama.cpp in that folder, which is dequantised. dtype: "float32", "bfloat16", or "auto", which is bfloat16 on
    a GPU that has it and else float32; `autocast` computes in it. shard: shard the model over all ranks by FSDP2. Code that comes with
    a model runs only with trust_remote_code.
    """
    path = TINY_MODEL if name == "tiny_model" else Path(name)
    if not path.is_dir() and (name.count("/") != 1 or name.startswith((".", "/", "runs/"))):
        raise BadArgument(f"--model_name_or_path {name}: no such folder")
    try:
        # False, not None: None would ask at the terminal.
        options = {"gguf_file": gguf_file, "trust_remote_code": trust_remote_code}
        tokenizer = AutoTokenizer.from_pretrained(path if path.is_dir() else name, padding_side="left", **options)
        model = AutoModelForCausalLM.from_pretrained(
            path if path.is_dir() else name, dtype=torch.float32, attn_implementation=attn_implementation, **options)
    except pickle.UnpicklingError as error:  # transformers reads pytorch_model.bin with weights_only
        raise BadArgument(f"--model_name_or_path {name}: its weights are refused: they are no file of plain tensors") from error
    except (OSError, ValueError, ImportError) as error:  # ImportError: the packages gguf and accelerate
        reason = str(error).strip().splitlines()[0]
        if (path / "config.json").is_file() and not any(path.glob("*token*")):
            reason = f"the folder holds a model without its tokenizer: {reason}"
        raise BadArgument(f"--model_name_or_path {name}: {reason}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # harmless: masks go by position
    for module in model.modules():  # sampled and re-scored log-probs must agree
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    fast = dtype == "bfloat16" or dtype == "auto" and device == "cuda" and torch.cuda.is_bf16_supported()
    model.compute_dtype = torch.bfloat16 if fast else torch.float32
    if fast and model.get_output_embeddings() is not None:
        keep_float32(model.get_output_embeddings())
    try:
        return ranks.shard(model, model.compute_dtype) if shard else model.to(device), tokenizer
    except ValueError as error:
        raise BadArgument(f"--parallel fsdp: {error}") from error


def compute_dtype(model):
    """The dtype that `autocast` computes in; float32 for a model that did not come from `load_model`."""
    return getattr(model, "compute_dtype", torch.float32)


def autocast(model):
    """Context in which the float32 `model` computes in its `compute_dtype`."""
    return torch.autocast(model.device.type, compute_dtype(model), enabled=compute_dtype(model) != torch.float32)


def keep_float32(head):
    """Compute the head in float32 also under autocast.

    Logits rounded to bfloat16 nearly double the distance between the sampled and the scored distribution (tests/test_dtype.py).
    """
    forward = head.forward

    def float32_forward(hidden):
        with torch.autocast(hidden.device.type, enabled=False):
            return forward(hidden.float())

    head.forward = float32_forward


def eos_ids(model, tokenizer):
    """Every id that ends a completion: the union of tokenizer, config and generation_config, which often disagree."""
    ids = set()
    for eos in (tokenizer.eos_token_id, model.config.eos_token_id, model.generation_config.eos_token_id):
        ids.update(eos if isinstance(eos, (list, tuple)) else [eos])
    if ids == {None}:
        raise BadArgument("--model_name_or_path: neither tokenizer, config nor generation_config names an EOS token: nothing would end")
    return sorted(ids - {None})


def weights_digest(model):
    """{"parameters": their number, "sha256": of names, shapes and at most 1024 evenly spaced elements, as float32, of each}.

    Hashing all elements takes seconds for a large model, and training changes nearly every element.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        values = ranks.full_tensor(parameter.detach()).flatten()
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(values[:: max(1, -(-len(values) // 1024))].float().cpu().numpy().tobytes())
    return {"parameters": model.num_parameters(), "sha256": digest.hexdigest()}
