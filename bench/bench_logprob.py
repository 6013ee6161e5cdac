"""Speed, memory and error of the log-prob paths against the GEMMs alone and against other libraries.

    python bench/bench_logprob.py                                   CPU: 2048 tokens, the head of SmolLM2-135M, one thread and all
    python bench/bench_logprob.py --shapes 4096x256x512 --rounds 9 --output small.json
    python bench/bench_logprob.py --device cuda                     bfloat16: 32768 tokens, heads of 151936 words, widths 1536 and 3584
    python bench/bench_logprob.py --device cuda --names ours --tile 8192x8192 --output tile.json        another tile of ours

Peers are measured when they are installed (pip install --no-deps trl liger-kernel verl cut-cross-entropy; pip install accelerate
triton nvidia-cutlass-dsl); the table names those that are not. All implementations run in turn within each round of one process, and a
column is the median over rounds, because machines are shared: trust the ratios, not the seconds. `gemm` is torch.mm(hidden, weight.T),
2NHV operations, writing a fresh (N, V) tensor as the naive form does; `gemm, reused output` writes into one that exists (on CUDA:
float32 tiles of the size that `triton` works on). TFLOP/s count 8NHV operations, four GEMMs. Peak memory is that of a fresh process per
implementation (on CUDA of this one, by max_memory_allocated), less what its inputs, their gradients and a warm-up took. Errors are
against float64 of the same inputs on 256 tokens.
"""

import argparse
import importlib.util
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # engine/; bench/ itself is there already

import measure  # noqa: E402
from engine import logprob  # noqa: E402


def naive(hidden, weight, labels):
    return torch.log_softmax((hidden @ weight.T).float(), -1).gather(-1, labels[:, None])[:, 0]


def logsumexp_gather(hidden, weight, labels):
    logits = hidden @ weight.T
    return logits.gather(-1, labels[:, None])[:, 0] - logits.logsumexp(-1)


def ours(hidden, weight, labels):
    return logprob.token_logps(hidden, weight, labels, impl="triton" if hidden.is_cuda else "tiled")[0]


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


