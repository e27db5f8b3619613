"""Ranking pictures by a prompt: the cosine of CLIP's features, with the preprocessing of OpenAI's `clip.load`.

Square pictures of one size, which is what a model draws, are resized on the device, by the integers that Pillow
computes; all others by Pillow on the host. Features are computed in chunks of one compiled size, the last one padded,
so that they do not depend on how many pictures there are.

Dimensions: b pictures of one compiled call, y and x pixels, S side of the pictures CLIP sees, e width of the features.
"""

import os
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from PIL import Image

from mindalle_jax.errors import NonFiniteError, UsageError
from mindalle_jax.interop.clip import ClipModel, find_clip, read_clip, write_clip
from mindalle_jax.models.clip import CLIP, normalise_pictures
from mindalle_jax.runtime.devices import (
    DType,
    choose_devices,
    device_memory,
    divide_cpu,
    matmul_precision,
    use_compilation_cache,
)
from mindalle_jax.sampling.codec import check_pixels
from mindalle_jax.storage.weights import DiskDType
from mindalle_jax.text.clip_tokenizer import clip_ids
from mindalle_jax.text.tokenizer import check_prompt, quote_prompt

PRECISION_BITS = 32 - 8 - 2
"""Weights of the resampling are integers in units of 2**-22, as in Pillow."""


