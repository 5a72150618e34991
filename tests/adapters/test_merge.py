"""Several adapters at once, held against PEFT's mixtures and against `set_adapters` of diffusers.

The notebooks test mixtures against full matrices. Here the same adapters go into the reference implementations. One that is
not installed skips its tests.
"""

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from stylelora.adapters.active import Adapters
from stylelora.adapters.files import save_adapter, save_lora
from stylelora.adapters.lora import delta_of, find_targets
from stylelora.adapters.merge import average_factors, blend, compress
from stylelora.core import generator
from stylelora.models.base import tiny_base
from stylelora.sample.generate import generate
from tests.sample.test_parity import draw, pipeline

WEIGHTS = [(0.3, 0.8), (1.0, -0.5), (-2.0, 0.0), (0.5, 0.5)]


@pytest.fixture(scope="session")
def peft():
    return pytest.importorskip("peft")


@pytest.fixture(scope="session")
def diffusers():
    return pytest.importorskip("diffusers")


def close(a, b, eps):
    assert a.shape == b.shape
    assert (a.double() - b.double()).abs().max().item() <= eps, (a.double() - b.double()).abs().max().item()


class Net(nn.Module):
    "A linear layer and two kinds of convolutions, as in a U-Net."

    def __init__(self):
        super().__init__()
        self.to_q, self.conv1 = nn.Linear(12, 10), nn.Conv2d(4, 6, 3, padding=1)
        self.proj_in = nn.Conv2d(6, 9, 1)

    def forward(self, x):
        return x


def random_state(model, names, rank, alpha, seed, size=0.3):
    "Make an adapter with random numbers for the named layers of a model."
    g, state = generator(seed), {}
    for n in names:
        d, *k = model.get_submodule(n).weight.shape
        state[n] = dict(
            A=torch.randn(rank, *k, generator=g),
            alpha=float(alpha),
            B=torch.randn(d, rank, *[1] * (len(k) - 1), generator=g) * size,
        )
    return state


def put(peft, model, name, state, add=None):
    "Give a state to PEFT under a name; `add` is the function that creates the empty adapter."
    first = next(iter(state.values()))
    config = peft.LoraConfig(r=len(first["A"]), lora_alpha=first["alpha"], target_modules=list(state))
    if add is None:
        peft.inject_adapter_in_model(config, model, adapter_name=name)
    else:
        add(name, config)
    with torch.no_grad():
        for n, m in model.named_modules():
            key = next((k for k in state if n == k or n.endswith("." + k)), None)
            if key and hasattr(m, "lora_A") and name in m.lora_A:
                m.lora_A[name].weight.copy_(state[key]["A"])
                m.lora_B[name].weight.copy_(state[key]["B"])


def peft_mix(peft, net, states, weights, kind, **kw):
    "Mix two adapters with PEFT; layer name -> update of the weight."
    first = states[0]
    config = peft.LoraConfig(
        r=len(first["to_q"]["A"]), lora_alpha=first["to_q"]["alpha"], target_modules=list(first)
    )
    model = peft.get_peft_model(copy.deepcopy(net), config, adapter_name="0")
    for i, state in enumerate(states):
        put(peft, model, str(i), state, model.add_adapter if i else lambda *_: None)
    model.add_weighted_adapter(
        [str(i) for i in range(len(states))], list(weights), "mix", combination_type=kind, **kw
    )
    layers = {
        n.removeprefix("base_model.model."): m for n, m in model.named_modules() if hasattr(m, "base_layer")
    }
    return {n: m.get_delta_weight("mix") for n, m in layers.items()}


