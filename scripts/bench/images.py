"""Times the steps after the codes: the VQGAN decodes them into images, and CLIP ranks the images.

    python -m scripts.bench.images --preset 1.3b --images 96
    python -m scripts.bench.images --preset demo-scenes --device cpu --images 8

Weights and codes are random. Each call has as many images as mindalle sample decodes and ranks at once. The time of
CLIP includes the preprocessing on the device, and leaves out the text. Compilation is timed apart. Prints a table, then
one JSON line.
"""

import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mindalle_jax.config.schema import Config
from mindalle_jax.interop.clip import clip_leaf_shapes
from mindalle_jax.interop.clip_preprocessing import openai_preprocessing
from mindalle_jax.models.clip import CLIP
from mindalle_jax.models.vqgan import VQGAN
from mindalle_jax.ranking.ranker import encode_images
from mindalle_jax.runtime.devices import choose_devices, pinned
from mindalle_jax.sampling.codec import decode_images
from mindalle_jax.storage.weights import leaf_shapes
from scripts.bench import common


def time_decoding(config: Config, dtype: Any, mesh: Mesh, count: int) -> dict[str, Any]:
    """Milliseconds per image of the VQGAN's decoder, over at least `count` images."""
    per_call = mesh.size * (1 if mesh.devices.flat[0].platform == "cpu" else 16)
    vqgan = VQGAN(config.stage1, dtype=dtype)
    params = common.random_params(leaf_shapes(config, "stage1"), jnp.float32, mesh)
    shape = (per_call, config.stage1.code_size, config.stage1.code_size)
    codes = np.random.default_rng(0).integers(0, config.stage1.n_embed, shape, np.int32)
    codes = jax.device_put(codes, NamedSharding(mesh, P("data")))
    return _per_image("decode", lambda: decode_images(vqgan, mesh, params, codes), per_call, count)


def time_ranking(preset: str, config: Config, dtype: Any, mesh: Mesh, count: int) -> dict[str, Any]:
    """Milliseconds per image of CLIP's image tower with its preprocessing, over at least `count` images."""
    per_call = mesh.size * (8 if mesh.devices.flat[0].platform == "cpu" else 32)
    clip_config = common.CLIPS[preset]()
    clip, side = CLIP(clip_config, dtype=dtype), config.stage1.hparams.resolution
    params = common.random_params(clip_leaf_shapes(clip_config), dtype, mesh)
    images = jax.device_put(np.zeros((per_call, side, side, 3), np.uint8), NamedSharding(mesh, P("data")))
    preprocessing = openai_preprocessing(clip_config)
    return _per_image("rank", lambda: encode_images(clip, mesh, preprocessing, params, images), per_call, count)


def _per_image(name: str, call: Any, per_call: int, count: int) -> dict[str, Any]:
    calls = math.ceil(count / per_call)
    start = time.perf_counter()
    jax.block_until_ready(call())
    compile_s = time.perf_counter() - start
    # As in mindalle sample, all calls are dispatched, and then all results are awaited.
    seconds = common.second_call_s(lambda: [call() for _ in range(calls)])
    return {
        f"{name}_compile_s": round(compile_s, 2),
        f"{name}_images_per_call": per_call,
        f"{name}_one_image_ms": round(seconds / (calls * per_call) * 1e3, 4),
    }


def main() -> None:
    """Parses the command line, runs, prints."""
    parser = common.make_parser(__doc__, "1.3b")
    parser.add_argument("--images", type=int, default=96, help="images to time (default: %(default)s)")
    common.add_device(parser)
    arguments = parser.parse_args()
    if arguments.device:
        jax.config.update("jax_platforms", arguments.device)
    config = common.load_preset(arguments.preset)
    mesh, dtype = choose_devices(None, arguments.dtype, small=arguments.preset != "1.3b")
    device, count = mesh.devices.flat[0], arguments.images
    with pinned(dtype):
        metrics = time_decoding(config, jnp.dtype(dtype), mesh, count)
        metrics |= time_ranking(arguments.preset, config, jnp.dtype(dtype), mesh, count)
    metrics["peak_memory_GB"] = round(common.peak_memory_bytes(device) / 1e9, 2)
    head = common.conditions(
        "images", device, dtype, metrics["decode_images_per_call"] // mesh.size,
        preset=arguments.preset, images=count, devices=mesh.size,
    )  # fmt: skip
    common.report(head, metrics)


if __name__ == "__main__":
    main()
