"""Checkpoints: the state of a training on disk.

A checkpoint is written while training continues. It is either complete or not there at all, and every read verifies
it. A folder of checkpoints holds one folder per kept step, which Orbax writes:

    300/state/                  the arrays, uncompressed: weights hardly shrink, and compressing them takes longer
    300/record/record.json      the position in the data, the validation loss, and path, shape, dtype and digest of
                                every array; a CRC-32 over all of it
    400.orbax-checkpoint-tmp/   a step being written, or left by a process that was killed
    .removed/                   steps being deleted

A complete folder is renamed to the number of its step. Before its first file is deleted, it is renamed again, into
`.removed`. So a process may be killed at any time. Several processes may save and restore together if they share the
folder. Only one training may write to it; other programs may read it meanwhile.
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
import numpy as np
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
    """The arrays, in a tree with the structure, dtypes and shardings of the target."""
    data_state: dict[str, Any]
    """The data_state given to `save`, after a way through JSON: tuples have become lists, and keys strings."""
    step: int


class Checkpoints:
    """The checkpoints of one training, as a context manager. Its end waits for the last save, also after an error.

    folder: where the checkpoints are; the first save makes it. keep: number of newest steps to keep; the step of the
    lowest validation loss is kept as well. fingerprint: a digest of the data set; `restore` refuses a checkpoint with
    another one. Raises UsageError if keep is below 1.

    Reading changes nothing on disk. The first save deletes the partial files of killed processes. When several
    processes train together, each makes the same calls with the same arguments, also the same `data_state`.
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
            error.add_note(str(failed))  # the error that ended the training matters more

    def steps(self) -> list[int]:
        """Returns the steps of the complete checkpoints on disk, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdecimal() and path.is_dir())

    def latest_step(self) -> int | None:
        """Returns the step of the newest checkpoint, or None."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """Returns the step of the checkpoint with the lowest finite validation loss, or None."""
        return self._best(self.steps())

    def save(
        self, step: int, state: Any, *, data_state: Mapping[str, Any], validation_loss: float | None = None
    ) -> None:
        """Saves `state`, a tree of jax.Arrays with any sharding, and `data_state`, which must be JSON.

        Returns as soon as the arrays are copied from the devices, so the caller may donate them. Writing continues in
        the background. If it fails, the next call of save, restore, wait or close raises the error. Older steps are
        deleted only after this step is complete. Random keys are saved as jax.random.key_data(key).

        Raises OutputError if the disk has too little space, cannot be written to, or holds this step or a later one.
        Raises UsageError for typed random keys.
        """
        self.wait()
        newest = self.latest_step()
        if newest is not None and step <= newest:
            raise OutputError(
                f"{self.folder}: step {step} is not after step {newest}, which is saved already; name another folder, "
                "or remove the later steps first (delete_after) to resume from an older step"
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
        arrays = {path: leaf for path, leaf in leaves.items() if leaf.size}  # Orbax refuses arrays of size 0
        items = {_STATE: ocp.args.PyTreeSave(arrays), _RECORD: ocp.args.JsonSave(_seal(record))}
        self._losses[step] = validation_loss
        self._saving = step
        with self._save_errors():
            manager = self._manager = self._manager or self._open()
            check_free_disk(self.folder, sum(leaf.nbytes for leaf in arrays.values()), f"the checkpoint of step {step}")
            manager.save(step, args=ocp.args.Composite(**items), force=True)  # the caller decides when to save

    def restore(self, target: Any, step: int | None = None, *, ignore_fingerprint: bool = False) -> Restored:
        """Reads a step, by default the newest, and verifies every array by the digest that was saved with it.

        target: the tree that was saved, with a jax.ShapeDtypeStruct in place of each array. Each needs a sharding; the
        mesh and the number of processes may differ from those of the save. ignore_fingerprint: accept a checkpoint
        made with another data set.

        Raises CheckpointError if there is no such step, if the target has other paths, shapes or dtypes (the message
        lists all of them), if the step is damaged, or if it was made with another data set. Raises DeviceMemoryError
        if the arrays do not fit into the memory of the devices, and UsageError for a target without shardings.
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
                raise UsageError(f"{path} of the target has no sharding: jax.eval_shape does not set one, so add it")
        record = self._read_record(step)
        self._check_fit(step, record["leaves"], wanted)
        if record["fingerprint"] != self.fingerprint and not ignore_fingerprint:
            raise CheckpointError(
                f"{self.folder}: the data set has changed since the checkpoint of step {step} (it was "
                f"{record['fingerprint'][:28]!r} and is {self.fingerprint[:28]!r}), so its position in the data means "
                "other samples; bring the old data back, or resume with --ignore-fingerprint (in Python: "
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
                raise ValueError(f"the bits have changed since the save in {', '.join(odd)}")
        state = jax.tree.unflatten(jax.tree.structure(target), leaves.values())
        return Restored(state, record["data_state"], step)

    def data_state(self, step: int) -> dict[str, Any]:
        """Returns the data_state that was saved with a step. Raises CheckpointError if the step is damaged."""
        return self._read_record(step)["data_state"]

    def read(self, step: int, part: str) -> dict[str, np.ndarray]:
        """Reads the arrays of one part of the state, such as "params", to the host; returns {path below it: array}.

        It needs no target and verifies each array. A part that the state does not have is empty. Raises CheckpointError
        as restore.
        """
        record = self._read_record(step)
        entries = {path: entry for path, entry in record["leaves"].items() if path.startswith(f"{part}/")}
        if not entries:
            return {}
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        wanted = {
            path: jax.ShapeDtypeStruct(entry["shape"], jnp.dtype(entry["dtype"]), sharding=sharding)
            for path, entry in entries.items()
        }
        arguments = ocp.checkpoint_utils.construct_restore_args(wanted)
        with self._damage(step), ocp.PyTreeCheckpointer() as reader:
            leaves = reader.restore(
                self.folder / str(step) / _STATE,
                ocp.args.PyTreeRestore(wanted, restore_args=arguments, partial_restore=True),
            )
            found = digests(leaves)
            if odd := [path for path, entry in entries.items() if entry["digest"] != found[path]]:
                raise ValueError(f"the bits have changed since the save in {', '.join(odd)}")
        return {path.removeprefix(f"{part}/"): np.asarray(leaf) for path, leaf in leaves.items()}

    def delete_after(self, step: int) -> None:
        """Deletes the steps after `step`, so that a training can resume from it.

        Raises OutputError if the last save failed or the folder cannot be written to.
        """
        self.close()
        self._empty_removed()
        if jax.process_index() == 0:
            with disk_errors(self.folder):
                (self.folder / _REMOVED).mkdir(exist_ok=True)
                for later in reversed(self.steps()):  # newest first: a kill leaves a training without its last steps
                    if later > step:
                        os.rename(self.folder / str(later), self.folder / _REMOVED / str(later))
        self._empty_removed()
        multihost_utils.sync_global_devices("delete_after")
        self._losses = {saved: loss for saved, loss in self._losses.items() if saved <= step}

    def wait(self) -> None:
        """Waits until nothing is being written. Raises OutputError if the last save failed."""
        if self._manager is None:
            return
        with self._save_errors():
            self._manager.wait_until_finished()
        self._empty_removed()

    def close(self) -> None:
        """Waits for the last save and stops Orbax's threads. It may be called again. Raises OutputError as `wait`."""
        self.wait()
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def _empty_removed(self) -> None:
        if jax.process_index() == 0:
            shutil.rmtree(self.folder / _REMOVED, ignore_errors=True)

    def _open(self) -> ocp.CheckpointManager:
        self._empty_removed()  # the files of a killed process would block the same step
        if jax.process_index() == 0:
            # Orbax could do this (cleanup_tmp_directories), but in the background; the free space is checked next.
            for partial in self.folder.glob(f"*{ocp.path.step.TMP_DIR_SUFFIX}*"):
                shutil.rmtree(partial, ignore_errors=True)
        options = ocp.CheckpointManagerOptions(
            create=True,
            # By default Orbax deletes in place. If it is killed meanwhile, half a step stays listed.
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
                self._losses[step] = None  # it stays None if the step is damaged
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
        """Turns all errors of Orbax into OutputError. The next save then opens a new manager, which cleans up."""
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
        except Exception as error:  # Orbax and TensorStore raise errors of many kinds
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
    """Returns an error in one line. Of TensorStore's long messages only the operating system's part is kept."""
    number = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(number[1])) if number else one_line(error)


def _by_path(tree: Any) -> dict[str, Any]:
    """Returns {"params/blocks/ln/scale": leaf}. A dict and a NamedTuple with the same names give the same paths."""
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
    record = json.loads(json.dumps(record))  # the digest covers what will be read: lists for tuples, strings as keys
    return {"crc32": _crc32(record), **record}


def _unseal(text: bytes) -> dict[str, Any]:
    record = json.loads(text)
    crc32 = record.pop("crc32")
    if record["format_version"] != FORMAT_VERSION:
        raise ValueError(f"format {record['format_version']!r}; this version reads format {FORMAT_VERSION}")
    if crc32 != _crc32(record):
        raise ValueError(f"{_RECORD_FILE} does not have the CRC-32 that it was written with")
    return record


def _crc32(record: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


_SEEDS = (0x9E3779B9, 0x7F4A7C15)


def digests(leaves: Mapping[str, jax.Array]) -> dict[str, str]:
    """Returns a digest of 16 hexadecimal digits per array. It covers the bits in their order, not shape and dtype."""
    lanes = jax.device_get({path: _lanes(leaf) for path, leaf in leaves.items()})
    return {path: "".join(f"{int(lane):08x}" for lane in pair) for path, pair in lanes.items()}


@jax.jit
def _lanes(array: jax.Array) -> tuple[jax.Array, ...]:
    """Returns one uint32[] per seed:

        lane(seed) = sum over i of mix(word[i] ^ mix(i ^ seed))  modulo 2**32

    word[i] is element i in C order as an unsigned number; elements of 8 bytes are two words, i is modulo 2**32. mix is
    a bijection that changes about half of the bits for any change of its input. So a change within one word always
    changes both lanes. Any other change, such as two exchanged elements or a block of zeros, goes unseen once in 2**64.
    The order of a sum does not matter, so every device can compute its part.
    """
    words = array.astype(jnp.uint8) if array.dtype == bool else array
    bits = min(8 * words.dtype.itemsize, 32)
    words = jax.lax.bitcast_convert_type(words, f"uint{bits}").astype(jnp.uint32)
    index = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(words.ndim):
        stride = math.prod(words.shape[axis + 1 :]) % 2**32
        index += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride)
    lanes = tuple(_mix(words ^ _mix(index ^ jnp.uint32(seed))) for seed in _SEEDS)
    # One reduction for both lanes: on CPU XLA fuses it with the mixing, which is ten times faster than two sums.
    zeros = (jnp.uint32(0),) * len(lanes)
    return jax.lax.reduce(lanes, zeros, lambda a, b: (a[0] + b[0], a[1] + b[1]), range(words.ndim))


def _mix(x: jax.Array) -> jax.Array:
    """lowbias32 (Chris Wellons, "Prospecting for hash functions", 2018)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
