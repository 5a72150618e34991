"""Numbers that are none stop at the door: files, bases, number formats, the last update, sampled latents, the command line."""

import math
from inspect import signature
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file, save_file

from stylelora.adapters.files import read_adapter, save_adapter
from stylelora.adapters.lora import delta_of, find_targets
from stylelora.apps.cli import COMMANDS, dashes, main
from stylelora.apps.options import flat
from stylelora.core import generator, read_json, write_json
from stylelora.models.base import tiny_base
from stylelora.models.load import load_base, save_base

Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"  # of the tiny base


def fails(capsys, *words):
    "Run a command that must refuse in one line."
    assert main([str(w) for w in words]) in (1, 2)
    said = capsys.readouterr().err
    lines = [
        line for line in said.splitlines() if line and "step/s" not in line
    ]  # progress of a walk that broke
    assert len(lines) == 1 and lines[0].startswith("stylelora: "), said
    return lines[0]


def layer(n=Q, b=1.0):
    W, g = tiny_base().unet.get_submodule(n).weight, generator("finite", n)
    B = torch.randn(len(W), 2, generator=g) * b
    return dict(A=torch.randn(2, W.shape[1], generator=g), B=B, alpha=1.0)


@pytest.fixture
def broken(tmp_path):
    "An adapter with one number that is none, as other tools would write it."
    file = save_adapter({Q: layer()}, tmp_path / "good.safetensors")
    tensors = load_file(file)
    tensors[f"unet.{Q}.lora_B.weight"][0, 0] = math.nan
    save_file(tensors, tmp_path / "nan.safetensors")
    return tmp_path / "nan.safetensors"


def test_every_command_that_reads_a_broken_adapter_names_file_and_tensor(broken, tmp_path, capsys):
    out, model = tmp_path / "out.safetensors", tmp_path / "model"
    for words in (
        ("inspect", broken),
        ("convert", broken, out),
        ("convert", broken, out, "--to", "kohya", "--skip-unknown"),
        ("resize", broken, "--out", out),
        ("merge", broken, "--out", out),
        ("merge", broken, "--into", "tiny", "--out", model),
        ("sample", "x", "--base", "tiny", "--lora", broken, "--out", tmp_path / "g.png"),
    ):
        said = fails(capsys, *words)
        assert "nan.safetensors: 1 of" in said and f"'unet.{Q}.lora_B.weight' are not finite" in said, said
        assert "lower rate" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["good.safetensors", "nan.safetensors"]


@pytest.mark.parametrize(
    "b, dtype", [(1e-9, "float16"), (1e6, "float16"), (1e-9, "bfloat16"), (1e30, "float32")]
)
@pytest.mark.parametrize("layout", ["diffusers", "kohya", "peft"])
def test_an_update_survives_a_small_number_format(b, dtype, layout, tmp_path):
    state, out = {Q: layer(b=b)}, tmp_path / ("p" if layout == "peft" else "x.safetensors")
    got = read_adapter(save_adapter(state, out, layout, dtype=dtype)).state[Q]
    want = delta_of(state[Q])
    limit = {"float16": 2e-3, "bfloat16": 1e-2, "float32": 1e-6}[dtype]
    assert (delta_of(got) - want).norm() < limit * want.norm() and got["B"].abs().max() > 0


def test_what_no_scaling_saves_is_refused_and_not_written(tmp_path, capsys):
    file = save_adapter({Q: dict(layer(b=1e-9), A=layer()["A"] * 1e-9)}, tmp_path / "a.safetensors")
    said = fails(capsys, "convert", file, tmp_path / "out.safetensors", "--dtype", "float16")
    assert f"out.safetensors: {Q}.A would lose 100% in float16; write bfloat16 or float32" in said
    assert not (tmp_path / "out.safetensors").exists()


def test_a_file_that_needs_no_scaling_has_the_same_tensors(tmp_path):
    s = layer()
    tensors = load_file(save_adapter({Q: s}, tmp_path / "a.safetensors", dtype="float16"))
    assert all(torch.equal(tensors[f"unet.{Q}.lora_{w}.weight"], s[w].half()) for w in "AB")


