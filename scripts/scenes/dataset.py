"""Captioned pictures of simple scenes, drawn on demand: to train and measure a small text-to-image model anywhere.

A scene is one thing, or two beside or above each other, on a plain background. Every scene, its captions and its
picture are functions of (split, index) and the same on every machine. scripts/scenes/judge.py reads a picture back.

Lengths are in 64ths of the picture's side, so they are pixels of a picture of 64 x 64.
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
"""train and valid share no description; in both nothing of heldout is ever seen: HELDOUT_LOOKS, HELDOUT_PAIRS."""
Style = Literal["flat", "tiled"]
STYLES = ("flat", "tiled")
"""tiled: a quarter of the background, every other square of every other row, has another colour."""

SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "diamond")
COLOURS: dict[str, tuple[int, int, int]] = {
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
"""RGB of every other band of what is striped: one for all, so that what is learned of it serves every colour."""
BACKGROUNDS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "white": ((246, 246, 246), (132, 132, 132)),
    "grey": ((132, 132, 132), (246, 246, 246)),
    "sky": ((150, 200, 255), (132, 132, 132)),
}
"""Name -> RGB, and RGB of the squares of the style "tiled". No name of a thing's colour is among them."""
SIZES = {"small": 16, "large": 24}
"""Name -> width and height of the box around a thing, which a shape fills in at least one direction."""
RELATIONS = ("left of", "above")
"""Of the first thing to the second. "right of" and "below" are the same scenes, told from the second thing."""
MARGIN = 2
"""Least distance of a thing from the edge."""
GAP = 4
"""Least distance of two things."""
STEP = 16
"""Centres are multiples of this, and of a code of the small VQGAN: a thing looks the same to it wherever it is."""
BAND = 4
"""Height of a stripe; the first begins at a multiple of STEP."""
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
"""Colours and shapes that only the split heldout puts together."""
HELDOUT_PAIRS = frozenset(
    pair for number, pair in enumerate(itertools.product(SHAPES, RELATIONS, SHAPES)) if number % 11 == 3
)
"""Shapes in relations that only the split heldout has: 9 of 98."""

ONE_THING = 0.4
"""Share of the scenes with one thing."""
STRIPED = 0.4
VALID_SHARE = 16
"""One description in so many is of the split valid."""
FORMAT_VERSION = 6
MANIFEST = "scenes.json"


@dataclass(frozen=True)
class Thing:
    """What a caption says of a thing."""

    shape: str
    colour: str
    size: str
    striped: bool


@dataclass(frozen=True)
class Scene:
    """What a caption says, and where things are."""

    things: tuple[Thing, ...]
    """One or two; of two the left or upper one is the first."""
    relation: str | None
    """Of RELATIONS, for two things."""
    background: str
    centres: tuple[tuple[int, int], ...]
    """(x, y) of each thing, from the upper left corner."""

    def description(self) -> str:
        """All but the centres: scenes with the same captions have the same description."""
        return repr((self.things, self.relation, self.background))


def make_scene(split: Split, index: int) -> Scene:
    """Scene `index` of a split, which has no end. Raises UsageError."""
    if split not in SPLITS or index < 0:
        raise UsageError(f"split must be one of {', '.join(SPLITS)} and index at least 0, not {split!r} and {index}")
    chance = Chance(f"{split} {index}")
    num_things = 1 if chance.share(ONE_THING) else 2
    while True:  # one draw in 4 is of heldout, one in 20 of valid
        scene = _any_scene(chance, num_things)
        if _split(scene) == split:
            return scene


