"""scripts/scenes/finetune_demo.py: each kind from the model in the package to a model of its own, in two updates."""

from typing import Any

import pytest
from PIL import Image

from mindalle_jax import Dalle, ImageGPT
from scripts.scenes.dataset import SHAPES

FEW = ["optimizer.max_steps=2", "training.warmup_steps=1", "training.checkpoint_every_steps=1",
       "experiment.local_batch_size=1"]  # fmt: skip


@pytest.fixture(scope="module")
def script(request) -> Any:
    """The script as a module, with few pictures to learn from and to draw."""
    with pytest.MonkeyPatch.context() as patch:
        from scripts.scenes import finetune_demo

        patch.setattr(finetune_demo, "NUM_IMAGES", 40)
        patch.setattr(finetune_demo, "COLUMNS", 2)
        yield finetune_demo


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["captions", "classes", "unconditional"])
def test_pictures_before_and_after_and_a_model(script, tmp_path, kind):
    script.main(script.parser().parse_args(["--kind", kind, "--out", str(tmp_path), *FEW]))
    for name in ("before.png", "after.png"):
        with Image.open(tmp_path / name) as sheet:
            assert sheet.size == (2 * 64, 7 * 64)
    if kind == "captions":
        Dalle.from_pretrained(tmp_path / "run")
    else:
        assert ImageGPT.from_pretrained(tmp_path / "run").num_classes == (len(SHAPES) if kind == "classes" else None)
