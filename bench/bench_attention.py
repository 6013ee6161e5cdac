"""What a batch of a new length costs on a GPU, with cuDNN's attention (torch's choice on Hopper) and without.

    python bench/bench_attention.py cudnn|none

A model of SmolLM2-135M's size with random weights, in bfloat16, scores 16 completions of each length after prompts of 128 tokens.
cuDNN plans its attention anew for each shape. A length that comes a second time shows what remains.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from bench_step import CONFIGS  # noqa: E402
from engine import scoring  # noqa: E402
from engine.models import keep_float32  # noqa: E402

LENGTHS = 500, 500, 512, 512, 340, 340, 200, 200, 344, 344, 208, 208


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("attention", choices=["cudnn", "none"])
    torch.backends.cuda.enable_cudnn_sdp(parser.parse_args().attention == "cudnn")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    model = AutoModelForCausalLM.from_config(CONFIGS["SmolLM2-135M, random"], dtype=torch.float32).to(device).train()
    model.compute_dtype = torch.bfloat16
    keep_float32(model.get_output_embeddings())
    print("| tokens | forward, s | backward, s |\n|---|---|---|")
    for length in LENGTHS:
        prompts, completions = (torch.randint(2, 200, (16, tokens), device=device) for tokens in (128, length))
        synchronize()
        began = time.perf_counter()
        masks = (torch.ones_like(ids, dtype=torch.bool) for ids in (prompts, completions))
        logps, _ = scoring.score_completions(model, prompts, next(masks), completions, next(masks))
        synchronize()
        scored = time.perf_counter()
        logps.sum().backward()
        synchronize()
        print(f"| {length} | {scored - began:.3f} | {time.perf_counter() - scored:.3f} |", flush=True)


if __name__ == "__main__":
    main()
