"""All networks of a base: an SDXL adapter goes into U-Net and both text encoders, the model loads again, and all comes out."""

import pytest
import torch

from stylelora.adapters.files import load_adapter, read_adapter, save_adapter
from stylelora.adapters.keys import networks_of, split_components
from stylelora.adapters.lora import delta_of, find_targets, lora_layers
from stylelora.apps.cli import main
from stylelora.models.base import tiny_base
from stylelora.models.load import load_base, save_base
from tests.interop.reference import random_adapter


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bases")


@pytest.fixture(scope="module")
def adapter(folder):
    "An adapter with layers of all kinds in all three networks of the tiny SDXL."
    state = random_adapter(tiny_base(kind="sdxl"))
    assert {c: len(s) for c, s in split_components(state).items()} == {
        "unet": len(find_targets(tiny_base(kind="sdxl").unet, "conv")),
        "text_encoder": 12,
        "text_encoder_2": 12,
    }
    return save_adapter(state, folder / "xl.safetensors")


@pytest.fixture(scope="module")
def merged(folder, adapter):
    out = folder / "model"
    assert main(["merge", str(adapter), "--into", "tiny-sdxl", "--weights", "0.5", "--out", str(out)]) == 0
    return out


def inside(name):  # the name of a layer in a state, in this version of the text encoder
    return name.removeprefix("text_model.")


def test_every_weight_of_all_three_networks_is_the_sum_and_the_model_loads_again(adapter, merged):
    state, old, new = read_adapter(adapter).state, tiny_base(kind="sdxl"), load_base(merged, "cpu")
    deltas = {
        f"{c}.{inside(n)}.weight": delta_of(s).float()
        for c, layers in split_components(state).items()
        for n, s in layers.items()
    }
    seen = 0
    for c, network in networks_of(old).items():
        after = networks_of(new)[c].state_dict()
        assert after.keys() == network.state_dict().keys()
        for k, w in network.state_dict().items():
            delta = deltas.get(f"{c}.{inside(k)}")
            seen += delta is not None
            want = w if delta is None else w + 0.5 * delta.reshape(w.shape)
            assert torch.allclose(after[k], want, atol=1e-5), (c, k)
    assert seen == len(state)


def test_the_merged_model_is_read_by_diffusers(merged):
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(
        merged, local_files_only=True, add_watermarker=False
    )
    ours = load_base(merged, "cpu")
    for c, network in networks_of(ours).items():
        theirs = getattr(pipe, c).state_dict()
        assert all(torch.equal(v, theirs[k]) for k, v in network.state_dict().items())


def test_extract_compares_all_networks_and_gives_the_adapter_back(folder, adapter, merged, capsys):
    out = folder / "out.safetensors"
    words = ["extract", "tiny-sdxl", str(merged), str(out), "--rank", "3", "--target-modules", "conv"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "12 in text_encoder, 12 in text_encoder_2" in said and "keep 100.00%" in said
    assert "error 0.00% of all that changed" in said
    want, got = read_adapter(adapter).state, read_adapter(out).state
    assert want.keys() == got.keys()
    for n, s in got.items():
        assert torch.allclose(delta_of(s), 0.5 * delta_of(want[n]).reshape(delta_of(s).shape), atol=1e-4)


def test_a_change_in_the_second_text_encoder_alone_is_an_adapter_for_it_alone(tmp_path, capsys):
    tuned = tiny_base(kind="sdxl")
    layer = find_targets(tuned.text_encoder_2, "text_encoder")[0]
    tuned.text_encoder_2.get_submodule(layer).weight.data.add_(0.1)
    save_base(tuned, tmp_path / "tuned", "float32")
    assert (
        main(
            ["extract", "tiny-sdxl", str(tmp_path / "tuned"), str(tmp_path / "x.safetensors"), "--rank", "1"]
        )
        == 0
    )
    assert "1 layers (1 in text_encoder_2) of rank 1 keep 100.00%" in capsys.readouterr().out
    base = tiny_base(kind="sdxl")
    load_adapter(base, tmp_path / "x.safetensors")
    assert [len(lora_layers(net)) for net in networks_of(base).values()] == [0, 0, 1]


def test_a_model_without_the_network_refuses_the_adapter_and_writes_nothing(adapter, tmp_path, capsys):
    assert main(["merge", str(adapter), "--into", "tiny", "--out", str(tmp_path / "m")]) == 1
    said = capsys.readouterr().err
    assert "12 layers for text_encoder_2, which this model does not have" in said, said
    assert not (tmp_path / "m").exists()


def test_sdxl_in_kohyas_layout_comes_back_when_the_base_is_named(adapter, tmp_path):
    "The tiny SDXL has fewer layers per block than the real one, so only who names it writes its block names right."
    state, base = read_adapter(adapter).state, tiny_base(kind="sdxl")
    file = save_adapter(state, tmp_path / "k.safetensors", "kohya", like=base)
    load_adapter(base, file)
    assert sum(len(lora_layers(net)) for net in networks_of(base).values()) == len(state)
