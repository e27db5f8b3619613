"""How often pictures that a model draws from captions of scenes are right, by the judge of scripts/scenes/judge.py."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from mindalle_jax.pipeline import Dalle
from mindalle_jax.ranking.ranker import ClipRanker
from scripts.scenes.dataset import Scene, Split, Style, captions, make_scene
from scripts.scenes.judge import Verdict, judge


class Drawn(NamedTuple):
    """What a model drew from a caption."""

    scene: Scene
    caption: str
    first: np.ndarray
    """uint8[S, S, 3]: candidate 0, which is the same however many are drawn in chunks of one size"""
    best: np.ndarray
    """uint8[S, S, 3]: the ranker's choice; without one candidate 0"""
    first_verdict: Verdict
    best_verdict: Verdict


def draw_scenes(
    model: Dalle,
    split: Split,
    count: int,
    *,
    ranker: ClipRanker | None = None,
    num_candidates: int = 1,
    style: Style = "flat",
    **options: Any,
) -> list[Drawn]:
    """Pictures of the first `count` scenes of a split, from the first caption of each, judged.

    num_candidates, options: as Dalle.generate.
    """
    drawn = []
    for index in tqdm(range(count), desc=f"{split}, best of {num_candidates}", unit="prompt", disable=None):
        scene = make_scene(split, index)
        caption = captions(scene)[0]
        pictures = model.generate(caption, num_candidates=num_candidates, ranker=ranker, **options)
        first, best = pictures.images[0], pictures.images[pictures.order[0]]
        verdicts = (judge(picture, scene, caption, style) for picture in (first, best))
        drawn.append(Drawn(scene, caption, first, best, *verdicts))
    return drawn


def accuracy(verdicts: Iterable[Verdict]) -> dict[str, float]:
    """Share of verdicts, in [0, 1], in which an attribute is right of all things; `all` is every attribute at once.

    What was asked for in no picture of them is left out.
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


def nearest(pictures: np.ndarray, others: np.ndarray) -> np.ndarray:
    """f32[n]: mean absolute difference, in [0, 1], of each picture uint8[n, S, S, 3] to the most similar of others."""
    flat = others.reshape(len(others), -1).astype(np.int16)
    distances = [np.abs(flat - picture.reshape(-1).astype(np.int16)).mean(1).min() / 255 for picture in pictures]
    return np.array(distances, np.float32)
