"""The flags of `fastunlearn unlearn`, in the groups that its help shows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal

from .options import also, unset

if TYPE_CHECKING:
    import torch


@dataclass(kw_only=True)
class Optimization:
    """Defaults are the papers' for MNIST; for 256x256 faces they take --lr 5e-6 --batch-size 64
    --micro-batch-size 4 --steps 40.
    """

    max_train_steps: Annotated[int, also("--steps")] = 50
    """Unlearning steps."""
    learning_rate: Annotated[float, also("--lr")] = 5e-5
    """Step size of AdamW."""
    train_batch_size: Annotated[int, also("--batch-size")] = 128
    """Forget rows, and retain rows, drawn a step with replacement."""
    micro_batch_size: Annotated[int | None, unset("all at once", "INT")] = None
    """Rows in one network call at most; gradients accumulate over the calls, and a method's rescaling is \
done once, after the last."""
    lr_scheduler: Literal["constant", "cosine", "linear"] = "constant"
    """How the learning rate goes on after the warm-up: cosine and linear end at 0."""
    lr_warmup_steps: int = 0
    """Steps in which the learning rate rises from 0."""
    adam_beta1: float = 0.95
    """Decay of the gradient's mean."""
    adam_beta2: float = 0.999
    """Decay of its square's mean."""
    adam_weight_decay: float = 1e-6
    """Decoupled weight decay."""
    adam_epsilon: float = 1e-8
    """Added to the denominator."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this L2 norm, after the method has combined them."""
    use_ema: bool = False
    """Average the weights over the steps and save the average."""
    ema_decay: float = 0.9999
    """Of --use_ema; after s steps at most (1 + s) / (10 + s), as in diffusers."""

    def check(self) -> None:
        """Before anything is read.

        Raises:
            TypeError, ValueError: a value is outside its range.
        """
        from ..host import check

        check.integer(
            "--train_batch_size", self.train_batch_size, low=1, high=2**32, of="rows that can be drawn"
        )
        if self.micro_batch_size is not None:
            check.integer("--micro_batch_size", self.micro_batch_size, low=1)
        for name in ("learning_rate", "adam_epsilon"):
            check.number(f"--{name}", getattr(self, name), low=0, low_open=True)
        for name in ("adam_beta1", "adam_beta2", "adam_weight_decay", "ema_decay"):
            check.number(f"--{name}", getattr(self, name), low=0, high=1)
            if name.startswith("adam_beta") and getattr(self, name) == 1:
                raise ValueError(
                    f"--{name}: expected a number in [0, 1), got 1: the average would never move"
                )
        # A run that forgets nothing, because it takes no step or never comes out of the warm-up, would end as
        # one that does.
        check.integer("--max_train_steps", self.max_train_steps, low=1)
        check.integer(
            "--lr_warmup_steps",
            self.lr_warmup_steps,
            low=0,
            high=self.max_train_steps - 1,
            of="max_train_steps - 1",
        )

    def build(self, model):
        """AdamW over the parameters of `model`; a learning-rate scheduler or None; an EMA or None.

        Raises:
            TypeError, ValueError: a value is outside its range.
            ImportError: a schedule or an average was asked for, and the package diffusers is not installed.
        """
        import torch

        from ..host import check

        self.check()
        parameters = list(model.parameters())
        optimizer = torch.optim.AdamW(
            parameters,
            lr=self.learning_rate,
            betas=(self.adam_beta1, self.adam_beta2),
            weight_decay=self.adam_weight_decay,
            eps=self.adam_epsilon,
            fused=True,
        )
        lr_scheduler = None
        if self.lr_scheduler != "constant" or self.lr_warmup_steps:
            name = "constant_with_warmup" if self.lr_scheduler == "constant" else self.lr_scheduler
            get_scheduler = check.package("diffusers.optimization", "lr_scheduler").get_scheduler
            length = {"num_warmup_steps": self.lr_warmup_steps, "num_training_steps": self.max_train_steps}
            lr_scheduler = get_scheduler(name, optimizer, **length)
        ema = None
        if self.use_ema:
            training_utils = check.package("diffusers.training_utils", "use_ema")
            ema = training_utils.EMAModel(parameters, decay=self.ema_decay)
        return optimizer, lr_scheduler, ema


@dataclass(kw_only=True)
class Execution:
    """How the network runs: this changes the speed, and results only by rounding."""

    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Precision of the network calls; weights, losses and norms stay float32. auto: bf16 on GPUs that have \
