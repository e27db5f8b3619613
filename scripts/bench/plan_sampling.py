"""Memory and launches of sampling on a device that need not be there, read from the compiled programs.

    python -m scripts.bench.plan_sampling                                    # which batch fits into 8 to 80 GB
    python -m scripts.bench.plan_sampling --quantize weights+cache --target cpu
    python -m scripts.bench.plan_sampling --target v5e --batch-size 128

--target h100 needs JAX's CUDA plugin, v5e the libtpu package, and neither a GPU nor a TPU: make test-structure installs
both into .venv-structure. Weights, cache and pictures are counted exactly; temporaries come from the compiler, with two
layers in place of all, since they do not grow with layers, and matrix products are tiled by rule, not by trial.
Memory is the weights of all networks (transformer, VQGAN, CLIP ViT-B/32), and what the more demanding of drawing codes
and decoding pictures takes beside them. JAX takes three quarters of a GPU's memory unless
XLA_PYTHON_CLIENT_MEM_FRACTION says more; the table asks for nine tenths. Prints a table, then one JSON line.
"""

import argparse
import dataclasses
import json
import math
import os
import re
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

TARGETS = ("h100", "v5e", "cpu")
MEMORY_GB = (8, 12, 16, 24, 40, 80)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 96, 128)


def main() -> None:
    """Parses the command line, compiles, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path(__file__).parents[2] / "configs/mindalle-1.3b.yaml")
    parser.add_argument("--target", choices=TARGETS, default="h100", help="default: %(default)s")
    parser.add_argument("--quantize", choices=["weights", "weights+cache"], help="as of mindalle sample")
    backends = ["xla", "xla-lanes", "xla-private", "cudnn", "pallas"]
    parser.add_argument("--attention", choices=backends, help="default: as of mindalle sample")
    parser.add_argument("--batch-size", type=int, help="this one alone (default: a table)")
    arguments = parser.parse_args()
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}  # before jax is imported; nothing is looked for

    from mindalle_jax.config.file import load_config
    from mindalle_jax.models.attention import default_backend

    attention = arguments.attention or default_backend({"h100": "gpu", "v5e": "tpu"}.get(arguments.target, "cpu"))
    config = load_config(arguments.config)
    pictures = compile_pictures(config, arguments.target, 1 if arguments.target == "cpu" else 16)
    decoding, rows = pictures.temp_size_in_bytes + pictures.output_size_in_bytes, []
    for batch in BATCHES if arguments.batch_size is None else [arguments.batch_size]:
        rows.append(plan(config, arguments.target, batch, arguments.quantize, attention, decoding))
        print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    fits = {}
    for size in MEMORY_GB:
        small = [row["batch"] for row in rows if row["peak_GB"] <= 0.9 * size]
        fits[f"{size} GB"] = max(small, default=None)
    print("largest batch that fits: " + "  ".join(f"{size}: {batch}" for size, batch in fits.items()))
    conditions = {"plan": "sampling", "target": arguments.target, "quantize": arguments.quantize}
    print(json.dumps(conditions | {"attention": attention, "rows": rows, "fits": fits}))


def plan(config: Any, target: str, batch: int, quantize: str | None, attention: str, decoding: int) -> dict[str, Any]:
    """Bytes on a device, in GB. decoding: those of decoding pictures, which does not depend on the batch."""
    import jax.numpy as jnp

    from mindalle_jax.interop.clip import clip_leaf_shapes
    from mindalle_jax.models.clip import ClipConfig
    from mindalle_jax.storage.weights import leaf_shapes

    layers = config.stage2.hparams.n_layers
    dtype = jnp.dtype("float32" if target == "cpu" else "bfloat16")
    loop = compile_loop(with_layers(config, 2), target, batch, quantize, attention)
    transformer = array_bytes(transformer_params(config, dtype, quantize))
    vqgan = 4 * sum(map(math.prod, leaf_shapes(config, "stage1").values()))
    clip = dtype.itemsize * sum(map(math.prod, clip_leaf_shapes(ClipConfig()).values()))
    cache = loop.cache_bytes * layers // 2
    weights, drawing = transformer + vqgan + clip, cache + loop.memory.temp_size_in_bytes
    figures = {
        "transformer_GB": transformer,
        "vqgan_and_clip_GB": vqgan + clip,
        "cache_GB": cache,
        "temporaries_GB": loop.memory.temp_size_in_bytes,
        "decoding_pictures_GB": decoding,
        "peak_GB": weights + max(drawing, decoding),
    }
    return {"batch": batch} | {name: round(count / 1e9, 3) for name, count in figures.items()}


@dataclasses.dataclass(frozen=True)
class Loop:
    """The compiled program that draws a row of codes."""

    text: str
    """the optimised program"""
    memory: Any
    cache_bytes: int
    launches: list[str] | None
    """what the host starts at every step, on a GPU: kernels, or one graph of them"""
    kernels: list[str] | None
    """those of a step, top-p off"""


def compile_loop(config: Any, target: str, batch: int, quantize: str | None, attention: str) -> Loop:
    """Lowers and compiles decode_segment for one row of codes of `batch` candidates."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from mindalle_jax.models.transformer import Transformer
    from mindalle_jax.sampling.decode import Settings, decode_segment, prefill, row_length, start_state

    mesh, place = mesh_of(target)
    h, vocab_size = config.stage2.hparams, config.stage2.vocab_size_img
    dtype = jnp.dtype("float32" if target == "cpu" else "bfloat16")
    model = Transformer(
        config.stage2, stacked=False, dtype=dtype, attention=attention, int8_cache=quantize == "weights+cache"
    )

    def placed(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)

    def ints(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    params, steps = transformer_params(config, dtype, quantize), row_length(h.ctx_len_img)
    prefix = jax.eval_shape(lambda *a: prefill(model, *a), params, ints(h.ctx_len_txt), ints(0), ints())
    start = partial(start_state, model, mesh, batch, h.ctx_len_img)
    state = jax.eval_shape(start, prefix, ints())
    settings = Settings.make(vocab_size, seed=0, temperature=1.0, top_k=min(256, vocab_size), top_p=None)
    traced = jax.tree.map(np.asarray, settings.traced(vocab_size))
    arguments = placed((params, prefix.kv, ints(batch), traced, state, ints(batch, steps)))
    with jax.threefry_partitionable(True):
        lowered = decode_segment.lower(model, mesh, steps, False, *arguments)
        compiled, launches, kernels = compile_loop_of(lowered, gpu=target == "h100")
    return Loop(compiled.as_text() or "", compiled.memory_analysis(), array_bytes(state.cache), launches, kernels)


def compile_loop_of(lowered: Any, *, gpu: bool) -> tuple[Any, list[str] | None, list[str] | None]:
    """The compiled decode_segment, and on a GPU launches and kernels as in Loop."""
    with tempfile.TemporaryDirectory() as folder:
        dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True} if gpu else {}
        compiled = lowered.compile(compiler_options=dump)
        thunks = sorted(Path(folder).glob("*decode_segment*thunk_sequence_after_thunk_passes.txt"))
        launches, kernels = read_thunks(thunks[0].read_text()) if thunks else (None, None)
        return compiled, launches, kernels


