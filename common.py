"""What none of the papers changes: tokens, sampling, scoring, evaluation, FLOPs.

The scripts take this file, data.py and runs.py on trust; each function has its test in `tests/`. Two rules hold throughout: nothing is
drawn from a random state that is not a function of (seed, step), and nothing fails quietly.
"""

import copy
import functools
import hashlib
import json
import math
import pickle
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig, StoppingCriteria

import parallel
import tasks
from logprob import choose_impl, token_logps
from reward import REWARDS, answer_key, grade_all, math_timeouts

transformers.utils.logging.disable_progress_bar()  # the scripts show their own

# ---------------------------------------------------------------- errors


class BadArgument(Exception):
    """A flag, file or column is wrong: one line on stderr, exit code 2."""


class RunError(Exception):
    """The run cannot go on: one line on stderr, exit code 1."""


def printable(text):
    """Text that is safe on a terminal: control characters, which may carry escape codes, are shown as \\x.. codes."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


# ---------------------------------------------------------------- model and tokens


def seed_everything(seed, step, stream="train"):
    """Seed torch from (seed, step, stream), so that any step can be replayed without the steps before it; each rank on its own."""
    rank = f"/{parallel.rank()}" if parallel.rank() else ""
    torch.manual_seed(random.Random(f"{seed}/{step}/{stream}{rank}").getrandbits(63))


def load_policy(args):
    """`load_model` by a script's flags."""
    return load_model(args.model_name_or_path, args.attn_implementation, args.gguf_file, args.dtype, args.parallel == "fsdp",
                      args.trust_remote_code)


def load_model(name, attn_implementation=None, gguf_file=None, dtype="auto", shard=False, trust_remote_code=False):
    """Load a causal LM and its tokenizer in float32 (master weights: bf16 would round 1e-6 updates away), dropout off.

    name: "tiny_model" (built in), a local folder or a hub id; gguf_file: a file of llama.cpp in it, which is dequantised; dtype: what
    `autocast` computes in: "float32", "bfloat16", or "auto", bfloat16 on a GPU that has it and else float32; shard: over all ranks, by
    FSDP2. Nothing that comes with a model is run, unless trust_remote_code. Returns (model, tokenizer); the tokenizer pads on the left.
    """
    path = tasks.TINY_MODEL if name == "tiny_model" else Path(name)
    if not path.is_dir() and (name.count("/") != 1 or name.startswith((".", "/", "runs/"))):
        raise BadArgument(f"--model_name_or_path {name}: no such folder")
    try:
        # False, not None: that would ask at the terminal.
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
        return parallel.shard(model, model.compute_dtype) if shard else model.to(device), tokenizer
    except ValueError as error:
        raise BadArgument(f"--parallel fsdp: {error}") from error


def autocast(model):
    """Context in which the float32 `model` computes in the dtype that `load_model` was told."""
    return torch.autocast(model.device.type, compute_dtype(model), enabled=compute_dtype(model) != torch.float32)


def compute_dtype(model):
    """What `autocast` computes in; float32 for a model that did not come from `load_model`."""
    return getattr(model, "compute_dtype", torch.float32)


def keep_float32(head):
    """Compute the head in float32 also under autocast: logits rounded to bfloat16 nearly double the distance between the
    distribution that is sampled from and the one that is scored (tests/test_dtype.py)."""
    forward = head.forward

    def float32_forward(hidden):
        with torch.autocast(hidden.device.type, enabled=False):
            return forward(hidden.float())

    head.forward = float32_forward


