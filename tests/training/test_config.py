"""The configuration of a run: what it takes from the model to start from, and what it refuses."""

import pytest

from mindalle_jax.config.file import load_config
from mindalle_jax.config.schema import Config
from mindalle_jax.errors import ConfigError
from mindalle_jax.storage.adapters import LoraConfig
from mindalle_jax.training.config import (
    FinetuneConfig,
    RunConfig,
    ShardingConfig,
    TrainingConfig,
    check_share,
    load_finetune_config,
)


@pytest.fixture
def load(tmp_path):
    """load(text, *overrides, base=None) -> the FinetuneConfig of a file with this text."""

    def load(text: str, *overrides: str, base: Config | None = None) -> FinetuneConfig:
        (tmp_path / "run.yaml").write_text(text)
        return load_finetune_config(tmp_path / "run.yaml", overrides, base)

    return load


def test_sizes_of_mesh_axes():
    assert ShardingConfig(mesh=("fsdp=4", "tensor=2")).sizes() == {"fsdp": 4, "tensor": 2}
    assert ShardingConfig().sizes() == {}


@pytest.mark.parametrize("part", ["fsdp", "fsdp=", "fsdp=0", "model=2", "fsdp=-1", "fsdp=2=2", ""])
def test_a_mesh_axis_that_is_none(part):
    with pytest.raises(ConfigError, match="sharding.mesh: .* is not one of data, fsdp, tensor with its size"):
        ShardingConfig(mesh=(part,)).sizes()


def test_a_model_lends_what_the_file_leaves_out(load, tiny_config):
    """And the part that lies with the model is as in the model."""
    config = load("stage2: {hparams: {attn_pdrop: 0.1}}", "experiment.epochs=3", base=tiny_config)
    assert config.model_config().stage1 == tiny_config.stage1
    assert config.stage2.hparams.n_layers == 2 and config.stage2.hparams.attn_pdrop == 0.1
    assert config.experiment.epochs == 3 and not config.image_only


def test_a_recipe_of_the_original_has_no_section_of_ours(load):
    config = load("stage2: {type: igpt, use_cls_cond: true, hparams: {n_classes: 1000}}\noptimizer: {base_lr: 1e-4}\n")
    assert config.image_only and config.training == TrainingConfig() and config.optimizer.base_lr == 1e-4


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_a_share_below_one(share):
    check_share("training.ema_decay", share)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan"), float("inf")])
def test_what_is_no_share(share):
    with pytest.raises(ConfigError, match=r"training.ema_decay must lie in \[0, 1\)"):
        check_share("training.ema_decay", share)


@pytest.mark.parametrize(
    "name", ["warmup_steps", "checkpoint_every_steps", "validate_every_steps", "sample_every_steps"]
)
def test_numbers_of_steps_are_not_negative(load, name):
    with pytest.raises(ConfigError, match=f"training.{name} must be at least 0, not -1"):
        load("", f"training.{name}=-1")


@pytest.mark.parametrize(
    ("training", "message"),
    [
        (TrainingConfig(init_from="scratch"), "must be set with init_from: scratch, and only then"),
        (TrainingConfig(vqgan="a"), "must be set with init_from: scratch, and only then"),
        (TrainingConfig(tokenizer="a"), "training.tokenizer works only with init_from: scratch"),
        (TrainingConfig(init_from="scratch", vqgan="a", freeze=("ln_f/.*",)), "with init_from: scratch there are none"),
        (
            TrainingConfig(init_from="scratch", vqgan="a", lora=LoraConfig(rank=2)),
            "with init_from: scratch there are none",
        ),
    ],
)
def test_fields_that_do_not_go_with_the_model_to_start_from(training, message):
    with pytest.raises(ConfigError, match=message):
        training.check_init_from()


def test_fields_that_go_together():
    TrainingConfig(init_from="scratch", vqgan="a", tokenizer="b").check_init_from()
    TrainingConfig(init_from="a", freeze=("ln_f/.*",), lora=LoraConfig(rank=2)).check_init_from()


def test_every_run_has_the_sections_of_a_run(tmp_path):
    (tmp_path / "run.yaml").write_text("data: {train: photos}\n")
    assert load_config(tmp_path / "run.yaml", ["data.threads=2"], RunConfig).data.threads == 2
    with pytest.raises(ConfigError, match="unknown field stage2"):
        load_config(tmp_path / "run.yaml", ["stage2.type=igpt"], RunConfig)


@pytest.mark.parametrize(
    ("images", "parts", "overrides", "line"),
    [
        (70, 1, [], "training.warmup_steps=3"),
        (
            70,
            1,
            ["experiment.local_batch_size=24", "experiment.epochs=1"],
            "experiment.total_batch_size=48 training.warmup_steps=0",
        ),
        (1000, 6, [], "experiment.total_batch_size=48"),
        (
            64,
            3,
            ["training.warmup_steps=0", "experiment.local_batch_size=30"],
            "experiment.total_batch_size=63 experiment.local_batch_size=21",
        ),
    ],
)
def test_what_does_not_fit_is_told_with_values_that_do(load, images, parts, overrides, line):
    """The line that the message names is taken by the next run, without a second error."""
    config = load("experiment: {local_batch_size: 8, total_batch_size: 64, epochs: 8}\ntraining: {warmup_steps: 20}",
                  *overrides)  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        config.plan_batches(images, parts)
    assert str(caught.value).endswith(f"; this works: {line}")
    fitted = load("experiment: {local_batch_size: 8, total_batch_size: 64, epochs: 8}\ntraining: {warmup_steps: 20}",
                  *overrides, *line.split())  # fmt: skip
    plan = fitted.plan_batches(images, parts)
    experiment = fitted.experiment
    assert plan == (experiment.total_batch_size, experiment.local_batch_size, fitted.training.warmup_steps, "")


@pytest.mark.parametrize(
    ("images", "parts", "overrides", "plan", "note"),
    [
        (12, 1, [], (8, 8, 3), "a step takes 8, and training.warmup_steps is 3"),
        (12, 1, ["experiment.epochs=1"], (8, 8, 0), "a step takes 8, and training.warmup_steps is 0"),
        (5, 1, ["training.warmup_steps=2"], (4, 4, 2), "a step takes 4"),
        (63, 2, ["training.warmup_steps=2"], (32, 8, 2), "a step takes 32"),
        (30, 6, [], (30, 5, 3), "a step takes 30, and training.warmup_steps is 3"),
        (1, 1, [], (1, 1, 3), "a step takes 1, and training.warmup_steps is 3"),
    ],
)
def test_fewer_images_than_a_batch_are_a_smaller_batch_with_a_note(load, images, parts, overrides, plan, note):
    config = load("experiment: {local_batch_size: 8, total_batch_size: 64, epochs: 8}\ntraining: {warmup_steps: 20}",
                  *overrides)  # fmt: skip
    found = config.plan_batches(images, parts)
    said = f"the data has {images} samples, fewer than experiment.total_batch_size 64: {note}"
    assert found == (*plan, said)


def test_fewer_images_than_devices(load):
    with pytest.raises(ConfigError, match="4 devices share a batch, and the data has 3 samples: use fewer devices"):
        load("experiment: {local_batch_size: 1, total_batch_size: 8}").plan_batches(3, 4)
