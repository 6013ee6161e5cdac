"""Can a file of somebody else run code, or reach the terminal?"""

import ast
import json
import math
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

import common
import eval as eval_script
import grpo
import luffy
import prefixrl
import repo
import sft
from engine import checkpoints, ranks, run_folder
from engine.run_log import RunLog
from faults import the_error

ROOT = Path(grpo.__file__).parent


class Malice:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


class Loader:
    """A pickle that calls a function of torch."""

    def __reduce__(self):
        return torch.load, ("file",)


class MemberOf311:
    """A member of an Enum as Python 3.11.2 pickles it."""

    def __reduce__(self):
        return getattr, (_MEM_FORMAT_ENCODING, "TORCH_PRESERVE_FORMAT")


def test_the_malicious_pickle_is_one(tmp_path):
    pickle.loads(pickle.dumps(Malice(tmp_path / "marker"))).close()
    assert (tmp_path / "marker").exists()


def test_a_malicious_optimizer_is_refused(run_script, cut_run, tmp_path):
    """Also where its hash is right."""
    checkpoint = cut_run / "checkpoint-3"
    torch.save({"optimizer": Malice(tmp_path / "marker")}, checkpoint / "optimizer.pt")
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").unlink()
    checkpoints.seal(checkpoint, state)
    code, _, err = run_script(grpo, "--resume_from_checkpoint", "run")
    assert code == 2 and "run/checkpoint-3: optimizer.pt is refused: it is no file of plain tensors" in the_error(err)
    assert not (tmp_path / "marker").exists()


def test_the_index_of_sliced_states_names_tensors_and_nothing_else(tmp_path):
    """As --parallel fsdp writes the optimizer's state. Objects in it are not loaded, because torch would unpickle them."""
    saved = {"moment": torch.ones(2, 3), "step": torch.tensor(1.0), "group": {"lr": Malice(tmp_path / "marker")}}
    checkpoint.save({"state": saved}, checkpoint_id=tmp_path, no_dist=True)
    index = ranks.read_index(tmp_path)
    assert {name: tuple(kind.size) for name, kind in index.state_dict_metadata.items()} == {"state.moment": (2, 3), "state.step": ()}
    index.version = MemberOf311()
    (tmp_path / ".metadata").write_bytes(pickle.dumps(index))
    assert ranks.read_index(tmp_path).version is _MEM_FORMAT_ENCODING.TORCH_PRESERVE_FORMAT
    for name, named in (("open", Malice(tmp_path / "marker")), ("load", Loader())):
        (tmp_path / ".metadata").write_bytes(pickle.dumps(named))
        with pytest.raises(pickle.UnpicklingError, match=f"it names .*{name}"):
            ranks.read_index(tmp_path)
    assert not (tmp_path / "marker").exists()


def test_weights_of_another_model_are_refused_in_one_line(run_script, cut_run):
    checkpoint = cut_run / "checkpoint-3"
    shutil.copy(checkpoint / "optimizer.pt", checkpoint / "model.safetensors")
    state = json.loads((cut_run / "checkpoint-2" / "state.json").read_text()) | {"step": 3}
    (checkpoint / "state.json").unlink()
    checkpoints.seal(checkpoint, state)
    code, _, err = run_script(grpo, "--resume_from_checkpoint", "run")
    assert code == 2 and "run/checkpoint-3 does not fit: " in the_error(err)


def test_a_malicious_model_is_refused(run_script, tmp_path):
    shutil.copytree(ROOT / "tiny_model", tmp_path / "evil", ignore=shutil.ignore_patterns("*.safetensors", "traces"))
    torch.save({"model.norm.weight": Malice(tmp_path / "marker")}, tmp_path / "evil" / "pytorch_model.bin")
    for script in (grpo, eval_script):
        code, _, err = run_script(script, "--model", "evil")
        assert code == 2 and "--model_name_or_path evil: its weights are refused" in the_error(err, Path(script.__file__).name)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("script", [grpo, repo, luffy, prefixrl, sft, eval_script], ids=lambda script: script.__name__)
def test_code_of_a_model_runs_only_when_it_is_trusted(run_script, tmp_path, script):
    shutil.copytree(ROOT / "tiny_model", tmp_path / "coded")
    config = json.loads((tmp_path / "coded" / "config.json").read_text())
    (tmp_path / "coded" / "config.json").write_text(json.dumps(config | {
        "model_type": "coded", "auto_map": {"AutoConfig": "code.Coded", "AutoModelForCausalLM": "code.CodedModel"}}))
    (tmp_path / "coded" / "code.py").write_text(
        f"open({str(tmp_path / 'marker')!r}, 'w').close()\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Coded(LlamaConfig):\n    model_type = 'coded'\nclass CodedModel(LlamaForCausalLM):\n    config_class = Coded\n")
    flags = ("--model", "coded", *(() if script is eval_script else ("--dry_run",)))
    code, _, err = run_script(script, *flags)
    assert code == 2 and "--model_name_or_path coded: " in the_error(err, Path(script.__file__).name)
    assert not (tmp_path / "marker").exists()
    if script is grpo:
        assert run_script(script, *flags, "--trust_remote_code")[0] == 0
        assert (tmp_path / "marker").exists()


@pytest.fixture
def evil(tmp_path):
    """A reward that leaves a marker when it runs; returns the marker's path."""
    (tmp_path / "evil.py").write_text(
        f"open({str(tmp_path / 'marker')!r}, 'w').close()\ndef f(completions, **_): return [0] * len(completions)")
    return tmp_path / "marker"


