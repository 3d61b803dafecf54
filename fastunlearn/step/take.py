"""The step: draw, compose, predict, residual, combine, update. Read it top to bottom.

`take_step` is the one loop behind every method. Nothing here asks which method it runs. Draw comes before it:
a `*_step` function has drawn from a generator, an `Unlearner` for the number of the step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..host import say
from ..host.profiling import stage
from ..host.tensor_lists import total_norm
from ..objective.combine import Combined
from ..objective.draws import Draws
from ..objective.parameters import overrides
from ..objective.protocol import Batch, Method, Pass, has_own_objective
from ..objective.schedule import NoiseSchedule
from . import objective
from .accumulate import Accumulator
from .arrange import Unit, finish, in_calls
from .compilation import resolve_compile
from .composed import check_composed
from .inner import loss_of_inner_steps
from .losses import Losses, ObjectiveLosses
from .options import Settings, check_added
from .regress import Networks, losses_without_graph, regress, with_targets
from .select import UNKNOWN, Moment, select
from .trained import UNSCALED, Trained, add_kept, check_reached, set_aside
from .update import clipping, forget_unscaling, update
from .wrappers import tell_skipped


class StepOutput(NamedTuple):
    """What a step reports: detached 0-d tensors on the device.

    Reading one waits for the device, so the caller chooses when.
    """

    # What the step descends: with two gradients `retain_loss - scaling_factor * forget_loss`; with ReTrack's
    # lambd="auto" `(1 - lambd) retain_loss + lambd forget_loss`.
    loss: Tensor

    # Means over the rows of a set, with importance weights and spread, without lambd. None: the method has no
    # such term.
    forget_loss: Tensor | None
    retain_loss: Tensor | None

    # L2 norm of the combined gradient, before clipping.
    grad_norm: Tensor

    # For methods that keep the forget gradient apart: its L2 norm, and f in `g_retain - f g_forget`; with
    # ReTrack's lambd="auto" -lambd.
    correction_norm: Tensor | None
    scaling_factor: Tensor | None

    # Bool: loss or norm was not finite, and the update was not made.
    skipped: Tensor

    # The forget loss that a method's inner steps reach, which `loss` counts `forget_loss` from. None: the
    # method takes none.
    inner_loss: Tensor | None = None


def take_step(
    trained: Trained,
    method: Method,
    schedule: NoiseSchedule,
    batch: Batch,
    draws: Draws,
    settings: Settings,
    moment: Moment = UNKNOWN,
) -> StepOutput:
    """One unlearning step on a complete `batch` and complete `draws`. If it raises, `.grad` is as before.

    Args:
        trained: what `look_at` made of the caller's network, optimizer, scaler and processes.
        settings: checked (`options.checked`).
        moment: where in a run the step is; needed where a band has a schedule.
    """
    inner_loss = None
    if method.inner_steps:
        with stage("inner steps"):
            arguments = schedule, batch, draws, settings, moment
            inner_loss = loss_of_inner_steps(take_step, loss_of_step, trained, method, *arguments)
    with set_aside(trained.parameters) as kept:
        step = _Step(trained, method, schedule, settings, moment)
        with stage("compose"):
            step.compose(batch, draws)

        # Predict, residual, combine: graphs that share no rows never live together.
        for part in step.calls:
            step.learn_from(part)
        with stage("combine"):
            combined = step.gradients.finish()
        check_reached(trained.model, trained.parameters)

        # What the caller left in `.grad` comes after combine, whose norms are those of the step's own.
        add_kept(trained.parameters, kept)
        with stage("update"):
            output = step.update(combined, kept=any(gradient is not None for gradient in kept))
    tell_skipped(trained.wrappers, output.skipped)
    if inner_loss is None:
        return output
    # `main - f correction`, in which the correction is counted from what the inner steps reach.
    return output._replace(loss=output.loss + output.scaling_factor * inner_loss, inner_loss=inner_loss)


def loss_of_step(
    trained: Trained,
    method: Method,
    schedule: NoiseSchedule,
    batch: Batch,
    draws: Draws,
    settings: Settings,
    moment: Moment = UNKNOWN,
) -> Tensor:
    """The loss that `take_step` would report, 0-d, for a method with one gradient. No graph is made.

    What is in `.grad` is lost.
    """
    step = _Step(trained, method, schedule, settings, moment)
    step.compose(batch, draws)
    for part in step.calls:
        step.look_at(part)
    loss, _ = step.losses.result(Combined())
    return loss


class _Step:
    """A step under way."""

    def __init__(
        self,
        trained: Trained,
        method: Method,
        schedule: NoiseSchedule,
        settings: Settings,
        moment: Moment,
    ):
        self.trained, self.method, self.schedule = trained, method, schedule
        self.settings, self.moment = settings, moment
        self.device = trained.parameters[0].device
        self.group = trained.process_group
        compile = resolve_compile(settings.compile, trained.model, self.device)
        self.networks = Networks(trained.model, trained.reference, settings.autocast_dtype, compile)
        unscaled = trained.grad_scaler is None and trained.optimizer is not None
        if settings.autocast_dtype == torch.float16 and unscaled:
            say.once(UNSCALED)

    def compose(self, batch: Batch, draws: Draws) -> None:
        """Compose: the calls of the network, where their losses are summed, where their gradients go."""
        passes = self.method.compose(batch, draws, self.schedule)
        check_composed(self.method, passes, with_reference=self.networks.reference is not None)
        passes = select(passes, self.method, self.schedule, self.settings.selection, self.moment)
        self.combination = self.method.combine
        self.own_objective = has_own_objective(self.method)
        if self.own_objective:
            unit, in_place = self._weigh_by_objective(passes)
        else:
            unit, in_place = self._weigh_by_terms(passes)

        # All gradients are multiplied by the loss scale. Those of the correction are in units of this
        # process, which `unit.ratio` turns into the unit of all.
        scaler = self.trained.grad_scaler
        self.loss_scale = 1.0
        if scaler is not None:
            self.loss_scale = scaler.scale(torch.ones((), device=self.device))
        self.factors = dict.fromkeys(self.combination.gradients, self.loss_scale)
        if unit.ratio is not None:
            self.factors[self.combination.gradients[0]] = self.loss_scale * unit.ratio
        self.gradients = Accumulator(
            self.trained.parameters,
            self.combination,
            in_place=in_place,
            unit=unit.everyones,
            loss_scale=self.loss_scale,
            group=self.group,
            rules=self.settings.rules,
        )

    def _weigh_by_terms(self, passes: list[Pass]) -> tuple[Unit, bool]:
        """The calls for a weighted sum of losses: the terms say what each row counts."""
        passes, unit = finish(passes, self.combination, self.group)
        self.losses = Losses(passes, self.combination, unit, self.group)
        self.weighted = True
        # Which rows a term needs is data: on an accelerator, reading it would be a wait, and under
        # torch.compile every number of rows a compilation.
        by_role = self.device.type == "cpu" and not self.networks.compile
        rows, alone = self.settings.micro_batch_size, self.group is None
        self.calls, in_place = in_calls(passes, self.combination, rows, by_role=by_role, alone=alone)
        return unit, in_place

    def _weigh_by_objective(self, passes: list[Pass]) -> tuple[Unit, bool]:
        """The calls for a method that makes more of its losses than a sum with known weights."""
        objective.check_roles(passes)
        rows = self.settings.micro_batch_size
        self.rows = objective.rows_of(passes)
        self.losses = ObjectiveLosses(self.combination, self.rows, self.group)
        # Weights are derived in the call that learns from the rows, or before, from the losses of all rows.
        self.weighted = not objective.fits_one_call(passes, rows, alone=self.group is None)
        if self.weighted:
            found = objective.weigh_all(self.method, self.networks, passes, self.schedule, rows, self.group)
            self.calls, losses, derivative = found
            self.losses.add(losses, derivative.values)
        else:
            self.calls = objective.split(passes, rows)
        return Unit(), False

    def learn_from(self, part: Pass) -> None:
        """Predict, residual and combine for one call of the network."""
        # Both ways predict and take residuals. Where an objective has given the weights before, it has
        # reported the losses, too.
        if self.weighted:
            part = with_targets(self.networks, part, self.schedule)
            regression = regress(self.networks, part, self.schedule, self.factors)
            if not self.own_objective:
                self.losses.add(part, regression.losses)
        else:
            regression, losses, derivative = objective.regress_by_objective(
                self.method, self.networks, part, self.schedule, self.rows, self.factors
            )
            self.losses.add(losses, derivative.values)
        with stage("combine"):
            self.gradients.backward(regression.prediction, regression.gradients)

    def look_at(self, part: Pass) -> None:
        """The losses of one call of the network, from which nothing is learned."""
        networks = self.networks
        part = with_targets(networks, part, self.schedule)
        losses = losses_without_graph(networks.model, networks, part, self.schedule, weighted=True)
        self.losses.add(part, losses)

    def update(self, combined: Combined, *, kept: bool) -> StepOutput:
        """Update: what is reported, the rules on parameters, and the optimizer's step unless it is ruined.

        Args:
            kept: whether the caller's gradients have been added to the combined one.
        """
        optimizer, scaler = self.trained.optimizer, self.trained.grad_scaler
        parameters = self.trained.parameters
        loss, means = self.losses.result(combined)

        # Without an optimizer the gradients stay scaled, for the caller's scaler to unscale.
        if optimizer is not None and scaler is not None:
            scaler.unscale_(optimizer)
        left = self.loss_scale if optimizer is None else 1.0
        try:
            for rule in self.settings.rules:
                added = rule.add(parameters, left)
                loss = loss if added is None else loss + check_added(rule, added)
            # What an anchor, or the caller, has added knows of no mask, and would count in the norm.
            adding = [rule for rule in self.settings.rules if overrides(rule, "add") and not rule.idle]
            if kept or adding:
                self.gradients.restrict()
        except BaseException:
            forget_unscaling(scaler, optimizer)
            raise
        present = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = total_norm(present, self.device)
        if optimizer is None:
            norm = norm / self.loss_scale

        # One number that is not finite would be in all weights after the update.
        finite = torch.isfinite(loss) & torch.isfinite(norm)
        if optimizer is not None:
            update(optimizer, clipping(norm, self.settings.max_grad_norm), finite, present, scaler)
            for parameter in parameters:
                parameter.grad = None
            for rule in self.settings.rules:
                rule.after_update(parameters)
        apart = combined.correction_norm, combined.scaling_factor
        return StepOutput(loss, means.get("forget"), means.get("retain"), norm, *apart, ~finite)
