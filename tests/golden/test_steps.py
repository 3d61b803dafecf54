"""Whole runs of golden/steps through the public `*_step` functions: losses, norms, gradients and parameter *updates*.

A coordinate moves by about the learning rate a step, so parameters agree without any training; their updates do not. The same run in float64 must agree with
the float64 reference to 1e-7; the float32 run with the float32 reference as far as the papers' own code is reproducible between machines.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import fastunlearn as fu
from fastunlearn import reference
from fastunlearn.testing import golden
from fastunlearn.testing.budgets import relative_error, relative_l2

diffusers = pytest.importorskip("diffusers")  # the network of the papers
STEPS = golden.root(Path(__file__).parent / "data") / "steps"
# float32 limits: the official code against itself, in float64 or with another thread count, is up to 1.5e-4 off in the update, 8e-6 in the gradient.
UPDATE, FIRST_GRADIENT, SCALARS = 1e-3, 1e-4, 1e-4
FLOAT64 = 1e-7
DEGENERATE = "step_siss_degenerate"  # its float32 reference is rounding noise; truth is its float64 run
SPREAD = {"delta_maxdiff_f32_f64", "delta_relL2_f32_f64", "delta_maxdiff_1thread_2threads", "grad0_maxdiff_f32_f64"}  # how far the papers' code is from itself


class Run:
    """One golden run, repeated by the package: what it reports at every step, its first gradient and its updates."""

    def __init__(self, name: str, dtype: torch.dtype):
        self.case, self.dtype = golden.Case(STEPS / f"{name}.npz"), dtype
        meta = self.case.meta
        self.model = diffusers.UNet2DModel(**meta["model"])
        self.model.load_state_dict(load_file(STEPS / meta["init"]))
        self.model.to(dtype).train()
        settings = {key: value for key, value in meta["optimizer"].items() if key != "name"}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), **settings)
        scheduler = diffusers.DDPMScheduler(
            num_train_timesteps=1000, beta_schedule="linear", beta_start=1e-4, beta_end=0.02
        )
        self.schedule = fu.NoiseSchedule.from_diffusers(scheduler)
        self.start = self.parameters()
        self.outputs: list[list[tuple[Tensor, Tensor]]] = []  # per step: what the network was given and what it returned, call by call
        self.report: dict[str, list[Tensor]] = {}
        assert [name for name, _ in self.model.named_parameters()] == meta["param_names"]
        assert meta["gradient_accumulation_steps"] == 1

    def take(self, step: Callable[..., fu.StepOutput]) -> None:
        """Runs `step(run, s, optimizer=...)` for every step s of the golden run."""
        step(self, 0, optimizer=None)  # leaves the combined, unclipped gradient
        self.first_gradient = [parameter.grad.clone() for parameter in self.model.parameters()]
        for s in range(self.case.meta["micro_steps"]):
            calls: list[tuple[Tensor, Tensor]] = []
            hook = self.model.register_forward_hook(lambda model, inputs, output, calls=calls: calls.append((inputs[0], output.sample.detach().clone())))
            output = step(self, s, optimizer=self.optimizer)
            hook.remove()
            self.outputs.append(calls)
            for key, value in (output._asdict() | {"param_norm": _norm(self.parameters()), "delta_norm": _norm(self.update())}).items():
                self.report.setdefault(key, []).append(value)
            assert not output.skipped

    def input(self, s: int, key: str) -> Tensor:
        return self.case(f"in.step{s}.{key}", self.dtype)

    def parameters(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.model.parameters()]

    def update(self) -> list[Tensor]:
        return [now - start for now, start in zip(self.parameters(), self.start, strict=True)]

    def series(self, key: str) -> Tensor:
        return torch.stack([value.double() for value in self.report[key]])


def _norm(tensors: list[Tensor]) -> Tensor:
    return torch.stack([tensor.double().square().sum() for tensor in tensors]).sum().sqrt()


def _norms(tensors: list[Tensor]) -> Tensor:
    return torch.stack([tensor.double().norm() for tensor in tensors])


# How the two kinds of golden runs are fed to the public functions


def _draws(run: Run, s: int, forget: str | None = "deletion", retain: str | None = "remain", **more: Tensor) -> fu.Draws:
    """ReTrack's runs: noise and timesteps for each branch."""
    given = {
        f"{branch}_{what}": run.input(s, f"{stored}.{name}")
        for branch, name in (("forget", forget), ("retain", retain))
        if name is not None
        for what, stored in (("noise", "noises"), ("timesteps", "timesteps"))
    }
    return fu.Draws(**given, **more)


