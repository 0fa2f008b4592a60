#!/usr/bin/env bash
# One part of a domain's shards per array task; join them with `stage.sh shard --merge PART...`.
#
#   sbatch --array=0-15 scripts/slurm/shard.sh SOURCE --format F --domain D --split S [OPTIONS OF mdltool shard]
#   MDLTOOL_PARTS=16 sbatch --array=3,7 ...              these two parts of 16 again
#
#SBATCH --job-name=shard
#SBATCH --output=%x-%A_%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --cpus-per-task=4
#SBATCH --time=12:00:00
source "${MDLTOOL_HOME:-$PWD}/scripts/slurm/common.sh"

# A part that was preempted is queued again by Slurm, and keeps its finished shards.
parts="${MDLTOOL_PARTS:-$((SLURM_ARRAY_TASK_MAX + 1))}"
mdltool shard "$@" --part "$SLURM_ARRAY_TASK_ID/$parts" --workers "$cpus"
