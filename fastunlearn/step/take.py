"""The step: draw, compose, predict, residual, combine, update. Read it top to bottom.

`take_step` is the one loop behind every method. Nothing here asks which method it runs.
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
from ..objective.protocol import Batch, Method, Pass, has_own_objective
from ..objective.schedule import NoiseSchedule
from . import objective
from .accumulate import Accumulator
from .arrange import Unit, finish, in_calls
from .compilation import resolve_compile
from .losses import Losses, ObjectiveLosses
from .options import Settings
from .regress import Networks, regress, with_targets
from .trained import UNSCALED, Trained, add_kept, check_reached, set_aside
from .update import clipping, update
from .wrappers import tell_skipped


class StepOutput(NamedTuple):
    """What a step reports: detached 0-d tensors on the device.

    Reading one waits for the device, so the caller chooses when.
    """

    # What the step descends: with two gradients `retain_loss - scaling_factor * forget_loss`.
    loss: Tensor
    # Mean over the forget rows, with importance weights and spread, without lambd; None if the method has no
    # such term.
    forget_loss: Tensor | None
    retain_loss: Tensor | None  # the same over the retain rows
    grad_norm: Tensor  # L2 norm of the combined gradient, before clipping
    # L2 norm of the forget gradient, for methods that keep it apart.
    correction_norm: Tensor | None
    scaling_factor: Tensor | None  # f in `g_retain - f g_forget`
    skipped: Tensor  # bool: loss or norm was not finite, and the update was not made


def take_step(
    trained: Trained,
    method: Method,
    schedule: NoiseSchedule,
    batch: Batch,
    draws: Draws,
    settings: Settings,
) -> StepOutput:
    """One unlearning step on a complete `batch` and complete `draws`. If it raises, `.grad` is as before.

    Args:
        trained: what `look_at` made of the caller's network, optimizer, scaler and processes.
        settings: checked (`options.checked`).
    """
    with set_aside(trained.parameters) as kept:
        step = _Step(trained, method, schedule, settings)
        with stage("compose"):
            step.compose(batch, draws)
        # Predict, residual, combine: graphs that share no rows never live together.
        for part in step.calls:
            step.learn_from(part)
        with stage("combine"):
            combined = step.gradients.finish()
        check_reached(trained.model, trained.parameters)
        add_kept(trained.parameters, kept)  # not earlier: what combine measures is the step's own
        with stage("update"):
            output = step.update(combined)
    tell_skipped(trained.wrappers, output.skipped)
    return output


class _Step:
    """A step under way."""

    def __init__(self, trained: Trained, method: Method, schedule: NoiseSchedule, settings: Settings):
        self.trained, self.method, self.schedule, self.settings = trained, method, schedule, settings
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
        combination, scaler = self.method.combine, self.trained.grad_scaler
        self.loss_scale = 1.0 if scaler is None else scaler.scale(torch.ones((), device=self.device))
        self.own_objective = has_own_objective(self.method)
        if self.own_objective:
            unit, in_place = Unit(), False
            self._ask_objective(passes)
        else:
            passes, unit = finish(passes, combination, self.group)
            self.losses = Losses(passes, combination, unit, self.group)
            self.calls, in_place = self._in_calls(passes)
        self.factors = dict.fromkeys(combination.gradients, self.loss_scale)
        if unit.ratio is not None:  # the weights of the correction are in units of this process
            self.factors[combination.gradients[0]] = self.loss_scale * unit.ratio
        self.gradients = Accumulator(
            self.trained.parameters,
            combination,
            in_place=in_place,
            unit=unit.everyones,
            loss_scale=self.loss_scale,
            group=self.group,
            rules=self.settings.rules,
        )

    def _in_calls(self, passes: list[Pass]) -> tuple[list[Pass], bool]:
        # Which rows a term needs is data: on an accelerator, reading it would be a wait, and under
        # torch.compile every number of rows a compilation.
        by_role = self.device.type == "cpu" and not self.networks.compile
        rows = self.settings.micro_batch_size
        return in_calls(passes, self.method.combine, rows, by_role=by_role, alone=self.group is None)

    def _ask_objective(self, passes: list[Pass]) -> None:
        """The calls for a method that makes more of its losses than a sum with known weights."""
        objective.check_roles(passes)
        rows = self.settings.micro_batch_size
        self.rows = objective.rows_of(passes)
        self.losses = ObjectiveLosses(self.method.combine, self.rows, self.group)
        self.weighted = not objective.fits_one_call(passes, rows, alone=self.group is None)
        if self.weighted:
            found = objective.weigh_all(self.method, self.networks, passes, self.schedule, rows, self.group)
            self.calls, losses, derivative = found
            self.losses.add(losses, derivative.values)
        else:
            self.calls = objective.split(passes, rows)

    def learn_from(self, part: Pass) -> None:
        """Predict, residual and combine for one call of the network."""
        if self.own_objective and not self.weighted:
            regression, losses, derivative = objective.regress_by_objective(
                self.method, self.networks, part, self.schedule, self.rows, self.factors
            )
            self.losses.add(losses, derivative.values)
        else:
            part = with_targets(self.networks, part, self.schedule)
            regression = regress(self.networks, part, self.schedule, self.factors)
            if not self.own_objective:
                self.losses.add(part, regression.losses)
        with stage("combine"):
            self.gradients.backward(regression.prediction, regression.gradients)

    def update(self, combined: Combined) -> StepOutput:
        """Update: what is reported, the rules on parameters, and the optimizer's step unless it is ruined."""
        parameters, optimizer, scaler = (
            self.trained.parameters,
            self.trained.optimizer,
            self.trained.grad_scaler,
        )
        loss, means = self.losses.result(combined)
        if optimizer is not None and scaler is not None:
            scaler.unscale_(optimizer)
        # Without an optimizer the gradients stay scaled, for the caller's scaler to unscale.
        left = self.loss_scale if optimizer is None else 1.0
        for rule in self.settings.rules:
            added = rule.add(parameters, left)
            loss = loss if added is None else loss + added
        present = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = total_norm(present, self.device)
        if optimizer is None:
            norm = norm / self.loss_scale
        finite = torch.isfinite(loss) & torch.isfinite(norm)
        if optimizer is not None:
            update(optimizer, clipping(norm, self.settings.max_grad_norm), finite, present, scaler)
            for parameter in parameters:
                parameter.grad = None
            for rule in self.settings.rules:
                rule.after_update(parameters)
        return StepOutput(
            loss,
            means.get("forget"),
            means.get("retain"),
            norm,
            combined.correction_norm,
            combined.scaling_factor,
            ~finite,
        )
