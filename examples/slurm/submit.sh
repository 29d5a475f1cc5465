#!/usr/bin/env bash
# Submits runs, each described by an env file; several are a chain, held together by AFTER.
#
#   bash examples/slurm/submit.sh [--dry-run] [--site FILE] RUN.env [RUN.env...] [NAME=VALUE...] [-- FLAGS...]
#
# --dry-run   check everything, print what would be submitted, submit nothing
# --site      settings of this cluster, read before each run's; default env/site.env
# NAME=VALUE  replaces a setting of every run; FLAGS are added to those of every training run
#
# Nothing is submitted unless all runs pass. Exit status: 0 submitted, or would be; 2 refused.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=examples/slurm/lib.sh
source "$HERE/lib.sh"
# shellcheck source=examples/slurm/checks.sh
source "$HERE/checks.sh"

usage() {
    sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p}' "${BASH_SOURCE[0]}"
    printf '\nSettings: name, kind, default (- for none), meaning\n'
    printf '  %s\n' "${SETTINGS[@]}"
}

DRY_RUN=no SITE=$HERE/env/site.env FILES=() OVERRIDES=() MORE_FLAGS=()

# `source` looks for a plain name on PATH first.
with_slash() { case $1 in */*) echo "$1" ;; *) echo "./$1" ;; esac; }

parse_command_line() {
    while [ $# -gt 0 ]; do
        case $1 in
        --dry-run) DRY_RUN=yes ;;
        --site)
            [ $# -gt 1 ] || fail '--site: needs a file'
            SITE=$(with_slash "$2") && shift
            ;;
        --help | -h) usage && exit 0 ;;
        --) shift && MORE_FLAGS=("$@") && break ;;
        -*) fail "$1: no such option; legal: --dry-run, --site FILE, -- FLAGS" ;;
        *=*) OVERRIDES+=("$1") ;;
        *) FILES+=("$(with_slash "$1")") ;;
        esac
        shift
    done
    [ "${#FILES[@]}" -gt 0 ] ||
        fail "no env file; in $HERE/env: $(find "$HERE/env" -name '*.env' ! -name site.env -printf '%f\n' | sort | xargs)"
}

load_run() {
    local each
    set_defaults
    load_file "$SITE"
    load_file "$SITE" "$1"
    for each in "${OVERRIDES[@]}"; do override "$each"; done
    [ "${#COMMAND[@]}" -gt 0 ] || [ "${#PREPROCESS[@]}" -gt 0 ] || FLAGS+=("${MORE_FLAGS[@]}")
    complete_settings
}

# DEPENDENCY: sbatch's flags for the runs that this one follows.
build_dependency() {
    local name ids=''
    DEPENDENCY=()
    for name in "${AFTER[@]}"; do ids+=${ID[$name]:+:${ID[$name]}}; done
    [ -z "$ids" ] || DEPENDENCY=("--dependency=afterok$ids" --kill-on-invalid-dep=yes)
}

# SBATCH: the whole command. Argument: the folder with what the job reads.
build_sbatch() {
    local excluded log=%x-%j
    excluded=$(excluded_nodes)
    [ "${#ARRAY[@]}" -eq 0 ] || log=%x-%A_%a
    build_dependency
    SBATCH=(sbatch --parsable "--job-name=$NAME" "--nodes=$((NODES + SPARE_NODES))" --ntasks-per-node=1
        "--cpus-per-task=$CPUS_PER_TASK" "--time=$TIME" "--signal=B:USR1@$SIGNAL_SECONDS" "--output=$RUN/logs/$log.log")
    [ "$GPUS_PER_NODE" = 0 ] || SBATCH+=("--gpus-per-node=$GPUS_PER_NODE")
    [ -z "$PARTITION" ] || SBATCH+=("--partition=$PARTITION")
    [ -z "$ACCOUNT" ] || SBATCH+=("--account=$ACCOUNT")
    [ "$EXCLUSIVE" = no ] || SBATCH+=(--exclusive --mem=0)
    [ -z "$excluded" ] || SBATCH+=("--exclude=$excluded")
    [ "${#ARRAY[@]}" -eq 0 ] || SBATCH+=("--array=0-$((${#ARRAY[@]} - 1))")
    SBATCH+=("${DEPENDENCY[@]}" "${SBATCH_FLAGS[@]}" "$1/train.sbatch" "$1")
}

# PLAN, RENDER: what prepares data; the array is the tool's own.
build_preprocess() {
    PLAN=("$LOGIN_PYTHON" -m megatron_hybrid.tools.preprocess plan --output-dir "$DATA_ROOT/$NAME" "${PREPROCESS[@]}")
    RENDER=("$LOGIN_PYTHON" -m megatron_hybrid.tools.preprocess slurm --output-dir "$DATA_ROOT/$NAME" --tasks "$TASKS"
        --workers "$CPUS_PER_TASK" --time "$TIME" --drain-seconds "$SIGNAL_SECONDS")
    [ -z "$PARTITION" ] || RENDER+=(--partition "$PARTITION")
    [ -z "$ACCOUNT" ] || RENDER+=(--account "$ACCOUNT")
}

describe_run() {
    local index
    printf '== %s\n' "$NAME"
    if [ "${#PREPROCESS[@]}" -gt 0 ]; then
        build_preprocess
        print_command "${PLAN[@]}"
        print_command "${RENDER[@]}"
        print_command bash "$DATA_ROOT/$NAME/work/slurm/submit.sh"
        return
    fi
    build_sbatch "$RUN/launch/TIME"
    NODE_SCRIPT=$RUN/launch/TIME/node.sh
    print_command "${SBATCH[@]}"
    for index in $(tasks); do
        (
            select_task "$index"
            if [ "${#COMMAND[@]}" -gt 0 ]; then build_command_step; else build_training_step NODES MASTER PORT; fi
            print_command "${COMMAND_LINE[@]}"
        )
    done
}

# A job sees the variables in the list and PASS_ENV, whatever else is in the environment of who submits it.
submit_clean() (
    local name
    while read -r name; do
        [[ " ${ALLOWED_ENVIRONMENT[*]} ${PASS_ENV[*]} " == *" $name "* ]] || unset "$name"
    done < <(compgen -e)
    cd / && exec "$@"
)

# ID[NAME] is set.
submit_run() {
    local launch said
    if [ "${#PREPROCESS[@]}" -gt 0 ]; then
        build_preprocess
        (cd "$REPO" && "${PLAN[@]}" && "${RENDER[@]}") >&2 || fail "$NAME: the preparation of data could not be planned" 1
        said=$(submit_clean bash "$DATA_ROOT/$NAME/work/slurm/submit.sh")
        ID[$NAME]=${said##* }
        echo "$NAME: $said"
        return
    fi
    launch=$RUN/launch/$(date -u +%Y%m%dT%H%M%SZ)-$$
    mkdir -p "$launch" "$RUN/logs"
    cp "$HERE/lib.sh" "$HERE/node.sh" "$HERE/train.sbatch" "$launch/"
    freeze >"$launch/settings.sh"
    build_sbatch "$launch"
    said=$(submit_clean "${SBATCH[@]}") || fail "$NAME: sbatch refused it; runs before it are submitted: ${ID[*]:-none}" 1
    ID[$NAME]=${said%%;*}
    echo "$NAME: job ${ID[$NAME]}${DEPENDENCY[0]:+ after ${DEPENDENCY[0]#*:}}, log in $RUN/logs"
}

main() {
    local file
    parse_command_line "$@"
    for file in "${FILES[@]}"; do
        load_run "$file"
        check_run
        [ "${#PROBLEMS[@]}" -eq 0 ] || { say "$file cannot be submitted:"; report_problems; }
        ID[$NAME]="JOB-OF-$NAME" PROMISED[$NAME]=$(promises)
        [ "$DRY_RUN" = no ] || describe_run
        check_plan
        warn_lead
        report_problems
    done
    [ "$DRY_RUN" = no ] || exit 0
    ID=()
    for file in "${FILES[@]}"; do
        load_run "$file"
        submit_run
    done
}

main "$@"
