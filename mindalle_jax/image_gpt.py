"""ImageGPT: a class, or nothing, -> codes -> pixels. Images are channels last."""

import os
from collections.abc import Iterator
from typing import Any, Literal, Self, Unpack

import jax
from jax.sharding import Mesh

from mindalle_jax.base_model import Model, last
from mindalle_jax.config.file import ConfigFile, load_config
from mindalle_jax.config.schema import Config
from mindalle_jax.errors import UsageError
from mindalle_jax.hub.resolve import find_model
from mindalle_jax.runtime.devices import DType, prepare_process
from mindalle_jax.sampling.options import (
    Quantize,
    SamplingKeywords,
    SamplingOptions,
    check_every,
    class_number,
    class_prefix,
    takes_options,
)
from mindalle_jax.sampling.result import Generation
from mindalle_jax.storage.initialize import cached_transfer


class ImageGPT(Model):
    """An image-only model: it samples images of a class, or without any condition.

    Load one with `from_pretrained`, or begin one from a text-to-image model with `from_upstream`. Letters in shapes
    and attributes are those of Dalle; there is no tokenizer.
    """

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
        """Loads a model, as `Dalle.from_pretrained` does.

        Args:
            path_or_name: as in `Dalle.from_pretrained`; the model must be an image-only one.
            config: is refused. The original's call that takes one is `from_upstream` here.
            dtype: as in `Dalle.from_pretrained`.
            mesh: as in `Dalle.from_pretrained`.
            quantize: as in `Dalle.from_pretrained`.
            revision: as in `Dalle.from_pretrained`.
            local_files_only: as in `Dalle.from_pretrained`.

        Returns:
            The model, on its devices.

        Raises:
            UsageError: a config was given. Other errors are those of `Dalle.from_pretrained`.
        """
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
        """Makes an image-only model from a text-to-image model, before any training.

        The tables of codes and positions and the blocks are taken over. Start vectors are new and random. The model is
        written to the cache.

        Args:
            dalle_path: the text-to-image model, a path or name as in `Dalle.from_pretrained`.
            config: the configuration of the image-only model; or a YAML file of the original or of
                `mindalle finetune`; or the name of a preset. Fields that a file leaves out are those of the
                text-to-image model.
            head: "fresh" makes a new random head, as the original does; "head_img" takes over that of the
                text-to-image model.
            seed: of the new random weights.
            dtype: as in `Dalle.from_pretrained`.
            mesh: as in `Dalle.from_pretrained`.

        Returns:
            The model, on its devices.

        Raises:
            ConfigError: the two models do not fit. Other errors are those of `Dalle.from_pretrained`.
        """
        prepare_process()
        upstream = find_model(dalle_path)
        if not isinstance(config, Config):
            config = ConfigFile(config).model_config(load_config(upstream / "config.yaml"))
        target = cached_transfer(upstream, config, head=head, seed=seed)
        return cls.from_pretrained(target, dtype=dtype, mesh=mesh)

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None for an unconditional model."""
        return self.config.stage2.hparams.n_classes if self.config.stage2.use_cls_cond else None

    def logits(self, codes: Any, labels: Any = None) -> jax.Array:
        """Computes the forward pass of the transformer.

        Args:
            codes: int[B, T] with 1 <= T <= h * w, or whole images [B, h, w].
            labels: int[B], the classes; None for an unconditional model.

        Returns:
            Logits f32[B, T, V]. Those at t belong to code t, given the class and the codes before it.

        Raises:
            UsageError: a shape, a code or a class is out of range.
        """
        codes = self._check_sequence(codes)
        image_logits, _ = self._forward(class_prefix(self.config.stage2, labels, len(codes)), codes)
        return image_logits

    @takes_options
    def generate(self, class_id: int | str | None = None, **options: Unpack[SamplingKeywords]) -> Generation:
        """Samples images of a class. `model(class_id)` is the same.

        Args:
            class_id: in [0, num_classes), or its name in `class_names`; None for an unconditional model.
            **options: the fields of SamplingOptions, by name. Without a text there is no guidance, and the only
                ranker is "likelihood".

        Returns:
            The images, as `Dalle.generate` gives them.

        Raises:
            UsageError: an option or the class is out of range. Other errors are those of `Dalle.generate`.
        """
        return last(self.stream(class_id, every=None, **options))

    __call__ = generate

    @takes_options
    def stream(
        self, class_id: int | str | None = None, *, every: int | None = 32, **options: Unpack[SamplingKeywords]
    ) -> Iterator[Generation]:
        """Yields unfinished images while it samples, as `Dalle.stream` does.

        Args:
            class_id: in [0, num_classes), or its name in `class_names`; None for an unconditional model.
            every: number of codes between two previews, a multiple of the codes in a row; None yields the end alone.
            **options: the fields of SamplingOptions, by name.

        Yields:
            A Generation; the last one is the result of `generate`, bit for bit.

        Raises:
            UsageError: `every`, an option or the class is out of range. Other errors are those of `Dalle.generate`.
        """
        check_every(every, self.config.stage1)
        if isinstance(class_id, str):
            class_id = class_number(class_id, self.class_names)
        name = "" if class_id is None else f"class {class_id}"
        named: dict[str, Any] = {**options, "prompts": (name,), "class_id": class_id}
        checked = self._with_ranker(SamplingOptions.of(**named).check(self.config))
        prefix_ids = class_prefix(self.config.stage2, None if class_id is None else [class_id], 1)
        return self._stream(self._request(checked, prefix_ids), checked, every, single=True, class_id=class_id)

    @takes_options
    def complete(
        self, image: Any, *, keep_rows: int, class_id: int | str | None = None, **options: Unpack[SamplingKeywords]
    ) -> Generation:
        """Keeps the top of an image and samples the rest, as `Dalle.complete` does.

        Args:
            image: RGB, of the model's size: a PIL image, or an array [H, W, 3], uint8 or float in [0, 1].
            keep_rows: rows of codes to keep from the top, in [1, h - 1].
            class_id: in [0, num_classes), or its name in `class_names`; None for an unconditional model.
            **options: the fields of SamplingOptions, by name.

        Returns:
            The images, as `Dalle.generate` gives them.

        Raises:
            UsageError: the image, keep_rows or the class is out of range. Other errors are those of `Dalle.generate`.
        """
        return self.generate(class_id, **options | {"prompt_codes": self.prompt_codes(image, keep_rows)})
