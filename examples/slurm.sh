#!/bin/bash
# Train on several nodes: one task a node, in which torchrun starts a rank for each GPU.
#
#     sbatch --nodes 2 examples/slurm.sh examples/train.py --deepspeed ds_configs/llama-8b-h100x16.json \
#         --model meta-llama/Llama-3.1-8B --data documents.jsonl --seq-len 1000000
#
# Program, environment and ds_config must be at the same paths on all nodes. More: docs/multi_node.md.

#SBATCH --job-name=alst
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
# The whole node's memory: what is offloaded to the host is planned within the job's limit.
#SBATCH --mem=0
#SBATCH --output=%x-%j.log

set -euo pipefail

# The network that nodes reach one another by, as `ip addr` names it. Batches travel over gloo, on GPUs too.
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-eth0}
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$GLOO_SOCKET_IFNAME}
# Ops are compiled at their first use: on each node's own disk.
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-/tmp/torch_extensions_$USER}

export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((15000 + SLURM_JOB_ID % 15000))
export RANKS_PER_NODE=${RANKS_PER_NODE:-8}

# Variables in single quotes are those of the node. The second `--`: what follows is the program's, not torchrun's.
srun bash -c 'torchrun --nnodes "$SLURM_NNODES" --node_rank "$SLURM_NODEID" --nproc_per_node "$RANKS_PER_NODE" \
    --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" -- "$@"' node "$@"
