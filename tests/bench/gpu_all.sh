#!/usr/bin/env bash
# All figures that need a GPU, in one command: tests, training steps, memory, drawing, attention, quantisation.
#
#     bash tests/bench/gpu_all.sh [FOLDER]          # about 8 minutes on an H100 or H200
#     bash tests/bench/gpu_all.sh --quick [FOLDER]  # tries the scripts with tiny sizes, also on a CPU; measures nothing
#
# FOLDER (default: $OUT, else ./output/gpu) gets results.json (what every part printed), summary.md (targets and what was
# reached), log.txt (everything that was said) and tests.txt. They are written anew after each part, so a run that is cut
# off leaves what it has. Every part is a process of its own with a limit in seconds; one that fails does not stop the others. Parts
# stand in the order of their importance, and none begins in the last 20 of BUDGET_S (default 480) seconds. ONLY="NAME NAME"
# runs some parts alone, such as what an earlier run had no time for. COMMIT names the commit where git's folder is missing.
#
# memory_table.json, where it is written, is for library/memory (then run bench_memory_table.py --write_docs).
# Commit results.json as docs/benchmarks/gpu_<date>.json, and the table of summary.md in docs/benchmarks/README.md.
#
# A machine that nothing can be installed on from the network: carry what it lacks as wheels. Beside torch >= 2.11,
# transformers, accelerate, safetensors, sentencepiece, tensorboard, tqdm, numpy, Pillow and pytest these are, for Python
# 3.12 on x86-64 (49 MB in all; bitsandbytes, 43 MB, is needed for nf4 alone):
#
#     python -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
#         --platform manylinux_2_24_x86_64 --platform manylinux2014_x86_64 -d .whl \
#         diffusers==0.42.1 importlib_metadata==10.2.0 toml==0.10.2 bitsandbytes==0.50.2
#
# peft, for the comparison with diffusers' transformer, is one more (and psutil, where it is missing).
#
# Wheels in ./.whl (or the folder WHEELS) are unpacked into a temporary folder on PYTHONPATH. A part whose package is missing
# is left out, and the summary says why.

set -u # under which bash before 4.4 takes an empty array for one that is not set, hence ${tiny[@]+...}
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
quick=0
if [ "${1:-}" = "--quick" ]; then quick=1; shift; fi
folder=${1:-${OUT:-output/gpu}}
budget=${BUDGET_S:-480}
python=${PYTHON:-python3}
wheels=${WHEELS:-.whl}
table_s=${TABLE_S:-90} # of the memory table's rows
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$folder" "$work/parts" || exit 1
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

if compgen -G "$wheels/*.whl" >"$work/wheels"; then
    xargs "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$work/site" \
        <"$work/wheels" && export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}"
fi

has() { "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

summarise() {
    "$python" tests/bench/gpu_summary.py "$work/parts" "$folder"
    cp "$work/log.txt" "$folder/log.txt"
    if [ -f "$work/parts/tests.out" ]; then cp "$work/parts/tests.out" "$folder/tests.txt"; fi
}

# part NAME LIMIT_S COMMAND...: runs a command; its output is the part's result.
part() {
    local name=$1 limit=$2 began=$SECONDS status signal=TERM
    shift 2
    [ "$name" = tests ] && signal=INT # pytest then says what it has found so far
    case " ${ONLY:-$name} " in *" $name "*) ;; *) return 0 ;; esac
    if [ $((budget - SECONDS)) -lt 20 ]; then
        skip "$name" "no time was left of $budget s"
        return 1
    fi
    [ "$limit" -gt $((budget - SECONDS)) ] && limit=$((budget - SECONDS))
    echo "== $name: $*" | tee -a "$work/log.txt" >&2
    timeout --signal=$signal --kill-after=10 "$limit" "$@" >"$work/parts/$name.out" 2>"$work/stderr"
    status=$?
    cat "$work/stderr" >>"$work/log.txt"
    printf '%s\n%s\n' "$status" $((SECONDS - began)) >"$work/parts/$name.status"
    [ $status -ne 0 ] && tail -n 5 "$work/stderr" >"$work/parts/$name.error"
    summarise
    return $status
}

skip() { # NAME REASON
    echo "$2" >"$work/parts/$1.skipped"
    echo "== $1: left out, $2" | tee -a "$work/log.txt" >&2
    summarise
}

