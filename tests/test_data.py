"""Are people's data sets read as they mean them?"""

import json
import shutil
import socket

import datasets
import huggingface_hub
import pytest

import common
import engine
import grpo
import luffy
import sft
from engine import data, models, tasks

USER, SYSTEM = {"role": "user", "content": "1 + 1 ?"}, {"role": "system", "content": "Think."}
TOLD = {"role": "assistant", "content": "\\boxed{2}"}
EASY = tasks.problems("diary", "train", "easy", 4)
SHORT = ("--max_steps", 1, "--prompts_per_step", 2, "--max_completion_length", 64, "--output_dir", "run")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def parquet(path, rows):
    datasets.Dataset.from_list(rows).to_parquet(path)
    return str(path)


@pytest.mark.parametrize("value, gold", [
    ("42", "42"), (" x^2 ", "x^2"), (42, "42"), (0.5, "0.5"), (3.0, "3"), (True, "True"), ("1,234", "1,234"),
    ("He sells 48 / 2 = <<48/2=24>>24.\n#### 1,024", "1024"), ("#### 7 is wrong\n#### -3\n", "-3"), ("so\n####5", "5"),
    ("First \\boxed{1}, then \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"), ("#### Step 2\nso \\boxed{9}", "9"),
    ("#### Step 1\nwe add\nand 4", "#### Step 1\nwe add\nand 4"),
    ({"ground_truth": "6", "style": "rule"}, "6"), ({"ground_truth": "\\boxed{6}"}, "6"), ({"ground_truth": 6}, "6"),
    (None, None), ("", None), (" \n", None), (float("nan"), None), (float("inf"), None), (["42"], None),
    ({"style": "rule"}, None), ({"ground_truth": ["6"]}, None), ("never closed \\boxed{4", None), ("\\boxed{}", None), ("so ####", None),
])
def test_gold(value, gold):
    assert data.read_gold(value) == gold


@pytest.mark.parametrize("value, messages", [
    ("1 + 1 ?", [USER]), ([USER], [USER]), ([SYSTEM, USER], [SYSTEM, USER]), ([USER, TOLD, USER], [USER, TOLD, USER]),
    ([USER | {"name": None}], [USER]),  # a column's struct has the keys of every row
    (None, None), ("", None), (" \n", None), (7, None), ([], None), ([USER, TOLD], None), ([SYSTEM], None), ([USER, SYSTEM, USER], None),
    (["1 + 1 ?"], None), ([{"role": "user", "content": None}], None), ([{"role": "user", "content": [{"type": "image"}]}], None),
    ([{"role": "tool", "content": "x"}, USER], None), ([{"content": "x"}], None), ({"role": "user", "content": "x"}, None),
])
def test_prompts(value, messages):
    assert data.read_prompt(value) == messages


@pytest.mark.parametrize("value, trace", [
    ("so \\boxed{2}", "so \\boxed{2}"), ([TOLD], "\\boxed{2}"), ([USER, TOLD], "\\boxed{2}"),
    (None, None), ("", None), (3, None), ([], None), ([USER], None), ([TOLD, USER, TOLD], None), ([{"content": "x"}], None),
])
def test_traces(value, trace):
    assert data.read_trace(value) == trace


