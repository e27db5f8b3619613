"""interop/clip.py: every format gives the same weights, and files that do not fit are refused with a reason.

That the weights of a folder give the features of transformers' CLIPModel is tested in tests/models/test_clip.py; so
here it is enough that other formats give the very same weights. The oracle of OpenAI's layout is a torch module.
"""

import errno
import gzip
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import clip_oracle
import flax.serialization
import flax.traverse_util
import ml_dtypes
import msgpack
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from mindalle_jax.errors import CheckpointError, OutputError, UsageError
from mindalle_jax.interop import clip
from mindalle_jax.interop.clip import convert_clip, read_clip, write_clip
from mindalle_jax.interop.clip_layouts import clip_slots
from mindalle_jax.interop.torch_archive import write_torch_archive
from mindalle_jax.models.clip import PIXEL_MEAN, PIXEL_STD, ClipConfig
from mindalle_jax.text import clip_tokenizer

VOCAB_SIZE = clip_oracle.VOCAB_SIZE

TEXTS = [
    "",
    "the cat and the dog",
    "  The CAT\tand\n\nthe   DoG  ",
    "a cat's dog, isn't it? They'll we've I'm he'd you're 'S",
    "Hello, world!!! (well...) #1 $5.00 50% a_b-c/d\\e",
    "2021 12345 3.14159 1st ½ ² Ⅷ",
    "café CAFÉ cafe\u0301 naïve Ünïcödé ß İ ǅ",
    "猫と犬 кошка и собака القط والكلب बिल्ली",
    "😀 👩‍👩‍👧 🇫🇷 cat😀dog ✨",
    "\u00a0no\u2003break\u200bspace\ufeff",
    "<|startoftext|>the cat<|endoftext|> and <|endoftext|>",
    "<|STARTOFTEXT|> < |startoftext| > <html>&amp;&lt;",
    "thethecatcat andand d",
    "x" * 300,
]
TEXTS = [clip_tokenizer.clean_text(text) for text in TEXTS]  # as they come to a tokenizer


@pytest.fixture(scope="session")
def torch():
    return pytest.importorskip("torch", reason="the oracle is torch, pinned for Python 3.11 only")


