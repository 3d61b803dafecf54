"""`fastunlearn pretrain`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from .options import unset
from .picture_flags import PictureFlags


@dataclass(kw_only=True)
class Pretrain:
    """Train the diffusion model that later forgets, as a recipe prescribes; writes a folder that
    DDPMPipeline.from_pretrained opens.

    mnist-tshirt: the papers' network (64-128-256): a GPU's work. mnist-tshirt-small: the demo's (16-32-64):
    1.2 hours on one core. Checkpoints go to OUTPUT.run.

    Try: fastunlearn pretrain --recipe mnist-tshirt-small --data mnist_tshirt.npz --output runs/small
    """

    recipe: Literal["mnist-tshirt", "mnist-tshirt-small"]
    """Network, schedule and number of steps."""
    data: tuple[Path, ...]
    """Training images, all of one size; `fastunlearn data mnist-tshirt` builds the recipe's."""
    output: Path
    """A new folder for the model."""
    seed: int = 0
    """Every random number of step s is a function of (seed, s)."""
    checkpointing_steps: int = 500
    """Steps between checkpoints."""
    resume_from_checkpoint: Annotated[Literal["latest"] | None, unset("start anew", "latest")] = None
    """Continue a run that was stopped: it takes the same steps as one that was not."""
    device: Annotated[str | None, unset("the first GPU, else cpu", "cpu|cuda|cuda:N")] = None
    """Where it runs."""
    pictures: PictureFlags = field(default_factory=PictureFlags)

    def lock(self):
        from ..host.folder_lock import locked
        from ..runs.pretraining import run_folder

        return locked(run_folder(self.output), "fastunlearn pretrain")

    def run(self) -> int:
        from ..recipes.mnist_tshirt import PRETRAINING
        from ..runs import checkpoint
        from ..runs.pretraining import pretrain, run_folder
        from .options import check_outside, pick_device, prepare_host

        check_outside(self.output, data=self.data)
        run_dir = run_folder(self.output)
        started, resume = checkpoint.latest(run_dir), self.resume_from_checkpoint is not None
        if self.output.exists():
            raise ValueError(f"output: expected a folder that does not exist yet, got {self.output}")
        if started is not None and not resume:
            expected = "expected a new name, or --resume_from_checkpoint latest"
            raise ValueError(f"output: {expected}, got {self.output}, whose run stands at {started}")
        if started is None and resume:
            raise ValueError(f"resume_from_checkpoint: expected a checkpoint in {run_dir}, got none")
        device = pick_device(self.device)
        prepare_host(device)
        recipe = PRETRAINING[self.recipe]
        shape = {"size": recipe.unet["sample_size"], "channels": recipe.unet["in_channels"]}
        read: dict[str, Any] = {}
        images = self.pictures.load("data", self.data, read, **shape)
        pretrain(
            images,
            recipe,
            self.output,
            seed=self.seed,
            resume=resume,
            checkpointing_steps=self.checkpointing_steps,
            device=device,
            record={"read": read["data"]},
        )
        print(f"trained model: {self.output}")
        return 0
