"""scripts/scenes/judge.py: what was drawn is read back, damage of a small network is forgiven, other scenes are not."""

import dataclasses

import numpy as np
import pytest
from PIL import Image, ImageFilter

from mindalle_jax.errors import UsageError
from scripts.scenes.dataset import BACKGROUNDS, COLORS, SHAPES, Scene, Thing, captions, make_scene, render
from scripts.scenes.judge import compare, judge, read_scene

COUNT = 1_000
"""About 10 seconds."""


def filtered(picture: np.ndarray, damage: ImageFilter.Filter) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).filter(damage))


def noisy(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.clip(picture + rng.normal(0, 8, picture.shape), 0, 255).astype(np.uint8)


def shifted(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.clip(picture + rng.uniform(-10, 10, 3), 0, 255).astype(np.uint8)


def shrunk(picture: np.ndarray, times: int) -> np.ndarray:
    image = Image.fromarray(picture)
    small = image.resize((image.width // times, image.height // times), Image.Resampling.BILINEAR)
    return np.asarray(small.resize(image.size, Image.Resampling.BILINEAR))


DAMAGE = {
    "gaussian": lambda picture, rng: filtered(picture, ImageFilter.GaussianBlur(1)),
    "box": lambda picture, rng: filtered(picture, ImageFilter.BoxBlur(1)),
    "noise": noisy,
    "colour": shifted,
    "to a half and back": lambda picture, rng: shrunk(picture, 2),
    "to a third and back": lambda picture, rng: shrunk(picture, 3),
    "all": lambda picture, rng: shifted(noisy(filtered(picture, ImageFilter.GaussianBlur(1)), rng), rng),
}

SCENE = Scene(
    (Thing("star", "red", "small", True), Thing("circle", "blue", "large", False)),
    "left of",
    "grey",
    ((16, 28), (44, 36)),
)


def changed(scene: Scene, number: int, **fields: object) -> Scene:
    things = list(scene.things)
    things[number] = dataclasses.replace(things[number], **fields)
    return dataclasses.replace(scene, things=tuple(things))


# What is drawn is read


def test_every_held_out_scene_is_read_right():
    """The bar is 99 in 100; all were right when this was written."""
    right = [judge(render(scene), scene).all_right for scene in (make_scene("heldout", i) for i in range(COUNT))]
    assert np.mean(right) >= 0.99


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_of_a_small_network_is_forgiven(damage):
    """All were right when this was written; two in a hundred are left to other versions of Pillow and its blur."""
    rng = np.random.default_rng(0)
    scenes = [make_scene("heldout", index) for index in range(100)]
    right = [judge(DAMAGE[damage](render(scene), rng), scene).all_right for scene in scenes]
    assert np.mean(right) >= 0.98


@pytest.mark.parametrize(("size", "style"), [(64, "tiled"), (96, "flat"), (128, "tiled")])
def test_other_sizes_and_styles_are_read(size, style):
    for index in range(60):
        scene = make_scene("valid", index)
        assert judge(render(scene, size, style), scene, style=style).all_right, index


def test_centres_and_everything_of_a_thing_are_read():
    reading = read_scene(render(SCENE))
    assert reading.background == "grey"
    large, small = reading.things
    assert (large.shape, large.colour, large.size, large.striped) == ("circle", "blue", "large", False)
    assert (small.shape, small.colour, small.size, small.striped) == ("star", "red", "small", True)
    assert (large.center, small.center) == ((44, 36), (16, 28))


def test_floats_are_read_as_bytes_are():
    picture = render(SCENE)
    assert read_scene(picture) == read_scene(picture.astype(np.float32) / 255)


# What is drawn instead is refused, in what is wrong and nothing else


@pytest.mark.parametrize("number", [0, 1])
def test_one_other_attribute_of_a_thing_is_refused(number):
    """All shapes, colours and sizes, and stripes, on every background; the other thing stays right."""
    thing = SCENE.things[number]
    others = [("shape", shape) for shape in SHAPES if shape != thing.shape]
    others += [("colour", colour) for colour in COLORS if colour != thing.colour]
    others += [("size", "large" if thing.size == "small" else "small"), ("striped", not thing.striped)]
    for background in BACKGROUNDS:
        scene = dataclasses.replace(SCENE, background=background)
        for field, value in others:
            # Room for two large things.
            drawn = changed(dataclasses.replace(scene, centres=((16, 28), (48, 36))), number, **{field: value})
            verdict = judge(render(drawn), scene)
            assert verdict.count and verdict.background and verdict.relation and not verdict.all_right
            for place, seen in enumerate(verdict.things):
                expected = {name: (place, name) != (number, field) for name in ("shape", "colour", "size", "striped")}
                assert vars(seen) == expected, (background, field, value)


def test_random_other_scenes_are_refused():
    """Whatever differs in the description: a judge that says yes too easily would praise any model."""
    scenes = [make_scene("train", index) for index in range(150)]
    for scene, other in zip(scenes, scenes[1:], strict=False):
        assert judge(render(other), scene).all_right == (other.description() == scene.description())


def test_things_that_changed_places_are_refused():
    (x0, y0), (x1, y1) = SCENE.centres
    swapped = dataclasses.replace(SCENE, centres=((x1, y1), (x0, y0)))
    verdict = judge(render(swapped), SCENE)
    assert verdict.relation is False and not verdict.all_right
    assert all(all(vars(thing).values()) for thing in verdict.things)
    above = dataclasses.replace(SCENE, centres=((32, 14), (36, 44)))
    assert judge(render(above), SCENE).relation is False
    assert judge(render(above), dataclasses.replace(SCENE, relation="above")).all_right


def test_exchanged_colours_are_refused():
    """Both colours are in the picture, on the wrong things."""
    drawn = changed(changed(SCENE, 0, colour="blue"), 1, colour="red")
    assert not judge(render(drawn), SCENE).all_right


def test_missing_and_additional_things_are_refused():
    one = dataclasses.replace(SCENE, things=SCENE.things[1:], centres=SCENE.centres[1:], relation=None)
    verdict = judge(render(one), SCENE)
    assert not verdict.count and verdict.relation is False
    assert not any(vars(verdict.things[0]).values()) and all(vars(verdict.things[1]).values())
    verdict = judge(render(SCENE), one)
    assert not verdict.count and not verdict.all_right and all(vars(verdict.things[0]).values())
    verdict = judge(background := np.full((64, 64, 3), 132, np.uint8), SCENE)
    assert not verdict.count and verdict.background and read_scene(background).things == ()


def test_specks_are_ignored():
    picture = render(SCENE).copy()
    picture[2:7, 55:60] = 255
    assert judge(picture, SCENE).all_right


def test_a_background_matters_where_it_is_named():
    drawn = render(dataclasses.replace(SCENE, background="sky"))
    assert judge(drawn, SCENE).background is False
    assert judge(drawn, SCENE, captions(SCENE)[0]).background is False
    unnamed = judge(drawn, SCENE, "a small striped red star left of a large blue circle")
    assert unnamed.background is None and unnamed.all_right


def test_what_is_like_nothing_drawn_is_none():
    """Noise, a background of another colour, and a bar."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    assert not judge(noise, SCENE).all_right
    assert read_scene(np.full((64, 64, 3), (90, 200, 60), np.uint8)).background is None
    picture = np.full((64, 64, 3), 246, np.uint8)
    picture[30:36, 4:60] = COLORS["red"]
    (thing,) = read_scene(picture).things
    assert thing.shape is None and thing.size is None


def test_a_reading_can_be_compared_with_several_scenes():
    reading = read_scene(render(SCENE))
    assert compare(reading, SCENE).all_right
    assert not compare(reading, changed(SCENE, 0, shape="heart")).all_right


@pytest.mark.parametrize(
    "picture",
    [
        np.zeros((64, 32, 3), np.uint8),
        np.zeros((64, 64), np.uint8),
        np.full((64, 64, 3), 2.0),
        np.zeros((64, 64, 3), int),
    ],
)
def test_other_arrays_are_refused(picture):
    with pytest.raises(UsageError, match="an image must be"):
        read_scene(picture)
