"""The flags of rules on weights: from words of the command line to a `Mask` and an `Anchor`."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from .options import called, unset
from .selection_flags import given_flags

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..host.store import ImageStore
    from ..objective.parameters import ParameterRule
    from ..objective.protocol import Method
    from ..objective.schedule import NoiseSchedule
    from ..objective.time import Density
    from ..runs.processes import Processes

# What each anchor reads beside the flags of all, by the name on the command line.
OWN_FLAGS = {
    "vdu": ("anchor_checkpoints", "anchor_max_precision"),
    "vdu_laplace": ("anchor_samples", "anchor_prior_precision", "anchor_max_precision"),
    "vdu_swag": ("anchor_steps", "anchor_max_precision"),
    "vdu_l2": (),
}
FROM_RETAIN = ("vdu_laplace", "vdu_swag")


@dataclass(kw_only=True)
class RuleFlags:
    """What holds weights where they are, with any method. An anchor pulls them back: with --method neggrad it
    is VDU in the form that follows from its derivation (the published formula is not known to us). A mask
    keeps those out that matter least to the images to forget, as SalUn's.
    """

    anchor: Annotated[
        Literal["vdu", "vdu_laplace", "vdu_swag", "vdu_l2"] | None,
        unset("none", "vdu|vdu_laplace|vdu_swag|vdu_l2"),
    ] = None
    """How firmly each weight is held. vdu: by its variance over --anchor_checkpoints. From the checkpoint \
