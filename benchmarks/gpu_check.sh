#!/usr/bin/env bash
# Proves everything that a GPU can prove, on a bare machine without network; elsewhere each part says what it could not do.
#
#   benchmarks/gpu_check.sh [--part build|test|kernels|cutlass|models|sanitize|profile] OUT
#
# Needs python3 with torch, triton and pytest (PYTHON=... names another), nvcc and ninja for `build`, compute-sanitizer and
# ncu for the last two. A part stays under 10 minutes. OUT gets at most 8 files of at most 16 MiB. A failing step never
# stops the next; the summary comes last, also in OUT/summary.md. The exit code is 1 where a step failed, 2 where it
# cannot start, and 0 where nothing is red: a missing GPU is told, not red.
set -uo pipefail

usage="usage: benchmarks/gpu_check.sh [--part build|test|kernels|cutlass|models|sanitize|profile] OUT"
PARTS=(build test kernels cutlass models sanitize profile)
out=""
while [ $# -gt 0 ]; do
    case "$1" in
    --part)
        [[ " ${PARTS[*]} " == *" ${2:-} "* && -n "${2:-}" ]] || { echo "unknown part '${2:-}'; $usage" >&2; exit 2; }
        PARTS=("$2")
        shift 2
        ;;
    -h | --help) echo "$usage"; exit 0 ;;
    -*) echo "unknown option '$1'; $usage" >&2; exit 2 ;;
    *)
        [ -z "$out" ] || { echo "one OUT only; $usage" >&2; exit 2; }
        out="$1"
        shift
        ;;
    esac
done
[ -n "$out" ] || { echo "$usage" >&2; exit 2; }
mkdir -p "$out" || exit 2
out="$(cd "$out" && pwd)"
cd "$(dirname "$0")/.." || exit 2

PYTHON="${PYTHON:-python3}"
"$PYTHON" -c 'import torch' 2>/dev/null || { echo "$PYTHON has no torch; name one that has: PYTHON=..." >&2; exit 2; }
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
GPU="$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")')"
CC="$([ -z "$GPU" ] || "$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')"
log="$out/log.txt" steps="$out/steps.txt"
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
part=""
# A module of the benchmarks, by name: they are found whether installed or not.
MODULE=("$PYTHON" -c "import sys; from fused_resnet.cli import load_benchmarks; sys.exit(load_benchmarks(sys.argv.pop(1)).main())")

# step NAME SECONDS COMMAND...: runs it, keeps its output, never stops.
step() {
    local name="$1" seconds="$2" began=$SECONDS code
    shift 2
    echo "== $part: $name" | tee -a "$log"
    timeout --kill-after=10 "$seconds" "$@" >"$scratch/step" 2>&1
    code=$?
    tail -c 400000 "$scratch/step" | tr '\r' '\n' >>"$log"
    case $code in
    0) result=ok ;;
    124 | 137) result="FAILED: stopped after $seconds s" ;;
    *) result="FAILED: exit code $code" ;;
    esac
    [ $code -eq 0 ] && [ "${show:-}" != 1 ] || tail -n 60 "$scratch/step"
    echo "$part | $name | $result | $((SECONDS - began)) s" | tee -a "$steps"
}

skip() { echo "$part | $1 | not done: $2 | 0 s" | tee -a "$steps"; }

gpu() { [ -n "$GPU" ] || { skip "$1" "no GPU here"; return 1; }; }

tool() { command -v "$2" >/dev/null || { skip "$1" "no $2 here"; return 1; }; }

build() {
    if tool "extension" ninja; then
        step "extension" 500 env FUSED_RESNET_REQUIRE_EXT=1 ${CC:+FUSED_RESNET_CUDA=1 TORCH_CUDA_ARCH_LIST="${CC%?}.${CC: -1}"} \
            "$PYTHON" setup.py build_ext --inplace
    fi
    step "info" 60 "$PYTHON" -m fused_resnet info
}

tests() {
    if gpu "GPU tests"; then
        step "GPU tests" 540 "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu tests/gpu --tb=line -rfE
    else
        step "GPU tests can be collected" 120 "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu tests/gpu --collect-only
    fi
}

kernels() {
    gpu "kernels" || { step "one kernel on the CPU" 120 "$PYTHON" -m fused_resnet bench-ops --ops add_relu --model resnet18 \
        --batch 1 --rivals eager --rounds 3 --out "$scratch/ops.csv"; return; }
    local small=(--device cuda --rivals "eager,fused calls" --out "$out/ops.csv")
    step "bf16, ours as chosen" 150 "$PYTHON" -m fused_resnet bench-ops "${small[@]}" --dtype bf16
    for backend in triton cpp; do
        step "bf16, $backend" 110 "$PYTHON" -m fused_resnet bench-ops "${small[@]}" --dtype bf16 --backend "$backend" \
            --model resnet50
    done
    show=1 step "launch overhead" 25 "${MODULE[@]}" launch_overhead --device cuda
    step "fp32, ours as chosen" 90 "$PYTHON" -m fused_resnet bench-ops "${small[@]}" --dtype fp32 --model resnet50
    step "bf16, beside torch.compile" 110 "$PYTHON" -m fused_resnet bench-ops --device cuda --dtype bf16 --model resnet50 \
        --ops bn_act,add_relu,bn_act_pool --rivals compile --out "$out/ops-compile.csv"
}

