"""The front door: `import stylelora` is quick, needs no torch, and its help is a good first page."""

import ast
import inspect
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import stylelora

ROOT = Path(__file__).resolve().parents[1]
OFFERED = ["load_base", "train_folder", "load_adapter", "generate", "save_adapter"]
HEAVY = {"torch", "numpy", "pandas", "PIL", "diffusers", "transformers", "matplotlib"}
TIMED = """
import json, sys, time
start = time.perf_counter()
import stylelora
print(json.dumps([time.perf_counter() - start, sorted(sys.modules)]))
"""


def fresh(code):
    "Run code in an interpreter that has imported nothing yet; give what it printed."
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_importing_takes_less_than_half_a_second_and_no_torch():
    found = [json.loads(fresh(TIMED)) for _ in range(3)]  # the quickest of three: others use this machine too
    assert min(seconds for seconds, _ in found) < 0.5
    assert not HEAVY & {name.split(".")[0] for name in found[0][1]}


def test_help_is_a_first_page():
    text = fresh("import stylelora as sl; help(sl)")
    for name in OFFERED:
        assert name in text.split("PACKAGE CONTENTS")[0], f"the first page does not name {name}"
    assert "00_start_here" in text and stylelora.__version__ in text
    assert len(stylelora.__doc__.splitlines()) <= 40, "a page, not a manual"


@pytest.mark.parametrize("name", OFFERED)
def test_each_name_is_what_its_room_defines(name):
    room = import_module(f"stylelora.{stylelora._ROOMS[name]}")
    assert getattr(stylelora, name) is getattr(room, name)
    assert name in dir(stylelora) and name in stylelora.__all__


def test_nothing_else_is_offered():
    assert set(stylelora.__all__) == set(OFFERED) == set(stylelora._ROOMS)
    with pytest.raises(AttributeError, match="it offers load_base, train_folder"):
        getattr(stylelora, "fine" + "_tune")


def test_the_sub_package_train_hides_no_function():
    said = fresh(
        "import stylelora as sl, stylelora.train.step as step\n"
        "print(sl.train.__name__, sl.train.step is step, callable(sl.train_folder))"
    )
    assert said.split() == ["stylelora.train", "True", "True"]


def test_the_example_of_the_first_page_calls_what_exists():
    lines = [line[4:] for line in stylelora.__doc__.splitlines() if line.startswith("    ")]
    example = "\n".join(lines[: next(i for i, line in enumerate(lines) if line.startswith("nbs/"))])
    calls = [node for node in ast.walk(ast.parse(example)) if isinstance(node, ast.Call)]
    used = [c for c in calls if ast.unparse(c.func).startswith("sl.")]
    assert {ast.unparse(c.func)[3:] for c in used} == set(OFFERED) - {"save_adapter"}
    for call in used:
        signature = inspect.signature(getattr(stylelora, ast.unparse(call.func)[3:]))
        signature.bind(*call.args, **{k.arg: k.value for k in call.keywords})
