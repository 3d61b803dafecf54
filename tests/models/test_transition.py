"""The transition of a text-to-image pipeline: where it was planted, as a loop of one's own finds it, and
nothing of the pipeline changed.

Of diffusers' own pipelines where the package transformers is installed, of stand-ins with the same networks
everywhere.
"""

from __future__ import annotations

import logging
import math
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

diffusers = pytest.importorskip("diffusers")

from tiny_pipelines import KINDS, PIXELS, StandIn, pipeline, scheduler, unet  # noqa: E402

import fastunlearn  # noqa: E402
from fastunlearn import NoiseSchedule, TimeWindow, find_transition, neggrad_step  # noqa: E402
from fastunlearn.host.finite import NotFiniteError  # noqa: E402
from fastunlearn.models.transition import first_minimum  # noqa: E402
from fastunlearn.testing.factories import TinyDenoiser  # noqa: E402

STAND_INS = KINDS[:2]
STEPS, FEW_STEPS = 50, 16
kinds = pytest.mark.parametrize("kind", KINDS)
stand_ins = pytest.mark.parametrize("kind", STAND_INS)


class Planted:
    """Before a network's class: its halves are `1 + |t - dip|` apart, with a dip for each run and seed.

    Where the dip is None, `1 + t`: without a minimum.
    """

    def plant(self, *dips) -> None:
        self.ahead, self.dips, self.previous = list(dips), None, 0.0

    def forward(self, *inputs, **named):
        timestep = float(torch.as_tensor(named["timestep"] if "timestep" in named else inputs[1]).max())
        # The sampler begins anew where its timestep rises.
        if timestep > self.previous:
            self.dips = self.ahead.pop(0)
        self.previous = timestep
        null, text = super().forward(*inputs, **named)[0].chunk(2)
        sizes = [1 + timestep if dip is None else 1 + abs(timestep - dip) for dip in self.dips]
        difference = text - null
        norm = difference.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        apart = difference / norm * torch.tensor(sizes, dtype=norm.dtype).view(-1, 1, 1, 1)
        return (torch.cat([null, null + apart]),)


def network_of(pipe) -> nn.Module:
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def timesteps_of(pipe, count: int = STEPS) -> list[float]:
    """Those of the sampler, by a scheduler that nothing else has used."""
    own = type(pipe.scheduler).from_config(pipe.scheduler.config)
    own.set_timesteps(count)
    return own.timesteps.tolist()


def planted(kind, folder, *dips):
    """A pipeline with dips at places of the sampler's timesteps; None: no dip."""
    pipe = pipeline(kind, folder, planted=Planted)
    timesteps = timesteps_of(pipe)
    network_of(pipe).plant(*([None if place is None else timesteps[place] for place in run] for run in dips))
    return pipe, timesteps


# --- where it was planted --------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize(("at", "place"), [("after", 12), ("minimum", 11)])
def test_a_planted_dip_is_found_with_13_of_50_calls(kind, at, place, tmp_path):
    pipe, timesteps = planted(kind, tmp_path, [11, 11])
    found = find_transition(pipe, "a cat", seeds=2, at=at)
    assert found.timestep == timesteps[place]
    assert found.seed_timesteps == ((timesteps[place],) * 2,)
    assert found.minima == ((11, 11),)
    assert found.calls == 13
    assert found.visited == tuple(timesteps[:13])
    assert found.fell_back == ((False, False),)
    expected = [1 + abs(timestep - timesteps[11]) for timestep in timesteps[:13]]
    assert found.magnitudes[0][0] == pytest.approx(expected, rel=1e-12)


@kinds
def test_it_waits_for_the_last_seed_and_takes_the_median(kind, tmp_path):
    pipe, timesteps = planted(kind, tmp_path, [4, 20, 9, 13])
    found = find_transition(pipe, "a cat", seeds=[5, 2, 7, 0], at="minimum")
    assert found.seed_timesteps == (tuple(timesteps[place] for place in (4, 20, 9, 13)),)
    assert found.timestep == (timesteps[9] + timesteps[13]) / 2
    assert found.calls == 22
    assert {len(curve) for curve in found.magnitudes[0]} == {22}


