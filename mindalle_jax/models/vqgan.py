"""VQGAN (Esser, Rombach and Ommer 2021, arXiv:2012.09841): images <-> a grid of discrete codes.

A pure network: parameters in, arrays out. Images are channels last and in [-1, 1]; parameter names follow the
PyTorch release, with `.` between numbered parts written `_` (encoder/down_0_block_1/norm1/scale).

Dimensions: b batch, y height, x width, c channels, n codes in the codebook, e width of a codebook row.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mindalle_jax.config.schema import Stage1Config, Stage1Hparams


class Autoencoded(NamedTuple):
    """The results of encoder, codebook and decoder that training needs, float32."""

    images: jax.Array
    """[b, Y, X, 3]: the reconstruction"""
    features: jax.Array
    """[b, y, x, e]: the features before quantization"""
    rows: jax.Array
    """[b, y, x, e]: the rows of the codebook that replace the features"""
    codes: jax.Array
    """int32[b, y, x]"""


class VQGAN(nn.Module):
    """Encoder, codebook and decoder. `dtype` is the compute dtype; GroupNorm statistics and distances are float32."""

    config: Stage1Config
    dtype: Any = jnp.float32

    def setup(self) -> None:
        c = self.config
        n = c.n_embed
        self.encoder = Encoder(c.hparams, self.dtype)
        self.decoder = Decoder(c.hparams, self.dtype)
        self.quant_conv = _conv(c.embed_dim, 1, self.dtype)
        self.post_quant_conv = _conv(c.hparams.z_channels, 1, self.dtype)
        self.codebook = self.param(
            "codebook", lambda key: jax.random.uniform(key, (n, c.embed_dim), minval=-1 / n, maxval=1 / n)
        )

    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns codes int32[b, y, x] and reconstructions f32[b, Y, X, 3] of images [b, Y, X, 3] in [-1, 1]."""
        codes = self.encode(images)
        return codes, self.decode(codes)

    def features(self, images: jax.Array) -> jax.Array:
        """Returns the features before quantization, f32[b, y, x, e], of images [b, Y, X, 3] in [-1, 1]."""
        return self.quant_conv(self.encoder(images.astype(self.dtype))).astype(jnp.float32)

    def encode(self, images: jax.Array) -> jax.Array:
        """Returns codes int32[b, y, x] in [0, n) of images: the row nearest to each feature, the lowest id on a tie."""
        return self._nearest(self.features(images))

    def decode(self, codes: jax.Array) -> jax.Array:
        """Returns images f32[b, Y, X, 3], in about [-1, 1] and not clipped, of codes int32[b, y, x].

        -1 stands for a code that is not known yet. It is decoded as the mean of the codebook.
        """
        rows = self.codebook.astype(self.dtype)
        mean = jnp.mean(self.codebook, axis=0).astype(self.dtype)
        z = jnp.where(codes[..., None] < 0, mean, jnp.take(rows, jnp.maximum(codes, 0), axis=0))
        return self.decoder(self.post_quant_conv(z)).astype(jnp.float32)

    def reconstruct(self, z: jax.Array, quantized: jax.Array | bool = True) -> Autoencoded:
        """Applies codebook and decoder for training. Gradients pass the codebook unchanged.

        z: f32[b, y, x, e], features. quantized: bool[]; if False the decoder sees the features instead of the rows.

        The gradient of the images goes from the rows to the features without a change (the straight-through estimator,
        van den Oord et al. 2017, arXiv:1711.00937). The rows get their gradient from the codebook loss.
        """
        codes = self._nearest(jax.lax.stop_gradient(z))
        rows = jnp.take(self.codebook.astype(jnp.float32), codes, axis=0)
        # z - stop(z) is exactly 0, so the images are those of decode(codes).
        through = jax.lax.stop_gradient(jnp.where(quantized, rows, z)) + (z - jax.lax.stop_gradient(z))
        images = self.decoder(self.post_quant_conv(through.astype(self.dtype))).astype(jnp.float32)
        return Autoencoded(images, z, rows, codes)

    def _nearest(self, z: jax.Array) -> jax.Array:
        rows = self.codebook.astype(jnp.float32)
        # |z - e|^2 = |z|^2 - 2 z.e + |e|^2, and |z|^2 is the same for every row.
        distances = jnp.sum(rows**2, axis=1) - 2 * jnp.einsum("byxe,ne->byxn", z, rows, precision="highest")
        return jnp.argmin(distances, axis=-1).astype(jnp.int32)


