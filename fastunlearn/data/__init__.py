"""Readers: what lies on disk becomes an `ImageStore`.

They take image folders and files, npy, npz, idx, parquet and data sets that Hugging Face `datasets` saved.
Nothing is unpickled, nothing is fetched, and uint8 images stay uint8.
"""

from __future__ import annotations

from .latents import save_latents
from .load import load_images
from .options import Reading

__all__ = ["Reading", "load_images", "save_latents"]
