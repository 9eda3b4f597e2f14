#!/bin/bash
# Applies the steps of kubernetes-job.yaml one after another, waiting for each Job to complete; stops if a Job fails.
# usage: ./kubernetes-submit.sh [kubectl options, such as --namespace=mine]; run it again to continue
set -eu

file=$(dirname "$(realpath "$0")")/kubernetes-job.yaml
kubectl "$@" apply --filename "$file" --selector step=storage
for step in flow encode finalize-encode mix finalize-mix rest; do
    kubectl "$@" apply --filename "$file" --selector "step=$step"
    conditions=
    while [[ $conditions != *Complete* ]]; do
        if [[ $conditions == *Failed* ]]; then
            echo "Step $step failed. Read 'kubectl logs --selector step=$step', run 'kubectl delete job lsmix-$step', and try again." >&2
            exit 1
        fi
        sleep "${PAUSE:-10}"
        conditions=$(kubectl "$@" get job "lsmix-$step" --output 'jsonpath={.status.conditions[?(@.status=="True")].type}')
    done
done
