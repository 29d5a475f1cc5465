#!/usr/bin/env bash
# mypy over the whole package in its installed layout: in place it would find only the files under megatron_hybrid/
# and pass without having looked at kernels/, layer_specs/ and tools/.
set -euo pipefail
cd "$(dirname "$0")/.."
site=.typecheck
rm -rf "$site" build
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --target "$site" .
rm -rf build
report=$(MYPYPATH=$site .venv/bin/python -m mypy -p megatron_hybrid) || { printf '%s\n' "$report"; exit 1; }
printf '%s\n' "$report"
# Every file, and the three folders without __init__.py, which mypy counts as sources too.
expected=$(($(find megatron_hybrid kernels layer_specs tools -name '*.py' | wc -l) + 3))
case $report in
    *"in $expected source files"*) ;;
    *) echo "error: mypy should have checked $expected files"; exit 1 ;;
esac
