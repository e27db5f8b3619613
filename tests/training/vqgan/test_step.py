"""One update of a VQGAN: against the losses of the paper in PyTorch, however it is split, and what becomes of codes."""

import dataclasses
import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mindalle_jax.config.schema import Config, Stage1Config, Stage1Hparams
from mindalle_jax.models.vqgan import VQGAN
from mindalle_jax.storage.weights import nest
from mindalle_jax.training.vqgan.codebook import starts_at_once
from mindalle_jax.training.vqgan.config import LossConfig
from mindalle_jax.training.vqgan.discriminator import PatchDiscriminator
from mindalle_jax.training.vqgan.step import (
    LAST_LAYER,
    EvalSums,
    VqganStepConfig,
    _autoencode,
    _first_parts,
    adversarial_weight,
    fresh_params,
    init_vqgan_state,
    to_floats,
    vqgan_eval_step,
    vqgan_train_step,
)

# 8 x 8 pixels, 8 x 8 codes out of 50: the network has tests of its own, and each of these compiles it.
HPARAMS = Stage1Hparams(z_channels=24, resolution=8, ch=32, ch_mult=(1,), num_res_blocks=1, attn_resolutions=())
STAGE1 = Stage1Config(embed_dim=16, n_embed=50, hparams=HPARAMS)
LOSSES = LossConfig(l1=1.0, l2=0.5, codebook=0.7, commitment=0.25, adversarial=0.8)
MESH = Mesh(np.array(jax.devices()[:1]), ("data",))


def constant(_: jax.Array) -> float:
    """The learning rate that is shown; `downhill` has its own."""
    return 1.0


@functools.cache  # tasks are equal where their optimizers are the same objects
def downhill(rate: float) -> optax.GradientTransformation:
    """Parameters less `rate` times the gradient: what an update changed tells the gradient."""
    return optax.scale_by_schedule(lambda _: -rate)


def make_config(**changes) -> VqganStepConfig:
    values = {
        "model": VQGAN(STAGE1), "discriminator": None, "optimizer": downhill(1.0), "discriminator_optimizer": None,
        "schedule": constant, "losses": dataclasses.replace(LOSSES, adversarial=0.0), "quantize_from_step": 0,
        "restart_after_steps": 0, "restart_redundant": False, "ema_decay": 0.0, "seed": 0,
    }  # fmt: skip
    return VqganStepConfig(**(values | changes))


def adversarial_config(start_step: int = 0, **changes) -> VqganStepConfig:
    return make_config(
        discriminator=PatchDiscriminator(width=32, layers=1), discriminator_optimizer=downhill(1.0),
        losses=dataclasses.replace(LOSSES, start_step=start_step), **changes,
    )  # fmt: skip


RESTARTING = make_config(restart_after_steps=2, optimizer=downhill(0.0), ema_decay=0.5)


def autoencode(params, images: jax.Array):
    """What training sees of pictures uint8[b, 8, 8, 3]."""
    apply = partial(VQGAN(STAGE1).apply, method=_autoencode)
    return jax.jit(apply)({"params": nest(params)}, to_floats(images))


def pictures(count: int, micro_batches: int = 1, seed: int = 0) -> dict[str, jax.Array]:
    images = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3)).astype(np.uint8)
    return {"image": jnp.asarray(images.reshape(micro_batches, -1, 8, 8, 3))}


@pytest.fixture(scope="module")
def params(random_params):
    """() -> flat parameters of a network with activations of order one, fresh arrays each time."""
    import flax.traverse_util

    flat = flax.traverse_util.flatten_dict(random_params(Config(stage1=STAGE1), "stage1"), sep="/")
    return lambda: {path: jnp.array(leaf) for path, leaf in flat.items()}


@pytest.fixture(scope="module")
def run():
    """run(config, params, batches, fresh=False) -> the states before, between and after, and the metrics."""
    compiled = {}

    def run(config, params, batches, fresh=False, frozen=None):
        state = init_vqgan_state(config, params, MESH, fresh_codebook=fresh)
        if config not in compiled:
            replicated = NamedSharding(MESH, PartitionSpec())
            compiled[config] = jax.jit(partial(vqgan_train_step, config), out_shardings=(replicated, None))
        states, metrics = [state], []
        with jax.default_matmul_precision("highest"):
            for batch in batches:
                state, figure = compiled[config](state, frozen or {}, batch)
                states.append(state)
                metrics.append(jax.device_get(figure))
        return jax.device_get(states), metrics

    return run


