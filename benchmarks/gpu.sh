#!/usr/bin/env bash
# Everything that only a GPU can tell, in one run: tests, encoder, training, service.
#
#   OUT=results/gpu DATA=../shared/data benchmarks/gpu.sh                 all parts, about 25 minutes
#   OUT=results/gpu DATA=../shared/data benchmarks/gpu.sh tests encoder   some parts, for machines lent by the minute
#   benchmarks/gpu.sh --dry-run                                          without a GPU: whether all of it would run
#
# OUT gets a log of every part, its JSON, and gpu.json with the status of each. PYTHON names the interpreter
# (.venv/bin/python; `make .venv/.ready` makes it). A part that fails does not keep the others from running.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-.venv/bin/python}
DATA=${DATA:-../shared/data}
OUT=${OUT:-$(mktemp -d -t vaefeat-gpu.XXXXXX)}
PARTS=(tests encoder train serve)

dry_run=
device=cuda
is_dry=false
asked=()
for word in "$@"; do
    case $word in
        --dry-run) dry_run=yes device=cpu is_dry=true ;;
        tests | encoder | train | serve) asked+=("$word") ;;
        *) echo "got $word, wanted --dry-run or some of: ${PARTS[*]}" >&2; exit 2 ;;
    esac
done
[[ ${#asked[@]} -gt 0 ]] || asked=("${PARTS[@]}")

missing=()
"$PYTHON" -c 'import onnxruntime, ray, torch' 2>/dev/null || missing+=("an environment: make .venv/.ready, or PYTHON=PATH")
if [[ " ${asked[*]} " == *" train "* && ! -d $DATA/MNIST ]]; then missing+=("MNIST in $DATA: DATA=PATH"); fi
if [[ ${#missing[@]} -eq 0 && -z $dry_run ]]; then
    # In the words of the library, which says what to install.
    why=$("$PYTHON" -c '
from vaefeat.errors import DeviceError
from vaefeat.runtime import choose_device
try:
    choose_device("cuda")
except DeviceError as error:
    print(error)
') || why="vaefeat does not import"
    [[ -z $why ]] || missing+=("a GPU: $why")
    "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || missing+=("a CUDA device that torch finds")
fi
if [[ ${#missing[@]} -gt 0 ]]; then
    printf 'missing: %s\n' "${missing[@]}" >&2
    exit 3
fi
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)

run_part() {
    case $1 in
        tests)
            # Each test on its own thread of the processor; two processes would share the GPU's memory.
            OMP_NUM_THREADS=1 "$PYTHON" -m pytest -m gpu -rA -p no:cacheprovider --data-dir="$DATA" \
                --junitxml="$OUT/tests.xml" ${dry_run:+--collect-only -q} ;;
        encoder)
            "$PYTHON" -m benchmarks.gpu_serve --results "$OUT/encoder.json" ${dry_run:+--dry-run} ;;
        train)
            # A quick round on the CPU alone takes minutes, and shows nothing here.
            if [[ -n $dry_run ]]; then "$PYTHON" -m benchmarks.train --help; else
                "$PYTHON" -m benchmarks.train --gpu --quick --data "$DATA" --out "$OUT/train.json"; fi ;;
        serve)
            "$PYTHON" -m benchmarks.serve --device $device --only local --only ray --rounds 3 \
                --results "$OUT/serve.json" ${dry_run:+--quick} ;;
    esac
}

failed=0
statuses=
for part in "${asked[@]}"; do
    echo "== $part" >&2
    began=$SECONDS
    run_part "$part" >"$OUT/$part.log" 2>&1
    status=$?
    tail -n 20 "$OUT/$part.log"
    [[ $status -eq 0 ]] || failed=1
    statuses+="${statuses:+, }\"$part\": {\"status\": $status, \"seconds\": $((SECONDS - began))}"
    # After every part: a machine that is taken away leaves what was measured.
    printf '{"dry_run": %s, "parts": {%s}}\n' $is_dry "$statuses" >"$OUT/gpu.json"
done
cat "$OUT/gpu.json"
exit $failed