def _retrack_run_step(run: Run, s: int, *, optimizer) -> fu.StepOutput:
    meta, common = run.case.meta, (run.model, optimizer, run.schedule)
    images = {branch: run.input(s, f"images.{branch}") for branch in meta["dataset_types"]}
    if meta["method"] == "vanilla":
        return fu.vanilla_step(*common, images["remain"], draws=_draws(run, s, forget=None))
    if meta["method"] == "neggrad":
        return fu.neggrad_step(*common, images["deletion"], draws=_draws(run, s, retain=None))
    if meta["method"] == "retrack":
        neighbors = run.input(s, "knn_neighbors")
        return fu.retrack_step(*common, images["knn"], neighbors, images["remain"], lambd=meta["params"]["lambda"], draws=_draws(run, s, forget="knn"))
    if meta["method"] == "erasediff":
        draws = _draws(run, s, uniform_target=run.input(s, "erasediff_uniform"))
        return fu.erasediff_step(*common, images["deletion"], images["remain"], eta=meta["extra"]["eta"], draws=draws)
    lambd = meta["params"]["lambda"]
    draws = _draws(run, s, from_forget=run.input(s, "siss_uniform") <= lambd)
    return fu.siss_step(*common, images["deletion"], images["remain"], lambd=lambd, scaling_norm=float(meta["extra"]["rescale_factor"]), draws=draws)


def _siss_run_step(run: Run, s: int, *, optimizer, scaling_norm: float | None = None) -> fu.StepOutput:
    """SISS' own loop: a pair shares noise and timestep."""
    meta, common = run.case.meta, (run.model, optimizer, run.schedule)
    retain, forget, noise, t = (run.input(s, key) for key in ("images.remain", "images.deletion", "noise", "timesteps"))
    if meta["loss"] == "simple_neg_del":
        draws = fu.Draws(forget_noise=noise, forget_timesteps=t)
        return fu.neggrad_step(*common, forget, superfactor=meta["loss_params"]["superfactor"], draws=draws)
    pair = {"forget_noise": noise, "forget_timesteps": t, "retain_noise": noise, "retain_timesteps": t}
    if meta["loss"] == "erasediff":
        return fu.erasediff_step(*common, forget, retain, eta=meta["eta"], draws=fu.Draws(**pair, uniform_target=run.input(s, "erasediff_uniform")))
    scaling_norm = float(meta["scaling_norm"]) if scaling_norm is None else scaling_norm
    if meta["loss"] == "double_forward_with_neg_del":
        return fu.siss_step(*common, forget, retain, scaling_norm=scaling_norm, variant="no_is", draws=fu.Draws(**pair))
    lambd = meta["loss_params"]["lambd"]
    draws = fu.Draws(**pair, from_forget=run.input(s, "mask_uniform") <= lambd)
    return fu.siss_step(*common, forget, retain, lambd=lambd, scaling_norm=scaling_norm, draws=draws)


def _siss_run_step_with_main_norm(run: Run, s: int, *, optimizer) -> fu.StepOutput:
    """Also reports the norm of the retain gradient alone, which a forget gradient rescaled to nothing leaves."""
    if optimizer is not None and "out.f32.main_norm" in run.case:
        if run.case.meta["loss"] == "erasediff":
            draws = fu.Draws(retain_noise=run.input(s, "noise"), retain_timesteps=run.input(s, "timesteps"))
            alone = fu.vanilla_step(run.model, None, run.schedule, run.input(s, "images.remain"), draws=draws)
        else:
            alone = _siss_run_step(run, s, optimizer=None, scaling_norm=1e-20)
        run.report.setdefault("main_norm", []).append(alone.grad_norm)
    return _siss_run_step(run, s, optimizer=optimizer)


