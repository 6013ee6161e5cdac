"""Are the evaluation's numbers what they claim?"""

import itertools
import json
import math
import random
import types

import pytest

import common
import engine
import eval as eval_script
import grpo
from engine import grading, tables, tasks
from engine.grading import grade_completions


@pytest.mark.parametrize("n, c", [(1, 0), (1, 1), (5, 0), (5, 2), (5, 5), (8, 1)])
def test_pass_at_k_is_the_mean_over_all_subsets(n, c):
    samples = [1] * c + [0] * (n - c)
    for k in range(1, n + 1):
        subsets = list(itertools.combinations(samples, k))
        assert common.pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    with pytest.raises(ValueError):
        common.pass_at_k(n, c, n + 1)


def test_mean_and_standard_error():
    assert common.mean_and_error([1.0, 2.0, 3.0, 6.0]) == (3.0, pytest.approx(math.sqrt(14 / 3 / 4)))
    assert common.mean_and_error([0.5]) == (0.5, None)


def test_summary_by_hand():
    prompt = "Q: Ben has 9 books , Mon wins 3 , Tue loses 2 . How many ? A:"
    right, lucky = tasks.solve(prompt)[0], "9 Mon + 2 = 11 Tue - 1 = 10 ; \\boxed{ 10 }"
    results = [
        {"prompt": prompt, "difficulty": "easy", "completions": [right, lucky], "ended": [True, True], "rewards": [1.0, 1.0]},
        {"prompt": prompt, "difficulty": "easy", "completions": ["hence", "9"], "ended": [True, False], "rewards": [0.0, 0.0]},
        {"prompt": prompt, "difficulty": "hard", "completions": [right, "9"], "ended": [True, True], "rewards": [1.0, 0.0]},
    ]
    summary = common.summarize(results, (1, 2), builtin=True)
    assert summary["easy"]["avg@2"] == 0.5 and summary["easy"]["avg@2_se"] == pytest.approx(0.5)
    assert (summary["easy"]["steps_right"], summary["easy"]["foreign"], summary["easy"]["ended"]) == (0.25, 0.25, 0.75)
    assert (summary["hard"]["pass@1"], summary["hard"]["pass@2"], summary["hard"]["avg@2_se"]) == (0.5, 1.0, None)
    more = {"prompt": prompt, "difficulty": "easy", "completions": ["a", "b"], "ended": [True, True], "rewards": [1.2, 0.9]}
    assert common.problem_metrics(more)["pass@1"] == 0.5  # right is a reward of at least 1
    samples = [common.Sample({}, [], [], "", True, reward, source=source)
               for reward, source in ((1.2, "trace"), (0.0, "rollout"), (1.2, "trace"), (1.2, "rollout"))]
    told = common.reward_by_source(samples, types.SimpleNamespace(num_generations=2))
    assert told["offpolicy/solved_by_teacher_only"] == 0.5


def test_evaluate_grades_every_sample_of_every_problem(tiny):
    args = eval_script.Args(num_generations_eval=3, generation_batch_size=7, seed=1)
    problems = tasks.problems("bills", "eval", "easy", 5) + tasks.problems("diary", "eval", "easy", 4)
    problems = common.encode_problems(problems, tiny[1], args)
    results = common.evaluate(*tiny, problems, args)
    assert [result["prompt"] for result in results] == [problem["prompt"] for problem in problems] and len(results) == 9
    for result in results:
        assert len(result["completions"]) == 3
        assert result["rewards"] == grade_completions(result["completions"], result["ended"], [result] * 3)
    assert results == common.evaluate(*tiny, problems, args)
    assert sum(sum(result["rewards"]) for result in results) > 20  # 27 samples of a base that is right 95 % of the time


# ---------------------------------------------------------------- maj@k


