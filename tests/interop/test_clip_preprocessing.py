"""preprocessor_config.json: followed as transformers follows it, or refused in one sentence; never ignored."""

import json
import shutil
from pathlib import Path
from typing import Any

import clip_oracle
import numpy as np
import pytest
from PIL import Image

from mindalle_jax import ClipRanker
from mindalle_jax.errors import CheckpointError
from mindalle_jax.interop.clip import read_clip, write_clip
from mindalle_jax.interop.clip_preprocessing import (
    FILE,
    dump_preprocessing,
    openai_preprocessing,
    parse_preprocessing,
)
from mindalle_jax.models.clip import Preprocessing

CAPTIONS = ["the cat", "a dog and the cat", "the dog's cat"]
OTHERS = {
    "as OpenAI": {},
    "another mean and std": {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.5, 0.3]},
    "one number for all colors": {"image_mean": 0.5, "image_std": 0.25},
    "no normalization": {"do_normalize": False},
    "a larger image, cropped": {"size": {"shortest_edge": 40}},
    "an old file": {"size": 36, "crop_size": 32, "feature_extractor_type": "CLIPFeatureExtractor"},
    "stretched": {"size": {"height": 32, "width": 32}, "do_center_crop": False},
    "bilinear": {"resample": 2},
    "all at once": {
        "size": {"shortest_edge": 35},
        "resample": 1,
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [1, 2, 3],
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return clip_oracle.random_model("quick-gelu", tmp_path_factory.mktemp("words"))


@pytest.fixture
def folder(model, tmp_path) -> Path:
    write_clip(tmp_path / "clip", model)
    return tmp_path / "clip"


def change(folder: Path, **settings: Any) -> None:
    content = json.loads((folder / FILE).read_text())
    if "feature_extractor_type" in settings:
        del content["image_processor_type"]
    (folder / FILE).write_text(json.dumps(content | settings))


def images(square: bool) -> list[np.ndarray]:
    """32 of one square size, or of many shapes; a quarter of them are smooth."""
    rng = np.random.default_rng(5)
    shapes = [(48, 48)] * 32 if square else [(33 + 5 * n % 31, 34 + 7 * n % 29) for n in range(32)]
    noisy = [rng.integers(0, 256, (*shape, 3), np.uint8) for shape in shapes]
    return [
        np.asarray(Image.fromarray(one[:4, :4]).resize(one.shape[1::-1])) if n % 4 == 0 else one
        for n, one in enumerate(noisy)
    ]


@pytest.mark.parametrize("name", OTHERS)
def test_scores_and_order_are_those_of_transformers(folder, name):
    torch = pytest.importorskip("torch", reason="the oracle is torch, pinned for Python 3.11 only")
    from transformers import CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    change(folder, **OTHERS[name])
    ranker = ClipRanker.from_pretrained(folder)
    theirs = CLIPModel.from_pretrained(folder).eval()
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    ids = torch.from_numpy(ranker.tokenize(CAPTIONS)).long()
    for square in (True, False):
        pixels = processor([Image.fromarray(image) for image in images(square)], return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            features = theirs(input_ids=ids, pixel_values=pixels)
        expected = (features.text_embeds @ features.image_embeds.T).numpy()
        found = np.stack([ranker.scores(caption, images(square)) for caption in CAPTIONS])
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(np.argsort(-found, kind="stable"), np.argsort(-expected, kind="stable"))


def test_another_mean_changes_scores(folder):
    """They differed by up to 0.376 from transformers', silently."""
    before = ClipRanker.from_pretrained(folder).scores("the cat", images(True))
    change(folder, **OTHERS["another mean and std"])
    after = ClipRanker.from_pretrained(folder).scores("the cat", images(True))
    assert np.abs(after - before).max() > 0.01


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_read_is_written_again(folder, tmp_path, name):
    change(folder, **OTHERS[name])
    first = ClipRanker.from_pretrained(folder)
    first.save_pretrained(tmp_path / "again")
    again = ClipRanker.from_pretrained(tmp_path / "again")
    assert again.preprocessing == first.preprocessing
    np.testing.assert_array_equal(first.scores("the cat", images(False)), again.scores("the cat", images(False)))


def test_without_a_file_images_are_preprocessed_as_for_openais_models(folder):
    (folder / FILE).unlink()
    assert read_clip(folder).preprocessing is None
    ranker = ClipRanker.from_pretrained(folder)
    assert ranker.preprocessing == Preprocessing(32, 32) == openai_preprocessing(ranker.config)
    assert not ranker.preprocessing.round_down


def test_the_only_thing_that_a_file_does_not_say():
    """OpenAI's models, written as a folder, are cropped by transformers, which rounds down."""
    dumped = dump_preprocessing(Preprocessing(32, 32))
    assert parse_preprocessing(dumped, 32, "x") == Preprocessing(32, 32, round_down=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_resize": False}, "do_resize is False; only true is followed"),
        ({"do_rescale": False}, "do_rescale is False; only true is followed"),
        ({"do_normalize": "yes"}, "do_normalize is 'yes'; it must be true or false"),
        ({"do_center_crop": False}, "do_center_crop is False; it must be true, unless size has height and width"),
        ({"do_pad": True}, "do_pad is True; only false is followed"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor is 0.0078.*; only 1/255 is followed"),
        ({"rescale_factor": 1}, "rescale_factor is 1; only 1/255"),
        ({"crop_size": {"height": 24, "width": 32}}, "crop_size is .*, but the image tower takes 32 x 32"),
        ({"crop_size": 224}, "crop_size is 224, but the image tower takes 32 x 32"),
        ({"size": 24}, "size is 24; it must be from 32 to 16,384"),
        ({"size": {"shortest_edge": 10**9}}, "size is 1000000000; it must be"),
        ({"size": {"height": 40, "width": 40}}, "size is .*; a shortest_edge is followed, or height and width of 32"),
        (
            {"size": {"shortest_edge": 32, "longest_edge": 64}},
            "size is .*; a shortest_edge is followed, or height and width",
        ),
        ({"size": True}, "size is True; it must be from 32"),
        ({"resample": 9}, "resample is 9; Pillow's filters are 0 to 5"),
        ({"resample": "bicubic"}, "resample is 'bicubic'; Pillow's filters"),
        ({"image_mean": [0.5, 0.5]}, "image_mean is .*; it must be three numbers"),
        ({"image_mean": [0.5, 0.5, float("nan")]}, "image_mean is .*; it must be three numbers"),
        ({"image_std": [0.5, 0, 0.5]}, "image_std is .*; it must be three numbers"),
        ({"image_std": "0.5"}, "image_std is '0.5'; it must be three numbers"),
        ({"image_processor_type": "SiglipImageProcessor"}, "is of a 'SiglipImageProcessor'; only CLIPImageProcessor"),
        ({"image_processor_type": ["CLIPImageProcessor"]}, "is of a .*; only CLIPImageProcessor is followed"),
    ],
)
def test_what_cannot_be_followed_is_refused(folder, settings, message):
    change(folder, **settings)
    with pytest.raises(CheckpointError, match=f"{FILE}: {message}"):
        ClipRanker.from_pretrained(folder)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"{", b"\xff", b"3"])
def test_a_damaged_file_is_refused(folder, content):
    (folder / FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=FILE):
        ClipRanker.from_pretrained(folder)


def test_the_file_is_fetched_from_the_hub_too(folder, monkeypatch, tmp_path):
    from mindalle_jax.hub import resolve

    def fetch(name: str, patterns: list[str], **_: Any) -> Path:
        target = tmp_path / "hub"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        for pattern in patterns:
            if (folder / pattern).exists():
                shutil.copyfile(folder / pattern, target / pattern)
        return target

    monkeypatch.setattr(resolve, "fetch_repo", fetch)
    change(folder, image_mean=[0.5, 0.5, 0.5])
    assert ClipRanker.from_pretrained("pets/clip").preprocessing.mean == (0.5, 0.5, 0.5)
