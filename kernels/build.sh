#!/usr/bin/env bash
# Build the native library into build/native where that can be done, and say in one line how it went:
#   bash kernels/build.sh PYTHON [test]     with `test` its own tests are built and run too
# Without a C++ compiler, or when the build fails, fastalign computes in torch, and this ends with 0; with FASTALIGN_NATIVE=1
# it ends with an error. A failing test is an error always.
set -uo pipefail
cd "$(dirname "$0")/.."
python=$1
goal=${2:-}
folder=build/native
log=$folder/build.log

without() { # without REASON: what is left is torch
    rm -f "$folder"/libfastalign_native.*
    if [ "${FASTALIGN_NATIVE:-}" = 1 ]; then
        echo "native row kernels: $1, and FASTALIGN_NATIVE=1 asks for them" >&2
        exit 1
    fi
    echo "native row kernels: $1, using torch"
    exit 0
}

compiler() { # the first C++ compiler that runs; CXX wins
    local name
    for name in ${CXX:-c++ g++ clang++}; do
        command -v "$name" && return
    done
    return 1
}

find_cmake() {
    for name in "$(dirname "$python")/cmake" cmake; do
        "$name" --version >/dev/null 2>&1 && echo "$name" && return
    done
    "$python" -m pip install --quiet --progress-bar off 'cmake>=3.20' >>"$log" 2>&1 && echo "$(dirname "$python")/cmake"
}

build() {
    "$cmake" -S . -B "$folder" -DCMAKE_CXX_COMPILER="$cxx" && "$cmake" --build "$folder" --parallel --target "$([ -n "$goal" ] && echo all || echo fastalign_native)"
}

cxx=$(compiler) || without "no C++ compiler found"
mkdir -p "$folder"
: >"$log"
cmake=$(find_cmake) || without "no CMake found, and pip could not install it"
if ! build >>"$log" 2>&1; then # once more from nothing: the folder may be of another machine or compiler
    find "$folder" -mindepth 1 ! -name build.log -delete
    if ! build >"$log" 2>&1; then
        grep -n -m 20 -E 'error|Error' "$log" >&2 || tail -n 20 "$log" >&2
        without "build failed (all of it is in $log)"
    fi
fi
"$python" - "$folder" <<'PYTHON' || without "the library that was built does not load"
import ctypes, sys
from pathlib import Path
library = ctypes.CDLL(str(next(Path(sys.argv[1]).resolve().glob("libfastalign_native.*"))))
library.fastalign_isa.restype = ctypes.c_char_p
names = {"avx512": "AVX-512", "avx2": "AVX2", "neon": "NEON", "scalar": "no vector instructions"}
isa = library.fastalign_isa().decode()
print(f"native row kernels: built ({names.get(isa, isa)})")
PYTHON
if [ -n "$goal" ]; then
    "${cmake%cmake}ctest" --test-dir "$folder" --output-on-failure --no-tests=ignore
fi
