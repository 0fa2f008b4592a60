#!/usr/bin/env bash
# Any other stage, in one process.
#
#   sbatch scripts/slurm/stage.sh shard --merge artifacts/shards/k400-train-part*of16
#   sbatch --dependency=afterok:JOB scripts/slurm/stage.sh report artifacts/eval/mine
#
#SBATCH --job-name=stage
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --time=04:00:00
source "${MDLTOOL_HOME:-$PWD}/scripts/slurm/common.sh"

mdltool "$@"
