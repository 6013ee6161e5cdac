"""What none of the papers changes: flags, data, tokens, sampling, evaluation, FLOPs, run folder, checkpoints.

The scripts take this file on trust; each function has its test in `tests/`. Two rules hold throughout: nothing is drawn
from a random state that is not a function of (seed, step), and nothing fails quietly.
"""

import functools
import inspect
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
from argparse import ArgumentDefaultsHelpFormatter
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import transformers
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, HfArgumentParser

import tasks
from logprob import CPU_TILE, GPU_TILE, choose_impl, token_logps
from reward import REWARDS, RewardError, answer_key, answer_span, check_reward, gold_is_sound, grade_all, math_timeouts

transformers.utils.logging.disable_progress_bar()  # the scripts show their own

# ---------------------------------------------------------------- flags and errors


class BadArgument(Exception):
    """A flag, file or column is wrong: one line on stderr, exit code 2."""


class RunError(Exception):
    """The run cannot go on: one line on stderr, exit code 1."""


class Parser(HfArgumentParser):
    """HfArgumentParser that takes no abbreviated flags and reports an error in one line."""

    def __init__(self, args_class, description):
        super().__init__(args_class, description=description, usage="python %(prog)s [--flag value ...]", allow_abbrev=False,
                         formatter_class=lambda prog: ArgumentDefaultsHelpFormatter(prog, max_help_position=36, width=120))

    def error(self, message):
        raise BadArgument(re.sub(r"^argument (--\w+)[^:]*:", r"\1:", message))


def parse_args(args_class, doc, script, argv=None):
    """Command line -> `args_class`. A resumed run starts from the flags in its args.json; flags given now win and are named."""
    parser = Parser(args_class, doc.strip().splitlines()[0])
    given = vars(parser.parse_args(argv))
    if given.get("resume_from_checkpoint"):
        checkpoint = find_checkpoint(given["resume_from_checkpoint"], given["output_dir"])
        if not (checkpoint.parent / "args.json").is_file():
            raise BadArgument(f"--resume_from_checkpoint: {checkpoint.parent} has no args.json, so it is not a run folder")
        saved = json.loads((checkpoint.parent / "args.json").read_text())
        if saved["script"] != Path(script).name:
            raise BadArgument(f"--resume_from_checkpoint: {checkpoint} is a run of {saved['script']}")
        parser.set_defaults(**{name: value for name, value in saved["args"].items() if name in given})
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


def seed_everything(seed, step, stream="train"):
    """Seed torch from (seed, step, stream), so that any step can be replayed without the steps before it."""
    torch.manual_seed(random.Random(f"{seed}/{step}/{stream}").getrandbits(63))


# ---------------------------------------------------------------- model and tokens


