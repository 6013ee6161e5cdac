"""Evaluate a model on the built-in task or data sets: avg@k, unbiased pass@k and maj@k with standard errors over problems.

    python eval.py --model runs/grpo-diary-... --task diary --num_generations_eval 8
    python eval.py --model MODEL --dataset_name aime24.jsonl aime25.jsonl --num_generations_eval 32 --temperature 0.6
    python eval.py --model MODEL --dataset_name aime25.jsonl --num_generations_eval 256 --temperature 0.7 --output_problems p.jsonl

The last two are usual protocols of papers: avg@32 at temperature 0.6, and pass@1, 2, 4, ... 256 from 256 samples at 0.7.

avg@k is the mean reward of k samples a problem; pass@j the chance that one of j samples is right, estimated without bias from
k >= j samples [Codex, arXiv 2107.03374v2 eq 1]; maj@k the chance that the most frequent answer of k samples is right, a tie drawn
by lot. Equal answers are one (`reward.answer_key`); a sample without an answer, or cut off and so not graded, does not vote; there is
no maj@k with --reward_fn. All are means over problems; "+-" is one standard error over problems.
`steps_right` and `foreign` exist for the built-in tasks: every step right, not only the answer, and teacher's words used.

Several data sets are evaluated one after the other, each as if it were alone; the last line is the unweighted mean over them, its
standard error that of independent sets. --output_problems holds a line per problem: its samples, their answers and its metrics.

With --save_traces it is the rejection sampler that collects off-policy traces: it samples until each problem has --stop_at
verified traces or its --max_tries samples are spent.

    python eval.py --task diary --save_traces traces.jsonl --num_generations_eval 64 --max_tries 2500

It goes in waves: --num_generations_eval samples of every unfinished problem, graded; then finished problems leave. Each line of
traces.jsonl is a trace (text, token ids, log-probs at the sampling temperature, tries); traces.ledger.json beside it keeps the flags,
the tries of every problem and the FLOPs spent, failures included, for methods that train on the file (`common.traces_flops`).
Stopped at any moment, the same command goes on and ends with the same bytes. The built-in task gives training problems here.
"""

import json
import math
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm
from transformers.hf_argparser import HfArg

import common
import data
import flags
import parallel
import runs
import tasks
from common import policy_logps


