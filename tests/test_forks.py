"""Can a forker do what the README says, and do the forks in examples/ do what they claim?"""

import copy
import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

import common
import engine
import grpo
import processes
import repo
from engine.models import eos_ids, seed_everything
from engine.sampling import completion_mask, generate, left_pad
from engine.scoring import score_completions

ROOT = Path(engine.__file__).parents[1]
spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)


def example(name, monkeypatch):
    """A script of examples/ as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module(name)


@pytest.mark.parametrize("fork, parent", build.FORKS.items())
def test_a_fork_is_at_most_ten_changed_lines(fork, parent):
    text, base = build.script(fork), build.script(parent)
    assert 0 < sum(len(hunk.changed(sign)) for hunk in build.hunks(base, text) for sign in "+-") <= 10


@pytest.mark.parametrize("fork", build.FORKS)
def test_a_fork_runs_from_any_folder(fork, tmp_path):
    words = ["--max_steps", 1, "--prompts_per_step", 2, "--num_generations", 4, "--max_completion_length", 24, "--eval_steps", 0,
             "--output_dir", "run"]
    done = processes.run(ROOT / "examples" / f"{fork}.py", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "args.json").read_text())["script"] == f"{fork}.py"


def test_the_frozen_policy_retells_and_its_probabilities_are_the_behavior(monkeypatch, tiny):
    """The trained policy differs from the initial one. Retellings are what the initial one samples from P(q, k), scored under it."""
    script, (frozen, tokenizer) = example("repo_frozen", monkeypatch), tiny
    model = copy.deepcopy(frozen)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.02 * torch.randn(model.get_input_embeddings().weight.shape))
    args = script.Args(num_hard=4, num_easy=0, prompts_per_step=3, num_generations=4, rephrase_ratio="behavior", eval_steps=0)
    problems = common.load_problems(args, tokenizer)[0][:3]
    sampled_by = []
    monkeypatch.setattr(common, "generate", lambda policy, *rest, **more: sampled_by.append(policy) or generate(policy, *rest, **more))
    seed_everything(0, 0)
    batch, samples, metrics = script.rollout(model, frozen, tokenizer, problems, args, engine.flops.Flops.of(model))
    assert [policy is frozen for policy in sampled_by] == [False, True] and metrics["rephrase/replaced"] > 0
    rows = batch.rephrased.nonzero().flatten().tolist()
    for row in rows:
        prompt_ids, prompt_mask = left_pad([samples[row].prompt_ids], tokenizer.pad_token_id, "cpu")
        ids = torch.tensor([samples[row].ids])
        mask = completion_mask(ids, eos_ids(frozen, tokenizer))
        for policy, same in ((frozen, True), (model, False)):
            expected, _ = score_completions(policy, prompt_ids, prompt_mask, ids, mask)
            assert torch.allclose(batch.behavior_logps[row, : ids.shape[1]], expected[0], atol=1e-4) == same
    assert batch.ref_logps is None  # beta is 0: the initial policy is there, but no KL term
    assert script.Args().keeps_initial_weights and not repo.Args().keeps_initial_weights and repo.Args(beta=0.1).keeps_initial_weights


def test_a_retelling_must_keep_words_of_the_trace(monkeypatch, tiny):
    """The trace has four different words. A right retelling with three of them passes 0.75 and not 0.76."""
    script = example("repo_overlap", monkeypatch)
    problem = {"trace": "one and one are two", "answer": "2"}
    kept = common.Sample(problem, [1], [2], "two are one plus one", True, reward=1.0)
    assert script.word_overlap(kept) == 0.75
    monkeypatch.setattr(script, "retell", lambda *_: [kept])
    for least, helped in ((0.0, True), (0.75, True), (0.76, False)):
        group = [common.Sample(problem, [1], [3], "", True, reward=0.0) for _ in range(2)]
        samples, _ = script.help_failed_groups(None, None, group, script.Args(num_generations=2, min_overlap=least), None)
        assert any(sample is kept for sample in samples) == helped


def gspo_loss(script, logps, old_logps, advantages, mask, **flags):
    """(loss, gradient) of rows that are a whole step."""
    logps, mask = torch.tensor(logps, requires_grad=True), torch.tensor(mask)
    batch = script.Batch(mask, mask, mask, mask, loss_mask=mask, advantages=torch.tensor(advantages), old_logps=torch.tensor(old_logps))
    loss, _ = script.policy_loss(logps, torch.zeros(mask.shape), batch, script.Args(**flags), int(mask.sum()), len(mask))
    return loss.item(), torch.autograd.grad(loss, logps)[0]


def test_gspo_ratio_is_the_geometric_mean_of_the_sequence(monkeypatch):
    """Ratios 1.1 and 0.9 of two tokens: s = sqrt(0.99). Each token's gradient is -A s / |o| / rows. [GSPO eq 5] [GSPO eq 7]"""
    script = example("gspo", monkeypatch)
    new = torch.tensor([[1.1, 0.9, 5.0], [1.0, 1.0, 1.0]]).log().tolist()
    mask = [[True, True, False], [True, True, True]]
    loss, gradient = gspo_loss(script, new, [[0.0] * 3] * 2, [2.0, -1.0], mask, epsilon=1.0, epsilon_high=1.0)
    assert loss == pytest.approx(-(2 * 0.99**0.5 - 1) / 2, abs=1e-6)
    torch.testing.assert_close(gradient, torch.tensor([[-(0.99**0.5) / 2, -(0.99**0.5) / 2, 0], [1 / 6] * 3]))


