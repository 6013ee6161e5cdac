"""A training step of two ranks, beside that of one process and beside what the machine can give.

    python bench/bench_ranks.py                write results/step/ranks.json; needs two cores without other work

Beside two ranks that share 8 prompts x 8 completions run two processes with 4 completions each that know nothing of each other: more
than these no way of sharing can reach. The three take turns, and of each the fastest median of three steps counts, because what else
runs on a machine only adds time. A Llama of 32 M parameters with random weights, one thread a process; completions end at lengths
drawn uniformly from 1 to 64, and rewards are a hash of the text, so that every row is trained.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import grpo  # noqa: E402
from bench_step import SameDraw  # noqa: E402
from engine import ranks, tasks  # noqa: E402
from engine.data import step_problems  # noqa: E402
from engine.flops import Flops  # noqa: E402
from measure import machine  # noqa: E402

PROMPTS, LENGTH, STEPS, TURNS = 8, 64, 4, 2
WAYS = {"one process": (8, 1, 1), "two ranks": (8, 2, 1), "two processes apart": (4, 1, 2)}  # completions a prompt, ranks, processes


def run_steps(num_generations):
    """Train a few steps; rank 0 prints the median of their seconds."""
    ranks.start()
    torch.set_num_threads(1)
    args = grpo.Args(prompts_per_step=PROMPTS, num_generations=num_generations, max_completion_length=LENGTH, scale_rewards="none",
                     micro_batch_tokens=2048, reward_fn=f"{ROOT / 'bench' / 'bench_step.py'}:reward", template="none")
    tokenizer = AutoTokenizer.from_pretrained(tasks.TINY_MODEL, padding_side="left")
    tokenizer.stop_ids = [1]
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=576, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=9,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=1, pad_token_id=0))
    problems = common.encode_problems(tasks.load_task("bills", "train", {"easy": PROMPTS * STEPS}), tokenizer, args)
    optimizer, flops, generate, draw = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True), Flops.of(model), model.generate, None

    def same_generate(input_ids, **kwargs):
        nonlocal draw
        if draw is None:  # the step's first call; later ones go on with the rows that have not ended
            num_rows = PROMPTS * num_generations
            lengths = torch.randint(1, LENGTH + 1, (num_rows,), generator=torch.Generator().manual_seed(step))[ranks.own_slice(num_rows)]
            draw = SameDraw(step, len(lengths), lengths, input_ids.shape[1], 1)
        output = generate(input_ids=input_ids, **kwargs | {"logits_processor": [draw]})
        draw.rows = draw.rows[~(output.sequences[:, draw.prompt_width :] == 1).any(dim=1)]
        return output

    model.generate, seconds = same_generate, []
    for step in range(STEPS):
        draw = None
        ranks.wait()
        began = time.perf_counter()
        batch, _, _ = grpo.rollout(model, None, tokenizer, step_problems(problems, PROMPTS, 0, step), args, flops)
        grpo.update(model, optimizer, batch, args, flops)
        optimizer.zero_grad()
        ranks.wait()
        seconds.append(time.perf_counter() - began)
    if ranks.rank() == 0:
        print(f"SECONDS {statistics.median(seconds[1:])}", flush=True)
    ranks.finish()


def measure(way):
    """Seconds of a step: of the slowest of the processes that know nothing of each other."""
    num_generations, num_ranks, num_processes = WAYS[way]
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={num_ranks}", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    words = [sys.executable, *launcher * (num_ranks > 1), __file__, "--num_generations", str(num_generations)]
    processes = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(num_processes)]
    found = [[float(line.split()[1]) for line in process.communicate()[0].splitlines() if line.startswith("SECONDS")]
             for process in processes]
    if not all(found):
        sys.exit(f"{way}: a process failed")
    return max(seconds[0] for seconds in found)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_generations", type=int, help=argparse.SUPPRESS)  # how this script calls itself
    args = parser.parse_args()
    if args.num_generations:
        return run_steps(args.num_generations)
    taken = {way: [] for way in WAYS}
    for _ in range(TURNS):
        for way in WAYS:
            taken[way].append(measure(way))
            print(f"{way}: {taken[way][-1]:.2f} s a step", flush=True)
        fastest = {way: min(seconds) for way, seconds in taken.items()}
        record = {"command": "python bench/bench_ranks.py", "machine": machine(), "torch": torch.__version__, "seconds": taken,
                  "times_one_process": {way: round(fastest["one process"] / seconds, 2) for way, seconds in fastest.items()}}
        (ROOT / "results" / "step" / "ranks.json").write_text(json.dumps(record, indent=1) + "\n")
    print(record["times_one_process"])


if __name__ == "__main__":
    main()
