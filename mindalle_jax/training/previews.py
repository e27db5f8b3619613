"""Images to watch a training: samples of fixed prompts, and reconstructions of the data by the VQGAN.

Both are made on the first device of the run's mesh. It holds a copy of the complete model meanwhile.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from PIL import Image, ImageDraw

from mindalle_jax.config.schema import Config, Stage1Config
from mindalle_jax.data.check import wrapped_text
from mindalle_jax.errors import ConfigError, UsageError
from mindalle_jax.image_gpt import ImageGPT
from mindalle_jax.pipeline import Dalle
from mindalle_jax.runtime.devices import DType
from mindalle_jax.sampling.codec import ImageCodec
from mindalle_jax.sampling.options import class_number, class_prefix
from mindalle_jax.text.tokenizer import TextTokenizer

CANDIDATES = 4
"""Number of images of each prompt."""
LABEL, LINE = 160, 14
"""Width of the column of prompts, and height of a line of text, in pixels."""
RECONSTRUCTIONS = 8
"""Number of images that are reconstructed."""


class Previewer:
    """Samples the prompts of a run with its current parameters, with seed 0, temperature 1 and the default top-k."""

    def __init__(
        self,
        config: Config,
        prompts: tuple[str, ...],
        tokenizer: TextTokenizer | None,
        classes: Sequence[str] | None = None,
    ):
        """Checks the prompts: texts, or names or numbers of classes. Raises ConfigError if the model does not take one.

        classes: names of the classes, if they have names.
        """
        self.config, self.prompts, self.tokenizer = config, list(prompts), tokenizer
        self.class_ids = _check_prompts(config, self.prompts, tokenizer, classes)

    def write_samples(self, params: dict[str, Any], path: Path, *, dtype: DType, mesh: Mesh) -> None:
        """Writes a sheet with one row of CANDIDATES images per prompt, beside the prompt.

        params: {"stage1": ..., "stage2": ...}, nested, on the mesh of the run; stage 2 in the layout of training.
        dtype: compute dtype. Raises OSError if the file cannot be written.
        """
        images = self._generate(params, dtype, _first_device(mesh))
        path.parent.mkdir(exist_ok=True)
        _sheet(self.prompts, images).save(path)

    def _generate(self, params: dict[str, Any], dtype: DType, mesh: Mesh) -> np.ndarray:
        """Returns uint8[prompts, CANDIDATES, S, S, 3]."""
        options: Any = {"num_candidates": CANDIDATES, "batch_size": CANDIDATES}
        if self.tokenizer is not None:
            model = Dalle(self.config, params, self.tokenizer, dtype=dtype, mesh=mesh)
            return model.generate(self.prompts, allow_empty=True, **options).images
        model = ImageGPT(self.config, params, dtype=dtype, mesh=mesh)
        return np.stack([model.generate(class_id, **options).images for class_id in self.class_ids])


def _sheet(prompts: list[str], images: np.ndarray) -> Image.Image:
    """Returns a sheet with a row per prompt: the prompt, and its images uint8[prompts, n, S, S, 3] beside it."""
    rows, _, side = images.shape[:3]
    sheet = Image.new("RGB", (LABEL + images.shape[1] * side, rows * side), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (prompt, candidates) in enumerate(zip(prompts, images, strict=True)):
        for line, text in enumerate(wrapped_text(pen, prompt, LABEL - 8, max(1, side // LINE))):
            pen.text((4, row * side + LINE * line), text, fill="black")
        sheet.paste(Image.fromarray(np.concatenate(list(candidates), axis=1)), (LABEL, row * side))
    return sheet


def write_reconstructions(
    config: Stage1Config, params: dict[str, Any], images: np.ndarray, path: Path, *, dtype: DType, mesh: Mesh
) -> float:
    """Writes images uint8[n, S, S, 3] in a row, above their reconstructions by the VQGAN; returns their PSNR in dB.

    It is the mean of 10 log10(255² / mean squared difference) over the images. params: parameters of the VQGAN, nested,
    on the mesh of the run. dtype: compute dtype of the decoder.
    """
    codec = ImageCodec(config, params, dtype=dtype, mesh=_first_device(mesh))
    decoded = np.concatenate(list(codec.decode(codec.encode(images))))
    both = np.stack([images, decoded])  # [2, n, S, S, 3]
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.concatenate(np.concatenate(both, axis=1), axis=1)).save(path)
    squares = ((images.astype(np.float64) - decoded) ** 2).mean((1, 2, 3))
    return float(np.mean(10 * np.log10(255**2 / np.maximum(squares, 1e-9))))


def _first_device(mesh: Mesh) -> Mesh:
    return Mesh(mesh.devices.flat[:1], ("data",))


def _check_prompts(
    config: Config, prompts: list[str], tokenizer: TextTokenizer | None, classes: Sequence[str] | None
) -> list[int | None]:
    """Returns the class of each prompt, if it is one. Raises ConfigError for prompts that the model does not take."""
    try:
        class_ids: list[int | None] = [None] * len(prompts)
        if tokenizer is not None:
            tokenizer(prompts)
        elif config.stage2.use_cls_cond:
            class_ids = [class_number(prompt, classes) for prompt in prompts]
            class_prefix(config.stage2, np.array(class_ids, int), len(prompts))
        else:
            class_prefix(config.stage2, None, len(prompts))
        return class_ids
    except UsageError as error:
        raise ConfigError(f"training.sample_prompts {prompts}: {error}") from None
