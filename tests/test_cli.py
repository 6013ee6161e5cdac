"""Does every script run as a user runs it, leave what it promises, and refuse bad input in one line?"""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import eval as eval_script
import grpo
import luffy
import prefixrl
import repo
import sft
from engine import models, tasks

ROOT = Path(grpo.__file__).parent
SHORT = ("--task", "diary", "--max_steps", "2", "--eval_steps", "2", "--eval_problems", "4",
         "--prompts_per_step", "3", "--num_generations", "4", "--max_completion_length", "32")


def test_the_default_job_from_a_shell_leaves_what_the_readme_promises(tmp_path):
    """A real process in an empty folder with the hub off: progress, metrics, completions, curve, loadable model, code 0."""
    process = subprocess.run([sys.executable, ROOT / "grpo.py", *SHORT, "--temperature", "1.5"], cwd=tmp_path, capture_output=True,
                             text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert process.returncode == 0, process.stderr
    assert "training" in process.stderr and "2/2" in process.stderr and "eval/hard/avg@1" in process.stdout
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("grpo-diary-")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 1, 2]
    for key in ("reward", "reward_std", "frac_reward_zero_std", "completions/mean_length", "completions/clipped_ratio", "loss",
                "frac_rows_trained", "grad_norm", "learning_rate", "num_tokens", "step_time", "time/rollout", "time/update",
                "flops/rollout", "flops/train", "flops/total", "flops/paper", "eval/easy/avg@1", "eval/hard/pass@1_se",
                "eval/other/steps_right"):
        assert key in records[2], key
    for record in records[1:]:  # means over trained tokens exist where there is one: with this seed in the first step, not in the second
        of_tokens = {"entropy", "clip_ratio/low_mean", "clip_ratio/high_mean"}
        assert "kl" not in record  # there is no reference model to be away from
        assert of_tokens & record.keys() == (of_tokens if record["frac_rows_trained"] else set())
    assert records[2]["num_tokens"] > records[1]["num_tokens"] and records[2]["flops/total"] > records[1]["flops/total"]
    completions = [json.loads(line) for line in (run / "completions" / "step-000002.jsonl").read_text().splitlines()]
    assert len(completions) == 12 and set(completions[0]) == {
        "prompt", "answer", "completion", "ended", "reward", "advantage", "source", "tokens", "logps"}
    saved = json.loads((run / "args.json").read_text())
    assert saved["script"] == "grpo.py" and saved["args"]["learning_rate"] == 2e-4 and saved["versions"]["torch"] == torch.__version__
    AutoModelForCausalLM.from_pretrained(run)
    assert AutoTokenizer.from_pretrained(run).padding_side == "left"


def test_no_gradient_is_held_while_a_step_samples(run_script, monkeypatch):
    held, rollout = [], grpo.rollout
    monkeypatch.setattr(grpo, "rollout", lambda model, *rest: held.append(
        sum(parameter.grad is not None for parameter in model.parameters())) or rollout(model, *rest))
    assert run_script(grpo, *SHORT, "--eval_steps", 0, "--output_dir", "run")[0] == 0
    assert held == [0, 0]


def test_own_data_set_and_switches(run_script, tmp_path):
    """A user's jsonl with other column names, every loss switch away from its default, no evaluation set."""
    rows = tasks.problems("diary", "train", "easy", 6)
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps({"question": row["prompt"], "solution": row["answer"]}) + "\n" for row in rows))
    code, out, err = run_script(
        grpo, "--dataset_name", "mine.jsonl", "--max_steps", 2, "--prompts_per_step", 2, "--num_generations", 3,
        "--max_completion_length", 48, "--loss_type", "dr_grpo", "--scale_rewards", "none", "--epsilon_high", "inf", "--beta", 0.1,
        "--entropy_coef", 0.01, "--num_iterations", 2, "--mask_truncated_completions", "--no_drop_zero_variance", "--reward", "numeric",
        "--gradient_checkpointing", "--output_dir", "run", "--learning_rate", 1e-3, "--logging_steps", 2)
    assert code == 0, err
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [2]
    assert records[0]["kl"] > 0 and records[0]["frac_rows_trained"] == 1.0 and records[0]["reward/all"] == records[0]["reward"]
    assert json.loads((tmp_path / "run" / "args.json").read_text())["args"]["epsilon_high"] == "inf"