@kinds
def test_two_prompts_have_a_transition_each_and_one_in_common(kind, tmp_path):
    pipe, timesteps = planted(kind, tmp_path, [3, 5, 7], [8, 9, 30])
    found = find_transition(pipe, ["a cat", "a dog"], seeds=3, at="minimum")
    assert found.prompts == ("a cat", "a dog")
    assert found.prompt_timesteps == (timesteps[5], timesteps[9])
    assert found.timestep == (timesteps[7] + timesteps[8]) / 2
    assert found.calls == 9 + 32
    assert [len(rows[0]) for rows in found.magnitudes] == [9, 32]
    assert found.visited == tuple(timesteps[:32])


@kinds
def test_without_a_minimum_the_fixed_window_stands_for_it_and_is_said(kind, tmp_path, caplog):
    pipe, _ = planted(kind, tmp_path, [None, None])
    with caplog.at_level(logging.WARNING, logger="fastunlearn"):
        found = find_transition(pipe, "a cat", seeds=[3, 4])
    fixed = 804 if "SD3" in kind else 750
    assert found.timestep == found.fallback == fixed
    assert found.fell_back == ((True, True),)
    assert found.minima == ((None, None),)
    assert found.calls == STEPS
    [message] = [record.getMessage() for record in caplog.records if record.name == "fastunlearn"]
    assert "the prompt 'a cat' has no minimum with seeds [3, 4]" in message
    assert str(fixed) in message


def test_the_fixed_windows_of_noise_and_flow_have_the_same_ratio_of_signal_to_noise():
    diffusion = NoiseSchedule.from_diffusers(scheduler("SD"))
    noise_of_flow = 1 / (1 + diffusion.alpha[750] / diffusion.sigma[750])
    assert round(1000 * float(noise_of_flow)) == 804


@stand_ins
def test_one_seed_without_a_minimum_falls_back_alone(kind, tmp_path, caplog):
    pipe, timesteps = planted(kind, tmp_path, [6, None, 11])
    with caplog.at_level(logging.WARNING, logger="fastunlearn"):
        found = find_transition(pipe, "a cat", seeds=3, fallback=100)
    assert found.seed_timesteps == ((timesteps[7], 100, timesteps[12]),)
    assert found.fell_back == ((False, True, False),)
    assert found.timestep == timesteps[12]
    assert found.calls == STEPS
    assert "with seeds [1]" in caplog.text


@stand_ins
def test_batches_of_seeds_stop_each_for_itself(kind, tmp_path):
    pipe, timesteps = planted(kind, tmp_path, [4, 6], [10])
    found = find_transition(pipe, "a cat", seeds=3, batch_size=2, at="minimum")
    assert found.seed_timesteps == (tuple(timesteps[place] for place in (4, 6, 10)),)
    assert found.calls == 8 + 12
    assert [len(curve) for curve in found.magnitudes[0]] == [8, 8, 12]


@stand_ins
def test_the_whole_path_on_request(kind, tmp_path):
    pipe, timesteps = planted(kind, tmp_path, [11])
    found = find_transition(pipe, "a cat", seeds=1, stop_early=False)
    assert found.timestep == timesteps[12]
    assert found.calls == STEPS
    assert found.visited == tuple(timesteps)


@pytest.mark.parametrize(
    ("magnitudes", "place"),
    [
        ([], None),
        ([1.0], None),
        ([2.0, 1.0], None),
        ([2.0, 1.0, 2.0], 1),
        ([1.0, 2.0, 3.0], None),
        ([3.0, 2.0, 1.0], None),
        ([3.0, 1.0, 1.0, 2.0], None),  # both comparisons are strict
        ([3.0, 1.0, 1.0, 2.0, 1.5, 1.6], 4),
        ([3.0, 2.0, 2.5, 0.0, 1.0], 1),  # the first one, not the lowest
    ],
)
def test_first_minimum(magnitudes, place):
    assert first_minimum(magnitudes) == place


