"""Speed, memory and error of the log-prob paths against the GEMMs alone and against other libraries, on the CPU.

    python bench/bench_logprob.py                                   2048 tokens, the head of SmolLM2-135M, one thread and all
    python bench/bench_logprob.py --shapes 4096x256x512 --rounds 9

Peers are measured when they are installed (pip install --no-deps trl liger-kernel cut-cross-entropy; pip install accelerate triton);
the table names those that are not. All implementations run in turn within each round of one process, and a column is the median over
rounds, because machines are shared: trust the ratios, not the seconds. `gemm` is torch.mm(hidden, weight.T), 2NHV operations,
writing a fresh (N, V) tensor as the naive form does; `gemm, reused output` writes into one that exists. Peak memory is Linux's high-water
mark of a fresh process per implementation, less what its inputs and a warm-up took. Errors are against float64 on 256 tokens.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # logprob.py; bench/ itself is there already

import baseline  # noqa: E402

import logprob  # noqa: E402


def naive(hidden, weight, labels):
    return torch.log_softmax((hidden @ weight.T).float(), -1).gather(-1, labels[:, None])[:, 0]


def logsumexp_gather(hidden, weight, labels):
    logits = hidden @ weight.T
    return logits.gather(-1, labels[:, None])[:, 0] - logits.logsumexp(-1)


def ours(hidden, weight, labels):
    return logprob.token_logps(hidden, weight, labels, impl="tiled")[0]


def torch_auto(hidden, weight, labels):
    options = torch.nn.LinearCrossEntropyOptions()
    return -torch.nn.functional.linear_cross_entropy(hidden, weight, labels, reduction="none", options=options)


def torch_chunk_128(hidden, weight, labels):
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=128)
    return -torch.nn.functional.linear_cross_entropy(hidden, weight, labels, reduction="none", options=options)


def trl(hidden, weight, labels):
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    return ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, 32768, None, 1.0, ("entropy",))[0]


def liger(hidden, weight, labels):
    from liger_kernel.chunked_loss.fused_linear_ppo import _SELECTIVE_LOGPROB_VOCAB_CHUNK_SIZE, _ChunkedSelectiveLogProbFunction

    return _ChunkedSelectiveLogProbFunction.apply(hidden, weight, labels, None, 1.0, _SELECTIVE_LOGPROB_VOCAB_CHUNK_SIZE)


def cut_cross_entropy(hidden, weight, labels):
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, labels, reduction="none", impl="torch_compile")


IMPLS = {
    "tiled (ours)": ours, "naive log_softmax": naive, "logsumexp - gather": logsumexp_gather,
    "torch linear_cross_entropy, auto": torch_auto, "torch linear_cross_entropy, 128": torch_chunk_128, "TRL chunked": trl,
    "Liger chunked": liger, "cut-cross-entropy, compiled": cut_cross_entropy,
}
GEMMS = "gemm", "gemm, reused output"


def tensors(shape, requires_grad=True):
    """hidden (N, H), weight (V, H), labels (N,), scaled so that the logits spread like those of a trained model."""
    tokens, width, words = shape
    torch.manual_seed(0)
    hidden, weight = torch.randn(tokens, width), torch.randn(words, width).mul_(3 / width**0.5)
    return hidden.requires_grad_(requires_grad), weight.requires_grad_(requires_grad), torch.randint(0, words, (tokens,))


def forward_backward(function, hidden, weight, labels):
    hidden.grad = weight.grad = None
    function(hidden, weight, labels).sum().backward()


def seconds(function, *inputs):
    began = time.perf_counter()
    function(*inputs)
    return time.perf_counter() - began


def available(hidden, weight, labels):
    """Names of the implementations that run here, after a warm-up; prints why the others do not."""
    names = []
    for name, function in IMPLS.items():
        try:
            function(hidden[:64], weight[:512], labels[:64] % 512).sum().backward()
            names.append(name)
        except Exception as error:  # whatever a peer's import or compiler raises is its row of the report
            print(f"{name} is missing: {type(error).__name__}: {str(error).splitlines()[0]}")
    return names


def measure_time(shape, threads, rounds):
    """{name: {"forward": s, "forward_backward": s}}, medians over rounds in which all take turns; GEMMs have "forward" only."""
    torch.set_num_threads(threads)
    torch.compiler.reset()  # the compiled peer takes a limited number of shapes
    hidden, weight, labels = tensors(shape)
    names, output = available(hidden, weight, labels), torch.empty(shape[0], shape[2])
    times = {name: {"forward": [], "forward_backward": []} for name in (*GEMMS, *names)}
    for _ in range(rounds + 1):  # the first is the warm-up of each at this shape
        with torch.no_grad():
            times["gemm"]["forward"].append(seconds(torch.mm, hidden, weight.T))
            times["gemm, reused output"]["forward"].append(seconds(lambda: torch.mm(hidden, weight.T, out=output)))
            for name in names:
                times[name]["forward"].append(seconds(IMPLS[name], hidden, weight, labels))
        for name in names:
            times[name]["forward_backward"].append(seconds(forward_backward, IMPLS[name], hidden, weight, labels))
    return {name: {kind: statistics.median(values[1:]) for kind, values in kinds.items() if values} for name, kinds in times.items()}


def peak_mb():
    """Linux's high-water mark of this process (getrusage would start from that of the process that started it)."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def measure_memory(name, shape):
    """Peak MB of one forward + backward beyond inputs and their gradients; called in a fresh process."""
    torch.set_num_threads(1)
    hidden, weight, labels = tensors(shape)
    forward_backward(IMPLS[name], hidden[:64].detach().requires_grad_(), weight[:512].detach().requires_grad_(), labels[:64] % 512)
    before = peak_mb()
    forward_backward(IMPLS[name], hidden, weight, labels)
    return peak_mb() - before - (hidden.numel() + weight.numel()) * 4 / 2**20


