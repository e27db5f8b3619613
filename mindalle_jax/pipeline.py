"""Dalle and ImageGPT: the objects that hold weights. Text -> codes -> pixels.

Pictures are channels last; a model knows one picture size. Weights load straight into the layout of sampling, layer by
layer, so a model needs its own size in memory and no more.
"""

import hashlib
import os
import platform
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

import mindalle_jax
from mindalle_jax.config import Stage2Config, load_config
from mindalle_jax.errors import CheckpointError, UsageError
from mindalle_jax.generation import Generation
from mindalle_jax.interop.download import cache_dir
from mindalle_jax.interop.mindalle import find_model
from mindalle_jax.models.transformer import Transformer
from mindalle_jax.models.vqgan import VQGAN
from mindalle_jax.sampling import (
    DEFAULT_TOP_K,
    Settings,
    check_num_candidates,
    default_batch_size,
    sample_codes,
)
from mindalle_jax.tokenizer import TextTokenizer, TokenizedPrompts
from mindalle_jax.weights import MANIFEST, load_params, read_manifest

DType = Literal["bfloat16", "float32"]


class _Model:
    """What Dalle and ImageGPT share: weights, pictures <-> codes, and drawing codes after a prefix."""

    def __init__(self, folder: Path, dtype: DType | None, mesh: Mesh | None):
        self.folder = folder
        self.config = load_config(folder / "config.yaml")
        if "stage2" not in read_manifest(folder)["tensors"]:
            raise CheckpointError(f"{folder}: holds a VQGAN only, nothing that draws codes")
        if mesh is not None and mesh.axis_names != ("data",):
            raise UsageError(f"mesh must have the one axis 'data', not {mesh.axis_names}")
        # Mesh and not make_mesh, whose axes are of the explicit kind by default.
        self.mesh = Mesh(np.array(jax.devices()[:1]) if mesh is None else mesh.devices, ("data",))
        self.backend = self.mesh.devices.flat[0].platform
        # XLA on CPU has fast float32 matrix products only.
        self.dtype: DType = dtype or ("float32" if self.backend == "cpu" else "bfloat16")
        if self.dtype not in ("float32", "bfloat16"):
            raise UsageError(f"dtype must be 'bfloat16', 'float32' or None, not {dtype!r}")
        _use_compilation_cache()
        compute = jnp.dtype(self.dtype)
        self._transformer = Transformer(self.config.stage2, stacked=False, dtype=compute)
        self._encoder, self._decoder = VQGAN(self.config.stage1), VQGAN(self.config.stage1, dtype=compute)
        self._digest = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
        # Stage 1 is small, and codes are computed in float32 whatever the dtype.
        self._stage1 = load_params(folder, "stage1", self.config, jnp.dtype("float32"), self.mesh)
        self._stage2 = load_params(folder, "stage2", self.config, compute, self.mesh)

    @classmethod
    def from_pretrained(
        cls, path_or_name: str | os.PathLike[str], *, dtype: DType | None = None, mesh: Mesh | None = None
    ) -> Self:
        """Loads a model.

        path_or_name: a converted folder; a folder in the original's PyTorch format (converted into the cache first); or
        "minDALL-E/1.3B" (downloaded and converted into the cache, about 5 GB each).
        dtype: compute dtype; None is float32 on CPU and bfloat16 elsewhere.
        mesh: a jax Mesh with the one axis "data": candidates are spread over its devices. None: the first device.

        Raises CheckpointError, ConfigError, DownloadError or OutputError with the file and the reason.
        """
        return cls(find_model(path_or_name), dtype, mesh)

    @property
    def image_size(self) -> int:
        """Height and width of the pictures, in pixels."""
        return self.config.stage1.hparams.resolution

    def decode_codes(self, codes: Any) -> np.ndarray:
        """Pictures f32[n, H, W, 3] in [0, 1] of codes int[n, h, w] or [n, h * w] in [0, V).

        Raises UsageError for codes of another shape or out of range.
        """
        return np.concatenate([np.asarray(chunk) for chunk in self._decode_chunks(codes)])

    def encode_images(self, images: Any) -> np.ndarray:
        """Codes int32[n, h, w] of pictures uint8, or float in [0, 1], [n, H, W, 3] of the model's size.

        Computed in float32. Raises UsageError for pictures of another shape, size or range.
        """
        images = np.asarray(images)
        size = self.image_size
        if images.ndim != 4 or images.shape[0] == 0 or images.shape[1:] != (size, size, 3):
            raise UsageError(f"images must be [n, {size}, {size}, 3] for this model, not {list(images.shape)}")
        if images.dtype == np.uint8:
            images = images.astype(np.float32) / 255
        elif not np.issubdtype(images.dtype, np.floating):
            raise UsageError(f"images must be uint8 or floating point, not {images.dtype}")
        elif not (images.min() >= 0 and images.max() <= 1):
            raise UsageError(f"floating point images must lie in [0, 1], not [{images.min():.3g}, {images.max():.3g}]")
        with jax.default_matmul_precision("highest"):
            chunks = [
                _encode(self._encoder, self._stage1, chunk.astype(np.float32) * 2 - 1)
                for chunk in np.split(images, range(1, len(images)))
            ]
        return np.concatenate([np.asarray(chunk) for chunk in chunks])

    def _decode_chunks(self, codes: Any) -> list[jax.Array]:
        """Pictures f32[m, H, W, 3] of codes as decode_codes takes them, chunk by chunk.

        Chunks have one compiled size, so that pixels do not depend on how many are decoded.
        """
        codes = self._check_codes(codes)
        rows = self.mesh.size * (1 if self.backend == "cpu" else 16)
        spread = NamedSharding(self.mesh, P("data"))
        chunks = []
        with self._precision():
            for first in range(0, len(codes), rows):
                chunk = codes[first : first + rows]
                padded = np.concatenate([chunk, np.repeat(chunk[:1], rows - len(chunk), axis=0)])
                pictures = decode_pictures(self._decoder, self.mesh, self._stage1, jax.device_put(padded, spread))
                chunks.append(pictures[: len(chunk)])
        return chunks

    def _draw(self, prefix_ids: np.ndarray, names: list[str], num_candidates: int, settings: Settings,
              batch_size: int | None, progress: bool) -> tuple[np.ndarray, int]:  # fmt: skip
        """Codes int32[P, n, h * w] of P prefixes int32[P, p], and the batch size used."""
        num_candidates = check_num_candidates(num_candidates)
        check_batch_size(batch_size)
        if batch_size is None:
            batch_size = default_batch_size(num_candidates, self.backend)
        length = self.config.stage2.hparams.ctx_len_img
        codes = []
        for row, name in zip(prefix_ids, names, strict=True):
            total = num_candidates * length
            with (
                tqdm(total=total, desc=name[:30] or "codes", unit="code", disable=not progress) as bar,
                self._precision(),
            ):
                codes.append(
                    sample_codes(
                        self._transformer,
                        self._stage2,
                        row,
                        num_candidates,
                        settings,
                        batch_size=batch_size,
                        mesh=self.mesh,
                        on_progress=bar.update,
                    )
                )
        return np.stack(codes), batch_size

    def _generation(self, codes: np.ndarray, prompts: list[str], settings: Settings, batch_size: int,
                    progress: bool) -> Generation:  # fmt: skip
        """Decodes codes [P, n, h * w] and says how they came about."""
        count, n = codes.shape[:2]
        flat = codes.reshape(count * n, -1)
        images = np.empty((count * n, self.image_size, self.image_size, 3), np.uint8)
        done = 0
        with tqdm(total=len(flat), desc="pictures", unit="picture", disable=not progress) as bar:
            for chunk in self._decode_chunks(flat):
                # Truncated, not rounded, as the original does before it saves or ranks.
                images[done : done + len(chunk)] = (np.asarray(chunk) * 255).astype(np.uint8)
                done += len(chunk)
                bar.update(len(chunk))
        device = self.mesh.devices.flat[0]
        meta = {
            "seed": settings.seed,
            "num_candidates": n,
            "temperature": settings.temperature,
            "top_k": settings.top_k,
            "top_p": settings.top_p,
            "dtype": self.dtype,
            "batch_size": batch_size,
            "noise": "threefry2x32, partitionable, fold_in(fold_in(key(seed), candidate), position)",
            "model": str(self.folder),
            "model_sha256": self._digest,
            "device": f"{device.platform}: {device.device_kind}",
            "devices": self.mesh.size,
            "versions": {
                "mindalle-jax": mindalle_jax.__version__,
                "jax": jax.__version__,
                "python": platform.python_version(),
            },
        }
        seeds = np.full((count, n), settings.seed, np.uint32)
        return Generation(images.reshape(count, n, *images.shape[1:]), codes, seeds, prompts, meta)

    def _check_codes(self, codes: Any) -> np.ndarray:
        """Codes int32[n, h, w] from [n, h, w] or [n, h * w]."""
        codes, side, vocab_size = np.asarray(codes), self.config.stage1.code_size, self.config.stage1.n_embed
        if codes.ndim not in (2, 3) or len(codes) == 0 or codes.shape[1:] not in ((side, side), (side * side,)):
            raise UsageError(f"codes must be [n, {side}, {side}] or [n, {side * side}], not {list(codes.shape)}")
        _check_ids(codes, vocab_size, "codes")
        return codes.reshape(-1, side, side).astype(np.int32)

    def _check_sequence(self, codes: Any) -> np.ndarray:
        codes, length = np.asarray(codes), self.config.stage2.hparams.ctx_len_img
        if codes.ndim != 2 or not 1 <= codes.shape[1] <= length:
            raise UsageError(f"codes must be [B, T] with 1 <= T <= {length}, not {list(codes.shape)}")
        _check_ids(codes, self.config.stage2.vocab_size_img, "codes")
        return codes.astype(np.int32)

    def _forward(self, prefix_ids: np.ndarray, codes: np.ndarray) -> tuple[jax.Array, jax.Array | None]:
        if len(prefix_ids) != len(codes):
            raise UsageError(f"{len(prefix_ids)} prefixes do not go with {len(codes)} rows of codes")
        with self._precision():
            return _forward(self._transformer, self._stage2, prefix_ids, codes)

    def _precision(self) -> Any:
        """float32 means float32: GPUs and TPUs would otherwise multiply in fewer bits."""
        return jax.default_matmul_precision("highest" if self.dtype == "float32" else "default")