def compile_pictures(config: Any, target: str, count: int) -> Any:
    """Memory of the program that decodes pictures."""
    import jax
    import jax.numpy as jnp

    from mindalle_jax.models.vqgan import VQGAN
    from mindalle_jax.sampling.codec import decode_pictures
    from mindalle_jax.storage.weights import leaf_shapes, nest

    mesh, place = mesh_of(target)
    vqgan = VQGAN(config.stage1, dtype=jnp.dtype("float32" if target == "cpu" else "bfloat16"))
    shapes = leaf_shapes(config, "stage1").items()
    params = nest({name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place) for name, shape in shapes})
    codes = jax.ShapeDtypeStruct((count, *[config.stage1.code_size] * 2), jnp.int32, sharding=place)
    return decode_pictures.lower(vqgan, mesh, params, codes).compile().memory_analysis()


def transformer_params(config: Any, dtype: Any, quantize: str | None) -> dict[str, Any]:
    """Abstract parameters in the layout of sampling."""
    import jax
    import jax.numpy as jnp

    from mindalle_jax.storage.weights import leaf_shapes, nest

    leaves = {}
    for stacked, whole in leaf_shapes(config, "stage2").items():
        blocks = stacked.startswith("blocks/")
        for layer in range(whole[0]) if blocks else [0]:
            name, shape = (stacked.replace("/", f"_{layer}/", 1), whole[1:]) if blocks else (stacked, whole)
            leaves[name] = jax.ShapeDtypeStruct(shape, dtype)
            if quantize and name.endswith("/weight"):
                leaves[name] = jax.ShapeDtypeStruct(shape, jnp.int8)
                leaves[f"{name}_scale"] = jax.ShapeDtypeStruct(shape[:-1], jnp.float32)
    return nest(leaves)


def mesh_of(target: str) -> tuple[Any, Any]:
    """A mesh of one such device, and the placement on it."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    devices = jax.devices("cpu")[:1]
    if target == "h100":
        described = (Path(__file__).parent / "h100.textproto").read_text()
        devices = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=described).devices
    elif target == "v5e":
        devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices[:1]
    mesh = Mesh(np.array(devices), ("data",))
    return mesh, NamedSharding(mesh, PartitionSpec())


def read_thunks(text: str) -> tuple[list[str], list[str]]:
    """Of XLA's listing of what a program launches: launches, and kernels, of one trip of its only outer loop.

    Lines are indented by nesting: `003: kWhile`, below it `condition:` and `body:`, and within a conditional branches,
    of which `false_branch` is that of top-p.
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
    """Of all arrays, or shapes, in a tree."""
    import jax

    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


if __name__ == "__main__":
    main()
