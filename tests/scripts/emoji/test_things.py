"""scripts/emoji/things.py: which emoji are taken, and what they are called."""

import io

import numpy as np
import pytest
from PIL import Image

from scripts.emoji.things import MARGIN, SIDE, STYLES, on_white, read_image
from tests.emoji_packages import EMOJI, image_of


def test_things_of_all_three_packages(things):
    """In the order of Unicode; people, flags, symbols, clock faces, what looks like another and long names are not."""
    assert [thing.names[0] for thing in things.things] == [
        "grinning face", "cat", "dog", "red apple", "pizza", "rocket", "snowflake", "pinata", "polar bear", "1st medal",
    ]  # fmt: skip
    assert things.pixels.shape == (len(EMOJI), len(STYLES), SIDE - 2 * MARGIN, SIDE - 2 * MARGIN, 4)


def test_names_and_keywords(things):
    """Names are unique. Keywords are short, and none is a word of a style or one that names nothing."""
    named = {thing.names[0]: thing for thing in things.things}
    assert named["red apple"].names == ("red apple", "apple") and named["grinning face"].names[1:] == ("grinning",)
    assert named["dog"].names == ("dog",) and named["dog"].keywords == ("animal", "puppy")
    assert named["pizza"].keywords == ("food",)
    names = [name for thing in things.things for name in thing.names]
    assert len(names) == len(set(names))


def test_what_is_transparent_has_no_color(things):
    """A red disc, around it green that nobody sees: scaled, on white its edge is between red and white."""
    y, x = np.mgrid[:256, :256] - 128
    image = np.full((256, 256, 4), (0, 255, 0, 0), np.uint8)
    image[x**2 + y**2 < 100**2] = (255, 0, 0, 255)
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    pixels = read_image(file.getvalue())
    assert (pixels[..., 1] == 0).all() and (pixels[..., 3] > 0).any() and len(np.unique(pixels[..., 3])) > 10
    shown = on_white(pixels)
    np.testing.assert_allclose(shown[..., 0], 1, atol=2 / 255)
    np.testing.assert_array_equal(shown[..., 1], shown[..., 2])


@pytest.mark.parametrize("style", range(3))
def test_images_are_those_of_the_packages(things, style):
    """Scaled, but for rings beside the hard edges of ours."""
    name, size = (("noto", 64), ("flat", 64), ("3d", 256))[style]
    for number, code in enumerate(EMOJI):
        white = Image.new("RGBA", (size, size), "white")
        white.alpha_composite(image_of(code, name, size))
        expected = np.asarray(white.convert("RGB").resize((SIDE - 2 * MARGIN,) * 2, Image.Resampling.LANCZOS)) / 255
        assert np.abs(on_white(things.pixels[number, style]) - expected).mean() <= 2 / 255
