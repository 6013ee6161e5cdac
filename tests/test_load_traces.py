"""Which trace does a problem get, what has it cost, and which prompts ever hold it?"""

import json
import math
from collections import defaultdict

import pytest
from transformers import LlamaForCausalLM

import common
import eval as eval_script
import luffy
import prefixrl
import repo
import sft
from engine import BadArgument, data, models, run, sampling, tasks, traces
from engine.flops import Flops
from methods import loaded, with_eos

METHODS = pytest.mark.parametrize("module", [luffy, repo, prefixrl, sft], ids=lambda module: module.__name__)


@pytest.fixture
def load_traces(tiny, tmp_path):
    """load_traces([records of a trace file], **flags of LUFFY) -> 3 easy bills, own style, with their traces."""
    def call(records, **flags):
        (tmp_path / "t.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        args = luffy.Args(num_hard=0, num_easy=3, eval_steps=0, traces=str(tmp_path / "t.jsonl"), **flags)
        return common.load_problems(args, tiny[1])[0]

    return call


EASY = tasks.problems("bills", "train", "easy", 3)


def record_of(problem, **more):
    return {"prompt": problem["prompt"], "trace": problem["own_trace"]} | more


def test_traces_are_found_by_prompt_and_text_is_tokenised_with_eos(load_traces, tiny, capsys):
    """In another order, and with a stranger. Text alone is no retokenisation."""
    stranger = record_of(tasks.problems("bills", "train", "hard", 1)[0])
    problems = load_traces([stranger, record_of(EASY[2]), record_of(EASY[0])])
    first, last = (with_eos(tiny[1], EASY[i]["own_trace"]) for i in (0, 2))
    assert [problem["trace"] for problem in problems] == [EASY[0]["own_trace"], None, EASY[2]["own_trace"]]
    assert [problem["trace_ids"] for problem in problems] == [first, None, last]
    assert [problem["behavior_logps"] for problem in problems] == [None] * 3
    out = capsys.readouterr().out
    assert "traces: 2 of 3 problems have one" in out and "dropped" not in out and "anew" not in out


def test_wrong_and_over_long_traces_are_dropped_with_their_counts(load_traces, tiny, capsys):
    """A trace of exactly the longest completion, EOS included, stays."""
    longest, texts = 20, ["\\boxed{ 99 }"]
    for problem, length in ((EASY[1], longest), (EASY[2], longest + 1)):
        answer = f"\\boxed{{ {problem['answer']} }}"
        texts.append("; " * (length - len(with_eos(tiny[1], answer))) + answer)
        assert len(with_eos(tiny[1], texts[-1])) == length
    problems = load_traces([record_of(problem, trace=text) for problem, text in zip(EASY, texts)], max_completion_length=longest)
    assert [problem["trace"] for problem in problems] == [None, texts[1], None]
    assert [problem["trace_ids"] is None for problem in problems] == [True, False, True]
    out = capsys.readouterr().out
    assert f"traces: dropped 1 that do not grade right and 1 that exceed --max_completion_length {longest}\n" in out


def test_wrong_traces_stay_when_they_are_wanted(load_traces, capsys):
    problems = load_traces([record_of(problem, trace="\\boxed{ 0 }") for problem in EASY], keep_wrong_traces=True)
    assert [problem["trace"] for problem in problems] == ["\\boxed{ 0 }"] * 3 and "dropped" not in capsys.readouterr().out


def test_ids_that_end_in_padding_are_no_trace_and_log_probs_of_another_length_are_none(load_traces, tiny):
    """LUFFY would grade a trace without EOS as cut off; --shaping importance would pair log-probs with the wrong tokens."""
    right = [with_eos(tiny[1], problem["own_trace"]) for problem in EASY]
    problems = load_traces([record_of(EASY[0], trace_ids=right[0][:-1] + [tiny[1].pad_token_id], logps=[-1.0] * len(right[0])),
                            record_of(EASY[1], trace_ids=right[1], logps=[-1.0] * (len(right[1]) - 1)),
                            record_of(EASY[2], trace_ids=right[2], logps=[-1.0] * len(right[2]))])
    assert [problem["trace_ids"] for problem in problems] == right
    assert [problem["behavior_logps"] for problem in problems] == [None, None, [-1.0] * len(right[2])]


def test_trace_ids_are_kept_when_they_decode_to_the_trace_and_end(load_traces, tiny, capsys):
    """Row 0: ids of the text, and their log-probs. Row 1: ids of another text, row 2: no EOS; both anew, without log-probs."""
    right = [with_eos(tiny[1], problem["own_trace"]) for problem in EASY]
    given = [right[0], right[0], right[2][:-1]]
    assert [traces.read_logps([value, -0.5], 2) for value in (-0.5, 0, -math.inf, math.nan, -(10**400), 0.1, True)] == [
        [-0.5, -0.5], [0, -0.5], *[None] * 5]
    problems = load_traces([record_of(problem, trace_ids=ids, logps=[-0.5] * len(ids)) for problem, ids in zip(EASY, given)])
    assert [problem["trace_ids"] for problem in problems] == right
    assert [problem["behavior_logps"] for problem in problems] == [[-0.5] * len(right[0]), None, None]
    assert "tokenised 2 anew" in capsys.readouterr().out


def test_ids_that_are_kept_are_those_of_the_file_not_of_the_text(byte_tokenizer, monkeypatch):
    """A merge-free tokenizer has one reading; with a merge, stored single bytes decode to the same text and stay as they are."""
    from tokenizers import models

    tokenizer, symbols = byte_tokenizer, sorted(byte_tokenizer.get_vocab(), key=byte_tokenizer.get_vocab().get)
    merged = {symbol: index for index, symbol in enumerate([*symbols, "77"])}
    tokenizer.backend_tokenizer.model = models.BPE(vocab=merged, merges=[("7", "7")])
    trace = "\\boxed{77}"
    stored = [merged[symbol] for symbol in trace] + [257]
    assert tokenizer(trace, add_special_tokens=False)["input_ids"] == [*stored[:7], merged["77"], stored[9]] != stored[:-1]
    problem = {"prompt": "q", "answer": "77", "difficulty": "all", "prompt_ids": [1]}
    monkeypatch.setattr(traces, "read_dataset", lambda *_: [{"prompt": "q", "trace": trace, "trace_ids": stored, "logps": None}])
    (traced,) = common.encode_traces([problem], tokenizer, luffy.Args(traces="t.jsonl"))
    assert traced["trace_ids"] == stored and traced["trace"] == trace


# ---------------------------------------------------------------- several traces of a question


def test_a_problem_gets_every_usable_trace_once(load_traces, tiny, capsys):
    """A wrong, an over-long and a right one, another right one, and one of these again."""
    long, other = "; " * 70 + EASY[0]["own_trace"], f"\\boxed{{ {EASY[0]['answer']} }}"
    texts = ["\\boxed{ 0 }", long, EASY[0]["own_trace"], other, EASY[0]["own_trace"]]
    first, second, _ = load_traces([record_of(EASY[0], trace=text) for text in texts] + [record_of(EASY[1])])
    assert first["trace"] == EASY[0]["own_trace"] and [trace["trace"] for trace in first["other_traces"]] == [other]
    assert first["other_traces"][0]["trace_ids"] == with_eos(tiny[1], other) and second["other_traces"] == []
    out = capsys.readouterr().out
    assert "2 of 3 problems have one" in out and "3 in all" in out
    assert "dropped 1 that do not grade right and 1 that exceed --max_completion_length 64" in out


def row_with(answer, system=None):
    return {"prompt": [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": "Q: 1 ?"}],
            "answer": answer}


@pytest.fixture
def own_traces(tiny, tmp_path):
    """own_traces(rows of data, records of a trace file, flags) -> the texts of each row's traces."""
    def call(rows, records, module=luffy, **flags):
        for name, lines in (("d.jsonl", rows), ("t.jsonl", records)):
            (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        args = module.Args(dataset_name=str(tmp_path / "d.jsonl"), traces=str(tmp_path / "t.jsonl"), template="none", eval_steps=0, **flags)
        problems = common.load_problems(args, tiny[1])[0]
        return [[row["trace"] for row in common.rows_of_traces([problem])] for problem in problems]

    return call


@METHODS
def test_one_question_with_two_answers_has_a_trace_for_each(own_traces, module, capsys):
    """Told by the grade where the file names no answer; by its answer where nothing is graded away."""
    rows, traces = [row_with("3"), row_with("4")], ["\\boxed{ 3 }", "\\boxed{ 4 }"]
    records = [{"prompt": "Q: 1 ?", "trace": trace} for trace in traces]
    assert own_traces(rows, records, module) == [[traces[0]], [traces[1]]] and "dropped" not in capsys.readouterr().out
    records = [record | {"answer": answer} for record, answer in zip(records, "34")]
    assert own_traces(rows, records, module, keep_wrong_traces=True) == [[traces[0]], [traces[1]]]


@METHODS
def test_one_question_under_two_system_messages_has_a_trace_for_each(own_traces, module):
    """A file without system messages serves both."""
    rows, traces = [row_with("3", "A"), row_with("3", "B")], ["Sat \\boxed{ 3 }", "Sun \\boxed{ 3 }"]
    records = [row_with("3", system) | {"trace": trace} for system, trace in zip("AB", traces)]
    assert own_traces(rows, records, module) == [[traces[0]], [traces[1]]]
    assert own_traces(rows, [{"prompt": "Q: 1 ?", "trace": trace} for trace in traces], module) == [traces, traces]


def test_a_saved_trace_keeps_the_system_message_of_its_problem(run_script, tmp_path):
    """What eval.py collects under two system messages goes back to its own row."""
    row = tasks.problems("diary", "train", "easy", 1)[0]
    prompts = [[{"role": "system", "content": system}, {"role": "user", "content": row["prompt"]}] for system in ("Mon", "Tue")]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"prompt": prompt, "answer": row["answer"]}) + "\n" for prompt in prompts))
    code, _, err = run_script(eval_script, "--dataset_name", "d.jsonl", "--save_traces", "t.jsonl", "--max_completion_length", 48,
                              "--num_generations_eval", 64, "--traces_per_problem", 2, "--max_tries", 128, "--temperature", 2)
    assert code == 0, err
    saved = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert {json.dumps(line["prompt"]) for line in saved} == set(map(json.dumps, prompts))
    args = sft.Args(dataset_name="d.jsonl", traces="t.jsonl", eval_steps=0, template="none")
    for problem, prompt in zip(common.load_problems(args, models.load_model("tiny_model")[1])[0], prompts, strict=True):
        own = [line["trace_ids"] for line in saved if line["prompt"] == prompt]
        assert sorted(each["trace_ids"] for each in common.rows_of_traces([problem])) == sorted(own)


