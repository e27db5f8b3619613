"""One update of a VQGAN: gradients of a batch in micro-batches, AdamW, and unused codes start again. Pure functions.

    loss of the VQGAN = l1 |x - y| + l2 (x - y)^2 + perceptual LPIPS(x, y)                  reconstruction
                      + codebook (stop(z) - e)^2 + commitment (z - stop(e))^2               from quantise_from_step on
                      - adversarial_weight D(y)                                             from start_step on
    loss of D         = (relu(1 - D(x)) + relu(1 + D(y))) / 2

x pictures, y their reconstructions, z features, e the rows of the codebook nearest to them, D the discriminator; means
over all of a batch. Esser, Rombach and Ommer 2021 (arXiv:2012.09841) weigh the third line so that its gradient is as
long as that of the first at the last layer of the decoder. That needs both gradients of the whole batch, so that it
does not matter how the batch is split: two backward passes once the discriminator is at work, where the authors' code,
which splits no batches, needs one and a little. Both networks are updated from the same pictures y.

Parameters are flat dicts by path, as in step.py. Dimensions: n codes in the codebook, e width of a row, a micro-batches
of b pictures.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mindalle_jax.config import Stage1Config
from mindalle_jax.models.discriminator import PatchDiscriminator
from mindalle_jax.models.lpips import LPIPS
from mindalle_jax.models.vqgan import VQGAN
from mindalle_jax.training.step import Params, updates_made
from mindalle_jax.training.vqgan_config import LossConfig
from mindalle_jax.weights import nest

LAST_LAYER = "decoder/conv_out/kernel"
"""Where the gradients of reconstruction and discriminator are balanced."""
MAX_ADVERSARIAL_WEIGHT = 1e4
NEVER_USED = 1 << 30
"""`unused` of the rows of a fresh codebook: they start from features of the first batch."""


class VqganState(NamedTuple):
    """All that one update hands to the next. Keys of random numbers follow from the seed and `step`."""

    step: jax.Array
    """int32: batches seen"""
    params: Params
    """float32"""
    opt_state: Any
    ema: Params
    """float32: moving average of params; empty where it is off"""
    unused: jax.Array
    """int32[n]: updates since a code was last used"""
    discriminator: Params
    """float32; empty where there is none"""
    discriminator_opt_state: Any
    skipped: jax.Array
    """int32: updates skipped in a row, because a loss or a gradient was not finite"""


@dataclasses.dataclass(frozen=True)
class VqganTask:
    """What stays the same from update to update, known at compilation."""

    model: VQGAN
    discriminator: PatchDiscriminator | None
    optimizer: optax.GradientTransformation
    discriminator_optimizer: optax.GradientTransformation | None
    schedule: optax.Schedule
    losses: LossConfig
    quantise_from_step: int
    """Until this update the decoder sees the features, and the codebook stays as it is."""
    restart_after_steps: int
    """A code that went unused for so many updates is set to a feature of the batch; 0: never."""
    ema_decay: float
    seed: int


class EvalSums(NamedTuple):
    """Sums over the pictures of a batch that count, or of several."""

    loss: Any
    """f32: the reconstruction terms"""
    l1: Any
    """f32"""
    psnr: Any
    """f32, dB: of each picture by itself, cut to [-1, 1]"""
    pictures: Any
    """f32: how many count"""
    counts: Any
    """int32[n]: how often each code was used"""


def fresh_params(config: Stage1Config, seed: int) -> Params:
    """Parameters of a VQGAN that has learned nothing."""
    images = jnp.zeros((1, config.hparams.resolution, config.hparams.resolution, 3))
    init: Any = jax.jit(VQGAN(config).init)
    return _flat(init(jax.random.key(seed, impl="threefry2x32"), images))


def discriminator_shapes(discriminator: PatchDiscriminator, resolution: int) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter by its path."""
    init = partial(_init_discriminator, discriminator, resolution=resolution)
    return {path: leaf.shape for path, leaf in jax.eval_shape(init, jax.random.key(0)).items()}


def init_vqgan_state(task: VqganTask, params: Params, mesh: Mesh, *, fresh_codebook: bool) -> VqganState:
    """The state before the first update, on every device of the mesh."""

    def init(params: Params) -> VqganState:
        ema = jax.tree.map(jnp.copy, params) if task.ema_decay else {}
        unused = jnp.full(task.model.config.n_embed, NEVER_USED if fresh_codebook else 0, jnp.int32)
        discriminator, discriminator_opt_state = {}, {}
        if task.discriminator is not None and task.discriminator_optimizer is not None:
            key = jax.random.fold_in(jax.random.key(task.seed, impl="threefry2x32"), (1 << 32) - 1)  # of no update
            discriminator = _init_discriminator(task.discriminator, key, task.model.config.hparams.resolution)
            discriminator_opt_state = task.discriminator_optimizer.init(discriminator)
        return VqganState(
            jnp.int32(0), params, task.optimizer.init(params), ema, unused,
            discriminator, discriminator_opt_state, jnp.int32(0),
        )  # fmt: skip

    return jax.jit(init, out_shardings=NamedSharding(mesh, PartitionSpec()), donate_argnums=0)(params)


