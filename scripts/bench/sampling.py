"""Times sampling: prompt -> codes -> images -> ranks. Needs no checkpoint.

    python -m scripts.bench.sampling --preset 1.3b --candidates 96            # one GPU: the main result
    python -m scripts.bench.sampling --preset 1.3b --candidates 1 --device cpu --rows 1
    python -m scripts.bench.sampling --preset demo-scenes --candidates 1 --jacobi
    python -m scripts.bench.sampling --attention pallas --quantize weights+cache
    python -m scripts.bench.sampling --peer ~/minDALL-E                       # and the original's loop, in this run

"demo-scenes" has the weights of that model in the package; the other presets have random weights. A step gives one
code for each candidate. With --jacobi one pass of the network gives several codes.

Prints a table, then one JSON line. Compilation is timed apart, and takes less time if the compilation cache has the
programs.

GB_per_pass is the memory traffic of one pass of this code. It counts the weights once, and the keys and values of the
prefix once, or once per candidate (--attention). For each candidate it counts the keys and values that are read, which
are the full cache or its filled part (pallas, cudnn), and the new ones, which are written. floor_GB_per_pass counts the
prefix once and the filled part, for every backend. Both are compared with the copy bandwidth, measured on the same
device in the same run. floor_ms_per_pass is the time of the floor at that speed.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mindalle_jax.cli.parser import path
from mindalle_jax.config.schema import Config
from mindalle_jax.models.attention import DECODE_ATTENTION, PRIVATE_PREFIX, default_backend
from mindalle_jax.models.transformer import Transformer
from mindalle_jax.runtime.devices import choose_devices, pinned
from mindalle_jax.storage.weights import leaf_shapes, load_params
from mindalle_jax.text.tokenizer import TextTokenizer
from scripts.bench import common
from scripts.bench.common import DecodeLoop
from scripts.bench.images import time_decoding, time_ranking
from scripts.bench.plan_sampling import compile_loop_of

EXACT_LENGTH = ("pallas", "cudnn")
"""Backends that read only the filled part of the cache."""


class CodesTime(NamedTuple):
    """The time for the codes of all candidates."""

    prefill_s: float
    steps_s: float
    passes: int
    """Runs of the network, over all chunks."""


def bytes_per_pass(
    config: Config, batch: int, itemsize: int, quantize: str | None, positions: float, prefixes: int = 1
) -> int:
    """Least bytes that one pass of `batch` candidates moves on a device.

    positions: number of positions per candidate that are read, on average. prefixes: copies of the prefix.
    """
    h = config.stage2.hparams
    weights = sum(
        math.prod(shape)
        for name, shape in leaf_shapes(config, "stage2").items()
        if name.startswith(("blocks/", "ln_f", "head")) and not name.startswith("head_txt")
    )
    prefix = 1 if config.image_only else h.ctx_len_txt
    vectors, width = 2 * h.n_layers * h.n_heads, h.embed_dim // h.n_heads
    own = batch * (positions + 1)
    cache_bytes = width + itemsize if quantize == "weights+cache" else width * itemsize  # per vector, with its scale
    weights_bytes = weights if quantize else weights * itemsize
    return int(weights_bytes + vectors * (prefixes * prefix * width * itemsize + own * cache_bytes))


def load(preset: str, config: Config, dtype: Any, mesh: Any, int8: bool) -> tuple[dict[str, Any], np.ndarray]:
    """Parameters of the transformer and a prompt int32[p]: those of demo-scenes, or random weights and zeros."""
    length = config.stage2.hparams.ctx_len_txt
    if preset == common.SCENES.name:
        tokenizer = TextTokenizer(common.SCENES / "tokenizer", length, config.stage2.vocab_size_txt)
        return load_params(common.SCENES, "stage2", config, dtype, mesh, int8=int8), tokenizer([common.PROMPT]).ids[0]
    prompt = np.zeros(1 if config.image_only else length, np.int32)
    return common.random_params(common.sampling_shapes(config), dtype, mesh, int8), prompt


def sample_once(loop: DecodeLoop, prefix_ids: np.ndarray, chunks: int, rows: int) -> CodesTime:
    """Runs the loop over `rows` rows of every chunk of candidates."""
    start = time.perf_counter()
    prefix = jax.block_until_ready(loop.prefill(prefix_ids))
    middle, passes, last = time.perf_counter(), [], None
    for chunk in range(chunks):
        state, codes = loop.start(prefix)
        for row in range(rows):
            state, codes = loop.decode_row(prefix, row, state, codes, chunk)
        passes.append(state.passes)
        last = codes
    jax.block_until_ready((last, passes))
    steps_s = time.perf_counter() - middle
    return CodesTime(middle - start, steps_s, sum(int(np.asarray(count)[0]) for count in passes))


def time_codes(
    arguments: argparse.Namespace, config: Config, dtype: Any, loop: DecodeLoop, prefix_ids: np.ndarray
) -> dict[str, Any]:
    """Samples twice, first with compilation; returns the metrics of the second run."""
    length, rows = loop.side * loop.rows, arguments.rows or loop.rows
    chunks = math.ceil(arguments.candidates / loop.candidates)
    start = time.perf_counter()
    sample_once(loop, prefix_ids, chunks, rows)
    first_s = time.perf_counter() - start
    timed = sample_once(loop, prefix_ids, chunks, rows)
    step_s = timed.steps_s / (chunks * rows * loop.side)
    pass_s = timed.steps_s / timed.passes
    return {
        "cache_lengths": loop.capacities,
        "compile_s": round(first_s - timed.prefill_s - timed.steps_s, 2),
        "prefill_ms": round(timed.prefill_s * 1e3, 2),
        "ms_per_step": round(step_s * 1e3, 3),
        "passes_per_step": round(timed.passes / (chunks * rows * loop.side), 3),
        "ms_per_pass": round(pass_s * 1e3, 3),
        **bandwidth(arguments, config, dtype, loop, rows, pass_s),
        "codes_s": round(timed.prefill_s + step_s * length * chunks, 4),
        "codes_timed": f"{rows * loop.side} of {length} positions",
    }


def bandwidth(
    arguments: argparse.Namespace, config: Config, dtype: Any, loop: DecodeLoop, rows: int, pass_s: float
) -> dict[str, Any]:
    """Compares the bytes of a pass with the copy bandwidth of the device."""
    ends = np.arange(1, rows + 1) * loop.side
    exact = float(np.mean(ends) - (loop.side - 1) / 2)  # the positions that are filled, on average
    allocated = float(np.mean([next(size for size in loop.capacities if size >= end) for end in ends]))
    itemsize, mode = jnp.dtype(dtype).itemsize, arguments.quantize
    prefixes = loop.batch if arguments.attention in PRIVATE_PREFIX else 1
    read = exact if arguments.attention in EXACT_LENGTH else allocated
    moved = loop.mesh.size * bytes_per_pass(config, loop.batch, itemsize, mode, read, prefixes)
    floor = loop.mesh.size * bytes_per_pass(config, loop.batch, itemsize, mode, exact)
    copy = common.copy_bandwidth(loop.mesh.devices.flat[0])
    return {
        "GB_per_pass": round(moved / 1e9, 3),
        "GB_per_s": round(moved / pass_s / 1e9, 1),
        "copy_GB_per_s": round(copy / 1e9, 1),
        "share_of_copy": round(moved / pass_s / copy, 3),
        "floor_GB_per_pass": round(floor / 1e9, 3),
        "floor_ms_per_pass": round(floor / copy * 1e3, 3),
        "share_of_floor": round(floor / copy / pass_s, 3),
    }


def bench(arguments: argparse.Namespace, config: Config, dtype: Any, mesh: Any) -> dict[str, Any]:
    """Runs everything; returns batch, devices and the metrics."""
    preset, candidates, mode = arguments.preset, arguments.candidates, arguments.quantize
    small, batch_size = preset != "1.3b", arguments.batch_size
    mesh, batch = common.split_candidates(mesh, candidates, small=small, batch_size=batch_size)
    device = mesh.devices.flat[0]
    model = Transformer(
        config.stage2, stacked=False, dtype=dtype, attention=arguments.attention, int8_cache=mode == "weights+cache"
    )
    params, prefix_ids = load(preset, config, dtype, mesh, mode is not None)
    jax.block_until_ready(params)
    loop = DecodeLoop(model, params, mesh, batch, jacobi=arguments.jacobi, cache_sizes=arguments.cache_sizes)
    metrics = {"devices": mesh.size} | time_codes(arguments, config, dtype, loop, prefix_ids)
    if arguments.count_kernels:
        if device.platform != "gpu" or arguments.jacobi:
            sys.exit("scripts.bench.sampling: --count-kernels is for a GPU, and for a loop without --jacobi")
        traced, _ = loop.trace(prefix_ids.shape)
        metrics["kernels_per_step"] = len(compile_loop_of(traced.lower(), gpu=True)[2] or [])
    if not arguments.codes_only:
        metrics |= time_decoding(config, dtype, mesh, 1) | time_ranking(preset, config, dtype, mesh, 1)
        image_s = (metrics["decode_one_image_ms"] + metrics["rank_one_image_ms"]) / 1e3
        ranked_s = metrics["codes_s"] + candidates * image_s
        metrics |= {"prompt_to_ranked_images_s": round(ranked_s, 3), "images_per_s": round(candidates / ranked_s, 3)}
    return {"batch": batch, **metrics, "peak_memory_GB": round(common.peak_memory_bytes(device) / 1e9, 2)}


def time_peer(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs scripts.bench.peer_sampling for the same number of candidates and rows; returns its JSON line."""
    command = [sys.executable, "-m", "scripts.bench.peer_sampling", str(arguments.peer.resolve())]
    command += ["--preset", arguments.preset, "--candidates", str(arguments.candidates), "--rows", str(arguments.rows)]
    command += ["--device", arguments.device] if arguments.device else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=common.ROOT)
    if done.returncode:
        sys.exit(f"scripts.bench.sampling: {' '.join(command)} failed")
    return json.loads(done.stdout.splitlines()[-1])


