"""Do the off-policy methods do what their equations say, to the right tokens of the right rows?"""

import copy
import json
import math
import random
from collections import defaultdict

import pytest
import torch
from transformers import LlamaForCausalLM

import common
import data
import grpo
import luffy
import prefixrl
import repo
import sft
import tasks


@pytest.fixture
def sampler(monkeypatch, tiny):
    """Replace sampling: sampler([texts or id lists of the first call], ...) -> list that gets each call's prompts as id lists.

    A text is given its EOS, an id list is taken as it is. A call more than was foreseen fails.
    """
    def install(*calls):
        prompts, left = [], iter(calls)

        def sample(model, prompt_ids, prompt_mask, eos_ids, pad_id, *rest, **more):
            prompts.append([ids[mask].tolist() for ids, mask in zip(prompt_ids, prompt_mask)])
            drawn = [with_eos(tiny[1], row) if isinstance(row, str) else row for row in next(left)]
            assert len(drawn) == len(prompts[-1])
            completion_ids = common.right_pad([torch.tensor([ids]) for ids in drawn], pad_id)
            return completion_ids, common.completion_mask(completion_ids, eos_ids)

        monkeypatch.setattr(common, "sample", sample)
        return prompts

    return install


def with_eos(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]


def loaded(module, tokenizer, **flags):
    """(args, training rows) of a small built-in data set: hard problems first."""
    group = {} if module is sft else {"num_generations": 4}
    args = module.Args(**{"task": "bills", "num_hard": 2, "num_easy": 1, "eval_steps": 0} | group | flags)
    return args, data.load_rows(args, tokenizer)[0]


def gradient_of(module, args, logps, advantages, old_logps=None, **inputs):
    """(loss, d loss / d logps, metric sums) of a module's policy_loss; all tokens count, on-policy unless old_logps are given."""
    logps = torch.as_tensor(logps, dtype=torch.float32).clone().requires_grad_()
    old_logps = logps.detach() if old_logps is None else torch.as_tensor(old_logps, dtype=torch.float32)
    mask = torch.ones(logps.shape, dtype=torch.bool)
    loss, means = module.policy_loss(logps, old_logps, torch.as_tensor(advantages), mask, args, num_tokens=logps.numel(),
                                     num_rows=len(logps), entropy=torch.zeros(logps.shape), **inputs)
    return loss.item(), torch.autograd.grad(loss, logps)[0], means


def logps_without_padding(model, prompt, completion):
    """Log-probs of one row's completion ids, from the model's logits, alone and unpadded."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits.float(), -1)[range(len(completion)), completion]


def flops_of(model, lengths):
    """By hand: 2 W D + 2 L A D^2 a sequence of D tokens."""
    return sum(2 * model.num_parameters() * d + 2 * 3 * 96 * d * d for d in lengths)


# ---------------------------------------------------------------- LUFFY: equations


def test_luffy_advantages_count_the_teacher_and_have_no_std():
    """[LUFFY advantage] teacher right, seven own rows wrong: 1 - 1/8 and 0 - 1/8."""
    advantages = luffy.group_advantages(torch.tensor([1.0] + [0.0] * 7), 8, luffy.Args().scale_rewards)
    assert advantages.tolist() == [0.875] + [-0.125] * 7


@pytest.mark.parametrize("p", [0.001, 0.1, 1.0])
def test_luffy_weight_of_a_teacher_token(p):
    """[LUFFY shaping] d loss / d logp = -A f'(log p) / denominator, whatever the old log-probs, and clipped by no epsilon."""
    taught = torch.full((2, 3), math.log(0.4))
    cases = {"shaped": (p / (p + 0.1), 0.1 * p / (p + 0.1) ** 2), "none": (p, p),
             "importance": (min(p / 0.4, 1.5), p / 0.4 if p / 0.4 < 1.5 else 0.0)}
    for shaping, (value, weight) in cases.items():
        for epsilon in (math.inf, 0.01):
            args = luffy.Args(shaping=shaping, importance_cap=1.5, max_completion_length=10, epsilon=epsilon)
            inputs = {"off_policy": torch.tensor([True, False])} | ({"behavior_logps": taught} if shaping == "importance" else {})
            for old in (-20.0, 0.0):
                _, gradient, means = gradient_of(luffy, args, torch.full((2, 3), math.log(p)), [0.875, 0.0],
                                                 old_logps=torch.full((2, 3), old), **inputs)
                torch.testing.assert_close(gradient[0], torch.full((3,), -0.875 * weight / 20))
                assert gradient[1].tolist() == [0.0] * 3
                assert means["offpolicy/ratio"][0].item() == pytest.approx(3 * value, rel=1e-5)
                assert means["offpolicy/prob"][0].item() == pytest.approx(3 * p, rel=1e-5)


@pytest.mark.parametrize("taught", [-70.0, -1e4, -math.inf])
def test_luffy_importance_of_a_token_the_teacher_held_impossible_is_the_cap(taught):
    args = luffy.Args(shaping="importance", max_completion_length=1)
    loss, gradient, _ = gradient_of(luffy, args, [[-0.1]], [0.5], off_policy=torch.tensor([True]), behavior_logps=torch.tensor([[taught]]))
    assert loss == pytest.approx(-2.0 * 0.5) and gradient.item() == 0.0


def test_luffy_own_tokens_have_the_plain_ratio_and_no_clip_by_default():
    """Ratio 5 with A = 1 and 0.2 with A = -1: the gradient is ratio x A, which --epsilon 0.2 sets to 0. A teacher row stands beside."""
    logps, old_logps = [[math.log(0.5)], [math.log(0.1)], [math.log(0.3)]], [[math.log(0.1)], [math.log(0.5)], [0.0]]
    off_policy = torch.tensor([False, False, True])
    for epsilon, expected in ((math.inf, [-5.0, 0.2]), (0.2, [0.0, 0.0])):
        args = luffy.Args(**{} if epsilon == math.inf else {"epsilon": epsilon}, max_completion_length=1)
        _, gradient, means = gradient_of(luffy, args, logps, [1.0, -1.0, 1.0], old_logps, off_policy=off_policy)
        torch.testing.assert_close(gradient.flatten(), torch.tensor([*expected, -0.1 * 0.3 / 0.4**2]) / 3)
        assert means["onpolicy/ratio"][0].item() == pytest.approx(5.2) and means["onpolicy/ratio"][1].item() == 2


def test_luffy_objective_equals_its_equations_written_out():
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
    loss, means = luffy.policy_loss(logps, old_logps, advantages, mask, args, sum(lengths), rows, entropy, off_policy=off_policy)

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
    assert means["offpolicy/loss"][0].item() == pytest.approx(shares[True], abs=1e-5) and means["offpolicy/loss"][1] == 11
    assert means["onpolicy/loss"][0].item() == pytest.approx(shares[False], abs=1e-5) and means["onpolicy/loss"][1] == 16


# ---------------------------------------------------------------- LUFFY: rows


