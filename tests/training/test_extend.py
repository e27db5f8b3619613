"""Runs of another length: extended ones, and those whose data has fewer images than a batch."""

import json
from pathlib import Path

import pytest
from training_runs import checkpoint_arrays, metrics, weights_crc32, write_code_set, write_config

from mindalle_jax import cli
from mindalle_jax.errors import CheckpointError, ConfigError, UsageError
from mindalle_jax.training.finetune import finetune

LONG = ["optimizer.max_steps=40"]


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_model_folder) -> tuple[Path, Path]:
    """(configuration with a constant learning rate, a complete run of its 20 steps). Read only."""
    work = tmp_path_factory.mktemp("extend")
    data = write_code_set(work / "codes", tiny_model_folder, 17)
    config = write_config(
        work / "run.yaml",
        tiny_model_folder,
        data,
        optimizer={"base_lr": 1e-3, "max_steps": 20, "sched_type": "constant"},
        training={"warmup_steps": 3, "ema_decay": 0.9, "caption_dropout": 0.2},
    )
    assert finetune(config, [], work / "short")
    return config, work / "short"


def losses(out: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in metrics(out)]


def test_twenty_steps_extended_to_forty_equal_forty(world, tmp_path, capsys):
    config, _ = world
    assert finetune(config, [], tmp_path / "extended")
    first = weights_crc32(tmp_path / "extended")
    assert finetune(config, LONG, tmp_path / "extended", extend=True)
    assert "cosine" not in capsys.readouterr().err
    assert finetune(config, LONG, tmp_path / "straight")
    assert losses(tmp_path / "extended") == losses(tmp_path / "straight")
    assert len(losses(tmp_path / "extended")) == 40
    assert weights_crc32(tmp_path / "extended") == weights_crc32(tmp_path / "straight") != first
    found, expected = (checkpoint_arrays(tmp_path / name) for name in ("extended", "straight"))
    assert list(found) == list(expected)
    assert all(found[path].tobytes() == expected[path].tobytes() for path in found)
    summary = json.loads((tmp_path / "extended" / "summary.json").read_text())
    assert (summary["updates"], summary["images"], summary["step_of_the_model"]) == (40, 320, 40)


def test_a_cosine_that_is_extended_says_that_the_result_differs(world, tmp_path, capsys):
    config, _ = world
    cosine = ["optimizer.sched_type=cosine", "optimizer.max_steps=4"]
    assert finetune(config, cosine, tmp_path / "run")
    assert finetune(config, [*cosine, "optimizer.max_steps=6"], tmp_path / "run", extend=True)
    assert "the learning rate fell along a cosine of 4 steps, and now follows one of 6" in capsys.readouterr().err
    assert len(losses(tmp_path / "run")) == 6


def test_another_length_needs_to_be_asked_for(world):
    config, short = world
    with pytest.raises(ConfigError, match=r"max_steps was 20 and is 40; .*--extend \(in Python: extend=True\) makes"):
        finetune(config, LONG, short)
    with pytest.raises(ConfigError, match="seed was 3 and is 4") as caught:
        finetune(config, [*LONG, "training.seed=4"], short)
    assert "--extend" not in str(caught.value)
    with pytest.raises(ConfigError, match="training.seed was 3 and is 4"):
        finetune(config, [*LONG, "training.seed=4"], short, extend=True)


def test_a_run_is_not_made_shorter(world):
    config, short = world
    with pytest.raises(ConfigError, match="--extend makes a run longer; it has 20 steps, not 10"):
        finetune(config, ["optimizer.max_steps=10"], short, extend=True)
    with pytest.raises(ConfigError, match="max_steps was 20 and is 10") as caught:
        finetune(config, ["optimizer.max_steps=10"], short)
    assert "--extend" not in str(caught.value), "advice that would be refused"


