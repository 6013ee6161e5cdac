"""Does the experiment with a real model hold out its problems, and measure what the model keeps?"""

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

import experiments
import grpo
import luffy
import prefixrl
import real_model
import repo
import sft
import smollm2
from engine import parse_args
from engine.data import read_prompt
from engine.grading import grade

SCRIPTS = {"grpo.py": grpo, "repo.py": repo, "luffy.py": luffy, "prefixrl.py": prefixrl, "sft.py": sft}


def summands(row):
    return sorted(map(int, re.findall(r"\d+", read_prompt(row["prompt"])[-1]["content"])))


def test_no_sum_of_three_is_trained_and_evaluated_and_traces_are_right():
    train, held_out = real_model.make_problems()
    assert len(train) == real_model.TRAIN and {row["difficulty"] for row in train} == {"hard"}
    for difficulty, num in real_model.EVAL.items():
        assert [row["difficulty"] for row in held_out].count(difficulty) == num
    assert len({row["prompt"][-1]["content"] for row in train + held_out}) == len(train) + len(held_out)
    trained = [summands(row) for row in train]
    assert all(len(numbers) == 3 for numbers in trained) and not [row for row in held_out if summands(row) in trained]
    assert all(grade(row["trace"], row["answer"]) == 1.0 and sum(summands(row)) == int(row["answer"]) for row in train + held_out)


@pytest.mark.parametrize("arm", [arm for arm in experiments.REAL_ARMS if experiments.REAL_ARMS[arm]])
def test_the_commands_are_those_of_the_scripts(arm, monkeypatch):
    monkeypatch.chdir(real_model.ROOT)
    for command in experiments.REAL_ARMS[arm]:
        script, *words = command.split()
        assert isinstance(parse_args(SCRIPTS[script].Args, SCRIPTS[script].__doc__, script, words), SCRIPTS[script].Args)
    assert arm in real_model.TITLES and experiments.base_of(arm, 0) == f"{experiments.REAL_WORK}/model"
    assert experiments.pack_name(arm) == "real_model"


def test_what_is_kept_is_the_mean_log_prob_of_the_answers_tokens(tmp_path, monkeypatch):
    rows = [{"prompt_ids": [5, 6, 7], "ids": [8, 9]}, {"prompt_ids": [4], "ids": [3, 2, 1]}]
    (tmp_path / "general.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(real_model, "GENERAL", tmp_path / "general.jsonl")
    model, logps = AutoModelForCausalLM.from_pretrained(real_model.ROOT / "tiny_model"), []
    for row in rows:
        for place, token in enumerate(row["ids"]):
            seen = torch.tensor([row["prompt_ids"] + row["ids"][:place]])
            logps.append(model(seen).logits[0, -1].log_softmax(-1)[token].item())
    assert real_model.kept("tiny_model") == {"general": {"nats": pytest.approx(sum(logps) / 5, rel=1e-5)}}


def test_the_reteller_is_shown_no_problem():
    text = (real_model.ROOT / "bench" / "real_model.yaml").read_text()
    worked = re.findall(r"(\d+) and (\d+) make \d+\. Then \d+ and (\d+)", text)
    shown = {tuple(sorted(map(int, numbers), reverse=True)) for numbers in worked}
    train, held_out = real_model.make_problems()
    assert len(shown) == 2 and not shown & {tuple(summands(row)[::-1]) for row in train + held_out} and (9, 7, 4) in smollm2.SHOWN


def test_a_table_has_a_line_for_the_base_which_cost_nothing():
    number = {"mean": 0.5, "low": 0.4, "high": 0.6}
    summary = {"real/base": {"title": "base", "seeds": 1} | dict.fromkeys(real_model.AT_THE_END, number),
               "real/grpo": {"title": "GRPO", "seeds": 3} | dict.fromkeys(real_model.COLUMNS, number)}
    base, run = real_model.table(summary).splitlines()[2:]
    assert base.count("–") == 3 and "–" not in run and run.startswith("| GRPO | 3 |")


def test_the_base_is_right_now_and_then_and_its_traces_are_of_training_problems():
    """Between 1 and 20 % of its samples are right: the problems are neither easy nor hopeless."""
    ledger = json.loads((real_model.RESULTS / "real_model" / "traces.ledger.json").read_text())
    assert ledger["done"] and 0.01 < sum(problem["right"] for problem in ledger["problems"]) / ledger["samples"] < 0.2
    traces = [json.loads(line) for line in (real_model.ROOT / experiments.REAL_TRACES).read_text().splitlines()]
    train, _ = real_model.make_problems()
    assert len(traces) > 24 and {tuple(summands(row)) for row in traces} <= {tuple(summands(row)) for row in train}


def test_two_hundred_answers_of_the_base_are_kept():
    rows = [json.loads(line) for line in real_model.GENERAL.read_text().splitlines()]
    assert [row["question"] for row in rows] == real_model.QUESTIONS.read_text().splitlines() and len(rows) == 200
    assert all(0 < len(row["ids"]) <= 40 for row in rows)


def test_tuning_begins_at_one_rate_and_goes_on_until_both_neighbours_of_the_best_have_run():
    """The smallest rate within two points of the best counts as the best."""
    assert real_model.to_try({}) == {5e-6, 1e-5, 2e-5}
    assert real_model.to_try({1e-5: 19.3, 2e-5: 1.6, 5e-5: 8.3}) == {5e-6}
    assert real_model.to_try({5e-6: 18.0, 1e-5: 19.3, 2e-5: 1.6}) == {2e-6}
    assert real_model.to_try({2e-5: 83.0, 5e-5: 89.0, 1e-4: 95.0}) == set()


def test_the_learning_rates_are_those_that_tuning_chose():
    found = real_model.tuned()
    assert real_model.chosen(found) == {arm: experiments.LEARNING_RATES[arm] for arm in experiments.REAL_TUNED}
    assert not any(real_model.to_try(rates) for rates in found.values())


def test_page_and_summary_are_those_of_the_runs():
    summary = real_model.summarize()
    assert list(summary) == list(experiments.REAL_ARMS)
    assert json.loads((real_model.RESULTS / "real_model" / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert real_model.page(summary) == (real_model.ROOT / "docs" / "results.md").read_text()
