"""Models: loading, the dtype they compute in, the ids that end a completion, a digest of the weights, seeds."""

import functools
import hashlib
import inspect
import math
import os
import pickle
import random
import re
from pathlib import Path

import torch
import transformers

from . import lora, ranks
from .errors import BadArgument, one_line
from .tasks import TINY_MODEL

SMALL = 10_000_000  # weights; two threads take 3 to 10 times as long as one for a step of tiny_model on cores that others use, too


def seed_everything(seed, step, stream="train"):
    """Seed torch from (seed, step, stream), so that any step can be replayed without the steps before it; each rank on its own."""
    rank = f"/{ranks.rank()}" if ranks.rank() else ""
    torch.manual_seed(random.Random(f"{seed}/{step}/{stream}{rank}").getrandbits(63))


def load_policy(args):
    """Load the model and tokenizer that a script's flags name, and check that they fit; see `load_model` and `check_fit`.

    With --lora_rank a second call with the same `args` returns the first model with its adapter off (`lora.reference`).
    """
    if hasattr(args, "adapted"):
        return lora.reference(args.adapted[0]), args.adapted[1]
    adapt = functools.partial(lora.add_adapter, args=args) if getattr(args, "lora_rank", 0) else None
    if adapt and not args.save_merged and find_base(args.model_name_or_path)[2]:
        raise BadArgument("--no_save_merged: the base is an adapter itself, and peft reads no adapter of an adapter: leave the flag out")
    model, tokenizer = load_model(args.model_name_or_path, args.attn_implementation, args.gguf_file, args.dtype, args.parallel == "fsdp",
                                  args.trust_remote_code, adapt, args.ignore_extra_weights)
    check_fit(model, tokenizer, args)
    set_threads(model, args.threads)
    model.static_cache = args.static_cache
    tokenizer.stop_ids = eos_ids(model, tokenizer)  # for traces, which are made without the model
    if adapt:
        args.adapted = model, tokenizer
    return model, tokenizer


def set_threads(model, threads):
    """Fix the CPU threads of torch: --threads, or else OMP_NUM_THREADS, 1 for a small model, or one a core."""
    number = threads or torch.get_num_threads()
    if not threads and number > 1 and "OMP_NUM_THREADS" not in os.environ and model.num_parameters() < SMALL and model.device.type == "cpu":
        print(f"1 CPU thread of {number}: the model is small; --threads sets another number")
        number = 1
    torch.set_num_threads(number)  # said aloud, the number is fixed; MKL chooses it anew for each product otherwise


def load_model(name, attn_implementation=None, gguf_file=None, dtype="auto", shard=False, trust_remote_code=False, adapt=None,
               ignore_extra_weights=False):
    """Load a causal LM and its tokenizer with nothing random. Returns (model, tokenizer); the tokenizer pads on the left.

    The weights are float32: bfloat16 would round updates of 1e-6 away. name: "tiny_model" (built in), a local folder or a hub id.
    gguf_file: a file of llama.cpp in that folder, which is dequantised. dtype: "float32", "bfloat16", or "auto", which is bfloat16 on
    a GPU that has it and else float32; `autocast` computes in it. shard: shard the model over all ranks by FSDP2. Code that comes with
    a model runs only with trust_remote_code. The adapter in a folder of peft is merged into the base that it names. adapt(model, base=its
    digest): what `lora.add_adapter` does to the model before it goes to its device.
    """
    transformers.utils.logging.disable_progress_bar()  # the scripts show their own
    name, source, adapters = find_base(name)
    if adapters and gguf_file:
        raise BadArgument("--gguf_file does not go with an adapter")
    try:
        # False, not None: None would ask at the terminal.
        options = {"gguf_file": gguf_file, "trust_remote_code": trust_remote_code}
        told = next((folder for folder, _ in adapters if lora.has_tokenizer(folder)), source)
        tokenizer = transformers.AutoTokenizer.from_pretrained(told, padding_side="left", **options)
        model, loaded = transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, attn_implementation=attn_implementation, output_loading_info=True,
            ignore_mismatched_sizes=True, **options)  # check_weights refuses them in fewer words
    except pickle.UnpicklingError as error:  # transformers reads pytorch_model.bin with weights_only
        raise BadArgument(f"--model_name_or_path {name}: its weights are refused: they are no file of plain tensors") from error
    except Exception as error:  # configs and weights of others fail in all ways; ImportError: the packages gguf and accelerate
        reason = str(error).strip() if isinstance(error, (OSError, ValueError, ImportError)) else one_line(error)
        if (Path(source) / "config.json").is_file() and not any(Path(source).glob("*token*")):
            reason = f"the folder holds a model without its tokenizer: {reason}"
        raise BadArgument(f"--model_name_or_path {name}: {(reason.splitlines() or [''])[0]}") from error
    check_weights(name, model, loaded, ignore_extra_weights)
    for folder, config in reversed(adapters):
        try:
            lora.merge_adapter(model, folder, config, weights_digest(model))
        except Exception as error:
            raise BadArgument(f"--model_name_or_path {name}: {str(error).splitlines()[0]}") from error
    if adapt is not None:
        adapt(model, base=weights_digest(model))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # harmless: masks go by position
    for module in model.modules():  # --gradient_checkpointing trains in train mode
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for rate, value in list(vars(module).items()):  # dropout, layerdrop, jitter of a router, ...
            if isinstance(value, float) and re.search("drop|jitter", rate):
                setattr(module, rate, 0.0)
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        print_once("output_router_logits is turned off: the loss that balances experts is not trained")
        model.config.get_text_config().output_router_logits = False
    device = "cuda" if torch.cuda.is_available() else "cpu"
    fast = dtype == "bfloat16" or dtype == "auto" and device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    model.compute_dtype = torch.bfloat16 if fast else torch.float32
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans every new shape anew: half the speed (results/step/h200.md)
    if fast and adapt is not None:
        lora.store_in_bfloat16(model)
    if fast and model.get_output_embeddings() is not None:
        keep_float32(model.get_output_embeddings())
    try:
        return ranks.shard(model, model.compute_dtype) if shard else model.to(device), tokenizer
    except ValueError as error:
        raise BadArgument(f"--parallel fsdp: {error}") from error


