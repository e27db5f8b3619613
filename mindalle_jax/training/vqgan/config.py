"""The configuration of a run of `mindalle train-vqgan`."""

import dataclasses
import math

from mindalle_jax.config.schema import OptimizerConfig, Stage1Config, check_stage1
from mindalle_jax.errors import ConfigError
from mindalle_jax.training.config import SCRATCH, LoopConfig, RunConfig


@dataclasses.dataclass(frozen=True)
class VqganOptimizerConfig(OptimizerConfig):
    """The optimizer with the defaults of the VQGAN's authors: no weight decay (so Adam) and a low beta1."""

    weight_decay: float = 0.0
    betas: tuple[float, ...] = (0.5, 0.9)


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights of the terms of the loss. training/vqgan/step.py has the formulas in its first docstring."""

    l1: float = 1.0
    l2: float = 0.0
    perceptual: float = 0.0
    """Weight of LPIPS, whose files training.vgg_weights and training.lpips_weights name; 1 in the paper."""
    codebook: float = 1.0
    commitment: float = 0.25
    locality: float = 0.0
    """Weight of the locality term. If it is over 0, images are composed of parts of two images. The term is the change
    of a part's features when another image is beside it. Codes then describe only their own patch, which a transformer
    learns more easily."""
    adversarial: float = 0.0
    """Weight of the discriminator, times the adaptive weight; 0: no discriminator. 0.75 in the published network."""
    start_step: int = 0
    """Number of steps before the discriminator starts. Reconstructions should be good by then."""


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    """Sizes of training/vqgan/discriminator.py."""

    width: int = 64
    layers: int = 3


@dataclasses.dataclass(frozen=True)
class VqganTrainingConfig(LoopConfig):
    """The section `training` of a run that trains a VQGAN."""

    init_from: str = SCRATCH
    """"scratch" for a fresh VQGAN; else the folder or name of the model whose VQGAN is trained further."""
    losses: LossConfig = LossConfig()
    vgg_weights: str = ""
    """File with torchvision's state dict of vgg16, for losses.perceptual."""
    lpips_weights: str = ""
    """File with LPIPS's linear layers for vgg16, for losses.perceptual."""
    quantise_from_step: int = 0
    """Number of steps before codes are used. Until then the decoder sees features, and learns faster. Validation always
    uses codes."""
    restart_after_steps: int = 200
    """A code that is unused for this many steps restarts from a feature where images are worst; 0: never."""
    merge_codes: float = 0.0
    """Removes similar codes. At the end a row of the codebook is removed if its squared distance from a more used row
    is less than this number times d, the mean squared distance of features from their rows. During training a row that
    is nearer than d to another row restarts like an unused one. 0: neither."""
    discriminator: DiscriminatorConfig = DiscriminatorConfig()


@dataclasses.dataclass(frozen=True)
class VqganTrainConfig(RunConfig):
    """The configuration file of `mindalle train-vqgan`."""

    optimizer: VqganOptimizerConfig = VqganOptimizerConfig()
    training: VqganTrainingConfig = VqganTrainingConfig()
    stage1: Stage1Config = Stage1Config()

    def check(self) -> None:
        """As RunConfig.check; also checks the VQGAN and its losses."""
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
                "training.losses.perceptual over 0 needs training.vgg_weights and training.lpips_weights; without it "
                "leave both out"
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
                f"sharding.strategy {self.sharding.strategy!r}: every device holds the complete VQGAN; use replicated"
            )
