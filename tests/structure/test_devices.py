"""The same programs compiled for an H100 and for a TPU that are not there, at full width and a few layers.

make test-structure installs what that takes into an environment of its own: JAX's CUDA plugin (3.4 GB), and libtpu.
"""

import importlib.util
import re
from typing import Any

import jax
import numpy as np
import pytest

from mindalle_jax.config.schema import Config

# Pallas for Triton.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")

LAYERS = 42
# Kernels of a layer in a step, as compiled by jax 0.12.0; by 0.10.2 up to four more.
KERNELS = {
    ("xla", None): 18,
    ("xla", "weights"): 18,
    ("xla", "weights+cache"): 23,
    ("xla-private", None): 14,
    ("xla-private", "weights+cache"): 18,
    ("cudnn", None): 12,
    ("cudnn", "weights"): 12,
    ("pallas", None): 11,
    ("pallas", "weights"): 11,
    ("pallas", "weights+cache"): 14,
}
OTHER_KERNELS = 48
NEWEST = tuple(map(int, jax.__version__.split(".")[:2])) >= (0, 12)
SMALLEST_MATRIX = 1 << 20
IN_PLACE = {"parameter", "get-tuple-element", "bitcast", "tuple", "dynamic-update-slice", "custom-call"}
"""What may give an array of the shape of weights or cache within the loop; Pallas kernels are custom calls."""


@pytest.fixture(scope="module")
def script() -> Any:
    """scripts/bench/plan_sampling.py as a module."""
    from scripts.bench import plan_sampling

    return plan_sampling


def need(*plugins: str) -> None:
    """Skips unless one of the modules is installed."""
    names = jax.__version__.split(".")[:2]
    if not any(importlib.util.find_spec(name) for name in plugins):
        pytest.skip(f"compiling for such a device needs {plugins[0]} for jax {'.'.join(names)}: make test-structure")


@pytest.fixture(scope="module")
def need_cuda() -> None:
    if importlib.util.find_spec("jax_plugins") is None:
        pytest.skip("compiling for a GPU needs JAX's CUDA plugin: make test-structure")
    need("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")


@pytest.fixture(scope="module", params=KERNELS, ids=lambda p: f"{p[0]}-{p[1]}")
def h100(script, need_cuda, request) -> Any:
    """(attention, quantize, the loop with 2 layers, with 3 layers): 96 candidates on an H100."""
    attention, quantize = request.param
    loops = [script.compile_loop(script.with_layers(Config(), n), "h100", 96, quantize, attention) for n in (2, 3)]
    return attention, quantize, *loops


@pytest.fixture(scope="module", params=[None, "weights+cache"])
def v5e(script, request, monkeypatch_module) -> Any:
    """The same with 128 candidates on a TPU."""
    need("libtpu")
    monkeypatch_module.setenv("TPU_SKIP_MDS_QUERY", "1")
    config = Config()
    return [script.compile_loop(script.with_layers(config, n), "v5e", 128, request.param, "xla-lanes") for n in (2, 3)]


@pytest.fixture(scope="module")
def monkeypatch_module() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def body(text: str) -> list[tuple[str, tuple[int, ...], str]]:
    """(name, shape, operation) of all that the instructions in the body of the loop over positions give.

    Each is run by itself; one that gives several arrays is there once for each.
    """
    (loop,) = (line for line in text.splitlines() if re.search(r" while\(", line))
    name = re.search(r"body=%?([\w.-]+)", loop)[1]  # type: ignore[index]
    found = re.search(rf"^%?{re.escape(name)} \(.*?^\}}", text, re.MULTILINE | re.DOTALL)
    assert found
    lines = re.findall(r"^  (?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\(", found[0], re.MULTILINE)
    return [
        (name, tuple(int(n) for n in dims.split(",") if n), op)
        for name, given, op in lines
        for dims in re.findall(r"\w+\[([\d,]*)\]", given)
    ]


