"""Runs of `mindalle train-vqgan` on a few tiny pictures."""

import time

import jax
import pytest
import yaml
from PIL import Image
from safetensors import safe_open
from training_runs import metrics, start, write_code_set, write_pictures

from mindalle_jax.cli import main
from mindalle_jax.config.file import load_config
from mindalle_jax.data.sources import open_source
from mindalle_jax.errors import ConfigError, DataError
from mindalle_jax.storage.weights import read_manifest
from mindalle_jax.training.vqgan.config import VqganTrainConfig
from mindalle_jax.training.vqgan.run import VqganRun, train_vqgan

TREE = {
    "stage1": {
        "embed_dim": 16, "n_embed": 64,
        "hparams": {"z_channels": 32, "resolution": 16, "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1,
                    "attn_resolutions": []},
    },
    "optimizer": {"opt_type": "muon", "base_lr": 2e-3, "max_steps": 16},
    "experiment": {"local_batch_size": 4, "total_batch_size": 8, "valid_batch_size": 8},
    "training": {"seed": 3, "quantise_from_step": 2, "restart_after_steps": 3, "checkpoint_every_steps": 6,
                 "validate_every_steps": 8, "ema_decay": 0.5},
    "data": {"threads": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Sixteen of them."""
    return write_pictures(tmp_path_factory.mktemp("vqgan-data") / "pictures", 16, num_codes=256)


@pytest.fixture(scope="module")
def config_file(tmp_path_factory, pictures):
    path = tmp_path_factory.mktemp("vqgan-config") / "vqgan.yaml"
    data = TREE["data"] | {"train": str(pictures), "valid": str(pictures)}
    path.write_text(yaml.safe_dump(TREE | {"data": data}), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory, config_file):
    """The folder of a run that was not interrupted."""
    out = tmp_path_factory.mktemp("vqgan-run") / "out"
    finish(config_file, out, "training.sample_every_steps=16")
    return out


def finish(config_file, out, *overrides: str) -> None:
    """A whole run, on one device."""
    process = start(config_file, out, *overrides, verb="train-vqgan")
    _, errors = process.communicate()
    assert process.returncode == 0, errors


def stage1_crcs(out):
    return {path: entry["crc32"] for path, entry in read_manifest(out)["tensors"]["stage1"].items()}


def test_a_run_learns_and_leaves_a_vqgan(trained, pictures):
    """Less is lost at the end, many codes are in use, and the folder holds one stage alone, whose config is whole."""
    lines, valid = metrics(trained), metrics(trained, "valid")
    assert [line["step"] for line in lines] == list(range(1, 17)) and [line["step"] for line in valid] == [8, 16]
    assert lines[-1]["l1_loss"] < 0.8 * lines[0]["l1_loss"] and not any(line["skipped"] for line in lines)
    assert valid[-1]["loss"] < valid[0]["loss"] and valid[-1]["psnr"] > valid[0]["psnr"] > 5
    assert 1 < valid[-1]["perplexity"] <= 64 and 0 < valid[-1]["codes_used"] <= 1
    assert "discriminator_loss" not in lines[0]
    files = {path.name for path in trained.iterdir()} - {"tensorboard"}
    assert files == {".lock", "run.yaml", "metrics.jsonl", "summary.json", "checkpoints", "samples",
                     "config.yaml", "stage1.safetensors", "manifest.json"}  # fmt: skip
    config = load_config(trained / "config.yaml")
    assert config.stage1.n_embed == config.stage2.vocab_size_img == 64 and config.stage2.hparams.ctx_len_img == 64
    with Image.open(trained / "samples" / "step_000016.png") as grid:
        assert grid.size == (8 * 16, 2 * 16)  # eight pictures above their reconstructions


@pytest.mark.slow
def test_a_killed_run_ends_as_one_that_was_not(trained, config_file, tmp_path):
    """Keys follow from the step, `unused` is part of the state: bit for bit, restarts of codes too."""
    assert any(line["codes_restarted"] for line in metrics(trained)[6:]), "no restart after the checkpoint"
    out = tmp_path / "out"
    process = start(config_file, out, verb="train-vqgan")
    while process.poll() is None and not (out / "checkpoints" / "6").exists():
        time.sleep(0.05)
    process.kill()
    process.communicate()
    assert not (out / "summary.json").exists(), "too late: the run was complete"
    finish(config_file, out, "training.checkpoint_every_steps=7")
    assert stage1_crcs(out) == stage1_crcs(trained)
    for kind in ("train", "valid"):
        rates = {"images_per_s"}
        ours, theirs = (
            [{name: value for name, value in line.items() if name not in rates} for line in metrics(out, kind)]
            for out in (out, trained)
        )
        assert ours == theirs


@pytest.mark.slow
def test_training_further_starts_at_the_loss_of_the_weights(trained, config_file, tmp_path):
    """At a rate of nothing the validation after an update is that of the model it began with; no code is reset."""
    text = yaml.safe_load(config_file.read_text(encoding="utf-8"))
    del text["stage1"]  # as in the model
    file = tmp_path / "further.yaml"
    file.write_text(yaml.safe_dump(text), encoding="utf-8")
    overrides = [f"training.init_from={trained}", "optimizer.base_lr=1e-12", "optimizer.max_steps=1",
                 "training.quantise_from_step=0"]  # fmt: skip
    finish(file, tmp_path / "out", *overrides)
    before, after = metrics(trained, "valid")[-1], metrics(tmp_path / "out", "valid")[-1]
    # Updates of 1e-12 round to nothing, or to the last of 24 bits.
    assert after["loss"] == pytest.approx(before["loss"], rel=1e-5)
    assert metrics(tmp_path / "out")[0]["codes_restarted"] == 0
    with pytest.raises(ConfigError, match=r"stage1.n_embed was 64 and is 32"):
        # The eight devices of this process take eight pictures.
        train_vqgan(file, [*overrides, "experiment.local_batch_size=1", "stage1.n_embed=32"], tmp_path / "other")


def test_the_result_makes_codes_and_carries_a_fresh_transformer(trained, pictures, tmp_path, request):
    """`mindalle prepare-codes` loads the VQGAN alone; training from scratch takes it for its stage 1."""
    from mindalle_jax.data.codes import vqgan_digest
    from mindalle_jax.storage.initialize import write_fresh
    from mindalle_jax.training.finetune import read_finetune

    arguments = ["--model", str(trained), "--data", str(pictures), "--out", str(tmp_path / "codes"),
                 "--task", "unconditional"]  # fmt: skip
    assert main(["prepare-codes", *arguments]) == 0
    source = open_source(tmp_path / "codes", "unconditional", vqgan=vqgan_digest(trained))
    assert len(source) == 16 and source[0].codes is not None and source[0].codes.shape == (64,)

    tree = {
        "training": {"init_from": "scratch", "vqgan": str(trained)},
        "stage2": {"type": "igpt", "hparams": {"embed_dim": 32, "n_layers": 1, "n_heads": 2}},
    }
    (tmp_path / "stage2.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    config, base = read_finetune(tmp_path / "stage2.yaml", [])
    write_fresh(base, tmp_path, config.model_config(), tmp_path / "fresh")
    assert stage1_crcs(tmp_path / "fresh") == stage1_crcs(trained)


@pytest.mark.slow
def test_codes_that_lie_near_each_other_become_one(trained, config_file, tmp_path):
    """Redundant ones start again in the run; the folder's config says how many are left at its end."""
    finish(config_file, tmp_path / "out", "training.merge_codes=2")
    config = load_config(tmp_path / "out" / "config.yaml")
    number = config.stage1.n_embed
    assert 1 <= number < 64 and config.stage2.vocab_size_img == number
    with safe_open(tmp_path / "out" / "stage1.safetensors", "numpy") as file:
        rows = file.get_tensor("codebook")
    assert rows.shape == (number, 16) and len({row.tobytes() for row in rows}) == number
    restarts = [line["codes_restarted"] for line in metrics(tmp_path / "out")]
    assert sum(restarts) > sum(line["codes_restarted"] for line in metrics(trained))


def run_of(config_file, out, *overrides: str) -> VqganRun:
    # The eight devices of this process take eight pictures.
    overrides = ("experiment.local_batch_size=1", *overrides)
    return VqganRun(load_config(config_file, overrides, VqganTrainConfig), None, out)


def test_codes_must_set_in_before_the_end(config_file, tmp_path):
    """Or the run would end, and leave a codebook of which nothing was learned."""
    run_of(config_file, tmp_path, "training.quantise_from_step=8")
    with pytest.raises(ConfigError, match=r"quantise_from_step 9 and the 7 steps that fill .* all steps, 16: "):
        run_of(config_file, tmp_path, "training.quantise_from_step=9")


def test_merging_needs_pictures_to_count_codes_in(config_file, tmp_path):
    tree = yaml.safe_load(config_file.read_text(encoding="utf-8"))
    del tree["data"]["valid"]
    (tmp_path / "vqgan.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    with pytest.raises(ConfigError, match="merge_codes needs data.valid"):
        run_of(tmp_path / "vqgan.yaml", tmp_path / "out", "training.merge_codes=1")


def test_mixing_needs_two_pictures(config_file, tmp_path):
    """The eight devices of this process have a picture each; one device with one would mix it with itself."""
    run_of(config_file, tmp_path, "training.losses.locality=1")
    config = load_config(config_file, ["training.losses.locality=1", "experiment.local_batch_size=1"], VqganTrainConfig)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: jax.local_devices()[:1])
        with pytest.raises(ConfigError, match="locality mixes images: experiment.local_batch_size must be at least 2"):
            VqganRun(config, None, tmp_path)


def test_the_discriminator_is_built_only_if_the_run_gets_there(config_file, tmp_path):
    wanted = ["training.losses.adversarial=0.8", "training.discriminator.layers=2", "training.discriminator.width=32"]
    assert run_of(config_file, tmp_path, *wanted).step_config.discriminator is not None
    late = run_of(config_file, tmp_path, *wanted, "training.losses.start_step=16").step_config
    assert late.discriminator is None and late.discriminator_optimizer is None
    last = run_of(config_file, tmp_path, *wanted, "training.losses.start_step=15").step_config
    assert last.discriminator is not None
    assert run_of(config_file, tmp_path).step_config.discriminator is None


def test_codes_are_no_pictures(config_file, tiny_model_folder, tmp_path):
    codes = write_code_set(tmp_path / "codes", tiny_model_folder, 8)
    with pytest.raises(DataError, match="holds codes; a VQGAN is trained on images"):
        run_of(config_file, tmp_path / "out", f"data.train={codes}")
