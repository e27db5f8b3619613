"""The configuration of a fine-tuning run: config.yaml of the model, and what is of no concern to a model.

The original's recipes are such files too: they have the first five sections alone.
"""

import dataclasses
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from mindalle_jax.config import Config, load_config
from mindalle_jax.errors import ConfigError
from mindalle_jax.models.transformer import Remat
from mindalle_jax.sharding import AXES, Strategy


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the pictures are; docs/fine-tuning.md shows the formats."""

    train: str = ""
    """Folder, tar files, or codes from scripts/prepare_codes.py."""
    valid: str | None = None
    """The same for validation; None: no validation."""
    threads: int = 8
    """Threads that read, decode and crop pictures."""


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters in place of training the weights themselves (Hu et al., 2021)."""

    rank: int = 0
    """0: off."""
    alpha: float = 16.0
    """An adapter's product is scaled by alpha / rank."""
    targets: tuple[str, ...] = ("blocks/qkv/weight", "blocks/proj/weight", "blocks/fc1/weight", "blocks/fc2/weight")
    """Patterns of the parameters that get one; a parameter is adapted if one of them matches its whole path."""


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """What is trained, and how."""

    init_from: str = "minDALL-E/1.3B"
    """The model to start from, as for `mindalle sample`: a folder or a name."""
    head: Literal["fresh", "head_img"] = "fresh"
    """Head of an image-only model that starts from a text-to-image model: drawn anew as in the original, or taken."""
    seed: int = 0
    """Of the order of the data, its crops, dropout and fresh parameters."""
    text_loss_weight: float = 0.125
    """Of the text term. A caption has fewer tokens that count than a picture has codes, and the text is not drawn: at
    full weight it would be learned at the expense of the pictures. As in DALL-E (Ramesh et al., 2021)."""
    caption_dropout: float = 0.0
    """Share of captions that are left blank, for guidance_scale; 0.1 is usual."""
    warmup_steps: int = 0
    """Updates over which the learning rate rises from 0."""
    decay: Literal["all", "matrices"] = "all"
    """What weight_decay covers: every parameter, as in the original, or those of two and more axes but tables."""
    ema_decay: float = 0.0
    """Of the moving average of the parameters that is validated, sampled and saved as the model; 0: off."""
    freeze: tuple[str, ...] = ()
    """Patterns of parameters that stay as they are; a whole path must match: `blocks/.*`, `tok_emb_img/embedding`."""
    remat: Remat = "dots"
    """What the backward pass computes again to save memory: none, dots (little) or full (more, a third slower)."""
    lora: LoraConfig = LoraConfig()
    keep_checkpoints: int = 2
    checkpoint_every_steps: int = 0
    """Updates between checkpoints; 0: as experiment.save_ckpt_freq, in epochs."""
    validate_every_steps: int = 0
    """Updates between validations; 0: as experiment.test_freq, in epochs."""
    sample_every_steps: int = 0
    """Updates between samples of sample_prompts; 0: none."""
    sample_prompts: tuple[str, ...] = ()
    """Prompts, or numbers of classes, to draw while training."""


@dataclasses.dataclass(frozen=True)
class ShardingConfig:
    """How the state is spread over devices; sharding.py has the table."""

    strategy: Strategy = "replicated"
    mesh: tuple[str, ...] = ()
    """Sizes of mesh axes, as `fsdp=4`; the one that the strategy is named after takes the devices that are left."""

    def sizes(self) -> dict[str, int]:
        """mesh as {axis: size}."""
        sizes = {}
        for part in self.mesh:
            match = re.fullmatch(rf"({'|'.join(AXES)})=([1-9]\d*)", part)
            if not match:
                raise ConfigError(f"sharding.mesh: {part!r} is not one of {', '.join(AXES)} with its size, as fsdp=4")
            sizes[match[1]] = int(match[2])
        return sizes


@dataclasses.dataclass(frozen=True)
class FinetuneConfig(Config):
    """A whole file for `mindalle finetune`."""

    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    sharding: ShardingConfig = ShardingConfig()

    def model_config(self) -> Config:
        """The part that lies with the model."""
        return Config(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Config)})


def load_finetune_config(path: str | Path, overrides: Iterable[str] = (), base: Config | None = None) -> FinetuneConfig:
    """As config.load_config, base being the configuration of the model to start from.

    Raises ConfigError also for values of training that no run can have.
    """
    config = load_config(path, overrides, FinetuneConfig, base)
    t = config.training
    for name, value in (("caption_dropout", t.caption_dropout), ("ema_decay", t.ema_decay)):
        if not 0 <= value < 1:
            raise ConfigError(f"{path}: training.{name} must lie in [0, 1), not {value}")
    if not 0 <= t.text_loss_weight < math.inf:
        raise ConfigError(
            f"{path}: training.text_loss_weight must be a finite number of at least 0, not {t.text_loss_weight}"
        )
    if not 0 <= t.seed < 2**32:
        raise ConfigError(f"{path}: training.seed must lie in [0, 4294967296), not {t.seed}")
    for name in (
        "warmup_steps", "keep_checkpoints", "checkpoint_every_steps", "validate_every_steps", "sample_every_steps",
    ):  # fmt: skip
        if getattr(t, name) < (name == "keep_checkpoints"):
            raise ConfigError(f"{path}: training.{name} must be at least {int(name == 'keep_checkpoints')}")
    if t.lora.rank < 0:
        raise ConfigError(f"{path}: training.lora.rank must be at least 0, not {t.lora.rank}")
    if not 0 < t.lora.alpha < math.inf:
        raise ConfigError(f"{path}: training.lora.alpha must be a finite number over 0, not {t.lora.alpha}")
    if config.data.threads < 1:
        raise ConfigError(f"{path}: data.threads must be at least 1, not {config.data.threads}")
    for pattern in (*t.freeze, *t.lora.targets):
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"{path}: {pattern!r} is not a pattern: {error}") from None
    config.sharding.sizes()
    return config
