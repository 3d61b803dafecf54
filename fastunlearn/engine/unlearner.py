"""Unlearner: owns the stores and draws every row, timestep and noise itself.

So a run is a function of its seed.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ..host import check, philox, room
from ..host.precision import resolve_autocast
from ..host.profiling import stage
from ..host.store import ImageStore, Rows
from ..methods import Batch, Method
from ..objective import draws as draw
from ..objective.draws import CounterSource, Draws, Purpose
from ..objective.frequency import LowPass
from ..objective.parameters import ParameterRule
from ..objective.schedule import NoiseSchedule
from ..objective.selection import Selection, check_band
from ..objective.time import Density, Stratified
from ..step.agreement import bits_of, bits_of_state, check_agreement
from ..step.compilation import Compile, compile_seconds, resolve_compile
from ..step.inner import check_inner_steps
from ..step.options import Settings, check_needs, check_reference, check_rules, checked
from ..step.select import Moment
from ..step.take import StepOutput, take_step
from ..step.trained import check_gradients, check_keep_grad, look_at, processes, unwrapped
from ..step.wrappers import (
    check_update_is_due,
    check_wrappers,
    device_of,
    grad_scaler_of,
    tell_skipped,
    unwrap_optimizer,
    unwrap_scheduler,
)
from .checks import (
    check_ema,
    check_network,
    check_precision,
    check_selection,
    check_stores,
    check_total_steps,
)
from .feeds import HostFeed, open_feed
from .neighborhood import find_neighbors
from .replay import make_replay


def _selected(name: str) -> property:
    """What the selection of an Unlearner has of that name: to be read, and replaced with the selection."""

    def read(self: Unlearner) -> Any:
        return getattr(self.selection, name)

    def refuse(self: Unlearner, value: Any) -> None:
        instead = f"dataclasses.replace(unlearner.selection, {name}=...)"
        raise AttributeError(
            f"{name}: expected another selection (unlearner.selection = {instead}), got {value}"
        )

    return property(read, refuse, doc=f"`selection.{name}`. Read-only: set `selection`.")


class Unlearner:
    """Takes unlearning steps on a model, from a store of images to forget and a store of images to keep.

    Args:
        model: a diffusers model, or any callable `(x_t, t)` that returns a tensor or an object with
            `.sample`. One that needs labels or prompts is refused: the `*_step` functions hand them over.
        optimizer: over the parameters to train; `torch.optim.AdamW(..., fused=True)` skips a non-finite step
            without a host check. accelerate's prepared optimizer is taken for the one in it, as in
            `retrack_step`.
        schedule: `NoiseSchedule.from_diffusers(scheduler)`.
        method: `ReTrack(...)`, or another one (docs/methods.md).
        forget: images to forget; None where the method does not read them.
        retain: images to keep.
        neighbors: `(index [N, k], sqdist [N, k])` of the forget rows in `retain`, as `nearest_neighbors`
            returns them; computed if None.
        batch_size: rows drawn a step from each store, with replacement; of all processes together, so that a
            run does not depend on their number.
        micro_batch_size: at most this many rows in one network call of a process.
        total_steps: how many steps the run will take, over which a `lowpass` may have a schedule; None:
            unknown.
        seed: every random number of step s is a function of (seed, s).
        autocast_dtype: dtype of the network call; `"auto"`: bfloat16 on GPUs that have it, elsewhere (as
            None) that of the weights.
        grad_scaler, keep_grad, max_grad_norm: as in `retrack_step`; float16 without a grad_scaler loses small
            gradients.
        ema: an object with `.step(parameters)`, such as diffusers' `EMAModel`, updated after every step.
        lr_scheduler: an object with `.step()`, called after every step. accelerate's prepared scheduler keeps
            its own rules: it stands still after a skipped step (to learn of which, it waits for a GPU), and
            goes on by as many steps as there are processes unless batches are split.
        allow_overlap: accept forget rows that also stand in `retain`, but by SISS with a superfactor, which
            counts both sets.
        residency: `"device"`: both stores lie on the model's device; `"host"`: they stay where they are, and
            the rows of the next step are brought ahead; `"auto"`: what fits (docs/data_path.md). The numbers
            are the same.
        compile: as in `retrack_step`; `compile_seconds` tells what it took.
        replay: on a GPU: after three steps the whole step but EMA and scheduler is captured as a CUDA graph,
            and replayed from then on; no Python of the model runs any more. None: where nothing stands
            against it (several processes, a grad_scaler, rows on the host, an optimizer that is not fused,
            hooks; the log says what); True: else an error; False: never.
        process_group: processes that take every step together, each on its share of the batch; all of them
            must hold the same weights, which the first step checks. None: those of a model wrapped in
            DistributedDataParallel.
        warn_of_near_copies: warn of first neighbours that show the forget row itself, compressed or resized:
            ReTrack would redirect it to itself. `near_copies` also finds those that are turned or mirrored.
        reference_model: the network that the method compares with (preferences), called as `model` is:
            `frozen_copy(model)`, the network as it was, or `without_adapters(model)`.
        rules: what else is done to gradients and weights (`objective.parameters.ParameterRule`).
        time_window, retain_density, lowpass, loss_weight, snr_gamma: which timesteps and frequencies count,
            and how much, as in `retrack_step` (docs/selection.md). A `lowpass` with a schedule needs
            `total_steps`. They are kept in `selection`, which may be replaced between steps, in every process
            by the same.

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
        autocast_dtype: torch.dtype | Literal["auto"] | None = "auto",
        grad_scaler: torch.amp.GradScaler | None = None,
        keep_grad: bool = False,
        max_grad_norm: float | None = 1.0,
        ema=None,
        lr_scheduler=None,
        allow_overlap: bool = False,
        residency: str = "auto",
        compile: Compile | None = None,
        replay: bool | None = None,
        process_group: dist.ProcessGroup | None = None,
        warn_of_near_copies: bool = True,
        reference_model: Callable | None = None,
        rules: Sequence[ParameterRule] = (),
        time_window: Density | None = None,
        retain_density: Density | None = None,
        lowpass: LowPass | None = None,
        loss_weight: str | None = None,
        snr_gamma: float | None = None,
    ):
        # The method and what is trained.
        check_needs(method)
        optimizer, self._wrappers = unwrap_optimizer(optimizer)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {check.describe(optimizer)}")
        grad_scaler = grad_scaler_of(self._wrappers, grad_scaler)
        device = device_of(optimizer)
        autocast_dtype = resolve_autocast(autocast_dtype, device)
        selection = Selection(time_window, retain_density, lowpass, loss_weight, snr_gamma)
        given = Settings(max_grad_norm, autocast_dtype, micro_batch_size, compile, rules, selection)
        settings = checked(model, schedule, given, process_group=process_group)
        check_reference(method, model, reference_model, settings.autocast_dtype)
        if "neighbors" in method.needs:
            check.integer("k", getattr(method, "k", None), low=1)
        check_network(model, optimizer)
        check_keep_grad(keep_grad)
        check_ema(ema)

        # The run, and its sets last: looking for images in both reads all of them.
        check_selection(method, schedule, selection)
        batch_size = check.integer("batch_size", batch_size, low=1, high=2**32, of="rows that can be drawn")
        seed = check.integer("seed", seed, low=0, high=2**63 - 1)
        total_steps = check_total_steps(total_steps)
        reduced = process_group is not None or unwrapped(model) is not model
        check_wrappers(self._wrappers, reduced=reduced)
        lr_scheduler = self._unwrapped_scheduler(lr_scheduler, optimizer)
        if lowpass is not None and isinstance(forget, ImageStore):
            check_band(lowpass, *forget.shape[-2:], 0, total_steps)
        check_stores(method, forget, retain, allow_overlap=allow_overlap)

        # What a caller can read, and partly change between steps.
        self.model, self.optimizer, self.schedule, self.method = model, optimizer, schedule, method
        self.reference_model, self.rules = reference_model, settings.rules
        self._selection, self._looked_at = selection, (method, schedule, reference_model)
        self.batch_size, self.micro_batch_size = batch_size, settings.micro_batch_size
        self.total_steps, self.seed = total_steps, seed
        self.max_grad_norm, self.keep_grad = settings.max_grad_norm, keep_grad
        self.autocast_dtype, self.grad_scaler = autocast_dtype, grad_scaler
        self.ema, self.lr_scheduler = ema, lr_scheduler
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        trained = [parameter for parameter in self.parameters if parameter.requires_grad]
        check_rules(self.rules, optimizer, trained)
        if method.inner_steps:
            check_inner_steps(method, optimizer, self.rules)
        self.device = device
        self.compile = resolve_compile(compile, unwrapped(model), device)
        self._share_batch(process_group)
        check_precision(self.parameters, autocast_dtype)

        # The sets, on their way to the device.
        self._keep_sets(forget, retain)
        self._open_feeds(residency)
        self._find_neighbors(neighbors, warn=warn_of_near_copies and self.rank == 0)

        # Counts of steps. On the device: seed, step, position of this process's first row in the batch.
        self._counter = torch.zeros(3, dtype=torch.int64, device=device)
        self._count_from(0)
        self.skipped_steps = torch.zeros((), dtype=torch.int64, device=device)
        # Of the latest step, of the first parameter group; a tensor where it lies on the device.
        self.lr_of_step: float | Tensor | None = None
        self._agreed = self.process_group is None
        self._replay = make_replay(
            replay, unwrapped(model), optimizer, device, forbidden=self._not_replayable()
        )

    def _unwrapped_scheduler(self, lr_scheduler: Any, optimizer: torch.optim.Optimizer) -> Any:
        """The scheduler in accelerate's wrapper, whose optimizers are told, too, when a step is skipped."""
        self._prepared_scheduler = None
        if lr_scheduler is None:
            return None
        lr_scheduler, self._prepared_scheduler, asked = unwrap_scheduler(lr_scheduler, optimizer)
        self._wrappers += [wrapper for wrapper in asked if wrapper not in self._wrappers]
        return lr_scheduler

    def _share_batch(self, process_group: dist.ProcessGroup | None) -> None:
        """Which rows of every batch are those of this process: `rows_here`, from `rank * rows_here` on."""
        self.process_group = processes(self.model, process_group)
        self.rank, self.num_processes = 0, 1
        if self.process_group is not None:
            self.rank = dist.get_rank(self.process_group)
            self.num_processes = dist.get_world_size(self.process_group)
        if self.batch_size % self.num_processes:
            raise ValueError(
                f"batch_size: expected a multiple of the {self.num_processes} processes, "
                f"got {self.batch_size}"
            )
        self.rows_here = self.batch_size // self.num_processes

    def _keep_sets(self, forget: ImageStore | None, retain: ImageStore | None) -> None:
        """The sets that the method reads; others are not kept."""
        needs = self.method.needs
        self.forget = forget if "forget" in needs else None
        self.retain = retain if {"retain", "neighbors"} & needs else None
        # Its distances to the neighbours are computed once: its rows are not drawn anew at every step.
        if "neighbors" in needs:
            self.forget = self.forget.freeze()
        stores = {"forget": self.forget, "retain": self.retain}
        self._stores = {branch: store for branch, store in stores.items() if store is not None}
        self._sizes = {branch: len(store) for branch, store in self._stores.items()}

    def _open_feeds(self, residency: str) -> None:
        self._feeds = {}
        first_row = self.rank * self.rows_here
        for branch, store in self._stores.items():
            if self.device.type == "cpu":
                size = 4 * self.rows_here * math.prod(store.shape)
                room.require_for("batch_size", f"a batch of {branch} rows", size)
            purpose = Purpose[f"{branch.upper()}_ROWS"]
            # A feed keeps the function that draws rows: one that held this object would keep it alive.
            draw_rows = partial(draw.rows_of_step, self.rows_here, len(store), self.seed, first_row, purpose)
            self._feeds[branch] = open_feed(
                store, self.device, draw_rows, batch_size=self.rows_here, residency=residency
            )
        # Whole sets are read where steps find them: on the device, unless they stay on the host.
        self._stores = {branch: feed.store for branch, feed in self._feeds.items()}
        self.method.check_sets(self._stores, self.device)

    def _find_neighbors(self, given: tuple[Tensor, Tensor] | None, *, warn: bool) -> None:
        """Searches the neighbours, or takes those given, and brings their rows to the device."""
        # Index into the store on the device, and squared distances; the rows of `retain`, `[N, k]`.
        self.neighbors: tuple[Tensor, Tensor] | None = None
        self.neighbor_rows: Tensor | None = None
        if "neighbors" not in self.method.needs:
            return
        feed = self._feeds["retain"]
        # By which a method in place of this one is compared.
        self._searched = _searched_by(self.method)
        index, sqdist = find_neighbors(
            self.forget,
            self.retain,
            given=given,
            device=self.device,
            searched=feed.store,
            warn=warn,
            **self._searched,
        )
        self.neighbor_rows = index
        self._neighbor_store, index = feed.neighbors(index)
        self.neighbors = index, sqdist

    def step(self, draws: Draws | None = None) -> StepOutput:
        """Takes one step. `draws` may give rows, noise or timesteps; the rest is drawn for (seed, step).

        Raises:
            TypeError, ValueError: `draws` does not fit, or has rows or timesteps that there are none of. On a
                GPU the latter are looked at with `FASTUNLEARN_CHECK=1` only; else such a step is skipped.
            ValueError: this is step 2^32, whose random numbers would be those of the first.
        """
        if self.step_index >= philox.STEPS:
            raise ValueError(f"step: expected at most 2^32 steps of a seed, got step {self.step_index}")
        check_update_is_due(self._wrappers)
        # Here, since a replayed step runs no more Python.
        trained = [parameter for parameter in self.parameters if parameter.requires_grad]
        check_gradients(unwrapped(self.model), self.optimizer, trained, keep_grad=self.keep_grad)
        self._check_replaced()
        # At the first step, not before: unlearn() shares the weights first.
        if not self._agreed:
            self._check_agreement()
        output = self._replayed_or_eager(draws)

        # At once: the counter on the device has advanced, whatever a scheduler or an EMA may raise.
        self.step_index += 1
        # A scheduler fills a tensor in place: the copy is what this step used.
        lr = self.optimizer.param_groups[0]["lr"]
        if isinstance(lr, Tensor) and lr.device == self.device:
            self.lr_of_step = lr.clone()
        else:
            self.lr_of_step = float(lr)
        tell_skipped(self._wrappers, output.skipped)
        if self.lr_scheduler is not None:
            self._scheduler().step()
        if self.ema is not None and isinstance(self.model, torch.nn.Module):
            self.ema.step(self.model.parameters())
        elif self.ema is not None:
            self.ema.step(self.parameters)
        return output

    def _check_replaced(self) -> None:
        """A method, schedule or reference in place of another has to fit all that is there.

        Raises:
            TypeError, ValueError: it does not.
        """
        now = self.method, self.schedule, self.reference_model
        if all(one is other for one, other in zip(now, self._looked_at, strict=True)):
            return
        # Sets that the first method did not read are not kept, and neighbours were not searched.
        kept = {"reference", "stores", "sizes", *self._stores}
        if self.neighbors is not None:
            kept.add("neighbors")
        missing = sorted(self.method.needs - kept)
        if missing:
            expected = f"expected one that reads what is here ({', '.join(self._stores)})"
            got = f"{type(self.method).__name__}, which needs {', '.join(missing)} (of a new Unlearner)"
            raise ValueError(f"method: {expected}, got {got}")
        # An overlap was accepted, or refused, at the beginning; sets that are counted have none.
        check_stores(self.method, self.forget, self.retain, allow_overlap=True)
        self.method.check_sets(self._stores, self.device)
        if "neighbors" in self.method.needs:
            self._check_neighbors_found()
        if "reference" in self.method.needs:
            check_reference(self.method, self.model, self.reference_model, self.autocast_dtype)
        check_selection(self.method, self.schedule, self.selection)
        self._looked_at = now

    def _check_neighbors_found(self) -> None:
        """
        Raises:
            ValueError: the method is of other neighbours than those that were searched.
        """
        asked = _searched_by(self.method)
        for name, found in self._searched.items():
            if asked[name] != found:
                expected = f"expected {name} {found}, by which neighbours were searched"
                raise ValueError(f"method: {expected}, got {asked[name]} (of a new Unlearner)")

    def _replayed_or_eager(self, draws: Draws | None) -> StepOutput:
        if self._replay is None:
            return self._step_on_device(draws)
        obstacle = self._not_replayable_now(draws)
        if obstacle is None:
            return self._replay.step(self._step_on_device, self._settings())
        self._replay.set_aside(obstacle)
        return self._step_on_device(draws)

    def _check_agreement(self) -> None:
        rows = {
            f"number of {name} rows": 0 if store is None else len(store)
            for name, store in (("forget", self.forget), ("retain", self.retain))
        }
        compared = {}
        reference = self.reference_model
        if isinstance(reference, torch.nn.Module):
            held = [*reference.parameters(), *reference.buffers()]
            compared["weights of reference_model"] = bits_of(held)
        if self.rules:
            compared["rules"] = bits_of_state([rule.state_dict() for rule in self.rules])
        compared["densities of timesteps"] = self._bits_of_densities()
        others = self.selection.lowpass, self.selection.loss_weight, self.selection.snr_gamma
        compared["lowpass or loss_weight"] = zlib.crc32(repr(others).encode())
        if self.selection.lowpass is not None and self.selection.lowpass.scheduled:
            compared["total_steps"] = self.total_steps
        numbers = {"seed": self.seed, "step": self.step_index, **rows, **compared}
        check_agreement(self.parameters, numbers, self.process_group)
        self._agreed = True

    def _bits_of_densities(self) -> Tensor:
        """Of what timesteps are drawn from, in strata or not, and of what their losses are multiplied by."""
        length, tables = len(self.schedule), []
        for density in self.selection.densities(self.method, self.schedule).values():
            in_strata = torch.tensor([isinstance(density, Stratified)])
            tables += [density.drawn(length), density.weights(length), in_strata]
        return bits_of(tables)

    def _scheduler(self):
        """The learning-rate scheduler, in accelerate's wrapper if it came in one."""
        prepared = self._prepared_scheduler
        if prepared is not None and prepared.scheduler is self.lr_scheduler:
            return prepared
        return self.lr_scheduler

    def _step_on_device(self, draws: Draws | None = None) -> StepOutput:
        """What a step does on the device.

        Nothing here may depend on the step but through `_counter`: replayed, this runs once for all steps.
        """
        with stage("draw"):
            batch, draws = self._draw(Draws() if draws is None else draws)
        trained = look_at(
            self.model, self.optimizer, self.grad_scaler, self.process_group, keep_grad=self.keep_grad
        )
        trained = trained._replace(reference=unwrapped(self.reference_model))
        moment = Moment(self._counter[1], self.total_steps)
        output = take_step(trained, self.method, self.schedule, batch, draws, self._step_settings(), moment)
        self.skipped_steps += output.skipped
        self._counter[1].add_(1)
        return output

    def _step_settings(self) -> Settings:
        """Of this moment: a caller may change them between steps."""
        return Settings(
            self.max_grad_norm,
            self.autocast_dtype,
            self.micro_batch_size,
            self.compile,
            self.rules,
            self.selection,
        )

    def _settings(self) -> tuple:
        """What `_step_on_device` reads on the host, and a caller could change."""
        training = None
        if isinstance(self.model, torch.nn.Module):
            training = [module.training for module in self.model.modules()]
        return (
            self.method,
            id(self.schedule),
            id(self.reference_model),
            _places(unwrapped(self.reference_model)),
            self._step_settings(),
            # A band with a schedule is a table of steps.
            self.total_steps,
            self.rows_here,
            training,
        )

    def _not_replayable(self) -> str | None:
        """What stands against replay, beside model and optimizer."""
        if self.process_group is not None or unwrapped(self.model) is not self.model:
            return "several processes, or DistributedDataParallel around the model"
        if not isinstance(unwrapped(self.reference_model), (torch.nn.Module, type(None))):
            return "a reference_model that is no torch.nn.Module"
        if self.method.inner_steps:
            return "inner steps, which are taken back"
        if self.grad_scaler is not None and self.grad_scaler.is_enabled():
            return "a grad_scaler, which decides on the host"
        hosted = [branch for branch, feed in self._feeds.items() if isinstance(feed, HostFeed)]
        if hosted:
            return f"rows that are brought from the host ({', '.join(hosted)})"
        return None

    def _not_replayable_now(self, draws: Draws | None) -> str | None:
        """What of this one step a graph cannot hold."""
        # They put back what is not on the device, too: the state of torch's random numbers.
        if self.method.inner_steps:
            return "inner steps, which are taken back"
        if draws is not None:
            return "draws that the caller gives"
        # Each time they lie in other memory.
        if any(parameter.grad is not None for parameter in self.parameters):
            return "gradients that the caller left in .grad"
        # It keeps converted weights: a graph would go on reading them.
        if torch.is_autocast_enabled(self.device.type):
            return "an autocast context around the step (autocast_dtype has one within)"
        return None

    @property
    def selection(self) -> Selection:
        """Which timesteps and frequencies count. Another one holds from the next step on.

        Processes that take steps together have to be given the same one between the same steps. The first
        step compares what they begin with; later ones do not, since a comparison waits for all processes.

        Raises:
            TypeError, ValueError: on assignment, for one that does not fit method, schedule or images.
        """
        return self._selection

    @selection.setter
    def selection(self, selection: Selection) -> None:
        if not isinstance(selection, Selection):
            raise TypeError(f"selection: expected a Selection, got {check.describe(selection)}")
        check_selection(self.method, self.schedule, selection)
        if self.forget is not None:
            check_band(selection.lowpass, *self.forget.shape[-2:], 0, self.total_steps)
        self._selection = selection

    time_window = _selected("time_window")
    retain_density = _selected("retain_density")
    lowpass = _selected("lowpass")
    loss_weight = _selected("loss_weight")
    snr_gamma = _selected("snr_gamma")

    @property
    def last_lr(self) -> float | None:
        """`lr_of_step` as a number. Reads the device where it lies there."""
        if self.lr_of_step is None:
            return None
        return float(self.lr_of_step)

    @property
    def replayed(self) -> bool:
        """Whether steps are replays of a CUDA graph by now."""
        return self._replay is not None and self._replay.captured

    @property
    def compile_seconds(self) -> float:
        """What the first calls of the compiled network took so far."""
        return compile_seconds(unwrapped(self.model))

    def state_dict(self) -> dict:
        """What, beside model, optimizer, scheduler and EMA, a resumed run needs; JSON-able.

        Reads the device.
        """
        return {"seed": self.seed, "step_index": self.step_index, "skipped_steps": int(self.skipped_steps)}

    def load_state_dict(self, state: dict) -> None:
        """Continues at the step that `state` was taken at.

        Raises:
            TypeError, ValueError: the state is of a run with another seed, or no state of a run.
        """
        taken = check.integer(
            "step_index", state["step_index"], low=0, high=philox.STEPS, of="32 bits of a counter"
        )
        skipped = check.integer(
            "skipped_steps", state["skipped_steps"], low=0, high=taken, of="the steps taken"
        )
        if state["seed"] != self.seed:
            raise ValueError(
                f"seed: expected the seed of the run that is resumed, {state['seed']}, got {self.seed}"
            )
        self._count_from(taken)
        self.skipped_steps.fill_(skipped)

    def _count_from(self, step: int) -> None:
        self.step_index = check.integer("step_index", step, low=0, high=philox.STEPS)
        # Number by number: a copy of a tensor from the host would wait for the device.
        for index, value in enumerate((self.seed, step, self.rank * self.rows_here)):
            self._counter[index].fill_(value)

    def _draw(self, draws: Draws) -> tuple[Batch, Draws]:
        """Draw: the rows of this step, and all other numbers of it."""
        source = CounterSource(self._counter, self.rank, self.num_processes)
        method = self.method
        forget = retain = neighbors = sqdist = None
        if "forget" in method.needs:
            forget, rows = self._take("forget", draws.forget_rows, source)
            if self.neighbors is not None:
                index, distances = self.neighbors
                neighbors, sqdist = self._neighbor_store.lazy(index[rows]), distances[rows]
        if "retain" in method.needs:
            retain, _ = self._take("retain", draws.retain_rows, source)

        # Rows have done their part; those of a set that the method does not read are refused with the rest.
        outside = self._outside(draws)
        taken = {f"{branch}_rows": None for branch in ("forget", "retain") if branch in method.needs}
        draws = replace(draws, **taken)
        wanted = self.selection.draws_of(method, self.schedule)
        draw.validate(draws, wanted, forget, retain, self.schedule)
        draws = draw.complete(draws, wanted, source, forget, retain, len(self.schedule))
        if outside is not None:
            draws = draw.without_timesteps(draws, outside)
        return Batch(forget, retain, neighbors, sqdist, stores=self._stores, sizes=self._sizes), draws

    def _outside(self, draws: Draws) -> Tensor | None:
        """Whether a given row that nobody could look at is none of its store: 0-d bool, on the device."""
        outside = None
        for branch in ("forget", "retain"):
            rows, store = getattr(draws, f"{branch}_rows"), getattr(self, branch)
            if rows is not None and store is not None and not check.readable(rows):
                here = ((rows.long() < 0) | (rows.long() >= len(store))).any()
                outside = here if outside is None else outside | here
        return outside

    def _take(self, branch: str, given: Tensor | None, source: CounterSource) -> tuple[Rows | Tensor, Tensor]:
        """This step's images of `branch`, and which rows of its store `[B]` they are."""
        store = getattr(self, branch)
        purpose = Purpose[f"{branch.upper()}_ROWS"]
        index = self._rows(f"draws.{branch}_rows", given, store, source, purpose).to(self.device)
        # No kernel reads beside the store; the step is skipped (`_outside`).
        if given is not None and not check.readable(given):
            index = index.clamp(0, len(store) - 1)
        served, places = self._feeds[branch].take(self.step_index, index, drawn=given is None)
        return served.draw(places, source.counter, Purpose[f"{branch.upper()}_POSTERIOR"]), index

    def _rows(
        self, name: str, given: Tensor | None, store: ImageStore, source: CounterSource, purpose: Purpose
    ) -> Tensor:
        """Rows of `store`, `[B]`: those given, or `batch_size` drawn ones."""
        if given is None:
            return source.integers(self.rows_here, len(store), purpose)
        check.tensor(name, given, ndim=1, floating=False)
        if len(given) == 0:
            raise ValueError(f"{name}: expected at least one row, got none")
        check.rows_within(name, given, len(store))
        return given.long()


def _searched_by(method: Method) -> dict[str, Any]:
    """The hyperparameters by which neighbours are searched."""
    within = getattr(method, "within_condition", False)
    return {"k": getattr(method, "k", None), "within_condition": within}


def _places(reference: Callable | None) -> tuple | None:
    """What a graph holds of a reference as constants: where its weights lie, and its mode."""
    if not isinstance(reference, torch.nn.Module):
        return None
    tensors = (*reference.parameters(), *reference.buffers())
    return [tensor.data_ptr() for tensor in tensors], [module.training for module in reference.modules()]
