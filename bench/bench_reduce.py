"""Seconds that two ranks need to sum gradients: in one collective call, as --parallel ddp does, or in one for each weight.

    torchrun --nproc_per_node=2 bench/bench_reduce.py          write results/step/reduce.json

The two take turns. Machines are shared: trust the ratio, which is the median over rounds.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import engine  # noqa: E402
from bench_step import CONFIGS  # noqa: E402
from engine import ranks  # noqa: E402
from measure import machine  # noqa: E402

MODELS = {"tiny_model": 40, "llama-3m": 40, "SmolLM2-135M, random": 12}  # rounds


def each(gradients):
    for gradient in gradients:
        torch.distributed.all_reduce(gradient)


def whole(gradients):
    torch.distributed.all_reduce(gradients[0].new_empty(0).set_(gradients[0].untyped_storage()))


def main():
    torch.set_num_threads(1)
    results = {}
    for name, rounds in MODELS.items():
        model = AutoModelForCausalLM.from_config(CONFIGS[name]) if name in CONFIGS else AutoModelForCausalLM.from_pretrained(ROOT / name)
        engine.zero_grad(model)
        gradients, seconds = [parameter.grad for parameter in model.parameters()], {each: [], whole: []}
        for number in range(rounds + 1):
            for function in (each, whole) if number % 2 else (whole, each):
                ranks.wait()
                began = time.perf_counter()
                function(gradients)
                seconds[function].append(time.perf_counter() - began)
        ratios = [slow / fast for slow, fast in zip(seconds[each][1:], seconds[whole][1:])]
        results[name] = {"weights": len(gradients), "mb": round(sum(map(torch.numel, gradients)) * 4 / 2**20, 1),
                         **{f"ms_{way.__name__}": round(1000 * statistics.median(taken[1:]), 1) for way, taken in seconds.items()},
                         "ratio": round(statistics.median(ratios), 2)}
        print(name, results[name], flush=True)
    if ranks.rank() == 0:
        record = {"command": "torchrun --nproc_per_node=2 bench/bench_reduce.py", "machine": machine(), "torch": torch.__version__,
                  "models": results}
        (ROOT / "results" / "step" / "reduce.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    engine.launch(main)
