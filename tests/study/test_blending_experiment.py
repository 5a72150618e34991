"""Two toy adapters of different styles are mixed through papermill: plan, train, mix, gather, read."""

import json
from pathlib import Path

import pandas as pd
import pytest

from stylelora.core import read_json
from stylelora.report.hypotheses import judge_hypothesis, load_hypotheses, with_details
from stylelora.study.plan import plan_runs, read_profile, training_runs
from stylelora.study.study import run_study

MIXTURES = ["exact_0.00", "exact_0.50", "exact_1.00", "naive_0.50"]
DOSES = "style_score other_style_score attribute_palette attribute_outline attribute_shading attribute_shape".split()


def kind(run):
    return Path(run.notebook).stem


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    out = tmp_path_factory.mktemp("blending")
    outcomes = run_study("smoke_E5", out=out)
    assert set(outcomes.status) == {"done"}, outcomes.to_string()
    return out


@pytest.fixture(scope="module")
def rows(study):
    return pd.read_parquet(study / "results" / "E5.parquet")


@pytest.fixture(scope="module")
def runs(study):
    return pd.read_parquet(study / "results" / "runs.parquet")


def test_a_mixture_comes_after_both_of_its_trainings():
    plan = plan_runs(read_profile("smoke_E5"))
    place = {r.id: i for i, r in enumerate(plan)}
    (mix,) = [r for r in plan if r.parameters.get("mode") == "mix"]
    second, first = (plan[place[mix.parameters[k]]] for k in ("adapter", "blend_with"))
    assert (first.parameters["style"], second.parameters["style"]) == ("openmoji", "ink")
    assert first.parameters | dict(style="ink") == second.parameters
    assert max(place[first.id], place[second.id]) < place[mix.id] == len(plan) - 1
    floors = [r for r in plan if kind(r) == "evaluate" and r is not mix]
    assert {(r.recipe, r.parameters["style"]) for r in floors} == {("references", "ink"), ("no_lora", "ink")}


def test_the_full_study_mixes_adapters_that_it_trains_anyway():
    trained = {r.id for name in ("full_E1", "full_E4") for r in training_runs(read_profile(name))}
    mine = training_runs(read_profile("full_E5"))
    assert len(mine) == 6 and {r.id for r in mine} <= trained
    assert "full_E5" in read_profile("full")["parts"]


def test_every_mixture_has_every_dose_for_every_concept(rows):
    found = rows[rows.recipe.isin(MIXTURES) & rows.metric.isin(DOSES)]
    counts = found.groupby(["recipe", "metric"], observed=True).concept.nunique().unstack()
    assert sorted(counts.index) == MIXTURES and set(counts.columns) == set(DOSES)
    assert (counts == 4).all(axis=None), counts
    assert set(rows["style"]) == {"ink"}


def test_doses_are_zero_near_the_base_styles_and_one_near_the_truth(rows):
    dose = rows[rows.metric == "style_score"].groupby("recipe", observed=True).value.mean()
    assert 0.6 < dose["truth"] < 1.4 and abs(dose["nearest_style"]) < 0.5
    assert dose["wrong_concept"] > dose["nearest_style"] + 0.3  # the hand counts, not the thing
    assert rows[rows.recipe == "truth"].metric.isin(DOSES).any()


def test_equal_starts_make_the_shortcut_twice_as_strong(runs):
    facts = runs[runs.parameters.str.contains('"mode": "mix"')].facts.map(json.loads).iloc[0]
    blocks = pd.DataFrame(facts["mixture"]).set_index("block")
    total = (blocks**2).sum() ** 0.5
    assert 1.8 < total.averaged / total.mixture < 2.2  # A has hardly moved: (B1 + B2) A
    assert 0.8 < total.cross / total.mixture < 1.2
    assert 0 < total.lost < 0.05 * total.mixture  # merged and read back
    assert {"down 0", "mid"} & set(blocks.index)


def test_the_page_has_its_figures_and_says_what_is_missing(study, rows, runs):
    for name in ("e5-style-score.svg", "e5-path.svg", "e5-strip.webp"):
        assert (study / "figures" / name).stat().st_size
    assert (study / "runs" / "E5" / "E5_blending.ipynb").exists()
    said = read_json(study / "results" / "e5_blending.json")
    assert (said["style"], said["other"], said["verdict"]) == ("ink", "openmoji", "not tested")
    entry = next(e for e in load_hypotheses()[1] if e["id"] == "H10")
    line, difference = judge_hypothesis(entry, with_details(rows, runs)).evidence.itertuples()
    assert "exact_0.25" in line.reason and not difference.reason and difference.n_units == 4


def test_a_second_study_does_nothing(study):
    assert set(run_study("smoke_E5", out=study).status) == {"skipped"}
