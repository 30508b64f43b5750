# Sourced by ./quickstart, ./test and .ci/run: finds a Python and installs the project into an environment.
# shellcheck shell=bash

NEWEST_PYTHON=3.13

# Prints the interpreter to build environments with: $PYTHON if set, else the first usable one on PATH.
find_python() {
    local candidate report found=()
    for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.13 python3 python; do
        report=$("$candidate" -c '
import sys
version = "%d.%d" % sys.version_info[:2]
if not (3, 11) <= sys.version_info[:2] <= tuple(map(int, sys.argv[1].split("."))):
    sys.exit(print("it is Python", version))
try:
    import ensurepip, venv
except ImportError as problem:
    sys.exit(print("it is Python", version, "without venv (on Debian: apt install python%s-venv)" % version))
print("usable")
' "$NEWEST_PYTHON" 2>/dev/null) || report="it does not start"
        if [[ $report == usable ]]; then
            printf '%s\n' "$candidate"
            return
        fi
        if command -v "$candidate" >/dev/null; then
            found+=("$candidate: $report")
        fi
        if [[ -n ${PYTHON:-} ]]; then
            break
        fi
    done
    {
        echo "No usable Python: versions 3.11 to $NEWEST_PYTHON with the venv module are supported."
        if ((${#found[@]})); then
            printf 'Found %s\n' "${found[@]}"
        else
            echo "Found: nothing by the name ${PYTHON:-python3.11, python3.12, python3.13, python3 or python}."
        fi
        echo "Install one, or name one: PYTHON=/path/to/python3.11 $0"
    } >&2
    return 1
}

# install_environment DIR [EXTRAS]: makes DIR a virtual environment holding the project (editable), the given
# extras (comma-separated) and the pinned dependencies. Does nothing when that is what DIR already holds.
# Run from the repository's root.
install_environment() {
    local directory=$1 extras=${2:-} python want complete=$1/.complete others=
    # The folder is part of it: a moved project must be installed again.
    want=$(cat pyproject.toml setup.py constraints.txt <(pwd) | cksum)
    if [[ -x $directory/bin/python ]] && grep -qsxF "$want [$extras]" "$complete"; then
        return
    fi
    # What an interrupted installation left is not trusted; what pip downloaded is kept in its own cache.
    if [[ ! -x $directory/bin/python || ! -e $complete ]]; then
        python=$(find_python) || return
        echo "Creating $directory with $("$python" --version)" >&2
        "$python" -m venv --clear "$directory"
    else
        others=$(grep -F "$want [" "$complete" || true)
    fi
    rm -f "$complete"
    echo "Installing pinned dependencies into $directory (one to three minutes, 2.3 GB on disk)" >&2
    if ! PYTHONPATH='' "$directory/bin/python" -m pip install -qq --disable-pip-version-check \
        --constraint constraints.txt --editable ".${extras:+[$extras]}"; then
        echo "Installing failed; pip's message is above. Run $0 again to retry." >&2
        return 1
    fi
    printf '%s\n' "$want [$extras]" ${others:+"$others"} >"$complete"
}
