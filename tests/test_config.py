"""Is a config file the same as its flags on the command line, and args.json of a run a way to repeat it?"""

import json

import pytest

import eval as eval_script
import grpo
import repo
from engine import command_line

SHORT = {"task": "diary", "num_hard": 8, "num_easy": 8, "max_steps": 2, "eval_steps": 1, "eval_problems": 4, "prompts_per_step": 3,
         "num_generations": 4, "max_completion_length": 24, "learning_rate": 1e-3, "save_steps": 1}


def parsed(script, *argv):
    return command_line.parse_args(script.Args, script.__doc__, script.__file__, list(map(str, argv)))


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


YAML = """# comments are fine
model: tiny_model
learning_rate: 1e-6      # a string to YAML 1.1
temperature: 7e-1
epsilon: inf
epsilon_high: .inf
beta: 0
seed: 3
weight_decay: -0.0
drop_zero_variance: false
gradient_checkpointing: yes
scale_rewards: none
template: "none"
system_prompt: "--- be brief: = 1"
eval_dataset_name: null
max_completion_length: ~
"""
FLAGS = ["--model", "tiny_model", "--learning_rate", "1e-6", "--temperature", "7e-1", "--epsilon", "inf", "--epsilon_high", "inf", "--beta",
         "0", "--seed", "3", "--weight_decay", "-0.0", "--no_drop_zero_variance", "--gradient_checkpointing", "--scale_rewards", "none",
         "--template", "none", "--system_prompt=--- be brief: = 1"]


def test_a_config_is_its_flags_and_flags_behind_it_win(tmp_path):
    (tmp_path / "c.yaml").write_text(YAML)
    args = parsed(grpo, "c.yaml")
    assert args == parsed(grpo, *FLAGS)
    assert (args.learning_rate, args.epsilon, args.epsilon_high, args.seed) == (1e-6, float("inf"), float("inf"), 3)
    assert (args.drop_zero_variance, args.gradient_checkpointing, args.system_prompt) == (False, True, "--- be brief: = 1")
    args = parsed(grpo, "c.yaml", "--seed", 4, "--model_name_or_path", "other", "--drop_zero_variance", "--max_completion_length", 9)
    assert (args.seed, args.model_name_or_path, args.drop_zero_variance, args.max_completion_length) == (4, "other", True, 9)
    assert (args.learning_rate, args.template) == (1e-6, "none")
    (tmp_path / "c.json").write_text(json.dumps({"learning_rate": 1e-6, "epsilon": "inf", "epsilon_high": float("inf"), "seed": 3}))
    assert parsed(grpo, "c.json") == parsed(grpo, "--learning_rate", 1e-6, "--epsilon", "inf", "--epsilon_high", "inf", "--seed", 3)
    (tmp_path / "e.yml").write_text("dataset_name: [a.jsonl, b c.jsonl]\ntemperature: 6e-1")
    assert parsed(eval_script, "e.yml") == parsed(eval_script, "--dataset_name", "a.jsonl", "b c.jsonl", "--temperature", 0.6)
    (tmp_path / "e.yml").write_text("dataset_name: a.jsonl")
    assert parsed(eval_script, "e.yml").dataset_name == ["a.jsonl"]


