"""Does it learn, and does it still take exactly the steps that it took?"""

import json
import random

import pytest

import grpo
import tasks


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("seed", [0, 1])
def test_reward_rises_on_a_skill_within_reach(run_script, tmp_path, seed):
    """Four-day diaries with three losses: the base solves half of them; twelve steps of GRPO must bring it above 0.8."""
    rng = random.Random(seed)
    prompts = [tasks.diary_problem(rng, 4, 3) for _ in range(96)]
    lines = [json.dumps({"prompt": prompt, "answer": tasks.solve(prompt)[1]}) for prompt in prompts]
    (tmp_path / "days.jsonl").write_text("\n".join(lines))
    code, _, err = run_script(
        grpo, "--dataset_name", "days.jsonl", "--max_completion_length", 40, "--learning_rate", 5e-4, "--max_steps", 12,
        "--prompts_per_step", 8, "--output_dir", "run", "--seed", seed)
    assert code == 0, err
    rewards = [record["reward"] for record in records(tmp_path / "run")]
    assert sum(rewards[:2]) / 2 < 0.65
    assert sum(rewards[-3:]) / 3 > 0.8
