"""cli/convert.py: the kind of SRC is found from the source, and what does not go with it is told in one sentence."""

import json
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from clip_oracle import CONFIGS, write_vocab
from commands import edit_checkpoint, message, python, tree

from mindalle_jax.cli import main
from mindalle_jax.hub import resolve
from mindalle_jax.interop.clip import read_clip
from mindalle_jax.interop.clip_layouts import clip_slots
from mindalle_jax.interop.torch_archive import write_torch_archive
from mindalle_jax.text.tokenizer import VOCAB_FILE


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
        (["--to", "torch"], "is a CLIP model, and is written in Hugging Face's format; leave out --to torch"),
        (["--config", "x.yaml"], "--config is only for models of minDALL-E"),
        (["--download-from", "x.tar.gz"], "--download-from works only with minDALL-E/1.3B"),
    ],
)
def test_what_does_not_go_with_a_clip(convert, tmp_path, tiny_clip_folder, options, said):
    code, _, message = convert(tiny_clip_folder, tmp_path / "new", *options)
    assert code == 2 and said in message and not (tmp_path / "new").exists()


@pytest.mark.parametrize("source", ["tiny_folder", "tiny_model_folder"])
def test_a_tokenizer_goes_with_a_clip_alone(convert, tmp_path, request, source):
    code, _, message = convert(request.getfixturevalue(source), tmp_path / "new", "--tokenizer", tmp_path)
    assert code == 2 and "--tokenizer is only for CLIP models" in message
    code, _, message = convert("demo", tmp_path / "new", "--adapters", "x", "--tokenizer", tmp_path)
    assert code == 2 and "--adapters works only with --dtype and --overwrite" in message


def test_a_clip_of_the_hub(convert, tmp_path, tiny_clip_folder, monkeypatch):
    """The kind is told by the small files that are fetched first; then the weights are."""
    fetched = []

    def fetch(name, patterns, **_):
        fetched.append(patterns)
        return tiny_clip_folder

    monkeypatch.setattr(resolve, "fetch_repo", fetch)
    assert convert("somebody/clip", tmp_path / "new")[0] == 0
    assert "model.safetensors" not in fetched[0] and "model.safetensors" in fetched[1] and len(fetched) == 2


# minDALL-E, from PyTorch and back


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


