"""The whole study at toy scale through papermill: plan, train, evaluate, gather, read; and once more, with a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pandas as pd
import pytest

from stylelora.core import hash_files, read_json, root
from stylelora.study.plan import plan_runs, read_profile
from stylelora.study.results import SCHEMA
from stylelora.study.runs import is_complete
from stylelora.study.study import run_study
from stylelora.study.workers import run_parallel

FIGURES = "scatter.svg density.svg curves.svg contrasts.svg samples.webp progression.webp".split()


def trained(out):  # the folder of the one training run
    plan = [r for r in plan_runs(read_profile("smoke")) if Path(r.notebook).stem == "train"]
    return Path(out) / "runs" / "_sweep" / plan[0].id


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    out = tmp_path_factory.mktemp("smoke")
    outcomes = run_study("smoke", out=out)
    assert set(outcomes.status) == {"done"}, outcomes.to_string()
    return out


def test_results_are_tidy(study):
    table = pd.read_parquet(study / "results" / "E1.parquet")
    assert set(SCHEMA) <= set(table.columns)
    assert {"no_lora", "L1", "truth", "vae_round_trip"} <= set(table.recipe)
    assert table[table.recipe == "L1"].metric.isin(["style_at_1", "content_at_1", "gt_skill"]).any()
    assert not table.duplicated(["run_id", "recipe", "concept", "sample_seed", "metric"]).any()


def test_the_truth_is_a_ceiling_and_copying_has_no_skill(study):
    table = pd.read_parquet(study / "results" / "E1.parquet")
    skill = table[table.metric == "gt_skill"].groupby("recipe", observed=True).value.mean()
    assert skill["truth"] > 0.99 and abs(skill["nearest_style"]) < 1e-6


def test_every_figure_and_page_is_there(study):
    assert not [f for f in FIGURES if not (study / "figures" / f"e1-{f}").stat().st_size]
    assert {p.stem for p in (study / "runs" / "E1").glob("*.ipynb")} >= {"train-L1", "evaluate-L1"}


def test_a_second_study_does_nothing(study):
    before = hash_files(trained(study))
    again = run_study("smoke", out=study)
    assert set(again.status) == {"skipped"} and hash_files(trained(study)) == before


def test_sampler_study_and_sweep_use_the_same_adapter(study):
    outcomes = run_study(
        "smoke_sweeps", out=study, batch=partial(run_parallel, jobs=2)
    )  # twenty kernels start
    assert set(outcomes.status) <= {"done", "skipped"}, outcomes.to_string()
    plans = [plan_runs(read_profile(f"smoke_{e}")) for e in ("E2", "E3")]
    assert {trained(study).name} == {r.id for p in plans for r in p if Path(r.notebook).stem == "train"}
    names = "e2-cost.svg e2-strip.webp e2-matrix.webp e2-interaction.svg e2-pareto.svg e3-lora_scale.svg e3-lora_scale.webp".split()
    assert not [f for f in names if not (study / "figures" / f).stat().st_size]


def test_an_adapter_of_strength_zero_is_the_bare_base(study):
    runs = pd.read_parquet(study / "results" / "runs.parquet").set_index("run_id").parameters.map(json.loads)
    table = pd.read_parquet(study / "results" / "E3.parquet")
    table = table[(table.metric == "gt_skill") & (table.sampler != "none")]
    table = table.assign(scale=table.run_id.map(lambda i: runs[i]["lora_scale"]))
    skill = table.pivot_table(index=["recipe", "scale"], columns="concept", values="value", observed=True)
    assert (skill.loc["L1", 0.0] - skill.loc["no_lora", 1.0]).abs().max() < 1e-3
    assert (skill.loc["L1", 1.0] - skill.loc["no_lora", 1.0]).abs().max() > 1e-3


def test_an_interrupted_search_goes_on_where_it_was(tmp_path):
    first = run_study("smoke_tune", out=tmp_path)
    assert set(first.status) == {"done"} and (tmp_path / "figures" / "tune_smoke.svg").stat().st_size
    assert set(run_study("smoke_tune", out=tmp_path).status) == {"skipped"}
    done = tmp_path / "runs" / "_sweep" / first.id[0]
    table = pd.read_parquet(tmp_path / "results" / "tune_smoke.parquet")
    kept, lost = sorted((done / "tried").glob("*.parquet"))
    lost.unlink(), (done / "manifest.json").unlink()  # as a kill in the second setting leaves it
    half = done.rename(done.with_name(f".{done.name}.partial"))
    before = (half / "tried" / kept.name).stat().st_mtime_ns
    assert set(run_study("smoke_tune", out=tmp_path).status) == {"done"}
    assert (done / "tried" / kept.name).stat().st_mtime_ns == before
    again = pd.read_parquet(tmp_path / "results" / "tune_smoke.parquet")
    pd.testing.assert_frame_equal(again.drop(columns="seconds"), table.drop(columns="seconds"))


def test_a_killed_study_ends_with_the_same_adapter(study, tmp_path):
    code = f"from stylelora.study.study import run_study; run_study('smoke', out={str(tmp_path)!r})"
    run = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=root(),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    half = trained(tmp_path).parent
    for _ in range(600):  # until the training has left a checkpoint, or is over
        if run.poll() is not None or list(half.glob(f".{trained(tmp_path).name}*/*training*")):
            break
        time.sleep(0.2)
    os.killpg(run.pid, signal.SIGKILL) if run.poll() is None else None
    run.wait()
    assert not is_complete(trained(tmp_path)) or list(half.glob("*")), "something was begun"
    run_study("smoke", out=tmp_path)
    card = [read_json(trained(o) / "card.json")["adapter_hash"] for o in (study, tmp_path)]
    assert card[0] == card[1]
