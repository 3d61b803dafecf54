"""`fastunlearn sample`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from .options import also, unset

GRID = 144  # samples that the picture shows at most


@dataclass(kw_only=True)
class Sample:
    """Draw images from a checkpoint: a grid as PNG, and all of them as uint8 [N, C, H, W] in an npz.

    Two checkpoints given the same seed start from the same noise, so their samples can be compared one by
    one.

    Try: fastunlearn sample --model runs/forget-7/model --num-images 64 --output out/samples
    """

    model: Path
    """Folder of a diffusers pipeline (DDPMPipeline.save_pretrained); safetensors only, nothing is \
downloaded."""
    num_images: int
    """How many."""
    output: Path
    """A folder (for samples.npz and samples.png), or a file .npz (the picture stands beside it)."""
    sampler: Literal["ddpm", "ddim"] = "ddpm"
    """ddpm: ancestral, new noise at every step. ddim: deterministic, good with fewer steps."""
    num_inference_steps: int = 50
    """Network calls an image."""
    batch_size: Annotated[int, also("--eval-batch-size")] = 64
    """Images a network call; changes speed only."""
    seed: int = 0
    """Selects the noise; sample i depends on the seed and i alone."""
    device: Annotated[str | None, unset("the first GPU, else cpu", "cpu|cuda|cuda:N")] = None
    """Where it runs."""

    @property
    def file(self) -> Path:
        return self.output if self.output.suffix == ".npz" else self.output / "samples.npz"

    def lock(self):
        from ..host.folder_lock import locked_file

        return locked_file(self.file, "fastunlearn sample")

    def run(self) -> int:
        import numpy as np

        from ..host import disk
        from ..host.atomic import atomic_file
        from ..models import load_checkpoint
        from ..models.sampling import sample
        from ..report.pictures import grid
        from .options import check_file, model_shape, pick_device

        for file in (self.file, self.file.with_suffix(".png")):
            check_file("--output", file)
        model, scheduler = load_checkpoint(self.model, device=pick_device(self.device))
        disk.require(self.file, "the samples", self.num_images * math.prod(model_shape(model)))
        images = sample(
            model,
            scheduler,
            self.num_images,
            shape=model_shape(model),
            num_inference_steps=self.num_inference_steps,
            sampler=self.sampler,
            batch_size=self.batch_size,
            seed=self.seed,
            show_progress=True,
        )
        file = self.file
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as written:
            np.savez(written, images=((images + 1) * 127.5).round().byte().numpy())
        shown = images[:GRID]
        with atomic_file(file.with_suffix(".png")) as written:
            written.write(grid(shown, columns=max(1, round(len(shown) ** 0.5))))
        print(f"{len(images)} samples: {file.with_suffix('.png')}, {file}")
        return 0
