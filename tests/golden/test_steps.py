"""Whole runs of golden/steps through the public `*_step` functions: losses, norms, gradients and parameter
*updates*.

A coordinate moves by about the learning rate a step, so parameters agree without any training; their updates
do not. The same run in float64 must agree with the float64 reference to 1e-7; the float32 run with the
float32 reference as far as the papers' own code is reproducible between machines.
"""

from __future__ import annotations

from collections.abc import Iterator

import bernoulli
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

pytest.importorskip("diffusers")  # the network of the papers

from golden_feeds import loses_both_terms, picks
from golden_run import STEPS, Call, Run, norms

from fastunlearn import reference
from fastunlearn.testing import golden
from fastunlearn.testing.budgets import largest_entry, largest_error, relative_error, relative_l2

# float32 limits: the official code against itself, in float64 or with another thread count, is up to 1.5e-4
# off in the update, 8e-6 in the gradient.
UPDATE, FIRST_GRADIENT, SCALARS = 1e-3, 1e-4, 1e-4
FLOAT64 = 1e-7
# How far the papers' code is from itself.
SPREAD = {
    f"tensor.{name}"
    for name in (
        "delta_maxdiff_f32_f64", "delta_relL2_f32_f64", "delta_maxdiff_1thread_2threads",
        "grad0_maxdiff_f32_f64",
    )
}  # fmt: skip
CASES = {name: golden.Case(STEPS / f"{name}.npz") for name in golden.case_names(STEPS)}


def _cases(kind: str, **wanted: str) -> list[str]:
    metas = {name: case.meta for name, case in CASES.items() if case.meta["kind"] == kind}
    return [name for name, meta in metas.items() if all(meta[key] == value for key, value in wanted.items())]


RETRACK, SISS = _cases("retrack_train_step"), _cases("siss_train_loop")
BERNOULLI = _cases("siss_train_loop", loss="subscore_bernoulli")
IN_FLOAT64 = [name for name, case in CASES.items() if case.keys("out.f64.")]


def _truth(case: golden.Case) -> str:
    """The reference for a float32 run: float64 where the float32 one is noise, by its own account."""
    limits = {"rel_l2_delta_f32_vs_f64": UPDATE, "rel_l2_grad0_f32_vs_f64": FIRST_GRADIENT}
    noise = any(case.meta.get(own, 0.0) > limit / 2 for own, limit in limits.items())
    return "f64" if noise and case.keys("out.f64.") else "f32"


# What is compared


def _scalars(run: Run) -> dict[str, str]:
    """Stored name -> our name."""
    meta, names = run.case.meta, {}
    if meta["kind"] == "retrack_train_step":
        names |= {"param_norm": "param_norm", "delta_norm": "delta_norm"}
        two_terms = {"loss_main": "retain_loss", "loss_correction": "forget_loss"}
        one_term = meta["method"] not in ("siss", "erasediff")
    else:
        two_terms = {"loss_x": "retain_loss", "loss_a": "forget_loss"}
        one_term = meta["loss"] in ("simple_neg_del", "naive_del")
    names |= {"loss": "loss"} if one_term else two_terms
    if run.updates:
        names["grad_norm_preclip"] = "grad_norm"
    if run.updates and not one_term:
        names |= {"correction_norm": "correction_norm", "scaling_factor": "scaling_factor"}
        if meta["kind"] == "siss_train_loop":
            names["main_norm"] = "main_norm"
    return names


def _check_scalars(run: Run, precision: str, tolerance: float) -> set[str]:
    """The scalars `out.<precision>.*`, one a micro-step or one an update. Returns the checked keys."""
    checked = set()
    for stored, ours in _scalars(run).items():
        truth = run.case(f"out.{precision}.{stored}")
        error = relative_error(run.series(ours), truth)
        eta = _eta(run.case.meta)
        # EraseDiff's factor is what is left of eta: it bears eta's rounding
        if stored == "scaling_factor" and eta:
            error = largest_error(run.series(ours), truth) / max(largest_entry(truth), eta)
        assert error <= tolerance, f"{run.case.name} {precision} {stored}: {error:.3g}"
        checked.add(f"{precision}.{stored}")
    if run.updates and run.case.meta.get("method") == "erasediff":
        checked |= _check_inner_product(run, precision, tolerance)
    if f"out.{precision}.delta_norm_final" in run.case:
        error = relative_error(run.series("delta_norm")[-1], run.case(f"out.{precision}.delta_norm_final"))
        assert error <= tolerance, f"{run.case.name} {precision} delta_norm_final: {error:.3g}"
        checked.add(f"{precision}.delta_norm_final")
    counts = f"{precision}.n_remain_n_deletion"  # of the picked rows, an input rather than a result
    if f"out.{counts}" in run.case:
        lambd = run.case.meta["loss_params"]["lambd"]
        picked = [bernoulli.counts(picks(run, s, lambd)) for s in range(run.micro_steps)]
        assert run.case(f"out.{counts}").tolist() == picked
        checked.add(counts)
    return checked