def find_base(name):
    """(words for errors, the folder or hub id that holds the model, [(source, config)] of the adapters to merge, the outermost first)."""
    words, base, adapters = name, name, []
    while True:
        path = TINY_MODEL if base == "tiny_model" else Path(base)
        if not path.is_dir() and (base.count("/") != 1 or base.startswith((".", "/", "runs/"))):
            hint = "" if "/" in base else "; a hub id has an organisation, as openai-community/gpt2"
            raise BadArgument(f"--model_name_or_path {words}: no such folder{hint}")
        source = path if path.is_dir() else base
        try:
            config = lora.read_config(source)
        except ValueError as error:
            raise BadArgument(f"--model_name_or_path {words}: {error}") from error
        if config is None:
            return words, source, adapters
        if path.is_dir() and any(path.glob("model*.safetensors")):
            raise BadArgument(f"--model_name_or_path {words}: it holds both a model and an {lora.CONFIG}: remove one of the two")
        if any(source == known for known, _ in adapters):
            raise BadArgument(f"--model_name_or_path {words}: the adapter is its own base")
        adapters.append((source, config))
        base = config["base_model_name_or_path"]
        words = f"{name}, an adapter of {base}"


def check_weights(name, model, loaded, ignore_extra=False):
    """Refuse a checkpoint that is not whole, or of another kind of model; what it lacks would be random. Tied weights may be left out.

    ignore_extra: what it has more is not loaded, and passes.
    """
    wrong = {"lacks": loaded["missing_keys"], "has in another shape": {key for key, *_ in loaded["mismatched_keys"]},
             "has more:": {key for key in loaded["unexpected_keys"] if not re.search(r"inv_freq$|(attn|attention)\.(masked_)?bias$", key)}}
    words = [f"{what} {', '.join(sorted(keys)[:3])}" + (f" and {len(keys) - 3} others" if len(keys) > 3 else "")
             for what, keys in wrong.items() if keys]
    if list(filter(None, wrong.values())) == [wrong["has more:"]]:
        if ignore_extra:
            return
        words[0] += "; --ignore_extra_weights leaves them out"
    if words:
        raise BadArgument(f"--model_name_or_path {name}: its checkpoint is not that of a {type(model).__name__} of its config.json: it "
                          f"{'; it '.join(words)}")


