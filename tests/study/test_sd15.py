"""The study on real styles at toy scale: a tiny random SD 1.5, ArtBench's published folders, scorers with random weights."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from stylelora.adapters.files import read_lora
from stylelora.core import read_json, root
from stylelora.models.base import tiny_base
from stylelora.models.load import load_base, save_base
from stylelora.study.cost import cost_lines
from stylelora.study.plan import announce, inputs_of, plan_runs, read_profile
from stylelora.study.study import run_study
from tests.fixtures import tiny_scorers

PARAMS = root() / "reports" / "params"
PARTS = read_profile("sd15")["parts"]


def tiny_sd15(folder):
    "Save a base like SD 1.5, with an AutoencoderKL, whose pictures have 16 pixels."
    from diffusers import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKL(
            block_out_channels=(8, 8),
            latent_channels=4,
            norm_num_groups=4,
            layers_per_block=1,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        )
    return save_base(replace(tiny_base(), vae=vae), folder, "float32")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "Make data, base, scorers, and a folder of parameters with a toy profile."
    home = tmp_path_factory.mktemp("sd15")
    tiny_sd15(home / "base"), tiny_scorers(home / "eyes")
    g = np.random.default_rng(0)
    for split, n in (("train", 24), ("test", 12)):
        for i in range(n):
            file = (
                home
                / f"art/artbench-10-imagefolder-split/{split}/ukiyo_e/hokusai_view-{'ab'[i % 2]}-{1800 + i}.png"
            )
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(g.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(file)
    (home / "params").mkdir()
    for name in ("L1", "sd15_shared"):
        shutil.copy(PARAMS / f"{name}.yaml", home / "params")
    toy = (PARAMS / "smoke_sd15.yaml").read_text()
    toy = toy.replace("base: tiny", f"lr: 0.05, base: {home}/base").replace(
        "evaluator: embedded", f"evaluator: {home}/eyes"
    )
    assert "clip: embedded" in toy and toy.count(str(home)) == 2
    (home / "params" / "toy.yaml").write_text(toy)
    return home


@pytest.fixture(scope="module")
def study(home):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STYLELORA_ARTBENCH", str(home / "art"))
        said = []
        outcomes = run_study("toy", home / "params", home / "out", said.append)
        assert set(outcomes.status) == {"done"}, outcomes.to_string()
        again = run_study("toy", home / "params", home / "out", said.append)
    return dict(
        outcomes=outcomes,
        again=again,
        said="\n".join(said),
        out=home / "out",
        rows=pd.read_parquet(home / "out" / "results" / "sd15-E1.parquet"),
    )


def test_every_arm_and_every_network_has_its_rows(study):
    rows = study["rows"]
    assert set(rows.recipe) == {"no_lora", "L1", "truth", "vae_round_trip", "nearest_train", "wrong_concept"}
    everywhere = {"clip_style", "clip_text", "clip_copy", "csd_style", "dinov2_style", "pickscore"}
    assert all(everywhere <= set(part.metric) for _, part in rows.groupby("recipe", observed=True))
    drawn = {"clip_content", "dinov2_content", "seconds_per_image", "diversity"}
    assert drawn <= set(rows[rows.recipe == "L1"].metric) and not drawn & set(
        rows[rows.recipe == "truth"].metric
    )
    assert set(
        rows[rows.metric == "clip_style"].groupby("recipe", observed=True).size()[["L1", "truth"]]
    ) == {20, 10}
    assert set(rows["style"]) == {"artbench/ukiyo_e"}


def test_content_is_measured_from_the_bare_base(study):
    content = study["rows"].query('metric == "clip_content"').groupby("recipe", observed=True).value
    assert (
        content.min()["no_lora"] > 0.998 and content.min()["L1"] < content.min()["no_lora"]
    )  # stored in eleven bits


def test_a_training_picture_is_recognised_as_a_copy(study):
    copy = study["rows"].query('metric == "clip_copy"').groupby("recipe", observed=True).value.min()
    assert copy["nearest_train"] > 0.998 > copy["truth"]


def test_crowds_say_how_many_they_are(study):
    runs = pd.read_parquet(study["out"] / "results" / "runs.parquet").set_index("recipe")
    one = [json.loads(f)["crowds"] for f in runs[runs.notebook.str.contains("evaluate")].loc[["L1"]].facts]
    assert one[0]["L1"]["csd"]["n"] == 10 and one[0]["L1"]["csd"]["m"] == 12
    assert "singular covariance" in one[0]["L1"]["csd"]["warning"] and "kid" in one[0]["L1"]["clip"]
    assert json.loads(runs.loc["references"].facts)["crowds"] == {}  # they are the crowd


def test_the_adapter_was_trained_on_ten_pictures_and_loads(study, home):
    (folder,) = (d.parent for d in (study["out"] / "runs" / "_sweep").glob("*/card.json"))
    card = read_json(folder / "card.json")
    assert (card["train_steps"], card["images_seen"], card["base_hash"]) == (
        4,
        8,
        load_base(home / "base").hash,
    )
    state = read_lora(folder)[0]
    assert state and all(s["B"].abs().sum() > 0 for s in state.values())
    texts = {f.read_text().strip() for f in (folder / "drawings" / "pool").glob("*.txt")}
    assert len(list((folder / "drawings" / "pool").glob("*.png"))) == 10
    assert texts == {
        "View a, a painting in the style of Ukiyo-e",
        "View b, a painting in the style of Ukiyo-e",
    }
    seen = {f.read_bytes() for f in (folder / "drawings" / "pool").glob("*.png")}
    assert not seen & {f.read_bytes() for f in (home / "art").glob("*/test/*/*.png")}


def test_the_plan_is_told_and_a_second_study_does_nothing(study):
    assert set(study["again"].status) == {"skipped"}
    first, second = re.findall(r"profile toy: (\d+) runs, (\d+) of them complete", study["said"])
    assert first == ("4", "0") and second == ("4", "4")
    assert "4 optimizer steps" in study["said"] and "measured on" in study["said"]


@pytest.mark.parametrize("part", PARTS)
def test_the_numbers_are_those_of_the_proposal(part):
    runs = plan_runs(read_profile(part))
    trained = [r.parameters for r in runs if r.notebook.endswith("train.ipynb")]
    assert trained and {p["style"] for p in trained} <= {"artbench/impressionism", "artbench/ukiyo_e"}
    for p in trained:
        assert (p["lr"], p["lr_schedule"], p["target_modules"]) == (1e-4, "cosine", "cross_attention")
        assert 5000 <= p["train_steps"] <= 10000 and 4 <= p["batch_size"] <= 8 and 4 <= p["rank"] <= 32
        assert 10 <= p["n_images"] <= 50 and p["base"] == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert {r.inputs["base"] for r in runs} == {"stable-diffusion-v1-5"} and not {"grid"} & set(
        runs[0].inputs
    )


def test_all_parts_share_their_trainings():
    runs = {
        r.id: r for part in PARTS for r in plan_runs(read_profile(part)) if r.notebook.endswith("train.ipynb")
    }
    assert len({json.dumps(r.parameters | dict(experiment="")) for r in runs.values()}) == len(runs)
    assert {r.parameters["rank"] for r in runs.values()} == {4, 8, 16, 32}
    assert {r.parameters["n_images"] for r in runs.values()} == {10, 20, 50}


def test_without_the_base_the_plan_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    p = read_profile("sd15_E1")
    runs = plan_runs(p)
    said = announce(p, runs, runs, tmp_path)
    assert (
        "80,000 optimizer steps" in said
        and "is not on this machine; recorded on" in said
        and " to go" not in said
    )
    assert "so times are not known" in "\n".join(cost_lines(runs, recorded=[]))
    costs = [
        dict(
            base="stable-diffusion-v1-5",
            device="a card",
            size=512,
            batch=4,
            train=0.5,
            sample=0.1,
            rest=0.2,
            peak_mb=9000.0,
        )
    ]
    lines = "\n".join(cost_lines(runs, recorded=costs))
    assert "recorded on a card" in lines and "9 GB" in lines
    steps = 16 * 5000 * 0.5 / 3600
    hours = float(re.search(r"trainings (\d+) h", lines)[1])
    assert steps < hours + 1 < steps * 1.6, lines


def test_the_embedded_study_is_planned_as_before():
    p = read_profile("study")
    runs = plan_runs(p)
    said = announce(
        p, runs, runs, Path("nowhere")
    ).splitlines()  # a heading, a line per kind of run, the reader
    assert len(said) == 1 + len({(r.notebook, r.recipe) for r in runs}) + 1 and said[-1].endswith(
        "E1_strategies"
    )
    assert set(inputs_of(runs[0].parameters)) == {"base", "evaluator", "clip", "grid", "grid-cc-by-sa"}


@pytest.fixture(scope="module")
def sweeps(home, study):
    "Draw with two samplers and two strengths, from the adapter of the toy study, and read both with the notebooks of the paired study."
    toy = (
        (home / "params" / "toy.yaml")
        .read_text()
        .replace("num_inference_steps: 2, evaluator", "KNOBS, evaluator")
        .replace("n_concepts: 10", "n_concepts: 6")
    )
    for part, knobs, reader in (
        ("E2", "sampler: [ddim, euler], num_inference_steps: 2", "E2_samplers.ipynb, experiment: sd15-E2"),
        (
            "E3",
            "num_inference_steps: 2, lora_scale: [1.0, 2.0]",
            "E3_sweeps.ipynb, experiment: sd15-E3, knob: lora_scale",
        ),
    ):
        text = toy.replace("experiment: sd15-E1", f"experiment: sd15-{part}\ntrainings: sd15-E1").replace(
            "KNOBS", knobs
        )
        (home / "params" / f"toy_{part}.yaml").write_text(text.replace("sd15_styles.ipynb", reader))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STYLELORA_ARTBENCH", str(home / "art"))
        done = {part: run_study(f"toy_{part}", home / "params", home / "out", print) for part in ("E2", "E3")}
    return done, home / "out"


def test_the_readers_of_the_paired_study_read_real_styles(sweeps):
    done, out = sweeps
    for table in done.values():
        assert set(table.status) <= {"done", "skipped"}, table.to_string()
    changed = read_json(out / "results" / "sd15_e2_changes.json")
    assert {c["metric"] for c in changed} >= {"CSD style"} and {c["sampler"] for c in changed} == {"euler"}
    figures = {f.name for f in (out / "figures").glob("*")}
    assert {
        "sd15-e2-cost.svg",
        "sd15-e2-interaction.svg",
        "sd15-e2-pareto.svg",
        "sd15-e3-lora_scale.svg",
    } <= figures, figures
    strength = read_json(out / "results" / "sd15_e3_lora_scale.json")
    assert set(strength) == {"1", "2"} and all(len(r) == 3 for r in strength.values())
