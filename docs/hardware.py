"""The README's hardware table: what the --dry_run rule says of known model sizes on one GPU.

    python docs/hardware.py     write it anew; tests/test_results.py checks that it is current
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import grpo  # noqa: E402
from estimate import estimate_memory  # noqa: E402

SHAPES = {  # the published configs: hidden size, layers, heads, heads of keys and values, width of the MLP, words, tied embeddings
    "SmolLM2-135M": (576, 30, 9, 3, 1536, 49152, True),
    "Qwen2.5-0.5B": (896, 24, 14, 2, 4864, 151936, True),
    "Qwen2.5-1.5B": (1536, 28, 12, 2, 8960, 151936, True),
    "Qwen2.5-3B": (2048, 36, 16, 2, 11008, 151936, True),
    "Qwen2.5-7B": (3584, 28, 28, 4, 18944, 152064, False),
}
PROMPT = 256
LEAN = {"gradient_checkpointing": True, "generation_batch_size": 24}  # the default is 96 rows, one step's
BEGIN, END = "<!-- hardware: made by docs/hardware.py -->\n", "\n<!-- end of hardware -->"


def build(hidden, layers, heads, key_heads, mlp, words, tied):
    """A model of these shapes that holds no weights."""
    config = LlamaConfig(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=key_heads,
                         intermediate_size=mlp, vocab_size=words, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.compute_dtype = torch.bfloat16
    return model


def table():
    """The table as Markdown: GiB at the peak, by completion length, with default flags and with LEAN ones."""
    default = grpo.Args(dataset_name="my.jsonl", logprob_impl="tiled")
    lean = replace(default, **LEAN)
    flags = " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in LEAN.items())
    lines = [f"| GiB | parameters | weights, gradients, AdamW | peak, 1024 tokens | peak, 4096 tokens | the same with `{flags}` |",
             "|---|---|---|---|---|---|"]
    for name, shape in SHAPES.items():
        model = build(*shape)
        sizes = [estimate_memory(model, args, PROMPT, length, device="cuda") for args in (default, lean) for length in (1024, 4096)]
        fixed = sum(sizes[0][part] for part in ("parameters", "gradients", "AdamW states", "bfloat16 weights")) / 2**30
        short, long, lean_short, lean_long = (round(size["peak"] / 2**30) for size in sizes)
        lines.append(f"| {name} | {model.num_parameters() / 1e9:.2f} B | {fixed:.1f} | {short} | {long} | {lean_short}, {lean_long} |")
    return "\n".join(lines) + "\n"


def readme_with(text):
    """README with the table as it is now."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + "\n" + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme_with((ROOT / "README.md").read_text()))
