"""Feeds the micro-steps of golden runs to the public `*_step` functions; knows how the papers weigh rows.

The official code accumulates: every micro-step adds the mean over its own batch, divided by the number of
micro-steps. The package takes the mean over the joined batch. Where all micro-steps have the same number of
rows the two are one; where they have not, rows are repeated until they do. What then still differs is a
factor for all rows of a term (`Feed.main`, `Feed.correction`):

* ReTrack's EraseDiff divides both of its terms by the rows of the deletion batch.
* SISS' loop divides by the configured batch, whatever a micro-step has.
* SISS' Bernoulli loss returns zeros for both terms of a micro-step without a retain row, so that this
  micro-step is lost.
"""

from __future__ import annotations

from math import lcm
from typing import TYPE_CHECKING

import torch
from bernoulli import replaced_terms
from torch import Tensor

import fastunlearn as fu

if TYPE_CHECKING:
    from golden_run import Run


class Feed:
    """Micro-steps of a run, joined to one batch.

    Attributes: main, correction: what the papers' gradients (of the retain term or the only term, of the
    forget term) are times ours.
    """

    main: float = 1.0
    correction: float = 1.0

    def __init__(self, run: Run, steps: range):
        self.run, self.steps, self.meta = run, list(steps), run.case.meta
        self.common = (run.model, run.schedule)

    @property
    def ratio(self) -> float:
        """The papers' f over ours: `main g_x - f correction g_a` is `main (g_x - f' g_a)`."""
        return self.main / self.correction if self.correction else 1.0

    @property
    def micro_batch_size(self) -> int:
        """The rows of the first micro-step."""
        return max(len(value) for value in self._timesteps(self.steps[0]))

    def step(self, optimizer: torch.optim.Optimizer | None, **options) -> fu.StepOutput:
        raise NotImplementedError

    @property
    def main_norm(self) -> Tensor:
        """The norm of the retain gradient alone, of the papers' weights."""
        raise NotImplementedError

    def _timesteps(self, s: int) -> list[Tensor]:
        prefix = f"in.step{s}.timesteps"
        return [self.run.case(prefix + suffix) for suffix in self.run.case.keys(prefix)]

    def _joined(self, key: str, copies: list[int] | None = None) -> Tensor:
        """The input `key` of all steps, `copies[i]` times that of the i-th."""
        copies = [1] * len(self.steps) if copies is None else copies
        parts = [self.run.input(s, key) for s in self.steps]
        return torch.cat([part for part, times in zip(parts, copies, strict=True) for _ in range(times)])


