"""Densities of timesteps: their tables, what is drawn from them, and SISS where its branches have two."""

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats

from fastunlearn import NoiseSchedule
from fastunlearn import functional as F
from fastunlearn.host import philox
from fastunlearn.objective import time
from fastunlearn.objective.draws import CounterSource, GeneratorSource, Purpose
from fastunlearn.objective.time import LogitNormal, Product, Stratified, TimeWindow, Uniform, log_ratio
from fastunlearn.testing.factories import linear_schedule
from fastunlearn.testing.host_sync import Tape, no_host_sync

diffusers = pytest.importorskip("diffusers")
training_utils = pytest.importorskip("diffusers.training_utils")


T = 1000
CPU = torch.device("cpu")
PURPOSE = Purpose.FORGET_TIMESTEPS
WINDOW = TimeWindow(250, 750)
DENSITIES = {
    "uniform": Uniform(),
    "window": WINDOW,
    "soft window": TimeWindow(250, 750, outside=0.3),
    "one index": TimeWindow(999, 1000),
    "logit-normal": LogitNormal(),
    "narrow logit-normal": LogitNormal(0.5, 0.4),
    "product": Product(WINDOW, LogitNormal(0.5)),
    "weighted window": TimeWindow(250, 750, as_weight=True),
}
densities = pytest.mark.parametrize("density", DENSITIES.values(), ids=DENSITIES)


def counted(step=0, seed=3, first_row=0, **where):
    return CounterSource(torch.tensor([seed, step, first_row]), **where)


def generated(seed=0):
    return GeneratorSource(CPU, torch.Generator().manual_seed(seed))


SOURCES = {"counter": counted, "generator": generated}
sources = pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)


class Given:
    """A source of the numbers that a test wants."""

    def __init__(self, *numbers):
        self.numbers = torch.tensor(numbers)

    def fractions(self, count, purpose):
        return self.numbers


# --- tables -------------------------------------------------------------------------------------------------


@densities
@pytest.mark.parametrize("wrapped", [False, True])
def test_tables_are_probabilities(density, wrapped):
    table = (Stratified(density) if wrapped else density).table(T)
    assert table.dtype == torch.float64
    assert table.shape == (T,)
    assert (table >= 0).all()
    assert math.fsum(table.tolist()) == pytest.approx(1, abs=1e-14)


def test_a_window_is_constant_within_and_constant_outside():
    table = TimeWindow(2, 5, outside=0.25).table(8)
    # 3 indices of weight 1 and 5 of weight 1 / 4: 17 quarters in all.
    assert table.tolist() == pytest.approx([1 / 17, 1 / 17, 4 / 17, 4 / 17, 4 / 17, 1 / 17, 1 / 17, 1 / 17])
    assert TimeWindow(2, 5).table(8).tolist() == pytest.approx([0, 0, 1 / 3, 1 / 3, 1 / 3, 0, 0, 0])
    assert TimeWindow(2, 5, outside=1).table(8).tolist() == pytest.approx([1 / 8] * 8)


@pytest.mark.parametrize(("mean", "std"), [(0, 1), (0.5, 1), (-1.2, 0.4), (3, 0.7), (0, 5)])
@pytest.mark.parametrize("num_timesteps", [1, 2, 10, 1000])
def test_logit_normal_is_the_normal_distribution_between_logits(mean, std, num_timesteps):
    """Also in the tails, where a difference of two numbers near 1 would have no digit left."""
    normal, table = stats.norm(mean, std), LogitNormal(mean, std).table(num_timesteps)
    with np.errstate(divide="ignore"):
        edges = np.log(np.arange(num_timesteps + 1)) - np.log(np.arange(num_timesteps + 1)[::-1])
    for place, (low, high) in enumerate(pairwise(edges)):
        above = low > mean
        expected = normal.sf(low) - normal.sf(high) if above else normal.cdf(high) - normal.cdf(low)
        assert table[num_timesteps - 1 - place].item() == pytest.approx(expected, rel=1e-9, abs=1e-300)


def test_logit_normal_is_what_diffusers_draws():
    mean, std, count, bins = 0.4, 0.8, 200_000, 20
    u = training_utils.compute_density_for_timestep_sampling(
        "logit_normal", count, mean, std, generator=torch.Generator().manual_seed(0)
    )
    # diffusers' scripts index scheduler.timesteps, which begins with the noisiest.
    drawn = T - 1 - (u * T).long()
    found = torch.bincount(drawn, minlength=T).view(bins, -1).sum(1)
    expected = LogitNormal(mean, std).table(T).view(bins, -1).sum(1)
    assert ((found - count * expected).abs() <= 5 * (count * expected * (1 - expected)).sqrt()).all()


