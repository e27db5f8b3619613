"""Fine-tuning from Python."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mindalle_jax.config.file import ConfigFile
from mindalle_jax.data.memory import NAME, Pairs
from mindalle_jax.errors import UsageError
from mindalle_jax.image_gpt import ImageGPT
from mindalle_jax.pipeline import Dalle
from mindalle_jax.training.config import FinetuneConfig
from mindalle_jax.training.finetune import FinetuneRun, read_finetune
from mindalle_jax.training.loop import check_early, run_training

Data = str | os.PathLike[str] | Pairs


def finetune(
    config: str | os.PathLike[str],
    *,
    data: Data,
    out: str | os.PathLike[str],
    valid: Data | None = None,
    overrides: Sequence[str] = (),
    callbacks: Sequence[Callable[[dict[str, Any]], bool | None]] = (),
    ignore_fingerprint: bool = False,
    extend: bool = False,
) -> Dalle | ImageGPT:
    """Trains a model on your images, as `mindalle finetune` does, or resumes a run.

    Args:
        config: the name of a preset, such as "finetune-captions", or a YAML file.
        data: the path of a data set; or pairs of an image and its captions (a text or a list of texts) or label (a
            number or a name): a list, or any object with `len` and items. An image is a PIL image, an array
            uint8[H, W, 3], encoded bytes, or a path.
        out: folder of the run. A run that is there is resumed.
        valid: the same for validation; None turns it off. With it the result is the best checkpoint.
        overrides: changes to the configuration, such as "optimizer.base_lr=1e-4".
        callbacks: functions that get the metrics of each step and validation as a dict: step, kind ("train" or
            "valid"), loss and more. If one returns True, the run ends early, two steps later at most.
        ignore_fingerprint: if True, resumes even if the data set has changed.
        extend: if True, resumes a run, also a complete one, with more steps or epochs than it had.

    Returns:
        The model of the folder `out`, loaded.

    Raises:
        ConfigError: a field is wrong, or batch size, devices and number of images do not fit.
        DataError: the data cannot be read or used.
        CheckpointError: the model to start from, or a checkpoint, is damaged or is another one.
        OutputError: the folder cannot be written to, or another process trains in it.
        NonFiniteError: ten steps in a row have no finite loss.
        DeviceMemoryError: a step does not fit into the memory of the device.
        UsageError: the run was stopped by a signal before it had a result, or there is no run to extend.
    """
    out = Path(os.path.expanduser(out))
    sources = {"train": data, "valid": valid}
    fields = [
        f"data.{name}={os.fspath(one) if isinstance(one, (str, os.PathLike)) else NAME}"
        for name, one in sources.items()
        if one is not None
    ]
    changes = [*overrides, *fields]
    check_early(ConfigFile(config, changes), FinetuneConfig, in_memory=NAME)
    read, base = read_finetune(Path(config), changes)

    def make_run() -> FinetuneRun:
        pairs = {name: one for name, one in sources.items() if not isinstance(one, (str, os.PathLike, type(None)))}
        run = FinetuneRun(read, base, out, pairs=pairs)
        run.callbacks = tuple(callbacks)
        return run

    if not run_training(read, out, make_run, ignore_fingerprint=ignore_fingerprint, extend=extend):
        raise UsageError(f"{out}: the run was stopped by a signal; call finetune again to resume it")
    return (ImageGPT if read.image_only else Dalle).from_pretrained(out)
