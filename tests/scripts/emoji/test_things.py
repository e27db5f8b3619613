"""scripts/emoji/things.py: which emoji are drawn, and what they are called."""

import numpy as np
from PIL import Image

from scripts.emoji.things import MARGIN, SIDE, STYLES, on_white
from tests.emoji_packages import EMOJI, picture


def test_things_of_all_three_packages(things):
    """In the order of Unicode; people, flags, symbols, clock faces, and what looks like another, are left out."""
    assert [thing.names[0] for thing in things.things] == [
        "grinning face", "cat", "dog", "red apple", "pizza", "rocket", "snowflake", "pinata", "pool 8 ball",
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


def test_images_are_scaled_with_their_alpha(things):
    """As if the image on white were scaled: what is transparent has no colour that could bleed in."""
    side = SIDE - 2 * MARGIN
    for number, code in enumerate(EMOJI):
        for style, (name, size) in enumerate((("noto", 64), ("flat", 64), ("3d", 256))):
            white = Image.new("RGBA", (size, size), "white")
            white.alpha_composite(picture(code, name, size))
            expected = np.asarray(white.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)) / 255
            assert np.abs(on_white(things.pixels[number, style]) - expected).max() <= 3 / 255
