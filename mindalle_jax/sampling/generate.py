"""Sampling on the host: rows -> batches -> codes -> images -> scores, as a stream of events.

    sample_codes   yields rows of codes, batch by batch
    sample_images  yields these, and images as they are decoded
    sample         yields these, and scores at the end; between events the caller has its own JAX settings
    generate_*     make the results of the public calls

Dimensions: r rows of a request, one per candidate of each prompt, prompt by prompt.
"""

import math
import platform
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import mindalle_jax
from mindalle_jax.errors import NonFiniteError, UsageError
from mindalle_jax.models.attention import private_backend
from mindalle_jax.models.transformer import Transformer
from mindalle_jax.runtime.devices import device_memory, first_devices, pinned_steps
from mindalle_jax.sampling.codec import ImageCodec
from mindalle_jax.sampling.decode import (
    Prefix,
    cache_lengths,
    grow_cache,
    prefill,
    row_length,
    sample_row,
    start_decode,
)
from mindalle_jax.sampling.events import Bars, RowRequest, Sampled, SamplingEvent, call_back
from mindalle_jax.sampling.filters import Rows
from mindalle_jax.sampling.options import SamplingOptions
from mindalle_jax.sampling.result import Generation


class Networks(NamedTuple):
    """The networks that sample, with their weights on the devices of a mesh."""

    transformer: Transformer
    params: dict[str, Any]
    """parameters of the transformer, with blocks one by one, on every device"""
    codec: ImageCodec
    mesh: Mesh

    @property
    def device(self) -> str:
        """The kind of device, for messages."""
        return self.mesh.devices.flat[0].device_kind


def request_rows(options: SamplingOptions, prefix_ids: np.ndarray, vocab_size: int, batch_size: int) -> RowRequest:
    """Returns the rows that checked options ask for.

    options: checked; its ranker is an object, "likelihood" or None. prefix_ids: as in RowRequest. vocab_size: number of
    different codes. batch_size: rows per device per compiled call.
    """
    count, prompts = options.num_candidates, len(prefix_ids)
    total, top_k = count * prompts, vocab_size if options.top_k is None else options.top_k
    rows = Rows(
        candidates=np.tile(np.arange(count, dtype=np.int32), prompts),
        seeds=np.full(total, options.seed, np.uint32),
        temperature=np.full(total, options.temperature, np.float32),
        top_k=np.full(total, top_k, np.int32),
        top_p=np.full(total, 1.0 if options.top_p is None else options.top_p, np.float32),
        guidance_scale=np.full(total, options.guidance_scale, np.float32),
    )
    return RowRequest(
        prompts=options.prompts,
        prefix_ids=prefix_ids,
        prompt_of=np.repeat(np.arange(prompts), count),
        rows=rows,
        prompt_codes=options.prompt_codes,
        batch_size=batch_size,
        mixed=options.mixed_batches,
        jacobi=options.jacobi,
        ranker=cast(Any, options.ranker),
    )


def generate_codes(networks: Networks, request: RowRequest, options: SamplingOptions) -> np.ndarray:
    """Returns codes int32[r, h * w] without decoding them. -1 is a code that is not sampled because a callback stopped.

    Raises as sample_codes.
    """
    sampled = Sampled(request, networks.codec)
    length = sampled.codes.shape[1]
    bars = Bars(request, length - len(request.prompt_codes), bool(options.progress))
    for event in pinned_steps(sample_codes(networks, request), networks.transformer.dtype):
        sampled.add(event)
        bars.update(event)
        if call_back(options.callback, request, event, length):
            break
    bars.close()
    return sampled.codes


def generate_images(
    networks: Networks,
    request: RowRequest,
    options: SamplingOptions,
    every: int | None,
    single: bool,
    about: dict[str, Any],
) -> Iterator[Generation]:
    """Yields an unfinished Generation after every `every` codes, and at the end the result.

    every: a multiple of the codes in a row; None yields only the result. single: results have no axis of prompts.
    about: entries of Generation.meta that describe the model. Raises as sample.
    """
    device = networks.mesh.devices.flat[0]
    meta = {
        "seed": options.seed,
        "num_candidates": options.num_candidates,
        "temperature": options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "guidance_scale": options.guidance_scale,
        "keep_rows": len(request.prompt_codes) // networks.codec.side,
        "ranker": options.ranker if isinstance(options.ranker, str | None) else str(options.ranker),
        "batch_size": request.batch_size,
        "mixed_batches": options.mixed_batches,
        "jacobi": options.jacobi,
        "noise": "threefry2x32, partitionable, fold_in(fold_in(key(seed), candidate), position)",
        **about,
        "dtype": jnp.dtype(networks.transformer.dtype).name,
        "device": f"{device.platform}: {device.device_kind}",
        "devices": networks.mesh.size,
        "versions": {
            "mindalle-jax": mindalle_jax.__version__,
            "jax": jax.__version__,
            "python": platform.python_version(),
        },
    }
    shape = (options.num_candidates,) if single else (len(request.prompts), options.num_candidates)
    sampled = Sampled(request, networks.codec)
    length = sampled.codes.shape[1]
    bars = Bars(request, length - len(request.prompt_codes), bool(options.progress))
    for event in sample(networks, request, sampled):
        sampled.add(event)
        bars.update(event)
        if event.kind != "codes":
            continue
        sampled.stopped = call_back(options.callback, request, event, length)
        at_stop = every and (event.start + event.values.shape[1]) % every == 0
        if at_stop and not sampled.stopped and not sampled.complete.all():
            for decoded in decode_rows(networks.codec, sampled, event.rows):
                sampled.add(decoded)
            yield sampled.generation(request, shape, meta, final=False)
    bars.close()
    yield sampled.generation(request, shape, meta)


