"""PatchGAN (Isola et al. 2017, arXiv:1611.07004), the discriminator of the VQGAN: it judges if a patch is real.

With three layers each logit sees 70 x 70 pixels, with two 34 x 34. There is one difference from the discriminator of
the VQGAN's authors: GroupNorm replaces BatchNorm. BatchNorm keeps running averages beside its parameters, and with it
the logits depend on which images share a micro-batch or a device. Here the state is only parameters, and the way in
which a batch is split changes nothing.

Dimensions: b batch, y height, x width, c channels.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

MAX_MULT = 8
"""Layer l has width * 2**l channels, but at most this many times the width."""


class PatchDiscriminator(nn.Module):
    """Computes logits f32[b, y, x] of images [b, Y, X, 3] in [-1, 1]. Above 0 means real. y = Y / 2**layers - 2.

    width: channels after the first convolution, a multiple of 32. layers: number of times the resolution is halved.
    dtype: compute dtype; GroupNorm statistics are float32.
    """

    width: int = 64
    layers: int = 3
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        h = nn.leaky_relu(self._conv("conv_0", self.width, strides=2)(images.astype(self.dtype)), 0.2)
        for layer in range(1, self.layers + 1):
            features = self.width * min(2**layer, MAX_MULT)
            strides = 2 if layer < self.layers else 1
            h = self._conv(f"conv_{layer}", features, strides, use_bias=False)(h)  # the norm has one
            h = nn.leaky_relu(nn.GroupNorm(num_groups=32, epsilon=1e-5, dtype=self.dtype, name=f"norm_{layer}")(h), 0.2)
        return self._conv("conv_out", 1)(h)[..., 0].astype(jnp.float32)

    def _conv(self, name: str, features: int, strides: int = 1, use_bias: bool = True) -> nn.Conv:
        return nn.Conv(
            features,
            (4, 4),
            strides=strides,
            padding=1,
            use_bias=use_bias,
            dtype=self.dtype,
            kernel_init=nn.initializers.normal(0.02),
            name=name,
        )
