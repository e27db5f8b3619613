"""Where a network runs, and how precisely: what models and rankers decide alike."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mindalle_jax.errors import DeviceMemoryError, UsageError
from mindalle_jax.interop.download import cache_dir

DType = Literal["bfloat16", "float32"]


def choose_devices(mesh: Mesh | None, dtype: DType | None) -> tuple[Mesh, DType]:
    """The mesh and the compute dtype: by default the first device, float32 on CPU and bfloat16 elsewhere.

    Raises UsageError for a mesh with other axes than "data", and for another dtype.
    """
    if mesh is not None and mesh.axis_names != ("data",):
        raise UsageError(f"mesh must have the one axis 'data', not {mesh.axis_names}")
    if dtype not in ("float32", "bfloat16", None):
        raise UsageError(f"dtype must be 'bfloat16', 'float32' or None, not {dtype!r}")
    # Mesh and not make_mesh, whose axes are of the explicit kind by default.
    mesh = Mesh(np.array(jax.devices()[:1]) if mesh is None else mesh.devices, ("data",))
    # XLA on CPU has fast float32 matrix products only.
    return mesh, dtype or ("float32" if mesh.devices.flat[0].platform == "cpu" else "bfloat16")


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