def test_gspo_clips_whole_sequences_narrowly(monkeypatch):
    """s = 1.001 is above 1 + 4e-4: with A > 0 the sequence drops out, although its tokens lie far on both sides."""
    script = example("gspo", monkeypatch)
    new = torch.tensor([[1.4, 1.001**2 / 1.4]]).log().tolist()
    for advantage, kept in ((1.0, False), (-1.0, True)):
        _, gradient = gspo_loss(script, new, [[0.0, 0.0]], [advantage], [[True, True]])
        assert bool(gradient.abs().sum() > 0) == kept


def test_gspo_with_one_optimizer_step_a_batch_is_grpo(monkeypatch):
    script, logps = example("gspo", monkeypatch), torch.tensor([[-1.0, -2.0], [-0.5, -3.0]])
    mask = torch.ones(2, 2, dtype=torch.bool)
    gradients = []
    for module, flags in ((script, {}), (grpo, {"loss_type": "grpo"})):
        leaf = logps.clone().requires_grad_()
        batch = module.Batch(mask, mask, mask, mask, loss_mask=mask, advantages=torch.tensor([1.5, -0.5]))
        module.policy_loss(leaf, torch.zeros(2, 2), batch, module.Args(**flags), 4, 2)[0].backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


@pytest.fixture
def checkout(tmp_path):
    """A copy of what a forker works with."""
    for path in ("engine", "tiny_model"):
        shutil.copytree(ROOT / path, tmp_path / path)
    for name in ("grpo.py", "common.py", "tests/test_equations.py"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def test_the_five_steps_of_the_readme(checkout):
    """A copy of grpo.py with another loss, another element in the list of samples and a flag of its own."""
    readme = (ROOT / "README.md").read_text()
    loss, sample = re.findall(r"```python\n\s*(.+)\n\s*```", readme[readme.index("## Fork it") : readme.index("## Run it")])
    flag = re.search(r"`(name: float = arg\(.+?\))`", readme)[1]
    text = (checkout / "grpo.py").read_text()  # 1
    old_loss = re.search(r"    token_loss = -torch.min.*\n", text)[0]
    text = text.replace(old_loss, f"    {loss}\n")  # 2
    line = "    metrics = common.rollout_metrics(samples, args)\n"
    text = text.replace(line, f"""    for i in range(0, len(samples), args.num_generations):
        problem, prompt_ids, reward, ended = samples[i].problem, samples[i].prompt_ids, args.name, True
        text = f"\\\\boxed{{{{ {{problem['answer']}} }}}}"
        ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
        {sample}
{line}""")  # 3
    text = text.replace("    # loss\n", f"    {flag}\n    # loss\n")  # 4
    (checkout / "mine.py").write_text(text)
    words = ["--max_steps", "2", "--prompts_per_step", "2", "--eval_steps", "0", "--name", "0.5", "--output_dir", "run"]
    done = processes.run("mine.py", *words, cwd=checkout)  # 5
    assert done.returncode == 0, done.stderr
    rows = [json.loads(row) for row in (checkout / "run" / "completions" / "step-000002.jsonl").read_text().splitlines()]
    assert rows[0]["completion"] == f"\\boxed{{ {rows[0]['answer']} }}" and rows[0]["reward"] == 0.5
    assert json.loads((checkout / "run" / "args.json").read_text())["args"]["name"] == 0.5
    refused = processes.run("mine.py", "--name", "0", cwd=checkout)
    assert refused.returncode == 2 and "--name must be above 0" in refused.stderr

    test = (checkout / "test_equations.py").read_text()
    assert test.count("import grpo as script") == 1
    (checkout / "test_mine.py").write_text(test.replace("import grpo as script", "import mine as script"))
    done = processes.run("-c", "import sys, pytest; sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', 'test_mine.py']))", cwd=checkout)
    failed = re.findall(r"^FAILED \S+::(\w+)", done.stdout, re.MULTILINE)
    assert failed and all("clip" in name for name in failed), done.stdout  # the copied file sees the other loss, and only that
    assert "passed" in done.stdout


def test_gspo_on_a_rank_without_a_row_is_zero(monkeypatch):
    script, mask = example("gspo", monkeypatch), torch.ones(2, 3, dtype=torch.bool)
    batch = script.Batch(mask.long(), mask, mask.long(), mask, loss_mask=mask, advantages=torch.ones(2))[torch.zeros(0, dtype=torch.int64)]
    loss, _ = script.policy_loss(torch.zeros(1, 1, requires_grad=True), torch.zeros(1, 1), batch, script.Args(), 6, 2)
    loss.backward()
    assert loss.item() == 0.0
