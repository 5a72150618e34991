"""What a sampler promises, beyond agreeing with other libraries: published numbers, order of convergence, variance, cost.

`test_parity.py` holds single samplers against other people's code. Here are the numbers that those people's own tests
expect, the exact probability flow of a mixture of Gaussians, the exact variance of every stochastic step on a
Gaussian, and the bookkeeping of `generate`. A library that is not installed skips its tests.
"""

import math

import numpy as np
import pytest
import torch

from stylelora.core import generator
from stylelora.models.base import tiny_base
from stylelora.noise.sigmas import brownian_noise, get_sigmas, get_timesteps, iid_noise
from stylelora.sample.generate import generate
from stylelora.sample.samplers import (
    SAMPLERS,
    mixture_model,
    sample_ddim,
    sample_dpmpp_2m,
    sample_dpmpp_2m_sde,
    sample_dpmpp_sde,
    sample_euler,
    sample_euler_ancestral,
    sample_heun,
    sample_unipc,
    split_noise,
)
from tests.sample.test_parity import LINEAR, MODEL, SAMPLE, SD, SD_CONFIG, close, draw, pipeline, start, toy


@pytest.fixture(scope="session")
def diffusers():
    return pytest.importorskip("diffusers")


# ---------------------------------------------------------------- published numbers

FLIPPED = torch.flip(SAMPLE.permute(1, 2, 3, 0).reshape(-1), (0,)).reshape(3, 8, 8, 4).permute(3, 0, 1, 2)


def test_the_schedule_of_stable_diffusion():
    "End points and crossings of the table that SD 1.5 was trained with."
    expected = {0: 0.0291672, 1: 0.0413144, 999: 14.614641}
    for t, sigma in expected.items():
        assert abs(SD.sigmas[t].item() / sigma - 1) < 1e-5
    assert abs(SD.alphas_cumprod[0] - 0.99915) < 1e-6 and abs(SD.alphas_cumprod[-1] - 0.0046601) < 1e-6
    assert [(SD.snr < v).nonzero()[0].item() for v in (5, 1)] == [147, 354]


@pytest.mark.parametrize(
    "timestep_spacing, first, last, sigma",
    [
        ("leading", (951, 901, 851), (101, 51, 1), 11.0283),
        ("trailing", (999, 949, 899), (99, 49), 14.6146),
        ("linspace", (999, 946.42, 893.84), (52.58, 0), 14.6146),
        ("dpm", (999, 949, 899), (100, 50), 14.6146),
    ],
)
def test_timesteps_of_twenty_steps(timestep_spacing, first, last, sigma):
    t = get_timesteps(20, timestep_spacing).tolist()
    assert (
        len(t) == 20
        and np.allclose(t[:3], first, atol=0.006)
        and np.allclose(t[-len(last) :], last, atol=0.006)
    )
    assert abs(get_sigmas(SD, 20, timestep_spacing)[0] - sigma) < 1e-4


def test_karras_levels_of_ten_steps():
    s = get_sigmas(SD, 10, "karras")
    assert np.allclose(
        s, [14.6146, 9.1029, 5.4784, 3.1686, 1.7494, 0.9141, 0.4469, 0.2014, 0.0819, 0.0292, 0], atol=1e-4
    )
    assert np.allclose(
        SD.t_at(s[:-1]),
        [999, 916.284, 815.045, 687.153, 523.198, 327.146, 145.938, 40.856, 6.732, 0],
        atol=2e-2,
    )  # theirs are made of a float32 table


@pytest.mark.parametrize("timestep_spacing, expected", [("karras", 0.2096), ("exponential", 0.1554)])
def test_dpmpp_2m_goldens_of_other_levels(timestep_spacing, expected):
    """diffusers' loops with velocity prediction on Karras' and on Lu's levels; its tests allow 1e-3.

    Its last step goes from the smallest level to the same level, which does nothing; here it is left out. Lu's levels
    at his rho of 1 are equal steps in log sigma. The table `timesteps` is rounded there, as in our toy network."""
    sigmas = get_sigmas(LINEAR, 10, timestep_spacing)[:-1]
    x = sample_dpmpp_2m(toy(LINEAR, "v_prediction"), SAMPLE * (1 + sigmas[0] ** 2) ** 0.5, sigmas)
    assert abs((x / (1 + sigmas[-1] ** 2) ** 0.5).abs().mean().item() - expected) < 1e-3


