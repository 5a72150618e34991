"""Does a row of the interop certificate turn red for each of the ways in which an adapter can be lost?"""

import pytest
import torch

from stylelora.adapters.files import load_components, read_adapter, save_adapter
from stylelora.core import read_json

from .certificate import (
    LIMITS,
    certify,
    make_row,
    summarise,
    write_certificate,
    written_here,
    written_there,
)
from .reference import BASES, compare, draw, our_updates, random_adapter, read_by_diffusers, reference_updates

FINE, WAY = dict(layers=3, found=3, error=1e-7), ("b", "kohya", "x", "y")
GRAY = torch.full((2, 2, 3), 0.5)


@pytest.fixture(scope="module")
def peft():
    pytest.importorskip("diffusers")
    return pytest.importorskip("peft")


@pytest.fixture(scope="module")
def pipe(peft):
    return BASES["sd15"]()


@pytest.fixture(scope="module")
def here(peft, pipe, tmp_path_factory):
    return written_here("sd15", pipe, peft, tmp_path_factory.mktemp("here"))


@pytest.fixture(scope="module")
def there(peft, pipe, tmp_path_factory):
    return written_there("sd15", pipe, peft, tmp_path_factory.mktemp("there"))


# ---------------------------------------------------------------- a row


def test_a_row_says_who_wrote_and_who_read():
    way = dict(base="b", layout="kohya", writer="x", reader="y")
    assert make_row(WAY, FINE) == way | FINE | dict(pixels=None, change=None, green=True)


def test_small_differences_are_green():
    assert make_row(WAY, FINE, GRAY, GRAY + 0.001, GRAY + 0.2)["green"] is True


LOSSES = {
    "a layer is missing": dict(found=2),
    "a layer too many": dict(found=4),
    "no layer at all": dict(found=0, layers=0),
    "an update is off": dict(error=1e-3),
    "an update is far off": dict(error=1e9),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_is_red(loss):
    assert make_row(WAY, FINE | LOSSES[loss])["green"] is False


def test_a_pixel_that_is_off_is_red():
    assert make_row(WAY, FINE, GRAY, GRAY + 0.01, GRAY + 0.2)["green"] is False


def test_an_adapter_that_nobody_sees_is_red():
    assert make_row(WAY, FINE, GRAY, GRAY, GRAY + 0.01)["green"] is False


# ---------------------------------------------------------------- the ways, on the random model


def test_what_is_written_here_is_read_there(here):
    assert [r["green"] for r in here] == [True] * 5
    assert [r["layers"] for r in here] == [278 + 12, 278 + 12, 278, 278, 278 + 12]


def test_what_is_written_there_is_read_here(there):
    assert [r["green"] for r in there] == [True] * 5


def test_the_summary_names_the_worst(here, there):
    s = summarise(here + there)
    assert [s["rows"], s["green"], s["error"]] == [10, 10, max(r["error"] for r in here + there)]
    assert 0 <= s["pixels"] <= LIMITS["pixels"] and LIMITS["change"] < s["change"] <= 1


def test_a_certificate_with_a_red_row_is_not_written(here, there, tmp_path):
    made = dict(rows=here + there, summary=summarise(here + there))
    path = write_certificate(made, tmp_path / "c.json")
    assert read_json(path)["summary"] == made["summary"]
    made["rows"] = [*here, there[0] | dict(green=False)]
    with pytest.raises(ValueError, match="1 of 6 rows are red"):
        write_certificate(made, path)
    assert read_json(path)["summary"] == made["summary"]


def test_an_unknown_model_is_refused(peft, tmp_path):
    with pytest.raises(ValueError, match="'sd3' is none of"):
        certify(peft, tmp_path, ["sd3"])


def test_a_reader_that_ignores_the_scales_is_found_out(peft, pipe, tmp_path):
    "Every alpha is taken for the rank, as tools do that ignore them; the updates and the picture both show it."
    state, mine, theirs = random_adapter(pipe), BASES["sd15"](), BASES["sd15"]()
    load_components(mine, state)
    file = save_adapter(state, tmp_path / "a.safetensors", "kohya")
    careless = {n: s | dict(alpha=float(len(s["A"]))) for n, s in read_adapter(file).state.items()}
    read_by_diffusers(theirs, save_adapter(careless, tmp_path / "bare.safetensors"), peft)
    numbers = compare(our_updates(state), reference_updates(theirs))
    row = make_row(WAY, numbers, draw(mine), draw(theirs), draw(pipe))
    assert row["found"] == row["layers"] and not row["green"] and row["pixels"] > LIMITS["pixels"]
