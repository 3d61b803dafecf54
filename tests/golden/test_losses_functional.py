"""Every array of golden/losses from the public float32 functions, within twice the float32 error of the
papers' own code, plus one rounding.

The papers' numbers are one evaluation, and those of the few samples of a case often right by luck. So their
formulas count as well, in float32 and with the elements of the images in several orders.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import bernoulli
import pytest
import torch
from literal_losses import retrack_losses, siss_losses
from torch import Tensor

from fastunlearn import functional as F
from fastunlearn.testing import golden
from fastunlearn.testing.budgets import assert_within_budget, relative_error, reordered, shuffles

LOSSES = golden.root(Path(__file__).parent / "data") / "losses"

# What the closed form never computes: logits and distances (they exist up to a constant that cancels in the
# weights) and losses per neighbour.
RETRACK_EXCEPTIONS = {"retrack.log_kernel", "retrack.sq_norms", "siss.dist_remain", "siss.dist_deletion"}
SISS_EXCEPTIONS = {"importance_sampling_with_mixture.dist_x", "importance_sampling_with_mixture.dist_a"}
# How often the network is called is a matter of the step: tests/golden/test_steps.py counts it. Bernoulli's
# two row counts are input masks.
NOT_NUMBERS = {".n_forward", ".n_remain_n_deletion"}


@pytest.mark.parametrize("name", golden.case_names(LOSSES, "retrack_"))
def test_float32_functional_matches_retrack(name):
    case = golden.Case(LOSSES / f"{name}.npz")
    computed = _vanilla(case) | _retrack(case)
    if "in.images.deletion" in case:
        computed |= _forget_only(case)
    if case.meta["siss_present"]:
        computed |= _siss(case)
    _assert_matches(case, computed, retrack_losses, RETRACK_EXCEPTIONS)


@pytest.mark.parametrize("name", golden.case_names(LOSSES, "siss_"))
def test_float32_functional_matches_siss(name):
    case = golden.Case(LOSSES / f"{name}.npz")
    computed = _importance_sampling(case) | _two_forwards(case) | _single_terms(case)
    if "f32.subscore_bernoulli.loss_x" in case:
        computed |= bernoulli_terms(case)
    counts = {key for key in case.keys("f32.") if key.endswith(tuple(NOT_NUMBERS))}
    _assert_matches(case, computed, siss_losses, SISS_EXCEPTIONS | counts)


@pytest.mark.parametrize("name", golden.case_names(LOSSES))
def test_noised_inputs_are_the_stored_ones(name):
    case = golden.Case(LOSSES / f"{name}.npz")
    for branch in case.keys("in.noisy_images."):
        suffix = f".{branch}" if f"in.noises.{branch}" in case else ""
        noise = case(f"in.noises.{branch}") if suffix else case("in.noise")
        noised = F.noised(case(f"in.images.{branch}"), noise, case(f"in.timesteps{suffix}"), case.schedule())
        # Two products and a sum in float32, on both sides.
        assert (
            relative_error(noised.x_t, case(f"in.noisy_images.{branch}"))
            <= 4 * torch.finfo(torch.float32).eps
        )
        assert torch.equal(noised.target, noise)


class Reordered:
    """A case in float32, with the elements of all images permuted."""

    def __init__(self, case: golden.Case, order: Tensor):
        self._case, self._order, self.meta, self.schedule = case, order, case.meta, case.schedule

    def __contains__(self, key: str) -> bool:
        return key in self._case

    def __call__(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        return _permuted(self._case(key, torch.float32), self._order)


def _permuted(value: Tensor, order: Tensor) -> Tensor:
    return reordered(value, order) if value.ndim > 3 and value.shape[-3:].numel() == len(order) else value


def _literal(case: golden.Case, formulas: Callable) -> dict[str, list[Tensor]]:
    """What the papers' formulas give in float32, in several orders."""
    evaluations: dict[str, list[Tensor]] = {}
    for order in shuffles(case("in.images.remain").shape[-3:].numel()):
        for key, value in formulas(Reordered(case, order)).items():
            if isinstance(value, Tensor):
                evaluations.setdefault(key, []).append(_permuted(value.float(), order.argsort()))
    return evaluations


