"""One training step of a VQGAN, in pure functions: gradients in micro-batches, the optimizer, restarts of unused codes.

    loss of the VQGAN = l1 |x - y| + l2 (x - y)^2 + perceptual LPIPS(x, y)                  reconstruction
                      + codebook (stop(z) - e)^2 + commitment (z - stop(e))^2               from quantise_from_step on
                      + locality (z - z')^2
                      - adversarial_weight D(y)                                             from start_step on
    loss of D         = (relu(1 - D(x)) + relu(1 + D(y))) / 2

x are images, y their reconstructions, z features, e the rows of the codebook nearest to z, and D the discriminator.
All terms are means over the complete batch. adversarial_weight makes the gradient of D(y) at the last layer of the
decoder as long as the gradient of the reconstruction (Esser, Rombach and Ommer 2021, arXiv:2012.09841). This needs
both gradients of the complete batch, so that the way in which the batch is split does not matter. So a step takes two
backward passes after start_step. The authors' code does not split batches, and needs little more than one. Both
networks learn from the same reconstructions y.

The encoder sees all of an image. So codes of one plain color differ with the rest of the image, and a transformer has
to guess which code it is. With locality, x are images composed of two parts, cut along the grid of codes. z' are the
features that the parts have in the images that they come from. y is decoded from z', and e is nearest to z'. The idea
is from Kouzelis et al. 2025 (arXiv:2502.09509): a change of the features makes the same change of the image.
docs/log.md has the results.

Parameters are flat dicts by path, as in step.py. Dimensions: n codes in the codebook, e width of a row, a micro-batches
of b images.
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
from mindalle_jax.training.step import Metrics, Params, optimizer_step, select
from mindalle_jax.training.vqgan.codebook import NEVER_USED, perplexity, redundant, restarts, starts_at_once
from mindalle_jax.training.vqgan.config import LossConfig
from mindalle_jax.training.vqgan.discriminator import PatchDiscriminator

LAST_LAYER = "decoder/conv_out/kernel"
"""The gradients of reconstruction and discriminator are balanced at this parameter."""
MAX_ADVERSARIAL_WEIGHT = 1e4


class VqganState(NamedTuple):
    """The state between two steps. Random keys are not in it: they follow from the seed and `step`."""

    step: jax.Array
    """int32: number of batches seen"""
    params: Params
    """float32"""
    opt_state: Any
    ema: Params
    """float32: moving average of params; empty if it is off"""
    unused: jax.Array
    """int32[n]: number of steps since a code was last used"""
    discriminator: Params
    """float32; empty if there is no discriminator"""
    discriminator_opt_state: Any
    skipped: jax.Array
    """int32: number of steps skipped in a row, because a loss or a gradient was not finite"""


@dataclasses.dataclass(frozen=True)
class VqganStepConfig:
    """The constants of a step, which are fixed at compilation."""

    model: VQGAN
    discriminator: PatchDiscriminator | None
    optimizer: optax.GradientTransformation
    discriminator_optimizer: optax.GradientTransformation | None
    schedule: optax.Schedule
    losses: LossConfig
    quantize_from_step: int
    """Until this step the decoder sees the features, and the codebook does not change. After it nothing else learns
    until every row of a fresh codebook has started from a feature."""
    restart_after_steps: int
    """A code that is unused for this many steps is set to a feature of the batch; 0: never."""
    restart_redundant: bool
    """If True, a row is also set to a feature if its squared distance from another row is less than the mean squared
    distance of features from their rows."""
    ema_decay: float
    seed: int


class EvalSums(NamedTuple):
    """Sums over the images that count, in one or more batches."""

    loss: Any
    """f32: the sum of the reconstruction terms"""
    l1: Any
    """f32"""
    psnr: Any
    """f32, dB: PSNR of each image by itself, with its reconstruction clipped to [-1, 1]"""
    num_images: Any
    """f32: the number of images that count"""
    counts: Any
    """int32[n]: how often each code was used"""
    distance: Any
    """f32: squared distance of features from their rows of the codebook, a mean per image"""


def fresh_params(config: Stage1Config, seed: int) -> Params:
    """Returns random parameters of a VQGAN, float32 by path."""
    images = jnp.zeros((1, config.hparams.resolution, config.hparams.resolution, 3))
    init: Any = jax.jit(VQGAN(config).init)
    return _flat(init(jax.random.key(seed, impl="threefry2x32"), images))


def discriminator_shapes(discriminator: PatchDiscriminator, resolution: int) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every parameter by its path. resolution: side of an image in pixels."""
    init = partial(_init_discriminator, discriminator, resolution=resolution)
    return {path: leaf.shape for path, leaf in jax.eval_shape(init, jax.random.key(0)).items()}


