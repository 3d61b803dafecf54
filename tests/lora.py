"""A small network with adapters, for tests of what is trained beside frozen weights."""

from __future__ import annotations

import torch
from torch import nn

from fastunlearn.testing.factories import TinyDenoiser


class Adapter(nn.Module):
    """A convolution and a low-rank change of it, switched as peft's layers are."""

    def __init__(self, base: nn.Conv2d, rank: int = 2):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Conv2d(base.in_channels, rank, 3, padding=1, bias=False)
        self.up = nn.Conv2d(rank, base.out_channels, 1, bias=False)
        nn.init.zeros_(self.up.weight)
        self.off = False

    @property
    def disable_adapters(self) -> bool:
        return self.off

    def enable_adapters(self, enabled: bool) -> None:
        self.off = not enabled
        self.down.requires_grad_(enabled)
        self.up.requires_grad_(enabled)

    def forward(self, x):
        if self.off:
            return self.base(x)
        return self.base(x) + self.up(self.down(x))


class WithLora(TinyDenoiser):
    """A tiny denoiser whose convolutions have adapters."""

    def __init__(self):
        super().__init__()
        self.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.enter, self.leave = Adapter(self.enter), Adapter(self.leave)

    def moved(self):
        """After some training: the adapters are no longer 0."""
        generator = torch.Generator().manual_seed(2)
        for layer in (self.enter, self.leave):
            layer.up.weight.data.normal_(generator=generator).mul_(0.1)
        return self
