"""The config.yaml of an export merges into the original's structured configuration: its fields and types, below."""

import dataclasses

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mindalle_jax.config.file import dump_config, load_config
from mindalle_jax.interop.mindalle import export_checkpoint

# The dataclasses of the original's dalle/utils/config.py. OmegaConf refuses keys that they do not have.


@dataclasses.dataclass
class DataConfig:
    dataset: str | None = None
    tokenizer_type: str = "CharBPE"
    context_length: int = 64
    image_resolution: int = 256
    transforms: str = "dalle-vqvae"
    bpe_pdrop: float | None = None


@dataclasses.dataclass
class Stage1Hparams:
    double_z: bool = False
    z_channels: int = 256
    resolution: int = 256
    in_channels: int = 3
    out_ch: int = 3
    ch: int = 128
    ch_mult: list[int] = dataclasses.field(default_factory=lambda: [1, 1, 2, 2, 4])
    num_res_blocks: int = 2
    attn_resolutions: list[int] = dataclasses.field(default_factory=lambda: [16])
    pdrop: float = 0.0


@dataclasses.dataclass
class Stage2Hparams:
    embed_dim: int = 1536
    n_layers: int = 42
    n_heads: int = 24
    n_dense_layers: int = 42
    ctx_len_img: int = 256
    ctx_len_txt: int = 64
    embd_pdrop: float = 0.0
    resid_pdrop: float = 0.0
    attn_pdrop: float = 0.0
    mlp_bias: bool = True
    attn_bias: bool = True
    gelu_use_approx: bool = False
    use_head_txt: bool = True
    n_classes: int | None = None


@dataclasses.dataclass
class Stage1Config:
    type: str = "vqgan"
    embed_dim: int = 256
    n_embed: int = 16384
    hparams: Stage1Hparams = dataclasses.field(default_factory=Stage1Hparams)


@dataclasses.dataclass
class Stage2Config:
    type: str = "transformer1d"
    vocab_size_txt: int = 16384
    vocab_size_img: int = 16384
    use_cls_cond: bool | None = None
    hparams: Stage2Hparams = dataclasses.field(default_factory=Stage2Hparams)


@dataclasses.dataclass
class OptConfig:
    opt_type: str = "adamW"
    base_lr: float = 1e-4
    weight_decay: float = 1e-4
    betas: list[float] = dataclasses.field(default_factory=lambda: [0.9, 0.99])
    grad_clip_norm: float = 1.0
    sched_type: str = "cosine"
    max_steps: int = 0
    min_lr: float = 0.0


@dataclasses.dataclass
class ExpConfig:
    local_batch_size: int = 4
    total_batch_size: int = 512
    valid_batch_size: int = 32
    epochs: int = 10
    save_ckpt_freq: int = 2
    test_freq: int = 1
    use_amp: bool = True


@dataclasses.dataclass
class DefaultConfig:
    """Of a text-to-image model."""

    dataset: DataConfig = dataclasses.field(default_factory=DataConfig)
    stage1: Stage1Config = dataclasses.field(default_factory=Stage1Config)
    stage2: Stage2Config = dataclasses.field(default_factory=Stage2Config)


@dataclasses.dataclass
class FineTuningConfig(DefaultConfig):
    """Of transfer training, whose result is an image-only model."""

    optimizer: OptConfig = dataclasses.field(default_factory=OptConfig)
    experiment: ExpConfig = dataclasses.field(default_factory=ExpConfig)


def merged(text: str, kind: type) -> dict:
    """The configuration as the original reads it."""
    return OmegaConf.to_container(OmegaConf.merge(OmegaConf.structured(kind), OmegaConf.create(text)))


@pytest.mark.parametrize("kind", [DefaultConfig, FineTuningConfig])
def test_an_export_is_read_by_the_original(kind, tmp_path, request, tiny_model_folder, tiny_igpt_model_folder):
    """Its config.yaml once had sections that the original does not know, and null where it wants a number."""
    source = tiny_model_folder if kind is DefaultConfig else tiny_igpt_model_folder
    export_checkpoint(source, tmp_path / "out")
    text = (tmp_path / "out" / "config.yaml").read_text(encoding="utf-8")
    found, ours = merged(text, kind), load_config(source / "config.yaml")
    assert found["dataset"] == dataclasses.asdict(ours.dataset)
    hparams = dataclasses.asdict(ours.stage2.hparams)
    assert hparams["n_dense_layers"] is None and found["stage2"]["hparams"] == hparams | {"n_dense_layers": 2}
    assert found["stage2"]["use_cls_cond"] is ours.stage2.use_cls_cond
    assert found["stage1"]["hparams"]["ch_mult"] == [1, 1, 2] and "num_groups" not in found["stage1"]["hparams"]
    assert list(found) == [field.name for field in dataclasses.fields(kind)]
    if kind is FineTuningConfig:
        assert found["optimizer"]["betas"] == list(ours.optimizer.betas)
    with pytest.raises(OmegaConfBaseException):  # what a model folder holds is not what the original reads
        merged(dump_config(ours), DefaultConfig)


def test_an_optimizer_of_ours_is_not_exported(tmp_path, tiny_igpt_config, write_folder):
    """The original's transfer training knows AdamW alone, and would stop at another one."""
    from mindalle_jax.interop.mindalle import import_checkpoint

    muon = dataclasses.replace(tiny_igpt_config.optimizer, opt_type="muon", base_lr=3e-3)
    config = dataclasses.replace(tiny_igpt_config, optimizer=muon)
    folder = import_checkpoint(write_folder(tmp_path / "source", config), tmp_path / "model").target
    export_checkpoint(folder, tmp_path / "out")
    found = merged((tmp_path / "out" / "config.yaml").read_text(encoding="utf-8"), FineTuningConfig)
    assert found["optimizer"]["opt_type"] == "adamW" and found["optimizer"]["base_lr"] == 3e-3