def init_vqgan_state(config: VqganStepConfig, params: Params, mesh: Mesh, *, fresh_codebook: bool) -> VqganState:
    """Returns the state before the first step, replicated on the mesh. fresh_codebook: no row has started yet."""

    def init(params: Params) -> VqganState:
        ema = jax.tree.map(jnp.copy, params) if config.ema_decay else {}
        unused = jnp.full(config.model.config.n_embed, NEVER_USED if fresh_codebook else 0, jnp.int32)
        discriminator, discriminator_opt_state = {}, {}
        if config.discriminator is not None and config.discriminator_optimizer is not None:
            key = jax.random.fold_in(jax.random.key(config.seed, impl="threefry2x32"), (1 << 32) - 1)  # of no step
            discriminator = _init_discriminator(config.discriminator, key, config.model.config.hparams.resolution)
            discriminator_opt_state = config.discriminator_optimizer.init(discriminator)
        return VqganState(
            jnp.int32(0), params, config.optimizer.init(params), ema, unused,
            discriminator, discriminator_opt_state, jnp.int32(0),
        )  # fmt: skip

    return jax.jit(init, out_shardings=NamedSharding(mesh, PartitionSpec()), donate_argnums=0)(params)


def compile_vqgan_step(config: VqganStepConfig, mesh: Mesh) -> Any:
    """Returns a compiled vqgan_train_step, (state, frozen, batch) -> (state, metrics), for a replicated state.

    It donates the state.
    """
    replicated = NamedSharding(mesh, PartitionSpec())
    return jax.jit(partial(vqgan_train_step, config), out_shardings=(replicated, None), donate_argnums=0)


def vqgan_train_step(
    config: VqganStepConfig, state: VqganState, frozen: dict[str, Any], batch: dict[str, jax.Array]
) -> tuple[VqganState, Metrics]:
    """Makes one step; returns the next state and the metrics of this step.

    batch: image uint8[a, b, S, S, 3]. frozen: parameters of LPIPS, nested, if losses.perceptual is over 0; else empty.
    If a loss or gradient is not finite, only the counts `step` and `skipped` change.
    """
    key = jax.random.fold_in(jax.random.key(config.seed, impl="threefry2x32"), state.step)
    gradients_key, restart_key = jax.random.split(key)
    gradients = partial(_gradients, config, state, frozen, batch["image"], gradients_key)
    active = jnp.bool_(False)
    if config.discriminator is None:
        found = gradients(adversarial=False)
    else:
        active = state.step >= config.losses.start_step
        found = jax.lax.cond(active, partial(gradients, adversarial=True), partial(gradients, adversarial=False))
    of_discriminator = optax.tree.norm(found.discriminator_grads)
    quantized = state.step >= config.quantize_from_step
    filling = quantized & jnp.any(state.unused >= NEVER_USED)
    next_state, metrics = optimizer_step(
        config, state, found.metrics["loss"], found.grads, also_finite=jnp.isfinite(of_discriminator), hold=filling
    )
    finite = metrics["skipped"] == 0
    learning = finite & ~filling

    # ---- unused codes
    params, ema = next_state.params, next_state.ema
    used = found.counts > 0
    # A fresh row that has not started is near no feature. If it is the nearest row of one, it still counts as unused.
    unused = jnp.where(used & (state.unused < NEVER_USED), 0, state.unused + 1)
    dead = finite & quantized & (unused >= (config.restart_after_steps or NEVER_USED))
    if config.restart_redundant:
        dead |= learning & quantized & redundant(params["codebook"], found.distance)
    started = jnp.sum(state.unused < NEVER_USED)
    dead &= jnp.cumsum(dead) <= starts_at_once(started, len(found.features))
    rows = restarts(restart_key, dead, found.features, found.errors)
    for tree in (params, ema):
        if tree:  # the optimizer's moments of a row have decayed to about 0 by the time that it restarts
            tree["codebook"] = jnp.where(dead[:, None], rows, tree["codebook"])
    unused = jnp.where(finite & quantized, jnp.where(dead, 0, unused), state.unused)

    # ---- the discriminator
    discriminator, discriminator_opt_state = state.discriminator, state.discriminator_opt_state
    if config.discriminator_optimizer is not None:
        updates, discriminator_opt_state = config.discriminator_optimizer.update(
            found.discriminator_grads, state.discriminator_opt_state, state.discriminator
        )
        changed = optax.apply_updates(state.discriminator, updates), discriminator_opt_state
        discriminator, discriminator_opt_state = select(
            active & learning, changed, (state.discriminator, state.discriminator_opt_state)
        )

    next_state = next_state._replace(
        params=params,
        ema=ema,
        unused=unused,
        discriminator=discriminator,
        discriminator_opt_state=discriminator_opt_state,
    )
    return next_state, found.metrics | metrics | {
        "perplexity": perplexity(found.counts),
        "codes_used": jnp.mean(used.astype(jnp.float32)),
        "codes_restarted": jnp.sum(dead),
    }


