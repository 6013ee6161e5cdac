#!/usr/bin/env bash
# What is worth knowing on a machine with a GPU, in parts: bench/gpu.sh tests|runs|logprob|cute|decode|attention|step|static|lora
# Each writes its table as it comes, to the folder $RESULTS (default: results/gpu). On an H200 tests took 2 to 3 minutes, runs 3, attention
# half a minute, step 4 and lora 3; on an H100 logprob took 4, cute 2, decode 2. static did not end within 3.
set -euo pipefail
cd "$(dirname "$0")/.."
export RESULTS=${RESULTS:-results/gpu}
mkdir -p "$RESULTS"
python -c "import torch; assert torch.cuda.is_available(), 'torch sees no GPU'"
for part in "$@"; do
    case $part in
        tests) GPU_TESTS=1 python -m pytest -q -n "${WORKERS:-8}" tests/test_gpu.py ;;
        runs)  # whole default runs, side by side
            runs=
            for words in "sft.py" "repo.py" "repo.py --lora_rank 16 --learning_rate 2e-3" "luffy.py --task diary" "prefixrl.py --task diary" \
                "grpo.py --task diary" "grpo.py --task diary --static_cache"; do
                name=$(tr -d ' -' <<< "${words//.py/_}")
                # shellcheck disable=SC2086
                (time -p python $words --output_dir "$RESULTS/runs/$name") > "$RESULTS/$name.txt" 2>&1 &
                runs+=" $!"
            done
            for run in $runs; do wait "$run" || echo "a run failed" >&2; done
            tail -n 4 "$RESULTS"/*_*.txt ;;
        logprob) python bench/bench_logprob.py --device cuda --shapes 8192x4096x131072 16384x4096x131072 32768x4096x131072 \
            --names ours "naive log_softmax" "TRL chunked" "Liger chunked" "verl torch" --output "$RESULTS/logprob.json" ;;
        cute) python bench/bench_logprob.py --device cuda --names ours "Liger scaled" --output "$RESULTS/logprob_cute.json" ;;
        decode) python bench/bench_decode.py "Qwen2.5-0.5B, random" --output "$RESULTS/decode.md" ;;
        attention) for kind in cudnn none; do echo "$kind"; python bench/bench_attention.py "$kind"; done | tee "$RESULTS/attention.md" ;;
        step) python bench/bench_step.py --device cuda --peers TRL --output "$RESULTS/step.json" ;;
        static) python bench/bench_step.py --device cuda --peers TRL --static_cache --output "$RESULTS/step_static.json" ;;
        lora) python bench/bench_step.py --device cuda --peers TRL --cases qwen-random --lora_rank 16 --output "$RESULTS/step_lora.json" ;;
        *) echo "bench/gpu.sh: unknown part $part" >&2; exit 2 ;;
    esac
done
