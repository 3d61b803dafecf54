"""Cases of `Unlearner`: every method, with every kind of rows and everything that is called after a step."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from fastunlearn import (
    SISS,
    Draws,
    EraseDiff,
    ImageStore,
    NegGrad,
    ReTrack,
    Unlearner,
    Vanilla,
    nearest_neighbors,
)

from . import parts
from .registry import add

METHODS = {
    "retrack": ReTrack(k=2, lambd=0.3),
    "retrack of lambd 1": ReTrack(k=3, lambd=1.0),
    "siss": SISS(lambd=0.4, scaling_norm=2.0),
    "siss no_is": SISS(variant="no_is"),
    "siss bernoulli": SISS(variant="bernoulli"),
    "erasediff": EraseDiff(eta=0.01),
    "neggrad": NegGrad(superfactor=2.0),
    "vanilla": Vanilla(),
}


@dataclass(frozen=True)
class Setting:
    options: dict[str, Any] = field(default_factory=dict)  # of the Unlearner
    rows: str = "bytes"  # "floats", "latents", "posterior"
    prediction: str = "epsilon"
    optimizer: str = "fused"
    network: dict[str, Any] = field(default_factory=dict)
    average: bool = False
    decaying: bool = False  # with a scheduler of the learning rate
    scaler: bool = False
    given_rows: bool = False
    given_neighbors: bool = False
    standing: bool = False
    environment: dict[str, str] = field(default_factory=dict)


SETTINGS = {
    "bytes": Setting(),
    "floats": Setting(rows="floats"),
    "latents": Setting(rows="latents"),
    "posterior": Setting(rows="posterior"),
    "micro batches of 4": Setting({"micro_batch_size": 4}),
    "micro batches of 1, floats": Setting({"micro_batch_size": 1}, rows="floats"),
    "average and scheduler": Setting(average=True, decaying=True),
    "everything": Setting(
        {"micro_batch_size": 4, "max_grad_norm": 0.1},
        average=True,
        decaying=True,
        scaler=True,
        prediction="v_prediction",
    ),
    "bfloat16": Setting({"autocast_dtype": torch.bfloat16}),
    "flow, floats": Setting(rows="floats", prediction="flow"),
    "sample": Setting(prediction="sample"),
    "plain optimizer": Setting(optimizer="adamw"),
    "sgd, no clipping": Setting({"max_grad_norm": None}, optimizer="sgd"),
    "gradient kept": Setting({"keep_grad": True}, standing=True),
    "dropout": Setting(network={"dropout": 0.3}),
    "rows on the host": Setting({"residency": "host"}),
    "rows on the device": Setting({"residency": "device"}),
    "given rows": Setting(given_rows=True),
    "given neighbours": Setting(given_neighbors=True),
    "large seed": Setting({"seed": 2**40 + 3}),
    "reference": Setting(environment={"FASTUNLEARN_BACKEND": "reference"}),
    "reference, floats, flow": Setting(
        rows="floats", prediction="flow", environment={"FASTUNLEARN_BACKEND": "reference"}
    ),
    "eager": Setting(environment={"FASTUNLEARN_BACKEND": "eager"}),
    "eager, posterior": Setting(rows="posterior", environment={"FASTUNLEARN_BACKEND": "eager"}),
    "kernels": Setting(environment={"FASTUNLEARN_BACKEND": "kernels"}),
    "checked": Setting(environment={"FASTUNLEARN_CHECK": "1"}),
}


def make_stores(rows: str) -> dict[str, ImageStore]:
    """Four rows to forget and twenty to keep."""
    if rows == "bytes":
        return {"forget": ImageStore(parts.byte_images(4, 1)), "retain": ImageStore(parts.byte_images(20, 2))}
    forget, retain = parts.images(4, 1), parts.images(20, 2)
    if rows == "posterior":
        return {
            "forget": ImageStore(forget, std=forget.abs() / 10, latents=True),
            "retain": ImageStore(retain, std=retain.abs() / 10, latents=True),
        }
    return {
        "forget": ImageStore(forget, latents=rows == "latents"),
        "retain": ImageStore(retain, latents=rows == "latents"),
    }


def make(
    method,
    setting: Setting,
    model: nn.Module | None = None,
    *,
    kind: type[Unlearner] = Unlearner,
    **more: Any,
) -> Unlearner:
    torch.manual_seed(7)
    model = parts.Denoiser(**setting.network) if model is None else model
    optimizer = parts.make_optimizer(setting.optimizer, model)
    stores = make_stores(setting.rows)
    extra: dict[str, Any] = {}
    if setting.average:
        extra["ema"] = parts.Average(model.parameters())
    if setting.decaying:
        extra["lr_scheduler"] = torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, 1.0, 4)
    if setting.scaler:
        extra["grad_scaler"] = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    if setting.given_neighbors and isinstance(method, ReTrack):
        extra["neighbors"] = nearest_neighbors(stores["forget"], stores["retain"], method.k)
    options = {"batch_size": 6, "seed": 5} | setting.options | extra | more
    return kind(model, optimizer, parts.schedule(setting.prediction), method, **stores, **options)


def make_draws(unlearner: Unlearner, setting: Setting, step: int) -> Draws | None:
    """Rows of both stores for every other step."""
    if not setting.given_rows or step % 2:
        return None
    given, method = {}, unlearner.method
    reads = method.needs if hasattr(method, "needs") else method.batches  # its name in older trees
    if "forget" in reads:
        given["forget_rows"] = torch.tensor([0, 3, 1, 1, 2, 0])
    if "retain" in reads:
        given["retain_rows"] = torch.tensor([19, 3, 1, 7, 2, 0])
    return Draws(**given)


def left_by(unlearner: Unlearner) -> dict[str, Any]:
    """Everything that steps leave."""
    objects = {
        name: getattr(unlearner, name)
        for name in ("model", "optimizer", "ema", "lr_scheduler", "grad_scaler")
    }
    left: dict[str, Any] = {name: each.state_dict() for name, each in objects.items() if each is not None}
    return left | {
        "unlearner": unlearner.state_dict(),
        "lr": unlearner.last_lr,
        "replayed": unlearner.replayed,
        "skipped": unlearner.skipped_steps,
        "neighbours": unlearner.neighbor_rows,
        "random state": torch.get_rng_state(),
    }


def take_steps(
    method, setting: Setting, place=None, *, count: int = 4, make_network=None, **more: Any
) -> dict[str, Any]:
    with parts.environment(**setting.environment):
        unlearner = make(method, setting, None if make_network is None else make_network(), **more)
        outputs = []
        for step in range(count):
            if setting.standing:
                sum((parameter - 1).square().sum() for parameter in unlearner.model.parameters()).backward()
            outputs.append(unlearner.step(make_draws(unlearner, setting, step)))
    return {"output": outputs} | left_by(unlearner)


def go_on(method, place=None) -> dict[str, Any]:
    """Two steps, and two more of a second Unlearner that begins with the state of the first."""
    setting = Setting(average=True, decaying=True)
    first, second = make(method, setting), make(method, setting)
    outputs = [first.step() for _ in range(2)]
    for name in ("model", "optimizer", "ema", "lr_scheduler"):
        getattr(second, name).load_state_dict(getattr(first, name).state_dict())
    second.load_state_dict(first.state_dict())
    outputs += [second.step() for _ in range(2)]
    return {"output": outputs} | left_by(second)


def diffusers_network(**config: Any) -> nn.Module:
    """A UNet of diffusers with attention, for 8x8 images."""
    import diffusers

    blocks = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    size = {
        "sample_size": 8,
        "layers_per_block": 1,
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
        "attention_head_dim": 4,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return diffusers.UNet2DModel(**{"in_channels": 1, "out_channels": 1, **size, **blocks, **config})


for method_name, method in METHODS.items():
    for setting_name, setting in SETTINGS.items():
        add("Unlearner", f"{method_name}, {setting_name}", partial(take_steps, method, setting))
    add("Unlearner", f"{method_name}, state of another", partial(go_on, method))
    add(
        "Unlearner",
        f"{method_name}, UNet of diffusers",
        partial(take_steps, method, Setting(), count=2, make_network=diffusers_network),
        quick=False,
    )
