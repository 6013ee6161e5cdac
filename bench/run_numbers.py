"""Reads finished runs from results/runs/*.zip and derives numbers from them: curves, FLOPs to an accuracy, intervals over seeds."""

import json
import statistics
import zipfile
from dataclasses import dataclass

import numpy as np

import measure
from experiments import EVAL_SAMPLES, LEVELS, RATES, TUNED, pack_name
from measure import ROOT

RESULTS = ROOT / "results"
RENAMED = {"--failure_rate ": "--failure_threshold ", "bench/step_reward.py": "examples/step_reward.py"}  # in recorded commands


# ---------------------------------------------------------------- reading


def pack_file(arm, results=RESULTS):
    """The zip file with the runs of an arm, which may not be there yet. Its members are ARM/seedN/STAGE/FILE and ARM/seedN/eval.json."""
    return results / "runs" / f"{pack_name(arm)}.zip"


def folders_of(arm, results=RESULTS):
    """{seed: folder} of an arm's finished runs, in order of the seeds; the folders lie in the arm's zip file."""
    pack = pack_file(arm, results)
    folder = zipfile.Path(pack, f"{arm}/") if pack.exists() else None
    found = {int(each.name.removeprefix("seed")): each for each in folder.iterdir()} if folder and folder.exists() else {}
    return dict(sorted(found.items()))


def stages_of(folder):
    """Folders of a run's stages in their order; the base model has none, because it is only evaluated."""
    return sorted((path for path in folder.iterdir() if path.is_dir()), key=lambda path: path.name)


def in_todays_names(command):
    """A recorded command with the names that its flags and files have now."""
    for old, new in RENAMED.items():
        command = command.replace(old, new)
    return command


def commands_of(folder):
    """The commands that repeat a run's stages today: in today's names, and with LUFFY's `--entropy_coef` where its default was another."""
    commands = []
    for stage in stages_of(folder):
        command = in_todays_names(json.loads((stage / "measured.json").read_text())["command"])
        coefficient = json.loads((stage / "args.json").read_text())["args"].get("entropy_coef")
        old_default = command.startswith("python luffy.py") and coefficient == 0.001 and "--entropy_coef" not in command
        commands.append(command + " --entropy_coef 0.001" * old_default)
    return commands


@dataclass(frozen=True)
class Run:
    """Records of a finished run: arguments, metrics and measurement of each stage, and the final evaluation. The base has no stage."""

    folder: object  # a path in a zip file
    args: list
    stages: list  # metrics of each stage
    measured: list
    evaluation: dict

    @classmethod
    def load(cls, folder):
        stages = stages_of(folder)
        loaded = [measure.load(stage) for stage in stages]
        return cls(folder, [json.loads((stage / "args.json").read_text()) for stage in stages], [records for records, _ in loaded],
                   [measured for _, measured in loaded], json.loads((folder / "eval.json").read_text()))

    def points(self):
        """The metrics of all steps in a row; `step` and `tflop` count from the start of the first stage."""
        step = flops = 0
        rows = []
        for number, records in enumerate(self.stages):
            start = records[1]["flops/traces"]  # paid before the first step
            rows += [record | {"step": step + record["step"], "tflop": (flops + record.get("flops/total", start)) / 1e12}
                     for record in records if number == 0 or record["step"]]
            step, flops = rows[-1]["step"], rows[-1]["tflop"] * 1e12
        return rows


def seeds_of(arm, results=RESULTS, seeds=None):
    """The finished runs of an arm, in order of their seeds: of all seeds or of these."""
    return [Run.load(folder) for seed, folder in folders_of(arm, results).items() if seeds is None or seed in seeds]


# ---------------------------------------------------------------- numbers of one run


def final(key, difficulty):
    """A number of the final evaluation, in per cent."""
    return lambda run: 100 * run.evaluation[difficulty][key]


def values(run, name):
    """[value of a metric at each step that has it], without the start."""
    return [point[name] for point in run.points() if point.get(name) is not None and point["step"]]


