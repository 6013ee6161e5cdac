"""Checks the answers to docs/exercise.md: values and gradients beside those of the scripts, and a hint on the common mistakes.

    python docs/exercise.py 2                 check number 2 of docs/answers.py; without a number: all five
    python docs/exercise.py 2 mine.py         of another file
"""

import importlib.util
import math
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import common
import engine
import grpo
import luffy
import repo
import sft

# ---------------------------------------------------------------- what the scripts compute


def reinforce_loss(logps, rewards, mask):
    """sft.policy_loss of log-probs that are weighted by the rewards."""
    return sft.policy_loss(logps * rewards.unsqueeze(1), torch.zeros_like(logps), engine.Rows(None, None, None, mask), sft.Args(),
                           int(mask.sum()), len(mask))[0]


def group_advantages(rewards, num_generations):
    return grpo.group_advantages(rewards, num_generations)


def clipped_loss(logps, old_logps, advantages, mask, epsilon):
    batch = grpo.Batch(None, None, None, mask, loss_mask=mask, advantages=advantages, old_logps=old_logps)
    return grpo.policy_loss(logps, torch.zeros_like(logps), batch, grpo.Args(epsilon=epsilon), int(mask.sum()), len(mask))[0]


def row_to_replace(rewards, retelling_reward, delta, rho):
    """repo.help_failed_groups of one group, with a retelling of that reward."""
    told, *group = (common.Sample({"trace": "t"}, [], [0], "t", True, reward) for reward in (retelling_reward, *rewards))
    args = repo.Args(num_generations=len(group), reward_threshold=delta, failure_threshold=rho)
    with mock.patch.object(repo, "retell", lambda model, tokenizer, problems, *_: [told for _ in problems]):
        final, _ = repo.help_failed_groups(None, None, group, args, None)
    return next((place for place, sample in enumerate(final) if sample is told), None)


def teacher_weight(logps, gamma):
    """luffy.policy_loss of each token as a step of its own, with advantage 1, negated."""
    one, args = torch.tensor([[True]]), luffy.Args(shaping_gamma=gamma, max_completion_length=1)
    batch = luffy.Batch(None, None, None, one, loss_mask=one, advantages=torch.ones(1), off_policy=one[0])
    return torch.stack([-luffy.policy_loss(logp.view(1, 1), torch.zeros(1, 1), batch, args, 1, 1)[0] for logp in logps])


# ---------------------------------------------------------------- common mistakes: what they compute, and the hint


def per_token(loss, mask):
    return (loss * mask).sum() / mask.sum()


def per_row(loss, mask):
    return ((loss * mask).sum(1) / mask.sum(1)).mean()


REDUCTIONS = [  # of a token loss (B, T), wrongly
    (lambda loss, mask: -per_token(loss, mask), "the sign: a loss is minimised, so the loss is the objective negated"),
    (lambda loss, mask: loss.mean(), "the mask is ignored: padding is no token of the policy"),
    (lambda loss, mask: (loss * mask).mean(), "the denominator counts padding: divide by mask.sum()"),
    (per_row, "each row has its own mean first: here every token of the step has the same weight"),
    (lambda loss, mask: (loss * mask).sum() / len(mask), "the sum is divided by the rows, not by the tokens"),
    (lambda loss, mask: (loss * mask).sum(), "the sum is not divided by the number of tokens"),
]


def reinforce_mistakes():
    def token(logps, rewards):
        return -rewards.unsqueeze(1) * logps

    yield from ((lambda logps, rewards, mask, r=reduce: r(token(logps, rewards), mask), hint) for reduce, hint in REDUCTIONS)
    yield lambda logps, rewards, mask: per_token(token(logps.exp(), rewards), mask), "pi stands in place of log pi"
    yield lambda logps, rewards, mask: per_token(-logps, mask), "the rewards are ignored: without them this is SFT"
    yield lambda logps, rewards, mask: per_token(token(logps, rewards - rewards.mean()), mask), "a baseline is subtracted: not in this one"
    yield lambda logps, rewards, mask: per_token(token(logps.detach(), rewards), mask), "no gradient reaches logps: something is detached"


def advantages_by(mean, spread, eps=1e-6):
    """Advantages with a mean and a spread, functions of the groups (N, G)."""
    def advantages(rewards, num_generations):
        groups = rewards.view(-1, num_generations)
        return ((groups - mean(groups)) / (spread(groups) + eps)).flatten()
    return advantages


