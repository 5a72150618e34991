"""Who only trains and samples installs the core: nothing of it may import what belongs to the study."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STUDY = "scipy statsmodels matplotlib papermill ipywidgets lpips smalldocs nbformat nbclient psutil latex2mathml torchvision"
TESTS = "nbdev fastcore execnb pytest peft k_diffusion IPython"
CORE = """stylelora stylelora.core stylelora.noise.schedule stylelora.noise.objective stylelora.noise.sigmas
    stylelora.adapters.lora stylelora.adapters.keys stylelora.adapters.files stylelora.adapters.merge
    stylelora.adapters.active stylelora.models.load stylelora.data.folder stylelora.train.loop
    stylelora.train.from_folder stylelora.sample.samplers stylelora.sample.generate stylelora.apps.cli""".split()
BLOCK = "import sys\nfor name in {absent!r}: sys.modules[name] = None\n"  # as if it were not installed


def without(code):
    "Run code in a fresh interpreter where the study's and the tests' packages cannot be imported."
    start = BLOCK.format(absent=set(f"{STUDY} {TESTS}".split()))
    return subprocess.run([sys.executable, "-c", start + code], cwd=ROOT, capture_output=True, text=True)


def test_the_core_needs_no_extra():
    done = without("\n".join(f"import {name}" for name in CORE))
    assert done.returncode == 0, done.stderr[-1500:]


def test_the_core_trains_and_draws_without_extras(tmp_path):
    from PIL import Image

    for i, colour in enumerate(("red", "blue", "green", "black")):
        Image.new("RGB", (16, 16), colour).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"a {colour} square")
    out, picture = tmp_path / "a.safetensors", tmp_path / "g.png"
    train = ["train", str(tmp_path), "--base", "tiny", "--train-steps", "2", "--out", str(out)]
    draw = ["sample", "a red square", "--base", "tiny", "--lora", str(out), "--n", "1"]
    draw += ["--num-inference-steps", "2", "--out", str(picture)]
    done = without(f"from stylelora.apps.cli import main\nassert main({train!r}) == 0 == main({draw!r})")
    assert done.returncode == 0, done.stdout + done.stderr[-1500:]
    assert out.exists() and picture.exists()


def test_what_needs_an_extra_names_it():
    done = without("import stylelora.apps.cli as c; print(c.main(['study', '--profile', 'smoke']))")
    assert "stylelora[study]" in done.stdout + done.stderr
