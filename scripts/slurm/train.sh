#!/usr/bin/env bash
# Training in as many processes as the job has tasks, on any number of nodes. OUT is the model's directory.
#
#   sbatch scripts/slurm/train.sh OUT --recipe R [OPTIONS OF mdltool train]
#   sbatch --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 scripts/slurm/train.sh OUT --recipe R ...
#
# Two minutes before the time limit (--signal), and on preemption, every process gets a signal; they write a
# checkpoint and the job is queued again under its number, so jobs that depend on it wait on. The same command,
# started anew, does what is left: all of it, the rest after the last checkpoint, or nothing.
#
#SBATCH --job-name=train
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@120
#SBATCH --cpus-per-task=4
#SBATCH --time=12:00:00
source "${MDLTOOL_HOME:-$PWD}/scripts/slurm/common.sh"

out="$1"
shift
until_done "$out" mdltool train "$@"
