"""The arrays of golden/losses, computed with the literal formulas of `fastunlearn.reference` in the dtype in
which a case gives its inputs.
"""

from __future__ import annotations

import bernoulli
import torch
from torch import Tensor

from fastunlearn.reference import denoising_loss, objectives, redirect
from fastunlearn.reference.mixture import mixture, mixture_distance
from fastunlearn.reference.redirect import log_kernel, neighbor_noise, squared_norms
from fastunlearn.testing import golden


def retrack_losses(case: golden.Case) -> dict[str, Tensor]:
    computed = _vanilla(case) | _retrack(case)
    if "in.images.deletion" in case:  # large cases hold vanilla and retrack only
        computed |= _neggrad(case) | _erasediff(case)
    if "in.siss_uniform" in case and case.meta["siss_present"]:
        computed |= _siss(case)
    return computed


def siss_losses(case: golden.Case) -> dict[str, Tensor | int]:
    computed = _importance_sampling(case) | _no_is(case) | _siss_erasediff(case) | _single_terms(case)
    if "f64.subscore_bernoulli.loss_x" in case:  # the reference defines it for 0 < lambd < 1
        computed |= _bernoulli(case)
    return computed


def _input(case: golden.Case, key: str) -> Tensor:
    return case(f"in.{key}", torch.float64)


def _leaf(case: golden.Case, key: str) -> Tensor:
    return _input(case, key).requires_grad_()


