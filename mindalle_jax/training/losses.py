"""What is minimised.

    loss = mean CE(image logits, codes) + text_loss_weight * mean CE(text logits, text ids[1:])

PAD targets do not count in the text term, which image-only models do not have. Means are over the whole batch of an
update, however it is split, so that the loss does not depend on how many devices share it.

Dimensions: b batch, t image positions, p prefix length, v vocabulary.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mindalle_jax.models.transformer import Transformer


class Terms(NamedTuple):
    """A number for each term of the loss, float32."""

    image: Any
    text: Any


def target_weights(batch: dict[str, jax.Array], pad_id: int | None) -> Terms:
    """What each target counts, f32[..., b, t] and f32[..., b, p - 1]: 0 or 1.

    batch: prefix int32[..., b, p] (text ids, or class labels [..., b, 1]), codes int32[..., b, t], and rows
    f32[..., b], 0 for those that fill up a last batch. pad_id: of a text-to-image model; None for an image-only one.
    """
    rows, codes, targets = batch["rows"][..., None], batch["codes"], batch["prefix"][..., 1:]
    text = rows * (targets != pad_id) if pad_id is not None else jnp.zeros(targets.shape)
    return Terms(jnp.broadcast_to(rows, codes.shape), text)


def loss_sums(
    model: Transformer,
    params: dict[str, Any],
    batch: dict[str, jax.Array],
    pad_id: int | None,
    dropout_key: jax.Array | None = None,
) -> Terms:
    """Sums of the cross-entropies (nats) over the targets that count. dropout_key: None is no dropout."""
    rngs = {} if dropout_key is None else {"dropout": dropout_key}
    result: Any = model.apply({"params": params}, batch["prefix"], batch["codes"], dropout_key is not None, rngs=rngs)
    image_logits, text_logits = result
    weights = target_weights(batch, pad_id)
    image = jnp.sum(weights.image * _cross_entropy(image_logits, batch["codes"]))
    if text_logits is None:
        return Terms(image, jnp.float32(0))
    return Terms(image, jnp.sum(weights.text * _cross_entropy(text_logits, batch["prefix"][:, 1:])))


def _cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-log p(target), f32[b, s], of logits f32[b, s, v]."""
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen
