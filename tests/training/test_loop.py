"""A run is exact: interrupted in any way, it gives the numbers of one that was not.

Runs are processes of their own. All updates are sums over four micro-batches, so a kill comes in the middle of one.
"""

import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from training_runs import checkpoint_arrays, metrics, start, weights_crc32, write_code_set, write_config

UPDATES = 20
FIGURES = ("step", "loss", "image_loss", "text_loss", "grad_norm", "learning_rate", "samples_crc32", "skipped")


class Ended(NamedTuple):
    """How a process ended."""

    code: int
    out: str
    err: str


class Runs(NamedTuple):
    """Two runs of one configuration, and how the processes of the second ended."""

    straight: Path
    interrupted: Path
    killed: Ended
    killed_steps: list[int]
    """Checkpoints that the killed process left."""
    killed_lines: int
    stopped: Ended
    stopped_at: int
    finished: Ended
    other_devices: Path
    """From where the second run was stopped, on four devices."""


def finish(process: subprocess.Popen) -> Ended:
    out, err = process.communicate(timeout=240)
    return Ended(process.returncode, out, err)


def interrupt(process: subprocess.Popen, out: Path, updates: int, number: int) -> Ended:
    """Sends a signal once that many updates are in metrics.jsonl, which a process that goes on begins by replacing."""
    path = out / "metrics.jsonl"
    before = path.stat().st_ino if path.exists() else None
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if path.exists() and path.stat().st_ino != before and len(metrics(out)) >= updates:
            break
        time.sleep(0.001)
    process.send_signal(number)
    return finish(process)


def complete_steps(out: Path) -> list[int]:
    return sorted(int(path.name) for path in (out / "checkpoints").iterdir() if path.name.isdecimal())


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_model_folder) -> Runs:
    work = tmp_path_factory.mktemp("runs")
    data = write_code_set(work / "codes", tiny_model_folder, 29)  # 29 and batches of 8: epochs end within a batch
    valid = write_code_set(work / "valid", tiny_model_folder, 5, seed=1)
    config = write_config(
        work / "run.yaml",
        tiny_model_folder,
        data,
        data={"valid": str(valid)},
        training={
            "caption_dropout": 0.3, "ema_decay": 0.9, "warmup_steps": 3, "checkpoint_every_steps": 5,
            "validate_every_steps": 10,
        },
        experiment={"local_batch_size": 2, "total_batch_size": 8, "valid_batch_size": 4},
    )  # fmt: skip
    straight, other, moved = work / "straight", work / "interrupted", work / "moved"
    done = finish(start(config, straight))
    assert done.code == 0, done.err
    # Checkpoint 10 is begun when 5 is complete, and is being written while update 11 runs; 15 waits for 10. So there
    # is something to go on from, and the signal comes before the end however fast the machine is.
    killed = interrupt(start(config, other), other, 11, signal.SIGKILL)
    steps, lines = complete_steps(other), len(metrics(other))
    stopped = interrupt(start(config, other), other, 12, signal.SIGTERM)
    stopped_at = max(complete_steps(other))
    shutil.copytree(other, moved)
    finished = finish(start(config, other))
    assert finished.code == 0, finished.err
    done = finish(start(config, moved, devices=4))
    assert done.code == 0, done.err
    return Runs(straight, other, killed, steps, lines, stopped, stopped_at, finished, moved)


def figures(out: Path, kind: str = "train") -> list[dict[str, Any]]:
    """What must not depend on interruptions: all but speeds."""
    return [{name: line[name] for name in FIGURES if name in line} for line in metrics(out, kind)]


def test_the_interruptions_were_what_they_should_be(runs):
    """A run that had ended before the signal came would prove nothing."""
    assert runs.killed.code == -signal.SIGKILL and 11 <= runs.killed_lines < UPDATES
    assert runs.killed_steps and max(runs.killed_steps) < runs.killed_lines
    assert 12 <= runs.stopped_at < UPDATES


def test_sigterm_saves_and_says_how_to_go_on(runs):
    """Exit code 0: what was asked for, a stop, was done. No model is there yet, and none is announced."""
    assert runs.stopped.code == 130 and runs.stopped.out == ""
    assert f"stopped after step {runs.stopped_at}; the same command resumes from there" in runs.stopped.err
    assert runs.finished.out == f"{runs.interrupted}: a model; mindalle sample 'the 0' --model {runs.interrupted}\n"


def test_every_line_of_metrics_is_that_of_the_straight_run(runs):
    expected = figures(runs.straight)
    assert [line["step"] for line in expected] == list(range(1, UPDATES + 1))
    assert len({line["samples_crc32"] for line in expected}) == UPDATES, "batches repeat, and the test proves little"
    assert figures(runs.interrupted) == expected
    assert figures(runs.interrupted, "valid") == figures(runs.straight, "valid")
    assert [line["step"] for line in metrics(runs.interrupted, "valid")] == [10, 20]


def test_the_model_is_that_of_the_straight_run(runs):
    assert weights_crc32(runs.interrupted) == weights_crc32(runs.straight)


def test_the_last_checkpoint_is_that_of_the_straight_run(runs):
    """Parameters, both moments of AdamW, the average, counts: bit by bit."""
    expected, found = checkpoint_arrays(runs.straight), checkpoint_arrays(runs.interrupted)
    assert list(found) == list(expected) and int(found["step"]) == UPDATES
    assert {path.split("/")[0] for path in found} == {"step", "params", "opt_state", "ema", "skipped"}
    assert [path for path in found if found[path].tobytes() != expected[path].tobytes()] == []


def test_the_last_checkpoints_and_the_best_are_kept(runs):
    for out in (runs.straight, runs.interrupted):
        assert complete_steps(out)[-2:] == [15, 20] and len(complete_steps(out)) <= 3


def test_another_number_of_devices_gets_the_same_samples_and_losses(runs):
    """1e-5, of losses of about 5: the gradients are added up in another order."""
    expected, found = figures(runs.straight), figures(runs.other_devices)
    assert [line["samples_crc32"] for line in found] == [line["samples_crc32"] for line in expected]
    differences = np.subtract([line["loss"] for line in found], [line["loss"] for line in expected])
    print(f"losses on 4 devices differ by {np.abs(differences).max():.1e}")
    assert not differences[: runs.stopped_at].any()
    np.testing.assert_allclose(differences, 0, atol=1e-5)
    assert differences.any(), "four devices gave the bits of one: were there four?"
