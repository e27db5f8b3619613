"""The state of a training on disk: written while training continues, whole or not at all, and verified when it is read.

A folder of checkpoints holds one folder for each step that is kept; Orbax writes them:

    300/state/                  the arrays, uncompressed: random floats do not shrink, and compressing takes longer
    300/record/record.json      the position in the data, the validation loss, and path, shape, dtype and digest of
                                every array; a CRC-32 over all of it
    400.orbax-checkpoint-tmp/   a step being written, or left by a process that was killed
    .removed/                   steps being deleted

A folder gets its number by a rename when it is complete, and loses it by one before the first file is deleted, so a
process may be killed at any time. Several processes may save and restore together if they share the folder. One
training writes to it; others may read meanwhile.
"""

import contextlib
import json
import math
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

import mindalle_jax
from mindalle_jax.errors import CheckpointError, OutputError, UsageError, one_line
from mindalle_jax.runtime.devices import device_memory
from mindalle_jax.storage.files import check_free_disk, disk_errors

FORMAT_VERSION = 1
_STATE, _RECORD, _REMOVED = "state", "record", ".removed"
_RECORD_FILE = "record.json"


class Restored(NamedTuple):
    """A checkpoint that `Checkpoints.restore` has read."""

    state: Any
    """The arrays, in the tree, with the dtypes and on the devices that the target asked for."""
    data_state: dict[str, Any]
    """As given to `save`, by way of JSON: tuples are lists, keys are strings."""
    step: int


