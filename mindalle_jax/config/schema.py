"""The fields of config.yaml, their defaults, bounds and meaning.

The original implementation has the same file, so the config.yaml of a published model works as it is. A file may leave
out any field. Unknown fields and values of a wrong type are errors that name the nearest match.
"""

import dataclasses
import math
from typing import Literal

from mindalle_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """The data set that the model was trained on."""

    dataset: str | None = None
    """Name of the training set; `imagenet` in the transfer recipes."""
    transforms: str = "dalle-vqvae"
    """Read and ignored, as in the original."""
    tokenizer_type: Literal["CharBPE"] = "CharBPE"
    context_length: int = 64
    """Number of text positions N. Prompts are padded or cut to this many tokens."""
    image_resolution: int = 256
    """Height and width of the images, in pixels."""
    bpe_pdrop: float | None = None
    """Read and ignored, as in the original."""


@dataclasses.dataclass(frozen=True)
class Stage1Hparams:
    """Encoder and decoder of the VQGAN."""

    double_z: bool = False
    """Must be False. True would be a variational encoder, which this model does not have."""
    z_channels: int = 256
    resolution: int = 256
    """Height and width of the images, in pixels."""
    in_channels: int = 3
    out_ch: int = 3
    ch: int = 128
    """Number of channels of the finest level. Level l has ch * ch_mult[l] channels."""
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    num_groups: int = 32
    """Number of groups of channels in each GroupNorm: 32 in the original, which has no such field. Narrow networks need
    fewer groups. A channel that is its own group loses its mean, and so the colors of the image."""
    attn_resolutions: tuple[int, ...] = (16,)
    """Resolutions in pixels. In levels of these resolutions attention follows every residual block."""
    pdrop: float = 0.0


@dataclasses.dataclass(frozen=True)
class Stage1Config:
    """The VQGAN, which turns images into codes and back."""

    type: Literal["vqgan"] = "vqgan"
    embed_dim: int = 256
    """Width of a codebook row."""
    n_embed: int = 16384
    """Number of codes."""
    hparams: Stage1Hparams = Stage1Hparams()

    @property
    def code_size(self) -> int:
        """Height and width of the grid of codes of one image: 16 for f16 at 256 pixels."""
        return self.hparams.resolution // 2 ** (len(self.hparams.ch_mult) - 1)


@dataclasses.dataclass(frozen=True)
class Stage2Hparams:
    """The transformer."""

    embed_dim: int = 1536
    n_layers: int = 42
    n_heads: int = 24
    n_dense_layers: int | None = None
    """Must equal n_layers, or be left out."""
    ctx_len_img: int = 256
    """Number of image positions T: codes per image."""
    ctx_len_txt: int = 64
    """Number of text positions N. The image-only model ignores it."""
    embd_pdrop: float = 0.0
    resid_pdrop: float = 0.0
    attn_pdrop: float = 0.0
    mlp_bias: bool = True
    attn_bias: bool = True
    gelu_use_approx: bool = False
    """True: x * sigmoid(1.702 x); False: the exact GELU."""
    use_head_txt: bool = True
    """Read and ignored, as in the original: the text head always exists."""
    n_classes: int | None = None
    """Number of classes of the class-conditional image-only model."""


