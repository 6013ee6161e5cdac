"""Do the siblings in examples/ compute what their equations say, in numbers worked out by hand?"""

import copy
import math

import pytest
import torch

import common
from engine import tasks
from engine.flops import Flops
from methods import completions_of, flops_of, gradient_of, loaded, logps_without_padding, prompts_of
from test_siblings import sibling  # noqa: F401 (a fixture)

WRONG = "\\boxed{ 1 }"


def right(problem):
    return f"\\boxed{{ {problem['answer']} }}"


# ---------------------------------------------------------------- DAPO


def test_groups_without_a_signal_are_sampled_anew_and_all_are_paid_for(tiny, sampler, sibling):  # noqa: F811
    """[DAPO sec 3.2] Three groups of 2: all wrong, mixed, all right. Round 2 fills the first place, round 3 the last one."""
    dapo, (model, tokenizer) = sibling("dapo"), tiny
    args, problems = loaded(dapo, tokenizer, num_hard=6, num_easy=0, num_generations=2)
    args.prompts_per_step, problems, spare = 3, problems[:3], problems[3:] + problems[:3]
    rounds = [[WRONG, WRONG, right(problems[1]), WRONG, right(problems[2]), right(problems[2])],
              [WRONG, right(spare[0]), WRONG, WRONG], [right(spare[2]), WRONG]]
    prompts, flops = sampler(*rounds), Flops.of(model)
    batch, samples, metrics = dapo.rollout(model, None, tokenizer, problems, spare, args, flops)

    final = [spare[0], problems[1], spare[2]]
    assert [sample.problem for sample in samples] == [problem for problem in final for _ in range(2)]
    assert prompts_of(batch) == [problem["prompt_ids"] for problem in final for _ in range(2)]
    assert [sample.reward for sample in samples] == [0, 1, 1, 0, 1, 0]
    torch.testing.assert_close(batch.advantages, torch.tensor([-1.0, 1.0, 1.0, -1.0, 1.0, -1.0]), atol=1e-4, rtol=0)
    assert prompts[1:] == [[spare[i]["prompt_ids"] for i in (0, 0, 1, 1)], [spare[2]["prompt_ids"]] * 2]
    assert (metrics["resampled/rounds"], metrics["resampled/groups"], metrics["resampled/no_signal"]) == (3, 3, 0)
    assert metrics["reward"] == 0.5 and metrics["frac_reward_zero_std"] == pytest.approx(2 / 3)  # of the first round
    lengths = [len(prompt) + len(tokenizer(text)["input_ids"]) + 1 for asked, texts in zip(prompts, rounds)
               for prompt, text in zip(asked, texts)]
    assert len(lengths) == 12 and flops.spent["rollout"] == flops_of(model, lengths) and flops.num_tokens == sum(lengths)


def test_when_the_rounds_are_used_up_a_group_without_signal_stays(tiny, sampler, sibling):  # noqa: F811
    dapo = sibling("dapo")
    args, problems = loaded(dapo, tiny[1], num_hard=2, num_easy=0, num_generations=2, max_num_gen_batches=2)
    args.prompts_per_step = 1
    sampler([WRONG] * 2, [WRONG] * 2)
    batch, _, metrics = dapo.rollout(tiny[0], None, tiny[1], problems[:1], problems[1:], args, Flops.of(tiny[0]))
    assert batch.advantages.tolist() == [0.0, 0.0]
    assert (metrics["resampled/rounds"], metrics["resampled/groups"], metrics["resampled/no_signal"]) == (2, 1, 1)


# ---------------------------------------------------------------- CHORD


def test_mu_falls_as_half_a_cosine(sibling):  # noqa: F811
    """[CHORD schedule] from 0.5 to 0.02 in 100 steps: half-way 0.26, and a constant without decay."""
    chord = sibling("chord")
    values = [chord.mu_at(step, chord.Args()) for step in (1, 26, 51, 101, 500)]
    assert values == pytest.approx([0.5, 0.02 + 0.48 * (1 + 2**-0.5) / 2, 0.26, 0.02, 0.02], abs=1e-9)
    assert chord.mu_at(1, chord.Args(mu_decay_steps=0)) == 0.02


