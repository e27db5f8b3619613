"""scripts/scenes/guidance.py, in two steps."""

import json

import pytest

from scripts.scenes import guidance


@pytest.mark.slow
def test_shares_of_blank_captions_by_scales(tmp_path, monkeypatch):
    monkeypatch.setattr(guidance, "NUM_IMAGES", 40)
    monkeypatch.setattr(guidance, "SCALES", (1.0, 2.0))
    arguments = ["--out", str(tmp_path), "--dropout", "0", "0.5", "--steps", "40", "--prompts", "2"]
    guidance.main(guidance.parser().parse_args(arguments))
    found = json.loads((tmp_path / "guidance.json").read_text())
    assert found["prompts"] == 2 and list(found["right"]) == ["0", "0.5"]
    assert all(0 <= right["all"] <= 1 for scales in found["right"].values() for right in scales.values())
    assert list(found["right"]["0.5"]) == ["1", "2"]