@dataclasses.dataclass(frozen=True)
class Stage2Config:
    """The transformer that samples the codes."""

    type: Literal["transformer1d", "igpt"] = "transformer1d"
    """transformer1d: text to image. igpt: image only, class-conditional or not."""
    vocab_size_txt: int = 16384
    vocab_size_img: int = 16384
    use_cls_cond: bool | None = None
    hparams: Stage2Hparams = Stage2Hparams()


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The section `optimizer`, for training: the optimizer and its schedule."""

    opt_type: Literal["adamW", "muon"] = "adamW"
    """muon: Muon for the matrices between the first and the last layer, and AdamW for the rest. From scratch it learns
    far more per image."""
    base_lr: float = 1e-4
    weight_decay: float = 1e-4
    betas: tuple[float, ...] = (0.9, 0.99)
    grad_clip_norm: float = 1.0
    sched_type: Literal["cosine", "constant"] = "cosine"
    """cosine: from base_lr to min_lr. constant: base_lr, so that a run that is extended equals a longer one."""
    max_steps: int = 0
    """Number of steps, after which the learning rate is min_lr; 0: (images // total_batch_size) * epochs."""
    min_lr: float = 0.0


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """The section `experiment`, for training: batches and epochs."""

    local_batch_size: int = 4
    total_batch_size: int = 512
    valid_batch_size: int = 32
    epochs: int = 10
    save_ckpt_freq: int = 2
    """Number of epochs between checkpoints."""
    test_freq: int = 1
    """Number of epochs between validations."""
    use_amp: bool = True


@dataclasses.dataclass(frozen=True)
class Config:
    """The content of a config.yaml."""

    dataset: DatasetConfig = DatasetConfig()
    stage1: Stage1Config = Stage1Config()
    stage2: Stage2Config = Stage2Config()
    optimizer: OptimizerConfig = OptimizerConfig()
    experiment: ExperimentConfig = ExperimentConfig()

    @property
    def image_only(self) -> bool:
        """Whether stage 2 is the image-only transformer (igpt)."""
        return self.stage2.type == "igpt"

    def check(self) -> None:
        """Raises ConfigError for values out of range, and for values that contradict each other."""
        check_stage1(self.stage1)
        _check_stage2(self)
        check_optimization(self.optimizer, self.experiment)


def _refuse(condition: bool, message: str) -> None:
    if condition:
        raise ConfigError(message)


def _check_sizes(sizes: dict[str, int]) -> None:
    for path, size in sizes.items():
        _refuse(size < 1, f"{path} must be at least 1, not {size}")


def check_stage1(stage1: Stage1Config) -> None:
    """Raises ConfigError for sizes that no VQGAN can have."""
    h = stage1.hparams
    _check_sizes(
        {"stage1.embed_dim": stage1.embed_dim, "stage1.n_embed": stage1.n_embed}
        | {
            f"stage1.hparams.{k}": getattr(h, k)
            for k in ("z_channels", "resolution", "in_channels", "out_ch", "ch", "num_groups")
        }
        | {"stage1.hparams.num_res_blocks": h.num_res_blocks}
    )
    _refuse(not h.ch_mult or min(h.ch_mult) < 1, f"stage1.hparams.ch_mult must list positive numbers, not {h.ch_mult}")
    _refuse(h.double_z, "stage1.hparams.double_z true is a variational encoder, which this model does not have")
    groups = h.num_groups
    _refuse(h.ch % groups != 0, f"stage1.hparams.ch must be a multiple of num_groups {groups} (GroupNorm), not {h.ch}")
    levels = len(h.ch_mult) - 1
    _refuse(
        h.resolution % 2**levels != 0,
        f"stage1.hparams.resolution {h.resolution} must be a multiple of {2**levels} (two per level of ch_mult)",
    )
    _refuse(
        (h.in_channels, h.out_ch) != (3, 3),
        f"stage1.hparams.in_channels and out_ch must be 3 (red, green, blue), not {h.in_channels} and {h.out_ch}",
    )
    _check_rates({"stage1.hparams.pdrop": h.pdrop})


def _check_stage2(config: Config) -> None:
    """Checks stage 2, and whether it fits the VQGAN and the data."""
    s1, s2 = config.stage1, config.stage2
    h1, h2 = s1.hparams, s2.hparams
    _check_sizes(
        {
            "dataset.context_length": config.dataset.context_length,
            "dataset.image_resolution": config.dataset.image_resolution,
            "stage2.vocab_size_txt": s2.vocab_size_txt,
            "stage2.vocab_size_img": s2.vocab_size_img,
        }
        | {
            f"stage2.hparams.{k}": getattr(h2, k)
            for k in ("embed_dim", "n_layers", "n_heads", "ctx_len_img", "ctx_len_txt")
        }
    )
    _refuse(
        config.dataset.image_resolution != h1.resolution,
        f"dataset.image_resolution {config.dataset.image_resolution} and stage1.hparams.resolution {h1.resolution} "
        "must be equal: a model has only one image size",
    )
    _refuse(
        h2.ctx_len_img != s1.code_size**2,
        f"stage2.hparams.ctx_len_img {h2.ctx_len_img} must be the number of codes in an image: "
        f"{s1.code_size} x {s1.code_size} = {s1.code_size**2}",
    )
    _refuse(
        s2.vocab_size_img != s1.n_embed,
        f"stage2.vocab_size_img {s2.vocab_size_img} must equal stage1.n_embed {s1.n_embed}",
    )
    _refuse(
        h2.embed_dim % h2.n_heads != 0,
        f"stage2.hparams.embed_dim {h2.embed_dim} must be a multiple of n_heads {h2.n_heads}",
    )
    _refuse(
        h2.n_dense_layers not in (None, h2.n_layers),
        f"stage2.hparams.n_dense_layers {h2.n_dense_layers} must equal n_layers {h2.n_layers}",
    )
    _refuse(
        not config.image_only and h2.ctx_len_txt != config.dataset.context_length,
        f"stage2.hparams.ctx_len_txt {h2.ctx_len_txt} must equal dataset.context_length "
        f"{config.dataset.context_length}",
    )
    _refuse(
        config.image_only and bool(s2.use_cls_cond) and (h2.n_classes is None or h2.n_classes < 1),
        "stage2.use_cls_cond needs stage2.hparams.n_classes, the number of classes",
    )
    _check_rates({f"stage2.hparams.{k}": getattr(h2, k) for k in ("embd_pdrop", "resid_pdrop", "attn_pdrop")})


def check_optimization(optimizer: OptimizerConfig, experiment: ExperimentConfig) -> None:
    """Raises ConfigError for values of `optimizer` or `experiment` that are out of range."""
    for name in ("base_lr", "weight_decay", "max_steps", "min_lr", "grad_clip_norm"):
        value = getattr(optimizer, name)
        _refuse(not 0 <= value < math.inf, f"optimizer.{name} must be a finite number of at least 0, not {value}")
    _refuse(
        len(optimizer.betas) != 2 or not all(0 <= beta < 1 for beta in optimizer.betas),
        f"optimizer.betas must be two numbers in [0, 1), not {list(optimizer.betas)}",
    )
    for field in dataclasses.fields(experiment):
        value = getattr(experiment, field.name)
        _refuse(value < 1 and value is not False, f"experiment.{field.name} must be at least 1, not {value}")


def _check_rates(rates: dict[str, float]) -> None:
    for path, rate in rates.items():
        _refuse(not 0.0 <= rate < 1.0, f"{path} is a probability in [0, 1), not {rate}")
