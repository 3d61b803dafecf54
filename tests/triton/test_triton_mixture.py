"""mixture in Triton: sample, targets and importance weights against float64, at every lambd, from close and
distant pairs.
"""

import pytest
import torch

from fastunlearn import reference
from fastunlearn.kernels.mixture import mixture
from fastunlearn.kernels.noising import noising
from fastunlearn.kernels.redirect import redirect
from fastunlearn.kernels.residual import residual
from fastunlearn.ops import mixture as op
from fastunlearn.testing.budgets import assert_within_budget, budget, relative_error
from fastunlearn.testing.factories import linear_schedule, served

# the interpreter's numpy, at the limits
pytestmark = pytest.mark.filterwarnings(
    "ignore:(overflow|divide by zero|invalid value) encountered:RuntimeWarning"
)

U8, F16, BF16, F32 = torch.uint8, torch.float16, torch.bfloat16, torch.float32
PURPOSE = 5
BATCH = 4
NAMES = ("x_t", "retain_target", "forget_target", "retain_weight", "forget_weight")
CASES = {
    # shape of an image, dtypes of images, noise (None: Philox) and x_t, memory layout
    "one element": ((1, 1, 1), F32, F32, F32, False),
    "mnist": ((1, 28, 28), U8, F32, F32, False),
    "mnist, Philox, bfloat16": ((1, 28, 28), U8, None, BF16, False),
    "odd": ((3, 5, 7), BF16, F16, F16, False),
    "cifar, channels last": ((3, 32, 32), U8, F32, F32, True),
    "odd, Philox, channels last": ((5, 17, 19), F32, None, BF16, True),
    "just more than one program": ((1, 17, 241), F16, F32, F32, False),
    "split and odd, Philox": ((3, 47, 47), U8, None, F32, False),
    "split, channels last": ((3, 48, 48), F32, F32, F32, True),
}


@pytest.fixture
def pair(rows):
    """`pair(shape, dtype, distance)`: five images to keep and five to forget, `distance` bytes apart per
    element, and both in float64.
    """

    def make(shape, dtype, distance):
        keep, _ = rows(5, shape, U8)
        offset, _ = rows(5, shape, U8, seed=1)
        erase = (keep.int() + (offset.int() % (2 * distance + 1)) - distance).clamp(0, 255).to(U8)
        images = [image if dtype == U8 else served(image).to(keep.device, dtype) for image in (keep, erase)]
        exact = [served(image).to(keep.device, torch.float64) for image in images]
        return *images, *exact

    return make


@pytest.fixture
def outputs(output):
    def make(shape, dtype, channels_last):
        images = [
            output(BATCH, *shape, dtype=kind, channels_last=channels_last) for kind in (dtype, F32, F32)
        ]
        return (*images, output(BATCH, dtype=torch.float64), output(BATCH, dtype=torch.float64))

    return make


@pytest.fixture
def drawn(outputs, device):
    """`drawn(eps, channels_last)`: the float32 noise of the kernel, as given, or as it draws it when `x_t` is
    nothing else.
    """

    def make(eps, channels_last):
        if eps.given is not None:
            return eps.plain
        zeros, filled = (
            torch.zeros(eps.plain.shape, device=device),
            outputs(eps.plain.shape[1:], F32, channels_last),
        )
        only_noise = torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64, device=device).repeat(
            BATCH, 1
        )
        chosen = torch.zeros(BATCH, dtype=torch.bool, device=device)
        mixture(
            zeros,
            None,
            zeros,
            None,
            only_noise,
            chosen,
            0.3,
            None,
            None,
            eps.counter,
            PURPOSE,
            F32,
            channels_last,
            *filled,
        )
        assert_within_budget("noise", filled[0], eps.plain, eps.truth)
        return filled[0]

    return make


def closed_form(retain, forget, coefficients, from_forget, lambd, ratio, eps, dtype):
    """The op in plain torch: float64 in, float64 out.

    The papers' formula overflows where images are distant or lambd is 0 or 1.
    """
    return op._eager(
        retain, None, forget, None, coefficients, from_forget, lambd, ratio, eps, None, PURPOSE, dtype, False
    )


