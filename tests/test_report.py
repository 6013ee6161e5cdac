"""Do tensorboard, wandb and trackio get exactly what metrics.jsonl gets, also over a resume and when a run dies?"""

import importlib.util
import json
import shutil
import struct
import sys
from pathlib import Path

import pytest

import engine
import grpo
import processes
from engine import reporters

ROOT = Path(grpo.__file__).parent
SHORT = ("--task", "diary", "--max_steps", "2", "--eval_steps", "1", "--eval_problems", "4", "--prompts_per_step", "3",
         "--num_generations", "4", "--num_hard", "8", "--num_easy", "8", "--max_completion_length", "24")


def needs(package):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed: pip install {package}")


def records(folder):
    """The lines of metrics.jsonl without their nulls, {step: {metric: value}}."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line.pop("step"): {name: value for name, value in line.items() if value is not None} for line in lines}


def tensorboard_record(folder):
    """{step: {metric: value}} and the flags of the latest session, as TensorBoard's own reader sees them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}, purge_orphaned_data=True).Reload()
    found = {}
    for metric in events.Tags()["scalars"]:
        for event in events.Scalars(metric):
            assert metric not in found.setdefault(event.step, {}), (metric, event.step)
            found[event.step][metric] = event.value
    content = HParamsPluginData.FromString(events.PluginTagToContent("hparams")["_hparams_/session_start_info"])
    flags = {name: getattr(value, value.WhichOneof("kind")) for name, value in content.session_start_info.hparams.items()}
    return found, flags


def wandb_record(file):
    """({step: {metric: value}}, config, id, exit code) of a .wandb file, in leveldb's log format: blocks of 32 KiB, headers of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, place, part, found, config, run_id, code = file.read_bytes(), 7, b"", {}, {}, None, None
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        part += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind not in (1, 4):  # whole, or the last part
            continue
        record, part = wandb_internal_pb2.Record.FromString(part), b""
        if record.HasField("history"):
            items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            found[record.history.step.num] = {name: value for name, value in items.items() if not name.startswith("_")}
        elif record.HasField("run"):
            run_id = record.run.run_id
            config = {item.key: json.loads(item.value_json) for item in record.run.config.update if item.key != "_wandb"}
        elif record.HasField("exit"):
            code = record.exit.exit_code
    return found, config, run_id, code


def saved_args(folder):
    return json.loads((folder / "args.json").read_text())


@needs("tensorboard")
def test_tensorboard_has_the_records_and_a_resumed_run_goes_on_in_them(run_script, tmp_path):
    """The third step, which a run wrote before it died, is written again; TensorBoard shows it once, and one record."""
    folder = tmp_path / "run"
    code, _, err = run_script(grpo, *SHORT, "--output_dir", "run", "--report_to", "tensorboard", "--save_steps", 2, "--max_steps", 3)
    assert code == 0, err
    for flags in ((), ("--resume_from_checkpoint", "run/checkpoint-2", "--max_steps", 4, "--temperature", 0.9)):
        if flags:
            shutil.rmtree(folder / "checkpoint-3")
            code, _, err = run_script(grpo, *flags)
            assert code == 0, err
        found, shown = tensorboard_record(folder)
        assert found.keys() == set(range(5 if flags else 4))
        for step, values in records(folder).items():
            assert found[step] == {name: pytest.approx(value, rel=1e-6) for name, value in values.items()}, step
    first = saved_args(folder)["args"] | {"max_steps": 3, "temperature": 1.0}
    assert shown == {name: value for name, value in first.items() if value is not None}  # of the session that began the record


@needs("tensorboard")
def test_tensorboard_takes_a_list_of_layers(tmp_path):
    (tmp_path / "args.json").write_text(json.dumps({"args": {"lora_targets": ["q_proj"]}, "run_id": "12345678"}))
    log, close = reporters.open_reporter("tensorboard", tmp_path, None)
    log({"loss": 1.0}, 1)
    close(0)
    assert tensorboard_record(tmp_path)[1] == {"lora_targets": "['q_proj']"}


@needs("tensorboard")
@pytest.mark.parametrize("error, code", [(KeyboardInterrupt, 130), (engine.RunError, 1)])
def test_the_reporter_is_closed_once_however_the_run_ends(run_script, tmp_path, monkeypatch, error, code):
    from torch.utils.tensorboard import SummaryWriter

    closed, close = [], SummaryWriter.close
    monkeypatch.setattr(SummaryWriter, "close", lambda writer: closed.append(close(writer)))
    flags = (*SHORT, "--eval_steps", 0, "--report_to", "tensorboard")
    assert run_script(grpo, *flags, "--output_dir", "whole", "--max_steps", 1)[0] == 0 and len(closed) == 1
    updates, update = [], grpo.update

    def dies(*inputs):
        updates.append(0)
        if len(updates) == 2:
            raise error
        return update(*inputs)

    monkeypatch.setattr(grpo, "update", dies)
    assert run_script(grpo, *flags, "--output_dir", "dead")[0] == code and len(closed) == 2
    assert tensorboard_record(tmp_path / "dead")[0].keys() == records(tmp_path / "dead").keys() == {1}


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Sending needs a network; what is tested here is what would be sent."""
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # which trackio reads when it is imported


