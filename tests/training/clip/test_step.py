"""One step of contrastive training: the loss and its gradient, on any number of devices."""

import functools
from functools import partial
from typing import Any

import clip_oracle
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding, PartitionSpec
from tokenizers import Tokenizer
from tokenizers.models import BPE

from mindalle_jax.config.schema import OptimizerConfig
from mindalle_jax.interop.clip import ClipModel, write_clip
from mindalle_jax.interop.clip_layouts import clip_leaf_shapes, clip_slots
from mindalle_jax.models.clip import CLIP, PIXEL_MEAN, PIXEL_STD, ClipConfig, ClipTextConfig, ClipVisionConfig
from mindalle_jax.runtime.sharding import BATCH, make_mesh
from mindalle_jax.storage.weights import nest
from mindalle_jax.text.clip_tokenizer import read_clip_tokenizer
from mindalle_jax.training.clip.step import MAX_LOGIT_SCALE, ClipStepConfig, clip_step, contrastive_sums, init_params
from mindalle_jax.training.optimizer import learning_rate, make_optimizer
from mindalle_jax.training.step import init_state

# One block a tower: compiling takes far longer than running.
CONFIG = ClipConfig(
    ClipTextConfig(clip_oracle.VOCAB_SIZE, 48, 80, 1, 4, 16, eos_token_id=clip_oracle.VOCAB_SIZE - 1),
    ClipVisionConfig(40, 64, 1, 5, 32, 8),
    projection_dim=24,
)
MODEL = CLIP(CONFIG)
SHAPES = clip_leaf_shapes(CONFIG)
B = 8
LIGHT: Any = {"xla_backend_optimization_level": "0"}
light_sums = jax.jit(contrastive_sums, static_argnums=0, compiler_options=LIGHT)


@pytest.fixture(scope="module")
def batch() -> dict[str, np.ndarray]:
    """Eight pictures; captions 0, 2 and 5 are the same, and so are 1 and 7."""
    rng = np.random.default_rng(0)
    text = clip_oracle.inputs(CONFIG)[0][[0, 1, 0, 2, 3, 0, 4, 1]]
    return {"image": rng.integers(0, 256, (B, 32, 32, 3), np.uint8), "text": text}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> ClipModel:
    """Random weights, all off their initial values."""
    rng = np.random.default_rng(1)
    fresh = init_params(CONFIG, SHAPES, seed=0)
    params = {path: leaf + 0.1 * rng.standard_normal(leaf.shape, np.float32) for path, leaf in fresh.items()}
    folder = clip_oracle.write_vocab(tmp_path_factory.mktemp("vocab"))
    return ClipModel(CONFIG, nest(params), read_clip_tokenizer(folder, CONFIG.text))


@pytest.fixture(scope="module")
def params(model) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in flatten_dict(model.params, sep="/").items()}


@functools.cache
def make_config() -> ClipStepConfig:
    config = OptimizerConfig(base_lr=1e-3, weight_decay=0.1, betas=(0.9, 0.98))
    schedule = learning_rate(config, 0, 10)
    return ClipStepConfig(MODEL, make_optimizer(config, schedule, "matrices", SHAPES), schedule, ema_decay=0.5)


@functools.cache
def light_step() -> Any:
    return jax.jit(partial(clip_step, make_config()), compiler_options=LIGHT)


def run(params, batch, devices: int, steps: int = 3):
    """The state after some steps, and the metrics of each."""
    mesh = make_mesh("replicated", {}, jax.devices()[:devices])
    replicated, split = (NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec(BATCH)))
    state = init_state(make_config(), jax.device_put(params, replicated))
    placed = jax.device_put(batch, split)
    metrics = []
    for _ in range(steps):
        state, step_metrics = light_step()(state, placed)
        state = jax.device_put(state, replicated)
        metrics.append({name: float(value) for name, value in step_metrics.items()})
    return jax.device_get(state), metrics


@pytest.fixture(scope="module")
def eight(params, batch):
    """run() on all devices."""
    return run(params, batch, 8)


# ---------------------------------------- the loss


def torch_loss(theirs, batch):
    """The contrastive loss of transformers' CLIPModel, pair by pair: wrong answers are those with another caption."""
    import torch

    pixels = (batch["image"] / np.float32(255) - np.float32(PIXEL_MEAN)) / np.float32(PIXEL_STD)
    ids = torch.from_numpy(batch["text"]).long()
    logits = theirs(input_ids=ids, pixel_values=torch.from_numpy(pixels).permute(0, 3, 1, 2)).logits_per_image
    losses = []
    for i in range(B):
        kept = [j for j in range(B) if j == i or not torch.equal(ids[i], ids[j])]
        for line in (logits[i, kept], logits[kept, i]):
            losses.append(-torch.log_softmax(line, 0)[kept.index(i)])
    return torch.stack(losses).mean(), logits


def test_loss_and_gradients_are_those_of_pytorch(model, params, batch, tmp_path):
    """Both directions, the temperature, and captions that stand twice."""
    pytest.importorskip("torch", reason="the oracle is torch, pinned for Python 3.11 only")
    from safetensors.numpy import load_file

    write_clip(tmp_path / "clip", model)
    theirs = clip_oracle.transformers_model(CONFIG, load_file(tmp_path / "clip" / "model.safetensors"))
    expected, _ = torch_loss(theirs, batch)
    expected.backward()

    def mean(params):
        sums = contrastive_sums(MODEL, params, batch, np.ones(B, np.float32))
        return sums.loss / sums.pairs

    with jax.default_matmul_precision("highest"):
        loss, grads = jax.jit(jax.value_and_grad(mean), compiler_options=LIGHT)(params)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    named = dict(theirs.named_parameters())
    for slot in clip_slots(CONFIG, "torch"):
        other = named[slot.key].grad.numpy()
        # float32: features of two programs differ by 1e-6 of their size, gradients of a sum of many by a little more;
        # where the exact gradient is 0 (biases of keys) both have noise of that size.
        np.testing.assert_allclose(
            slot.to_file(np.asarray(grads[slot.path])), other, rtol=1e-3, atol=2e-5, err_msg=slot.path
        )
    assert max(float(np.abs(leaf).max()) for leaf in grads.values()) > 0.1


