"""Are the siblings in examples/ their parents plus numbered hunks, and their parents bit for bit with one knob off?"""

import ast
import importlib
import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch

import engine
import grpo
import prefixrl
import processes
from engine import run_log
from test_reduction import run  # noqa: F401 (a fixture)

ROOT = Path(engine.__file__).parents[1]
spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)
MOST = {"opsd": 75, "adaprefix": 60, "chord": 60, "dapo": 30}  # changed lines, docstring aside
TITLES = {"opsd": "OPSD", "adaprefix": "AdaPrefix", "chord": "CHORD", "dapo": "DAPO"}  # in numbered tags
SIBLINGS = pytest.mark.parametrize("name", build.SIBLINGS)


@pytest.fixture(scope="module")
def sibling():
    """sibling(name) -> a script of examples/ as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples"))
        yield importlib.import_module


@pytest.fixture(autouse=True, scope="module")
def no_report():
    """A run in this process ends without figure and report.html, which take longer than its steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_log.RunLog, "finish", lambda log: None)
        yield


# ---------------------------------------------------------------- the diff


def complaints(name, text):
    """What is wrong with the size and the numbered tags of a sibling's source, as a list of sentences."""
    parent, title = build.SIBLINGS[name], TITLES[name]
    found = build.hunks(build.script(parent), text)
    own = [[tag[:3] for tag in hunk.tags if tag[0] == title] for hunk in found]
    wrong = [f"{hunk.header} carries no numbered tag" for hunk, tags in zip(found, own) if not tags]
    size = sum(len(hunk.changed(sign)) for hunk in found for sign in "+-")
    wrong += [f"{size} changed lines"] * (size > MOST[name])
    numbers = sum(own, [])
    if numbers != [(title, i + 1, len(numbers)) for i in range(len(numbers))]:
        wrong.append(f"tags are not {title}(1/{len(numbers)}) to the last, once and in order: {numbers}")
    if sum(tag[0] == title for tag in build.NUMBERED.findall(text)) != len(numbers):
        wrong.append("a numbered tag stands where nothing differs")
    told = re.search(rf"^Changes against {parent}\.py: (.*?)\n\n", ast.get_docstring(ast.parse(text)), re.DOTALL | re.MULTILINE)
    spans = re.findall(r"\((\d+)(?:-(\d+))?\)", told[1] if told else "")
    if [i for first, last in spans for i in range(int(first), int(last or first) + 1)] != [i + 1 for i in range(len(numbers))]:
        wrong.append(f"the docstring's list of changes does not count 1 to {len(numbers)}")
    return wrong


@SIBLINGS
def test_a_sibling_is_its_parent_and_numbered_hunks(name):
    assert complaints(name, build.script(name)) == []


@pytest.mark.parametrize("name, old, new, complaint", [
    ("dapo", "DAPO(5/6)", "DAPO(4/6)", "once and in order"),
    ("dapo", "    padded = ", "    more = 1\n    most = 2\n    padded = ", "changed lines"),
    ("chord", "    totals = engine", "    total = None\n    totals = engine", "carries no numbered tag"),
    ("opsd", "(11) FLOPs", "FLOPs", "does not count 1 to"),
    ("adaprefix", "            loss.backward()", "            loss.backward()  # AdaPrefix(7/7)", "once and in order"),
    ("adaprefix", "PrefixRL cuts a trace once.", "# AdaPrefix(1/7): PrefixRL cuts a trace once.", "where nothing differs"),
])
def test_the_checker_sees_what_is_wrong(name, old, new, complaint):
    text = build.script(name)
    assert text.count(old) == 1
    assert any(complaint in wrong for wrong in complaints(name, text.replace(old, new)))


# ---------------------------------------------------------------- off

OFF = {
    "dapo": {"max_num_gen_batches": 1, "epsilon_high": 0.2},
    "chord": {"num_off_policy": 0},
    "opsd": {"distillation": 0.0},
    "adaprefix": {"prefix_rate": 0.0, "withdraw_after": 0, "prefixes_per_trace": 3, "plain_per_trace": 1},
}
ADDED = {
    "dapo": {"resampled/rounds", "resampled/groups", "resampled/no_signal"},
    "chord": {"onpolicy/reward", "offpolicy/solved_by_teacher_only", "offpolicy/mu", "offpolicy/prob", "offpolicy/loss"},
    "opsd": {"flops/informed"},
    "adaprefix": {"prefix/share", "prefix/withdrawn"},
}
PARENTS = {"grpo": grpo, "prefixrl": prefixrl}
STEPS = {"num_minibatches": 2, "eval_steps": 0}


@pytest.fixture(scope="module")
def parents(run):  # noqa: F811
    """The runs to compare with."""
    return {name: run(module, **STEPS) for name, module in PARENTS.items()}


@SIBLINGS
def test_a_sibling_with_its_knob_off_is_its_parent_bit_for_bit(name, run, parents, sibling):  # noqa: F811
    """Three steps with two updates each: metrics, final weights, random numbers."""
    expected, expected_weights, expected_states = parents[build.SIBLINGS[name]]
    records, weights, states = run(sibling(name), **OFF[name] | STEPS)
    for record, wanted in zip(records, expected, strict=True):
        assert record.keys() - wanted.keys() == ADDED[name] and record == record | wanted
        assert record["grad_norm"] > 1e-3
    assert torch.equal(states, expected_states)
    assert weights.keys() == expected_weights.keys()
    assert all(weight.numpy().tobytes() == expected_weights[key].numpy().tobytes() for key, weight in weights.items())


