#!/usr/bin/env bash
# compress in as many processes as the job has tasks, which share the fine-tuning; options and preemption as in
# train.sh.
#
#   sbatch scripts/slurm/compress.sh OUT MODEL --rank 0.5 [--finetune 500] [OPTIONS OF mdltool compress]
#
#SBATCH --job-name=compress
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@120
#SBATCH --cpus-per-task=4
#SBATCH --time=12:00:00
source "${MDLTOOL_HOME:-$PWD}/scripts/slurm/common.sh"

out="$1"
shift
until_done "$out" mdltool compress "$@"
