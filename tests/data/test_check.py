"""data/check.py: what is told of a data set before training; every count is what was put in."""

import io

import numpy as np
import pytest
from image_folders import fill
from PIL import Image

from mindalle_jax.data.check import check_images, contact_sheet, describe
from mindalle_jax.data.sources import open_source
from mindalle_jax.text.tokenizer import TextTokenizer


@pytest.fixture
def tokenizer(tiny_folder) -> TextTokenizer:
    """Knows lower-case letters; takes 12 tokens."""
    return TextTokenizer(tiny_folder / "tokenizer", 12, 110)


def png(width: int, height: int, seed: int = 0) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_captions(tmp_path, tokenizer):
    fill(tmp_path, a_jpg=None, a_txt="the cat\nthe dog", b_png=None, b_txt="バナナ", c_jpg=None, c_txt="cat " * 13)
    fill(tmp_path, d_jpg=None, notes_md="")
    assert describe(open_source(tmp_path, "text"), tokenizer) == [
        "layout: images with caption files beside them",
        "3 samples; left out: 1 without a caption (first: 'd.jpg'); not used: 1 .md (no caption file of an image)",
        "images: 2 .jpg, 1 .png",
        "captions: 4, 1 to 2 per sample",
        f"warning: 1 of 4 captions (25.0%) are cut: they have more than 12 tokens, such as {'cat ' * 9 + 'c...'!r}",
        "warning: 1 of 4 captions (25.0%) have characters or words that the tokenizer does not know, such as 'バナナ'",
    ]  # fmt: skip
    assert len(describe(open_source(tmp_path, "text"))) == 4  # without a tokenizer


def test_few_captions_of_many_are_tokenized(tmp_path, tokenizer):
    """The start of a run must not tokenize millions."""
    for number in range(10):
        fill(tmp_path, **{f"{number}_jpg": None, f"{number}_txt": "バ"})
    (line,) = describe(open_source(tmp_path, "text"), tokenizer, max_captions=4)[-1:]
    assert line.startswith("warning: 4 of 4 captions looked at (100.0%) have characters or words")


def test_classes(tmp_path):
    fill(tmp_path, cat__a_jpg=None, cat__b_jpg=None, dog__c_jpg=None)
    (tmp_path / "eel").mkdir()
    assert describe(open_source(tmp_path, "class"))[-1] == "classes: 3: cat (2), dog (1); 1 of them without an image"


def test_every_mess_in_sixty_images(tmp_path):
    """Reasons apart: damage, sizes that are not read, and files that are the same image twice."""
    for number in range(60):
        data = png(40, 30 + number % 3, number)
        if number in (3, 4):
            data = data[: len(data) // 2]
        elif number in (5, 6, 7):
            data = b"no image" * 20
        elif number == 8:
            data = png(40, 4)
        elif number == 9:
            data = png(900, 10)
        elif number in (20, 21):
            data = png(40, 30, 19)
        fill(tmp_path, **{f"{number:02}_png": data})
    fill(tmp_path, **{"19_png": png(40, 30, 19)})
    checked = check_images(open_source(tmp_path, "unconditional"))
    assert checked.readable == 53 == sum(checked.sizes.values())
    assert {reason: len(names) for reason, names in checked.unreadable.items()} == {
        "truncated or damaged": 2,
        "not one of JPEG, PNG, WEBP, or its beginning is damaged": 3,
        "not damaged, but of a size that is not read: both sides must be at least 8": 1,
        "not damaged, but of a size that is not read: one side may be at most 20 times the other": 1,
    }
    assert checked.duplicates == [("20.png", "19.png"), ("21.png", "19.png")]
    assert checked.lines() == [
        "readable: 53 images, 40 to 40 pixels wide and 30 to 32 high",
        "warning: 2 images cannot be used: truncated or damaged (first: '03.png')",
        "warning: 3 images cannot be used: not one of JPEG, PNG, WEBP, or its beginning is damaged (first: '05.png')",
        "warning: 1 images cannot be used: not damaged, but of a size that is not read: both sides must be at least 8 "
        "(first: '08.png')",
        "warning: 1 images cannot be used: not damaged, but of a size that is not read: one side may be at most 20 "
        "times the other (first: '09.png')",
        "warning: 2 images are equal to an earlier one (first: '20.png' = '19.png')",
    ]


@pytest.mark.parametrize("count", [1, 9, 70])
def test_the_sheet_shows_images_over_the_whole_set(tmp_path, count):
    for number in range(count):
        fill(tmp_path, **{f"{number:02}_png": png(16, 16, number), f"{number:02}_txt": f"caption {number} 東"})
    fill(tmp_path, bad_png=b"x", bad_txt="damaged")
    sheet = contact_sheet(open_source(tmp_path, "text"), count=64)
    shown = min(count + 1, -(-(count + 1) // 2) if count + 1 > 64 else count + 1)
    rows = -(-shown // 8)
    assert sheet.size == (8 * 132 + 4, rows * 162 + 4)
    assert len(np.unique(np.asarray(sheet).reshape(-1, 3), axis=0)) > 50  # noise, text and white
