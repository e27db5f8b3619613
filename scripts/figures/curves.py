"""Plots metrics of training runs by step, as an SVG that follows the reader's light or dark colors.

    python -m scripts.figures.curves --out docs/emoji/curves.svg --run "VQGAN" DIR/vqgan psnr "dB, held-out images" \\
        --run "Transformer" DIR/transformer image_loss "nats per code"

Each run gets a panel with one field of its metrics.jsonl. Points are validation. The line is training: means over
hundredths of the run.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mindalle_jax.cli import run_reporting
from mindalle_jax.cli.parser import HelpFormatter, path
from mindalle_jax.errors import DataError
from scripts.figures import svg

WIDTH, HEIGHT = 420, 316
LEFT, RIGHT, TOP, BOTTOM = 56, 24, 72, 66
PARTS = 100


class Curve(NamedTuple):
    """One field of a run: (step, value) of training, thinned, and of validation."""

    train: list[tuple[float, float]]
    valid: list[tuple[float, float]]


def read_curve(run: Path, field: str) -> Curve:
    """The curve of a field of run/metrics.jsonl. Raises DataError where there is none."""
    file = run / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    found = {
        kind: np.array([(row["step"], row[field]) for row in rows if row["kind"] == kind and field in row])
        for kind in ("train", "valid")
    }
    if not any(map(len, found.values())):
        raise DataError(f"{file}: no row has {field}")
    parts = np.array_split(found["train"], min(PARTS, len(found["train"]))) if len(found["train"]) else []
    means = [part.mean(0) for part in parts]
    return Curve([(float(x), float(y)) for x, y in means], [(float(x), float(y)) for x, y in found["valid"]])


def draw_panel(title: str, label: str, curve: Curve, left: int) -> list[str]:
    """The elements of one panel, `left` pixels from the left.

    The axis of values begins at 0 unless values are far from it.
    """
    points = np.array(curve.train + curve.valid)
    most = points.max(0)
    low = 0.0 if points[:, 1].min() < most[1] / 2 else float(points[:, 1].min() * 0.95)

    def place(step: float, value: float) -> tuple[float, float]:
        x = left + LEFT + step / most[0] * (WIDTH - LEFT - RIGHT)
        return x, HEIGHT - BOTTOM - (value - low) / (most[1] * 1.05 - low) * (HEIGHT - TOP - BOTTOM)

    parts = [svg.text(left + LEFT, 34, title, "title"), svg.text(left + LEFT, 56, label, "note")]
    for tick in svg.ticks(low, float(most[1] * 1.05)):
        (x0, y), (x1, _) = place(0, tick), place(most[0], tick)
        parts += [svg.line(x0, y, x1, y), svg.text(x0 - 6, y + 5, f"{tick:g}", "note", "end")]
    for tick in svg.ticks(0, float(most[0])):
        x, y = place(tick, low)
        parts.append(svg.text(x, y + 22, f"{tick:,g}", "note", "middle"))
    shown = ["line: training"] * bool(curve.train) + ["points: validation"] * bool(curve.valid)
    parts.append(
        svg.text(left + (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 18, f"step ({', '.join(shown)})", "note", "middle")
    )
    if curve.train:
        parts.append(svg.polyline(place(*at) for at in curve.train))
    parts += [svg.point(*place(*at), 3) for at in curve.valid]
    return parts


def main(arguments: argparse.Namespace) -> None:
    """Reads the runs and writes the file."""
    parts = list[str]()
    for number, (title, run, field, label) in enumerate(arguments.run):
        parts += draw_panel(title, label, read_curve(Path(run), field), number * WIDTH)
    label = ", ".join(f"{title}: {label} by step" for title, _, _, label in arguments.run)
    file = svg.figure(WIDTH * len(arguments.run), HEIGHT, label, parts)
    arguments.out.write_text(file, encoding="utf-8")


def parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--out", required=True, type=path, metavar="FILE", help="the SVG")
    parser.add_argument("--run", required=True, nargs=4, action="append", metavar=("TITLE", "DIR", "FIELD", "LABEL"),
                        help="one panel: the folder of a run, and a field of its metrics.jsonl")  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(run_reporting("curves.py", lambda: main(parser().parse_args())))
