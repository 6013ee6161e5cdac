"""Does the comparison compare what may be compared, and are the committed tables what the committed runs say?"""

import itertools
import json
import shlex
import shutil
import statistics
import zipfile
from pathlib import Path

import numpy as np
import pytest

import compare
import experiments
import figures
import measure
import pages
import processes
import run_numbers
from engine import tasks
from engine.grading import load_reward_fn

ROOT = Path(compare.__file__).parent.parent
STAGE = {"args": {name: "x" for name in (*compare.EVALUATION_FLAGS, *compare.PROBLEM_FLAGS, "model_name_or_path")} | {"dataset_name": None},
         "base_model": {"sha256": "b"}, "data": {"eval": {"sha256": "e"}, "train": {"sha256": "t"}}, "versions": {"torch": "2"}, "ranks": 1}


def a_run(*stages, folder="one", evaluation=None, code="c", **changes):
    """A Run with these stages' metrics and `STAGE` changed."""
    return run_numbers.Run(Path(folder), [STAGE | changes for _ in stages], list(stages), [{"code": code} for _ in stages], evaluation)


def test_steps_and_flops_of_a_second_stage_are_counted_on(tmp_path):
    """Its evaluation before the first step is that of the stage before; traces are paid for before the first step."""
    first = [{"step": 0, "eval": 0}, {"step": 1, "flops/total": 3e12, "flops/traces": 2e12}]
    second = [{"step": 0, "eval": 1}, {"step": 1, "flops/total": 1e12, "flops/traces": 0}]
    points = a_run(first, second).points()
    assert [(point["step"], point["tflop"]) for point in points] == [(0, 2.0), (1, 3.0), (2, 4.0)]
    assert run_numbers.NUMBERS["tflop"][2](a_run(first, second)) == 4.0


@pytest.mark.parametrize("name, changes", [
    ("base model", {"base_model": {"sha256": "other"}}), ("evaluation problems", {"data": {"eval": {"sha256": "other"}}}),
    ("evaluation flags", {"args": STAGE["args"] | {"temperature": 0.5}}), ("training problems", {"args": STAGE["args"] | {"num_hard": 1}}),
    ("code", {"code": "other"}), ("versions", {"versions": {"torch": "3"}}), ("ranks", {"ranks": 2})])
def test_runs_that_differ_are_refused_by_name(name, changes):
    same = [a_run([]), a_run([], folder="two", args=STAGE["args"] | {"learning_rate": 1, "seed": 1}), a_run([], [])]
    compare.refuse_unlike(same)
    with pytest.raises(SystemExit, match=f"other and one differ in {name}: "):
        compare.refuse_unlike([*same, a_run([], folder="other", **changes)])
    compare.refuse_unlike([*same, a_run([], base_model={"sha256": "other"}, args=STAGE["args"] | {"model_name_or_path": "seed1"})])


def test_flags_of_the_built_in_task_do_not_count_beside_a_data_set():
    """prefixrl.py and grpo.py have other defaults of them."""
    args = STAGE["args"] | {"dataset_name": "a.jsonl"}
    runs = [a_run([], args=args), a_run([], args=args | {"task": "diary", "num_hard": 1})]
    compare.refuse_unlike(runs)
    with pytest.raises(SystemExit, match="differ in evaluation flags"):
        compare.refuse_unlike([*runs, a_run([], args=args | {"dataset_name": "b.jsonl"})])