@SIBLINGS
def test_a_sibling_runs_from_any_folder(name, tmp_path):
    words = ["--max_steps", 1, "--prompts_per_step", 2, "--num_generations", 4, "--max_completion_length", 24, "--eval_steps", 0,
             "--output_dir", "run"]
    done = processes.run(ROOT / "examples" / f"{name}.py", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "args.json").read_text())["script"] == f"{name}.py"


@pytest.mark.parametrize("name, flags, expected", [
    ("dapo", ["--max_num_gen_batches", "0"], "--max_num_gen_batches must be at least 1, got 0"),
    ("chord", ["--mu_peak", "1.5"], "--mu_peak must be at most 1, got 1.5"),
    ("chord", ["--num_off_policy", "8"], "--num_off_policy must be below --num_generations (8), got 8"),
    ("chord", ["--gate", "x"], "--gate: invalid float value: 'x'"),
    ("opsd", ["--distillation", "2"], "--distillation must be at most 1, got 2.0"),
    ("opsd", ["--informed_prompt", "{prompt}"], "--informed_prompt must be text with {prompt} and {trace}"),
    ("opsd", ["--teacher", "best"], "--teacher: invalid choice: 'best'"),
    ("adaprefix", ["--prefix_rate", "-1"], "--prefix_rate must be at least 0, got -1.0"),
    ("adaprefix", ["--prefix_turn", "system"], "--prefix_turn: invalid choice: 'system'"),
])
def test_flags_that_cannot_work_are_refused(refused, sibling, name, flags, expected):
    assert expected in refused(sibling(name), *flags)


def test_opsd_needs_no_group_to_compare_with(sibling, refused):
    """As in its paper; with less than the whole loss of rewards there is still a gradient, and without the divergence there is none."""
    assert sibling("opsd").Args(num_generations=1, distillation=0.5).num_generations == 1
    said = refused(sibling("opsd"), "--num_generations", "1", "--distillation", "0")
    assert "--num_generations 1 leaves no group to compare with" in said


def test_a_run_with_moved_prefixes_is_not_resumed(run_script, sibling):
    """The lengths are in no checkpoint: a run that would go on with others is refused in one line."""
    tiny = ["--num_hard", 2, "--num_easy", 0, "--prompts_per_step", 1, "--num_generations", 2, "--eval_steps", 0, "--save_steps", 1]
    assert run_script(sibling("adaprefix"), *tiny, "--max_steps", 1, "--output_dir", "moved")[0] == 0
    code, _, err = run_script(sibling("adaprefix"), "--resume_from_checkpoint", "moved")
    assert code == 2 and err.splitlines()[-1] == (
        "adaprefix.py: error: --resume_from_checkpoint: the lengths of moved prefixes are in no checkpoint; begin a new run")


FEW = ("--num_hard", 0, "--num_easy", 16, "--prompts_per_step", 2, "--num_generations", 2, "--eval_steps", 0,
       "--max_completion_length", 32, "--output_dir", "run")


def test_spare_problems_are_others_in_every_step_and_not_those_of_the_step(run_script, monkeypatch, sibling):
    """[CHOICE DAPO] the second stream goes on from step to step as the first one does."""
    dapo, seen = sibling("dapo"), []
    rollout = dapo.rollout
    monkeypatch.setattr(dapo, "rollout", lambda *inputs: seen.append(
        [[row["prompt"] for row in rows] for rows in inputs[3:5]]) or rollout(*inputs))
    code, _, err = run_script(dapo, *FEW, "--max_steps", 4, "--max_num_gen_batches", 3)
    assert code == 0, err
    spare = [prompt for _, rows in seen for prompt in rows]
    assert [len(rows) for _, rows in seen] == [4] * 4 and len(set(spare)) == 16  # an epoch
    assert spare[:8] != [prompt for rows, _ in seen for prompt in rows]


def test_mu_falls_from_step_to_step_of_a_run(run_script, tmp_path, sibling):
    assert run_script(sibling("chord"), *FEW, "--max_steps", 3, "--mu_peak", 0.9, "--mu_valley", 0.1, "--mu_decay_steps", 2)[0] == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["offpolicy/mu"] for record in records] == pytest.approx([0.9, 0.5, 0.1])


@pytest.mark.parametrize("teacher, moves", [("initial", False), ("current", True)])
def test_the_teacher_of_a_run_is_the_policy_that_was_asked_for(run_script, monkeypatch, sibling, teacher, moves):
    opsd, seen = sibling("opsd"), []
    update = opsd.update
    monkeypatch.setattr(opsd, "update", lambda model, other, *rest: seen.append(
        (other is model, other.model.norm.weight.tolist())) or update(model, other, *rest))
    code, _, err = run_script(opsd, *FEW, "--max_steps", 2, "--learning_rate", 1e-2, "--teacher", teacher)
    assert code == 0 and [same for same, _ in seen] == [moves] * 2 and (seen[0][1] != seen[1][1]) == moves, err
