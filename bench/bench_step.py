"""Seconds, memory, loss and gradient of a training step of grpo.py beside TRL's GRPOTrainer.

    python bench/bench_step.py                                      the cases that need no download, one thread
    python bench/bench_step.py --smollm2 DIR                        also SmolLM2-135M, from its model folder
    python bench/bench_step.py --render                             only write the table of docs/speed.md anew
    python bench/bench_step.py --device cuda --cases smollm2-random qwen-random [--lora_rank 16] [--static_cache]        on a GPU
    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 python bench/bench_step.py --output results/step/cpu_malloc.json

Each side is a process of its own, and the processes take turns, a step at a time, because machines are shared: trust the ratios, not
the seconds (median over rounds, the first is a warm-up). With one thread they are seconds of processor time, which other jobs disturb
less; "wall s" is the clock on the wall. Weights, prompts, group size, AdamW, float32, threads and environment are the same. What a row
draws is a function of (step, row, position), by Gumbel noise in a logits processor on both sides, so that they draw the same completions
as long as their weights agree: the first step with a gradient must give the same completions, loss and gradient norm (1e-4 relative), or
this script fails. In bfloat16 (by autocast, the default on a GPU) the two round differently, and that check is left out; `--dtype
float32` has it. On a GPU memory is CUDA's max_memory_allocated, and the first step, the warm-up, ends after 64 tokens, but with
`--static_cache`, which compiles the model for one shape: then it is as long as the others.

`TRL` has fair flags: float32, no gradient checkpointing, and a number of rows a forward pass (see CASES) that is for its speed as good
as any, within the noise, and for its memory better than larger ones; so has ours a number of tokens. `TRL, defaults` has bfloat16
autocast, gradient checkpointing and 8 rows. Advantages are not divided by std, because the two divide by different ones. Except in the
built-in task, where completions end by themselves, each ends at a length drawn uniformly from 1 to the longest, and its reward is a hash
of its text, so that every row has an advantage. Peak memory is Linux's high-water mark of the
process, and in brackets without what it held before its first step.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LogitsProcessor, Qwen2Config

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import engine  # noqa: E402
import grpo  # noqa: E402
from bench_logprob import peak_mb  # noqa: E402
from engine import tasks  # noqa: E402
from engine.data import step_problems  # noqa: E402
from engine.flops import Flops  # noqa: E402
from engine.grading import grade_completions  # noqa: E402
from engine.models import load_model, load_policy  # noqa: E402
from engine.sampling import completion_mask  # noqa: E402
from measure import machine  # noqa: E402


@dataclass
class Case:
    """What is trained; num_prompts x num_generations rows a step."""

    model: str  # a name of CONFIGS (random weights), "tiny_model" (the shipped base) or "smollm2" (--smollm2)
    num_prompts: int
    num_generations: int
    prompt_length: int | None  # None: as it comes
    max_completion_length: int
    trl_rows: int  # rows a forward pass of TRL with fair flags, about as many tokens as ours
    rounds: int
    task: str | None = None  # of the built-in task
    micro_batch_tokens: int = 2048  # of grpo.py
    min_completion_length: int = 1


END = {"tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
CONFIGS = {
    "llama-3m": LlamaConfig(vocab_size=221, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=8,
                            max_position_embeddings=1024, **END),
    "SmolLM2-135M, random": LlamaConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                                        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192, **END),
    "Qwen2.5-0.5B, random": Qwen2Config(vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
                                        num_attention_heads=14, num_key_value_heads=2, max_position_embeddings=32768, **END),
}
CASES = {
    "tiny": Case("llama-3m", 8, 8, 16, 128, 4, 4, micro_batch_tokens=256),
    "diary": Case("tiny_model", 12, 8, None, 64, 48, 8, "diary"),
    "bills": Case("tiny_model", 12, 8, None, 64, 48, 8, "bills"),
    "long": Case("llama-3m", 8, 8, 256, 64, 8, 3, micro_batch_tokens=1024),
    "smollm2": Case("smollm2", 2, 8, None, 64, 4, 2, micro_batch_tokens=256),
    "smollm2-random": Case("SmolLM2-135M, random", 8, 8, 128, 512, 16, 2, micro_batch_tokens=8192, min_completion_length=128),
    "qwen-random": Case("Qwen2.5-0.5B, random", 8, 8, 128, 512, 16, 2, micro_batch_tokens=8192, min_completion_length=128),
}
TITLES = {"tiny": "3 M parameters, completions of 1 to 128 tokens, every row trained", "diary": "built-in task `diary`",
          "bills": "built-in task `bills`", "long": "3 M parameters, prompts of 256 tokens", "smollm2": "SmolLM2-135M"}
SIDES = "ours", "TRL", "TRL, defaults"
PARTS = "generate", "logps", "backward", "optimizer"
LEARNING_RATE = 1e-6  # small, so that both sides go on drawing the same completions


def model_folder(case, smollm2, folder):
    """The --model of both sides; random weights are written to `folder` with the tokenizer of the tiny model."""
    if case.model not in CONFIGS:
        return smollm2 if case.model == "smollm2" else case.model
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[case.model], dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tasks.TINY_MODEL).save_pretrained(folder)
    return folder


def problems(case, tokenizer, args, steps):
    """The problems of the steps: a list of lists, one a step."""
    if case.task is not None:
        found = tasks.load_task(case.task, "train", {"hard": args.num_hard, "easy": args.num_easy})
    elif case.prompt_length is None:
        found = tasks.load_task("bills", "train", {"easy": steps * case.num_prompts})
    else:
        words = sorted(tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens))
        torch.manual_seed(0)
        texts = [" ".join(words[i] for i in torch.randint(len(words), (case.prompt_length,))) for _ in range(steps * case.num_prompts)]
        found = [{"prompt": text, "answer": "0", "difficulty": "none"} for text in texts]
    found = common.encode_problems(found, tokenizer, args)
    return [step_problems(found, case.num_prompts, 0, step) for step in range(steps)]


def reward(completions, **columns):
    """The --reward_fn of all cases but the built-in task: a number in [0, 1) for each text."""
    return [zlib.crc32(text.encode()) % 997 / 997 for text in completions]


class SameDraw(LogitsProcessor):
    """Draw each row's next token from what (step, row, position) decides, whichever rows are computed beside it.

    lengths (num_rows,) or None: row i ends with its token number lengths[i], and not before.
    """

    def __init__(self, step, num_rows, lengths, prompt_width, eos_id):
        self.step, self.num_rows, self.lengths, self.prompt_width, self.eos_id = step, num_rows, lengths, prompt_width, eos_id
        self.rows = torch.arange(num_rows, device=lengths.device if lengths is not None else None)  # those that are computed

    def __call__(self, input_ids, scores):
        position = input_ids.shape[1] - self.prompt_width
        generator = torch.Generator(scores.device).manual_seed(10_000 * self.step + position)
        noise = torch.empty(self.num_rows, scores.shape[1], device=scores.device).exponential_(generator=generator)[self.rows]  # (b, V)
        scores = scores - noise.log()
        if self.lengths is not None:
            scores[:, self.eos_id] = -float("inf")
            scores[self.lengths[self.rows] <= position + 1, self.eos_id] = float("inf")
        return torch.full_like(scores, -float("inf")).scatter_(1, scores.argmax(dim=1, keepdim=True), 0.0)


def wait_and_read():
    """The clock on the wall when the GPU has done what it was given."""
    torch.cuda.synchronize()
    return time.perf_counter()


class Meter:
    """Seconds by part of one step, and what the step did. The same wrappers for both sides."""

    def __init__(self, case, model, static_cache):
        self.case, self.static_cache, self.step, self.seconds, self.seen = case, static_cache, 0, defaultdict(float), defaultdict(float)
        self.device = model.device.type
        self.clock = wait_and_read if self.device == "cuda" else time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        self.generate = model.generate
        model.generate = self.timed("generate", self.seeded_generate)
        self.clip_grad_norm = torch.nn.utils.clip_grad_norm_
        torch.nn.utils.clip_grad_norm_ = self.timed("optimizer", self.clip)
        torch.optim.AdamW.step = self.timed("optimizer", torch.optim.AdamW.step)
        self.backward = torch.Tensor.backward
        torch.Tensor.backward = self.timed("backward", self.add_loss)

    def timed(self, part, function):
        def wrapper(*args, **kwargs):
            began = self.clock()
            result = function(*args, **kwargs)
            self.seconds[part] += self.clock() - began
            return result
        return wrapper

    def seeded_generate(self, input_ids, **kwargs):
        eos_ids = kwargs["generation_config"].eos_token_id
        if self.draw is None:  # the step's first call; later ones go on with the rows that have not ended
            torch.manual_seed(self.step)
            short = self.step == 0 and self.device == "cuda" and not self.static_cache
            longest = 64 if short else self.case.max_completion_length
            lengths = torch.randint(min(self.case.min_completion_length, longest), longest + 1, (len(input_ids),)).to(self.device)
            lengths = None if self.case.task else lengths
            self.draw = SameDraw(self.step, len(input_ids), lengths, input_ids.shape[1], eos_ids[0])
            self.completions = [None] * len(input_ids)
        output = self.generate(input_ids=input_ids, **kwargs | {"logits_processor": [self.draw]})
        ids = (output if isinstance(output, torch.Tensor) else output.sequences)[:, self.draw.prompt_width :]
        mask = completion_mask(ids, eos_ids)
        for row, row_ids, row_mask in zip(self.draw.rows.tolist(), ids, mask):
            self.completions[row] = row_ids[row_mask].tolist()
        self.draw.rows = self.draw.rows[~torch.isin(ids, torch.tensor(eos_ids, device=ids.device)).any(dim=1)]
        return output

    def clip(self, *args, **kwargs):
        norm = self.clip_grad_norm(*args, **kwargs)
        self.seen["grad_norm"] = float(norm)
        return norm

    def add_loss(self, loss, *args, **kwargs):
        self.seen["loss"] += float(loss.detach())
        self.backward(loss, *args, **kwargs)

    def begin(self):
        """Wait until it is this process's turn."""
        if not sys.stdin.readline():
            sys.exit()
        self.seconds.clear()
        self.seen, self.draw = defaultdict(float, loss=0.0), None
        if self.step == 0:
            self.held = torch.cuda.memory_allocated() / 2**20 if self.device == "cuda" else peak_mb("cpu")
        self.began, self.wall = self.clock(), time.perf_counter()

    def end(self):
        """Report the step to the parent process."""
        self.seen |= {"prompt_width": self.draw.prompt_width, "tokens": sum(map(len, self.completions)),
                      "completions": zlib.crc32(str(self.completions).encode())}
        record = {"seconds": self.clock() - self.began, "wall": time.perf_counter() - self.wall} | self.seconds | self.seen
        record |= {"held_mb": self.held, "peak_mb": peak_mb(self.device)}
        print("STEP " + json.dumps(record), flush=True)
        self.step += 1


