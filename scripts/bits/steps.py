"""Cases of the `*_step` functions: every method under every setting that it knows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastunlearn import Draws, erasediff_step, neggrad_step, retrack_step, siss_step, vanilla_step

from . import parts
from .registry import add

BOTH = frozenset({"forget", "retain"})


@dataclass(frozen=True)
class Data:
    forget: Tensor  # [6, 1, 8, 8]
    retain: Tensor  # [R, 1, 8, 8]
    neighbors: Tensor  # [6, 3, 1, 8, 8]

    @property
    def sqdist(self) -> Tensor:
        """`[6, 3]` float64."""
        return (self.neighbors.double() - self.forget[:, None].double()).square().flatten(2).sum(2)


@dataclass(frozen=True)
class Kind:
    """A step function with hyperparameters."""

    call: Callable[..., Any]  # (model, optimizer, schedule, data, **options)
    reads: frozenset[str] = BOTH
    draws: frozenset[str] = frozenset()  # beside noise and timesteps
    pairs: bool = False  # forget and retain rows belong together


def _siss(variant: str) -> Kind:
    def call(model, optimizer, schedule, data, **options):
        return siss_step(
            model,
            optimizer,
            schedule,
            data.forget,
            data.retain,
            lambd=0.4,
            scaling_norm=2.0,
            variant=variant,
            **options,
        )

    return Kind(call, draws=frozenset() if variant == "no_is" else frozenset({"from_forget"}), pairs=True)


def _retrack(lambd: float = 0.3, *, distances: bool = False) -> Kind:
    def call(model, optimizer, schedule, data, **options):
        retain = data.retain if lambd < 1 else None
        sqdist = data.sqdist if distances else None
        return retrack_step(
            model,
            optimizer,
            schedule,
            data.forget,
            data.neighbors,
            retain,
            lambd=lambd,
            sqdist=sqdist,
            **options,
        )

    return Kind(call, BOTH if lambd < 1 else frozenset({"forget"}))


def _erasediff(model, optimizer, schedule, data, **options):
    return erasediff_step(model, optimizer, schedule, data.forget, data.retain, eta=0.01, **options)


def _neggrad(model, optimizer, schedule, data, **options):
    return neggrad_step(model, optimizer, schedule, data.forget, superfactor=2.0, **options)


def _vanilla(model, optimizer, schedule, data, **options):
    return vanilla_step(model, optimizer, schedule, data.retain, **options)


KINDS = {
    "retrack": _retrack(),
    "retrack of lambd 1": _retrack(1.0),
    "retrack with distances": _retrack(distances=True),
    "siss": _siss("mixture"),
    "siss no_is": _siss("no_is"),
    "siss bernoulli": _siss("bernoulli"),
    "erasediff": Kind(_erasediff, draws=frozenset({"uniform_target"})),
    "neggrad": Kind(_neggrad, frozenset({"forget"})),
    "vanilla": Kind(_vanilla, frozenset({"retain"})),
}


@dataclass(frozen=True)
class Setting:
    """Under what a step is taken."""

    options: dict[str, Any] = field(default_factory=dict)  # of the step
    prediction: str = "epsilon"
    optimizer: str = "fused"
    scaler: bool = False
    standing: bool = False  # a gradient stands in `.grad` before each step
    draws: str = ""  # "given", or "nan": noise that is not finite
    generator: bool = True  # else torch's global one
    condition: str = ""  # "same", "other", "nested"
    channels_last: bool = False
    dtype: torch.dtype = torch.float32
    network: dict[str, Any] = field(default_factory=dict)
    frozen: bool = False
    retain_rows: int = 6
    environment: dict[str, str] = field(default_factory=dict)
    make: Callable[[], nn.Module] | None = None


def _micro(rows: int, **more) -> Setting:
    return Setting({"micro_batch_size": rows}, **more)


SETTINGS = {
    "plain": Setting(),
    "global generator": Setting(generator=False),
    "given draws": Setting(draws="given"),
    "noise of nan": Setting(draws="nan"),
    "noise of nan, plain optimizer": Setting(draws="nan", optimizer="adamw"),
    "micro batches of 3": _micro(3),
    "micro batches of 4": _micro(4),
    "micro batches of 5, retain rows 7": _micro(5, retain_rows=7),
    "micro batches of 1": _micro(1),
    "retain rows 4": Setting(retain_rows=4),
    "bfloat16": Setting({"autocast_dtype": torch.bfloat16}),
    "bfloat16, micro batches of 4": Setting({"autocast_dtype": torch.bfloat16, "micro_batch_size": 4}),
    "float16 with a scaler": Setting({"autocast_dtype": torch.float16}, scaler=True),
    "scaler": Setting(scaler=True),
    "scaler, plain optimizer": Setting(scaler=True, optimizer="adamw"),
    "scaler, noise of nan": Setting(scaler=True, draws="nan"),
    "plain optimizer": Setting(optimizer="adamw"),
    "sgd": Setting(optimizer="sgd"),
    "two groups": Setting(optimizer="groups"),
    "no optimizer": Setting(optimizer="none"),
    "no optimizer, micro batches of 4": _micro(4, optimizer="none"),
    "no optimizer, scaler": Setting(optimizer="none", scaler=True),
    "no optimizer, gradient kept": Setting({"keep_grad": True}, optimizer="none", standing=True),
    "gradient kept": Setting({"keep_grad": True}, standing=True),
    "gradient kept, scaler": Setting({"keep_grad": True}, standing=True, scaler=True),
    "no clipping": Setting({"max_grad_norm": None}),
    "clipped hard": Setting({"max_grad_norm": 1e-3}),
    "clipped hard, plain optimizer": Setting({"max_grad_norm": 1e-3}, optimizer="adamw"),
    "v": Setting(prediction="v_prediction"),
    "sample": Setting(prediction="sample"),
    "flow": Setting(prediction="flow"),
    "same labels": Setting(condition="same"),
    "other labels": Setting(condition="other"),
    "other labels, micro batches of 4": _micro(4, condition="other"),
    "other labels, no optimizer": Setting(condition="other", optimizer="none"),
    "nested conditions": Setting(condition="nested"),
    "channels last": Setting(channels_last=True),
    "channels last, flow, micro batches of 4": _micro(4, channels_last=True, prediction="flow"),
    "float64": Setting(dtype=torch.float64),
    "bfloat16 images": Setting({"autocast_dtype": torch.bfloat16}, dtype=torch.bfloat16),
    "dropout": Setting(network={"dropout": 0.3}),
    "batch norm, micro batches of 4": _micro(4, network={"batch_norm": True}),
    "frozen": Setting(frozen=True),
    "checked": Setting(environment={"FASTUNLEARN_CHECK": "1"}),
    "reference": Setting(environment={"FASTUNLEARN_BACKEND": "reference"}),
    "eager": Setting(environment={"FASTUNLEARN_BACKEND": "eager"}),
    "eager, v, micro batches of 4": _micro(
        4, prediction="v_prediction", environment={"FASTUNLEARN_BACKEND": "eager"}
    ),
    "kernels": Setting(environment={"FASTUNLEARN_BACKEND": "kernels"}),
}


def make_data(step: int, setting: Setting) -> Data:
    """A step's images: pairs and neighbours are alike, so that importance weights are not all 0 or 1."""
    forget = parts.images(6, 10 + step)
    retain = parts.images(setting.retain_rows, 20 + step)
    retain[:4] = forget[:4] + 0.02 * retain[:4]
    neighbors = forget[:, None] + 0.05 * torch.randn(6, 3, *parts.SHAPE, generator=parts.seeded(30 + step))
    made = [each.clamp(-1, 1).to(setting.dtype) for each in (forget, retain, neighbors)]
    if setting.channels_last:
        made[:2] = [each.to(memory_format=torch.channels_last) for each in made[:2]]
    return Data(*made)