def test_a_product_is_normalised():
    table, logit_normal = Product(WINDOW, LogitNormal(0.5)).table(T), LogitNormal(0.5).table(T)
    assert table[:250].sum() == 0
    assert table[750:].sum() == 0
    torch.testing.assert_close(table[250:750], logit_normal[250:750] / logit_normal[250:750].sum())


def test_presets_are_the_papers_windows():
    assert TimeWindow.middle() == TimeWindow.middle(linear_schedule()) == TimeWindow(250, 750)
    assert TimeWindow.late() == TimeWindow.late(linear_schedule()) == TimeWindow(750, 1000)
    assert TimeWindow.middle(100, outside=0.1) == TimeWindow(25, 75, 0.1)
    assert TimeWindow.late(100, as_weight=True) == TimeWindow(75, 100, as_weight=True)


def test_densities_are_keys():
    assert len({TimeWindow(1, 2), TimeWindow(1, 2, 0.0), TimeWindow(np.int64(1), torch.tensor(2))}) == 1
    assert Stratified(LogitNormal(0, 1)) == Stratified(LogitNormal())


# --- draws --------------------------------------------------------------------------------------------------


@densities
@sources
def test_draws_follow_the_table(density, source):
    """Each of 20 parts of the schedule within 5 standard deviations of what it expects."""
    drawn = density.draw(source(), PURPOSE, 60_000, T)
    assert drawn.dtype == torch.int64
    assert drawn.shape == (60_000,)
    table = density.drawn(T)
    assert (table[drawn] > 0).all()
    found = torch.bincount(drawn, minlength=T).view(20, -1).sum(1)
    expected = 60_000 * table.view(20, -1).sum(1)
    deviation = (expected * (1 - expected / 60_000)).clamp(min=0).sqrt()
    assert ((found - expected).abs() <= 5 * deviation + 1e-6).all()


def test_steps_rows_and_purposes_have_draws_of_their_own():
    one = WINDOW.draw(counted(step=1), PURPOSE, 64, T)
    assert torch.equal(one, WINDOW.draw(counted(step=1), PURPOSE, 64, T))
    assert torch.equal(one[16:48], WINDOW.draw(counted(step=1, first_row=16), PURPOSE, 32, T))
    for other in (
        WINDOW.draw(counted(step=2), PURPOSE, 64, T),
        WINDOW.draw(counted(step=1, seed=4), PURPOSE, 64, T),
        WINDOW.draw(counted(step=1), Purpose.RETAIN_TIMESTEPS, 64, T),
    ):
        assert (one == other).float().mean() < 0.1


@sources
@pytest.mark.parametrize(
    "density", [Uniform(), TimeWindow(250, 750, as_weight=True)], ids=["plain", "weight"]
)
def test_what_is_drawn_uniformly_keeps_the_bits_of_uniform_draws(density, source):
    assert torch.equal(density.draw(source(), PURPOSE, 512, T), source().integers(512, T, PURPOSE))


def test_the_first_and_last_number_give_the_first_and_last_index_of_the_window():
    last = 2**philox.FRACTION_BITS - 1
    for density, expected in (
        (WINDOW, [250, 749]),
        (TimeWindow(750, 1000), [750, 999]),
        (TimeWindow(0, 3), [0, 2]),
        (LogitNormal(), [0, 999]),
        (TimeWindow(10, 20, outside=1e-9), [0, 999]),
    ):
        assert density.draw(Given(0, last), PURPOSE, 2, T).tolist() == expected


@pytest.mark.parametrize(
    "density",
    [WINDOW, TimeWindow(333, 350, 0.01), LogitNormal(1.0, 0.6), Product(WINDOW, LogitNormal())],
    ids=["window", "soft", "logit-normal", "product"],
)
def test_every_index_has_its_share_of_the_numbers_to_one_unit(density):
    """Its first and its last number give it, those beside them its neighbours with a share."""
    units = 2**philox.FRACTION_BITS
    borders = [0, *time._borders(density, T, units).tolist()]
    assert borders[-1] == units
    for index, probability in enumerate(density.table(T).tolist()):
        first, behind = borders[index], borders[index + 1]
        # The probabilities add up to 1 within 1e-14, and each border is rounded once.
        assert abs(Fraction(behind - first, units) - Fraction(probability)) < 1e-14
        assert probability > 0 or first == behind
        if first < behind:
            numbers = Given(first, behind - 1)
            assert density.draw(numbers, PURPOSE, 2, T).tolist() == [index, index]


