"""Times sampling: prompt -> codes -> pictures -> ranks. Needs no checkpoint.

    python -m scripts.bench.sampling --preset 1.3b --candidates 96            # one GPU: the headline figure
    python -m scripts.bench.sampling --preset 1.3b --candidates 1 --device cpu --rows 1
    python -m scripts.bench.sampling --preset demo --candidates 1 --jacobi
    python -m scripts.bench.sampling --attention pallas --quantize weights+cache
    python -m scripts.bench.sampling --peer ~/minDALL-E                       # and the original's loop, in this run

The weights of "demo" are those of the model in the package, others random. A step is one code of each candidate; with
--jacobi a pass of the network gives several.

Prints a table, then one JSON line. Compilation is timed apart. GB_per_pass is what a pass has to move as this code does
it: the weights once, the keys and values of the prefix (once, or for every candidate: --attention) and of every
candidate's whole cache as it grows, or of what is filled of it (pallas, cudnn), and the new ones written. The floor has
the prefix once and what is filled, whatever the code does. Both are held against the copy bandwidth that is measured on
the same device in the same run: floor_ms_per_pass is how long a pass would take at it.
"""

import argparse
import json
import math
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mindalle_jax.config.file import load_config
from mindalle_jax.config.schema import Config
from mindalle_jax.interop.clip import clip_leaf_shapes, read_clip
from mindalle_jax.models.attention import DECODE_ATTENTION, PRIVATE_PREFIX, default_backend
from mindalle_jax.models.clip import CLIP, ClipConfig, ClipTextConfig, ClipVisionConfig
from mindalle_jax.models.quantization import quantize
from mindalle_jax.models.transformer import Transformer
from mindalle_jax.models.vqgan import VQGAN
from mindalle_jax.ranking.ranker import encode_pictures
from mindalle_jax.runtime.devices import choose_devices, first_devices, matmul_precision
from mindalle_jax.sampling.codec import decode_pictures
from mindalle_jax.sampling.decode import (
    SEGMENTS,
    Settings,
    cache_lengths,
    decode_segment,
    default_batch_size,
    make_room,
    prefill,
    row_length,
    start_state,
)
from mindalle_jax.storage.files import DEMO, RANKER
from mindalle_jax.storage.weights import leaf_shapes, load_params, nest
from mindalle_jax.text.tokenizer import TextTokenizer
from scripts.bench.plan_sampling import compile_loop_of

CONFIGS = Path(__file__).parents[2] / "configs"
PRESETS = {"1.3b": CONFIGS / "mindalle-1.3b.yaml", "demo": DEMO / "config.yaml", "tiny": CONFIGS / "tiny.yaml"}
CLIPS: dict[str, Callable[[], ClipConfig]] = {
    "1.3b": ClipConfig,  # ViT-B/32
    "demo": lambda: read_clip(DEMO / RANKER).config,
    "tiny": lambda: ClipConfig(
        ClipTextConfig(64, 32, 64, 2, 2, 16), ClipVisionConfig(32, 64, 2, 2, 32, 8), projection_dim=16
    ),
}


def random_params(
    shapes: Mapping[str, tuple[int, ...]], dtype: Any, mesh: jax.sharding.Mesh, int8: bool = False
) -> dict[str, Any]:
    """Parameters of these shapes: gains 1, all else N(0, 0.02), drawn on the device; int8: matrices quantised."""
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


