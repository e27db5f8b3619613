"""Contrastive training: the loss and its gradient, on any number of devices, and whole runs to a folder that ranks."""

import dataclasses
import functools
import json
from functools import partial
from pathlib import Path
from typing import Any

import clip_oracle
import jax
import numpy as np
import pytest
import yaml
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import BPE
from training_runs import ROOT, metrics

from mindalle_jax import ClipRanker
from mindalle_jax.config.file import load_config
from mindalle_jax.config.schema import OptimizerConfig
from mindalle_jax.errors import CheckpointError, ConfigError, DataError
from mindalle_jax.interop.clip import ClipModel, write_clip
from mindalle_jax.interop.clip_layouts import clip_leaf_shapes, clip_slots
from mindalle_jax.models.clip import CLIP, PIXEL_MEAN, PIXEL_STD, ClipConfig, ClipTextConfig, ClipVisionConfig
from mindalle_jax.runtime.sharding import BATCH, make_mesh
from mindalle_jax.storage.weights import nest
from mindalle_jax.text.clip_tokenizer import read_clip_tokenizer
from mindalle_jax.training.clip import run as clip
from mindalle_jax.training.clip.run import ClipRun, ClipTrainConfig, train_clip
from mindalle_jax.training.clip.step import MAX_LOGIT_SCALE, ClipStepConfig, clip_step, contrastive_sums, init_params
from mindalle_jax.training.optimizer import learning_rate, make_optimizer
from mindalle_jax.training.step import init_state
from mindalle_jax.training.tokenizers import train_tokenizer

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
    """The state after some updates, and the figures of each."""
    mesh = make_mesh("replicated", {}, jax.devices()[:devices])
    everywhere, split = (NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec(BATCH)))
    state = init_state(make_config(), jax.device_put(params, everywhere))
    placed = jax.device_put(batch, split)
    figures = []
    for _ in range(steps):
        state, figure = light_step()(state, placed)
        state = jax.device_put(state, everywhere)
        figures.append({name: float(value) for name, value in figure.items()})
    return jax.device_get(state), figures


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


# ---------------------------------------- one update


