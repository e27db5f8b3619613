"""Drawing codes: settings, and decoding by one compiled loop. The only place that draws codes, by filters.py.

A picture is a function of (seed, candidate index, prompt, settings) and the compiled batch size alone. The noise of
candidate i at position t has the key fold_in(fold_in(key(seed), i), t); candidates run in chunks of one compiled size,
the last one padded, because logits change in their last bits with the shape that is compiled.

With classifier-free guidance every candidate has two rows, one after its prompt and one after a blank one, and arrays
of the loop a leading axis of 2 for them.

Dimensions: b candidates of one compiled call on one device, v vocabulary, t image positions, p prefix length, m codes
that are given and not drawn.
"""

import contextlib
import dataclasses
import math
import numbers
import secrets
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mindalle_jax.errors import NonFiniteError, UsageError
from mindalle_jax.models import attention
from mindalle_jax.models.attention import KV
from mindalle_jax.models.quantization import Quantized
from mindalle_jax.models.transformer import Transformer
from mindalle_jax.runtime.devices import first_devices, matmul_precision
from mindalle_jax.sampling.filters import TracedSettings, draw, gumbel_noise

MAX_CANDIDATES = 1_000
SEGMENTS = {"cpu": 1}
"""Sizes that the cache grows through, by backend; 4 on others. See cache_lengths."""


class _DefaultTopK(int):
    """The default of top_k, told apart from a 256 that somebody asked for."""


DEFAULT_TOP_K = _DefaultTopK(256)
"""256, or the whole vocabulary where that is smaller."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How codes are drawn; made by `make`, which checks."""

    seed: int
    """in [0, 2**32)"""
    temperature: float
    """finite and > 0, or 0: greedy, the most likely code, the lowest id on a tie"""
    top_k: int | None
    """in [1, v]; the draw is among the k most likely codes, and those that tie with the last of them. None: off"""
    top_p: float | None
    """in (0, 1]; the draw is among the most likely codes that together just reach p. None: off"""
    guidance_scale: float
    """finite and >= 0; 1: off. Logits are u + scale (c - u), c those after the prompt, u those after a blank one"""

    @classmethod
    def make(
        cls,
        vocab_size: int,
        *,
        seed: int | None,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        guidance_scale: float = 1.0,
    ) -> "Settings":
        """Checked settings; seed None draws one. Raises UsageError naming the value and the limits."""
        if seed is None:
            seed = secrets.randbits(32)
        elif not _is(seed, numbers.Integral) or not 0 <= seed < 2**32:
            raise UsageError(f"seed must be an integer in [0, 4294967296), not {seed!r}")
        if not _is(temperature, numbers.Real) or not (math.isfinite(temperature) and temperature >= 0):
            raise UsageError(f"temperature must be a finite number > 0, or 0 for greedy; not {temperature!r}")
        if isinstance(top_k, _DefaultTopK):
            top_k = min(top_k, vocab_size)
        elif top_k is not None and (not _is(top_k, numbers.Integral) or not 1 <= top_k <= vocab_size):
            raise UsageError(
                f"top_k must be an integer in [1, {vocab_size}] (the number of codes), or off (None); not {top_k!r}"
            )
        if top_p is not None and (not _is(top_p, numbers.Real) or not 0 < top_p <= 1):
            raise UsageError(f"top_p must be a number in (0, 1], or off (None); not {top_p!r}")
        if not _is(guidance_scale, numbers.Real) or not (math.isfinite(guidance_scale) and guidance_scale >= 0):
            raise UsageError(f"guidance_scale must be a finite number >= 0, 1 for off; not {guidance_scale!r}")
        return cls(
            int(seed),
            float(temperature),
            None if top_k is None else int(top_k),
            None if top_p is None else float(top_p),
            float(guidance_scale),
        )

    @property
    def guided(self) -> bool:
        """Whether candidates have two rows each."""
        return self.guidance_scale != 1

    def traced(self, vocab_size: int) -> "TracedSettings":
        """The same as arrays, so that no change of a value compiles anything."""
        return TracedSettings(
            np.uint32(self.seed),
            np.float32(self.temperature),
            np.int32(vocab_size if self.top_k is None else self.top_k),
            np.float32(1.0 if self.top_p is None else self.top_p),
            np.float32(self.guidance_scale),
        )


