"""Reads the memory and the launches of sampling from programs that are compiled for a device; no device is needed.

    python -m scripts.bench.plan_sampling                                    # which batch fits into 8 to 80 GB
    python -m scripts.bench.plan_sampling --quantize weights+cache --target cpu
    python -m scripts.bench.plan_sampling --target v5e --batch-size 128

--target h100 needs JAX's CUDA plugin, and v5e needs the libtpu package, but no GPU or TPU. `make test-structure`
installs both packages into .venv-structure.

Memory is the weights of all networks (transformer, VQGAN, CLIP ViT-B/32), plus the larger of the memory to sample codes
and the memory to decode images. Weights, cache and images are counted exactly. Temporaries come from the compiler, for
two layers instead of all, since they do not grow with the number of layers. Matrix products are tiled by rule, not by
trial. JAX takes three quarters of the memory of a GPU, unless XLA_PYTHON_CLIENT_MEM_FRACTION says more. The table
assumes nine tenths. Prints a table, then one JSON line.
"""

import dataclasses
import math
import os
import re
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mindalle_jax.cli.parser import path
from mindalle_jax.interop.clip import clip_leaf_shapes
from mindalle_jax.models.attention import DECODE_ATTENTION, default_backend
from mindalle_jax.models.clip import ClipConfig
from mindalle_jax.models.transformer import Transformer
from mindalle_jax.models.vqgan import VQGAN
from mindalle_jax.sampling.codec import decode_images
from mindalle_jax.storage.weights import leaf_shapes, nest
from scripts.bench import common

PLATFORMS = {"h100": "gpu", "v5e": "tpu", "cpu": "cpu"}
"""Target -> its platform in JAX."""
MEMORY_GB = (8, 12, 16, 24, 40, 80)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 96, 128)


def main() -> None:
    """Parses the command line, compiles, prints."""
    parser = common.make_parser(__doc__)
    parser.add_argument(
        "--config", type=path, default=common.PRESETS["1.3b"], help="the network (default: the published one)"
    )
    parser.add_argument("--target", choices=PLATFORMS, default="h100", help="default: %(default)s")
    common.add_quantize(parser)
    parser.add_argument("--attention", choices=list(DECODE_ATTENTION), help="default: as in mindalle sample")
    parser.add_argument("--batch-size", type=int, help="plan only this batch size (default: a table)")
    arguments = parser.parse_args()
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # do not look for a TPU
    jax.config.update("jax_platforms", "cpu")

    target, attention = arguments.target, arguments.attention or default_backend(PLATFORMS[arguments.target])
    config = common.load_config(arguments.config)
    images = compile_images(config, target, 1 if target == "cpu" else 16)
    decoding, rows = images.temp_size_in_bytes + images.output_size_in_bytes, []
    for batch in BATCHES if arguments.batch_size is None else [arguments.batch_size]:
        rows.append(plan(config, target, batch, arguments.quantize, attention, decoding))
        print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    fits = {}
    for size in MEMORY_GB:
        small = [row["batch"] for row in rows if row["peak_GB"] <= 0.9 * size]
        fits[f"{size} GB"] = max(small, default=None)
    head = common.conditions(
        "plan_sampling", target, dtype_of(target), arguments.batch_size,
        config=arguments.config.stem, quantize=arguments.quantize, attention=attention,
    )  # fmt: skip
    common.report(head, {"rows": rows, "largest_batch_that_fits": fits})


def dtype_of(target: str) -> Any:
    """The compute dtype on a target."""
    return jnp.dtype("float32" if target == "cpu" else "bfloat16")


def plan(config: Any, target: str, batch: int, quantize: str | None, attention: str, decoding: int) -> dict[str, Any]:
    """Memory on a device, in GB. decoding: bytes of decoding images, which do not depend on the batch."""
    layers = config.stage2.hparams.n_layers
    dtype = dtype_of(target)
    loop = compile_loop(with_layers(config, 2), target, batch, quantize, attention)
    transformer = array_bytes(transformer_params(config, dtype, quantize))
    vqgan = 4 * sum(map(math.prod, leaf_shapes(config, "stage1").values()))
    clip = dtype.itemsize * sum(map(math.prod, clip_leaf_shapes(ClipConfig()).values()))
    cache = loop.cache_bytes * layers // 2
    weights, sampling = transformer + vqgan + clip, cache + loop.memory.temp_size_in_bytes
    memory = {
        "transformer_GB": transformer,
        "vqgan_and_clip_GB": vqgan + clip,
        "cache_GB": cache,
        "temporaries_GB": loop.memory.temp_size_in_bytes,
        "decoding_images_GB": decoding,
        "peak_GB": weights + max(sampling, decoding),
    }
    return {"batch": batch} | {name: round(count / 1e9, 3) for name, count in memory.items()}


@dataclasses.dataclass(frozen=True)
class Loop:
    """The compiled program that samples a row of codes."""

    text: str
    """The optimized program."""
    memory: Any
    cache_bytes: int
    launches: list[str] | None
    """On a GPU: names of what the host starts at every step: kernels, or one graph of kernels."""
    kernels: list[str] | None
    """On a GPU: names of the kernels of a step, with top-p off."""


