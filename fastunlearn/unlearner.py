"""Unlearner: owns the stores and draws every row, timestep and noise itself, so that a run is a function of its seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from . import _check
from . import draws as draw
from .draws import CounterSource, Draws, Purpose
from .methods import Batch, Method
from .neighbors import nearest_neighbors
from .profiling import stage
from .schedule import NoiseSchedule
from .step import StepOutput, check_options, take_step
from .store import ImageStore, overlap

UINT8_SCALE = (2 / 255) ** 2  # from integer squared distances to those of images in [-1, 1]


class Unlearner:
    """Takes unlearning steps on a model, from a store of images to forget and a store of images to keep.

    Args:
        model: a diffusers model, or any callable `(x_t, t, **kwargs)` that returns a tensor or an object with `.sample`.
        optimizer: over the parameters to train; `torch.optim.AdamW(..., fused=True)` skips a non-finite step without a host check.
        schedule: `NoiseSchedule.from_diffusers(scheduler)`.
        method: `ReTrack(...)`, `SISS(...)`, `EraseDiff(...)`, `NegGrad(...)` or `Vanilla()`.
        forget: images to forget; None where the method does not read them.
        retain: images to keep.
        neighbors: `(index [N, k], sqdist [N, k])` of the forget rows in `retain`, as `nearest_neighbors` returns them; computed if None.
        batch_size: rows drawn a step from each store, with replacement.
        micro_batch_size: at most this many rows in one network call.
        total_steps: how many steps the run will take (no method here has a schedule over them yet); None: unknown.
        seed: every random number of step s is a function of (seed, s).
        autocast_dtype, grad_scaler, max_grad_norm: as in `retrack_step`; float16 without a grad_scaler loses small gradients.
        ema: an object with `.step(parameters)`, such as diffusers' `EMAModel`, updated after every step.
        lr_scheduler: an object with `.step()`, called after every step.
        allow_overlap: accept forget rows that also stand in `retain`.
        compile, time_window, lowpass: not in this version; None.

    Raises:
        TypeError, ValueError: before any work, naming the argument, what was expected and what was given.
    """

    def __init__(
        self,
        model: Callable,
        optimizer: torch.optim.Optimizer,
        schedule: NoiseSchedule,
        method: Method,
        *,
        forget: ImageStore | None = None,
        retain: ImageStore | None = None,
        neighbors: tuple[Tensor, Tensor] | None = None,
        batch_size: int = 128,
        micro_batch_size: int | None = None,
        total_steps: int | None = None,
        seed: int = 0,
        autocast_dtype: torch.dtype | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        max_grad_norm: float | None = 1.0,
        ema=None,
        lr_scheduler=None,
        allow_overlap: bool = False,
        compile: bool | None = None,
        time_window: None = None,
        lowpass: None = None,
    ):
        if not isinstance(method, Method):
            raise TypeError(f"method: expected a method such as ReTrack(), got {_check.describe(method)}")
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {_check.describe(optimizer)}")
        check_options(model, schedule, max_grad_norm, micro_batch_size, autocast_dtype, compile=compile, time_window=time_window, lowpass=lowpass)
        schedule.check_usable()
        _check.integer("batch_size", batch_size, low=1)
        _check.integer("seed", seed, low=0, high=2**63 - 1)
        if total_steps is not None:
            _check.integer("total_steps", total_steps, low=0)
        check_stores(method, forget, retain, allow_overlap=allow_overlap)

        self.model, self.optimizer, self.schedule, self.method = model, optimizer, schedule, method
        self.batch_size, self.micro_batch_size, self.total_steps, self.seed = batch_size, micro_batch_size, total_steps, seed
        self.autocast_dtype, self.max_grad_norm, self.grad_scaler, self.ema, self.lr_scheduler = autocast_dtype, max_grad_norm, grad_scaler, ema, lr_scheduler
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.device = self.parameters[0].device
        if self.parameters[0].dtype != torch.float32 and autocast_dtype is None:
            raise TypeError(f"model: expected float32 parameters, or autocast_dtype (stores serve float32 rows), got {self.parameters[0].dtype}")
        self.forget = forget.to(self.device) if "forget" in method.batches else None
        self.retain = retain.to(self.device) if {"retain", "neighbors"} & method.batches else None
        self.neighbors = self._find_neighbors(neighbors) if "neighbors" in method.batches else None
        self.step_index = 0
        self.last_lr: float | None = None  # that the latest step was taken with
        self.skipped_steps = torch.zeros((), dtype=torch.int64, device=self.device)

    def step(self, draws: Draws | None = None) -> StepOutput:
        """Takes one step. `draws` may give rows, noise or timesteps; the rest is drawn for (seed, step index)."""
        with stage("draw"):
            batch, draws = self._draw(Draws() if draws is None else draws)
        output = take_step(
            self.method, self.model, self.optimizer, self.schedule, batch, draws,
            max_grad_norm=self.max_grad_norm, autocast_dtype=self.autocast_dtype, grad_scaler=self.grad_scaler, micro_batch_size=self.micro_batch_size,
        )  # fmt: skip
        self.skipped_steps += output.skipped
        self.last_lr = float(self.optimizer.param_groups[0]["lr"])
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        if self.ema is not None:
            self.ema.step(self.model.parameters() if isinstance(self.model, torch.nn.Module) else self.parameters)
        self.step_index += 1
        return output

    def state_dict(self) -> dict:
        """What, beside model, optimizer, scheduler and EMA, a resumed run needs; JSON-able. Reads the device."""
        return {"seed": self.seed, "step_index": self.step_index, "skipped_steps": int(self.skipped_steps)}

    def load_state_dict(self, state: dict) -> None:
        """Continues at the step that `state` was taken at.

        Raises:
            ValueError: the state is of a run with another seed.
        """
        if state["seed"] != self.seed:
            raise ValueError(f"seed: expected the seed of the run that is resumed, {state['seed']}, got {self.seed}")
        self.step_index = state["step_index"]
        self.skipped_steps.fill_(state["skipped_steps"])

    def _draw(self, draws: Draws) -> tuple[Batch, Draws]:
        source = CounterSource(self.device, self.seed, self.step_index)
        method = self.method
        forget = retain = neighbors = sqdist = None
        if "forget" in method.batches:
            rows = self._rows("draws.forget_rows", draws.forget_rows, self.forget, source, Purpose.FORGET_ROWS)
            forget = self.forget.lazy(rows)
            if self.neighbors is not None:
                index, distances = self.neighbors
                neighbors, sqdist = self.retain.lazy(index[rows]), distances[rows]
        if "retain" in method.batches:
            rows = self._rows("draws.retain_rows", draws.retain_rows, self.retain, source, Purpose.RETAIN_ROWS)
            retain = self.retain.lazy(rows)
        draws = replace(draws, **{f"{branch}_rows": None for branch in ("forget", "retain") if branch in method.batches})
        draw.validate(draws, method.draws, forget, retain)
        return Batch(forget, retain, neighbors, sqdist), draw.complete(draws, method, source, forget, retain, len(self.schedule))

    def _rows(self, name: str, given: Tensor | None, store: ImageStore, source: CounterSource, purpose: Purpose) -> Tensor:
        """Rows of `store`, `[B]`: those given, or `batch_size` drawn ones."""
        if given is None:
            return source.integers(self.batch_size, len(store), purpose)
        _check.tensor(name, given, ndim=1, floating=False)
        if len(given) == 0:
            raise ValueError(f"{name}: expected at least one row, got none")
        if (given.device.type == "cpu" or _check.values_enabled()) and not 0 <= int(given.min()) <= int(given.max()) < len(store):
            raise ValueError(f"{name}: expected rows in [0, {len(store) - 1}], got rows in [{int(given.min())}, {int(given.max())}]")
        return given

    def _find_neighbors(self, given: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        k = _check.integer("k", self.method.k, low=1, high=len(self.retain), of="the rows of retain")
        if given is not None and (not isinstance(given, (tuple, list)) or len(given) != 2):
            raise TypeError(f"neighbors: expected a pair (index, sqdist) as nearest_neighbors returns it, got {_check.describe(given)}")
        index, sqdist = nearest_neighbors(self.forget, self.retain, k) if given is None else given
        _check.tensor("neighbors[0]", index, ndim=2, floating=False)
        _check.tensor("neighbors[1]", sqdist, ndim=2, floating=not self.retain.is_uint8)  # uint8 rows: the integer distance, scaled below
        if index.shape != (len(self.forget), k) or sqdist.shape != index.shape:
            raise ValueError(f"neighbors: expected index and sqdist of shape ({len(self.forget)}, {k}), got {tuple(index.shape)} and {tuple(sqdist.shape)}")
        if int(index.min()) < 0 or int(index.max()) >= len(self.retain):
            raise ValueError(f"neighbors: expected rows of retain, [0, {len(self.retain) - 1}], got [{int(index.min())}, {int(index.max())}]")
        sqdist = sqdist.double() * UINT8_SCALE if self.retain.is_uint8 else sqdist.double()
        return index.to(self.device), sqdist.to(self.device)


def check_stores(method: Method, forget: ImageStore | None, retain: ImageStore | None, *, allow_overlap: bool = False) -> None:
    """Whether `method` can work on these sets: worth asking before a long search for neighbours.

    Raises:
        TypeError, ValueError: a set that the method reads is missing, the two do not match, or forget rows also stand in `retain`.
    """
    for name, store, needed in (("forget", forget, "forget" in method.batches), ("retain", retain, bool({"retain", "neighbors"} & method.batches))):
        if needed and not isinstance(store, ImageStore):
            raise TypeError(f"{name}: expected an ImageStore ({type(method).__name__} reads it), got {_check.describe(store)}")
    if forget is None or retain is None:
        return
    if forget.shape != retain.shape:
        raise ValueError(f"forget: expected images of the shape of retain, {tuple(retain.shape)}, got {tuple(forget.shape)}")
    if forget.is_uint8 != retain.is_uint8:
        raise TypeError(f"forget: expected the dtype of retain, {retain.dtype}, got {forget.dtype}")
    if not allow_overlap:
        rows, _ = overlap(forget, retain)
        if len(rows):
            shown = ", ".join(str(int(row)) for row in rows[:10]) + (", ..." if len(rows) > 10 else "")
            raise ValueError(f"forget: expected images that are not in retain, got {len(rows)} that are (rows {shown}); allow_overlap=True accepts them")