# --- as a loop of one's own finds it ---------------------------------------------------------------------


def texts_of(pipe, text: str) -> dict[str, torch.Tensor]:
    """What the network is given for one text."""
    if isinstance(pipe, StandIn):
        return pipe.encode([text])
    if hasattr(pipe, "unet"):
        return {"encoder_hidden_states": pipe.encode_prompt(text, "cpu", 1, False)[0]}
    embeddings, _, pooled, _ = pipe.encode_prompt(text, text, text, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": embeddings, "pooled_projections": pooled}


@torch.no_grad()
def own_loop(pipe, sampler, prompt: str, seed: int, null_text: str = "") -> list[float]:
    """The magnitudes along the path of the conditional model: one seed, each half in a call of its own."""
    network, magnitudes = network_of(pipe), []
    text, null = texts_of(pipe, prompt), texts_of(pipe, null_text)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 4, PIXELS, PIXELS, generator=generator, dtype=torch.float64)
    sampler.set_timesteps(FEW_STEPS)
    for timestep in sampler.timesteps:
        given = timestep.expand(1)
        with_text = network(x, timestep=given, **text, return_dict=False)[0]
        without = network(x, timestep=given, **null, return_dict=False)[0]
        magnitudes.append(float((with_text - without).square().sum().sqrt()))
        x = sampler.step(with_text, timestep, x, return_dict=False)[0]
    return magnitudes


def copy_of(sampler):
    return type(sampler).from_config(sampler.config)


@kinds
@pytest.mark.parametrize("null_text", [None, "blurred"])
def test_equal_to_a_loop_of_ones_own(kind, null_text, tmp_path):
    """The loop follows the conditional model exactly, so 1e-6 is also what the guidance scale may cost."""
    pipe = pipeline(kind, tmp_path)
    prompts, seeds = ["a cat", "two dogs"], [0, 17]
    options = {"num_inference_steps": FEW_STEPS, "stop_early": False}
    found = find_transition(pipe, prompts, seeds, negative_prompt=null_text, **options)
    assert found.visited == tuple(timesteps_of(pipe, FEW_STEPS))
    differ = set()
    for prompt, rows in zip(prompts, found.magnitudes, strict=True):
        for seed, curve in zip(seeds, rows, strict=True):
            expected = own_loop(pipe, copy_of(pipe.scheduler), prompt, seed, null_text or "")
            assert curve == pytest.approx(expected, rel=1e-6)
            differ.add(expected[0])
    assert len(differ) == 4


@kinds
def test_the_solver_of_jains_code(kind, tmp_path):
    pipe = pipeline(kind, tmp_path)
    options = {"num_inference_steps": FEW_STEPS, "stop_early": False}
    found = find_transition(pipe, "a cat", [3], scheduler="dpmsolver++", **options)
    if "SD3" in kind:
        flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
        own = diffusers.DPMSolverMultistepScheduler(**flow)
    else:
        own = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    expected = own_loop(pipe, own, "a cat", 3)
    assert found.magnitudes[0][0] == pytest.approx(expected, rel=1e-6)
    assert found.visited == tuple(own.timesteps.tolist())
    by_default = find_transition(pipe, "a cat", [3], **options)
    assert by_default.magnitudes[0][0] != pytest.approx(expected, rel=1e-6)


@kinds
def test_a_batch_of_seeds_is_one_by_one(kind, tmp_path):
    pipe = pipeline(kind, tmp_path)
    options = {"seeds": [3, 8, 1], "num_inference_steps": FEW_STEPS, "stop_early": False}
    together = find_transition(pipe, "a cat", **options)
    apart = find_transition(pipe, "a cat", **options, batch_size=1)
    for both in zip(together.magnitudes[0], apart.magnitudes[0], strict=True):
        assert both[0] == pytest.approx(both[1], rel=1e-9)
    assert apart.calls == 3 * together.calls == 3 * FEW_STEPS
    assert together.minima == apart.minima