@pytest.mark.parametrize("answers, rewards, expected", [
    (["7", "7", "8"], [1, 1, 0], 1.0),
    (["7", "8", "8"], [1, 0, 0], 0.0),
    (["7", "8"], [1, 0], 0.5),  # a tie, drawn by lot
    (["8", "9", "7", "9", "7", "8"], [0, 0, 1, 0, 1, 0], 1 / 3),
    (["7", "7", "8", "8", "9"], [1, 1, 0, 0, 0], 0.5),
    (["7", None, None, None], [1, 0, 0, 0], 1.0),  # who has no answer does not vote
    ([None, None], [0, 0], 0.0),
    (["7"], [1], 1.0),
    (["1/2", "1/2", "1/2", "3"], [1, 1, 0, 0], 2 / 3),  # one answer whose spellings the reward does not grade alike
])
def test_majority_vote_by_hand(answers, rewards, expected):
    assert common.majority_vote(answers, rewards) == pytest.approx(expected)


def test_majority_vote_is_the_mean_over_all_lots_and_orders():
    """Brute force: every order of the samples, and in each the tied answer that comes first."""
    rng = random.Random(0)
    for _ in range(50):
        answers = [rng.choice(["7", "8", "9", None]) for _ in range(rng.randint(1, 6))]
        rewards = [float(answer == "7") for answer in answers]
        outcomes = []
        for order in itertools.permutations(range(len(answers))):
            votes = [answers[i] for i in order if answers[i] is not None]
            outcomes.append(bool(votes) and max(votes, key=votes.count) == "7")  # max takes the first of equals
        assert common.majority_vote(answers, rewards) == pytest.approx(sum(outcomes) / len(outcomes))


ALIKE = {  # one line per answer, in several spellings
    "boxed": [["0.5", "1/2", r"\frac{1}{2}", "$0.50$", " 2/4 ", "1 / 2", "2 / 4"], ["1,000", "1000", "1000.0"], ["-3", "-3.0"], ["3"],
              [r"\left( x + 1 \right)", "(x+1)"], ["50%"], ["east"], ["seat"]],
    "exact": [["two  words", "two words "], ["twowords"], ["0.5"], ["1/2"]],
    "numeric": [["5 cm", "5", r"5.0\text{ cm}", "$5"], ["50%", "50"], ["1/2", "0.5"]],
    "choice": [["B", "(B)", r"\text{B}", "B."], ["C", r"\textbf{(C)}"]],
}
ALIKE["math"] = ALIKE["boxed"]


@pytest.mark.parametrize("kind", grading.REWARDS)
def test_equal_answers_have_one_key_and_others_their_own(kind):
    keys = [{grading.answer_key(f"so \\boxed{{{spelling}}}", kind) for spelling in group} for group in ALIKE[kind]]
    assert [len(group) for group in keys] == [1] * len(keys), keys
    assert None not in set.union(*keys) and len(set.union(*keys)) == len(keys), keys
    assert grading.answer_key("so 5", kind) is None and grading.answer_key(r"\boxed{ }", kind) is None
    assert grading.answer_key(r"\boxed{many}", kind) is None or kind not in ("numeric", "choice")


@pytest.mark.parametrize("kind", ["boxed", "exact", "numeric", "choice"])
def test_what_the_reward_calls_equal_has_one_key(kind):
    """Over all pairs of spellings of every rule; the reverse holds but for white space in numbers, which only the key reads over."""
    spellings = [spelling for groups in ALIKE.values() for group in groups for spelling in group]
    pairs = list(itertools.product(spellings, repeat=2))
    equal = [pair for pair in pairs if grading.agree(*pair, kind)]
    keys = {spelling: grading.answer_key(f"\\boxed{{{spelling}}}", kind) for spelling in spellings}
    assert len(equal) > 5 and all(keys[given] == keys[gold] is not None for given, gold in equal)
    extra = [pair for pair in pairs if keys[pair[0]] == keys[pair[1]] is not None and pair not in equal]
    assert all(" / " in "".join(pair) for pair in extra)


def boxed(*answers):
    return [f"\\boxed{{{answer}}}" for answer in answers]


