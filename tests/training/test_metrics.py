"""metrics.jsonl and what else is shown of a run."""

import json
import math
import re
import sys
import time

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mindalle_jax.config.schema import Config
from mindalle_jax.runtime.sharding import make_mesh
from mindalle_jax.training.metrics import Monitor, flops_per_sequence, memory_line, read_metrics


def line(step: int, **more) -> dict:
    return {"loss": 1.5, "learning_rate": 1e-3, **more}


def lines(out) -> list[dict]:
    return [json.loads(text) for text in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_number_that_is_not_finite_is_null(tmp_path):
    """JSON has no NaN, and a reader of the file would stop at it."""
    with Monitor(tmp_path, 0.0, 8, 0, 2) as monitor:
        monitor.log_metrics(1, {"loss": math.nan, "learning_rate": 1e-3, "grad_norm": math.inf})
    (found,) = lines(tmp_path)
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert (found["step"], found["kind"], found["loss"], found["grad_norm"]) == (1, "train", None, None)


def test_a_resumed_run_replaces_the_lines_after_its_checkpoint(tmp_path):
    """A killed run got further than its last checkpoint, and its last line may be cut off."""
    with Monitor(tmp_path, 0.0, 8, 0, 9) as monitor:
        for step in range(1, 6):
            monitor.log_metrics(step, line(step))
        monitor.log_metrics(3, {"loss": 0.5}, "valid")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    with Monitor(tmp_path, 0.0, 8, 3, 9) as monitor:
        monitor.log_metrics(4, line(4, again=1))
    assert [(each["step"], each["kind"], "again" in each) for each in lines(tmp_path)] == [
        (1, "train", False), (2, "train", False), (3, "train", False), (3, "valid", False), (4, "train", True),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "damage", [b"\xff", b'{"step": 2, "lo', b"null", b"[1]", b'{"step": "2", "kind": "train"}', b'{"kind": "train"}']
)
def test_a_damaged_line_costs_that_line_alone(tmp_path, damage):
    """A flipped byte on the disk must not keep a run from resuming."""
    with Monitor(tmp_path, 0.0, 8, 0, 9) as monitor:
        for step in (1, 2, 3):
            monitor.log_metrics(step, line(step))
    path = tmp_path / "metrics.jsonl"
    first, second, third = path.read_bytes().splitlines()
    path.write_bytes(
        b"\n".join([first, damage if len(damage) > 1 else second.replace(b"step", b"st\xffp"), third, b""])
    )
    assert [found["step"] for found in read_metrics(path)] == [1, 3]
    with Monitor(tmp_path, 0.0, 8, 3, 9):
        pass
    assert [found["step"] for found in lines(tmp_path)] == [1, 3]


def test_lines_go_to_stderr(tmp_path, capsys):
    with Monitor(tmp_path, 0.0, 8, 0, 1) as monitor:
        monitor.log("16 samples")
    out, err = capsys.readouterr()
    assert out == "" and "16 samples" in err


def test_memory_is_that_of_the_first_device():
    """A replicated array counts in full, and an array that is sharded over eight devices counts an eighth."""
    mesh = make_mesh("fsdp", {}, jax.devices())
    arrays = [
        jax.device_put(np.zeros(size, np.uint8), NamedSharding(mesh, spec))
        for size, spec in ((1_000_000, PartitionSpec()), (2_000_000, PartitionSpec("fsdp")))
    ]
    assert (
        memory_line({"weights": arrays[0], "optimizer": {"a": arrays[1]}}) == "weights 0.001 GB, optimizer 0.00025 GB"
    )


def test_flops_of_a_sequence():
    """2.37 TFLOP for the published model, counted by hand: 42 layers of 12 d^2, two heads, causal attention."""
    d, layers = 1536, 42
    expected = 6 * (layers * 12 * d**2 * 320 + d * 16384 * (256 + 64)) + 12 * layers * d * 320**2 / 2
    assert flops_per_sequence(Config()) == expected and round(expected / 1e12, 2) == 2.37


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_in_a_terminal_and_in_a_file(tmp_path, capsys, monkeypatch, terminal):
    """A file gets a line at the first step, the last, and every 10 s between; a bar would be one endless line."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    with Monitor(tmp_path, 0.0, 8, 0, 5) as monitor:
        monitor.log("from demo")
        for step in range(1, 6):
            monitor.log_metrics(step, line(step))
    err = capsys.readouterr().err
    assert ("\r" in err) == terminal and "from demo\n" in err
    if not terminal:
        first, second, last = err.splitlines()
        assert first == "from demo" and "1/5 [" in second and "5/5 [" in last and "loss=1.5000" in last


def test_the_time_left_follows_from_the_steps_after_the_first(tmp_path, capsys):
    """The first one compiles: here in 1 s, and the others take 0.02 s each. With it there were 5 steps/s."""
    with Monitor(tmp_path, 0.0, 8, 0, 6) as monitor:
        for step in range(1, 7):
            time.sleep(1 if step == 1 else 0.02)
            monitor.log_metrics(step, line(step))
    last = capsys.readouterr().err.splitlines()[-1]
    found = re.search(r"([\d.]+)step/s", last)
    assert found and 10 < float(found[1]) <= 50, last
