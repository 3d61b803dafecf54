"""Encoded images: no value changes without a word, and what is done to them is an option."""

from __future__ import annotations

import base64
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from encoded_images import COLOURS, GREY, encoded, needs_avif, put, read
from PIL import Image

from fastunlearn.data import load_images
from fastunlearn.data.png import expected_bytes

WAVES = (np.add.outer(np.arange(64) * 3, np.arange(64))[..., None] + np.array([0, 40, 80])).astype(np.uint8)


# --- values ----------------------------------------------------------------------------------------------


def palette(**options) -> Image.Image:
    image = Image.fromarray(GREY % 4, "L").convert("P")
    image.putpalette([10, 20, 30, 200, 0, 0, 0, 200, 0, 0, 0, 200])
    return image


PALETTE = np.array([[10, 20, 30], [200, 0, 0], [0, 200, 0], [0, 0, 200]], np.uint8)[GREY % 4]
OPAQUE = np.concatenate([COLOURS, np.full((8, 6, 1), 255, np.uint8)], 2)
MODES = {
    "L": (encoded(GREY), np.repeat(GREY[..., None], 3, 2)),
    "1": (encoded(Image.fromarray(GREY > 99)), np.repeat((GREY > 99)[..., None], 3, 2) * np.uint8(255)),
    "P": (encoded(palette()), PALETTE),
    "GIF": (encoded(palette(), "GIF"), PALETTE),
    "RGBA, opaque": (encoded(OPAQUE), COLOURS),
    "LA, opaque": (encoded(Image.fromarray(GREY).convert("LA")), np.repeat(GREY[..., None], 3, 2)),
    "P, opaque": (encoded(palette(), transparency=b"\xff\xff\xff\xff"), PALETTE),
    "P, a transparent colour that no pixel has": (encoded(palette(), transparency=77), PALETTE),
    "RGB, a transparent colour that no pixel has": (encoded(COLOURS, transparency=(1, 2, 3)), COLOURS),
    "WebP, opaque": (encoded(OPAQUE, "WEBP", lossless=True), COLOURS),
}


def by_pillow(content: bytes, mode: str) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of palettes with opacities
        return np.array(Image.open(io.BytesIO(content)).convert(mode))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("alpha", ["refuse", "drop", "#804020"])
@pytest.mark.filterwarnings("error")
def test_opaque_images_keep_their_colours(mode, alpha, tmp_path):
    content, expected = MODES[mode]
    assert np.array_equal(read(tmp_path, content, channels=3, alpha=alpha), expected)
    assert np.array_equal(read(tmp_path, content, channels=1, alpha=alpha)[..., 0], by_pillow(content, "L"))


CLEAR = np.concatenate([COLOURS, np.full((8, 6, 1), 255, np.uint8)], 2)
CLEAR[0, 0, 3], CLEAR[1, 1, 3] = 0, 51  # 51 / 255 is a fifth
RED_ON_KEY = np.zeros((8, 6, 3), np.uint8)
RED_ON_KEY[:] = (9, 9, 9)
RED_ON_KEY[2:] = (200, 0, 0)
TRANSPARENT = {
    "RGBA": (encoded(CLEAR), CLEAR[..., :3], (CLEAR[..., 3:] / 255)),
    "WebP": (encoded(CLEAR, "WEBP", lossless=True, exact=True), CLEAR[..., :3], (CLEAR[..., 3:] / 255)),
    "TIFF": (encoded(CLEAR, "TIFF"), CLEAR[..., :3], (CLEAR[..., 3:] / 255)),
    "P": (
        encoded(palette(), transparency=b"\x00\xff\x80"),
        PALETTE,
        np.array([0, 255, 128, 255])[GREY % 4][..., None] / 255,
    ),
    "GIF": (encoded(palette(), "GIF", transparency=1), PALETTE, np.array([1, 0, 1, 1])[GREY % 4][..., None]),
    "RGB with a transparent colour": (
        encoded(RED_ON_KEY, transparency=(9, 9, 9)),
        RED_ON_KEY,
        (RED_ON_KEY != 9).any(2, keepdims=True),
    ),
}


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_transparent_images_are_refused_unless_an_option_says_what_they_become(kind, tmp_path):
    content, colours, opacity = TRANSPARENT[kind]
    with pytest.raises(
        ValueError, match=r"x.png: expected an opaque image, got one with transparent pixels \(alpha='drop'"
    ):
        read(tmp_path, content, channels=3)
    assert np.array_equal(read(tmp_path, content, channels=3, alpha="drop"), by_pillow(content, "RGB"))
    assert np.array_equal(read(tmp_path, content, channels=3, alpha="drop"), colours)
    over = colours * opacity + np.array([0, 128, 255]) * (1 - opacity)
    assert np.abs(read(tmp_path, content, channels=3, alpha="#0080ff") - over).max() <= 1
    assert np.array_equal(
        read(tmp_path, content, channels=3, alpha="white")[opacity[..., 0] == 1],
        colours[opacity[..., 0] == 1],
    )


