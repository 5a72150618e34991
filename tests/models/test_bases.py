"""Stable Diffusion 1.x, 2.x and SDXL through the same code: pictures, training and files against diffusers' own pipelines.

The bases are tiny and random. What is counted is counted on the published sizes, which need no memory on the device meta.
"""

import diffusers
import numpy as np
import pytest
import torch

from stylelora.adapters.files import load_lora, save_lora
from stylelora.adapters.lora import count_parameters, inject, lora_layers, lora_state
from stylelora.core import generator, read_json, root
from stylelora.data.folder import LatentCache
from stylelora.models.base import (
    decode,
    denoiser,
    encode_text,
    full_base,
    predict_unet,
    same_sizes,
    tiny_base,
    to_uint8,
    with_sizes,
)
from stylelora.models.load import load_base, save_base
from stylelora.models.tiny import published_unet, quiet, share_table
from stylelora.sample.generate import draw_latents, generate, image_generator
from stylelora.sample.samplers import pick_sampler
from stylelora.train.loop import plain_objective, train
from stylelora.train.step import TrainConfig, check_pair, step_loss

KINDS = ("sd1", "sd2", "sdxl")
CONFIG = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
DDIM = dict(steps_offset=1, clip_sample=False, set_alpha_to_one=False)
SAMPLERS = dict(
    ddim=("DDIMScheduler", DDIM),
    euler=("EulerDiscreteScheduler", {}),
    dpmpp_2m=("DPMSolverMultistepScheduler", {}),
)


def pipeline(base, sampler="ddim"):
    "Put a base's networks into diffusers' pipeline for its kind."
    cls, kw = SAMPLERS[sampler]
    parts = dict(
        unet=base.unet,
        vae=base.vae,
        text_encoder=base.text_encoder,
        tokenizer=base.tokenizer,
        scheduler=getattr(diffusers, cls)(**CONFIG, **kw, prediction_type=base.prediction_type),
    )
    with quiet():
        if base.text_encoder_2 is not None:
            pipe = diffusers.StableDiffusionXLPipeline(
                **parts,
                text_encoder_2=base.text_encoder_2,
                tokenizer_2=base.tokenizer_2,
                add_watermarker=False,
            )
        else:
            pipe = diffusers.StableDiffusionPipeline(
                **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
            )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, **more):
    "Draw two pictures with diffusers, as numbers that can be subtracted."
    out = pipe(
        ["a cat", "a dog"],
        num_inference_steps=8,
        guidance_scale=5.0,
        output_type="np",
        generator=[torch.Generator().manual_seed(s) for s in (0, 1)],
        **more,
    )
    return (out.images * 255).round().astype(int)


def ours(base, sampler="ddim", **more):
    return generate(
        base, ["a cat", "a dog"], [[0], [1]], sampler, 8, 5.0, progress=False, **more
    ).images.astype(int)


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_those_of_the_pipeline(kind, sampler):
    base = tiny_base(kind=kind)
    pipe, mine = pipeline(base, sampler), ours(base, sampler)
    assert np.abs(draw(pipe) - mine).max() <= 1
    red = ours(base, sampler, negative_prompt="red")
    assert (
        np.abs(draw(pipe, negative_prompt=["red", "red"]) - red).max() <= 1 and np.abs(red - mine).max() > 1
    )
    both = ours(base, sampler, negative_prompt=["red", "blue"])
    assert np.abs(draw(pipe, negative_prompt=["red", "blue"]) - both).max() <= 1
    assert np.abs(both[1] - red[1]).max() > 1 and np.abs(both[0] - red[0]).max() <= 1


