"""config/schema.py: values that contradict each other are refused when a configuration is read."""

import pytest

from mindalle_jax.config.file import dump_config, parse_config
from mindalle_jax.errors import ConfigError


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stage2.hparams.n_heads=5"], "embed_dim 32 must be a multiple of n_heads 5"),
        (["stage2.hparams.n_dense_layers=3"], "n_dense_layers 3 must equal n_layers 2"),
        (["stage2.hparams.ctx_len_img=60"], "ctx_len_img 60 must be the number of codes in an image: 8 x 8 = 64"),
        (["stage2.hparams.ctx_len_txt=13"], "ctx_len_txt 13 must equal dataset.context_length 12"),
        (["stage2.vocab_size_img=81"], "vocab_size_img 81 must equal stage1.n_embed 80"),
        (["dataset.image_resolution=64"], "image_resolution 64 and stage1.hparams.resolution 32 must be equal"),
        (["stage1.hparams.resolution=30", "dataset.image_resolution=30"], "resolution 30 must be a multiple of 4"),
        (["stage1.hparams.ch=48"], "ch must be a multiple of num_groups 32"),
        (["stage1.hparams.ch_mult=[]"], "ch_mult must list positive numbers"),
        (["stage1.hparams.ch_mult=[1, 0, 2]"], "ch_mult must list positive numbers"),
        (["stage1.hparams.double_z=true"], "double_z true"),
        (["stage1.hparams.out_ch=1"], "in_channels and out_ch must be 3"),
        (["optimizer.base_lr=.nan"], "base_lr must be a finite number of at least 0, not nan"),
        (["optimizer.max_steps=-3"], "max_steps must be a finite number of at least 0, not -3"),
        (["optimizer.betas=[0.9]"], "betas must be two numbers"),
        (["optimizer.betas=[0.9, 1.0]"], "betas must be two numbers"),
        (["experiment.epochs=0"], "epochs must be at least 1, not 0"),
        (["experiment.total_batch_size=-1"], "total_batch_size must be at least 1, not -1"),
        (["stage2.type=igpt", "stage2.use_cls_cond=true"], "use_cls_cond needs stage2.hparams.n_classes"),
        (["stage2.type=igpt", "stage2.use_cls_cond=true", "stage2.hparams.n_classes=0"], "needs .*n_classes"),
        (["stage2.hparams.n_layers=0"], "n_layers must be at least 1, not 0"),
        (["stage2.hparams.embed_dim=-32"], "embed_dim must be at least 1, not -32"),
        (["stage1.n_embed=0"], "n_embed must be at least 1"),
        (["dataset.context_length=0"], "context_length must be at least 1"),
        (["stage1.hparams.num_res_blocks=0"], "num_res_blocks must be at least 1"),
        (["stage2.hparams.attn_pdrop=1.0"], r"attn_pdrop is a probability in \[0, 1\), not 1.0"),
        (["stage2.hparams.embd_pdrop=-0.1"], "embd_pdrop is a probability"),
        (["stage2.hparams.resid_pdrop=.nan"], "resid_pdrop is a probability"),
        (["stage1.hparams.pdrop=2"], "pdrop is a probability"),
    ],
)
def test_values_that_contradict_each_other_are_refused(tiny_config, overrides, message):
    """At the first look, not after the weights are loaded, or never, with a wrong picture."""
    with pytest.raises(ConfigError, match=message) as raised:
        parse_config(dump_config(tiny_config), overrides)
    assert "\n" not in str(raised.value)


def test_what_the_image_only_model_ignores_is_not_checked(tiny_config):
    """It has no text: the original's recipes leave ctx_len_txt as it was."""
    config = parse_config(dump_config(tiny_config), ["stage2.type=igpt", "stage2.hparams.ctx_len_txt=99"])
    assert config.image_only


def test_an_equal_n_dense_layers_is_accepted(tiny_config):
    config = parse_config(dump_config(tiny_config), ["stage2.hparams.n_dense_layers=2"])
    assert config.stage2.hparams.n_dense_layers == 2
