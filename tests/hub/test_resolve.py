"""hub/resolve.py: a name becomes the folder that holds the model, converted where it has to be."""

import os
import shutil
from pathlib import Path

import pytest

from mindalle_jax.errors import CheckpointError, DownloadError, UsageError
from mindalle_jax.hub import resolve
from mindalle_jax.interop.mindalle import import_checkpoint
from mindalle_jax.interop.torch_archive import TorchArchive, write_torch_archive
from mindalle_jax.text.tokenizer import VOCAB_FILE


@pytest.mark.parametrize("changed", ["config.yaml", f"tokenizer/{VOCAB_FILE}", "stage2_last.ckpt"])
def test_a_source_that_changed_is_converted_again(tmp_path, tiny_folder, changed):
    """Changes of the tokenizer once went unseen."""
    source = Path(shutil.copytree(tiny_folder, tmp_path / "source"))
    first = resolve.find_model(source)
    assert resolve.find_model(source) == first
    os.utime(source / changed, ns=(0, 0))
    assert resolve.find_model(source) != first


def test_a_source_file_that_changed_is_converted_again(tmp_path, tiny_igpt_config, write_folder):
    """A transfer checkpoint given as a file once had no time stamp at all."""
    write_folder(tmp_path, tiny_igpt_config)
    both = {}
    for stage in ("stage1", "stage2"):
        with TorchArchive(tmp_path / f"{stage}_last.ckpt") as archive:
            both |= {f"{stage}.{key}": archive.read(ref) for key, ref in archive.state_dict().items()}
    path = tmp_path / "both.ckpt"
    write_torch_archive(path, [(key, a.dtype, a.shape) for key, a in both.items()], both.__getitem__)
    first = resolve.find_model(path)
    (tmp_path / "unrelated.txt").write_text("x")
    assert resolve.find_model(path) == first
    os.utime(path, ns=(0, 0))
    assert resolve.find_model(path) != first


def test_another_process_may_convert_first(tmp_path, tiny_folder, monkeypatch):
    source = Path(shutil.copytree(tiny_folder, tmp_path / "source"))

    def slower(source, target):
        import_checkpoint(source, target)  # the other process
        return import_checkpoint(source, target)

    monkeypatch.setattr(resolve, "import_checkpoint", slower)
    assert (resolve.find_model(source) / "manifest.json").is_file()


@pytest.mark.parametrize("name", resolve.CLIP_NAMES)
def test_names_of_openai_are_repositories(monkeypatch, tmp_path, name):
    """`ViT-B/32` looks like a repository itself."""
    asked = []

    def fetch(repo: str, *_, **__) -> Path:
        asked.append(repo)
        (tmp_path / "model.safetensors").touch()
        return tmp_path

    monkeypatch.setattr(resolve, "fetch_repo", fetch)
    assert resolve.find_clip(name) == resolve.find_source(name) == tmp_path
    assert set(asked) == {resolve.CLIP_NAMES[name]} and asked[0].startswith("openai/clip-vit-")


def test_an_unfinished_run_is_called_that(tmp_path):
    """It was said to lack the checkpoints of the original."""
    (tmp_path / "run.yaml").touch()
    with pytest.raises(
        CheckpointError, match="a training run that is not complete; the command that started it resumes it"
    ):
        resolve.find_model(tmp_path)


def test_a_folder_that_hides_the_model_of_the_package_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    with pytest.raises(CheckpointError, match="this folder hides the model of that name in the package"):
        resolve.find_model("demo")


@pytest.mark.parametrize("name", ["", None, 3])
def test_what_names_no_model_is_refused(name):
    with pytest.raises(UsageError, match="a model is named by a path or a name, not"):
        resolve.find_model(name)


def test_a_home_folder_of_nobody_is_a_path(tmp_path, monkeypatch):
    """pathlib raises RuntimeError for it."""
    with pytest.raises(CheckpointError, match="~nobodyx/x: no such folder"):
        resolve.find_model("~nobodyx/x")


@pytest.mark.parametrize("name", resolve.RESNETS)
def test_resnets_are_refused_by_name(name):
    with pytest.raises(CheckpointError, match=f"^{name} is a ResNet, which is not supported; take one of ViT-B/32"):
        resolve.find_clip(name)


@pytest.mark.parametrize(
    ("find", "name", "near"),
    [
        (resolve.find_clip, "likelyhood", "likelihood"),
        (resolve.find_clip, "ViT-B32", "ViT-B/32"),
        (resolve.find_clip, "none", "off"),
        (resolve.find_clip, "vit-l/14", "ViT-L/14"),
        (resolve.find_clip, "openai/clip-vit-base-patch23", "openai/clip-vit-base-patch32"),
        (resolve.find_model, "dmeo", "demo"),
        (resolve.find_model, "demo_scenes", "demo-scenes"),
        (resolve.find_model, "mindall-e/1.3b", "minDALL-E/1.3B"),
    ],
)
def test_a_misspelt_name_gets_the_nearest(find, name, near):
    with pytest.raises((CheckpointError, DownloadError)) as error:
        find(name, local_files_only=True)
    assert str(error.value).endswith(f"; did you mean {near}?")


def test_a_name_that_is_near_none_gets_no_hint():
    for find in (resolve.find_clip, resolve.find_model):
        with pytest.raises(DownloadError) as error:
            find("somebody/something", local_files_only=True)
        assert "did you mean" not in str(error.value)


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch, tiny_model_folder, tiny_clip_folder):
    monkeypatch.setenv("HOME", str(tiny_model_folder.parent))
    assert resolve.find_model(f"~/{tiny_model_folder.name}") == tiny_model_folder
    assert resolve.find_source(f"~/{tiny_model_folder.name}") == tiny_model_folder
    monkeypatch.setenv("HOME", str(tiny_clip_folder.parent))
    assert resolve.find_clip("~/tiny-clip") == tiny_clip_folder
