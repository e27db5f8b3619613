"""scripts/emoji/finetune_demo.py: which images it takes, how it judges, and all of it in two steps."""

import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mindalle_jax import Dalle
from mindalle_jax.errors import DataError
from mindalle_jax.text.known_words import KnownWords
from scripts.emoji.packages import NOTO
from tests.emoji_packages import write_packages

KNOWN = KnownWords(frozenset("cat dog apple snowflake pinata medal party yarn polar bear".split()))
"""Of the other emoji in tests/emoji_packages.py, four are things."""


@pytest.fixture
def script(monkeypatch, tmp_path) -> Any:
    """The script as a module, for a package with few emoji."""
    from scripts.emoji import finetune_demo

    package = next(one for one in write_packages(tmp_path) if one.name == NOTO.name)
    monkeypatch.setattr(finetune_demo, "NOTO", package)
    monkeypatch.setattr(finetune_demo, "read_known_words", lambda _: KNOWN)
    for name, value in {"NUM_IMAGES": 1, "NUM_PROMPTS": 1, "SHOWN": 1, "COLUMNS": 1}.items():
        monkeypatch.setattr(finetune_demo, name, value)
    return finetune_demo


def test_things_that_demo_does_not_know(script, tmp_path, monkeypatch):
    """No faces, people, flags or symbols, and no names with digits."""
    monkeypatch.setattr(script, "NUM_IMAGES", 4)
    emoji = script.read_emoji(tmp_path / script.NOTO.archive)
    assert [one.caption for one in emoji] == ["a pizza", "a rocket", "a smiley cat", "a party popper"]
    assert all(one.pixels.shape == (64, 64, 3) and (one.pixels[0, 0] == 255).all() for one in emoji)  # on white


def test_too_few_emoji(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "NUM_IMAGES", 5)
    with pytest.raises(DataError, match="only 4 of its images can be used"):
        script.read_emoji(tmp_path / script.NOTO.archive)


def test_the_nearest_image(script):
    emoji = [script.Emoji(name, np.full((64, 64, 3), value, np.uint8)) for name, value in (("a", 0), ("b", 90))]
    images = np.stack([np.full((64, 64, 3), value, np.uint8) for value in (40, 50)])
    assert script.share_right(images, emoji, emoji) == 1
    assert script.share_right(images[::-1], emoji, emoji) == 0
    assert script.share_right(images[:1].repeat(2, 0), emoji, emoji) == 0.5


@pytest.mark.slow
def test_a_sheet_and_a_model(script, tmp_path):
    out = tmp_path / "out"
    (out / "packages").mkdir(parents=True)
    (tmp_path / script.NOTO.archive).rename(out / "packages" / script.NOTO.archive)
    few = ["optimizer.max_steps=2", "training.warmup_steps=1"]
    script.main(script.parser().parse_args(["--out", str(out), *few]))
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.size == (64, 3 * 64)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["prompts"] == 1 and metrics["nearest image is the one asked for, after"] == 1.0
    Dalle.from_pretrained(out / "run")
