"""What an `Unlearner` asks of its sets and its network before any work."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..host import check, philox
from ..host.plain_names import plain
from ..host.store import ImageStore, overlap
from ..objective.draws import Time
from ..objective.protocol import Method
from ..objective.schedule import NoiseSchedule
from ..objective.selection import Selection, check_drawable
from ..step.trained import trainable, unwrapped
from ..step.wrappers import refuse_elsewhere


def check_network(model: Callable, optimizer: torch.optim.Optimizer) -> None:
    """Whether steps can be taken on `model`, perhaps in DistributedDataParallel, with `optimizer`.

    Raises:
        TypeError, ValueError: naming what of the network or its parameters a step could not answer for.
    """
    network = unwrapped(model)
    for around in (model, network):
        refuse_elsewhere("model", around)
    trainable(network, optimizer)
    check_unconditional(network)


def check_precision(parameters: Sequence[Tensor], autocast_dtype: torch.dtype | None) -> None:
    """
    Raises:
        TypeError: the network could not take float32 rows.
    """
    if parameters[0].dtype != torch.float32 and autocast_dtype is None:
        raise TypeError(
            "model: expected float32 parameters, or autocast_dtype (stores serve float32 rows), "
            f"got {parameters[0].dtype}"
        )


def check_ema(ema: Any) -> None:
    """
    Raises:
        TypeError: it has no step().
    """
    if ema is not None and not callable(getattr(ema, "step", None)):
        expected = "expected an object with .step(parameters) or None"
        raise TypeError(f"ema: {expected}, got {check.describe(ema)}")


def check_total_steps(total_steps: Any) -> int | None:
    """`total_steps` as an integer.

    Raises:
        TypeError, ValueError: it is none, or so large that random numbers would repeat.
    """
    if total_steps is None:
        return None
    total_steps = check.integer("total_steps", total_steps, low=0)
    if total_steps > philox.STEPS:
        expected = "at most 2^32 (then random numbers repeat)"
        raise ValueError(f"total_steps: expected {expected}, got {total_steps}")
    return total_steps


def check_selection(method: Method, schedule: NoiseSchedule, selection: Selection) -> None:
    """
    Raises:
        ValueError: the selection does not fit, or timesteps can be drawn at which the loss is not defined.
    """
    selection.check_fits(method, schedule)
    for how in selection.draws_of(method, schedule).values():
        if isinstance(how, Time):
            check_drawable(how.density, schedule)


def check_unconditional(model: Callable) -> None:
    """Whether images and timesteps are all that the network asks for: an `Unlearner` has nothing else for it.

    Raises:
        ValueError: naming what it asks for. Its first step would fail, after neighbours have been searched.
    """
    if not isinstance(model, torch.nn.Module):
        return
    network = plain(model)
    # Of compiled code, TorchScript's, say, nothing is known.
    try:
        parameters = inspect.signature(network.forward).parameters.values()
    except (TypeError, ValueError):
        parameters = ()
    # What has no default, but for the first two: images and timesteps.
    required = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    asked = [each.name for each in parameters if each.default is each.empty and each.kind in required][2:]
    # Networks of diffusers have defaults for all, and complain in their forward pass.
    of_diffusers = type(network).__module__.startswith("diffusers.")
    if of_diffusers and getattr(network, "class_embedding", None) is not None:
        asked.append("class_labels")
    if asked:
        expected = (
            "expected a network of images and timesteps alone (the *_step functions take forget_kwargs and "
            "retain_kwargs)"
        )
        raise ValueError(f"model: {expected}, got a {type(network).__name__} that needs {', '.join(asked)}")


def check_stores(
    method: Method,
    forget: ImageStore | None,
    retain: ImageStore | None,
    *,
    allow_overlap: bool = False,
    remedy: str = "allow_overlap=True accepts them",
) -> None:
    """Whether `method` can work on these sets: worth asking before a long search for neighbours.

    Args:
        remedy: what a caller can do about images of both sets.

    Raises:
        TypeError, ValueError: a set that the method reads is missing, the two do not match, or forget rows
            also stand in `retain`.
    """
    if "forget" in method.needs:
        _check_store(method, "forget", forget)
    if {"retain", "neighbors"} & method.needs:
        _check_store(method, "retain", retain)
    if forget is None or retain is None:
        return
    check_same_kind(forget, retain)
    # What counts its sets is another objective where images of one also stand in the other.
    counted = "sizes" in method.needs
    if counted or not allow_overlap:
        if counted:
            remedy = f"{type(method).__name__} counts both sets, and takes them as disjoint"
        _check_disjoint(forget, retain, remedy)


def _check_store(method: Method, name: str, store: ImageStore | None) -> None:
    if not isinstance(store, ImageStore):
        raise TypeError(
            f"{name}: expected an ImageStore ({type(method).__name__} reads it), got {check.describe(store)}"
        )
    if len(store) > philox.LARGEST_RANGE:
        expected = "at most 2^31 rows (they are drawn with 32 random bits)"
        raise ValueError(f"{name}: expected {expected}, got {len(store)}")


def _check_disjoint(forget: ImageStore, retain: ImageStore, remedy: str) -> None:
    rows, _ = overlap(forget, retain)
    if len(rows) == 0:
        return
    shown = ", ".join(str(int(row)) for row in rows[:10])
    if len(rows) > 10:
        shown += ", ..."
    raise ValueError(
        f"forget: expected images that are not in retain, got {len(rows)} that are (rows {shown}); {remedy}"
    )


def check_same_kind(forget: ImageStore, retain: ImageStore) -> None:
    """Whether rows of the two sets can be compared.

    Raises:
        TypeError, ValueError: they have another shape or dtype, or only one holds latents.
    """
    if forget.shape != retain.shape:
        raise ValueError(
            f"forget: expected images of the shape of retain, {tuple(retain.shape)}, "
            f"got {tuple(forget.shape)}"
        )
    if forget.latents != retain.latents:
        expected, got = ("latents", "images") if retain.latents else ("images", "latents")
        raise ValueError(f"forget: expected {expected}, as in retain, got {got}")
    if forget.is_uint8 != retain.is_uint8:
        raise TypeError(f"forget: expected the dtype of retain, {retain.dtype}, got {forget.dtype}")
