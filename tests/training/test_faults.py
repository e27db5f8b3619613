"""Training and bad input, as a person meets it: `mindalle finetune`, one message, an exit code, nothing spoiled."""

import json
import shutil
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from conftest import random_tensors
from training_runs import (
    checkpoint_arrays,
    metrics,
    weights_crc32,
    write_code_set,
    write_config,
    write_pictures,
)

from mindalle_jax import cli
from mindalle_jax.interop.mindalle import import_checkpoint
from mindalle_jax.interop.torch_archive import write_torch_archive
from mindalle_jax.models.transformer import Transformer
from mindalle_jax.runtime.sharding import make_mesh, param_shardings
from mindalle_jax.storage.model_folder import STAGE_FILES
from mindalle_jax.storage.weights import leaf_shapes, load_stacked
from mindalle_jax.training.optimizer import learning_rate, make_optimizer
from mindalle_jax.training.step import StepConfig, init_state, train_step


@pytest.fixture
def finetune(capsys):
    """finetune(config, out, *more) -> (exit code, standard output, standard error)."""

    def run(config: Path, out: Path, *more: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main(["finetune", "--config", str(config), "--out", str(out), *more])
        stdout, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, stdout, err

    return run


def message(err: str) -> str:
    """The error, which is one line and the last; before it there may be a bar and what was done."""
    last = err.rstrip("\n").splitlines()[-1]
    assert last.startswith("mindalle finetune: ") and err.count("mindalle finetune: ") == 1, err
    return last.removeprefix("mindalle finetune: ")


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit_model(tiny_config, source: Path, target: Path, edit) -> Path:
    """Another model of the same sizes: the random weights of seed 0 after edit(tensors)."""
    shutil.copytree(source, target.with_name("original"))
    tensors = random_tensors(tiny_config, "stage2")
    edit(tensors)
    path = target.with_name("original") / STAGE_FILES["stage2"]
    path.unlink()
    write_torch_archive(path, [(key, a.dtype, a.shape) for key, a in tensors.items()], tensors.__getitem__)
    return import_checkpoint(target.with_name("original"), target).target


@pytest.fixture(scope="module")
def codes(tmp_path_factory, tiny_model_folder) -> Path:
    """Twelve captioned pictures as codes. Read only."""
    return write_code_set(tmp_path_factory.mktemp("data") / "codes", tiny_model_folder, 12)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model_folder, codes) -> tuple[Path, Path]:
    """(configuration, folder) of a run of two updates with a checkpoint after each. Read only."""
    work = tmp_path_factory.mktemp("finished")
    optimizer = {"base_lr": 1e-3, "max_steps": 2}
    training = {"checkpoint_every_steps": 1}
    config = write_config(work / "run.yaml", tiny_model_folder, codes, optimizer=optimizer, training=training)
    assert cli.main(["finetune", "--config", str(config), "--out", str(work / "out")]) == 0
    return config, work / "out"


@pytest.fixture
def begun(finished, tmp_path) -> tuple[Path, Path]:
    """A copy of that run after its first update, as a kill would leave it: no model yet."""
    out = Path(shutil.copytree(finished[1], tmp_path / "begun"))
    shutil.rmtree(out / "checkpoints" / "2")
    for name in ("manifest.json", "stage2.safetensors", "config.yaml", "summary.json"):
        (out / name).unlink()
    return finished[0], out


# Before anything is read