# What is compared


def _check_series(run: Run, precision: str, names: dict[str, str], tolerance: float) -> set[str]:
    """The per-step scalars `out.<precision>.*`; `names` maps stored names to ours. Returns the checked keys."""
    for stored, ours in names.items():
        error = relative_error(run.series(ours), run.case(f"out.{precision}.{stored}"))
        assert error <= tolerance, f"{run.case.name} {precision} {stored}: {error:.3g}"
    return {f"{precision}.{stored}" for stored in names}


def _check_tensors(run: Run, precision: str, gradient_tolerance: float, update_tolerance: float) -> set[str]:
    """Norms of the first gradient and of the whole update, one per parameter."""
    # The gradient of a key bias is zero in exact arithmetic (softmax does not see a shift): what is stored is rounding.
    known = torch.tensor(["to_k.bias" not in name for name in run.case.meta["param_names"]])
    for stored, tensors, tolerance in (("grad0", run.first_gradient, gradient_tolerance), ("delta", run.update(), update_tolerance)):
        truth = run.case(f"tensor.{stored}_l2_{precision}")[known]
        error = ((_norms(tensors)[known] - truth).abs() / truth).max().item()
        assert error <= tolerance, f"{run.case.name} {precision} {stored}: {error:.3g}"
    return {f"tensor.{stored}_l2_{precision}" for stored in ("grad0", "delta")}


def _check_weights(run: Run) -> None:
    """First gradient and update against the stored ones, where the run keeps them (they are large)."""
    names, start = run.case.meta["param_names"], run.start
    final, gradient = (STEPS / f"{run.case.name}.{what}.safetensors" for what in ("final", "grad0"))
    if final.is_file():
        stored = load_file(final)
        assert relative_l2(run.update(), [stored[name] - first for name, first in zip(names, start, strict=True)]) <= UPDATE
    if gradient.is_file():
        stored = load_file(gradient)
        assert relative_l2(run.first_gradient, [stored[name] for name in names]) <= FIRST_GRADIENT


def _check_outputs(run: Run) -> set[str]:
    """What the network returned, row by row: this sees the update as a function, where norms see its size."""
    checked = set()
    for s, calls in enumerate(run.outputs):
        for branch in run.case.meta["dataset_types"]:
            key = f"step{s}.model_outputs.{branch}"
            stored = run.case(f"out.{key}")
            rows, ours = _rows_of(run, s, branch, calls)
            assert relative_error(ours, stored[rows]) <= SCALARS, f"{run.case.name} {key}"
            checked.add(key)
    return checked


