"""Do the tiled and Triton paths give the numbers of the definition: values, gradients, odd shapes, every head, little memory?"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from engine import logprob, sampling
from engine.logprob import token_logps
from engine.scoring import lm_head, score_completions

ROOT = Path(__file__).parents[1]

CASES = {
    "plain": {}, "cold": {"temperature": 0.5}, "hot": {"temperature": 1.3}, "bias": {"bias": True}, "softcap": {"softcap": 3.0},
    "scale": {"logit_scale": 0.25}, "all": {"bias": True, "softcap": 2.0, "logit_scale": 1.7, "temperature": 0.8},
}


def inputs(n, v, h=24, dtype=torch.float32, bias=False, seed=0, **head):
    """Random (hidden, weight, labels) that require grad, and the other arguments of token_logps."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=generator).to(dtype).requires_grad_()
    weight = (0.5 * torch.randn(v, h, generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(0, v, (n,), generator=generator)
    if bias:
        head["bias"] = torch.randn(v, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, labels, head


def gradients(hidden, weight, labels, head, impl, through, dtype=None):
    """(logps, entropy, gradients of hidden, weight and bias) of a weighted sum of logps, of entropies, or of both."""
    if dtype is not None:
        hidden, weight = (t.detach().to(dtype).requires_grad_() for t in (hidden, weight))
        head = {k: v.detach().to(dtype).requires_grad_() if torch.is_tensor(v) else v for k, v in head.items()}
    logps, entropy = token_logps(hidden, weight, labels, impl=impl, **head)
    ramp = torch.linspace(-1, 2, len(labels), dtype=logps.dtype, device=logps.device)
    loss = ramp @ logps * ("logps" in through) + ramp.flip(0) @ entropy * ("entropy" in through)
    leaves = [hidden, weight] + ([head["bias"]] if "bias" in head else [])
    return [logps, entropy, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("through", ["logps", "entropy", "logps and entropy"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("n, v", [(5, 7), (1, 1300), (300, 1000), (257, 513)])
def test_values_and_gradients_against_float64(n, v, case, through):
    """Sizes that are no multiple of a tile, one row, and more rows and words than a tile holds."""
    arguments = inputs(n, v, **CASES[case])
    exact = gradients(*arguments, "reference", through, torch.float64)
    for ours, theirs in zip(gradients(*arguments, "tiled", through), exact, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).abs().max() < 5e-6 * max(1, theirs.abs().max())


def test_the_definition_against_torchs_distributions():
    hidden, weight, labels, _ = inputs(6, 11)
    distribution = torch.distributions.Categorical(logits=2.0 * torch.tanh((hidden @ weight.T) * 1.5 / 2.0) / 0.7)
    logps, entropy = token_logps(hidden, weight, labels, softcap=2.0, logit_scale=1.5, temperature=0.7, impl="reference")
    torch.testing.assert_close(logps, distribution.log_prob(labels))
    torch.testing.assert_close(entropy, distribution.entropy())


@pytest.mark.parametrize("impl", ["reference", "tiled"])
@pytest.mark.parametrize("case", CASES)
def test_gradcheck(impl, case, monkeypatch):
    monkeypatch.setattr(logprob, "CPU_TILE", (2, 3))
    hidden, weight, labels, head = inputs(3, 5, h=4, dtype=torch.float64, **CASES[case])
    names, tensors = zip(*[(name, value) for name, value in head.items() if torch.is_tensor(value)]) if "bias" in head else ((), ())
    fixed = {name: value for name, value in head.items() if not torch.is_tensor(value)}

    def function(hidden, weight, *values):
        return token_logps(hidden, weight, labels, impl=impl, **fixed, **dict(zip(names, values)))

    assert torch.autograd.gradcheck(function, (hidden, weight, *tensors))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["plain", "all"])
def test_half_precision_inputs_are_computed_in_float32(dtype, case):
    """logps as exact as float64 of the same inputs; gradients come back in the input's dtype, rounded once."""
    arguments = inputs(40, 700, dtype=dtype, **CASES[case])
    exact = gradients(*arguments, "reference", "logps", torch.float64)
    ours = gradients(*arguments, "tiled", "logps")
    assert ours[0].dtype == ours[1].dtype == torch.float32 and {g.dtype for g in ours[2:]} == {dtype}
    assert (ours[0] - exact[0]).abs().max() < 1e-5 and (ours[1] - exact[1]).abs().max() < 1e-5
    for gradient, theirs in zip(ours[2:], exact[2:]):
        assert (gradient - theirs).abs().max() < 2 * torch.finfo(dtype).eps * theirs.abs().max()


def test_autocast_does_not_reach_the_tiles():
    hidden, weight, labels, _ = inputs(20, 600)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = token_logps(hidden, weight, labels, impl="tiled")
    assert torch.equal(inside[0], token_logps(hidden, weight, labels, impl="tiled")[0])


@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_extreme_logits_stay_finite(scale):
    hidden, weight, labels, _ = inputs(9, 1100)
    for value in gradients(scale * hidden.detach().requires_grad_(), weight, labels, {}, "tiled", "logps and entropy")[:2]:
        assert value.isfinite().all()
    big = (scale * hidden.detach()).requires_grad_()
    for gradient in torch.autograd.grad(sum(x.sum() for x in token_logps(big, weight, labels, impl="tiled")), (big, weight)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("impl", ["reference", "tiled"])
def test_no_tokens(impl):
    hidden, weight, labels, _ = inputs(0, 9)
    logps, entropy = token_logps(hidden, weight, labels, impl=impl)
    assert logps.shape == entropy.shape == (0,)
    for gradient, leaf in zip(torch.autograd.grad(logps.sum() + entropy.sum(), (hidden, weight)), (hidden, weight)):
        assert gradient.shape == leaf.shape and not gradient.any()


def test_tied_and_frozen_weights():
    """One tensor as embedding and head gets both gradients; a frozen head none, and hidden the same as before."""
    _, weight, labels, _ = inputs(5, 600)
    tied = {}
    for impl in ("reference", "tiled"):
        logps, _ = token_logps(torch.tanh(weight[labels]), weight, labels.flip(0), impl=impl)
        tied[impl] = torch.autograd.grad(logps.sum(), weight)[0]
    torch.testing.assert_close(tied["tiled"], tied["reference"], atol=1e-5, rtol=1e-5)
    hidden, weight, labels, _ = inputs(5, 600)
    full = torch.autograd.grad(token_logps(hidden, weight, labels, impl="tiled")[0].sum(), hidden)[0]
    frozen = token_logps(hidden, weight.detach(), labels, impl="tiled")[0]
    assert torch.equal(torch.autograd.grad(frozen.sum(), hidden)[0], full)


def test_outputs_used_twice_and_accumulated():
    hidden, weight, labels, _ = inputs(30, 600)
    whole = torch.autograd.grad(token_logps(hidden, weight, labels, impl="reference")[0].exp().sum()
                                + token_logps(hidden, weight, labels, impl="reference")[0].sum(), weight)[0]
    for rows in (slice(0, 13), slice(13, 30)):
        logps, _ = token_logps(hidden[rows], weight, labels[rows], impl="tiled")
        (logps.exp().sum() + logps.sum()).backward()
    torch.testing.assert_close(weight.grad, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("change, message", [
    ({"labels": torch.tensor([0, 9])}, r"labels must lie in \[0, 9\), got 0 to 9"), ({"labels": torch.tensor([-1, 0])}, "got -1 to 0"),
    ({"labels": torch.tensor([0])}, r"got \(1,\) and \(2, 4\)"), ({"weight": torch.zeros(9, 5)}, r"got \(2, 4\) and \(9, 5\)"),
    ({"bias": torch.zeros(8)}, r"got \(8,\) and \(9, 4\)"), ({"temperature": 0.0}, "temperature must be > 0, got 0.0"),
    ({"impl": "magic"}, "impl must be one of auto, reference, tiled, triton, got 'magic'"),
])
def test_bad_input_raises(change, message):
    arguments = {"hidden": torch.zeros(2, 4), "weight": torch.zeros(9, 4), "labels": torch.tensor([0, 1])} | change
    with pytest.raises(ValueError, match=message):
        token_logps(**arguments)


FAMILIES = {
    "Llama": {}, "Qwen2": {}, "Qwen3": {"head_dim": 16}, "GPT2": {}, "Gemma2": {"final_logit_softcapping": 2.0, "head_dim": 16},
    "Gemma3Text": {"head_dim": 16}, "Phi": {}, "Cohere": {"logit_scale": 0.3}, "Granite": {"logits_scaling": 4.0}, "GPTNeoX": {},
}


def family_model(family, **extra):
    """A tiny random model of a family, made from its config, with a head that is not near zero and a bias where it has one."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 151, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    if family == "GPT2":
        sizes = {"vocab_size": 151, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    elif family != "GPTNeoX":
        sizes["num_key_value_heads"] = 1 if family != "Phi" else 2
    config = getattr(transformers, f"{family}Config")(**sizes, **extra, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.get_output_embeddings().parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_its_own_logits(family):
    """Left-padded rows: tiled == log_softmax of the model's own logits, values and gradients."""
    model = family_model(family, **FAMILIES[family])
    prompt_ids, prompt_mask = sampling.left_pad([[5, 6, 7, 8], [9], [10, 11]], 0, "cpu")
    completion_ids = torch.tensor([[12, 13, 2], [14, 2, 0], [15, 16, 17]])
    mask = sampling.completion_mask(completion_ids, [2])
    results = {}
    for impl in ("reference", "tiled"):
        logps, entropy = score_completions(model, prompt_ids, prompt_mask, completion_ids, mask, 0.7, impl)
        model.zero_grad()
        (logps.sum() + 0.1 * entropy.sum()).backward()
        results[impl] = [logps, entropy, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    assert len(results["tiled"]) == len(results["reference"]) > 5
    for ours, theirs in zip(results["tiled"], results["reference"]):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_the_settings_of_the_heads_are_read():
    """The families above would pass with heads ignored only if these were the neutral values."""
    assert lm_head(family_model("Gemma2", **FAMILIES["Gemma2"]))["softcap"] == 2.0
    assert lm_head(family_model("Cohere", **FAMILIES["Cohere"]))["logit_scale"] == 0.3
    assert lm_head(family_model("Granite", **FAMILIES["Granite"]))["logit_scale"] == 0.25
    assert lm_head(family_model("Phi"))["bias"].abs().max() > 0.1


def test_a_head_that_is_not_linear_is_refused_by_name():
    model = family_model("Llama")
    model.set_output_embeddings(torch.nn.Bilinear(32, 32, 151))
    with pytest.raises(ValueError, match="the head of LlamaForCausalLM is a Bilinear, not a Linear; use --logprob_impl reference"):
        lm_head(model)


def test_auto_takes_the_reference_for_a_small_vocabulary_only():
    small = logprob.SMALL_VOCABULARY
    assert logprob.choose_impl("auto", small, "cpu") == logprob.choose_impl("auto", small, "cuda") == "reference"
    assert logprob.choose_impl("auto", small + 1, "cpu") == "tiled"
    assert logprob.choose_impl("tiled", 5, "cpu") == "tiled"


def test_auto_takes_triton_on_cuda_and_says_once_when_it_cannot(monkeypatch, capsys):
    fresh = logprob.choose_impl.__wrapped__
    monkeypatch.setattr(logprob, "triton", object())
    assert fresh("auto", 10**5, "cuda") == "triton" and capsys.readouterr().out == ""
    monkeypatch.setattr(logprob, "triton", None)
    logprob.choose_impl.cache_clear()
    for _ in range(2):
        assert logprob.choose_impl("auto", 10**5, "cuda") == "tiled"
    assert capsys.readouterr().out == "log-probs: the package triton is missing, so the slower tiled path runs (pip install triton)\n"
    logprob.choose_impl.cache_clear()


def test_triton_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="impl triton needs the package triton and a CUDA device"):
        logprob.choose_impl.__wrapped__("triton", 10**5, "cpu")


TRITON = """
import sys, torch
from engine import logprob
sys.path.insert(0, "tests")
from test_logprob import CASES, gradients, inputs

logprob.CPU_TILE = 4, 300  # several tiles in both directions, the last ones ragged
for name, case, dtype, scale in [*((name, case, torch.float32, 1) for name, case in CASES.items()),
                                 ("bfloat16", {}, torch.bfloat16, 1), ("extreme", {}, torch.float32, 1e4),
                                 ("low", {"bias": True}, torch.float32, 1)]:
    for through in ("logps", "logps and entropy") if name in ("plain", "all") else ("logps and entropy",):
        hidden, weight, labels, head = inputs(6, 401, dtype=dtype, **case)
        head |= {"bias": (head["bias"] - 150).detach().requires_grad_()} if name == "low" else {}  # exp of every logit is 0
        arguments = (scale * hidden.detach()).requires_grad_(), weight, labels, head
        exact = gradients(*arguments, "reference", through, torch.float64)
        for ours, theirs in zip(gradients(*arguments, "triton", through), exact, strict=True):
            tolerance = 5e-6 if ours.dtype == torch.float32 else 2 * torch.finfo(dtype).eps
            error = float((ours - theirs).detach().abs().max() / max(1, theirs.abs().max()))
            assert error < tolerance, (name, through, error)
hidden, weight, labels, _ = inputs(6, 401)
plain_sums = [torch.autograd.grad(sum(x.sum() for x in logprob.token_logps(hidden, weight, labels, impl=impl)), (hidden, weight))
              for impl in ("triton", "reference")]  # the gradients that arrive are one number, expanded: no memory a kernel could walk
assert all((ours - theirs).abs().max() < 5e-6 * theirs.abs().max() for ours, theirs in zip(*plain_sums))
logps, entropy = logprob.token_logps(*inputs(0, 9)[:3], impl="triton")
assert logps.shape == entropy.shape == (0,)
print("all cases agree")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_triton_kernels_in_the_interpreter():
    """The kernels as Triton's interpreter runs them, against float64; what needs a GPU (bfloat16 GEMMs, launch limits) is not in it."""
    run = subprocess.run([sys.executable, "-c", TRITON], cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"},
                         capture_output=True, text=True)
    assert run.stdout == "all cases agree\n", run.stderr


MEMORY = """
import re, torch
from logprob import token_logps  # not engine.logprob: transformers would raise the peak before

def peak():  # of this process alone: getrusage starts from the peak of the process that started this one
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

torch.set_num_threads(1)
n, h, v = 1024, 64, 32768
hidden, weight = torch.randn(n, h).requires_grad_(), torch.randn(v, h).requires_grad_()
labels = torch.randint(0, v, (n,))
for impl in ("tiled", "reference"):  # in this order: a peak only grows
    token_logps(hidden[:8], weight[:600], labels[:8] % 600, impl=impl)[0].sum().backward()
    hidden.grad = weight.grad = None
    before = peak()
    logps, entropy = token_logps(hidden, weight, labels, impl=impl)
    (logps.sum() + entropy.sum()).backward()
    print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory that Linux reports")
def test_memory_does_not_grow_with_tokens_times_words():
    """1024 x 32768 logits are 128 MB. A fresh process: the tiled path adds the gradients (8 MB) and under 24 MB, the reference far more."""
    run = subprocess.run([sys.executable, "-c", MEMORY], cwd=ROOT / "engine", check=True, capture_output=True, text=True)
    tiled, reference = map(float, run.stdout.split())
    assert tiled < 32 < 256 < reference
