"""Images to look at while a model is trained: samples of fixed prompts, and how the VQGAN sees the data."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from mindalle_jax.config.schema import Config
from mindalle_jax.errors import ConfigError, UsageError
from mindalle_jax.pipeline import Dalle, ImageGPT
from mindalle_jax.sampling.codec import ImageCodec
from mindalle_jax.sampling.options import class_prefix
from mindalle_jax.sampling.result import Generation
from mindalle_jax.storage.weights import load_params
from mindalle_jax.text.tokenizer import TextTokenizer

CANDIDATES = 4
RECONSTRUCTIONS = 8


class Sampler:
    """Draws on the first device, which holds the whole model meanwhile."""

    def __init__(self, base: Path, config: Config, dtype: jnp.dtype, prompts: tuple[str, ...],
                 tokenizer: TextTokenizer | None):  # fmt: skip
        """prompts: texts, or numbers of classes. Raises ConfigError for those that the model does not take."""
        self.mesh = Mesh(np.array(jax.local_devices()[:1]), ("data",))
        self.config, self.dtype, self.prompts, self.tokenizer = config, dtype, list(prompts), tokenizer
        _check(config, self.prompts, tokenizer)
        stage1 = load_params(base, "stage1", config, np.dtype("float32"), self.mesh)
        self.codec = ImageCodec(config.stage1, stage1, dtype=str(dtype), mesh=self.mesh)  # type: ignore[arg-type]

    def draw(self, params: dict[str, Any], path: Path) -> None:
        """Writes a grid, a block per prompt. params: all of stage 2, nested, in the layout of training, anywhere."""
        both = {"stage1": self.codec.params, "stage2": params}
        placed: Any = {"dtype": str(self.dtype), "mesh": self.mesh}
        options: Any = {"num_candidates": CANDIDATES, "batch_size": CANDIDATES}
        if self.tokenizer is not None:
            generation = Dalle(self.config, both, self.tokenizer, **placed).generate(self.prompts, **options)
        else:
            model = ImageGPT(self.config, both, **placed)
            drawn = [model.generate(int(prompt) if prompt else None, **options) for prompt in self.prompts]
            images, codes, seeds = (
                np.stack([getattr(one, name) for one in drawn]) for name in ("images", "codes", "seeds")
            )
            generation = Generation(images, codes, None, seeds, self.prompts, {})
        path.parent.mkdir(exist_ok=True)
        generation.grid().save(path)

    def reconstruct(self, images: np.ndarray, path: Path) -> None:
        """Writes images uint8[n, S, S, 3] above what the VQGAN makes of them."""
        write_reconstructions(self.codec, images, path)


def write_reconstructions(codec: ImageCodec, images: np.ndarray, path: Path) -> None:
    """Writes images uint8[n, S, S, 3] above what the VQGAN makes of them."""
    decoded = np.concatenate(list(codec.decode(codec.encode(images))))
    both = np.stack([images, decoded])  # [2, n, S, S, 3]
    Image.fromarray(np.concatenate(np.concatenate(both, axis=1), axis=1)).save(path)


def _check(config: Config, prompts: list[str], tokenizer: TextTokenizer | None) -> None:
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
