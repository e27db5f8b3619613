"""What a person looks at while a model is trained, and the model that a transfer begins with."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

from mindalle_jax import ImageGPT
from mindalle_jax.errors import ConfigError
from mindalle_jax.runtime.sharding import make_mesh
from mindalle_jax.storage.weights import load_params
from mindalle_jax.training.finetune import finetune
from mindalle_jax.training.previews import LABEL, Previewer, write_reconstructions


@pytest.fixture(scope="module")
def run(tiny_model_folder, tmp_path_factory):
    """Folder of a run of two updates over four pictures of 32 x 32, with samples after each."""
    work = tmp_path_factory.mktemp("samples")
    (work / "photos").mkdir()
    rng = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(work / "photos" / f"{i}.png")
        (work / "photos" / f"{i}.txt").write_text("a cat")
    (work / "run.yaml").write_text(f"""
data: {{train: {work / "photos"}, threads: 1}}
optimizer: {{base_lr: 1e-3, max_steps: 2}}
experiment: {{local_batch_size: 1, total_batch_size: 8}}
training: {{init_from: {tiny_model_folder}, sample_every_steps: 1, sample_prompts: [the cat, dog]}}
""")
    assert finetune(work / "run.yaml", [], work / "out")
    return work


def test_samples_of_the_prompts(run):
    """A row of four images per prompt, beside the prompt, and other images after another step."""
    first, second = (np.asarray(Image.open(run / "out" / "samples" / f"step_{step:06d}.png")) for step in (1, 2))
    assert first.shape == (2 * 32, LABEL + 4 * 32, 3)
    assert (first[:, LABEL:] != second[:, LABEL:]).any()
    np.testing.assert_array_equal(first[:, :LABEL], second[:, :LABEL])
    rows = first[:, :LABEL].reshape(2, 32, LABEL, 3)
    assert (rows.min((1, 2, 3)) < 50).all(), "a row has no prompt beside it"
    assert (rows[0] != rows[1]).any(), "both prompts look the same"


def test_classes_are_named_by_name_or_number(tiny_igpt_config):
    names = [f"thing {number}" for number in range(5)]
    previewer = Previewer(tiny_igpt_config, ("thing 3", "1"), None, names)
    assert previewer.class_ids == [3, 1]
    with pytest.raises(ConfigError, match="training.sample_prompts .*the model has no class 'thong 3'.*thing 3"):
        Previewer(tiny_igpt_config, ("thong 3",), None, names)
    with pytest.raises(ConfigError, match="name one by its number, not 'thing 3'"):
        Previewer(tiny_igpt_config, ("thing 3",), None)
    with pytest.raises(ConfigError, match=r"classes must lie in \[0, 5\)"):
        Previewer(tiny_igpt_config, ("5",), None, names)


def test_reconstructions_are_the_vqgans(run, tiny_dalle):
    """Pictures of the data above what they become by way of their codes."""
    sheet = np.asarray(Image.open(run / "out" / "reconstructions.png"))
    pictures = np.stack([np.asarray(Image.open(run / "photos" / f"{i}.png")) for i in range(8)])
    assert sheet.shape == (64, 8 * 32, 3)
    np.testing.assert_array_equal(sheet[:32], np.concatenate(pictures, axis=1))
    decoded = (tiny_dalle.decode_codes(tiny_dalle.encode_images(pictures)) * 255).astype(np.uint8)
    np.testing.assert_array_equal(sheet[32:], np.concatenate(decoded, axis=1))


def test_how_near_reconstructions_are(tiny_model_folder, tiny_config, tmp_path):
    """10 log10(255^2 / mean squared difference), the mean over the images."""
    mesh, float32 = make_mesh("replicated", {}), np.dtype("float32")
    params = load_params(tiny_model_folder, "stage1", tiny_config, float32, mesh)
    images = np.random.default_rng(1).integers(0, 256, (3, 32, 32, 3), np.uint8)
    path = tmp_path / "sheet.png"
    found = write_reconstructions(tiny_config.stage1, params, images, path, dtype="float32", mesh=mesh)
    top, bottom = np.split(np.asarray(Image.open(path), np.float64), 2)
    squares = ((top - bottom) ** 2).reshape(32, 3, 32, 3).mean((0, 2, 3))
    assert found == pytest.approx(np.mean(10 * np.log10(255**2 / squares)))


@pytest.mark.parametrize("head", ["fresh", "head_img"])
def test_from_upstream(tiny_model_folder, tiny_igpt_config, tiny_dalle, head):
    """Tables and blocks are taken over, bit by bit; start vectors are drawn, and the head as asked."""
    model = ImageGPT.from_upstream(tiny_model_folder, tiny_igpt_config, head=head, seed=3)
    theirs, ours = tiny_dalle._stage2, model._stage2
    for name in ("tok_emb_img", "pos_emb_img", "blocks_0", "blocks_1", "ln_f"):
        jax.tree.map(np.testing.assert_array_equal, ours[name], theirs[name])
    same = np.array_equal(ours["head"]["weight"], theirs["head_img"]["weight"])
    assert same == (head == "head_img")
    assert 0.015 < np.std(ours["sos"]["embedding"]) < 0.025  # N(0, 0.02) for classes
    assert model.generate(2, num_candidates=1).codes.shape == (1, 64)
    again = ImageGPT.from_upstream(tiny_model_folder, tiny_igpt_config, head=head, seed=3)
    assert again.folder == model.folder


def test_an_upstream_that_does_not_fit(tiny_model_folder, tiny_igpt_config):
    hparams = dataclasses.replace(tiny_igpt_config.stage2.hparams, n_layers=3)
    config = dataclasses.replace(tiny_igpt_config, stage2=dataclasses.replace(tiny_igpt_config.stage2, hparams=hparams))
    with pytest.raises(ConfigError, match="n_layers 3, upstream 2"):
        ImageGPT.from_upstream(tiny_model_folder, config)
