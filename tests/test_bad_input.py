"""Bad input, case by case: the right exception, and a text that names the argument, what was expected and
what was given.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fastunlearn import (
    SISS,
    Draws,
    EraseDiff,
    ImageStore,
    NegGrad,
    NoiseSchedule,
    ReTrack,
    Unlearner,
    Vanilla,
    erasediff_step,
    functional,
    nearest_neighbors,
    neggrad_step,
    retrack_step,
    siss_step,
    vanilla_step,
)
from fastunlearn.data import load_images
from fastunlearn.metrics.frequency import frequency
from fastunlearn.models import load_checkpoint, sampling, save_checkpoint
from fastunlearn.recipes.mnist_tshirt import load_mnist_tshirt
from fastunlearn.runs import checkpoint
from fastunlearn.testing.factories import TinyDenoiser, linear_schedule

ROWS, SHAPE, STEPS = 4, (1, 8, 8), 1000
SCHEDULE = linear_schedule(STEPS)
NAN = float("nan")


class Case(NamedTuple):
    name: str
    call: Callable
    error: type[Exception]
    argument: str  # regular expressions, in the order in which the message has them
    expected: str
    given: str


def ddpm_scheduler(**settings):
    return pytest.importorskip("diffusers").DDPMScheduler(**settings)


def images(
    rows: int = ROWS, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32, seed: int = 0
) -> torch.Tensor:
    return (torch.rand(rows, *shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1).to(dtype)


def with_nan() -> torch.Tensor:
    spoilt = images()
    spoilt[1, 0, 0, 0] = NAN
    return spoilt


def store(rows: int = ROWS, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> ImageStore:
    return ImageStore(
        torch.randint(
            0, 256, (rows, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
        )
    )


def timesteps(rows: int = ROWS) -> torch.Tensor:
    return torch.arange(rows) + 5


def noised(**changed):
    return functional.noised(
        **{"images": images(), "noise": images(seed=1), "timesteps": timesteps(), "schedule": SCHEDULE}
        | changed
    )


def redirect(**changed):
    given = {
        "forget": images(),
        "neighbors": images(ROWS * 3).view(ROWS, 3, *SHAPE),
        "noise": images(seed=1),
        "timesteps": timesteps(),
        "schedule": SCHEDULE,
    }
    return functional.redirect(**given | changed)


def mixture(**changed):
    given = {
        "retain": images(),
        "forget": images(seed=1),
        "noise": images(seed=2),
        "timesteps": timesteps(),
        "schedule": SCHEDULE,
        "lambd": 0.5,
    }
    return functional.mixture(**given | {"from_forget": torch.tensor([True, False] * 2)} | changed)


def step(function: Callable, **changed):
    """`function`, a `*_step`, on good arguments of which some are `changed`."""
    model = TinyDenoiser()
    given = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "schedule": SCHEDULE}
    given |= {} if function is vanilla_step else {"forget": images()}
    given |= {} if function is neggrad_step else {"retain": images(seed=1)}
    given |= {"neighbors": images(ROWS * 3).view(ROWS, 3, *SHAPE)} if function is retrack_step else {}
    return function(**given | changed)


def unlearner(method=None, **changed):
    model = TinyDenoiser()
    given = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "schedule": SCHEDULE,
        "method": method or SISS(),
    }
    return Unlearner(**given | {"forget": store(), "retain": store(20, seed=1), "batch_size": 2} | changed)


def frozen() -> nn.Module:
    return TinyDenoiser().requires_grad_(False)


def pairs(rows: int, k: int, first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Neighbours of `rows` forget images, from retain row `first` on."""
    return torch.arange(first, first + k).repeat(rows, 1), torch.zeros(rows, k, dtype=torch.int64)


def zero_noise() -> NoiseSchedule:
    return NoiseSchedule(torch.tensor([1.0, 0.9]), torch.tensor([0.0, 0.4]))


def zero_signal(prediction_type: str = "epsilon") -> NoiseSchedule:
    return NoiseSchedule(torch.tensor([0.9, 0.0]), torch.tensor([0.4, 1.0]), prediction_type=prediction_type)


