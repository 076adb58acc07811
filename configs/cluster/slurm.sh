#!/usr/bin/env bash
# One run over the nodes of a Slurm job: sbatch [--nodes N] configs/cluster/slurm.sh CONFIG [section.key=value ...]
#
# The folder it is submitted from holds the project and runs/, and is the same on all nodes (NFS, Lustre). A node that
# fails, a preemption and the end of the time limit all come to the same: the run goes on from its newest checkpoint.
#SBATCH --job-name=longmoe
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=runs/slurm_%j.log
# 120 s before the time limit; --requeue alone covers nodes that fail. A preemption sends SIGTERM too (GraceTime).
#SBATCH --signal=B:TERM@120
set -euo pipefail

(($# >= 1)) || {
    echo "usage: sbatch [--nodes N] configs/cluster/slurm.sh CONFIG [section.key=value ...]" >&2
    exit 2
}
GPUS=${SLURM_GPUS_ON_NODE:-8}
PORT=$((20000 + SLURM_JOB_ID % 20000)) # jobs that share a node do not meet
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
# shellcheck disable=SC1091
source .venv/bin/activate

# The ranks of each start meet in a store of their own; in torchrun's one they may find the addresses of those before.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# torchrun gives ranks that are asked to stop 30 s before it kills them; newer ones can be told to wait for a large save.
patience=()
if torchrun --help | grep -e --shutdown-timeout > /dev/null; then patience=(--shutdown-timeout 100); fi

# SIGTERM goes to this shell alone (B:). The ranks are asked to stop: each finishes its step, all save it, and the job is
# put back into the queue, where it keeps its number and so its run. A run that is finished, or that has refused to go
# on, is not.
step=
stop() {
    trap '' TERM
    echo "slurm: asked to stop; the ranks save, and the job is queued again"
    scancel --signal=TERM --quiet "$SLURM_JOB_ID.0" || true
    wait "$step" || true
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
trap stop TERM

# One torchrun a node; each starts a rank for each GPU. They meet at the first node (c10d rendezvous), and start all
# ranks anew, up to three times, when one is lost. A node that is lost ends the step (--kill-on-bad-exit), and --requeue
# brings the job back on others.
srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node "$GPUS" --max-restarts 3 "${patience[@]}" \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD:$PORT" --rdzv-id "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" \
    train.py "$@" &
step=$!
wait "$step"
