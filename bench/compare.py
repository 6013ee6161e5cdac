"""The comparison: every method under one trainer, one budget and one evaluation, over several seeds.

    python bench/compare.py --tune                     learning rates: every method the same few, on a seed of their own
    python bench/compare.py --tries                    what was tried to find a setting for PrefixRL's compute claim, on that seed, too
    python bench/compare.py                            run what is missing of all experiments, then write tables and figures
    python bench/compare.py hard_samples --seeds 0 1   run only these; others may be run later
    python bench/compare.py --quick                    two seeds of the first experiment, 7 minutes, into runs/quick/
    python bench/compare.py --render                   run nothing: write results/*/, docs/results.md and the README's parts anew

An arm is one command, or several of which each starts from the model of the one before; a run is an arm with a seed. Every run is a
process of its own, --jobs of them at a time with one thread each, and ends with eval.py on its final model. results/runs/ARM/seed*/ keeps
its records: a folder per stage (args.json, metrics.jsonl.gz, what it printed, time and memory) and eval.json. A finished run is never
repeated: delete its folder to have it again. Runs are compared only if problems, base model, evaluation, code and versions are the same.
"""

import argparse
import concurrent.futures
import json
import os
import random
import shutil
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import figures
import measure
import numpy as np
from measure import ROOT

sys.path.insert(0, str(ROOT))

import tasks

RESULTS, WORK = ROOT / "results", Path("runs") / "compare"  # of the repository, so that commands hold no place of a machine
SEEDS, TUNING_SEED = (0, 1, 2, 3, 4), 100
EVAL_SAMPLES = 8  # a problem, at the end of a run
BILLS, DIARY = "--task bills --max_steps 150", "--task diary --num_hard 64 --num_easy 32 --max_steps 100"
PREFIXRL_OWN = ("prefixrl.py --task bills --max_steps 300 --num_hard 512 --num_easy 256 --trace_style own --prefixes_per_trace 5 "
                "--learning_rate 0.0005")
SHARES = (10, 30, 100)  # per cent of the traces that are wrong
FEW = "--traces results/compute/few.jsonl"  # what little rejection sampling finds; made by its eval.py command in docs/results.md
LEVELS = (25, 50, 75)  # of accuracy on hard problems, per cent


