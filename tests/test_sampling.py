"""Sampling: equal to diffusers' own pipelines and schedulers, the same whatever the batch size, and it leaves
the model as it was.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn

from fastunlearn.host.finite import NotFiniteError
from fastunlearn.models.sampling import (
    check_injection,
    check_sampling,
    inject_and_denoise,
    noised,
    sample,
    sample_seed,
)

diffusers = pytest.importorskip("diffusers")
SHAPE = (1, 8, 8)
CENTER, SPREAD = 0.3, 0.1  # of Gaussian data


@pytest.fixture
def scheduler():
    return diffusers.DDPMScheduler(num_train_timesteps=100, beta_start=1e-3, beta_end=0.2, clip_sample=False)


@pytest.fixture
def exact(scheduler):
    return gaussian_model(scheduler)


def gaussian_model(scheduler):
    """The perfect epsilon-prediction for data N(CENTER, SPREAD^2), elementwise."""

    def predict(x, t):
        abar = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
        return (1 - abar).sqrt() * (x - abar.sqrt() * CENTER) / (abar * SPREAD**2 + 1 - abar)

    return predict


@pytest.fixture
def unet():
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    widths = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    return diffusers.UNet2DModel(sample_size=8, in_channels=1, out_channels=1, **widths, **blocks)


def test_images_on_another_scale_are_refused():
    images = torch.full((1, 1, 8, 8), 255.0)
    with pytest.raises(ValueError, match=r"images: expected values in \[-1, 1\], got values in \[255, 255\]"):
        inject_and_denoise(lambda x, t: x, diffusers.DDPMScheduler(num_train_timesteps=20), images, 5)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_samples_have_the_distribution_of_the_data(sampler):
    """3,200 independent pixels of the perfect model over the whole grid: standard errors 0.002 and 0.0013."""
    scheduler = diffusers.DDPMScheduler(clip_sample=False)
    samples = sample(
        gaussian_model(scheduler), scheduler, 50, shape=SHAPE, num_inference_steps=1000, sampler=sampler
    )
    assert samples.shape == (50, *SHAPE)
    assert samples.dtype == torch.float32
    assert not samples.is_inference()
    assert samples.mean().item() == pytest.approx(CENTER, abs=0.007)
    assert samples.std().item() == pytest.approx(SPREAD, abs=0.005)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_samples_do_not_depend_on_the_batch_size(unet, scheduler, sampler):
    arguments = {"shape": SHAPE, "num_inference_steps": 5, "sampler": sampler, "seed": 3}
    whole = sample(unet, scheduler, 5, batch_size=8, **arguments)
    parts = sample(unet, scheduler, 5, batch_size=2, **arguments)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-4)  # other noise would differ by about 1
    assert not torch.allclose(whole, sample(unet, scheduler, 5, **{**arguments, "seed": 4}), atol=0.1)
    assert not torch.allclose(whole[0], whole[1], atol=0.1)


def test_ddpm_is_the_loop_of_diffusers(unet, scheduler):
    generator = torch.Generator().manual_seed(sample_seed(7, 0))
    loop = diffusers.DDPMScheduler.from_config(scheduler.config)
    loop.set_timesteps(10)
    x = torch.randn((1, *SHAPE), generator=generator)
    with torch.no_grad():
        for t in loop.timesteps:
            x = loop.step(unet.eval()(x, t).sample, t, x, generator=generator).prev_sample
    torch.testing.assert_close(
        sample(unet, scheduler, 1, shape=SHAPE, num_inference_steps=10, seed=7), x.clamp(-1, 1)
    )


def test_full_injection_visits_every_timestep(exact, scheduler):
    seen = []

    def watched(x, t):
        seen.append(t[0].item())
        return exact(x, t)

    inject_and_denoise(watched, scheduler, torch.zeros(1, *SHAPE), 6)
    assert seen == [6, 5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_few_steps_start_at_the_timestep_and_end_at_0(exact, scheduler, sampler):
    seen = []

    def watched(x, t):
        seen.append(t[0].item())
        return exact(x, t)

    inject_and_denoise(watched, scheduler, torch.zeros(1, *SHAPE), 50, num_inference_steps=4, sampler=sampler)
    assert seen == [50, 33, 17, 0]


def test_uneven_ddim_steps_are_exact_for_a_point(scheduler):
    """A model that knows the only image: any sequence of DDIM steps must keep `x_t = alpha x + sigma eps` and
    end at the image.
    """
    image = torch.linspace(-0.9, 0.9, 64).view(1, *SHAPE)
    inputs = []

    def knows(x, t):
        inputs.append((t[0].item(), x))
        abar = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
        return (x - abar.sqrt() * image) / (1 - abar).sqrt()

    torch.testing.assert_close(
        inject_and_denoise(knows, scheduler, image, 71, num_inference_steps=4, sampler="ddim"),
        image,
        rtol=0,
        atol=1e-4,
    )
    eps = (inputs[0][1] - scheduler.alphas_cumprod[71].sqrt() * image) / (
        1 - scheduler.alphas_cumprod[71]
    ).sqrt()
    for t, x in inputs:
        abar = scheduler.alphas_cumprod[t]
        torch.testing.assert_close(x, abar.sqrt() * image + (1 - abar).sqrt() * eps, rtol=0, atol=1e-4)


def test_chains_start_from_the_noised_images(scheduler):
    images = torch.stack([torch.full(SHAPE, -0.5), torch.full(SHAPE, 0.5)])
    starts = []

    def first(x, t):
        starts.append(x)
        return torch.zeros_like(x)

    result = inject_and_denoise(
        first, scheduler, images, 20, chains=300, num_inference_steps=1, batch_size=1000, seed=1
    )
    assert result.shape == (600, *SHAPE)
    abar = scheduler.alphas_cumprod[20]
    for image, chains in zip(images, starts[0].split(300), strict=True):
        assert chains.mean().item() == pytest.approx(abar.sqrt().item() * image.mean().item(), abs=0.02)
        assert chains.std().item() == pytest.approx((1 - abar).sqrt().item(), rel=0.05)
    inject_and_denoise(first, scheduler, images, 20, num_inference_steps=1, seed=1)
    torch.testing.assert_close(noised(scheduler, images, 20, seed=1), starts[1])


def test_the_model_is_left_in_its_mode(scheduler):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Dropout(0.9))
            self.seen = []

        def forward(self, x, t):
            self.seen.append(self.inner.training)
            return self.inner(x)

    model = Model()
    model.train()
    model.inner[1].eval()
    sample(model, scheduler, 2, shape=SHAPE, num_inference_steps=2)
    assert model.seen == [False, False]
    assert (model.training, model.inner.training, model.inner[1].training) == (True, True, False)


def test_channels_last_weights_get_channels_last_input(unet, scheduler):
    seen = []
    unet.conv_in.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    plain = sample(unet, scheduler, 3, shape=SHAPE, num_inference_steps=2)
    fast = sample(
        unet.to(memory_format=torch.channels_last), scheduler, 3, shape=SHAPE, num_inference_steps=2
    )
    assert seen[-1]
    torch.testing.assert_close(fast, plain, rtol=0, atol=1e-4)


def test_seeds_of_a_run_are_distinct_and_in_range():
    seeds = {sample_seed(seed, index) for seed in (0, 1, 2**40) for index in range(2000)}
    assert len(seeds) == 6000
    assert max(seeds) < 2**32


def test_a_ddim_checkpoint_samples_by_ddpm(exact, scheduler):
    ddim = diffusers.DDIMScheduler.from_config(scheduler.config)
    arguments = {"shape": SHAPE, "num_inference_steps": 5}
    torch.testing.assert_close(sample(exact, ddim, 2, **arguments), sample(exact, scheduler, 2, **arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_images": 0}, "num_images: expected an integer >= 1, got 0"),
        ({"shape": (8, 8)}, r"shape: expected \(channels, height, width\), got \(8, 8\)"),
        ({"num_inference_steps": 101}, r"num_inference_steps: expected an integer in \[1, 100\]"),
        ({"sampler": "euler"}, "sampler: expected one of ddpm, ddim, got 'euler'"),
        ({"batch_size": 0}, "batch_size: expected an integer >= 1, got 0"),
        ({"seed": -1}, "seed: expected an integer >= 0, got -1"),
    ],
)
def test_bad_arguments_of_sample(exact, scheduler, arguments, message):
    with pytest.raises(ValueError, match=message):
        sample(exact, scheduler, **{"num_images": 1, "shape": SHAPE, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"timestep": 100}, r"timestep: expected an integer in \[0, 99\]"),
        (
            {"num_inference_steps": 12},
            r"num_inference_steps: expected an integer in \[1, 11\] \(timestep \+ 1\)",
        ),
        ({"chains": 0}, "chains: expected an integer >= 1, got 0"),
        ({"images": torch.zeros(SHAPE)}, "images: expected a floating-point tensor of 4 dimensions"),
    ],
)
def test_bad_arguments_of_inject_and_denoise(exact, scheduler, arguments, message):
    with pytest.raises(ValueError, match=message):
        inject_and_denoise(
            exact, scheduler, **{"images": torch.zeros(1, *SHAPE), "timestep": 10, **arguments}
        )


# --- what cannot be sampled ---------------------------------------------------------------------------


def test_samples_that_are_not_finite_are_refused_and_counted(exact, scheduler):
    """The rows whose first pixel is negative: told apart by their own noise, so that the count is known."""

    def sometimes(x, t):
        return torch.where(x[:, :, :1, :1] < 0, torch.nan, exact(x, t))

    first = sample(lambda x, t: exact(x, t), scheduler, 16, shape=SHAPE, num_inference_steps=1)
    assert first.shape[0] == 16
    generators = [torch.Generator().manual_seed(sample_seed(0, row)) for row in range(16)]
    bad = [row for row, g in enumerate(generators) if torch.randn(SHAPE, generator=g)[0, 0, 0] < 0]
    message = rf"expected finite .*, got NaN or Inf in {len(bad)} of the first 16 \(first: sample {bad[0]}\)"
    for steps in (1, 5):
        with pytest.raises(NotFiniteError, match=message if steps == 1 else "samples: expected finite"):
            sample(sometimes, scheduler, 16, shape=SHAPE, num_inference_steps=steps)


def test_an_inf_that_the_scheduler_would_clip_is_refused():
    """-Inf predicted noise is clipped to a white picture, which is finite and looks like one."""
    clipping = diffusers.DDPMScheduler(num_train_timesteps=100)
    for sampler in ("ddpm", "ddim"):
        steps = {"num_inference_steps": 3, "sampler": sampler}
        with pytest.raises(NotFiniteError, match="got NaN or Inf in 2 of the first 2"):
            sample(lambda x, t: torch.full_like(x, -torch.inf), clipping, 2, shape=SHAPE, **steps)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_before_any_work(unet, scheduler, value):
    unet.conv_out.bias.data[0] = value
    unet.register_forward_pre_hook(lambda *arguments: pytest.fail("called"))
    for call in (
        lambda: sample(unet, scheduler, 1, shape=SHAPE),
        lambda: inject_and_denoise(unet, scheduler, torch.zeros(1, *SHAPE), 5),
        lambda: check_sampling(unet, scheduler, shape=SHAPE),
    ):
        message = r"model: expected finite weights, got NaN or Inf in conv_out\.bias"
        with pytest.raises(NotFiniteError, match=message):
            call()


def test_images_that_are_not_finite_are_not_injected(exact, scheduler):
    images = torch.zeros(3, *SHAPE)
    images[1, 0, 0, 0] = torch.nan
    message = r"images: expected finite values, got NaN or Inf in 1 of 3 \(first: 1\)"
    with pytest.raises(NotFiniteError, match=message):
        inject_and_denoise(exact, scheduler, images, 5)


def twice_the_channels(model):
    return lambda x, t: torch.cat([model(x, t), torch.full_like(x, 0.3)], dim=1)


@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
def test_ddim_reads_the_mean_of_a_network_that_learned_the_variance(scheduler, variance_type):
    """It has no variance: 2C channels sample as their first C do."""
    learned = diffusers.DDPMScheduler.from_config(scheduler.config, variance_type=variance_type)
    model = gaussian_model(scheduler)
    arguments = {"shape": SHAPE, "num_inference_steps": 5, "sampler": "ddim"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # diffusers warns where a setting is looked for in the configuration
        double = sample(twice_the_channels(model), learned, 2, **arguments)
    torch.testing.assert_close(double, sample(model, scheduler, 2, **arguments), rtol=0, atol=0)
    steps = {"num_inference_steps": 3, "sampler": "ddim"}
    injected = inject_and_denoise(twice_the_channels(model), learned, double, 20, **steps)
    assert injected.isfinite().all()


def test_ddpm_needs_the_variance_that_its_scheduler_reads(exact, scheduler):
    learned = diffusers.DDPMScheduler.from_config(scheduler.config, variance_type="learned_range")
    assert sample(twice_the_channels(exact), learned, 2, shape=SHAPE, num_inference_steps=5).isfinite().all()
    message = r"shape \[2, 2, 8, 8\] \(the scheduler learns the variance\), got .*\(2, 1, 8, 8\)"
    with pytest.raises(ValueError, match=message):
        sample(exact, learned, 2, shape=SHAPE, num_inference_steps=5)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 1, 1, 1), (2, 1, 8, 4), (1, 1, 8, 8)])
def test_a_prediction_that_would_be_cut_or_stretched_to_fit_is_refused(scheduler, shape):
    expected = r"model: expected a prediction of shape \[2, 1, 8, 8\] or \[2, 2, 8, 8\], got"
    with pytest.raises(ValueError, match=expected):
        sample(lambda x, t: torch.zeros(shape), scheduler, 2, shape=SHAPE, num_inference_steps=2)


def test_zero_terminal_snr_needs_another_prediction_than_epsilon(exact):
    settings = {"num_train_timesteps": 100, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    arguments = {"shape": SHAPE, "num_inference_steps": 5}
    scheduler = diffusers.DDPMScheduler(**settings)
    assert scheduler.alphas_cumprod[-1] == 0
    for sampler in ("ddpm", "ddim"):
        for call in (sample, check_sampling):
            count = {"num_images": 1} if call is sample else {}
            message = r"scheduler: expected alpha_t > 0 for a network that predicts epsilon, got .* at t = 99"
            with pytest.raises(ValueError, match=message):
                call(exact, scheduler, **count, sampler=sampler, **arguments)
    with pytest.raises(ValueError, match="scheduler: expected alpha_t > 0"):
        inject_and_denoise(exact, scheduler, torch.zeros(1, *SHAPE), 99)
    v = diffusers.DDPMScheduler(**settings, prediction_type="v_prediction")
    check_sampling(lambda x, t: x * 0.1, v, **arguments)
    assert sample(lambda x, t: x * 0.1, v, 1, **arguments).isfinite().all()


def test_a_first_timestep_without_noise_is_refused(exact):
    betas = np.linspace(0, 0.2, 100, dtype=np.float32)
    message = "scheduler: expected sigma_t > 0 at every timestep, got sigma = 0 at t = 0"
    noiseless = diffusers.DDPMScheduler(num_train_timesteps=100, trained_betas=betas)
    with pytest.raises(ValueError, match=message):
        sample(exact, noiseless, 1, shape=SHAPE, num_inference_steps=10)
    message = "scheduler: expected as many noise levels as num_train_timesteps, 1000, got 100"
    with pytest.raises(ValueError, match=message):
        sample(exact, diffusers.DDPMScheduler(trained_betas=betas), 1, shape=SHAPE, num_inference_steps=10)


def test_an_offset_beyond_the_last_timestep_is_refused(exact):
    offset = diffusers.DDIMScheduler(num_train_timesteps=100, steps_offset=1)
    message = r"expected timesteps in \[0, 99\], got 100 \(by the scheduler's steps_offset\)"
    with pytest.raises(ValueError, match=message):
        sample(exact, offset, 1, shape=SHAPE, num_inference_steps=100, sampler="ddim")


def test_ddim_samples_from_schedules_that_its_own_class_lacks():
    sigmoid = diffusers.DDPMScheduler(num_train_timesteps=100, beta_schedule="sigmoid", clip_sample=False)
    steps = {"num_inference_steps": 5, "sampler": "ddim"}
    assert sample(gaussian_model(sigmoid), sigmoid, 1, shape=SHAPE, **steps).isfinite().all()


def test_a_check_calls_the_network_once_and_says_what_sampling_would(exact, scheduler):
    calls = []

    def watched(x, t):
        calls.append((len(x), t[0].item()))
        return exact(x, t)

    check_sampling(watched, scheduler, shape=SHAPE, num_inference_steps=5)
    check_injection(watched, scheduler, torch.zeros(1, *SHAPE), 50, num_inference_steps=4, sampler="ddim")
    assert calls == [(1, 80), (1, 50)]
    message = "samples: expected finite values from the model, got NaN or Inf in 1 of the first 1"
    with pytest.raises(NotFiniteError, match=message):
        check_sampling(lambda x, t: x * torch.nan, scheduler, shape=SHAPE)
    with pytest.raises(ValueError, match=r"timestep: expected an integer in \[0, 99\]"):
        check_injection(exact, scheduler, torch.zeros(1, *SHAPE), 250)


def test_a_scheduler_without_noise_levels_is_refused(exact):
    with pytest.raises(
        TypeError, match="scheduler: expected a diffusers scheduler with alphas_cumprod, got object"
    ):
        sample(exact, object(), 1, shape=SHAPE)


def test_the_first_of_a_tuple_is_the_prediction(unet, scheduler):
    """diffusers' return_dict=False."""
    options = {"shape": SHAPE, "num_inference_steps": 3}
    expected = sample(unet, scheduler, 2, **options)
    found = sample(lambda x, t: unet(x, t, return_dict=False), scheduler, 2, **options)
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match=r"model: expected a prediction of shape .*, got dict"):
        sample(lambda x, t: {"sample": unet(x, t).sample}, scheduler, 2, **options)