def test_a_row_of_the_data_has_its_own_trace(tiny, tmp_path):
    rows = [row_with("3") | {"trace": f"{day} \\boxed{{ 3 }}"} for day in ("Mon", "Tue")]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = common.load_problems(luffy.Args(dataset_name=str(tmp_path / "d.jsonl"), template="none", eval_steps=0), tiny[1])[0]
    assert [problem["trace"] for problem in problems] == [row["trace"] for row in rows]


def test_every_usable_trace_counts_in_the_digest_of_the_data(load_traces):
    more = record_of(EASY[0], trace=f"\\boxed{{ {EASY[0]['answer']} }}")
    digests = [data.problems_digest(load_traces(records)) for records in ([record_of(EASY[0])], [record_of(EASY[0]), more])]
    assert digests[0]["sha256"] != digests[1]["sha256"]


def test_rows_that_cannot_be_read_are_counted(load_traces, capsys):
    load_traces([record_of(EASY[0]), record_of(EASY[1], trace=7), {"prompt": 5, "trace": "x"}])
    assert "--traces: dropped 2 rows whose prompt or trace is missing or of another type, e.g. row 2: 7" in capsys.readouterr().out


@pytest.mark.parametrize("module, flags, kept", [
    (luffy, {}, False), (sft, {}, False), (repo, {}, True), (repo, {"raw_trace": True}, False),
    (repo, {"max_rephrase_prompt_length": 30}, False), (prefixrl, {}, True)])
