"""The compiled decoding loop, read as text: what no timing on a small machine would show."""

import re

import jax
import numpy as np
import pytest

from mindalle_jax.config.file import load_config
from mindalle_jax.models.transformer import Transformer
from mindalle_jax.storage.weights import leaf_shapes
from scripts.bench.common import DecodeLoop
from scripts.bench.plan_sampling import transformer_params

BATCH = 4


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "guided"])
def loop(request):
    """(config, rows of a candidate, jaxpr, compiled) of one call of the decoding loop of a tiny network."""
    # A larger picture, so that the 24 positions of a call are told apart from the 32 bits of the top-k bisection.
    larger = ["dataset.image_resolution=48", "stage1.hparams.resolution=48", "stage2.hparams.ctx_len_img=576"]
    config = load_config(request.config.rootpath / "configs" / "tiny.yaml", larger)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    model, params = Transformer(config.stage2, stacked=False), transformer_params(config, np.float32, None)
    rows, length = (2, (2,)) if request.param else (1, ())
    decoding = DecodeLoop(model, params, mesh, BATCH, guidance_scale=rows)
    traced, _ = decoding.trace((*length, config.stage2.hparams.ctx_len_txt))
    return config, rows, str(traced.jaxpr), traced.lower().compile()


def test_one_scan_over_the_positions(loop):
    """A data-dependent loop would wait for the host, or for a flag on the device, at every step."""
    config, _, jaxpr, _ = loop
    steps = config.stage1.code_size
    assert steps == 24 and len(re.findall(rf"\blength={steps}\b", jaxpr)) == 1
    assert " while[" not in jaxpr


def test_every_loop_has_a_static_trip_count(loop):
    """The compiler must know it, to unroll, or to record one graph a step."""
    config, _, _, compiled = loop
    loops = [line for line in compiled.as_text().splitlines() if re.search(r"\bwhile\(", line)]
    counts = [re.search(r'"known_trip_count":\{"n":"(\d+)"', line) for line in loops]
    assert loops and all(counts)
    steps = config.stage1.code_size
    assert sum(int(count[1]) == steps for count in counts) == 1


def test_no_copy_of_weights_or_cache(loop):
    """A scan over stacked layers, or a cache carried the wrong way, copies gigabytes at every step."""
    config, rows, _, compiled = loop
    h = config.stage2.hparams
    shapes = {(*((rows,) if rows > 1 else ()), BATCH, h.n_heads, h.ctx_len_img, h.embed_dim // h.n_heads)}
    for name, shape in leaf_shapes(config, "stage2").items():
        if len(shape) > 2 or name.startswith("head"):
            matrix = shape[1:] if name.startswith("blocks/") else shape
            shapes |= {matrix, matrix[::-1], (int(np.prod(matrix[:-1])), matrix[-1])}
    text = compiled.as_text()
    produced = re.findall(r"= \w+\[([\d,]+)\]\S* (\w[\w-]*)\(", text)
    assert any(tuple(map(int, dims.split(","))) in shapes for dims, _ in produced), "the shapes are not in the program"
    moved = [
        (op, dims)
        for dims, op in produced
        if op in ("copy", "transpose", "convert", "slice", "concatenate") and tuple(map(int, dims.split(","))) in shapes
    ]
    assert moved == []


def test_temporary_memory_is_far_below_the_cache(loop):
    """The cache is updated in place: what is donated comes back as the same memory."""
    config, rows, _, compiled = loop
    h = config.stage2.hparams
    cache_bytes = 2 * 4 * rows * BATCH * h.n_layers * h.ctx_len_img * h.embed_dim
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes / 4