def check_num_candidates(num_candidates: int) -> int:
    """Raises UsageError unless it is an integer in [1, 1000]."""
    if not _is(num_candidates, numbers.Integral) or not 1 <= num_candidates <= MAX_CANDIDATES:
        raise UsageError(f"num_candidates must be an integer in [1, {MAX_CANDIDATES}], not {num_candidates!r}")
    return int(num_candidates)


def default_batch_size(num_candidates: int, backend: str, *, small: bool) -> int:
    """Candidates per device per compiled call: a function of these three alone, so that pictures do not depend on more.

    A power of two up to 16 on CPU; half of that for a small network, which has a device a core there. Elsewhere a power
    of two up to 32, and from there the multiple of 32 up to 128 that fits, because each call reads all weights once and
    padding up to 128 would waste a quarter of the usual 96.
    """
    power = 1 << (num_candidates - 1).bit_length()
    if backend == "cpu":
        at_most_16 = min(16, power)
        return max(1, at_most_16 // 2) if small else at_most_16
    return power if power <= 32 else min(128, 32 * math.ceil(num_candidates / 32))


def row_length(length: int) -> int:
    """Codes in a row of a square picture of `length` codes: what one call of the compiled loop draws."""
    return math.isqrt(length)


def cache_lengths(model: Transformer, backend: str) -> list[int]:
    """The sizes that the cache grows through while a picture is drawn, in codes; the last one holds all of it.

    A step of the XLA backend reads the whole cache, filled or not. Four sizes save 3 of 8 parts of that, and take four
    compilations, which on CPU cost more than they save. The kernel of the Pallas backend reads what is filled.
    """
    length = model.config.hparams.ctx_len_img
    steps = row_length(length)
    sizes = SEGMENTS.get(backend, 4) if model.attention in ("xla", "xla-lanes") else 1
    return sorted({steps * math.ceil(length * (i + 1) / sizes / steps) for i in range(sizes)})


class Prefix(NamedTuple):
    """What all candidates of a prompt share. With guidance every array has the leading axis of 2."""

    logits: jax.Array
    """f32[v]: of the first code that is drawn"""
    kv: list[KV]
    """keys and values of the prompt, one KV a layer, [h, p, k] each"""
    kept_kv: list[KV]
    """those of the positions of the picture, [h, t, k] each, of which those of kept codes count; [h, 0, k] without"""


class DecodeState(NamedTuple):
    """All that a chunk of candidates carries from one position to the next."""

    t: jax.Array
    """int32: the position to draw"""
    logits: jax.Array
    """f32[b, v]: its logits; [2, b, v] with guidance"""
    cache: list[KV]
    """one a layer, [b, h, t, k] each; [2, b, h, t, k] with guidance"""
    bad_position: jax.Array
    """int32[b]: the first position whose logits were not all finite, -1 if none; with jacobi one of the same row"""
    log_likelihood: jax.Array
    """f32[b]: sum of log p(code | prompt, codes before it) over the codes drawn, before any filter, in nats"""
    passes: jax.Array
    """int32[b]: how often the network ran, the same for all candidates of a device"""


class Drawn(NamedTuple):
    """A row of codes of some candidates."""

    first: int
    """The candidates are first, first + 1, ..."""
    start: int
    """position of the first code"""
    codes: np.ndarray
    """int32[count, steps]"""
    log_likelihood: np.ndarray
    """f32[count]: of all codes drawn so far, see DecodeState"""


def sample_codes(
    model: Transformer,
    params: dict[str, Any],
    prefix_ids: np.ndarray,
    num_candidates: int,
    settings: Settings,
    *,
    batch_size: int,
    mesh: Mesh,
    kept: np.ndarray,
    jacobi: bool = False,
) -> Iterator[Drawn]:
    """Draws candidates 0..num_candidates-1 of one prompt, row by row and chunk by chunk.

    model: a Transformer with stacked=False, params its parameters, replicated over `mesh` (one axis, "data").
    prefix_ids: int32[p]; with guidance [2, p], the prompt and what it is guided away from.
    batch_size: candidates per device per compiled call.
    jacobi: see decode_segment.
    kept: int32[m] codes that every picture begins with, m a multiple of the row length or 0; drawing starts after them.
    Raises NonFiniteError when the network gives NaN or infinite logits.
    """
    c = model.config
    length, vocab_size = c.hparams.ctx_len_img, c.vocab_size_img
    if prefix_ids.min() < 0 or prefix_ids.max() >= _prefix_vocab_size(model):
        raise UsageError(f"prefix ids must lie in [0, {_prefix_vocab_size(model)})")
    start = len(kept)
    # One compiled program for any number of kept codes: those still to be drawn are zeros, which nothing looks at.
    given = np.zeros(length if start else 0, np.int32)
    given[:start] = kept
    # Devices for which no candidate is left would draw padding.
    mesh, params = first_devices(mesh, min(mesh.size, math.ceil(num_candidates / batch_size)), params)
    rows = batch_size * mesh.size
    traced = settings.traced(vocab_size)
    with _numerics(model):
        prefix = prefill(model, params, prefix_ids, given, np.int32(start))
    for first in range(0, num_candidates, rows):
        count = min(rows, num_candidates - first)
        # Padding repeats the chunk's first candidate; what it draws is thrown away.
        candidates = np.where(np.arange(rows) < count, first + np.arange(rows), first).astype(np.int32)
        candidates = jax.device_put(candidates, NamedSharding(mesh, P("data")))
        parts = _decode_chunk(model, mesh, params, prefix, candidates, traced, batch_size, jacobi, kept)
        for at, (codes, bad_position, log_likelihood) in zip(
            range(start, length, row_length(length)), parts, strict=True
        ):
            _check_finite(bad_position[:count], first)
            yield Drawn(first, at, codes[:count], log_likelihood[:count])


def _decode_chunk(
    model: Transformer,
    mesh: Mesh,
    params: dict[str, Any],
    prefix: Prefix,
    candidates: jax.Array,
    settings: TracedSettings,
    batch_size: int,
    jacobi: bool,
    kept: np.ndarray,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields (codes int32[b, steps], bad positions int32[b], log-likelihoods f32[b]) until the pictures are complete.

    One call is in flight while the result of the one before it is fetched.
    """
    length, start = model.config.hparams.ctx_len_img, len(kept)
    steps = row_length(length)
    waiting = None
    lengths = cache_lengths(model, mesh.devices.flat[0].platform)
    with _numerics(model):
        room = next(room for room in lengths if room > start)
        state = start_state(model, mesh, batch_size, room, prefix, np.int32(start))
    # Of a row the best guess is the row above it.
    above = kept[-steps:] if start else np.full(steps, -1, np.int32)
    codes = jax.device_put(np.tile(above, (len(candidates), 1)), NamedSharding(mesh, P("data")))
    for t in range(start, length, steps):
        with _numerics(model):
            state = make_room(model, mesh, state, t + steps, lengths)
            state, codes = decode_segment(
                model, mesh, steps, jacobi, params, prefix.kv, candidates, settings, state, codes
            )
        if waiting is not None:
            yield jax.device_get(waiting)
        # Copies: the next call takes the state's memory.
        waiting = codes, state.bad_position.copy(), state.log_likelihood.copy()
    yield jax.device_get(waiting)


@contextlib.contextmanager
def _numerics(model: Transformer) -> Iterator[None]:
    """Around compiled calls, and no further: a generator that held it open would change its caller's settings."""
    with jax.threefry_partitionable(True), matmul_precision(model.dtype):
        yield


@partial(jax.jit, static_argnames="model")
def prefill(
    model: Transformer, params: dict[str, Any], prefix_ids: jax.Array, codes: jax.Array, t: jax.Array
) -> Prefix:
    """The network over prefix_ids int32[p] ([2, p] with guidance) and codes int32[m], of which the first t count.

    Once a prompt. Without kept codes m and t are 0.
    """

    def network(prefix_ids: jax.Array) -> Any:
        return model.apply({"params": params}, prefix_ids, codes, t, method="prefill")

    return Prefix(*(jax.vmap(network) if prefix_ids.ndim == 2 else network)(prefix_ids))


@partial(jax.jit, static_argnames=("model", "mesh", "batch_size", "room"))
def start_state(
    model: Transformer, mesh: Mesh, batch_size: int, room: int, prefix: Prefix, t: jax.Array
) -> DecodeState:
    """The state before position t, the same for every candidate.

    room: of the cache, in codes; see make_room.
    """
    guided = prefix.logits.ndim == 2

    def start(prefix: Prefix, t: jax.Array) -> DecodeState:
        def cache(shared: list[KV], kept: list[KV]) -> list[KV]:
            return model.new_cache(batch_size, room, shared, kept)

        return DecodeState(
            t=t,
            logits=jnp.repeat(prefix.logits[..., None, :], batch_size, axis=-2),
            cache=(jax.vmap(cache) if guided else cache)(prefix.kv, prefix.kept_kv),
            bad_position=jnp.full(batch_size, -1, jnp.int32),
            log_likelihood=jnp.zeros(batch_size, jnp.float32),
            passes=jnp.zeros(batch_size, jnp.int32),
        )

    return jax.shard_map(start, mesh=mesh, in_specs=P(), out_specs=_state_specs(model, guided), check_vma=False)(
        prefix, t
    )


def make_room(model: Transformer, mesh: Mesh, state: DecodeState, end: int, lengths: list[int]) -> DecodeState:
    """The state with a cache for the positions before `end`: as it is, or grown to the next of cache_lengths."""
    if len(lengths) > 1 and attention.room(model.attention, state.cache[0]) < end:
        length = next(length for length in lengths if length >= end)
        guided = state.logits.ndim == 3
        for i in range(len(state.cache)):  # one by one: of two sizes of the whole cache there may be no room
            state.cache[i] = _lengthen(model, mesh, guided, length, state.cache[i])
    return state


@partial(jax.jit, static_argnames=("model", "mesh", "guided", "length"))
def _lengthen(model: Transformer, mesh: Mesh, guided: bool, length: int, cache: KV) -> KV:
    spec = _state_specs(model, guided).cache[0]
    longer = partial(attention.lengthen, model.attention, length=length)
    return jax.shard_map(longer, mesh=mesh, in_specs=(spec,), out_specs=spec, check_vma=False)(cache)


@partial(jax.jit, static_argnames=("model", "mesh", "steps", "jacobi"), donate_argnames="state")
def decode_segment(
    model: Transformer,
    mesh: Mesh,
    steps: int,
    jacobi: bool,
    params: dict[str, Any],
    prefix: list[KV],
    candidates: jax.Array,
    settings: TracedSettings,
    state: DecodeState,
    guess: jax.Array,
) -> tuple[DecodeState, jax.Array]:
    """Draws the next `steps` codes of every candidate: the new state and int32[b, steps]. Each device has its own b.

    jacobi: begin with a guess int32[b, steps] (negative: the code that the first position draws) and draw all positions
    at once, again and again, until nothing changes. With the noise of a position fixed that is what one position after
    the other gives, because code i is right as soon as those before it are: Wiggers and Hoogeboom, "Predictive Sampling
    with Forecasting Autoregressive Models", 2020, arXiv:2002.09928. False: one after the other; guess is not used.
    Guidance: Ho and Salimans, "Classifier-Free Diffusion Guidance", 2022, on logits.
    """
    guided = state.logits.ndim == 3

    def decode(params, prefix, candidates, settings, state, guess):
        def network(codes: jax.Array, t: jax.Array, cache: list[KV]) -> Any:
            """Logits after each of the codes [b, w] at t, t + 1, ...: f32[b, w, v], [2, b, w, v] with guidance."""

            def once(prefix: list[KV], cache: list[KV]) -> Any:
                return model.apply({"params": params}, codes, t, prefix, cache, method="step")

            return (jax.vmap(once) if guided else once)(prefix, cache)

        def choose(logits: jax.Array, noise: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            """Codes [b, w], their log-probabilities, and whether all logits [(2,) b, w, v] are finite."""
            finite = jnp.all(jnp.isfinite(logits), axis=(0, -1) if guided else -1)
            conditional = logits
            if guided:
                conditional, blank = logits
                logits = blank + settings.guidance_scale * (conditional - blank)
            codes = draw(logits, noise, settings)
            chosen = jnp.take_along_axis(conditional, codes[..., None], axis=-1)[..., 0]
            return codes, chosen - jax.nn.logsumexp(conditional, axis=-1), finite

        def noise_at(positions: jax.Array) -> jax.Array:
            return gumbel_noise(candidates, positions, model.config.vocab_size_img, settings)

        def advance(state: DecodeState, logits: jax.Array, cache: list[KV], scores: Any, passes: Any) -> DecodeState:
            """The state after the positions of which scores are, log-probabilities and finiteness [b, w]."""
            log_probs, finite = scores
            first_bad = jnp.where(jnp.all(finite, axis=-1), -1, state.t + jnp.argmin(finite, axis=-1))
            bad_position = jnp.where(state.bad_position < 0, first_bad, state.bad_position)
            log_likelihood = state.log_likelihood + jnp.sum(log_probs, axis=-1)
            t = state.t + log_probs.shape[1]
            return DecodeState(t, logits, cache, bad_position, log_likelihood, state.passes + passes)

        def step(state: DecodeState, _: None) -> tuple[DecodeState, jax.Array]:
            codes, *scores = choose(state.logits[..., None, :], noise_at(state.t[None]))
            # The last code of a picture is fed too, and its logits are not used: one pass of 256 for a simpler loop.
            logits, cache = network(codes, state.t, state.cache)
            return advance(state, logits[..., 0, :], cache, scores, 1), codes[:, 0]

        if not jacobi:
            state, codes = jax.lax.scan(step, state, None, length=steps)
            return state, codes.T

        noise = noise_at(state.t + jnp.arange(steps))
        first, *scores = choose(state.logits[..., None, :], noise[:, :1])

        def again(loop: Any) -> Any:
            passes, fed, _, _, cache, _ = loop
            logits, cache = network(fed, state.t, cache)
            before = jnp.concatenate([state.logits[..., None, :], logits[..., :-1, :]], axis=-2)
            codes, *scores = choose(before, noise)
            return passes + 1, codes, jnp.any(codes != fed), logits[..., -1, :], cache, scores

        fed = jnp.where(guess < 0, first, guess)
        scores = [jnp.broadcast_to(x, fed.shape) for x in scores]
        start = 0, fed, jnp.bool_(True), state.logits, state.cache, scores
        # Pass i makes code i right at the latest, and one more finds that nothing changes.
        passes, codes, _, logits, cache, scores = jax.lax.while_loop(
            lambda loop: loop[2] & (loop[0] <= steps), again, start
        )
        return advance(state, logits, cache, scores, passes), codes

    specs = _state_specs(model, guided)
    return jax.shard_map(
        decode,
        mesh=mesh,
        in_specs=(P(), P(), P("data"), P(), specs, P("data")),
        out_specs=(specs, P("data")),
        check_vma=False,
    )(params, prefix, candidates, settings, state, guess)


def _state_specs(model: Transformer, guided: bool) -> Any:
    """How a DecodeState lies on the devices: each has the candidates of its own."""

    def split(axes: str) -> P:
        lead = [None] if guided else []
        return P(*lead, *("data" if axis == "b" else None for axis in axes))

    axes = attention.cache_axes(model.attention)
    kv: Any = Quantized(split(axes), split(axes.replace("k", ""))) if model.int8_cache else split(axes)
    cache = [KV(kv, kv)] * model.config.hparams.n_layers
    return DecodeState(P(), split("bv"), cache, P("data"), P("data"), P("data"))  # type: ignore[arg-type]


def _check_finite(bad_position: np.ndarray, first: int) -> None:
    if (bad_position >= 0).any():
        i = int(np.argmax(bad_position >= 0))
        raise NonFiniteError(
            f"NaN or infinite logits at step {bad_position[i]} of candidate {first + i}: the weights are damaged, or "
            "overflow in this dtype (try float32)"
        )


def _prefix_vocab_size(model: Transformer) -> int:
    c = model.config
    if c.type == "igpt":
        return (c.hparams.n_classes or 1) if c.use_cls_cond else 1
    return c.vocab_size_txt


def _is(value: Any, kind: type) -> bool:
    """Whether value is a number of the kind; True and False are not numbers here."""
    return isinstance(value, kind) and not isinstance(value, (bool, np.bool_))
