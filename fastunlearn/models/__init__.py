"""Adapters between diffusers' checkpoints on disk and the library."""

from __future__ import annotations

from .pipeline import check_replaceable, fresh_network, load_checkpoint, save_checkpoint

__all__ = ["check_replaceable", "fresh_network", "load_checkpoint", "save_checkpoint"]
