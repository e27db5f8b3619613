"""Where a network runs, and how precisely: what models and rankers decide alike."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mindalle_jax.errors import DeviceMemoryError, UsageError, one_line
from mindalle_jax.runtime.cache import cache_dir

DType = Literal["bfloat16", "float32"]


CPU_DEVICES = min(8, os.cpu_count() or 1)
"""Devices that the cores of a CPU make. Products of a small network do not keep two cores busy, nor does attention,
which XLA computes on one: on two cores, two devices take two thirds of the time of one. docs/log.md has more."""


def choose_devices(mesh: Mesh | None, dtype: DType | None, *, small: bool = False) -> tuple[Mesh, DType]:
    """The mesh and the compute dtype: by default the first device, float32 on CPU and bfloat16 elsewhere.

    small: of a network that is: on CPU all devices, see CPU_DEVICES.
    Raises UsageError for a mesh with other axes than "data", and for another dtype.
    """
    if mesh is not None and mesh.axis_names != ("data",):
        raise UsageError(f"mesh must have the one axis 'data', not {mesh.axis_names}")
    if dtype not in ("float32", "bfloat16", None):
        raise UsageError(f"dtype must be 'bfloat16', 'float32' or None, not {dtype!r}")
    if mesh is None:
        divide_cpu()
        devices = jax.devices()
        devices = devices[: CPU_DEVICES if small and devices[0].platform == "cpu" else 1]
    else:
        devices = mesh.devices
    # Mesh and not make_mesh, whose axes are of the explicit kind by default.
    mesh = Mesh(np.array(devices), ("data",))
    # XLA on CPU has fast float32 matrix products only.
    return mesh, dtype or ("float32" if mesh.devices.flat[0].platform == "cpu" else "bfloat16")


def first_devices(mesh: Mesh, count: int, replicated: Any) -> tuple[Mesh, Any]:
    """The mesh of the first `count` devices, and arrays that are replicated over the mesh as they lie there."""
    if count == mesh.size:
        return mesh, replicated
    devices = mesh.devices.flat[:count]
    fewer = Mesh(devices, mesh.axis_names)
    sharding = NamedSharding(fewer, PartitionSpec())

    def narrow(x: jax.Array) -> jax.Array:
        lies = {shard.device: shard.data for shard in x.addressable_shards}
        return jax.make_array_from_single_device_arrays(x.shape, sharding, [lies[device] for device in devices])

    return fewer, jax.tree.map(narrow, replicated)


def divide_cpu() -> None:
    """Lets JAX see CPU_DEVICES, unless somebody said how many there are, or it has looked already.

    To be called before anything of JAX: the first array, or key, makes it look.
    """
    told = jax.config.values["jax_num_cpu_devices"] >= 0
    if not told and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", CPU_DEVICES)
            global _divided
            _divided = True


_divided = False


def training_devices() -> list[Any]:
    """All devices that somebody gave JAX: of a CPU that divide_cpu divided the first, so that a run is the same after
    a model was loaded and before."""
    devices = jax.devices()
    return devices[:1] if _divided and devices[0].platform == "cpu" else devices


def matmul_precision(dtype: Any) -> Any:
    """A context in which float32 means float32: GPUs and TPUs would otherwise multiply in fewer bits."""
    return jax.default_matmul_precision("highest" if jnp.dtype(dtype) == jnp.float32 else "default")


@contextlib.contextmanager
def device_memory(message: str) -> Iterator[None]:
    """Turns XLA's lack of memory into a DeviceMemoryError with the message."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DeviceMemoryError(message) from error


def use_compilation_cache() -> None:
    """Compiled programs are kept on disk, unless JAX was told where to keep them, or not to."""
    if jax.config.values["jax_compilation_cache_dir"] is None and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))
        # A small model has many programs that compile in less than the second below which JAX keeps none.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def join_processes() -> None:
    """Makes this process one of several that train together; before any other use of a device.

    JAX_COORDINATOR_ADDRESS (HOST:PORT of the first process), JAX_NUM_PROCESSES and JAX_PROCESS_ID in the environment
    say which; what is not there JAX finds out from Slurm, Open MPI, Kubernetes or a TPU pod.
    Raises UsageError where that does not say, or the others cannot be reached.
    """
    count, index = _number("JAX_NUM_PROCESSES"), _number("JAX_PROCESS_ID")
    try:
        jax.distributed.initialize(num_processes=count, process_id=index)
    except (ValueError, RuntimeError) as error:  # JaxRuntimeError is one
        raise UsageError(
            f"the processes cannot be joined: {one_line(error)}; set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and "
            "JAX_PROCESS_ID, or run without --distributed"
        ) from error


def _number(name: str) -> int | None:
    """A number from the environment. Raises UsageError for what is none."""
    text = os.environ.get(name)
    if text is not None and not text.isdecimal():
        raise UsageError(f"{name} must be a number, not {text!r}")
    return None if text is None else int(text)
