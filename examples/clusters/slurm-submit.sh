#!/bin/bash
# Sends a whole recipe to SLURM: each step begins when the one before has ended well; encode and mix are job arrays.
# usage: ./slurm-submit.sh RECIPE WORKSPACE PARTS [options of sbatch, such as --partition=gpu]
# A GPU for each task; on a cluster without any: GPU= ./slurm-submit.sh …
set -eu

recipe=$(realpath "$1") workspace=$(realpath -m "$2") parts=$3
shift 3
here=$(dirname "$(realpath "$0")")
gpu=${GPU---gres=gpu:1}
before=

# Sends one step, after the one sent before it. Its options are split into words on purpose.
send() {
    local step=$1 options=$2
    shift 2
    # shellcheck disable=SC2086
    before=$(sbatch --parsable ${before:+--dependency=afterok:$before --kill-on-invalid-dep=yes} $options "$@" \
        "$here/slurm-array.sh" "$step" "$recipe" "$workspace" "$parts")
    before=${before%%;*} # with several clusters their name follows
    echo "$step: job $before"
}

mkdir -p "$workspace"
send train-glow "$gpu" "$@"
send encode "$gpu --array=0-$((parts - 1))" "$@"
send finalize "" "$@"
send mix "$gpu --array=0-$((parts - 1))" "$@"
send finalize "" "$@"
send run "$gpu" "$@"