def measure_error(name, shape):
    """Largest error of logps, d hidden and d weight against float64, for the sum of 256 log-probs."""
    torch.compiler.reset()
    hidden, weight, labels = tensors(shape, requires_grad=False)
    hidden, labels, results = hidden[:256], labels[:256], []
    for function, dtype in ((IMPLS[name], torch.float32), (lambda *x: logprob.token_logps(*x, impl="reference")[0], torch.float64)):
        h, w = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        logps = function(h, w, labels)
        results.append((logps.detach(), *torch.autograd.grad(logps.sum(), (h, w))))
    return [(ours - exact).abs().max().item() for ours, exact in zip(*results)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["2048x576x49152"], help="tokens x width x words")
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, torch.get_num_threads()}))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", default=str(ROOT / "results" / "logprob" / "cpu.json"))
    parser.add_argument("--memory_of", help=argparse.SUPPRESS)  # how this script calls itself
    args = parser.parse_args()
    shapes = [tuple(int(size) for size in shape.split("x")) for shape in args.shapes]
    if args.memory_of:
        print(measure_memory(args.memory_of, shapes[0]))
        return
    lines, rows = [], []
    for shape in shapes:
        name_of_shape, extra = "x".join(map(str, shape)), {}
        for threads in args.threads:
            times = measure_time(shape, threads, args.rounds)
            gemm, reused = (times[name]["forward"] for name in GEMMS)
            table = ["", f"{name_of_shape}, threads {threads}: gemm {gemm:.3f} s, with reused output {reused:.3f} s", "",
                     "| | forward, s | gemm / forward | forward + backward, s | 4 gemm / (f + b) | extra MB | error of logps, dh, dW |",
                     "|---|---|---|---|---|---|---|"]
            for name in times.keys() - set(GEMMS) - extra.keys():
                words = [sys.executable, __file__, "--memory_of", name, "--shapes", name_of_shape]
                memory = float(subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
                extra[name] = memory, measure_error(name, shape)
            for name in times:
                if name in GEMMS:
                    continue
                (memory, errors), forward, both = extra[name], times[name]["forward"], times[name]["forward_backward"]
                cells = [name, f"{forward:.3f}", f"{gemm / forward:.2f} ({reused / forward:.2f})", f"{both:.3f}",
                         f"{4 * gemm / both:.2f} ({4 * reused / both:.2f})", f"{memory:.0f}", ", ".join(f"{e:.0e}" for e in errors)]
                table.append(f"| {' | '.join(cells)} |")
                rows.append({"shape": shape, "threads": threads, "name": name, "gemm": gemm, "gemm_reused_output": reused,
                             "forward": forward, "forward_backward": both, "extra_mb": memory, "errors": errors})
            print("\n".join(table), flush=True)
            lines += table
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python", "bench/bench_logprob.py", *sys.argv[1:]])
    record = {"command": command, "torch": torch.__version__, "machine": baseline.machine(), "rows": rows}
    output.write_text(json.dumps(record, indent=1) + "\n")
    head = [f"`{command}`, {baseline.machine()}, torch {torch.__version__}. In brackets: against the GEMM into a reused output."]
    output.with_suffix(".md").write_text("\n".join(head + lines) + "\n")


if __name__ == "__main__":
    main()
