"""PNG files that say how their image was made, and files of other people that only look so."""

import json

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mindalle_jax.errors import UsageError
from mindalle_jax.sampling.image_file import KEY, ImageRecord, read_image_record, write_image

PIXELS = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
RECORD = ImageRecord("a cat — 東京 🎨\n", 7, 3, np.arange(16, dtype=np.int32), 0.25, {"model": "demo", "top_k": None})


def test_a_file_tells_what_was_written(tmp_path):
    """And is an ordinary PNG, whose prompt other programs show too."""
    write_image(tmp_path / "a.png", PIXELS, RECORD)
    record = read_image_record(tmp_path / "a.png")
    assert (record.prompt, record.seed, record.candidate, record.score) == ("a cat — 東京 🎨\n", 7, 3, 0.25)
    assert record.settings == RECORD.settings and record.codes.dtype == np.int32
    np.testing.assert_array_equal(record.codes, RECORD.codes)
    with Image.open(tmp_path / "a.png") as image:
        np.testing.assert_array_equal(np.asarray(image), PIXELS)
        assert image.info["Description"] == RECORD.prompt and image.info["Software"].startswith("mindalle-jax ")


def with_text(path, text: str, key: str = KEY):
    chunks = PngInfo()
    chunks.add_text(key, text, zip=True)
    Image.fromarray(PIXELS).save(path, pnginfo=chunks)


GOOD = {"prompt": "a", "seed": 0, "candidate": 0, "codes": [1, 2], "score": None, "settings": {}}


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": 3},
        {"seed": -1},
        {"seed": 2**32},
        {"seed": True},
        {"seed": "0"},
        {"candidate": 1.5},
        {"candidate": 2**40},
        {"codes": []},
        {"codes": [[1]]},
        {"codes": ["a"]},
        {"codes": [1.5]},
        {"codes": [2**70]},
        {"codes": None},
        {"score": "high"},
        {"settings": []},
        {"more": 1},
    ],
    ids=str,
)
def test_a_record_of_somebody_else_is_checked(tmp_path, change):
    with_text(tmp_path / "a.png", json.dumps(GOOD))
    assert read_image_record(tmp_path / "a.png").prompt == "a"
    with_text(tmp_path / "a.png", json.dumps(GOOD | change))
    with pytest.raises(UsageError, match="a.png: its record is damaged"):
        read_image_record(tmp_path / "a.png")


@pytest.mark.parametrize("text", ["", "{", "3", "[" * 100_000, json.dumps({"prompt": "a"})])
def test_text_that_is_no_record_is_told(tmp_path, text):
    with_text(tmp_path / "a.png", text)
    with pytest.raises(UsageError, match="a.png: its record is damaged"):
        read_image_record(tmp_path / "a.png")


def test_a_chunk_that_grows_is_not_read(tmp_path):
    """A kilobyte of zeros that unpacks to 100 MB."""
    with_text(tmp_path / "a.png", " " * 100_000_000)
    with pytest.raises(UsageError, match="a.png: cannot be read as PNG"):
        read_image_record(tmp_path / "a.png")


def test_files_without_a_record_are_told(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "plain.png")
    with_text(tmp_path / "other.png", "{}", key="parameters")
    Image.fromarray(PIXELS).save(tmp_path / "a.jpg")
    (tmp_path / "page.png").write_text("<html>")
    (tmp_path / "cut.png").write_bytes((tmp_path / "plain.png").read_bytes()[:50])
    for name in ("plain.png", "other.png"):
        with pytest.raises(UsageError, match=f"{name}: has no record of how it was made"):
            read_image_record(tmp_path / name)
    with pytest.raises(UsageError, match="missing.png: no such file"):
        read_image_record(tmp_path / "missing.png")
    for name in ("a.jpg", "page.png", "."):
        with pytest.raises(UsageError, match="cannot be read as PNG"):
            read_image_record(tmp_path / name)
