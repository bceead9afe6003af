#!/bin/bash
# Runs a command of the package under Slurm; when the time limit stops it, the job queues again and goes on where it was.
#
#   one node        sbatch launch/slurm.sh train --config=configs/attn_anchored.py --workdir=runs/anchored
#   several nodes   sbatch --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 launch/slurm.sh train --config=...
#   an array        sbatch --array=0-7 launch/slurm.sh sweep --config=configs/sweeps/gamma.py --workdir=sweeps/gamma
#
# With one task, training uses all GPUs of the node; with several, each task has one, and they train together. The tasks
# of a sweep, in one job or in an array, share its cases. The workdir has to be on a disk that all nodes see.
#
#SBATCH --job-name=jax_repaint
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=1
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append

set -u

if [[ $# -eq 0 || $1 == -* ]]; then
  echo "error: say which command to run: sbatch launch/slurm.sh train --config=... --workdir=..." >&2
  exit 2
fi
command=$1
shift

# Slurm says how many tasks there are only if it was told.
tasks=${SLURM_NTASKS:-$((${SLURM_JOB_NUM_NODES:-1} * ${SLURM_NTASKS_PER_NODE:-1}))}
options=()
if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
  if [[ $command != sweep || $tasks -gt 1 ]]; then
    echo "error: the jobs of an array share the cases of a sweep, with one task each" >&2
    exit 2
  fi
  first=${SLURM_ARRAY_TASK_MIN:-0} last=${SLURM_ARRAY_TASK_MAX:-0} count=${SLURM_ARRAY_TASK_COUNT:-1}
  if (( last - first + 1 != count )); then
    echo "error: the jobs of an array share a sweep by their numbers, which are in a row, such as --array=0-7; what lost" \
      "jobs left is taken up by the sweep without an array" >&2
    exit 2
  fi
  options+=("--process_index=$((SLURM_ARRAY_TASK_ID - first))")
  options+=("--process_count=$count")
elif [[ $tasks -gt 1 ]]; then
  options+=(--distributed)
fi

# A task of a training that is gone leaves the others waiting; those of a sweep do not need each other.
[[ $command == sweep ]] && kill=0 || kill=1

# From Slurm 22.05 on, srun does not take the number of CPUs from sbatch.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
srun --kill-on-bad-exit="$kill" python -m "jax_repaint.$command" "$@" ${options[@]+"${options[@]}"}
code=$?

# SIGTERM comes before the time limit, and before a preemption. Training has saved its state; what a sweep has finished
# is on disk.
if [[ $code -eq 143 ]]; then
  echo "stopped by SIGTERM; queued again"
  # The number of one job of an array may be that of the whole array, which would be queued again with it.
  job=$SLURM_JOB_ID
  [[ -n ${SLURM_ARRAY_TASK_ID:-} ]] && job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
  scontrol requeue "$job"
fi
exit $code
