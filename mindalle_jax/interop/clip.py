"""CLIP models on disk: reads Hugging Face's folders and OpenAI's files, writes Hugging Face's folders.

Neither PyTorch nor transformers is needed. Every tensor is accounted for: what is missing, unexpected or of another
shape is listed, all at once.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import flax.serialization
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from tokenizers import Tokenizer

from mindalle_jax.errors import CheckpointError, one_line
from mindalle_jax.interop.key_maps import SUFFIXES, check_shapes, to_float32
from mindalle_jax.interop.torch_archive import TorchArchive
from mindalle_jax.models.clip import CLIP, PIXEL_MEAN, PIXEL_STD, ClipConfig, ClipTextConfig, ClipVisionConfig
from mindalle_jax.storage.files import check_apart, check_free_disk, check_output, new_folder
from mindalle_jax.storage.weights import DiskDType, nest, numpy_dtype
from mindalle_jax.text.clip_tokenizer import read_clip_tokenizer

CLIP_MARKS = ("preprocessor_config.json",)
"""A folder that holds this is a CLIP model, and may be replaced by another."""

MAX_SIZE = 1 << 20  # of any number in a config: far above real models, far below what tracing the network cannot take
MAX_LAYERS = 200
MAX_PATCHES = 1 << 16

# (part of Hugging Face's key, what OpenAI's has in its place), to be applied from top to bottom.
OPENAI_NAMES = [
    ("text_model.encoder.layers.", "transformer.resblocks."),
    ("vision_model.encoder.layers.", "visual.transformer.resblocks."),
    (".layer_norm1.", ".ln_1."),
    (".layer_norm2.", ".ln_2."),
    (".self_attn.q_proj.", ".attn.in_proj_"),
    (".self_attn.k_proj.", ".attn.in_proj_"),
    (".self_attn.v_proj.", ".attn.in_proj_"),
    (".self_attn.out_proj.", ".attn.out_proj."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
    ("text_model.embeddings.token_embedding.", "token_embedding."),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.final_layer_norm.", "ln_final."),
    ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    ("vision_model.embeddings.patch_embedding.", "visual.conv1."),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.pre_layrnorm.", "visual.ln_pre."),
    ("vision_model.post_layernorm.", "visual.ln_post."),
    ("text_projection.weight", "text_projection"),
    ("visual_projection.weight", "visual.proj"),
]
# Not weights: numbers that the shapes of the weights tell, and the causal mask that some TorchScript modules keep.
OPENAI_EXTRAS = re.compile(r"input_resolution|context_length|vocab_size|.*\.attn_mask")

Layout = Literal["flax", "torch", "openai"]
"""flax: paths and arrays of FlaxCLIP. torch: keys and tensors of Hugging Face's CLIPModel. openai: of OpenAI's CLIP."""


WEIGHT_FILES = ("model.safetensors", "flax_model.msgpack", "pytorch_model.bin")
"""Of a Hugging Face folder, in the order of preference."""


class ClipModel(NamedTuple):
    """All that is needed to score pictures with texts."""

    config: ClipConfig
    params: dict[str, Any]
    """Nested by Flax name, float32 arrays of NumPy."""
    tokenizer: Tokenizer
    """Gives the ids of a text with its start and end token, neither padded nor cut."""


def read_clip(path: str | Path, tokenizer: str | Path | None = None) -> ClipModel:
    """Reads a CLIP model, in float32 whatever the file has. `path` is one of

      - a folder of Hugging Face: config.json, tokenizer.json (or vocab.json and merges.txt), and the first there is of
        model.safetensors, flax_model.msgpack and pytorch_model.bin;
      - a .pt file of OpenAI with a Vision Transformer, TorchScript as published or a saved state_dict(). Its sizes are
        those of its tensors, with heads of 64 and quick-GELU as all of OpenAI's; files of OpenCLIP have the same keys
        but often other heads or GELU, which no tensor tells, so those are to be taken from their Hugging Face folders.

    tokenizer: another folder with the tokenizer's files, or OpenAI's bpe_simple_vocab_16e6.txt.gz; a .pt file has none.
    Raises CheckpointError.
    """
    path = Path(path)
    if not path.is_dir():
        return _read_openai(path, tokenizer)
    config = _parse_config(_read_json(path / "config.json"), f"{path / 'config.json'}")
    words = read_clip_tokenizer(Path(tokenizer or path), config.text)
    return ClipModel(config, _read_folder(path, config), words)


def write_clip(folder: str | Path, model: ClipModel, overwrite: bool = False, dtype: DiskDType = "float32") -> None:
    """Writes a folder for Hugging Face's CLIPModel, AutoTokenizer and CLIPImageProcessor, and for read_clip.

    dtype: of the weights. Raises OutputError; nothing half-written is left behind.
    """
    folder, (config, params, tokenizer) = Path(folder), model
    leaves = flax.traverse_util.flatten_dict(params, sep="/")
    tensors = {
        slot.key: np.asarray(slot.to_file(np.asarray(leaves[slot.path], np.float32)), numpy_dtype(dtype), order="C")
        for slot in _slots(config, "torch")
    }
    check_free_disk(folder, sum(tensor.nbytes for tensor in tensors.values()) + (64 << 20), "the CLIP model")
    words = Tokenizer.from_str(tokenizer.to_str())  # a copy, because the next two lines change it
    words.no_padding()
    words.no_truncation()
    start_id, end_id = words.encode("").ids
    start, end = words.id_to_token(start_id), words.id_to_token(end_id)
    size = config.vision.image_size
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
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": size},
            "resample": 3,  # bicubic
            "do_center_crop": True,
            "crop_size": {"height": size, "width": size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": PIXEL_MEAN,
            "image_std": PIXEL_STD,
        },
    }
    with new_folder(folder, overwrite, CLIP_MARKS) as partial:
        for name, content in files.items():
            (partial / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        words.save(str(partial / "tokenizer.json"))
        # Not save_file, whose files nobody else may read.
        (partial / "model.safetensors").write_bytes(safetensors.numpy.save(tensors, metadata={"format": "pt"}))


def convert_clip(
    source: str | Path, target: str | Path, tokenizer: str | Path | None = None, overwrite: bool = False
) -> str:
    """Writes what read_clip reads with write_clip; returns one line that says what was done.

    Raises CheckpointError and OutputError.
    """
    source, target = Path(source), Path(target)
    check_output(target, overwrite, CLIP_MARKS)  # before gigabytes are read
    for place in (source, tokenizer):
        if place is not None:
            check_apart(Path(place), target)
    model = read_clip(source, tokenizer)
    write_clip(target, model, overwrite)
    parameters = sum(math.prod(shape) for shape in clip_leaf_shapes(model.config).values())
    vision = model.config.vision
    return (
        f"{target}: CLIP with patches of {vision.patch_size} in pictures of {vision.image_size} x {vision.image_size}, "
        f"{parameters:,} parameters, {4 * parameters / 1e9:.2f} GB"
    )


# Which tensor is which parameter


class _Slot(NamedTuple):
    """One parameter and its place in a file."""

    path: str
    """Of the Flax parameter, joined by `/`."""
    key: str
    """In the file. OpenAI has queries, keys and values under one."""
    shape: tuple[int, ...]
    """In the file, of all that is under `key`."""
    axes: tuple[int, ...]
    """The file's axes in the order of the parameter's: (1, 0) for a matrix that the file has transposed."""
    third: int | None
    """Which third of the file's rows this is, where it holds queries, keys and values together."""

    def from_file(self, array: np.ndarray) -> np.ndarray:
        """The parameter in what the file has under `key`."""
        part = array if self.third is None else np.split(array, 3)[self.third]
        return np.asarray(part.transpose(self.axes), order="C")

    def to_file(self, array: np.ndarray) -> np.ndarray:
        """The inverse of from_file, where the file has each parameter under its own key."""
        return array.transpose(np.argsort(self.axes))


