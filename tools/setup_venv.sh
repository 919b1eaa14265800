#!/usr/bin/env bash
# Set up the virtual environment d2kd runs in: tools/setup_venv.sh FOLDER. `make` calls it.
# Every step can be repeated, so the next run takes up a set-up that was interrupted.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1
python=$venv/bin/python
log=$venv/setup.log

fail() {
    echo "set-up: error: $1" >&2
    exit 1
}

# The interpreter to build on. It is tried, not looked up: a version manager's shim for python3.11
# may be there without a Python 3.11 behind it.
find_base_python() {
    local candidate
    for candidate in python3.11 python3 python3.12 python3.13 python3.10; do
        if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))' \
            >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.10 or newer with its venv module found; install Python 3.11 (python3.11-venv)"
}

mkdir -p "$venv"
if command -v flock >/dev/null; then # two calls at once: the second waits for the first
    exec 9>"$venv/.setup.lock"
    flock 9
fi

if ! "$python" -m pip --version >/dev/null 2>&1; then
    base=$(find_base_python)
    echo "Setting up $venv (a few minutes, about 6 GB) with $("$base" --version) ..."
    "$base" -m venv "$venv" || fail "$base could not make $venv; remove that folder and try again"
else
    echo "Completing the set-up of $venv ..."
fi

# pip writes INSTALLER after a package's last file. Without it the package is half there: forget
# its dist-info, so that pip installs it again.
for info in "$venv"/lib/python*/site-packages/*.dist-info; do
    [ -f "$info/INSTALLER" ] || rm -rf "$info"
done

# The tested versions where they are known to fit; elsewhere the newest that suit pyproject.toml.
constraints=()
if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    constraints=(--constraint constraints.txt)
fi

# Why pip failed, from its log. Without a network pip blames versions that do not fit.
pip_error() {
    if grep -q 'after connection broken' "$log"; then
        echo "the connection to the package index broke"
    else
        { grep '^ERROR' "$log" || tail -n 1 "$log"; } | tail -n 1
    fi
}

# The whole output goes to the log; large downloads and the start of unpacking show progress.
pip_install() {
    local shown='(Downloading|Using cached) [^ ]+ \([0-9.]+ [MG]B\)|^Installing collected packages'
    "$python" -m pip install --disable-pip-version-check --progress-bar off \
        ${constraints[@]+"${constraints[@]}"} "$@" 2>&1 | tee -a "$log" |
        { grep --line-buffered -oE "$shown" || true; } ||
        fail "pip failed: $(pip_error) (more in $log)"
}

: >"$log"
pip_install --editable '.[dev,eval,export,lite,timm]'

# opencv-python needs the system's libGL, which servers and containers often lack.
if ! "$python" -c 'import cv2' >/dev/null 2>&1; then
    echo "opencv-python does not import here: putting opencv-python-headless over it"
    pip_install --force-reinstall --no-deps opencv-python-headless
fi
"$python" -c 'import cv2, pycocotools.mask, sklearn, torch, torchvision' 2>>"$log" ||
    fail "a dependency does not import: $(tail -n 1 "$log")"

"$python" tools/install_detectron2.py
