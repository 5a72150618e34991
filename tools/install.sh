#!/usr/bin/env bash
# Make a virtual environment and install this checkout into it:  bash tools/install.sh python3 .venv
set -euo pipefail
python=$1 venv=$2
need=$(sed -n 's/^min_python *= *//p' settings.ini)
command -v "$python" >/dev/null || { echo "no $python here: install Python $need or newer, or say make PYTHON=/path/to/python" >&2; exit 1; }
"$python" - "$need" <<'P' || exit 1
import sys
need = tuple(map(int, sys.argv[1].split(".")))
if sys.version_info[:2] < need:
    sys.exit(f"{sys.executable} is Python {sys.version.split()[0]}; stylelora needs {sys.argv[1]} or newer: say make PYTHON=/path/to/python")
P
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
free=$(df -Pk "$venv" | awk 'NR==2 {print int($4/1048576)}')
[ "$free" -ge 8 ] || echo "only $free GB free here: torch and its libraries want about 8"
"$venv/bin/python" -m pip install -q -e ".[dev]"
