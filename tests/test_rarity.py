"""Does the map of rarity charge what traces would have cost, on problems without a shortcut?"""

import json

import pytest

import experiments
import rarity
from engine import tasks


def test_traces_are_charged_by_how_often_the_base_is_right(tmp_path, monkeypatch):
    """Three traces of a base that is right once in 10,000 tries of 50 MFLOP each: 1.5 TFLOP."""
    (tmp_path / "rarity").mkdir()
    (tmp_path / "rarity" / "slip0.9.json").write_text(json.dumps({"right": 1e-4, "flops_of_a_try": 5e7}))
    monkeypatch.setattr(rarity, "RESULTS", tmp_path)
    assert rarity.charge("rare-0.9/prefixrl-3") == pytest.approx(1.5)
    assert rarity.charge("rare-0.9/mixed-sft-grpo-10") == pytest.approx(5.0)
    assert rarity.charge("rare-0.9/mixed-grpo") == 0


def test_a_cell_has_the_median_cost_and_counts_seeds_that_never_get_there():
    row = {"charge": 1.5, "to_50": [0.2, None, 0.4], "hard": [90.0, 10.0, 80.0], "easy": [99.0, 97.0, 98.0], "other": [90.0, 90.0, 90.0]}
    assert rarity.to_50(row, charged=False) == 0.4 and rarity.to_50(row, charged=True) == pytest.approx(1.9)
    assert rarity.cell(row) == "0.400 / 1.900 (2 of 3); 60 · 98 · 90"
    assert rarity.cell(row | {"charge": 0, "to_50": [None, None, 0.4]}) == "never (1 of 3); 60 · 98 · 90"
    assert rarity.cell(None) == "–"


def test_tuning_goes_on_until_both_neighbours_of_the_best_rate_have_run():
    """1e-4 to 2e-3: from the middle downwards to the edge, and a run that does not hold 50 % is never the best."""
    assert rarity.to_try({}) == {2e-4, 5e-4, 1e-3}
    rates = {2e-4: (0.4, -99), 5e-4: (0.4, -98), 1e-3: (rarity.math.inf, -26)}
    assert rarity.best(rates) == 2e-4 and rarity.to_try(rates) == {1e-4}
    assert rarity.to_try(rates | {1e-4: (0.3, -99)}) == rarity.to_try(rates | {1e-4: (0.5, -99)}) == set()
    assert rarity.to_try(dict.fromkeys((2e-4, 5e-4), (1, 0)) | {1e-3: (0.1, 0)}) == {2e-3}


def test_the_map_is_that_of_the_runs():
    """Three seeds of every arm; the page and summary.json are rendered."""
    summary = rarity.summarize()
    assert list(summary) == list(experiments.RARE_ARMS) and all(len(row["hard"]) == 3 for row in summary.values())
    assert json.loads((rarity.RESULTS / "rarity" / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert rarity.page(summary) == (rarity.ROOT / "docs" / "results.md").read_text()


def test_learning_rates_are_what_tuning_chose():
    tuned = rarity.tuned()
    assert {arm: rarity.best(rates) for arm, rates in tuned.items()} == experiments.RARE_LEARNING_RATES
    assert not any(rarity.to_try(rates) for rates in tuned.values())


def test_hard_problems_have_three_gains_and_four_losses_and_no_training_problem_is_evaluated():
    train, held_out = (rarity.balanced(split, 30) for split in ("train", "eval"))
    for row in train + held_out:
        trace, answer = tasks.solve(row["prompt"])
        steps = trace.split(" ; ")[0].split()
        assert (steps.count("+"), steps.count("-")) == (3, 4) and answer == row["answer"]
    assert all(tasks.in_eval_split(row["prompt"]) for row in held_out) and not any(tasks.in_eval_split(row["prompt"]) for row in train)


def test_each_arm_has_the_rate_of_its_method_on_its_base():
    methods = {experiments.rare_method(arm) for arm in experiments.RARE_ARMS}
    assert methods == set(experiments.RARE_TUNED)
    assert experiments.rare_method("rare-0.9/mixed-prefixrl-10") == "rare-0.9/prefixrl-3"
    assert {experiments.base_of(arm, 1) for arm in experiments.RARE_ARMS} == {experiments.rare_base(slip) for slip in experiments.RARE}
