"""Sampling on the device: prefill, then one compiled loop for each row of codes.

    prefix = prefill(...)                                # the prompts
    state = start_decode(...)                            # an empty cache, the logits of the first code
    state, codes = sample_row(...)                       # as often as an image has rows of codes

An image is a function of (seed, candidate number, prompt, settings, mode) and the compiled batch size alone. The noise
of candidate i at position t has the key fold_in(fold_in(key(seed), i), t). Every row of a batch is independent. The
prefix is shared (all rows have one prompt, whose keys and values are read once) or private (one for each row, at the
beginning of its cache): the caller's choice, and the same program text.

With classifier-free guidance every row is fed twice, after its prompt and after a blank one, and arrays of the loop
have a leading axis of 2 for them.

Dimensions: b rows of one compiled call, v vocabulary, t image positions, p prefix length, m codes that are given,
h heads, k head width.
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
"""Sizes that the cache grows through, by backend; 4 on others. See cache_lengths."""
PREFIX_ONLY = ("tok_emb_txt", "pos_emb_txt", "head_txt", "sos")
"""Parameters that no step reads."""


class Prefix(NamedTuple):
    """The network after the prompts. Arrays have a leading axis of 2 with guidance, then b with a private prefix."""

    logits: jax.Array
    """f32[(b,) v]: of the first code that is sampled"""
    kv: list[KV]
    """keys and values of the prompts, one KV per layer, [(b,) h, p, k] each"""
    prompt_kv: list[KV]
    """those of the image positions, [(b,) h, m, k] each, of which those of given codes count"""


class DecodeState(NamedTuple):
    """Everything that a batch of rows carries from one position to the next."""

    t: jax.Array
    """int32: the position to sample"""
    logits: jax.Array
    """f32[b, v]: its logits; [2, b, v] with guidance"""
    cache: list[KV]
    """one per layer, [b, h, t, k] each; [2, b, h, t, k] with guidance. A private prefix is the first p of t"""
    bad_position: jax.Array
    """int32[b]: the first position whose logits were not all finite, -1 if none; with jacobi one of the same row"""
    log_likelihood: jax.Array
    """f32[b]: sum of log p(code | prompt, codes before it) over the codes sampled, before any filter, in nats"""
    passes: jax.Array
    """int32[b]: how often the network ran, the same for all rows of a device"""


class Chosen(NamedTuple):
    """Codes of some positions."""

    codes: jax.Array
    """int32[b, w]"""
    log_probs: jax.Array
    """f32[b, w]: before any filter"""
    finite: jax.Array
    """bool[b, w]: whether all logits were finite"""


def row_length(length: int) -> int:
    """Codes in a row of a square image of `length` codes: what one call of the compiled loop samples."""
    return math.isqrt(length)


def cache_lengths(model: Transformer, backend: str) -> list[int]:
    """The sizes that the cache grows through while an image is sampled, in codes; the last one holds all of it.

    A step of the XLA backend reads the whole cache, filled or not. Four sizes save 3 of 8 parts of that, and take four
    compilations, which on CPU cost more than they save. The kernel of the Pallas backend reads what is filled.
    """
    length = model.config.hparams.ctx_len_img
    steps = row_length(length)
    sizes = NUM_CACHE_SIZES.get(backend, 4) if model.attention in ("xla", "xla-lanes") else 1
    return sorted({steps * math.ceil(length * (i + 1) / sizes / steps) for i in range(sizes)})


@partial(jax.jit, static_argnames="model")
def prefill(
    model: Transformer, params: dict[str, Any], prefix_ids: jax.Array, codes: jax.Array, t: jax.Array
) -> Prefix:
    """The network over prefix_ids int32[p] and codes int32[m] that are given, of which the first t count.

    With guidance prefix_ids are [2, p]. For a private prefix both have the axis of rows: [b, p] or [2, b, p], [b, m].
    Without given codes m and t are 0.
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
    """The state before position t, for batch_size rows on each device.

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
    """The state with a cache for the positions before `end`: as it is, or grown to the next of cache_lengths."""
    if len(lengths) > 1 and attention.cache_capacity(model.attention, state.cache[0]) < end:
        length = next(length for length in lengths if length >= end)
        guided = state.logits.ndim == 3
        for i in range(len(state.cache)):  # one by one: two sizes of the whole cache may not fit into memory
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
    """Samples the next row of codes of every image: the new state and int32[b, row_length]. Each device has its own b.

    prefix: Prefix.kv; a private one is in the cache already, and [] here.

    jacobi: begin with a guess int32[b, row_length] (negative: the code that the first position draws) and sample all
    positions at once, again and again, until nothing changes. With the noise of a position fixed that is what one
    position after the other gives, because code i is right as soon as those before it are: Wiggers and Hoogeboom,
    "Predictive Sampling with Forecasting Autoregressive Models", 2020, arXiv:2002.09928. False: guess is not used.
    Guidance: Ho and Salimans, "Classifier-Free Diffusion Guidance", 2022, on logits.
    """
    guided = state.logits.ndim == 3
    specs = state_specs(model, guided)
    # Only what a step reads goes into shard_map: jax 0.11.2 crashes on an input that is not used.
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
    """One code after the other."""
    step = partial(_sample_code, model, params, prefix, rows)
    state, codes = jax.lax.scan(step, state, None, length=row_length(model.config.hparams.ctx_len_img))
    return state, codes.T


def _sample_code(
    model: Transformer, params: Any, prefix: list[KV], rows: Rows, state: DecodeState, _: None
) -> tuple[DecodeState, jax.Array]:
    """Draws the code at state.t, and feeds it. The last code of an image is fed too: one pass for a simpler loop."""
    noise = gumbel_noise(rows, state.t[None], model.config.vocab_size_img)
    chosen = choose(state.logits[..., None, :], noise, rows)
    logits, cache = _feed(model, params, prefix, chosen.codes, state)
    return _advance(state, chosen, logits[..., 0, :], cache, 1), chosen.codes[:, 0]


def _jacobi_row(
    model: Transformer, params: Any, prefix: list[KV], rows: Rows, state: DecodeState, guess: Any
) -> tuple[DecodeState, jax.Array]:
    """All codes of the row at once, until nothing changes."""
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
    # Pass i makes code i right at the latest, and one more finds that nothing changes.
    passes, chosen, _, logits, cache = jax.lax.while_loop(lambda loop: loop[2] & (loop[0] <= steps), again, start)
    return _advance(state, chosen, logits, cache, passes), chosen.codes


def _feed(
    model: Transformer, params: Any, prefix: list[KV], codes: jax.Array, state: DecodeState
) -> tuple[jax.Array, list[KV]]:
    """Logits after each of the codes [b, w] from state.t on, f32[(2,) b, w, v], and the cache."""

    def step(prefix: list[KV], cache: list[KV]) -> Any:
        return model.apply({"params": params}, codes, state.t, prefix or model.prefix_length, cache, method="step")

    return (jax.vmap(step) if state.logits.ndim == 3 else step)(prefix, state.cache)


def choose(logits: jax.Array, noise: jax.Array, rows: Rows) -> Chosen:
    """Draws from logits f32[b, w, v], [2, b, w, v] with guidance: u + scale (c - u), c those after the prompt."""
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
    """The state after the positions that were chosen."""
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
    """How a DecodeState is sharded: each device has its own rows."""

    def split(axes: str) -> P:
        lead = [None] if guided else []
        return P(*lead, *("data" if axis == "b" else None for axis in axes))

    axes = attention.cache_axes(model.attention)
    kv: Any = Quantized(split(axes), split(axes.replace("k", ""))) if model.int8_cache else split(axes)
    cache = [KV(kv, kv)] * model.config.hparams.n_layers
    return DecodeState(P(), split("bv"), cache, P("data"), P("data"), P("data"))  # type: ignore[arg-type]


def _sharded(tree: Any, mesh: Mesh, specs: Any) -> Any:
    """The arrays of a tree, sharded as the tree of specs says."""
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, P))
    return jax.lax.with_sharding_constraint(tree, shardings)
