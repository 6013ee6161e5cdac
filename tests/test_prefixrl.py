"""Does PrefixRL cut traces into prompts, and train only what the policy adds to them?"""

import random

import pytest
import torch

import common
import prefixrl
from engine import BadArgument
from engine.flops import Flops
from engine.sampling import left_pad
from engine.scoring import score_completions
from methods import completions_of, loaded, prompts_of, with_eos

# ---------------------------------------------------------------- cuts


def test_prompt_and_prefix_are_joined_on_token_ids_at_every_length(byte_tokenizer):
    """prompt + prefix + rest are the stored ids, also where a cut halves a character; one BOS, at the front."""
    tokenizer = byte_tokenizer
    args = prefixrl.Args(dataset_name="mine.jsonl")
    trace = "λ ≥ 2 ⇒ 日本 🙂 so \\boxed{7}"
    problems = common.encode_problems([{"prompt": "Löse: 日?", "answer": "7", "difficulty": "all", "trace": trace}], tokenizer, args)
    (problem,) = common.encode_traces(problems, tokenizer, args)
    stored, plain = problem["trace_ids"], problem["prompt_ids"]
    assert stored == with_eos(tokenizer, trace) and len(stored) == len(trace.encode()) + 1 and stored[-1] == 257
    assert plain == tokenizer("Löse: 日?")["input_ids"] and plain[0] == 256
    lengths, halved = [], 0
    for length in range(1, len(stored) - 1):
        args.prefix_min = args.prefix_max = length / (len(stored) - 1)
        _, *prefixed = prefixrl.add_prefixes([problem], tokenizer, args)
        for cut in prefixed:
            assert cut["prompt_ids"] == plain + stored[:length] and cut["prefix_ids"] == stored[:length]
            assert cut["prompt_ids"] + stored[length:] == plain + stored and cut["prompt_ids"].count(256) == 1
            lengths.append(length)
            halved += "\ufffd" in cut["prefix"]
    shown = len(trace[: trace.index("\\boxed")].encode()) + len("\\boxed")  # the shortest prefix that shows the answer's box
    assert sorted(set(lengths)) == list(range(1, shown)) and len(lengths) == 3 * (shown - 1)
    assert halved == 3 * (1 + 2 + 2 + 2 + 2 + 3)  # cuts inside λ ≥ ⇒ 日 本 🙂


def test_cuts_lie_in_their_range_and_depend_on_the_seed_alone(tiny):
    """[PrefixRL cuts] three per trace, the same at every call with one seed, and no global random state is touched."""
    args, problems = loaded(prefixrl, tiny[1], task="diary", num_hard=64, num_easy=8)
    torch.manual_seed(5)
    random.seed(5)
    before = torch.get_rng_state(), random.getstate()
    made = prefixrl.add_prefixes(problems, tiny[1], args)
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    assert prefixrl.add_prefixes(problems, tiny[1], args) == made
    first = {problem["prompt"] for problem in problems[:9]}
    assert prefixrl.add_prefixes(problems[:9], tiny[1], args) == [problem for problem in made if problem["prompt"] in first]
    other = prefixrl.add_prefixes(problems, tiny[1], prefixrl.Args(task="diary", seed=1))
    cuts, other_cuts = ([len(problem["prefix_ids"]) for problem in cut if problem["prefix_ids"]] for cut in (made, other))
    assert sum(a != b for a, b in zip(cuts, other_cuts)) > 100
    prefixed = [problem for problem in made if problem["prefix_ids"]]
    for problem in prefixed:
        full, length = len(problem["trace_ids"]) - 1, len(problem["prefix_ids"])
        assert problem["prefix_share"] == length / full
        assert problem["prompt_ids"][-length:] == problem["prefix_ids"] == problem["trace_ids"][:length]
        assert 0.4 * full - 0.5 <= length <= 0.8 * full + 0.5
    shares = sorted(problem["prefix_share"] for problem in prefixed)
    assert shares[0] < 0.43 and shares[-1] > 0.77 and sum(shares) / len(shares) == pytest.approx(0.6, abs=0.03)


