#!/usr/bin/env bash
# Make a virtual environment and install this checkout into it:  bash tools/install.sh python3 .venv
set -euo pipefail
venv=$2
need=$(sed -n 's/^min_python *= *//p' settings.ini)
new() { command -v "$1" >/dev/null && "$1" -c "import sys; sys.exit(sys.version_info[:2] < tuple(map(int, '$need'.split('.'))))"; }
for python in "$1" python3.14 python3.13 python3.12 python3.11; do new "$python" && break; python=; done
[ -n "$python" ] || { echo "$1 is no Python $need or newer, and there is no other: say make PYTHON=/path/to/python" >&2; exit 1; }
free=$(df -Pk . | awk 'NR==2 {print int($4/1048576)}')
[ "$free" -ge 8 ] || echo "only $free GB free here: torch and its libraries want about 8"
"$venv/bin/python" -c "" 2>/dev/null || "$python" -m venv --clear "$venv"
echo "$("$venv/bin/python" --version) in $venv; installing quietly, which takes a few minutes"
# modules are compiled when they are first imported: that halves the wait, and most are never imported
install() { "$venv/bin/python" -m pip install -qq --no-compile "$@" -e ".[dev]"; }
# first the versions that were tested; where they do not exist for this Python, whatever the ranges allow
install -c constraints.txt || { echo "the tested versions do not fit this Python; installing within the ranges of settings.ini"; install; }