def test_each_method_has_its_own_limit_for_traces(own_traces, module, flags, kept):
    """LUFFY and SFT train a trace whole; RePO quotes it in a prompt, and PrefixRL shows its beginning there."""
    long, short = "; " * 40 + "\\boxed{ 3 }", "\\boxed{ 3 }"
    records = [{"prompt": "Q: 1 ?", "trace": trace} for trace in (long, short)]
    assert own_traces([row_with("3")], records, module, max_completion_length=20, **flags) == [[long, short] if kept else [short]]


def test_a_file_of_no_use_is_refused(load_traces):
    with pytest.raises(BadArgument, match="t.jsonl: needs columns prompt and trace, found prompt, text"):
        load_traces([{"prompt": problem["prompt"], "text": problem["own_trace"]} for problem in EASY])
    with pytest.raises(BadArgument, match="no trace is left of .*: 3 do not grade right$"):
        load_traces([record_of(problem, trace="\\boxed{ 99 }") for problem in EASY])
    with pytest.raises(BadArgument, match="no trace is left of .*: 3 exceed --max_completion_length 4$"):
        load_traces([record_of(problem) for problem in EASY], max_completion_length=4)


@pytest.mark.parametrize("style", ["own", "teacher"])
def test_built_in_traces_have_the_style_that_was_asked_for(tiny, style):
    _, problems = loaded(luffy, tiny[1], task="diary", trace_style=style)
    assert [problem["trace"] for problem in problems] == [tasks.solve(problem["prompt"], style)[0] for problem in problems]
    assert all(problem["trace_ids"] == with_eos(tiny[1], problem["trace"]) for problem in problems)


