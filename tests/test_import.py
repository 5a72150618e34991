"""Cold imports: each module alone, in an interpreter that has none of ours, without developers' tools or torchvision.

Starting Python and importing torch takes seconds, so one fresh interpreter imports torch and then forks a child for each
module; the two tests of all modules together start from nothing.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = [
    ".".join(p.relative_to(ROOT).with_suffix("").parts)
    for p in sorted((ROOT / "stylelora").rglob("*.py"))
    if not p.name.startswith("_")
]
DEVELOPERS = [
    "nbdev",
    "fastcore",
    "execnb",
    "ghapi",
    "pytest",
    "ruff",
    "peft",
    "k_diffusion",
    "torchsde",
    "IPython",
]

CHILD = """
import importlib, importlib.abc, json, os, sys, traceback
names, blocked, apart = json.loads(sys.argv[1])

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in blocked: raise ModuleNotFoundError(f'{name} is blocked in this test', name=name)

def check(name):
    module = importlib.import_module(name)
    missing = [n for n in getattr(module, '__all__', []) if not hasattr(module, n)]
    assert not missing, f'{name}.__all__ names what is not there: {missing}'
    bad = sorted(set(blocked) & {m.split('.')[0] for m in sys.modules})
    assert not bad, bad

def check_apart(name):  # in a forked child; the answer comes back through a pipe
    read, write = os.pipe()
    if not (child := os.fork()):
        problem = ''
        os.dup2(write, 1); os.dup2(write, 2)  # whatever is printed is a problem as well
        try: check(name)
        except BaseException: problem = traceback.format_exc()
        sys.stdout.flush(); sys.stderr.flush()
        os.write(write, problem.encode()[-3000:])
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as f: said = f.read()
    status = os.waitpid(child, 0)[1]
    return said or (f'died with status {status}' if status else '')

sys.meta_path.insert(0, Blocker())
if apart: import torch
result = {}
for name in names:
    if apart: result[name] = check_apart(name)
    else: check(name); result[name] = ''
print(json.dumps(result))
"""


def cold(names, blocked, apart, folder):
    "Import modules in a fresh interpreter whose working folder is empty; give what went wrong for each."
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONSTARTUP", "IN_TEST")} | dict(
        PYTHONPATH=str(ROOT),
        MPLBACKEND="agg",
        OMP_NUM_THREADS="1",
        HF_HUB_OFFLINE="1",
        PYTHONDONTWRITEBYTECODE="1",
    )
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps([names, blocked, apart])],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not list(folder.iterdir()), "importing must write nothing"
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    "Import every module by itself, once for all tests."
    return cold(
        [*MODULES, "stylelora.no_such_module"],
        ["torchvision", *DEVELOPERS],
        True,
        tmp_path_factory.mktemp("cold"),
    )


@pytest.mark.parametrize("name", MODULES)
def test_cold_import_without_torchvision_and_developers_tools(name, alone):
    assert alone[name] == ""


def test_everything_from_nothing_with_all_libraries(tmp_path):
    assert set(cold(MODULES, [], False, tmp_path)) == set(MODULES)


def test_everything_from_nothing_top_layer_first(tmp_path):
    assert set(cold(MODULES[::-1], ["torchvision", *DEVELOPERS], False, tmp_path)) == set(MODULES)


def test_failures_are_seen(alone, tmp_path):
    assert "ModuleNotFoundError" in alone["stylelora.no_such_module"]
    blocked = cold(["torchvision", "this"], ["torchvision"], True, tmp_path)
    assert "blocked in this test" in blocked["torchvision"]
    assert "Beautiful is better" in blocked["this"], "a module that prints when imported is caught"
