#!/usr/bin/env bash
# What a machine with one CUDA GPU can prove, in three calls that each end within 600 s (SECONDS_IN_ALL), nothing installed:
#   OUT=folder PYTHON=python3 bash tests/gpu.sh [1|2|3]      (`make gpu` is call 1, `make gpu PART=2` the second)
# It needs an interpreter with torch, Triton, Transformers, PEFT and pytest. Wheels that it lacks (datasets and jsonargparse for training,
# trl, liger-kernel and cut-cross-entropy to compare with) may lie in WHEELS=.whl: they are unpacked beside it, into a temporary folder.
# In a call what matters most comes first. Whatever has been written survives a stop, and `summary.txt` says what is missing and why.
#
# Estimates for an H100 or H200, whose products reach about 600 TFLOP/s and whose memory moves 3 to 4 TB/s:
#   1  tests of everything that runs on a GPU only, in 8 processes: some 400, compiling 250 kernels of about 0.5 s      60 - 120 s
#      head benchmark. A block of 8192 x 151936 x 4096 has 15 rounds of about 6 sides of 6 to 10 NVD (5.1 TFLOP each),
#      5 to 8 s, and float64 and compiling before it; nine tasks, five shapes, the most important first                200 - 330 s
#      compute-sanitizer over the row kernels, in what is left                                                         40 - 100 s
#   2  training at the widths of an 8B model: 2.8e9 weights in 8 layers, 5.6 GB to write and to read. Both sides must agree on a toy
#      model first: 4 starts, 80 s. A step of 8 pairs has 16k tokens: 8 x 2.2e9 x 16k = 0.3 PFLOP, 1 s; with its start a run of 6 steps
#      takes 25 - 40 s, and there are LoRA and full on five sides                                                      250 - 400 s
#      the longest LoRA sequence in 24 GiB: 7 lengths a side, 5 - 12 s each, in what is left
#   3  bandwidth of the row kernels by warps and columns at a time: 64 launches, compiling mostly                       40 - 80 s
#      agreement 80 s, profiles of a step (LoRA, full) 80 s, and the longest LoRA sequence in 80 GiB (or what the card has) and 24: up to 10
#      lengths a side; two sequences of 64k tokens are 2.3 PFLOP and 2 PFLOP of attention, 10 s with the start, in what is left
set -uo pipefail
case "${1:-1}" in
    -h | --help) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" && exit 0 ;;
    1 | 2 | 3) part=${1:-1} ;;
    *) echo "tests/gpu.sh: there is no call ${1}; take 1, 2 or 3, or --help" >&2 && exit 2 ;;
esac
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-gpu}
device=${DEVICE:-cuda}                # cpu goes through the calls with toy sizes
wheels=${WHEELS:-.whl}
mkdir -p "$out"
out=$(cd "$out" && pwd)
summary="$out/summary.txt"
: >"$summary"
: >"$out/bench.txt"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false TRL_EXPERIMENTAL_SILENCE=1
started=$SECONDS
total=${SECONDS_IN_ALL:-570}
failed=0
quick=()
[ "$device" = cpu ] && quick=(--quick)

say() { echo "$*" | tee -a "$summary"; }
left() { echo $((total - (SECONDS - started))); }
ran() { # ran NAME STATUS
    if [ "$2" = 0 ]; then say "$1: passed, $((SECONDS - started)) s in"; else say "$1: FAILED (exit status $2; 124 and 137 are out of time), $((SECONDS - started)) s in" && failed=1; fi
}
within() { # within SECONDS COMMAND...: ends it, and what it started, 10 s after a first request at the latest
    local seconds=$(($1 < $(left) - 15 ? $1 : $(left) - 15))
    shift
    if [ "$seconds" -lt 10 ]; then return 124; fi
    timeout -k 10 "$seconds" "$@"
}

if compgen -G "$wheels/*.whl" >/dev/null; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    if "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$wheels"/*.whl >>"$summary" 2>&1; then
        export PYTHONPATH="$PYTHONPATH:$site"
    else
        say "the wheels in $wheels cannot be installed: what needs them is left out"
    fi
fi
DEVICE="$device" "$python" - <<'PYTHON' | tee -a "$summary" || exit 2
import importlib.util, os, sys, torch
if os.environ["DEVICE"] == "cuda":
    if not torch.cuda.is_available():
        sys.exit(f"tests/gpu.sh: torch {torch.__version__} of {sys.executable} sees no CUDA device; name another interpreter with PYTHON=...")
    gpu = torch.cuda.get_device_properties(0)
    print(f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB")
print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, CUDA {torch.version.cuda}")
names = ("triton", "transformers", "peft", "datasets", "jsonargparse", "trl", "liger_kernel", "cut_cross_entropy", "matplotlib", "xdist")
print("not installed:", ", ".join(name for name in names if importlib.util.find_spec(name) is None) or "nothing of what is used")
PYTHON
say "call $part, commit $(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)"

call_1() {
    local files workers=() limit
    mapfile -t files < <(grep -rlE --include='test_*.py' 'mark\.gpu\b' tests | sort) # the others may need what this interpreter lacks
    "$python" -c 'import xdist' 2>/dev/null && workers=(-n 8)
    within 240 "$python" -m pytest -m "${MARKED:-gpu}" "${files[@]}" "${workers[@]}" -o timeout=90 --durations 15 -rfEs >"$out/tests.txt" 2>&1
    ran "tests" $?
    tail -n 3 "$out/tests.txt"

    limit=$(($(left) - 160)) # a side that has begun is finished
    if ! benchmark $((limit + 60)) head --limit "$limit" && [ "$(left)" -gt 180 ]; then # a peer has taken the process with it
        limit=$(($(left) - 100))
        benchmark $((limit + 30)) head --limit "$limit" --append --sides fastalign torch TRL
    fi

    if command -v compute-sanitizer >/dev/null && [ "$device" = cuda ]; then
        # PyTorch's allocator would hide an access beyond a tensor inside its own blocks.
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 within 120 compute-sanitizer --tool memcheck --error-exitcode 9 --print-limit 20 \
            "$python" -m pytest -p no:xdist tests/head/test_cuda_rows.py -k "tile and 2049 or narrow and 2049" >"$out/sanitizer.txt" 2>&1
        ran "compute-sanitizer memcheck of the row kernels" $?
        tail -n 2 "$out/sanitizer.txt"
    else
        say "compute-sanitizer: absent (not on PATH), memory accesses of the row kernels are unproven here"
    fi
}

benchmark() { # benchmark SECONDS NAME OPTIONS...: after a limit of its own it begins nothing, and it is ended later than that
    local seconds=$1 name=$2
    shift 2
    within "$seconds" "$python" -m bench "$name" "${quick[@]}" --device "$device" --output "$out" "$@" >>"$out/bench.txt" 2>&1
    local status=$?
    ran "bench $name" $status
    tail -n 60 "$out/bench.txt"
    return $status
}

call_2() {
    benchmark $(($(left) - 15)) gpu --limit $(($(left) - 35)) --parts speed longest --gib 24
}

call_3() {
    benchmark 100 rows
    benchmark $(($(left) - 15)) gpu --limit $(($(left) - 35)) --parts profile longest --gib 80 24
}

"call_$part"
say "results in $out, $((SECONDS - started)) s"
exit $failed
