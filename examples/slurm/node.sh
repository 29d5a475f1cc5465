#!/usr/bin/env bash
# Runs on a node, once, under srun: `node.sh run COMMAND...` or `node.sh check`, which prints what is wrong with it.
set -euo pipefail

run() {
    export PET_NODE_RANK=$SLURM_PROCID # torchrun's --node-rank: ranks in the order of nodes, as the network has them
    mkdir -p "${TRITON_CACHE_DIR:?}"
    ulimit -n "$(ulimit -Hn)" # data files, sockets of all ranks
    exec "$@"
}

# Lines for train.sbatch: node, kind (bad, wrong: perhaps a setting, note, versions, time), text; tabs between.
tell() { printf 'precheck\t%s\t%s\t%s\n' "${SLURMD_NODENAME:-$(hostname)}" "$1" "$2"; }

# Xid errors after which a GPU needs a reset or a technician; others are a program's own.
FATAL_XIDS='48|62|64|74|79|92|94|95|109|110|119|120|136|140|143'

gpu_rows() { timeout 60 nvidia-smi "--query-$1=$2" --format=csv,noheader,nounits; }

check_gpus() {
    local rows index used celsius errors driver pending failed count=0 processes
    if ! command -v nvidia-smi >/dev/null; then
        tell bad 'nvidia-smi not found'
        return
    fi
    if ! rows=$(gpu_rows gpu index,memory.used,temperature.gpu,ecc.errors.uncorrected.volatile.total,driver_version 2>&1); then
        tell bad "nvidia-smi failed: $(head -n 1 <<<"$rows")"
        return
    fi
    while IFS=, read -r index used celsius errors driver; do
        count=$((count + 1)) errors=${errors// /}
        ((used <= MAX_USED_MIB)) || tell bad "GPU $index: ${used// /} MiB in use, at most $MAX_USED_MIB"
        ((celsius <= MAX_IDLE_CELSIUS)) || tell bad "GPU $index: ${celsius// /} degrees idle, at most $MAX_IDLE_CELSIUS"
        [[ $errors =~ ^(0|\[N/A\])$ ]] || tell bad "GPU $index: $errors uncorrected ECC errors"
        VERSIONS+=" driver=${driver// /}"
    done <<<"$rows"
    ((count >= GPUS_PER_NODE)) || tell bad "$count GPUs, $GPUS_PER_NODE wanted"
    rows=$(gpu_rows remapped-rows remapped_rows.pending,remapped_rows.failure 2>/dev/null) || rows=
    while IFS=, read -r pending failed; do
        [[ ${pending// /} =~ ^(0|No|\[N/A\]|)$ && ${failed// /} =~ ^(0|No|\[N/A\]|)$ ]] ||
            tell bad "memory rows to be remapped (pending $pending, failed $failed): the GPU needs a reset"
    done <<<"$rows"
    processes=$(gpu_rows compute-apps pid,used_memory 2>/dev/null | tr -d ' ' | paste -sd' ' -) || processes=
    [ -z "$processes" ] || tell bad "another program is on the GPUs (pid,MiB): $processes"
}

check_xids() {
    local log
    # shellcheck disable=SC2024 # the kernel's log of this boot, where it may be read
    if ! log=$(dmesg 2>/dev/null); then
        tell note 'Xid errors not looked at: the log of the kernel cannot be read'
        return
    fi
    log=$(grep -E "NVRM: Xid .*: ($FATAL_XIDS)," <<<"$log" | tail -n 1) || return 0
    tell bad "since boot: $log"
}

check_folders() {
    local free_gib kind
    free_gib=$(($(df --output=avail -B1 /dev/shm | tail -n 1) >> 30))
    ((free_gib >= MIN_SHM_GIB)) || tell bad "/dev/shm: $free_gib GiB free, $MIN_SHM_GIB wanted"
    kind=$(stat -f -c %T "$NODE_LOCAL" 2>/dev/null) || kind=missing
    case $kind in
    nfs* | lustre | gpfs | ceph | fuseblk | smb* | beegfs | missing | wekafs | panfs) tell bad "NODE_LOCAL $NODE_LOCAL: $kind, not a disk of this node" ;;
    *) [ -w "$NODE_LOCAL" ] || tell bad "NODE_LOCAL $NODE_LOCAL: cannot be written to" ;;
    esac
    [ -w "$RUNS" ] || tell wrong "RUNS $RUNS: not there, or cannot be written to"
}

check_versions() {
    local found
    # shellcheck disable=SC2016
    if ! found=$("$PYTHON" -c '
import hashlib, importlib.metadata as metadata, importlib.util, pathlib, sys
found = [f"python={sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"]
for name in ("torch", "triton", "megatron-core", "transformer-engine", "nvidia-nccl-cu13"):
    try:
        found.append(f"{name}={metadata.version(name)}")
    except metadata.PackageNotFoundError:
        found.append(f"{name}=none")
place = importlib.util.find_spec("megatron_hybrid")
if place is None or found[1] == "torch=none":
    sys.exit("torch or megatron_hybrid cannot be imported")
files = sorted(pathlib.Path(place.origin).parent.rglob("*.py"))
digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]
print(*found, f"megatron_hybrid={digest}")' 2>&1); then
        tell wrong "PYTHON $PYTHON: $(tail -n 1 <<<"$found")"
        return
    fi
    tell versions "$found$VERSIONS"
}

check() {
    local said
    VERSIONS=''
    ((GPUS_PER_NODE == 0)) || { check_gpus; check_xids; }
    check_folders
    check_versions
    if [ -n "$PRECHECK_HOOK" ]; then
        said=$(bash "$PRECHECK_HOOK" 2>&1) || tell bad "PRECHECK_HOOK (status $?): $(tail -n 1 <<<"$said")"
    fi
    tell time "$(date +%s)" # last: the node has answered
}

mode=$1
shift
case $mode in
run) run "$@" ;;
check) check ;;
*) echo "node.sh: run or check, not $mode" >&2; exit 2 ;;
esac
