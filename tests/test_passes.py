"""How a step arranges its network calls: which rows need which backward pass, and where the two gradients
lie.
"""

from dataclasses import replace

import pytest
import torch

from fastunlearn import SISS, Draws, siss_step
from fastunlearn.objective.protocol import Batch, Pass, Term
from fastunlearn.step import accumulate
from fastunlearn.step.arrange import finish
from fastunlearn.testing.budgets import relative_l2
from fastunlearn.testing.factories import TinyDenoiser, linear_schedule

SHAPE = (6, 1, 8, 8)


def a_pass(forget_weight, retain_weight, **kwargs):
    rows = torch.arange(len(forget_weight)).float().view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    terms = (
        Term("forget", rows + 0.25, torch.tensor(forget_weight)),
        Term("retain", rows + 0.5, torch.tensor(retain_weight)),
    )
    return Pass(rows, torch.arange(len(rows)), terms, kwargs)


def test_rows_are_grouped_by_the_gradients_that_need_them():
    whole = a_pass([0.0, 1.0, 2.0, 0.0, 3.0, 0.0], [1.0, 1.0, 0.0, 2.0, 0.0, 0.0], labels=torch.arange(6))
    forget, both, retain = whole.by_role()
    for part, rows, roles in (
        (forget, [2, 4], {"forget"}),
        (both, [1], {"forget", "retain"}),
        (retain, [0, 3], {"retain"}),
    ):
        assert {term.role for term in part.terms} == roles
        assert (
            part.timesteps.tolist() == part.kwargs["labels"].tolist() == part.x_t[:, 0, 0, 0].tolist() == rows
        )
        for term in part.terms:
            offset = 0.25 if term.role == "forget" else 0.5
            assert (term.target[:, 0, 0, 0] - offset).tolist() == rows
            assert (term.weight != 0).all()


def test_rows_that_all_need_both_stay_together():
    whole = a_pass([1.0, 2.0], [3.0, 4.0])
    (part,) = whole.by_role()
    assert part.x_t is whole.x_t
    assert part.terms == whole.terms


def test_other_passes_come_back_as_they_are():
    whole = a_pass([0.0, 1.0], [1.0, 0.0])
    twice = Pass(
        torch.cat([whole.x_t, whole.x_t]),
        torch.arange(4),
        (whole.terms[1], Term("retain", whole.x_t, torch.ones(2), rows=range(2, 4))),
    )
    nothing = a_pass([0.0, 0.0], [0.0, 0.0])
    assert twice.by_role() == [twice]
    assert nothing.by_role() == [nothing]


def test_terms_of_one_gradient_on_the_same_rows_stay_together():
    """A row takes one pass back whichever of them needs it; one that none needs takes none."""
    whole = a_pass([0.0, 1.0, 2.0, 0.0], [1.0, 1.0, 0.0, 0.0])
    (part,) = replace(whole, terms=tuple(replace(term, gradient="total") for term in whole.terms)).by_role()
    assert part.timesteps.tolist() == [0, 1, 2]
    assert [term.role for term in part.terms] == ["forget", "retain"]
    assert [term.weight.tolist() for term in part.terms] == [[0.0, 1.0, 2.0], [1.0, 1.0, 0.0]]


@pytest.mark.parametrize("variant", ["mixture", "bernoulli"])
def test_a_superfactor_takes_one_call_of_the_network(variant):
    forget, retain, draws = far_apart()
    model, calls = TinyDenoiser().double(), []
    model.register_forward_hook(lambda module, arguments, output: calls.append(len(arguments[0])))
    options = {"draws": draws, "sizes": {"forget": 2, "retain": 20}}
    siss_step(model, None, linear_schedule(), forget, retain, variant=variant, superfactor=1.0, **options)
    assert calls == [6]


def test_terms_of_other_rows_are_told_apart():
    """ReTrack's two branches: on a CPU a call for each holds half the activations."""
    rows = torch.arange(5.0).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    forget = Term("forget", rows[:2] + 0.25, torch.ones(2), spread=torch.tensor([7.0, 8.0]), scale=0.1)
    retain = Term("retain", rows[2:] + 0.5, torch.ones(3), rows=range(2, 5), scale=0.9)
    parts = Pass(rows, torch.arange(5), (forget, retain), {"labels": torch.arange(5)}).by_role()
    assert (
        [part.timesteps.tolist() for part in parts]
        == [part.kwargs["labels"].tolist() for part in parts]
        == [[0, 1], [2, 3, 4]]
    )
    for part, whole in zip(parts, (forget, retain), strict=True):
        (term,) = part.terms
        assert (term.rows.start, term.scale, term.role) == (0, whole.scale, whole.role)
        torch.testing.assert_close(term.target, whole.target, rtol=0, atol=0)
    assert parts[0].terms[0].spread.tolist() == [7.0, 8.0]