def test_numbers_between_indices_of_no_probability_have_none_of_them():
    """A hole in the middle of the schedule."""
    hole = Product(TimeWindow(0, 400, outside=0.5), TimeWindow(300, 500, outside=0.1))
    assert (hole.table(T) > 0).all()
    hole = Product(LogitNormal(0.0, 0.001), TimeWindow(0, 499))
    table = hole.table(T)
    drawn = hole.draw(counted(), PURPOSE, 20_000, T)
    assert 0 < len(drawn.unique()) <= int((table > 0).sum()) < 100
    assert (table[drawn] > 0).all()


def test_fractions_use_all_of_their_bits():
    for numbers in (counted().fractions(4096, PURPOSE), generated().fractions(4096, PURPOSE)):
        assert numbers.dtype == torch.int64
        assert 0 <= int(numbers.min()) < 2**45
        assert 2**53 - 2**45 < int(numbers.max()) < 2**53
        ones = torch.stack([(numbers >> bit) & 1 for bit in range(philox.FRACTION_BITS)]).double().mean(1)
        assert ((ones - 0.5).abs() < 5 * 0.5 / 4096**0.5).all()


# --- strata -------------------------------------------------------------------------------------------------


@sources
@pytest.mark.parametrize("count", [1, 7, 50, 128])
@pytest.mark.parametrize("density", [Uniform(), WINDOW, LogitNormal(0.5)], ids=["uniform", "window", "logit"])
def test_each_stratum_has_one_draw(density, count, source):
    """The k-th smallest of the batch lies between the quantiles k / B and (k + 1) / B."""
    sums = density.table(T).cumsum(0)
    quantiles = torch.arange(count + 1, dtype=torch.float64) / count
    # Both ends may be one index away where a quantile falls on a border of indices.
    least = torch.searchsorted(sums, quantiles[:-1] - 1e-12)
    most = torch.searchsorted(sums, (quantiles[1:] + 1e-12).clamp(max=float(sums[-1])))
    drawn = Stratified(density).draw(source(), PURPOSE, count, T).sort().values
    assert (least <= drawn).all()
    assert (drawn <= most).all()


def test_a_batch_of_as_many_rows_as_indices_has_them_all():
    for source in (counted(), generated()):
        drawn = Stratified(Uniform()).draw(source, PURPOSE, T, T)
        assert drawn.sort().values.tolist() == list(range(T))
        assert drawn.tolist() != list(range(T))


@sources
def test_one_stratum_is_a_plain_draw_and_bits_of_numbers_are_enough_for_many(source):
    assert 250 <= int(Stratified(WINDOW).draw(source(), PURPOSE, 1, T)) < 750
    many = Stratified(WINDOW).draw(source(), PURPOSE, 2**17 + 1, T)
    counts = torch.bincount(many, minlength=T)
    assert counts[250:750].sum() == 2**17 + 1
    # 262.1 of each index: no more than the two strata at its ends are in doubt.
    assert ((counts[250:750] - (2**17 + 1) / 500).abs() <= 2).all()


@pytest.mark.parametrize(("first", "rows"), [(0, slice(0, 8)), (1, slice(8, 16)), (2, slice(16, 24))])
def test_processes_share_out_the_strata_of_the_global_batch(first, rows):
    whole = Stratified(LogitNormal()).draw(counted(step=5), PURPOSE, 24, T)
    part = counted(step=5, first_row=8 * first, rank=first, num_processes=3)
    assert torch.equal(Stratified(LogitNormal()).draw(part, PURPOSE, 8, T), whole[rows])


def test_rows_and_branches_are_not_tied_to_a_stratum():
    """Over many steps each row has every stratum, and the two branches have every pair of them."""
    steps, count = 1000, 4
    strata = torch.stack(
        [
            torch.stack(
                [
                    Stratified(Uniform()).draw(counted(step), purpose, count, T) // 250
                    for purpose in (Purpose.FORGET_TIMESTEPS, Purpose.RETAIN_TIMESTEPS)
                ]
            )
            for step in range(steps)
        ]
    )  # [steps, 2, rows]
    for row in range(count):
        pairs = torch.bincount(strata[:, 0, row] * count + strata[:, 1, row], minlength=count**2)
        deviation = (steps * (1 / 16) * (15 / 16)) ** 0.5
        assert ((pairs - steps / 16).abs() < 5 * deviation).all()