def change(before: dict, after: dict) -> dict[str, np.ndarray]:
    """Gradients, where updates go downhill by them."""
    return {path: before[path] - after[path] for path in before}


def test_gradients_agree_with_pytorch(oracle, params, run):
    """The losses of the paper written down in PyTorch: straight through the codebook, hinge, adaptive weight."""
    import torch
    import torch.nn.functional as F

    config, batch = adversarial_config(), pictures(4)
    (before, after), (metrics,) = run(config, params(), [batch])
    ours, of_discriminator = change(before.params, after.params), change(before.discriminator, after.discriminator)

    def tensor(array):
        return torch.from_numpy(np.array(array.transpose(3, 2, 0, 1) if array.ndim == 4 else array))

    # The oracle's network, with our weights by the project's tables.
    from mindalle_jax.interop.key_maps import slots

    table = slots(Config(stage1=STAGE1), "stage1")
    fields = dataclasses.asdict(HPARAMS) | {"embed_dim": 16, "n_embed": 50}
    fields = {k: v for k, v in fields.items() if k in oracle.VQGANConfig.__dataclass_fields__}
    theirs = oracle.VQGAN(oracle.VQGANConfig(**fields))
    theirs.load_state_dict({slot.torch_key: torch.from_numpy(slot.to_torch(before.params[slot.path]).copy())
                            for slot in table})  # fmt: skip
    leaves = {path: tensor(leaf).requires_grad_() for path, leaf in before.discriminator.items()}

    def discriminate(h):
        h = F.leaky_relu(F.conv2d(h, leaves["conv_0/kernel"], leaves["conv_0/bias"], 2, 1), 0.2)
        h = F.conv2d(h, leaves["conv_1/kernel"], None, 1, 1)
        h = F.leaky_relu(F.group_norm(h, 32, leaves["norm_1/scale"], leaves["norm_1/bias"], 1e-5), 0.2)
        return F.conv2d(h, leaves["conv_out/kernel"], leaves["conv_out/bias"], 1, 1)

    x = torch.from_numpy(np.array(batch["image"][0])).permute(0, 3, 1, 2).float() / 127.5 - 1
    z = theirs.features(x)
    e = theirs.quantize.embedding(theirs.nearest(z).unflatten(1, (8, 8))).permute(0, 3, 1, 2)
    y = theirs.decoder(theirs.post_quant_conv(z + (e - z).detach()))
    reconstruction = 1.0 * (x - y).abs().mean() + 0.5 * ((x - y) ** 2).mean()
    quantisation = 0.7 * ((z.detach() - e) ** 2).mean() + 0.25 * ((z - e.detach()) ** 2).mean()
    adversarial = -discriminate(y).mean()
    last = theirs.decoder.conv_out.weight
    lengths = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (reconstruction, adversarial)]
    weight = 0.8 * (lengths[0] / (lengths[1] + 1e-4)).clamp(0, 1e4).detach()
    loss = reconstruction + quantisation
    (loss + weight * adversarial).backward()
    their_gradients = {slot.path: slot.from_torch(theirs.get_parameter(slot.torch_key).grad.numpy()) for slot in table}
    for leaf in leaves.values():
        leaf.grad = None
    hinge = 0.5 * (F.relu(1 - discriminate(x)).mean() + F.relu(1 + discriminate(y.detach())).mean())
    hinge.backward()

    assert metrics["adversarial_weight"] == pytest.approx(weight.item(), rel=1e-4)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["discriminator_loss"] == pytest.approx(hinge.item(), rel=1e-5)
    assert len(np.unique(np.asarray(theirs.codes(x)))) > 5
    # A gradient is the difference of parameters of order 1, so 6e-8 is lost; the rest is float32 sums in another order.
    for path, gradient in their_gradients.items():
        limit = 1e-6 + 2e-4 * np.abs(gradient).max()
        np.testing.assert_allclose(ours[path], gradient.reshape(ours[path].shape), rtol=0, atol=limit, err_msg=path)
    for path, leaf in leaves.items():
        gradient = leaf.grad.numpy().transpose(2, 3, 1, 0) if leaf.ndim == 4 else leaf.grad.numpy()
        limit = 1e-6 + 2e-4 * np.abs(gradient).max()
        np.testing.assert_allclose(of_discriminator[path], gradient, rtol=0, atol=limit, err_msg=path)


