"""The experiments of compare.py, as data: arms (the commands of a run), learning rates, and which arms an experiment compares.

An arm is one command, or several commands that each start from the model of the command before. A run is an arm with a seed.
"""

import itertools
import re
from dataclasses import dataclass
from pathlib import Path

import figures

WORK = Path("runs") / "compare"  # relative to the repository, so that recorded commands name no folder of a machine
SEEDS, MORE_SEEDS, TUNING_SEED = (0, 1, 2, 3, 4), tuple(range(10)), 100
BASES = ("tiny_model", *(f"{WORK}/bases/seed{seed}" for seed in (1, 2)))  # made anew by tiny_model/build.py --seed 1, 2
EVAL_SAMPLES = 8  # samples of each problem in the evaluation at the end of a run
BILLS, DIARY = "--task bills --max_steps 150", "--task diary --num_hard 64 --num_easy 32 --max_steps 100"
PREFIXRL_OWN = ("prefixrl.py --task bills --max_steps 300 --num_hard 512 --num_easy 256 --trace_style own --prefixes_per_trace 5 "
                "--learning_rate 0.0005")
SHARES = (10, 30, 100)  # per cent of the hard problems whose trace is wrong
FEW = "--traces results/compute/few.jsonl"  # the few traces of little rejection sampling; docs/results.md has the eval.py command
STEPS = "examples/step_reward.py:right_steps"
TEACHER_OVERLAP = {"bills": 0.4, "diary": 0.1}  # the least word overlap of the base's right retellings with the teacher's traces
RARE = ("0.68", "0.82", "0.9")  # the slip of each base of rarity.py
RARE_TRACES = (1, 3, 10)
RARE_KINDS = {"steady-": "one low rate", "": "rate tuned for cost", "mixed-": "the same, with easy problems"}  # start of a name -> title
RARE_PROBLEMS = str(WORK / "balanced-{}.jsonl")
REAL_WORK = Path("runs") / "real_model"
REAL_TRACES = "results/real_model/traces.jsonl"
LEVELS = (25, 50, 75)  # per cent right on hard problems: the table of compute has the FLOPs to each


