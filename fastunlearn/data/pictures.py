"""Encoded images (png, jpg, ...) in files and table cells: told by their content, decoded by Pillow.

What would change a value without a word is refused: more than 8 bits, transparency, several frames, damage.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageColor, ImageFile, ImageOps, UnidentifiedImageError

from ..host import room
from .content import HEAD, described, formats, in_words, is_picture
from .options import Options, Part
from .png import has_all_rows
from .refusals import Refused, shown

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")  # files that are said to be images
MODE = {1: "L", 3: "RGB"}
CHANNELS = {mode: channels for channels, mode in MODE.items()}
# Pillow turns these into L and RGB.
READ_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
ORIENTATION, BITS_PER_SAMPLE = 0x0112, 258  # tags of EXIF and TIFF
ZEROS = 512  # bytes of a sector
# Flags in the third byte of the box av1C: more than 8 bits a channel; if so, 12 of them instead of 10.
AV1_HIGH_DEPTH, AV1_TWELVE_BITS = 0x40, 0x20


class _Unusable(Exception):
    """An image that could be decoded, but not into the values it stands for: `expected ..., got ...`."""


def read_picture(path: Path, options: Options) -> Part:
    """One image file, as one row.

    Raises:
        ValueError: labels were asked for, which an image has not.
        Refused: the image cannot be read.
    """
    if options.labels:
        raise ValueError(f"{path}: expected labels too (labels=True), got a single image, which has none")
    check_pillow(options)
    try:
        return Part(decode(path, path, options)[None])
    except ValueError as error:
        raise Refused([str(error)], path) from None


def may_be_picture(path: Path) -> bool:
    """Whether the content of the file is that of an image, whatever its name says."""
    try:
        with open(path, "rb") as file:
            return is_picture(file)
    except OSError:
        return False


def content_in_words(path: Path) -> str:
    """What the content of a file that is no image looks like."""
    try:
        with open(path, "rb") as file:
            return described(file.read(HEAD))
    except OSError as error:
        return f"{error.strerror}"


def check_pillow(options: Options) -> None:
    """Asked before the first of many images is decoded: what would be wrong with each of them.

    Raises:
        ValueError: channels that no image has, or a Pillow that was told to fill in what damaged images lack.
    """
    if options.channels not in (None, *MODE):
        raise ValueError(f"channels: expected 1 or 3 for encoded images, got {options.channels}")
    # Some training scripts set it for the whole process.
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        setting = "PIL.ImageFile.LOAD_TRUNCATED_IMAGES"
        raise ValueError(f"{setting}: expected False, got True: what a damaged image lacks would be grey")


def decode(source: Path | bytes, name: str | Path, options: Options) -> np.ndarray:
    """One encoded image as uint8 `[C, H, W]`; errors call it `name`.

    Raises:
        ValueError: no image, damaged, more pixels than Pillow allows, several frames, more than 8 bits a
            channel, transparency that `options.alpha` does not allow, or a mode that is neither L nor RGB
            while no `channels` is given.
    """
    if isinstance(source, bytes):
        file = io.BytesIO(source)
    else:
        try:
            file = open(source, "rb")  # noqa: SIM115
        except OSError as error:
            raise ValueError(
                f"{shown(name)}: expected a file that can be read, got {error.strerror}"
            ) from None
    with file:
        try:
            array = _pixels(file, options)
        except MemoryError as error:
            raise MemoryError(
                f"{shown(name)}: expected an image that fits into memory, got more pixels"
            ) from error
        except Exception as error:  # Pillow's decoders raise whatever they stumble over
            raise ValueError(f"{shown(name)}: {_reason(error, file)}") from None
    if array.ndim == 2:  # grey
        return array[None]
    return array.transpose(2, 0, 1)


def _pixels(file: BinaryIO, options: Options) -> np.ndarray:
    """The pixels of an encoded image as uint8 `[H, W]` or `[H, W, 3]`."""
    image = Image.open(file, formats=formats())
    _check_header(image, file, options)
    # Decoding a PNG does not look at its checksums, so zeros in place of the last rows may pass. `verify`
    # does, and leaves an image that has to be opened anew.
    if image.format == "PNG":
        image.verify()
        image = Image.open(file, formats=formats())
    with room.taking("an image", _decoded_bytes(image, options)):
        image.load()
        if image.format == "PNG" and not _last_row_is_there(image) and not has_all_rows(file):
            raise _Unusable("expected a whole image, got one that is damaged (its last rows are missing)")
        # Upright first: a size that was asked for is that of the image as it is seen. Pillow turns TIFF
        # itself.
        if options.exif == "apply" and image.format != "TIFF":
            image = ImageOps.exif_transpose(image)
        image = _opaque(image, options)
        mode = image.mode if options.channels is None else MODE[options.channels]
        return np.array(_fitted(image.convert(mode), options))


def _decoded_bytes(image: Image.Image, options: Options) -> int:
    """About how much memory decoding `image` takes at most, as its header and the size asked for say."""
    width, height = image.size
    # What it is decoded to and what it is converted to; what is transparent takes three more.
    transparent = "A" in image.mode or "transparency" in image.info
    images = (5 if transparent else 2) * _bytes_of(width, height)
    if options.size is not None:
        height, width = options.size
        images += _bytes_of(width, height)
    # In the end the pixels alone, as bytes and as an array.
    return images + 2 * 3 * width * height


def _bytes_of(width: int, height: int) -> int:
    """What Pillow takes for an image: four bytes a pixel in colour, and a pointer to each row.

    Grey takes less, but not a column of grey pixels.
    """
    return height * (8 + 4 * width)


def _reason(error: Exception, file: BinaryIO) -> str:
    """`expected ..., got ...` for an image that could not be decoded."""
    if isinstance(error, (_Unusable, room.NoRoom)):
        return str(error)
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"expected at most {Image.MAX_IMAGE_PIXELS} pixels (Pillow's limit), got more: {error}"
    if isinstance(error, UnidentifiedImageError):
        file.seek(0)
        return f"expected an image ({in_words()}), got {described(file.read(HEAD))}"
    return f"expected a whole image, got one that is damaged ({str(error) or type(error).__name__})"


def _check_header(image: Image.Image, file: BinaryIO, options: Options) -> None:
    """What can be said before a pixel is decoded.

    Raises:
        _Unusable: the image would take too much memory, or not keep its values.
    """
    # Pillow itself only warns up to twice its limit.
    limit, size = Image.MAX_IMAGE_PIXELS, f"{image.width} x {image.height}"
    if limit is not None and image.width * image.height > limit:
        raise _Unusable(f"expected at most {limit} pixels (Pillow's limit), got {size}")
    # The further pictures of an MPO file, a JPEG of telephones and cameras, are previews, depth or another
    # view. The first is the photograph.
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if frames != 1:
        raise _Unusable(f"expected one image, got {frames} frames (save the one that was trained on)")
    bits = _bits(image, file)
    if bits > 8:
        raise _Unusable(f"expected 8 bits a channel, got {bits} (use .npy for other numbers)")
    if image.mode not in READ_MODES:
        expected = "expected 8 bits a channel in grey, RGB or CMYK"
        raise _Unusable(f"{expected}, got mode {image.mode} (use .npy for other numbers)")
    if options.channels is None and image.mode not in CHANNELS:
        raise _Unusable(f"expected mode L or RGB, got {image.mode} (channels=1 or channels=3 converts it)")
    if image.format in ("WEBP", "AVIF") and _ends_in_zeros(file):
        raise _Unusable(f"expected a whole image, got one that is damaged (it ends in {ZEROS} zeros or more)")
    if image.format == "TIFF" and options.exif == "ignore":
        upright = image.getexif().get(ORIENTATION, 1) == 1
        if not upright:
            got = "a TIFF file with an orientation, which Pillow always applies"
            raise _Unusable(f"expected an upright image with exif='ignore', got {got}")


def _bits(image: Image.Image, file: BinaryIO) -> int:
    """Bits a channel as the file itself says.

    Pillow does not tell: it gives colour of 16 bits as mode RGB, less the lower eight.
    """
    # A PNG begins with 8 bytes of signature and the chunk IHDR: length (4), name (4), width and height (8),
    # and then the bits a channel.
    if image.format == "PNG":
        if _at(file, 12, 4) != b"IHDR":
            raise _Unusable("expected a PNG file that begins with its header, got one that is damaged")
        return _at(file, 24)[0]
    if image.format == "TIFF":
        return max(image.tag_v2.get(BITS_PER_SAMPLE, (1,)))
    # Colour and transparency of an AVIF each have a box av1C of their own.
    if image.format == "AVIF":
        _, *configurations = _at(file, 0, -1).split(b"av1C")
        return max(_av1_bits(configuration) for configuration in configurations)
    return 8


def _last_row_is_there(image: Image.Image) -> bool:
    """Whether the last row of a decoded PNG shows that the file had all rows: one that it lacks is zero.

    The rows of an interlaced file come in another order, which says nothing.
    """
    last = image.crop((0, image.height - 1, image.width, image.height))
    return not image.info.get("interlace") and any(last.tobytes())


def _ends_in_zeros(file: BinaryIO) -> bool:
    """Whether a sector of zeros ends the file, as after a broken download that allotted all of it first.

    The decoders of WebP and AVIF make up an image then.
    """
    length = file.seek(0, io.SEEK_END)
    return length > ZEROS and not any(_at(file, length - ZEROS, ZEROS))


def _av1_bits(configuration: bytes) -> int:
    """Bits a channel as the content of a box av1C says, in the third byte."""
    flags = configuration[2] if len(configuration) > 2 else 0
    if not flags & AV1_HIGH_DEPTH:
        return 8
    if flags & AV1_TWELVE_BITS:
        return 12
    return 10


def _at(file: BinaryIO, place: int, count: int = 1) -> bytes:
    """Bytes of the file, whose position is left as it was."""
    before = file.tell()
    file.seek(place)
    content = file.read(count)
    file.seek(before)
    return content


def _opaque(image: Image.Image, options: Options) -> Image.Image:
    """`image` without transparency. One that is opaque everywhere keeps its colours, whatever its mode."""
    with_alpha = image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info
    palette_with_alpha = image.palette is not None and image.palette.mode.endswith("A")
    if not with_alpha and not palette_with_alpha:
        return image
    layers = image.convert("RGBA")
    least, _ = layers.getchannel("A").getextrema()
    # A later convert() would carry this entry over to its result.
    image.info.pop("transparency", None)
    if least == 255 or options.alpha == "drop":
        return image
    if options.alpha == "refuse":
        raise _Unusable(
            "expected an opaque image, got one with transparent pixels (alpha='drop' takes the colours "
            "behind them, as Pillow's convert('RGB') does; a colour such as alpha='white' is put under them)"
        )
    ground = Image.new("RGBA", image.size, ImageColor.getrgb(options.alpha))
    flat = Image.alpha_composite(ground, layers)
    return flat.convert(image.mode if image.mode in CHANNELS else "RGB")


def _fitted(image: Image.Image, options: Options) -> Image.Image:
    """`image` in the size that was asked for; `load_images` says what each `crop` does."""
    if options.size is None:
        return image
    height, width = options.size
    filter_ = Image.Resampling[options.resample.upper()]
    if options.crop == "center":
        return ImageOps.fit(image, (width, height), filter_)
    if options.crop == "none" and image.width * height != image.height * width:
        raise _Unusable(
            f"expected the aspect ratio of {height} x {width} with crop='none', got {image.height} x "
            f"{image.width} (crop='center' cuts its longer side, crop='stretch' distorts it)"
        )
    return image.resize((width, height), filter_)
