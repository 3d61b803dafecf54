"""`fastunlearn neighbors`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from .options import unset


@dataclass(kw_only=True)
class Neighbors:
    """Find the k nearest images to keep of every image to forget: exact Euclidean distance, ties by the lower row.

    Sets larger than memory are streamed (npy, idx). The file has index [N, k] and sqdist [N, k], nearest first; the squared distances
    of uint8 images are exact integers in grey levels.

    Try: fastunlearn neighbors --forget forget/ --retain retain.npy --k 10 --output neighbors.npz
    """

    forget: tuple[Path, ...]
    """Images to forget: folders, image files, .npy, .npz, idx(.gz), .parquet, saved Hugging Face data sets."""
    retain: tuple[Path, ...]
    """Images to keep."""
    k: int = 10
    """Neighbours an image."""
    output: Path
    """A file .npz (mode 0600: distances say something about the images to forget)."""
    resolution: Annotated[int | None, unset("as they are", "INT")] = None
    """Crop and resize image files to this height and width, in pixels."""

    def run(self) -> int:
        import numpy as np

        from ..checkpoint import atomic_file
        from ..data import load_images
        from ..neighbors import nearest_neighbors

        if self.output.suffix != ".npz":
            raise ValueError(f"output: expected a path that ends in .npz, got {self.output}")
        forget, retain = (load_images(paths, size=self.resolution) for paths in (self.forget, self.retain))
        index, sqdist = nearest_neighbors(forget, retain, self.k, show_progress=True)
        self.output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.output, mode=0o600) as file:
            np.savez(file, index=index.numpy(), sqdist=sqdist.numpy())
        print(f"{self.k} neighbours of {len(forget)} images among {len(retain)}: {self.output}")
        return 0