def load_model(name, attn_implementation=None, gguf_file=None):
    """Load a causal LM and its tokenizer in float32 (master weights: bf16 would round 1e-6 updates away), dropout off.

    name: "tiny_model" (built in), a local folder or a hub id; gguf_file: a file of llama.cpp in it, which is dequantised. Returns
    (model, tokenizer); the tokenizer pads on the left.
    """
    path = tasks.TINY_MODEL if name == "tiny_model" else Path(name)
    if not path.is_dir() and (name.count("/") != 1 or name.startswith((".", "/", "runs/"))):
        raise BadArgument(f"--model_name_or_path {name}: no such folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path if path.is_dir() else name, padding_side="left", gguf_file=gguf_file)
        model = AutoModelForCausalLM.from_pretrained(
            path if path.is_dir() else name, dtype=torch.float32, attn_implementation=attn_implementation, gguf_file=gguf_file)
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
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


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


def sample(model, prompt_ids, prompt_mask, eos_ids, pad_id, max_new_tokens, temperature=1.0, top_p=1.0, batch_size=256, with_logps=False):
    """Sample one completion per row with HF generate. Returns (completion_ids, completion_mask), both (B, T).

    temperature 0 is greedy. At most `batch_size` rows a call. `with_logps` adds the log-probs (B, T) that generate itself
    drew from, at a cost of (B, T, V) memory. While it runs, the model's own generation_config is put aside: generate fills
    every unset field from it, so an instruct model's top_k or repetition_penalty would change the policy unseen; what is
    unset there too comes from global defaults, where top_k is 50 (tests/test_sampling.py).
    """
    generation_config = GenerationConfig(
        do_sample=temperature > 0, temperature=temperature or 1.0, top_p=top_p, top_k=0, typical_p=1.0, num_beams=1,
        repetition_penalty=1.0, no_repeat_ngram_size=0, max_new_tokens=max_new_tokens, eos_token_id=eos_ids, pad_token_id=pad_id,
        use_cache=True, return_dict_in_generate=True, output_scores=with_logps)
    own_config, was_training = model.generation_config, model.training
    model.generation_config = generation_config
    model.eval()
    ids, logps = [], []
    try:
        with torch.no_grad():
            for chunk_ids, chunk_mask in zip(prompt_ids.split(batch_size), prompt_mask.split(batch_size)):
                output = model.generate(input_ids=chunk_ids, attention_mask=chunk_mask.long(), generation_config=generation_config)
                ids.append(output.sequences[:, chunk_ids.shape[1] :])
                if with_logps:
                    log_probs = torch.stack(output.scores, dim=1).float().log_softmax(-1)  # (b, T, V)
                    logps.append(log_probs.gather(-1, ids[-1].unsqueeze(-1)).squeeze(-1))
    finally:
        model.generation_config = own_config
        model.train(was_training)
    completion_ids = right_pad(ids, pad_id)
    mask = completion_mask(completion_ids, eos_ids)
    return (completion_ids, mask, right_pad(logps, 0.0)) if with_logps else (completion_ids, mask)


def right_pad(chunks, value):
    """Stack tensors (b_i, T_i) into one (sum b_i, max T_i), filled with `value` on the right."""
    longest = max(chunk.shape[1] for chunk in chunks)
    return torch.cat([torch.nn.functional.pad(chunk, (0, longest - chunk.shape[1]), value=value) for chunk in chunks])


def micro_batches(prompt_lengths, completion_lengths, micro_batch_size, micro_batch_tokens):
    """Cut rows into micro-batches of like length: list of index tensors.

    prompt_lengths, completion_lengths (B,) int. `micro_batch_size` rows each, or, when that is 0, as many as keep
    rows x (longest prompt + longest completion) within `micro_batch_tokens` (at least one row).
    """
    prompts, completions = prompt_lengths.tolist(), completion_lengths.tolist()
    batches, rows, width, length = [], [], 0, 0
    for row in sorted(range(len(prompts)), key=lambda row: -(prompts[row] + completions[row])):
        width, length = max(width, prompts[row]), max(length, completions[row])
        full = len(rows) == micro_batch_size if micro_batch_size else (len(rows) + 1) * (width + length) > micro_batch_tokens
        if rows and full:
            batches.append(rows)
            rows, width, length = [], prompts[row], completions[row]
        rows.append(row)
    return [torch.tensor(rows, device=prompt_lengths.device) for rows in [*batches, rows] if rows]


def trim(batch, rows):
    """Some rows of a batch without the padding that none of them needs: (prompt_ids, prompt_mask), (completion_ids, completion_mask)."""
    width = int(batch.prompt_mask[rows].sum(1).max())
    length = int(batch.completion_mask[rows].sum(1).max())
    return ((batch.prompt_ids[rows, -width:], batch.prompt_mask[rows, -width:]),
            (batch.completion_ids[rows, :length], batch.completion_mask[rows, :length]))


def policy_logps(model, prompt_ids, prompt_mask, completion_ids, completion_mask, temperature=1.0, impl="auto"):
    """Score given completions: log pi(o_t | q, o_<t) and the entropy of pi(. | q, o_<t), both at `temperature`.

    prompt_ids, prompt_mask (B, P) left-padded; completion_ids, completion_mask (B, T) right-padded, T >= 1.
    Returns (logps, entropy), each (B, T) float32 in nats and 0 where completion_mask is False. Gradients flow through both.
    The policy is what is sampled, so its logits are divided by the sampling temperature (tests/test_masks.py). "reference" takes
    the model's own logits; the others take its hidden states and `lm_head`, at completion positions only.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    input_ids = torch.cat([prompt_ids, completion_ids], dim=1)  # (B, P+T)
    attention_mask = torch.cat([prompt_mask, completion_mask], dim=1).long()  # (B, P+T)
    # Learned positions shift under left padding unless they are passed; RoPE hides the mistake (tests/test_masks.py).
    position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)  # (B, P+T)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids, "use_cache": False}
    impl = choose_impl(impl, model.get_output_embeddings().weight.shape[0], prompt_ids.device.type)
    if impl == "reference":
        logits = model(**inputs, logits_to_keep=completion_ids.shape[1] + 1).logits[:, :-1]  # (B, T, V)  P-1+t predicts token t
        log_probs = torch.log_softmax(logits.float() / temperature, dim=-1)  # (B, T, V) float32
        logps = log_probs.gather(-1, completion_ids.unsqueeze(-1)).squeeze(-1)  # (B, T) float32
        entropy = -(log_probs.exp() * log_probs).sum(-1)  # (B, T) float32
        return logps.masked_fill(~completion_mask, 0.0), entropy.masked_fill(~completion_mask, 0.0)
    hidden = model.base_model(**inputs).last_hidden_state[:, prompt_ids.shape[1] - 1 : -1]  # (B, T, H)
    logps, entropy = token_logps(
        hidden[completion_mask], labels=completion_ids[completion_mask], temperature=temperature, impl=impl, **lm_head(model))  # (N,)
    zeros = torch.zeros(completion_ids.shape, device=hidden.device)  # (B, T) float32
    return zeros.masked_scatter(completion_mask, logps), zeros.masked_scatter(completion_mask, entropy)


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


# ---------------------------------------------------------------- data


PROMPT_COLUMNS, ANSWER_COLUMNS = ("prompt", "problem", "question"), ("answer", "solution", "ground_truth", "reward_model")
TRACE_COLUMNS = ("trace", "target", "completion", "generation")


def load_rows(args, tokenizer):
    """Training and evaluation rows of the built-in --task, or of --dataset_name and --eval_dataset_name.

    Each is a dict with prompt (str), answer, difficulty, prompt_ids and columns. The training rows of a script with --traces also have the
    off-policy solution (see `encode_traces`); evaluation rows never do.
    """
    evaluation = []
    if args.dataset_name is None:
        train = list(tasks.load_task(args.task, "train", {"hard": args.num_hard, "easy": args.num_easy}))
        if args.eval_steps:
            evaluation = list(tasks.load_task(args.task, "eval", dict.fromkeys(tasks.DIFFICULTIES, args.eval_problems)))
    else:
        column = getattr(args, "traces", "") is None  # the traces are the data set's
        train = dataset_rows(args.dataset_name, args.dataset_split, "--dataset_name", args.dataset_config, traces=column)
        if args.eval_steps and args.eval_dataset_name is not None:
            evaluation = dataset_rows(
                args.eval_dataset_name, args.eval_dataset_split, "--eval_dataset_name", args.eval_dataset_config)[: args.eval_problems]
    train = encode_rows(train, tokenizer, args)
    if evaluation:
        names = ("prompt", "answer", "difficulty", "prompt_ids", "columns")
        encoded = encode_rows(evaluation, tokenizer, args, "--eval_dataset_name")
        evaluation = [{name: row[name] for name in names} for row in encoded]
    return encode_traces(train, tokenizer, args) if hasattr(args, "traces") else train, evaluation


def traces_file(args):
    """Path of the trace file that a run uses, or None: --traces, or the built-in one of --trace_style self."""
    if getattr(args, "traces", None) is None and getattr(args, "trace_style", None) == "self" and args.dataset_name is None:
        if args.task not in tasks.SELF_TRACES:
            raise BadArgument(f"--trace_style self: the base never solves hard problems of --task {args.task}; take teacher or own")
        return str(tasks.SELF_TRACES[args.task])
    return getattr(args, "traces", None)


def encode_traces(rows, tokenizer, args):
    """Add to each row its off-policy solution: `trace` (str), `trace_ids` (EOS included) and `behavior_logps` of these ids, or None each.

    Traces come from --traces FILE, by prompt, or else from the data set's column, or from the built-in task in --trace_style. Token
    ids are taken from the file when this tokenizer reads them as the trace's text; otherwise the text is tokenised once.
    A trace that does not grade right, or is longer than --max_completion_length, is dropped with a printed count. Rows without a
    trace stay: what to do with them is the method's. Raises BadArgument when no trace is left.
    """
    found, file = {}, traces_file(args)
    source = args.traces or args.dataset_name or f"--trace_style {args.trace_style}"
    if file is not None:
        for record in read_dataset(file, "train", "--traces"):
            if not {"prompt", "trace"} <= record.keys():
                raise BadArgument(f"--traces {file}: needs columns prompt and trace, found {', '.join(record)}")
            messages, trace = read_prompt(record["prompt"]), read_trace(record["trace"])
            if messages and trace:
                found.setdefault(question(messages), record | {"trace": trace})
        if not any(row["prompt"] in found for row in rows):
            raise BadArgument(f"--traces {file}: none of its {len(found)} prompts is one of the {len(rows)} training prompts: "
                              "it is of another data set")
    column = f"{args.trace_style}_trace" if args.dataset_name is None else next((name for name in TRACE_COLUMNS if name in rows[0]), None)
    traced, wrong, too_long, retokenised = [], 0, 0, 0
    records = [found.get(row["prompt"], {}) if file is not None else {"trace": row.get(column)} for row in rows]
    texts = [record.get("trace") for record in records]
    rewards = grade_all(texts, [text is not None for text in texts], rows, args.reward_fn or args.reward)
    for row, record, reward in zip(rows, records, rewards):
        trace, ids, logps = record.get("trace"), record.get("trace_ids"), record.get("logps")
        if trace is not None and reward != 1.0:
            wrong, trace = wrong + 1, None
        if trace is not None and not (ids and ids[-1] == tokenizer.eos_token_id
                                      and tokenizer.decode(ids[:-1], skip_special_tokens=True) == trace):
            retokenised += ids is not None
            ids, logps = tokenizer(trace, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id], None
        if trace is not None and len(ids) > args.max_completion_length:
            too_long, trace = too_long + 1, None
        known = trace is not None
        logps = logps if known and logps and len(logps) == len(ids) else None
        traced.append(row | {"trace": trace, "trace_ids": ids if known else None, "behavior_logps": logps})
    if not any(row["trace"] is not None for row in traced):
        wanted = "" if file or column else f"; needs a column {' or '.join(TRACE_COLUMNS)}, or give --traces"
        raise BadArgument(f"no trace is left of {source}: {wrong} do not grade right, {too_long} exceed --max_completion_length{wanted}")
    print(f"traces: {sum(row['trace'] is not None for row in traced)} of {len(rows)} problems have one ({source})")
    if wrong or too_long or retokenised:
        print(f"traces: dropped {wrong} that do not grade right and {too_long} longer than --max_completion_length "
              f"{args.max_completion_length}; tokenised {retokenised} anew")
    return traced


def read_prompt(value):
    """A prompt as people store it, a string or chat messages -> messages that end with the user's, or None for anything else."""
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not (are_messages(value) and value[-1]["role"] == "user" and value[-1]["content"].strip()):
        return None
    return [{"role": turn["role"], "content": turn["content"]} for turn in value]


def question(messages):
    """The text of a prompt without its system message: what traces are found by, what RePO's prompt quotes, what is logged."""
    return "\n".join(turn["content"] for turn in messages if turn["role"] != "system")


def read_trace(value):
    """A trace as people store it, a string or chat messages with one assistant's -> its text, or None for anything else."""
    if are_messages(value):
        told = [turn["content"] for turn in value if turn["role"] == "assistant"]
        value = told[0] if len(told) == 1 else None
    return value if isinstance(value, str) and value.strip() else None


def are_messages(value):
    """Is it a list of {"role": system, user or assistant, "content": text}, the system's first if there is one?"""
    return (isinstance(value, list) and len(value) > 0
            and all(isinstance(turn, dict) and isinstance(turn.get("content"), str) for turn in value)
            and all(turn.get("role") in (("system",) if place == 0 else ()) + ("user", "assistant") for place, turn in enumerate(value)))


def read_gold(value):
    r"""A gold answer as people store it -> its text, or None.

    A number, True or False; a dict with ground_truth (verl's column reward_model); a text with a \boxed{}: the content of the last one;
    a text whose last line holds "#### x" (GSM8K): x without commas; any other text as it stands.
    """
    if isinstance(value, dict):
        value = value.get("ground_truth")
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, (int, float)) and math.isfinite(value):
        return str(int(value) if value == int(value) else value)  # a CSV column with a gap holds floats
    if not isinstance(value, str):
        return None
    marked = re.search(r"####([^\n#]*)\s*\Z", value)
    text = answer_span(value) if "\\boxed{" in value else marked[1].replace(",", "") if marked else value
    return (text or "").strip() or None


