"""Every method on a real pretrained model, SmolLM2-135M-Instruct, which learns sums of three numbers: what it learns, and what it keeps.

    python bench/real_model.py --prepare    model, problems, traces by rejection sampling, and what the base knew; into results/real_model/
    python bench/real_model.py --tune       learning rates, on a seed of their own, until the best has both its neighbours
    python bench/real_model.py              run what is missing, then write results/real_model/ and its part of docs/results.md
    python bench/real_model.py --render     run nothing

bench/smollm2.py makes the model, and says what it needs. Training problems have three summands, on which the base is right a few times
in a hundred; a trace says in words that they are added in two steps. PrefixRL and one SFT → GRPO have the base's own right solutions, and
are charged for their rejection sampling. Sums of two numbers (easy) and of two-digit numbers (other) are evaluated only. What the model
keeps is the likelihood of the answers that the base gave to general questions before any training.
"""

import argparse
import itertools
import json
import os
import random
import sys

import figures
import smollm2
from compare import refuse_unlike, run_all
from experiments import LEARNING_RATES, REAL_ARMS, REAL_RATES, REAL_TRACES, REAL_TUNED, REAL_WORK, SEEDS, SHORT, TUNING_SEED
from measure import ROOT, call
from pages import cell, with_blocks
from run_numbers import NUMBERS, RESULTS, chosen, interval, neighbours, seeds_of

TRAIN, EVAL = 60, {"hard": 48, "easy": 24, "other": 24}
GENERAL = RESULTS / "real_model" / "general.jsonl"
QUESTIONS = ROOT / "bench" / "questions.txt"

# ---------------------------------------------------------------- problems, traces, and what the base knew


def make_problems(seed=0):
    """(training rows, evaluation rows); no sum of three numbers is in both, in any order."""
    rng = random.Random(seed)
    hard = sorted({(a, b, c) for c in range(2, 10) for b in range(c, 10) for a in range(b, 10)} - smollm2.SHOWN)
    easy = sorted({(a, b) for b in range(2, 10) for a in range(b, 20)} - smollm2.SHOWN)
    for sums in (hard, easy):
        rng.shuffle(sums)
    held_out = [smollm2.row(rng.sample(numbers, 3), "hard") for numbers in hard[: EVAL["hard"]]]
    held_out += [smollm2.row(rng.sample(numbers, 2), "easy") for numbers in easy[: EVAL["easy"]]]
    pairs = rng.sample(list(itertools.product(range(11, 50), repeat=2)), EVAL["other"])
    held_out += [smollm2.row(numbers, "other") for numbers in pairs]
    orders = sorted(order for numbers in hard[EVAL["hard"] :] for order in set(itertools.permutations(numbers)))
    return [smollm2.row(order, "hard") for order in rng.sample(orders, TRAIN)], held_out


def load(folder):
    """(model, tokenizer) of a folder, on one thread, as the runs have."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(ROOT / folder, dtype=torch.float32), AutoTokenizer.from_pretrained(ROOT / folder)


def write_answers(folder, length=40):
    """Write the base's greedy answers of at most `length` tokens to the general questions: lines of prompt_ids and ids."""
    import torch
    from tqdm import tqdm

    model, tokenizer = load(folder)
    lines = []
    for question in tqdm(QUESTIONS.read_text().splitlines(), desc="general questions"):
        turns = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        with torch.no_grad():
            (ids,) = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=length)
        ids = ids[len(prompt) :].tolist()
        lines.append(json.dumps({"question": question, "answer": tokenizer.decode(ids), "prompt_ids": prompt, "ids": ids}) + "\n")
    GENERAL.write_text("".join(lines))


def kept(folder):
    """{"general": {"nats"}}: mean log-likelihood of a token of the base's answers, in nats, under the model in `folder`."""
    import torch

    model, _ = load(folder)
    total, count = 0.0, 0
    for row in map(json.loads, GENERAL.read_text().splitlines()):
        ids = torch.tensor([row["prompt_ids"] + row["ids"]])
        with torch.no_grad():
            logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])  # (T - 1, 1)
        total, count = total + logps[-len(row["ids"]) :].sum().item(), count + len(row["ids"])
    return {"general": {"nats": total / count}}


