"""What the scripts share of the field: prompts as tokens, samples and batches, rewards, data, evaluation. The machine is in engine/."""

import math
from collections import Counter
from dataclasses import dataclass, replace
from statistics import mean

import torch
from jinja2 import TemplateError

from engine import BadArgument, Rows, compute_logps, data, ranks, tasks
from engine.errors import printable
from engine.grading import answer_key, gold_is_sound, grade_completions
from engine.math_verify import math_timeouts
from engine.models import eos_ids, seed_everything
from engine.sampling import generate, left_pad, right_pad

# ---------------------------------------------------------------- tokens


INSTRUCTIONS = dict(  # system message of the templates that bring one
    r1="This is a conversation between User and Assistant. User asks a question and Assistant solves it. Assistant thinks first, between "
       "<think> and </think>, and then gives User the answer between <answer> and </answer>, with the final result in \\boxed{}.",
    qwen_math="Please reason step by step, and put your final answer within \\boxed{}.")


def render_prompt(tokenizer, prompt, template="auto", system_prompt=None):
    """The text of a prompt that the model reads.

    prompt: a string, or messages [{"role", "content"}, ...] that end with the user's. A system message of their own stays. Otherwise
    they get `system_prompt`, or the template's instruction. Templates: "chat" is the tokenizer's own. "none" joins the contents by
    newlines. "auto" is chat if there is one, else none. "r1" is the text for base models of DeepSeek-R1-Zero [arXiv 2501.12948
    table 1]; the completion begins inside <think>. "qwen_math" is the chat layout of Qwen2.5-Math, for tokenizers that lack it.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if template == "auto":
        template = "chat" if tokenizer.chat_template else "none"
    system_prompt = system_prompt or INSTRUCTIONS.get(template)
    if system_prompt and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system_prompt}, *messages]
    if template == "r1":
        speakers = {"system": "", "user": "User: ", "assistant": "Assistant: "}
        return "\n".join([speakers[turn["role"]] + turn["content"] for turn in messages] + ["Assistant: <think>"])
    if template == "qwen_math":
        return "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in messages) + "<|im_start|>assistant\n"
    if template == "none":
        return "\n".join(turn["content"] for turn in messages)
    if not tokenizer.chat_template:
        raise BadArgument("--template chat: the tokenizer has no chat template; use --template none")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:  # Gemma's, say, knows no system message
        roles = ", ".join(turn["role"] for turn in messages)
        raise BadArgument(f"the chat template refuses messages of {roles}: {error}; use another --template") from error


def encode_prompt(tokenizer, text):
    """Rendered prompt -> token ids, BOS exactly once where the tokenizer adds one (templates may have written it already)."""
    ids, bos = tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.bos_token_id
    if bos is not None and ids[:1] != [bos] and tokenizer("a")["input_ids"][:1] == [bos]:
        ids = [bos] + ids
    return ids


def prompt_with_trace(tokenizer, problem, args, instruction=None):
    """Token ids of a prompt that quotes a problem and its trace: `instruction` holds {prompt} and {trace}. None: the built-in task's."""
    text = tasks.rephrase_prompt(problem["prompt"], problem["trace"])
    if instruction is not None:
        parts = instruction.split("{trace}")  # first: a problem about \operatorname{trace} must not get its solution (tests/test_repo.py)
        text = problem["trace"].join(part.replace("{prompt}", problem["prompt"]) for part in parts)
    return encode_prompt(tokenizer, render_prompt(tokenizer, text, args.template, args.system_prompt))


def decode(tokenizer, ids, stop_ids):
    """Token ids of a completion -> (its text up to, not including, its EOS; False when it was cut off)."""
    ended = bool(ids) and ids[-1] in stop_ids
    return tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True), ended


def pad(prompts, completions, tokenizer, device):
    """B prompts and B completions (lists of ids) -> prompt_ids, prompt_mask (B, P) and completion_ids, completion_mask (B, T)."""
    lengths = torch.tensor([len(ids) for ids in completions], device=device)  # (B,)
    completion_ids = right_pad([torch.tensor([ids], device=device) for ids in completions], tokenizer.pad_token_id)  # (B, T)
    mask = torch.arange(completion_ids.shape[1], device=device) < lengths.unsqueeze(1)  # (B, T) bool, by position
    return *left_pad(prompts, tokenizer.pad_token_id, device), completion_ids, mask


