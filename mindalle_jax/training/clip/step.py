"""One step of contrastive training: CLIP learns which text of a batch belongs to which image, and the reverse.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021, figure 3.

    logits[i, j] = exp(logit_scale) * cosine(image i, text j)
    loss = mean over i of (CE(logits[i, :], i) + CE(logits[:, i], i)) / 2

The sums run over the complete batch of a step: a text is a wrong answer for every image but its own, also for images
on another device.

If two images i and j of a batch have the same caption, the caption of j is no wrong answer for i. So the pair of image
i and text j is left out: it is neither the target of i nor a wrong answer. With captions a, b, a the logits are used
like this:

    1  .  x        1: the target, .: a wrong answer, x: left out
    .  1  .
    x  .  1        image 0 has only one wrong answer, b

Dimensions: b batch, s text length, e width of the common space.
"""

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mindalle_jax.models.clip import CLIP, ClipConfig, normalize_images
from mindalle_jax.storage.weights import nest
from mindalle_jax.training.step import Metrics, Params, TrainState, optimizer_step

MAX_LOGIT_SCALE = math.log(100)
"""Upper bound of the parameter whose exponential multiplies the cosines; as in the paper, section 2.5."""


class Sums(NamedTuple):
    """Sums over the pairs of a batch that count, float32."""

    loss: jax.Array
    image_to_text: jax.Array
    """The number of images whose own text has the highest logit."""
    text_to_image: jax.Array
    """The number of texts whose own image has the highest logit."""
    pairs: jax.Array


@dataclasses.dataclass(frozen=True)
class ClipStepConfig:
    """The constants of a step, which are fixed at compilation."""

    model: CLIP
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    ema_decay: float


def init_params(config: ClipConfig, shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """Returns fresh float32 parameters by path, the same on any device.

    Standard deviations are as in OpenAI's CLIP.initialize_parameters. It sets them for the text tower only; here both
    towers use them. The kernel that embeds patches has one over the square root of the numbers in a patch.
    """
    params = {}
    for number, (path, shape) in enumerate(shapes.items()):
        tower = config.vision if path.startswith("vis") else config.text  # visual_projection, vision_model
        width, layers = tower.hidden_size, tower.num_hidden_layers
        if path == "logit_scale":
            value = np.full(shape, math.log(1 / 0.07))
        elif path.endswith(("/bias", "/scale")):
            value = np.full(shape, path.endswith("/scale"))
        else:
            std = width**-0.5
            if path.endswith(("out_proj/kernel", "fc2/kernel")):  # added to the residual stream
                std *= (2 * layers) ** -0.5
            elif path.endswith("fc1/kernel"):
                std *= 2**-0.5
            elif path.endswith("patch_embedding/kernel"):
                std = math.prod(shape[:-1]) ** -0.5
            elif path.startswith("text_model/embeddings"):
                std = 0.02 if "token" in path else 0.01
            value = std * np.random.default_rng([seed, number]).standard_normal(shape, np.float32)
        params[path] = np.asarray(value, np.float32)
    return params


def compile_clip_step(config: ClipStepConfig, shardings: TrainState) -> Any:
    """Returns a compiled clip_step, (state, batch) -> (state, metrics), that keeps the state's shardings.

    It donates the state.
    """
    return jax.jit(partial(clip_step, config), out_shardings=(shardings, None), donate_argnums=0)


def clip_step(config: ClipStepConfig, state: TrainState, batch: Mapping[str, jax.Array]) -> tuple[TrainState, Metrics]:
    """Makes one step; returns the next state and the metrics of this step.

    batch: image uint8[b, y, x, 3] with the model's image size, text int32[b, s]. If the loss or gradient is not finite,
    only the counts `step` and `skipped` change.
    """
    rows = jnp.ones(len(batch["text"]), jnp.float32)

    def mean_loss(params: Params) -> jax.Array:
        sums = contrastive_sums(config.model, params, batch, rows)
        return sums.loss / sums.pairs

    loss, grads = jax.value_and_grad(mean_loss)(state.params)
    state, metrics = optimizer_step(config, state, loss, grads, limit=_limit_scale)
    return state, metrics | {"logit_scale": jnp.exp(state.params["logit_scale"])}


def _limit_scale(params: Params) -> Params:
    return params | {"logit_scale": jnp.minimum(params["logit_scale"], MAX_LOGIT_SCALE)}


@partial(jax.jit, static_argnames="model")
def eval_sums(model: CLIP, params: Params, batch: Mapping[str, jax.Array], rows: jax.Array) -> Sums:
    """Computes contrastive_sums in one compiled program."""
    return contrastive_sums(model, params, batch, rows)


def contrastive_sums(model: CLIP, params: Params, batch: Mapping[str, jax.Array], rows: jax.Array) -> Sums:
    """Returns the sums of a batch.

    batch: image uint8[b, y, x, 3], text int32[b, s]. rows: f32[b], 0 for rows that only fill the last batch. These rows
    are not counted, and are no wrong answers either.
    """
    pixels = normalize_images(batch["image"])
    result: Any = model.apply({"params": nest(params)}, batch["text"], pixels)
    text, image, scale = result
    text, image = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (text, image))
    own = jnp.eye(len(rows), dtype=bool)
    same = jnp.all(batch["text"][:, None] == batch["text"][None], axis=-1)
    counted = own | (~same & (rows[None] > 0) & (rows[:, None] > 0))
    logits = jnp.where(counted, scale * image @ text.T, -jnp.inf)  # [b images, b texts]
    target = jnp.diagonal(logits)
    loss = (jax.nn.logsumexp(logits, axis=1) + jax.nn.logsumexp(logits, axis=0)) / 2 - target
    image_to_text, text_to_image = (
        jnp.sum(rows * (jnp.argmax(logits, axis=axis) == jnp.arange(len(rows)))) for axis in (1, 0)
    )
    return Sums(jnp.sum(rows * loss), image_to_text, text_to_image, jnp.sum(rows))
