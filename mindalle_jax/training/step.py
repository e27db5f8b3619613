"""One training step of the transformer, in pure functions: gradients in micro-batches, clipping, the optimizer.

    loss = mean CE(image logits, codes) + text_loss_weight * mean CE(text logits, text ids[1:])

PAD targets do not count in the text term. Image-only models have no text term. Means are over the complete batch of a
step, so the loss does not depend on how the batch is split or on the number of devices.

Parameters are flat dicts by path (`blocks/qkv/weight`) in the layout of training. The state holds the parameters that
are trained. Frozen parameters, also those with adapters, are an argument.

`optimizer_step` ends the step of every network: transformer, CLIP and VQGAN.

Dimensions: a micro-batches, b batch, t image positions, p prefix length, v vocabulary.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from mindalle_jax.models.transformer import Transformer
from mindalle_jax.storage.weights import nest

Params = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
"""The scalars of one step, by name."""


class Terms(NamedTuple):
    """One number per term of the loss, float32."""

    image: Any
    text: Any


class TrainState(NamedTuple):
    """The state between two steps. Random keys are not in it: they follow from the seed and `step`."""

    step: jax.Array
    """int32: number of batches seen"""
    params: Params
    """float32: the parameters that are trained"""
    opt_state: Any
    ema: Params
    """float32: moving average of params; empty if it is off"""
    skipped: jax.Array
    """int32: number of steps skipped in a row, because the loss or a gradient was not finite"""


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """The constants of a step, which are fixed at compilation."""

    model: Transformer
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    pad_id: int | None
    """None for an image-only model"""
    text_loss_weight: float
    caption_dropout: float
    ema_decay: float
    lora_scale: float
    seed: int


class Optimized(Protocol):
    """The part of a step's constants that `init_state` and `optimizer_step` use."""

    @property
    def optimizer(self) -> optax.GradientTransformation: ...

    @property
    def schedule(self) -> optax.Schedule: ...

    @property
    def ema_decay(self) -> float: ...


State = TypeVar("State", bound=Any)
"""A NamedTuple with the fields of TrainState, and perhaps more."""


def init_state(config: Optimized, params: Params) -> TrainState:
    """Returns the state before the first step. A parameter's moments and average have the sharding of the parameter."""

    def init(params: Params) -> TrainState:
        ema = jax.tree.map(jnp.copy, params) if config.ema_decay else {}
        return TrainState(jnp.int32(0), params, config.optimizer.init(params), ema, jnp.int32(0))

    shardings = state_shardings(jax.eval_shape(init, params), {path: leaf.sharding for path, leaf in params.items()})
    return jax.jit(init, out_shardings=shardings, donate_argnums=0)(params)


def state_shardings(state: TrainState, shardings: Mapping[str, Any]) -> TrainState:
    """Returns the sharding of each array of a state.

    An array that belongs to a parameter has the parameter's sharding; all other arrays are replicated. state: arrays or
    their shapes. shardings: NamedSharding of each trained parameter, by path.
    """
    mesh = next(iter(shardings.values())).mesh
    replicated = NamedSharding(mesh, PartitionSpec())

    def sharding(path: tuple[Any, ...], _: Any) -> NamedSharding:
        return shardings.get(getattr(path[-1], "key", ""), replicated)

    return jax.tree_util.tree_map_with_path(sharding, state)


def compile_train_step(config: StepConfig, shardings: TrainState) -> Any:
    """Returns a compiled train_step, (state, frozen, batch) -> (state, metrics), that keeps the state's shardings.

    It donates the state.
    """
    return jax.jit(partial(train_step, config), out_shardings=(shardings, None), donate_argnums=0)


def model_params(config: StepConfig, params: Params, frozen: Params) -> dict[str, Any]:
    """Returns trained and frozen parameters in one nested dict, with adapters scaled by alpha / rank."""
    scaled = {path: leaf * config.lora_scale if path.endswith("/lora_b") else leaf for path, leaf in params.items()}
    return nest(frozen | scaled)


def train_step(
    config: StepConfig, state: TrainState, frozen: Params, batch: dict[str, jax.Array]
) -> tuple[TrainState, Metrics]:
    """Makes one step; returns the next state and the metrics of this step.

    batch: prefix int32[a, b, p], codes int32[a, b, t], and index uint32[a, b], the position of each sample in the
    stream. The gradients of the `a` micro-batches are added up. If the loss or gradient is not finite, only the counts
    `step` and `skipped` change.
    """
    key = jax.random.fold_in(jax.random.key(config.seed, impl="threefry2x32"), state.step)
    dropout_key, caption_key = jax.random.split(key)
    if config.caption_dropout and config.pad_id is not None:
        # The key is that of the sample's position in the stream, so it does not matter how a batch is split.
        keys = jax.vmap(jax.random.fold_in, (None, 0))(caption_key, batch["index"].reshape(-1))
        dropped = jax.vmap(lambda key: jax.random.bernoulli(key, config.caption_dropout))(keys)
        dropped = dropped.reshape(*batch["index"].shape, 1)
        batch = batch | {"prefix": jnp.where(dropped, config.pad_id, batch["prefix"])}
    batch = batch | {"rows": jnp.ones(batch["codes"].shape[:2], jnp.float32)}
    counts = Terms(*(jnp.maximum(jnp.sum(weights), 1) for weights in target_weights(batch, config.pad_id)))
    has_dropout = _has_dropout(config.model)

    def share(params: Params, micro: dict[str, jax.Array], i: jax.Array) -> tuple[jax.Array, Terms]:
        """Returns the share of one micro-batch in the loss of the batch."""
        micro_key = jax.random.fold_in(dropout_key, i) if has_dropout else None
        sums = loss_sums(config.model, model_params(config, params, frozen), micro, config.pad_id, micro_key)
        terms = Terms(sums.image / counts.image, sums.text / counts.text)
        return terms.image + config.text_loss_weight * terms.text, terms

    def add(carry: Any, xs: Any) -> Any:
        (_, terms), grads = jax.value_and_grad(share, has_aux=True)(state.params, *xs)
        return jax.tree.map(jnp.add, carry, (grads, terms)), None

    nothing = jax.tree.map(jnp.zeros_like, state.params), Terms(jnp.float32(0), jnp.float32(0))
    micro_batches = batch["codes"].shape[0]
    (grads, terms), _ = jax.lax.scan(add, nothing, (batch, jnp.arange(micro_batches)))

    state, metrics = optimizer_step(config, state, terms.image + config.text_loss_weight * terms.text, grads)
    metrics["image_loss"] = terms.image
    if config.pad_id is not None:
        metrics["text_loss"] = terms.text
    return state, metrics


