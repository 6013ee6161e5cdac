"""Evaluate a model on the built-in task or a data set: avg@k and unbiased pass@k with standard errors over problems.

    python eval.py --model runs/grpo-diary-... --task diary --num_generations_eval 8

avg@k is the mean reward of k samples a problem; pass@j the chance that one of j samples is right, estimated without bias from
k >= j samples [Codex, arXiv 2107.03374v2 eq 1]. Both are means over problems; "+-" is one standard error over problems.
`steps` and `foreign` exist for the built-in tasks: every step right, not only the answer, and teacher's words used.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from transformers.hf_argparser import HfArg

import common
import tasks


@dataclass
class Args:
    model_name_or_path: str = HfArg(default="tiny_model", aliases=["--model"], help="local folder or hub id; the default is built in")
    attn_implementation: str | None = HfArg(default=None, help="attention of transformers: eager, sdpa, ...")
    dataset_name: str | None = HfArg(default=None, help="local jsonl/json/csv/parquet file or hub data set; none: the built-in --task")
    dataset_split: str = HfArg(default="test", help="split of a hub data set")
    task: Literal["bills", "diary"] = HfArg(default="bills", help="built-in task: bills = missing knowledge, diary = careless skill")
    eval_problems: int | None = HfArg(default=None, help="problems at most; none: all, or 128 of each difficulty of the built-in task")
    template: Literal["auto", "chat", "none"] = HfArg(default="auto", help="how prompts are rendered; auto: as chat if there is a template")
    system_prompt: str | None = HfArg(default=None, help="system message of the chat template")
    max_prompt_length: int = HfArg(default=1024, help="longer prompts are dropped, tokens")
    max_completion_length: int | None = HfArg(default=None, help="tokens; 64 for the built-in task, else 1024")
    num_generations_eval: int = HfArg(default=8, help="samples per problem, k")
    temperature: float = HfArg(default=1.0, help="of sampling; 0: greedy")
    top_p: float = HfArg(default=1.0, help="of sampling")
    generation_batch_size: int = HfArg(default=256, help="rows a call of generate, for memory")
    reward: Literal["boxed", "exact", "numeric"] = HfArg(default="boxed", help="how the last \\boxed{} is compared with the gold answer")
    grade_truncated: bool = HfArg(default=False, help="let completions without EOS count as right")
    seed: int = HfArg(default=0, help="of sampling")
    output_file: str | None = HfArg(default=None, help="write the summary and every completion here, as JSON")

    def __post_init__(self):
        common.check_common_args(self)
        if not self.temperature >= 0:
            raise common.BadArgument(f"--temperature must be at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise common.BadArgument(f"--top_p must be in (0, 1], got {self.top_p}")
        if self.output_file and Path(self.output_file).exists():
            raise common.BadArgument(f"--output_file {self.output_file} exists already")


def print_table(summary):
    """One line per difficulty, one column per metric, each "mean +- standard error"."""
    metrics = [name for name in next(iter(summary.values())) if name != "problems" and not name.endswith("_se")]
    print(f"{'':<10}{'problems':>9}" + "".join(f"{metric:>17}" for metric in metrics))
    for difficulty, group in summary.items():
        errors = [group[f"{metric}_se"] for metric in metrics]
        cells = [f"{group[metric]:.3f}" + ("" if error is None else f" +- {error:.3f}") for metric, error in zip(metrics, errors)]
        print(f"{difficulty:<10}{group['problems']:>9}" + "".join(f"{cell:>17}" for cell in cells))


def main():
    args = common.parse_args(Args, __doc__, __file__)
    model, tokenizer = common.load_model(args.model_name_or_path, args.attn_implementation)
    builtin = args.dataset_name is None
    if builtin:
        rows = list(tasks.load_task(args.task, "eval", dict.fromkeys(tasks.DIFFICULTIES, args.eval_problems or 128)))
    else:
        rows = common.dataset_rows(args.dataset_name, args.dataset_split, "--dataset_name")[: args.eval_problems]
    rows = common.encode_rows(rows, tokenizer, args)
    k = args.num_generations_eval
    results = common.evaluate(model, tokenizer, rows, k, args.max_completion_length, args.temperature, args.top_p, args.reward,
                              args.grade_truncated, args.generation_batch_size, args.seed, progress=True)
    ks = sorted({1, k} | {2**power for power in range(k.bit_length()) if 2**power <= k})
    summary = common.summarize(results, ks, builtin)
    print_table(summary)
    if args.output_file:
        record = {"args": common.plain(asdict(args)), "summary": summary, "problems": results}
        common.write_atomically(Path(args.output_file), json.dumps(record, indent=1) + "\n")
        print(f"wrote {args.output_file}")


if __name__ == "__main__":
    common.run_main(main)
