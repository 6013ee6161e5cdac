"""Evaluate a model on the built-in task or data sets: avg@k, unbiased pass@k and maj@k with standard errors over problems.

    python eval.py --model runs/grpo-diary-... --task diary --num_generations_eval 8
    python eval.py --model MODEL --dataset_name aime24.jsonl aime25.jsonl --num_generations_eval 32 --temperature 0.6
    python eval.py --model MODEL --dataset_name aime25.jsonl --num_generations_eval 256 --temperature 0.7 --output_problems p.jsonl

The last two are usual protocols of papers: avg@32 at temperature 0.6, and pass@1, 2, 4, ... 256 from 256 samples at 0.7.

avg@k is the mean reward of k samples a problem. pass@j is the chance that one of j samples is right, estimated without bias from
k >= j samples [Codex, arXiv 2107.03374v2 eq 1]. maj@k is the chance that the most frequent answer of k samples is right, a tie drawn
by lot. `grading.answer_key` says which answers are equal. A sample without an answer, or cut off and so not graded, does not vote.
There is no maj@k with --reward_fn. All are means over problems; "+-" is one standard error over problems. The built-in tasks also have
`steps_right`, every step right and not only the answer, and `foreign`, the teacher's words used.

Several data sets are evaluated one after the other, each as if it were alone. The last line is the unweighted mean over them, with the
standard error of independent sets. --output_problems holds a line per problem: its samples, their answers and its metrics.

With --save_traces this script is the rejection sampler that collects off-policy traces: it samples until each problem has
--traces_per_problem verified traces or its --max_tries samples are spent.

    python eval.py --task diary --save_traces traces.jsonl --num_generations_eval 64 --max_tries 2500

It goes in waves: --num_generations_eval samples of every unfinished problem are graded; then finished problems leave. Each line of
traces.jsonl is a trace: text, token ids, log-probs at the sampling temperature, tries. traces.ledger.json beside it keeps the flags,
the tries of every problem and the FLOPs spent, failures included, for methods that train on the file (`engine.flops`). Stopped at any
moment, the same command goes on and ends with the same bytes. The built-in task gives training problems here.
"""

import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

import common
import engine
from engine import BadArgument, arg, data, ranks, tasks
from engine.files import append_jsonl, claim, read_lines, sync, write_atomically
from engine.flops import Flops
from engine.models import check_positions, seed_everything, weights_digest
from engine.scoring import score_completions
from engine.self_check import self_check
from engine.tables import mean_over_sets, print_table, table_of_sets
from engine.trace_ledger import flags_record, open_ledger

IDENTITY = ("prompt", "answer", "difficulty")  # what a problem is in the ledger


@dataclass
class Args(engine.ModelArgs):  # the flags of model, prompts, sampling and grading are inherited: python eval.py --help
    # model and data
    dataset_name: list[str] | None = arg(None, "Local files, folders of files, or hub data sets; default: the built-in --task")
    dataset_split: str = arg("test", "Split of hub data sets and folders")
    eval_problems: int | None = arg(None, "Problems of a data set; default: all, or 128 per difficulty of the built-in task", least=1)
    num_hard: int = arg(64, "Hard training problems of the built-in task, with --save_traces", least=0)
    num_easy: int = arg(0, "Easy training problems of the built-in task, with --save_traces", least=0)
    # rollout
    num_generations_eval: int = arg(8, "k: samples per problem; with --save_traces: in each wave", least=1)
    temperature: float = arg(1.0, "Temperature of sampling; 0 = greedy", least=0)
    top_p: float = arg(1.0, "Share of the probability that sampling keeps; 1 = all", above=0, most=1)
    # output
    output_file: str | None = arg(None, "JSON file for the summary and every completion")
    output_problems: str | None = arg(None, "jsonl file for a line per problem, written as each data set is done")
    # collecting traces
    save_traces: str | None = arg(None, "jsonl file for verified traces; the same command goes on with an unfinished one")
    max_tries: int = arg(2500, "Samples per problem at most, with --save_traces", least=1)
    traces_per_problem: int = arg(1, "Distinct verified traces that finish a problem, with --save_traces", least=1, formerly="stop_at")

    def __post_init__(self):
        super().__post_init__()
        if self.temperature == 0 and self.num_generations_eval > 1 and self.save_traces is None:
            print("--temperature 0: one sample of each problem, since all would be equal")
            self.num_generations_eval = 1
        for name in self.dataset_name or ():
            if self.dataset_name.count(name) > 1:
                raise BadArgument(f"--dataset_name {name} is given more than once")
        if self.save_traces is not None:
            check_traces_args(self)