@dataclass
class Args:
    # model and data
    model_name_or_path: str = HfArg(default="tiny_model", aliases=["--model"], help="local folder or hub id; the default is built in")
    gguf_file: str | None = HfArg(default=None, help="GGUF file of that folder or hub id, dequantised")
    dtype: Literal["auto", "float32", "bfloat16"] = HfArg(default="auto", help="of compute, weights stay float32; auto: bfloat16 on a GPU")
    parallel: Literal["ddp", "fsdp"] = HfArg(default="ddp", help="with torchrun: whole model on every rank, or sharded by FSDP2")
    attn_implementation: str | None = HfArg(default=None, help="attention of transformers: eager, sdpa, ...")
    trust_remote_code: bool = HfArg(default=False, help="run the Python code that comes with a model")
    dataset_name: list[str] | None = HfArg(default=None, help="local jsonl/json/csv/parquet files or hub data sets; none: built-in --task")
    dataset_config: str | None = HfArg(default=None, help="configuration of hub data sets, as main of GSM8K")
    dataset_split: str = HfArg(default="test", help="split of hub data sets")
    task: Literal["bills", "diary"] = HfArg(default="bills", help="built-in task: bills = missing knowledge, diary = careless skill")
    eval_problems: int | None = HfArg(default=None, help="problems a data set; none: all, or 128 of each difficulty of the built-in task")
    num_hard: int = HfArg(default=64, help="with --save_traces, built-in task: hard training problems")
    num_easy: int = HfArg(default=0, help="with --save_traces, built-in task: easy training problems")
    template: Literal["auto", "chat", "none", "r1", "qwen_math"] = HfArg(default="auto", help="of prompts; auto: chat if there is one")
    system_prompt: str | None = HfArg(default=None, help="system message of prompts that bring none; none: the template's")
    max_prompt_length: int = HfArg(default=1024, help="longer prompts are dropped, tokens")
    # sampling and grading
    max_completion_length: int | None = HfArg(default=None, help="tokens; 64 for the built-in task, else 1024")
    num_generations_eval: int = HfArg(default=8, help="samples per problem, k; with --save_traces: in each wave")
    temperature: float = HfArg(default=1.0, help="of sampling; 0: greedy")
    top_p: float = HfArg(default=1.0, help="of sampling: share of the probability that is kept; 1: all")
    generation_batch_size: int = HfArg(default=256, help="rows a call of generate, for memory")
    reward: Literal["boxed", "exact", "numeric", "choice", "math"] = HfArg(default="boxed", help="how the last \\boxed{} is graded")
    reward_fn: str | None = HfArg(default=None, help="own reward instead of --reward: PATH.py:FUNCTION, called as in TRL")
    grade_truncated: bool = HfArg(default=False, help="let completions without EOS count as right")
    seed: int = HfArg(default=0, help="of sampling")
    # output
    output_file: str | None = HfArg(default=None, help="write the summary and every completion here, as JSON")
    output_problems: str | None = HfArg(default=None, help="write a line per problem into this .jsonl file, as each data set is done")
    # collecting traces
    save_traces: str | None = HfArg(default=None, help="collect verified traces into this .jsonl file; the same command goes on with it")
    max_tries: int = HfArg(default=2500, help="with --save_traces: samples per problem at most")
    stop_at: int = HfArg(default=1, help="with --save_traces: distinct verified traces after which a problem is finished")
    logprob_impl: Literal["auto", "reference", "tiled", "triton"] = HfArg(
        default="auto", help="with --save_traces: path of the log-probs; see logprob.py")

    def __post_init__(self):
        flags.check_common_args(self)
        if not self.temperature >= 0:
            raise common.BadArgument(f"--temperature must be at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise common.BadArgument(f"--top_p must be in (0, 1], got {self.top_p}")
        for name in ("output_file", "output_problems"):
            path = getattr(self, name) and Path(getattr(self, name))
            if path and path.exists():
                raise common.BadArgument(f"--{name} {path} exists already")
            if path and not path.parent.is_dir():
                raise common.BadArgument(f"--{name} {path}: no folder {path.parent}")
        if self.output_file and self.output_file == self.output_problems:
            raise common.BadArgument(f"--output_file and --output_problems are both {self.output_file}")
        for name in self.dataset_name or ():
            if self.dataset_name.count(name) > 1:
                raise common.BadArgument(f"--dataset_name {name} is given more than once")
        for name in ("max_tries", "stop_at"):
            if getattr(self, name) < 1:
                raise common.BadArgument(f"--{name} must be at least 1, got {getattr(self, name)}")
        if self.save_traces is not None:
            check_traces_args(self)


def check_traces_args(args):
    """Checks of --save_traces: refuse flags with which the file would not hold what it promises."""
    path = Path(args.save_traces)
    wrong = {
        f"--save_traces takes one data set, got {len(args.dataset_name or ())}": len(args.dataset_name or ()) > 1,
        f"--save_traces {path} must end in .jsonl": path.suffix != ".jsonl",
        f"--save_traces {path}: no folder {path.parent}": not path.parent.is_dir(),
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
            raise common.BadArgument(message)


def flags_record(args):
    """The flags as they are written to files; one data set is its name, not a list of one."""
    flags = runs.plain(asdict(args))
    return flags | ({"dataset_name": args.dataset_name[0]} if len(args.dataset_name or ()) == 1 else {})


def metric_names(group):
    """The metrics of one group of a summary, without their standard errors."""
    return [name for name in group if name != "problems" and not name.endswith("_se")]


def mean_over_sets(groups):
    """Unweighted mean of each metric over data sets; its standard error is that of independent sets, None if one has none."""
    mean = {"problems": sum(group["problems"] for group in groups)}
    for metric in metric_names(groups[0]):
        errors = [group[f"{metric}_se"] for group in groups]
        mean[metric] = sum(group[metric] for group in groups) / len(groups)
        mean[f"{metric}_se"] = None if None in errors else math.hypot(*errors) / len(groups)
    return mean


def print_table(summary):
    """One line per group, one column per metric, each "mean +- standard error"."""
    metrics, width = metric_names(next(iter(summary.values()))), max(10, *(len(label) + 2 for label in summary))
    print(f"{'':<{width}}{'problems':>9}" + "".join(f"{metric:>17}" for metric in metrics))
    for label, group in summary.items():
        errors = [group[f"{metric}_se"] for metric in metrics]
        cells = [f"{group[metric]:.3f}" + ("" if error is None else f" +- {error:.3f}") for metric, error in zip(metrics, errors)]
        print(f"{common.printable(label):<{width}}{group['problems']:>9}" + "".join(f"{cell:>17}" for cell in cells))


def table_of_sets(data_sets, whole, mean):
    """The groups of the table for several data sets: each set's difficulties, the whole set if it has several, the mean over sets."""
    groups = {}
    for name, record in data_sets.items():
        groups |= {f"{name} {difficulty}": group for difficulty, group in record["summary"].items()}
        if len(record["summary"]) > 1:
            groups[f"{name} (whole)"] = whole[name]
    return groups | {f"mean of {len(data_sets)} sets": mean}


def open_ledger(args):
    """The ledger of an unfinished --save_traces file, or a new one; writes nothing.

    Raises BadArgument for a finished file, one without a ledger, one that lost what its ledger counts, or one begun with other flags.
    """
    path = Path(args.save_traces)
    ledger_path, size = path.with_suffix(".ledger.json"), path.stat().st_size if path.exists() else 0
    flags = flags_record(args)
    if not ledger_path.exists():
        if path.exists():
            raise common.BadArgument(f"--save_traces {path} exists already, without a {ledger_path.name} to go on from")
        return {"script": Path(__file__).name, "args": flags, "versions": runs.versions(), "git_commit": runs.git_commit(),
                "source_model": args.model_name_or_path, "waves": 0, "samples": 0, "flops": 0.0, "flops_paper": 0.0, "bytes": 0,
                "done": False, "problems": []}
    ledger = json.loads(ledger_path.read_text())
    if ledger["done"]:
        raise common.BadArgument(f"--save_traces {path} is complete: choose another file, or delete it and {ledger_path.name}")
    for name, value in flags.items():
        if name != "save_traces" and value != ledger["args"].get(name):
            raise common.BadArgument(f"--{name} {value}: {path} was begun with {ledger['args'].get(name)}; "
                                     "give the same flags, or choose another --save_traces")
    if size < ledger["bytes"]:
        raise common.BadArgument(f"--save_traces {path} has {size} bytes, but {ledger_path.name} counts {ledger['bytes']}")
    return ledger


def trace_problems(args):
    """The problems to collect traces of: *training* problems of the built-in task, those of grpo.py, or the data set's."""
    if args.dataset_name is None:
        return list(tasks.load_task(args.task, "train", {"hard": args.num_hard, "easy": args.num_easy}))
    return data.dataset_rows(args.dataset_name[0], args.dataset_split, "--dataset_name", args.dataset_config)[: args.eval_problems]


def eval_problems(args, tokenizer):
    """The problems to evaluate: {name of the data set, or of the built-in task: encoded rows}."""
    if args.dataset_name is None:
        rows = list(tasks.load_task(args.task, "eval", dict.fromkeys(tasks.DIFFICULTIES, args.eval_problems or 128)))
        return {args.task: data.encode_rows(rows, tokenizer, args)}
    sets = {name: data.dataset_rows(name, args.dataset_split, "--dataset_name", args.dataset_config)[: args.eval_problems]
            for name in args.dataset_name}
    return {name: data.encode_rows(rows, tokenizer, args, "--dataset_name" if len(sets) == 1 else f"--dataset_name {name}")
            for name, rows in sets.items()}


def sample_wave(model, tokenizer, rows, num, args, wave, flops):
    """Yield batches of (place in `rows`, token ids, text, right) until each of `rows` has had `num` samples; charges them to `flops`.

    The samples are a function of rows, flags and (seed, wave), whatever was sampled before.
    """
    common.seed_everything(args.seed, wave, "traces")
    stops = common.eos_ids(model, tokenizer)
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]["prompt_ids"]))  # like lengths together
    work = [place for place in order for _ in range(num)]
    step = args.generation_batch_size * parallel.world_size()
    for start in range(0, len(work), step):
        places = work[start : start + step]
        prompt_ids, prompt_mask = common.left_pad([rows[i]["prompt_ids"] for i in places], tokenizer.pad_token_id, model.device)
        ids, mask = common.sample(model, prompt_ids, prompt_mask, stops, tokenizer.pad_token_id, args.max_completion_length,
                                  args.temperature, batch_size=args.generation_batch_size)
        lengths = prompt_mask.sum(1) + mask.sum(1)  # (b,)
        flops.add("traces", lengths)
        flops.add_paper(lengths, passes=1)
        texts, ended = common.completion_texts(tokenizer, ids, mask, stops)
        right = common.score(texts, ended, [rows[i] for i in places], args) == 1.0  # (b,) bool
        yield zip(places, (row[row_mask].tolist() for row, row_mask in zip(ids, mask)), texts, right.tolist())


