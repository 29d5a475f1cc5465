#!/usr/bin/env bash
# Everything that needs one Hopper GPU, in one call: a look at the machine, FP8's acceptance, then speed and memory.
#
#   bash examples/gpu/measure.sh DATA OUTPUT [BUDGET_S] [PART ...]
#
# DATA holds text.bin, text.idx and tokenizer.model (examples/gpu/prepare.sh makes them). OUTPUT gets check.log,
# acceptance/ and bench/; what has been measured is written at once, so a call that is cut off loses little.
# PART: check, acceptance, bench (all three by default); bench:GROUP for one group of bench_training. A part that was
# measured into OUTPUT before is not measured again. Exit status 1 where a tool did not do its part.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit
DATA=${1:?folder with text.bin, text.idx, tokenizer.model} OUTPUT=${2:?folder for results} BUDGET=${3:-1500}
shift $(($# < 3 ? $# : 3))
PARTS=("${@:-}")
[ -n "${PARTS[0]}" ] || PARTS=(check acceptance bench)
for PART in "${PARTS[@]}"; do
    case $PART in
    check | acceptance | bench | bench:?*) ;;
    *) echo "error: $PART: no such part; legal: check, acceptance, bench, bench:GROUP" >&2 && exit 2 ;;
    esac
done
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)} STATUS=0
STARTED=$(date +%s)
left() { echo $((BUDGET - ($(date +%s) - STARTED))); }
say() { printf '\n[%s s] %s\n' "$(($(date +%s) - STARTED))" "$*"; }
mkdir -p "$OUTPUT"
export PYTHONUNBUFFERED=1 PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$PWD
unset PYTORCH_CUDA_ALLOC_CONF

CHECKPOINTS=$(mktemp -d) # 10 GB for each of six runs: in memory where it holds that
if [ "$(df -k --output=avail /dev/shm 2>/dev/null | tail -1)" -gt 60000000 ]; then
    CHECKPOINTS=$(mktemp -d -p /dev/shm)
fi
trap 'rm -rf "$CHECKPOINTS"' EXIT

for PART in "${PARTS[@]}"; do
    say "$PART, $(left) s left"
    if [ "$(left)" -lt 30 ]; then
        echo "error: $PART: no time left of $BUDGET s" >&2
        STATUS=1
        continue
    fi
    case $PART in
    check)
        timeout 120 "$PYTHON" -m megatron_hybrid.tools.gpu_bench.check >"$OUTPUT/check.log" 2>&1 || STATUS=1
        grep -v '^ \|Warning\|^Traceback\|^[A-Z]\w*Error' "$OUTPUT/check.log" | tail -12
        ;;
    acceptance)
        FLA_CACHE_RESULTS=0 "$PYTHON" -m megatron_hybrid.tools.bench_training --group compile \
            --output "$OUTPUT/compile" ${TINY:+--tiny} --budget-s 150 >"$OUTPUT/compile.log" 2>&1 &
        COMPILING=$!
        "$PYTHON" -m megatron_hybrid.tools.fp8_acceptance --data-path "$DATA/text" ${TINY:+--tiny} \
            --tokenizer-model "$DATA/tokenizer.model" --output "$OUTPUT/acceptance" --checkpoints "$CHECKPOINTS" \
            --steps "${STEPS:-500}" --budget-s "$(($(left) < ${ACCEPTANCE_S:-560} ? $(left) : ${ACCEPTANCE_S:-560}))" ||
            STATUS=1
        kill $COMPILING 2>/dev/null
        wait $COMPILING
        ;;
    bench | bench:*)
        GROUP=${PART#bench}
        PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True "$PYTHON" -m megatron_hybrid.tools.bench_training \
            ${GROUP:+--group "${GROUP#:}"} --output "$OUTPUT/bench${GROUP//[: ]/_}" ${TINY:+--tiny} \
            --tokens "$DATA/text.bin" --budget-s "$(($(left) - 20))" &&
            cat "$OUTPUT/bench${GROUP//[: ]/_}/table.md" || STATUS=1
        ;;
    esac
done
say "done"
exit $STATUS
