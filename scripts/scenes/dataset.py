"""Renders captioned images of simple scenes, to train and measure a small text-to-image model anywhere.

A scene is one thing, or two things beside or above each other, on a plain background. The scene, its captions and its
image depend only on (split, index), and are the same on every machine. scripts/scenes/judge.py reads an image back.

Lengths are in 64ths of the side of the image, so they are pixels of an image of 64 x 64.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from tqdm import tqdm

from mindalle_jax.errors import OutputError, UsageError
from mindalle_jax.storage.files import new_folder
from scripts.chance import Chance

Split = Literal["train", "valid", "heldout"]
SPLITS = ("train", "valid", "heldout")
"""train and valid share no description, and neither has a part of heldout: HELDOUT_LOOKS, HELDOUT_PAIRS."""
Style = Literal["flat", "tiled"]
STYLES = ("flat", "tiled")
"""tiled: a quarter of the background, every other square of every other row, has another color."""

SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "diamond")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (222, 36, 40),
    "orange": (248, 136, 20),
    "yellow": (250, 222, 40),
    "green": (36, 156, 56),
    "turquoise": (40, 204, 204),
    "blue": (46, 84, 224),
    "purple": (140, 50, 184),
    "pink": (252, 140, 194),
    "brown": (124, 72, 36),
}
"""Name -> RGB."""
STRIPES = (20, 18, 22)
"""RGB of every other band of a striped thing: the same for all, so that what is learned for one color serves all."""
BACKGROUNDS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "white": ((246, 246, 246), (132, 132, 132)),
    "grey": ((132, 132, 132), (246, 246, 246)),
    "sky": ((150, 200, 255), (132, 132, 132)),
}
"""Name -> RGB, and RGB of the squares of the style "tiled". No name is also a color of things."""
SIZES = {"small": 16, "large": 24}
"""Name -> width and height of the box around a thing, which a shape fills in at least one direction."""
RELATIONS = ("left of", "above")
"""Where the first thing is, seen from the second. "right of" and "below" are these scenes, told in the other order."""
MARGIN = 2
"""Least distance of a thing from the edge."""
GAP = 4
"""Least distance of two things."""
STEP = 16
"""Centers are multiples of this and of the side of a code, so a thing looks the same to the VQGAN everywhere."""
BAND = 4
"""Height of a stripe; the first starts at a multiple of STEP."""
MAX_THINGS = 2

HELDOUT_LOOKS = frozenset(
    {
        ("red", "star"),
        ("orange", "ring"),
        ("yellow", "diamond"),
        ("green", "heart"),
        ("turquoise", "star"),
        ("blue", "circle"),
        ("purple", "triangle"),
        ("pink", "square"),
    }
)
"""Pairs of a color and a shape that only the split heldout has."""
HELDOUT_PAIRS = frozenset(
    pair for number, pair in enumerate(itertools.product(SHAPES, RELATIONS, SHAPES)) if number % 11 == 3
)
"""Pairs of shapes in a relation that only the split heldout has: 9 of 98."""

ONE_THING = 0.4
"""Share of the scenes with one thing."""
STRIPED = 0.4
VALID_SHARE = 16
"""One description in this many belongs to the split valid."""
FORMAT_VERSION = 6
MANIFEST = "scenes.json"


@dataclass(frozen=True)
class Thing:
    """The attributes of a thing that a caption names.

    The names of the fields of Thing and Scene are in the seeds of captions and splits, so they cannot change.
    """

    shape: str
    colour: str
    size: str
    striped: bool


@dataclass(frozen=True)
class Scene:
    """One or two things, their relation, their places, and the background."""

    things: tuple[Thing, ...]
    """One or two; the left or upper one comes first."""
    relation: str | None
    """One of RELATIONS for two things; None for one thing."""
    background: str
    centres: tuple[tuple[int, int], ...]
    """(x, y) of each thing, from the upper left corner."""

    def description(self) -> str:
        """Everything but the centers: scenes with the same captions have the same description."""
        return repr((self.things, self.relation, self.background))


def make_scene(split: Split, index: int) -> Scene:
    """Scene `index` of a split; a split has no end. Raises UsageError."""
    if split not in SPLITS or index < 0:
        raise UsageError(f"split must be one of {', '.join(SPLITS)} and index at least 0, not {split!r} and {index}")
    chance = Chance(f"{split} {index}")
    num_things = 1 if chance.share(ONE_THING) else 2
    while True:  # one scene in 4 belongs to heldout, one in 20 to valid
        scene = _any_scene(chance, num_things)
        if _split(scene) == split:
            return scene


def make_contrast(index: int) -> Scene:
    """A scene of train that differs from make_scene("train", index) in one way, with things at the same places.

    One thing has another attribute, or two things have exchanged one attribute or all. From such pairs in one batch
    CLIP learns more of captions than which words are in them.
    """
    scene, chance = make_scene("train", index), Chance(f"contrast {index}")
    while True:
        things, field = list(scene.things), chance.of(tuple(_VALUES))
        if len(things) == 2 and chance.share(0.25):
            things.reverse()
        elif len(things) == 2 and chance.share(0.33):
            one, two = things
            things = [
                dataclasses.replace(one, **{field: getattr(two, field)}),
                dataclasses.replace(two, **{field: getattr(one, field)}),
            ]
        else:
            at = chance.of(range(len(things)))
            things[at] = dataclasses.replace(things[at], **{field: chance.of(_VALUES[field])})
        other = dataclasses.replace(scene, things=tuple(things))
        told_apart = len({(thing.shape, thing.colour) for thing in things}) == len(things)
        if other != scene and told_apart and _split(other) == "train":
            return other


def heldout_parts(scene: Scene) -> set[tuple[str, ...]]:
    """The HELDOUT_LOOKS and HELDOUT_PAIRS of a scene; empty for scenes of train and valid."""
    looks = {(thing.colour, thing.shape) for thing in scene.things}
    pairs = {(scene.things[0].shape, scene.relation, scene.things[1].shape)} if scene.relation else set()
    return {*(looks & HELDOUT_LOOKS), *(pairs & HELDOUT_PAIRS)}


def captions(scene: Scene, count: int = 2) -> list[str]:
    """Different captions of a scene, at most 20 words in lower case.

    The first caption names the background, and so do most of the rest. Each names all attributes of every thing, and
    the relation; a thing that is not called striped is plain. Raises UsageError.
    """
    if not 1 <= count <= 8:  # a single thing has few more different captions
        raise UsageError(f"count must be from 1 to 8, not {count}")
    chance = Chance(f"captions {scene}")
    found: list[str] = []
    while len(found) < count:
        named = not found or chance.share(0.6)
        caption = _caption(scene, chance, named)
        if caption not in found:
            found.append(caption)
    return found


def render(scene: Scene, size: int = 64, style: Style = "flat") -> np.ndarray:
    """uint8[size, size, 3], antialiased. size: a multiple of 16, at least 64. Raises UsageError."""
    _check(size, style)
    pixel = size // 64 if size % 64 == 0 else size / 64
    image = background_image(scene.background, size, style).astype(np.float32)
    for thing, (x, y) in zip(scene.things, scene.centres, strict=True):
        mask = thing_mask(thing.shape, thing.size, size)  # [h, h]
        left, top = round(x * pixel) - len(mask) // 2, round(y * pixel) - len(mask) // 2
        rows, columns = slice(top, top + len(mask)), slice(left, left + len(mask))
        colors = np.array((COLORS[thing.colour], STRIPES), np.float32)
        bands = (np.arange(top, top + len(mask)) // (size // 16) % 2) * thing.striped
        alpha = mask[:, :, None]
        image[rows, columns] += alpha * (colors[bands][:, None] - image[rows, columns])
    return (image + 0.5).astype(np.uint8)


@functools.cache
def background_image(background: str, size: int, style: Style) -> np.ndarray:
    """uint8[size, size, 3] without things. Do not change the array."""
    main, other = BACKGROUNDS[background]
    odd = np.arange(size) // (size // 8) % 2 == 1
    tiles = odd[:, None] & odd & (style == "tiled")
    image = np.where(tiles[:, :, None], other, main).astype(np.uint8)
    image.setflags(write=False)
    return image


@functools.cache
def thing_mask(shape: str, thing_size: str, size: int) -> np.ndarray:
    """f32[h, h] in [0, 1]: the part of each pixel that a thing covers, with its center in the middle. h is even."""
    radius = SIZES[thing_size] * size / 128  # pixels
    half, fine = math.ceil(radius), 8
    steps = ((np.arange(2 * half * fine) + 0.5) / fine - half) / radius
    inside = _OUTLINES[shape](*np.meshgrid(steps, steps))
    mask = inside.reshape(2 * half, fine, 2 * half, fine).mean((1, 3), dtype=np.float32)
    mask.setflags(write=False)
    return mask


def write_scenes(
    folder: Path,
    split: Split,
    first: int,
    count: int,
    *,
    size: int = 64,
    style: Style = "flat",
    classes: bool = False,
    contrasts: bool = False,
) -> None:
    """Writes images of the scenes first to first + count - 1 as a data set that data/folders.py reads.

    A file is named after the index: 000123.png shows make_scene(split, 123). metadata.jsonl has the captions.
    classes: write only scenes of one thing, about 4 in 10, without captions, into one folder per shape.
    contrasts: for train only, write 000123-contrast.png with make_contrast(123) beside each image.
    Does nothing if the folder holds exactly this already. Raises OutputError if it holds anything else, or UsageError.
    """
    _check(size, style)
    if contrasts and (split != "train" or classes):
        raise UsageError("contrasts are of the split train, with captions")
    wanted = dict(
        version=FORMAT_VERSION, split=split, first=first, count=count, size=size, style=style, classes=classes,
        contrasts=contrasts,
    )  # fmt: skip
    if _read_manifest(folder / MANIFEST) == wanted:
        return
    with new_folder(folder, overwrite=folder.is_dir() and not any(folder.iterdir())) as new:
        rows = []
        if classes:
            for shape in SHAPES:  # also without scenes: a label is the position of a name among all
                (new / shape).mkdir()
        for index in tqdm(range(first, first + count), desc=folder.name, unit="scene", disable=None):
            scene = make_scene(split, index)
            if classes and scene.relation:
                continue
            shown = {f"{index:06}.png": scene}
            if contrasts:
                shown[f"{index:06}-contrast.png"] = make_contrast(index)
            for name, one in shown.items():
                place = new / one.things[0].shape if classes else new
                Image.fromarray(render(one, size, style)).save(place / name)
                rows.append({"file_name": name, "text": captions(one), "split": split, "index": index})
        if not classes:
            (new / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        (new / MANIFEST).write_text(json.dumps(wanted), encoding="utf-8")


def _check(size: int, style: str) -> None:
    if size < 64 or size % 16:
        raise UsageError(f"size must be a multiple of 16 and at least 64, not {size}; for example 64 or 128")
    if style not in STYLES:
        raise UsageError(f"style must be one of {', '.join(STYLES)}, not {style!r}")


def _read_manifest(path: Path) -> Any:
    """The content of the file; None if it does not exist."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except (OSError, ValueError):
        raise OutputError(f"{path}: cannot be read; name another folder, or remove it") from None


