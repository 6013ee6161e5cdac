"""A reward for compare.py that reads the whole solution of a built-in problem, where the usual one reads the last box.

    python repo.py --task bills --trace_style own --reward_fn bench/step_reward.py:right_steps
"""

import tasks


def right_steps(prompts, completions, **columns):
    """1.0 for each completion whose every step is right, else 0.0; called as TRL calls reward functions."""
    return [float(tasks.steps_are_right(prompt, completion)) for prompt, completion in zip(prompts, completions)]
