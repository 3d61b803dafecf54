"""Optimizer state belongs to parameters by name: no order, wrapper or grouping gives one parameter another
one's moments."""

from __future__ import annotations

from pathlib import Path

import crash
import pytest
import runs
import torch
from test_checkpoint import OPTIMIZERS, small_model, train
from torch import nn

from fastunlearn.runs import checkpoint, optimizer_state
from fastunlearn.runs.state_checks import Entry

PLACE = Entry(Path("checkpoint-1"), "optimizer")
REVERSED = {
    "AdamW": torch.optim.AdamW,
    "fused": lambda p: torch.optim.AdamW(p, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, 1e-2, 0.9),
}


def moments(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, dict]:
    """By the name of the parameter."""
    return {name: dict(optimizer.state[parameter]) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", REVERSED)
def test_parameters_in_another_order_get_their_own_moments(tmp_path: Path, name: str):
    whole = runs.make(optimizer=REVERSED[name])
    saved = runs.stop(whole, tmp_path / "run")
    resumed = runs.make(optimizer=REVERSED[name], order=lambda parameters: parameters[::-1])
    runs.run(resumed, tmp_path / "other", 2, resume_from_checkpoint=saved)
    assert runs.same(moments(resumed.optimizer, resumed.model), moments(whole.optimizer, whole.model))
    for parameter, state in resumed.optimizer.state.items():
        assert all(value.shape in (parameter.shape, ()) for value in state.values())
    for unlearner in (whole, resumed):
        for number, parameter in enumerate(unlearner.model.parameters()):
            parameter.grad = torch.full_like(parameter, 0.1 * number)
        unlearner.optimizer.step()
    assert torch.equal(runs.weights(resumed), runs.weights(whole))  # the next update, bit for bit


def run_and_reverse(folder: str) -> None:
    runs.stop(runs.make(), Path(folder))
    resumed = runs.make(order=lambda parameters: parameters[::-1])
    runs.run(resumed, Path(folder), resume_from_checkpoint="latest")


def test_a_reversed_run_goes_on_in_a_process_that_lives(tmp_path: Path):
    """Moments that are too short for their parameters were read beyond their end: processes died of it."""
    crash.run_to_end(run_and_reverse, tmp_path)


def grouped(*sizes: int):
    """AdamW over groups of so many parameters, in their order."""

    def build(parameters: list) -> torch.optim.Optimizer:
        given = iter(parameters)
        return torch.optim.AdamW([{"params": [next(given) for _ in range(size)]} for size in sizes], lr=1e-3)

    return build


@pytest.mark.parametrize("other", [(4, 2), (6,), (2, 2, 2)], ids=str)
def test_another_grouping_is_refused_with_both(tmp_path: Path, other: tuple[int, ...]):
    runs.stop(runs.make(optimizer=grouped(2, 4)), tmp_path)
    unlearner = runs.make(optimizer=grouped(*other))
    before = runs.snapshot(unlearner)
    with pytest.raises(ValueError, match="optimizer"):
        runs.run(unlearner, tmp_path, resume_from_checkpoint="latest")
    assert runs.same(runs.snapshot(unlearner), before)


def test_groups_of_the_same_settings_are_told_apart_by_name(tmp_path: Path):
    runs.stop(runs.make(optimizer=grouped(2, 4)), tmp_path)
    with pytest.raises(
        ValueError,
        match=r"groups of 4 parameters \(time.weight, time.bias\) and 2 parameters.*got 2 parameters and 4 "
        r"parameters \(time.weight",
    ):
        runs.run(runs.make(optimizer=grouped(4, 2)), tmp_path, resume_from_checkpoint="latest")


def test_a_parameter_that_no_checkpoint_would_hold_is_refused_at_the_start(tmp_path: Path):
    stray = nn.Parameter(torch.zeros(3))
    unlearner = runs.make(optimizer=lambda parameters: torch.optim.AdamW([*parameters, stray], lr=1e-3))
    with pytest.raises(
        ValueError,
        match=r"optimizer: expected parameters of the model .*got one of shape \(3,\) that is none, at 6 "
        r"of group 0",
    ):
        runs.run(unlearner, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_parameter_without_a_gradient_has_no_state_and_needs_none(tmp_path: Path):
    def freeze(model: nn.Module) -> nn.Module:
        model.time.requires_grad_(False)
        return model

    whole = runs.make(wrap=freeze)
    runs.run(whole, tmp_path / "whole")
    runs.stop(runs.make(wrap=freeze), tmp_path / "run")
    resumed = runs.make(wrap=freeze)
    runs.run(resumed, tmp_path / "run", resume_from_checkpoint="latest")
    assert torch.equal(runs.weights(resumed), runs.weights(whole))


def test_named_parameters_may_be_given(tmp_path: Path):
    """torch keeps their names in the groups, with wrappers and all; the network's own count."""

    def named(parameters: list) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            [(f"_orig_mod.{number}", parameter) for number, parameter in enumerate(parameters)], lr=1e-3
        )

    runs.stop(runs.make(optimizer=named), tmp_path)
    runs.run(
        runs.make(optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)),
        tmp_path,
        resume_from_checkpoint="latest",
    )


