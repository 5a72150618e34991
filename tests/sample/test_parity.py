"""Parity with other libraries: PEFT's layers, diffusers' and k-diffusion's samplers, diffusers' LoRA files.

The notebooks test everything against formulas. Here the same things are held against other people's code, on the same
numbers. A library that is not installed skips its tests.
"""

import importlib
import json
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from stylelora.adapters.files import load_lora, read_lora, save_lora
from stylelora.adapters.lora import (
    LoRAConv2d,
    LoRALinear,
    count_parameters,
    inject,
    load_state,
    lora_layers,
    lora_state,
    merge,
    remove,
)
from stylelora.core import generator
from stylelora.models.base import tiny_base
from stylelora.noise.schedule import Schedule
from stylelora.noise.sigmas import brownian_noise, get_sigmas, get_timesteps
from stylelora.sample.generate import generate
from stylelora.sample.samplers import (
    SAMPLERS,
    mixture_model,
    sample_ddim,
    sample_dpmpp_2m,
    sample_dpmpp_2m_sde,
    sample_euler,
    sample_euler_ancestral,
    sample_heun,
    sample_unipc,
    split_noise,
)

SD = Schedule("scaled_linear")
SD_CONFIG = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


@pytest.fixture(scope="session")
def peft():
    return pytest.importorskip("peft")


@pytest.fixture(scope="session")
def diffusers():
    return pytest.importorskip("diffusers")


@pytest.fixture(scope="session")
def kd():
    "k-diffusion's sampling module."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module("k_diffusion.sampling")
        except ImportError as e:
            pytest.skip(f"k-diffusion is not installed ({e})")


def close(a, b, eps):
    assert (a - b).abs().max().item() <= eps, (a - b).abs().max().item()


# ---------------------------------------------------------------- the adapter


def peft_twin(peft, base, layer, alpha):
    "Wrap a base layer with PEFT and give it our A and B."
    net = nn.Sequential(base)
    config = peft.LoraConfig(r=layer.rank, lora_alpha=alpha, target_modules=["0"])
    wrapped = peft.get_peft_model(net, config)
    theirs = wrapped.base_model.model[0]
    with torch.no_grad():
        theirs.lora_A.default.weight.copy_(layer.lora_A)
        theirs.lora_B.default.weight.copy_(layer.lora_B)
    return theirs


LAYERS = [
    (nn.Linear, (24, 16), {}, (3, 5, 24)),
    (nn.Conv2d, (6, 10, 3), dict(padding=1), (2, 6, 9, 9)),
    (nn.Conv2d, (6, 10, 3), dict(padding=1, stride=2), (2, 6, 9, 9)),
    (nn.Conv2d, (6, 10, 1), {}, (2, 6, 9, 9)),
]


@pytest.mark.parametrize("kind, args, kw, shape", LAYERS)
def test_layer_is_peft(peft, kind, args, kw, shape):
    "Forward, update of the weight and merged weight are PEFT's."
    g = generator("peft", args, kw)
    base, x = kind(*args, **kw), torch.randn(shape, generator=g)
    layer = (LoRALinear if kind is nn.Linear else LoRAConv2d)(base, rank=4, lora_alpha=6, generator=g)
    nn.init.normal_(layer.lora_B, generator=g)
    ours, delta, bare = layer(x), layer.delta_weight(), base.weight.detach().clone()
    theirs = peft_twin(peft, base, layer, 6)
    close(ours, theirs(x), 1e-5)
    close(delta, theirs.get_delta_weight("default"), 1e-5)
    layer.merge()
    close(layer(x), ours, 1e-5)
    layer.unmerge()
    assert torch.equal(base.weight, bare)


def test_start_is_peft(peft):
    "A starts with the same distribution as PEFT's: same bound, same spread; B is zero in both."
    ours = LoRALinear(nn.Linear(512, 8), rank=64, generator=generator("start"))
    theirs = peft.get_peft_model(
        nn.Sequential(nn.Linear(512, 8)), peft.LoraConfig(r=64, target_modules=["0"])
    )
    theirs = theirs.base_model.model[0].lora_A.default.weight
    assert abs(ours.lora_A.std() / theirs.std() - 1) < 0.02  # 32,768 numbers each
    assert abs(ours.lora_A.abs().max() / theirs.abs().max() - 1) < 0.01


