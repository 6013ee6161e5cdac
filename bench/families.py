"""Which models train here? Every family of causal LMs in transformers whose text model can be built small, with random weights.

    python bench/families.py                       write results/families.md and families.json
    python bench/families.py --only llama mamba    print some rows

Each family is saved to a folder, loaded as --model is, checked as a run checks it, and then measured here once more, with a pad token
of its own (its embedding is often 0, which hides that padding is read) and --logprob_impl reference, and with pad = eos and --logprob_impl
tiled. In nats, at most: `sampled` is the distance
of the log-probs that generate drew from to the scored ones; `padding` that of a row alone to the row in its batch; `train` that of train
mode, which --gradient_checkpointing needs, to eval mode. `sharing` is the distance of the gradient with each prompt computed once to the
gradient with each row computed alone, relative to its norm. `FLOPs` is the ledger's forward pass of 32 tokens over the matrix products
that torch counts.
"""

import argparse
import contextlib
import io
import json
import platform
import sys
import tempfile
import traceback
from pathlib import Path

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import engine  # noqa: E402
import grpo  # noqa: E402
from engine import models, sampling, scoring, tasks  # noqa: E402
from engine.errors import printable  # noqa: E402
from engine.flops import Flops  # noqa: E402
from engine.self_check import self_check  # noqa: E402

# What a config calls its sizes. A config takes those that it has, and LAYERS where its layers are of kinds.
SMALL = dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 288)
SMALL |= dict.fromkeys(("hidden_size", "n_embd", "d_model", "lru_width"), 32)
SMALL |= dict.fromkeys(("n_layer", "n_layers", "num_layers", "num_hidden_layers", "decoder_layers", "num_experts_per_tok", "moe_k",
                        "num_key_value_heads", "linear_num_value_heads", "linear_num_key_heads"), 2)
SMALL |= dict.fromkeys(("n_head", "n_heads", "num_attention_heads", "encoder_attention_heads", "decoder_attention_heads", "mamba_n_heads",
                        "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4)
SMALL |= dict.fromkeys(("head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "linear_key_head_dim", "linear_value_head_dim",
                        "state_size", "mamba_d_state", "hidden_size_per_layer_input", "rotary_dim"), 8)
SMALL |= dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "q_lora_rank", "kv_lora_rank", "sliding_window",
                        "attention_window_size", "mamba_d_head"), 16)
SMALL |= dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim"), 64)
SMALL |= dict.fromkeys(("max_position_embeddings", "n_positions"), 128) | dict.fromkeys(("pad_token_id",), None)
SMALL |= dict.fromkeys(("bos_token_id", "eos_token_id", "encoder_layers", "n_group", "topk_group", "first_k_dense_replace",
                        "num_dense_layers", "mamba_n_groups"), 1)
HYBRID, MLA = {"layer_types": ["linear_attention", "full_attention"]}, {"num_key_value_heads": 4, "head_dim": ...}  # ...: not set
OVERRIDES = {
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "minicpm3", "youtu", "axk1", "axk2",
                     "sarvam_mla"), MLA), "bailing_hybrid": HYBRID | MLA, "longcat_flash": {"num_key_value_heads": 4},
    **dict.fromkeys(("olmo_hybrid", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "qwen4_exp_text"), HYBRID),
    "codegen": {"n_embd": 64}, "falcon": {"head_dim": ...}, "bamba": {"attn_layer_indices": [1]},
    "gemma3n_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "intermediate_size": [64] * 4,
                     "activation_sparsity_pattern": [0.0] * 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma4_text": {"global_head_dim": 8, "layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0,
                    "pad_token_id": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 0, "use_mamba_kernels": False},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1}, "falcon_h1": {"mamba_d_ssm": 64},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "recurrent_gemma": {"num_hidden_layers": 3}, "modernbert-decoder": {"pad_token_id": 1},
}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
REPEATED = [0, 1, 2, 0, 1, 2, 0, 2]  # rows of a prompt apart from each other
COLUMNS = ("sampled", "padding", "train", "sharing", "FLOPs")
TOLERANCE = 1e-3