class Code:
    """Makes a folder named `ran` beside the checkpoint, when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path.with_name("ran")),)


def hide_code(path: Path, among_tensors: bool) -> None:
    """In the place of the tensors, or beside them, where Lightning puts its state."""
    edit_checkpoint(path, lambda t: t)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    code = pickle.dumps(Code(path), 2)[2:-1]  # without its header and its end
    tree = members["archive/data.pkl"]
    members["archive/data.pkl"] = (
        b"\x80\x02}X\x0a\0\0\0state_dict" + code + b"s."
        if among_tensors
        else tree[:-1] + b"X\x09\0\0\0callbacks" + code + b"s."
    )
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


STAGE2 = "stage2_last.ckpt"


DAMAGE = {
    "truncated": (lambda s: os.truncate(s / STAGE2, 50_000), 4, f"{STAGE2}: truncated or damaged"),
    "web page": (lambda s: (s / STAGE2).write_text("<!DOCTYPE html><p>Sign in"), 4, f"{STAGE2}: looks like a web page"),
    "empty": (lambda s: (s / STAGE2).write_bytes(b""), 4, f"{STAGE2}: is empty"),
    "flipped bit": (lambda s: flip_bit(s / STAGE2), 4, f"{STAGE2}: .*CRC does not match"),
    "wrong keys": (
        lambda s: edit_checkpoint(s / STAGE2, lambda t: {f"other.{k}": a for k, a in t.items()}),
        4,
        r"does not fit the stage2 of config.yaml, \d+ differences",
    ),
    "wrong shapes": (
        lambda s: edit_checkpoint(s / STAGE2, lambda t: t.update({"ln_f.bias": np.ones(31, np.float32)})),
        4,
        "1 differences:\n  shape       ln_f.bias is .31., the config says .32.",
    ),
    "other stage": (
        lambda s: shutil.copyfile(s / "stage1_last.ckpt", s / STAGE2), 4, r"\(this is a checkpoint of stage1\)"
    ),
    "NaN weights": (
        lambda s: edit_checkpoint(s / STAGE2, lambda t: t["ln_f.bias"].fill(np.nan)), 4, "ln_f.bias holds NaN"
    ),
    "pickled code": (lambda s: hide_code(s / STAGE2, True), 4, f"{STAGE2}: holds .* where a dict of tensors should be"),
    "no tokenizer": (lambda s: shutil.rmtree(s / "tokenizer"), 4, f"{VOCAB_FILE}: missing; the folder needs"),
    "vocabulary too large": (
        lambda s: (s / "tokenizer" / VOCAB_FILE).write_text(json.dumps({f"t{i}": i for i in range(111)})),
        4,
        "has ids up to 110, but the text embedding has 110 rows",
    ),
    "unknown field": (
        lambda s: (s / "config.yaml").write_text("stage2: {hparams: {n_layer: 2}}"),
        3,
        "unknown field stage2.hparams.n_layer; did you mean n_layers",
    ),
    "no config": (lambda s: (s / "config.yaml").unlink(), 3, "config.yaml: missing; put it beside the weights"),
    "no source": (lambda s: shutil.rmtree(s), 4, "source: no such file or folder"),
    "one stage": (lambda s: (s / STAGE2).unlink(), 4, f"{STAGE2} missing; the folder needs both stages"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_source_is_told_and_leaves_nothing(mindalle_cli, tmp_path, tiny_folder, damage):
    change, code, text = DAMAGE[damage]
    source = Path(shutil.copytree(tiny_folder, tmp_path / "source"))
    change(source)
    before = tree(tmp_path)
    got, stdout, err = mindalle_cli("convert", source, tmp_path / "deep" / "target")
    assert (got, stdout) == (code, "")
    (start,) = re.finditer("^mindalle convert: ", err, re.MULTILINE)  # after the progress, where there was some
    told = err[start.start() :]
    assert re.search(text, told) and str(source) in told
    assert told.count("\n") == 1 or "differences" in told.splitlines()[0]
    assert tree(tmp_path) == before, "something was left behind, or code in the file was run"


def test_code_beside_the_weights_is_ignored(mindalle_cli, tmp_path, tiny_folder):
    """pickle.load would run it; that is what the file is made for."""
    source = Path(shutil.copytree(tiny_folder, tmp_path / "source"))
    hide_code(source / STAGE2, False)
    assert mindalle_cli("convert", source, tmp_path / "a")[0] == 0
    assert not (source / "ran").exists()
    with zipfile.ZipFile(source / STAGE2) as archive, archive.open("archive/data.pkl") as file:
        Naive(file).load()
    assert (source / "ran").exists(), "the file is harmless, and this test proves nothing"


class Naive(pickle.Unpickler):
    """Does what it is told, but for tensors."""

    def persistent_load(self, _):
        return None

    def find_class(self, module, name):
        return (lambda *_: None) if module.startswith("torch") else super().find_class(module, name)


def test_convert_and_back(mindalle_cli, tmp_path, tiny_folder):
    code, stdout, err = mindalle_cli("convert", tiny_folder, tmp_path / "a")
    assert code == 0 and stdout.startswith(f"{tmp_path / 'a'}: ") and stdout.count("\n") == 1
    assert "converting: 100%" in err and "verifying: 100%" in err
    assert mindalle_cli("convert", tmp_path / "a", tmp_path / "b", "--to", "torch")[0] == 0
    assert mindalle_cli("convert", tmp_path / "b", tmp_path / "c")[0] == 0
    assert (tmp_path / "a" / "stage2.safetensors").read_bytes() == (tmp_path / "c" / "stage2.safetensors").read_bytes()


def test_convert_takes_the_config_from_elsewhere(mindalle_cli, tmp_path, tiny_folder):
    shutil.copyfile(tiny_folder / "stage1_last.ckpt", tmp_path / "vqgan.ckpt")
    assert mindalle_cli("convert", tmp_path / "vqgan.ckpt", tmp_path / "a")[0] == 4  # not the published VQGAN
    arguments = ["convert", tmp_path / "vqgan.ckpt", tmp_path / "a", "--config", tiny_folder / "config.yaml"]
    assert mindalle_cli(*arguments)[0] == 0


def test_convert_to_a_place_that_is_taken(mindalle_cli, tmp_path, tiny_folder, tiny_model_folder):
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "thesis.txt").write_text("mine")
    shutil.copytree(tiny_model_folder, tmp_path / "model")
    before = tree(tmp_path)
    code, _, err = mindalle_cli("convert", tiny_folder, tmp_path / "model")
    assert code == 6 and message(err, "convert").endswith(
        "exists already; name another folder or pass --overwrite to replace it"
    )
    code, _, err = mindalle_cli("convert", tiny_folder, tmp_path / "documents", "--overwrite")
    assert code == 6 and "--overwrite does not replace it" in message(err, "convert")
    assert tree(tmp_path) == before
    assert mindalle_cli("convert", tiny_folder, tmp_path / "model", "--overwrite")[0] == 0


def test_the_target_is_looked_at_before_anything_is_downloaded(mindalle_cli, tmp_path, monkeypatch):
    from mindalle_jax.hub import download

    monkeypatch.setattr(download, "fetch_release", lambda *_, **__: pytest.fail("5 GB were downloaded"))
    code, _, err = mindalle_cli("convert", "minDALL-E/1.3B", tmp_path)
    assert code == 6 and "exists already" in message(err, "convert")


def test_a_download_that_fails_is_told(mindalle_cli, tmp_path):
    arguments = ["convert", "minDALL-E/1.3B", tmp_path / "a", "--download-from", tmp_path / "missing.tar.gz"]
    code, _, err = mindalle_cli(*arguments)
    assert code == 5 and "missing.tar.gz': no such file" in message(err, "convert")
    assert not (tmp_path / "a").exists()


def test_download_from_goes_with_a_name(mindalle_cli, tmp_path, tiny_folder):
    code, _, err = mindalle_cli("convert", tiny_folder, tmp_path / "a", "--download-from", "x.tar.gz")
    assert code == 2 and "--download-from works only with minDALL-E/1.3B as the source" in message(err, "convert")


def test_the_conversion_script_does_the_same(tmp_path, tiny_folder, tiny_model_folder):
    done = python("-m", "convert.mindalle", tiny_folder, tmp_path / "a")
    assert done.returncode == 0 and done.stdout.startswith(f"{tmp_path / 'a'}: ")
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (tmp_path / "a", tiny_model_folder)]
    assert manifests[0] | {"caption_dropout": 0.1} == manifests[1]  # the original's training has none
    assert manifests[0]["caption_dropout"] == 0