def test_the_mixture_is_three_to_one_and_easy_or_untraced_problems_stay_plain(tiny, capsys):
    args, problems = loaded(prefixrl, tiny[1], task="diary", num_hard=6, num_easy=2)
    assert all(problem["trace"] for problem in problems[:6])
    problems[1] |= {"trace": None, "trace_ids": None}
    easy_trace = problems[6]["own_trace"]
    problems[6] |= {"trace": easy_trace, "trace_ids": with_eos(tiny[1], easy_trace)}  # easy, though it has a trace
    made = prefixrl.add_prefixes(problems, tiny[1], args)
    counts = {problem["prompt"]: [0, 0] for problem in problems}
    for problem in made:
        counts[problem["prompt"]][len(problem["prefix_ids"]) > 0] += 1
        if not problem["prefix_ids"]:
            assert problem["prompt_ids"] == tiny[1](problem["prompt"])["input_ids"] and problem["prefix_share"] == 0.0
    assert list(counts.values()) == [[1, 3], [1, 0], [1, 3], [1, 3], [1, 3], [1, 3], [1, 0], [1, 0]]
    assert [problem["has_prefixes"] for problem in made] == [True, False, True, True, True, True, False, False] + [True] * 15
    assert "prefixes: 15 prefixed prompts and 8 plain ones\n" in capsys.readouterr().out
    args.prefixed_only = True
    assert prefixrl.add_prefixes(problems, tiny[1], args) == made[8:]
    args.prefixed_only, args.prefixes_per_trace, args.plain_per_trace = False, 2, 2
    made = prefixrl.add_prefixes(problems, tiny[1], args)
    assert [sum(bool(problem["prefix_ids"]) == cut for problem in made) for cut in (True, False)] == [10, 13]


def test_prefixes_that_show_the_answer_are_dropped(tiny, capsys):
    """Cuts in 80-95 % of 40 tokens, of which the box begins with number 38 or 37."""
    args, problems = loaded(prefixrl, tiny[1], task="diary", num_hard=8, num_easy=0, prefix_min=0.8, prefix_max=0.95, prefixes_per_trace=5)
    kept = [problem for problem in prefixrl.add_prefixes(problems, tiny[1], args) if problem["prefix_ids"]]
    assert 0 < len(kept) < 40
    out = capsys.readouterr().out
    assert f"{len(kept)} prefixed prompts and 8 plain ones; dropped {40 - len(kept)} prefixes that show the answer" in out
    box = tiny[1].convert_tokens_to_ids("\\boxed{")
    assert all(box not in problem["prompt_ids"] for problem in kept)
    assert any(len(problem["prefix_ids"]) == problem["trace_ids"].index(box) for problem in kept)  # all that comes before it may be shown
    args.prefix_min = args.prefix_max = 0.97
    args.prefixed_only = True
    with pytest.raises(BadArgument, match="no prompt is left: no trace has a prefix"):
        prefixrl.add_prefixes(problems, tiny[1], args)


# ---------------------------------------------------------------- rows and tokens


def test_a_group_shares_one_cut_and_only_own_tokens_are_completion(tiny, sampler):
    args, problems = loaded(prefixrl, tiny[1], task="diary", num_hard=1, num_easy=0)
    plain, first, second, _ = prefixrl.add_prefixes(problems, tiny[1], args)
    assert first["prompt_ids"] != second["prompt_ids"]
    right, wrong = f"; \\boxed{{ {plain['answer']} }}", "\\boxed{ 49 }"
    texts = [wrong] * 4 + [right, wrong, wrong, wrong] + [right, right, wrong, wrong]
    prompts = sampler(texts)
    batch, samples, metrics = prefixrl.rollout(tiny[0], None, tiny[1], [plain, first, second], args, Flops.of(tiny[0]))
    expected = [problem["prompt_ids"] for problem in (plain, first, second) for _ in range(4)]
    assert prompts == [expected] and prompts_of(batch) == expected
    assert [sample.text for sample in samples] == texts and completions_of(batch) == [with_eos(tiny[1], text) for text in texts]
    assert torch.equal(batch.loss_mask, batch.completion_mask)
    # [PrefixRL objective] the baseline is that of the same (q, cut), and no std divides.
    assert batch.advantages.tolist() == [0.0] * 4 + [0.75, -0.25, -0.25, -0.25] + [0.5, 0.5, -0.5, -0.5]
    assert (metrics["reward/with_prefix"], metrics["reward/without_prefix"], metrics["reward/prefix_gap"]) == (3 / 8, 0.0, 3 / 8)