def all_arms():
    """{arm: its commands} without seeds and, unless it is theirs alone, learning rates. {before}: the model of the stage before."""
    arms = {
        "bills/base": [],
        "diary/base": [],
        "bills/repo-default": ["repo.py"],  # what the README runs first
        "bills/grpo": [f"grpo.py {BILLS}"],
        "bills/repo": [f"repo.py {BILLS}"],
        "bills/luffy": [f"luffy.py {BILLS}"],
        "bills/prefixrl": [f"prefixrl.py {BILLS} --num_hard 512 --num_easy 256 --trace_style teacher"],
        "bills/sft": [f"sft.py {BILLS}"],
        "bills/sft-grpo": ["sft.py --task bills --max_steps 75", "grpo.py --task bills --max_steps 75 --model {before}"],
        "bills/grpo-300": ["grpo.py --task bills --max_steps 300 --learning_rate 0.0005"],
        "bills/prefixrl-own": [f"{PREFIXRL_OWN} --prefix_min 0.05 --prefix_max 0.6"],
        "bills/prefixrl-own-late": [PREFIXRL_OWN],
        "bills/repo-raw": [f"repo.py {BILLS} --raw_trace"],
        "bills/repo-own": [f"repo.py {BILLS} --trace_style own"],
        "bills/repo-own-steps": [f"repo.py {BILLS} --trace_style own --reward_fn bench/step_reward.py:right_steps"],
        "bills/luffy-own": [f"luffy.py {BILLS} --trace_style own"],
        "bills/repo-rho0.5": [f"repo.py {BILLS} --failure_rate 0.5"],
        "bills/repo-rho1": [f"repo.py {BILLS} --failure_rate 1"],
        "bills/repo-behavior": [f"repo.py {BILLS} --rephrase_ratio behavior"],
        "bills/repo-stopgrad": [f"repo.py {BILLS} --rephrase_ratio stopgrad"],
        "bills/repo-shaped": [f"repo.py {BILLS} --rephrase_ratio shaped"],
        "bills/repo-any": [f"repo.py {BILLS} --require_correct_rephrase false"],
        "bills/luffy-plain": [f"luffy.py {BILLS} --shaping none"],
        "diary/grpo": [f"grpo.py {DIARY}"],
        "diary/repo": [f"repo.py {DIARY}"],
        "diary/luffy": [f"luffy.py {DIARY}"],
        "diary/prefixrl": [f"prefixrl.py {DIARY}"],
        "diary/sft": [f"sft.py {DIARY}"],
        "diary/sft-grpo": ["sft.py --task diary --num_hard 64 --num_easy 32 --max_steps 50",
                           "grpo.py --task diary --num_hard 64 --num_easy 32 --max_steps 50 --model {before}"],
        "diary/prefixrl-only": [f"prefixrl.py {DIARY} --prefixed_only"],
        "diary/prefixrl-only-teacher": [f"prefixrl.py {DIARY} --prefixed_only --trace_style teacher"],
        "diary/prefixrl-early": [f"prefixrl.py {DIARY} --prefix_min 0.1 --prefix_max 0.4"],
        "diary/prefixrl-late": [f"prefixrl.py {DIARY} --prefix_min 0.7 --prefix_max 0.9"],
        "diary/grpo-fast": [f"grpo.py {DIARY} --learning_rate 0.0005"],  # at PrefixRL's rate
        "diary/grpo-n64": [f"grpo.py {DIARY} --prompts_per_step 2 --num_generations 64"],
        "diary/prefixrl-few": [f"prefixrl.py {DIARY} {FEW} --prefixes_per_trace 16"],
        "diary/sft-grpo-few": [f"sft.py --task diary --num_hard 64 --num_easy 32 --max_steps 50 {FEW}",
                               "grpo.py --task diary --num_hard 64 --num_easy 32 --max_steps 50 --model {before}"],
        "diary/luffy-few": [f"luffy.py {DIARY} {FEW}"],
        "diary/luffy-importance": [f"luffy.py {DIARY} {FEW} --shaping importance"],
        "diary/grpo-sequence": [f"grpo.py {DIARY} --loss_type grpo"],
        "diary/grpo-dr": [f"grpo.py {DIARY} --loss_type dr_grpo --scale_rewards none"],
        "diary/grpo-nostd": [f"grpo.py {DIARY} --scale_rewards none"],
    }
    slow = "--learning_rate 0.00002 --max_steps 300 --eval_steps 20"
    cuts = "--prefix_min 0.05 --prefix_max 0.6 --prefixes_per_trace 24"
    arms |= {
        "diary/try-grpo-slow": [f"grpo.py {DIARY} {slow}"],
        "diary/try-prefixrl-slow": [f"prefixrl.py {DIARY} {FEW} --prefixes_per_trace 16 {slow}"],
        "diary/try-prefixrl-few": [f"prefixrl.py {DIARY} {FEW} --prefixes_per_trace 16 --learning_rate 0.0002"],
        "bills/try-prefixrl-own": [f"prefixrl.py --task bills --max_steps 300 --num_hard 12 --num_easy 12 --trace_style own {cuts} "
                                   "--learning_rate 0.0005"],
    }
    for method in ("repo", "luffy", "sft"):
        for share in SHARES:
            flags = f"--traces {WORK}/wrong-{share}.jsonl --keep_wrong_traces"
            arms[f"bills/{method}-wrong{share}"] = [f"{method}.py {BILLS} {flags}"]
    return arms


ARMS = all_arms()
TRIES = [arm for arm in ARMS if "/try-" in arm]
RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3)
# Chosen by `--tune`, results/tuning (a test compares them with its rule); an arm that is not here has the rate of its method and task.
LEARNING_RATES = {
    "bills/grpo": 1e-4, "bills/repo": 5e-4, "bills/luffy": 5e-4, "bills/prefixrl": 1e-4, "bills/sft": 2e-3, "bills/repo-raw": 2e-3,
    "diary/grpo": 2e-4, "diary/repo": 2e-4, "diary/luffy": 1e-4, "diary/prefixrl": 5e-4, "diary/sft": 2e-4,
    "bills/sft-grpo": 0.0001, "diary/sft-grpo": 0.001}