@torch.no_grad()
def trace_logps(model, tokenizer, prompts, traces, args, flops, batch_size=8):
    """Log-probs of traces given their prompts, both lists of token ids: lists of floats, nats, at the sampling temperature.

    One more forward pass over what is kept, charged to `flops`. The sampler's own log-probs would need the logits of all that is
    sampled, (B, T, V).
    """
    pad, stops, logps = tokenizer.pad_token_id, common.eos_ids(model, tokenizer), []
    for start in range(0, len(traces), batch_size):
        prompt_ids, prompt_mask = common.left_pad(prompts[start : start + batch_size], pad, model.device)
        completion_ids = common.right_pad([torch.tensor([ids], device=model.device) for ids in traces[start : start + batch_size]], pad)
        mask = common.completion_mask(completion_ids, stops)  # (b, T)
        scored, _ = policy_logps(model, prompt_ids, prompt_mask, completion_ids, mask, args.temperature, args.logprob_impl)  # (b, T)
        logps += [row[row_mask].tolist() for row, row_mask in zip(scored, mask)]
        flops.add("traces", prompt_mask.sum(1) + mask.sum(1))
    return logps


def trace_record(row, tries, ids, text, args):
    """One line of the trace file, its log-probs to be filled in; `steps_right` exists for the built-in tasks."""
    record = {"prompt": row["prompt"], "answer": row["answer"], "difficulty": row["difficulty"], "trace": text, "trace_ids": ids,
              "logps": None, "tries": tries, "temperature": args.temperature, "source_model": args.model_name_or_path}
    return record | ({"steps_right": tasks.steps_are_right(row["prompt"], text)} if args.dataset_name is None else {})