def _gradient(loss: Tensor, output: Tensor) -> Tensor:
    """d loss / d output; zero where the output does not enter."""
    (gradient,) = torch.autograd.grad(
        loss, output, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return gradient


# ReTrack's objectives


def _vanilla(case: golden.Case) -> dict[str, Tensor]:
    output, noise = _leaf(case, "model_outputs.remain"), _input(case, "noises.remain")
    loss = objectives.vanilla_loss(output, noise)
    return {
        "vanilla.loss": loss,
        "vanilla.per_sample": denoising_loss(output, noise),
        "vanilla.grad.remain": _gradient(loss, output),
    }


def _neggrad(case: golden.Case) -> dict[str, Tensor]:
    output, noise = _leaf(case, "model_outputs.deletion"), _input(case, "noises.deletion")
    loss = objectives.neggrad_loss(output, noise)
    return {
        "neggrad.loss": loss,
        "neggrad.per_sample": -denoising_loss(output, noise),
        "neggrad.grad.deletion": _gradient(loss, output),
    }


def _erasediff(case: golden.Case) -> dict[str, Tensor]:
    retain, forget, uniform = (
        _leaf(case, "model_outputs.remain"),
        _leaf(case, "model_outputs.deletion"),
        _input(case, "erasediff_uniform"),
    )
    main, correction = objectives.erasediff_losses(retain, _input(case, "noises.remain"), forget, uniform)
    return {
        "erasediff.loss_main": main,
        "erasediff.loss_correction": correction,
        "erasediff.per_sample_correction": denoising_loss(forget, uniform),
        "erasediff.grad_main.remain": _gradient(main, retain),
        "erasediff.grad_correction.deletion": _gradient(correction, forget),
    }


def _retrack(case: golden.Case) -> dict[str, Tensor]:
    schedule, lambd = case.schedule(), case.meta["case"]["retrack_lambda"]
    output, output_retain = _leaf(case, "model_outputs.knn"), _leaf(case, "model_outputs.remain")
    x_t, neighbors, timesteps = (
        _input(case, "noisy_images.knn"),
        _input(case, "knn_neighbors"),
        case("in.timesteps.knn"),
    )
    draw = redirect(
        _input(case, "images.knn"), neighbors, _input(case, "noises.knn"), timesteps, schedule, x_t=x_t
    )
    v = neighbor_noise(x_t, neighbors, timesteps, schedule)
    per_sample = objectives.retrack_unlearn_loss(output, x_t, neighbors, timesteps, schedule)
    noise = _input(case, "noises.remain")
    loss = objectives.retrack_loss(output, x_t, neighbors, timesteps, output_retain, noise, schedule, lambd)
    return {
        "retrack.log_kernel": log_kernel(v),
        "retrack.p": draw.weights,
        "retrack.target": draw.target,
        "retrack.target_variance": draw.spread,
        "retrack.sq_norms": squared_norms(output, v),
        "retrack.per_sample_unlearn": per_sample,
        "retrack.loss_unlearn": per_sample.mean(),
        "retrack.loss_remain": objectives.vanilla_loss(output_retain, noise),
        "retrack.loss": loss,
        "retrack.grad.knn": _gradient(loss, output),
        "retrack.grad.remain": _gradient(loss, output_retain),
    }


def _siss(case: golden.Case) -> dict[str, Tensor]:
    """ReTrack's form: two forwards, own noise and timesteps in each branch, one of them picked a row."""
    schedule, lambd = case.schedule(), case.meta["case"]["siss_lambda"]
    from_forget = case("in.siss_uniform") <= lambd
    assert torch.equal(from_forget, ~case("in.siss_remain_mask"))
    outputs = _leaf(case, "model_outputs.remain"), _leaf(case, "model_outputs.deletion")
    retain, forget = images = _input(case, "images.remain"), _input(case, "images.deletion")
    noisy = _input(case, "noisy_images.remain"), _input(case, "noisy_images.deletion")
    timesteps = case("in.timesteps.remain"), case("in.timesteps.deletion")
    main, correction = objectives.siss_two_forward_losses(
        outputs, images, noisy, timesteps, from_forget, schedule, lambd
    )
    picked = from_forget.view(-1, 1, 1, 1)
    x_t, output = torch.where(picked, noisy[1], noisy[0]), torch.where(picked, outputs[1], outputs[0])
    t = torch.where(from_forget, timesteps[1], timesteps[0])
    draw = mixture(retain, forget, x_t, t, schedule, lambd, from_forget, x_t=x_t)
    return {
        "siss.loss_main": main,
        "siss.loss_correction": correction,
        "siss.weight_remain": draw.retain_weight,
        "siss.weight_deletion": draw.forget_weight,
        "siss.sq_err_remain": denoising_loss(output, draw.retain_target),
        "siss.sq_err_deletion": denoising_loss(output, draw.forget_target),
        "siss.dist_remain": mixture_distance(x_t, retain, t, schedule),
        "siss.dist_deletion": mixture_distance(x_t, forget, t, schedule),
        "siss.grad_main.remain": _gradient(main, outputs[0]),
        "siss.grad_main.deletion": _gradient(main, outputs[1]),
        "siss.grad_correction.remain": _gradient(correction, outputs[0]),
        "siss.grad_correction.deletion": _gradient(correction, outputs[1]),
    }


# SISS' six objectives: the pair shares noise and timestep; `out_first`, `out_second` are what the network
# returned at its first and second call


def _importance_sampling(case: golden.Case) -> dict[str, Tensor | int]:
    schedule, lambd, t = case.schedule(), case.meta["case"]["lambd"], case("in.timesteps")
    from_forget = case("in.mask_uniform") <= lambd
    retain, forget, output = (
        _input(case, "images.remain"),
        _input(case, "images.deletion"),
        _leaf(case, "out_first"),
    )
    x_t = torch.where(
        from_forget.view(-1, 1, 1, 1),
        _input(case, "noisy_images.deletion"),
        _input(case, "noisy_images.remain"),
    )
    loss_x, loss_a = objectives.siss_mixture_losses(
        output, retain, forget, x_t, t, from_forget, schedule, lambd
    )
    draw = mixture(retain, forget, _input(case, "noise"), t, schedule, lambd, from_forget, x_t=x_t)
    values = {
        "n_forward": 1,
        "loss_x": loss_x,
        "loss_a": loss_a,
        "weight_x": draw.retain_weight,
        "weight_a": draw.forget_weight,
        "dist_x": mixture_distance(x_t, retain, t, schedule),
        "dist_a": mixture_distance(x_t, forget, t, schedule),
        "sq_err_x": denoising_loss(output, draw.retain_target),
        "sq_err_a": denoising_loss(output, draw.forget_target),
        "per_sample_x": denoising_loss(output, draw.retain_target, draw.retain_weight),
        "per_sample_a": denoising_loss(output, draw.forget_target, draw.forget_weight),
        "grad_x.first": _gradient(loss_x, output),
        "grad_a.first": _gradient(loss_a, output),
    }
    return _prefixed("importance_sampling_with_mixture", values)


def _no_is(case: golden.Case) -> dict[str, Tensor | int]:
    first, second, noise = _leaf(case, "out_first"), _leaf(case, "out_second"), _input(case, "noise")
    losses = objectives.siss_no_is_losses(first, second, noise)
    return _prefixed("double_forward_with_neg_del", _two_terms(losses, first, second, noise, noise))


def _siss_erasediff(case: golden.Case) -> dict[str, Tensor | int]:
    first, second, noise, uniform = (
        _leaf(case, "out_first"),
        _leaf(case, "out_second"),
        _input(case, "noise"),
        _input(case, "erasediff_uniform"),
    )
    losses = objectives.erasediff_losses(first, noise, second, uniform)
    return _prefixed("erasediff", _two_terms(losses, first, second, noise, uniform))


def _two_terms(
    losses: tuple[Tensor, Tensor], first: Tensor, second: Tensor, target_x: Tensor, target_a: Tensor
) -> dict[str, Tensor | int]:
    loss_x, loss_a = losses
    return {
        "n_forward": 2,
        "loss_x": loss_x,
        "loss_a": loss_a,
        "per_sample_x": denoising_loss(first, target_x),
        "per_sample_a": denoising_loss(second, target_a),
        "grad_x.first": _gradient(loss_x, first),
        "grad_a.second": _gradient(loss_a, second),
    }


def _single_terms(case: golden.Case) -> dict[str, Tensor | int]:
    output, noise, superfactor = (
        _leaf(case, "out_first"),
        _input(case, "noise"),
        case.meta["case"]["superfactor"],
    )
    neggrad, naive = (
        objectives.neggrad_loss(output, noise, superfactor),
        objectives.vanilla_loss(output, noise),
    )
    per_sample = denoising_loss(output, noise)
    return _prefixed(
        "simple_neg_del",
        {
            "n_forward": 1,
            "loss": neggrad,
            "per_sample": -superfactor * per_sample,
            "grad.first": _gradient(neggrad, output),
        },
    ) | _prefixed(
        "naive_del",
        {"n_forward": 1, "loss": naive, "per_sample": per_sample, "grad.first": _gradient(naive, output)},
    )


def _bernoulli(case: golden.Case) -> dict[str, Tensor | int]:
    lambd, output, noise = case.meta["case"]["lambd"], _leaf(case, "out_first"), _input(case, "noise")
    from_forget = case("in.mask_uniform") <= lambd
    loss_x, loss_a = objectives.siss_bernoulli_losses(output, noise, from_forget, lambd)
    per_sample = denoising_loss(output, noise)
    rows = {
        "per_sample_x": per_sample[~from_forget] / (1 - lambd),
        "per_sample_a": per_sample[from_forget],
        "grad_x.first": _gradient(loss_x, output),
        "grad_a.first": _gradient(loss_a, output),
    }
    known = {
        "n_forward": 1,
        "n_remain_n_deletion": bernoulli.counts(from_forget),
        "loss_x": loss_x,
        "loss_a": loss_a,
    }
    return _prefixed(bernoulli.PREFIX, known | bernoulli.without_replaced(rows, from_forget, case))


def _prefixed(prefix: str, values: dict[str, Tensor | int]) -> dict[str, Tensor | int]:
    return {f"{prefix}.{key}": value for key, value in values.items()}
