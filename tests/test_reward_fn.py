"""Is --reward_fn called as TRL calls it, with all there is, and is a function that is wrong seen at once, in one line?"""

import itertools
import json
import math
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import common
import engine
import eval as eval_script
import grpo
import luffy
import processes
import repo
from engine import grading, models, ranks

ROOT = Path(grpo.__file__).parent

OWN = """
def half(prompts, completions, answer, bonus, **columns):
    assert set(columns) == {"question", "trace", "completion_ids", "ended"}
    assert len(prompts) == len(completions) == len(answer) == len(bonus)
    return [0.5 * (gold in text) + more for text, gold, more in zip(completions, answer, bonus)]

def raises(completions, **columns):
    return [1 / 0 for _ in completions]

def nan(completions, **columns): return [0.0] + [float("nan")] * (len(completions) - 1)
def inf(completions, **columns): return [float("inf")] * len(completions)
def none(completions, **columns): return [None] * len(completions)
def words(completions, **columns): return ["1"] * len(completions)
def short(completions, **columns): return [1.0]
def number(completions, **columns): return 1.0
def narrow(completions): return [1.0] * len(completions)
def leaves(completions, **columns): raise SystemExit(0)
class TimedOut(BaseException): pass
def times_out(completions, **columns): raise TimedOut("late")
def keyed(completions, **columns): return dict.fromkeys(range(len(completions)), 1.0)
def unordered(completions, **columns): return {float(i) for i in range(len(completions))}
class Frame(list): columns = ["reward"]
def framed(completions, **columns): return Frame(range(len(completions)))
def awaits(completions, **columns): return later(completions)
def each_awaits(completions, **columns): return [later(text) for text in completions]
async def later(completions, **columns): return [1.0] * len(completions)
async def stream(completions, **columns): yield 1.0
class Judge:
    async def __call__(self, completions, **columns): return [1.0] * len(completions)
judge = Judge()
value = 3
"""


