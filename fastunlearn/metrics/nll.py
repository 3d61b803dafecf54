"""Likelihood in bits per dimension by the probability-flow ODE of a variance-preserving diffusion.

Song et al. 2021, eq. 39 and D.1, in two forms. `"papers"`: the papers (SISS, ReTrack) evaluate a
discrete-time DDPM of linear betas as if it were continuous. At ODE time t in [0, 1] the network is told
`floor((T-1) t)` and its prediction is divided by the sigma of that timestep. This is the same computation, on
the model's device instead of in SciPy. `"angle"`: for any schedule. With `alpha = cos(phi)`,
`sigma = sin(phi)` the flow is `dx/dphi = v`, what a v-prediction predicts; between two timesteps the network
is told the fraction that their angles say.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..host import check, finite
from ..models.sampling import eval_mode, sample_seed
from ..objective.schedule import NoiseSchedule

START = 1e-5  # the lower end of the papers' ODE, as in Song et al.'s code
ODES = ("papers", "angle")
ENDS_IN_NOISE = 0.01  # alphas_cumprod up to which N(0, I) stands for the last level: 0.01 bit a dimension
IS_NOISE = 1e-5  # alphas_cumprod below which nothing is left to integrate
LINEAR = 1e-5  # how far alphas_cumprod may be from those of linear betas that count as linear


@dataclass(frozen=True)
class Likelihood:
    """Negative log-likelihood in bits per dimension of each image, and their mean.

    Compare numbers of one form of the ODE: the other may be off by a fifth of a bit.
    """

    bits_per_dim: tuple[float, ...]
    mean: float
    evaluations: int  # how many calls of the network, with gradient, it took
    ode: str = "papers"  # or "angle"

    def __post_init__(self):
        each = {f"image {row}": bits for row, bits in enumerate(self.bits_per_dim)}
        finite.numbers("likelihood", mean=self.mean, **each)


def check_schedule(schedule: NoiseSchedule, ode: str | None = None) -> str:
    """Which ODE gives the likelihood of a model: `"papers"` for linear betas, `"angle"` for others.

    Args:
        schedule: of the model.
        ode: the one that is wanted, or None.

    Raises:
        ValueError: a flow schedule; noise levels that do not grow, or do not end in noise; `"papers"` for
            betas that are not linear.
    """
    if schedule.prediction_type == "flow":
        raise ValueError("schedule: expected a variance-preserving schedule, got flow matching")
    if ode is not None:
        check.one_of("ode", ode, ODES)
    last = schedule.alpha[-1].item() ** 2
    if last > ENDS_IN_NOISE:
        raise ValueError(
            f"schedule: expected one that ends in noise (alphas_cumprod of at most {ENDS_IN_NOISE:g} "
            f"at its last timestep), got {last:.3g}"
        )
    _, _, deviation = _linear_betas(schedule)
    linear = deviation <= LINEAR
    if ode == "papers" and not linear:
        raise ValueError(
            "schedule: expected linear betas (the discrete VP SDE of the papers' likelihood ODE), "
            f"got noise levels off that form by {deviation:.2g} in alphas_cumprod"
        )
    if ode is None:
        ode = "papers" if linear else "angle"
    if ode == "angle":
        growing = len(schedule) >= 2 and _angles(schedule).diff().gt(0).all()
        if not growing:
            raise ValueError(
                "schedule: expected at least two noise levels, each above the one before, got others"
            )
    return ode


def check_likelihood(model: nn.Module | Callable, schedule: NoiseSchedule, image: Tensor) -> str:
    """Whether `bits_per_dim` can be had for `image` `[1, C, H, W]`, by one call of the network; by which ODE.

    Raises:
        TypeError, ValueError, NotFiniteError: what `bits_per_dim` would raise of this model.
    """
    finite.rows("images", check.images("images", image))
    ode = check_schedule(schedule)
    finite.weights(model)
    device, dtype = _home(model, image)
    x = image.to(device, dtype)
    with eval_mode(model), torch.no_grad():
        output = model(x, torch.zeros(len(x), device=device))
    finite.rows("predictions", _prediction(output, x))
    return ode


def bits_per_dim(
    model: nn.Module | Callable,
    schedule: NoiseSchedule,
    images: Tensor,
    *,
    seed: int = 0,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    interpolate: bool = False,
    ode: str | None = None,
) -> Likelihood:
    """Bits per dimension of `images` under the model, along the probability-flow ODE.

    The density follows from the instantaneous change of variables. The divergence is estimated with one
    Rademacher probe an image (Hutchinson); dopri5 in float64, one error norm over all images, as SciPy's RK45
    in the papers' code. No dequantisation; + 7 bits turn densities on [-1, 1] into 8-bit pixels.

    Args:
        model: `callable(x_t, t)`, differentiable in `x_t`; called with float32 `[N, C, H, W]` (or its own
            dtype) and float32 `t` `[N]`.
        schedule: variance-preserving, of any prediction type but flow.
        images: `[N, C, H, W]` in [-1, 1]; integrated together, so give few.
        seed: selects the probes; probe i depends on `(seed, i)` alone.
        rtol, atol: of the ODE solver; 1e-5 in the papers. 1e-3 costs a fraction and is right to about 0.01
            bit where the score is smooth.
        interpolate: of `"papers"`: tell the network `(T-1) t` itself and interpolate sigma, instead of
            rounding down. The integrand becomes continuous, which the solver rewards with far fewer
            evaluations; the number differs slightly from the papers' convention.
        ode: `"papers"` (linear betas only) or `"angle"` (any schedule); None: the papers' where the betas are
            linear.

    Raises:
        TypeError, ValueError: for an argument outside its range, or a schedule that `check_schedule` refuses.
        NotFiniteError: a ValueError; an image, a weight, a prediction or the result is not finite.
    """
    from torchdiffeq import odeint

    finite.pixels("images", images)
    rtol = check.number("rtol", rtol, low=0, low_open=True)
    atol = check.number("atol", atol, low=0, low_open=True)
    seed = check.integer("seed", seed, low=0)
    ode = check_schedule(schedule, ode)
    finite.weights(model)
    flow = _PapersFlow(schedule, interpolate) if ode == "papers" else _AngleFlow(schedule)
    device, dtype = _home(model, images)
    flow.table = flow.table.to(device)
    probes = [_rademacher(images.shape[1:], sample_seed(seed, row)) for row in range(len(images))]
    velocity = _Velocity(model, flow, torch.stack(probes).to(device), dtype)

    # The state of the ODE is [N, D + 1]: the pixels, and how much the log-density has changed so far.
    num_dims = images[0].numel()
    pixels = flow.scale_at_start * images.to(device, torch.float64).flatten(1)
    start = torch.cat([pixels, torch.zeros(len(images), 1, dtype=torch.float64, device=device)], dim=1)
    span = torch.tensor(flow.span, dtype=torch.float64, device=device)
    with eval_mode(model), torch.no_grad():
        # `step_t`: the last step ends there, as SciPy's does; torchdiffeq would step past it, where there is
        # no schedule, and interpolate.
        solver = {"rtol": rtol, "atol": atol, "method": "dopri5", "options": {"step_t": span[1:]}}
        end = odeint(velocity, start, span, **solver)[-1]

    # log p(x_0) = log N(x_1; 0, I) + integral of div f, and D log(scale) for pixels that were scaled before.
    prior = -0.5 * (num_dims * math.log(2 * math.pi) + end[:, :num_dims].square().sum(1))
    log_density = prior + end[:, num_dims] + num_dims * math.log(flow.scale_at_start)
    # A grey level is 2 / 256 = 2^-7 wide in [-1, 1], so the probability of one is the density times that.
    bits = (-log_density / (num_dims * math.log(2)) + 7).tolist()
    return Likelihood(tuple(bits), sum(bits) / len(bits), velocity.evaluations, ode)


class _Velocity:
    """The right-hand side of the ODE: how pixels and log-density move, for torchdiffeq.

    Args:
        probes: float64 `[N, C, H, W]` of +1 and -1.
        dtype: of the network.
    """

    def __init__(self, model, flow: _PapersFlow | _AngleFlow, probes: Tensor, dtype: torch.dtype):
        self.model, self.flow, self.probes, self.dtype = model, flow, probes, dtype
        self.evaluations = 0

    def __call__(self, time: Tensor, state: Tensor) -> Tensor:
        """The derivative of `state` float64 `[N, D + 1]`."""
        self.evaluations += 1
        flow, probes = self.flow, self.probes
        position = state[:, :-1].reshape(probes.shape)
        # Hutchinson: tr(ds/dx) is the expectation of z^T (ds/dx) z over probes z.
        with torch.enable_grad():
            x = position.to(self.dtype).requires_grad_()
            output = self.model(x, flow.timestep(time).to(torch.float32).expand(len(x)))
            signal = flow.signal(time, _prediction(output, x).double(), x.double())
            (projected,) = torch.autograd.grad((signal * probes).sum(), x)
        trace = (projected.double() * probes).flatten(1).sum(1)
        drift, divergence = flow.velocity(time, signal.detach(), trace, position)
        return finite.rows("predictions", torch.cat([drift.flatten(1), divergence[:, None]], dim=1))


class _PapersFlow:
    """`dx/dt = beta(t) / 2 (eps / sigma - x)`, t in [1e-5, 1], of linear betas."""

    scale_at_start = 1.0
    span = (START, 1.0)

    def __init__(self, schedule: NoiseSchedule, interpolate: bool):
        self.prediction_type, self.interpolate = schedule.prediction_type, interpolate
        self.beta_min, self.beta_max, _ = _linear_betas(schedule)
        self.table = torch.stack([schedule.alpha, schedule.sigma])

    def timestep(self, time: Tensor) -> Tensor:
        """What the network is told at `time`."""
        timestep, _, _ = self._look_up(time)
        return timestep

    def signal(self, time: Tensor, prediction: Tensor, x: Tensor) -> Tensor:
        """eps, from what the network predicts."""
        _, alpha, sigma = self._look_up(time)
        # With x = alpha x_0 + sigma eps and v = alpha eps - sigma x_0: eps = alpha v + sigma x.
        if self.prediction_type == "v_prediction":
            return alpha * prediction + sigma * x
        # eps = (x - alpha x_0) / sigma
        if self.prediction_type == "sample":
            return (x - alpha * prediction) / sigma
        return prediction

    def velocity(self, time: Tensor, noise: Tensor, trace: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """dx/dt = f - g^2 score / 2, score = -eps / sigma, and its divergence, by that of eps."""
        _, _, sigma = self._look_up(time)
        beta = self.beta_min + time * (self.beta_max - self.beta_min)
        drift = 0.5 * beta * (noise / sigma - position)
        return drift, 0.5 * beta * (trace / sigma - position[0].numel())

    def _look_up(self, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Timestep, alpha and sigma at ODE time `time`."""
        position = (self.table.shape[1] - 1) * time
        below = position.floor().long()
        if not self.interpolate:
            return below, *self.table[:, below]
        above = (below + 1).clamp(max=self.table.shape[1] - 1)
        alpha, sigma = torch.lerp(self.table[:, below], self.table[:, above], position - below)
        return position, alpha, sigma


