"""LPIPS (Zhang et al. 2018, arXiv:1801.03924): measures how different two images look, by features of VGG16.

A pure network; interop/lpips.py reads its weights. It is never trained here.

Dimensions: b batch, y height, x width, c channels.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

VGG_BLOCKS = ((64, (0, 2)), (128, (5, 7)), (256, (10, 12, 14)), (512, (17, 19, 21)), (512, (24, 26, 28)))
"""(channels, numbers of the convolutions in torchvision's `features`) per block, with 2 x 2 max pooling between."""
PIXEL_SHIFT = (-0.030, -0.088, -0.188)
PIXEL_SCALE = (0.458, 0.448, 0.450)
"""VGG16 sees (x - shift) / scale for x in [-1, 1]. They are ImageNet's mean and deviation in this range."""


class LPIPS(nn.Module):
    """Computes the distance f32[b] of images [b, Y, X, 3] in [-1, 1]. It is 0 for equal images.

    After each block the features at each position are scaled to unit length. Their squared differences are weighted by
    channel, averaged over positions, and added up over the blocks.
    """

    @nn.compact
    def __call__(self, first: jax.Array, second: jax.Array) -> jax.Array:
        both = jnp.concatenate([first, second]).astype(jnp.float32)
        h = (both - jnp.array(PIXEL_SHIFT)) / jnp.array(PIXEL_SCALE)
        total = jnp.zeros(len(first))
        for block, (channels, numbers) in enumerate(VGG_BLOCKS):
            if block:
                h = nn.max_pool(h, (2, 2), strides=(2, 2))
            for number in numbers:
                h = nn.relu(nn.Conv(channels, (3, 3), padding="SAME", name=f"features_{number}")(h))
            # The square root of 0 has no gradient, and after a ReLU all channels may be 0.
            unit = h / jnp.sqrt(jnp.sum(h**2, axis=-1, keepdims=True) + 1e-20)
            difference = (unit[: len(first)] - unit[len(first) :]) ** 2
            weights = self.param(f"lin{block}", nn.initializers.ones, (channels,))
            total += jnp.mean(difference @ weights, axis=(1, 2))
        return total