def advantage_mistakes():
    def mean(groups):
        return groups.mean(1, keepdim=True)

    def std(groups):
        return groups.std(1, correction=0, keepdim=True)

    yield advantages_by(mean, lambda groups: groups.std(1, keepdim=True)), "the std divides by G - 1: torch.std needs correction=0"
    yield advantages_by(mean, lambda groups: 1, 0), "nothing is divided by the std"
    yield advantages_by(mean, lambda groups: std(groups) ** 2), "the variance stands in place of the std"
    yield advantages_by(mean, std, 0), "1e-6 is missing: a group of equal rewards divides 0 by 0"
    yield advantages_by(mean, std, 1), "1e-6 is too large by far: did 1 stand there?"
    yield advantages_by(torch.mean, lambda groups: groups.std(correction=0)), "mean and std are those of the batch, not of each group"
    yield advantages_by(mean, lambda groups: groups.std(correction=0)), "the std is that of the batch, not of each group"
    yield advantages_by(lambda groups: 0, std), "the mean is not subtracted"
    yield (lambda rewards, num_generations: grpo.group_advantages(rewards.view(num_generations, -1).T.flatten(), num_generations)
           .view(-1, num_generations).T.flatten()), "the rows of one prompt are adjacent: view(-1, num_generations)"


def clip_mistakes():
    def token(ratio, advantages, epsilon, choose=torch.min):
        return -choose(ratio * advantages.unsqueeze(1), ratio.clamp(1 - epsilon, 1 + epsilon) * advantages.unsqueeze(1))

    def with_ratio(ratio, choose=torch.min):
        return lambda logps, old_logps, advantages, mask, epsilon: per_token(
            token(ratio(logps, old_logps), advantages, epsilon, choose), mask)

    def right(logps, old_logps):
        return torch.exp(logps - old_logps)

    yield from ((lambda logps, old_logps, advantages, mask, epsilon, r=reduce: r(token(right(logps, old_logps), advantages, epsilon), mask),
                 hint) for reduce, hint in REDUCTIONS)
    yield with_ratio(right, torch.max), "the larger product is taken: the objective is the smaller one, torch.min"
    yield with_ratio(right, lambda plain, clipped: clipped), "the clip stands alone: take the smaller of the plain and the clipped product"
    yield with_ratio(right, lambda plain, clipped: plain), "the ratio is not clipped"
    yield with_ratio(lambda new, old: torch.exp(old - new)), "the ratio is upside down: pi / pi_old"
    yield with_ratio(lambda new, old: new - old), "the ratio is exp(logps - old_logps), not the difference itself"
    yield with_ratio(lambda new, old: new / old), "log-probs are divided: the ratio is exp(logps - old_logps)"
    yield with_ratio(lambda new, old: right(new, old).detach()), "no gradient reaches logps: the ratio is detached"


def gate_mistakes():
    def replaced(failed=lambda reward, delta: reward < delta, opens=lambda share, rho, size: share >= rho, pick=min, places=reversed,
                 good=lambda reward, delta: reward >= delta):
        def row(rewards, retelling_reward, delta, rho):
            share = sum(failed(reward, delta) for reward in rewards) / len(rewards)
            helped = opens(share, rho, len(rewards)) and good(retelling_reward, delta)
            return pick(places(range(len(rewards))), key=lambda place: rewards[place]) if helped else None
        return row

    yield replaced(failed=lambda reward, delta: reward <= delta), "a reward of delta has not failed: R < delta"
    yield replaced(opens=lambda share, rho, size: share > rho), "the gate opens at rho itself: gamma_fail >= rho"
    yield replaced(opens=lambda share, rho, size: share * size >= rho), "rho is a share of the group, not a number of rollouts"
    yield replaced(opens=lambda share, rho, size: share == 1), "the gate waits for all rollouts to fail: rho is ignored"
    yield replaced(opens=lambda share, rho, size: True), "the gate is always open: gamma_fail and rho are ignored"
    yield replaced(opens=lambda share, rho, size: 1 - share >= rho), "the share counts the rollouts that are right, not those that failed"
    yield replaced(places=iter), "the first of equals is replaced: the last one is asked for"
    yield replaced(pick=max), "the best rollout is replaced: the worst one is asked for"
    yield replaced(good=lambda reward, delta: True), "a wrong retelling replaces a rollout: it must reach delta"
    yield replaced(good=lambda reward, delta: reward > delta), "a retelling with a reward of delta is right: >= delta"
    yield replaced(places=lambda places: [-1 - place for place in places]), "the place counts from the end: give one from 0 to G - 1"