def far_apart(dtype=torch.float64):
    """Pairs of images so far apart that at small timesteps only one weight of a row matters, and at large
    ones both do.
    """
    generator = torch.Generator().manual_seed(0)
    forget, noise = torch.rand(SHAPE, generator=generator) * 2 - 1, torch.randn(SHAPE, generator=generator)
    timesteps = torch.tensor([50, 50, 900, 900, 50, 900])
    draws = Draws(
        forget_noise=noise.to(dtype),
        retain_noise=noise.to(dtype),
        forget_timesteps=timesteps,
        retain_timesteps=timesteps,
        from_forget=torch.tensor([True, False, True, False, False, True]),
    )
    return forget.to(dtype), (-forget).to(dtype), draws


class Calls:
    """Rows of forward and of backward passes through a network."""

    def __init__(self, model):
        self.forward, self.backward = [], []
        model.register_forward_hook(self._seen)

    def _seen(self, model, inputs, output):
        self.forward.append(len(output))
        output.register_hook(lambda gradient: self.backward.append(len(gradient)))


@pytest.mark.parametrize("variant", ["mixture", "bernoulli"])
def test_siss_spends_a_backward_pass_only_where_a_weight_matters(variant):
    forget, retain, draws = far_apart()
    model = TinyDenoiser().double()
    calls = Calls(model)
    siss_step(model, None, linear_schedule(), forget, retain, variant=variant, draws=draws)
    assert sum(calls.forward) == 6
    assert sum(calls.backward) == (9 if variant == "mixture" else 6)


@pytest.mark.parametrize("variant", ["mixture", "bernoulli"])
def test_the_grouping_changes_nothing_else(variant, monkeypatch):
    forget, retain, draws = far_apart()
    models, reports = [TinyDenoiser().double() for _ in range(2)], []
    for index, model in enumerate(models):
        if index == 1:
            monkeypatch.setattr(Pass, "by_role", lambda self: [self])
        reports.append(
            siss_step(model, None, linear_schedule(), forget, retain, variant=variant, draws=draws)
        )
    grouped, plain = ([parameter.grad for parameter in model.parameters()] for model in models)
    assert relative_l2(grouped, plain) <= 1e-11
    for name, value in reports[0]._asdict().items():
        torch.testing.assert_close(value, getattr(reports[1], name), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("variant", "micro_batch_size", "swaps"),
    [
        ("mixture", None, False),
        ("bernoulli", 2, False),
        ("no_is", None, False),
        ("no_is", 2, False),
        ("mixture", 1, True),
    ],
)
def test_siss_needs_no_second_buffer_unless_several_passes_carry_both_gradients(
    variant, micro_batch_size, swaps, monkeypatch
):
    forget, retain, draws = far_apart()
    if variant == "no_is":
        draws = Draws()
    swapped, swap = [], accumulate.Accumulator._swap
    monkeypatch.setattr(accumulate.Accumulator, "_swap", lambda self: swapped.append(1) or swap(self))
    siss_step(
        TinyDenoiser().double(),
        None,
        linear_schedule(),
        forget,
        retain,
        variant=variant,
        draws=draws,
        micro_batch_size=micro_batch_size,
    )
    assert bool(swapped) == swaps


def test_weights_that_count_for_nothing_are_zero():
    forget, retain, draws = far_apart()
    method = SISS()
    composed = method.compose(Batch(forget, retain), draws, linear_schedule())
    (whole,), _ = finish(composed, method.combine, None)
    weights = {term.role: term.weight for term in whole.terms}
    assert (weights["forget"] == 0).tolist() == [False, True, False, False, True, False]
    assert (weights["retain"] == 0).tolist() == [True, False, False, False, False, False]
    assert all(((weight == 0) | (weight >= 1e-12 * weight.max())).all() for weight in weights.values())


def test_a_forget_gradient_of_tiny_weights_alone_is_kept():
    """All rows come from the retain set at small timesteps: every forget weight is tiny, and the rescaling
    makes a gradient of norm 5 of them all the same.
    """
    forget, retain, draws = far_apart()
    early = torch.full((6,), 200)
    draws = replace(
        draws, forget_timesteps=early, retain_timesteps=early, from_forget=torch.zeros(6, dtype=torch.bool)
    )
    model = TinyDenoiser().double()
    output = siss_step(model, None, linear_schedule(), forget, retain, draws=draws)
    assert 0 < output.correction_norm < 1e-12
    torch.testing.assert_close(
        output.correction_norm * output.scaling_factor, torch.tensor(5.0, dtype=torch.float64)
    )