def test_a_transparent_grey_is_refused(tmp_path):
    for content in (
        encoded(GREY, transparency=int(GREY[0, 0])),
        encoded(Image.fromarray(np.dstack([GREY, GREY]), "LA")),
    ):
        with pytest.raises(ValueError, match="expected an opaque image"):
            read(tmp_path, content, channels=1)
    assert read(tmp_path, encoded(GREY, transparency=int(GREY[0, 0])), alpha="white")[0, 0] == 255


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(header: tuple[int, ...], rows: bytes, before: bytes = b"", between: bytes = b"", parts: int = 1):
    """The bytes of a PNG file.

    Args:
        header: width, height, bits, colour type, compression, filter, interlacing.
        rows: filtered rows, which are spread over `parts` chunks.
    """
    packed = zlib.compress(rows)
    step = -(-len(packed) // parts)
    content = b"".join(chunk(b"IDAT", packed[at : at + step]) for at in range(0, len(packed), step))
    start = b"\x89PNG\r\n\x1a\n" + before + chunk(b"IHDR", struct.pack(">2I5B", *header))
    return start + between + content + chunk(b"IEND", b"")


def png_of_16_bits(colour_type: int, channels: int, text: bytes = b"") -> bytes:
    """A PNG of 2 x 2 pixels with 16 bits a channel, which Pillow reads but does not write."""
    rows = (b"\0" + bytes(range(1, 4 * channels + 1))) * 2
    return png((2, 2, 16, colour_type, 0, 0, 0), rows, before=text)


@pytest.mark.parametrize(
    ("colour_type", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)], ids=["grey", "RGB", "grey-alpha", "RGBA"]
)
def test_a_png_of_16_bits_is_refused_not_cut_to_8(colour_type, channels, tmp_path):
    content = png_of_16_bits(colour_type, channels)
    with Image.open(io.BytesIO(content)) as image:
        image.load()  # Pillow takes it
    for wanted in (1, 3):
        with pytest.raises(ValueError, match=r"x.png: expected 8 bits a channel, got 16 \(use .npy"):
            read(tmp_path, content, channels=wanted, alpha="drop")


KINDS_OF_PNG = [
    (0, 1), (0, 2), (0, 4), (0, 8), (2, 8), (3, 1), (3, 2), (3, 4), (3, 8), (4, 8), (6, 8)
]  # fmt: skip


@pytest.mark.parametrize("interlaced", [0, 1])
@pytest.mark.parametrize(("colour_type", "bits"), KINDS_OF_PNG)
def test_a_png_that_lacks_rows_is_refused(colour_type, bits, interlaced, tmp_path):
    """Pillow takes most of them, and leaves what is missing black. Black images are no such files."""
    between = chunk(b"PLTE", bytes(6)) if colour_type == 3 else b""
    for width, height in ((5, 6), (1, 1), (3, 9), (9, 1)):
        header = width, height, bits, colour_type, 0, 0, interlaced
        # As a decoder sees it: the length of what a file of that many zeros may lack nothing of.
        wanted = expected_bytes(struct.pack(">2I5B", *header))
        whole = png(header, bytes(wanted), between=between, parts=3)
        assert not read(tmp_path, whole, channels=3, alpha="drop").any()
        for length in range(wanted):
            with pytest.raises(ValueError, match=r"x.png: expected a whole image, got one that is damaged"):
                read(tmp_path, png(header, bytes(length), between=between), channels=3, alpha="drop")