class _AngleFlow:
    """`dx/dphi = v`, from the angle of the first timestep to that of the last, or to where all is noise.

    The start is the image as the first timestep shows it, without its noise: the density is that of the image
    under noise of standard deviation `sigma_0 / alpha_0`, below which the network knows nothing.
    """

    def __init__(self, schedule: NoiseSchedule):
        self.prediction_type = schedule.prediction_type
        self.table = _angles(schedule)
        first, last = self.table[0].item(), self.table[-1].item()
        self.span = first, min(last, math.acos(math.sqrt(IS_NOISE)))
        self.scale_at_start = math.cos(first)

    def timestep(self, angle: Tensor) -> Tensor:
        """What the network is told at `angle`: between two timesteps, the fraction that their angles say."""
        above = torch.searchsorted(self.table, angle).clamp(1, len(self.table) - 1)
        low, high = self.table[above - 1], self.table[above]
        return above - 1 + ((angle - low) / (high - low)).clamp(0, 1)

    def signal(self, angle: Tensor, prediction: Tensor, x: Tensor) -> Tensor:
        """v = alpha eps - sigma x_0, from what the network predicts."""
        alpha, sigma = angle.cos(), angle.sin()
        # With eps = (x - alpha x_0) / sigma and alpha^2 + sigma^2 = 1: v = (alpha x - x_0) / sigma.
        if self.prediction_type == "sample":
            return (alpha * x - prediction) / sigma
        # With x_0 = (x - sigma eps) / alpha: v = (eps - sigma x) / alpha.
        if self.prediction_type == "epsilon":
            return (prediction - sigma * x) / alpha
        return prediction

    def velocity(self, angle: Tensor, v: Tensor, trace: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """dx/dphi = v, and its divergence."""
        return v, trace


def _home(model: nn.Module | Callable, images: Tensor) -> tuple[torch.device, torch.dtype]:
    """Where the model computes, and in which dtype: those of its first parameter."""
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    if parameter is None:
        return images.device, torch.float32
    return parameter.device, parameter.dtype


def _angles(schedule: NoiseSchedule) -> Tensor:
    """`phi` of every timestep, `[T]`: its tangent is sigma / alpha."""
    return torch.atan2(schedule.sigma, schedule.alpha)


def _prediction(output, x: Tensor) -> Tensor:
    """The first C of the C or 2C channels that the network returned for `x` `[N, C, H, W]`."""
    prediction = check.network_output(output)
    channels = x.shape[1]
    shapes = [[len(x), count, *x.shape[2:]] for count in (channels, 2 * channels)]
    if not isinstance(prediction, Tensor) or list(prediction.shape) not in shapes:
        expected = " or ".join(map(str, shapes))
        got = check.describe(prediction)
        raise ValueError(f"model: expected a prediction of shape {expected}, got {got}")
    return prediction[:, :channels]


def _linear_betas(schedule: NoiseSchedule) -> tuple[float, float, float]:
    """`beta(0)` and `beta(1)` of the SDE that the schedule discretises, and how far it is from it.

    They are T times the first and last beta of the nearest line: 0.1 and 20 for DDPM's.
    """
    # beta_t = 1 - alphas_cumprod_t / alphas_cumprod_(t-1). A schedule may end at 0, and stay there.
    steps = len(schedule)
    alphas_cumprod = schedule.alpha.square()
    before = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
    betas = 1 - alphas_cumprod / before.clamp(min=torch.finfo(torch.float64).tiny)
    # The nearest line by least squares, and the noise levels that it would give.
    position = torch.linspace(0, 1, steps, dtype=torch.float64)
    basis = torch.stack([torch.ones_like(position), position], dim=1)
    line = torch.linalg.lstsq(basis, betas[:, None]).solution[:, 0]
    fitted = (1 - line[0] - line[1] * position).cumprod(0)
    deviation = (fitted - alphas_cumprod).abs().max().item()
    return steps * line[0].item(), steps * (line[0] + line[1]).item(), deviation


def _rademacher(shape: tuple[int, ...], seed: int) -> Tensor:
    """float64 of +1 and -1, each with probability one half."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, tuple(shape), generator=generator).double() * 2 - 1
