"""Dalle: text -> codes -> pixels -> ranked images. Images are channels last."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Unpack

import jax
import numpy as np

from mindalle_jax.base_model import Model, last
from mindalle_jax.config.schema import Config
from mindalle_jax.errors import UsageError, warn
from mindalle_jax.sampling.events import RowRequest
from mindalle_jax.sampling.generate import generate_codes
from mindalle_jax.sampling.options import (
    DEFAULT_TOP_K,
    SamplingKeywords,
    SamplingOptions,
    as_prompts,
    check_every,
    check_ids,
    takes_options,
)
from mindalle_jax.sampling.result import Generation
from mindalle_jax.text.tokenizer import TextTokenizer, TokenizedPrompts


class Dalle(Model):
    """A text-to-image model: prompts -> codes -> images, which a CLIP model may rank.

    Load one with `from_pretrained`. Several threads may call one model.

    Shapes below use n for candidates, P for prompts, H and W for the height and width of an image in pixels, h and w
    for its rows of codes and the codes in a row, and V for the number of codes.

    Attributes:
        config (Config): the configuration.
        tokenizer (TextTokenizer): turns prompts into text ids.
        folder: absolute path that the model was loaded from; None for a model made in memory.
        name: the name that it was loaded by, or the path of its folder.
        revision: branch, tag or commit of its repository, where one was named.
        dtype (str): compute dtype, "float32" or "bfloat16".
        mesh (Mesh): devices that it computes on.
        backend (str): kind of these devices, "cpu", "gpu" or "tpu".
        quantize (str | None): what is held as int8, as in `from_pretrained`.
        caption_dropout: share of captions that training left blank; None where this is unknown.

    Examples:
        >>> from mindalle_jax import Dalle
        >>> model = Dalle.from_pretrained("demo")
        >>> images = model("a parrot, 3d style", num_candidates=2, seed=0)
        >>> images.images.shape, images.codes.shape
        ((2, 64, 64, 3), (2, 256))
    """

    _image_only = False

    def __init__(self, config: Config, params: dict[str, Any], tokenizer: TextTokenizer, **settings: Any):
        """Makes a model from arrays in memory. `from_pretrained` loads one.

        Args:
            config: the configuration of a text-to-image model.
            params: `{"stage1": ..., "stage2": ...}`: the VQGAN and the transformer, nested dicts of NumPy or JAX
                arrays. The blocks of stage 2 are stacked, as in training, or one by one.
            tokenizer: turns prompts into ids below `config.stage2.vocab_size_txt`.
            **settings: dtype, mesh and quantize, as in `from_pretrained`.

        Raises:
            CheckpointError: some arrays do not fit the configuration; the message names them.
            ConfigError: the configuration contradicts itself.
            UsageError: a setting is out of range.
            DeviceMemoryError: the weights do not fit into the memory of the device.
        """
        super().__init__(config, params, **settings)
        self.tokenizer = tokenizer

    def tokenize(self, prompts: str | Sequence[str]) -> np.ndarray:
        """Turns prompts into text ids.

        Warns (UserWarning) of prompts that are cut or mostly unknown.

        Args:
            prompts: one prompt, or a list of P. The empty string gives padding only.

        Returns:
            Ids int32[P, N]; N is the model's text length, 64 in the published model.

        Raises:
            UsageError: a prompt is not text, or is longer than 2,000 characters.
        """
        return self._tokenize(as_prompts(prompts)).ids

    def _tokenize(self, prompts: Sequence[str]) -> TokenizedPrompts:
        tokenized = self.tokenizer(list(prompts))
        for line in tokenized.warnings(list(prompts)):
            warn(line)
        return tokenized

    def logits(self, text_ids: Any, codes: Any) -> tuple[jax.Array, jax.Array]:
        """Computes the forward pass of the transformer.

        Args:
            text_ids: int[B, N], as `tokenize` gives them.
            codes: int[B, T] with 1 <= T <= h * w, or whole images [B, h, w] as `encode_images` gives them.

        Returns:
            Image logits f32[B, T, V] and text logits f32[B, N - 1, Vt]. Image logits at t belong to code t, given the
                text and the codes before it. Text logits at i belong to id i + 1.

        Raises:
            UsageError: a shape or an id is out of range.
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
        """Samples codes and does not decode them.

        Args:
            prompt: one prompt, or a list of P.
            **options: the fields of SamplingOptions, by name. A ranker is not used.

        Returns:
            Codes int32[n, h * w]; int32[P, n, h * w] for a list.

        Raises:
            UsageError: an option or a prompt is out of range.
            NonFiniteError: the weights are damaged and give NaN or infinite logits.
            DeviceMemoryError: the candidates sampled at once do not fit into the memory of the device.
        """
        checked, request, _ = self._text_request(prompt, options)
        codes = generate_codes(self._networks, request, checked)
        shape = (checked.num_candidates,) if isinstance(prompt, str) else (-1, checked.num_candidates)
        return codes.reshape(*shape, codes.shape[1])

    @takes_options
    def generate(self, prompt: str | Sequence[str], **options: Unpack[SamplingKeywords]) -> Generation:
        """Samples images of a prompt, or of each prompt of a list. `model(prompt)` is the same.

        Args:
            prompt: one prompt, or a list of P.
            **options: the fields of SamplingOptions, by name.

        Returns:
            The images with their codes, scores and seeds; for a list, arrays have a leading axis P.

        Raises:
            UsageError: an option or a prompt is out of range.
            NonFiniteError: the weights are damaged and give NaN or infinite numbers.
            DeviceMemoryError: the candidates sampled at once do not fit into the memory of the device.
            CheckpointError: the ranker cannot be loaded.
            DownloadError: the ranker cannot be downloaded.
        """
        return last(self.stream(prompt, every=None, **options))

    __call__ = generate

    @takes_options
    def stream(
        self, prompt: str | Sequence[str], *, every: int | None = 32, **options: Unpack[SamplingKeywords]
    ) -> Iterator[Generation]:
        """Yields unfinished images while it samples, and at last the result of `generate`, bit for bit.

        Options are checked before anything is sampled.

        Args:
            prompt: one prompt, or a list.
            every: number of codes between two previews, a multiple of the codes in a row; None yields the end alone.
            **options: the fields of SamplingOptions, by name.

        Yields:
            A Generation. In an unfinished one, codes that are not sampled yet are -1, images show them as the mean of
                the codebook, and there are no scores.

        Raises:
            UsageError: `every`, an option or a prompt is out of range. Other errors are those of `generate`.
        """
        check_every(every, self.config.stage1)
        checked, request, num_tokens = self._text_request(prompt, options, ranked=True)
        single = isinstance(prompt, str)
        return self._stream(request, checked, every, single, num_tokens=num_tokens)  # of which the first N count

    @takes_options
    def complete(
        self, prompt: str | Sequence[str], image: Any, *, keep_rows: int, **options: Unpack[SamplingKeywords]
    ) -> Generation:
        """Keeps the top of an image and samples the rest.

        Codes are sampled row by row from the top, and the model sees nothing below the kept rows. So it can keep
        neither the bottom of an image nor what is around a hole.

        Args:
            prompt: one prompt, or a list.
            image: RGB, of the model's size: a PIL image, or an array [H, W, 3], uint8 or float in [0, 1].
            keep_rows: rows of codes to keep from the top, in [1, h - 1]. A row is H / h pixels high. The kept part
                looks as the VQGAN reconstructs it.
            **options: the fields of SamplingOptions, by name.

        Returns:
            The images, as `generate` gives them.

        Raises:
            UsageError: the image or keep_rows is out of range. Other errors are those of `generate`.
        """
        return self.generate(prompt, **options | {"prompt_codes": self.prompt_codes(image, keep_rows)})

    @takes_options
    def variations(
        self, prompt: str | Sequence[str], codes: Any, *, keep_rows: int, **options: Unpack[SamplingKeywords]
    ) -> Generation:
        """Keeps the top of an image that was sampled before and samples new lower parts.

        Args:
            prompt: one prompt, or a list.
            codes: int[h * w] or int[h, w] of one image, as in `Generation.codes`.
            keep_rows: rows of codes to keep from the top, in [1, h - 1].
            **options: the fields of SamplingOptions, by name. Give another seed: with the same one, a candidate is
                the same image again.

        Returns:
            The images, as `generate` gives them.

        Raises:
            UsageError: the codes or keep_rows are out of range. Other errors are those of `generate`.
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
        """Samples with the original's call. New code should use `generate`.

        Args:
            prompt: one prompt.
            top_k: samples among the k most likely codes; None is off.
            top_p: samples among the most likely codes that together reach this probability; None is off.
            softmax_temperature: divides the logits; 0 takes the most likely code.
            num_candidates: number of images.
            device: does nothing, and warns. JAX finds the device.
            use_fp16: does nothing, and warns. Give `dtype` to `from_pretrained`.
            seed: in [0, 2**32); None takes a random one.

        Returns:
            Images f32[n, H, W, 3] in [0, 1], not ranked. (Those of the original are [n, 3, H, W].)

        Raises:
            UsageError: an argument is out of range, or prompt is a list. Other errors are those of `generate`.
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
