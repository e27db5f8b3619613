"""Plots the measured numbers of docs/measured.json, as SVG that follows the reader's light or dark colors.

    python -m scripts.figures.charts

writes docs/images/step-time.svg, memory.svg and scenes-losses.svg, and docs/emoji/curves.svg. The same numbers give the
same files, byte for byte. A test holds the committed files to that, and the numbers to the log.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mindalle_jax.cli import run_reporting
from mindalle_jax.cli.parser import HelpFormatter, path
from scripts.figures import curves, svg

DOCS = Path("docs")
BAR, BAR_GAP, GROUP_HEAD, GROUP_GAP = 24, 6, 32, 14
"""Heights in pixels: of a bar, between two of them, of the heading of a group, between two groups."""
AXIS = 54
"""Height of the numbers and the label below a plot."""
RIGHT = svg.WIDTH - svg.PAD - 20
COLORS = ("a", "b", "c")
"""Classes of the bars of a group."""


def bars(
    head: tuple[str, str],
    conditions: str,
    names: Mapping[str, str],
    rows: Sequence[Mapping[str, Any]],
    axis: tuple[float, str],
    limits: Sequence[tuple[float, str]] = (),
    left: float = 220,
) -> str:
    """A chart of horizontal bars in groups, one group per row.

    head: title and subtitle. names: field of a row -> its label. axis: the largest value, and the label. limits: values
    of dashed lines, with their labels. left: pixels for the labels.
    """
    group = GROUP_HEAD + len(names) * (BAR + BAR_GAP) + GROUP_GAP
    top = svg.BODY_Y + (24 if limits else 0)
    bottom = top + len(rows) * group
    parts = svg.head(*head)

    def place(value: float) -> float:
        return left + value / axis[0] * (RIGHT - left)

    for tick in svg.ticks(0, axis[0]):
        parts.append(svg.line(place(tick), top, place(tick), bottom))
        parts.append(svg.text(place(tick), bottom + 22, f"{tick:g}", "note", "middle"))
    parts.append(svg.text((left + RIGHT) / 2, bottom + 46, axis[1], "note", "middle"))
    for value, label in limits:
        parts.append(svg.line(place(value), top - 6, place(value), bottom, "limit"))
        parts.append(svg.text(place(value), top - 12, label, "note", "middle"))
    for number, row in enumerate(rows):
        y, count = top + number * group, row["candidates"]
        parts.append(svg.text(svg.PAD, y + 22, f"{count} candidate{'s' if count > 1 else ''}", "strong"))
        for bar, (field, name) in enumerate(names.items()):
            at = y + GROUP_HEAD + bar * (BAR + BAR_GAP)
            parts.append(svg.text(left - 8, at + 18, name, anchor="end"))
            parts.append(svg.rect(left, at, place(row[field]) - left, BAR, COLORS[bar], radius=2))
            parts.append(svg.text(place(row[field]) + 6, at + 18, f"{row[field]:#.3g}", "halo"))
    noted = svg.notes(bottom + AXIS + 20, conditions)
    return svg.figure(svg.WIDTH, bottom + AXIS + 14 + len(noted) * svg.NOTE_LINE + 8, ". ".join(head), parts + noted)


def plot_step_time(measured: Mapping[str, Any]) -> str:
    """Seconds per step of decoding, beside PyTorch."""
    names = {"this": "this project", "preallocated": "PyTorch, preallocated", "concatenated": "PyTorch, concatenated"}
    head = ("One step of decoding on two CPU cores", "Full size, 1.3B. A step computes one code for each candidate.")
    return bars(head, measured["conditions"], names, measured["rows"], (2.5, "seconds per step"))


def plot_memory(measured: Mapping[str, Any]) -> str:
    """Estimated memory, by number of candidates and --quantize."""
    names = {"off": "off (bfloat16)", "weights": "weights", "weights+cache": "weights+cache"}
    head = ("Estimated memory on a GPU", "By number of candidates sampled at once, and by --quantize")
    limits = [(size * measured["share_of_gpu"], f"{size} GB GPU") for size in measured["gpus_GB"]]
    return bars(head, measured["conditions"], names, measured["rows"], (15, "GB, estimated"), limits, left=160)


def plot_scenes_losses(measured: Mapping[str, Any]) -> str:
    """Validation loss of the transformer of scenes by step, on a logarithmic axis."""
    left, top, bottom = 84, svg.BODY_Y + 16, svg.BODY_Y + 260
    low, high, last = 1.3, 100, measured["rows"][-1][0]

    def place(step: float, value: float) -> tuple[float, float]:
        share = math.log(value / low) / math.log(high / low)
        return left + step / last * (RIGHT - left), bottom - share * (bottom - top)

    parts = svg.head("Training on scenes", "Transformer: loss in validation, logarithmic axis")
    for tick in (2, 5, 10, 20, 50, 100):
        (x0, y), (x1, _) = place(0, tick), place(last, tick)
        parts += [svg.line(x0, y, x1, y), svg.text(x0 - 8, y + 5, f"{tick}", "note", "end")]
    for step in range(0, last + 1, 1200):
        parts.append(svg.text(place(step, low)[0], bottom + 22, f"{step:,}", "note", "middle"))
    middle = (top + bottom) / 2
    turned = svg.text(30, middle, measured["unit"], "note", "middle")
    parts.append(turned.replace("<text", f'<text transform="rotate(-90 30 {middle:g})"'))
    parts.append(svg.text((left + RIGHT) / 2, bottom + 46, "step", "note", "middle"))
    floor = measured["floor"]
    parts.append(svg.line(*place(0, floor), *place(last, floor), "limit"))
    parts.append(svg.text(left + 6, place(0, floor)[1] + 20, f"{floor} cannot be known from the caption", "note"))
    points = [place(*row) for row in measured["rows"]]
    parts += [svg.polyline(points), *(svg.point(*at) for at in points)]
    (x0, y0), (x1, y1) = points[0], points[-1]
    parts.append(svg.text(x0 + 10, y0 + 5, f"{measured['rows'][0][1]}", "strong"))
    parts.append(svg.text(x1, y1 - 12, f"{measured['rows'][-1][1]}", "strong", "end"))
    noted = svg.notes(bottom + AXIS + 20, measured["conditions"])
    height = bottom + AXIS + 14 + len(noted) * svg.NOTE_LINE + 8
    return svg.figure(svg.WIDTH, height, "Loss of the transformer of scenes by step", parts + noted)


def plot_emoji_curves(measured: Mapping[str, Any]) -> str:
    """The trainings of `demo`, in the form of curves.py."""
    panels = [("VQGAN", measured["vqgan"]), ("Transformer", measured["transformer"])]
    parts = list[str]()
    for number, (title, panel) in enumerate(panels):
        curve = curves.Curve(panel.get("train", []), panel["valid"])
        parts += curves.draw_panel(title, panel["unit"], curve, number * curves.WIDTH)
    label = ", ".join(f"{title}: {panel['unit']} by step" for title, panel in panels)
    return svg.figure(len(panels) * curves.WIDTH, curves.HEIGHT, label, parts)


CHARTS: dict[str, tuple[str, Callable[[Mapping[str, Any]], str]]] = {
    "step_time": ("images/step-time.svg", plot_step_time),
    "memory": ("images/memory.svg", plot_memory),
    "scenes_losses": ("images/scenes-losses.svg", plot_scenes_losses),
    "emoji_curves": ("emoji/curves.svg", plot_emoji_curves),
}
"""Field of measured.json -> the file in docs/, and what plots it."""


def make_charts(measured: Mapping[str, Any]) -> dict[str, str]:
    """File below docs/ -> SVG."""
    return {file: plot(measured[field]) for field, (file, plot) in CHARTS.items()}


def main(arguments: argparse.Namespace) -> None:
    """Reads the numbers and writes all charts."""
    measured = json.loads((arguments.docs / "measured.json").read_text(encoding="utf-8"))
    for name, content in make_charts(measured).items():
        file = arguments.docs / name
        file.parent.mkdir(parents=True, exist_ok=True)
        print(f"{file}: {file.write_bytes(content.encode()):,} bytes")


def parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--docs", type=path, default=DOCS, metavar="DIR",
                        help="folder that has measured.json, and gets the charts")  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(run_reporting("charts.py", lambda: main(parser().parse_args())))
