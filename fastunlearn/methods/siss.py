from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .. import functional as F
from ..host import check
from ..host.philox import Noise
from ..host.store import Rows
from ..objective.combine import SCALINGS, Rescale, Sum
from ..objective.conditioning import map_tensors
from ..objective.draws import PAIR, Bernoulli, Draw, Draws, TimeLogRatio
from ..objective.protocol import Batch, Method, Pass, Term
from ..objective.schedule import NoiseSchedule
from .registry import register


@register(
    help="descends on the retain set and ascends on the forget set, in one importance-weighted network call.",
    source="arXiv 2503.01034, Eq. 6 and appendix A.1",
    recipes={
        "mnist-tshirt": {"lambd": 0.5, "scaling_norm": 5.0, "lr": 5e-5},
        "celeba-hq": {"lambd": 0.5, "scaling_norm": 500.0, "lr": 5e-6},
        "cifar-10": {"lambd": 0.5, "scaling_norm": 5.0, "lr": 2e-5},
        "sd-1.4": {"lambd": 0.5, "scaling_norm": 750.0, "lr": 1e-5},
        "mnist-tshirt-small": {"lambd": 0.5, "scaling_norm": 5.0, "lr": 1.5e-4},
    },
    variants={
        "no_is": {"variant": "no_is"},
        "bernoulli": {"variant": "bernoulli"},
        "ratio": {"scaling_norm": 0.1, "scaling": "ratio"},
        "clip": {"scaling": "clip"},
        "superfactor": {"scaling_norm": None, "superfactor": 1.0},
    },
    timed_on="mnist",
    place=2,
    later=("scaling", "superfactor"),
)
@dataclass(frozen=True)
class SISS(Method):
    """SISS (arXiv 2503.01034): subtracted importance-sampled scores.

    The forget gradient is rescaled to a fixed norm (section 4.2), up or down. Variants: `"mixture"` (the
    method: one noisy image from the defensive mixture, two importance-weighted targets, one forward),
    `"no_is"` (two forwards without importance sampling, SISS `double_forward_with_neg_del`) and `"bernoulli"`
    (the mixture without weights, SISS `subscore_bernoulli`: the retain term divided by `1 - lambd`). `lambd`
    lies in [0, 1], in (0, 1) for `"bernoulli"`.

    With a `superfactor` s nothing is rescaled: the step descends on the printed objective (Eq. 8), for images
    to keep that are drawn from the set to keep (appendix A.1): with k images to forget and n - k to keep

        E_keep ||e - eps||^2 - s k / (n - k) E_forget ||e - eps||^2

    in expectation, for every `lambd` and variant; one backward pass. At s = 0 that is naive deletion. Both
    sets count as disjoint. What the papers' configurations call superfactor is the factor of NegGrad; their
    SISS has neither s nor k / (n - k), and rescales.

    The importance weights compare two images as makers of one noisy image under one condition. Where the
    images of a pair have different ones (labels, captions: any number of `forget_kwargs` and
    `retain_kwargs`), the network is told that of the drawn image, which alone could have made the row: the
    mixture then weights it as Bernoulli does, by `1 / lambd` or `1 / (1 - lambd)`, and the other image by 0.
    Conditions are compared bit for bit: one caption encoded in two batches may come out as two.

    Where every forget weight of a batch is below 1e-308 (small t, no row made from a forget image), it is 0:
    the step is that of the retain term alone, as in the papers' code, and its `scaling_factor` is 0 (with
    `scaling="clip"`, to which such a gradient is short enough, 1).

    Args:
        lambd: share of forget images in the mixture.
        scaling_norm: L2 norm that the forget gradient is set to at every step; about a tenth of the retain
            gradient's (5 for MNIST, 500 for 256x256 faces). With the scaling ratio that share itself, at most
            1: it goes with the scaling, so another one of these takes another number. Not given: 5, or 0.1
            for ratio.
        variant: mixture is the method; no_is has no importance sampling (two network calls); bernoulli has
            the mixture without weights.
        scaling: norm, as in the papers, sets the forget gradient to scaling_norm; ratio sets it to
            scaling_norm times the norm of the retain gradient; clip shortens it to scaling_norm where it is
            longer.
        superfactor: s of the printed objective, retain loss - s k / (n - k) forget loss with k of n images to
            forget; nothing is rescaled then.

    Raises:
        TypeError, ValueError: naming the hyperparameter that is out of its range, or that nothing would read
            beside a superfactor.
    """

    lambd: float = 0.5
    scaling_norm: float | None = None
    variant: Literal["mixture", "no_is", "bernoulli"] = "mixture"
    scaling: Literal["norm", "ratio", "clip"] = "norm"
    superfactor: float | None = None
    name: ClassVar[str] = "siss"

    def __post_init__(self):
        check.one_of("variant", self.variant, ("mixture", "no_is", "bernoulli"))
        check.number("lambd", self.lambd, low=0, high=1)
        if self.variant == "bernoulli" and self.lambd in (0, 1):
            raise ValueError(
                f"lambd: expected a number in (0, 1) for the variant 'bernoulli', got {self.lambd!r}"
            )
        check.one_of("scaling", self.scaling, SCALINGS)
        if self.superfactor is not None:
            self._check_superfactor()
            return
        if self.scaling_norm is None:
            # The dataclass is frozen: its own attributes are set past it.
            object.__setattr__(self, "scaling_norm", 0.1 if self.scaling == "ratio" else 5.0)
        check.number("scaling_norm", self.scaling_norm, low=0, low_open=True)
        # The norm of a recipe would pass for a share, and the step would be all forgetting.
        if self.scaling == "ratio" and self.scaling_norm > 1:
            expected = "expected a share of the retain gradient's norm, in (0, 1], with the scaling 'ratio'"
            raise ValueError(f"scaling_norm: {expected}, got {self.scaling_norm!r}")

    def _check_superfactor(self) -> None:
        """What would be ignored is refused."""
        check.number("superfactor", self.superfactor, low=0)
        for name, unset in (("scaling_norm", None), ("scaling", "norm")):
            if getattr(self, name) != unset:
                expected = f"expected {unset!r} with a superfactor, where nothing is rescaled"
                raise ValueError(f"{name}: {expected}, got {check.describe(getattr(self, name))}")

    @property
    def needs(self) -> frozenset[str]:
        if self.superfactor is None:
            return frozenset({"forget", "retain"})
        return frozenset({"forget", "retain", "sizes"})

    def draws(self) -> dict[str, Draw]:
        if self.variant == "no_is":
            return PAIR
        drawn = PAIR | {"from_forget": Bernoulli("forget", self.lambd)}
        if self.variant == "bernoulli":
            return drawn
        return drawn | {"time_log_ratio": TimeLogRatio()}

    @property
    def combine(self) -> Rescale | Sum:
        if self.superfactor is not None:
            return Sum()
        return Rescale(self.scaling_norm, self.scaling)

    def compose(self, batch: Batch, draws: Draws, schedule: NoiseSchedule) -> list[Pass]:
        if batch.forget.shape != batch.retain.shape:
            raise ValueError(
                f"forget: expected the shape of retain, {tuple(batch.retain.shape)} (SISS works on pairs), "
                f"got {tuple(batch.forget.shape)}"
            )
        if self.variant == "mixture":
            return self._mixture(batch, draws, schedule)
        if self.variant == "bernoulli":
            return self._bernoulli(batch, draws, schedule)
        return self._two_forwards(batch, draws, schedule)

    def _mixture(self, batch: Batch, draws: Draws, schedule: NoiseSchedule) -> list[Pass]:
        # m = x_t is drawn from the defensive mixture q_lambd = (1 - lambd) q(m|x) + lambd q(m|a), with
        # weights w_x = q(m|x) / q_lambd and w_a = q(m|a) / q_lambd (Eq. 6). The terms of Eq. 8 on one call of
        # the network: E [w_a ||e - target_a||^2] and E [w_x ||e - target_x||^2]; x is to be kept, a
        # forgotten.
        noise, timesteps, kwargs = _picked(batch, draws)
        # Where the branches draw timesteps from different densities, or are told different conditions, x_t is
        # a sample of (t, condition, m), and both weights have the ratio of those densities, too.
        ratio = _condition_log_ratio(batch, draws.from_forget)
        if ratio is not None:
            self._check_possible(ratio)
        ratio = _log_ratio(ratio, draws.time_log_ratio)
        arguments = batch.retain, batch.forget, noise, timesteps, schedule, self.lambd, draws.from_forget
        sample = F.mixture(*arguments, time_log_ratio=ratio)
        factor = self._forget_factor(batch)
        terms = (
            Term("forget", sample.forget_target, sample.forget_weight, scale=factor),
            Term("retain", sample.retain_target, sample.retain_weight),
        )
        return [Pass(sample.x_t, timesteps, terms, kwargs)]

    def _forget_factor(self, batch: Batch) -> float:
        """What the forget term is multiplied by: `-s k / (n - k)`; 1 where its gradient is rescaled."""
        if self.superfactor is None:
            return 1.0
        # Appendix A.1: of k images to forget and n - k to keep.
        return -self.superfactor * batch.sizes["forget"] / batch.sizes["retain"]

    def _check_possible(self, ratio: Tensor) -> None:
        """Refuses rows of a branch that is never drawn, where the other image could not have made them.

        Off the CPU nobody looks: such a row has an infinite weight, and the step is skipped.
        """
        if self.lambd not in (0, 1) or not check.readable(ratio):
            return
        # An infinite ratio says that the row is of the branch that is never drawn, and of a condition that
        # the other image of the pair does not have.
        branch, never = "forget", -float("inf")
        if self.lambd == 0:
            branch, never = "retain", float("inf")
        if (ratio == never).any():
            expected = f"rows of the {branch} branch alone for lambd {self.lambd:g}"
            raise ValueError(f"draws.from_forget: expected {expected}, got others, of another condition")

    def _bernoulli(self, batch: Batch, draws: Draws, schedule: NoiseSchedule) -> list[Pass]:
        noise, timesteps, kwargs = _picked(batch, draws)
        forget, retain = _gathered(batch.forget), _gathered(batch.retain)
        x_t, target = F.noised(_where(draws.from_forget, forget, retain), noise, timesteps, schedule)
        # Each row counts for the branch that made it. The papers divide the retain term by the expected share
        # of its rows, `1 - lambd`, and leave the factor `1 / lambd` of the forget term to the rescaling.
        # Without a rescaling both are divided by their shares.
        over = None if self.superfactor is None else len(x_t) * self.lambd
        factor = self._forget_factor(batch)
        terms = (
            Term("forget", target, draws.from_forget, over=over, scale=factor),
            Term("retain", target, ~draws.from_forget, over=len(x_t) * (1 - self.lambd)),
        )
        return [Pass(x_t, timesteps, terms, kwargs)]

    def _two_forwards(self, batch: Batch, draws: Draws, schedule: NoiseSchedule) -> list[Pass]:
        # Without importance sampling: E ||e - eps||^2 on noisy images of either set, a network call each.
        x_t, target = F.noised(batch.forget, draws.forget_noise, draws.forget_timesteps, schedule)
        terms = (Term("forget", target, scale=self._forget_factor(batch)),)
        forget = Pass(x_t, draws.forget_timesteps, terms, batch.forget_kwargs)
        x_t, target = F.noised(batch.retain, draws.retain_noise, draws.retain_timesteps, schedule)
        terms = (Term("retain", target),)
        retain = Pass(x_t, draws.retain_timesteps, terms, batch.retain_kwargs)
        return [forget, retain]


