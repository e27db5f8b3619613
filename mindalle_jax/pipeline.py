"""Dalle and ImageGPT: text, or a class, -> codes -> pixels -> ranked images. Images are channels last."""

import os
import warnings
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, Self, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mindalle_jax.config.file import load_config
from mindalle_jax.config.schema import Config
from mindalle_jax.errors import CheckpointError, UsageError
from mindalle_jax.hub.resolve import find_model
from mindalle_jax.models.attention import default_backend
from mindalle_jax.models.transformer import Transformer
from mindalle_jax.runtime.devices import DType, choose_devices, device_memory, first_devices, pinned, prepare_process
from mindalle_jax.sampling.codec import ImageCodec
from mindalle_jax.sampling.events import RowRequest
from mindalle_jax.sampling.generate import Networks, generate_codes, generate_images, request_rows
from mindalle_jax.sampling.options import (
    DEFAULT_TOP_K,
    Quantize,
    SamplingKeywords,
    SamplingOptions,
    as_prompts,
    check_every,
    check_ids,
    check_quantize,
    class_prefix,
    default_batch_size,
    takes_options,
)
from mindalle_jax.sampling.result import Generation
from mindalle_jax.storage.initialize import cached_transfer
from mindalle_jax.storage.model_folder import copy_model
from mindalle_jax.storage.params import describe_params, place_params, write_params
from mindalle_jax.storage.weights import DiskDType, count_parameters, fingerprint, load_params, read_manifest
from mindalle_jax.text.tokenizer import TextTokenizer, TokenizedPrompts

SMALL = 8 << 20
"""Parameters of the largest transformer that counts as small; see devices.CPU_DEVICES."""


