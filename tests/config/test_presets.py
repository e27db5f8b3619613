"""Presets: found by name, in a checkout and in an installed package; the first line says what each is for."""

import shutil

import pytest
from commands import ROOT

import mindalle_jax
from mindalle_jax.config.file import ConfigFile, load_config, load_section
from mindalle_jax.config.presets import first_line, preset_files
from mindalle_jax.config.schema import ExperimentConfig, Stage2Config
from mindalle_jax.errors import ConfigError


def test_every_yaml_file_of_configs_is_a_preset():
    files = sorted((ROOT / "configs").rglob("*.yaml"))
    assert sorted(preset_files().values()) == files and len(files) > 10
    assert {"finetune-captions", "emoji/vqgan", "scenes/clip"} <= set(preset_files())


@pytest.mark.parametrize("name", preset_files())
def test_the_first_line_of_a_preset_is_a_sentence(name):
    line = first_line(preset_files()[name])
    assert 20 <= len(line) <= 90 and line.endswith(".") and line[0].isupper()


@pytest.mark.parametrize("folder", ["configs", "p/configs"], ids=["beside the package", "inside"])
def test_presets_lie_beside_the_package_or_inside_it(tmp_path, monkeypatch, folder):
    (tmp_path / "p").mkdir()
    shutil.copytree(ROOT / "configs", tmp_path / folder)
    monkeypatch.setattr(mindalle_jax, "__file__", str(tmp_path / "p" / "__init__.py"))
    assert preset_files()["emoji/clip"] == tmp_path / folder / "emoji" / "clip.yaml"


def test_a_name_is_read_like_the_file():
    by_name, by_path = ConfigFile("finetune-captions"), ConfigFile(ROOT / "configs" / "finetune-captions.yaml")
    for section, kind in (("experiment", ExperimentConfig), ("stage2", Stage2Config)):
        assert by_name.section(section, kind) == by_path.section(section, kind)
    assert load_section("finetune-captions", ["experiment.epochs=3"], "experiment", ExperimentConfig).epochs == 3


def test_a_file_goes_before_a_preset_and_a_folder_does_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()  # a run of that name, as people have them
    assert load_config("tiny").stage2.hparams.n_layers == 3
    (tmp_path / "tiny").rmdir()
    (tmp_path / "tiny").write_text("stage2: {hparams: {n_layers: 5}}")
    assert load_config("tiny").stage2.hparams.n_layers == 5


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("finetune-captoins", "no such file; did you mean finetune-captions?"),
        ("configs/finetune-captions.yaml", "no such file; did you mean finetune-captions?"),
        ("scenes/vqgn", "no such file; did you mean scenes/vqgan?"),
        ("nonsense", "no such file and no preset; mindalle configs lists them"),
        ("nowhere/zzz.yaml", "no such file"),
        ("emoji", "a folder; did you mean emoji/clip?"),
    ],
)
def test_a_name_with_a_slip_gets_the_nearest(tmp_path, monkeypatch, name, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "emoji").mkdir()
    with pytest.raises(ConfigError) as caught:
        load_config(name)
    assert str(caught.value) == f"{name}: cannot be read: {text}"


def test_a_file_of_a_model_that_is_missing_gets_no_hint(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: no such file$"):
        load_config(tmp_path / "config.yaml")
