#!/usr/bin/env bash
# backbone pretrain in as many processes as the job has tasks; options and preemption as in train.sh.
#
#   sbatch scripts/slurm/pretrain.sh OUT --recipe R --data D=SHARDS [OPTIONS OF mdltool backbone pretrain]
#
#SBATCH --job-name=pretrain
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@120
#SBATCH --cpus-per-task=4
#SBATCH --time=12:00:00
source "${MDLTOOL_HOME:-$PWD}/scripts/slurm/common.sh"

out="$1"
shift
until_done "$out" mdltool backbone pretrain "$@"
