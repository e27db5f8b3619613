"""One step of training: gradients of a batch in micro-batches, clipped, then the optimizer. Pure functions of a state.

    loss = mean CE(image logits, codes) + text_loss_weight * mean CE(text logits, text ids[1:])

PAD targets do not count in the text term, which image-only models do not have. Means are over all of the batch of a
step, however it is split, so the loss does not depend on the number of devices that share it.

Parameters are flat dicts by path (`blocks/qkv/weight`) in the layout of training. The state holds the parameters that
are trained. The rest, which is frozen or has adapters that are trained in its place, is an argument.

`optimizer_step` is the last part of the step of every network that is trained: transformer, CLIP and VQGAN.

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
"""Scalars by name, of one step."""


class Terms(NamedTuple):
    """A number for each term of the loss, float32."""

    image: Any
    text: Any


class TrainState(NamedTuple):
    """All that a step hands to the next one. Keys of random numbers follow from the seed and `step`."""

    step: jax.Array
    """int32: batches seen"""
    params: Params
    """float32: the parameters that are trained"""
    opt_state: Any
    ema: Params
    """float32: moving average of params; empty where it is off"""
    skipped: jax.Array
    """int32: steps skipped in a row, because the loss or a gradient was not finite"""


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """The constants of a step, known at compilation."""

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
    """The state before the first step. The moments and the average of a parameter lie where the parameter does."""

    def init(params: Params) -> TrainState:
        ema = jax.tree.map(jnp.copy, params) if config.ema_decay else {}
        return TrainState(jnp.int32(0), params, config.optimizer.init(params), ema, jnp.int32(0))

    shardings = state_shardings(jax.eval_shape(init, params), {path: leaf.sharding for path, leaf in params.items()})
    return jax.jit(init, out_shardings=shardings, donate_argnums=0)(params)


def state_shardings(state: TrainState, shardings: Mapping[str, Any]) -> TrainState:
    """The sharding of each array of a state: that of the parameter of its path; replicated if it belongs to none.

    state: arrays or their shapes. shardings: NamedSharding of each parameter that is trained.
    """
    mesh = next(iter(shardings.values())).mesh
    replicated = NamedSharding(mesh, PartitionSpec())

    def sharding(path: tuple[Any, ...], _: Any) -> NamedSharding:
        return shardings.get(getattr(path[-1], "key", ""), replicated)

    return jax.tree_util.tree_map_with_path(sharding, state)


def compile_train_step(config: StepConfig, shardings: TrainState) -> Any:
    """train_step for a state with these shardings, which it keeps; (state, frozen, batch) -> (state, metrics)."""
    return jax.jit(partial(train_step, config), out_shardings=(shardings, None), donate_argnums=0)


def model_params(config: StepConfig, params: Params, frozen: Params) -> dict[str, Any]:
    """Trained and frozen parameters together, nested; adapters scaled by alpha / rank."""
    scaled = {path: leaf * config.lora_scale if path.endswith("/lora_b") else leaf for path, leaf in params.items()}
    return nest(frozen | scaled)


def train_step(
    config: StepConfig, state: TrainState, frozen: Params, batch: dict[str, jax.Array]
) -> tuple[TrainState, Metrics]:
    """The next state, and the metrics of this step.

    batch: micro-batches, prefix int32[a, b, p], codes int32[a, b, t], and index uint32[a, b], the position of each
    sample in the stream. The gradients of the a micro-batches are added up.
    A step whose loss or gradient is not finite changes nothing but the counts.
    """
    key = jax.random.fold_in(jax.random.key(config.seed, impl="threefry2x32"), state.step)
    dropout_key, caption_key = jax.random.split(key)
    if config.caption_dropout and config.pad_id is not None:
        # By the position of a sample in the stream, so that it does not matter how a batch is split.
        keys = jax.vmap(jax.random.fold_in, (None, 0))(caption_key, batch["index"].reshape(-1))
        dropped = jax.vmap(lambda key: jax.random.bernoulli(key, config.caption_dropout))(keys)
        dropped = dropped.reshape(*batch["index"].shape, 1)
        batch = batch | {"prefix": jnp.where(dropped, config.pad_id, batch["prefix"])}
    batch = batch | {"rows": jnp.ones(batch["codes"].shape[:2], jnp.float32)}
    counts = Terms(*(jnp.maximum(jnp.sum(weights), 1) for weights in target_weights(batch, config.pad_id)))
    has_dropout = _has_dropout(config.model)

    def share(params: Params, micro: dict[str, jax.Array], i: jax.Array) -> tuple[jax.Array, Terms]:
        """The part of a micro-batch in the loss of the batch."""
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
    """The state after a batch of this loss and gradient, and the metrics that every step has.

    A step whose loss or gradient is not finite changes nothing but the counts `step` and `skipped`.
    limit: is applied to the new parameters. also_finite: bool[], False where something else of this step is not finite.
    hold: bool[], True where parameters, optimizer and average stay as they are though all is finite.
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
    skipped = jnp.copy(metrics["skipped"])  # the state's own: its memory is taken by the next step
    return (
        state._replace(step=state.step + 1, params=params, opt_state=opt_state, ema=ema, skipped=skipped),
        metrics,
    )


def select(condition: jax.Array, new: Any, old: Any) -> Any:
    """The tree `new` where the condition bool[] holds, else `old`."""
    return jax.tree.map(lambda new, old: jnp.where(condition, new, old), new, old)


@partial(jax.jit, static_argnames="config")
def eval_step(config: StepConfig, params: Params, frozen: Params, batch: dict[str, jax.Array]) -> tuple[Terms, Terms]:
    """Sums of the cross-entropies of a batch (prefix [b, p], codes [b, t], rows [b]), and how many targets count."""
    sums = loss_sums(config.model, model_params(config, params, frozen), batch, config.pad_id)
    return sums, Terms(*(jnp.sum(weights) for weights in target_weights(batch, config.pad_id)))


def steps_made(opt_state: Any) -> jax.Array:
    """How many steps the optimizer has made; skipped ones do not count. 0 where its rate never changes."""
    of_schedule: Any = lambda path, _: getattr(path[-1], "tuple_name", "") == "ScaleByScheduleState"  # noqa: E731
    counts = optax.tree.get_all_with_path(opt_state, "count", filtering=of_schedule)  # Muon has two, always equal
    return counts[0][1] if counts else jnp.int32(0)


def _has_dropout(model: Transformer) -> bool:
    h = model.config.hparams
    return max(h.embd_pdrop, h.resid_pdrop, h.attn_pdrop) > 0


def target_weights(batch: dict[str, jax.Array], pad_id: int | None) -> Terms:
    """Weights of the targets, f32[..., b, t] and f32[..., b, p - 1]: 1 where a target counts, else 0.

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
    """Sums of the cross-entropies (nats) over the targets that count. dropout_key: None turns dropout off."""
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
