#!/usr/bin/env bash
# Measures training steps and drawing on a CPU: what docs/benchmarks/README.md shows under "Training steps" and "Drawing".
#
#     bash tests/bench/cpu_all.sh FOLDER     # about 20 minutes on 2 cores; nothing else should run meanwhile
#
# Writes steps.jsonl (one line a run of bench_step.py) and sampling_*.json into the folder.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:?give a folder for the results}
mkdir -p "$out"
OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)}
export OMP_NUM_THREADS

selective="--gradient_checkpointing --gradient_checkpointing_level=selective"
: > "$out/steps.jsonl"
for precision in bf16 fp32; do
  for flags in "" "--torch_compile" "--gradient_checkpointing" "$selective"; do
    # shellcheck disable=SC2086
    python tests/bench/bench_step.py --preset medium --precision "$precision" --steps "${STEPS:-4}" -- $flags 2> "$out/log.txt" >> "$out/steps.jsonl" \
      || tail -n 3 "$out/log.txt"
    tail -n 1 "$out/steps.jsonl" | cut -c 1-400
  done
done
if python -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('peft') is None)"; then
  for flags in "" "--gradient_checkpointing"; do
    # shellcheck disable=SC2086
    python tests/bench/bench_step.py --program diffusers --preset medium --steps "${STEPS:-4}" -- $flags 2> "$out/log.txt" >> "$out/steps.jsonl"
    tail -n 1 "$out/steps.jsonl" | cut -c 1-400
  done
else
  echo "The comparison with diffusers' transformer is left out: the package peft is missing"
fi
for negative in 128 16; do
  python tests/bench/bench_sampling.py --preset medium --size 256 512 --steps 3 --tokens 128 --negative_tokens "$negative" \
    > "$out/sampling_128_$negative.json"
done
