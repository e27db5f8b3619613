"""ClipRanker ranks images by a prompt: the cosine of CLIP's features, after the preprocessing that the model wants.

Square images of one size, which are what a model samples, are resized on the device with the integer arithmetic of
Pillow. Pillow resizes all other images on the host. Features are computed in chunks of one compiled size, the last one
padded, so that they do not depend on the number of images.

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
from mindalle_jax.interop.clip_preprocessing import openai_preprocessing
from mindalle_jax.models.clip import CLIP, Preprocessing, normalize_images
from mindalle_jax.ranking.resize import on_device, resize_and_crop, resize_square
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
    """A CLIP model that scores how well images fit a prompt. Load one with `from_pretrained`.

    Images are given as one array [n, H, W, 3], or as a sequence of arrays [H, W, 3] and PIL images of any sizes.
    Arrays are uint8, or float in [0, 1], which is truncated to uint8. PIL images of other modes become RGB before they
    are resized, as in Hugging Face's processor. There is at least one image.

    Attributes:
        config (ClipConfig): the configuration of CLIP.
        tokenizer (Tokenizer): CLIP's tokenizer.
        preprocessing (Preprocessing): how images become the input of the image tower.
        source (str): the name that the model was loaded by.
        dtype (str): compute dtype, "float32" or "bfloat16".
        mesh (Mesh): devices that it computes on.

    Examples:
        >>> import numpy as np
        >>> from mindalle_jax import ClipRanker
        >>> ranker = ClipRanker.from_pretrained("demo")
        >>> images = np.zeros((2, 64, 64, 3), np.uint8)
        >>> ranker.scores("a parrot", images).shape
        (2,)
    """

    def __init__(self, model: ClipModel, *, dtype: DType | None = None, mesh: Mesh | None = None):
        """Makes a ranker from a model in memory. `from_pretrained` loads one.

        Args:
            model: configuration, weights and tokenizer.
            dtype: as in `from_pretrained`.
            mesh: as in `from_pretrained`.

        Raises:
            UsageError: a dtype or mesh that does not work.
        """
        self.config, self.tokenizer, self.source = model.config, model.tokenizer, "in memory"
        self.preprocessing = model.preprocessing or openai_preprocessing(self.config)
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
        """Loads a CLIP model with a Vision Transformer.

        Args:
            path_or_name: a Hugging Face folder; a `.pt` file of OpenAI; "demo" or "demo-scenes", the ranker of that
                model in the package; a name of OpenAI such as "ViT-B/32"; or "OWNER/NAME", a repository of the
                Hugging Face hub. The last two are downloaded into the cache of the hub.
            tokenizer: path of a tokenizer, for a model that has none beside it: OpenAI's
                `bpe_simple_vocab_16e6.txt.gz`, or a Hugging Face folder.
            dtype: compute dtype, "float32" or "bfloat16"; None is float32 on CPU and bfloat16 elsewhere.
            mesh: a `jax.sharding.Mesh` with the one axis "data"; images are sharded over its devices. None is the
                first device.
            revision: branch, tag or commit of the repository; None is its main branch.
            local_files_only: if True, nothing is downloaded, and the model must be in the cache.

        Returns:
            The ranker, on its devices.

        Raises:
            CheckpointError: a file is missing, damaged, or does not fit.
            DownloadError: a download failed.
            UsageError: an argument is out of range.
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
        """Writes the model with its tokenizer as a Hugging Face folder, which transformers loads too.

        Args:
            folder: where the model goes; it appears when it is complete.
            overwrite: if True, a CLIP model that is there is replaced.
            dtype: dtype of the weights on disk.

        Raises:
            UsageError: the model was loaded in bfloat16, so its weights are rounded.
            OutputError: the folder exists, cannot be written, or the disk is full.
            CheckpointError: a weight is too large for the dtype.
        """
        if self.dtype != "float32":
            raise UsageError(f"weights held in {self.dtype} are not saved, they are rounded; load with dtype='float32'")
        params = jax.device_get(self._params)
        model = ClipModel(self.config, params, self.tokenizer, self.preprocessing)
        write_clip(Path(os.path.expanduser(folder)), model, overwrite, dtype)

    def tokenize(self, prompts: str | Sequence[str]) -> np.ndarray:
        """Turns prompts into ids of CLIP.

        Each row is the start token, the text, the end token, and more end tokens up to N. These have no effect:
        attention is causal, and the features of a text are those of the first end token. Warns (UserWarning) of
        prompts that are cut.

        Args:
            prompts: one prompt, or a list of P.

        Returns:
            Ids int32[P, N]; N is the context of the text tower, 77 in OpenAI's models.

        Raises:
            UsageError: there is no prompt, or one is not text or longer than 2,000 characters.
        """
        return self._tokenize(as_prompts(prompts))

    def encode_text(self, prompts: str | Sequence[str]) -> np.ndarray:
        """Computes the features of prompts.

        Args:
            prompts: one prompt, or a list of P.

        Returns:
            Features f32[P, e] of length 1.

        Raises:
            UsageError: there is no prompt, or one is not text or longer than 2,000 characters.
            NonFiniteError: the weights are damaged.
        """
        return self._text_features(self._tokenize(as_prompts(prompts)))

    def encode_images(self, images: Any) -> np.ndarray:
        """Computes the features of images.

        They are preprocessed as `preprocessing` says. Usually they are resized (bicubic) so that the short side is S
        and the long one int(S * long / short), and the center S x S of the result is used. For a file of OpenAI it
        starts at round((long - S) / 2) as in torchvision's CenterCrop; for a Hugging Face folder with a
        preprocessor_config.json that is rounded down, as in transformers.

        Args:
            images: as in the description of the class.

        Returns:
            Features f32[n, e] of length 1.

        Raises:
            UsageError: a shape, a dtype or a pixel is out of range.
            NonFiniteError: the weights are damaged.
            DeviceMemoryError: a chunk of images does not fit into the memory of the device.
        """
        images = _to_uint8(images)
        # Pixels are the same either way; a collection of many sizes shall not compile a program for each.
        if len({side for image in images for side in image.shape[:2]}) > 1 or not on_device(self.preprocessing):
            images = [resize_and_crop(image, self.preprocessing) for image in images]
        rows = self.mesh.size * (8 if self.mesh.devices.flat[0].platform == "cpu" else 32)
        device = self.mesh.devices.flat[0].device_kind
        features, waiting = [], None
        with (
            device_memory(f"ranking does not fit into the memory of {device}; use a larger device"),
            pinned(self.dtype),
        ):
            for first in range(0, len(images), rows):
                chunk = images[first : first + rows]
                padded = np.stack(chunk + chunk[:1] * (rows - len(chunk)))
                padded = jax.device_put(padded, NamedSharding(self.mesh, P("data")))
                encoded = encode_images(self._clip, self.mesh, self.preprocessing, self._params, padded)
                # One call is in flight while the result of the one before it is fetched.
                if waiting is not None:
                    features.append(np.asarray(waiting))
                waiting = encoded
            features.append(np.asarray(waiting))
        return _normalize(np.concatenate(features)[: len(images)], "image")

    def scores(self, prompt: str, images: Any) -> np.ndarray:
        """Scores how well each image fits a prompt.

        Args:
            prompt: one prompt.
            images: as in the description of the class.

        Returns:
            Cosines f32[n] in [-1, 1] of the features of the prompt with those of each image.

        Raises:
            UsageError: the prompt or an image is out of range.
            NonFiniteError: the weights are damaged.
        """
        return self._scores(self._tokenize([prompt]), images)

    def rank(self, prompt: str, images: Any) -> np.ndarray:
        """Orders images by how well they fit a prompt.

        Args:
            prompt: one prompt.
            images: as in the description of the class.

        Returns:
            Indices int[n] of the images, the best first; of equal ones, the lower index first.

        Raises:
            UsageError: the prompt or an image is out of range.
            NonFiniteError: the weights are damaged.
        """
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


@partial(jax.jit, static_argnames=("clip", "mesh", "preprocessing"))
def encode_images(
    clip: CLIP, mesh: Mesh, preprocessing: Preprocessing, params: dict[str, Any], images: jax.Array
) -> jax.Array:
    """Features f32[b, e], not normalized, of square images uint8[b, y, x, 3], each device its share."""
    # Only what the image tower reads goes into shard_map: jax 0.11.2 crashes on an input that is not used.
    params = {name: params[name] for name in ("vision_model", "visual_projection")}
    sharded = jax.shard_map(
        partial(_encode_pixels, clip, preprocessing),
        mesh=mesh,
        in_specs=(P(), P("data")),
        out_specs=P("data"),
        check_vma=False,
    )
    return sharded(params, images)


def _encode_pixels(clip: CLIP, preprocessing: Preprocessing, params: dict[str, Any], images: jax.Array) -> Any:
    pixels = normalize_images(resize_square(images, preprocessing.size), preprocessing.mean, preprocessing.std)
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
