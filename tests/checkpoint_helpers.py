"""Meshes and states of test_checkpoint.py and test_digest.py, and what other processes do there.

Imported by a fork server: it must start no backend of JAX.
"""

import os
import shutil
import time
from multiprocessing.connection import Connection
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mindalle_jax.training.checkpoint import Checkpoints

LEAVES = 6
MESHES = {
    "1": ((1,), ("data",)),
    "8": ((8,), ("data",)),
    "3": ((3,), ("x",)),  # divides nothing
    "2x4": ((2, 4), ("data", "model")),
    "4x2, other names": ((4, 2), ("fsdp", "tensor")),
}


def mesh_of(name: str) -> Mesh:
    shape, axes = MESHES[name]
    return Mesh(np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape), axes)


def sharding_of(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """The axes of the mesh, the last one first, over those dimensions that they divide."""
    pairs = zip(mesh.axis_names[::-1], shape, strict=False)
    axes = [axis if size and size % mesh.shape[axis] == 0 else None for axis, size in pairs]
    return NamedSharding(mesh, PartitionSpec(*axes))


def expected(step: int) -> dict[str, np.ndarray]:
    """A state of 1.5 MB whose every bit depends on the step."""
    words = np.random.Generator(np.random.Philox(key=step)).integers(0, 2**32, (LEAVES, 256, 256), np.uint32)
    return {f"leaf{i}": words[i] for i in range(LEAVES)}


def target(sharding: jax.sharding.Sharding) -> dict[str, jax.ShapeDtypeStruct]:
    """What restores `expected`."""
    return {f"leaf{i}": jax.ShapeDtypeStruct((256, 256), np.uint32, sharding=sharding) for i in range(LEAVES)}


def save_until_killed(folder: Path, slow_deletion: bool, acknowledge: Connection) -> None:
    """Saves step after step, and sends the number of each that is complete."""
    if slow_deletion:
        shutil.rmtree = _delete_slowly  # pyright: ignore[reportAttributeAccessIssue]
    with Checkpoints(folder, keep=1, fingerprint="f") as checkpoints:
        step = (checkpoints.latest_step() or 0) + 1
        while True:
            # The loss falls and rises, so that the best step is at times an older one.
            loss = abs(step % 7 - 3)
            checkpoints.save(step, jax.device_put(expected(step)), data_state={"at": step}, validation_loss=loss)
            checkpoints.wait()
            acknowledge.send(step)
            step += 1


def _delete_slowly(folder: Path, ignore_errors: bool) -> None:
    assert ignore_errors
    for parent, _, files in os.walk(folder, topdown=False):
        for name in files:
            os.unlink(Path(parent) / name)
            time.sleep(0.005)
        os.rmdir(parent)


def restore_and_save(folder: Path, process: int, address: str) -> None:
    """One of two processes with two devices each: restores step 1 and saves it again as step 2."""
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    jax.distributed.initialize(
        coordinator_address=address,
        num_processes=2,
        process_id=process,
        coordinator_bind_address=address,
        cluster_detection_method="deactivate",
        initialization_timeout=60,
    )
    assert (jax.process_count(), jax.local_device_count()) == (2, 2)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("rows", "columns"))
    sharding = NamedSharding(mesh, PartitionSpec("rows", "columns"))
    with Checkpoints(folder, fingerprint="f") as checkpoints:
        restored = checkpoints.restore(target(sharding))
        assert (restored.step, restored.data_state) == (1, {"at": 1})
        for name, whole in expected(1).items():
            for shard in restored.state[name].addressable_shards:
                np.testing.assert_array_equal(shard.data, whole[shard.index])
        checkpoints.save(2, restored.state, data_state={"at": 2})
    jax.distributed.shutdown()