def weight_mistakes():
    yield lambda logps, gamma: logps / (logps + gamma), "the log-prob stands in place of p: p = exp(log p)"
    yield lambda logps, gamma: logps.exp(), "gamma is missing: this is p itself"
    yield lambda logps, gamma: gamma / (logps.exp() + gamma), "gamma stands above the line: p / (p + gamma)"
    yield lambda logps, gamma: logps.exp() / (logps.exp() + gamma).detach(), "the gradient misses the p below the line: detach nothing"
    yield lambda logps, gamma: logps.exp().detach() / (logps.exp() + gamma), "the gradient misses the p above the line: detach nothing"
    yield lambda logps, gamma: (logps.exp() / (logps.exp() + gamma)).detach(), "no gradient reaches logps: the weight is detached"
    yield lambda logps, gamma: gamma * logps.exp() / (logps.exp() + gamma) ** 2, "this is the slope of f by log p: f itself is asked for"
    yield lambda logps, gamma: logps * (logps.exp() / (logps.exp() + gamma)).detach(), "a detached weight times log p: give f(p) alone"


# ---------------------------------------------------------------- inputs, and the comparison


def cases():
    """{number: list of inputs}: hand-worked ones first, then random ones."""
    draw = torch.Generator().manual_seed(0)

    def logps(*shape):
        return -3 * torch.rand(*shape, generator=draw)

    def mask(rows, width):
        return torch.arange(width) < torch.randint(1, width, (rows, 1), generator=draw)

    half = math.log(0.5)
    found = {
        1: [dict(logps=torch.tensor([[half, half, half], [half, half, half]]), rewards=torch.tensor([1.0, 0.0]),
                 mask=torch.tensor([[True, False, False], [True, True, True]]))],
        2: [dict(rewards=torch.tensor([1.0, 0.0, 0.0, 0.0]), num_generations=4), dict(rewards=torch.ones(4), num_generations=4),
            dict(rewards=torch.tensor([1.0, 0.0, 1.0, 1.0, 5.0, 3.0]), num_generations=2)],
        3: [dict(logps=torch.tensor([[math.log(ratio)]]), old_logps=torch.zeros(1, 1), advantages=torch.tensor([advantage]),
                 mask=torch.tensor([[True]]), epsilon=0.2) for ratio in (1.5, 0.5) for advantage in (2.0, -2.0)],
        4: [dict(rewards=rewards, retelling_reward=told, delta=0.5, rho=rho) for rewards, told, rho in [
            ([0.0, 1.0, 0.0, 1.0], 1.0, 0.5), ([0.0, 1.0, 1.0, 1.0], 1.0, 0.5), ([0.0, 0.0, 0.0, 0.0], 1.0, 1.0),
            ([0.0, 0.0, 0.0, 0.0], 0.0, 0.25), ([0.5, 0.2, 0.5, 1.0], 0.5, 0.5), ([0.5, 0.2, 0.3, 1.0], 0.5, 0.5),
            ([1.0, 1.0, 1.0, 1.0], 1.0, 0.125), ([0.0, 1.0, 1.0, 1.0], 1.0, 0.25)]],
        5: [dict(logps=torch.tensor([0.1, 1.0, 0.001]).log(), gamma=0.1)],
    }
    for rows, width in ((4, 3), (6, 5), (8, 7)):
        found[1].append(dict(logps=logps(rows, width), rewards=torch.rand(rows, generator=draw), mask=mask(rows, width)))
        found[2].append(dict(rewards=torch.rand(3 * rows, generator=draw), num_generations=rows))
        found[3].append(dict(logps=logps(rows, width), old_logps=logps(rows, width), advantages=torch.randn(rows, generator=draw),
                             mask=mask(rows, width), epsilon=0.2))
        found[4].append(dict(rewards=(torch.randint(0, 4, (rows,), generator=draw) / 4).tolist(), retelling_reward=1.0, delta=0.5, rho=0.5))
        found[5].append(dict(logps=logps(width), gamma=width / 40))
    return found


