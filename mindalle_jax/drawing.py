"""What Dalle and ImageGPT share: weights on the devices, and the way from prefixes to ranked pictures.

Weights load straight into the layout of sampling, layer by layer, so a model needs its own size in memory and no more.
"""

import dataclasses
import hashlib
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, Self, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image
from tqdm import tqdm

import mindalle_jax
from mindalle_jax.config.file import load_config
from mindalle_jax.config.schema import Stage1Config
from mindalle_jax.errors import CheckpointError, UsageError
from mindalle_jax.hub.resolve import find_model
from mindalle_jax.models.attention import default_backend
from mindalle_jax.models.transformer import Transformer
from mindalle_jax.runtime.devices import (
    DType,
    choose_devices,
    device_memory,
    first_devices,
    matmul_precision,
    prepare_process,
)
from mindalle_jax.sampling.codec import PictureCodec, check_ids, check_keep_rows, check_picture
from mindalle_jax.sampling.decode import (
    Settings,
    check_num_candidates,
    default_batch_size,
    sample_codes,
)
from mindalle_jax.sampling.result import Generation, Progress
from mindalle_jax.storage.model_folder import copy_model
from mindalle_jax.storage.weights import MANIFEST, DiskDType, count_parameters, load_params, read_manifest

Callback = Callable[[Progress], bool | None]
"""Called after each row of codes; drawing stops if it returns True."""


class Scorer(Protocol):
    """What can rank: ClipRanker, or anything of your own."""

    def scores(self, prompt: str, images: np.ndarray) -> np.ndarray:
        """f32[n], higher is better, of pictures uint8[n, H, W, 3]."""
        ...


Ranker = Literal["likelihood"] | Scorer | None
Quantize = Literal["weights", "weights+cache"]

SMALL = 8 << 20
"""Parameters of the largest transformer that counts as small; what that is for: devices.CPU_DEVICES."""


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything that one call asks for, checked."""

    prompts: list[str]
    prefixes: np.ndarray
    """int32[P, p]; [P, 2, p] with guidance"""
    single: bool
    """One prompt and no list: results without the axis of prompts."""
    num_candidates: int
    settings: Settings
    batch_size: int
    jacobi: bool
    kept_codes: np.ndarray
    """int32[m]: what every picture begins with; often empty"""
    every: int | None
    ranker: Ranker
    callback: Callback | None
    progress: bool
    notes: dict[str, Any]
    """for meta"""


class Model:
    """What Dalle and ImageGPT share: weights, pictures <-> codes, and drawing codes after a prefix."""

    def __init__(self, folder: Path, dtype: DType | None, mesh: Mesh | None, quantize: Quantize | None):
        check_quantize(quantize)
        self.folder, self.quantize = folder, quantize
        self.config = load_config(folder / "config.yaml")
        if "stage2" not in read_manifest(folder)["tensors"]:
            raise CheckpointError(f"{folder}: holds a VQGAN only, nothing that draws codes")
        self._small = count_parameters(self.config, "stage2") <= SMALL
        self.mesh, self.dtype = choose_devices(mesh, dtype, small=self._small)
        self.backend = self.mesh.devices.flat[0].platform
        compute = jnp.dtype(self.dtype)
        int8_cache = quantize == "weights+cache"
        self._transformer = Transformer(
            self.config.stage2,
            stacked=False,
            dtype=compute,
            attention=default_backend(self.backend),
            int8_cache=int8_cache,
        )
        self._digest = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
        with device_memory(f"{folder}: the weights do not fit into the memory of {self._device_name} as {self.dtype}"):
            stage1 = load_params(folder, "stage1", self.config, jnp.dtype("float32"), self.mesh)
            self._stage2 = load_params(folder, "stage2", self.config, compute, self.mesh, int8=quantize is not None)
        self._codec = PictureCodec(self.config.stage1, stage1, compute, self.mesh)

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
        in the original's PyTorch format (converted into the cache first); "minDALL-E/1.3B" (downloaded and converted
        into the cache, about 5 GB each); or "OWNER/NAME", a repository of the Hugging Face hub that holds either format
        (downloaded into the cache of the hub).
        dtype: compute dtype; None is float32 on CPU and bfloat16 elsewhere.
        mesh: a jax Mesh with the one axis "data": candidates are spread over its devices. None: the first device; for
        a small network on CPU one a core, up to 8, which JAX finds there if it has not been used before.
        quantize: "weights" holds the transformer's matrices as int8 with a scale for each output, half the memory of
        bfloat16; "weights+cache" the keys and values of the pictures being drawn too. Pictures are others, hardly less
        right: docs/log.md. None: neither.
        revision: branch, tag or commit of the repository; None is its main branch.
        local_files_only: nothing is downloaded; what the caches hold has to do.

        Raises CheckpointError, ConfigError, DownloadError, OutputError or UsageError with the file and the reason, and
        DeviceMemoryError.
        """
        prepare_process()
        folder = find_model(path_or_name, revision=revision, local_files_only=local_files_only)
        return cls(folder, dtype, mesh, quantize)

    def save_pretrained(
        self, folder: str | os.PathLike[str], *, overwrite: bool = False, dtype: DiskDType | None = None
    ) -> None:
        """Writes the model to a new folder, from the one that it was loaded from: in full precision, whatever is used.

        overwrite: replace a model folder. dtype: of the weights on disk; None keeps it.
        Raises CheckpointError, ConfigError, OutputError or UsageError, and leaves nothing half-written behind.
        """
        copy_model(self.folder, Path(folder), dtype=dtype, overwrite=overwrite)

    @property
    def image_size(self) -> int:
        """Height and width of the pictures, in pixels."""
        return self._codec.size

    @property
    def code_size(self) -> int:
        """h and w: rows of codes in a picture, and codes in a row."""
        return self._codec.side

    def decode_codes(self, codes: Any) -> np.ndarray:
        """Pictures f32[n, H, W, 3] in [0, 1] of codes int[n, h, w] or [n, h * w] in [0, V).

        Raises UsageError for codes of another shape or out of range.
        """
        return np.concatenate(list(self._codec.decode_floats(self._codec.check_codes(codes))))

    def encode_images(self, images: Any) -> np.ndarray:
        """Codes int32[n, h, w] of pictures uint8, or float in [0, 1], [n, H, W, 3] of the model's size.

        Computed in float32. Raises UsageError for pictures of another shape, size or range.
        """
        return self._codec.encode(images)

    def kept_codes(self, picture: Any, keep_rows: int) -> np.ndarray:
        """Codes int32[m] of the first rows of a picture, for the option kept_codes.

        picture: RGB, of the model's size: a PIL image, or an array uint8 or float in [0, 1], [H, W, 3]; or its codes,
        int[h * w] or [h, w]. keep_rows: in [1, h - 1]. Raises UsageError.
        """
        check_keep_rows(keep_rows, self.config.stage1)
        if np.ndim(picture) == 3 or isinstance(picture, Image.Image):
            codes = self._codec.encode(check_picture(picture, self.image_size)[None])
        else:
            codes = self._codec.check_codes(np.asarray(picture)[None])
        return codes[0, :keep_rows].reshape(-1)

    def default_batch_size(self, num_candidates: int) -> int:
        """The batch_size of generate where none is given."""
        return default_batch_size(num_candidates, self.backend, small=self._small)

    def _job(
        self,
        prompts: list[str],
        prefixes: np.ndarray,
        settings: Settings,
        options: dict[str, Any],
        every: int | None,
        *,
        single: bool,
        notes: dict[str, Any],
    ) -> Job:
        """Checks what was asked for. Raises UsageError."""
        num_candidates, ranker = check_num_candidates(options["num_candidates"]), options["ranker"]
        check_batch_size(options["batch_size"])
        if not isinstance(options["jacobi"], bool):
            raise UsageError(f"jacobi must be True or False, not {options['jacobi']!r}")
        side = self._codec.side
        check_every(every, self.config.stage1)
        if ranker is not None and ranker != "likelihood" and not hasattr(ranker, "scores"):
            raise UsageError(f"ranker must be None, 'likelihood' or a ClipRanker, not {ranker!r}")
        kept = np.zeros(0, np.int32) if options["kept_codes"] is None else np.asarray(options["kept_codes"])
        if kept.ndim != 1 or len(kept) % side or len(kept) >= side * side:
            raise UsageError(
                f"kept_codes must be the codes of whole rows, [m] with m a multiple of {side} below {side * side}, "
                f"not {list(kept.shape)}"
            )
        check_ids(kept, self.config.stage2.vocab_size_img, "kept_codes")
        return Job(
            prompts=prompts,
            prefixes=prefixes,
            single=single,
            num_candidates=num_candidates,
            settings=settings,
            batch_size=options["batch_size"] or self.default_batch_size(num_candidates),
            jacobi=options["jacobi"],
            kept_codes=kept.astype(np.int32),
            every=every,
            ranker=ranker,
            callback=options["callback"],
            progress=options["progress"],
            notes=notes,
        )

    def _settings(self, options: dict[str, Any]) -> Settings:
        names = ("seed", "temperature", "top_k", "top_p", "guidance_scale")
        return Settings.make(self.config.stage2.vocab_size_img, **{name: options[name] for name in names})

    def _run(self, job: Job) -> Iterator[Generation]:
        """Draws, decodes and ranks. Yields what there is after every `every` codes, and in the end the result."""
        codes, log_likelihood = self._blank(job)
        previews: Any = self._paint(codes, job, progress=False) if job.every else None
        complete, begun = [], []  # rows of all prompts together: all their codes are there; (rows, their pictures)
        for done in self._draw(job, codes, log_likelihood):
            if self._codec.decode_ahead and done.codes == codes.shape[-1]:
                complete += [done.prompt * job.num_candidates + i for i in done.candidates]
                begun += self._begin(codes, complete)
            if job.every and done.codes % job.every == 0 and codes.min() < 0:
                at = done.prompt, slice(done.candidates.start, done.candidates.stop)
                previews[at] = self._paint(codes[at], job, progress=False)
                yield self._generation(job, previews.copy(), codes.copy(), None)
        images = self._paint(codes, job, job.progress, begun)
        yield self._generation(job, images, codes, self._scores(job, images, codes, log_likelihood))

    def _blank(self, job: Job) -> tuple[np.ndarray, np.ndarray]:
        """Codes int32[P, n, h * w], -1 where they are to be drawn, and log-likelihoods f32[P, n]."""
        shape = len(job.prompts), job.num_candidates
        codes = np.full((*shape, self._codec.side**2), -1, np.int32)
        codes[..., : len(job.kept_codes)] = job.kept_codes
        return codes, np.zeros(shape, np.float32)

    def _draw(self, job: Job, codes: np.ndarray, log_likelihood: np.ndarray) -> Iterator[Progress]:
        """Fills both arrays, row of codes by row, and says how far it is; ends early if the callback says so."""
        length, kept = codes.shape[-1], len(job.kept_codes)
        for p, (prompt, prefix_ids) in enumerate(zip(job.prompts, job.prefixes, strict=True)):
            total = job.num_candidates * (length - kept)
            with (
                tqdm(total=total, desc=prompt[:30] or "codes", unit="code", disable=not job.progress) as bar,
                device_memory(_too_many(job.batch_size, self._device_name)),
            ):
                for drawn in sample_codes(
                    self._transformer,
                    self._stage2,
                    prefix_ids,
                    job.num_candidates,
                    job.settings,
                    batch_size=job.batch_size,
                    jacobi=job.jacobi,
                    mesh=self.mesh,
                    kept=job.kept_codes,
                ):
                    candidates = range(drawn.first, drawn.first + len(drawn.codes))
                    rows, end = slice(candidates.start, candidates.stop), drawn.start + drawn.codes.shape[1]
                    codes[p, rows, drawn.start : end] = drawn.codes
                    log_likelihood[p, rows] = drawn.log_likelihood
                    bar.update(drawn.codes.size)
                    done = Progress(p, candidates, end, length)
                    if job.callback is not None and job.callback(done) is True:
                        return
                    yield done

    def _begin(self, codes: np.ndarray, complete: list[int]) -> Iterator[tuple[list[int], jax.Array]]:
        """Starts to decode as many complete pictures as are decoded at once, and takes them from the list."""
        flat, count = codes.reshape(-1, self._codec.side, self._codec.side), self._codec.decode_rows
        while len(complete) >= count:
            rows, complete[:count] = complete[:count], []
            with device_memory(_no_room(self._device_name)):
                yield rows, self._codec.begin(flat[rows])

    def _paint(
        self, codes: np.ndarray, job: Job, progress: bool, begun: Sequence[tuple[list[int], jax.Array]] = ()
    ) -> np.ndarray:
        """Pictures uint8[..., H, W, 3] of codes [..., h * w]; those not drawn at all look alike, and are decoded once.

        begun: what is being decoded already, see _begin.
        """
        flat = codes.reshape(-1, self._codec.side, self._codec.side)
        drawn = (codes[..., len(job.kept_codes) :] >= 0).any(axis=-1).reshape(-1)
        images = np.empty((len(flat), self.image_size, self.image_size, 3), np.uint8)
        todo = np.setdiff1d(np.flatnonzero(drawn), [row for rows, _ in begun for row in rows])
        with (
            tqdm(total=int(drawn.sum()), desc="pictures", unit="picture", disable=not progress) as bar,
            device_memory(_no_room(self._device_name)),
        ):
            for rows, pictures in begun:
                images[rows] = pictures
                bar.update(len(rows))
            if not drawn.all():
                images[~drawn] = next(self._codec.decode(flat[~drawn][:1]))
            for chunk in self._codec.decode(flat[todo]):
                images[todo[: len(chunk)]], todo = chunk, todo[len(chunk) :]
                bar.update(len(chunk))
        return images.reshape(*codes.shape[:-1], *images.shape[1:])

    def _scores(self, job: Job, images: np.ndarray, codes: np.ndarray, log_likelihood: np.ndarray) -> np.ndarray | None:
        """f32[P, n], NaN for pictures that are not complete."""
        if job.ranker is None:
            return None
        scores = np.full(codes.shape[:2], np.nan, np.float32)
        for p, complete in enumerate(codes.min(axis=-1) >= 0):
            if job.ranker == "likelihood":
                scores[p, complete] = log_likelihood[p, complete]
            elif complete.any():
                scores[p, complete] = job.ranker.scores(job.prompts[p], images[p, complete])
        return scores

    def _generation(self, job: Job, images: np.ndarray, codes: np.ndarray, scores: np.ndarray | None) -> Generation:
        """With what is needed to draw it again."""
        settings, device = job.settings, self.mesh.devices.flat[0]
        meta = {
            "seed": settings.seed,
            "num_candidates": job.num_candidates,
            "temperature": settings.temperature,
            "top_k": settings.top_k,
            "top_p": settings.top_p,
            "guidance_scale": settings.guidance_scale,
            "keep_rows": len(job.kept_codes) // self._codec.side,
            "ranker": job.ranker if isinstance(job.ranker, str | None) else str(job.ranker),
            **job.notes,
            "dtype": self.dtype,
            "quantize": self.quantize,
            "batch_size": job.batch_size,
            "jacobi": job.jacobi,
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
        seeds = np.full(codes.shape[:2], settings.seed, np.uint32)
        if job.single:
            images, codes, seeds = images[0], codes[0], seeds[0]
            scores = None if scores is None else scores[0]
        return Generation(images, codes, scores, seeds, job.prompts, meta)

    @property
    def _device_name(self) -> str:
        return self.mesh.devices.flat[0].device_kind

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
        with matmul_precision(self.dtype):
            return _forward(self._transformer, params, prefix_ids, codes)


def check_every(every: int | None, config: Stage1Config) -> None:
    """Raises UsageError unless it is None or a number of codes that makes whole rows."""
    side = config.code_size
    if every is not None and (type(every) is not int or every < 1 or every % side):
        raise UsageError(
            f"every must be a multiple of {side} codes, which is one row of the picture, or None; not {every!r}"
        )


def check_quantize(quantize: Quantize | None) -> None:
    """Raises UsageError unless it is one of these words, or None."""
    if quantize not in (None, *get_args(Quantize)):
        raise UsageError(f"quantize must be 'weights', 'weights+cache' or None, not {quantize!r}")


def check_batch_size(batch_size: int | None) -> None:
    """Raises UsageError unless it is None or an integer of at least 1."""
    if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
        raise UsageError(f"batch_size must be an integer of at least 1, not {batch_size!r}")


@partial(jax.jit, static_argnames="model")
def _forward(model: Transformer, params: dict[str, Any], prefix_ids: jax.Array, codes: jax.Array) -> Any:
    return model.apply({"params": params}, prefix_ids, codes)


def _no_room(device: str) -> str:
    return f"no room to decode pictures in the memory of {device}; use a larger device"


def _too_many(batch_size: int, device: str) -> str:
    if batch_size == 1:
        return f"not even one candidate fits into the memory of {device} beside the weights; use a larger device"
    smaller = 1 << (batch_size - 1).bit_length() - 1  # the largest power of two below it
    return (
        f"{batch_size} candidates at once do not fit into the memory of {device}; try batch_size {smaller} "
        "(no fewer pictures, more rounds)"
    )