def test_the_second_text_encoder_may_read_something_else():
    base, both = tiny_base(kind="sdxl"), dict(prompt_2="in ink", negative_prompt_2="blurred")
    mine = ours(base, negative_prompt="red", **both)
    theirs = dict(prompt_2=["in ink"] * 2, negative_prompt=["red"] * 2, negative_prompt_2=["blurred"] * 2)
    assert np.abs(draw(pipeline(base), **theirs) - mine).max() <= 1
    for name in both:
        without = ours(base, negative_prompt="red", **{k: v for k, v in both.items() if k != name})
        assert np.abs(without - mine).max() > 1
    with pytest.raises(ValueError, match="prompt_2='in ink': .* has one text encoder; leave it out"):
        ours(tiny_base(), prompt_2="in ink")


def test_the_prediction_type_matters():
    "The test above would not see a wrong type if both gave the same picture."
    v, eps = (ours(tiny_base(kind="sd2", prediction_type=p)) for p in ("v_prediction", "epsilon"))
    assert np.abs(v - eps).max() > 20


def test_sizes_are_those_of_the_pipeline():
    base = tiny_base(kind="sdxl")
    cond = with_sizes(
        base, encode_text(base, ["a cat", "a dog"]), original=(64, 48), crop=(3, 0), target=(32, 16)
    )
    walk = pick_sampler("ddim")
    z = draw_latents(
        denoiser(base, cond, guidance_scale=5.0),
        walk,
        walk.sigmas(base.schedule, 8),
        [image_generator(s) for s in (0, 1)],
        base.latent_shape,
    )
    mine = to_uint8(decode(base, z)).astype(int)
    told = dict(
        original_size=(64, 48), crops_coords_top_left=(3, 0), target_size=(32, 16), height=16, width=16
    )
    assert np.abs(draw(pipeline(base), **told) - mine).max() <= 1 and np.abs(ours(base) - mine).max() > 1


@pytest.mark.parametrize("kind", KINDS)
def test_other_sizes_are_those_of_the_pipeline(kind):
    "SDXL is told the size by itself; a height and a width that are exchanged would show in the shape."
    base = tiny_base(kind=kind)
    mine = ours(base, size="32x24")
    assert mine.shape[1:3] == (24, 32) and np.abs(draw(pipeline(base), height=24, width=32) - mine).max() <= 1


# ---------------------------------------------------------------- training


def pair(base, n=5):
    return torch.randn(n, 4, 8, 8, generator=generator("z")), LatentCache(base).contexts(
        [f"a thing {i}" for i in range(n)]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_are_those_of_a_training_script(kind):
    "Written out as in diffusers' scripts: noise, one call of the U-Net with all its arguments, a mean square."
    base = tiny_base(kind=kind)
    x0, ctx = pair(base)
    inject(base.unet, "attention", 2, generator=generator("adapter"))
    for m in lora_layers(base.unet).values():
        torch.nn.init.normal_(m.lora_B, generator=generator("B"))
    weights = [m.lora_A for m in lora_layers(base.unet).values()]
    eps, t = torch.randn(x0.shape, generator=generator("eps")), torch.tensor([1, 200, 500, 800, 999])
    mine = step_loss(base, x0, ctx, eps, t, plain_objective(base)).mean()
    scheduler = pipeline(base).scheduler
    more = {}
    if kind == "sdxl":
        pooled = pipeline(base).encode_prompt([f"a thing {i}" for i in range(5)], device="cpu")[2]
        more = dict(
            added_cond_kwargs=dict(text_embeds=pooled, time_ids=torch.tensor([[16.0, 16, 0, 0, 16, 16]] * 5))
        )
    words = pipeline(base).encode_prompt(
        [f"a thing {i}" for i in range(5)],
        device="cpu",
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
    )[0]
    out = base.unet(scheduler.add_noise(x0, eps, t), t, encoder_hidden_states=words, **more).sample
    target = scheduler.get_velocity(x0, eps, t) if kind == "sd2" else eps
    theirs = (out - target).pow(2).mean()
    assert abs(mine - theirs) <= 1e-5 * theirs
    for a, b in zip(*(torch.autograd.grad(loss, weights) for loss in (mine, theirs))):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max().clamp(min=1e-6)


@pytest.mark.parametrize("kind", ["sd2", "sdxl"])
def test_a_training_learns_resumes_and_is_read_by_diffusers(kind, tmp_path):
    pytest.importorskip("peft")
    base, fresh = tiny_base(kind=kind), tiny_base(kind=kind)
    data, frozen = pair(base), [p.clone() for p in base.unet.parameters()]
    config = TrainConfig(
        train_steps=12,
        batch_size=5,
        lr=2e-2,
        target_modules="attention",
        save_every=4,
        val_every=12,
        caption_dropout=0.3,
    )
    whole = train(base, *data, config=config, val=data, folder=tmp_path / "whole", progress=False)
    assert whole.train_loss.dropna().iloc[-1] < whole.train_loss.dropna().iloc[0]
    assert all(map(torch.equal, frozen, tiny_base(kind=kind).unet.parameters()))

    def stop(row):
        if row["step"] == 6:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError):
        train(fresh, *data, config=config, val=data, folder=tmp_path / "half", progress=False, on_step=stop)
    train(fresh, *data, config=config, val=data, folder=tmp_path / "half", progress=False)
    a, b = (lora_state(x.unet) for x in (base, fresh))
    assert all(torch.equal(a[n][w], b[n][w]) for n in a for w in "AB")

    mine, file = ours(base), save_lora(base.unet, tmp_path / "mine.safetensors")
    pipe = pipeline(tiny_base(kind=kind))
    bare = draw(pipe)
    pipe.load_lora_weights(str(file))
    assert np.abs(draw(pipe) - mine).max() <= 1 < np.abs(bare - mine).max()
    again = tiny_base(kind=kind)
    load_lora(again.unet, file)
    assert (ours(again) == mine).all()


def test_a_dropped_caption_keeps_the_sizes_of_its_picture():
    base, seen = tiny_base(kind="sdxl"), []
    z, ctx = pair(base)
    ctx = with_sizes(base, ctx, original=(40, 30))
    hook = base.unet.register_forward_pre_hook(
        lambda m, a, k: seen.append(k["added_cond_kwargs"]), with_kwargs=True
    )
    train(base, z, ctx, config=TrainConfig(train_steps=1, val_every=0, caption_dropout=1.0), progress=False)
    hook.remove()
    assert seen[0]["time_ids"].tolist() == [[40, 30, 0, 0, 16, 16]] * 4 and not seen[0]["text_embeds"].any()


def test_contexts_of_another_kind_are_refused():
    xl, one = tiny_base(kind="sdxl"), tiny_base()
    z, ctx = pair(xl)
    for base, wrong in ((xl, ctx[:, :-1]), (one, ctx), (xl, pair(one)[1])):
        with pytest.raises(ValueError, match="training contexts: .* is not"):
            check_pair(base, z, wrong)
    assert same_sizes(one, ctx, ctx) is ctx


def test_half_precision_and_checkpointing():
    "In bfloat16 the answers move by a rounding; checkpointing changes nothing."
    base, half = tiny_base(kind="sdxl"), tiny_base(kind="sdxl", dtype="bfloat16")
    x, t = torch.randn(2, 4, 8, 8, generator=generator("x")), torch.tensor([10.0, 800.0])
    a = predict_unet(base, x, t, encode_text(base, ["a", "b"]))
    b = predict_unet(half, x.bfloat16(), t, encode_text(half, ["a", "b"]))
    assert b.dtype == torch.bfloat16 and 0 < (a - b).abs().max() < 0.3
    data, config = pair(base), dict(train_steps=3, val_every=0, lr=1e-2)
    ways = (TrainConfig(**config, gradient_checkpointing=c) for c in (False, True))
    assert np.allclose(*(train(base, *data, config=c, progress=False).loss for c in ways), atol=1e-5)


# ---------------------------------------------------------------- folders


def test_sdxl_is_read_by_diffusers_and_back(tmp_path):
    base = tiny_base(kind="sdxl")
    folder = save_base(base, tmp_path, "float32")
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(
        folder, local_files_only=True, torch_dtype=torch.float32
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = pipeline(base).scheduler
    again = load_base(folder, "cpu")
    assert np.abs(draw(pipe) - ours(again)).max() <= 1
    assert again.zero_empty and pipe.config.force_zeros_for_empty_prompt and again.hash != base.hash
    base.zero_empty = False
    assert not load_base(save_base(base, tmp_path), "cpu").zero_empty


def test_an_incomplete_sdxl_and_its_refiner_are_refused(tmp_path):
    folder = save_base(tiny_base(kind="sdxl"), tmp_path)
    (folder / "tokenizer_2").rename(folder / "elsewhere")
    with pytest.raises(ValueError, match="tokenizer_2/ is missing"):
        load_base(folder, "cpu")
    (folder / "text_encoder_2").rename(folder / "elsewhere2")
    with pytest.raises(ValueError, match="text_encoder_2/ is missing; tokenizer_2/ is missing"):
        load_base(folder, "cpu")
    index = folder / "model_index.json"
    index.write_text(
        index.read_text()
        .replace('"CLIPTextModel"', "null")
        .replace('"transformers",\n    null', "null, null")
    )
    with pytest.raises(ValueError, match="refiner of SDXL"):
        load_base(folder, "cpu")


# ---------------------------------------------------------------- the published size


def test_layers_and_parameters_of_stable_diffusion_15():
    unet = published_unet()
    assert {p.device.type for p in unet.parameters()} == {"meta"} and count_parameters(unet)[
        "total"
    ] == 859_520_964
    for target_modules, layers, per_rank in [
        ("cross_attention", 64, None),
        ("attention", 128, 199_296),
        ("attention_ff", 192, 423_936),
        ("conv", 278, None),
    ]:
        unet = published_unet()
        assert len(inject(unet, target_modules, 4)) == layers == len(lora_layers(unet))
        if per_rank:
            assert count_parameters(unet)["trainable"] == 4 * per_rank


def test_the_table_of_shares_is_what_the_function_counts():
    stored, made = read_json(root() / "reports" / "results" / "sd15_shares.json"), share_table()
    assert stored == made
    for row in made["rows"][::7]:
        unet = published_unet()
        inject(unet, row["target_modules"], row["rank"])
        count = count_parameters(unet)
        assert (count["trainable"], len(lora_layers(unet))) == (row["trainable"], row["layers"])
        assert row["share"] == count["trainable"] / (count["total"] - count["trainable"])


NARROW = dict(block_out_channels=(8,) * 4, norm_num_groups=4, cross_attention_dim=16, attention_head_dim=2)


@pytest.mark.parametrize(
    "change", [pytest.param(NARROW, id="narrow"), pytest.param({}, id="full", marks=pytest.mark.slow)]
)
def test_one_step_and_one_picture(change):
    "The U-Net of Stable Diffusion 1.5 at its full depth, and with --slow at its full width: 860 million random weights."
    base = full_base("sd15", latent=16, **change)
    if not change:
        assert count_parameters(base.unet)["total"] == 859_520_964
    z = torch.randn(1, 4, 16, 16, generator=generator("z"))
    table = train(
        base,
        z,
        encode_text(base, "a cat"),
        config=TrainConfig(train_steps=1, batch_size=1, val_every=0),
        progress=False,
    )
    assert len(table) == 1 and np.isfinite(table.loss).all() and table.grad_norm.item() > 0
    layers = lora_layers(base.unet)
    assert len(layers) == 64 and all(m.lora_B.any() for m in layers.values())
    drawn = generate(base, "a cat", 0, "euler", 2, 2.0, progress=False)
    assert drawn.images.shape == (1, 32, 32, 3) and drawn.images.std() > 0 and drawn.table.passes.item() == 4