def test_a_prefix_in_the_prompt_or_masked_out_is_the_same_gradient(tiny):
    """[PrefixRL objective] loss on own tokens only: on (q + prefix | own) as on (q | prefix + own) with the prefix masked out."""
    model, tokenizer = tiny
    args, problems = loaded(prefixrl, tokenizer, task="diary", num_hard=1, num_easy=0)
    plain, cut, *_ = prefixrl.add_prefixes(problems, tokenizer, args)
    prefix = len(cut["prefix_ids"])
    own, results = torch.tensor([cut["trace_ids"][prefix:]]), {}
    for name, prompt, completion in (("prompt", cut, own), ("mask", plain, torch.tensor([cut["trace_ids"]]))):
        mask = torch.ones_like(completion, dtype=torch.bool)
        logps, _ = score_completions(model, *left_pad([prompt["prompt_ids"]], 0, "cpu"), completion, mask)
        mask[:, : completion.shape[1] - own.shape[1]] = False
        batch = prefixrl.Batch(None, None, None, None, mask, torch.tensor([0.75]), logps.detach() - 0.05)
        loss, _ = prefixrl.policy_loss(logps, torch.zeros(1, 1), batch, args, own.shape[1], 1)
        results[name] = loss, torch.autograd.grad(loss, [logps, *model.parameters()])
    assert results["prompt"][0].item() == pytest.approx(results["mask"][0].item(), abs=1e-6)
    assert results["mask"][1][0][0, :prefix].tolist() == [0.0] * prefix
    for mine, wanted in zip(results["prompt"][1][1:], results["mask"][1][1:]):
        torch.testing.assert_close(mine, wanted, atol=1e-6, rtol=0)
    assert max(gradient.abs().max() for gradient in results["prompt"][1][1:]) > 1e-2


# ---------------------------------------------------------------- metrics


def graded(share, reward, has_prefixes=True):
    """A graded sample of a problem with a prefix of that share of its trace."""
    return common.Sample({"prefix_share": share, "has_prefixes": has_prefixes}, [1], [2], "", True, reward)


def test_metrics_by_hand():
    args = prefixrl.Args()
    samples = [graded(0.0, 1.0, False), graded(0.0, 0.0), graded(0.0, 1.0), graded(0.39, 0.0), graded(0.45, 1.0), graded(0.65, 0.0),
               graded(0.75, 1.0), graded(0.81, 1.0)]
    metrics = prefixrl.prefix_metrics(samples, args)
    assert metrics == pytest.approx({
        "reward/with_prefix": 3 / 5, "reward/without_prefix": 0.5, "reward/prefix_gap": 0.1, "reward/prefix_0.40_0.50": 0.5,
        "reward/prefix_0.60_0.70": 0.0, "reward/prefix_0.70_0.80": 1.0})
    assert prefixrl.prefix_metrics(samples[:1], args) == {}
    assert set(prefixrl.prefix_metrics(samples[3:4], args)) == {"reward/with_prefix", "reward/prefix_0.40_0.50"}


def test_metrics_of_a_single_length():
    """--prefix_min = --prefix_max: the rounded cuts lie on both sides of it and belong to one bin."""
    samples = [graded(0.59, 1.0), graded(0.6, 0.0), graded(0.61, 0.0)]
    metrics = prefixrl.prefix_metrics(samples, prefixrl.Args(prefix_min=0.6, prefix_max=0.6))
    assert metrics == pytest.approx({"reward/with_prefix": 1 / 3, "reward/prefix_0.60_0.60": 1 / 3})


# ---------------------------------------------------------------- flags


@pytest.mark.parametrize("flags, expected", [
    (["--prefix_min", "0"], "--prefix_min must be above 0, got 0.0"),
    (["--prefix_min", "0.9"], "--prefix_min must be at most --prefix_max (0.8), got 0.9"),
    (["--prefix_max", "1"], "--prefix_max must be below 1, got 1.0"),
    (["--prefixed_only", "--prefixes_per_trace", "0"], "no prompt is left: no trace has a prefix, and there are no plain prompts"),
    (["--prefixed_only", "--num_hard", "0", "--trace_style", "own"], "no prompt is left: no trace has a prefix"),
    (["--prefixes_per_trace", "-1"], "--prefixes_per_trace must be at least 0, got -1"),
    (["--plain_per_trace", "-1"], "--plain_per_trace must be at least 0, got -1"),
    (["--plain_per_trace", "0", "--prefixes_per_trace", "0", "--num_easy", "0", "--num_hard", "2"], "no prompt is left: "),
])
def test_flags_that_cannot_work_are_refused(refused, flags, expected):
    assert expected in refused(prefixrl, *flags)