@pytest.mark.parametrize("solver", ["PNDMScheduler", "HeunDiscreteScheduler"])
def test_a_timestep_that_a_sampler_visits_twice_counts_once(solver, tmp_path):
    """And the second visit is the one that counts."""
    pipe = pipeline(STAND_INS[0], tmp_path)
    options = {"skip_prk_steps": True} if solver == "PNDMScheduler" else {}
    pipe.scheduler = getattr(diffusers, solver).from_config(pipe.scheduler.config, **options)
    found = find_transition(pipe, "a cat", [2], stop_early=False)
    timesteps = timesteps_of(pipe)
    last_visits = [place for place, t in enumerate(timesteps) if timesteps[place + 1 : place + 2] != [t]]
    assert len(last_visits) == STEPS
    assert found.visited == tuple(timesteps[place] for place in last_visits)
    assert found.calls == len(timesteps) > STEPS
    expected = []
    hook = network_of(pipe).register_forward_hook(
        lambda network, inputs, output: expected.append(output[0].diff(dim=0).norm().item())
    )
    pipe(
        ["a cat"],
        guidance_scale=1 + 1e-6,
        generator=[torch.Generator().manual_seed(2)],
        callback_on_step_end=lambda *step: None,
    )
    hook.remove()
    assert found.magnitudes[0][0] == pytest.approx([expected[place] for place in last_visits], rel=1e-9)


# --- nothing of the pipeline changes ---------------------------------------------------------------------


def state_of(pipe) -> dict:
    parts = [part for part in vars(pipe).values() if isinstance(part, nn.Module)]
    config = dict(pipe.config) if hasattr(pipe, "config") else None
    return {
        "scheduler": id(pipe.scheduler),
        "of the scheduler": {name: str(value) for name, value in vars(pipe.scheduler).items()},
        "training": [module.training for part in parts for module in part.modules()],
        # Not of text encoders, whose library leaves hooks of its own in them.
        "hooks": sum(len(module._forward_hooks) for module in network_of(pipe).modules()),
        "weights": [weight.sum().item() for part in parts for weight in part.parameters()],
        "progress bar": vars(pipe).get("_progress_bar_config"),
        "config": config,
        "generator": torch.get_rng_state().tolist(),
    }


@kinds
def test_the_pipeline_is_as_before(kind, tmp_path):
    pipe, _ = planted(kind, tmp_path, [11, 11])
    pipe.scheduler.set_timesteps(7)
    network_of(pipe).train()
    pipe.text_encoder.eval()
    pipe._progress_bar_config = {"desc": "mine"}
    before = state_of(pipe)
    find_transition(pipe, "a cat", seeds=2)
    assert state_of(pipe) == before
    assert not vars(pipe).get("_interrupt")


class Fails(Planted):
    def forward(self, *inputs, **named):
        if len(self.ahead) == 0:  # the run of the last prompt
            raise RuntimeError("the network fails")
        return super().forward(*inputs, **named)


@kinds
def test_the_pipeline_is_as_before_after_an_error(kind, tmp_path):
    pipe = pipeline(kind, tmp_path, planted=Fails)
    network_of(pipe).plant([700.0], [700.0])
    network_of(pipe).train()
    before = state_of(pipe)
    with pytest.raises(RuntimeError, match="the network fails"):
        find_transition(pipe, ["a cat", "a dog"], seeds=1)
    assert state_of(pipe) == before
    assert len(network_of(pipe)._forward_hooks) == 0


