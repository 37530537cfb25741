#!/usr/bin/env bash
# Tests of the patch of TRL's trainers on the releases that it serves, each in an environment of its own, .venv-trl-RELEASE:
#   tests/dropin.sh [0.24.0] [1.9.0] [1.14.0] [1.16.0]      (default: all; PYTEST_ARGS adds options)
# Versions are those of constraints.txt, but where an older TRL needs older ones.
set -euo pipefail
cd "$(dirname "$0")/.."
read -ra extra <<<"${PYTEST_ARGS:-}"
python=${PYTHON:-python3}
tests=(tests/dropin/test_trl_patch.py tests/dropin/test_unformed.py tests/dropin/test_fused_loss.py)

for release in "${@:-0.24.0 1.9.0 1.14.0 1.16.0}"; do
    for version in $release; do
        pins=("trl==$version")
        case $version in
        0.24.*) pins+=(transformers==4.57.6 tokenizers==0.22.2 peft==0.18.0 datasets==4.4.2 accelerate==1.12.0) ;;
        1.9.* | 1.14.*) pins+=(requests) ;; # which they import without asking for it
        esac
        env=".venv-trl-$version"
        stamp="$env/.ready-$(cat pyproject.toml constraints.txt "$0" | cksum | cut -d' ' -f1)"
        if [ ! -e "$stamp" ]; then
            echo "dropin: installing TRL $version into $env"
            "$python" -m venv --clear "$env"
            names=$(printf '%s\n' "${pins[@]}" | sed 's/=.*//' | paste -sd'|')
            grep -vE "^($names)(=|$)" constraints.txt >"$env/constraints.txt"
            "$env/bin/python" -m pip install --quiet --progress-bar off --constraint "$env/constraints.txt" \
                --editable . "${pins[@]}" accelerate pytest pytest-timeout psutil
            touch "$stamp"
        fi
        "$env/bin/python" -c '
from importlib.metadata import version
print("dropin:", *(f"{name} {version(name)}" for name in "trl transformers torch peft datasets accelerate".split()), sep=" ")'
        OMP_NUM_THREADS=1 "$env/bin/python" -m pytest "${tests[@]}" "${extra[@]}"
    done
done
echo "dropin: passed"
