"""The comparison: every method with the same trainer, budget and evaluation, over several seeds.

    python bench/compare.py --tune                     learning rates: the same few rates for every method, on a seed of their own
    python bench/compare.py --tries                    settings tried for PrefixRL's compute claim, on the same seed as --tune
    python bench/compare.py                            run what is missing of all experiments, then write tables and figures
    python bench/compare.py hard_samples --seeds 0 1   run only these seeds of one experiment
    python bench/compare.py --quick                    two seeds of the first experiment, 7 minutes, into runs/quick/
    python bench/compare.py --render                   run nothing: write results/*/ and the generated parts of README and docs/ anew

experiments.py has the arms and experiments, run_numbers.py the numbers of a table, pages.py the pages.

Every run is a process of its own with one thread, --jobs of them at a time, and ends with eval.py on its final model. A run works in
runs/compare/. When the run is finished, its records move into results/runs/EXPERIMENT.zip: a folder ARM/seedN/ with eval.json and a
folder for each stage (args.json, metrics.jsonl.gz, printed output, time and memory). A finished run is never repeated. To have a run
again, delete its folder from the zip file, as with `zip -d results/runs/gate.zip 'bills/repo-rho1/seed3/*'`, or delete the whole file.

Runs are compared only if their problems, evaluation, code and versions are the same, and bases of one name.
"""

import argparse
import concurrent.futures
import fcntl
import json
import os
import random
import re
import shutil
import sys
import zipfile
from pathlib import Path

import figures
import measure
from experiments import (
    ARMS,
    BASES,
    EVAL_SAMPLES,
    EXPERIMENTS,
    MORE_SEEDS,
    ONE_RATE,
    RATES,
    SEEDS,
    SHARES,
    SHORT,
    TRIES,
    TUNED,
    TUNING_SEED,
    WORK,
    base_of,
    evaluation_flags,
    learning_rate,
)
from measure import ROOT
from pages import pages, table
from run_numbers import RESULTS, folders_of, intervals, pack_file, seeds_of

sys.path.insert(0, str(ROOT))

from engine import tasks

# ---------------------------------------------------------------- running


def write_wrong_traces(folder):
    """Write wrong-SHARE.jsonl: the teacher's traces of all bills, SHARE % of the hard ones with random prices. Larger sets hold smaller."""
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


def run(arm, seed, results=RESULTS, rate=None, name=None, more=None):
    """Run the stages of an arm one after the other, evaluate the final model and keep the records as run `name`, unless they exist.

    `rate` is the learning rate of the last stage, or of all stages if they share one; `more(model)` adds to the numbers of the evaluation.
    """
    name = name or arm
    if seed in folders_of(name, results):
        return
    work = WORK / name / f"seed{seed}"
    records = ROOT / work / "records"
    shutil.rmtree(ROOT / work, ignore_errors=True)  # of a killed run
    records.mkdir(parents=True)
    before = build_base(base_of(arm, seed))
    for number, command in enumerate(ARMS[arm], 1):
        words = ["python", *(word.replace("{before}", str(before)) for word in command.split()), "--seed", str(seed)]
        words += ["--model", before] if number == 1 and before != BASES[0] else []
        is_tuned = number == len(ARMS[arm]) or arm in ONE_RATE
        stage_rate = rate if rate and is_tuned else learning_rate(arm, words[1])
        if stage_rate and "--learning_rate" not in words:
            words += ["--learning_rate", str(stage_rate)]
        before = work / f"{number}-{Path(words[1]).stem}"
        measure.run(words, before, records / before.name, quiet=True)
    evaluation = work / "eval.json"
    measure.call(["python", "eval.py", "--model", str(before), *evaluation_flags(arm), "--num_generations_eval", str(EVAL_SAMPLES),
                  "--output_file", str(evaluation)], ROOT / work / "eval.out", quiet=True)
    summary = json.loads((ROOT / evaluation).read_text())["summary"] | (more(before) if more else {})
    (records / "eval.json").write_text(json.dumps(summary, indent=1) + "\n")
    keep(records, f"{name}/seed{seed}", pack_file(name, results))
    shutil.rmtree(ROOT / work)