class Checkpoints:
    """The checkpoints of one training. A context manager: leaving it waits for the last save, also after an error.

    folder: made by the first save. keep: that many newest steps are kept, and the one of the lowest validation loss.
    fingerprint: names the data set; a checkpoint with another one is refused. Reading changes nothing on disk; the
    first save deletes what killed processes left. Raises UsageError for a keep below 1.

    When several processes train together, each makes the same calls with the same arguments, `data_state` too.
    """

    def __init__(self, folder: Path, *, keep: int = 2, fingerprint: str = "") -> None:
        if keep < 1:
            raise UsageError(f"keep={keep}: at least 1 checkpoint must be kept")
        self.folder = folder.absolute()
        self.keep = keep
        self.fingerprint = fingerprint
        self._manager: ocp.CheckpointManager | None = None  # opened by the first save
        self._saving: int | None = None
        self._losses: dict[int, float | None] = {}

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        try:
            self.close()
        except OutputError as failed:
            if error is None:
                raise
            error.add_note(str(failed))  # what ended the training is the news

    def steps(self) -> list[int]:
        """The complete checkpoints on disk, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdecimal() and path.is_dir())

    def latest_step(self) -> int | None:
        """The newest checkpoint, or None."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """The checkpoint of the lowest validation loss among those saved with a finite one, or None."""
        return self._best(self.steps())

    def save(
        self, step: int, state: Any, *, data_state: Mapping[str, Any], validation_loss: float | None = None
    ) -> None:
        """Saves a tree of jax.Arrays, sharded in any way, and `data_state`, which must be JSON.

        Returns when the arrays are copied off the devices, so that they may be donated; writing continues, and an error
        in it is raised by the next call of save, restore, wait or close. Until the step is complete all older ones
        stay. Random keys go in as jax.random.key_data(key). Raises OutputError if the disk is too small, cannot be
        written to, or holds this step or a later one; UsageError for typed random keys.
        """
        self.wait()
        newest = self.latest_step()
        if newest is not None and step <= newest:
            raise OutputError(
                f"{self.folder}: step {step} is not after step {newest}, which is saved already; name another folder, "
                "or to resume from an older step remove the later ones first (delete_after)"
            )
        leaves = _by_path(state)
        for path, leaf in leaves.items():
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                raise UsageError(f"{path} is a typed random key; save jax.random.key_data of it")
        found = digests(leaves)
        record = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "data_state": data_state,
            "fingerprint": self.fingerprint,
            "validation_loss": validation_loss,
            "leaves": {path: {**_describe(leaf), "digest": found[path]} for path, leaf in leaves.items()},
            "versions": {
                "mindalle-jax": mindalle_jax.__version__,
                "jax": jax.__version__,
                "orbax-checkpoint": ocp.__version__,
            },
        }
        arrays = {path: leaf for path, leaf in leaves.items() if leaf.size}  # Orbax refuses those of size 0
        items = {_STATE: ocp.args.PyTreeSave(arrays), _RECORD: ocp.args.JsonSave(_seal(record))}
        self._losses[step] = validation_loss
        self._saving = step
        with self._save_errors():
            manager = self._manager = self._manager or self._open()
            check_free_disk(self.folder, sum(leaf.nbytes for leaf in arrays.values()), f"the checkpoint of step {step}")
            manager.save(step, args=ocp.args.Composite(**items), force=True)  # when to save is the caller's decision

    def restore(self, target: Any, step: int | None = None, *, ignore_fingerprint: bool = False) -> Restored:
        """Reads a step, by default the newest, and verifies every array against the digest made when it was saved.

        target: the tree that was saved, as jax.ShapeDtypeStruct with shardings: any mesh, any number of processes.
        Raises CheckpointError if there is no such step, if the target has other paths, shapes or dtypes (all are
        listed), if the step is damaged, or if it was made with another data set; ignore_fingerprint lets that pass.
        Raises DeviceMemoryError; UsageError for a target without shardings.
        """
        self.wait()
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"{self.folder}: holds no checkpoint")
        step = steps[-1] if step is None else step
        if step not in steps:
            raise CheckpointError(f"{self.folder}: no step {step}; there are {', '.join(map(str, steps))}")
        wanted = _by_path(target)
        for path, leaf in wanted.items():
            if leaf.sharding is None:
                raise UsageError(f"{path} of the target has no sharding; jax.eval_shape gives none, add one")
        record = self._read_record(step)
        self._check_fit(step, record["leaves"], wanted)
        if record["fingerprint"] != self.fingerprint and not ignore_fingerprint:
            raise CheckpointError(
                f"{self.folder / str(step)}: the data set has changed since this checkpoint (its fingerprint was "
                f"{record['fingerprint']!r} and is {self.fingerprint!r}), so its place in the data means other "
                "samples; bring the old data back, or resume with --ignore-fingerprint (in Python: "
                "ignore_fingerprint=True)"
            )
        with (
            self._damage(step),
            device_memory(f"{self.folder / str(step)} does not fit into the memory of the devices"),
        ):
            arrays = {path: leaf for path, leaf in wanted.items() if leaf.size}
            with ocp.StandardCheckpointer() as reader:
                arrays = reader.restore(self.folder / str(step) / _STATE, arrays)
            empty = {path: jnp.zeros(x.shape, x.dtype, device=x.sharding) for path, x in wanted.items() if not x.size}
            leaves = {path: (arrays | empty)[path] for path in wanted}
            found = digests(leaves)
            odd = [path for path, entry in record["leaves"].items() if entry["digest"] != found[path]]
            if odd:
                raise ValueError(f"other bits than were saved in {', '.join(odd)}")
        state = jax.tree.unflatten(jax.tree.structure(target), leaves.values())
        return Restored(state, record["data_state"], step)

    def delete_after(self, step: int) -> None:
        """Deletes the later steps, so that a training can resume from this one. Raises OutputError."""
        self.close()
        self._empty_removed()
        if jax.process_index() == 0:
            with disk_errors(self.folder):
                (self.folder / _REMOVED).mkdir(exist_ok=True)
                for later in reversed(self.steps()):  # the newest first: what a kill leaves is a training cut short
                    if later > step:
                        os.rename(self.folder / str(later), self.folder / _REMOVED / str(later))
        self._empty_removed()
        multihost_utils.sync_global_devices("delete_after")
        self._losses = {saved: loss for saved, loss in self._losses.items() if saved <= step}

    def wait(self) -> None:
        """Returns when nothing is being written. Raises OutputError if the last save failed."""
        if self._manager is None:
            return
        with self._save_errors():
            self._manager.wait_until_finished()
        self._empty_removed()

    def close(self) -> None:
        """Waits, and lets go of Orbax's threads. May be called again. Raises OutputError if the last save failed."""
        self.wait()
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def _empty_removed(self) -> None:
        if jax.process_index() == 0:
            shutil.rmtree(self.folder / _REMOVED, ignore_errors=True)

    def _open(self) -> ocp.CheckpointManager:
        self._empty_removed()  # what a killed process left there would be in the way of the same step
        if jax.process_index() == 0:
            # Not by Orbax (cleanup_tmp_directories): it does so in the background, and free disk is looked at next.
            for partial in self.folder.glob(f"*{ocp.path.step.TMP_DIR_SUFFIX}*"):
                shutil.rmtree(partial, ignore_errors=True)
        options = ocp.CheckpointManagerOptions(
            create=True,
            # Orbax deletes in place by default: a kill meanwhile leaves half a step listed.
            todelete_subdir=_REMOVED,
            preservation_policy=_NewestAndBest(self.keep, self._best),
        )
        handlers = {
            _STATE: ocp.handlers.PyTreeCheckpointHandler(use_compression=False),
            _RECORD: ocp.handlers.JsonCheckpointHandler(filename=_RECORD_FILE),
        }
        return ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def _best(self, steps: Sequence[int]) -> int | None:
        for step in steps:
            if step not in self._losses:
                self._losses[step] = None  # and stays so if the step is damaged
                with contextlib.suppress(CheckpointError):
                    self._losses[step] = self._read_record(step)["validation_loss"]
        losses = {step: loss for step in steps if (loss := self._losses[step]) is not None and math.isfinite(loss)}
        return min(losses, key=losses.__getitem__, default=None)

    def _read_record(self, step: int) -> dict[str, Any]:
        with self._damage(step):
            record = _unseal((self.folder / str(step) / _RECORD / _RECORD_FILE).read_bytes())
            if record["step"] != step:
                raise ValueError(f"its record is of step {record['step']}")
        return record

    @contextlib.contextmanager
    def _save_errors(self) -> Iterator[None]:
        """Turns whatever Orbax raises into OutputError; the next save starts with a new manager, which cleans up."""
        try:
            yield
        except Exception as error:
            manager, self._manager = self._manager, None
            if manager is not None:
                with contextlib.suppress(Exception):
                    manager.close()
            if isinstance(error, OutputError):
                raise
            path = self.folder / str(self._saving)
            raise OutputError(f"{path}: the checkpoint could not be saved: {_reason(error)}") from error

    @contextlib.contextmanager
    def _damage(self, step: int) -> Iterator[None]:
        try:
            yield
        except MemoryError:
            raise
        except Exception as error:  # Orbax and TensorStore raise whatever they like
            older = max((saved for saved in self.steps() if saved < step), default=None)
            remedy = "there is no older step" if older is None else f"try the older step {older}"
            raise CheckpointError(f"{self.folder / str(step)}: damaged: {one_line(error)}; {remedy}") from error

    def _check_fit(self, step: int, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        differences = []
        for path in [*wanted, *(path for path in found if path not in wanted)]:
            has = _text(found[path]) if path in found else "nothing"
            wants = _text(_describe(wanted[path])) if path in wanted else "nothing"
            if has != wants:
                differences.append(f"{path} is {has}, wanted {wants}")
        if differences:
            raise CheckpointError(
                f"{self.folder / str(step)}: does not fit this training: {'; '.join(differences)}; "
                "restore it with the configuration it was saved with"
            )


class _NewestAndBest(ocp.checkpoint_managers.PreservationPolicy):
    def __init__(self, newest: int, best: Callable[[Sequence[int]], int | None]) -> None:
        self.newest, self.best = newest, best

    def should_preserve(self, checkpoints: Sequence[Any], *, context: object) -> Sequence[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*steps[-self.newest :], self.best(steps)}
        return [step in kept for step in steps]


def _reason(error: Exception) -> str:
    """One line. In those of TensorStore, hundreds of characters, what the operating system said is anywhere."""
    number = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(number[1])) if number else one_line(error)


