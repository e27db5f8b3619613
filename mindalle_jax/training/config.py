"""The configuration of a run: the sections that every run has, and for fine-tuning those of the model's config.yaml.

The original's recipes are such files too: they have only the sections of config.yaml.
"""

import dataclasses
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from mindalle_jax.config.file import load_config
from mindalle_jax.config.schema import (
    Config,
    DatasetConfig,
    ExperimentConfig,
    OptimizerConfig,
    Stage1Config,
    Stage2Config,
    check_optimization,
)
from mindalle_jax.errors import ConfigError
from mindalle_jax.models.transformer import Remat
from mindalle_jax.runtime.sharding import AXES, Strategy
from mindalle_jax.storage.adapters import LoraConfig

SCRATCH = "scratch"
"""The value of training.init_from that stands for no model."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The images of a run; docs/fine-tuning.md shows the formats."""

    train: str = ""
    """Folder, tar files, or codes from mindalle prepare-codes."""
    valid: str | None = None
    """The same for validation; None: no validation."""
    threads: int = 8
    """Threads that read, decode and crop images."""
    group_size: int = 1
    """This many consecutive samples stay together when samples are shuffled. From images that differ little in a batch
    CLIP learns what they differ in."""


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """The section `training` of every run, whatever it trains."""

    seed: int = 0
    """Seed of the order of the data, its crops, dropout and fresh parameters."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0."""
    ema_decay: float = 0.0
    """Decay of the moving average of the parameters that is validated, sampled and saved as the model; 0: off."""
    keep_checkpoints: int = 2
    checkpoint_every_steps: int = 0
    """Steps between checkpoints; 0: as experiment.save_ckpt_freq, in epochs."""
    validate_every_steps: int = 0
    """Steps between validations; 0: as experiment.test_freq, in epochs."""
    sample_every_steps: int = 0
    """Steps between previews, images of sample_prompts; 0: none."""


@dataclasses.dataclass(frozen=True)
class ShardingConfig:
    """How the state is sharded over devices; runtime/sharding.py has the table."""

    strategy: Strategy = "replicated"
    mesh: tuple[str, ...] = ()
    """Sizes of mesh axes, as `fsdp=4`; the axis that the strategy is named after takes the devices that are left."""

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
class RunConfig:
    """The sections of the file of every run."""

    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    experiment: ExperimentConfig = ExperimentConfig()
    training: LoopConfig = LoopConfig()
    sharding: ShardingConfig = ShardingConfig()

    def check(self) -> None:
        """Raises ConfigError for values that no run can have."""
        check_optimization(self.optimizer, self.experiment)
        t = self.training
        check_share("training.ema_decay", t.ema_decay)
        if not 0 <= t.seed < 2**32:
            raise ConfigError(f"training.seed must lie in [0, 4294967296), not {t.seed}")
        lowest = {"warmup_steps": 0, "keep_checkpoints": 1, "checkpoint_every_steps": 0, "validate_every_steps": 0}
        for name, low in (lowest | {"sample_every_steps": 0}).items():
            if getattr(t, name) < low:
                raise ConfigError(f"training.{name} must be at least {low}, not {getattr(t, name)}")
        if self.data.threads < 1:
            raise ConfigError(f"data.threads must be at least 1, not {self.data.threads}")
        self.sharding.sizes()