def build_base(base):
    """Build a base of BASES unless it is there (minutes); returns its path."""
    (ROOT / WORK).mkdir(parents=True, exist_ok=True)
    with open(ROOT / WORK / "bases.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two runs that need it wait for one building
        if not (ROOT / base / "model.safetensors").exists():
            shutil.rmtree(ROOT / base, ignore_errors=True)  # of a killed process
            flag, value = re.search(r"(seed|slip)([\d.]+)$", base).groups()
            measure.call(["python", "tiny_model/build.py", "--build", base, f"--{flag}", value], ROOT / f"{base}.out", quiet=True)
    return base


def keep(records, folder, pack):
    """Add the files below `records` as `folder` to the zip file `pack`. The bytes of the zip file depend on names and contents only."""
    pack.parent.mkdir(parents=True, exist_ok=True)
    (ROOT / WORK).mkdir(parents=True, exist_ok=True)
    with open(ROOT / WORK / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two runs that finish at once write the file one after the other
        files = {}
        if pack.exists():
            with zipfile.ZipFile(pack) as old:
                files = {name: old.read(name) for name in old.namelist()}
        files |= {f"{folder}/{path.relative_to(records)}": path.read_bytes() for path in records.rglob("*") if path.is_file()}
        unfinished = pack.with_suffix(".tmp")
        with zipfile.ZipFile(unfinished, "w") as new:
            for name in sorted(files):
                member = zipfile.ZipInfo(name)  # of 1980
                member.external_attr = 0o644 << 16
                new.writestr(member, files[name], zipfile.ZIP_DEFLATED)
        unfinished.replace(pack)


def run_all(jobs, workers):
    """Run `jobs`, the arguments of `run`, `workers` at a time. The first failure ends the rest."""
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(run, *job) for job in jobs]
        try:
            for number, future in enumerate(concurrent.futures.as_completed(futures), 1):
                future.result()
                print(f"{number} of {len(jobs)} runs are there", flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


# ---------------------------------------------------------------- comparing

EVALUATION_FLAGS = ("task", "dataset_name", "eval_problems", "num_generations_eval", "temperature", "max_completion_length", "reward",
                    "grade_truncated", "template")
PROBLEM_FLAGS = ("task", "num_hard", "num_easy", "dataset_name")
BUILT_IN_FLAGS = ("task", "num_hard", "num_easy")  # without effect beside --dataset_name; the scripts' defaults differ


def identity(run):
    """What must be the same in runs that are compared."""
    first = run.args[0]  # the base model of a later stage is the model of the stage before
    without = BUILT_IN_FLAGS if first["args"]["dataset_name"] else ()
    return {"base model": first["base_model"], "evaluation problems": first["data"]["eval"],
            "evaluation flags": {name: first["args"][name] for name in EVALUATION_FLAGS if name not in without},
            "training problems": {name: first["args"][name] for name in PROBLEM_FLAGS if name not in without},
            "code": sorted({measured["code"] for measured in run.measured}), "versions": first["versions"], "ranks": first["ranks"]}


def refuse_unlike(runs):
    """Exit with the difference when runs cannot be compared. Runs without a stage, the base's, are only evaluated and always pass.

    Bases of one name must be the same.
    """
    runs, of_base = [run for run in runs if run.stages], {}
    for run in runs:
        alike = of_base.setdefault(run.args[0]["args"]["model_name_or_path"], run)
        for name, value in identity(run).items():
            other = alike if name == "base model" else runs[0]
            if value != identity(other)[name]:
                sys.exit(f"compare.py: error: {run.folder} and {other.folder} differ in {name}: {value} and {identity(other)[name]}; "
                         "delete one of the two and run it again")


def refuse_other_code(jobs, results):
    """Exit when a run of `jobs` is missing and the finished runs of their arms were made by other code."""
    if all(seed in folders_of(arm, results) for arm, seed, *_ in jobs):
        return
    now = measure.code_version()
    for run in (run for arm in dict.fromkeys(arm for arm, *_ in jobs) for run in seeds_of(arm, results)):
        if any(measured["code"] != now for measured in run.measured):
            sys.exit(f"compare.py: error: {run.folder} was made by other code than that of this folder, and new runs could not be compared "
                     "with it: delete all runs of the experiment, or go back to its git_commit (args.json)")


def finished_runs(name, results):
    """{arm: its finished runs of the experiment's seeds}, without arms that have none."""
    experiment = EXPERIMENTS[name]
    return {arm: runs for arm in experiment.arms if (runs := seeds_of(arm, results, experiment.seeds))}


def summarize(name, results=RESULTS):
    """{arm: {"title", "seeds", number: interval}} of an experiment's finished runs. Exits when the runs cannot be compared."""
    runs = finished_runs(name, results)
    refuse_unlike([run for arm in runs.values() for run in arm])
    return {arm: {"title": EXPERIMENTS[name].arms[arm], "seeds": len(finished)} | intervals(finished) for arm, finished in runs.items()}


def render(name, results=RESULTS):
    """Write summary.json and figure.png of an experiment, print its table and return the summary; None if an arm has no run."""
    summary, folder = summarize(name, results), results / name
    if missing := [arm for arm in EXPERIMENTS[name].arms if arm not in summary]:
        print(f"{name}: nothing is written, as there is no run of {', '.join(missing)}\n")
        return None
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    EXPERIMENTS[name].draw(finished_runs(name, results), EXPERIMENTS[name].arms, folder / "figure.png")
    print(f"{EXPERIMENTS[name].title}\n\n{table(summary, EXPERIMENTS[name].columns)}\n")
    return summary


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help=f"of {', '.join(EXPERIMENTS)}; none = all")
    parser.add_argument("--seeds", nargs="+", type=int, help="seeds to run; default: those of the experiment")
    parser.add_argument("--jobs", type=int, default=2, help="number of runs at a time, with one thread each")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--tune", action="store_true", help="run the learning rates instead of the experiments")
    mode.add_argument("--tries", action="store_true", help="run the tries instead of the experiments")
    mode.add_argument("--quick", action="store_true", help="run two seeds of hard_samples, into runs/quick/")
    mode.add_argument("--render", action="store_true", help="run nothing")
    args = parser.parse_args()
    for name in args.experiments:
        if name not in EXPERIMENTS:
            parser.error(f"EXPERIMENT must be of {', '.join(EXPERIMENTS)}, got {name}")
    results, names = RESULTS, args.experiments or list(EXPERIMENTS)
    if unknown := set(args.seeds or ()) - {seed for name in names for seed in EXPERIMENTS[name].seeds}:
        parser.error(f"--seeds must be seeds of the experiment, which its table shows, got {min(unknown)}")
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
        jobs += [(arm, seed, results) for seed in args.seeds or MORE_SEEDS for arm in arms if ARMS[arm] and (
            args.seeds or any(arm in EXPERIMENTS[name].arms and seed in EXPERIMENTS[name].seeds for name in names))]
        jobs += [(arm, SEEDS[0], results) for arm in arms if not ARMS[arm]]  # the base once
        refuse_other_code(jobs, results)
        run_all(jobs, args.jobs)
    # all experiments, because the pages show all of them by the numbers of today
    summaries = {name: render(name, results) for name in (names if args.quick else EXPERIMENTS)}
    if not args.quick:
        for page, text in pages({name: summary for name, summary in summaries.items() if summary}).items():
            (ROOT / page).write_text(text)
        panels = {name: {arm: seeds_of(arm) for arm in EXPERIMENTS[name].arms if ARMS[arm]}
                  for name in ("hard_samples_bases", "hard_samples_diary_bases")}
        if all(runs for arms in panels.values() for runs in arms.values()):
            for mode in ("light", "dark"):
                figures.overview(panels, SHORT, RESULTS / f"overview-{mode}.png", mode == "dark")


if __name__ == "__main__":
    main()
