"""summary.json: how a run ended. It is written last, so a folder without it holds a run that is not finished."""

import json
from pathlib import Path
from typing import Any

import jax

from mindalle_jax.runtime.devices import training_devices
from mindalle_jax.storage.files import replace_text
from mindalle_jax.training.metrics import read_metrics

SUMMARY_FILE = "summary.json"


def ended_at(out: Path) -> int | None:
    """Returns the step at which the run in the folder `out` ended; None if it did not end."""
    try:
        return json.loads((out / SUMMARY_FILE).read_text(encoding="utf-8"))["updates"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_summary(out: Path, *, step: int, step_of_the_model: int, images: int, seconds: float) -> None:
    """Writes summary.json of a run that has ended at `step`, from the metrics in its folder.

    images: number of images that the run has seen, each as often as it was seen. seconds: since its last start.
    """
    lines = read_metrics(out / "metrics.jsonl")
    train, valid = ([line for line in lines if line["kind"] == kind] for kind in ("train", "valid"))
    summary: dict[str, Any] = {
        "updates": step,
        "skipped_updates": sum(line.get("skipped", 0) for line in train),
        "images": images,
        "first_loss": train[0].get("loss") if train else None,
        "last_loss": train[-1].get("loss") if train else None,
        "validation_loss": valid[-1].get("loss") if valid else None,
        "step_of_the_model": step_of_the_model,
        "seconds_since_the_last_start": round(seconds, 1),
        "devices": len(training_devices()),
        "device": jax.devices()[0].device_kind,
    }
    replace_text(out / SUMMARY_FILE, json.dumps(summary, indent=1) + "\n")
