#!/usr/bin/env bash
# examples/finetune.sh on the nodes of a Slurm allocation, submitted from the root of the repository:
#
#   LOAD=/shared/Llama-2-70b-hf SIZE=70 DATA=/shared/mine_text_document sbatch --nodes 4 examples/slurm.sh
#
# All variables of finetune.sh are passed on (sbatch hands over the environment). A run that is longer than a job:
# submit it several times with --dependency=singleton, and each job continues where the one before it saved.
#SBATCH --job-name=megatron
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
# Ten minutes before the end every torchrun gets SIGTERM, and has its processes save and leave.
#SBATCH --signal=TERM@600
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"

# torchrun waits this long for its processes, and not its usual 30 s (torch 2.13; see docs/guide/multi_node.md).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-540}

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${hosts[0]}
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) # two jobs that share a node do not meet
export NNODES=$SLURM_JOB_NUM_NODES
export GPUS_PER_NODE=${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}

# One task a node, which starts the processes of that node. When one node fails the others are ended.
exec srun --nodes "$NNODES" --ntasks "$NNODES" --ntasks-per-node 1 --kill-on-bad-exit=1 \
    bash -c 'NODE_RANK=$SLURM_NODEID exec bash examples/finetune.sh "$@"' finetune.sh "$@"
