"""A diffusers checkpoint that is cheap enough for a test: 8x8 grey images, 20 timesteps, a few thousand
parameters.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ..host import check
from ..models import save_checkpoint

TINY_SHAPE = (1, 8, 8)
TINY_TIMESTEPS = 20


def tiny_unet(seed: int = 0, **config):
    """A diffusers `UNet2DModel` for images of `TINY_SHAPE`, or with another `config`."""
    diffusers = check.package("diffusers", "tiny_unet")
    blocks = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    size = {
        "sample_size": 8,
        "layers_per_block": 1,
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
        "attention_head_dim": 4,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return diffusers.UNet2DModel(**{"in_channels": 1, "out_channels": 1, **size, **blocks, **config})


def save_tiny_checkpoint(folder: Path, seed: int = 0) -> Path:
    """`tiny_unet(seed)` with a DDPM scheduler of `TINY_TIMESTEPS` as a pipeline folder."""
    diffusers = check.package("diffusers", "save_tiny_checkpoint")
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=TINY_TIMESTEPS)
    return save_checkpoint(folder, tiny_unet(seed), scheduler)
