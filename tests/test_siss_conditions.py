"""SISS' mixture where the images of a pair have different conditions, of which the network is told one."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from fastunlearn import SISS, Draws, siss_step
from fastunlearn import functional as F
from fastunlearn.methods import Batch
from fastunlearn.testing.factories import TinyDenoiser, linear_schedule
from fastunlearn.testing.host_sync import no_host_sync

SCHEDULE = linear_schedule()
SHAPE = (6, 1, 8, 8)
INFINITY = math.inf
FROM_FORGET = torch.tensor([True, False, False, True, True, False])
LABELS = torch.arange(6)


# --- a data set of two points and two labels, by quadrature -------------------------------------------------

KEPT, FORGOTTEN, T, LAMBD = 0.6, -0.3, 250, 0.3
ALPHA, SIGMA = float(SCHEDULE.alpha[T]), float(SCHEDULE.sigma[T])
NODES, NODE_WEIGHTS = (torch.from_numpy(values) for values in np.polynomial.hermite_e.hermegauss(120))
NODE_WEIGHTS = NODE_WEIGHTS / NODE_WEIGHTS.sum()  # of a standard normal number


def predicted(x_t, label, parameters):
    """A conditional network of two parameters: label 0 is of the point to keep, 1 of the point to forget."""
    slope, offset = parameters
    return torch.sin(slope * x_t) + offset * (1 + 2 * label)


def squared_error(x_t, label, image, parameters):
    """Of the noise that leads from `image` to `x_t`."""
    return (predicted(x_t, label, parameters) - (x_t - ALPHA * image) / SIGMA).square()


def expectation(image, label, value):
    """Of `value(x_t)` over the noise, where `x_t` is made from `image`."""
    return (NODE_WEIGHTS * value(ALPHA * image + SIGMA * NODES)).sum()


def mixtures_expectation(labelled, parameters):
    """SISS' two terms, as the library composes them, in expectation over both branches and the noise.

    `labelled`: it knows the labels.
    """
    count = len(NODES)
    rows = 2 * count  # every node from the retain branch, then from the forget branch
    noise, from_forget = NODES.repeat(2).view(rows, 1, 1, 1), torch.arange(rows) >= count
    kept, forgotten = torch.full_like(noise, KEPT), torch.full_like(noise, FORGOTTEN)
    timesteps = torch.full((rows,), T)
    draws = Draws(
        forget_noise=noise, retain_noise=noise, forget_timesteps=timesteps, retain_timesteps=timesteps,
        from_forget=from_forget,
    )  # fmt: skip
    labels = (
        {"forget_kwargs": {"label": torch.ones(rows)}, "retain_kwargs": {"label": torch.zeros(rows)}}
        if labelled
        else {}
    )
    (whole,) = SISS(lambd=LAMBD).compose(Batch(forgotten, kept, **labels), draws, SCHEDULE)
    prediction = predicted(whole.x_t.flatten(), from_forget.double(), parameters)
    probability = torch.cat([(1 - LAMBD) * NODE_WEIGHTS, LAMBD * NODE_WEIGHTS])
    means = {}
    for term in whole.terms:
        means[term.role] = (probability * term.weight * (prediction - term.target.flatten()).square()).sum()
    return means


def value_and_gradient(means, parameters):
    return {
        role: torch.stack([mean.detach(), *torch.autograd.grad(mean, parameters, retain_graph=True)])
        for role, mean in means.items()
    }


@pytest.fixture
def parameters():
    return [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (3.0, 0.5)]


@pytest.fixture
def truth(parameters):
    """Each term is the denoising loss of its own point under its own label."""
    means = {
        "retain": expectation(KEPT, 0, lambda x_t: squared_error(x_t, 0, KEPT, parameters)),
        "forget": expectation(FORGOTTEN, 1, lambda x_t: squared_error(x_t, 1, FORGOTTEN, parameters)),
    }
    return value_and_gradient(means, parameters)


def test_losses_and_gradients_of_pairs_with_different_labels_are_unbiased(parameters, truth):
    found = value_and_gradient(mixtures_expectation(True, parameters), parameters)
    for role, expected in truth.items():
        torch.testing.assert_close(found[role], expected, rtol=1e-10, atol=1e-10)


def test_weights_that_do_not_know_of_the_labels_are_biased_by_a_known_amount(parameters, truth):
    """The share of the other branch at `x_t` times what its label changes: half of the retain loss here."""
    found = value_and_gradient(mixtures_expectation(False, parameters), parameters)

    def forget_share(x_t):
        kept, forgotten = (
            torch.exp(-0.5 * ((x_t - ALPHA * image) / SIGMA).square()) for image in (KEPT, FORGOTTEN)
        )
        return LAMBD * forgotten / (LAMBD * forgotten + (1 - LAMBD) * kept)

    def mislabelled(image, label, share):
        """The error under the other label less that under its own, at the other branch's share of `x_t`."""
        return expectation(
            image,
            label,
            lambda x_t: (
                share(x_t)
                * (
                    squared_error(x_t, 1 - label, image, parameters)
                    - squared_error(x_t, label, image, parameters)
                )
            ),
        )

    bias = {
        "retain": mislabelled(KEPT, 0, forget_share),
        "forget": mislabelled(FORGOTTEN, 1, lambda x_t: 1 - forget_share(x_t)),
    }
    for role, expected in value_and_gradient(bias, parameters).items():
        torch.testing.assert_close(found[role] - truth[role], expected, rtol=1e-8, atol=1e-8)
        assert expected[0].abs() > 0.1 * truth[role][0]


