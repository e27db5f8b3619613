"""The folder of a run: when a run may start or resume there, and from which model."""

import dataclasses
import errno
import os
import shutil

import jax.numpy as jnp
import pytest
from commands import python

from mindalle_jax.config.file import load_config
from mindalle_jax.errors import ConfigError, OutputError
from mindalle_jax.storage import files
from mindalle_jax.training.checkpoint import Checkpoints
from mindalle_jax.training.config import FinetuneConfig, LoopConfig, RunConfig
from mindalle_jax.training.finetune import read_finetune
from mindalle_jax.training.run_dir import (
    CONFIG_FILE,
    EXPORTED,
    LOCK,
    RECONSTRUCTIONS_FILE,
    START,
    check_base,
    check_run_dir,
    create_run_dir,
    lock_run_dir,
    start_folder,
)

CONFIG = RunConfig()
OTHER = RunConfig(training=LoopConfig(seed=1))


@pytest.fixture
def resumable(tmp_path):
    """A folder with a run of CONFIG that has a checkpoint."""
    out = tmp_path / "out"
    create_run_dir(out, CONFIG)
    with Checkpoints(out / "checkpoints") as saved:
        saved.save(1, {"a": jnp.zeros(2)}, data_state={})
    return out


def test_a_new_folder_gets_the_configuration(tmp_path):
    check_run_dir(tmp_path / "out", CONFIG)
    assert not (tmp_path / "out").exists(), "the check has written"
    create_run_dir(tmp_path / "out", CONFIG)
    assert load_config(tmp_path / "out" / CONFIG_FILE, kind=RunConfig) == CONFIG
    check_run_dir(tmp_path / "out", CONFIG)


def test_a_run_is_resumed_with_its_own_configuration(resumable):
    check_run_dir(resumable, CONFIG)
    with pytest.raises(ConfigError, match="training.seed was 0 and is 1; name another folder, or undo the changes"):
        check_run_dir(resumable, OTHER)


def test_fields_without_effect_may_change(resumable):
    check_run_dir(resumable, RunConfig(training=LoopConfig(keep_checkpoints=9, sample_every_steps=3)))


def test_a_run_without_a_checkpoint_starts_again_with_any_configuration(tmp_path):
    """Its start folder goes, too: it was made with the other seed."""
    out = tmp_path / "out"
    create_run_dir(out, CONFIG)
    (out / START).mkdir()
    for name in (EXPORTED, "samples", "tensorboard"):
        (out / name).mkdir()
    (out / RECONSTRUCTIONS_FILE).touch()
    check_run_dir(out, OTHER)
    create_run_dir(out, OTHER)
    assert [path.name for path in out.iterdir()] == [CONFIG_FILE]
    assert load_config(out / CONFIG_FILE, kind=RunConfig) == OTHER


@pytest.mark.parametrize("name", ["manifest.json", "summary.json"])
def test_a_result_without_its_checkpoints_is_never_replaced(resumable, name):
    """Somebody has deleted them to free the disk, and types the command again."""
    (resumable / name).touch()
    check_run_dir(resumable, CONFIG)
    shutil.rmtree(resumable / "checkpoints")
    with pytest.raises(OutputError, match="holds the result of a run whose checkpoints are gone"):
        check_run_dir(resumable, CONFIG)


def test_the_start_of_a_run_with_a_checkpoint_stays(resumable):
    (resumable / START).mkdir()
    create_run_dir(resumable, CONFIG)
    assert (resumable / START).is_dir()


def test_a_folder_with_hidden_files_is_empty(tmp_path):
    """A file manager leaves them, and a kill at the very start."""
    (tmp_path / ".DS_Store").touch()
    assert check_run_dir(tmp_path, CONFIG) is None


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_no_run_is_left_alone(tmp_path, kind):
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
        (out / "thesis.txt").write_text("mine")
    else:
        out.write_text("mine")
    said = "is not empty and holds no run to resume" if kind == "folder" else "is a file, not a folder"
    with pytest.raises(OutputError, match=said):
        check_run_dir(out, CONFIG)


@pytest.fixture
def finetuning(tmp_path, tiny_model_folder) -> FinetuneConfig:
    (tmp_path / "run.yaml").write_text(f"training: {{init_from: {tiny_model_folder}}}\n")
    return read_finetune(tmp_path / "run.yaml", [])[0]


def test_a_model_of_the_same_kind_is_its_own_start(finetuning, tiny_model_folder, tmp_path):
    check_base(finetuning, tiny_model_folder)
    assert start_folder(finetuning, tiny_model_folder, tmp_path / "out") == tiny_model_folder
    assert not (tmp_path / "out").exists()


def test_rates_of_dropout_change_no_weight(finetuning, tiny_model_folder):
    stage2 = finetuning.stage2
    dropout = dataclasses.replace(stage2, hparams=dataclasses.replace(stage2.hparams, attn_pdrop=0.5))
    check_base(dataclasses.replace(finetuning, stage2=dropout), tiny_model_folder)
    deeper = dataclasses.replace(stage2, hparams=dataclasses.replace(stage2.hparams, n_layers=3))
    with pytest.raises(ConfigError, match="does not fit: stage2.hparams.n_layers was 2 and is 3"):
        check_base(dataclasses.replace(finetuning, stage2=deeper), tiny_model_folder)


# The lock


def test_two_runs_never_train_in_one_folder(tmp_path):
    """The second start is one sentence that names the first; the lock ends with the block, also after an error."""
    with lock_run_dir(tmp_path / "run"):
        with pytest.raises(OutputError) as caught, lock_run_dir(tmp_path / "run"):
            raise AssertionError("both hold the lock")
        assert f"run: process {os.getpid()} on " in str(caught.value)
        assert str(caught.value).endswith(" trains in this folder; wait for it, or name another folder")
        with lock_run_dir(tmp_path / "other"):
            pass
    with pytest.raises(ZeroDivisionError), lock_run_dir(tmp_path / "run"):
        raise ZeroDivisionError
    with lock_run_dir(tmp_path / "run"):
        pass


def test_a_killed_process_leaves_no_lock(tmp_path):
    code = f"import os; from mindalle_jax.training.run_dir import *\nwith lock_run_dir(Path({str(tmp_path)!r})):\n"
    code += "    os.kill(os.getpid(), 9)"
    assert python("-c", code).returncode == -9
    assert (tmp_path / LOCK).exists()
    with lock_run_dir(tmp_path):
        pass


def test_a_disk_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
    """Windows has no fcntl, and some network disks refuse."""

    def refuse(file, wait):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files, "lock_file", refuse)
    with lock_run_dir(tmp_path):
        pass
    assert "no locks on this disk (No locks available); start one run at a time" in caplog.text
