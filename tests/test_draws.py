import pytest
import torch

from fastunlearn.host.philox import philox
from fastunlearn.methods import SISS, EraseDiff, ReTrack
from fastunlearn.objective.draws import (
    CounterSource,
    Draws,
    GeneratorSource,
    Normal,
    Purpose,
    Same,
    Time,
    complete,
)
from fastunlearn.objective.time import TimeWindow

CPU = torch.device("cpu")


def counted(seed, step, first_row=0):
    return CounterSource(torch.tensor([seed, step, first_row]))


def test_philox_known_answers():
    """The known-answer vectors of Random123 (Salmon et al. 2011), all zeros and all ones."""
    zero, ones = torch.tensor(0), torch.tensor(0xFFFFFFFF)
    assert [int(word) for word in philox((zero,) * 4, 0)] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert [int(word) for word in philox((ones,) * 4, 2**64 - 1)] == [
        0x408F276D,
        0x41C83B0E,
        0xA20BC7C6,
        0x6D5451FD,
    ]


def test_normal_numbers_are_normal():
    numbers = counted(1, 2).noise((64, 1, 28, 28), Purpose.FORGET_NOISE).numbers()
    assert numbers.shape == (64, 1, 28, 28)
    count = numbers.numel()
    assert abs(numbers.mean()) < 4 / count**0.5
    assert abs(numbers.var() - 1) < 4 * (2 / count) ** 0.5
    assert abs((numbers.abs() < 1).float().mean() - 0.6827) < 0.01
    assert abs((numbers[:, :, :, 1:] * numbers[:, :, :, :-1]).mean()) < 4 / count**0.5


def test_a_row_of_noise_does_not_depend_on_the_others():
    source = counted(1, 2)
    few, many = (source.noise((rows, 3, 5, 7), Purpose.RETAIN_NOISE).numbers() for rows in (2, 9))
    assert torch.equal(few, many[:2])
    assert not torch.equal(many[0], many[1])


@pytest.mark.parametrize("other", [dict(seed=2, step=2), dict(seed=1, step=3), dict(seed=2**32 + 1, step=2)])
def test_seed_and_step_change_every_draw(other):
    one, two = (
        counted(**arguments).uniform((4, 1, 8, 8), Purpose.UNIFORM_TARGET)
        for arguments in (dict(seed=1, step=2), other)
    )
    assert (one == two).float().mean() < 0.01


def test_purposes_do_not_share_numbers():
    source = counted(1, 2)
    draws = [source.uniform((2, 64), purpose) for purpose in Purpose]
    for index, one in enumerate(draws):
        for two in draws[index + 1 :]:
            assert (one == two).float().mean() < 0.05


def test_integers_cover_their_range_evenly():
    counts = torch.bincount(counted(1, 2).integers(60_000, 6, Purpose.RETAIN_ROWS), minlength=6)
    assert len(counts) == 6
    assert (counts - 10_000).abs().max() < 5 * (10_000 * 5 / 6) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_complete_draws_what_the_method_needs_and_keeps_what_is_given(dtype):
    forget, retain = torch.zeros(3, 1, 4, 4, dtype=dtype), torch.zeros(5, 1, 4, 4, dtype=dtype)
    given = torch.arange(3)
    draws = complete(
        Draws(forget_timesteps=given),
        ReTrack().draws(),
        GeneratorSource(CPU, torch.Generator().manual_seed(0)),
        forget,
        retain,
        1000,
    )
    assert draws.forget_timesteps is given
    assert draws.given() == {"forget_noise", "retain_noise", "forget_timesteps", "retain_timesteps"}
    assert draws.retain_noise.shape == retain.shape
    assert draws.retain_noise.dtype == dtype
    assert draws.retain_timesteps.shape == (5,)


def test_a_branch_may_draw_its_timesteps_from_a_density_of_its_own():
    batch = torch.zeros(64, 1, 4, 4)
    window = TimeWindow(990, 1000)
    wanted = {"forget_timesteps": Time("forget", window), "retain_timesteps": Time("retain")}
    for source in (lambda: counted(0, 7), lambda: GeneratorSource(CPU, torch.Generator().manual_seed(0))):
        draws = complete(Draws(), wanted, source(), batch, batch, 1000)
        assert draws.forget_timesteps.min() >= 990
        assert draws.retain_timesteps.min() < 500
        own = source()
        expected = (
            own.fractions(64, Purpose.FORGET_TIMESTEPS),
            own.integers(64, 1000, Purpose.RETAIN_TIMESTEPS),
        )
        # A tenth of the 2^53 numbers for each of ten indices.
        assert torch.equal(draws.forget_timesteps, 990 + expected[0] * 10 // 2**53)
        assert torch.equal(draws.retain_timesteps, expected[1])


@pytest.mark.parametrize("variant", ["mixture", "no_is", "bernoulli"])
def test_a_siss_pair_shares_noise_and_timestep(variant):
    pair = torch.zeros(6, 1, 4, 4)
    draws = complete(Draws(), SISS(variant=variant).draws(), counted(0, 0), pair, pair, 1000)
    assert draws.forget_noise is draws.retain_noise
    assert torch.equal(draws.forget_timesteps, draws.retain_timesteps)
    assert (draws.from_forget is None) == (variant == "no_is")


def test_what_is_the_same_may_stand_before_what_it_is_the_same_as():
    batch = torch.zeros(6, 1, 4, 4)
    wanted = {"forget_noise": Same("retain_noise"), "retain_noise": Normal("retain")}
    drawn = complete(Draws(), wanted, counted(0, 0), batch, batch, 1000)
    assert drawn.forget_noise is drawn.retain_noise
    given = complete(Draws(forget_noise=batch), wanted, counted(0, 0), batch, batch, 1000)
    assert given.retain_noise is batch


def test_erasediff_branches_are_drawn_apart():
    batch = torch.zeros(6, 1, 4, 4)
    draws = complete(Draws(), EraseDiff().draws(), counted(0, 0), batch, batch, 1000)
    assert not torch.equal(draws.forget_noise.numbers(), draws.retain_noise.numbers())
    assert not torch.equal(draws.forget_timesteps, draws.retain_timesteps)
    assert draws.uniform_target.min() >= 0
    assert draws.uniform_target.max() < 1
