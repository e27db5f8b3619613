"""Image files -> pixels: JPEG, PNG and WebP of any color mode, and the crops of training and validation.

Color profiles are ignored, as in the original.
"""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from mindalle_jax.errors import DataError, one_line

FORMATS = ("JPEG", "PNG", "WEBP")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
MAX_PIXELS = 64 << 20
"""Larger images are refused before they are decoded. This many pixels take 201 MB as RGB, per thread that reads."""
MIN_SIDE = 8
"""Shortest side in pixels; a smaller file is a placeholder and no image."""
MAX_ASPECT = 20
"""Largest ratio of long side to short side. A 10000 x 1 banner would become 2,560,000 x 256 pixels before the crop."""

_ORIENTATION = 0x0112
"""The EXIF tag of the orientation."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> the turn that puts the image upright."""


class ImageError(DataError):
    """An image cannot be read. The message is the reason alone; the caller puts the name in front."""


class ShapeError(ImageError):
    """An image is good, but smaller, larger or longer than what is read. It does not count as damaged."""


def decode_image(source: bytes | str | Path) -> Image.Image:
    """Decodes an image file, given as bytes or as a path, to an upright RGB image with 8 bits per channel.

    Transparent images are laid over white. 16 bits are scaled to 8. Of an animation the first frame is taken. Raises
    ImageError for other formats, for files that are truncated or damaged, and, before decoding, for sizes outside
    MIN_SIDE, MAX_PIXELS and MAX_ASPECT.
    """
    try:
        file = io.BytesIO(source if isinstance(source, bytes) else Path(source).read_bytes())
    except OSError as error:
        raise ImageError(error.strerror or one_line(error)) from None
    try:
        image = Image.open(file, formats=FORMATS)
        _check_size(*image.size)
        image.load()
        turn = _TURNS.get(_orientation(image))
        image = _to_rgb(image)
        return image if turn is None else image.transpose(turn)
    except ImageError:
        raise
    except Image.UnidentifiedImageError:
        raise ImageError(f"not one of {', '.join(FORMATS)}, or its beginning is damaged") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # Pillow's limit, while opening
        raise ShapeError(f"too many pixels: {one_line(error)}") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise ImageError(f"truncated or damaged: {one_line(error)}") from None


def crop_square(image: Image.Image, size: int, rng: np.random.Generator | None) -> np.ndarray:
    """Scales the short side of an RGB image to `size` and crops the long side; returns uint8[size, size, 3].

    Scaling is bilinear with antialiasing. The crop is at a random place with a generator `rng` (training), and in the
    middle with None (validation). Both are as torchvision's Resize with RandomCrop or CenterCrop.
    """
    width, height = image.size
    short = min(width, height)
    if short != size:
        image = image.resize((size * width // short, size * height // short), Image.Resampling.BILINEAR)
    spare_x, spare_y = image.width - size, image.height - size
    if rng is None:
        left, top = round(spare_x / 2), round(spare_y / 2)
    else:
        left, top = int(rng.integers(spare_x + 1)), int(rng.integers(spare_y + 1))
    return np.asarray(image.crop((left, top, left + size, top + size)))


def _check_size(width: int, height: int) -> None:
    if min(width, height) < MIN_SIDE:
        raise ShapeError(f"{width} x {height} pixels; both sides must be at least {MIN_SIDE}")
    if width * height > MAX_PIXELS:
        raise ShapeError(f"{width} x {height} pixels are too many; at most {MAX_PIXELS:,} are read")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ShapeError(f"{width} x {height} pixels; one side may be at most {MAX_ASPECT} times the other")


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # the pixels may be good although the EXIF data is damaged
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit gray, which convert("RGB") would clip to white
        grey = np.asarray(image)
        transparent = image.info.get("transparency")
        if isinstance(transparent, int):
            grey = np.where(grey == transparent, 65535, grey)
        # The high byte, as Pillow scales 16-bit color.
        return Image.fromarray((grey >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
