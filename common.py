"""What the scripts share of the field: prompts as tokens, samples and batches, rewards, data, evaluation. The machine is in engine/."""

import math
import re
from collections import Counter
from dataclasses import dataclass, replace
from itertools import islice
from statistics import mean

import torch

from engine import BadArgument, Rows, compute_logps, data, pad, ranks, tasks
from engine.errors import printable
from engine.grading import answer_key, gold_is_sound, grade_completions
from engine.math_verify import math_timeouts
from engine.models import eos_ids, seed_everything
from engine.prompts import after_tag, encode_prompt, opened_tag, render_prompt
from engine.sampling import generate, left_pad, right_pad
from engine.traces import encode_traces, shows_answer

# ---------------------------------------------------------------- tokens


def prompt_with_trace(tokenizer, problem, args, instruction=None):
    """Token ids of a prompt that quotes a problem and its trace: `instruction` holds {prompt} and {trace}. None: the built-in task's.

    A system message of the problem stays.
    """
    trace = re.sub(r"\A</\w+>\s+", "", problem["trace"])  # an end tag of thinking, whose start only the template writes
    if instruction is None:
        text = tasks.rephrase_prompt(problem["prompt"], trace)
    else:
        parts = instruction.split("{trace}")  # first: a problem about \operatorname{trace} must not get its solution (tests/test_repo.py)
        text = trace.join(part.replace("{prompt}", problem["prompt"]) for part in parts)
    system = [turn for turn in problem.get("prompt_messages", ()) if turn["role"] == "system"]
    messages = [*system, {"role": "user", "content": text}] if system else text
    return encode_prompt(tokenizer, render_prompt(tokenizer, messages, args.template, args.system_prompt))


def decode(tokenizer, ids, stop_ids):
    """Token ids of a completion -> (its text up to, not including, its EOS; False when it was cut off)."""
    ended = bool(ids) and ids[-1] in stop_ids
    return tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True), ended


# ---------------------------------------------------------------- samples


@dataclass
class Sample:
    """One completion of a problem."""

    problem: dict  # prompt, answer, difficulty, prompt_ids, columns and, where the script has --traces, trace and trace_ids
    prompt_ids: list  # the prompt that it was sampled from; training is always given problem["prompt_ids"]
    ids: list  # its tokens, EOS included
    text: str  # what is graded: its text without EOS, after the prefix of an answer if the prompt ends in one
    ended: bool  # False where it was cut off
    reward: float | None = None  # None: not graded
    behavior_logps: list | None = None  # of a trace, from its file
    source: str = "rollout"  # the stage that sampled it; "trace": nobody did


def sample(model, tokenizer, prompts, problems, args, flops=None, stage="rollout"):
    """Sample a completion of each prompt (token ids) for its problem; returns Samples without reward. `stage` of the ledger is charged."""
    if not prompts:
        return []
    prompt_ids, prompt_mask = left_pad(prompts, tokenizer.pad_token_id, model.device)  # (B, P) each
    stop_ids = eos_ids(model, tokenizer)
    completion_ids, mask = generate(  # (B, T) each
        model, prompt_ids, prompt_mask, stop_ids, tokenizer.pad_token_id, args.max_completion_length, args.temperature,
        getattr(args, "top_p", 1.0), args.generation_batch_size)
    if flops is not None:
        flops.add_sampled(stage, prompt_mask.sum(1) + mask.sum(1))
    ids = [row[row_mask].tolist() for row, row_mask in zip(completion_ids.cpu(), mask.cpu())]
    return [Sample(problem, prompt, own, *decode(tokenizer, problem.get("prefix_ids", []) + own, stop_ids), source=stage)
            for problem, prompt, own in zip(problems, prompts, ids)]


def trace_sample(problem, place=0):
    """An off-policy solution of a problem as a Sample without reward. `place` is that in its group: the problem's traces take turns."""
    traces = (problem, *problem.get("other_traces", ()))
    trace = traces[place % len(traces)]
    return Sample(problem, problem["prompt_ids"], trace["trace_ids"], trace["trace"], ended=True,
                  behavior_logps=trace["behavior_logps"], source="trace")


