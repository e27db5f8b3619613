"""interop/key_maps.py: the tables name every weight once, with the keys and shapes of the PyTorch modules."""

import dataclasses

import numpy as np
import pytest
import yaml

from mindalle_jax.config.file import dump_config
from mindalle_jax.config.schema import Config
from mindalle_jax.interop.key_maps import slots
from mindalle_jax.storage.weights import leaf_shapes


def random_config(base: Config, seed: int) -> Config:
    rng = np.random.default_rng(seed)
    levels = int(rng.integers(1, 4))
    h1 = dataclasses.replace(
        base.stage1.hparams,
        ch_mult=tuple(int(m) for m in rng.integers(1, 3, levels)),
        num_res_blocks=int(rng.integers(1, 3)),
        attn_resolutions=tuple(int(r) for r in rng.choice([8, 16, 32], rng.integers(0, 3), replace=False)),
        z_channels=int(rng.integers(1, 40)),
    )
    stage1 = dataclasses.replace(base.stage1, hparams=h1, embed_dim=int(rng.integers(1, 40)))
    kind = rng.choice(["text", "cls", "uncond"])
    heads = int(rng.integers(1, 4))
    h2 = dataclasses.replace(
        base.stage2.hparams,
        n_heads=heads,
        embed_dim=heads * int(rng.integers(1, 9)),
        n_layers=int(rng.integers(1, 5)),
        attn_bias=bool(rng.integers(2)),
        mlp_bias=bool(rng.integers(2)),
        ctx_len_img=stage1.code_size**2,
        n_classes=7 if kind == "cls" else None,
    )
    stage2 = dataclasses.replace(
        base.stage2, type="transformer1d" if kind == "text" else "igpt", use_cls_cond=kind == "cls", hparams=h2
    )
    return dataclasses.replace(base, stage1=stage1, stage2=stage2)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_every_leaf_is_filled_once_and_every_key_used_once(tiny_config, stage, seed):
    config = random_config(tiny_config, seed)
    shapes, table = leaf_shapes(config, stage), slots(config, stage)
    filled = {path: np.zeros(shape, np.int8) for path, shape in shapes.items()}
    for slot in table:
        part = filled[slot.path][slot.index]
        assert slot.from_torch(np.empty(slot.torch_shape, np.int8)).size == part.size
        assert slot.to_torch(slot.from_torch(np.empty(slot.torch_shape, np.int8))).shape == slot.torch_shape
        filled[slot.path][slot.index] += 1
    assert all((count == 1).all() for count in filled.values())
    assert len({slot.torch_key for slot in table}) == len(table)
    assert [slot.path for slot in table] == sorted(slot.path for slot in table), "written in the order of the file"


@pytest.mark.parametrize("seed", range(8))
def test_the_tables_hold_the_keys_and_shapes_of_the_modules(tiny_config, oracle, seed):
    config = random_config(tiny_config, seed)
    transformer, vqgan = oracle.configs_from_dict(yaml.safe_load(dump_config(config)))
    stage2 = oracle.ImageTransformer if config.image_only else oracle.Transformer
    for stage, module in {"stage1": oracle.VQGAN(vqgan), "stage2": stage2(transformer)}.items():
        expected = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
        assert {slot.torch_key: slot.torch_shape for slot in slots(config, stage)} == expected


def test_the_released_model_has_the_published_sizes():
    """1,291,081,728 and 76,073,859 parameters were counted on the original."""
    from mindalle_jax.storage.weights import count_parameters

    assert (count_parameters(Config(), "stage1"), count_parameters(Config(), "stage2")) == (76_073_859, 1_291_081_728)