def test_dpmpp_2m_golden_from_the_middle():
    "diffusers' loop that starts at step 5 from a noisy sample, the arithmetic of image-to-image."
    sigmas = get_sigmas(LINEAR, 10, "dpm", "sigma_min")[5:]
    x = sample_dpmpp_2m(toy(LINEAR), SAMPLE + sigmas[0] * FLIPPED, sigmas) / (1 + sigmas[-1] ** 2) ** 0.5
    assert abs(x.abs().sum().item() - 318.4111) < 1e-2


@pytest.mark.parametrize("prediction, expected", [("epsilon", 258.9606), ("v_prediction", 202.0296)])
@pytest.mark.parametrize("sampler", [sample_ddim, sample_euler_ancestral])
def test_ddpm_goldens(sampler, prediction, expected):
    """diffusers' DDPM over all thousand steps is our DDIM at eta = 1, and Euler ancestral, with a model that clips.

    (Clipping inside the model means that the noise is derived from the clipped guess, as in DDPM.)"""
    sigmas, g = torch.cat([LINEAR.sigmas.flip(0), torch.zeros(1)]), torch.Generator().manual_seed(0)
    free = toy(LINEAR, prediction)

    def model(x, sigma):
        return free(x, sigma).clamp(-1, 1)

    def noise(*_):
        return torch.randn(SAMPLE.shape, generator=g).double()

    x = sampler(model, SAMPLE * (1 + sigmas[0] ** 2) ** 0.5, sigmas, eta=1.0, noise_sampler=noise)
    assert abs(x.abs().sum().item() - expected) < 1e-2


# ---------------------------------------------------------------- order of convergence on an exact flow

MEANS, STD = torch.tensor([-1.0, 0.4, 1.5], dtype=torch.float64), 0.3
MIXTURE = mixture_model(MEANS, STD)


def cdf(x, sigma):
    return torch.special.ndtr((x[..., None] - MEANS) / (STD**2 + sigma**2) ** 0.5).mean(-1)


def exact_flow(x, sigma, sigma_next):
    "Follow the probability flow in one dimension: it keeps the order of the numbers, hence each number's quantile."
    low, high, p = torch.full_like(x, -50.0), torch.full_like(x, 50.0), cdf(x, sigma)
    for _ in range(120):
        middle = (low + high) / 2
        below = cdf(middle, sigma_next) < p
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return low


def two_stage(model, x, sigmas):
    return sample_dpmpp_sde(model, x, sigmas, eta=0.0)


def quiet(model, x, sigmas):
    return sample_dpmpp_2m_sde(model, x, sigmas, eta=0.0)


def levels(timestep_spacing, n):
    """Noise levels from 10 to 0.1: in equal steps of log sigma, in short and long steps by turns, or by Karras' rule.

    Karras' steps change slowly, so that a wrong weight of a solver's memory is still of second order; by turns it is not."""
    u = torch.linspace(0, 1, n + 1, dtype=torch.float64)
    if timestep_spacing == "karras":
        return (10 ** (1 / 7) + u * (0.1 ** (1 / 7) - 10 ** (1 / 7))) ** 7
    if timestep_spacing == "by turns":
        u = torch.cat([u[:1], (1.0 + 2 * (torch.arange(n) % 2)).double().cumsum(0) / (2 * n)])
    return 10 * 0.01**u


@pytest.mark.parametrize("timestep_spacing", ["log", "by turns", "karras"])
@pytest.mark.parametrize(
    "sampler, order",
    [
        (sample_euler, 1),
        (sample_ddim, 1),
        (sample_heun, 2),
        (sample_dpmpp_2m, 2),
        (two_stage, 2),
        (quiet, 2),
        (sample_unipc, 3),
    ],
)
def test_order_of_convergence(sampler, order, timestep_spacing):
    "Twice the steps, a half, a quarter or an eighth of the error, for equal and for unequal steps."
    x = torch.linspace(-20, 20, 41, dtype=torch.float64)
    truth = exact_flow(x, 10.0, 0.1)
    errors = [
        (sampler(MIXTURE, x, levels(timestep_spacing, n)) - truth).abs().mean().item()
        for n in (160, 320, 640)
    ]
    slopes = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert abs(slopes[-1] - order) < 0.12 and errors[-1] < {1: 2e-2, 2: 3e-4, 3: 3e-6}[order], (
        slopes,
        errors,
    )