class ClipRanker:
    """Scores pictures by a prompt.

    `images` below are uint8, or floating point in [0, 1], [n, H, W, 3]; or a sequence of such [H, W, 3] arrays and PIL
    images, of any sizes. Floating point is truncated to uint8. PIL images of other modes become RGB before they are
    resized, as in Hugging Face's processor. There must be one picture, and one pixel in it.
    """

    def __init__(self, model: ClipModel, *, dtype: DType | None = None, mesh: Mesh | None = None):
        """dtype, mesh: see from_pretrained. Weights are copied to the devices in the compute dtype."""
        self.config, self.tokenizer, self.source = model.config, model.tokenizer, "in memory"
        self.mesh, self.dtype = choose_devices(mesh, dtype)
        use_compilation_cache()
        self._clip = CLIP(self.config, dtype=jnp.dtype(self.dtype))
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(self.dtype)), model.params)
        self._params = jax.device_put(params, NamedSharding(self.mesh, P()))

    @classmethod
    def from_pretrained(
        cls,
        path_or_name: str | os.PathLike[str],
        *,
        tokenizer: str | os.PathLike[str] | None = None,
        dtype: DType | None = None,
        mesh: Mesh | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Loads CLIP.

        path_or_name: a Hugging Face folder; a .pt file of OpenAI; "demo", the ranker of the model in the package; or
            "OWNER/NAME", a repository of the Hugging Face hub, such as "openai/clip-vit-base-patch32" (downloaded into
            the cache of the hub).
        tokenizer: the path of one, where the model has none beside it (see interop.clip.read_clip).
        dtype: compute dtype; None is float32 on CPU and bfloat16 elsewhere.
        mesh: a jax Mesh with the one axis "data": pictures are spread over its devices. None: the first device.
        revision: branch, tag or commit of the repository; None is its main branch.
        local_files_only: nothing is downloaded; what the cache holds has to do.

        Raises CheckpointError or DownloadError with the file and the reason, UsageError for another dtype or mesh.
        """
        divide_cpu()
        path = find_clip(path_or_name, revision=revision, local_files_only=local_files_only)
        model = read_clip(path, None if tokenizer is None else Path(tokenizer).expanduser())
        ranker = cls(model, dtype=dtype, mesh=mesh)
        ranker.source = str(path_or_name)
        return ranker

    def __str__(self) -> str:
        return f"CLIP {self.source}"

    def save_pretrained(
        self, folder: str | os.PathLike[str], *, overwrite: bool = False, dtype: DiskDType = "float32"
    ) -> None:
        """Writes the model, with its tokenizer, as a Hugging Face folder.

        dtype: of the weights in the folder. Raises UsageError if the model was loaded in bfloat16, where the digits
        beyond are gone; otherwise as write_clip.
        """
        if self.dtype != "float32":
            raise UsageError(f"weights held in {self.dtype} are not saved, they are rounded; load with dtype='float32'")
        params = jax.device_get(self._params)
        write_clip(Path(folder).expanduser(), ClipModel(self.config, params, self.tokenizer), overwrite, dtype)

    def tokenize(self, prompts: str | Sequence[str]) -> np.ndarray:
        """Ids int32[P, N] of P prompts (one for a bare string), N the context of the text tower, 77 as a rule.

        Each row is start token, text, end token, and more end tokens up to N. These have no effect: attention is
        causal, and the features of a text are those of the first end token.

        Warns (UserWarning) of prompts that are cut. Raises UsageError for no prompts, for what is not text, or over
        2,000 characters.
        """
        return self._tokenize([prompts] if isinstance(prompts, str) else list(prompts))

    def encode_text(self, prompts: str | Sequence[str]) -> np.ndarray:
        """Features f32[P, e] of length 1; prompts as in tokenize.

        Raises UsageError as tokenize, NonFiniteError for broken weights.
        """
        return self._text_features(self._tokenize([prompts] if isinstance(prompts, str) else list(prompts)))

    def encode_images(self, images: Any) -> np.ndarray:
        """Features f32[n, e] of length 1.

        The short side becomes S and the long one int(S * long / short), bicubic; of that the centre S x S, which
        starts at int(round((long - S) / 2)) as in torchvision's CenterCrop. Hugging Face's processor rounds down, so it
        may cut one pixel off.

        Raises UsageError for pictures of another shape, dtype or range, NonFiniteError for broken weights.
        """
        pictures, size = _to_uint8(images), self.config.vision.image_size
        # Pixels are the same either way; a collection of many sizes shall not compile a program for each.
        if len({side for picture in pictures for side in picture.shape[:2]}) > 1:
            pictures = [resize_and_crop(picture, size) for picture in pictures]
        rows = self.mesh.size * (8 if self.mesh.devices.flat[0].platform == "cpu" else 32)
        device = self.mesh.devices.flat[0].device_kind
        features, waiting = [], None
        with (
            device_memory(f"no room to rank pictures in the memory of {device}; use a larger device"),
            matmul_precision(self.dtype),
        ):
            for first in range(0, len(pictures), rows):
                chunk = pictures[first : first + rows]
                padded = np.stack(chunk + chunk[:1] * (rows - len(chunk)))
                padded = jax.device_put(padded, NamedSharding(self.mesh, P("data")))
                encoded = encode_pictures(self._clip, self.mesh, self._params, padded)
                # One call is in flight while the result of the one before it is fetched.
                if waiting is not None:
                    features.append(np.asarray(waiting))
                waiting = encoded
            features.append(np.asarray(waiting))
        return _normalise(np.concatenate(features)[: len(pictures)], "picture")

    def scores(self, prompt: str, images: Any) -> np.ndarray:
        """Cosines f32[n] in [-1, 1] of the prompt with each picture.

        Warns and raises as encode_text and encode_images.
        """
        return self._scores(self._tokenize([prompt]), images)

    def rank(self, prompt: str, images: Any) -> np.ndarray:
        """Indices int[n] of the pictures, the best first, the lower index first where scores are equal."""
        return np.argsort(-self._scores(self._tokenize([prompt]), images), kind="stable")

    def _tokenize(self, prompts: list[str]) -> np.ndarray:
        if not prompts:
            raise UsageError("no prompt was given")
        for prompt in prompts:
            check_prompt(prompt)
        length = self.config.text.max_position_embeddings
        tokenized = clip_ids(self.tokenizer, prompts, length)
        for prompt, tokens in zip(prompts, tokenized.num_tokens, strict=True):
            if tokens > length:
                warnings.warn(
                    f"{quote_prompt(prompt)} has {tokens} tokens with start and end; CLIP takes {length}, so the "
                    f"last {tokens - length} of the text are ignored",
                    stacklevel=3,
                )
        return tokenized.ids

    def _text_features(self, ids: np.ndarray) -> np.ndarray:
        # One row a call: the features of a prompt do not depend on the others, and their number compiles nothing.
        with matmul_precision(self.dtype):
            features = [encode_ids(self._clip, self._params, row[None]) for row in ids]
        return _normalise(np.concatenate(jax.device_get(features)), "prompt")

    def _scores(self, ids: np.ndarray, images: Any) -> np.ndarray:
        text = self._text_features(ids)
        # Row by row and not a matrix product, whose last bits change with the number of rows.
        return np.clip((self.encode_images(images) * text).sum(axis=1), -1, 1)


@partial(jax.jit, static_argnames="clip")
def encode_ids(clip: CLIP, params: dict[str, Any], ids: jax.Array) -> Any:
    """Features f32[b, e], not normalised, of ids int32[b, N]."""
    return clip.apply({"params": params}, ids, method="encode_text")


@partial(jax.jit, static_argnames=("clip", "mesh"))
def encode_pictures(clip: CLIP, mesh: Mesh, params: dict[str, Any], pictures: jax.Array) -> jax.Array:
    """Features f32[b, e], not normalised, of square pictures uint8[b, y, x, 3], each device its share."""

    def encode(params: Any, pictures: jax.Array) -> Any:
        pixels = normalise_pictures(resize_square(pictures, clip.config.vision.image_size))
        return clip.apply({"params": params}, pixels, method="encode_images")

    spread = jax.shard_map(encode, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"), check_vma=False)
    return spread(params, pictures)


def resize_and_crop(picture: np.ndarray, size: int) -> np.ndarray:
    """uint8[y, x, 3] -> uint8[size, size, 3] by Pillow: see ClipRanker.encode_images.

    Size 4: 6 x 13 pixels become 4 x int(4 * 13 / 6) = 4 x 8, of which columns 2 to 5 stay; of 7 columns, (7 - 4) / 2 =
    1.5 is rounded to 2 (to the even number, as Python does), and columns 2 to 5 stay.
    """
    y, x = (int(size * side / min(picture.shape[:2])) for side in picture.shape[:2])
    top, left = int(round((y - size) / 2)), int(round((x - size) / 2))
    resized = Image.fromarray(picture).resize((x, y), Image.Resampling.BICUBIC)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def resize_square(pictures: jax.Array, size: int) -> jax.Array:
    """uint8[b, s, s, 3] -> uint8[b, size, size, 3]: bit by bit Pillow's `Image.resize`, bicubic with antialiasing.

    Horizontally, then vertically, each rounded to uint8; Pillow's Resample.c.
    """
    if pictures.shape[1] == size:
        return pictures
    taps = resampling_taps(pictures.shape[1], size)
    across = _resample_columns(pictures, *taps)
    return _resample_columns(across.swapaxes(1, 2), *taps).swapaxes(1, 2)


def resampling_taps(in_size: int, out_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Which pixels of a line make a pixel of the resized line: first int[out_size], weights int32[out_size, taps].

    Output i is the sum over t of weights[i, t] * input[first[i] + t], in units of 2**-22; weights beyond the line are
    0. The cubic with a = -0.5 (Keys, "Cubic Convolution Interpolation for Digital Image Processing", 1981), as wide as
    the step between outputs where that is over 1, in float64 and rounded, as precompute_coeffs and
    normalize_coeffs_8bpc of Pillow do.

    4 -> 2: the centres of the outputs are 1 and 3, those of the inputs .5, 1.5, 2.5 and 3.5, and the cubic is twice as
    wide. Output 0 is .459, .459, .120 and -.037 of the inputs, which is the cubic at .25, .25, .75 and 1.25 divided by
    its sum.
    """
    step = in_size / out_size
    stretch = max(step, 1.0)
    centers = (np.arange(out_size) + 0.5) * step
    first = np.maximum((centers - 2 * stretch + 0.5).astype(int), 0)
    last = np.minimum((centers + 2 * stretch + 0.5).astype(int), in_size)
    inputs = first[:, None] + np.arange(np.max(last - first))
    x = np.abs((inputs - centers[:, None] + 0.5) * (1 / stretch))
    near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    cubic = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    cubic[inputs >= last[:, None]] = 0
    weights = cubic / np.cumsum(cubic, axis=1)[:, -1:]  # summed from left to right, as Pillow does
    return first, np.trunc(weights * (1 << PRECISION_BITS) + np.copysign(0.5, weights)).astype(np.int32)


def _resample_columns(pictures: jax.Array, first: np.ndarray, weights: np.ndarray) -> jax.Array:
    """uint8[b, y, x, 3] -> uint8[b, y, out, 3], of taps from resampling_taps.

    int32 is enough: the weights of an output sum to 2**22, their absolute values to at most 1.3 times that (the lobes
    of the cubic are small), and 255 * 1.3 * 2**22 + 2**21 = 1.4e9 is below 2**31.
    """
    total = jnp.int32(1 << (PRECISION_BITS - 1))  # a half, so that the shift rounds
    for tap, weight in enumerate(weights.T):
        column = jnp.take(pictures, first + tap, axis=2, mode="clip")  # where it is clipped the weight is 0
        total += column.astype(jnp.int32) * weight[:, None]
    return jnp.clip(total >> PRECISION_BITS, 0, 255).astype(jnp.uint8)


def _to_uint8(images: Any) -> list[np.ndarray]:
    """uint8[H, W, 3] of each picture; see ClipRanker. Raises UsageError."""
    if isinstance(images, (np.ndarray, jax.Array)):
        images = np.asarray(images)
        if images.ndim != 4:
            raise UsageError(f"images must be [n, H, W, 3], or a sequence of pictures; not {list(images.shape)}")
    elif not isinstance(images, Sequence) or isinstance(images, (str, bytes)):
        raise UsageError(f"images must be an array, or a sequence of pictures; not {type(images).__name__}")
    if len(images) == 0:
        raise UsageError("there is no picture to score")
    return [_picture_to_uint8(image, i) for i, image in enumerate(images)]


def _picture_to_uint8(image: Any, index: int) -> np.ndarray:
    if isinstance(image, Image.Image):
        try:
            image = image.convert("RGB")
        except (OSError, SyntaxError) as error:  # files are read when they are used; a damaged PNG is a SyntaxError
            raise UsageError(f"picture {index} cannot be read: {error}") from None
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise UsageError(f"picture {index} must be [H, W, 3] with at least one pixel, not {list(image.shape)}")
    check_pixels(image)
    return image if image.dtype == np.uint8 else (image * 255).astype(np.uint8)


def _normalise(features: np.ndarray, what: str) -> np.ndarray:
    """f32[n, e] divided by their lengths."""
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    bad = ~(np.isfinite(lengths) & (lengths > 0))
    if bad.any():
        raise NonFiniteError(
            f"NaN, infinite or all-zero features of {what} {np.argmax(bad)}: the weights are damaged, or overflow in "
            "this dtype (try float32)"
        )
    return features / lengths