steps() { # LIMIT_S NAMES...: training steps of the full model, all in one process
    local limit=$1 began=$SECONDS chosen=() name status
    shift
    for name in "$@"; do
        case " ${ONLY:-$name} " in *" $name "*) chosen+=("$name") ;; esac
    done
    [ ${#chosen[@]} -eq 0 ] && return 0
    if [ $((budget - SECONDS)) -lt 20 ]; then # a limit of 0 would be none to timeout
        for name in "${chosen[@]}"; do skip "$name" "no time was left of $budget s"; done
        return 1
    fi
    [ "$limit" -gt $((budget - SECONDS)) ] && limit=$((budget - SECONDS))
    echo "== ${chosen[*]}" | tee -a "$work/log.txt" >&2
    timeout --kill-after=10 "$limit" "$python" tests/bench/gpu_steps.py "$work/parts" --limit_s "$limit" \
        --only "${chosen[@]}" ${tiny[@]+"${tiny[@]}"} >"$work/stderr" 2>&1
    status=$?
    cat "$work/stderr" >>"$work/log.txt"
    for name in "${chosen[@]}"; do # the one that was cut off, and those behind it; all, where it did not begin
        if [ ! -f "$work/parts/$name.status" ] && [ ! -f "$work/parts/$name.skipped" ]; then
            : >"$work/parts/$name.out"
            tail -n 5 "$work/stderr" >"$work/parts/$name.error"
            printf '%s\n%s\n' "$status" $((SECONDS - began)) >"$work/parts/$name.status"
        fi
    done
    summarise
}

: >"$work/log.txt"
if [ $quick -eq 1 ]; then
    tiny=(--quick)
    drawing=(--preset tiny --size 32 --steps 2 --turns 1)
    attention=(--tokens 64 --batch 1 --repeats 1 --matmul_size 256)
    quantisation=(--help) # its errors alone take a minute on a CPU
    memory=(--size 64 --shrink 16 --layers 2 --limit_s 100)
else
    tiny=()
    drawing=(--preset full --size 256 1024 --steps 6 --turns 2)
    attention=(--tokens 1024 4096 --batch 4 --repeats 10)
    quantisation=(--tokens 16896)
    memory=(--limit_s 60)
fi

# The figures of a training step, the most important ones first.
steps 200 step_eager step_checkpointing step_streaming step_fp8 step_bf16_small step_fp8_small step_ragged step_selective \
    step_one_picture

# The whole program. It needs the autoencoder, and so diffusers.
room=$(df --output=avail -k /dev/shm 2>/dev/null | tail -n 1)
models=$work
if [ "${room:-0}" -gt $((16 * 1024 * 1024)) ]; then models=/dev/shm; fi # 11 GB are written there sooner than to a disk
if has diffusers; then
    part memory 180 env TMPDIR="$models" "$python" tests/bench/bench_gpu_memory.py "${memory[@]}"
else
    skip memory "the package diffusers is missing"
fi

part sampling 60 "$python" tests/bench/bench_sampling.py "${drawing[@]}"

workers=()
has xdist && workers=(-n 8) # most of them start programs, and wait for imports
if ! has pytest; then
    skip tests "the package pytest is missing"
elif [ $quick -eq 1 ]; then
    part tests 100 "$python" -m pytest tests/gpu -m gpu --collect-only
else
    part tests 200 "$python" -m pytest tests/gpu -m gpu -vv -rfEs --tb=short ${workers[@]+"${workers[@]}"}
fi

if [ $quick -eq 1 ]; then
    skip step_cudnn "a CPU has no such kernel"
elif has flash_attn || has flash_attn_interface; then
    steps 60 step_cudnn step_flash
else
    skip step_flash "the packages flash_attn and flash_attn_interface are missing"
    steps 60 step_cudnn
fi
if has diffusers && has peft; then
    steps 60 step_diffusers step_diffusers_checkpointing
else
    skip step_diffusers "the packages diffusers and peft are not both there"
fi
steps 60 step_fp16 step_fp32 # how a card without bf16 would be asked; this one has other units
steps 200 step_compiled step_compiled_small step_fp8_compiled step_fp8_compiled_small
part attention 120 "$python" tests/bench/bench_attention.py "${attention[@]}"
if has bitsandbytes; then
    part quantisation 120 "$python" tests/bench/bench_quantisation.py "${quantisation[@]}"
else
    skip quantisation "the package bitsandbytes is missing"
fi
if [ $quick -eq 1 ]; then
    part memory_table 100 "$python" tests/bench/bench_memory_table.py --help
elif part memory_table 150 "$python" tests/bench/bench_memory_table.py --measure --size_px 1024 --limit_s "$table_s" &&
    [ -f "$work/parts/memory_table.status" ]; then # not one of ONLY's parts otherwise
    cp library/memory/memory_table.json "$folder/"
fi

cat "$folder/summary.md"
[ $quick -eq 1 ] && echo "These were tiny sizes: the scripts were tried, and nothing was measured."
# 0 where everything that ran went well.
! compgen -G "$work/parts/*.error" >"$work/failed"