class ReTrackFeed(Feed):
    """Micro-steps of ReTrack's train step: every branch has noise and timesteps of its own."""

    def __init__(self, run: Run, steps: range):
        super().__init__(run, steps)
        self.copies, rows = {}, {}
        for branch in self.meta["dataset_types"]:
            # EraseDiff's terms are both divided by the rows of the deletion batch.
            divided_by = "deletion" if self.meta["method"] == "erasediff" else branch
            sizes = [len(run.input(s, f"timesteps.{divided_by}")) for s in self.steps]
            self.copies[branch] = [lcm(*sizes) // size for size in sizes]
            rows[branch] = len(self._joined(f"timesteps.{branch}", self.copies[branch]))
        if self.meta["method"] == "erasediff":
            self.main = rows["remain"] / rows["deletion"]

    def step(self, optimizer: torch.optim.Optimizer | None, **options) -> fu.StepOutput:
        method, (model, schedule) = self.meta["method"], self.common
        common = (model, optimizer, schedule)
        if method == "vanilla":
            return fu.vanilla_step(*common, self._images("remain"), draws=self._draws(None), **options)
        if method == "neggrad":
            return fu.neggrad_step(
                *common, self._images("deletion"), draws=self._draws("deletion", None), **options
            )
        if method == "retrack":
            lambd = self.meta["params"]["lambda"]
            retain = "remain" if lambd < 1 else None  # with 1 the step takes no retain images
            images = self._images("knn"), self._joined("knn_neighbors", self.copies["knn"])
            retain_images = None if retain is None else self._images(retain)
            return fu.retrack_step(
                *common, *images, retain_images, lambd=lambd, draws=self._draws("knn", retain), **options
            )
        pair = self._images("deletion"), self._images("remain")
        if method == "erasediff":
            uniform = self._joined("erasediff_uniform", self.copies["deletion"])
            draws = self._draws("deletion", uniform_target=uniform)
            eta = self.meta["extra"]["eta"] / self.ratio
            return fu.erasediff_step(*common, *pair, eta=eta, draws=draws, **options)
        assert method == "siss", f"a method of ReTrack that the harness does not know: {method}"
        lambd, scaling_norm = self.meta["params"]["lambda"], float(self.meta["extra"]["rescale_factor"])
        from_forget = torch.cat(
            [
                picked.repeat(times)
                for picked, times in zip(self._picks(lambd), self.copies["deletion"], strict=True)
            ]
        )
        draws = self._draws("deletion", from_forget=from_forget)
        return fu.siss_step(*common, *pair, lambd=lambd, scaling_norm=scaling_norm, draws=draws, **options)

    def _picks(self, lambd: float) -> list[Tensor]:
        return [picks(self.run, s, lambd) for s in self.steps]

    def _images(self, branch: str) -> Tensor:
        return self._joined(f"images.{branch}", self.copies[branch])

    def _draws(self, forget: str | None, retain: str | None = "remain", **more: Tensor) -> fu.Draws:
        given = {
            f"{ours}_{what}": self._joined(f"{stored}.{branch}", self.copies[branch])
            for ours, branch in (("forget", forget), ("retain", retain))
            if branch is not None
            for what, stored in (("noise", "noises"), ("timesteps", "timesteps"))
        }
        return fu.Draws(**given, **more)


class SISSFeed(Feed):
    """Micro-steps of SISS' own loop: a pair shares noise and timesteps."""

    def __init__(self, run: Run, steps: range):
        super().__init__(run, steps)
        kept = [s for s in steps if not loses_both_terms(run, s)]
        rows = sum(len(run.input(s, "timesteps")) for s in kept)
        self.main = self.correction = rows / (len(steps) * self.meta["batch"])
        # The official code fails at a micro-step without gradients if it is the first of its window.
        assert kept or len(steps) == 1, "a window of which the official code loses every term"
        self.steps = kept or self.steps

    def step(
        self, optimizer: torch.optim.Optimizer | None, scaling_norm: float | None = None, **options
    ) -> fu.StepOutput:
        loss, settings, (model, schedule) = self.meta["loss"], self.meta["loss_params"], self.common
        common = (model, optimizer, schedule)
        retain, forget, noise, t = (
            self._joined(key) for key in ("images.remain", "images.deletion", "noise", "timesteps")
        )
        of_forget, of_retain = (
            {f"{branch}_noise": noise, f"{branch}_timesteps": t} for branch in ("forget", "retain")
        )
        if loss == "simple_neg_del":
            return fu.neggrad_step(*common, forget, draws=fu.Draws(**of_forget), **settings, **options)
        if loss == "naive_del":
            return fu.vanilla_step(*common, retain, draws=fu.Draws(**of_retain), **options)
        pair = of_forget | of_retain
        if loss == "erasediff":
            draws = fu.Draws(**pair, uniform_target=self._joined("erasediff_uniform"))
            return fu.erasediff_step(*common, forget, retain, eta=self.meta["eta"], draws=draws, **options)
        if scaling_norm is None:
            scaling_norm = float(self.meta["scaling_norm"]) / (self.main or 1.0)
        variant = {
            "importance_sampling_with_mixture": "mixture",
            "double_forward_with_neg_del": "no_is",
            "subscore_bernoulli": "bernoulli",
        }[loss]
        if variant != "no_is":
            pair["from_forget"] = torch.cat([picks(self.run, s, settings["lambd"]) for s in self.steps])
        own = {"scaling_norm": scaling_norm, "variant": variant, **settings}
        return fu.siss_step(*common, forget, retain, draws=fu.Draws(**pair), **own, **options)

    @property
    def main_norm(self) -> Tensor:
        if self.meta["loss"] == "erasediff":
            draws = fu.Draws(retain_noise=self._joined("noise"), retain_timesteps=self._joined("timesteps"))
            model, schedule = self.common
            alone = fu.vanilla_step(model, None, schedule, self._joined("images.remain"), draws=draws)
        else:
            alone = self.step(None, scaling_norm=1e-20)  # a forget gradient rescaled to nothing
        return alone.grad_norm * self.main


def feed_of(meta: dict) -> type[Feed]:
    return {"retrack_train_step": ReTrackFeed, "siss_train_loop": SISSFeed}[meta["kind"]]


def picks(run: Run, s: int, lambd: float) -> Tensor:
    """`from_forget` `[B]` of a micro-step: retain where the uniform number exceeds lambda."""
    for name in ("siss_uniform", "mask_uniform"):
        if f"in.step{s}.{name}" in run.case:
            return run.input(s, name) <= lambd
    raise AssertionError(f"{run.case.name}: expected in.step{s}.mask_uniform or .siss_uniform")


def loses_both_terms(run: Run, s: int) -> bool:
    """Whether the official Bernoulli loss returns zeros for both terms: no row is from the retain image."""
    if run.case.meta.get("loss") != "subscore_bernoulli":
        return False
    return len(replaced_terms(picks(run, s, run.case.meta["loss_params"]["lambd"]))) == 2
