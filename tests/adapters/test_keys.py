"""Keys in three steps: every combination of first words, style of name and last words is read to the right layer, or named.

The layers are those of the real U-Nets of Stable Diffusion 1.5, 2.1 and SDXL and of their text encoder, built without
weights; diffusers' own names are the oracle.
"""

import itertools

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from stylelora.adapters.files import read_adapter
from stylelora.adapters.keys import PREFIXES, parse_key, to_sgm, why_not
from stylelora.apps.cli import main
from stylelora.models.tiny import PUBLISHED, published_unet

WORDS = {  # last words -> tensor
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_A.default.weight": "A",
    "lora_B.my_adapter.weight": "B",
    "lora_down.weight": "A",
    "lora_up.weight": "B",
    "lora_mid.weight": "mid",
    "lora.down.weight": "A",
    "lora.up.weight": "B",
    "lora_linear_layer.up.weight": "B",
    "alpha": "alpha",
}
FIRST = {  # network -> first words that lead to it
    "unet": ["", *(p for p, (c, _) in PREFIXES.items() if c in (None, "unet")), "unet.base_model.model."],
    "text_encoder": ["", *(p for p, (c, _) in PREFIXES.items() if c in (None, "text_encoder"))],
    "text_encoder_2": [p for p, (c, _) in PREFIXES.items() if c == "text_encoder_2"],
}
FIRST["unet"].remove("text_encoders.")
Q = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q"


@pytest.fixture(scope="module")
def layers():
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        nets = {kind: published_unet(kind) for kind in PUBLISHED}
        text = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig())
    found = {
        k: [n for n, m in net.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        for k, net in nets.items()
    }
    found["text"] = [n for n, m in text.named_modules() if isinstance(m, nn.Linear)]
    assert [len(found[k]) for k in ("sd15", "sd21", "sdxl")] == [282, 282, 794] and len(found["text"]) == 73
    return found


def styles(name, network):
    "The styles in which files name a layer."
    yield name
    yield name.replace(".", "_")
    if network == "unet":
        yield to_sgm(name)
        yield to_sgm(name).replace(".", "_")
    elif name.startswith("text_model."):
        yield name.removeprefix("text_model.")
    if ".to_" in name:
        yield name.replace(".to_", ".processor.to_")


@pytest.mark.parametrize("network", FIRST)
def test_every_combination_leads_to_the_layer(network, layers):
    "A thousand and more: each first word, with each style, with each last word."
    text = ["text_model.encoder.layers.3.self_attn.out_proj", "text_model.encoder.layers.0.mlp.fc1"]
    names = [
        Q,
        "up_blocks.1.resnets.2.conv_shortcut",
        "mid_block.attentions.0.proj_in",
        Q.replace("to_q", "to_out.0"),
    ]
    names, seen = names if network == "unet" else text, 0
    for name, first, (word, tensor) in itertools.product(names, FIRST[network], WORDS.items()):
        for style in styles(name, network):
            found = parse_key(f"{first}{style}.{word}")
            assert found, (first, style, word)
            assert found[1:] == (name if network == "unet" else f"{network}.{name}", tensor), (
                first,
                style,
                word,
            )
            seen += 1
    assert seen >= 64 and (network != "unet" or seen > 1000)


@pytest.mark.parametrize("kind", ["sd15", "sd21", "sdxl", "text"])
def test_every_layer_of_the_real_models_is_known_in_every_style(kind, layers):
    network = "text_encoder_2" if kind == "text" else "unet"
    for name in layers[kind]:
        full = name if network == "unet" or name.startswith("text_") else f"text_model.{name}"
        for style in styles(full, network):
            found = parse_key(f"{network}.{style}.lora_A.weight")
            assert found and found[1] == (full if network == "unet" else f"{network}.{full}"), (name, style)


@pytest.mark.parametrize(
    "key, reason",
    [
        ("banana.split.lora_A.weight", "no base has such a layer"),
        ("unet.banana.split.lora_A.weight", "no base has such a layer in its unet"),
        ("unet.text_model.encoder.layers.0.mlp.fc1.lora_A.weight", "no base has such a layer in its unet"),
        (f"text_encoder.{Q}.lora_A.weight", "no base has such a layer in its text_encoder"),
        (
            "down_blocks.1.attn2.to_q.lora_A.weight",
            "no base has such a layer",
        ),  # a step of the way is missing
        ("input_blocks.4.2.in_layers.2.lora_A.weight", "no base has such a layer"),  # no third place there
        ("input_blocks.70.1.proj_in.lora_A.weight", "no base has such a layer"),
        ("middle_block.7.in_layers.2.alpha", "no base has such a layer"),
        (f"clip_l.unet.{Q}.lora_A.weight", ""),  # two networks
        (f"unet.{Q}.lora_C.weight", ""),
        (f"unet.{Q}.lora_B.bias", ""),
        (f"{Q}.weight", ""),
        ("bundle_emb.mine.clip_l", "the embedding of the word 'mine'"),
    ],
)
def test_what_no_base_has_is_named_and_never_a_layer_of_the_unet(key, reason):
    assert parse_key(key) is None and why_not(key).startswith(reason) and bool(why_not(key)) == bool(reason)


def write(path, *names, width=4):
    tensors = {}
    for n in names:
        tensors |= {f"{n}.lora_A.weight": torch.ones(2, width), f"{n}.lora_B.weight": torch.ones(width, 2)}
    save_file(tensors, path)
    return path


def test_a_foreign_layer_stops_every_command_and_is_not_written_on(tmp_path, capsys):
    file, out = write(tmp_path / "b.safetensors", f"unet.{Q}", "banana.split"), tmp_path / "out.safetensors"
    for words in (["convert", file, out], ["merge", file, "--out", out], ["resize", file, "--out", out]):
        assert main([str(w) for w in words]) == 1
        said = capsys.readouterr().err
        assert "'banana.split.lora_A.weight' (no base has such a layer" in said and said.count("\n") == 1
        assert not out.exists()
    assert main(["convert", str(file), str(out), "--skip-unknown"]) == 0
    assert "left out: banana.split.lora_A.weight" in capsys.readouterr().out
    assert sorted(load_file(out)) == [f"unet.{Q}.lora_A.weight", f"unet.{Q}.lora_B.weight"]


def test_a_file_of_three_tools_arrives_whole(tmp_path):
    a, b = (
        write(tmp_path / "a.safetensors", f"diffusion_model.{to_sgm(Q)}"),
        load_file(tmp_path / "a.safetensors"),
    )
    other = Q.replace("to_q", "to_k")
    b |= {f"lora_unet_{other.replace('.', '_')}.lora_{w}.weight": torch.ones(2, 2) for w in ("down", "up")}
    b |= {
        f"clip_g.text_model.encoder.layers.0.mlp.fc1.lora.{w}.weight": torch.ones(2, 2)
        for w in ("down", "up")
    }
    save_file(b, a)
    got = read_adapter(a)
    assert set(got.state) == {Q, other, "text_encoder_2.text_model.encoder.layers.0.mlp.fc1"}
    assert got.layout == "comfyui+kohya+old" and not got.unread