@pytest.fixture(scope="session", params=clip_oracle.CONFIGS)
def model(request, tmp_path_factory):
    return clip_oracle.random_model(request.param, tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """The model "quick-gelu"."""
    return clip_oracle.random_model("quick-gelu", tmp_path_factory.mktemp("clip"))


@pytest.fixture
def folder(small, tmp_path):
    """A folder of Hugging Face with the model "quick-gelu", to be changed."""
    write_clip(tmp_path / "clip", small)
    return tmp_path / "clip"


@pytest.fixture(scope="session")
def openai(torch):
    """A module in the layout of OpenAI."""
    return clip_oracle.openai_model(clip_oracle.CONFIGS["openai"])


@pytest.fixture(scope="session")
def vocab_folder(tmp_path_factory):
    return clip_oracle.write_vocab(tmp_path_factory.mktemp("vocab"))


def leaves(params) -> dict[str, np.ndarray]:
    return flax.traverse_util.flatten_dict(params, sep="/")


def assert_same(params, expected) -> None:
    params, expected = leaves(params), leaves(expected)
    assert params.keys() == expected.keys()
    for path, array in params.items():
        assert array.dtype == np.float32 and array.flags.c_contiguous, path
        assert array.shape == expected[path].shape, path
        assert array.tobytes() == expected[path].tobytes(), path


def state_of(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of model.safetensors, which is taken away, and the buffers that early files have among them."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    positions = {"text_model": 16, "vision_model": 17}
    buffers = {f"{tower}.embeddings.position_ids": np.arange(n)[None] for tower, n in positions.items()}
    return state | buffers


# Formats


def test_what_is_written_is_read(model, tmp_path):
    write_clip(tmp_path / "clip", model)
    read = read_clip(tmp_path / "clip")
    assert read.config == model.config
    assert_same(read.params, model.params)
    assert read.tokenizer.to_str() == model.tokenizer.to_str()


@pytest.mark.parametrize(("dtype", "stored"), [("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)])
def test_a_folder_of_half_the_size_has_the_rounded_weights(small, folder, tmp_path, dtype, stored):
    """Each as the dtype has it, in the order of its axes; they are float32 again when they are read."""
    write_clip(tmp_path / "half", small, dtype=dtype)
    whole, half = load_file(folder / "model.safetensors"), load_file(tmp_path / "half" / "model.safetensors")
    assert whole.keys() == half.keys()
    for key, array in half.items():
        assert array.dtype == stored, key
        np.testing.assert_array_equal(array, whole[key].astype(stored), err_msg=key)
    expected = {path: leaf.astype(stored).astype(np.float32) for path, leaf in leaves(small.params).items()}
    assert_same(read_clip(tmp_path / "half").params, clip.nest(expected))


def test_transformers_loads_a_folder_in_float16(torch, small, tmp_path):
    """As float32 it has the rounded weights, bit by bit; left to itself it keeps to what config.json says, float16."""
    from transformers import CLIPModel

    write_clip(tmp_path / "half", small, dtype="float16")
    theirs, report = CLIPModel.from_pretrained(tmp_path / "half", dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    found = theirs.state_dict()
    for key, array in load_file(tmp_path / "half" / "model.safetensors").items():
        np.testing.assert_array_equal(found[key].numpy(), array.astype(np.float32), err_msg=key)
    assert CLIPModel.from_pretrained(tmp_path / "half").dtype == torch.float16


def test_weights_in_no_known_dtype(small, tmp_path):
    with pytest.raises(UsageError, match="the dtype of weights must be one of float32, .*not 'int8'"):
        write_clip(tmp_path / "clip", small, dtype="int8")
    assert not (tmp_path / "clip").exists()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("name", ["model.safetensors", "flax_model.msgpack", "pytorch_model.bin"])
def test_every_file_of_a_folder_gives_the_same_weights(small, folder, name, dtype):
    state = state_of(folder)
    if name == "flax_model.msgpack":
        tree = clip.nest({path: array.astype(dtype) for path, array in leaves(small.params).items()})
        (folder / name).write_bytes(flax.serialization.msgpack_serialize(tree))
    else:
        state = {key: array.astype(dtype) if array.dtype.kind == "f" else array for key, array in state.items()}
        if name == "model.safetensors":
            save_file(state, folder / name)
        else:
            specs = [(key, array.dtype, array.shape) for key, array in state.items()]
            write_torch_archive(folder / name, specs, state.__getitem__)
    rounded = {path: array.astype(dtype).astype(np.float32) for path, array in leaves(small.params).items()}
    assert_same(read_clip(folder).params, clip.nest(rounded))


@pytest.mark.parametrize("is_zip", [True, False])
def test_files_that_torch_saves_give_the_same_weights(torch, small, folder, is_zip):
    state = {key: torch.from_numpy(array) for key, array in state_of(folder).items()}
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=is_zip)
    assert_same(read_clip(folder).params, small.params)


def test_the_names_of_the_parameters_are_those_of_flax_clip(small):
    """A sample written out; CLIPModel checks the PyTorch names when it loads what we write."""
    paths = leaves(small.params).keys()
    assert paths >= {
        "logit_scale",
        "text_projection/kernel",
        "text_model/embeddings/token_embedding/embedding",
        "text_model/encoder/layers/0/self_attn/q_proj/kernel",
        "text_model/final_layer_norm/scale",
        "vision_model/embeddings/class_embedding",
        "vision_model/embeddings/patch_embedding/kernel",
        "vision_model/encoder/layers/2/mlp/fc2/bias",
        "vision_model/pre_layrnorm/bias",
    }


def test_the_first_file_of_weights_counts(small, folder):
    (folder / "flax_model.msgpack").write_bytes(b"not looked at")
    (folder / "pytorch_model.bin").write_bytes(b"not looked at")
    assert_same(read_clip(folder).params, small.params)


def test_a_state_dict_of_openai_gives_the_features_of_openai(torch, openai, vocab_folder, tmp_path):
    torch.save(openai.state_dict(), tmp_path / "ViT.pt")
    model = read_clip(tmp_path / "ViT.pt", vocab_folder)
    assert model.config == clip_oracle.CONFIGS["openai"]
    theirs = clip_oracle.openai_features(openai, model.config)
    for ours, other in zip(clip_oracle.features(model), theirs, strict=True):
        assert ours.std() > 0.5
        np.testing.assert_allclose(ours, other, rtol=0, atol=1e-4)  # seen: 3e-6


@pytest.mark.parametrize("is_traced", [True, False])
def test_a_torchscript_archive_is_its_state_dict(torch, openai, vocab_folder, tmp_path, is_traced):
    """Both in float16, as OpenAI published them."""
    torch.save({key: tensor.half() for key, tensor in openai.state_dict().items()}, tmp_path / "state.pt")
    clip_oracle.save_script(clip_oracle.CONFIGS["openai"], tmp_path / "script.pt", is_traced)
    expected = read_clip(tmp_path / "state.pt", vocab_folder)
    script = read_clip(tmp_path / "script.pt", vocab_folder)
    assert script.config == expected.config
    assert_same(script.params, expected.params)


def test_transformers_loads_what_is_written(torch, model, tmp_path, caplog):
    """Weights, tokenizer and image processor, without a word of warning."""
    from PIL import Image
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel
    from transformers.utils import logging as transformers_logging

    write_clip(tmp_path / "clip", model)
    transformers_logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            theirs, report = CLIPModel.from_pretrained(tmp_path / "clip", output_loading_info=True)
            tokenizer = AutoTokenizer.from_pretrained(tmp_path / "clip")
            processor = CLIPImageProcessor.from_pretrained(tmp_path / "clip")
    finally:
        transformers_logging.disable_propagation()
    # That torchvision is not installed is no fault of the folder.
    assert not [message for message in caplog.messages if "torchvision" not in message]
    assert not any(report.values()), report
    expected = clip_oracle.transformers_model(model.config, load_file(tmp_path / "clip" / "model.safetensors"))
    pairs = [clip_oracle.transformers_features(each, model.config) for each in (theirs.eval(), expected)]
    for loaded, other in zip(*pairs, strict=True):
        np.testing.assert_array_equal(loaded, other)
    assert tokenizer(TEXTS)["input_ids"] == [encoding.ids for encoding in model.tokenizer.encode_batch(TEXTS)]
    size = model.config.vision.image_size
    pixels = processor(Image.new("RGB", (50, 40), (255, 0, 0)), return_tensors="np")["pixel_values"]
    assert pixels.shape == (1, 3, size, size)
    red = (np.array([1, 0, 0]) - PIXEL_MEAN) / PIXEL_STD
    np.testing.assert_allclose(pixels[0, :, size // 2, size // 2], red, atol=1e-5)


# Files that do not fit


def change_config(folder: Path, section: str | None = None, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    (config if section is None else config[section]).update(fields)
    (folder / "config.json").write_text(json.dumps(config))


def change_tokenizer(folder: Path, **fields) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_state(folder: Path, **changes) -> None:
    """Dots are spelt `__`; None takes a tensor away."""
    state = load_file(folder / "model.safetensors") | {key.replace("__", "."): a for key, a in changes.items()}
    save_file({key: array for key, array in state.items() if array is not None}, folder / "model.safetensors")


def write_flax(folder: Path, content: bytes | dict) -> None:
    (folder / "model.safetensors").unlink()
    data = content if isinstance(content, bytes) else flax.serialization.msgpack_serialize(content)
    (folder / "flax_model.msgpack").write_bytes(data)


def array_bytes(shape: list, dtype: bytes, data: bytes) -> bytes:
    """A map whose one value is an array as flax writes it, with any shape, dtype and bytes."""
    return msgpack.packb({"w": msgpack.ExtType(1, msgpack.packb((shape, dtype, data)))})


BAD_FOLDERS = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: missing; .* not a CLIP model of Hugging Face"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: cannot be read: Expecting"),
    "config too deep": (lambda f: (f / "config.json").write_text("[" * 100_000), "cannot be read: maximum"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds no weights; it needs one of model.safetensors"),
    "half a file": (
        lambda f: os.truncate(f / "model.safetensors", 20_000),
        "model.safetensors: truncated or damaged",
    ),
    "a pickle": (
        lambda f: ((f / "model.safetensors").unlink(), (f / "pytorch_model.bin").write_bytes(b"cos\nsystem\n.")),
        "pytorch_model.bin: is not a torch checkpoint",
    ),
    "missing tensor": (
        lambda f: change_state(f, logit_scale=None),
        r"does not fit config.json, 1 differences:\n  missing     logit_scale \[\]$",
    ),
    "unexpected tensor": (lambda f: change_state(f, extra=np.zeros(2, "f4")), r"unexpected  extra \[2\]$"),
    "all differences at once": (
        lambda f: change_state(f, logit_scale=None, extra=np.zeros(2, "f4"), text_projection__weight=np.zeros(2, "f4")),
        r"3 differences:\n.*missing .*\n.*unexpected .*\n  shape       text_projection.weight is \[2\], the config",
    ),
    "more layers than the config": (
        lambda f: change_config(f, "text_config", num_hidden_layers=1),
        r"16 differences:\n  unexpected  text_model.encoder.layers.1",
    ),
    "projections of two sizes": (
        lambda f: change_state(f, visual_projection__weight=np.zeros((23, 40), "f4")),
        r"1 differences:\n  shape       visual_projection.weight is \[23, 40\], the config says \[24, 40\]$",
    ),
    "projection of another size than the config": (
        lambda f: change_config(f, projection_dim=32),
        r"2 differences:\n  shape       text_projection.weight is \[24, 48\], the config says \[32, 48\]",
    ),
    "unprintable key": (lambda f: change_state(f, **{"a\nb": np.zeros(1, "f4")}), r"unexpected  'a\\nb' \[1\]$"),
    "NaN": (lambda f: change_state(f, logit_scale=np.full((), np.nan, "f4")), "logit_scale holds NaN or infinite"),
    "inf": (lambda f: change_state(f, logit_scale=np.full((), np.inf, "f2")), "logit_scale holds NaN or infinite"),
    "integers": (lambda f: change_state(f, logit_scale=np.full((), 1, "i4")), "logit_scale is I32; BF16, F16, F32 and"),
    "float8": (
        lambda f: change_state(f, logit_scale=np.ones((), ml_dtypes.float8_e4m3fn)),
        "logit_scale is F8_E4M3; BF16, F16, F32 and F64 are read",
    ),
    "empty msgpack": (lambda f: write_flax(f, b""), "flax_model.msgpack: not a Flax checkpoint"),
    "msgpack of a number": (lambda f: write_flax(f, b"\x07"), "not a Flax checkpoint: AssertionError"),
    "msgpack with a tail": (lambda f: write_flax(f, b"\x80\x80"), "not a Flax checkpoint: ExtraData"),
    "half a msgpack": (lambda f: write_flax(f, b"\x81\xa1w"), "not a Flax checkpoint: ValueError"),
    "deep msgpack": (lambda f: write_flax(f, b"\x81\xa1w" * 990 + b"\x80"), "not a Flax checkpoint: RecursionError"),
    "deeper msgpack": (lambda f: write_flax(f, b"\x81\xa1w" * 9_000 + b"\x80"), "not a Flax checkpoint: StackError"),
    "number as a key": (lambda f: write_flax(f, b"\x81\x01\x81\x01\x01"), "not a Flax checkpoint: TypeError"),
    "objects": (lambda f: write_flax(f, array_bytes([1], b"O", bytes(8))), "not a Flax checkpoint: ValueError"),
    "sizes that overflow": (lambda f: write_flax(f, array_bytes([1 << 62, 4], b"f4", b"")), "not a Flax checkpoint"),
    "unknown dtype": (lambda f: write_flax(f, array_bytes([1], b"evil", bytes(8))), "not a Flax checkpoint: TypeError"),
    "list of 4 billion": (lambda f: write_flax(f, b"\x81\xa1w\xdd\xff\xff\xff\xff"), "not a Flax checkpoint: ValueE"),
    "text in msgpack": (lambda f: write_flax(f, {"w": "text"}), "'w' is a str, not an array"),
    "unknown extension": (lambda f: write_flax(f, msgpack.packb({"w": msgpack.ExtType(9, b"")})), "'w' is a ExtType"),
    "bad chunks": (lambda f: write_flax(f, msgpack.packb({"w": {"__msgpack_chunked_array__": 1}})), "KeyError"),
    "flax of another model": (lambda f: write_flax(f, {"w": np.ones(2, "f4")}), r"config.json, 95 differences:"),
    "no tokenizer": (
        lambda f: (f / "tokenizer.json").unlink(),
        "holds no tokenizer: neither tokenizer.json nor vocab.json with merges.txt; name a folder that has one",
    ),
    "vocabulary without merges": (
        lambda f: (clip_oracle.write_vocab(f), (f / "tokenizer.json").unlink(), (f / "merges.txt").unlink()),
        "holds no tokenizer",
    ),
    "damaged tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "the tokenizer cannot be read"),
    "damaged vocabulary": (
        lambda f: (clip_oracle.write_vocab(f), (f / "tokenizer.json").unlink(), (f / "vocab.json").write_text("[]")),
        "the tokenizer cannot be read",
    ),
    "vocabulary without an end token": (
        lambda f: (
            clip_oracle.write_vocab(f),
            (f / "tokenizer.json").unlink(),
            (f / "vocab.json").write_text((f / "vocab.json").read_text().replace("<|endoftext|>", "[END]")),
        ),
        r"the tokenizer cannot be read: it has no <\|endoftext\|>",
    ),
    "merges of another vocabulary": (
        lambda f: (
            clip_oracle.write_vocab(f),
            (f / "tokenizer.json").unlink(),
            (f / "merges.txt").write_text("x yz\n"),
        ),
        "the tokenizer cannot be read: ",
    ),
    "vocabulary larger than the table": (
        lambda f: change_config(f, "text_config", vocab_size=VOCAB_SIZE - 1, eos_token_id=2),
        f"has ids up to {VOCAB_SIZE - 1}, but the token embedding has {VOCAB_SIZE - 1} rows",
    ),
    "start token out of the table": (
        lambda f: change_tokenizer(
            f,
            post_processor={
                "type": "RobertaProcessing",
                "sep": ["<|endoftext|>", VOCAB_SIZE - 1],
                "cls": ["<|startoftext|>", VOCAB_SIZE],
                "trim_offsets": False,
                "add_prefix_space": False,
            },
        ),
        f"has ids up to {VOCAB_SIZE}, but the token embedding has {VOCAB_SIZE} rows",
    ),
    "another end token": (
        lambda f: change_config(f, "text_config", eos_token_id=7),
        rf"ends texts with id {VOCAB_SIZE - 1}, but the network looks for 7 \(eos_token_id 7\)",
    ),
    "no end token": (
        lambda f: change_tokenizer(f, post_processor=None),
        "does not put a start and an end token around a text",
    ),
    "tokenizer that makes its library panic": (
        lambda f: change_tokenizer(
            f,
            post_processor={
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "x", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            },
        ),
        "the tokenizer cannot be read: no entry found for key",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_folders_that_do_not_fit_are_refused_with_a_reason(case, folder):
    change, reason = BAD_FOLDERS[case]
    change(folder)
    with pytest.raises(CheckpointError, match=reason) as caught:
        read_clip(folder)
    message = str(caught.value)
    assert message.startswith(str(folder)) and len(message) < 3_000
    assert "\n" not in message or "differences" in message


BAD_OPENAI = {
    "ResNet": (lambda s: s | {"visual.layer1.0.conv1.weight": np.ones(1)}, "its image tower is a ResNet, which is not"),
    "Hugging Face": (lambda s: {"text_model.x": np.ones(1)}, "has the keys of Hugging Face; name the folder"),
    "something else": (lambda s: {"w": np.ones(1)}, "not a CLIP model of OpenAI, which has visual.conv1.weight with 4"),
    "flat convolution": (lambda s: s | {"visual.conv1.weight": np.ones(3)}, "visual.conv1.weight with 4 dimensions"),
    "no text tower": (
        lambda s: {k: a for k, a in s.items() if k != "token_embedding.weight"},
        "token_embedding.weight",
    ),
    "pictures not square": (
        lambda s: s | {"visual.positional_embedding": np.ones((6, 128))},
        "6 rows, not 1 plus a sq",
    ),
    "heads": (
        lambda s: s | {"text_projection": np.ones((65, 36))},
        "has width 65, not a multiple of 64, the width of a head",
    ),
    "no layers": (
        lambda s: {k: a for k, a in s.items() if not k.startswith("transformer.")},
        "text_config.num_hidden_layers is 0",
    ),
    "projections of two sizes": (
        lambda s: s | {"visual.proj": np.ones((128, 35))},
        r"does not fit the sizes .*, 1 differences:\n  shape       visual.proj is \[128, 35\], .* \[128, 36\]$",
    ),
    "missing and unexpected": (
        lambda s: {k.replace("1.ln_2", "1.ln_3"): a for k, a in s.items()},
        r"4 differences:\n  missing     transformer.resblocks.1.ln_2.bias \[64\]\n.*\n  unexpected  .*1.ln_3.bias",
    ),
    "integers": (lambda s: s | {"logit_scale": np.ones((), "i4")}, "logit_scale is int32, not floating point"),
    "NaN": (lambda s: s | {"visual.proj": np.full((128, 36), np.nan)}, "visual.proj holds NaN"),
}


def openai_state() -> dict[str, np.ndarray]:
    slots = clip_slots(clip_oracle.CONFIGS["openai"], "openai")
    return {slot.key: np.zeros(slot.shape, np.float32) for slot in slots}


def write_state(path: Path, state: dict[str, np.ndarray]) -> Path:
    write_torch_archive(path, [(key, array.dtype, array.shape) for key, array in state.items()], state.__getitem__)
    return path


@pytest.mark.parametrize("case", BAD_OPENAI)
def test_openai_files_that_do_not_fit_are_refused_with_a_reason(case, vocab_folder, tmp_path):
    change, reason = BAD_OPENAI[case]
    path = write_state(tmp_path / "ViT.pt", change(openai_state()))
    with pytest.raises(CheckpointError, match=reason) as caught:
        read_clip(path, vocab_folder)
    assert str(caught.value).startswith(f"{path}: ")


def test_an_openai_file_needs_a_tokenizer(tmp_path):
    path = write_state(tmp_path / "ViT.pt", openai_state())
    with pytest.raises(CheckpointError, match="a file of OpenAI has no tokenizer; name OpenAI's bpe_simple_vocab"):
        read_clip(path)
    with pytest.raises(CheckpointError, match="No such file"):
        read_clip(tmp_path / "none")


# Tokenizers


def write_merges(path: Path, lines: list[str]) -> Path:
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return path


MERGE_LINES = ['"bpe_simple_vocab_16e6.txt#version: 0.2', *clip_oracle.MERGES, ""]


def test_every_source_of_a_tokenizer_gives_the_ids_of_transformers(small, folder, vocab_folder, tmp_path):
    import transformers

    expected = transformers.CLIPTokenizer.from_pretrained(vocab_folder)(TEXTS)["input_ids"]
    assert expected[0] == [VOCAB_SIZE - 2, VOCAB_SIZE - 1]
    tokens = clip_oracle.tiny_vocab()
    assert expected[1][1:-1] == [tokens[word] for word in ("the</w>", "cat</w>", "and</w>", "the</w>", "dog</w>")]
    assert transformers.CLIPTokenizer.from_pretrained(folder)(TEXTS)["input_ids"] == expected
    merges = write_merges(tmp_path / "bpe_simple_vocab_16e6.txt.gz", MERGE_LINES)
    for source in (None, vocab_folder, merges):
        tokenizer = read_clip(folder, source).tokenizer
        assert [encoding.ids for encoding in tokenizer.encode_batch(TEXTS)] == expected, source
        assert tokenizer.get_vocab() == tokens


def test_no_more_merges_are_taken_than_openai_takes(small, folder, tmp_path, monkeypatch):
    """The published file has five times as many."""
    assert 512 + clip_tokenizer.BPE_MERGES + 2 == ClipConfig().text.vocab_size
    monkeypatch.setattr(clip_tokenizer, "BPE_MERGES", len(clip_oracle.MERGES))
    merges = write_merges(tmp_path / "bpe.txt.gz", [*MERGE_LINES[:-1], "o g", "o g</w>"])
    assert read_clip(folder, merges).tokenizer.get_vocab() == clip_oracle.tiny_vocab()


def test_padding_and_truncation_of_a_tokenizer_file_are_left_out(small, folder, tmp_path):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding(length=77)
    tokenizer.enable_truncation(5)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert len(read_clip(folder).tokenizer.encode("the cat and the dog and the cat").ids) == 10
    write_clip(tmp_path / "again", small._replace(tokenizer=tokenizer))
    assert len(read_clip(tmp_path / "again").tokenizer.encode("the cat and the dog and the cat").ids) == 10
    assert tokenizer.padding and tokenizer.truncation, "the caller's tokenizer was changed"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"not compressed", "cannot be read: Not a gzipped file"),
        (gzip.compress(b"x\nc a\n")[:-9], "cannot be read: Compressed file ended"),
        (gzip.compress(b"x\nc a\n")[:10] + b"\xff" * 30, "cannot be read: Error -3 while decompressing"),
        (gzip.compress(b"x\n\xff\xff"), "cannot be read: 'utf-8' codec"),
        (gzip.compress(bytes(20 << 20)), "more than 16 MB unpacked"),
        (gzip.compress(b"x\nc a\nc a t\n"), "line 3 is not a pair of tokens: 'c a t'"),
        (gzip.compress(b"x\nxx yy\n"), "the tokenizer cannot be read: "),
    ],
    ids=["not-gzip", "cut", "damaged", "not-utf-8", "too-large", "no-pair", "no-merge"],  # gzip has the time in it
)
def test_damaged_files_of_merges_are_refused(folder, tmp_path, data, reason):
    (tmp_path / "bpe.txt.gz").write_bytes(data)
    with pytest.raises(CheckpointError, match=reason) as caught:
        read_clip(folder, tmp_path / "bpe.txt.gz")
    assert str(caught.value).startswith(f"{tmp_path / 'bpe.txt.gz'}: ") and "\n" not in str(caught.value)


# Writing


def test_conversion_says_what_it_did(small, folder, tmp_path):
    line = convert_clip(folder, tmp_path / "new")
    assert line == f"{tmp_path / 'new'}: CLIP with patches of 8 in images of 32 x 32, 107,337 parameters, 0.00 GB"
    assert_same(read_clip(tmp_path / "new").params, small.params)
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"}
    assert {file.name for file in (tmp_path / "new").iterdir()} == names


def test_a_folder_is_replaced_only_if_it_is_a_clip_model_and_only_when_asked(small, folder, tmp_path):
    with pytest.raises(OutputError, match="exists already"):
        write_clip(folder, small)
    write_clip(folder, small, overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(OutputError, match="holds none of preprocessor_config.json"):
        convert_clip(folder, tmp_path / "mine", overwrite=True)
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"]


def test_a_source_is_never_replaced_by_its_conversion(folder, vocab_folder):
    with pytest.raises(OutputError, match="is, or holds, the source of the conversion"):
        convert_clip(folder, folder, overwrite=True)
    shutil.copytree(vocab_folder, folder / "words")
    with pytest.raises(OutputError, match="is, or holds, the source of the conversion, .*words"):
        convert_clip(vocab_folder, folder, folder / "words", overwrite=True)


def test_a_write_that_fails_leaves_nothing(small, tmp_path, monkeypatch):
    def fail(path, _):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OutputError, match=r"No space left on device \(.*/new/model.safetensors\)"):
        write_clip(tmp_path / "new", small)
    assert os.listdir(tmp_path) == []


def test_others_may_read_what_the_umask_lets_them(small, tmp_path):
    umask = os.umask(0o027)
    try:
        write_clip(tmp_path / "new", small)
    finally:
        os.umask(umask)
    assert {oct(file.stat().st_mode & 0o777) for file in (tmp_path / "new").iterdir()} == {"0o640"}


def test_the_script_converts_and_gives_the_exit_codes_of_mindalle(folder, vocab_folder, tmp_path, request):
    def run(*arguments):
        command = [sys.executable, "-m", "convert.clip", *map(str, arguments)]
        return subprocess.run(command, cwd=request.config.rootpath, capture_output=True, text=True, timeout=120)

    done = run(folder, tmp_path / "new", "--tokenizer", vocab_folder)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith(f"{tmp_path / 'new'}: CLIP with")
    done = run(tmp_path / "none", tmp_path / "other")
    assert (done.returncode, done.stderr) == (4, f"convert.clip: {tmp_path / 'none'}: no such file or folder\n")