def _slots(config: ClipConfig, layout: Layout) -> list[_Slot]:
    """Where a file of this layout has each parameter."""
    return [_slot(path, shape, layout) for path, shape in clip_leaf_shapes(config).items()]


def _slot(path: str, shape: tuple[int, ...], layout: Layout) -> _Slot:
    unmoved = tuple(range(len(shape)))
    if layout == "flax":
        return _Slot(path, path, shape, unmoved, None)
    module, _, last = path.rpartition("/")
    key = f"{module}.{SUFFIXES[last]}".replace("/", ".") if last in SUFFIXES else path.replace("/", ".")
    axes, third = unmoved, None
    if last == "kernel":  # Dense [in, out] is [out, in] in PyTorch, Conv [y, x, in, out] is [out, in, y, x]
        axes = (1, 0) if len(shape) == 2 else (2, 3, 1, 0)
    if layout == "openai":
        if module in ("text_projection", "visual_projection"):
            axes = unmoved  # bare matrices there, that features are multiplied with from the left
        if match := re.search(r"/([qkv])_proj$", module):
            third = "qkv".index(match[1])
        for ours, theirs in OPENAI_NAMES:
            key = key.replace(ours, theirs)
    file_shape = tuple(shape[i] for i in np.argsort(axes))
    if third is not None:
        file_shape = (3 * file_shape[0], *file_shape[1:])
    return _Slot(path, key, file_shape, axes, third)


