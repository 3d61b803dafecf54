"""`fastunlearn data`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional


@dataclass(kw_only=True)
class Data:
    """Build the training set of a recipe from the files that its authors publish.

    mnist-tshirt: 60,000 MNIST digits and 606 copies of one Fashion-MNIST T-shirt. The content of every file
    is checked by its SHA-256.

    Try: fastunlearn data mnist-tshirt --mnist downloads/mnist --fashion-mnist downloads/fashion --output
    mnist_tshirt.npz
    """

    dataset: Positional[Literal["mnist-tshirt"]]
    """Which set."""
    mnist: Path
    """Folder with MNIST's idx files, plain or gzipped."""
    fashion_mnist: Path
    """Folder with Fashion-MNIST's idx files, plain or gzipped."""
    output: Path
    """A file .npz."""

    def lock(self):
        from ..host.folder_lock import locked_file

        return locked_file(self.output, "fastunlearn data")

    def run(self) -> int:
        from ..recipes.mnist_tshirt import save_mnist_tshirt
        from .options import check_file

        # No file that is read ends so.
        if self.output.suffix != ".npz":
            raise ValueError(f"output: expected a path that ends in .npz, got {self.output}")
        check_file("--output", self.output)

        print(f"60,606 images with labels: {save_mnist_tshirt(self.mnist, self.fashion_mnist, self.output)}")
        return 0