def test_the_last_step_to_zero_is_of_first_order():
    "All solvers end with the clean guess: from .1 to 0 the error is that of one Euler step, whatever the steps before."
    x = torch.linspace(-20, 20, 41, dtype=torch.float64)
    for sampler in (sample_heun, sample_dpmpp_2m, sample_unipc):
        s = torch.cat([levels("log", 640), torch.zeros(1, dtype=torch.float64)])
        end = sampler(MIXTURE, x, s)
        close(end, MIXTURE(exact_flow(x, 10.0, 0.1), 0.1), 3e-3)


# ---------------------------------------------------------------- variance of the stochastic samplers

S0, LEVELS = 0.5, torch.logspace(1, -1, 12, dtype=torch.float64)
GAUSS = mixture_model([0.0], std=S0)


def kappa(sigma):
    return S0**2 / (S0**2 + sigma**2)


def walk_variance(sigmas, eta, kind):
    """Compute the variance after a walk, exactly: on a Gaussian every step is linear in x and in its noise.

    kind: 'one step' (DDIM, Euler ancestral), 'one path' or 'independent' (the two draws of DPM++ SDE), 'memory' (2M SDE)."""
    v, s = S0**2 + float(sigmas[0]) ** 2, [float(v) for v in sigmas]
    if kind == "memory":
        return memory_variance(v, s, eta)
    for a, b in zip(s, s[1:]):
        down, up = split_noise(a, b, eta)
        if kind == "one step":
            v = (kappa(a) + down * (1 - kappa(a)) / a) ** 2 * v + up**2
        else:
            m = (a * b) ** 0.5
            down1, up1 = split_noise(a, m, eta)
            guess = (1 - down / a) * kappa(m)  # weight of the inner state in the step
            inner = down1 / a + (1 - down1 / a) * kappa(a)
            rho = ((a - m) / (a - b)) ** 0.5 if kind == "one path" else 0.0
            v = (down / a + guess * inner) ** 2 * v + up**2 + (guess * up1) ** 2 + 2 * rho * up * guess * up1
    return v


def memory_variance(v, s, eta):
    "The same for a step that also uses the answer before: follow the covariance of the last two states."
    cov, before, h_before = np.array([[v, 0.0], [0.0, 0.0]]), 0.0, math.inf
    for a, b in zip(s, s[1:]):
        h = math.log(a / b)
        kept, q = math.exp(-(1 + eta) * h), h / (2 * h_before)
        step = np.array([[kept + (1 - kept) * (1 + q) * kappa(a), -(1 - kept) * q * before], [1.0, 0.0]])
        cov = step @ cov @ step.T + np.diag([b**2 * (1 - math.exp(-2 * eta * h)), 0.0])
        before, h_before = kappa(a), h
    return cov[0, 0]


def draws(n=400):
    return (S0**2 + LEVELS[0] ** 2) ** 0.5 * torch.randn(1, 1, 300, n, generator=generator("variance"))


RUNS = [
    (sample_ddim, 1.0, "one step"),
    (sample_ddim, 0.5, "one step"),
    (sample_euler_ancestral, 1.0, "one step"),
    (sample_euler_ancestral, 0.4, "one step"),
    (sample_dpmpp_sde, 1.0, "one path"),
    (sample_dpmpp_sde, 0.6, "one path"),
    (sample_dpmpp_sde, 1.0, "independent"),
    (sample_dpmpp_2m_sde, 1.0, "memory"),
    (sample_dpmpp_2m_sde, 0.6, "memory"),
]


@pytest.mark.parametrize("sampler, eta, kind", RUNS)
def test_variance_after_eleven_steps(sampler, eta, kind):
    "120,000 numbers through few, coarse steps: their variance is the closed form's, within four standard errors."
    g, x = [generator("noise")], draws()
    source = brownian_noise(x.shape[1:], g, LEVELS) if kind == "one path" else iid_noise(x.shape[1:], g)
    end = sampler(GAUSS, x, LEVELS, eta=eta, noise_sampler=source)
    assert abs(end.var().item() / walk_variance(LEVELS, eta, kind) - 1) < 4 * (2 / x.numel()) ** 0.5
    assert abs(end.mean().item()) < 4 * end.std().item() / x.numel() ** 0.5


@pytest.mark.parametrize("sampler, eta, kind", RUNS)
def test_variance_in_the_limit(sampler, eta, kind):
    "With more steps the variance tends to that of the data plus the noise, s**2 + sigma**2, linearly in the step."
    target, off = S0**2 + 0.1**2, []
    for n in (100, 200, 400):
        off.append(walk_variance(torch.logspace(1, -1, n + 1), eta, kind) / target - 1)
    assert abs(off[-1]) < 0.02 and abs(off[-1]) < 0.6 * abs(off[-2]) < 0.6**2 * abs(off[-3]), off