def make_draws(step: int, kind: Kind, setting: Setting, data: Data) -> Draws | None:
    if not setting.draws:
        return None
    generator = parts.seeded(40 + step)
    values: dict[str, Tensor] = {}
    for branch in sorted(kind.reads):
        rows = getattr(data, branch)
        noise = torch.randn(rows.shape, generator=generator).to(rows.dtype)
        values[f"{branch}_noise"] = noise * torch.nan if setting.draws == "nan" and step == 0 else noise
        values[f"{branch}_timesteps"] = torch.tensor([20, 400, 90, 999, 3, 700, 60])[: len(rows)]
    if "from_forget" in kind.draws:
        values["from_forget"] = torch.tensor([True, False, False, True, True, False])
    if "uniform_target" in kind.draws:
        values["uniform_target"] = torch.rand(data.forget.shape, generator=generator).to(data.forget.dtype)
    return Draws(**values)


def make_conditions(kind: Kind, setting: Setting, data: Data) -> dict[str, Any]:
    made = {}
    for branch in sorted(kind.reads) if setting.condition else ():
        labels = torch.tensor([0, 1, 2, 3, 4, 5, 6])[: len(getattr(data, branch))]
        if setting.condition == "other" and branch == "retain":
            labels = labels + torch.tensor([0, 1, 0, 2, 0, 3, 0])[: len(labels)]
        made[f"{branch}_kwargs"] = {"labels": labels}
        if setting.condition == "nested":
            scale = torch.linspace(0.5, 1.5, len(labels)).view(-1, 1)
            made[f"{branch}_kwargs"] |= {"added": {"scale": scale}, "strength": 0.5}
    return made


