"""Reads an image of scenes/dataset.py back, without a learned network, and holds it against what its caption says.

What differs from the background is cut into pieces; each is compared with everything that could have been drawn, sharp
and blurred, a few pixels to each side. So the blur and the small errors of colour of a small network are forgiven; the
constants below say what is not.
"""

import functools
import itertools
from dataclasses import dataclass

import numpy as np
from PIL import Image

from mindalle_jax.errors import UsageError
from scripts.scenes.dataset import (
    BACKGROUNDS,
    BAND,
    COLOURS,
    SHAPES,
    SIZES,
    STRIPES,
    Scene,
    Style,
    background_picture,
    thing_mask,
)

SIDE = 64
"""Pixels: pictures of other sizes are scaled to it first."""
FAR = 45.0
"""Distance in RGB from the background that makes a pixel part of a thing; the least of any colour drawn is 72."""
MIN_PIXELS = 40
"""What is smaller is a speck. The smallest thing drawn, a small star, covers 90."""
MAX_BACKGROUND_ERROR = 50.0
"""Distance in RGB, median of all pixels. Grey and navy, the closest, are 156 apart."""
MAX_COLOUR_ERROR = 80.0
"""Distance in RGB from what would have been drawn, root of the mean square over what a thing covers."""
MAX_SHAPE_ERROR = 0.3
"""Squared difference of what is covered, over what the shape covers."""


@dataclass(frozen=True)
class SeenThing:
    """A piece of a picture. What is like nothing that is drawn is None."""

    shape: str | None
    size: str | None
    colour: str | None
    striped: bool | None
    centre: tuple[int, int]
    """(x, y) in 64ths of the picture's side, from the upper left corner."""
    shape_error: float
    """As MAX_SHAPE_ERROR."""
    colour_error: float
    """As MAX_COLOUR_ERROR."""


@dataclass(frozen=True)
class Reading:
    """What is in a picture."""

    background: str | None
    things: tuple[SeenThing, ...]
    """The largest first."""


@dataclass(frozen=True)
class ThingVerdict:
    """What of a thing is as it should be; nothing, if it is missing."""

    shape: bool = False
    colour: bool = False
    size: bool = False
    striped: bool = False


@dataclass(frozen=True)
class Verdict:
    """What of a picture is as it should be. None is what was not asked for."""

    count: bool
    background: bool | None
    things: tuple[ThingVerdict, ...]
    """In the order of Scene.things."""
    relation: bool | None

    @property
    def all_right(self) -> bool:
        return all(_answers(self))


def judge(picture: np.ndarray, scene: Scene, caption: str | None = None, style: Style = "flat") -> Verdict:
    """compare(read_scene(picture, style), scene, caption)."""
    return compare(read_scene(picture, style), scene, caption)


def compare(reading: Reading, scene: Scene, caption: str | None = None) -> Verdict:
    """Holds what is in a picture against a scene, whose centres do not matter.

    caption: what the picture was drawn from; the background matters only if it is named there, or without a caption.
    Pieces are matched to things so that as much as possible is right.
    """
    background = None
    if caption is None or scene.background in caption.split():
        background = reading.background == scene.background
    count = len(reading.things) == len(scene.things)
    seen: list[SeenThing | None] = [*reading.things[:4], *([None] * len(scene.things))]
    verdicts = (
        Verdict(count, background, things, relation)
        for things, relation in (_match(order, scene) for order in itertools.permutations(seen, len(scene.things)))
    )
    return max(verdicts, key=lambda verdict: sum(_answers(verdict)))


def read_scene(picture: np.ndarray, style: Style = "flat") -> Reading:
    """What is in a picture uint8 or f32-in-[0,1] [H, H, 3] of a style. Raises UsageError for other arrays."""
    image = _to_64(picture)
    names = list(BACKGROUNDS)
    layouts = np.stack([background_picture(name, SIDE, style) for name in names]).astype(np.float32)
    errors = np.median(np.linalg.norm(image - layouts, axis=3).reshape(len(names), -1), axis=1)
    best = int(errors.argmin())
    background = names[best] if errors[best] <= MAX_BACKGROUND_ERROR else None
    behind = _actual_colours(image, layouts[best])
    pieces = _pieces(_distance_to_background(image, behind))
    return Reading(background, tuple(_read_thing(image, behind, piece) for piece in pieces))


