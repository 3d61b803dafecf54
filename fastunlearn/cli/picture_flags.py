"""The flags of every command that reads images: which rows image files become."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

if TYPE_CHECKING:
    from ..host.store import ImageStore


@dataclass(kw_only=True)
class PictureFlags:
    """How image files, and encoded images in tables, become rows. Arrays stay as they are."""

    exif: Literal["apply", "ignore"] = "apply"
    """apply: turn images upright as their EXIF orientation says. ignore: pixels as stored."""
    crop: Literal["center", "stretch", "none"] = "center"
    """center: cut to the aspect ratio wanted. stretch: distort. none: refuse other aspect ratios."""
    resample: Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"] = "bilinear"
    """Pillow's filter of the resizing."""
    alpha: Annotated[str, arg(metavar="refuse|drop|COLOUR")] = "refuse"
    """Of images with transparent pixels. drop: the colours behind them, as convert("RGB") in most training
    scripts. A colour, such as white or "#ffffff", is put under them."""
    npz_key: str | None = None
    """The array that holds the images of .npz files with several."""

    def load(self, name: str, paths: tuple[Path, ...], record: dict[str, Any], **wanted) -> ImageStore:
        """The images in `paths` as `load_images(paths, **wanted)` reads them.

        Says what was read, and notes the numbers and options in `record`, under `name`.
        """
        from ..data import Reading, load_images

        def tell(reading: Reading) -> None:
            print(f"{name}: {reading}")
            record[name] = reading.record()

        # The other set of a command may be one of image files.
        given = asdict(self)
        if all(path.suffix.lower() != ".npz" for path in paths):
            given["npz_key"] = None
        return load_images(paths, tell=tell, show_progress=True, **given, **wanted)