def small_config(family):
    """The config of a small model of a family, or None where the sizes above do not make one."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            kind = CONFIG_MAPPING[family]
            if hasattr(kind(), "text_config"):
                text, seen = small_config(kind().text_config.model_type), getattr(kind(), "vision_config", None)
                vision = {name: value for name, value in VISION.items() if seen is not None and name in seen.to_dict()}
                sizes = {"text_config": text.to_dict()} | ({"vision_config": vision} if vision else {})
            else:
                known, own = {*kind().to_dict(), *kind.attribute_map}, OVERRIDES.get(family, {})
                sizes = {name: value for name, value in SMALL.items() if name in known} | own
            config = kind(**{name: value for name, value in sizes.items() if value is not ...})
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
        return config if model.num_parameters() < 2e6 else None
    except Exception:  # configs are refused with errors of any type
        return None


def save_small(config, folder, pad_is_eos):
    """Save a random model, whose weights are large enough for its distributions to be far from uniform, with a tokenizer of words."""
    torch.manual_seed(0)
    tokenizer = tasks.build_tokenizer()
    if pad_is_eos:
        tokenizer.pad_token = tokenizer.eos_token
    else:
        config.pad_token_id = tokenizer.pad_token_id
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1 and parameter.std() < 0.05:
            parameter.data *= 8
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measure(model, tokenizer, args):
    """{column: number} of a loaded model."""
    prompts = [problem["prompt_ids"] for problem in problems(tokenizer)]
    padded = sampling.left_pad([prompts[i] for i in REPEATED], tokenizer.pad_token_id, "cpu")  # (8, P) each
    torch.manual_seed(1)
    ids, mask, drawn = sampling.generate(model, *padded, models.eos_ids(model, tokenizer), tokenizer.pad_token_id, 12, with_logps=True)
    batch, away = scoring.Rows(*padded, ids, mask), {}

    def gradient():
        model.zero_grad()
        logps, entropy = engine.policy_logps(model, batch, args)
        (logps * torch.linspace(-1, 2, len(logps))[:, None] + 0.3 * entropy).sum().backward()
        return logps.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    logps, shared = gradient()
    compute, scoring.tokens_computed = scoring.tokens_computed, lambda num_prompts, num_rows, width, length: num_rows * (width + length)
    try:
        plain, own = gradient()
    finally:
        scoring.tokens_computed = compute
    with torch.no_grad():
        alone = [engine.policy_logps(model, batch[torch.tensor([row])], args)[0][0] for row in range(len(ids))]
        model.train()
        random = engine.policy_logps(model, batch, args)[0]
        model.eval()
    away["sampled"] = float((logps - drawn)[mask].abs().max())
    away["padding"] = max(float((one - row[: len(one)]).abs().max()) for one, row in zip(alone, logps))
    away["train"] = float((random - logps).abs().max())
    away["sharing"] = max(float((shared - own).norm() / own.norm()), float((logps - plain).abs().max()))
    return away


def problems(tokenizer):
    """Three prompts of unequal length, longer than a sliding window of 16."""
    texts = [problem["prompt"] for problem in (tasks.problems("bills", "train", "hard", 1, seed=0)[0],
                                               *tasks.problems("diary", "train", "hard", 2, seed=0))]
    texts[0] = " ".join(texts[0].split()[:9])
    return [{"prompt_ids": tokenizer(text)["input_ids"], "answer": "0"} for text in texts]


def counted_flops(model, length=32):
    """The matrix products of one forward pass as torch counts them; for attention half of the square, as in the ledger."""
    totals = []
    model.set_attn_implementation("eager")  # torch does not count the fused kernels of a CPU
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    for width in (length, 2 * length):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(input_ids=torch.arange(width)[None] + 5, use_cache=False)
        totals.append(counter.get_total_flops())
    square = (totals[1] - 2 * totals[0]) / 2  # of `length`: totals = linear + square, 2 linear + 4 square
    return totals[0] - square / 2


def examine(family, config):
    """One row of the table: the larger of the numbers of both pad tokens, and the verdict."""
    row = {"family": family}
    for pad_is_eos in (False, True):
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            args = grpo.Args(model_name_or_path=folder, max_completion_length=12, max_prompt_length=64, dtype="float32",
                             logprob_impl="tiled" if pad_is_eos else "reference")
            try:
                save_small(config, folder, pad_is_eos)
                model, tokenizer = engine.load_policy(args)
                row |= {"class": type(model).__name__, "parameters": model.num_parameters()}
                ledger = Flops.of(model)
                model.eval()
                self_check(model, tokenizer, problems(tokenizer), args)
                numbers = measure(model, tokenizer, args)
                if not pad_is_eos:
                    row["FLOPs"] = ledger.forward([32]) / max(1, counted_flops(model))
            except (engine.BadArgument, engine.RunError) as error:
                return row | {"verdict": f"refused: {printable(str(error)).replace(folder, family)}"}
            except Exception:
                return row | {"verdict": "FAULT: " + traceback.format_exc(limit=-3)}
        row |= {name: max(value, row.get(name, 0.0)) for name, value in numbers.items()}
    silent = [name for name in ("sampled", "padding", "sharing") if not row[name] <= TOLERANCE]
    return row | {"verdict": f"FAULT: {', '.join(silent)}" if silent else "works"}


def table(rows, missing):
    """The table as Markdown."""
    lines = ["# Model families", "", f"`python bench/families.py`, transformers {transformers.__version__}, torch {torch.__version__}, "
             f"{platform.machine()}, one thread. What the columns say stands at the top of bench/families.py.", ""]
    counts = {word: sum(row["verdict"].startswith(word) for row in rows) for word in ("works", "refused", "FAULT")}
    lines += [f"{len(rows)} families: {counts['works']} work, {counts['refused']} are refused, {counts['FAULT']} fail otherwise.", "",
              "| family | class | parameters | " + " | ".join(COLUMNS) + " | verdict |", "|---" * (len(COLUMNS) + 4) + "|"]
    for row in rows:
        numbers = (f"{row[name]:.2f}" if name == "FLOPs" else f"{row[name]:.0e}" for name in COLUMNS if name in row)
        cells = [row["family"], row.get("class", ""), f"{row['parameters']:,}" if "parameters" in row else "", *numbers]
        lines.append("| " + " | ".join(cells + [""] * (len(COLUMNS) + 3 - len(cells)) + [row["verdict"].strip().splitlines()[-1]]) + " |")
    return "\n".join([*lines, "", "Not built small by the sizes of the script, or not of text alone: " + ", ".join(missing) + ".", ""])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="FAMILY", help="print the rows of these families, and write nothing")
    only = parser.parse_args().only
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    rows, missing = [], []
    for family in only or transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        config = small_config(family)
        if config is None:
            missing.append(family)
            continue
        rows.append(examine(family, config))
        print(f"{family:24}{rows[-1]['verdict']}", flush=True)
    text = table(rows, missing)
    print(text)
    if not only:
        folder = ROOT / "results"
        (folder / "families.md").write_text(text)
        (folder / "families.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