def test_strata_and_places_within_them_are_independent():
    """They come from different words of one counter."""
    count, steps = 8, 500
    places, strata = [], []
    for step in range(steps):
        drawn = Stratified(Uniform()).draw(counted(step), PURPOSE, count, 1024)
        strata.append((drawn // 128).double())
        places.append((drawn % 128).double())
    strata, places = torch.stack(strata).flatten(), torch.stack(places).flatten()
    correlation = torch.corrcoef(torch.stack([strata, places]))[0, 1]
    assert abs(correlation) < 5 / (count * steps) ** 0.5


@pytest.mark.parametrize("density", [Uniform(), WINDOW, LogitNormal(0.5)], ids=["uniform", "window", "logit"])
def test_strata_keep_the_mean_and_lower_the_variance(density):
    """Of a batch's mean of a loss that grows with t, against what its strata say."""
    count, steps = 16, 600
    loss = torch.linspace(0, 3, T, dtype=torch.float64).exp()
    table = density.table(T)
    mean = (table * loss).sum()
    variance = (table * (loss - mean).square()).sum()
    plain, stratified = (
        torch.stack([loss[how.draw(counted(step), PURPOSE, count, T)].mean() for step in range(steps)])
        for how in (density, Stratified(density))
    )

    # The variance of a stratified mean is that within strata. An index may lie in two of them.
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), table.cumsum(0)])
    within = torch.zeros((), dtype=torch.float64)
    for stratum in range(count):
        low, high = stratum / count, (stratum + 1) / count
        share = (sums[1:].clamp(low, high) - sums[:-1].clamp(low, high)) * count
        within += (share * (loss - (share * loss).sum()).square()).sum() / count**2

    assert abs(plain.mean() - mean) < 5 * (variance / count / steps).sqrt()
    assert abs(stratified.mean() - mean) < 5 * (within / steps).sqrt()
    accuracy = 5 * (2 / steps) ** 0.5  # of a variance of nearly normal numbers
    assert plain.var() == pytest.approx(float(variance / count), rel=accuracy)
    assert stratified.var() == pytest.approx(float(within), rel=accuracy)
    assert within < variance / count / 20


# --- windows as weights -------------------------------------------------------------------------------------


def test_a_weight_times_what_is_drawn_is_the_density():
    for density in (TimeWindow(250, 750, 0.2, as_weight=True), Stratified(TimeWindow(5, 9, as_weight=True))):
        assert density.weighted
        torch.testing.assert_close(
            density.weights(T) * density.drawn(T), density.table(T), rtol=1e-14, atol=0
        )
        timesteps = torch.tensor([0, 6, 300, 999])
        assert torch.equal(time.weights_of(timesteps, density, T), density.weights(T)[timesteps])
    for density in (WINDOW, LogitNormal(), Stratified(WINDOW)):
        assert not density.weighted
        assert density.weights(T).tolist() == [1] * T
        assert time.weights_of(torch.tensor([0]), density, T) is None


# --- windows on other schedules -----------------------------------------------------------------------------


def of_diffusers(**config):
    return NoiseSchedule.from_diffusers(diffusers.DDPMScheduler(**config))


SD_BETAS = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
LINEAR = of_diffusers()
SD = of_diffusers(**SD_BETAS)
COSINE = of_diffusers(beta_schedule="squaredcos_cap_v2")
ZERO_SNR = of_diffusers(**SD_BETAS, rescale_betas_zero_snr=True, prediction_type="v_prediction")
FLOW = NoiseSchedule.from_diffusers(diffusers.FlowMatchEulerDiscreteScheduler())
SHIFTED = NoiseSchedule.from_diffusers(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))


