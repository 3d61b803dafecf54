"""A step on several processes is the step of one process on the same global batch, and all processes stay
bit-equal.
"""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from every_selection import EVERYTHING, WEIGHTS, fitting
from small_methods import Pairs, Rows, Whole
from step_cases import (
    BATCH,
    SCHEDULE,
    STEPS,
    begin_apart,
    begin_with_other_seeds,
    begin_with_other_selections,
    drawn_rows,
    estimates_in_one_process,
    objective_of_other_rows,
    own_loop,
    references_that_are_the_model,
    scaled_loop,
    short_estimates,
    step_with_a_nan,
    step_with_other_rows,
    step_with_references_apart,
    step_with_references_without_parameters,
    take_steps,
    take_steps_on,
    take_steps_with_mask_and_anchor,
    take_steps_with_rules,
)
from team import Team

from fastunlearn import DPO, KTO, NPO, SISS, EraseDiff, LowPass, ReTrack, TimeWindow, Vanilla
from fastunlearn.methods.erasediff_bome import EraseDiffBome
from fastunlearn.objective.time import Stratified, Uniform
from fastunlearn.testing.factories import TinyDenoiser

TWO_GRADIENTS = [
    SISS(),
    ReTrack(k=2, lambd="auto"),
    SISS(variant="bernoulli"),
    SISS(0.5, 0.3, scaling="ratio"),
    EraseDiff(),
]


def assert_same(found: list, expected: tuple) -> None:
    """`found`: (weights, reports) of each process; `expected`: those of the single one."""
    weights, reports = expected
    for rank, (own_weights, own_reports) in enumerate(found):
        assert torch.equal(own_weights, found[0][0]), (
            f"the weights of process {rank} are not those of process 0"
        )
        assert own_reports == found[0][1]
    distance = torch.linalg.vector_norm(found[0][0] - weights) / torch.linalg.vector_norm(weights)
    assert distance <= 1e-5, f"relative distance of the weights {distance:.2e}"
    for step, (own, single) in enumerate(zip(found[0][1], reports, strict=True)):
        assert own.keys() == single.keys()
        for name, value in single.items():
            assert own[name] == pytest.approx(value, rel=1e-4, abs=1e-9), f"{name} of step {step}"
    assert not any(report["skipped"] for report in reports)
    assert any(report["grad_norm"] > 0 for report in reports)


@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 2}, {"scaled": True}, {"sgd": True}], ids=str)
@pytest.mark.parametrize("rule", ["cosine", "norm"])
def test_inner_steps_and_their_rules(pair: Team, rule: str, options: dict):
    """What they reach is that of all processes, and so is lambda; eta is above every c."""
    method = EraseDiffBome({"cosine": 1.5, "norm": 400.0}[rule], rule, inner_steps=2)
    weights, reports = take_steps(method, True, options)
    assert all(report["scaling_factor"] < 0 for report in reports)
    assert_same(pair.run(take_steps, method, False, options), (weights, reports))


