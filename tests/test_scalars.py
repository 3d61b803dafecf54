"""Numbers that numpy or torch made are numbers: hyperparameters come out of arrays and configurations."""

import json
from dataclasses import InitVar, asdict, astuple, dataclass

import numpy as np
import pytest
import torch

from fastunlearn import (
    SISS,
    EraseDiff,
    ImageStore,
    LowPass,
    NegGrad,
    ReTrack,
    Unlearner,
    Vanilla,
    nearest_neighbors,
    retrack_step,
    siss_step,
)
from fastunlearn.host import check
from fastunlearn.testing.factories import TinyDenoiser, linear_schedule, redirect_inputs

SCHEDULE = linear_schedule()
HALVES = [
    np.float32(0.5),
    np.float64(0.5),
    np.float16(0.5),
    np.array(0.5),
    torch.tensor(0.5),
    torch.tensor(0.5, dtype=torch.float64),
]
THREES = [
    np.int64(3),
    np.int32(3),
    np.uint8(3),
    np.array(3),
    torch.tensor(3),
    torch.tensor(3, dtype=torch.uint8),
]


@pytest.mark.parametrize("value", HALVES, ids=repr)
def test_a_number(value):
    found = check.number("lambd", value, low=0, high=1)
    assert type(found) is float
    assert found == 0.5


@pytest.mark.parametrize("value", THREES, ids=repr)
def test_an_integer(value):
    found = check.integer("k", value, low=1)
    assert type(found) is int
    assert found == 3
    assert check.number("radius", value) == 3.0


REFUSED = {
    "not finite": (np.float32("nan"), ValueError, "lambd: expected a finite number in .0, 1., got nan"),
    "outside": (torch.tensor(2.0), ValueError, "lambd: expected a finite number in .0, 1., got 2.0"),
    "bool": (np.bool_(True), TypeError, "lambd: expected a number, got True"),
    "bool tensor": (torch.tensor(True), TypeError, "lambd: expected a number, got True"),
    "complex": (np.complex64(0.5), TypeError, "lambd: expected a number, got complex"),
    "an array of one": (np.array([0.5]), TypeError, "lambd: expected a number, got ndarray"),
    "a tensor of one": (
        torch.tensor([0.5]),
        TypeError,
        r"lambd: expected a number, got float32 of shape \(1,\) on cpu",
    ),
    "elsewhere": (
        torch.tensor(0.5, device="meta"),
        TypeError,
        r"lambd: expected a number on the host .*waits.*, got float32 of shape \(\) on meta",
    ),
    "learned": (
        torch.tensor(0.5, requires_grad=True),
        TypeError,
        r"lambd: expected a number \(detach\(\).*\), got a tensor that requires grad",
    ),
}


@pytest.mark.parametrize(("value", "error", "text"), REFUSED.values(), ids=REFUSED)
def test_no_number(value, error, text):
    with pytest.raises(error, match=text):
        check.number("lambd", value, low=0, high=1)
    with pytest.raises(error, match=text):
        ReTrack(lambd=value)


@pytest.mark.parametrize("value", [np.float32(0.5), np.array(3.5), torch.tensor(2.0)], ids=repr)
def test_no_integer(value):
    with pytest.raises(TypeError, match="k: expected an integer, got"):
        ReTrack(k=value)


def test_methods_hold_pythons_own():
    """What they hold is hashed, compared with that of a captured graph, and written to a run's record."""
    half, three = np.float32(0.5), torch.tensor(3)
    for method, plain in (
        (ReTrack(k=three, lambd=half), ReTrack(k=3, lambd=0.5)),
        (SISS(lambd=torch.tensor(0.5), scaling_norm=three), SISS(lambd=0.5, scaling_norm=3)),
        (EraseDiff(eta=half), EraseDiff(eta=0.5)),
        (NegGrad(superfactor=np.array(0.5)), NegGrad(superfactor=0.5)),
        (LowPass(half, band="mid", inner=torch.tensor(0.25)), LowPass(0.5, band="mid", inner=0.25)),
    ):
        assert list(map(type, astuple(method))) == list(map(type, astuple(plain)))
        assert method == plain
        assert hash(method) == hash(plain)
        assert json.dumps(asdict(method)) == json.dumps(asdict(plain))


def test_a_method_of_somebody_elses():
    """With a check of its own, and an argument that is no field."""

    @dataclass(frozen=True)
    class Mine(Vanilla):
        weight: float = 1.0
        scale: InitVar[float] = 2.0

        def __post_init__(self, scale):
            assert type(self.weight) is float
            object.__setattr__(self, "weight", self.weight * scale)

    assert Mine(np.float32(0.5), 3.0).weight == 1.5
    assert Vanilla() == Vanilla()


def test_a_step_and_a_run_take_them():
    inputs = redirect_inputs(4, 3)
    results = []
    for half, two in ((0.5, 2), (np.float32(0.5), np.int64(2)), (torch.tensor(0.5), torch.tensor(2))):
        model = TinyDenoiser()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        options = {"max_grad_norm": half, "micro_batch_size": two}
        generator = torch.Generator().manual_seed(0)
        retrack_step(
            model,
            optimizer,
            SCHEDULE,
            inputs.forget,
            inputs.neighbors,
            inputs.noise,
            lambd=half,
            generator=generator,
            **options,
        )
        siss_step(
            model,
            optimizer,
            SCHEDULE,
            inputs.forget,
            inputs.noise,
            lambd=half,
            scaling_norm=two,
            generator=generator,
            **options,
        )
        store = ImageStore(inputs.neighbors.flatten(0, 1).clone())
        stores = {"forget": ImageStore(inputs.forget), "retain": store}
        run = Unlearner(
            model,
            optimizer,
            SCHEDULE,
            ReTrack(k=two, lambd=half),
            **stores,
            batch_size=two,
            seed=two,
            **options,
        )
        run.step()
        assert list(map(type, (run.batch_size, run.seed, run.micro_batch_size, run.max_grad_norm))) == [
            int,
            int,
            int,
            float,
        ]
        results.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
        assert nearest_neighbors(stores["forget"], store, two)[0].shape == (4, 2)
    assert torch.equal(results[1], results[0])
    assert torch.equal(results[2], results[0])
