"""CLIP: a text tower and an image tower that map to features in one common space.

A pure network: it knows no files and no tokenizer. Modules and parameters carry the names of Hugging Face's FlaxCLIP
(`text_model/encoder/layers/0/self_attn/q_proj/kernel`), so weights saved by it fit as they are.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021.

Dimensions: b batch, s sequence, d model, h heads, k head width, e width of the common space.
"""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

Activation = Literal["quick_gelu", "gelu"]

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
"""Mean and deviation of red, green and blue in [0, 1] over CLIP's training images; its input is (x - mean) / std."""


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the input of the image tower. Defaults are those of OpenAI's `clip.load`."""

    size: int
    """Side of the input in pixels."""
    short_side: int | None
    """Images are resized until their short side has this length, and the center is cropped; None: they are stretched to
    size x size."""
    resample: int = 3
    """Number of Pillow's filter; 3 is the bicubic one."""
    round_down: bool = False
    """Whether a crop starts at the lower pixel if the center lies between two, as in transformers. Otherwise it starts
    at the even one, as in torchvision."""
    mean: tuple[float, float, float] = PIXEL_MEAN
    """Mean of red, green and blue in [0, 1]. The input is (x - mean) / std."""
    std: tuple[float, float, float] = PIXEL_STD


def normalize_images(
    images: jax.Array, mean: tuple[float, float, float] = PIXEL_MEAN, std: tuple[float, float, float] = PIXEL_STD
) -> jax.Array:
    """Converts images from uint8[..., 3] to the float32 input of the image tower: (x / 255 - mean) / std."""
    return (images.astype(jnp.float32) / 255 - jnp.array(mean)) / jnp.array(std)


@dataclasses.dataclass(frozen=True)
class ClipTextConfig:
    """The text tower. Field names are those of Hugging Face's `text_config`, defaults those of ViT-B/32."""

    vocab_size: int = 49_408
    hidden_size: int = 512
    intermediate_size: int = 2_048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: Activation = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49_407
    """The feature of a text is taken at the first position of this id. 2, as in early configs, means the highest id."""


@dataclasses.dataclass(frozen=True)
class ClipVisionConfig:
    """The image tower. Field names are those of Hugging Face's `vision_config`, defaults those of ViT-B/32."""

    hidden_size: int = 768
    intermediate_size: int = 3_072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    hidden_act: Activation = "quick_gelu"
    layer_norm_eps: float = 1e-5


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Both towers, and the width of their common space."""

    text: ClipTextConfig = ClipTextConfig()
    vision: ClipVisionConfig = ClipVisionConfig()
    projection_dim: int = 512


class CLIP(nn.Module):
    """Computes features of texts and of images. Their cosine measures how well they match.

    dtype: compute dtype; softmax, LayerNorm statistics and features are float32.
    """

    config: ClipConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        c = self.config
        self.text_model = TextTower(c.text, self.dtype)
        self.vision_model = VisionTower(c.vision, self.dtype)
        self.text_projection = nn.Dense(c.projection_dim, use_bias=False, dtype=self.dtype)
        self.visual_projection = nn.Dense(c.projection_dim, use_bias=False, dtype=self.dtype)
        # log(1 / 0.07): the temperature of the contrastive loss. Features do not depend on it.
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(2.6592), ())

    def __call__(self, ids: jax.Array, pixels: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns text features, image features, and the scale of their cosines in the contrastive loss (a scalar)."""
        return self.encode_text(ids), self.encode_images(pixels), jnp.exp(self.logit_scale)

    def encode_text(self, ids: jax.Array) -> jax.Array:
        """Returns f32[b, e], not normalized, of ids int32[b, s]. s is at most max_position_embeddings.

        Each row needs an end token. Tokens after it have no effect.
        """
        return self.text_projection(self.text_model(ids)).astype(jnp.float32)

    def encode_images(self, pixels: jax.Array) -> jax.Array:
        """Returns f32[b, e], not normalized, of pixels f32[b, image_size, image_size, 3] from normalize_images."""
        return self.visual_projection(self.vision_model(pixels)).astype(jnp.float32)


class TextTower(nn.Module):
    """Maps ids int32[b, s] to the hidden state [b, d] at the end token."""

    config: ClipTextConfig
    dtype: Any

    def setup(self) -> None:
        self.embeddings = TextEmbeddings(self.config, self.dtype)
        self.encoder = Encoder(self.config, True, self.dtype)
        self.final_layer_norm = _layer_norm(self.config, self.dtype)

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.final_layer_norm(self.encoder(self.embeddings(ids)))
        eos = self.config.eos_token_id
        end = jnp.argmax(ids if eos == 2 else ids == eos, axis=-1)  # the first position of the highest id
        return x[jnp.arange(x.shape[0]), end]


