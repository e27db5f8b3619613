"""scripts/scenes/train_demo.py: the whole recipe with tiny networks, to a model with its ranker, the same every time.

Pictures stay 64 x 64. Nothing is learned in so few updates; every stage reads what the one before it wrote.
"""

import dataclasses
import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest

from mindalle_jax import ClipRanker, Dalle
from mindalle_jax.config.file import load_config
from mindalle_jax.errors import MindalleError
from mindalle_jax.interop.clip import clip_leaf_shapes
from mindalle_jax.storage.weights import count_parameters, read_manifest
from mindalle_jax.training.clip.run import ClipRun, ClipTrainConfig
from mindalle_jax.training.config import FinetuneConfig
from mindalle_jax.training.finetune import FinetuneRun
from mindalle_jax.training.vqgan.config import VqganTrainConfig
from mindalle_jax.training.vqgan.run import VqganRun, vqgan_model_config
from scripts.scenes.dataset import captions, make_scene
from tests.tiny_recipe import tiny_changes, weights

PROMPTS = 2


@pytest.fixture(scope="module")
def script(request) -> Any:
    """The script as a module, with 48 pictures to train on and networks in miniature."""
    with pytest.MonkeyPatch.context() as patch:
        from scripts.scenes import train_demo as make_demo_model

        patch.setattr(make_demo_model, "NUM_TRAIN", 48)
        patch.setattr(make_demo_model, "NUM_VALID", 8)
        patch.setattr(make_demo_model, "BEST_OF", 2)
        patch.setitem(make_demo_model.CHANGES, "cpu", tiny_changes(24))
        yield make_demo_model


def make(script: Any, work: Path, *options: str) -> None:
    script.main(script.parser().parse_args(["--work", str(work), "--prompts", str(PROMPTS), *options]))


@pytest.fixture(scope="module")
def made(tmp_path_factory, script) -> Path:
    """The folder of a run of all stages. Read only."""
    work = tmp_path_factory.mktemp("demo") / "work"
    make(script, work)
    return work


@pytest.mark.slow
def test_the_folder_is_a_model_with_its_ranker(made, request):
    """And says what it is, under which licence, and how good it is."""
    demo = made / "demo"
    names = {path.name for path in demo.iterdir()}
    assert names == {
        "config.yaml", "manifest.json", "stage1.safetensors", "stage2.safetensors", "tokenizer", "ranker", "README.md",
        "LICENSE", "metrics.json",
    }  # fmt: skip
    licence = request.config.rootpath / "LICENSE"
    assert (demo / "LICENSE").read_bytes() == licence.read_bytes()
    card = (demo / "README.md").read_text(encoding="utf-8")
    assert captions(make_scene("valid", 1))[0] in card and "{" not in card
    for stage in ("stage1", "stage2"):
        assert {entry["dtype"] for entry in read_manifest(demo)["tensors"][stage].values()} == {"float16"}

    model, ranker = Dalle.from_pretrained(demo), ClipRanker.from_pretrained(demo / "ranker")
    drawn = model.generate("a large red circle", num_candidates=2, ranker=ranker)
    assert drawn.images.shape == (2, 64, 64, 3) and drawn.scores is not None
    assert model.config.stage2.hparams.embed_dim == 16 and ranker.config.vision.patch_size == 16

    figures = json.loads((demo / "metrics.json").read_text(encoding="utf-8"))
    assert figures["prompts"] == PROMPTS
    for split in ("valid", "heldout"):
        assert figures[f"{split}: pictures of the generator"]["all"] == 1.0
        assert {f"{split}: one picture a prompt", f"{split}: best of 2"} <= figures.keys()
    assert figures["distance to the nearest training picture: drawn"]["least"] > 0


@pytest.mark.slow
def test_what_is_complete_is_not_done_again(made, script):
    """No file is written again but what the three runs were asked for, with the same words."""

    def files() -> dict[Path, tuple[int, int]]:
        found = {path: path.stat() for path in made.rglob("*") if path.is_file() and path.name != "run.yaml"}
        return {path: (stat.st_mtime_ns, stat.st_ino) for path, stat in found.items()}

    before = files()
    words = {path: path.read_bytes() for path in made.glob("*/run.yaml")}
    make(script, made)
    assert files() == before
    assert len(words) == 3 and {path: path.read_bytes() for path in words} == words


@pytest.mark.slow
def test_a_recipe_that_is_stopped_at_every_turn_ends_the_same(made, script, tmp_path, monkeypatch):
    """In each training by SIGTERM, and while the model is packed, when its folder is there and the ranker is not.

    So the recipe gives the same bits twice, too.
    """

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    running = {VqganRun, FinetuneRun, ClipRun}
    for run in list(running):

        def stop(self, rows, make_batch=run.make_batch):
            if type(self) in running:  # the first batch of its first run
                running.remove(type(self))
                signal.raise_signal(signal.SIGTERM)
            return make_batch(self, rows)

        monkeypatch.setattr(run, "make_batch", stop)
    for verb in ("train-vqgan", "finetune", "train-clip"):
        with pytest.raises(MindalleError, match=f"mindalle {verb} did not finish; the same command resumes it"):
            make(script, tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ClipRanker, "save_pretrained", interrupt)
        make(script, tmp_path)
    assert (tmp_path / "demo" / "stage2.safetensors").exists() and not (tmp_path / "demo" / "ranker").exists()
    make(script, tmp_path)

    expected, found = weights(made), weights(tmp_path)
    assert {"vqgan/stage1.safetensors", "transformer/stage2.safetensors", "clip/model.safetensors"} < expected.keys()
    assert {"demo/stage2.safetensors", "demo/ranker/model.safetensors"} < expected.keys()
    assert found.keys() == expected.keys() and [name for name in found if found[name] != expected[name]] == []
    assert (tmp_path / "demo" / "metrics.json").read_bytes() == (made / "demo" / "metrics.json").read_bytes()


def test_both_sizes_fit_in_the_package(request):
    """At most 40 MB in float16, tokenizers and papers (well under 1 MB) aside; the larger one is larger, and valid."""
    from scripts.scenes import train_demo as make_demo_model

    configs, sizes = request.config.rootpath / "configs" / "scenes", []
    for changes in ({}, make_demo_model.CHANGES["gpu"]):
        vqgan = load_config(configs / "vqgan.yaml", changes.get("vqgan", []), VqganTrainConfig)
        clip = load_config(configs / "clip.yaml", ["training.tokenizer=any", *changes.get("clip", [])], ClipTrainConfig)
        defaults = vqgan_model_config(vqgan.stage1)
        overrides = ["training.vqgan=any", *changes.get("transformer", [])]
        transformer = load_config(configs / "transformer.yaml", overrides, FinetuneConfig, defaults)
        text = dataclasses.replace(clip.clip.text, vocab_size=1024)  # as the recipe asks of its tokenizer
        model = transformer.model_config()
        count = count_parameters(model, "stage1") + count_parameters(model, "stage2")
        count += sum(math.prod(shape) for shape in clip_leaf_shapes(dataclasses.replace(clip.clip, text=text)).values())
        sizes.append(2 * count)
    assert sizes[0] < sizes[1] < 39e6
