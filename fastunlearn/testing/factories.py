"""Random inputs of every op, and small networks that are cheap enough for a test."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..objective.schedule import NoiseSchedule


def linear_schedule(num_timesteps: int = 1000, prediction_type: str = "epsilon") -> NoiseSchedule:
    """DDPM's linear betas, 1e-4 to 0.02, from float32 `alphas_cumprod` as diffusers makes them; `"flow"`
    gives flow matching instead.
    """
    if prediction_type == "flow":
        return NoiseSchedule.flow(num_timesteps)
    betas = torch.linspace(1e-4, 0.02, num_timesteps, dtype=torch.float32)
    return NoiseSchedule.from_alphas_cumprod(torch.cumprod(1 - betas, dim=0), prediction_type=prediction_type)


def served(rows: Tensor) -> Tensor:
    """What stored rows mean, on the CPU: uint8 `u` is the float32 `u / 127.5 - 1`, float rows are themselves.

    The truth for every device and backend: numpy divides, where torch on CUDA multiplies by the reciprocal.
    """
    rows = rows.cpu()
    if rows.dtype != torch.uint8:
        return rows
    return torch.from_numpy(rows.numpy().astype(np.float32) / np.float32(127.5) - np.float32(1))


class RedirectInputs(NamedTuple):
    """Arguments of `functional.redirect`."""

    forget: Tensor  # [B, C, H, W]
    neighbors: Tensor  # [B, K, C, H, W]
    noise: Tensor  # [B, C, H, W]
    timesteps: Tensor  # [B]


class MixtureInputs(NamedTuple):
    """Arguments of `functional.mixture`, without the schedule and lambd."""

    retain: Tensor  # [B, C, H, W]
    forget: Tensor  # [B, C, H, W]
    noise: Tensor  # [B, C, H, W]
    timesteps: Tensor  # [B]
    from_forget: Tensor  # [B] bool


def redirect_inputs(
    batch: int = 3,
    num_neighbors: int = 4,
    shape: tuple[int, ...] = (1, 8, 8),
    *,
    distance: float = 0.1,
    timesteps: Tensor | int | None = None,
    num_timesteps: int = 1000,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> RedirectInputs:
    """Forget images in [-1, 1] with neighbours at about `distance` per element, one after the other a little
    farther away.

    The values are the same in every dtype: they are drawn in float32.
    """
    generator = torch.Generator().manual_seed(seed)
    forget = torch.rand(batch, *shape, generator=generator) * 2 - 1
    farther = distance * torch.linspace(1, 1.5, num_neighbors).view(1, num_neighbors, *(1,) * len(shape))
    neighbors = (
        forget.unsqueeze(1) + farther * torch.randn(batch, num_neighbors, *shape, generator=generator)
    ).clamp(-1, 1)
    noise = torch.randn(batch, *shape, generator=generator)
    return RedirectInputs(
        forget.to(dtype),
        neighbors.to(dtype),
        noise.to(dtype),
        _timesteps(timesteps, batch, num_timesteps, generator),
    )


def mixture_inputs(
    batch: int = 4,
    shape: tuple[int, ...] = (1, 8, 8),
    *,
    distance: float = 0.1,
    timesteps: Tensor | int | None = None,
    num_timesteps: int = 1000,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> MixtureInputs:
    """Pairs of images at about `distance` per element; about half of the rows come from the forget branch."""
    generator = torch.Generator().manual_seed(seed)
    retain = torch.rand(batch, *shape, generator=generator) * 2 - 1
    forget = (retain + distance * torch.randn(batch, *shape, generator=generator)).clamp(-1, 1)
    noise = torch.randn(batch, *shape, generator=generator)
    from_forget = torch.rand(batch, generator=generator) < 0.5
    return MixtureInputs(
        retain.to(dtype),
        forget.to(dtype),
        noise.to(dtype),
        _timesteps(timesteps, batch, num_timesteps, generator),
        from_forget,
    )


class TinyDenoiser(nn.Module):
    """A smooth network of a few hundred parameters: two convolutions and a timestep shift.

    `forward(x_t, t) -> [B, C, H, W]`.
    """

    def __init__(self, channels: int = 1, width: int = 6, *, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.enter = nn.Conv2d(channels, width, 3, padding=1)
            self.time = nn.Linear(2, width)
            self.leave = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        angle = t.to(x_t.dtype) / 1000
        shift = self.time(torch.stack([angle.sin(), angle.cos()], dim=1))
        return self.leave(torch.nn.functional.silu(self.enter(x_t) + shift[:, :, None, None]))


class Average:
    """A moving average of the weights, with the methods of diffusers' `EMAModel` that a run calls."""

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float = 0.9):
        self.decay = decay
        self.shadow_params = [parameter.detach().clone() for parameter in parameters]

    def step(self, parameters: Iterable[nn.Parameter]) -> None:
        weights = [parameter.detach() for parameter in parameters]
        torch._foreach_lerp_(self.shadow_params, weights, 1 - self.decay)

    def state_dict(self) -> dict:
        return {"shadow_params": self.shadow_params}

    def load_state_dict(self, state: dict) -> None:
        self.shadow_params = state["shadow_params"]


def _timesteps(
    timesteps: Tensor | int | None, batch: int, num_timesteps: int, generator: torch.Generator
) -> Tensor:
    if timesteps is None:
        return torch.randint(0, num_timesteps, (batch,), generator=generator)
    return torch.full((batch,), timesteps) if isinstance(timesteps, int) else timesteps
