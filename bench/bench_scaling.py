"""How a step of grpo.py grows: seconds and peak memory against completion length, group size and model size, and with two ranks.

    python bench/bench_scaling.py              writes results/step/scaling.json, scaling.md and scaling.png
    python bench/bench_scaling.py ranks        measures only this anew: of length, generations, model, ranks
    python bench/bench_scaling.py --render     only rewrites table and figure from scaling.json

Each point is a process of its own, one thread each; seconds are the median of three steps on the clock on the wall, after one to warm
up, so run it on a quiet machine. Two ranks are compared with one, and with what the machine can give: two processes at once that do
half the step each and know nothing of each other; the three take turns, and of each the fastest counts, for what else runs on a shared
machine only adds time. Models are Llamas of random weights; completions end at lengths drawn uniformly from 1
to the longest, the same on every rank count; rewards are a hash of the text, so that every row is trained. Memory is Linux's high-water
mark, less what the process held before its first step, of the rank that has more.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from bench_logprob import peak_mb  # noqa: E402
from bench_step import SameDraw  # noqa: E402
from measure import machine  # noqa: E402

import common  # noqa: E402
import data  # noqa: E402
import grpo  # noqa: E402
import parallel  # noqa: E402
import tasks  # noqa: E402

RESULTS = ROOT / "results" / "step" / "scaling.json"
SHAPES = {"3 M": (256, 688, 4, 8, 8), "32 M": (576, 1536, 8, 9, 9), "106 M": (576, 1536, 30, 9, 3)}  # H, MLP, layers, heads, of keys
USUAL = {"length": 128, "generations": 8, "model": "3 M", "ranks": 1}
HALF = {"generations": USUAL["generations"] // 2, "apart": 2}
POINTS = [  # (what varies, how a point differs from the usual one)
    ("length", [{"length": length} for length in (64, 128, 256, 512, 1024)]),
    ("generations", [{"generations": generations} for generations in (4, 8, 16, 32)]),
    ("model", [{"model": model} for model in SHAPES]),
    ("ranks", [{"model": "32 M", "length": 64} | way for way in ({}, {"ranks": 2}, HALF)]),
]
TITLES = {"length": "longest completion, tokens", "generations": "completions a prompt", "model": "parameters", "ranks": "processes"}
PROMPTS, STEPS, TURNS = 8, 4, 2


def run_point(point):
    """Train a few steps; rank 0 prints the numbers of the point."""
    parallel.start()
    torch.set_num_threads(1)
    args = grpo.Args(prompts_per_step=PROMPTS, num_generations=point["generations"], max_completion_length=point["length"],
                     scale_rewards="none", micro_batch_tokens=2048, reward_fn=f"{ROOT / 'bench' / 'bench_step.py'}:reward", template="none")
    _, tokenizer = common.load_model("tiny_model")
    hidden, mlp, layers, heads, key_heads = SHAPES[point["model"]]
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=key_heads, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=None, eos_token_id=1,
        pad_token_id=0))
    rows = data.encode_rows(list(tasks.load_task("bills", "train", {"easy": PROMPTS * STEPS})), tokenizer, args)
    optimizer, flops, generate = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True), common.Flops.of(model), model.generate
    draw = None

    def same_generate(input_ids, **kwargs):
        nonlocal draw
        if draw is None:  # the step's first call; later ones go on with the rows that have not ended
            seeded, num_rows = torch.Generator().manual_seed(step), PROMPTS * point["generations"]
            lengths = torch.randint(1, point["length"] + 1, (num_rows,), generator=seeded)[parallel.share(num_rows)]
            draw = SameDraw(step, len(lengths), lengths, input_ids.shape[1], 1)
        output = generate(input_ids=input_ids, **kwargs | {"logits_processor": [draw]})
        draw.rows = draw.rows[~(output.sequences[:, draw.prompt_width :] == 1).any(dim=1)]
        return output

    model.generate = same_generate
    seconds, rollouts, held = [], [], peak_mb("cpu")
    for step in range(STEPS):
        draw = None
        parallel.wait()
        began = time.perf_counter()
        batch, _, _ = grpo.rollout(model, None, tokenizer, data.step_rows(rows, PROMPTS, 0, step), args, flops)
        rollouts.append(time.perf_counter() - began)
        grpo.update(model, optimizer, batch, args, flops)
        parallel.wait()
        seconds.append(time.perf_counter() - began)
    peak = max(parallel.gather([peak_mb("cpu") - held]))
    if parallel.rank() == 0:
        print("POINT " + json.dumps({"seconds": statistics.median(seconds[1:]), "rollout": statistics.median(rollouts[1:]),
                                     "extra_mb": round(peak), "tokens": int(batch.completion_mask.sum())}))
    parallel.finish()


def measure(point):
    """The numbers of a point, from processes of their own: as many as it has ranks, or that know nothing of each other."""
    words = [sys.executable, __file__, "--point", json.dumps(point)]
    if point["ranks"] > 1:
        words[1:1] = ["-m", "torch.distributed.run", f"--nproc_per_node={point['ranks']}", "--rdzv_backend=c10d",
                      "--rdzv_endpoint=localhost:0"]
    processes = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(point.get("apart", 1))]
    printed = [process.communicate()[0] for process in processes]
    lines = [line for text in printed for line in text.splitlines() if line.startswith("POINT ")]
    if len(lines) < len(processes):
        sys.exit(f"{point} failed")
    return point | max((json.loads(line.removeprefix("POINT ")) for line in lines), key=lambda numbers: numbers["seconds"])


def render(record):
    """Write scaling.md and scaling.png."""
    lines = [f"`{record['settings']} python bench/bench_scaling.py`, {record['machine']}, torch {record['torch']}: {PROMPTS} prompts, "
             + ", ".join(f"{TITLES[name]} {value}" for name, value in USUAL.items()) + ", unless the row says otherwise.", "",
             "| what varies | value | seconds a step | of it rollout | MB beyond start |", "|---|---|---|---|---|"]
    lines += [f"| {TITLES[name]} | {point[name]} | {point['seconds']:.2f} | {point['rollout']:.2f} | {point['extra_mb']} |"
              for name, points in record["points"].items() if name != "ranks" for point in points]
    one, two, apart = (point["seconds"] for point in record["points"]["ranks"])
    usual = record["points"]["ranks"][0]
    lines += ["", f"Equal global batch, {usual['model']} parameters, completions of up to {usual['length']} tokens:",
              f"one process {one:.2f} s, two ranks {two:.2f} s ({one / two:.2f} times as fast),",
              f"two processes that know nothing of each other, half the groups each, {apart:.2f} s ({one / apart:.2f} times)."]
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n")

    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(2, 3, figsize=(9, 4.8), layout="constrained", sharex="col")
    for column, name in enumerate(("length", "generations", "model")):
        points = record["points"][name]
        places = [float(str(point[name]).split()[0]) for point in points]
        for row, (key, label) in enumerate((("seconds", "seconds a step"), ("extra_mb", "MB beyond start"))):
            axes[row, column].plot(places, [point[key] for point in points], marker="o", color="#0072B2", label="step")
            if key == "seconds":
                axes[row, column].plot(places, [point["rollout"] for point in points], marker=".", color="#999999", label="of it rollout")
            axes[row, column].set(xscale="log", yscale="log" if key == "seconds" else "linear", ylabel=label if column == 0 else None)
            if key == "extra_mb":
                axes[row, column].set_ylim(0)
            axes[row, column].set_xticks(places, [str(point[name]) for point in points], minor=False)
            axes[row, column].minorticks_off()
            axes[row, column].grid(alpha=0.3)
        axes[1, column].set_xlabel(TITLES[name])
    axes[0, 0].legend(fontsize="small")
    figure.savefig(RESULTS.with_suffix(".png"), dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *TITLES], default=[], help="none: all")
    parser.add_argument("--render", action="store_true", help="run nothing")
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)  # how this script calls itself
    args = parser.parse_args()
    if args.point:
        return run_point(args.point)
    if not args.render:
        points = json.loads(RESULTS.read_text())["points"] if args.names else {}
        for name, changes in POINTS:
            if name in (args.names or TITLES):
                turns = [[measure(USUAL | change) for change in changes] for _ in range(TURNS if name == "ranks" else 1)]
                points[name] = [min(same, key=lambda point: point["seconds"]) for same in zip(*turns)]
                for point in points[name]:
                    print(point, flush=True)
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        settings = " ".join(f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("MALLOC_"))
        record = {"settings": settings, "machine": machine(), "torch": torch.__version__, "points": points}
        RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    render(json.loads(RESULTS.read_text()))


if __name__ == "__main__":
    main()
