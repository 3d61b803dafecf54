"""`fastunlearn neighbors`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from .options import unset
from .picture_flags import PictureFlags


@dataclass(kw_only=True)
class Neighbors:
    """Find the k nearest images to keep of every image to forget: exact Euclidean distance, ties by the lower
    row.

    Sets larger than memory are streamed (npy, idx). The file has index [N, k] and sqdist [N, k], nearest
    first, and read, in JSON: what was read, and how. The squared distances of uint8 images are exact integers
    in grey levels. Images to keep that show an image to forget (JPEGs of it, resized, turned
    or mirrored) are counted and named.

    Try: fastunlearn neighbors --forget forget/ --retain retain.npy --k 10 --output neighbors.npz
    """

    forget: tuple[Path, ...]
    """Images to forget: folders, image files, .npy, .npz, idx(.gz), .parquet, saved Hugging Face data \
sets."""
    retain: tuple[Path, ...]
    """Images to keep."""
    k: int = 10
    """Neighbours an image."""
    output: Path
    """A file .npz (mode 0600: distances say something about the images to forget)."""
    resolution: Annotated[int | None, unset("as they are", "INT")] = None
    """Crop and resize image files to this height and width, in pixels."""
    pictures: PictureFlags = field(default_factory=PictureFlags)

    def lock(self):
        from ..host.folder_lock import locked_file

        return locked_file(self.output, "fastunlearn neighbors")

    def run(self) -> int:
        import numpy as np

        from ..host import check
        from ..host.atomic import atomic_file
        from ..neighbors.copies import near_copies
        from ..neighbors.nearest import nearest_neighbors
        from .options import check_file, check_outside

        check_outside(self.output, forget=self.forget, retain=self.retain)
        if self.output.suffix != ".npz":
            raise ValueError(f"output: expected a path that ends in .npz, got {self.output}")
        check_file("--output", self.output)
        check.integer("k", self.k, low=1)
        read: dict[str, Any] = {}
        sets = (("forget", self.forget), ("retain", self.retain))
        forget, retain = (self.pictures.load(name, paths, read, size=self.resolution) for name, paths in sets)
        index, sqdist = nearest_neighbors(forget, retain, self.k, show_progress=True)
        self.output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.output, mode=0o600) as file:
            np.savez(file, index=index.numpy(), sqdist=sqdist.numpy(), read=np.array(json.dumps(read)))
        print(near_copies(forget, retain))
        print(f"{self.k} neighbours of {len(forget)} images among {len(retain)}: {self.output}")
        return 0
