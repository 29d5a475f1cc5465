#!/usr/bin/env bash
# Installs what is needed, then lint, types and all tests that need no GPU. Arguments go to pytest.
# Those for a GPU: python -m pytest -m gpu
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/environment.sh
prepare_environment dev data

export CUDA_VISIBLE_DEVICES='' # on a GPU, what the tests train in fp32 would be refused by the kernels
export OMP_NUM_THREADS=1 # ranks share two cores; more threads only make them wait for each other
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
bash tests/types.sh
# The Triton kernels in triton's interpreter: chosen before triton is imported, so in processes of their own, each on a
# core of its own.
interpreted() { TRITON_INTERPRET=1 OPENBLAS_NUM_THREADS=1 "$PYTHON" -m pytest -q -p no:cacheprovider "$@"; }
KERNELS_LOG=$(mktemp)
interpreted tests/kernels/test_triton_interpreter.py >"$KERNELS_LOG" 2>&1 &
KERNELS=$!
trap 'kill "$KERNELS" 2>/dev/null || true; rm -f "$KERNELS_LOG"' EXIT
interpreted tests/kernels/test_cross_entropy.py tests/kernels/test_norm.py tests/kernels/test_self_test.py \
    tests/planning/test_counted_activations.py
interpreted tests/parallel/test_state_passing.py -k triton
STATUS=0
wait "$KERNELS" || STATUS=$?
cat "$KERNELS_LOG"
[ "$STATUS" = 0 ] || exit "$STATUS"
"$PYTHON" -m pytest "$@"
