"""A reward of one's own: it reads the whole solution of a built-in problem, where the usual reward reads the last box.

    python repo.py --task bills --trace_style own --reward_fn examples/step_reward.py:right_steps
"""

from engine import tasks


def right_steps(prompts, completions, **columns):
    """1.0 for each completion whose every step is right, else 0.0; called as TRL calls reward functions."""
    return [float(tasks.steps_are_right(prompt, completion)) for prompt, completion in zip(prompts, completions)]
