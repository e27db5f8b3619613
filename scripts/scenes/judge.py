"""Reads an image of scenes/dataset.py back, without a learned network, and compares it with its caption.

The parts that differ from the background are cut into pieces. Each piece is compared with every thing that the
generator could render, sharp and blurred, and shifted by a few pixels. So the blur and the small errors of color of a
small network are forgiven. The constants below say how much.
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
    COLORS,
    SHAPES,
    SIZES,
    STRIPES,
    Scene,
    Style,
    background_image,
    thing_mask,
)

SIDE = 64
"""Height and width in pixels; images of other sizes are scaled to it first."""
FAR = 45.0
"""Distance in RGB from the background that makes a pixel part of a thing; the least of any rendered color is 72."""
MIN_PIXELS = 40
"""A smaller piece is a speck. The smallest rendered thing, a small star, covers 90."""
MAX_BACKGROUND_ERROR = 50.0
"""Distance in RGB, median of all pixels. Grey and navy, the closest, are 156 apart."""
MAX_COLOR_ERROR = 80.0
"""Distance in RGB from the rendered thing: root of the mean square over the pixels that the thing covers."""
MAX_SHAPE_ERROR = 0.3
"""Squared difference of the covered pixels, divided by the pixels that the shape covers."""


@dataclass(frozen=True)
class SeenThing:
    """A piece of an image. An attribute is None if it is like none that the generator renders."""

    shape: str | None
    size: str | None
    colour: str | None
    striped: bool | None
    center: tuple[int, int]
    """(x, y) in 64ths of the side of the image, from the upper left corner."""
    shape_error: float
    """As MAX_SHAPE_ERROR."""
    color_error: float
    """As MAX_COLOR_ERROR."""


@dataclass(frozen=True)
class Reading:
    """The background and the things of an image, as the judge reads them."""

    background: str | None
    things: tuple[SeenThing, ...]
    """The largest first."""


@dataclass(frozen=True)
class ThingVerdict:
    """Whether each attribute of a thing is right; all are False if it is missing."""

    shape: bool = False
    colour: bool = False
    size: bool = False
    striped: bool = False


@dataclass(frozen=True)
class Verdict:
    """Whether each part of an image is right; None if the caption does not ask for it."""

    count: bool
    background: bool | None
    things: tuple[ThingVerdict, ...]
    """In the order of Scene.things."""
    relation: bool | None

    @property
    def all_right(self) -> bool:
        return all(_answers(self))


def judge(image: np.ndarray, scene: Scene, caption: str | None = None, style: Style = "flat") -> Verdict:
    """Reads an image and compares it with a scene: compare(read_scene(image, style), scene, caption)."""
    return compare(read_scene(image, style), scene, caption)


def compare(reading: Reading, scene: Scene, caption: str | None = None) -> Verdict:
    """Compares the reading of an image with a scene, whose centers do not matter.

    caption: the prompt of the image; the background matters only if the caption names it, or if there is no caption.
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


def read_scene(image: np.ndarray, style: Style = "flat") -> Reading:
    """Reads an image [H, H, 3] of a style, uint8 or f32 in [0, 1]. Raises UsageError for other arrays."""
    image = _to_64(image)
    names = list(BACKGROUNDS)
    layouts = np.stack([background_image(name, SIDE, style) for name in names]).astype(np.float32)
    errors = np.median(np.linalg.norm(image - layouts, axis=3).reshape(len(names), -1), axis=1)
    best = int(errors.argmin())
    background = names[best] if errors[best] <= MAX_BACKGROUND_ERROR else None
    behind = _actual_colors(image, layouts[best])
    pieces = _pieces(_distance_to_background(image, behind))
    return Reading(background, tuple(_read_thing(image, behind, piece) for piece in pieces))


