"""What a decoding step of HF generate costs on a GPU: the clock, the share in which the GPU works, and a static cache with compilation.

    python bench/bench_decode.py "Qwen2.5-0.5B, random" [--output decode.md]

64 rows with prompts of 128 tokens, random weights, bfloat16 autocast as in training. With a static cache transformers compiles the
model's forward pass on a GPU. Each new shape is compiled anew, and every number is of one call.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, GenerationConfig

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from bench_step import CONFIGS  # noqa: E402
from engine.models import autocast, keep_float32  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=CONFIGS)
    parser.add_argument("--tokens", type=int, default=128, help="of a completion")
    parser.add_argument("--output", help="file of the printed lines. Default: none")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[args.model], dtype=torch.float32).to(device).eval()
    model.compute_dtype = torch.bfloat16
    keep_float32(model.get_output_embeddings())
    prompts = torch.randint(2, 200, (64, 128), device=device)
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    lines = [f"`python bench/bench_decode.py {' '.join(map(repr, sys.argv[1:]))}`, "
             f"{torch.cuda.get_device_name() if device == 'cuda' else device}, torch {torch.__version__}", ""]

    def say(line):
        print(line, flush=True)
        lines.append(f"- {line}")

    def seconds(num_rows, num_tokens, **settings):
        config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=num_tokens, min_new_tokens=num_tokens, eos_token_id=1,
                                  pad_token_id=0, **settings)
        synchronize()
        began = time.perf_counter()
        with torch.no_grad(), autocast(model):
            model.generate(prompts[:num_rows], attention_mask=torch.ones_like(prompts[:num_rows]), generation_config=config)
        synchronize()
        return time.perf_counter() - began

    seconds(64, 8)
    for num_rows in (64, 1):
        say(f"{num_rows} rows: {1000 * seconds(num_rows, args.tokens) / args.tokens:.2f} ms a step")
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]) as profiler:
        seconds(64, 16)
    busy = sum(event.self_device_time_total for event in profiler.key_averages())
    say(f"64 rows: the GPU works {busy / 16 / 1000:.2f} ms of a step")
    for num_rows, num_tokens in ((64, args.tokens), (64, args.tokens), (64, 2 * args.tokens), (48, args.tokens)):
        took = seconds(num_rows, num_tokens, cache_implementation="static")
        say(f"static cache, {num_rows} rows, {num_tokens} tokens: {took:.1f} s, {1000 * took / num_tokens:.2f} ms a step")
    if args.output:
        Path(args.output).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
