"""Windows of time and bands of frequency under methods with an objective or a band of their own: against the
literal losses in float64, or refused by name.
"""

from dataclasses import replace

import pytest
import torch
from small_methods import Pairs, Rows, Toward, Whole, gradient_of
from test_hooks import SCHEDULE, World
from test_hooks_hostile import Several, take_retain
from torch import Tensor

from fastunlearn import Draws, ImageStore, LowPass, Unlearner, method_step
from fastunlearn import functional as F
from fastunlearn.objective.combine import Rescale
from fastunlearn.objective.draws import GeneratorSource, complete
from fastunlearn.objective.selection import Selection
from fastunlearn.objective.time import Stratified, TimeWindow
from fastunlearn.reference.combine import rescale
from fastunlearn.reference.lowpass_residual import full_mask
from fastunlearn.testing.budgets import relative_l2
from fastunlearn.testing.factories import TinyDenoiser

METHODS = [Pairs(), Whole(), Rows()]
WINDOWS = {"time_window": Stratified(TimeWindow(300, 600)), "retain_density": TimeWindow(0, 100, outside=0.1)}
BAND = LowPass(schedule="step_increase", start=0.2, stop=0.8, high_frequency_weight=0.1)
STEP, TOTAL_STEPS = 5, 9


@pytest.fixture
def world():
    return World()


def drawn(world: World, method) -> Draws:
    source = GeneratorSource(torch.device("cpu"), torch.Generator().manual_seed(4))
    wanted = Selection(**WINDOWS).draws_of(method, SCHEDULE)
    return complete(Draws(), wanted, source, world.forget, world.retain, len(SCHEDULE))


def losses_in_the_band(world: World, model, draws: Draws) -> dict[str, Tensor]:
    """`{role: [B]}` by Fourier transforms; the retain losses keep all frequencies."""
    x_t, target = F.noised(world.forget, draws.forget_noise, draws.forget_timesteps, SCHEDULE)
    residual = model(x_t, draws.forget_timesteps) - target
    table, inside, outside = BAND.at(STEP, TOTAL_STEPS).mask(8, 8)
    mask = full_mask(table, 8, 8, inside, outside)
    filtered = torch.fft.ifft2(mask * torch.fft.fft2(residual)).real
    return world.losses(model, draws) | {"forget": filtered.square().flatten(1).sum(1)}


# 1 cannot hold a pair, 2 and 3 hold one, 4 two of five; 10 all.
@pytest.mark.parametrize("rows", [None, 1, 3, 4])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_an_objective_sees_the_losses_of_the_band_in_the_window(world, method, rows):
    draws = drawn(world, method)
    options = {"reference_model": world.reference} if "reference" in method.needs else {}
    band = {"lowpass": BAND, "step": STEP, "total_steps": TOTAL_STEPS}
    out, ours = gradient_of(
        method, world.model, SCHEDULE, **world.images, draws=draws, **WINDOWS, **band, **options,
        micro_batch_size=rows,
    )  # fmt: skip

    losses = losses_in_the_band(world, world.model, draws)
    with torch.no_grad():
        reference = losses_in_the_band(world, world.reference, draws)
    found = method.objective(losses, reference if options else {}, 8 * 8)
    values = {name: sum(each.mean() for each in own.values()) for name, own in found.items()}
    if isinstance(method.combine, Rescale):
        expected = world_rescaled(world, values, method.combine.scaling_norm)
    else:
        expected = world.literal(values["total"])
    assert relative_l2([ours], [expected]) <= 1e-11
    for role, loss in losses.items():
        torch.testing.assert_close(getattr(out, f"{role}_loss"), loss.detach().mean(), rtol=1e-11, atol=0)


def world_rescaled(world: World, values: dict[str, Tensor], norm: float) -> Tensor:
    parameters = list(world.model.parameters())
    main, correction = (
        list(torch.autograd.grad(values[name], parameters, retain_graph=True))
        for name in ("retain", "forget")
    )
    return torch.cat([each.flatten() for each in rescale(main, correction, norm).gradients])


