"""Does LUFFY put the teacher's trace into the group, and weigh its tokens as the equations say?"""

import math
import types

import pytest
import torch

import common
import luffy
import repo
from engine import tasks
from engine.flops import Flops
from methods import completions_of, flops_of, gradient_of, loaded, logps_without_padding, prompts_of, with_eos

# ---------------------------------------------------------------- equations


def test_advantages_count_the_teacher_and_have_no_std():
    """[LUFFY advantage] teacher right, seven own rows wrong: 1 - 1/8 and 0 - 1/8."""
    advantages = luffy.group_advantages(torch.tensor([1.0] + [0.0] * 7), 8, luffy.Args().scale_rewards)
    assert advantages.tolist() == [0.875] + [-0.125] * 7


@pytest.mark.parametrize("p", [0.001, 0.1, 1.0])
def test_weight_of_a_teacher_token(p):
    """[LUFFY shaping] d loss / d logp = -A f'(log p) / denominator, whatever the old log-probs, and clipped by no epsilon."""
    taught = torch.full((2, 3), math.log(0.4))
    cases = {"shaped": (p / (p + 0.1), 0.1 * p / (p + 0.1) ** 2), "none": (p, p),
             "importance": (min(p / 0.4, 1.5), p / 0.4 if p / 0.4 < 1.5 else 0.0)}
    for shaping, (value, weight) in cases.items():
        for epsilon in (math.inf, 0.01):
            args = luffy.Args(shaping=shaping, importance_cap=1.5, max_completion_length=10, epsilon=epsilon)
            fields = {"off_policy": torch.tensor([True, False])} | ({"behavior_logps": taught} if shaping == "importance" else {})
            for old in (-20.0, 0.0):
                _, gradient, sums = gradient_of(luffy, args, torch.full((2, 3), math.log(p)), [0.875, 0.0],
                                                old_logps=torch.full((2, 3), old), **fields)
                torch.testing.assert_close(gradient[0], torch.full((3,), -0.875 * weight / 20))
                assert gradient[1].tolist() == [0.0] * 3
                assert sums["offpolicy/ratio"][0].item() == pytest.approx(3 * value, rel=1e-5)
                assert sums["offpolicy/prob"][0].item() == pytest.approx(3 * p, rel=1e-5)


@pytest.mark.parametrize("taught", [-70.0, -1e4, -math.inf])
def test_importance_of_a_token_the_teacher_held_impossible_is_the_cap(taught):
    args = luffy.Args(shaping="importance", max_completion_length=1)
    loss, gradient, _ = gradient_of(luffy, args, [[-0.1]], [0.5], off_policy=torch.tensor([True]), behavior_logps=torch.tensor([[taught]]))
    assert loss == pytest.approx(-2.0 * 0.5) and gradient.item() == 0.0


def test_own_tokens_have_the_plain_ratio_and_no_clip_by_default():
    """Ratio 5 with A = 1 and 0.2 with A = -1: the gradient is ratio x A, which --epsilon 0.2 sets to 0. A teacher row stands beside."""
    logps, old_logps = [[math.log(0.5)], [math.log(0.1)], [math.log(0.3)]], [[math.log(0.1)], [math.log(0.5)], [0.0]]
    off_policy = torch.tensor([False, False, True])
    for epsilon, expected in ((math.inf, [-5.0, 0.2]), (0.2, [0.0, 0.0])):
        args = luffy.Args(**{} if epsilon == math.inf else {"epsilon": epsilon}, max_completion_length=1)
        _, gradient, sums = gradient_of(luffy, args, logps, [1.0, -1.0, 1.0], old_logps, off_policy=off_policy)
        torch.testing.assert_close(gradient.flatten(), torch.tensor([*expected, -0.1 * 0.3 / 0.4**2]) / 3)
        assert sums["onpolicy/ratio"][0].item() == pytest.approx(5.2) and sums["onpolicy/ratio"][1].item() == 2