def test_rows_of_zero_filter_after_others_are_no_missing_rows(tmp_path):
    rows = b"\0" + bytes([7] * 12) + b"\0" + bytes(12)
    assert read(tmp_path, png((4, 2, 8, 2, 0, 0, 0), rows))[1].max() == 0
    with pytest.raises(ValueError, match=r"damaged \(its last rows are missing\)"):
        read(tmp_path, png((4, 2, 8, 2, 0, 0, 0), rows[:13]))


def test_the_first_picture_of_an_mpo_is_read(tmp_path):
    """Phones and cameras write them as JPEG: the photograph, and behind it a preview or another view."""
    file = io.BytesIO()
    first, second = Image.fromarray(WAVES), Image.fromarray(255 - WAVES)
    first.save(file, "MPO", save_all=True, append_images=[second], quality=95)
    alone = io.BytesIO()
    first.save(alone, "JPEG", quality=95)
    with Image.open(io.BytesIO(file.getvalue())) as image:
        assert (image.format, image.n_frames) == ("MPO", 2)
    assert np.array_equal(read(tmp_path, file.getvalue()), read(tmp_path, alone.getvalue()))


def test_a_png_whose_header_is_not_where_it_belongs_is_refused(tmp_path):
    content = b"tEXt" + b"a\0b"
    text = struct.pack(">I", 3) + content + struct.pack(">I", zlib.crc32(content))
    with pytest.raises(ValueError, match=r"x.png: expected a PNG file that begins with its header"):
        read(tmp_path, png_of_16_bits(2, 3, text), channels=3)


def test_a_tiff_of_16_bits_is_refused(tmp_path):
    size, bits, plain = ((256, 3, 1, 2), (257, 3, 1, 2)), (258, 3, 3, 128), ((259, 3, 1, 1), (262, 3, 1, 2))
    place = ((273, 4, 1, 134), (277, 3, 1, 3), (278, 3, 1, 2), (279, 4, 1, 24))
    entries = (*size, bits, *plain, *place)
    directory = (
        struct.pack("<H", len(entries))
        + b"".join(struct.pack("<2H2I", *entry) for entry in entries)
        + bytes(4)
    )
    content = (
        (b"II*\0" + struct.pack("<I", 8) + directory).ljust(128, b"\0")
        + struct.pack("<3H", 16, 16, 16)
        + bytes(range(24))
    )
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        assert image.mode == "RGB"
    with pytest.raises(ValueError, match=r"x.png: expected 8 bits a channel, got 16"):
        read(tmp_path, content)


# 8 x 8 pixels of 10 bits a channel, which Pillow reads but does not write; made with libavif.
AVIF_OF_10_BITS = (
    "AAAAIGZ0eXBhdmlmAAAAAGF2aWZtaWYxbWlhZk1BMUEAAADrbWV0YQAAAAAAAAAhaGRscgAAAAAAAAAAcGljdAAAAAAAAAAAAAAA"
    "AAAAAAAOcGl0bQAAAAAAAQAAAB5pbG9jAAAAAEQAAAEAAQAAAAEAAAETAAAAIAAAAChpaW5mAAAAAAABAAAAGmluZmUCAAAAAAEA"
    "AGF2MDFDb2xvcgAAAABqaXBycAAAAEtpcGNvAAAAFGlzcGUAAAAAAAAACAAAAAgAAAAQcGl4aQAAAAADCgoKAAAADGF2MUOBIEAA"
    "AAAAE2NvbHJuY2x4AAIAAgAGgAAAABdpcG1hAAAAAAAAAAEAAQQBAoMEAAAAKG1kYXQSAAoIOAi/awICBpAyEh/yYoTv///xZ+GA"
    "kDWOuPq5SA=="
)


