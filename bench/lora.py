"""LoRA beside full training: RePO on `bills`, SmolLM2-135M, and the loss that each rank reaches.

    python bench/lora.py              run what is missing, one process after the other, then write results/lora/
    python bench/lora.py --render     only write results/lora/README.md and summary.json from the finished runs

It needs peft, and what bench/smollm2.py needs. A run that results/lora/ has is never repeated: delete its folder to have it again. Full
RePO's tuning is that of compare.py.
"""

import argparse
import json
import os
import statistics
from pathlib import Path

import measure
import smollm2
from experiments import TUNING_SEED
from measure import ROOT
from run_numbers import chosen, seeds_of

RESULTS, RUNS = ROOT / "results" / "lora", Path("runs") / "lora"
SEEDS, RANK, WHOLE = (0, 1, 2), 16, 96  # WHOLE: the smaller side of every matrix of the tiny model
STEPS = 80  # of RePO; the rate is constant, so that a longer run begins with a shorter one
RATES = {"full": (2e-4, 5e-4, 1e-3), "LoRA": (1e-3, 2e-3, 5e-3)}
LORA = {"full": [], "LoRA": ["--lora_rank", str(RANK)]}
SMOLLM2_RATES = {"LoRA": 2e-4, "full": 2e-5}
SMOLLM2 = ["--model", smollm2.RUNS / "model", "--dataset_name", smollm2.RUNS / "train.jsonl", "--prompts_per_step", "3",
           "--num_generations", "8", "--max_completion_length", "32", "--micro_batch_tokens", "256", "--max_steps", "10",
           "--eval_steps", "0", "--save_steps", "0"]
SFT_RATES = {0: (1e-3, 2e-3), WHOLE: (1e-3, 2e-3), RANK: (2e-3,), 4: (2e-3,), 1: (2e-3,)}  # rank 0: full training
SFT_STEPS, WINDOW = 60, 10


def run(name, *words):
    """Run a command, unless results/lora/NAME has its records."""
    measure.run(["python", *map(str, words)], RUNS / name, RESULTS / name, quiet=True)


def run_repo(side, seed, rate):
    run(f"repo-{side}-{rate}-seed{seed}", "repo.py", "--task", "bills", "--max_steps", STEPS, "--seed", seed, "--learning_rate", rate,
        *LORA[side])


def run_all():
    for rank, rates in SFT_RATES.items():
        for rate in rates:
            run(f"sft-rank{rank}-{rate}", "sft.py", "--task", "bills", "--max_steps", SFT_STEPS, "--eval_steps", 0, "--lora_rank", rank,
                "--learning_rate", rate)
    smollm2.prepare()
    for side, rate in SMOLLM2_RATES.items():
        run(f"smollm2-{side}", "grpo.py", *SMOLLM2, "--learning_rate", rate, *LORA[side])
    for rate in RATES["LoRA"]:
        run_repo("LoRA", TUNING_SEED, rate)
    for seed in SEEDS:
        for side, rate in chosen(tuned()).items():
            run_repo(side, seed, rate)


# ---------------------------------------------------------------- numbers


def records_of(name):
    """Metrics of a run of this script; [] where it is missing."""
    return measure.load(RESULTS / name)[0] if (RESULTS / name).exists() else []


def hard(records):
    """{step: accuracy on hard problems, per cent} of the evaluations up to STEPS."""
    return {record["step"]: round(100 * record["eval/hard/avg@1"], 1) for record in records
            if "eval/hard/avg@1" in record and record["step"] <= STEPS}


def tuned():
    """{side: {rate: accuracy on hard problems, %, mean over the last three evaluations}} on the tuning seed."""
    curves = {side: {rate: hard(records_of(f"repo-{side}-{rate}-seed{TUNING_SEED}") or [
        record for run in seeds_of(f"tuning/bills/repo-{rate}") for record in run.stages[0] if side == "full"]) for rate in rates}
        for side, rates in RATES.items()}
    return {side: {rate: round(statistics.mean([*curve.values()][-3:]), 1) for rate, curve in of_side.items() if curve}
            for side, of_side in curves.items()}


