"""Times updates of fine-tuning: random weights, synthetic batches, no data set.

    python -m scripts.bench.training --preset 1.3b                                    # one GPU: the headline figure
    python -m scripts.bench.training --preset 1.3b experiment.local_batch_size=16 training.remat=full
    python -m scripts.bench.training --preset demo --updates 5

The configuration is that of configs/finetune-captions.yaml (configs/scenes/captions.yaml for demo) with changes, over
all devices there are. Prints a table, then one JSON line. Compilation is timed apart. FLOPs are those of the network
alone, whatever is computed again: 6 a matrix weight and token, and 12 a layer, width and pair of positions, of which
half are masked (Chowdhery et al., "PaLM", 2022, arXiv:2204.02311, appendix B). MFU is their share of the device's peak
by its data sheet, where that is known; share_of_matmul that of the speed of a large matrix product in the same run.
"""

import argparse
import json
import math
import platform
import resource
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mindalle_jax.config.file import load_config
from mindalle_jax.storage.files import DEMO
from mindalle_jax.training.metrics import PEAK_FLOPS, flops_per_sequence
from scripts.bench.plan_training import compile_update

CONFIGS = Path(__file__).parents[2] / "configs"
PRESETS = {"1.3b": CONFIGS / "finetune-captions.yaml", "demo": CONFIGS / "scenes" / "captions.yaml"}
MODELS = {"1.3b": None, "demo": load_config(DEMO / "config.yaml")}


def matmul_flops(device: Any, dtype: Any) -> float:
    """FLOP/s of a large matrix product on one device."""
    size = 8192 if device.platform != "cpu" else 2048
    x = jax.device_put(jnp.ones((size, size), dtype), device)
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    best = math.inf
    for _ in range(10):
        start = time.perf_counter()
        product(x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def fill(tree: Any, seed: int) -> Any:
    """Arrays of these shapes, dtypes and places: floating point N(0, 0.02), drawn where it lies, and integers 0."""
    leaves, structure = jax.tree.flatten(tree)
    filled = []
    for number, leaf in enumerate(leaves):
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)

        def make(number: int = number, leaf: Any = leaf, floating: bool = floating) -> jax.Array:
            key = jax.random.key(seed + number)
            return (0.02 * jax.random.normal(key, leaf.shape) if floating else jnp.zeros(leaf.shape)).astype(leaf.dtype)

        filled.append(jax.jit(make, out_shardings=leaf.sharding)())
    return jax.tree.unflatten(structure, filled)


def main() -> None:
    """Parses the command line, runs, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the configuration")
    parser.add_argument("--preset", choices=PRESETS, default="1.3b", help="which network (default: %(default)s)")
    parser.add_argument("--updates", type=int, default=10, help="timed, after two that are not (default: %(default)s)")
    arguments = parser.parse_args()
    overrides = ["data.train=none", *arguments.overrides]
    if jax.default_backend() == "cpu":
        overrides.append("experiment.use_amp=false")  # as fine-tuning does there
    start = time.perf_counter()
    config, mesh, state, frozen, batch, compiled = compile_update(
        PRESETS[arguments.preset], overrides, jax.devices(), MODELS[arguments.preset]
    )
    compile_s = time.perf_counter() - start
    sequences = int(np.prod(batch["codes"].shape[:2]))
    state, frozen, batch = fill(state, 0), fill(frozen, 1_000_000), fill(batch, 2_000_000)
    # Second moments are not negative.
    state = state._replace(opt_state=jax.tree.map(jnp.abs, state.opt_state))
    seconds = []
    for _ in range(2 + arguments.updates):
        begin = time.perf_counter()
        state, figures = compiled(state, frozen, batch)
        loss = float(figures["loss"])  # waits
        seconds.append(time.perf_counter() - begin)
    update_s = float(np.median(seconds[2:]))
    device, dtype = jax.devices()[0], jnp.bfloat16 if config.experiment.use_amp else jnp.float32
    each = flops_per_sequence(config.model_config())
    flops = each * sequences / mesh.size
    peak, measured = PEAK_FLOPS.get(device.device_kind), matmul_flops(device, dtype)
    stats = device.memory_stats() or {}
    memory = stats.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    results = {
        "bench": "training",
        "preset": arguments.preset,
        "changes": arguments.overrides,
        "device": device.device_kind,
        "devices": mesh.size,
        "mesh": str(dict(mesh.shape)),
        "dtype": jnp.dtype(dtype).name,
        "remat": config.training.remat,
        "sequences_an_update": sequences,
        "compile_s": round(compile_s, 1),
        "ms_an_update": round(update_s * 1e3, 2),
        "sequences_per_s": round(sequences / update_s, 2),
        "TFLOP_a_sequence": round(each / 1e12, 4),
        "TFLOP_per_s_a_device": round(flops / update_s / 1e12, 3),
        "MFU": None if peak is None else round(flops / update_s / peak, 4),
        "matmul_TFLOP_per_s": round(measured / 1e12, 3),
        "share_of_matmul": round(flops / update_s / measured, 4),
        "peak_memory_GB": round(memory / 1e9, 2),
        "loss": round(loss, 4),
        "jax": jax.__version__,
        "python": platform.python_version(),
    }
    for name, value in results.items():
        print(f"{name:>24}  {value}")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