def dataset_rows(name, split, flag, config=None, traces=False):
    """A local jsonl, json, csv or parquet file, or a hub data set, as rows with prompt, answer and difficulty ("all" if it has none).

    Columns are read by `read_prompt`, `read_gold` and, with `traces`, `read_trace`. `prompt` is the question's text; where the prompt was
    messages, `prompt_messages` are what is rendered. Rows whose prompt or gold is missing or of another type are dropped with a
    count; traces of another type become None, with a count. Raises BadArgument for a missing column, or when no row is left.
    """
    records = read_dataset(name, split, flag, config)
    if not records:
        raise BadArgument(f"{flag} {name}: the data set is empty")
    columns, picked = list(records[0]), []
    for wanted in (PROMPT_COLUMNS, ANSWER_COLUMNS):
        found = [column for column in wanted if column in columns]
        if not found:
            raise BadArgument(f"{flag} {name}: needs a column {' or '.join(wanted)}, found {', '.join(columns)}")
        picked.append(found[0])
    prompt, answer = picked
    trace = next((column for column in TRACE_COLUMNS if column in columns), None) if traces else None
    rows, unread = [], {prompt: [], answer: [], trace: []}  # column -> numbers of the rows where it cannot be read, from 1
    for number, record in enumerate(records, 1):
        messages, gold = read_prompt(record[prompt]), read_gold(record[answer])
        if messages is None or gold is None:
            unread[prompt if messages is None else answer].append(number)
            continue
        row = record | {"prompt": question(messages), "answer": gold, "difficulty": str(record.get("difficulty", "all"))}
        if not isinstance(record[prompt], str):
            row["prompt_messages"] = messages
        if trace:
            row["trace"] = read_trace(record[trace])
            if row["trace"] is None and record[trace] is not None:
                unread[trace].append(number)
        rows.append(row)
    told = {column: f"{len(numbers)} of {len(records)} rows whose {column} is missing or of another type, e.g. row {numbers[0]}"
            for column, numbers in unread.items() if numbers}
    if not rows:
        raise BadArgument(f"{flag} {name}: no row is left: dropped {' and '.join(told.values())}")
    for column, what in told.items():
        print(f"{flag}: " + (f"no trace in {what}" if column == trace else f"dropped {what}"))
    return rows


