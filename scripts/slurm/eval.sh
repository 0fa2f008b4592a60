#!/usr/bin/env bash
# Scores a model in as many processes as the job has tasks, which share the clips.
#
#   sbatch scripts/slurm/eval.sh MODEL [OPTIONS OF mdltool eval]
#
#SBATCH --job-name=eval
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --cpus-per-task=4
#SBATCH --time=04:00:00
source "${MDLTOOL_HOME:-$PWD}/scripts/slurm/common.sh"

in_all_tasks mdltool eval "$@" --workers "$workers"