def compile_vqgan_step(task: VqganTask, mesh: Mesh) -> Any:
    """vqgan_train_step for a state on every device of the mesh; (state, frozen, batch) -> (state, figures)."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.jit(partial(vqgan_train_step, task), out_shardings=(everywhere, None), donate_argnums=0)


def vqgan_train_step(
    task: VqganTask, state: VqganState, frozen: dict[str, Any], batch: dict[str, jax.Array]
) -> tuple[VqganState, dict[str, jax.Array]]:
    """The next state, and the figures of this update.

    batch: image uint8[a, b, S, S, 3]. frozen: parameters of LPIPS, nested, where losses.perceptual is over 0.
    An update whose loss or gradient is not finite changes nothing but the counts.
    """
    key = jax.random.fold_in(jax.random.key(task.seed, impl="threefry2x32"), state.step)
    dropout_key, restart_key = jax.random.split(key)
    gradients = partial(_gradients, task, state, frozen, batch["image"], dropout_key)
    active = jnp.bool_(False)
    if task.discriminator is None:
        found = gradients(adversarial=False)
    else:
        active = state.step >= task.losses.start_step
        found = jax.lax.cond(active, partial(gradients, adversarial=True), partial(gradients, adversarial=False))
    grad_norm, of_discriminator = optax.tree.norm(found.grads), optax.tree.norm(found.discriminator_grads)
    finite = jnp.isfinite(found.figures["loss"]) & jnp.isfinite(grad_norm) & jnp.isfinite(of_discriminator)

    updates, opt_state = task.optimizer.update(found.grads, state.opt_state, state.params)
    params: Any = optax.apply_updates(state.params, updates)
    decay = task.ema_decay
    ema = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.ema, params) if decay else {}

    # ---- unused codes
    quantised = state.step >= task.quantise_from_step
    used = found.counts > 0
    # A fresh row is near no feature, so that it was the nearest of them all says nothing.
    unused = jnp.where(used & (state.unused < NEVER_USED), 0, state.unused + 1)
    dead = quantised & (unused >= (task.restart_after_steps or NEVER_USED))
    rows = _restarts(restart_key, dead, found.features, found.errors)
    for tree in (params, ema):
        if tree:  # what Adam knows of a row has faded by the time that it starts again
            tree["codebook"] = jnp.where(dead[:, None], rows, tree["codebook"])
    unused = jnp.where(quantised, jnp.where(dead, 0, unused), state.unused)

    # ---- the discriminator
    discriminator, discriminator_opt_state = state.discriminator, state.discriminator_opt_state
    if task.discriminator_optimizer is not None:
        updates, discriminator_opt_state = task.discriminator_optimizer.update(
            found.discriminator_grads, state.discriminator_opt_state, state.discriminator
        )
        changed = optax.apply_updates(state.discriminator, updates), discriminator_opt_state
        discriminator, discriminator_opt_state = _where(
            active & finite, changed, (state.discriminator, state.discriminator_opt_state)
        )

    params, opt_state, ema, unused = _where(
        finite, (params, opt_state, ema, unused), (state.params, state.opt_state, state.ema, state.unused)
    )
    figures = found.figures | {
        "perplexity": perplexity(found.counts),
        "codes_used": jnp.mean(used.astype(jnp.float32)),
        "codes_restarted": jnp.where(finite, jnp.sum(dead), 0),
        "grad_norm": grad_norm,
        "learning_rate": task.schedule(updates_made(state.opt_state)),
        "skipped": jnp.where(finite, 0, state.skipped + 1),
    }
    skipped = jnp.copy(figures["skipped"])  # the state's own: its memory is taken by the next update
    return (
        VqganState(
            state.step + 1, params, opt_state, ema, unused, discriminator, discriminator_opt_state, skipped
        ),
        figures,
    )  # fmt: skip


@partial(jax.jit, static_argnames="task")
def vqgan_eval_step(task: VqganTask, params: Params, frozen: dict[str, Any], batch: dict[str, jax.Array]) -> EvalSums:
    """Sums of a batch: image uint8[b, S, S, 3], rows f32[b], 0 for pictures that do not count."""
    images, rows = to_floats(batch["image"]), batch["rows"]
    out: Any = task.model.apply({"params": nest(params)}, images, method="autoencode")
    terms = _reconstruction(task.losses, frozen, images, out.images)
    error = jnp.mean(((images - jnp.clip(out.images, -1, 1)) / 2) ** 2, axis=(1, 2, 3))
    psnr = -10 * jnp.log10(jnp.maximum(error, 1e-10))  # 100 dB at most
    counts = jnp.zeros(task.model.config.n_embed, jnp.int32)
    counts = counts.at[out.codes].add(rows.astype(jnp.int32)[:, None, None])
    loss, l1, psnr, pictures = (
        jnp.sum(jnp.where(rows > 0, values, 0))
        for values in (terms["loss"], terms["l1_loss"], psnr, jnp.ones_like(rows))
    )
    return EvalSums(loss, l1, psnr, pictures, counts)


def perplexity(counts: jax.Array) -> jax.Array:
    """How many codes are in use: e to the entropy (nats) of their distribution, 1 to n. counts: int32[n]."""
    share = counts / jnp.maximum(jnp.sum(counts), 1)
    return jnp.exp(-jnp.sum(jnp.where(counts > 0, share * jnp.log(jnp.where(counts > 0, share, 1)), 0)))


def adversarial_weight(grads: Params, adversarial_grads: Params) -> jax.Array:
    """Length of the gradient of the reconstruction at the last layer, over that of the discriminator's term.

    In [0, 1e4]; the divisor has 1e-4 added, as in the authors' code (the paper has 1e-6).
    """
    length, adversarial_length = (jnp.linalg.norm(tree[LAST_LAYER].ravel()) for tree in (grads, adversarial_grads))
    return jnp.clip(length / (adversarial_length + 1e-4), 0, MAX_ADVERSARIAL_WEIGHT)


def to_floats(images: jax.Array) -> jax.Array:
    """f32 in [-1, 1] of uint8."""
    return images.astype(jnp.float32) / 255 * 2 - 1


class _Gradients(NamedTuple):
    """Of one batch."""

    grads: Params
    discriminator_grads: Params
    figures: dict[str, jax.Array]
    counts: jax.Array
    """int32[n]: how often each code was used"""
    features: jax.Array
    """[N, e]"""
    errors: jax.Array
    """[N]: squared distance of each feature from its row of the codebook"""


def _gradients(
    task: VqganTask,
    state: VqganState,
    frozen: dict[str, Any],
    images: jax.Array,
    dropout_key: jax.Array,
    *,
    adversarial: bool,
) -> _Gradients:
    """adversarial: whether the discriminator is at work."""
    micro_batches, weights = len(images), task.losses
    quantised = state.step >= task.quantise_from_step
    has_dropout = task.model.config.hparams.pdrop > 0

    def discriminate(params: Params, pictures: jax.Array) -> jax.Array:
        assert task.discriminator is not None
        logits: Any = task.discriminator.apply({"params": nest(params)}, pictures)
        return logits

    def share(params: Params, micro: jax.Array, i: jax.Array) -> tuple[tuple[jax.Array, ...], Any]:
        """What a micro-batch adds to the loss of the batch: without the discriminator's term, and that term."""
        x = to_floats(micro)
        rngs = {"dropout": jax.random.fold_in(dropout_key, i)} if has_dropout else {}
        out: Any = task.model.apply({"params": nest(params)}, x, quantised, method="autoencode", rngs=rngs)
        terms = {name: jnp.mean(term) for name, term in _reconstruction(weights, frozen, x, out.images).items()}
        stop = jax.lax.stop_gradient
        codebook = jnp.mean((stop(out.features) - out.rows) ** 2)
        commitment = jnp.mean((out.features - stop(out.rows)) ** 2)
        terms["quantisation_loss"] = codebook
        terms["loss"] += jnp.where(quantised, weights.codebook * codebook + weights.commitment * commitment, 0)
        terms = {name: term / micro_batches for name, term in terms.items()}
        losses = (terms["loss"],)
        if adversarial:
            terms["adversarial_loss"] = -jnp.mean(discriminate(state.discriminator, out.images)) / micro_batches
            losses += (terms["adversarial_loss"],)
        counts = jnp.zeros(task.model.config.n_embed, jnp.int32).at[out.codes].add(1)
        errors = jnp.sum((out.features - out.rows) ** 2, axis=-1)
        return losses, (terms, counts, out.features, errors, out.images)

    def add(grads: Any, xs: Any) -> Any:
        losses, pull, aux = jax.vjp(lambda params: share(params, *xs), state.params, has_aux=True)
        terms, counts, features, errors, pictures = aux
        ones = [tuple(jnp.float32(i == j) for j in range(len(losses))) for i in range(len(losses))]
        new = tuple(pull(one)[0] for one in ones)
        return jax.tree.map(jnp.add, grads, new), (terms, counts, features, errors, pictures if adversarial else None)

    nothing = jax.tree.map(jnp.zeros_like, state.params)
    start = (nothing, nothing) if adversarial else (nothing,)
    grads, (terms, counts, features, errors, pictures) = _scan(add, start, (images, jnp.arange(micro_batches)))
    figures = jax.tree.map(lambda term: jnp.sum(term), terms)
    counts, features = jnp.sum(counts, axis=0), features.reshape(-1, features.shape[-1])
    errors = errors.ravel()
    of_discriminator = jax.tree.map(jnp.zeros_like, state.discriminator)
    if not adversarial:
        if task.discriminator is not None:
            names = ("adversarial_loss", "adversarial_weight", "discriminator_loss")
            figures |= dict.fromkeys(names, jnp.float32(0))
        return _Gradients(grads[0], of_discriminator, figures, counts, features, errors)

    weight = weights.adversarial * adversarial_weight(*grads)
    whole = jax.tree.map(lambda first, second: first + weight * second, *grads)

    def hinge(params: Params, real: jax.Array, pictures: jax.Array) -> jax.Array:
        on_real, on_pictures = discriminate(params, to_floats(real)), discriminate(params, pictures)
        return (jnp.mean(nn.relu(1 - on_real)) + jnp.mean(nn.relu(1 + on_pictures))) / (2 * micro_batches)

    def add_hinge(carry: Any, xs: Any) -> Any:
        return jax.tree.map(jnp.add, carry, jax.value_and_grad(hinge)(state.discriminator, *xs)), None

    (loss, of_discriminator), _ = _scan(add_hinge, (jnp.float32(0), of_discriminator), (images, pictures))
    figures |= {"adversarial_weight": weight, "discriminator_loss": loss}
    return _Gradients(whole, of_discriminator, figures, counts, features, errors)