def read_dataset(name, split, flag, config=None):
    """A local file or hub data set as a list of dicts; local files never touch the network, and have no configurations."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its errors are passed on below, in one line
    path = Path(name)
    kinds = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
    if path.suffix in kinds and not path.is_file():
        raise BadArgument(f"{flag} {name}: no such file")
    try:
        if path.is_file():
            if path.suffix not in kinds:
                raise BadArgument(f"{flag} {name}: expected a file ending in {', '.join(kinds)}")
            if config is not None:
                raise BadArgument(f"{flag.replace('_name', '_config')} {config}: {name} is a local file, which has no configurations")
            if path.stat().st_size == 0:
                return []
            # Not load_dataset, which reports every call to a counter on the network (tests/test_data.py).
            return list(getattr(datasets.Dataset, f"from_{kinds[path.suffix]}")(str(path)))
        return list(datasets.load_dataset(name, config, split=split))
    except BadArgument:
        raise
    except Exception as error:  # the loaders of `datasets` raise anything; its message is passed on
        reason = str(error.__cause__ or error).strip() or type(error).__name__
        raise BadArgument(f"{flag} {name}: {reason.splitlines()[0]}") from error


def encode_rows(rows, tokenizer, args, flag="--dataset_name"):
    """Add to each row `prompt_ids`, and `columns`, what a --reward_fn is given of it: all but prompt and traces.

    Over-long prompts and gold answers that do not grade right are dropped, with a printed count; --reward_fn does as it likes with gold.
    """
    kept, too_long, bad_gold = [], 0, []
    for row in rows:
        prompt = row.get("prompt_messages", row["prompt"])
        ids = encode_prompt(tokenizer, render_prompt(tokenizer, prompt, args.template, args.system_prompt))
        if len(ids) > args.max_prompt_length:
            too_long += 1
        elif not args.reward_fn and not gold_is_sound(row["answer"], args.reward):
            bad_gold.append(row["answer"])
        else:
            hidden = ("prompt", "prompt_messages", "own_trace", "teacher_trace", *TRACE_COLUMNS)
            columns = {name: value for name, value in row.items() if name not in hidden}
            kept.append(row | {"prompt_ids": ids, "columns": columns})
    if too_long:
        print(f"{flag}: dropped {too_long} of {len(rows)} prompts longer than --max_prompt_length {args.max_prompt_length}")
    if bad_gold:
        print(f"{flag}: dropped {len(bad_gold)} of {len(rows)} rows whose gold answer does not grade right as --reward {args.reward}, "
              f"e.g. {printable(bad_gold[0])!r}")
    if not kept:
        raise BadArgument(f"{flag}: no prompt is left of {len(rows)}")
    return kept


def step_rows(rows, num, seed, step):
    """The `num` rows of one step: consecutive places in an endless stream of epochs, each shuffled by (seed, epoch)."""
    picked = []
    for place in range(step * num, (step + 1) * num):
        epoch, index = divmod(place, len(rows))
        picked.append(rows[epoch_order(len(rows), seed, epoch)[index]])
    return picked


@functools.lru_cache(maxsize=2)
def epoch_order(length, seed, epoch):
    """A permutation of range(length) that depends on (seed, epoch) only; kept, because a step asks for it per row."""
    order = list(range(length))
    random.Random(f"{seed}/{epoch}/order").shuffle(order)
    return order


# ---------------------------------------------------------------- evaluation


def score(texts, ended, rows, args):
    """Rewards (B,) float32 of the completions `texts` of `rows`, by --reward or --reward_fn (see reward.py)."""
    return torch.tensor(grade_all(texts, ended, rows, args.reward_fn or args.reward, args.grade_truncated), dtype=torch.float32)


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
    for start in range(0, len(work), batch_size):
        indices = work[start : start + batch_size]
        prompt_ids, prompt_mask = left_pad([rows[i]["prompt_ids"] for i in indices], tokenizer.pad_token_id, model.device)
        ids, mask = sample(
            model, prompt_ids, prompt_mask, stops, tokenizer.pad_token_id, max_completion_length, temperature, top_p, batch_size)
        texts, ended = completion_texts(tokenizer, ids, mask, stops)
        rewards = grade_all(texts, ended, [rows[i] for i in indices], reward, grade_truncated)
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
    return metrics | ({"reward/timeouts": math_timeouts()} if args.reward == "math" and not args.reward_fn else {})


# ---------------------------------------------------------------- FLOPs


@dataclass
class Flops:
    """Ledger of the matmul FLOPs a run has spent on sampling and training; evaluation is not charged.

    Rule: a forward pass over one sequence of D real tokens costs 2 N D for the weights plus 2 L A D^2 for causal attention
    (N: parameters without the input embedding, the head counted once; L layers of total head width A; half of the D x D square).
    A backward pass costs twice its forward. Padding is free: it is our waste, not the method's. Sampling counts prompt and
    completion once per row. `paper` is the rule of the PrefixRL paper (arXiv 2601.18795): 2 N D for every sampled row and
    6 N D for every row and update, with N all parameters, as if nothing were ever skipped.
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