@functools.cache  # tracing the network takes a second
def clip_leaf_shapes(config: ClipConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter by its path. Allocates nothing."""
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    pixels = jax.ShapeDtypeStruct((1, config.vision.image_size, config.vision.image_size, 3), jnp.float32)
    variables = jax.eval_shape(CLIP(config).init, jax.random.key(0), ids, pixels)
    flat: dict[str, Any] = flax.traverse_util.flatten_dict(variables["params"], sep="/")
    return {path: tuple(leaf.shape) for path, leaf in flat.items()}


def _read_params(
    file: Path,
    sizes_from: str,
    config: ClipConfig,
    layout: Layout,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
) -> dict[str, Any]:
    """Checks the keys and shapes of a file against the table of its layout, then reads it parameter by parameter."""
    slots = _slots(config, layout)
    check_shapes(shapes, {slot.key: slot.shape for slot in slots}, f"{file}: does not fit {sizes_from}")
    return nest({slot.path: slot.from_file(to_float32(read(slot.key), str(file), slot.key)) for slot in slots})


# Hugging Face's folders


def _read_folder(folder: Path, config: ClipConfig) -> dict[str, Any]:
    """The parameters in the first file of weights that there is."""
    readers = dict(zip(WEIGHT_FILES, (_read_safetensors, _read_msgpack, _read_torch), strict=True))
    for name, read in readers.items():
        if (folder / name).is_file():
            return read(folder / name, config)
    raise CheckpointError(f"{folder}: holds no weights; it needs one of {', '.join(readers)}")


def _read_safetensors(file: Path, config: ClipConfig) -> dict[str, Any]:
    try:
        with safetensors.safe_open(file, framework="numpy") as tensors:
            shapes = {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}

            def read(key: str) -> np.ndarray:
                dtype = tensors.get_slice(key).get_dtype()
                if dtype not in ("BF16", "F16", "F32", "F64"):  # the library fails on those that NumPy does not have
                    raise CheckpointError(f"{file}: {key} is {dtype}; BF16, F16, F32 and F64 are read")
                return tensors.get_tensor(key)

            return _read_params(file, "config.json", config, "torch", _parameters(shapes), read)
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: truncated or damaged: {one_line(error)}") from None


def _read_torch(file: Path, config: ClipConfig) -> dict[str, Any]:
    with TorchArchive(file) as archive:
        refs = archive.state_dict()
        shapes = _parameters({key: ref.shape for key, ref in refs.items()})
        return _read_params(file, "config.json", config, "torch", shapes, lambda key: archive.read(refs[key]))


def _parameters(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Without the numbers 0, 1, 2, ... that transformers saved as a buffer until version 4.31."""
    return {key: shape for key, shape in shapes.items() if not key.endswith(".embeddings.position_ids")}


def _read_msgpack(file: Path, config: ClipConfig) -> dict[str, Any]:
    try:  # msgpack makes numbers, texts, lists, dicts and arrays of plain numbers; nothing in it is called
        tree = flax.serialization.msgpack_restore(file.read_bytes())
        arrays: dict[str, Any] = flax.traverse_util.flatten_dict(tree, sep="/")
    except Exception as error:  # whatever NumPy, msgpack and flax say to bytes that they did not write
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


def _parse_config(raw: Any, where: str) -> ClipConfig:
    """A config.json, as transformers 5 understands it: what it omits has its defaults there, which are ours."""
    if not isinstance(raw, dict) or raw.get("model_type") != "clip":
        given = raw.get("model_type") if isinstance(raw, dict) else raw
        raise CheckpointError(f"{where}: model_type is {given!r:.60}, only 'clip' is read")
    text, vision = _section(raw, "text_config", where), _section(raw, "vision_config", where)
    if vision.get("num_channels", 3) != 3:
        raise CheckpointError(f"{where}: vision_config.num_channels is {vision['num_channels']!r:.60}, it must be 3")
    config = ClipConfig(
        _parse_tower(ClipTextConfig, text, f"{where}: text_config"),
        _parse_tower(ClipVisionConfig, vision, f"{where}: vision_config"),
        _check_size(raw.get("projection_dim", ClipConfig.projection_dim), f"{where}: projection_dim"),
    )
    _check_patches(config.vision, where)
    return config


def check_clip_config(config: ClipConfig, where: str) -> None:
    """Raises CheckpointError, naming a field below `where`, for sizes that no network has."""
    _parse_tower(ClipTextConfig, dataclasses.asdict(config.text), f"{where}.text")
    _parse_tower(ClipVisionConfig, dataclasses.asdict(config.vision), f"{where}.vision")
    _check_size(config.projection_dim, f"{where}.projection_dim")
    _check_patches(config.vision, f"{where}.vision")


def _check_patches(vision: ClipVisionConfig, where: str) -> None:
    patches = (vision.image_size // vision.patch_size) ** 2
    if not 1 <= patches <= MAX_PATCHES:
        raise CheckpointError(f"{where}: {patches} patches in a picture; 1 to {MAX_PATCHES:,} are possible")


def _section(raw: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    # Early configs have the values a second time, under text_config_dict. Those count, and where they omit one it has
    # its default, whatever text_config says.
    section = next((raw[key] for key in (f"{name}_dict", name) if raw.get(key) is not None), {})
    if not isinstance(section, dict):
        raise CheckpointError(f"{where}: {name} is {section!r:.60}, not a section")
    return section


_Tower = TypeVar("_Tower", ClipTextConfig, ClipVisionConfig)


def _parse_tower(kind: type[_Tower], section: dict[str, Any], where: str) -> _Tower:
    values = {field.name: section.get(field.name, field.default) for field in dataclasses.fields(kind)}
    for name, value in values.items():
        if name == "hidden_act":
            if value not in ("quick_gelu", "gelu"):
                raise CheckpointError(f"{where}.{name} is {value!r:.60}; quick_gelu and gelu are known")
        elif name == "layer_norm_eps":
            if type(value) is not float or not 0 < value < 1:
                raise CheckpointError(f"{where}.{name} is {value!r:.60}; it must be a number between 0 and 1")
        elif name == "eos_token_id":
            if type(value) is not int or not 0 <= value < values["vocab_size"]:
                raise CheckpointError(f"{where}.{name} is {value!r:.60}; vocab_size is {values['vocab_size']}")
        else:
            _check_size(value, f"{where}.{name}", MAX_LAYERS if name == "num_hidden_layers" else MAX_SIZE)
    tower = kind(**values)
    if tower.hidden_size % tower.num_attention_heads:
        raise CheckpointError(
            f"{where}.num_attention_heads is {tower.num_attention_heads}, which does not divide hidden_size "
            f"{tower.hidden_size}"
        )
    return tower


def _check_size(value: Any, where: str, largest: int = MAX_SIZE) -> int:
    if type(value) is not int or not 1 <= value <= largest:
        raise CheckpointError(f"{where} is {value!r:.60}; it must be a whole number from 1 to {largest:,}")
    return value


# OpenAI's files


def _read_openai(file: Path, tokenizer: str | Path | None) -> ClipModel:
    with TorchArchive(file) as archive:
        refs = {key: ref for key, ref in archive.state_dict().items() if not OPENAI_EXTRAS.fullmatch(key)}
        shapes = {key: ref.shape for key, ref in refs.items()}
        config = _openai_config(shapes, file)
        if tokenizer is None:
            raise CheckpointError(
                f"{file}: a file of OpenAI has no tokenizer; name OpenAI's bpe_simple_vocab_16e6.txt.gz, or a Hugging "
                "Face folder with tokenizer.json"
            )
        words = read_clip_tokenizer(Path(tokenizer), config.text)
        sizes_from = "the sizes that OpenAI's build_model takes from these tensors"
        params = _read_params(file, sizes_from, config, "openai", shapes, lambda key: archive.read(refs[key]))
    return ClipModel(config, params, words)


def _openai_config(shapes: Mapping[str, tuple[int, ...]], file: Path) -> ClipConfig:
    """The sizes that the shapes tell, by the rules of build_model in OpenAI's clip/model.py."""
    if any(key.startswith("visual.layer1.") for key in shapes):
        raise CheckpointError(
            f"{file}: its image tower is a ResNet, which is not supported; Vision Transformers are (ViT-B-32, ViT-L-14)"
        )
    if any(key.startswith("text_model.") for key in shapes):
        raise CheckpointError(
            f"{file}: has the keys of Hugging Face; name the folder that holds it and its config.json"
        )

    def shape(key: str, dimensions: int) -> tuple[int, ...]:
        if len(shapes.get(key, ())) != dimensions:
            raise CheckpointError(f"{file}: not a CLIP model of OpenAI, which has {key} with {dimensions} dimensions")
        return shapes[key]

    vision_width, _, _, patch_size = shape("visual.conv1.weight", 4)
    positions, _ = shape("visual.positional_embedding", 2)
    vocab_size, _ = shape("token_embedding.weight", 2)
    context_length, _ = shape("positional_embedding", 2)
    text_width, projection_dim = shape("text_projection", 2)
    grid = math.isqrt(max(positions - 1, 0))
    if grid * grid + 1 != positions:
        raise CheckpointError(f"{file}: visual.positional_embedding has {positions} rows, not one and a square")

    def tower(prefix: str, width: int) -> dict[str, Any]:
        if width % 64:
            raise CheckpointError(f"{file}: {prefix} has width {width}; OpenAI's models have heads of 64, side by side")
        layers = {match[1] for key in shapes if (match := re.match(rf"{re.escape(prefix)}\.(\d+)\.", key))}
        return {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": len(layers),
            "num_attention_heads": width // 64,
        }

    # 2: the feature is taken at the highest id of a text, by OpenAI's encode_text, whatever the vocabulary.
    text = {"vocab_size": vocab_size, "max_position_embeddings": context_length, "eos_token_id": 2}
    vision = {"image_size": grid * patch_size, "patch_size": patch_size}
    raw = {
        "model_type": "clip",
        "projection_dim": projection_dim,
        "text_config": text | tower("transformer.resblocks", text_width),
        "vision_config": vision | tower("visual.transformer.resblocks", vision_width),
    }
    return _parse_config(raw, str(file))