def _assert_matches(
    case: golden.Case, computed: dict[str, Tensor], formulas: Callable, exceptions: set[str]
) -> None:
    exceptions = exceptions & case.keys("f32.")
    golden.assert_all_checked(case.keys("f32."), computed, exceptions)
    literal = _literal(case, formulas)
    for key, value in computed.items():
        if f"f64.{key}" not in case:  # the picked network input: float32 numbers, only copied
            assert torch.equal(value, case(f"f32.{key}")), key
            continue
        assert_within_budget(
            f"{case.name} {key}", value, [case(f"f32.{key}"), *literal[key]], case(f"f64.{key}")
        )


def _leaf(case: golden.Case, key: str) -> Tensor:
    return case(f"in.{key}").requires_grad_()


def _gradient(loss: Tensor, output: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(loss, output, retain_graph=True)
    return gradient


def _vanilla(case: golden.Case) -> dict[str, Tensor]:
    output = _leaf(case, "model_outputs.remain")
    per_sample = F.denoising_loss(output, case("in.noises.remain"))
    loss = per_sample.mean()
    return {
        "vanilla.loss": loss,
        "vanilla.per_sample": per_sample,
        "vanilla.grad.remain": _gradient(loss, output),
    }


def _forget_only(case: golden.Case) -> dict[str, Tensor]:
    output, output_retain = _leaf(case, "model_outputs.deletion"), _leaf(case, "model_outputs.remain")
    weight = torch.full((len(output),), -1.0)
    neggrad = F.denoising_loss(output, case("in.noises.deletion"), weight)
    correction = F.denoising_loss(output, case("in.erasediff_uniform"))
    # sic: the papers divide by the forget batch
    main_loss = F.denoising_loss(output_retain, case("in.noises.remain")).sum() / len(output)
    return {
        "neggrad.loss": neggrad.mean(),
        "neggrad.per_sample": neggrad,
        "neggrad.grad.deletion": _gradient(neggrad.mean(), output),
        "erasediff.loss_main": main_loss,
        "erasediff.loss_correction": correction.mean(),
        "erasediff.per_sample_correction": correction,
        "erasediff.grad_main.remain": _gradient(main_loss, output_retain),
        "erasediff.grad_correction.deletion": _gradient(correction.mean(), output),
    }


def _retrack(case: golden.Case) -> dict[str, Tensor]:
    lambd, output, output_retain = (
        case.meta["case"]["retrack_lambda"],
        _leaf(case, "model_outputs.knn"),
        _leaf(case, "model_outputs.remain"),
    )
    images, neighbors, noise, timesteps = (
        case(f"in.{key}") for key in ("images.knn", "knn_neighbors", "noises.knn", "timesteps.knn")
    )
    draw = F.redirect(images, neighbors, noise, timesteps, case.schedule(), x_t=case("in.noisy_images.knn"))
    per_sample = F.denoising_loss(output, draw.target) + draw.spread
    retain = F.denoising_loss(output_retain, case("in.noises.remain")).mean()
    loss = lambd * per_sample.mean() + (1 - lambd) * retain
    return {
        "retrack.p": draw.weights,
        "retrack.target": draw.target,
        "retrack.target_variance": draw.spread,
        "retrack.per_sample_unlearn": per_sample,
        "retrack.loss_unlearn": per_sample.mean(),
        "retrack.loss_remain": retain,
        "retrack.loss": loss,
        "retrack.grad.knn": _gradient(loss, output),
        "retrack.grad.remain": _gradient(loss, output_retain),
    }


def _siss(case: golden.Case) -> dict[str, Tensor]:
    """ReTrack picks after two forwards; one forward on the picked rows is the same: pick first."""
    lambd = case.meta["case"]["siss_lambda"]
    from_forget = case("in.siss_uniform") <= lambd
    outputs = _leaf(case, "model_outputs.remain"), _leaf(case, "model_outputs.deletion")
    noise, x_t, timesteps = (
        _pick(from_forget, case(f"in.{group}.remain"), case(f"in.{group}.deletion"))
        for group in ("noises", "noisy_images", "timesteps")
    )
    values = _mixture_terms(case, lambd, from_forget, _pick(from_forget, *outputs), noise, x_t, timesteps)
    loss_x, loss_a = values["loss_x"], values["loss_a"]
    return {
        "siss.mixture_noisy_images": values["x_t"],
        "siss.loss_main": loss_x,
        "siss.loss_correction": loss_a,
        "siss.weight_remain": values["weight_x"],
        "siss.weight_deletion": values["weight_a"],
        "siss.sq_err_remain": values["sq_err_x"],
        "siss.sq_err_deletion": values["sq_err_a"],
        "siss.grad_main.remain": _gradient(loss_x, outputs[0]),
        "siss.grad_main.deletion": _gradient(loss_x, outputs[1]),
        "siss.grad_correction.remain": _gradient(loss_a, outputs[0]),
        "siss.grad_correction.deletion": _gradient(loss_a, outputs[1]),
    }


def _importance_sampling(case: golden.Case) -> dict[str, Tensor]:
    lambd, output = case.meta["case"]["lambd"], _leaf(case, "out_first")
    from_forget = case("in.mask_uniform") <= lambd
    x_t = _pick(from_forget, case("in.noisy_images.remain"), case("in.noisy_images.deletion"))
    values = _mixture_terms(case, lambd, from_forget, output, case("in.noise"), x_t, case("in.timesteps"))
    values["unet_input"] = values.pop("x_t")
    values["grad_x.first"], values["grad_a.first"] = (
        _gradient(values["loss_x"], output),
        _gradient(values["loss_a"], output),
    )
    return {f"importance_sampling_with_mixture.{key}": value for key, value in values.items()}


def _mixture_terms(
    case: golden.Case,
    lambd: float,
    from_forget: Tensor,
    output: Tensor,
    noise: Tensor,
    x_t: Tensor,
    timesteps: Tensor,
) -> dict[str, Tensor]:
    draw = F.mixture(
        case("in.images.remain"),
        case("in.images.deletion"),
        noise,
        timesteps,
        case.schedule(),
        lambd,
        from_forget,
        x_t=x_t,
    )
    per_sample_x = F.denoising_loss(output, draw.retain_target, draw.retain_weight)
    per_sample_a = F.denoising_loss(output, draw.forget_target, draw.forget_weight)
    return {
        "x_t": draw.x_t,
        "weight_x": draw.retain_weight,
        "weight_a": draw.forget_weight,
        "sq_err_x": F.denoising_loss(output, draw.retain_target),
        "sq_err_a": F.denoising_loss(output, draw.forget_target),
        "per_sample_x": per_sample_x,
        "per_sample_a": per_sample_a,
        "loss_x": per_sample_x.mean(),
        "loss_a": per_sample_a.mean(),
    }


def _two_forwards(case: golden.Case) -> dict[str, Tensor]:
    values = {}
    for objective, forget_target in (
        ("double_forward_with_neg_del", case("in.noise")),
        ("erasediff", case("in.erasediff_uniform")),
    ):
        for branch, call, target in (("x", "first", case("in.noise")), ("a", "second", forget_target)):
            output = _leaf(case, f"out_{call}")
            per_sample = F.denoising_loss(output, target)
            values[f"{objective}.per_sample_{branch}"] = per_sample
            values[f"{objective}.loss_{branch}"] = per_sample.mean()
            values[f"{objective}.grad_{branch}.{call}"] = _gradient(per_sample.mean(), output)
    return values


def _single_terms(case: golden.Case) -> dict[str, Tensor]:
    values = {}
    for objective, factor in (("simple_neg_del", -case.meta["case"]["superfactor"]), ("naive_del", 1.0)):
        output = _leaf(case, "out_first")
        per_sample = F.denoising_loss(output, case("in.noise"), torch.full((len(output),), factor))
        values[f"{objective}.per_sample"], values[f"{objective}.loss"] = per_sample, per_sample.mean()
        values[f"{objective}.grad.first"] = _gradient(per_sample.mean(), output)
    return values


def bernoulli_terms(case: golden.Case) -> dict[str, Tensor]:
    """Rows of the other branch weigh 0.

    A forget term without any retain row is ours alone: the papers' code loses it.
    """
    lambd, values = case.meta["case"]["lambd"], {}
    from_forget = case("in.mask_uniform") <= lambd
    for branch, rows, weight in (("x", ~from_forget, 1 / (1 - lambd)), ("a", from_forget, 1.0)):
        output = _leaf(case, "out_first")
        per_sample = F.denoising_loss(output, case("in.noise"), rows.double() * weight)
        values[f"per_sample_{branch}"] = per_sample[rows]
        values[f"loss_{branch}"] = per_sample.mean()
        values[f"grad_{branch}.first"] = _gradient(per_sample.mean(), output)
        assert (per_sample.mean() > 0) == rows.any()
    stored = bernoulli.without_replaced(values, from_forget, case)
    return {f"{bernoulli.PREFIX}.{key}": value for key, value in stored.items()}


def _pick(from_forget: Tensor, retain: Tensor, forget: Tensor) -> Tensor:
    return torch.where(from_forget.view(-1, *(1,) * (retain.ndim - 1)), forget, retain)