@pytest.mark.parametrize("name, value", [("reward_fn", "evil.py:f"), ("trust_remote_code", True)])
def test_flags_that_run_code_come_from_the_command_line_alone(run_script, cut_run, tmp_path, evil, name, value):
    record = json.loads((cut_run / "args.json").read_text())
    (cut_run / "args.json").write_text(json.dumps(record | {"args": record["args"] | {name: value}}))
    (tmp_path / "c.yaml").write_text(json.dumps({name: value}))
    for flags in (("--resume_from_checkpoint", "run"), ("run/args.json",), ("run/args.json", "--dry_run"), ("c.yaml", "--dry_run")):
        code, _, err = run_script(grpo, *flags)
        assert code == 2 and f"{name} runs code, and so is taken from the command line only" in the_error(err)
    assert not evil.exists()
    if name == "reward_fn":
        assert run_script(grpo, "c.yaml", "--dry_run", "--reward_fn", "evil.py:f")[0] == 0 and evil.exists()


@pytest.mark.parametrize("name, value, expected", [
    ("reward", "evil.py:f", "invalid choice: 'evil.py:f'"), ("loss_type", "zzz", "invalid choice: 'zzz'"),
    ("dtype", "float8", "invalid choice: 'float8'"), ("report_to", "os", "invalid choice: 'os'"),
    ("max_steps", 4.5, "invalid int value: '4.5'"), ("max_steps", None, "invalid int value: 'null'"),
    ("temperature", None, "invalid float value: 'null'"), ("seed", [1], "expected one value, got [1]"),
    ("epsilon", {"a": 1}, "expected one value, got {'a': 1}"), ("template", 7, "invalid choice: '7'"), ("num_hard", "9" * 5000, "num_hard"),
])
def test_values_in_args_json_pass_the_checks_of_the_command_line(run_script, cut_run, evil, name, value, expected):
    record = json.loads((cut_run / "args.json").read_text())
    (cut_run / "args.json").write_text(json.dumps(record | {"args": record["args"] | {name: value}}))
    for flags in (("--resume_from_checkpoint", "run"), ("run/args.json",)):
        code, _, err = run_script(grpo, *flags)
        assert code == 2 and f"run/args.json: {name}" in the_error(err) and expected in err
    assert not evil.exists()


def test_an_args_json_that_cannot_be_read_is_refused(run_script, cut_run):
    (cut_run / "args.json").write_text("[" * 100_000)
    code, _, err = run_script(grpo, "run/args.json")
    assert code == 2 and "run/args.json: " in the_error(err)
    code, _, err = run_script(grpo, "--resume_from_checkpoint", "run")
    assert code == 2 and "run/args.json cannot be read" in the_error(err)


def test_no_escape_of_a_file_reaches_the_terminal(run_script, with_report, tmp_path):
    """Prompts, gold answers, difficulties, column names and model output, in training, its report, evaluation and errors."""
    escape = "\x1b]0;owned\x07\x1b[2J$\\frac$\x00\ud800"
    rows = [{"prompt": f"Q: {escape}", "answer": "3", "difficulty": escape}, {"prompt": "Q:", "answer": "3", "difficulty": "b"},
            {"prompt": "A:", "answer": "3", "difficulty": escape}, {"prompt": "x", "answer": "", "difficulty": escape}]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row).replace("\\ud800", "") + "\n" for row in rows))
    (tmp_path / "bad.jsonl").write_text(json.dumps({"a\x1b]0;owned\x07": 1}) + "\n")
    small = ("--dataset_name", "d.jsonl", "--max_completion_length", 8)
    code, out, err = run_script(grpo, *small, "--eval_dataset_name", "d.jsonl", "--max_steps", 2,
                                "--num_generations", 2, "--prompts_per_step", 2, "--output_dir", "run")
    assert code == 0 and "owned" in err and (tmp_path / "run" / "report.html").exists(), err
    printed = [out + err]
    for script, flags in ((eval_script, (*small, "--num_generations_eval", 2)), (grpo, ("--dataset_name", "bad.jsonl")),
                          (grpo, (*small, "--dry_run", "--system_prompt", escape[:-2]))):
        _, out, err = run_script(script, *flags)
        printed.append(out + err)
        assert "owned" in printed[-1]
    assert not any(re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", text) for text in printed)


def test_completions_with_any_text_can_be_written_and_read(tmp_path):
    text = "\ud800\x00\x1b[2J\u2028\n\u202e"
    sample = common.Sample({"prompt": text, "answer": text}, [], [], text, True, reward=math.nan)
    log = RunLog(tmp_path, grpo.Args(save_completions_steps=1))
    log.step({"step": 1, "loss": 0.0, "skipped_updates": 0, text: 1}, [sample], torch.tensor([0.0]))
    (line,) = (tmp_path / "completions" / "step-000001.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "prompt": text, "answer": text, "completion": text, "ended": True, "reward": None, "advantage": 0.0,
        "source": "rollout"}
    assert text in run_folder.read_metrics(tmp_path)[0]


def test_no_script_evaluates_what_a_file_holds():
    """No eval, exec or pickle, no shell, no torch.load of more than tensors; a file is run as code in one place, --reward_fn."""
    run_as_code = []
    for path in (file for folder in (".", "engine", "bench", "examples", "tiny_model") for file in (ROOT / folder).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name, keywords = ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                where = f"{path.name}:{node.lineno} {name}"
                assert name not in ("eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads"), where
                assert name != "torch.load" or keywords.get("weights_only") == "True", where
                assert "shell" not in keywords, where
                assert path.parent.name == "bench" or not name.startswith("Auto") or keywords.keys() & {"trust_remote_code", None}, where
                run_as_code += [path.name] * name.endswith("exec_module")
    assert run_as_code == ["grading.py"]
