"""Pictures <-> codes: the VQGAN with its weights on the devices, and the checks of what people give it.

Pictures are channels last; a model knows one picture size, h x w codes or H x W pixels.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from PIL import Image

from mindalle_jax.config.schema import Stage1Config
from mindalle_jax.errors import UsageError
from mindalle_jax.models.vqgan import VQGAN
from mindalle_jax.runtime.devices import first_devices, matmul_precision


class PictureCodec:
    """Encodes and decodes in chunks of one compiled size, so that results do not depend on how many there are."""

    def __init__(self, config: Stage1Config, params: dict[str, Any], dtype: jnp.dtype, mesh: Mesh):
        """params: those of the VQGAN, float32, replicated over the mesh. dtype: compute dtype of the decoder."""
        self.params, self.mesh = params, mesh
        # Codes are computed in float32 whatever the dtype: stage 1 is small.
        self.encoder, self.decoder = VQGAN(config), VQGAN(config, dtype=dtype)
        self.size, self.side, self.vocab_size = config.hparams.resolution, config.code_size, config.n_embed
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        self.decode_rows = mesh.size * (1 if on_cpu else 16)
        self.decode_ahead = not on_cpu
        """Whether pictures are decoded while others are drawn. On CPU both want the same cores, and more memory."""

    def encode(self, images: Any, *, batch_size: int = 1) -> np.ndarray:
        """Codes int32[n, h, w] of pictures uint8, or float in [0, 1], [n, H, W, 3].

        batch_size: pictures a compiled call. More is faster on an accelerator; where two codes are equally near but for
        rounding, another may win. Raises UsageError for pictures of another shape, size or range.
        """
        images = np.asarray(images)
        if images.ndim != 4 or images.shape[0] == 0 or images.shape[1:] != (self.size, self.size, 3):
            raise UsageError(
                f"images must be [n, {self.size}, {self.size}, 3] for this model, not {list(images.shape)}"
            )
        check_pixels(images)
        images = images.astype(np.float32) / 255 if images.dtype == np.uint8 else images.astype(np.float32)
        _, params = first_devices(self.mesh, 1, self.params)
        with matmul_precision(jnp.float32):
            chunks = []
            for first in range(0, len(images), batch_size):
                chunk = images[first : first + batch_size]
                padded = np.concatenate([chunk, np.repeat(chunk[:1], batch_size - len(chunk), axis=0)])
                chunks.append(_encode(self.encoder, params, padded * 2 - 1))
        return np.concatenate([np.asarray(chunk) for chunk in chunks])[: len(images)]

    def decode(self, codes: np.ndarray) -> Iterator[np.ndarray]:
        """Pictures uint8[m, H, W, 3] of checked codes int32[n, h, w], chunk by chunk; -1 is a code not drawn yet.

        Truncated, not rounded, as the original does before it saves or ranks.
        """
        return _fetch((_to_uint8(pictures), count) for pictures, count in self._decode(codes))

    def begin(self, codes: np.ndarray) -> jax.Array:
        """Starts to decode `decode_rows` pictures, and does not wait: uint8[n, H, W, 3] on the devices."""
        ((pictures, _),) = self._decode(codes)
        return _to_uint8(pictures)

    def decode_floats(self, codes: np.ndarray) -> Iterator[np.ndarray]:
        """As decode, f32[m, H, W, 3] in [0, 1]."""
        return _fetch(self._decode(codes))

    def _decode(self, codes: np.ndarray) -> Iterator[tuple[jax.Array, int]]:
        """Chunks f32[rows, H, W, 3] on the devices, and how many of their pictures count."""
        spread = NamedSharding(self.mesh, P("data"))
        for first in range(0, len(codes), self.decode_rows):
            chunk = codes[first : first + self.decode_rows]
            padded = np.concatenate([chunk, np.repeat(chunk[:1], self.decode_rows - len(chunk), axis=0)])
            with matmul_precision(self.decoder.dtype):
                pictures = decode_pictures(self.decoder, self.mesh, self.params, jax.device_put(padded, spread))
            yield pictures, len(chunk)

    def check_codes(self, codes: Any) -> np.ndarray:
        """Codes int32[n, h, w] from [n, h, w] or [n, h * w]; raises UsageError for others."""
        codes, side = np.asarray(codes), self.side
        if codes.ndim not in (2, 3) or len(codes) == 0 or codes.shape[1:] not in ((side, side), (side * side,)):
            raise UsageError(f"codes must be [n, {side}, {side}] or [n, {side * side}], not {list(codes.shape)}")
        check_ids(codes, self.vocab_size, "codes")
        return codes.reshape(-1, side, side).astype(np.int32)


def check_picture(image: Any, size: int) -> np.ndarray:
    """One picture [size, size, 3] from a PIL image in RGB, or from an array. Raises UsageError for others."""
    if isinstance(image, Image.Image):
        if image.mode != "RGB":
            raise UsageError(f"the image has the mode {image.mode}; convert it to RGB first")
        width, height = image.size
    else:
        image = np.asarray(image)
        if image.ndim != 3 or image.shape[2] != 3:
            raise UsageError(f"an image must be [{size}, {size}, 3], not {list(image.shape)}")
        height, width = image.shape[:2]
    if (height, width) != (size, size):
        raise UsageError(
            f"the image is {width} x {height} pixels; this model knows {size} x {size} only: crop or resize it first"
        )
    return np.asarray(image)


def check_keep_rows(keep_rows: int, config: Stage1Config) -> int:
    """Raises UsageError unless it is an integer in [1, h - 1]."""
    side = config.code_size
    if type(keep_rows) is not int or not 1 <= keep_rows < side:
        raise UsageError(
            f"keep_rows must be an integer in [1, {side - 1}], rows of codes, each {config.hparams.resolution // side} "
            f"pixels high; not {keep_rows!r}"
        )
    return keep_rows


def check_pixels(images: np.ndarray) -> None:
    """Raises UsageError unless they are uint8, or floating point in [0, 1]."""
    if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
        raise UsageError(f"images must be uint8 or floating point, not {images.dtype}")
    if images.dtype != np.uint8 and not (images.min() >= 0 and images.max() <= 1):
        raise UsageError(f"floating point images must lie in [0, 1], not [{images.min():.3g}, {images.max():.3g}]")


def check_ids(ids: np.ndarray, limit: int, what: str) -> None:
    """Raises UsageError unless ids are integers in [0, limit)."""
    if not np.issubdtype(ids.dtype, np.integer):
        raise UsageError(f"{what} must be integers, not {ids.dtype}")
    if ids.size and (ids.min() < 0 or ids.max() >= limit):
        raise UsageError(f"{what} must lie in [0, {limit}), not [{ids.min()}, {ids.max()}]")


def _fetch(chunks: Iterable[tuple[jax.Array, int]]) -> Iterator[np.ndarray]:
    """The pictures that count of each chunk, while the next one is computed."""
    waiting = None
    for chunk in chunks:
        if waiting is not None:
            yield np.asarray(waiting[0])[: waiting[1]]
        waiting = chunk
    if waiting is not None:
        yield np.asarray(waiting[0])[: waiting[1]]


@partial(jax.jit, static_argnames="model")
def _encode(model: VQGAN, params: dict[str, Any], images: jax.Array) -> Any:
    return model.apply({"params": params}, images, method="encode")


@partial(jax.jit, static_argnames=("model", "mesh"))
def decode_pictures(model: VQGAN, mesh: Mesh, params: dict[str, Any], codes: jax.Array) -> jax.Array:
    """f32[n, H, W, 3] in [0, 1] of codes int32[n, h, w], each device its share."""

    def decode(params: Any, codes: jax.Array) -> jax.Array:
        pictures: Any = model.apply({"params": params}, codes, method="decode")
        return jnp.clip(pictures * 0.5 + 0.5, 0, 1)

    spread = jax.shard_map(decode, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"), check_vma=False)
    return spread(params, codes)


@jax.jit
def _to_uint8(pictures: jax.Array) -> jax.Array:
    return (pictures * 255).astype(jnp.uint8)