@pytest.fixture
def own(tmp_path):
    """Writes own.py, broken.py and mine.jsonl, whose columns are those of OWN's functions; returns the flags of a short run.

    Every completion is cut off.
    """
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "broken.py").write_text("import no_such_module\n")
    (tmp_path / "exits.py").write_text("import sys\nsys.exit(0)\n")
    rows = [{"question": f"Q: {i}", "answer": str(i), "bonus": float(i > 2), "trace": f"\\boxed{{ {i} }}"} for i in range(6)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ("--dataset_name", "mine.jsonl", "--eval_dataset_name", "mine.jsonl", "--max_steps", 1, "--prompts_per_step", 6,
            "--num_generations", 2, "--max_completion_length", 4, "--output_dir", "run")


@pytest.fixture
def reward_fn(tmp_path):
    """reward_fn(source of a file) -> PATH.py:reward."""
    def write(source):
        path = tmp_path / f"reward{len(list(tmp_path.iterdir()))}.py"
        path.write_text(source)
        return f"{path}:reward"

    return write


def problem(question="Q", **columns):
    return {"prompt": question, "columns": columns}


def test_training_evaluation_and_traces_make_the_same_call(run_script, tmp_path, own):
    """With every column, though all completions are cut off; a trace is right when its reward reaches 1."""
    code, out, err = run_script(grpo, *own, "--reward_fn", f"{tmp_path}/own.py:half")
    assert code == 0, err
    assert f"gold answers are left to {tmp_path}/own.py:half" in out
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[1]["completions/clipped_ratio"] == 1.0
    assert lines[0]["eval/all/avg@1"] >= 0.5 and lines[1]["reward"] >= 0.5  # bonus 1 for every other problem
    for line in (tmp_path / "run" / "completions" / "step-000001.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert record["reward"] == 0.5 * (record["answer"] in record["completion"]) + (int(record["answer"]) > 2)
    args = luffy.Args(dataset_name="mine.jsonl", reward_fn=f"{tmp_path}/own.py:half", eval_steps=0)
    problems, _ = common.load_problems(args, models.load_model("tiny_model")[1])
    assert [problem["trace"] is None for problem in problems] == [True] * 3 + [False] * 3  # they earn 0.5 or 1.5


def test_cut_off_completions_are_rewarded_by_the_function_and_not_by_a_rule(reward_fn):
    """With rewards of -1 and 1 a fixed 0 for what was cut off would beat every wrong completion that ended."""
    spec = reward_fn("def reward(completions, **columns): return [1 if text == 'a' else -1 for text in completions]")
    samples = [common.Sample(problem(), [], [1], text, ended) for text, ended in (("a", True), ("b", True), ("b", False), ("a", False))]
    args = SimpleNamespace(reward="boxed", reward_fn=spec, grade_truncated=False)
    assert [sample.reward for sample in common.grade(samples, args)] == [1.0, -1.0, -1.0, 1.0]
    assert grading.grade_completions(["\\boxed{7}"] * 2, [True, False], [{"answer": "7"}] * 2) == [1.0, 0.0]  # a rule's least reward is 0


def test_the_retelling_of_repo_is_graded_by_the_same_call(reward_fn, tiny, sampler):
    """The retelling is cut off, and replaces a rollout: the function rewards it."""
    spec = reward_fn("def reward(completions, ended, **columns): return [0.75 * (not end) for end in ended]")
    args = repo.Args(task="diary", num_hard=1, num_easy=0, eval_steps=0, num_generations=2, prompts_per_step=1, reward_fn=spec,
                     keep_wrong_traces=True)
    problems, _ = common.load_problems(args, tiny[1])
    sampler(["x", "y"], [[5, 6, 7]])
    _, samples, metrics = repo.rollout(tiny[0], None, tiny[1], problems, args, engine.run.Flops.of(tiny[0], args, ("rephrase",)))
    assert metrics["rephrase/replaced"] == 1 and [sample.reward for sample in samples] == [0.0, 0.75]


@pytest.mark.parametrize("signature, extras", [
    ("prompts, completions, gold, ended", {"ended"}), ("prompts, completions, gold, *, completion_ids", {"completion_ids"}),
    ("prompts, completions, gold, prompt", {"prompt"}), ("prompts, completions, gold", set()),
    ("completions, **more", {"ended", "completion_ids", "prompt", "prompts", "gold"}),
])
def test_a_function_gets_what_is_not_a_column_only_when_it_takes_it(reward_fn, signature, extras):
    """Prompts, completions and columns always, as from TRL; what ended, the ids and the column prompt where there is a place for them."""
    spec = reward_fn(f"""
seen = []
def reward({signature}):
    seen.append(locals())
    return [0] * len(completions)
""")
    messages = [{"role": "user", "content": "Q"}]
    grading.grade_completions(["a", "b"], [True, False], [problem(gold=[3], prompt=messages)] * 2, spec, ids=[[4, 5], [6]])
    (seen,) = grading.load_reward_fn(spec).__globals__["seen"]
    seen |= seen.pop("more", {})
    expected = {"prompts": ["Q", "Q"], "completions": ["a", "b"], "gold": [[3], [3]], "ended": [True, False],
                "completion_ids": [[4, 5], [6]], "prompt": [messages] * 2}
    assert seen == {name: expected[name] for name in {"prompts", "completions", "gold"} | extras}


def test_a_column_of_the_data_named_ended_stays_as_it_is(reward_fn):
    spec = reward_fn("def reward(completions, ended, **columns): return ended")
    assert grading.grade_completions(["a"], [False], [problem(ended=0.25)], spec) == [0.25]


@pytest.mark.parametrize("returned", [
    "[1, 0]", "(1.0, 0.0)", "[True, False]", "(float(x) for x in (1, 0))", "np.array([1.0, 0.0])", "np.array([1, 0])",
    "np.array([True, False])", "[np.float32(1), np.float16(0)]", "[np.int64(1), np.bool_(False)]", "torch.tensor([1.0, 0.0])",
    "torch.tensor([1, 0])", "torch.tensor([True, False])", "[torch.tensor(1.0), torch.tensor([0.0])]",
    "torch.tensor([1.0, 0.0], dtype=torch.bfloat16)", "torch.tensor([1.0, 0.0], requires_grad=True)", "[Fraction(2, 2), 0]",
])
def test_numbers_of_python_numpy_and_torch_are_numbers(reward_fn, returned):
    spec = reward_fn(f"import numpy as np, torch\nfrom fractions import Fraction\ndef reward(**columns): return {returned}")
    rewards = grading.grade_completions(["a", "b"], [True, False], [problem()] * 2, spec)
    assert rewards == [1.0, 0.0] and [type(reward) for reward in rewards] == [float, float]


@pytest.mark.parametrize("value", [None, "1", float("nan"), float("inf"), 10**400, 1e39, 1j, [1.0], {}, np.float64("nan"), np.zeros(2),
                                   np.str_("1"), torch.zeros(2), torch.tensor(math.inf), Decimal(1), object()],
                         ids=lambda value: f"{type(value).__name__} {value}"[:15])
def test_anything_else_is_no_number(value):
    assert grading.as_number(value) is None


def test_what_as_number_keeps():
    assert [grading.as_number(value) for value in (-1, True, Fraction(1, 4), np.int8(-3), torch.tensor(2.5))] == [-1, 1, 0.25, -3, 2.5]


@pytest.mark.parametrize("spec, expected", [
    ("missing.py:f", ": no such file"), ("own.py:absent", " has no function absent"), ("own.py:value", " has no function value"),
    ("own.py", ": expected PATH.py:FUNCTION"), ("own.txt:f", ": expected PATH.py:FUNCTION"), ("own.py:", ": expected PATH.py:FUNCTION"),
    ("own.py:a.b", ": expected PATH.py:FUNCTION"), ("broken.py:f", ": ModuleNotFoundError: No module named 'no_such_module'"),
    ("exits.py:f", ": SystemExit: 0"), ("own.py:later", ": later is async: expected a plain function"),
    ("own.py:stream", ": stream is async"), ("own.py:judge", ": judge is async"),
])
def test_a_function_that_cannot_be_loaded_is_one_line_before_the_model_loads(run_script, tmp_path, own, monkeypatch, spec, expected):
    monkeypatch.setattr(engine, "load_policy", lambda *_: pytest.fail("the model was loaded"))
    code, _, err = run_script(grpo, *own, "--reward_fn", f"{tmp_path}/{spec}")
    assert code == 2 and err.startswith(f"grpo.py: error: --reward_fn {tmp_path}/{spec}: ") and expected in err and err.count("\n") == 1


@pytest.mark.filterwarnings("error")  # such as that of a coroutine that was never awaited
@pytest.mark.parametrize("name, expected", [
    ("raises", "ZeroDivisionError: division by zero (own.py, line 8), called with 6 completions, the first '"),
    ("nan", "returned nan, not a finite number, for completion 1 of 6, '"),
    ("inf", "returned inf, not a finite number, for completion 0 of 6"),
    ("none", "returned None, not a finite number, for completion 0 of 6"), ("words", "returned '1', not a finite number, for completion 0"),
    ("short", "returned 1 rewards for 6 completions"), ("number", "TypeError: 'float' object is not iterable"),
    ("narrow", "TypeError: narrow() got an unexpected keyword argument 'question'"), ("leaves", "SystemExit: 0 (own.py, line 17)"),
    ("times_out", "TimedOut: late (own.py, line 19)"),
    ("keyed", "returned a dict: expected a list of numbers"), ("unordered", "returned a set: expected a list of numbers"),
    ("framed", "returned a Frame: expected a list of numbers"),
    ("awaits", "returned a coroutine: expected numbers"), ("each_awaits", "returned a coroutine: expected numbers"),
])
def test_a_function_that_is_wrong_ends_the_run_in_one_line_while_all_is_cut_off(run_script, tmp_path, own, name, expected):
    code, _, err = run_script(grpo, *own, "--reward_fn", f"{tmp_path}/own.py:{name}")
    assert code == 1 and "Traceback" not in err
    assert f"grpo.py: error: --reward_fn {tmp_path}/own.py:{name}: {expected}" in err.splitlines()[-1]


# ---------------------------------------------------------------- columns as people have them

COUNTDOWN = [{"prompt": f"Q: {i}", "nums": [i, 2], "target": i + 2, "completion": "a guess", "answer": "#### 1,234", "extra": {"i": i}}
             for i in range(4)]
CHECKS = """
def reward(completions, target, nums, answer, completion, extra, **more):
    assert more.keys() == {"prompts", "prompt", "completion_ids", "ended"}, more.keys()
    for goal, values, gold, guess, i in zip(target, nums, answer, completion, extra):
        assert (goal, values, gold, guess) == (i["i"] + 2, [i["i"], 2], "#### 1,234", "a guess")
    return [0.5] * len(completions)
"""


@pytest.mark.parametrize("script, flags", [(grpo, ()), (eval_script, ())], ids=["training", "evaluation"])
def test_every_column_is_given_as_it_stands_in_the_data(run_script, tmp_path, reward_fn, script, flags):
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in COUNTDOWN))
    training = () if script is eval_script else ("--max_steps", 1, "--prompts_per_step", 2, "--num_generations", 2)
    code, out, err = run_script(script, "--dataset_name", "d.jsonl", "--reward_fn", reward_fn(CHECKS), "--max_completion_length", 8,
                                *training, *flags)
    assert code == 0, err
    assert "dropped" not in out