def test_nothing_to_extend(world, tmp_path):
    config, _ = world
    with pytest.raises(UsageError, match="holds no run with a checkpoint, so there is nothing to extend"):
        finetune(config, LONG, tmp_path / "new", extend=True)
    assert not (tmp_path / "new").exists()


def test_a_complete_run_that_is_extended_by_nothing_stays(world, capsys):
    config, short = world
    before = (short / "manifest.json").stat().st_mtime_ns
    assert finetune(config, [], short, extend=True)
    assert (short / "manifest.json").stat().st_mtime_ns == before
    assert capsys.readouterr().err == f"{short}: the run is complete, after step 20: nothing to do\n"


def test_extended_on_the_command_line(world, tmp_path):
    config, _ = world
    command = ["finetune", "--config", str(config), "--out", str(tmp_path / "run")]
    assert cli.main([*command, "optimizer.max_steps=4"]) == 0
    assert cli.main([*command, "optimizer.max_steps=5"]) == 3
    assert cli.main([*command, "optimizer.max_steps=5", "--extend"]) == 0
    assert len(losses(tmp_path / "run")) == 5


# Fewer images than a batch


def test_fewer_images_than_a_batch_train_with_a_note(world, tmp_path, capsys):
    """And the run resumes with the same size of batch: the folder keeps the configuration as it was given."""
    config, _ = world
    large = ["experiment.total_batch_size=64", "experiment.local_batch_size=4", "optimizer.max_steps=3"]
    assert finetune(config, large, tmp_path / "run")
    note = "note: the data has 17 samples, fewer than experiment.total_batch_size 64: a step takes 16, and"
    assert f"{note} training.warmup_steps is 1" in capsys.readouterr().err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["updates"], summary["images"]) == (3, 48)
    assert "3 of 16 images" in (tmp_path / "run" / "README.md").read_text()
    assert finetune(config, [*large, "optimizer.max_steps=4"], tmp_path / "run", extend=True)
    assert len(losses(tmp_path / "run")) == 4


def test_more_images_after_a_fit_can_be_let_pass(tiny_model_folder, tmp_path):
    """The steps of the checkpoint took 8 images, and those after it take 16; positions and the summary count them."""
    few, more = (write_code_set(tmp_path / f"of{count}", tiny_model_folder, count) for count in (9, 17))
    large = {"total_batch_size": 64, "local_batch_size": 1}
    config = write_config(tmp_path / "run.yaml", tiny_model_folder, few, experiment=large, optimizer={"max_steps": 2})
    out, longer = tmp_path / "run", [f"data.train={more}", "optimizer.max_steps=4"]
    assert finetune(config, [], out)
    before = (out / "run.yaml").read_text()
    with pytest.raises(CheckpointError, match="the data set has changed since the checkpoint of step 2"):
        finetune(config, longer, out, extend=True)
    assert (out / "run.yaml").read_text() == before, "an error has changed the run"
    assert finetune(config, longer, out, extend=True, ignore_fingerprint=True)
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["updates"], summary["images"]) == (4, 2 * 8 + 2 * 16)
    assert "4 of 16 images" in (out / "README.md").read_text()
    assert f"train: {more}," in (out / "run.yaml").read_text()


def test_a_run_never_resumes_with_another_size_of_batch(world, tmp_path, monkeypatch):
    """A step of a fitted batch depends on the number of devices where that is no power of two."""
    from mindalle_jax.training.config import RunConfig

    config, _ = world
    assert finetune(config, ["optimizer.max_steps=2", "training.warmup_steps=0"], tmp_path / "run")
    plan = RunConfig.plan_batches
    monkeypatch.setattr(RunConfig, "plan_batches", lambda *a: plan(*a)._replace(total=16, local=2))
    with pytest.raises(CheckpointError, match="a step took 8 images, and would take 16 now"):
        finetune(config, ["optimizer.max_steps=3", "training.warmup_steps=0"], tmp_path / "run", extend=True)
