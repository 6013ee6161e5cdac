"""Does PrefixRL cut traces into prompts, and train only what the policy adds to them?"""

import json
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
    assert lengths == list(range(1, shown))  # a trace has one cut of a length
    assert halved == 1 + 2 + 2 + 2 + 2 + 3  # cuts inside λ ≥ ⇒ 日 本 🙂


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
        assert 0.4 * full - 0.5 <= length <= 0.8 * full
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
    assert [problem["has_cut"] for problem in made] == [True, False, True, True, True, True, False, False] + [True] * 15
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
    assert f"prefixes: dropped {40 - len(kept)} of 40 that show the answer and 0 whose prompt is longer" in out
    assert f"prefixes: {len(kept)} prefixed prompts and 8 plain ones\n" in out
    box = tiny[1].convert_tokens_to_ids("\\boxed{")
    assert all(box not in problem["prompt_ids"] for problem in kept)
    assert any(len(problem["prefix_ids"]) == problem["trace_ids"].index(box) for problem in kept)  # all that comes before it may be shown
    args.prefix_min, args.prefixes_per_trace = 0.92, 1  # some problems lose their only prefix
    made = prefixrl.add_prefixes(problems, tiny[1], args)
    cut = {problem["prompt"] for problem in made if problem["prefix_ids"]}
    assert 0 < len(cut) < 8 and [problem["has_cut"] for problem in made[:8]] == [problem["prompt"] in cut for problem in problems]
    args.prefix_min = args.prefix_max = 0.97
    args.prefixed_only = True
    with pytest.raises(BadArgument, match="no prompt is left: no trace has a prefix"):
        prefixrl.add_prefixes(problems, tiny[1], args)


def cut(tokenizer, trace, answer="7", difficulty="all", problem=None, **flags):
    """The prefixed problems of one problem of a data set of the user's."""
    args = prefixrl.Args(**{"dataset_name": "mine.jsonl", "prefixed_only": True, "prefixes_per_trace": 99} | flags)
    if args.traces is None:
        problem = {"prompt": "Q", "answer": answer, "difficulty": difficulty, "trace": trace} | (problem or {})
    (problem,) = common.encode_traces(common.encode_problems([problem], tokenizer, args), tokenizer, args)
    return prefixrl.add_prefixes([problem], tokenizer, args)


@pytest.mark.parametrize("length", range(1, 30))
def test_cuts_differ_and_keep_to_the_longest_share(byte_tokenizer, length):
    """Also of short traces, whose rounded cuts would be longer than --prefix_max, or all of the trace."""
    args = prefixrl.Args(dataset_name="mine.jsonl", prefixed_only=True)
    problem = {"prompt": "Q", "answer": "7", "difficulty": "all", "prompt_ids": [256, 4], "trace": "x", "columns": {},
               "trace_ids": [*range(length), 257], "behavior_logps": None, "other_traces": []}
    if length == 1:  # its only prefix is all of it
        with pytest.raises(BadArgument, match="no prompt is left: no trace has a prefix"):
            prefixrl.add_prefixes([problem], byte_tokenizer, args)
        return
    made = [len(row["prefix_ids"]) for row in prefixrl.add_prefixes([problem], byte_tokenizer, args)]
    possible = [num for num in range(1, length) if round(0.4 * length) <= num <= 0.8 * length]
    assert len(set(made)) == len(made) == min(3, len(possible)) and set(made) <= set(possible)
    args.prefix_min = args.prefix_max = 0.6  # the longest that is no longer than this share
    assert [len(row["prefix_ids"]) for row in prefixrl.add_prefixes([problem], byte_tokenizer, args)] == [int(0.6 * length)]


@pytest.mark.parametrize("trace, shown", [
    ("we add. #### 7 and so we see that it is \\boxed{7}", "#### 7"), ("The final answer is 7. So we write it: \\boxed{7}", "answer is 7"),
    ("Answer: **7** which in the box is \\boxed{7}", "Answer: **7"), ("<answer> 7 </answer> that is \\boxed{7}", "<answer> 7"),
    ("one \\boxed{7} and once more \\boxed{7}", "\\boxed"), ("one \\fbox{7} and once more \\boxed{7}", "\\fbox")])
def test_a_prefix_that_shows_the_answer_is_dropped_however_it_is_marked(byte_tokenizer, trace, shown):
    made = [row["prefix"] for row in cut(byte_tokenizer, trace, prefix_min=0.01, prefix_max=0.99)]
    assert made and not any(shown in prefix for prefix in made)
    assert len(made) >= trace.index(shown)  # all before it may be shown


