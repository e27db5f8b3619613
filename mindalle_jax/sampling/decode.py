"""Sampling on the device: prefill, then one compiled loop per row of codes.

    prefix = prefill(...)                                # the prompts
    state = start_decode(...)                            # an empty cache, the logits of the first code
    state, codes = sample_row(...)                       # once per row of codes in an image

An image depends only on (seed, candidate number, prompt, settings, mode) and on the compiled batch size. The noise of
candidate i at position t has the key fold_in(fold_in(key(seed), i), t). Every row of a batch is independent.

The caller chooses one of two kinds of prefix; the code of a step is the same. A shared prefix is one prompt of all
rows, whose keys and values are read once. A private prefix belongs to one row, and is at the beginning of its cache.

With classifier-free guidance the network runs twice per row, once after the prompt and once after a blank prompt. The
arrays of the loop then have a leading axis of 2.

Dimensions: b rows of one compiled call, v vocabulary, t image positions, p prefix length, m given codes, h heads,
k head width.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mindalle_jax.models import attention
from mindalle_jax.models.attention import KV, PRIVATE_PREFIX
from mindalle_jax.models.quantization import Quantized
from mindalle_jax.models.transformer import Transformer
from mindalle_jax.sampling.filters import Rows, draw, gumbel_noise

NUM_CACHE_SIZES = {"cpu": 1}
"""Number of sizes in which the cache grows, by backend; 4 on all other backends. See cache_lengths."""
PREFIX_ONLY = ("tok_emb_txt", "pos_emb_txt", "head_txt", "sos")
"""Parameters that only prefill reads, and no step."""


class Prefix(NamedTuple):
    """The result of prefill. Arrays have a leading axis of 2 with guidance, then one of b with a private prefix."""

    logits: jax.Array
    """f32[(b,) v]: logits of the first code to sample"""
    kv: list[KV]
    """keys and values of the prompts, one KV per layer, [(b,) h, p, k] each"""
    prompt_kv: list[KV]
    """keys and values of the image positions, [(b,) h, m, k] each; only those of given codes count"""


class DecodeState(NamedTuple):
    """The state of a batch of rows between two positions."""

    t: jax.Array
    """int32: the position to sample"""
    logits: jax.Array
    """f32[b, v]: the logits of position t; [2, b, v] with guidance"""
    cache: list[KV]
    """keys and values, one KV per layer, [b, h, t, k] each; [2, b, h, t, k] with guidance. A private prefix has the
    first p of the t positions"""
    bad_position: jax.Array
    """int32[b]: the first position with logits that were not finite, or -1; with jacobi a position in the same row of
    codes"""
    log_likelihood: jax.Array
    """f32[b]: sum of log p(code | prompt, codes before it) over the sampled codes, before any filter, in nats"""
    passes: jax.Array
    """int32[b]: number of times the network ran, the same for all rows of a device"""


class Chosen(NamedTuple):
    """Sampled codes of w positions."""

    codes: jax.Array
    """int32[b, w]"""
    log_probs: jax.Array
    """f32[b, w]: log-probability of each code, before any filter"""
    finite: jax.Array
    """bool[b, w]: whether all logits were finite"""


def row_length(length: int) -> int:
    """Returns the number of codes in a row of a square image of `length` codes. sample_row samples one row per call."""
    return math.isqrt(length)


def cache_lengths(model: Transformer, backend: str) -> list[int]:
    """Returns the sizes, in codes, to which the cache grows while an image is sampled. The last one holds all codes.

    A step of the XLA backend reads the complete cache, also its empty part. With four sizes a step reads 5/8 of it on
    average. Four sizes take four compilations, which on CPU cost more than they save. The kernel of the Pallas backend
    reads only the filled part, so its cache has one size.
    """
    length = model.config.hparams.ctx_len_img
    steps = row_length(length)
    sizes = NUM_CACHE_SIZES.get(backend, 4) if model.attention in ("xla", "xla-lanes") else 1
    return sorted({steps * math.ceil(length * (i + 1) / sizes / steps) for i in range(sizes)})


@partial(jax.jit, static_argnames="model")
def prefill(
    model: Transformer, params: dict[str, Any], prefix_ids: jax.Array, codes: jax.Array, t: jax.Array
) -> Prefix:
    """Runs the network over prefix_ids int32[p] and given codes int32[m], of which the first t count.

    With guidance prefix_ids are [2, p]. For a private prefix both arrays have an axis of rows: prefix_ids [b, p] or
    [2, b, p], and codes [b, m]. Without given codes m and t are 0.
    """
    run = partial(_prefill_one, model, params, t)
    if codes.ndim == 2:
        run = jax.vmap(run)
    if prefix_ids.ndim > codes.ndim:
        run = jax.vmap(run, (0, None))
    return Prefix(*run(prefix_ids, codes))


def _prefill_one(model: Transformer, params: Any, t: jax.Array, prefix_ids: jax.Array, codes: jax.Array) -> Any:
    return model.apply({"params": params}, prefix_ids, codes, t, method="prefill")


@partial(jax.jit, static_argnames=("model", "mesh", "batch_size", "capacity", "guided"))
def start_decode(
    model: Transformer, mesh: Mesh, batch_size: int, capacity: int, guided: bool, prefix: Prefix, t: jax.Array
) -> DecodeState:
    """Returns the state before position t, for batch_size rows per device.

    capacity: of the cache, in codes; see grow_cache. guided: whether the prefix has the leading axis of 2.
    """
    rows, new_cache = batch_size * mesh.size, partial(model.new_cache, batch_size * mesh.size, capacity)
    shared = prefix.logits.ndim == 1 + guided
    state = DecodeState(
        t=jnp.asarray(t, jnp.int32),
        logits=jnp.repeat(prefix.logits[..., None, :], rows, axis=-2) if shared else prefix.logits,
        cache=(jax.vmap(new_cache) if guided else new_cache)(prefix.kv, prefix.prompt_kv),
        bad_position=jnp.full(rows, -1, jnp.int32),
        log_likelihood=jnp.zeros(rows, jnp.float32),
        passes=jnp.zeros(rows, jnp.int32),
    )
    return _sharded(state, mesh, state_specs(model, guided))


def grow_cache(model: Transformer, mesh: Mesh, state: DecodeState, end: int, lengths: list[int]) -> DecodeState:
    """Makes sure that the cache holds all positions before `end`: if not, it grows to the next size of `lengths`.

    lengths: from cache_lengths.
    """
    if len(lengths) > 1 and attention.cache_capacity(model.attention, state.cache[0]) < end:
        length = next(length for length in lengths if length >= end)
        guided = state.logits.ndim == 3
        for i in range(len(state.cache)):  # layer by layer: two copies of the complete cache may not fit into memory
            state.cache[i] = _grow_layer(model, mesh, guided, length, state.cache[i])
    return state


@partial(jax.jit, static_argnames=("model", "mesh", "guided", "length"))
def _grow_layer(model: Transformer, mesh: Mesh, guided: bool, length: int, cache: KV) -> KV:
    spec = state_specs(model, guided).cache[0]
    return _sharded(attention.pad_cache(model.attention, cache, length), mesh, spec)


@partial(jax.jit, static_argnames=("model", "mesh", "jacobi"), donate_argnames="state")
def sample_row(
    model: Transformer,
    mesh: Mesh,
    jacobi: bool,
    params: dict[str, Any],
    prefix: list[KV],
    rows: Rows,
    state: DecodeState,
    guess: jax.Array,
) -> tuple[DecodeState, jax.Array]:
    """Samples the next row of codes of every image. Returns the new state and codes int32[b, row_length].

    Rows are split over the devices. prefix: Prefix.kv, or [] for a private prefix, which is in the cache already.

    jacobi: starts from a guess int32[b, row_length] and samples all positions at once, until no code changes. A
    negative guess stands for the code that the first position samples. The noise of a position is fixed. So code i is
    right as soon as all codes before it are right, and the result is that of one position after the other: Wiggers and
    Hoogeboom, "Predictive Sampling with Forecasting Autoregressive Models", 2020, arXiv:2002.09928. If jacobi is False,
    guess is not used. Guidance is from Ho and Salimans, "Classifier-Free Diffusion Guidance", 2022, applied to logits.
    """
    guided = state.logits.ndim == 3
    specs = state_specs(model, guided)
    # Only parameters that a step reads go into shard_map: jax 0.11.2 crashes on an input that is not used.
    params = {name: leaf for name, leaf in params.items() if name not in PREFIX_ONLY}
    shared: Any = [] if model.attention in PRIVATE_PREFIX else prefix
    rows = rows if guided else rows._replace(guidance_scale=None)
    run = partial(_jacobi_row if jacobi else _sequential_row, model)
    return jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(P(), P(), P("data"), specs, P("data")),
        out_specs=(specs, P("data")),
        check_vma=False,
    )(params, shared, rows, state, guess if jacobi else None)


def _sequential_row(
    model: Transformer, params: Any, prefix: list[KV], rows: Rows, state: DecodeState, _: None
) -> tuple[DecodeState, jax.Array]:
    """Samples one code after the other."""
    step = partial(_sample_code, model, params, prefix, rows)
    state, codes = jax.lax.scan(step, state, None, length=row_length(model.config.hparams.ctx_len_img))
    return state, codes.T


def _sample_code(
    model: Transformer, params: Any, prefix: list[KV], rows: Rows, state: DecodeState, _: None
) -> tuple[DecodeState, jax.Array]:
    """Samples the code at state.t and feeds it to the network.

    The last code of an image is fed too. That is one pass too many, but the loop is simpler.
    """
    noise = gumbel_noise(rows, state.t[None], model.config.vocab_size_img)
    chosen = choose(state.logits[..., None, :], noise, rows)
    logits, cache = _feed(model, params, prefix, chosen.codes, state)
    return _advance(state, chosen, logits[..., 0, :], cache, 1), chosen.codes[:, 0]


def _jacobi_row(
    model: Transformer, params: Any, prefix: list[KV], rows: Rows, state: DecodeState, guess: Any
) -> tuple[DecodeState, jax.Array]:
    """Samples all codes of the row at once, again and again, until no code changes."""
    steps = guess.shape[1]
    noise = gumbel_noise(rows, state.t + jnp.arange(steps), model.config.vocab_size_img)
    first = choose(state.logits[..., None, :], noise[:, :1], rows)

    def again(loop: Any) -> Any:
        passes, before, _, _, cache = loop
        logits, cache = _feed(model, params, prefix, before.codes, state._replace(cache=cache))
        of_each = jnp.concatenate([state.logits[..., None, :], logits[..., :-1, :]], axis=-2)
        chosen = choose(of_each, noise, rows)
        return passes + 1, chosen, jnp.any(chosen.codes != before.codes), logits[..., -1, :], cache

    fed = Chosen(*(jnp.broadcast_to(x, guess.shape) for x in first))
    fed = fed._replace(codes=jnp.where(guess < 0, fed.codes, guess))
    start = jnp.int32(0), fed, jnp.bool_(True), state.logits, state.cache
    # After pass i at the latest code i is right. One more pass finds that nothing changes.
    passes, chosen, _, logits, cache = jax.lax.while_loop(lambda loop: loop[2] & (loop[0] <= steps), again, start)
    return _advance(state, chosen, logits, cache, passes), chosen.codes


def _feed(
    model: Transformer, params: Any, prefix: list[KV], codes: jax.Array, state: DecodeState
) -> tuple[jax.Array, list[KV]]:
    """Feeds codes [b, w] at positions state.t, ...; returns the logits after each, f32[(2,) b, w, v], and the cache."""

    def step(prefix: list[KV], cache: list[KV]) -> Any:
        return model.apply({"params": params}, codes, state.t, prefix or model.prefix_length, cache, method="step")

    return (jax.vmap(step) if state.logits.ndim == 3 else step)(prefix, state.cache)


def choose(logits: jax.Array, noise: jax.Array, rows: Rows) -> Chosen:
    """Samples from logits f32[b, w, v].

    With guidance logits are [2, b, w, v], c after the prompt and u after the blank one; u + scale (c - u) is used.
    """
    guided = logits.ndim == 4
    finite = jnp.all(jnp.isfinite(logits), axis=(0, -1) if guided else -1)
    conditional = logits
    if guided:
        conditional, blank = logits
        logits = blank + rows.guidance_scale[:, None, None] * (conditional - blank)
    codes = draw(logits, noise, rows)
    chosen = jnp.take_along_axis(conditional, codes[..., None], axis=-1)[..., 0]
    return Chosen(codes, chosen - jax.nn.logsumexp(conditional, axis=-1), finite)


def _advance(state: DecodeState, chosen: Chosen, logits: jax.Array, cache: list[KV], passes: Any) -> DecodeState:
    """Returns the state after the positions whose codes were chosen."""
    first_bad = jnp.where(jnp.all(chosen.finite, axis=-1), -1, state.t + jnp.argmin(chosen.finite, axis=-1))
    return DecodeState(
        t=state.t + chosen.codes.shape[1],
        logits=logits,
        cache=cache,
        bad_position=jnp.where(state.bad_position < 0, first_bad, state.bad_position),
        log_likelihood=state.log_likelihood + jnp.sum(chosen.log_probs, axis=-1),
        passes=state.passes + passes,
    )


def state_specs(model: Transformer, guided: bool) -> Any:
    """Returns the PartitionSpecs of a DecodeState: each device has its own rows."""

    def split(axes: str) -> P:
        lead = [None] if guided else []
        return P(*lead, *("data" if axis == "b" else None for axis in axes))

    axes = attention.cache_axes(model.attention)
    kv: Any = Quantized(split(axes), split(axes.replace("k", ""))) if model.int8_cache else split(axes)
    cache = [KV(kv, kv)] * model.config.hparams.n_layers
    return DecodeState(P(), split("bv"), cache, P("data"), P("data"), P("data"))  # type: ignore[arg-type]


def _sharded(tree: Any, mesh: Mesh, specs: Any) -> Any:
    """Shards the arrays of a tree as the tree of specs says."""
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, P))
    return jax.lax.with_sharding_constraint(tree, shardings)
