"""Runs of `mindalle train-clip`: from captioned images to a folder that ranks."""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml
from PIL import Image
from training_runs import ROOT, metrics

from mindalle_jax import ClipRanker
from mindalle_jax.config.file import load_config
from mindalle_jax.errors import CheckpointError, ConfigError, DataError
from mindalle_jax.interop.clip_layouts import clip_leaf_shapes
from mindalle_jax.training.clip import run as clip
from mindalle_jax.training.clip.run import ClipRun, ClipTrainConfig, train_clip
from mindalle_jax.training.clip.step import ClipStepConfig, clip_step, contrastive_sums
from mindalle_jax.training.tokenizers import train_tokenizer

LIGHT: Any = {"xla_backend_optimization_level": "0"}
light_sums = jax.jit(contrastive_sums, static_argnums=0, compiler_options=LIGHT)
PAIRS, STEPS = 16, 40
NAMES = [f"{color} {shape}" for color in ("red", "blue", "green", "grey") for shape in ("star", "ring", "heart", "box")]
METRICS = ("loss", "logit_scale", "grad_norm", "learning_rate", "samples_crc32")


@pytest.fixture(scope="module")
def light(request):
    """Steps of runs are compiled quickly, not for speed."""
    patch = pytest.MonkeyPatch()
    request.addfinalizer(patch.undo)

    def compile_step(config: ClipStepConfig, shardings: Any) -> Any:
        return jax.jit(partial(clip_step, config), out_shardings=(shardings, None), compiler_options=LIGHT)

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
        "optimizer": {"base_lr": 3e-3, "max_steps": STEPS, "betas": [0.9, 0.98], "weight_decay": 0.1},
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
    assert train_clip(setup[0], [], out) and len(calls) == 26 + STEPS - 20
    for a, b in zip(metrics(straight), metrics(out), strict=True):
        assert [a[name] for name in METRICS] == [b[name] for name in METRICS]
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
        ("data.train=nowhere", DataError, "data.train: nowhere does not exist"),
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