@pytest.mark.parametrize("rows, given", [
    ([{"prompt": "Q: 1"}, {"prompt": "Q: 2"}], {"prompt": ["Q: 1", "Q: 2"]}),
    ([{"prompt": "Q: 1", "answer": {"low": 1, "high": [2]}}, {"prompt": "Q: 2", "answer": ["a", "b"]}],
     {"prompt": ["Q: 1", "Q: 2"], "answer": [{"low": 1, "high": [2]}, ["a", "b"]]}),
    ([{"prompt": "Q: 1", "reward_model": {"ground_truth": ["1", "one"]}}, {"prompt": "Q: 2", "reward_model": {"ground_truth": {"a": 1}}}],
     {"prompt": ["Q: 1", "Q: 2"], "reward_model": [{"ground_truth": ["1", "one"]}, {"ground_truth": {"a": 1}}]}),
    ([{"prompt": "Q: 1", "answer": None}, {"prompt": "Q: 2", "answer": 3}], {"prompt": ["Q: 1", "Q: 2"], "answer": [None, 3]}),
], ids=["no gold", "gold of dicts and lists", "verl", "gaps"])
def test_no_row_is_dropped_for_its_gold(run_script, tmp_path, reward_fn, rows, given):
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = reward_fn(f"""
def reward(completions, prompts, completion_ids, ended, **columns):
    assert all({given!r}[name][int(prompt[-1]) - 1] == value for name, column in columns.items() for prompt, value in zip(prompts, column))
    assert columns.keys() == {set(given)!r}
    return [0.0] * len(completions)
""")
    code, out, err = run_script(grpo, "--dataset_name", "d.jsonl", "--eval_dataset_name", "d.jsonl", "--reward_fn", spec, "--max_steps", 1,
                                "--prompts_per_step", 2, "--num_generations", 2, "--max_completion_length", 8, "--output_dir", "run")
    assert code == 0 and ": dropped" not in out, err
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 1