def prepare():
    """Make what is missing of model, problems, answers and traces."""
    model = REAL_WORK / "model"
    GENERAL.parent.mkdir(parents=True, exist_ok=True)
    (ROOT / REAL_WORK).mkdir(parents=True, exist_ok=True)
    if not (ROOT / model).exists():
        smollm2.save_model(ROOT / model)
    for name, rows in zip(("train", "eval"), make_problems()):
        (ROOT / REAL_WORK / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if not GENERAL.exists():
        write_answers(model)
    ledger = ROOT / REAL_TRACES.replace(".jsonl", ".ledger.json")
    if not ledger.exists() or not json.loads(ledger.read_text())["done"]:
        call(["python", "eval.py", "--model", str(model), "--dataset_name", str(REAL_WORK / "train.jsonl"), "--save_traces", REAL_TRACES,
              "--num_generations_eval", "8", "--max_tries", "96", "--max_completion_length", "32"], ROOT / REAL_WORK / "traces.out")
        ledger.write_text(ledger.read_text().replace(f"{ROOT}/", ""))  # names no folder of a machine


# ---------------------------------------------------------------- tuning


def tuning_runs():
    """{arm: {rate: its tuning run}}."""
    found = {}
    for arm, rate in itertools.product(REAL_TUNED, REAL_RATES):
        for each in seeds_of(f"tuning/{arm}-{rate}"):
            found.setdefault(arm, {})[rate] = each
    return found


def tuned():
    """{arm: {rate: accuracy on hard problems, %, at the end}} of the tuning runs."""
    return {arm: {rate: NUMBERS["hard"][2](each) for rate, each in rates.items()} for arm, rates in tuning_runs().items()}


def to_try(rates):
    """The rates of an arm that are still to be run: 1e-5, and the neighbours of the chosen one."""
    return neighbours(chosen({"": rates})[""] if rates else 1e-5, rates, REAL_RATES)


def tune(jobs):
    """Run rates until the chosen one of each arm has both its neighbours of REAL_RATES, and print them."""
    while missing := [(arm, rate) for arm in REAL_TUNED for rate in sorted(to_try(tuned().get(arm, {})))]:
        run_all([(arm, TUNING_SEED, RESULTS, rate, f"tuning/{arm}-{rate}", kept) for arm, rate in missing], jobs)
    for arm, rate in chosen(tuned()).items():
        print(arm, tuned()[arm], "->", rate)


# ---------------------------------------------------------------- results

TITLES = {f"real/{method}": title for method, title in (
    {"base": "base"} | SHORT | {"prefixrl": "PrefixRL, own traces", "sft-grpo-own": "SFT → GRPO, own traces"}).items()
          if f"real/{method}" in REAL_ARMS}
AT_THE_END = {name: NUMBERS[name] for name in ("hard", "hard_pass", "easy", "other")} | {
    "general": ("general answers, nats a token", 2, lambda run: run.evaluation["general"]["nats"])}
SHOWN_OF_TUNING = ("hard", "easy", "other", "general")
COLUMNS = AT_THE_END | {name: NUMBERS[name] for name in ("tflop", "tflop_traces")} | {
    "minutes": ("minutes", 0, lambda run: sum(measured["seconds"] for measured in run.measured) / 60)}


def summarize():
    """{arm: {"title", "seeds", number: interval}} of the finished runs."""
    found, runs = {}, []
    for arm, title in TITLES.items():
        if finished := seeds_of(arm, seeds=SEEDS):
            runs += finished
            columns = COLUMNS if finished[0].stages else AT_THE_END
            found[arm] = {"title": title, "seeds": len(finished)} | {
                name: interval([number(run) for run in finished]) for name, (_, _, number) in columns.items()}
    refuse_unlike(runs)
    return found


def table(summary):
    """Markdown: a line per arm, mean and 95 % interval over seeds."""
    lines = [f"| | seeds | {' | '.join(title for title, *_ in COLUMNS.values())} |", "|---" * (len(COLUMNS) + 2) + "|"]
    lines += [f"| {row['title']} | {row['seeds']} | " + " | ".join(
        cell(row[name], digits) if name in row else "–" for name, (_, digits, _) in COLUMNS.items()) + " |" for row in summary.values()]
    return "\n".join(lines)


def tuning_table():
    """Markdown: what each tuning run learnt and kept, the chosen rate in bold."""
    runs, picked = tuning_runs(), chosen(tuned())
    refuse_unlike([each for rates in runs.values() for each in rates.values()])
    lines = [f"| | {' | '.join(f'{rate:g}' for rate in REAL_RATES)} |", "|---" * (len(REAL_RATES) + 1) + "|"]
    for arm, rates in runs.items():
        cells = {rate: " · ".join(f"{AT_THE_END[name][2](each):.{AT_THE_END[name][1]}f}" for name in SHOWN_OF_TUNING)
                 for rate, each in rates.items()}
        cells[picked[arm]] = f"**{cells[picked[arm]]}**"
        lines.append(f"| {TITLES[arm]} | {' | '.join(cells.get(rate, '') for rate in REAL_RATES)} |")
    return "\n".join(lines)


def page(summary):
    """The text of docs/results.md with the tables made anew."""
    blocks = {"real model": table(summary), "real model tuning": tuning_table()}
    return with_blocks((ROOT / "docs" / "results.md").read_text(), blocks, "real_model")


def render():
    summary = summarize()
    (RESULTS / "real_model" / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    figures.real_model({arm: seeds_of(arm, seeds=SEEDS) for arm in summary}, TITLES, RESULTS / "real_model" / "figure.png")
    (ROOT / "docs" / "results.md").write_text(page(summary))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS[:3], help="seeds to run")
    parser.add_argument("--jobs", type=int, default=2, help="number of runs at a time, with one thread each")
    mode = parser.add_mutually_exclusive_group()
    for name in ("prepare", "tune", "render"):
        mode.add_argument(f"--{name}", action="store_true")
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if args.prepare:
        prepare()
    elif args.tune:
        tune(args.jobs)
    else:
        if not args.render:
            if missing := [arm for arm in REAL_TUNED if arm not in LEARNING_RATES]:
                sys.exit(f"real_model.py: error: {', '.join(missing)} have no learning rate: run --tune, and enter what it prints "
                         "in experiments.py")
            run_all([("real/base", SEEDS[0], RESULTS, None, None, kept)] + [
                (arm, seed, RESULTS, None, None, kept) for seed in args.seeds for arm in REAL_TUNED], args.jobs)
        render()


if __name__ == "__main__":
    main()
