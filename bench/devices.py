"""What the vendor says of the GPUs that the kernels are tuned for, and the shortest time that a kernel can
take there.

Sources: the A100, H100 and H200 data sheets (tensor cores without sparsity, that is half of the printed
number where it is printed with it).
"""

from __future__ import annotations

from dataclasses import dataclass

_TF32X3 = 3  # products of TF32 that make one of float32 accuracy


@dataclass(frozen=True)
class Device:
    name: str
    matches: tuple[str, ...]  # what torch.cuda.get_device_name must contain
    bandwidth: float  # bytes/s
    tf32: float  # FLOP/s of the tensor cores, dense

    def floor_seconds(self, size: int, flops: int = 0) -> float:
        """The time below which no kernel gets that moves `size` bytes and multiplies matrices of float32
        accuracy with `flops` operations.
        """
        return max(size / self.bandwidth, _TF32X3 * flops / self.tf32)


DEVICES = (
    Device("A100-40GB", ("A100", "40GB"), 1.555e12, 156e12),
    Device("H100 SXM", ("H100", "HBM3"), 3.35e12, 494.7e12),
    Device("H200", ("H200",), 4.8e12, 494.7e12),
)


def find(name: str) -> Device | None:
    """The entry for a GPU as torch names it."""
    return next((device for device in DEVICES if all(part in name for part in device.matches)), None)