def rows_of_traces(problems):
    """A problem for each usable trace, which is its `trace`; problems without one are left out."""
    return [problem | trace for problem in problems if problem["trace"] is not None
            for trace in (problem, *problem.get("other_traces", ()))]


def cut_before(marker, samples, tokenizer):
    """The samples without their text up to the last `marker`. Only where text was cut are the trained ids not the sampled ones.

    Thinking that the prompt opens is closed again, where its end was cut.
    """
    cut = []
    for sample in samples:
        if marker in sample.text:
            text = after_tag(sample.text.rsplit(marker, 1)[1].strip(), opened_tag(tokenizer, sample.problem["prompt_ids"]))
            end = sample.ids[-1:] if sample.ended else []
            sample = replace(sample, text=text, ids=tokenizer(text, add_special_tokens=False)["input_ids"] + end)
        cut.append(sample)
    return cut


def grade(samples, args):
    """The samples with their rewards, by --reward or --reward_fn."""
    problems, texts, ended = ([getattr(sample, name) for sample in samples] for name in ("problem", "text", "ended"))
    ids = [sample.problem.get("prefix_ids", []) + sample.ids for sample in samples]
    rewards = grade_completions(texts, ended, problems, args.reward_fn or args.reward, args.grade_truncated, ids)
    return [replace(sample, reward=reward) for sample, reward in zip(samples, rewards)]


def rollout_metrics(samples, args):
    """TRL's metrics of the B samples of a rollout, the rows of one prompt adjacent."""
    rewards = torch.tensor([sample.reward for sample in samples])  # (B,)
    groups = rewards.view(-1, args.num_generations)  # (N, G)
    lengths = torch.tensor([len(sample.ids) for sample in samples]).float()  # (B,)
    metrics = {
        "reward": rewards.mean().item(), "reward_std": groups.std(dim=1, correction=0).mean().item(),
        "frac_reward_zero_std": (groups == groups[:, :1]).all(dim=1).float().mean().item(),
        "completions/mean_length": lengths.mean().item(), "completions/min_length": lengths.min().item(),
        "completions/max_length": lengths.max().item(),
        "completions/clipped_ratio": 1 - sum(sample.ended for sample in samples) / len(samples),
    }
    for difficulty in sorted({sample.problem["difficulty"] for sample in samples}):
        picked = torch.tensor([sample.problem["difficulty"] == difficulty for sample in samples])
        metrics[f"reward/{difficulty}"] = rewards[picked].mean().item()
    by_math_verify = args.reward == "math" and not args.reward_fn
    return metrics | ({"reward/timeouts": sum(ranks.all_gather_list([math_timeouts()]))} if by_math_verify else {})


def retelling_metrics(retellings, failed, num_groups, args):
    """How retellings of traces (a Sample or None for each failed group) turn out, and compare with the trace and with their group."""
    pairs = [(retelling, group) for retelling, group in zip(retellings, failed) if retelling is not None]
    metrics = {"asked": len(pairs) / num_groups, "too_long": (len(failed) - len(pairs)) / num_groups}
    if pairs:
        metrics["success"] = mean([retelling.reward >= args.reward_threshold for retelling, _ in pairs])
        metrics["overlap"] = mean(ngram_overlap(retelling.text, retelling.problem["trace"]) for retelling, _ in pairs)
        metrics["length_ratio"] = mean(len(retelling.ids) / mean(len(sample.ids) for sample in group) for retelling, group in pairs)
    return {f"rephrase/{name}": value for name, value in metrics.items()}


def reward_by_source(samples, args):
    """Mean reward of the policy's own rows, and share of the groups that only a trace solves."""
    rewards = torch.tensor([sample.reward for sample in samples])  # (B,) float32
    traces = torch.tensor([sample.source == "trace" for sample in samples])  # (B,) bool
    by_trace, by_policy = (((rewards >= 1) & rows).view(-1, args.num_generations).any(dim=1) for rows in (traces, ~traces))  # (N,) each
    alone = (by_trace & ~by_policy).float().mean().item()
    return {"onpolicy/reward": rewards[~traces].mean().item(), "offpolicy/solved_by_teacher_only": alone}


