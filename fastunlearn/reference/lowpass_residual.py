"""The residual seen through a mask of spatial frequencies, by Fourier transforms.

arXiv 2510.17917, Eq. 8 and 9: `E = ||F^-1(M o F(prediction - target))||^2`, with F the orthonormal
two-dimensional DFT of each channel and M a real mask of the integer frequencies `|u|, |v|`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def lowpass_residual(
    prediction: Tensor, target: Tensor, weight: Tensor, band: Tensor, inside: float, outside: float
) -> tuple[Tensor, Tensor]:
    """`weight E`, `[B]`, and its gradient with respect to the prediction, `[B, C, H, W]`.

    The gradient is `2 weight F^-1(M^2 o F(prediction - target))`.

    Args:
        prediction, target: `[B, C, H, W]`, float32 or float64.
        weight: `[B]`.
        band: `[U, V]` of 0 and 1 over the frequencies `0 <= u < U`, `0 <= v < V`; those that it does not hold
            are outside. NaN makes the results NaN.
        inside, outside: M on the band, and elsewhere.
    """
    # M, F(r), then F^-1(M o F(r)) for the energy and F^-1(M^2 o F(r)) for its gradient.
    mask = full_mask(band, *prediction.shape[-2:], inside, outside).to(prediction.dtype)
    spectrum = torch.fft.fft2(prediction - target, norm="ortho")
    filtered = torch.fft.ifft2(mask * spectrum, norm="ortho").real
    twice = torch.fft.ifft2(mask.square() * spectrum, norm="ortho").real
    energy = filtered.square().flatten(1).sum(dim=1)
    return weight * energy, 2 * weight.to(prediction.dtype).view(-1, 1, 1, 1) * twice


def full_mask(band: Tensor, height: int, width: int, inside: float, outside: float) -> Tensor:
    """M over all frequencies in the order of `torch.fft.fft2`, `[H, W]` float64; NaN where `band` is."""
    u, v = _frequencies(height, band.device), _frequencies(width, band.device)
    held = (u < band.shape[0])[:, None] & (v < band.shape[1])
    # Frequencies beyond the band read its last entry, and are masked out.
    entries = band[u.clamp(max=band.shape[0] - 1)][:, v.clamp(max=band.shape[1] - 1)]
    in_band = held & (entries != 0)
    within, beyond = torch.tensor([inside, outside], dtype=torch.float64)
    mask = torch.where(in_band, within, beyond)
    return torch.where(held & entries.isnan(), torch.nan, mask)


def _frequencies(size: int, device: torch.device) -> Tensor:
    """`|u|` of each entry of a DFT of `size`: 0, 1, 2, ..., 2, 1."""
    index = torch.arange(size, device=device)
    return torch.minimum(index, size - index)
