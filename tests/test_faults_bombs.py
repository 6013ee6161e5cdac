"""Does a small input that asks for a lot, or is odd text, end in one line and in time?"""

import json
import os
import re
import time

import pytest

import eval as eval_script
import grpo
import prefixrl
from engine import prompts
from faults import the_error

ROWS = [{"prompt": f"Q: Pia has {number} stamps . How many ? A:", "answer": str(number)} for number in range(3, 9)]
DRY = ("--dataset_name", "d.jsonl", "--dry_run")


@pytest.fixture(autouse=True)
def in_time():
    """Each test here ends soon. The inputs took many times as long, or for ever."""
    began = time.process_time()
    yield
    assert time.process_time() - began < 20


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize("template, expected", [
    ("{% for i in range(10**9) %}x{% endfor %}", "refuses messages of user: Range too big"), (LOOP, "does not end within 1 seconds"),
    ("{{ 9**(9**9) }}", "does not end within 1 seconds"), ("{{ 1/0 }}", "refuses messages of user: division by zero"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "refuses messages of user: maximum recursion depth"), ("  \n", "writes nothing"),
    ("{{ messages[99].content.x }}", "refuses messages of user: list object has no element 99"), ("{% if", "unexpected 'end of template'"),
    ("Solve:{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}", "leaves out the user's message"),
    ("{% for part in messages[0].content %}{{ part.text }}{% endfor %} ?", "leaves out the user's message"),
    ("{{ ''.__class__.__mro__ }}", "is unsafe"), ("{{ raise_exception('a\nb') }}", "a\\nb"), ("{{ missing.x }}", "'missing' is undefined"),
])
def test_a_chat_template_that_fails_or_does_not_end_is_refused(run_script, tmp_path, tiny, monkeypatch, template, expected):
    model, tokenizer = tiny
    if "within 1" in expected:
        monkeypatch.setattr(prompts, "TEMPLATE_SECONDS", 1)
    tokenizer.chat_template = template
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    code, _, err = run_script(grpo, "--task", "diary", "--model", "m", "--dry_run")
    assert code == 2 and "the chat template " in the_error(err) and expected in the_error(err)


def test_a_template_is_tried_once_for_each_order_of_roles(tiny, monkeypatch):
    """Refused where an order makes it hang, also after it has written others; one that ends is run in this process from then on."""
    _, tokenizer = tiny
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}" + LOOP + "{% endif %}{{ messages[-1].content }}"
    assert prompts.render_prompt(tokenizer, "q") == "q"
    monkeypatch.setattr(prompts, "TEMPLATE_SECONDS", 1)
    with pytest.raises(prompts.BadArgument, match="does not end within 1 seconds"):
        prompts.render_prompt(tokenizer, "q", system_prompt="s")
    began = time.perf_counter()
    for number in range(1000):
        assert prompts.render_prompt(tokenizer, str(number)) == str(number)
    assert time.perf_counter() - began < 3


@pytest.mark.parametrize("value", ["a\0b", "\ud800", os.fsdecode(b"\xff")])
@pytest.mark.parametrize("name", ["output_dir", "dataset_name", "model_name_or_path", "resume_from_checkpoint", "system_prompt"])
def test_text_that_no_file_system_and_no_terminal_takes_is_refused(run_script, tmp_path, name, value):
    (tmp_path / "c.json").write_text(json.dumps({name: value}))
    for flags in ((f"--{name}", value), (f"--{name}={value}",), ("c.json",)):
        code, _, err = run_script(grpo, *flags)
        assert code == 2 and "expected text in UTF-8 without NUL" in the_error(err)
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]


@pytest.mark.parametrize("script, name", [(grpo, "output_dir"), (grpo, "model"), (grpo, "dataset_name"), (grpo, "resume_from_checkpoint"),
                                          (prefixrl, "traces"), (eval_script, "save_traces"), (eval_script, "output_file")])