@stand_ins
def test_dropout_does_not_reach_the_magnitudes(kind, tmp_path):
    pipe = pipeline(kind, tmp_path)
    options = {"seeds": 1, "num_inference_steps": FEW_STEPS, "stop_early": False}
    still = find_transition(pipe, "a cat", **options)
    dropouts = [module for module in network_of(pipe).modules() if isinstance(module, nn.Dropout)]
    assert dropouts
    for dropout in dropouts:
        dropout.p = 0.5
    network_of(pipe).train()
    assert find_transition(pipe, "a cat", **options).magnitudes == still.magnitudes
    assert network_of(pipe).training


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_network_is_measured_too(in_place, tmp_path):
    """Also one that was compiled, and called, before there was a hook."""
    pipe = pipeline(STAND_INS[0], tmp_path)
    options = {"seeds": 2, "num_inference_steps": 4, "stop_early": False}
    expected = find_transition(pipe, "a cat", **options)
    if in_place:
        pipe.unet.compile(backend="eager")
    else:
        pipe.unet = torch.compile(pipe.unet, backend="eager")
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    pipe(["a cat"] * 2, num_inference_steps=2, generator=generators, callback_on_step_end=lambda *step: None)
    found = find_transition(pipe, "a cat", **options)
    assert found.calls == 4
    for curve, like in zip(found.magnitudes[0], expected.magnitudes[0], strict=True):
        assert curve == pytest.approx(like, rel=1e-9)


# --- the window ------------------------------------------------------------------------------------------


def test_the_window_of_noise_prediction_begins_at_the_timestep(tmp_path):
    pipe, timesteps = planted(STAND_INS[0], tmp_path, [11])
    found = find_transition(pipe, "a cat", seeds=1)
    assert found.window() == (timesteps[12], 1000) == (741, 1000)
    assert found.window(NoiseSchedule.from_diffusers(pipe.scheduler)) == (741, 1000)


def test_the_window_of_flow_begins_at_the_index_of_the_noise_level(tmp_path):
    pipe, timesteps = planted(STAND_INS[1], tmp_path, [11])
    found = find_transition(pipe, "a cat", seeds=1)
    assert found.window() == (math.ceil(timesteps[12]), 1000)
    schedule = NoiseSchedule.from_diffusers(pipe.scheduler)
    start, stop = found.window(schedule)
    assert stop == 1000
    # The shift moves most indices to high noise, so that the index is lower than the timestep.
    assert start < timesteps[12] - 50
    levels = schedule.model_timesteps / 1000
    assert levels[start - 1] < timesteps[12] / 1000 - 1e-6 < levels[start]


@pytest.mark.parametrize("sampler", ["Euler", "LMS", "Heun", "KDPM2"])
def test_a_transition_between_two_timesteps_becomes_the_window_of_a_step(sampler, tmp_path):
    """These samplers stop at fractions: the window begins with the first timestep of training after them."""
    pipe, _ = planted(STAND_INS[0], tmp_path, [11])
    cls = getattr(diffusers, f"{sampler}DiscreteScheduler")
    own, fresh = (cls.from_config(pipe.scheduler.config, timestep_spacing="linspace") for _ in range(2))
    fresh.set_timesteps(STEPS)
    visited = list(dict.fromkeys(fresh.timesteps.tolist()))
    network_of(pipe).plant([visited[11]])
    found = find_transition(pipe, "a cat", seeds=1, scheduler=own)
    assert found.timestep == visited[12] != int(visited[12])

    schedule = NoiseSchedule.from_diffusers(pipe.scheduler)
    assert found.window() == found.window(schedule) == (math.ceil(visited[12]), 1000)
    window, seen = TimeWindow(*found.window()), []

    class Denoiser(TinyDenoiser):
        def forward(self, x_t, timesteps):
            seen.extend(timesteps.tolist())
            return super().forward(x_t, timesteps)

    generator = torch.Generator().manual_seed(0)
    neggrad_step(
        Denoiser(), None, schedule, torch.zeros(64, 1, 8, 8), time_window=window, generator=generator
    )
    assert len(seen) == 64
    assert visited[12] < min(seen) < max(seen) < 1000


def test_a_whole_timestep_begins_the_window_itself(tmp_path):
    """Also one that float32 holds a little above it; and the last one, T of flow matching, is index T - 1."""
    pipe, _ = planted(STAND_INS[0], tmp_path, [11])
    found = find_transition(pipe, "a cat", seeds=1)
    starts = {741.0: 741, 741.00006: 741, 741.01: 742, 740.5: 741, 0.0: 0, 999.0: 999, 1000.0: 999}
    for timestep, start in starts.items():
        window = replace(found, timestep=timestep).window()
        assert window == (start, 1000)
        assert isinstance(window[0], int)


