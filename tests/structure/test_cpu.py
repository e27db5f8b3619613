"""The compiled decoding loop, read as text: what no timing on a small machine would show."""

import re

import jax
import numpy as np
import pytest

from mindalle_jax.config.file import load_config
from mindalle_jax.models.transformer import Transformer, unstack_blocks
from mindalle_jax.sampling.decode import prefill, row_length, sample_row, start_decode
from mindalle_jax.sampling.filters import Rows
from mindalle_jax.storage.weights import leaf_shapes

BATCH = 4


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "guided"])
def loop(request):
    """(config, rows of a candidate, jaxpr, compiled) of one call of the decoding loop of a tiny network."""
    # A larger picture, so that the 24 positions of a call are told apart from the 32 bits of the top-k bisection.
    larger = ["dataset.image_resolution=48", "stage1.hparams.resolution=48", "stage2.hparams.ctx_len_img=576"]
    config = load_config(request.config.rootpath / "configs" / "tiny.yaml", larger)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    h = config.stage2.hparams
    stacked = Transformer(config.stage2).init(
        jax.random.key(0), np.zeros((1, h.ctx_len_txt), np.int32), np.zeros((1, h.ctx_len_img), np.int32)
    )
    model, params = Transformer(config.stage2, stacked=False), unstack_blocks(stacked["params"])
    rows = 2 if request.param else 1
    prefix_ids = np.zeros((rows, h.ctx_len_txt) if request.param else h.ctx_len_txt, np.int32)
    prefix = prefill(model, params, prefix_ids, np.zeros(0, np.int32), 0)
    state = start_decode(model, mesh, BATCH, h.ctx_len_img, request.param, prefix, 0)
    settings = Rows(
        np.arange(BATCH, dtype=np.int32), np.zeros(BATCH, np.uint32), np.ones(BATCH, np.float32),
        np.full(BATCH, 16, np.int32), np.ones(BATCH, np.float32), np.full(BATCH, rows, np.float32),
    )  # fmt: skip
    guess = np.zeros((BATCH, row_length(h.ctx_len_img)), np.int32)
    arguments = (params, prefix.kv, settings, state, guess)
    jaxpr = jax.make_jaxpr(sample_row, static_argnums=(0, 1, 2))(model, mesh, False, *arguments)
    return config, rows, str(jaxpr), sample_row.lower(model, mesh, False, *arguments).compile()


def test_one_scan_over_the_positions(loop):
    """A data-dependent loop would wait for the host, or for a flag on the device, at every step."""
    config, _, jaxpr, _ = loop
    steps = row_length(config.stage2.hparams.ctx_len_img)
    assert steps == 24 and len(re.findall(rf"\blength={steps}\b", jaxpr)) == 1
    assert " while[" not in jaxpr


def test_every_loop_has_a_static_trip_count(loop):
    """The compiler must know it, to unroll, or to record one graph a step."""
    config, _, _, compiled = loop
    loops = [line for line in compiled.as_text().splitlines() if re.search(r"\bwhile\(", line)]
    counts = [re.search(r'"known_trip_count":\{"n":"(\d+)"', line) for line in loops]
    assert loops and all(counts)
    steps = row_length(config.stage2.hparams.ctx_len_img)
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
