#!/bin/bash
# Trains a language model with values on a SLURM cluster; what follows goes to lm_training:
#
#     sbatch --nodes 2 --gpus-per-node 4 lm_training.sh --corpus corpus --preset small \
#         --results-dir results
#
# A job that is put back into the queue, or submitted again, goes on from its checkpoint.
#SBATCH --job-name=ghost-lm
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

nodes=${SLURM_JOB_NUM_NODES:-1}
per_node=${SLURM_GPUS_ON_NODE:-1}
if [ "$nodes" -gt 1 ]; then
    head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    meeting=(--rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$head:${GHOST_PORT:-29500}")
else
    meeting=(--standalone)
fi
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
# Else processes that torchrun starts again look for those that were killed (gloo).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

srun --ntasks-per-node=1 torchrun --nnodes "$nodes" --nproc-per-node "$per_node" "${meeting[@]}" \
    --max-restarts "${GHOST_RESTARTS:-3}" -m ghost_examples.lm_training "$@"
