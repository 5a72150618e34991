"""The package is exactly what the notebooks export: a clean export in a copy gives the same files and bytes.

One file is written by hand, the front door `stylelora/__init__.py`. Only its version line belongs to nbdev: the copy starts
with the hand-written file and a wrong version, and the export must give back the committed bytes.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CODE = "from nbdev.doclinks import nbdev_export; nbdev_export()"


def sources(package):
    "Read the Python files below a package: relative path -> bytes; without nbdev's index, which git ignores."
    return {
        str(p.relative_to(package)): p.read_bytes()
        for p in sorted(package.rglob("*.py"))
        if "__pycache__" not in p.parts and p.name != "_modidx.py"
    }


def export(copy):
    "Export all notebooks of a copy, in a process of its own: in-process, nbdev's tests switch exporting off."
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | dict(
        XDG_CONFIG_HOME=str(copy / "no-config"), HOME=str(copy)
    )
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=copy, env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    "Make a copy with notebooks, settings and the front door only, export it, and return its package's sources."
    copy = tmp_path_factory.mktemp("sync")
    shutil.copy(ROOT / "settings.ini", copy)
    shutil.copytree(
        ROOT / "nbs", copy / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints", "node_modules", "_*")
    )
    (copy / "stylelora").mkdir()
    door = (ROOT / "stylelora" / "__init__.py").read_text(encoding="utf-8")
    stale, n = re.subn(r"^__version__ = .*$", '__version__ = "0"', door, flags=re.M)
    assert n == 1, "the front door has one version line, which nbdev keeps"
    (copy / "stylelora" / "__init__.py").write_text(stale, encoding="utf-8")
    export(copy)
    made = sources(copy / "stylelora")
    export(copy)
    assert sources(copy / "stylelora") == made, "exporting twice must give the same bytes"
    return made


def test_the_export_is_not_empty(fresh):
    assert {"core.py", "plots.py", "noise/schedule.py", "noise/objective.py", "__init__.py"} <= set(fresh)


def test_same_files(fresh):
    here = set(sources(ROOT / "stylelora"))
    assert here - set(fresh) == set(), "no notebook exports these: delete them"
    assert set(fresh) - here == set(), "run `make export`"


def test_same_bytes(fresh):
    here = sources(ROOT / "stylelora")
    stale = [name for name in fresh if name in here and here[name] != fresh[name]]
    assert not stale, f"differ from their notebooks, run `make export`: {stale}"


def test_no_module_is_ignored_by_git():
    "A module that git ignores passes all tests here and is missing in every clone."
    names = [str(p.relative_to(ROOT)) for p in (ROOT / "stylelora").rglob("*.py") if p.name != "_modidx.py"]
    done = subprocess.run(["git", "check-ignore", *names], cwd=ROOT, capture_output=True, text=True)
    if done.returncode > 1:
        pytest.skip("not a git checkout")
    assert not done.stdout, done.stdout