def make_contrast(index: int) -> Scene:
    """A scene of train that differs from make_scene("train", index) in one way, with things at the same places.

    One attribute of a thing is another, or two things have exchanged one, or all. CLIP learns from such pairs in one
    batch what captions say beside which words are in them.
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
    """The HELDOUT_LOOKS and HELDOUT_PAIRS of a scene; empty for those of train and valid."""
    looks = {(thing.colour, thing.shape) for thing in scene.things}
    pairs = {(scene.things[0].shape, scene.relation, scene.things[1].shape)} if scene.relation else set()
    return {*(looks & HELDOUT_LOOKS), *(pairs & HELDOUT_PAIRS)}


def captions(scene: Scene, count: int = 2) -> list[str]:
    """Different captions of a scene, at most 20 words in lower case; the first names the background, most others too.

    Each tells all of every thing and the relation; what is not called striped is plain. Raises UsageError.
    """
    if not 1 <= count <= 8:  # of a single thing little more can be said
        raise UsageError(f"count must be from 1 to 8, not {count}")
    chance = Chance(f"captions {scene}")
    found: list[str] = []
    while len(found) < count:
        named = not found or chance.share(0.6)
        caption = _caption(scene, chance, named)
        if caption not in found:
            found.append(caption)
    return found


def draw(scene: Scene, size: int = 64, style: Style = "flat") -> np.ndarray:
    """uint8[size, size, 3], antialiased. size: a multiple of 16, at least 64. Raises UsageError."""
    _check(size, style)
    pixel = size // 64 if size % 64 == 0 else size / 64
    picture = background_picture(scene.background, size, style).astype(np.float32)
    for thing, (x, y) in zip(scene.things, scene.centres, strict=True):
        mask = thing_mask(thing.shape, thing.size, size)  # [h, h]
        left, top = round(x * pixel) - len(mask) // 2, round(y * pixel) - len(mask) // 2
        rows, columns = slice(top, top + len(mask)), slice(left, left + len(mask))
        colours = np.array((COLOURS[thing.colour], STRIPES), np.float32)
        bands = (np.arange(top, top + len(mask)) // (size // 16) % 2) * thing.striped
        alpha = mask[:, :, None]
        picture[rows, columns] += alpha * (colours[bands][:, None] - picture[rows, columns])
    return (picture + 0.5).astype(np.uint8)


@functools.cache
def background_picture(background: str, size: int, style: Style) -> np.ndarray:
    """uint8[size, size, 3] without things. Not to be changed."""
    main, other = BACKGROUNDS[background]
    odd = np.arange(size) // (size // 8) % 2 == 1
    tiles = odd[:, None] & odd & (style == "tiled")
    picture = np.where(tiles[:, :, None], other, main).astype(np.uint8)
    picture.setflags(write=False)
    return picture


@functools.cache
def thing_mask(shape: str, thing_size: str, size: int) -> np.ndarray:
    """f32[h, h] in [0, 1]: the part of each pixel that a thing covers, its centre in the middle. h is even."""
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
    """Writes pictures of the scenes first to first + count - 1 as a data set that data/folders.py reads.

    A file is named after the index: make_scene(split, index) is what 000123.png shows. metadata.jsonl has the captions.
    classes: write only scenes of one thing, about 4 in 10, into a folder for each shape and without captions.
    contrasts: of train, beside each of them 000123-contrast.png with make_contrast(123).
    Nothing is done if the folder holds just this already. Raises OutputError if it holds anything else, or UsageError.
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
            for shape in SHAPES:  # also where no scene is: a label is the position of a name among all
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
                Image.fromarray(draw(one, size, style)).save(place / name)
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
    """None if there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except (OSError, ValueError):
        raise OutputError(f"{path}: cannot be read; name another folder, or remove it") from None


_VALUES: dict[str, tuple[Any, ...]] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "size": tuple(SIZES),
    "striped": (False, True),
}
"""Attribute of a thing -> what it can be."""


def _any_scene(chance: Chance, num_things: int) -> Scene:
    """A scene of whatever split."""
    things = [_any_thing(chance) for _ in range(num_things)]
    while num_things == 2 and (things[0].shape, things[0].colour) == (things[1].shape, things[1].colour):
        things[1] = _any_thing(chance)  # two that a caption tells apart
    relation = chance.of(RELATIONS) if num_things == 2 else None
    background = chance.of(tuple(BACKGROUNDS))
    centres = chance.of(_centres(tuple(thing.size for thing in things), relation))
    return Scene(tuple(things), relation, background, centres)


def _any_thing(chance: Chance) -> Thing:
    return Thing(chance.of(SHAPES), chance.of(tuple(COLOURS)), chance.of(tuple(SIZES)), chance.share(STRIPED))


def _split(scene: Scene) -> str:
    if heldout_parts(scene):
        return "heldout"
    digest = hashlib.blake2b(scene.description().encode(), digest_size=8).digest()
    return "valid" if int.from_bytes(digest, "big") % VALID_SHARE == 0 else "train"


@functools.cache
def _centres(sizes: tuple[str, ...], relation: str | None) -> list[tuple[tuple[int, int], ...]]:
    """Every place of things of these sizes: inside and apart, two of them in one row or one column."""
    radii = [SIZES[size] // 2 for size in sizes]

    def places(radius: int) -> list[tuple[int, int]]:
        steps = [step for step in range(0, 65, STEP) if MARGIN + radius <= step <= 64 - MARGIN - radius]
        return list(itertools.product(steps, steps))

    if relation is None:
        return [(centre,) for centre in places(radii[0])]
    along, across = (0, 1) if relation == "left of" else (1, 0)
    return [
        (first, second)
        for first, second in itertools.product(*map(places, radii))
        if second[along] - first[along] >= sum(radii) + GAP and second[across] == first[across]
    ]


def _caption(scene: Scene, chance: Chance, background: bool) -> str:
    """A caption in one of the orders of words."""
    phrases = [_phrase(thing, chance) for thing in scene.things]
    if scene.relation is None:
        text = phrases[0]
    else:
        swap = chance.share(0.5)
        one, other = reversed(phrases) if swap else phrases
        text = f"{one} {chance.of(_WORDS[scene.relation][swap])} {other}"
    if not background:
        return text
    colour = scene.background
    if chance.share(0.3):
        return f"{chance.of((f'on {colour}', f'on a {colour} background', f'{colour} background'))}, {text}"
    return f"{text} {chance.of((f'on a {colour} background', f'on {colour}', f'against a {colour} background'))}"


_WORDS = {
    "left of": (("to the left of", "left of"), ("to the right of", "right of")),
    "above": (("above", "over"), ("below", "under")),
}
"""Relation -> for each thing that can be mentioned first: words between the two, words after the second."""


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
"""Shape -> whether the points (x, y) are in it; the box around a thing is [-1, 1], y goes down."""
