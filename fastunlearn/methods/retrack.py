from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from .. import functional as F
from ..host import check
from ..host.store import ImageStore
from ..objective.combine import Balance, Sum
from ..objective.conditioning import concatenate
from ..objective.draws import FORGET, RETAIN, Draw, Draws
from ..objective.protocol import Batch, Method, Pass, Term
from ..objective.schedule import NoiseSchedule
from .registry import register

WEIGHTS = ("truncated", "self_normalized", "importance")


@register(
    help="redirects the denoising of a forget image to its nearest images to keep (start here).",
    source="arXiv 2509.13007, section 3.4",
    recipes={
        "mnist-tshirt": {"k": 10, "lambd": 0.005, "lr": 5e-5},
        "celeba-hq": {"k": 10, "lambd": 0.005, "lr": 5e-6},
        "cifar-10": {"k": 10, "lambd": 0.02, "lr": 2e-5},
        "sd-1.4": {"k": 10, "lambd": 0.5, "lr": 1e-5},
        "mnist-tshirt-small": {"k": 10, "lambd": 0.05, "lr": 1.5e-4},
    },
    variants={
        "auto": {"lambd": "auto"},
        "self_normalized": {"weights": "self_normalized"},
        "importance": {"weights": "importance"},
    },
    timed_on="mnist",
    place=1,
    later=("weights", "within_condition"),
)
@dataclass(frozen=True)
class ReTrack(Method):
    """ReTrack (arXiv 2509.13007): forget images are denoised towards their k nearest retain neighbours.

    `L = lambd * mean_b sum_j p_j ||eps_theta(x_t) - v_j||^2 + (1 - lambd) * L_vanilla(retain)` (section 3.4),
    with one target in place of k. Forget and retain rows go through the network together, one forward and one
    backward (on CPUs apart: as fast, with half the activations).

    The weights of section 3.2 are those of all M images to keep, and make the forget term an estimate of the
    vanilla loss on the retain set: `w(x|x_t) = (q(x_t|x) / M) / (sum_a' q(x_t|a') / N)` with the N images to
    forget a'. `weights` says how much of that is left: `"truncated"` (the method: normalised over the k
    nearest), `"self_normalized"` (normalised over all M: truncated with k = M) and `"importance"` (w itself:
    the self-normalised term times `p_retain(x_t) / p_forget(x_t)`, the ratio of the densities of both noised
    sets). The first two lack that ratio: the same network is best at each x_t, but another x_t counts more.
    Only the last one is unbiased. In many dimensions its ratio is 0 for nearly every x_t, which no image to
    keep could have made, and huge for the rest: it is there to be compared with.

    All but truncated weights read the whole retain set at every step, in blocks on the device, and take
    `4 B M D` operations in float64 (`functional.redirect_to_all`). An `Unlearner` alone has the set. One that
    stays on the host of a GPU is refused, and so are latents that are drawn anew. Nobody looks for near
    copies of the forget images in it. A ratio beyond float32 makes its step one that is skipped and counted.

    With `lambd="auto"` both terms pull equally hard: `lambd = ||g_r|| / (||g_u|| + ||g_r||)`, of the
    gradients of the retain and the forget (unlearn) term, is measured on the device at every step; nothing is
    carried to the next one. The two are kept apart, in a second set of gradients, and reported as
    `correction_norm` (`||g_u||`) and `scaling_factor` (`-lambd`).

    Args:
        k: nearest images to keep that a forget image is redirected to, with truncated weights. 1 to 1000 make
            almost no difference in the paper.
        lambd: weight of the forget term in [0, 1]; choose it so that both terms are of similar size. auto
            gives both gradients one norm at every step.
        weights: truncated is the method; self_normalized and importance (unbiased) read all images to keep at
            every step.
        within_condition: neighbours have the label of the forget image; both sets have to have labels, of
            which the commands read none.

    Raises:
        TypeError, ValueError: naming the hyperparameter that is out of its range, or does not fit `weights`.
    """

    k: int = 10
    lambd: float | Literal["auto"] = 0.005
    weights: Literal["truncated", "self_normalized", "importance"] = "truncated"
    within_condition: bool = False
    name: ClassVar[str] = "retrack"

    def __post_init__(self):
        check.integer("k", self.k, low=1)
        if isinstance(self.lambd, str):
            check.one_of("lambd", self.lambd, ("auto",))
        else:
            check.number("lambd", self.lambd, low=0, high=1)
        check.one_of("weights", self.weights, WEIGHTS)
        if not isinstance(self.within_condition, bool):
            expected = f"expected a bool, got {check.describe(self.within_condition)}"
            raise TypeError(f"within_condition: {expected}")
        if self.within_condition and self.weights != "truncated":
            expected = f"expected False with weights {self.weights!r}, which are those of the whole set"
            raise ValueError(f"within_condition: {expected}, got True")

    @property
    def needs(self) -> frozenset[str]:
        if self.weights != "truncated":
            return frozenset({"forget", "retain", "stores"})
        # With lambd = 1 the retain term counts 0, and has no rows.
        if self.lambd == 1:
            return frozenset({"forget", "neighbors"})
        return frozenset({"forget", "neighbors", "retain"})

    @property
    def without_effect(self) -> frozenset[str]:
        return frozenset() if self.weights == "truncated" else frozenset({"k"})

    def check_sets(self, stores: Mapping[str, ImageStore], device: torch.device) -> None:
        if self.weights == "truncated":
            return
        for name, store in stores.items():
            # Of the forget set it is the density alone that is read as a whole.
            if name == "forget" and self.weights != "importance":
                continue
            why = f"weights {self.weights!r} read all of it at every step"
            if store.device != device:
                expected = f"expected a set that fits on {device} (residency='device'): {why}"
                raise ValueError(f"{name}: {expected}, got one on {store.device}")
            if store.std_dtype is not None:
                expected = f"expected a store of fixed rows (freeze() makes one): {why}"
                raise ValueError(f"{name}: {expected}, got one with standard deviations")

    @property
    def combine(self) -> Sum | Balance:
        return Balance() if self.lambd == "auto" else Sum()

    def draws(self) -> dict[str, Draw]:
        if self.lambd == 1:
            return FORGET
        return FORGET | RETAIN

    def compose(self, batch: Batch, draws: Draws, schedule: NoiseSchedule) -> list[Pass]:
        # The forget term of section 3.4 with one target in place of k: with v = sum_j p_j v_j,
        # `sum_j p_j ||e - v_j||^2 = ||e - v||^2 + spread`, and the spread does not depend on the network.
        redirected, weight = self._redirect(batch, draws, schedule)
        auto = self.lambd == "auto"
        scale = 1.0 if auto else self.lambd
        forget = Term("forget", redirected.target, weight, spread=redirected.spread, scale=scale)
        unlearn = Pass(redirected.x_t, draws.forget_timesteps, (forget,), batch.forget_kwargs)
        if self.lambd == 1:
            return [unlearn]

        # The retain term, L_vanilla. Two gradients of one call would take two passes back over all of its
        # rows, so terms that are balanced have a call each.
        x_t, target = F.noised(batch.retain, draws.retain_noise, draws.retain_timesteps, schedule)
        if auto:
            retain = Pass(x_t, draws.retain_timesteps, (Term("retain", target),), batch.retain_kwargs)
            return [unlearn, retain]

        # Its rows follow those to forget in one call of the network.
        first, last = len(batch.forget), len(batch.forget) + len(batch.retain)
        retain = Term("retain", target, rows=range(first, last), scale=1 - self.lambd)
        return [
            Pass(
                torch.cat([redirected.x_t, x_t]),
                torch.cat([draws.forget_timesteps, draws.retain_timesteps]),
                (forget, retain),
                concatenate(batch.forget_kwargs, batch.retain_kwargs),
            )
        ]

    def _redirect(self, batch: Batch, draws: Draws, schedule: NoiseSchedule):
        """Noisy forget images, targets and spread; and what each row counts, `[B]`, None where that is 1."""
        arguments = draws.forget_noise, draws.forget_timesteps, schedule
        if self.weights == "truncated":
            # p_j over the k nearest images to keep (section 3.3).
            found = F.redirect(batch.forget, batch.neighbors, *arguments, sqdist=batch.sqdist)
            return found, None

        # p_j over all of them (section 3.2). The exact weights have p_retain(x_t) / p_forget(x_t) beside it,
        # which reads the forget set, too.
        forget_set = batch.stores["forget"].images if self.weights == "importance" else None
        retain_set = batch.stores["retain"].images
        found = F.redirect_to_all(batch.forget, retain_set, *arguments, forget_set=forget_set)
        return found, found.weight
