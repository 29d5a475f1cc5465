# Sourced by submit.sh: everything that an env file can get wrong, said before anything is submitted.
# shellcheck shell=bash
# shellcheck disable=SC2153,SC2154 # settings are set by name, from the table in lib.sh

#: Of the runs of this command, by NAME: Slurm's job, what it makes, a run that follows it and was named before it.
declare -A ID=() PROMISED=() UNMET=()

#: Flags that settings stand for.
declare -A OWNED=(
    [--preset]=PRESET [--save]=RUN [--load]=START [--fresh]=START [--pretrained-checkpoint]=FROM [--data-path]=DATA
    [--mock-data]='DATA=(mock)' [--data-cache-path]=RUN [--tensorboard-dir]=RUN [--stop-file]=RUN
)

# Settings that follow from others.
complete_settings() {
    [ "$RANKS_PER_NODE" != 0 ] || RANKS_PER_NODE=$GPUS_PER_NODE
    if [ -z "$PYTHON" ]; then
        if [ -n "$CONTAINER_IMAGE" ]; then PYTHON=python3; else PYTHON=$REPO/.venv/bin/python; fi
    fi
    [ "${COMMAND[0]:-}" != python ] || COMMAND[0]=$PYTHON
    if [ -z "$LOGIN_PYTHON" ]; then
        if [ -x "$REPO/.venv/bin/python" ]; then LOGIN_PYTHON=$REPO/.venv/bin/python; else LOGIN_PYTHON=python3.12; fi
    fi
}

# The nearest folder above a path that exists can be written to.
can_be_made() {
    local path=$1
    while [ ! -e "$path" ]; do path=$(dirname "$path"); done
    [ -d "$path" ] && [ -w "$path" ]
}

# Whether a run before this one, of the same command, makes the path.
is_promised() {
    local name each
    for name in "${AFTER[@]}"; do
        while read -r each; do
            [[ -n $each && ($1 == "$each" || $1 == "$each"/*) ]] && return 0
        done <<<"${PROMISED[$name]:-}"
    done
    return 1
}

promises() {
    if [ "${#PREPROCESS[@]}" -gt 0 ]; then echo "$DATA_ROOT/$NAME"; elif [ "${#COMMAND[@]}" -gt 0 ]; then
        printf '%s\n' "${MAKES[@]}"
    else echo "$RUN"; fi
}

check_kind() {
    local name=$1 kind=$2 default=$3 value=${!1}
    [ -n "$value" ] || { [ "$default" = - ] && return 0; }
    case $kind in
    word) [[ $value =~ ^[A-Za-z0-9_.,+-]+$ ]] || problem "$name=$value: legal: letters, digits and _ . , + -" ;;
    int) [[ $value =~ ^[0-9]+$ ]] || problem "$name=$value: must be a whole number without a unit" ;;
    pint) [[ $value =~ ^[1-9][0-9]*$ ]] || problem "$name=$value: must be a whole number of at least 1, without a unit" ;;
    number) [[ $value =~ ^[0-9]+(\.[0-9]+)?$ ]] || problem "$name=$value: must be a number without a unit" ;;
    time) [ -n "$(seconds_of "$value")" ] || problem "$name=$value: must be [DAYS-]HH:MM:SS, as 24:00:00 or 2-00:00:00" ;;
    yesno) [[ $value =~ ^(yes|no)$ ]] || problem "$name=$value: legal: yes, no" ;;
    file)
        if [[ $value != /* ]]; then problem "$name=$value: must be an absolute path"; elif [ ! -r "$value" ]; then
            problem "$name=$value: does not exist, or cannot be read"
        fi
        ;;
    folder)
        if [[ $value != /* || $value =~ [[:space:]%] ]]; then
            problem "$name=$value: must be an absolute path without white space and %"
        elif ! can_be_made "$value"; then problem "$name=$value: cannot be made or written to; name another folder"; fi
        ;;
    *\|*) [[ "|$kind|" == *"|$value|"* ]] || problem "$name=$value: legal: ${kind//|/, }" ;;
    esac
}

check_run() {
    local line name kind default before
    PROBLEMS=()
    for line in "${SETTINGS[@]}"; do
        read -r name kind default _ <<<"$line"
        is_list "$name" && continue
        [[ $(declare -p "$name") != 'declare -a'* ]] || { problem "$name: is one value: $name=VALUE"; continue; }
        check_kind "$name" "$kind" "$default"
    done
    for name in RUNS NAME TIME; do [ -n "${!name}" ] || problem "$name: missing; give it in the env file"; done
    [ "${#PROBLEMS[@]}" -eq 0 ] || return 0 # what follows reads numbers
    [ -d "$RUNS" ] || problem "RUNS=$RUNS: does not exist; make it, or name the folder in $SITE"
    [ -z "${ID[$NAME]:-}" ] || problem "NAME=$NAME: two runs of this command have it"
    for before in "${AFTER[@]}"; do
        [ -n "${ID[$before]:-}" ] || UNMET[$before]=$NAME
    done
    [ -z "${UNMET[$NAME]:-}" ] || problem "AFTER: ${UNMET[$NAME]} follows $NAME; name $NAME's env file before its"
    (($(seconds_of "$TIME") > SIGNAL_SECONDS)) ||
        problem "SIGNAL_SECONDS=$SIGNAL_SECONDS: must be less than TIME=$TIME; nearest legal: $(($(seconds_of "$TIME") - 1))"
    ((SIGNAL_SECONDS <= 65535)) || problem "SIGNAL_SECONDS=$SIGNAL_SECONDS: Slurm takes at most 65535"
    check_threads
    check_programs
    [ ! -d "$TOKENIZER" ] || [ -r "$TOKENIZER/tokenizer.json" ] ||
        problem "TOKENIZER=$TOKENIZER: holds no tokenizer.json; name the folder that does, or a tokenizer.model file"
    if [ "${#PREPROCESS[@]}" -gt 0 ]; then check_preprocess; return; fi
    [ -n "$RUN" ] || problem "RUN: missing; give it in the env file"
    [[ $RUN == "$RUNS"/* ]] || problem "RUN=$RUN: must be in RUNS=$RUNS"
    check_container
    check_environment
    if [ "${#COMMAND[@]}" -gt 0 ]; then
        [ "$NODES" = 1 ] || problem "NODES=$NODES: COMMAND runs on one; nearest legal: 1"
        [ "${#FLAGS[@]}" -eq 0 ] || problem "FLAGS: for training; a run has COMMAND or FLAGS"
        check_command
    else check_training; fi
}

# All processes of a node together have no more threads than the job has cores there.
check_threads() {
    local processes=1 share
    ((${#COMMAND[@]} + ${#PREPROCESS[@]} > 0 || RANKS_PER_NODE == 0)) || processes=$RANKS_PER_NODE
    share=$((CPUS_PER_TASK > processes ? CPUS_PER_TASK / processes : 1))
    if [ "$OMP_THREADS" = 0 ]; then
        OMP_THREADS=$((share < 8 ? share : 8))
    elif ((OMP_THREADS > share)); then
        problem "OMP_THREADS=$OMP_THREADS: $processes processes with so many threads have CPUS_PER_TASK=$CPUS_PER_TASK cores; nearest legal: $share"
    fi
}

# What COMMAND reads is there, or is made before it.
check_command() {
    local word path each before=''
    for word in "${COMMAND[@]}"; do
        [ -n "$word" ] || problem "COMMAND: an empty word after $before: a setting that it names is not set"
        before=$word path=${word#--*=}
        if [[ $path != /* || -e $path ]] || is_promised "$path"; then continue; fi
        for each in "${MAKES[@]}"; do [[ $path != "$each" && $path != "$each"/* ]] || continue 2; done
        problem "COMMAND: $path: does not exist, no run of AFTER=(${AFTER[*]}) in this command makes it, and MAKES does not name it"
    done
}

check_programs() {
    command -v "$LOGIN_PYTHON" >/dev/null || problem "LOGIN_PYTHON=$LOGIN_PYTHON: no such program here; a Python 3.12, torch is not needed"
    [ -n "$CONTAINER_IMAGE" ] || [ -x "$PYTHON" ] || problem "PYTHON=$PYTHON: no such program; bash tests/run.sh makes .venv, or name another"
    [[ $NODE_LOCAL == /* ]] || problem "NODE_LOCAL=$NODE_LOCAL: must be an absolute path"
}

check_container() {
    local entry source
    [ -n "$CONTAINER_IMAGE" ] || { [ "${#CONTAINER_MOUNTS[@]}" -eq 0 ] || problem 'CONTAINER_MOUNTS: given without CONTAINER_IMAGE'; return 0; }
    [[ $CONTAINER_IMAGE != /* || -r $CONTAINER_IMAGE ]] || problem "CONTAINER_IMAGE=$CONTAINER_IMAGE: does not exist"
    for entry in "${CONTAINER_MOUNTS[@]}"; do
        source=${entry%%:*}
        [[ $entry == /*:/* ]] || { problem "CONTAINER_MOUNTS: $entry: must be SOURCE:TARGET, absolute"; continue; }
        [ -e "$source" ] || problem "CONTAINER_MOUNTS: $source: does not exist"
    done
    for entry in "$TOKENIZER" "$FROM" "$PRECHECK_HOOK" "${DATA[@]}"; do
        [[ $entry != /* ]] || is_mounted "$entry" || problem "$entry: no mount of the container holds it; add its folder to CONTAINER_MOUNTS"
    done
}

is_mounted() {
    local entry target
    for entry in "$REPO:$REPO" "$RUNS:$RUNS" "${CONTAINER_MOUNTS[@]}"; do
        target=${entry#*:} target=${target%%:*}
        [[ $1 == "$target" || $1 == "$target"/* ]] && return 0
    done
    return 1
}

check_environment() {
    local entry
    for entry in "${NCCL[@]}"; do
        [[ $entry =~ ^NCCL_[A-Z0-9_]+=[^\ ]+\ because\ .+ ]] || problem "NCCL: '$entry': must be 'NCCL_NAME=VALUE because REASON'"
    done
    for entry in "${PASS_ENV[@]}"; do
        if [[ ! $entry =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]]; then
            problem 'PASS_ENV: holds names of variables, not values'
        elif [ -z "${!entry+set}" ]; then problem "PASS_ENV: $entry: not set where the run is submitted"; fi
    done
}

check_preprocess() {
    [ -n "$DATA_ROOT" ] || problem 'DATA_ROOT: missing; data are made in DATA_ROOT/NAME'
    [ -z "$PRESET" ] || problem "PRESET=$PRESET: a run has PREPROCESS or PRESET"
    [[ " ${PREPROCESS[*]} " == *' --output-'* ]] && problem 'PREPROCESS: --output-dir is DATA_ROOT/NAME; leave it out'
    local word
    for word in "${PREPROCESS[@]}"; do
        word=${word#*=}
        [[ $word != /* ]] || compgen -G "$word" >/dev/null || problem "PREPROCESS: $word: does not exist"
    done
}

check_training() {
    [ -n "$GPU" ] || problem 'GPU: missing; legal: H100, H200, B200, GB200, none'
    if [ "$GPU" = none ]; then
        [ "$GPUS_PER_NODE" = 0 ] || problem "GPUS_PER_NODE=$GPUS_PER_NODE: with GPU=none the only legal number is 0"
    else
        [ "$GPUS_PER_NODE" != 0 ] || problem "GPUS_PER_NODE=0: with GPU=$GPU at least 1; nearest legal: 1"
        [ "$RANKS_PER_NODE" = "$GPUS_PER_NODE" ] || problem "RANKS_PER_NODE=$RANKS_PER_NODE: one for each GPU; nearest legal: $GPUS_PER_NODE"
    fi
    [ "$RANKS_PER_NODE" != 0 ] || problem 'RANKS_PER_NODE=0: with GPU=none give the processes of a node; nearest legal: 1'
    if [ "${#ARRAY[@]}" -gt 0 ]; then
        [ -z "$PRESET" ] || problem "PRESET=$PRESET: a run has ARRAY or PRESET"
    else [ -n "$PRESET" ] || problem 'PRESET: missing; give one, or ARRAY, COMMAND or PREPROCESS'; fi
    check_start
    check_data
    check_flags
}

check_start() {
    local index newest
    [ "$START" != scratch ] || [ -z "$FROM" ] || problem "FROM=$FROM: START=scratch does not take it; START=from does"
    if [ "$START" = from ]; then
        [[ $FROM == /* ]] || problem "FROM=$FROM: must be an absolute path of a folder of checkpoints"
        [ -d "$FROM" ] || is_promised "$FROM" || problem "FROM=$FROM: does not exist, and no run of AFTER=(${AFTER[*]}) in this command makes it"
    fi
    for index in $(tasks); do
        newest=$(select_task "$index" && newest_complete "$(save_folder)")
        case $START:$newest in
        continue:-1) problem "START=continue: $RUN has no complete checkpoint${ARRAY[0]:+ of ${ARRAY[index]}}; START=scratch or from" ;;
        scratch:[0-9]*) problem "START=scratch: $RUN has checkpoints (iteration $newest); START=continue, or another RUN" ;;
        esac
    done
}

#: Flags that stand in the place of DATA.
DATA_FLAGS=(--instance-data --per-split-data-args-path --data-args-path)

# The one that FLAGS holds, if any.
data_flag() {
    local flag
    for flag in "${DATA_FLAGS[@]}"; do
        [[ " ${FLAGS[*]} " != *[[:space:]]"$flag"[[:space:]=]* ]] || { echo "$flag" && return; }
    done
}

check_data() {
    local word suffix flag
    flag=$(data_flag)
    if [ -n "$flag" ]; then
        [ "${#DATA[@]}" -eq 0 ] || problem "DATA: FLAGS names data too ($flag); leave one of them out"
    elif [ "${#DATA[@]}" -eq 0 ]; then
        problem "DATA: missing; prefixes of .bin/.idx files, mock, or one of ${DATA_FLAGS[*]} in FLAGS"
    fi
    for word in "${DATA[@]}"; do
        [[ $word != mock && ! $word =~ ^[0-9.eE-]+$ ]] || continue
        [[ $word == /* ]] || { problem "DATA: $word: must be an absolute path"; continue; }
        is_promised "$word" && continue
        for suffix in bin idx; do [ -r "$word.$suffix" ] || problem "DATA: $word.$suffix: does not exist"; done
    done
}

KNOWN_FLAGS=$HERE/../../megatron_hybrid/known_flags.txt

# Names and values against the list of flags; the whole is judged by check_plan, and on the nodes by Megatron.
check_flags() {
    local word name kind='' flag='' line
    for word in "${FLAGS[@]}"; do
        if [[ $word != --* ]]; then
            case $kind in
            int) [[ $word =~ ^-?[0-9]+$ ]] || problem "FLAGS: $flag $word: must be a whole number" ;;
            float) [[ $word =~ ^-?[0-9.]+([eE][-+]?[0-9]+)?$ ]] || problem "FLAGS: $flag $word: must be a number" ;;
            none) problem "FLAGS: $word: $flag takes no value" ;;
            *"|"*) [[ "|$kind|" == *"|$word|"* ]] || problem "FLAGS: $flag $word: legal: ${kind//|/, }" ;;
            '') problem "FLAGS: $word: a value without a flag before it" ;;
            esac
            [[ " ${DATA_FLAGS[*]} " != *" $flag "* || $word != /* || -e $word ]] || is_promised "$word" ||
                problem "FLAGS: $flag $word: does not exist"
            continue
        fi
        flag=${word%%=*}
        [ -z "${OWNED[$flag]:-}" ] || problem "FLAGS: $flag: set by the launcher; use ${OWNED[$flag]}"
        line=$(grep -m 1 -- "^$flag " "$KNOWN_FLAGS") || line=
        read -r name kind <<<"${line%+}"
        [ -n "$name" ] || problem "FLAGS: $flag: no such flag; nearest: $(nearest_flag "$flag")"
        kind=${kind:-text} # of an unknown flag: its value is no second fault
    done
}

nearest_flag() {
    local name best='' least=99 far
    while read -r name _; do
        ((${#name} - ${#1} < 4 && ${#1} - ${#name} < 4)) || continue
        far=$(distance "$1" "$name")
        ((far < least)) && least=$far && best=$name
    done < <(grep -- "^${1:0:4}" "$KNOWN_FLAGS")
    echo "${best:-none; python -m megatron_hybrid.pretrain --help-all lists them}"
}

# GPUs against TP, PP and CP, heads, sequence, batch, vocabulary, memory: the planner's verdict on each training run.
check_plan() {
    local index said
    local -a command
    [ "${#COMMAND[@]}" -eq 0 ] && [ "${#PREPROCESS[@]}" -eq 0 ] || return 0
    for index in $(tasks); do
        if ! said=$(
            select_task "$index"
            build_training_flags
            if [ "$GPU" = none ]; then
                command=("$LOGIN_PYTHON" -m megatron_hybrid.pretrain --dry-run --gpus "$(total_ranks)" "${TRAIN[@]}")
            else
                command=("$LOGIN_PYTHON" -m megatron_hybrid.tools.plan check --gpu "$GPU" --gpus "$(total_ranks)" -- "${TRAIN[@]}")
            fi
            cd "$REPO" && "${command[@]}" 2>&1
        ); then
            problem "$NAME: $(sed -n 's/^error: //p' <<<"$said" | grep . || tail -n 1 <<<"$said")"
        else
            [ "$DRY_RUN" = no ] || echo "plan: $(grep -m 1 . <<<"$said")"
            sed -n "s/^warning: /warning: $NAME: /p" <<<"$said" >&2
        fi
    done
}

# From the last log of the run, where the settings do not say: seconds of a step and of a save.
last_seconds() {
    local log=$1 step save
    step=$(sed -nE 's/.*elapsed time per iteration \(ms\): ([0-9.]+).*/\1/p' "$log" | tail -n 1)
    save=$(sed -nE 's/.*is durable: .* GB in ([0-9.]+) s.*/\1/p' "$log" | tail -n 1)
    echo "$(awk "BEGIN { print ${step:-0} / 1000 }") ${save:-0}"
}

warn_lead() {
    local log step=$STEP_SECONDS save=$SAVE_SECONDS last_step=0 last_save=0
    [ "${#COMMAND[@]}" -eq 0 ] && [ "${#PREPROCESS[@]}" -eq 0 ] || return 0
    log=$(find "$RUN/logs" -name '*.log' -printf '%T@ %p\n' 2>/dev/null | sort -n | tail -n 1 | cut -d' ' -f2-) || log=''
    [ -z "$log" ] || read -r last_step last_save < <(last_seconds "$log")
    [ "$step" != 0 ] || step=$last_step
    [ "$save" != 0 ] || save=$last_save
    if [ "$step" = 0 ] || [ "$save" = 0 ]; then
        say "$NAME: SIGNAL_SECONDS=$SIGNAL_SECONDS is not checked: no log says how long a step and a save take (STEP_SECONDS, SAVE_SECONDS)"
    elif awk "BEGIN { exit !($SIGNAL_SECONDS < 1.5 * ($step + $save)) }"; then
        say "warning: $NAME: SIGNAL_SECONDS=$SIGNAL_SECONDS is less than 1.5 times a step ($step s) and a save ($save s): the last checkpoint may be lost"
    fi
}
