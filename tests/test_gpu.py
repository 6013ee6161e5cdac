"""Does a GPU compute what a CPU does, and the same twice? GPU_TESTS=1 python -m pytest tests/test_gpu.py"""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine import logprob, models, sampling, scoring, tasks
from test_logprob import CASES, gradients, inputs

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device and GPU_TESTS=1")
SHORT = ["--max_steps", 4, "--eval_steps", 2, "--eval_problems", 8, "--num_hard", 8, "--num_easy", 16, "--save_steps", 2]


def run(*words):
    """(printed output, metrics of each step, sha256 of the final weights) of a command that gets its --output_dir last."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = Path(words[-1])
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return done.stdout, records, hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("impl", ["triton", "tiled"])
def test_log_probs_and_gradients_against_float64(impl, dtype, case, monkeypatch):
    """Several tiles in both directions, the last ones ragged. What the GEMMs take is rounded to `dtype`, what they give is not."""
    monkeypatch.setattr(logprob, "GPU_TILE", (64, 1024))
    hidden, weight, labels, head = inputs(150, 5003, h=64, dtype=dtype, **CASES[case])
    exact = gradients(hidden, weight, labels, head, "reference", "logps and entropy", torch.float64)
    head = {name: value.detach().cuda() if torch.is_tensor(value) else value for name, value in head.items()}
    ours = gradients(hidden.detach().cuda(), weight.detach().cuda(), labels.cuda(), head, impl, "logps and entropy", dtype)
    for value, theirs in zip(ours[:2], exact[:2]):
        assert value.dtype == torch.float32 and (value.cpu() - theirs).abs().max() < 1e-4
    for gradient, theirs in zip(ours[2:], exact[2:], strict=True):
        assert (gradient.cpu() - theirs).abs().max() < 4 * torch.finfo(dtype).eps * theirs.abs().max() + 1e-5


def test_large_tiles_against_the_reference():
    """The tile that runs use, a vocabulary that is no multiple of it, and logits that underflow in bfloat16."""
    torch.manual_seed(0)
    hidden = torch.randn(17000, 128, device="cuda").bfloat16().requires_grad_()
    weight = torch.randn(9001, 128, device="cuda").bfloat16().requires_grad_()
    labels = torch.randint(0, 9001, (17000,), device="cuda")
    (logps, entropy), (exact_logps, exact_entropy) = (
        logprob.token_logps(hidden, weight, labels, impl=impl) for impl in ("triton", "reference"))
    assert (logps - exact_logps).abs().max() < 1e-4 and (entropy - exact_entropy).abs().max() < 1e-4
    upstream = torch.randn(17000, device="cuda")
    ours = torch.autograd.grad(upstream @ logps, (hidden, weight))
    for gradient, exact in zip(ours, torch.autograd.grad(upstream @ exact_logps, (hidden, weight))):
        gradient, exact = gradient.float(), exact.float()
        assert (gradient - exact).norm() < 0.02 * exact.norm()


def test_a_model_scores_as_on_a_cpu(tiny):
    model, tokenizer = tiny
    model.compute_dtype = torch.float32
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in tasks.problems("diary", "train", "easy", 8, seed=3)]
    ids, mask = sampling.left_pad(prompts, tokenizer.pad_token_id, "cuda")
    rows = ids, mask, *sampling.generate(model, ids, mask, models.eos_ids(model, tokenizer), tokenizer.pad_token_id, 40)
    found = []
    for device in ("cuda", "cpu"):
        model.to(device).zero_grad()
        logps, entropy = scoring.score_completions(model, *(tensor.to(device) for tensor in rows))
        (logps.sum() + entropy.sum()).backward()
        found.append([logps.detach().cpu(), entropy.detach().cpu(), *(parameter.grad.cpu() for parameter in model.parameters())])
    for on_gpu, on_cpu in zip(*found):
        assert (on_gpu - on_cpu).abs().max() < 1e-4 * max(1, on_cpu.abs().max())


def test_a_static_cache_samples_what_a_growing_cache_does(tiny):
    """transformers compiles the model for it, here for one shape; 30 rows of prompts of several lengths, greedy and in float32."""
    model, tokenizer = tiny
    model.compute_dtype = torch.float32
    model.to("cuda")
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in tasks.problems("diary", "train", "easy", 30, seed=3)]
    ids, mask = sampling.left_pad(prompts, tokenizer.pad_token_id, "cuda")
    found = []
    for model.static_cache in (False, True):
        completion_ids, completion_mask = sampling.generate(
            model, ids, mask, models.eos_ids(model, tokenizer), tokenizer.pad_token_id, 40, temperature=0)
        found.append([row[real].tolist() for row, real in zip(completion_ids, completion_mask)])
    assert sum(grown == static for grown, static in zip(*found)) >= 29  # a near tie of two words can fall either way


@pytest.mark.parametrize("script, flags", [
    ("grpo", ["--task", "diary"]), ("repo", ["--task", "bills", "--beta", 0.01]), ("luffy", ["--logprob_impl", "triton"]),
    ("prefixrl", ["--gradient_checkpointing"]), ("sft", ["--task", "bills"]),
    ("grpo", ["--task", "diary", "--lora_rank", 8, "--beta", 0.01])])
def test_a_script_gives_the_same_bits_twice_and_resumed(script, flags, tmp_path):
    out, records, weights = run(f"{script}.py", *flags, *SHORT, "--output_dir", tmp_path / "a")
    assert "in the mean in bfloat16" in out
    assert [record["step"] for record in records] == [0, 1, 2, 3, 4] and any(record.get("grad_norm", 0) > 0 for record in records)
    assert {tensor.dtype for tensor in load_file(tmp_path / "a" / "model.safetensors").values()} == {torch.float32}
    assert run(f"{script}.py", *flags, *SHORT, "--output_dir", tmp_path / "b")[2] == weights
    shutil.rmtree(tmp_path / "b" / "checkpoint-4")
    (tmp_path / "b" / "model.safetensors").unlink()
    assert run(f"{script}.py", "--resume_from_checkpoint", tmp_path / "b")[2] == weights


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_one_rank_of_nccl_is_a_plain_run(mode, tmp_path):
    words = ["grpo.py", "--task", "diary", "--dtype", "float32", *SHORT]
    _, plain, weights = run(*words, "--output_dir", tmp_path / "plain")
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    _, ranked, of_rank = run(*torchrun, *words, "--parallel", mode, "--output_dir", tmp_path / mode)
    assert mode == "fsdp" or of_rank == weights
    for key in ("loss", "grad_norm", "entropy"):
        assert ranked[-1][key] == pytest.approx(plain[-1][key], rel=1e-3, abs=1e-5)