def _reconstruction(
    weights: LossConfig, frozen: dict[str, Any], images: jax.Array, pictures: jax.Array
) -> dict[str, jax.Array]:
    """f32[b] of each picture: "loss", and the terms that make it up."""
    difference = images - pictures
    terms = {
        "l1_loss": jnp.mean(jnp.abs(difference), axis=(1, 2, 3)),
        "l2_loss": jnp.mean(difference**2, axis=(1, 2, 3)),
    }
    loss = weights.l1 * terms["l1_loss"] + weights.l2 * terms["l2_loss"]
    if weights.perceptual:
        distance: Any = LPIPS().apply({"params": frozen}, images, pictures)
        terms["perceptual_loss"] = distance
        loss += weights.perceptual * distance
    return terms | {"loss": loss}


def _restarts(key: jax.Array, dead: jax.Array, features: jax.Array, errors: jax.Array) -> jax.Array:
    """f32[n, e]: for each row that is `dead` (bool[n]) another of the features [N, e], while there are enough.

    They are drawn with probabilities in proportion to `errors` [N], as the centres of k-means++ are (Arthur and
    Vassilvitskii 2007): mostly where the codebook is worst.
    """
    order = jnp.argsort(-(jnp.log(errors) + jax.random.gumbel(key, errors.shape)))
    return features[order[(jnp.cumsum(dead) - 1) % len(features)]]


def _scan(add: Callable[[Any, Any], tuple[Any, Any]], start: Any, xs: Any) -> tuple[Any, Any]:
    """jax.lax.scan over micro-batches, on CPU a loop of Python.

    Within a loop XLA:CPU has no fast code for convolutions of a backward pass: 9.4 s in place of 0.65 (docs/log.md).
    """
    if jax.default_backend() != "cpu":
        return jax.lax.scan(add, start, xs)
    carry, outs = start, []
    for i in range(len(jax.tree.leaves(xs)[0])):
        carry, out = add(carry, jax.tree.map(lambda x, i=i: x[i], xs))
        outs.append(out)
    return carry, jax.tree.map(lambda *parts: jnp.stack(parts), *outs)


def _where(condition: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda new, old: jnp.where(condition, new, old), new, old)


def _init_discriminator(discriminator: PatchDiscriminator, key: jax.Array, resolution: int) -> Params:
    return _flat(discriminator.init(key, jnp.zeros((1, resolution, resolution, 3))))


def _flat(variables: Any) -> Any:
    return flax.traverse_util.flatten_dict(variables["params"], sep="/")