def run_ours(case, options, steps):
    args = grpo.Args(
        task=case.task or "bills", prompts_per_step=case.num_prompts, num_generations=case.num_generations,
        max_completion_length=case.max_completion_length, scale_rewards="none", learning_rate=LEARNING_RATE,
        micro_batch_tokens=case.micro_batch_tokens, reward_fn=None if case.task else f"{__file__}:reward", template="none",
        model_name_or_path=options.folder, dtype=options.dtype, lora_rank=options.lora_rank, static_cache=options.static_cache)
    model, tokenizer = load_policy(args)
    batches = problems(case, tokenizer, args, steps)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, flops = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=0.0, fused=True), Flops.of(model)
    meter = Meter(case, model, options.static_cache)
    engine.policy_logps = meter.timed("logps", engine.policy_logps)
    for asked in batches:
        meter.begin()
        batch, _, _ = grpo.rollout(model, None, tokenizer, asked, args, flops)
        meter.seen |= {"rows_trained": grpo.update(model, optimizer, batch, args, flops)["frac_rows_trained"]}
        optimizer.zero_grad()  # as `Run.record` does
        meter.end()


def run_trl(case, options, steps, defaults):
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Turns(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            meter.begin()

        def on_step_end(self, *args, **kwargs):
            meter.end()

    model, tokenizer = load_model(options.folder, dtype="float32")
    bfloat16, peft_config = options.dtype == "bfloat16" or options.dtype == "auto" and options.device == "cuda", None
    if options.lora_rank:
        from peft import LoraConfig

        peft_config = LoraConfig(r=options.lora_rank, lora_alpha=2 * options.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM")
        model = model.to(torch.bfloat16 if bfloat16 else torch.float32)
    args = grpo.Args(reward_fn=None if case.task else f"{__file__}:reward", template="none")
    asked = [problem for batch in problems(case, tokenizer, args, steps) for problem in batch]
    of_prompt = {problem["prompt"]: problem for problem in asked}

    def grade(prompts, completions, completion_ids, **columns):
        ended = [ids[-1] == tokenizer.eos_token_id for ids in completion_ids]
        return grade_completions(completions, ended, [of_prompt[prompt] for prompt in prompts], args.reward_fn or args.reward)

    num_rows, micro = case.num_prompts * case.num_generations, 8 if defaults else case.trl_rows
    flags = {} if defaults else {"bf16": bfloat16, "gradient_checkpointing": False}
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=options.device == "cpu", report_to="none", disable_tqdm=True, save_strategy="no",
        shuffle_dataset=False, max_steps=steps, per_device_train_batch_size=micro, gradient_accumulation_steps=num_rows // micro,
        scale_rewards="none", cache_implementation="static" if options.static_cache else None,
        num_generations=case.num_generations, max_completion_length=case.max_completion_length, learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant", **flags)
    trainer = GRPOTrainer(
        model=model, args=config, reward_funcs=grade, train_dataset=Dataset.from_list([{"prompt": problem["prompt"]} for problem in asked]),
        processing_class=tokenizer, callbacks=[Turns()], peft_config=peft_config)
    meter = Meter(case, trainer.model, options.static_cache)
    trainer._get_per_token_logps_and_entropies = meter.timed("logps", trainer._get_per_token_logps_and_entropies)
    trainer.train()


def measure(name, args, folder):
    """{side: [record of each step]}: one process a side, a step each in turn."""
    flags = {"--cases": name, "--folder": model_folder(CASES[name], args.smollm2, folder), "--threads": args.threads}
    flags |= {"--device": args.device, "--dtype": args.dtype, "--lora_rank": args.lora_rank}
    flags |= {f"--{key}": getattr(CASES[name], key) for key in ("rounds", "trl_rows", "micro_batch_tokens")}
    steps, records = CASES[name].rounds + 1, {side: [] for side in SIDES if side in ["ours", *args.peers]}
    words = [sys.executable, __file__, *(str(word) for flag, value in flags.items() if value is not None for word in (flag, value))]
    words += ["--static_cache"] * args.static_cache
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    children = {side: subprocess.Popen([*words, "--side", side], **pipes) for side in records}
    for _ in range(steps):
        for side, child in children.items():
            child.stdin.write("\n")
            child.stdin.flush()
            for line in child.stdout:
                if line.startswith("STEP "):
                    records[side].append(json.loads(line.removeprefix("STEP ")))
                    print(f"{name}, {side}, step {len(records[side])}: {records[side][-1]['wall']:.1f} s", file=sys.stderr, flush=True)
                    break
            else:
                sys.exit(f"{name}: the process of {side} ended early")
    for child in children.values():
        child.communicate()
    return records


def check_first_gradient(name, ours, theirs, tolerance=1e-4):
    """The number of the first step with a gradient (until then the weights are those of the start). Fails unless its numbers agree."""
    step = next((step for step, record in enumerate(ours) if record["grad_norm"] > 0), None)
    if step is None:
        sys.exit(f"{name}: no row had an advantage in {len(ours)} steps")
    for key, allowed in {"completions": 0, "loss": tolerance, "grad_norm": tolerance}.items():
        if not abs(ours[step][key] - theirs[step][key]) <= allowed * abs(theirs[step][key]):
            sys.exit(f"{name}, step {step + 1}: {key} is {ours[step][key]!r} here and {theirs[step][key]!r} in TRL")
    return step


def table(name, case, records, compared):
    """(lines of Markdown, summary as a dict) of one case."""
    first, summary = records["ours"][0], {}
    for side, steps in records.items():
        rows = {part: statistics.median(step.get(part, 0.0) for step in steps[1:]) for part in ("seconds", "wall", *PARTS)}
        speed = statistics.median(step["tokens"] / step["seconds"] for step in steps[1:])
        same = sum(a["completions"] == b["completions"] for a, b in zip(steps, records["ours"]))
        summary[side] = rows | {"tokens_per_second": speed, "peak_mb": steps[-1]["peak_mb"], "held_mb": steps[-1]["held_mb"],
                                "loss": steps[compared]["loss"], "grad_norm": steps[compared]["grad_norm"], "same_completions": same}
    trained = statistics.mean(step["rows_trained"] for step in records["ours"][1:])
    tokens = statistics.mean(step["tokens"] for step in records["ours"][1:])
    numbers = f"loss, gradient norm of step {compared + 1}"
    titles = ("", "s a step", "TRL / this", *PARTS, "tokens/s", "wall s", "peak MB", "of TRL's", numbers)
    lines = ["", f"**{name}**: {case.model}, {case.num_prompts} prompts x {case.num_generations}, prompts of up to "
             f"{first['prompt_width']:.0f} tokens, completions of up to {case.max_completion_length} ({tokens:.0f} tokens a step); "
             f"{100 * trained:.0f} % of the rows have an advantage; TRL with {case.trl_rows} rows a forward pass, ours with "
             f"{case.micro_batch_tokens} tokens", "", f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    base = summary.get("TRL", summary["ours"])
    for side, row in summary.items():
        cells = [side, f"{row['seconds']:.3f}", f"{base['seconds'] / row['seconds']:.2f}", *(f"{row[part]:.3f}" for part in PARTS),
                 f"{row['tokens_per_second']:.0f}", f"{row['wall']:.3f}", f"{row['peak_mb']:.0f} ({row['peak_mb'] - row['held_mb']:.0f})",
                 f"{row['peak_mb'] / base['peak_mb']:.2f} ({(row['peak_mb'] - row['held_mb']) / (base['peak_mb'] - base['held_mb']):.2f})",
                 f"{row['loss']:.6g}, {row['grad_norm']:.6g}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines, summary


def page_with(text):
    """docs/speed.md with its table made anew from the committed run."""
    record = json.loads((ROOT / "results" / "step" / "cpu_malloc.json").read_text())
    lines = ["| case | s a step | tokens/s | TRL's time / ours | ours / TRL's peak memory |", "|---|---|---|---|---|"]
    for name, case in record["cases"].items():
        ours, trl = case["summary"]["ours"], case["summary"]["TRL"]
        lines.append(f"| {TITLES[name]} | {ours['seconds']:.2f} | {ours['tokens_per_second']:.0f} "
                     f"| **{trl['seconds'] / ours['seconds']:.1f}** | {ours['peak_mb'] / trl['peak_mb']:.2f} |")
    start, end = "<!-- speed: made by bench/bench_step.py -->", "<!-- end of speed -->"
    before, rest = text.split(start)
    return "\n\n".join([before + start, "\n".join(lines), end]) + rest.split(end)[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, help="default: those of the CPU, or the two with -random on a GPU")
    parser.add_argument("--peers", nargs="*", choices=SIDES[1:], default=list(SIDES[1:]))
    parser.add_argument("--smollm2", help="model folder of SmolLM2-135M; without it that case is skipped")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="bfloat16 by autocast; auto: on a GPU")
    parser.add_argument("--lora_rank", type=int, default=0, help="of LoRA on both sides, on a frozen base in bfloat16; 0: full training")
    parser.add_argument("--static_cache", action="store_true", help="sample with a static cache on both sides; a GPU compiles the model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, help="steps measured; default: as many as CASES says")
    parser.add_argument("--trl_rows", type=int, help="rows a forward pass of TRL with fair flags; default: as CASES says")
    parser.add_argument("--micro_batch_tokens", type=int, help="of grpo.py; default: as CASES says")
    parser.add_argument("--output", help="a .json file; a table is written beside it. Default: results/step/DEVICE.json")
    parser.add_argument("--render", action="store_true", help="only write docs/speed.md's table anew from results/step/cpu_malloc.json")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)  # how this script calls itself
    parser.add_argument("--folder", help=argparse.SUPPRESS)  # of the model
    args = parser.parse_args()
    if args.render:
        page = ROOT / "docs" / "speed.md"
        page.write_text(page_with(page.read_text()))
        return
    torch.set_num_threads(args.threads)
    for name, case in CASES.items():
        given = {key: value for key in ("trl_rows", "micro_batch_tokens", "rounds") if (value := getattr(args, key)) is not None}
        CASES[name] = replace(case, **given)
    if args.side:
        case, steps = CASES[args.cases[0]], args.rounds + 1
        if args.side == "ours":
            return run_ours(case, args, steps)
        return run_trl(case, args, steps, defaults=args.side == "TRL, defaults")
    settings = {name: value for name, value in sorted(os.environ.items()) if name.startswith("MALLOC_")}
    command = " ".join([*(f"{name}={value}" for name, value in settings.items()), "python", "bench/bench_step.py", *sys.argv[1:]])
    if args.smollm2:
        command = command.replace(args.smollm2, "DIR")
    where = torch.cuda.get_device_name() if args.device == "cuda" else machine()
    exact = args.dtype == "float32" or args.dtype == "auto" and args.device == "cpu"
    lines, results = [f"`{command}`, {where}, torch {torch.__version__}, threads {args.threads}"], {}
    output = Path(args.output or ROOT / "results" / "step" / f"{args.device}.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    for name in args.cases or [name for name in CASES if name.endswith("-random") == (args.device == "cuda")]:
        if CASES[name].model == "smollm2" and not args.smollm2:
            lines += ["", f"**{name}** was skipped: no --smollm2 DIR"]
            print(lines[-1])
            continue
        with tempfile.TemporaryDirectory() as folder:
            records = measure(name, args, folder)
        compared = check_first_gradient(name, records["ours"], records["TRL"]) if "TRL" in args.peers and exact else 0
        rendered, summary = table(name, CASES[name], records, compared)
        print("\n".join(rendered), flush=True)
        lines += rendered
        results[name] = {"summary": summary, "steps": records}
        record = {"command": command, "torch": torch.__version__, "machine": where, "environment": settings, "cases": results}
        output.write_text(json.dumps(record, indent=1) + "\n")
        output.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