def test_the_two_draws_of_the_sde_are_correlated():
    "The closed forms tell one path from independent draws, so that the test above can fail."
    one, independent = (walk_variance(LEVELS, 1.0, k) for k in ("one path", "independent"))
    assert abs(one / independent - 1) > 8 * (2 / 120_000) ** 0.5


@pytest.mark.parametrize("karras", [False, True])
def test_dpmpp_sde_is_diffusers(diffusers, karras):
    """diffusers' DPM++ SDE on one Brownian path of ours, recorded there and replayed here.

    Both must ask for the same increments; theirs come from levels in float32, and a path is rough."""
    pytest.importorskip("torchsde")
    theirs = diffusers.DPMSolverSDEScheduler(**SD_CONFIG, use_karras_sigmas=karras)
    theirs.set_timesteps(12)
    s, asked = theirs.sigmas.double(), []
    sigmas = torch.cat([s[:1], s[1:-1:2], s[-1:]])
    x = xt = start("sde") * sigmas[0]
    path = brownian_noise(x.shape[1:], [generator("path", i) for i in range(2)], sigmas, dtype=x.dtype)

    def record(a, b):
        asked.append((float(a), float(b), path(a, b)))
        return asked[-1][2]

    theirs.noise_sampler = record
    for t in theirs.timesteps:
        theirs.scale_model_input(xt, t)
        sigma = float(
            theirs.sigmas[theirs.step_index] if theirs.state_in_first_order else theirs.mid_point_sigma
        )
        xt = theirs.step((xt - MODEL(xt, sigma)) / sigma, t, xt).prev_sample
    assert len(theirs.timesteps) == SAMPLERS["dpmpp_sde"].nfe(12) == 23
    queue = iter(asked)

    def replay(a, b):
        sigma, sigma_next, noise = next(queue)
        assert math.isclose(a, sigma, rel_tol=1e-5) and math.isclose(b, sigma_next, rel_tol=1e-5)
        return noise

    close(sample_dpmpp_sde(MODEL, x, sigmas, noise_sampler=replay), xt, 1e-4)


# ---------------------------------------------------------------- the drawing room: cost, batches, guidance


@pytest.fixture(scope="module")
def base():
    return tiny_base()


class Counted:
    "Count what passes through a network inside a `with` block."

    def __init__(self, net):
        self.net, self.seen = net, []

    def __enter__(self):
        def note(net, args, kw):
            self.seen.append((args, kw))

        self.hook = self.net.register_forward_pre_hook(note, with_kwargs=True)
        return self.seen

    def __exit__(self, *_):
        self.hook.remove()


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_every_call_is_on_the_bill(base, name, guidance_scale):
    "NFE beside steps in the table: n, or 2n - 1 for the two-stage samplers; passes and callbacks counted by a hook."
    n, reports = 7, []
    expected = 2 * n - 1 if name in ("dpmpp_sde", "heun") else n
    with Counted(base.unet) as seen:
        table = generate(
            base, ["a cat", "a dog"], 0, name, n, guidance_scale, progress=False, callback=reports.append
        ).table
    assert SAMPLERS[name].nfe(n) == expected == len(seen) and len(reports) == n
    assert (
        table[["num_inference_steps", "nfe", "passes"]].values.tolist()
        == [[n, expected, expected * (1 + (guidance_scale != 1))]] * 2
    )
    assert [len(args[0]) for args, _ in seen] == [2 * (1 + (guidance_scale != 1))] * expected
    assert (
        table.guidance_scale.tolist() == [guidance_scale] * 2
        and (table.seconds > 0).all()
        and table.sampler.tolist() == [name] * 2
    )


@pytest.mark.parametrize("name", SAMPLERS)
def test_image_to_image_pays_for_the_steps_that_it_walks(base, name):
    picture = torch.linspace(-1, 1, base.size).expand(1, 3, base.size, base.size)
    table = generate(base, "a cat", 0, name, 8, 1.0, images=picture, strength=0.5, progress=False).table
    assert table.nfe.tolist() == [SAMPLERS[name].nfe(4)] and table.strength.tolist() == [0.5]


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_picture_does_not_know_its_batch(base, name):
    "Alone, in threes, all together or in another order: the same bytes, but for a rounding."
    predict = dict(sampler=name, num_inference_steps=4, guidance_scale=3.0, progress=False)
    together = generate(base, ["a cat", "a dog"], [0, 1], batch=4, **predict).images.astype(int)
    for batch in (1, 3):
        other = generate(base, ["a cat", "a dog"], [0, 1], batch=batch, **predict).images
        assert np.abs(other - together).max() <= 1
    swapped = generate(base, ["a dog", "a cat"], [1, 0], batch=4, **predict).images
    assert np.abs(swapped[::-1] - together).max() <= 1
    assert all((together[i] != together[j]).any() for i in range(4) for j in range(i))


