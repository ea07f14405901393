#!/bin/sh
# Makes the virtual environment $VENV with the packages pinned in constraints.txt; does nothing where that is done.
#
# usage: [PYTHON=...] [VENV=.venv] [EXTRAS=dev] [DETECTRON2=...] sh install.sh
#        sh install.sh --find     prints the Python it would use
#
# Any Python from 3.11 to 3.14 will do. Without PYTHON an environment that exists keeps the one it has; else the first
# below is taken: the newest version that the tests have run on, the older ones, then 3.14, which is known from its
# packages alone. A candidate is started, not only looked up: a pyenv shim may exist and fail.
set -eu
cd "$(dirname "$0")"
venv=${VENV:-.venv}
extras=${EXTRAS:-dev}
detectron2=${DETECTRON2:-sal-detectron2==0.7.2}
candidates="python3.13 python3.12 python3.11 python3.14 python3"

supported='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))'
identity='import sys; print(sys.base_prefix, *sys.version_info[:3])'

fail() {
    echo "$1" >&2
    exit 2
}

is_supported() {
    "$1" -c "$supported" > /dev/null 2>&1
}

has_venv() {
    "$1" -c 'import ensurepip, venv' > /dev/null 2>&1
}

without_venv() {
    name=python$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    fail "$1 lacks the module venv; on Debian and Ubuntu: apt install $name-venv"
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        is_supported "$PYTHON" || fail "PYTHON=$PYTHON is not a Python from 3.11 to 3.14 that runs"
        has_venv "$PYTHON" || without_venv "$PYTHON"
        echo "$PYTHON"
        return
    fi
    if is_supported "$venv/bin/python"; then
        echo "$venv/bin/python"
        return
    fi
    incomplete=
    for candidate in $candidates "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/3.1[1-4].*/bin/python3; do
        is_supported "$candidate" || continue
        if has_venv "$candidate"; then
            echo "$candidate"
            return
        fi
        incomplete=${incomplete:-$candidate}
    done
    [ -z "$incomplete" ] || without_venv "$incomplete"
    fail "no Python from 3.11 to 3.14 found (tried: $candidates); install one or name it: make install PYTHON=/path/to/python"
}

python=$(find_python)
if [ "${1:-}" = --find ]; then
    echo "$python"
    exit
fi

stamp=$venv/installed
wanted=$("$python" -c "$identity")
contents="$wanted $extras $detectron2"
if [ "$contents" = "$(cat "$stamp" 2> /dev/null)" ] &&
    [ -z "$(find pyproject.toml constraints.txt install.sh install_detectron2.sh -newer "$stamp")" ]; then
    exit
fi
if [ "$wanted" != "$("$venv/bin/python" -c "$identity" 2> /dev/null)" ]; then
    "$python" -m venv --clear "$venv"
fi
"$venv/bin/pip" install --constraint constraints.txt --editable ".[$extras]"
sh install_detectron2.sh "$detectron2" "$venv/bin"
echo "$contents" > "$stamp"
