"The second base: its store, its budgets and its prepared run, on drawings of four shapes."

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
from stylelora.pretrain.store import ADDED, make_plan, open_store, pack, render, store_cells  # noqa: E402
from stylelora.pretrain.treatments import HELD_PAIRS, TREATMENTS, pairs, treated  # noqa: E402
from stylelora.study.params import Loader  # noqa: E402

pytest.importorskip("resvg_py")
SHAPES = dict(
    ball='<circle cx="16" cy="16" r="9" fill="#d33"/>',
    box='<path d="M6 8h20v16H6z" fill="#36c"/>',
    sun='<path d="M16 3l4 9 9 4-9 4-4 9-4-9-9-4 9-4z" fill="#fc3"/>',
    leaf='<path d="M5 27q0-22 22-22q0 22-22 22" fill="#3a3"/>',
)


def svg(body):
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32" width="32" height="32">{body}</svg>'


def drawings():
    roles = dict(noto="seen", twemoji="seen", pen="seen", ink="probe")
    return [
        (c, v, "left_out" if (c, v) == ("box", "noto") else r, svg(b))
        for c, b in SHAPES.items()
        for v, r in roles.items()
    ]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    path = tmp_path_factory.mktemp("art") / "drawings.json.xz"
    pack(
        path,
        drawings(),
        {
            c: dict(split="base" if c != "sun" else "test", group="objects", keywords=["thing"])
            for c in SHAPES
        },
    )
    return path


def call(*args):
    return subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | dict(PYTHONPATH=str(ROOT), MPLBACKEND="agg"),
    )


def test_no_plan_renders_what_is_held_out():
    held = {t.word for t in TREATMENTS.values() if t.held}
    shown = {frozenset(t.split("+")) for t in make_plan(drawings() * 20).treatment}
    assert held and not any(held & s for s in shown)
    assert not {frozenset(p) for p in HELD_PAIRS} & (shown | {frozenset(p) for p in pairs()})


def test_a_left_out_cell_is_left_out_under_every_treatment():
    plan = make_plan(drawings())
    cell = plan[(plan.concept == "box") & (plan.maker == "noto")]
    assert len(cell) > 5 and set(cell.role) == {"left_out"}
    assert set(plan[plan.maker == "ink"].role) <= {"probe", "judge"} and not set(
        plan[plan.maker == "ink"].treatment
    ) - {""}


def test_treatments_change_a_picture_and_their_truth_repeats():
    x = np.full((64, 64, 3), 255, np.uint8)
    x[16:48, 16:48] = (200, 60, 40)
    for w, t in TREATMENTS.items():
        if t.svg:
            continue
        y = treated(x, w)
        assert y.dtype == np.uint8 and y.shape == x.shape and np.array_equal(y, treated(x, w)), w
        assert abs(y.astype(int) - x).mean() > 0.3, w


def test_a_killed_renderer_goes_on_and_a_longer_plan_keeps_what_is_done(packed, tmp_path):
    tool = ROOT / "tools" / "pretrain_render.py"
    made = call(tool, tmp_path / "a", packed, "size=32", "jobs=2")
    assert made.returncode == 0, made.stderr
    x, done = open_store(tmp_path / "a", len(pd.read_parquet(tmp_path / "a" / "plan.parquet")), 32)
    assert (done == 1).all() and x.std() > 10
    plan = make_plan(drawings())
    half = plan[: len(plan) // 2]
    render(tmp_path / "b", drawings(), half, 32)
    first = np.array(open_store(tmp_path / "b", len(half), 32)[0])
    grown, marks = open_store(tmp_path / "b", len(plan), 32)
    assert np.array_equal(grown[: len(half)], first) and not marks[len(half) :].any()
    render(tmp_path / "b", drawings(), plan, 32)
    assert np.array_equal(grown, x), "in two parts or in one, by one process or by two: the same pictures"


def test_networks_read_a_store_by_role(packed, tmp_path):
    assert call(ROOT / "tools" / "pretrain_render.py", tmp_path, packed, "size=32", "jobs=1").returncode == 0
    from stylelora.pretrain.artwork import choose_cells

    cells = store_cells(tmp_path)
    seen, left, free = (choose_cells(cells, k) for k in ("seen", "left_out", "others"))
    assert not set(seen) & set(left) and not set(cells["maker"][seen]) & {"ink"}
    assert (
        "sun" in cells["concept"][seen]
        and "sun" not in cells["concept"][free]
        and "ink" in cells["maker"][free]
    )
    assert all(v.endswith(m) for v, m in zip(cells["style"], cells["maker"]))


def test_budgets_name_parameters_that_their_notebooks_declare():
    from pretrain import declared

    second = yaml.load((ROOT / "nbs" / "pretrain" / "second.yaml").read_text(), Loader)
    for name, given in second.items():
        unknown = set(given) - declared(ROOT / "nbs" / "pretrain" / f"{name}.ipynb")
        assert not unknown, f"{name}: {unknown}"


def test_no_cell_overwrites_a_parameter():
    from pretrain import code_cells, declared

    for path in sorted((ROOT / "nbs" / "pretrain").glob("*.ipynb")):
        names, own = declared(path) - {"device"}, False
        for source, tags in code_cells(path):
            top = [
                n
                for s in ast.parse(source).body
                if isinstance(s, ast.Assign)
                for t in s.targets
                for n in ast.walk(t)
            ]
            set_here = {n.id for n in top if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            assert not own or not set_here & names, f"{path.name}: {set_here & names}"
            own = own or "parameters" in tags


def test_added_makers_are_pinned_and_attributed():
    pinned = json.loads((ROOT / "nbs" / "pretrain" / "package.json").read_text())["dependencies"]
    page = (ROOT / "ATTRIBUTION.md").read_text()
    for word, (package, _) in ADDED.items():
        assert package.removeprefix("@iconify-json/") and (package in pinned) and f"`{word}`" in page, word
