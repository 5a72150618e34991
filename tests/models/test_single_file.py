"""A base from a single checkpoint file in the layouts of Stable Diffusion 1.x, 2.x and SDXL, as they are passed around.

No such file can be downloaded here, so one is made: the tensors of a tiny base under the names of the original code.
"""

import re

import pytest
import torch
from safetensors.torch import save_file

from stylelora.core import generator
from stylelora.models.base import decode, denoiser, encode_image, encode_text, make_base, tiny_base
from stylelora.models.load import load_base, save_base
from stylelora.models.tiny import randomise

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OUTSIDE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
OPEN_CLIP = [
    ("encoder.layers.", "transformer.resblocks."),
    ("final_layer_norm", "ln_final"),
    ("layer_norm", "ln_"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
    ("self_attn", "attn"),
    ("embeddings.token", "token"),
    ("embeddings.position_embedding.weight", "positional_embedding"),
]
VAE = [
    (r"(down_blocks|up_blocks)\.(\d+)\.(?:resnets\.(\d+)|(?:down|up)samplers\.0)", None),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    ("group_norm", "norm"),
    ("to_out.0", "proj_out"),
    (r"to_([qkv])", r"\1"),
    ("conv_norm_out", "norm_out"),
    ("conv_shortcut", "nin_shortcut"),
]


def unet_name(key, layers, attended=()):
    "Name a U-Net tensor as the original code does."
    head, _, last = key.rpartition(".")
    if head in OUTSIDE:
        return f"{OUTSIDE[head]}.{last}"
    m = re.match(
        r"(down_blocks|up_blocks)\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", key
    )
    if not m:
        kind, i, rest = re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", key).groups()
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(i)}.{resnet(rest) if kind == 'resnets' else rest}"
    side, block, kind, i, rest = m[1], int(m[2]), m[3], int(m[4]), m[5]
    if kind == "downsamplers":
        return f"input_blocks.{(block + 1) * (layers + 1)}.0.op.{last}"
    if kind == "upsamplers":
        return f"output_blocks.{(block + 1) * (layers + 1) - 1}.{1 + (block in attended)}.conv.{last}"
    place = (
        f"input_blocks.{1 + block * (layers + 1) + i}"
        if side == "down_blocks"
        else f"output_blocks.{block * (layers + 1) + i}"
    )
    return f"{place}.0.{resnet(rest)}" if kind == "resnets" else f"{place}.1.{rest}"


def resnet(rest):
    return re.sub(r"^\w+", lambda m: RESNET[m[0]], rest)


def vae_name(key, blocks):
    "Name a tensor of the autoencoder as the original code does."

    def block(m):
        i = int(m[2]) if m[1] == "down_blocks" else blocks - 1 - int(m[2])
        kind = "down" if m[1] == "down_blocks" else "up"
        return f"{kind}.{i}.block.{m[3]}" if m[3] else f"{kind}.{i}.{kind}sample"

    for pattern, name in VAE:
        key = re.sub(pattern, name or block, key)
    return key


def open_clip(net, prefix):
    "Spell a text encoder as OpenCLIP does: one matrix for queries, keys and values, the projection transposed."
    state = {k.removeprefix("text_model."): v for k, v in net.state_dict().items()}
    out = {}
    for k, v in state.items():
        if re.search(r"self_attn\.[kv]_proj", k):
            continue
        if "self_attn.q_proj" in k:
            v, k = (
                torch.cat([state[k.replace("q_proj", f"{x}_proj")] for x in "qkv"]),
                k.replace("q_proj.", "in_proj_"),
            )
        if k == "text_projection.weight":
            k, v = "text_projection", v.T
        for old, new in OPEN_CLIP:
            k = k.replace(old, new)
        out[prefix + k] = v
    return out


def clip(net, prefix):
    return {f"{prefix}text_model.{k.removeprefix('text_model.')}": v for k, v in net.state_dict().items()}


def vae_tensors(vae, prefix=""):
    "Spell an autoencoder as the original code does."
    state = {f"{prefix}{vae_name(k, 2)}": v for k, v in vae.state_dict().items()}
    return {
        k: v[..., None, None] if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", k) else v
        for k, v in state.items()
    }


def single_file(base, path):
    "Write a base to one file in the original layout."
    attended = {i for i, b in enumerate(base.unet.up_blocks) if hasattr(b, "attentions")}
    unet = {
        f"model.diffusion_model.{unet_name(k, 1, attended)}": v for k, v in base.unet.state_dict().items()
    }
    if base.text_encoder_2 is not None:
        text = clip(base.text_encoder, "conditioner.embedders.0.transformer.") | open_clip(
            base.text_encoder_2, "conditioner.embedders.1.model."
        )
    elif base.prediction_type == "v_prediction":
        text = open_clip(base.text_encoder, "cond_stage_model.model.")
    else:
        text = clip(base.text_encoder, "cond_stage_model.transformer.")
    tensors = unet | vae_tensors(base.vae, "first_stage_model.") | text
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata={"format": "pt"})