def _eta(meta: dict) -> float | None:
    """EraseDiff's; None for the other methods."""
    return meta["extra"].get("eta") if meta["kind"] == "retrack_train_step" else meta["eta"]


def _check_inner_product(run: Run, precision: str, tolerance: float) -> set[str]:
    """EraseDiff: `f = -max(eta - <g_x, g_a> / ||g_a||^2, 0)`, so a factor below 0 tells the inner product."""
    factor, norm = run.series("scaling_factor"), run.series("correction_norm")
    eta = run.case.meta["extra"]["eta"]
    stored = run.case(f"out.{precision}.inner_product")
    implied = torch.where(factor < 0, (eta + factor) * norm.square(), stored.clamp_min(eta * norm.square()))
    assert relative_error(implied, stored) <= tolerance
    return {f"{precision}.inner_product"}


def _check_joined_losses(run: Run, tolerance: float) -> None:
    """A step on joined micro-steps reports the mean of their losses."""
    for stored, ours in _scalars(run).items():
        if run.updates and stored.startswith("loss"):
            complete = run.series(ours)[: run.updates * run.accumulation]
            alone = complete.unflatten(0, (run.updates, -1)).mean(dim=1)
            joined = torch.stack([value.double() for value in run.joined[ours]])
            assert relative_error(joined, alone) <= tolerance, f"{run.case.name} joined {ours}"


def _check_tensors(run: Run, precision: str, gradient_tolerance: float, update_tolerance: float) -> set[str]:
    """Norms of the first gradient and of the whole update, one per parameter."""
    # The gradient of a key bias is zero in exact arithmetic (softmax does not see a shift): what is stored is
    # rounding.
    known = torch.tensor(["to_k.bias" not in name for name in run.case.meta["param_names"]])
    compared = [("delta", run.update(), update_tolerance)]
    if run.first_gradient is not None:
        compared.append(("grad0", run.first_gradient, gradient_tolerance))
    for stored, tensors, tolerance in compared:
        ours, truth = norms(tensors)[known], run.case(f"tensor.{stored}_l2_{precision}")[known]
        # The least gradients are what two terms leave of each other, and bear the rounding of these.
        least = truth.norm() / 1000 if stored == "grad0" else torch.zeros(())
        unit = torch.maximum(truth, least.to(truth))
        error = torch.where(ours == truth, torch.zeros_like(truth), (ours - truth).abs() / unit).max().item()
        assert error <= tolerance, f"{run.case.name} {precision} {stored}: {error:.3g}"
    return {f"tensor.{stored}_l2_{precision}" for stored, _, _ in compared}


def _check_weights(run: Run) -> None:
    """First gradient and update against the stored ones, where the run keeps them (they are large)."""
    names, start = run.case.meta["param_names"], run.start
    final, gradient = (STEPS / f"{run.case.name}.{what}.safetensors" for what in ("final", "grad0"))
    if final.is_file():
        stored = load_file(final)
        assert (
            relative_l2(
                run.update(), [stored[name] - first for name, first in zip(names, start, strict=True)]
            )
            <= UPDATE
        )
    if gradient.is_file():
        stored = load_file(gradient)
        assert relative_l2(run.first_gradient, [stored[name] for name in names]) <= FIRST_GRADIENT


def _check_outputs(run: Run) -> set[str]:
    """What the network returned, row by row: this sees the update as a function, where norms see its size."""
    checked = set()
    for s, calls in enumerate(run.calls):
        for branch in run.case.meta["dataset_types"]:
            key = f"step{s}.model_outputs.{branch}"
            stored = run.case(f"out.{key}")
            rows, ours = _rows_of(run, s, branch, calls)
            assert relative_error(ours, stored[rows]) <= SCALARS, f"{run.case.name} {key}"
            checked.add(key)
    return checked


def _rows_of(run: Run, s: int, branch: str, calls: list[Call]) -> tuple[Tensor, Tensor]:
    """Which stored rows of a branch the package has computed too, and its values for them."""
    meta, batch = run.case.meta, len(run.input(s, f"images.{branch}"))
    everything = torch.ones(batch, dtype=torch.bool)
    given, returned = (torch.cat([getattr(call, side) for call in calls]) for side in ("given", "returned"))
    if meta["method"] == "siss":
        # The reference makes two forwards and uses one of them in each row; we make that one, in groups of
        # rows that need the same passes.
        from_forget = picks(run, s, meta["params"]["lambda"])
        rows = from_forget if branch == "deletion" else ~from_forget
        noisy = reference.noising(
            *(run.input(s, f"{kind}.{branch}") for kind in ("images", "noises", "timesteps")), run.schedule
        )[rows]
        at = torch.cdist(noisy.flatten(1), given.flatten(1)).argmin(dim=1)
        assert relative_error(given[at], noisy) <= SCALARS
        return rows, returned[at]
    if meta["method"] == "retrack" and meta["params"]["lambda"] == 1 and branch == "remain":
        return ~everything, returned[:0]  # a term without weight: the package makes no such forward
    forget_first = (meta["method"], branch) in (("retrack", "knn"), ("erasediff", "deletion"))
    return everything, returned[:batch] if forget_first else returned[-batch:]


