#!/bin/bash
# A run under Slurm: `sbatch cluster/slurm.sh`, in this folder, which all hosts mount. The folder of the run has the job's
# name: a job that is queued again, or sent again under its name, goes on with the same run.
#SBATCH --job-name=scale-out
#SBATCH --nodes=4 --ntasks-per-node=1 --gpus-per-node=8 --exclusive
#SBATCH --requeue --open-mode=append --dependency=singleton
set -u
runs=/mnt/shared/runs # CHANGE: every host mounts it
begun=$(date +%s)
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Others are on the network: the token is in ~/.ray/auth_token, made once by `.venv/bin/ray get-auth-token --generate`.
export RAY_AUTH_MODE=token PATH="$PWD/.venv/bin:$PATH"
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=600 # seconds until all hosts are there; Ray's 30 are few for a shared disk
# It starts the cluster, runs the command on the first host, which has to be told to join it, and ends the cluster.
srun ray symmetric-run --address "$head:6379" --min-nodes "$SLURM_JOB_NUM_NODES" -- \
    python -m orchestrator.run "${CONFIG:-configs/scale_out.yaml}" --output "$runs/$SLURM_JOB_NAME" \
    --resume auto --auto-resume 3 --set resources.address=auto --set storage.path="$runs"
code=$?
# It returns 0, too, where Ray could not be started.
written=$(stat --format %Y "$runs/$SLURM_JOB_NAME/results.json" 2>/dev/null || echo 0)
[ $code -eq 0 ] && [ "$written" -lt "$begun" ] && code=1
# Slurm itself queues the job again after a lost host or a preemption. What else cut the command off is worth another
# try, and so is 1, which a lost cluster gives as well: a run that failed by itself says so at once. Done, not fit,
# trained but not tracked, and stopped are not.
case $code in
0 | 2 | 3 | 130) ;;
*) [ "${SLURM_RESTART_COUNT:-0}" -lt 3 ] && scontrol requeue "$SLURM_JOB_ID" ;;
esac
exit $code
