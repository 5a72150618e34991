"""Adapter files between this library and others: names on the real models, the certificate, and the commands.

`python -m tests.interop.test_interop` makes the certificate anew and writes it to reports/results/interop.json.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stylelora.adapters.files import load_adapter, read_adapter, save_adapter
from stylelora.adapters.keys import dotted, from_sgm, split_components, to_sgm
from stylelora.adapters.layouts import kohya_bytes, kohya_name
from stylelora.adapters.lora import delta_of, find_targets
from stylelora.apps.cli import main
from stylelora.core import generator
from stylelora.models.base import tiny_base

from .certificate import LIMITS, certify, holds, make_row, summarise, write_certificate
from .reference import BASES, clone, compare, our_updates, random_adapter, reference_updates

ROOT = Path(__file__).resolve().parents[2]
PAPER = ROOT / "reports" / "results" / "interop.json"
XL = dict(
    sample_size=128,
    block_out_channels=(320, 640, 1280),
    transformer_layers_per_block=(1, 2, 10),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=(5, 10, 20),
    cross_attention_dim=2048,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)


@pytest.fixture(scope="session")
def peft():
    return pytest.importorskip("peft")


@pytest.fixture(scope="session")
def diffusers():
    return pytest.importorskip("diffusers")


@pytest.fixture(scope="session")
def layers(diffusers):
    "Name all linear and convolution layers of the full-size networks; nothing is allocated."
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        nets = dict(
            sd15=diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
            sdxl=diffusers.UNet2DConditionModel(**XL),
            text=transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig()),
        )
    assert abs(sum(p.numel() for p in nets["sdxl"].parameters()) / 1e6 - 2567.5) < 1
    return {
        k: {n: m for n, m in net.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))}
        for k, net in nets.items()
    }


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("model, least", [("sd15", 279), ("sdxl", 279), ("text", 12 * 6 + 1)])
def test_every_layer_of_the_real_models_has_its_name_back(layers, model, least):
    "Dots and original block names are undone for each layer, and no two layers share a name."
    names = list(layers[model])
    assert len(names) >= least
    for n in names:
        assert dotted(n.replace(".", "_")) == n
        if model == "sdxl":
            assert from_sgm(dotted(to_sgm(n).replace(".", "_"))) == n
    assert len({kohya_name(n, model == "sdxl") for n in names}) == len(names)


def test_sdxl_names_are_those_of_diffusers(diffusers, layers):
    "diffusers' own readers translate our SDXL names to the layer we mean: every layer that an adapter can have."
    from diffusers.loaders import lora_conversion_utils as theirs
    from diffusers.utils import (
        convert_state_dict_to_diffusers,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )

    config = type("Config", (), dict(layers_per_block=2))

    def read(names):  # a file in which the number of each layer travels along, as diffusers translates it
        file = {
            f"{kohya_name(n, True)}.lora_{w}.weight": torch.full((1, 1), float(i))
            for i, n in enumerate(names)
            for w in ("down", "up")
        }
        return theirs._convert_non_diffusers_lora_to_diffusers(
            theirs._maybe_map_sgm_blocks_to_diffusers(file, config)
        )[0]

    def check(got, names):
        assert {k: v.item() for k, v in got.items()} == {
            f"{n}.lora_{w}.weight": i for i, n in enumerate(names) for w in "AB"
        }

    names = [n for n in layers["sdxl"] if not n.startswith(("time_", "add_", "conv_"))]
    check(
        convert_unet_state_dict_to_peft({k.removeprefix("unet."): v for k, v in read(names).items()}), names
    )
    for component in ("text_encoder", "text_encoder_2"):
        names = [
            f"{component}.text_model.encoder.layers.3.{n}"
            for n in ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc2")
        ]
        check(convert_state_dict_to_peft(convert_state_dict_to_diffusers(read(names))), names)


# ---------------------------------------------------------------- the certificate


@pytest.fixture(scope="session")
def certificate(peft, diffusers, tmp_path_factory):
    return certify(peft, tmp_path_factory.mktemp("interop"))


def test_every_way_is_green(certificate):
    red = [r for r in certificate["rows"] if not r["green"]]
    assert not red, red
    assert [r["green"] for r in certificate["rows"]] == [holds(r) for r in certificate["rows"]]
    assert {r["base"] for r in certificate["rows"]} == set(BASES) and len(certificate["rows"]) == 10 * len(
        BASES
    )


def test_the_adapters_are_seen_and_complete(certificate):
    "Ranks, layers and networks are those of the models, so nothing passes by being empty."
    counts = {
        (r["base"], r["reader"]): r["layers"] for r in certificate["rows"] if r["layout"] == "diffusers"
    }
    assert counts["sd15", "diffusers"] == 278 + 12 and counts["sd15", "PEFT"] == 278
    assert counts["sdxl", "diffusers"] == counts["sdxl", "PEFT"] + 24
    assert certificate["summary"]["change"] > 10 * LIMITS["pixels"]


def test_the_published_certificate_is_of_this_kind(certificate):
    "What the site shows has the same rows and colours; numbers may differ with versions and processors."
    paper = json.loads(PAPER.read_text(encoding="utf-8"))

    def ways(made):
        return [
            tuple(r[k] for k in ("base", "layout", "writer", "reader", "layers", "green"))
            for r in made["rows"]
        ]

    assert ways(paper) == ways(certificate)
    assert paper["summary"] == summarise(paper["rows"]) and all(holds(r) for r in paper["rows"])
    assert set(paper["versions"]) == set(certificate["versions"]) and paper["limits"] == LIMITS


# ---------------------------------------------------------------- files as they are found


@pytest.fixture(scope="session")
def pipe(diffusers):
    return BASES["sd15"]()


def read_by_both(pipe, file):
    "Updates as diffusers reads a file, and as we do."
    theirs = clone(type(pipe), pipe.components)
    theirs.load_lora_weights(str(file))
    return reference_updates(theirs), our_updates(read_adapter(file).state)


@pytest.mark.parametrize("kind", ["without alpha", "half precision", "attention only", "text only"])
def test_kohya_files_mean_what_they_mean_to_diffusers(peft, pipe, tmp_path, kind):
    components = {"attention only": ["unet"], "text only": ["text_encoder"]}.get(
        kind, ["unet", "text_encoder"]
    )
    state = random_adapter(pipe, components)
    if kind == "attention only":
        state = {n: s for n, s in state.items() if ".attn" in n}
    dtype = "float16" if kind == "half precision" else None
    if kind == "without alpha":
        state = {n: s | dict(alpha=2.0) for n, s in state.items()}  # else B would hold a scale
    file = save_adapter(state, tmp_path / "a.safetensors", "kohya", dtype=dtype)
    if kind == "without alpha":
        save_file({k: v for k, v in load_file(file).items() if not k.endswith("alpha")}, file)
        state = {n: s | dict(alpha=float(len(s["A"]))) for n, s in state.items()}
    want = our_updates(state)
    for got in read_by_both(pipe, file):
        numbers = compare(want, got)
        assert numbers["found"] == len(state) and numbers["error"] < (2e-3 if dtype else 1e-5), numbers


def test_a_file_that_diffusers_drops_is_refused_here(peft, pipe, tmp_path):
    "One foreign tensor, and diffusers loads nothing with a warning; here the tensor is named."
    file = save_adapter(random_adapter(pipe, ["unet"]), tmp_path / "a.safetensors", "kohya")
    save_file(load_file(file) | {"my_lora_note": torch.zeros(1)}, file)
    theirs = clone(type(pipe), pipe.components)
    theirs.load_lora_weights(str(file))
    assert reference_updates(theirs) == {}
    with pytest.raises(ValueError, match="1 of 835 keys are not understood: 'my_lora_note'"):
        read_adapter(file)
    assert len(read_adapter(file, strict=False).state) == 278


def test_alphas_that_differ_arrive_in_diffusers(peft, pipe, tmp_path):
    "Its kohya reader loses alphas that are not all equal, so our files have one; a file of somebody else is read here."
    state = random_adapter(pipe, ["unet", "text_encoder"])
    want = our_updates(state)
    assert len({s["alpha"] for s in state.values()}) == 4
    file = save_adapter(state, tmp_path / "a.safetensors", "kohya")
    assert len({v.item() for k, v in load_file(file).items() if k.endswith("alpha")}) == 1
    for got in read_by_both(pipe, file):
        assert compare(want, got)["error"] < 1e-5
    (tmp_path / "b.safetensors").write_bytes(kohya_bytes(state, {}, None))
    assert (
        len({v.item() for k, v in load_file(tmp_path / "b.safetensors").items() if k.endswith("alpha")}) == 4
    )
    got = our_updates(read_adapter(tmp_path / "b.safetensors").state)
    assert (
        compare(want, got) | dict(error=0) == dict(layers=290, found=290, error=0)
        and compare(want, got)["error"] < 1e-6
    )


def test_a_wrong_model_takes_nothing(pipe, tmp_path):
    file = save_adapter(random_adapter(BASES["sdxl"]()), tmp_path / "xl.safetensors", "kohya")
    own = clone(type(pipe), pipe.components)
    with pytest.raises(ValueError, match="text_encoder_2, which this model does not have"):
        load_adapter(own, file)
    assert own.unet.state_dict().keys() == pipe.unet.state_dict().keys()


def test_a_red_row_is_not_published(tmp_path):
    numbers, picture = dict(layers=2, found=1, error=0.5), torch.zeros(2, 2, 3)
    row = make_row(("b", "kohya", "x", "y"), numbers, picture, picture, picture + 0.5)
    with pytest.raises(ValueError, match="1 of 1 rows are red"):
        write_certificate(dict(rows=[row]), tmp_path / "c.json")
    assert not (tmp_path / "c.json").exists()


# ---------------------------------------------------------------- the commands


@pytest.fixture
def adapter(tmp_path):
    "A small adapter of the tiny model, in our own layout."
    g = generator("command")
    unet = tiny_base().unet
    shapes = {n: unet.get_submodule(n).weight.shape for n in find_targets(unet, "attention")}
    state = {
        n: dict(A=torch.randn(2, k, generator=g), B=torch.randn(d, 2, generator=g) * 0.3, alpha=3.0)
        for n, (d, k) in shapes.items()
    }
    return save_adapter(state, tmp_path / "a.safetensors", manifest=dict(lr=0.001))


def command(capsys, *words):
    "Run the command; its code and what it printed."
    code = main([str(w) for w in words])
    said = capsys.readouterr()
    assert "Traceback" not in said.err and said.err.count("\n") <= 1
    return code, said.out + said.err


def test_convert_there_and_back(capsys, tmp_path, adapter):
    k, p, d = tmp_path / "k.safetensors", tmp_path / "p", tmp_path / "d.safetensors"
    code, said = command(capsys, "convert", adapter, k, "--to", "kohya")
    assert code == 0 and "from diffusers to kohya" in said
    assert command(capsys, "convert", k, p, "--to", "peft")[0] == command(capsys, "convert", p, d)[0] == 0
    a, b = load_file(adapter), load_file(d)
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    assert (
        read_adapter(d).manifest == dict(lr=0.001) and read_adapter(k).metadata["ss_learning_rate"] == "0.001"
    )
    k.write_bytes(before := k.read_bytes() + b" ")
    code, said = command(capsys, "convert", d, k, "--to", "kohya")
    assert code == 1 and "exists already" in said and k.read_bytes() == before
    assert command(capsys, "convert", d, k, "--to", "kohya", "--force")[0] == 0 and k.read_bytes() != before
    code, said = command(capsys, "inspect", k)
    assert code == 0 and "k.safetensors: kohya" in said


def test_convert_refuses_before_it_writes(capsys, tmp_path, adapter):
    out = tmp_path / "out.safetensors"
    layer = "lora_unet_mid_block_attentions_0_proj_in"
    save_file({f"{layer}.oft_blocks": torch.zeros(2, 2, 2)}, tmp_path / "oft.safetensors")
    (tmp_path / "p.bin").write_bytes(b"x")
    for words, text in (
        ((tmp_path / "oft.safetensors", out), "OFT"),
        ((tmp_path / "p.bin", out), "only .safetensors"),
        ((tmp_path / "no.safetensors", out), "does not exist"),
        ((adapter, out, "--to", "webui"), "layout="),
        ((adapter, adapter, "--force"), "one of the sources"),
    ):
        code, said = command(capsys, "convert", *words)
        assert code == 1 and text in said, said
    assert not out.exists()


def test_every_layout_draws_the_same(capsys, tmp_path, adapter):
    pictures = []
    for layout in ("diffusers", "kohya", "peft"):
        file = tmp_path / (layout if layout == "peft" else f"{layout}.safetensors")
        assert command(capsys, "convert", adapter, file, "--to", layout)[0] == 0
        words = (
            "sample",
            "x",
            "--base",
            "tiny",
            "--num-inference-steps",
            2,
            "--n",
            1,
            "--force",
            "--out",
            tmp_path / "g.png",
        )
        assert command(capsys, *words, "--lora", file)[0] == 0
        pictures.append((tmp_path / "g.png").read_bytes())
    command(capsys, *words)
    assert pictures[0] == pictures[1] == pictures[2] != (tmp_path / "g.png").read_bytes()


def test_into_a_model_and_out_again(capsys, tmp_path, adapter):
    model, out = tmp_path / "model", tmp_path / "x.safetensors"
    assert command(capsys, "merge", adapter, "--into", "tiny", "--out", model, "--weights", "0.5")[0] == 0
    code, said = command(capsys, "extract", "tiny", model, out, "--rank", 2, "--target-modules", "attention")
    assert code == 0 and "keep 100.00% of the energy" in said, said
    want, got = read_adapter(adapter).state, read_adapter(out).state
    for n in want:
        assert (delta_of(got[n]) - 0.5 * delta_of(want[n])).abs().max() < 1e-5
    assert split_components(got).keys() == {"unet"}
    code, said = command(capsys, "extract", "tiny", model, out)
    assert code == 1 and "exists already" in said
    code, said = command(capsys, "extract", "tiny", "embedded", tmp_path / "y.safetensors")
    assert code == 1 and "not alike in both models" in said


if __name__ == "__main__":
    import tempfile

    import peft as module

    with tempfile.TemporaryDirectory() as folder:
        made = certify(module, folder)
    print(f"{write_certificate(made, sys.argv[1] if sys.argv[1:] else PAPER)}: {made['summary']}")