class Dalle(_Model):
    """Text to image."""

    def __init__(self, folder: Path, dtype: DType | None, mesh: Mesh | None):
        super().__init__(folder, dtype, mesh)
        if self.config.image_only:
            raise CheckpointError(f"{folder}: an image-only model; load it with ImageGPT")
        self.tokenizer = TextTokenizer(
            folder / "tokenizer", self.config.dataset.context_length, self.config.stage2.vocab_size_txt
        )

    def tokenize(self, prompts: str | Sequence[str]) -> np.ndarray:
        """Text ids int32[P, N] of P prompts (one for a bare string); "" gives padding only.

        Warns (UserWarning) of prompts that are cut or mostly unknown. Raises UsageError for what is not text, or over
        2,000 characters.
        """
        return self._tokenize([prompts] if isinstance(prompts, str) else list(prompts)).ids

    def _tokenize(self, prompts: list[str]) -> TokenizedPrompts:
        tokenized = self.tokenizer(prompts)
        for line in tokenized.warnings(prompts):
            warnings.warn(line, stacklevel=3)
        return tokenized

    def logits(self, text_ids: Any, codes: Any) -> tuple[jax.Array, jax.Array]:
        """The forward pass: text_ids int[B, N], codes int[B, T] -> image f32[B, T, V] and text f32[B, N-1, Vt] logits.

        Image logits at t are of code t given the text and codes 0..t-1; text logits at i are of id i + 1.
        """
        text_ids, length = np.asarray(text_ids), self.config.stage2.hparams.ctx_len_txt
        if text_ids.ndim != 2 or text_ids.shape[1] != length:
            raise UsageError(f"text_ids must be [B, {length}], not {list(text_ids.shape)}")
        _check_ids(text_ids, self.config.stage2.vocab_size_txt, "text_ids")
        image_logits, text_logits = self._forward(text_ids.astype(np.int32), self._check_sequence(codes))
        assert text_logits is not None
        return image_logits, text_logits

    def generate_codes(
        self,
        prompt: str | Sequence[str],
        *,
        num_candidates: int = 96,
        top_k: int | None = DEFAULT_TOP_K,
        top_p: float | None = None,
        temperature: float = 1.0,
        seed: int | None = 0,
        batch_size: int | None = None,
        allow_empty: bool = False,
        progress: bool = False,
    ) -> np.ndarray:
        """Draws codes: int32[n, h * w], or [P, n, h * w] for a list of prompts.

        top_k, top_p, temperature, seed: see sampling.Settings. batch_size: candidates per device per compiled call;
        pictures of one seed are bit-identical at one batch_size, whatever else is drawn. allow_empty: take a blank
        prompt, which is otherwise an error. progress: show bars.
        Raises UsageError for values out of range, NonFiniteError for broken weights.
        """
        vocab_size = self.config.stage2.vocab_size_img
        settings = Settings.make(vocab_size, seed=seed, temperature=temperature, top_k=top_k, top_p=top_p)
        prompts = _check_prompts(prompt, allow_empty)
        codes, _ = self._draw(self._tokenize(prompts).ids, prompts, num_candidates, settings, batch_size, progress)
        return codes[0] if isinstance(prompt, str) else codes

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        num_candidates: int = 96,
        top_k: int | None = DEFAULT_TOP_K,
        top_p: float | None = None,
        temperature: float = 1.0,
        seed: int | None = 0,
        batch_size: int | None = None,
        allow_empty: bool = False,
        progress: bool = False,
    ) -> Generation:
        """Pictures of a prompt, or of each of a list; arguments and errors as generate_codes."""
        vocab_size = self.config.stage2.vocab_size_img
        settings = Settings.make(vocab_size, seed=seed, temperature=temperature, top_k=top_k, top_p=top_p)
        prompts = _check_prompts(prompt, allow_empty)
        tokenized = self._tokenize(prompts)
        codes, batch_size = self._draw(tokenized.ids, prompts, num_candidates, settings, batch_size, progress)
        generation = self._generation(codes, prompts, settings, batch_size, progress)
        generation.meta["num_tokens"] = tokenized.num_tokens  # of which the first N count
        return _first(generation) if isinstance(prompt, str) else generation

    def sampling(
        self,
        prompt: str,
        top_k: int | None = DEFAULT_TOP_K,
        top_p: float | None = None,
        softmax_temperature: float = 1.0,
        num_candidates: int = 96,
        seed: int | None = 0,
    ) -> np.ndarray:
        """The original's call: pictures f32[n, H, W, 3] in [0, 1] (the original's are [n, 3, H, W])."""
        return self.decode_codes(
            self.generate_codes(
                prompt,
                num_candidates=num_candidates,
                top_k=top_k,
                top_p=top_p,
                temperature=softmax_temperature,
                seed=seed,
            )
        )


