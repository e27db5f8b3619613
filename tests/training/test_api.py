"""`finetune` from Python: the same bits as the command, data in memory, callbacks, and the loop by hand."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
from PIL import Image
from training_runs import metrics, weights_crc32, write_config, write_pictures

from mindalle_jax import Dalle, ImageGPT, cli, finetune
from mindalle_jax.errors import CheckpointError, ConfigError, DataError, UsageError
from mindalle_jax.runtime.devices import pinned
from mindalle_jax.storage import results
from mindalle_jax.training.export import export_checkpoint
from mindalle_jax.training.finetune import FinetuneRun, read_finetune

STEPS = {"max_steps": 6, "base_lr": 1e-3}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("api") / "photos", 12)


@pytest.fixture(scope="module")
def config(photos, tiny_model_folder):
    """6 steps of 8 images, with checkpoints and validation every 2."""
    every = {"checkpoint_every_steps": 2, "validate_every_steps": 2}
    return write_config(photos.parent / "run.yaml", tiny_model_folder, photos, optimizer=STEPS, training=every)


@pytest.fixture(scope="module")
def by_command(config, photos):
    out = photos.parent / "command"
    assert cli.main(["finetune", "--config", str(config), "--out", str(out)]) == 0
    return out


def pairs(photos) -> list[tuple[Image.Image, str]]:
    return [(Image.open(file).copy(), file.with_suffix(".txt").read_text()) for file in sorted(photos.glob("*.png"))]


def test_a_folder_gives_the_bits_of_the_command(config, photos, by_command, tmp_path):
    model = finetune(config, data=photos, out=tmp_path / "run")
    assert isinstance(model, Dalle) and model.folder == tmp_path / "run"
    assert weights_crc32(tmp_path / "run") == weights_crc32(by_command)


def test_pairs_give_the_same_weights(config, photos, by_command, tmp_path):
    """As PIL images and as arrays: the crops and captions are those of the files."""
    finetune(config, data=pairs(photos), out=tmp_path / "pil")
    arrays = [(np.asarray(image), text) for image, text in pairs(photos)]
    finetune(config, data=arrays, out=tmp_path / "arrays")
    assert weights_crc32(tmp_path / "pil") == weights_crc32(tmp_path / "arrays") == weights_crc32(by_command)


def test_a_model_keeps_the_names_of_its_classes(tmp_path, tiny_model_folder):
    """Also one that is exported from a checkpoint, or saved again; previews and the command take them."""
    data = [(np.full((32, 32, 3), 30 * number, np.uint8), ("wren", "crow")[number % 2]) for number in range(8)]
    stage2 = {"type": "igpt", "use_cls_cond": True, "hparams": {"n_classes": 2}}
    preview = {"sample_every_steps": 2, "sample_prompts": ["wren", "0"]}
    optimizer = {"max_steps": 2, "base_lr": 1e-3}
    config = write_config(
        tmp_path / "run.yaml", tiny_model_folder, tmp_path, stage2=stage2, training=preview, optimizer=optimizer
    )
    run = tmp_path / "run"
    model = finetune(config, data=data, out=run)
    assert isinstance(model, ImageGPT) and model.class_names == ("crow", "wren")
    assert (model.generate("wren", num_candidates=1).codes == model.generate(1, num_candidates=1).codes).all()
    model.save_pretrained(tmp_path / "saved")
    export_checkpoint(run, tmp_path / "exported")
    for folder in ("saved", "exported"):
        assert ImageGPT.from_pretrained(tmp_path / folder).class_names == ("crow", "wren")
    assert (run / "samples" / "step_000002.png").exists()
    sample = ["sample", "-m", str(run), "-n", "1"]
    assert cli.main([*sample, "--class", "wren", "-o", str(tmp_path / "name")]) == 0
    assert cli.main([*sample, "--class-id", "1", "-o", str(tmp_path / "number")]) == 0
    one, other = (json.loads((tmp_path / name / "meta.json").read_text()) for name in ("name", "number"))
    assert one["pictures"] == other["pictures"] and one["class_id"] == 1
    assert cli.main([*sample, "--class", "wron", "-o", str(tmp_path / "none")]) == 2


def test_callbacks_see_every_metric_and_may_end_the_run(config, photos, tmp_path):
    """A run that has ended stays ended: the same call returns its model."""
    seen = []

    def callback(line):
        seen.append(line)
        return line["kind"] == "train" and line["step"] >= 3

    finetune(config, data=pairs(photos), valid=pairs(photos)[:4], out=tmp_path / "run", callbacks=[callback])
    assert seen == [*sorted(metrics(tmp_path / "run") + metrics(tmp_path / "run", "valid"), key=lambda x: x["step"])]
    ended = json.loads((tmp_path / "run" / "summary.json").read_text())["updates"]
    assert 3 <= ended <= 5
    before = weights_crc32(tmp_path / "run")
    finetune(config, data=pairs(photos), valid=pairs(photos)[:4], out=tmp_path / "run")
    assert weights_crc32(tmp_path / "run") == before


def test_early_stopping(config, photos, tmp_path):
    """With a learning rate that spoils the model the loss never falls again."""
    overrides = ["training.early_stopping=2", "optimizer.base_lr=0.5", "optimizer.max_steps=40"]
    finetune(config, data=photos, valid=photos, out=tmp_path / "run", overrides=overrides)
    losses = {line["step"]: line["loss"] for line in metrics(tmp_path / "run", "valid")}
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["updates"] < 40 and summary["step_of_the_model"] == min(losses, key=losses.__getitem__)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_stopped_run_leaves_a_model_and_resumes(config, photos, by_command, tmp_path, number):
    """The model is there without being asked for; the end of the run has the same bits."""
    out = tmp_path / "run"

    def stop(line):
        if line["step"] == 3:
            os.kill(os.getpid(), number)

    with pytest.raises(UsageError, match="the run was stopped by a signal; call finetune again to resume it"):
        finetune(config, data=photos, out=out, callbacks=[stop])
    assert not (out / "summary.json").exists() and len(metrics(out)) < 6
    assert Dalle.from_pretrained(out).generate("the cat", num_candidates=1).images.shape[0] == 1
    finetune(config, data=photos, out=out)
    assert weights_crc32(out) == weights_crc32(by_command) and len(metrics(out)) == 6


@pytest.mark.parametrize("name", ["manifest.json", "stage2.safetensors"])
def test_a_kill_while_the_result_is_written_is_mended(config, photos, by_command, tmp_path, monkeypatch, name):
    """No manifest is left beside other weights, and the same call writes the result again."""
    out, replace = tmp_path / "run", os.replace

    def die(source, target):
        if str(target) == str(out / name):
            raise KeyboardInterrupt
        replace(source, target)

    shutil.copytree(by_command, out)
    (out / "summary.json").unlink()
    monkeypatch.setattr(results.os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        finetune(config, data=photos, out=out)
    monkeypatch.undo()
    with pytest.raises(
        CheckpointError, match="a training run that is not complete; the command that started it resumes"
    ):
        Dalle.from_pretrained(out)
    finetune(config, data=photos, out=out)
    assert weights_crc32(out) == weights_crc32(by_command)


def test_the_loop_by_hand(config, photos, by_command, tmp_path):
    """docs/fine-tuning.md has these lines."""
    read, base = read_finetune(config, [f"data.train={photos}"])
    run = FinetuneRun(read, base, tmp_path)
    with pinned(run.dtype):
        state = run.init_state()
        step = run.compile_step(state)
        for _ in range(run.max_steps):
            state, numbers = step(state, run.make_batch(next(run.loader)))
            assert np.isfinite(float(numbers["loss"]))
        run.write_result(state)
    assert weights_crc32(tmp_path) == weights_crc32(by_command)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"data": "nowhere"}, DataError, "data.train: nowhere does not exist"),
        ({"data": [(1, 2, 3)]}, DataError, "item 0 of the data is no pair"),
        ({"data": [], "overrides": []}, DataError, "nothing to train on"),
        ({"overrides": ["optimizer.lr=1"]}, ConfigError, "did you mean base_lr"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(config, photos, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        finetune(config, **({"data": photos, "out": tmp_path / "run"} | options))
    assert not (tmp_path / "run").exists()