def weights_digest(model):
    """{"parameters": their number, "sha256": of names, shapes and at most 1024 evenly spaced elements, as float32, of each}.

    Not all elements: that takes seconds for a large model, and training changes nearly every one.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        values = parallel.full_tensor(parameter.detach()).flatten()
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(values[:: max(1, -(-len(values) // 1024))].float().cpu().numpy().tobytes())
    return {"parameters": model.num_parameters(), "sha256": digest.hexdigest()}


def eos_ids(model, tokenizer):
    """Every id that ends a completion: the union of tokenizer, config and generation_config, which often disagree."""
    ids = set()
    for eos in (tokenizer.eos_token_id, model.config.eos_token_id, model.generation_config.eos_token_id):
        ids.update(eos if isinstance(eos, (list, tuple)) else [eos])
    if ids == {None}:
        raise BadArgument("--model_name_or_path: neither tokenizer, config nor generation_config names an EOS token: nothing would end")
    return sorted(ids - {None})


INSTRUCTIONS = dict(  # system message of the templates that bring one
    r1="This is a conversation between User and Assistant. User asks a question and Assistant solves it. Assistant thinks first, between "
       "<think> and </think>, and then gives User the answer between <answer> and </answer>, with the final result in \\boxed{}.",
    qwen_math="Please reason step by step, and put your final answer within \\boxed{}.")


def render_prompt(tokenizer, prompt, template="auto", system_prompt=None):
    """Prompt as the text that the model reads.

    prompt: a string, or messages [{"role", "content"}, ...] that end with the user's. A system message of their own stays; otherwise
    they get `system_prompt`, or the template's instruction. template: "chat", the tokenizer's own; "none", the contents joined by
    newlines; "auto", chat if there is one, else none; "r1", the text for base models of DeepSeek-R1-Zero [arXiv 2501.12948 table 1],
    which leaves the completion to begin inside <think>; "qwen_math", the chat layout of Qwen2.5-Math, for tokenizers that lack it.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if template == "auto":
        template = "chat" if tokenizer.chat_template else "none"
    system_prompt = system_prompt or INSTRUCTIONS.get(template)
    if system_prompt and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system_prompt}, *messages]
    if template == "r1":
        speakers = {"system": "", "user": "User: ", "assistant": "Assistant: "}
        return "\n".join([speakers[turn["role"]] + turn["content"] for turn in messages] + ["Assistant: <think>"])
    if template == "qwen_math":
        return "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in messages) + "<|im_start|>assistant\n"
    if template == "none":
        return "\n".join(turn["content"] for turn in messages)
    if not tokenizer.chat_template:
        raise BadArgument("--template chat: the tokenizer has no chat template; use --template none")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:  # Gemma's, say, knows no system message
        roles = ", ".join(turn["role"] for turn in messages)
        raise BadArgument(f"the chat template refuses messages of {roles}: {error}; use another --template") from error


def encode_prompt(tokenizer, text):
    """Rendered prompt -> token ids, BOS exactly once where the tokenizer adds one (templates may have written it already)."""
    ids, bos = tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.bos_token_id
    if bos is not None and ids[:1] != [bos] and tokenizer("a")["input_ids"][:1] == [bos]:
        ids = [bos] + ids
    return ids


def left_pad(sequences, pad_id, device):
    """Token id lists -> (ids, mask), both (B, P) with P the longest; padding on the left, mask bool True on tokens."""
    longest = max(len(ids) for ids in sequences)
    ids = [[pad_id] * (longest - len(ids)) + list(ids) for ids in sequences]
    mask = [[False] * (longest - len(ids)) + [True] * len(ids) for ids in sequences]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def completion_mask(completion_ids, eos_ids):
    """(B, T) ids -> (B, T) bool: True up to and including the first EOS.

    By position, never by value: where pad equals eos, a mask by value would never train the model to stop (tests/test_masks.py).
    """
    is_eos = torch.isin(completion_ids, torch.tensor(eos_ids, device=completion_ids.device))  # (B, T)
    return is_eos.int().cumsum(dim=1) - is_eos.int() == 0


def completion_texts(tokenizer, completion_ids, mask, eos_ids):
    """Decode completions up to, not including, their EOS. Returns (texts, ended): ended[i] is False when a row was cut off."""
    texts, ended = [], []
    for ids, row_mask in zip(completion_ids.tolist(), mask.tolist()):
        ids = ids[: sum(row_mask)]
        ended.append(bool(ids) and ids[-1] in eos_ids)
        texts.append(tokenizer.decode(ids[:-1] if ended[-1] else ids, skip_special_tokens=True))
    return texts, ended


@parallel.whole
def sample(model, prompt_ids, prompt_mask, eos_ids, pad_id, max_new_tokens, temperature=1.0, top_p=1.0, batch_size=256, with_logps=False):
    """Sample one completion per row with HF generate. Returns (completion_ids, completion_mask), both (B, T).

    temperature 0 is greedy. At most `batch_size` rows a call; each rank samples its share of the rows and returns those of all.
    `with_logps` adds the log-probs (B, T) that generate itself drew from, at a cost of (B, T, V) memory. While it runs, the model's own
    generation_config is put aside: generate fills every unset field from it, so an instruct model's top_k or repetition_penalty would
    change the policy unseen; what is unset there too comes from global defaults, where top_k is 50 (tests/test_sampling.py).
    """
    generation_config = GenerationConfig(
        do_sample=temperature > 0, temperature=temperature or 1.0, top_p=top_p, top_k=0, typical_p=1.0, num_beams=1,
        repetition_penalty=1.0, no_repeat_ngram_size=0, max_new_tokens=max_new_tokens, eos_token_id=eos_ids, pad_token_id=pad_id,
        use_cache=True, return_dict_in_generate=True, output_scores=with_logps)
    own_config, was_training = model.generation_config, model.training
    model.generation_config = generation_config
    model.eval()
    ids, logps, share = [], [], parallel.share(len(prompt_ids))
    idle = share.start == share.stop
    if idle:  # fewer rows than ranks: sample one all the same, for the collective calls in it
        share = slice(0, 1)
    reason = special_cache(model)
    if reason and not with_logps:
        print_once(f"{type(model).__name__} goes on computing rows that have ended: {reason}")
    try:
        with torch.no_grad(), autocast(model), parallel.gathered_once(model):
            for chunk_ids, chunk_mask in zip(prompt_ids[share].split(batch_size), prompt_mask[share].split(batch_size)):
                # Not synced: ranks call generate and the model as often as their own rows need, for layers once gathered stay so.
                if not (reason or with_logps):
                    ids.append(generate_in_waves(model, chunk_ids, chunk_mask, generation_config))
                    continue
                output = model.generate(
                    input_ids=chunk_ids, attention_mask=chunk_mask.long(), generation_config=generation_config,
                    cache=prefilled(model, chunk_ids, chunk_mask), synced_gpus=False)
                ids.append(output.sequences[:, chunk_ids.shape[1] :])
                if with_logps:
                    log_probs = torch.stack(output.scores, dim=1).float().log_softmax(-1)  # (b, T, V)
                    logps.append(log_probs.gather(-1, ids[-1].unsqueeze(-1)).squeeze(-1))
    finally:
        model.generation_config = own_config
        model.train(was_training)
    completion_ids = right_pad(parallel.gather([] if idle else ids), pad_id).to(prompt_ids.device)
    mask = completion_mask(completion_ids, eos_ids)
    if not with_logps:
        return completion_ids, mask
    return completion_ids, mask, right_pad(parallel.gather([] if idle else logps), 0.0).to(prompt_ids.device)