@pytest.mark.parametrize("weights", WEIGHTS)
def test_blend_is_pefts_cat(peft, weights):
    "Concatenation is exact in PEFT too, at different ranks and scales."
    net = Net()
    states = [random_state(net, ["to_q", "conv1", "proj_in"], r, a, r) for r, a in ((2, 3), (4, 1))]
    theirs, ours = peft_mix(peft, net, states, weights, "cat"), blend(states, weights)
    assert set(theirs) == set(ours)
    for n in ours:
        close(delta_of(ours[n]), theirs[n], 1e-5)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_compress_is_pefts_svd(peft, weights):
    "PEFT decomposes full matrices; the update at the lower rank is the same."
    net = Net()
    states = [random_state(net, ["to_q", "conv1", "proj_in"], r, a, r) for r, a in ((2, 3), (4, 1))]
    theirs = peft_mix(peft, net, states, weights, "svd", svd_rank=3)
    ours = compress(blend(states, weights), 3).state
    for n in ours:
        close(delta_of(ours[n]), theirs[n].reshape(delta_of(ours[n]).shape), 2e-5)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_average_is_pefts_linear(peft, weights):
    "The naive average is PEFT's, and its distance from the exact sum is the error that we report."
    net = Net()
    states = [random_state(net, ["to_q", "conv1", "proj_in"], 3, a, a) for a in (3, 5)]
    theirs, fit = peft_mix(peft, net, states, weights, "linear"), average_factors(states, weights)
    exact = blend(states, weights)
    for row in fit.table.itertuples():
        close(delta_of(fit.state[row.module]), theirs[row.module], 1e-5)
        off = (theirs[row.module].double() - delta_of(exact[row.module])).norm().item()
        assert abs(off - row.error) < 1e-4
    assert fit.error > 0.1 or 0.0 in weights


def test_layers_that_one_adapter_lacks(peft):
    "PEFT too takes a missing layer for zero."
    net = Net()
    states = [
        random_state(net, ["to_q", "conv1"], 2, 3, "a"),
        random_state(net, ["to_q", "proj_in"], 2, 3, "b"),
    ]
    theirs, ours = peft_mix(peft, net, states, (0.4, 0.9), "cat"), blend(states, (0.4, 0.9))
    assert set(theirs) == set(ours) == {"to_q", "conv1", "proj_in"}
    for n in ours:
        close(delta_of(ours[n]), theirs[n], 1e-5)


# ---------------------------------------------------------------- several adapters in one U-Net

INPUTS = (
    torch.randn(2, 4, 8, 8, generator=generator("x")),
    torch.tensor([20, 700]),
    torch.randn(2, 5, 16, generator=generator("text")),
)


def answer(unet):
    with torch.no_grad():
        return unet(*INPUTS).sample


@pytest.fixture
def pair(peft):
    "A tiny U-Net of diffusers with two adapters in PEFT, the same in ours, and the states."
    theirs, ours = tiny_base().unet, Adapters(tiny_base().unet)
    states = {
        "paper_cut": random_state(theirs, find_targets(theirs, "attention"), 2, 3, "paper", 0.1),
        "pixel_art": random_state(theirs, find_targets(theirs, "attention_ff"), 4, 2, "pixel", 0.1),
    }
    for name, state in states.items():
        put(peft, theirs, name, state, lambda name, config: theirs.add_adapter(config, name))
        ours.add(name, state)
    return theirs, ours


@pytest.mark.parametrize(
    "names, weights",
    [
        ("paper_cut", None),
        (["paper_cut", "pixel_art"], [0.5, 1.0]),
        (["pixel_art", "paper_cut"], [1.5, -0.5]),
        (["pixel_art"], [{"down": 0.2, "mid": 0.7, "up": {"block_1": [0.1, 0.9]}}]),
        (["paper_cut", "pixel_art"], None),
        (["paper_cut", "pixel_art"], [{"down": 0, "mid": 1, "up": 0}, 0.3]),
        (["paper_cut", "pixel_art"], 0.4),
    ],
)
def test_set_adapters_is_diffusers(pair, names, weights):
    "The call that users know, with the same names and weights, gives the same output."
    theirs, ours = pair
    bare = answer(tiny_base().unet)
    theirs.set_adapters(names, weights)
    ours.set_adapters(names, weights)
    close(answer(ours.model), answer(theirs), 1e-5)
    assert (answer(theirs) - bare).abs().max() > 1e-2
    theirs.disable_adapters()
    ours.enable(False)
    assert torch.equal(answer(ours.model), bare) and torch.equal(answer(theirs), bare)
    theirs.enable_adapters()
    ours.enable()
    close(answer(ours.model), answer(theirs), 1e-5)


def test_dropping_an_adapter_is_diffusers(pair):
    theirs, ours = pair
    theirs.set_adapters(["paper_cut", "pixel_art"], [0.5, 1.0])
    ours.set_adapters(["paper_cut", "pixel_art"], [0.5, 1.0])
    theirs.delete_adapters("paper_cut")
    ours.remove("paper_cut")
    close(answer(ours.model), answer(theirs), 1e-5)


