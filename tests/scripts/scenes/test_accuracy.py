"""scripts/scenes/accuracy.py: verdicts are counted, the ranker's best is judged, distances are those of pixels."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from scripts.scenes.accuracy import accuracy, nearest, sample_scenes
from scripts.scenes.dataset import Scene, captions, make_scene, render
from scripts.scenes.judge import ThingVerdict, Verdict

RIGHT = ThingVerdict(True, True, True, True)
COUNT = 12


# Counting


def test_each_attribute_is_counted_over_the_pictures_it_was_asked_of():
    """What is None was not asked for: neither right nor wrong."""
    verdicts = [
        Verdict(True, True, (RIGHT,), None),
        Verdict(True, None, (RIGHT, ThingVerdict(True, False, True, True)), True),
        Verdict(False, False, (RIGHT, ThingVerdict(False, False, True, False)), False),
        Verdict(True, None, (RIGHT, RIGHT), True),
    ]
    assert accuracy(verdicts) == {
        "count": 3 / 4,
        "background": 1 / 2,
        "relation": 2 / 3,
        "shape": 3 / 4,
        "colour": 2 / 4,
        "size": 1.0,
        "striped": 3 / 4,
        "all": 2 / 4,
    }


def test_what_was_asked_of_no_picture_is_left_out():
    found = accuracy(iter([Verdict(True, None, (RIGHT,), None)]))
    assert found == dict.fromkeys(["count", "shape", "colour", "size", "striped", "all"], 1.0)
    assert accuracy([]) == {}


# Drawing


def other_scene(scene: Scene) -> Scene:
    """A scene whose things are all of other shapes."""
    shapes = {thing.shape for thing in scene.things}
    others = (make_scene("train", index) for index in range(1_000))
    return next(other for other in others if not shapes & {thing.shape for thing in other.things})


class Stage:
    """Stands in for a model: draws the scene of the caption as candidate `right`, and others beside it.

    It is its own ranker: `order` begins with the candidate `best`.
    """

    def __init__(self, split: Any, right: int, best: int):
        self.scenes = {captions(scene)[0]: scene for scene in (make_scene(split, index) for index in range(COUNT))}
        self.right, self.best, self.asked = right, best, []

    def generate(self, caption: str, *, num_candidates: int, ranker: Any, **options: Any) -> Any:
        self.asked.append((caption, num_candidates, ranker, options))
        scene = self.scenes[caption]
        images = np.stack([render(other_scene(scene))] * num_candidates)
        images[self.right] = render(scene)
        order = np.roll(np.arange(num_candidates), -self.best) if ranker else np.arange(num_candidates)
        return SimpleNamespace(images=images, order=order)


@pytest.mark.parametrize("split", ["valid", "heldout"])
def test_the_first_and_the_rankers_best_are_judged(split):
    model: Any = Stage(split, right=2, best=2)
    drawn = sample_scenes(model, split, COUNT, ranker=model, num_candidates=4, temperature=0.5)
    assert model.asked == [(caption, 4, model, {"temperature": 0.5}) for caption in model.scenes]
    assert [one.scene for one in drawn] == [make_scene(split, index) for index in range(COUNT)]
    for one in drawn:
        assert one.caption == captions(one.scene)[0]
        np.testing.assert_array_equal(one.best, render(one.scene))
        np.testing.assert_array_equal(one.first, render(other_scene(one.scene)))
    figures = accuracy(one.best_verdict for one in drawn)
    assert set(figures) == {"count", "background", "relation", "shape", "colour", "size", "striped", "all"}
    assert set(figures.values()) == {1.0}
    assert accuracy(one.first_verdict for one in drawn)["shape"] == 0.0


def test_a_wrong_choice_counts_as_wrong():
    """The right picture is there, but not what the ranker puts first; no shape in the one it does is right."""
    model: Any = Stage("valid", right=2, best=1)
    drawn = sample_scenes(model, "valid", COUNT, ranker=model, num_candidates=4)
    figures = accuracy(one.best_verdict for one in drawn)
    assert figures["all"] == figures["shape"] == 0.0


def test_without_a_ranker_the_first_picture_is_the_best():
    model: Any = Stage("valid", right=0, best=0)
    drawn = sample_scenes(model, "valid", COUNT)
    assert accuracy(one.best_verdict for one in drawn)["all"] == 1.0
    assert {(candidates, ranker) for _, candidates, ranker, _ in model.asked} == {(1, None)}
    model = Stage("valid", right=1, best=0)
    assert accuracy(one.best_verdict for one in sample_scenes(model, "valid", COUNT, num_candidates=2))["all"] == 0.0


# Distances


def test_nearest_is_the_least_mean_difference():
    """Against the definition in float64; the means are rounded to float32 at the end, of 24 bits."""
    rng = np.random.default_rng(0)
    pictures, others = (rng.integers(0, 256, (n, 8, 8, 3), np.uint8) for n in (5, 7))
    others[3] = pictures[1]
    others[4] = pictures[2]
    others[4, 0, 0] = 255 - others[4, 0, 0]
    differences = np.abs(pictures[:, None].astype(float) - others[None].astype(float)).mean((2, 3, 4)) / 255
    found = nearest(pictures, others)
    assert found.dtype == np.float32 and found.shape == (5,)
    np.testing.assert_allclose(found, differences.min(1), rtol=2**-22)
    assert found[1] == 0 and 0 < found[2] < 0.02 and (found[[0, 3, 4]] > 0.2).all()


def test_nearest_has_the_range_of_pixels():
    """0 to 255 and back is 1: no byte wraps around."""
    black, white = np.zeros((1, 4, 4, 3), np.uint8), np.full((1, 4, 4, 3), 255, np.uint8)
    assert nearest(black, white) == nearest(white, black) == 1.0
    assert nearest(black, np.concatenate([white, black])) == 0.0