def sampling_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Those of the transformer with its blocks one by one."""
    shapes = {}
    for name, shape in leaf_shapes(config, "stage2").items():
        if name.startswith("blocks/"):
            shapes |= {name.replace("blocks/", f"blocks_{layer}/", 1): shape[1:] for layer in range(shape[0])}
        else:
            shapes[name] = shape
    return shapes


def copy_bandwidth(device: Any) -> float:
    """Bytes per second, read and written, of copying an array much larger than any cache."""
    x = jax.device_put(jnp.zeros((256 << 20) // 4, jnp.float32), device)
    copy = jax.jit(lambda x: x + 1, donate_argnums=0)  # in place: else the time is that of finding fresh memory
    x = copy(x).block_until_ready()
    best = math.inf
    for _ in range(10):
        start = time.perf_counter()
        x = copy(x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * x.nbytes / best


def second_call_s(call: Callable[[], Any]) -> float:
    """Seconds of a call that has been compiled."""
    jax.block_until_ready(call())
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def bytes_per_pass(
    config: Config, batch: int, itemsize: int, quantize: str | None, positions: float, prefixes: int = 1
) -> int:
    """Least bytes that one pass of `batch` candidates moves on a device.

    positions: how many of each candidate are read, on average. prefixes: copies of that of the prompt.
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
    cache_bytes = width + itemsize if quantize == "weights+cache" else width * itemsize  # of a vector, with its scale
    weights_bytes = weights if quantize else weights * itemsize
    return int(weights_bytes + vectors * (prefixes * prefix * width * itemsize + own * cache_bytes))


def load(
    preset: str, config: Config, dtype: Any, mesh: jax.sharding.Mesh, int8: bool
) -> tuple[dict[str, Any], np.ndarray]:
    """Parameters of the transformer, and a prompt int32[p]: those of the model in the package, or random and zeros."""
    length = config.stage2.hparams.ctx_len_txt
    if preset == "demo":
        tokenizer = TextTokenizer(DEMO / "tokenizer", length, config.stage2.vocab_size_txt)
        prompt = "a large striped green circle to the left of a small red heart on a grey background"
        return load_params(DEMO, "stage2", config, dtype, mesh, int8=int8), tokenizer([prompt]).ids[0]
    prompt = np.zeros(1 if config.image_only else length, np.int32)
    return random_params(sampling_shapes(config), dtype, mesh, int8), prompt