def compile_loop(config: Any, target: str, batch: int, quantize: str | None, attention: str) -> Loop:
    """Compiles the decoding loop for one row of codes of `batch` candidates."""
    mesh, placement = mesh_of(target)
    dtype = dtype_of(target)
    model = Transformer(
        config.stage2, stacked=False, dtype=dtype, attention=attention, int8_cache=quantize == "weights+cache"
    )
    loop = common.DecodeLoop(model, transformer_params(config, dtype, quantize), mesh, batch)
    with jax.threefry_partitionable(True):
        traced, state = loop.trace((config.stage2.hparams.ctx_len_txt,), placement)
        compiled, launches, kernels = compile_loop_of(traced.lower(), gpu=target == "h100")
    return Loop(compiled.as_text() or "", compiled.memory_analysis(), array_bytes(state.cache), launches, kernels)


def compile_loop_of(lowered: Any, *, gpu: bool) -> tuple[Any, list[str] | None, list[str] | None]:
    """Compiles the decoding loop; returns it and, on a GPU, launches and kernels as in Loop."""
    with tempfile.TemporaryDirectory() as folder:
        dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True} if gpu else {}
        compiled = lowered.compile(compiler_options=dump)
        thunks = sorted(Path(folder).glob("*sample_row*thunk_sequence_after_thunk_passes.txt"))
        launches, kernels = read_thunks(thunks[0].read_text()) if thunks else (None, None)
        return compiled, launches, kernels


def compile_images(config: Any, target: str, count: int) -> Any:
    """Compiles the program that decodes images, and returns its memory."""
    mesh, placement = mesh_of(target)
    vqgan, abstract = VQGAN(config.stage1, dtype=dtype_of(target)), partial(jax.ShapeDtypeStruct, sharding=placement)
    params = {name: abstract(shape, jnp.float32) for name, shape in leaf_shapes(config, "stage1").items()}
    codes = abstract((count, *[config.stage1.code_size] * 2), jnp.int32)
    return decode_images.lower(vqgan, mesh, nest(params), codes).compile().memory_analysis()


def transformer_params(config: Any, dtype: Any, quantize: str | None) -> dict[str, Any]:
    """Abstract parameters in the layout of sampling."""
    leaves = {}
    for name, shape in common.sampling_shapes(config).items():
        leaves[name] = jax.ShapeDtypeStruct(shape, dtype)
        if quantize and name.endswith("/weight"):
            leaves[name] = jax.ShapeDtypeStruct(shape, jnp.int8)
            leaves[f"{name}_scale"] = jax.ShapeDtypeStruct(shape[:-1], jnp.float32)
    return nest(leaves)


def mesh_of(target: str) -> tuple[Any, Any]:
    """A mesh of one device of this kind, and the sharding on it."""
    devices = jax.devices("cpu")[:1]
    if target == "h100":
        devices = h100_devices(1)
    elif target == "v5e":
        devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices[:1]
    mesh = Mesh(np.array(devices), ("data",))
    return mesh, NamedSharding(mesh, PartitionSpec())


def h100_devices(count: int) -> Any:
    """Descriptions of this many H100, for which programs can be compiled."""
    described = (Path(__file__).parent / "h100.textproto").read_text()
    topology = topologies.get_topology_desc(platform="cuda", topology=f"1x1x{count}", target_config=described)
    return topology.devices


def read_thunks(text: str) -> tuple[list[str], list[str]]:
    """(launches, kernels) of one trip of the only outer loop, read from XLA's listing of the thunks of a program.

    Lines are indented by nesting: `003: kWhile`, and below it `condition:` and `body:`. A conditional has branches, and
    `false_branch` is the branch of top-p.
    """
    body = re.split(r"^  body:\n", text, maxsplit=1, flags=re.MULTILINE)[1]
    body = re.split(r"^\d", body, maxsplit=1, flags=re.MULTILINE)[0]
    launches = re.findall(r"^    \d+: k(\w+)", body, flags=re.MULTILINE)
    kernels, skipped = [], None
    for line in body.splitlines():
        indent = len(line) - len(line.lstrip())
        if skipped is not None and indent > skipped:
            continue
        skipped = indent if line.strip() == "false_branch:" else None
        found = re.search(r"\d+: kCustomKernel *\[[^]]*\] (\w+)", line)
        if found:
            kernels.append(found[1])
        elif re.search(r"\d+: k(Copy|Gemm|CublasLt\w*|Cudnn|CustomCall|Memset\w*)\b", line):
            kernels.append(re.search(r": k(\w+)", line)[1])  # type: ignore[index]
    return launches, kernels


def with_layers(config: Any, layers: int) -> Any:
    """The same network with another number of layers."""
    hparams = dataclasses.replace(config.stage2.hparams, n_layers=layers)
    return dataclasses.replace(config, stage2=dataclasses.replace(config.stage2, hparams=hparams))


def array_bytes(tree: Any) -> int:
    """Bytes of all arrays, or shapes, in a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


if __name__ == "__main__":
    main()