def test_what_a_function_does_to_torch_stays_with_it(run_script, tmp_path, own, reward_fn):
    source = """
import torch
torch.set_grad_enabled(False)
def reward(completions, **columns):
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    return [float(i % 2) for i in range(len(completions))]
"""
    code, _, err = run_script(grpo, *own, "--reward_fn", reward_fn(source))
    assert code == 0 and torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32, err


def test_what_a_function_does_to_its_columns_stays_with_it(reward_fn):
    spec = reward_fn("def reward(completions, meta, **more): return [meta[i].pop('x') for i in range(len(completions))]")
    problem = {"prompt": "q", "columns": {"meta": {"x": 2}}}
    assert [grading.call_reward_fn(spec, ["a"], [True], [problem]) for _ in range(2)] == [[2.0], [2.0]]


def test_gold_of_another_type_still_tells_data_sets_apart(tmp_path, tiny):
    """The record of a run knows its data by prompts and answers, which may be lists."""
    digests = set()
    for answer in (["1"], ["2"]):
        (tmp_path / "d.jsonl").write_text(json.dumps({"prompt": "Q: 1", "answer": answer}))
        args = grpo.Args(dataset_name=str(tmp_path / "d.jsonl"), eval_steps=0, reward_fn=f"{ROOT}/examples/step_reward.py:right_steps")
        digests.add(engine.run_folder.problems_digest(common.load_problems(args, tiny[1])[0])["sha256"])
    assert len(digests) == 2


