"""Is a trace checked, graded and trained as one and the same row of tokens?"""

import json
import math

import pytest

import common
import engine
import eval as eval_script
import luffy
import prefixrl
import repo
import sft
from engine import models, tasks

METHODS = pytest.mark.parametrize("module", [luffy, repo, prefixrl, sft], ids=lambda module: module.__name__)
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
THINK = CHAT.replace("<assistant>{%", "<assistant><think>\n{%")
BOS, EOS, END = 256, 257, 258


@pytest.fixture
def chat(byte_tokenizer):
    """A byte a token. The template ends turns with 258, EOS is 257, sampling stops at both."""
    byte_tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    byte_tokenizer.chat_template, byte_tokenizer.stop_ids = CHAT, [EOS, END]
    return byte_tokenizer


@pytest.fixture
def load(chat, tmp_path):
    """load(rows of a data set with traces, or [] and the records of a trace file, flags) -> the problems, with their traces."""
    def call(*records, module=luffy, rows=None, **flags):
        def write(name, lines):
            (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
            return str(tmp_path / name)

        rows = [{"prompt": "Q", "answer": "7"}] if rows is None else rows
        args = module.Args(**{"dataset_name": write("d.jsonl", rows), "traces": write("t.jsonl", records), "eval_steps": 0,
                              "max_completion_length": 200} | flags)
        return common.load_problems(args, chat)[0]

    return call


def ids_of(chat, text):
    return chat(text, add_special_tokens=False)["input_ids"]


def record(trace="so \\boxed{7}", **more):
    return {"prompt": "Q", "trace": trace} | more


# ---------------------------------------------------------------- the end


@METHODS
def test_text_ends_as_the_template_ends_a_turn(chat, load, module):
    (problem,) = load(record(), module=module)
    assert problem["trace_ids"] == ids_of(chat, "so \\boxed{7}") + [END]


@pytest.mark.parametrize("template, known, end", [
    ("none", [EOS, END], EOS), ("r1", [EOS, END], EOS), ("qwen_math", [EOS, END], END), ("auto", [EOS], EOS), ("chat", [EOS, END], END)])
def test_the_end_is_one_at_which_sampling_stops(chat, load, template, known, end):
    chat.stop_ids = known
    assert load(record(), template=template)[0]["trace_ids"][-1] == end


@METHODS
@pytest.mark.parametrize("behind", ["<|im_end|>", "<|im_end|>\n", " </s>", "<|im_end|></s>"])
def test_an_end_that_a_text_writes_behind_its_solution_stands_once(chat, load, module, behind):
    (problem,) = load(record("so \\boxed{7}" + behind), module=module)
    assert problem["trace"] == "so \\boxed{7}" and problem["trace_ids"] == ids_of(chat, "so \\boxed{7}") + [END]


@pytest.mark.parametrize("end", [EOS, END])
def test_ids_of_a_file_keep_their_end_and_log_probs(chat, load, capsys, end):
    ids = ids_of(chat, "so \\boxed{7}") + [end]
    (problem,) = load(record(trace_ids=ids, logps=[-0.5] * len(ids)))
    assert (problem["trace_ids"], problem["behavior_logps"]) == (ids, [-0.5] * len(ids))
    assert "anew" not in capsys.readouterr().out


def test_our_own_trace_file_is_read_as_it_was_sampled(run_script, tmp_path):
    """A model that ends with another id than the tokenizer's EOS: eval.py saves that id, and no trace loses it or its log-probs."""
    model, tokenizer = models.load_model("tiny_model")
    semicolon = tokenizer.convert_tokens_to_ids(";")
    model.generation_config.eos_token_id = [1, semicolon, tokenizer.convert_tokens_to_ids("}")]
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    (tmp_path / "r.py").write_text("def all_right(completions, **columns): return [1.0] * len(completions)\n")
    small = ("--model", "m", "--task", "diary", "--num_hard", 0, "--num_easy", 3, "--reward_fn", "r.py:all_right")
    code, _, err = run_script(eval_script, *small, "--save_traces", "t.jsonl", "--num_generations_eval", 4)
    assert code == 0, err
    saved = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert {line["trace_ids"][-1] for line in saved} - {1}
    code, out, err = run_script(luffy, *small, "--traces", "t.jsonl", "--shaping", "importance", "--dry_run")
    assert code == 0 and "traces: 3 of 3 problems have one" in out and "anew" not in out, err


def test_a_prefix_of_more_than_bos_is_kept_once(byte_tokenizer):
    from tokenizers import processors

    byte_tokenizer.add_special_tokens({"additional_special_tokens": ["[gMASK]", "<sop>"]})
    byte_tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[gMASK] <sop> $A", special_tokens=[("[gMASK]", 258), ("<sop>", 259)])
    assert common.encode_prompt(byte_tokenizer, "hi")[:2] == [258, 259] and len(common.encode_prompt(byte_tokenizer, "hi")) == 4
    assert common.encode_prompt(byte_tokenizer, "[gMASK]<sop>hi") == common.encode_prompt(byte_tokenizer, "hi")
    assert common.encode_prompt(byte_tokenizer, "\n[gMASK]<sop>hi")[1:] == common.encode_prompt(byte_tokenizer, "hi")


# ---------------------------------------------------------------- ids, log-probs


@pytest.mark.parametrize("change", [
    lambda ids: [EOS, *ids], lambda ids: [BOS, *ids], lambda ids: [*ids[:3], BOS, *ids[3:]], lambda ids: [*ids[:3], END, *ids[3:]],
    lambda ids: [EOS] * 5, lambda ids: [], lambda ids: [99999, *ids[1:]], lambda ids: [-1, *ids[1:]], lambda ids: [float(i) for i in ids],
    lambda ids: ids[0], lambda ids: [str(i) for i in ids], lambda ids: [None, *ids], lambda ids: [True, *ids[1:]], lambda ids: {"a": ids},
    lambda ids: [10**30, *ids[1:]], lambda ids: ids[1:], lambda ids: [*ids, EOS],
], ids=range(17))
@METHODS
def test_ids_that_are_not_the_row_are_tokenised_anew(chat, load, capsys, module, change):
    right = ids_of(chat, "so \\boxed{7}") + [END]
    (problem,) = load(record(trace_ids=change(right), logps=[-0.5] * len(right)), module=module)
    assert (problem["trace"], problem["trace_ids"], problem["behavior_logps"]) == ("so \\boxed{7}", right, None)
    assert "tokenised 1 anew" in capsys.readouterr().out


@pytest.mark.parametrize("logps", [
    [-0.5] * 12, [-0.5] * 14, [None] * 13, [-0.5] * 12 + [math.nan], [-0.5] * 12 + [0.3], ["-0.5"] * 13, -0.5, [False] * 13, {}, "text"],
    ids=str)
def test_log_probs_that_are_none_are_left_out(chat, load, capsys, logps):
    ids = ids_of(chat, "so \\boxed{7}") + [END]
    assert len(ids) == 13
    (problem,) = load(record(trace_ids=ids, logps=logps))
    assert problem["trace_ids"] == ids and problem["behavior_logps"] is None
    assert "left out the log-probs of 1: expected a number of at most 0" in capsys.readouterr().out
    with pytest.raises(engine.BadArgument, match="--shaping importance needs traces with log-probs"):
        common.require_behavior_logps([problem], "--shaping importance")


@METHODS
@pytest.mark.parametrize("text", ["first turn<|im_end|> so \\boxed{7}", "a</s>\\boxed{7}", "<s>\\boxed{7}", "<|im_end|>\\boxed{7}"])
def test_a_text_that_writes_an_end_is_dropped_in_every_method(load, capsys, module, text):
    problems = load(record(text), {"prompt": "R", "trace": "\\boxed{8}"}, module=module,
                    rows=[{"prompt": "Q", "answer": "7"}, {"prompt": "R", "answer": "8"}])
    assert [problem["trace"] for problem in problems] == [None, "\\boxed{8}"]
    assert "dropped 1 that hold an end or another special token inside" in capsys.readouterr().out


def test_a_special_token_inside_a_trace_is_not_trained(chat, load, capsys):
    """Decoding hides it, so that the graded text is clean. A tag of thinking is a word, special or not."""
    chat.add_special_tokens({"additional_special_tokens": ["<|im_end|>", "<|im_start|>", "<think>"]})
    start = chat.convert_tokens_to_ids("<|im_start|>")
    (problem,) = load(record("<|im_start|>so \\boxed{7}"), record("<think>so</think> \\boxed{7}"))
    assert chat.decode(problem["trace_ids"]) == "<think>so</think> \\boxed{7}<|im_end|>" and problem["other_traces"] == []
    assert "dropped 1 that hold an end or another special token inside" in capsys.readouterr().out
    (problem,) = load(record(trace_ids=[start, *ids_of(chat, "so \\boxed{7}"), END]))  # the file's ids are not used
    assert chat.decode(problem["trace_ids"]) == "so \\boxed{7}<|im_end|>"


def test_an_unknown_word_may_share_its_id_with_eos(chat, load, capsys):
    """As GPT-2's: every trace ends with that id."""
    chat.unk_token = chat.eos_token
    (problem,) = load(record(trace_ids=[*ids_of(chat, "so \\boxed{7}"), EOS]), record("a </s> \\boxed{7}"))
    assert problem["trace_ids"][-1] == EOS and problem["other_traces"] == []
    assert "dropped 1 that hold an end or another special token inside" in capsys.readouterr().out


def test_what_is_graded_is_the_row_not_the_text(tiny, tmp_path):
    """The tiny tokenizer does not know 77: the row of the trace says another answer than its text, and would teach an unknown word."""
    row = tasks.problems("bills", "train", "easy", 1)[0]
    (tmp_path / "d.jsonl").write_text(json.dumps({"prompt": row["prompt"], "answer": "77", "trace": "so \\boxed{ 77 }"}))
    for keep, fault in ((False, "do not grade right"), (True, "hold words unknown to the tokenizer")):
        args = luffy.Args(dataset_name=str(tmp_path / "d.jsonl"), eval_steps=0, keep_wrong_traces=keep)
        with pytest.raises(engine.BadArgument, match=f"no trace is left of .*: 1 {fault}"):
            common.load_problems(args, tiny[1])


@METHODS
def test_a_trace_that_was_cut_off_never_teaches_to_stop_there(chat, load, module):
    """Its ids have no end, or the file says so. A right trace whose ids lack an end is whole."""
    kept = {"prompt": "R", "trace": "\\boxed{0}"}
    rows = [{"prompt": name, "answer": "7"} for name in "QR"]
    for cut in (record("so 3 and", trace_ids=ids_of(chat, "so 3 and")), record("so 3 and", ended=False)):
        problems = load(cut, kept, rows=rows, module=module, keep_wrong_traces=True)
        assert [problem["trace"] for problem in problems] == [None, "\\boxed{0}"]
    (problem,) = load(record(trace_ids=ids_of(chat, "so \\boxed{7}")), module=module)
    assert problem["trace_ids"][-1] == END


# ---------------------------------------------------------------- thinking


@pytest.mark.parametrize("template", ["chat", "r1"])
@pytest.mark.parametrize("trace, expected", [
    ("<think>\nadd\n</think>\n\\boxed{7}", "add\n</think>\n\\boxed{7}"), ("add </think> \\boxed{7}", "add </think> \\boxed{7}"),
    ("so \\boxed{7}", "</think>\n\nso \\boxed{7}")])
@pytest.mark.parametrize("with_ids", [False, True])
def test_a_tag_that_the_prompt_opens_stands_once_and_is_closed(chat, load, template, trace, expected, with_ids):
    """Ids of a file without the tag are what was sampled, and stay; ids with it are tokenised anew."""
    chat.chat_template = THINK
    ids = {"trace_ids": ids_of(chat, trace) + [END]} if with_ids else {}
    (problem,) = load(record(trace, **ids), template=template)
    row = chat.decode(problem["prompt_ids"] + problem["trace_ids"][:-1])
    if with_ids and not trace.startswith("<think>"):
        assert problem["trace"] == trace
        return
    assert problem["trace"] == expected and row.endswith(expected)
    told = row.split("<assistant>")[-1] if template == "chat" else row.split("Assistant:")[-1]
    assert told.count("<think>") == told.count("</think>") == 1


def test_a_template_that_opens_no_tag_adds_one_only_where_thinking_was_opened_elsewhere(chat, load):
    """R1 and QwQ, say, have the tag in their prompt, so that their samples hold its end alone."""
    told = "add\n</think>\n\\boxed{7}"
    for more in ({}, {"trace_ids": ids_of(chat, told) + [END]}):
        assert load(record(told, **more))[0]["trace"] == f"<think>\n{told}"
    assert load(record("<think>\nadd\n</think>\n\\boxed{7}"))[0]["trace"] == "<think>\nadd\n</think>\n\\boxed{7}"


def test_the_retelling_closes_the_thinking_that_its_marker_cuts(chat, load):
    chat.chat_template = THINK
    (problem,) = load(record(), module=repo)
    asked = chat.decode(common.prompt_with_trace(chat, problem, repo.Args(), "solve: {prompt} {trace}"))
    assert "solve: Q so \\boxed{7}<|im_end|>" in asked
    told = "I read it </think> ### Solution\nso \\boxed{7}"
    sample = common.Sample(problem, [1], ids_of(chat, told) + [END], told, True)
    (cut,) = common.cut_before("### Solution", [sample], chat)
    row = chat.decode(problem["prompt_ids"] + cut.ids)
    assert row.endswith("<assistant><think>\n</think>\n\nso \\boxed{7}<|im_end|>") and cut.text == "</think>\n\nso \\boxed{7}"
    (cut,) = common.cut_before("### Solution", [common.Sample(problem, [1], [5, 6], "I read it ### Solution\n", False)], chat)
    assert cut.ids == []  # which replaces nothing
    chat.chat_template = CHAT
    (problem,) = load(record(), module=repo)
    (cut,) = common.cut_before("### Solution", [common.Sample(problem, [1], ids_of(chat, told) + [END], told, True)], chat)
    assert cut.text == "so \\boxed{7}"


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_thinking_that_stands_apart_is_kept(load, name):
    turn = {"role": "assistant", "content": "\\boxed{7}"}
    assert load(record([turn | {name: "add"}]))[0]["trace"] == "<think>\nadd\n</think>\n\n\\boxed{7}"
    assert load(record([turn | {name: None}]))[0]["trace"] == "\\boxed{7}"
    with pytest.raises(engine.BadArgument, match="no trace|none of its|found none"):
        load(record([turn | {name: ["add"]}]))


# ---------------------------------------------------------------- the ledger beside the file


@pytest.mark.parametrize("text", ["x", "{}", "[]", "", "null", '{"flops": "many", "flops_paper": 1}', '{"flops": null, "flops_paper": 1}'])
def test_a_ledger_that_is_none_is_one_line(refused, tmp_path, text):
    row = tasks.problems("diary", "train", "easy", 1)[0]
    (tmp_path / "t.jsonl").write_text(json.dumps({"prompt": row["prompt"], "trace": row["own_trace"]}))
    (tmp_path / "t.ledger.json").write_text(text)
    line = refused(sft, "--task", "diary", "--num_hard", 0, "--num_easy", 1, "--traces", "t.jsonl")
    assert "t.ledger.json" in line


def test_a_trace_that_thinks_where_the_template_has_closed_thinking_is_dropped(chat, load, capsys):
    chat.chat_template = THINK.replace("<think>\n", "<think>\n\n</think>\n\n")
    (problem,) = load(record("<think>add</think>\\boxed{7}"), record("add \\boxed{7}"))
    assert problem["trace"] == "add \\boxed{7}" and problem["other_traces"] == []
    assert "dropped 1 that think, where the template has closed thinking" in capsys.readouterr().out


def test_a_trace_whose_special_tokens_give_it_structure_is_dropped(chat, load, capsys):
    """Its text, without the marks of its channels, would be another row."""
    chat.add_special_tokens({"additional_special_tokens": ["<|im_end|>", "<|channel|>"]})
    mark = chat.convert_tokens_to_ids("<|channel|>")
    ids = [*ids_of(chat, "analysis"), mark, *ids_of(chat, "final \\boxed{7}"), END]
    (problem,) = load(record("analysisfinal \\boxed{7}", trace_ids=ids), record("add \\boxed{7}"))
    assert problem["trace"] == "add \\boxed{7}" and problem["other_traces"] == []
    assert "dropped 1 that hold an end or another special token inside" in capsys.readouterr().out


@pytest.mark.parametrize("template", [CHAT, THINK])
def test_a_trace_that_never_stops_thinking_was_cut_off(chat, load, capsys, template):
    """Trained, the row would teach to end a turn while thinking."""
    chat.chat_template = template
    (problem,) = load(record("<think>\nmaybe \\boxed{7}. Wait, let me"), record("<think>\nmaybe</think> \\boxed{7}"))
    assert problem["trace"] == "<think>\nmaybe</think> \\boxed{7}"[8 * (template == THINK) :] and not problem.get("other_traces")
    assert "dropped 1 that were cut off" in capsys.readouterr().out