@pytest.mark.parametrize("p", [1e-4, 0.5, 0.9])
def test_the_weight_of_a_trace_token_is_p_times_1_minus_p(p, sibling):  # noqa: F811
    """[CHORD weight] value and gradient of -phi log p, with phi constant; the policy's own token has GRPO's, both times their share."""
    chord, off = sibling("chord"), torch.tensor([True, False])
    for weighed, phi in ((True, p * (1 - p)), (False, 1.0)):
        loss, gradient, means = gradient_of(chord, chord.Args(token_weight=weighed), [[math.log(p)], [math.log(0.3)]], [1.0, -2.0],
                                            off_policy=off, share=torch.tensor([0.25, 3.0]))
        assert loss == pytest.approx((-0.25 * phi * math.log(p) + 3.0 * 2.0) / 2, rel=1e-5)
        assert gradient.flatten().tolist() == pytest.approx([-0.25 * phi / 2, 3.0 * 2.0 / 2], rel=1e-4)
        assert means["offpolicy/prob"][0].item() == pytest.approx(p) and means["offpolicy/prob"][1] == 1


def test_a_trace_is_never_counted_as_clipped(sibling):  # noqa: F811
    """Both rows have the ratio e and the advantage 1; the policy's own is clipped."""
    chord = sibling("chord")
    _, _, means = gradient_of(chord, chord.Args(), [[-0.5], [-0.5]], [1.0, 1.0], old_logps=torch.tensor([[-1.5], [-1.5]]),
                              off_policy=torch.tensor([True, False]), share=torch.ones(2))
    assert [value.item() for value in means["clip_ratio/high_mean"]] == [1, 2]


def mixed(chord, mu, **flags):
    """(batch, mean mu) of two groups of 4 with a trace as the first row of one; own rewards 1, 0, 0 and 0, 0, 0, 1."""
    mask = torch.arange(4) < torch.tensor([4, 1, 2, 1, 2, 2, 1, 1]).unsqueeze(1)
    batch = chord.Batch(None, None, None, None, mask, torch.zeros(8), off_policy=torch.tensor([True] + [False] * 7))
    batch.advantages = chord.group_advantages(torch.tensor([1.0, 1, 0, 0, 0, 0, 0, 1]), 4)
    args = chord.Args(num_generations=4, **flags)
    return batch, chord.mix(batch, torch.tensor([1.0, 1, 0, 0, 0, 0, 0, 1]), mu, args), args


def test_the_objective_is_the_mixture_written_out(sibling):  # noqa: F811
    """[CHORD objective] (1 - mu) mean over own tokens + mu mean over the trace's; own rows are compared with own rows."""
    chord, mu = sibling("chord"), 0.25
    batch, mean_mu, args = mixed(chord, mu)
    assert mean_mu == mu
    own = torch.tensor([2**0.5, -(0.5**0.5), -(0.5**0.5)])  # (1, 0, 0) - 1/3 over std sqrt(2)/3
    torch.testing.assert_close(batch.advantages, torch.cat([torch.ones(1), own, torch.tensor([-1, -1, -1, 3]) / 3**0.5]), atol=1e-4, rtol=0)
    torch.manual_seed(0)
    logps = (-3 * torch.rand(8, 4)).requires_grad_()
    loss, _ = chord.policy_loss(logps, torch.zeros(8, 4), batch, args, int(batch.loss_mask.sum()), 8)
    rl, imitation = [], []
    for i, t in batch.loss_mask.nonzero().tolist():
        p = logps[i, t].exp()
        ratio = p / p.detach()
        if i == 0:
            imitation.append(-(p * (1 - p)).detach() * logps[i, t])
        else:
            rl.append(-ratio * batch.advantages[i] * (1 - mu if i < 4 else 1))
    expected = sum(rl) / 10 + mu * sum(imitation) / 4
    assert len(rl) == 10 and len(imitation) == 4 and loss.item() == pytest.approx(expected.item(), abs=1e-6)
    torch.testing.assert_close(torch.autograd.grad(loss, logps)[0], torch.autograd.grad(expected, logps)[0])