SCHEDULE_CASES = [
    Case(
        "alpha is a list",
        lambda: NoiseSchedule([0.9], torch.ones(1)),
        TypeError,
        "alpha",
        r"tensor of shape \[T\]",
        "list",
    ),
    Case(
        "alpha has two axes",
        lambda: NoiseSchedule(torch.ones(2, 2), torch.ones(2)),
        ValueError,
        "alpha",
        r"shape \[T\]",
        r"float32 of shape \(2, 2\)",
    ),
    Case(
        "alpha is empty",
        lambda: NoiseSchedule(torch.ones(0), torch.ones(0)),
        ValueError,
        "alpha",
        r"shape \[T\]",
        r"shape \(0,\)",
    ),
    Case(
        "alpha is integer",
        lambda: NoiseSchedule(torch.ones(2, dtype=torch.int64), torch.ones(2)),
        ValueError,
        "alpha",
        "floating-point",
        "int64",
    ),
    Case(
        "sigma is longer",
        lambda: NoiseSchedule(torch.ones(2), torch.ones(3)),
        ValueError,
        "sigma",
        "length of alpha, 2",
        "3",
    ),
    Case(
        "alpha has NaN",
        lambda: NoiseSchedule(torch.tensor([NAN]), torch.ones(1)),
        ValueError,
        "alpha",
        "finite values >= 0",
        "nan",
    ),
    Case(
        "sigma is negative",
        lambda: NoiseSchedule(torch.ones(1), -torch.ones(1)),
        ValueError,
        "sigma",
        "finite values >= 0",
        "-1",
    ),
    Case(
        "prediction type",
        lambda: linear_schedule(prediction_type="score"),
        ValueError,
        "prediction_type",
        "one of epsilon, v_prediction",
        "'score'",
    ),
    Case(
        "model timesteps",
        lambda: NoiseSchedule(torch.ones(2), torch.ones(2), torch.arange(3)),
        ValueError,
        "model_timesteps",
        r"\(2,\)",
        r"\(3,\)",
    ),
    Case(
        "abar above 1",
        lambda: NoiseSchedule.from_alphas_cumprod(torch.tensor([1.5])),
        ValueError,
        "alphas_cumprod",
        r"\[0, 1\]",
        "1.5",
    ),
    Case(
        "no scheduler",
        lambda: NoiseSchedule.from_diffusers(object()),
        TypeError,
        "scheduler",
        "a diffusers scheduler",
        "object",
    ),
    Case(
        "sigma 0 drawn",
        lambda: unlearner(schedule=zero_noise()),
        ValueError,
        "schedule",
        "sigma_t > 0",
        "sigma = 0 at t = 0",
    ),
    Case(
        "alpha 0 drawn",
        lambda: unlearner(schedule=zero_signal()),
        ValueError,
        "schedule",
        "alpha_t > 0",
        "alpha = 0 at t = 1",
    ),
    Case(
        "sigma 0 drawn in a step",
        lambda: step(vanilla_step, schedule=zero_noise()),
        ValueError,
        "schedule",
        "sigma_t > 0",
        "sigma = 0 at t = 0",
    ),
]
FUNCTIONAL_CASES = [
    Case(
        "images of rank 3",
        lambda: noised(images=images()[0]),
        ValueError,
        "images",
        "4 dimensions",
        r"float32 of shape \(1, 8, 8\)",
    ),
    Case(
        "images are uint8",
        lambda: noised(images=store().images),
        TypeError,
        "images",
        "floating-point tensor",
        "uint8",
    ),
    Case(
        "images are numpy",
        lambda: noised(images=np.ones((2, *SHAPE))),
        TypeError,
        "images",
        "tensor of 4 dimensions",
        "ndarray",
    ),
    Case(
        "no images",
        lambda: noised(images=images(0)),
        ValueError,
        "images",
        "at least one image",
        r"\(0, 1, 8, 8\)",
    ),
    Case(
        "noise of another shape",
        lambda: noised(noise=images(2)),
        ValueError,
        "noise",
        r"shape of images, \(4, 1, 8, 8\)",
        r"\(2, 1, 8, 8\)",
    ),
    Case("no noise", lambda: noised(noise=None), TypeError, "noise", "floating-point tensor", "None"),
    Case(
        "noise on another device",
        lambda: noised(noise=images().to("meta")),
        ValueError,
        "noise",
        "device of images, cpu",
        "meta",
    ),
    Case(
        "timesteps are floats",
        lambda: noised(timesteps=torch.ones(ROWS)),
        TypeError,
        "timesteps",
        "integer tensor",
        "float32",
    ),
    Case(
        "too few timesteps",
        lambda: noised(timesteps=timesteps(3)),
        ValueError,
        "timesteps",
        r"one value a row, \[4\]",
        r"\(3,\)",
    ),
    Case(
        "timesteps of rank 2",
        lambda: noised(timesteps=timesteps()[None]),
        ValueError,
        "timesteps",
        "1 dimension",
        r"\(1, 4\)",
    ),
    Case(
        "t beyond the schedule",
        lambda: noised(timesteps=timesteps() + STEPS),
        ValueError,
        "timesteps",
        r"\[0, 999\]",
        r"\[1005, 1008\]",
    ),
    Case(
        "t below 0",
        lambda: noised(timesteps=timesteps() - 6),
        ValueError,
        "timesteps",
        r"\[0, 999\]",
        r"\[-1, 2\]",
    ),
    Case(
        "scheduler for schedule",
        lambda: noised(schedule=ddpm_scheduler()),
        TypeError,
        "schedule",
        "a NoiseSchedule",
        "DDPMScheduler",
    ),
    Case(
        "neighbours of rank 4",
        lambda: redirect(neighbors=images()),
        ValueError,
        "neighbors",
        "5 dimensions",
        r"\(4, 1, 8, 8\)",
    ),
    Case(
        "neighbours of fewer rows",
        lambda: redirect(neighbors=images(6).view(2, 3, *SHAPE)),
        ValueError,
        "neighbors",
        r"\(4, K, 1, 8, 8\)",
        r"\(2, 3, 1, 8, 8\)",
    ),
    Case(
        "no neighbours",
        lambda: redirect(neighbors=images(0).view(4, 0, *SHAPE)),
        ValueError,
        "neighbors",
        "K >= 1",
        r"\(4, 0, 1, 8, 8\)",
    ),
    Case(
        "neighbours of another dtype",
        lambda: redirect(neighbors=images(4).double()[:, None]),
        TypeError,
        "neighbors",
        "dtype of forget, torch.float32",
        "torch.float64",
    ),
    Case(
        "sqdist of another shape",
        lambda: redirect(sqdist=torch.ones(4, 2)),
        ValueError,
        "sqdist",
        r"\(4, 3\)",
        r"\(4, 2\)",
    ),
    Case(
        "x_t of another shape",
        lambda: redirect(x_t=images(2)),
        ValueError,
        "x_t",
        r"shape of forget, \(4, 1, 8, 8\)",
        r"\(2, 1, 8, 8\)",
    ),
    Case(
        "forget and retain differ",
        lambda: mixture(forget=images(3)),
        ValueError,
        "forget",
        r"shape of retain, \(4, 1, 8, 8\)",
        r"\(3, 1, 8, 8\)",
    ),
    Case(
        "forget of another dtype",
        lambda: mixture(forget=images().double()),
        TypeError,
        "forget",
        "dtype of retain, torch.float32",
        "torch.float64",
    ),
    Case("lambd above 1", lambda: mixture(lambd=1.1), ValueError, "lambd", r"\[0, 1\]", "1.1"),
    Case(
        "lambd is NaN", lambda: mixture(lambd=NAN), ValueError, "lambd", r"finite number in \[0, 1\]", "nan"
    ),
    Case("lambd is text", lambda: mixture(lambd="0.5"), TypeError, "lambd", "a number", "'0.5'"),
    Case(
        "from_forget is float",
        lambda: mixture(from_forget=torch.ones(4)),
        TypeError,
        "from_forget",
        r"bool tensor of shape \(4,\)",
        "float32",
    ),
    Case(
        "ratio of another length",
        lambda: mixture(time_log_ratio=torch.ones(3)),
        ValueError,
        "time_log_ratio",
        r"\[4\]",
        r"\(3,\)",
    ),
    Case(
        "target of another shape",
        lambda: functional.denoising_loss(images(), images(3)),
        ValueError,
        "target",
        r"\(4, 1, 8, 8\)",
        r"\(3, 1, 8, 8\)",
    ),
    Case(
        "weight of another length",
        lambda: functional.denoising_loss(images(), images(), torch.ones(3)),
        ValueError,
        "weight",
        r"\[4\]",
        r"\(3,\)",
    ),
    Case(
        "target wants a gradient",
        lambda: functional.denoising_loss(images(), images().requires_grad_()),
        ValueError,
        "target",
        "no gradient",
        "requires_grad=True",
    ),
]
STEP_CASES = [
    Case(
        "model is no callable",
        lambda: step(vanilla_step, model="unet"),
        TypeError,
        "model",
        "a callable",
        "'unet'",
    ),
    Case(
        "optimizer is a learning rate",
        lambda: step(vanilla_step, optimizer=0.1),
        TypeError,
        "optimizer",
        "torch.optim.Optimizer or None",
        "float|0.1",
    ),
    Case(
        "schedule is a scheduler",
        lambda: step(vanilla_step, schedule=ddpm_scheduler()),
        TypeError,
        "schedule",
        "a NoiseSchedule",
        "DDPMScheduler",
    ),
    Case(
        "nothing to train",
        lambda: step(vanilla_step, model=frozen(), optimizer=None),
        ValueError,
        "model",
        "trainable parameter",
        "none with requires_grad",
    ),
    Case(
        "function without optimizer",
        lambda: step(vanilla_step, model=lambda x, t: x, optimizer=None),
        TypeError,
        "model",
        "torch.nn.Module",
        "function",
    ),
    Case(
        "output of another shape",
        lambda: step(vanilla_step, model=lambda x, t: x[:, :, 1:]),
        ValueError,
        "model",
        r"\(4, 1, 8, 8\)",
        r"\(4, 1, 7, 8\)",
    ),
    Case(
        "output without a gradient",
        lambda: step(vanilla_step, model=lambda x, t: x),
        ValueError,
        "model",
        "depends on trainable parameters",
        "without a gradient",
    ),
    Case(
        "retain is None",
        lambda: step(vanilla_step, retain=None),
        TypeError,
        "retain",
        "floating-point tensor",
        "None",
    ),
    Case(
        "ReTrack without retain",
        lambda: step(retrack_step, retain=None),
        TypeError,
        "retain",
        "floating-point tensor",
        "None",
    ),
    Case(
        "ReTrack's neighbours of rank 4",
        lambda: step(retrack_step, neighbors=images()),
        ValueError,
        "neighbors",
        "5 dimensions",
        r"\(4, 1, 8, 8\)",
    ),
    Case("ReTrack's lambd", lambda: step(retrack_step, lambd=-0.1), ValueError, "lambd", r"\[0, 1\]", "-0.1"),
    Case(
        "retain of another size",
        lambda: step(retrack_step, retain=images(shape=(1, 6, 6))),
        ValueError,
        "forget",
        r"\(1, 6, 6\)",
        r"\(1, 8, 8\)",
    ),
    Case(
        "SISS of unequal batches",
        lambda: step(siss_step, retain=images(3)),
        ValueError,
        "forget",
        r"\(3, 1, 8, 8\)",
        r"\(4, 1, 8, 8\)",
    ),
    Case(
        "SISS' variant",
        lambda: step(siss_step, variant="bernouli"),
        ValueError,
        "variant",
        "one of mixture, no_is, bernoulli",
        "'bernouli'",
    ),
    Case(
        "SISS' norm", lambda: step(siss_step, scaling_norm=0), ValueError, "scaling_norm", r"\(0, inf\)", "0"
    ),
    Case(
        "Bernoulli at 1",
        lambda: step(siss_step, variant="bernoulli", lambd=1),
        ValueError,
        "lambd",
        r"\(0, 1\)",
        "1",
    ),
    Case("EraseDiff's eta", lambda: step(erasediff_step, eta=-1.0), ValueError, "eta", r"\[0, inf\)", "-1.0"),
    Case(
        "EraseDiff without forget",
        lambda: step(erasediff_step, forget=None),
        TypeError,
        "forget",
        "floating-point tensor",
        "None",
    ),
    Case(
        "NegGrad's factor",
        lambda: step(neggrad_step, superfactor=0.0),
        ValueError,
        "superfactor",
        r"\(0, inf\)",
        "0.0",
    ),
    Case(
        "NegGrad of uint8",
        lambda: step(neggrad_step, forget=store().images),
        TypeError,
        "forget",
        "floating-point",
        "uint8",
    ),
    Case(
        "clipping to 0",
        lambda: step(vanilla_step, max_grad_norm=0),
        ValueError,
        "max_grad_norm",
        r"\(0, inf\)",
        "0",
    ),
    Case(
        "micro-batch of 0",
        lambda: step(vanilla_step, micro_batch_size=0),
        ValueError,
        "micro_batch_size",
        ">= 1",
        "0",
    ),
    Case(
        "micro-batch of 1.5",
        lambda: step(vanilla_step, micro_batch_size=1.5),
        TypeError,
        "micro_batch_size",
        "an integer",
        "1.5",
    ),
    Case(
        "autocast to float64",
        lambda: step(vanilla_step, autocast_dtype=torch.float64),
        ValueError,
        "autocast_dtype",
        "torch.bfloat16",
        "torch.float64",
    ),
    Case(
        "NaN in a batch, asked for",
        lambda: step(vanilla_step, retain=with_nan()),
        ValueError,
        "retain",
        "finite values",
        "1 NaN or Inf of 256",
    ),
    Case(
        "conditioning of other keys",
        lambda: step(retrack_step, forget_kwargs={"y": timesteps()}, retain_kwargs={}),
        ValueError,
        "forget_kwargs",
        "the same keys",
        r"\['y'\]",
    ),
    Case(
        "conditioning is no tensor",
        lambda: step(retrack_step, forget_kwargs={"y": [1]}, retain_kwargs={"y": [1]}),
        TypeError,
        "forget_kwargs",
        "tensors",
        "list",
    ),
    Case(
        "draws is a dict", lambda: step(vanilla_step, draws={}), TypeError, "draws", "Draws or None", "dict"
    ),
    Case(
        "draws of the other branch",
        lambda: step(neggrad_step, draws=Draws(retain_noise=images())),
        ValueError,
        "draws",
        "only forget_noise",
        "retain_noise",
    ),
    Case(
        "drawn noise of another shape",
        lambda: step(neggrad_step, draws=Draws(forget_noise=images(2))),
        ValueError,
        "draws.forget_noise",
        r"\(4, 1, 8, 8\)",
        r"\(2, 1, 8, 8\)",
    ),
    Case(
        "drawn timesteps too few",
        lambda: step(neggrad_step, draws=Draws(forget_timesteps=timesteps(2))),
        ValueError,
        "draws.forget_timesteps",
        r"\[4\]",
        r"\(2,\)",
    ),
    Case(
        "drawn timesteps outside",
        lambda: step(neggrad_step, draws=Draws(forget_timesteps=timesteps() + STEPS)),
        ValueError,
        "timesteps",
        r"\[0, 999\]",
        r"1005, 1008",
    ),
    Case(
        "drawn branch is integer",
        lambda: step(siss_step, draws=Draws(from_forget=timesteps())),
        ValueError,
        "draws.from_forget",
        "bool of shape",
        "int64",
    ),
    Case(
        "drawn target of another shape",
        lambda: step(erasediff_step, draws=Draws(uniform_target=images(2))),
        ValueError,
        "draws.uniform_target",
        r"\(4, 1",
        r"\(2, 1",
    ),
    Case(
        "drawn noise is a list",
        lambda: step(neggrad_step, draws=Draws(forget_noise=[0.0])),
        TypeError,
        "draws.forget_noise",
        "floating-point tensor",
        "list",
    ),
    Case(
        "drawn branch is a list",
        lambda: step(siss_step, draws=Draws(from_forget=[True] * 4)),
        ValueError,
        "draws.from_forget",
        "bool",
        "list",
    ),
    Case(
        "rows outside a store",
        lambda: step(neggrad_step, draws=Draws(forget_rows=timesteps())),
        ValueError,
        "draws",
        "only forget_noise",
        "forget_rows",
    ),
]
METHOD_CASES = [
    Case("k is 0", lambda: ReTrack(k=0), ValueError, "k", ">= 1", "0"),
    Case("k is a float", lambda: ReTrack(k=10.0), TypeError, "k", "an integer", "10.0"),
    Case("k is True", lambda: ReTrack(k=True), TypeError, "k", "an integer", "True"),
    Case("ReTrack's lambd is NaN", lambda: ReTrack(lambd=NAN), ValueError, "lambd", r"\[0, 1\]", "nan"),
    Case("SISS' lambd is None", lambda: SISS(lambd=None), TypeError, "lambd", "a number", "None"),
    Case(
        "SISS' norm is infinite",
        lambda: SISS(scaling_norm=float("inf")),
        ValueError,
        "scaling_norm",
        "a finite number",
        "inf",
    ),
    Case("eta is text", lambda: EraseDiff(eta="small"), TypeError, "eta", "a number", "'small'"),
    Case(
        "superfactor is negative",
        lambda: NegGrad(superfactor=-1),
        ValueError,
        "superfactor",
        r"\(0, inf\)",
        "-1",
    ),
]
UNLEARNER_CASES = [
    Case(
        "method is a name", lambda: unlearner("retrack"), TypeError, "method", "a method such as", "'retrack'"
    ),
    Case("method is a class", lambda: unlearner(ReTrack), TypeError, "method", "a method such as", "type"),
    Case(
        "Unlearner's optimizer",
        lambda: unlearner(optimizer=None),
        TypeError,
        "optimizer",
        "torch.optim.Optimizer",
        "None",
    ),
    Case(
        "Unlearner's schedule",
        lambda: unlearner(schedule=None),
        TypeError,
        "schedule",
        "a NoiseSchedule",
        "None",
    ),
    Case("Unlearner's model", lambda: unlearner(model=3), TypeError, "model", "a callable", "3"),
    Case("no batch", lambda: unlearner(batch_size=0), ValueError, "batch_size", r"\[1, 4294967296\]", "0"),
    Case(
        "more rows than can be drawn",
        lambda: unlearner(batch_size=10**11),
        ValueError,
        "batch_size",
        r"\[1, 4294967296\] \(rows that can be drawn\)",
        "100000000000",
    ),
    Case(
        "a batch that does not fit into memory",
        lambda: unlearner(batch_size=2**32),
        ValueError,
        "batch_size",
        "rows that fits into the .* that are free",
        "one that takes .* TB",
    ),
    Case(
        "negative seed", lambda: unlearner(seed=-1), ValueError, "seed", r"\[0, 9223372036854775807\]", "-1"
    ),
    Case("seed is a float", lambda: unlearner(seed=0.5), TypeError, "seed", "an integer", "0.5"),
    Case("negative length", lambda: unlearner(total_steps=-1), ValueError, "total_steps", ">= 0", "-1"),
    Case(
        "Unlearner's clipping",
        lambda: unlearner(max_grad_norm=-1.0),
        ValueError,
        "max_grad_norm",
        r"\(0, inf\)",
        "-1.0",
    ),
    Case(
        "Unlearner's autocast",
        lambda: unlearner(autocast_dtype="bf16"),
        ValueError,
        "autocast_dtype",
        "torch.bfloat16",
        "'bf16'",
    ),
    Case("no forget store", lambda: unlearner(forget=None), TypeError, "forget", "an ImageStore", "None"),
    Case(
        "tensor for a store",
        lambda: unlearner(retain=images()),
        TypeError,
        "retain",
        "an ImageStore",
        "float32 of shape",
    ),
    Case(
        "NegGrad without forget",
        lambda: unlearner(NegGrad(), forget=None),
        TypeError,
        "forget",
        "an ImageStore",
        "None",
    ),
    Case(
        "Vanilla without retain",
        lambda: unlearner(Vanilla(), retain=None),
        TypeError,
        "retain",
        "an ImageStore",
        "None",
    ),
    Case(
        "stores of other shapes",
        lambda: unlearner(forget=store(shape=(1, 6, 6))),
        ValueError,
        "forget",
        r"\(1, 8, 8\)",
        r"\(1, 6, 6\)",
    ),
    Case(
        "stores of other dtypes",
        lambda: unlearner(forget=ImageStore(images())),
        TypeError,
        "forget",
        "torch.uint8",
        "torch.float32",
    ),
    Case(
        "forget rows in retain",
        lambda: unlearner(retain=ImageStore(torch.cat([store(9, 1).images, store().images[2:]]))),
        ValueError,
        "forget",
        "not in retain",
        r"2 that are \(rows 2, 3\)",
    ),
    Case(
        "k above the retain set",
        lambda: unlearner(ReTrack(k=21)),
        ValueError,
        "k",
        r"\[1, 20\] \(the rows of retain\)",
        "21",
    ),
    Case(
        "neighbours of another k",
        lambda: unlearner(ReTrack(k=3), neighbors=pairs(4, 2)),
        ValueError,
        "neighbors",
        r"\(4, 3\)",
        r"\(4, 2\)",
    ),
    Case(
        "neighbours outside retain",
        lambda: unlearner(ReTrack(k=3), neighbors=pairs(4, 3, first=18)),
        ValueError,
        "neighbors",
        r"\[0, 19\]",
        r"\[18, 20\]",
    ),
    Case(
        "neighbours are distances",
        lambda: unlearner(ReTrack(k=3), neighbors=(torch.ones(4, 3),) * 2),
        TypeError,
        r"neighbors\[0\]",
        "integer tensor",
        "float32",
    ),
    Case(
        "neighbours are no pair",
        lambda: unlearner(ReTrack(k=3), neighbors=torch.ones(4, 3)),
        TypeError,
        "neighbors",
        "a pair",
        "float32",
    ),
    Case(
        "a scheduler of another optimizer",
        lambda: unlearner(
            lr_scheduler=torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD([torch.zeros(1)], lr=1))
        ),
        ValueError,
        "lr_scheduler",
        "of the optimizer given",
        "ConstantLR of another one",
    ),
    Case(
        "a scheduler that asks for a metric",
        lambda: unlearner(
            lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau(torch.optim.SGD([torch.zeros(1)], lr=1))
        ),
        TypeError,
        "lr_scheduler",
        "no metric",
        "ReduceLROnPlateau",
    ),
    Case(
        "resumed with another seed",
        lambda: unlearner().load_state_dict({"seed": 7, "step_index": 0, "skipped_steps": 0}),
        ValueError,
        "seed",
        "7",
        "0",
    ),
    Case(
        "rows of a set that is not read",
        lambda: unlearner(NegGrad()).step(Draws(retain_rows=timesteps())),
        ValueError,
        "draws",
        "only",
        "retain_rows",
    ),
    Case(
        "drawn rows are floats",
        lambda: unlearner().step(Draws(forget_rows=torch.ones(2))),
        TypeError,
        "draws.forget_rows",
        "integer tensor",
        "float32",
    ),
    Case(
        "no drawn rows",
        lambda: unlearner().step(Draws(retain_rows=timesteps(0))),
        ValueError,
        "draws.retain_rows",
        "at least one row",
        "none",
    ),
    Case(
        "drawn row outside the store",
        lambda: unlearner().step(Draws(forget_rows=torch.tensor([1, 9]))),
        ValueError,
        "draws.forget_rows",
        r"\[0, 3\]",
        "9",
    ),
]
STORE_CASES = [
    Case(
        "images are a list",
        lambda: ImageStore([1, 2]),
        TypeError,
        "images",
        "a tensor, a numpy array",
        "list",
    ),
    Case(
        "images are int64",
        lambda: ImageStore(torch.zeros(1, *SHAPE, dtype=torch.int64)),
        TypeError,
        "images",
        "uint8",
        "int64",
    ),
    Case(
        "stored rank 3",
        lambda: ImageStore(images()[0]),
        ValueError,
        "images",
        r"\[N, C, H, W\]",
        r"\[1, 8, 8\]",
    ),
    Case(
        "store of nothing",
        lambda: ImageStore(images(0)),
        ValueError,
        "images",
        "at least one row",
        r"\[0, 1, 8, 8\]",
    ),
    Case(
        "pixels in [0, 255] as floats",
        lambda: ImageStore(store().images.float()),
        ValueError,
        "images",
        r"\[-1, 1\]",
        r"\[.*2[0-9][0-9]\]",
    ),
    Case(
        "stored NaN",
        lambda: ImageStore(with_nan()),
        ValueError,
        "images",
        "finite values",
        "NaN or Inf in row 1",
    ),
    Case(
        "stored Inf, latents",
        lambda: ImageStore(images() / 0, latents=True),
        ValueError,
        "images",
        "finite values",
        "NaN or Inf in row 0",
    ),
    Case(
        "uint8 latents",
        lambda: ImageStore(store().images, latents=True),
        ValueError,
        "latents",
        "float rows",
        "uint8",
    ),
    Case(
        "labels of another length",
        lambda: ImageStore(images(), labels=[1, 2]),
        ValueError,
        "labels",
        r"\[4\]",
        r"\[2\]",
    ),
    Case(
        "labels are floats",
        lambda: ImageStore(images(), labels=[0.5] * 4),
        TypeError,
        "labels",
        "integers",
        "float32",
    ),
    Case("rows selected outside", lambda: store().select([4]), ValueError, "index", r"\[0, 3\]", r"\[4, 4\]"),
]
NEIGHBOR_CASES = [
    Case(
        "k of 0",
        lambda: nearest_neighbors(store(), store(9), 0),
        ValueError,
        "k",
        r"\[1, 9\] \(the rows of retain\)",
        "0",
    ),
    Case(
        "k above",
        lambda: nearest_neighbors(store(), store(9), 10),
        ValueError,
        "k",
        r"\[1, 9\] \(the rows of retain\)",
        "10",
    ),
    Case(
        "rows of other shapes",
        lambda: nearest_neighbors(store(), store(9, shape=(1, 6, 6)), 1),
        ValueError,
        "retain",
        r"\(1, 8, 8\)",
        r"\(1, 6, 6\)",
    ),
    Case(
        "rows of other kinds",
        lambda: nearest_neighbors(store(), images(9), 1),
        TypeError,
        "retain",
        "both uint8 or both floating",
        "float32",
    ),
    Case(
        "rows are numpy",
        lambda: nearest_neighbors(np.ones((2, 3)), store(), 1),
        TypeError,
        "forget",
        "an ImageStore or a tensor",
        "ndarray",
    ),
    Case(
        "rows have NaN",
        lambda: nearest_neighbors(images(), with_nan(), 1),
        ValueError,
        "retain",
        "finite values",
        "1 NaN or Inf",
    ),
    Case(
        "rows are integers",
        lambda: nearest_neighbors(timesteps()[:, None], timesteps()[:, None], 1),
        TypeError,
        "forget",
        "uint8 or floating-point",
        "int64",
    ),
]


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def saved_array(path: Path, array: np.ndarray) -> Path:
    np.save(path, array)
    return path


