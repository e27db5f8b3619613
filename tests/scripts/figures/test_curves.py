"""scripts/figures/curves.py: what a run wrote, as lines and points at their places."""

import json
import re
import xml.etree.ElementTree as ElementTree

import pytest

from mindalle_jax.errors import DataError
from scripts.figures import curves


@pytest.fixture
def run(tmp_path):
    """A run of 1,000 steps whose loss falls from 4 to 0, validated twice, and whose psnr is validated alone."""
    rows = [{"step": step, "kind": "train", "loss": 4 - step / 250} for step in range(1, 1001)]
    rows += [{"step": step, "kind": "valid", "loss": 4 - step / 250, "psnr": 28 + step / 500} for step in (500, 1000)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_a_line_of_means_and_points(run):
    curve = curves.read_curve(run, "loss")
    assert curve.valid == [(500, 2), (1000, 0)]
    assert len(curve.train) == curves.PARTS and curve.train[0] == (5.5, pytest.approx(4 - 5.5 / 250))
    assert curves.read_curve(run, "psnr").train == []
    with pytest.raises(DataError, match="no row has lost"):
        curves.read_curve(run, "lost")


def test_the_file_is_svg_with_one_panel_per_run(run, tmp_path):
    out = tmp_path / "a.svg"
    panels = [["--run", "Loss <1>", str(run), "loss", "nats"], ["--run", "Images", str(run), "psnr", "dB"]]
    curves.main(curves.parser().parse_args(["--out", str(out), *panels[0], *panels[1]]))
    text = out.read_text()
    ElementTree.fromstring(text)
    assert "Loss &lt;1&gt;" in text and text.count("<polyline") == 1 and text.count("<circle") == 4
    (line,) = re.findall('points="([^"]*)"', text)
    heights = [float(point.split(",")[1]) for point in line.split()]
    assert heights == sorted(heights) and heights[-1] == pytest.approx(curves.HEIGHT - curves.BOTTOM, abs=2)
