# Sourced by submit.sh, train.sbatch and node.sh: the settings of a run, and the commands they stand for.
# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154 # settings are set by name, from the table below
#
# Needs bash 4.4. Nothing here is evaluated from text; an env file is sourced once its names are known to be right.

#: name, kind, default (- for none), meaning. Kinds: word, text, int, pint, number, time, yesno, file (absolute, there
#: where the job is submitted), folder (absolute, can be made), list (an array), or the legal words, with | between.
SETTINGS=(
    'RUNS            folder  -    where runs live; on a file system that every node sees'
    'DATA_ROOT       folder  -    where datasets live'
    'NAME            word    -    of the job'
    'RUN             folder  -    folder of this run: checkpoints, logs, launch'
    'AFTER           list    -    names of runs that must have ended well, if they are submitted by the same command'
    'NODES           pint    1    nodes of the training step'
    'SPARE_NODES     int     0    nodes more, for those that fail the pre-check'
    'GPU             H100|H200|B200|GB200|none -  kind of GPU; none trains on CPUs over gloo'
    'GPUS_PER_NODE   int     8    0 with GPU=none; then GPUs that a node has are hidden'
    'RANKS_PER_NODE  int     0    processes on a node; 0: one for each GPU'
    'CPUS_PER_TASK   pint    1    CPU cores of a node that the job gets'
    'OMP_THREADS     int     0    OMP_NUM_THREADS of each process; 0: 8, or its share of CPUS_PER_TASK if that is less'
    'TIME            time    -    limit of one allocation: [DAYS-]HH:MM:SS'
    'SIGNAL_SECONDS  pint    900  from the signal that asks for a checkpoint to the end of the allocation'
    'STEP_SECONDS    number  0    a training step, for the warning about SIGNAL_SECONDS; 0: as the last log says'
    'SAVE_SECONDS    number  0    a save; 0: as the last log says'
    'PARTITION       word    -    of Slurm'
    'ACCOUNT         word    -    of Slurm'
    'EXCLUSIVE       yesno   yes  whole nodes, all of their memory'
    'SBATCH_FLAGS    list    -    more flags for sbatch'
    'EXCLUDE_NODES   text    -    nodes never to use: n1,n[4-6]'
    'EXCLUDE_HOURS   int     24   how long a node that failed the pre-check is left out'
    'MAX_REQUEUES    int     20   restarts of one job; each but those of the pre-check needs a newer checkpoint'
    'PRESET          word    -    of megatron_hybrid.pretrain'
    'ARRAY           list    -    presets instead of one: a job array, each in RUN/PRESET'
    'FLAGS           list    -    of megatron_hybrid.pretrain'
    'DATA            list    -    --data-path: prefixes, or weights and prefixes; mock: --mock-data; or data flags in FLAGS'
    'TOKENIZER       file    -    tokenizer.json folder or tokenizer.model file'
    'TOKENIZER_TYPE  word    HuggingFaceTokenizer    --tokenizer-type'
    'START           scratch|continue|from scratch   random weights; what RUN has; the weights of FROM'
    'FROM            text    -    folder of checkpoints, with START=from'
    'COMMAND         list    -    a run that is no training: one task on one node; python stands for PYTHON'
    'MAKES           list    -    what COMMAND makes: of the absolute paths in it these alone need not exist'
    'PREPROCESS      list    -    data preparation: flags of tools.preprocess plan'
    'TASKS           pint    1    with PREPROCESS: tasks of the array'
    'PRECHECK        yesno   yes  look at every node before each start'
    'PRECHECK_SECONDS pint   180  for all nodes to answer'
    'PRECHECK_HOOK   file    -    a script of yours, run on every node; fails: the node is left out'
    'MAX_IDLE_CELSIUS pint   55   of a GPU before the start'
    'MAX_USED_MIB    int     500  of a GPU before the start'
    'MIN_SHM_GIB     int     16   free in /dev/shm'
    'MAX_SKEW_SECONDS pint   5    of the clocks'
    'NODE_LOCAL      text    /tmp folder on a disk of the node, for the cache of Triton'
    'PYTHON          text    -    of the environment on the nodes; default .venv of this checkout; in a container python3'
    'LOGIN_PYTHON    text    -    Python 3.12 where the job is submitted, without torch; default PYTHON'
    'CONTAINER_IMAGE text    -    pyxis: file or registry name'
    'CONTAINER_MOUNTS list   -    SOURCE:TARGET[:FLAGS]; this checkout and RUNS are always mounted'
    'NCCL            list    -    "NCCL_NAME=VALUE because REASON"; none is set otherwise'
    'PASS_ENV        list    -    names of variables to hand to the job (WANDB_API_KEY); never written to a file'
)