class ImageGPT(_Model):
    """Pictures without text: unconditional, or by class."""

    def __init__(self, folder: Path, dtype: DType | None, mesh: Mesh | None):
        super().__init__(folder, dtype, mesh)
        if not self.config.image_only:
            raise CheckpointError(f"{folder}: a text-to-image model; load it with Dalle")

    @property
    def num_classes(self) -> int | None:
        """Number of classes, None for an unconditional model."""
        return self.config.stage2.hparams.n_classes if self.config.stage2.use_cls_cond else None

    def logits(self, codes: Any, labels: Any = None) -> jax.Array:
        """The forward pass: codes int[B, T], labels int[B] (class-conditional models only) -> f32[B, T, V]."""
        codes = self._check_sequence(codes)
        image_logits, _ = self._forward(class_prefix(self.config.stage2, labels, len(codes)), codes)
        return image_logits

    def generate(
        self,
        class_id: int | None = None,
        *,
        num_candidates: int = 16,
        top_k: int | None = DEFAULT_TOP_K,
        top_p: float | None = None,
        temperature: float = 1.0,
        seed: int | None = 0,
        batch_size: int | None = None,
        progress: bool = False,
    ) -> Generation:
        """Pictures of a class in [0, num_classes), None for an unconditional model. Otherwise as Dalle.generate."""
        vocab_size = self.config.stage2.vocab_size_img
        settings = Settings.make(vocab_size, seed=seed, temperature=temperature, top_k=top_k, top_p=top_p)
        name = "" if class_id is None else f"class {class_id}"
        prefix = class_prefix(self.config.stage2, None if class_id is None else [class_id], 1)
        codes, batch_size = self._draw(prefix, [name], num_candidates, settings, batch_size, progress)
        return _first(self._generation(codes, [name], settings, batch_size, progress))