def test_micro_batches_add_up_to_one_batch(params, run):
    """The adaptive weight is that of the whole batch, not one for each part of it."""
    config = adversarial_config()
    whole, (metrics,) = run(config, params(), [pictures(4)])
    parts, (part_figures,) = run(config, params(), [pictures(4, micro_batches=2)])
    for name, value in metrics.items():
        assert part_figures[name] == pytest.approx(value, rel=1e-4), name
    before, after, split = whole[0], whole[1], parts[1]
    ours, theirs = (
        change(before.params | before.discriminator, state.params | state.discriminator) for state in (after, split)
    )
    np.testing.assert_array_equal(after.unused, split.unused)
    for path, gradient in ours.items():  # as against PyTorch
        limit = 1e-6 + 2e-4 * np.abs(gradient).max()
        np.testing.assert_allclose(theirs[path], gradient, rtol=0, atol=limit, err_msg=path)


def test_unused_codes_start_again_from_features_of_the_batch(params, run):
    """After so many updates without use, a few at a time; the others stay as they are; no feature is taken twice."""
    config = RESTARTING
    batches = [pictures(2, seed=seed) for seed in range(2)]
    states, metrics = run(config, params(), batches)
    rows = [state.params["codebook"] for state in states]
    codes, features = [], []
    for batch in batches:
        out = autoencode(params(), batch["image"][0])
        codes.append(set(np.unique(out.codes).tolist()))
        features.append(np.asarray(out.features).reshape(-1, 16))
    np.testing.assert_array_equal(rows[1], rows[0])
    dead = sorted(set(range(50)) - codes[0] - codes[1])
    alive, waiting, dead = sorted(codes[0] | codes[1]), dead[8:], dead[:8]  # two pictures have 128 features
    assert waiting and metrics[1]["codes_restarted"] == len(dead) == starts_at_once(50, 128)
    assert metrics[0]["codes_restarted"] == 0
    np.testing.assert_array_equal(rows[2][alive + waiting], rows[0][alive + waiting])
    distances = np.abs(rows[2][dead][:, None] - features[1][None]).max(axis=-1)
    # Features of two programs differ by rounding.
    assert distances.min(axis=1).max() < 1e-4 and len(set(distances.argmin(axis=1).tolist())) == len(dead)
    np.testing.assert_array_equal(states[2].ema["codebook"][dead], rows[2][dead])
    assert (states[2].unused[dead] == 0).all() and set(states[2].unused[sorted(codes[1])]) == {0}
    assert (states[2].unused[waiting] == 2).all()
    assert set(states[2].unused[sorted(codes[0] - codes[1])]) <= {1}


def test_a_fresh_codebook_is_filled_from_features_and_a_trained_one_is_not(run):
    """U(-1/n, 1/n) lies near 0, features do not. Until every row has started nothing else moves."""
    config = make_config(optimizer=downhill(1e-3), ema_decay=0.5)
    fresh, batches = fresh_params(STAGE1, 0), [pictures(2, seed=seed) for seed in range(11)]
    states, metrics = run(config, jax.tree.map(jnp.copy, fresh), batches, fresh=True)
    assert [figure["codes_restarted"] for figure in metrics] == [1, 1, 2, 4, 8, 8, 8, 8, 8, 2, 0]
    assert metrics[10]["quantisation_loss"] < 0.8 * metrics[0]["quantisation_loss"]  # of noise
    for tree in ("params", "ema"):
        first, filled, last = ({**getattr(state, tree)} for state in (states[0], states[10], states[11]))
        assert np.abs(first.pop("codebook") - filled.pop("codebook")).max(axis=1).min() > 1e-3
        last.pop("codebook")
        jax.tree.map(np.testing.assert_array_equal, first, filled)
        assert any(np.any(filled[path] != leaf) for path, leaf in last.items())
    jax.tree.map(np.testing.assert_array_equal, states[0].opt_state, states[10].opt_state)
    kept, _ = run(RESTARTING, fresh, batches[:1])
    np.testing.assert_array_equal(kept[1].params["codebook"], kept[0].params["codebook"])