def test_a_caption_that_stands_twice_is_no_wrong_answer(params, batch):
    """Pictures 0, 2 and 5 share a caption: of these three alone, nothing is left to tell apart, and the loss is 0."""
    chosen = {name: array[[0, 2, 5]] for name, array in batch.items()}
    sums = light_sums(MODEL, params, chosen, np.ones(3, np.float32))
    assert [float(x) for x in sums] == [0, 3, 3, 3]


def test_rows_that_fill_up_a_batch_change_nothing(params, batch):
    """Nor do they count as wrong answers: five pairs give the same sums with three more beside them."""
    five = {name: array[:5] for name, array in batch.items()}
    expected = light_sums(MODEL, params, five, np.ones(5, np.float32))
    sums = light_sums(MODEL, params, batch, np.array([1, 1, 1, 1, 1, 0, 0, 0], np.float32))
    np.testing.assert_allclose(sums, expected, rtol=1e-5)
    assert float(sums.pairs) == 5 and float(sums.loss) > 1


# ---------------------------------------- one step


def test_eight_devices_learn_what_one_does(params, batch, eight):
    """Every text is a wrong answer on whatever device it lies; only the order of sums differs.

    Adam divides a gradient by its own size, so where it is nothing but rounding its sign may differ: three steps of
    1e-3 could move a parameter 6e-3 apart. Few are: the mean difference is far below that.
    """
    one = run(params, batch, 1)
    for a, b in zip(one[1], eight[1], strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    differences = [np.abs(one[0].params[path] - eight[0].params[path]) for path in params]
    assert max(d.max() for d in differences) < 6.1e-3
    # Biases of keys have no gradient at all.
    assert sum(d.sum() for d in differences) / sum(d.size for d in differences) < 5e-5


def test_a_repeated_run_is_the_same_bit_for_bit(params, batch, eight):
    again = run(params, batch, 8)
    assert again[1] == eight[1]
    jax.tree.map(np.testing.assert_array_equal, again[0], eight[0])


def test_weight_decay_pulls_at_matrices_alone(params):
    """Not at tables, gains, biases or the temperature: with gradients of 0 they stay."""
    config = make_config()
    zeros = {path: np.zeros_like(leaf) for path, leaf in params.items()}
    updates, _ = jax.jit(
        lambda zeros, params: config.optimizer.update(zeros, config.optimizer.init(params), params),
        compiler_options=LIGHT,
    )(zeros, params)
    moved = {path for path, update in updates.items() if np.any(update)}
    assert moved == {path for path in params if path.endswith("/kernel")}
    assert "visual_projection/kernel" in moved and "vision_model/embeddings/patch_embedding/kernel" in moved


def test_the_temperature_is_learned_and_stops_at_a_hundred(params, batch, eight):
    assert eight[1][-1]["logit_scale"] != pytest.approx(float(np.exp(params["logit_scale"])), rel=1e-5)
    state, metrics = run(params | {"logit_scale": np.float32(5)}, batch, 1, steps=1)
    assert state.params["logit_scale"] == np.float32(MAX_LOGIT_SCALE)
    assert metrics[0]["logit_scale"] == pytest.approx(100, rel=1e-5)


def test_a_step_that_is_not_finite_changes_only_the_counts(params, batch):
    broken = params["visual_projection/kernel"].copy()
    broken[0, 0] = np.nan
    broken = params | {"visual_projection/kernel": broken}
    before, _ = run(broken, batch, 1, steps=0)
    after, metrics = run(broken, batch, 1, steps=2)
    for name in ("params", "opt_state", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(before, name))
    assert (int(after.step), int(after.skipped), metrics[1]["skipped"]) == (2, 2, 2)
    assert metrics[1]["learning_rate"] == pytest.approx(1e-3)


def test_the_average_follows_the_parameters(params, batch):
    """After one step half of the old and half of the new."""
    state, _ = run(params, batch, 1, steps=1)
    assert any(np.any(state.params[path] != leaf) for path, leaf in params.items())
    for path, leaf in state.ema.items():
        np.testing.assert_allclose(leaf, (params[path] + state.params[path]) / 2, rtol=1e-6, atol=1e-7)


def test_fresh_features_are_of_order_one_and_do_not_depend_on_devices():
    """Of each tower, before training: cosines that are all 1, or features that vanish, learn slowly."""
    params = init_params(CONFIG, SHAPES, seed=1)
    assert {path: leaf.shape for path, leaf in params.items()} == SHAPES
    again, other = init_params(CONFIG, SHAPES, seed=1), init_params(CONFIG, SHAPES, seed=2)
    assert all(leaf.tobytes() == again[path].tobytes() and leaf.dtype == np.float32 for path, leaf in params.items())
    drawn = [path for path in params if not path.endswith(("bias", "scale"))]
    assert all(np.any(params[path] != other[path]) for path in drawn) and len(drawn) > 15
    model = ClipModel(CONFIG, nest(params), Tokenizer(BPE()))
    for features in clip_oracle.features(model):
        assert 0.3 < features.std() < 3
    assert params["logit_scale"] == np.float32(np.log(1 / 0.07))