class FewLeft(StoppingCriteria):
    """Stop a generate of more than 8 rows when no more than three quarters of them go on."""

    def __init__(self, num_rows, eos_ids):
        self.ended, self.eos_ids = torch.zeros(num_rows, dtype=torch.bool, device=eos_ids.device), eos_ids

    def __call__(self, input_ids, scores, **kwargs):
        self.ended |= torch.isin(input_ids[:, -1], self.eos_ids)  # (b,)
        few = (4 * (~self.ended).sum() <= 3 * len(self.ended)) & (len(self.ended) > 8)  # () bool, on the device: nothing waits for it
        return few.expand(len(self.ended))  # (b,)


def generate_in_waves(model, prompt_ids, prompt_mask, config):
    """Completions (B, T) of prompts (B, P) by calls of generate, each for the rows that have not ended yet, with their keys and values.

    generate computes every row until the longest has ended, and most rows end long before it. What is drawn from is the same; a seed
    draws other tokens than in one call, since fewer rows share the stream of random numbers (tests/test_sampling.py).
    """
    config, width, eos_ids = copy.copy(config), prompt_ids.shape[1], torch.tensor(config.eos_token_id, device=prompt_ids.device)
    longest = width + config.max_new_tokens
    completion_ids = prompt_ids.new_full((len(prompt_ids), config.max_new_tokens), config.pad_token_id)  # (B, max_new_tokens)
    rows, ids, mask = torch.arange(len(prompt_ids), device=prompt_ids.device), prompt_ids, prompt_mask.long()
    cache = prefilled(model, prompt_ids, prompt_mask)
    while len(rows) and ids.shape[1] < longest:
        config.max_new_tokens = longest - ids.shape[1]
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, cache=cache,
                                stopping_criteria=[FewLeft(len(rows), eos_ids)], synced_gpus=False)
        completion_ids[rows, : output.sequences.shape[1] - width] = output.sequences[:, width:]
        # A row goes on if it has no EOS; then all of its new tokens are real ones.
        going_on = ~torch.isin(output.sequences[:, width:], eos_ids).any(dim=1)  # (b,)
        mask = torch.nn.functional.pad(mask, (0, output.sequences.shape[1] - ids.shape[1]), value=1)[going_on]
        rows, ids, cache = rows[going_on], output.sequences[going_on], output.cache
        cache.batch_select_indices(going_on)
    return completion_ids[:, : int(completion_mask(completion_ids, config.eos_token_id).sum(1).max())]


def prefilled(model, prompt_ids, prompt_mask):
    """The cache of all but the last token of some prompts (B, P), each different one computed once; None where that saves too little."""
    prompts, width = distinct_prompts(model, prompt_ids, prompt_mask), prompt_ids.shape[1] - 1  # (B,), ()
    num_prompts = int(prompts.max()) + 1
    if tokens_computed(num_prompts, len(prompts), width, 1) == len(prompts) * (width + 1):
        return None
    rows = torch.empty_like(prompts[:num_prompts]).scatter_(0, prompts, torch.arange(len(prompts), device=prompts.device))
    cache, attention_mask = DynamicCache(config=model.config.get_text_config(decoder=True)), prompt_mask[rows, :-1].long()
    model.base_model(input_ids=prompt_ids[rows, :-1], attention_mask=attention_mask, cache=cache, use_cache=True,
                     position_ids=(attention_mask.cumsum(dim=1) - 1).clamp(min=0))
    cache.batch_select_indices(prompts)
    return cache


def right_pad(chunks, value):
    """Stack tensors (b_i, T_i) into one (sum b_i, max T_i), filled with `value` on the right."""
    longest = max(chunk.shape[1] for chunk in chunks)
    return torch.cat([torch.nn.functional.pad(chunk, (0, longest - chunk.shape[1]), value=value) for chunk in chunks])


def micro_batches(model, batch, rows, micro_batch_size, micro_batch_tokens):
    """Cut some rows of a batch, given as indices (b,), into micro-batches: list of index tensors, this rank's share of them.

    `micro_batch_size` rows each, or, when that is 0, as many as keep the tokens that a forward pass computes (`tokens_computed`) within
    `micro_batch_tokens`, at least one row. Of two orders, by length, which pads least, and prompt by prompt, which shares most, it
    takes the one that computes fewer tokens. Rows are dealt to the ranks in that order; every rank gets the same number of
    micro-batches, the last ones empty (see `trim`), so that the ranks stay in step.
    """
    if not len(rows):
        return []
    widths, lengths = batch.prompt_mask[rows].sum(1).tolist(), batch.completion_mask[rows].sum(1).tolist()  # (b,) each
    prompts = distinct_prompts(model, batch.prompt_ids[rows], batch.prompt_mask[rows]).tolist()  # (b,)
    by_length = sorted(range(len(prompts)), key=lambda row: -(widths[row] + lengths[row]))
    by_prompt = sorted(by_length, key=lambda row: (-widths[row], prompts[row]))
    cuts, ranks = [], parallel.world_size()
    for order in (by_length, by_prompt):
        dealt, computed = [], 0
        for rank in range(ranks):
            batches, tokens = [], 0
            for row in order[rank::ranks]:
                grown = [*batches[-1], row] if batches else [row]
                num_prompts = len({prompts[i] for i in grown})
                wider = tokens_computed(num_prompts, len(grown), max(widths[i] for i in grown), max(lengths[i] for i in grown))
                if batches and (len(grown) <= micro_batch_size if micro_batch_size else wider <= micro_batch_tokens):
                    computed += wider - tokens
                    batches[-1], tokens = grown, wider
                else:
                    batches.append([row])
                    tokens = widths[row] + lengths[row]
                    computed += tokens
            dealt.append(batches)
        cuts.append((computed, dealt))
    dealt = min(cuts, key=lambda cut: cut[0])[1]
    own, most = dealt[parallel.rank()], max(map(len, dealt))
    return [rows[torch.tensor(picked, dtype=torch.int64, device=rows.device)] for picked in own + [[]] * (most - len(own))]


def tokens_computed(num_prompts, num_rows, width, length):
    """Padded tokens that a forward pass over rows of `num_prompts` different prompts computes; width and length are the longest.

    Rows of the same prompt compute it once if that saves at least a quarter: repeating its keys and values and a second, smaller
    forward pass cost something, too (results/step/).
    """
    plain, shared = num_rows * (width + length), num_prompts * width + num_rows * length
    return shared if shared <= 0.75 * plain else plain


def distinct_prompts(model, prompt_ids, prompt_mask):
    """Number each row's prompt (B, P): (B,) int64, equal for equal prompts, or all different where `model` cannot share them.

    Sharing needs a cache that holds keys and values of every token, and a model that is not sharded: each forward pass of that one is
    a collective call, and ranks do not share equally often. What prevents it is printed once.
    """
    prompts = torch.unique(torch.cat([prompt_ids, prompt_mask], dim=1), dim=0, return_inverse=True)[1]  # (B,)
    cache = special_cache(model)
    reasons = {"a sharded model": parallel.is_sharded(model), cache: bool(cache),
               "no cache with --gradient_checkpointing": model.is_activation_checkpointing}
    if prompts.max() + 1 == len(prompts) or not any(reasons.values()):
        return prompts
    holding = ", ".join(reason for reason, holds in reasons.items() if holds)
    print_once(f"{type(model).__name__} computes the prompt of each row anew: {holding}")
    return torch.arange(len(prompts), device=prompts.device)


def special_cache(model):
    """Why rows of the model's cache cannot be picked and repeated, in words; "" where it holds keys and values of every token."""
    if not model._supports_default_dynamic_cache():
        return "it has a cache of its own"
    layers = {type(layer).__name__ for layer in DynamicCache(config=model.config.get_text_config(decoder=True)).layers}
    return "" if layers == {"DynamicLayer"} else f"its cache has {', '.join(sorted(layers))}"


@functools.cache
def print_once(line):
    print(line)


def trim(batch, rows):
    """Some rows of a batch without the padding that none of them needs: (prompt_ids, prompt_mask), (completion_ids, completion_mask).

    For no rows, one token of row 0 with an empty completion mask: what broadcasts against it, of shape (0, 1), is empty, and so its loss
    and gradient are 0, but model and collective calls run.
    """
    if not len(rows):
        rows = torch.zeros(1, dtype=torch.int64, device=batch.prompt_mask.device)
        return (batch.prompt_ids[rows], batch.prompt_mask[rows]), (batch.completion_ids[rows, :1], batch.completion_mask[rows, :1] & False)
    width = int(batch.prompt_mask[rows].sum(1).max())
    length = int(batch.completion_mask[rows].sum(1).max())
    return ((batch.prompt_ids[rows, -width:], batch.prompt_mask[rows, -width:]),
            (batch.completion_ids[rows, :length], batch.completion_mask[rows, :length]))


@parallel.whole
def policy_logps(model, prompt_ids, prompt_mask, completion_ids, completion_mask, temperature=1.0, impl="auto"):
    """Score given completions: log pi(o_t | q, o_<t) and the entropy of pi(. | q, o_<t), both at `temperature`.

    prompt_ids, prompt_mask (B, P) left-padded; completion_ids, completion_mask (B, T) right-padded, T >= 1.
    Returns (logps, entropy), each (B, T) float32 in nats and 0 where completion_mask is False. Gradients flow through both.
    The policy is what is sampled, so its logits are divided by the sampling temperature (tests/test_masks.py). "reference" takes
    the model's own logits; the others take its hidden states and `lm_head`, at completion positions only.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    impl = choose_impl(impl, model.get_output_embeddings().weight.shape[0], prompt_ids.device.type)
    outputs = predictions(model, impl == "reference", prompt_ids, prompt_mask, completion_ids, completion_mask)  # (B, T, V) or (B, T, H)
    if impl == "reference":
        log_probs = torch.log_softmax(outputs.float() / temperature, dim=-1)  # (B, T, V) float32
        logps = log_probs.gather(-1, completion_ids.unsqueeze(-1)).squeeze(-1)  # (B, T) float32
        entropy = -(log_probs.exp() * log_probs).sum(-1)  # (B, T) float32
        return logps.masked_fill(~completion_mask, 0.0), entropy.masked_fill(~completion_mask, 0.0)
    with autocast(model):
        logps, entropy = token_logps(
            outputs[completion_mask], labels=completion_ids[completion_mask], temperature=temperature, impl=impl, **lm_head(model))  # (N,)
    zeros = torch.zeros(completion_ids.shape, device=outputs.device)  # (B, T) float32
    return zeros.masked_scatter(completion_mask, logps), zeros.masked_scatter(completion_mask, entropy)


def predictions(model, logits, prompt_ids, prompt_mask, completion_ids, completion_mask):
    """The model's logits (B, T, V), or else its hidden states (B, T, H), at the positions that predict the completions.

    Where it saves enough (`tokens_computed`) each different prompt is computed once, and its keys and values are repeated for its rows;
    gradients flow through them (tests/test_invariance.py).
    """
    (num_rows, width), length = prompt_ids.shape, completion_ids.shape[1]
    attention_mask = torch.cat([prompt_mask, completion_mask], dim=1).long()  # (B, P+T)
    # Learned positions shift under left padding unless they are passed; RoPE hides the mistake (tests/test_masks.py).
    position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)  # (B, P+T)

    def last(keep, input_ids, attention_mask, position_ids, cache=None):
        inputs = dict(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, cache=cache,
                      use_cache=cache is not None)
        with autocast(model):
            return model(**inputs, logits_to_keep=keep).logits if logits else model.base_model(**inputs).last_hidden_state[:, -keep:]

    prompts = distinct_prompts(model, prompt_ids, prompt_mask)  # (B,)
    num_prompts = int(prompts.max()) + 1
    if tokens_computed(num_prompts, num_rows, width, length) == num_rows * (width + length):
        input_ids = torch.cat([prompt_ids, completion_ids], dim=1)  # (B, P+T)
        return last(length + 1, input_ids, attention_mask, position_ids)[:, :-1]  # P-1+t predicts token t
    rows = torch.empty_like(prompts[:num_prompts]).scatter_(0, prompts, torch.arange(num_rows, device=prompts.device))  # one of each prompt
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    first = last(1, prompt_ids[rows], attention_mask[rows, :width], position_ids[rows, :width], cache)[prompts]  # (B, 1, .)
    if length == 1:
        return first
    cache.batch_select_indices(prompts)
    rest = last(length - 1, completion_ids[:, :-1], attention_mask[:, :-1], position_ids[:, width:-1], cache)  # (B, T-1, .)
    return torch.cat([first, rest], dim=1)


def lm_head(model):
    """weight, bias, softcap and logit_scale of a HF causal LM's head, read from its module and config.

    Heads that transform the logits in ways unknown here are caught by the self-check of the scripts, which compares with the
    model's own logits. Raises ValueError for a head that is not linear.
    """
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    if not isinstance(head, torch.nn.Linear):
        raise ValueError(f"the head of {type(model).__name__} is a {type(head).__name__}, not a Linear; use --logprob_impl reference")
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere multiplies
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite divides
    return {"weight": head.weight, "bias": head.bias, "softcap": getattr(config, "final_logit_softcapping", None), "logit_scale": scale}


# ---------------------------------------------------------------- evaluation


def score(texts, ended, rows, args):
    """Rewards (B,) float32 of the completions `texts` of `rows`, by --reward or --reward_fn (see reward.py)."""
    return torch.tensor(grade_rows(texts, ended, rows, args.reward_fn or args.reward, args.grade_truncated), dtype=torch.float32)


def grade_rows(texts, ended, rows, reward, grade_truncated=False):
    """`grade_all`, in which each rank grades its share: a time limit, or a reward with chance in it, is decided once for all ranks."""
    share = parallel.share(len(texts))
    return parallel.gather(grade_all(texts[share], ended[share], rows[share], reward, grade_truncated))


def pass_at_k(num_samples, num_right, k):
    """Unbiased estimate of the chance that one of k samples is right, from num_right of num_samples. [Codex, arXiv 2107.03374 eq 1]"""
    if k > num_samples:
        raise ValueError(f"pass@{k} needs at least {k} samples, got {num_samples}")
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def majority_vote(answers, rewards):
    """Chance that a majority vote over k samples is right: the mean reward of the samples that gave the most frequent answer.

    answers, rewards: lists of length k; equal answers are equal strings, and None does not vote. A tie is drawn by lot, here in
    expectation, so the order of the samples does not matter. 0.0 when nobody votes.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    most = max(votes.values(), default=None)
    winning = [reward for answer, reward in zip(answers, rewards) if votes[answer] == most]
    return sum(winning) / len(winning) if winning else 0.0


