"""CLIP models on disk: reads Hugging Face's folders and OpenAI's files, and writes Hugging Face's folders.

Neither PyTorch nor transformers is needed. Every tensor must fit. One error lists all tensors that are missing,
unexpected or of another shape.
"""

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.serialization
import flax.traverse_util
import numpy as np
import safetensors
import safetensors.numpy
from tokenizers import Tokenizer

from mindalle_jax.errors import CheckpointError, one_line
from mindalle_jax.interop.clip_config import INSTEAD, openai_config, parse_clip_config
from mindalle_jax.interop.clip_layouts import OPENAI_EXTRAS, Layout, clip_leaf_shapes, clip_slots
from mindalle_jax.interop.clip_preprocessing import FILE as PREPROCESSING_FILE
from mindalle_jax.interop.clip_preprocessing import dump_preprocessing, openai_preprocessing, parse_preprocessing
from mindalle_jax.interop.key_maps import check_shapes, to_float32
from mindalle_jax.interop.torch_archive import TorchArchive
from mindalle_jax.models.clip import ClipConfig, Preprocessing
from mindalle_jax.storage.files import check_apart, check_free_disk, check_output, new_folder
from mindalle_jax.storage.weights import DiskDType, nest, numpy_dtype
from mindalle_jax.text.clip_tokenizer import read_clip_tokenizer

CLIP_MARKS = (PREPROCESSING_FILE,)
"""A folder that holds this file is a CLIP model, so another CLIP model may replace it."""

CLIP_KEYS = ("visual.", "vision_model.", "text_model.")
"""Starts of keys that every torch file of a CLIP model has, and no file of minDALL-E or of a VQGAN."""
WEIGHT_FILES = ("model.safetensors", "flax_model.msgpack", "pytorch_model.bin")
"""Names of the weights in a Hugging Face folder, the preferred name first."""
INDEX = ".index.json"
"""Follows the name of weights that are split into several files, in the name of the file that lists them."""


class ClipModel(NamedTuple):
    """A CLIP model, which scores images with texts."""

    config: ClipConfig
    params: dict[str, Any]
    """Nested by Flax name, float32 arrays of NumPy."""
    tokenizer: Tokenizer
    """Returns the ids of a text with its start and end token, neither padded nor cut."""
    preprocessing: Preprocessing | None = None
    """How images become the input; None: as OpenAI's models."""


def is_clip(path: Path) -> bool:
    """Returns whether a path holds a CLIP model: a folder with config.json, or a torch file with keys of CLIP."""
    if path.is_dir():
        return (path / "config.json").is_file() and not (path / "config.yaml").exists()
    if not path.is_file():
        return False
    try:
        with TorchArchive(path) as archive:
            return any(key.startswith(CLIP_KEYS) for key in archive.state_dict())
    except CheckpointError:  # the function that reads the file reports the error
        return False


def read_clip(path: str | Path, tokenizer: str | Path | None = None) -> ClipModel:
    """Reads a CLIP model and converts it to float32. `path` is one of

      - a folder of Hugging Face: config.json, tokenizer.json (or vocab.json and merges.txt), and weights. The weights
        are the first of model.safetensors, flax_model.msgpack and pytorch_model.bin that exists, as one file, or as
        several with their .index.json. A
        preprocessor_config.json is followed; without one, images are preprocessed as for OpenAI's models.
      - a .pt file of OpenAI with a Vision Transformer: TorchScript as published, or a saved state_dict(). Its sizes
        follow from its tensors. Heads are 64 wide and the activation is quick-GELU, as in all models of OpenAI. Files
        of OpenCLIP have the same keys, but often other heads or GELU, which no tensor shows. Use their Hugging Face
        folders instead.

    tokenizer: another folder with a tokenizer's files, or OpenAI's bpe_simple_vocab_16e6.txt.gz. It is needed for a .pt
    file, which has none. Raises CheckpointError.
    """
    path = Path(os.path.expanduser(path))
    if not path.is_dir():
        return _read_openai(path, tokenizer)
    if not (path / "config.json").exists() and any(path.glob("open_clip*")):
        raise CheckpointError(f"{path}: is in the layout of OpenCLIP, which is not read; {INSTEAD}")
    config = parse_clip_config(_read_json(path / "config.json"), f"{path / 'config.json'}")
    words = read_clip_tokenizer(Path(tokenizer or path), config.text)
    preprocessing, file = None, path / PREPROCESSING_FILE
    if file.exists():
        preprocessing = parse_preprocessing(_read_json(file), config.vision.image_size, str(file))
    return ClipModel(config, _read_folder(path, config), words, preprocessing)