# --- every optimizer --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in ("lbfgs", "sgd without state")])
def test_moments_of_another_shape_are_refused_by_every_optimizer(name: str):
    model = small_model()
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    train(model, optimizer, range(1))
    fresh = OPTIMIZERS[name](list(model.parameters()))
    state = optimizer_state.named(optimizer, model)
    optimizer_state.checked(fresh, model, state, PLACE)
    for key, value in state["state"]["0.weight"].items():
        for other in (
            value.new_zeros(7),
            value.new_zeros(0),
            value.to(torch.int16),
            value * float("nan"),
            None,
            "x",
            1,
        ):
            changed = {
                **state,
                "state": {**state["state"], "0.weight": {**state["state"]["0.weight"], key: other}},
            }
            with pytest.raises(ValueError, match=rf"0\.weight\.{key}: expected .*, got"):
                optimizer_state.checked(fresh, model, changed, PLACE)


class Momentum(torch.optim.Optimizer):
    """An optimizer of the user's, whose step needs what only its constructor makes: no fresh state can be had
    of it."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})
        self.factor = 0.5

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["mean"] = (
                    state.get("mean", torch.zeros_like(parameter)).mul(self.factor).add(parameter.grad)
                )
                parameter.sub_(group["lr"] * state["mean"])


def test_of_an_unknown_optimizer_shapes_and_values_are_checked():
    model = small_model()
    optimizer = Momentum(model.parameters())
    train_once(model, optimizer)
    fresh = Momentum(model.parameters())
    state = optimizer_state.named(optimizer, model)
    optimizer_state.load(fresh, optimizer_state.checked(fresh, model, state, PLACE))
    assert runs.same(moments(fresh, model), moments(optimizer, model))
    mean = state["state"]["0.weight"]["mean"]
    for other in (mean[:2], mean.new_zeros(0), mean.int(), mean * float("inf")):
        with pytest.raises(ValueError, match=r"0\.weight\.mean: expected .*, got"):
            optimizer_state.checked(
                fresh, model, {**state, "state": {**state["state"], "0.weight": {"mean": other}}}, PLACE
            )


def train_once(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(1, 3, 9, 9)).square().mean().backward()
    optimizer.step()


def test_a_prepared_optimizer_is_the_one_within(tmp_path: Path):
    accelerate = pytest.importorskip("accelerate")
    model = small_model()
    optimizer = accelerate.Accelerator(cpu=True).prepare(torch.optim.AdamW(model.parameters(), lr=1e-2))
    train_once(model, optimizer)
    state = checkpoint.load(checkpoint.save(tmp_path, 1, {}, {}, optimizer=optimizer, model=model))
    other = torch.optim.AdamW(reversed(list(model.parameters())), lr=1e-2)
    checkpoint.load_optimizer(other, state, model)
    assert runs.same(moments(other, model), moments(optimizer.optimizer, model))


def test_without_a_model_positions_are_the_names(tmp_path: Path):
    """Then another order is seen where shapes differ, and nothing is changed."""
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    train_once(model, optimizer)
    state = checkpoint.load(checkpoint.save(tmp_path, 1, {}, {}, optimizer=optimizer))
    other = torch.optim.AdamW(reversed(list(model.parameters())), lr=1e-2, fused=True)
    with pytest.raises(
        ValueError,
        match=r"optimizer\.safetensors: optimizer\.state\.0\.exp_avg: expected float32 of shape \(3,\), "
        r"got float32 of shape \(5, 3, 3, 3\)",
    ):
        checkpoint.load_optimizer(other, state)
    assert not other.state
    assert other.param_groups[0]["lr"] == 1e-2


def test_a_checkpoint_without_an_optimizer_says_so(tmp_path: Path):
    state = checkpoint.load(checkpoint.save(tmp_path, 1, {"model": {}}, {}))
    with pytest.raises(ValueError, match="expected the state of an optimizer, got None"):
        checkpoint.load_optimizer(torch.optim.SGD([torch.zeros(1)], lr=1.0), state)
