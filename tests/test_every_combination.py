"""One table: every objective, under every kind of selection, in everything that a step can be taken by.

A method that is registered stands in it by itself. A step is that of plain torch in float64, as closely as
plain torch in the step's own precision is; where the same bits are promised, they are compared. What has no
meaning is refused by name.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import crash
import pytest
import torch
from every_combination import (
    LENGTH,
    LOOKED_AT,
    RUN,
    SAVED_AT,
    Taken,
    begin_runs,
    go_to,
    selection_of,
    take,
    take_together,
)
from every_objective import METHODS, OBJECTIVES, Objective, make
from every_selection import BANDS, TIMES, fitting, meaningless
from literal_step import Literal
from lora import WithLora
from team import Team

from fastunlearn import Draws, Unlearner, without_adapters
from fastunlearn.engine import replay
from fastunlearn.engine.replay import Replay
from fastunlearn.methods import SISS, EraseDiffBome, Pass
from fastunlearn.runs.run_record import read_metrics
from fastunlearn.runs.training import unlearn
from fastunlearn.testing.budgets import relative_l2
from fastunlearn.testing.factories import TinyDenoiser
from fastunlearn.testing.host_sync import TapeGraphs

LOSS_SCALE = 2.0**8


def cells_of(objective: str) -> list[tuple[str, str]]:
    """Times and bands, without those that come to the same where the method refuses one."""
    found = {}
    for time in TIMES:
        for band in BANDS:
            found.setdefault(str(selection_of(objective, time, band)), (time, band))
    return list(found.values())


CELLS = [(objective, *cell) for objective in OBJECTIVES for cell in cells_of(objective)]
cells = pytest.mark.parametrize(("objective", "time", "band"), CELLS)


# --- the table ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 4])
@cells
def test_micro_batches(objective, time, band, rows):
    """One row holds no pair, four hold two."""
    assert_accurate(take(objective, time, band, micro_batch_size=rows), objective, time, band)


@cells
def test_two_processes(pair: Team, objective, time, band):
    first, second = pair.run(take_together, objective, time, band)
    assert all(map(torch.equal, first.gradient, second.gradient))
    assert first.report == second.report
    assert_accurate(first, objective, time, band)


@cells
def test_float16_with_a_scaler(objective, time, band):
    scaler = torch.amp.GradScaler("cpu", init_scale=LOSS_SCALE)
    taken = take(objective, time, band, grad_scaler=scaler, autocast_dtype=torch.float16)
    assert_accurate(taken, objective, time, band, half=True)


@cells
def test_adapters_beside_frozen_weights(objective, time, band):
    """The reference is the network without its adapters. The frozen weights are not touched."""
    model = WithLora().moved()
    frozen = {name: own.clone() for name, own in model.named_parameters() if not own.requires_grad}
    taken = take(objective, time, band, model=model, reference=without_adapters(model))
    assert_accurate(taken, objective, time, band, lora=True)
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in frozen.items())


@cells
def test_replayed_steps(monkeypatch, objective, time, band):
    """Reports, weights and moments have the bits of eager steps: before the capture, and from it on."""
    monkeypatch.setattr(replay, "WARM_UP_STEPS", 1)
    # On a CPU a step reads weights, to leave out rows that count nothing; no other device does.
    monkeypatch.setattr(Pass, "by_role", lambda self: [self])
    given = selection_of(objective, time, band)
    eager, other = (make(OBJECTIVES[objective], given) for _ in range(2))
    parts = TapeGraphs(), other.optimizer, list(other.model.parameters())
    other._replay = Replay(*parts, required=True)
    if other.method.inner_steps:
        with pytest.raises(ValueError, match=r"^replay: expected a step .* got inner steps, which are taken"):
            other.step()
        return
    for _ in range(3):
        expected, found = eager.step(), other.step()
        for name, one, two in zip(expected._fields, expected, found, strict=True):
            assert (one is None and two is None) or torch.equal(one, two), name
    assert (other._replay.graphs.captures, other._replay.graphs.replays) == (1, 2)
    assert same(state_of(other), state_of(eager))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_resumed_after_a_kill(objective: str, tmp_path: Path):
    """All cells of an objective: their runs are killed in one process, each in the middle of its steps."""
    cells = cells_of(objective)
    crash.run_until_killed(begin_runs, objective, cells, tmp_path)
    different = []
    for cell in cells:
        given, folder = selection_of(objective, *cell), tmp_path / ", ".join(cell)
        assert [path.name for path in (folder / "private").glob("checkpoint-*")] == [f"checkpoint-{SAVED_AT}"]
        whole, resumed = (make(OBJECTIVES[objective], given) for _ in range(2))
        losses = [float(whole.step().loss) for _ in range(LENGTH)]
        unlearn(resumed, output_dir=folder, resume_from_checkpoint="latest", **RUN)
        told = [record["loss"] for record in read_metrics(folder)]
        if told != losses or not same(state_of(resumed), state_of(whole)):
            different.append(cell)
    assert not different


# --- what a cell is compared with ---------------------------------------------------------------------------


def assert_accurate(
    taken: Taken, objective: str, time: str, band: str, *, lora: bool = False, half: bool = False
) -> None:
    """The gradient, and what is reported, on the scale of the largest of the losses."""
    assert not taken.report["skipped"]
    reported, gradient = truth(objective, time, band, lora)
    error, limit = relative_l2(taken.gradient, gradient), allowed(objective, time, band, lora, half)
    assert error <= limit, f"{error:.3g} from float64, plain torch allows {limit:.3g}"
    norm = reported["grad_norm"]
    assert abs(taken.report["grad_norm"] - norm) <= limit * norm
    losses = {name: value for name, value in reported.items() if name != "grad_norm"}
    scale = max(map(abs, losses.values()))
    # The loss is counted from what inner steps reach.
    counted_from = taken.report.get("inner_loss", 0.0) * taken.report.get("scaling_factor", 0.0)
    for name, value in losses.items():
        found = taken.report[name] - (counted_from if name == "loss" else 0.0)
        assert abs(found - value) <= limit * scale, f"{name}: expected {value}, got {found}"


@cache
def truth(objective: str, time: str, band: str, lora: bool) -> tuple[dict[str, float], list[torch.Tensor]]:
    return literal(objective, time, band, lora, torch.float64)


@cache
def allowed(objective: str, time: str, band: str, lora: bool, half: bool) -> float:
    """Twice what plain torch errs in the precision, and a rounding."""
    precision = {"autocast_dtype": torch.float16, "loss_scale": LOSS_SCALE} if half else {}
    _, plain = literal(objective, time, band, lora, torch.float32, **precision)
    rounding = torch.finfo(torch.float16 if half else torch.float32).eps
    return 2 * relative_l2(plain, truth(objective, time, band, lora)[1]) + rounding


def literal(
    objective: str, time: str, band: str, lora: bool, dtype: torch.dtype, **precision
) -> tuple[dict[str, float], list[torch.Tensor]]:
    """What the undivided step reports, and its gradient, by plain torch."""
    model = WithLora().moved() if lora else TinyDenoiser()
    # A network with adapters is compared with what they were added to.
    reference = TinyDenoiser(seed=0 if lora else 1).to(dtype)
    rules = {type(rule).__name__.lower(): rule for rule in OBJECTIVES[objective].rules(model)}
    arguments = OBJECTIVES[objective].method, selection_of(objective, time, band), model.to(dtype)
    step = Literal(*arguments, *drawn(objective, time, band), reference=reference, **rules, **precision)
    reported, gradient = step.expected(LOOKED_AT)
    return {name: float(value) for name, value in reported.items()}, gradient


@cache
def drawn(objective: str, time: str, band: str) -> tuple:
    """The rows of the whole batch, and all other numbers of the step, as an Unlearner draws them."""
    run = make(OBJECTIVES[objective], selection_of(objective, time, band))
    go_to(run, LOOKED_AT)
    return run._draw(Draws())


def state_of(run: Unlearner) -> list[torch.Tensor]:
    """Weights and moments."""
    moments = [value for own in run.optimizer.state.values() for _, value in sorted(own.items())]
    return [*(parameter.detach() for parameter in run.model.parameters()), *moments]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


# --- what has no meaning ------------------------------------------------------------------------------------


@pytest.mark.parametrize("band", BANDS)
@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_selection_without_meaning_is_refused_by_name(method, time, band):
    """Each part of it alone; what is left is taken."""
    given = TIMES[time] | BANDS[band]
    beside = {"lowpass": ("total_steps",), "loss_weight": ("snr_gamma",)}
    for argument, message in meaningless(method, given).items():
        alone = {name: given[name] for name in (argument, *beside.get(argument, ()))}
        with pytest.raises(ValueError, match=message):
            make(Objective(method), alone)
    make(Objective(method), fitting(method, given))


def test_inner_steps_under_a_rule_are_refused():
    with pytest.raises(ValueError, match=r"^inner_steps: expected 0 here, got 1 with rules \(Mask, Anchor\)"):
        make(Objective(EraseDiffBome(inner_steps=1), mask=True, anchor=True), {})


def test_a_target_of_another_condition_is_refused_where_there_are_none():
    with pytest.raises(
        ValueError, match=r"^target: expected 'uniform' in an Unlearner, whose images have no"
    ):
        make(Objective(EraseDiffBome(target="other_condition")), {})


# --- that a cell can fail -----------------------------------------------------------------------------------


def test_a_step_on_other_rows_is_found():
    cell = str(Objective(SISS(lambd=0.3))), "weighted strata", "band"
    assert_accurate(take(*cell), *cell)
    with pytest.raises(AssertionError, match="from float64, plain torch allows"):
        assert_accurate(take(*cell, seed=1), *cell)