TUNED = ("bills/grpo", "bills/repo", "bills/luffy", "bills/prefixrl", "bills/sft", "bills/repo-raw",
         "diary/grpo", "diary/repo", "diary/luffy", "diary/prefixrl", "diary/sft", "bills/sft-grpo", "diary/sft-grpo")


@dataclass(frozen=True)
class Experiment:
    title: str
    hypothesis: str  # of the paper
    arms: dict  # arm -> its name in tables and figures
    draw: object  # a function of figures.py
    columns: tuple  # of the table: names of NUMBERS


SHORT = {"grpo": "GRPO", "repo": "RePO", "luffy": "LUFFY", "prefixrl": "PrefixRL", "sft": "SFT", "sft-grpo": "SFT → GRPO",
         "repo-raw": "raw replacement"}
OUTCOME = ("hard", "hard_pass", "easy", "other", "foreign", "tflop", "tflop_traces")
EXPERIMENTS = {
    "hard_samples": Experiment(
        "Hard samples, knowledge", "RePO solves more hard problems than GRPO and LUFFY, and keeps what the policy could.",
        {"bills/base": "base"} | {f"bills/{arm}": name for arm, name in SHORT.items()}, figures.learning, OUTCOME),
    "hard_samples_diary": Experiment(
        "Hard samples, a skill", "The same where the base has the skill and uses it carelessly.",
        {"diary/base": "base"} | {f"diary/{arm}": name for arm, name in SHORT.items() if arm != "repo-raw"}, figures.learning, OUTCOME),
    "stability": Experiment(
        "Stability", "RePO's entropy, gradient norm and reward stay flat where LUFFY's do not, above all with a teacher of foreign words.",
        {"bills/repo": "RePO, foreign", "bills/luffy": "LUFFY, foreign", "bills/repo-own": "RePO, own style",
         "bills/repo-own-steps": "RePO, own style, steps graded", "bills/luffy-own": "LUFFY, own style"}, figures.stability,
        ("hard", "easy", "entropy_end", "entropy_max", "spikes", "fall", "success", "overlap")),
    "wrong_traces": Experiment(
        "Wrong traces", "A method that verifies what it learns from is not misled by wrong solutions.",
        {f"bills/{method}{wrong}": f"{SHORT[method]}, {wrong.removeprefix('-wrong') or 0} % wrong"
         for method in ("repo", "luffy", "sft") for wrong in ("", *(f"-wrong{share}" for share in SHARES))},
        figures.wrong_traces, ("hard", "hard_pass", "easy", "other", "foreign")),
    "compute": Experiment(
        "Compute", "PrefixRL reaches a reward with half of GRPO's FLOPs, rejection sampling included, and ends at three times its reward.",
        {"diary/grpo": "GRPO, n = 8", "diary/grpo-fast": "GRPO, n = 8, PrefixRL's rate", "diary/grpo-n64": "GRPO, n = 64",
         "diary/prefixrl": "PrefixRL, 63 traces", "diary/prefixrl-few": "PrefixRL, 3 traces",
         "diary/sft-grpo-few": "SFT → GRPO, 3 traces", "diary/luffy-few": "LUFFY, 3 traces",
         "diary/luffy-importance": "importance-weighted, 3 traces"}, figures.compute,
        ("tflop_traces", *(f"tflop_to_{level}" for level in LEVELS), "reached", "hard_at_0.4", "hard_at_0.7", "hard")),
    "back_generalisation": Experiment(
        "Back-generalisation", "Trained on prefixed problems only, the policy gets better without a prefix, also with others' traces.",
        {"diary/grpo": "GRPO", "diary/prefixrl": "PrefixRL", "diary/prefixrl-only": "prefixed only",
         "diary/prefixrl-only-teacher": "prefixed only, teacher's traces"}, figures.back_generalisation, OUTCOME),
    "prefixes_of_facts": Experiment(
        "PrefixRL and knowledge", "None: the paper is about skills. Can what is learnt after a prefix be facts?",
        {"bills/grpo-300": "GRPO", "bills/prefixrl-own": "PrefixRL, cuts 0.05-0.6", "bills/prefixrl-own-late": "PrefixRL, cuts 0.4-0.8"},
        figures.prefixes_of_facts, OUTCOME),
    "gate": Experiment(
        "RePO's gate", "None: the share of failed rollouts from which on a group is helped is not published.",
        {"bills/repo": "ρ 0.125: one of eight", "bills/repo-rho1": "ρ 1: all"}, figures.gate,
        ("hard", "hard_mean", "easy", "other", "replaced", "tflop")),
    "ablations_repo": Experiment(
        "Ablations of RePO and LUFFY", "None: the papers leave these choices open.",
        {"bills/repo": "RePO (ratio question)", "bills/repo-rho0.5": "ρ 0.5", "bills/repo-behavior": "ratio behavior",
         "bills/repo-stopgrad": "ratio stopgrad", "bills/repo-shaped": "ratio shaped",
         "bills/repo-any": "wrong retellings, too", "bills/luffy": "LUFFY (shaped)", "bills/luffy-plain": "LUFFY, plain p"},
        figures.ablations, ("hard", "hard_mean", "easy", "other", "entropy_end", "replaced", "tflop")),
    "ablations_diary": Experiment(
        "Ablations of GRPO and PrefixRL", "None: switches of GRPO, and where PrefixRL cuts.",
        {"diary/grpo": "GRPO (token mean, std)", "diary/grpo-sequence": "mean over sequences", "diary/grpo-dr": "Dr. GRPO",
         "diary/grpo-nostd": "without std", "diary/prefixrl": "PrefixRL (cuts 0.4-0.8)", "diary/prefixrl-early": "cuts 0.1-0.4",
         "diary/prefixrl-late": "cuts 0.7-0.9"},
        figures.ablations, ("hard", "hard_mean", "easy", "other", "entropy_end", "tflop")),
}


