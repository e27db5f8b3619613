"""training/export.py: a model from every checkpoint; and the result of a run is the best by validation loss."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from training_runs import metrics, write_code_set, write_config

from mindalle_jax import Dalle, cli
from mindalle_jax.errors import CheckpointError, UsageError
from mindalle_jax.storage.weights import map_weights, read_manifest
from mindalle_jax.training.checkpoint import Checkpoints
from mindalle_jax.training.export import export_checkpoint, newest_model


def stage2(folder) -> dict[str, np.ndarray]:
    weights = map_weights(folder / "stage2.safetensors", read_manifest(folder)["tensors"]["stage2"])
    return {path: np.array(array, np.float32) for path, array in weights.items()}


def export(run, folder):
    export_checkpoint(run, folder)
    return folder


def equal(first, second) -> bool:
    one, other = stage2(first), stage2(second)
    return one.keys() == other.keys() and all(np.array_equal(one[path], other[path]) for path in one)


@pytest.fixture(scope="module")
def train(tmp_path_factory, tiny_model_folder):
    """train(**sections) -> folder of a run that ended, of codes that are soon learned by heart."""
    data = tmp_path_factory.mktemp("data")
    codes = {name: write_code_set(data / name, tiny_model_folder, 16, seed) for seed, name in enumerate(("a", "b"))}

    def run(name: str, **sections):
        base = {
            "data": {"valid": str(codes["b"])},
            "optimizer": {"base_lr": 1e-2, "max_steps": 20},
            "training": {"checkpoint_every_steps": 5, "validate_every_steps": 5, "keep_checkpoints": 2},
        }
        merged = {key: base.get(key, {}) | sections.get(key, {}) for key in {*base, *sections}}
        config = write_config(data / f"{name}.yaml", tiny_model_folder, codes["a"], **merged)
        assert cli.main(["finetune", "--config", str(config), "--out", str(data / name)]) == 0
        return data / name

    return run


@pytest.fixture(scope="module")
def overfitted(train):
    return train("overfitted")


def test_the_result_is_the_best_by_validation_loss(overfitted, tmp_path):
    losses = {line["step"]: line["loss"] for line in metrics(overfitted, "valid")}
    best = min(losses, key=losses.__getitem__)
    assert best < 20, "the run was to learn by heart"
    summary = json.loads((overfitted / "summary.json").read_text())
    assert summary["step_of_the_model"] == best and summary["updates"] == 20
    assert (
        export_checkpoint(overfitted, tmp_path / "best", step="best")
        == f"{tmp_path / 'best'}: the model of step {best}"
    )
    assert equal(overfitted, tmp_path / "best")


def test_every_checkpoint_is_a_model(overfitted, tmp_path):
    """The best one stays beside the two newest."""
    steps = Checkpoints(overfitted / "checkpoints").steps()
    assert len(steps) == 3 and steps[-2:] == [15, 20]
    for step in steps:
        export_checkpoint(overfitted, tmp_path / str(step), step=step)
        assert Dalle.from_pretrained(tmp_path / str(step)).generate("the cat", num_candidates=1).images.shape[0] == 1
    export_checkpoint(overfitted, tmp_path / "last")
    assert equal(tmp_path / "last", tmp_path / "20") and not equal(tmp_path / "15", tmp_path / "20")


def test_averages_and_adapters(train, tmp_path):
    """What the result of the run holds, its newest checkpoint gives too."""
    run = train("lora", data={"valid": None}, training={"ema_decay": 0.5, "lora": {"rank": 2}})
    export_checkpoint(run, tmp_path / "model")
    assert equal(run, tmp_path / "model")
    one, other = (load_file(folder / "adapters.safetensors") for folder in (run, tmp_path / "model"))
    assert one.keys() == other.keys() and all(np.array_equal(one[path], other[path]) for path in one)


def test_a_run_that_is_not_finished(overfitted, tmp_path, capsys):
    """export-checkpoint makes the model, without the data; Python names it."""
    run = tmp_path / "stopped"
    run.mkdir()
    (run / "run.yaml").write_text(
        (overfitted / "run.yaml").read_text().replace(str(overfitted.parent / "a"), "gone"), encoding="utf-8"
    )
    (run / "checkpoints").symlink_to(overfitted / "checkpoints")
    with pytest.raises(CheckpointError, match=f"mindalle export-checkpoint {run} DIR makes a model of it"):
        Dalle.from_pretrained(run)
    assert cli.main(["export-checkpoint", str(run), str(tmp_path / "model"), "--step", "15"]) == 0
    assert capsys.readouterr().out == (
        f'{tmp_path / "model"}: the model of step 15; mindalle sample "..." --model {tmp_path / "model"}\n'
    )
    assert cli.main(["export-checkpoint", str(run), str(tmp_path / "model")]) == 6
    assert cli.main(["export-checkpoint", str(run), str(tmp_path / "model"), "--overwrite"]) == 0


def test_sample_takes_the_newest_checkpoint_of_a_run_that_is_not_finished(overfitted, tmp_path, capsys):
    """And says which; a model that a stopped run left is taken as long as it is of the newest or best checkpoint."""
    run = Path(shutil.copytree(overfitted, tmp_path / "run"))
    model = run / "exported" / "step_000020"
    for name in ("manifest.json", "stage2.safetensors", "summary.json"):
        (run / name).unlink()
    for number in (1, 2):
        assert cli.main(["sample", "the cat", "--model", str(run), "-n", "1", "-o", str(tmp_path / f"{number}")]) == 0
        assert f"{run} is not finished: this is its model of step 20" in capsys.readouterr().err
    assert equal(model, export(run, tmp_path / "last"))
    shutil.rmtree(run / "checkpoints" / "20")
    assert newest_model(run) == (run / "exported" / "step_000015", 15) and not model.exists()
    for name in ("manifest.json", "stage2.safetensors"):
        shutil.copyfile(overfitted / name, run / name)
    best = read_manifest(run)["step"]
    assert best < 15 and newest_model(run) == (run, best)
    shutil.rmtree(run / "checkpoints")
    (run / "manifest.json").unlink()
    assert cli.main(["sample", "the cat", "--model", str(run)]) == 4
    assert f"{run}: holds no checkpoint yet" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("step", "message"),
    [(7, r"there is no checkpoint of step 7, only \d+, 15, 20"), ("best", "no checkpoint has a validation loss")],
)
def test_a_step_that_is_not_there(overfitted, train, tmp_path, step, message):
    run = train("plain", data={"valid": None}, optimizer={"max_steps": 5}) if step == "best" else overfitted
    with pytest.raises(UsageError, match=message):
        export_checkpoint(run, tmp_path / "model", step=step)
    assert not (tmp_path / "model").exists()


def test_other_folders(overfitted, tmp_path, tiny_model_folder, capsys):
    with pytest.raises(UsageError, match="is no run of training; it has no run.yaml"):
        export_checkpoint(tiny_model_folder, tmp_path / "model")
    (tmp_path / "run.yaml").write_text("data: {train: x}\nstage1: {}\n")
    with pytest.raises(UsageError, match="is no run of mindalle finetune"):
        export_checkpoint(tmp_path, tmp_path / "model")
    (tmp_path / "run.yaml").write_bytes((overfitted / "run.yaml").read_bytes())
    with pytest.raises(CheckpointError, match="holds no checkpoint yet"):
        export_checkpoint(tmp_path, tmp_path / "model")
    assert cli.main(["export-checkpoint", str(overfitted), str(tmp_path / "model"), "--step", "newest"]) == 2
    assert "--step must be last, best or the number of a step, not 'newest'" in capsys.readouterr().err


def test_the_card_of_a_run_is_its_own(overfitted, train):
    """A fine-tuned demo kept demo's card, which says that it knows no other words."""
    card = (overfitted / "README.md").read_text(encoding="utf-8")
    step = json.loads((overfitted / "summary.json").read_text())["step_of_the_model"]
    loss = {line["step"]: line["loss"] for line in metrics(overfitted, "valid")}[step]
    assert "This model was fine-tuned from `tiny` by mindalle-jax" in card and "base_model: tiny\n" in card
    lines = [f"- Steps: {step} of 8 images\n", "- Data: 16 images, fingerprint ", "- Trained: all weights\n",
             f"- Validation loss: {loss:.4f} nats\n", "License of the weights: that of the base model"]  # fmt: skip
    assert [line for line in lines if line not in card] == []
    assert "{" not in card and "/home" not in card and str(overfitted.parent) not in card


def test_what_is_said_while_it_runs(train, capsys):
    run = train("told", optimizer={"max_steps": 10})
    err = capsys.readouterr().err
    losses = {line["step"]: line["loss"] for line in metrics(run, "valid")}
    assert "from tiny; 8 x cpu, float32\n" in err and "validation: 16 samples\n" in err
    best = min(losses, key=losses.__getitem__)
    assert f"step 5: validation loss {losses[5]:.4f}; the best so far is {losses[5]:.4f} of step 5\n" in err
    assert f"step 10: validation loss {losses[10]:.4f}; the best so far is {losses[best]:.4f} of step {best}\n" in err


@pytest.mark.parametrize(
    ("training", "text"),
    [
        (
            {"sample_prompts": ["the cat"]},
            "note: training.sample_prompts are not sampled: set training.sample_every_steps",
        ),
        (
            {"sample_every_steps": 5},
            "note: training.sample_every_steps does nothing without training.sample_prompts",
        ),
    ],
)
def test_previews_that_would_not_come_are_told(train, capsys, training, text):
    train(next(iter(training)), optimizer={"max_steps": 5}, data={"valid": None}, training=training)
    assert text in capsys.readouterr().err