@pytest.mark.parametrize("name, text, expected", [
    ("missing.yaml", None, "No such file"),
    ("c.toml", "seed = 1", "expected flags, or first a config file ending in .yaml, .yml, .json"),
    ("c.yaml", "learning_rat: 1", "unknown key learning_rat; did you mean --learning_rate?"),
    ("c.yaml", "help: 1", "unknown key help; --help lists them"), ("c.yaml", "zzz: 1", "unknown key zzz; --help lists them"),
    ("c.yaml", "no_drop_zero_variance: true", "unknown key no_drop_zero_variance"),
    ("c.yaml", "7: 1", "unknown key 7"),
    ("c.yaml", "learning_rate: fast", "learning_rate: invalid float value: 'fast'"),
    ("c.yaml", "seed: 1.5", "seed: invalid int value: '1.5'"),
    ("c.yaml", "seed: true", "seed: invalid int value: 'true'"),
    ("c.yaml", "dry_run: 7", "dry_run: expected yes or no, got '7'"),
    ("c.yaml", "loss_type: ppo", "loss_type: invalid choice: 'ppo'"),
    ("c.yaml", "seed: null", "seed: invalid int value: 'null'"), ("c.json", '{"seed": null}', "seed: invalid int value: 'null'"),
    ("c.yaml", "seed: [1, 2]", "seed: expected one value, got ['1', '2']"),
    ("c.yaml", "seed: {a: 1}", "seed: expected one value, got {'a': '1'}"),
    ("c.yaml", "template: null", "template: invalid choice: 'null'"),
    ("c.yaml", "dataset_name: []", "dataset_name: expected one value, got []"),
    ("c.yaml", "dataset_name: [a, [b]]", "dataset_name: expected one value, got ['a', ['b']]"),
    ("c.yaml", "seed: 1\nbeta: 0\nseed: 2", "seed is given more than once"),
    ("c.json", '{"seed": 1, "seed": 2}', "seed is given more than once"),
    ("c.yaml", "model: a\nmodel_name_or_path: b", "model and model_name_or_path are the same flag"),
    ("c.yaml", "- seed", "expected a mapping of flags to values, got list"),
    ("c.yaml", "", "expected a mapping of flags to values, got NoneType"),
    ("c.json", "[1]", "expected a mapping of flags to values, got list"),
    ("c.json", "{seed: 1}", "Expecting property name"),
    ("c.yaml", "seed: [1", "while parsing a flow sequence"),
    ("c.yaml", "seed: !!python/object/apply:os.mkdir [made]", "seed: expected one value, got ['made']"),
    ("c.yaml", b"\xff\xfe\x00", "'utf-8' codec can't decode"),
    ("c.json", '{"script": "luffy.py", "args": {"seed": 1}}', "is of a run of luffy.py, not of grpo.py"),
    ("c.json", '{"script": "grpo.py", "args": {"sed": 1}}', "unknown key sed"),
])
def test_a_config_that_is_wrong_is_one_line_with_file_and_key(run_script, tmp_path, name, text, expected):
    if text is not None:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    before = sorted(tmp_path.iterdir())
    code, _, err = run_script(grpo, name, "--max_steps", 1)
    assert code == 2 and err.startswith(f"grpo.py: error: {name}: {expected}") and err.count("\n") == 1, err
    assert sorted(tmp_path.iterdir()) == before


GONE = "no longer exists: --micro_batch_tokens bounds a micro-batch"


@pytest.mark.parametrize("name, text, expected", [
    ("c.yaml", "system_prompt:", None), ("c.yaml", 'system_prompt: ""', ""), ("c.json", '{"system_prompt": ""}', ""),
    ("c.json", '{"system_prompt": null}', None)])
def test_nothing_is_null_and_an_empty_text_is_a_text(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text)
    assert parsed(grpo, name).system_prompt == expected


@pytest.mark.parametrize("script, flags, expected", [
    (repo, ("--failure_rate", 0.5), "--failure_rate is now --failure_threshold"),
    (eval_script, ("--stop_at=2",), "--stop_at is now --traces_per_problem"),
    (grpo, ("--micro_batch_size", 4), f"--micro_batch_size {GONE}"),
    (repo, ("renamed.yaml",), "renamed.yaml: failure_rate is now --failure_threshold"),
    (repo, ("removed.yaml",), f"removed.yaml: micro_batch_size {GONE}"),
    (repo, ("args.json",), f"args.json: the run has --micro_batch_size 4, which {GONE}"),
    (repo, ("--output_dir", "run", "--resume_from_checkpoint"),
     f"--resume_from_checkpoint run: the run has --micro_batch_size 4, which {GONE}"),
])
def test_a_flag_that_was_renamed_or_removed_says_so(run_script, tmp_path, script, flags, expected):
    (tmp_path / "renamed.yaml").write_text("failure_rate: 0.5")
    (tmp_path / "removed.yaml").write_text("micro_batch_size: 4")
    (tmp_path / "run").mkdir()
    for path in (tmp_path / "args.json", tmp_path / "run" / "args.json"):
        path.write_text(json.dumps({"script": "repo.py", "args": {"failure_rate": 0.5, "micro_batch_size": 4}}))
    code, _, err = run_script(script, *flags)
    assert code == 2 and err == f"{script.__name__}.py: error: {expected}\n"