@needs_avif
def test_an_avif_of_10_bits_is_refused(tmp_path):
    content = base64.b64decode(AVIF_OF_10_BITS)
    with Image.open(io.BytesIO(content)) as image:
        image.load()  # Pillow takes it
        assert image.mode == "RGB"
    with pytest.raises(ValueError, match=r"x.png: expected 8 bits a channel, got 10"):
        read(tmp_path, content)
    assert read(tmp_path, encoded(COLOURS, "AVIF")).shape == (8, 6, 3)


def test_colour_becomes_grey_by_its_luma(tmp_path):
    expected = COLOURS @ np.array([0.299, 0.587, 0.114])  # ITU-R 601-2
    assert np.abs(read(tmp_path, encoded(COLOURS), channels=1)[..., 0] - expected).max() <= 1


def test_inks_become_colours_without_a_profile(tmp_path):
    inks = np.random.default_rng(1).integers(0, 256, (8, 6, 4)).astype(np.uint8)
    content = encoded(Image.fromarray(inks, "CMYK"), "TIFF", icc_profile=b"a profile")
    paper = 1 - inks / 255
    expected = 255 * paper[..., :3] * paper[..., 3:]
    assert np.abs(read(tmp_path, content, channels=3) - expected).max() <= 1
    # A JPEG of Adobe's kind has the inks inverted. This one is of cyan alone.
    cyan = encoded(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG", quality=95)
    assert np.abs(read(tmp_path, cyan, channels=3) - np.array([0.0, 255, 255])).max() <= 3
    with pytest.raises(ValueError, match=r"x.png: expected mode L or RGB, got CMYK"):
        read(tmp_path, content)


def test_luma_and_chroma_become_colours(tmp_path):
    parts = Image.fromarray(COLOURS).convert("YCbCr")
    luma, blue, red = np.moveaxis(np.array(parts).astype(float), 2, 0)
    colours = [
        luma + 1.402 * (red - 128),
        luma - 0.344136 * (blue - 128) - 0.714136 * (red - 128),
        luma + 1.772 * (blue - 128),
    ]
    expected = np.dstack(colours).clip(0, 255)
    assert np.abs(read(tmp_path, encoded(parts, "TIFF"), channels=3) - expected).max() <= 1


def test_a_grey_png_of_16_bits_from_pillow_itself_is_refused(tmp_path):
    content = encoded(Image.fromarray(GREY.astype(np.uint16) * 257))
    with pytest.raises(ValueError, match=r"x.png: expected 8 bits a channel, got 16"):
        read(tmp_path, content, channels=1)


def test_modes_that_pillow_cannot_convert_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"x.png: expected 8 bits a channel, got 32"):
        read(tmp_path, encoded(GREY.astype(np.float32), "TIFF"), channels=1)
    with pytest.raises(
        ValueError, match=r"x.png: expected 8 bits a channel in grey, RGB or CMYK, got mode LAB"
    ):
        read(tmp_path, encoded(Image.new("LAB", (4, 4)), "TIFF"), channels=3)


# --- options ---------------------------------------------------------------------------------------------