def test_guidance_of_one_never_asks_without_the_prompt(base):
    "No empty prompt is encoded, no second half runs, and the picture is the limit of scales that go to one."
    predict = dict(sampler="euler", num_inference_steps=5, progress=False)
    with Counted(base.text_encoder) as texts, Counted(base.unet) as passes:
        one = generate(base, ["a cat", "a dog"], 0, guidance_scale=1, **predict).images
    assert len(texts) == 1 and [len(args[0]) for args, _ in passes] == [2] * 5
    with Counted(base.text_encoder) as texts, Counted(base.unet) as passes:
        near = generate(base, ["a cat", "a dog"], 0, guidance_scale=1 + 1e-6, **predict).images
    assert len(texts) == 2 and [len(args[0]) for args, _ in passes] == [4] * 5
    assert np.abs(near.astype(int) - one).max() <= 1
    assert (
        np.abs(
            generate(base, ["a cat", "a dog"], 0, guidance_scale=7.5, **predict).images.astype(int) - one
        ).max()
        > 1
    )


@pytest.mark.parametrize("guidance_rescale", [0.3, 1.0])
def test_guidance_rescale_is_the_pipeline(diffusers, base, guidance_rescale):
    theirs = draw(
        pipeline(diffusers, base),
        ["a cat", "a dog"],
        [0, 1],
        guidance_scale=7.5,
        guidance_rescale=guidance_rescale,
    )
    ours = generate(
        base,
        ["a cat", "a dog"],
        [[0], [1]],
        "ddim",
        10,
        7.5,
        guidance_rescale=guidance_rescale,
        progress=False,
    ).images
    plain = generate(base, ["a cat", "a dog"], [[0], [1]], "ddim", 10, 7.5, progress=False).images
    assert np.abs(theirs.astype(int) - ours).max() <= 1 and np.abs(plain.astype(int) - ours).max() > 1


@pytest.mark.parametrize(
    "name, cls, kw, eta",
    [
        ("euler_ancestral", "EulerAncestralDiscreteScheduler", {}, None),
        ("dpmpp_2m_sde", "DPMSolverMultistepScheduler", dict(algorithm_type="sde-dpmsolver++"), None),
        ("ddim", "DDIMScheduler", dict(steps_offset=1, clip_sample=False, set_alpha_to_one=False), 1.0),
        ("ddim", "DDIMScheduler", dict(steps_offset=1, clip_sample=False, set_alpha_to_one=False), 0.5),
    ],
)
def test_stochastic_pictures_are_the_pipelines(diffusers, base, name, cls, kw, eta):
    "The same seeds draw the same noise in the same order, so even stochastic samplers agree in bytes."
    more = {} if eta is None else dict(eta=eta)
    pipe = pipeline(diffusers, base, getattr(diffusers, cls)(**SD_CONFIG, **kw))
    theirs = draw(pipe, ["a cat", "a dog"], [0, 1], **more)
    ours = generate(base, ["a cat", "a dog"], [[0], [1]], name, 10, 5.0, progress=False, **more).images
    assert np.abs(theirs.astype(int) - ours).max() <= 1


@pytest.mark.parametrize(
    "name, cls, kw",
    [
        ("euler_ancestral", "EulerAncestralDiscreteScheduler", {}),
        ("dpmpp_2m_sde", "DPMSolverMultistepScheduler", dict(algorithm_type="sde-dpmsolver++")),
    ],
)
def test_image_to_image_of_stochastic_samplers_is_the_pipeline(diffusers, base, name, cls, kw):
    p = pipeline(diffusers, base, getattr(diffusers, cls)(**SD_CONFIG, **kw))
    i2i = diffusers.StableDiffusionImg2ImgPipeline(**p.components, requires_safety_checker=False)
    i2i.set_progress_bar_config(disable=True)
    picture = torch.linspace(-1, 1, 16).expand(1, 3, 16, 16)
    theirs = draw(i2i, ["a cat"], [3], image=(picture + 1) / 2, strength=0.6)
    ours = generate(base, "a cat", 3, name, 10, 5.0, images=picture, strength=0.6, progress=False).images
    assert np.abs(theirs.astype(int) - ours).max() <= 1
