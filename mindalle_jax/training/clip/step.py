"""One step of contrastive training: which text of a batch belongs to which image, and the other way around.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021, figure 3.

    logits[i, j] = exp(logit_scale) * cosine(image i, text j)
    loss = mean over i of (CE(logits[i, :], i) + CE(logits[:, i], i)) / 2

The batch is all of a step: every text is a wrong answer for every other image, on whatever device it lies.

A caption that stands twice in a batch would make a right answer wrong. Such a pair, image i and the same caption of
another image j, is left out: it is no target of i and not among its wrong answers. With captions a, b, a the logits
that count are

    .  1  x        1: the target, x: left out
    .  1  .
    x  .  1        and image 0 is told from b alone

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
    """The number of texts whose own image has it."""
    pairs: jax.Array


@dataclasses.dataclass(frozen=True)
class ClipStepConfig:
    """The constants of a step, known at compilation."""

    model: CLIP
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    ema_decay: float


def init_params(config: ClipConfig, shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """Fresh float32 parameters by path, the same on any device; widths as OpenAI's CLIP.initialize_parameters.

    There the standard deviations are of the text tower. Here they serve both towers; patches have that of their size.
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
    """clip_step for a state with these shardings, which it keeps; (state, batch) -> (state, metrics)."""
    return jax.jit(partial(clip_step, config), out_shardings=(shardings, None), donate_argnums=0)


def clip_step(config: ClipStepConfig, state: TrainState, batch: Mapping[str, jax.Array]) -> tuple[TrainState, Metrics]:
    """The next state, and the metrics of this step.

    batch: image uint8[b, y, x, 3] of the size of the model, text int32[b, s].
    A step whose loss or gradient is not finite changes nothing but the counts.
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
    """The sums of a batch. rows f32[b] is 0 for rows that fill up a last batch, which are nobody's answer.

    batch: image uint8[b, y, x, 3], text int32[b, s].
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