def test_count_is_peft(peft):
    "Trainable and total parameters are counted as PEFT counts them."
    ours, twin = tiny_base().unet, tiny_base().unet
    names = inject(ours, "attention", rank=4)
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=names), twin)
    n = count_parameters(ours)
    assert n["total"] == sum(p.numel() for p in twin.parameters())
    assert n["trainable"] == sum(p.numel() for k, p in twin.named_parameters() if "lora_" in k)


def test_sd15_counts(diffusers):
    "On the shapes of Stable Diffusion 1.5 the named targets hit the published numbers of layers."
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    assert abs(sum(p.numel() for p in unet.parameters()) / 1e6 - 859.5) < 0.1
    for target, layers, per_rank in (
        ("cross_attention", 64, None),
        ("attention", 128, 199_296),
        ("attention_ff", 192, 423_936),
        ("conv", 278, None),
    ):
        assert len(inject(unet, target, rank=4)) == layers
        if per_rank:
            assert count_parameters(unet)["trainable"] == 4 * per_rank
        remove(unet)


# ---------------------------------------------------------------- noise levels


@pytest.mark.parametrize("timestep_spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("n", [5, 10, 20, 30, 50])
def test_timesteps_are_diffusers(diffusers, timestep_spacing, n):
    "Timesteps and noise levels are those of diffusers' Euler, which interpolates sigma where we interpolate its log."
    theirs = diffusers.EulerDiscreteScheduler(**SD_CONFIG, timestep_spacing=timestep_spacing, steps_offset=1)
    theirs.set_timesteps(n)
    close(get_timesteps(n, timestep_spacing), theirs.timesteps.double(), 1e-4)  # fractional steps in float32
    ours = get_sigmas(SD, n, timestep_spacing)
    eps = 1e-5 if timestep_spacing != "linspace" else 1e-4  # theirs are float32 tables
    assert ((ours - theirs.sigmas)[:-1].abs() / ours[:-1]).max() < eps and ours[-1] == theirs.sigmas[-1] == 0


@pytest.mark.parametrize("n", [5, 10, 20, 30, 50])
def test_ddim_and_dpm_timesteps_are_diffusers(diffusers, n):
    ddim = diffusers.DDIMScheduler(**SD_CONFIG, steps_offset=1)
    ddim.set_timesteps(n)
    assert get_timesteps(n, "leading").tolist() == ddim.timesteps.tolist()
    dpm = diffusers.DPMSolverMultistepScheduler(**SD_CONFIG)
    dpm.set_timesteps(n)
    assert get_timesteps(n, "dpm").tolist() == dpm.timesteps.tolist()
    unipc = diffusers.UniPCMultistepScheduler(**SD_CONFIG)
    unipc.set_timesteps(n)
    for name, theirs in (("dpmpp_2m", dpm), ("dpmpp_2m_sde", dpm), ("unipc", unipc)):
        assert (SAMPLERS[name].sigmas(SD, n) - theirs.sigmas).abs().max() < 1e-4


@pytest.mark.parametrize("n", [5, 10, 30])
def test_karras_and_exponential_are_k_diffusion(kd, n):
    low, high = SD.sigmas[0].item(), SD.sigmas[-1].item()
    close(get_sigmas(SD, n, "karras"), kd.get_sigmas_karras(n, low, high).double(), 1e-5)
    close(get_sigmas(SD, n, "exponential"), kd.get_sigmas_exponential(n, low, high).double(), 1e-5)


def test_start_is_diffusers(diffusers):
    "The size of the starting noise follows diffusers, for each sampler's own spacing."
    for name, cls, kw in (
        ("euler", "EulerDiscreteScheduler", {}),
        ("dpmpp_2m", "DPMSolverMultistepScheduler", {}),
        ("euler_ancestral", "EulerAncestralDiscreteScheduler", {}),
        ("unipc", "UniPCMultistepScheduler", {}),
        ("heun", "HeunDiscreteScheduler", {}),
        ("dpmpp_2m_sde", "DPMSolverMultistepScheduler", {}),
        ("ddim", "DDIMScheduler", dict(steps_offset=1)),
    ):
        theirs = getattr(diffusers, cls)(**SD_CONFIG, **kw)
        theirs.set_timesteps(20)
        s = SAMPLERS[name]
        first = s.sigmas(SD, 20)[0]
        factor = s.start(first) / (
            (1 + first**2) ** 0.5 if s.unit_start else 1
        )  # unit_start: theirs is divided by sqrt
        assert abs(factor / float(theirs.init_noise_sigma) - 1) < 1e-5, name


# ---------------------------------------------------------------- samplers against diffusers, on the same numbers

MODEL = mixture_model([-1.0, 0.2, 1.3], std=0.3)


def eps_at(sigma):
    "Make the exact noise prediction at one noise level, as a function of the unit-variance sample that diffusers holds."
    return lambda xt: (xt * (1 + sigma**2) ** 0.5 - MODEL(xt * (1 + sigma**2) ** 0.5, sigma)) / sigma


def start(name, n=2, dtype=torch.float64):
    return torch.randn(n, 4, 8, 8, generator=generator(name), dtype=dtype)


def run_vp(scheduler, x, **kw):
    "Run a diffusers scheduler that holds unit-variance samples (DDIM, DPM++, UniPC), at its own noise levels."
    a = scheduler.alphas_cumprod.double()
    for i, t in enumerate(scheduler.timesteps):
        sigma = (
            scheduler.sigmas[i].item()
            if hasattr(scheduler, "sigmas")
            else ((1 - a[int(t)]) / a[int(t)]).sqrt().item()
        )
        x = scheduler.step(eps_at(sigma)(x), t, x, **kw).prev_sample
    return x


def run_ve(scheduler, x, model=MODEL, **kw):
    "Run a diffusers scheduler that holds x0 + sigma*eps (Euler): the proper loop, scaling only what the model sees."
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas.double().tolist()):
        scheduler.scale_model_input(x, t)
        x = scheduler.step((x - model(x, sigma)) / sigma, t, x, **kw).prev_sample
    return x


@pytest.mark.parametrize("n", [10, 20, 50])
@pytest.mark.parametrize("to_one", [False, True])
@pytest.mark.parametrize("timestep_spacing", ["leading", "trailing"])
def test_ddim_is_diffusers(diffusers, n, to_one, timestep_spacing):
    "DDIM, both final-step rules. (diffusers steps by T//n whatever the spacing, so linspace cannot agree by design.)"
    theirs = diffusers.DDIMScheduler(
        **SD_CONFIG,
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=to_one,
        timestep_spacing=timestep_spacing,
    )
    theirs.set_timesteps(n)
    sigmas, x = get_sigmas(SD, n, timestep_spacing, "zero" if to_one else "sigma_min"), start("ddim")
    ours = sample_ddim(MODEL, x * (1 + sigmas[0] ** 2) ** 0.5, sigmas) / (1 + sigmas[-1] ** 2) ** 0.5
    close(ours, run_vp(theirs, x), 1e-5)


def test_ddim_with_fresh_noise_is_diffusers(diffusers):
    theirs = diffusers.DDIMScheduler(**SD_CONFIG, steps_offset=1, clip_sample=False, set_alpha_to_one=False)
    theirs.set_timesteps(20)
    sigmas, x, z = (
        get_sigmas(SD, 20, final="sigma_min"),
        start("eta"),
        torch.stack([start(i) for i in range(20)]),
    )
    for eta in (0.5, 1.0):
        xt = x
        for t, noise in zip(theirs.timesteps, z):
            a = theirs.alphas_cumprod[t].double().item()
            xt = theirs.step(
                eps_at(((1 - a) / a) ** 0.5)(xt), t, xt, eta=eta, variance_noise=noise
            ).prev_sample
        queue = iter(z)
        ours = sample_ddim(
            MODEL, x * (1 + sigmas[0] ** 2) ** 0.5, sigmas, eta=eta, noise_sampler=lambda *_: next(queue)
        )
        close(ours / (1 + sigmas[-1] ** 2) ** 0.5, xt, 1e-5)


@pytest.mark.parametrize("n", [10, 20, 50])
@pytest.mark.parametrize(
    "timestep_spacing, final",
    [
        ("leading", "zero"),
        ("leading", "sigma_min"),
        ("trailing", "zero"),
        ("trailing", "sigma_min"),
        ("linspace", "zero"),
    ],
)
def test_euler_is_diffusers(diffusers, n, timestep_spacing, final):
    "Euler on the scheduler's own noise levels, and on ours where the timesteps are whole."
    theirs = diffusers.EulerDiscreteScheduler(
        **SD_CONFIG, timestep_spacing=timestep_spacing, steps_offset=1, final_sigmas_type=final
    )
    theirs.set_timesteps(n)
    x = start("euler") * theirs.sigmas[0].item()
    reference = run_ve(theirs, x)
    close(sample_euler(MODEL, x, theirs.sigmas), reference, 1e-5)
    if timestep_spacing != "linspace":
        close(sample_euler(MODEL, x, get_sigmas(SD, n, timestep_spacing, final)), reference, 1e-5)