def _picked(batch: Batch, draws: Draws) -> tuple[Tensor | Noise, Tensor, dict]:
    """Noise, timesteps and conditioning of the branch that each row is made from."""
    # A pair has one noise, unless a caller gives two: rows of either have to be numbers, to be chosen from.
    noise = draws.forget_noise
    if draws.retain_noise is not noise:
        noise = _where(draws.from_forget, _numbers(draws.forget_noise), _numbers(draws.retain_noise))
    timesteps = _where(draws.from_forget, draws.forget_timesteps, draws.retain_timesteps)
    kwargs = map_tensors(partial(_where, draws.from_forget), batch.forget_kwargs, batch.retain_kwargs)
    return noise, timesteps, kwargs


def _numbers(noise: Tensor | Noise) -> Tensor:
    """`noise`, made if it is yet to be."""
    return noise.numbers() if isinstance(noise, Noise) else noise


def _gathered(images: Tensor | Rows) -> Tensor:
    return images.gather() if isinstance(images, Rows) else images


def _condition_log_ratio(batch: Batch, from_forget: Tensor) -> Tensor | None:
    """`log p(condition | forget) / p(condition | retain)` of what the network is told: float64 `[B]`.

    Infinite where the conditions of a pair differ: the other image could not have made the row. Else 0, and
    None where both branches have the very same tensors, or none. NaN counts as equal to NaN. Nothing waits.
    """
    different = []

    def compare(forget: Tensor, retain: Tensor) -> Tensor:
        if forget is not retain:
            different.append(_rows_that_differ(forget, retain))
        return forget

    map_tensors(compare, batch.forget_kwargs, batch.retain_kwargs)
    if not different:
        return None
    zero = torch.zeros(len(from_forget), dtype=torch.float64, device=from_forget.device)
    drawn = torch.where(from_forget, zero + float("inf"), zero - float("inf"))
    return torch.where(torch.stack(different).any(0), drawn, zero)


def _log_ratio(of_condition: Tensor | None, of_time: Tensor | None) -> Tensor | None:
    """The log ratio of condition and timestep together: float64 `[B]`.

    An infinite one of the condition decides a row alone: one of the timestep against it would be NaN.
    """
    if of_condition is None or of_time is None:
        return of_time if of_condition is None else of_condition
    return torch.where(of_condition.isinf(), of_condition, of_condition + of_time)


def _rows_that_differ(forget: Tensor, retain: Tensor) -> Tensor:
    """Bool `[B]`, of two tensors of one shape with the batch first."""
    # NaN alone differs from itself.
    both_nan = (forget != forget) & (retain != retain)
    unequal = (forget != retain) & ~both_nan
    if unequal.ndim == 1:
        return unequal
    return unequal.flatten(1).any(1)


def _where(from_forget: Tensor, forget: Tensor, retain: Tensor) -> Tensor:
    return torch.where(from_forget.view(-1, *[1] * (forget.ndim - 1)), forget, retain)
