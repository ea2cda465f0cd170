#!/bin/bash
#SBATCH --job-name=prebench
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#
# Variants x seeds as independent jobs on one study, then evaluation and report (docs/cluster.md).
#
#   bash examples/slurm.sh            submits all of it: prepare -> one job per run -> evaluate and report
#   RUN=1 bash examples/slurm.sh      says which run job 1 of the array trains
#
# The study's folder must lie where all nodes see it. A job that is preempted, or reaches its time limit, saves a
# checkpoint and is queued again; a job that fails leaves the others alone, and submitting again does what is missing.
set -euo pipefail

STUDY=${STUDY:-paper}
RESULTS=${RESULTS:-results}
SUITE=${SUITE:-paper}
PRESET=${PRESET:-siglip2-qwen25-7b}
VARIANTS=${VARIANTS:-baseline pre}
SEEDS=${SEEDS:-0 1 2}
MORE=${MORE:-}         # further options of `prebench run`, such as --mirror FOLDER
LAUNCH=${LAUNCH-accelerate launch --config_file examples/fsdp2.yaml --num_processes 8} # empty: one process per run
PREBENCH=${PREBENCH:-prebench}

runs=()
for seed in $SEEDS; do
    for variant in $VARIANTS; do runs+=("$variant-s$seed"); done
done
# Of a list of words, words that a shell splits: $PREBENCH, $MORE.
options=(--suite "$SUITE" --preset "$PRESET" --name "$STUDY" --results "$RESULTS"
    --variants "${VARIANTS// /,}" --seeds "${SEEDS// /,}" $MORE)

# Run a command; where SIGTERM ended it with a checkpoint (exit code 75), or before it listened, queue this job again.
survive() {
    local code=0 stopped= child=
    trap 'stopped=1; [ -z "$child" ] || kill -TERM "$child"' TERM
    "$@" &
    child=$!
    [ -z "$stopped" ] || kill -TERM "$child" # the signal came before the child's number was known
    wait "$child" || code=$?
    if [ -n "$stopped" ]; then # the signal ended the waiting, not the command
        code=0
        wait "$child" || code=$?
    fi
    if [ "$code" -eq 75 ] || { [ -n "$stopped" ] && [ "$code" -eq 143 ]; }; then
        scontrol requeue "$SLURM_JOB_ID"
        exit 0
    fi
    return "$code"
}

if [ -n "${RUN:-}" ]; then
    echo "${runs[$RUN]}"
elif [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
    survive $PREBENCH train --study "$STUDY" --results "$RESULTS" --run "${runs[$SLURM_ARRAY_TASK_ID]}" \
        ${LAUNCH:+--launch "$LAUNCH"}
elif [ "${1:-submit}" = prepare ]; then
    survive $PREBENCH run "${options[@]}" --prepare
elif [ "${1:-submit}" = finish ]; then
    survive $PREBENCH run "${options[@]}"
else
    prepare=$(sbatch --parsable --gpus-per-node=1 "$0" prepare)
    train=$(sbatch --parsable --dependency="afterok:$prepare" --array="0-$((${#runs[@]} - 1))" "$0")
    finish=$(sbatch --parsable --dependency="afterok:$train" --gpus-per-node=1 "$0" finish)
    echo "prepare: job $prepare; ${#runs[@]} runs (${runs[*]}): array $train; evaluation and report: job $finish"
fi
