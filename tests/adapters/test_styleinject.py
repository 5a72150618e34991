"""StyleInject among the other adapters: files, other processes, everything that must refuse it, a training that is killed.

The layers themselves are held against a naive loop in the notebook.
"""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from stylelora.adapters.active import Adapters
from stylelora.adapters.bases import melt
from stylelora.adapters.crew import crew_layer
from stylelora.adapters.files import load_adapter, read_adapter, save_adapter, save_lora
from stylelora.adapters.inspect import describe_file
from stylelora.adapters.lora import inject, lora_layers, lora_state, merge, set_scale
from stylelora.adapters.merge import blend, convert_file, merge_files, resize_file
from stylelora.core import generator
from stylelora.models.base import encode_text, tiny_base
from stylelora.train.checkpoint import describe
from stylelora.train.loop import plain_objective, train
from stylelora.train.step import make_config
from tests.train.test_faults import ADAPTER, CHECKPOINT, STEPS, run

ROOT = Path(__file__).resolve().parents[2]
HOW = dict(kind="styleinject", num_experts=3)


def shaken(base):
    "Put an adapter with random numbers into the U-Net of a base."
    inject(base.unet, [r"attn[12]\.to_[qv]$", r"\.conv1$"], rank=2, lora_alpha=3, **HOW)
    dice = generator("shaken")
    for m in lora_layers(base.unet).values():
        for p in m.own.values():
            p.data.normal_(std=0.2, generator=dice)
    return base


def answer(base):
    g = generator("answer")
    text = torch.randn(2, 5, base.unet.config.cross_attention_dim, generator=g)
    z = torch.randn(2, *base.latent_shape, generator=g)
    with torch.no_grad():
        return base.unet(z, torch.tensor([10, 900]), encoder_hidden_states=text).sample


@pytest.fixture(scope="module")
def base():
    return shaken(tiny_base())


@pytest.fixture(scope="module")
def file(base, tmp_path_factory):
    path = tmp_path_factory.mktemp("styleinject") / "a.safetensors"
    return save_lora(base.unet, path, dict(style="ink"))


def test_the_file_has_words_of_its_own_a_manifest_and_brings_everything_back(base, file):
    with safe_open(file, "pt") as f:
        keys, texts = list(f.keys()), f.metadata()
    words = {k.rsplit(".", 2)[1] for k in keys}
    assert words == {f"styleinject_{w}" for w in ("down", "up", "router", "hyper", "gain")}
    assert json.loads(texts["stylelora_manifest"]) == dict(style="ink")
    got, twin = read_adapter(file), tiny_base()
    assert (got.layout, got.manifest, got.unread) == ("styleinject", dict(style="ink"), ())
    for n, s in lora_state(base.unet).items():
        assert s.keys() == got.state[n].keys() and s["alpha"] == got.state[n]["alpha"] == 3.0
        assert all(torch.equal(v, got.state[n][w]) for w, v in s.items() if torch.is_tensor(v)), n
    load_adapter(twin, file)
    assert torch.equal(answer(twin), answer(base))
    assert {m.parts for n, m in lora_layers(twin.unet).items() if n.endswith("to_v")} == {"lora"}
    assert (
        save_lora(twin.unet, file.with_name("b.safetensors"), dict(style="ink")).read_bytes()
        == file.read_bytes()
    )


def test_another_process_reads_it_without_being_told_what_it_is(base, file):
    code = f"""
from stylelora.adapters.files import load_adapter
from stylelora.models.base import tiny_base
from tests.adapters.test_styleinject import answer
base = tiny_base()
load_adapter(base, {str(file)!r}, 0.5)
print(answer(base).double().norm().item())
"""
    call = dict(capture_output=True, text=True, check=True, cwd=ROOT)
    said = subprocess.run([sys.executable, "-c", code], **call).stdout
    set_scale(base.unet, 0.5)
    assert float(said) == pytest.approx(answer(base).double().norm().item(), rel=1e-6)
    set_scale(base.unet, 1.0)