REPO=${REPO:-$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)}

#: The environment that jobs are submitted with, besides PASS_ENV.
ALLOWED_ENVIRONMENT=(PATH HOME USER LOGNAME SHELL LANG LC_ALL TZ TMPDIR LD_LIBRARY_PATH SLURM_CONF CUDA_HOME)

PROBLEMS=()
problem() { PROBLEMS+=("$*"); }
say() { printf '%s\n' "$*" >&2; }
fail() { say "error: $1"; exit "${2:-2}"; }

report_problems() {
    local line
    for line in "${PROBLEMS[@]}"; do say "error: $line"; done
    [ "${#PROBLEMS[@]}" -eq 0 ] || exit 2
}

is_list() { [[ " AFTER SBATCH_FLAGS ARRAY FLAGS DATA COMMAND MAKES PREPROCESS CONTAINER_MOUNTS NCCL PASS_ENV " == *" $1 "* ]]; }

#: Prints the names in the table.
setting_names() { printf '%s\n' "${SETTINGS[@]%% *}"; }

# Edit distance of two short words.
distance() {
    local a=$1 b=$2 i j cost best
    local -a row previous
    for ((j = 0; j <= ${#b}; j++)); do previous[j]=$j; done
    for ((i = 1; i <= ${#a}; i++)); do
        row=("$i")
        for ((j = 1; j <= ${#b}; j++)); do
            [ "${a:i-1:1}" = "${b:j-1:1}" ] && cost=0 || cost=1
            best=$((previous[j - 1] + cost))
            ((previous[j] + 1 < best)) && best=$((previous[j] + 1))
            ((row[j - 1] + 1 < best)) && best=$((row[j - 1] + 1))
            row[j]=$best
        done
        previous=("${row[@]}")
    done
    echo "${previous[${#b}]}"
}

nearest_name() {
    local name best='' least=99 far
    while read -r name; do
        far=$(distance "$1" "$name")
        ((far < least)) && least=$far && best=$name
    done < <(setting_names)
    echo "$best"
}

# Every setting to its default, whatever the caller's environment holds.
set_defaults() {
    local line name default
    for line in "${SETTINGS[@]}"; do
        read -r name _ default _ <<<"$line"
        unset "$name"
        if is_list "$name"; then declare -ga "$name=()"; else
            [ "$default" = - ] && default=
            declare -g "$name=$default"
        fi
    done
}

# SETTING: what a line of an env file may be, as bash prints it: assignments, the name of another such file, or the
# options that submit.sh has set itself. No `declare`: in the function that reads the file it would be local.
DOLLAR='\$[A-Za-z0-9_{*@#?!-]'
WORD="([^][:space:]\"'\\\\()&;|<>\`\$[]|[][]|\\\\.|$DOLLAR|\\\$?'[^']*'|\"([^\"\\\\\`\$]|\\\\.|$DOLLAR)*\")*"
SETTING="^set -[eu]+(o pipefail)?\$|^(source|\\.)[[:space:]]+$WORD\$|^(export[[:space:]]+)?([A-Za-z_][A-Za-z0-9_]*\\+?=($WORD|\\((${WORD}[[:space:]]*)*\\))[[:space:]]*)+$"

# Sources an env file (a path with a slash) after a look at what it sets, in a shell of its own that stops before
# anything but an assignment: a dry run, too, has to read it. The files before it, which it may refer to, are its first
# arguments.
load_file() {
    local file=${!#} said name known
    [[ -r $file && ! -d $file ]] ||
        fail "$file: no such env file; those of the examples are in $REPO/examples/slurm/env"
    ! grep -q $'\r' "$file" || fail "$file: has Windows line ends; take them off with dos2unix or sed -i 's/\\r//'"
    known=" $(setting_names | tr '\n' ' ')"
    # shellcheck disable=SC2016
    said=$(env -i PATH="$PATH" HOME="$HOME" USER="${USER:-}" SETTING="$SETTING" bash --noprofile --norc -c '
        set -euT
        only_settings() {
            [[ $2 =~ $SETTING ]] || { echo "$1: runs a command: ${2%%$'"'\\n'"'*}" >&2; exit 1; }
        }
        before=" $(compgen -v | tr "\n" " ")"
        trap '"'"'[ "${#BASH_SOURCE[@]}" = 0 ] || only_settings "${BASH_SOURCE[0]}: line $LINENO" "$BASH_COMMAND"'"'"' DEBUG
        for each_file; do source "$each_file" >/dev/null || exit; done
        [ "$(compgen -A function)" = only_settings ] || { echo "$each_file: it defines a function" >&2; exit 1; }
        while read -r each; do
            [[ "$before each each_file before _ BASH_LINENO BASH_REMATCH BASH_SOURCE FUNCNAME PIPESTATUS " == *" $each "* ]] || echo "set $each"
        done < <(compgen -v)' bash "$@" 2>&1) ||
        fail "$(head -n 1 <<<"${said#bash: }"); a setting is NAME=VALUE, or NAME=(WORD WORD), no spaces around ="
    while read -r name; do
        case $known in *" $name "*) continue ;; esac
        fail "$file: $name: no such setting; nearest: $(nearest_name "$name"); submit.sh --help lists all"
    done < <(sed -n 's/^set //p' <<<"$said")
    # shellcheck disable=SC1090
    source "$file"
}

override() {
    local name=${1%%=*}
    setting_names | grep -qx -- "$name" || fail "$1: $name: no such setting; nearest: $(nearest_name "$name")"
    is_list "$name" && fail "$1: $name is a list; set it in an env file"
    declare -g "$name=${1#*=}"
}

# Writes the settings so that the job reads the same, whatever happens to the files until it starts.
freeze() {
    local name
    printf 'REPO=%q\n' "$REPO"
    while read -r name; do
        if is_list "$name"; then
            local -n values=$name
            printf '%s=(' "$name"
            [ "${#values[@]}" -eq 0 ] || printf ' %q' "${values[@]}"
            printf ' )\n'
        else printf '%s=%q\n' "$name" "${!name}"; fi
    done < <(setting_names)
}

# "[DAYS-]HH:MM:SS" in seconds; nothing for anything else.
seconds_of() {
    [[ $1 =~ ^(([0-9]+)-)?([0-9]{1,3}):([0-5][0-9]):([0-5][0-9])$ ]] || return 0
    echo $((${BASH_REMATCH[2]:-0} * 86400 + 10#${BASH_REMATCH[3]} * 3600 + 10#${BASH_REMATCH[4]} * 60 + 10#${BASH_REMATCH[5]}))
}

#: What the job and the dry run call a training run's folders.
save_folder() { echo "$RUN/checkpoints"; }

# Numbers of the tasks of a job array; 0 where it is none.
tasks() {
    local count=${#ARRAY[@]}
    seq 0 $((count > 0 ? count - 1 : 0))
}

# For a job array: the settings of one of its runs.
select_task() {
    [ "${#ARRAY[@]}" -gt 0 ] || return 0
    PRESET=${ARRAY[$1]}
    RUN=$RUN/$PRESET
}

total_ranks() { echo $((NODES * RANKS_PER_NODE)); }

# TRAIN: the flags of megatron_hybrid.pretrain.
build_training_flags() {
    local save
    save=$(save_folder)
    TRAIN=(--preset "$PRESET" --save "$save" --tensorboard-dir "$RUN/tensorboard")
    case $START in
    scratch) TRAIN+=(--fresh) ;; # a restart of the job continues
    continue) TRAIN+=(--load "$save") ;;
    from) TRAIN+=(--pretrained-checkpoint "$FROM" --load "$save") ;;
    esac
    [ -n "$TOKENIZER" ] && TRAIN+=(--tokenizer-type "$TOKENIZER_TYPE" --tokenizer-model "$TOKENIZER")
    case ${DATA[*]} in
    '') ;;
    mock) TRAIN+=(--mock-data) ;;
    *) TRAIN+=(--data-path "${DATA[@]}") ;;
    esac
    [ "${DATA[*]}" = mock ] || TRAIN+=(--data-cache-path "$RUN/cache")
    TRAIN+=("${FLAGS[@]}")
}

# CONTAINER: srun's flags for it.
build_container() {
    local mounts
    CONTAINER=()
    [ -n "$CONTAINER_IMAGE" ] || return 0
    mounts=$(IFS=,; echo "$REPO:$REPO,$RUNS:$RUNS${CONTAINER_MOUNTS[*]:+,${CONTAINER_MOUNTS[*]}}")
    CONTAINER=("--container-image=$CONTAINER_IMAGE" "--container-mounts=$mounts" "--container-workdir=$REPO")
}

# STEP: srun on the nodes $1 (comma separated, empty for any), one task each. NODE_SCRIPT is node.sh.
build_step() {
    build_container
    STEP=(srun "--nodes=$2" "--ntasks=$2" --ntasks-per-node=1 --kill-on-bad-exit=1 --export=ALL "--chdir=$REPO")
    [ -n "$1" ] && STEP+=("--nodelist=$1")
    STEP+=("--cpus-per-task=$CPUS_PER_TASK" "${CONTAINER[@]}")
}

# ON_NODE: the environment of a process on a node, after srun.
build_environment() {
    local entry
    ON_NODE=(env "OMP_NUM_THREADS=$OMP_THREADS" CUDA_DEVICE_MAX_CONNECTIONS=1)
    ON_NODE+=("TRITON_CACHE_DIR=$NODE_LOCAL/triton-${USER:-user}")
    [ "$GPUS_PER_NODE" != 0 ] || ON_NODE+=(CUDA_VISIBLE_DEVICES=) # a run without GPUs computes on CPUs, wherever it lands
    for entry in "${NCCL[@]}"; do ON_NODE+=("${entry%% because *}"); done
    ON_NODE+=(bash "$NODE_SCRIPT" run)
}

# COMMAND_LINE: the whole of a training step. Arguments: nodes, address and port of the first of them.
build_training_step() {
    build_step "$1" "$NODES"
    build_environment
    build_training_flags
    COMMAND_LINE=("${STEP[@]}" "${ON_NODE[@]}" "$PYTHON" -m torch.distributed.run "--nnodes=$NODES"
        "--nproc-per-node=$RANKS_PER_NODE" "--master-addr=$2" "--master-port=$3" -m megatron_hybrid.pretrain "${TRAIN[@]}")
}

build_command_step() {
    build_step '' 1
    build_environment
    COMMAND_LINE=("${STEP[@]}" "${ON_NODE[@]}" "${COMMAND[@]}")
}

# A command line that a shell takes back, a flag a line.
print_command() {
    local word line=''
    for word in "$@"; do
        if [[ $word == --* && -n $line ]]; then
            printf '%s \\\n    ' "$line"
            line=''
        fi
        [[ $word =~ ^[A-Za-z0-9_./:=,@+-]+$ ]] || word=$(printf '%q' "$word")
        line+="${line:+ }$word"
    done
    printf '%s\n' "$line"
}

# The newest complete iteration of a folder of checkpoints; -1 where there is none.
newest_complete() {
    local path newest=-1 number
    for path in "$1"/iter_*/COMPLETE; do
        [ -e "$path" ] || continue
        number=$(basename "$(dirname "$path")")
        number=$((10#${number#iter_}))
        ((number > newest)) && newest=$number
    done
    echo "$newest"
}

# Nodes to leave out: asked for, or failed a pre-check less than EXCLUDE_HOURS ago. Comma separated.
excluded_nodes() {
    local since=$(($(date +%s) - EXCLUDE_HOURS * 3600)) listed=''
    [ -r "$RUNS/excluded_nodes" ] &&
        listed=$(awk -v since="$since" '$1 >= since { print $2 }' "$RUNS/excluded_nodes" | sort -u | paste -sd, -)
    echo "$EXCLUDE_NODES${EXCLUDE_NODES:+${listed:+,}}$listed"
}
