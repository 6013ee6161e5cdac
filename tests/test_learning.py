"""Does it learn, and does it still take exactly the steps that it took?"""

import json
import platform
import random

import pytest
import torch
from safetensors.torch import load_file

import grpo
from engine import tasks


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_reward_rises_on_a_skill_within_reach(run_script, tmp_path):
    """Four-day diaries with three losses: the base solves half of them; twelve steps of GRPO must bring it above 0.8."""
    rng = random.Random(0)
    prompts = [tasks.diary_problem(rng, 4, 3) for _ in range(96)]
    lines = [json.dumps({"prompt": prompt, "answer": tasks.solve(prompt)[1]}) for prompt in prompts]
    (tmp_path / "days.jsonl").write_text("\n".join(lines))
    code, _, err = run_script(
        grpo, "--dataset_name", "days.jsonl", "--max_completion_length", 40, "--learning_rate", 5e-4, "--max_steps", 12,
        "--prompts_per_step", 8, "--output_dir", "run")
    assert code == 0, err
    rewards = [record["reward"] for record in records(tmp_path / "run")]
    assert sum(rewards[:2]) / 2 < 0.65
    assert sum(rewards[-3:]) / 3 > 0.8


GOLDEN = [  # one dict per step, then the final weights
    {"reward": 0.8125, "completions/mean_length": 20.25, "loss": 0.0113185127, "grad_norm": 0.098250214,
     "entropy": 0.0407092758, "kl": 0.0260711364, "clip_ratio/high_mean": 0, "flops/total": 1.42128691e+10},
    {"reward": 0.8125, "completions/mean_length": 18.604166, "loss": 0.0141489548, "grad_norm": 0.111237776,
     "entropy": 0.0395879051, "kl": 0.0124690927, "clip_ratio/high_mean": 0, "flops/total": 2.73942518e+10},
    {"reward": 0.5, "completions/mean_length": 30.166666, "loss": 2.49496497e-06, "grad_norm": 0.00127481713,
     "entropy": 0.0584084052, "kl": 4.98992962e-05, "clip_ratio/high_mean": 0, "flops/total": 4.79745245e+10},
    {"sum of weights": 814.34968, "sum of |weights|": 58967.4671},
]


@pytest.mark.skipif(platform.machine() != "x86_64" or not torch.__version__.startswith("2.13"),
                    reason="torch samples other tokens on other processor families and in other versions")
def test_the_golden_three_steps(run_script, tmp_path):
    """The whole pipeline from seed to weights: a number that moves here is a change of behaviour, wanted or not."""
    code, _, err = run_script(
        grpo, "--task", "diary", "--num_hard", 4, "--num_easy", 12, "--prompts_per_step", 6, "--learning_rate", 1e-3, "--max_steps", 3,
        "--eval_problems", 8, "--eval_steps", 3, "--num_iterations", 2, "--beta", 0.05, "--seed", 3, "--output_dir", "run")
    assert code == 0, err
    keys = ("reward", "completions/mean_length", "loss", "grad_norm", "entropy", "kl", "clip_ratio/high_mean", "flops/total")
    trajectory = [{key: record[key] for key in keys} for record in records(tmp_path / "run")[1:]]
    weights = load_file(tmp_path / "run" / "model.safetensors").values()
    trajectory.append({"sum of weights": sum(w.double().sum().item() for w in weights),
                       "sum of |weights|": sum(w.double().abs().sum().item() for w in weights)})
    for step, golden in zip(trajectory, GOLDEN, strict=True):
        assert step == pytest.approx(golden, rel=1e-5, abs=1e-7)