def test_half_precision_in_the_file(base, file):
    small = save_lora(base.unet, file.with_name("half.safetensors"), dtype="float16")
    twin = tiny_base()
    load_adapter(twin, small)
    assert torch.allclose(answer(twin), answer(base), atol=0.02)
    assert small.stat().st_size < 0.8 * file.stat().st_size


def test_inspect_names_it_and_invents_no_size(file):
    said = describe_file(file)
    assert "StyleInject linear" in said and "StyleInject conv 3x3" in said and "style: ink" in said
    assert "rank        2 " in said and "alpha       3 " in said and "base or input" in said
    assert "nan" not in said


def test_what_would_merge_it_says_no_by_name_and_changes_nothing(base, file, tmp_path):
    state, before = read_adapter(file).state, answer(base)
    out = tmp_path / "out.safetensors"
    with pytest.raises(ValueError, match="StyleInject cannot be merged into a weight"):
        merge(base.unet)
    for call in (
        lambda: blend([state], [0.5]),
        lambda: merge_files([file, file], [0.5, 0.5], out),
        lambda: resize_file(file, 1, out),
    ):
        with pytest.raises(
            ValueError, match="StyleInject of adapter 0 is no low-rank update.*cannot be merged"
        ):
            call()
    for layout, place in (("diffusers", out), ("kohya", out), ("peft", tmp_path / "folder")):
        with pytest.raises(ValueError, match=f"a StyleInject has no place in the layout '{layout}'"):
            convert_file(file, place, layout)
    assert not list(tmp_path.iterdir()) and torch.equal(answer(base), before)


def test_melting_several_into_a_base_stops_before_the_first(base):
    fresh, other = tiny_base(), tiny_base()
    bits = {k: v.clone() for k, v in fresh.unet.state_dict().items()}
    inject(other.unet, r"to_k$", rank=2)
    for m in lora_layers(other.unet).values():
        torch.nn.init.ones_(m.lora_B)
    with pytest.raises(ValueError, match="StyleInject cannot be merged into a weight"):
        melt(fresh, [lora_state(other.unet), lora_state(base.unet)], [1.0, 1.0])
    assert all(torch.equal(v, bits[k]) for k, v in fresh.unet.state_dict().items())


def test_on_a_shelf_it_is_worn_alone_at_full_weight_and_in_no_crew(base, file):
    bare = tiny_base()
    shelf = Adapters(bare)
    shelf.add("ink", file)
    shelf.set_adapters("ink")
    assert torch.equal(answer(bare), answer(base))
    with pytest.raises(ValueError, match="StyleInject of adapter 0"):
        shelf.set_adapters("ink", 0.5)
    with pytest.raises(ValueError, match="a crew needs LoRA.*StyleInjectLinear"):
        crew_layer([m for n, m in lora_layers(base.unet).items() if n.endswith("to_q")][:1])


@pytest.mark.parametrize(
    "change, part",
    [
        (lambda t, k: t.pop(k["gain"]), "StyleInject do not multiply"),
        (lambda t, k: t.pop(k["up"]), "lacks one of its matrices"),
        (lambda t, k: t.update({k["router"]: torch.ones(2, 3)}), "StyleInject do not multiply"),
        (lambda t, k: t.update({k["hyper"]: torch.full_like(t[k["hyper"]], float("nan"))}), "finite|nan"),
        (
            lambda t, k: t.update({k["up"].replace("styleinject_up", "lora_B"): torch.ones(4, 2)}),
            "tensor 'B' of another",
        ),
    ],
)
def test_a_damaged_file_is_refused(file, tmp_path, change, part):
    tensors = load_file(file)
    first = next(k for k in tensors if k.endswith("styleinject_router.weight")).removesuffix("router.weight")
    change(tensors, {w: f"{first}{w}.weight" for w in ("up", "router", "hyper", "gain")})
    save_file(tensors, bad := tmp_path / "bad.safetensors", read_adapter(file).metadata)
    with pytest.raises(ValueError, match=part):
        read_adapter(bad)