def mean_and_error(values):
    """Mean and its standard error over problems (sample std / sqrt(n); None for a single problem)."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def evaluate(model, tokenizer, rows, num_generations, max_completion_length, temperature, top_p=1.0, reward="boxed",
             grade_truncated=False, batch_size=256, seed=0, bar=None):
    """Sample `num_generations` completions of every row and grade them; returns one dict per problem.

    rows come from `encode_rows`; reward is as in `grade_all`. Each result has prompt, answer, difficulty, and lists of length
    num_generations: completions, ended, rewards and, unless reward is a function of the user's, answers: `answer_key` of each, None
    for one that was cut off and not graded. temperature 0 is greedy. The same seed gives the same random numbers at every call.
    bar: a tqdm to count the samples.
    """
    seed_everything(seed, 0, "eval")
    stops = eos_ids(model, tokenizer)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]["prompt_ids"]))  # like lengths together
    work = [index for index in order for _ in range(num_generations)]
    results = [{"prompt": row["prompt"], "answer": row["answer"], "difficulty": row["difficulty"],
                "completions": [], "ended": [], "rewards": []} | ({"answers": []} if reward in REWARDS else {}) for row in rows]
    step = batch_size * parallel.world_size()
    for start in range(0, len(work), step):
        indices = work[start : start + step]
        prompt_ids, prompt_mask = left_pad([rows[i]["prompt_ids"] for i in indices], tokenizer.pad_token_id, model.device)
        ids, mask = sample(
            model, prompt_ids, prompt_mask, stops, tokenizer.pad_token_id, max_completion_length, temperature, top_p, batch_size)
        texts, ended = completion_texts(tokenizer, ids, mask, stops)
        rewards = grade_rows(texts, ended, [rows[i] for i in indices], reward, grade_truncated)
        for i, text, end, value in zip(indices, texts, ended, rewards):
            results[i]["completions"].append(text)
            results[i]["ended"].append(end)
            results[i]["rewards"].append(value)
            if reward in REWARDS:
                results[i]["answers"].append(answer_key(text, reward) if end or grade_truncated else None)
        if bar is not None:
            bar.update(len(indices))
    return results


def problem_metrics(result, ks=(1,), builtin=False):
    """The metrics of one problem, whose means over problems are those of `summarize`: {metric: value}.

    maj@k exists for k > 1, where the result has answers: not with --reward_fn, which has no rule for equal answers.
    """
    k, rewards, texts = len(result["rewards"]), result["rewards"], result["completions"]
    metrics = {f"avg@{k}": sum(rewards) / k}
    metrics |= {f"pass@{j}": pass_at_k(k, sum(reward == 1.0 for reward in rewards), j) for j in ks}
    if k > 1 and "answers" in result:
        metrics[f"maj@{k}"] = majority_vote(result["answers"], rewards)
    metrics["ended"] = sum(result["ended"]) / k
    if builtin:
        metrics["steps_right"] = sum(tasks.steps_are_right(result["prompt"], text) for text in texts) / k
        metrics["foreign"] = sum(map(tasks.uses_foreign_words, texts)) / k
    return metrics


def summarize(results, ks=(1,), builtin=False):
    """Per difficulty: avg@k, unbiased pass@j for j in `ks` and maj@k, each with its standard error over problems.

    builtin adds the two metrics of the built-in tasks: `steps_right` (every step right, not only the answer) and `foreign`
    (teacher's words used). Returns {difficulty: {metric: value}}.
    """
    summary = {}
    for difficulty in sorted({result["difficulty"] for result in results}):
        group = [problem_metrics(result, ks, builtin) for result in results if result["difficulty"] == difficulty]
        summary[difficulty] = {"problems": len(group)}
        for metric in group[0]:
            mean, error = mean_and_error([metrics[metric] for metrics in group])
            summary[difficulty] |= {metric: mean, f"{metric}_se": error}
    return summary


def evaluation_metrics(model, tokenizer, rows, args):
    """Evaluate during training: {"eval/<difficulty>/<metric>": value}, with the same random numbers at every step."""
    results = evaluate(model, tokenizer, rows, args.num_generations_eval, args.max_completion_length, args.temperature,
                       reward=args.reward_fn or args.reward, grade_truncated=args.grade_truncated,
                       batch_size=args.generation_batch_size, seed=args.seed)
    ks = sorted({1, args.num_generations_eval})
    summary = summarize(results, ks, builtin=args.dataset_name is None)
    return {f"eval/{difficulty}/{metric}": value for difficulty, group in summary.items() for metric, value in group.items()}


def ngram_overlap(text, other, n=3):
    """Share of the n-grams of words of `text` that stand in `other` too; 0 for a text of fewer than n words."""
    grams, known = ({tuple(words[i : i + n]) for i in range(len(words) - n + 1)} for words in (text.split(), other.split()))
    return len(grams & known) / max(1, len(grams))


def rollout_metrics(rows, rewards, completion_mask, ended, args):
    """TRL's metrics of a rollout batch; rows, rewards, completion_mask and ended have length B, the rows of one prompt adjacent."""
    groups = rewards.view(-1, args.num_generations)  # (N, G)
    lengths = completion_mask.sum(1).float()  # (B,)
    metrics = {
        "reward": rewards.mean().item(), "reward_std": groups.std(dim=1, correction=0).mean().item(),
        "frac_reward_zero_std": (groups == groups[:, :1]).all(dim=1).float().mean().item(),
        "completions/mean_length": lengths.mean().item(), "completions/min_length": lengths.min().item(),
        "completions/max_length": lengths.max().item(), "completions/clipped_ratio": 1 - sum(ended) / len(ended),
    }
    for difficulty in sorted({row["difficulty"] for row in rows}):
        picked = torch.tensor([row["difficulty"] == difficulty for row in rows])
        metrics[f"reward/{difficulty}"] = rewards[picked].mean().item()
    return metrics | ({"reward/timeouts": sum(parallel.gather([math_timeouts()]))} if args.reward == "math" and not args.reward_fn else {})


# ---------------------------------------------------------------- FLOPs


@dataclass
class Flops:
    """Ledger of the matmul FLOPs a run has spent on sampling and training; evaluation is not charged.

    Rule: a forward pass over one sequence of D real tokens costs 2 N D for the weights plus 2 L A D^2 for causal attention
    (N: parameters without the input embedding, the head counted once; L layers of total head width A; half of the D x D square).
    A backward pass costs twice its forward. Padding is free: it is our waste, not the method's; nor is it credited that rows share the
    computation of their prompt. Sampling counts prompt and completion once per row. `paper` is the rule of the PrefixRL paper (arXiv
    2601.18795): 2 N D for every sampled row and 6 N D for every row and update, with N all parameters, as if nothing were ever skipped.
    """

    parameters: int = 0
    weights: int = 0
    layers: int = 0
    attention_width: int = 0
    num_tokens: int = 0
    spent: dict = field(default_factory=lambda: {"rollout": 0.0, "train": 0.0, "rephrase": 0.0, "traces": 0.0, "paper": 0.0})

    @classmethod
    def of(cls, model, args=None):
        """The ledger for `model`: zero, except what collecting the --traces of `args` has cost."""
        config = model.config.get_text_config()
        parameters = model.num_parameters()
        tied = model.get_output_embeddings() is None or model.get_output_embeddings().weight is model.get_input_embeddings().weight
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        weights = parameters if tied else parameters - model.get_input_embeddings().weight.numel()
        ledger = cls(parameters, weights, config.num_hidden_layers, heads * head_dim)
        if traces_file(args) is not None:
            ledger.spent["traces"], ledger.spent["paper"] = traces_flops(traces_file(args))
        return ledger

    def forward(self, lengths):
        """FLOPs of one forward pass over sequences of the given token counts."""
        return sum(2 * self.weights * d + 2 * self.layers * self.attention_width * d * d for d in lengths)

    def add(self, stage, lengths, passes=1):
        """Charge `passes` forward-equivalents (a training pass is 3) over `lengths` (B,) to a stage of the ledger."""
        if stage in ("rollout", "rephrase"):
            self.num_tokens += int(lengths.sum())
        self.spent[stage] += passes * self.forward(lengths.tolist())

    def add_paper(self, lengths, passes):
        """Charge the paper's rule: 2 N D a forward-equivalent."""
        self.spent["paper"] += passes * 2 * self.parameters * int(lengths.sum())

    def metrics(self):
        """The ledger as metrics since the start of the run: FLOPs, and tokens sampled from (prompt and completion)."""
        total = sum(value for stage, value in self.spent.items() if stage != "paper")
        return {f"flops/{stage}": value for stage, value in self.spent.items()} | {"flops/total": total, "num_tokens": self.num_tokens}


def traces_flops(path):
    """FLOPs that collecting a trace file has cost: (flops, flops by the paper's rule), from the ledger that eval.py --save_traces writes.

    0.0, 0.0 when no ledger lies beside the file: traces of unknown price, such as a teacher's.
    """
    ledger = Path(path).with_suffix(".ledger.json")
    if not ledger.exists():
        return 0.0, 0.0
    record = json.loads(ledger.read_text())
    return record["flops"], record["flops_paper"]


def traces_file(args):
    """Path of the trace file that a run uses, or None: --traces, or the built-in one of --trace_style self."""
    if getattr(args, "traces", None) is None and getattr(args, "trace_style", None) == "self" and args.dataset_name is None:
        if args.task not in tasks.SELF_TRACES:
            raise BadArgument(f"--trace_style self: the base never solves hard problems of --task {args.task}; take teacher or own")
        return str(tasks.SELF_TRACES[args.task])
    return getattr(args, "traces", None)


# ---------------------------------------------------------------- self-check


def self_check(model, tokenizer, rows, args):
    """Before the first step: are sampled tokens scored as they were sampled? Prints a few lines; returns its numbers.

    Samples 8 prompts (64 tokens at most: it holds their logits) and compares the log-probs that generate drew from with
    `policy_logps` of the same tokens: a wrong mask, position or temperature, dropout, a leaking generation_config, or a head that
    the fused path does not know shows here. Done in float32, which tells them from rounding, and then in the dtype of training (of a
    sharded model only in that, in which its layers are gathered).
    Raises RunError when any token is 1e-3 nats away in float32, or the mean token 0.1 nats in bfloat16 (0.016 for SmolLM2-135M).
    """
    stops, length = eos_ids(model, tokenizer), min(args.max_completion_length, 64)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    impl = choose_impl(args.logprob_impl, vocabulary, model.device.type)
    prompt_ids, prompt_mask = left_pad([row["prompt_ids"] for row in rows[:8]], tokenizer.pad_token_id, model.device)
    gold = f"gold answers are left to {args.reward_fn}" if args.reward_fn else f"{len(rows)} gold answers grade right"
    print(f"self-check: {gold}; log-probs by {impl}, {vocabulary} words")
    for dtype in dict.fromkeys((compute_dtype(model) if parallel.is_sharded(model) else torch.float32, compute_dtype(model))):
        model.compute_dtype, exact = dtype, dtype == torch.float32
        seed_everything(args.seed, 0, "self_check")
        completion_ids, mask, drawn = sample(
            model, prompt_ids, prompt_mask, stops, tokenizer.pad_token_id, length, args.temperature, with_logps=True)
        with torch.no_grad():
            scored, _ = policy_logps(model, prompt_ids, prompt_mask, completion_ids, mask, args.temperature, args.logprob_impl)
        away = (scored - drawn)[mask].abs()
        difference, tolerance = float(away.max() if exact else away.mean()), 1e-3 if exact else 0.1
        if not difference <= tolerance:
            raise RunError(f"self-check: {type(model).__name__} scores its own samples {difference:.3g} nats away from how it drew them "
                           f"(tolerance {tolerance} in {dtype}): a wrong mask, position or temperature does this"
                           + (", or a head that logprob.py does not know: try --logprob_impl reference" if impl != "reference" else ""))
        ratio = "" if not exact else f", ratio = 1 to {float(away.expm1().max()):.0e}"
        print(f"self-check: re-scored = sampled log-probs to {difference:.0e} nats {'at most' if exact else 'in the mean'} "
              f"in {str(dtype).removeprefix('torch.')}{ratio}")
    texts, ended = completion_texts(tokenizer, completion_ids, mask, stops)
    print(f"self-check: {sum(ended)} of {len(ended)} completions end within {length} tokens\n"
          f"first prompt:     {printable(tokenizer.decode(prompt_ids[0][prompt_mask[0]]))}\nfirst completion: {printable(texts[0])}")
    return {"logp_difference": difference, "ended": sum(ended) / len(ended)}
