"""Do the advantage and the loss compute the printed equations? Hand-worked numbers and closed-form gradients.

For a fork: copy this file, change the import, change the numbers, and give `loss_of` the fields that your Batch adds. It needs no
other file of tests/.
"""

import math

import pytest
import torch

import grpo as script


def loss_of(logps, old_logps, advantages, mask, args, entropy=None, **fields):
    """(loss, metrics) of B rows that are a whole optimizer step. The loss reads no token ids, so they are 0. fields: more of the Batch."""
    mask = torch.tensor(mask, dtype=torch.bool)  # (B, T)
    ids, entropy = torch.zeros(mask.shape, dtype=torch.int64), torch.zeros(mask.shape) if entropy is None else entropy  # (B, T) each
    old_logps = None if old_logps is None else torch.as_tensor(old_logps)  # (B, T)
    batch = script.Batch(ids, mask, ids, mask, loss_mask=mask, advantages=torch.as_tensor(advantages), old_logps=old_logps, **fields)
    return script.policy_loss(torch.as_tensor(logps), entropy, batch, args, num_tokens=int(mask.sum()), num_rows=len(mask))


def test_advantages_are_centred_and_divided_by_the_population_std():
    """[GRPO sec 4.1.2] rewards 1 0 0 0: mean 1/4, population std sqrt(3)/4, so (3/4, -1/4, -1/4, -1/4) / (sqrt(3)/4)."""
    rewards = torch.tensor([1.0, 0, 0, 0, 0, 2, 2, 0])
    expected = [math.sqrt(3)] + [-1 / math.sqrt(3)] * 3 + [-1, 1, 1, -1]
    torch.testing.assert_close(script.group_advantages(rewards, 4), torch.tensor(expected), atol=1e-5, rtol=0)
    torch.testing.assert_close(script.group_advantages(rewards, 4, "none"), torch.tensor([0.75, -0.25, -0.25, -0.25, -1, 1, 1, -1]))


@pytest.mark.parametrize("scale_rewards", ["group", "none"])
def test_equal_rewards_give_exactly_zero(scale_rewards):
    assert script.group_advantages(torch.tensor([0.1] * 8 + [1.0] * 8), 8, scale_rewards).tolist() == [0.0] * 16
    assert script.group_advantages(torch.tensor([0.3]), 1, scale_rewards).tolist() == [0.0]


def test_advantages_leave_rewards_alone_and_refuse_broken_groups():
    rewards = torch.tensor([1.0, 0.0])
    script.group_advantages(rewards, 2)
    assert rewards.tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match="3 rewards do not form groups of 2"):
        script.group_advantages(torch.zeros(3), 2)


@pytest.mark.parametrize("ratio, advantage, expected_loss, expected_weight", [
    (1.5, 2.0, -2.4, 0.0),   # above the clip, good: capped at 1.2 A, no gradient
    (0.5, 2.0, -1.0, -1.0),  # below, good: the plain product is smaller, gradient ratio * A
    (1.5, -2.0, 3.0, 3.0),   # above, bad: the plain product is worse, gradient stays
    (0.5, -2.0, 1.6, 0.0),   # below, bad: held at 0.8 A, no gradient
])
def test_the_four_clip_cells(ratio, advantage, expected_loss, expected_weight):
    """[GRPO eq 3] epsilon 0.2; the weight is d loss / d logp."""
    logps = torch.tensor([[math.log(ratio)]], requires_grad=True)
    loss, sums = loss_of(logps, [[0.0]], [advantage], [[True]], script.Args())
    loss.backward()
    assert loss.item() == pytest.approx(expected_loss, abs=1e-6)
    assert logps.grad.item() == pytest.approx(expected_weight, abs=1e-6)
    clipped = sums["clip_ratio/low_mean"][0].item(), sums["clip_ratio/high_mean"][0].item()
    assert clipped == ((1, 0) if (ratio, advantage) == (0.5, -2.0) else (0, 1) if (ratio, advantage) == (1.5, 2.0) else (0, 0))