def _match(order: tuple[SeenThing | None, ...], scene: Scene) -> tuple[tuple[ThingVerdict, ...], bool | None]:
    """The verdicts and the relation if the pieces, in this order, are the things of the scene."""
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
    right, down = np.subtract(other.center, one.center)
    return things, bool(right > abs(down) if scene.relation == "left of" else down > abs(right))


def _answers(verdict: Verdict) -> list[bool]:
    """All parts of a verdict that the caption asks for."""
    answers = [verdict.count, verdict.background, verdict.relation]
    answers += [right for thing in verdict.things for right in vars(thing).values()]
    return [right for right in answers if right is not None]


def _to_64(image: np.ndarray) -> np.ndarray:
    """f32[64, 64, 3] in [0, 255]."""
    if image.ndim != 3 or image.shape[0] != image.shape[1] or image.shape[2] != 3:
        raise UsageError(f"an image must be [H, H, 3], not {list(image.shape)}")
    if image.dtype != np.uint8:
        if not (np.issubdtype(image.dtype, np.floating) and 0 <= image.min() and image.max() <= 1):
            raise UsageError(f"an image must be uint8, or float in [0, 1], not {image.dtype} of another range")
        image = np.rint(image.astype(np.float32) * 255).astype(np.uint8)
    if len(image) != SIDE:
        image = np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BOX))
    return image.astype(np.float32)


