"""Contrastive training: the loss and its gradient, on any number of devices, and whole runs to a folder that ranks."""

import clip_oracle
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tokenizers import Tokenizer
from tokenizers.models import BPE

from mindalle_jax.config import OptimizerConfig
from mindalle_jax.interop.clip import _slots, clip_leaf_shapes, write_clip
from mindalle_jax.models.clip import CLIP, PIXEL_MEAN, PIXEL_STD
from mindalle_jax.sharding import BATCH, make_mesh
from mindalle_jax.training.clip_step import (
    MAX_LOGIT_SCALE,
    ClipTask,
    clip_step,
    compile_clip_step,
    contrastive_sums,
    eval_sums,
    init_params,
)
from mindalle_jax.training.optimizer import learning_rate, make_optimizer
from mindalle_jax.training.step import init_state
from mindalle_jax.weights import nest

CONFIG = clip_oracle.CONFIGS["quick-gelu"]
MODEL = CLIP(CONFIG)
SHAPES = clip_leaf_shapes(CONFIG)
B = 8


@pytest.fixture(scope="module")
def batch() -> dict[str, np.ndarray]:
    """Eight pictures; captions 0, 2 and 5 are the same, and so are 1 and 7."""
    rng = np.random.default_rng(0)
    text = clip_oracle.inputs(CONFIG)[0][[0, 1, 0, 2, 3, 0, 4, 1]]
    return {"image": rng.integers(0, 256, (B, 32, 32, 3), np.uint8), "text": text}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A ClipModel with random weights, all off their initial values."""
    return clip_oracle.random_model("quick-gelu", tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def params(model) -> dict[str, np.ndarray]:
    return flatten_dict(model.params, sep="/")


def make_task(base_lr: float = 1e-3, **changes) -> ClipTask:
    config = OptimizerConfig(base_lr=base_lr, weight_decay=0.1, betas=(0.9, 0.98))
    schedule = learning_rate(config, 0, 10)
    values = {"ema_decay": 0.0} | changes
    return ClipTask(MODEL, make_optimizer(config, schedule, "matrices", SHAPES), schedule, **values)


def replicated(params, devices: int):
    mesh = make_mesh("replicated", {}, jax.devices()[:devices])
    return mesh, jax.device_put(params, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))


def run(params, batch, devices: int, steps: int = 3, **changes):
    """The state after some updates, and the figures of each."""
    mesh, params = replicated(params, devices)
    task = make_task(**changes)
    state = init_state(task, params)
    step = compile_clip_step(task, jax.tree.map(lambda leaf: leaf.sharding, state))
    placed = jax.device_put(batch, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(BATCH)))
    figures = []
    for _ in range(steps):
        state, figure = step(state, placed)
        figures.append({name: float(value) for name, value in figure.items()})
    return jax.device_get(state), figures


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
        loss, grads = jax.jit(jax.value_and_grad(mean))(params)
    assert loss == pytest.approx(float(expected), rel=1e-5)
    named = dict(theirs.named_parameters())
    for slot in _slots(CONFIG, "torch"):
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
    sums = eval_sums(MODEL, params, chosen, np.ones(3, np.float32))
    assert [float(x) for x in sums] == [0, 3, 3, 3]


def test_rows_that_fill_up_a_batch_change_nothing(params, batch):
    """Nor do they count as wrong answers: five pairs give the same sums with three more beside them."""
    five = {name: array[:5] for name, array in batch.items()}
    expected = eval_sums(MODEL, params, five, np.ones(5, np.float32))
    sums = eval_sums(MODEL, params, batch, np.array([1, 1, 1, 1, 1, 0, 0, 0], np.float32))
    np.testing.assert_allclose(sums, expected, rtol=1e-5)
    assert float(sums.pairs) == 5 and float(sums.loss) > 1


# ---------------------------------------- one update


def test_eight_devices_learn_what_one_does(params, batch):
    """Every text is a wrong answer on whatever device it lies; only the order of sums differs.

    Adam divides a gradient by its own size, so where it is nothing but rounding its sign may differ: three updates of
    1e-3 could move a parameter 6e-3 apart. Few are: the mean difference is far below that.
    """
    one, eight = (run(params, batch, devices) for devices in (1, 8))
    for a, b in zip(one[1], eight[1], strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    differences = [np.abs(one[0].params[path] - eight[0].params[path]) for path in params]
    assert max(d.max() for d in differences) < 6.1e-3
    # Biases of keys have no gradient at all.
    assert sum(d.sum() for d in differences) / sum(d.size for d in differences) < 5e-5


def test_a_repeated_run_is_the_same_bit_for_bit(params, batch):
    one, two = run(params, batch, 8, ema_decay=0.5), run(params, batch, 8, ema_decay=0.5)
    assert one[1] == two[1]
    jax.tree.map(np.testing.assert_array_equal, one[0], two[0])


def test_weight_decay_pulls_at_matrices_alone(params, batch):
    """Not at tables, gains, biases or the temperature: with gradients of 0 they stay."""
    task = make_task()
    zeros = {path: np.zeros_like(leaf) for path, leaf in params.items()}
    updates, _ = task.optimizer.update(zeros, task.optimizer.init(params), params)
    moved = {path for path, update in updates.items() if np.any(update)}
    assert moved == {path for path in params if path.endswith("/kernel")}
    assert "visual_projection/kernel" in moved and "vision_model/embeddings/patch_embedding/kernel" in moved


def test_the_temperature_is_learned_and_stops_at_a_hundred(params, batch):
    state, figures = run(params, batch, 1)
    assert figures[-1]["logit_scale"] != pytest.approx(float(np.exp(params["logit_scale"])), rel=1e-5)
    state, figures = run(params | {"logit_scale": np.float32(5)}, batch, 1, steps=1)
    assert state.params["logit_scale"] == np.float32(MAX_LOGIT_SCALE)
    assert figures[0]["logit_scale"] == pytest.approx(100, rel=1e-5)


def test_an_update_that_is_not_finite_changes_only_the_counts(params, batch):
    _, placed = replicated(params, 1)
    task = make_task(ema_decay=0.5)
    broken = placed | {"visual_projection/kernel": placed["visual_projection/kernel"].at[0, 0].set(np.nan)}
    state = init_state(task, broken)
    before = jax.device_get(state)
    after, figures = jax.jit(clip_step, static_argnums=0)(task, state, batch)
    for name in ("params", "opt_state", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(before, name))
    assert (int(after.step), int(after.skipped), int(figures["skipped"])) == (1, 1, 1)
    assert float(figures["learning_rate"]) == pytest.approx(1e-3)


def test_the_average_follows_the_parameters(params, batch):
    """After one update half of the old and half of the new."""
    state, _ = run(params, batch, 1, steps=1, ema_decay=0.5)
    for path, leaf in state.ema.items():
        np.testing.assert_allclose(leaf, (params[path] + state.params[path]) / 2, rtol=1e-6, atol=1e-7)


def test_fresh_features_are_of_order_one_and_do_not_depend_on_devices():
    """Of each tower, before training: cosines that are all 1, or features that vanish, learn slowly."""
    params = init_params(CONFIG, SHAPES, seed=1)
    assert {path: leaf.shape for path, leaf in params.items()} == SHAPES
    again, other = init_params(CONFIG, SHAPES, seed=1), init_params(CONFIG, SHAPES, seed=2)
    assert all(leaf.tobytes() == again[path].tobytes() and leaf.dtype == np.float32 for path, leaf in params.items())
    drawn = [path for path in params if not path.endswith(("bias", "scale"))]
    assert all(np.any(params[path] != other[path]) for path in drawn) and len(drawn) > 20
    model = clip_oracle.ClipModel(CONFIG, nest(params), Tokenizer(BPE()))
    for features in clip_oracle.features(model):
        assert 0.3 < features.std() < 3
    assert params["logit_scale"] == np.float32(np.log(1 / 0.07))