def test_a_tokenizer_without_pad_token_trains_the_same(run_script, tmp_path, tiny):
    """pad == eos: the same rewards, losses and weights as with a pad token of its own, since masks go by position."""
    model, tokenizer = tiny
    model.save_pretrained(tmp_path / "nopad")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "nopad")
    records = {}
    for name in ("tiny_model", "nopad"):
        code, _, err = run_script(grpo, *SHORT, "--model", name, "--learning_rate", 1e-3, "--num_hard", 0, "--temperature", 1.5,
                                  "--output_dir", f"run-{name}")
        assert code == 0, err
        lines = (tmp_path / f"run-{name}" / "metrics.jsonl").read_text().splitlines()
        records[name] = [{key: value for key, value in json.loads(line).items() if "time" not in key} for line in lines]
    assert AutoTokenizer.from_pretrained("nopad").pad_token is None
    assert AutoTokenizer.from_pretrained("run-nopad").pad_token == "<eos>"
    assert records["nopad"] == records["tiny_model"] and records["nopad"][1]["grad_norm"] > 0


def test_eval_prints_a_table_and_writes_json(run_script, tmp_path):
    flags = ("--task", "diary", "--eval_problems", 6, "--num_generations_eval", 4, "--output_file", "e.json")
    code, out, err = run_script(eval_script, *flags)
    assert code == 0, err
    record = json.loads((tmp_path / "e.json").read_text())
    easy = record["summary"]["easy"]
    assert easy["problems"] == 6 and easy["pass@1"] == pytest.approx(easy["avg@4"])
    assert easy["pass@4"] >= easy["pass@2"] >= easy["pass@1"] > 0.7
    assert len(record["problems"]) == 18 and all(len(problem["completions"]) == 4 for problem in record["problems"])
    table = {line.split()[0]: line for line in out.splitlines() if line.split()[:1] in (["easy"], ["hard"], ["other"])}
    assert f"{easy['avg@4']:.3f} +- {easy['avg@4_se']:.3f}" in table["easy"]
    code, _, err = run_script(eval_script, *flags)
    assert code == 2 and "--output_file e.json exists already" in err


def test_eval_of_a_data_set(run_script, tmp_path):
    rows = tasks.problems("bills", "eval", "easy", 5)
    (tmp_path / "mine.csv").write_text("prompt,answer\n" + "".join(f"\"{row['prompt']}\",\"{row['answer']}\"\n" for row in rows))
    code, out, err = run_script(eval_script, "--dataset_name", "mine.csv", "--max_completion_length", 48, "--temperature", 0)
    assert code == 0, err
    assert "all               5" in out