@dataclasses.dataclass(frozen=True)
class TrainingConfig(LoopConfig):
    """The section `training` of a run that trains a transformer."""

    init_from: str = "minDALL-E/1.3B"
    """The model to start from, as for `mindalle sample`: a folder or a name; scratch: a fresh transformer."""
    vqgan: str = ""
    """From scratch: the model, or VQGAN alone, that turns images into codes; a folder or a name."""
    tokenizer: str = ""
    """From scratch: a folder with bpe-16k-vocab.json and bpe-16k-merges.txt; the default is that of `vqgan`."""
    head: Literal["fresh", "head_img"] = "fresh"
    """Head of an image-only model that starts from a text-to-image model: random as in the original, or taken over."""
    text_loss_weight: float = 0.125
    """Weight of the text term. A caption has fewer tokens that count than an image has codes, and text is not sampled:
    at full weight it would be learned at the expense of the images. As in DALL-E (Ramesh et al., 2021)."""
    caption_dropout: float = 0.0
    """Share of captions that are left blank, for guidance_scale; 0.1 is usual."""
    decay: Literal["all", "matrices"] = "all"
    """The parameters that weight_decay covers: all, as in the original, or those of two and more axes but tables."""
    freeze: tuple[str, ...] = ()
    """Patterns of parameters that stay as they are; a whole path must match: `blocks/.*`, `tok_emb_img/embedding`."""
    remat: Remat = "dots"
    """Recomputation in the backward pass, to save memory: none, dots (little) or full (more, a third slower)."""
    flash_attention: bool = False
    """Attention by cuDNN, which keeps no weights of it: NVIDIA GPUs since Ampere, bfloat16, no dropout of attention."""
    lora: LoraConfig = LoraConfig()
    sample_prompts: tuple[str, ...] = ()
    """Prompts, or numbers of classes, that are sampled every sample_every_steps."""

    def check_init_from(self) -> None:
        """Raises ConfigError for fields that do not go with init_from; before what it names is looked for."""
        if (self.init_from == SCRATCH) != bool(self.vqgan):
            raise ConfigError(
                f"training.vqgan names the model whose codes are learned, and goes with init_from: {SCRATCH}"
            )
        if self.tokenizer and self.init_from != SCRATCH:
            raise ConfigError(f"training.tokenizer goes with init_from: {SCRATCH}; other models have their own")
        if self.init_from == SCRATCH and (self.freeze or self.lora.rank):
            raise ConfigError(
                "training.freeze and training.lora keep what a model has learned; from scratch it has learned nothing"
            )


@dataclasses.dataclass(frozen=True)
class FinetuneConfig(RunConfig):
    """The file of `mindalle finetune`."""

    training: TrainingConfig = TrainingConfig()
    dataset: DatasetConfig = DatasetConfig()
    stage1: Stage1Config = Stage1Config()
    stage2: Stage2Config = Stage2Config()

    def model_config(self) -> Config:
        """The part that lies with the model."""
        return Config(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Config)})

    @property
    def image_only(self) -> bool:
        """Whether the model makes images without text."""
        return self.model_config().image_only

    def check(self) -> None:
        """As RunConfig.check, and for the model and what is trained of it."""
        super().check()
        self.model_config().check()
        t = self.training
        check_share("training.caption_dropout", t.caption_dropout)
        if not 0 <= t.text_loss_weight < math.inf:
            raise ConfigError(
                f"training.text_loss_weight must be a finite number of at least 0, not {t.text_loss_weight}"
            )
        if t.flash_attention and (not self.experiment.use_amp or self.stage2.hparams.attn_pdrop):
            raise ConfigError(
                "training.flash_attention goes with experiment.use_amp=true and stage2.hparams.attn_pdrop=0"
            )
        if t.lora.rank < 0:
            raise ConfigError(f"training.lora.rank must be at least 0, not {t.lora.rank}")
        if not 0 < t.lora.alpha < math.inf:
            raise ConfigError(f"training.lora.alpha must be a finite number over 0, not {t.lora.alpha}")
        for pattern in (*t.freeze, *t.lora.targets):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"{pattern!r} is not a pattern: {error}") from None
        t.check_init_from()


def check_share(path: str, share: float) -> None:
    """Raises ConfigError for what does not lie in [0, 1)."""
    if not 0 <= share < 1:
        raise ConfigError(f"{path} must lie in [0, 1), not {share}")


def load_finetune_config(path: str | Path, overrides: Iterable[str] = (), base: Config | None = None) -> FinetuneConfig:
    """Reads the file as config.load_config does; base: the configuration of the model to start from."""
    return load_config(path, overrides, FinetuneConfig, base)
