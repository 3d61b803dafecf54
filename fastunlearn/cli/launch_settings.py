"""What `accelerate launch` asks of the processes that it starts: obeyed, or refused by name.

It hands its flags and its configuration file on in variables of the environment (accelerate 1.15). What
stands here is all that would change what is computed. A flag of ours at its default `auto` takes over what
they say; one that says something else is an error. But accelerate also says `no` where nobody was asked:
there our flag counts, as in diffusers' training scripts.
"""

from __future__ import annotations

import os

PREFIX = "ACCELERATE_"
# They spread one network over the processes, or belong to other hardware.
UNSUPPORTED = ("USE_DEEPSPEED", "USE_FSDP", "USE_MEGATRON_LM", "USE_PARALLELISM_CONFIG", "IN_TPU_POD")
PRECISIONS = ("no", "bf16", "fp16")


def check_supported() -> None:
    """Before anything is made of a launcher's settings.

    Raises:
        ValueError: naming the one that nothing here can follow.
    """
    for name in UNSUPPORTED:
        if _is_on(name):
            expected = "expected a configuration with the whole network in every process"
            got = f"one that uses {name.removeprefix('USE_')} ({PREFIX}{name})"
            raise ValueError(f"accelerate: {expected}, got {got}")
    if _is_on("USE_SAGEMAKER") and _said("SAGEMAKER_DISTRIBUTED_TYPE") not in ("", "no"):
        kind = _said("SAGEMAKER_DISTRIBUTED_TYPE")
        raise ValueError(f"accelerate: expected no distribution by SageMaker, got {kind}")
    steps = _said("GRADIENT_ACCUMULATION_STEPS")
    if steps not in ("", "1"):
        expected = "expected 1 gradient accumulation step (--micro_batch_size splits a batch)"
        raise ValueError(f"accelerate: {expected}, got {steps}")


def device_name(given: str | None) -> str | None:
    """`--device`, or what the launcher says in its place.

    Raises:
        ValueError: they contradict each other.
    """
    asked = "cpu" if _is_on("USE_CPU") else _said("TORCH_DEVICE") or None
    if asked is None or given in (None, asked):
        return asked or given
    raise ValueError(f"--device: expected {asked}, as accelerate was told, or none, got {given}")


def mixed_precision(given: str) -> str:
    """`--mixed_precision`, or what the launcher says in place of `auto`.

    Raises:
        ValueError: they contradict each other, or the launcher asks for another precision.
    """
    asked = _said("MIXED_PRECISION")
    if asked in ("", given):
        return given
    if asked not in PRECISIONS:
        raise ValueError(f"accelerate: expected mixed_precision {', '.join(PRECISIONS)}, got {asked}")
    if given == "auto":
        return asked
    if asked == "no":
        return given
    raise ValueError(f"--mixed_precision: expected {asked}, as accelerate was told, or auto, got {given}")


def compilation(given: str) -> str:
    """`--compile`, or what the launcher says in place of `auto`.

    Raises:
        ValueError: they contradict each other, or the launcher asks for another compiler.
    """
    backend = _said("DYNAMO_BACKEND")
    if backend in ("", "no"):
        return given
    supported = {
        "DYNAMO_BACKEND": (backend, "inductor"),
        "DYNAMO_MODE": (_said("DYNAMO_MODE") or "default", "default"),
        "DYNAMO_USE_DYNAMIC": (_is_on("DYNAMO_USE_DYNAMIC"), False),
        "DYNAMO_USE_REGIONAL_COMPILATION": (_is_on("DYNAMO_USE_REGIONAL_COMPILATION"), False),
    }
    for name, (asked, possible) in supported.items():
        if asked != possible:
            what = name.lower()
            raise ValueError(f"accelerate: expected {what} {possible} (or no dynamo_backend), got {asked}")
    if given == "off":
        raise ValueError("--compile: expected on, try or auto with accelerate's dynamo_backend, got off")
    return "on" if given == "auto" else given


def _said(name: str) -> str:
    """The value of a variable, in lower case; empty where there is none."""
    return os.environ.get(PREFIX + name, "").strip().lower()


def _is_on(name: str) -> bool:
    """Whether a variable is set to what accelerate takes for true."""
    return _said(name) in ("1", "true", "yes", "y", "on", "t")
