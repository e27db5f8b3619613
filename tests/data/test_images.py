"""data/images.py: the right pixels for every kind of file, and a reason for each that is refused."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from mindalle_jax.data import images
from mindalle_jax.data.images import ImageError, crop_square, decode_image
from mindalle_jax.errors import DataError

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (24, 40, 3), np.uint8)
SMOOTH = np.stack(np.broadcast_arrays(np.arange(24)[:, None] * 8, np.arange(40) * 5, 90), -1).astype(np.uint8)


def encoded(image: Image.Image, extension: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, extension, **options)
    return file.getvalue()


def pixels(data: bytes) -> np.ndarray:
    image = decode_image(data)
    assert image.mode == "RGB"
    return np.asarray(image)


def over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return np.round(colour * share + 255 * (1 - share))


def png(width: int, height: int, depth: int, colour_type: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file written by hand: rows with their filter bytes; further chunks go before the pixels."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in parts
    )


# Pixels


def test_colour_png_and_lossless_webp_come_as_they_are():
    assert (pixels(encoded(Image.fromarray(COLOUR))) == COLOUR).all()
    assert (pixels(encoded(Image.fromarray(COLOUR), "WEBP", lossless=True)) == COLOUR).all()


def test_jpeg_and_a_path(tmp_path):
    data = encoded(Image.fromarray(SMOOTH), "JPEG", quality=95)
    (tmp_path / "a.jpg").write_bytes(data)
    assert np.abs(pixels(data).astype(int) - SMOOTH).max() <= 12  # JPEG's loss
    assert np.asarray(decode_image(tmp_path / "a.jpg")).tolist() == pixels(data).tolist()


@pytest.mark.parametrize("extension", ["PNG", "JPEG"])
def test_grey_has_three_equal_channels(extension):
    data = encoded(Image.fromarray(SMOOTH[..., 0]), extension)
    found = pixels(data)
    assert (found == found[..., :1]).all() and np.abs(found[..., 0].astype(int) - SMOOTH[..., 0]).max() <= 4


def test_cmyk_jpeg():
    """Cyan ink takes away red: (255, 0, 0, 0) is cyan, and black ink takes away everything."""
    inks = np.zeros((32, 48, 4), np.uint8)
    inks[:, :16, 0], inks[:, 16:32, 3] = 255, 255
    found = pixels(encoded(Image.fromarray(inks, "CMYK"), "JPEG", quality=100, subsampling=0))
    assert np.abs(found[8, [8, 24, 40]].astype(int) - [[0, 255, 255], [0, 0, 0], [255, 255, 255]]).max() <= 4


def test_palette_and_black_and_white():
    palette = Image.fromarray(RNG.integers(0, 4, (24, 40), np.uint8), "P")
    palette.putpalette([10, 20, 30, 200, 100, 0, 0, 255, 0, 7, 7, 7])
    table = np.array([[10, 20, 30], [200, 100, 0], [0, 255, 0], [7, 7, 7]])
    assert (pixels(encoded(palette)) == table[np.asarray(palette)]).all()
    bits = RNG.integers(0, 2, (24, 40)).astype(bool)
    assert (pixels(encoded(Image.fromarray(bits))) == bits[..., None] * 255).all()


def test_palette_with_transparency_over_white():
    palette = Image.fromarray(RNG.integers(0, 3, (24, 40), np.uint8), "P")
    palette.putpalette([10, 20, 30, 200, 100, 0, 0, 255, 0])
    found = pixels(encoded(palette, transparency=bytes([255, 0, 128])))
    table = over_white(np.array([[10, 20, 30], [200, 100, 0], [0, 255, 0]]), np.array([255, 0, 128]))
    assert np.abs(found - table[np.asarray(palette)]).max() <= 1


@pytest.mark.parametrize("extension", ["PNG", "WEBP"])
def test_transparent_colour_does_not_show(extension):
    """Pillow's convert("RGB") drops the alpha and shows the colours that nobody was to see."""
    alpha = RNG.choice(np.array([0, 100, 255], np.uint8), (24, 40))
    options = {"lossless": True, "exact": True} if extension == "WEBP" else {}
    found = pixels(encoded(Image.fromarray(np.dstack([COLOUR, alpha])), extension, **options))
    assert np.abs(found - over_white(COLOUR, alpha)).max() <= 1
    assert (found[alpha == 0] == 255).all()


def test_grey_with_alpha():
    alpha = RNG.choice(np.array([0, 100, 255], np.uint8), (24, 40))
    found = pixels(encoded(Image.fromarray(np.dstack([COLOUR[..., 0], alpha]), "LA")))
    assert np.abs(found - over_white(COLOUR[..., :1], alpha)).max() <= 1


def test_one_transparent_colour():
    colour = COLOUR.copy()
    colour[3, 5] = (1, 2, 3)
    found = pixels(encoded(Image.fromarray(colour), transparency=(1, 2, 3)))
    assert (found[3, 5] == 255).all() and (found[4:] == colour[4:]).all()


def test_16_bit_grey_is_scaled():
    """Pillow's convert("RGB") clips everything over 255 to white."""
    deep = np.arange(24 * 40, dtype=np.uint16).reshape(24, 40) * 68
    found = pixels(encoded(Image.fromarray(deep)))
    assert (found == (deep >> 8)[..., None]).all() and found.max() == 254