# ---------------------------------------------------------------- running


def write_wrong_traces(folder):
    """wrong-SHARE.jsonl: the teacher's traces of all bills, that share of the hard ones with random prices; each holds the smaller."""
    folder.mkdir(parents=True, exist_ok=True)
    hard, easy = (tasks.problems("bills", "train", difficulty, num) for difficulty, num in (("hard", 512), ("easy", 256)))
    order = random.Random("wrong traces").sample(range(len(hard)), len(hard))
    for share in SHARES:
        rows = [{"prompt": row["prompt"], "trace": row["teacher_trace"]} for row in hard + easy]
        for index in order[: len(hard) * share // 100]:
            rng = random.Random(f"wrong traces/{index}")
            while rows[index]["trace"] == hard[index]["teacher_trace"]:
                prices = {item: rng.randint(2, 19) for item in tasks.NEW_PRICES}
                rows[index]["trace"] = tasks.solve(rows[index]["prompt"], "teacher", prices=tasks.KNOWN_PRICES | prices)[0]
        (folder / f"wrong-{share}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def learning_rate(arm, script):
    """The tuned rate of an arm's stage: its own, or that of the script on this task; None: the script's default."""
    own, method = LEARNING_RATES.get(arm), f"{arm.split('/')[0]}/{script.removesuffix('.py')}"
    if arm.endswith("-default"):
        return None
    return own if own is not None and script != "sft.py" else LEARNING_RATES.get(method)


def run(arm, seed, results=RESULTS, rate=None, name=None):
    """Run the stages of an arm one after the other, unless it is finished, and evaluate the final model; `rate` is that of the last."""
    folder, work = results / "runs" / (name or arm) / f"seed{seed}", WORK / (name or arm) / f"seed{seed}"
    if (folder / "eval.json").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    before = "tiny_model"
    for number, command in enumerate(ARMS[arm], 1):
        words = ["python", *(word.replace("{before}", str(before)) for word in command.split()), "--seed", str(seed)]
        stage_rate = rate if rate and number == len(ARMS[arm]) else learning_rate(arm, words[1])
        if stage_rate and "--learning_rate" not in words:
            words += ["--learning_rate", str(stage_rate)]
        before = work / f"{number}-{Path(words[1]).stem}"
        measure.run(words, before, folder / before.name, quiet=True)
    record = work / "eval.json"
    (ROOT / record).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    (ROOT / work).mkdir(parents=True, exist_ok=True)
    measure.call(["python", "eval.py", "--model", str(before), "--task", arm.split("/")[0], "--num_generations_eval", str(EVAL_SAMPLES),
                  "--output_file", str(record)], ROOT / work / "eval.out", quiet=True)
    summary = json.loads((ROOT / record).read_text())["summary"]
    (folder / ".eval.tmp").write_text(json.dumps(summary, indent=1) + "\n")
    (folder / ".eval.tmp").rename(folder / "eval.json")
    shutil.rmtree(ROOT / work)


def run_all(jobs, workers):
    """Run `jobs`, the arguments of `run`, `workers` at a time; ends with the first that fails."""
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(run, *job) for job in jobs]
        try:
            for number, future in enumerate(concurrent.futures.as_completed(futures), 1):
                future.result()
                print(f"{number} of {len(jobs)} runs are there", flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class Run:
    """Records of a finished run: `args` and `steps` of each stage, of which the base has none, and the final evaluation."""

    folder: Path
    args: list
    stages: list  # metrics of each stage
    measured: list
    evaluation: dict

    @classmethod
    def load(cls, folder):
        stages = sorted(path.parent for path in folder.glob("*/args.json"))
        loaded = [measure.load(stage) for stage in stages]
        return cls(folder, [json.loads((stage / "args.json").read_text()) for stage in stages], [records for records, _ in loaded],
                   [measured for _, measured in loaded], json.loads((folder / "eval.json").read_text()))

    def points(self):
        """The metrics of all steps in a row, `step` and `tflop` counted from the start of the first stage."""
        step = flops = 0
        rows = []
        for number, records in enumerate(self.stages):
            start = records[1]["flops/traces"]  # paid before the first step
            rows += [record | {"step": step + record["step"], "tflop": (flops + record.get("flops/total", start)) / 1e12}
                     for record in records if number == 0 or record["step"]]
            step, flops = rows[-1]["step"], rows[-1]["tflop"] * 1e12
        return rows


def seeds_of(arm, results=RESULTS):
    """The finished runs of an arm, in order of their seeds."""
    folders = sorted((results / "runs" / arm).glob("seed*"), key=lambda folder: int(folder.name.removeprefix("seed")))
    return [Run.load(folder) for folder in folders if (folder / "eval.json").exists()]


EVALUATION_FLAGS = ("task", "dataset_name", "eval_problems", "num_generations_eval", "temperature", "max_completion_length", "reward",
                    "grade_truncated", "template")
PROBLEM_FLAGS = ("task", "num_hard", "num_easy", "dataset_name")


def identity(run):
    """What must be the same in runs that are compared."""
    first = run.args[0]  # the base model of a later stage is that of the stage before
    return {"base model": first["base_model"], "evaluation problems": first["data"]["eval"],
            "evaluation flags": {name: first["args"][name] for name in EVALUATION_FLAGS},
            "training problems": {name: first["args"][name] for name in PROBLEM_FLAGS},
            "code": sorted({measured["code"] for measured in run.measured}), "versions": first["versions"], "ranks": first["ranks"]}


def refuse_unlike(runs):
    """Exit with what differs when the runs cannot be compared. The base has been evaluated only, so it says nothing."""
    runs = [run for run in runs if run.stages]
    for run in runs:
        for name, value in identity(run).items():
            expected = identity(runs[0])[name]
            if value != expected:
                sys.exit(f"compare.py: error: {run.folder} and {runs[0].folder} differ in {name}: {value} and {expected}; "
                         "delete one of the two and run it again")


def refuse_other_code(jobs, results):
    """Exit when one of `jobs` is still to be run and finished runs of their arms are of other code than it would be."""
    if all((results / "runs" / arm / f"seed{seed}" / "eval.json").exists() for arm, seed, *_ in jobs):
        return
    now = measure.code_version()
    for run in (run for arm in dict.fromkeys(arm for arm, *_ in jobs) for run in seeds_of(arm, results)):
        if any(measured["code"] != now for measured in run.measured):
            sys.exit(f"compare.py: error: {run.folder} was made by other code than that of this folder, and new runs could not be compared "
                     "with it: delete all runs of the experiment, or go back to its git_commit (args.json)")


def final(key, difficulty):
    """A number of the final evaluation, in per cent."""
    return lambda run: 100 * run.evaluation[difficulty][key]


def values(run, name):
    """[value of a metric at each step that has it], without the start."""
    return [point[name] for point in run.points() if point.get(name) is not None and point["step"]]


def spikes(run, window=20, factor=3):
    """Steps whose gradient norm is more than `factor` times the median of the last `window` steps that had a gradient."""
    norms = [norm for norm in values(run, "grad_norm") if norm]
    return sum(norm > factor * statistics.median(norms[max(0, i - window) : i]) for i, norm in enumerate(norms) if i >= window // 2)


def hard_curve(run):
    """(TFLOP, accuracy on hard problems in per cent) of the run's evaluations, as two lists."""
    points = [point for point in run.points() if "eval/hard/avg@1" in point]
    return [point["tflop"] for point in points], [100 * point["eval/hard/avg@1"] for point in points]


def hard_mean(run):
    """Accuracy on hard problems, mean over all evaluations of the run, per cent: the earlier it is learnt, the more."""
    return statistics.mean(hard_curve(run)[1])


def tflop_to(level):
    """TFLOP at which accuracy on hard problems is first `level` per cent, linear between evaluations; nan when it never is."""
    def spent(run):
        tflop, hard = hard_curve(run)
        passed = next((i for i, accuracy in enumerate(hard) if accuracy >= level), None)
        if not passed:
            return float("nan") if passed is None else tflop[0]
        return float(np.interp(level, hard[passed - 1 : passed + 1], tflop[passed - 1 : passed + 1]))
    return spent


def hard_at(budget):
    """Accuracy on hard problems, per cent, after `budget` TFLOP, linear between evaluations: the base's before, the last one's after."""
    return lambda run: float(np.interp(budget, *hard_curve(run)))


def fall(run):
    """The most that accuracy on easy problems fell below its best so far, in points of per cent."""
    best = most = 0.0
    for accuracy in (100 * point["eval/easy/avg@1"] for point in run.points() if "eval/easy/avg@1" in point):
        best, most = max(best, accuracy), max(most, best - accuracy)
    return most


def last(name, scale=1, count=10):
    """Mean of a metric over the last steps, nan if it has none."""
    return lambda run: scale * statistics.mean(values(run, name)[-count:] or [float("nan")])


NUMBERS = {  # name -> (title with unit, digits, function of a run)
    "hard": ("hard, %", 0, final(f"avg@{EVAL_SAMPLES}", "hard")),
    "hard_pass": (f"hard, % solved in {EVAL_SAMPLES}", 0, final(f"pass@{EVAL_SAMPLES}", "hard")),
    "hard_mean": ("hard, % mean over the run's evaluations", 0, hard_mean),
    "easy": ("easy, %", 0, final(f"avg@{EVAL_SAMPLES}", "easy")),
    "other": ("other, %", 0, final(f"avg@{EVAL_SAMPLES}", "other")),
    "foreign": ("in foreign words, %", 0, final("foreign", "hard")),
    "tflop": ("TFLOP", 2, lambda run: run.points()[-1]["tflop"]),
    "tflop_traces": ("of it traces", 2, lambda run: run.stages[0][-1]["flops/traces"] / 1e12),
    **{f"tflop_to_{level}": (f"TFLOP to {level} %", 2, tflop_to(level)) for level in LEVELS},
    "reached": (f"seeds that reach {LEVELS[-1]} %, %", 0, lambda run: 100.0 * (max(hard_curve(run)[1]) >= LEVELS[-1])),
    **{f"hard_at_{budget}": (f"hard at {budget} TFLOP, %", 0, hard_at(budget)) for budget in (0.4, 0.7)},
    "entropy_end": ("entropy at the end, nats", 3, last("entropy")),
    "entropy_max": ("largest entropy, nats", 3, lambda run: max(values(run, "entropy"), default=float("nan"))),
    "spikes": ("gradient spikes", 0, spikes),
    "fall": ("largest fall of easy, points", 0, fall),
    "replaced": ("groups helped at the end, %", 0, last("rephrase/replaced", 100)),
    "success": ("retellings right at the end, %", 0, last("rephrase/success", 100)),
    "overlap": ("their overlap with the trace at the end, %", 0, last("rephrase/overlap", 100)),
}


FINAL = ("hard", "hard_pass", "easy", "other", "foreign")  # what the base has, too


def interval(numbers, resamples=10_000):
    """{mean, low, high, values}: 95 % percentile bootstrap over seeds; nan as null."""
    numbers = np.array(numbers, dtype=float)
    if np.isnan(numbers).any():
        return {"mean": None, "low": None, "high": None, "values": [None if np.isnan(number) else number for number in numbers]}
    means = np.random.default_rng(0).choice(numbers, (resamples, len(numbers))).mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return {"mean": numbers.mean(), "low": low, "high": high, "values": numbers.tolist()}


def summarize(name, results=RESULTS):
    """{arm: {"title", "seeds", number: interval}} of an experiment's finished runs. Exits when they cannot be compared."""
    experiment = EXPERIMENTS[name]
    runs = {arm: seeds_of(arm, results) for arm in experiment.arms}
    refuse_unlike([run for arm in runs.values() for run in arm])
    return {arm: {"title": experiment.arms[arm], "seeds": len(finished)}
            | {number: interval([function(run) if run.stages or number in FINAL else float("nan") for run in finished])
               for number, (_, _, function) in NUMBERS.items()}
            for arm, finished in runs.items() if finished}


# ---------------------------------------------------------------- writing


def cell(number, digits):
    """mean [low, high]"""
    if number["mean"] is None:
        return "–"
    mean, low, high = (f"{number[part]:.{digits}f}" for part in ("mean", "low", "high"))
    return mean if low == high else f"{mean} [{low}, {high}]"


def table(summary, columns):
    """Markdown: a line per arm, mean and 95 % interval over seeds."""
    lines = [f"| | seeds | {' | '.join(NUMBERS[name][0] for name in columns)} |", "|---" * (len(columns) + 2) + "|"]
    lines += [f"| {row['title']} | {row['seeds']} | {' | '.join(cell(row[name], NUMBERS[name][1]) for name in columns)} |"
              for row in summary.values()]
    return "\n".join(lines)


def render(name, results=RESULTS):
    """Write summary.json and figure.png of an experiment whose arms all have runs, and print its table."""
    summary, folder = summarize(name, results), results / name
    if missing := [arm for arm in EXPERIMENTS[name].arms if arm not in summary]:
        print(f"{name}: nothing is written, as there is no run of {', '.join(missing)}\n")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        EXPERIMENTS[name].draw({arm: seeds_of(arm, results) for arm in summary}, EXPERIMENTS[name].arms, folder / "figure.png")
        print(f"{EXPERIMENTS[name].title}\n\n{table(summary, EXPERIMENTS[name].columns)}\n")


def read_summary(name):
    """The committed summary of an experiment, or None."""
    file = RESULTS / name / "summary.json"
    return json.loads(file.read_text()) if file.exists() else None


def block(name, summary):
    """Markdown of an experiment: hypothesis, table, figure, commands."""
    commands = [json.loads(file.read_text())["command"] for arm in summary
                for file in sorted((RESULTS / "runs" / arm / "seed0").glob("*/measured.json"))]
    folded = ["<details>", f"<summary><code>python bench/compare.py {name}</code></summary>", "", *(f"    {each}" for each in commands), "",
              "</details>"]
    return "\n\n".join([f"*Hypothesis:* {EXPERIMENTS[name].hypothesis}", table(summary, EXPERIMENTS[name].columns),
                        f"![{EXPERIMENTS[name].title}](../results/{name}/figure.png)", "\n".join(folded)])


def with_blocks(text, blocks):
    """`text` with what stands between `<!-- NAME: made by bench/compare.py -->` and `<!-- end of NAME -->` made anew."""
    for name, content in blocks.items():
        start, end = f"<!-- {name}: made by bench/compare.py -->", f"<!-- end of {name} -->"
        if start in text:
            before, rest = text.split(start)
            text = f"{before}{start}\n\n{content}\n\n{end}{rest.split(end)[1]}"
    return text


def pages():
    """{page: its text with the generated parts made anew from results/}."""
    summaries = {name: summary for name in EXPERIMENTS if (summary := read_summary(name))}
    blocks = {name: block(name, summary) for name, summary in summaries.items()} | {"tuning": tuning_table(), "tries": tries_table()}
    blocks |= {f"table of {name}": table(summary, EXPERIMENTS[name].columns) for name, summary in summaries.items()}
    printed = RESULTS / "runs" / "bills" / "repo-default" / "seed0" / "1-repo" / "output.txt"
    if printed.exists():
        blocks["expected output"] = "\n".join(f"    {line}" for line in printed.read_text().splitlines() if line.startswith("eval/"))
    return {page: with_blocks((ROOT / page).read_text(), blocks) for page in ("README.md", "docs/results.md")}


def tuning_table():
    """Markdown: hard accuracy of the tuning runs by arm and rate; the chosen one in bold."""
    found = tuning()
    picked = chosen(found)
    lines = [f"| | {' | '.join(f'{rate:g}' for rate in RATES)} |", "|---" * (len(RATES) + 1) + "|"]
    for arm, rates in found.items():
        cells = [f"**{rates[rate]:.0f}**" if rate == picked[arm] else f"{rates[rate]:.0f}" for rate in RATES]
        lines.append(f"| `{arm}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def tries_table():
    """Markdown: a line per try, with what it cost to get anywhere."""
    lines = ["| | of it traces, TFLOP | TFLOP to 50 % | TFLOP | hard, % |", "|---|---|---|---|---|"]
    for run in (run for arm in TRIES for run in seeds_of(arm)):
        numbers = [NUMBERS[name][2](run) for name in ("tflop_traces", "tflop_to_50", "tflop", "hard")]
        cells = ["–" if np.isnan(number) else f"{number:.{digits}f}" for number, digits in zip(numbers, (2, 2, 2, 0))]
        lines.append(f"| `{run.measured[0]['command'].removeprefix('python ')}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def tuning():
    """{arm: {rate: hard accuracy of the tuning run, %, mean of its last three evaluations}} of what was run."""
    found = {}
    for arm in TUNED:
        for rate in RATES:
            for run in seeds_of(f"tuning/{arm}-{rate}"):
                curve = [point["eval/hard/avg@1"] for point in run.points() if "eval/hard/avg@1" in point]
                found.setdefault(arm, {})[rate] = 100 * statistics.mean(curve[-3:])
    return found


def chosen(found):
    """The rate of each arm: the one with the best accuracy, the smallest of those within two points of it."""
    return {arm: min(rate for rate, accuracy in rates.items() if accuracy >= max(rates.values()) - 2) for arm, rates in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help=f"of {', '.join(EXPERIMENTS)}; none: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="0 to 4 unless given")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, with one thread each")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--tune", action="store_true", help="the learning rates instead of the experiments")
    mode.add_argument("--tries", action="store_true", help="the tries instead of the experiments")
    mode.add_argument("--quick", action="store_true", help="two seeds of hard_samples, into runs/quick/")
    mode.add_argument("--render", action="store_true", help="run nothing")
    args = parser.parse_args()
    for name in args.experiments:
        if name not in EXPERIMENTS:
            parser.error(f"EXPERIMENT must be of {', '.join(EXPERIMENTS)}, got {name}")
    results, names = RESULTS, args.experiments or list(EXPERIMENTS)
    if args.quick:
        results, names, args.seeds = ROOT / "runs" / "quick", ["hard_samples"], [0, 1]
    write_wrong_traces(ROOT / WORK)
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # of the runs
    if args.tune:
        run_all([(arm, TUNING_SEED, RESULTS, rate, f"tuning/{arm}-{rate}") for arm in TUNED for rate in RATES], args.jobs)
    elif args.tries:
        run_all([(arm, TUNING_SEED) for arm in TRIES], args.jobs)
    elif not args.render:
        arms = dict.fromkeys(arm for name in names for arm in EXPERIMENTS[name].arms)
        jobs = [("bills/repo-default", 0)] if names == list(EXPERIMENTS) else []
        jobs += [(arm, seed, results) for seed in args.seeds for arm in arms if ARMS[arm]]
        jobs += [(arm, SEEDS[0], results) for arm in arms if not ARMS[arm]]  # the base once
        refuse_other_code(jobs, results)
        run_all(jobs, args.jobs)
    for name in names if args.quick else EXPERIMENTS:  # all, as the pages show all of them by the numbers of today
        render(name, results)
    if not args.quick:
        for page, text in pages().items():
            (ROOT / page).write_text(text)
        panels = {name: {arm: seeds_of(arm) for arm in EXPERIMENTS[name].arms if ARMS[arm]}
                  for name in ("hard_samples", "hard_samples_diary")}
        if all(runs for arms in panels.values() for runs in arms.values()):
            for mode in ("light", "dark"):
                figures.overview(panels, SHORT, RESULTS / f"overview-{mode}.png", mode == "dark")


if __name__ == "__main__":
    main()
