#!/bin/bash
# Submits all steps of a recipe to SLURM. Each step starts when the previous one has succeeded; encode and mix are job arrays.
# usage: ./slurm-submit.sh RECIPE WORKSPACE TASKS [sbatch options, such as --partition=gpu]
# Each task requests a GPU. On a cluster without GPUs: GPU= ./slurm-submit.sh …
set -eu

recipe=$(realpath "$1") workspace=$(realpath -m "$2") tasks=$3
shift 3
here=$(dirname "$(realpath "$0")")
gpu=${GPU---gres=gpu:1}
before=

# Submits a step that depends on the previous one. The options are split into words on purpose.
send() {
    local step=$1 options=$2
    shift 2
    # shellcheck disable=SC2086
    before=$(sbatch --parsable ${before:+--dependency=afterok:$before --kill-on-invalid-dep=yes} $options "$@" \
        "$here/slurm-array.sh" "$step" "$recipe" "$workspace" "$tasks")
    before=${before%%;*} # on multi-cluster systems, sbatch appends the cluster name
    echo "$step: job $before"
}

mkdir -p "$workspace"
send train-glow "$gpu" "$@"
send encode "$gpu --array=0-$((tasks - 1))" "$@"
send finalize "" "$@"
send mix "$gpu --array=0-$((tasks - 1))" "$@"
send finalize "" "$@"
send run "$gpu" "$@"