def test_a_schedule_of_another_length_is_refused(tmp_path):
    pipe, _ = planted(STAND_INS[0], tmp_path, [11])
    found = find_transition(pipe, "a cat", seeds=1)
    with pytest.raises(ValueError, match="schedule: expected the pipeline's 1000 timesteps, got 100"):
        found.window(NoiseSchedule.flow(100))


# --- bad input -------------------------------------------------------------------------------------------


class FromAnImage(StandIn):
    def __call__(
        self,
        prompt,
        image,
        negative_prompt,
        num_inference_steps,
        guidance_scale,
        generator,
        output_type,
        callback_on_step_end,
    ):
        raise AssertionError("called")


class WithoutCallback(StandIn):
    def __call__(self, prompt, negative_prompt, num_inference_steps, guidance_scale, generator, output_type):
        raise AssertionError("called")


def of_class(cls):
    return cls(unet(), scheduler("SD"), "unet")


def without_text_encoder():
    pipe = of_class(StandIn)
    pipe.text_encoder = None
    return pipe


def distilled():
    network = diffusers.UNet2DConditionModel(
        sample_size=PIXELS,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=["DownBlock2D"],
        up_block_types=["UpBlock2D"],
        cross_attention_dim=16,
        attention_head_dim=4,
        time_cond_proj_dim=8,
    )
    return StandIn(network, scheduler("SD"), "unet")


def unguided():
    return SimpleNamespace(unet=unet(), scheduler=scheduler("SD"))


PIPELINES = [
    (lambda: unet(), TypeError, "pipeline: expected a diffusers pipeline .*, got UNet2DConditionModel"),
    (unguided, TypeError, "pipeline: expected a diffusers pipeline .* guidance, .*, got SimpleNamespace"),
    (lambda: of_class(WithoutCallback), ValueError, "got WithoutCallback, which has no callback_on_step_end"),
    (lambda: of_class(FromAnImage), ValueError, "got FromAnImage, which starts from image"),
    (without_text_encoder, ValueError, "pipeline: expected one with a text encoder, got StandIn"),
    (distilled, ValueError, "pipeline: expected a network without guidance of its own, got one with"),
]


@pytest.mark.parametrize(("make", "error", "message"), PIPELINES)
def test_pipelines_that_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        find_transition(make(), "a cat")


@pytest.mark.parametrize("name", ["StableDiffusionImg2ImgPipeline", "FluxPipeline", "DDPMPipeline"])
def test_pipelines_of_diffusers_that_are_refused(name):
    """Without their parts: what they start from is told by their class."""
    if name != "DDPMPipeline":
        pytest.importorskip("transformers")
    pipe = object.__new__(getattr(diffusers, name))
    vars(pipe).update(unet=unet(), scheduler=scheduler("SD"), text_encoder=nn.Embedding(2, 2))
    with pytest.raises(ValueError, match=f"pipeline: expected .* from text to image .*, got {name}, which"):
        find_transition(pipe, "a cat")