@needs("wandb")
def test_wandb_has_the_records_and_a_resumed_run_its_id(run_script, tmp_path, offline):
    import wandb

    folder = tmp_path / "run"
    code, _, err = run_script(grpo, *SHORT, "--output_dir", "run", "--report_to", "wandb", "--save_steps", 1)
    wandb.teardown()  # as the end of a process does: its writer is a process of its own
    assert code == 0, err
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    found, config, run_id, status = wandb_record(file)
    assert found == records(folder) and found.keys() == {0, 1, 2} and status == 0
    assert config == saved_args(folder)["args"] and run_id == saved_args(folder)["run_id"]
    code, _, err = run_script(grpo, "--resume_from_checkpoint", "run", "--max_steps", 3)
    wandb.teardown()
    assert code == 0, err
    (later,) = set(folder.glob("wandb/offline-run-*/run-*.wandb")) - {file}
    found, _, resumed_id, status = wandb_record(later)
    assert resumed_id == run_id == saved_args(folder)["run_id"] and found == {3: records(folder)[3]} and status == 0


@needs("wandb")
def test_wandb_is_told_that_a_run_has_died(tmp_path, offline):
    """A real process, with an error that nobody expects: what was logged is there, and the exit code."""
    (tmp_path / "dies.py").write_text("import engine, grpo\ngrpo.update = lambda *_: 1 / 0\nengine.launch(grpo.main)\n")
    process = processes.run(tmp_path / "dies.py", *SHORT, "--output_dir", "run", "--report_to", "wandb", cwd=tmp_path)
    assert process.returncode == 1 and "ZeroDivisionError" in process.stderr, process.stderr
    (file,) = (tmp_path / "run").glob("wandb/offline-run-*/run-*.wandb")
    history, _, _, status = wandb_record(file)
    assert history == records(tmp_path / "run") and history.keys() == {0} and status == 1


@needs("trackio")
def test_trackio_has_the_records_and_a_resumed_run_goes_on_in_them(run_script, tmp_path, offline):
    code, _, err = run_script(grpo, *SHORT, "--output_dir", "runs/mine", "--report_to", "trackio", "--save_steps", 1)
    assert code == 0, err
    code, _, err = run_script(grpo, "--resume_from_checkpoint", "runs/mine", "--max_steps", 3)
    assert code == 0, err
    from trackio.sqlite_storage import SQLiteStorage

    folder = tmp_path / "runs" / "mine"
    (name,) = SQLiteStorage.get_runs("runs")
    logs = [{key: value for key, value in line.items() if key != "timestamp"} for line in SQLiteStorage.get_logs("runs", name)]
    assert {line.pop("step"): line for line in logs} == records(folder) and len(logs) == 4
    config = SQLiteStorage.get_run_config("runs", name)
    assert name == f"mine-{saved_args(folder)['run_id'][:8]}" and config["num_generations"] == 4 and config["temperature"] == 1.0
    assert (tmp_path / "trackio").is_dir()


@needs("tensorboard")
def test_a_reporter_changes_no_number_and_none_is_imported_unasked(run_script, tmp_path, monkeypatch):
    assert run_script(grpo, *SHORT, "--output_dir", "tensorboard", "--report_to", "tensorboard")[0] == 0
    for name in ("torch.utils.tensorboard", "tensorboard", "wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, None)
    code, _, err = run_script(grpo, *SHORT, "--output_dir", "none")
    assert code == 0, err
    first, second = ({step: {name: value for name, value in values.items() if "time" not in name}
                      for step, values in records(tmp_path / folder).items()} for folder in ("none", "tensorboard"))
    assert first == second
    assert not list((tmp_path / "none").glob("events*"))


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_is_one_line_before_the_model_loads(run_script, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(engine, "load_policy", lambda *_: pytest.fail("the model was loaded"))
    code, _, err = run_script(grpo, "--report_to", name)
    assert code == 2 and err == f"grpo.py: error: --report_to {name} needs the package {name}: pip install {name}\n"
    assert list(tmp_path.iterdir()) == []


@needs("tensorboard")
def test_a_reporter_that_does_not_start_is_one_line(run_script, tmp_path, monkeypatch):
    import torch.utils.tensorboard

    def refuse(*_, **__):
        raise PermissionError("no login\nhere")

    monkeypatch.setattr(torch.utils.tensorboard, "SummaryWriter", refuse)
    code, _, err = run_script(grpo, *SHORT, "--report_to", "tensorboard")
    assert code == 1 and err == "grpo.py: error: --report_to tensorboard: PermissionError: no login\n"