def ngram_overlap(text, other, n=3):
    """Share of the n-grams of words of `text` that stand in `other`, too; 0 for a text of fewer than n words."""
    grams, known = ({tuple(words[i : i + n]) for i in range(len(words) - n + 1)} for words in (text.split(), other.split()))
    return len(grams & known) / max(1, len(grams))


def logps_as_sampled(model, tokenizer, batch, samples, rows, args, flops):
    """Log-probs (B, T) float32 of the `rows` (B,) bool of a batch after the prompts of their Samples, as P(q, k); 0 elsewhere."""
    logps, some = torch.zeros_like(batch.completion_mask, dtype=torch.float32), [s for s, row in zip(samples, rows.tolist()) if row]
    if some:
        padded = pad([sample.prompt_ids for sample in some], [sample.ids for sample in some], tokenizer, model.device)
        scored = compute_logps(model, Rows(*padded), args, flops)
        logps[rows, : scored.shape[1]] = scored
    return logps


def behavior_logps(batch, samples):
    """Log-probs (B, T) float32 of the teacher's rows under the teacher, from the trace file; 0 elsewhere."""
    rows = [torch.tensor([sample.behavior_logps if sample.source == "trace" else []]) for sample in samples]
    return right_pad([*rows, torch.zeros(1, batch.completion_ids.shape[1])], 0.0)[:-1].to(batch.completion_ids.device)


# ---------------------------------------------------------------- data


def load_problems(args, tokenizer):
    """Training and evaluation problems of the built-in --task, or of --dataset_name and --eval_dataset_name.

    Each is a dict with prompt (str), answer, difficulty, prompt_ids and columns. The training problems of a script with --traces also
    have the off-policy solution (see `encode_traces`); evaluation problems never do.
    """
    evaluation = []
    if args.dataset_name is None:
        train = tasks.load_task(args.task, "train", {"hard": args.num_hard, "easy": args.num_easy})
        if args.eval_steps:
            evaluation = tasks.load_task(args.task, "eval", dict.fromkeys(tasks.DIFFICULTIES, args.eval_problems))
    else:
        train = data.read_problems(
            args.dataset_name, args.dataset_split, "--dataset_name", args, args.dataset_config,
            traces=getattr(args, "traces", "") is None, gold=hasattr(args, "num_generations"))  # sft.py can do without
        if args.eval_steps and args.eval_dataset_name is not None:
            evaluation = data.read_problems(args.eval_dataset_name, args.eval_dataset_split, "--eval_dataset_name", args,
                                            args.eval_dataset_config)[: args.eval_problems]
    train = encode_problems(train, tokenizer, args)
    if evaluation:
        names = ("prompt", "answer", "difficulty", "prompt_ids", "columns")
        encoded = encode_problems(evaluation, tokenizer, args, "--eval_dataset_name")
        evaluation = [{name: problem[name] for name in names} for problem in encoded]
    return encode_traces(train, tokenizer, args) if hasattr(args, "traces") else train, evaluation