def _assert_matches(run: Run, precision: str, scalars: float, gradient: float, update: float) -> None:
    """Everything that the run stores in `precision` agrees, and nothing that it stores is left out."""
    checked = _check_scalars(run, precision, scalars)
    _check_joined_losses(run, scalars)
    tensors = _check_tensors(run, precision, gradient, update)
    stored = {key for key in run.case.keys("out.") if key.startswith(f"{precision}.")}
    golden.assert_all_checked(stored, checked)
    stored = {f"tensor.{key}" for key in run.case.keys("tensor.") if key.endswith(f"l2_{precision}")}
    golden.assert_all_checked(stored, tensors)


@pytest.fixture
def everything_in_float64(monkeypatch) -> Iterator[None]:
    """As the float64 vectors were made: diffusers casts its timestep embedding by `Tensor.float()`, which
    must not round here.
    """
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", CASES)
def test_every_array_is_an_input_or_compared(name):
    case = CASES[name]
    known = {f"in.{key}" for key in case.keys("in.")} | SPREAD
    known |= {f"tensor.{what}_l2_{precision}" for what in ("delta", "grad0") for precision in ("f32", "f64")}
    for key in case.keys("out."):
        of_network = ".model_outputs." in key and case.meta["kind"] == "retrack_train_step"
        if key.startswith(("f32.", "f64.")) or of_network:
            known.add(f"out.{key}")
    assert not case.keys("") - known


@pytest.mark.parametrize("name", RETRACK)
def test_float32_run_matches_retracks_train_step(name):
    run, truth = Run(name, torch.float32), _truth(CASES[name])
    run.take()
    _assert_matches(run, truth, SCALARS, FIRST_GRADIENT, UPDATE)
    if truth == "f32":
        _check_weights(run)
        outputs = {key for key in run.case.keys("out.") if ".model_outputs." in key}
        golden.assert_all_checked(outputs, _check_outputs(run))


@pytest.mark.usefixtures("everything_in_float64")
@pytest.mark.parametrize("name", IN_FLOAT64)
def test_float64_run_matches_the_float64_reference(name):
    run = Run(name, torch.float64)
    run.take()
    _assert_matches(run, "f64", FLOAT64, FLOAT64, FLOAT64)


@pytest.mark.parametrize("name", SISS)
def test_float32_run_matches_siss_training_loop(name):
    run, truth = Run(name, torch.float32), _truth(CASES[name])
    run.take()
    assert run.updates == run.case.meta["optimizer_steps"]
    _assert_matches(run, truth, SCALARS, FIRST_GRADIENT, UPDATE)
    if truth == "f32":
        _check_weights(run)


@pytest.mark.parametrize("name", SISS)
def test_network_gets_as_many_rows_as_in_siss_training_loop(name):
    """On a CPU one forward of the mixture is up to three, of the rows that need the same backward passes."""
    run, rows = Run(name, torch.float32), []
    run.model.register_forward_hook(lambda model, inputs, output: rows.append(len(inputs[0])))
    for s in range(run.micro_steps):
        run.feed(range(s, s + 1)).step(None)
        run.model.zero_grad()
    assert sum(rows) == run.case.meta["forwards"] * run.case.meta["batch"]


@pytest.mark.parametrize("name", BERNOULLI)
def test_bernoulli_keeps_the_forget_term_that_the_papers_code_loses(name):
    """Without a retain row the official loss is zero in both terms; ours has a forget term."""
    run = Run(name, torch.float32)
    for s in range(run.micro_steps):
        from_forget = picks(run, s, run.case.meta["loss_params"]["lambd"])
        assert loses_both_terms(run, s) == bool(from_forget.all())
        calls: list[Call] = []
        hook = run.model.register_forward_hook(
            lambda model, inputs, output, calls=calls: calls.append(Call(inputs[0], output.sample.detach()))
        )
        output = run.feed(range(s, s + 1)).step(None)
        run.model.zero_grad()
        hook.remove()
        assert (output.retain_loss == 0) == from_forget.all()
        assert (output.forget_loss == 0) == (~from_forget).all()
        if from_forget.all():
            (call,) = calls
            residual = call.returned.double() - run.input(s, "noise").double()
            expected = residual.square().sum() / len(from_forget)
            torch.testing.assert_close(output.forget_loss.double(), expected, rtol=1e-5, atol=0)
            for stored in ("loss_x", "loss_a"):
                assert run.case(f"out.f32.{stored}")[s] == 0