@pytest.mark.parametrize(
    ("window", "source", "target", "expected"),
    [
        (WINDOW, LINEAR, LINEAR, (250, 750)),
        (WINDOW, LINEAR, SD, (342, 1000)),
        (WINDOW, LINEAR, COSINE, (482, 963)),
        (WINDOW, LINEAR, FLOW, (489, 945)),
        (WINDOW, LINEAR, SHIFTED, (242, 852)),
        (TimeWindow.late(), SD, SD, (750, 1000)),
        (TimeWindow.late(), SD, ZERO_SNR, (699, 1000)),
        (TimeWindow.late(), SD, FLOW, (803, 1000)),
    ],
)
def test_windows_carry_over_by_equal_snr(window, source, target, expected):
    moved = window.transfer(source, target)
    assert (moved.start, moved.stop) == expected
    for bound, old in ((moved.start, window.start), (moved.stop, window.stop)):
        if bound < len(target) and old < len(source):
            wanted = source.alpha[old] / source.sigma[old]
            assert target.alpha[bound] / target.sigma[bound] <= wanted
            assert target.alpha[bound - 1] / target.sigma[bound - 1] > wanted


def test_noise_levels_of_a_flow_that_the_window_of_ddpm_has():
    """`sigma / (1 - sigma)` of a flow is `sigma / alpha` of the source: levels between those of indices."""
    for index, source, expected in ((250, LINEAR, 0.489), (750, LINEAR, 0.946), (750, SD, 0.804)):
        ratio = source.sigma[index] / source.alpha[index]
        assert round(float(ratio / (1 + ratio)), 3) == expected


def test_a_window_that_is_moved_keeps_the_rest():
    moved = TimeWindow(250, 750, 0.1, as_weight=True).transfer(LINEAR, SD)
    assert moved == TimeWindow(342, 1000, 0.1, as_weight=True)


def test_densities_that_are_made_of_windows_move_them():
    moved, logit_normal = TimeWindow(342, 1000), LogitNormal(0.5, 2.0)
    for density, expected in (
        (Uniform(), Uniform()),
        (logit_normal, logit_normal),
        (Stratified(WINDOW), Stratified(moved)),
        (Product(WINDOW, logit_normal), Product(moved, logit_normal)),
        (Product(logit_normal, WINDOW), Product(logit_normal, moved)),
        (Stratified(Product(WINDOW, WINDOW)), Stratified(Product(moved, moved))),
    ):
        assert density.transfer(LINEAR, SD) == expected


def test_a_density_that_nothing_is_known_of_is_not_moved():
    class Own(time.Density):
        pass

    for density in (Own(), Stratified(Own()), Product(WINDOW, Own())):
        with pytest.raises(TypeError, match=r"^transfer: expected a TimeWindow, or a density made of others"):
            density.transfer(LINEAR, SD)


@densities
def test_a_density_is_moved_between_schedules_alone(density):
    for moved in (density, Stratified(density)):
        with pytest.raises(TypeError, match=r"^target: expected a NoiseSchedule"):
            moved.transfer(LINEAR, 1000)


def test_a_schedule_without_the_windows_noise_is_refused():
    calm = NoiseSchedule(LINEAR.alpha[:200], LINEAR.sigma[:200])
    with pytest.raises(
        ValueError, match=r"target: expected a schedule with noise levels of the window \[250, 750\)"
    ):
        WINDOW.transfer(LINEAR, calm)
    with pytest.raises(
        ValueError, match=r"stop: expected at most the 200 timesteps of the schedule, got 750"
    ):
        WINDOW.transfer(calm, LINEAR)
    expected = "expected a NoiseSchedule, whose noise levels are compared, got 1000"
    with pytest.raises(TypeError, match=rf"^target: {expected}"):
        WINDOW.transfer(LINEAR, 1000)
    with pytest.raises(TypeError, match=rf"^source: {expected}"):
        WINDOW.transfer(1000, LINEAR)


# --- nothing waits ------------------------------------------------------------------------------------------

STRATIFIED = {f"stratified {name}": Stratified(density) for name, density in DENSITIES.items()}


@pytest.mark.parametrize("density", (DENSITIES | STRATIFIED).values(), ids=DENSITIES | STRATIFIED)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_nothing_is_read(density, device):
    """Tables are made by the first call; then there are fixed shapes on the device, and no copy."""
    counter = torch.zeros(3, dtype=torch.int64, device=device)
    by_counter = CounterSource(counter)
    by_generator = GeneratorSource(torch.device(device), None)
    soft = TimeWindow(100, 900, 0.5)

    def look_up(timesteps):
        return time.log_ratio_of(timesteps, density, soft, T), time.weights_of(timesteps, density, T)

    look_up(density.draw(by_counter, PURPOSE, 4, T))
    with no_host_sync(device):
        for source in (by_counter, by_generator):
            timesteps = density.draw(source, PURPOSE, 4, T)
            assert timesteps.device.type == device
            assert timesteps.shape == (4,)
            ratio, weights = look_up(timesteps)
            assert ratio.shape == (4,)
            assert weights is None or weights.shape == (4,)


