"""The configuration of a run of `mindalle train-vqgan`."""

import dataclasses
import math

from mindalle_jax.config.schema import OptimizerConfig, Stage1Config, check_stage1
from mindalle_jax.errors import ConfigError
from mindalle_jax.training.config import SCRATCH, LoopConfig, RunConfig


@dataclasses.dataclass(frozen=True)
class VqganOptimizerConfig(OptimizerConfig):
    """AdamW as the VQGAN's authors have it: Adam, that is, and little memory of past gradients."""

    weight_decay: float = 0.0
    betas: tuple[float, ...] = (0.5, 0.9)


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights of the terms; the head of training/vqgan/step.py has the formulas."""

    l1: float = 1.0
    l2: float = 0.0
    perceptual: float = 0.0
    """Weight of LPIPS, whose files training.vgg_weights and training.lpips_weights name; 1 in the paper."""
    codebook: float = 1.0
    commitment: float = 0.25
    locality: float = 0.0
    """Weight of the change of the features of a part of an image when it is put beside a part of another image. Over 0,
    images are mixed of parts, and codes tell of their own place alone, which a transformer learns more easily."""
    adversarial: float = 0.0
    """Weight of the discriminator, times the adaptive weight; 0: there is none. 0.75 in the published network."""
    start_step: int = 0
    """Steps before the discriminator sets in: reconstructions should be good by then."""


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    """Sizes of training/vqgan/discriminator.py."""

    width: int = 64
    layers: int = 3


@dataclasses.dataclass(frozen=True)
class VqganTrainingConfig(LoopConfig):
    """The section `training` of a run that trains a VQGAN."""

    init_from: str = SCRATCH
    """scratch: a fresh VQGAN; else the model whose VQGAN is trained further: a folder or a name."""
    losses: LossConfig = LossConfig()
    vgg_weights: str = ""
    """File with torchvision's state dict of vgg16, for losses.perceptual."""
    lpips_weights: str = ""
    """File with LPIPS's linear layers for vgg16, for losses.perceptual."""
    quantise_from_step: int = 0
    """Steps before codes are used: until then the decoder sees features, and learns faster. Validation uses codes."""
    restart_after_steps: int = 200
    """A code that went unused for this many steps starts again from a feature where images are worst; 0: never."""
    merge_codes: float = 0.0
    """At the end a row of the codebook is removed if its squared distance from a row in more use is less than this
    number times the mean squared distance of features from their rows. Before the end a row nearer than that mean
    starts again as if unused. 0: neither."""
    discriminator: DiscriminatorConfig = DiscriminatorConfig()


@dataclasses.dataclass(frozen=True)
class VqganTrainConfig(RunConfig):
    """The file of `mindalle train-vqgan`."""

    optimizer: VqganOptimizerConfig = VqganOptimizerConfig()
    training: VqganTrainingConfig = VqganTrainingConfig()
    stage1: Stage1Config = Stage1Config()

    def check(self) -> None:
        """As RunConfig.check, and for the VQGAN and its losses."""
        super().check()
        check_stage1(self.stage1)
        t, size = self.training, self.stage1.hparams.resolution
        for field in dataclasses.fields(t.losses):
            value = getattr(t.losses, field.name)
            if not 0 <= value < math.inf:
                raise ConfigError(f"training.losses.{field.name} must be a finite number of at least 0, not {value}")
        if t.losses.l1 == t.losses.l2 == t.losses.perceptual == 0:
            raise ConfigError("training.losses: one of l1, l2 and perceptual must be over 0, or nothing is learned")
        if bool(t.vgg_weights and t.lpips_weights) != bool(t.losses.perceptual) or (
            bool(t.vgg_weights) != bool(t.lpips_weights)
        ):
            raise ConfigError(
                "training.losses.perceptual over 0 needs training.vgg_weights and training.lpips_weights, and they it"
            )
        for name in ("quantise_from_step", "restart_after_steps", "merge_codes"):
            if not 0 <= getattr(t, name) < math.inf:
                raise ConfigError(f"training.{name} must be a finite number of at least 0, not {getattr(t, name)}")
        width, layers = t.discriminator.width, t.discriminator.layers
        if width < 1 or width % 32:
            raise ConfigError(f"training.discriminator.width must be a multiple of 32 (GroupNorm), not {width}")
        most = int(math.log2(size / 3)) if size >= 6 else 0
        if not 1 <= layers <= most and t.losses.adversarial:
            raise ConfigError(
                f"training.discriminator.layers must lie in [1, {most}] for images of {size} pixels, not {layers}"
            )
        if self.sharding.strategy != "replicated":
            raise ConfigError(
                f"sharding.strategy {self.sharding.strategy!r}: a VQGAN is whole on every device; use replicated"
            )
