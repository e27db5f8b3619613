"""Helpers of all benches and planners: presets, random weights, the decoding loop, timing, and the report.

The rest of scripts/bench calls the functions of mindalle_jax/sampling/decode.py only through DecodeLoop. Importing this
file starts no JAX backend.
"""

import argparse
import json
import math
import platform
import resource
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mindalle_jax import __version__
from mindalle_jax.config.file import load_config
from mindalle_jax.config.schema import Config
from mindalle_jax.interop.clip import read_clip
from mindalle_jax.models.clip import ClipConfig, ClipTextConfig, ClipVisionConfig
from mindalle_jax.models.quantization import quantize
from mindalle_jax.models.transformer import Transformer
from mindalle_jax.runtime.devices import first_devices
from mindalle_jax.sampling import decode
from mindalle_jax.sampling.filters import Rows
from mindalle_jax.sampling.options import default_batch_size
from mindalle_jax.storage.files import IN_PACKAGE, RANKER
from mindalle_jax.storage.weights import leaf_shapes, nest

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
SCENES = IN_PACKAGE["demo-scenes"]
PRESETS = {"1.3b": CONFIGS / "mindalle-1.3b.yaml", SCENES.name: SCENES / "config.yaml", "tiny": CONFIGS / "tiny.yaml"}
TRAINING_PRESETS = {
    "1.3b": CONFIGS / "finetune-captions.yaml",
    SCENES.name: CONFIGS / "scenes" / "captions.yaml",
    "tiny": CONFIGS / "finetune-captions.yaml",
}
CLIPS: dict[str, Callable[[], ClipConfig]] = {
    "1.3b": ClipConfig,  # ViT-B/32
    SCENES.name: lambda: read_clip(SCENES / RANKER).config,
    "tiny": lambda: ClipConfig(
        ClipTextConfig(64, 32, 64, 2, 2, 16), ClipVisionConfig(32, 64, 2, 2, 32, 8), projection_dim=16
    ),
}
QUANTIZE = ("weights", "weights+cache")
DTYPES = ("bfloat16", "float32")
PROMPT = "a large striped green circle to the left of a small red heart on a grey background"

TIMED_CALLS = 10
"""Number of timed calls; the fastest one counts."""


# ---------------------------------------- the command line


def make_parser(doc: str | None, preset: str | None = None) -> argparse.ArgumentParser:
    """Makes a parser whose --help is the docstring of a script. preset: default of --preset; None: no such option."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if preset is not None:
        parser.add_argument("--preset", choices=PRESETS, default=preset, help="the network (default: %(default)s)")
    return parser


def add_quantize(parser: argparse.ArgumentParser) -> None:
    """Adds the option --quantize."""
    parser.add_argument("--quantize", choices=QUANTIZE, help="int8, as in mindalle sample (default: off)")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Adds the options --device and --dtype."""
    parser.add_argument("--device", choices=["cpu", "gpu", "tpu"], help="default: the device that JAX picks")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on CPU, else bfloat16")


def load_preset(name: str) -> Config:
    """The configuration of a preset of PRESETS."""
    return load_config(PRESETS[name])


# ---------------------------------------- the report


def conditions(
    bench: str, device: Any, dtype: Any, batch: Any, versions: Mapping[str, str] | None = None, **more: Any
) -> dict[str, Any]:
    """The head of a report.

    device: a jax Device, or text that describes one. batch: rows of one compiled call on one device. versions: those of
    other measured packages. more: other conditions of the run.
    """
    if isinstance(device, str):
        named = {"device": device}
    else:
        named = {"device": device.device_kind, "platform": device.platform}
    return {
        "bench": bench,
        **named,
        "dtype": None if dtype is None else jnp.dtype(dtype).name,
        "batch": batch,
        **more,
        "versions": {
            "mindalle-jax": __version__,
            "jax": jax.__version__,
            "python": platform.python_version(),
            **(versions or {}),
        },
    }


