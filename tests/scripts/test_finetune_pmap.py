"""The script of data parallelism alone: the same numbers as `mindalle finetune`, and as the original's recorded run."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from mindalle_jax import Dalle, ImageGPT
from mindalle_jax.data.codes import vqgan_digest, write_codes
from mindalle_jax.data.sources import open_source
from mindalle_jax.errors import MindalleError
from mindalle_jax.interop.mindalle import import_checkpoint
from mindalle_jax.training import finetune as loop
from scripts.finetune_pmap import finetune, main


def metrics(out):
    """The figures of each update, by name."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {name: np.array([line[name] for line in lines]) for name in ("loss", "grad_norm", "learning_rate")}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """24 captioned pictures, the captions of different lengths."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(24):
        Image.fromarray(rng.integers(0, 256, (36, 40, 3), np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("the cat and the dog"[: 3 + i % 16])
    return folder


@pytest.fixture
def overrides(photos, tiny_model_folder):
    """4 updates of 16 pictures in two micro-batches on eight devices, with warm-up and a second epoch."""
    return [
        f"data.train={photos}", f"training.init_from={tiny_model_folder}", "optimizer.max_steps=4",
        "optimizer.base_lr=0.01", "experiment.total_batch_size=16", "experiment.local_batch_size=1",
        "training.warmup_steps=1",
    ]  # fmt: skip


@pytest.fixture
def config_file(tmp_path):
    """An empty configuration: the defaults, and the sizes of the model."""
    (tmp_path / "empty.yaml").write_text("")
    return tmp_path / "empty.yaml"


def test_the_numbers_are_those_of_the_command(config_file, overrides, tmp_path):
    """float32 on eight devices; only the order of sums differs."""
    finetune(config_file, overrides, tmp_path / "pmap")
    assert loop.finetune(config_file, overrides, tmp_path / "loop")
    ours, theirs = metrics(tmp_path / "pmap"), metrics(tmp_path / "loop")
    assert len(ours["loss"]) == 4 and ours["loss"][-1] != ours["loss"][0]
    print({name: np.abs(ours[name] - theirs[name]).max() for name in ours})
    np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(ours["grad_norm"], theirs["grad_norm"], rtol=1e-5)
    np.testing.assert_allclose(ours["learning_rate"], theirs["learning_rate"], rtol=1e-6)
    model = Dalle.from_pretrained(tmp_path / "pmap")
    assert model.generate("the cat", num_candidates=1).codes.shape == (1, 64)


@pytest.fixture(scope="module", params=["cls", "uncond"])
def recorded(request, golden, tmp_path_factory):
    """(config file, model to start from, folder of its codes, losses) of a recorded run of the original."""
    kind = request.param
    arrays = np.load(golden / "golden_igpt.npz")
    folder = tmp_path_factory.mktemp(kind)
    (folder / "source").mkdir()
    shutil.copyfile(golden / "model" / "stage1_last.ckpt", folder / "source" / "stage1_last.ckpt")
    shutil.copyfile(golden / f"igpt_{kind}_init.ckpt", folder / "source" / "stage2_last.ckpt")
    config_file = golden / f"igpt_{kind}.yaml"
    import_checkpoint(folder / "source", folder / "init", config=config_file)
    # The pictures are not recorded, only their codes: blank ones stand in, in the order of their names.
    labels = arrays["cls_labels"] if kind == "cls" else np.zeros(4, int)
    rows = [{"file_name": f"{i}.png", "label": int(label)} for i, label in enumerate(labels)]
    (folder / "pictures").mkdir()
    for row in rows:
        Image.new("RGB", (64, 64)).save(folder / "pictures" / row["file_name"])
    (folder / "pictures" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    class Recorded:
        size, side, vocab_size = 64, 16, 128

        def encode(self, images, *, batch_size):
            return arrays[f"{kind}_codes"].reshape(-1, 16, 16)

    source = open_source(folder / "pictures", "class" if kind == "cls" else "unconditional")
    write_codes(source, Recorded(), folder / "codes", vqgan=vqgan_digest(folder / "init"), batch_size=4, threads=1)
    return config_file, folder / "init", folder / "codes", arrays[f"{kind}_train_loss"]


@pytest.mark.slow
@pytest.mark.parametrize("runner", ["pmap", "loop"])
def test_eight_updates_are_the_originals(recorded, runner, tmp_path):
    """From the original's own configuration file and its codes; all four samples are one batch, in any order."""
    config_file, init, codes, losses = recorded
    overrides = [f"training.init_from={init}", f"data.train={codes}", "optimizer.max_steps=8"]
    if runner == "loop":
        # Four samples cannot be split over eight devices; the model can.
        assert loop.finetune(config_file, [*overrides, "sharding.strategy=tensor"], tmp_path / "out")
    else:
        finetune(config_file, overrides, tmp_path / "out", jax.devices()[:2])
    figures = metrics(tmp_path / "out")
    print(np.abs(figures["loss"] - losses).max())
    np.testing.assert_allclose(figures["loss"], losses, rtol=0, atol=1e-4)
    assert ImageGPT.from_pretrained(tmp_path / "out").config.image_only


@pytest.mark.parametrize(
    "override, message",
    [
        ("training.ema_decay=0.9", "training.ema_decay: not in this script; use `mindalle finetune`"),
        ("training.caption_dropout=0.1", "training.caption_dropout: not in this script"),
        ("training.lora.rank=2", "training.lora.rank: not in this script"),
        ("stage2.hparams.resid_pdrop=0.1", "_pdrop: not in this script"),
        ("data.train=nowhere", "nowhere: does not exist"),
        ("optimizer.max_steps=1", "training.warmup_steps 1 must be below the number of steps, 1"),
        ("experiment.total_batch_size=12", "must be a multiple of 8: local_batch_size 1 on 8 devices"),
    ],
)
def test_nothing_is_written_before_all_is_known_to_fit(config_file, overrides, override, message, tmp_path):
    """A setting that is read and not followed would give another model; a slip should not use up the folder's name."""
    with pytest.raises(MindalleError, match=re.escape(message)):
        finetune(config_file, [*overrides, override], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_errors_are_one_line(config_file, overrides, tmp_path, monkeypatch, capsys):
    """As of the command, with its exit codes: here what is in the way is not written over."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    monkeypatch.setattr(
        "sys.argv", ["finetune_pmap", "--config", str(config_file), "--out", f"{tmp_path}/out", *overrides]
    )
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 6 and "is not empty" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]
