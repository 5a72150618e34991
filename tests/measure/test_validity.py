"""The validation of metrics: variance components against a peer, and its reader at toy scale on invented results."""

import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from stylelora.core import read_json, root
from stylelora.measure.validity import variance_shares
from stylelora.study.params import Run, complete_parameters
from stylelora.study.results import SCHEMA, append_results
from stylelora.study.runs import run_one

SKILL = dict(L1=0.6, L2=0.4, no_lora=0.05, nearest_style=0.0, wrong_concept=-0.5, truth=1.0)


def test_variance_shares_are_those_of_a_mixed_model():
    "On a balanced grid the estimates of the analysis of variance are those of REML, where none is negative."
    formula = pytest.importorskip("statsmodels.formula.api")
    rng = np.random.default_rng(3)
    y = 2 * rng.normal(size=(12, 1)) + 1.5 * rng.normal(size=(1, 7)) + rng.normal(size=(12, 7))
    c, s = np.indices(y.shape)
    frame = pd.DataFrame(dict(y=y.ravel(), c=c.ravel(), s=s.ravel(), all=1))
    model = formula.mixedlm("y ~ 1", frame, groups="all", vc_formula=dict(c="0 + C(c)", s="0 + C(s)"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = model.fit(reml=True)
    parts = dict(zip(model.exog_vc.names, fit.vcomp)) | dict(rest=fit.scale)
    ours = variance_shares(y[..., None])
    for name, key in (("content", "c"), ("style", "s"), ("rest", "rest")):
        assert abs(ours[name] - parts[key] / sum(parts.values())) < 0.005, (name, ours, parts)


def invented(folder):
    "Write results in which PSNR orders the recipes as the skill does, and SSIM the other way round."
    # four times the skill: a power of two, so that storing both in eleven bits cannot make ties of one and not of the other
    rng, rows = np.random.default_rng(0), []
    for recipe, skill in SKILL.items():
        for c in range(24):
            k = skill + 0.1 * rng.normal()
            rows += [
                dict(recipe=recipe, concept=f"c{c}", metric=m, value=v)
                for m, v in dict(
                    gt_skill=k, psnr=4 * k, ssim=-k, perceptual=1 - k, clip_text=rng.normal()
                ).items()
            ]
    same = dict(
        experiment="E1",
        style="openmoji",
        n_images=50,
        rank=8,
        train_seed=0,
        sample_seed=0,
        sampler="ddim",
        num_inference_steps=20,
        nfe=40,
        guidance_scale=4.0,
        run_id="r",
    )
    append_results(pd.DataFrame(rows).assign(**same)[list(SCHEMA)], folder)


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    "Execute the reader as the smoke profile asks for it."
    out = tmp_path_factory.mktemp("validity")
    invented(out / "results")
    asked = yaml.safe_load((root() / "reports" / "params" / "smoke_E6.yaml").read_text())["read"][0]
    notebook = asked.pop("notebook")
    given = complete_parameters(
        root() / notebook, asked | dict(results=str(out / "results"), profile="smoke_E6")
    )
    outcome = run_one(Run(notebook, "E6", "E6_metrics", given), out / "runs", say=lambda line: None)
    assert outcome["status"] == "done", outcome["error"]
    return out / "runs" / outcome["id"]


def table(read, name):
    return pd.read_csv(read / "values" / f"e6_{name}.csv", index_col="name")


def test_the_paired_metrics_see_what_they_claim(read):
    auc = table(read, "auc")
    assert auc.loc["style_margin", "style"] > 0.8 > 0.65 > auc.loc["style_margin", "content_first"]
    assert auc.loc["content_margin", "content"] > 0.8 and auc.loc["content_margin", "content_first"] > 0.6
    assert ((auc.content_low <= auc.content) & (auc.content <= auc.content_high)).all()
    assert auc.selectivity["style_margin"] < 0 < auc.selectivity["content_margin"]


def test_damage_is_seen_where_it_is_done(read):
    loss = table(read, "attribute_scores").pivot(index="metric", columns="damage", values="loss")
    assert loss.loc["style_margin", "other_hand"] > 0.5 > loss.loc["style_margin", "other_thing"]
    assert loss.loc["content_margin", "other_thing"] > 0.5 > loss.loc["content_margin", "hue"]
    assert (loss.loc["gt_skill"] > 0).all()
    shares = table(read, "shares")
    assert np.allclose(shares[["content", "style", "rest"]].sum(axis=1), 1, atol=0.002)
    assert shares["style"].idxmax() == "evaluator, style"


def test_who_would_have_been_misled(read):
    wrong, ranks = table(read, "misled"), table(read, "ranks")
    assert (
        wrong.loc["ssim", ["wrong", "silent"]].tolist() == [wrong.pairs["ssim"], 0]
        and wrong.pairs["ssim"] >= 13
    )
    assert wrong.loc["ssim", ["recipes_wrong", "recipes_pairs"]].tolist() == [3, 3]
    assert wrong.loc["ssim", ["better", "worse"]].tolist() == ["wrong_concept", "truth"]
    assert (wrong.loc[["psnr", "perceptual"], "wrong"] == 0).all()
    for group in ("recipes", "references"):
        assert ranks.tau[[f"{group}-psnr", f"{group}-perceptual", f"{group}-ssim"]].tolist() == [1, 1, -1]
    assert ranks.tau["concepts-psnr"] == 1 and abs(ranks.tau["concepts-clip_text"]) < 0.3


def test_the_bias_shrinks_and_the_page_has_what_it_needs(read):
    bias = table(read, "bias")
    assert -1.4 < bias.power["MMD, biased"] < -0.8 and np.isnan(bias.power["MMD, unbiased"])
    assert bias.large["Fréchet"] < bias.small["Fréchet"]
    assert (
        set(table(read, "verdicts").verdict) <= {"met", "open", "missed"}
        and len(table(read, "verdicts")) == 4
    )
    assert read_json(read / "values" / "e6_facts.json")["ranked"] == "adapters and the bare base"
    page = (Path(root()) / "reports" / "E6.qmd").read_text()
    for f in [*(read / "figures").glob("*"), *(read / "values").glob("*")]:
        assert f.name in page and 0 < f.stat().st_size < 40_000, f.name
