"""The networks that are timed, with the batches that the papers use on them, and the recipe that the methods'
records have hyperparameters for; weights are random.

Sources: ReTrack's experiment configs and the configs of the checkpoints named there. `small` and `tiny` are
this project's own: a network of about 3 million parameters at the shape of CIFAR-10 for CPUs, and one for
smoke runs, whose step is mostly what surrounds the network.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_DOWN, _UP, _ATTN_DOWN, _ATTN_UP = "DownBlock2D", "UpBlock2D", "AttnDownBlock2D", "AttnUpBlock2D"
# Ho et al.'s checkpoints
_DDPM_STYLE = {"flip_sin_to_cos": False, "freq_shift": 1, "downsample_padding": 0, "norm_eps": 1e-6}


@dataclass(frozen=True)
class Network:
    """One network and how it is trained. `betas` and `weight_decay` are AdamW's; so is `lr`, of methods that
    say nothing of the recipe.
    """

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, int, int]  # (C, H, W) of an image or latent
    batch: dict[str, int]  # device -> rows of a step from each set
    # (device, precision) -> at most so many rows in one call, for all but the papers' way; absent: no limit
    micro: dict[tuple[str, str], int]
    recipe: str
    # rows of a micro-batch of the papers, who accumulate up to `batch`; None: all of them
    papers_micro: int | None = None
    condition: tuple[int, int] | None = None  # (tokens, width) of encoder_hidden_states
    retain_rows: int = 512  # in the store
    lr: float = 5e-5
    betas: tuple[float, float] = (0.95, 0.999)
    weight_decay: float = 1e-6

    @property
    def latents(self) -> bool:
        return self.condition is not None

    @property
    def needs_diffusers(self) -> bool:
        return self.name != SMOKE

    def build(self) -> nn.Module:
        """With random weights, the same at each call, in training mode, on the CPU."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.make().train()

    def optimizer(self, parameters, lr: float, **kwargs) -> torch.optim.AdamW:
        """The papers' AdamW; `kwargs` say which implementation."""
        return torch.optim.AdamW(
            parameters, lr=lr, betas=self.betas, weight_decay=self.weight_decay, **kwargs
        )


@dataclass
class Output:
    """What a diffusers model returns."""

    sample: Tensor  # [B, C, H, W]


class Wide(nn.Module):
    """A perceptron on a few pixels: next to no arithmetic for its many weights.

    Called as a diffusers model is.

    Args:
        shape: `(C, H, W)` of an image.
    """

    def __init__(self, shape: tuple[int, int, int], width: int, depth: int):
        super().__init__()
        pixels = shape[0] * shape[1] * shape[2]
        self.enter, self.time, self.leave = (
            nn.Linear(pixels, width),
            nn.Linear(2, width),
            nn.Linear(width, pixels),
        )
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x_t: Tensor, timesteps: Tensor, return_dict: bool = True) -> Output | tuple[Tensor]:
        angle = timesteps.to(x_t.dtype) / 1000
        state = self.enter(x_t.flatten(1)) + self.time(torch.stack([angle.sin(), angle.cos()], dim=1))
        for layer in self.hidden:
            state = state + layer(nn.functional.silu(state))
        sample = self.leave(state).view_as(x_t)
        return Output(sample) if return_dict else (sample,)


def reference_of(model: nn.Module) -> nn.Module:
    """A frozen network to compare `model` with, from nearby: losses of equal networks would be told apart by
    nobody.
    """
    reference = copy.deepcopy(model).requires_grad_(False).eval()
    with torch.no_grad():
        torch._foreach_mul_(list(reference.parameters()), REFERENCE_FACTOR)
    return reference


def _ddpm(
    size: int, channels: int, widths: tuple[int, ...], attention: int, **more
) -> Callable[[], nn.Module]:
    """Makes a UNet2DModel with attention at level `attention`, counted from the finest."""
    down = tuple(_ATTN_DOWN if level == attention else _DOWN for level in range(len(widths)))
    up = tuple(_ATTN_UP if level == attention else _UP for level in reversed(range(len(widths))))
    plain = {"sample_size": size, "in_channels": channels, "out_channels": channels}
    return lambda: _diffusers(
        "UNet2DModel",
        {**plain, "block_out_channels": widths, "down_block_types": down, "up_block_types": up, **more},
    )


def _diffusers(name: str, config: dict[str, Any]) -> nn.Module:
    import diffusers

    return getattr(diffusers, name)(**config)


_STABLE_DIFFUSION = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + (_DOWN,),
    "up_block_types": (_UP,) + ("CrossAttnUpBlock2D",) * 3,
}

SMOKE = "tiny"
NETWORKS = {
    network.name: network
    for network in (
        Network(
            "mnist",
            _ddpm(28, 1, (64, 128, 256), 1),
            (1, 28, 28),
            {"cpu": 16, "cuda": 128},
            {},
            "mnist-tshirt",
        ),
        Network(
            "small",
            _ddpm(32, 3, (32, 64, 160), 1, layers_per_block=1),
            (3, 32, 32),
            {"cpu": 16, "cuda": 128},
            {},
            "cifar-10",
            lr=2e-5,
        ),
        Network(
            "cifar",
            _ddpm(32, 3, (128, 256, 256, 256), 1, **_DDPM_STYLE),
            (3, 32, 32),
            {"cpu": 16, "cuda": 128},
            {},
            "cifar-10",
            lr=2e-5,
        ),
        Network(
            "celeba",
            _ddpm(256, 3, (128, 128, 256, 256, 512, 512), 4, **_DDPM_STYLE),
            (3, 256, 256),
            {"cpu": 4, "cuda": 64},
            # several graphs lie in memory at once
            {("cpu", "float32"): 2, ("cuda", "float32"): 8, ("cuda", "bfloat16"): 16},
            "celeba-hq",
            papers_micro=4,
            retain_rows=64,
            lr=5e-6,
        ),
        Network(
            "sd",
            lambda: _diffusers("UNet2DConditionModel", _STABLE_DIFFUSION),
            (4, 64, 64),
            {"cpu": 2, "cuda": 16},
            {("cpu", "float32"): 1, ("cuda", "float32"): 8},
            "sd-1.4",
            papers_micro=1,
            condition=(77, 768),
            retain_rows=128,
            lr=1e-5,
            betas=(0.9, 0.999),
            weight_decay=1e-2,
        ),
        Network(
            SMOKE,
            lambda: Wide((1, 4, 4), 384, 8),
            (1, 4, 4),
            {"cpu": 4, "cuda": 4},
            {},
            "mnist-tshirt",
            retain_rows=64,
        ),
    )
}
K = 10  # ReTrack's neighbours
REFERENCE_FACTOR = 1.001  # of the weights
SISS_LAMBD = 0.5  # in all recipes

# step(draw=None): a whole step; with a `Draw` on the job's fixed images and these random numbers
Step = Callable[..., None]
