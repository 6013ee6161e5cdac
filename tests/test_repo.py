"""Does RePO help the failed groups, and only these, by a retelling that is trained as an answer to the question?"""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch

import common
import engine
import repo
from engine import models, tasks
from engine.flops import Flops
from methods import completions_of, flops_of, gradient_of, loaded, logps_without_padding, prompts_of, with_eos

# ---------------------------------------------------------------- gate and replacement


def failed_groups(tiny, rewards, **flags):
    """Inputs of `help_failed_groups` as a list, for groups of the given rewards (N, G), and the N problems."""
    model, tokenizer = tiny
    args, problems = loaded(repo, tokenizer, num_hard=len(rewards), num_easy=0, num_generations=len(rewards[0]), **flags)
    samples = []
    for i, reward in enumerate(sum(rewards, [])):
        problem, text = problems[i // args.num_generations], " ".join(["7"] * (3 + i % 4)) + f" \\boxed{{ {i} }}"
        samples.append(common.Sample(problem, problem["prompt_ids"], with_eos(tokenizer, text), text, True, reward))
    return [model, tokenizer, samples, args, Flops.of(model, stages=("rephrase",))], problems


def with_problems(inputs, **changes):
    """Change the problems of the samples in some inputs."""
    inputs[2] = [replace(sample, problem=sample.problem | changes) for sample in inputs[2]]


def replaced(inputs, samples):
    """Places of the samples that are not the given ones."""
    assert len(samples) == len(inputs[2])
    return [place for place, (new, old) in enumerate(zip(samples, inputs[2])) if new is not old]


def notes_ids(tokenizer, problem):
    return tokenizer(tasks.rephrase_prompt(problem["prompt"], problem["trace"]))["input_ids"]


def test_the_gate_opens_at_rho_exactly(tiny, sampler):
    """[RePO gate] --failure_threshold 0.75: 6 of 8 failed is helped, 5 of 8 is not; a reward of delta itself has not failed."""
    rewards = [[0.0] * 5 + [0.4, 0.5, 1.0], [0.0] * 5 + [0.5, 1.0, 1.0]]
    inputs, problems = failed_groups(tiny, rewards, failure_threshold=0.75)
    prompts = sampler([problems[0]["own_trace"]])
    samples, metrics = repo.help_failed_groups(*inputs)
    assert prompts == [[notes_ids(tiny[1], problems[0])]] and replaced(inputs, samples) == [4]
    assert metrics["rephrase/failure_rate"] == 11 / 16 and metrics["rephrase/asked"] == 0.5 and metrics["rephrase/success"] == 1.0


def test_one_row_is_replaced_the_last_of_the_worst(tiny, sampler):
    """[RePO replacement] everything else is as it was, the given samples too; retelling is charged to a stage of its own."""
    inputs, problems = failed_groups(tiny, [[0.2, 0.0, 0.4, 0.0, 0.3], [0.0, 0.0, 1.0, 0.0, 0.1], [0.0] * 5], failure_threshold=1.0)
    model, tokenizer, given, _, flops = inputs
    before = copy.deepcopy(given)
    told = [problems[0]["own_trace"], f"\\boxed{{ {problems[2]['answer']} }}"]
    prompts = sampler(told)
    samples, metrics = repo.help_failed_groups(*inputs)

    notes = [notes_ids(tokenizer, problems[0]), notes_ids(tokenizer, problems[2])]
    assert prompts == [notes] and replaced(inputs, samples) == [3, 14] and given == before
    for place, problem, prompt, text in zip((3, 14), (problems[0], problems[2]), notes, told):
        assert samples[place] == common.Sample(problem, prompt, with_eos(tokenizer, text), text, True, 1.0, source="rephrase")
    own_lengths = torch.tensor([len(sample.ids) for sample in given]).view(3, 5).float().mean(1)
    ratios = [len(with_eos(tokenizer, told[0])) / own_lengths[0], len(with_eos(tokenizer, told[1])) / own_lengths[2]]
    assert metrics["rephrase/length_ratio"] == pytest.approx(sum(ratios).item() / 2) and metrics["rephrase/asked"] == pytest.approx(2 / 3)
    lengths = [len(prompt) + len(with_eos(tokenizer, text)) for prompt, text in zip(notes, told)]
    assert flops.spent["rephrase"] == flops_of(model, lengths) and flops.spent["rollout"] == flops.spent["train"] == 0
    assert flops.num_tokens == sum(lengths) and flops.spent["paper"] == 2 * model.num_parameters() * sum(lengths)


def test_a_wrong_retelling_is_counted_and_replaces_nothing_unless_it_may(tiny, sampler):
    for required in (True, False):
        inputs, _ = failed_groups(tiny, [[0.0] * 4], require_correct_rephrase=required)
        sampler(["\\boxed{ 1 }"])
        samples, metrics = repo.help_failed_groups(*inputs)
        assert metrics["rephrase/asked"] == 1.0 and metrics["rephrase/success"] == 0.0
        assert replaced(inputs, samples) == ([] if required else [3])
        if not required:
            assert samples[3].text == "\\boxed{ 1 }" and [sample.reward for sample in samples] == [0.0] * 4


def test_a_cut_off_retelling_earns_nothing_and_gets_no_eos(tiny, sampler):
    """A right answer without EOS is a truncated completion like any other."""
    inputs, problems = failed_groups(tiny, [[0.0] * 4], require_correct_rephrase=False)
    ids = with_eos(tiny[1], problems[0]["own_trace"])[:-1]
    sampler([ids])
    samples, metrics = repo.help_failed_groups(*inputs)
    assert samples[3].ids == ids and [sample.ended for sample in samples] == [True] * 3 + [False]
    assert [sample.reward for sample in samples] == [0.0] * 4 and metrics["rephrase/success"] == 0.0


def test_a_retelling_of_which_the_marker_leaves_nothing_replaces_nothing(tiny, sampler):
    inputs, _ = failed_groups(tiny, [[0.0] * 4, [0.0] * 4], rephrase_marker="Rewrite:", require_correct_rephrase=False)
    sampler([with_eos(tiny[1], "Notes: Rewrite:")[:-1], "\\boxed{ 1 }"])
    samples, metrics = repo.help_failed_groups(*inputs)
    assert replaced(inputs, samples) == [7] and metrics["rephrase/asked"] == 1.0 and all(sample.ids for sample in samples)


def test_a_prompt_too_long_or_without_trace_is_not_sampled(tiny, sampler, monkeypatch):
    inputs, problems = failed_groups(tiny, [[0.0] * 4] * 2)
    args, lengths = inputs[3], [len(notes_ids(tiny[1], problem)) for problem in problems]
    assert lengths[0] == lengths[1]
    longer = [replace(one, problem=one.problem | {"trace": one.problem["trace"] + " ;"}) for one in inputs[2][:4]]
    inputs[2] = longer + inputs[2][4:]
    args.max_rephrase_prompt_length = lengths[0]  # the second group's fits exactly
    prompts = sampler([f"\\boxed{{ {problems[1]['answer']} }}"])
    samples, metrics = repo.help_failed_groups(*inputs)
    assert [len(ids) for ids in prompts[0]] == [lengths[0]] and metrics["rephrase/too_long"] == metrics["rephrase/asked"] == 0.5
    assert replaced(inputs, samples) == [7]
    args.max_rephrase_prompt_length = lengths[0] - 1
    prompts = sampler()
    metrics = repo.help_failed_groups(*inputs)[1]
    assert prompts == [] and (metrics["rephrase/too_long"], metrics["rephrase/asked"]) == (1.0, 0.0)
    args.max_rephrase_prompt_length = 4096
    with monkeypatch.context() as patch:
        patch.setattr(engine.models, "max_positions", lambda model: lengths[0] + args.max_completion_length - 1)
        assert repo.help_failed_groups(*inputs)[1]["rephrase/too_long"] == 1.0 and prompts == []
    with_problems(inputs, trace=None)
    metrics = repo.help_failed_groups(*inputs)[1]
    assert prompts == [] and (metrics["rephrase/too_long"], metrics["rephrase/asked"]) == (0.0, 0.0)


def test_nothing_is_sampled_when_no_group_fails(tiny, sampler):
    inputs, _ = failed_groups(tiny, [[0.0, 0.0, 0.0, 1.0], [1.0] * 4], failure_threshold=1.0)
    prompts = sampler()
    samples, metrics = repo.help_failed_groups(*inputs)
    assert prompts == [] and replaced(inputs, samples) == []
    assert inputs[-1].spent["rephrase"] == 0 and metrics["rephrase/failure_rate"] == 3 / 8


# ---------------------------------------------------------------- the prompt with the trace


def test_the_prompt_is_filled_in_once(tiny, sampler, monkeypatch):
    r"""A problem about \operatorname{trace} holds the placeholder's name, and a trace may hold {prompt}: both stay what they are."""
    inputs, _ = failed_groups(tiny, [[0.0] * 4], rephrase_prompt="{prompt} Notes: {trace} Rewrite: {prompt}")
    with_problems(inputs, prompt="Q: {trace} = 7 ? A:", trace="7 {prompt} 8")
    rendered = []
    monkeypatch.setattr(common, "render_prompt", lambda tokenizer, text, *rest: rendered.append(text) or text)
    sampler(["\\boxed{ 1 }"])
    repo.help_failed_groups(*inputs)
    assert rendered == ["Q: {trace} = 7 ? A: Notes: 7 {prompt} 8 Rewrite: Q: {trace} = 7 ? A:"]


def test_an_own_data_set_gets_the_general_prompt(tiny, sampler):
    inputs, problems = failed_groups(tiny, [[0.0] * 4])
    inputs[3].dataset_name = "mine.jsonl"
    prompts = sampler(["\\boxed{ 1 }"])
    repo.help_failed_groups(*inputs)
    text = tiny[1].decode(prompts[0][0])
    assert text.startswith(problems[0]["prompt"]) and problems[0]["trace"] in text and "Notes:" not in text
    assert len(prompts[0][0]) == len(repo.REPHRASE_PROMPT.split()) - 2 + len((problems[0]["prompt"] + " " + problems[0]["trace"]).split())


def test_the_datas_own_system_message_stays_in_the_prompt(tiny, sampler, monkeypatch):
    inputs, _ = failed_groups(tiny, [[0.0] * 4])
    system = {"role": "system", "content": "Count ."}
    with_problems(inputs, prompt="Q: 1 A:", trace="7", prompt_messages=[system, {"role": "user", "content": "Q: 1 A:"}])
    rendered, render = [], common.render_prompt
    monkeypatch.setattr(common, "render_prompt", lambda *inputs: rendered.append(inputs[1]) or render(*inputs))
    prompts = sampler(["\\boxed{ 1 }"])
    repo.help_failed_groups(*inputs)
    assert rendered == [[system, {"role": "user", "content": "Q: 1 Notes: 7 Rewrite:"}]]
    assert tiny[1].decode(prompts[0][0]).endswith("Q: 1 Notes: 7 Rewrite:") and prompts[0][0][:2] == tiny[1]("Count .")["input_ids"]


# ---------------------------------------------------------------- the batch


@pytest.mark.parametrize("longer", [True, False])
def test_the_retelling_is_trained_as_an_answer_to_the_question(tiny, sampler, longer):
    """The prompt stays q, the sampled ids stay, the advantages are of the final group, the reward metrics of the original one."""
    model, tokenizer = tiny
    args, problems = loaded(repo, tokenizer, num_hard=1, num_easy=1, failure_threshold=1.0)
    wrong, right = "7 ; \\boxed{ 1 }", problems[1]["own_trace"] if longer else f"\\boxed{{ {problems[1]['answer']} }}"
    told = problems[0]["own_trace"] if longer else f"\\boxed{{ {problems[0]['answer']} }}"
    prompts, flops = sampler([wrong] * 7 + [right], [told]), Flops.of(model, stages=("rephrase",))
    batch, samples, metrics = repo.rollout(model, None, tokenizer, problems, args, flops)
    questions, notes = [problems[i // 4]["prompt_ids"] for i in range(8)], notes_ids(tokenizer, problems[0])
    assert prompts == [questions, [notes]] and prompts_of(batch) == questions
    texts = [wrong] * 3 + [told] + [wrong] * 3 + [right]
    assert [sample.text for sample in samples] == texts and completions_of(batch) == [with_eos(tokenizer, text) for text in texts]
    assert batch.completion_ids.dtype == torch.int64
    assert batch.completion_ids.shape == batch.behavior_logps.shape == (8, max(len(with_eos(tokenizer, text)) for text in texts))
    assert [sample.reward for sample in samples] == [0, 0, 0, 1, 0, 0, 0, 1]
    assert metrics["reward"] == 1 / 8 and metrics["rephrase/failure_rate"] == 7 / 8 and metrics["rephrase/replaced"] == 0.5
    torch.testing.assert_close(batch.advantages[:4], torch.tensor([-1, -1, -1, 3]) / math.sqrt(3), atol=1e-5, rtol=0)
    assert batch.old_logps is None and batch.ref_logps is None and torch.equal(batch.loss_mask, batch.completion_mask)
    assert batch.rephrased.nonzero().flatten().tolist() == [3]
    assert torch.equal(batch.behavior_logps != 0, batch.completion_mask & batch.rephrased.unsqueeze(1))
    assert flops.spent["rephrase"] == flops.spent["train"] == flops_of(model, [len(notes) + len(with_eos(tokenizer, told))])


def test_a_wrong_retelling_that_replaces_leaves_the_group_without_a_signal(tiny, sampler):
    args, problems = loaded(repo, tiny[1], num_hard=1, num_easy=0, require_correct_rephrase=False)
    sampler(["\\boxed{ 1 }"] * 4, ["\\boxed{ 2 }"])
    batch, samples, metrics = repo.rollout(tiny[0], None, tiny[1], problems, args, Flops.of(tiny[0]))
    assert samples[3].text == "\\boxed{ 2 }" and metrics["rephrase/replaced"] == 1.0 and batch.advantages.tolist() == [0.0] * 4


def test_a_raw_trace_takes_the_place_without_a_retelling(tiny, sampler):
    """The trace's own ids, marker and all; nothing is sampled or paid for as rephrasing, and it is scored under the question."""
    args, problems = loaded(repo, tiny[1], num_easy=0, raw_trace=True, rephrase_marker="costs")
    prompts, flops = sampler(["\\boxed{ 1 }"] * 4 + [problems[1]["own_trace"]] * 4), Flops.of(tiny[0], stages=("rephrase",))
    batch, samples, metrics = repo.rollout(tiny[0], None, tiny[1], problems, args, flops)
    trace_ids = problems[0]["trace_ids"]
    assert completions_of(batch)[3] == trace_ids and samples[3].text == problems[0]["trace"] and "costs" in samples[3].text
    assert [sample.reward for sample in samples] == [0.0] * 3 + [1.0] * 5 and all(sample.ended for sample in samples)
    assert metrics["rephrase/overlap"] == 1.0 and len(prompts) == 1
    assert batch.rephrased.nonzero().flatten().tolist() == [3] and flops.spent["rephrase"] == 0
    on_question = logps_without_padding(tiny[0], problems[0]["prompt_ids"], trace_ids)
    torch.testing.assert_close(batch.behavior_logps[3, : len(trace_ids)], on_question, atol=1e-5, rtol=0)


@pytest.mark.parametrize("ends", [True, False])
def test_what_is_left_after_the_last_marker_is_tokenised(tiny, sampler, ends):
    """The marker is a word here. The EOS stays exactly if it was sampled."""
    args, problems = loaded(repo, tiny[1], num_hard=1, num_easy=0, rephrase_marker="Rewrite:", require_correct_rephrase=False,
                            grade_truncated=True)
    answer = f"\\boxed{{ {problems[0]['answer']} }}"
    ids = with_eos(tiny[1], f"Notes: 7 Rewrite: 8 Rewrite: {answer}")
    sampler(["\\boxed{ 1 }"] * 4, [ids if ends else ids[:-1]])
    batch, samples, _ = repo.rollout(tiny[0], None, tiny[1], problems, args, Flops.of(tiny[0]))
    left = with_eos(tiny[1], answer)[: None if ends else -1]
    assert completions_of(batch)[3] == left and samples[3].text == answer and samples[3].ended == ends and samples[3].reward == 1.0
    as_sampled = logps_without_padding(tiny[0], notes_ids(tiny[1], problems[0]), left)
    torch.testing.assert_close(batch.behavior_logps[3, : len(left)], as_sampled, atol=1e-5, rtol=0)


def test_behavior_logps_and_context_gap_of_a_real_rollout(tiny):
    """Retellings of the tiny base itself: behaviour log-probs are those given P(q, k), and the gap is what the question alone lacks."""
    model, tokenizer = tiny
    args, problems = loaded(repo, tokenizer, num_hard=3, num_easy=0)
    models.seed_everything(0, 0)
    batch, _, metrics = repo.rollout(model, None, tokenizer, problems, args, Flops.of(model))
    rephrased = batch.rephrased.nonzero().flatten().tolist()
    assert len(rephrased) >= 2 and metrics["rephrase/replaced"] == pytest.approx(len(rephrased) / 3)
    gaps, masked_out, completions = [], batch.behavior_logps.clone(), completions_of(batch)
    for i in rephrased:
        problem, ids = problems[i // 4], completions[i]
        with_notes = logps_without_padding(model, notes_ids(tokenizer, problem), ids)
        torch.testing.assert_close(batch.behavior_logps[i, : len(ids)], with_notes, atol=1e-5, rtol=0)
        masked_out[i, : len(ids)] = 0.0
        gaps.append(logps_without_padding(model, problem["prompt_ids"], ids) - with_notes)
    assert masked_out.abs().sum() == 0
    updated = repo.update(model, torch.optim.SGD(model.parameters(), lr=0.0), batch, args, Flops.of(model))
    gap = torch.cat(gaps).mean().item()
    assert updated["rephrase/context_gap"] == pytest.approx(gap, abs=1e-4) and gap < -0.1
    assert updated["rephrase/ratio"] == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("text, other, expected", [
    ("a b c d", "x a b c d y", 1.0), ("a b c d", "b c d", 0.5), ("a b c", "c b a", 0.0), ("a b", "a b", 0.0), ("a a a a", "a a a", 1.0)])
def test_ngram_overlap_is_the_share_of_known_trigrams(text, other, expected):
    assert common.ngram_overlap(text, other) == expected


# ---------------------------------------------------------------- ratio

LAST = torch.tensor([False, True])


def test_question_ratio_is_one_at_first_and_knows_no_behavior():
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
def test_behavior_ratio_is_against_the_prompt_that_sampled_it_and_clipped(against, advantage, expected, weight):
    """One own token at ratio 1 with A = 0 and one rephrased token, whose old log-prob under q says nothing here."""
    loss, gradient, means = gradient_of(
        repo, repo.Args(rephrase_ratio="behavior"), [[-1.0], [-1.0]], [0.0, advantage], [[-1.0], [-7.0]], rephrased=LAST,
        behavior_logps=torch.tensor([[-50.0], [-1.0 - math.log(against)]]))
    assert (loss, gradient[1].item()) == pytest.approx((expected / 2, weight / 2), abs=1e-6) and gradient[0].item() == 0.0
    assert means["rephrase/ratio"][0].item() == pytest.approx(against)
    assert means["rephrase/context_gap"][0].item() == pytest.approx(math.log(against), abs=1e-6) and means["rephrase/context_gap"][1] == 1


def test_stopgrad_ratio_is_one_throughout():
    """Old log-probs differ: own tokens see them (ratio 1.1), rephrased ones do not."""
    loss, gradient, _ = gradient_of(repo, repo.Args(rephrase_ratio="stopgrad"), [[-1.0], [-1.0]], [3.0, 2.0],
                                    [[-1.0 - math.log(1.1)], [-5.0]], rephrased=LAST, behavior_logps=torch.full((2, 1), -9.0))
    assert loss == pytest.approx(-(3.3 + 2.0) / 2) and gradient.flatten().tolist() == pytest.approx([-3.3 / 2, -1.0])


@pytest.mark.parametrize("p", [0.001, 0.1, 1.0])
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_shaped_weight_is_that_of_luffy_and_unclipped(p, advantage):
    """p / (p + 0.1) is far below 1 - epsilon at p = 0.001; a clip would hold it at 0.8 A for A < 0."""
    loss, gradient, _ = gradient_of(repo, repo.Args(rephrase_ratio="shaped"), [[-1.0], [math.log(p)]], [0.0, advantage],
                                    [[-1.0], [-5.0]], rephrased=LAST, behavior_logps=torch.full((2, 1), -9.0))
    assert loss == pytest.approx(-advantage * p / (p + 0.1) / 2)
    assert gradient[1].item() == pytest.approx(-advantage * 0.1 * p / (p + 0.1) ** 2 / 2)


# ---------------------------------------------------------------- rewards on another scale


@pytest.mark.parametrize("rewards, delta, usable", [
    ((10, 4, 0), 5.0, [True, False, False]), ((0.9, 0.1, 1.0), 0.85, [True, False, True]), ((-1, -3, 0), -1.0, [True, False, True]),
    ((0, -1, -2), 0.0, [True, False, False])])
def test_a_trace_is_right_when_it_reaches_delta(tiny, sampler, tmp_path, rewards, delta, usable):
    """The same number opens the gate, and says which retellings replace."""
    (tmp_path / "r.py").write_text(f"def scale(completions, **columns): return [{rewards}[int(text.split()[0])] for text in completions]\n")
    rows = [{"prompt": f"Q: {i}", "answer": "", "trace": f"{i} ; 1"} for i in range(3)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = repo.Args(dataset_name=str(tmp_path / "d.jsonl"), reward_fn=f"{tmp_path}/r.py:scale", reward_threshold=delta, eval_steps=0,
                     num_generations=2, prompts_per_step=1)
    problems, _ = common.load_problems(args, tiny[1])
    assert [problem["trace"] is not None for problem in problems] == usable
    right, wrong = (str(rewards.index(pick(rewards))) + " ; 1" for pick in (max, min))
    sampler([wrong, right], [right])
    batch, samples, metrics = repo.rollout(tiny[0], None, tiny[1], problems[:1], args, Flops.of(tiny[0]))
    assert metrics["rephrase/replaced"] == 1 and metrics["rephrase/failure_rate"] == 0.5
    assert [sample.reward for sample in samples] == [max(rewards)] * 2


# ---------------------------------------------------------------- flags


@pytest.mark.parametrize("flags, expected", [
    (["--reward_threshold", "nan"], "--reward_threshold: expected a number, got nan"),
    (["--failure_threshold", "0"], "--failure_threshold must be above 0, got 0.0"),
    (["--failure_rate", "0.5"], "--failure_rate is now --failure_threshold"),
    (["--shaping_gamma", "-1"], "--shaping_gamma must be above 0, got -1.0"),
    (["--rephrase_prompt", "{prompt}"], "--rephrase_prompt must be text with {prompt} and {trace}"),
    (["--rephrase_ratio", "none"], "--rephrase_ratio: invalid choice: 'none'"),
])
def test_flags_that_cannot_work_are_refused(refused, flags, expected):
    assert expected in refused(repo, *flags)
