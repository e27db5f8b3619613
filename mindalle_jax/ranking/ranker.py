"""Ranking images by a prompt: the cosine of CLIP's features, with the preprocessing of OpenAI's `clip.load`.

Square images of one size, which is what a model draws, are resized on the device, by the integers that Pillow
computes; all others by Pillow on the host. Features are computed in chunks of one compiled size, the last one padded,
so that they do not depend on how many images there are.

Dimensions: b images of one compiled call, y and x pixels, S side of the images CLIP sees, e width of the features.
"""

import os
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

from mindalle_jax.errors import NonFiniteError, UsageError, warn
from mindalle_jax.hub.resolve import find_clip
from mindalle_jax.interop.clip import ClipModel, read_clip, write_clip
from mindalle_jax.models.clip import CLIP, normalize_images
from mindalle_jax.ranking.resize import resize_and_crop, resize_square
from mindalle_jax.runtime.devices import (
    DType,
    choose_devices,
    device_memory,
    pinned,
    prepare_process,
)
from mindalle_jax.sampling.options import as_array, as_prompts, check_pixels
from mindalle_jax.storage.weights import DiskDType
from mindalle_jax.text.clip_tokenizer import clip_ids
from mindalle_jax.text.tokenizer import check_prompt, quote_prompt


class ClipRanker:
    """Scores images by a prompt.

    `images` below are uint8, or floating point in [0, 1], [n, H, W, 3]; or a sequence of such [H, W, 3] arrays and PIL
    images, of any sizes. Floating point is truncated to uint8. PIL images of other modes become RGB before they are
    resized, as in Hugging Face's processor. There must be one image, and one pixel in it.
    """

    def __init__(self, model: ClipModel, *, dtype: DType | None = None, mesh: Mesh | None = None):
        """dtype, mesh: see from_pretrained. Weights are copied to the devices in the compute dtype."""
        self.config, self.tokenizer, self.source = model.config, model.tokenizer, "in memory"
        self.mesh, self.dtype = choose_devices(mesh, dtype)
        self._clip = CLIP(self.config, dtype=jnp.dtype(self.dtype))
        with pinned():
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

        path_or_name: a Hugging Face folder; a .pt file of OpenAI; "demo" or "demo-scenes", the ranker of that model in
            the package; a name of OpenAI such as "ViT-B/32", or "OWNER/NAME", a repository of the Hugging Face hub
            (both downloaded into the cache of the hub).
        tokenizer: the path of one, where the model has none beside it (see interop.clip.read_clip).
        dtype: compute dtype; None is float32 on CPU and bfloat16 elsewhere.
        mesh: a jax Mesh with the one axis "data": images are spread over its devices. None: the first device.
        revision: branch, tag or commit of the repository; None is its main branch.
        local_files_only: nothing is downloaded; what the cache holds has to do.

        Raises CheckpointError or DownloadError with the file and the reason, UsageError for another dtype or mesh.
        """
        prepare_process()
        path = find_clip(path_or_name, revision=revision, local_files_only=local_files_only)
        model = read_clip(path, None if tokenizer is None else Path(os.path.expanduser(tokenizer)))
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
        write_clip(Path(os.path.expanduser(folder)), ClipModel(self.config, params, self.tokenizer), overwrite, dtype)

    def tokenize(self, prompts: str | Sequence[str]) -> np.ndarray:
        """Ids int32[P, N] of P prompts (one for a bare string), N the context of the text tower, 77 as a rule.

        Each row is start token, text, end token, and more end tokens up to N. These have no effect: attention is
        causal, and the features of a text are those of the first end token.

        Warns (UserWarning) of prompts that are cut. Raises UsageError for no prompts, for what is not text, or over
        2,000 characters.
        """
        return self._tokenize(as_prompts(prompts))

    def encode_text(self, prompts: str | Sequence[str]) -> np.ndarray:
        """Features f32[P, e] of length 1; prompts as in tokenize.

        Raises UsageError as tokenize, NonFiniteError for broken weights.
        """
        return self._text_features(self._tokenize(as_prompts(prompts)))

    def encode_images(self, images: Any) -> np.ndarray:
        """Features f32[n, e] of length 1.

        The short side becomes S and the long one int(S * long / short), bicubic; of that the centre S x S, which
        starts at int(round((long - S) / 2)) as in torchvision's CenterCrop. Hugging Face's processor rounds down, so it
        may cut one pixel off.

        Raises UsageError for images of another shape, dtype or range, NonFiniteError for broken weights.
        """
        images, size = _to_uint8(images), self.config.vision.image_size
        # Pixels are the same either way; a collection of many sizes shall not compile a program for each.
        if len({side for image in images for side in image.shape[:2]}) > 1:
            images = [resize_and_crop(image, size) for image in images]
        rows = self.mesh.size * (8 if self.mesh.devices.flat[0].platform == "cpu" else 32)
        device = self.mesh.devices.flat[0].device_kind
        features, waiting = [], None
        with (
            device_memory(f"no room to rank images in the memory of {device}; use a larger device"),
            pinned(self.dtype),
        ):
            for first in range(0, len(images), rows):
                chunk = images[first : first + rows]
                padded = np.stack(chunk + chunk[:1] * (rows - len(chunk)))
                padded = jax.device_put(padded, NamedSharding(self.mesh, P("data")))
                encoded = encode_images(self._clip, self.mesh, self._params, padded)
                # One call is in flight while the result of the one before it is fetched.
                if waiting is not None:
                    features.append(np.asarray(waiting))
                waiting = encoded
            features.append(np.asarray(waiting))
        return _normalize(np.concatenate(features)[: len(images)], "image")

    def scores(self, prompt: str, images: Any) -> np.ndarray:
        """Cosines f32[n] in [-1, 1] of the prompt with each image.

        Warns and raises as encode_text and encode_images.
        """
        return self._scores(self._tokenize([prompt]), images)

    def rank(self, prompt: str, images: Any) -> np.ndarray:
        """Indices int[n] of the images, the best first, the lower index first where scores are equal."""
        return np.argsort(-self._scores(self._tokenize([prompt]), images), kind="stable")

    def _tokenize(self, prompts: Sequence[str]) -> np.ndarray:
        if not prompts:
            raise UsageError("no prompt was given")
        for prompt in prompts:
            check_prompt(prompt)
        length = self.config.text.max_position_embeddings
        tokenized = clip_ids(self.tokenizer, list(prompts), length)
        for prompt, tokens in zip(prompts, tokenized.num_tokens, strict=True):
            if tokens > length:
                warn(
                    f"{quote_prompt(prompt)} has {tokens} tokens with start and end; CLIP takes {length}, so the "
                    f"last {tokens - length} of the text are ignored"
                )
        return tokenized.ids

    def _text_features(self, ids: np.ndarray) -> np.ndarray:
        # One row a call: the features of a prompt do not depend on the others, and their number compiles nothing.
        with pinned(self.dtype):
            features = [encode_ids(self._clip, self._params, row[None]) for row in ids]
            return _normalize(np.concatenate(jax.device_get(features)), "prompt")

    def _scores(self, ids: np.ndarray, images: Any) -> np.ndarray:
        text = self._text_features(ids)
        # Row by row and not a matrix product, whose last bits change with the number of rows.
        return np.clip((self.encode_images(images) * text).sum(axis=1), -1, 1)


@partial(jax.jit, static_argnames="clip")
def encode_ids(clip: CLIP, params: dict[str, Any], ids: jax.Array) -> Any:
    """Features f32[b, e], not normalized, of ids int32[b, N]."""
    return clip.apply({"params": params}, ids, method="encode_text")


@partial(jax.jit, static_argnames=("clip", "mesh"))
def encode_images(clip: CLIP, mesh: Mesh, params: dict[str, Any], images: jax.Array) -> jax.Array:
    """Features f32[b, e], not normalized, of square images uint8[b, y, x, 3], each device its share."""
    # Only what the image tower reads goes into shard_map: jax 0.11.2 crashes on an input that is not used.
    params = {name: params[name] for name in ("vision_model", "visual_projection")}
    sharded = jax.shard_map(
        partial(_encode_pixels, clip), mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"), check_vma=False
    )
    return sharded(params, images)


def _encode_pixels(clip: CLIP, params: dict[str, Any], images: jax.Array) -> Any:
    pixels = normalize_images(resize_square(images, clip.config.vision.image_size))
    params = params | {"logit_scale": jnp.float32(0)}  # declared by the module; features do not depend on it
    return clip.apply({"params": params}, pixels, method="encode_images")


def _to_uint8(images: Any) -> list[np.ndarray]:
    """uint8[H, W, 3] of each image; see ClipRanker. Raises UsageError."""
    if isinstance(images, (np.ndarray, jax.Array)):
        images = np.asarray(images)
        if images.ndim != 4:
            raise UsageError(f"images must be [n, H, W, 3], or a sequence of images; not {list(images.shape)}")
    elif not isinstance(images, Sequence) or isinstance(images, (str, bytes)):
        raise UsageError(f"images must be an array, or a sequence of images; not {type(images).__name__}")
    if len(images) == 0:
        raise UsageError("there is no image to score")
    return [_image_to_uint8(image, i) for i, image in enumerate(images)]


def _image_to_uint8(image: Any, index: int) -> np.ndarray:
    if isinstance(image, Image.Image):
        try:
            image = image.convert("RGB")
        except (OSError, SyntaxError) as error:  # files are read when they are used; a damaged PNG is a SyntaxError
            raise UsageError(f"image {index} cannot be read: {error}") from None
    image = as_array(image, f"image {index}")
    if image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise UsageError(f"image {index} must be [H, W, 3] with at least one pixel, not {list(image.shape)}")
    check_pixels(image)
    return image if image.dtype == np.uint8 else (image * 255).astype(np.uint8)


def _normalize(features: np.ndarray, what: str) -> np.ndarray:
    """f32[n, e] divided by their lengths."""
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    bad = ~(np.isfinite(lengths) & (lengths > 0))
    if bad.any():
        raise NonFiniteError(
            f"NaN, infinite or all-zero features of {what} {np.argmax(bad)}: the weights are damaged, or overflow in "
            "this dtype (try float32)"
        )
    return features / lengths
