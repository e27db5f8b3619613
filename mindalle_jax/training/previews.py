"""Pictures to look at while a model is trained: samples of fixed prompts, and how the VQGAN sees the data."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image

from mindalle_jax.config.schema import Config
from mindalle_jax.errors import ConfigError, UsageError
from mindalle_jax.models.attention import default_backend
from mindalle_jax.models.transformer import Transformer, unstack_blocks
from mindalle_jax.pipeline import class_prefix
from mindalle_jax.sampling.codec import PictureCodec
from mindalle_jax.sampling.decode import Settings, sample_codes
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
        self.config, self.dtype, self.prompts = config, dtype, list(prompts)
        self.prefixes = _prefixes(config, self.prompts, tokenizer)
        stage1 = load_params(base, "stage1", config, jnp.dtype("float32"), self.mesh)
        self.codec = PictureCodec(config.stage1, stage1, dtype, self.mesh)

    def draw(self, params: dict[str, Any], path: Path) -> None:
        """Writes a grid, a block a prompt. params: all of stage 2, nested, in the layout of training, anywhere."""
        here = NamedSharding(self.mesh, PartitionSpec())
        params = unstack_blocks(jax.tree.map(lambda leaf: jax.device_put(leaf.astype(self.dtype), here), params))
        attention = default_backend(self.mesh.devices.flat[0].platform)
        model = Transformer(self.config.stage2, stacked=False, dtype=self.dtype, attention=attention)
        vocab_size = self.config.stage2.vocab_size_img
        settings = Settings.make(vocab_size, seed=0, temperature=1.0, top_k=min(256, vocab_size), top_p=None)
        codes = np.empty((len(self.prompts), CANDIDATES, self.config.stage2.hparams.ctx_len_img), np.int32)
        for p, prefix in enumerate(self.prefixes):
            drawn = sample_codes(
                model, params, prefix, CANDIDATES, settings, batch_size=CANDIDATES, mesh=self.mesh,
                kept=np.zeros(0, np.int32),
            )  # fmt: skip
            for part in drawn:
                codes[p, :, part.start : part.start + part.codes.shape[1]] = part.codes
        images = self._decode(codes.reshape(-1, codes.shape[-1]))
        seeds = np.zeros(codes.shape[:2], np.uint32)
        pictures = images.reshape(*codes.shape[:2], *images.shape[1:])
        path.parent.mkdir(exist_ok=True)
        Generation(pictures, codes, None, seeds, self.prompts, {}).grid().save(path)

    def reconstruct(self, images: np.ndarray, path: Path) -> None:
        """Writes pictures uint8[n, S, S, 3] above what the VQGAN makes of them."""
        write_reconstructions(self.codec, images, path)

    def _decode(self, codes: np.ndarray) -> np.ndarray:
        return np.concatenate(list(self.codec.decode(self.codec.check_codes(codes))))


def write_reconstructions(codec: PictureCodec, images: np.ndarray, path: Path) -> None:
    """Writes pictures uint8[n, S, S, 3] above what the VQGAN makes of them."""
    decoded = np.concatenate(list(codec.decode(codec.encode(images))))
    both = np.stack([images, decoded])  # [2, n, S, S, 3]
    Image.fromarray(np.concatenate(np.concatenate(both, axis=1), axis=1)).save(path)


def _prefixes(config: Config, prompts: list[str], tokenizer: TextTokenizer | None) -> np.ndarray:
    """int32[P, p]."""
    try:
        if tokenizer is not None:
            return tokenizer(prompts).ids
        if config.stage2.use_cls_cond:
            labels = [int(prompt) for prompt in prompts] or np.zeros(0, np.int32)  # numpy takes [] for floats
            return class_prefix(config.stage2, labels, len(prompts))
        return class_prefix(config.stage2, None, len(prompts))
    except (UsageError, ValueError) as error:
        raise ConfigError(f"training.sample_prompts {prompts}: {error}") from None