@partial(jax.jit, static_argnames="config")
def vqgan_eval_step(
    config: VqganStepConfig, params: Params, frozen: dict[str, Any], batch: dict[str, jax.Array]
) -> EvalSums:
    """Returns the sums of a batch: image uint8[b, S, S, 3], and rows f32[b], 0 for images that do not count."""
    images, rows = to_floats(batch["image"]), batch["rows"]
    out: Any = config.model.apply({"params": nest(params)}, images, method=_autoencode)
    terms = _reconstruction(config.losses, frozen, images, out.images)
    error = jnp.mean(((images - jnp.clip(out.images, -1, 1)) / 2) ** 2, axis=(1, 2, 3))
    psnr = -10 * jnp.log10(jnp.maximum(error, 1e-10))  # at most 100 dB
    counts = jnp.zeros(config.model.config.n_embed, jnp.int32)
    counts = counts.at[out.codes].add(rows.astype(jnp.int32)[:, None, None])
    distance = jnp.mean(jnp.sum((out.features - out.rows) ** 2, axis=-1), axis=(1, 2))
    loss, l1, psnr, num_images, distance = (
        jnp.sum(jnp.where(rows > 0, values, 0))
        for values in (terms["loss"], terms["l1_loss"], psnr, jnp.ones_like(rows), distance)
    )
    return EvalSums(loss, l1, psnr, num_images, counts, distance)


def adversarial_weight(grads: Params, adversarial_grads: Params) -> jax.Array:
    """Returns f32[] in [0, 1e4]: a ratio of lengths of two gradients at the last layer.

    It is the length of the gradient of the reconstruction, divided by the length of the gradient of the discriminator's
    term. The divisor has 1e-4 added, as in the authors' code (the paper has 1e-6).
    """
    length, adversarial_length = (jnp.linalg.norm(tree[LAST_LAYER].ravel()) for tree in (grads, adversarial_grads))
    return jnp.clip(length / (adversarial_length + 1e-4), 0, MAX_ADVERSARIAL_WEIGHT)


def to_floats(images: jax.Array) -> jax.Array:
    """Converts images from uint8 to f32 in [-1, 1]."""
    return images.astype(jnp.float32) / 255 * 2 - 1


class _Gradients(NamedTuple):
    """The gradients of one batch, and the values that restarts of codes need."""

    grads: Params
    discriminator_grads: Params
    metrics: Metrics
    counts: jax.Array
    """int32[n]: how often each code was used"""
    features: jax.Array
    """[N, e]"""
    errors: jax.Array
    """[N]: mean squared error of the image in the patch of each feature"""
    distance: jax.Array
    """[]: mean squared distance of features from their rows"""


