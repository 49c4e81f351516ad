#!/usr/bin/env bash
# Runs on the GPUs of a SLURM cluster, through sbatch. See docs/pods.md.
#
#   bash launch/slurm.sh run RUN --nodes=2 --gpus=8 --time=24:00:00 [--cpus=12] [--grace=300] \
#     -- python -m experiments.gsm8k --config=... --workdir=/shared/runs/RUN
#
# --dry-run prints the script and the commands and runs nothing. --gpus: per node. --cpus: per GPU. Set partition,
# account and the like through sbatch's own variables (SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_QOS). The log is
# runs/logs/RUN.JOB.log in this repository.
#
# --grace seconds before its time limit a run receives SIGTERM, saves, exits with 143 and is requeued; so is a run that
# is preempted or whose node fails. To stop one for good:
#
#   scontrol update JobId=JOB Requeue=0; scancel --signal=TERM JOB
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"

parse CLUSTER "nodes gpus time cpus grace" "" "$@"
check CLUSTER nodes=number gpus=number time=time cpus=number grace=count

# jax.distributed expects one task per GPU that sees all GPUs of its node: --gres, not --gpus-per-task, which hides the
# others. --kill-on-bad-exit, because the other tasks would wait for a failed one. srun does not inherit
# --cpus-per-task from sbatch.
script() {
  cat <<SBATCH
#!/usr/bin/env bash
#SBATCH --job-name=${words[1]}
#SBATCH --nodes=$CLUSTER_NODES
#SBATCH --ntasks-per-node=$CLUSTER_GPUS${CLUSTER_CPUS:+ --cpus-per-task=$CLUSTER_CPUS}
#SBATCH --gres=gpu:$CLUSTER_GPUS
#SBATCH --time=$CLUSTER_TIME
#SBATCH --signal=TERM@${CLUSTER_GRACE:-300}
#SBATCH --requeue
#SBATCH --chdir=$(quoted "$root")
#SBATCH --output=runs/logs/%x.%j.log
#SBATCH --open-mode=append

export PATH="\$PWD/.venv/bin:\$PATH"
code=0
srun --kill-on-bad-exit=1 ${CLUSTER_CPUS:+--cpus-per-task=$CLUSTER_CPUS} $(quoted "${command[@]}") || code=\$?
if [ \$code -eq 143 ]; then scontrol requeue "\$SLURM_JOB_ID"; fi
exit \$code
SBATCH
}

if [ "${words[0]:-}" != run ]; then
  usage
  exit 1
fi
need_run
need CLUSTER nodes gpus time
need_experiment
run_or_print mkdir -p "$root/runs/logs"
with_input "$(script)" sbatch
