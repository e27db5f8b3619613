"""The parts of the SVG figures: one look for light and dark pages, text, lines, bars and small images.

A figure is a card with its own background, so that it is readable on any page. Its colors follow the reader's light or
dark scheme. The smallest text is 15 pixels of a figure 640 pixels wide, so it is readable at 400 pixels too.
"""

import base64
import html
import io
import textwrap
from collections.abc import Iterable

import numpy as np
from PIL import Image

WIDTH, PAD = 640, 24
"""Pixels of a card, and of the space at its left and right."""
TITLE_Y, SUBTITLE_Y, BODY_Y = 38, 63, 84
"""Base lines of the title and the line below it, and where the rest of a card may begin."""
NOTE_LETTERS, NOTE_LINE = 74, 20
"""Letters in a line of small text that is as wide as the card, and its height."""
NOT_SAMPLED = (226, 226, 228)
"""Color of what is not sampled yet, in images."""
STYLE = """\
text { font: 16px system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif; fill: #1f2328 }
.title { font-size: 20px; font-weight: 600 } .strong { font-weight: 600 } .note { font-size: 15px; fill: #59636e }
.on { fill: #1f2328 }
.halo { paint-order: stroke; stroke: #fff; stroke-width: 5px; stroke-linejoin: round }
.card { fill: #fff; stroke: #d0d7de } .grid { stroke: #d8dee4 } .edge { stroke: #59636e }
.limit { stroke: #59636e; stroke-dasharray: 5 4 } .line { fill: none; stroke: #0969da; stroke-width: 2.5 }
.point { fill: #bc4c00 } .a { fill: #0969da } .b { fill: #d4823b } .c { fill: #9aa3ad }
.empty { fill: none; stroke: #d0d7de }
.text { fill: #b3d3fb } .mark { fill: none; stroke: #8250df; stroke-width: 2.5 }
.thin { fill: none; stroke: #8250df } .next { fill: none; stroke: #8250df; stroke-width: 1.5; stroke-dasharray: 3 2 }
image { image-rendering: pixelated }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc } .note { fill: #a6adb5 } .on { fill: #1f2328 } .halo { stroke: #0d1117 }
  .card { fill: #0d1117; stroke: #3d444d } .grid { stroke: #30363d } .edge { stroke: #a6adb5 }
  .limit { stroke: #a6adb5 } .line { stroke: #4493f8 } .point { fill: #f0883e }
  .a { fill: #4493f8 } .b { fill: #c9732f } .c { fill: #6e7681 } .empty { stroke: #3d444d }
  .text { fill: #79aef0 } .mark, .thin, .next { stroke: #a371f7 }
}"""


def figure(width: float, height: float, label: str, parts: Iterable[str]) -> str:
    """The SVG of these elements on a card. label: what the figure shows, for readers who do not see it."""
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{html.escape(label)}">\n<style>{STYLE}</style>\n'
        f"{rect(0.5, 0.5, width - 1, height - 1, 'card', radius=8)}\n{body}\n</svg>\n"
    )


def text(x: float, y: float, content: str, kind: str = "", anchor: str = "") -> str:
    """One line of text. kind: a class of STYLE. anchor: middle or end, where it does not start at x."""
    return f'<text{_class(kind)} x="{_short(x)}" y="{_short(y)}"{_anchor(anchor)}>{html.escape(content)}</text>'


def head(title: str, subtitle: str = "") -> list[str]:
    """The title of a card, and a line below it."""
    return [text(PAD, TITLE_Y, title, "title"), *([text(PAD, SUBTITLE_Y, subtitle, "note")] if subtitle else [])]


def notes(y: float, content: str, letters: int = NOTE_LETTERS, x: float = PAD) -> list[str]:
    """Small text, broken into lines of at most `letters`; y: the base line of the first."""
    lines = textwrap.wrap(content, letters)
    return [text(x, y + number * NOTE_LINE, line, "note") for number, line in enumerate(lines)]


def line(x0: float, y0: float, x1: float, y1: float, kind: str = "grid") -> str:
    """A straight line."""
    return f'<line{_class(kind)} x1="{_short(x0)}" x2="{_short(x1)}" y1="{_short(y0)}" y2="{_short(y1)}"/>'


def polyline(points: Iterable[tuple[float, float]], kind: str = "line") -> str:
    """A line through points."""
    return f'<polyline{_class(kind)} points="{" ".join(f"{_short(x)},{_short(y)}" for x, y in points)}"/>'


def point(x: float, y: float, radius: float = 4) -> str:
    """A measured value."""
    return f'<circle class="point" cx="{_short(x)}" cy="{_short(y)}" r="{_short(radius)}"/>'


def rect(x: float, y: float, width: float, height: float, kind: str = "", *, radius: float = 0, color: str = "") -> str:
    """A rectangle, such as a bar. color: one that is not of a class."""
    size = f'x="{_short(x)}" y="{_short(y)}" width="{_short(width)}" height="{_short(height)}"'
    rounded, fill = f' rx="{_short(radius)}"' if radius else "", f' fill="{color}"' if color else ""
    return f"<rect{_class(kind)} {size}{rounded}{fill}/>"


def arrow(x0: float, x1: float, y: float) -> str:
    """An arrow from the left to the right."""
    tip = [(x1 - 6, y - 5), (x1, y), (x1 - 6, y + 5)]
    shape = f"M{_short(x0)} {_short(y)}H{_short(x1)}M" + "L".join(f"{_short(x)} {_short(at)}" for x, at in tip)
    return f'<path class="edge" fill="none" d="{shape}"/>'


def image(x: float, y: float, width: float, height: float, pixels: np.ndarray) -> str:
    """A small image uint8[h, w, 3] as PNG in the file. Its pixels stay squares however large it is shown."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    data = base64.b64encode(file.getvalue()).decode()
    size = f'x="{_short(x)}" y="{_short(y)}" width="{_short(width)}" height="{_short(height)}"'
    return f'<image {size} preserveAspectRatio="none" href="data:image/png;base64,{data}"/>'


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers from low to high."""
    step = 10 ** np.floor(np.log10((high - low) / 4))
    step *= next(times for times in (1, 2, 5, 10) if (high - low) / (step * times) <= 5)
    return [float(round(tick * step, 10)) for tick in range(int(np.ceil(low / step)), int(high / step + 1e-9) + 1)]


def _short(number: float) -> str:
    """The number with at most one decimal."""
    return f"{round(float(number), 1):g}"


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""


def _anchor(anchor: str) -> str:
    return f' text-anchor="{anchor}"' if anchor else ""