@pytest.mark.parametrize("flags, expected", [
    (["--loss_type", "ppo"], "--loss_type: invalid choice: 'ppo'"),
    (["--no_such_flag"], "error: unknown flag --no_such_flag; --help lists them"),
    (["--"], "error: unknown flag --; --help lists them"),
    (["--num_gen", "4"], "error: unknown flag --num_gen; did you mean --num_generations?"),
    (["--max_stesp=4"], "error: unknown flag --max_stesp; did you mean --max_steps?"),
    (["--config", "x.yaml"], "error: --config is no flag: a config file stands first, as in python grpo.py FILE.yaml --seed 1"),
    (["--learning_rate", "-1e-5"], "--learning_rate must be above 0, got -1e-05"),
    (["--beta", "-.5"], "--beta must be at least 0, got -0.5"),
    (["--max-steps", "-inf"], "--max_steps: invalid int value: '-inf'"),
    (["--learning_rate", "fast"], "--learning_rate: invalid float value: 'fast'"),
    (["--learning_rate", "nan"], "--learning_rate: expected a number, got nan"),
    (["--model", "./nowhere"], "--model_name_or_path ./nowhere: no such folder"),
    (["--model", "no-such-org/no-such-model"], "--model_name_or_path no-such-org/no-such-model: "),
    (["--model", "emptydir"], "--model_name_or_path emptydir: "),
    (["--num_generations", "1"], "--num_generations 1 leaves no group to compare with"),
    (["--num_generations", "1", "--scale_rewards", "none"], "--num_generations 1 leaves no group to compare with"),
    (["--warmup_steps", "5"], "--warmup_steps needs --lr_scheduler_type constant_with_warmup, linear or cosine"),
    (["--eval_dataset_name", "mine.jsonl"], "--eval_dataset_name needs --dataset_name"),
    (["--dataset_config", "main"], "--dataset_config needs --dataset_name"),
    (["--dataset_name", "mine.jsonl", "--eval_dataset_config", "main"], "--eval_dataset_config needs --eval_dataset_name"),
    (["--num_generations", "0"], "--num_generations must be at least 1, got 0"),
    (["--max_completion_length", "0"], "--max_completion_length must be at least 1, got 0"),
    (["--temperature", "0"], "--temperature must be above 0, got 0.0"),
    (["--num_minibatches", "50"], "--num_minibatches must be at most --prompts_per_step (12), got 50"),
    (["--learning_rate", "inf"], "--learning_rate must be below inf, got inf"),
    *([] if torch.cuda.is_available() else [(["--logprob_impl", "triton"], "--logprob_impl: impl triton needs the package triton")]),
    (["--num_hard", "0", "--num_easy", "0"], "--num_hard 0 --num_easy 0: no problem is left"),
    (["--model", "gpt2"], "--model_name_or_path gpt2: no such folder; a hub id has an organisation"),
    (["--reward_fn", ""], "--reward_fn: expected a text, got an empty one"),
    (["--entropy_coef", "nan"], "--entropy_coef: expected a number, got nan"),
    (["--threads", "3000000000"], "--threads: expected a number below 2**31, got 3000000000"),
    (["--dataset_name", "lists.jsonl", "--dataset_split", "test"], "--dataset_split says nothing without a data set that has splits"),
    (["--reward", "exact", "--reward_fn", "mine.py:f"], "--reward says nothing with --reward_fn"),
    (["--num-hard", "4", "--dataset_name", "lists.jsonl"], "--num_hard is a flag of the built-in task"),
    (["--output_dir", "used"], "--output_dir used is in use: choose another"),
    (["--output_dir", "run"], "--output_dir run is in use: choose another, or go on with --resume_from_checkpoint run"),
    (["--output_dir", "notes.txt"], "--output_dir notes.txt is a file: expected a folder"),
    (["--dataset_name", "lists.jsonl"], "1 rows whose answer is missing or of another type, e.g. row 1: [1]; expected a text or a number"),
    (["--dataset_name", "missing.jsonl"], "--dataset_name missing.jsonl: no such file"),
    (["--dataset_name", "empty.jsonl"], "--dataset_name empty.jsonl: the data set is empty"),
    (["--dataset_name", "columns.jsonl"], "needs a column prompt or problem or question, found text, gold"),
    (["--dataset_name", "broken.jsonl"], "--dataset_name broken.jsonl, line 1: expected JSON: "),
    (["--dataset_name", "notes.txt"], "expected a file ending in .jsonl, .json, .csv, .parquet"),
    (["--template", "chat"], "--template chat: the tokenizer has no chat template"),
    (["--max_prompt_length", "3"], "no prompt is left of 768"),
])
def test_bad_input_is_one_line_and_code_2_and_touches_nothing(run_script, tmp_path, flags, expected):
    (tmp_path / "emptydir").mkdir()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "results.txt").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "args.json").write_text("{}")
    columns = '{"text": "a", "gold": "b"}\n'
    for name, text in {"empty.jsonl": "", "columns.jsonl": columns, "broken.jsonl": "{not json\n", "notes.txt": "hi",
                       "lists.jsonl": '{"prompt": "a", "answer": [1]}\n'}.items():
        (tmp_path / name).write_text(text)
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    code, out, err = run_script(grpo, *flags)
    assert code == 2
    assert err.strip().splitlines()[-1].startswith("grpo.py: error: ") and expected in err.strip().splitlines()[-1]
    assert "Traceback" not in err
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before
    assert (tmp_path / "used" / "results.txt").read_text() == "precious"


STAGES = ["model and data", "rollout", "loss", "optimization", "evaluation and output"]
FIRST = {luffy: "num_off_policy", repo: "reward_threshold", prefixrl: "prefix_min", sft: "traces"}  # flag of off-policy knowledge


@pytest.mark.parametrize("script", [grpo, luffy, repo, prefixrl, sft, eval_script], ids=lambda script: script.__name__)
def test_help_groups_every_flag_once_by_stage_with_its_default(run_script, script):
    code, out, _ = run_script(script, "--help")
    assert code == 0
    groups, fields = {}, script.Args.__dataclass_fields__
    for heading, flag in re.findall(r"^(?:(\w.*):|  --(\w+).*)$", out.split("options:")[1].split("\nCONFIG: ")[0], re.MULTILINE):
        if heading:
            assert heading not in groups
            groups[heading] = stage = []
        elif not flag.startswith("no_"):
            stage.append(flag)
    assert sorted(flag for stage in groups.values() for flag in stage) == sorted(fields)
    for stage in groups.values():  # the script's own flags come before inherited ones
        own = [flag in script.Args.__annotations__ for flag in stage]
        assert own == sorted(own, reverse=True)
    if script is eval_script:
        assert list(groups) == ["model and data", "rollout", "output", "collecting traces"]
        assert groups["collecting traces"][0] == "save_traces"
    else:
        knowledge = ["off-policy knowledge"] if script in FIRST else []
        assert list(groups) == [STAGES[0], *knowledge, STAGES[1], *STAGES[3 if script is sft else 2 :]]
        if knowledge:
            assert (groups[knowledge[0]][0], groups[knowledge[0]][-1]) == (FIRST[script], "keep_wrong_traces")
    words = " ".join(out.split())
    for name, field in fields.items():
        assert field.metadata["help"].split("%")[0] in words, name
        assert f"{field.metadata['help']} (default: {field.default})" in words, name
        if field.default is True:
            assert f"--no_{name} Turn off --{name}" in words
    assert "usage: python " in words and "[CONFIG] [--flag value ...]" in words