EXERCISES = {1: (reinforce_loss, reinforce_mistakes), 2: (group_advantages, advantage_mistakes), 3: (clipped_loss, clip_mistakes),
             4: (row_to_replace, gate_mistakes), 5: (teacher_weight, weight_mistakes)}


def outcome(function, case):
    """(value, its gradient by logps or None) of a function; an input that it changes in place is a ValueError."""
    given = {name: value.clone() if torch.is_tensor(value) else value for name, value in case.items()}
    if "logps" in given:
        given["logps"].requires_grad_()
    value = function(**given)
    for name, before in case.items():
        if not (torch.equal(given[name], before) if torch.is_tensor(before) else given[name] == before):
            raise ValueError(f"the function changes its input {name}")
    if "logps" not in given or not torch.is_tensor(value) or not value.requires_grad:
        return value, None
    weights = torch.linspace(1, 2, value.numel()).view(value.shape)  # so that tokens are told apart
    return value.detach(), torch.autograd.grad((value * weights).sum(), given["logps"], allow_unused=True)[0]


def agree(one, other):
    """Equal, as far as float32 goes."""
    if torch.is_tensor(one) and torch.is_tensor(other):
        return one.shape == other.shape and torch.allclose(one.double(), other.double(), rtol=1e-4, atol=1e-5, equal_nan=True)
    return type(one) is type(other) and one == other


def shown(value):
    """A value in a few words."""
    if not torch.is_tensor(value):
        return str(value)
    numbers = [f"{number:.4g}" for number in value.flatten().tolist()]
    return numbers[0] if value.dim() == 0 else f"[{', '.join(numbers[:8])}{', ...' if len(numbers) > 8 else ''}]"


def check(answers, number):
    """What is wrong with an answer, in one line, or None. answers: a module or any other object with the functions."""
    script, mistakes = EXERCISES[number]
    function, inputs = getattr(answers, script.__name__, None), cases()[number]
    if function is None:
        return "no such function is there"
    wanted = [outcome(script, case) for case in inputs]
    try:
        got = [outcome(function, case) for case in inputs]
    except NotImplementedError:
        return "not written yet"
    except Exception as error:  # whatever a beginner's code raises is told in one line
        return f"{type(error).__name__}: {error}".splitlines()[0]
    wrong = next((i for i in range(len(inputs)) if not all(map(agree, got[i], wanted[i]))), None)
    if wrong is None:
        return None
    for mistake, hint in mistakes():
        if all(all(map(agree, one, outcome(mistake, case))) for one, case in zip(got, inputs)):
            return hint
    (value, gradient), (right, slope) = got[wrong], wanted[wrong]
    place = ", ".join(f"{name} {shown(value)}" for name, value in inputs[wrong].items())
    if type(value) is not type(right):
        return f"a {type(right).__name__} is wanted, not a {type(value).__name__}, at {place}"
    if torch.is_tensor(value) and value.shape != right.shape:
        return f"the shape is {tuple(value.shape)} and should be {tuple(right.shape)}, at {place}"
    if agree(value, right):
        return f"the values are right, the gradient by logps is {shown(gradient)} and should be {shown(slope)}, at {place}"
    return f"the value is {shown(value)} and should be {shown(right)}, at {place}"


def main(arguments):
    numbers = [int(arguments[0])] if arguments and arguments[0].isdecimal() and int(arguments[0]) in EXERCISES else list(EXERCISES)
    if arguments and (len(numbers) > 1 or len(arguments) > 2):
        sys.exit("usage: python docs/exercise.py [1 to 5 [FILE]]")
    path = Path(arguments[1] if len(arguments) > 1 else Path(__file__).with_name("answers.py"))
    if not path.is_file():
        sys.exit(f"{path}: no such file")
    spec = importlib.util.spec_from_file_location("answers", path)
    answers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(answers)
    complaints = {number: check(answers, number) for number in numbers}
    for number, complaint in complaints.items():
        print(f"{number} {EXERCISES[number][0].__name__}: {complaint or f'right, on {len(cases()[number])} inputs'}")
    sys.exit(int(any(complaints.values())))


if __name__ == "__main__":
    main(sys.argv[1:])
