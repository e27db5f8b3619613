"""The folder of a run: checks whether a run may start or resume in it, and from which model."""

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from mindalle_jax.config.file import dump_config, load_config
from mindalle_jax.errors import ConfigError, OutputError, UsageError
from mindalle_jax.storage.files import check_writable, disk_errors, hold_lock, replace_text
from mindalle_jax.storage.initialize import check_upstream, write_fresh, write_transfer
from mindalle_jax.storage.weights import MANIFEST
from mindalle_jax.training.checkpoint import Checkpoints
from mindalle_jax.training.config import SCRATCH, FinetuneConfig, RunConfig
from mindalle_jax.training.summary import SUMMARY_FILE

CONFIG_FILE = "run.yaml"
LOCK = ".lock"
START = "start"
"""Folder with the model that a transfer or a run from scratch starts from."""
RECONSTRUCTIONS_FILE = "reconstructions.png"
"""Sheet of images of the data above their reconstructions."""
EXPORTED = "exported"
"""Folder with the models that `mindalle sample` made of checkpoints."""
# Fields that may change when a run resumes, because they have no effect on what is learned.
# Places are among them: checkpoints hold fingerprints of the data and of the model to start from, wherever these lie.
FREE_FIELDS = (
    "data.train", "data.valid", "training.init_from", "training.vqgan", "training.tokenizer",
    "data.threads", "experiment.local_batch_size", "experiment.valid_batch_size", "experiment.save_ckpt_freq",
    "experiment.test_freq", "training.keep_checkpoints", "training.checkpoint_every_steps",
    "training.validate_every_steps", "training.early_stopping", "training.sample_every_steps",
    "training.sample_prompts", "training.remat", "training.flash_attention", "sharding",
)  # fmt: skip

LENGTH_FIELDS = ("optimizer.max_steps", "experiment.epochs")
"""Fields that may change when a run is extended."""


def check_base(config: FinetuneConfig, base: Path) -> None:
    """Raises ConfigError if a run of `config` cannot start from the model in the folder `base`."""
    theirs = load_config(base / "config.yaml")
    scratch = config.training.init_from == SCRATCH
    if not scratch and theirs.image_only != config.image_only:
        return check_upstream(theirs, config.model_config())
    before, now = (_flat(dataclasses.asdict(c)) for c in (theirs, config.model_config()))
    # Only the fields of the two stages decide the shapes of the weights, and among them dropout rates do not.
    shaped = "stage1" if scratch else "stage"
    shaping = {path: value for path, value in now.items() if path.startswith(shaped) and "pdrop" not in path}
    if lines := _differences(before, shaping):
        raise ConfigError(f"the model to start from, {base}, does not fit: {'; '.join(lines)}")


def start_folder(config: FinetuneConfig, base: Path, out: Path) -> Path:
    """Returns the folder whose weights a run starts from: `base`, or a new folder in the folder of the run.

    The new folder is written for a transfer, whose weights are partly fresh, and for a run from scratch.
    """
    training, start = config.training, out / START
    scratch = training.init_from == SCRATCH
    if not scratch and load_config(base / "config.yaml").image_only == config.image_only:
        return base
    if not start.exists() and jax.process_index() == 0:
        if scratch:
            tokenizer = Path(training.tokenizer or base / "tokenizer")
            write_fresh(base, tokenizer, config.model_config(), start, seed=training.seed)
        else:
            write_transfer(base, config.model_config(), start, head=training.head, seed=training.seed)
    return start


def check_run_dir(out: Path, config: RunConfig, *, extend: bool = False) -> RunConfig | None:
    """Returns the configuration of the run in `out` that is to resume; None for a new run.

    extend: the run may have another length. A run without a checkpoint has nothing to resume from: it starts again,
    with any configuration. Raises OutputError if `out` is neither empty nor the folder of a run, or cannot be written
    to, or holds a result whose checkpoints somebody has deleted, ConfigError if the run in it has another
    configuration, and UsageError if there is no run to extend.
    """
    file, before = out / CONFIG_FILE, None
    if file.exists() and Checkpoints(out / "checkpoints").latest_step() is not None:
        before = load_config(file, kind=type(config))
        theirs, ours = (_flat(dataclasses.asdict(one)) for one in (before, config))
        free = (*FREE_FIELDS, *(LENGTH_FIELDS if extend else ()))
        if lines := _differences(theirs, ours, free):
            longer = any(ours[name] > theirs[name] for name in LENGTH_FIELDS)
            only_length = longer and not _differences(theirs, ours, (*FREE_FIELDS, *LENGTH_FIELDS))
            advice = "; --extend (in Python: extend=True) makes a run longer" if only_length else ""
            raise ConfigError(
                f"{out} holds a run of another configuration: {'; '.join(lines)}; name another folder, or "
                f"undo the changes{advice}"
            )
    elif extend:
        raise UsageError(f"{out} holds no run with a checkpoint, so there is nothing to extend")
    elif file.exists() and any((out / name).exists() for name in (MANIFEST, SUMMARY_FILE)):
        raise OutputError(
            f"{out} holds the result of a run whose checkpoints are gone, so it cannot be resumed, and a new run would "
            "replace it; name another folder, or delete this one"
        )
    elif out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file, not a folder; name another one")
    elif not file.exists() and out.exists() and _visible(out):
        raise OutputError(f"{out} exists, is not empty and holds no run to resume; name another folder")
    check_writable(out)
    return before


@contextlib.contextmanager
def lock_run_dir(out: Path) -> Iterator[None]:
    """Holds the lock of a run within the block, so that two processes never train in one folder.

    The lock ends with the process, also if it is killed. Of several processes that train together the first one holds
    it. Raises OutputError if another process holds it, or the folder cannot be written to.
    """
    if jax.process_index() != 0:
        yield
        return

    def refuse(holder: str) -> None:
        raise OutputError(f"{out}: {holder} trains in this folder; wait for it, or name another folder")

    with hold_lock(out / LOCK, refuse, "start one run at a time"):
        yield


def create_run_dir(out: Path, config: RunConfig) -> None:
    """Creates the folder of a new run and writes its configuration; deletes what a run without a checkpoint left.

    The folder of a run with a checkpoint stays as it is. Raises OutputError if the folder cannot be written to.
    """
    if Checkpoints(out / "checkpoints").latest_step() is not None or jax.process_index() != 0:
        return
    with disk_errors(out):
        for name in (START, EXPORTED, "samples", "tensorboard"):
            shutil.rmtree(out / name, ignore_errors=True)
        (out / RECONSTRUCTIONS_FILE).unlink(missing_ok=True)
        out.mkdir(parents=True, exist_ok=True)
    write_config(out, config)


def write_config(out: Path, config: RunConfig) -> None:
    """Writes the configuration into the folder of a run. Raises OutputError."""
    if jax.process_index() == 0:
        with disk_errors(out):
            replace_text(out / CONFIG_FILE, dump_config(config))


def _visible(folder: Path) -> bool:
    """Returns whether a folder has files that are not hidden. A lock and a partial file do not count."""
    return any(not path.name.startswith(".") for path in folder.iterdir())


def _differences(theirs: dict[str, Any], ours: dict[str, Any], free: tuple[str, ...] = ()) -> list[str]:
    """Returns a text per field that differs and is not one of `free`."""
    return [
        f"{path} was {theirs[path]!r} and is {value!r}"
        for path, value in ours.items()
        if theirs[path] != value and not path.startswith(free)
    ]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turns {"a": {"b": 1}} into {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