def test_code_is_the_same_but_for_comments_and_docstrings(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    versions = []
    (tmp_path / "engine").mkdir()
    for file in ("a.py", "engine/a.py"):
        for text in ('"""Doc."""\nx = 1\n', "# why\nx  =  1\n", 'x = 2\n', 'x = """Doc."""\n'):
            (tmp_path / file).write_text(text)
            versions.append(measure.code_version())
    assert versions[0] == versions[1] and versions[4] == versions[5] and len(set(versions)) == 6


def test_interval_is_the_bootstrap_of_the_mean_over_seeds():
    values = [10.0, 20.0, 30.0, 40.0, 90.0]
    found = run_numbers.interval(values)
    means = np.sort([statistics.mean(sample) for sample in itertools.product(values, repeat=5)])  # all that can be drawn
    assert found["mean"] == 38 and found["values"] == values
    assert found["low"] == pytest.approx(means[78], abs=2) and found["high"] == pytest.approx(means[-79], abs=2)  # means lie 2 apart
    assert run_numbers.interval([5.0] * 5)["low"] == 5.0 and pages.cell(run_numbers.interval([5.0] * 5), 0) == "5"
    assert pages.cell(run_numbers.interval([float("nan"), 1.0]), 0) == "–"
    assert pages.cell(found, 0) == f"38 [{found['low']:.0f}, {found['high']:.0f}]"


def test_differences_and_the_probability_of_improvement_by_hand():
    """Of the nine pairs of 3, 5, 5 and 1, 4, 5 the first is greater in five and equal in two."""
    points, better = run_numbers.differences([3.0, 5.0, 5.0], [1.0, 4.0, 5.0])
    assert points["values"] == [2.0, 1.0, 0.0] and points["mean"] == 1.0
    assert better["mean"] == pytest.approx(6 / 9) and 0 <= better["low"] < 6 / 9 < better["high"] <= 1
    assert run_numbers.differences([2.0] * 3, [1.0] * 3)[1] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    row = {"title": "A", "seeds": 3, "hard": {"values": [3.0, 5.0, 5.0]}}
    summary = {"a": row, "b": row | {"title": "B", "hard": {"values": [1.0, 1.0, 1.0]}}, "c": row | {"seeds": 1}}
    assert pages.comparison(summary, "a", ("hard",)).splitlines()[2:] == ["| B | 3 [2, 4] | 100 |"]


def test_a_run_starts_from_the_base_of_its_seed(tmp_path, monkeypatch):
    """Nine seeds, three bases; an arm on one base is not asked."""
    assert [experiments.base_of("bills/grpo-bases", seed)[-1] for seed in range(4)] == ["l", "1", "2", "l"]
    assert experiments.base_of("bills/grpo", 1) == "tiny_model"
    assert experiments.learning_rate("diary/sft-grpo-bases", "grpo.py") == experiments.learning_rate("diary/sft-grpo", "grpo.py")
    calls = []
    monkeypatch.setattr(measure, "call", lambda words, *_, **more: calls.append(words) or (1.0, 1))
    monkeypatch.setattr(measure, "run", lambda words, *_, **more: calls.append(words))
    monkeypatch.setattr(compare, "WORK", Path("runs") / "compare-bases")
    with pytest.raises(FileNotFoundError, match="eval.json"):  # no evaluation was made
        compare.run("bills/grpo-bases", 4, tmp_path)
    shutil.rmtree(ROOT / "runs" / "compare-bases")
    built, trained, _ = [" ".join(words) for words in calls]
    assert built == f"python tiny_model/build.py --build {experiments.BASES[1]} --seed 1"
    assert trained.endswith(f"--seed 4 --model {experiments.BASES[1]} --learning_rate 0.0001")


def test_stages_that_share_a_rate_are_tuned_together_and_more_is_added_to_the_evaluation(tmp_path, monkeypatch):
    calls, kept = [], []

    def call(words, *_, **more):
        calls.append(words)
        (ROOT / words[-1]).write_text(json.dumps({"summary": {"hard": {"avg@8": 0.5}}}))
    monkeypatch.setattr(measure, "call", call)
    monkeypatch.setattr(measure, "run", lambda words, *_, **more: calls.append(words))
    monkeypatch.setattr(compare, "WORK", Path("runs") / "compare-rate")
    monkeypatch.setattr(compare, "build_base", lambda base: base)
    monkeypatch.setattr(compare, "keep", lambda records, *_: kept.append(json.loads((records / "eval.json").read_text())))
    compare.run("rare-0.9/sft-grpo-3", 100, tmp_path, 7e-4, "tuning/x", more=lambda model: {"model": str(model)})
    shutil.rmtree(ROOT / "runs" / "compare-rate")
    *stages, evaluation = calls
    assert [stage[stage.index("--learning_rate") + 1] for stage in stages] == ["0.0007", "0.0007"]
    assert evaluation[evaluation.index("--dataset_name") + 1] == experiments.RARE_PROBLEMS.format("eval") and "--task" not in evaluation
    assert kept == [{"hard": {"avg@8": 0.5}, "model": "runs/compare-rate/tuning/x/seed100/2-grpo"}]


def test_spikes_and_falls_by_hand():
    spent = {"flops/traces": 0, "flops/total": 1}
    norms = [1.0] * 15 + [3.1] + [1.0] * 5 + [2.9] + [0.0] * 9 + [4.0]
    assert run_numbers.spikes(a_run([spent | {"step": i, "grad_norm": norm} for i, norm in enumerate(norms, 1)])) == 2
    curve = [spent | {"step": i, "eval/easy/avg@1": accuracy} for i, accuracy in enumerate((0.5, 0.9, 0.7, 0.8, 0.95, 0.9))]
    assert run_numbers.fall(a_run(curve)) == pytest.approx(20)


def test_flops_to_an_accuracy_and_accuracy_at_flops_are_read_between_evaluations():
    """Traces are paid for before the first step; 20 % is passed twice, and the first time counts."""
    curve = [(0, None, 0.1), (10, 3e12, 0.3), (15, 4e12, None), (20, 5e12, 0.15), (30, 6e12, 0.55)]
    run = a_run([{"step": step, "flops/traces": 1e12} | ({} if total is None else {"flops/total": total})
                 | ({} if accuracy is None else {"eval/hard/avg@1": accuracy}) for step, total, accuracy in curve])
    assert run_numbers.tflop_to(20)(run) == pytest.approx(2.0) and run_numbers.tflop_to(50)(run) == pytest.approx(5.875)
    assert run_numbers.tflop_to(5)(run) == 1.0 and np.isnan(run_numbers.tflop_to(60)(run))
    assert [run_numbers.hard_at(budget)(run) for budget in (0.5, 2, 4, 9)] == pytest.approx([10, 20, 22.5, 55])
    assert run_numbers.NUMBERS["reached"][2](run) == 0


def test_the_base_is_evaluated_without_any_stage(tmp_path, monkeypatch):
    def evaluate(words, output, quiet):
        assert words[1:6] == ["eval.py", "--model", "tiny_model", "--task", "bills"]
        (ROOT / words[-1]).write_text(json.dumps({"summary": {"hard": {"avg@8": 0.5}}}))
    monkeypatch.setattr(measure, "call", evaluate)
    monkeypatch.setattr(compare, "WORK", Path("runs") / "compare-test")
    compare.run("bills/base", 0, tmp_path)
    (run,) = run_numbers.seeds_of("bills/base", tmp_path)
    assert run.stages == [] and run.evaluation == {"hard": {"avg@8": 0.5}}
    shutil.rmtree(ROOT / "runs" / "compare-test")


def test_curves_are_of_the_runs_that_have_the_metric():
    """A step without signal has no entropy, and a gradient norm of 0."""
    spent = {"flops/traces": 0, "flops/total": 2e12}
    one = a_run([spent | {"step": 1, "entropy": 0.5, "grad_norm": 0.0}, spent | {"step": 2, "entropy": None, "grad_norm": 3.0}])
    other = a_run([spent | {"step": 1, "entropy": 0.3, "grad_norm": 1.0}, spent | {"step": 2, "entropy": None, "grad_norm": 0.0}])
    assert figures.curves([one, other], "entropy", 100) == [(1, 2.0, [50.0, 30.0])]
    assert figures.curves([one, other], "grad_norm", zeros=False) == [(1, 2.0, [1.0]), (2, 2.0, [3.0])]
    assert figures.curves([one, other], "grad_norm") == [(1, 2.0, [0.0, 1.0]), (2, 2.0, [3.0, 0.0])]


def test_the_base_has_an_end_and_no_way_to_it(tmp_path, monkeypatch):
    """Its evaluation is a line of the table; what training would have cost is not known of it."""
    ends = {difficulty: {"avg@8": 0.5, "pass@8": 0.75, "foreign": 0.25} for difficulty in tasks.DIFFICULTIES}
    records = tmp_path / "records"
    records.mkdir()
    (records / "eval.json").write_text(json.dumps(ends))
    compare.keep(records, "bills/base/seed0", run_numbers.pack_file("bills/base", tmp_path))
    experiment = experiments.Experiment("A title", "A hypothesis.", {"bills/base": "base"}, figures.learning, experiments.OUTCOME)
    monkeypatch.setitem(compare.EXPERIMENTS, "test", experiment)
    row = compare.summarize("test", tmp_path)["bills/base"]
    assert row["hard"]["mean"] == 50 and row["hard_pass"]["mean"] == 75 and row["tflop"]["mean"] is None
    assert pages.table({"bills/base": row}, experiments.OUTCOME).endswith("| base | 1 | 50 | 75 | 50 | 50 | 25 | – | – |")
    compare.refuse_unlike([*run_numbers.seeds_of("bills/base", tmp_path), a_run([])])


def test_wrong_traces_are_wrong_nested_and_as_many_as_said(tmp_path):
    compare.write_wrong_traces(tmp_path)
    truth = {row["prompt"]: row["teacher_trace"] for kind, num in (("hard", 512), ("easy", 256))
             for row in tasks.problems("bills", "train", kind, num)}
    wrong = []
    for share in experiments.SHARES:
        rows = [json.loads(line) for line in (tmp_path / f"wrong-{share}.jsonl").read_text().splitlines()]
        assert {row["prompt"] for row in rows} == set(truth)
        wrong.append({(row["prompt"], row["trace"]) for row in rows if row["trace"] != truth[row["prompt"]]})
        assert len(wrong[-1]) == 512 * share // 100 and all("costs" in trace and "hence" in trace for _, trace in wrong[-1])
    assert wrong[0] < wrong[1] < wrong[2]


def test_the_step_reward_reads_more_than_the_box():
    (row,) = tasks.problems("bills", "train", "hard", 1)
    drifted = row["own_trace"].replace(row["own_trace"].split()[1], "jarn", 1)
    assert drifted != row["own_trace"] and drifted.partition("\\boxed")[2] == row["own_trace"].partition("\\boxed")[2]
    completions = [row["own_trace"], row["teacher_trace"], drifted, ""]
    right_steps = load_reward_fn(f"{ROOT}/examples/step_reward.py:right_steps")
    assert right_steps(prompts=[row["prompt"]] * 4, completions=completions, answer=[row["answer"]] * 4) == [1.0, 1.0, 0.0, 0.0]


def test_rates_are_those_of_the_arm_then_of_its_method(monkeypatch):
    monkeypatch.setattr(experiments, "LEARNING_RATES", {"bills/grpo": 1.0, "bills/sft": 2.0, "bills/repo": 3.0, "bills/repo-raw": 4.0,
                                                    "diary/sft-grpo": 5.0, "diary/sft": 6.0})
    for arm, script, rate in (("bills/sft-grpo", "sft.py", 2.0), ("bills/sft-grpo", "grpo.py", 1.0), ("bills/repo-own", "repo.py", 3.0),
                              ("bills/repo-raw", "repo.py", 4.0), ("diary/repo", "repo.py", None), ("diary/sft-grpo", "sft.py", 6.0),
                              ("diary/sft-grpo", "grpo.py", 5.0), ("bills/repo-default", "repo.py", None)):
        assert experiments.learning_rate(arm, script) == rate


def test_the_chosen_rate_is_the_smallest_of_the_best():
    found = {"a": {1e-4: 50.0, 2e-4: 89.0, 5e-4: 90.0, 1e-3: 10.0}, "b": {1e-4: 0.0, 2e-4: 0.0}}
    assert run_numbers.chosen(found) == {"a": 2e-4, "b": 1e-4}


def test_a_run_of_two_stages_is_made_once_and_leaves_no_half(tmp_path, monkeypatch):
    """The second stage starts from the model of the first; a run without its evaluation is begun again."""
    def call(words, output, quiet):
        """Like measure.call, which test_results.py tests, but forked."""
        done = processes.run(*words[1:], *["--eval_problems", 1, "--max_completion_length", 16] * (words[1] == "eval.py"))
        assert done.returncode == 0, done.stderr
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(done.stdout)
        return 1.0, 1

    monkeypatch.setattr(measure, "call", call)
    flags = ("--task bills --num_hard 2 --num_easy 2 --prompts_per_step 2 --max_steps 2 --eval_steps 1 --eval_problems 1 "
             "--max_completion_length 40")
    monkeypatch.setitem(compare.ARMS, "bills/sft-test", [f"sft.py {flags}", f"grpo.py {flags} --model {{before}} --learning_rate 0.002"])
    monkeypatch.setattr(experiments, "LEARNING_RATES", {"bills/sft": 1e-3, "bills/grpo": 5.0})
    experiment = experiments.Experiment("A title", "A hypothesis.", {"bills/sft-test": "An arm"}, figures.compute, experiments.OUTCOME)
    monkeypatch.setitem(compare.EXPERIMENTS, "test", experiment)
    work = ROOT / "runs" / "compare" / "bills" / "sft-test"
    (work / "seed3" / "records" / "1-sft").mkdir(parents=True, exist_ok=True)  # of a process that was killed
    compare.run("bills/sft-test", 3, tmp_path)
    (run,) = run_numbers.seeds_of("bills/sft-test", tmp_path)
    assert [point["step"] for point in run.points()] == [0, 1, 2, 3, 4] and set(run.evaluation) == {"easy", "hard", "other"}
    assert run.args[1]["args"]["learning_rate"] == 0.002  # the arm's own
    assert run.args[0]["args"]["learning_rate"] == 1e-3 and run.args[1]["args"]["seed"] == 3
    assert run.args[1]["base_model"] != run.args[0]["base_model"] and run.measured[0]["code"] == measure.code_version()
    assert run.stages[1][0]["eval/easy/avg@1"] == run.stages[0][-1]["eval/easy/avg@1"]
    assert not (work / "seed3").exists()
    before = (tmp_path / "runs" / "test.zip").stat().st_mtime_ns
    compare.run("bills/sft-test", 3, tmp_path)
    assert (tmp_path / "runs" / "test.zip").stat().st_mtime_ns == before
    shutil.rmtree(work)
    jobs = [("bills/sft-test", 3, tmp_path), ("bills/sft-test", 4, tmp_path)]
    compare.refuse_other_code(jobs, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(measure, "code_version", lambda: "other")
        compare.refuse_other_code(jobs[:1], tmp_path)  # nothing is to be run
        with pytest.raises(SystemExit, match="seed3/ was made by other code"):
            compare.refuse_other_code(jobs, tmp_path)
    compare.render("test", tmp_path)
    (row,) = json.loads((tmp_path / "test" / "summary.json").read_text()).values()
    assert row["title"] == "An arm" and row["seeds"] == 1 and row["tflop"]["mean"] == run.points()[-1]["tflop"]
    assert row["easy"]["values"] == [100 * run.evaluation["easy"]["avg@8"]] and (tmp_path / "test" / "figure.png").stat().st_size > 10_000


def test_a_pack_has_the_bytes_of_all_its_runs_in_whatever_order_they_finish(tmp_path):
    for seed in (0, 1, 10):
        stage = tmp_path / str(seed) / "1-sft"
        stage.mkdir(parents=True)
        (stage.parent / "eval.json").write_text(f"{seed}")
        (stage / "metrics.jsonl.gz").write_bytes(bytes(range(256)) * seed)
    for pack, order in (("one.zip", (0, 1, 10)), ("other.zip", (10, 0, 1, 0))):
        for seed in order:
            compare.keep(tmp_path / str(seed), f"bills/sft/seed{seed}", tmp_path / pack)
    with zipfile.ZipFile(tmp_path / "one.zip") as pack:
        assert {name: pack.read(name) for name in pack.namelist()} == {
            f"bills/sft/seed{path.relative_to(tmp_path)}": path.read_bytes() for path in tmp_path.glob("*/**/*") if path.is_file()}
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "other.zip").read_bytes()
    assert {path.name for path in tmp_path.glob("*")} == {"0", "1", "10", "one.zip", "other.zip"}


def test_recorded_commands_are_shown_in_todays_names():
    old = "python repo.py --failure_rate 1 --reward_fn bench/step_reward.py:right_steps --seed 0"
    new = "python repo.py --failure_threshold 1 --reward_fn examples/step_reward.py:right_steps --seed 0"
    assert run_numbers.in_todays_names(old) == new


# ---------------------------------------------------------------- what is committed


DONE = [name for name in compare.EXPERIMENTS if (ROOT / "results" / name / "summary.json").exists()]


@pytest.fixture(scope="module")
def summaries():
    """{experiment: its summary}, read from the committed zip files."""
    return {name: json.loads(json.dumps(compare.summarize(name))) for name in DONE}


def test_every_run_is_in_a_table():
    assert len(DONE) > 9
    shown = {arm for name in DONE for arm in compare.EXPERIMENTS[name].arms}
    for arm in {arm for experiment in compare.EXPERIMENTS.values() for arm in experiment.arms} - shown:
        assert not run_numbers.folders_of(arm), f"python bench/compare.py --render shows {arm} once all arms of its experiment have run"


@pytest.mark.parametrize("name", DONE)
def test_summaries_are_those_of_the_runs(name, summaries):
    assert json.loads((ROOT / "results" / name / "summary.json").read_text()) == summaries[name]
    assert list(summaries[name]) == list(compare.EXPERIMENTS[name].arms)


def test_pages_rebuild_from_the_packed_runs(summaries):
    made = pages.pages(summaries)
    for page, text in made.items():
        assert (ROOT / page).read_text() == text, f"python bench/compare.py --render writes another {page}"
    for name in (*summaries, "tuning", "tries"):
        assert f"<!-- {name}: made by" in made["docs/results.md"], name
    assert "<!-- cases: made by" in made["docs/which.md"]


def test_every_run_is_that_of_its_arm_and_in_the_arms_pack():
    checked = 0
    for pack in sorted((ROOT / "results" / "runs").iterdir()):
        folders = {name.rsplit("/", 1)[0] for name in zipfile.ZipFile(pack).namelist() if name.endswith("/eval.json")}
        for arm, seed in sorted(folder.split("/seed") for folder in folders):
            assert run_numbers.pack_file(arm) == pack
            if arm.startswith("tuning/"):
                continue
            commands = run_numbers.commands_of(run_numbers.folders_of(arm)[int(seed)])
            for recorded, command in zip(commands, compare.ARMS[arm], strict=True):
                words = shlex.split(recorded)
                rate = experiments.learning_rate(arm, words[1])
                before = str(compare.WORK / arm / f"seed{seed}" / f"1-{Path(compare.ARMS[arm][0].split()[0]).stem}")
                expected = ["python", *command.replace("{before}", before).split(), "--seed", seed]
                base = experiments.base_of(arm, int(seed))
                expected += ["--model", base] if base != "tiny_model" and recorded == commands[0] else []
                expected += ["--learning_rate", str(rate)] if rate and "--learning_rate" not in expected else []
                has_todays_default = arm.endswith("-bases") or arm in experiments.ONE_RATE
                expected += ["--entropy_coef", "0.001"] if words[1] == "luffy.py" and not has_todays_default else []
                assert words == expected
                checked += 1
    assert checked > 200


def test_learning_rates_are_what_tuning_chose():
    tuned = {arm: experiments.LEARNING_RATES[arm] for arm in experiments.TUNED}
    assert tuned == run_numbers.chosen(run_numbers.tuning())
