# Sourced by tests/run.sh and examples/quickstart.sh: makes .venv with the pinned requirements.
# shellcheck shell=bash
#
#   source tools/environment.sh; prepare_environment [EXTRA...]     # e.g. dev, gpu
#
# Sets PYTHON to the interpreter in .venv. A finished installation is recognised by a stamp and not repeated.

say() { printf '%s\n' "$*" >&2; }

# Prints the path of a Python 3.12, or fails with what to do.
find_python() {
    local candidate
    local -a candidates=(python3.12 python3 python)
    # pyenv keeps its versions off the PATH unless they are selected.
    local pyenv_root=${PYENV_ROOT:-$HOME/.pyenv}
    for candidate in "$pyenv_root"/versions/3.12*/bin/python /usr/local/bin/python3.12 /opt/python3.12/bin/python3.12; do
        [ -x "$candidate" ] && candidates+=("$candidate")
    done
    [ -n "${MEGATRON_HYBRID_PYTHON:-}" ] && candidates=("$MEGATRON_HYBRID_PYTHON")
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then
            command -v "$candidate"
            return 0
        fi
    done
    say "error: no Python 3.12 with venv found (looked at: ${candidates[*]})."
    say "megatron-core 0.19.2 needs exactly 3.12. Install it (e.g. 'pyenv install 3.12' or your system's python3.12"
    say "and python3.12-venv packages), or name one: MEGATRON_HYBRID_PYTHON=/path/to/python3.12"
    return 1
}

prepare_environment() {
    local root stamp wanted python extras
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    extras=$(IFS=,; printf '%s' "$*")
    PYTHON=$root/.venv/bin/python
    stamp=$root/.venv/installed
    # The stamp holds what was installed: the pins, the extras, and where (an editable install points here).
    wanted=$(cksum <"$root/setup.py" | cut -d' ' -f1)" $extras $root"
    if [ -x "$PYTHON" ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
        return 0
    fi
    if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then
        python=$(find_python) || return 1
        say "Making .venv with $python"
        rm -rf "$root/.venv"
        "$python" -m venv "$root/.venv" || { say "error: '$python -m venv' failed"; return 1; }
    fi
    say "Installing the pinned requirements into .venv (about 5 GB, a few minutes the first time) ..."
    rm -f "$stamp"
    if ! "$PYTHON" -m pip install --quiet --disable-pip-version-check --editable "$root${extras:+[$extras]}"; then
        say "error: pip could not install the requirements of setup.py into .venv; its message is above."
        say "A package index must be reachable (pip's own configuration decides which) and 6 GB of disk free."
        return 1
    fi
    printf '%s' "$wanted" >"$stamp"
}
