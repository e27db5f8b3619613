"""Model: what Dalle and ImageGPT share. Networks on the devices, images <-> codes, and requests -> Generations."""

import dataclasses
import os
import threading
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mindalle_jax.config.file import load_config
from mindalle_jax.config.schema import Config
from mindalle_jax.errors import CheckpointError, UsageError
from mindalle_jax.hub.resolve import find_model
from mindalle_jax.interop.torch_calls import explain_torch_call
from mindalle_jax.models.attention import default_backend
from mindalle_jax.models.transformer import Transformer
from mindalle_jax.ranking.ranker import ClipRanker
from mindalle_jax.runtime.devices import DType, choose_devices, device_memory, first_devices, pinned, prepare_process
from mindalle_jax.sampling.codec import ImageCodec
from mindalle_jax.sampling.events import RowRequest
from mindalle_jax.sampling.generate import Networks, generate_images, request_rows
from mindalle_jax.sampling.options import (
    Quantize,
    SamplingOptions,
    check_ids,
    check_quantize,
    default_batch_size,
)
from mindalle_jax.sampling.result import Generation
from mindalle_jax.storage.files import IN_PACKAGE, RANKER
from mindalle_jax.storage.model_folder import copy_model
from mindalle_jax.storage.params import describe_params, place_params, write_params
from mindalle_jax.storage.weights import DiskDType, count_parameters, fingerprint, load_params, read_manifest
from mindalle_jax.text.tokenizer import TextTokenizer

SMALL = 8 << 20
"""Parameters of the largest transformer that counts as small; see devices.CPU_DEVICES."""