@pytest.fixture
def scripted(monkeypatch):
    """Let evaluate sample given texts, problem by problem: scripted(texts, ended) -> results, each problem's gold answer "0.5"."""
    def call(texts, ended, **flags):
        problems = [{"prompt": str(i), "answer": "0.5", "difficulty": "all", "prompt_ids": [0], "columns": {}} for i in range(len(texts))]
        drawn = zip(sum(texts, []), sum(ended, []))
        monkeypatch.setattr(common, "sample", lambda model, tokenizer, prompts, problems, args, *rest: [
            common.Sample(problem, prompt, [], *next(drawn)) for prompt, problem in zip(prompts, problems)])
        return common.evaluate(None, None, problems, eval_script.Args(num_generations_eval=len(texts[0]), **flags))

    return call


def test_votes_of_whole_completions(scripted):
    """From texts to maj@k: equal numbers in other spelling, ties, cut-off samples and problems without a vote, with standard error."""
    texts = [boxed("1/2", "3", "0.50", "4"), boxed("1/2", "3", "3.0", "4"), boxed("0.5", "3", "3", "3"), ["hm"] * 4,
             boxed("1/2", "3") + ["0.5", "0.5"]]
    ended = [[True] * 4, [True] * 4, [True, False, False, False], [True] * 4, [True] * 4]
    results = scripted(texts, ended)
    assert [result["answers"] for result in results] == [
        ["1/2", "3", "1/2", "4"], ["1/2", "3", "3", "4"], ["1/2", None, None, None], [None] * 4, ["1/2", "3", None, None]]
    summary = common.summarize(results, (1,))["all"]
    values = [1, 0, 1, 0, 0.5]
    assert summary["maj@4"] == 0.5
    assert summary["maj@4_se"] == pytest.approx(math.sqrt(sum((value - 0.5) ** 2 for value in values) / 4 / 5))
    assert scripted(texts, ended, grade_truncated=True)[2]["answers"] == ["1/2", "3", "3", "3"]  # graded, so they vote
    names = list(summary)
    assert names.index("pass@1") < names.index("maj@4") < names.index("ended")


def test_no_maj_for_one_sample_or_a_reward_of_ones_own(scripted, tmp_path):
    (tmp_path / "own.py").write_text("def one(completions, **columns): return [1.0] * len(completions)")
    assert not any("maj" in name for name in common.summarize(scripted([["a"]], [[True]]), (1,))["all"])
    (result,) = scripted([["a", "b"]], [[True, True]], reward_fn=f"{tmp_path}/own.py:one")
    assert "answers" not in result and not any("maj" in name for name in common.summarize([result], (1,))["all"])


# ---------------------------------------------------------------- avg@k and pass@k of small cases


def test_a_table_against_brute_force():
    """Every metric and standard error of 5 problems with 4 samples each, worked out from all subsets of the samples."""
    rng = random.Random(1)
    rewards = [[float(rng.random() < chance) for _ in range(4)] for chance in (0, 0.3, 0.5, 0.8, 1)]
    results = [{"prompt": "", "difficulty": "all", "completions": [""] * 4, "ended": [True] * 4, "rewards": row} for row in rewards]
    summary = common.summarize(results, (1, 2, 3, 4))["all"]
    subsets = {f"pass@{j}": [[max(subset) for subset in itertools.combinations(row, j)] for row in rewards] for j in (1, 2, 3, 4)}
    for metric, problems in (subsets | {"avg@4": rewards}).items():
        values = [sum(problem) / len(problem) for problem in problems]
        mean = sum(values) / 5
        assert summary[metric] == pytest.approx(mean)
        assert summary[f"{metric}_se"] == pytest.approx(math.sqrt(sum((value - mean) ** 2 for value in values) / (5 - 1)) / math.sqrt(5))


def test_the_mean_over_sets_by_hand():
    groups = [{"problems": 10, "avg@2": 0.2, "avg@2_se": 0.03}, {"problems": 1000, "avg@2": 0.6, "avg@2_se": 0.04}]
    mean = tables.mean_over_sets(groups)
    assert mean == {"problems": 1010, "avg@2": pytest.approx(0.4), "avg@2_se": pytest.approx(0.05 / 2)}
    assert tables.mean_over_sets([groups[0], {"problems": 1, "avg@2": 1.0, "avg@2_se": None}])["avg@2_se"] is None