def spikes(run, window=20, factor=3):
    """Number of steps whose gradient norm is more than `factor` times the median of the last `window` steps that had a gradient."""
    norms = [norm for norm in values(run, "grad_norm") if norm]
    return sum(norm > factor * statistics.median(norms[max(0, i - window) : i]) for i, norm in enumerate(norms) if i >= window // 2)


def hard_curve(run):
    """(TFLOP, accuracy on hard problems in per cent) of the run's evaluations, as two lists."""
    points = [point for point in run.points() if "eval/hard/avg@1" in point]
    return [point["tflop"] for point in points], [100 * point["eval/hard/avg@1"] for point in points]


def hard_mean(run):
    """Accuracy on hard problems, mean over the run's evaluations, per cent. Earlier learning gives a higher mean."""
    return statistics.mean(hard_curve(run)[1])


def tflop_to(level):
    """TFLOP at which accuracy on hard problems first reaches `level` per cent, linear between evaluations; nan = never."""
    def spent(run):
        tflop, hard = hard_curve(run)
        passed = next((i for i, accuracy in enumerate(hard) if accuracy >= level), None)
        if not passed:
            return float("nan") if passed is None else tflop[0]
        return float(np.interp(level, hard[passed - 1 : passed + 1], tflop[passed - 1 : passed + 1]))
    return spent


def hard_at(budget):
    """Accuracy on hard problems, per cent, after `budget` TFLOP, linear between evaluations and constant outside them."""
    return lambda run: float(np.interp(budget, *hard_curve(run)))


def fall(run):
    """The largest fall of accuracy on easy problems below the best so far, in points of per cent."""
    best = most = 0.0
    for accuracy in (100 * point["eval/easy/avg@1"] for point in run.points() if "eval/easy/avg@1" in point):
        best, most = max(best, accuracy), max(most, best - accuracy)
    return most


def last(name, scale=1, count=10):
    """Mean of a metric over the last steps that have it; nan if no step has it."""
    return lambda run: scale * statistics.mean(values(run, name)[-count:] or [float("nan")])


NUMBERS = {  # name -> (title with unit, digits, function of a run)
    "hard": ("hard, %", 0, final(f"avg@{EVAL_SAMPLES}", "hard")),
    "hard_pass": (f"hard, % solved in {EVAL_SAMPLES}", 0, final(f"pass@{EVAL_SAMPLES}", "hard")),
    "hard_mean": ("hard, % mean over the run's evaluations", 0, hard_mean),
    "easy": ("easy, %", 0, final(f"avg@{EVAL_SAMPLES}", "easy")),
    "other": ("other, %", 0, final(f"avg@{EVAL_SAMPLES}", "other")),
    "foreign": ("in foreign words, %", 0, final("foreign", "hard")),
    "tflop": ("TFLOP", 2, lambda run: run.points()[-1]["tflop"]),
    "tflop_traces": ("of that for traces", 2, lambda run: run.stages[0][-1]["flops/traces"] / 1e12),
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
FINAL = ("hard", "hard_pass", "easy", "other", "foreign")  # numbers that the base has, too


# ---------------------------------------------------------------- numbers of several runs


def interval(numbers, resamples=10_000):
    """{mean, low, high, values}: 95 % percentile bootstrap over seeds; nan becomes null."""
    numbers = np.array(numbers, dtype=float)
    if np.isnan(numbers).any():
        return {"mean": None, "low": None, "high": None, "values": [None if np.isnan(number) else number for number in numbers]}
    means = np.random.default_rng(0).choice(numbers, (resamples, len(numbers))).mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return {"mean": numbers.mean(), "low": low, "high": high, "values": numbers.tolist()}


def differences(values, others):
    """Is one arm better than another? Two intervals: of the differences seed by seed, and of the probability of improvement.

    The probability is the share of all pairs of runs in which the first is greater, ties by half (arXiv 2108.13264, section 4.3). Its
    interval is the 95 % percentile bootstrap over the runs of each arm.
    """
    values, others = np.array(values, dtype=float), np.array(others, dtype=float)

    def share(first, second):  # (..., n) each
        gaps = first[..., :, None] - second[..., None, :]
        return ((gaps > 0) + 0.5 * (gaps == 0)).mean(axis=(-2, -1))

    draws = np.random.default_rng(0)
    low, high = np.percentile(share(*(draws.choice(each, (10_000, len(each))) for each in (values, others))), [2.5, 97.5])
    return interval(values - others), {"mean": float(share(values, others)), "low": low, "high": high}


def intervals(runs):
    """{name of a number: its interval} over the runs of an arm."""
    return {name: interval([function(run) if run.stages or name in FINAL else float("nan") for run in runs])
            for name, (_, _, function) in NUMBERS.items()}


def tuning():
    """{arm: {rate: accuracy on hard problems, %, mean over the last three evaluations}} of the tuning runs."""
    found = {}
    for arm in TUNED:
        for rate in RATES:
            for run in seeds_of(f"tuning/{arm}-{rate}"):
                found.setdefault(arm, {})[rate] = statistics.mean(hard_curve(run)[1][-3:])
    return found


def neighbours(rate, tried, grid):
    """The rates of `grid` that are still to be run, so that `rate` and both its neighbours are among `tried`."""
    place = grid.index(rate)
    return set(grid[max(place - 1, 0) : place + 2]) - set(tried)


def chosen(found):
    """The rate of each arm: the smallest rate whose accuracy is within two points of the best."""
    return {arm: min(rate for rate, accuracy in rates.items() if accuracy >= max(rates.values()) - 2) for arm, rates in found.items()}
