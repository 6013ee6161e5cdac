"""Are people's data sets read as they mean them?"""

import json
import os
import shutil
import socket

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest

import common
import engine
import eval as eval_script
import grpo
import luffy
import sft
from engine import data, data_files, grading, models, prompts, tasks

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


def read(path, args=None, **more):
    """The problems of a training set, with the default flags or `args`."""
    return data.read_problems(str(path), "train", "--dataset_name", args or grpo.Args(dataset_name=str(path)), **more)


@pytest.mark.parametrize("value, gold", [
    ("42", "42"), (" x^2 ", "x^2"), (42, "42"), (0.5, "0.5"), (3.0, "3"), (True, "True"), ("1,234", "1,234"),
    ("He sells 48 / 2 = <<48/2=24>>24.\n#### 1,024", "1024"), ("#### 7 is wrong\n#### -3\n", "-3"), ("so\n#### 3,4", "3,4"),
    ("#### (1, 2)", "(1, 2)"), ("#### $12,345.5", "$12345.5"), ("5*22\n#### 110\nThe answer is: 110", "110"), ("proof", None),
    ("NotFound", None), ("proof by cases", "proof by cases"), ("so\n####5", "5"),
    ("First \\boxed{1}, then \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"), ("#### Step 2\nso \\boxed{9}", "9"),
    ("#### Step 1\nwe add\nand 4", "#### Step 1\nwe add\nand 4"),
    ('{"ground_truth": "6", "style": "rule"}', "6"), ('["6"]', "6"), ("['\\\\frac{1}{2}']", "\\frac{1}{2}"),
    ('["6", "7"]', None), ("[6]", "[6]"), ('["6"', '["6"'), ("#### (3,100)", "(3,100)"), ("#### [100,200]", "[100,200]"),
    ("#### x=3,100", "x=3,100"), ("#### 0,125", "0,125"), ("#### -$1,234.50 a day", "-$1234.50 a day"),
    ("<answer> 4 </answer>", "4"), ("The answer is 5", "5"), ("Final Answer: 7", "7"), ("So the answer is: \\boxed{3}", "3"), ('"6"', "6"),
    ("the answer", "the answer"), ('5" and 6"', '5" and 6"'), ("answer: ", "answer:"),
    ('{"a": 6}', '{"a": 6}'), ("[" * 9999, "[" * 9999),
    ({"ground_truth": "6", "style": "rule"}, "6"), ({"ground_truth": "\\boxed{6}"}, "6"), ({"ground_truth": 6}, "6"),
    (None, None), ("", None), (" \n", None), (float("nan"), None), (float("inf"), None), (["42"], None),
    ({"style": "rule"}, None), ({"ground_truth": ["6"]}, None), ("never closed \\boxed{4", None), ("\\boxed{}", None), ("so ####", None),
    (1e-7, "0.0000001"), (1e22, "10000000000000000000000"), (9007199254740993, "9007199254740993"), (-0.5, "-0.5"), ("1e-7", "1e-7"),
    ("Proof by induction. QED.", "Proof by induction. QED."), ("never closed \\fbox{4", None), (10**400, "1" + "0" * 400),
    (data_files.read_number("1e-" + "9" * 20), None),
])
def test_gold(value, gold):
    assert data.read_gold(value) == gold


@pytest.mark.parametrize("text, gold", [
    ("Proof by induction. QED.", None), ("We add both.\nThen it is 4", None), ("Is it so? Yes it is", None),
    ("42", "42"), ("x^2 + 1", "x^2 + 1"), ("3.14", "3.14"), ("no real solution", "no real solution"), ("We add. So it is \\boxed{4}.", "4"),
    ("They add.\n#### 4", "4"),
])
def test_sentences_of_a_solution_are_no_answer(tmp_path, capsys, text, gold):
    """A column `answer` may hold sentences; a column `solution` or `response` that does without naming an answer has none."""
    for column in ("solution", "response"):
        path = write(tmp_path / "d.jsonl", [{"problem": "a", column: "1"}, {"problem": "b", column: text}])
        args = grpo.Args(dataset_name=str(path), answer_column=column)
        assert [row["answer"] for row in read(path, args)] == ["1", gold][: 2 if gold else 1]
        assert (f"dropped 1 of 2 rows whose {column}" in capsys.readouterr().out) == (gold is None)