@pytest.mark.parametrize("gate, expected", [(0.0, 0.0), (1 / 3 + 1e-6, 1.0)])
def test_the_gate_imitates_where_the_groups_mean_is_low_and_nowhere_else(gate, expected, sibling):  # noqa: F811
    """[HPT gate] mean own reward 1/3, the trace not counted: a gate of 0 leaves RL alone, whatever mu is, one above imitates alone."""
    batch, mean_mu, _ = mixed(sibling("chord"), 0.9, gate=gate)
    assert mean_mu == expected and (batch.share[0] > 0) == bool(expected) and (batch.share[1:4] == 0).all() == bool(expected)
    assert batch.advantages[0] == expected and batch.share[4:].tolist() == pytest.approx([1.4] * 4)  # 14 tokens, 10 of them own


def test_the_trace_is_the_first_row_and_is_not_sampled(tiny, sampler, sibling):  # noqa: F811
    chord = sibling("chord")
    args, problems = loaded(chord, tiny[1])
    problems[1] |= {"trace": None, "trace_ids": None}
    prompts = sampler([WRONG] * 3 + [right(problems[1])] + [WRONG] * 3 + [right(problems[2])] + [WRONG] * 2)
    batch, samples, metrics = chord.rollout(tiny[0], None, tiny[1], problems, 0.5, args, Flops.of(tiny[0]))
    assert batch.off_policy.nonzero().flatten().tolist() == [0, 8] and len(prompts[0]) == 10
    assert completions_of(batch)[0] == problems[0]["trace_ids"] and samples[0].source == "trace"
    assert metrics["offpolicy/mu"] == 0.5 and batch.advantages[[0, 1, 2, 3, 8]].tolist() == [1, 0, 0, 0, 1]


# ---------------------------------------------------------------- OPSD


def test_divergences_of_two_words(sibling):  # noqa: F811
    """[OPSD divergence] T = (1/2, 1/2), S = (0.9, 0.1): both KLs, and Jensen-Shannon with M = (0.7, 0.3)."""
    opsd = sibling("opsd")
    told, logits = torch.tensor([[[0.5, 0.5]]]).log(), torch.tensor([[[0.9, 0.1]]]).log().requires_grad_()
    forward = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    reverse = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    shannon = 0.5 * (0.5 * math.log(0.5 / 0.7) + 0.5 * math.log(0.5 / 0.3)) + 0.5 * (0.9 * math.log(0.9 / 0.7) + 0.1 * math.log(0.1 / 0.3))
    # By the logits: S - T;  S (log S/T - KL);  half of S (log S/M - KL(S || M)).
    half = [0.9 * (math.log(0.9 / 0.7)), 0.1 * math.log(0.1 / 0.3)]
    gradients = {0: [0.4, -0.4], 1: [0.9 * (math.log(1.8) - reverse), 0.1 * (math.log(0.2) - reverse)],
                 0.5: [0.5 * (value - share * sum(half)) for value, share in zip(half, (0.9, 0.1))]}
    for beta, value in ((0, forward), (1, reverse), (0.5, shannon)):
        found = opsd.divergence(torch.log_softmax(logits, -1), told, beta)
        assert found.shape == (1, 1) and found.item() == pytest.approx(value, abs=1e-6)
        torch.testing.assert_close(torch.autograd.grad(found, logits)[0].flatten(), torch.tensor(gradients[beta]), atol=1e-6, rtol=0)


def test_the_divergence_takes_its_share_of_rows_with_a_trace(sibling):  # noqa: F811
    """[OPSD objective] (1 - 0.75) (-A) + 0.75 D; a row without a trace has GRPO's loss alone."""
    opsd = sibling("opsd")
    apart = torch.tensor([[0.4], [0.8]])
    loss, gradient, means = gradient_of(opsd, opsd.Args(distillation=0.75), [[-1.0], [-1.0]], [2.0, 2.0],
                                        informed=torch.tensor([True, False]), divergence=apart)
    assert loss == pytest.approx(((-0.25 * 2.0 + 0.75 * 0.4) - 2.0) / 2) and gradient.flatten().tolist() == pytest.approx([-0.25, -1.0])
    assert [value.item() for value in means["informed/divergence"]] == pytest.approx([0.4, 1])