def beside_peer(metrics: dict[str, Any], peer: dict[str, Any], rows_timed: int, rows: int) -> dict[str, Any]:
    """The seconds of the original, and their ratio to these metrics, over the same rows."""
    ours = metrics["codes_s"] * rows_timed / rows
    return {
        "peer_codes_s": peer["peer_codes_s"],
        "peer_device": peer["device"],
        "peer_torch": peer["versions"]["torch"],
        "peer_ratio": round(peer["peer_codes_s"] / ours, 2),
    }


def parse_arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = common.make_parser(__doc__, "1.3b")
    parser.add_argument("--candidates", type=int, default=96, help="images of one prompt (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, help="candidates per device at once (default: as mindalle sample)")
    common.add_device(parser)
    parser.add_argument("--rows", type=int, default=0, help="rows of an image to time, 0 for all (default: 0)")
    parser.add_argument("--jacobi", action="store_true", help="sample a row at once, in several passes (default: no)")
    names = list(DECODE_ATTENTION)
    parser.add_argument("--attention", choices=names, help="backend (default: as in mindalle sample)")
    text = "number of sizes that the cache grows through (default: 1 on CPU, else 4)"
    parser.add_argument("--cache-sizes", type=int, metavar="N", help=text)
    common.add_quantize(parser)
    parser.add_argument("--codes-only", action="store_true", help="do not decode and rank images (default: both)")
    text = "count the kernels of a step on a GPU; compiles once more (default: no)"
    parser.add_argument("--count-kernels", action="store_true", help=text)
    parser.add_argument("--peer", type=path, metavar="DIR", help="also time this clone of the original repository")
    arguments = parser.parse_args()
    if arguments.attention == "cudnn" and arguments.quantize == "weights+cache":
        parser.error("--attention cudnn reads no int8; --quantize weights goes with it")
    return arguments


def main() -> None:
    """Parses the command line, runs, prints."""
    arguments = parse_arguments()
    peer = time_peer(arguments) if arguments.peer else {}  # first: JAX then takes most of a GPU's memory
    config = common.load_preset(arguments.preset)
    if arguments.device:
        jax.config.update("jax_platforms", arguments.device)
    mesh, dtype = choose_devices(None, arguments.dtype, small=arguments.preset != "1.3b")
    device = mesh.devices.flat[0]
    arguments.attention = arguments.attention or default_backend(device.platform)
    with pinned(dtype):
        metrics = bench(arguments, config, jnp.dtype(dtype), mesh)
    if peer:
        rows = config.stage1.code_size
        metrics |= beside_peer(metrics, peer, arguments.rows or rows, rows)
    head = common.conditions(
        "sampling", device, dtype, metrics.pop("batch"),
        preset=arguments.preset, candidates=arguments.candidates, attention=arguments.attention,
        quantize=arguments.quantize, jacobi=arguments.jacobi,
    )  # fmt: skip
    common.report(head, metrics)


if __name__ == "__main__":
    main()