def test_a_saved_mixture_is_the_mixture_in_diffusers(diffusers, pair, tmp_path):
    "The mixture, saved as one ordinary file, loads in diffusers and gives the output of both adapters."
    theirs, ours = pair
    theirs.set_adapters(["paper_cut", "pixel_art"], [0.5, 1.0])
    ours.set_adapters(["paper_cut", "pixel_art"], [0.5, 1.0])
    pipe = pipeline(diffusers, tiny_base())
    pipe.load_lora_weights(str(save_lora(ours.model, tmp_path / "mix.safetensors")))
    close(answer(pipe.unet), answer(theirs), 1e-5)


# ---------------------------------------------------------------- files of other tools, text encoders included


def whole_state(base, rank, seed):
    "Make an adapter of U-Net and text encoder, with one alpha, as kohya's scripts make them."
    words = [n for n, m in base.text_encoder.named_modules() if isinstance(m, nn.Linear)]
    state = random_state(base.unet, find_targets(base.unet, "attention"), rank, 3, seed, 0.1)
    text = random_state(base.text_encoder, words, rank, 3, (seed, "text"), 0.1)
    return state | {f"text_encoder.text_model.{n.removeprefix('text_model.')}": s for n, s in text.items()}


def drawn(base):
    return generate(base, "a cat", 0, num_inference_steps=10, guidance_scale=5.0, progress=False).images


def write(state, folder, layout):
    "Write an adapter; 'old' is the key format that diffusers wrote before it had PEFT's layers."
    if layout != "old":
        return save_adapter(state, folder / (layout if layout == "peft" else f"{layout}.safetensors"), layout)
    tensors = load_file(save_adapter(state, folder / "x.safetensors"))
    words = {"lora_A.weight": "lora.down.weight", "lora_B.weight": "lora.up.weight"}
    save_file({k[:-13] + words[k[-13:]]: v for k, v in tensors.items()}, folder / "old.safetensors")
    return folder / "old.safetensors"


@pytest.mark.parametrize("layout", ["kohya", "peft", "old"])
def test_the_same_adapter_in_every_key_format_draws_the_same(tmp_path, layout):
    "Weights and pictures of an added file do not depend on who wrote it."
    shelf, state = Adapters(base := tiny_base()), whole_state(tiny_base(), 3, "paper")
    for name in ("diffusers", layout):
        shelf.add(name, write(state, tmp_path, name))
    bare, pictures = drawn(base), {}
    for name in ("diffusers", layout):
        shelf.set_adapters(name)
        pictures[name] = drawn(base)
    a, b = shelf.states["diffusers"], shelf.states[layout]
    assert set(a) == set(b) and all(torch.equal(a[n][w], b[n][w]) for n in a for w in "AB")
    assert np.array_equal(*pictures.values()) and np.abs(pictures[layout].astype(int) - bare).max() > 1
    shelf.remove()
    assert np.array_equal(drawn(base), bare)


@pytest.mark.parametrize(
    "names, weights",
    [
        ("pixel_art", None),
        (["paper_cut", "pixel_art"], [0.5, 1.0]),
        (["pixel_art", "paper_cut"], [0.7, {"text_encoder": 0.2}]),
    ],
)
def test_files_of_two_tools_are_diffusers(diffusers, peft, tmp_path, names, weights):
    "A file of ours and one of kohya's, added by name to a base and to diffusers' pipeline: the same pictures."
    shelf, pipe = Adapters(base := tiny_base()), pipeline(diffusers, tiny_base())
    for name, layout, rank in (("paper_cut", "diffusers", 2), ("pixel_art", "kohya", 4)):
        file = write(whole_state(base, rank, name), tmp_path, layout)
        shelf.add(name, file)
        pipe.load_lora_weights(str(file), adapter_name=name)
    bare = drawn(base).astype(int)
    shelf.set_adapters(names, weights)
    pipe.set_adapters(names, weights)
    theirs = draw(pipe, ["a cat"], [0])
    assert np.abs(theirs - drawn(base).astype(int)).max() <= 1 and np.abs(theirs - bare).max() > 1
    shelf.enable(False)
    pipe.disable_lora()
    assert np.array_equal(drawn(base), bare) and np.abs(draw(pipe, ["a cat"], [0]) - bare).max() <= 1
