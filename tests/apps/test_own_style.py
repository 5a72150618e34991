"""The notebook "Your own style", executed at toy scale: its example, and a user's folder without captions."""

import json

import numpy as np
import pytest
from PIL import Image

from stylelora.adapters.files import read_adapter
from stylelora.adapters.lora import load_state, lora_layers, remove
from stylelora.core import read_json, root
from stylelora.models.load import load_base


def run(place, **given):
    "Execute the notebook; give what it printed."
    import papermill

    from stylelora.kernels import this_kernel

    source, target = root() / "nbs" / "demo" / "own_style.ipynb", place / "own_style.ipynb"
    papermill.execute_notebook(
        str(source),
        str(target),
        parameters=given,
        kernel_name="python3",
        language="python",
        kernel_manager_class=this_kernel(),
        cwd=str(root()),
        progress_bar=False,
    )
    cells = read_json(target)["cells"]
    return json.dumps([c.get("outputs") for c in cells], ensure_ascii=False)


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    home = tmp_path_factory.mktemp("own")
    (home / "pictures").mkdir()
    g = np.random.default_rng(0)
    for name in ("red_boat", "old-mill", "cat", "sea", "hill", "tree"):
        Image.fromarray(g.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(
            home / "pictures" / f"{name}.png"
        )
    Image.open(home / "pictures" / "cat.png").save(home / "pictures" / "twin.png")
    said = run(
        home,
        folder=str(home / "pictures"),
        base="tiny",
        train_steps=4,
        rank=2,
        word="so z w",
        out=str(home / "out"),
        device="cpu",
    )
    return home, said


def test_problems_are_named_and_losses_told(mine):
    home, said = mine
    assert "7 pictures, 1 to look at" in said and "copy of" in said
    assert "4 steps; held-out loss" in said and "searched on validation concepts" in said


def test_all_files_hold_the_same_adapter(mine):
    home, said = mine
    base, weights = load_base("tiny", "cpu"), []
    for name in ("my_style.safetensors", "my_style_kohya.safetensors", "my_style_peft"):
        found = read_adapter(home / "out" / name, base.unet.config.layers_per_block)
        load_state(base.unet, found.state)
        weights.append({n: m.delta_weight().detach() for n, m in lora_layers(base.unet).items()})
        remove(base.unet)
    assert weights[0] and any(w.abs().max() > 0 for w in weights[0].values())
    for other in weights[1:]:
        assert other.keys() == weights[0].keys()
        assert max((other[n] - w).abs().max() for n, w in weights[0].items()) < 1e-6


def test_another_training_does_not_replace_it(mine):
    home, _ = mine
    given = dict(
        folder=str(home / "pictures"), base="tiny", rank=2, word="so z w", out=str(home / "out"), device="cpu"
    )
    before = (home / "out" / "my_style.safetensors").read_bytes()
    with pytest.raises(Exception, match="my_style.safetensors exists already; choose another name"):
        run(home, train_steps=5, **given)
    run(home, train_steps=4, **given)  # the same again is no other one
    assert (home / "out" / "my_style.safetensors").read_bytes() == before


def test_captions_are_file_names_and_the_word(mine):
    home, said = mine
    manifest = read_adapter(home / "out" / "my_style.safetensors").manifest
    assert (manifest["template"], manifest["word"], manifest["pictures"], manifest["rank"]) == (
        "{name}, {style}",
        "so z w",
        6,
        2,
    )


def test_the_example_learns_on_the_embedded_base(tmp_path):
    said = run(tmp_path, train_steps=2, out=str(tmp_path / "out"), device="cpu")
    assert "20 pictures" in said and "searched on validation concepts" in said
    assert (tmp_path / "out" / "my_style_kohya.safetensors").stat().st_size > 10_000