def check_fit(model, tokenizer, args):
    """Refuse a tokenizer that names ids which the model does not have, and a model without the parts that sampling and scoring need."""
    name, size = f"--model_name_or_path {args.model_name_or_path}", model.get_input_embeddings().weight.shape[0]
    if model.get_output_embeddings() is None:
        raise BadArgument(f"{name}: {type(model).__name__} has no head over a vocabulary")
    if args.static_cache and (args.parallel == "fsdp" or not model._can_compile_fullgraph):
        raise BadArgument(f"--static_cache: {type(model).__name__} cannot be compiled{' with --parallel fsdp' * (args.parallel == 'fsdp')}")
    if missing := {"input_ids", "attention_mask"} - inspect.signature(type(model).forward).parameters.keys():
        raise BadArgument(f"{name}: {type(model).__name__} takes no {' and no '.join(sorted(missing))}: it cannot tell padding from text")
    if tokenizer.pad_token_id is None:
        raise BadArgument(f"{name}: its tokenizer names neither a pad nor an EOS token")
    ends = eos_ids(model, tokenizer)
    for index in sorted({*ends} - {tokenizer.eos_token_id, *tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}):
        print_once(f"warning: an ordinary token, {tokenizer.convert_ids_to_tokens(index)!r}, ends completions: it is an eos_token_id of "
                   "config.json or generation_config.json")
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    named = f"{tokenizer.chat_template}{tokenizer.pad_token}{tokenizer.eos_token}{tokenizer.bos_token}"
    # A special token that no text names is harmless: Gemma 3 has one for images, and no row for it.
    beyond = sorted((index, token) for token, index in tokenizer.get_vocab().items()
                    if index >= size and (token not in special or token in named)) if len(tokenizer) > size else []
    if beyond:
        raise BadArgument(f"{name}: its tokenizer has ids up to {beyond[-1][0]} ({beyond[-1][1]}), its embedding {size} rows: resize it")
    if not any(0 <= index < size for index in ends):
        raise BadArgument(f"{name}: no EOS id of {', '.join(map(str, ends))} is one of its {size} words: nothing would end")


def max_positions(model):
    """Rows of a model's table of positions; infinite for a model that computes them."""
    tables = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Embedding)]
    tables += [name for name, _ in model.named_buffers() if "embed" in name]
    limit = getattr(model.config.get_text_config().per_layer_config[0], "max_position_embeddings", None)
    return limit if limit and any(re.search("wpe|pos", name) for name in tables) else math.inf


def check_positions(model, args, problems, trace_rows=0, stages=()):
    """Refuse rows that are longer than a model's table of positions, and say where they are longer than those it was made for.

    trace_rows and stages as in `Run`: traces are trained, or completions follow them.
    """
    limit = getattr(model.config.get_text_config().per_layer_config[0], "max_position_embeddings", None) or 0
    lengths = [(len(problem["prompt_ids"]), max(len(trace.get("trace_ids") or ()) for trace in (problem, *problem.get("other_traces", ()))))
               for problem in problems]
    longest = max((prompt + max(args.max_completion_length + trace * bool(stages), trace * bool(trace_rows)) for prompt, trace in lengths),
                  default=0)
    if not 0 < limit < longest:
        return
    words = f"{longest} tokens of prompt and completion are more than the {limit} positions of {type(model).__name__}"
    if longest > max_positions(model):
        raise BadArgument(f"--max_completion_length {args.max_completion_length}: {words} (--max_prompt_length drops longer prompts)")
    print_once(f"warning: {words}")


@functools.cache
def print_once(line):
    print(line)


def body(model):
    """The model below its head. The text model of Llama 4 names a prefix that it does not have, and so calls itself its base."""
    return model.model if model.base_model is model else model.base_model


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
    for source in (tokenizer, model.config, model.config.get_text_config(), model.generation_config):
        eos = getattr(source, "eos_token_id", None)
        named = eos if isinstance(eos, (list, tuple)) else [eos]
        if not all(each is None or type(each) is int and each >= 0 for each in named):
            raise BadArgument(f"--model_name_or_path: eos_token_id of its {type(source).__name__} is {eos!r}: expected ids")
        ids.update(named)
    if ids == {None}:
        raise BadArgument("--model_name_or_path: neither tokenizer, config nor generation_config names an EOS token: nothing would end")
    return sorted(ids - {None})


def weights_digest(model):
    """{"parameters": their number, "sha256": of names, shapes and at most 1024 evenly spaced elements, as float32, of each}.

    Hashing all elements takes seconds for a large model, and training changes nearly every element. Of a model with an adapter: those
    of its base, as they were loaded.
    """
    if lora.layers(model):
        return model.base_digest
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        values = ranks.full_tensor(parameter.detach()).flatten()
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(values[:: max(1, -(-len(values) // 1024))].float().cpu().numpy().tobytes())
    return {"parameters": model.num_parameters(), "sha256": digest.hexdigest()}
