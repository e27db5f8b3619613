"""data/memory.py: pairs in memory, whatever form their images have."""

import io

import numpy as np
import pytest
from image_folders import captions, labels
from PIL import Image

from mindalle_jax.data.images import decode_image
from mindalle_jax.data.memory import memory_source
from mindalle_jax.errors import DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (16, 12, 3), np.uint8)


def encoded() -> bytes:
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("form", ["array", "PIL", "bytes", "path", "text"])
def test_images_in_any_form(tmp_path, form):
    (tmp_path / "a.png").write_bytes(encoded())
    images = {"array": PIXELS, "PIL": Image.fromarray(PIXELS), "bytes": encoded(), "path": tmp_path / "a.png",
              "text": str(tmp_path / "a.png")}  # fmt: skip
    source = memory_source([(images[form], "a cat")], "text")
    np.testing.assert_array_equal(np.asarray(decode_image(source[0].image.read())), PIXELS)


def test_captions_and_labels():
    pairs = [(PIXELS, "a cat"), (PIXELS, ["a dog", "dogs"]), (PIXELS, "")]
    source = memory_source(pairs, "text")
    assert captions(source) == {"0": ["a cat"], "1": ["a dog", "dogs"]}
    assert dict(source.report.dropped) == {"with an empty caption": 1}
    named = memory_source([(PIXELS, "dog"), (PIXELS, "cat")], "class", num_classes=2)
    assert labels(named) == {"0": 1, "1": 0} and named.classes == ["cat", "dog"]
    assert labels(memory_source([(PIXELS, "dog")], "class", known_classes=named.classes)) == {"0": 1}
    assert len(memory_source([(PIXELS, None)], "unconditional")) == 1


def test_any_sized_object():
    class Lazy:
        def __len__(self):
            return 3

        def __getitem__(self, number):
            return PIXELS + np.uint8(number), f"cat {number}"

    source = memory_source(Lazy(), "text")
    assert list(captions(source).values()) == [["cat 0"], ["cat 1"], ["cat 2"]]
    assert decode_image(source[2].image.read()).getpixel((0, 0)) == tuple(PIXELS[0, 0] + np.uint8(2))


@pytest.mark.parametrize("pairs", [[PIXELS[0, 0, 0]], [(PIXELS,)], [(PIXELS, 3)], [(PIXELS, "a", "b")]])
def test_what_is_no_pair(pairs):
    with pytest.raises(DataError, match="item 0 of the data is no pair of an image and a text or label"):
        memory_source(pairs, "text")
