#!/usr/bin/env bash
# Tests on the oldest and on the newest set of versions that pyproject.toml allows, each in an environment of its own:
#   tests/matrix.sh [oldest] [newest]         (default: both; PYTEST_ARGS adds options, MATRIX_TESTS replaces the tests)
# TRL is left out: no single version of it covers both sets. The test files that compare with it belong to `make test`.
set -euo pipefail
cd "$(dirname "$0")/.."
tools=(pytest pytest-timeout pytest-benchmark hypothesis psutil starlette uvicorn httpx openai)
read -ra tests <<<"${MATRIX_TESTS:-tests fastalign}"
read -ra extra <<<"${PYTEST_ARGS:-}"
without_trl=(--ignore=tests/parity)
while read -r file; do
    without_trl+=("--ignore=$file")
done < <(grep -lrE --include='*.py' '^ *(import|from) trl(_preprocessing)?\b' tests | sort)

first_python() { # the first of the named interpreters that runs
    local name
    for name in "$@"; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    echo "matrix: none of these runs as Python 3.10 or newer: $*" >&2
    return 1
}

run() { # run NAME PYTHON PIP_ARGUMENT...
    local name=$1 python=$2 env=".venv-$1" stamp
    shift 2
    stamp="$env/.ready-$(cat pyproject.toml tests/matrix-oldest.txt "$0" | cksum | cut -d' ' -f1)"
    if [ ! -e "$stamp" ]; then
        echo "matrix: installing $name with $("$python" --version) into $env"
        "$python" -m venv --clear "$env"
        "$env/bin/python" -m pip install --quiet --progress-bar off "$@" --editable . "${tools[@]}"
        touch "$stamp"
    fi
    echo "matrix: $name"
    "$env/bin/python" -c '
import sys
from importlib.metadata import version
names = "torch transformers tokenizers safetensors peft datasets jsonargparse rich matplotlib numpy".split()
print("  Python", sys.version.split()[0], *(f"{n} {version(n)}" for n in names), sep=", ")'
    "$env/bin/python" -m pytest "${tests[@]}" -m "not slow and not gpu and not micro and not browser" "${without_trl[@]}" "${extra[@]}"
}

for set in "${@:-oldest newest}"; do
    for name in $set; do
        case $name in
        oldest) run oldest "$(first_python python3.10 python3)" --constraint tests/matrix-oldest.txt ;;
        newest) run newest "$(first_python python3.13 python3.12 python3)" --upgrade --upgrade-strategy eager ;;
        *) echo "matrix: unknown set '$name'; there are oldest and newest" >&2 && exit 2 ;;
        esac
    done
done
echo "matrix: passed"