@pytest.mark.parametrize(
    "options",
    [
        {"wrapped": True},
        {"frozen": True},
        {"micro_batch_size": 2},
        {"scaled": True},
        {"fused": False},
        {"sgd": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("method", [ReTrack(k=2, lambd=0.3), *TWO_GRADIENTS], ids=str)
def test_what_a_step_can_meet(pair: Team, method, options: dict):
    assert_same(pair.run(take_steps, method, False, options), take_steps(method, True, options))


@pytest.mark.parametrize("rows", [None, 1, 4])
@pytest.mark.parametrize(
    "method", [Pairs(), Whole(), Rows(), DPO(2.0), KTO(2.0), KTO(2.0, z0="class"), NPO(2.0)], ids=str
)
def test_objectives_that_tie_rows_together(pair: Team, method, rows: int | None):
    """Pairs are in one process, a batch in both; 1 and 4 rows make two phases of some, 4 pairs of others."""
    options = {"micro_batch_size": rows}
    if "reference" in method.needs:
        options["reference_model"] = TinyDenoiser(seed=1)
    assert_same(pair.run(take_steps, method, False, options), take_steps(method, True, options))


@pytest.mark.parametrize("method", [Vanilla(), *TWO_GRADIENTS], ids=str)
def test_rules_see_the_gradients_of_all_processes(pair: Team, method):
    """Restricted before its norm is taken, added to once; a layer has no gradient anywhere."""
    assert_same(pair.run(take_steps_with_rules, method, False), take_steps_with_rules(method, True))


def test_masks_that_differ_are_refused(pair: Team):
    for refusal in pair.run(take_steps_with_mask_and_anchor, Vanilla(), False, 1):
        assert "got different rules" in refusal


def test_one_process_may_estimate(pair: Team):
    """What it finds is what a network without DistributedDataParallel gives, to the bit."""
    found, nothing = pair.run(estimates_in_one_process, patience=120)
    assert nothing is None
    for own, alone in zip(found, short_estimates(TinyDenoiser()), strict=True):
        assert own.keys() == alone.keys()
        assert all(torch.equal(own[name], alone[name]) for name in alone)


@pytest.mark.parametrize("method", [Whole(), Pairs()], ids=str)
def test_objectives_of_unequal_batches_are_refused(pair: Team, method):
    """gloo would end a process that is handed the losses of more rows than its own."""
    for refusal in pair.run(objective_of_other_rows, method):
        assert refusal.startswith("process_group: expected as many rows in every process, got")


def test_a_reference_that_is_the_model_in_a_wrapper_is_refused(pair: Team):
    """Every difference of losses would be 0, without a word."""
    for refusals in pair.run(references_that_are_the_model):
        assert len(refusals) == 4
        for refusal in refusals:
            assert refusal.startswith("reference_model: expected another network than model")


def test_references_that_differ_are_refused(pair: Team):
    for refusal in pair.run(step_with_references_apart):
        assert "got different weights of reference_model" in refusal


def test_references_without_parameters_are_compared_by_their_buffers(pair: Team):
    assert pair.run(step_with_references_without_parameters, 0.0) == ["nothing", "nothing"]
    for refusal in pair.run(step_with_references_without_parameters, 1.0):
        assert "got different weights of reference_model" in refusal


def test_three_processes():
    with Team(3) as trio:
        for method, options in ((SISS(), {"wrapped": True}), (EraseDiff(), {"micro_batch_size": 3})):
            assert_same(trio.run(take_steps, method, False, options), take_steps(method, True, options))


@pytest.mark.parametrize("prepared", ["group", "ddp", "accelerate"])
@pytest.mark.parametrize("name", ["retrack", "siss", "erasediff"])
def test_a_loop_of_the_callers_own(pair: Team, name: str, prepared: str):
    assert_same(pair.run(own_loop, name, False, prepared), own_loop(name, True, prepared))


@pytest.mark.parametrize(("name", "prepared"), [("siss", "group"), ("erasediff", "accelerate")])
def test_a_gradient_that_stands_in_all_processes(pair: Team, name: str, prepared: str):
    """It is the mean of the processes already: each adds its own, after the gradients of the step were
    reduced.
    """
    expected = own_loop(name, True, prepared, keep_grad=True)
    assert_same(pair.run(own_loop, name, False, prepared, None, True), expected)
    assert (expected[0] - own_loop(name, True, prepared)[0]).norm() > 1e-3


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_processes_whose_rows_need_different_passes(pair: Team, micro_batch_size: int):
    """SISS on a CPU splits rows by what they need: here one process has forget rows only and the other rows
    of all kinds.
    """
    assert_same(
        pair.run(own_loop, "siss", False, "group", micro_batch_size),
        own_loop("siss", True, "group", micro_batch_size),
    )


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_a_process_without_a_forget_weight(pair: Team, micro_batch_size: int | None):
    """Where the forget weights of one process underflow, the other's tiny ones make the gradient: it is
    rescaled to norm 5 all the same.
    """
    expected = own_loop("faint siss", True, "group", micro_batch_size)
    assert all(0 < report["correction_norm"] < 1e-16 for report in expected[1])
    assert_same(pair.run(own_loop, "faint siss", False, "group", micro_batch_size), expected)


SCALED = {
    "ratio": {"scaling": "ratio", "scaling_norm": 0.5},
    "clip": {"scaling": "clip", "scaling_norm": 1.0},
    "a clip that cuts off all but nothing": {"scaling": "clip", "scaling_norm": 1e-20},
    "superfactor": {"superfactor": 0.3, "sizes": {"forget": 4, "retain": 20}},
}


@pytest.mark.parametrize("micro_batch_size", [None, 2])
@pytest.mark.parametrize("name", ["siss", "faint siss"])
@pytest.mark.parametrize("hyperparameters", SCALED.values(), ids=SCALED)
def test_weights_of_other_sizes_in_each_process(pair: Team, hyperparameters, name, micro_batch_size):
    """Each computes its correction in a unit of its own: 2 and about 1, or 1 (of nothing) and about 1e-20.

    Norms, and what a clip leaves, are those of all rows in no unit.
    """
    arguments = micro_batch_size, hyperparameters
    expected = scaled_loop(name, True, *arguments)
    found = pair.run(scaled_loop, name, False, *arguments)
    assert_same(found, expected)
    # However small they are.
    for own, single in zip(found[0][1], expected[1], strict=True):
        for key in ("correction_norm", "scaling_factor"):
            if key in single:
                assert own[key] == pytest.approx(single[key], rel=1e-4, abs=0)
        if hyperparameters.get("scaling") == "clip":
            length = own["scaling_factor"] * own["correction_norm"]
            wanted = min(own["correction_norm"], hyperparameters["scaling_norm"])
            assert length == pytest.approx(wanted, rel=1e-5, abs=0)


@pytest.mark.parametrize("method", [ReTrack(k=2, lambd=0.3), EraseDiff()], ids=str)
def test_each_process_draws_its_own_rows_of_the_batch(pair: Team, method):
    """The papers' code gives every process the same rows.

    Here each has its share of what a single process draws.
    """
    shares, whole = pair.run(drawn_rows, method, False), drawn_rows(method, True)
    for name, expected in whole.items():
        assert len(expected) == BATCH
        torch.testing.assert_close(torch.cat([share[name] for share in shares]), expected, rtol=0, atol=0)
        assert not torch.equal(shares[0][name], shares[1][name]), name


@pytest.mark.parametrize("fused", [True, False])
def test_a_nan_on_one_process_skips_the_step_on_all(pair: Team, fused: bool):
    results = pair.run(step_with_a_nan, 1, fused)
    for before, after, skipped, counted in results:
        assert torch.equal(before, after)
        assert skipped == [True, False]
        assert counted == 1
    finite = pair.run(step_with_a_nan, None, fused)
    assert not torch.equal(finite[0][0], finite[0][1])  # the same step without the NaN changes the weights


def test_the_batch_must_divide(pair: Team):
    for succeeded, text in pair.answers(take_steps, Vanilla(), False, {"batch_size": 13}):
        assert not succeeded
        assert "batch_size: expected a multiple of the 2 processes, got 13" in text


MOVING = {"lowpass": LowPass(schedule="step_decay", start=0.9, stop=0.2), "total_steps": STEPS}


@pytest.mark.parametrize(
    "options", [{"micro_batch_size": 2, "scaled": True}, {"wrapped": True, "fused": False}], ids=str
)
@pytest.mark.parametrize("method", [*TWO_GRADIENTS[:-1], EraseDiff(eta=3.0), KTO(2.0)], ids=str)
def test_a_selection_in_micro_batches_and_wrappers(pair: Team, method, options: dict):
    """Strata of the global batch, a band that moves at every step, weights of which some are 0."""
    options = options | fitting(method, EVERYTHING | MOVING)
    assert_same(pair.run(take_steps, method, False, options), take_steps(method, True, options))


@pytest.mark.parametrize("method", [Pairs(), Whole(), Rows()], ids=str)
def test_a_selection_under_objectives_that_tie_rows_together(pair: Team, method):
    options = MOVING | {"time_window": Stratified(TimeWindow(250, 750)), "micro_batch_size": 4}
    if "reference" in method.needs:
        options["reference_model"] = TinyDenoiser(seed=1)
    assert_same(pair.run(take_steps, method, False, options), take_steps(method, True, options))


@pytest.mark.parametrize(("name", "prepared"), [("siss", "group"), ("erasediff", "ddp"), ("retrack", "ddp")])
def test_a_selection_in_a_loop_of_the_callers_own(pair: Team, name: str, prepared: str):
    """Every process tells the step's number; timesteps are given, and weights are those at them."""
    window = {"time_window": TimeWindow(100, 750, as_weight=True)}
    arguments = prepared, 4, False, MOVING | window | {"loss_weight": "min_snr"}
    found, alone = pair.run(own_loop, name, False, *arguments), own_loop(name, True, *arguments)
    assert_same(found, alone)
    plain, _ = own_loop(name, True, prepared)
    assert (plain - alone[0]).norm() > 1e-3


@pytest.mark.parametrize("method", [*TWO_GRADIENTS, SISS(variant="no_is")], ids=str)
def test_a_process_whose_rows_are_all_outside_of_the_window(pair: Team, method):
    """Its share of the forget gradient is 0. Of two rows, with one index in ten, that is mostly so."""
    options = {"time_window": TimeWindow(700, 800, as_weight=True), "batch_size": 4}
    found, alone = pair.run(take_steps, method, False, options), take_steps(method, True, options)
    assert_same(found, alone)
    assert 0 < sum(report["forget_loss"] > 0 for report in alone[1]) < STEPS


def test_processes_share_the_strata_of_the_global_batch(pair: Team):
    """Each of the parts of the window has one row, in whatever process."""
    given = {
        "time_window": Stratified(TimeWindow(0, 60 * BATCH)),
        "retain_density": WEIGHTS["retain_density"],
    }
    shares, whole = pair.run(drawn_rows, EraseDiff(), False, given), drawn_rows(EraseDiff(), True, given)
    for name in ("forget_timesteps", "retain_timesteps"):
        assert torch.equal(torch.cat([share[name] for share in shares]), whole[name])
    assert sorted((whole["forget_timesteps"] // 60).tolist()) == list(range(BATCH))
    assert len(SCHEDULE) >= 60 * BATCH


LATE, NARROW = TimeWindow(750, 1000), LowPass(0.5)
# Of one table: what is drawn, what it weighs and whether it is in strata tell them apart.
SAME_TABLE = [LATE, TimeWindow(750, 1000, as_weight=True), Stratified(LATE)]
GROWING = LowPass(schedule="linear_increase", start=0.2, stop=0.5)
APART = [
    (begin_apart, ("weights",), "got different the weights of model"),
    (begin_apart, ("step",), "got different step"),
    (begin_with_other_seeds, (), "got different seed"),
    (begin_with_other_selections, ({"time_window": LATE}, {}), "got different densities of timesteps"),
    *(
        (begin_with_other_selections, [{"time_window": each} for each in both], "densities of timesteps")
        for both in combinations(SAME_TABLE, 2)
    ),
    (begin_with_other_selections, ({"retain_density": Stratified(Uniform())}, {}), "densities of timesteps"),
    (begin_with_other_selections, ({"lowpass": NARROW}, {}), "got different lowpass or loss_weight"),
    (
        begin_with_other_selections,
        [{"lowpass": GROWING, "total_steps": 9 + n} for n in (0, 1)],
        "total_steps",
    ),
]


@pytest.mark.parametrize(("begin", "arguments", "named"), APART)
def test_processes_that_begin_apart_are_refused(pair: Team, begin, arguments: tuple, named: str):
    for succeeded, text in pair.answers(begin, *arguments):
        assert not succeeded
        assert "process_group: expected the same in all processes" in text
        assert named in text


@pytest.mark.parametrize("roles", [("forget",), ("retain",), ("forget", "retain")])
def test_processes_with_other_numbers_of_rows_are_refused(pair: Team, roles: tuple[str, ...]):
    """The mean of their means would not be the mean over all rows."""
    for rank, (succeeded, text) in enumerate(pair.answers(step_with_other_rows, roles)):
        assert not succeeded
        here = ", ".join(f"{3 + (rank if role in roles else 0)} for {role}" for role in ("forget", "retain"))
        assert f"process_group: expected as many rows in every process, got {here} here" in text


ON_ONE_GPU = [(Vanilla(), {}), (ReTrack(k=2, lambd=0.3), {}), (EraseDiff(), {}), (SISS(), {"wrapped": True})]


@pytest.mark.gpu
def test_two_processes_on_one_gpu(gpu):
    """The tensors that gloo adds up lie on the GPU.

    One test: making a team of processes there takes longer than all of their steps.
    """
    device = str(gpu.device)
    cases = ON_ONE_GPU if gpu.device.type == "cuda" else ON_ONE_GPU[:1]
    with Team(2, fresh=True) as pair:
        for method, options in cases:
            found = pair.run(take_steps_on, device, method, False, options)
            assert_same(found, take_steps_on(device, method, True, options))