def test_a_run_with_a_renamed_flag_and_the_default_of_a_removed_one_is_repeated_and_resumed(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "args.json").write_text(json.dumps(
        {"script": "repo.py", "args": {"failure_rate": 0.5, "micro_batch_size": 0, "seed": 3}}))
    for argv in (("run/args.json",), ("--output_dir", "run", "--resume_from_checkpoint")):
        args = parsed(repo, *argv)
        assert (args.failure_threshold, args.seed) == (0.5, 3)
    assert "failure" not in capsys.readouterr().out  # it has not changed


def test_a_config_stands_first(run_script, tmp_path):
    (tmp_path / "c.yaml").write_text("seed: 1")
    code, _, err = run_script(grpo, "--seed", 1, "c.yaml")
    assert code == 2 and err == "grpo.py: error: unrecognized arguments: c.yaml\n"


def test_values_that_do_not_fit_are_refused_as_on_the_command_line(run_script, tmp_path):
    (tmp_path / "c.yaml").write_text("max_steps: 0")
    code, _, err = run_script(grpo, "c.yaml")
    assert code == 2 and err == "grpo.py: error: --max_steps must be at least 1, got 0\n"


def metrics(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if "time" not in key} for record in records]


def test_a_run_is_repeated_from_its_args_json_in_a_folder_of_its_own(run_script, tmp_path):
    (tmp_path / "c.json").write_text(json.dumps(SHORT | {"output_dir": "first", "epsilon_high": "inf"}))
    code, _, err = run_script(grpo, "c.json")
    assert code == 0, err
    before = {path: path.read_bytes() for path in (tmp_path / "first").rglob("*") if path.is_file()}
    assert run_script(grpo, "first/args.json", "--output_dir", "second")[0] == 0
    assert run_script(grpo, "first/args.json")[0] == 0
    (third,) = (tmp_path / "runs").iterdir()
    first, second, last = (json.loads((folder / "args.json").read_text()) for folder in (tmp_path / "first", tmp_path / "second", third))
    assert first["args"] == second["args"] | {"output_dir": "first"} == last["args"] | {"output_dir": "first"}
    assert first["data"] == last["data"] and len({first["run_id"], second["run_id"], last["run_id"]}) == 3
    assert metrics(tmp_path / "first") == metrics(tmp_path / "second") == metrics(third)
    assert before == {path: path.read_bytes() for path in (tmp_path / "first").rglob("*") if path.is_file()}
    code, _, err = run_script(grpo, "first/args.json", "--output_dir", "second")
    assert code == 2 and "--output_dir second is in use" in err


def test_resuming_with_a_config_starts_from_the_saved_flags_and_the_command_line_wins(run_script, tmp_path):
    (tmp_path / "c.json").write_text(json.dumps(SHORT | {"output_dir": "run", "epsilon_high": 0.3, "system_prompt": "Hm"}))
    assert run_script(grpo, "c.json")[0] == 0
    (tmp_path / "more.yaml").write_text("resume_from_checkpoint: run\nmax_steps: 9\nepsilon_high: null\nlearning_rate: 2e-3\n")
    args = parsed(grpo, "more.yaml", "--max_steps", 3)
    assert (args.max_steps, args.epsilon_high, args.learning_rate) == (3, None, 2e-3)
    assert (args.num_generations, args.system_prompt, args.output_dir) == (4, "Hm", "run")
    assert args.resume_from_checkpoint == "run/checkpoint-2"