def test_names_that_are_too_long_are_refused(run_script, script, name):
    for length in (300, 5000):
        code, _, err = run_script(script, f"--{name}", "a" * length + ".jsonl")
        assert code in (1, 2) and "File name too long" in the_error(err, f"{script.__name__}.py")


@pytest.mark.parametrize("file, text, expected", [
    ("c.yaml", "seed: " + "9" * 5000, "c.yaml: seed: invalid int value"),
    ("c.json", '{"seed": ' + "9" * 5000 + "}", "c.json: Exceeds the limit"),
    ("c.yaml", "a: " + "[" * 90_000, "recursion"), ("c.yaml", "{a: " * 20_000, "recursion"),
    ("c.yaml", "\n".join(" " * depth + "a:" for depth in range(400)), "c.yaml: "), ("c.json", '{"a":' * 20_000, "recursion"),
    ("c.yaml", "a: " + "x " * 10**6, "found more than 100000 bytes"), ("c.json", " " * 10**6, "found more than 100000 bytes"),
    ("c.yaml", "".join(f"a{n}: 1\n" for n in range(7000)), "unknown key a0"),
    ("c.json", json.dumps({f"a{n}": 1 for n in range(7000)}), "unknown key a0"), ("c.yaml", "seed: 1\nseed: 2", "given more than once"),
    ("c.json", '{"seed": 1, "seed": 2}', "seed is given more than once"),
])
def test_a_config_file_that_asks_for_a_lot_is_refused(run_script, tmp_path, file, text, expected):
    (tmp_path / file).write_text(text)
    code, _, err = run_script(grpo, file)
    assert code == 2 and expected in the_error(err)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_config_file_that_is_no_file_is_refused(run_script, tmp_path, make):
    make(tmp_path / "c.yaml")
    code, _, err = run_script(grpo, "c.yaml")
    assert code == 2 and the_error(err) == "grpo.py: error: c.yaml: is not an ordinary file"


def test_a_seed_of_thousands_of_digits_is_refused_and_one_of_hundreds_works(run_script):
    code, _, err = run_script(grpo, "--seed", "9" * 5000)
    assert code == 2 and "--seed: invalid int value" in the_error(err)
    assert run_script(grpo, "--task", "diary", "--seed", "9" * 900, "--dry_run")[0] == 0


@pytest.mark.parametrize("name", ["num_hard", "num_easy", "eval_problems"])
def test_more_problems_of_the_built_in_task_than_there_are_is_refused(run_script, name):
    """They are drawn until all are different, which would never end."""
    code, _, err = run_script(grpo, "--task", "diary", f"--{name}", 10**9, "--dry_run")
    assert code == 2 and "--task diary: expected at most 10000 problems of a difficulty, got 1000000000" in the_error(err)


def test_wide_rows_and_prompts_of_megabytes_are_read_in_time(run_script, tmp_path):
    write(tmp_path / "d.jsonl", [row | {f"column {number}": "x" for number in range(20_000)} for row in ROWS])
    assert run_script(grpo, *DRY)[0] == 0
    write(tmp_path / "d.jsonl", [*ROWS, {"prompt": "How many ? " * 10**6, "answer": "2"}, {"prompt": "x" * 10**7, "answer": "2"}])
    code, out, _ = run_script(grpo, *DRY)
    assert code == 0 and "dropped 2 of 8 prompts longer than --max_prompt_length 1024" in out


def test_a_column_with_a_newline_writes_no_line_of_its_own(run_script, tmp_path):
    name = "a\ngrpo.py: error: fake"
    write(tmp_path / "d.jsonl", [row | {name: 1} for row in ROWS] + [{"prompt": 1, "answer": "3", name: row["prompt"]} for row in ROWS])
    write(tmp_path / "e.jsonl", [{name: 1}])
    for flags in (DRY, (*DRY, "--prompt_column", name), (*DRY, "--answer_column", name), (*DRY, "--prompt_column", "b\nc"),
                  ("--dataset_name", "e.jsonl")):
        _, out, err = run_script(grpo, *flags)
        assert not re.search(r"^(grpo.py: error: fake|c\b)", out + err, re.MULTILINE)
