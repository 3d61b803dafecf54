"""`fastunlearn demo`."""

from __future__ import annotations

from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from .method_flags import help_of, method_choices
from .options import also, unset

METHOD_HELP = "What to forget with; `fastunlearn unlearn --help` says what each does."


@dataclass(kw_only=True)
class Demo:
    """Watch a small digit model forget a T-shirt; pictures, numbers and a verdict in two or three minutes on
    two cores.

    The model and its data come with the package. The exit code is 1 if the T-shirt was not forgotten, or the
    digits suffered.

    Try: fastunlearn demo --seed 1 --output out/demo
    """

    output: Path = Path("out/demo")
    """Folder for report.html, results.json, pictures and the unlearned model."""
    method: str = "retrack"  # `with_methods` lists them
    max_train_steps: Annotated[int, also("--steps")] = 50
    """Unlearning steps; 0 must report that nothing was forgotten."""
    learning_rate: Annotated[float | None, unset("the demo's own for the method", "FLOAT", "--lr")] = None
    """Step size of AdamW."""
    lambd: float | None = None  # `with_methods` describes it
    train_batch_size: Annotated[int, also("--batch-size")] = 48
    """Forget and retain rows a step."""
    num_samples: int = 512
    """Samples before and after; at least 299 can show that a share of 1 % has gone. Twice as many if none \
of them shows the T-shirt before."""
    seed: int = 0
    """Of every random number."""
    model: Annotated[Path | None, unset("the embedded model", "DIR")] = None
    """Another checkpoint of the MNIST T-Shirt recipe."""
    device: Annotated[str | None, unset("cpu", "cpu|cuda|cuda:N")] = None
    """Where it runs."""

    @classmethod
    def with_methods(cls) -> type[Demo]:
        """The command as it is parsed: with the methods that there are now, and what `lambd` is to them."""
        lambd = unset("the method's", "FLOAT", "--lambda", help=help_of("lambd"))
        filled_in = [
            ("method", Annotated[method_choices(), arg(help=METHOD_HELP)], "retrack"),
            ("lambd", Annotated[float | None, lambd], None),
        ]
        made = make_dataclass(cls.__name__, filled_in, bases=(cls,), kw_only=True)
        made.__doc__ = cls.__doc__
        return made

    def run(self) -> int:
        from ..demo import run_demo
        from .options import pick_device, prepare_host

        device = pick_device("cpu" if self.device is None else self.device)
        prepare_host(device)
        result = run_demo(
            self.output,
            steps=self.max_train_steps,
            seed=self.seed,
            num_samples=self.num_samples,
            batch_size=self.train_batch_size,
            method=self.method,
            lr=self.learning_rate,
            lambd=self.lambd,
            model_dir=self.model,
            device=device,
        )
        print(f"{'passed' if result.passed else 'NOT passed'}: {result.report}")
        return 0 if result.passed else 1