@pytest.mark.parametrize("density", (DENSITIES | STRATIFIED).values(), ids=DENSITIES | STRATIFIED)
def test_a_graph_draws_what_its_counter_says(density):
    """Recorded once, and run again without Python: as another step draws."""
    counter, drawn = torch.tensor([3, 0, 0]), torch.zeros(32, dtype=torch.int64)
    density.draw(CounterSource(counter), PURPOSE, 32, T)
    tape = Tape()
    with tape:
        drawn.copy_(density.draw(CounterSource(counter), PURPOSE, 32, T))
    for step in (5, 6):
        counter[1] = step
        tape.replay()
        assert torch.equal(drawn, density.draw(counted(step), PURPOSE, 32, T))


def test_tables_are_made_once(monkeypatch):
    made, table = [], LogitNormal.table
    monkeypatch.setattr(LogitNormal, "table", lambda self, length: made.append(length) or table(self, length))
    for _ in range(3):
        LogitNormal(0.125, 0.625).draw(counted(), PURPOSE, 4, 77)
    LogitNormal(0.125, 0.625).draw(counted(), PURPOSE, 4, 78)
    assert made == [77, 78]


# --- SISS with two densities --------------------------------------------------------------------------------


def test_log_ratios():
    ratio = log_ratio(TimeWindow(2, 4), TimeWindow(3, 6, outside=0.5), 8)
    # 1 / 2 in [2, 4), against 1 of 5.5 in [3, 6) and half of that elsewhere.
    minus = -math.inf
    expected = [minus, minus, math.log(0.5 / (0.5 / 5.5)), math.log(0.5 / (1 / 5.5)), *[minus] * 4]
    assert ratio.tolist() == pytest.approx(expected)
    assert log_ratio(Uniform(), TimeWindow(2, 4), 8).tolist() == pytest.approx(
        [math.inf] * 2 + [math.log(0.25)] * 2 + [math.inf] * 4
    )
    assert log_ratio(LogitNormal(), LogitNormal(), T).tolist() == [0] * T


@densities
@pytest.mark.parametrize("other", DENSITIES.values(), ids=DENSITIES)
def test_a_ratio_is_a_number_wherever_it_can_be_drawn(density, other):
    ratio = log_ratio(density, other, T)
    assert torch.equal(ratio.isnan(), (density.drawn(T) == 0) & (other.drawn(T) == 0))
    timesteps = torch.cat([how.draw(counted(), PURPOSE, 500, T) for how in (density, other)])
    found = time.log_ratio_of(timesteps, density, other, T)
    if found is None:
        assert torch.equal(density.drawn(T), other.drawn(T))
    else:
        assert torch.equal(found, ratio[timesteps])
        assert not found.isnan().any()


def test_densities_that_are_drawn_alike_have_no_ratio():
    timesteps = torch.arange(4)
    for one, two in (
        (WINDOW, TimeWindow(250, 750)),
        (Uniform(), TimeWindow(250, 750, as_weight=True)),
        (Stratified(LogitNormal()), LogitNormal()),
    ):
        assert time.log_ratio_of(timesteps, one, two, T) is None
    assert time.log_ratio_of(timesteps, Uniform(), WINDOW, T) is not None


# A set of two points, one number each, on eight noise levels, by quadrature.
KEPT, FORGOTTEN, LAMBD = 0.6, -0.3, 0.3
LEVELS = NoiseSchedule(linear_schedule().alpha[250::100], linear_schedule().sigma[250::100])
NODES, NODE_WEIGHTS = (torch.from_numpy(values) for values in np.polynomial.hermite_e.hermegauss(120))
NODE_WEIGHTS = NODE_WEIGHTS / NODE_WEIGHTS.sum()  # of a standard normal number
PAIRS = {
    "window and uniform": (TimeWindow(2, 6), Uniform()),
    "soft window and uniform": (TimeWindow(2, 6, outside=0.2), Uniform()),
    "windows that overlap": (TimeWindow(1, 5), TimeWindow(3, 8)),
    "one index and logit-normal": (TimeWindow(7, 8), LogitNormal()),
    "window of a logit-normal and itself": (Product(TimeWindow(2, 6), LogitNormal(0.5)), LogitNormal(0.5)),
}
pairs = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)


