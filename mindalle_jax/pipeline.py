"""Dalle and ImageGPT: text, or a class, -> codes -> pixels -> ranked pictures. Pictures are channels last."""

import hashlib
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import jax
import numpy as np
from jax.sharding import Mesh

from mindalle_jax.config.file import dump_config
from mindalle_jax.config.schema import Config, Stage2Config
from mindalle_jax.drawing import Callback, Job, Model, Quantize, Ranker
from mindalle_jax.errors import CheckpointError, UsageError
from mindalle_jax.hub.resolve import find_model
from mindalle_jax.runtime.cache import cache_dir
from mindalle_jax.runtime.devices import DType
from mindalle_jax.sampling.codec import check_ids
from mindalle_jax.sampling.decode import DEFAULT_TOP_K
from mindalle_jax.sampling.result import Generation
from mindalle_jax.storage.weights import MANIFEST
from mindalle_jax.text.tokenizer import TextTokenizer, TokenizedPrompts


class Dalle(Model):
    """Text to image."""

    def __init__(self, folder: Path, dtype: DType | None, mesh: Mesh | None, quantize: Quantize | None):
        super().__init__(folder, dtype, mesh, quantize)
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
        check_ids(text_ids, self.config.stage2.vocab_size_txt, "text_ids")
        image_logits, text_logits = self._forward(text_ids.astype(np.int32), self._check_sequence(codes))
        assert text_logits is not None
        return image_logits, text_logits

    def generate_codes(self, prompt: str | Sequence[str], **options: Any) -> np.ndarray:
        """Codes int32[n, h * w] of a prompt, [P, n, h * w] of a list, not decoded; options and errors as generate."""
        job = self._text_job(prompt, None, options)
        codes, log_likelihood = self._blank(job)
        for _ in self._draw(job, codes, log_likelihood):
            pass
        return codes[0] if job.single else codes

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
        jacobi: bool = False,
        guidance_scale: float = 1.0,
        kept_codes: Any = None,
        ranker: Ranker = None,
        callback: Callback | None = None,
        allow_empty: bool = False,
        progress: bool = False,
    ) -> Generation:
        """Pictures of a prompt, or of each of a list.

        top_k, top_p, temperature, seed: see sampling.Settings.
        batch_size: candidates per device per compiled call; memory grows with it and not with num_candidates. Pictures
        of one seed are bit-identical at one batch_size, whatever else is drawn. None: by the device.
        jacobi: draw all codes of a row at once, again and again until nothing changes: the same codes but for rounding,
        in fewer passes where they can be guessed. Faster for one candidate or a few: docs/log.md.
        guidance_scale: 1 is off. Over 1 follows the prompt more closely, but only a model that was fine-tuned with some
        captions left out knows what "no prompt" looks like; takes twice the memory and nearly twice the time.
        kept_codes: codes int[m] of whole rows that every picture begins with; complete and variations set it.
        ranker: a ClipRanker, or "likelihood" (how probable the transformer finds the codes drawn: the sum of their
        log-probabilities, free), or None. Scores are in the result, with the order from best to worst.
        callback: called with a Progress after each row of codes; if it returns True, drawing stops and the result holds
        what there is: codes not drawn are -1, and pictures show them as the mean of the codebook.
        allow_empty: take a blank prompt, which is otherwise an error. progress: show bars.

        Raises UsageError for values out of range, NonFiniteError for broken weights, DeviceMemoryError.
        """
        return _last(
            self.stream(
                prompt,
                every=None,
                num_candidates=num_candidates,
                top_k=top_k,
                top_p=top_p,
                temperature=temperature,
                seed=seed,
                batch_size=batch_size,
                jacobi=jacobi,
                guidance_scale=guidance_scale,
                kept_codes=kept_codes,
                ranker=ranker,
                callback=callback,
                allow_empty=allow_empty,
                progress=progress,
            )
        )

    def stream(self, prompt: str | Sequence[str], *, every: int | None = 32, **options: Any) -> Iterator[Generation]:
        """Yields unfinished Generations while it draws, and in the end what generate returns, bit for bit.

        every: codes between two of them, a multiple of a row; None yields the end alone. Codes not drawn yet are -1,
        and pictures show them as the mean of the codebook. Unfinished ones have no scores.
        options and errors: as generate; they are checked before anything is drawn.
        """
        return self._run(self._text_job(prompt, every, options))

    def complete(self, prompt: str | Sequence[str], image: Any, *, keep_rows: int, **options: Any) -> Generation:
        """Draws the rest of a picture of which the top is given.

        image: RGB, of the model's size: a PIL image, or an array uint8 or float in [0, 1], [H, W, 3].
        keep_rows: rows of codes to keep from the top, in [1, h - 1]; a row is H / h pixels high. The kept part shows as
        the VQGAN reconstructs it. Codes are drawn row by row from the top, so what lies below the kept rows cannot be
        seen: neither a hole in the middle nor the bottom of a picture can be kept.
        options and errors: as generate.
        """
        return self.generate(prompt, kept_codes=self.kept_codes(image, keep_rows), **options)

    def variations(self, prompt: str | Sequence[str], codes: Any, *, keep_rows: int, **options: Any) -> Generation:
        """Draws other lower parts for a picture drawn before: codes int[h * w] or [h, w], as in Generation.codes.

        Give another seed, else its own candidate comes out again. keep_rows, options, errors: as complete.
        """
        return self.generate(prompt, kept_codes=self.kept_codes(codes, keep_rows), **options)

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

    def _text_job(self, prompt: str | Sequence[str], every: int | None, options: dict[str, Any]) -> Job:
        options = _with_defaults(options)
        prompts = _check_prompts(prompt, options["allow_empty"])
        settings = self._settings(options)
        tokenized = self._tokenize(prompts)
        prefixes = tokenized.ids
        if settings.guided:
            blank = np.broadcast_to(self.tokenizer([""]).ids, prefixes.shape)
            prefixes = np.stack([prefixes, blank], axis=1)
        notes = {"num_tokens": tokenized.num_tokens}  # of which the first N count
        return self._job(prompts, prefixes, settings, options, every, single=isinstance(prompt, str), notes=notes)


class ImageGPT(Model):
    """Pictures without text: unconditional, or by class."""

    def __init__(self, folder: Path, dtype: DType | None, mesh: Mesh | None, quantize: Quantize | None):
        super().__init__(folder, dtype, mesh, quantize)
        if not self.config.image_only:
            raise CheckpointError(f"{folder}: a text-to-image model; load it with Dalle")

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
        from mindalle_jax.storage.initialize import write_transfer

        upstream = find_model(dalle_path)
        about = f"{(upstream / MANIFEST).read_text()}\n{dump_config(config)}\n{head} {seed}"
        target = cache_dir() / "transfer" / f"{upstream.name}-{hashlib.sha256(about.encode()).hexdigest()[:16]}"
        if not target.exists():
            write_transfer(upstream, config, target, head=head, seed=seed)
        return cls(target, dtype, mesh, None)

    @property
    def num_classes(self) -> int | None:
        """Number of classes, None for an unconditional model."""
        return self.config.stage2.hparams.n_classes if self.config.stage2.use_cls_cond else None

    def logits(self, codes: Any, labels: Any = None) -> jax.Array:
        """The forward pass: codes int[B, T], labels int[B] (class-conditional models only) -> f32[B, T, V]."""
        codes = self._check_sequence(codes)
        image_logits, _ = self._forward(class_prefix(self.config.stage2, labels, len(codes)), codes)
        return image_logits

    def generate(self, class_id: int | None = None, *, num_candidates: int = 16, **options: Any) -> Generation:
        """Pictures of a class in [0, num_classes), None for an unconditional model.

        options and errors as Dalle.generate; without a text there is nothing to guide by, and "likelihood" alone ranks.
        """
        return _last(self.stream(class_id, every=None, num_candidates=num_candidates, **options))

    def stream(
        self, class_id: int | None = None, *, every: int | None = 32, num_candidates: int = 16, **options: Any
    ) -> Iterator[Generation]:
        """As Dalle.stream; arguments as generate."""
        options = _with_defaults(options | {"num_candidates": num_candidates})
        if options["ranker"] not in (None, "likelihood"):
            raise UsageError(f"without a text ranker must be None or 'likelihood', not {options['ranker']!r}")
        settings = self._settings(options)
        if settings.guided:
            raise UsageError("guidance_scale is for text-to-image models: without a text there is nothing to guide by")
        name = "" if class_id is None else f"class {class_id}"
        prefix = class_prefix(self.config.stage2, None if class_id is None else [class_id], 1)
        return self._run(self._job([name], prefix, settings, options, every, single=True, notes={}))

    def complete(self, image: Any, *, keep_rows: int, class_id: int | None = None, **options: Any) -> Generation:
        """Draws the rest of a picture of which the top is given; image and keep_rows as Dalle.complete."""
        return self.generate(class_id, kept_codes=self.kept_codes(image, keep_rows), **options)


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
    check_ids(labels, classes or 1, "classes")
    return labels[:, None].astype(np.int32)


def _check_prompts(prompt: str | Sequence[str], allow_empty: bool) -> list[str]:
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise UsageError("no prompt was given")
    for text in prompts:
        if isinstance(text, str) and not text.strip() and not allow_empty:
            raise UsageError("the prompt is blank; pass allow_empty=True to draw without text")
    return prompts


# The signature of generate is the one place of the defaults.
_DEFAULTS: Any = Dalle.generate.__kwdefaults__


def _with_defaults(options: dict[str, Any]) -> dict[str, Any]:
    """All options of generate."""
    if unknown := options.keys() - _DEFAULTS.keys():
        raise TypeError(f"unknown option {', '.join(sorted(unknown))}; there are {', '.join(_DEFAULTS)}")
    return _DEFAULTS | options


def _last(generations: Iterator[Generation]) -> Generation:
    *_, last = generations
    return last