def test_objective_equals_its_equations_written_out():
    """[LUFFY objective] a loop over rows and tokens in plain Python: value, and gradient by log-prob and by entropy."""
    torch.manual_seed(1)
    rows, width, longest, gamma, coef = 8, 6, 7, 0.1, 0.05
    logps, old_logps, entropy = (-3 * torch.rand(3, rows, width, dtype=torch.float64)).float()
    logps, entropy = logps.requires_grad_(), (-entropy).requires_grad_()
    lengths = [6, 3, 1, 4, 5, 2, 6, 0]
    mask = torch.arange(width) < torch.tensor(lengths).unsqueeze(1)
    off_policy, rewards = torch.tensor([True, False, False, False] * 2), [1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    args = luffy.Args(max_completion_length=longest, entropy_coef=coef)
    advantages = luffy.group_advantages(torch.tensor(rewards), 4, args.scale_rewards)
    batch = luffy.Batch(None, None, None, None, mask, advantages, old_logps, off_policy=off_policy)
    loss, sums = luffy.policy_loss(logps, entropy, batch, args, sum(lengths), rows)

    expected, shares = 0.0, {True: 0.0, False: 0.0}
    for i in range(rows):
        group = rewards[i // 4 * 4 : i // 4 * 4 + 4]
        advantage = rewards[i] - sum(group) / 4
        for t in range(lengths[i]):
            p = logps[i, t].exp()
            factor = p / (p + gamma) if i % 4 == 0 else p / old_logps[i, t].exp()
            token = -factor * advantage - coef * entropy[i, t]
            expected = expected + token / (rows * longest)
            shares[i % 4 == 0] += token.item()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6) and abs(loss.item()) > 1e-2
    for mine, wanted in zip(torch.autograd.grad(loss, (logps, entropy)), torch.autograd.grad(expected, (logps, entropy))):
        assert wanted.abs().max() > 5e-4
        torch.testing.assert_close(mine, wanted, atol=1e-6, rtol=0)
    assert sums["offpolicy/loss"][0].item() == pytest.approx(shares[True], abs=1e-5) and sums["offpolicy/loss"][1] == 11
    assert sums["onpolicy/loss"][0].item() == pytest.approx(shares[False], abs=1e-5) and sums["onpolicy/loss"][1] == 16


def test_clip_ratio_counts_what_a_clip_holds_and_no_weight_without_one():
    """Own tokens at ratios 5 with A = 1 and 0.2 with A = -1 are held; the third row's weight is far below 1 - epsilon and has no clip."""
    logps, old_logps = [[math.log(0.5)], [math.log(0.1)], [math.log(0.001)]], [[math.log(0.1)], [math.log(0.5)], [0.0]]
    third = torch.tensor([False, False, True])
    for module, flags, fields in ((luffy, {"epsilon": 0.2}, {"off_policy": third}),
                                  (repo, {"rephrase_ratio": "shaped"}, {"rephrased": third, "behavior_logps": torch.zeros(3, 1)})):
        *_, sums = gradient_of(module, module.Args(max_completion_length=1, **flags), logps, [1.0, -1.0, -1.0], old_logps, **fields)
        assert [sums[f"clip_ratio/{side}_mean"][0].item() for side in ("low", "high")] == [1, 1], module.__name__


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])
def test_the_trace_takes_the_first_slot_and_the_others_are_sampled(tiny, sampler, pad):
    """Three groups of 4, the middle one without a trace; 10 rows are sampled, and only they are paid for."""
    model, tokenizer = tiny
    tokenizer.pad_token = pad
    args, problems = loaded(luffy, tokenizer)
    problems[1] |= {"trace": None, "trace_ids": None, "behavior_logps": None}
    right, wrong = [f"\\boxed{{ {problem['answer']} }}" for problem in problems], "\\boxed{ 1 }"
    drawn = [wrong, "7 ; 7 " + wrong, wrong, wrong, wrong, wrong, right[1], right[2], wrong, "} " + wrong]
    prompts, flops = sampler(drawn), Flops.of(model)
    batch, samples, metrics = luffy.rollout(model, None, tokenizer, problems, args, flops)

    expected = [problems[0]["trace"], *drawn[:3], *drawn[3:7], problems[2]["trace"], *drawn[7:]]
    assert [sample.text for sample in samples] == expected and problems[0]["trace"] == tasks.solve(problems[0]["prompt"], "teacher")[0]
    ids = completions_of(batch)
    assert ids == [with_eos(tokenizer, text) for text in expected] and ids[0] == problems[0]["trace_ids"]
    assert torch.equal(batch.loss_mask, batch.completion_mask)
    questions = [problems[i // 4]["prompt_ids"] for i in range(12)]
    assert prompts_of(batch) == questions and prompts == [[questions[i] for i in range(12) if i not in (0, 8)]]
    assert batch.off_policy.nonzero().flatten().tolist() == [0, 8] and batch.behavior_logps is None
    assert all(sample.ended for sample in samples) and [sample.reward for sample in samples] == [1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0]
    assert batch.advantages.tolist() == [0.75, -0.25, -0.25, -0.25, -0.25, -0.25, -0.25, 0.75, 0.5, 0.5, -0.5, -0.5]
    assert metrics["onpolicy/reward"] == pytest.approx(2 / 10) and metrics["offpolicy/solved_by_teacher_only"] == pytest.approx(1 / 3)
    lengths = [len(questions[i]) + len(ids[i]) for i in range(12) if i not in (0, 8)]
    assert flops.spent["rollout"] == flops_of(model, lengths) and flops.num_tokens == sum(lengths)
    assert flops.spent["paper"] == 2 * model.num_parameters() * sum(lengths)
    alone = [logps_without_padding(model, question, row) for question, row in zip(questions, ids)]
    for i in (0, 1, 5, 8):
        torch.testing.assert_close(batch.old_logps[i, : len(ids[i])], alone[i], atol=1e-4, rtol=0)


def test_several_teacher_rows_are_different_traces_of_the_problem(tiny, sampler):
    """Two rows of four: the problem's two traces with their own log-probs; a problem with one trace has it twice."""
    args, problems = loaded(luffy, tiny[1], num_hard=2, num_easy=0, num_off_policy=2, shaping="importance")
    more = f"\\boxed{{ {problems[0]['answer']} }}"
    ids = [problems[0]["trace_ids"], with_eos(tiny[1], more), problems[1]["trace_ids"]]
    problems[0] |= {"behavior_logps": [-0.5] * len(ids[0]), "other_traces": [
        {"trace": more, "trace_ids": ids[1], "behavior_logps": [-0.25] * len(ids[1])}]}
    problems[1] |= {"behavior_logps": [-1.0] * len(ids[2])}
    sampler(["1 ; 1"] * 4)
    batch, samples, _ = luffy.rollout(tiny[0], None, tiny[1], problems, args, Flops.of(tiny[0]))
    completions = completions_of(batch)
    assert [completions[i] for i in (0, 1, 4, 5)] == [ids[0], ids[1], ids[2], ids[2]] and samples[1].text == more
    assert [batch.behavior_logps[i].min().item() for i in (0, 1, 4, 5)] == [-0.5, -0.25, -1.0, -1.0]
    assert (batch.behavior_logps[1] != 0).sum() == len(ids[1])


def test_without_any_trace_it_is_an_ordinary_rollout(tiny, sampler):
    args, problems = loaded(luffy, tiny[1], num_hard=1, num_easy=1)
    problems = [problem | {"trace": None, "trace_ids": None} for problem in problems]
    prompts = sampler([f"\\boxed{{ {problems[0]['answer']} }}", *["1"] * 7])
    batch, _, metrics = luffy.rollout(tiny[0], None, tiny[1], problems, args, Flops.of(tiny[0]))
    assert len(prompts[0]) == 8 and batch.off_policy.tolist() == [False] * 8 and batch.behavior_logps is None
    assert metrics["onpolicy/reward"] == metrics["reward"] == 1 / 8 and metrics["offpolicy/solved_by_teacher_only"] == 0


def test_importance_takes_the_traces_own_log_probs(tiny, sampler):
    """behavior_logps of slot 0 are those of the file, by position; own rows and padding are 0."""
    args, problems = loaded(luffy, tiny[1], task="diary", trace_style="self", num_easy=0, shaping="importance")
    sampler(["1 ; 1"] * 6)
    batch, _, _ = luffy.rollout(tiny[0], None, tiny[1], problems, args, Flops.of(tiny[0]))
    taught = batch.behavior_logps
    assert taught.shape == batch.completion_ids.shape and taught[[1, 2, 3, 5, 6, 7]].abs().sum() == 0
    for problem, i in zip(problems, (0, 4)):
        length = len(problem["trace_ids"])
        assert taught[i, :length].tolist() == pytest.approx(problem["behavior_logps"]) and taught[i, length:].abs().sum() == 0
        # The file's numbers are the base's own, at its temperature of 1.
        alone = logps_without_padding(tiny[0], problem["prompt_ids"], problem["trace_ids"])
        torch.testing.assert_close(taught[i, :length], alone, atol=1e-4, rtol=0)


# ---------------------------------------------------------------- flags


@pytest.mark.parametrize("flags, expected", [
    (["--num_off_policy", "8"], "--num_off_policy must be below --num_generations (8), got 8"),
    (["--num_off_policy", "-1"], "--num_off_policy must be at least 0, got -1"),
    (["--shaping", "plain"], "--shaping: invalid choice: 'plain'"),
    (["--shaping_gamma", "0"], "--shaping_gamma must be above 0, got 0.0"),
    (["--importance_cap", "nan"], "--importance_cap: expected a number, got nan"),
    (["--shaping", "importance"], "--shaping importance needs traces with log-probs"),
])
def test_flags_that_cannot_work_are_refused(refused, flags, expected):
    assert expected in refused(luffy, *flags)


def test_a_trace_without_log_probs_is_no_trace_of_probability_one():
    """`main` has required them; a fork that does not is told, and trains on no wrong weight."""
    sample = common.Sample({}, [], [7], "", True, source="trace")
    with pytest.raises(RuntimeError, match="NoneType"):
        common.behavior_logps(types.SimpleNamespace(completion_ids=torch.zeros(1, 1)), [sample])


@pytest.mark.parametrize("gamma", [0.1, 0.4])
def test_gamma_is_that_of_the_flag(gamma):
    for module, flags, fields in ((luffy, {}, {"off_policy": torch.tensor([True])}), (repo, {"rephrase_ratio": "shaped"}, {
            "rephrased": torch.tensor([True]), "behavior_logps": torch.zeros(1, 1)})):
        args = module.Args(shaping_gamma=gamma, max_completion_length=1, **flags)
        _, gradient, _ = gradient_of(module, args, [[math.log(0.3)]], [1.0], **fields)
        assert gradient.item() == pytest.approx(-gamma * 0.3 / (0.3 + gamma) ** 2), module.__name__
