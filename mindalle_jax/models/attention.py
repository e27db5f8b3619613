"""Attention of one decoding step, in several backends with one interface.

Dimensions: b batch of rows, w positions fed at once, h heads, k head width, p prefix length, t image positions.

Rows of one prompt can share the keys and values of its prefix. These are stored once, without a batch axis. Keys and
values of the image sampled so far are stored per row. The backends in PRIVATE_PREFIX instead store a prefix per row, at
the beginning of its cache. Then rows may have different prompts. Such a step reads more and has fewer operations.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from mindalle_jax.models.quantization import Quantized, quantize


class KV(NamedTuple):
    """Keys and values of one layer: [h, p, k] for a shared prefix, [b, h, t, k] for the cache of the rows.

    In a cache they may be Quantized, with one scale per vector. A private prefix has the first of the t positions. Some
    backends have the axes of a cache in another order: CACHE_AXES.
    """

    k: Any
    v: Any


CACHE_AXES = {"cudnn": "bthk", "xla-lanes": "thkb", "xla-lanes-private": "thkb"}
"""Order of the axes of a cache, by backend; bhtk for every other backend."""

PRIVATE_PREFIX = ("xla-private", "xla-lanes-private", "cudnn")
"""Backends with a prefix per row."""


def default_backend(platform: str) -> str:
    """Returns the default backend of a platform. A TPU needs the rows in its lanes, else it copies the cache."""
    return "xla-lanes" if platform == "tpu" else "xla"


def private_backend(backend: str) -> str:
    """Returns the backend with a prefix per row that corresponds to `backend`."""
    if backend in PRIVATE_PREFIX:
        return backend
    return "xla-lanes-private" if backend == "xla-lanes" else "xla-private"


def cache_axes(backend: str) -> str:
    """Returns the order of the axes of keys and values in the cache of a backend. Scales have the same without k."""
    return CACHE_AXES.get(backend, "bhtk")


def new_cache(backend: str, batch: int, prefix: KV, given: KV, length: int, *, int8: bool) -> KV:
    """Returns the cache of a layer for `batch` rows and `length` codes. int8: whether it is Quantized.

    prefix, given: keys and values of the prompt and of given codes, [h, p, k] and [h, m, k], or per row [b, h, p, k]
    and [b, h, m, k]. The first `length` of `given` are put at the beginning, after a private prefix.
    """
    axes = cache_axes(backend)

    def filled(prefix: jax.Array, own: jax.Array) -> Any:
        own = _pad(own[..., :length, :], own.ndim - 2, length)
        if backend in PRIVATE_PREFIX:
            own = jnp.concatenate([prefix, own], axis=-2)
        own = jnp.broadcast_to(own, (batch, *own.shape[-3:]))
        if not int8:
            return _ordered(own, "bhtk", axes)
        values, scale = quantize(own, own.dtype)
        return Quantized(_ordered(values, "bhtk", axes), _ordered(scale, "bht", axes.replace("k", "")))

    return KV(filled(prefix.k, given.k), filled(prefix.v, given.v))


def pad_cache(backend: str, cache: KV, length: int) -> KV:
    """Pads the cache of a layer with zeros to `length` positions. There may be more axes before those of cache_axes."""

    def padded(x: Any, axes: str) -> Any:
        if isinstance(x, Quantized):
            return Quantized(padded(x.values, axes), padded(x.scale, axes.replace("k", "")))
        return _pad(x, x.ndim - len(axes) + axes.index("t"), length)

    return KV(padded(cache.k, cache_axes(backend)), padded(cache.v, cache_axes(backend)))


def cache_capacity(backend: str, cache: KV) -> int:
    """Returns the number of positions in the cache of a layer."""
    return jax.tree.leaves(cache)[0].shape[cache_axes(backend).index("t") - 4]


def decode_attention_xla(
    q: jax.Array, new: KV, prefix: KV, cache: KV, t: jax.Array, *, axes: str = "bhtk"
) -> tuple[jax.Array, KV]:
    """Writes positions t..t+w-1 into the cache. Each attends to the prefix and to all positions up to itself.

    q, new.k and new.v: [b, w, h, k]. axes: order of the axes of the cache, see CACHE_AXES. Returns ([b, w, h, k],
    cache). The softmax is in float32. The complete cache is read, and later positions are masked. With w = 1, t = 1 of
    4 positions and a prefix of 2 the columns are

        prefix 0, prefix 1 | position 0, position 1, masked, masked
    """
    cache = _put(cache, new, t, axes)
    prefix_length, scale = prefix.k.shape[1], q.shape[-1] ** -0.5
    shared = jnp.einsum("bwhk,hpk->bhwp", q, prefix.k, preferred_element_type=jnp.float32)
    own = jnp.einsum(f"bwhk,{axes}->bhwt", q, _values(cache.k, q), preferred_element_type=jnp.float32)
    own = _scaled(own, cache.k, axes)
    own = jnp.where(_visible(t, *own.shape[-2:]), own, -jnp.inf)
    weights = jax.nn.softmax(jnp.concatenate([shared, own], axis=-1) * scale, axis=-1)
    from_prefix = jnp.einsum("bhwp,hpk->bwhk", weights[..., :prefix_length].astype(q.dtype), prefix.v)
    own = _scaled(weights[..., prefix_length:], cache.v, axes).astype(q.dtype)
    return from_prefix + jnp.einsum(f"bhwt,{axes}->bwhk", own, _values(cache.v, q)), cache


def decode_attention_reference(q: jax.Array, new: KV, prefix: KV, cache: KV, t: jax.Array) -> tuple[jax.Array, KV]:
    """Computes the same by the definition: copies the prefix before the keys of each row, and takes one softmax."""
    cache = _put(cache, new, t)

    def with_prefix(shared: jax.Array, own: Any) -> jax.Array:
        if isinstance(own, Quantized):
            own = own.values * own.scale[..., None]
        return jnp.concatenate([jnp.broadcast_to(shared, (q.shape[0], *shared.shape)), own], axis=2)[:, :, None]

    keys, values = with_prefix(prefix.k, cache.k), with_prefix(prefix.v, cache.v)  # [b, h, 1, p + t, k]
    scores = jnp.sum(q.swapaxes(1, 2)[:, :, :, None] * keys, axis=-1).astype(jnp.float32) * q.shape[-1] ** -0.5
    prefix_length = prefix.k.shape[1]
    visible = _visible(t, q.shape[1], keys.shape[3] - prefix_length)
    visible = jnp.pad(visible, ((0, 0), (prefix_length, 0)), constant_values=True)
    weights = jax.nn.softmax(scores, axis=-1, where=visible)
    return jnp.sum(weights[..., None] * values, axis=3).swapaxes(1, 2).astype(q.dtype), cache


def decode_attention_pallas(q: jax.Array, new: KV, prefix: KV, cache: KV, t: jax.Array) -> tuple[jax.Array, KV]:
    """Computes the same with one kernel per layer, which reads only the cache up to position t.

    It is for NVIDIA GPUs. On other devices it is interpreted, for tests. It passes several positions at once (w > 1) to
    XLA, and also head widths that are no power of two, which Triton does not have.
    """
    width = q.shape[-1]
    if q.shape[1] > 1 or width & (width - 1):
        return decode_attention_xla(q, new, prefix, cache, t)
    from mindalle_jax.models import kernels  # imported only on request: see that file

    new = jax.tree.map(lambda x: x[:, 0], _as_in(cache, new))
    attended, cache = jax.lax.platform_dependent(
        *(q[:, 0], new, prefix, cache, t),
        cuda=kernels.decode_attention,
        default=partial(kernels.decode_attention, interpret=True),
    )
    return attended[:, None], cache


def decode_attention_private(
    q: jax.Array, new: KV, prefix: KV | int, cache: KV, t: jax.Array, *, axes: str = "bhtk"
) -> tuple[jax.Array, KV]:
    """Computes the same with a private prefix, the first p positions of the cache, in two matrix products per layer.

    prefix: p, or the keys and values of the prefix.
    """
    empty = jnp.zeros((q.shape[2], 0, q.shape[3]), q.dtype)
    return decode_attention_xla(q, new, KV(empty, empty), cache, _length(prefix) + t, axes=axes)


def decode_attention_cudnn(
    q: jax.Array, new: KV, prefix: KV | int, cache: KV, t: jax.Array, *, implementation: Any = "cudnn"
) -> tuple[jax.Array, KV]:
    """Computes the same with cuDNN's flash attention, which reads only the cache up to position t.

    With several positions at once (w > 1) it masks later positions instead. It needs an NVIDIA GPU, bfloat16, and a
    cache that is not quantized. Raises RuntimeError without cuDNN.
    """
    at, (b, window) = _length(prefix) + t, q.shape[:2]
    cache = _put(cache, new, at, CACHE_AXES["cudnn"])
    length = cache.k.shape[1]
    if window == 1:
        limits: Any = {"query_seq_lengths": jnp.ones(b, jnp.int32), "key_value_seq_lengths": jnp.full(b, at + 1)}
    else:
        limits = {"mask": _visible(at, window, length)[None, None]}
    return jax.nn.dot_product_attention(q, *cache, **limits, implementation=implementation), cache


def _length(prefix: KV | int) -> int:
    return prefix if isinstance(prefix, int) else prefix.k.shape[-2]


def _put(cache: KV, new: KV, t: jax.Array, axes: str = "bhtk") -> KV:
    def put(old: jax.Array, x: jax.Array) -> jax.Array:  # x [b, w, h, k], or scales [b, w, h]
        order = axes if x.ndim == 4 else axes.replace("k", "")
        start = [t if axis == "t" else 0 for axis in order]
        return jax.lax.dynamic_update_slice(old, _ordered(x, "bthk"[: x.ndim], order), start)

    return jax.tree.map(put, cache, _as_in(cache, new))


def _ordered(x: jax.Array, axes: str, order: str) -> jax.Array:
    """Transposes x, whose axes are named `axes`, to the order `order`."""
    return x.transpose([axes.index(axis) for axis in order])


def _pad(x: jax.Array, axis: int, length: int) -> jax.Array:
    """Pads an axis with zeros at its end, up to the length."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = 0, length - x.shape[axis]
    return jnp.pad(x, widths)


