"""Each field of PEFT's configurations, as the installed PEFT lists them, is honoured as PEFT does or refused by its name."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from stylelora.adapters.config import check_config
from stylelora.adapters.files import load_lora, read_adapter
from stylelora.adapters.lora import delta_of, lora_layers
from stylelora.apps.cli import main
from stylelora.core import generator

Q, K = (f"mid_block.attentions.0.transformer_blocks.0.attn1.to_{w}" for w in "qk")


@pytest.fixture(scope="session")
def peft():
    return pytest.importorskip("peft")


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.to_k = nn.Linear(12, 10), nn.Linear(12, 8)


def net():
    "Two layers under the names that they have in a U-Net."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        attn = Attention()
    block = nn.ModuleDict(dict(transformer_blocks=nn.ModuleList([nn.ModuleDict(dict(attn1=attn))])))
    return nn.ModuleDict(dict(mid_block=nn.ModuleDict(dict(attentions=nn.ModuleList([block])))))


def trained(peft, folder, config):
    "Let PEFT make, change and save an adapter; return the updates to the original weights that its reader computes."
    original = {n: net().get_submodule(n).weight.detach().clone() for n in (Q, K)}
    model = peft.get_peft_model(net(), config)
    g = generator("trained")
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=g) * 0.2)
    model.save_pretrained(folder)
    read = peft.PeftModel.from_pretrained(net(), folder).merge_and_unload()
    return {n: read.get_submodule(n).weight.detach() - w for n, w in original.items()}


HONOURED = [
    dict(r=4, lora_alpha=6),
    dict(r=4, lora_alpha=6, use_rslora=True),
    dict(r=4, lora_alpha=6, rank_pattern={"to_k": 2}, alpha_pattern={"attn1.to_q": 3}),
    dict(r=4, lora_alpha=6, rank_pattern={"^mid_block.*to_k": 2}, use_rslora=True),
    *(dict(r=4, init_lora_weights=start) for start in (True, False, "gaussian", "orthogonal", "mica")),
    dict(
        r=4,
        lora_dropout=0.1,
        exclude_modules=["proj_in"],
        layers_to_transform=[0],
        layers_pattern=["transformer_blocks"],
    ),
]


@pytest.mark.parametrize("fields", HONOURED, ids=str)
def test_what_is_read_is_read_as_peft_does(peft, tmp_path, fields):
    want = trained(peft, tmp_path, peft.LoraConfig(target_modules=["to_q", "to_k"], **fields))
    state = read_adapter(tmp_path).state
    assert set(state) == {n for n, d in want.items() if d.any()}
    for n, s in state.items():
        assert (delta_of(s) - want[n]).abs().max() < 1e-6 * max(1, want[n].abs().max()), n
    load_lora(model := net(), tmp_path)
    for n, layer in lora_layers(model).items():
        assert torch.allclose(layer.delta_weight(), want[n], atol=1e-6)


ODD = dict(  # field -> a value that is not neutral, where "true" is none
    bias="all",
    init_lora_weights="pissa_niter_2",
    target_parameters=["x"],
    modules_to_save=["conv_in"],
    layer_replication=[[0, 1]],
    trainable_token_indices=[1],
    peft_type="ADALORA",
    alora_invocation_tokens=[1],
)
READ = {"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights"}
READ |= {"use_dora"}
IDLE = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout"),
    *("megatron_config", "megatron_core", "runtime_config", "ensure_weight_tying", "qalora_group_size"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
}


FINE = dict(r=4, lora_alpha=2, rank_pattern={"to_k": 2}, alpha_pattern={"to_k": 2})  # numbers and patterns


@pytest.mark.parametrize(
    "said, named",
    [
        ('{"unet.lora_alpha": NaN}', "lora_alpha=nan should be a finite number"),
        ('{"unet.lora_alpha": 1e999}', "lora_alpha=inf should be a finite number"),
        ('{"unet.rank_pattern": {"to_(k": 4}}', "rank_pattern="),
        ("[1]", "lora_adapter_metadata in its header is no table"),
        ("{", "lora_adapter_metadata in its header is damaged"),
    ],
)
def test_a_scale_that_is_no_number_goes_no_further(tmp_path, capsys, said, named):
    "`convert` writes nothing, and says file and field, in one line."
    pair = {f"unet.{K}.lora_A.weight": torch.ones(4, 6), f"unet.{K}.lora_B.weight": torch.ones(5, 4)}
    save_file(pair, tmp_path / "odd.safetensors", dict(lora_adapter_metadata=said))
    assert main(["convert", tmp_path / "odd.safetensors", tmp_path / "new.safetensors"]) == 1
    told = capsys.readouterr().err
    assert "odd.safetensors: " + named in told and told.count("\n") == 1, told
    assert not (tmp_path / "new.safetensors").exists()


def test_every_field_of_the_installed_peft_is_known(peft):
    "A default configuration passes; each field that is neither read nor idle is refused as soon as it says something."
    for config in (peft.LoraConfig(), peft.LoraConfig(target_modules=["a"], r=2, lora_alpha=1)):
        check_config(json.loads(json.dumps(config.to_dict(), default=list)), "x")
    for field in dataclasses.fields(peft.LoraConfig):
        value = ODD.get(field.name, True)
        if field.name in IDLE or (field.name in READ and field.name not in ODD):
            value = FINE.get(field.name, value)
            check_config({field.name: value} if field.name != "peft_type" else {}, "x")
            continue
        with pytest.raises(ValueError, match=f"x: {field.name}="):
            check_config({field.name: value}, "x")


@pytest.mark.parametrize("start", ["pissa_niter_4", "loftq", "corda", "lora_ga"])
def test_a_start_that_changes_the_base_is_refused_with_the_cure(tmp_path, capsys, start):
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(dict(peft_type="LORA", r=2, init_lora_weights=start))
    )

    tensors = {f"base_model.model.{Q}.lora_A.weight": torch.ones(2, 12)}
    save_file(
        tensors | {f"base_model.model.{Q}.lora_B.weight": torch.ones(10, 2)},
        tmp_path / "adapter_model.safetensors",
    )
    for words in (["inspect", tmp_path], ["convert", tmp_path, tmp_path / "out.safetensors"]):
        assert main([str(w) for w in words]) == 1
        said = capsys.readouterr().err
        assert f"init_lora_weights='{start}'" in said and "path_initial_model_for_weight_conversion" in said
    assert not (tmp_path / "out.safetensors").exists()


def test_the_cure_works(peft, tmp_path):
    "PEFT turns an adapter that began with PiSSA into a plain LoRA, and that is read exactly."
    config = peft.LoraConfig(r=4, target_modules=["to_q", "to_k"], init_lora_weights="pissa")
    original = {n: net().get_submodule(n).weight.detach().clone() for n in (Q, K)}
    model = peft.get_peft_model(net(), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator("p", p.shape)) * 0.2)
    model.save_pretrained(
        tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    merged = model.merge_and_unload()
    for n, s in read_adapter(tmp_path / "plain").state.items():
        assert (delta_of(s) - (merged.get_submodule(n).weight - original[n])).abs().max() < 1e-5, n
