"""A run has the same numbers whatever the process has set for JAX, in Python or in the environment."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from training_runs import metrics, start, weights_crc32, write_code_set, write_config

from mindalle_jax.training.finetune import finetune

SETTINGS: dict[str, dict[str, Any]] = {
    "what numbers are": {
        "jax_enable_x64": True,
        "jax_numpy_rank_promotion": "raise",
        "jax_numpy_dtype_promotion": "strict",
        "jax_default_matmul_precision": "bfloat16",
        "jax_default_prng_impl": "rbg",
        "jax_threefry_partitionable": False,
    },
    "what is watched": {
        "jax_transfer_guard": "disallow",
        "jax_debug_nans": True,
        "jax_debug_infs": True,
        "jax_debug_key_reuse": True,
        "jax_check_tracer_leaks": True,
        "jax_disable_jit": True,
    },
}


@contextlib.contextmanager
def settings(values: dict[str, Any]) -> Iterator[None]:
    """For the whole process and not this thread alone, as a person's notebook has them."""
    before = {name: jax.config.values[name] for name in values}
    try:
        for name, value in values.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_model_folder) -> Path:
    """Two steps with random captions left blank, a moving average, validation and checkpoints."""
    work = tmp_path_factory.mktemp("settings")
    data = write_code_set(work / "codes", tiny_model_folder, 8)
    training = {"caption_dropout": 0.3, "ema_decay": 0.5, "checkpoint_every_steps": 1, "remat": "dots"}
    optimizer = {"base_lr": 1e-3, "max_steps": 2}
    sections = {"data": {"valid": str(data)}, "training": training, "optimizer": optimizer}
    return write_config(work / "run.yaml", tiny_model_folder, data, **sections)


def results(out: Path) -> tuple[Any, ...]:
    """The weights, and the metrics but for speeds."""
    lines = [{name: line[name] for name in line if name != "images_per_s"} for line in metrics(out)]
    return weights_crc32(out), lines, metrics(out, "valid")


@pytest.fixture(scope="module")
def plain(config) -> tuple[Any, ...]:
    """The results with JAX as it is."""
    assert finetune(config, [], config.parent / "plain")
    return results(config.parent / "plain")


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_the_process_change_nothing(plain, config, tmp_path, name):
    with settings(SETTINGS[name]):
        assert finetune(config, [], tmp_path / "out")
        assert all(jax.config.values[option] == value for option, value in SETTINGS[name].items()), "not put back"
    assert results(tmp_path / "out") == plain


def test_settings_of_the_environment_change_nothing(plain, config, tmp_path):
    """They hold while modules are imported, too: an array made there would have another dtype."""
    values = SETTINGS["what numbers are"] | SETTINGS["what is watched"]
    environment = {name.upper(): str(int(value) if type(value) is bool else value) for name, value in values.items()}
    process = start(config, tmp_path / "out", XLA_FLAGS=os.environ["XLA_FLAGS"], **environment)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert results(tmp_path / "out") == plain