@pytest.mark.parametrize("value, messages", [
    (json.dumps([SYSTEM, USER]), [SYSTEM, USER]), (str([USER]), None), ('{"a": 1}', [{"role": "user", "content": '{"a": 1}'}]),
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
    (row,) = read(path, luffy.Args(dataset_name=str(path)), traces=True)
    assert (row["prompt"], row["answer"], row["trace"], row["difficulty"]) == ("1 + 1 ?", "2", "\\boxed{2}", "all")
    system = [SYSTEM] if "data_source" in record else []
    assert row.get("prompt_messages") == (None if isinstance(next(iter(record.values())), str) and not system else [*system, USER])


def test_a_csv_with_gaps(tmp_path, capsys):
    (tmp_path / "data.csv").write_text("question,answer\n1 + 1 ?,2\n1 + 2 ?,\n,4\n2 + 3 ?,5\n")
    rows = read(tmp_path / "data.csv")
    assert [(row["prompt"], row["answer"]) for row in rows] == [("1 + 1 ?", "2"), ("2 + 3 ?", "5")]
    assert capsys.readouterr().out == (
        "--dataset_name: dropped 1 of 4 rows whose question is missing or of another type, e.g. row 3: ''; expected a text or messages\n"
        "--dataset_name: dropped 1 of 4 rows whose answer is missing or of another type, e.g. row 2: ''; expected a text or a number\n")


def test_gold_answers_that_are_sentences_are_told(tmp_path, capsys):
    told = "Then 4 people crossed the line before him."
    path = write(tmp_path / "d.jsonl", [{"prompt": "a", "answer": told}, {"prompt": "b", "answer": "4"}])
    assert len(read(path)) == 2
    assert f"--dataset_name: 1 of 2 gold answers are sentences, e.g. '{told}': only the same words" in capsys.readouterr().out
    read(path, grpo.Args(dataset_name=path, reward_fn=f"{eval_script.__file__}:main"))
    assert capsys.readouterr().out == ""


def test_an_empty_system_message_is_none():
    """So --system_prompt and a template's instruction take its place."""
    assert data.read_prompt([{"role": "system", "content": " "}, USER]) == [USER]


def test_a_folder_of_files_is_read_as_the_files_are(tmp_path):
    """`datasets` guesses types over a column: 007 is 7 there, a date is no text, NA is nothing, and 2**53 + 1 is even."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "train-1.csv").write_text("prompt,answer\nx,007\ny,NA\n")
    write(tmp_path / "a" / "train-2.jsonl", [{"prompt": "z", "answer": 2**53 + 1}, {"prompt": "w", "answer": 0.5}])
    write(tmp_path / "a" / "test.jsonl", [{"prompt": "held out", "answer": "2024-01-05"}])
    assert [(row["prompt"], row["answer"]) for row in read(tmp_path / "a")] == [
        ("x", "007"), ("y", "NA"), ("z", "9007199254740993"), ("w", "0.5")]
    args = grpo.Args(dataset_name=str(tmp_path / "a"))
    (row,) = data.read_problems(str(tmp_path / "a"), "test", "--dataset_name", args)
    assert (row["prompt"], row["answer"]) == ("held out", "2024-01-05")
    (tmp_path / "a" / "LICENSE").write_text("Apache")
    (tmp_path / "a" / "README.md").write_text("---\nlicense: mit\n---\nNo configs: all files are train or test")
    assert len(read(tmp_path / "a")) == 4
    (tmp_path / "a" / "README.md").write_text("---\nconfigs:\n- config_name: default\n---\n")
    assert data.files_of_split(tmp_path / "a", "train") == []  # only `datasets` reads which files it names
    (tmp_path / "b").mkdir()
    write(tmp_path / "b" / "mine.jsonl", [{"prompt": "x", "answer": "007"}])
    assert [row["answer"] for row in read(tmp_path / "b")] == ["007"]  # where no file names a split, all of them are train
    (tmp_path / "b" / "mine.csv").write_text("prompt,answer\nx,007\n")
    assert data.files_of_split(tmp_path / "b", "train") == []  # the same set in two formats: `datasets` decides
    pyarrow.parquet.write_table(pyarrow.table([["q"], [5], [6]], names=["prompt", "answer", "answer"]), tmp_path / "two.parquet")
    with pytest.raises(engine.BadArgument, match="answer is given more than once"):
        read(tmp_path / "two.parquet")


def test_a_folder_is_read_anew_and_its_floats_are_short(tmp_path):
    """`datasets` would know the files by their size and time."""
    for answer in (0.1, 0.2):
        table = pyarrow.table({"prompt": ["a"], "answer": pyarrow.array([answer], pyarrow.float32()),
                               "more": [{"nested": [answer]}]}, schema=pyarrow.schema([
                                   ("prompt", pyarrow.string()), ("answer", pyarrow.float32()),
                                   ("more", pyarrow.struct([("nested", pyarrow.list_(pyarrow.float32()))]))]))
        pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
        os.utime(tmp_path / "train.parquet", (1, 1))
        for place in (tmp_path, tmp_path / "train.parquet"):
            (row,) = read(place)
            assert (row["answer"], row["columns"]["more"]) == (str(answer), {"nested": [answer]})


def test_rows_that_cannot_be_read_are_counted_and_a_bad_trace_is_no_trace(tmp_path, capsys):
    path = write(tmp_path / "d.jsonl", [
        {"prompt": "a", "answer": "1", "trace": "\\boxed{1}"}, {"prompt": 5, "answer": "1", "trace": None},
        {"prompt": "c", "answer": ["1"], "trace": None}, {"prompt": [TOLD], "answer": "1", "trace": None},
        {"prompt": "e", "answer": "1", "trace": 7}, {"prompt": "f", "answer": "1", "trace": None}, {"answer": "1"}])
    args = luffy.Args(dataset_name=path)
    rows = read(path, args, traces=True)
    assert [(row["prompt"], row["trace"]) for row in rows] == [("a", "\\boxed{1}"), ("e", None), ("f", None)]
    assert capsys.readouterr().out == (
        "--dataset_name: dropped 3 of 7 rows whose prompt is missing or of another type, e.g. row 2: 5; expected a text or messages\n"
        "--dataset_name: dropped 1 of 7 rows whose answer is missing or of another type, e.g. row 3: ['1']; expected a text or a "
        "number\n"
        "--dataset_name: no trace in 1 of 7 rows whose trace is missing or of another type, e.g. row 5: 7; expected a text or "
        "messages\n")
    assert "trace" not in read(path)[1]  # no business of a script without traces


def test_a_problem_keeps_its_row_as_it_stands(tiny, tmp_path):
    """For --reward_fn; what is trained is rendered and read from the row."""
    row = {"prompt": [SYSTEM, USER], "answer": "#### 1,234", "target": 7, "source": {"name": "x"}}
    path = write(tmp_path / "d.jsonl", [row, {"prompt": "b", "answer": 1, "more": [0.5]}])
    loaded, other = common.load_problems(grpo.Args(dataset_name=path, eval_steps=0), tiny[1])[0]
    assert loaded["columns"] == row | {"more": None}
    assert other["columns"] == {"prompt": "b", "answer": 1, "target": None, "source": None, "more": [0.5]}
    assert loaded["prompt_ids"] == tiny[1]("Think.\n1 + 1 ?")["input_ids"]
    assert (loaded["prompt"], loaded["answer"], loaded["difficulty"]) == ("1 + 1 ?", "1234", "all")
    path = write(tmp_path / "told.jsonl", [row | {"prompt": json.dumps(row["prompt"])}])  # as a csv file holds messages
    assert common.load_problems(grpo.Args(dataset_name=path, eval_steps=0), tiny[1])[0][0]["prompt_ids"] == loaded["prompt_ids"]
    (built_in,) = common.load_problems(grpo.Args(num_hard=1, num_easy=0, eval_steps=0), tiny[1])[0]
    assert built_in["columns"].keys() == {"answer", "difficulty"}  # its traces are no columns


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
@pytest.mark.parametrize("written, gold", [
    (["9007199254740993", "0.5"], ["9007199254740993", "0.5"]),
    (["1e-7", "2"], ["0.0000001", "2"]), (["0.10000000000000000555", "0.50"], ["0.10000000000000000555", "0.50"]),
    (["123456789012345678901234567890", "1E2"], ["123456789012345678901234567890", "100"]), (["-0.0", "3.0"], ["0", "3"]),
    (["1e300", "1e-320"], ["1" + "0" * 300, "1E-320"]),
])
def test_numbers_keep_their_digits(tmp_path, kind, written, gold):
    """Numbers of one column, integers and decimals; a csv file has texts, which stay as they are."""
    path = tmp_path / f"d.{kind}"
    rows = ['{"prompt": "%s", "answer": %s}' % row for row in zip("ab", written)]  # noqa: UP031
    path.write_text({"jsonl": "\n".join(rows), "json": f"[{', '.join(rows)}]",
                     "csv": "prompt,answer\n" + "".join(f"{row[0]},{row[1]}\n" for row in zip("ab", written)) + "c,\n"}[kind])
    assert [row["answer"] for row in read(path)] == (written if kind == "csv" else gold)


@pytest.mark.parametrize("gold, given, right", [
    (9007199254740993, "9007199254740993", 1.0), (9007199254740993, "9007199254740992", 0.0), (1e-7, "0.0000001", 1.0),
    (1e-7, "0.000001", 0.0), ("2024-01-05", "2024-01-05", 1.0), ("NA", "NA", 1.0),
])
def test_a_gold_answer_is_reached_by_its_own_digits(tmp_path, gold, given, right):
    (row,) = read(write(tmp_path / "d.jsonl", [{"prompt": "a", "answer": gold}]))
    assert grading.grade(f"\\boxed{{{given}}}", row["answer"]) == right


@pytest.mark.parametrize("text", ["2024-01-05", "NA", "None", "null", "nan", "true", "1,234", "007", "1e5", "12:30", " 5", "N/A", "-"])
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_text_stays_text(tmp_path, kind, text):
    """In every row, where a reader that guesses types would find dates, gaps or numbers."""
    path = tmp_path / f"d.{kind}"
    if kind == "jsonl":
        write(path, [{"prompt": name, "answer": text, "more": text} for name in "abc"])
    else:
        path.write_text("prompt,answer,more\n" + "".join(f'{name},"{text}","{text}"\n' for name in "abc"))
    rows = read(path)
    assert [row["answer"] for row in rows] == [text.strip()] * 3 and [row["columns"]["more"] for row in rows] == [text] * 3


def test_a_csv_of_other_programs(tmp_path):
    """A byte order mark, Windows lines, comma, quotes and line break in a field, a blank line, and a solution of 200,000 characters."""
    long = "so " * 70_000 + "\\boxed{6}"
    (tmp_path / "d.csv").write_bytes(
        b"\xef\xbb\xbf" + f'prompt,solution\r\n"1, or\n""2""?",\\boxed{{5}}\r\n\r\nb,{long}\r\n'.encode())
    assert [(row["prompt"], row["answer"]) for row in read(tmp_path / "d.csv")] == [('1, or\n"2"?', "5"), ("b", "6")]


@pytest.mark.parametrize("content", [
    '{"prompt": "a", "answer": 1}\n\n{"prompt": "b\u2028c", "answer": 2}\n',
    '[{"prompt": "a", "answer": 1},\n{"prompt": "b\u2028c", "answer": 2}]'], ids=["lines", "list"])
@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_lines_and_lists_of_objects_are_read_in_either_file(tmp_path, kind, content):
    (tmp_path / f"d.{kind}").write_text(content, "utf-8-sig")
    assert [(row["prompt"], row["answer"]) for row in read(tmp_path / f"d.{kind}")] == [("a", "1"), ("b\u2028c", "2")]


GOOD = b'{"prompt": "a", "answer": "1"}\n'


@pytest.mark.parametrize("name, content, expected", [
    ("d.jsonl", GOOD + b'{"prompt": "b",\n', "line 2: expected JSON: "),
    ("d.jsonl", GOOD + b"\n\n" + GOOD + b"[1, 2]\n", "line 5: expected an object such as {\"prompt\": \"...\"}, found list"),
    ("d.jsonl", GOOD + b"7", "line 2: expected an object such as {\"prompt\": \"...\"}, found int"),
    ("d.jsonl", GOOD + b"null", "line 2: expected an object such as {\"prompt\": \"...\"}, found NoneType"),
    ("d.jsonl", GOOD + b'"text"', "line 2: expected an object such as {\"prompt\": \"...\"}, found str"),
    ("d.jsonl", GOOD + b'{"prompt": ' + b"[" * 10**6 + b"]" * 10**6 + b"}", "line 2: expected an object, found lists or objects"),
    ("d.jsonl", b"[" * 10**6, "line 1: expected an object, found lists or objects nested too deep"),
    ("d.jsonl", GOOD + b'{"a":' * 10**6, "line 2: expected an object, found lists or objects nested too deep"),
    ("d.jsonl", GOOD + b'{"prompt": "b\0"}', "line 2: expected JSON: Invalid control character at, column 14"),
    ("d.jsonl", GOOD + b"\0\0\0\0", "line 2: expected JSON: Expecting value, column 1"),
    ("d.jsonl", GOOD + GOOD + b'{"prompt": "\xe9"}', "line 3: expected UTF-8"),
    ("d.jsonl", '{"prompt": "a"}'.encode("utf-16"), "line 1: expected UTF-8"),
    ("d.jsonl", GOOD + b'{"prompt": "\\ud800", "answer": "1"}', "line 2: expected text, found half a surrogate pair"),
    ("d.jsonl", GOOD + b'{"prompt": "b", "answer": ' + b"9" * 5000 + b"}", "line 2: expected a number, found one of thousands of digits"),
    ("d.json", b'[\n{"prompt": "a", "answer": 1},\n{"prompt": "b" "answer"}]', "line 3: expected JSON: Expecting ',' delimiter, column 16"),
    ("d.json", b'[{"prompt": "a", "answer": "1"}, 2]', "item 2: expected an object such as {\"prompt\": \"...\"}, found int"),
    ("d.jsonl", GOOD + b'{"prompt": "b", "answer": 1, "answer": 2}', "line 2: answer is given more than once"),
    ("d.csv", b"prompt,answer\na,1\n\n\"b\nc\",2\nd,3,4\n", "line 6: expected 2 fields, found 3"),
    ("d.csv", b'prompt,answer\na,1\n"b,2\nc,3\n', "line 3: expected fields with closed quotes: unexpected end of data"),
    ("d.csv", b"prompt,answer\na,1\nb,\0\n", "line 3: expected text, found a NUL byte"),
    ("d.csv", b"prompt,answer\na,1\nb,\xff\n", "line 3: expected UTF-8"),
    ("d.csv", b"prompt,answer,prompt\na,1,b\n", "line 1: expected a name once, found prompt twice"),
    ("d.parquet", b"PAR1 and then nothing", ": expected a parquet file: "),
    ("d.jsonl", b"", ": the data set is empty"), ("d.jsonl", b" \n\n", ": the data set is empty"),
    ("d.csv", b"", ": the data set is empty"), ("d.csv", b"prompt,answer\n", ": the data set is empty"),
    ("d.json", b"[]", ": the data set is empty"),
    ("d.parquet", b"", ": the data set is empty"), ("d.txt", GOOD, ": expected a file ending in .jsonl, .json, .csv, .parquet"),
])
def test_a_file_that_cannot_be_read_is_one_line_that_names_its_line(run_script, tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    code, _, err = run_script(grpo, "--dataset_name", name)
    assert code == 2 and err.count("\n") == 1 and "Traceback" not in err
    assert err.startswith(f"grpo.py: error: --dataset_name {name}{'' if expected[0] == ':' else ', '}{expected}") and len(err) < 300


def test_a_traces_file_is_read_with_the_same_care(refused, tmp_path):
    (tmp_path / "t.jsonl").write_text('{"prompt": "a", "trace": "b"}\n\n{"prompt"}\n')
    assert refused(sft, "--traces", "t.jsonl").startswith("sft.py: error: --traces t.jsonl, line 3: expected JSON: ")


def test_names_of_columns_never_make_lines(tmp_path):
    path = write(tmp_path / "d.jsonl", [{"a\ngrpo.py: error: fake": 1} | {f"column {i}": 1 for i in range(20_000)}])
    with pytest.raises(engine.BadArgument) as error:
        read(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600 and "and 19981 more" in str(error.value)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_a_replaced_file_is_read_anew_and_nothing_is_left_in_the_cache(tmp_path, monkeypatch, kind):
    """Same path, same size, same modification time, as archives and rsync leave them."""
    for name in ("HF_DATASETS_CACHE", "HF_CACHE_HOME", "DOWNLOADED_DATASETS_PATH", "EXTRACTED_DATASETS_PATH"):
        monkeypatch.setattr(datasets.config, name, tmp_path / "cache", raising=False)
    path, seen = tmp_path / f"d.{kind}", []
    for answer in ("1", "2"):
        rows = [{"prompt": "a", "answer": answer}]
        if kind == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        else:
            path.write_text("prompt,answer\na," + answer if kind == "csv" else json.dumps(rows if kind == "json" else rows[0]))
        os.utime(path, ns=(10**18, 10**18))
        seen += [row["answer"] for row in read(path)]
    assert seen == ["1", "2"] and not (tmp_path / "cache").exists()


def test_floats_of_32_bits_are_read_as_they_were_written(tmp_path):
    column = pyarrow.array([0.1, 3.14, None, 2.0], pyarrow.float32())
    pyarrow.parquet.write_table(pyarrow.table({"prompt": list("abcd"), "answer": column}), tmp_path / "d.parquet")
    assert [row["answer"] for row in read(tmp_path / "d.parquet")] == ["0.1", "3.14", "2"]


# ---------------------------------------------------------------- columns


@pytest.mark.parametrize("values, groups", [
    (["easy", "hard", "easy"], ["easy", "hard", "easy"]), (["easy", None, "hard"], ["easy", "None", "hard"]),
    ([0.125, 0.25, 0.125], ["all"] * 3), ([1, 2, 3], ["all"] * 3), (["0.5", "0.25", "1"], ["all"] * 3), ([0.5, None, 0.25], ["all"] * 3),
    ([f"level {i}" for i in range(8)], [f"level {i}" for i in range(8)]), ([f"level {i}" for i in range(9)], ["all"] * 9),
    (["all", "hard"], ["all"] * 2), ([None, None], ["all"] * 2),
])
def test_difficulties_are_groups_when_they_are_few_names(tmp_path, values, groups):
    path = write(tmp_path / "d.jsonl", [{"prompt": f"a{i}", "answer": 1, "difficulty": value} for i, value in enumerate(values)])
    rows = read(path)
    assert [row["difficulty"] for row in rows] == groups
    assert [row["columns"]["difficulty"] for row in rows] == values  # a --reward_fn may read them


@pytest.mark.parametrize("difficulties, expected", [(("easy", "hard"), ["easy", "hard", "all"]), ((0.125, 0.25), ["all"])])
def test_the_whole_of_a_data_set_has_its_line(run_script, tmp_path, difficulties, expected):
    """In the table of eval.py and in the metrics of training; the whole is that of all problems, not the mean of groups."""
    rows = [{"prompt": row["prompt"], "answer": row["answer"], "difficulty": difficulties[place > 1]} for place, row in enumerate(EASY)]
    write(tmp_path / "d.jsonl", rows)
    code, out, err = run_script(eval_script, "--dataset_name", "d.jsonl", "--num_generations_eval", 2, "--output_file", "e.json",
                                "--max_completion_length", 48, "--temperature", 1.5)
    assert code == 0, err
    summary = json.loads((tmp_path / "e.json").read_text())["summary"]
    assert list(summary) == expected == [line.split()[0] for line in out.splitlines() if " +- " in line]
    assert summary["all"]["problems"] == 4 and summary["all"]["avg@2"] == common.mean_and_error(
        [sum(problem["rewards"]) / 2 for problem in json.loads((tmp_path / "e.json").read_text())["problems"]])[0]
    code, _, err = run_script(grpo, "--dataset_name", "d.jsonl", "--eval_dataset_name", "d.jsonl", *SHORT)
    assert code == 0, err
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert {name.split("/")[1] for name in record if name.startswith("eval/")} == set(expected)


def messages_of(row, style="own"):
    return [SYSTEM, {"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[f"{style}_trace"]}]


@pytest.mark.parametrize("script", [grpo, sft, luffy], ids=lambda script: script.__name__)
def test_a_flag_names_each_column(script, tmp_path, tiny):
    """TRL's messages: the question is all before the last answer, which is the trace."""
    path = write(tmp_path / "d.jsonl", [{"messages": messages_of(row), "label": row["answer"], "prompt": "x", "answer": "0", "trace": "x"}
                                        for row in EASY])
    flags = {} if script is grpo else {"trace_column": "messages"}
    args = script.Args(dataset_name=path, prompt_column="messages", answer_column="label", eval_steps=0, template="none", **flags)
    problems, _ = common.load_problems(args, tiny[1])
    for problem, row in zip(problems, EASY, strict=True):
        assert (problem["prompt"], problem["answer"]) == (row["prompt"], row["answer"])
        assert problem["prompt_ids"] == tiny[1](f"Think.\n{row['prompt']}")["input_ids"]
        assert script is grpo or problem["trace"] == row["own_trace"]


def test_the_last_turn_of_a_long_dialogue_is_the_trace(tmp_path):
    dialogue = [USER, TOLD, {"role": "user", "content": "and 2 more?"}, {"role": "assistant", "content": "\\boxed{4}"}]
    path = write(tmp_path / "d.jsonl", [{"messages": dialogue, "answer": "4"}])
    (row,) = read(path, sft.Args(dataset_name=path, prompt_column="messages", trace_column="messages"), traces=True)
    assert row["prompt_messages"] == dialogue[:3] and row["trace"] == "\\boxed{4}"


def test_the_solution_of_gsm8k_is_gold_and_trace(tmp_path, byte_tokenizer):
    told = "4 + 2 = <<4+2=6>>6 apples\n#### 6"
    path = write(tmp_path / "d.jsonl", [{"question": "how many?", "answer": told}])
    args = sft.Args(dataset_name=path, trace_column="answer", keep_wrong_traces=True, eval_steps=0, max_completion_length=64)
    (problem,) = common.load_problems(args, byte_tokenizer)[0]
    assert (problem["answer"], problem["trace"]) == ("6", told)


@pytest.mark.parametrize("script, flags, expected", [
    (grpo, ["--prompt_column", "text"], "--prompt_column text: no such column in --dataset_name d.jsonl, found prompt, answer, trace"),
    (grpo, ["--answer_column", "gold"], "--answer_column gold: no such column in --dataset_name d.jsonl, found prompt, answer, trace"),
    (grpo, ["--prompt_column", ""], "--prompt_column: expected a text, got an empty one"),
    (luffy, ["--trace_column", "told"], "--trace_column told: no such column in --dataset_name d.jsonl, found prompt, answer, trace"),
    (luffy, ["--trace_column", "trace", "--traces", "t.jsonl"], "--trace_column does not go with --traces, which holds the traces"),
    (eval_script, ["--answer_column", "gold"], "--answer_column gold: no such column in --dataset_name d.jsonl, found prompt, answer, tr"),
])
def test_a_flag_with_a_bad_column_says_which_exist(run_script, tmp_path, script, flags, expected):
    write(tmp_path / "d.jsonl", [{"prompt": "a", "answer": "1", "trace": "\\boxed{1}"}])
    code, _, err = run_script(script, "--dataset_name", "d.jsonl", *flags)
    assert code == 2 and err.startswith(f"{script.__name__}.py: error: {expected}") and err.count("\n") == 1


@pytest.mark.parametrize("script", [grpo, sft, luffy, eval_script], ids=lambda script: script.__name__)
@pytest.mark.parametrize("question, code", [("What is the capital of France?", 2), ("Natalia sold clips to 48 of her friends in April", 2),
                                            ("How many ? Q: Ann has 3 stamps", 0)])
def test_data_in_words_that_the_tokenizer_does_not_know_are_refused(run_script, tmp_path, script, question, code):
    """Without --model the built-in one would be trained on <unk> <unk>. A few unknown words are told."""
    write(tmp_path / "d.jsonl", [{"prompt": question, "answer": "1", "trace": "\\boxed{ 1 }"}] * 4)
    flags = ("--num_generations_eval", 1) if script is eval_script else ("--dry_run",)
    done, out, err = run_script(script, "--dataset_name", "d.jsonl", *flags)
    assert done == code
    assert code == 0 or "of the tokens of its prompts are <unk>, words unknown to tiny_model: give another --model" in err
    assert code == 2 or "of the tokens of its prompts are <unk>" not in out
    write(tmp_path / "d.jsonl", [{"prompt": "Q: Ann has 3 whatnots ? A:", "answer": "1", "trace": "\\boxed{ 1 }"}] * 4)
    done, out, err = run_script(script, "--dataset_name", "d.jsonl", *flags)
    assert done == 0 and "14% of the tokens of its prompts are <unk>, words unknown to tiny_model\n" in out


@pytest.mark.parametrize("script, flag", [(grpo, "--task=bills"), (luffy, "--task"), (eval_script, "--task"), (grpo, "--num_hard"),
                                          (sft, "--num_easy"), (luffy, "--trace_style"), (eval_script, "--num_hard")])
def test_a_flag_of_the_built_in_task_does_not_go_with_own_data(run_script, tmp_path, script, flag):
    """On the command line and in a config; the flags of a run, which repeat it, hold the defaults of all."""
    write(tmp_path / "d.jsonl", [{"prompt": row["prompt"], "answer": row["answer"], "trace": row["own_trace"]} for row in EASY])
    value = {"--task": ["diary"], "--trace_style": ["own"]}.get(flag, [] if "=" in flag else [3])
    code, _, err = run_script(script, "--dataset_name", "d.jsonl", flag, *value)
    name = flag.split("=")[0]
    assert code == 2 and f"{name} is a flag of the built-in task, and says nothing with --dataset_name" in err and err.count("\n") == 1
    config = {"dataset_name": "d.jsonl", name.removeprefix("--"): value[0] if value else "bills"}
    (tmp_path / "c.json").write_text(json.dumps(config))
    assert f"{name} is a flag of the built-in task" in run_script(script, "c.json")[2]


def test_a_run_on_own_data_can_be_repeated_and_resumed(run_script, tmp_path):
    write(tmp_path / "d.jsonl", [{"prompt": row["prompt"], "answer": row["answer"]} for row in EASY])
    assert run_script(grpo, "--dataset_name", "d.jsonl", *SHORT, "--save_steps", 1)[0] == 0
    assert run_script(grpo, "run/args.json", "--output_dir", "again")[0] == 0
    assert run_script(grpo, "--resume_from_checkpoint", "run", "--max_steps", 2)[0] == 0


@pytest.mark.parametrize("flag", ["--prompt_column", "--answer_column", "--trace_column"])
def test_a_column_of_the_built_in_task_cannot_be_named(refused, flag):
    assert refused(luffy, flag, "x").endswith(f"{flag} names a column of --dataset_name, which is not given")


def test_sft_trains_on_prompt_and_completion_and_says_that_nothing_is_graded(run_script, tmp_path):
    """Gold is needed only by what reads it: the rules of the RL scripts."""
    write(tmp_path / "d.jsonl", [{"prompt": row["prompt"], "completion": row["own_trace"]} for row in EASY])
    code, out, err = run_script(sft, "--dataset_name", "d.jsonl", *SHORT)
    assert code == 0, err
    assert "traces: 4 of 4 problems have one (d.jsonl); they are not graded, for want of an answer column" in out
    assert "self-check: 0 gold answers grade right" in out and "dropped" not in out
    for script in (grpo, luffy, eval_script):
        code, _, err = run_script(script, "--dataset_name", "d.jsonl")
        assert code == 2 and "--dataset_name d.jsonl: needs a column answer or solution or ground_truth or reward_model" in err


def test_configuration_and_split_reach_the_hub_and_are_refused_for_a_file(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **more: asked.append((names, more))
                        or datasets.Dataset.from_list([{"prompt": "Q: 1", "answer": "1"}]))
    args = grpo.Args(dataset_name="openai/gsm8k", dataset_config="main", eval_dataset_name="openai/gsm8k", eval_dataset_config="socratic",
                     dataset_split="train[:9]", eval_dataset_split="dev", template="none")
    common.load_problems(args, models.load_model("tiny_model")[1])
    assert asked == [(("openai/gsm8k", "main"), {"split": "train[:9]"}), (("openai/gsm8k", "socratic"), {"split": "dev"})]
    path = write(tmp_path / "d.jsonl", [{"prompt": "a", "answer": "1"}])
    with pytest.raises(engine.BadArgument, match="--eval_dataset_config main: .*d.jsonl is local, and has no configurations"):
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
    ("r1", "1 + 1 ?", None, prompts.INSTRUCTIONS["r1"] + "\n" + R1, prompts.INSTRUCTIONS["r1"] + "\n" + R1),
    ("r1", [SYSTEM, USER], None, "Think.\n" + R1, "Think.\n" + R1),
    ("r1", [USER, TOLD, USER], "Be brief.", "Be brief.\nUser: 1 + 1 ?\nAssistant: \\boxed{2}\n" + R1,
     "Be brief.\nUser: 1 + 1 ?\nAssistant: \\boxed{2}\n" + R1),
    ("qwen_math", "1 + 1 ?", None, QWEN_START + QWEN, QWEN_START + QWEN),
    ("qwen_math", "1 + 1 ?", "", QWEN, QWEN),
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
        assert part in prompts.INSTRUCTIONS["r1"]


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
    (grpo, ["--dataset_name", "good.jsonl", "--dataset_config", "main"], "--dataset_config main: good.jsonl is local, and has no"),
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
