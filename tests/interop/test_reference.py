"""Do the reference implementations see what they should: a wrong scale, a missing layer, a layer too many?"""

import json

import pytest
import torch

from stylelora.adapters.files import load_components, read_adapter, save_adapter
from stylelora.adapters.keys import split_components
from stylelora.adapters.lora import find_targets, remove

from .reference import (
    BASES,
    by_formula,
    clone,
    compare,
    draw,
    our_updates,
    random_adapter,
    read_by_diffusers,
    reference_adapter,
    reference_updates,
    tensors_of,
    tiny_networks,
    write_converted,
    write_diffusers,
    write_peft,
)


@pytest.fixture(scope="module")
def peft():
    pytest.importorskip("diffusers")
    return pytest.importorskip("peft")


@pytest.fixture(scope="module")
def pipe(peft):
    return BASES["sd15"]()


@pytest.fixture(scope="module")
def state(pipe):
    return random_adapter(pipe)


@pytest.fixture(scope="module")
def written(state, tmp_path_factory):
    "A kohya file of ours, text encoder included."
    return save_adapter(state, tmp_path_factory.mktemp("written") / "k.safetensors", "kohya")


@pytest.fixture(scope="module")
def read(peft, pipe, written):
    "A copy of the pipeline into which diffusers has loaded that file."
    copy = fresh(pipe)
    read_by_diffusers(copy, written, peft)
    return copy


def fresh(pipe):
    return clone(type(pipe), pipe.components)


# ---------------------------------------------------------------- the models


def test_the_random_networks_are_always_the_same():
    one, two = (tiny_networks(False)["unet"].state_dict() for _ in range(2))
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert list(tiny_networks(True))[-1] == "text_encoder_2"


def test_the_random_models_have_the_layers_of_the_real_ones(pipe):
    "With all targets, an adapter of Stable Diffusion 1.5 has 278 layers, of which 128 are attention."
    xl = BASES["sdxl"]()
    targets = ("attention", "attention_ff", "conv")
    assert [len(find_targets(pipe.unet, t)) for t in targets] == [128, 192, 278]
    assert hasattr(xl.text_encoder_2, "text_model") and hasattr(xl.unet, "add_embedding")
    assert len(split_components(random_adapter(xl))) == 3


def test_the_model_of_the_package_is_a_pipeline(peft):
    embedded = BASES["embedded"]()
    assert {p.dtype for p in embedded.unet.parameters()} == {torch.float32}
    assert embedded.unet is not fresh(embedded).unet


def test_the_adapter_is_hard_to_read(pipe, state):
    assert [len(s) for s in split_components(state).values()] == [278, 2 * 6]
    assert {len(s["A"]) for s in state.values()} == {1, 2, 3}
    assert len({s["alpha"] / len(s["A"]) for s in state.values()}) > 6
    assert len(random_adapter(pipe, ["unet"])) == 278


def test_the_adapter_changes_the_picture_and_goes_without_a_trace(pipe, state):
    copy = fresh(pipe)
    bare = draw(copy)
    assert torch.equal(draw(copy), bare) and bare.shape == (16, 16, 3)
    load_components(copy, state)
    assert (draw(copy) - bare).abs().max() > 0.05
    for network in (copy.unet, copy.text_encoder):
        remove(network)
    assert torch.equal(draw(copy), bare)


# ---------------------------------------------------------------- what arrived


def test_absence_is_an_error():
    "A layer that one side lacks has no update there, so the whole update of the other side is the error."
    one = dict(a=torch.tensor([1.0, 2.0]), b=torch.tensor([4.0]))
    assert compare(one, one) == dict(layers=2, found=2, error=0.0)
    assert compare(one, dict(a=one["a"], b=one["b"] + 1)) == dict(layers=2, found=2, error=0.25)
    assert compare(one, dict(a=one["a"])) == dict(layers=2, found=1, error=1.0)
    assert compare(one, one | dict(c=one["a"])) == dict(layers=2, found=3, error=0.5)


def test_a_bare_pipeline_holds_nothing(pipe):
    assert reference_updates(pipe) == {}


def test_diffusers_holds_what_we_meant(state, read):
    numbers = compare(our_updates(state), reference_updates(read))
    assert [numbers["layers"], numbers["found"]] == [290, 290] and numbers["error"] < 1e-6, numbers


def test_the_file_is_right_by_its_formula(pipe, state, written):
    numbers = compare(our_updates(state), by_formula(pipe, written))
    assert numbers["found"] == 290 and numbers["error"] < 1e-6, numbers


def test_one_wrong_scale_and_one_missing_layer_are_seen(state, read):
    "Neither would be noticed by somebody who only looks at the pictures."
    n, wrong = "mid_block.attentions.0.proj_in", dict(state)
    wrong[n] = wrong[n] | dict(alpha=2 * wrong[n]["alpha"])
    assert compare(our_updates(wrong), reference_updates(read))["error"] > 0.01
    del wrong[n]
    assert compare(our_updates(wrong), reference_updates(read))["error"] > 0.01


# ---------------------------------------------------------------- writing


def test_peft_makes_an_adapter_of_several_ranks(peft, pipe):
    copy = fresh(pipe)
    made = reference_adapter(copy, peft, 6, True)
    truth, tensors = reference_updates(copy), tensors_of(made, peft)
    assert list(made) == ["unet", "text_encoder"]
    ranks = {m.r["default"] for m in copy.unet.modules() if hasattr(m, "get_delta_weight")}
    assert ranks == {2, 4}
    assert sum(map(len, tensors.values())) == 2 * len(truth)
    assert all(k.endswith(("lora_A.weight", "lora_B.weight")) for k in tensors["unet"])


def test_a_file_of_diffusers_with_patterns_arrives(peft, pipe, tmp_path):
    copy = fresh(pipe)
    made = reference_adapter(copy, peft, 6, True)
    truth = reference_updates(copy)
    got = read_adapter(write_diffusers(copy, made, tmp_path, peft))
    numbers = compare(truth, our_updates(got.state))
    assert numbers["found"] == len(truth) and numbers["error"] < 1e-6, numbers
    assert "unet.rank_pattern" in json.loads(got.metadata["lora_adapter_metadata"])


WAYS = [
    (write_diffusers, {}, "diffusers"),
    (write_diffusers, dict(old=True), "old"),
    (write_converted, {}, "kohya"),
    (write_converted, dict(oldest=True), "old"),
    (write_peft, {}, "peft"),
]


@pytest.mark.parametrize("write, options, key_format", WAYS)
def test_files_of_others_arrive_whole(peft, pipe, tmp_path, write, options, key_format):
    copy = fresh(pipe)
    made = reference_adapter(copy, peft, 4, False)
    truth = reference_updates(copy)
    got = read_adapter(write(copy, made, tmp_path, peft, **options))
    numbers = compare(truth, our_updates(got.state))
    assert key_format in got.layout.split("+") and numbers["found"] == len(truth), (got.layout, numbers)
    assert numbers["error"] < 1e-6, numbers
