#!/usr/bin/env bash
# Train a Llama of any size on any number of GPUs and nodes. The full picture of the arguments, for:
#
#   LOAD=/models/Llama-2-7b-hf DATA=data/mine_text_document bash examples/finetune.sh
#
# Every variable below can be set like that. What follows the script's name goes to finetune.py and wins over what
# stands here: ... bash examples/finetune.sh --lr 1e-5 --compile. On several nodes the same command runs on each of
# them, with NNODES, MASTER_ADDR and its own NODE_RANK: see docs/guide/multi_node.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# The model: a family, and weights to start from (a checkpoint of any layout, or a Hugging Face folder).
# Without LOAD a model of the published SIZE starts from random weights; TOKENIZER then names its tokenizer.
MODEL=${MODEL:-llama2} # llama, llama2, codellama, llama3
SIZE=${SIZE:-7}
LOAD=${LOAD:-}
TOKENIZER=${TOKENIZER:-}

# The data: the prefix of a .bin/.idx pair (tools/preprocess_data.py), or a .jsonl or .txt file.
DATA=${DATA:?name the training data: DATA=PREFIX bash examples/finetune.sh}
SEQ_LENGTH=${SEQ_LENGTH:-} # default: that of the checkpoint, or the longest that the model is made for

# Where the run's state goes. If there is a checkpoint in it, the run continues from there instead of LOAD.
SAVE=${SAVE:-checkpoints/$MODEL-$SIZE}
SAVE_INTERVAL=${SAVE_INTERVAL:-100}
EVAL_INTERVAL=${EVAL_INTERVAL:-100}
EVAL_ITERS=${EVAL_ITERS:-10}

# The processes: one for each GPU.
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
MASTER_PORT=${MASTER_PORT:-29500}

# The layout. TP stays inside a node; what TP x PP leaves of the GPUs is data parallel.
case $SIZE in
7 | 8) TP=${TP:-2} PP=${PP:-1} ;;
13) TP=${TP:-4} PP=${PP:-1} ;;
30 | 34) TP=${TP:-8} PP=${PP:-1} ;;
65 | 70) TP=${TP:-8} PP=${PP:-4} ;;
*) TP=${TP:-1} PP=${PP:-1} ;;
esac
ZERO_STAGE=${ZERO_STAGE:-1}

# Batches and learning rate, as the Llama 2 paper has them (section 2.2): half the rate above 13B.
TRAIN_ITERS=${TRAIN_ITERS:-500}
MICRO_BATCH=${MICRO_BATCH:-5}
GLOBAL_BATCH=${GLOBAL_BATCH:-1000}
case $SIZE in
30 | 34 | 65 | 70) LR=${LR:-1.5e-4} ;;
*) LR=${LR:-3e-4} ;;
esac
MIN_LR=${MIN_LR:-1e-6}
WARMUP=${WARMUP:-0.1} # share of the iterations

if [[ -e $SAVE/latest_checkpointed_iteration.txt ]]; then
    start=(--load "$SAVE" --use_checkpoint_args)
elif [[ -n $LOAD ]]; then
    start=(--load "$LOAD" --use_checkpoint_args --finetune)
else
    start=(--size "$SIZE")
fi

launch=(
    --nproc_per_node "$GPUS_PER_NODE"
    --nnodes "$NNODES"
    --node_rank "$NODE_RANK"
    --master_addr "$MASTER_ADDR"
    --master_port "$MASTER_PORT"
)
arguments=(
    --model_name "$MODEL" "${start[@]}"
    ${TOKENIZER:+--tokenizer_model "$TOKENIZER"}
    --data_path "$DATA" ${SEQ_LENGTH:+--seq_length "$SEQ_LENGTH"}
    --save "$SAVE" --save_interval "$SAVE_INTERVAL"
    --eval_interval "$EVAL_INTERVAL" --eval_iters "$EVAL_ITERS"
    --log_interval 1 --tensorboard_dir "$SAVE/tensorboard"
    # layout and memory
    --tensor_model_parallel_size "$TP" --pipeline_model_parallel_size "$PP" --zero_stage "$ZERO_STAGE"
    --sequence_parallel --recompute_granularity selective
    --bf16 --use_flash_attn
    # training
    --train_iters "$TRAIN_ITERS" --micro_batch_size "$MICRO_BATCH" --global_batch_size "$GLOBAL_BATCH"
    --adam_beta1 0.9 --adam_beta2 0.95 --adam_eps 1e-5 --weight_decay 0.1 --clip_grad 1.0
    --lr "$LR" --min_lr "$MIN_LR" --lr_decay_style cosine --lr_warmup_fraction "$WARMUP"
)
set -x
exec torchrun "${launch[@]}" finetune.py "${arguments[@]}" "$@"
