"""The VQGAN against the same network in PyTorch, and the rules of its codes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mindalle_jax.config.schema import Config, Stage1Config, Stage1Hparams
from mindalle_jax.models.vqgan import VQGAN

TOLERANCE = 1e-4
"""Absolute, on features and pixels of order 1 in float32; the two programs were seen to differ by 1e-5."""

CONFIGS = [
    # ch_mult, resolution, attn_resolutions, num_res_blocks, z_channels, embed_dim, n_embed
    ((1,), 8, (), 1, 16, 16, 40),  # one level: nothing is resampled
    ((1, 1), 16, (8,), 1, 32, 32, 64),
    ((1, 2), 16, (16,), 1, 24, 16, 50),  # widths change, attention at the finest level, z_channels != embed_dim
    ((2, 1), 16, (8, 16), 1, 8, 40, 30),  # narrower downwards; attention at every level
    ((1, 2, 2), 32, (8,), 2, 20, 12, 90),
    ((1, 1, 2, 3), 32, (4,), 1, 16, 16, 33),
    ((1, 3, 1), 24, (12, 6), 1, 10, 6, 64),  # no power of two
    ((2, 2), 12, (7,), 1, 16, 48, 20),  # no level has this resolution
    ((1, 2), 20, (10,), 2, 64, 8, 128),
    ((1, 1, 1, 1, 2), 32, (2, 16), 1, 16, 16, 64),  # five levels, as the released model; 2 x 2 codes
]


def config_of(ch_mult, resolution, attn_resolutions, num_res_blocks, z_channels, embed_dim, n_embed) -> Config:
    hparams = Stage1Hparams(
        z_channels=z_channels,
        resolution=resolution,
        ch=32,
        ch_mult=ch_mult,
        num_res_blocks=num_res_blocks,
        attn_resolutions=attn_resolutions,
    )
    return Config(stage1=Stage1Config(embed_dim=embed_dim, n_embed=n_embed, hparams=hparams))


SMALL = config_of((1, 2), 16, (8,), 1, 24, 16, 50)


def run(model: VQGAN, params, *inputs, method):
    # Each network runs once or twice: LLVM need not optimise what compiling takes 100 times as long as running.
    @jax.jit(compiler_options={"xla_backend_optimization_level": "0"})
    def compiled(params, *inputs):
        return model.apply({"params": params}, *inputs, method=method)

    with jax.default_matmul_precision("highest"):
        return jax.tree.map(np.asarray, compiled(params, *inputs))


def everything(model: VQGAN, images, codes):
    """Features and codes of images, and pictures of codes: one program."""
    return model.features(images), model.encode(images), model.decode(codes)


@pytest.mark.parametrize(("seed", "num_groups"), [*((seed, 32) for seed in range(len(CONFIGS))), (4, 8)])
def test_features_codes_and_pictures_agree_with_pytorch(oracle, to_params, seed, num_groups):
    """Padding on the wrong side, attention at a level too many, a shortcut forgotten where widths change."""
    import torch

    config = config_of(*CONFIGS[seed])
    hparams = dataclasses.replace(config.stage1.hparams, num_groups=num_groups)
    config = dataclasses.replace(config, stage1=dataclasses.replace(config.stage1, hparams=hparams))
    c = config.stage1
    fields = dataclasses.asdict(c.hparams) | {"embed_dim": c.embed_dim, "n_embed": c.n_embed}
    theirs_config = oracle.VQGANConfig(
        **{k: v for k, v in fields.items() if k in oracle.VQGANConfig.__dataclass_fields__}
    )
    theirs = oracle.randomize(oracle.VQGAN(theirs_config), seed).eval()
    for module in theirs.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.num_groups = num_groups
    params = to_params(config, "stage1", {key: tensor.numpy() for key, tensor in theirs.state_dict().items()})

    rng, size = np.random.default_rng(seed), c.hparams.resolution
    images = rng.uniform(-1, 1, (2, size, size, 3)).astype(np.float32)
    codes = rng.integers(0, c.n_embed, (2, c.code_size, c.code_size)).astype(np.int32)
    features, own_codes, pictures = run(VQGAN(c), params, images, codes, method=everything)
    with torch.inference_mode():
        nchw = torch.from_numpy(images).permute(0, 3, 1, 2)
        their_features = theirs.features(nchw).permute(0, 2, 3, 1).numpy()
        their_codes = theirs.codes(nchw).numpy()
        their_pictures = theirs.decode(torch.from_numpy(codes).long()).permute(0, 2, 3, 1).numpy()
    assert features.shape == (2, c.code_size, c.code_size, c.embed_dim) == their_features.shape
    np.testing.assert_allclose(features, their_features, rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(own_codes.reshape(2, -1), their_codes)
    assert len(np.unique(own_codes)) > 2  # one code everywhere would be equal for the wrong reason
    assert pictures.shape == (2, size, size, 3) and pictures.dtype == np.float32
    np.testing.assert_allclose(pictures, their_pictures, rtol=0, atol=TOLERANCE)


def test_codes_are_the_nearest_rows_and_the_lowest_id_on_a_tie(random_params):
    """Rows of the codebook that occur twice tie exactly: the lower id is taken, on every platform."""
    config = SMALL
    params = random_params(config, "stage1")
    half = config.stage1.n_embed // 2
    params["codebook"][half:] = params["codebook"][:half]
    images = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    features, codes, _ = run(VQGAN(config.stage1), params, images, np.zeros((1, 8, 8), np.int32), method=everything)
    distances = ((features[..., None, :].astype(np.float64) - params["codebook"][:half]) ** 2).sum(axis=-1)
    np.testing.assert_array_equal(codes, distances.argmin(axis=-1))
    assert codes.max() < half and len(np.unique(codes)) > 5


def test_codes_of_a_large_codebook_are_the_nearest_rows(random_params):
    """|e|^2 - 2 z.e without |z|^2 orders the rows as the distance does, also where rows are long and close together."""
    config = config_of((1, 2), 16, (8,), 1, 24, 16, 4096)
    params = random_params(config, "stage1")
    images = np.random.default_rng(1).uniform(-1, 1, (1, 16, 16, 3)).astype(np.float32)
    features, codes, _ = run(VQGAN(config.stage1), params, images, np.zeros((1, 8, 8), np.int32), method=everything)
    distances = ((features[..., None, :].astype(np.float64) - params["codebook"]) ** 2).sum(axis=-1)
    chosen = np.take_along_axis(distances, codes[..., None], axis=-1)[..., 0]
    # Both squares are of order 30; float32 keeps 2**-24 of that, times the few dozen additions.
    assert (chosen - distances.min(axis=-1)).max() < 1e-4


def test_bfloat16_pictures_are_near_float32(random_params):
    """The decoder runs in bfloat16 on accelerators: 8 bits, about 20 roundings one after the other on values of order
    1, sqrt(20) * 2**-9 = 0.01 in the mean; twice that is taken, and the result is float32."""
    params = random_params(SMALL, "stage1")
    codes = np.random.default_rng(0).integers(0, 50, (2, 8, 8)).astype(np.int32)
    exact = run(VQGAN(SMALL.stage1), params, codes, method="decode")
    half = run(VQGAN(SMALL.stage1, dtype=jnp.bfloat16), params, codes, method="decode")
    assert half.dtype == np.float32
    assert 1e-4 < np.sqrt(np.mean((half - exact) ** 2)) < 0.02


def test_dropout_is_off_unless_asked_for(random_params):
    """A config with pdrop above 0 gives the same pictures each time when it is not training."""
    hparams = dataclasses.replace(SMALL.stage1.hparams, pdrop=0.5)
    params = random_params(SMALL, "stage1")
    codes = np.zeros((1, 8, 8), np.int32)
    with_rate = run(VQGAN(dataclasses.replace(SMALL.stage1, hparams=hparams)), params, codes, method="decode")
    np.testing.assert_array_equal(with_rate, run(VQGAN(SMALL.stage1), params, codes, method="decode"))


def test_the_codebook_starts_uniform():
    """U(-1/n, 1/n), as the original initialises it."""
    images = np.zeros((1, 8, 8, 3), np.float32)
    config = config_of((1,), 8, (), 1, 16, 16, 40).stage1
    codebook = jax.jit(lambda key: VQGAN(config).init(key, images)["params"]["codebook"])(jax.random.key(0))
    assert codebook.shape == (40, 16)
    assert np.abs(codebook).max() <= 1 / 40
    assert np.std(codebook) == pytest.approx(1 / 40 / np.sqrt(3), rel=0.1)  # 640 draws: 2 % of error
