"""Which trace does a problem get, what has it cost, and which prompts ever hold it?"""

import json
from collections import defaultdict

import pytest
from transformers import LlamaForCausalLM

import common
import luffy
import prefixrl
import repo
import sft
from engine import BadArgument, data, run, sampling, tasks
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
    """In another order, with a stranger and a second trace of one problem: the first counts. Text alone is no retokenisation."""
    stranger = record_of(tasks.problems("bills", "train", "hard", 1)[0])
    problems = load_traces([stranger, record_of(EASY[2]), record_of(EASY[0]), record_of(EASY[0], trace="\\boxed{ 0 }")])
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
    assert f"dropped 1 that do not grade right and 1 longer than --max_completion_length {longest}; tokenised 0 anew" in out


def test_wrong_traces_stay_when_they_are_wanted(load_traces, capsys):
    problems = load_traces([record_of(problem, trace="\\boxed{ 99 }") for problem in EASY], keep_wrong_traces=True)
    assert [problem["trace"] for problem in problems] == ["\\boxed{ 99 }"] * 3 and "dropped" not in capsys.readouterr().out


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
    monkeypatch.setattr(data, "read_dataset", lambda *_: [{"prompt": "q", "trace": trace, "trace_ids": stored, "logps": None}])
    (traced,) = common.encode_traces([problem], tokenizer, luffy.Args(traces="t.jsonl"))
    assert traced["trace_ids"] == stored and traced["trace"] == trace


def test_a_file_of_no_use_is_refused(load_traces):
    with pytest.raises(BadArgument, match="t.jsonl: needs columns prompt and trace, found prompt, text"):
        load_traces([{"prompt": problem["prompt"], "text": problem["own_trace"]} for problem in EASY])
    with pytest.raises(BadArgument, match="no trace is left of .*: 3 do not grade right, 0 exceed --max_completion_length"):
        load_traces([record_of(problem, trace="\\boxed{ 99 }") for problem in EASY])
    with pytest.raises(BadArgument, match="no trace is left of .*: 0 do not grade right, 3 exceed --max_completion_length"):
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
    (luffy, ["--dataset_name", "plain.jsonl"], "no trace is left of plain.jsonl: 0 do not grade right, 0 exceed --max_completion_length; "
                                               "needs a column trace or target or completion or generation, or give --traces"),
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
    assert "dropped 1 that do not grade right and 0 longer" in capsys.readouterr().out


@METHODS
def test_the_mask_of_a_trained_trace_is_its_ids(tiny, module):
    """True up to and including the first EOS, which is the last id: by construction, whatever the trace file held."""
    args = module.Args(num_hard=2, num_easy=1, eval_steps=0, trace_style="teacher", task="bills")
    traced = [problem for problem in common.load_problems(args, tiny[1])[0] if problem["trace_ids"]]
    assert traced and all(problem["trace_ids"].index(tiny[1].eos_token_id) == len(problem["trace_ids"]) - 1 for problem in traced)