def encode_problems(problems, tokenizer, args, flag="--dataset_name"):
    """Add to each problem `prompt_ids`, and `columns`, the row as it stands in the data, for --reward_fn.

    Prompts that are over-long or have no token, and gold answers that do not grade right, are dropped, with a printed count; --reward_fn
    does as it likes with gold.
    """
    kept, too_long, empty, bad_gold, own = [], 0, 0, [], ranks.own_slice(len(problems))
    sound = ranks.all_gather_list([bool(args.reward_fn) or problem["answer"] is None or gold_is_sound(problem["answer"], args.reward)
                                   for problem in problems[own]])
    for problem, gold_sound in zip(problems, sound):
        prompt = problem.get("prompt_messages", problem["prompt"])
        text = render_prompt(tokenizer, prompt, args.template, args.system_prompt)
        ids = encode_prompt(tokenizer, text) if len(text) <= 1000 * args.max_prompt_length else None  # no token is so long
        if ids is None or len(ids) > args.max_prompt_length:
            too_long += 1
        elif not ids:  # of words that the tokenizer does not know, and leaves out
            empty += 1
        elif not gold_sound:
            bad_gold.append(problem["answer"])
        else:
            columns = {name: problem[name] for name in ("answer", "difficulty") if name in problem}  # of the built-in task
            kept.append({"columns": columns} | problem | {"prompt_ids": ids})
    if too_long:
        print(f"{flag}: dropped {too_long} of {len(problems)} prompts longer than --max_prompt_length {args.max_prompt_length}")
    if empty:
        print(f"{flag}: dropped {empty} of {len(problems)} prompts in which the tokenizer finds no token")
    if bad_gold:
        print(f"{flag}: dropped {len(bad_gold)} of {len(problems)} rows whose gold answer does not grade right as --reward {args.reward}, "
              f"e.g. {printable(bad_gold[0])!r}")
    if not kept:
        raise BadArgument(f"{flag}: no prompt is left of {len(problems)}")
    ids = [index for problem in kept for index in problem["prompt_ids"]]
    unknown = ids.count(tokenizer.unk_token_id) / max(len(ids), 1)
    if unknown > 0.01:
        words = f"{flag}: {unknown:.0%} of the tokens of its prompts are {tokenizer.unk_token}, words unknown to {args.model_name_or_path}"
        if unknown > 0.75:
            raise BadArgument(f"{words}: give another --model")
        print(words)
    return kept


def usable_prefixes(problems, args):
    """The problems with a prefix of an answer that fit into --max_prompt_length and whose `prefix` neither shows its answer nor is one."""
    rewards = [0.0] * len(problems)
    if args.reward_fn:
        rewards = grade_completions([problem["prefix"] for problem in problems], [True] * len(problems), problems, args.reward_fn,
                                    ids=[problem["prefix_ids"] for problem in problems])
    shown = [reward >= 1 or shows_answer(problem["prefix"], problem["answer"]) for problem, reward in zip(problems, rewards)]
    long = [len(problem["prompt_ids"]) > args.max_prompt_length for problem in problems]
    if any(shown) or any(long):
        print(f"prefixes: dropped {sum(shown)} of {len(problems)} that show the answer and {sum(long) - sum(map(min, shown, long))} whose "
              f"prompt is longer than --max_prompt_length {args.max_prompt_length}")
    return [problem for problem, *faults in zip(problems, shown, long) if not any(faults)]


def require_behavior_logps(problems, flag):
    """Raise BadArgument when a problem has a trace without log-probs."""
    if any(trace["behavior_logps"] is None for trace in rows_of_traces(problems)):
        raise BadArgument(f"{flag} needs traces with log-probs (logps) of this tokenizer's ids: see --traces")


# ---------------------------------------------------------------- evaluation