def check_traces_args(args):
    """Checks of --save_traces: refuse flags with which the file would not hold what it promises."""
    path = Path(args.save_traces)
    wrong = {
        f"--save_traces takes one data set, got {len(args.dataset_name or ())}": len(args.dataset_name or ()) > 1,
        f"--save_traces {path} must end in .jsonl": path.suffix != ".jsonl",
        "--output_file does not go with --save_traces, which grades until a problem is solved and not k times": args.output_file,
        "--output_problems does not go with --save_traces, whose ledger has the problems": args.output_problems,
        "--temperature 0 does not go with --save_traces: every try would be the same": args.temperature == 0,
        "--top_p must be 1 with --save_traces: the log-probs would not be those of the sampler": args.top_p != 1,
        "--grade_truncated does not go with --save_traces: a trace that does not end would teach not to stop": args.grade_truncated,
        "--eval_problems does not go with the built-in task and --save_traces: give --num_hard and --num_easy":
            args.dataset_name is None and args.eval_problems is not None,
    }
    for message, holds in wrong.items():
        if holds:
            raise BadArgument(message)


def trace_problems(args):
    """The problems to collect traces of: *training* problems of the built-in task, those of grpo.py, or the data set's."""
    if args.dataset_name is None:
        return tasks.load_task(args.task, "train", {"hard": args.num_hard, "easy": args.num_easy})
    return data.read_problems(args.dataset_name[0], args.dataset_split, "--dataset_name", args, args.dataset_config)[: args.eval_problems]


def eval_problems(args, tokenizer):
    """The problems to evaluate: {name of the data set, or of the built-in task: encoded rows}."""
    if args.dataset_name is None:
        rows = tasks.load_task(args.task, "eval", dict.fromkeys(tasks.DIFFICULTIES, args.eval_problems or 128))
        return {args.task: common.encode_problems(rows, tokenizer, args)}
    sets = {name: data.read_problems(name, args.dataset_split, "--dataset_name", args, args.dataset_config)[: args.eval_problems]
            for name in args.dataset_name}
    return {name: common.encode_problems(rows, tokenizer, args, "--dataset_name" if len(sets) == 1 else f"--dataset_name {name}")
            for name, rows in sets.items()}


def sample_wave(model, tokenizer, problems, num, args, wave, flops):
    """Yield (place in `problems`, its graded Sample) until each problem has had `num` samples; charges them to `flops`.

    The samples are a function of problems, flags and (seed, wave), whatever was sampled before.
    """
    seed_everything(args.seed, wave, "traces")
    yield from common.sample_groups(model, tokenizer, problems, num, args, flops, "traces")


def trace_logps(model, tokenizer, samples, args, flops, batch_size=8):
    """Log-probs of traces given their prompts: a list of floats for each of `samples`, nats, at the sampling temperature.

    One more forward pass over what is kept, charged to `flops`. The sampler's own log-probs would need the logits of all that is
    sampled, (B, T, V).
    """
    logps = []
    for start in range(0, len(samples), batch_size):
        some = samples[start : start + batch_size]
        padded = engine.pad([sample.prompt_ids for sample in some], [sample.ids for sample in some], tokenizer, model.device)
        with torch.no_grad():
            scored, _ = score_completions(model, *padded, args.temperature, args.logprob_impl)  # (b, T)
        logps += [row[: len(sample.ids)].tolist() for row, sample in zip(scored, some)]
        flops.add("traces", engine.Rows(*padded).lengths)
    return logps