# ---------------------------------------------------------------- run folder


def open_run(args, script):
    """Make the run folder and write args.json; returns its Path. A resumed run's metrics are trimmed to its checkpoint."""
    if args.output_dir is None:
        data = args.task if args.dataset_name is None else Path(args.dataset_name).stem
        name = f"{Path(script).stem}-{data}-{time.strftime('%Y%m%d-%H%M%S')}"
        suffixes = [""] + [f"-{n}" for n in range(2, 100)]
        args.output_dir = next(str(path) for path in (Path("runs") / (name + suffix) for suffix in suffixes) if not path.exists())
    run_dir = Path(args.output_dir)
    if args.resume_from_checkpoint:
        trim_metrics(run_dir, int(Path(args.resume_from_checkpoint).name.split("-")[1]))
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadArgument(f"--output_dir {run_dir}: {error.strerror}") from error
    flags = plain(asdict(args) | {"resume_from_checkpoint": None})
    record = {"script": Path(script).name, "args": flags, "versions": versions(), "git_commit": git_commit()}
    write_atomically(run_dir / "args.json", json.dumps(record, indent=2, allow_nan=False) + "\n")
    return run_dir


def refuse_used_folder(folder, flag="--output_dir"):
    """Nothing that exists is ever written over."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        hint = f", or go on with --resume_from_checkpoint {folder}" if flag == "--output_dir" else ""
        raise BadArgument(f"{flag} {folder} is in use: choose another{hint}")


def versions():
    """Versions of what decides the numbers of a run, for its record."""
    return {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}


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


def printable(text):
    """Text that is safe on a terminal: control characters, which may carry escape codes, are shown as \\x.. codes."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