def predicted(x_t, timesteps, parameters):
    """A network of two parameters."""
    slope, offset = parameters
    return torch.sin(slope * x_t) + offset * (1 + timesteps)


@pytest.fixture
def parameters():
    return [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (2.0, 0.1)]


def value_and_gradient(mean, parameters):
    return torch.stack([mean.detach(), *torch.autograd.grad(mean, parameters, retain_graph=True)])


def error_at(image, timestep, parameters, share=None):
    """The expected error about the noise that leads from `image` to x_t, of the noise; times `share(x_t)`."""
    alpha, sigma = LEVELS.alpha[timestep], LEVELS.sigma[timestep]
    x_t = alpha * image + sigma * NODES
    errors = (predicted(x_t, timestep, parameters) - NODES).square()
    if share is not None:
        errors = errors * share(x_t, alpha, sigma)
    return (NODE_WEIGHTS * errors).sum()


def forget_share(x_t, alpha, sigma):
    """Of the mixture at x_t, were both branches at this noise level equally often."""
    kept, forgotten = (
        torch.exp(-0.5 * ((x_t - alpha * image) / sigma).square()) for image in (KEPT, FORGOTTEN)
    )
    return LAMBD * forgotten / (LAMBD * forgotten + (1 - LAMBD) * kept)


def expectation(image, table, parameters, share=None):
    return sum(
        table[timestep] * error_at(image, timestep, parameters, share) for timestep in range(len(LEVELS))
    )


def mixtures_expectation(forget, retain, parameters, *, with_ratio):
    """Both of SISS' terms as `functional.mixture` weights them, in expectation over branch, t and noise."""
    levels, nodes = len(LEVELS), len(NODES)
    half = levels * nodes  # every node of every level from the retain branch, then from the forget branch
    timesteps = torch.arange(levels).repeat_interleave(nodes).repeat(2)
    noise, from_forget = NODES.repeat(2 * levels).view(-1, 1, 1, 1), torch.arange(2 * half) >= half
    densities = torch.cat([(1 - LAMBD) * retain.drawn(levels), LAMBD * forget.drawn(levels)])
    probability = densities.repeat_interleave(nodes) * NODE_WEIGHTS.repeat(2 * levels)
    # What is never drawn is no row: its ratio is no number where neither branch has it.
    drawn = probability > 0
    timesteps, noise, from_forget, probability = (
        values[drawn] for values in (timesteps, noise, from_forget, probability)
    )
    kept, forgotten = torch.full_like(noise, KEPT), torch.full_like(noise, FORGOTTEN)
    ratio = time.log_ratio_of(timesteps, forget, retain, levels) if with_ratio else None
    sample = F.mixture(kept, forgotten, noise, timesteps, LEVELS, LAMBD, from_forget, time_log_ratio=ratio)
    prediction = predicted(sample.x_t.flatten(), timesteps, parameters)
    return tuple(
        (probability * weight * (prediction - target.flatten()).square()).sum()
        for weight, target in (
            (sample.forget_weight, sample.forget_target),
            (sample.retain_weight, sample.retain_target),
        )
    )


@pairs
@pytest.mark.parametrize("backend", ["eager", "auto", "reference"])
def test_losses_and_gradients_of_branches_with_two_densities_are_unbiased(
    pair, backend, parameters, monkeypatch
):
    """Each term is the denoising loss of its own point, over its own density."""
    monkeypatch.setenv("FASTUNLEARN_BACKEND", backend)
    forget, retain = pair
    found = mixtures_expectation(forget, retain, parameters, with_ratio=True)
    for mean, image, density in zip(found, (FORGOTTEN, KEPT), pair, strict=True):
        expected = value_and_gradient(expectation(image, density.table(len(LEVELS)), parameters), parameters)
        torch.testing.assert_close(value_and_gradient(mean, parameters), expected, rtol=1e-9, atol=1e-9)