def test_euler_ancestral_is_diffusers(diffusers, monkeypatch):
    theirs = diffusers.EulerAncestralDiscreteScheduler(**SD_CONFIG)
    theirs.set_timesteps(20)
    x, z = start("a") * theirs.sigmas[0].item(), [start(i) for i in range(20)]
    queue, module = iter(z), importlib.import_module(type(theirs).__module__)
    monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: next(queue))
    reference, again = run_ve(theirs, x), iter(z)
    ours = sample_euler_ancestral(MODEL, x, theirs.sigmas, noise_sampler=lambda *_: next(again))
    close(ours, reference, 1e-5)


@pytest.mark.parametrize("n", [10, 20, 50])
def test_heun_is_diffusers(diffusers, n):
    "Heun, on diffusers' noise levels (its list repeats each inner level)."
    theirs = diffusers.HeunDiscreteScheduler(**SD_CONFIG)
    theirs.set_timesteps(n)
    levels = theirs.sigmas.double()
    sigmas = torch.cat([levels[:1], levels[1:-1:2], levels[-1:]])
    x = start("heun") * levels[0].item()
    close(sample_heun(MODEL, x, sigmas), run_ve(theirs, x), 1e-5)


@pytest.mark.parametrize("n", [10, 20, 50])
@pytest.mark.parametrize("karras", [False, True])
def test_dpmpp_2m_is_diffusers(diffusers, n, karras):
    "2M in variance-exploding coordinates is diffusers' solver in variance-preserving ones."
    theirs = diffusers.DPMSolverMultistepScheduler(**SD_CONFIG, use_karras_sigmas=karras)
    theirs.set_timesteps(n)
    sigmas, x = theirs.sigmas.double(), start("2m")
    xt = run_vp(theirs, x)
    close(sample_dpmpp_2m(MODEL, x * (1 + sigmas[0] ** 2) ** 0.5, sigmas), xt, 1e-5)


@pytest.mark.parametrize("n", [5, 10, 20, 50])
@pytest.mark.parametrize("karras", [False, True])
def test_unipc_is_diffusers(diffusers, n, karras):
    "UniPC of order two; diffusers solves for its weights, ours are in closed form."
    theirs = diffusers.UniPCMultistepScheduler(**SD_CONFIG, use_karras_sigmas=karras)
    theirs.set_timesteps(n)
    sigmas, x = theirs.sigmas.double(), start("unipc")
    xt = run_vp(theirs, x)
    ours = sample_unipc(MODEL, x * (1 + sigmas[0] ** 2) ** 0.5, sigmas)
    close(ours, xt, 1e-5)
    assert (
        ours - sample_dpmpp_2m(MODEL, x * (1 + sigmas[0] ** 2) ** 0.5, sigmas)
    ).abs().max() > 1e-3  # it is not 2M


@pytest.mark.parametrize("n", [10, 20, 50])
@pytest.mark.parametrize("karras", [False, True])
def test_dpmpp_2m_sde_is_diffusers(diffusers, n, karras):
    "2M SDE on the same noise; diffusers draws once more at the end, for nothing."
    theirs = diffusers.DPMSolverMultistepScheduler(
        **SD_CONFIG, use_karras_sigmas=karras, algorithm_type="sde-dpmsolver++"
    )
    theirs.set_timesteps(n)
    sigmas, x, z = theirs.sigmas.double(), start("2m sde"), [start(i) for i in range(n)]
    xt, queue = x, iter(z)
    for t, s, noise in zip(theirs.timesteps, sigmas, z):
        xt = theirs.step(eps_at(s.item())(xt), t, xt, variance_noise=noise).prev_sample
    close(
        sample_dpmpp_2m_sde(
            MODEL, x * (1 + sigmas[0] ** 2) ** 0.5, sigmas, noise_sampler=lambda *_: next(queue)
        ),
        xt,
        1e-5,
    )
    assert len(list(queue)) == 1


# ---------------------------------------------------------------- samplers against k-diffusion, on the same noise levels


def kd_model(x, sigma):
    return MODEL(x, float(sigma[0]))