_MAIN, _OTHER = (0, 0), (SIDE // 8, SIDE // 8)
"""Pixels in the main color of the background and, if the style has one, in its other color."""


def _actual_colors(image: np.ndarray, layout: np.ndarray) -> np.ndarray:
    """The layout f32[64, 64, 3] with the median colors that its parts have in the image."""
    behind = layout.copy()
    near = np.linalg.norm(image - layout, axis=2) <= MAX_BACKGROUND_ERROR
    for color in (layout[_MAIN], layout[_OTHER]):
        part = (layout == color).all(2)
        if (part & near).any():
            behind[part] = np.median(image[part & near], axis=0)
    return behind


def _distance_to_background(image: np.ndarray, behind: np.ndarray) -> np.ndarray:
    """f32[64, 64]: distance in RGB from the colors of the background, and from blurred mixtures of its two colors."""
    start = behind[_MAIN]
    step = behind[_OTHER] - start
    along = np.clip((image - start) @ step / max(float(step @ step), 1.0), 0, 1)
    return np.linalg.norm(image - start - along[:, :, None] * step, axis=2)


def _pieces(distance: np.ndarray) -> list[np.ndarray]:
    """bool[64, 64] for each connected piece that is far from the background, the largest first, without specks."""
    far = distance > FAR
    labels = np.where(far, np.arange(1, far.size + 1).reshape(far.shape), 0)
    while True:  # every pixel takes the largest number around it, until each piece has one number
        wider = np.pad(labels, 1)
        wider = np.maximum(np.maximum(wider[:-2], wider[1:-1]), wider[2:])
        wider = np.maximum(np.maximum(wider[:, :-2], wider[:, 1:-1]), wider[:, 2:]) * far
        if (wider == labels).all():
            break
        labels = wider
    numbers, sizes = np.unique(labels[far], return_counts=True)
    order = np.argsort(-sizes, kind="stable")
    return [labels == numbers[place] for place in order if sizes[place] >= MIN_PIXELS]


_GOOD_COLOR_ERROR = 45.0
"""As MAX_COLOR_ERROR. Damage of the kinds in the tests stays below it, and wrong shapes are above it."""


def _read_thing(image: np.ndarray, behind: np.ndarray, piece: np.ndarray) -> SeenThing:
    """The thing that fits a piece best.

    The shape is found with a likely color, and again if another color fits the shape better. If the result does not
    fit well, every color is tried: for a very blurred small ring the likely color can be wrong.
    """
    near = _grown(piece, 2)
    likely = _likely_color(image, piece)
    thing, look = _fit(image, behind, piece, near, likely)
    if look != likely:
        thing, _ = _fit(image, behind, piece, near, look)
    if thing.color_error <= _GOOD_COLOR_ERROR:
        return thing
    tried = [_fit(image, behind, piece, near, look)[0] for look in itertools.product(COLORS, (False, True))]
    return min([thing, *tried], key=lambda thing: thing.color_error)


def _fit(
    image: np.ndarray, behind: np.ndarray, piece: np.ndarray, near: np.ndarray, look: tuple[str, bool]
) -> tuple[SeenThing, tuple[str, bool]]:
    """The best shape for a look (color, striped), and the best look for this shape."""
    cover = _cover(image, behind, *look) * near
    x, y = _middle(cover > 0.5 if (cover > 0.5).any() else piece)
    shape, size, (dx, dy), shape_error = _read_shape(cover, x, y)
    x, y = x + dx, y + dy
    windows = _window(image, x, y), _window(behind, x, y), _window(near, x, y)
    color, striped, color_error = _read_color(*windows, shape, size)
    known_shape, known_color = shape_error <= MAX_SHAPE_ERROR, color_error <= MAX_COLOR_ERROR
    thing = SeenThing(
        shape=shape if known_shape else None,
        size=size if known_shape else None,
        colour=color if known_color else None,
        striped=striped if known_color else None,
        center=(x, y),
        shape_error=shape_error,
        color_error=color_error,
    )
    return thing, (color, striped)


def _middle(piece: np.ndarray) -> tuple[int, int]:
    """(x, y) in the middle of the box around a piece."""
    columns, rows = (np.flatnonzero(piece.any(axis)) for axis in (0, 1))
    return round((columns[0] + columns[-1] + 1) / 2), round((rows[0] + rows[-1] + 1) / 2)


def _likely_color(image: np.ndarray, piece: np.ndarray) -> tuple[str, bool]:
    """(color, striped) from the rows of a piece alone, before its shape is known."""
    core = ~_grown(~piece, 1)  # without the edge, whose colors are mixed
    if core.sum() < MIN_PIXELS // 2:
        core = piece
    counts = core.sum(1)
    rows = np.flatnonzero(counts)
    means = (image * core[:, :, None]).sum(1)[rows] / counts[rows, None]  # [n, 3]
    main, other = _shades()[:, :, None]  # [colors, 1, 3]
    looks = np.stack(
        [np.broadcast_to(main, (len(main), len(rows), 3))]
        + [np.where(((rows + phase) // BAND % 2)[:, None] == 0, main, other) for phase in range(2 * BAND)]
    )  # [looks, colors, n, 3]
    errors = (np.linalg.norm(looks - means, axis=3) * counts[rows]).sum(2)
    look, color = np.unravel_index(errors.argmin(), errors.shape)
    return list(COLORS)[color], bool(look > 0)


@functools.cache
def _shades() -> np.ndarray:
    """f32[2, colors, 3]: the colors, and the color of every other band."""
    return np.array([list(COLORS.values()), [STRIPES] * len(COLORS)], np.float32)


def _read_color(
    image: np.ndarray, behind: np.ndarray, near: np.ndarray, shape: str, size: str
) -> tuple[str, bool, float]:
    """(color, striped, error) of the look that, rendered on the background and blurred, is most like a window.

    Arrays are windows of the image, the background and the pixels that count, with the center of the thing in the
    middle.
    """
    best = ("", False, np.inf)
    main, other = _shades()
    lengths = [(main * main).sum(1), (main * other).sum(1), (other * other).sum(1)]  # [colors] each
    weight = near.reshape(-1).astype(np.float32)
    for maps in _band_maps(shape, size):  # [looks, p]: pixels that the other bands cover; the last look is all bands
        full = maps[-1]
        # |target - (full - band) main - band other|^2, multiplied out: sums over pixels come first.
        target = (image - (1 - full.reshape(near.shape))[:, :, None] * behind).reshape(-1, 3)
        products = (maps * weight) @ maps.T  # [looks, looks]
        squares, with_full = np.diag(products), products[-1]
        to_target = (maps * weight) @ target  # [looks, 3]
        mixed = [with_full[-1] - 2 * with_full + squares, 2 * (with_full - squares), squares]  # [looks] each
        model = sum(np.outer(length, part) for length, part in zip(lengths, mixed, strict=True))
        match = main @ (to_target[-1] - to_target).T + other @ to_target.T  # [colors, looks]
        total = (target * target).sum(1) @ weight
        errors = (total - 2 * match + model)[:, :-1]  # without "all in the other color"
        color, look = np.unravel_index(errors.argmin(), errors.shape)
        error = float(np.sqrt(max(errors[color, look], 0.0) / with_full[-1]))
        if error < best[2]:
            best = (list(COLORS)[color], bool(look > 0), error)
    return best


def _cover(image: np.ndarray, behind: np.ndarray, color: str, striped: bool) -> np.ndarray:
    """f32[64, 64] in [0, 1]: how far each pixel is from the background towards the color of a thing."""
    offset, main = image - behind, np.array(COLORS[color], np.float32) - behind
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
"""Half the side of the window around a thing: its radius, and a margin for the tried shifts and the blur."""
_SHIFTS = list(itertools.product(range(-2, 3), repeat=2))
_BLURS = (0, 1, 3, 6)
"""How often a template is blurred before it is compared: a blurred star is more like a sharp circle than a star."""


def _window(array: np.ndarray, x: int, y: int) -> np.ndarray:
    """[2 _HALF, 2 _HALF, ...] around a point; zeros outside the image."""
    edges = [(_HALF, _HALF), (_HALF, _HALF), (0, 0)][: array.ndim]
    return np.pad(array, edges)[y : y + 2 * _HALF, x : x + 2 * _HALF]


@functools.cache
def _blurred_covers(shape: str, size: str, bands: bool) -> list[np.ndarray]:
    """f32[n, 2 _HALF, 2 _HALF] for each of _BLURS: the pixels that a thing covers, n = 1.

    bands: n = 2 + 2 BAND: no pixels, the pixels of the second bands for each of 2 BAND first rows, and all pixels.
    """
    mask = thing_mask(shape, size, SIDE)
    full = np.pad(mask, _HALF - len(mask) // 2)[None]
    cover = full
    if bands:
        rows = np.arange(2 * _HALF)[:, None]
        second = [full * ((rows + phase) // BAND % 2 == 1) for phase in range(2 * BAND)]
        cover = np.concatenate([0 * full, *second, full])
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
    """(shape, size, shift) of each template, f32[n, pixels] its cover, f32[n] the sum of the squares of its cover."""
    names, covers = [], []
    for shape, size, (dx, dy) in itertools.product(SHAPES, SIZES, _SHIFTS):
        for (cover,) in _blurred_covers(shape, size, False):
            names.append((shape, size, (dx, dy)))
            covers.append(np.roll(cover, (dy, dx), (0, 1)).reshape(-1))
    return names, np.stack(covers), (np.stack(covers) ** 2).sum(1)


def _read_shape(cover: np.ndarray, x: int, y: int) -> tuple[str, str, tuple[int, int], float]:
    """(shape, size, (dx, dy) from (x, y) to its center, error) of the most similar template."""
    names, covers, squares = _templates()
    window = _window(cover, x, y).reshape(-1)
    errors = (window @ window - 2 * covers @ window + squares) / squares
    best = int(errors.argmin())
    return *names[best], float(errors[best])


def _grown(piece: np.ndarray, pixels: int) -> np.ndarray:
    """bool[64, 64]: the piece, and the pixels that are at most this far from it in both directions."""
    for _ in range(pixels):
        wide = np.pad(piece, 1)
        wide = wide[:-2] | wide[1:-1] | wide[2:]
        piece = wide[:, :-2] | wide[:, 1:-1] | wide[:, 2:]
    return piece