REFUSED = [
    ({"prompts": []}, ValueError, "prompts: expected at least one text, got none"),
    ({"prompts": ["a cat", " "]}, ValueError, "prompts: expected texts that differ .*, got ' ' in place 1"),
    ({"prompts": "blur", "negative_prompt": "blur"}, ValueError, "prompts: .*, got 'blur' in place 0"),
    ({"prompts": 3}, TypeError, "prompts: expected a text or a list of texts, got 3"),
    ({"prompts": ["a", 3]}, TypeError, "prompts: expected a text or a list of texts, got list"),
    ({"negative_prompt": ["a"]}, TypeError, "negative_prompt: expected a text or None, got list"),
    ({"seeds": 0}, ValueError, "seeds: expected an integer >= 1, got 0"),
    ({"seeds": []}, ValueError, "seeds: expected at least one, got none"),
    ({"seeds": [1, 1]}, ValueError, r"seeds: expected different ones, got \[1, 1\]"),
    ({"seeds": [-1]}, ValueError, "seeds: expected an integer in .*, got -1"),
    ({"seeds": "3"}, TypeError, "seeds: expected an integer, got '3'"),
    ({"num_inference_steps": 2}, ValueError, r"num_inference_steps: expected an integer in \[3, 1000\]"),
    ({"at": "before"}, ValueError, "at: expected one of after, minimum, got 'before'"),
    ({"fallback": 1000}, ValueError, r"fallback: expected a finite number in \[0, 999\], got 1000"),
    ({"fallback": math.nan}, ValueError, "fallback: expected a finite number"),
    ({"batch_size": 0}, ValueError, "batch_size: expected an integer >= 1, got 0"),
    ({"height": 0}, ValueError, "height: expected an integer >= 1, got 0"),
    ({"scheduler": "ddim"}, ValueError, r"scheduler: expected one of dpmsolver\+\+, got 'ddim'"),
    ({"scheduler": 3}, TypeError, "scheduler: expected a diffusers scheduler, .*, got 3"),
    (
        {"scheduler": diffusers.DDIMScheduler(prediction_type="v_prediction")},
        ValueError,
        "scheduler: expected the pipeline's predictions, epsilon, got v_prediction",
    ),
    (
        {"scheduler": diffusers.FlowMatchEulerDiscreteScheduler()},
        ValueError,
        "scheduler: expected the pipeline's predictions, epsilon, got flow",
    ),
    (
        {"scheduler": diffusers.DDIMScheduler(num_train_timesteps=100)},
        ValueError,
        "scheduler: expected the pipeline's timesteps, 1000, got 100",
    ),
]


@pytest.mark.parametrize(("given", "error", "message"), REFUSED)
def test_refused_before_any_work(given, error, message, tmp_path):
    pipe = pipeline(STAND_INS[0], tmp_path)
    calls = []
    pipe.unet.register_forward_hook(lambda *call: calls.append(call))
    with pytest.raises(error, match=message):
        find_transition(pipe, **({"prompts": "a cat"} | given))
    assert not calls


def test_a_flow_that_draws_noise_is_refused(tmp_path):
    pipe = pipeline(STAND_INS[1], tmp_path)
    stochastic = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    with pytest.raises(ValueError, match="scheduler: expected one of flow matching that draws no noise"):
        find_transition(pipe, "a cat", scheduler=stochastic)


class OneHalf(StandIn):
    """A pipeline that asks its network for the text alone."""

    def __call__(
        self,
        prompt,
        num_inference_steps,
        guidance_scale,
        generator,
        output_type,
        callback_on_step_end,
        negative_prompt=None,
    ):
        latents = torch.zeros(len(prompt), 4, PIXELS, PIXELS)
        self.unet(latents, timestep=torch.tensor(981), **self.encode(prompt))
        raise AssertionError("not refused")


def test_a_pipeline_without_both_halves_in_one_call_is_refused():
    expected = "expected one call of the network on both halves of 1 seeds, 2 rows, got 1 rows"
    with pytest.raises(ValueError, match=expected):
        find_transition(of_class(OneHalf), "a cat", seeds=1)


def test_a_network_whose_calls_no_hook_sees_is_refused(tmp_path):
    pipe = pipeline(STAND_INS[0], tmp_path)
    pipe.unet._compiled_call_impl = pipe.unet.forward  # torch calls this instead, without hooks
    with pytest.raises(ValueError, match="expected one call of its network a step, got 0 that its hooks see"):
        find_transition(pipe, "a cat", seeds=1)


@stand_ins
def test_nan_is_refused(kind, tmp_path):
    pipe = pipeline(kind, tmp_path)
    next(network_of(pipe).parameters()).data.fill_(math.nan)
    with pytest.raises(NotFiniteError, match="pipeline: expected finite predictions, got NaN or Inf at"):
        find_transition(pipe, "a cat", seeds=1)
    assert len(network_of(pipe)._forward_hooks) == 0


def test_the_name_is_public_and_cheap():
    assert fastunlearn.find_transition is find_transition
    code = "import fastunlearn, sys; fastunlearn.find_transition\nassert 'diffusers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