def all_arms():
    """{arm: its commands}. Commands lack the seed, and the rate unless only this arm has it; {before} is the model of the stage before."""
    arms = {
        "bills/base": [],
        "diary/base": [],
        "bills/repo-default": ["repo.py"],  # the README shows how it ends
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
        "bills/repo-own-steps": [f"repo.py {BILLS} --trace_style own --reward_fn {STEPS}"],
        "bills/luffy-own": [f"luffy.py {BILLS} --trace_style own"],
        "bills/repo-rho0.5": [f"repo.py {BILLS} --failure_threshold 0.5"],
        "bills/repo-rho1": [f"repo.py {BILLS} --failure_threshold 1"],
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
        "diary/sft-grpo-few-once": [f"sft.py --task diary --num_hard 64 --num_easy 32 --max_steps 50 {FEW} --prompts_per_step 3",
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
    for task, flags in (("bills", BILLS), ("diary", DIARY)):
        for method in ("dapo", "chord", "opsd", "adaprefix"):
            arms[f"{task}/{method}"] = [f"examples/{method}.py {flags}"]
        arms[f"{task}/chord-gate"] = [f"examples/chord.py {flags} --gate 0 --no_token_weight"]
        for suffix, style, overlap in (("", "teacher", TEACHER_OVERLAP[task]), ("-own", "own", 0.9)):
            flags_of_style = f"{flags} --trace_style {style}"
            arms |= {f"{task}/repo-frozen{suffix}": [f"examples/repo_frozen.py {flags_of_style}"],
                     f"{task}/repo-overlap{suffix}": [f"examples/repo_overlap.py {flags_of_style} --min_overlap {overlap}"],
                     f"{task}/repo-steps{suffix}": [f"repo.py {flags_of_style} --reward_fn {STEPS}"]}
        arms[f"{task}/repo-own"] = [f"repo.py {flags} --trace_style own"]
    arms["bills/dapo"][0] += " --max_num_gen_batches 3"  # ten rounds cost ten minutes a run, and no hard problem is ever solved
    arms["bills/adaprefix"] = [f"examples/adaprefix.py {BILLS} --num_hard 512 --num_easy 256 --trace_style teacher"]
    return arms | {f"{task}/{method}-bases": arms[f"{task}/{method}"] for task in TEACHER_OVERLAP
                   for method in (*SHORT, *SIBLINGS, *REPO_VARIANTS) if f"{task}/{method}" in arms}


def rare_base(slip):
    """The base of rarity.py whose text books a loss of a seven-day diary as a gain with this probability."""
    return f"{WORK}/bases/slip{slip}"


def rare_traces(slip, num):
    """The file of the first traces that this base would find."""
    return f"results/rarity/slip{slip}-{num}.jsonl"


def rare_arms():
    """{arm: (its title, its commands)} of rarity.py. A name starts with what differs: mixed- = with easy problems, steady- = low rate."""
    arms = {}
    for slip, kind in itertools.product(RARE, RARE_KINDS):
        problems = RARE_PROBLEMS.format("mixed" if kind == "mixed-" else "hard")
        data = f"--dataset_name {problems} --eval_dataset_name {RARE_PROBLEMS.format('eval')} --eval_problems 192"
        data += " --max_completion_length 64" + " --learning_rate 0.0002" * (kind == "steady-")
        start = f"rare-{slip}/{kind}"
        arms[f"{start}grpo"] = "GRPO", [f"grpo.py {data} --max_steps 150"]
        if slip == RARE[-1] and not kind:  # as many FLOPs as three traces cost there
            arms[f"{start}grpo-long"] = "GRPO, 450 steps", [f"grpo.py {data} --max_steps 450 --eval_steps 30"]
        for num in RARE_TRACES if not kind else (3,):
            traces, words = f"--traces {rare_traces(slip, num)}", f"{num} trace{'s' * (num > 1)}"
            arms[f"{start}sft-grpo-{num}"] = f"SFT → GRPO, {words}", [
                f"sft.py {data} --max_steps 30 {traces} --prompts_per_step {num}", f"grpo.py {data} --max_steps 120 --model {{before}}"]
            arms[f"{start}prefixrl-{num}"] = f"PrefixRL, {words}", [
                f"prefixrl.py {data} --max_steps 150 {traces} --prefixes_per_trace {48 // num}"]
        arms[f"{start}importance-3"] = "importance-weighted, 3 traces", [
            f"luffy.py {data} --max_steps 150 --traces {rare_traces(slip, 3)} --shaping importance"]
    return arms


def real_arms():
    """{arm: its commands} of real_model.py."""
    data = f"--dataset_name {REAL_WORK}/train.jsonl --eval_dataset_name {REAL_WORK}/eval.jsonl --eval_problems 72 --eval_steps 20"
    data += " --max_completion_length 32"
    rollout, sft = f"{data} --prompts_per_step 3", f"sft.py {data} --prompts_per_step 8"
    return {"real/base": [],
            "real/grpo": [f"grpo.py {rollout} --max_steps 60"],
            "real/repo": [f"repo.py bench/real_model.yaml {rollout} --max_steps 60"],
            "real/luffy": [f"luffy.py {rollout} --max_steps 60"],
            "real/prefixrl": [f"prefixrl.py {rollout} --max_steps 60 --traces {REAL_TRACES}"],
            "real/sft": [f"{sft} --max_steps 60"],
            **{f"real/sft-grpo{own}": [f"{sft}{traces} --max_steps 30", f"grpo.py {rollout} --max_steps 30 --model {{before}}"]
               for own, traces in (("", ""), ("-own", f" --traces {REAL_TRACES}"))}}


def base_of(arm, seed):
    """The base that a run starts from: of the arms on several bases, seeds 0, 3, 6 and 9 have the first one, and so on."""
    if arm.startswith("rare-"):
        return rare_base(arm.split("/")[0].removeprefix("rare-"))
    if arm in REAL_ARMS:
        return f"{REAL_WORK}/model"
    return BASES[seed % len(BASES)] if arm.endswith("-bases") else BASES[0]


SHORT = {"grpo": "GRPO", "repo": "RePO", "luffy": "LUFFY", "prefixrl": "PrefixRL", "sft": "SFT", "sft-grpo": "SFT → GRPO",
         "repo-raw": "raw replacement"}
SIBLINGS = {"dapo": "DAPO's sampling", "chord": "CHORD", "chord-gate": "HPT's gate", "opsd": "OPSD", "adaprefix": "AdaPrefix"}
REPO_VARIANTS = {f"repo{variant}{style}": f"{title}, {words}"
                 for style, words in (("", "foreign"), ("-own", "own style")) for variant, title in (
                     ("", "RePO"), ("-frozen", "frozen reteller"), ("-overlap", "least overlap"), ("-steps", "steps graded"))}
RARE_ARMS, REAL_ARMS = rare_arms(), real_arms()
ARMS = all_arms() | {arm: commands for arm, (_, commands) in RARE_ARMS.items()} | REAL_ARMS
ONE_RATE = RARE_ARMS | REAL_ARMS  # arms whose stages share the rate that was tuned
TRIES = [arm for arm in ARMS if "/try-" in arm]
RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3)
# `--tune` chose these rates (a test repeats the choice). An arm that is not listed has the rate of its method and task.
LEARNING_RATES = {
    "bills/grpo": 1e-4, "bills/repo": 5e-4, "bills/luffy": 5e-4, "bills/prefixrl": 1e-4, "bills/sft": 2e-3, "bills/repo-raw": 2e-3,
    "diary/grpo": 2e-4, "diary/repo": 2e-4, "diary/luffy": 1e-4, "diary/prefixrl": 5e-4, "diary/sft": 2e-4,
    "bills/sft-grpo": 0.0001, "diary/sft-grpo": 0.001,
    "bills/chord": 1e-4, "bills/opsd": 2e-4, "bills/adaprefix": 1e-4, "diary/chord": 2e-4, "diary/opsd": 2e-4, "diary/adaprefix": 2e-4,
    "bills/chord-gate": 0.002, "diary/chord-gate": 0.0005,
    "bills/dapo": 1e-4, "diary/dapo": 2e-4,
    "real/grpo": 5e-6, "real/repo": 1e-5, "real/luffy": 1e-5, "real/prefixrl": 2e-6, "real/sft": 5e-5,  # real_model.py --tune
    "real/sft-grpo": 5e-6, "real/sft-grpo-own": 2e-6}
RARE_TUNED = tuple(f"rare-{slip}/{method}" for slip in RARE for method in ("grpo", "sft-grpo-3", "prefixrl-3", "importance-3"))
RARE_LEARNING_RATES = {  # `rarity.py --tune` chose these rates (a test repeats the choice); both stages of SFT → GRPO have the rate
    "rare-0.68/grpo": 1e-3, "rare-0.68/sft-grpo-3": 1e-3, "rare-0.68/prefixrl-3": 1e-3, "rare-0.68/importance-3": 5e-4,
    "rare-0.82/grpo": 1e-3, "rare-0.82/sft-grpo-3": 1e-3, "rare-0.82/prefixrl-3": 5e-4, "rare-0.82/importance-3": 5e-4,
    "rare-0.9/grpo": 5e-4, "rare-0.9/sft-grpo-3": 1e-3, "rare-0.9/prefixrl-3": 1e-3, "rare-0.9/importance-3": 5e-4}
REAL_RATES = (2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4)
REAL_TUNED = tuple(arm for arm, commands in REAL_ARMS.items() if commands)
TUNED = ("bills/grpo", "bills/repo", "bills/luffy", "bills/prefixrl", "bills/sft", "bills/repo-raw",
         "diary/grpo", "diary/repo", "diary/luffy", "diary/prefixrl", "diary/sft", "bills/sft-grpo", "diary/sft-grpo",
         *(f"{task}/{method}" for task in TEACHER_OVERLAP for method in ("dapo", "chord", "chord-gate", "opsd", "adaprefix")))


@dataclass(frozen=True)
class Experiment:
    title: str
    hypothesis: str  # the paper's claim
    arms: dict  # arm -> its name in tables and figures
    draw: object  # a function of figures.py
    columns: tuple  # columns of the table: names in run_numbers.NUMBERS
    seeds: tuple = SEEDS  # of its table and figure; an arm of several experiments can have more
    against: str | None = None  # the arm that each other one is compared with, seed by seed


OUTCOME = ("hard", "hard_pass", "easy", "other", "foreign", "tflop", "tflop_traces")
DRIFT = ("hard", "hard_mean", "easy", "other", "foreign", "success", "overlap", "tflop")
PARENTS = {arm: SHORT[arm] for arm in ("grpo", "repo", "luffy", "prefixrl")} | SIBLINGS
EXPERIMENTS = {
    "hard_samples": Experiment(
        "Hard samples, knowledge", "RePO solves more hard problems than GRPO and LUFFY, and keeps what the policy could.",
        {"bills/base": "base"} | {f"bills/{arm}": name for arm, name in SHORT.items()}, figures.learning, OUTCOME),
    "hard_samples_diary": Experiment(
        "Hard samples, a skill", "The same where the base has the skill and uses it carelessly.",
        {"diary/base": "base"} | {f"diary/{arm}": name for arm, name in SHORT.items() if arm != "repo-raw"}, figures.learning, OUTCOME),
    "hard_samples_bases": Experiment(
        "Hard samples on three bases, knowledge", "The ranking on one base is that on others.",
        {f"bills/{arm}-bases": name for arm, name in SHORT.items()}, figures.learning, OUTCOME, MORE_SEEDS, "bills/repo-bases"),
    "hard_samples_diary_bases": Experiment(
        "Hard samples on three bases, a skill", "The same for a skill.",
        {f"diary/{arm}-bases": name for arm, name in SHORT.items() if arm != "repo-raw"}, figures.learning, OUTCOME, MORE_SEEDS,
        "diary/repo-bases"),
    "siblings": Experiment(
        "Siblings, knowledge", "None: what do other answers of the field do under the same budget?",
        {f"bills/{arm}-bases": name for arm, name in PARENTS.items()}, figures.siblings, OUTCOME, against="bills/grpo-bases"),
    "siblings_diary": Experiment(
        "Siblings, a skill", "None, as above.",
        {f"diary/{arm}-bases": name for arm, name in PARENTS.items()}, figures.siblings, OUTCOME, against="diary/grpo-bases"),
    "drift": Experiment(
        "RePO's drift, knowledge", "None: the paper's current policy retells, and the answer alone is graded. Do three remedies help?",
        {f"bills/{arm}-bases": name for arm, name in REPO_VARIANTS.items()}, figures.drift, DRIFT, against="bills/repo-bases"),
    "drift_diary": Experiment(
        "RePO's drift, a skill", "None, as above.",
        {f"diary/{arm}-bases": name for arm, name in REPO_VARIANTS.items()}, figures.drift, DRIFT, against="diary/repo-bases"),
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
        "Compute",
        "PrefixRL reaches a reward with half the FLOPs of SFT → RL, rejection sampling included, and ends at three times its reward.",
        {"diary/grpo": "GRPO, n = 8", "diary/grpo-fast": "GRPO, n = 8, PrefixRL's rate", "diary/grpo-n64": "GRPO, n = 64",
         "diary/prefixrl": "PrefixRL, 63 traces", "diary/prefixrl-few": "PrefixRL, 3 traces",
         "diary/sft-grpo-few": "SFT → GRPO, 3 traces, 64 rows a step",
         "diary/sft-grpo-few-once": "SFT → GRPO, 3 traces, 3 rows a step", "diary/luffy-few": "LUFFY, 3 traces",
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
        "RePO's gate", "None: the paper does not publish the share of failed rollouts at which a group is helped.",
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


def evaluation_flags(arm):
    """The flags of eval.py for the problems that the runs of an arm are evaluated on."""
    if arm.startswith("rare-"):
        return ["--dataset_name", RARE_PROBLEMS.format("eval"), "--max_completion_length", "64"]
    if arm in REAL_ARMS:
        return ["--dataset_name", str(REAL_WORK / "eval.jsonl"), "--max_completion_length", "32"]
    return ["--task", arm.split("/")[0]]


def learning_rate(arm, script):
    """The tuned rate of an arm's stage: the arm's own rate, or that of the script on this task; None: the script's default."""
    method = f"{arm.split('/')[0]}/{Path(script).stem.split('_')[0]}"  # repo_frozen.py has the rate of repo.py
    if arm.startswith("rare-"):
        return RARE_LEARNING_RATES.get(rare_method(arm))
    if arm in ONE_RATE:
        return LEARNING_RATES.get(arm)
    own = LEARNING_RATES.get(arm.removesuffix("-bases"))
    if arm.endswith("-default"):
        return None
    return own if own is not None and script != "sft.py" else LEARNING_RATES.get(method)


def rare_method(arm):
    """The arm of RARE_TUNED whose rate an arm of rarity.py has: that of its method with three traces on hard problems only."""
    return re.sub(r"-\d+$", "-3", re.sub("/(mixed|steady)-", "/", arm).removesuffix("-long"))


def pack_name(arm):
    """The zip file of an arm's runs is named after the first experiment that has the arm; tuning, tries and other arms have their own."""
    if arm.startswith("tuning/") or arm in TRIES:
        return "tries" if arm in TRIES else "tuning"
    if arm in RARE_ARMS or arm in REAL_ARMS:
        return "rarity" if arm in RARE_ARMS else "real_model"
    return next((name for name, experiment in EXPERIMENTS.items() if arm in experiment.arms), "others")