def autoencoder(seed=0, **change):
    "Make a tiny autoencoder of the class of Stable Diffusion."
    from diffusers import AutoencoderKL

    with torch.random.fork_rng():
        kl = AutoencoderKL(
            **dict(
                block_out_channels=(8, 8),
                norm_num_groups=4,
                latent_channels=4,
                layers_per_block=1,
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
            )
            | change
        )
    randomise([kl], generator("autoencoder", seed))
    return kl


def made(kind="sd1"):
    "Make a tiny base with the autoencoder class of Stable Diffusion."
    b = tiny_base(kind=kind)
    second = (
        {k: getattr(b, k) for k in ("text_encoder_2", "tokenizer_2", "zero_empty")} if kind == "sdxl" else {}
    )
    return make_base(
        "kl", b.unet, autoencoder(), b.text_encoder, b.tokenizer, b.schedule, b.prediction_type, **second
    )


@pytest.fixture
def base():
    return made()


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_a_single_file_gives_the_same_model_as_its_folder(kind, tmp_path):
    base = made(kind)
    single_file(base, tmp_path / "model.safetensors")
    folder = save_base(base, tmp_path / "folder", "float32")
    one, two = (
        load_base(tmp_path / "model.safetensors", "cpu", config=folder, offline=True),
        load_base(folder, "cpu"),
    )
    for part in ("unet", "vae", "text_encoder", *["text_encoder_2"] * (kind == "sdxl")):
        a, b = getattr(one, part).state_dict(), getattr(two, part).state_dict()
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), part
    x, cond = torch.randn(2, 4, 8, 8, generator=generator("x")), encode_text(one, ["a cat", "a dog"])
    assert torch.equal(cond, encode_text(two, ["a cat", "a dog"])) and torch.equal(
        decode(one, x), decode(two, x)
    )
    picture = torch.rand(1, 3, 16, 16, generator=generator("p")) * 2 - 1
    assert torch.equal(encode_image(one, picture), encode_image(two, picture))
    assert torch.equal(denoiser(one, cond)(x, 1.0), denoiser(two, cond)(x, 1.0))
    assert (one.latent_shape, one.size, one.prediction_type) == (
        two.latent_shape,
        two.size,
        two.prediction_type,
    )
    assert one.zero_empty == two.zero_empty == (kind == "sdxl") and (one.text_encoder_2 is not None) == (
        kind == "sdxl"
    )
    assert len(one.hash) == 64 and one.hash != two.hash


def test_a_file_that_lacks_tensors_is_refused(base, tmp_path):
    from safetensors.torch import load_file

    single_file(base, tmp_path / "model.safetensors")
    folder, whole = save_base(base, tmp_path / "folder"), load_file(tmp_path / "model.safetensors")
    for part in ("model.diffusion_model", "first_stage_model", "cond_stage_model"):
        save_file(
            {k: v for k, v in whole.items() if not k.startswith(part)}, tmp_path / "partial.safetensors"
        )
        with pytest.raises(ValueError, match="could not be read as a Stable Diffusion checkpoint"):
            load_base(tmp_path / "partial.safetensors", "cpu", config=folder, offline=True)
    one = next(k for k in whole if "attn2.to_k" in k)
    save_file({k: v for k, v in whole.items() if k != one}, tmp_path / "hole.safetensors")
    with pytest.raises(ValueError, match="could not be read as a Stable Diffusion checkpoint"):
        load_base(tmp_path / "hole.safetensors", "cpu", config=folder, offline=True)


def test_a_checkpoint_of_another_kind_is_refused_in_words(base, tmp_path):
    xl = made("sdxl")
    single_file(xl, tmp_path / "xl.safetensors")
    with pytest.raises(
        ValueError, match="could not be read as a Stable Diffusion checkpoint"
    ):  # lent by another kind
        load_base(
            tmp_path / "xl.safetensors", "cpu", config=save_base(base, tmp_path / "folder"), offline=True
        )
    refiner = open_clip(xl.text_encoder_2, "conditioner.embedders.0.model.")
    for tensors, part in (
        (refiner, "refiner of SDXL"),
        (vae_tensors(base.vae), "pass it as vae="),
        ({"lora_unet_x.lora_up.weight": torch.zeros(1)}, "it is a LoRA"),
        ({"x": torch.zeros(1)}, "no U-Net"),
    ):
        save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "odd.safetensors")
        with pytest.raises(ValueError, match=part):
            load_base(tmp_path / "odd.safetensors", "cpu", offline=True)


def test_another_autoencoder_from_a_folder_a_base_and_a_file(base, tmp_path):
    folder, other = save_base(base, tmp_path / "base", "float32"), autoencoder(1)
    other.save_pretrained(tmp_path / "alone")
    save_base(
        make_base("x", base.unet, other, base.text_encoder, base.tokenizer, base.schedule),
        tmp_path / "in a base",
        "float32",
    )
    for prefix in ("", "first_stage_model."):
        tensors = {k: v.contiguous() for k, v in vae_tensors(other, prefix).items()}
        save_file(tensors, tmp_path / f"original {len(prefix)}.safetensors")
    picture, hashes = torch.rand(1, 3, 16, 16, generator=generator("p")) * 2 - 1, set()
    plain = load_base(folder, "cpu")
    for place in (
        "alone",
        "in a base",
        "original 0.safetensors",
        "original 18.safetensors",
        "alone/diffusion_pytorch_model.safetensors",
    ):
        new = load_base(folder, "cpu", vae=tmp_path / place)
        z = encode_image(new, picture)
        assert torch.equal(z, other.encode(picture).latent_dist.mode() * other.config.scaling_factor), place
        assert torch.equal(decode(new, z), other.decode(z / other.config.scaling_factor).sample.clamp(-1, 1))
        assert (z - encode_image(plain, picture)).abs().max() > 0.1
        hashes.add(new.hash)
    assert len(hashes) == 1 and plain.hash not in hashes


