"""The runs that `make_golden.py` makes: settings, and inputs drawn from seeds and scikit-learn's digits."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

RETRACK, SISS = "retrack_train_step", "siss_train_loop"


@dataclass(frozen=True)
class Setting:
    """One run of the official code."""

    kind: str
    method: str  # ReTrack's method, or the name of SISS' loss function
    accumulation: int
    micro_steps: int
    params: dict[str, float] = field(default_factory=dict)  # of the loss
    extra: dict[str, float] = field(default_factory=dict)  # of the step
    batch: int = 2
    rows: dict[str, int | list[int]] = field(default_factory=dict)  # branch -> its batch (of every step)
    neighbors: int = 3
    side: int = 8  # digits have 8 x 8 pixels; 16 repeats each
    uniforms: dict[int, list[float]] = field(default_factory=dict)  # micro-step -> what picks the branch
    timesteps: tuple[int, int] = (50, 950)
    seed: int = 0

    def inputs(self, digits: np.ndarray) -> list[dict[str, Tensor]]:
        """What each micro-step is given, by the names of the `in.step<s>.*` arrays."""
        random = torch.Generator().manual_seed(self.seed)
        draw = self._retrack if self.kind == RETRACK else self._siss
        return [draw(s, digits, random) for s in range(self.micro_steps)]

    def _images(self, digits: np.ndarray, count: int, random: torch.Generator) -> Tensor:
        rows = torch.randint(len(digits), (count,), generator=random)
        pixels = torch.from_numpy(digits)[rows].view(count, 1, 8, 8).float() / 8 - 1
        return pixels.repeat_interleave(self.side // 8, 2).repeat_interleave(self.side // 8, 3)

    def _noise(self, count: int, random: torch.Generator) -> Tensor:
        return torch.randn(count, 1, self.side, self.side, generator=random)

    def _uniform(self, s: int, count: int, random: torch.Generator) -> Tensor:
        drawn = torch.rand(count, generator=random)
        return torch.tensor(self.uniforms[s]) if s in self.uniforms else drawn

    def _retrack(self, s: int, digits: np.ndarray, random: torch.Generator) -> dict[str, Tensor]:
        branches = {
            "vanilla": ["remain"], "neggrad": ["deletion"], "retrack": ["remain", "knn"],
            "erasediff": ["remain", "deletion"], "siss": ["remain", "deletion"],
        }[self.method]  # fmt: skip
        step = {}
        for branch in branches:
            rows = self.rows.get(branch, self.batch)
            count = rows[s] if isinstance(rows, list) else rows
            step[f"images.{branch}"] = self._images(digits, count, random)
            step[f"noises.{branch}"] = self._noise(count, random)
            step[f"timesteps.{branch}"] = torch.randint(*self.timesteps, (count,), generator=random)
        if self.method == "retrack":
            count = len(step["images.knn"])
            near = self._images(digits, count * self.neighbors, random)
            step["knn_neighbors"] = near.view(count, self.neighbors, *near.shape[1:])
        if self.method == "erasediff":
            step["erasediff_uniform"] = torch.rand(step["images.deletion"].shape, generator=random)
        if self.method == "siss":
            # A pair that is far apart gives its branch all the weight; a near one shares it.
            step["images.deletion"] = (step["images.remain"] + 0.1 * step["images.deletion"]).clamp(-1, 1)
            step["siss_uniform"] = self._uniform(s, count, random)
        return step

    def _siss(self, s: int, digits: np.ndarray, random: torch.Generator) -> dict[str, Tensor]:
        step = {
            "images.remain": self._images(digits, self.batch, random),
            "images.deletion": self._images(digits, self.batch, random),
            "noise": self._noise(self.batch, random),
            "timesteps": torch.randint(*self.timesteps, (self.batch,), generator=random),
        }
        if self.method in ("importance_sampling_with_mixture", "subscore_bernoulli"):
            step["mask_uniform"] = self._uniform(s, self.batch, random)
        if self.method == "erasediff":
            step["erasediff_uniform"] = torch.rand(step["images.deletion"].shape, generator=random)
        return step


def selection(which: str) -> dict[str, Setting]:
    """`small`: what is committed. `wide`: every method and loss, with several numbers of micro-steps."""
    siss = Setting(RETRACK, "siss", 4, 4, {"lambda": 0.5}, {"rescale_factor": 5}, seed=101)
    erasediff = Setting(
        RETRACK, "erasediff", 2, 3, {}, {"eta": 0.1}, rows={"remain": 2, "deletion": 1}, seed=102
    )
    # Picks: each branch; the forget branch alone, at which the official loss loses its term; then the retain
    # branch alone.
    bernoulli = Setting(
        SISS, "subscore_bernoulli", 3, 6, {"lambd": 0.4}, {"scaling_norm": 5}, seed=103,
        uniforms={
            0: [0.9, 0.1], 1: [0.2, 0.3], 2: [0.7, 0.8], 3: [0.5, 0.6], 4: [0.95, 0.45], 5: [0.41, 0.99],
        },
    )  # fmt: skip
    small = {
        "step_siss_accumulation4": siss,
        "step_erasediff_accumulation2": erasediff,
        "sissloop_bernoulli_accumulation3": bernoulli,
    }
    return small if which == "small" else small | _wide(siss, erasediff, bernoulli)


def _wide(siss: Setting, erasediff: Setting, bernoulli: Setting) -> dict[str, Setting]:
    settings = {}
    for n, micro_steps, batch in ((1, 2, 4), (2, 3, 3), (4, 8, 2)):
        large = {"accumulation": n, "micro_steps": micro_steps, "batch": batch, "seed": 200 + n}
        whole = large | {"micro_steps": micro_steps // n * n}  # SISS' loop ends with a step
        plain = Setting(RETRACK, "vanilla", n, micro_steps)
        settings |= {
            f"step_vanilla_n{n}": replace(plain, **large),
            f"step_neggrad_n{n}": replace(plain, method="neggrad", **large),
            f"step_retrack_n{n}": replace(plain, method="retrack", params={"lambda": 0.3}, **large),
            f"step_retrack_unequal_n{n}": replace(
                plain, method="retrack", params={"lambda": 0.3}, rows={"remain": 5, "knn": 2}, **large
            ),
            f"step_erasediff_n{n}": replace(erasediff, rows={}, **large),
            f"step_erasediff_eta0.001_n{n}": replace(erasediff, rows={}, extra={"eta": 0.001}, **large),
            f"step_erasediff_unequal_n{n}": replace(erasediff, rows={"remain": 5, "deletion": 3}, **large),
            f"step_siss_n{n}": replace(siss, **large),
            f"sissloop_bernoulli_n{n}": replace(
                bernoulli, uniforms={0: [0.9, 0.1, 0.5, 0.2][:batch]}, **whole
            ),
        }
        for loss, params, extra in (
            ("importance_sampling_with_mixture", {"lambd": 0.5}, {"scaling_norm": 5}),
            ("double_forward_with_neg_del", {}, {"scaling_norm": 5}),
            ("erasediff", {}, {"eta": 0.1}),
            ("simple_neg_del", {"superfactor": 0.25}, {}),
            ("naive_del", {}, {}),
        ):
            settings[f"sissloop_{loss}_n{n}"] = Setting(SISS, loss, n, 0, params, extra)
            settings[f"sissloop_{loss}_n{n}"] = replace(settings[f"sissloop_{loss}_n{n}"], **whole)
    settings["step_erasediff_uneven"] = replace(
        erasediff, micro_steps=5, rows={"remain": [3, 1, 2, 4, 2], "deletion": [2, 3, 1, 2, 2]}, seed=301
    )
    settings["step_retrack_uneven"] = replace(
        settings["step_retrack_n2"], micro_steps=5, rows={"remain": [3, 1, 2, 4, 2], "knn": [2, 3, 1, 2, 2]}
    )
    settings["step_vanilla_uneven"] = replace(
        settings["step_vanilla_n2"], micro_steps=5, rows={"remain": [3, 1, 2, 4, 2]}
    )
    return settings