class RunLog:
    """Writes metrics.jsonl, completions/ and, at the end, curve.png and a short table of a run."""

    def __init__(self, run_dir, args):
        self.run_dir, self.args, self.first, self.last = run_dir, args, {}, {}
        for metrics in read_metrics(run_dir):  # of a resumed run
            self.remember(metrics)

    def remember(self, metrics):
        """Keep the first and the latest evaluation."""
        evaluated = {key: value for key, value in metrics.items() if key.startswith("eval/")}
        self.first, self.last = self.first or evaluated, evaluated or self.last

    def write(self, metrics):
        """Append one line to metrics.jsonl."""
        append_jsonl(self.run_dir / "metrics.jsonl", [metrics])
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
    """Save an ordinary HF model folder; files appear in it one by one, each complete."""
    beside = Path(folder) / ".model.tmp"
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside)
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


# ---------------------------------------------------------------- self-check


def self_check(model, tokenizer, rows, args, tolerance=1e-3):
    """Before the first step: are sampled tokens scored as they were sampled? Prints one line; returns its numbers.

    Samples 8 prompts (64 tokens at most: it holds their logits) and compares the log-probs that generate drew from with
    `policy_logps` of the same tokens: a wrong mask, position or temperature, dropout, a leaking generation_config, or a head that
    the fused path does not know shows here.
    Raises RunError beyond `tolerance` nats.
    """
    seed_everything(args.seed, 0, "self_check")
    stops, length = eos_ids(model, tokenizer), min(args.max_completion_length, 64)
    prompt_ids, prompt_mask = left_pad([row["prompt_ids"] for row in rows[:8]], tokenizer.pad_token_id, model.device)
    completion_ids, mask, drawn = sample(
        model, prompt_ids, prompt_mask, stops, tokenizer.pad_token_id, length, args.temperature, with_logps=True)
    with torch.no_grad():
        scored, _ = policy_logps(model, prompt_ids, prompt_mask, completion_ids, mask, args.temperature, args.logprob_impl)
    difference = float((scored - drawn)[mask].abs().max())
    ratio = float((scored - drawn)[mask].exp().sub(1).abs().max())
    texts, ended = completion_texts(tokenizer, completion_ids, mask, stops)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    impl = choose_impl(args.logprob_impl, vocabulary, model.device.type)
    gold = f"gold answers are left to {args.reward_fn}" if args.reward_fn else f"{len(rows)} gold answers grade right"
    print(f"self-check: {gold}; re-scored = sampled log-probs to {difference:.0e} nats, ratio = 1 to "
          f"{ratio:.0e} ({impl}, {vocabulary} words); {sum(ended)} of {len(ended)} completions end within {length} tokens")
    print(f"first prompt:     {printable(tokenizer.decode(prompt_ids[0][prompt_mask[0]]))}\nfirst completion: {printable(texts[0])}")
    if not difference <= tolerance:
        raise RunError(f"self-check: {type(model).__name__} scores its own samples {difference:.3g} nats away from how it drew them "
                       f"(tolerance {tolerance}): a wrong mask, position or temperature does this"
                       + (", or a head that logprob.py does not know: try --logprob_impl reference" if impl != "reference" else ""))
    return {"logp_difference": difference, "ended": sum(ended) / len(ended)}