def test_merging_into_half_precision_refuses_an_overflow(tmp_path, capsys):
    file = save_adapter({Q: layer(b=1e5)}, tmp_path / "a.safetensors")
    words = ("merge", file, "--into", "tiny", "--out", tmp_path / "m", "--dtype", "float16")
    said = fails(capsys, *words)
    assert (
        "unet in float16" in said and f"{Q}.weight' are not finite" in said and not (tmp_path / "m").exists()
    )


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_base_with_a_number_that_is_none_is_named(part, tmp_path, capsys):
    folder = save_base(tiny_base(), tmp_path / "base", "float32")
    file = next((folder / part).glob("*.safetensors"))
    tensors = load_file(file)
    name = next(k for k, v in tensors.items() if v.is_floating_point())
    tensors[name].view(-1)[0] = math.inf
    save_file(tensors, file, metadata={"format": "pt"})
    said = fails(capsys, "sample", "x", "--base", folder, "--out", tmp_path / "g.png")
    assert f"{part}: 1 of" in said and "are not finite" in said and "fetch it again" in said
    assert not (tmp_path / "g.png").exists()


@pytest.mark.parametrize("odd", [0.0, "NaN"])
def test_a_scaling_factor_of_zero_or_none_is_named(odd, tmp_path):
    from tests.models.test_single_file import made

    folder = save_base(made(), tmp_path / "base", "float32")
    write_json(
        folder / "vae" / "config.json", read_json(folder / "vae" / "config.json") | dict(scaling_factor=1.5)
    )
    text = (folder / "vae" / "config.json").read_text().replace("1.5", str(odd))
    (folder / "vae" / "config.json").write_text(text)
    with pytest.raises(ValueError, match="scaling_factor=(0.0|nan) in vae/config.json; it is 0.18215"):
        load_base(folder, "cpu")


def test_a_strength_that_breaks_the_sampler_is_told_and_nothing_is_drawn(tmp_path, capsys):
    state = {n: layer(n) for n in find_targets(tiny_base().unet, "attention")}
    file, out = save_adapter(state, tmp_path / "a.safetensors"), tmp_path / "g.png"
    words = ("sample", "x", "--base", "tiny", "--num-inference-steps", 2, "--n", 1, "--out", out)
    for more in (("--lora", file, "--lora-scale", 1e30), ("--guidance-scale", 1e30)):
        said = fails(capsys, *words, *more)
        assert "are not finite" in said and "lower guidance_scale or the strength of the adapter" in said
        assert not out.exists()


def options():
    "List all options of all commands that take a number with a fraction, or a text of numbers."
    found = []
    for commands in COMMANDS.values():
        for name, run in commands.items():
            for p in signature(flat(run)).parameters.values():
                kind = get_args(p.annotation)[0]
                if kind is float or p.name == "weights":
                    found.append((name, "--" + dashes(p.name)))
    return found


def test_there_are_options_to_be_tried():
    assert {
        ("sample", "--lora-scale"),
        ("sample", "--eta"),
        ("train", "--lr"),
        ("merge", "--weights"),
    } <= set(options())


@pytest.mark.parametrize("command, option", options())
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999"])
def test_numbers_on_the_command_line_are_finite(command, option, value, tmp_path, capsys, broken):
    words = dict(sample=["x", "--base", "tiny"], train=[tmp_path, "--base", "tiny"], merge=[broken])[command]
    said = fails(capsys, command, *words, "--out", tmp_path / "o.safetensors", f"{option}={value}")
    assert "finite" in said or f"for '{option}': Input should be" in said, said
    assert not (tmp_path / "o.safetensors").exists()


@pytest.mark.parametrize("value", [".nan", ".inf", "1e999"])
def test_so_are_the_numbers_in_other_parameters(value, tmp_path, capsys):
    said = fails(capsys, "train", tmp_path, "--base", "tiny", "--set", f"ema={value}")
    assert "ema=" in said