# ---------------------------------------------------------------- eval.py

K = 4
RUN = ("--num_generations_eval", K, "--max_completion_length", 24, "--temperature", 1.3)


def lines_of(path):
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


@pytest.fixture
def data_sets(tmp_path):
    """a.jsonl: 3 easy and 3 hard problems; b.jsonl: 4 problems of one kind."""
    easy, hard = (tasks.problems("diary", "eval", difficulty, 4) for difficulty in ("easy", "hard"))
    columns = ("prompt", "answer", "difficulty")
    a = [{name: row[name] for name in columns} for row in easy[:3] + hard[:3]]
    b = [{name: row[name] for name in columns[:2]} for row in tasks.problems("bills", "eval", "easy", 4)]
    for name, rows in (("a", a), ("b", b)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_several_data_sets_are_each_evaluated_as_if_alone(run_script, tmp_path, data_sets):
    """Samples, summary and table lines of each set are those of a call of its own, in any order; the same seed gives the same files."""
    outs = {}
    for name, sets in {"ab": "ab", "ba": "ba", "a": "a", "b": "b", "again": "ab"}.items():
        code, outs[name], err = run_script(eval_script, "--dataset_name", *(f"{letter}.jsonl" for letter in sets), *RUN,
                                           "--output_file", f"{name}.json", "--output_problems", f"{name}-problems.jsonl")
        assert code == 0, err
    records = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in outs}
    assert set(records["a"]) == {"args", "summary", "problems"} and records["a"]["args"]["dataset_name"] == "a.jsonl"
    assert set(records["ab"]) == {"args", "data_sets", "whole", "mean"}
    for name in ("a", "b"):
        alone = {key: records[name][key] for key in ("summary", "problems")}
        assert alone == records["ab"]["data_sets"][f"{name}.jsonl"] == records["ba"]["data_sets"][f"{name}.jsonl"]
        for difficulty in alone["summary"]:
            lines = [line.split()[1:] for line in outs[name].splitlines() if line.startswith(difficulty + " ")]
            of_several = [line.split()[2:] for line in outs["ab"].splitlines() if line.startswith(f"{name}.jsonl {difficulty} ")]
            assert lines and lines == of_several
    assert records["ab"]["mean"] == tables.mean_over_sets(list(records["ab"]["whole"].values()))
    assert records["ab"]["whole"]["b.jsonl"] == records["b"]["summary"]["all"]
    two = records["a"]["summary"]
    assert records["ab"]["whole"]["a.jsonl"]["avg@4"] == pytest.approx((two["easy"]["avg@4"] + two["hard"]["avg@4"]) / 2)  # 3 each
    assert list(two) == ["easy", "hard", "all"] and two["all"] == records["ab"]["whole"]["a.jsonl"]
    assert "mean of 2 sets" in outs["ab"].splitlines()[-3]
    assert (tmp_path / "again-problems.jsonl").read_bytes() == (tmp_path / "ab-problems.jsonl").read_bytes()
    assert (tmp_path / "ab-problems.jsonl").read_text() == "".join((tmp_path / f"{name}-problems.jsonl").read_text() for name in "ab")
    assert records["a"]["summary"]["easy"]["maj@4"] > 0 and 0 < records["ab"]["mean"]["avg@4"] < 1  # or nothing was tested


def test_a_table_of_many_metrics_is_at_most_120_characters_wide(capsys):
    metrics = [f"pass@{2**power}" for power in range(9)] + ["avg@256", "maj@256", "ended", "steps_right", "foreign"]
    group = {"problems": 7} | {name: value for metric in metrics for name, value in ((metric, 0.5), (f"{metric}_se", 0.25))}
    tables.print_table({"easy": group, "all": group | {"ended_se": None}})
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    assert [word for line in lines[::3] for word in line.split()[1:]] == metrics
    assert "".join(lines).count("0.500 +- 0.250") == 2 * len(metrics) - 1


