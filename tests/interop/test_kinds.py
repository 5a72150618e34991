"""LoHa, LoKr, DoRA, PiSSA and OLoRA as the installed PEFT makes, saves and loads them, and as diffusers reads ours."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from stylelora.adapters.bases import melt
from stylelora.adapters.files import load_adapter, read_adapter, save_adapter
from stylelora.adapters.keys import networks_of, split_components
from stylelora.adapters.lora import delta_of, find_targets, kind_of, lora_layers, remove, set_scale
from stylelora.adapters.merge import blend
from stylelora.adapters.products import as_lora
from stylelora.apps.cli import main
from stylelora.core import generator
from stylelora.models.base import tiny_base

TARGETS = ["to_q", "to_out.0", "ff.net.2", "conv1", "proj_in", "conv_shortcut"]
LINEAR = ["to_q", "to_k", "ff.net.2"]


@pytest.fixture(scope="session")
def peft():
    return pytest.importorskip("peft")


@pytest.fixture(scope="module")
def unet():
    return tiny_base().unet


def trained(peft, unet, config, folder):
    "Let PEFT put an adapter into a U-Net, change all of its numbers, and save it; return what its own reader merges."
    model = peft.get_peft_model(copy.deepcopy(unet), config)
    g = generator("trained", config.peft_type)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=g) * 0.3)
    model.save_pretrained(folder)
    merged = peft.PeftModel.from_pretrained(copy.deepcopy(unet), folder).merge_and_unload()
    found = {
        n: merged.get_submodule(n).weight - m.weight for n, m in unet.named_modules() if hasattr(m, "weight")
    }
    return {n: d.detach() for n, d in found.items() if d.any()}


def configs(peft):
    "The ways of PEFT to make each kind."
    loha = dict(r=3, alpha=5, target_modules=TARGETS)
    lokr = dict(r=2, alpha=5, target_modules=TARGETS)
    lora = dict(r=3, lora_alpha=5, target_modules=TARGETS)
    return {
        "LoHa": peft.LoHaConfig(**loha),
        "LoHa with cores": peft.LoHaConfig(**loha, use_effective_conv2d=True),
        "LoHa with patterns": peft.LoHaConfig(**loha, rank_pattern={"to_q": 2}, alpha_pattern={"conv1": 1}),
        "LoKr": peft.LoKrConfig(**lokr),
        "LoKr with cores": peft.LoKrConfig(**lokr | dict(r=1), use_effective_conv2d=True),
        "LoKr, both divided": peft.LoKrConfig(**lokr | dict(r=1), decompose_both=True, decompose_factor=4),
        "LoKr, both full": peft.LoKrConfig(**lokr | dict(r=16)),
        "DoRA": peft.LoraConfig(**lora, use_dora=True),
        "DoRA, rank-stabilised": peft.LoraConfig(**lora, use_dora=True, use_rslora=True),
        "PiSSA": peft.LoraConfig(**lora | dict(target_modules=LINEAR), init_lora_weights="pissa"),
        "OLoRA": peft.LoraConfig(**lora | dict(target_modules=LINEAR), init_lora_weights="olora"),
        "OLoRA, rank-stabilised": peft.LoraConfig(
            **lora | dict(target_modules=LINEAR), init_lora_weights="olora", use_rslora=True
        ),
    }


NAMES = [
    *("LoHa", "LoHa with cores", "LoHa with patterns", "LoKr", "LoKr with cores", "LoKr, both divided"),
    *("LoKr, both full", "DoRA", "DoRA, rank-stabilised", "PiSSA", "OLoRA", "OLoRA, rank-stabilised"),
]


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_peft_is_read_to_the_same_update(peft, unet, tmp_path, name):
    want = trained(peft, unet, configs(peft)[name], tmp_path)
    state = read_adapter(tmp_path).state
    assert set(state) == set(want) and {kind_of(s).title for s in state.values()} == {
        name.split(",")[0].split()[0]
    }
    base = tiny_base()
    assert load_adapter(base, tmp_path).state.keys() == state.keys()
    for n, layer in lora_layers(base.unet).items():
        assert (layer.delta_weight() - want[n]).abs().max() < 2e-5 * max(1, want[n].abs().max()), n
        if kind_of(state[n]).low_rank:
            assert torch.allclose(delta_of(state[n]).reshape(want[n].shape).float(), want[n], atol=1e-4)
            assert torch.allclose(
                delta_of(as_lora({n: state[n]})[n]).reshape(want[n].shape).float(), want[n], atol=1e-4
            )


@pytest.mark.parametrize("name", ["LoHa", "LoKr, both divided", "LoKr, both full", "DoRA", "PiSSA"])
def test_it_is_melted_into_a_base_and_the_pictures_are_those_of_the_layers(peft, unet, tmp_path, name):
    want = trained(peft, unet, configs(peft)[name], tmp_path / "p")
    base, worn = tiny_base(), tiny_base()
    melt(base, [read_adapter(tmp_path / "p").state], [0.5])
    for n, d in want.items():
        assert torch.allclose(
            base.unet.get_submodule(n).weight - unet.get_submodule(n).weight, 0.5 * d, atol=1e-4
        )
    load_adapter(worn, tmp_path / "p", scale=0.5)
    x, t, text = torch.randn(1, 4, 8, 8, generator=generator("x")), torch.tensor([300]), torch.randn(1, 5, 16)
    with torch.no_grad():
        a, b, bare = (net(x, t, text).sample for net in (base.unet, worn.unet, unet))
    assert (a - b).abs().max() < 1e-3 * (a - bare).abs().max()
    set_scale(worn.unet, 0.0)
    with torch.no_grad():
        assert torch.allclose(worn.unet(x, t, text).sample, bare, atol=1e-6)
    remove(worn.unet)
    assert torch.equal(worn.unet(x, t, text).sample, bare)
    out = tmp_path / "model"
    assert main(["merge", str(tmp_path / "p"), "--into", "tiny", "--weights", "0.5", "--out", str(out)]) == 0


@pytest.mark.parametrize(
    "name", ["LoHa", "LoHa with cores", "LoKr", "LoKr with cores", "LoKr, both full", "DoRA"]
)
def test_in_the_words_of_kohyas_family_and_back(peft, unet, tmp_path, name):
    "What LyCORIS writes: its words, with an alpha beside each layer."
    want = trained(peft, unet, configs(peft)[name], tmp_path / "p")
    file = tmp_path / "k.safetensors"
    assert main(["convert", str(tmp_path / "p"), str(file), "--to", "kohya"]) == 0
    word = dict(LoHa="hada_w1_a", LoKr="lokr_w1", DoRA="dora_scale")[name.split(",")[0].split()[0]]
    assert sum(k.endswith(word) or k.endswith(f"{word}_a") for k in load_file(file)) >= len(want)
    base = tiny_base()
    load_adapter(base, file)
    for n, layer in lora_layers(base.unet).items():
        assert (layer.delta_weight() - want[n]).abs().max() < 1e-4 * max(1, want[n].abs().max()), n


@pytest.mark.parametrize("kind", ["LoHa", "LoKr"])
def test_merging_files_is_exact_and_gives_a_lora_that_peft_reads(peft, unet, tmp_path, kind):
    want = trained(peft, unet, configs(peft)[kind], tmp_path / "one")
    more = trained(peft, unet, peft.LoraConfig(r=2, target_modules=["to_q"]), tmp_path / "two")
    words = [tmp_path / "one", tmp_path / "two", "--weights", "0.5,2", "--out", tmp_path / "m.safetensors"]
    assert main(["merge", *map(str, words)]) == 0
    state = read_adapter(tmp_path / "m.safetensors").state
    for n, d in want.items():
        assert torch.allclose(
            delta_of(state[n]).reshape(d.shape).float(), 0.5 * d + 2 * more.get(n, torch.zeros(())), atol=1e-4
        ), n
    state = {
        n: s for n, s in state.items() if not n.endswith("proj_in")
    }  # kernel or matrix: the base decides
    save_adapter(state, tmp_path / "peft", "peft")
    read = peft.PeftModel.from_pretrained(copy.deepcopy(unet), tmp_path / "peft").merge_and_unload()
    for n, s in state.items():
        moved = read.get_submodule(n).weight - unet.get_submodule(n).weight
        assert torch.allclose(moved, delta_of(s).reshape(moved.shape).float(), atol=1e-4), n


@pytest.mark.parametrize("kind", ["DoRA", "PiSSA"])
def test_what_needs_the_base_is_refused_by_name_where_there_is_none(peft, unet, tmp_path, capsys, kind):
    trained(peft, unet, configs(peft)[kind], tmp_path / "p")
    state = read_adapter(tmp_path / "p").state
    with pytest.raises(ValueError, match=f"{kind} of adapter 0 is no low-rank update by itself"):
        blend([state, state], [1, 1])
    assert main(["merge", str(tmp_path / "p"), "--out", str(tmp_path / "m.safetensors")]) == 1
    assert "merge --into" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "p")]) == 0
    assert "depends on the weights of the base" in capsys.readouterr().out
    if kind == "PiSSA":
        assert main(["convert", str(tmp_path / "p"), str(tmp_path / "k.safetensors"), "--to", "kohya"]) == 1
        assert "a PiSSA has no place in the layout 'kohya'; load it into its base" in capsys.readouterr().err


def test_lengths_of_inputs_are_read_from_their_shape(unet):
    "Some trainers store one length for each input under the same name."
    n = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    W, g = unet.get_submodule(n).weight, generator("inputs")
    A, B = torch.randn(2, W.shape[1], generator=g), torch.randn(len(W), 2, generator=g)
    m = torch.rand(1, W.shape[1], generator=g) + 0.5
    V = W + B @ A
    base = tiny_base()
    melt(base, [{n: dict(kind="dora", of="lora", A=A, B=B, m=m, alpha=2.0)}], [1.0])
    assert torch.allclose(base.unet.get_submodule(n).weight, m * V / V.norm(dim=0, keepdim=True), atol=1e-5)


def test_our_dora_is_read_by_diffusers(peft, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    from tests.interop.reference import clone, tiny_pipeline

    pipe = tiny_pipeline()
    names = find_targets(pipe.unet, "attention")
    g, state = generator("dora"), {}
    for n in names:
        W = pipe.unet.get_submodule(n).weight
        A, B = torch.randn(2, W.shape[1], generator=g) * 0.3, torch.randn(len(W), 2, generator=g) * 0.3
        m = W.norm(dim=1, keepdim=True) * (1 + 0.3 * torch.rand(len(W), 1, generator=g))
        state[n] = dict(kind="dora", of="lora", A=A, B=B, m=m.detach(), alpha=3.0)
    file = save_adapter(state, tmp_path / "d.safetensors")
    theirs, ours = clone(type(pipe), pipe.components), clone(type(pipe), pipe.components)
    theirs.load_lora_weights(str(file))
    load_adapter(ours, file)
    x, t, text = torch.randn(1, 4, 8, 8, generator=g), torch.tensor([300]), torch.randn(1, 5, 32, generator=g)
    with torch.no_grad():
        a, b, bare = (p.unet(x, t, text).sample for p in (theirs, ours, pipe))
    assert (a - bare).abs().max() > 0.01 and (a - b).abs().max() < 1e-4 * (a - bare).abs().max() + 1e-5
    assert diffusers.__version__


def test_products_in_all_three_networks_of_sdxl(tmp_path):
    base, state, g = tiny_base(kind="sdxl"), {}, generator("xl")
    for c, network in networks_of(base).items():
        n = find_targets(network, "attention" if c == "unet" else "text_encoder")[0]
        W = network.get_submodule(n).weight
        pair = {
            w: torch.randn(s, generator=g) for w, s in zip(("w1_a", "w1_b"), ((len(W), 2), (2, W.shape[1])))
        }
        loha = dict(kind="loha", alpha=1.0, **pair, **{w.replace("1", "2"): v for w, v in pair.items()})
        state[n if c == "unet" else f"{c}.text_model.{n.removeprefix('text_model.')}"] = loha
    file = save_adapter(state, tmp_path / "k.safetensors", "kohya", like=base)
    load_adapter(base, file)
    assert [len(lora_layers(net)) for net in networks_of(base).values()] == [1, 1, 1]
    assert len(split_components(read_adapter(file, 1).state)) == 3


def test_a_product_with_a_tensor_missing_or_misshapen_is_named(tmp_path):
    layer = "lora_unet_mid_block_attentions_0_proj_in"
    good = {f"{layer}.hada_w{i}_{w}": torch.ones(2, 2) for i in (1, 2) for w in "ab"}
    for change, said in (
        ({f"{layer}.hada_w2_b": None}, "lacks one of its matrices"),
        ({f"{layer}.hada_w2_b": torch.ones(3, 2)}, "the matrices of a LoHa do not multiply"),
        ({f"{layer}.lokr_w1": torch.ones(2, 2)}, "is a LoHa with a tensor 'k1' of another kind"),
    ):
        tensors = {k: v for k, v in (good | change).items() if v is not None}
        save_file({k: v.clone() for k, v in tensors.items()}, tmp_path / "x.safetensors")
        with pytest.raises(ValueError, match=said):
            read_adapter(tmp_path / "x.safetensors")


def test_a_layer_that_is_no_place_for_it_is_named():
    base = tiny_base()
    base.unet.conv_in = nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect")
    pair = {f"w{i}_{w}": torch.ones(s) for i in (1, 2) for w, s in dict(a=(8, 2), b=(2, 36)).items()}
    with pytest.raises(ValueError, match="conv_in: padding_mode='reflect' is not supported"):
        melt(base, [{"conv_in": dict(kind="loha", alpha=1.0, **pair)}], [1.0])