def test_an_autoencoder_that_does_not_fit_is_refused(base, tmp_path):
    folder = save_base(base, tmp_path / "base", "float32")
    for change, part in (
        (dict(latent_channels=8), "latent channels 8 instead of 4"),
        (dict(scaling_factor=0.13025), "scaling factor 0.13025 instead of 0.18215"),
        (
            dict(
                block_out_channels=(8, 8, 8),
                down_block_types=("DownEncoderBlock2D",) * 3,
                up_block_types=("UpDecoderBlock2D",) * 3,
            ),
            "pixels per latent 4 instead of 2",
        ),
    ):
        autoencoder(**change).save_pretrained(tmp_path / "odd")
        with pytest.raises(ValueError, match=part):
            load_base(folder, "cpu", vae=tmp_path / "odd")
    hole = {k: v.contiguous() for k, v in vae_tensors(base.vae).items() if k != "decoder.conv_in.weight"}
    save_file(hole, tmp_path / "hole.safetensors")
    (tmp_path / "x.pt").touch()
    for place, part in (
        ("hole.safetensors", "damaged or of another kind"),
        ("x.pt", "is a pickle"),
        ("nowhere.safetensors", "not exist"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=part):
            load_base(folder, "cpu", vae=str(tmp_path / place))


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_mark_in_the_file_counts_more_than_a_configuration_that_was_lent(kind, tmp_path, capsys):
    "A model that was trained to predict a velocity says so with an empty tensor, and draws as such."
    from safetensors.torch import load_file

    base = made(kind)
    assert base.prediction_type == "epsilon"
    single_file(base, tmp_path / "plain.safetensors")
    folder, tensors = (
        save_base(base, tmp_path / "folder", "float32"),
        load_file(tmp_path / "plain.safetensors"),
    )
    marks = dict(v_pred=torch.zeros(0), ztsnr=torch.zeros(0), edm_mean=torch.zeros(4))
    save_file(tensors | {"v_pred": marks["v_pred"]}, tmp_path / "v.safetensors", metadata={"format": "pt"})
    plain, v = (
        load_base(tmp_path / f"{n}.safetensors", "cpu", config=folder, offline=True) for n in ("plain", "v")
    )
    assert [plain.prediction_type, v.prediction_type] == ["epsilon", "v_prediction"]
    if kind == "sd1":
        parts = (base.unet, base.vae, base.text_encoder, base.tokenizer, base.schedule)
        same = make_base("v", *parts, "v_prediction")
        x, cond = torch.randn(1, 4, 8, 8, generator=generator("x")), encode_text(v, "a cat")
        assert torch.allclose(denoiser(v, cond)(x, 1.0), denoiser(same, cond)(x, 1.0), atol=1e-6)
        assert (denoiser(plain, cond)(x, 1.0) - denoiser(v, cond)(x, 1.0)).abs().max() > 0.1
    for names, said in (
        (["v_pred", "ztsnr"], "zero terminal SNR"),
        (["edm_mean"], "another family of models"),
    ):
        save_file(
            tensors | {n: marks[n] for n in names}, tmp_path / "odd.safetensors", metadata={"format": "pt"}
        )
        with pytest.raises(ValueError, match=said) as e:
            load_base(tmp_path / "odd.safetensors", "cpu", config=folder, offline=True)
        assert "odd.safetensors" in str(e.value) and "take a base" in str(e.value)
        assert "not a LoRA" not in str(e.value)


def test_zero_terminal_snr_is_refused_in_the_same_words_for_a_folder(base, tmp_path):
    from stylelora.core import read_json, write_json

    folder = save_base(base, tmp_path / "folder")
    config = folder / "scheduler" / "scheduler_config.json"
    write_json(config, read_json(config) | dict(rescale_betas_zero_snr=True))
    with pytest.raises(ValueError, match="folder': zero terminal SNR .* take a base that keeps the schedule"):
        load_base(folder, "cpu")


def test_an_autoencoder_of_an_unknown_class_is_never_made(base, tmp_path):
    from stylelora.core import read_json, write_json

    folder = save_base(base, tmp_path / "folder")
    config = folder / "vae" / "config.json"
    write_json(config, read_json(config) | dict(_class_name="AutoencoderOobleck"))
    with pytest.raises(
        ValueError, match="vae is damaged or of another kind .*AutoencoderOobleck, not AutoencoderKL"
    ):
        load_base(folder, "cpu")