def _gradients(
    config: VqganStepConfig,
    state: VqganState,
    frozen: dict[str, Any],
    images: jax.Array,
    key: jax.Array,
    *,
    adversarial: bool,
) -> _Gradients:
    """Computes the gradients of a batch. adversarial: whether the discriminator has started."""
    micro_batches, weights = len(images), config.losses
    quantized = state.step >= config.quantize_from_step
    has_dropout = config.model.config.hparams.pdrop > 0

    def discriminate(params: Params, images: jax.Array) -> jax.Array:
        assert config.discriminator is not None
        logits: Any = config.discriminator.apply({"params": nest(params)}, images)
        return logits

    def share(params: Params, micro: jax.Array, i: jax.Array) -> tuple[tuple[jax.Array, ...], Any]:
        """Returns the share of one micro-batch in the loss of the batch, and the discriminator's term apart."""
        x = to_floats(micro)
        dropout_key, parts_key = jax.random.split(jax.random.fold_in(key, i))
        rngs = {"dropout": dropout_key} if has_dropout else {}
        apply: Any = partial(config.model.apply, {"params": nest(params)}, rngs=rngs)
        z = apply(x, method="features")
        locality = jnp.float32(0)
        if weights.locality:
            first = _first_parts(parts_key, *z.shape[:3])[..., None]
            z = jnp.where(first, z, jnp.roll(z, 1, axis=0))
            scale = x.shape[1] // z.shape[1]
            x = jnp.where(first.repeat(scale, axis=1).repeat(scale, axis=2), x, jnp.roll(x, 1, axis=0))
            locality = jnp.mean((apply(x, method="features") - z) ** 2)
        out = apply(z, quantized, method="reconstruct")
        terms = {name: jnp.mean(term) for name, term in _reconstruction(weights, frozen, x, out.images).items()}
        stop = jax.lax.stop_gradient
        codebook = jnp.mean((stop(out.features) - out.rows) ** 2)
        commitment = jnp.mean((out.features - stop(out.rows)) ** 2)
        terms["quantisation_loss"], terms["locality_loss"] = codebook, locality
        terms["loss"] += weights.locality * locality
        terms["loss"] += jnp.where(quantized, weights.codebook * codebook + weights.commitment * commitment, 0)
        terms = {name: term / micro_batches for name, term in terms.items()}
        losses = (terms["loss"],)
        if adversarial:
            terms["adversarial_loss"] = -jnp.mean(discriminate(state.discriminator, out.images)) / micro_batches
            losses += (terms["adversarial_loss"],)
        counts = jnp.zeros(config.model.config.n_embed, jnp.int32).at[out.codes].add(1)
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
    metrics = jax.tree.map(lambda term: jnp.sum(term), terms)
    counts, features = jnp.sum(counts, axis=0), features.reshape(-1, features.shape[-1])
    errors, distance = errors.ravel(), features.shape[-1] * metrics["quantisation_loss"]
    of_discriminator = jax.tree.map(jnp.zeros_like, state.discriminator)
    if not adversarial:
        if config.discriminator is not None:
            names = ("adversarial_loss", "adversarial_weight", "discriminator_loss")
            metrics |= dict.fromkeys(names, jnp.float32(0))
        return _Gradients(grads[0], of_discriminator, metrics, counts, features, errors, distance)

    weight = weights.adversarial * adversarial_weight(*grads)
    combined = jax.tree.map(lambda first, second: first + weight * second, *grads)

    def hinge(params: Params, real: jax.Array, rebuilt: jax.Array) -> jax.Array:
        on_real, on_rebuilt = discriminate(params, real), discriminate(params, rebuilt)
        return (jnp.mean(nn.relu(1 - on_real)) + jnp.mean(nn.relu(1 + on_rebuilt))) / (2 * micro_batches)

    def add_hinge(carry: Any, xs: Any) -> Any:
        return jax.tree.map(jnp.add, carry, jax.value_and_grad(hinge)(state.discriminator, *xs)), None

    (loss, of_discriminator), _ = _scan(add_hinge, (jnp.float32(0), of_discriminator), both)
    metrics |= {"adversarial_weight": weight, "discriminator_loss": loss}
    return _Gradients(combined, of_discriminator, metrics, counts, features, errors, distance)


def _reconstruction(
    weights: LossConfig, frozen: dict[str, Any], images: jax.Array, rebuilt: jax.Array
) -> dict[str, jax.Array]:
    """Returns f32[b] by name: "loss", and the terms that it is the sum of."""
    difference = images - rebuilt
    terms = {
        "l1_loss": jnp.mean(jnp.abs(difference), axis=(1, 2, 3)),
        "l2_loss": jnp.mean(difference**2, axis=(1, 2, 3)),
    }
    loss = weights.l1 * terms["l1_loss"] + weights.l2 * terms["l2_loss"]
    if weights.perceptual:
        distance: Any = LPIPS().apply({"params": frozen}, images, rebuilt)
        terms["perceptual_loss"] = distance
        loss += weights.perceptual * distance
    return terms | {"loss": loss}


def _first_parts(key: jax.Array, count: int, height: int, width: int) -> jax.Array:
    """Returns bool[count, height, width]: True left of or above a random line of the grid, one line per image."""
    along, place = jax.random.split(key)
    left = jax.random.bernoulli(along, shape=(count, 1, 1))
    share = jax.random.uniform(place, (count, 1, 1))
    columns, rows = (1 + jnp.floor(share * (size - 1)) for size in (width, height))
    return jnp.where(left, jnp.arange(width) < columns, jnp.arange(height)[:, None] < rows)


def _autoencode(network: VQGAN, images: jax.Array) -> Autoencoded:
    return network.reconstruct(network.features(images))


def _scan(add: Callable[[Any, Any], tuple[Any, Any]], start: Any, xs: Any) -> tuple[Any, Any]:
    """Works as jax.lax.scan over micro-batches; on CPU it is a loop in Python.

    Within a compiled loop XLA:CPU has no fast code for convolutions of a backward pass: 9.4 s instead of 0.65 s
    (docs/log.md).
    """
    if jax.default_backend() != "cpu":
        return jax.lax.scan(add, start, xs)
    carry, outs = start, []
    for i in range(len(jax.tree.leaves(xs)[0])):
        carry, out = add(carry, jax.tree.map(lambda x, i=i: x[i], xs))
        outs.append(out)
    return carry, jax.tree.map(lambda *parts: jnp.stack(parts), *outs)


def _init_discriminator(discriminator: PatchDiscriminator, key: jax.Array, resolution: int) -> Params:
    return _flat(discriminator.init(key, jnp.zeros((1, resolution, resolution, 3))))


def _flat(variables: Any) -> Any:
    return flax.traverse_util.flatten_dict(variables["params"], sep="/")
