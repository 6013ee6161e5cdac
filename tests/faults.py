"""What the tests of faults share: a small run, the same run as a kill leaves it, and the one line of an error."""

import json
import shutil
import sys

import pytest

import engine
import grpo

SMALL = ("--task", "diary", "--prompts_per_step", 2, "--num_generations", 4, "--num_hard", 4, "--num_easy", 4, "--eval_steps", 0,
         "--max_steps", 4, "--save_completions_steps", 1, "--max_completion_length", 16, "--learning_rate", 1e-3, "--output_dir", "run")


def metrics(folder):
    """metrics.jsonl without clocks, as strict JSON."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line, parse_constant=pytest.fail).items() if "time" not in key} for line in lines]


def the_error(err, script="grpo.py"):
    """The one line of an error."""
    assert "Traceback" not in err
    line = err.strip().splitlines()[-1]
    assert line.startswith(f"{script}: error: ")
    return line


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A run folder with checkpoints 2, 3 and 4, and all that it printed."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["grpo.py", *map(str, SMALL), "--save_steps", "1", "--save_total_limit", "3"])
        engine.launch(grpo.main)
    return folder / "run"


@pytest.fixture
def cut_run(finished, tmp_path):
    """A copy of that run, as a kill in its last step leaves it: checkpoints 2 and 3, no model."""
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    (tmp_path / "run" / "model.safetensors").unlink()
    return tmp_path / "run"
