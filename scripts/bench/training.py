"""Times steps of fine-tuning: random weights, synthetic batches, no data set.

    python -m scripts.bench.training --preset 1.3b                                    # one GPU: the main result
    python -m scripts.bench.training --preset 1.3b experiment.local_batch_size=16 training.remat=full
    python -m scripts.bench.training --preset demo-scenes --steps 5

The configuration is the preset finetune-captions (scenes/captions for demo-scenes) with the given changes, on all
devices of the machine. Compilation is timed apart. Prints a table, then one JSON line.

FLOPs are those of the network alone, without recomputation: 6 per matrix weight and token, and 12 per layer, width and
pair of positions (Chowdhery et al., "PaLM", 2022, arXiv:2204.02311, appendix B). Half of the pairs are masked. MFU is
the share of the device's peak by its data sheet, if that is known. share_of_matmul is the share of the speed of a large
matrix product in the same run.
"""

import argparse
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mindalle_jax.training.metrics import PEAK_FLOPS, flops_per_sequence
from scripts.bench import common
from scripts.bench.plan_training import compile_step, compute_dtype


def fill(tree: Any, seed: int) -> Any:
    """Makes arrays of these shapes, dtypes and shardings on their devices: floats N(0, 0.02), and integers 0."""
    leaves, structure = jax.tree.flatten(tree)
    filled = [maker(leaf.shape, leaf.dtype, leaf.sharding)(seed + number) for number, leaf in enumerate(leaves)]
    return jax.tree.unflatten(structure, filled)


@functools.cache  # parameters, moments and averages have the same shapes, and each program takes a while to compile
def maker(shape: tuple[int, ...], dtype: Any, sharding: Any) -> Any:
    """A compiled function seed -> array, see fill."""

    def make(seed: Any) -> jax.Array:
        if not jnp.issubdtype(dtype, jnp.floating):
            return jnp.zeros(shape, dtype)
        return (0.02 * jax.random.normal(jax.random.key(seed), shape)).astype(dtype)

    return jax.jit(make, out_shardings=sharding)


def time_steps(compiled: Any, state: Any, frozen: Any, batch: Any, count: int) -> tuple[float, float]:
    """(median seconds per step after two steps that are not counted, loss of the last step)."""
    seconds, loss = [], float("nan")
    for _ in range(2 + count):
        start = time.perf_counter()
        state, metrics = compiled(state, frozen, batch)
        loss = float(metrics["loss"])  # waits
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[2:])), loss


def bench(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """The conditions and the metrics."""
    overrides = ["data.train=none", *arguments.overrides]
    if jax.default_backend() == "cpu":
        overrides.append("experiment.use_amp=false")  # as fine-tuning does there
    config_file, base = common.TRAINING_PRESETS[arguments.preset], common.load_preset(arguments.preset)
    start = time.perf_counter()
    config, mesh, state, frozen, batch, compiled = compile_step(config_file, overrides, jax.devices(), base)
    compile_s = time.perf_counter() - start
    sequences = int(np.prod(batch["codes"].shape[:2]))
    state, frozen, batch = fill(state, 0), fill(frozen, 1_000_000), fill(batch, 2_000_000)
    # Second moments are not negative.
    state = state._replace(opt_state=jax.tree.map(jnp.abs, state.opt_state))
    step_s, loss = time_steps(compiled, state, frozen, batch, arguments.steps)
    device, dtype = jax.devices()[0], compute_dtype(config)
    flop = flops_per_sequence(config.model_config())
    flops = flop * sequences / mesh.size / step_s
    peak, matmul = PEAK_FLOPS.get(device.device_kind), common.matmul_flops(device, dtype)
    head = common.conditions(
        "training", device, dtype, config.experiment.local_batch_size,
        preset=arguments.preset, changes=arguments.overrides, devices=mesh.size, mesh=str(dict(mesh.shape)),
        remat=config.training.remat,
    )  # fmt: skip
    return head, {
        "sequences_per_step": sequences,
        "compile_s": round(compile_s, 1),
        "ms_per_step": round(step_s * 1e3, 2),
        "sequences_per_s": round(sequences / step_s, 2),
        "TFLOP_per_sequence": round(flop / 1e12, 4),
        "TFLOP_per_s_per_device": round(flops / 1e12, 3),
        "MFU": None if peak is None else round(flops / peak, 4),
        "matmul_TFLOP_per_s": round(matmul / 1e12, 3),
        "share_of_matmul": round(flops / matmul, 4),
        "peak_memory_GB": round(common.peak_memory_bytes(device) / 1e9, 2),
        "loss": round(loss, 4),
    }


def main() -> None:
    """Parses the command line, runs, prints."""
    parser = common.make_parser(__doc__, "1.3b")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the configuration")
    parser.add_argument("--steps", type=int, default=10, help="timed steps, after two more (default: %(default)s)")
    common.report(*bench(parser.parse_args()))


if __name__ == "__main__":
    main()
