"""Makes a model from a checkpoint of a run, also of a run that is not finished."""

import contextlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from mindalle_jax.config.file import ConfigFile, load_config
from mindalle_jax.data.codes import vqgan_digest
from mindalle_jax.data.records import Columns
from mindalle_jax.data.sources import open_source
from mindalle_jax.errors import CheckpointError, MindalleError, UsageError
from mindalle_jax.hub.resolve import find_model
from mindalle_jax.storage.files import new_folder
from mindalle_jax.storage.weights import MANIFEST, read_manifest
from mindalle_jax.training.checkpoint import Checkpoints
from mindalle_jax.training.config import SCRATCH, FinetuneConfig
from mindalle_jax.training.finetune import write_finetuned
from mindalle_jax.training.run_dir import CONFIG_FILE, EXPORTED, START

WhichStep = int | Literal["best", "last"]


def export_checkpoint(run: Path, out: Path, *, step: WhichStep = "last", overwrite: bool = False) -> str:
    """Writes the model of one checkpoint into a new folder, and returns a line that describes it.

    run: folder of a run of `mindalle finetune`; nothing in it changes, and it may be running. out: the new folder,
    which appears when it is complete. step: "last" is the newest, "best" has the lowest validation loss.

    Raises UsageError for another kind of folder or an unknown step, CheckpointError for a damaged checkpoint, and
    OutputError if `out` cannot be written to.
    """
    run, out = Path(os.path.expanduser(run)), Path(os.path.expanduser(out))
    if not (run / CONFIG_FILE).is_file():
        raise UsageError(f"{run}: is no run of training; it has no {CONFIG_FILE}")
    if not ConfigFile(run / CONFIG_FILE).has("stage2"):
        raise UsageError(f"{run}: is no run of mindalle finetune; its checkpoints cannot be exported")
    config = load_config(run / CONFIG_FILE, kind=FinetuneConfig)
    saved = Checkpoints(run / "checkpoints")
    chosen = _choose(saved, run, step)
    training = config.training
    base = run / START
    if not base.is_dir():
        base = find_model(training.vqgan if training.init_from == SCRATCH else training.init_from)
    trained = saved.read(chosen, "ema") or saved.read(chosen, "params")
    with new_folder(out, overwrite=overwrite, marks=(MANIFEST,)) as folder:
        data_state = saved.data_state(chosen)
        seen = chosen, data_state.get("batch_size", data_state["loader"]["next_index"] // chosen)
        write_finetuned(config, base, folder, trained, _captions(config, base), data_state.get("classes"), seen)
    return f"{out}: the model of step {chosen}"


def newest_model(run: Path) -> tuple[Path, int]:
    """Returns the folder of the newest model of a run that is not finished, and its step.

    It is the folder of the run if that holds the model of its newest or best checkpoint, which a stopped run leaves;
    else RUN/exported/step_N, which is written unless it is there, and whose older ones are deleted. Raises as
    export_checkpoint.
    """
    saved = Checkpoints(run / "checkpoints")
    if (run / MANIFEST).is_file():
        step: int | None = read_manifest(run).get("step")
        if step is not None and step in (saved.latest_step(), saved.best_step()):
            return run, step
    step = _choose(saved, run, "last")
    model = run / EXPORTED / f"step_{step:06d}"
    if not model.exists():
        export_checkpoint(run, model, step=step)
        for older in model.parent.iterdir():
            if older != model:
                shutil.rmtree(older, ignore_errors=True)
    return model, step


def _choose(saved: Checkpoints, run: Path, step: WhichStep) -> int:
    steps = saved.steps()
    if not steps and (run / MANIFEST).is_file():
        raise CheckpointError(f"{run}: its checkpoints are gone; the folder itself is a model")
    if not steps:
        raise CheckpointError(f"{run}: holds no checkpoint yet")
    if step == "last":
        return steps[-1]
    if step == "best":
        best = saved.best_step()
        if best is None:
            raise UsageError(f"{run}: no checkpoint has a validation loss; take the last one, or set data.valid")
        return best
    if step not in steps:
        raise UsageError(f"{run}: there is no checkpoint of step {step}, only {', '.join(map(str, steps))}")
    return step


def _captions(config: FinetuneConfig, base: Path) -> Iterable[str]:
    """Returns the captions of the training data; none if the data is not there any more, or has none."""
    columns = Columns(config.data.image_column, config.data.caption_column)
    with contextlib.suppress(MindalleError, OSError):
        source = open_source(config.data.train, "text", columns=columns, vqgan=vqgan_digest(base))
        return [caption for sample in source.samples for caption in sample.captions]
    return []