def test_another_seed_draws_other_samples(run_script, tmp_path, data_sets):
    for seed in (0, 1):
        assert run_script(eval_script, "--dataset_name", "a.jsonl", *RUN, "--seed", seed, "--output_problems", f"{seed}.jsonl")[0] == 0
    first, second = (lines_of(tmp_path / f"{seed}.jsonl") for seed in (0, 1))
    assert [line["completions"] for line in first] != [line["completions"] for line in second]


def test_the_file_of_problems_adds_up_to_the_table(run_script, tmp_path):
    """Every number of the summary again, from the completions in the file."""
    code, out, err = run_script(eval_script, "--task", "diary", "--eval_problems", 5, "--num_generations_eval", K,
                                "--output_file", "e.json", "--output_problems", "p.jsonl")
    assert code == 0 and out.splitlines()[-2:] == ["wrote e.json", "wrote p.jsonl"], err
    problems, summary = lines_of(tmp_path / "p.jsonl"), json.loads((tmp_path / "e.json").read_text())["summary"]
    assert len(problems) == 15 and set(summary) == {"easy", "hard", "other"}
    for line in problems:
        assert list(line) == ["dataset", "prompt", "answer", "difficulty", "completions", "ended", "rewards", "answers", "right", "metrics"]
        assert line["dataset"] == "diary" and len(line["completions"]) == K
        assert line["rewards"] == grade_completions(line["completions"], line["ended"], [line] * K)
        assert line["answers"] == [grading.answer_key(text) if end else None for text, end in zip(line["completions"], line["ended"])]
        assert line["right"] == sum(line["rewards"]) == line["metrics"]["avg@4"] * K
        assert line["metrics"]["pass@2"] == common.pass_at_k(K, line["right"], 2)
        assert line["metrics"]["maj@4"] == common.majority_vote(line["answers"], line["rewards"])
    for difficulty, group in summary.items():
        of_group = [line["metrics"] for line in problems if line["difficulty"] == difficulty]
        assert group["problems"] == len(of_group) == 5
        assert list(of_group[0]) == tables.metric_names(group)
        for metric in of_group[0]:
            assert (group[metric], group[f"{metric}_se"]) == common.mean_and_error([metrics[metric] for metrics in of_group])


def test_training_logs_maj_only_with_several_samples(run_script, tmp_path):
    for k in (1, 2):
        code, _, err = run_script(grpo, "--task", "diary", "--max_steps", 1, "--eval_problems", 2, "--prompts_per_step", 2,
                                  "--num_generations", 2, "--num_generations_eval", k, "--output_dir", f"run-{k}")
        assert code == 0, err
        names = {name for name in lines_of(tmp_path / f"run-{k}" / "metrics.jsonl")[0] if "maj@" in name}
        expected = {f"eval/{difficulty}/maj@2{error}" for difficulty in tasks.DIFFICULTIES for error in ("", "_se")}
        assert names == (expected if k == 2 else set())


@pytest.mark.parametrize("flags, expected", [
    (["--output_file", "used"], "--output_file used exists already"),
    (["--output_problems", "used"], "--output_problems used exists already"),
    (["--output_file", "nowhere/e.json"], "--output_file nowhere/e.json: No such file or directory"),
    (["--output_problems", "nowhere/p.jsonl"], "--output_problems nowhere/p.jsonl: No such file or directory"),
    (["--output_file", "x", "--output_problems", "x"], "--output_problems x is in use"),
    (["--dataset_name", "a.jsonl", "b.jsonl", "a.jsonl"], "--dataset_name a.jsonl is given more than once"),
    (["--dataset_name"], "--dataset_name: expected at least one argument"),
    (["--dataset_name", "a.jsonl", "missing.jsonl", "--output_problems", "p.jsonl"], "--dataset_name missing.jsonl: no such file"),
    (["--dataset_name", "a.jsonl", "bad.jsonl", "--reward", "numeric"], "--dataset_name bad.jsonl: no prompt is left of 1"),
    (["--dataset_name", "a.jsonl", "b.jsonl", "--save_traces", "t.jsonl"], "--save_traces takes one data set, got 2"),
    (["--save_traces", "t.jsonl", "--output_problems", "p.jsonl"], "--output_problems does not go with --save_traces"),
    (["--num_generations_eval", "0"], "--num_generations_eval must be at least 1, got 0"),
    (["--temperature", "-1"], "--temperature must be at least 0, got -1.0"),
    (["--top_p", "0"], "--top_p must be above 0, got 0.0"),
    (["--top_p", "1.5"], "--top_p must be at most 1, got 1.5"),
])
def test_refusals_are_one_line_before_anything_is_sampled(run_script, tmp_path, data_sets, monkeypatch, flags, expected):
    for place in ("common.generate", "engine.self_check.generate"):
        monkeypatch.setattr(place, lambda *_, **__: pytest.fail("sampled"))
    (tmp_path / "used").write_text("precious")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "Q: 1", "answer": "four"}\n')
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    code, _, err = run_script(eval_script, *flags)
    assert code == 2 and err.count("\n") == 1 and err.startswith("eval.py: error: ") and expected in err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("temperature", [1.0, 0])
