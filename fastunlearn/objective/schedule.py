"""The forward process `x_t = alpha_t x_0 + sigma_t eps`, and what the network is asked to predict.

The tables are float64: the importance weights of every method multiply distances by `(alpha_t / sigma_t)^2`,
up to 1e4 at small t.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..host import check

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow")
FLOW_MATCHING = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")


class NoiseSchedule:
    """Signal and noise levels for every timestep index, and the model's prediction type.

    Args:
        alpha: `[T]`, signal level of each timestep; kept in float64.
        sigma: `[T]`, noise level of each timestep; kept in float64.
        model_timesteps: `[T]`, what the network receives for each index (default: the index itself).
        prediction_type: what the network returns: `"epsilon"`, `"v_prediction"` (`alpha eps - sigma x_0`),
            `"sample"` (`x_0`) or `"flow"` (`eps - x_0`).

    Raises:
        TypeError, ValueError: for tables of different length or with values that no forward process has, or
            an unknown prediction type.
    """

    def __init__(
        self,
        alpha: Tensor,
        sigma: Tensor,
        model_timesteps: Tensor | None = None,
        prediction_type: str = "epsilon",
    ):
        alpha, sigma = _table("alpha", alpha), _table("sigma", sigma)
        if alpha.shape != sigma.shape:
            raise ValueError(f"sigma: expected the length of alpha, {len(alpha)}, got {len(sigma)}")
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"prediction_type: expected one of {', '.join(PREDICTION_TYPES)}, got {prediction_type!r}"
            )
        if model_timesteps is None:
            model_timesteps = torch.arange(len(alpha))
        elif not isinstance(model_timesteps, Tensor) or model_timesteps.shape != alpha.shape:
            raise ValueError(
                f"model_timesteps: expected a tensor of shape {tuple(alpha.shape)}, "
                f"got {_describe(model_timesteps)}"
            )
        self.alpha, self.sigma = alpha, sigma
        self.model_timesteps, self.prediction_type = model_timesteps.cpu(), prediction_type

        # Where the loss is defined: with sigma = 0 the noise cannot be told from the image, and a network
        # that predicts eps says nothing of the image where alpha = 0.
        usable = self.sigma > 0
        if prediction_type == "epsilon":
            usable = usable & (self.alpha > 0)
        self._usable, self._all_usable = usable, bool(usable.all())

        # What is looked up for a timestep, and what is found for one outside the schedule: NaN, or the first
        # model timestep where those are integers.
        nowhere = torch.nan
        if not self.model_timesteps.is_floating_point():
            nowhere = int(self.model_timesteps[0])
        coefficients = self._coefficient_table()
        self._on_host = _with_ends(coefficients, torch.nan), _with_ends(self.model_timesteps, nowhere)
        self._on_device: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __setattr__(self, name: str, value) -> None:
        """Attributes are set once: the tables of `coefficients` are made of them, and would not follow."""
        if name in self.__dict__:
            expected = "a NoiseSchedule of its own (tables are made once)"
            raise AttributeError(f"{name}: expected {expected}, got an assignment")
        super().__setattr__(name, value)

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Tensor, **kwargs) -> NoiseSchedule:
        """A variance-preserving schedule from `alphas_cumprod` `[T]`.

        `alpha = sqrt(abar)`, `sigma = sqrt(1 - abar)`, in float64.
        """
        alphas_cumprod = _table("alphas_cumprod", alphas_cumprod)
        if alphas_cumprod.max() > 1:
            raise ValueError(
                f"alphas_cumprod: expected values in [0, 1], got a maximum of {alphas_cumprod.max():.6g}"
            )
        # Values that rise are betas, or a table turned round.
        if (alphas_cumprod.diff() > 0).any():
            first = int((alphas_cumprod.diff() > 0).nonzero()[0]) + 1
            raise ValueError(
                f"alphas_cumprod: expected values that fall with t, got one that rises at t = {first}"
            )
        return cls(alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt(), **kwargs)

    @classmethod
    def from_diffusers(cls, scheduler) -> NoiseSchedule:
        """The schedule a diffusers scheduler trains with.

        Its float32 `alphas_cumprod` is what the checkpoint has seen, so it is the source.

        Flow matching: diffusers' FlowMatch schedulers. One with `use_dynamic_shifting` shifts its noise
        levels when it samples, by the size of the image; diffusers' scripts train with those that are not
        shifted.
        """
        if hasattr(scheduler, "alphas_cumprod"):
            return cls.from_alphas_cumprod(
                scheduler.alphas_cumprod, prediction_type=scheduler.config.get("prediction_type", "epsilon")
            )
        if type(scheduler).__name__ in FLOW_MATCHING:
            config = scheduler.config
            if config.get("invert_sigmas"):
                raise ValueError("scheduler: expected noise levels that rise with t, got invert_sigmas=True")
            shift = 1.0 if config.get("use_dynamic_shifting") else config.shift
            return cls.flow(config.num_train_timesteps, shift=shift)
        expected = f"a diffusers scheduler with alphas_cumprod, or one of {', '.join(FLOW_MATCHING)}"
        raise TypeError(f"scheduler: expected {expected}, got {type(scheduler).__name__}")

    @classmethod
    def flow(cls, num_timesteps: int = 1000, shift: float = 1.0) -> NoiseSchedule:
        """Flow matching, `x_t = (1 - sigma_t) x_0 + sigma_t eps`.

        Index t is noise level (t + 1) / T, before diffusers' shift of the noise levels.
        """
        sigma = torch.arange(1, num_timesteps + 1, dtype=torch.float64) / num_timesteps
        sigma = shift * sigma / (1 + (shift - 1) * sigma)
        return cls(1 - sigma, sigma, model_timesteps=sigma * num_timesteps, prediction_type="flow")

    def __len__(self) -> int:
        return len(self.alpha)

    def __repr__(self) -> str:
        return f"NoiseSchedule({len(self)} timesteps, prediction_type={self.prediction_type!r})"

    def coefficients(self, timesteps: Tensor) -> Tensor:
        """What the ops need to know of `timesteps` `[B]`: float64 `[B, 5]` on their device.

        The columns are `alpha, sigma, a, b, c`. In the model's prediction space the target of a clean image
        `x` seen through `x_t = alpha x_0 + sigma eps` is `a eps + b x_0 + c (x_0 - x)`: a network that
        predicts eps, v, x_0 or the flow differs in these three numbers only.

        On a GPU nothing is read: the row of a timestep outside the schedule, or where the loss is not
        defined, is NaN, so that no update can come of it.

        Raises:
            ValueError: on a CPU, and elsewhere with `FASTUNLEARN_CHECK=1`, for such a timestep.
        """
        if check.readable(timesteps):
            self.check_timesteps("timesteps", timesteps)
        return _row_of(self._tables(timesteps.device)[0], timesteps)

    def model_input(self, timesteps: Tensor) -> Tensor:
        """What the network receives for `timesteps` `[B]`, on their device.

        On a GPU nothing is read: a timestep outside the schedule gives NaN, or the first model timestep where
        they are integers; its `coefficients` are NaN.

        Raises:
            ValueError: on a CPU, and elsewhere with `FASTUNLEARN_CHECK=1`, for such a timestep.
        """
        if check.readable(timesteps):
            self._check_range("timesteps", timesteps)
        return _row_of(self._tables(timesteps.device)[1], timesteps)

    def check_timesteps(self, name: str, timesteps: Tensor) -> None:
        """Refuses `timesteps` `[B]` outside the schedule, or where the loss is not defined. Reads them.

        Raises:
            ValueError: naming `name`, for a timestep outside [0, T - 1], one with `sigma_t = 0` (the noise
                cannot be told from the image), or one with `alpha_t = 0` where the network predicts eps.
        """
        self._check_range(name, timesteps)
        if self._all_usable:
            return
        timesteps = timesteps.cpu().long()
        refused = timesteps[~self._usable[timesteps]]
        if len(refused):
            first = int(refused[0])
            if self.sigma[first] == 0:
                expected = "timesteps with sigma_t > 0"
                raise ValueError(f"{name}: expected {expected}, got t = {first}, where sigma = 0")
            expected = "timesteps with alpha_t > 0 for a network that predicts epsilon"
            raise ValueError(f"{name}: expected {expected}, got t = {first}, where alpha = 0")

    def _check_range(self, name: str, timesteps: Tensor) -> None:
        if timesteps.numel() == 0:
            return
        low, high = (int(bound) for bound in torch.aminmax(timesteps.long()))
        if low < 0 or high >= len(self):
            got = f"values in [{low}, {high}]"
            raise ValueError(f"{name}: expected indices in [0, {len(self) - 1}], got {got}")

    def check_usable(self) -> None:
        """Refuses a schedule with timesteps where the loss is not defined: any of them can be drawn.

        Raises:
            ValueError: `sigma_t = 0` (the noise cannot be told from the image), or `alpha_t = 0` with a
                network that predicts eps.
        """
        if self._all_usable:
            return
        first = int((~self._usable).nonzero()[0])
        if self.sigma[first] == 0:
            raise ValueError(
                "schedule: expected sigma_t > 0 at every timestep that can be drawn, "
                f"got sigma = 0 at t = {first}"
            )
        expected = "alpha_t > 0 for a network that predicts epsilon"
        raise ValueError(f"schedule: expected {expected}, got alpha = 0 at t = {first} (zero terminal SNR)")

    def _tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Coefficients and model timesteps, with a row more at each end (`_row_of`)."""
        if device not in self._on_device:
            tables = tuple(table.to(device) for table in self._on_host)
            # Those of a trace hold no numbers: they are not kept.
            if any(type(table) is not Tensor for table in tables):
                return tables
            self._on_device[device] = tables
        return self._on_device[device]

    def _coefficient_table(self) -> Tensor:
        """`coefficients` of all timesteps, float64 `[T, 5]`; NaN where the loss is not defined."""
        alpha, sigma = self.alpha, self.sigma
        # The target of an image x seen through x_t is that of x_0 with x in place of x_0, and the noise
        # (x_t - alpha x) / sigma = eps + rho (x_0 - x) in place of eps: `a eps + b x_0 + c (x_0 - x)`.
        rho, one, zero = alpha / sigma, torch.ones_like(alpha), torch.zeros_like(alpha)
        a, b, c = {
            "epsilon": (one, zero, rho),
            "v_prediction": (alpha, -sigma, alpha * rho + sigma),
            "sample": (zero, one, -one),
            "flow": (one, -one, rho + 1),
        }[self.prediction_type]
        table = torch.stack([alpha, sigma, a, b, c], dim=1)
        table[~self._usable] = torch.nan
        return table


def _with_ends(table: Tensor, value: float) -> Tensor:
    """`table` `[T, ...]` between two rows of `value`."""
    end = torch.full_like(table[:1], value)
    return torch.cat([end, table, end])


def _row_of(table: Tensor, timesteps: Tensor) -> Tensor:
    """Rows `timesteps` of a table `_with_ends`: before the first and after the last one they find an end.

    So -1 is not the last row, as in torch, and a GPU reads nothing beside the table. Nothing waits for it.
    """
    last = len(table) - 2
    return table[timesteps.long().clamp(-1, last) + 1]


def _table(name: str, values) -> Tensor:
    if not isinstance(values, Tensor):
        raise TypeError(f"{name}: expected a tensor of shape [T], got {_describe(values)}")
    if values.ndim != 1 or len(values) == 0 or not values.is_floating_point():
        raise ValueError(f"{name}: expected a floating-point tensor of shape [T], got {_describe(values)}")
    values = values.detach().to("cpu", torch.float64)
    if not torch.isfinite(values).all() or values.min() < 0:
        raise ValueError(
            f"{name}: expected finite values >= 0, got values in [{values.min():.6g}, {values.max():.6g}]"
        )
    return values


def _describe(value) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
