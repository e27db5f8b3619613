"""scripts/emoji/judge.py: it reads every image of the data set, also blurred, shifted or noisy, and none in others."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from mindalle_jax.errors import UsageError
from scripts.emoji.dataset import GROUNDS, Example, blank_card, render
from scripts.emoji.judge import MAX_ERROR, Judge, accuracy
from scripts.emoji.things import STYLES


@pytest.fixture(scope="module")
def examples(things) -> list[Example]:
    """Every thing in every style on every ground."""
    return [
        Example(thing, style, ground) for thing in range(len(things.things)) for style in STYLES for ground in GROUNDS
    ]


@pytest.fixture(scope="module")
def images(things, examples) -> np.ndarray:
    return np.stack([render(things, example) for example in examples])


def blurred(images: np.ndarray) -> np.ndarray:
    return np.stack([np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(1))) for image in images])


def noisy(images: np.ndarray) -> np.ndarray:
    return np.clip(images + np.random.default_rng(0).normal(0, 12, images.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    "change",
    [lambda x: x, blurred, noisy, lambda x: np.roll(x, 1, 1), lambda x: np.roll(x, -1, 2)],
    ids=["as rendered", "blurred", "noisy", "shifted down", "shifted left"],
)
def test_it_reads_every_image(things, examples, images, change):
    assert set(accuracy(Judge(things).read(change(images)), examples).values()) == {1.0}


def test_what_is_like_nothing_is_nothing(things):
    """A blank card on each ground, one plain color, a flat disc, and noise."""
    y, x = np.mgrid[:64, :64] - 32
    disc = np.where((x**2 + y**2 < 200)[..., None], (3, 250, 120), 255).astype(np.uint8)
    blank = [blank_card(ground) for ground in GROUNDS]
    plain = np.full((64, 64, 3), GROUNDS["sky"], np.uint8)
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    seen = Judge(things).read(np.stack([*blank, plain, disc, noise]))
    assert [one.thing for one in seen] == [None] * 7 and all(one.error > MAX_ERROR for one in seen)
    assert [one.ground for one in seen[:4]] == list(GROUNDS) and seen[4].ground == "sky" and seen[6].ground is None


def test_shares_of_what_is_right(things, examples, images):
    """Another thing, style or ground than asked for is counted where it is wrong."""
    seen = Judge(things).read(images[:1])
    asked = examples[0]
    style = next(style for style in STYLES if style != asked.style)
    ground = next(ground for ground in GROUNDS if ground != asked.ground)
    for other, wrong in (
        (asked._replace(thing=asked.thing + 1), {"thing", "thing and style"}),
        (asked._replace(style=style), {"style", "thing and style"}),
        (asked._replace(ground=ground), {"ground"}),
    ):
        metrics = accuracy(seen * 2, [asked, other])
        assert {name for name, share in metrics.items() if share == 0.5} == wrong
        assert all(share == 1.0 for name, share in metrics.items() if name not in wrong)


@pytest.mark.parametrize(
    "images",
    [np.zeros((2, 32, 32, 3), np.uint8), np.zeros((64, 64, 3), np.uint8), np.zeros((1, 64, 64, 3), np.float32)],
    ids=lambda images: f"{images.dtype}{images.shape}",
)
def test_other_arrays_are_refused(things, images):
    with pytest.raises(UsageError, match=r"images must be uint8\[n, 64, 64, 3\]"):
        Judge(things).read(images)
