"""hub/resolve.py: a name becomes the folder that holds the model, converted where it has to be."""

import os
import shutil
from pathlib import Path

import pytest

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