def liger_scaled(hidden, weight, labels):
    """Liger's kernels in CuTe DSL on Hopper; without the package, the torch code that they replace."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    return -LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, labels, 1.0, -100, 1, True)[0]


def without_init(*packages):
    """Make packages importable without their __init__, which imports what the kernels do not need (of verl: ray, tensordict)."""
    for name in packages:
        if name not in sys.modules:
            spec = importlib.util.find_spec(name)
            if spec is None:
                raise ModuleNotFoundError(f"No module named {name!r}")
            sys.modules[name] = importlib.util.module_from_spec(spec)


def verl(hidden, weight, labels):
    without_init("verl", "verl.utils", "verl.utils.experimental")
    from verl.utils.experimental.torch_functional import FusedLinearForPPOFunction

    return FusedLinearForPPOFunction.apply(hidden, weight, labels)[0]


def verl_triton(hidden, weight, labels):
    without_init("verl", "verl.utils", "verl.utils.kernel")
    from verl.utils.kernel.linear_cross_entropy import LinearCrossEntropy

    return LinearCrossEntropy.apply(hidden, weight, labels, 1.0, "none")[0]


def cut_cross_entropy(hidden, weight, labels):
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, labels, reduction="none", impl="cce" if hidden.is_cuda else "torch_compile")


IMPLS = {
    "ours": ours, "naive log_softmax": naive, "logsumexp - gather": logsumexp_gather,
    "torch linear_cross_entropy, auto": torch_auto, "torch linear_cross_entropy, 128": torch_chunk_128, "TRL chunked": trl,
    "Liger chunked": liger, "Liger scaled": liger_scaled, "verl torch": verl, "verl Triton": verl_triton,
    "cut-cross-entropy": cut_cross_entropy,
}
GEMMS = "gemm", "gemm, reused output"


def tensors(shape, device, requires_grad=True):
    """hidden (N, H), weight (V, H), labels (N,), scaled so that the logits spread like those of a trained model; bfloat16 on CUDA."""
    tokens, width, words = shape
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(tokens, width), torch.randn(words, width).mul_(3 / width**0.5), torch.randint(0, words, (tokens,))
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return *(x.to(device, dtype).requires_grad_(requires_grad) for x in (hidden, weight)), labels.to(device)


def tiled_gemm(hidden, weight, output):
    """hidden @ weight.T into the buffer `output`: whole on the CPU, tile by tile, as `triton` does, on CUDA."""
    if not hidden.is_cuda:
        return torch.mm(hidden, weight.T, out=output)
    num_rows, num_words = logprob.GPU_TILE
    for words in weight.split(num_words):
        for rows in hidden.split(num_rows):
            torch.mm(rows, words.T, out_dtype=output.dtype, out=output[: len(rows) * len(words)].view(len(rows), len(words)))


def forward_backward(function, hidden, weight, labels):
    hidden.grad = weight.grad = None
    function(hidden, weight, labels).sum().backward()


def seconds(function, *inputs):
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    began = time.perf_counter()
    function(*inputs)
    synchronize()
    return time.perf_counter() - began


def available(wanted, shape, device):
    """Those of the wanted implementations that run here, after a warm-up; prints why the others do not."""
    hidden, weight, labels = tensors((256, shape[1], 1024), device)
    names = []
    for name in wanted:
        try:
            IMPLS[name](hidden, weight, labels).sum().backward()
            names.append(name)
        except Exception as error:  # whatever a peer's import or compiler raises is its row of the report
            print(f"{name} is missing: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}", flush=True)
    return names


def measure_time(wanted, shape, device, threads, rounds):
    """{name: {"forward": s, "forward_backward": s}}, medians over rounds in which all take turns; GEMMs have "forward" only.

    What does not fit into a GPU's memory is named and left out.
    """
    torch.set_num_threads(threads)
    torch.compiler.reset()  # the compiled peer takes a limited number of shapes
    names, (hidden, weight, labels) = available(wanted, shape, device), tensors(shape, device)
    size = logprob.GPU_TILE[0] * logprob.GPU_TILE[1] if device == "cuda" else (shape[0], shape[2])
    output = torch.empty(size, device=device)
    times = {name: {"forward": [], "forward_backward": []} for name in (*GEMMS, *names)}
    for _ in range(rounds + 1):  # the first is the warm-up of each at this shape
        with torch.no_grad():
            times["gemm"]["forward"].append(seconds(torch.mm, hidden, weight.T))
            times["gemm, reused output"]["forward"].append(seconds(tiled_gemm, hidden, weight, output))
        for name in [name for name in times if name not in GEMMS]:
            try:
                with torch.no_grad():
                    times[name]["forward"].append(seconds(IMPLS[name], hidden, weight, labels))
                times[name]["forward_backward"].append(seconds(forward_backward, IMPLS[name], hidden, weight, labels))
            except torch.cuda.OutOfMemoryError:
                print(f"{name} does not fit into the memory of {torch.cuda.get_device_name()}", flush=True)
                del times[name]
                hidden.grad = weight.grad = None
                torch.cuda.empty_cache()
    return {name: {kind: statistics.median(values[1:]) for kind, values in kinds.items() if values} for name, kinds in times.items()}


def peak_mb(device):
    """Peak memory of this process so far (getrusage would start from that of the process that started it)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def measure_memory(name, shape, device):
    """Peak MB of one forward + backward beyond inputs and their gradients; on the CPU called in a fresh process."""
    if device == "cpu":
        torch.set_num_threads(1)
    hidden, weight, labels = tensors(shape, device)
    forward_backward(IMPLS[name], hidden[:64].detach().requires_grad_(), weight[:512].detach().requires_grad_(), labels[:64] % 512)
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() / 2**20 if device == "cuda" else peak_mb(device)
    forward_backward(IMPLS[name], hidden, weight, labels)
    return peak_mb(device) - before - (hidden.numel() + weight.numel()) * hidden.element_size() / 2**20