def test_before_codes_are_used_the_decoder_sees_features(params, run):
    """The codebook stays, no gradient comes from it, the loss is that of the pictures alone; then codes set in."""
    batches = [pictures(2, seed=seed) for seed in range(2)]
    changes = {"restart_after_steps": 1, "optimizer": downhill(1e-3)}
    states, metrics = run(make_config(quantize_from_step=1, **changes), params(), batches)
    np.testing.assert_array_equal(states[1].params["codebook"], states[0].params["codebook"])
    np.testing.assert_array_equal(states[1].unused, states[0].unused)
    assert metrics[0]["codes_restarted"] == 0 < metrics[1]["codes_restarted"]
    assert metrics[0]["loss"] == pytest.approx(metrics[0]["l1_loss"] + 0.5 * metrics[0]["l2_loss"], rel=1e-5)
    now = states[1].params
    z = autoencode(now, batches[0]["image"][0]).features
    out = VQGAN(STAGE1).apply({"params": nest(now)}, z, False, method="reconstruct")
    decoder = lambda network, z: network.decoder(network.post_quant_conv(z))  # noqa: E731
    again = VQGAN(STAGE1).apply({"params": nest(now)}, out.features, method=decoder)
    np.testing.assert_allclose(out.images, again, rtol=0, atol=1e-6)
    quantised = autoencode(now, batches[0]["image"][0]).images
    assert np.abs(quantised - out.images).max() > 1e-3


def test_parts_are_cut_along_the_grid():
    """By one straight line each, across or down, at every place of the grid and never at its edge."""
    parts = np.asarray(_first_parts(jax.random.key(0), 400, 8, 8))
    down = (parts == parts[:, :1]).all(axis=(1, 2))
    across = (parts == parts[:, :, :1]).all(axis=(1, 2))
    assert (down ^ across).all() and 150 < down.sum() < 250
    lines = np.where(down, parts[:, 0].sum(axis=1), parts[:, :, 0].sum(axis=1))
    assert set(lines) == set(range(1, 8))
    np.testing.assert_array_equal(parts[down][:, 0], np.arange(8) < lines[down, None])
    np.testing.assert_array_equal(parts[across][:, :, 0], np.arange(8) < lines[across, None])


def test_with_locality_pictures_are_mixed_of_parts(params, run):
    """The loss, written down with the cut taken from the loss's own random numbers and all else by hand."""
    config = make_config(losses=dataclasses.replace(LOSSES, adversarial=0.0, locality=0.3), optimizer=downhill(0.0))
    (before, _), (metrics,) = run(config, params(), [pictures(3)])
    key, _ = jax.random.split(jax.random.fold_in(jax.random.key(0, impl="threefry2x32"), 0))
    _, key = jax.random.split(jax.random.fold_in(key, 0))
    first = np.asarray(_first_parts(key, 3, 8, 8))  # a code a pixel
    images = np.asarray(pictures(3)["image"][0])
    features = np.asarray(autoencode(before.params, images).features)
    mixed, of_parts = images.copy(), features.copy()
    for i in range(3):
        mixed[i][~first[i]], of_parts[i][~first[i]] = images[i - 1][~first[i]], features[i - 1][~first[i]]
    network = partial(VQGAN(STAGE1).apply, {"params": nest(before.params)})
    out = network(of_parts, method="reconstruct")
    assert metrics["l1_loss"] == pytest.approx(np.abs(to_floats(mixed) - out.images).mean(), rel=1e-4)
    own = np.asarray(network(to_floats(mixed), method="features"))
    assert metrics["locality_loss"] == pytest.approx(((own - of_parts) ** 2).mean(), rel=1e-3)
    loss = metrics["l1_loss"] + 0.5 * metrics["l2_loss"] + 0.95 * metrics["quantisation_loss"]
    assert metrics["loss"] == pytest.approx(loss + 0.3 * metrics["locality_loss"], rel=1e-4)
    _, (plain,) = run(make_config(optimizer=downhill(0.0)), params(), [pictures(3)])
    assert plain["locality_loss"] == 0 and plain["l1_loss"] != metrics["l1_loss"]


@pytest.mark.slow
def test_an_update_can_be_repeated_bit_for_bit(params, run):
    """Dropout and restarts draw from the seed and the step alone."""
    model = VQGAN(dataclasses.replace(STAGE1, hparams=dataclasses.replace(HPARAMS, pdrop=0.3)))
    config = adversarial_config(model=model, restart_after_steps=1, ema_decay=0.9)
    batches = [pictures(4, 2, seed) for seed in range(2)]
    first, _ = run(config, params(), batches)
    again, _ = run(config, params(), batches)
    jax.tree.map(np.testing.assert_array_equal, first, again)