def summarize():
    """The numbers of README.md, of the runs that are there."""
    found = tuned()
    rates = chosen({side: rates for side, rates in found.items() if rates})
    repo = {f"{side}, seed {seed}": hard(records) for side in rates for seed in SEEDS
            if (records := records_of(f"repo-{side}-{rates[side]}-seed{seed}"))}
    sft = {f"{f'rank {rank}' if rank else 'full'}, rate {rate}": [
        round(statistics.mean(record["loss"] for record in records if last - WINDOW < record["step"] <= last), 4)
        for last in range(WINDOW, SFT_STEPS + 1, WINDOW)]
        for rank, rates in SFT_RATES.items() for rate in rates if (records := [
            record for record in records_of(f"sft-rank{rank}-{rate}") if "loss" in record])}
    steps, rewards = {}, {}
    for side in SMOLLM2_RATES:
        if (RESULTS / f"smollm2-{side}.json").exists():  # by bench_step.py
            ours = json.loads((RESULTS / f"smollm2-{side}.json").read_text())["cases"]["smollm2"]["summary"]["ours"]
            steps[side] = {name: round(ours[name], 1) for name in ("seconds", "generate", "logps", "backward", "optimizer", "peak_mb")}
        if records := [record for record in records_of(f"smollm2-{side}") if "reward" in record]:
            rewards[side] = [round(record["reward"], 2) for record in records]
    return {"tuned": found, "rates": rates, "repo": repo, "sft": sft, "smollm2": steps, "rewards": rewards}


def table(titles, rows):
    """A table in Markdown."""
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|", *(f"| {' | '.join(map(str, row))} |" for row in rows)]
    return "\n".join(lines) if rows else "Not run yet."


def readme(summary):
    smollm2_rows = [(side, *row.values()) for side, row in summary["smollm2"].items()]
    return TEXT.format(
        rank=RANK, whole=WHOLE, steps=STEPS, seed=TUNING_SEED, window=WINDOW, machine=measure.machine(),
        tuned=table(("side", "rate", "hard, %"),
                    [(side, rate, value) for side, tried in summary["tuned"].items() for rate, value in tried.items()]),
        repo=table(("run", "hard, %, by step"), [(name, ", ".join(f"{step}: {value:.0f}" for step, value in curve.items()))
                                                 for name, curve in summary["repo"].items()]),
        sft=table(("run", *(f"to step {last}" for last in range(WINDOW, SFT_STEPS + 1, WINDOW))),
                  [(name, *values) for name, values in summary["sft"].items()]),
        smollm2=table(("side", "s a step", "generate", "logps", "backward", "optimizer", "peak MB"), smollm2_rows),
        rewards=table(("side", "mean reward of each step"), [(side, ", ".join(map(str, row))) for side, row in summary["rewards"].items()]))


TEXT = """# LoRA beside full training

Written by `python bench/lora.py` from the runs in this folder ({machine}; each has its command, code and versions).

In short: three seeds do not tell RePO with rank {rank} from full training. LoRA's best rate is twice that of full training, not ten
times. A rank as large as the matrices comes near the loss of full training and stays above it; the embeddings are frozen. SmolLM2-135M
needs 0.52 of the memory of full training, and the same time within the noise of a shared machine. Ten steps of GRPO with SmolLM2 show
no trend on either side.

**RePO on `bills`**, rank {rank} against full training. Learning rates tried on seed {seed}, three a side; hard is the accuracy on held-out
hard problems, mean of the last three evaluations up to step {steps}. Full training's are the tuning runs of `bench/compare.py`.

{tuned}

Each side at its rate (the smallest within two points of the best):

{repo}

**The loss that a rank reaches**: `sft.py --task bills`, mean training loss, nats a token, of {window} steps each. Rank {whole} is as large
as the matrices; embeddings, head and norms are frozen with LoRA and trained without.

{sft}

**SmolLM2-135M**, 2 prompts x 8, completions of up to 64 tokens (`bench/bench_step.py`, the case smollm2; the commands are in
`smollm2-*.json`): seconds of processor time, peak memory of the process, float32 on both sides.

{smollm2}

Rewards of `grpo.py` on the sums of `bench/smollm2.py`:

{rewards}
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", action="store_true", help="run nothing")
    if not parser.parse_args().render:
        os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # of the runs
        run_all()
    summary = summarize()
    (RESULTS / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    (RESULTS / "README.md").write_text(readme(summary))


if __name__ == "__main__":
    main()