def sample_codes(networks: Networks, request: RowRequest) -> Iterator[SamplingEvent]:
    """Samples every row of a request, batch by batch, and in a batch one row of codes after the other.

    The last batch of a prompt is padded to the compiled size. Raises NonFiniteError if the network gives NaN or
    infinite logits, UsageError for prefix ids out of range, and DeviceMemoryError if a batch does not fit.
    """
    model = networks.transformer
    limit = prefix_vocab_size(model)
    if request.prefix_ids.min() < 0 or request.prefix_ids.max() >= limit:
        raise UsageError(f"prefix ids must lie in [0, {limit})")
    if request.mixed:
        model = model.copy(attention=private_backend(model.attention))
    numbers = np.arange(len(request.prompt_of))
    for group in [numbers] if request.mixed else [numbers[request.prompt_of == p] for p in range(len(request.prompts))]:
        # Devices without any row would only sample padding, so they are left out.
        devices = min(networks.mesh.size, math.ceil(len(group) / request.batch_size))
        mesh, params = first_devices(networks.mesh, devices, networks.params)
        shared, at_once = None, request.batch_size * mesh.size
        for first in range(0, len(group), at_once):
            chunk = group[first : first + at_once]
            # Padding repeats the first row of the chunk. Its codes are thrown away.
            padded = np.concatenate([chunk, np.repeat(chunk[:1], at_once - len(chunk))])
            count = len(chunk)
            with device_memory(_too_many(request.batch_size, networks.device)):
                if not request.mixed and shared is None:
                    shared = _prefill(model, params, mesh, request, padded)
                parts = _sample_batch(model, params, mesh, request, padded, shared)
                for start, codes, bad_position, log_likelihood in parts:
                    _check_finite(bad_position[:count], request.rows.candidates[chunk])
                    yield SamplingEvent("codes", chunk, codes[:count], start, log_likelihood[:count])


def _prefill(model: Transformer, params: Any, mesh: Mesh, request: RowRequest, rows: np.ndarray) -> Prefix:
    """Returns the prefix of these rows: one that they share, or one per row."""
    start = len(request.prompt_codes)
    # One compiled program serves any number of given codes: the rest are zeros, which nothing looks at.
    codes = np.zeros(model.config.hparams.ctx_len_img if start else 0, np.int32)
    codes[:start] = request.prompt_codes
    prefix_ids = request.prefix_ids[request.prompt_of[rows]]
    if not request.mixed:
        return prefill(model, params, prefix_ids[0], codes, np.int32(start))
    by_row = NamedSharding(mesh, P(None, "data") if request.guided else P("data"))
    prefix_ids = jax.device_put(np.moveaxis(prefix_ids, 0, -2), by_row)  # [(2,) b, p]
    codes = jax.device_put(np.tile(codes, (len(rows), 1)), NamedSharding(mesh, P("data")))
    return prefill(model, params, prefix_ids, codes, np.int32(start))


def _sample_batch(
    model: Transformer, params: Any, mesh: Mesh, request: RowRequest, rows: np.ndarray, shared: Prefix | None
) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """Yields (position, codes int32[b, row_length], bad positions int32[b], log-likelihoods f32[b]), row by row.

    shared: the prefix of all rows; None if each row has its own. The result of a call is fetched while the next call
    runs.
    """
    length, start = model.config.hparams.ctx_len_img, len(request.prompt_codes)
    steps, lengths = row_length(length), cache_lengths(model, mesh.devices.flat[0].platform)
    by_row, waiting = NamedSharding(mesh, P("data")), None
    settings = jax.device_put(Rows(*(setting[rows] for setting in request.rows)), by_row)
    capacity = next(capacity for capacity in lengths if capacity > start)
    prefix = _prefill(model, params, mesh, request, rows) if shared is None else shared
    state = start_decode(model, mesh, request.batch_size, capacity, request.guided, prefix, np.int32(start))
    prefix_kv = prefix.kv if shared else []
    del prefix  # a private prefix is in the cache now
    # The best guess of a row of codes is the row above it.
    above = request.prompt_codes[-steps:] if start else np.full(steps, -1, np.int32)
    codes = jax.device_put(np.tile(above, (len(rows), 1)), by_row)
    for t in range(start, length, steps):
        state = grow_cache(model, mesh, state, t + steps, lengths)
        state, codes = sample_row(model, mesh, request.jacobi, params, prefix_kv, settings, state, codes)
        if waiting is not None:
            yield (t - steps, *jax.device_get(waiting))
        # Copies, because the next call takes over the memory of the state.
        waiting = codes, state.bad_position.copy(), state.log_likelihood.copy()
    yield (length - steps, *jax.device_get(waiting))