def report(head: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
    """Prints a table for people, and then conditions and metrics as one JSON line."""
    everything = {**head, **metrics}
    print(table(everything))
    print(json.dumps(everything), flush=True)


def table(values: Mapping[str, Any]) -> str:
    """One line per value; a dict, or a list of dicts, takes one line per item: `name  key value  key value`."""
    width = max(len(name) for name in values)
    lines = []
    for name, value in values.items():
        rows = value if isinstance(value, list) and value and isinstance(value[0], dict) else [value]
        if isinstance(value, dict) and value and all(isinstance(item, dict) for item in value.values()):
            rows = [{"": key, **item} for key, item in value.items()]
        for row in rows:
            pairs = "  ".join(f"{key} {item}".strip() for key, item in row.items()) if isinstance(row, dict) else row
            lines.append(f"{name:>{width}}  {pairs}")
    return "\n".join(lines)


# ---------------------------------------- measuring


def best_s(call: Callable[[], Any]) -> float:
    """Seconds of the fastest of several calls, after one that compiles."""
    jax.block_until_ready(call())
    return min(_seconds(call) for _ in range(TIMED_CALLS))


def second_call_s(call: Callable[[], Any]) -> float:
    """Seconds of a call that has been compiled."""
    jax.block_until_ready(call())
    return _seconds(call)


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def copy_bandwidth(device: Any) -> float:
    """Bytes per second, read and written, of copying an array much larger than any cache."""
    copy = jax.jit(lambda x: x + 1, donate_argnums=0)  # in place, so that no time goes into allocating memory
    kept = [jax.device_put(jnp.zeros((256 << 20) // 4, jnp.float32), device)]

    def call() -> jax.Array:
        kept[0] = copy(kept[0])
        return kept[0]

    return 2 * kept[0].nbytes / best_s(call)


def matmul_flops(device: Any, dtype: Any) -> float:
    """FLOP/s of a large matrix product on one device."""
    size = 8192 if device.platform != "cpu" else 2048
    x = jax.device_put(jnp.ones((size, size), dtype), device)
    product = jax.jit(lambda x: x @ x)
    return 2 * size**3 / best_s(lambda: product(x))


def peak_memory_bytes(device: Any) -> int:
    """Peak memory of a device, or of this process if the device does not tell."""
    stats = device.memory_stats() or {}
    return stats.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


# ---------------------------------------- weights


def sampling_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Shapes of the transformer's parameters in the layout of sampling, with its blocks one by one."""
    shapes = {}
    for name, shape in leaf_shapes(config, "stage2").items():
        if name.startswith("blocks/"):
            shapes |= {name.replace("blocks/", f"blocks_{layer}/", 1): shape[1:] for layer in range(shape[0])}
        else:
            shapes[name] = shape
    return shapes


def random_params(shapes: Mapping[str, tuple[int, ...]], dtype: Any, mesh: Mesh, int8: bool = False) -> dict[str, Any]:
    """Parameters of these shapes, replicated over the mesh: gains 1, all else N(0, 0.02); int8: matrices quantized."""
    replicated = NamedSharding(mesh, P())
    normal = jax.jit(
        lambda key, shape: (0.02 * jax.random.normal(key, shape)).astype(dtype),
        static_argnames="shape",
        out_shardings=replicated,
    )
    leaves = {}
    for number, (name, shape) in enumerate(shapes.items()):
        if name.endswith("scale"):
            leaves[name] = jax.device_put(jnp.ones(shape, dtype), replicated)
        else:
            leaves[name] = normal(jax.random.key(number), shape)
        if int8 and name.endswith("/weight"):
            leaves[name], leaves[f"{name}_scale"] = jax.jit(quantize, static_argnums=1)(leaves[name], "float32")
    return nest(leaves)


# ---------------------------------------- the decoding loop


def split_candidates(mesh: Mesh, candidates: int, *, small: bool, batch_size: int | None = None) -> tuple[Mesh, int]:
    """(the devices that get candidates, candidates of each per compiled call), as mindalle sample chooses them."""
    batch = batch_size or default_batch_size(candidates, mesh.devices.flat[0].platform, small=small)
    mesh, _ = first_devices(mesh, min(mesh.size, math.ceil(candidates / batch)), ())
    return mesh, batch


class DecodeLoop:
    """The compiled loop of mindalle_jax/sampling/decode.py for the candidates of one prompt, as sample_codes runs it.

        loop = DecodeLoop(model, params, mesh, 16)
        prefix = loop.prefill(prefix_ids)
        state, codes = loop.start(prefix)
        for row in range(loop.rows):
            state, codes = loop.decode_row(prefix, row, state, codes)     # codes int32[candidates, side]

    Every call returns before its result is there. Nothing here computes across devices, as indexing a sharded array
    does: on CPU such a program waits for a thread that the loop holds.
    """

    def __init__(
        self,
        model: Transformer,
        params: Any,
        mesh: Mesh,
        batch: int,
        *,
        jacobi: bool = False,
        guidance_scale: float = 1.0,
        cache_sizes: int | None = None,
    ):
        """model: with stacked=False; params: arrays or ShapeDtypeStructs. batch: candidates per device.

        cache_sizes: number of sizes that the cache grows through; None is the default of the backend.
        """
        self.model, self.params, self.mesh, self.batch, self.jacobi = model, params, mesh, batch, jacobi
        length, vocab_size = model.config.hparams.ctx_len_img, model.config.vocab_size_img
        platform_name = mesh.devices.flat[0].platform
        if cache_sizes:
            decode.NUM_CACHE_SIZES[platform_name] = cache_sizes
        self.capacities = decode.cache_lengths(model, platform_name)
        """Sizes of the cache, in codes."""
        self.candidates = batch * mesh.size
        self.side = self.rows = math.isqrt(length)
        """Codes per row, which is one call; rows per image."""
        self._guided = guidance_scale != 1
        ones = np.ones(self.candidates, np.float32)
        self._rows = Rows(
            candidates=np.arange(self.candidates, dtype=np.int32),
            seeds=np.zeros(self.candidates, np.uint32),
            temperature=ones,
            top_k=np.full(self.candidates, min(256, vocab_size), np.int32),
            top_p=ones,
            guidance_scale=ones * np.float32(guidance_scale),
        )

    def prefill(self, prefix_ids: Any) -> Any:
        """Runs the prompt int32[p], or [2, p] with guidance, through the network."""
        return decode.prefill(self.model, self.params, prefix_ids, np.zeros(0, np.int32), np.int32(0))

    def start(self, prefix: Any) -> tuple[Any, Any]:
        """The state before the first code, and the codes before it: -1."""
        start = decode.start_decode
        state = start(self.model, self.mesh, self.batch, self.capacities[0], self._guided, prefix, np.int32(0))
        # The same sharding as the codes of a row: otherwise the second row compiles again.
        codes = np.full((self.candidates, self.side), -1, np.int32)
        return state, jax.device_put(codes, NamedSharding(self.mesh, P("data")))

    def decode_row(self, prefix: Any, row: int, state: Any, codes: Any, chunk: int = 0) -> tuple[Any, Any]:
        """Samples row `row` of every candidate: (state, codes int32[candidates, side]). state is donated.

        chunk: number of the chunk of candidates; the noise depends on it.
        """
        rows = self._rows._replace(candidates=self._rows.candidates + np.int32(chunk * self.candidates))
        state = decode.grow_cache(self.model, self.mesh, state, (row + 1) * self.side, self.capacities)
        return decode.sample_row(self.model, self.mesh, self.jacobi, self.params, prefix.kv, rows, state, codes)

    def trace(self, prefix_shape: tuple[int, ...], placement: Any = None) -> tuple[Any, Any]:
        """(traced program of one row with the full cache, its abstract state); runs nothing.

        placement: sharding of all arguments; None leaves it to JAX.
        """

        def placed(tree: Any) -> Any:
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement), tree)

        prefill = partial(decode.prefill, self.model)
        zeros = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in (prefix_shape, (0,), ())]
        prefix = jax.eval_shape(prefill, self.params, *zeros)
        start = partial(decode.start_decode, self.model, self.mesh, self.batch, self.capacities[-1], self._guided)
        state = jax.eval_shape(start, prefix, zeros[-1])
        codes = jax.ShapeDtypeStruct((self.candidates, self.side), jnp.int32)
        arguments = placed((self.params, prefix.kv, self._rows, state, codes))
        return decode.sample_row.trace(self.model, self.mesh, self.jacobi, *arguments), state
