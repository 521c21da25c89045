#!/usr/bin/env bash
# examples/finetune.sh on several nodes that can be reached by ssh without a password, started from any machine:
#
#   HOSTS="node0 node1" LOAD=/shared/Llama-2-70b-hf SIZE=70 DATA=/shared/mine_text_document bash examples/multi_node.sh
#
# All variables of finetune.sh are passed on. REPOSITORY, LOAD, DATA and SAVE are paths on the nodes; SAVE has to be
# in a folder that all of them share. Interrupting this script (Ctrl-C), or its death, lets the run save and leave.
set -euo pipefail

HOSTS=${HOSTS:?name the nodes: HOSTS=\"node0 node1\" bash examples/multi_node.sh}
REPOSITORY=${REPOSITORY:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
REMOTE=${REMOTE:-ssh} # how a command is run on a host

read -ra hosts <<<"$HOSTS"
MASTER_ADDR=${MASTER_ADDR:-${hosts[0]}}
NNODES=${#hosts[@]}

# The variables that are set here, as assignments that a shell can read.
passed="PATH=$(printf %q "$PATH") "
for name in MODEL SIZE LOAD TOKENIZER DATA SEQ_LENGTH SAVE SAVE_INTERVAL EVAL_INTERVAL EVAL_ITERS GPUS_PER_NODE NNODES \
    MASTER_ADDR MASTER_PORT TP PP ZERO_STAGE TRAIN_ITERS MICRO_BATCH GLOBAL_BATCH LR MIN_LR WARMUP \
    OMP_NUM_THREADS GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME NCCL_IB_HCA TORCH_ELASTIC_SHUTDOWN_TIMEOUT; do
    [[ -n ${!name:-} ]] && passed+="$name=$(printf %q "${!name}") "
done
flags=$([[ $# -eq 0 ]] || printf '%q ' "$@")

# A far end reads from a pipe that is open as long as the run is wanted. Where it ends, the run gets SIGTERM: it saves
# and leaves, and what it says still comes back here.
far_end='
exec 3<&0
bash examples/finetune.sh "$@" 3<&- &
run=$!
{ cat <&3 && kill -TERM "$run"; } >/dev/null 2>&1 &
wait "$run"
status=$?
kill "$!" 2>/dev/null
exit "$status"'
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkfifo "$folder/wanted"
exec 3<>"$folder/wanted"
trap 'exec 3>&-' INT TERM

nodes=()
for node_rank in "${!hosts[@]}"; do
    command="cd $(printf %q "$REPOSITORY") && $passed NODE_RANK=$node_rank bash -c '$far_end' finetune $flags"
    $REMOTE "${hosts[node_rank]}" "$command" <"$folder/wanted" 3>&- &
    nodes+=($!)
done

status=0
for node in "${nodes[@]}"; do
    until wait "$node"; do # a signal to this script ends a wait, not what is waited for
        ended=$?
        kill -0 "$node" 2>/dev/null || { status=$ended && break; }
    done
done
exit "$status"
