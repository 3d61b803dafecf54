"""Small networks, schedules, images and averages that the cases are made of."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastunlearn import NoiseSchedule

SHAPE = (1, 8, 8)


def check_origin(tree: Path) -> None:
    """Whether all of the package that is loaded comes from `tree`.

    An editable installation answers for every module that a tree does not have, with another tree's.
    """
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        ours = name.partition(".")[0] == "fastunlearn" and file is not None
        if ours and not Path(file).resolve().is_relative_to(tree.resolve()):
            raise SystemExit(f"{name}: expected it from {tree}, got it from {file}")


def found(name: str, *modules: str) -> Any:
    """What is called `name` in the first of `modules` that has it: for names that may be moved."""
    for module in modules:
        try:
            return getattr(import_module(module), name)
        except (ImportError, AttributeError):
            continue
    raise ImportError(f"{name}: expected it in {' or '.join(modules)}, got it in none of them")


@contextmanager
def environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def byte_images(count: int, seed: int) -> Tensor:
    """`[count, 1, 8, 8]` uint8."""
    return torch.randint(0, 256, (count, *SHAPE), generator=seeded(seed), dtype=torch.uint8)


def images(count: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """`[count, 1, 8, 8]` in [-1, 1]."""
    return (torch.rand(count, *SHAPE, generator=seeded(seed)) * 2 - 1).to(dtype)


def schedule(prediction_type: str = "epsilon") -> NoiseSchedule:
    """DDPM's linear schedule of 1000 timesteps, or flow matching."""
    if prediction_type == "flow":
        return NoiseSchedule.flow(1000, shift=3.0)
    betas = torch.linspace(1e-4, 0.02, 1000)
    return NoiseSchedule.from_alphas_cumprod(torch.cumprod(1 - betas, dim=0), prediction_type=prediction_type)


class Denoiser(nn.Module):
    """Two convolutions, a timestep shift and, where they are given, labels and other conditions."""

    def __init__(self, *, dropout: float = 0.0, batch_norm: bool = False, width: int = 6):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.enter = nn.Conv2d(1, width, 3, padding=1)
            self.time = nn.Linear(2, width)
            self.labels = nn.Embedding(10, width)
            self.leave = nn.Conv2d(width, 1, 3, padding=1)
        self.norm = nn.BatchNorm2d(width) if batch_norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_t, t, labels=None, added=None, strength=1.0):
        angle = t.to(self.time.weight.dtype) / 1000
        shift = self.time(torch.stack([angle.sin(), angle.cos()], dim=1))
        if labels is not None:
            shift = shift + strength * self.labels(labels)
        if added is not None:
            shift = shift * added["scale"]
        hidden = self.dropout(self.norm(self.enter(x_t)) + shift[:, :, None, None])
        return self.leave(torch.nn.functional.silu(hidden))


class Average:
    """A moving average of the weights, of the interface of diffusers' `EMAModel`."""

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float = 0.9):
        self.decay, self.optimization_step = decay, 0
        self.shadow_params = [parameter.detach().clone() for parameter in parameters]

    def step(self, parameters: Iterable[nn.Parameter]) -> None:
        self.optimization_step += 1
        weights = [parameter.detach() for parameter in parameters]
        torch._foreach_lerp_(self.shadow_params, weights, 1 - self.decay)

    def state_dict(self) -> dict[str, Any]:
        return {
            "decay": self.decay,
            "optimization_step": self.optimization_step,
            "shadow_params": self.shadow_params,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def make_optimizer(kind: str, model: nn.Module) -> torch.optim.Optimizer | None:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if kind == "none":
        return None
    if kind.startswith("sgd"):
        return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, fused=kind == "sgd_fused")
    if kind == "groups":
        groups = [{"params": parameters[:3]}, {"params": parameters[3:], "lr": 1e-4, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=1e-3, fused=True)
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1, fused=kind == "fused")