def _by_path(tree: Any) -> dict[str, Any]:
    """{"params/blocks/ln/scale": leaf}: the same for a dict, a tuple and a NamedTuple of the same names."""
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs}
    if len(leaves) != len(pairs):
        raise AssertionError("two leaves have the same path")
    return leaves


def _describe(leaf: Any) -> dict[str, Any]:
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def _text(entry: Mapping[str, Any]) -> str:
    return f"{entry['dtype']}{entry['shape']}"


def _seal(record: Mapping[str, Any]) -> dict[str, Any]:
    record = json.loads(json.dumps(record))  # the digest is of what will be read: lists for tuples, strings as keys
    return {"crc32": _crc32(record), **record}


def _unseal(text: bytes) -> dict[str, Any]:
    record = json.loads(text)
    crc32 = record.pop("crc32")
    if record["format_version"] != FORMAT_VERSION:
        raise ValueError(f"format {record['format_version']!r}; this version reads format {FORMAT_VERSION}")
    if crc32 != _crc32(record):
        raise ValueError(f"{_RECORD_FILE} has another CRC-32 than it was written with")
    return record


def _crc32(record: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


_SEEDS = (0x9E3779B9, 0x7F4A7C15)


def digests(leaves: Mapping[str, jax.Array]) -> dict[str, str]:
    """16 hexadecimal digits for each array, over its bits and their order; neither shape nor dtype enter."""
    lanes = jax.device_get({path: _lanes(leaf) for path, leaf in leaves.items()})
    return {path: "".join(f"{int(lane):08x}" for lane in pair) for path, pair in lanes.items()}


@jax.jit
def _lanes(array: jax.Array) -> tuple[jax.Array, ...]:
    """uint32[], one for each seed:

        lane(seed) = sum over i of mix(word[i] ^ mix(i ^ seed))  modulo 2**32

    word[i] is element i in C order as an unsigned number; elements of 8 bytes are two words, i is modulo 2**32. mix is
    a bijection that changes half of the bits for any change of its input. So a change within one word changes both
    lanes, always, and any other one (two elements exchanged, a block of zeros) goes unseen once in 2**64. A sum has no
    order, which is what lets every device do its part.
    """
    words = array.astype(jnp.uint8) if array.dtype == bool else array
    bits = min(8 * words.dtype.itemsize, 32)
    words = jax.lax.bitcast_convert_type(words, f"uint{bits}").astype(jnp.uint32)
    index = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(words.ndim):
        stride = math.prod(words.shape[axis + 1 :]) % 2**32
        index += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride)
    lanes = tuple(_mix(words ^ _mix(index ^ jnp.uint32(seed))) for seed in _SEEDS)
    # One reduction, not a sum for each lane: on CPU XLA fuses it with the mixing, which is ten times faster.
    zeros = (jnp.uint32(0),) * len(lanes)
    return jax.lax.reduce(lanes, zeros, lambda a, b: (a[0] + b[0], a[1] + b[1]), range(words.ndim))


def _mix(x: jax.Array) -> jax.Array:
    """lowbias32 (Chris Wellons, "Prospecting for hash functions", 2018)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
