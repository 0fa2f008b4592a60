#!/usr/bin/env bash
# Submits every stage of a recipe, each after the ones it needs: shard arrays, merges, backbone pretrain, train,
# compress, add-modality, evals, report. Prints the jobs, one a line: number, stage. It runs on the login node and waits for nothing.
#
#   scripts/slurm/pipeline.sh RECIPE [DOMAIN-SPLIT='SOURCE OPTIONS']... [-- OPTIONS OF mdltool train]
#
#   scripts/slurm/pipeline.sh mine.yaml \
#     ucf101-train='/data/UCF-101 --format ucf101 --annotations /data/ucfTrainTestlist' \
#     ucf101-val='/data/UCF-101 --format ucf101 --annotations /data/ucfTrainTestlist' \
#     kitchen-train='/data/kitchen/train --format folder' kitchen-val='/data/kitchen/val --format folder' \
#     -- --set train.seed=1
#
# SOURCE OPTIONS are those of `mdltool shard`, split at blanks. What is not named must stand in the work directory
# (shards/DOMAIN-SPLIT). Started again after a failure, it does what is missing.
#
#   MDLTOOL_WORK             work directory (default ./artifacts); logs go to its slurm/
#   MDLTOOL_NAME             name of the model, eval and report (default: the recipe's)
#   MDLTOOL_PARTS            array tasks for each domain and split (default 4)
#   MDLTOOL_NODES            nodes of pretrain, train, compress, add-modality and eval (default 1)
#   MDLTOOL_TASKS            processes on each of these nodes, one a GPU (default 1)
#   MDLTOOL_CPUS             processors of each process and of the one-process stages (default 4)
#   MDLTOOL_PRETRAIN         domain to pretrain the backbone on, where the recipe wants pretrained weights
#   MDLTOOL_PRETRAIN_OPTIONS further options of `mdltool backbone pretrain`, split at blanks
#   MDLTOOL_BACKBONE         or: the backbone artifact to start from (default: the work directory's latest)
#   MDLTOOL_EVAL             options of `mdltool eval`, e.g. '--views 10x3 --split test'
#   MDLTOOL_COMPRESS         compress too: options of `mdltool compress`, e.g. '--rank 0.5 --finetune 500'; both models
#                            are scored and reported
#   MDLTOOL_MODALITY         add a modality to the model, compressed where it is: options of `mdltool add-modality`,
#                            e.g. '--modality audio'; scored and reported beside the others
#   MDLTOOL_SBATCH           options of sbatch for every job, split at blanks
#   MDLTOOL_SBATCH_TRAIN     the same for those stages, e.g. '--gpus-per-node=4 --time=24:00:00'
#   MDLTOOL_ENV, MDLTOOL_WORKERS, MDLTOOL_MAX_RESTARTS: see common.sh
#
# Partition, account and the like also come from sbatch's own variables: SBATCH_PARTITION, SBATCH_ACCOUNT ...
set -euo pipefail

fail() { printf 'error: %s\n  where: %s\n  fix:   %s\n' "$@" >&2; exit 1; }

if [ $# -eq 0 ]; then
  echo "usage: pipeline.sh RECIPE [DOMAIN-SPLIT='SOURCE OPTIONS']... [-- OPTIONS OF mdltool train]" >&2
  exit 2
fi
scripts="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
export MDLTOOL_HOME="${MDLTOOL_HOME:-$(dirname "$(dirname "$scripts")")}"
work="$(realpath -m "${MDLTOOL_WORK:-artifacts}")"
export MDLTOOL_WORK="$work"
export MDLTOOL_PARTS="${MDLTOOL_PARTS:-4}"

recipe="$1"
shift
sources=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case "$1" in
    *-*=*) sources+=("$1") ;;
    *) fail "'$1' is no DOMAIN-SPLIT='SOURCE OPTIONS'" "the command line" "e.g. a-train='videos --format folder'" ;;
  esac
  shift
