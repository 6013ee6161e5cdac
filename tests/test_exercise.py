"""Does the exercise accept right answers, refuse wrong ones with the hint that helps, and ship unsolved?"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import answers
import exercise
import processes

ROOT = Path(exercise.__file__).parents[1]


def reinforce_loss(logps, rewards, mask):
    return -(rewards[:, None] * logps)[mask].mean()


def group_advantages(rewards, num_generations):
    groups = rewards.reshape(-1, num_generations)
    std, mean = torch.std_mean(groups, dim=1, correction=0, keepdim=True)
    return ((groups - mean) / (std + 1e-6)).flatten()


def clipped_loss(logps, old_logps, advantages, mask, epsilon):
    ratio, advantages = (logps - old_logps).exp(), advantages[:, None]
    return -torch.minimum(ratio * advantages, ratio.clip(1 - epsilon, 1 + epsilon) * advantages)[mask].mean()


def row_to_replace(rewards, retelling_reward, delta, rho):
    failed = sum(reward < delta for reward in rewards)
    if failed < rho * len(rewards) or retelling_reward < delta:
        return None
    return len(rewards) - 1 - rewards[::-1].index(min(rewards))


def teacher_weight(logps, gamma):
    return torch.sigmoid(logps - torch.tensor(gamma).log())


RIGHT = {1: reinforce_loss, 2: group_advantages, 3: clipped_loss, 4: row_to_replace, 5: teacher_weight}


def complaint(number, function):
    return exercise.check(SimpleNamespace(**{RIGHT[number].__name__: function}), number)


@pytest.mark.parametrize("number", RIGHT)
def test_a_right_answer_passes_and_the_stubs_fail_as_shipped(number):
    """The stubs have the names and the arguments of the right answers."""
    stub = getattr(answers, RIGHT[number].__name__)
    assert stub.__code__.co_varnames == RIGHT[number].__code__.co_varnames[: RIGHT[number].__code__.co_argcount]
    assert exercise.check(answers, number) == "not written yet"
    assert complaint(number, RIGHT[number]) is None


def flat(loss, mask):
    return (loss * mask).sum() / mask.sum()


def clipped_by(choose=torch.min, ratio_of=lambda new, old: (new - old).exp()):
    def loss(logps, old_logps, advantages, mask, epsilon):
        ratio, advantages = ratio_of(logps, old_logps), advantages[:, None]
        return -flat(choose(ratio * advantages, ratio.clip(1 - epsilon, 1 + epsilon) * advantages), mask)
    return loss


def gate(rewards, retelling_reward, delta, rho, failed=lambda reward, delta: reward < delta):
    share = sum(failed(reward, delta) for reward in rewards) / len(rewards)
    return max(range(len(rewards)), key=lambda row: (-rewards[row], row)) if share >= rho and retelling_reward >= delta else None


def in_place(rewards, num_generations):
    advantages = group_advantages(rewards, num_generations)
    rewards -= rewards.mean()
    return advantages


WRONG = [  # written as a beginner would, not as exercise.py does
    (1, lambda logps, rewards, mask: (rewards[:, None] * logps)[mask].mean(), "the sign"),
    (1, lambda logps, rewards, mask: -(rewards[:, None] * logps).mean(), "the mask is ignored"),
    (1, lambda logps, rewards, mask: -(rewards[:, None] * logps * mask).sum() / mask.numel(), "the denominator counts padding"),
    (1, lambda logps, rewards, mask: -(rewards * (logps * mask).sum(1) / mask.sum(1)).mean(), "each row has its own mean first"),
    (1, lambda logps, rewards, mask: -(rewards * (logps * mask).sum(1)).mean(), "divided by the rows"),
    (1, lambda logps, rewards, mask: -(rewards[:, None] * logps)[mask].sum(), "not divided by the number of tokens"),
    (1, lambda logps, rewards, mask: -(rewards[:, None] * logps.exp())[mask].mean(), "in place of log pi"),
    (1, lambda logps, rewards, mask: -logps[mask].mean(), "the rewards are ignored"),
    (1, lambda logps, rewards, mask: -((rewards - rewards.mean())[:, None] * logps)[mask].mean(), "a baseline is subtracted"),
    (1, lambda logps, rewards, mask: -(rewards[:, None] * logps.detach())[mask].mean(), "something is detached"),
    (1, lambda logps, rewards, mask: -(rewards[:, None] * logps) * mask / mask.sum(), "the shape is (2, 3) and should be ()"),
    (1, lambda logps, rewards, mask: -(rewards * logps)[mask].mean(), "RuntimeError: The size of tensor a"),
    (1, lambda logps, rewards, mask: -(rewards[:, None] * logps)[mask].mean().item(), "a Tensor is wanted, not a float"),
    (2, lambda rewards, n: ((x := rewards.view(-1, n)) - x.mean(1, True)).div(x.std(1, keepdim=True) + 1e-6).view(-1), "correction=0"),
    (2, lambda rewards, n: ((x := rewards.view(-1, n)) - x.mean(1, True)).view(-1), "nothing is divided by the std"),
    (2, lambda rewards, n: ((x := rewards.view(-1, n)) - x.mean(1, True)).div(x.var(1, correction=0, keepdim=True) + 1e-6).view(-1),
     "the variance"),
    (2, lambda rewards, n: ((x := rewards.view(-1, n)) - x.mean(1, True)).div(x.std(1, correction=0, keepdim=True)).view(-1), "0 by 0"),
    (2, lambda rewards, n: ((x := rewards.view(-1, n)) - x.mean(1, True)).div(x.std(1, correction=0, keepdim=True) + 1).view(-1),
     "too large"),
    (2, lambda rewards, n: (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-6), "of the batch, not of each group"),
    (2, lambda rewards, n: ((x := rewards.view(-1, n)) - x.mean(1, True)).view(-1) / (rewards.std(correction=0) + 1e-6), "std is that of"),
    (2, lambda rewards, n: (x := rewards.view(-1, n)).div(x.std(1, correction=0, keepdim=True) + 1e-6).view(-1), "mean is not subtracted"),
    (2, lambda rewards, n: ((x := rewards.view(n, -1)) - x.mean(0)).div(x.std(0, correction=0) + 1e-6).view(-1), "adjacent"),
    (2, in_place, "the function changes its input rewards"),
    (3, clipped_by(torch.max), "the larger product"),
    (3, clipped_by(lambda plain, clipped: clipped), "the clip stands alone"),
    (3, clipped_by(lambda plain, clipped: plain), "the ratio is not clipped"),
    (3, lambda a, b, c, mask, e: -clipped_loss(a, b, c, mask, e), "the sign"),
    (3, lambda a, b, c, mask, e: clipped_loss(a, b, c, torch.ones_like(mask), e), "the mask is ignored"),
    (3, lambda a, b, c, mask, e: clipped_loss(a, b, c, mask, e) * mask.sum() / mask.numel(), "the denominator counts padding"),
    (3, lambda a, b, c, mask, e: torch.stack([clipped_loss(*(x[i:i + 1] for x in (a, b, c, mask)), e) for i in range(len(a))]).mean(),
     "each row has its own mean first"),
    (3, lambda a, b, c, mask, e: clipped_loss(a, b, c, mask, e) * mask.sum() / len(a), "divided by the rows"),
    (3, lambda a, b, c, mask, e: clipped_loss(a, b, c, mask, e) * mask.sum(), "not divided by the number of tokens"),
    (3, clipped_by(ratio_of=lambda new, old: (old - new).exp()), "upside down"),
    (3, clipped_by(ratio_of=lambda new, old: new - old), "the difference itself"),
    (3, clipped_by(ratio_of=lambda new, old: new / old), "log-probs are divided"),
    (3, clipped_by(ratio_of=lambda new, old: (new - old).exp().detach()), "the ratio is detached"),
    (4, lambda *a: gate(*a, failed=lambda reward, delta: reward <= delta), "R < delta"),
    (4, lambda rewards, told, delta, rho: gate(rewards, told, delta, rho + 1e-9), "gamma_fail >= rho"),
    (4, lambda rewards, told, delta, rho: gate(rewards, told, delta, rho / len(rewards)), "not a number of rollouts"),
    (4, lambda rewards, told, delta, rho: gate(rewards, told, delta, 1), "the gate waits for all"),
    (4, lambda rewards, told, delta, rho: gate(rewards, told, delta, 0), "the gate is always open"),
    (4, lambda *a: gate(*a, failed=lambda reward, delta: reward >= delta), "counts the rollouts that are right"),
    (4, lambda rewards, told, delta, rho: None if gate(rewards, told, delta, rho) is None else rewards.index(min(rewards)),
     "the first of equals"),
    (4, lambda rewards, told, delta, rho: None if gate(rewards, told, delta, rho) is None else
     len(rewards) - 1 - rewards[::-1].index(max(rewards)), "the best rollout"),
    (4, lambda rewards, told, delta, rho: gate(rewards, 9.0, delta, rho), "a wrong retelling"),
    (4, lambda rewards, told, delta, rho: gate(rewards, told - 1e-9, delta, rho), "a retelling with a reward of delta"),
    (4, lambda rewards, told, delta, rho: None if (row := gate(rewards, told, delta, rho)) is None else row - len(rewards), "from the end"),
    (4, lambda rewards, told, delta, rho: 2, "a NoneType is wanted, not a int"),
    (4, lambda rewards, told, delta, rho: 0, "the value is 0 and should be 2"),
    (5, lambda logps, gamma: logps / (logps + gamma), "the log-prob stands in place of p"),
    (5, lambda logps, gamma: logps.exp(), "gamma is missing"),
    (5, lambda logps, gamma: gamma / (gamma + logps.exp()), "gamma stands above the line"),
    (5, lambda logps, gamma: logps.exp() / (logps.detach().exp() + gamma), "the p below the line"),
    (5, lambda logps, gamma: logps.detach().exp() / (logps.exp() + gamma), "the p above the line"),
    (5, lambda logps, gamma: teacher_weight(logps, gamma).detach(), "the weight is detached"),
    (5, lambda logps, gamma: (w := teacher_weight(logps, gamma)) * (1 - w), "f itself is asked for"),
    (5, lambda logps, gamma: teacher_weight(logps, gamma).detach() * logps, "give f(p) alone"),
    (5, lambda logps, gamma: teacher_weight(logps, gamma).clamp(min=0.2), "0.2] and should be [0.5, 0.9091, 0.009901]"),
    (5, lambda logps, gamma: teacher_weight(2 * logps - logps.detach(), gamma), "the values are right, the gradient by logps is"),
]


@pytest.mark.parametrize("number, function, hint", WRONG)
def test_a_wrong_answer_gets_the_hint_that_helps(number, function, hint):
    names = RIGHT[number].__code__.co_varnames[: RIGHT[number].__code__.co_argcount]
    told = complaint(number, lambda **inputs: function(*(inputs[name] for name in names)))
    assert told and hint in told and "\n" not in told


def test_every_hint_is_tried_and_no_mistake_is_the_right_answer():
    """A mistake that gave the right numbers on all inputs could never be told."""
    for number, (script, mistakes) in exercise.EXERCISES.items():
        inputs = exercise.cases()[number]
        for mistake, hint in mistakes():
            right = [all(map(exercise.agree, exercise.outcome(mistake, case), exercise.outcome(script, case))) for case in inputs]
            assert not all(right), hint
            assert any(number == other and part in hint for other, _, part in WRONG), hint


@pytest.mark.parametrize("arguments, code, said", [
    (["2", "mine.py"], 0, "2 group_advantages: right, on 6 inputs"),
    (["mine.py"], 1, "usage: python docs/exercise.py [1 to 5 [FILE]]"),
    (["6"], 1, "usage: "),
    (["2", "none.py"], 1, "none.py: no such file"),
    ([], 1, "5 teacher_weight: not written yet"),
])
def test_the_command_says_what_is_wrong_in_a_line(arguments, code, said, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("import grpo\n\ngroup_advantages = grpo.group_advantages\n")
    with pytest.raises(SystemExit) as stop:
        exercise.main(arguments)
    assert (stop.value.code if isinstance(stop.value.code, int) else 1) == code
    assert said in capsys.readouterr().out + str(stop.value.code)


def test_the_command_of_the_page_runs():
    run = processes.run("docs/exercise.py", "4")
    assert (run.returncode, run.stdout) == (1, "4 row_to_replace: not written yet\n"), run.stderr
