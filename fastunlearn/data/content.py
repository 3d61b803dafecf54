"""What a file is by its content: the formats that Pillow is asked for, and names for what is none of them."""

from __future__ import annotations

import codecs
from typing import BinaryIO

from PIL import Image

# Formats that only unpack pixels. The others that Pillow knows are never tried: PostScript is a program,
# which Pillow hands to Ghostscript; WMF is drawn; icons hold several sizes; the rest are rare, and each is
# one more decoder to trust.
WANTED = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")
# How many bytes of a file are looked at to tell formats apart: the longest signature is much shorter, and a
# text shows itself within them.
HEAD = 64

GIVE_ITSELF = "is read when its own path is given, not as a file of a folder of images"
HEIC = "HEIC, for which Pillow has no decoder: convert it to PNG, for example with heif-convert"
# HEIC and AVIF are one container (ISO base media); which of them a file is, its brand says after "ftyp".
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
# Each entry: where the signature stands, its bytes, and the format that carries it.
SIGNATURES = (
    (0, b"\x89PNG", "PNG"),
    (0, b"\xff\xd8\xff", "JPEG"),
    (8, b"WEBP", "WebP"),
    (0, b"BM", "BMP"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (0, b"GIF8", "GIF"),
    (4, b"ftypavi", "AVIF"),
)
# What else is found in folders of images, so that the error can say what to do about it.
OTHERS = (
    *((4, b"ftyp" + brand, HEIC) for brand in HEIF_BRANDS),
    (0, b"%!PS", "PostScript, which is a program and is never run"),
    (0, b"\xc5\xd0\xd3\xc6", "PostScript, which is a program and is never run"),
    (0, b"%PDF", "PDF: convert its pictures to PNG"),
    (0, b"\x00\x00\x00\x0cjP  ", "JPEG 2000: convert it to PNG"),
    (0, b"\x00\x00\x00\x0cJXL ", "JPEG XL: convert it to PNG"),
    (0, b"\xff\x0a", "JPEG XL: convert it to PNG"),
    (0, b"8BPS", "a Photoshop file: convert it to PNG"),
    (0, b"\x00\x05\x16\x07", "what macOS keeps beside a file (AppleDouble): remove it, as dot_clean does"),
    (0, b"\x93NUMPY", f"an array (.npy), which {GIVE_ITSELF}"),
    (0, b"PAR1", f"a parquet table, which {GIVE_ITSELF}"),
    (0, b"PK\x03\x04", f"a zip archive: unpack it, or, if it is an .npz: it {GIVE_ITSELF}"),
    (0, b"\x1f\x8b", f"gzip: unpack it, or, if it is idx: it {GIVE_ITSELF}"),
    (0, b"\x00\x00\x08\x01", "labels (idx)"),
    (0, b"\x00\x00\x08\x03", f"images in one file (idx), which {GIVE_ITSELF}"),
    (0, b"\x00\x00\x08\x04", f"images in one file (idx), which {GIVE_ITSELF}"),
    (0, b"<svg", "SVG, which is drawn, not decoded: convert it to PNG"),
)


def formats() -> tuple[str, ...]:
    """What `Image.open(..., formats=...)` is given everywhere: those of `WANTED` that this Pillow has."""
    Image.init()
    return tuple(name for name in WANTED if name in Image.OPEN)


def in_words() -> str:
    """The formats that are read, as messages list them."""
    names = sorted(formats())
    return ", ".join(names).replace("WEBP", "WebP")


def is_picture(file: BinaryIO) -> bool:
    """Whether a file is of one of the formats; a damaged one is, so that decoding it says what is wrong."""
    try:
        with Image.open(file, formats=formats()):
            return True
    except Image.UnidentifiedImageError:
        file.seek(0)
        return _begins_like(file.read(HEAD)) is not None
    except Exception:  # Pillow recognised it before its header made it give up
        return True


def described(head: bytes) -> str:
    """What a file that begins with `head`, and that Pillow does not recognise, may be."""
    if not head:
        return "an empty file"
    begins_like = _begins_like(head)
    if begins_like is not None:
        why = "it is damaged, or this Pillow lacks the decoder"
        return f"data that begins like {begins_like} and that Pillow does not recognise: {why}"
    other = _found(head, OTHERS)
    if other is not None:
        return other
    if not any(head):
        return "zeros"
    if _is_text(head):
        return "text"
    return "data that Pillow does not recognise"


def _begins_like(head: bytes) -> str | None:
    """The format of `WANTED` whose signature `head` carries, or None."""
    # A text may begin with the letters of a signature, too: "BM" is one of bitmaps.
    if _is_text(head):
        return None
    return _found(head, SIGNATURES)


def _found(head: bytes, signatures: tuple[tuple[int, bytes, str], ...]) -> str | None:
    """What the first of `signatures` that `head` carries stands for, or None."""
    for place, content, name in signatures:
        if head[place:].startswith(content):
            return name
    return None


def _is_text(head: bytes) -> bool:
    """Whether `head` is printable UTF-8."""
    # Incremental, because the last character may be cut where `head` ends.
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return all(byte >= 32 or byte in b"\t\n\r" for byte in head)
