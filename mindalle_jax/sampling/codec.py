"""Images <-> codes: the VQGAN with its weights on the devices.

Images are channels last. A model has one image size: h x w codes, or H x W pixels.
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
from mindalle_jax.runtime.devices import DType, choose_devices, first_devices, pinned, pinned_steps
from mindalle_jax.sampling.options import as_array, check_ids, check_image, check_keep_rows, check_pixels

DECODER = ("codebook", "post_quant_conv", "decoder")
"""Parameters that decoding reads. No others may enter shard_map: jax 0.11.2 crashes on an input that is not used."""


class ImageCodec:
    """Encodes and decodes in chunks of one compiled size, so results do not depend on the number of images."""

    def __init__(
        self, config: Stage1Config, params: dict[str, Any], *, dtype: DType | None = None, mesh: Mesh | None = None
    ):
        """Places the parameters on every device of the mesh.

        params: parameters of the VQGAN, nested, float32, NumPy or JAX arrays. dtype: compute dtype of the decoder.
        For the defaults of dtype and mesh see Dalle.from_pretrained.
        """
        self.mesh, dtype = choose_devices(mesh, dtype)
        # Codes are always computed in float32: stage 1 is small.
        self.encoder, self.decoder = VQGAN(config), VQGAN(config, dtype=jnp.dtype(dtype))
        with pinned():
            self.params = jax.device_put(params, NamedSharding(self.mesh, P()))
        self.size, self.side, self.vocab_size = config.hparams.resolution, config.code_size, config.n_embed
        on_cpu = self.mesh.devices.flat[0].platform == "cpu"
        self.decode_rows = self.mesh.size * (1 if on_cpu else 16)
        self.decode_ahead = not on_cpu
        """Whether images are decoded while others are sampled. Not on CPU, where both need the same cores."""

    def encode(self, images: Any, *, batch_size: int = 1) -> np.ndarray:
        """Returns codes int32[n, h, w] of images, in the formats of Dalle.encode_images.

        batch_size: images per compiled call. More is faster on an accelerator. It changes rounding, so another code may
        be chosen where two are equally near. Raises UsageError for images of another shape, size or range.
        """
        if isinstance(images, Image.Image):
            images = [images]
        if isinstance(images, (list, tuple)) and any(isinstance(image, Image.Image) for image in images):
            images = np.stack([check_image(image, self.size) for image in images])
        images = as_array(images, "images")
        images = images[None] if images.ndim == 3 else images
        if images.ndim != 4 or images.shape[0] == 0 or images.shape[1:] != (self.size, self.size, 3):
            raise UsageError(
                f"images must be [n, {self.size}, {self.size}, 3] for this model, not {list(images.shape)}"
            )
        check_pixels(images)
        images = images.astype(np.float32) / 255 if images.dtype == np.uint8 else images.astype(np.float32)
        _, params = first_devices(self.mesh, 1, self.params)
        with pinned("float32"):
            chunks = []
            for first in range(0, len(images), batch_size):
                chunk = _filled(images[first : first + batch_size], batch_size)
                chunks.append(encode_pixels(self.encoder, params, chunk * 2 - 1))
            return np.concatenate([np.asarray(chunk) for chunk in chunks])[: len(images)]

    def encode_rows(self, image: Any, keep_rows: int) -> np.ndarray:
        """Returns codes int32[m] of the first `keep_rows` rows of one image, given as pixels or as codes.

        See Dalle.prompt_codes. Raises UsageError for an image or a keep_rows that the model does not take.
        """
        keep_rows = check_keep_rows(keep_rows, self.encoder.config)
        if not isinstance(image, Image.Image):
            image = as_array(image, "the image, or its codes")
        if isinstance(image, Image.Image) or image.ndim == 3:
            codes = self.encode(check_image(image, self.size)[None])
        elif image.shape not in ((self.side, self.side), (self.side**2,)):
            raise UsageError(
                f"the codes of one image are [{self.side}, {self.side}] or [{self.side**2}], not {list(image.shape)}"
            )
        else:
            codes = self.check_codes(image)
        return codes[0, :keep_rows].reshape(-1)

    def decode(self, codes: np.ndarray) -> Iterator[np.ndarray]:
        """Yields images uint8[m, H, W, 3] of checked codes int32[n, h, w], chunk by chunk.

        -1 is a code not sampled yet. Pixels are truncated, not rounded, as the original does before it saves or ranks.
        """
        return pinned_steps(_fetch((_to_uint8(x), count) for x, count in self._decode(codes)), self.decoder.dtype)

    def start_decode(self, codes: np.ndarray) -> jax.Array:
        """Starts to decode `decode_rows` images and does not wait. Returns uint8[n, H, W, 3] on the devices."""
        with pinned(self.decoder.dtype):
            ((images, _),) = self._decode(codes)
            return _to_uint8(images)

    def decode_floats(self, codes: np.ndarray) -> Iterator[np.ndarray]:
        """Yields images f32[m, H, W, 3] in [0, 1]; else as `decode`."""
        return pinned_steps(_fetch(self._decode(codes)), self.decoder.dtype)

    def check_codes(self, codes: Any) -> np.ndarray:
        """Returns codes int32[n, h, w], given as [n, h, w], [n, h * w], or as those of one image, [h, w] or [h * w].

        Raises UsageError for other shapes and for codes out of range.
        """
        side = self.side
        shapes = f"codes must be [n, {side}, {side}] or [n, {side * side}]"
        codes = as_array(codes, shapes)
        if codes.shape in ((side, side), (side * side,)):  # the codes of one image
            codes = codes[None]
        if codes.ndim not in (2, 3) or len(codes) == 0 or codes.shape[1:] not in ((side, side), (side * side,)):
            raise UsageError(f"{shapes}, not {list(codes.shape)}")
        check_ids(codes, self.vocab_size, "codes")
        return codes.reshape(-1, side, side).astype(np.int32)

    def _decode(self, codes: np.ndarray) -> Iterator[tuple[jax.Array, int]]:
        """Yields chunks f32[rows, H, W, 3] on the devices, with the number of images in them that count."""
        by_row = NamedSharding(self.mesh, P("data"))
        for first in range(0, len(codes), self.decode_rows):
            chunk = codes[first : first + self.decode_rows]
            padded = jax.device_put(_filled(chunk, self.decode_rows), by_row)
            yield decode_images(self.decoder, self.mesh, self.params, padded), len(chunk)


def _filled(chunk: np.ndarray, rows: int) -> np.ndarray:
    """Pads a chunk to `rows` rows with copies of its first row."""
    return np.concatenate([chunk, np.repeat(chunk[:1], rows - len(chunk), axis=0)])


def _fetch(chunks: Iterable[tuple[jax.Array, int]]) -> Iterator[np.ndarray]:
    """Yields the images of each chunk that count. A chunk is fetched while the next one is computed."""
    waiting = None
    for chunk in chunks:
        if waiting is not None:
            yield np.asarray(waiting[0])[: waiting[1]]
        waiting = chunk
    if waiting is not None:
        yield np.asarray(waiting[0])[: waiting[1]]


@partial(jax.jit, static_argnames="model")
def encode_pixels(model: VQGAN, params: dict[str, Any], images: jax.Array) -> Any:
    """Returns codes int32[n, h, w] of images f32[n, H, W, 3] in [-1, 1]."""
    return model.apply({"params": params}, images, method="encode")


@partial(jax.jit, static_argnames=("model", "mesh"))
def decode_images(model: VQGAN, mesh: Mesh, params: dict[str, Any], codes: jax.Array) -> jax.Array:
    """Returns images f32[n, H, W, 3] in [0, 1] of codes int32[n, h, w]. Each device decodes its share."""
    params = {name: params[name] for name in DECODER}
    sharded = jax.shard_map(
        partial(_decode_pixels, model), mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"), check_vma=False
    )
    return sharded(params, codes)


def _decode_pixels(model: VQGAN, params: Any, codes: jax.Array) -> jax.Array:
    images: Any = model.apply({"params": params}, codes, method="decode")
    return jnp.clip(images * 0.5 + 0.5, 0, 1)


@jax.jit
def _to_uint8(images: jax.Array) -> jax.Array:
    return (images * 255).astype(jnp.uint8)