# ---------------------------------------------------------------- dry run


def dry_run(args, model, tokenizer, train_rows, eval_rows):
    """Print what a run would do: settings, rows, one prompt by the roles of its tokens, memory and FLOPs. Nothing is sampled or written."""
    print("\nsettings\n" + "\n".join(settings(args)))
    print(f"\ndata\n  {len(train_rows)} training rows, {len(eval_rows)} evaluation rows; gold answers "
          + (f"are left to {args.reward_fn}" if args.reward_fn else f"grade right as --reward {args.reward}"))
    rows = step_rows(train_rows, args.prompts_per_step, args.seed, 0)
    shown = max(rows, key=lambda row: len(segments(row, tokenizer, args)))  # the first of those with a prefix, if there is one
    print("\na prompt of the first step")
    for role, num_tokens, text in segments(shown, tokenizer, args):
        print(f"  [{role}] {num_tokens} tokens: {printable(text)}")

    prompt_lengths, trace_lengths = ([len(row[name]) for row in train_rows if row.get(name)] for name in ("prompt_ids", "trace_ids"))
    prompt, trace = (round(sum(lengths) / max(1, len(lengths))) for lengths in (prompt_lengths, trace_lengths))
    print(f"\nmemory, with the longest prompt of {max(prompt_lengths)} tokens and completions of {args.max_completion_length}")
    for name, size in estimate_memory(model, args, max(prompt_lengths), args.max_completion_length, len(eval_rows)).items():
        print(f"  {name:<18}{size / 2**20:>12,.1f} MiB")
    before = Flops.of(model, args).metrics()["flops/total"]
    step = estimate_flops(model, args, prompt, args.max_completion_length, trace)
    print(f"\nFLOPs, with prompts of {prompt} tokens (the mean), completions of {args.max_completion_length} (the longest) and traces of "
          f"{trace} (the mean), every row trained" + ("" if getattr(args, "failure_rate", 2) > 1 else " and every group retold"))
    for name, value in step.items():
        if name.startswith("flops/") and value:
            print(f"  {name.removeprefix('flops/'):<18}{value:>12.3g} a step")
    total = before + args.max_steps * step["flops/total"]
    print(f"  {'all steps':<18}{total:>12.3g}" + (f", {before:.3g} of it for traces" if before else ""))
    print("\nnothing was trained or written (--dry_run)")


def settings(args):
    """The resolved flags as lines "name = value", under the comments that group them in the script."""
    lines = []
    for match in re.finditer(r"^    (?:# (.+)|(\w+): )", inspect.getsource(type(args)), re.MULTILINE):
        heading, name = match.groups()
        if name:
            lines.append(f"    {name} = {getattr(args, name)}")
        elif not re.match(r"\w+\(\d+/\d+\)", heading):  # the tag of a variant is no heading
            lines.append(f"  {heading}")
    return lines