# --- which pairs are meant ----------------------------------------------------------------------------------


def pair(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    forget, retain = (torch.rand(2, *SHAPE, generator=generator) * 2 - 1).to(dtype)
    noise, timesteps = torch.randn(SHAPE, generator=generator).to(dtype), torch.full((6,), 600)
    draws = Draws(
        forget_noise=noise,
        retain_noise=noise,
        forget_timesteps=timesteps,
        retain_timesteps=timesteps,
        from_forget=FROM_FORGET,
    )
    return forget, retain, draws


def weights(forget_kwargs, retain_kwargs, lambd=0.5, from_forget=FROM_FORGET):
    """Retain and forget weights `[B]` of a step's rows."""
    forget, retain, draws = pair(torch.float64)
    draws = Draws(**{**vars(draws), "from_forget": from_forget})
    (whole,) = SISS(lambd=lambd).compose(
        Batch(forget, retain, forget_kwargs=forget_kwargs, retain_kwargs=retain_kwargs), draws, SCHEDULE
    )
    terms = {term.role: term for term in whole.terms}
    return terms["retain"].weight, terms["forget"].weight


def mixture_weights(lambd=0.5):
    forget, retain, draws = pair(torch.float64)
    return F.mixture(
        retain, forget, draws.forget_noise, draws.forget_timesteps, SCHEDULE, lambd, FROM_FORGET
    )[3:]


def conditions(**values):
    return {
        "labels": LABELS,
        "extra": {"caption": torch.ones(6, 3, 4), "time_ids": torch.zeros(6, 2, dtype=torch.int64)},
    } | values


def with_one_row(tensor, row, value):
    changed = tensor.clone()
    changed[row] = value
    return changed


DIFFERENT_IN_ROW_2 = {
    "a label": conditions(labels=with_one_row(LABELS, 2, 9)),
    "a caption's last number": conditions(
        extra={
            "caption": with_one_row(torch.ones(6, 3, 4), (2, 2, 3), 2.0),
            "time_ids": torch.zeros(6, 2).long(),
        }
    ),
    "NaN in one of them": conditions(
        extra={
            "caption": with_one_row(torch.ones(6, 3, 4), (2, 0, 0), math.nan),
            "time_ids": torch.zeros(6, 2).long(),
        }
    ),
    "time_ids": conditions(
        extra={"caption": torch.ones(6, 3, 4), "time_ids": with_one_row(torch.zeros(6, 2).long(), (2, 1), 8)}
    ),
}


@pytest.mark.parametrize("other", DIFFERENT_IN_ROW_2.values(), ids=DIFFERENT_IN_ROW_2)
@pytest.mark.parametrize("backend", ["eager", "auto", "reference"])
def test_a_row_whose_pair_differs_anywhere_has_bernoullis_weights(other, backend, monkeypatch):
    monkeypatch.setenv("FASTUNLEARN_BACKEND", backend)
    of_retain, of_forget = weights(conditions(), other, lambd=0.2)
    expected_retain, expected_forget = mixture_weights(lambd=0.2)
    assert (of_retain[2], of_forget[2]) == (1 / (1 - 0.2), 0)  # drawn from the retain branch
    others = torch.tensor([0, 1, 3, 4, 5])
    # A weight of less than 1e-12 of the heaviest counts nothing.
    torch.testing.assert_close(of_retain[others], expected_retain[others], rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(of_forget[others], expected_forget[others], rtol=1e-12, atol=1e-11)


EQUAL = {
    "none": ({}, {}),
    "the same tensors": (conditions(), conditions()),
    "equal tensors": (conditions(), conditions(labels=LABELS.clone())),
    "NaN in both": (
        conditions(labels=with_one_row(LABELS.float(), 1, math.nan)),
        conditions(labels=with_one_row(LABELS.float(), 1, math.nan)),
    ),
    "empty": (conditions(labels=torch.ones(6, 0)), conditions(labels=torch.ones(6, 0))),
}


@pytest.mark.parametrize("both", EQUAL.values(), ids=EQUAL)
def test_equal_conditions_change_no_bit(both):
    for found, expected in zip(weights(*both), weights({}, {}), strict=True):
        assert torch.equal(found, expected)


def test_the_very_same_tensors_are_not_compared(monkeypatch):
    given, mixture = [], F.mixture
    monkeypatch.setattr(
        F,
        "mixture",
        lambda *args, **kwargs: given.append(kwargs["time_log_ratio"]) or mixture(*args, **kwargs),
    )
    same = conditions()
    weights(same, dict(same))
    weights(same, conditions(labels=LABELS.clone()))
    assert given[0] is None
    assert given[1].tolist() == [0.0] * 6


# --- whole steps --------------------------------------------------------------------------------------------


class Labelled(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = TinyDenoiser()
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(1)
            self.embedding = nn.Embedding(10, 1)

    def forward(self, x_t, t, labels):
        return self.network(x_t, t) + self.embedding(labels).view(-1, 1, 1, 1)


def taken(variant, from_forget=FROM_FORGET, forget_labels=LABELS + 1, **options):
    """Report and parameters of a step on pairs that all differ in their label."""
    model = Labelled()
    forget, retain, draws = pair()
    draws = Draws(**{**vars(draws), "from_forget": from_forget})
    out = siss_step(
        model, torch.optim.SGD(model.parameters(), lr=0.1), SCHEDULE, forget, retain, variant=variant,
        lambd=0.3, draws=draws, forget_kwargs={"labels": forget_labels}, retain_kwargs={"labels": LABELS},
        **options,
    )  # fmt: skip
    return out, torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("micro_batch_size", [None, 4])
def test_a_step_on_pairs_that_all_differ_is_the_bernoulli_step(micro_batch_size):
    """But for the forget loss, which the Bernoulli variant reports without its factor 1 / lambd.

    The rescaling cancels it.
    """
    (mixed, mixed_state), (bernoulli, state) = (
        taken(variant, micro_batch_size=micro_batch_size) for variant in ("mixture", "bernoulli")
    )
    torch.testing.assert_close(mixed_state, state, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        mixed.retain_loss, bernoulli.retain_loss.to(mixed.retain_loss.dtype), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(
        mixed.forget_loss * 0.3, bernoulli.forget_loss.to(mixed.forget_loss.dtype), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("none_from_forget", [True, False])
def test_a_batch_of_one_branch_alone_takes_a_finite_step(none_from_forget):
    """One of the two terms has no row at all."""
    before = torch.cat([parameter.detach().flatten() for parameter in Labelled().parameters()])
    out, after = taken("mixture", from_forget=torch.full((6,), not none_from_forget))
    assert not out.skipped
    assert torch.isfinite(after).all()
    assert not torch.equal(after, before)
    if none_from_forget:
        assert (out.forget_loss, out.correction_norm, out.scaling_factor) == (0, 0, 0)
    else:
        assert out.retain_loss == 0


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_nothing_is_read(device):
    """On a CPU as on a GPU: whether a pair differs is decided where its conditions lie."""
    forget, retain = torch.zeros(2, *SHAPE, device=device)
    noise, timesteps = torch.zeros(SHAPE, device=device), torch.full((6,), 600, device=device)
    draws = Draws(noise, noise, timesteps, timesteps, torch.ones(6, dtype=torch.bool, device=device))
    kwargs = {
        "forget_kwargs": {"labels": LABELS.to(device)},
        "retain_kwargs": {"labels": LABELS.clone().to(device)},
    }
    SCHEDULE.coefficients(timesteps)  # its tables are made
    with no_host_sync(device):
        (whole,) = SISS().compose(Batch(forget, retain, **kwargs), draws, SCHEDULE)
    assert whole.x_t.device.type == device


# --- what no weight makes up for ----------------------------------------------------------------------------


@pytest.mark.parametrize(("lambd", "branch"), [(0.0, "retain"), (1.0, "forget")])
def test_a_row_of_a_branch_that_is_never_drawn_is_refused(lambd, branch):
    """With equal conditions its weight is a likelihood ratio.

    With different ones the drawn mixture could not have made it.
    """
    weights({"labels": LABELS}, {"labels": LABELS.clone()}, lambd=lambd)
    with pytest.raises(
        ValueError,
        match=rf"draws.from_forget: expected rows of the {branch} branch alone for lambd {lambd:g}",
    ):
        weights({"labels": LABELS}, {"labels": LABELS + 1}, lambd=lambd)
    of_retain, of_forget = weights(
        {"labels": LABELS}, {"labels": LABELS + 1}, lambd=lambd, from_forget=torch.full((6,), lambd == 1)
    )
    assert of_retain.tolist() == [1 - lambd] * 6
    assert of_forget.tolist() == [lambd] * 6


def test_where_nobody_looks_such_a_row_is_a_skipped_step(monkeypatch):
    monkeypatch.setattr("fastunlearn.host.check.readable", lambda tensor: False)
    model = Labelled()
    forget, retain, draws = pair()
    before = model.embedding.weight.detach().clone()
    labels = {"forget_kwargs": {"labels": LABELS + 1}, "retain_kwargs": {"labels": LABELS}}
    out = siss_step(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        SCHEDULE,
        forget,
        retain,
        lambd=0.0,
        draws=draws,
        **labels,
    )
    assert out.skipped
    assert torch.equal(model.embedding.weight, before)


@pytest.mark.parametrize("variant", ["mixture", "bernoulli"])
@pytest.mark.parametrize("other", [torch.zeros(6, 1), torch.zeros(6, 6, 1)])
def test_conditions_of_a_pair_have_one_shape(variant, other):
    """Captions `[6, 6]` and `[6, 1]` would be broadcast: the network would be told what no image is."""
    forget, retain, draws = pair()
    batch = Batch(
        forget, retain, forget_kwargs={"caption": torch.zeros(6, 6)}, retain_kwargs={"caption": other}
    )
    with pytest.raises(
        ValueError, match=r"forget_kwargs, retain_kwargs: expected the same shape.*got \(6, 6\) and"
    ):
        SISS(variant=variant).compose(batch, draws, SCHEDULE)