# ---------------------------------------------------------------- samples


@dataclass
class Sample:
    """One completion of a problem."""

    problem: dict  # prompt, answer, difficulty, prompt_ids, columns and, where the script has --traces, trace and trace_ids
    prompt_ids: list  # the prompt that it was sampled from; training is always given problem["prompt_ids"]
    ids: list  # its tokens, EOS included
    text: str  # what is graded: its text without EOS
    ended: bool  # False where it was cut off
    reward: float | None = None  # None: not graded


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
    ids = [row[row_mask].tolist() for row, row_mask in zip(completion_ids, mask)]
    return [Sample(problem, prompt, own, *decode(tokenizer, own, stop_ids)) for problem, prompt, own in zip(problems, prompts, ids)]


def trace_sample(problem):
    """The off-policy solution of a problem as a Sample without reward."""
    return Sample(problem, problem["prompt_ids"], problem["trace_ids"], problem["trace"], True)


def cut_before(marker, samples, tokenizer):
    """The samples without their text up to the last `marker`. Only where text was cut are the trained ids not the sampled ones."""
    cut = []
    for sample in samples:
        if marker in sample.text:
            text = sample.text.rsplit(marker, 1)[1].strip()
            end = sample.ids[-1:] if sample.ended else []
            sample = replace(sample, text=text, ids=tokenizer(text, add_special_tokens=False)["input_ids"] + end)
        cut.append(sample)
    return cut


def grade(samples, args):
    """The samples with their rewards, by --reward or --reward_fn."""
    problems, texts, ended, ids = ([getattr(sample, name) for sample in samples] for name in ("problem", "text", "ended", "ids"))
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
    timeouts = args.reward == "math" and not args.reward_fn
    return metrics | ({"reward/timeouts": sum(ranks.all_gather_list([math_timeouts()]))} if timeouts else {})


def retelling_metrics(retellings, failed, num_groups, args):
    """How retellings of traces (a Sample or None for each failed group) turn out, and compare with the trace and with their group."""
    pairs = [(told, group) for told, group in zip(retellings, failed) if told is not None]
    metrics = {"asked": len(pairs) / num_groups, "too_long": (len(failed) - len(pairs)) / num_groups}
    if pairs:
        right = [told.reward >= args.reward_threshold for told, _ in pairs]
        metrics["success"] = mean(right)
        metrics["overlap"] = mean(ngram_overlap(told.text, told.problem["trace"]) for told, _ in pairs)
        metrics["length_ratio"] = mean(len(told.ids) / mean(len(sample.ids) for sample in group) for told, group in pairs)
    return {f"rephrase/{name}": value for name, value in metrics.items()}


def reward_by_source(samples, taught, args):
    """Mean reward of the policy's own rows, and share of the groups that only the teacher's rows (taught: B bools) solve."""
    rewards, taught = torch.tensor([sample.reward for sample in samples]), torch.tensor(taught)  # (B,) float32, (B,) bool
    by_teacher, by_policy = (((rewards == 1) & rows).view(-1, args.num_generations).any(dim=1) for rows in (taught, ~taught))  # (N,) each
    alone = (by_teacher & ~by_policy).float().mean().item()
    return {"onpolicy/reward": rewards[~taught].mean().item(), "offpolicy/solved_by_teacher_only": alone}


def ngram_overlap(text, other, n=3):
    """Share of the n-grams of words of `text` that stand in `other`, too; 0 for a text of fewer than n words."""
    grams, known = ({tuple(words[i : i + n]) for i in range(len(words) - n + 1)} for words in (text.split(), other.split()))
    return len(grams & known) / max(1, len(grams))


def logps_as_sampled(model, tokenizer, batch, samples, rows, args, flops):
    """Log-probs (B, T) float32 of the `rows` (B,) bool of a batch, given the prompts that they were sampled from; 0 elsewhere."""
    logps, some = torch.zeros_like(batch.completion_mask, dtype=torch.float32), [s for s, row in zip(samples, rows.tolist()) if row]
    if some:
        padded = pad([sample.prompt_ids for sample in some], [sample.ids for sample in some], tokenizer, model.device)
        logps[rows, : padded[2].shape[1]] = compute_logps(model, Rows(*padded), args, flops)
    return logps


