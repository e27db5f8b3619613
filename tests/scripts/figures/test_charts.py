"""scripts/figures/charts.py: the committed charts are those of docs/measured.json, whose numbers are in the log."""

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts.figures import charts

DOCS = Path(__file__).resolve().parents[3] / "docs"
MEASURED = json.loads((DOCS / "measured.json").read_text(encoding="utf-8"))
SETS = {name: value for name, value in MEASURED.items() if name != "about"}
IN_THE_LOG = {
    "step_time": ("this", "preallocated", "concatenated"),
    "memory": ("off", "weights", "weights+cache"),
}


def section(text: str, heading: str) -> str:
    """What stands below the heading of a page, up to the next heading of its level or above."""
    ((level, start),) = [
        (len(found[1]), found.end()) for found in re.finditer(r"^(#+) (.+)$", text, re.MULTILINE) if found[2] == heading
    ]
    return re.split(rf"^#{{1,{level}}} ", text[start:], maxsplit=1, flags=re.MULTILINE)[0]


def numbers(name: str) -> Iterator[float]:
    """The measured numbers of a set that the log has."""
    measured: Any = SETS[name]
    if name in IN_THE_LOG:
        yield from (row[field] for row in measured["rows"] for field in IN_THE_LOG[name])
    elif name == "scenes_losses":
        yield from (value for _, value in measured["rows"])
        yield measured["floor"]
    else:
        yield from (value for _, value in measured["vqgan"]["valid"])


@pytest.mark.parametrize("name", SETS)
def test_the_committed_chart_is_of_these_numbers(name):
    """A number that changed in measured.json, or a look that changed, shows here: python -m scripts.figures.charts."""
    file, plot = charts.CHARTS[name]
    assert (DOCS / file).read_text(encoding="utf-8") == plot(SETS[name])


@pytest.mark.parametrize("name", SETS)
def test_the_numbers_are_in_the_section_that_they_name(name):
    log = (DOCS.parent / SETS[name]["source"]).read_text(encoding="utf-8")
    found = {float(text) for text in re.findall(r"\d+\.\d+|\d+", section(log, SETS[name]["section"]))}
    assert [number for number in numbers(name) if number not in found] == []


def test_a_section_ends_at_the_next_heading_of_its_level():
    page = "# A\n\n## B\n\none\n\n### C\n\ntwo\n\n## D\n\nthree\n"
    assert section(page, "B").split() == ["one", "###", "C", "two"] and section(page, "C").split() == ["two"]


def test_bars_are_as_long_as_their_values():
    rows = [{"candidates": 1, "x": 1.0, "y": 2.0}, {"candidates": 8, "x": 0.5, "y": 4.0}]
    tree = ElementTree.fromstring(charts.bars(("t", "s"), "c", {"x": "X", "y": "Y"}, rows, (4.0, "seconds")))
    found = [rect.attrib for rect in tree if rect.attrib.get("class") in charts.COLORS]
    assert [bar["class"] for bar in found] == ["a", "b", "a", "b"]
    longest = max(float(bar["width"]) for bar in found)
    shares = [float(bar["width"]) / longest for bar in found]
    assert shares == pytest.approx([1 / 4, 2 / 4, 0.5 / 4, 1], abs=1e-3)


def test_the_estimate_is_called_one():
    """Nothing was run on a GPU."""
    chart = charts.plot_memory(SETS["memory"])
    assert "Estimated memory on a GPU" in chart and "GB, estimated" in chart and "not run on one" in chart


def test_the_command_writes_all_charts(tmp_path):
    (tmp_path / "measured.json").write_text(json.dumps(MEASURED))
    charts.main(charts.parser().parse_args(["--docs", str(tmp_path)]))
    written = {file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*.svg")}
    assert written == {file for file, _ in charts.CHARTS.values()}