_VALUES: dict[str, tuple[Any, ...]] = {
    "shape": SHAPES,
    "colour": tuple(COLORS),
    "size": tuple(SIZES),
    "striped": (False, True),
}
"""Attribute of a thing -> its possible values."""


def _any_scene(chance: Chance, num_things: int) -> Scene:
    """A scene of any split."""
    things = [_any_thing(chance) for _ in range(num_things)]
    while num_things == 2 and (things[0].shape, things[0].colour) == (things[1].shape, things[1].colour):
        things[1] = _any_thing(chance)  # a caption must tell the two apart
    relation = chance.of(RELATIONS) if num_things == 2 else None
    background = chance.of(tuple(BACKGROUNDS))
    centres = chance.of(_centres(tuple(thing.size for thing in things), relation))
    return Scene(tuple(things), relation, background, centres)


def _any_thing(chance: Chance) -> Thing:
    return Thing(chance.of(SHAPES), chance.of(tuple(COLORS)), chance.of(tuple(SIZES)), chance.share(STRIPED))


def _split(scene: Scene) -> str:
    if heldout_parts(scene):
        return "heldout"
    digest = hashlib.blake2b(scene.description().encode(), digest_size=8).digest()
    return "valid" if int.from_bytes(digest, "big") % VALID_SHARE == 0 else "train"