def _match(order: tuple[SeenThing | None, ...], scene: Scene) -> tuple[tuple[ThingVerdict, ...], bool | None]:
    """What is right if the pieces are the things of the scene in this order."""
    things = tuple(
        ThingVerdict(
            shape=seen.shape == thing.shape,
            colour=seen.colour == thing.colour,
            size=seen.size == thing.size,
            striped=seen.striped == thing.striped,
        )
        if seen
        else ThingVerdict()
        for seen, thing in zip(order, scene.things, strict=True)
    )
    if scene.relation is None:
        return things, None
    one, other = order
    if one is None or other is None:
        return things, False
    right, down = np.subtract(other.centre, one.centre)
    return things, bool(right > abs(down) if scene.relation == "left of" else down > abs(right))


def _answers(verdict: Verdict) -> list[bool]:
    """All that was asked for."""
    answers = [verdict.count, verdict.background, verdict.relation]
    answers += [right for thing in verdict.things for right in vars(thing).values()]
    return [right for right in answers if right is not None]


def _to_64(picture: np.ndarray) -> np.ndarray:
    """f32[64, 64, 3] in [0, 255]."""
    if picture.ndim != 3 or picture.shape[0] != picture.shape[1] or picture.shape[2] != 3:
        raise UsageError(f"a picture must be [H, H, 3], not {list(picture.shape)}")
    if picture.dtype != np.uint8:
        if not (np.issubdtype(picture.dtype, np.floating) and 0 <= picture.min() and picture.max() <= 1):
            raise UsageError(f"a picture must be uint8, or float in [0, 1], not {picture.dtype} of another range")
        picture = np.rint(picture.astype(np.float32) * 255).astype(np.uint8)
    if len(picture) != SIDE:
        picture = np.asarray(Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BOX))
    return picture.astype(np.float32)