def check_batch_size(batch_size: int | None) -> None:
    """Raises UsageError unless it is None or an integer of at least 1."""
    if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
        raise UsageError(f"batch_size must be an integer of at least 1, not {batch_size!r}")


def class_prefix(config: Stage2Config, labels: Any, rows: int) -> np.ndarray:
    """Prefix ids int32[rows, 1] of the image-only model: labels int[rows], None for an unconditional one.

    Raises UsageError for labels that the model does not know, or does not take.
    """
    classes = config.hparams.n_classes if config.use_cls_cond else None
    if (labels is None) != (classes is None):
        raise UsageError(
            "this model is unconditional and takes no class"
            if classes is None
            else f"this model is class-conditional: name a class in [0, {classes})"
        )
    if labels is None:
        return np.zeros((rows, 1), np.int32)
    labels = np.asarray(labels)
    if labels.ndim != 1:
        raise UsageError(f"labels must be [B], not {list(labels.shape)}")
    _check_ids(labels, classes or 1, "classes")
    return labels[:, None].astype(np.int32)


@partial(jax.jit, static_argnames="model")
def _forward(model: Transformer, params: dict[str, Any], prefix_ids: jax.Array, codes: jax.Array) -> Any:
    return model.apply({"params": params}, prefix_ids, codes)


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


def _use_compilation_cache() -> None:
    """Compiled programs are kept on disk, unless JAX was told where to keep them, or not to."""
    if jax.config.values["jax_compilation_cache_dir"] is None and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))


def _check_prompts(prompt: str | Sequence[str], allow_empty: bool) -> list[str]:
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise UsageError("no prompt was given")
    for text in prompts:
        if isinstance(text, str) and not text.strip() and not allow_empty:
            raise UsageError("the prompt is blank; pass allow_empty=True to draw without text")
    return prompts


def _check_ids(ids: np.ndarray, limit: int, what: str) -> None:
    if not np.issubdtype(ids.dtype, np.integer):
        raise UsageError(f"{what} must be integers, not {ids.dtype}")
    if ids.size and (ids.min() < 0 or ids.max() >= limit):
        raise UsageError(f"{what} must lie in [0, {limit}), not [{ids.min()}, {ids.max()}]")


def _first(generation: Generation) -> Generation:
    """Without the axis of prompts."""
    return Generation(
        generation.images[0], generation.codes[0], generation.seeds[0], generation.prompts, generation.meta
    )