def test_a_length_penalty_by_ids_sees_traces_as_they_are_trained(reward_fn, tiny):
    """TRL's example of a reward on completion_ids; a trace ends with EOS."""
    spec = reward_fn(f"""
def reward(completion_ids, **columns):
    return [float(ids[-1] == {tiny[1].eos_token_id} and len(ids) > 2) for ids in completion_ids]
""")
    problems, _ = common.load_problems(luffy.Args(num_hard=2, num_easy=0, eval_steps=0, reward_fn=spec), tiny[1])
    assert all(problem["trace"] is not None for problem in problems)


def test_a_trace_that_was_cut_off_is_not_collected_whatever_it_earns(run_script, tmp_path, reward_fn):
    spec = reward_fn("def reward(completions, **columns): return [1.0] * len(completions)")
    flags = ("--task", "diary", "--num_hard", 0, "--num_easy", 3, "--num_generations_eval", 2, "--max_tries", 2, "--reward_fn", spec)
    for length, most in ((3, 0), (64, 3)):
        code, _, err = run_script(eval_script, *flags, "--max_completion_length", length, "--save_traces", f"t{length}.jsonl")
        assert code == 0, err
        traces = (tmp_path / f"t{length}.jsonl").read_text().splitlines()
        assert len(traces) == most


# ---------------------------------------------------------------- ranks


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
def test_a_reward_that_compares_a_group_sees_it_whole_on_any_number_of_ranks(monkeypatch, reward_fn, world_size):
    """The longest of a prompt earns 1; 3 prompts x 4 on 2 ranks used to split the second group."""
    spec = reward_fn("""
def reward(completions, prompts):
    longest = {}
    for prompt, text in zip(prompts, completions):
        longest[prompt] = max(longest.get(prompt, 0), len(text))
    return [float(len(text) == longest[prompt]) for prompt, text in zip(prompts, completions)]
""")
    # In an evaluation, too: 3 samples a problem in calls of generate of 4.
    monkeypatch.setattr(common, "sample", lambda model, tokenizer, prompts, problems, *rest: [
        common.Sample(problem, [], [1], "x" * next(lengths), True) for problem in problems])
    lengths, args = itertools.cycle([1, 3, 2]), eval_script.Args(reward_fn=spec, num_generations_eval=3, generation_batch_size=4)
    asked = [problem(question) | {"answer": None, "difficulty": "all", "prompt_ids": []} for question in "abcd"]
    assert [result["rewards"] for result in common.evaluate(None, None, asked, args)] == [[0.0, 1.0, 0.0]] * 4
    problems = [each for each in map(problem, "abc") for _ in range(4)]
    monkeypatch.setattr(ranks, "world_size", lambda: world_size)
    monkeypatch.setattr(ranks, "all_gather_list", lambda items: items)
    rewards = []
    for rank in range(world_size):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        rewards += grading.grade_completions(["x", "xx", "xxx", "xxxx"] * 3, [True] * 12, problems, spec)
    assert rewards == [0.0, 0.0, 0.0, 1.0] * 3


def test_a_file_that_only_another_rank_cannot_import_is_one_line(tmp_path):
    """Rank 1 finds it, and every rank says and ends alike."""
    (tmp_path / "own.py").write_text("import os\nassert os.environ['RANK'] == '0', 'no such disk here'\ndef f(**columns): return []\n")
    done = processes.run("grpo.py", "--reward_fn", f"{tmp_path}/own.py:f", ranks=2)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if "grpo.py: error: " in line]
    assert len(lines) == 1 and lines[0].endswith("own.py:f: AssertionError: no such disk here (rank 1)")
