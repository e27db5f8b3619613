"""Images to watch a training: samples of fixed prompts, and reconstructions of the data by the VQGAN.

Both are made on the first device of the run's mesh. It holds a copy of the complete model meanwhile.
"""

from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from PIL import Image

from mindalle_jax.config.schema import Config, Stage1Config
from mindalle_jax.errors import ConfigError, UsageError
from mindalle_jax.image_gpt import ImageGPT
from mindalle_jax.pipeline import Dalle
from mindalle_jax.runtime.devices import DType
from mindalle_jax.sampling.codec import ImageCodec
from mindalle_jax.sampling.options import class_prefix
from mindalle_jax.sampling.result import Generation
from mindalle_jax.text.tokenizer import TextTokenizer

CANDIDATES = 4
"""Number of images of each prompt."""
RECONSTRUCTIONS = 8
"""Number of images that are reconstructed."""


class Previewer:
    """Samples the prompts of a run with its current parameters, with seed 0, temperature 1 and the default top-k."""

    def __init__(self, config: Config, prompts: tuple[str, ...], tokenizer: TextTokenizer | None):
        """Checks the prompts: texts, or numbers of classes. Raises ConfigError if the model does not take one."""
        self.config, self.prompts, self.tokenizer = config, list(prompts), tokenizer
        _check_prompts(config, self.prompts, tokenizer)

    def write_samples(self, params: dict[str, Any], path: Path, *, dtype: DType, mesh: Mesh) -> None:
        """Writes a grid with one block of images per prompt.

        params: {"stage1": ..., "stage2": ...}, nested, on the mesh of the run; stage 2 in the layout of training.
        dtype: compute dtype. Raises OSError if the file cannot be written.
        """
        generation = self._generate(params, dtype, _first_device(mesh))
        path.parent.mkdir(exist_ok=True)
        generation.grid().save(path)

    def _generate(self, params: dict[str, Any], dtype: DType, mesh: Mesh) -> Generation:
        options: Any = {"num_candidates": CANDIDATES, "batch_size": CANDIDATES}
        if self.tokenizer is not None:
            model = Dalle(self.config, params, self.tokenizer, dtype=dtype, mesh=mesh)
            return model.generate(self.prompts, allow_empty=True, **options)
        model = ImageGPT(self.config, params, dtype=dtype, mesh=mesh)
        each = [model.generate(int(prompt) if prompt else None, **options) for prompt in self.prompts]
        images, codes, seeds = (np.stack([getattr(one, name) for one in each]) for name in ("images", "codes", "seeds"))
        return Generation(images, codes, None, seeds, self.prompts, {})


def write_reconstructions(
    config: Stage1Config, params: dict[str, Any], images: np.ndarray, path: Path, *, dtype: DType, mesh: Mesh
) -> None:
    """Writes images uint8[n, S, S, 3] in a row, above their reconstructions by the VQGAN.

    params: parameters of the VQGAN, nested, on the mesh of the run. dtype: compute dtype of the decoder.
    """
    codec = ImageCodec(config, params, dtype=dtype, mesh=_first_device(mesh))
    decoded = np.concatenate(list(codec.decode(codec.encode(images))))
    both = np.stack([images, decoded])  # [2, n, S, S, 3]
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.concatenate(np.concatenate(both, axis=1), axis=1)).save(path)


def _first_device(mesh: Mesh) -> Mesh:
    return Mesh(mesh.devices.flat[:1], ("data",))


def _check_prompts(config: Config, prompts: list[str], tokenizer: TextTokenizer | None) -> None:
    """Raises ConfigError for prompts that the model does not take."""
    try:
        if tokenizer is not None:
            tokenizer(prompts)
        elif config.stage2.use_cls_cond:
            class_prefix(config.stage2, np.array([int(prompt) for prompt in prompts], int), len(prompts))
        else:
            class_prefix(config.stage2, None, len(prompts))
    except (UsageError, ValueError) as error:
        raise ConfigError(f"training.sample_prompts {prompts}: {error}") from None
