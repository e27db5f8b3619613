"""The configuration of a run. Every run has the sections of RunConfig; fine-tuning also has those of config.yaml.

The recipes of the original are such files too. They have only the sections of config.yaml.
"""

import dataclasses
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple

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
    """The section `data`: the images of a run. docs/fine-tuning.md shows the formats."""

    train: str = ""
    """Folder, tar files, or codes from mindalle prepare-codes."""
    valid: str | None = None
    """The same for validation; None turns validation off."""
    image_column: str | None = None
    """Name of the field with the image, in metadata files and tables; None takes a usual name, such as file_name."""
    caption_column: str | None = None
    """Name of the field with the captions; None takes text, caption, captions or prompt."""
    threads: int = 8
    """Number of threads that read, decode and crop images."""
    group_size: int = 1
    """Number of consecutive samples that stay together when samples are shuffled. If a batch has images that differ
    little, CLIP learns their differences."""


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """The fields of section `training` that every run has."""

    seed: int = 0
    """Seed of the order of the data, its crops, dropout and fresh parameters."""
    warmup_steps: int = 0
    """Number of steps in which the learning rate rises from 0."""
    ema_decay: float = 0.0
    """Decay of a moving average of the parameters. The average is validated, sampled and saved as the model; 0: off."""
    keep_checkpoints: int = 2
    checkpoint_every_steps: int = 0
    """Number of steps between checkpoints; 0: experiment.save_ckpt_freq epochs."""
    validate_every_steps: int = 0
    """Number of steps between validations; 0: experiment.test_freq epochs."""
    early_stopping: int = 0
    """Number of validations without a lower loss after which the run ends; 0: off. It needs data.valid."""
    sample_every_steps: int = 0
    """Number of steps between previews, which are images of sample_prompts; 0: none."""


@dataclasses.dataclass(frozen=True)
class ShardingConfig:
    """The section `sharding`: how the state is sharded over devices. runtime/sharding.py has the table."""

    strategy: Strategy = "replicated"
    mesh: tuple[str, ...] = ()
    """Sizes of mesh axes, such as `fsdp=4`. The axis with the name of the strategy takes the devices that are left."""

    def sizes(self) -> dict[str, int]:
        """Returns `mesh` as {axis: size}. Raises ConfigError for an entry that is not an axis with its size."""
        sizes = {}
        for part in self.mesh:
            match = re.fullmatch(rf"({'|'.join(AXES)})=([1-9]\d*)", part)
            if not match:
                axes = ", ".join(AXES)
                raise ConfigError(f"sharding.mesh: {part!r} is not one of {axes} with its size, such as fsdp=4")
            sizes[match[1]] = int(match[2])
        return sizes