def test_clip_higher_moves_only_the_upper_clip():
    """[DAPO sec 3.1] epsilon_high 0.28; inf switches the upper clip off."""
    for epsilon_high, expected in ((0.28, -1.28), (math.inf, -1.5)):
        args = script.Args(epsilon_high=epsilon_high)
        assert loss_of([[math.log(1.5)]], [[0.0]], [1.0], [[True]], args)[0].item() == pytest.approx(expected, abs=1e-6)
        assert loss_of([[math.log(0.5)]], [[0.0]], [-1.0], [[True]], args)[0].item() == pytest.approx(0.8, abs=1e-6)


def test_each_loss_type_divides_by_its_own_denominator():
    """Two rows of 1 and 3 tokens at ratio 1 with A = 1 and -2, max_completion_length 4.

    dapo (-1 + 3*2)/4 [DAPO sec 3.3] · grpo (-1 + 2)/2 [GRPO eq 3] · dr_grpo (-1 + 6)/(2*4) [Dr. GRPO sec 3.2].
    """
    mask = [[True, False, False], [True, True, True]]
    for loss_type, expected in (("dapo", 5 / 4), ("grpo", 1 / 2), ("dr_grpo", 5 / 8)):
        args = script.Args(loss_type=loss_type, max_completion_length=4)
        loss, _ = loss_of(torch.zeros(2, 3), torch.zeros(2, 3), [1.0, -2.0], mask, args)
        assert loss.item() == pytest.approx(expected, abs=1e-6), loss_type


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_at_ratio_one_and_equal_lengths_the_loss_is_zero_and_its_gradient_is_not(loss_type):
    """docs/faq.md, question 1. d loss / d logp_it = -A_i / denominator, in closed form; no old_logps are those of the policy itself."""
    logps = torch.randn(4, 5, requires_grad=True)
    advantages = script.group_advantages(torch.tensor([1.0, 0, 0, 1]), 4)
    args = script.Args(loss_type=loss_type, max_completion_length=10)
    denominator = {"dapo": 20, "grpo": 20, "dr_grpo": 40}[loss_type]
    for old_logps in (logps.detach(), None):
        loss, _ = loss_of(logps, old_logps, advantages, [[True] * 5] * 4, args)
        (gradient,) = torch.autograd.grad(loss, logps)
        assert abs(loss.item()) < 1e-6
        torch.testing.assert_close(gradient, (-advantages / denominator).unsqueeze(1).expand(4, 5))


def test_masked_tokens_have_neither_loss_nor_gradient():
    logps = torch.zeros(1, 3, requires_grad=True)
    args, ref_logps = script.Args(beta=0.1), torch.full((1, 3), 9.0)
    loss, sums = loss_of(logps, [[0.0, 5.0, -5.0]], [1.0], [[True, False, False]], args, ref_logps=ref_logps)
    loss.backward()
    assert logps.grad[0, 1:].tolist() == [0.0, 0.0]
    assert sums["clip_ratio/high_mean"][0].item() == 0
    assert sums["kl"][0].item() == pytest.approx(math.exp(9) - 9 - 1, rel=1e-5)


def test_k3_is_the_printed_estimator():
    """[GRPO eq 4] and its gradient d k3 / d logp = 1 - exp(ref - logp), weighted by beta."""
    logps = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    ref_logps = torch.tensor([[-1.5, -2.0]])
    loss, sums = loss_of(logps, logps.detach(), [0.0], [[True, True]], script.Args(beta=0.04), ref_logps=ref_logps)
    loss.backward()
    k3 = math.exp(-0.5) + 0.5 - 1
    assert sums["kl"][0].item() == pytest.approx(k3, abs=1e-6)
    assert loss.item() == pytest.approx(0.04 * k3 / 2, abs=1e-7)
    torch.testing.assert_close(logps.grad, torch.tensor([[0.04 * (1 - math.exp(-0.5)) / 2, 0.0]]))


def test_entropy_bonus_lowers_the_loss_by_its_mean():
    entropy = torch.tensor([[2.0, 4.0]])
    loss, _ = loss_of([[0.0, 0.0]], [[0.0, 0.0]], [0.0], [[True, True]], script.Args(entropy_coef=0.01), entropy=entropy)
    assert loss.item() == pytest.approx(-0.03, abs=1e-7)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_no_tokens_at_all_is_zero_not_nan(loss_type):
    loss, _ = loss_of(torch.zeros(2, 1), torch.zeros(2, 1), [1.0, -1.0], [[False], [False]], script.Args(loss_type=loss_type))
    assert loss.item() == 0.0