def collect_traces(args):
    """Rejection sampling: sample until every problem has `stop_at` distinct verified traces, or `max_tries` samples.

    A kill may come between any two instructions: the ledger is replaced after each wave's traces are in the file, and what the
    file holds beyond the ledger's `bytes` is cut before going on (tests/test_traces.py).
    """
    path, ledger = Path(args.save_traces), open_ledger(args)
    model, tokenizer = common.load_policy(args)
    rows = data.encode_rows(trace_problems(args), tokenizer, args)
    asked = [{name: row[name] for name in ("prompt", "answer", "difficulty")} for row in rows]
    problems = ledger["problems"] or [problem | {"tries": 0, "right": 0, "lines": []} for problem in asked]
    if asked != [{name: problem[name] for name in ("prompt", "answer", "difficulty")} for problem in problems]:
        raise common.BadArgument(f"--save_traces {path} was begun with other problems: choose another file")
    common.self_check(model, tokenizer, rows, args)
    flops = common.Flops.of(model)
    flops.spent |= {"traces": ledger["flops"], "paper": ledger["flops_paper"]}

    def unfinished():
        return [i for i, problem in enumerate(problems) if len(problem["lines"]) < args.stop_at and problem["tries"] < args.max_tries]

    def write_ledger():
        ledger.update(problems=problems, samples=sum(problem["tries"] for problem in problems), flops=flops.spent["traces"],
                      flops_paper=flops.spent["paper"], bytes=path.stat().st_size if path.exists() else 0, done=not unfinished())
        runs.write_atomically(path.with_suffix(".ledger.json"), json.dumps(ledger, allow_nan=False) + "\n")

    if path.exists():
        if parallel.rank() == 0:
            os.truncate(path, ledger["bytes"])
        print(f"going on with {path} after {ledger['waves']} waves: {ledger['samples']} samples so far")
    write_ledger()  # before the first trace: a file without a ledger is never ours
    runs.append_jsonl(path, [])
    traces = parallel.gather([json.loads(line) for line in path.read_text().splitlines()] if parallel.rank() == 0 else [])
    with tqdm(total=len(problems), initial=len(problems) - len(unfinished()), desc="collecting", unit="problem",
              disable=parallel.rank() > 0) as bar:
        while todo := unfinished():
            num = min(args.num_generations_eval, args.max_tries - problems[todo[0]]["tries"])  # all of todo have had as many tries
            prompts, old = [], len(traces)
            for batch in sample_wave(model, tokenizer, [rows[i] for i in todo], num, args, ledger["waves"], flops):
                for place, ids, text, right in batch:
                    row, problem = rows[todo[place]], problems[todo[place]]
                    problem["tries"] += 1
                    problem["right"] += right
                    known = [traces[line]["trace_ids"] for line in problem["lines"]]
                    if right and len(known) < args.stop_at and ids not in known:
                        problem["lines"].append(len(traces))
                        traces.append(trace_record(row, problem["tries"], ids, text, args))
                        prompts.append(row["prompt_ids"])
                bar.n = len(problems) - len(unfinished())
                bar.set_postfix(samples=sum(problem["tries"] for problem in problems), hits=len(traces))
            new = traces[old:]
            for trace, logps in zip(new, trace_logps(model, tokenizer, prompts, [trace["trace_ids"] for trace in new], args, flops)):
                trace["logps"] = logps
            runs.append_jsonl(path, new)
            ledger["waves"] += 1
            write_ledger()
    print_collected(path, ledger, traces, args.stop_at)