def behavior_logps(batch, samples, taught):
    """Log-probs (B, T) float32 of the taught rows under the teacher, from the trace file; 0 elsewhere."""
    rows = [torch.tensor([sample.problem["behavior_logps"] if off else []]) for sample, off in zip(samples, taught)]
    return right_pad([*rows, torch.zeros(1, batch.completion_ids.shape[1])], 0.0)[:-1].to(batch.completion_ids.device)


# ---------------------------------------------------------------- data


def load_problems(args, tokenizer):
    """Training and evaluation problems of the built-in --task, or of --dataset_name and --eval_dataset_name.

    Each is a dict with prompt (str), answer, difficulty, prompt_ids and columns. The training problems of a script with --traces also
    have the off-policy solution (see `encode_traces`); evaluation problems never do.
    """
    evaluation = []
    if args.dataset_name is None:
        train = list(tasks.load_task(args.task, "train", {"hard": args.num_hard, "easy": args.num_easy}))
        if args.eval_steps:
            evaluation = list(tasks.load_task(args.task, "eval", dict.fromkeys(tasks.DIFFICULTIES, args.eval_problems)))
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

    Over-long prompts and gold answers that do not grade right are dropped, with a printed count; --reward_fn does as it likes with gold.
    """
    kept, too_long, bad_gold, own = [], 0, [], ranks.own_slice(len(problems))
    sound = ranks.all_gather_list([bool(args.reward_fn) or problem["answer"] is None or gold_is_sound(problem["answer"], args.reward)
                                   for problem in problems[own]])
    for problem, gold_sound in zip(problems, sound):
        prompt = problem.get("prompt_messages", problem["prompt"])
        ids = encode_prompt(tokenizer, render_prompt(tokenizer, prompt, args.template, args.system_prompt))
        if len(ids) > args.max_prompt_length:
            too_long += 1
        elif not gold_sound:
            bad_gold.append(problem["answer"])
        else:
            columns = {name: problem[name] for name in ("answer", "difficulty") if name in problem}  # of the built-in task
            kept.append({"columns": columns} | problem | {"prompt_ids": ids})
    if too_long:
        print(f"{flag}: dropped {too_long} of {len(problems)} prompts longer than --max_prompt_length {args.max_prompt_length}")
    if bad_gold:
        print(f"{flag}: dropped {len(bad_gold)} of {len(problems)} rows whose gold answer does not grade right as --reward {args.reward}, "
              f"e.g. {printable(bad_gold[0])!r}")
    if not kept:
        raise BadArgument(f"{flag}: no prompt is left of {len(problems)}")
    return kept


def encode_traces(problems, tokenizer, args):
    """Add to each problem its off-policy solution: `trace` (str), `trace_ids` (with EOS) and `behavior_logps` of these ids, or None each.

    `data.find_traces` says where traces come from. Token ids are taken from the file when this tokenizer reads them as the trace's
    text; otherwise the text is tokenised once. A trace that does not grade right, unless --keep_wrong_traces, or is longer than
    --max_completion_length is dropped with a printed count. Problems without a trace stay: what to do with them is the method's.
    Raises BadArgument when no trace is left.
    """
    traced, wrong, too_long, retokenised, eos = [], 0, 0, 0, tokenizer.eos_token_id
    records, source = data.find_traces(problems, args)
    texts = [record.get("trace") for record in records]
    tokens = [text and tokenizer(text, add_special_tokens=False)["input_ids"] + [eos] for text in texts] if args.reward_fn else None
    rewards, graded = [1.0] * len(texts), bool(args.reward_fn) or problems[0]["answer"] is not None
    if graded:
        rewards = grade_completions(texts, [True] * len(texts), problems, args.reward_fn or args.reward, ids=tokens)
    for problem, record, reward in zip(problems, records, rewards):
        trace, ids, logps = record.get("trace"), record.get("trace_ids"), record.get("logps")
        if trace is not None and reward != 1.0 and not args.keep_wrong_traces:
            wrong, trace = wrong + 1, None
        if trace is not None and not (ids and eos not in ids[:-1] and ids[-1] == eos
                                      and tokenizer.decode(ids[:-1], skip_special_tokens=True) == trace):
            retokenised += ids is not None
            ids, logps = tokenizer(trace, add_special_tokens=False)["input_ids"] + [eos], None
            if eos in ids[:-1]:  # its text writes an end in the middle: what is graded is not what would be trained
                wrong, trace = wrong + 1, None
        if trace is not None and len(ids) > args.max_completion_length:
            too_long, trace = too_long + 1, None
        known = trace is not None
        logps = logps if known and logps and len(logps) == len(ids) else None
        traced.append(problem | {"trace": trace, "trace_ids": ids if known else None, "behavior_logps": logps})
    if not any(problem["trace"] is not None for problem in traced):
        wanted = f"; needs a column {' or '.join(data.TRACE_COLUMNS)}, or give --traces" if not any(records) else ""
        raise BadArgument(f"no trace is left of {source}: {wrong} do not grade right, {too_long} exceed --max_completion_length{wanted}")
    print(f"traces: {sum(problem['trace'] is not None for problem in traced)} of {len(problems)} problems have one ({source})"
          + ("" if graded else "; they are not graded, for want of an answer column"))
    if wrong or too_long or retokenised:
        print(f"traces: dropped {wrong} that do not grade right and {too_long} longer than --max_completion_length "
              f"{args.max_completion_length}; tokenised {retokenised} anew")
    return traced


def require_behavior_logps(problems, flag):
    """Raise BadArgument when a problem has a trace without log-probs."""
    if any(problem["trace_ids"] is not None and problem["behavior_logps"] is None for problem in problems):
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
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def evaluate(model, tokenizer, problems, args, bar=None):
    """Sample --num_generations_eval completions of every problem and grade them; returns one dict per problem.

    problems come from `encode_problems`. Each result has prompt, answer, difficulty, and lists of a value per completion: completions,
    ended, rewards and, without --reward_fn, answers: the `answer_key`, or None for a completion that was cut off and not graded. The
    same seed gives the same random numbers at every call. bar: a tqdm that counts the samples.
    """
    seed_everything(args.seed, 0, "eval")
    order = sorted(range(len(problems)), key=lambda index: len(problems[index]["prompt_ids"]))  # like lengths together
    work = [index for index in order for _ in range(args.num_generations_eval)]
    results = [{"prompt": problem["prompt"], "answer": problem["answer"], "difficulty": problem["difficulty"],
                "completions": [], "ended": [], "rewards": []} | ({} if args.reward_fn else {"answers": []}) for problem in problems]
    step = args.generation_batch_size * ranks.world_size()
    for start in range(0, len(work), step):
        indices = work[start : start + step]
        asked = [problems[i] for i in indices]
        for i, one in zip(indices, grade(sample(model, tokenizer, [problem["prompt_ids"] for problem in asked], asked, args), args)):
            results[i]["completions"].append(one.text)
            results[i]["ended"].append(one.ended)
            results[i]["rewards"].append(one.reward)
            if not args.reward_fn:
                results[i]["answers"].append(answer_key(one.text, args.reward) if one.ended or args.grade_truncated else None)
        if bar is not None:
            bar.update(len(indices))
    return results


def problem_metrics(result, ks=(1,), builtin=False):
    """The metrics of one problem, whose means over problems are those of `summarize`: {metric: value}.

    maj@k exists for k > 1, where the result has answers: not with --reward_fn, which has no rule for equal answers.
    """
    k, rewards, texts = len(result["rewards"]), result["rewards"], result["completions"]
    metrics = {f"avg@{k}": sum(rewards) / k}
    metrics |= {f"pass@{j}": pass_at_k(k, sum(reward == 1.0 for reward in rewards), j) for j in ks}
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
            mean, error = mean_and_error([metrics[metric] for metrics in group])
            summary[difficulty] |= {metric: mean, f"{metric}_se": error}
    return summary


def evaluation_metrics(model, tokenizer, problems, args):
    """Evaluate during training: {"eval/<difficulty>/<metric>": value}, with the same random numbers at every step."""
    ks = sorted({1, args.num_generations_eval})
    summary = summarize(evaluate(model, tokenizer, problems, args), ks, builtin=args.dataset_name is None)
    return {f"eval/{difficulty}/{metric}": value for difficulty, group in summary.items() for metric, value in group.items()}
