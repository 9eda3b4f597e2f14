#!/bin/bash
# One step of a recipe as a SLURM job, or as one task of a job array; slurm-submit.sh submits all steps in order.
# usage: sbatch [options] slurm-array.sh STEP RECIPE WORKSPACE [TASKS]
#SBATCH --job-name=lsmix
#SBATCH --cpus-per-task=8
#SBATCH --mem=16G
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
set -u

step=$1 recipe=$2 workspace=$3
words=("$step" "$recipe" --workspace "$workspace" --quiet)
# Not SLURM_ARRAY_TASK_COUNT: for a resubmission with --array=3,7 it would be 2, and shards would be divided differently.
[ -n "${SLURM_ARRAY_TASK_ID-}" ] && words+=(--array-index "$SLURM_ARRAY_TASK_ID" --array-size "${4:?the number of tasks}")
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"

# SLURM sends USR1 two minutes before the time limit: lsmix stops at the next safe point, and the job is requeued below.
# TERM means scancel or preemption: lsmix also stops, but SLURM decides whether the job is requeued.
time_is_up='' signalled='' child=''
trap 'time_is_up=1 signalled=1; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null' USR1
trap 'signalled=1; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null' TERM INT
lsmix "${words[@]}" &
child=$!
[ -z "$signalled" ] || kill -TERM "$child" 2>/dev/null # the signal arrived before lsmix was started
code=127 signalled=1
while [ -n "$signalled" ]; do # a signal interrupts wait, while lsmix is still running
    signalled=
    wait "$child"
    status=$?
    [ "$status" = 127 ] || code=$status # 127: an earlier wait already returned the exit code
done

again=
[ -n "$time_is_up" ] && [ "$code" = 130 ] && again=1
# 4: locked, and the lock of a dead host takes a while to expire; 6: some shards failed, all completed shards are kept.
case "$code" in 4 | 6) [ "${SLURM_RESTART_COUNT:-0}" -lt 3 ] && again=1 ;; esac
[ -n "$again" ] && scontrol requeue "$SLURM_JOB_ID"
exit "$code"