def test_a_model_that_scores_other_than_it_samples_is_refused(run_script, monkeypatch, temperature):
    """The self-check of the training scripts, also where sampling is greedy; its samples change no number."""
    small = ("--eval_problems", 2, "--num_generations_eval", 2, "--temperature", temperature)
    code, checked, err = run_script(eval_script, *small)
    assert code == 0 and "self-check: re-scored = sampled log-probs" in checked, err
    monkeypatch.setattr(eval_script, "self_check", lambda *inputs: None)
    assert [line for line in checked.splitlines() if " +- " in line] == [
        line for line in run_script(eval_script, *small)[1].splitlines() if " +- " in line]
    monkeypatch.undo()
    scores = engine.scoring.policy_logps
    monkeypatch.setattr(engine.self_check, "policy_logps", lambda *inputs: tuple(part - 0.1 for part in scores(*inputs)))
    code, _, err = run_script(eval_script, *small)
    assert code == 1 and "self-check: LlamaForCausalLM scores its own samples" in err


def test_top_p_keeps_only_the_likeliest_words(tiny):
    """--top_p 1e-6 at temperature 2 is greedy."""
    problems = common.encode_problems(tasks.problems("diary", "eval", "easy", 3), tiny[1], eval_script.Args())

    def completions(**flags):
        return [result["completions"] for result in common.evaluate(*tiny, problems, eval_script.Args(num_generations_eval=3, **flags))]

    assert completions(temperature=2.0, top_p=1e-6) == [texts * 3 for texts in completions(temperature=0)] != completions(temperature=2.0)


def test_training_evaluates_pass_at_1_and_k(tiny):
    args = grpo.Args(task="diary", num_generations_eval=3, eval_problems=1, num_hard=1, num_easy=0)
    metrics = common.evaluation_metrics(*tiny, common.load_problems(args, tiny[1])[1], args)
    assert {int(name.rpartition("@")[2]) for name in metrics if "/easy/pass@" in name and not name.endswith("_se")} == {1, 3}


def test_the_first_problems_of_a_data_set_are_evaluated(run_script, tmp_path, tiny):
    rows = tasks.problems("diary", "eval", "easy", 5)
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"], "answer": row["answer"]}) + "\n" for row in rows))
    code, _, err = run_script(eval_script, "--dataset_name", "d.jsonl", "--eval_problems", 2, "--num_generations_eval", 6,
                              "--output_file", "e.json")
    assert code == 0, err
    record = json.loads((tmp_path / "e.json").read_text())
    assert [problem["prompt"] for problem in record["problems"]] == [row["prompt"] for row in rows[:2]]
    assert [name for name in record["summary"]["all"] if name.startswith("pass@") and not name.endswith("_se")] == [
        "pass@1", "pass@2", "pass@4", "pass@6"]
    args = grpo.Args(dataset_name="d.jsonl", eval_dataset_name="d.jsonl", eval_problems=3)
    train, evaluation = common.load_problems(args, tiny[1])
    assert (len(train), [problem["prompt"] for problem in evaluation]) == (5, [row["prompt"] for row in rows[:3]])
