"""The step that a method takes on a batch whose random numbers are all known, by plain torch."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from every_selection import fitting
from torch import Tensor

import fastunlearn as fu
from fastunlearn import ImageStore, LowPass, method_step
from fastunlearn.host.philox import Noise
from fastunlearn.host.store import Rows
from fastunlearn.methods import DPO, KTO, NPO, SISS, Anchor, Batch, Mask, Method, Pass, ReTrack, Term
from fastunlearn.objective.combine import Balance, Project, Rescale
from fastunlearn.objective.draws import Draws, GeneratorSource, complete
from fastunlearn.objective.protocol import has_own_objective
from fastunlearn.objective.schedule import NoiseSchedule
from fastunlearn.objective.selection import Selection
from fastunlearn.reference import combine, noising, prediction_target, redirect_to_all
from fastunlearn.step.options import Settings
from fastunlearn.step.select import Moment
from fastunlearn.step.take import take_step
from fastunlearn.step.trained import look_at
from fastunlearn.testing.factories import TinyDenoiser, linear_schedule
from fastunlearn.testing.methods import compared_with

SCHEDULE = linear_schedule()
ROWS = 5


def selection_of(given: dict[str, Any]) -> Selection:
    return Selection(**{name: value for name, value in given.items() if name != "total_steps"})


class Literal:
    """A batch with all of its random numbers, and the step that a method takes on it by plain torch.

    Args:
        given: as far as it fits the method.
        model: in the dtype that the step is computed in.
        reference: the other network of a method that compares, in that dtype, too.
        mask, anchor: rules on parameters.
    """

    def __init__(
        self,
        method: Method,
        given: dict[str, Any],
        model: TinyDenoiser,
        batch: Batch,
        draws: Draws,
        schedule: NoiseSchedule = SCHEDULE,
        *,
        autocast_dtype: torch.dtype | None = None,
        loss_scale: float = 1.0,
        reference: TinyDenoiser | None = None,
        mask: Mask | None = None,
        anchor: Anchor | None = None,
    ):
        self.method, self.model, self.schedule = method, model, schedule
        self.autocast_dtype, self.loss_scale = autocast_dtype, loss_scale
        self.reference, self.mask, self.anchor = reference, mask, anchor
        self.trained = {name: own for name, own in model.named_parameters() if own.requires_grad}
        self.given = fitting(method, given)
        dtype = next(model.parameters()).dtype
        images = {name: getattr(batch, name) for name in ("forget", "retain", "neighbors")}
        self.images = {name: numbers(each, dtype) for name, each in images.items() if each is not None}
        self.sizes = dict(batch.sizes)
        self.sets = {name: whole_set(store, dtype) for name, store in batch.stores.items()}
        stores = {name: ImageStore(images, latents=True) for name, images in self.sets.items()}
        self.batch = Batch(**self.images, sqdist=batch.sqdist, stores=stores, sizes=self.sizes)
        self.draws = Draws(**{name: numbers(value, dtype) for name, value in vars(draws).items()})

    def taken(self, step: int) -> tuple[fu.StepOutput, list[Tensor]]:
        """What the package's step reports and leaves in `.grad`."""
        if "stores" in self.method.needs:
            output = self._taken_with_whole_sets(step)
        else:
            given = self.images | self.given | {"draws": self.draws, "step": step}
            given |= {"reference_model": self.reference}
            sizes = self.sizes if "sizes" in self.method.needs else None
            output = method_step(self.method, self.model, None, self.schedule, sizes=sizes, **given)
        gradient = [parameter.grad for parameter in self.model.parameters()]
        self.model.zero_grad()
        return output, gradient

    def _taken_with_whole_sets(self, step: int) -> fu.StepOutput:
        """Past `method_step`, which has batches alone; a step of an Unlearner would draw its own rows."""
        trained = look_at(self.model, None, None, None, keep_grad=False)
        settings = Settings(selection=selection_of(self.given))
        moment = Moment(step, self.given.get("total_steps"))
        return take_step(trained, self.method, self.schedule, self.batch, self.draws, settings, moment)

    def expected(self, step: int) -> tuple[dict[str, Tensor], list[Tensor]]:
        """What is reported, without the loss of inner steps, and the combined gradient."""
        means, terms = self.terms(step)
        loss, gradient = self._combined(terms)
        if self.anchor is not None:
            penalty = self._penalty()
            loss, pull = loss + penalty, self.gradient(penalty)
            gradient = [own + added for own, added in zip(gradient, pull, strict=True)]
        reported = {"loss": loss.detach()} | {f"{role}_loss": mean for role, mean in means.items()}
        # An anchor pulls at weights that a mask holds, too.
        gradient = self._moving(gradient)
        reported["grad_norm"] = torch.cat([own.flatten() for own in gradient]).norm()
        return reported, gradient

    def _combined(self, terms: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The loss, and the gradient of gradients in which a mask has left what may move."""
        how = self.method.combine
        if not isinstance(how, Balance | Project | Rescale):
            loss = sum(terms.values())
            return loss, self._restricted(loss)
        pair = self._restricted(terms["retain"]), self._restricted(terms["forget"])
        if isinstance(how, Balance):
            found = combine.balance(*pair)
            return (1 + found.factor) * terms["retain"] - found.factor * terms["forget"], found.gradients
        if isinstance(how, Project):
            found = combine.project(*pair, how.eta, how.rule, how.multiplier)
        else:
            found = combine.rescale(*pair, how.scaling_norm, how.scaling)
        return terms["retain"] - found.factor * terms["forget"], found.gradients

    def _restricted(self, loss: Tensor) -> list[Tensor]:
        """The gradient of `loss`, 0 where the mask holds a weight."""
        return self._moving(self.gradient(loss))

    def _moving(self, gradient: list[Tensor]) -> list[Tensor]:
        if self.mask is None:
            return gradient
        moving = [self.mask.masks[name] for name in self.trained]
        return [own * moves for own, moves in zip(gradient, moving, strict=True)]

    def _penalty(self) -> Tensor:
        """`gamma / n sum_i p_i (theta_i - mu_i)^2 / 2` over the n trained weights."""
        count = sum(parameter.numel() for parameter in self.trained.values())
        total = 0.0
        for name, parameter in self.trained.items():
            distance = parameter - self.anchor.mean[name].to(parameter.dtype)
            total = total + (self.anchor.precision[name].to(parameter.dtype) * distance.square() / 2).sum()
        return self.anchor.gamma / count * total

    def terms(self, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The mean of each role, and what is descended of it."""
        if has_own_objective(self.method):
            return self._preferences(step)
        means, terms = {}, {}
        for each in self.passes():
            predicted = self._predicted(self.model, each)
            for term in each.terms:
                rows = slice(term.rows.start, term.rows.stop)
                loss = self._losses(term, predicted[rows] - term.target, step)
                weight = self._weights(term.role)[each.timesteps[rows]]
                weight = weight if term.weight is None else weight * term.weight
                mean = (weight * loss).sum() / (len(term.rows) if term.over is None else term.over)
                means[term.role], terms[term.role] = mean.detach(), term.scale * mean
        return means, terms

    def passes(self) -> list[Pass]:
        """The noisy images, targets and weights, before anything is selected."""
        if isinstance(self.method, ReTrack) and self.method.weights != "truncated":
            return self._redirected_to_all()
        if isinstance(self.method, SISS) and self.method.superfactor is not None:
            return self._with_superfactor()
        return self.method.compose(self.batch, self.draws, self.schedule)

    def _redirected_to_all(self) -> list[Pass]:
        """ReTrack's weights of section 3.2, with the targets of all images to keep side by side."""
        draws, method, schedule = self.draws, self.method, self.schedule
        found = redirect_to_all(
            self.images["forget"],
            self.sets["retain"],
            draws.forget_noise,
            draws.forget_timesteps,
            schedule,
            forget_set=self.sets["forget"] if method.weights == "importance" else None,
        )
        terms = (Term("forget", found.target, found.weight, spread=found.spread, scale=method.lambd),)
        forget = Pass(found.x_t, draws.forget_timesteps, terms)

        retained = self.images["retain"], draws.retain_noise, draws.retain_timesteps, schedule
        terms = (Term("retain", prediction_target(*retained), scale=1 - method.lambd),)
        return [forget, Pass(noising(*retained), draws.retain_timesteps, terms)]

    def _with_superfactor(self) -> list[Pass]:
        """SISS' two terms as they are rescaled elsewhere; here the forget term counts `-s k / (n - k)`."""
        method = self.method
        factor = -method.superfactor * self.sizes["forget"] / self.sizes["retain"]
        rescaled = replace(method, superfactor=None)
        (mixture,) = rescaled.compose(self.batch, self.draws, self.schedule)
        forget, retain = mixture.terms
        return [replace(mixture, terms=(replace(forget, scale=factor), retain))]

    def _preferences(self, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The mean losses, and the loss of docs/methods.md, in which R is what the network has gained."""
        losses, before = self._losses_of_rows(self.model, step), {}
        if "reference" in self.method.needs:
            with torch.no_grad():
                before = self._losses_of_rows(self.reference, step)
        gained = {role: theirs - losses[role] for role, theirs in before.items()}
        means = {role: loss.detach().mean() for role, loss in losses.items()}

        method, elements = self.method, self.images["forget"][0].numel()
        if isinstance(method, DPO):
            # E -log sigmoid(beta / D [R(x) - R(a)])
            won = torch.sigmoid(method.beta / elements * (gained["retain"] - gained["forget"]))
            return means, {"total": -won.log().mean()}
        if isinstance(method, KTO):
            # E_x [1 - sigmoid(beta / D (R(x) - z0))] + E_a [1 - sigmoid(beta / D (z0 - R(a)))]
            beta, z0 = method.beta / elements, self._reference_point(gained)
            kept = 1 - torch.sigmoid(beta * (gained["retain"] - z0))
            forgotten = 1 - torch.sigmoid(beta * (z0 - gained["forget"]))
            return means, {"total": kept.mean() + forgotten.mean()}
        if isinstance(method, NPO):
            # E_a -(2 D / beta) log sigmoid(beta / D [l(a) - l_reference(a)]) + retain_weight E_x l(x)
            beta = method.beta / elements
            total = (-2 / beta * torch.sigmoid(-beta * gained["forget"]).log()).mean()
            if method.retain_weight != 0:
                total = total + method.retain_weight * losses["retain"].mean()
            return means, {"total": total}
        # Of a method that is new here: its own formula, on all rows at once.
        found = method.objective(losses, before, elements)
        return means, {name: sum(each.mean() for each in own.values()) for name, own in found.items()}

    def _losses_of_rows(self, network: TinyDenoiser, step: int) -> dict[str, Tensor]:
        """`[B]` for each role."""
        losses = {}
        for each in self.passes():
            predicted = self._predicted(network, each)
            for term in each.terms:
                residual = predicted[term.rows.start : term.rows.stop] - term.target
                losses[term.role] = self._losses(term, residual, step)
        return losses

    def _reference_point(self, gained: dict[str, Tensor]) -> Tensor:
        """z0 of KTO, without a gradient."""
        rows = torch.cat([gained["forget"], gained["retain"]]).detach()
        if self.method.z0 == "zero":
            return torch.zeros_like(rows[0])
        if self.method.z0 == "class":
            rows = torch.stack([own.detach().mean() for own in gained.values()])
        return rows.mean().clamp(min=0)

    def _predicted(self, network: TinyDenoiser, each: Pass) -> Tensor:
        t = self.schedule.model_input(each.timesteps)
        with torch.autocast("cpu", dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None):
            predicted = network(each.x_t, t)
        return predicted.to(each.x_t.dtype)

    def _losses(self, term: Term, residual: Tensor, step: int) -> Tensor:
        """`[B]`: Eq. 8 of arXiv 2510.17917, with Fourier transforms of whole images."""
        band = self.given.get("lowpass") if term.role == "forget" else None
        if band is None:
            spread = 0 if term.spread is None else term.spread
            return residual.square().flatten(1).sum(1) + spread
        if band.scheduled:
            band = band.at(step, self.given["total_steps"])
        mask = every_frequency(band, *residual.shape[-2:]).to(residual.dtype)
        return torch.fft.ifft2(mask * torch.fft.fft2(residual)).real.square().flatten(1).sum(1)

    def _weights(self, role: str) -> Tensor:
        """`[T]`: Eq. 7 as a weight, times the weight of the loss."""
        density = self.given.get({"forget": "time_window", "retain": "retain_density"}[role])
        weights = torch.ones(len(self.schedule), dtype=torch.float64)
        if density is not None and density.weighted:
            weights = density.table(len(self.schedule)) * len(self.schedule)
        if "loss_weight" in self.given:
            gamma = self.given.get("snr_gamma")
            weights = weights * self.schedule.loss_weight(self.given["loss_weight"], gamma=gamma)
        return weights

    def gradient(self, loss: Tensor) -> list[Tensor]:
        parameters = list(self.trained.values())
        found = torch.autograd.grad(self.loss_scale * loss, parameters, retain_graph=True)
        return [gradient / self.loss_scale for gradient in found]


def numbers(value: Tensor | Noise | Rows | None, dtype: torch.dtype) -> Tensor | None:
    """What is yet to be made or gathered, in `dtype`; what is no float as it is."""
    if isinstance(value, Rows):
        value = value.gather()
    if isinstance(value, Noise):
        value = value.numbers()
    if value is None or not value.is_floating_point():
        return value
    return value.to(dtype)


def whole_set(store: ImageStore, dtype: torch.dtype) -> Tensor:
    """All images of a set, `[N, C, H, W]`, in `dtype`; bytes as numbers in [-1, 1]."""
    images = store.images.to(dtype)
    return images * 2 / 255 - 1 if store.images.dtype == torch.uint8 else images


def literal_in_float64(
    method: Method,
    given: dict[str, Any],
    *,
    schedule: NoiseSchedule = SCHEDULE,
    shape: tuple[int, ...] = (1, 8, 8),
    rows: int = ROWS,
    layout: torch.memory_format = torch.contiguous_format,
) -> Literal:
    """With numbers drawn for what is `given`."""
    generator = torch.Generator().manual_seed(7)
    forget = torch.rand(rows, *shape, generator=generator, dtype=torch.float64) * 2 - 1
    # Near the forget images: both of SISS' weights matter.
    near = forget[:, None] + 0.02 * torch.randn(rows, 3, *shape, generator=generator, dtype=torch.float64)
    forget, retain = forget.to(memory_format=layout), near[:, 2].to(memory_format=layout)
    images = {"forget": forget, "neighbors": near[:, :2], "retain": retain}
    # The whole sets: as many images to forget as there are rows, three times as many to keep.
    sets = {"forget": forget, "retain": near.flatten(0, 1)}
    batch = Batch(
        **{name: value for name, value in images.items() if name in method.needs},
        stores={name: ImageStore(images, latents=True) for name, images in sets.items()},
        sizes={name: len(images) for name, images in sets.items()},
    )
    selection = selection_of(fitting(method, given))
    source = GeneratorSource(torch.device("cpu"), generator)
    wanted = selection.draws_of(method, schedule)
    draws = complete(Draws(), wanted, source, batch.forget, batch.retain, len(schedule))
    model, reference = (TinyDenoiser(shape[0], seed=seed).double() for seed in (0, 1))
    compared = compared_with(method, reference).get("reference_model")
    return Literal(method, given, model, batch, draws, schedule, reference=compared)


def every_frequency(band: LowPass, height: int, width: int) -> Tensor:
    """M of a fixed band, `[H, W]`, from its definition, in fractions."""
    mask = torch.full((height, width), band.high_frequency_weight, dtype=torch.float64)
    for i in range(height):
        for j in range(width):
            row, column = Fraction(2 * min(i, height - i), height), Fraction(2 * min(j, width - j), width)
            size = max(row, column) ** 2 if band.kind == "box" else row**2 + column**2
            within = size <= exact(band.radius) ** 2
            if band.band == "mid":
                within = within and size > exact(band.inner) ** 2
            if within != (band.band == "high"):
                mask[i, j] = 1
    return mask


def exact(radius: float | Fraction) -> Fraction:
    return radius if isinstance(radius, Fraction) else Fraction(str(radius))
