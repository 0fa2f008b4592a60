#!/usr/bin/env bash
# A stage that makes a model out of a finished one (compress, add-modality, add-domain), in as many processes as the
# job has tasks, which share its training; options and preemption as in train.sh.
#
#   sbatch scripts/slurm/further.sh OUT compress MODEL --rank 0.5 [--finetune 500] [OPTIONS OF mdltool compress]
#   sbatch scripts/slurm/further.sh OUT add-modality MODEL --modality audio [OPTIONS OF mdltool add-modality]
#
#SBATCH --job-name=further
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@120
#SBATCH --cpus-per-task=4
#SBATCH --time=12:00:00
source "${MDLTOOL_HOME:-$PWD}/scripts/slurm/common.sh"

out="$1"
shift
until_done "$out" mdltool "$@"