def measure_error(name, shape, device):
    """Largest error of logps, d hidden and d weight against float64, for the sum of 256 log-probs."""
    torch.compiler.reset()
    hidden, weight, labels = tensors(shape, device, requires_grad=False)
    hidden, labels, results = hidden[:256], labels[:256], []
    for function, dtype in ((IMPLS[name], hidden.dtype), (lambda *x: logprob.token_logps(*x, impl="reference")[0], torch.float64)):
        h, w = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        logps = function(h, w, labels)
        results.append((logps.detach(), *torch.autograd.grad(logps.sum(), (h, w))))
    return [(ours - exact).abs().max().item() for ours, exact in zip(*results)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shapes", nargs="+", help="tokens x width x words")
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, torch.get_num_threads()}), help="of the CPU")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--names", nargs="+", choices=IMPLS, default=list(IMPLS), metavar="NAME", help=f"of {', '.join(IMPLS)}")
    parser.add_argument("--tile", help="tokens x words of a tile of ours on a GPU; default: that of engine/logprob.py")
    parser.add_argument("--output", help="a .json file; a table is written beside it. Default: results/logprob/DEVICE.json")
    parser.add_argument("--memory_of", help=argparse.SUPPRESS)  # how this script calls itself
    args = parser.parse_args()
    given = args.shapes or (["2048x576x49152"] if args.device == "cpu" else ["32768x1536x151936", "32768x3584x151936"])
    shapes = [tuple(int(size) for size in shape.split("x")) for shape in given]
    if args.memory_of:
        print(measure_memory(args.memory_of, shapes[0], args.device))
        return
    if args.tile:
        logprob.GPU_TILE = tuple(int(size) for size in args.tile.split("x"))
    machine = measure.machine() if args.device == "cpu" else torch.cuda.get_device_name()
    lines, rows = [], []
    for shape in shapes:
        name_of_shape, extra = "x".join(map(str, shape)), {}
        for threads in args.threads if args.device == "cpu" else [torch.get_num_threads()]:
            times = measure_time(args.names, shape, args.device, threads, args.rounds)
            gemm, reused = (times[name]["forward"] for name in GEMMS)
            where = f"threads {threads}" if args.device == "cpu" else "cuda, bfloat16"
            table = ["", f"{name_of_shape}, {where}: gemm {gemm:.4f} s, with reused output {reused:.4f} s", "",
                     "| | forward, s | gemm / forward | forward + backward, s | 4 gemm / (f + b) | TFLOP/s | extra MB "
                     "| error of logps, dh, dW |",
                     "|---" * 8 + "|"]
            for name in times.keys() - set(GEMMS) - extra.keys():
                words = [sys.executable, __file__, "--memory_of", name, "--shapes", name_of_shape, "--device", args.device]
                if args.device == "cuda":
                    memory = measure_memory(name, shape, args.device)
                else:
                    memory = float(subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
                extra[name] = memory, measure_error(name, shape, args.device)
            for name in times:
                if name in GEMMS:
                    continue
                (memory, errors), forward, both = extra[name], times[name]["forward"], times[name]["forward_backward"]
                cells = [name, f"{forward:.4f}", f"{gemm / forward:.2f} ({reused / forward:.2f})", f"{both:.4f}",
                         f"{4 * gemm / both:.2f} ({4 * reused / both:.2f})",
                         f"{8 * shape[0] * shape[1] * shape[2] / both / 1e12:.3g}", f"{memory:.0f}", ", ".join(f"{e:.0e}" for e in errors)]
                table.append(f"| {' | '.join(cells)} |")
                rows.append({"shape": shape, "where": where, "name": name, "gemm": gemm, "gemm_reused_output": reused,
                             "forward": forward, "forward_backward": both, "extra_mb": memory, "errors": errors})
            print("\n".join(table), flush=True)
            lines += table
    output = Path(args.output or ROOT / "results" / "logprob" / f"{args.device}.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python", "bench/bench_logprob.py", *sys.argv[1:]])
    record = {"command": command, "torch": torch.__version__, "machine": machine, "rows": rows}
    output.write_text(json.dumps(record, indent=1) + "\n")
    head = [f"`{command}`, {machine}, torch {torch.__version__}. In brackets: against the GEMM into a reused output."]
    output.with_suffix(".md").write_text("\n".join(head + lines) + "\n")


if __name__ == "__main__":
    main()