def trace_record(sample, tries, args):
    """One line of the trace file, its log-probs to be filled in; `steps_right` exists for the built-in tasks."""
    problem = sample.problem
    record = {"prompt": problem.get("prompt_messages", problem["prompt"]), "answer": problem["answer"], "difficulty": problem["difficulty"],
              "trace": sample.text, "trace_ids": sample.ids, "logps": None, "tries": tries, "temperature": args.temperature,
              "source_model": args.model_name_or_path}
    return record | ({} if args.dataset_name is not None else {"steps_right": tasks.steps_are_right(problem["prompt"], sample.text)})


def collect_traces(args):
    """Rejection sampling: sample until every problem has `traces_per_problem` distinct verified traces, or `max_tries` samples.

    A kill may come between any two instructions: the ledger is replaced after each wave's traces are in the file, and what the
    file holds beyond the ledger's `bytes` is cut before going on (tests/test_traces.py).
    """
    path, ledger = Path(args.save_traces), open_ledger(args, __file__)
    model, tokenizer = engine.load_policy(args)
    problems = common.encode_problems(trace_problems(args), tokenizer, args)
    asked = [{name: problem[name] for name in IDENTITY} for problem in problems]
    entries = ledger["problems"] or [problem | {"tries": 0, "right": 0, "lines": []} for problem in asked]
    if asked != [{name: entry.get(name) for name in IDENTITY} for entry in entries]:
        raise BadArgument(f"--save_traces {path} was begun with other problems: choose another file")
    dated = args.template in ("auto", "chat") and "strftime_now" in str(tokenizer.chat_template)  # tomorrow's prompts are others
    for name, now, what in (("base_model", weights_digest(model), "weights"), ("data", data.problems_digest(problems), "prompts")):
        if ledger.setdefault(name, now) != now and not (name == "data" and dated):
            raise BadArgument(f"--save_traces {path} was begun with other {what}: choose another file")
    check_positions(model, args, problems)
    self_check(model, tokenizer, problems, args)
    flops = Flops.of(model)
    flops.spent |= {"traces": ledger["flops"], "paper": ledger["flops_paper"]}

    def unfinished():
        return [i for i, entry in enumerate(entries)
                if len(entry["lines"]) < args.traces_per_problem and entry["tries"] < args.max_tries]

    def write_ledger():
        ledger.update(problems=entries, samples=sum(entry["tries"] for entry in entries), flops=flops.spent["traces"],
                      flops_paper=flops.spent["paper"], bytes=path.stat().st_size, done=not unfinished())
        sync(path)  # the ledger must not be younger than what it counts
        write_atomically(path.with_suffix(".ledger.json"), json.dumps(ledger, allow_nan=False) + "\n")

    kind = {"trace_ids": ["a whole number"], "tries": "a whole number"}
    traces = ranks.all_gather_list(read_lines(path, kind, ledger["bytes"]) if ranks.rank() == 0 else [])
    if sorted(line for entry in entries for line in entry["lines"]) != list(range(len(traces))):
        raise BadArgument(f"--save_traces {path}: its lines are not those that {path.with_suffix('.ledger.json').name} counts")
    if ledger["problems"]:
        print(f"going on with {path} after {ledger['waves']} waves: {ledger['samples']} samples so far")
    if ranks.rank() == 0:
        os.truncate(path, ledger["bytes"])
    write_ledger()  # before the first trace: a file without a ledger is never ours
    with tqdm(total=len(entries), initial=len(entries) - len(unfinished()), desc="collecting", unit="problem",
              disable=ranks.rank() > 0) as bar:
        while todo := unfinished():
            num = min(args.num_generations_eval, args.max_tries - entries[todo[0]]["tries"])  # all of todo have had as many tries
            new, old = [], len(traces)
            for place, sample in sample_wave(model, tokenizer, [problems[i] for i in todo], num, args, ledger["waves"], flops):
                entry = entries[todo[place]]
                entry["tries"] += 1
                right = sample.reward >= 1.0 and sample.ended  # a --reward_fn may reward what was cut off
                entry["right"] += right
                known = [traces[line]["trace_ids"] for line in entry["lines"]]
                if right and len(known) < args.traces_per_problem and sample.ids not in known:
                    entry["lines"].append(len(traces))
                    traces.append(trace_record(sample, entry["tries"], args))
                    new.append(sample)
                if not bar.disable and entry["tries"] % num == 0:
                    bar.n = len(entries) - len(unfinished())
                    bar.set_postfix(samples=sum(entry["tries"] for entry in entries), hits=len(traces))
            for trace, logps in zip(traces[old:], trace_logps(model, tokenizer, new, args, flops)):
                trace["logps"] = logps
            append_jsonl(path, traces[old:])
            ledger["waves"] += 1
            write_ledger()
    print_collected(path, ledger, traces, args.traces_per_problem)