done
if [ $# -gt 0 ]; then shift; fi   # the --; what is left are train's options

source_of() {  # DOMAIN-SPLIT: is it to be made?
  local entry
  for entry in "${sources[@]}"; do [ "${entry%%=*}" != "$1" ] || return 0; done
  return 1
}

check_recipe() {  # prints: name, weights, domains...
  PATH="$MDLTOOL_HOME/.venv/bin:$PATH" python - "$recipe" "$@" << 'END'
import sys
from mdltool.errors import MdlError
from mdltool.recipe import load

words = sys.argv[2:]
sets = [value for option, value in zip(words, words[1:]) if option == "--set"]
try:
    recipe = load(sys.argv[1], sets)
except MdlError as error:
    sys.exit(f"error: {error}")
print(recipe.name, recipe.backbone.weights, *recipe.domains)
END
}

# Everything that can be seen to be wrong is said before the first job is submitted.
checked="$(check_recipe "$@")"
read -r name weights domains <<< "$checked"
name="${MDLTOOL_NAME:-$name}"
for domain in $domains; do
  source_of "$domain-train" || [ -f "$work/shards/$domain-train/artifact.json" ] ||
    fail "there are no shards of $domain-train" "$work/shards" "add $domain-train='SOURCE --format F'"
done
backbone=()
if [ "$weights" != scratch ] && [ -n "${MDLTOOL_BACKBONE:-}" ]; then
  [ -f "$MDLTOOL_BACKBONE/artifact.json" ] ||
    fail "there is no backbone artifact" "$MDLTOOL_BACKBONE" "mdltool backbone fetch, or another MDLTOOL_BACKBONE"
  backbone=(--backbone "$MDLTOOL_BACKBONE")
elif [ "$weights" != scratch ] && [ -n "${MDLTOOL_PRETRAIN:-}" ]; then
  backbone=(--backbone "$work/backbone/$name-$MDLTOOL_PRETRAIN")
elif [ "$weights" != scratch ] && [ ! -e "$work/backbone/latest" ]; then
  fail "the recipe wants a backbone with '$weights' weights, and there is none" "$work/backbone" \
    "mdltool backbone fetch, or MDLTOOL_PRETRAIN=DOMAIN, or MDLTOOL_BACKBONE=PATH"
fi

mkdir -p "$work/slurm"
read -ra every <<< "${MDLTOOL_SBATCH:-}"
read -ra parallel <<< "--nodes=${MDLTOOL_NODES:-1} --ntasks-per-node=${MDLTOOL_TASKS:-1} ${MDLTOOL_SBATCH_TRAIN:-}"

submit() {  # STAGE AFTER SBATCH-WORDS...: AFTER is job numbers with ':' before each; leaves the new one in $job
  local stage="$1" after="$2" log='%x-%j.log'
  shift 2
  if [[ " $* " = *" --array="* ]]; then log='%x-%A_%a.log'; fi
  job="$(sbatch --parsable --job-name="$stage" --output="$work/slurm/$log" --cpus-per-task="${MDLTOOL_CPUS:-4}" \
    --kill-on-invalid-dep=yes ${after:+--dependency=afterok$after} "${every[@]}" "$@")"
  job="${job%%;*}"   # a federation prints number;cluster
  echo "$job $stage"
}

shards=""
for entry in "${sources[@]}"; do
  key="${entry%%=*}"
  read -ra words <<< "${entry#*=}"
  submit "shard-$key" "" --array="0-$((MDLTOOL_PARTS - 1))" "$scripts/shard.sh" "${words[@]}" \
    --domain "${key%-*}" --split "${key##*-}"
  parts=()
  for ((i = 0; i < MDLTOOL_PARTS; i++)); do parts+=("$work/shards/$key-part${i}of$MDLTOOL_PARTS"); done
  submit "merge-$key" ":$job" "$scripts/stage.sh" shard --merge "${parts[@]}"
  shards="$shards:$job"
done

ready="$shards"
if [ "$weights" != scratch ] && [ -z "${MDLTOOL_BACKBONE:-}" ] && [ -n "${MDLTOOL_PRETRAIN:-}" ]; then
  read -ra words <<< "${MDLTOOL_PRETRAIN_OPTIONS:-}"
  submit pretrain "$shards" "${parallel[@]}" "$scripts/pretrain.sh" "${backbone[1]}" \
    --data "$MDLTOOL_PRETRAIN=$work/shards/$MDLTOOL_PRETRAIN-train" "${words[@]}"
  ready="$ready:$job"
fi
submit train "$ready" "${parallel[@]}" "$scripts/train.sh" "$work/model/$name" --recipe "$recipe" \
  "${backbone[@]}" "$@"
read -ra words <<< "${MDLTOOL_EVAL:-}"
last="$name" made="$job" evals=() scored=""

score() {  # SUFFIX: evaluates the model made last
  submit "eval$1" ":$made" "${parallel[@]}" "$scripts/eval.sh" "$work/model/$last" --out "$work/eval/$last" "${words[@]}"
  evals+=("$work/eval/$last")
  scored="$scored:$job"
}

further() {  # STAGE SUFFIX OPTIONS...: a model out of the one made last, and its eval
  local stage="$1" suffix="$2"
  shift 2
  submit "$stage" ":$made" "${parallel[@]}" "$scripts/further.sh" "$work/model/$last-$suffix" "$stage" \
    "$work/model/$last" "$@"
  last="$last-$suffix" made="$job"
  score "-$suffix"
}

score ""
read -ra how <<< "${MDLTOOL_COMPRESS:-}"
if [ "${#how[@]}" -gt 0 ]; then further compress compressed "${how[@]}"; fi
read -ra how <<< "${MDLTOOL_MODALITY:-}"
if [ "${#how[@]}" -gt 0 ]; then further add-modality extended "${how[@]}"; fi
submit report "$scored" "$scripts/stage.sh" report "${evals[@]}" --out "$work/report/$name"