def two_sizes(folder: Path) -> Path:
    for size in (8, 9):
        Image.new("L", (size, size)).save(folder / f"{size}.png")
    return folder


def empty(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


FILE_CASES = [  # called with a temporary folder
    Case(
        "no checkpoint",
        lambda tmp: checkpoint.load(tmp),
        ValueError,
        "",
        "a checkpoint folder",
        "No such file",
    ),
    Case("step below 0", lambda tmp: checkpoint.save(tmp, -1, {}, {}), ValueError, "step", ">= 0", "-1"),
    Case(
        "keep nothing", lambda tmp: checkpoint.save(tmp, 1, {}, {}, keep=0), ValueError, "keep", ">= 1", "0"
    ),
    Case(
        "state of an object",
        lambda tmp: checkpoint.save(tmp, 1, {}, {}, states={"ema": {"x": object()}}),
        TypeError,
        "ema.x",
        "a tensor, number",
        "object",
    ),
    Case(
        "model from nowhere",
        lambda tmp: load_checkpoint(tmp / "gone"),
        ValueError,
        "gone",
        "a folder of DDPMPipeline",
        "does not exist",
    ),
    Case(
        "model from a hub name",
        lambda tmp: load_checkpoint("google/ddpm-celebahq-256"),
        ValueError,
        "google/ddpm",
        "a folder",
        "nothing is downloaded",
    ),
    Case(
        "model from an empty folder",
        lambda tmp: load_checkpoint(empty(tmp)),
        ValueError,
        "config.json",
        "a folder of DDPMPipeline",
        "no such file",
    ),
    Case(
        "model of another kind",
        lambda tmp: save_checkpoint(tmp / "out", TinyDenoiser(), None),
        TypeError,
        "model",
        "UNet2DModel",
        "TinyDenoiser",
    ),
    Case(
        "data from nowhere",
        lambda tmp: load_images(tmp / "gone.npy"),
        ValueError,
        "gone.npy",
        "a folder of images",
        "does not exist",
    ),
    Case("no data", lambda tmp: load_images([]), ValueError, "paths", "at least one path", "none"),
    Case(
        "pickled tensors",
        lambda tmp: load_images(written(tmp / "a.pt", b"x")),
        ValueError,
        "a.pt",
        "a folder of images",
        "pickles",
    ),
    Case(
        "pickled array",
        lambda tmp: load_images(saved_array(tmp / "a.npy", np.array([{}]))),
        ValueError,
        "a.npy",
        "plain numbers",
        "numpy does not read",
    ),
    Case(
        "cut image",
        lambda tmp: load_images(written(tmp / "a.png", b"\x89PNG")),
        ValueError,
        "a.png",
        "an image",
        "Pillow does not recognise",
    ),
    Case(
        "text file",
        lambda tmp: load_images(written(tmp / "a.txt", b"x")),
        ValueError,
        "a.txt",
        "a folder of images",
        "ends in .txt",
    ),
    Case(
        "idx of no idx",
        lambda tmp: load_images(written(tmp / "a-idx3-ubyte", b"\x01\x02\x03\x04")),
        ValueError,
        "a-idx3-ubyte",
        "magic number",
        "01 02 03 04",
    ),
    Case(
        "short idx",
        lambda tmp: load_images(written(tmp / "a-idx3-ubyte", bytes([0, 0, 8, 3, *[0, 0, 0, 2] * 3, 7]))),
        ValueError,
        "a-idx3",
        "8 bytes",
        "1",
    ),
    Case(
        "gzip of no gzip",
        lambda tmp: load_images(written(tmp / "a-idx3.gz", b"nothing")),
        ValueError,
        "a-idx3.gz",
        "a whole gzip file",
        "damaged",
    ),
    Case(
        "empty folder",
        lambda tmp: load_images(empty(tmp)),
        ValueError,
        "empty",
        "a folder with images",
        "none",
    ),
    Case(
        "images of two sizes",
        lambda tmp: load_images(two_sizes(tmp)),
        ValueError,
        "9.png",
        r"\[1, 8, 8\]",
        r"\[1, 9, 9\]",
    ),
    Case(
        "array of rank 5",
        lambda tmp: load_images(saved_array(tmp / "a.npy", np.zeros((1,) * 5))),
        ValueError,
        "a.npy",
        r"\[N, C, H, W\]",
        r"\[1, 1, 1, 1, 1\]",
    ),
    Case(
        "array in [0, 255]",
        lambda tmp: load_images(saved_array(tmp / "a.npy", np.full((2, 8, 8), 255.0))),
        ValueError,
        "a.npy",
        r"\[-1, 1\]",
        "255",
    ),
    Case("size is text", lambda tmp: load_images(tmp, size="8"), TypeError, "size", "an integer or", "'8'"),
    Case(
        "MNIST is missing",
        lambda tmp: load_mnist_tshirt(tmp, tmp),
        ValueError,
        "",
        "train-images-idx3-ubyte",
        "none",
    ),
]


def sample(**changed):
    given = {"model": TinyDenoiser(), "num_images": 2, "shape": SHAPE, "num_inference_steps": 2}
    return sampling.sample(**given | {"scheduler": ddpm_scheduler(num_train_timesteps=20)} | changed)


EVALUATION_CASES = [
    Case("no samples", lambda: sample(num_images=0), ValueError, "num_images", ">= 1", "0"),
    Case(
        "flat samples",
        lambda: sample(shape=(8, 8)),
        ValueError,
        "shape",
        r"\(channels, height, width\)",
        r"\(8, 8\)",
    ),
    Case(
        "too many steps",
        lambda: sample(num_inference_steps=21),
        ValueError,
        "num_inference_steps",
        r"\[1, 20\]",
        "21",
    ),
    Case(
        "unknown sampler",
        lambda: sample(sampler="euler"),
        ValueError,
        "sampler",
        "one of ddpm, ddim",
        "'euler'",
    ),
    Case(
        "schedule for scheduler",
        lambda: sample(scheduler=SCHEDULE),
        TypeError,
        "scheduler",
        "a diffusers scheduler",
        "NoiseSchedule",
    ),
    Case(
        "t outside",
        lambda: sampling.inject_and_denoise(TinyDenoiser(), ddpm_scheduler(), images(), 1000),
        ValueError,
        "timestep",
        r"\[0, 999\]",
        "1000",
    ),
    Case(
        "threshold of 0",
        lambda: frequency(images(), images(1), 0),
        ValueError,
        "threshold",
        r"\(0, inf\)",
        "0",
    ),
    Case(
        "two reference images",
        lambda: frequency(images(), images(2)),
        ValueError,
        "image",
        "one image",
        r"\(2, 1, 8, 8\)",
    ),
]
CASES = (
    SCHEDULE_CASES
    + FUNCTIONAL_CASES
    + STEP_CASES
    + METHOD_CASES
    + UNLEARNER_CASES
    + STORE_CASES
    + NEIGHBOR_CASES
    + FILE_CASES
    + EVALUATION_CASES
)


def test_the_table_is_long_and_its_names_differ():
    assert len({case.name for case in CASES}) == len(CASES) >= 60


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_bad_input(case, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTUNLEARN_CHECK", "1")  # checks that read values too
    with pytest.raises(case.error) as caught:
        case.call(tmp_path) if case in FILE_CASES else case.call()
    message = str(caught.value)
    assert re.search(f"{case.argument}.*expected.*{case.expected}.*got.*{case.given}", message, re.DOTALL), (
        message
    )