def pass_at_k(num_samples, num_right, k):
    """Unbiased estimate of the chance that one of k samples is right, from num_right of num_samples. [Codex, arXiv 2107.03374 eq 1]"""
    if k > num_samples:
        raise ValueError(f"pass@{k} needs at least {k} samples, got {num_samples}")
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def majority_vote(answers, rewards):
    """Chance that a majority vote over k samples is right: the mean reward of the samples that gave the most frequent answer.

    answers, rewards: lists of length k; equal answers are equal strings, and None does not vote. A tie is drawn by lot, here in
    expectation, so the order of the samples does not matter. 0.0 when nobody votes.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    most = max(votes.values(), default=None)
    winning = [reward for answer, reward in zip(answers, rewards) if votes[answer] == most]
    return sum(winning) / len(winning) if winning else 0.0


def mean_and_error(values):
    """Mean and its standard error over problems (sample std / sqrt(n); None for a single problem)."""
    average = sum(values) / len(values)
    if len(values) < 2:
        return average, None
    return average, math.sqrt(sum((value - average) ** 2 for value in values) / (len(values) - 1) / len(values))


def sample_groups(model, tokenizer, problems, num, args, flops=None, stage="rollout"):
    """Yield (place in `problems`, a graded Sample), `num` of each problem, shortest prompts first. All of a problem are graded at once."""
    order = sorted(range(len(problems)), key=lambda place: len(problems[place]["prompt_ids"]))
    work, rows_per_call, waiting = [place for place in order for _ in range(num)], args.generation_batch_size * ranks.world_size(), []
    places = iter(work)
    for start in range(0, len(work), rows_per_call):
        asked = [problems[place] for place in work[start : start + rows_per_call]]
        waiting += sample(model, tokenizer, [problem["prompt_ids"] for problem in asked], asked, args, flops, stage)
        num_whole = len(waiting) // num * num  # a call of generate may end within a group, which a reward compares
        yield from zip(islice(places, num_whole), grade(waiting[:num_whole], args))
        del waiting[:num_whole]


def evaluate(model, tokenizer, problems, args, bar=None):
    """Sample --num_generations_eval completions of every problem and grade them; returns one dict per problem.

    problems come from `encode_problems`. Each result has prompt, answer, difficulty, and lists of a value per completion: completions,
    ended, rewards and, without --reward_fn, answers: the `answer_key`, or None for a completion that was cut off and not graded. The
    same seed gives the same random numbers at every call. bar: a tqdm that counts the samples.
    """
    seed_everything(args.seed, 0, "eval")
    results = [{"prompt": problem["prompt"], "answer": problem["answer"], "difficulty": problem["difficulty"],
                "completions": [], "ended": [], "rewards": []} | ({} if args.reward_fn else {"answers": []}) for problem in problems]
    for i, graded in sample_groups(model, tokenizer, problems, args.num_generations_eval, args):
        results[i]["completions"].append(graded.text)
        results[i]["ended"].append(graded.ended)
        results[i]["rewards"].append(graded.reward)
        if not args.reward_fn:
            results[i]["answers"].append(answer_key(graded.text, args.reward) if graded.ended or args.grade_truncated else None)
        if bar is not None:
            bar.update()
    return results


def problem_metrics(result, ks=(1,), builtin=False):
    """The metrics of one problem, whose means over problems are those of `summarize`: {metric: value}.

    maj@k exists for k > 1, where the result has answers: not with --reward_fn, which has no rule for equal answers.
    """
    k, rewards, texts = len(result["rewards"]), result["rewards"], result["completions"]
    metrics = {f"avg@{k}": sum(rewards) / k}
    metrics |= {f"pass@{j}": pass_at_k(k, sum(reward >= 1 for reward in rewards), j) for j in ks}
    if k > 1 and "answers" in result:
        metrics[f"maj@{k}"] = majority_vote(result["answers"], rewards)
    metrics["ended"] = sum(result["ended"]) / k
    if builtin:
        metrics["steps_right"] = sum(tasks.steps_are_right(result["prompt"], text) for text in texts) / k
        metrics["foreign"] = sum(map(tasks.uses_foreign_words, texts)) / k
    return metrics


def summarize(results, ks=(1,), builtin=False):
    """Per difficulty, and for "all" of a data set with several: avg@k, unbiased pass@j for j in `ks` and maj@k, with standard errors.

    builtin adds two metrics of the built-in tasks: `steps_right` (every step is right, not only the answer) and `foreign` (words that
    only the teacher uses occur). Returns {difficulty: {metric: value}}.
    """
    summary, difficulties = {}, sorted({result["difficulty"] for result in results})
    for difficulty in difficulties + ["all"] * (len(difficulties) > 1 and not builtin):
        group = [problem_metrics(result, ks, builtin) for result in results if difficulty in ("all", result["difficulty"])]
        summary[difficulty] = {"problems": len(group)}
        for metric in group[0]:
            average, error = mean_and_error([metrics[metric] for metrics in group])
            summary[difficulty] |= {metric: average, f"{metric}_se": error}
    return summary


def evaluation_metrics(model, tokenizer, problems, args):
    """Evaluate during training: {"eval/<difficulty>/<metric>": value}, with the same random numbers at every step."""
    ks = sorted({1, args.num_generations_eval})
    summary = summarize(evaluate(model, tokenizer, problems, args), ks, builtin=args.dataset_name is None)
    return {f"eval/{difficulty}/{metric}": value for difficulty, group in summary.items() for metric, value in group.items()}