def test_the_ledger_charges_every_reading_of_the_teacher(tiny, sampler, sibling):  # noqa: F811
    """Also those of rows without a trace, which are computed beside the others."""
    opsd, (model, tokenizer) = sibling("opsd"), tiny
    args, problems = loaded(opsd, tokenizer, num_generations=2)
    problems[1] |= {"trace": None, "trace_ids": None}
    sampler([WRONG, problems[0]["own_trace"], "1 ; 1", problems[1]["own_trace"], WRONG, problems[2]["own_trace"]])
    flops = Flops.of(model)
    batch, _, _ = opsd.rollout(model, None, tokenizer, problems, args, flops)
    opsd.update(model, model, torch.optim.SGD(model.parameters(), lr=0.0), batch, args, flops)
    assert flops.spent["informed"] == flops.forward(batch.readings.lengths)


def test_the_teacher_reads_the_same_completion_after_the_trace(tiny, sampler, sibling):  # noqa: F811
    """Log-probs of both readings are those of each row alone, without padding; a row without a trace is read after q both times."""
    opsd, (frozen, tokenizer) = sibling("opsd"), tiny
    model = copy.deepcopy(frozen)
    with torch.no_grad():
        torch.manual_seed(0)
        model.get_input_embeddings().weight.add_(0.02 * torch.randn(model.get_input_embeddings().weight.shape))
    args, problems = loaded(opsd, tokenizer, num_generations=2)
    problems[1] |= {"trace": None, "trace_ids": None}
    texts = [WRONG, problems[0]["own_trace"], "1 ; 1", WRONG, WRONG, problems[2]["own_trace"]]
    sampler(texts)
    batch, _, _ = opsd.rollout(model, None, tokenizer, problems, args, Flops.of(model))
    assert batch.informed.tolist() == [True] * 2 + [False] * 2 + [True] * 2
    asked = [common.prompt_with_trace(tokenizer, problem, args) if problem["trace"] else problem["prompt_ids"]
             for problem in problems for _ in range(2)]
    assert tokenizer.decode(asked[0]) == tasks.rephrase_prompt(problems[0]["prompt"], problems[0]["trace"])
    assert prompts_of(batch.readings) == asked and completions_of(batch.readings) == completions_of(batch)
    rows = torch.tensor([1, 4])
    logps, entropy, apart = opsd.read(model, frozen, batch[rows], batch.readings[rows], args)
    for place, row in enumerate(rows.tolist()):
        ids, question = completions_of(batch)[row], prompts_of(batch)[row]
        torch.testing.assert_close(logps[place, : len(ids)], logps_without_padding(model, question, ids), atol=1e-4, rtol=0)
        own, told = (torch.log_softmax(policy(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].float(), -1)
                     for policy, prompt in ((model, question), (frozen, asked[row])))
        mixture = ((own.exp() + told.exp()) / 2).log()
        expected = ((told.exp() * (told - mixture)).sum(-1) + (own.exp() * (own - mixture)).sum(-1)) / 2
        torch.testing.assert_close(apart[place, : len(ids)], expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(entropy[place, : len(ids)], -(own.exp() * own).sum(-1), atol=1e-4, rtol=0)
    apart.sum().backward()
    assert model.get_output_embeddings().weight.grad.abs().sum() > 0 and frozen.get_output_embeddings().weight.grad is None


# ---------------------------------------------------------------- AdaPrefix


@pytest.fixture
def prefixed(tiny, sibling):  # noqa: F811
    """(module, args, one hard diary problem with a prefix of half of its trace)."""
    module = sibling("adaprefix")
    args, problems = loaded(module, tiny[1], task="diary", trace_style="own", num_hard=1, num_easy=0, prefix_min=0.5, prefix_max=0.5,
                            num_generations=2)
    problem = module.add_prefixes(problems, tiny[1], args)[0]
    args.prompts_per_step, args.prefix_max = 1, 0.9
    return module, args, problem


@pytest.mark.parametrize("rewards, share", [([0, 0], 0.75), ([1, 1], 0.25), ([0, 1], 0.5)])
def test_a_prefix_grows_where_its_group_fails_and_shrinks_where_it_succeeds(rewards, share, prefixed, tiny, sampler):
    """[AdaPrefix control] h + rate (1/2 - success) with rate 1/2; the next visit asks with the trace's first h tokens."""
    module, args, problem = prefixed
    trace_ids, question = problem["trace_ids"][:-1], problem["prompt_ids"][: -len(problem["prefix_ids"])]
    assert abs(len(problem["prefix_ids"]) - len(trace_ids) / 2) < 1
    start = len(problem["prefix_ids"]) / len(trace_ids)
    drawn = [right(problem) if reward else WRONG for reward in rewards]
    prompts = sampler(drawn, drawn)
    for _ in range(2):
        batch, samples, metrics = module.rollout(tiny[0], None, tiny[1], [problem], args, Flops.of(tiny[0]))
    length = round((start + share - 0.5) * len(trace_ids))
    assert prompts == [[problem["prompt_ids"]] * 2, [question + trace_ids[:length]] * 2] and prompts_of(batch) == prompts[1]
    assert samples[0].problem["prefix_ids"] == trace_ids[:length] and metrics["prefix/share"] == length / len(trace_ids)
    assert problem["state"]["visits"] == 2


def test_a_prefix_is_withdrawn_between_its_fourth_and_eighth_visit(prefixed, tiny, sampler):
    """[AdaPrefix withdrawal] always failing, with 0.9 at most: 0.9 up to visit 4, then 3/4, 1/2, 1/4 and nothing of it, for good."""
    module, args, problem = prefixed
    sampler(*[[WRONG] * 2] * 10)
    shares, seen = [], []
    for _ in range(10):
        metrics = module.rollout(tiny[0], None, tiny[1], [problem], args, Flops.of(tiny[0]))[2]
        shares.append(problem["state"]["share"])
        seen.append(metrics["prefix/withdrawn"])
    assert shares[2:] == pytest.approx([0.9, 0.9, 0.675, 0.45, 0.225, 0, 0, 0]) and seen == [0.0] * 8 + [1.0] * 2


def test_no_prefix_shows_the_answer_or_exceeds_the_prompt(prefixed, tiny):
    module, args, problem = prefixed
    problem["state"] = {"share": 1.0, "visits": 0}
    asked = module.with_prefix(problem, tiny[1], args)
    assert asked["prefix"] == problem["trace"].split(" \\boxed")[0] and problem["prefix_share"] < asked["prefix_share"] < 1
    args.max_prompt_length = len(problem["prompt_ids"]) + 2
    assert len(module.with_prefix(problem, tiny[1], args)["prompt_ids"]) == args.max_prompt_length


def test_a_hint_stands_in_the_prompt_and_the_completion_is_graded_alone(prefixed, tiny, sampler):
    """[POPE hint] the same part of the trace, in the user's turn; a right whole solution earns the reward, a continuation does not."""
    module, args, problem = prefixed
    args.prefix_turn = "user"
    prompts = sampler([right(problem), "; " + WRONG])
    _, samples, metrics = module.rollout(tiny[0], None, tiny[1], [problem], args, Flops.of(tiny[0]))
    assert tiny[1].decode(prompts[0][0]) == tasks.rephrase_prompt(problem["prompt"], problem["prefix"])
    assert [sample.text for sample in samples] == [right(problem), "; " + WRONG] and [sample.reward for sample in samples] == [1, 0]
    assert metrics["reward/with_prefix"] == 0.5 and problem["state"]["share"] == pytest.approx(problem["prefix_share"])


def test_a_hint_is_cut_until_its_prompt_fits(prefixed, tiny):
    module, args, problem = prefixed
    args.prefix_turn = "user"
    whole = module.with_prefix(problem, tiny[1], args)
    args.max_prompt_length = len(whole["prompt_ids"]) - 1
    cut = module.with_prefix(problem, tiny[1], args)
    assert len(cut["prompt_ids"]) == args.max_prompt_length and 0 < cut["prefix_share"] < whole["prefix_share"]


@pytest.mark.parametrize("beta", [0, 0.25])
def test_both_readings_are_at_the_temperature_and_beta_is_the_flags(tiny, sampler, sibling, beta):  # noqa: F811
    opsd, (model, tokenizer) = sibling("opsd"), tiny
    args, problems = loaded(opsd, tokenizer, num_hard=1, num_easy=0, num_generations=2, temperature=0.7, distillation_beta=beta)
    sampler([WRONG, problems[0]["own_trace"]])
    batch, _, _ = opsd.rollout(model, None, tokenizer, problems, args, Flops.of(model))
    _, _, apart = opsd.read(model, model, batch, batch.readings, args)
    for row, ids in enumerate(completions_of(batch)):
        own, told = (torch.log_softmax(model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / 0.7, -1)
                     for prompt in (prompts_of(batch)[row], prompts_of(batch.readings)[row]))
        torch.testing.assert_close(apart[row, : len(ids)], opsd.divergence(own, told, beta), atol=1e-4, rtol=0)


def test_rows_that_are_informed_are_trained_without_a_reward(tiny, sampler, sibling):  # noqa: F811
    """[OPSD objective] all rewards are 0: two groups have a trace, and are computed; the third has none."""
    opsd, (model, tokenizer) = sibling("opsd"), tiny
    args, problems = loaded(opsd, tokenizer, num_generations=2)
    problems[1] |= {"trace": None, "trace_ids": None}
    sampler([WRONG] * 6)
    batch, _, _ = opsd.rollout(model, None, tokenizer, problems, args, Flops.of(model))
    metrics = opsd.update(model, copy.deepcopy(model), torch.optim.SGD(model.parameters(), lr=0.0), batch, args, Flops.of(model))
    assert metrics["frac_rows_trained"] == pytest.approx(2 / 3) and metrics["grad_norm"] > 1e-3


def test_the_informed_prompt_is_the_flags_or_the_general_one(tiny, sampler, sibling):  # noqa: F811
    opsd, tokenizer = sibling("opsd"), tiny[1]
    args, problems = loaded(opsd, tokenizer, num_hard=1, num_easy=0, num_generations=2)
    for flag, value, prompt in (("informed_prompt", "Notes: {trace} {prompt}", "Notes: {trace} {prompt}"),
                                ("dataset_name", "mine.jsonl", opsd.INFORMED_PROMPT)):
        args.informed_prompt = args.dataset_name = None
        setattr(args, flag, value)
        sampler([WRONG] * 2)
        batch, _, _ = opsd.rollout(tiny[0], None, tokenizer, problems, args, Flops.of(tiny[0]))
        expected = prompt.replace("{prompt}", problems[0]["prompt"]).replace("{trace}", problems[0]["trace"])
        assert prompts_of(batch.readings) == [tokenizer(expected)["input_ids"]] * 2


def test_own_rows_of_a_mixture_are_scaled_as_asked(sibling):  # noqa: F811
    batch, _, _ = mixed(sibling("chord"), 0.25, scale_rewards="none")
    assert batch.advantages[:4].tolist() == pytest.approx([1, 2 / 3, -1 / 3, -1 / 3])


def test_the_success_that_a_prefix_is_to_hold_is_the_flags(prefixed, tiny, sampler):
    module, args, problem = prefixed
    args.prefix_target = 1.0
    sampler([WRONG, right(problem)])
    module.rollout(tiny[0], None, tiny[1], [problem], args, Flops.of(tiny[0]))
    assert problem["state"]["share"] == pytest.approx(problem["prefix_share"] + 0.25)
