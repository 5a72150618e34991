"""What the shipped base must be, whatever its gates say: an ordinary pipeline that knows no held-out style."""

import pytest

from stylelora.core import assets, read_json, root
from stylelora.data.grid import load_grid, make_caption
from stylelora.measure.evaluate import load_scorers, score_pictures
from stylelora.models.load import load_base
from stylelora.sample.generate import generate

CONCEPTS, STEPS = 24, 12


@pytest.fixture(scope="module")
def base():
    return load_base("embedded", "cpu")


@pytest.mark.parametrize("style", ["openmoji", "ink"])
def test_no_held_out_style_is_drawn_before_a_lora_is_trained(base, style):
    grid = load_grid()
    assert style in grid.held_out
    concepts = grid.concepts("test", style)[:CONCEPTS]
    drawn = generate(
        base,
        [make_caption(c, grid.style_word(style)) for c in concepts],
        0,
        "ddim",
        STEPS,
        4.0,
        batch=CONCEPTS,
        progress=False,
    ).images
    panel = load_scorers(style, "test", 10, clip="", lite0=False, device="cpu")
    right_style = score_pictures(panel, drawn, concepts).style_at_1
    assert right_style.mean() <= 0.25, (
        f"{right_style.mean():.2f} of the bare base's pictures look like {style}"
    )
    rows = [panel.judge.concepts.index(c) for c in concepts]
    truth = score_pictures(panel, panel.judge.drawings[rows, panel.judge.column], concepts).style_at_1
    assert truth.mean() > 0.9, "the judge has to know the style when it sees it"


def test_style_words_are_reserved_tokens_and_names_of_held_out_styles_are_not(base):
    grid = load_grid()
    known = base.tokenizer.get_vocab()
    for style in grid.held_out:
        assert grid.style_word(style) in known, style
    for name in ("openmoji", "fluent3d", "streamline"):  # flat and ink are also ordinary words of captions
        assert f"{name}</w>" not in known, name


def test_the_folder_is_small_and_the_gates_name_its_numbers():
    size = {
        p: sum(f.stat().st_size for f in (assets() / "base" / p).rglob("*") if f.is_file())
        for p in ("", "unet")
    }
    assert size["unet"] <= 36e6 and size[""] <= 44e6, size
    gates = read_json(root() / "reports" / "results" / "base_gates.json")
    assert all({"name", "value", "ceiling", "gate", "holds"} <= set(g) for g in gates)
    want = {
        "autoencoder_psnr_db",
        "style_at_1",
        "content_at_1_seen",
        "content_at_1_left_out",
        "copy_rate_left_out",
    }
    assert {g["name"] for g in gates} == want
    for g in gates:
        share = g["value"] / g["ceiling"] if g["ceiling"] else g["value"]
        assert g["holds"] == (share < g["gate"] if "copy" in g["name"] else share >= g["gate"]), g["name"]
