"""What an `Unlearner` asks of its sets and its network before any work."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch

from ..host import check, philox
from ..host.plain_names import plain
from ..host.store import ImageStore, overlap
from ..objective.protocol import Method


def check_unconditional(model: Callable) -> None:
    """Whether images and timesteps are all that the network asks for: an `Unlearner` has nothing else for it.

    Raises:
        ValueError: naming what it asks for. Its first step would fail, after neighbours have been searched.
    """
    if not isinstance(model, torch.nn.Module):
        return
    network = plain(model)
    required = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    try:
        parameters = inspect.signature(network.forward).parameters.values()
    except (TypeError, ValueError):  # of compiled code, TorchScript's, say: nothing is known
        parameters = ()
    asked = [each.name for each in parameters if each.default is each.empty and each.kind in required][2:]
    if (
        type(network).__module__.startswith("diffusers.")
        and getattr(network, "class_embedding", None) is not None
    ):
        asked.append("class_labels")
    if asked:
        expected = (
            "expected a network of images and timesteps alone (the *_step functions take forget_kwargs and "
            "retain_kwargs)"
        )
        raise ValueError(f"model: {expected}, got a {type(network).__name__} that needs {', '.join(asked)}")


def check_stores(
    method: Method, forget: ImageStore | None, retain: ImageStore | None, *, allow_overlap: bool = False
) -> None:
    """Whether `method` can work on these sets: worth asking before a long search for neighbours.

    Raises:
        TypeError, ValueError: a set that the method reads is missing, the two do not match, or forget rows
            also stand in `retain`.
    """
    for name, store, needed in (
        ("forget", forget, "forget" in method.needs),
        ("retain", retain, bool({"retain", "neighbors"} & method.needs)),
    ):
        if needed and not isinstance(store, ImageStore):
            raise TypeError(
                f"{name}: expected an ImageStore ({type(method).__name__} reads it), "
                f"got {check.describe(store)}"
            )
        if needed and len(store) > philox.LARGEST_RANGE:
            expected = "at most 2^31 rows (they are drawn with 32 random bits)"
            raise ValueError(f"{name}: expected {expected}, got {len(store)}")
    if forget is None or retain is None:
        return
    check_same_kind(forget, retain)
    if not allow_overlap:
        rows, _ = overlap(forget, retain)
        if len(rows):
            shown = ", ".join(str(int(row)) for row in rows[:10]) + (", ..." if len(rows) > 10 else "")
            raise ValueError(
                "forget: expected images that are not in retain, "
                f"got {len(rows)} that are (rows {shown}); allow_overlap=True accepts them"
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
        raise ValueError(
            f"forget: expected {'latents' if retain.latents else 'images'}, as in retain, "
            f"got {'latents' if forget.latents else 'images'}"
        )
    if forget.is_uint8 != retain.is_uint8:
        raise TypeError(f"forget: expected the dtype of retain, {retain.dtype}, got {forget.dtype}")
