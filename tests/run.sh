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
# The Triton kernels: compiled, and in triton's interpreter, which is chosen before triton is imported. In processes of
# their own, two at a time, each on a core of its own; the longest first.
LOGS=$(mktemp -d)
trap 'rm -rf "$LOGS"' EXIT
apart=(tests/kernels/test_compile.py tests/kernels/test_summary_compile.py)
STATUS=0
# shellcheck disable=SC2016  # the inner shell expands them
PYTHON=$PYTHON LOGS=$LOGS xargs -P 2 -I{} bash -c 'set -- {}; name=$1 interpreted=$2; shift 2
    TRITON_INTERPRET=$interpreted OPENBLAS_NUM_THREADS=1 "$PYTHON" -m pytest -q -p no:cacheprovider "$@" >"$LOGS/$name" 2>&1' <<END || STATUS=$?
1-counted 1 tests/planning/test_counted_activations.py
2-kernels 1 tests/kernels/test_triton_interpreter.py
3-compiled 0 ${apart[*]}
4-self-test 1 tests/kernels/test_self_test.py tests/kernels/test_cross_entropy.py tests/kernels/test_norm.py
5-state-passing 1 tests/parallel/test_state_passing.py -k triton
END
cat "$LOGS"/*
[ "$STATUS" = 0 ] || exit "$STATUS"
"$PYTHON" -m pytest "${apart[@]/#/--ignore=}" "$@"
