"""Does --explain show a real step as the code computes it, of every script, and does the notebook show what its cells print?"""

import importlib.util
import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

import engine
import grpo
import luffy
import prefixrl
import repo
import sft
from engine import explain

ROOT = Path(grpo.__file__).parent
SMALL = ("--num_hard", 16, "--num_easy", 8, "--prompts_per_step", 6, "--eval_steps", 0)
GROUP = ("--num_generations", 4)


def loaded(path):
    """A module from a file that is no part of a package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sections(text):
    """{function: {name: (kind, [words])}} of the text of --explain."""
    found = {}
    for part in re.split(r"\n\n(?=\w+\()", text)[1:]:
        head, *lines = part.splitlines()
        words = [re.match(r"  (.{17}) (\(.*?\) \w+|\w+(?: of \d+| numbers)?) *(.*)", line) for line in lines]
        found[head.split("(")[0]] = {match[1].strip(): (match[2], match[3].split()) for match in words if match}
    return found


@pytest.mark.parametrize("script, shows", [
    (grpo, ["rollout", "advantage"]), (repo, ["rephrase", "stands where this one was", "help_failed_groups(", "failure  "]),
    (luffy, ["trace", "off_policy", "weight  "]), (prefixrl, ["prefix  ", "given, not trained"]),
    (sft, ["trace", "every row counts alike"])],
    ids=lambda value: getattr(value, "__name__", ""))
def test_every_script_explains_a_step_and_writes_nothing(run_script, tmp_path, script, shows):
    task = () if script in (repo, luffy, sft) else ("--task", "diary", "--num_easy", 24)
    code, out, err = run_script(script, *SMALL, *(() if script is sft else GROUP), *task, "--explain")
    assert code == 0 and err == "" and list(tmp_path.iterdir()) == []
    assert len(out.splitlines()) <= 80 and max(map(len, out.splitlines())) <= 110
    found = sections(out)
    assert {"rollout", "policy_loss", "optimizer_step"} <= found.keys() and {"norm", "norm, clipped"} <= found["optimizer_step"].keys()
    terms = {"logps", "loss", "mask", "token_loss"} | (set() if script is sft else {"ratio", "clipped", "advantages"})
    assert terms <= found["policy_loss"].keys()
    for words in ("prompt  ", "right answer  ", f"{script.__name__}.py:", *shows):
        assert words in out
    for name, lines in found.items():  # no name that the code does not have
        function = engine.optimizer_step if name == "optimizer_step" else getattr(script, name)
        assert set(lines) - {"returns", "norm, clipped"} <= {*function.__code__.co_varnames, *function.__code__.co_cellvars}, name


def test_the_numbers_are_those_of_the_step(run_script, tmp_path, monkeypatch):
    """The printed values obey the equations, and the step has left the weights that training leaves."""
    watched, lines = [], explain.Watch.lines
    monkeypatch.setattr(explain.Watch, "lines", lambda watch, step: watched.append(watch) or lines(watch, step))
    code, out, _ = run_script(repo, *SMALL, *GROUP, "--max_steps", 1, "--explain")
    found = sections(out)
    rewards, advantages = ([float(word) for word in found["group_advantages"][name][1]] for name in ("rewards", "returns"))
    assert advantages == pytest.approx(grpo.group_advantages(grpo.torch.tensor(rewards), 4).tolist(), abs=1e-3) and max(advantages) > 1
    (row,) = [line for line in out.splitlines() if re.match(r"  \d+ +rephrase ", line)]
    before, after = map(float, re.search(r"(-[\d.]+) -> (-[\d.]+)", row).groups())
    assert after > before and float(row.split()[4]) == pytest.approx(max(advantages), abs=1e-3)
    policy = found["policy_loss"]
    assert policy["ratio"][1] == ["1.000"] * 8 and policy["advantages"][1] == [f"{max(advantages):.3f}"]
    assert policy["token_loss"][1] == [f"{-max(advantages):.3f}"] * 8 and policy["rephrased"][1] == ["True"]
    weights = {name: value.clone() for name, value in watched[0].model.state_dict().items()}
    assert run_script(repo, *SMALL, *GROUP, "--max_steps", 1, "--output_dir", "run")[0] == code == 0
    trained = load_file(tmp_path / "run" / "model.safetensors")
    assert all(value.equal(weights[name]) for name, value in trained.items()) and len(trained) > 10


@pytest.mark.fast
def test_a_clipped_gradient_has_the_norm_that_is_allowed(run_script):
    lines = sections(run_script(sft, *SMALL, "--explain", "--max_grad_norm", 0.5)[1])["optimizer_step"]
    assert float(lines["norm"][1][0]) > 1 and lines["norm, clipped"][1] == ["0.500"]


def test_a_fork_is_explained_as_it_stands(run_script, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    fork = importlib.import_module("gspo")
    code, out, err = run_script(fork, *SMALL, *GROUP, "--task", "diary", "--num_easy", 24, "--explain")
    assert code == 0 and err == "" and "log_ratio" in sections(out)["policy_loss"] and "gspo.py:" in out


def test_a_step_without_signal_says_so(run_script):
    code, out, _ = run_script(grpo, "--num_hard", 8, "--num_easy", 0, *GROUP, "--prompts_per_step", 2, "--max_steps", 2, "--eval_steps", 0,
                              "--explain")
    assert code == 0 and "step 2 of grpo.py" in out and "all rewards are equal: no signal" in out


def test_the_help_lists_the_flag_with_the_output(run_script):
    out = run_script(grpo, "--help")[1]
    assert "--explain" in out.split("evaluation and output:")[1]
    assert "nothing was trained or written (--dry_run)" in run_script(grpo, *SMALL, "--dry_run", "--explain")[1]


def numbers(text):
    """A text in two parts: its numbers, and what stands between them."""
    found = re.compile(r"-?\d+\.\d+")
    return [float(number) for number in found.findall(text)], found.sub("#", re.sub(r" +", " ", text))


def test_the_notebook_shows_what_its_cells_print(monkeypatch):
    """`python docs/one_step.py` writes it; a processor may round the last digit in another way."""
    monkeypatch.chdir(ROOT)
    script = loaded(ROOT / "docs" / "one_step.py")
    stored = json.loads(script.NOTEBOOK.read_text())["cells"]
    sources = [(cell["cell_type"] == "markdown", "".join(cell["source"])) for cell in stored]
    assert sources == script.cells(), "docs/one_step.ipynb is out of date: python docs/one_step.py"
    code = [cell for cell in stored if cell["cell_type"] == "code"]
    for cell, printed in zip(code, script.execute(["".join(cell["source"]) for cell in code]), strict=True):
        values, words = numbers(printed)
        expected, same = numbers("".join(line for output in cell["outputs"] for line in output["text"]))
        assert words == same and values == pytest.approx(expected, abs=0.02), "python docs/one_step.py"
    text = "".join(text for _, text in sources)
    for name in ("group_advantages", "policy_loss", "optimizer_step", "repo.retell", "ratio", "clipped", "token_loss"):
        assert name in text
