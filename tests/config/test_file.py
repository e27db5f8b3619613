"""config.yaml: its defaults, and what is said about a file or an override that is wrong."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from mindalle_jax.config.file import dump_config, load_config, load_section, parse_config
from mindalle_jax.config.schema import Config, ExperimentConfig, OptimizerConfig, Stage2Config, Stage2Hparams
from mindalle_jax.errors import ConfigError
from mindalle_jax.storage.files import IN_PACKAGE
from mindalle_jax.training.clip.run import ClipTrainConfig
from mindalle_jax.training.config import FinetuneConfig, TrainingConfig, load_finetune_config
from mindalle_jax.training.vqgan.config import VqganTrainConfig
from mindalle_jax.training.vqgan.run import vqgan_model_config

DEFAULTS = {
    "dataset": {
        "dataset": None,
        "transforms": "dalle-vqvae",
        "tokenizer_type": "CharBPE",
        "context_length": 64,
        "image_resolution": 256,
        "bpe_pdrop": None,
    },
    "stage1": {
        "type": "vqgan",
        "embed_dim": 256,
        "n_embed": 16384,
        "hparams": {
            "double_z": False,
            "z_channels": 256,
            "resolution": 256,
            "in_channels": 3,
            "out_ch": 3,
            "ch": 128,
            "ch_mult": [1, 1, 2, 2, 4],
            "num_res_blocks": 2,
            "attn_resolutions": [16],
            "pdrop": 0.0,
        },
    },
    "stage2": {
        "type": "transformer1d",
        "vocab_size_txt": 16384,
        "vocab_size_img": 16384,
        "use_cls_cond": None,
        "hparams": {
            "embed_dim": 1536,
            "n_layers": 42,
            "n_heads": 24,
            "n_dense_layers": None,  # n_layers
            "ctx_len_img": 256,
            "ctx_len_txt": 64,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "mlp_bias": True,
            "attn_bias": True,
            "gelu_use_approx": False,
            "use_head_txt": True,
            "n_classes": None,
        },
    },
    "optimizer": {
        "opt_type": "adamW",
        "base_lr": 1e-4,
        "weight_decay": 1e-4,
        "betas": [0.9, 0.99],
        "grad_clip_norm": 1.0,
        "sched_type": "cosine",
        "max_steps": 0,
        "min_lr": 0.0,
    },
    "experiment": {
        "local_batch_size": 4,
        "total_batch_size": 512,
        "valid_batch_size": 32,
        "epochs": 10,
        "save_ckpt_freq": 2,
        "test_freq": 1,
        "use_amp": True,
    },
}


def test_the_defaults_are_the_released_models():
    """A file may leave any field out; a default that drifted would load another network."""
    assert yaml.safe_load(dump_config(Config())) == DEFAULTS
    assert parse_config("") == parse_config("stage2:\n") == Config()
    assert Config().stage1.code_size == 16
    assert not Config().image_only


def test_the_references_are_read(golden):
    """Files as the original wrote them."""
    config = load_config(golden / "model" / "config.yaml")
    assert (config.stage2.vocab_size_txt, config.stage1.n_embed, config.stage1.hparams.ch) == (253, 128, 32)
    assert config.stage1.hparams.ch_mult in ((1, 1, 2), (1, 2, 2))  # of the set in tests/, and of the larger one
    config = load_config(golden / "igpt_cls.yaml")
    assert config.image_only and config.stage2.hparams.n_classes == 10
    assert config.optimizer.betas == (0.9, 0.95) and config.experiment.total_batch_size == 4


@pytest.mark.parametrize("name", ["tiny_config", "tiny_igpt_config"])
def test_what_is_written_reads_back_equal(request, name):
    config = request.getfixturevalue(name)
    assert parse_config(dump_config(config)) == config
    rates = dataclasses.replace(config.optimizer, base_lr=1e-5, min_lr=1.25e-7)
    config = dataclasses.replace(config, optimizer=rates)
    assert parse_config(dump_config(config)) == config


@pytest.mark.parametrize(
    ("text", "value"), [("1e-4", 1e-4), ("5E3", 5e3), ("1.5e-3", 1.5e-3), (".5e1", 5.0), ("+1e+2", 100.0), ("2", 2.0)]
)
def test_exponents_without_a_dot_are_numbers(text, value):
    """YAML 1.1 reads 1e-4 as text; the recipes of the original are full of them."""
    for config in (parse_config(f"optimizer: {{base_lr: {text}}}"), parse_config("", [f"optimizer.base_lr={text}"])):
        assert config.optimizer.base_lr == value and type(config.optimizer.base_lr) is float


@pytest.mark.parametrize("text", ["e4", "1e", "1e4x", "'1e-4'", "0x1e4q"])
def test_what_only_looks_like_an_exponent_stays_text(text):
    with pytest.raises(ConfigError, match="optimizer.base_lr must be of type float"):
        parse_config(f"optimizer: {{base_lr: {text}}}")


# ---------------------------------------- unknown and mistyped


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stage3: {}", r"unknown field stage3; did you mean stage\d"),
        ("stage2: {hparams: {n_layer: 3}}", r"unknown field stage2.hparams.n_layer; did you mean n_layers"),
        ("stage2: {n_layers: 3}", r"unknown field stage2.n_layers; "),
        ("experiment: {epoch: 3}", r"unknown field experiment.epoch; did you mean epochs"),
        ("dataset: {zzzzzz: 3}", r"unknown field dataset.zzzzzz; the fields are dataset, transforms"),
        ("1: 2", r"unknown field 1; "),
        ("stage2: {hparams: {n_layers: '3'}}", r"stage2.hparams.n_layers must be of type int, not '3' \(str\)"),
        ("stage2: {hparams: {n_layers: 3.0}}", r"n_layers must be of type int, not 3.0 \(float\)"),
        ("stage2: {hparams: {n_layers: true}}", r"n_layers must be of type int, not True \(bool\)"),
        ("stage2: {hparams: {n_layers: null}}", r"n_layers must be of type int, not None"),
        ("stage2: {hparams: {mlp_bias: 1}}", r"mlp_bias must be of type bool, not 1"),
        ("stage2: {hparams: {n_classes: ten}}", r"n_classes must be of type int, not 'ten'"),
        ("stage2: {type: gpt}", r"stage2.type must be 'transformer1d' or 'igpt', not 'gpt'"),
        ("stage2: {type: [igpt]}", r"stage2.type must be 'transformer1d' or 'igpt'"),
        ("stage1: {hparams: {ch_mult: 3}}", r"ch_mult must be a list of int, not 3"),
        ("stage1: {hparams: {ch_mult: [1, a]}}", r"ch_mult\[1\] must be of type int, not 'a'"),
        ("optimizer: {base_lr: fast}", r"base_lr must be of type float, not 'fast'"),
        ("optimizer: {base_lr: true}", r"base_lr must be of type float, not True"),
        ("stage1: 5", r"stage1 must be a mapping of fields, not 5"),
        ("[1, 2]", r"the file must be a mapping of fields"),
        ("just text", r"the file must be a mapping of fields"),
        ("a: [", r"not valid YAML"),
        ("a: !!python/object/apply:os.system [x]", r"not valid YAML"),
        ("a: 2001-99-99", r"not valid YAML"),
        ("[" * 5000, r"not valid YAML"),
    ],
)
def test_what_is_wrong_is_named_with_what_would_be_right(text, message):
    """A misspelt field that is ignored trains for a day with the default."""
    with pytest.raises(ConfigError, match=message) as raised:
        parse_config(text)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


def test_errors_name_the_file(tmp_path):
    path = tmp_path / "config.yaml"
    with pytest.raises(ConfigError, match="config.yaml: cannot be read"):
        load_config(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="config.yaml: cannot be read"):
        load_config(path)
    path.write_text("stage4: {}")
    with pytest.raises(ConfigError, match="config.yaml: unknown field stage4"):
        load_config(path)


# ---------------------------------------- one section


def test_a_section_is_read_alone(tmp_path):
    """Typed, with overrides on top, whatever the others say: their sizes may be those of a model that is not known."""
    path = tmp_path / "run.yaml"
    path.write_text("optimizer: {base_lr: 1e-3, betas: [0.8, 1]}\nstage1: {n_embed: 80}\nstage9: {}\n")
    found = load_section(path, ["optimizer.max_steps=7", "stage2.hparams.n_layers=2"], "optimizer", OptimizerConfig)
    assert found == OptimizerConfig(base_lr=1e-3, betas=(0.8, 1.0), max_steps=7)
    assert [type(beta) for beta in found.betas] == [float, float]
    hparams = load_section(path, ["stage2.hparams.n_layers=2"], "stage2", Stage2Config).hparams
    assert hparams == Stage2Hparams(n_layers=2)


@pytest.mark.parametrize("text", ["", "# nothing\n", "experiment: {epochs: 3}", "optimizer:", "optimizer: {}"])
def test_a_section_that_is_left_out_has_its_defaults(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert load_section(path, [], "optimizer", OptimizerConfig) == OptimizerConfig()


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("optimizer: {base_l: 1}", [], "unknown field optimizer.base_l; did you mean base_lr"),
        ("", ["optimizer.lr_base=1"], "unknown field optimizer.lr_base"),
        ("optimizer: {max_steps: many}", [], "optimizer.max_steps must be of type int, not 'many'"),
        ("optimizer: 3", [], "optimizer must be a mapping of fields, not 3"),
        ("optimizer: [base_lr]", [], "optimizer must be a mapping of fields, not \\['base_lr'\\]"),
        ("just text", [], "the file must be a mapping of fields, not 'just text'"),
        ("[optimizer]", [], "the file must be a mapping of fields, not \\['optimizer'\\]"),
        ("optimizer: [", [], "not valid YAML"),
        ("", ["optimizer.max_steps"], "not of the form section.key=value"),
    ],
)
def test_what_is_wrong_with_a_section_is_named_with_the_file(tmp_path, text, overrides, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    places = "|".join(map(re.escape, [str(path), *overrides]))
    with pytest.raises(ConfigError, match=f"^({places}): .*{message}"):
        load_section(path, overrides, "optimizer", OptimizerConfig)


def test_a_section_of_no_file(tmp_path):
    with pytest.raises(ConfigError, match="run.yaml: cannot be read"):
        load_section(tmp_path / "run.yaml", [], "optimizer", OptimizerConfig)


# ---------------------------------------- overrides


def test_overrides_apply_in_order(tmp_path):
    """On top of the file, also where it has no such section; values are YAML."""
    path = tmp_path / "config.yaml"
    path.write_text("optimizer: {base_lr: 3e-4}\nexperiment:\n")
    overrides = [
        "optimizer.base_lr=1e-3",
        "optimizer.base_lr=2e-3",
        "optimizer.betas=[0.8, 0.9]",
        "experiment.epochs=3",
        "stage2.hparams.attn_pdrop=0.1",
        "dataset.dataset=imagenet",
        " experiment.use_amp =false",
    ]
    config = load_config(path, overrides)
    assert (config.optimizer.base_lr, config.optimizer.betas) == (2e-3, (0.8, 0.9))
    assert (config.experiment.epochs, config.experiment.use_amp) == (3, False)
    assert (config.stage2.hparams.attn_pdrop, config.dataset.dataset) == (0.1, "imagenet")


@pytest.mark.parametrize(
    "text",
    [
        "ds #1",
        "2021",
        "on",
        "no",
        "my: photos",
        "[new] cats",
        "{00..03}.tar",
        "*.tar",
        "1e5",
        "&x",
        "a: b: c",
        "@home",
        "%",
    ],
)
def test_a_field_of_text_takes_what_is_typed(text):
    """YAML would read another thing in each of them, or nothing at all."""
    config = parse_config("{}", [f"data.train={text}", f"data.valid={text}"], FinetuneConfig)
    assert (config.data.train, config.data.valid) == (text, text)


def test_quotes_and_empty_values_of_text():
    config = parse_config("{}", ["data.train='null'", 'data.valid="a b"'], FinetuneConfig)
    assert (config.data.train, config.data.valid) == ("null", "a b")
    for empty in ("", " ", "null", "~"):
        assert parse_config("data: {valid: x}", [f"data.valid={empty}"], FinetuneConfig).data.valid is None
        with pytest.raises(ConfigError, match="^data.train needs a value; it cannot be empty or null"):
            parse_config("data: {train: x}", [f"data.train={empty}"], FinetuneConfig)


@pytest.mark.parametrize(("override", "field"), [("sharding.strategy=fsdp", "fsdp"), ("training.remat=none", "none")])
def test_words_of_a_choice_are_text(override, field):
    section, name = override.partition("=")[0].split(".")
    assert getattr(getattr(parse_config("{}", [override], FinetuneConfig), section), name) == field


def test_a_section_and_then_its_field():
    config = parse_config("{}", ["optimizer={base_lr: 1e-4}", "optimizer.weight_decay=0.5"], FinetuneConfig)
    assert (config.optimizer.base_lr, config.optimizer.weight_decay) == (1e-4, 0.5)


@pytest.mark.parametrize(
    ("override", "near"),
    [("optimizer.lr=1", "base_lr"), ("experiment.batch=3", "local_batch_size or total_batch_size or valid_batch_size"),
     ("training.every=1", "checkpoint_every_steps or validate_every_steps or sample_every_steps")],
)  # fmt: skip
def test_a_part_of_a_name_finds_it(override, near):
    with pytest.raises(ConfigError, match=f"did you mean {near}"):
        parse_config("{}", [override], FinetuneConfig)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.base_lr", "not of the form section.key=value"),
        ("=3", "not of the form section.key=value"),
        ("optimizer.lr=3", "unknown field optimizer.lr; did you mean"),
        ("optimizer.betas.first=3", "override 'optimizer.betas.first=3': 'betas' is not a section|must be a list"),
        ("optimizer=3", "optimizer must be a mapping"),
        ("experiment.epochs=ten", "experiment.epochs must be of type int, not 'ten'"),
        ("experiment.epochs=", "experiment.epochs must be of type int, not"),
        ("experiment.epochs=[", "not valid YAML"),
        ("optimizer.base_lr.x=3", "optimizer.base_lr"),
        ("..=3", "unknown field"),
    ],
)
def test_wrong_overrides_are_refused(override, message):
    """On the command line, where a typing error is likeliest."""
    with pytest.raises(ConfigError, match=message) as raised:
        parse_config("optimizer: {base_lr: 1e-4}", [override])
    assert "\n" not in str(raised.value)


CONFIGS = Path(__file__).parents[2] / "configs"


KINDS = {"vqgan-f16-16384": VqganTrainConfig, "vqgan": VqganTrainConfig, "clip": ClipTrainConfig}


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_file_of_configs_loads(path):
    """Networks and recipes, each with the command that takes it; each says at its top how it is used."""
    read = yaml.safe_load(path.read_text())
    is_recipe = "training" in read
    kind = KINDS.get(path.stem, FinetuneConfig if is_recipe else Config)
    files = {
        "clip": ["training.tokenizer=x"],
        "vqgan-f16-16384": ["training.vgg_weights=x", "training.lpips_weights=x"],
    }
    if path.parent == CONFIGS or path.stem in KINDS:
        load_config(path, files.get(path.stem, []), kind)
    elif is_recipe and read["training"]["init_from"] == "demo-scenes":  # leaves out what is as there
        load_config(path, (), kind, load_config(IN_PACKAGE["demo-scenes"] / "config.yaml"))
    else:  # what it leaves out of stage1 is as in the VQGAN beside it
        vqgan = load_config(path.with_name("vqgan.yaml"), (), VqganTrainConfig)
        load_config(path, ["training.vqgan=x"], kind, vqgan_model_config(vqgan.stage1))
    head = "".join(line for line in path.read_text().splitlines(True) if line.startswith("#"))
    wanted = ("command:", "hardware:", "measured:") if is_recipe else ("command:", "hardware:")
    assert [part for part in wanted if part not in head] == []


@pytest.mark.parametrize("name, n_classes, fid", [("clscond", 1000, "15.55"), ("uncond", None, "37.58")])
def test_the_transfers_are_the_originals(name, n_classes, fid):
    """The numbers of its recipes, and of its published results."""
    path = CONFIGS / f"transfer-imagenet-{name}.yaml"
    config = load_finetune_config(path)
    assert config.image_only and config.dataset.dataset == "imagenet" and f"FID-50K {fid}" in path.read_text()
    assert config.stage2.use_cls_cond == (n_classes is not None)
    assert config.stage2.hparams.n_classes == n_classes
    assert config.optimizer == OptimizerConfig(
        base_lr=1e-4, weight_decay=0.0, betas=(0.9, 0.95), grad_clip_norm=4.0, max_steps=0, min_lr=0.0
    )
    assert config.experiment == ExperimentConfig(
        local_batch_size=2, total_batch_size=512, epochs=8, save_ckpt_freq=2, use_amp=True
    )
    assert config.training == TrainingConfig(init_from="minDALL-E/1.3B")


@pytest.mark.parametrize("text", ["training: {init_from: ~/models/mine}", ""])
def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch, text):
    """In the file, in an override, where no shell expands it, and for the file itself."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    config = load_config("~/run.yaml", ["data.train=~/photos", "data.valid=~/a b"], FinetuneConfig)
    assert config.data.train == f"{tmp_path}/photos" and config.data.valid == f"{tmp_path}/a b"
    assert config.training.init_from == (f"{tmp_path}/models/mine" if text else FinetuneConfig().training.init_from)


def test_a_tilde_inside_stays():
    assert parse_config("dataset: {dataset: a~b}").dataset.dataset == "a~b"
    assert parse_config("dataset: {dataset: ~}").dataset.dataset is None  # YAML's null


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.trian=x", "data.trian=x: unknown field data.trian; did you mean train"),
        ("optimizer.max_steps=two", "optimizer.max_steps=two: optimizer.max_steps must be of type int, not 'two'"),
        ("stage3.x=1", "run.yaml: unknown field stage3"),
    ],
)
def test_an_override_is_not_blamed_on_the_file(tmp_path, override, message):
    (tmp_path / "run.yaml").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError) as raised:
        load_config(tmp_path / "run.yaml", ["data.valid=y", override], FinetuneConfig)
    assert message in str(raised.value) and str(raised.value).startswith((override, str(tmp_path)))
