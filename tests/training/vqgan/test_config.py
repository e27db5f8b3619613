"""The configuration of `mindalle train-vqgan`: what it refuses, and the files that come along."""

import pytest

from mindalle_jax.config.file import load_config
from mindalle_jax.config.schema import Config
from mindalle_jax.errors import ConfigError
from mindalle_jax.training.vqgan.config import VqganTrainConfig

TREE = """
stage1:
  embed_dim: 16
  n_embed: 64
  hparams: {z_channels: 32, resolution: 16, ch: 32, ch_mult: [1, 1], num_res_blocks: 1, attn_resolutions: []}
"""


@pytest.fixture
def config_file(tmp_path):
    (tmp_path / "vqgan.yaml").write_text(TREE)
    return tmp_path / "vqgan.yaml"


@pytest.mark.parametrize(
    "override, message",
    [
        ("training.losses.perceptual=1", "needs training.vgg_weights and training.lpips_weights"),
        ("training.vgg_weights=vgg16.pth", "needs training.vgg_weights and training.lpips_weights"),
        ("training.losses.commitment=-1", r"training.losses.commitment must be a finite number of at least 0, not -1"),
        ("training.losses.l1=0", "one of l1, l2 and perceptual must be over 0"),
        ("training.losses.adversary=1", r"unknown field training.losses.adversary; did you mean adversarial\?"),
        ("training.losses.adversarial=1", r"layers must lie in \[1, 2\] for images of 16 pixels, not 3"),
        ("training.discriminator.width=48", "multiple of 32"),
        ("training.merge_codes=.inf", "merge_codes must be a finite number"),
        ("training.restart_after_steps=-1", "restart_after_steps must be a finite number of at least 0"),
        ("training.quantise_from_step=-1", "quantise_from_step must be a finite number of at least 0"),
        ("stage1.hparams.ch=33", "stage1.hparams.ch must be a multiple of num_groups 32"),
        ("sharding.strategy=fsdp", "'fsdp': every device holds the complete VQGAN; use replicated"),
        ("stage2.type=igpt", "unknown field stage2"),
    ],
)
def test_what_no_run_can_have_is_refused(config_file, override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(config_file, [override], VqganTrainConfig)


@pytest.mark.parametrize("name", ["vqgan-f16-16384.yaml", "scenes/vqgan.yaml"])
def test_the_configurations_that_come_along_are_whole(request, name):
    """With what their header says is to be given."""
    given = ["training.vgg_weights=a", "training.lpips_weights=b"] if name.startswith("vqgan") else []
    config = load_config(request.config.rootpath / "configs" / name, given, VqganTrainConfig)
    assert config.optimizer.weight_decay == 0
    if given:
        assert config.stage1 == Config().stage1 and config.optimizer.betas == (0.5, 0.9)  # the published network