@pytest.mark.slow
def test_the_discriminator_has_no_effect_before_its_start(params, run):
    """Until then the generator learns as without one and the discriminator nothing; then both learn."""
    batches = [pictures(2, seed=seed) for seed in range(2)]
    small = {"optimizer": downhill(1e-3), "discriminator_optimizer": downhill(1e-3)}
    alone, _ = run(make_config(optimizer=downhill(1e-3)), params(), batches)
    states, metrics = run(dataclasses.replace(adversarial_config(start_step=1), **small), params(), batches)
    for path, leaf in alone[1].params.items():  # two programs: rounding of gradients of order 1, times the rate
        np.testing.assert_allclose(states[1].params[path], leaf, rtol=0, atol=1e-6, err_msg=path)
    jax.tree.map(np.testing.assert_array_equal, states[1].discriminator, states[0].discriminator)
    assert metrics[0]["adversarial_weight"] == metrics[0]["discriminator_loss"] == 0
    assert metrics[1]["adversarial_weight"] > 0
    kernels = [path for path in states[1].discriminator if path.endswith("kernel")]
    assert all(np.any(states[2].discriminator[path] != states[1].discriminator[path]) for path in kernels)
    effect = np.abs(states[2].params["decoder/conv_in/kernel"] - alone[2].params["decoder/conv_in/kernel"]).max()
    assert effect > 1e-5
    assert alone[0].discriminator == {} and alone[0].discriminator_opt_state == {}


def test_the_adaptive_weight_is_bounded():
    """Where the discriminator has no gradient, the quotient would be without bound."""
    of_length = lambda length: {LAST_LAYER: jnp.full((3, 3, 4, 4), length / 12)}  # noqa: E731
    assert adversarial_weight(of_length(3.0), of_length(1.5)) == pytest.approx(3.0 / 1.5001, rel=1e-6)
    assert adversarial_weight(of_length(3.0), of_length(0.0)) == 1e4
    assert adversarial_weight(of_length(0.0), of_length(0.0)) == 0


def test_an_update_that_is_not_finite_changes_nothing(params, run):
    """One infinite parameter makes every loss infinite or NaN; the state stays, and what was skipped is counted."""
    broken = params()
    broken["decoder/conv_out/bias"] = jnp.full(3, jnp.inf)
    states, metrics = run(adversarial_config(), broken, [pictures(4), pictures(4)])
    assert [figure["skipped"] for figure in metrics] == [1, 2] and not np.isfinite(metrics[0]["loss"])
    assert states[2].step == 2 and states[2].skipped == 2
    same = [state._replace(step=0, skipped=0) for state in (states[0], states[2])]
    jax.tree.map(np.testing.assert_array_equal, *same)


def test_validation_counts_pictures_and_codes_once(params):
    """Rows that fill up a batch do not count; PSNR is that of each picture, in dB, cut to what can be shown."""
    config, batch = make_config(), pictures(3)
    batch = {"image": batch["image"][0], "rows": jnp.array([1.0, 0.0, 1.0])}
    sums = EvalSums(*map(np.asarray, vqgan_eval_step(config, params(), {}, batch)))
    out = autoencode(params(), batch["image"])
    codes, decoded = np.asarray(out.codes), np.asarray(out.images)
    x, kept = np.asarray(batch["image"], np.float64) / 127.5 - 1, [0, 2]
    l1 = np.abs(x - decoded).mean(axis=(1, 2, 3))[kept]
    l2 = ((x - decoded) ** 2).mean(axis=(1, 2, 3))[kept]
    error = (((x - decoded.clip(-1, 1)) / 2) ** 2).mean(axis=(1, 2, 3))[kept]
    # Float32 sums of 192 numbers.
    assert sums.num_images == 2 and sums.l1 == pytest.approx(l1.sum(), rel=1e-4)
    assert sums.loss == pytest.approx((l1 + 0.5 * l2).sum(), rel=1e-4)
    assert sums.psnr == pytest.approx((-10 * np.log10(error)).sum(), rel=1e-4)
    np.testing.assert_array_equal(sums.counts, np.bincount(codes[kept].ravel(), minlength=50))


def test_pictures_of_training_are_those_of_the_codes(params):
    """What training optimises is what is decoded later: the rows themselves, not z + (e - z), which rounds."""
    images = pictures(2)["image"][0]
    out = autoencode(params(), images)
    codes, decoded = jax.jit(VQGAN(STAGE1).apply)({"params": nest(params())}, to_floats(images))
    np.testing.assert_array_equal(out.codes, codes)
    np.testing.assert_array_equal(out.rows, np.asarray(params()["codebook"])[np.asarray(codes)])
    np.testing.assert_allclose(out.images, decoded, rtol=0, atol=1e-5)  # XLA may fuse the two in another way