class VisionTower(nn.Module):
    """Maps pixels [b, y, x, 3] to the hidden state [b, d] at the class token."""

    config: ClipVisionConfig
    dtype: Any

    def setup(self) -> None:
        self.embeddings = VisionEmbeddings(self.config, self.dtype)
        self.pre_layrnorm = _layer_norm(self.config, self.dtype)  # every published checkpoint has this spelling
        self.encoder = Encoder(self.config, False, self.dtype)
        self.post_layernorm = _layer_norm(self.config, self.dtype)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        x = self.encoder(self.pre_layrnorm(self.embeddings(pixels)))
        return self.post_layernorm(x[:, 0])


class TextEmbeddings(nn.Module):
    """Token and position embeddings, [b, s] -> [b, s, d]."""

    config: ClipTextConfig
    dtype: Any

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        c = self.config
        tokens = nn.Embed(c.vocab_size, c.hidden_size, dtype=self.dtype, name="token_embedding")
        positions = nn.Embed(c.max_position_embeddings, c.hidden_size, dtype=self.dtype, name="position_embedding")
        return tokens(ids) + positions(jnp.arange(ids.shape[1]))


class VisionEmbeddings(nn.Module):
    """The class token, then one token per patch, row by row: [b, y, x, 3] -> [b, 1 + patches, d]."""

    config: ClipVisionConfig
    dtype: Any

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        c, side = self.config, self.config.patch_size
        class_token = self.param("class_embedding", nn.initializers.normal(0.02), (c.hidden_size,)).astype(self.dtype)
        patch_embedding = nn.Conv(
            c.hidden_size, (side, side), strides=(side, side), padding="VALID", use_bias=False, dtype=self.dtype,
            name="patch_embedding",
        )  # fmt: skip
        patches = patch_embedding(pixels).reshape(pixels.shape[0], -1, c.hidden_size)
        x = jnp.concatenate([jnp.broadcast_to(class_token, (pixels.shape[0], 1, c.hidden_size)), patches], axis=1)
        return x + nn.Embed(x.shape[1], c.hidden_size, dtype=self.dtype, name="position_embedding")(
            jnp.arange(x.shape[1])
        )


class Encoder(nn.Module):
    """Pre-LN transformer blocks, [b, s, d] -> [b, s, d]."""

    config: ClipTextConfig | ClipVisionConfig
    causal: bool
    dtype: Any

    def setup(self) -> None:
        self.layers = Layers(self.config, self.causal, self.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.layers(x)


class Layers(nn.Module):
    """The blocks in their order, named 0, 1, ..."""

    config: ClipTextConfig | ClipVisionConfig
    causal: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.config.num_hidden_layers):
            x = Layer(self.config, self.causal, self.dtype, name=str(i))(x)
        return x


class Layer(nn.Module):
    """x += self_attn(layer_norm1(x)); x += mlp(layer_norm2(x))."""

    config: ClipTextConfig | ClipVisionConfig
    causal: bool
    dtype: Any

    def setup(self) -> None:
        c = self.config
        self.layer_norm1, self.layer_norm2 = _layer_norm(c, self.dtype), _layer_norm(c, self.dtype)
        self.self_attn = Attention(c.hidden_size, c.num_attention_heads, self.causal, self.dtype)
        self.mlp = MLP(c.hidden_size, c.intermediate_size, c.hidden_act, self.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Attention(nn.Module):
    """Multi-head attention over [b, s, d]."""

    width: int
    n_heads: int
    causal: bool
    dtype: Any

    def setup(self) -> None:
        self.q_proj, self.k_proj = nn.Dense(self.width, dtype=self.dtype), nn.Dense(self.width, dtype=self.dtype)
        self.v_proj, self.out_proj = nn.Dense(self.width, dtype=self.dtype), nn.Dense(self.width, dtype=self.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = (
            projection(x).reshape(*x.shape[:-1], self.n_heads, -1)  # [b, s, h, k]
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out_proj(attended.reshape(x.shape))


class MLP(nn.Module):
    """Two linear maps with a GELU between them; quick-GELU is x sigmoid(1.702 x)."""

    width: int
    inner_width: int
    activation: Activation
    dtype: Any

    def setup(self) -> None:
        self.fc1 = nn.Dense(self.inner_width, dtype=self.dtype)
        self.fc2 = nn.Dense(self.width, dtype=self.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.fc1(x)
        y = y * nn.sigmoid(1.702 * y) if self.activation == "quick_gelu" else nn.gelu(y, approximate=False)
        return self.fc2(y)


def _layer_norm(config: ClipTextConfig | ClipVisionConfig, dtype: Any) -> nn.LayerNorm:
    # The two-pass variance, because E[x^2] - E[x]^2 loses digits that parity with the original needs.
    return nn.LayerNorm(epsilon=config.layer_norm_eps, dtype=dtype, use_fast_variance=False)