def turned(kind: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    return encoded(np.arange(128, dtype=np.uint8).reshape(8, 16), kind, exif=exif)


def test_exif_orientation_is_an_option(tmp_path):
    stored = np.arange(128, dtype=np.uint8).reshape(8, 16)
    assert np.array_equal(read(tmp_path, turned("PNG"))[..., 0], np.rot90(stored, -1))
    assert np.array_equal(read(tmp_path, turned("PNG"), exif="apply")[..., 0], np.rot90(stored, -1))
    assert np.array_equal(read(tmp_path, turned("PNG"), exif="ignore")[..., 0], stored)


def test_an_orientation_that_cannot_be_ignored_is_refused(tmp_path):
    stored = np.arange(128, dtype=np.uint8).reshape(8, 16)
    assert np.array_equal(read(tmp_path, turned("TIFF"))[..., 0], np.rot90(stored, -1))
    with pytest.raises(
        ValueError,
        match=r"x.png: expected an upright image with exif='ignore', got a TIFF file with an orientation",
    ):
        read(tmp_path, turned("TIFF"), exif="ignore")
    assert np.array_equal(read(tmp_path, encoded(GREY, "TIFF"), exif="ignore")[..., 0], GREY)


def test_crop_is_an_option(tmp_path):
    wide = np.zeros((8, 16), np.uint8)
    wide[:, 8:] = 200
    wide[:, 4:8] = 100
    content = encoded(wide)
    columns = {"center": [100, 100, 200, 200], "stretch": [0, 100, 200, 200]}
    for crop, expected in columns.items():
        assert read(tmp_path, content, size=4, crop=crop, resample="box")[0, :, 0].tolist() == expected
    with pytest.raises(
        ValueError, match=r"x.png: expected the aspect ratio of 4 x 4 with crop='none', got 8 x 16"
    ):
        read(tmp_path, content, size=4, crop="none")
    assert read(tmp_path, content, size=(4, 8), crop="none", resample="box")[0, :, 0].tolist() == [
        0,
        0,
        100,
        100,
        200,
        200,
        200,
        200,
    ]


@pytest.mark.parametrize("resample", ["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"])
def test_resample_is_an_option(resample, tmp_path):
    image = Image.fromarray(WAVES)
    expected = np.array(image.resize((24, 24), Image.Resampling[resample.upper()]))
    for crop in ("center", "stretch", "none"):
        assert np.array_equal(read(tmp_path, encoded(image), size=24, crop=crop, resample=resample), expected)
    assert (resample == "bilinear") == np.array_equal(read(tmp_path, encoded(image), size=24), expected)


def test_options_are_told(tmp_path):
    told = []
    load_images(
        put(tmp_path, encoded(GREY)),
        channels=1,
        size=(8, 6),
        exif="ignore",
        crop="none",
        resample="box",
        alpha="white",
        tell=told.append,
    )
    expected = {
        "size": (8, 6),
        "channels": 1,
        "exif": "ignore",
        "crop": "none",
        "resample": "box",
        "alpha": "white",
    }
    assert told[0].record() == {
        "rows": 1,
        "files": 1,
        "passed_over": 0,
        "folders_entered_before": 0,
        "options": expected,
    }
    assert str(told[0]) == "1 row from 1 file"


WRONG = [
    ({"exif": "no"}, ValueError, r"exif: expected one of apply, ignore, got 'no'"),
    ({"crop": "left"}, ValueError, r"crop: expected one of center, stretch, none, got 'left'"),
    ({"resample": "cubic"}, ValueError, r"resample: expected one of nearest, .*, lanczos, got 'cubic'"),
    ({"resample": 2}, ValueError, r"resample: expected one of nearest, .*, lanczos, got 2"),
    (
        {"alpha": "whitish"},
        ValueError,
        r"alpha: expected 'refuse', 'drop' or an opaque colour .*, got 'whitish'",
    ),
    ({"alpha": "#ffffff80"}, ValueError, r"alpha: expected .* got '#ffffff80', which is transparent itself"),
    ({"alpha": None}, TypeError, r"alpha: expected .* got None"),
    ({"tell": 5}, TypeError, r"tell: expected a function of a Reading, or None, got 5"),
]


@pytest.mark.parametrize(("options", "error", "text"), WRONG)
def test_options_outside_their_choices_are_refused_before_a_file_is_opened(options, error, text, tmp_path):
    with pytest.raises(error, match=text):
        load_images(tmp_path / "gone", **options)


def test_an_image_that_does_not_fit_into_memory_is_named(tmp_path, monkeypatch):
    Image.new("L", (8, 8)).save(tmp_path / "large.png")

    def load(image):
        raise MemoryError

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    with pytest.raises(MemoryError, match=r"large\.png: expected an image that fits into memory"):
        load_images(tmp_path)