class BatchPlan(NamedTuple):
    """The sizes of a run that depend on how many images there are."""

    total: int
    """Number of images in a batch, which is one step."""
    local: int
    """Number of images in a micro-batch of one device."""
    warmup_steps: int
    note: str = ""
    """Says what differs from the configuration, and why; "" if nothing does."""


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The sections that the configuration file of every run has."""

    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    experiment: ExperimentConfig = ExperimentConfig()
    training: LoopConfig = LoopConfig()
    sharding: ShardingConfig = ShardingConfig()

    def plan_batches(self, images: int, parts: int, report: object = "") -> BatchPlan:
        """Returns sizes of batches that fit the number of training images, and of parts that a batch is split in.

        They are the fields of the configuration. Only if the data has fewer images than a batch, they are lower, and
        the plan has a note. report: describes the images in messages.
        Raises ConfigError with everything else that does not fit, and with values that do.
        """
        e, warmup = self.experiment, self.training.warmup_steps
        found = report or f"{images} samples"
        if images < parts:
            raise ConfigError(f"{parts} devices share a batch, and the data has {found}: use fewer devices")
        if images < e.total_batch_size:
            power = 1 << (images.bit_length() - 1)
            total = power if power % parts == 0 else images // parts * parts
            fitted = self._fitted(images, parts, total)
            note = f"the data has {images} samples, fewer than experiment.total_batch_size {e.total_batch_size}: "
            note += f"a step takes {total}"
            if fitted.warmup_steps != warmup:
                note += f", and training.warmup_steps is {fitted.warmup_steps}"
            return fitted._replace(note=note)
        rows, steps = e.local_batch_size * parts, self.count_steps(images, e.total_batch_size)
        problems = []
        if e.total_batch_size % rows:
            problems.append(
                f"experiment.total_batch_size {e.total_batch_size} must be a multiple of {rows}: local_batch_size "
                f"{e.local_batch_size} on {parts} devices"
            )
        if warmup >= steps:
            problems.append(f"training.warmup_steps {warmup} must be below the number of steps, {steps}")
        if not problems:
            return BatchPlan(e.total_batch_size, e.local_batch_size, warmup)
        local = min(e.local_batch_size, images // parts)
        fitted = self._fitted(images, parts, max(local * parts, e.total_batch_size // (local * parts) * local * parts))
        fitting = {
            "experiment.total_batch_size": (e.total_batch_size, fitted.total),
            "experiment.local_batch_size": (e.local_batch_size, fitted.local),
            "training.warmup_steps": (warmup, fitted.warmup_steps),
        }
        line = " ".join(f"{name}={new}" for name, (old, new) in fitting.items() if new != old)
        raise ConfigError(f"{'; '.join(problems)}; this works: {line}")

    def _fitted(self, images: int, parts: int, total: int) -> BatchPlan:
        """Returns the plan of a batch of `total`, a multiple of `parts`."""
        share, steps = total // parts, self.count_steps(images, total)
        local = max(size for size in range(1, min(self.experiment.local_batch_size, share) + 1) if share % size == 0)
        warmup = self.training.warmup_steps
        return BatchPlan(total, local, warmup if warmup < steps else (steps - 1) // 2)

    def count_steps(self, images: int, batch_size: int) -> int:
        """Returns the number of steps: optimizer.max_steps, or if that is 0 that of all epochs, as in the original."""
        return self.optimizer.max_steps or images // batch_size * self.experiment.epochs

    def check(self) -> None:
        """Raises ConfigError for a value out of range."""
        check_optimization(self.optimizer, self.experiment)
        t = self.training
        check_share("training.ema_decay", t.ema_decay)
        if not 0 <= t.seed < 2**32:
            raise ConfigError(f"training.seed must lie in [0, 4294967296), not {t.seed}")
        lowest = {"warmup_steps": 0, "keep_checkpoints": 1, "checkpoint_every_steps": 0, "validate_every_steps": 0}
        for name, low in (lowest | {"sample_every_steps": 0, "early_stopping": 0}).items():
            if getattr(t, name) < low:
                raise ConfigError(f"training.{name} must be at least {low}, not {getattr(t, name)}")
        if self.data.threads < 1:
            raise ConfigError(f"data.threads must be at least 1, not {self.data.threads}")
        self.sharding.sizes()


@dataclasses.dataclass(frozen=True)
class TrainingConfig(LoopConfig):
    """The section `training` of a run that trains a transformer."""

    init_from: str = "minDALL-E/1.3B"
    """The model to start from, a folder or a name as for `mindalle sample`; "scratch" starts a fresh transformer."""
    vqgan: str = ""
    """Only from scratch: the folder or name of the model, or of the VQGAN alone, that turns images into codes."""
    tokenizer: str = ""
    """Only from scratch: a folder with bpe-16k-vocab.json and bpe-16k-merges.txt; the default is the tokenizer of
    `vqgan`."""
    head: Literal["fresh", "head_img"] = "fresh"
    """Head of an image-only model that starts from a text-to-image model: "fresh" is random, as in the original, and
    "head_img" keeps the head of the text-to-image model."""
    text_loss_weight: float = 0.125
    """Weight of the text term of the loss. A caption has fewer tokens that count than an image has codes, and text is
    not sampled. At full weight text would be learned at the expense of images. The value is that of DALL-E (Ramesh et
    al., 2021)."""
    caption_dropout: float = 0.0
    """Share of captions that are left blank, so that guidance_scale works; 0.1 is usual."""
    decay: Literal["all", "matrices"] = "all"
    """Parameters that weight_decay covers: "all", as in the original, or "matrices", without embedding tables, biases
    and gains."""
    freeze: tuple[str, ...] = ()
    """Patterns of parameters that are not trained. A pattern must match the complete path: `blocks/.*`,
    `tok_emb_img/embedding`."""
    remat: Remat = "dots"
    """Recomputation in the backward pass, to save memory: "none", "dots" (a little) or "full" (all blocks, a third
    slower)."""
    flash_attention: bool = False
    """Attention by cuDNN, which does not store the attention weights. It needs bfloat16, no dropout of attention, and
    an NVIDIA GPU of the Ampere generation or newer."""
    lora: LoraConfig = LoraConfig()
    sample_prompts: tuple[str, ...] = ()
    """Prompts, or names or numbers of classes, that are sampled every sample_every_steps."""

    def check_init_from(self) -> None:
        """Raises ConfigError for fields that do not fit init_from. It does not look for the model of init_from."""
        if (self.init_from == SCRATCH) != bool(self.vqgan):
            raise ConfigError(
                "training.vqgan names the model whose codes are learned: it must be set with init_from: "
                f"{SCRATCH}, and only then"
            )
        if self.tokenizer and self.init_from != SCRATCH:
            raise ConfigError(f"training.tokenizer works only with init_from: {SCRATCH}; other models have their own")
        if self.init_from == SCRATCH and (self.freeze or self.lora.rank):
            raise ConfigError(
                f"training.freeze and training.lora keep weights that a model has learned; with init_from: {SCRATCH} "
                "there are none"
            )


@dataclasses.dataclass(frozen=True)
class FinetuneConfig(RunConfig):
    """The configuration file of `mindalle finetune`."""

    training: TrainingConfig = TrainingConfig()
    dataset: DatasetConfig = DatasetConfig()
    stage1: Stage1Config = Stage1Config()
    stage2: Stage2Config = Stage2Config()

    def model_config(self) -> Config:
        """Returns the sections that config.yaml in the model's folder has."""
        return Config(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Config)})

    @property
    def image_only(self) -> bool:
        """Whether the model makes images without text."""
        return self.model_config().image_only

    def check(self) -> None:
        """As RunConfig.check; also checks the model and the choice of trained parameters."""
        super().check()
        self.model_config().check()
        t = self.training
        check_share("training.caption_dropout", t.caption_dropout)
        if not 0 <= t.text_loss_weight < math.inf:
            raise ConfigError(
                f"training.text_loss_weight must be a finite number of at least 0, not {t.text_loss_weight}"
            )
        if t.flash_attention and (not self.experiment.use_amp or self.stage2.hparams.attn_pdrop):
            raise ConfigError("training.flash_attention needs experiment.use_amp=true and stage2.hparams.attn_pdrop=0")
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
    """Raises ConfigError for a share that does not lie in [0, 1). path: the name of its field, for the message."""
    if not 0 <= share < 1:
        raise ConfigError(f"{path} must lie in [0, 1), not {share}")


def load_finetune_config(path: str | Path, overrides: Iterable[str] = (), base: Config | None = None) -> FinetuneConfig:
    """Reads the configuration of a run, as config.file.load_config. base: that of the model to start from."""
    return load_config(path, overrides, FinetuneConfig, base)