def shapes_of_weights_and_cache(script, batch: int) -> set[tuple[int, ...]]:
    """With all ways to order the axes of the cache, which may have the prefix in it."""
    h = Config().stage2.hparams
    lengths = (h.ctx_len_img, h.ctx_len_txt + h.ctx_len_img)
    caches = {tuple(sorted((batch, h.n_heads, length, h.embed_dim // h.n_heads))) for length in lengths}
    params = script.transformer_params(script.with_layers(Config(), 2), jax.numpy.bfloat16, None)
    matrices = {leaf.shape for leaf in jax.tree.leaves(params) if len(leaf.shape) > 1 and leaf.size >= SMALLEST_MATRIX}
    matrices |= {(int(np.prod(shape[:-1])), shape[-1]) for shape in matrices}
    return matrices | {shape[::-1] for shape in matrices} | caches


def moved(script, text: str, batch: int, allowed: set[str]) -> list[tuple[str, tuple[int, ...], str]]:
    """What writes an array of such a shape at every step, and does not do so in place."""
    shapes = shapes_of_weights_and_cache(script, batch)
    return [
        (name, dims, op)
        for name, dims, op in body(text)
        if (dims in shapes or tuple(sorted(dims)) in shapes)
        and op not in allowed
        and not (op == "fusion" and "dynamic_update_slice" in name.replace("-", "_"))
    ]


def test_one_launch_a_step(h100):
    """All kernels of a step are in one CUDA graph, and nothing waits for the host."""
    _, _, *loops = h100
    for loop in loops:
        assert loop.launches == ["CommandBuffer"]
        assert re.findall(r'"known_trip_count":\{"n":"(\d+)"', loop.text) == ["16"]
        assert not re.search(r"\b(infeed|outfeed|send|recv|host-callback)\(", loop.text)


def test_kernels_of_a_step(h100):
    """Each costs about a microsecond, whatever it does: 42 layers of 11 are 462, of 18 756."""
    attention, quantize, two, three = h100
    a_layer = len(three.kernels) - len(two.kernels)
    assert a_layer <= KERNELS[attention, quantize] + (0 if NEWEST else 4)
    assert len(two.kernels) - 2 * a_layer <= OTHER_KERNELS
    assert sum("decode_attention" in name for name in two.kernels) == (2 if attention == "pallas" else 0)


def test_weights_and_cache_stay_where_they_are(script, h100):
    """No copy, no conversion, no transpose of either is written at any step."""
    _, _, _, three = h100
    shapes = shapes_of_weights_and_cache(script, 96)
    assert any(tuple(sorted(dims)) in shapes for _, dims, _ in body(three.text)), "the shapes are not in the program"
    assert moved(script, three.text, 96, IN_PLACE) == []


def test_temporary_memory_on_the_gpu(h100):
    """Within 5 % of the cache, with 42 layers of what a third one adds to two."""
    _, _, two, three = h100
    whole = three.cache_bytes // 3 * LAYERS
    first, second = (loop.memory.temp_size_in_bytes for loop in (two, three))
    assert three.memory.alias_size_in_bytes >= three.cache_bytes
    assert first + (LAYERS - 2) * (second - first) < 0.05 * whole


def test_weights_and_cache_stay_where_they_are_on_a_tpu(script, v5e, request):
    """But for copies into the memory beside the cores, ahead of their use."""
    if request.node.callspec.params["v5e"] == "weights+cache":
        reason = "fusions give arrays of the cache's shape beside others, and may not do so in place: docs/log.md"
        request.applymarker(pytest.mark.xfail(strict=True, reason=reason))
    for loop in v5e:
        assert moved(script, loop.text, 128, IN_PLACE | {"copy-start", "copy-done", "slice-start", "slice-done"}) == []


def test_temporary_memory_on_a_tpu(v5e):
    """As on the GPU. With candidates first, a call would begin and end with the whole cache in another order.

    The scales of int8 still are: 5.4 MB a layer beside a cache of 104 MB a layer.
    """
    two, three = v5e
    whole = three.cache_bytes // 3 * LAYERS
    first, second = (loop.memory.temp_size_in_bytes for loop in (two, three))
    assert three.memory.alias_size_in_bytes >= three.cache_bytes
    assert first + (LAYERS - 2) * (second - first) < 0.065 * whole


@pytest.mark.skipif(not NEWEST, reason="XLA of jax 0.10 cannot tile the products of an update without a device")
@pytest.mark.parametrize("flash_attention", [False, True])
def test_an_update_of_fsdp(script, need_cuda, request, flash_attention):
    """On eight H100: parameters are cast before they are gathered, and the gradients of blocks stay so.

    Flash attention is split with the batch, and writes no weights of 319 or 320 squared.
    """
    from scripts.bench import plan_training

    devices = script.h100_devices(8)
    config = request.config.rootpath / "configs" / "finetune-captions.yaml"
    overrides = ["sharding.strategy=fsdp", "data.train=photos"]
    overrides.append(f"training.flash_attention={str(flash_attention).lower()}")
    *_, compiled = plan_training.compile_step(config, overrides, list(devices))
    text = compiled.as_text() or ""
    assert bool(re.search(r",(319,319|320,320)\]", text)) != flash_attention
    assert ("fmhaSoftmaxBackward" in text) == flash_attention
    gathered, scattered = collectives(text, "all-gather"), collectives(text, "reduce-scatter")
    assert {dtype for dtype, size in gathered if size >= SMALLEST_MATRIX} == {"bf16"}
    h, vocab_img, vocab_txt = Config().stage2.hparams, Config().stage2.vocab_size_img, Config().stage2.vocab_size_txt
    assert ("bf16", 4 * h.embed_dim**2) in gathered and ("bf16", 4 * h.embed_dim**2) in scattered
    # Heads, whose logits are float32, are the only large arrays in float32, whole and an eighth of each.
    heads = {h.embed_dim * size // part for size in (vocab_img, vocab_txt) for part in (1, 8)}
    assert {size for dtype, size in scattered if dtype == "f32" and size >= SMALLEST_MATRIX} <= heads


def collectives(text: str, name: str) -> set[tuple[str, int]]:
    """(dtype, elements) of the whole arrays that collectives of a kind take or give, the larger of the two sides."""
    found = set()
    for line in text.splitlines():
        match = re.search(rf" = (.*?) {name}(?:-start)?\(", line)
        if match:
            found |= {
                (dtype, int(np.prod([int(n) for n in dims.split(",") if n])))
                for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", match[1])
            }
    return found
