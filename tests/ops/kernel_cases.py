"""What the tests of the C++ kernels share: schedules, numbers, and how far a result may be off."""

import pytest
import torch

from fastunlearn.host.store import DTYPES as ROWS
from fastunlearn.ops._backends import build_command, extension
from fastunlearn.testing.factories import linear_schedule

# Marks of a module that is about the kernels and nothing else.
for_kernels = [
    pytest.mark.skipif(
        not extension("_C"), reason=f"the C++ extension is not built; build it with: {build_command()}"
    ),
    pytest.mark.usefixtures("only_kernels"),
]
FLOATS = ROWS[1:]
SCHEDULES = {
    "epsilon": linear_schedule(),
    "v": linear_schedule(prediction_type="v_prediction"),
    "flow": linear_schedule(prediction_type="flow"),
}


def normal(shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def coefficients(batch, prediction_type="epsilon"):
    """`[batch, 5]` of timesteps from the first to the last; of the first, where there is one row."""
    return SCHEDULES[prediction_type].coefficients(torch.linspace(0, 999, batch).long())


def assert_rounded(name, actual, exact, terms, roundings, precision):
    """Every number errs by at most `roundings` roundings to `precision` of the sum of its absolute `terms`,
    and one to its own dtype.
    """
    own = torch.finfo(actual.dtype)
    computed = roundings * torch.finfo(precision).eps / 2 * terms
    excess = (
        (actual.double() - exact).abs()
        - computed
        - own.eps / 2 * (exact.abs() + computed)
        - own.smallest_normal * own.eps
    )
    assert excess.max() <= 0, f"{name}: {excess.max():.3g} too far"  # false for NaN, too