# The convolutions of CUTLASS beside cuDNN's fused calls. What it builds stays: `build` has the extension without them.
cutlass() {
    gpu "convolutions" || return 0
    tool "convolutions" ninja || return 0
    [ -n "${CUTLASS_PATH:-}" ] || "$PYTHON" -c 'import sys, importlib.util as u; sys.exit(not u.find_spec("cutlass_library"))' ||
        { skip "convolutions" "no headers of CUTLASS here (nvidia-cutlass)"; return 0; }
    step "extension with CUTLASS" 300 env FUSED_RESNET_REQUIRE_EXT=1 FUSED_RESNET_CUDA=1 FUSED_RESNET_CUTLASS=1 \
        TORCH_CUDA_ARCH_LIST="${CC%?}.${CC: -1}" "$PYTHON" setup.py build_ext --inplace
    step "GPU tests" 120 "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu tests/gpu/test_conv_cutlass.py --tb=line -rfE
    for dtype in bf16 fp16; do
        show=1 step "$dtype, beside the library's fused calls" 80 "$PYTHON" -m fused_resnet bench-ops --device cuda --dtype "$dtype" \
            --ops conv_bias_act,conv_bn_act --directions infer --backend cpp --model resnet50 --rivals "fused calls" \
            --out "$scratch/ops.csv"
    done
}

models() {
    gpu "models" || { step "a small job on the CPU" 200 "$PYTHON" -m fused_resnet bench-models --model resnet18 --mode infer \
        --batches 1 --size 64 --rivals eager --rounds 3 --out "$scratch/models.csv"; return; }
    local quick="eager,channels_last,fused calls,onnxruntime,fused_resnet,as is"
    local graphs="channels_last + CUDA graph,fused calls + CUDA graph,fused_resnet + CUDA graph"
    local model=("$PYTHON" -m fused_resnet bench-models --device cuda --out "$out/models.csv" --limit 150)
    step "layers" 60 "$PYTHON" -m fused_resnet bench-all --parts layers --device cuda --out "$out"
    step "inference" 130 "${model[@]}" --mode infer --dtypes bf16,fp16 --batches 256,1 --rivals "$quick,$graphs"
    step "training" 130 "${model[@]}" --mode train --dtypes bf16 --batches 256 --rivals "$quick,$graphs"
    step "training, other plans" 130 "${model[@]}" --mode train --dtypes bf16 --batches 256 \
        --rivals "channels_last,fused_resnet,ours: fast,ours: low,ours: Gram,ours: prologue"
    step "torch.compile" 200 "${model[@]}" --mode infer,train --dtypes bf16 --batches 128 \
        --rivals "channels_last,compile,compile default,fused_resnet"
}

sanitize() {
    gpu "sanitize" || return 0
    tool "sanitize" compute-sanitizer || return 0
    # The caching allocator hides overruns: each tensor gets an allocation of its own. Shared memory alone is watched by
    # racecheck, whose word on wgmma and TMA is not trusted.
    local run=("${MODULE[@]}" small_kernels --device cuda)
    for check in memcheck racecheck; do
        for backend in triton cpp auto; do
            step "$check, $backend" 95 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$check" \
                --error-exitcode 1 --print-limit 20 "${run[@]}" --backend "$backend"
        done
    done
}

profile() {
    gpu "profile" || return 0
    tool "profile" ncu || return 0
    local metrics="dram__bytes_read.sum,dram__bytes_write.sum,gpu__time_duration.sum"
    step "bytes and time per kernel" 400 bash -c 'calls="$1"; shift; "$@" >"$calls"; code=$?; cat "$calls"; exit $code' - \
        "$scratch/calls" ncu --clock-control none --profile-from-start off --print-units base --metrics "$metrics" \
        --csv --log-file "$out/ncu.csv" "${MODULE[@]}" small_kernels --device cuda --backend triton --batch 64 --profile
    if grep -q ERR_NVGPUCTRPERM "$out/ncu.csv" "$log" 2>/dev/null; then
        skip "bytes against the traffic model" "this machine refuses hardware counters"
    else
        show=1 step "bytes against the traffic model" 60 "${MODULE[@]}" gpu_summary "$out" --traffic "$scratch/calls"
    fi
}

touch "$steps"
for part in "${PARTS[@]}"; do
    sed -i "/^$part |/d" "$steps" # done anew
    case "$part" in test) tests ;; *) "$part" ;; esac
done
for file in "$out"/*.csv "$log"; do # 16 MiB at most, the end of a log matters
    [ -f "$file" ] && [ "$(wc -c <"$file")" -gt 16000000 ] && tail -c 15000000 "$file" >"$scratch/cut" && mv "$scratch/cut" "$file"
done
"${MODULE[@]}" gpu_summary "$out" || cat "$steps"
! grep -q "| FAILED" "$steps"
