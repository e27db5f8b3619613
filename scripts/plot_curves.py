"""Draws how trainings went, as an SVG that follows the reader's light or dark colours.

    python -m scripts.plot_curves --out docs/emoji/curves.svg --run "VQGAN" DIR/vqgan psnr "dB, held-out images" \\
        --run "Transformer" DIR/transformer image_loss "nats a code"

Each run gets a panel with one field of its metrics.jsonl. Points are validation. The line is training: means over
hundredths of the run.
"""

import argparse
import html
import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mindalle_jax.cli import run_reporting
from mindalle_jax.cli.parser import HelpFormatter, path
from mindalle_jax.errors import DataError

WIDTH, HEIGHT = 420, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 40, 40
PARTS = 100
STYLE = """\
text { font: 12px system-ui, sans-serif; fill: #333 } .title { font-weight: 600 }
.grid { stroke: #ddd } .line { fill: none; stroke: #1f6feb; stroke-width: 1.5 } .point { fill: #d1242f }
@media (prefers-color-scheme: dark) {
  text { fill: #ccc } .grid { stroke: #444 } .line { stroke: #79b8ff } .point { fill: #ff7b72 }
}"""


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


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers from low to high."""
    step = 10 ** np.floor(np.log10((high - low) / 4))
    step *= next(times for times in (1, 2, 5, 10) if (high - low) / (step * times) <= 5)
    return [float(round(tick * step, 10)) for tick in range(int(np.ceil(low / step)), int(high / step + 1e-9) + 1)]


def draw_panel(title: str, label: str, curve: Curve, left: int) -> str:
    """One panel as SVG, `left` pixels from the left. The axis of values begins at 0 unless values are far from it."""
    points = np.array(curve.train + curve.valid)
    most = points.max(0)
    low = 0.0 if points[:, 1].min() < most[1] / 2 else float(points[:, 1].min() * 0.95)

    def place(step: float, value: float) -> str:
        x = left + LEFT + step / most[0] * (WIDTH - LEFT - RIGHT)
        y = HEIGHT - BOTTOM - (value - low) / (most[1] * 1.05 - low) * (HEIGHT - TOP - BOTTOM)
        return f"{x:.1f},{y:.1f}"

    parts = [f'<text class="title" x="{left + LEFT}" y="18">{html.escape(title)}</text>',
             f'<text x="{left + LEFT}" y="34">{html.escape(label)}</text>']  # fmt: skip
    for tick in ticks(low, float(most[1] * 1.05)):
        (x0, y), (x1, _) = (place(step, tick).split(",") for step in (0, most[0]))
        parts.append(f'<line class="grid" x1="{x0}" x2="{x1}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{left + LEFT - 6}" y="{float(y) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in ticks(0, float(most[0])):
        x, y = place(tick, low).split(",")
        parts.append(f'<text x="{x}" y="{float(y) + 18:.1f}" text-anchor="middle">{tick:g}</text>')
    if curve.train:
        parts.append(f'<polyline class="line" points="{" ".join(place(*point) for point in curve.train)}"/>')
    for point in curve.valid:
        x, y = place(*point).split(",")
        parts.append(f'<circle class="point" cx="{x}" cy="{y}" r="3"/>')
    return "\n".join(parts)


def main(arguments: argparse.Namespace) -> None:
    """Reads the runs and writes the file."""
    panels = [
        draw_panel(title, label, read_curve(Path(run), field), number * WIDTH)
        for number, (title, run, field, label) in enumerate(arguments.run)
    ]
    size = f'width="{WIDTH * len(panels)}" height="{HEIGHT}" viewBox="0 0 {WIDTH * len(panels)} {HEIGHT}"'
    body = "\n".join(panels)
    arguments.out.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n<style>{STYLE}</style>\n{body}\n</svg>\n', encoding="utf-8"
    )


def parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--out", required=True, type=path, metavar="FILE", help="the SVG")
    parser.add_argument("--run", required=True, nargs=4, action="append", metavar=("TITLE", "DIR", "FIELD", "LABEL"),
                        help="one panel: the folder of a run, and a field of its metrics.jsonl")  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(run_reporting("plot_curves.py", lambda: main(parser().parse_args())))