def bench(arguments: argparse.Namespace, config: Config, dtype: Any, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Runs everything twice, compilation and measurement; returns the figures."""
    preset, candidates, jacobi, mode = arguments.preset, arguments.candidates, arguments.jacobi, arguments.quantize
    device, clip_config = mesh.devices.flat[0], CLIPS[preset]()
    model = Transformer(
        config.stage2, stacked=False, dtype=dtype, attention=arguments.attention,
        int8_cache=mode == "weights+cache",
    )  # fmt: skip
    vqgan, clip = VQGAN(config.stage1, dtype=dtype), CLIP(clip_config, dtype=dtype)
    on_cpu, small = device.platform == "cpu", preset != "1.3b"
    batch = arguments.batch_size or default_batch_size(candidates, device.platform, small=small)
    mesh, _ = first_devices(mesh, min(mesh.size, math.ceil(candidates / batch)), ())
    params, prefix_ids = load(preset, config, dtype, mesh, mode is not None)
    stage1 = random_params(leaf_shapes(config, "stage1"), jnp.float32, mesh)
    clip_params = random_params(clip_leaf_shapes(clip_config), dtype, mesh)
    jax.block_until_ready((params, stage1, clip_params))
    vocab_size, length = config.stage2.vocab_size_img, config.stage2.hparams.ctx_len_img
    settings = Settings.make(vocab_size, seed=0, temperature=1.0, top_k=min(256, vocab_size), top_p=None)
    traced = settings.traced(vocab_size)
    steps = row_length(length)
    rows = arguments.rows or length // steps
    lengths = cache_lengths(model, device.platform)
    at_once = batch * mesh.size
    chunks = math.ceil(candidates / at_once)
    nothing = np.full((at_once, steps), -1, np.int32)

    def codes_once() -> tuple[float, float, int, list[Any]]:
        """(seconds of the prefill, seconds of the steps, passes, codes of the last chunk)"""
        begin = time.perf_counter()
        prefix = prefill(model, params, prefix_ids, np.zeros(0, np.int32), 0)
        jax.block_until_ready(prefix)
        middle, parts, passes = time.perf_counter(), [], 0
        for chunk in range(chunks):
            ids = np.arange(chunk * at_once, (chunk + 1) * at_once, dtype=np.int32)
            state, parts = start_state(model, mesh, batch, lengths[0], prefix, 0), []
            part: Any = nothing
            for row in range(rows):
                state = make_room(model, mesh, state, (row + 1) * steps, lengths)
                state, part = decode_segment(model, mesh, steps, jacobi, params, prefix.kv, ids, traced, state, part)
                parts.append(part)
            passes += state.passes[0]
        jax.block_until_ready(parts)
        return middle - begin, time.perf_counter() - middle, int(passes), parts

    start = time.perf_counter()
    codes_once()
    first_s = time.perf_counter() - start
    prefill_s, steps_s, passes, parts = codes_once()
    codes = jnp.concatenate(parts, axis=1)
    codes = jnp.pad(codes, ((0, 0), (0, length - codes.shape[1])))[:1]
    # As many at once as mindalle sample decodes and ranks.
    painted, ranked = mesh.size * (1 if on_cpu else 16), mesh.size * (8 if on_cpu else 32)
    codes = jnp.repeat(codes.reshape(1, *[config.stage1.code_size] * 2), painted, axis=0)
    picture_s = second_call_s(lambda: decode_pictures(vqgan, mesh, stage1, codes)) / painted
    side = config.stage1.hparams.resolution
    pictures = jnp.zeros((ranked, side, side, 3), jnp.uint8)
    rank_s = second_call_s(lambda: encode_pictures(clip, mesh, clip_params, pictures)) / ranked
    kernels = None
    if device.platform == "gpu" and not jacobi:
        prefix = prefill(model, params, prefix_ids, np.zeros(0, np.int32), 0)
        state = start_state(model, mesh, batch, lengths[-1], prefix, 0)
        ids = np.arange(at_once, dtype=np.int32)
        lowered = decode_segment.lower(model, mesh, steps, False, params, prefix.kv, ids, traced, state, nothing)
        kernels = compile_loop_of(lowered, gpu=True)[2]
    step_s = steps_s / (chunks * rows * steps)
    pass_s = steps_s / passes
    ends = np.arange(1, rows + 1) * steps
    read = [next(room for room in lengths if room >= end) for end in ends]
    exact = float(np.mean(ends) - (steps - 1) / 2)  # the positions that are filled, on average
    itemsize = jnp.dtype(dtype).itemsize
    whole = exact if arguments.attention in ("pallas", "cudnn") else float(np.mean(read))
    private = batch if arguments.attention in PRIVATE_PREFIX else 1
    moved = mesh.size * bytes_per_pass(config, batch, itemsize, mode, whole, private)
    floor = mesh.size * bytes_per_pass(config, batch, itemsize, mode, exact)
    bandwidth = copy_bandwidth(device)
    run_s = prefill_s + step_s * length * chunks
    stats = device.memory_stats() or {}
    peak = stats.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    return {
        "candidates": candidates,
        "batch": batch,
        "devices": mesh.size,
        "jacobi": jacobi,
        "attention": arguments.attention,
        "cache_lengths": lengths,
        "quantize": mode,
        "compile_s": round(first_s - prefill_s - steps_s, 2),
        "prefill_ms": round(prefill_s * 1e3, 2),
        "ms_per_step": round(step_s * 1e3, 3),
        "passes_per_step": round(passes / (chunks * rows * steps), 3),
        "ms_per_pass": round(pass_s * 1e3, 3),
        "kernels_per_step": None if kernels is None else len(kernels),
        "GB_per_pass": round(moved / 1e9, 3),
        "GB_per_s": round(moved / pass_s / 1e9, 1),
        "copy_GB_per_s": round(bandwidth / 1e9, 1),
        "share_of_copy": round(moved / pass_s / bandwidth, 3),
        "floor_GB_per_pass": round(floor / 1e9, 3),
        "floor_ms_per_pass": round(floor / bandwidth * 1e3, 3),
        "share_of_floor": round(floor / bandwidth / pass_s, 3),
        "codes_s": round(run_s, 3),
        "codes_timed": f"{rows * steps} of {length} positions",
        "decode_one_picture_ms": round(picture_s * 1e3, 2),
        "rank_one_picture_ms": round(rank_s * 1e3, 2),
        "prompt_to_ranked_pictures_s": round(run_s + candidates * (picture_s + rank_s), 3),
        "images_per_s": round(candidates / (run_s + candidates * (picture_s + rank_s)), 3),
        "peak_memory_GB": round(peak / 1e9, 2),
    }


def time_peer(arguments: argparse.Namespace) -> dict[str, Any]:
    """What peer_sampling.py prints of the same number of candidates and rows."""
    command = [sys.executable, str(Path(__file__).parent / "peer_sampling.py"), str(arguments.peer)]
    command += ["--preset", arguments.preset, "--candidates", str(arguments.candidates), "--rows", str(arguments.rows)]
    command += ["--device", arguments.device] if arguments.device else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"bench_sampling.py: {' '.join(command)} failed")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Parses the command line, runs, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="1.3b", help="which network (default: %(default)s)")
    parser.add_argument("--candidates", type=int, default=96, help="pictures of one prompt (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, help="candidates at once (default: as mindalle sample)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="default: float32 on CPU, else bfloat16")
    parser.add_argument("--device", choices=["cpu", "gpu", "tpu"], help="default: what JAX picks")
    parser.add_argument("--rows", type=int, default=0, help="rows of a picture to time, 0 for all (default: 0)")
    parser.add_argument("--jacobi", action="store_true", help="draw a row at once, again and again (default: no)")
    names = list(DECODE_ATTENTION)
    parser.add_argument("--attention", choices=names, help="backend (default: as of mindalle sample)")
    text = "sizes that the cache grows through (default: 1 on CPU, else 4)"
    parser.add_argument("--segments", type=int, metavar="N", help=text)
    parser.add_argument("--quantize", choices=["weights", "weights+cache"], help="as of mindalle sample")
    parser.add_argument("--peer", type=Path, metavar="DIR", help="a clone of the original repository, timed as well")
    arguments = parser.parse_args()
    if arguments.attention == "cudnn" and arguments.quantize == "weights+cache":
        parser.error("--attention cudnn reads no int8; --quantize weights goes with it")
    peer = time_peer(arguments) if arguments.peer else {}  # first: JAX then takes most of a GPU's memory
    config = load_config(PRESETS[arguments.preset])
    if arguments.device:
        jax.config.update("jax_platforms", arguments.device)
    mesh, dtype = choose_devices(None, arguments.dtype, small=arguments.preset != "1.3b")
    device = mesh.devices.flat[0]
    arguments.attention = arguments.attention or default_backend(device.platform)
    if arguments.segments:
        SEGMENTS[device.platform] = arguments.segments
    with matmul_precision(dtype), jax.threefry_partitionable(True):
        figures = bench(arguments, config, jnp.dtype(dtype), mesh)
    if peer:
        rows = row_length(config.stage2.hparams.ctx_len_img)
        ours = figures["codes_s"] * (arguments.rows or rows) / rows
        figures |= {"peer_codes_s": peer["peer_codes_s"], "peer_device": peer["device"], "peer_torch": peer["torch"]}
        figures["peer_ratio"] = round(peer["peer_codes_s"] / ours, 2)
    conditions = {
        "bench": "sampling",
        "preset": arguments.preset,
        "device": device.device_kind,
        "platform": device.platform,
        "dtype": dtype,
        "jax": jax.__version__,
        "python": platform.python_version(),
    }
    for name, value in (conditions | figures).items():
        print(f"{name:>24}  {value}")
    print(json.dumps(conditions | figures))


if __name__ == "__main__":
    main()