@pairs
def test_without_the_ratio_they_are_biased_by_a_known_amount(pair, parameters):
    """By the other density in place of one's own, at the other branch's share of x_t.

    Loss and gradient together are off by 8 to 130 % in the forget term, by 2 to 44 % in the retain term.
    """
    forget, retain = pair
    excess = forget.table(len(LEVELS)) - retain.table(len(LEVELS))
    found = mixtures_expectation(forget, retain, parameters, with_ratio=False)
    biases = (
        expectation(FORGOTTEN, -excess, parameters, lambda *x_t: 1 - forget_share(*x_t)),
        expectation(KEPT, excess, parameters, forget_share),
    )
    for mean, bias, image, density in zip(found, biases, (FORGOTTEN, KEPT), pair, strict=True):
        truth = value_and_gradient(expectation(image, density.table(len(LEVELS)), parameters), parameters)
        off = value_and_gradient(mean, parameters) - truth
        torch.testing.assert_close(off, value_and_gradient(bias, parameters), rtol=1e-7, atol=1e-9)
        assert off.norm() > 0.02 * truth.norm()


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: TimeWindow(5, 5), ValueError, r"^start: expected an index below stop, 5, got 5"),
        (lambda: TimeWindow(7, 5), ValueError, r"^start: expected an index below stop, 5, got 7"),
        (lambda: TimeWindow(-1, 5), ValueError, r"^start: expected an integer >= 0, got -1"),
        (lambda: TimeWindow(0.5, 5), TypeError, r"^start: expected an integer, got 0.5"),
        (lambda: TimeWindow(0, True), TypeError, r"^stop: expected an integer, got True"),
        (
            lambda: TimeWindow(0, 5, -0.1),
            ValueError,
            r"^outside: expected a finite number in \[0, inf\), got -0.1",
        ),
        (lambda: TimeWindow(0, 5, math.nan), ValueError, r"^outside: expected a finite number"),
        (lambda: TimeWindow(0, 5, "0"), TypeError, r"^outside: expected a number, got '0'"),
        (lambda: TimeWindow(0, 5, as_weight=1), TypeError, r"^as_weight: expected a bool, got 1"),
        (
            lambda: TimeWindow.middle(3),
            ValueError,
            r"^of: expected an integer >= 4 \(the timesteps of a schedule\), got 3",
        ),
        (lambda: TimeWindow.late("SD"), TypeError, r"^of: expected an integer, got 'SD'"),
        (lambda: LogitNormal(std=0), ValueError, r"^std: expected a finite number in \(0, inf\), got 0"),
        (lambda: LogitNormal(math.inf), ValueError, r"^mean: expected a finite number"),
        (lambda: LogitNormal("0"), TypeError, r"^mean: expected a number, got '0'"),
        (lambda: Stratified((250, 750)), TypeError, r"^density: expected a density of timesteps .*got tuple"),
        (lambda: Stratified(Uniform), TypeError, r"^density: expected a density of timesteps"),
        (
            lambda: Stratified(Stratified(Uniform())),
            ValueError,
            r"^density: expected one that is not stratified",
        ),
        (lambda: Product(WINDOW, None), TypeError, r"^second: expected a density of timesteps .*got None"),
        (lambda: Product(Stratified(WINDOW), WINDOW), ValueError, r"^first: expected a density to multiply"),
        (
            lambda: Product(WINDOW, TimeWindow(0, 5, as_weight=True)),
            ValueError,
            r"^second: expected a density that is drawn from, got as_weight=True",
        ),
    ],
)
def test_bad_densities(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    "density", [TimeWindow(5, 9), Stratified(TimeWindow(5, 9)), TimeWindow(5, 9, as_weight=True)]
)
def test_a_window_beyond_the_schedule_is_refused(density):
    message = r"^stop: expected at most the 8 timesteps of the schedule, got 9"
    for call in (density.table, density.drawn, lambda length: density.draw(counted(), PURPOSE, 4, length)):
        if call == density.drawn and density.weighted:
            continue  # drawn uniformly: its table refuses
        with pytest.raises(ValueError, match=message):
            call(8)
    assert density.table(9).sum() == pytest.approx(1)


def test_densities_that_never_meet_are_refused():
    with pytest.raises(
        ValueError, match=r"^second: expected a density that meets TimeWindow\(start=0, stop=5"
    ):
        Product(TimeWindow(0, 5), TimeWindow(5, 9)).table(9)


@pytest.mark.parametrize("length", [0, -1, 2.0, None])
def test_a_schedule_has_timesteps(length):
    for density in (Uniform(), TimeWindow(0, 1), LogitNormal()):
        with pytest.raises((TypeError, ValueError), match=r"^num_timesteps: expected an integer"):
            density.table(length)


def test_a_schedule_too_short_for_quarters_is_refused():
    with pytest.raises(
        ValueError, match=r"^of: expected an integer >= 4 \(the timesteps of a schedule\), got 3"
    ):
        TimeWindow.middle(linear_schedule(3))
    assert TimeWindow.last(linear_schedule(1)) == TimeWindow(0, 1)