def stores():
    images = torch.randint(
        0, 256, (24, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    return {"forget": ImageStore(images[:4]), "retain": ImageStore(images[4:])}


def unlearner(method, **options) -> Unlearner:
    model = TinyDenoiser()
    if "reference" in method.needs:
        options["reference_model"] = TinyDenoiser(seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    return Unlearner(model, optimizer, SCHEDULE, method, **stores(), batch_size=6, **options)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_pairs_draw_from_both_windows(method):
    """Those of a pair share a timestep only while both branches draw alike."""
    _, draws = unlearner(method, **WINDOWS)._draw(Draws())
    forget, retain = draws.forget_timesteps, draws.retain_timesteps
    assert ((forget >= 300) & (forget < 600)).all()
    assert (retain < 100).any()
    if isinstance(method, Pairs):
        _, draws = unlearner(
            method, time_window=WINDOWS["time_window"], retain_density=TimeWindow(300, 600)
        )._draw(Draws())
        assert torch.equal(draws.forget_timesteps, draws.retain_timesteps)


@pytest.mark.parametrize("rows", [1, 3, 4])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_steps_of_an_unlearner_may_be_split_at_will(method, rows):
    """The band moves between them."""
    options = WINDOWS | {"lowpass": BAND, "total_steps": TOTAL_STEPS}
    whole, parts = unlearner(method, **options), unlearner(method, micro_batch_size=rows, **options)
    for _ in range(4):
        one, two = whole.step(), parts.step()
        torch.testing.assert_close(two.loss, one.loss, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(two.grad_norm, one.grad_norm, rtol=1e-4, atol=1e-6)


# --- a band of the method's own -----------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 4, torch.tensor(7)])
def test_a_band_of_a_method_may_have_a_schedule(world, step):
    at = {"step": step, "total_steps": TOTAL_STEPS}
    _, ours = take_retain(world, Several({"band": BAND}, {"scale": 0.5}), **at)
    fixed = BAND.at(int(step), TOTAL_STEPS)
    _, expected = take_retain(world, Several({"band": fixed}, {"scale": 0.5}))
    assert relative_l2([ours], [expected]) <= 1e-13
    _, masked = take_retain(world, Several({"band": fixed.mask(8, 8)}, {"scale": 0.5}))
    assert relative_l2([masked], [expected]) == 0
    message = r"^Term.band: expected a mask for images of 8 x 8, got one for 16 x 16$"
    with pytest.raises(ValueError, match=message):
        take_retain(world, Several({"band": fixed.mask(16, 16)}, {"scale": 0.5}))


def test_a_band_of_a_method_moves_with_an_unlearner():
    class Moves(Several):
        def __init__(self):
            super().__init__({"band": BAND})

    run = unlearner(Moves(), total_steps=TOTAL_STEPS)
    run.optimizer.param_groups[0]["lr"] = 0.0
    batch, draws = run._draw(Draws())
    fixed = replace(draws, retain_noise=draws.retain_noise.numbers())
    run._draw = lambda given: (batch, fixed)
    losses = [float(run.step().retain_loss) for _ in range(TOTAL_STEPS + 2)]
    # Four stages, and the last one stays.
    assert len(set(losses)) == 4
    assert losses == sorted(losses)
    assert losses[-3:] == [losses[-1]] * 3


def test_a_band_of_a_method_asks_for_the_step(world):
    with pytest.raises(
        ValueError, match=r"^step: expected a number with the schedule 'step_increase' of lowp"
    ):
        take_retain(world, Several({"band": BAND}), total_steps=TOTAL_STEPS)
    with pytest.raises(
        ValueError, match=r"^total_steps: expected a number with the schedule 'step_increase'"
    ):
        unlearner(Several({"band": BAND})).step()
    assert all(parameter.grad is None for parameter in world.model.parameters())


# --- refused ------------------------------------------------------------------------------------------------

AS_WEIGHT = TimeWindow(0, 500, as_weight=True)
REFUSED = [
    (
        {"time_window": AS_WEIGHT},
        r"^time_window: expected a density that is drawn from \({name} makes more of",
    ),
    ({"time_window": Stratified(AS_WEIGHT)}, r"^time_window: expected a density that is drawn from"),
    ({"retain_density": AS_WEIGHT}, r"^retain_density: expected a density that is drawn from"),
    ({"loss_weight": "min_snr"}, r"^loss_weight: expected None \({name} makes more of its losses than a"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_weights_are_refused_where_losses_are_more_than_summed(world, method, options, message):
    message = message.replace("{name}", type(method).__name__)
    reference = {"reference_model": world.reference} if "reference" in method.needs else {}
    with pytest.raises(ValueError, match=message):
        method_step(method, world.model, None, SCHEDULE, **world.images, **reference, **options)
    with pytest.raises(ValueError, match=message):
        unlearner(method, **options)
    run = unlearner(method)
    with pytest.raises(ValueError, match=message):
        run.selection = Selection(**options)


def test_two_bands_are_refused(world):
    message = r"^lowpass: expected None \(Toward has a band of its own\), got LowPass"
    given = {"forget": world.forget, "reference_model": world.reference, "lowpass": LowPass(0.25)}
    with pytest.raises(ValueError, match=message):
        method_step(Toward(), world.model, None, SCHEDULE, **given)