def assert_weights(weights, keep, erase, coefficients, from_forget, lambd, eps):
    """Weights within their budget, each sample against its own scale: those of one batch lie many orders of
    magnitude apart.

    Plain torch adds its float64 sums in one of many orders and may have no error at all, so the rounding of
    the exponent comes on top: its terms go through at most 16 levels of sums. What rounding the noise itself
    does to an exponent is 10^7 times as much, and random: `eps` is the noise `drawn`.
    """
    truth = closed_form(keep, erase, coefficients, from_forget, lambd, None, eps.double(), torch.float64)
    plain = closed_form(keep.float(), erase.float(), coefficients, from_forget, lambd, None, eps, F32)
    rho, difference = coefficients[:, 0] / coefficients[:, 1], (keep - erase).flatten(1)
    terms = rho * (eps.flatten(1) * difference).abs().sum(1) + 0.5 * rho.square() * difference.square().sum(1)
    rounding = 16 * torch.finfo(torch.float64).eps * (1 + terms)
    for name, actual, near, exact in zip(NAMES[3:], weights, plain[3:], truth[3:], strict=True):
        for sample in range(BATCH):
            value, expected = actual[sample], exact[sample]
            if expected.isinf():
                assert value == expected, f"{name}[{sample}]"
            else:
                allowed = budget(near[sample], expected) + rounding[sample] * expected
                assert (value - expected).abs() <= allowed, (
                    f"{name}[{sample}]: expected {expected:.17g} within {allowed:.3g}, got {value:.17g}"
                )


@pytest.mark.parametrize("case", CASES)
def test_values(case, device, pair, noise, outputs, drawn):
    shape, images_dtype, noise_dtype, dtype, channels_last = CASES[case]
    schedule, timesteps = (
        linear_schedule(prediction_type="v_prediction"),
        torch.tensor([999, 500, 3, 0], device=device),
    )
    retain, forget, keep, erase = pair(shape, images_dtype, 2)
    retain_index, forget_index = (
        torch.tensor([4, 0, 4, 1], device=device),
        torch.tensor([1, 1, 4, 1], device=device),
    )
    eps, from_forget = (
        noise((BATCH, *shape), noise_dtype, PURPOSE),
        torch.tensor([True, False, True, False], device=device),
    )
    coefficients, filled = schedule.coefficients(timesteps), outputs(shape, dtype, channels_last)
    mixture(
        retain,
        retain_index,
        forget,
        forget_index,
        coefficients,
        from_forget,
        0.3,
        None,
        eps.given,
        eps.counter,
        PURPOSE,
        dtype,
        channels_last,
        *filled,
    )

    keep, erase = keep[retain_index], erase[forget_index]
    truth = closed_form(keep, erase, coefficients, from_forget, 0.3, None, eps.truth, torch.float64)
    plain = closed_form(keep.float(), erase.float(), coefficients, from_forget, 0.3, None, eps.plain, dtype)
    for name, actual, near, exact in zip(NAMES[:3], filled[:3], plain[:3], truth[:3], strict=True):
        assert_within_budget(name, actual, near, exact)
    assert_weights(filled[3:], keep, erase, coefficients, from_forget, 0.3, drawn(eps, channels_last))


def test_a_store_of_bytes_and_one_of_floats(device, pair, noise, outputs, drawn):
    schedule, timesteps, shape = linear_schedule(), torch.tensor([999, 500, 3, 0], device=device), (3, 7, 9)
    retain, forget, keep, erase = pair(shape, U8, 2)
    eps, from_forget, filled = (
        noise((BATCH, *shape), None, PURPOSE),
        torch.tensor([True, False, True, False], device=device),
        outputs(shape, F32, False),
    )
    coefficients = schedule.coefficients(timesteps)
    rows, philox = (retain[:4], None, served(forget[:4]).to(device), None), (None, eps.counter, PURPOSE)
    mixture(*rows, coefficients, from_forget, 0.3, None, *philox, F32, False, *filled)
    truth = closed_form(keep[:4], erase[:4], coefficients, from_forget, 0.3, None, eps.truth, torch.float64)
    plain = closed_form(
        keep[:4].float(), erase[:4].float(), coefficients, from_forget, 0.3, None, eps.plain, F32
    )
    for name, actual, near, exact in zip(NAMES[:3], filled[:3], plain[:3], truth[:3], strict=True):
        assert_within_budget(name, actual, near, exact)
    assert_weights(filled[3:], keep[:4], erase[:4], coefficients, from_forget, 0.3, drawn(eps, False))


def test_weights_are_the_papers(device, pair, noise, outputs):
    shape, timesteps = (3, 8, 8), torch.tensor([999, 700, 300, 100], device=device)
    schedule, (retain, forget, keep, erase) = linear_schedule(), pair(shape, F32, 3)
    eps, from_forget, filled = (
        noise((BATCH, *shape), F32, PURPOSE),
        torch.tensor([True, False, False, True], device=device),
        outputs(shape, F32, False),
    )
    ratio = torch.tensor([0.5, -1.0, 2.0, 0.0], device=device)
    coefficients = schedule.coefficients(timesteps)
    mixture(
        retain[:4],
        None,
        forget[:4],
        None,
        coefficients,
        from_forget,
        0.3,
        ratio,
        eps.given,
        None,
        PURPOSE,
        F32,
        False,
        *filled,
    )
    literal = reference.mixture(
        keep[:4], erase[:4], eps.truth, timesteps, schedule, 0.3, from_forget, time_log_ratio=ratio.double()
    )
    for name, actual, exact in zip(NAMES, filled, literal, strict=True):
        assert relative_error(actual, exact) < 1e-6, name


