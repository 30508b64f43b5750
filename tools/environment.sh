# Sourced by ./quickstart, ./test and .ci/run: finds a Python and installs the project with it.
# shellcheck shell=bash

OLDEST_PYTHON=3.11 NEWEST_PYTHON=3.13

# why_unusable PYTHON: prints why an interpreter cannot be used; nothing if it can.
why_unusable() {
    "$1" - "$OLDEST_PYTHON" "$NEWEST_PYTHON" 2>/dev/null <<'EOF' || echo "does not start"
import sys

oldest, newest = (tuple(map(int, argument.split("."))) for argument in sys.argv[1:])
version = "%d.%d" % sys.version_info[:2]
try:
    import ensurepip
    import venv
except ImportError:
    missing = True
else:
    missing = False
if not oldest <= sys.version_info[:2] <= newest:
    print("is Python " + version)
elif missing:
    print("lacks the module venv; on Debian and Ubuntu: apt install python" + version + "-venv")
EOF
}

# find_python: prints the interpreter to use, which is $PYTHON or else the first usable one on PATH.
find_python() {
    local candidate candidates=(python3.11 python3.12 python3.13 python3 python) reason found=()
    if [[ -n ${PYTHON:-} ]]; then
        candidates=("$PYTHON")
    fi
    for candidate in "${candidates[@]}"; do
        if ! command -v "$candidate" >/dev/null; then
            continue
        fi
        reason=$(why_unusable "$candidate")
        if [[ -z $reason ]]; then
            printf '%s\n' "$candidate"
            return
        fi
        found+=("  $candidate $reason")
    done
    {
        echo "No usable Python. Needed: Python $OLDEST_PYTHON to $NEWEST_PYTHON with the module venv. Found:"
        if ((${#found[@]})); then
            printf '%s\n' "${found[@]}"
        else
            echo "  nothing named ${candidates[*]}"
        fi
        echo "Install one, or name one: PYTHON=/path/to/python$OLDEST_PYTHON $0"
    } >&2
    return 1
}

# install_environment FOLDER [EXTRAS]: makes FOLDER a virtual environment that holds the project
# (editable), its pinned dependencies and the given extras (comma-separated). Does nothing when
# FOLDER holds all that already. To be called in the repository's root.
install_environment() {
    local folder=$1 extras=${2:-} state others='' python
    # The root is part of the state: a project that was moved must be installed again.
    state=$(cat pyproject.toml setup.py constraints.txt <(pwd) | cksum)
    if [[ -x $folder/bin/python ]] && grep -qsxF "$state [$extras]" "$folder/.complete"; then
        return
    fi
    if [[ -x $folder/bin/python && -e $folder/.complete ]]; then
        others=$(grep -F "$state [" "$folder/.complete" || true)
    else
        if [[ -e $folder && ! -e $folder/.started ]]; then
            echo "$folder exists, but $0 did not make it; move it away, or set VENV=another-folder" >&2
            return 1
        fi
        python=$(find_python) || return
        echo "Making the virtual environment $folder with $("$python" --version)" >&2
        # What an interrupted installation left is not trusted. pip keeps its downloads elsewhere.
        rm -rf "$folder"
        mkdir -p "$folder"
        touch "$folder/.started"
        "$python" -m venv "$folder" || return
    fi
    rm -f "$folder/.complete"
    echo "Installing into $folder (a minute or two; 2.3 GB on disk${extras:+ and more for $extras})" >&2
    if ! PYTHONPATH='' "$folder/bin/python" -m pip install -qq --disable-pip-version-check \
        --constraint constraints.txt --editable ".${extras:+[$extras]}"; then
        echo "Installing failed; pip says why above. $0 tries again." >&2
        return 1
    fi
    printf '%s\n' "$state [$extras]" ${others:+"$others"} >"$folder/.complete"
}
