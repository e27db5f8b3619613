"""Makes the four figures of docs/how-it-works.md from a real run of `demo`: tokens, codes, cache, ranking.

    python -m scripts.figures.stages --out docs/images

All four show one prompt with one seed, sampled on CPU: stage-tokens.svg, stage-codes.svg, stage-cache.svg and
stage-ranking.svg. The last bits of the pixels depend on the machine.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mindalle_jax.cli import run_reporting
from mindalle_jax.cli.parser import HelpFormatter, path
from mindalle_jax.pipeline import Dalle
from mindalle_jax.text.tokenizer import VOCAB_FILE
from scripts.figures import svg

PROMPT, RARE, SEED, CANDIDATES = "a red apple", "a spaceship", 0, 16
"""RARE is a prompt with a word that is not in the vocabulary as a whole."""
SHOWN_STEP = (6, 9)
"""Row and column of the code that stage-cache.svg shows being fed."""
WINDOW = 4
"""Codes at a side of the part of an image that stage-codes.svg enlarges."""
WIDE = svg.WIDTH - 2 * svg.PAD


class Tokens(NamedTuple):
    """A prompt as the transformer reads it."""

    prompt: str
    texts: list[str]
    """The tokens before padding, without the mark at the end of a word."""
    ids: list[int]
    """All N ids, with those of padding."""


class Run(NamedTuple):
    """The results of one run of a model; n candidates, best first."""

    tokens: Tokens
    rare: Tokens
    images: np.ndarray
    """uint8[n, H, W, 3]"""
    codes: np.ndarray
    """int32[n, h, w]"""
    scores: np.ndarray
    """f32[n]"""
    again: np.ndarray
    """uint8[H, W, 3]: the best image, encoded and decoded"""
    again_codes: np.ndarray
    """int32[h, w]: its codes by the encoder"""
    partial: np.ndarray
    """uint8[H, W, 3]: the best candidate after the rows above SHOWN_STEP, grey below"""


def tokenize(model: Dalle, prompt: str) -> Tokens:
    """The tokens of a prompt, as text and as ids."""
    ids = model.tokenize(prompt)[0].tolist()
    assert model.folder is not None
    vocabulary = json.loads((model.folder / "tokenizer" / VOCAB_FILE).read_text(encoding="utf-8"))
    names = {number: token for token, number in vocabulary.items()}
    count = sum(number != model.tokenizer.pad_id for number in ids)
    return Tokens(prompt, [names[n].removesuffix("</w>") for n in ids[:count]], ids)


def run_model(model: Dalle, prompt: str = PROMPT, candidates: int = CANDIDATES, seed: int = SEED) -> Run:
    """Samples, ranks, encodes and decodes."""
    side, row = model.code_size, SHOWN_STEP[0]
    previews = list(model.stream(prompt, every=side, num_candidates=candidates, seed=seed))
    done, before = previews[-1], previews[row - 1]
    best = done.order[0]
    partial = before.images[best].copy()
    partial[row * len(partial) // side :] = svg.NOT_SAMPLED
    again_codes = model.encode_images(done.images[best])[0]
    return Run(
        tokens=tokenize(model, prompt),
        rare=tokenize(model, RARE),
        images=done.images[done.order],
        codes=done.codes[done.order].reshape(candidates, side, side),
        scores=np.asarray(done.scores)[done.order],
        again=(model.decode_codes(again_codes[None])[0] * 255 + 0.5).astype(np.uint8),
        again_codes=again_codes,
        partial=partial,
    )


def colors_of_codes(codes: np.ndarray) -> np.ndarray:
    """uint8[..., 3]: a light color for each code, so that equal codes look equal. The most frequent code is grey."""
    hue = (codes * 0.618034) % 1
    wave = np.cos(2 * np.pi * (hue[..., None] - np.array([0, 1, 2]) / 3))
    colors = np.where((codes == np.bincount(codes.ravel()).argmax())[..., None], 212, 196 + 48 * wave)
    return colors.round().astype(np.uint8)


def draw_tokens(tokens: Tokens, rare: Tokens) -> str:
    """The prompt, its tokens with their ids, padding, and a rare word in pieces."""
    columns, height, gap = 8, 54, 6
    cell = (WIDE + gap) / columns
    boxes = list(zip(tokens.texts + ["[PAD]"] * (len(tokens.ids) - len(tokens.texts)), tokens.ids, strict=True))
    head = svg.head("1. A prompt becomes tokens", f"Each token has a number. This model takes {len(boxes)}.")

    def draw_boxes(boxes: Sequence[tuple[str, int]], filled: int, top: float) -> list[str]:
        parts = []
        for number, (text, token) in enumerate(boxes):
            x, y = svg.PAD + number % columns * cell, top + number // columns * (height + gap)
            kind = "text" if number < filled else "empty"
            parts.append(svg.rect(x, y, cell - gap, height, kind, radius=5))
            middle = x + (cell - gap) / 2
            parts.append(svg.text(middle, y + 23, text, "strong on" if number < filled else "note", "middle"))
            parts.append(svg.text(middle, y + 44, str(token), "on" if number < filled else "note", "middle"))
        return parts

    y = svg.BODY_Y + 22
    parts = [*head, svg.text(svg.PAD, y, f"“{tokens.prompt}”", "strong")]
    parts += draw_boxes(boxes, len(tokens.texts), y + 14)
    y += 14 + -(-len(boxes) // columns) * (height + gap) + 36
    parts.append(svg.text(svg.PAD, y, f"“{rare.prompt}”: a rare word becomes several tokens", "strong"))
    count = len(rare.texts)
    parts += draw_boxes(list(zip(rare.texts, rare.ids[:count], strict=True)), count, y + 14)
    return svg.figure(svg.WIDTH, y + 14 + height + 24, "A prompt, its tokens with their ids, and padding", parts)


def busy_part(codes: np.ndarray) -> tuple[slice, slice]:
    """The WINDOW of rows and columns with the most different codes."""
    steps = range(len(codes) - WINDOW + 1)
    parts = [(slice(y, y + WINDOW), slice(x, x + WINDOW)) for y in steps for x in steps]
    return max(parts, key=lambda part: len(np.unique(codes[part])))


def draw_codes(image: np.ndarray, codes: np.ndarray, again: np.ndarray) -> str:
    """An image, its codes, and the image that they give; below, the same part of each, enlarged."""
    gap, patch, part = 40, len(image) // len(codes), busy_part(codes)
    panel, pixels = (WIDE - 2 * gap) / 3, tuple(slice(at.start * patch, at.stop * patch) for at in part)
    cell, size = panel / WINDOW, f"{patch} x {patch} pixels"
    patches = image[pixels].reshape(WINDOW, patch, WINDOW, patch, 3)
    marked = divmod(int(patches.std((1, 3)).sum(-1).argmax()), WINDOW)
    head = ("2. Codes stand for patches", f"The VQGAN turns an image into {len(codes)} x {len(codes)} codes, and back.")
    parts, top = svg.head(*head), svg.BODY_Y + 26
    below, wide = top + panel + 34, WINDOW / len(codes) * panel
    colors = colors_of_codes(codes)
    columns = [
        ("image", image, image[pixels], size),
        ("codes", colors, colors[part], f"code {codes[part][marked]}"),
        ("decoded", again, again[pixels], size),
    ]
    for number, (name, full, zoomed, caption) in enumerate(columns):
        x = svg.PAD + number * (panel + gap)
        parts.append(svg.text(x + panel / 2, top - 10, name, "strong", "middle"))
        parts += [svg.image(x, top, panel, panel, full), svg.image(x, below, panel, panel, zoomed)]
        left, y = x + part[1].start / len(codes) * panel, top + part[0].start / len(codes) * panel
        parts += [svg.rect(left, y, wide, wide, "mark"), svg.rect(x, below, panel, panel, "thin")]
        parts.append(svg.line(left, y + wide, x, below, "thin"))
        parts.append(svg.line(left + wide, y + wide, x + panel, below, "thin"))
        if name == "codes":
            for row, column in np.ndindex(WINDOW, WINDOW):
                middle = x + (column + 0.5) * cell, below + (row + 0.5) * cell + 6
                parts.append(svg.text(*middle, str(codes[part][row, column]), "on", "middle"))
        parts.append(svg.rect(x + marked[1] * cell, below + marked[0] * cell, cell, cell, "mark"))
        parts.append(svg.text(x + panel / 2, below + panel + 24, caption, "note", "middle"))
        if number:
            parts.append(svg.arrow(x - gap + 8, x - 8, top + panel / 2))
    return svg.figure(svg.WIDTH, below + panel + 44, "An image, its codes, and the image made from them", parts)


def draw_cache(tokens: Tokens, codes: np.ndarray, partial: np.ndarray) -> str:
    """The positions that one step reads: the text, the codes so far, and the code that it predicts."""
    (row, column), side, length = SHOWN_STEP, len(codes), len(tokens.ids)
    cell, left, top = 20, 96, svg.BODY_Y + 12
    fed = row * side + column
    parts = svg.head(
        "3. A step reads what is kept", f"{side} calls of {side} steps. A step reads keys and values of filled cells."
    )
    grid, colors = top + cell + 16, colors_of_codes(codes)
    for number in range(length):
        parts.append(svg.rect(left + number * cell, top, cell - 2, cell - 2, "text", radius=2))
    parts.append(svg.text(left - 8, top + 15, "prompt", "note", "end"))
    for number in range(side * side):
        x, y = left + number % side * cell, grid + number // side * cell
        color = "#{:02x}{:02x}{:02x}".format(*colors[number // side, number % side]) if number <= fed else ""
        parts.append(svg.rect(x, y, cell - 2, cell - 2, "" if color else "empty", radius=2, color=color))
        if number in (fed, fed + 1):
            kind = "mark" if number == fed else "next"
            parts.append(svg.rect(x, y, cell - 2, cell - 2, kind, radius=2))
    for number in (0, row, side - 1):
        parts.append(svg.text(left - 8, grid + number * cell + 14, f"call {number + 1}", "note", "end"))
    x, size = left + side * cell + 20, 18
    legend = [
        ("text", "prompt: computed once (prefill)"),
        ("codes", f"codes 0 to {fed - 1}: kept from steps before"),
        ("mark", f"code {fed}: goes in"),
        ("next", f"code {fed + 1}: comes out"),
        ("empty", "not sampled yet"),
    ]
    y = top
    for kind, label in legend:
        if kind == "codes":
            parts.append(svg.image(x, y, size, size, colors[row - 2 : row, 6:8]))
        else:
            parts.append(svg.rect(x + 1, y + 1, size - 2, size - 2, kind, radius=2))
        lines = svg.notes(y + 14, label, 20, x + size + 8)
        parts += lines
        y += len(lines) * svg.NOTE_LINE + 8
    shown = grid + side * cell - 2 - y - 34
    parts.append(svg.text(x, y + 22, f"after {row} calls:", "note"))
    parts.append(svg.image(x, y + 34, shown, shown, partial))
    return svg.figure(svg.WIDTH, grid + side * cell + svg.PAD, "The positions that one step of sampling reads", parts)


def draw_ranking(prompt: str, images: np.ndarray, scores: np.ndarray) -> str:
    """All candidates from best to worst, with their scores."""
    columns, gap, label = 8, 6, 30
    cell, top = (WIDE + gap) / columns, svg.BODY_Y
    shown = cell - gap
    parts = svg.head(
        "4. The ranker orders the candidates", f"CLIP scores of {len(images)} images of “{prompt}”, best first."
    )
    for number, (image, score) in enumerate(zip(images, scores, strict=True)):
        x, y = svg.PAD + number % columns * cell, top + number // columns * (cell + label)
        parts.append(svg.image(x, y, shown, shown, image))
        if number == 0:
            parts.append(svg.rect(x, y, shown, shown, "mark"))
        kind = "strong" if number == 0 else ""
        parts.append(svg.text(x + shown / 2, y + shown + 20, f"{score:.2f}", kind, "middle"))
    rows = -(-len(images) // columns)
    return svg.figure(svg.WIDTH, top + rows * (cell + label) + 8, "Candidates in the order of their scores", parts)


def draw_stages(run: Run) -> dict[str, str]:
    """File name -> SVG."""
    return {
        "stage-tokens.svg": draw_tokens(run.tokens, run.rare),
        "stage-codes.svg": draw_codes(run.images[0], run.again_codes, run.again),
        "stage-cache.svg": draw_cache(run.tokens, run.codes[0], run.partial),
        "stage-ranking.svg": draw_ranking(run.tokens.prompt, run.images, run.scores),
    }


def main(arguments: argparse.Namespace) -> None:
    """Runs the model and writes the four figures."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    run = run_model(Dalle.from_pretrained("demo"), arguments.prompt, seed=arguments.seed)
    for name, content in draw_stages(run).items():
        size = (arguments.out / name).write_bytes(content.encode())
        print(f"{arguments.out / name}: {size:,} bytes")


def parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--out", type=path, default=Path("docs/images"), metavar="DIR", help="folder for the figures")
    parser.add_argument("--prompt", default=PROMPT, metavar="TEXT", help="what to sample")
    parser.add_argument("--seed", type=int, default=SEED, metavar="N", help="seed of all samples")
    return parser


if __name__ == "__main__":
    sys.exit(run_reporting("stages.py", lambda: main(parser().parse_args())))