@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])
def test_luffy_puts_the_trace_into_the_first_slot_and_samples_the_others(tiny, sampler, pad):
    """Three groups of 4, the middle one without a trace; 10 rows are sampled, and only they are paid for."""
    model, tokenizer = tiny
    tokenizer.pad_token = pad
    args, rows = loaded(luffy, tokenizer)
    rows[1] |= {"trace": None, "trace_ids": None, "behavior_logps": None}
    right, wrong = [f"\\boxed{{ {row['answer']} }}" for row in rows], "\\boxed{ 1 }"
    drawn = [wrong, "7 ; 7 " + wrong, wrong, wrong, wrong, wrong, right[1], right[2], wrong, "} " + wrong]
    prompts, flops = sampler(drawn), common.Flops.of(model)
    batch, texts, metrics = luffy.rollout(model, None, tokenizer, rows, args, flops)

    expected = [rows[0]["trace"], *drawn[:3], *drawn[3:7], rows[2]["trace"], *drawn[7:]]
    assert texts == expected and rows[0]["trace"] == tasks.solve(rows[0]["prompt"], "teacher")[0]
    ids = [row[mask].tolist() for row, mask in zip(batch.completion_ids, batch.completion_mask)]
    assert ids == [with_eos(tokenizer, text) for text in expected] and ids[0] == rows[0]["trace_ids"]
    assert (batch.completion_mask.int().diff(dim=1) <= 0).all() and batch.completion_mask[:, 0].all()  # by position, without holes
    questions = [rows[i // 4]["prompt_ids"] for i in range(12)]
    assert [row[mask].tolist() for row, mask in zip(batch.prompt_ids, batch.prompt_mask)] == questions
    assert prompts == [[questions[i] for i in range(12) if i not in (0, 8)]]
    assert batch.loss_inputs["off_policy"].nonzero().flatten().tolist() == [0, 8] and list(batch.loss_inputs) == ["off_policy"]
    assert batch.ended.all() and batch.rewards.tolist() == [1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0]
    assert batch.advantages.tolist() == [0.75, -0.25, -0.25, -0.25, -0.25, -0.25, -0.25, 0.75, 0.5, 0.5, -0.5, -0.5]
    assert metrics["onpolicy/reward"] == pytest.approx(2 / 10) and metrics["offpolicy/solved_by_teacher_only"] == pytest.approx(1 / 3)
    lengths = [len(questions[i]) + len(ids[i]) for i in range(12) if i not in (0, 8)]
    assert flops.spent["rollout"] == flops_of(model, lengths) and flops.num_tokens == sum(lengths)
    assert flops.spent["paper"] == 2 * model.num_parameters() * sum(lengths)
    alone = [logps_without_padding(model, question, row) for question, row in zip(questions, ids)]
    for i in (0, 1, 5, 8):
        torch.testing.assert_close(batch.old_logps[i, : len(ids[i])], alone[i], atol=1e-4, rtol=0)


def test_luffy_without_any_trace_is_an_ordinary_rollout(tiny, sampler):
    args, rows = loaded(luffy, tiny[1], num_hard=1, num_easy=1)
    rows = [row | {"trace": None, "trace_ids": None} for row in rows]
    prompts = sampler(["1"] * 8)
    batch, _, metrics = luffy.rollout(tiny[0], None, tiny[1], rows, args, common.Flops.of(tiny[0]))
    assert len(prompts[0]) == 8 and batch.loss_inputs == {} and not any("policy" in name for name in metrics)


def test_luffy_importance_takes_the_traces_own_log_probs(tiny, sampler):
    """behavior_logps of slot 0 are those of the file, by position; own rows and padding are 0."""
    args, rows = loaded(luffy, tiny[1], task="diary", trace_style="self", num_easy=0, shaping="importance")
    sampler(["1 ; 1"] * 6)
    batch, _, _ = luffy.rollout(tiny[0], None, tiny[1], rows, args, common.Flops.of(tiny[0]))
    taught = batch.loss_inputs["behavior_logps"]
    assert taught.shape == batch.completion_ids.shape and taught[[1, 2, 3, 5, 6, 7]].abs().sum() == 0
    for row, i in zip(rows, (0, 4)):
        assert taught[i, : len(row["trace_ids"])].tolist() == pytest.approx(row["behavior_logps"])
        # The file's numbers are the base's own, at its temperature of 1.
        torch.testing.assert_close(taught[i, : len(row["trace_ids"])], logps_without_padding(tiny[0], row["prompt_ids"], row["trace_ids"]),
                                   atol=1e-4, rtol=0)



# ---------------------------------------------------------------- nothing leaks


@pytest.fixture
def prompts_by_stage(monkeypatch, tiny):
    """{"check", "eval", "rephrase", "rollout"} -> decoded prompts of all rows that reach `generate`, once for all its waves."""
    seen, stage, in_waves = defaultdict(list), ["rollout"], []
    generate, generate_in_waves = LlamaForCausalLM.generate, common.generate_in_waves

    def mark(module, name, label):
        function = getattr(module, name)

        def call(*inputs, **more):
            stage.append(label)
            output = function(*inputs, **more)
            stage.pop()
            return output

        monkeypatch.setattr(module, name, call)

    def record(prompt_ids, prompt_mask):
        seen[stage[-1]] += [tiny[1].decode(ids[mask.bool()]) for ids, mask in zip(prompt_ids, prompt_mask)]

    def recorded(self, input_ids, attention_mask, **more):
        if not in_waves:
            record(input_ids, attention_mask)
        return generate(self, input_ids=input_ids, attention_mask=attention_mask, **more)

    def recorded_once(model, prompt_ids, prompt_mask, config):
        record(prompt_ids, prompt_mask)
        in_waves.append(True)
        completion_ids = generate_in_waves(model, prompt_ids, prompt_mask, config)
        in_waves.pop()
        return completion_ids

    mark(common, "self_check", "check")
    mark(common, "evaluation_metrics", "eval")
    mark(repo, "rephrase_failed_groups", "rephrase")
    monkeypatch.setattr(LlamaForCausalLM, "generate", recorded)
    monkeypatch.setattr(common, "generate_in_waves", recorded_once)
    return seen


@pytest.mark.parametrize("module, task", [(luffy, "bills"), (repo, "bills"), (prefixrl, "diary")], ids=["luffy", "repo", "prefixrl"])
def test_traces_reach_only_the_prompts_that_are_meant_to_hold_them(run_script, prompts_by_stage, module, task):
    """Evaluation sees the plain evaluation problems, each once; rollouts plain training ones, or (PrefixRL) with a trace's beginning."""
    code, _, err = run_script(module, "--task", task, "--num_hard", 4, "--num_easy", 2, "--max_steps", 2, "--prompts_per_step", 6,
                              "--num_generations", 3, "--eval_steps", 2, "--eval_problems", 3, "--output_dir", "run")
    assert code == 0, err
    seen = prompts_by_stage
    plain = [row["prompt"] for difficulty in tasks.DIFFICULTIES for row in tasks.problems(task, "eval", difficulty, 3)]
    assert sorted(seen["eval"]) == sorted(2 * plain)
    problems = tasks.problems(task, "train", "hard", 4) + tasks.problems(task, "train", "easy", 2)
    train = [row["prompt"] for row in problems]
    if module is prefixrl:
        held = [next(prompt for prompt in train if text.startswith(prompt)) for text in seen["rollout"]]
        prefixes = [text.removeprefix(prompt).strip() for text, prompt in zip(seen["rollout"], held)]
        traces = {record["prompt"]: record["trace"] for record in map(json.loads, open(tasks.SELF_TRACES["diary"]))}
        assert all(traces[prompt].startswith(prefix) for prompt, prefix in zip(held, prefixes) if prefix)
        assert len(prefixes) == 36 and 12 <= sum(map(bool, prefixes)) < 36
        return
    assert set(seen["rollout"]) == set(train) and len(seen["rollout"]) == {luffy: 24, repo: 36}[module]
    notes = {tasks.rephrase_prompt(row["prompt"], row["teacher_trace"]) for row in problems}
    assert set(seen["rephrase"]) <= notes and (len(seen["rephrase"]) >= 4) == (module is repo)
    assert not any("Notes:" in prompt for stage in ("check", "eval", "rollout") for prompt in seen[stage])


@pytest.mark.parametrize("module", [luffy, repo, prefixrl, sft], ids=lambda module: module.__name__)
def test_evaluation_rows_have_no_trace(tiny, module):
    args = module.Args(task="diary", num_hard=2, num_easy=1, eval_problems=2)
    train, evaluation = data.load_rows(args, tiny[1])
    assert len(evaluation) == 6 and all(set(row) == {"prompt", "answer", "difficulty", "prompt_ids", "columns"} for row in evaluation)
    assert all(set(row["columns"]) == {"answer", "difficulty"} for row in evaluation)
    assert all({"trace", "trace_ids", "behavior_logps"} <= set(row) for row in train)


# ---------------------------------------------------------------- RePO: gate and replacement


def failed_groups(tiny, rewards, **flags):
    """Inputs of `rephrase_failed_groups` as a list, for groups of the given rewards (N, G), and the N problems."""
    model, tokenizer = tiny
    args, problems = loaded(repo, tokenizer, num_hard=len(rewards), num_easy=0, num_generations=len(rewards[0]), **flags)
    rows = [row for row in problems for _ in range(args.num_generations)]
    texts = [" ".join(["7"] * (3 + i % 4)) + f" \\boxed{{ {i} }}" for i in range(len(rows))]
    completion_ids = common.right_pad([torch.tensor([with_eos(tokenizer, text)]) for text in texts], tokenizer.pad_token_id)
    mask = common.completion_mask(completion_ids, [tokenizer.eos_token_id])
    rewards = torch.tensor(rewards).flatten()
    return [model, tokenizer, rows, completion_ids, mask, texts, [True] * len(rows), rewards, args, common.Flops.of(model)], problems


def notes_ids(tokenizer, row):
    return tokenizer(tasks.rephrase_prompt(row["prompt"], row["trace"]))["input_ids"]


def test_repo_gate_opens_at_rho_exactly(tiny, sampler):
    """[RePO gate] --failure_rate 0.75: 6 of 8 failed is helped, 5 of 8 is not; a reward of delta itself has not failed."""
    rewards = [[0.0] * 5 + [0.4, 0.5, 1.0], [0.0] * 5 + [0.5, 1.0, 1.0]]
    inputs, problems = failed_groups(tiny, rewards, failure_rate=0.75)
    prompts = sampler([problems[0]["own_trace"]])
    *_, loss_inputs, metrics = repo.rephrase_failed_groups(*inputs)
    assert prompts == [[notes_ids(tiny[1], problems[0])]]
    assert loss_inputs["rephrased"].nonzero().flatten().tolist() == [4]
    assert metrics["rephrase/failure_rate"] == 11 / 16 and metrics["rephrase/asked"] == metrics["rephrase/replaced"] == 0.5
    assert metrics["rephrase/success"] == 1.0


@pytest.mark.parametrize("longer", [True, False])
def test_repo_replaces_one_row_the_last_of_the_worst_and_keeps_its_sampled_ids(tiny, sampler, longer):
    """[RePO replacement] everything else is as it was, the given tensors too; the width is that of the longest row of the result."""
    inputs, problems = failed_groups(tiny, [[0.2, 0.0, 0.4, 0.0, 0.3], [0.0, 0.0, 1.0, 0.0, 0.1], [0.0] * 5], failure_rate=1.0)
    _, tokenizer, rows, completion_ids, mask, texts, ended, rewards, args, _ = inputs
    before = copy.deepcopy(inputs[2:8])
    told = [problems[0]["own_trace"], f"\\boxed{{ {problems[2]['answer']} }}"]
    if not longer:
        told[0] = f"\\boxed{{ {problems[0]['answer']} }}"
    prompts = sampler(told)
    new_ids, new_mask, new_texts, new_ended, new_rewards, loss_inputs, metrics = repo.rephrase_failed_groups(*inputs)

    assert prompts == [[notes_ids(tokenizer, problems[0]), notes_ids(tokenizer, problems[2])]]
    replaced = {3: told[0], 14: told[1]}
    for i in range(15):
        expected = with_eos(tokenizer, replaced.get(i, texts[i]))
        assert new_ids[i].tolist() == expected + [tokenizer.pad_token_id] * (new_ids.shape[1] - len(expected))
        assert new_mask[i].tolist() == [True] * len(expected) + [False] * (new_ids.shape[1] - len(expected))
    assert new_ids.dtype == torch.int64 and new_ids.shape[1] == (len(with_eos(tokenizer, told[0])) if longer else completion_ids.shape[1])
    assert new_texts == [replaced.get(i, text) for i, text in enumerate(texts)] and new_ended == [True] * 15
    assert new_rewards.tolist() == [1.0 if i in replaced else reward for i, reward in enumerate(rewards.tolist())]
    assert loss_inputs["rephrased"].nonzero().flatten().tolist() == [3, 14]
    assert loss_inputs["behavior_logps"].shape == new_ids.shape
    assert (loss_inputs["behavior_logps"] != 0).any(dim=1).nonzero().flatten().tolist() == [3, 14]
    assert all(torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in zip(inputs[2:8], before))
    own_lengths = mask.sum(1).view(3, 5).float().mean(1)
    ratios = [len(with_eos(tokenizer, told[0])) / own_lengths[0], len(with_eos(tokenizer, told[1])) / own_lengths[2]]
    assert metrics["rephrase/length_ratio"] == pytest.approx(sum(ratios).item() / 2) and metrics["rephrase/asked"] == pytest.approx(2 / 3)
    lengths = [len(prompt) + len(with_eos(tokenizer, text)) for prompt, text in zip(prompts[0], told)]
    flops = inputs[-1]
    assert flops.spent["rephrase"] == flops_of(tiny[0], lengths) == flops.spent["train"] and flops.spent["rollout"] == 0
    assert flops.num_tokens == sum(lengths)


def test_repo_wrong_retelling_is_counted_and_replaces_nothing_unless_it_may(tiny, sampler):
    for required in (True, False):
        inputs, _ = failed_groups(tiny, [[0.0] * 4], require_correct_rephrase=required)
        sampler(["\\boxed{ 1 }"])
        outputs = repo.rephrase_failed_groups(*inputs)
        assert outputs[6]["rephrase/asked"] == 1.0 and outputs[6]["rephrase/success"] == 0.0
        assert outputs[6]["rephrase/replaced"] == float(not required)
        if required:
            assert all(new is given for new, given in zip(outputs[:5], inputs[3:8])) and outputs[5] == {}
        else:
            assert outputs[2] == [*inputs[5][:3], "\\boxed{ 1 }"] and outputs[5]["rephrased"].tolist() == [False] * 3 + [True]
            assert outputs[4].tolist() == [0.0] * 4
            assert repo.group_advantages(outputs[4], 4, "group").tolist() == [0.0] * 4


def test_repo_raw_trace_takes_the_place_without_a_retelling(tiny, sampler):
    """The trace's own ids, marker and all; nothing is sampled or paid for as rephrasing, and it is scored under the question."""
    inputs, problems = failed_groups(tiny, [[0.0] * 4, [1.0] * 4], raw_trace=True, rephrase_marker="costs")
    ids, _, texts, ended, rewards, loss_inputs, metrics = repo.rephrase_failed_groups(*inputs)
    trace_ids = problems[0]["trace_ids"]
    assert ids[3, : len(trace_ids)].tolist() == trace_ids and texts[3] == problems[0]["trace"] and "costs" in texts[3]
    assert rewards.tolist() == [0.0] * 3 + [1.0] * 5 and ended == [True] * 8 and metrics["rephrase/overlap"] == 1.0
    assert loss_inputs["rephrased"].nonzero().flatten().tolist() == [3] and inputs[-1].spent["rephrase"] == 0
    on_question = logps_without_padding(tiny[0], problems[0]["prompt_ids"], trace_ids)
    torch.testing.assert_close(loss_inputs["behavior_logps"][3, : len(trace_ids)], on_question, atol=1e-5, rtol=0)


def test_repo_cut_off_retelling_earns_nothing_and_gets_no_eos(tiny, sampler):
    """A right answer without EOS is a truncated completion like any other."""
    inputs, problems = failed_groups(tiny, [[0.0] * 4], require_correct_rephrase=False)
    ids = with_eos(tiny[1], problems[0]["own_trace"])[:-1]
    sampler([ids])
    new_ids, new_mask, _, ended, rewards, _, metrics = repo.rephrase_failed_groups(*inputs)
    assert new_ids[3][new_mask[3]].tolist() == ids and ended == [True] * 3 + [False]
    assert rewards.tolist() == [0.0] * 4 and metrics["rephrase/success"] == 0.0


@pytest.mark.parametrize("ends", [True, False])
def test_repo_cuts_at_the_last_marker_and_tokenises_what_is_left(tiny, sampler, ends):
    """The marker is a word here. The EOS stays exactly if it was sampled."""
    inputs, problems = failed_groups(tiny, [[0.0] * 4], rephrase_marker="Rewrite:", require_correct_rephrase=False, grade_truncated=True)
    answer = f"\\boxed{{ {problems[0]['answer']} }}"
    ids = with_eos(tiny[1], f"Notes: 7 Rewrite: 8 Rewrite: {answer}")
    sampler([ids if ends else ids[:-1]])
    new_ids, new_mask, texts, ended, rewards, loss_inputs, _ = repo.rephrase_failed_groups(*inputs)
    assert new_ids[3][new_mask[3]].tolist() == with_eos(tiny[1], answer)[: None if ends else -1]
    assert texts[3] == answer and ended[3] == ends and rewards[3] == 1.0
    assert (loss_inputs["behavior_logps"][3] != 0).sum() == new_mask[3].sum()


def test_repo_retelling_of_which_the_marker_leaves_nothing_replaces_nothing(tiny, sampler):
    inputs, problems = failed_groups(tiny, [[0.0] * 4, [0.0] * 4], rephrase_marker="Rewrite:", require_correct_rephrase=False)
    sampler([with_eos(tiny[1], "Notes: Rewrite:")[:-1], "\\boxed{ 1 }"])
    new_ids, new_mask, texts, _, _, loss_inputs, metrics = repo.rephrase_failed_groups(*inputs)
    assert new_ids.dtype == torch.int64 and new_mask.any(dim=1).all()
    assert loss_inputs["rephrased"].nonzero().flatten().tolist() == [7] and metrics["rephrase/replaced"] == 0.5


def test_repo_prompt_too_long_or_without_trace_is_not_sampled(tiny, sampler):
    inputs, problems = failed_groups(tiny, [[0.0] * 4] * 2)
    lengths = [len(notes_ids(tiny[1], row)) for row in problems]
    assert lengths[0] == lengths[1]
    inputs[2][:4] = [row | {"trace": row["trace"] + " ;"} for row in inputs[2][:4]]
    inputs[8].max_rephrase_prompt_length = lengths[0]  # the second group's fits exactly
    prompts = sampler(["\\boxed{ 1 }"])
    metrics = repo.rephrase_failed_groups(*inputs)[6]
    assert [len(ids) for ids in prompts[0]] == [lengths[0]] and metrics["rephrase/too_long"] == metrics["rephrase/asked"] == 0.5
    inputs[8].max_rephrase_prompt_length = lengths[0] - 1
    prompts = sampler()
    metrics = repo.rephrase_failed_groups(*inputs)[6]
    assert prompts == [] and (metrics["rephrase/too_long"], metrics["rephrase/asked"]) == (1.0, 0.0)
    inputs[8].max_rephrase_prompt_length, inputs[2] = 4096, [row | {"trace": None} for row in inputs[2]]
    metrics = repo.rephrase_failed_groups(*inputs)[6]
    assert prompts == [] and (metrics["rephrase/too_long"], metrics["rephrase/asked"]) == (0.0, 0.0)


def test_repo_samples_nothing_when_no_group_fails(tiny, sampler):
    inputs, _ = failed_groups(tiny, [[0.0, 0.0, 0.0, 1.0], [1.0] * 4], failure_rate=1.0)
    prompts = sampler()
    outputs = repo.rephrase_failed_groups(*inputs)
    assert prompts == [] and all(new is given for new, given in zip(outputs[:5], inputs[3:8])) and outputs[5] == {}
    assert inputs[-1].spent["rephrase"] == 0 and outputs[6]["rephrase/failure_rate"] == 3 / 8


def test_repo_fills_the_prompt_in_once(tiny, sampler, monkeypatch):
    r"""A problem about \operatorname{trace} holds the placeholder's name, and a trace may hold {prompt}: both stay what they are."""
    inputs, _ = failed_groups(tiny, [[0.0] * 4], rephrase_prompt="{prompt} Notes: {trace} Rewrite: {prompt}")
    inputs[2] = [row | {"prompt": "Q: {trace} = 7 ? A:", "trace": "7 {prompt} 8"} for row in inputs[2]]
    rendered = []
    monkeypatch.setattr(common, "render_prompt", lambda tokenizer, text, *rest: rendered.append(text) or text)
    sampler(["\\boxed{ 1 }"])
    repo.rephrase_failed_groups(*inputs)
    assert rendered == ["Q: {trace} = 7 ? A: Notes: 7 {prompt} 8 Rewrite: Q: {trace} = 7 ? A:"]


def test_repo_own_data_set_gets_the_general_prompt(tiny, sampler):
    inputs, problems = failed_groups(tiny, [[0.0] * 4])
    inputs[8].dataset_name = "mine.jsonl"
    prompts = sampler(["\\boxed{ 1 }"])
    repo.rephrase_failed_groups(*inputs)
    text = tiny[1].decode(prompts[0][0])
    assert text.startswith(problems[0]["prompt"]) and problems[0]["trace"] in text and "Notes:" not in text
    assert len(prompts[0][0]) == len(repo.REPHRASE_PROMPT.split()) - 2 + len((problems[0]["prompt"] + " " + problems[0]["trace"]).split())


def test_repo_trains_the_retelling_as_an_answer_to_the_question(tiny, sampler):
    """The batch after a replacement: the prompt stays q, the advantages are of the final group, the reward metrics of the original one."""
    model, tokenizer = tiny
    args, rows = loaded(repo, tokenizer, num_hard=1, num_easy=1, failure_rate=1.0)
    wrong, right = "\\boxed{ 1 }", rows[1]["own_trace"]
    prompts = sampler([wrong] * 7 + [right], [rows[0]["own_trace"]])
    batch, texts, metrics = repo.rollout(model, None, tokenizer, rows, args, common.Flops.of(model))
    questions = [rows[i // 4]["prompt_ids"] for i in range(8)]
    assert prompts == [questions, [notes_ids(tokenizer, rows[0])]]
    assert [ids[mask].tolist() for ids, mask in zip(batch.prompt_ids, batch.prompt_mask)] == questions
    assert texts == [wrong] * 3 + [rows[0]["own_trace"]] + [wrong] * 3 + [right]
    assert batch.rewards.tolist() == [0, 0, 0, 1, 0, 0, 0, 1] and metrics["reward"] == 1 / 8 and metrics["rephrase/failure_rate"] == 7 / 8
    torch.testing.assert_close(batch.advantages[:4], torch.tensor([-1, -1, -1, 3]) / math.sqrt(3), atol=1e-5, rtol=0)
    assert batch.old_logps is None and list(batch.loss_inputs) == ["rephrased", "behavior_logps"]


def test_repo_behavior_logps_and_context_gap_of_a_real_rollout(tiny):
    """Retellings of the tiny base itself: behaviour log-probs are those given P(q, k), and the gap is what the question alone lacks."""
    model, tokenizer = tiny
    args, rows = loaded(repo, tokenizer, num_hard=3, num_easy=0)
    common.seed_everything(0, 0)
    batch, _, metrics = repo.rollout(model, None, tokenizer, rows, args, common.Flops.of(model))
    rephrased = batch.loss_inputs["rephrased"].nonzero().flatten().tolist()
    assert len(rephrased) >= 2 and metrics["rephrase/replaced"] == pytest.approx(len(rephrased) / 3)
    gaps, masked_out = [], batch.loss_inputs["behavior_logps"].clone()
    for i in rephrased:
        row, ids = rows[i // 4], batch.completion_ids[i][batch.completion_mask[i]].tolist()
        with_notes = logps_without_padding(model, notes_ids(tokenizer, row), ids)
        torch.testing.assert_close(batch.loss_inputs["behavior_logps"][i, : len(ids)], with_notes, atol=1e-5, rtol=0)
        masked_out[i, : len(ids)] = 0.0
        gaps.append(logps_without_padding(model, row["prompt_ids"], ids) - with_notes)
    assert masked_out.abs().sum() == 0
    updated = repo.update(model, torch.optim.SGD(model.parameters(), lr=0.0), batch, args, common.Flops.of(model))
    gap = torch.cat(gaps).mean().item()
    assert updated["rephrase/context_gap"] == pytest.approx(gap, abs=1e-4) and gap < -0.1
    assert updated["rephrase/ratio"] == pytest.approx(1.0, abs=1e-6)


# ---------------------------------------------------------------- RePO: ratio

LAST = torch.tensor([False, True])


def test_repo_question_ratio_is_one_at_first_and_knows_no_behavior():
    """[RePO objective] each of the 6 tokens, rephrased or not: d loss / d logp = -A / 6."""
    torch.manual_seed(2)
    logps = -3 * torch.rand(2, 3)
    results = [gradient_of(repo, repo.Args(), logps, [-0.5, 2.0], rephrased=LAST, behavior_logps=behavior)
               for behavior in (-9 * torch.rand(2, 3), torch.zeros(2, 3))]
    torch.testing.assert_close(results[0][1], torch.tensor([[0.5], [-2.0]]).expand(2, 3) / 6)
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])
    _, gradient, _ = gradient_of(repo, repo.Args(), logps, [-0.5, 2.0], logps - math.log(1.1), rephrased=LAST, behavior_logps=logps)
    torch.testing.assert_close(gradient[1], torch.full((3,), -2.0 * 1.1 / 6))  # later updates: against pi_old(o | q)


@pytest.mark.parametrize("against, advantage, expected, weight", [
    (1.1, 2.0, -2.2, -2.2), (1.5, 2.0, -2.4, 0.0), (0.5, 2.0, -1.0, -1.0), (0.5, -2.0, 1.6, 0.0), (1.5, -2.0, 3.0, 3.0)])
def test_repo_behavior_ratio_is_against_the_prompt_that_sampled_it_and_clipped(against, advantage, expected, weight):
    """One own token at ratio 1 with A = 0 and one rephrased token, whose old log-prob under q says nothing here."""
    loss, gradient, means = gradient_of(
        repo, repo.Args(rephrase_ratio="behavior"), [[-1.0], [-1.0]], [0.0, advantage], [[-1.0], [-7.0]], rephrased=LAST,
        behavior_logps=torch.tensor([[-50.0], [-1.0 - math.log(against)]]))
    assert (loss, gradient[1].item()) == pytest.approx((expected / 2, weight / 2), abs=1e-6) and gradient[0].item() == 0.0
    assert means["rephrase/ratio"][0].item() == pytest.approx(against)
    assert means["rephrase/context_gap"][0].item() == pytest.approx(math.log(against), abs=1e-6) and means["rephrase/context_gap"][1] == 1


def test_repo_stopgrad_ratio_is_one_throughout():
    """Old log-probs differ: own tokens see them (ratio 1.1), rephrased ones do not."""
    loss, gradient, _ = gradient_of(repo, repo.Args(rephrase_ratio="stopgrad"), [[-1.0], [-1.0]], [3.0, 2.0],
                                    [[-1.0 - math.log(1.1)], [-5.0]], rephrased=LAST, behavior_logps=torch.full((2, 1), -9.0))
    assert loss == pytest.approx(-(3.3 + 2.0) / 2) and gradient.flatten().tolist() == pytest.approx([-3.3 / 2, -1.0])


@pytest.mark.parametrize("p", [0.001, 0.1, 1.0])
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_repo_shaped_weight_is_that_of_luffy_and_unclipped(p, advantage):
    """p / (p + 0.1) is far below 1 - epsilon at p = 0.001; a clip would hold it at 0.8 A for A < 0."""
    loss, gradient, _ = gradient_of(repo, repo.Args(rephrase_ratio="shaped"), [[-1.0], [math.log(p)]], [0.0, advantage],
                                    [[-1.0], [-5.0]], rephrased=LAST, behavior_logps=torch.full((2, 1), -9.0))
    assert loss == pytest.approx(-advantage * p / (p + 0.1) / 2)
    assert gradient[1].item() == pytest.approx(-advantage * 0.1 * p / (p + 0.1) ** 2 / 2)


def test_clip_ratio_counts_what_a_clip_holds_and_no_weight_without_one():
    """Own tokens at ratios 5 with A = 1 and 0.2 with A = -1 are held; the third row's weight is far below 1 - epsilon and has no clip."""
    logps, old_logps = [[math.log(0.5)], [math.log(0.1)], [math.log(0.001)]], [[math.log(0.1)], [math.log(0.5)], [0.0]]
    third = torch.tensor([False, False, True])
    for module, flags, inputs in ((luffy, {"epsilon": 0.2}, {"off_policy": third}),
                                  (repo, {"rephrase_ratio": "shaped"}, {"rephrased": third, "behavior_logps": torch.zeros(3, 1)})):
        *_, means = gradient_of(module, module.Args(max_completion_length=1, **flags), logps, [1.0, -1.0, -1.0], old_logps, **inputs)
        assert [means[f"clip_ratio/{side}_mean"][0].item() for side in ("low", "high")] == [1, 1], module.__name__


# ---------------------------------------------------------------- PrefixRL: cuts and tokens


def test_prefixrl_joins_prompt_and_prefix_on_token_ids_at_every_length(byte_tokenizer):
    """prompt + prefix + rest are the stored ids, also where a cut halves a character; one BOS, at the front."""
    tokenizer = byte_tokenizer
    args = prefixrl.Args(dataset_name="mine.jsonl")
    trace = "λ ≥ 2 ⇒ 日本 🙂 so \\boxed{7}"
    rows = data.encode_rows([{"prompt": "Löse: 日?", "answer": "7", "difficulty": "all", "trace": trace}], tokenizer, args)
    (row,) = data.encode_traces(rows, tokenizer, args)
    stored, plain = row["trace_ids"], row["prompt_ids"]
    assert stored == with_eos(tokenizer, trace) and len(stored) == len(trace.encode()) + 1 and stored[-1] == 257
    assert plain == tokenizer("Löse: 日?")["input_ids"] and plain[0] == 256
    lengths, halved = [], 0
    for length in range(1, len(stored) - 1):
        args.prefix_min = args.prefix_max = length / (len(stored) - 1)
        _, *prefixed = prefixrl.prefixed_rows([row], tokenizer, args)
        for cut in prefixed:
            assert cut["prompt_ids"] == plain + stored[:length] and cut["prefix_len"] == length
            assert cut["prompt_ids"] + stored[length:] == plain + stored and cut["prompt_ids"].count(256) == 1
            lengths.append(length)
            halved += "\ufffd" in cut["prefix"]
    shown = len(trace[: trace.index("\\boxed")].encode()) + len("\\boxed")  # the shortest prefix that shows the answer's box
    assert sorted(set(lengths)) == list(range(1, shown)) and len(lengths) == 3 * (shown - 1)
    assert halved == 3 * (1 + 2 + 2 + 2 + 2 + 3)  # cuts inside λ ≥ ⇒ 日 本 🙂


def test_prefixrl_cuts_lie_in_their_range_and_depend_on_the_seed_alone(tiny):
    """[PrefixRL cuts] three per trace, the same at every call with one seed, and no global random state is touched."""
    args, rows = loaded(prefixrl, tiny[1], task="diary", num_hard=64, num_easy=8)
    torch.manual_seed(5)
    random.seed(5)
    before = torch.get_rng_state(), random.getstate()
    made = prefixrl.prefixed_rows(rows, tiny[1], args)
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    assert prefixrl.prefixed_rows(rows, tiny[1], args) == made
    assert prefixrl.prefixed_rows(rows[:9], tiny[1], args) == [row for row in made if row["prompt"] in {row["prompt"] for row in rows[:9]}]
    other = prefixrl.prefixed_rows(rows, tiny[1], prefixrl.Args(task="diary", seed=1))
    cuts, other_cuts = ([row["prefix_len"] for row in rows if row["prefix_len"]] for rows in (made, other))
    assert sum(a != b for a, b in zip(cuts, other_cuts)) > 100
    for row in (row for row in made if row["prefix_len"]):
        full = len(row["trace_ids"]) - 1
        assert row["prefix_share"] == row["prefix_len"] / full
        assert row["prompt_ids"][-row["prefix_len"] :] == row["trace_ids"][: row["prefix_len"]]
        assert 0.4 * full - 0.5 <= row["prefix_len"] <= 0.8 * full + 0.5
    shares = sorted(row["prefix_share"] for row in made if row["prefix_len"])
    assert shares[0] < 0.43 and shares[-1] > 0.77 and sum(shares) / len(shares) == pytest.approx(0.6, abs=0.03)


def test_prefixrl_mixture_is_three_to_one_and_easy_or_untraced_problems_stay_plain(tiny, capsys):
    args, rows = loaded(prefixrl, tiny[1], task="diary", num_hard=6, num_easy=2)
    assert all(row["trace"] for row in rows[:6])
    rows[1] |= {"trace": None, "trace_ids": None}
    easy_trace = rows[6]["own_trace"]
    rows[6] |= {"trace": easy_trace, "trace_ids": with_eos(tiny[1], easy_trace)}  # easy, though it has a trace
    made = prefixrl.prefixed_rows(rows, tiny[1], args)
    counts = {row["prompt"]: [0, 0] for row in rows}
    for row in made:
        counts[row["prompt"]][row["prefix_len"] > 0] += 1
        if not row["prefix_len"]:
            assert row["prompt_ids"] == tiny[1](row["prompt"])["input_ids"] and row["prefix_share"] == 0.0
    assert list(counts.values()) == [[1, 3], [1, 0], [1, 3], [1, 3], [1, 3], [1, 3], [1, 0], [1, 0]]
    assert [row["has_prefixes"] for row in made[:8]] == [True, False, True, True, True, True, False, False]
    assert "prefixes: 15 prefixed prompts and 8 plain ones\n" in capsys.readouterr().out
    args.prefixed_only = True
    assert prefixrl.prefixed_rows(rows, tiny[1], args) == made[8:]
    args.prefixed_only, args.prefixes_per_trace, args.plain_per_trace = False, 2, 2
    made = prefixrl.prefixed_rows(rows, tiny[1], args)
    assert (sum(row["prefix_len"] > 0 for row in made), sum(row["prefix_len"] == 0 for row in made)) == (10, 13)


def test_prefixrl_drops_prefixes_that_show_the_answer(tiny, capsys):
    """Cuts in 80-95 % of 40 tokens, of which the box begins with number 38 or 37."""
    args, rows = loaded(prefixrl, tiny[1], task="diary", num_hard=8, num_easy=0, prefix_min=0.8, prefix_max=0.95, prefixes_per_trace=5)
    kept = [row for row in prefixrl.prefixed_rows(rows, tiny[1], args) if row["prefix_len"]]
    assert 0 < len(kept) < 40
    out = capsys.readouterr().out
    assert f"{len(kept)} prefixed prompts and 8 plain ones; dropped {40 - len(kept)} prefixes that show the answer" in out
    box = tiny[1].convert_tokens_to_ids("\\boxed{")
    assert all(box not in row["prompt_ids"] for row in kept)
    assert any(row["prefix_len"] == row["trace_ids"].index(box) for row in kept)  # all that comes before it may be shown
    args.prefix_min = args.prefix_max = 0.97
    args.prefixed_only = True
    with pytest.raises(common.BadArgument, match="no prompt is left: no trace has a prefix"):
        prefixrl.prefixed_rows(rows, tiny[1], args)


def test_prefixrl_group_shares_one_cut_and_only_own_tokens_are_completion(tiny, sampler):
    args, rows = loaded(prefixrl, tiny[1], task="diary", num_hard=1, num_easy=0)
    plain, first, second, _ = prefixrl.prefixed_rows(rows, tiny[1], args)
    assert first["prompt_ids"] != second["prompt_ids"]
    right, wrong = f"; \\boxed{{ {plain['answer']} }}", "\\boxed{ 49 }"
    prompts = sampler([wrong] * 4 + [right, wrong, wrong, wrong] + [right, right, wrong, wrong])
    batch, texts, metrics = prefixrl.rollout(tiny[0], None, tiny[1], [plain, first, second], args, common.Flops.of(tiny[0]))
    expected = [row["prompt_ids"] for row in (plain, first, second) for _ in range(4)]
    assert prompts == [expected] and [ids[mask].tolist() for ids, mask in zip(batch.prompt_ids, batch.prompt_mask)] == expected
    own = [ids[mask].tolist() for ids, mask in zip(batch.completion_ids, batch.completion_mask)]
    assert own == [with_eos(tiny[1], text) for text in texts] and texts[4:6] == [right, wrong]
    # [PrefixRL objective] the baseline is that of the same (q, cut), and no std divides.
    assert batch.advantages.tolist() == [0.0] * 4 + [0.75, -0.25, -0.25, -0.25] + [0.5, 0.5, -0.5, -0.5]
    assert (metrics["reward/with_prefix"], metrics["reward/without_prefix"], metrics["reward/prefix_gap"]) == (3 / 8, 0.0, 3 / 8)


def test_prefixrl_prefix_in_the_prompt_or_masked_out_is_the_same_gradient(tiny):
    """[PrefixRL objective] loss on own tokens only: on (q + prefix | own) as on (q | prefix + own) with the prefix masked out."""
    model, tokenizer = tiny
    args, rows = loaded(prefixrl, tokenizer, task="diary", num_hard=1, num_easy=0)
    plain, cut, *_ = prefixrl.prefixed_rows(rows, tokenizer, args)
    h, own = cut["prefix_len"], torch.tensor([cut["trace_ids"][cut["prefix_len"] :]])
    results = {}
    for name, prompt, completion in (("prompt", cut, own), ("mask", plain, torch.tensor([cut["trace_ids"]]))):
        prompt_ids, prompt_mask = common.left_pad([prompt["prompt_ids"]], 0, "cpu")
        mask = torch.ones_like(completion, dtype=torch.bool)
        logps, _ = common.policy_logps(model, prompt_ids, prompt_mask, completion, mask)
        mask[:, : completion.shape[1] - own.shape[1]] = False
        loss, _ = prefixrl.policy_loss(logps, logps.detach() - 0.05, torch.tensor([0.75]), mask, args, own.shape[1], 1, torch.zeros(1, 1))
        results[name] = loss, torch.autograd.grad(loss, [logps, *model.parameters()])
    assert results["prompt"][0].item() == pytest.approx(results["mask"][0].item(), abs=1e-6)
    assert results["mask"][1][0][0, :h].tolist() == [0.0] * h
    for mine, wanted in zip(results["prompt"][1][1:], results["mask"][1][1:]):
        torch.testing.assert_close(mine, wanted, atol=1e-6, rtol=0)
    assert max(gradient.abs().max() for gradient in results["prompt"][1][1:]) > 1e-2


def test_prefix_metrics_by_hand():
    def row(share, has_prefixes=True):
        return {"prefix_share": share, "prefix_len": round(share * 40), "has_prefixes": has_prefixes}

    args = prefixrl.Args()
    rows = [row(0.0, False), row(0.0), row(0.0), row(0.39), row(0.45), row(0.65), row(0.75), row(0.81)]
    rewards = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0])
    metrics = prefixrl.prefix_metrics(rows, rewards, args)
    assert metrics == pytest.approx({
        "reward/with_prefix": 3 / 5, "reward/without_prefix": 0.5, "reward/prefix_gap": 0.1, "reward/prefix_0.40_0.50": 0.5,
        "reward/prefix_0.60_0.70": 0.0, "reward/prefix_0.70_0.80": 1.0})
    assert prefixrl.prefix_metrics(rows[:1], rewards[:1], args) == {}
    assert set(prefixrl.prefix_metrics(rows[3:4], rewards[3:4], args)) == {"reward/with_prefix", "reward/prefix_0.40_0.50"}


def test_prefix_metrics_of_a_single_length():
    """--prefix_min = --prefix_max: the rounded cuts lie on both sides of it and belong to one bin."""
    rows = [{"prefix_share": share, "prefix_len": 1, "has_prefixes": True} for share in (0.59, 0.6, 0.61)]
    metrics = prefixrl.prefix_metrics(rows, torch.tensor([1.0, 0.0, 0.0]), prefixrl.Args(prefix_min=0.6, prefix_max=0.6))
    assert metrics == pytest.approx({"reward/with_prefix": 1 / 3, "reward/prefix_0.60_0.60": 1 / 3})


# ---------------------------------------------------------------- SFT


def test_sft_loss_is_the_cross_entropy_of_trace_tokens_and_eos(tiny):
    """[SFT objective] each row alone and unpadded through the model, cross_entropy over all tokens of the step, and its gradient."""
    model, tokenizer = tiny
    args, rows = loaded(sft, tokenizer, num_hard=3, num_easy=2)
    batch, texts, _ = sft.rollout(model, None, tokenizer, rows, args, common.Flops.of(model))
    assert texts == [row["trace"] for row in rows] and len({len(row["trace_ids"]) for row in rows}) > 1
    logits, labels = [], []
    for row in rows:
        prompt, ids = row["prompt_ids"], with_eos(tokenizer, row["trace"])
        logits.append(model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1])
        labels += ids
    expected = torch.nn.functional.cross_entropy(torch.cat(logits), torch.tensor(labels))
    gradient = torch.autograd.grad(expected, model.lm_head.weight)[0]
    args.max_grad_norm = 1e9
    args.micro_batch_size = 2
    metrics = sft.update(model, torch.optim.SGD(model.parameters(), lr=0.0), batch, args, common.Flops.of(model))
    assert metrics["loss"] == pytest.approx(expected.item(), abs=1e-5) and expected.item() > 1
    torch.testing.assert_close(model.lm_head.weight.grad, gradient, atol=1e-6, rtol=0)