def _as_in(cache: KV, new: KV) -> KV:
    """Quantizes new keys and values if the cache is quantized."""
    return KV(*(quantize(x, x.dtype) for x in new)) if isinstance(cache.k, Quantized) else new


def _values(own: Any, q: jax.Array) -> jax.Array:
    """Returns the keys or values of a cache in the dtype of q; those of an int8 cache are not scaled."""
    values = own.values if isinstance(own, Quantized) else own
    # XLA may choose another order of axes for the loop. On a GPU it would then hold the cache twice, to convert it.
    order = Layout(tuple(range(values.ndim)))
    return jax.lax.platform_dependent(
        values, cuda=lambda values: with_layout_constraint(values, order), default=lambda values: values
    ).astype(q.dtype)


def _scaled(x: jax.Array, own: Any, axes: str = "bhtk") -> jax.Array:
    """Multiplies x [b, h, w, t] by the scales of the positions t, if the cache is quantized."""
    if not isinstance(own, Quantized):
        return x
    return x * _ordered(own.scale, axes.replace("k", ""), "bht")[:, :, None].astype(x.dtype)


def _visible(t: jax.Array, window: int, length: int) -> jax.Array:
    """Returns bool[w, length]: whether each of the positions t..t+w-1 attends to each position of the image."""
    return jnp.arange(length) <= t + jnp.arange(window)[:, None]


DECODE_ATTENTION: dict[str, Callable[[jax.Array, KV, Any, KV, jax.Array], tuple[jax.Array, KV]]] = {
    "xla": decode_attention_xla,
    "xla-lanes": partial(decode_attention_xla, axes=CACHE_AXES["xla-lanes"]),
    "xla-private": decode_attention_private,
    "xla-lanes-private": partial(decode_attention_private, axes=CACHE_AXES["xla-lanes-private"]),
    "cudnn": decode_attention_cudnn,
    "pallas": decode_attention_pallas,
    "reference": decode_attention_reference,
}
"""The backends by name."""