def test_another_number_after_the_mark_is_no_answer(byte_tokenizer):
    made = [row["prefix"] for row in cut(byte_tokenizer, "The answer is not 5. 3 + 4 is what we need: \\boxed{7}", prefix_max=0.7)]
    assert any("answer is not 5. 3 + 4" in prefix for prefix in made)


@pytest.fixture
def rewarded(tmp_path):
    """Path of a function that rewards a 7 with 1, in whatever it is given."""
    (tmp_path / "r.py").write_text("def seven(completions, completion_ids, **columns):\n"
                                   "    return [float('7' in text and len(ids) > 5) for text, ids in zip(completions, completion_ids)]\n")
    return f"{tmp_path}/r.py:seven"


def test_a_prefix_that_earns_the_reward_itself_is_dropped(byte_tokenizer, rewarded, capsys):
    made = [row["prefix"] for row in cut(byte_tokenizer, "it is 7 and that is all we need to say", reward_fn=rewarded, prefix_min=0.01)]
    assert sorted(made, key=len) == ["it is "[:num] for num in range(1, 7)]
    assert "that show the answer" in capsys.readouterr().out


def test_a_prefixed_prompt_that_is_too_long_is_dropped_with_a_count(byte_tokenizer, capsys):
    """BOS, Q and at most ten tokens of a prefix."""
    made = cut(byte_tokenizer, "x" * 20 + "\\boxed{7}", max_prompt_length=12, prefix_min=0.01)
    assert sorted(len(row["prompt_ids"]) for row in made) == list(range(3, 13))
    assert "13 whose prompt is longer than --max_prompt_length 12" in capsys.readouterr().out


@pytest.mark.parametrize("difficulty", ["easy", "hard", "all"])
def test_only_easy_problems_of_the_built_in_task_stay_plain(byte_tokenizer, difficulty):
    assert cut(byte_tokenizer, "so it is \\boxed{7}", difficulty=difficulty)


def test_every_usable_trace_of_a_problem_is_cut_three_to_one(byte_tokenizer, tmp_path):
    traces = ["so we add and it is \\boxed{7}", "then we take away: \\boxed{7}"]
    (tmp_path / "t.jsonl").write_text("".join(f'{{"prompt": "Q", "trace": {json.dumps(trace)}}}\n' for trace in traces))
    made = cut(byte_tokenizer, None, problem={"prompt": "Q", "answer": "7", "difficulty": "all"}, traces=str(tmp_path / "t.jsonl"),
               prefixes_per_trace=3, prefixed_only=False, prefix_max=0.6)
    assert [row["prefix"] == "" if "prefix" in row else None for row in made] == [None] * 2 + [False] * 6
    assert [sum(trace.startswith(row.get("prefix", "-")) for row in made) for trace in traces] == [3, 3]


# ---------------------------------------------------------------- rows and tokens


@pytest.mark.parametrize("rule", ["boxed", "own"])
def test_prefix_and_continuation_are_graded_as_one_answer(tiny, byte_tokenizer, sampler, rewarded, rule):
    r"""A cut inside \\boxed: the continuation of the trace is right. The user's function sees text and tokens of both."""
    flags = {"reward_fn": rewarded} if rule == "own" else {}
    args = prefixrl.Args(dataset_name="mine.jsonl", num_generations=2, prompts_per_step=1, **flags)
    trace, stored = "so \\boxed{7}", with_eos(byte_tokenizer, "so \\boxed{7}")
    problem = {"prompt": "Q", "answer": "7", "difficulty": "all", "columns": {}, "prompt_ids": [256, 10] + stored[:8], "trace": trace,
               "prefix_ids": stored[:8], "prefix_share": 0.5, "has_cut": True}
    sampler([stored[8:], with_eos(byte_tokenizer, "x")])
    _, samples, metrics = prefixrl.rollout(tiny[0], None, byte_tokenizer, [problem], args, Flops.of(tiny[0]))
    assert [sample.text for sample in samples] == [trace, "so \\boxex"] and [sample.reward for sample in samples] == [1.0, 0.0]
    assert [sample.ids for sample in samples] == [stored[8:], with_eos(byte_tokenizer, "x")]  # what is trained


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
    assert [sample.text.removeprefix(sample.problem.get("prefix", "")).strip() for sample in samples] == texts
    assert completions_of(batch) == [with_eos(tiny[1], text) for text in texts]
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


def graded(share, reward, has_cut=True):
    """A graded sample of a problem with a prefix of that share of its trace."""
    return common.Sample({"prefix_share": share, "has_cut": has_cut}, [1], [2], "", True, reward)


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