def print_collected(path, ledger, traces, stop_at):
    """What was solved, and at what price."""
    problems = ledger["problems"]
    solved = [traces[problem["lines"][-1]]["tries"] for problem in problems if len(problem["lines"]) == stop_at]
    lost = sum(problem["tries"] for problem in problems if len(problem["lines"]) < stop_at)
    print(f"solved {len(solved)} of {len(problems)} problems with {ledger['samples']} samples"
          + (f": {sum(solved) / len(solved):.1f} tries each on average," if solved else ",") + f" {lost} tries on unsolved ones")
    if traces and "steps_right" in traces[0]:
        print(f"{sum(trace['steps_right'] for trace in traces)} of {len(traces)} traces have every step right")
    print(f"{ledger['flops']:.3g} FLOPs spent, failures included; wrote {path} and {path.with_suffix('.ledger.json').name}")


def main():
    args = flags.parse_args(Args, __doc__, __file__)
    if args.save_traces is not None:
        try:
            return collect_traces(args)
        except KeyboardInterrupt:
            print("interrupted; the same command goes on after the last complete wave", file=sys.stderr)
            sys.exit(130)
    model, tokenizer = common.load_policy(args)
    problems = eval_problems(args, tokenizer)
    builtin, k, sets = args.dataset_name is None, args.num_generations_eval, {}
    ks = sorted({1, k} | {2**power for power in range(k.bit_length()) if 2**power <= k})
    with tqdm(total=k * sum(map(len, problems.values())), desc="evaluating", unit="sample",
              disable=parallel.rank() > 0) as bar:
        for name, rows in problems.items():  # each starts from --seed anew: no set depends on the others (tests/test_evaluation.py)
            results = common.evaluate(model, tokenizer, rows, k, args.max_completion_length, args.temperature, args.top_p,
                                      args.reward_fn or args.reward, args.grade_truncated, args.generation_batch_size, args.seed, bar)
            sets[name] = {"summary": common.summarize(results, ks, builtin), "problems": results}
            if args.output_problems:
                runs.append_jsonl(args.output_problems, (
                    {"dataset": name} | result | {"right": result["rewards"].count(1.0),
                                                  "metrics": common.problem_metrics(result, ks, builtin)} for result in results))
    if len(sets) == 1:
        record = sets[name]
        print_table(record["summary"])
    else:
        whole = {name: common.summarize([result | {"difficulty": "whole"} for result in record["problems"]], ks)["whole"]
                 for name, record in sets.items()}
        record = {"data_sets": sets, "whole": whole, "mean": mean_over_sets(list(whole.values()))}
        print_table(table_of_sets(**record))
    if args.output_file:
        runs.write_atomically(Path(args.output_file), json.dumps({"args": flags_record(args)} | record, indent=1) + "\n")
    for file in filter(None, (args.output_file, args.output_problems)):
        print(f"wrote {file}")


if __name__ == "__main__":
    runs.run_main(main)