def test_eight_devices_learn_what_one_does(params, batch, eight):
    """Every text is a wrong answer on whatever device it lies; only the order of sums differs.

    Adam divides a gradient by its own size, so where it is nothing but rounding its sign may differ: three updates of
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
    task = make_config()
    zeros = {path: np.zeros_like(leaf) for path, leaf in params.items()}
    updates, _ = jax.jit(
        lambda zeros, params: task.optimizer.update(zeros, task.optimizer.init(params), params),
        compiler_options=LIGHT,
    )(zeros, params)
    moved = {path for path, update in updates.items() if np.any(update)}
    assert moved == {path for path in params if path.endswith("/kernel")}
    assert "visual_projection/kernel" in moved and "vision_model/embeddings/patch_embedding/kernel" in moved


def test_the_temperature_is_learned_and_stops_at_a_hundred(params, batch, eight):
    assert eight[1][-1]["logit_scale"] != pytest.approx(float(np.exp(params["logit_scale"])), rel=1e-5)
    state, figures = run(params | {"logit_scale": np.float32(5)}, batch, 1, steps=1)
    assert state.params["logit_scale"] == np.float32(MAX_LOGIT_SCALE)
    assert figures[0]["logit_scale"] == pytest.approx(100, rel=1e-5)


def test_an_update_that_is_not_finite_changes_only_the_counts(params, batch):
    broken = params["visual_projection/kernel"].copy()
    broken[0, 0] = np.nan
    broken = params | {"visual_projection/kernel": broken}
    before, _ = run(broken, batch, 1, steps=0)
    after, figures = run(broken, batch, 1, steps=2)
    for name in ("params", "opt_state", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(before, name))
    assert (int(after.step), int(after.skipped), figures[1]["skipped"]) == (2, 2, 2)
    assert figures[1]["learning_rate"] == pytest.approx(1e-3)


def test_the_average_follows_the_parameters(params, batch):
    """After one update half of the old and half of the new."""
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


# ---------------------------------------- whole runs

PAIRS, UPDATES = 16, 40
NAMES = [f"{color} {shape}" for color in ("red", "blue", "green", "grey") for shape in ("star", "ring", "heart", "box")]
FIGURES = ("loss", "logit_scale", "grad_norm", "learning_rate", "samples_crc32")


@pytest.fixture(scope="module")
def light(request):
    """Updates of runs are compiled quickly, not for speed."""
    patch = pytest.MonkeyPatch()
    request.addfinalizer(patch.undo)

    def compile_step(task: ClipStepConfig, shardings: Any) -> Any:
        return jax.jit(partial(clip_step, task), out_shardings=(shardings, None), compiler_options=LIGHT)

    patch.setattr(clip, "compile_clip_step", compile_step)
    patch.setattr(clip, "eval_sums", light_sums)


@pytest.fixture(scope="module")
def setup(tmp_path_factory) -> tuple[Path, Path]:
    """A configuration file and its data: sixteen pictures of noise with a name each."""
    folder = tmp_path_factory.mktemp("clip-run")
    rng = np.random.default_rng(0)
    (folder / "data").mkdir()
    for i, name in enumerate(NAMES):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / "data" / f"{i:02}.png")
        (folder / "data" / f"{i:02}.txt").write_text(f"a {name}", encoding="utf-8")
    train_tokenizer(folder / "data", folder / "tokenizer", vocab_size=560, kind="clip")
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    tree = {
        "clip": {
            "projection_dim": 24,
            "text": text | {"max_position_embeddings": 8},
            "vision": text | {"hidden_size": 40, "image_size": 16, "patch_size": 8},
        },
        "data": {"train": str(folder / "data"), "valid": str(folder / "data"), "threads": 1},
        "optimizer": {"base_lr": 3e-3, "max_steps": UPDATES, "betas": [0.9, 0.98], "weight_decay": 0.1},
        "experiment": {"local_batch_size": 2, "total_batch_size": PAIRS, "valid_batch_size": PAIRS},
        "training": {"tokenizer": str(folder / "tokenizer"), "checkpoint_every_steps": 10, "validate_every_steps": 20},
    }
    (folder / "clip.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    return folder / "clip.yaml", folder / "data"


@pytest.fixture(scope="module")
def straight(setup, light, tmp_path_factory) -> Path:
    """The folder of a run that was not interrupted."""
    out = tmp_path_factory.mktemp("runs") / "straight"
    assert train_clip(setup[0], [], out)
    return out


def test_a_run_learns_its_pairs_by_heart(straight):
    lines = metrics(straight, "valid")
    assert [line["step"] for line in lines] == [20, 40]
    assert (lines[-1]["image_to_text"], lines[-1]["text_to_image"]) == (1, 1)
    assert lines[-1]["loss"] < 0.1 and metrics(straight)[0]["loss"] > 2  # ln 16 = 2.8 by chance


def test_the_result_ranks_pictures_by_their_captions(straight, setup):
    ranker = ClipRanker.from_pretrained(straight)
    pictures = [Image.open(setup[1] / f"{i:02}.png") for i in range(PAIRS)]
    features = ranker.encode_images(pictures)
    cosines = ranker.encode_text([f"a {name}" for name in NAMES]) @ features.T
    assert cosines.argmax(axis=0).tolist() == cosines.argmax(axis=1).tolist() == list(range(PAIRS))


def test_the_result_is_the_same_model_to_transformers(straight, setup):
    """Network, tokenizer and the numbers of the preprocessor, by transformers' own reading of the folder."""
    torch = pytest.importorskip("torch", reason="the oracle is torch, pinned for Python 3.11 only")
    from transformers import CLIPModel, CLIPTokenizer

    ranker = ClipRanker.from_pretrained(straight)
    pictures = [Image.open(setup[1] / f"{i:02}.png") for i in range(PAIRS)]
    texts = [*(f"a {name}" for name in NAMES), "two words nobody said"]
    settings = json.loads((straight / "preprocessor_config.json").read_text(encoding="utf-8"))
    assert settings["crop_size"] == {"height": 16, "width": 16}
    pixels = (np.stack([np.asarray(picture) for picture in pictures]) / 255 - settings["image_mean"]) / settings[
        "image_std"
    ]
    tokens = CLIPTokenizer.from_pretrained(straight)(
        texts, padding="max_length", max_length=8, truncation=True, return_tensors="pt"
    )
    model = CLIPModel.from_pretrained(straight).eval()
    with torch.inference_mode(), pytest.warns(UserWarning, match="tokens with start and end"):
        result = model(input_ids=tokens["input_ids"], pixel_values=torch.tensor(pixels).permute(0, 3, 1, 2).float())
        ours = ranker.encode_text(texts), ranker.encode_images(pictures)
    # Features of length 1 in float32, as in tests/models/test_clip.py.
    np.testing.assert_allclose(ours[0], result.text_embeds.numpy(), rtol=0, atol=1e-5)
    np.testing.assert_allclose(ours[1], result.image_embeds.numpy(), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_run_that_goes_on_is_the_straight_one_bit_for_bit(straight, setup, light, tmp_path, monkeypatch):
    """Killed between checkpoints: the position in the data, Adam's averages and the schedule are all restored."""
    out, make_batch, calls = tmp_path / "out", ClipRun.make_batch, []

    def dies(self, rows):
        calls.append(1)
        if len(calls) == 26:
            raise RuntimeError("killed")
        return make_batch(self, rows)

    monkeypatch.setattr(ClipRun, "make_batch", dies)
    with pytest.raises(RuntimeError, match="killed"):
        train_clip(setup[0], [], out)
    assert not (out / "model.safetensors").exists()
    assert train_clip(setup[0], [], out) and len(calls) == 26 + UPDATES - 20
    for a, b in zip(metrics(straight), metrics(out), strict=True):
        assert [a[name] for name in FIGURES] == [b[name] for name in FIGURES]
    assert (straight / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert train_clip(setup[0], [], out)  # complete: nothing is done
    with pytest.raises(ConfigError, match="optimizer.base_lr was 0.003"):
        train_clip(setup[0], ["optimizer.base_lr=1"], out)


@pytest.mark.parametrize(
    ("override", "error", "words"),
    [
        ("experiment.local_batch_size=1", ConfigError, "local_batch_size must be 2"),
        ("sharding.strategy=fsdp", ConfigError, "must be 'replicated'"),
        ("clip.text.vocab_size=600", ConfigError, "leave them out"),
        ("clip.text.max_position_embeddings=1", ConfigError, "at least 2"),
        ("clip.text.num_attention_heads=5", ConfigError, "clip.text.num_attention_heads is 5"),
        ("clip.vision.patch_size=32", ConfigError, "0 patches"),
        ("clip.vison.patch_size=8", ConfigError, "unknown field clip.vison; did you mean vision"),
        ("training.tokenizer=", ConfigError, "training.tokenizer"),
        ("training.tokenizer=nowhere", CheckpointError, "nowhere: holds no tokenizer"),
        ("data.train=nowhere", DataError, "nowhere: does not exist"),
    ],
)
def test_what_no_run_can_have_is_refused_before_anything_is_written(setup, tmp_path, override, error, words):
    with pytest.raises(error, match=words) as raised:
        train_clip(setup[0], [override], tmp_path / "out")
    assert "\n" not in str(raised.value) and not (tmp_path / "out").exists()


def test_the_recipe_of_scenes_is_a_small_model():
    config = load_config(ROOT / "configs" / "scenes" / "clip.yaml", ["training.tokenizer=x"], ClipTrainConfig)
    small = dataclasses.replace(config.clip.text, vocab_size=640, eos_token_id=639)
    shapes = clip_leaf_shapes(dataclasses.replace(config.clip, text=small))
    assert 2e6 < sum(int(np.prod(shape)) for shape in shapes.values()) < 3e6
    assert config.experiment.local_batch_size == config.experiment.total_batch_size
