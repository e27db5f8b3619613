"""scripts/recipe.py: stages one after another, each device with its share of a batch, sheets."""

import numpy as np
import pytest
from PIL import Image

from mindalle_jax import Dalle
from mindalle_jax.errors import MindalleError
from mindalle_jax.storage.weights import read_manifest
from scripts import recipe


@pytest.mark.parametrize(("wanted", "expected"), [("all", ["a", "b"]), ("b", ["b"]), ("a", ["a"])])
def test_stages_run_in_order_or_alone(capsys, wanted, expected):
    ran = []
    recipe.run_stages({"a": lambda: ran.append("a"), "b": lambda: ran.append("b")}, wanted)
    assert ran == expected
    assert [line for line in capsys.readouterr().err.splitlines() if line.endswith(" s")] == [
        f"== {name}: 0 s" for name in expected
    ]


def test_a_command_that_fails_ends_the_recipe(tmp_path, capsys):
    with pytest.raises(MindalleError, match="mindalle train-tokenizer did not finish; the same command resumes it"):
        recipe.run("train-tokenizer", tmp_path / "none", "--out", tmp_path / "x", "--vocab-size", 100, "--kind", "clip")
    assert f"$ mindalle train-tokenizer {tmp_path}/none --out" in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["scenes", "emoji"])
def test_each_device_has_its_share_of_a_batch(monkeypatch, tmp_path, folder):
    """Of the eight here, of the sizes in the files; what is changed of a batch counts, and 0 is no size."""
    asked = []
    monkeypatch.setattr(recipe, "run", lambda *arguments: asked.append(arguments))
    for name, changed, share in (
        ("vqgan", [], 1), ("transformer", [], 1), ("clip", [], 16),
        ("clip", ["experiment.total_batch_size=512"], 64), ("clip", ["experiment.total_batch_size=4"], 1),
    ):  # fmt: skip
        config = recipe.CONFIGS / folder / f"{name}.yaml"
        recipe.run_training("train", config, tmp_path, *changed)
        assert asked[-1] == (
            "train", "--config", config, "--out", tmp_path, f"experiment.local_batch_size={share}", *changed,
        )  # fmt: skip


def test_a_sharpened_model_has_larger_logits_of_codes(tmp_path, tiny_dalle, tiny_model_folder):
    """Those of text are as before, and so is the rest of the model."""
    recipe.write_sharpened(tiny_model_folder, tmp_path, 2.0)
    sharpened = Dalle.from_pretrained(tmp_path, mesh=tiny_dalle.mesh)
    codes = np.random.default_rng(0).integers(0, 80, (2, 64))
    texts = tiny_dalle.tokenize(["the cat", "a dog"])
    before, after = (model.logits(texts, codes) for model in (tiny_dalle, sharpened))
    np.testing.assert_array_equal(after[0], 2 * before[0])
    np.testing.assert_array_equal(after[1], before[1])
    assert read_manifest(tmp_path)["caption_dropout"] == read_manifest(tiny_model_folder)["caption_dropout"] == 0.1


@pytest.mark.parametrize(("count", "size"), [(6, (6, 4)), (7, (6, 6)), (2, (6, 2))])
def test_sheets_have_rows_of_images(tmp_path, count, size):
    images = np.full((count, 2, 2, 3), 9, np.uint8) * np.arange(count, dtype=np.uint8)[:, None, None, None]
    recipe.write_sheet(images, tmp_path / "a.png", 3)
    sheet = np.asarray(Image.open(tmp_path / "a.png"))
    assert sheet.shape == (size[1], size[0], 3)
    assert [sheet[i // 3 * 2, i % 3 * 2, 0] for i in range(count)] == [9 * i for i in range(count)]
    assert (sheet.reshape(-1)[-1] == 255) == bool(count % 3)