@METHODS
def test_the_price_of_traces_opens_the_ledger(tiny, tmp_path, module):
    """flops/traces and flops/paper start with what the ledger beside the file says; 0 without one, and for written traces."""
    ledger = json.loads(tasks.SELF_TRACES["diary"].with_suffix(".ledger.json").read_text())
    flops = Flops.of(tiny[0], module.Args(task="diary", trace_style="self"))
    assert flops.metrics()["flops/traces"] == flops.metrics()["flops/total"] == ledger["flops"] > 1e12
    assert flops.metrics()["flops/paper"] == ledger["flops_paper"] > 1e12 and flops.num_tokens == 0
    (tmp_path / "t.jsonl").write_text("{}")
    for args in (module.Args(traces=str(tmp_path / "t.jsonl")), module.Args(task="diary", trace_style="teacher")):
        assert set(Flops.of(tiny[0], args).spent.values()) == {0.0}
    (tmp_path / "t.ledger.json").write_text('{"flops": 5.0, "flops_paper": 3.0}')
    args = module.Args(traces=str(tmp_path / "t.jsonl"), trace_style="self", task="diary")
    expected = {"rollout": 0.0, "train": 0.0, "traces": 5.0, "paper": 3.0}
    assert Flops.of(tiny[0], args).spent == expected
    assert Flops.of(tiny[0], args, stages=("rephrase",)).spent == expected | {"rephrase": 0.0}


# ---------------------------------------------------------------- nothing leaks


@pytest.fixture
def prompts_by_stage(monkeypatch, tiny):
    """{"check", "eval", "rephrase", "rollout"} -> decoded prompts of all rows that reach HF generate, once for all its waves."""
    seen, stage, in_waves = defaultdict(list), ["rollout"], []
    generate, generate_compacting = LlamaForCausalLM.generate, sampling.generate_compacting

    def mark(module, name, label):
        function = getattr(module, name)

        def call(*inputs, **more):
            stage.append(label)
            output = function(*inputs, **more)
            stage.pop()
            return output

        monkeypatch.setattr(module, name, call)

    def record(prompt_ids, prompt_mask):
        seen[stage[-1]] += [tiny[1].decode(ids[mask.bool()]) for ids, mask in zip(prompt_ids, prompt_mask)]

    def recorded(self, input_ids, attention_mask, **more):
        if not in_waves:
            record(input_ids, attention_mask)
        return generate(self, input_ids=input_ids, attention_mask=attention_mask, **more)

    def recorded_once(model, prompt_ids, prompt_mask, config):
        record(prompt_ids, prompt_mask)
        in_waves.append(True)
        completion_ids = generate_compacting(model, prompt_ids, prompt_mask, config)
        in_waves.pop()
        return completion_ids

    mark(run, "self_check", "check")
    mark(common, "evaluation_metrics", "eval")
    mark(repo, "help_failed_groups", "rephrase")
    monkeypatch.setattr(LlamaForCausalLM, "generate", recorded)
    monkeypatch.setattr(sampling, "generate_compacting", recorded_once)
    return seen


