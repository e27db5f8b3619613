"""cli/convert.py: the kind of SRC is found from the source, and what does not go with it is told in one sentence."""

import re

import numpy as np
import pytest
import safetensors.numpy
from clip_oracle import CONFIGS, write_vocab

from mindalle_jax.cli import main
from mindalle_jax.hub import resolve
from mindalle_jax.interop.clip import read_clip
from mindalle_jax.interop.clip_layouts import clip_slots
from mindalle_jax.interop.torch_archive import write_torch_archive


@pytest.fixture
def convert(capsys):
    """convert(*arguments) -> (exit code, stdout, what `mindalle convert` said is wrong)."""

    def run(*arguments):
        code = main(["convert", *map(str, arguments)])
        out, err = capsys.readouterr()
        said = re.findall("^mindalle convert: (.*)$", err, re.MULTILINE)
        assert len(said) == bool(code)
        return code, out, *said

    return run


@pytest.fixture
def vocabulary(tmp_path):
    """A folder with the tokenizer of the tiny CLIP models."""
    return write_vocab(tmp_path)


def write_torch(path, tensors):
    header = [(key, array.dtype, array.shape) for key, array in tensors.items()]
    write_torch_archive(path, header, tensors.__getitem__)


def test_a_clip_folder_is_known_by_its_config(convert, tmp_path, tiny_clip_folder):
    code, out = convert(tiny_clip_folder, tmp_path / "new", "--dtype", "float16")
    assert code == 0 and out.startswith(f"{tmp_path / 'new'}: CLIP with patches of")
    (dtype,) = {a.dtype for a in safetensors.numpy.load_file(tmp_path / "new" / "model.safetensors").values()}
    assert dtype == np.float16
    assert convert(tiny_clip_folder, tmp_path / "new")[0] == 6  # not replaced without --overwrite
    assert convert(tiny_clip_folder, tmp_path / "new", "--overwrite")[0] == 0
    assert read_clip(tmp_path / "new").config == read_clip(tiny_clip_folder).config


def test_a_clip_does_not_replace_a_model_of_another_kind(convert, tmp_path, tiny_folder, tiny_clip_folder):
    assert convert(tiny_folder, tmp_path / "model")[0] == 0
    code, _, said = convert(tiny_clip_folder, tmp_path / "model", "--overwrite")
    assert code == 6 and "holds none of preprocessor_config.json" in said
    assert (tmp_path / "model" / "manifest.json").is_file()


@pytest.mark.parametrize("key", ["visual.layer1.0.conv1.weight", "text_model.final_layer_norm.weight"])
def test_a_torch_file_is_known_by_its_keys(convert, tmp_path, key):
    """These get the message of the CLIP reader, and not that of a checkpoint without a VQGAN in it."""
    write_torch(tmp_path / "clip.pt", {key: np.zeros(1, np.float32)})
    code, _, said = convert(tmp_path / "clip.pt", tmp_path / "new")
    assert code == 4 and ("is a ResNet" in said or "has the keys of Hugging Face" in said)


def test_a_file_of_openai_takes_its_tokenizer_from_elsewhere(convert, tmp_path, vocabulary):
    """Only its keys and shapes count here: test_clip.py reads the numbers."""
    tensors = {slot.key: np.zeros(slot.shape, np.float32) for slot in clip_slots(CONFIGS["openai"], "openai")}
    write_torch(tmp_path / "clip.pt", tensors)
    code, _, said = convert(tmp_path / "clip.pt", tmp_path / "new")
    assert code == 4 and "has no tokenizer; name OpenAI's bpe_simple_vocab_16e6.txt.gz" in said
    code, out = convert(tmp_path / "clip.pt", tmp_path / "new", "--tokenizer", vocabulary)
    assert code == 0 and "CLIP with patches of" in out
    read_clip(tmp_path / "new")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--to", "torch"], "is a CLIP model, which is written in Hugging Face's format; leave out --to torch"),
        (["--config", "x.yaml"], "--config goes with a model of minDALL-E"),
        (["--download-from", "x.tar.gz"], "--download-from goes with a name to download"),
    ],
)
def test_what_does_not_go_with_a_clip(convert, tmp_path, tiny_clip_folder, options, said):
    code, _, message = convert(tiny_clip_folder, tmp_path / "new", *options)
    assert code == 2 and said in message and not (tmp_path / "new").exists()


@pytest.mark.parametrize("source", ["tiny_folder", "tiny_model_folder"])
def test_a_tokenizer_goes_with_a_clip_alone(convert, tmp_path, request, source):
    code, _, message = convert(request.getfixturevalue(source), tmp_path / "new", "--tokenizer", tmp_path)
    assert code == 2 and "--tokenizer goes with a CLIP model" in message
    code, _, message = convert("demo", tmp_path / "new", "--adapters", "x", "--tokenizer", tmp_path)
    assert code == 2 and "--adapters goes with --dtype and --overwrite alone" in message


def test_a_clip_of_the_hub(convert, tmp_path, tiny_clip_folder, monkeypatch):
    """The kind is told by the small files that are fetched first; then the weights are."""
    fetched = []

    def fetch(name, patterns, **_):
        fetched.append(patterns)
        return tiny_clip_folder

    monkeypatch.setattr(resolve, "fetch_repo", fetch)
    assert convert("somebody/clip", tmp_path / "new")[0] == 0
    assert "model.safetensors" not in fetched[0] and "model.safetensors" in fetched[1] and len(fetched) == 2