class Encoder(nn.Module):
    """Encodes [b, Y, X, 3] -> [b, y, x, z_channels]. Each level but the last halves the resolution."""

    hparams: Stage1Hparams
    dtype: Any

    @nn.compact
    def __call__(self, h: jax.Array) -> jax.Array:
        p, dtype = self.hparams, self.dtype
        resolution = p.resolution
        h = _conv(p.ch, 3, dtype, "conv_in")(h)
        for level, mult in enumerate(p.ch_mult):
            for j in range(p.num_res_blocks):
                h = ResnetBlock(p.ch * mult, p, dtype, name=f"down_{level}_block_{j}")(h)
                if resolution in p.attn_resolutions:
                    h = AttnBlock(p, dtype, name=f"down_{level}_attn_{j}")(h)
            if level < len(p.ch_mult) - 1:
                # One row at the bottom and one column at the right, as PyTorch's F.pad(x, (0, 1, 0, 1)).
                h = jnp.pad(h, ((0, 0), (0, 1), (0, 1), (0, 0)))
                h = nn.Conv(
                    h.shape[-1], (3, 3), strides=2, padding="VALID", dtype=dtype, name=f"down_{level}_downsample_conv"
                )(h)
                resolution //= 2
        h = ResnetBlock(h.shape[-1], p, dtype, name="mid_block_1")(h)
        h = AttnBlock(p, dtype, name="mid_attn_1")(h)
        h = ResnetBlock(h.shape[-1], p, dtype, name="mid_block_2")(h)
        return _conv(p.z_channels, 3, dtype, "conv_out")(nn.swish(_norm(p, dtype, "norm_out")(h)))


class Decoder(nn.Module):
    """Decodes [b, y, x, z_channels] -> [b, Y, X, 3]. Levels are numbered as in the encoder: level 0 is the finest."""

    hparams: Stage1Hparams
    dtype: Any

    @nn.compact
    def __call__(self, h: jax.Array) -> jax.Array:
        p, dtype = self.hparams, self.dtype
        last = len(p.ch_mult) - 1
        resolution = p.resolution // 2**last
        width = p.ch * p.ch_mult[last]
        h = _conv(width, 3, dtype, "conv_in")(h)
        h = ResnetBlock(width, p, dtype, name="mid_block_1")(h)
        h = AttnBlock(p, dtype, name="mid_attn_1")(h)
        h = ResnetBlock(width, p, dtype, name="mid_block_2")(h)
        for level in reversed(range(len(p.ch_mult))):
            for j in range(p.num_res_blocks + 1):
                h = ResnetBlock(p.ch * p.ch_mult[level], p, dtype, name=f"up_{level}_block_{j}")(h)
                if resolution in p.attn_resolutions:
                    h = AttnBlock(p, dtype, name=f"up_{level}_attn_{j}")(h)
            if level > 0:
                h = jnp.repeat(jnp.repeat(h, 2, axis=1), 2, axis=2)  # nearest neighbor
                h = _conv(h.shape[-1], 3, dtype, f"up_{level}_upsample_conv")(h)
                resolution *= 2
        return _conv(p.out_ch, 3, dtype, "conv_out")(nn.swish(_norm(p, dtype, "norm_out")(h)))


class ResnetBlock(nn.Module):
    """x + conv(dropout(swish(norm(conv(swish(norm(x))))))). If the width changes, x passes a 1x1 convolution."""

    features: int
    hparams: Stage1Hparams
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = _conv(self.features, 3, self.dtype, "conv1")(nn.swish(_norm(self.hparams, self.dtype, "norm1")(x)))
        h = nn.swish(_norm(self.hparams, self.dtype, "norm2")(h))
        h = nn.Dropout(self.hparams.pdrop)(h, deterministic=not self.has_rng("dropout"))
        h = _conv(self.features, 3, self.dtype, "conv2")(h)
        if x.shape[-1] != self.features:
            x = _conv(self.features, 1, self.dtype, "nin_shortcut")(x)
        return x + h


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions, scale c**-0.5, with a residual connection."""

    hparams: Stage1Hparams
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, height, width, c = x.shape
        h = _norm(self.hparams, self.dtype, "norm")(x)
        q, k, v = (_conv(c, 1, self.dtype, name)(h).reshape(b, height * width, c) for name in "qkv")
        scores = jnp.einsum("bsc,btc->bst", q, k, preferred_element_type=jnp.float32) * c**-0.5
        weights = nn.softmax(scores, axis=-1).astype(self.dtype)
        h = jnp.einsum("bst,btc->bsc", weights, v).reshape(x.shape)
        return x + _conv(c, 1, self.dtype, "proj_out")(h)


def _conv(features: int, size: int, dtype: Any, name: str | None = None) -> nn.Conv:
    return nn.Conv(features, (size, size), padding="SAME", dtype=dtype, name=name)


def _norm(hparams: Stage1Hparams, dtype: Any, name: str) -> nn.GroupNorm:
    # The two-pass variance, because E[x^2] - E[x]^2 loses digits that parity with the original needs.
    return nn.GroupNorm(hparams.num_groups, epsilon=1e-6, dtype=dtype, use_fast_variance=False, name=name)