@pytest.mark.parametrize("module, task", [(luffy, "bills"), (repo, "bills"), (prefixrl, "diary")], ids=["luffy", "repo", "prefixrl"])
def test_traces_reach_only_the_prompts_that_are_meant_to_hold_them(run_script, prompts_by_stage, module, task):
    """Evaluation sees the plain evaluation problems, each once; rollouts plain training ones, or (PrefixRL) with a trace's beginning."""
    code, _, err = run_script(module, "--task", task, "--num_hard", 4, "--num_easy", 2, "--max_steps", 2, "--prompts_per_step", 6,
                              "--num_generations", 3, "--eval_steps", 2, "--eval_problems", 3, "--output_dir", "run")
    assert code == 0, err
    seen = prompts_by_stage
    plain = [problem["prompt"] for difficulty in tasks.DIFFICULTIES for problem in tasks.problems(task, "eval", difficulty, 3)]
    assert sorted(seen["eval"]) == sorted(2 * plain)
    problems = tasks.problems(task, "train", "hard", 4) + tasks.problems(task, "train", "easy", 2)
    train = [problem["prompt"] for problem in problems]
    if module is prefixrl:
        assert {next((prompt for prompt in train if text.startswith(prompt)), None) for text in seen["check"]} <= set(train)
        held = [next(prompt for prompt in train if text.startswith(prompt)) for text in seen["rollout"]]
        prefixes = [text.removeprefix(prompt).strip() for text, prompt in zip(seen["rollout"], held)]
        traces = {record["prompt"]: record["trace"] for record in map(json.loads, open(tasks.SELF_TRACES["diary"]))}
        assert all(traces[prompt].startswith(prefix) for prompt, prefix in zip(held, prefixes) if prefix)
        assert len(prefixes) == 36 and 12 <= sum(map(bool, prefixes)) < 36
        return
    assert set(seen["rollout"]) == set(train) and len(seen["rollout"]) == {luffy: 24, repo: 36}[module]
    assert seen["check"] and set(seen["check"]) <= set(train)
    notes = {tasks.rephrase_prompt(problem["prompt"], problem["teacher_trace"]) for problem in problems}
    assert set(seen["rephrase"]) <= notes and (len(seen["rephrase"]) >= 4) == (module is repo)
    assert not any("Notes:" in prompt for stage in ("check", "eval", "rollout") for prompt in seen[stage])


@METHODS
def test_evaluation_problems_have_no_trace(tiny, module):
    args = module.Args(task="diary", num_hard=2, num_easy=1, eval_problems=2)
    train, evaluation = common.load_problems(args, tiny[1])
    assert len(evaluation) == 6
    assert all(set(problem) == {"prompt", "answer", "difficulty", "prompt_ids", "columns"} for problem in evaluation)
    assert all(set(problem["columns"]) == {"answer", "difficulty"} for problem in evaluation)
    assert all({"trace", "trace_ids", "behavior_logps"} <= set(problem) for problem in train)


# ---------------------------------------------------------------- flags


@pytest.mark.parametrize("module, flags, expected", [
    (luffy, ["--traces", "missing.jsonl"], "--traces missing.jsonl: no such file"),
    (luffy, ["--dataset_name", "plain.jsonl"], "no trace is left of plain.jsonl: it has none; needs a column trace or target or "
                                               "completion or generation, or give --traces"),
    (luffy, ["--trace_style", "self"], "--trace_style self: the base never solves hard problems of --task bills; take teacher or own"),
    (repo, ["--trace_style", "self"], "--trace_style self: "),
    (prefixrl, ["--task", "bills"], "--trace_style self: the base never solves hard problems of --task bills"),
    (sft, ["--trace_style", "self"], "--trace_style self: "),
])
def test_flags_without_traces_are_refused(refused, tmp_path, module, flags, expected):
    (tmp_path / "plain.jsonl").write_text(json.dumps({"prompt": EASY[0]["prompt"], "answer": EASY[0]["answer"]}))
    assert expected in refused(module, *flags)


def test_a_trace_ends_once(load_traces, tiny, capsys):
    """Ids with an EOS inside are tokenised anew; a text that writes one inside is dropped, since what is graded would not be trained."""
    eos, right = tiny[1].eos_token_id, with_eos(tiny[1], EASY[0]["own_trace"])
    problems = load_traces([record_of(EASY[0], trace_ids=[*right[:4], eos, *right[4:]]),
                            record_of(EASY[1], trace="<eos> " + EASY[1]["own_trace"]), record_of(EASY[2])])
    assert [problem["trace_ids"] for problem in problems] == [right, None, with_eos(tiny[1], EASY[2]["own_trace"])]
    assert "dropped 1 that hold an end or another special token inside; tokenised 1 anew" in capsys.readouterr().out