class Model:
    """The base of Dalle and ImageGPT: networks on the devices, images <-> codes, and requests -> Generations."""

    folder: Path | None = None
    """Where the model was loaded from; None for one made in memory."""
    _image_only: bool

    def __init__(
        self,
        config: Config,
        params: dict[str, Any],
        *,
        dtype: DType | None = None,
        mesh: Mesh | None = None,
        quantize: Quantize | None = None,
    ):
        """A model of arrays in memory; from_pretrained loads one.

        params: {"stage1": the VQGAN, "stage2": the transformer}, nested, NumPy or JAX arrays; stage 2 with its blocks
        stacked, as in training, or one by one. dtype, mesh, quantize: as from_pretrained.
        Raises CheckpointError naming the arrays that do not fit config, UsageError, ConfigError, DeviceMemoryError.
        """
        self._check_kind(config, "", "make")
        check_quantize(quantize)
        prepare_process()
        config.check()
        self.config, self.quantize = config, quantize
        self._small = _is_small(config)
        self.mesh, self.dtype = choose_devices(mesh, dtype, small=self._small)
        self.backend = self.mesh.devices.flat[0].platform
        compute = jnp.dtype(self.dtype)
        self._transformer = Transformer(
            config.stage2,
            stacked=False,
            dtype=compute,
            attention=default_backend(self.backend),
            int8_cache=quantize == "weights+cache",
        )
        kind = self.mesh.devices.flat[0].device_kind
        with pinned(), device_memory(f"the weights do not fit into the memory of {kind} as {self.dtype}"):
            stage1 = place_params(params["stage1"], "stage1", config, np.dtype("float32"), self.mesh)
            int8 = quantize is not None
            self._stage2 = place_params(params["stage2"], "stage2", config, compute, self.mesh, int8=int8)
            self._codec = ImageCodec(config.stage1, stage1, dtype=self.dtype, mesh=self.mesh)

    @classmethod
    def from_pretrained(
        cls,
        path_or_name: str | os.PathLike[str],
        *,
        dtype: DType | None = None,
        mesh: Mesh | None = None,
        quantize: Quantize | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Loads a model.

        path_or_name: "demo", the small model in the package, which draws coloured shapes; a converted folder; a folder
        in the original's PyTorch format, or "minDALL-E/1.3B" (downloaded), which are converted into the cache first,
        about 5 GB each; or "OWNER/NAME", a repository of the Hugging Face hub that holds either format.
        dtype: compute dtype; None is float32 on CPU and bfloat16 elsewhere.
        mesh: a jax Mesh with the one axis "data": rows are sharded over its devices. None: the first device; for a
        small network on CPU one per core, up to 8, which JAX finds there if it has not been used before.
        quantize: "weights" holds the transformer's matrices as int8, half the memory of bfloat16; "weights+cache" also
        the keys and values of the images being sampled. Images change, and are hardly less right (docs/log.md).
        revision: branch, tag or commit of the repository; None is its main branch.
        local_files_only: nothing is downloaded; what the caches hold has to do.
        Raises CheckpointError, ConfigError, DownloadError, OutputError or UsageError with the file and the reason, and
        DeviceMemoryError.
        """
        check_quantize(quantize)
        prepare_process()
        folder = find_model(path_or_name, revision=revision, local_files_only=local_files_only)
        config, tensors = load_config(folder / "config.yaml"), read_manifest(folder)["tensors"]
        if "stage2" not in tensors:
            raise CheckpointError(f"{folder}: holds a VQGAN only, nothing that draws codes")
        cls._check_kind(config, f"{folder}: ", "load")
        text, h = [], config.stage2.hparams
        if not config.image_only:
            text = [TextTokenizer(folder / "tokenizer", h.ctx_len_txt, config.stage2.vocab_size_txt)]
        mesh, dtype = choose_devices(mesh, dtype, small=_is_small(config))
        kind, int8 = mesh.devices.flat[0].device_kind, quantize is not None
        # Straight into the layout of sampling, layer by layer: a model needs its own size in memory and no more.
        with pinned(), device_memory(f"{folder}: the weights do not fit into the memory of {kind} as {dtype}"):
            params = {
                "stage1": load_params(folder, "stage1", config, np.dtype("float32"), mesh),
                "stage2": load_params(folder, "stage2", config, jnp.dtype(dtype), mesh, int8=int8),
            }
        model = cls(config, params, *text, dtype=dtype, mesh=mesh, quantize=quantize)
        model.folder, model._fingerprint = folder, fingerprint(tensors)
        return model

    @classmethod
    def _check_kind(cls, config: Config, where: str, verb: str) -> None:
        if config.image_only != cls._image_only:
            kind, home = ("an image-only", "ImageGPT") if config.image_only else ("a text-to-image", "Dalle")
            raise CheckpointError(f"{where}{kind} model; {verb} it with {home}")

    def save_pretrained(
        self, folder: str | os.PathLike[str], *, overwrite: bool = False, dtype: DiskDType | None = None
    ) -> None:
        """Writes the model to a new folder.

        A model that was loaded from a folder is copied from there: in full precision, whatever is used. Of one made in
        memory the arrays are written, which must be neither rounded nor quantized.
        overwrite: replace a model folder. dtype: of the weights on disk; None keeps it.
        Raises CheckpointError, ConfigError, OutputError or UsageError, and leaves nothing half-written behind.
        """
        target = Path(folder).expanduser()
        if self.folder is not None:
            copy_model(self.folder, target, dtype=dtype, overwrite=overwrite)
            return
        if self.dtype != "float32" or self.quantize:
            held = f"int8 {self.quantize}" if self.quantize else self.dtype
            raise UsageError(
                f"weights held as {held} are rounded and are not saved; make the model with dtype='float32'"
            )
        params: Any = {"stage1": self._codec.params, "stage2": self._stage2}
        tokenizer = getattr(self, "tokenizer", None)
        write_params(target, self.config, params, tokenizer, dtype=dtype or "float32", overwrite=overwrite)

    @property
    def image_size(self) -> int:
        """Height and width of the images, in pixels."""
        return self._codec.size

    @property
    def code_size(self) -> int:
        """h and w: rows of codes in an image, and codes in a row."""
        return self._codec.side

    def decode_codes(self, codes: Any) -> np.ndarray:
        """Images f32[n, H, W, 3] in [0, 1] of codes int[n, h, w] or [n, h * w] in [0, V).

        Raises UsageError for codes of another shape or out of range.
        """
        return np.concatenate(list(self._codec.decode_floats(self._codec.check_codes(codes))))

    def encode_images(self, images: Any) -> np.ndarray:
        """Codes int32[n, h, w] of images uint8, or float in [0, 1], [n, H, W, 3] of the model's size.

        Computed in float32. Raises UsageError for images of another shape, size or range.
        """
        return self._codec.encode(images)

    def prompt_codes(self, image: Any, keep_rows: int) -> np.ndarray:
        """Codes int32[m] of the first rows of an image, for the option prompt_codes.

        image: RGB, of the model's size: a PIL image, or an array uint8 or float in [0, 1], [H, W, 3]; or its codes,
        int[h * w] or [h, w]. keep_rows: in [1, h - 1]. Raises UsageError.
        """
        return self._codec.encode_rows(image, keep_rows)

    kept_codes = prompt_codes
    """The name of prompt_codes until version 0.1."""

    def default_batch_size(self, rows: int) -> int:
        """The batch_size of generate where none is given. rows: candidates of a prompt, or of all prompts if mixed."""
        return default_batch_size(rows, self.backend, small=self._small)

    def _request(self, options: SamplingOptions, prefix_ids: np.ndarray) -> RowRequest:
        rows = options.num_candidates * (len(prefix_ids) if options.mixed_batches else 1)
        batch_size = options.batch_size or self.default_batch_size(rows)
        return request_rows(options, prefix_ids, self.config.stage2.vocab_size_img, batch_size)

    def _stream(
        self, request: RowRequest, options: SamplingOptions, every: int | None, single: bool, **notes: Any
    ) -> Iterator[Generation]:
        model = "in memory" if self.folder is None else str(self.folder)
        about = notes | {"quantize": self.quantize, "model": model, "model_sha256": self._fingerprint}
        return generate_images(self._networks, request, options, every, single, about)

    @cached_property
    def _fingerprint(self) -> str:
        """The fingerprint of the weights as they are held."""
        held: Any = {"stage1": self._codec.params, "stage2": self._stage2}
        with pinned():
            return fingerprint({stage: describe_params(held[stage], stage, self.config) for stage in held})

    @property
    def _networks(self) -> Networks:
        return Networks(self._transformer, self._stage2, self._codec, self.mesh)

    def _check_sequence(self, codes: Any) -> np.ndarray:
        codes, length = np.asarray(codes), self.config.stage2.hparams.ctx_len_img
        if codes.ndim != 2 or not 1 <= codes.shape[1] <= length:
            raise UsageError(f"codes must be [B, T] with 1 <= T <= {length}, not {list(codes.shape)}")
        check_ids(codes, self.config.stage2.vocab_size_img, "codes")
        return codes.astype(np.int32)

    def _forward(self, prefix_ids: np.ndarray, codes: np.ndarray) -> tuple[jax.Array, jax.Array | None]:
        if len(prefix_ids) != len(codes):
            raise UsageError(f"{len(prefix_ids)} prefixes do not go with {len(codes)} rows of codes")
        # On one device, so that the logits go with whatever else is computed there.
        _, params = first_devices(self.mesh, 1, self._stage2)
        with pinned(self.dtype):
            return _forward(self._transformer, params, prefix_ids, codes)


class Dalle(Model):
    """Text to image."""

    _image_only = False

    def __init__(self, config: Config, params: dict[str, Any], tokenizer: TextTokenizer, **settings: Any):
        """As Model, with the tokenizer that turns prompts into the ids of config."""
        super().__init__(config, params, **settings)
        self.tokenizer = tokenizer

    def tokenize(self, prompts: str | Sequence[str]) -> np.ndarray:
        """Text ids int32[P, N] of P prompts (one for a bare string); "" gives padding only.

        Warns (UserWarning) of prompts that are cut or mostly unknown. Raises UsageError for what is not text, or over
        2,000 characters.
        """
        return self._tokenize(as_prompts(prompts)).ids

    def _tokenize(self, prompts: Sequence[str]) -> TokenizedPrompts:
        tokenized = self.tokenizer(list(prompts))
        for line in tokenized.warnings(list(prompts)):
            warnings.warn(line, stacklevel=3)
        return tokenized

    def logits(self, text_ids: Any, codes: Any) -> tuple[jax.Array, jax.Array]:
        """The forward pass: text_ids int[B, N], codes int[B, T] -> image f32[B, T, V] and text f32[B, N-1, Vt] logits.

        Image logits at t are of code t given the text and codes 0..t-1; text logits at i are of id i + 1.
        """
        text_ids, length = np.asarray(text_ids), self.config.stage2.hparams.ctx_len_txt
        if text_ids.ndim != 2 or text_ids.shape[1] != length:
            raise UsageError(f"text_ids must be [B, {length}], not {list(text_ids.shape)}")
        check_ids(text_ids, self.config.stage2.vocab_size_txt, "text_ids")
        image_logits, text_logits = self._forward(text_ids.astype(np.int32), self._check_sequence(codes))
        assert text_logits is not None
        return image_logits, text_logits

    @takes_options()
    def generate_codes(self, prompt: str | Sequence[str], **options: Unpack[SamplingKeywords]) -> np.ndarray:
        """Codes int32[n, h * w] of a prompt, [P, n, h * w] of a list, not decoded; errors as generate."""
        checked, request, _ = self._text_request(prompt, options)
        codes = generate_codes(self._networks, request, checked)
        shape = (checked.num_candidates,) if isinstance(prompt, str) else (-1, checked.num_candidates)
        return codes.reshape(*shape, codes.shape[1])

    @takes_options()
    def generate(self, prompt: str | Sequence[str], **options: Unpack[SamplingKeywords]) -> Generation:
        """Images of a prompt, or of each of a list.

        Raises UsageError for values out of range, NonFiniteError for broken weights, DeviceMemoryError.
        """
        return _last(self.stream(prompt, every=None, **options))

    __call__ = generate

    @takes_options()
    def stream(
        self, prompt: str | Sequence[str], *, every: int | None = 32, **options: Unpack[SamplingKeywords]
    ) -> Iterator[Generation]:
        """Yields unfinished Generations while it samples, and in the end what generate returns, bit for bit.

        every: codes between two of them, a multiple of a row; None yields the end alone. Codes not sampled yet are -1,
        and images show them as the mean of the codebook. Unfinished ones have no scores.
        Errors as generate; options are checked before anything is sampled.
        """
        check_every(every, self.config.stage1)
        checked, request, num_tokens = self._text_request(prompt, options)
        single = isinstance(prompt, str)
        return self._stream(request, checked, every, single, num_tokens=num_tokens)  # of which the first N count

    @takes_options()
    def complete(
        self, prompt: str | Sequence[str], image: Any, *, keep_rows: int, **options: Unpack[SamplingKeywords]
    ) -> Generation:
        """Samples the rest of an image of which the top is given.

        image: RGB, of the model's size: a PIL image, or an array uint8 or float in [0, 1], [H, W, 3].
        keep_rows: rows of codes to keep from the top, in [1, h - 1]; a row is H / h pixels high. The kept part shows as
        the VQGAN reconstructs it. Codes are sampled row by row from the top, so what lies below the kept rows cannot be
        seen: neither a hole in the middle nor the bottom of an image can be kept.
        Errors as generate.
        """
        return self.generate(prompt, **options | {"prompt_codes": self.prompt_codes(image, keep_rows)})

    @takes_options()
    def variations(
        self, prompt: str | Sequence[str], codes: Any, *, keep_rows: int, **options: Unpack[SamplingKeywords]
    ) -> Generation:
        """Samples other lower parts for an image sampled before: codes int[h * w] or [h, w], as in Generation.codes.

        Give another seed, else its own candidate comes out again. keep_rows and errors: as complete.
        """
        return self.generate(prompt, **options | {"prompt_codes": self.prompt_codes(codes, keep_rows)})

    def sampling(
        self,
        prompt: str,
        top_k: int | None = DEFAULT_TOP_K,
        top_p: float | None = None,
        softmax_temperature: float = 1.0,
        num_candidates: int = 96,
        seed: int | None = 0,
    ) -> np.ndarray:
        """The original's call: images f32[n, H, W, 3] in [0, 1] (the original's are [n, 3, H, W])."""
        codes = self.generate_codes(
            prompt, num_candidates=num_candidates, top_k=top_k, top_p=top_p, temperature=softmax_temperature, seed=seed
        )
        return self.decode_codes(codes)

    def _text_request(
        self, prompt: str | Sequence[str], options: SamplingKeywords
    ) -> tuple[SamplingOptions, RowRequest, list[int]]:
        """The options, checked; the rows; and how many tokens each prompt has."""
        checked = SamplingOptions.of(prompts=as_prompts(prompt), **options).check(self.config, self.tokenizer)
        tokenized = self._tokenize(checked.prompts)
        prefix_ids = tokenized.ids
        if checked.guided:
            blank = np.broadcast_to(self.tokenizer([""]).ids, prefix_ids.shape)
            prefix_ids = np.stack([prefix_ids, blank], axis=1)
        return checked, self._request(checked, prefix_ids), tokenized.num_tokens


class ImageGPT(Model):
    """Images without text: unconditional, or by class."""

    _image_only = True

    @classmethod
    def from_upstream(
        cls,
        dalle_path: str | os.PathLike[str],
        config: Config,
        *,
        head: Literal["fresh", "head_img"] = "fresh",
        seed: int = 0,
        dtype: DType | None = None,
        mesh: Mesh | None = None,
    ) -> Self:
        """An image-only model of `config` that begins from a text-to-image model, before any training.

        Tables and blocks are taken over; start vectors, and the head unless head is "head_img", are drawn anew by the
        seed. The model lies in the cache. Raises ConfigError where the two do not fit, and as from_pretrained.
        """
        prepare_process()
        target = cached_transfer(find_model(dalle_path), config, head=head, seed=seed)
        return cls.from_pretrained(target, dtype=dtype, mesh=mesh)

    @property
    def num_classes(self) -> int | None:
        """Number of classes, None for an unconditional model."""
        return self.config.stage2.hparams.n_classes if self.config.stage2.use_cls_cond else None

    def logits(self, codes: Any, labels: Any = None) -> jax.Array:
        """The forward pass: codes int[B, T], labels int[B] (class-conditional models only) -> f32[B, T, V]."""
        codes = self._check_sequence(codes)
        image_logits, _ = self._forward(class_prefix(self.config.stage2, labels, len(codes)), codes)
        return image_logits

    @takes_options(num_candidates=16)
    def generate(self, class_id: int | None = None, **options: Unpack[SamplingKeywords]) -> Generation:
        """Images of a class in [0, num_classes), None for an unconditional model.

        Errors as Dalle.generate; without a text there is nothing to guide by, and "likelihood" alone ranks.
        """
        return _last(self.stream(class_id, every=None, **options))

    __call__ = generate

    @takes_options(num_candidates=16)
    def stream(
        self, class_id: int | None = None, *, every: int | None = 32, **options: Unpack[SamplingKeywords]
    ) -> Iterator[Generation]:
        """As Dalle.stream; arguments as generate."""
        check_every(every, self.config.stage1)
        name = "" if class_id is None else f"class {class_id}"
        named: dict[str, Any] = {"num_candidates": 16} | options | {"prompts": (name,), "class_id": class_id}
        checked = SamplingOptions.of(**named).check(self.config)
        prefix_ids = class_prefix(self.config.stage2, None if class_id is None else [class_id], 1)
        return self._stream(self._request(checked, prefix_ids), checked, every, single=True)

    @takes_options(num_candidates=16)
    def complete(
        self, image: Any, *, keep_rows: int, class_id: int | None = None, **options: Unpack[SamplingKeywords]
    ) -> Generation:
        """Samples the rest of an image of which the top is given; image and keep_rows as Dalle.complete."""
        return self.generate(class_id, **options | {"prompt_codes": self.prompt_codes(image, keep_rows)})


def _is_small(config: Config) -> bool:
    return count_parameters(config, "stage2") <= SMALL


@partial(jax.jit, static_argnames="model")
def _forward(model: Transformer, params: dict[str, Any], prefix_ids: jax.Array, codes: jax.Array) -> Any:
    return model.apply({"params": params}, prefix_ids, codes)


def _last(generations: Iterator[Generation]) -> Generation:
    *_, last = generations
    return last