_MAIN, _OTHER = (0, 0), (SIDE // 8, SIDE // 8)
"""Pixels in the background's main colour and, if the style has one, in its other."""


def _actual_colours(image: np.ndarray, layout: np.ndarray) -> np.ndarray:
    """The layout f32[64, 64, 3] in the colours that its parts have in the picture: their medians."""
    behind = layout.copy()
    near = np.linalg.norm(image - layout, axis=2) <= MAX_BACKGROUND_ERROR
    for colour in (layout[_MAIN], layout[_OTHER]):
        part = (layout == colour).all(2)
        if (part & near).any():
            behind[part] = np.median(image[part & near], axis=0)
    return behind


def _distance_to_background(image: np.ndarray, behind: np.ndarray) -> np.ndarray:
    """f32[64, 64]: distance in RGB from the background's colours, and what blur makes between two of them."""
    start = behind[_MAIN]
    step = behind[_OTHER] - start
    along = np.clip((image - start) @ step / max(float(step @ step), 1.0), 0, 1)
    return np.linalg.norm(image - start - along[:, :, None] * step, axis=2)


def _pieces(distance: np.ndarray) -> list[np.ndarray]:
    """bool[64, 64] for each connected piece that is far from the background, the largest first, without specks."""
    far = distance > FAR
    labels = np.where(far, np.arange(1, far.size + 1).reshape(far.shape), 0)
    while True:  # every pixel takes the largest number around it, until each piece has one
        wider = np.pad(labels, 1)
        wider = np.maximum(np.maximum(wider[:-2], wider[1:-1]), wider[2:])
        wider = np.maximum(np.maximum(wider[:, :-2], wider[:, 1:-1]), wider[:, 2:]) * far
        if (wider == labels).all():
            break
        labels = wider
    numbers, sizes = np.unique(labels[far], return_counts=True)
    order = np.argsort(-sizes, kind="stable")
    return [labels == numbers[place] for place in order if sizes[place] >= MIN_PIXELS]


_GOOD_COLOUR_ERROR = 45.0
"""As MAX_COLOUR_ERROR. What damage there is of the kinds in the tests stays below it, and wrong shapes are above."""


def _read_thing(image: np.ndarray, behind: np.ndarray, piece: np.ndarray) -> SeenThing:
    """What fits a piece best. The shape is found with a likely colour, and again if another fits the shape better.

    If that does not fit well, every colour is tried: of a small ring that is very blurred the likely one can be wrong.
    """
    near = _grown(piece, 2)
    likely = _likely_colour(image, piece)
    thing, look = _fit(image, behind, piece, near, likely)
    if look != likely:
        thing, _ = _fit(image, behind, piece, near, look)
    if thing.colour_error <= _GOOD_COLOUR_ERROR:
        return thing
    tried = [_fit(image, behind, piece, near, look)[0] for look in itertools.product(COLOURS, (False, True))]
    return min([thing, *tried], key=lambda thing: thing.colour_error)


def _fit(
    image: np.ndarray, behind: np.ndarray, piece: np.ndarray, near: np.ndarray, look: tuple[str, bool]
) -> tuple[SeenThing, tuple[str, bool]]:
    """The best shape of what has a look (colour, striped), and the best look of this shape."""
    cover = _cover(image, behind, *look) * near
    x, y = _middle(cover > 0.5 if (cover > 0.5).any() else piece)
    shape, size, (dx, dy), shape_error = _read_shape(cover, x, y)
    x, y = x + dx, y + dy
    windows = _window(image, x, y), _window(behind, x, y), _window(near, x, y)
    colour, striped, colour_error = _read_colour(*windows, shape, size)
    known_shape, known_colour = shape_error <= MAX_SHAPE_ERROR, colour_error <= MAX_COLOUR_ERROR
    thing = SeenThing(
        shape=shape if known_shape else None,
        size=size if known_shape else None,
        colour=colour if known_colour else None,
        striped=striped if known_colour else None,
        centre=(x, y),
        shape_error=shape_error,
        colour_error=colour_error,
    )
    return thing, (colour, striped)


def _middle(piece: np.ndarray) -> tuple[int, int]:
    """(x, y) in the middle of the box around a piece."""
    columns, rows = (np.flatnonzero(piece.any(axis)) for axis in (0, 1))
    return round((columns[0] + columns[-1] + 1) / 2), round((rows[0] + rows[-1] + 1) / 2)


def _likely_colour(image: np.ndarray, piece: np.ndarray) -> tuple[str, bool]:
    """(colour, striped) from the rows of a piece alone, before its shape is known."""
    core = ~_grown(~piece, 1)  # without the edge, whose colours are mixed
    if core.sum() < MIN_PIXELS // 2:
        core = piece
    counts = core.sum(1)
    rows = np.flatnonzero(counts)
    means = (image * core[:, :, None]).sum(1)[rows] / counts[rows, None]  # [n, 3]
    main, other = _shades()[:, :, None]  # [colours, 1, 3]
    looks = np.stack(
        [np.broadcast_to(main, (len(main), len(rows), 3))]
        + [np.where(((rows + phase) // BAND % 2)[:, None] == 0, main, other) for phase in range(2 * BAND)]
    )  # [looks, colours, n, 3]
    errors = (np.linalg.norm(looks - means, axis=3) * counts[rows]).sum(2)
    look, colour = np.unravel_index(errors.argmin(), errors.shape)
    return list(COLOURS)[colour], bool(look > 0)


@functools.cache
def _shades() -> np.ndarray:
    """f32[2, colours, 3]: the colours, and that of every other band."""
    return np.array([list(COLOURS.values()), [STRIPES] * len(COLOURS)], np.float32)


def _read_colour(
    image: np.ndarray, behind: np.ndarray, near: np.ndarray, shape: str, size: str
) -> tuple[str, bool, float]:
    """(colour, striped, error) of what, drawn over the background and blurred, is most like a window around a thing.

    Arrays are windows of the picture, the background and the pixels that count, the centre of the thing in the middle.
    """
    best = ("", False, np.inf)
    main, other = _shades()
    lengths = [(main * main).sum(1), (main * other).sum(1), (other * other).sum(1)]  # [colours] each
    weight = near.reshape(-1).astype(np.float32)
    for maps in _band_maps(shape, size):  # [looks, p]: what the other bands cover; that of all bands is the last
        whole = maps[-1]
        # |target - (whole - band) main - band other|^2, multiplied out: sums over pixels come first.
        target = (image - (1 - whole.reshape(near.shape))[:, :, None] * behind).reshape(-1, 3)
        products = (maps * weight) @ maps.T  # [looks, looks]
        squares, with_whole = np.diag(products), products[-1]
        to_target = (maps * weight) @ target  # [looks, 3]
        mixed = [with_whole[-1] - 2 * with_whole + squares, 2 * (with_whole - squares), squares]  # [looks] each
        model = sum(np.outer(length, part) for length, part in zip(lengths, mixed, strict=True))
        match = main @ (to_target[-1] - to_target).T + other @ to_target.T  # [colours, looks]
        total = (target * target).sum(1) @ weight
        errors = (total - 2 * match + model)[:, :-1]  # without "all in the other colour"
        colour, look = np.unravel_index(errors.argmin(), errors.shape)
        error = float(np.sqrt(max(errors[colour, look], 0.0) / with_whole[-1]))
        if error < best[2]:
            best = (list(COLOURS)[colour], bool(look > 0), error)
    return best


def _cover(image: np.ndarray, behind: np.ndarray, colour: str, striped: bool) -> np.ndarray:
    """f32[64, 64] in [0, 1]: how far each pixel is from the background towards the colour of a thing."""
    offset, main = image - behind, np.array(COLOURS[colour], np.float32) - behind
    best, least = _along(offset, main)
    if striped:
        other = np.array(STRIPES, np.float32) - behind
        along, error = _along(offset, other)
        best = np.where(error < least, along, best)
        # Between two bands that are blurred: offset = a main + b other, by the normal equations.
        aa, ab, bb = ((x * y).sum(2) for x, y in ((main, main), (main, other), (other, other)))
        to_a, to_b = (offset * main).sum(2), (offset * other).sum(2)
        a, b = ((p * q - r * ab) / (aa * bb - ab**2) for p, q, r in ((to_a, bb, to_b), (to_b, aa, to_a)))
        best = np.where((a > 0) & (b > 0), np.minimum(a + b, 1), best)
    return best


def _along(offset: np.ndarray, step: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """f32[64, 64]: how far along a step each offset [64, 64, 3] lies, in [0, 1]; its squared distance from there."""
    along = np.clip((offset * step).sum(2) / (step**2).sum(2), 0, 1)
    return along, ((offset - along[:, :, None] * step) ** 2).sum(2)


_HALF = max(SIZES.values()) // 2 + 6
"""Of the window around a thing: its radius, the shifts that are tried, and what is blurred over."""
_SHIFTS = list(itertools.product(range(-2, 3), repeat=2))
_BLURS = (0, 1, 3, 6)
"""How often what is drawn is blurred before it is compared: a blurred star is more like a sharp circle than a star."""


def _window(array: np.ndarray, x: int, y: int) -> np.ndarray:
    """[2 _HALF, 2 _HALF, ...] around a point; zeros outside the picture."""
    edges = [(_HALF, _HALF), (_HALF, _HALF), (0, 0)][: array.ndim]
    return np.pad(array, edges)[y : y + 2 * _HALF, x : x + 2 * _HALF]


@functools.cache
def _blurred_covers(shape: str, size: str, bands: bool) -> list[np.ndarray]:
    """f32[n, 2 _HALF, 2 _HALF] for each of _BLURS: what a thing covers.

    bands: instead nothing, what the second bands cover where they begin at each of 2 BAND rows, and the whole.
    """
    mask = thing_mask(shape, size, SIDE)
    whole = np.pad(mask, _HALF - len(mask) // 2)[None]
    cover = whole
    if bands:
        rows = np.arange(2 * _HALF)[:, None]
        second = [whole * ((rows + phase) // BAND % 2 == 1) for phase in range(2 * BAND)]
        cover = np.concatenate([0 * whole, *second, whole])
    found = []
    for times in range(max(_BLURS) + 1):
        if times in _BLURS:
            found.append(cover.astype(np.float32))
        for axis in (1, 2):  # with weights 1, 2, 1; nothing is at the edge
            cover = (np.roll(cover, 1, axis) + 2 * cover + np.roll(cover, -1, axis)) / 4
    return found


@functools.cache
def _band_maps(shape: str, size: str) -> list[np.ndarray]:
    """f32[2 + 2 BAND, pixels] for each of _BLURS: _blurred_covers with bands."""
    return [covers.reshape(len(covers), -1) for covers in _blurred_covers(shape, size, True)]


@functools.cache
def _templates() -> tuple[list[tuple[str, str, tuple[int, int]]], np.ndarray, np.ndarray]:
    """(shape, size, shift) of each template, f32[n, pixels] what it covers, f32[n] the sum of its squares."""
    names, covers = [], []
    for shape, size, (dx, dy) in itertools.product(SHAPES, SIZES, _SHIFTS):
        for (cover,) in _blurred_covers(shape, size, False):
            names.append((shape, size, (dx, dy)))
            covers.append(np.roll(cover, (dy, dx), (0, 1)).reshape(-1))
    return names, np.stack(covers), (np.stack(covers) ** 2).sum(1)


def _read_shape(cover: np.ndarray, x: int, y: int) -> tuple[str, str, tuple[int, int], float]:
    """(shape, size, (dx, dy) from (x, y) to its centre, error) of the most similar template."""
    names, covers, squares = _templates()
    window = _window(cover, x, y).reshape(-1)
    errors = (window @ window - 2 * covers @ window + squares) / squares
    best = int(errors.argmin())
    return *names[best], float(errors[best])


def _grown(piece: np.ndarray, pixels: int) -> np.ndarray:
    """bool[64, 64]: the piece and what is at most so far from it in both directions."""
    for _ in range(pixels):
        wide = np.pad(piece, 1)
        wide = wide[:-2] | wide[1:-1] | wide[2:]
        piece = wide[:, :-2] | wide[:, 1:-1] | wide[:, 2:]
    return piece
