"""Small protocols of deletion, shared by their tests: also by those of two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import runs
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastunlearn import SISS, ImageStore, NegGrad, ReTrack, Unlearner, Vanilla
from fastunlearn.metrics.deletion import Measures
from fastunlearn.runs.protocols import Request, unlearn_each
from fastunlearn.testing.factories import TinyDenoiser, linear_schedule

STEPS, FORGET, RETAIN = 3, 3, 20
METHODS = {
    "neggrad": NegGrad(),
    "retrack": ReTrack(k=2, lambd=0.3),
    "siss": SISS(scaling_norm=0.5),
    "vanilla": Vanilla(),
}


def forget_set() -> ImageStore:
    return ImageStore(runs.images(FORGET, 1))


def retain_set() -> ImageStore:
    return ImageStore(runs.images(RETAIN, 2))


class Dropping(nn.Module):
    """A network whose steps depend on torch's random state, too."""

    def __init__(self):
        super().__init__()
        self.network, self.dropout = TinyDenoiser(), nn.Dropout(0.2)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.network(self.dropout(x_t), t)


def original() -> nn.Module:
    return Dropping()


def with_weights(start: Path | None) -> nn.Module:
    """The original network, or the one that a request left in its folder."""
    model = original()
    if start is not None:
        model.load_state_dict(load_file(start / "left.safetensors"))
    return model


def make(request: Request, *, method: str = "retrack", process_group=None, **options: Any) -> Unlearner:
    model = with_weights(request.start)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.pop("lr", 1e-3), fused=True)
    sets = {"forget": request.forget, "retain": retain_set()} | options
    return Unlearner(
        model,
        optimizer,
        linear_schedule(50),
        METHODS[method],
        seed=request.seed,
        batch_size=4,
        ema=runs.Ema(model.parameters()),
        process_group=process_group,
        **sets,
    )


def leave(request: Request, unlearner: Unlearner) -> nn.Module:
    """Writes the average of the weights."""
    with torch.no_grad():
        for parameter, average in zip(unlearner.model.parameters(), unlearner.ema.shadow_params, strict=True):
            parameter.copy_(average)
    save_file(unlearner.model.state_dict(), request.folder / "left.safetensors")
    return unlearner.model


def measures(**options: Any) -> Measures:
    few = {"draws": 8, "retain_draws": 2, "retain_images": 5, "batch_size": 16}
    return Measures(linear_schedule(50), retain_set(), **few | options)


def run(folder: Path, protocol: str, method: str = "retrack", **options: Any) -> dict[str, Any]:
    """A protocol in `folder`, with a checkpoint every second step, begun or gone on with."""
    made = {name: options.pop(name) for name in ("lr", "retain") if name in options}
    group = options.get("process_group")
    given = {
        "protocol": protocol,
        "num_steps": STEPS,
        "output_dir": folder,
        "measures": measures(),
        "seed": 5,
        "resume_from_checkpoint": "latest",
        "checkpointing_steps": 2,
        "show_progress": False,
    }

    def built(request: Request) -> Unlearner:
        return make(request, method=method, process_group=group, **made)

    forget = options.pop("forget", None) or forget_set()
    return unlearn_each(forget, options.pop("make", built), leave, **given | options)


def left(folder: Path, number: int) -> dict[str, Tensor]:
    return load_file(folder / f"request-{number}" / "left.safetensors")