def segments(row, tokenizer, args):
    """A training row as [(role, number of tokens, text)]: prompt, prefix and trained, the trace where that is what is trained."""
    cut = len(row["prompt_ids"]) - row.get("prefix_len", 0)
    parts = [("prompt", row["prompt_ids"][:cut]), ("prefix", row["prompt_ids"][cut:])]
    taught = row.get("trace_ids") if getattr(args, "num_off_policy", 0) else None
    parts = [(role, len(ids), tokenizer.decode(ids)) for role, ids in [*parts, ("trained", taught)] if ids]
    return parts if taught else [*parts, ("trained", args.max_completion_length, "(at most; sampled by the policy)")]


def estimate_flops(model, args, prompt, completion, trace):
    """The ledger's metrics after one step whose every prompt, sampled completion and trace has the given length, in tokens.

    Every row has a gradient and, with --failure_rate, every group is retold from a prompt as long as problem and trace.
    """
    flops, traced = Flops.of(model), args.prompts_per_step * getattr(args, "num_off_policy", 0)
    sampled = torch.full((args.prompts_per_step * args.num_generations - traced,), prompt + completion)
    rows = torch.cat([sampled, torch.full((traced,), prompt + trace)])  # (B,)
    flops.add("rollout", sampled)
    flops.add_paper(sampled, passes=1)
    if getattr(args, "failure_rate", 2) <= 1:
        retold = torch.full((args.prompts_per_step,), prompt + trace + completion)
        flops.add("rephrase", retold)
        flops.add_paper(retold, passes=1)
        flops.add("train", retold)  # scored once more, given what it was told from
    flops.add("train", rows, passes=(args.num_iterations * args.num_minibatches > 1) + (args.beta > 0))  # pi_old and pi_ref
    flops.add("train", rows, passes=args.num_iterations * (4 if args.gradient_checkpointing else 3))
    flops.add_paper(rows, passes=3 * args.num_iterations)
    return flops.metrics()


def estimate_memory(model, args, prompt, completion, num_eval=0):
    """Bytes of a run by what holds them, all in float32, with rows of `prompt` + `completion` tokens; a rule of thumb, for a Llama.

    Fixed: 4 bytes a parameter, as much for its gradient, twice that for AdamW, and the reference model with --beta.
    Sampling: the KV cache, 2 L x width of the keys a token, of the rows of one call of generate, and three times their last logits.
    Update: activations of one micro-batch, 12 H + 4 I values a token and layer (with --gradient_checkpointing H, and one whole
    layer), where attention keeps no (T, T) matrix; and the head: five times the logits of the completions ("reference"), or two tiles
    and its gradient. The peak is what is fixed and the larger of the other two.
    """
    config, flops, value = model.config.get_text_config(), Flops.of(model), 4
    hidden, layers, vocabulary = config.hidden_size, flops.layers, model.get_output_embeddings().weight.shape[0]
    mlp, heads = getattr(config, "intermediate_size", None) or 4 * hidden, config.num_attention_heads
    key_width = flops.attention_width // heads * (getattr(config, "num_key_value_heads", None) or heads)
    rows, length = args.prompts_per_step * args.num_generations, prompt + completion
    calls = max(args.prompts_per_step * (args.num_generations - getattr(args, "num_off_policy", 0)), num_eval * args.num_generations_eval)
    drawn = min(args.generation_batch_size, calls)
    micro = min(args.micro_batch_size or max(1, args.micro_batch_tokens // length), rows // args.num_minibatches)
    layer = 12 * hidden + 4 * mlp
    impl, device = choose_impl(args.logprob_impl, vocabulary, model.device.type), model.device.type
    tile = math.prod(GPU_TILE if device == "cuda" else CPU_TILE)
    sizes = {
        "parameters": value * flops.parameters, "gradients": value * flops.parameters, "AdamW states": 2 * value * flops.parameters,
        "reference model": value * flops.parameters if args.beta else 0,
        "KV cache": value * drawn * length * 2 * layers * key_width, "sampled logits": 3 * value * drawn * vocabulary,
        "activations": value * micro * length * (layers * hidden + layer if args.gradient_checkpointing else layers * layer),
        "log-probs": value * (5 * micro * completion * vocabulary if impl == "reference" else 2 * tile + vocabulary * hidden)}
    fixed = sum(sizes[name] for name in ("parameters", "gradients", "AdamW states", "reference model"))
    return sizes | {"peak": fixed + max(sizes["KV cache"] + sizes["sampled logits"], sizes["activations"] + sizes["log-probs"])}
