#!/usr/bin/env bash
# Do the lowest and the newest versions that requirements.txt allows both work? In a fresh environment each: a run, and the fast tests.
#
#     bash bench/versions.sh [lowest] [newest]
set -euo pipefail
cd "$(dirname "$0")/.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
for which in "${@:-lowest newest}"; do for each in $which; do
    cp requirements*.txt "$scratch"
    [ "$each" = newest ] || sed -i -E 's/>=([0-9.]+)(,<[0-9.]+)?/==\1/' "$scratch/requirements.txt"
    python3 -m venv --clear "$scratch/venv"
    "$scratch/venv/bin/pip" install -qq --disable-pip-version-check -r "$scratch/requirements-dev.txt"
    echo "$each: $("$scratch/venv/bin/pip" freeze | grep -iE '^(torch|transformers|datasets|numpy|tqdm|peft|math-verify)==' | tr '\n' ' ')"
    "$scratch/venv/bin/python" -W error::FutureWarning -W error::DeprecationWarning repo.py --max_steps 2 --eval_problems 4 \
        --output_dir "$scratch/run-$each" > "$scratch/out" 2> "$scratch/err" || { cat "$scratch/err"; exit 1; }
    if grep -iE "warning|deprecat" "$scratch/err"; then exit 1; fi
    "$scratch/venv/bin/python" -m pytest -q -n 2 -m fast
done; done
