"""Chooses devices and precision, and protects our work from the JAX settings of the process."""

import contextlib
import os
import re
from collections.abc import Iterator
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mindalle_jax.errors import DeviceMemoryError, UsageError, one_line
from mindalle_jax.runtime.cache import cache_dir

DType = Literal["bfloat16", "float32"]
Item = TypeVar("Item")


CPU_DEVICES = min(8, os.cpu_count() or 1)
"""Number of virtual CPU devices for a small network. It runs faster with one device per core, because XLA computes
attention on one core: on two cores, two devices take two thirds of the time of one. docs/log.md has more."""

_set_here: set[str] = set()
"""Names of the JAX options that prepare_process has set."""


def prepare_process() -> None:
    """Sets options of the complete process, unless somebody has set them, and initializes the devices.

    - jax_num_cpu_devices = CPU_DEVICES, unless the option, JAX_NUM_CPU_DEVICES or XLA_FLAGS sets the number, or JAX has
      initialized its devices already.
    - NPROC = 2 n + 2, the threads of XLA, if the process asks for n > 1 virtual CPU devices. By default XLA has one
      per device, and a collective of all devices stands still if one of the threads is busy with something else.
    - jax_compilation_cache_dir = a folder in our cache, and jax_persistent_cache_min_compile_time_secs = 0, unless the
      option or JAX_COMPILATION_CACHE_DIR names a folder for compiled programs or turns their cache off.

    Every function that loads or trains a model calls it first. Raises UsageError if JAX finds no device.
    """
    flag = re.search(r"xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    asked = int(flag[1]) if flag else jax.config.values["jax_num_cpu_devices"]
    if asked > 1:
        os.environ.setdefault("NPROC", str(2 * asked + 2))
    if asked < 0:
        with contextlib.suppress(RuntimeError):  # JAX has initialized its devices already
            jax.config.update("jax_num_cpu_devices", CPU_DEVICES)
            _set_here.add("jax_num_cpu_devices")
    if jax.config.values["jax_compilation_cache_dir"] is None and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))
        # By default JAX keeps only programs that take over a second to compile. Those of small models take less.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # an assertion if a plugin is not installed
        platforms = jax.config.values["jax_platforms"]
        said = f"JAX_PLATFORMS={platforms}: " if platforms else ""
        remedy = "unset it, or set it to cpu" if platforms else "set JAX_PLATFORMS=cpu to do without it"
        reason = str(error) and f": {one_line(error)}"
        raise UsageError(f"{said}JAX finds no such device{reason}; {remedy}") from error


@contextlib.contextmanager
def pinned(dtype: Any = None) -> Iterator[None]:
    """Sets JAX options within the block, so that our results do not depend on the options of the process.

    dtype: compute dtype; None and float32 multiply in float32, where GPUs and TPUs would otherwise use fewer bits.
    Options that only report (jax_log_compiles, jax_check_tracer_leaks) are not changed. The block must not contain a
    `yield`: see pinned_steps.
    """
    with contextlib.ExitStack() as stack:
        for option in (
            jax.enable_x64(False),
            jax.numpy_rank_promotion("allow"),
            jax.numpy_dtype_promotion("standard"),
            jax.transfer_guard("allow"),
            jax.disable_jit(False),
            jax.debug_nans(False),  # we report numbers that are not finite ourselves, with their position
            jax.debug_infs(False),
            jax.debug_key_reuse(False),
            jax.threefry_partitionable(True),
            matmul_precision("float32" if dtype is None else dtype),
        ):
            stack.enter_context(option)
        yield


def pinned_steps(items: Iterator[Item], dtype: Any = None) -> Iterator[Item]:
    """Yields the same items. Each is made within `pinned`, and between them the caller has its own options."""
    end = object()
    while True:
        with pinned(dtype):
            item: Any = next(items, end)
        if item is end:
            return
        yield item


def choose_devices(mesh: Mesh | None, dtype: DType | None, *, small: bool = False) -> tuple[Mesh, DType]:
    """Returns the mesh and the compute dtype. By default they are the first device, with float32 on CPU, else bfloat16.

    small: whether the network is small; then the default on CPU is all devices, see CPU_DEVICES. Raises UsageError for
    a mesh with other axes than "data", for another dtype, and as prepare_process.
    """
    if mesh is not None and (not isinstance(mesh, Mesh) or mesh.axis_names != ("data",)):
        raise UsageError(f"mesh must have the one axis 'data', not {getattr(mesh, 'axis_names', mesh)}")
    if dtype not in ("float32", "bfloat16", None):
        raise UsageError(f"dtype must be 'bfloat16', 'float32' or None, not {dtype!r}")
    prepare_process()
    if mesh is None:
        devices = jax.devices()
        devices = devices[: CPU_DEVICES if small and devices[0].platform == "cpu" else 1]
    else:
        devices = mesh.devices
    # Mesh, because the axes of jax.make_mesh are explicit by default.
    mesh = Mesh(np.array(devices), ("data",))
    # On CPU only float32 matrix products are fast.
    return mesh, dtype or ("float32" if mesh.devices.flat[0].platform == "cpu" else "bfloat16")


def first_devices(mesh: Mesh, count: int, replicated: Any) -> tuple[Mesh, Any]:
    """Returns the mesh of the first `count` devices, and replicated arrays restricted to it, without a copy."""
    if count == mesh.size:
        return mesh, replicated
    devices = mesh.devices.flat[:count]
    fewer = Mesh(devices, mesh.axis_names)
    sharding = NamedSharding(fewer, PartitionSpec())

    def narrow(x: jax.Array) -> jax.Array:
        lies = {shard.device: shard.data for shard in x.addressable_shards}
        return jax.make_array_from_single_device_arrays(x.shape, sharding, [lies[device] for device in devices])

    return fewer, jax.tree.map(narrow, replicated)


def training_devices() -> list[Any]:
    """Returns the devices of a training run: all devices that the user gave JAX.

    Of virtual CPU devices that prepare_process made it returns only the first, so that they do not change a run.
    """
    prepare_process()
    devices = jax.devices()
    return devices[:1] if "jax_num_cpu_devices" in _set_here and devices[0].platform == "cpu" else devices


def matmul_precision(dtype: Any) -> Any:
    """Returns a context in which float32 is multiplied in float32; GPUs and TPUs would otherwise use fewer bits."""
    return jax.default_matmul_precision("highest" if jnp.dtype(dtype) == jnp.float32 else "default")


@contextlib.contextmanager
def device_memory(message: str) -> Iterator[None]:
    """Turns XLA's error for too little memory, in the block, into a DeviceMemoryError with this message."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DeviceMemoryError(message) from error


def join_processes() -> None:
    """Makes this process one of several that train together. It must run before any other use of a device.

    The environment has JAX_COORDINATOR_ADDRESS (HOST:PORT of the first process), JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    If one is absent, JAX takes it from Slurm, Open MPI, Kubernetes or a TPU pod. Raises UsageError if one is not known,
    or another process cannot be reached.
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
    """Returns a number from the environment, or None. Raises UsageError if the text is no number."""
    text = os.environ.get(name)
    if text is not None and not text.isdecimal():
        raise UsageError(f"{name} must be a number, not {text!r}")
    return None if text is None else int(text)