def test_sft_leaves_out_what_has_no_trace(run_script, tmp_path, monkeypatch):
    rows = tasks.problems("bills", "train", "easy", 4)
    traces = [None, rows[1]["own_trace"], None, rows[3]["own_trace"]]
    records = [{"prompt": row["prompt"], "answer": row["answer"], "trace": trace} for row, trace in zip(rows, traces)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    seen, rollout = [], sft.rollout
    monkeypatch.setattr(sft, "rollout", lambda *inputs: seen.append([row["prompt"] for row in inputs[3]]) or rollout(*inputs))
    code, _, err = run_script(sft, "--dataset_name", "mine.jsonl", "--max_steps", 1, "--prompts_per_step", 4, "--output_dir", "run")
    assert code == 0, err
    assert sorted(seen[0]) == sorted(2 * [rows[1]["prompt"], rows[3]["prompt"]])


def test_sft_then_grpo_starts_from_the_tuned_model(run_script, tmp_path):
    """The RL run's evaluation at step 0 is the SFT run's last one, and not its first."""
    shared = ("--task", "bills", "--num_hard", 12, "--num_easy", 0, "--eval_problems", 6)
    code, out, err = run_script(sft, *shared, "--max_steps", 8, "--prompts_per_step", 12, "--eval_steps", 8, "--output_dir", "sft")
    assert code == 0 and "traces: 12 of 12 problems have one (--trace_style teacher)" in out, err
    code, _, err = run_script(grpo, *shared, "--model", "sft", "--max_steps", 1, "--prompts_per_step", 2, "--output_dir", "rl")
    assert code == 0, err
    records = [json.loads(line) for run in ("sft", "rl") for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
    first, last, start = ({key: value for key, value in records[i].items() if key.startswith("eval/")} for i in (0, 8, 9))
    assert records[9]["step"] == 0 and start == last != first and last["eval/hard/foreign"] > first["eval/hard/foreign"] + 0.5
    losses = [record["loss"] for record in records[1:9]]
    assert losses[0] > 2 and losses[-1] < losses[0] - 1


# ---------------------------------------------------------------- traces


@pytest.fixture
def load_traces(tiny, tmp_path):
    """load_traces([records of a trace file], **flags of LUFFY) -> the rows of 3 easy bills, own style, with their traces."""
    def call(records, **flags):
        (tmp_path / "t.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        args = luffy.Args(num_hard=0, num_easy=3, eval_steps=0, traces=str(tmp_path / "t.jsonl"), **flags)
        return data.load_rows(args, tiny[1])[0]

    return call


EASY = tasks.problems("bills", "train", "easy", 3)


def record_of(row, **more):
    return {"prompt": row["prompt"], "trace": row["own_trace"]} | more


def test_traces_are_found_by_prompt_and_text_is_tokenised_with_eos(load_traces, tiny, capsys):
    """In another order, with a stranger and a second trace of one problem: the first counts. Text alone is no retokenisation."""
    stranger = record_of(tasks.problems("bills", "train", "hard", 1)[0])
    rows = load_traces([stranger, record_of(EASY[2]), record_of(EASY[0]), record_of(EASY[0], trace="\\boxed{ 0 }")])
    assert [row["trace"] for row in rows] == [EASY[0]["own_trace"], None, EASY[2]["own_trace"]]
    assert [row["trace_ids"] for row in rows] == [with_eos(tiny[1], EASY[0]["own_trace"]), None, with_eos(tiny[1], EASY[2]["own_trace"])]
    assert [row["behavior_logps"] for row in rows] == [None] * 3
    out = capsys.readouterr().out
    assert "traces: 2 of 3 problems have one" in out and "dropped" not in out and "anew" not in out


def test_wrong_and_over_long_traces_are_dropped_with_their_counts(load_traces, tiny, capsys):
    """A trace of exactly the longest completion, EOS included, stays."""
    longest, texts = 20, ["\\boxed{ 99 }"]
    for row, length in ((EASY[1], longest), (EASY[2], longest + 1)):
        answer = f"\\boxed{{ {row['answer']} }}"
        texts.append("; " * (length - len(with_eos(tiny[1], answer))) + answer)
        assert len(with_eos(tiny[1], texts[-1])) == length
    rows = load_traces([record_of(row, trace=text) for row, text in zip(EASY, texts)], max_completion_length=longest)
    assert [row["trace"] for row in rows] == [None, texts[1], None] and [row["trace_ids"] is None for row in rows] == [True, False, True]
    out = capsys.readouterr().out
    assert f"dropped 1 that do not grade right and 1 longer than --max_completion_length {longest}; tokenised 0 anew" in out


def test_wrong_traces_stay_when_they_are_wanted(load_traces, capsys):
    rows = load_traces([record_of(row, trace="\\boxed{ 99 }") for row in EASY], keep_wrong_traces=True)
    assert [row["trace"] for row in rows] == ["\\boxed{ 99 }"] * 3 and "dropped" not in capsys.readouterr().out


def test_ids_that_end_in_padding_are_no_trace_and_log_probs_of_another_length_are_none(load_traces, tiny):
    """LUFFY would grade a trace without EOS as cut off; --shaping importance would pair log-probs with the wrong tokens."""
    right = [with_eos(tiny[1], row["own_trace"]) for row in EASY]
    rows = load_traces([record_of(EASY[0], trace_ids=right[0][:-1] + [tiny[1].pad_token_id], logps=[-1.0] * len(right[0])),
                        record_of(EASY[1], trace_ids=right[1], logps=[-1.0] * (len(right[1]) - 1)),
                        record_of(EASY[2], trace_ids=right[2], logps=[-1.0] * len(right[2]))])
    assert [row["trace_ids"] for row in rows] == right
    assert [row["behavior_logps"] for row in rows] == [None, None, [-1.0] * len(right[2])]


def test_trace_ids_are_kept_when_they_decode_to_the_trace_and_end(load_traces, tiny, capsys):
    """Row 0: ids of the text, and their log-probs. Row 1: ids of another text, row 2: no EOS; both anew, without log-probs."""
    right = [with_eos(tiny[1], row["own_trace"]) for row in EASY]
    given = [right[0], right[0], right[2][:-1]]
    rows = load_traces([record_of(row, trace_ids=ids, logps=[-0.5] * len(ids)) for row, ids in zip(EASY, given)])
    assert [row["trace_ids"] for row in rows] == right
    assert [row["behavior_logps"] for row in rows] == [[-0.5] * len(right[0]), None, None]
    assert "tokenised 2 anew" in capsys.readouterr().out


def test_ids_that_are_kept_are_those_of_the_file_not_of_the_text(byte_tokenizer):
    """A merge-free tokenizer has one reading; with a merge, stored single bytes decode to the same text and stay as they are."""
    from tokenizers import models

    tokenizer, symbols = byte_tokenizer, sorted(byte_tokenizer.get_vocab(), key=byte_tokenizer.get_vocab().get)
    merged = {symbol: index for index, symbol in enumerate([*symbols, "77"])}
    tokenizer.backend_tokenizer.model = models.BPE(vocab=merged, merges=[("7", "7")])
    trace = "\\boxed{77}"
    stored = [merged[symbol] for symbol in trace] + [257]
    assert tokenizer(trace, add_special_tokens=False)["input_ids"] == [*stored[:7], merged["77"], stored[9]] != stored[:-1]
    row = {"prompt": "q", "answer": "77", "difficulty": "all", "prompt_ids": [1]}
    args = luffy.Args()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "traces_file", lambda args: "t.jsonl")
        patch.setattr(data, "read_dataset", lambda *_: [{"prompt": "q", "trace": trace, "trace_ids": stored, "logps": None}])
        (traced,) = data.encode_traces([row], tokenizer, args)
    assert traced["trace_ids"] == stored and traced["trace"] == trace


def test_a_file_of_no_use_is_refused(load_traces):
    with pytest.raises(common.BadArgument, match="t.jsonl: needs columns prompt and trace, found prompt, text"):
        load_traces([{"prompt": row["prompt"], "text": row["own_trace"]} for row in EASY])
    with pytest.raises(common.BadArgument, match="no trace is left of .*: 3 do not grade right, 0 exceed --max_completion_length"):
        load_traces([record_of(row, trace="\\boxed{ 99 }") for row in EASY])
    with pytest.raises(common.BadArgument, match="no trace is left of .*: 0 do not grade right, 3 exceed --max_completion_length"):
        load_traces([record_of(row) for row in EASY], max_completion_length=4)


@pytest.mark.parametrize("style, other", [("own", "teacher"), ("teacher", "own")])
def test_built_in_traces_have_the_style_that_was_asked_for(tiny, style, other):
    _, rows = loaded(luffy, tiny[1], task="diary", trace_style=style)
    assert [row["trace"] for row in rows] == [tasks.solve(row["prompt"], style)[0] for row in rows]
    assert all(row["trace_ids"] == with_eos(tiny[1], row["trace"]) for row in rows)


@pytest.mark.parametrize("module", [luffy, repo, prefixrl, sft], ids=lambda module: module.__name__)
def test_the_price_of_traces_opens_the_ledger(tiny, tmp_path, module):
    """flops/traces and flops/paper start with what the ledger beside the file says; 0 without one, and for written traces."""
    ledger = json.loads(tasks.SELF_TRACES["diary"].with_suffix(".ledger.json").read_text())
    flops = common.Flops.of(tiny[0], module.Args(task="diary", trace_style="self"))
    assert flops.metrics()["flops/traces"] == flops.metrics()["flops/total"] == ledger["flops"] > 1e12
    assert flops.metrics()["flops/paper"] == ledger["flops_paper"] > 1e12 and flops.num_tokens == 0
    (tmp_path / "t.jsonl").write_text("{}")
    for args in (module.Args(traces=str(tmp_path / "t.jsonl")), module.Args(task="diary", trace_style="teacher")):
        assert set(common.Flops.of(tiny[0], args).spent.values()) == {0.0}
    (tmp_path / "t.ledger.json").write_text('{"flops": 5.0, "flops_paper": 3.0}')
    spent = common.Flops.of(tiny[0], module.Args(traces=str(tmp_path / "t.jsonl"), trace_style="self", task="diary")).spent
    assert spent == {"rollout": 0.0, "train": 0.0, "rephrase": 0.0, "traces": 5.0, "paper": 3.0}


@pytest.mark.parametrize("text, other, expected", [
    ("a b c d", "x a b c d y", 1.0), ("a b c d", "b c d", 0.5), ("a b c", "c b a", 0.0), ("a b", "a b", 0.0), ("a a a a", "a a a", 1.0)])
def test_ngram_overlap_is_the_share_of_known_trigrams(text, other, expected):
    assert common.ngram_overlap(text, other) == expected


# ---------------------------------------------------------------- flags


@pytest.mark.parametrize("module, flags, expected", [
    (luffy, ["--num_off_policy", "8"], "--num_off_policy must be 0 to 7, got 8"),
    (luffy, ["--num_off_policy", "-1"], "--num_off_policy must be 0 to 7, got -1"),
    (luffy, ["--shaping", "plain"], "--shaping: invalid choice: 'plain'"),
    (luffy, ["--shaping_gamma", "0"], "--shaping_gamma must be positive, got 0.0"),
    (luffy, ["--importance_cap", "nan"], "--importance_cap must be positive, got nan"),
    (luffy, ["--traces", "missing.jsonl"], "--traces missing.jsonl: no such file"),
    (luffy, ["--trace_style", "self"], "--trace_style self: the base never solves hard problems of --task bills; take teacher or own"),
    (luffy, ["--dataset_name", "plain.jsonl"], "no trace is left of plain.jsonl: 0 do not grade right, 0 exceed --max_completion_length; "
                                               "needs a column trace or target or completion or generation, or give --traces"),
    (luffy, ["--shaping", "importance"], "--shaping importance needs traces with log-probs"),
    (repo, ["--reward_threshold", "nan"], "--reward_threshold must be positive, got nan"),
    (repo, ["--failure_rate", "0"], "--failure_rate must be positive, got 0.0"),
    (repo, ["--shaping_gamma", "-1"], "--shaping_gamma must be positive, got -1.0"),
    (repo, ["--rephrase_prompt", "{prompt}"], "--rephrase_prompt must contain {prompt} and {trace}"),
    (repo, ["--rephrase_ratio", "none"], "--rephrase_ratio: invalid choice: 'none'"),
    (repo, ["--trace_style", "self"], "--trace_style self: "),
    (prefixrl, ["--prefix_min", "0"], "--prefix_min and --prefix_max must be 0 < min <= max < 1, got 0.0, 0.8"),
    (prefixrl, ["--prefix_min", "0.9"], "--prefix_min and --prefix_max must be 0 < min <= max < 1, got 0.9, 0.8"),
    (prefixrl, ["--prefix_max", "1"], "--prefix_min and --prefix_max must be 0 < min <= max < 1, got 0.4, 1.0"),
    (prefixrl, ["--prefixed_only", "--prefixes_per_trace", "0"], "--prefixed_only needs --prefixes_per_trace of at least 1"),
    (prefixrl, ["--prefixed_only", "--num_hard", "0", "--trace_style", "own"], "no prompt is left: no trace has a prefix"),
    (prefixrl, ["--prefixes_per_trace", "-1"], "--prefixes_per_trace must be at least 0, got -1"),
    (prefixrl, ["--plain_per_trace", "-1"], "--plain_per_trace must be at least 0, got -1"),
    (prefixrl, ["--plain_per_trace", "0", "--prefixes_per_trace", "0", "--num_easy", "0", "--num_hard", "2"], "no prompt is left: "),
    (prefixrl, ["--task", "bills"], "--trace_style self: the base never solves hard problems of --task bills"),
    (sft, ["--trace_style", "self"], "--trace_style self: "),
    (sft, ["--num_generations", "4"], "unrecognized arguments: --num_generations 4"),
    (sft, ["--beta", "0.1"], "unrecognized arguments: --beta 0.1"),
])
def test_flags_that_cannot_work_are_one_line_and_code_2_and_touch_nothing(run_script, tmp_path, module, flags, expected):
    row = tasks.problems("bills", "train", "easy", 1)[0]
    (tmp_path / "plain.jsonl").write_text(json.dumps({"prompt": row["prompt"], "answer": row["answer"]}))
    code, _, err = run_script(module, "--max_steps", 1, "--prompts_per_step", 2, "--eval_steps", 0, *flags)
    assert code == 2 and "Traceback" not in err
    assert err.strip().splitlines()[-1].startswith(f"{module.__name__}.py: error: ") and expected in err.strip().splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["plain.jsonl"]
