#!/bin/bash
# One step of a recipe as a SLURM job, or as one part of a job array; slurm-submit.sh sends all steps in their order.
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
# Not SLURM_ARRAY_TASK_COUNT: sent again with --array=3,7 it would be 2, and the shards would be divided differently.
[ -n "${SLURM_ARRAY_TASK_ID-}" ] && words+=(--array-index "$SLURM_ARRAY_TASK_ID" --array-size "${4:?the number of tasks}")
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"

# SLURM sends USR1 two minutes before the time is up: lsmix stops at the next safe point, and the job goes on later.
# TERM is scancel or preemption: lsmix stops likewise, and whether the job goes on is SLURM's to say.
time_is_up='' signalled='' child=''
trap 'time_is_up=1 signalled=1; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null' USR1
trap 'signalled=1; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null' TERM INT
lsmix "${words[@]}" &
child=$!
[ -z "$signalled" ] || kill -TERM "$child" 2>/dev/null # it came before there was a process to stop
code=127 signalled=1
while [ -n "$signalled" ]; do # a signal ends the waiting, and not lsmix
    signalled=
    wait "$child"
    status=$?
    [ "$status" = 127 ] || code=$status # 127: its code is known already
done

again=
[ -n "$time_is_up" ] && [ "$code" = 130 ] && again=1
# 4: the lock of a dead host may take a while to go; 6: some shards failed, all others are kept.
case "$code" in 4 | 6) [ "${SLURM_RESTART_COUNT:-0}" -lt 3 ] && again=1 ;; esac
[ -n "$again" ] && scontrol requeue "$SLURM_JOB_ID"
exit "$code"
