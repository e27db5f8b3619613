"""Measures how often samples of captions of scenes are right, by the judge of scripts/scenes/judge.py."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from mindalle_jax.pipeline import Dalle
from mindalle_jax.ranking.ranker import ClipRanker
from scripts.scenes.dataset import Scene, Split, Style, captions, make_scene
from scripts.scenes.judge import Verdict, judge


class JudgedSample(NamedTuple):
    """The samples of one caption, and the verdicts on them."""

    scene: Scene
    caption: str
    first: np.ndarray
    """uint8[S, S, 3]: candidate 0, which is the same however many are sampled in batches of one size"""
    best: np.ndarray
    """uint8[S, S, 3]: the choice of the ranker; candidate 0 without a ranker"""
    first_verdict: Verdict
    best_verdict: Verdict


def sample_scenes(
    model: Dalle,
    split: Split,
    count: int,
    *,
    ranker: ClipRanker | None = None,
    num_candidates: int = 1,
    style: Style = "flat",
    **options: Any,
) -> list[JudgedSample]:
    """Samples the first caption of each of the first `count` scenes of a split, and judges the images.

    num_candidates, options: as Dalle.generate.
    """
    judged = []
    for index in tqdm(range(count), desc=f"{split}, best of {num_candidates}", unit="prompt", disable=None):
        scene = make_scene(split, index)
        caption = captions(scene)[0]
        images = model.generate(caption, num_candidates=num_candidates, ranker=ranker, **options)
        first, best = images.images[0], images.images[images.order[0]]
        verdicts = (judge(image, scene, caption, style) for image in (first, best))
        judged.append(JudgedSample(scene, caption, first, best, *verdicts))
    return judged


def accuracy(verdicts: Iterable[Verdict]) -> dict[str, float]:
    """Share of verdicts, in [0, 1], in which an attribute is right for all things; `all` is every attribute at once.

    An attribute that no caption asks for is left out.
    """
    answers: dict[str, list[bool]] = {}
    for verdict in verdicts:
        right = {name: [getattr(verdict, name)] for name in ("count", "background", "relation")}
        for name in ("shape", "colour", "size", "striped"):
            right[name] = [getattr(thing, name) for thing in verdict.things]
        for name, values in (right | {"all": [verdict.all_right]}).items():
            if None not in values:
                answers.setdefault(name, []).append(all(values))
    return {name: float(np.mean(values)) for name, values in answers.items()}


def nearest(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """f32[n]: mean absolute difference, in [0, 1], of each image uint8[n, S, S, 3] from the nearest of others."""
    flat = others.reshape(len(others), -1).astype(np.int16)
    distances = [np.abs(flat - image.reshape(-1).astype(np.int16)).mean(1).min() / 255 for image in images]
    return np.array(distances, np.float32)