def test_16_bit_grey_with_a_transparent_value():
    deep = np.full((16, 16), 1000, ">u2")
    deep[2, 3] = 777
    rows = b"".join(b"\0" + row.tobytes() for row in deep)
    found = pixels(png(16, 16, 16, 0, rows, (b"tRNS", struct.pack(">H", 777))))
    assert (found[2, 3] == 255).all() and (found[3:] == 1000 >> 8).all()


@pytest.mark.parametrize(("colour_type", "channels"), [(2, 3), (4, 2), (6, 4)], ids=["RGB", "LA", "RGBA"])
def test_16_bit_colour_and_alpha(colour_type, channels):
    deep = RNG.integers(0, 1 << 16, (16, 24, channels)).astype(">u2")
    data = png(24, 16, 16, colour_type, b"".join(b"\0" + row.tobytes() for row in deep))
    high = (deep >> 8).astype(np.uint8)
    colour = high[..., :1] if channels == 2 else high[..., :3]
    expected = colour if channels == 3 else over_white(colour, high[..., -1])
    assert np.abs(pixels(data) - expected.astype(float)).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("extension", ["PNG", "WEBP"])
def test_exif_orientation(orientation, extension):
    """Each stored picture is the same upright one, turned as the tag says."""
    stored = {
        1: COLOUR,
        2: COLOUR[:, ::-1],
        3: COLOUR[::-1, ::-1],
        4: COLOUR[::-1],
        5: COLOUR.transpose(1, 0, 2),
        6: np.rot90(COLOUR),
        7: COLOUR[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(COLOUR, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if extension == "WEBP" else {}
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), extension, exif=exif, **options)
    assert (pixels(data) == COLOUR).all()


def test_damaged_exif_is_no_damaged_picture():
    data = encoded(Image.fromarray(SMOOTH), "JPEG", exif=b"Exif\0\0nonsense nonsense")
    assert pixels(data).shape == (24, 40, 3)


def test_the_first_frame_of_an_animation():
    frames = [Image.fromarray(COLOUR), Image.fromarray(255 - COLOUR)]
    data = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert (pixels(data) == COLOUR).all()


# What is refused


@pytest.mark.parametrize("extension", ["GIF", "BMP", "TIFF", "PPM", "ICO"])
def test_other_formats(extension):
    with pytest.raises(ImageError, match="not one of JPEG, PNG, WEBP"):
        decode_image(encoded(Image.fromarray(COLOUR), extension))


@pytest.mark.parametrize("data", [b"", b"<html>not found</html>", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"])
def test_no_picture(data):
    with pytest.raises(ImageError, match="not one of|truncated or damaged"):
        decode_image(data)


@pytest.mark.parametrize("extension", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_truncated(extension, share):
    data = encoded(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), np.uint8)), extension)
    with pytest.raises(DataError, match="truncated or damaged|beginning is damaged"):
        decode_image(data[: int(len(data) * share)])


def test_a_flipped_bit_raises_nothing_else():
    """Whatever a decoder raises becomes an ImageError; what it does not notice is a picture."""
    for extension in ("JPEG", "PNG", "WEBP"):
        data = encoded(Image.fromarray(COLOUR), extension)
        for place in range(0, len(data), 7):
            broken = bytearray(data)
            broken[place] ^= 0x40
            try:
                decode_image(bytes(broken))
            except ImageError as error:
                assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("width", "height", "message"),
    [
        (1, 1, "1 x 1 pixels; both sides must be at least 8"),
        (10_000, 1, "10000 x 1 pixels; both sides"),
        (10_000, 10, "10000 x 10 pixels; one side may be at most 20 times"),
        (9_000, 9_000, "9000 x 9000 pixels are too many"),
        (13_000, 13_000, "too many"),
        (100_000, 100_000, "too many pixels"),
    ],
)
def test_the_size_is_checked_before_decoding(width, height, message, monkeypatch):
    def load(_):
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    with pytest.raises(ImageError, match=message):
        decode_image(png(width, height, 8, 2, b""))


def test_largest_picture_is_that_of_todays_telephones():
    images._check_size(9248, 6944)


def test_missing_file(tmp_path):
    with pytest.raises(ImageError, match="No such file"):
        decode_image(tmp_path / "a.jpg")


# Crops


@pytest.mark.parametrize(("width", "height"), [(40, 24), (24, 40), (500, 333), (333, 500), (16, 16), (10, 9), (97, 15)])
def test_centre_crop_is_that_of_torchvision(width, height):
    """Resize(16) gives int(16 * long / short), CenterCrop starts at round(room / 2)."""
    image = Image.fromarray(RNG.integers(0, 256, (height, width, 3), np.uint8))
    short = min(width, height)
    resized = image.resize((int(16 * width / short), int(16 * height / short)), Image.Resampling.BILINEAR)
    top, left = int(round((resized.height - 16) / 2.0)), int(round((resized.width - 16) / 2.0))
    expected = np.asarray(resized)[top : top + 16, left : left + 16]
    found = crop_square(image, 16, None)
    assert found.shape == (16, 16, 3) and found.dtype == np.uint8 and (found == expected).all()


def test_random_crops_lie_everywhere_and_repeat():
    wide = Image.fromarray(np.tile(np.arange(24, dtype=np.uint8)[None, :, None], (16, 1, 3)))
    firsts = {int(crop_square(wide, 16, np.random.default_rng([7, i]))[0, 0, 0]) for i in range(200)}
    assert firsts == set(range(9))
    again = [crop_square(wide, 16, np.random.default_rng([7, 3])) for _ in range(2)]
    assert (again[0] == again[1]).all()
