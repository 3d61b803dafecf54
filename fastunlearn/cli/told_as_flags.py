"""Errors of a run in the words of the command line: its arguments and settings are flags there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from .options import called

# Arguments of the library that a flag of another name gives.
ARGUMENTS = {
    "output_dir": "output",
    "num_steps": "max_train_steps",
    "batch_size": "train_batch_size",
    "resume_from_checkpoint": "resume_from_checkpoint",
    "lambd": "lambda",
}
# What makes a run this run (runs/identity.py), and the flags that decide it. Of `data`, say, the longest
# name that fits counts.
ENTRIES = {
    "seed": "seed",
    "batch_size": "train_batch_size",
    "max_grad_norm": "max_grad_norm",
    "total_steps": "max_train_steps",
    "num_steps": "max_train_steps",
    "method.name": "method",
    "method.lambd": "lambda",
    "optimizer.learning_rates.0": "learning_rate",
    "optimizer.groups.0.betas.0": "adam_beta1",
    "optimizer.groups.0.betas.1": "adam_beta2",
    "optimizer.groups.0.eps": "adam_epsilon",
    "optimizer.groups.0.weight_decay": "adam_weight_decay",
    "lr_scheduler": "lr_scheduler",
    "ema": "use_ema",
    "ema.settings.decay": "ema_decay",
    "precision.autocast_dtype": "mixed_precision",
    "precision.grad_scaler": "mixed_precision",
    "precision.float32": "allow_tf32",
    "data.forget": "forget",
    "data.retain": "retain",
    "scheduler": "model",
    "schedule": "model",
    "network": "model",
}
LATEST = ("resume_from_checkpoint='latest'", "--resume_from_checkpoint latest")
OTHER_RUN = re.compile(r"expected a checkpoint of a run with (?:this )?(\w+)")
DIFFERENCE = re.compile(r"(?<= )([\w.]+)(?= \()")


@contextmanager
def told_as_flags() -> Iterator[None]:
    """In the block, errors of the library that name its arguments, or settings of a run, name the flags."""
    with called(**ARGUMENTS):
        try:
            yield
        except ValueError as error:
            told = _in_flags(str(error)).replace(*LATEST)
            if told == str(error):
                raise
            raise ValueError(told) from error


def _in_flags(text: str) -> str:
    """What `check_same` says of another run, with flags for entries of the identity."""
    found = OTHER_RUN.search(text)
    if found is None:
        return text
    name = found[1]
    if f"{name} as here" not in text:
        return text[: found.start(1)] + (_flag_of(name) or name) + text[found.end(1) :]
    begin, got, rest = text.partition(", got another with ")
    differences, place, where = rest.rpartition(" in ")
    differences = DIFFERENCE.sub(lambda path: _flag_of(f"{name}.{path[1]}") or path[1], f" {differences}")
    return f"{begin}{got}{differences[1:]}{place}{where}"


def _flag_of(entry: str) -> str | None:
    """The flag, with dashes, that decides an entry of the identity, and what of it; None: none is known."""
    names = entry.split(".")
    for length in range(len(names), 0, -1):
        flag = ENTRIES.get(".".join(names[:length]))
        if flag is not None:
            return " ".join([f"--{flag}", ".".join(names[length:])]).strip()
    # The hyperparameters of a method are flags of their names.
    if names[0] == "method" and len(names) == 2:
        return f"--{names[1]}"
    return None
