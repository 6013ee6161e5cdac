#!/usr/bin/env bash
# What is worth knowing on a machine with a GPU, in parts: bench/gpu.sh tests|logprob|cute|decode|step|lora
# Each writes its table as it comes. On an H100: tests 3 minutes, logprob 4, cute 2, decode 2; step and lora were not run to their end.
set -euo pipefail
cd "$(dirname "$0")/.."
for part in "$@"; do
    case $part in
        tests) GPU_TESTS=1 python -m pytest -q tests/test_gpu.py ;;
        logprob) python bench/bench_logprob.py --device cuda --shapes 32768x3584x151936 32768x1536x151936 8192x4096x131072 \
            16384x4096x131072 32768x4096x131072 --names ours "naive log_softmax" "TRL chunked" "Liger chunked" "verl torch" ;;
        cute) python bench/bench_logprob.py --device cuda --names ours "Liger scaled" --output results/logprob/cuda_cute.json ;;
        decode) python bench/bench_decode.py "Qwen2.5-0.5B, random" --output results/step/cuda_decode.md ;;
        step) python bench/bench_step.py --device cuda --peers TRL ;;
        lora) python bench/bench_step.py --device cuda --peers TRL --lora_rank 16 --output results/step/cuda_lora.json ;;
        *) echo "bench/gpu.sh: unknown part $part" >&2; exit 2 ;;
    esac
done
