"""Trainings done together leave what they leave alone, also when the crew is killed, and nothing hangs on the crew."""

import json
import os
import random
import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from stylelora.adapters.files import read_lora
from stylelora.core import read_json, root
from stylelora.study.params import Run, complete_parameters
from stylelora.study.runs import run_batch, run_one
from stylelora.study.workers import BEGUN, TRAINER, crews_of

FILE = "pytorch_lora_weights.safetensors"


def training(recipe, **more):
    given = dict(base="tiny", recipe=recipe, train_steps=4) | more
    return Run(TRAINER, "smoke", recipe, complete_parameters(root() / TRAINER, given))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    "A crew of two recipes, their own notebooks after it, and one of the two alone."
    folder = tmp_path_factory.mktemp("crew")
    runs = [training("L1"), training("L2", schedule="cosine", train_seed=1, rank=4)]
    crews = crews_of(runs, 8, folder / "together")
    table = run_batch([*crews, *runs], folder / "together", say=print)
    assert list(table.status) == ["done"] * 3, table.error.tolist()
    assert run_one(runs[1], folder / "alone")["status"] == "done"
    return folder, runs


def test_a_member_is_the_training_that_it_is_alone(done):
    folder, (_, run) = done
    (mine, told), (single, said) = (read_lora(folder / way / run.id / FILE) for way in ("together", "alone"))
    assert told == said  # the header of the file, fingerprints of pictures and recipe among it
    for name, s in single.items():
        for w in "AB":
            assert np.allclose(s[w], mine[name][w], atol=1e-4), (name, w)
    losses = [pd.read_parquet(folder / way / run.id / "history.parquet") for way in ("together", "alone")]
    assert np.allclose(losses[0].loss.dropna(), losses[1].loss.dropna(), atol=1e-4)
    assert np.allclose(losses[0].val_loss.dropna(), losses[1].val_loss.dropna(), atol=1e-4)
    pictures = [
        sorted(f.name for f in (folder / way / run.id / "progress").iterdir())
        for way in ("together", "alone")
    ]
    assert pictures[0] == pictures[1] and len(pictures[0]) == 3


def test_the_manifest_says_that_it_was_a_crew_and_counts_its_time(done):
    folder, runs = done
    for run in runs:
        manifest = read_json(folder / "together" / run.id / "manifest.json")
        share = read_json(folder / "together" / run.id / "crew.json")
        assert manifest["crew"] == share["members"] == 2
        assert manifest["seconds"] > share["seconds"] > 0 and manifest["train_seconds"] >= share["seconds"]
    assert read_json(folder / "alone" / runs[1].id / "manifest.json")["crew"] == 1


def test_what_has_begun_alone_ends_alone(tmp_path):
    runs = [training(f"L{k}") for k in (1, 2, 3)]
    begun = tmp_path / f".{runs[0].id}.partial" / BEGUN
    begun.parent.mkdir()
    begun.touch()
    (crew,) = crews_of(runs, 8, tmp_path)
    assert [m["recipe"] for m in crew.parameters["members"]] == ["L2", "L3"]


def test_a_crew_that_fails_leaves_its_members_to_train_alone(tmp_path):
    good, bad = training("L1"), training("L2", n_images=10_000)  # more pictures than there are
    (crew,) = crews_of([bad, good], 8, tmp_path)
    table = run_batch([crew, bad], tmp_path, say=print)
    assert list(table.status) == ["failed", "failed"]
    assert "10000" in table.error[0].replace(",", "") and table.error[0] == table.error[1]


KILLED = """
import json, os, signal, sys, torch
from stylelora.models.base import encode_text, tiny_base
from stylelora.noise.objective import Objective
from stylelora.train.crew import train_crew
from stylelora.train.step import TrainConfig

folder, dies = sys.argv[1], int(sys.argv[2])


def on_step(row):
    if row["step"] == dies:
        os.kill(os.getpid(), signal.SIGKILL)


base = tiny_base()
z = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
text = encode_text(base, [f"picture {k}" for k in range(6)])
calls = []
for k in range(3):
    config = TrainConfig(train_steps=24, lr=1e-2, rank=2 + k, seed=k, target_modules="conv", save_every=5, val_every=8)
    objective = Objective("cosine") if k == 1 else None
    calls.append(dict(latents=z, contexts=text, config=config, objective=objective, folder=f"{folder}/{k}"))
calls[1]["on_step"] = on_step
train_crew(base, calls, folder, progress=False)
"""


def crew_of_three(folder, dies=0):
    words = [sys.executable, "-c", KILLED, str(folder), str(dies)]
    code = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(root())})
    assert code.returncode == (-signal.SIGKILL if dies else 0), code.stderr
    return [f.read_bytes() for f in sorted(folder.glob(f"*/{FILE}"))]


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_steps_it_ends_with_the_same_bytes(tmp_path, kills):
    whole = crew_of_three(tmp_path / "whole")
    assert len(whole) == 3
    dice = random.Random(kills)
    for step in sorted(dice.randint(2, 23) for _ in range(kills)):
        assert crew_of_three(tmp_path / "killed", dies=step) == []
    assert crew_of_three(tmp_path / "killed") == whole
    assert not list((tmp_path / "killed").glob("stylelora-crew*"))


def test_a_crew_is_named_by_its_members_alone(tmp_path):
    runs = [training("L1"), training("L2")]
    (crew,) = crews_of(runs, 8, tmp_path)
    (again,) = crews_of([Run(**json.loads(json.dumps(vars(r)))) for r in runs], 8, tmp_path / "elsewhere")
    assert crew.id == again.id and crew.id != crews_of(runs[::-1], 8, tmp_path)[0].id
