"""The forward process `x_t = alpha_t x_0 + sigma_t eps`, and what the network is asked to predict.

The tables are float64: the importance weights of every method multiply distances by `(alpha_t / sigma_t)^2`,
up to 1e4 at small t.
"""

from __future__ import annotations

import inspect
import math

import torch
from torch import Tensor

from ..host import check

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow")
MODEL_INPUTS = ("timestep", "sigma")
TIMESTEP_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64, torch.float32, torch.float64)
LOSS_WEIGHTS = ("none", "min_snr", "sigma_squared", "sigma_sqrt", "cosmap")
MIN_SNR_GAMMA = 5.0  # of the paper (arXiv 2303.09556)
FLOW_MATCHING = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
INSTEAD_OF_ZERO = 2.0**-24  # of the last alphas_cumprod of some schedulers with rescale_betas_zero_snr


class NoiseSchedule:
    """Signal and noise levels for every timestep index, and the model's prediction type.

    Args:
        alpha: `[T]`, signal level of each timestep; kept in float64.
        sigma: `[T]`, noise level of each timestep; kept in float64.
        model_timesteps: `[T]`, what the network receives for each index (default: the index itself).
        prediction_type: what the network returns: `"epsilon"`, `"v_prediction"` (`alpha eps - sigma x_0`),
            `"sample"` (`x_0`) or `"flow"` (`eps - x_0`).
        model_input: `"timestep"`, or `"sigma"` for a network that takes the noise level `sigma_t` (float32)
            in place of the timestep; `model_timesteps` are then left out.

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
        model_input: str = "timestep",
    ):
        alpha, sigma = _table("alpha", alpha), _table("sigma", sigma)
        if alpha.shape != sigma.shape:
            raise ValueError(f"sigma: expected the length of alpha, {len(alpha)}, got {len(sigma)}")
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"prediction_type: expected one of {', '.join(PREDICTION_TYPES)}, got {prediction_type!r}"
            )
        check.one_of("model_input", model_input, MODEL_INPUTS)
        if model_input == "sigma":
            if model_timesteps is not None:
                got = _describe(model_timesteps)
                raise ValueError(f"model_timesteps: expected None with model_input='sigma', got {got}")
            model_timesteps = sigma.float()
        elif model_timesteps is None:
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
        self._loss_weights: dict[tuple, Tensor] = {}  # by kind, gamma and device

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
        _check_falls(alphas_cumprod)
        return cls(alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt(), **kwargs)

    @classmethod
    def from_diffusers(cls, scheduler, *, model_input: str = "timestep") -> NoiseSchedule:
        """The schedule a diffusers scheduler trains with: that of one freshly built of the same config.

        Its float32 `alphas_cumprod`, or its float32 `sigmas` and `timesteps`, are what the checkpoint has
        seen, so they are the source. What a scheduler does when it samples only is left out: karras,
        exponential or beta sigmas, `shift_terminal`, a call of `set_timesteps` or `set_shift`.

        Flow matching: diffusers' FlowMatch schedulers and their subclasses, and solvers (DPMSolverMultistep,
        UniPCMultistep) with `prediction_type="flow_prediction"` and `use_flow_sigmas=True`, which have `flow`
        with their `flow_shift`. One with `use_dynamic_shifting` shifts its noise levels by the size of the
        image when it samples; diffusers' scripts train with those that are not shifted, and so does this
        schedule. The levels of one size are `flow(T, math.exp(mu))`, or `flow(T, mu)` with
        `time_shift_type="linear"`.

        Zero terminal SNR (`rescale_betas_zero_snr`): the Euler schedulers, DPMSolverMultistep and UniPC write
        2^-24 in place of the last 0, which may be more than the value before it. It is kept as it is: the
        last index then has a little signal, and no other value may rise.

        Args:
            scheduler: a diffusers scheduler with `alphas_cumprod`, or one of flow matching.
            model_input: `"timestep"`, or `"sigma"` for a network that takes the noise level (Flux).

        Raises:
            TypeError: for a scheduler of another family.
            ValueError: for a prediction type that is not known, flow prediction without flow sigmas or the
                other way round, noise levels that fall with t (`invert_sigmas`), or
                `timestep_type="continuous"` with v-prediction (the network takes `log(sigma) / 4`).
        """
        config = getattr(scheduler, "config", {})
        if config.get("invert_sigmas"):
            raise ValueError("scheduler: expected noise levels that rise with t, got invert_sigmas=True")
        if any(kind.__name__ in FLOW_MATCHING for kind in type(scheduler).__mro__):
            return cls._from_flow_matching(scheduler, model_input)
        if not hasattr(scheduler, "alphas_cumprod"):
            expected = f"a diffusers scheduler with alphas_cumprod, or one of {', '.join(FLOW_MATCHING)}"
            raise TypeError(f"scheduler: expected {expected}, got {type(scheduler).__name__}")

        # A solver with one and not the other takes its steps along levels of no forward process.
        prediction_type = config.get("prediction_type", "epsilon")
        flow_sigmas = bool(config.get("use_flow_sigmas"))
        if flow_sigmas != (prediction_type == "flow_prediction"):
            expected = "prediction_type='flow_prediction' and use_flow_sigmas=True, or neither"
            raise ValueError(f"scheduler: expected {expected}, got {prediction_type!r} and {flow_sigmas}")
        if flow_sigmas:
            shift = 1.0 if config.get("use_dynamic_shifting") else config.get("flow_shift", 1.0)
            return cls.flow(config["num_train_timesteps"], shift, model_input=model_input)

        if config.get("timestep_type") == "continuous" and prediction_type == "v_prediction":
            expected = "timestep_type='discrete' with v_prediction"
            raise ValueError(f"scheduler: expected {expected}, got 'continuous'")
        alphas_cumprod = _table("alphas_cumprod", scheduler.alphas_cumprod)
        kinds = {"prediction_type": prediction_type, "model_input": model_input}
        if config.get("rescale_betas_zero_snr") and alphas_cumprod[-1] == INSTEAD_OF_ZERO:
            _check_falls(alphas_cumprod[:-1])
            return cls(alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt(), **kinds)
        return cls.from_alphas_cumprod(alphas_cumprod, **kinds)

    @classmethod
    def _from_flow_matching(cls, scheduler, model_input: str) -> NoiseSchedule:
        """The levels and timesteps of a scheduler of its class and config that has not sampled yet."""
        # A config that was another class's may hold settings that this class does not take.
        known = _init_names(type(scheduler))
        config = {name: value for name, value in scheduler.config.items() if name in known}
        fresh = type(scheduler)(**config)

        # diffusers counts from noise to image.
        sigma, timesteps = fresh.sigmas.double().flip(0), fresh.timesteps.flip(0)
        given = None if model_input == "sigma" else timesteps
        return cls(1 - sigma, sigma, given, prediction_type="flow", model_input=model_input)

    @classmethod
    def flow(
        cls, num_timesteps: int = 1000, shift: float = 1.0, *, model_input: str = "timestep"
    ) -> NoiseSchedule:
        """Flow matching, `x_t = (1 - sigma_t) x_0 + sigma_t eps`, for a network that predicts `eps - x_0`.

        Index t is noise level (t + 1) / T, before diffusers' shift of the noise levels.

        Args:
            num_timesteps: T.
            shift: > 0; the levels are `shift sigma / (1 + (shift - 1) sigma)`.
            model_input: `"timestep"` for a network that takes `T sigma_t`, or `"sigma"` for one that takes
                `sigma_t`; float32, not rounded to integers.
        """
        num_timesteps = check.integer("num_timesteps", num_timesteps, low=1)
        shift = check.number("shift", shift, low=0, low_open=True)
        sigma = torch.arange(1, num_timesteps + 1, dtype=torch.float64) / num_timesteps
        sigma = shift * sigma / (1 + (shift - 1) * sigma)
        timesteps = None if model_input == "sigma" else (sigma * num_timesteps).float()
        return cls(1 - sigma, sigma, timesteps, prediction_type="flow", model_input=model_input)

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

    def index_of(self, timestep: float | Tensor) -> int | Tensor:
        """The index whose model timestep (what the network receives) is exactly `timestep`. Reads it.

        diffusers counts flow matching's from noise to image: its index there is `T - 1` less ours.

        Args:
            timestep: a number, or a tensor of any shape on any device: integers, float32 or float64 (half
                precision has rounded a timestep, maybe to that of another index).

        Returns:
            An int for a number; int64 of the shape and on the device of a tensor.

        Raises:
            TypeError: for anything else.
            ValueError: naming the first timestep that the schedule does not have, and the nearest one that
                it has; or one that several indices share.
        """
        if not isinstance(timestep, Tensor):
            number = check.number("timestep", timestep)
            return int(self.index_of(torch.tensor(number, dtype=torch.float64)))
        if timestep.dtype not in TIMESTEP_DTYPES:
            raise TypeError(f"timestep: expected integers, float32 or float64, got {_describe(timestep)}")

        # In float64 every float32, and every integer that a schedule has, is itself.
        table, given = self.model_timesteps.double(), timestep.detach().cpu().double().flatten()
        same = given[:, None] == table
        found = same.sum(dim=1)
        if (found != 1).any():
            first = int((found != 1).nonzero()[0])
            self._refuse_timestep(float(given[first]), same[first])
        return same.long().argmax(dim=1).reshape(timestep.shape).to(timestep.device)

    def _refuse_timestep(self, timestep: float, same: Tensor) -> None:
        """The error of `index_of`: `same` `[T]` says which model timesteps equal `timestep`."""
        if same.any():
            indices = ", ".join(str(int(index)) for index in same.nonzero().flatten()[:3])
            got = f"{timestep!r}, which indices {indices} share"
            raise ValueError(f"timestep: expected a timestep of one index, got {got}")
        expected = "a timestep that the network was trained at"
        if math.isfinite(timestep):
            index = int((self.model_timesteps.double() - timestep).abs().argmin())
            expected += f" (the nearest: {self.model_timesteps[index].item()!r}, index {index})"
        raise ValueError(f"timestep: expected {expected}, got {timestep!r}")

    def loss_weight(self, kind: str, *, gamma: float | None = None) -> Tensor:
        """The weight of each timestep on the loss in the network's own prediction space.

        Each kind is a weight `w` on the squared error of the clean image, `||x_0 - x||^2`. A network that
        predicts something else has a loss `c^2` times that (`coefficients`), so its weight is `w / c^2`: one
        kind weights the same errors alike whatever is predicted. `level` is the noise level of flow
        matching at the same signal-to-noise ratio, `sigma / (alpha + sigma)`: sigma itself there.

        - `"none"`: 1 in the network's own space; also diffusers' `weighting_scheme` `"logit_normal"` and
          `"mode"`, which are densities to draw timesteps from.
        - `"min_snr"` (arXiv 2303.09556): `w = min(SNR, gamma)`, `SNR = (alpha / sigma)^2`. For epsilon
          `min(SNR, gamma) / SNR`, for v `min(SNR, gamma) / (SNR + 1)`, as in diffusers' scripts.
        - `"sigma_squared"`: `w = 1`. For flow `level^2`: the loss with `--precondition_outputs` of diffusers'
          SD3 script, whose network predicts the clean image.
        - `"sigma_sqrt"`: for flow `level^-2`, in spite of its name: a `weighting_scheme` of that script.
        - `"cosmap"`: for flow `2 / (pi (1 - 2 level + 2 level^2))`: a `weighting_scheme` of that script.

        Args:
            kind: one of the above.
            gamma: of `"min_snr"` alone, > 0; 5 where it is left out.

        Returns:
            float64 `[T]` on the CPU, as the formula has them (of no fixed mean); NaN where the loss is not
            defined (`check_usable`).
        """
        check.one_of("kind", kind, LOSS_WEIGHTS)
        if gamma is not None and kind != "min_snr":
            raise ValueError(f"gamma: expected None with kind {kind!r} (it is min_snr's), got {gamma!r}")
        if kind == "none":
            return torch.ones_like(self.alpha).where(self._usable, torch.nan)

        level = self.sigma / (self.alpha + self.sigma)
        if kind == "min_snr":
            gamma = check.number("gamma", MIN_SNR_GAMMA if gamma is None else gamma, low=0, low_open=True)
            of_clean = (self.alpha / self.sigma).square().clamp(max=gamma)
        elif kind == "sigma_squared":
            of_clean = torch.ones_like(level)
        else:
            of_flow = level**-2 if kind == "sigma_sqrt" else 2 / (math.pi * (1 - 2 * level + 2 * level**2))
            of_clean = of_flow / level.square()
        return of_clean / self._coefficient_table()[:, 4].square()

    def loss_weights_of(self, timesteps: Tensor, kind: str, *, gamma: float | None = None) -> Tensor:
        """`loss_weight(kind)` at `timesteps` `[B]`, float64 on their device; NaN outside the schedule.

        The first call for a device copies the table there, which waits; later ones do not.
        """
        key = kind, gamma, timesteps.device
        table = self._loss_weights.get(key)
        if table is None:
            table = _with_ends(self.loss_weight(kind, gamma=gamma), torch.nan).to(timesteps.device)
            if type(table) is Tensor:  # that of a trace holds no numbers
                self._loss_weights[key] = table
        return _row_of(table, timesteps)

    @property
    def all_usable(self) -> bool:
        """Whether the loss is defined at every timestep (`check_usable`)."""
        return self._all_usable

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

    def check_usable(self, probabilities: Tensor | None = None) -> None:
        """Refuses a schedule with timesteps where the loss is not defined, if they can be drawn.

        Args:
            probabilities: `[T]`, how often each timestep is drawn; without them any of them can be.

        Raises:
            ValueError: `sigma_t = 0` (the noise cannot be told from the image), or `alpha_t = 0` with a
                network that predicts eps.
        """
        if self._all_usable:
            return
        refused = ~self._usable
        if probabilities is not None:
            refused = refused & (probabilities.cpu() > 0)
        if not refused.any():
            return
        first = int(refused.nonzero()[0])
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


def _check_falls(alphas_cumprod: Tensor) -> None:
    """Values that rise are betas, or a table turned round."""
    rises = alphas_cumprod.diff() > 0
    if rises.any():
        first = int(rises.nonzero()[0]) + 1
        raise ValueError(
            f"alphas_cumprod: expected values that fall with t, got one that rises at t = {first}"
        )


def _init_names(kind: type) -> set[str]:
    """What its `__init__` takes, and its base's where it passes on `**kwargs`."""
    names = set()
    for each in kind.__mro__:
        parameters = inspect.signature(each.__init__).parameters.values()
        names.update(parameter.name for parameter in parameters)
        if all(parameter.kind != parameter.VAR_KEYWORD for parameter in parameters):
            break
    return names


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