def optimizer_step(
    config: Optimized,
    state: State,
    loss: jax.Array,
    grads: Params,
    *,
    limit: Callable[[Params], Params] = lambda params: params,
    also_finite: jax.Array | bool = True,
    hold: jax.Array | bool = False,
) -> tuple[State, Metrics]:
    """Returns the state after a batch with this loss and gradient, and the metrics that every step has.

    If the loss or gradient is not finite, only the counts `step` and `skipped` change.
    limit: a function that is applied to the new parameters. also_finite: bool[], False if something else in this step
    is not finite. hold: bool[], True if parameters, optimizer and average must stay as they are.
    """
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & also_finite
    updates, opt_state = config.optimizer.update(grads, state.opt_state, state.params)
    stepped: Any = optax.apply_updates(state.params, updates)
    params = limit(stepped)
    decay = config.ema_decay
    ema = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.ema, params) if decay else {}
    params, opt_state, ema = select(
        finite & ~jnp.asarray(hold), (params, opt_state, ema), (state.params, state.opt_state, state.ema)
    )
    metrics = {
        "loss": loss,
        "grad_norm": grad_norm,
        "learning_rate": config.schedule(steps_made(state.opt_state)),
        "skipped": jnp.where(finite, 0, state.skipped + 1),
    }
    skipped = jnp.copy(metrics["skipped"])  # a copy, because the next step takes over the state's memory
    return (
        state._replace(step=state.step + 1, params=params, opt_state=opt_state, ema=ema, skipped=skipped),
        metrics,
    )


def select(condition: jax.Array, new: Any, old: Any) -> Any:
    """Returns the tree `new` if the condition bool[] is true, else the tree `old`."""
    return jax.tree.map(lambda new, old: jnp.where(condition, new, old), new, old)


@partial(jax.jit, static_argnames="config")
def eval_step(config: StepConfig, params: Params, frozen: Params, batch: dict[str, jax.Array]) -> tuple[Terms, Terms]:
    """Returns the sums of the cross-entropies (nats) of a batch, and the numbers of targets that count.

    batch: prefix int32[b, p], codes int32[b, t], and rows f32[b], see target_weights.
    """
    sums = loss_sums(config.model, model_params(config, params, frozen), batch, config.pad_id)
    return sums, Terms(*(jnp.sum(weights) for weights in target_weights(batch, config.pad_id)))


def steps_made(opt_state: Any) -> jax.Array:
    """Returns the number of steps that the optimizer has made, without skipped ones; 0 if its rate never changes."""
    of_schedule: Any = lambda path, _: getattr(path[-1], "tuple_name", "") == "ScaleByScheduleState"  # noqa: E731
    counts = optax.tree.get_all_with_path(opt_state, "count", filtering=of_schedule)  # Muon has two, always equal
    return counts[0][1] if counts else jnp.int32(0)


def _has_dropout(model: Transformer) -> bool:
    h = model.config.hparams
    return max(h.embd_pdrop, h.resid_pdrop, h.attn_pdrop) > 0


def target_weights(batch: dict[str, jax.Array], pad_id: int | None) -> Terms:
    """Returns weights of the targets, f32[..., b, t] and f32[..., b, p - 1]: 1 if a target counts, else 0.

    batch: prefix int32[..., b, p] (text ids, or class labels [..., b, 1]), codes int32[..., b, t], and rows
    f32[..., b], which is 0 for rows that only fill the last batch. pad_id: the id of [PAD]; None for an image-only
    model.
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
    """Returns the sums of the cross-entropies (nats) over the targets that count.

    batch: as for target_weights. dropout_key: None turns dropout off.
    """
    rngs = {} if dropout_key is None else {"dropout": dropout_key}
    result: Any = model.apply({"params": params}, batch["prefix"], batch["codes"], dropout_key is not None, rngs=rngs)
    image_logits, text_logits = result
    weights = target_weights(batch, pad_id)
    image = jnp.sum(weights.image * _cross_entropy(image_logits, batch["codes"]))
    if text_logits is None:
        return Terms(image, jnp.float32(0))
    return Terms(image, jnp.sum(weights.text * _cross_entropy(text_logits, batch["prefix"][:, 1:])))


def _cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns -log p(target), f32[b, s], from logits f32[b, s, v] and targets int32[b, s]."""
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen
