"""Dalle and ImageGPT: text, or a class, -> codes -> pixels -> ranked images. Images are channels last."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Self, Unpack

import jax
import numpy as np
from jax.sharding import Mesh

from mindalle_jax.base_model import Model
from mindalle_jax.config.file import ConfigFile, load_config
from mindalle_jax.config.schema import Config
from mindalle_jax.errors import UsageError, warn
from mindalle_jax.hub.resolve import find_model
from mindalle_jax.runtime.devices import DType, prepare_process
from mindalle_jax.sampling.events import RowRequest
from mindalle_jax.sampling.generate import generate_codes
from mindalle_jax.sampling.options import (
    DEFAULT_TOP_K,
    Quantize,
    SamplingKeywords,
    SamplingOptions,
    as_prompts,
    check_every,
    check_ids,
    class_prefix,
    takes_options,
)
from mindalle_jax.sampling.result import Generation
from mindalle_jax.storage.initialize import cached_transfer
from mindalle_jax.text.tokenizer import TextTokenizer, TokenizedPrompts


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
            warn(line)
        return tokenized

    def logits(self, text_ids: Any, codes: Any) -> tuple[jax.Array, jax.Array]:
        """The forward pass: text_ids int[B, N], codes int[B, T] -> image f32[B, T, V] and text f32[B, N-1, Vt] logits.

        Codes of whole images may be [B, h, w], as encode_images gives them. Image logits at t are of code t given the
        text and codes 0..t-1; text logits at i are of id i + 1.
        """
        if isinstance(text_ids, str):
            raise UsageError("text_ids are the ids of a text: model.logits(model.tokenize(text), codes)")
        text_ids, length = np.asarray(text_ids), self.config.stage2.hparams.ctx_len_txt
        if text_ids.ndim != 2 or text_ids.shape[1] != length:
            raise UsageError(f"text_ids must be [B, {length}], not {list(text_ids.shape)}")
        check_ids(text_ids, self.config.stage2.vocab_size_txt, "text_ids")
        image_logits, text_logits = self._forward(text_ids.astype(np.int32), self._check_sequence(codes))
        assert text_logits is not None
        return image_logits, text_logits

    @takes_options
    def generate_codes(self, prompt: str | Sequence[str], **options: Unpack[SamplingKeywords]) -> np.ndarray:
        """Codes int32[n, h * w] of a prompt, [P, n, h * w] of a list, not decoded; errors as generate."""
        checked, request, _ = self._text_request(prompt, options)
        codes = generate_codes(self._networks, request, checked)
        shape = (checked.num_candidates,) if isinstance(prompt, str) else (-1, checked.num_candidates)
        return codes.reshape(*shape, codes.shape[1])

    @takes_options
    def generate(self, prompt: str | Sequence[str], **options: Unpack[SamplingKeywords]) -> Generation:
        """Images of a prompt, or of each of a list.

        Raises UsageError for values out of range, NonFiniteError for broken weights, DeviceMemoryError.
        """
        return _last(self.stream(prompt, every=None, **options))

    __call__ = generate

    @takes_options
    def stream(
        self, prompt: str | Sequence[str], *, every: int | None = 32, **options: Unpack[SamplingKeywords]
    ) -> Iterator[Generation]:
        """Yields unfinished Generations while it samples, and in the end what generate returns, bit for bit.

        every: codes between two of them, a multiple of a row; None yields the end alone. Codes not sampled yet are -1,
        and images show them as the mean of the codebook. Unfinished ones have no scores.
        Errors as generate; options are checked before anything is sampled.
        """
        check_every(every, self.config.stage1)
        checked, request, num_tokens = self._text_request(prompt, options, ranked=True)
        single = isinstance(prompt, str)
        return self._stream(request, checked, every, single, num_tokens=num_tokens)  # of which the first N count

    @takes_options
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

    @takes_options
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
        device: Any = None,
        use_fp16: bool | None = None,
        *,
        seed: int | None = 0,
    ) -> np.ndarray:
        """The original's call: images f32[n, H, W, 3] in [0, 1] (the original's are [n, 3, H, W]).

        device, use_fp16: do nothing, and warn. The device is JAX's; dtype goes to from_pretrained.
        """
        if not isinstance(prompt, str):
            raise UsageError("sampling takes one prompt, as the original does; generate takes a list")
        if device is not None:
            warn(f"sampling(device=...) does nothing: the model is on {self.backend}; pass mesh= to from_pretrained")
        if use_fp16 is not None:
            warn(f"sampling(use_fp16=...) does nothing: the model computes in {self.dtype} (dtype= of from_pretrained)")
        codes = self.generate_codes(
            prompt, num_candidates=num_candidates, top_k=top_k, top_p=top_p, temperature=softmax_temperature, seed=seed
        )
        return self.decode_codes(codes)

    def _text_request(
        self, prompt: str | Sequence[str], options: SamplingKeywords, ranked: bool = False
    ) -> tuple[SamplingOptions, RowRequest, list[int]]:
        """The options, checked; the rows; and how many tokens each prompt has. ranked: whether images are scored."""
        checked = SamplingOptions.of(prompts=as_prompts(prompt), **options).check(self.config, self.tokenizer)
        checked = self._with_ranker(checked) if ranked else dataclasses.replace(checked, ranker=None)
        tokenized = self._tokenize(checked.prompts)
        self._warn_of(checked)
        prefix_ids = tokenized.ids
        if checked.guided:
            blank = np.broadcast_to(self.tokenizer([""]).ids, prefix_ids.shape)
            prefix_ids = np.stack([prefix_ids, blank], axis=1)
        return checked, self._request(checked, prefix_ids), tokenized.num_tokens

    def _warn_of(self, options: SamplingOptions) -> None:
        """Warns of words that the model does not know, and of guidance that it was not trained for."""
        name = self.name.rpartition("/")[2] if self.folder else "the model"
        known_words = self.tokenizer.known_words
        for prompt in options.prompts:
            if known_words is not None and (line := known_words.warning(prompt, name)):
                warn(line)
        if options.guided and self.caption_dropout == 0:
            warn(
                f"guidance_scale {options.guidance_scale:g} costs twice the time and does not make {name} follow the "
                "prompt more closely: its training dropped no captions; fine-tune it with training.caption_dropout=0.1"
            )


class ImageGPT(Model):
    """Images without text: unconditional, or by class."""

    _image_only = True

    @classmethod
    def from_pretrained(
        cls,
        path_or_name: str | os.PathLike[str],
        config: None = None,
        *,
        dtype: DType | None = None,
        mesh: Mesh | None = None,
        quantize: Quantize | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """As Dalle.from_pretrained. config: refused; the original's call that takes one is from_upstream here."""
        if config is not None:
            raise UsageError(
                "ImageGPT.from_pretrained(upstream, config) of the original is from_upstream(upstream, config) here; "
                "from_pretrained loads a folder with an image-only model"
            )
        return super().from_pretrained(
            path_or_name,
            dtype=dtype,
            mesh=mesh,
            quantize=quantize,
            revision=revision,
            local_files_only=local_files_only,
        )

    @classmethod
    def from_upstream(
        cls,
        dalle_path: str | os.PathLike[str],
        config: Config | str | os.PathLike[str],
        *,
        head: Literal["fresh", "head_img"] = "fresh",
        seed: int = 0,
        dtype: DType | None = None,
        mesh: Mesh | None = None,
    ) -> Self:
        """An image-only model that begins from a text-to-image model, before any training.

        config: of the image-only model, or a YAML file, the original's or of mindalle finetune. Fields that the file
        leaves out are those of the text-to-image model.

        Tables and blocks are taken over; start vectors, and the head unless head is "head_img", are drawn anew by the
        seed. The model lies in the cache. Raises ConfigError where the two do not fit, and as from_pretrained.
        """
        prepare_process()
        upstream = find_model(dalle_path)
        if not isinstance(config, Config):
            config = ConfigFile(config).model_config(load_config(upstream / "config.yaml"))
        target = cached_transfer(upstream, config, head=head, seed=seed)
        return cls.from_pretrained(target, dtype=dtype, mesh=mesh)

    @property
    def num_classes(self) -> int | None:
        """Number of classes, None for an unconditional model."""
        return self.config.stage2.hparams.n_classes if self.config.stage2.use_cls_cond else None

    def logits(self, codes: Any, labels: Any = None) -> jax.Array:
        """The forward pass: codes int[B, T] or [B, h, w], labels int[B] (class-conditional only) -> f32[B, T, V]."""
        codes = self._check_sequence(codes)
        image_logits, _ = self._forward(class_prefix(self.config.stage2, labels, len(codes)), codes)
        return image_logits

    @takes_options
    def generate(self, class_id: int | None = None, **options: Unpack[SamplingKeywords]) -> Generation:
        """Images of a class in [0, num_classes), None for an unconditional model.

        Errors as Dalle.generate; without a text there is nothing to guide by, and "likelihood" alone ranks.
        """
        return _last(self.stream(class_id, every=None, **options))

    __call__ = generate

    @takes_options
    def stream(
        self, class_id: int | None = None, *, every: int | None = 32, **options: Unpack[SamplingKeywords]
    ) -> Iterator[Generation]:
        """As Dalle.stream; arguments as generate."""
        check_every(every, self.config.stage1)
        name = "" if class_id is None else f"class {class_id}"
        named: dict[str, Any] = {**options, "prompts": (name,), "class_id": class_id}
        checked = self._with_ranker(SamplingOptions.of(**named).check(self.config))
        prefix_ids = class_prefix(self.config.stage2, None if class_id is None else [class_id], 1)
        return self._stream(self._request(checked, prefix_ids), checked, every, single=True, class_id=class_id)

    @takes_options
    def complete(
        self, image: Any, *, keep_rows: int, class_id: int | None = None, **options: Unpack[SamplingKeywords]
    ) -> Generation:
        """Samples the rest of an image of which the top is given; image and keep_rows as Dalle.complete."""
        return self.generate(class_id, **options | {"prompt_codes": self.prompt_codes(image, keep_rows)})


def _last(generations: Iterator[Generation]) -> Generation:
    *_, last = generations
    return last
