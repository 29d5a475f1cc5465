#!/usr/bin/env bash
# Real text for measure.sh: the sources of this Python, a tokenizer of 8,191 pieces, 9 million ids (18 MB).
#
#   bash examples/gpu/prepare.sh FOLDER
set -euo pipefail
cd "$(dirname "$0")/../.."
FOLDER=${1:?folder to make}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
mkdir -p "$FOLDER"
tool() { "$PYTHON" -m "megatron_hybrid.tools.$1" "${@:2}"; }
tool gather_corpus --output "$FOLDER/corpus.jsonl.zst" --max-mb 30
tool train_tokenizer --input "$FOLDER/corpus.jsonl.zst" --output "$FOLDER/tokenizer.model" --vocab-size 8191
tool preprocess --input "$FOLDER/corpus.jsonl.zst" --output-prefix "$FOLDER/text" \
    --tokenizer-model "$FOLDER/tokenizer.model" --append-eod
rm "$FOLDER/corpus.jsonl.zst"