alone, which is not the published method: vdu_laplace: by the Fisher information of the images to keep; \
vdu_swag: by its variance in a short fine-tune on them; vdu_l2: all alike."""
    anchor_gamma: Annotated[float | None, unset("required with --anchor", "FLOAT")] = None
    """Weight of the anchor; it counts for the mean over all weights."""
    anchor_checkpoints: Annotated[tuple[Path, ...], unset("none")] = ()
    """Of vdu: two or more trained independently: folders of diffusers, or safetensors files."""
    anchor_samples: int = 256
    """Of vdu_laplace: images to keep, each with a gradient of its own."""
    anchor_prior_precision: float = 0.0
    """Of vdu_laplace: added to the precision of every weight."""
    anchor_steps: int = 50
    """Of vdu_swag: steps of the fine-tune, with --learning_rate and --train_batch_size."""
    anchor_max_precision: float = 1e10
    """Larger precisions, one over a variance, count as this one."""
    mask_fraction: Annotated[float | None, unset("all weights move", "FRACTION")] = None
    """Only this part of the weights moves: those of the largest gradients of the images to forget."""
    mask_batches: int = 50
    """Batches of --train_batch_size whose gradients are added up, with their signs, for --mask_fraction."""
    mask_batch_norm: float = 1.0
    """L2 norm that the gradient of each of them is clipped to; 0: not at all."""

    def check(self, forget: tuple[Path, ...], retain: tuple[Path, ...]) -> None:
        """Whether the flags fit each other and the sets that there are; before anything is read.

        Raises:
            TypeError, ValueError: naming the flag.
        """
        from ..host import check

        given = given_flags(self)
        if self.anchor is None:
            for name in [name for name in given if name.startswith("anchor")]:
                raise ValueError(f"--{name}: expected --anchor beside it, got none")
        else:
            self._check_anchor(given, retain)
        if self.mask_fraction is None:
            for name in [name for name in given if name.startswith("mask")]:
                raise ValueError(f"--{name}: expected --mask_fraction beside it, got none")
            return
        check.number("--mask_fraction", self.mask_fraction, low=0, high=1, low_open=True)
        check.integer("--mask_batches", self.mask_batches, low=1)
        check.number("--mask_batch_norm", self.mask_batch_norm, low=0)
        if not forget:
            raise ValueError(
                "--mask_fraction: expected --forget beside it, whose gradients it takes, got none"
            )

    def check_beside(self, method: Method) -> None:
        """Whether the method can be taken beside the rules, which take a while to be estimated.

        Raises:
            ValueError: naming the flag of the method.
        """
        asked = [f"--{name}" for name in ("anchor", "mask_fraction") if getattr(self, name) is not None]
        if method.inner_steps and asked:
            expected = f"expected 0 beside {' and '.join(asked)}, whose state could not be taken back"
            raise ValueError(f"--inner_steps: {expected}, got {method.inner_steps}")

    def _check_anchor(self, given: dict[str, Any], retain: tuple[Path, ...]) -> None:
        from ..host import check

        others = {name for names in OWN_FLAGS.values() for name in names} - set(OWN_FLAGS[self.anchor])
        for name in given.keys() & others:
            owners = " or ".join(kind for kind, names in OWN_FLAGS.items() if name in names)
            raise ValueError(f"--{name}: expected --anchor {owners} beside it, got {self.anchor}")
        if self.anchor_gamma is None:
            raise ValueError("--anchor_gamma: expected a number >= 0 with --anchor, got none")
        check.number("--anchor_gamma", self.anchor_gamma, low=0)
        check.integer("--anchor_samples", self.anchor_samples, low=1)
        check.number("--anchor_prior_precision", self.anchor_prior_precision, low=0)
        check.integer("--anchor_steps", self.anchor_steps, low=2)
        check.number("--anchor_max_precision", self.anchor_max_precision, low=0, low_open=True)
        if self.anchor == "vdu" and len(self.anchor_checkpoints) < 2:
            expected = "expected two or more with --anchor vdu"
            instead = "vdu_laplace, vdu_swag and vdu_l2 need none"
            raise ValueError(
                f"--anchor_checkpoints: {expected} ({instead}), got {len(self.anchor_checkpoints)}"
            )
        if self.anchor in FROM_RETAIN and not retain:
            raise ValueError(f"--anchor: expected --retain beside {self.anchor}, which reads it, got none")


@dataclass(frozen=True)
class RuleWork:
    """What rules are made of, and where estimates are kept: a resumed run takes the same mask, to the bit.

    Process 0 estimates; the others read what it has written.
    """

    flags: RuleFlags
    model: nn.Module
    schedule: NoiseSchedule
    forget: ImageStore | None
    retain: ImageStore | None
    time_window: Density | None  # of the images to forget
    batch_size: int
    micro_batch_size: int | None
    learning_rate: float
    autocast_dtype: Any
    seed: int
    folder: Path
    processes: Processes

    def rules(self) -> list[ParameterRule]:
        """The mask and the anchor that the flags ask for; says how many weights move, and what holds them.

        Raises:
            TypeError, ValueError: naming the flag.
        """
        rules: list[ParameterRule] = []
        flags = {"batch_size": "train_batch_size", "micro_batch_size": "micro_batch_size"}
        flags |= {"fraction": "mask_fraction", "gradients": "mask_fraction"}
        with called(checkpoints="anchor_checkpoints", **flags):
            if self.flags.mask_fraction is not None:
                rules.append(self._mask())
            if self.flags.anchor is not None:
                rules.append(self._anchor())
        return rules

    def _mask(self) -> ParameterRule:
        from ..engine.estimates import forget_gradients
        from ..objective.mask import Mask

        flags = self.flags

        def estimate() -> dict[str, Tensor]:
            gradients = forget_gradients(
                self.model,
                self.schedule,
                self.forget,
                num_batches=flags.mask_batches,
                batch_size=self.batch_size,
                batch_norm=flags.mask_batch_norm or None,
                time_window=self.time_window,
                **self._options,
            )
            return Mask.from_gradients(gradients, flags.mask_fraction, model=self.model).masks

        settings = flags.mask_fraction, flags.mask_batches, flags.mask_batch_norm, repr(self.time_window)
        masks = self._kept("mask", self.forget, settings, estimate)
        mask = Mask(masks, model=self.model)
        total = sum(each.numel() for each in masks.values())
        self._say(f"mask: {sum(int(each.sum()) for each in masks.values())} of {total} weights move")
        return mask

    def _anchor(self) -> ParameterRule:
        from ..engine import estimates
        from ..objective.anchor import Anchor

        flags, most = self.flags, {"max_precision": self.flags.anchor_max_precision}
        if flags.anchor == "vdu":
            anchor = estimates.vdu(self.model, flags.anchor_checkpoints, flags.anchor_gamma, **most)
            self._say(
                f"anchor: vdu, {len(flags.anchor_checkpoints)} checkpoints, gamma {flags.anchor_gamma:g}"
            )
            return anchor
        self._say(f"anchor: {flags.anchor}, gamma {flags.anchor_gamma:g} (not VDU as published)")
        if flags.anchor == "vdu_l2":
            return estimates.vdu_l2(self.model, flags.anchor_gamma)

        arguments, options = (self.model, self.schedule, self.retain, 1.0), {**self._options, **most}
        if flags.anchor == "vdu_laplace":
            options |= {"samples": flags.anchor_samples, "prior_precision": flags.anchor_prior_precision}
            estimate = estimates.vdu_laplace
        else:
            options |= {"steps": flags.anchor_steps, "lr": self.learning_rate}
            options["batch_size"] = self.batch_size
            estimate = estimates.vdu_swag
        settings = flags.anchor, *sorted((name, str(value)) for name, value in options.items())
        precision = self._kept(
            flags.anchor, self.retain, settings, lambda: estimate(*arguments, **options).precision
        )
        mean = estimates.trained_weights(self.model)
        return Anchor(mean, precision, flags.anchor_gamma, model=self.model, **most)

    @property
    def _options(self) -> dict[str, Any]:
        import torch

        # float16 would lose small gradients without a scaler, which an estimate has not.
        autocast_dtype = None if self.autocast_dtype == torch.float16 else self.autocast_dtype
        return {
            "seed": self.seed,
            "micro_batch_size": self.micro_batch_size,
            "autocast_dtype": autocast_dtype,
        }

    def _kept(
        self, name: str, store: ImageStore, settings: Any, estimate: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """What `estimate` gives, from the file of an earlier call if that had the same weights, images and
        settings.
        """
        from ..host.arrays import tensor_bytes
        from ..objective.named_tensors import read_tensors, write_tensors
        from ..runs.identity import weights_of

        path = self.folder / f"{name}.safetensors"

        def make() -> None:
            schedule = hashlib.sha256()
            for table in (self.schedule.alpha, self.schedule.sigma, self.schedule.model_timesteps):
                schedule.update(tensor_bytes(table))
            made_of = {
                "weights": weights_of("model", self.model),
                "schedule": [self.schedule.prediction_type, schedule.hexdigest()],
                "images": store.content_hash(),
                "settings": [settings, self.batch_size, sorted(map(str, self._options.items()))],
            }
            about = hashlib.sha256(json.dumps(made_of, default=str).encode()).hexdigest()
            if path.exists():
                try:
                    if read_tensors(path, about) is not None:
                        return
                except ValueError as error:
                    print(f"estimated anew: {error}", file=sys.stderr)
            write_tensors(path, estimate(), about)

        self.processes.by_first(make)
        return read_tensors(path)

    def _say(self, what: str) -> None:
        if self.processes.rank == 0:
            print(what)
