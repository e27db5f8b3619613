"""One update of a VQGAN: gradients of a batch in micro-batches, AdamW, and unused codes start again. Pure functions.

    loss of the VQGAN = l1 |x - y| + l2 (x - y)^2 + perceptual LPIPS(x, y)                  reconstruction
                      + codebook (stop(z) - e)^2 + commitment (z - stop(e))^2               from quantise_from_step on
                      + locality (z - z')^2
                      - adversarial_weight D(y)                                             from start_step on
    loss of D         = (relu(1 - D(x)) + relu(1 + D(y))) / 2

x pictures, y their reconstructions, z features, e the rows of the codebook nearest to them, D the discriminator; means
over all of a batch. Esser, Rombach and Ommer 2021 (arXiv:2012.09841) weigh the last line so that its gradient is as
long as that of the first at the last layer of the decoder. That needs both gradients of the whole batch, so that it
does not matter how the batch is split: two backward passes once the discriminator is at work, where the authors' code,
which splits no batches, needs one and a little. Both networks are updated from the same pictures y.

The encoder sees all of a picture, so codes of one plain colour differ by what is elsewhere, and a transformer has to
guess which it is. With locality x are pictures of two parts, cut along the grid of codes, z' the features that the
parts have in the pictures that they come from, and y are decoded from z', as e is nearest to z' (the idea of
arXiv:2502.09509, Kouzelis et al. 2025: what is done to features is done to the picture). docs/log.md has what it gives.

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

from mindalle_jax.config.schema import Stage1Config
from mindalle_jax.models.lpips import LPIPS
from mindalle_jax.models.vqgan import VQGAN, Autoencoded
from mindalle_jax.storage.weights import nest
from mindalle_jax.training.step import Params, updates_made
from mindalle_jax.training.vqgan.codebook import NEVER_USED, perplexity, redundant, restarts, starts_at_once
from mindalle_jax.training.vqgan.config import LossConfig
from mindalle_jax.training.vqgan.discriminator import PatchDiscriminator

LAST_LAYER = "decoder/conv_out/kernel"
"""Where the gradients of reconstruction and discriminator are balanced."""
MAX_ADVERSARIAL_WEIGHT = 1e4


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
    """Until this update the decoder sees the features, and the codebook stays as it is. Then, while rows of a fresh
    codebook are waiting for a feature to start from, nothing else is updated."""
    restart_after_steps: int
    """A code that went unused for so many updates is set to a feature of the batch; 0: never."""
    restart_redundant: bool
    """A row is set to a feature, too, if its squared distance from another is less than the mean of features from
    their rows."""
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
    distance: Any
    """f32: squared, of features from their rows of the codebook; of each picture the mean"""


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
    gradients_key, restart_key = jax.random.split(key)
    gradients = partial(_gradients, task, state, frozen, batch["image"], gradients_key)
    active = jnp.bool_(False)
    if task.discriminator is None:
        found = gradients(adversarial=False)
    else:
        active = state.step >= task.losses.start_step
        found = jax.lax.cond(active, partial(gradients, adversarial=True), partial(gradients, adversarial=False))
    grad_norm, of_discriminator = optax.tree.norm(found.grads), optax.tree.norm(found.discriminator_grads)
    finite = jnp.isfinite(found.figures["loss"]) & jnp.isfinite(grad_norm) & jnp.isfinite(of_discriminator)

    quantised = state.step >= task.quantise_from_step
    learning = finite & ~(quantised & jnp.any(state.unused >= NEVER_USED))

    updates, opt_state = task.optimizer.update(found.grads, state.opt_state, state.params)
    params: Any = optax.apply_updates(state.params, updates)
    decay = task.ema_decay
    ema = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.ema, params) if decay else {}
    params, opt_state, ema = _where(learning, (params, opt_state, ema), (state.params, state.opt_state, state.ema))

    # ---- unused codes
    used = found.counts > 0
    # A fresh row is near no feature, so that it was the nearest of them all says nothing.
    unused = jnp.where(used & (state.unused < NEVER_USED), 0, state.unused + 1)
    dead = finite & quantised & (unused >= (task.restart_after_steps or NEVER_USED))
    if task.restart_redundant:
        dead |= learning & quantised & redundant(params["codebook"], found.distance)
    started = jnp.sum(state.unused < NEVER_USED)
    dead &= jnp.cumsum(dead) <= starts_at_once(started, len(found.features))
    rows = restarts(restart_key, dead, found.features, found.errors)
    for tree in (params, ema):
        if tree:  # what the optimizer knows of a row has faded by the time that it starts again
            tree["codebook"] = jnp.where(dead[:, None], rows, tree["codebook"])
    unused = jnp.where(finite & quantised, jnp.where(dead, 0, unused), state.unused)

    # ---- the discriminator
    discriminator, discriminator_opt_state = state.discriminator, state.discriminator_opt_state
    if task.discriminator_optimizer is not None:
        updates, discriminator_opt_state = task.discriminator_optimizer.update(
            found.discriminator_grads, state.discriminator_opt_state, state.discriminator
        )
        changed = optax.apply_updates(state.discriminator, updates), discriminator_opt_state
        discriminator, discriminator_opt_state = _where(
            active & learning, changed, (state.discriminator, state.discriminator_opt_state)
        )

    figures = found.figures | {
        "perplexity": perplexity(found.counts),
        "codes_used": jnp.mean(used.astype(jnp.float32)),
        "codes_restarted": jnp.sum(dead),
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
    out: Any = task.model.apply({"params": nest(params)}, images, method=_autoencode)
    terms = _reconstruction(task.losses, frozen, images, out.images)
    error = jnp.mean(((images - jnp.clip(out.images, -1, 1)) / 2) ** 2, axis=(1, 2, 3))
    psnr = -10 * jnp.log10(jnp.maximum(error, 1e-10))  # 100 dB at most
    counts = jnp.zeros(task.model.config.n_embed, jnp.int32)
    counts = counts.at[out.codes].add(rows.astype(jnp.int32)[:, None, None])
    distance = jnp.mean(jnp.sum((out.features - out.rows) ** 2, axis=-1), axis=(1, 2))
    loss, l1, psnr, pictures, distance = (
        jnp.sum(jnp.where(rows > 0, values, 0))
        for values in (terms["loss"], terms["l1_loss"], psnr, jnp.ones_like(rows), distance)
    )
    return EvalSums(loss, l1, psnr, pictures, counts, distance)


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
    """[N]: squared error of the picture at the place of each feature"""
    distance: jax.Array
    """[]: squared, of features from their rows, mean"""


def _gradients(
    task: VqganTask,
    state: VqganState,
    frozen: dict[str, Any],
    images: jax.Array,
    key: jax.Array,
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
        dropout_key, parts_key = jax.random.split(jax.random.fold_in(key, i))
        rngs = {"dropout": dropout_key} if has_dropout else {}
        apply: Any = partial(task.model.apply, {"params": nest(params)}, rngs=rngs)
        z = apply(x, method="features")
        locality = jnp.float32(0)
        if weights.locality:
            first = _first_parts(parts_key, *z.shape[:3])[..., None]
            z = jnp.where(first, z, jnp.roll(z, 1, axis=0))
            scale = x.shape[1] // z.shape[1]
            x = jnp.where(first.repeat(scale, axis=1).repeat(scale, axis=2), x, jnp.roll(x, 1, axis=0))
            locality = jnp.mean((apply(x, method="features") - z) ** 2)
        out = apply(z, quantised, method="reconstruct")
        terms = {name: jnp.mean(term) for name, term in _reconstruction(weights, frozen, x, out.images).items()}
        stop = jax.lax.stop_gradient
        codebook = jnp.mean((stop(out.features) - out.rows) ** 2)
        commitment = jnp.mean((out.features - stop(out.rows)) ** 2)
        terms["quantisation_loss"], terms["locality_loss"] = codebook, locality
        terms["loss"] += weights.locality * locality
        terms["loss"] += jnp.where(quantised, weights.codebook * codebook + weights.commitment * commitment, 0)
        terms = {name: term / micro_batches for name, term in terms.items()}
        losses = (terms["loss"],)
        if adversarial:
            terms["adversarial_loss"] = -jnp.mean(discriminate(state.discriminator, out.images)) / micro_batches
            losses += (terms["adversarial_loss"],)
        counts = jnp.zeros(task.model.config.n_embed, jnp.int32).at[out.codes].add(1)
        b, height, width, _ = z.shape
        errors = ((x - out.images) ** 2).reshape(b, height, x.shape[1] // height, width, -1).mean(axis=(2, 4))
        return losses, (terms, counts, out.features, errors, (x, out.images))

    def add(grads: Any, xs: Any) -> Any:
        losses, pull, aux = jax.vjp(lambda params: share(params, *xs), state.params, has_aux=True)
        terms, counts, features, errors, both = aux
        ones = [tuple(jnp.float32(i == j) for j in range(len(losses))) for i in range(len(losses))]
        new = tuple(pull(one)[0] for one in ones)
        return jax.tree.map(jnp.add, grads, new), (terms, counts, features, errors, both if adversarial else None)

    nothing = jax.tree.map(jnp.zeros_like, state.params)
    start = (nothing, nothing) if adversarial else (nothing,)
    grads, (terms, counts, features, errors, both) = _scan(add, start, (images, jnp.arange(micro_batches)))
    figures = jax.tree.map(lambda term: jnp.sum(term), terms)
    counts, features = jnp.sum(counts, axis=0), features.reshape(-1, features.shape[-1])
    errors, distance = errors.ravel(), features.shape[-1] * figures["quantisation_loss"]
    of_discriminator = jax.tree.map(jnp.zeros_like, state.discriminator)
    if not adversarial:
        if task.discriminator is not None:
            names = ("adversarial_loss", "adversarial_weight", "discriminator_loss")
            figures |= dict.fromkeys(names, jnp.float32(0))
        return _Gradients(grads[0], of_discriminator, figures, counts, features, errors, distance)

    weight = weights.adversarial * adversarial_weight(*grads)
    whole = jax.tree.map(lambda first, second: first + weight * second, *grads)

    def hinge(params: Params, real: jax.Array, pictures: jax.Array) -> jax.Array:
        on_real, on_pictures = discriminate(params, real), discriminate(params, pictures)
        return (jnp.mean(nn.relu(1 - on_real)) + jnp.mean(nn.relu(1 + on_pictures))) / (2 * micro_batches)

    def add_hinge(carry: Any, xs: Any) -> Any:
        return jax.tree.map(jnp.add, carry, jax.value_and_grad(hinge)(state.discriminator, *xs)), None

    (loss, of_discriminator), _ = _scan(add_hinge, (jnp.float32(0), of_discriminator), both)
    figures |= {"adversarial_weight": weight, "discriminator_loss": loss}
    return _Gradients(whole, of_discriminator, figures, counts, features, errors, distance)


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


def _first_parts(key: jax.Array, count: int, height: int, width: int) -> jax.Array:
    """bool[count, height, width]: what lies left of or above a random line of the grid, another in each picture."""
    along, place = jax.random.split(key)
    left = jax.random.bernoulli(along, shape=(count, 1, 1))
    share = jax.random.uniform(place, (count, 1, 1))
    columns, rows = (1 + jnp.floor(share * (size - 1)) for size in (width, height))
    return jnp.where(left, jnp.arange(width) < columns, jnp.arange(height)[:, None] < rows)


def _autoencode(network: VQGAN, images: jax.Array) -> Autoencoded:
    return network.reconstruct(network.features(images))


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