@pytest.mark.parametrize("timestep_spacing", ["leading", "linspace", "karras"])
@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m"])
def test_ode_samplers_are_k_diffusion(kd, name, timestep_spacing):
    for dtype in (torch.float64, torch.float32):
        sigmas = get_sigmas(SD, 20, timestep_spacing).to(dtype)
        x = start(name, dtype=dtype) * sigmas[0]
        theirs = getattr(kd, f"sample_{name}")(kd_model, x, sigmas, disable=True)
        close(SAMPLERS[name].run(MODEL, x, sigmas), theirs, 1e-5)


def test_euler_ancestral_is_k_diffusion(kd):
    sigmas, z = get_sigmas(SD, 20, "karras"), [start(i) for i in range(20)]
    x = start("ka") * sigmas[0]
    for eta in (0.4, 1.0):
        one, two = iter(z), iter(z)
        theirs = kd.sample_euler_ancestral(
            kd_model, x, sigmas, disable=True, eta=eta, noise_sampler=lambda *_: next(one)
        )
        close(
            sample_euler_ancestral(MODEL, x, sigmas, eta=eta, noise_sampler=lambda *_: next(two)),
            theirs,
            1e-5,
        )


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_dpmpp_2m_sde_is_k_diffusion_at_every_eta(kd, eta):
    sigmas, z = get_sigmas(SD, 20, "karras"), [start(i) for i in range(20)]
    x, one, two = start("2m eta") * sigmas[0], iter(z), iter(z)
    theirs = kd.sample_dpmpp_2m_sde(
        kd_model, x, sigmas, disable=True, eta=eta, noise_sampler=lambda *_: next(one)
    )
    close(sample_dpmpp_2m_sde(MODEL, x, sigmas, eta=eta, noise_sampler=lambda *_: next(two)), theirs, 1e-5)


@pytest.mark.parametrize("ours_first", [False, True])
@pytest.mark.parametrize("timestep_spacing", ["linspace", "karras"])
@pytest.mark.parametrize("name", ["dpmpp_sde", "dpmpp_2m_sde"])
def test_sde_samplers_are_k_diffusion(kd, name, timestep_spacing, ours_first):
    """The SDE samplers on one Brownian path, k-diffusion's or ours: recorded in their run, replayed in ours.

    Both must ask for the same increments; their tree itself is not continuous below its tolerance of 1e-6."""
    sigmas = get_sigmas(SD, 20, timestep_spacing)
    x = start("sde") * sigmas[0]
    gens = [generator("path", i) for i in range(2)]
    source = (
        brownian_noise((4, 8, 8), gens, sigmas, dtype=x.dtype)
        if ours_first
        else kd.BrownianTreeNoiseSampler(x, sigmas[-2], sigmas[0], seed=3)
    )
    asked = []

    def record(a, b):
        asked.append((float(a), float(b), source(a, b)))
        return asked[-1][2]

    theirs = getattr(kd, f"sample_{name}")(kd_model, x, sigmas, disable=True, noise_sampler=record)
    ours, queue = SAMPLERS[name].run, iter(asked)

    def replay(a, b):
        sigma, sigma_next, noise = next(queue)
        assert math.isclose(a, sigma, rel_tol=1e-9) and math.isclose(b, sigma_next, rel_tol=1e-9)
        return noise

    close(ours(MODEL, x, sigmas, noise_sampler=replay), theirs, 1e-5)
    if ours_first:
        close(ours(MODEL, x, sigmas, noise_sampler=source), theirs, 1e-4)


# ---------------------------------------------------------------- published sums

LINEAR = Schedule("linear", beta_start=1e-4, beta_end=0.02)
SAMPLE = (torch.arange(4 * 3 * 8 * 8).double() / 768).reshape(3, 8, 8, 4).permute(3, 0, 1, 2)


def toy(schedule, prediction="epsilon"):
    "Show diffusers' toy network x*t/(t+1) as a denoiser in our coordinates."

    def model(x, sigma):
        t = schedule.t_at(sigma).round().item()
        xt = x / (1 + sigma**2) ** 0.5
        out = xt * t / (t + 1)
        return (
            x - sigma * out
            if prediction == "epsilon"
            else xt / (1 + sigma**2) ** 0.5 - sigma / (1 + sigma**2) ** 0.5 * out
        )

    return model


def golden_ddim(schedule=LINEAR, prediction="epsilon", final="zero", first=0):
    sigmas = get_sigmas(schedule, 10, offset=0, final=final)
    x = SAMPLE * (1 + sigmas[0] ** 2) ** 0.5
    if first:
        noise = (
            torch.flip(SAMPLE.permute(1, 2, 3, 0).reshape(-1), (0,)).reshape(3, 8, 8, 4).permute(3, 0, 1, 2)
        )
        sigmas = sigmas[first:]
        x = SAMPLE + sigmas[0] * noise
    model = toy(schedule, prediction)
    if final == "zero":
        return sample_ddim(model, x, sigmas, clip=1.0).abs().sum().item()
    x, s = (
        sample_ddim(model, x, sigmas[:-1], clip=1.0),
        sigmas[-2].item(),
    )  # diffusers' last step stays at t = 0,
    x = model(x, s).clamp(-1, 1) + (x - model(x, s))  # where nothing but the clipping acts
    return (x / (1 + s**2) ** 0.5).abs().sum().item()


@pytest.mark.parametrize(
    "kw, expected",
    [
        ({}, 172.0067),
        (dict(prediction="v_prediction"), 52.5302),
        (dict(first=8), 354.5418),
        (dict(schedule=Schedule("linear", beta_start=0.01, beta_end=0.02)), 149.8295),
        (dict(schedule=Schedule("linear", beta_start=0.01, beta_end=0.02), final="sigma_min"), 149.0784),
    ],
)
def test_ddim_goldens(kw, expected):
    "diffusers' own full-loop sums; its tests allow 1e-2."
    assert abs(golden_ddim(**kw) - expected) < 1e-2


def test_ddim_variance_goldens():
    for t, t_next, expected in (
        (420, 400, 0.14771),
        (980, 960, 0.32460),
        (487, 486, 0.00979),
        (999, 998, 0.02),
    ):
        s, s_next = LINEAR.sigmas[t].item(), LINEAR.sigmas[t_next].item()
        assert abs(split_noise(s, s_next)[1] ** 2 / (1 + s_next**2) - expected) < 1e-5
    assert get_timesteps(5).tolist() == [801, 601, 401, 201, 1]


@pytest.mark.parametrize("prediction, expected", [("epsilon", 0.3301), ("v_prediction", 0.2251)])
def test_dpmpp_2m_goldens(prediction, expected):
    sigmas = get_sigmas(LINEAR, 10, "dpm", "sigma_min")
    x = (
        sample_dpmpp_2m(toy(LINEAR, prediction), SAMPLE * (1 + sigmas[0] ** 2) ** 0.5, sigmas)
        / (1 + sigmas[-1] ** 2) ** 0.5
    )
    assert abs(x.abs().mean().item() - expected) < 1e-3


def test_euler_golden_is_a_trap():
    "The sum of a proper Euler run; diffusers' test feeds the scaled sample back and expects another number."
    schedule = Schedule("linear", n_train=1100, beta_start=1e-4, beta_end=0.02)

    def model(x, sigma):
        t = schedule.t_at(sigma).item()
        return x - sigma * x / (1 + sigma**2) ** 0.5 * t / (t + 1)

    sigmas = get_sigmas(schedule, 10, "linspace")
    assert abs(sample_euler(model, SAMPLE * sigmas[0], sigmas).abs().sum().item() - 168.0514) < 1e-2


# ---------------------------------------------------------------- pipelines and files


def pipeline(diffusers, base, scheduler=None):
    "Build diffusers' pipeline around the networks of a base."
    p = diffusers.StableDiffusionPipeline(
        unet=base.unet,
        vae=base.vae,
        text_encoder=base.text_encoder,
        tokenizer=base.tokenizer,
        scheduler=scheduler
        or diffusers.DDIMScheduler(**SD_CONFIG, steps_offset=1, clip_sample=False, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    p.set_progress_bar_config(disable=True)
    return p


def draw(pipe, prompts, seeds, steps=10, guidance_scale=5.0, **kw):
    "Draw with the pipeline; bytes (n,h,w,3)."
    images = pipe(
        prompts,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        output_type="np",
        generator=[torch.Generator().manual_seed(s) for s in seeds],
        **kw,
    ).images
    return (images * 255).round().astype(np.uint8)


def adapted(target_modules="attention_ff", rank=3, alpha=5.0, seed="adapter"):
    "A tiny base with a trained-looking adapter."
    base, g = tiny_base(), generator(seed)
    inject(base.unet, target_modules, rank=rank, lora_alpha=alpha, generator=g)
    for m in lora_layers(base.unet).values():
        nn.init.normal_(m.lora_B, std=0.3, generator=g)
    return base


PEERS = [
    ("ddim", "DDIMScheduler", dict(steps_offset=1, clip_sample=False, set_alpha_to_one=False)),
    ("euler", "EulerDiscreteScheduler", {}),
    ("dpmpp_2m", "DPMSolverMultistepScheduler", {}),
    ("heun", "HeunDiscreteScheduler", {}),
    ("unipc", "UniPCMultistepScheduler", {}),
]


@pytest.mark.parametrize("name, cls, kw", PEERS)
def test_generate_is_the_pipeline(diffusers, name, cls, kw):
    "Prompt, negative prompt, guidance, seed: the same bytes as diffusers' pipeline, but for a rounding."
    base = tiny_base()
    theirs = draw(
        pipeline(diffusers, base, getattr(diffusers, cls)(**SD_CONFIG, **kw)),
        ["a cat", "a dog"],
        [0, 1],
        negative_prompt=["red", "red"],
    )
    ours = generate(
        base, ["a cat", "a dog"], [[0], [1]], name, 10, 5.0, negative_prompt="red", progress=False
    ).images
    assert np.abs(theirs.astype(int) - ours).max() <= 1


@pytest.mark.parametrize("target_modules", ["cross_attention", "attention_ff", "conv"])
def test_diffusers_reads_our_file(diffusers, peft, tmp_path, target_modules):
    "load_lora_weights finds every layer, at the right scale, and the pipeline draws the same picture."
    base = adapted(target_modules)
    ours = generate(
        base, ["a cat", "a dog"], [[0], [1]], num_inference_steps=10, guidance_scale=5.0, progress=False
    ).images
    state, layers = lora_state(base.unet), lora_layers(base.unet)
    delta = {n: m.delta_weight() for n, m in layers.items()}
    file = save_lora(base.unet, tmp_path / "a.safetensors", dict(note="any"))
    fresh = tiny_base()
    pipe = pipeline(diffusers, fresh)
    bare = draw(pipe, ["a cat", "a dog"], [0, 1])
    pipe.load_lora_weights(str(file))
    found = {n: m for n, m in pipe.unet.named_modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")}
    assert set(found) == set(state)
    for n, m in found.items():
        close(m.get_delta_weight(next(iter(m.lora_A))), delta[n], 1e-5)
    theirs = draw(pipe, ["a cat", "a dog"], [0, 1])
    assert np.abs(theirs.astype(int) - ours).max() <= 1 and np.abs(theirs.astype(int) - bare).max() > 1


def test_diffusers_reads_mixed_ranks(diffusers, peft, tmp_path):
    "Ranks and alphas that differ from layer to layer arrive through the header."
    base, g = tiny_base(), generator("mixed")
    names = inject(base.unet, "attention", rank=2)
    state = lora_state(base.unet)
    for i, n in enumerate(names):
        r, (d, k) = 1 + i % 3, (len(state[n]["B"]), state[n]["A"].shape[1])
        state[n] = dict(
            A=torch.randn(r, k, generator=g), B=torch.randn(d, r, generator=g), alpha=float(1 + i % 2)
        )
    remove(base.unet)
    load_state(base.unet, state)
    delta = {n: m.delta_weight() for n, m in lora_layers(base.unet).items()}
    file = save_lora(base.unet, tmp_path / "a.safetensors")
    pipe = pipeline(diffusers, tiny_base())
    pipe.load_lora_weights(str(file))
    for n, d in delta.items():
        close(pipe.unet.get_submodule(n).get_delta_weight(pipe.get_active_adapters()[0]), d, 1e-5)


def random_peft(peft, unet, **config):
    "Inject a PEFT adapter with random numbers."
    peft.inject_adapter_in_model(peft.LoraConfig(**config), unet)
    g = generator("peft")
    with torch.no_grad():
        for k, p in unet.named_parameters():
            if "lora_B" in k:
                p.copy_(torch.randn(p.shape, generator=g) * 0.3)
    return {
        n: m.get_delta_weight("default")
        for n, m in unet.named_modules()
        if hasattr(m, "base_layer") and hasattr(m, "get_delta_weight")
    }


CONFIGS = [
    dict(r=3, lora_alpha=5, target_modules=["to_q", "to_k", "to_v", "to_out.0"]),
    dict(r=4, lora_alpha=4, target_modules=["to_q", "conv1", "proj_in", "ff.net.2"]),
    dict(r=4, lora_alpha=8, use_rslora=True, target_modules=["attn2.to_k"]),
    dict(
        r=4,
        lora_alpha=8,
        target_modules=["to_q", "to_k"],
        rank_pattern={"attn2.to_q": 2},
        alpha_pattern={"attn1.to_k": 3},
    ),
]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("header", [True, False])
def test_we_read_diffusers_files(diffusers, peft, tmp_path, config, header):
    "A file written by diffusers loads here: every layer, the same update, the same picture."
    base = tiny_base()
    delta = random_peft(peft, base.unet, **config)
    tensors = peft.get_peft_model_state_dict(base.unet)
    metadata = {
        k: (sorted(v) if isinstance(v, set) else v)
        for k, v in base.unet.peft_config["default"].to_dict().items()
    }
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=tensors, unet_lora_adapter_metadata=metadata if header else None
    )
    theirs = draw(pipeline(diffusers, base), ["a cat"], [0])
    fresh = tiny_base()
    load_lora(fresh.unet, tmp_path)
    layers = lora_layers(fresh.unet)
    assert set(layers) == set(delta)
    if not header:
        return  # such a file says nothing of alpha; alpha = rank is the convention
    for n, m in layers.items():
        close(m.delta_weight(), delta[n], 1e-5)
    ours = generate(fresh, "a cat", 0, num_inference_steps=10, guidance_scale=5.0, progress=False).images
    assert np.abs(theirs.astype(int) - ours).max() <= 1


@pytest.mark.parametrize("config", CONFIGS)
def test_we_read_peft_folders(peft, tmp_path, config):
    "A folder written by PEFT alone loads here, with the scale of its configuration file."
    unet = tiny_base().unet
    model = peft.get_peft_model(unet, peft.LoraConfig(**config))
    g = generator("folder")
    with torch.no_grad():
        for k, p in model.named_parameters():
            if "lora_B" in k:
                p.copy_(torch.randn(p.shape, generator=g) * 0.3)
    model.save_pretrained(tmp_path)
    delta = {
        n.removeprefix("base_model.model."): m.get_delta_weight("default")
        for n, m in model.named_modules()
        if hasattr(m, "base_layer") and hasattr(m, "get_delta_weight")
    }
    fresh = tiny_base().unet
    load_lora(fresh, tmp_path)
    assert set(lora_layers(fresh)) == set(delta)
    for n, m in lora_layers(fresh).items():
        close(m.delta_weight(), delta[n], 1e-5)


@pytest.mark.parametrize("name, cls, kw", PEERS)
@pytest.mark.parametrize("strength", [0.3, 0.7, 1.0])
def test_image_to_image_is_the_pipeline(diffusers, name, cls, kw, strength):
    "Same starting picture, seed and strength: the same bytes as diffusers' image-to-image pipeline, but for a rounding."
    base = tiny_base()
    p = pipeline(diffusers, base, getattr(diffusers, cls)(**SD_CONFIG, **kw))
    i2i = diffusers.StableDiffusionImg2ImgPipeline(**p.components, requires_safety_checker=False)
    i2i.set_progress_bar_config(disable=True)
    picture = torch.linspace(-1, 1, 16).expand(1, 3, 16, 16)
    theirs = draw(i2i, ["a cat"], [3], image=(picture + 1) / 2, strength=strength)
    ours = generate(base, "a cat", 3, name, 10, 5.0, images=picture, strength=strength, progress=False).images
    assert np.abs(theirs.astype(int) - ours).max() <= 1


def test_file_of_a_merged_base(diffusers, tmp_path):
    "A base with the adapter merged for good is an ordinary pipeline that draws the adapter's picture."
    base = adapted()
    ours = generate(base, "a cat", 0, num_inference_steps=10, guidance_scale=5.0, progress=False).images
    merge(base.unet, keep=False)
    assert np.abs(draw(pipeline(diffusers, base), ["a cat"], [0]).astype(int) - ours).max() <= 1


def test_safetensors_reads_us(tmp_path):
    "The official reader finds tensors and header; the header fits the oldest LoraConfig fields."
    from safetensors import safe_open

    base = adapted("cross_attention")
    file = save_lora(base.unet, tmp_path / "a.safetensors", dict(seed=1))
    with safe_open(file, "pt") as f:
        assert len(f.keys()) == 2 * len(lora_layers(base.unet)) and f.metadata()["format"] == "pt"
        config = json.loads(f.metadata()["lora_adapter_metadata"])
    assert set(config) == {
        f"unet.{k}" for k in ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern")
    }
    assert read_lora(file)[1] == dict(seed=1) and math.isclose(config["unet.lora_alpha"], 5)