@pytest.fixture
def instruct(tmp_path, tiny):
    """The tiny model as an instruct model comes: a chat template, several EOS ids, sampling defaults, and a config at odds with itself."""
    model, tokenizer = tiny
    model.save_pretrained(tmp_path / "instruct")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "instruct")
    own = {"do_sample": False, "temperature": 0.6, "top_k": 50, "repetition_penalty": 1.1, "eos_token_id": [5, 7], "pad_token_id": 0}
    (tmp_path / "instruct" / "generation_config.json").write_text(json.dumps(own))
    return own


def test_the_run_folder_and_its_checkpoints_are_whole_model_folders(run_script, with_report, tmp_path, instruct):
    code, _, err = run_script(grpo, *SHORT, "--model", "instruct", "--save_steps", 2, "--output_dir", "run", "--weight_decay", 9)
    assert code == 0, err
    run = tmp_path / "run"
    assert {path.name for path in run.iterdir()} == {
        ".lock", "args.json", "metrics.jsonl", "completions", "report.html", "checkpoint-2", "config.json",
        "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    before, prompt = AutoModelForCausalLM.from_pretrained("instruct"), torch.tensor([[5, 6, 7]])
    for folder in (run, run / "checkpoint-2"):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        assert not torch.equal(model(prompt).logits, before(prompt).logits) and model.dtype == torch.float32
        assert tokenizer.chat_template == AutoTokenizer.from_pretrained("instruct").chat_template and tokenizer.padding_side == "left"
        saved = json.loads((folder / "generation_config.json").read_text())
        assert {name: saved.get(name, False) for name in instruct} == instruct | {"eos_token_id": [1, 5, 7]}  # 1: the tokenizer's
        assert model.generation_config.eos_token_id == models.eos_ids(model, tokenizer) == [1, 5, 7]


def test_an_ordinary_token_that_ends_completions_is_told(run_script, instruct, tiny):
    """The class of a config has its own default, such as 2, whatever the tokenizer."""
    models.print_once.cache_clear()
    code, out, err = run_script(grpo, *SHORT, "--model", "instruct", "--dry_run")
    assert code == 0, err
    for index in (5, 7):
        assert f"warning: an ordinary token, {tiny[1].convert_ids_to_tokens(index)!r}, ends completions" in out
    models.print_once.cache_clear()
    assert "an ordinary token" not in run_script(grpo, *SHORT, "--dry_run")[1]


def digests(run_script, tmp_path, name, *flags, script=grpo):
    code, _, err = run_script(script, *SHORT[2:], "--eval_steps", 0, "--max_steps", 1, "--save_steps", 1, *flags, "--output_dir", name)
    assert code == 0, err
    return json.loads((tmp_path / name / "args.json").read_text())


def test_args_json_tells_data_model_and_code(run_script, tmp_path):
    """The record of a run: equal for equal data and model, another for another; kept when the run is resumed from other weights."""
    rows = [{"prompt": row["prompt"], "answer": row["answer"]} for row in tasks.problems("diary", "train", "easy", 4)]

    def write(name, rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("a.jsonl", rows)
    write("b.jsonl", [row | {"comment": "of no matter"} for row in rows])
    write("c.jsonl", [rows[0] | {"answer": "77"}, *rows[1:]])
    flags = ("--max_completion_length", 8, "--weight_decay", 9)  # which changes weights without a signal, too
    a, b, c = (digests(run_script, tmp_path, name, "--dataset_name", f"{name}.jsonl", *flags) for name in "abc")
    assert list(a) == ["script", "args", "defaults", "ranks", "versions", "git_commit", "run_id", "base_model", "data"]
    assert list(a["versions"]) == ["python", "torch", "transformers", "datasets", "numpy"]
    assert a["versions"]["datasets"] == datasets.__version__
    assert a["data"]["train"]["rows"] == 4 and a["data"]["eval"]["rows"] == 0 and len(a["data"]["train"]["sha256"]) == 64
    assert a["data"] == b["data"] != c["data"] and a["base_model"] == b["base_model"] and a["run_id"] != b["run_id"]
    assert a["base_model"]["parameters"] == models.load_model("tiny_model")[0].num_parameters()
    code, out, _ = run_script(grpo, "--resume_from_checkpoint", "a", "--max_steps", 2)
    resumed = json.loads((tmp_path / "a" / "args.json").read_text())
    kept = a.keys() - {"args", "defaults"}
    assert code == 0 and {name: resumed[name] for name in kept} == {name: a[name] for name in kept}
    assert "not those that" not in out
    assert digests(run_script, tmp_path, "d", "--dataset_name", "a.jsonl", "--model", "a", *flags)["base_model"] != a["base_model"]
    code, _, err = run_script(grpo, "--resume_from_checkpoint", "a", "--model", "d", "--beta", 0.1, "--max_steps", 3)
    assert code == 2 and err.endswith("d: its weights are not those that a began with, and training reads them, too\n")
    (tmp_path / "c.jsonl").rename(tmp_path / "a.jsonl")
    code, out, _ = run_script(grpo, "--resume_from_checkpoint", "a", "--model", "d", "--max_steps", 3)
    assert code == 0 and "the training rows are not those that a has had so far" in out
    assert "d: its weights are not those that a began with; those of the checkpoint go on\n" in out


def test_an_empty_file_of_traces_says_so(refused, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    assert refused(repo, "--traces", "empty.jsonl").endswith("--traces empty.jsonl: expected rows with prompt and trace, found none")


def test_a_run_that_is_resumed_with_another_model_says_so(run_script, tmp_path, tiny):
    assert run_script(grpo, *SHORT, "--eval_steps", 0, "--save_steps", 1, "--output_dir", "run")[0] == 0
    config = tiny[0].config
    config.hidden_size, config.intermediate_size = config.hidden_size // 2, config.intermediate_size // 2
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
    tiny[1].save_pretrained(tmp_path / "other")
    code, _, err = run_script(grpo, "--resume_from_checkpoint", "run", "--max_steps", 3, "--model", "other")
    assert code == 2 and err.splitlines()[-1] == ("grpo.py: error: --resume_from_checkpoint run/checkpoint-2 does not fit: its weights are "
                                                  "those of another model than --model_name_or_path")


def test_the_self_check_warns_when_no_completion_ends(run_script):
    short = (*SHORT[:2], "--max_steps", 1, "--eval_steps", 0)
    for length, said in ((4, "warning: all would be cut off: 0 of 8 completions end within 4"), (64, "self-check: 8 of 8 completions")):
        _, out, _ = run_script(grpo, *short, "--max_completion_length", length, "--output_dir", length)
        assert f"\n{said}" in out and "\n1 steps of 12 prompts; no evaluation, as none was asked for; no signal: " in out


def test_greedy_evaluation_draws_one_sample_and_warns_of_nothing(run_script, tmp_path):
    code, out, err = run_script(eval_script, "--task", "diary", "--eval_problems", 2, "--temperature", 0, "--output_file", "e.json")
    assert code == 0 and out.startswith("--temperature 0: one sample of each problem") and "[transformers]" not in err
    assert {len(problem["completions"]) for problem in json.loads((tmp_path / "e.json").read_text())["problems"]} == {1}


def test_a_small_model_has_one_thread_unless_another_number_is_given(monkeypatch, capsys, tiny):
    """Two threads take 3 to 10 times as long as one for a step of tiny_model where other processes use the cores, too."""
    for variable, size, given, expected in ((None, 10**7, None, 1), (None, 10**7, 3, 3), ("2", 10**7, None, 2), (None, 10, None, 2)):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if variable:
            monkeypatch.setenv("OMP_NUM_THREADS", variable)
        monkeypatch.setattr(models, "SMALL", size)
        torch.set_num_threads(2)
        try:
            models.set_threads(tiny[0], given)
            assert torch.get_num_threads() == expected
        finally:
            torch.set_num_threads(1)
        assert ("1 CPU thread of 2: the model is small" in capsys.readouterr().out) == (expected == 1)


@pytest.mark.parametrize("script", [grpo, luffy, repo, prefixrl, sft, eval_script], ids=lambda script: script.__name__)
def test_importing_a_script_does_nothing(tmp_path, monkeypatch, script):
    """The core is importable: no run folder, no seed, no thread setting changes at import."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(5)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    runpy.run_path(script.__file__)
    assert torch.equal(before, torch.get_rng_state()) and threads == torch.get_num_threads() and not list(tmp_path.iterdir())
