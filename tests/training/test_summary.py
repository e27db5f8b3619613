"""summary.json: what it says of a run, and what tells that a run has ended."""

import json

import pytest

from mindalle_jax.training.metrics import Monitor
from mindalle_jax.training.summary import SUMMARY_FILE, ended_at, write_summary


def test_what_a_summary_says(tmp_path):
    with Monitor(tmp_path, 0.0, 8, 0, 3) as monitor:
        for step, loss in ((1, 3.0), (2, 2.0), (3, 1.5)):
            monitor.log_metrics(step, {"loss": loss, "learning_rate": 1e-3, "skipped": int(step == 2)})
        monitor.log_metrics(2, {"loss": 2.5}, "valid")
    write_summary(tmp_path, step=3, step_of_the_model=2, images=24, seconds=1.26)
    summary = json.loads((tmp_path / SUMMARY_FILE).read_text())
    assert summary.pop("device") == "cpu" and summary.pop("devices") == 8
    assert summary == {
        "updates": 3, "skipped_updates": 1, "images": 24, "first_loss": 3.0, "last_loss": 1.5, "validation_loss": 2.5,
        "step_of_the_model": 2, "seconds_since_the_last_start": 1.3,
    }  # fmt: skip
    assert ended_at(tmp_path) == 3


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", "null"])
def test_a_run_without_a_whole_summary_has_not_ended(tmp_path, content):
    if content is not None:
        (tmp_path / SUMMARY_FILE).write_text(content)
    assert ended_at(tmp_path) is None
