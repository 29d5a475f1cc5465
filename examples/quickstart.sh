#!/usr/bin/env bash
# From nothing to a trained, exported and checked OLMo-Hybrid, on real text, in minutes.
#
#   bash examples/quickstart.sh [RUN_FOLDER]        # default runs/quickstart
#
# Two CPU ranks over gloo where there is no GPU, else one GPU or two (not run). Safe to run again: it starts over in its
# own folder.
set -euo pipefail
cd "$(dirname "$0")/.."
RUN=${1:-runs/quickstart}

ITERATIONS=${ITERATIONS:-120} # of 2,048 tokens
STOP=${STOP:-80}              # the first training stops here, the second resumes
CORPUS_MB=${CORPUS_MB:-40}    # at most
SEQ_LENGTH=256
GLOBAL_BATCH_SIZE=8
CHECK_TOKENS=200 # logits are compared on as many

source tools/environment.sh
prepare_environment dev data

MARK=$RUN/.megatron_hybrid_quickstart # only a folder that this script made is ever removed
if [ -e "$RUN" ] && [ ! -e "$MARK" ] && [ -n "$(ls -A "$RUN" 2>/dev/null)" ]; then
    say "error: $RUN exists and is not a quickstart run; name another folder: bash examples/quickstart.sh FOLDER"
    exit 2
fi
rm -rf "$RUN"
mkdir -p "$RUN"
touch "$MARK"
printf '{"seq_length": %d, "global_batch_size": %d, "stop": %d}\n' \
    "$SEQ_LENGTH" "$GLOBAL_BATCH_SIZE" "$STOP" >"$RUN/settings.json"

step() { printf '\n[%s] %s\n' "$1" "$2" >&2; }
tool() { "$PYTHON" -m "megatron_hybrid.tools.$1" "${@:2}"; }

step 1/8 "Gathering a corpus: the sources and documentation of $("$PYTHON" -V)"
tool gather_corpus --output "$RUN/corpus.jsonl.zst" --max-mb "$CORPUS_MB"

step 2/8 "Training a SentencePiece tokenizer"
tool train_tokenizer --input "$RUN/corpus.jsonl.zst" --output "$RUN/tokenizer.model"

step 3/8 "Tokenizing to Megatron's .bin/.idx"
tool preprocess --input "$RUN/corpus.jsonl.zst" --output-prefix "$RUN/data" \
    --tokenizer-model "$RUN/tokenizer.model" --append-eod

GPUS=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
RANKS=2
DEVICE=cpu
if [ "$GPUS" -gt 0 ]; then
    RANKS=$((GPUS < 2 ? 1 : 2))
    DEVICE=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name())')
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} CUDA_DEVICE_MAX_CONNECTIONS=1

# The flags that the model and its data share between training and checking.
MODEL=(
    --preset olmo-hybrid-tiny
    --seq-length "$SEQ_LENGTH" --max-position-embeddings "$SEQ_LENGTH"
    --tokenizer-type SentencePieceTokenizer --tokenizer-model "$RUN/tokenizer.model"
)
TRAIN=(
    "${MODEL[@]}"
    --tensor-model-parallel-size "$RANKS"
    --data-path "$RUN/data" --split "98,2,0" --data-cache-path "$RUN/cache"
    --train-iters "$ITERATIONS" --global-batch-size "$GLOBAL_BATCH_SIZE" --micro-batch-size "$GLOBAL_BATCH_SIZE"
    --eval-interval "$STOP" --eval-iters 4 --log-interval 1
    --save "$RUN/checkpoints" --save-interval "$STOP"
    --tensorboard-dir "$RUN/tensorboard"
)
if [ "$GPUS" -gt 0 ]; then
    say "--gdn-backend reference: the Triton kernels take bf16 and other head sizes than this fp32 model of 24/48"
    TRAIN+=(--gdn-backend reference)
fi
train() {
    "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$RANKS" \
        -m megatron_hybrid.pretrain "${TRAIN[@]}" "$@" 2>&1 | tool watch_training --log "$RUN/train.log"
}
step 4/8 "Training with tensor parallelism $RANKS on $DEVICE, to iteration $STOP of $ITERATIONS"
train --exit-interval "$STOP"

step 5/8 "Resuming from the checkpoint"
train --load "$RUN/checkpoints"

step 6/8 "Exporting to Hugging Face and comparing logits on $CHECK_TOKENS tokens"
tool convert export --checkpoint "$RUN/checkpoints" --output "$RUN/huggingface" \
    --tokenizer-model "$RUN/tokenizer.model"
"$PYTHON" - "$RUN" "$CHECK_TOKENS" <<'PY'
import sys

import torch
from safetensors.torch import save_file

from megatron_hybrid.tools.indexed_dataset import IndexedDatasetReader

run, count = sys.argv[1], int(sys.argv[2])
reader = IndexedDatasetReader(f"{run}/data")
tokens = next(torch.tensor(reader[i][:count].astype("int64")) for i in range(len(reader)) if len(reader[i]) >= count)
save_file({"tokens": tokens[None]}, f"{run}/tokens.safetensors")
PY
# On the CPU as transformers: Transformer Engine multiplies fp32 in TF32.
CUDA_VISIBLE_DEVICES='' "$PYTHON" -m megatron_hybrid.logits "${MODEL[@]}" --load "$RUN/checkpoints" \
    --tokens "$RUN/tokens.safetensors" --output "$RUN/logits_megatron.safetensors" >>"$RUN/train.log" 2>&1 ||
    { say "error: the Megatron model could not be run; see the end of $RUN/train.log"; exit 1; }
tool hf_logits --model "$RUN/huggingface" --tokens "$RUN/tokens.safetensors" \
    --output "$RUN/logits_huggingface.safetensors"
tool compare_logits --candidate "$RUN/logits_megatron.safetensors" --reference "$RUN/logits_huggingface.safetensors" \
    --tolerance 1e-4 | tee "$RUN/logits.txt"

step 7/8 "Generating text with transformers"
tool generate --model "$RUN/huggingface" --prompt "def main(" "The module provides" \
    --max-new-tokens 60 --temperature 0.7 --top-k 40 | tee "$RUN/generated.txt"

step 8/8 "Drawing the loss"
tool plot_run "$RUN/tensorboard" --output "$RUN/loss.png"
printf '\n'
tool quickstart_report "$RUN" --ranks "$RANKS" --device "$DEVICE"