def take_steps(
    kind: Kind, setting: Setting, place=None, *, count: int = 2, group=None, part: slice = slice(None)
) -> dict[str, Any]:
    """Two steps: what they report, and everything that they leave."""
    torch.manual_seed(7)
    model = make_model(setting)
    optimizer = parts.make_optimizer(setting.optimizer, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if setting.scaler else None
    generator = parts.seeded(3) if setting.generator else None
    schedule, outputs, gradients = parts.schedule(setting.prediction), [], []
    with parts.environment(**setting.environment):
        for step in range(count):
            whole = make_data(step, setting)
            data = Data(whole.forget[part], whole.retain[part], whole.neighbors[part])
            given = {
                "draws": make_draws(step, kind, setting, data),
                "generator": generator,
                "grad_scaler": scaler,
            }
            given |= {"process_group": group} if group is not None else {}
            if setting.standing:
                penalty = sum((parameter - 1).square().sum() for parameter in model.parameters())
                (penalty if scaler is None else scaler.scale(penalty)).backward()
            outputs.append(
                kind.call(
                    model,
                    optimizer,
                    schedule,
                    data,
                    **given,
                    **make_conditions(kind, setting, data),
                    **setting.options,
                )
            )
            gradients.append(
                {
                    name: None if parameter.grad is None else parameter.grad.clone()
                    for name, parameter in model.named_parameters()
                }
            )
            model.zero_grad(set_to_none=True)
    return {
        "output": outputs,
        "gradient": gradients,
        "model": model.state_dict(),
        "optimizer": None if optimizer is None else optimizer.state_dict(),
        "scaler": None if scaler is None else scaler.state_dict(),
        "random state": [torch.get_rng_state(), None if generator is None else generator.get_state()],
    }


def make_model(setting: Setting) -> nn.Module:
    model = (setting.make or partial(parts.Denoiser, **setting.network))()
    if setting.dtype == torch.float64:
        model = model.double()
    if setting.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if setting.frozen:
        model.time.requires_grad_(False)
    return model


def fits(kind: Kind, setting: Setting) -> bool:
    return not (kind.pairs and setting.retain_rows != 6)


for kind_name, kind in KINDS.items():
    for setting_name, setting in SETTINGS.items():
        if fits(kind, setting):
            add("steps", f"{kind_name}, {setting_name}", partial(take_steps, kind, setting))