def sample(networks: Networks, request: RowRequest, sampled: Sampled) -> Iterator[SamplingEvent]:
    """Yields codes, images and scores of every row.

    sampled: the results so far. The caller adds each event to it, and sets sampled.stopped to stop sampling. Rankers
    run with the JAX settings of the caller, everything else with those of this package. Raises as sample_codes, and
    UsageError for scores of a wrong shape.
    """
    yield from pinned_steps(sample_images(networks, request, sampled), networks.transformer.dtype)
    for p, prompt in enumerate(request.prompts):
        rows = np.flatnonzero((request.prompt_of == p) & sampled.complete)
        if request.ranker == "likelihood":
            yield SamplingEvent("scores", rows, sampled.log_likelihood[rows])
        elif request.ranker is not None and len(rows):
            scores = np.asarray(request.ranker.scores(prompt, sampled.images[rows]), np.float32)
            if scores.shape != rows.shape:
                raise UsageError(f"the ranker gave scores {list(scores.shape)} for {len(rows)} images")
            yield SamplingEvent("scores", rows, scores)


def sample_images(networks: Networks, request: RowRequest, sampled: Sampled) -> Iterator[SamplingEvent]:
    """Yields codes and images of every row. sampled: as in `sample`.

    On an accelerator images are decoded as soon as a compiled call is full. On CPU they are decoded after all codes.
    """
    codec, decoding, complete = networks.codec, [], []
    message = f"too little memory on {networks.device} to decode images; use a larger device"
    for event in sample_codes(networks, request):
        yield event
        if sampled.stopped:
            break
        if codec.decode_ahead and event.start + event.values.shape[1] == sampled.codes.shape[1]:
            complete += event.rows.tolist()
        while len(complete) >= codec.decode_rows:
            rows, complete = np.array(complete[: codec.decode_rows]), complete[codec.decode_rows :]
            with device_memory(message):
                decoding.append((rows, codec.start_decode(sampled.grid(rows))))
    with device_memory(message):
        for rows, images in decoding:
            yield SamplingEvent("images", rows, np.asarray(images))
        done = [rows for rows, _ in decoding]
        todo = np.setdiff1d(np.flatnonzero(sampled.started), np.concatenate(done) if done else [])
        yield from decode_rows(codec, sampled, todo)


def decode_rows(codec: ImageCodec, sampled: Sampled, rows: np.ndarray) -> Iterator[SamplingEvent]:
    """Yields the images of these rows, and one image for all rows without any code, which look the same."""
    for images in codec.decode(sampled.grid(rows)) if len(rows) else ():
        yield SamplingEvent("images", rows[: len(images)], images)
        rows = rows[len(images) :]
    if not sampled.started.all():
        blank = np.flatnonzero(~sampled.started)
        (image,) = next(codec.decode(sampled.grid(blank[:1])))
        yield SamplingEvent("images", blank, np.broadcast_to(image, (len(blank), *image.shape)))


def prefix_vocab_size(model: Transformer) -> int:
    """Returns the number of different prefix ids: of text tokens, or of classes."""
    c = model.config
    if c.type == "igpt":
        return (c.hparams.n_classes or 1) if c.use_cls_cond else 1
    return c.vocab_size_txt


def _check_finite(bad_position: np.ndarray, candidates: np.ndarray) -> None:
    if (bad_position >= 0).any():
        i = int(np.argmax(bad_position >= 0))
        raise NonFiniteError(
            f"NaN or infinite logits at step {bad_position[i]} of candidate {candidates[i]}: the weights are damaged, "
            "or overflow in this dtype (try float32)"
        )


def _too_many(batch_size: int, device: str) -> str:
    if batch_size == 1:
        return f"not even one candidate fits into the memory of {device} beside the weights; use a larger device"
    smaller = 1 << (batch_size - 1).bit_length() - 1  # the largest power of two below it
    return (
        f"{batch_size} candidates at once do not fit into the memory of {device}; try batch_size {smaller} "
        "(no fewer images, more rounds)"
    )
