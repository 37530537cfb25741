#!/usr/bin/env bash
# What a machine with one CUDA GPU can prove, in under 9 minutes, with an interpreter that has torch, triton and pytest:
#   PYTHON=python3 OUT=folder bash tests/gpu.sh      (`make gpu` is the same; nothing is installed)
# OUT receives tests.txt, tests.xml, sanitizer.txt, head_<GPU>.csv and .md, and summary.txt. Whatever is there survives a stop.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-gpu}
mkdir -p "$out"
summary="$out/summary.txt"
: >"$summary"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
started=$SECONDS
total=${SECONDS_IN_ALL:-510}
failed=0

say() { echo "$*" | tee -a "$summary"; }
left() { echo $((total - (SECONDS - started))); }
result() { # result NAME STATUS
    if [ "$2" = 0 ]; then say "$1: passed, $((SECONDS - started)) s in"; else say "$1: FAILED (exit status $2; 124 is out of time), $((SECONDS - started)) s in" && failed=1; fi
}

"$python" - <<'PYTHON' | tee -a "$summary" || exit 2
import sys, torch
if not torch.cuda.is_available():
    sys.exit(f"make gpu: torch {torch.__version__} of {sys.executable} sees no CUDA device; name another interpreter with PYTHON=...")
gpu = torch.cuda.get_device_properties(0)
print(f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, Python {sys.version.split()[0]}, torch {torch.__version__}, CUDA {torch.version.cuda}")
PYTHON
say "commit $(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)"

mapfile -t files < <(grep -rlE --include='test_*.py' 'mark\.gpu\b' tests | sort) # the others may need what this interpreter lacks
timeout 210 "$python" -m pytest -m gpu "${files[@]}" --junitxml "$out/tests.xml" --durations 15 -rfEs >"$out/tests.txt" 2>&1
result "tests" $?
tail -n 3 "$out/tests.txt"

if command -v compute-sanitizer >/dev/null; then
    # PyTorch's allocator would hide an access beyond a tensor inside its own blocks.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 100 compute-sanitizer --tool memcheck --error-exitcode 9 --print-limit 20 \
        "$python" -m pytest tests/head/test_cuda_rows.py -k "tile and (2049 or 301) or narrow and 2049" >"$out/sanitizer.txt" 2>&1
    result "compute-sanitizer memcheck of the row kernels" $?
    tail -n 2 "$out/sanitizer.txt"
else
    say "compute-sanitizer: absent (not on PATH), memory accesses of the row kernels are unproven here"
fi

limit=$(($(left) - 40)) # a side that has begun is finished
timeout "$(left)" "$python" -m bench head --device cuda --limit "$limit" --output "$out" >"$out/bench.txt" 2>&1
result "bench head" $?
tail -n 5 "$out/bench.txt"
say "results in $out, $((SECONDS - started)) s"
exit $failed