def print_collected(path, ledger, traces, traces_per_problem):
    """What was solved, and at what price."""
    entries = ledger["problems"]
    solved = [traces[entry["lines"][-1]]["tries"] for entry in entries if len(entry["lines"]) == traces_per_problem]
    lost = sum(entry["tries"] for entry in entries if len(entry["lines"]) < traces_per_problem)
    print(f"solved {len(solved)} of {len(entries)} problems with {ledger['samples']} samples"
          + (f": {sum(solved) / len(solved):.1f} tries each on average," if solved else ",") + f" {lost} tries on unsolved ones")
    if traces and "steps_right" in traces[0]:
        print(f"{sum(trace['steps_right'] for trace in traces)} of {len(traces)} traces have every step right")
    print(f"{ledger['flops']:.3g} FLOPs spent, failures included; wrote {path} and {path.with_suffix('.ledger.json').name}")


def main():
    args = engine.parse_args(Args, __doc__, __file__)
    if args.save_traces is not None:
        try:
            return collect_traces(args)
        except KeyboardInterrupt:
            print("interrupted; the same command goes on after the last complete wave", file=sys.stderr)
            sys.exit(130)
    for name in ("output_file", "output_problems"):
        if getattr(args, name):
            claim(Path(getattr(args, name)), f"--{name}", fresh=True)
    model, tokenizer = engine.load_policy(args)
    problems = eval_problems(args, tokenizer)
    every = sum(problems.values(), [])
    check_positions(model, args, every)
    self_check(model, tokenizer, every, args if args.temperature else replace(args, temperature=1.0))
    builtin, k, sets = args.dataset_name is None, args.num_generations_eval, {}
    ks = sorted({k} | {2**power for power in range(k.bit_length())})
    with tqdm(total=k * sum(map(len, problems.values())), desc="evaluating", unit="sample",
              disable=ranks.rank() > 0) as bar:
        for name, rows in problems.items():  # each starts from --seed anew: no set depends on the others (tests/test_evaluation.py)
            results = common.evaluate(model, tokenizer, rows, args, bar)
            sets[name] = {"summary": common.summarize(results, ks, builtin), "problems": results}
            if args.output_problems:
                append_jsonl(args.output_problems, (
                    {"dataset": name} | result | {"right": sum(reward >= 1 for reward in result["rewards"]),
                                                  "metrics": common.problem_metrics(result, ks, builtin)} for result in results))
    if len(sets) == 1:
        record = sets[name]
        print_table(record["summary"])
    else:
        whole = {name: [*record["summary"].values()][-1] for name, record in sets.items()}  # "all", or the only group
        record = {"data_sets": sets, "whole": whole, "mean": mean_over_sets(list(whole.values()))}
        print_table(table_of_sets(sets, record["mean"]))
    if args.output_file:
        write_atomically(Path(args.output_file), json.dumps({"args": flags_record(args)} | record, indent=1) + "\n")
    for file in filter(None, (args.output_file, args.output_problems)):
        print(f"wrote {file}")


if __name__ == "__main__":
    engine.launch(main)
