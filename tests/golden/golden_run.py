"""Golden runs of golden/steps, repeated by the package: its reports, its first gradient and its updates."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from golden_feeds import Feed, feed_of
from safetensors.torch import load_file
from torch import Tensor

import fastunlearn as fu
from fastunlearn.testing import golden

STEPS = golden.root(Path(__file__).parent / "data") / "steps"
PER_MICRO_STEP = ("loss", "retain_loss", "forget_loss")


@dataclass(frozen=True)
class Call:
    """One call of the network."""

    given: Tensor  # [R, C, H, W]
    returned: Tensor  # [R, C, H, W]


class Run:
    """One golden run in one precision.

    An optimizer step of the official code may accumulate several micro-steps. The package takes it as one
    step on their joined batch, which `micro_batch_size` splits; what each micro-step alone would report is
    asked for before, without an update.
    """

    def __init__(self, name: str, dtype: torch.dtype):
        self.case, self.dtype = golden.Case(STEPS / f"{name}.npz"), dtype
        meta = self.case.meta
        self.accumulation, self.micro_steps = meta["gradient_accumulation_steps"], meta["micro_steps"]
        self.updates = (
            self.micro_steps // self.accumulation
        )  # micro-steps after the last update are left over
        logging.getLogger("diffusers").setLevel(logging.ERROR)  # it advises against casting the network
        self.model = diffusers.UNet2DModel(**meta["model"])
        self.model.load_state_dict(load_file(STEPS / meta["init"]))
        self.model.to(dtype).train()
        settings = {key: value for key, value in meta["optimizer"].items() if key != "name"}
        self.optimizer = getattr(torch.optim, meta["optimizer"]["name"])(self.model.parameters(), **settings)
        scheduler = diffusers.DDPMScheduler(
            num_train_timesteps=1000, beta_schedule="linear", beta_start=1e-4, beta_end=0.02
        )
        self.schedule = fu.NoiseSchedule.from_diffusers(scheduler)
        self.start = self.parameters()
        self.first_gradient: list[Tensor] | None = None  # before clipping; None where the run makes no update
        self.calls: list[list[Call]] = []  # of the network, micro-step by micro-step
        self.report: dict[
            str, list[Tensor]
        ] = {}  # in the papers' weights: one entry a micro-step, or an optimizer step
        self.joined: dict[str, list[Tensor]] = {}  # the losses that the steps on joined batches report
        assert [name for name, _ in self.model.named_parameters()] == meta["param_names"]
        assert meta["lr_scheduler"] == "constant"

    def take(self) -> None:
        """Runs every micro-step and every update."""
        if self.updates:
            self._step(range(self.accumulation), optimizer=None)  # leaves the combined, unclipped gradient
            self.first_gradient = [parameter.grad.clone() for parameter in self.model.parameters()]
        for s in range(self.micro_steps):
            window = range(s + 1 - self.accumulation, s + 1)
            if self.accumulation == 1:
                micro = whole = self._watched(s, optimizer=self.optimizer)
            else:
                micro = self._watched(s, optimizer=None)
                whole = (
                    self._step(window, optimizer=self.optimizer) if (s + 1) % self.accumulation == 0 else None
                )
            self._note({key: getattr(micro, key) for key in PER_MICRO_STEP})
            self._note({"param_norm": norm(self.parameters()), "delta_norm": norm(self.update())})
            if whole is not None:
                assert not whole.skipped
                self._note(
                    {key: value for key, value in whole._asdict().items() if key not in PER_MICRO_STEP}
                )
                for key in PER_MICRO_STEP:
                    self.joined.setdefault(key, []).append(getattr(whole, key))

    def feed(self, steps: range) -> Feed:
        return feed_of(self.case.meta)(self, steps)

    def _watched(self, s: int, *, optimizer: torch.optim.Optimizer | None) -> fu.StepOutput:
        calls: list[Call] = []
        hook = self.model.register_forward_hook(
            lambda model, inputs, output: calls.append(Call(inputs[0], output.sample.detach().clone()))
        )
        output = self._step(range(s, s + 1), optimizer=optimizer)
        hook.remove()
        self.calls.append(calls)
        return output

    def _step(self, steps: range, *, optimizer: torch.optim.Optimizer | None) -> fu.StepOutput:
        """One step of the package on the joined micro-steps `steps`, reported in the papers' weights.

        Where those differ from ours by a factor, the gradient is multiplied by it before it is clipped and
        applied.
        """
        feed, clip = self.feed(steps), self.case.meta["clip_max_norm"]
        self.model.zero_grad()
        if optimizer is not None and "out.f32.main_norm" in self.case:
            self._note({"main_norm": feed.main_norm})
        # steps without an optimizer leave their gradient, and the next step refuses it
        self.model.zero_grad()
        options = {"micro_batch_size": feed.micro_batch_size if self.accumulation > 1 else None}
        if feed.main == 1:
            output = feed.step(optimizer, max_grad_norm=clip, **options)
        elif optimizer is None:
            output = feed.step(None, **options)
            self._multiply_gradients(feed.main)
        else:
            hook = optimizer.register_step_pre_hook(lambda *_: self._multiply_gradients(feed.main, clip))
            output = feed.step(optimizer, max_grad_norm=None, **options)
            hook.remove()
        return _in_the_papers_weights(output, feed)

    def _multiply_gradients(self, factor: float, clip: float | None = None) -> None:
        for parameter in self.model.parameters():
            parameter.grad.mul_(factor)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip)

    def _note(self, values: dict[str, Tensor | None]) -> None:
        for key, value in values.items():
            self.report.setdefault(key, []).append(value)

    def input(self, s: int, key: str) -> Tensor:
        return self.case(f"in.step{s}.{key}", self.dtype)

    def parameters(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.model.parameters()]

    def update(self) -> list[Tensor]:
        return [now - start for now, start in zip(self.parameters(), self.start, strict=True)]

    def series(self, key: str) -> Tensor:
        return torch.stack([value.double() for value in self.report[key]])


def _in_the_papers_weights(output: fu.StepOutput, feed: Feed) -> fu.StepOutput:
    """`main` and `correction` multiply the two gradients, so their losses and norms, too."""
    changes = {"loss": output.loss * feed.main, "grad_norm": output.grad_norm * feed.main}
    if output.retain_loss is not None:
        changes["retain_loss"] = output.retain_loss * feed.main
    if output.forget_loss is not None:
        changes["forget_loss"] = output.forget_loss * feed.correction
    if output.scaling_factor is not None:
        changes["correction_norm"] = output.correction_norm * feed.correction
        changes["scaling_factor"] = output.scaling_factor * feed.ratio
    return output._replace(**changes)


def norm(tensors: list[Tensor]) -> Tensor:
    return torch.stack([tensor.double().square().sum() for tensor in tensors]).sum().sqrt()


def norms(tensors: list[Tensor]) -> Tensor:
    return torch.stack([tensor.double().norm() for tensor in tensors])
