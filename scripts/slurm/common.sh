# Sourced by the job scripts; runs on the compute node. Slurm runs a copy of a script, so its own path says nothing:
#
#   MDLTOOL_HOME           the repository (default: where sbatch was called); its .venv is used where there is one
#   MDLTOOL_ENV            a file to source first, for `module load` and the like
#   MDLTOOL_WORK           the work directory, as everywhere (default: ./artifacts)
#   MDLTOOL_WORKERS        loader processes of a training or eval task (default: its processors)
#   MDLTOOL_MAX_RESTARTS   requeue a job so many times at most (default 100)
set -euo pipefail
if [ -n "${MDLTOOL_ENV:-}" ]; then source "$MDLTOOL_ENV"; fi
PATH="${MDLTOOL_HOME:-$PWD}/.venv/bin:$PATH"

cpus="${SLURM_CPUS_PER_TASK:-1}"
workers="${MDLTOOL_WORKERS:-$cpus}"
# The same number of threads on every start: a model's digest depends on it.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$cpus}"

# COMMAND...: in every task of the job, as the ranks of one process group.
in_all_tasks() {
  MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
  # below the ports that kernels hand out, and another one after each restart
  MASTER_PORT=$((20000 + (10 * SLURM_JOB_ID + ${SLURM_RESTART_COUNT:-0}) % 12000))
  SRUN_CPUS_PER_TASK="$cpus"   # srun does not take it over from sbatch
  export MASTER_ADDR MASTER_PORT SRUN_CPUS_PER_TASK
  # --wait and not --kill-on-bad-exit: a rank that leaves first must not take down the one that writes the
  # checkpoint, and one that crashed must not leave the others waiting for it until the time limit.
  # /dev/null: srun gives every task a pipe as its input, and mdltool would look for paths in it.
  srun --wait=300 bash -c 'export WORLD_SIZE=$SLURM_NTASKS RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID
    exec "$@" < /dev/null' task "$@"
}

# OUT COMMAND...: makes the artifact OUT in all tasks, goes on where an earlier start was stopped, and requeues the
# job when this one is stopped.
until_done() {
  local out="$1" code=0 resume=()
  shift
  if [ -f "$out.partial/partial.json" ]; then resume=(--resume); fi
  in_all_tasks "$@" --out "$out" --workers "$workers" "${resume[@]}" || code=$?
  case "$code" in
    # 75: stopped by a signal, checkpoint written; 128 + SIGUSR1 or SIGTERM: it came before or after the updates
    75 | 138 | 143) requeue || true ;;
  esac
  exit "$code"
}

# Not by a trap: `scancel` ends this script with SIGTERM before it comes here, so what is cancelled stays so.
requeue() {
  if [ "${SLURM_RESTART_COUNT:-0}" -ge "${MDLTOOL_MAX_RESTARTS:-100}" ]; then
    echo "error: restarted $SLURM_RESTART_COUNT times; not again (MDLTOOL_MAX_RESTARTS)" >&2
    return 1
  fi
  echo "stopped by a signal; requeueing job $SLURM_JOB_ID" >&2
  scontrol requeue "$SLURM_JOB_ID"
}