@pytest.mark.parametrize("distance", [2, 127])
@pytest.mark.parametrize("lambd", [0.0, 1e-6, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(3, 9, 9), (3, 47, 47)])
def test_weights_at_the_limits(shape, lambd, distance, device, pair, noise, outputs):
    schedule, timesteps = linear_schedule(), torch.tensor([0, 999, 999, 600], device=device)
    retain, forget, keep, erase = pair(shape, U8, distance)
    eps, from_forget, filled = (
        noise((BATCH, *shape), F32, PURPOSE),
        torch.tensor([True, False, True, False], device=device),
        outputs(shape, F32, False),
    )
    coefficients = schedule.coefficients(timesteps)
    mixture(
        retain[:4],
        None,
        forget[:4],
        None,
        coefficients,
        from_forget,
        lambd,
        None,
        eps.given,
        None,
        PURPOSE,
        F32,
        False,
        *filled,
    )
    assert_weights(filled[3:], keep[:4], erase[:4], coefficients, from_forget, lambd, eps.plain)


@pytest.mark.parametrize("distance", [0, 127])
@pytest.mark.parametrize("lambd", [0.0, 1e-6, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(3, 9, 9), (3, 47, 47)])
def test_an_infinite_time_log_ratio_decides_alone(shape, lambd, distance, device, pair, noise, outputs):
    """At t = 0 distant images make exponents of 1e8: beside them, too, the weights are 0 and 1 / share."""
    timesteps = torch.tensor([0, 0, 600, 999], device=device)
    retain, forget, _, _ = pair(shape, U8, distance)
    eps, filled = noise((BATCH, *shape), F32, PURPOSE), outputs(shape, F32, False)
    from_forget = torch.tensor([True, True, False, False], device=device)
    ratio = torch.tensor([torch.inf, -torch.inf, torch.inf, -torch.inf], dtype=torch.float64, device=device)
    coefficients = linear_schedule().coefficients(timesteps)
    rest = coefficients, from_forget, lambd, ratio, eps.given, None, PURPOSE, F32, False
    mixture(retain[:4], None, forget[:4], None, *rest, *filled)
    of_retain, of_forget = (1 / share if share else torch.inf for share in (1 - lambd, lambd))
    assert filled[3].tolist() == [0.0, of_retain, 0.0, of_retain]
    assert filled[4].tolist() == [of_forget, 0.0, of_forget, 0.0]


@pytest.mark.parametrize("name", ["retain", "forget", "noise", "x_t"])
def test_float64_is_refused(name, device):
    images = {
        key: torch.zeros(1, 1, 2, 2, device=device, dtype=torch.float64 if key == name else F32)
        for key in ("retain", "forget", "noise", "x_t")
    }
    coefficients, weight = (
        torch.zeros(1, 5, dtype=torch.float64, device=device),
        torch.zeros(1, dtype=torch.float64, device=device),
    )
    target, chosen = torch.zeros(1, 1, 2, 2, device=device), torch.zeros(1, dtype=torch.bool, device=device)
    with pytest.raises(
        TypeError,
        match=f"mixture: {name}: expected float16, bfloat16, float32 or uint8 on a GPU, got torch.float64",
    ):
        mixture(
            images["retain"],
            None,
            images["forget"],
            None,
            coefficients,
            chosen,
            0.5,
            None,
            images["noise"],
            None,
            PURPOSE,
            F32,
            False,
            images["x_t"],
            target,
            target,
            weight,
            weight,
        )


def test_an_image_whose_elements_32_bits_do_not_number_is_refused(device):
    """Of one number in memory. Its offsets would wrap around, and the kernel read and write elsewhere."""
    image = torch.zeros(1, device=device).expand(1, 2, 2**15, 2**15)
    weight = torch.zeros(1, dtype=torch.float64, device=device)
    chosen = torch.zeros(1, dtype=torch.bool, device=device)
    coefficients = torch.zeros(1, 5, dtype=torch.float64, device=device)
    end, pair = (image, None, PURPOSE, F32, False), (image, None, image, None, coefficients)
    neighbors = image, None, image[:, None], None, coefficients
    launches = {
        "mixture": lambda: mixture(*pair, chosen, 0.5, None, *end, image, image, image, weight, weight),
        "noising": lambda: noising(
            image, None, coefficients, image, None, PURPOSE, True, F32, False, image, image
        ),
        "residual": lambda: residual(image, image, weight, weight, image),
        "redirect": lambda: redirect(*neighbors, None, *end, image, image, weight, weight[:, None]),
    }
    for name, launch in launches.items():
        expected = rf"{name}: expected images of at most {2**31 - 2**14} elements on a GPU, got {2**31}"
        with pytest.raises(ValueError, match=expected):
            launch()