@pytest.mark.parametrize("record", [
    {"prompt": "1 + 1 ?", "answer": "2", "trace": "\\boxed{2}"},
    {"problem": "1 + 1 ?", "solution": "one more: \\boxed{2}", "generation": "\\boxed{2}"},
    {"question": "1 + 1 ?", "answer": "1+1=<<1+1=2>>2\n#### 2", "completion": [TOLD]},
    {"prompt": [USER], "ground_truth": 2, "completion": "\\boxed{2}"},
    {"data_source": "x", "prompt": [SYSTEM, USER], "target": [TOLD], "ability": "math", "extra_info": {"index": 0},
     "reward_model": {"ground_truth": "2", "style": "rule"}},
], ids=["ours", "MATH", "GSM8K", "TRL", "LUFFY"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_one_row_of_each_schema(tmp_path, monkeypatch, record, kind):
    """The same question, gold and trace of every schema and file type, with the hub on and every connection refused."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a local file reached for the network"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("a local file reached for the network"))
    path = tmp_path / f"data.{kind}"
    if kind == "parquet":
        parquet(path, [record])
    else:
        path.write_text(json.dumps([record] if kind == "json" else record))
    (row,) = data.read_problems(str(path), "train", "--dataset_name", traces=True)
    assert (row["prompt"], row["answer"], row["trace"], row["difficulty"]) == ("1 + 1 ?", "2", "\\boxed{2}", "all")
    system = [SYSTEM] if "data_source" in record else []
    assert row.get("prompt_messages") == (None if isinstance(next(iter(record.values())), str) and not system else [*system, USER])


def test_a_csv_with_gaps(tmp_path, capsys):
    (tmp_path / "data.csv").write_text("question,answer\n1 + 1 ?,2\n1 + 2 ?,\n,4\n2 + 3 ?,5\n")
    rows = data.read_problems(str(tmp_path / "data.csv"), "train", "--dataset_name")
    assert [(row["prompt"], row["answer"]) for row in rows] == [("1 + 1 ?", "2"), ("2 + 3 ?", "5")]
    assert capsys.readouterr().out == (
        "--dataset_name: dropped 1 of 4 rows whose question is missing or of another type, e.g. row 3\n"
        "--dataset_name: dropped 1 of 4 rows whose answer is missing or of another type, e.g. row 2\n")


def test_rows_that_cannot_be_read_are_counted_and_a_bad_trace_is_no_trace(tmp_path, capsys):
    path = write(tmp_path / "d.jsonl", [
        {"prompt": "a", "answer": "1", "trace": "\\boxed{1}"}, {"prompt": 5, "answer": "1", "trace": None},
        {"prompt": "c", "answer": ["1"], "trace": None}, {"prompt": [TOLD], "answer": "1", "trace": None},
        {"prompt": "e", "answer": "1", "trace": 7}, {"prompt": "f", "answer": "1", "trace": None}, {"answer": "1"}])
    rows = data.read_problems(path, "train", "--dataset_name", traces=True)
    assert [(row["prompt"], row["trace"]) for row in rows] == [("a", "\\boxed{1}"), ("e", None), ("f", None)]
    assert capsys.readouterr().out == (
        "--dataset_name: dropped 3 of 7 rows whose prompt is missing or of another type, e.g. row 2\n"
        "--dataset_name: dropped 1 of 7 rows whose answer is missing or of another type, e.g. row 3\n"
        "--dataset_name: no trace in 1 of 7 rows whose trace is missing or of another type, e.g. row 5\n")
    assert [row["trace"] for row in data.read_problems(path, "train", "--dataset_name")][1] == 7  # no business of a script without traces


def test_the_reward_function_sees_the_question_and_the_columns_but_no_messages(tiny):
    args = grpo.Args(dataset_name="mine.jsonl")
    row = {"prompt": "1 + 1 ?", "prompt_messages": [SYSTEM, USER], "answer": "2", "difficulty": "all", "source": "x"}
    (encoded,) = common.encode_problems([row], tiny[1], args)
    assert encoded["columns"] == {"answer": "2", "difficulty": "all", "source": "x"}
    assert encoded["prompt_ids"] == tiny[1]("Think.\n1 + 1 ?")["input_ids"]


def test_configuration_and_split_reach_the_hub_and_are_refused_for_a_file(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **more: asked.append((names, more)) or [{"prompt": "a", "answer": "1"}])
    args = grpo.Args(dataset_name="openai/gsm8k", dataset_config="main", eval_dataset_name="openai/gsm8k", eval_dataset_config="socratic",
                     template="none")
    common.load_problems(args, models.load_model("tiny_model")[1])
    assert asked == [(("openai/gsm8k", "main"), {"split": "train"}), (("openai/gsm8k", "socratic"), {"split": "test"})]
    path = write(tmp_path / "d.jsonl", [{"prompt": "a", "answer": "1"}])
    with pytest.raises(engine.BadArgument, match="--eval_dataset_config main: .*d.jsonl is a local file, which has no configurations"):
        data.read_dataset(path, "test", "--eval_dataset_name", "main")


CHAT = "{{ bos_token }}{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}" \
       "{% if add_generation_prompt %}<assistant>{% endif %}"
QWEN_START = "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
QWEN = "<|im_start|>user\n1 + 1 ?<|im_end|>\n<|im_start|>assistant\n"
R1 = "User: 1 + 1 ?\nAssistant: <think>"


@pytest.mark.parametrize("template, prompt, system_prompt, without, with_chat", [
    ("auto", "1 + 1 ?", None, "1 + 1 ?", "<s><user> 1 + 1 ? <assistant>"),
    ("auto", "1 + 1 ?", "Be brief.", "Be brief.\n1 + 1 ?", "<s><system> Be brief. <user> 1 + 1 ? <assistant>"),
    ("auto", [SYSTEM, USER], "Be brief.", "Think.\n1 + 1 ?", "<s><system> Think. <user> 1 + 1 ? <assistant>"),
    ("auto", [USER, TOLD, USER], None, "1 + 1 ?\n\\boxed{2}\n1 + 1 ?",
     "<s><user> 1 + 1 ? <assistant> \\boxed{2} <user> 1 + 1 ? <assistant>"),
    ("chat", "1 + 1 ?", None, None, "<s><user> 1 + 1 ? <assistant>"),
    ("none", [SYSTEM, USER], None, "Think.\n1 + 1 ?", "Think.\n1 + 1 ?"),
    ("r1", "1 + 1 ?", None, common.INSTRUCTIONS["r1"] + "\n" + R1, common.INSTRUCTIONS["r1"] + "\n" + R1),
    ("r1", [SYSTEM, USER], None, "Think.\n" + R1, "Think.\n" + R1),
    ("r1", [USER, TOLD, USER], "Be brief.", "Be brief.\nUser: 1 + 1 ?\nAssistant: \\boxed{2}\n" + R1,
     "Be brief.\nUser: 1 + 1 ?\nAssistant: \\boxed{2}\n" + R1),
    ("qwen_math", "1 + 1 ?", None, QWEN_START + QWEN, QWEN_START + QWEN),
    ("qwen_math", [SYSTEM, USER], "Be brief.", "<|im_start|>system\nThink.<|im_end|>\n" + QWEN,
     "<|im_start|>system\nThink.<|im_end|>\n" + QWEN),
])
def test_each_template_with_and_without_a_chat_template_and_bos_exactly_once(byte_tokenizer, template, prompt, system_prompt,
                                                                             without, with_chat):
    """The text to the letter; and BOS once, whether the template writes it, the tokenizer adds it, or both."""
    for chat_template, expected in ((None, without), (CHAT, with_chat)):
        byte_tokenizer.chat_template = chat_template
        if expected is None:
            with pytest.raises(engine.BadArgument, match="--template chat: the tokenizer has no chat template"):
                common.render_prompt(byte_tokenizer, prompt, template, system_prompt)
            continue
        text = common.render_prompt(byte_tokenizer, prompt, template, system_prompt)
        assert text == expected
        ids, bos = common.encode_prompt(byte_tokenizer, text), byte_tokenizer.bos_token_id
        assert ids.count(bos) == 1 and ids[0] == bos
        assert byte_tokenizer.decode(ids[1:]) == expected.removeprefix("<s>")


def test_the_r1_instruction_names_the_format():
    for part in ("User", "Assistant", "<think>", "</think>", "<answer>", "</answer>", "\\boxed{}"):
        assert part in common.INSTRUCTIONS["r1"]


def test_a_chat_template_that_refuses_is_one_line(byte_tokenizer):
    byte_tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}x"
    with pytest.raises(engine.BadArgument, match="the chat template refuses messages of system, user: no system role; use another"):
        common.render_prompt(byte_tokenizer, "a", "chat", "Be brief.")


def test_traces_in_a_file_are_found_by_the_question(tiny, tmp_path):
    """A trace file of messages, for data whose prompts carry a system message."""
    row = EASY[0]
    messages, told = [SYSTEM, {"role": "user", "content": row["prompt"]}], [{"role": "assistant", "content": row["own_trace"]}]
    path = write(tmp_path / "t.jsonl", [{"prompt": messages[1:], "trace": told}, {"prompt": None, "trace": "x"}])
    file = write(tmp_path / "d.jsonl", [{"prompt": messages, "answer": row["answer"]}])
    args = luffy.Args(dataset_name=file, traces=path, template="none")
    (loaded,), _ = common.load_problems(args, tiny[1])
    assert loaded["trace"] == row["own_trace"] and loaded["prompt"] == row["prompt"]


# The commands of the README's "Run it on your model and data", on files of these schemas.
@pytest.mark.parametrize("script, flags, rows, kind", [
    (grpo, ("--reward", "numeric"), [{"problem": row["prompt"], "answer": row["answer"]} for row in EASY], "jsonl"),
    (grpo, ("--template", "qwen_math", "--eval_dataset_name", "data.parquet", "--eval_steps", 1),
     [{"question": row["prompt"], "answer": f"{row['own_trace'].split(';')[0]}\n#### {row['answer']}"} for row in EASY], "parquet"),
    (luffy, (),
     [{"data_source": "x", "prompt": [SYSTEM, {"role": "user", "content": row["prompt"]}], "ability": "math",
       "target": [{"role": "assistant", "content": row["teacher_trace"]}], "extra_info": {"index": 0, "split": "train"},
       "reward_model": {"ground_truth": row["answer"], "style": "rule"}} for row in EASY], "parquet"),
], ids=["own", "GSM8K", "LUFFY"])
def test_a_step_of_training_on_each_schema(run_script, tmp_path, script, flags, rows, kind):
    {"jsonl": write, "parquet": parquet}[kind](tmp_path / f"data.{kind}", rows)
    code, out, err = run_script(script, "--dataset_name", f"data.{kind}", *flags, *SHORT)
    assert code == 0, err
    assert "self-check: 4 gold answers grade right" in out and "dropped" not in out
    if script is luffy:
        assert "traces: 4 of 4 problems have one" in out
    (record,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][-1:]
    assert record["step"] == 1 and record["num_tokens"] > 0 and ("eval/all/avg@1" in record) == ("--eval_dataset_name" in flags)


@pytest.mark.parametrize("script, flags, expected", [
    (grpo, ["--dataset_name", "missing.parquet"], "--dataset_name missing.parquet: no such file"),
    (grpo, ["--dataset_name", "columns.jsonl"], "needs a column prompt or problem or question, found text, gold"),
    (grpo, ["--dataset_name", "prompts.jsonl"], "needs a column answer or solution or ground_truth or reward_model, found prompt, label"),
    (grpo, ["--dataset_name", "nogold.jsonl"], "--dataset_name nogold.jsonl: no row is left: dropped 2 of 2 rows whose answer is missing "
                                               "or of another type, e.g. row 1"),
    (grpo, ["--dataset_name", "good.jsonl", "--max_prompt_length", "2"], "--dataset_name: no prompt is left of 4"),
    (grpo, ["--dataset_name", "good.jsonl", "--eval_dataset_name", "nogold.jsonl"], "--eval_dataset_name nogold.jsonl: no row is left"),
    (grpo, ["--dataset_name", "good.jsonl", "--reward", "choice"], "--dataset_name: no prompt is left of 4"),
    (grpo, ["--dataset_name", "good.jsonl", "--dataset_config", "main"], "--dataset_config main: good.jsonl is a local file"),
    (grpo, ["--model", "untold"], "--model_name_or_path untold: the folder holds a model without its tokenizer: "),
    (grpo, ["--template", "llama"], "--template: invalid choice: 'llama'"),
    (sft, ["--dataset_name", "good.jsonl", "--traces", "other.jsonl"],
     "--traces other.jsonl: none of its 1 prompts is one of the 4 training prompts: it is of another data set"),
    (sft, ["--dataset_name", "badtrace.jsonl"], "no trace is left of badtrace.jsonl"),
])
def test_bad_input_is_one_line_and_code_2(run_script, tmp_path, script, flags, expected):
    good = [{"prompt": row["prompt"], "answer": row["answer"]} for row in EASY]
    write(tmp_path / "good.jsonl", good)
    write(tmp_path / "badtrace.jsonl", [row | {"trace": 7} for row in good])
    write(tmp_path / "columns.jsonl", [{"text": "a", "gold": "b"}])
    write(tmp_path / "prompts.jsonl", [{"prompt": "a", "label": "b"}])
    write(tmp_path / "nogold.jsonl", [{"prompt": "a", "answer": None}, {"prompt": "b", "answer": None}])
    write(tmp_path / "other.jsonl", [{"prompt": "another", "trace": "\\boxed{1}"}])
    shutil.copytree(tasks.TINY_MODEL, tmp_path / "untold", ignore=shutil.ignore_patterns("*token*"))
    before = sorted(tmp_path.rglob("*"))
    code, _, err = run_script(script, *flags)
    assert code == 2 and "Traceback" not in err
    assert err.strip().splitlines()[-1].startswith(f"{script.__name__}.py: error: ") and expected in err.strip().splitlines()[-1]
    assert sorted(tmp_path.rglob("*")) == before


def test_the_digest_of_the_rows_is_of_what_is_trained_on():
    """Prompt, gold, trace and order count; another column does not."""
    rows = [{"prompt_ids": [1, 2], "answer": "3", "trace_ids": [4, 5]}, {"prompt_ids": [6], "answer": "7", "trace_ids": None}]
    digest = data.problems_digest(rows)
    assert digest["rows"] == 2 and data.problems_digest([row | {"difficulty": "hard"} for row in rows]) == digest
    changes = {"prompt_ids": [1, 3]}, {"answer": "4"}, {"trace_ids": [4, 6]}, {"trace_ids": None}
    others = [[rows[0] | change, rows[1]] for change in changes]
    assert len({data.problems_digest(other)["sha256"] for other in [*others, rows[::-1], rows[:1], rows]}) == 7
    plain = [{name: row[name] for name in ("prompt_ids", "answer")} for row in rows[1:]]
    assert data.problems_digest(plain) == data.problems_digest(rows[1:])
