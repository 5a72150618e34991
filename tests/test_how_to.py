"""CONTRIBUTING.md says how to add a sampler, and in how many files: a copy of the house follows it to the letter."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CELLS = """
#| export
@sampler("half_euler", "linspace", "zero", unit_start=False)
def sample_half_euler(
    model: Callable,  # model(x, sigma) -> x0_hat
    x: torch.Tensor,  # start, x0 + sigma*eps (b,c,h,w)
    sigmas: Sequence | torch.Tensor,  # descending noise levels (n+1,)
    *,
    noise_sampler: Callable | None = None,  # unused, the sampler is deterministic
    callback: Callable | None = None,  # function of the dict of `predict`
) -> torch.Tensor:  # pictures at noise sigmas[-1] (b,c,h,w)
    "Sample with Euler steps, to show how a sampler is added."
    return sample_euler(model, x, sigmas, noise_sampler=noise_sampler, callback=callback)
"""
USE = """
import sys
from stylelora.apps.cli import main
from stylelora.sample.samplers import SAMPLERS
assert "half_euler" in SAMPLERS
draw = ["sample", "a cat", "--base", "tiny", "--n", "1", "--num-inference-steps", "2", "--sampler"]
assert main([*draw, "half_euler", "--out", sys.argv[1]]) == 0
"""


def recipe(what):
    "Read a how-to of CONTRIBUTING.md: the number of files that it claims, and their paths."
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = re.search(rf"^### {what}.*?(?=^##|\Z)", text, re.S | re.M)
    assert section, f"CONTRIBUTING.md does not say how to add {what}"
    claim = re.search(r"\*\*(\w+) files?\*\*", section[0])
    files = re.findall(r"`((?:nbs|reports|tests)/[^`]+)`", section[0])
    return dict(one=1, two=2, three=3)[claim[1].lower()], list(dict.fromkeys(files))


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "Copy what is edited and what is exported, with the assets linked."
    home = tmp_path_factory.mktemp("house")
    shutil.copy(ROOT / "settings.ini", home)
    shutil.copytree(ROOT / "nbs", home / "nbs", ignore=shutil.ignore_patterns("node_modules", "_*", ".*"))
    shutil.copytree(
        ROOT / "stylelora", home / "stylelora", ignore=shutil.ignore_patterns("assets", "__pycache__")
    )
    (home / "stylelora" / "assets").symlink_to(ROOT / "stylelora" / "assets")
    return home


def run(home, *words):
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | dict(PYTHONPATH=str(home), HOME=str(home))
    env |= dict(XDG_CONFIG_HOME=str(home / "none"))
    done = subprocess.run(
        [sys.executable, *words], cwd=home, env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    return done.stdout


def written(home):
    "Fingerprint what people edit: not the package, which is exported."
    files = [p for p in (home / "nbs").rglob("*.ipynb")] + [home / "settings.ini"]
    return {str(p.relative_to(home)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_a_new_sampler_is_one_function_in_the_files_that_the_page_names(copy):
    n, files = recipe("A sampler")
    notebook = copy / files[0]
    before = written(copy)
    raw = json.loads(notebook.read_text(encoding="utf-8"))
    lines = CELLS.strip().splitlines(keepends=True)
    cell = dict(cell_type="code", id="abcd1234", metadata={}, outputs=[], execution_count=None, source=lines)
    raw["cells"].insert(len(raw["cells"]) - 1, cell)
    notebook.write_text(json.dumps(raw), encoding="utf-8")
    run(copy, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export()")
    run(copy, "-c", USE, str(copy / "grid.png"))
    changed = [f for f, digest in written(copy).items() if before.get(f) != digest]
    assert changed == files[:1] and len(changed) == n
    assert (copy / "grid.png").exists()


@pytest.mark.parametrize(
    "what",
    ["A recipe", "A sampler", "A metric", "An adapter kind", "A timestep sampling or a loss weighting"],
)
def test_every_how_to_names_files_that_exist(what):
    n, files = recipe(what)
    assert files and n <= len(files), (what, files)
    for f in files:
        assert list(ROOT.glob(f)), f"{what}: there is no {f}"