WRONG = {
    # name: overrides, exit code, message
    "batch, devices and warm-up": (
        ["experiment.local_batch_size=2", "experiment.total_batch_size=12", "training.warmup_steps=20"],
        3,
        "experiment.total_batch_size 12 must be a multiple of 16: local_batch_size 2 on 8 devices; "
        "training.warmup_steps 20 must be below the number of steps, 20; this works: "
        "experiment.total_batch_size=8 experiment.local_batch_size=1 training.warmup_steps=9",
    ),
    "batch below the devices": (
        ["experiment.total_batch_size=5"], 3, "on 8 devices; this works: experiment.total_batch_size=8",
    ),
    "no data": (["data.train="], 3, "data.train needs a value; it cannot be empty or null"),
    "data that is not there": (["data.train=fotos"], 9, "data.train: fotos does not exist"),
    "validation data that is not there": (["data.valid=fotos"], 9, "data.valid: fotos does not exist"),
    "data without an image": (["data.train=configs"], 9, "data.train: configs holds nothing to train on: 0 samples"),
    "unknown section": (["trainning.seed=1"], 3, "unknown field trainning; did you mean training?"),
    "unknown key": (["training.warmup=1"], 3, "unknown field training.warmup; did you mean warmup_steps?"),
    "wrong type": (["training.seed=one"], 3, "training.seed must be of type int, not 'one'"),
    "seed": (["training.seed=-1"], 3, "training.seed must lie in [0, 4294967296), not -1"),
    "caption dropout": (["training.caption_dropout=1"], 3, "training.caption_dropout must lie in [0, 1), not 1"),
    "average": (["training.ema_decay=.nan"], 3, "training.ema_decay must lie in [0, 1), not nan"),
    "text loss": (["training.text_loss_weight=-1"], 3, "must be a finite number of at least 0, not -1"),
    "infinite text loss": (["training.text_loss_weight=.inf"], 3, "training.text_loss_weight must be"),
    "alpha": (["training.lora.alpha=.nan"], 3, "training.lora.alpha must be a finite number over 0, not nan"),
    "no checkpoints": (["training.keep_checkpoints=0"], 3, "training.keep_checkpoints must be at least 1"),
    "threads": (["data.threads=0"], 3, "data.threads must be at least 1, not 0"),
    "flash attention without a GPU": (["training.flash_attention=true", "experiment.use_amp=true"], 3, "JAX uses cpu"),
    "flash attention in float32": (
        ["training.flash_attention=true", "experiment.use_amp=false"], 3, "needs experiment.use_amp=true",
    ),
    "rank": (["training.lora.rank=-4"], 3, "training.lora.rank must be at least 0, not -4"),
    "bad pattern": (["training.freeze=['blocks/(']"], 3, "'blocks/(' is not a pattern"),
    "all frozen": (["training.freeze=['.*']"], 3, "training.freeze ['.*'] matches every parameter"),
    "frozen nothing": (["training.freeze=['block/.*']"], 3, "training.freeze: 'block/.*' matches none of"),
    "adapted nothing": (
        ["training.lora.rank=2", "training.lora.targets=['blocks/attn']"], 3,
        "training.lora.targets ['blocks/attn'] match none of",
    ),
    "adapted no matrix": (
        ["training.lora.rank=2", "training.lora.targets=['ln_f/scale']"], 3,
        "match ln_f/scale, which is not a weight of a linear layer",
    ),
    "warm-up": (
        ["training.warmup_steps=20"], 3,
        "training.warmup_steps 20 must be below the number of steps, 20; this works: training.warmup_steps=9",
    ),
    "learning rate": (["optimizer.base_lr=0"], 3, "optimizer.base_lr must be over 0, not 0"),
    "mesh axis": (["sharding.mesh=['model=2']"], 3, "'model=2' is not one of data, fsdp, tensor with its size"),
    "mesh size": (
        ["sharding.strategy=fsdp", "sharding.mesh=['fsdp=3']"], 3, "fsdp 3 x tensor 1 is not 8, the number of devices"
    ),
    "mesh and strategy": (["sharding.mesh=['tensor=2']"], 3, "strategy 'replicated' splits nothing over tensor"),
    "no model": (["training.init_from=nowhere/at/all"], 4, "nowhere/at/all"),
    "other sizes": (
        ["stage2.hparams.n_layers=3"], 3, "does not fit: stage2.hparams.n_layers was 2 and is 3",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG)
def test_what_is_wrong_is_told_before_anything_is_loaded(
    finetune, tmp_path, tiny_model_folder, codes, monkeypatch, fault
):
    """And costs nothing: with the mistake undone, the same folder does."""
    from mindalle_jax.training import loop

    overrides, code, text = WRONG[fault]
    config, out = write_config(tmp_path / "run.yaml", tiny_model_folder, codes), tmp_path / "out"
    monkeypatch.setattr(loop.Run, "__call__", lambda *_, **__: pytest.fail("the run began"))
    got, stdout, err = finetune(config, out, *overrides)
    assert (got, stdout) == (code, "") and text in message(err)
    assert not list(out.rglob("*.safetensors"))
    monkeypatch.setattr(loop.Run, "__call__", lambda *_, **__: True)
    assert finetune(config, out)[0] == 0


def test_an_override_without_a_value(finetune, tmp_path):
    code, _, err = finetune(tmp_path / "run.yaml", tmp_path / "out", "data.train")
    assert code == 2 and message(err) == "overrides have the form section.key=value, such as data.train=photos"


def test_a_transfer_that_does_not_fit(finetune, tmp_path, tiny_model_folder, tiny_igpt_config):
    """All differences at once."""
    data = write_pictures(tmp_path / "data" / "one", 1)
    stage2 = {"type": "igpt", "use_cls_cond": True, "hparams": {"n_classes": 5, "embed_dim": 96, "n_layers": 3}}
    config = write_config(tmp_path / "run.yaml", tiny_model_folder, data.parent, stage2=stage2)
    code, _, err = finetune(config, tmp_path / "out")
    assert code == 3 and message(err) == (
        "the model to start from does not fit: stage2.hparams.embed_dim 96, upstream 32; "
        "stage2.hparams.n_layers 3, upstream 2"
    )


def test_a_transfer_from_an_image_only_model(finetune, tmp_path, tiny_igpt_model_folder, codes):
    config = write_config(tmp_path / "run.yaml", tiny_igpt_model_folder, codes, stage2={"type": "transformer1d"})
    code, _, err = finetune(config, tmp_path / "out")
    assert code == 3 and "a transfer goes from transformer1d to igpt" in message(err)


def test_codes_of_another_vqgan(finetune, tmp_path, tiny_config, write_folder, codes):
    """A person has the codes of one model and fine-tunes another."""
    model = import_checkpoint(write_folder(tmp_path / "original", tiny_config, seed=5), tmp_path / "model").target
    code, _, err = finetune(write_config(tmp_path / "run.yaml", model, codes), tmp_path / "out")
    assert code == 9 and "codes of another VQGAN" in message(err)


# A folder that holds something


def test_a_folder_with_something_else_is_left_alone(finetune, tmp_path, tiny_model_folder, codes):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    code, _, err = finetune(write_config(tmp_path / "run.yaml", tiny_model_folder, codes), tmp_path / "out")
    assert code == 6
    assert message(err).endswith("exists, is not empty and holds no run to resume; name another folder")
    assert tree(tmp_path / "out") == {"thesis.txt": b"mine"}


def test_a_run_of_another_configuration_is_refused(finetune, begun):
    config, out = begun
    before = tree(out)
    code, _, err = finetune(config, out, "optimizer.base_lr=0.5", "training.freeze=['ln_f/.*']", "data.threads=2")
    assert code == 3 and message(err) == (
        f"{out} holds a run of another configuration: optimizer.base_lr was 0.001 and is 0.5; "
        "training.freeze was () and is ('ln_f/.*',); name another folder, or undo the changes"
    )
    assert tree(out) == before


def test_what_has_no_effect_on_the_result_may_change(finetune, begun, finished):
    config, out = begun
    free = ["data.threads=2", "training.keep_checkpoints=5", "training.validate_every_steps=7", "training.remat=dots"]
    assert finetune(config, out, *free, "sharding.strategy=replicated", "experiment.valid_batch_size=3")[0] == 0
    assert weights_crc32(out) == weights_crc32(finished[1])


def test_a_finished_run_is_not_run_again(finetune, finished, tmp_path):
    config, out = finished[0], Path(shutil.copytree(finished[1], tmp_path / "out"))
    before = tree(out)
    code, _, _ = finetune(config, out)
    after = tree(out)
    assert code == 0 and weights_crc32(out) == weights_crc32(finished[1])
    del before["summary.json"], after["summary.json"]  # it has seconds
    assert {name for name in after if after[name] != before.get(name) and "tensorboard" not in name} == set()


# Checkpoints


def test_a_data_set_that_changed_is_refused_unless_told(finetune, begun, tmp_path, tiny_model_folder):
    config, out = begun
    other = write_code_set(tmp_path / "other", tiny_model_folder, 13)
    changed = tmp_path / "changed.yaml"
    # The same path with other content.
    text = yaml.safe_load(config.read_text())
    (tmp_path / "data").symlink_to(text["data"]["train"])
    text["data"]["train"] = str(tmp_path / "data")
    changed.write_text(yaml.safe_dump(text))
    theirs = yaml.safe_load((out / "run.yaml").read_text())
    theirs["data"]["train"] = str(tmp_path / "data")
    (out / "run.yaml").write_text(yaml.safe_dump(theirs))
    (tmp_path / "data").unlink()
    (tmp_path / "data").symlink_to(other)

    code, _, err = finetune(changed, out)
    assert code == 4 and "the data set has changed since the checkpoint of step 1" in message(err)
    assert "'12 samples, " in message(err) and "'13 samples, " in message(err)
    assert "bring the old data back, or resume with --ignore-fingerprint" in message(err)
    assert not (out / "manifest.json").exists()
    assert finetune(changed, out, "--ignore-fingerprint")[0] == 0
    assert [line["step"] for line in metrics(out)] == [1, 2]


def test_data_and_model_may_have_moved(finetune, begun, tmp_path, tiny_model_folder):
    """They are held by their content: the run resumes with the same samples and weights from another place."""
    config, out = begun
    data = yaml.safe_load(config.read_text())["data"]["train"]
    shutil.copytree(data, tmp_path / "elsewhere")
    shutil.copytree(tiny_model_folder, tmp_path / "model")
    moved = (f"data.train={tmp_path / 'elsewhere'}", f"training.init_from={tmp_path / 'model'}")
    assert finetune(config, out, *moved)[0] == 0
    assert [line["step"] for line in metrics(out)] == [1, 2]


def test_another_base_model_at_the_same_place_is_refused(
    finetune, begun, tmp_path, tiny_model_folder, tiny_folder, tiny_config
):
    """Adapters and frozen parameters belong to the model they were trained beside."""
    config, out = begun
    place = tmp_path / "model"
    for file in (config, out / "run.yaml"):
        text = yaml.safe_load(file.read_text())
        text["training"]["init_from"] = str(place)
        (tmp_path / "moved.yaml" if file == config else file).write_text(yaml.safe_dump(text))
    edit_model(tiny_config, tiny_folder, place, lambda tensors: tensors["ln_f.bias"].__iadd__(1))
    code, _, err = finetune(tmp_path / "moved.yaml", out)
    assert code == 4 and message(err) == f"{out}: the run started from another model than the one given now"
    assert not (out / "manifest.json").exists()
    shutil.rmtree(place)
    shutil.copytree(tiny_model_folder, place)
    assert finetune(tmp_path / "moved.yaml", out)[0] == 0


def test_a_flipped_bit_in_a_checkpoint_is_refused(finetune, begun):
    """In the largest file of the arrays: their bits, not what Orbax says about them."""
    config, out = begun
    file = max((out / "checkpoints" / "1" / "state").rglob("*"), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    code, _, err = finetune(config, out)
    assert code == 4
    assert message(err).startswith(f"{out / 'checkpoints' / '1'}: damaged: ")
    leaves = list(checkpoint_paths(out))
    assert any(path in message(err) for path in leaves) or file.name in message(err), err
    assert not (out / "manifest.json").exists()


def checkpoint_paths(out: Path) -> list[str]:
    record = json.loads((out / "checkpoints" / "1" / "record" / "record.json").read_text())
    return list(record["leaves"])


# What is not finite


def overflowing(tensors: dict[str, np.ndarray]) -> None:
    """Finite in the file, infinite when multiplied."""
    tensors["head_img.weight"][...] = 3e38


def test_a_run_without_a_finite_loss_ends_and_saves_nothing_infinite(
    finetune, tmp_path, tiny_config, tiny_folder, codes
):
    model = edit_model(tiny_config, tiny_folder, tmp_path / "model", overflowing)
    training = {"checkpoint_every_steps": 4, "ema_decay": 0.9, "keep_checkpoints": 9}
    config, out = write_config(tmp_path / "run.yaml", model, codes, training=training), tmp_path / "out"
    code, stdout, err = finetune(config, out)
    assert (code, stdout) == (7, "")
    assert message(err) == (
        "10 steps in a row without a finite loss, the last at step 10: lower optimizer.base_lr (0.001), or look at "
        "the data"
    )
    assert err.count("was skipped: its loss or gradient is not finite") == 10
    lines = metrics(out)
    assert [line["skipped"] for line in lines] == [1] * 10 and {line["loss"] for line in lines} == {None}
    assert "NaN" not in (out / "metrics.jsonl").read_text(), "not JSON"
    assert not (out / "manifest.json").exists() and not (out / "stage2.safetensors").exists()
    before = leaves_of(model, tiny_config)
    for step in (4, 8):
        arrays = checkpoint_arrays(out, step)
        assert all(np.isfinite(array).all() for array in arrays.values())
        assert (int(arrays["step"]), int(arrays["skipped"])) == (step, step)
        for path, leaf in before.items():
            for part in ("params", "ema"):
                np.testing.assert_array_equal(arrays[f"{part}/{path}"], leaf)
    # The same command resumes, counts on, and ends the same way.
    code, _, err = finetune(config, out)
    assert code == 7 and "the last at step 10" in message(err)


def leaves_of(model: Path, config) -> dict[str, np.ndarray]:
    shapes = leaf_shapes(config, "stage2")
    mesh = make_mesh("replicated", {}, jax.devices()[:1])
    dtypes = dict.fromkeys(shapes, np.dtype("float32"))
    leaves = load_stacked(model, "stage2", config, dtypes, param_shardings(shapes, "replicated", mesh))
    return {path: np.asarray(leaf) for path, leaf in leaves.items()}


def test_one_bad_update_is_skipped_and_changes_nothing(tiny_config, tiny_model_folder):
    """Parameters, both moments, their count, average and learning rate are as if that batch had not been there."""
    shapes = leaf_shapes(tiny_config, "stage2")
    mesh = make_mesh("replicated", {}, jax.devices()[:1])
    shardings = param_shardings(shapes, "replicated", mesh)
    dtypes = dict.fromkeys(shapes, np.dtype("float32"))
    leaves = load_stacked(tiny_model_folder, "stage2", tiny_config, dtypes, shardings)
    frozen = {"ln_f/scale": leaves.pop("ln_f/scale")}
    broken = {"ln_f/scale": frozen["ln_f/scale"] * np.nan}
    schedule = learning_rate(tiny_config.optimizer, 0, 10)
    optimizer = make_optimizer(tiny_config.optimizer, schedule, "all", leaves)
    step_config = StepConfig(Transformer(tiny_config.stage2), optimizer, schedule, 1, 0.125, 0.0, 0.9, 1.0, 0)
    rng = np.random.default_rng(0)
    batch = {
        "prefix": rng.integers(2, 110, (1, 2, 12)).astype(np.int32),
        "codes": rng.integers(0, 80, (1, 2, 64)).astype(np.int32),
        "index": np.arange(2, dtype=np.uint32)[None],
    }
    state = init_state(step_config, leaves)
    step = jax.jit(partial(train_step, step_config), compiler_options={"xla_backend_optimization_level": "0"})
    state, first = step(state, frozen, batch)
    before = jax.device_get(state)
    for skipped in (1, 2):
        state, metrics = step(state, broken, batch)
        assert int(metrics["skipped"]) == int(state.skipped) == skipped
    after = jax.device_get(state)
    assert int(after.step) == 3
    for a, b in zip(jax.tree.leaves(before[1:4]), jax.tree.leaves(after[1:4]), strict=True):
        np.testing.assert_array_equal(a, b)
    state, metrics = step(state, frozen, batch)
    assert int(metrics["skipped"]) == int(state.skipped) == 0
    assert float(metrics["learning_rate"]) == float(schedule(1)) and metrics["loss"] < first["loss"]
    changed = [np.any(before.params[path] != leaf) for path, leaf in jax.device_get(state.params).items()]
    assert all(changed)