@functools.cache
def _centres(sizes: tuple[str, ...], relation: str | None) -> list[tuple[tuple[int, int], ...]]:
    """Every position of things of these sizes: inside the image and apart, two things in one row or one column."""
    radii = [SIZES[size] // 2 for size in sizes]

    def places(radius: int) -> list[tuple[int, int]]:
        steps = [step for step in range(0, 65, STEP) if MARGIN + radius <= step <= 64 - MARGIN - radius]
        return list(itertools.product(steps, steps))

    if relation is None:
        return [(center,) for center in places(radii[0])]
    along, across = (0, 1) if relation == "left of" else (1, 0)
    return [
        (first, second)
        for first, second in itertools.product(*map(places, radii))
        if second[along] - first[along] >= sum(radii) + GAP and second[across] == first[across]
    ]


def _caption(scene: Scene, chance: Chance, background: bool) -> str:
    """A caption with its words in one of the possible orders."""
    phrases = [_phrase(thing, chance) for thing in scene.things]
    if scene.relation is None:
        text = phrases[0]
    else:
        swap = chance.share(0.5)
        one, other = reversed(phrases) if swap else phrases
        text = f"{one} {chance.of(_WORDS[scene.relation][swap])} {other}"
    if not background:
        return text
    ground = scene.background
    if chance.share(0.3):
        return f"{chance.of((f'on {ground}', f'on a {ground} background', f'{ground} background'))}, {text}"
    return f"{text} {chance.of((f'on a {ground} background', f'on {ground}', f'against a {ground} background'))}"


_WORDS = {
    "left of": (("to the left of", "left of"), ("to the right of", "right of")),
    "above": (("above", "over"), ("below", "under")),
}
"""Relation -> words between the things if the first one is named first, and if the second one is."""


def _phrase(thing: Thing, chance: Chance) -> str:
    size = chance.of(("small", "small", "little") if thing.size == "small" else ("large", "large", "big"))
    if thing.striped and chance.share(0.2):
        return f"a {size} {thing.colour} {thing.shape} with stripes"
    look = "striped " if thing.striped else "plain " if chance.share(0.25) else ""
    return f"a {size} {look}{thing.colour} {thing.shape}"


def _polygon(corners: list[tuple[float, float]]) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Whether points are inside: a ray to the right crosses an odd number of sides."""

    def inside(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        odd = np.zeros(x.shape, bool)
        for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
            if y0 != y1:
                odd ^= ((y0 <= y) != (y1 <= y)) & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
        return odd

    return inside


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Two discs above, and below them a triangle that touches both."""
    discs = (np.abs(x) - 0.48) ** 2 + (y + 0.42) ** 2 <= 0.52**2
    return discs | _polygon([(-0.88, -0.09), (0.0, -0.75), (0.88, -0.09), (0.0, 0.95)])(x, y)


def _star_corners() -> list[tuple[float, float]]:
    turns = [math.pi * corner / 5 for corner in range(10)]
    radii = [1.05, 0.47] * 5
    return [(r * math.sin(turn), 0.07 - r * math.cos(turn)) for r, turn in zip(radii, turns, strict=True)]


_OUTLINES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda x, y: x**2 + y**2 <= 1,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) <= 1,
    "triangle": _polygon([(0.0, -0.95), (1.0, 0.85), (-1.0, 0.85)]),
    "star": _polygon(_star_corners()),
    "heart": _heart,
    "ring": lambda x, y: (x**2 + y**2 <= 1) & (x**2 + y**2 >= 0.5**2),
    "diamond": lambda x, y: np.abs(x) / 0.72 + np.abs(y) <= 1,
}
"""Shape -> whether the points (x, y) are inside; the box around a thing is [-1, 1], and y points down."""
