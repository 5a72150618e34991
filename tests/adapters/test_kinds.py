"""Adding a kind of adapter touches two files: its notebook, and one import. Here a test plays that notebook.

The toy kind adds a trainable shift to every weight of a linear layer, `W + shift`, with a shift that is the same for a whole
row. It goes in, trains, travels through a state and files in all layouts, and merges, without a line changed elsewhere.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from stylelora.adapters.files import load_lora, read_adapter, save_lora
from stylelora.adapters.keys import layer_names, parse_key
from stylelora.adapters.lora import (
    ADAPTER_KINDS,
    AdapterKind,
    AdapterLayer,
    delta_of,
    inject,
    load_state,
    lora_layers,
    lora_off,
    lora_state,
    merge,
    register,
    remove,
    set_scale,
    unmerge,
)
from stylelora.adapters.merge import blend
from stylelora.core import generator


class ShiftLinear(AdapterLayer):
    kind = "shift"

    def __init__(self, base, rank=1, lora_alpha=None, dropout=0.0, generator=None):
        super().__init__(base)
        self.shift = nn.Parameter(torch.zeros(base.out_features))

    def delta(self, x):
        return F.linear(x, self.delta_weight())

    def delta_weight(self):
        return self.strength * self.shift[:, None].expand(-1, self.base.in_features)


class Shift(AdapterKind):
    kind = "shift"
    title = "a row shift"
    mergeable = True
    layers = {nn.Linear: ShiftLinear}
    tensors = ("shift",)
    file_keys = {f: dict(shift="row_shift.weight") for f in ("diffusers", "peft", "kohya")}

    def options(s):
        return {}

    def state(layer):
        wide = layer.shift.detach()[:, None].repeat(1, layer.base.in_features)
        return dict(kind="shift", shift=wide, alpha=float(len(wide)))

    def load(layer, s):
        layer.shift.copy_(s["shift"][:, 0])

    def misfit(base, s):
        return "" if s["shift"].shape == base.weight.shape else "the shift does not fit the weight"

    def delta(s):
        return s["shift"].double()

    def assemble(found, alpha):
        return dict(kind="shift", shift=found["shift"].float(), alpha=float(alpha))


@pytest.fixture(autouse=True)
def registered():
    register(Shift)
    yield
    ADAPTER_KINDS.pop("shift")


X = torch.randn(3, 6, generator=generator("x"))


def net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.ModuleDict(dict(to_q=nn.Linear(6, 5), conv1=nn.Conv2d(3, 7, 3)))


NAMES = layer_names(SimpleNamespace(unet=net()))


@pytest.fixture
def trained():
    "A network with the toy kind in its linear layer, after a few steps."
    model = net()
    assert inject(model, "to_q|conv1", kind="shift") == ["to_q"]  # convolutions are none of its layers
    assert torch.equal(model["to_q"](X), net()["to_q"](X))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (model["to_q"](X) - 1).square().mean().backward()
        optimizer.step()
    assert not torch.equal(model["to_q"](X), net()["to_q"](X))
    return model


def test_in_off_weaker_merged_and_out_again(trained):
    bare, on = net()["to_q"](X), trained["to_q"](X).detach()
    with lora_off(trained):
        assert torch.equal(trained["to_q"](X), bare)
    set_scale(trained, 0.0)
    assert torch.equal(trained["to_q"](X), bare)
    set_scale(trained, 1.0)
    merge(trained)
    assert torch.allclose(trained["to_q"](X), on, atol=1e-5)
    unmerge(trained)
    final = copy.deepcopy(trained)
    merge(final, keep=False)
    assert torch.allclose(final["to_q"](X), on, atol=1e-5) and not lora_layers(final)
    assert remove(trained) == ["to_q"] and torch.equal(trained["to_q"](X), bare)


def test_a_state_goes_into_another_model(trained):
    state, other = lora_state(trained), net()
    assert load_state(other, state) == ["to_q"]
    assert torch.equal(other["to_q"](X), trained["to_q"](X))
    assert torch.allclose(delta_of(state["to_q"]).float(), lora_layers(trained)["to_q"].delta_weight())
    with pytest.raises(ValueError, match="to_q: the shift does not fit.*right base"):
        load_state(nn.ModuleDict(dict(to_q=nn.Linear(2, 2))), state)
    with pytest.raises(ValueError, match="no such"):
        load_state(net(), {"conv1": state["to_q"]})


@pytest.mark.parametrize("key", ["unet.to_q.row_shift.weight", "lora_unet_to_q.row_shift.weight"])
def test_its_keys_are_read(key):
    assert parse_key(key, names=NAMES)[1:] == ("to_q", "shift")
    assert parse_key(key) is None  # no base has such a layer


def test_a_file_brings_it_back(trained, tmp_path):
    file, other = save_lora(trained, tmp_path / "a.safetensors", dict(style="toy")), net()
    assert load_lora(other, file) == dict(style="toy")
    assert torch.equal(other["to_q"](X), trained["to_q"](X))
    assert read_adapter(file, names=NAMES).state["to_q"]["kind"] == "shift"


def test_what_it_cannot_do_is_refused(trained):
    state = lora_state(trained)
    with pytest.raises(ValueError, match="a row shift of adapter 0 is no low-rank update"):
        blend([state, state], [1, 1])
    Shift.mergeable = False
    try:
        with pytest.raises(ValueError, match="a row shift cannot be merged"):
            merge(trained)
    finally:
        Shift.mergeable = True


def test_unknown_kinds_are_named():
    with pytest.raises(ValueError, match="kind='oft' is no kind of adapter here; use one of .*lora.*shift"):
        inject(net(), "to_q", kind="oft")
