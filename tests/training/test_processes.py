"""Several processes that train together give what one gives: `mindalle finetune --distributed`, started twice.

Two processes with two CPU devices each, against one with four.
"""

import json
import shutil
import socket
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from training_runs import checkpoint_arrays, metrics, start, write_code_set, write_config

from mindalle_jax import cli
from mindalle_jax.errors import UsageError
from mindalle_jax.runtime import devices
from mindalle_jax.storage.weights import map_weights, read_manifest

UPDATES = 6
SAVED = 3


class Ended(NamedTuple):
    """How a process ended."""

    code: int
    out: str
    err: str


def run(config: Path, out: Path, *overrides: str, count: int) -> list[Ended]:
    """That many processes on four devices."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    several = ["--distributed"] if count > 1 else []
    environments = [
        {"JAX_COORDINATOR_ADDRESS": address, "JAX_COORDINATOR_BIND_ADDRESS": address,
         "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(i)}
        for i in range(count)
    ]  # fmt: skip
    processes = [
        start(config, out, *several, *overrides, devices=4 // count, **environment) for environment in environments
    ]
    try:
        outputs = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return [Ended(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def completed(config: Path, out: Path, *overrides: str, count: int) -> Path:
    for ended in run(config, out, *overrides, count=count):
        assert ended.code == 0, ended.err
    return out


class Runs(NamedTuple):
    """Folders of runs of one configuration."""

    one: Path
    two: Path
    one_then_two: Path
    """Half by one process, half by two."""
    two_then_one: Path


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_model_folder) -> Runs:
    work = tmp_path_factory.mktemp("processes")
    data = write_code_set(work / "codes", tiny_model_folder, 13)
    valid = write_code_set(work / "valid", tiny_model_folder, 5, seed=1)
    config = write_config(
        work / "run.yaml",
        tiny_model_folder,
        data,
        data={"valid": str(valid)},
        training={"caption_dropout": 0.3, "ema_decay": 0.9, "checkpoint_every_steps": SAVED, "validate_every_steps": 2},
        optimizer={"base_lr": 1e-3, "max_steps": UPDATES},
        experiment={"local_batch_size": 1, "total_batch_size": 8, "valid_batch_size": 4},
        sharding={"strategy": "fsdp"},
    )
    folders = {}
    for first, second in ((1, 2), (2, 1)):
        out = folders[first] = completed(config, work / f"{first}", count=first)
        moved = folders[first, second] = shutil.copytree(out, work / f"{first}-{second}")
        shutil.rmtree(moved / "checkpoints" / str(UPDATES))
        (moved / "summary.json").unlink()
        completed(config, moved, count=second)
    return Runs(folders[1], folders[2], folders[1, 2], folders[2, 1])


KEY = 1  # of query, key, value


def params(out: Path) -> dict[str, np.ndarray]:
    """Of the last checkpoint, of which weights() is the moving average."""
    arrays = checkpoint_arrays(out)
    return {path.removeprefix("params/"): arrays[path] for path in sorted(arrays) if path.startswith("params/")}


def weights(out: Path) -> dict[str, np.ndarray]:
    leaves = map_weights(out / "stage2.safetensors", read_manifest(out)["tensors"]["stage2"])
    return {path: leaves[path] for path in sorted(leaves)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two", "one_then_two", "two_then_one"])
def test_processes_change_neither_samples_nor_losses_nor_the_model(runs, name):
    """1e-5, of losses of about 5, and of parameters of order one: gradients are added up in another order.

    Not of the bias of the keys: softmax takes no notice of it, so its gradient is rounding, which Adam scales up.
    """
    expected, out = runs.one, getattr(runs, name)
    for kind, steps in (("train", [1, 2, 3, 4, 5, 6]), ("valid", [2, 4, 6])):
        theirs, ours = metrics(expected, kind), metrics(out, kind)
        assert [line["step"] for line in ours] == steps
        loss = [[line["loss"] for line in lines] for lines in (ours, theirs)]
        print(f"{kind}: losses differ by {np.abs(np.subtract(*loss)).max():.1e}")
        np.testing.assert_allclose(*loss, rtol=0, atol=1e-5)
        if kind == "train":
            assert [line["samples_crc32"] for line in ours] == [line["samples_crc32"] for line in theirs]
    for wanted, found in ((weights(expected), weights(out)), (params(expected), params(out))):
        assert list(found) == list(wanted)
        apart = {path: np.abs(found[path] - leaf) for path, leaf in wanted.items()}
        apart["blocks/qkv/bias"] = np.delete(apart["blocks/qkv/bias"], KEY, axis=1)
        largest = max(difference.max() for difference in apart.values())
        print(f"parameters differ by {largest:.1e}")
        assert largest < 1e-5


@pytest.mark.slow
def test_there_were_two_processes_and_one_wrote(runs):
    """Two processes that each train alone would give equal numbers as well."""
    for out in runs:
        assert json.loads((out / "summary.json").read_text())["devices"] == 4
        assert [line["step"] for line in metrics(out)] == list(range(1, UPDATES + 1))


def test_a_process_that_is_told_nothing_says_so(monkeypatch, tmp_path, capsys):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    code = cli.main(["finetune", "--config", str(tmp_path / "x.yaml"), "--out", str(tmp_path / "out"), "--distributed"])
    assert code == 2 and "the processes cannot be joined" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["JAX_NUM_PROCESSES", "JAX_PROCESS_ID"])
def test_a_number_that_is_none(monkeypatch, name):
    monkeypatch.setenv(name, "two")
    with pytest.raises(UsageError, match=f"{name} must be a number, not 'two'"):
        devices.join_processes()