it, else no; CPUs with AVX512_BF16 gain too."""
    allow_tf32: bool = False
    """Let GPUs round the factors of float32 matrix products to TensorFloat-32 (10 bits); without it they do \
so in convolutions only, as torch does."""
    compile: Literal["auto", "on", "off", "try"] = "auto"
    """Compile the network at the first step, which takes minutes for big ones; try runs it as it is if that \
fails. auto: on for GPUs, off for CPUs."""
    channels_last: Literal["auto", "on", "off"] = "auto"
    """Memory layout of weights and activations. auto: on for GPUs, off for CPUs."""

    def as_launched(self) -> Execution:
        """With what a launcher says in place of `auto`.

        Raises:
            ValueError: a flag and the launcher contradict each other.
        """
        from . import launch_settings

        said = {
            "mixed_precision": launch_settings.mixed_precision(self.mixed_precision),
            "compile": launch_settings.compilation(self.compile),
        }
        for name, value in said.items():
            if value != getattr(self, name):
                print(f"--{name} {value}, as accelerate launch says")
        return replace(self, **said)

    @property
    def compile_argument(self) -> bool | Literal["try"] | None:
        """`compile` as `Unlearner` takes it."""
        return {"auto": None, "on": True, "off": False, "try": "try"}[self.compile]

    def autocast_dtype(self, device: torch.device) -> torch.dtype | None:
        """What autocast runs the network in on `device`; None: no autocast."""
        import torch

        from ..host.precision import resolve_autocast

        return resolve_autocast(
            {"auto": "auto", "no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.mixed_precision],
            device,
        )

    def memory_format(self, device: torch.device) -> torch.memory_format:
        """The layout of the weights on `device`."""
        import torch

        from ..host.precision import memory_format

        return memory_format(
            {"auto": "auto", "on": torch.channels_last, "off": torch.contiguous_format}[self.channels_last],
            device,
        )


@dataclass(kw_only=True)
class RunFlags:
    """How the run is kept, resumed and watched."""

    seed: Annotated[int | None, unset("a random one, in private/", "INT")] = None
    """Every random number of step s is a function of (seed, s). Who knows it, and the model before, can try \
out whether an image was the one to forget."""
    checkpointing_steps: int = 500
    """Steps between checkpoints, from which a stopped run continues bit by bit."""
    checkpoints_total_limit: Annotated[int | None, unset("all", "INT")] = None
    """Checkpoints to keep, the newest."""
    keep_checkpoints: bool = False
    """A finished run keeps its checkpoints, caches and estimates: images to forget can be computed from \
them. Without it only the model is left."""
    resume_from_checkpoint: Annotated[str | None, unset("start anew", "latest|DIR")] = None
    """Continue from the newest checkpoint of the run (latest) or from one of them."""
    logging_steps: int = 1
    """Steps between lines of metrics.jsonl; every line waits for the device."""
    max_skipped_steps: int = 10
    """The run fails when more steps than this were skipped, because a loss or a gradient was not finite."""
    max_skipped_share: float = 0.5
    """The same for a share of all steps."""
    max_time: Annotated[str | None, unset("none", "HH:MM:SS")] = None
    """Time from the start of the command (D-HH:MM:SS with days): before it is over the run writes a \
checkpoint and stops with exit code 75. To go on: --resume_from_checkpoint latest."""
    report_to: Annotated[
        Literal["tensorboard", "wandb"] | None, unset("metrics.jsonl alone", "tensorboard|wandb")
    ] = None
    """tensorboard or wandb, if it is installed."""
    device: Annotated[str | None, unset("the first GPU, else cpu", "cpu|cuda|cuda:N")] = None
    """Where it runs."""

    def check(self) -> None:
        """Before anything is read: what `training.unlearn` would refuse after neighbours were searched.

        Raises:
            TypeError, ValueError: naming the flag.
        """
        from ..host import check
        from ..runs.time_limit import parse_time
        from ..runs.trackers import check_installed

        if self.seed is not None:
            check.integer("--seed", self.seed, low=0, high=2**63 - 1)
        check.integer("--checkpointing_steps", self.checkpointing_steps, low=1)
        if self.checkpoints_total_limit is not None:
            check.integer("--checkpoints_total_limit", self.checkpoints_total_limit, low=1)
        check.integer("--logging_steps", self.logging_steps, low=1)
        check.integer("--max_skipped_steps", self.max_skipped_steps, low=0)
        check.number("--max_skipped_share", self.max_skipped_share, low=0, high=1)
        parse_time("--max_time", self.max_time)
        if self.report_to is not None:
            check_installed(self.report_to)