class Model:
    """The base of Dalle and ImageGPT. Several threads may call one model; each process loads its own."""

    folder: Path | None = None
    """Absolute path that the model was loaded from; None for a model made in memory."""
    name: str = "in memory"
    """The name that it was loaded by, or the path of its folder."""
    revision: str | None = None
    """Branch, tag or commit of its repository, where one was named."""
    caption_dropout: float | None = None
    """Share of captions that training left blank; None where this is unknown."""
    class_names: tuple[str, ...] | None = None
    """Names of the classes, by number; None if they have no names."""
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
        """Makes a model from arrays in memory. `from_pretrained` loads one.

        Args:
            config: the configuration.
            params: `{"stage1": ..., "stage2": ...}`: the VQGAN and the transformer, nested dicts of NumPy or JAX
                arrays. The blocks of stage 2 are stacked, as in training, or one by one.
            dtype: as in `from_pretrained`.
            mesh: as in `from_pretrained`.
            quantize: as in `from_pretrained`.

        Raises:
            CheckpointError: some arrays do not fit the configuration; the message names them.
            ConfigError: the configuration contradicts itself.
            UsageError: a setting is out of range.
            DeviceMemoryError: the weights do not fit into the memory of the device.
        """
        self._check_kind(config, "", "make")
        check_quantize(quantize)
        prepare_process()
        config.check()
        self.config, self.quantize = config, quantize
        self._rankers: dict[str, ClipRanker] = {}
        self._loading = threading.Lock()
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

        A model in the original's PyTorch format is converted into the cache first, which takes about 5 GB of disk.

        Args:
            path_or_name: a model folder; "demo" (emoji) or "demo-scenes" (colored shapes), the small models in the
                package; "minDALL-E/1.3B", the published weights, which are downloaded; a folder in the original's
                PyTorch format; or "OWNER/NAME", a repository of the Hugging Face hub that holds either format.
            dtype: compute dtype, "float32" or "bfloat16"; None is float32 on CPU and bfloat16 elsewhere.
            mesh: a `jax.sharding.Mesh` with the one axis "data"; candidates are sharded over its devices. None is the
                first device. For a small model on CPU, None is one virtual device per core, up to 8, if the process
                has not used JAX before.
            quantize: "weights" holds the matrices of the transformer as int8, which is half the memory of bfloat16.
                "weights+cache" also holds the cache of keys and values as int8. Few images change.
            revision: branch, tag or commit of the repository; None is its main branch.
            local_files_only: if True, nothing is downloaded, and the model must be in the caches.

        Returns:
            The model, on its devices.

        Raises:
            CheckpointError: a weights or tokenizer file is missing, damaged, or does not fit.
            ConfigError: `config.yaml` is missing or wrong.
            DownloadError: a download failed, or has another checksum than the published one.
            OutputError: the cache cannot be written, or the disk is full.
            UsageError: an argument is out of range.
            DeviceMemoryError: the weights do not fit into the memory of the device.
        """
        check_quantize(quantize)
        prepare_process()
        # Absolute: the process may change its directory while the model is used.
        folder = find_model(path_or_name, revision=revision, local_files_only=local_files_only).absolute()
        config, manifest = load_config(folder / "config.yaml"), read_manifest(folder)
        tensors = manifest["tensors"]
        if "stage2" not in tensors:
            raise CheckpointError(f"{folder}: holds a VQGAN only, and no transformer that samples codes")
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
        model.name, model.revision = _display_name(path_or_name), revision
        model.caption_dropout = manifest.get("caption_dropout")
        model.class_names = tuple(manifest["classes"]) if "classes" in manifest else None
        return model

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name}, {self.dtype}, on {self.mesh.size} x {self.backend})"

    def __reduce__(self) -> Any:
        raise TypeError(
            f"{type(self).__name__} is not pickled or copied: its weights lie on the devices of this process. Give "
            f"another process the folder ({self.name}) and call from_pretrained there; threads can share one model"
        )

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(explain_torch_call(type(self).__name__, name))

    @classmethod
    def _check_kind(cls, config: Config, where: str, verb: str) -> None:
        if config.image_only != cls._image_only:
            kind, home = ("an image-only", "ImageGPT") if config.image_only else ("a text-to-image", "Dalle")
            raise CheckpointError(f"{where}{kind} model; {verb} it with {home}")

    def save_pretrained(
        self, folder: str | os.PathLike[str], *, overwrite: bool = False, dtype: DiskDType | None = None
    ) -> None:
        """Writes the model to a new folder.

        A model that was loaded from a folder is copied from there in full precision, with its ranker and its list of
        known words. For a model made in memory, its arrays are written. An error leaves nothing behind.

        Args:
            folder: where the model goes; it appears when it is complete.
            overwrite: if True, a model folder that is there is replaced.
            dtype: dtype of the weights on disk: "float32", "bfloat16" or "float16"; None keeps the one they have.

        Raises:
            OutputError: the folder exists, cannot be written, or the disk is full.
            UsageError: the model was made in memory and is held in a rounded or quantized form.
            CheckpointError: a file of the folder that the model came from is damaged.
            ConfigError: its `config.yaml` is wrong.
        """
        target = Path(os.path.expanduser(folder))
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
        write_params(
            target,
            self.config,
            params,
            tokenizer,
            dtype=dtype or "float32",
            overwrite=overwrite,
            caption_dropout=self.caption_dropout,
        )

    @property
    def image_size(self) -> int:
        """Height and width of the images, in pixels."""
        return self._codec.size

    @property
    def code_size(self) -> int:
        """Rows of codes in an image (h), which is also the number of codes in a row (w)."""
        return self._codec.side

    def decode_codes(self, codes: Any) -> np.ndarray:
        """Decodes codes to images.

        Args:
            codes: int[n, h, w] or int[n, h * w] in [0, V); [h, w] or [h * w] for one image.

        Returns:
            Images f32[n, H, W, 3] in [0, 1]; n is 1 for one image.

        Raises:
            UsageError: the shape or a code is out of range.
        """
        return np.concatenate(list(self._codec.decode_floats(self._codec.check_codes(codes))))

    def encode_images(self, images: Any) -> np.ndarray:
        """Encodes images to codes, in float32.

        Args:
            images: arrays [n, H, W, 3], or [H, W, 3] for one image, uint8 or float in [0, 1]; or one PIL image in
                RGB; or a list of these. All have the model's size.

        Returns:
            Codes int32[n, h, w] in [0, V).

        Raises:
            UsageError: a shape, a size or a pixel is out of range.
        """
        return self._codec.encode(images)

    def prompt_codes(self, image: Any, keep_rows: int) -> np.ndarray:
        """Encodes the first rows of an image, for the option `prompt_codes`.

        Args:
            image: RGB, of the model's size: a PIL image, or an array [H, W, 3], uint8 or float in [0, 1]; or its
                codes, int[h * w] or int[h, w].
            keep_rows: rows of codes to keep from the top, in [1, h - 1].

        Returns:
            Codes int32[keep_rows * w].

        Raises:
            UsageError: the image, the codes or keep_rows is out of range.
        """
        return self._codec.encode_rows(image, keep_rows)

    kept_codes = prompt_codes
    """The name of prompt_codes until version 0.1."""

    def default_batch_size(self, rows: int) -> int:
        """Says the batch size that `generate` takes where none is given.

        Args:
            rows: number of candidates of one prompt; with mixed batches, of all prompts.

        Returns:
            Rows per device and compiled call.
        """
        return default_batch_size(rows, self.backend, small=self._small)

    def _request(self, options: SamplingOptions, prefix_ids: np.ndarray) -> RowRequest:
        rows = options.num_candidates * (len(prefix_ids) if options.mixed_batches else 1)
        batch_size = options.batch_size or self.default_batch_size(rows)
        return request_rows(options, prefix_ids, self.config.stage2.vocab_size_img, batch_size)

    def _stream(
        self, request: RowRequest, options: SamplingOptions, every: int | None, single: bool, **notes: Any
    ) -> Iterator[Generation]:
        named = {"model": self.name, "revision": self.revision, "model_sha256": self._fingerprint}
        about = notes | {"quantize": self.quantize} | named
        return generate_images(self._networks, request, options, every, single, about)

    @cached_property
    def _fingerprint(self) -> str:
        """Fingerprint of the weights as they are held."""
        held: Any = {"stage1": self._codec.params, "stage2": self._stage2}
        with pinned():
            return fingerprint({stage: describe_params(held[stage], stage, self.config) for stage in held})

    @property
    def _networks(self) -> Networks:
        return Networks(self._transformer, self._stage2, self._codec, self.mesh)

    def _with_ranker(self, options: SamplingOptions) -> SamplingOptions:
        """Returns the options with the ranker itself instead of its name. A name is loaded once."""
        ranker = options.ranker
        own = None if self.folder is None else self.folder / RANKER
        if ranker == "auto":
            ranker = own if own is not None and own.is_dir() and not self._image_only else None
        if isinstance(ranker, (str, os.PathLike)) and ranker != "likelihood":
            with self._loading:
                key = os.path.abspath(ranker) if os.path.exists(ranker) else str(ranker)
                if key not in self._rankers:
                    self._rankers[key] = ClipRanker.from_pretrained(ranker)
                    if ranker == own:  # a name that loads it again
                        self._rankers[key].source = (
                            self.name if self.folder in IN_PACKAGE.values() else f"{self.name}/{RANKER}"
                        )
                ranker = self._rankers[key]
        return dataclasses.replace(options, ranker=ranker)

    def _check_sequence(self, codes: Any) -> np.ndarray:
        """int32[B, T] from codes [B, T], or whole images [B, h, w]."""
        codes, length, side = np.asarray(codes), self.config.stage2.hparams.ctx_len_img, self.code_size
        if codes.ndim == 3 and codes.shape[1:] == (side, side):
            codes = codes.reshape(len(codes), -1)
        if codes.ndim != 2 or not 1 <= codes.shape[1] <= length:
            raise UsageError(
                f"codes must be [B, T] with 1 <= T <= {length}, or [B, {side}, {side}], not {list(codes.shape)}"
            )
        check_ids(codes, self.config.stage2.vocab_size_img, "codes")
        return codes.astype(np.int32)

    def _forward(self, prefix_ids: np.ndarray, codes: np.ndarray) -> tuple[jax.Array, jax.Array | None]:
        if len(prefix_ids) != len(codes):
            raise UsageError(f"{len(codes)} rows of codes want as many texts or classes, not {len(prefix_ids)}")
        # On one device, so that the logits go with whatever else is computed there.
        _, params = first_devices(self.mesh, 1, self._stage2)
        with pinned(self.dtype):
            return _forward(self._transformer, params, prefix_ids, codes)


def last(generations: Iterator[Generation]) -> Generation:
    """The result of a stream: the last of what it yields."""
    *_, result = generations
    return result


def _is_small(config: Config) -> bool:
    return count_parameters(config, "stage2") <= SMALL


@partial(jax.jit, static_argnames="model")
def _forward(model: Transformer, params: dict[str, Any], prefix_ids: jax.Array, codes: jax.Array) -> Any:
    return model.apply({"params": params}, prefix_ids, codes)


def _display_name(path_or_name: str | os.PathLike[str]) -> str:
    """A name as it was given; a path absolute, and one below the home folder without the name of its owner."""
    if not os.path.exists(os.path.expanduser(path_or_name)):
        return str(path_or_name)
    path, home = os.path.abspath(os.path.expanduser(path_or_name)), os.path.expanduser("~")
    return f"~{path[len(home) :]}" if path.startswith(home + os.sep) else path