def write_clip(folder: str | Path, model: ClipModel, overwrite: bool = False, dtype: DiskDType = "float32") -> None:
    """Writes a folder for Hugging Face's CLIPModel, AutoTokenizer and CLIPImageProcessor, and for read_clip.

    dtype: number type of the written weights. Raises OutputError. If it fails, no part of the folder stays.
    """
    folder, (config, params, tokenizer, preprocessing) = Path(os.path.expanduser(folder)), model
    leaves = flax.traverse_util.flatten_dict(params, sep="/")
    tensors = {
        slot.key: np.asarray(slot.to_file(np.asarray(leaves[slot.path], np.float32)), numpy_dtype(dtype), order="C")
        for slot in clip_slots(config, "torch")
    }
    check_free_disk(folder, sum(tensor.nbytes for tensor in tensors.values()) + (64 << 20), "the CLIP model")
    words = Tokenizer.from_str(tokenizer.to_str())  # a copy, because the next two lines change it
    words.no_padding()
    words.no_truncation()
    start_id, end_id = words.encode("").ids
    start, end = words.id_to_token(start_id), words.id_to_token(end_id)
    files = {
        "config.json": {
            "architectures": ["CLIPModel"],
            "model_type": "clip",
            "dtype": dtype,
            "projection_dim": config.projection_dim,
            "text_config": {
                "model_type": "clip_text_model",
                "projection_dim": config.projection_dim,
                "bos_token_id": start_id,
                **dataclasses.asdict(config.text),
            },
            "vision_config": {
                "model_type": "clip_vision_model",
                "projection_dim": config.projection_dim,
                **dataclasses.asdict(config.vision),
            },
        },
        "tokenizer_config.json": {
            "tokenizer_class": "CLIPTokenizer",
            "bos_token": start,
            "eos_token": end,
            "unk_token": end,
            "pad_token": end,
            "model_max_length": config.text.max_position_embeddings,
        },
        PREPROCESSING_FILE: dump_preprocessing(preprocessing or openai_preprocessing(config)),
    }
    with new_folder(folder, overwrite, CLIP_MARKS) as partial:
        for name, content in files.items():
            (partial / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        words.save(str(partial / "tokenizer.json"))
        # Not save_file: only the owner can read its files.
        (partial / "model.safetensors").write_bytes(safetensors.numpy.save(tensors, metadata={"format": "pt"}))


def convert_clip(
    source: str | Path,
    target: str | Path,
    tokenizer: str | Path | None = None,
    overwrite: bool = False,
    dtype: DiskDType = "float32",
) -> str:
    """Reads a CLIP model with read_clip and writes it with write_clip; returns one line that describes the result.

    tokenizer: as for read_clip. dtype: number type of the written weights. Raises CheckpointError or OutputError.
    """
    source, target = Path(os.path.expanduser(source)), Path(os.path.expanduser(target))
    check_output(target, overwrite, CLIP_MARKS)  # checked before gigabytes are read
    for place in (source, tokenizer):
        if place is not None:
            check_apart(Path(place), target)
    model = read_clip(source, tokenizer)
    write_clip(target, model, overwrite, dtype)
    parameters = sum(math.prod(shape) for shape in clip_leaf_shapes(model.config).values())
    vision = model.config.vision
    return (
        f"{target}: CLIP with patches of {vision.patch_size} in images of {vision.image_size} x {vision.image_size}, "
        f"{parameters:,} parameters, {numpy_dtype(dtype).itemsize * parameters / 1e9:.2f} GB"
    )


# Reading


def _read_params(
    file: Path,
    sizes_from: str,
    config: ClipConfig,
    layout: Layout,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
) -> dict[str, Any]:
    """Checks the keys and shapes of a file against the table of its layout, then reads it parameter by parameter."""
    slots = clip_slots(config, layout)
    check_shapes(shapes, {slot.key: slot.shape for slot in slots}, f"{file}: does not fit {sizes_from}")
    return nest({slot.path: slot.from_file(to_float32(read(slot.key), str(file), slot.key)) for slot in slots})


def _read_folder(folder: Path, config: ClipConfig) -> dict[str, Any]:
    """Reads the parameters from the first of WEIGHT_FILES that exists, or from the files that an index lists."""
    for name in WEIGHT_FILES:
        if (folder / name).is_file() and name.endswith(".msgpack"):
            return _read_msgpack(folder / name, config)
        if (folder / name).is_file():
            return _read_tensors(folder / name, [folder / name], config)
        if (folder / f"{name}{INDEX}").is_file():
            index = folder / f"{name}{INDEX}"
            return _read_tensors(index, _shards(index), config)
    raise CheckpointError(f"{folder}: holds no weights; it needs one of {', '.join(WEIGHT_FILES)}")


def _shards(index: Path) -> list[Path]:
    """Returns the files that an index lists, {"weight_map": {key: name of a file beside it}}."""
    content = _read_json(index)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{index}: has no weight_map that names a file for each tensor")
    files = [index.parent / name for name in sorted(set(names.values()))]
    for file in files:
        if file.name not in names.values() or file.parent != index.parent:  # "../x" and "/x" are elsewhere
            raise CheckpointError(f"{index}: lists a file in another folder")
        if not file.is_file():
            raise CheckpointError(f"{index}: lists {file.name}, which is missing")
    return files


def _read_tensors(source: Path, files: list[Path], config: ClipConfig) -> dict[str, Any]:
    """Reads the parameters from one or several files in the layout of PyTorch. source: names them in messages."""
    with contextlib.ExitStack() as stack:
        shapes: dict[str, tuple[int, ...]] = {}
        readers: dict[str, Callable[[str], np.ndarray]] = {}
        for file in files:
            opened = _open_safetensors(file) if file.suffix == ".safetensors" else _open_torch(file)
            found, read = stack.enter_context(opened)
            if twice := next((key for key in found if key in shapes), None):
                raise CheckpointError(f"{file}: {twice[:120]!r} is in another file, too")
            shapes |= found
            readers |= dict.fromkeys(found, read)
        return _read_params(source, "config.json", config, "torch", _parameters(shapes), lambda key: readers[key](key))


Opened = tuple[dict[str, tuple[int, ...]], Callable[[str], np.ndarray]]
"""The shape of each tensor in a file, and a function that reads one."""


@contextlib.contextmanager
def _open_safetensors(file: Path) -> Iterator[Opened]:
    try:
        with safetensors.safe_open(file, framework="numpy") as tensors:
            shapes = {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}

            def read(key: str) -> np.ndarray:
                dtype = tensors.get_slice(key).get_dtype()
                if dtype not in ("BF16", "F16", "F32", "F64"):  # the library fails on dtypes that NumPy does not have
                    raise CheckpointError(f"{file}: {key} is {dtype}; BF16, F16, F32 and F64 are read")
                return tensors.get_tensor(key)

            yield shapes, read
    except (safetensors.SafetensorError, OSError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file}: truncated or damaged: {one_line(error)}") from None


@contextlib.contextmanager
def _open_torch(file: Path) -> Iterator[Opened]:
    with TorchArchive(file) as archive:
        refs = archive.state_dict()
        yield {key: ref.shape for key, ref in refs.items()}, lambda key: archive.read(refs[key])


def _parameters(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Leaves out the numbers 0, 1, 2, ... that transformers saved as a buffer until version 4.31."""
    return {key: shape for key, shape in shapes.items() if not key.endswith(".embeddings.position_ids")}


def _read_msgpack(file: Path, config: ClipConfig) -> dict[str, Any]:
    try:  # msgpack makes numbers, texts, lists, dicts and arrays of plain numbers; nothing in it is called
        tree = flax.serialization.msgpack_restore(file.read_bytes())
        arrays: dict[str, Any] = flax.traverse_util.flatten_dict(tree, sep="/")
    except Exception as error:  # NumPy, msgpack and flax raise errors of many kinds
        raise CheckpointError(f"{file}: not a Flax checkpoint: {type(error).__name__}: {one_line(error)}") from None
    for path, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise CheckpointError(f"{file}: {path[:120]!r} is a {type(array).__name__}, not an array")
    shapes = {path: array.shape for path, array in arrays.items()}
    return _read_params(file, "config.json", config, "flax", shapes, arrays.__getitem__)


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: missing; {file.parent} is not a CLIP model of Hugging Face") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read: {one_line(error)}") from None


def _read_openai(file: Path, tokenizer: str | Path | None) -> ClipModel:
    with TorchArchive(file) as archive:
        refs = {key: ref for key, ref in archive.state_dict().items() if not OPENAI_EXTRAS.fullmatch(key)}
        shapes = {key: ref.shape for key, ref in refs.items()}
        config = openai_config(shapes, file)
        if tokenizer is None:
            raise CheckpointError(
                f"{file}: a file of OpenAI has no tokenizer; name OpenAI's bpe_simple_vocab_16e6.txt.gz, or a Hugging "
                "Face folder with tokenizer.json"
            )
        words = read_clip_tokenizer(Path(tokenizer), config.text)
        sizes_from = "the sizes that OpenAI's build_model takes from these tensors"
        params = _read_params(file, sizes_from, config, "openai", shapes, lambda key: archive.read(refs[key]))
    return ClipModel(config, params, words)