def _rows_of(run: Run, s: int, branch: str, calls: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Which stored rows of a branch the package has computed too, and its values for them."""
    method, batch = run.case.meta["method"], len(run.input(s, f"images.{branch}"))
    everything = torch.ones(batch, dtype=torch.bool)
    if method == "siss":  # the reference makes two forwards and uses one of them in each row; we make that one, in groups of rows that need the same passes
        from_forget = run.input(s, "siss_uniform") <= run.case.meta["params"]["lambda"]
        rows = from_forget if branch == "deletion" else ~from_forget
        noisy = reference.noising(*(run.input(s, f"{kind}.{branch}") for kind in ("images", "noises", "timesteps")), run.schedule)[rows]
        given, returned = (torch.cat(side) for side in zip(*calls, strict=True))
        at = torch.cdist(noisy.flatten(1), given.flatten(1)).argmin(dim=1)
        assert relative_error(given[at], noisy) <= SCALARS
        return rows, returned[at]
    calls = torch.cat([returned for _, returned in calls])  # forget rows, then retain rows
    forget_first = (method == "retrack" and branch == "knn") or (method == "erasediff" and branch == "deletion")
    return everything, calls[:batch] if forget_first else calls[-batch:]


def _scalars(run: Run) -> dict[str, str]:
    """Stored name -> our name, for a run of ReTrack's train step."""
    names = {"param_norm": "param_norm", "delta_norm": "delta_norm", "grad_norm_preclip": "grad_norm"}
    if run.case.meta["method"] in ("siss", "erasediff"):
        return names | {"loss_main": "retain_loss", "loss_correction": "forget_loss", "correction_norm": "correction_norm", "scaling_factor": "scaling_factor"}
    return names | {"loss": "loss"}


def _check_inner_product(run: Run, precision: str, tolerance: float) -> set[str]:
    """EraseDiff: `f = -max(eta - <g_x, g_a> / ||g_a||^2, 0)`, so a factor below 0 tells the inner product."""
    if run.case.meta["method"] != "erasediff":
        return set()
    factor, norm, eta = run.series("scaling_factor"), run.series("correction_norm"), run.case.meta["extra"]["eta"]
    stored = run.case(f"out.{precision}.inner_product")
    implied = torch.where(factor < 0, (eta + factor) * norm.square(), stored.clamp_min(eta * norm.square()))
    assert relative_error(implied, stored) <= tolerance
    return {f"{precision}.inner_product"}


@pytest.fixture
def everything_in_float64(monkeypatch):
    """As the float64 vectors were made: diffusers casts its timestep embedding by `Tensor.float()`, which must not round here."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", golden.case_names(STEPS, "step_"))
def test_float32_run_matches_retracks_train_step(name):
    run = Run(name, torch.float32)
    run.take(_retrack_run_step)
    truth = "f64" if name == DEGENERATE else "f32"
    checked = _check_series(run, truth, _scalars(run), SCALARS) | _check_inner_product(run, truth, SCALARS)
    tensors = _check_tensors(run, truth, FIRST_GRADIENT, UPDATE)
    _check_weights(run)
    if name != DEGENERATE:
        outputs = {key for key in run.case.keys("out.") if not key.startswith("f64.")}
        golden.assert_all_checked(outputs, checked | _check_outputs(run))
        stored = {f"tensor.{key}" for key in run.case.keys("tensor.") if not key.endswith("l2_f64")}
        golden.assert_all_checked(stored, tensors, {f"tensor.{key}" for key in SPREAD})


@pytest.mark.usefixtures("everything_in_float64")
@pytest.mark.parametrize("name", golden.case_names(STEPS, "step_"))
def test_float64_run_matches_the_float64_reference(name):
    run = Run(name, torch.float64)
    run.take(_retrack_run_step)
    checked = _check_series(run, "f64", _scalars(run), FLOAT64) | _check_inner_product(run, "f64", FLOAT64)
    golden.assert_all_checked({key for key in run.case.keys("out.") if key.startswith("f64.")}, checked)
    _check_tensors(run, "f64", FLOAT64, FLOAT64)


@pytest.mark.parametrize("name", golden.case_names(STEPS, "sissloop_"))
def test_float32_run_matches_siss_training_loop(name):
    run = Run(name, torch.float32)
    run.take(_siss_run_step_with_main_norm)
    assert len(run.outputs) == run.case.meta["optimizer_steps"]
    two_terms = {"loss_x": "retain_loss", "loss_a": "forget_loss"} | {key: key for key in ("main_norm", "correction_norm", "scaling_factor")}
    names = {"grad_norm_preclip": "grad_norm"} | ({"loss": "loss"} if "out.f32.loss" in run.case else two_terms)
    checked = _check_series(run, "f32", names, SCALARS)
    final = run.case("out.f32.delta_norm_final").item()
    assert run.series("delta_norm")[-1].item() == pytest.approx(final, rel=SCALARS)
    golden.assert_all_checked(run.case.keys("out."), checked | {"f32.delta_norm_final"})
    tensors = _check_tensors(run, "f32", FIRST_GRADIENT, UPDATE)
    golden.assert_all_checked({f"tensor.{key}" for key in run.case.keys("tensor.")}, tensors)
    _check_weights(run)


@pytest.mark.parametrize("name", golden.case_names(STEPS, "sissloop_"))
def test_network_is_called_as_often_as_in_siss_training_loop(name):
    run, counted = Run(name, torch.float32), []
    run.model.register_forward_hook(lambda *_: counted.append(1))
    _siss_run_step(run, 0, optimizer=None)
    assert len(counted) * run.case.meta["micro_steps"] == run.case.meta["forwards"]
