#!/usr/bin/env bash
# What only a machine with CUDA can show: the gpu tests, how fast a GPU is filled, what that does to a stream, cold
# starts of an 8B model, the soak.
# Needs no network.
#
#   scripts/gpu.sh [tests|load|beside|cold-start|soak ...]  these parts, or all; one that fails does not stop the others
#   scripts/gpu.sh wheels                            fetches what bench/gpu-wheels.txt lists, on a machine with a network
#
# The machine brings Python 3.12, torch, triton, transformers, aiohttp, click, jinja2, tokenizers, prometheus-client,
# pytest and hypothesis; the few packages that it may lack come as wheels in .gpu-wheels/.
#
#   OUT=bench/results   where results go       PYTHON=python3   which Python has torch
#   LIMIT=570           seconds for each part  SCRATCH=/tmp     room for checkpoints of 1 to 64 GB

set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

OUT=${OUT:-bench/results}
PYTHON=${PYTHON:-python3}
LIMIT=${LIMIT:-570}
SCRATCH=${SCRATCH:-${TMPDIR:-/tmp}}
WHEELS=.gpu-wheels
SITE=$PWD/.gpu-site
export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 PYTHONPATH=$PWD:$SITE
failed=()

wheels() {
    "$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_17_x86_64 \
        --platform manylinux2014_x86_64 --platform manylinux_2_5_x86_64 --platform manylinux1_x86_64 \
        --dest "$WHEELS" --requirement bench/gpu-wheels.txt
}

# Installs the listed packages that this Python lacks.
install() {
    local missing
    missing=$("$PYTHON" - bench/gpu-wheels.txt <<'END'
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

for line in Path(sys.argv[1]).read_text().splitlines():
    name = line.split("#")[0].strip()
    try:
        name and version(name.split("==")[0])
    except PackageNotFoundError:
        print(name)
END
    ) || return
    # shellcheck disable=SC2086  # one word each
    [ -z "$missing" ] || "$PYTHON" -m pip install --quiet --no-index --no-deps --find-links "$WHEELS" \
        --target "$SITE" $missing
}

# The GPU's name as results are called: "NVIDIA H200" -> "h200".
gpu() {
    "$PYTHON" -c 'import re, torch
name = torch.cuda.get_device_name(0).lower().removeprefix("nvidia ")
print(re.sub("[^a-z0-9]+", "-", name))'
}

part() {
    local name=$1
    shift
    echo "== $name: $*"
    timeout --kill-after=20 "$LIMIT" "$@" && return
    echo "== $name failed (status $?)" >&2
    failed+=("$name")
}

run() {
    case $1 in
        tests) part tests "$PYTHON" -m pytest -m gpu tests/gpu tests/unit/loader ;;
        load)
            part load "$PYTHON" -m bench.load --device cuda \
                --cases fill --checkpoints "$SCRATCH/serverless-llm-checkpoints" --json "$OUT/load-$name.json"
            ;;
        beside)
            part beside "$PYTHON" -m bench.load --device cuda --cases beside-decode --rounds 5 \
                --checkpoints "$SCRATCH/serverless-llm-checkpoints" --json "$OUT/load-beside-decode-$name.json"
            ;;
        cold-start)
            part cold-start "$PYTHON" -m bench.cold_start --device cuda --minutes 5 \
                --checkpoints "$SCRATCH/serverless-llm-checkpoints" --json "$OUT/cold_start-$name.json"
            ;;
        soak)
            part soak "$PYTHON" -m bench.soak --device cuda --seed 1 --kills 20 --head-kills 2 \
                --json "$OUT/soak-$name.json"
            ;;
        *)
            echo "gpu.sh: no part is called $1; there are tests, load, beside, cold-start, soak and wheels" >&2
            exit 2
            ;;
    esac
}

[ "${1:-}" = wheels ] && { wheels; exit; }
install || { echo "gpu.sh: packages are missing; run scripts/gpu.sh wheels where there is a network" >&2; exit 1; }
name=$(gpu) || { echo "gpu.sh: $PYTHON sees no CUDA device" >&2; exit 1; }
mkdir -p "$OUT"
[ $# -gt 0 ] || set -- tests load beside cold-start soak
for wanted in "$@"; do run "$wanted"; done
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}" >&2; exit 1; }