def test_a_program_that_knows_only_lora_takes_none_of_it(file):
    loaders = pytest.importorskip("diffusers.loaders")
    pytest.importorskip("peft")
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        loaders.StableDiffusionLoraLoaderMixin().load_lora_weights(str(file.parent), weight_name=file.name)


def test_a_lora_has_no_place_in_its_layout(tmp_path):
    base = tiny_base()
    inject(base.unet, "cross_attention", rank=1)
    with pytest.raises(ValueError, match="a LoRA has no place in the layout 'styleinject'"):
        save_adapter(lora_state(base.unet), tmp_path / "x.safetensors", "styleinject")
    with pytest.raises(ValueError, match="layout='style'; use one of diffusers, kohya, peft"):
        save_adapter(lora_state(base.unet), tmp_path / "x.safetensors", "style")


# ---------------------------------------------------------------------------------- training


def data_of(base):
    return torch.randn(4, 4, 8, 8, generator=generator("pictures")), encode_text(base, list("abcd"))


@pytest.mark.parametrize("how", [HOW, dict(HOW, parts="dma"), dict(HOW, num_experts=1, parts="sta")], ids=str)
def test_it_trains_in_every_variant_and_everything_has_moved(how, tmp_path):
    base = tiny_base()
    config = make_config(
        train_steps=3, batch_size=2, lr=1e-2, rank=2, target_modules="self_attention", val_every=0,
        lora_dropout=0.1, ema=0.5, mixed_precision="bfloat16", gradient_checkpointing=True, **how,
    )  # fmt: skip
    history = train(base, *data_of(base), config=config, out=tmp_path / "a.safetensors", progress=False)
    assert history.loss.notna().all() and len(history) == 3
    got = read_adapter(tmp_path / "a.safetensors")
    assert {k: got.manifest[k] for k in how} == how
    for n, s in got.state.items():
        still = {w for w, v in s.items() if torch.is_tensor(v) and not v.any()}
        assert still == ({"router"} if "hyper" in s and how["num_experts"] == 1 else set()), n


def test_killed_it_ends_with_the_same_bytes(tmp_path):
    how = dict(HOW, lr=1e-2)
    status, said = run(tmp_path / "whole", **how)
    assert status == 0, said
    assert run(tmp_path / "twice", 5, "kill", **how)[0] == -signal.SIGKILL
    assert (tmp_path / "twice" / CHECKPOINT).exists()
    status, said = run(tmp_path / "twice", **how)
    assert status == 0 and f"step {STEPS}\n" in said and "step 3\n" not in said, said
    assert (tmp_path / "twice" / ADAPTER).read_bytes() == (tmp_path / "whole" / ADAPTER).read_bytes()
    assert read_adapter(tmp_path / "whole" / ADAPTER).layout == "styleinject"


def test_a_lora_is_described_as_before_there_were_kinds():
    base, told = tiny_base(), []
    for how in ({}, dict(HOW)):
        told.append(describe(base, *data_of(base), plain_objective(base), make_config(**how)))
    assert not {"kind", "num_experts", "parts"} & set(told[0])
    assert told[1] == told[0] | HOW | dict(parts="both")


def test_it_starts_afresh(base, tmp_path):
    bare = tiny_base()
    with pytest.raises(ValueError, match="start from is StyleInject, not LoRA; start afresh"):
        train(
            bare, *data_of(bare), config=make_config(target_modules="attention"), init=lora_state(base.unet)
        )
    inject(lora := tiny_base().unet, "attention")
    with pytest.raises(ValueError, match="kind='styleinject' starts afresh; leave init out"):
        train(
            bare, *data_of(bare), config=make_config(target_modules="attention", **HOW), init=lora_state(lora)
        )
