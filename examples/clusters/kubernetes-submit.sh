#!/bin/bash
# Applies the steps of kubernetes-job.yaml one after another, each when the Job before is complete; ends where one failed.
# usage: ./kubernetes-submit.sh [options of kubectl, such as --namespace=mine]; started again, it goes on
set -eu

file=$(dirname "$(realpath "$0")")/kubernetes-job.yaml
kubectl "$@" apply --filename "$file" --selector step=storage
for step in flow encode finalize-encode mix finalize-mix rest; do
    kubectl "$@" apply --filename "$file" --selector "step=$step"
    conditions=
    while [[ $conditions != *Complete* ]]; do
        if [[ $conditions == *Failed* ]]; then
            echo "step $step failed: kubectl logs --selector step=$step; then kubectl delete job lsmix-$step, and again" >&2
            exit 1
        fi
        sleep "${PAUSE:-10}"
        conditions=$(kubectl "$@" get job "lsmix-$step" --output 'jsonpath={.status.conditions[?(@.status=="True")].type}')
    done
done
