"""scripts/emoji/train_demo.py: the whole recipe with tiny networks, to a model with its ranker.

Nothing is learned in so few updates; every stage reads what the one before it wrote. That a recipe that was stopped
ends in the same bits is tested with the other one, tests/scripts/scenes/test_train_demo.py.
"""

import dataclasses
import json
import math
from typing import Any

import pytest
from PIL import Image

from mindalle_jax import ClipRanker, Dalle
from mindalle_jax.config.file import load_config
from mindalle_jax.interop.clip import clip_leaf_shapes
from mindalle_jax.storage.weights import count_parameters, read_manifest
from mindalle_jax.training.clip.run import ClipTrainConfig
from mindalle_jax.training.config import FinetuneConfig
from mindalle_jax.training.vqgan.config import VqganTrainConfig
from mindalle_jax.training.vqgan.run import vqgan_model_config
from scripts import recipe
from scripts.emoji import dataset, measure, packages, train_demo
from scripts.emoji.packages import PACKAGES
from tests.emoji_packages import write_packages
from tests.tiny_recipe import tiny_changes

PROMPTS = 3


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Any:
    """The folder of a run of all stages. Read only."""
    work = tmp_path_factory.mktemp("emoji") / "work"
    (work / "packages").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        known = write_packages(work / "packages")
        patch.setattr(train_demo, "fetch_packages", lambda folder: packages.fetch_packages(folder, known))
        patch.setattr(train_demo, "NUM_VALID", 8)
        patch.setattr(train_demo, "VOCAB_SIZE", 600)
        patch.setattr(measure, "BEST_OF", 2)
        patch.setattr(dataset, "HELDOUT_SHARE", 3)
        patch.setitem(train_demo.CHANGES, "cpu", tiny_changes(16))
        dataset.pairs.cache_clear()
        train_demo.main(train_demo.parser().parse_args(["--work", str(work), "--prompts", str(PROMPTS)]))
        yield work
    dataset.pairs.cache_clear()


@pytest.mark.slow
def test_the_folder_is_a_model_with_its_ranker(made):
    """And says what it is, whose images it learned, and how good it is."""
    demo = made / "demo"
    card = (demo / "README.md").read_text(encoding="utf-8")
    assert "{" not in card and all(package.credit in card for package in PACKAGES)
    for stage in ("stage1", "stage2"):
        assert {entry["dtype"] for entry in read_manifest(demo)["tensors"][stage].values()} == {"float16"}
    model, ranker = Dalle.from_pretrained(demo), ClipRanker.from_pretrained(demo / "ranker")
    images = model.generate("a cat, 3d style", num_candidates=2, ranker=ranker)
    assert images.images.shape == (2, 64, 64, 3) and images.scores is not None
    assert model.tokenizer.known_words.about == train_demo.ABOUT

    metrics = json.loads((demo / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["prompts"] == PROMPTS
    for split in ("valid", "heldout"):
        for way in ("one image per prompt", "best of 2"):
            assert metrics[f"{split}: {way}"].keys() == {"prompts", "thing", "style", "thing and style", "ground"}
    for split in ("train", "heldout"):
        assert 0 < metrics[f"{split}: reconstructions"]["dB"] < 30
    assert metrics["judge: all images as rendered"]["thing and style"] == 1


@pytest.mark.slow
def test_sheets_lie_beside_the_model(made):
    """Samples of both splits, samples above the nearest images of training, and what visitors get."""
    for name, size in {
        "valid": (512, 64), "heldout": (512, 64), "nearest": (512, 128), "visitors": (512, 320)
    }.items():  # fmt: skip
        with Image.open(made / f"{name}.png") as sheet:
            assert sheet.size == size, name
    lines = (made / "visitors.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 40 and lines[0].startswith("a cat: ")


def test_there_are_forty_prompts_of_visitors():
    prompts = measure.VISITOR_PROMPTS.read_text(encoding="utf-8").splitlines()
    assert len(prompts) == len(set(prompts)) == 40 and all(prompt == prompt.strip() != "" for prompt in prompts)


def test_both_sizes_fit_in_the_package():
    """In float16, tokenizers and papers aside: the smaller one beside the model of scenes, the larger one alone."""
    configs, sizes = recipe.CONFIGS / "emoji", []
    for changes in ({}, train_demo.CHANGES["gpu"]):
        vqgan = load_config(configs / "vqgan.yaml", changes.get("vqgan", []), VqganTrainConfig)
        clip = load_config(configs / "clip.yaml", ["training.tokenizer=any", *changes.get("clip", [])], ClipTrainConfig)
        overrides = ["training.vqgan=any", *changes.get("transformer", [])]
        transformer = load_config(
            configs / "transformer.yaml", overrides, FinetuneConfig, vqgan_model_config(vqgan.stage1)
        )
        text = dataclasses.replace(clip.clip.text, vocab_size=train_demo.VOCAB_SIZE)
        model = transformer.model_config()
        count = count_parameters(model, "stage1") + count_parameters(model, "stage2")
        count += sum(math.prod(shape) for shape in clip_leaf_shapes(dataclasses.replace(clip.clip, text=text)).values())
        sizes.append(2 * count)
    assert sizes[0] < 15e6 and sizes[0] < sizes[1] < 28e6
