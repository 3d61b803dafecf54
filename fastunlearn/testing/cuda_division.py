"""Division by a number as torch does it on CUDA, on a CPU: what depends on a quotient's last bit shows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# What CUDA computes in, where it is not the dtype itself.
_OPMATH = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


class CudaDivision(TorchDispatchMode):
    """Within the block, a tensor divided by a Python number is multiplied by the number's rounded reciprocal.

    That is what torch does on CUDA for a divisor in host memory: in float32 for half precision, in the
    tensor's own dtype for float32 and float64. Division by a tensor on the device, division with a rounding
    mode and `number / tensor` are the same on both and stay what they are. (A 0-d tensor in host memory is a
    number to CUDA, too. Here it cannot be told from one on the device, and divides.)

    This package's own ops are looked into.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "fastunlearn":
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        if func not in (torch.ops.aten.div.Tensor, torch.ops.aten.div_.Tensor, torch.ops.aten.div.out):
            return func(*args, **kwargs)
        dividend, divisor = args
        if isinstance(divisor, Tensor):
            return func(*args, **kwargs)

        quotient = by_reciprocal(dividend, divisor)
        if func is torch.ops.aten.div_.Tensor:
            return dividend.copy_(quotient)
        return kwargs["out"].copy_(quotient) if "out" in kwargs else quotient


def by_reciprocal(dividend: Tensor, divisor: float) -> Tensor:
    """`dividend / divisor` as CUDA rounds it, in the dtype that torch gives it (integers: the default)."""
    dtype = torch.result_type(dividend, divisor)
    if not dtype.is_floating_point:
        dtype = torch.get_default_dtype()
    computed = _OPMATH.get(dtype, dtype)
    reciprocal = torch.ones((), dtype=computed) / torch.full((), divisor, dtype=computed)
    return (dividend.to(dtype).to(computed) * reciprocal).to(dtype)
