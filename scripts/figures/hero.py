"""Samples the images of the README: a sheet of emoji, and an animation of the rows of codes as they are sampled.

    python -m scripts.figures.hero --out docs/images

hero.png has one image for each of 40 prompts: the ranker's best of 16, none picked by hand. rows.gif has the first
candidate of eight of these prompts, one row of codes per frame. Both are samples of `demo` on CPU with a fixed seed.
On two cores they take about a minute and a half. The last bits of the pixels depend on the machine.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mindalle_jax.cli import run_reporting
from mindalle_jax.cli.parser import HelpFormatter, path
from mindalle_jax.pipeline import Dalle
from mindalle_jax.sampling.result import Generation
from scripts.figures.svg import NOT_SAMPLED

PROMPTS = (
    "a parrot, 3d style", "a strawberry, flat style", "a rocket, noto style on sky", "a fox, 3d style",
    "a cactus, noto style", "a hamburger, 3d style on sand", "an octopus, flat style", "a guitar, 3d style",
    "a sunflower, noto style on grey", "a penguin, flat style",
    "a pizza, noto style", "an owl, 3d style on sand", "a sailboat, flat style", "a unicorn, noto style",
    "a cupcake, 3d style on sky", "a robot, noto style", "a butterfly, 3d style", "a volcano, flat style on grey",
    "a watermelon, 3d style", "a tiger, noto style on sky",
    "a whale, 3d style on sand", "an avocado, flat style", "a helicopter, 3d style", "a rose, noto style on sky",
    "a koala, 3d style", "a violin, flat style", "a ladybug, 3d style on grey", "a castle, noto style",
    "a pineapple, flat style", "a flamingo, 3d style",
    "a doughnut, 3d style", "a turtle, noto style", "a camera, flat style on sky", "a dragon, 3d style",
    "a tulip, flat style on sand", "a bicycle, noto style", "a peacock, 3d style", "a lemon, 3d style on grey",
    "a ghost, noto style", "a rainbow, flat style",
)  # fmt: skip
"""Chosen before any of them was sampled."""
ANIMATED = 8
"""The first of PROMPTS, which rows.gif shows."""
BEST_OF, SEED = 16, 0
COLUMNS, AT_ONCE = 10, 10
ENLARGED, GAP, RADIUS = 128, 8, 12
"""Pixels of an image on the sheet, between two of them, and of their rounded corners."""
GIF_COLUMNS, GIF_SCALE, LABEL = 4, 3, 26
FRAME_MS, PAUSE_MS = 110, 2000
TEXT_COLOR = (70, 70, 70)
NEARLY_WHITE = 250
"""A pixel whose channels are all at least this needs no color of its own in the animation."""


def sample_best(model: Dalle, prompts: Sequence[str], best_of: int = BEST_OF, seed: int = SEED) -> np.ndarray:
    """uint8[P, H, W, 3]: of each prompt the candidate that the ranker puts first."""
    best = []
    for at in range(0, len(prompts), AT_ONCE):
        found = model.generate(prompts[at : at + AT_ONCE], num_candidates=best_of, seed=seed, mixed_batches=True)
        best += [one.images[one.order[0]] for one in found]
    return np.stack(best)


def make_sheet(images: np.ndarray, columns: int = COLUMNS) -> Image.Image:
    """RGBA: the images uint8[n, H, W, 3] in rows, enlarged, with round corners and transparent gaps.

    The gaps show the page behind, be it light or dark.
    """
    rows, cell = -(-len(images) // columns), ENLARGED + GAP
    sheet = Image.new("RGBA", (columns * cell - GAP, rows * cell - GAP))
    corners = Image.new("L", (4 * ENLARGED, 4 * ENLARGED))
    ImageDraw.Draw(corners).rounded_rectangle((0, 0, 4 * ENLARGED - 1, 4 * ENLARGED - 1), 4 * RADIUS, fill=255)
    corners = corners.resize((ENLARGED, ENLARGED), Image.Resampling.LANCZOS)
    for number, pixels in enumerate(images):
        image = Image.fromarray(pixels).resize((ENLARGED, ENLARGED), Image.Resampling.LANCZOS)
        image.putalpha(corners)
        sheet.paste(image, (number % columns * cell, number // columns * cell))
    return sheet


def stream_rows(model: Dalle, prompts: Sequence[str], seed: int = SEED) -> Iterator[Generation]:
    """Yields one candidate per prompt after each row of codes; the last one is finished."""
    every = model.code_size
    yield from model.stream(prompts, every=every, num_candidates=1, seed=seed, mixed_batches=True, ranker=None)


def make_frame(images: np.ndarray, codes: np.ndarray, prompts: Sequence[str]) -> Image.Image:
    """RGB: images uint8[n, H, W, 3] with their prompts below them. Patches whose code is -1 are grey.

    codes: int32[n, h * w].
    """
    (count, size), side = images.shape[:2], round(codes.shape[1] ** 0.5)
    shown = size * GIF_SCALE
    cell_width, cell_height = shown + 2 * GAP, shown + LABEL + GAP
    columns = min(count, GIF_COLUMNS)
    frame = Image.new("RGB", (columns * cell_width, -(-count // columns) * cell_height + GAP), "white")
    pen, font = ImageDraw.Draw(frame), ImageFont.load_default(14)
    for number, prompt in enumerate(prompts):
        x, y = number % columns * cell_width + GAP, number // columns * cell_height + GAP
        image = Image.fromarray(images[number]).resize((shown, shown), Image.Resampling.LANCZOS)
        missing = np.kron(codes[number].reshape(side, side) < 0, np.ones((shown // side,) * 2, bool))
        image.paste(NOT_SAMPLED, mask=Image.fromarray(missing))
        frame.paste(image, (x, y))
        pen.text((x + shown // 2, y + shown + LABEL // 2), prompt, fill=TEXT_COLOR, font=font, anchor="mm")
    return frame


def make_frames(rows: Iterable[Generation], prompts: Sequence[str]) -> list[Image.Image]:
    """The frames of rows.gif: nothing sampled, then one more row of codes in each. rows: of stream_rows."""
    frames = []
    for generation in rows:
        images, codes = generation.images[:, 0], generation.codes[:, 0]
        if not frames:
            frames.append(make_frame(images, np.full_like(codes, -1), prompts))
        frames.append(make_frame(images, codes, prompts))
    return frames


def nearest_colors(frame: Image.Image, palette: np.ndarray) -> Image.Image:
    """The frame with each pixel as the nearest color of the palette int[up to 256, 3].

    Pillow's own search looks at rounded colors, and so white would not stay white.
    """
    colors, places = np.unique(np.asarray(frame).reshape(-1, 3), axis=0, return_inverse=True)
    colors = colors.astype(np.int64)
    distances = (palette**2).sum(1) - 2 * colors @ palette.T
    indices = distances.argmin(1).astype(np.uint8)[places.reshape(-1)]
    image = Image.fromarray(indices.reshape(frame.height, frame.width), "P")
    image.putpalette(palette.astype(np.uint8).tobytes())
    return image


def write_gif(frames: Sequence[Image.Image], file: Path) -> None:
    """Writes an animation that loops, and pauses at its last frame.

    All frames have the colors of the last one, and white and the grey exactly. There is no dither, so that what is
    sampled stands still.
    """
    pixels = np.asarray(frames[-1]).reshape(-1, 3)
    colored = pixels[pixels.min(1) < NEARLY_WHITE][None]
    found = Image.fromarray(colored).quantize(256 - 2, Image.Quantize.MEDIANCUT, kmeans=2).getpalette() or []
    palette = np.array([255, 255, 255, *NOT_SAMPLED, *found]).reshape(-1, 3)
    first, *others = [nearest_colors(frame, palette) for frame in frames]
    durations = [FRAME_MS] * len(others) + [PAUSE_MS]
    first.save(file, save_all=True, append_images=others, duration=durations, loop=0, optimize=False)


def main(arguments: argparse.Namespace) -> None:
    """Samples and writes both files."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    model = Dalle.from_pretrained("demo")
    sheet = make_sheet(sample_best(model, PROMPTS, seed=arguments.seed))
    sheet.save(arguments.out / "hero.png", optimize=True)
    animated = PROMPTS[:ANIMATED]
    write_gif(make_frames(stream_rows(model, animated, arguments.seed), animated), arguments.out / "rows.gif")
    for name in ("hero.png", "rows.gif"):
        print(f"{arguments.out / name}: {(arguments.out / name).stat().st_size:,} bytes")


def parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--out", type=path, default=Path("docs/images"), metavar="DIR",
                        help="folder for hero.png and rows.gif")  # fmt: skip
    parser.add_argument("--seed", type=int, default=SEED, metavar="N", help="seed of all samples")
    return parser


if __name__ == "__main__":
    sys.exit(run_reporting("hero.py", lambda: main(parser().parse_args())))
