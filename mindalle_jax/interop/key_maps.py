"""Tables that map PyTorch keys to parts of Flax parameters, and the check of a file against a table.

A table row is (pattern of the Flax path, template of the PyTorch key). Every Flax leaf matches exactly one row, and
every PyTorch key is used exactly once. The same rows serve both directions.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from mindalle_jax.config.schema import Config
from mindalle_jax.errors import CheckpointError
from mindalle_jax.storage.weights import Stage, leaf_shapes

VQGAN_ROWS = [
    (r"codebook", "quantize.embedding.weight"),
    (r"(quant_conv|post_quant_conv)", r"\1"),
    (r"(encoder|decoder)/(conv_in|conv_out|norm_out)", r"\1.\2"),
    (r"(encoder|decoder)/mid_(block|attn)_(\d)/(\w+)", r"\1.mid.\2_\3.\4"),
    (r"encoder/down_(\d+)_downsample_conv", r"encoder.down.\1.downsample.conv"),
    (r"decoder/up_(\d+)_upsample_conv", r"decoder.up.\1.upsample.conv"),
    (r"(encoder/down|decoder/up)_(\d+)_(block|attn)_(\d+)/(\w+)", r"\1.\2.\3.\4.\5"),
]

# {l} is the layer; a row with several keys fills the slots 0, 1, 2 of the axis that follows the layer axis.
TRANSFORMER_ROWS = [
    (r"((?:tok|pos)_emb_(?:img|txt))", (r"\1",)),
    (r"(sos)", (r"\1",)),
    (r"(head|head_img|head_txt|ln_f)", (r"\1",)),
    (r"blocks/(ln1|ln2)", (r"blocks.{l}.\1",)),
    (r"blocks/qkv", ("blocks.{l}.attn.query", "blocks.{l}.attn.key", "blocks.{l}.attn.value")),
    (r"blocks/proj", ("blocks.{l}.attn.proj",)),
    (r"blocks/fc1", ("blocks.{l}.mlp.0",)),
    (r"blocks/fc2", ("blocks.{l}.mlp.2",)),
]

SUFFIXES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "weight": "weight", "bias": "bias"}
"""Last part of a Flax path -> last part of a PyTorch key."""


class Slot(NamedTuple):
    """One PyTorch tensor and its place in a Flax leaf."""

    path: str
    """Flax path of the leaf, joined by `/`."""
    index: tuple[int, ...]
    """Index of the part of the leaf: () is all of it, (layer,) one layer, (layer, 0) the queries of one layer."""
    torch_key: str
    torch_shape: tuple[int, ...]

    def from_torch(self, array: np.ndarray) -> np.ndarray:
        """Converts an array to its form in the leaf: convolutions from [out, in, y, x] to [y, x, in, out]."""
        return array.transpose(2, 3, 1, 0) if self._is_convolution else array

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """Converts an array back to the PyTorch shape."""
        return (array.transpose(3, 2, 0, 1) if self._is_convolution else array).reshape(self.torch_shape)

    @property
    def _is_convolution(self) -> bool:
        return self.path.endswith("kernel")


def slots(config: Config, stage: Stage) -> list[Slot]:
    """Returns all PyTorch tensors of a stage, leaf by leaf, and within a leaf in the order of its memory."""
    expand: Callable[[str, tuple[int, ...], Config], Iterable[Slot]]
    expand = _vqgan_slots if stage == "stage1" else _transformer_slots
    return [slot for path, shape in leaf_shapes(config, stage).items() for slot in expand(path, shape, config)]


def check_keys(found: Mapping[str, tuple[int, ...]], wanted: list[Slot], file: str, stage: Stage) -> None:
    """Raises CheckpointError, which lists all differences, if the keys or shapes of a file do not fit a table."""
    expected = {slot.torch_key: slot.torch_shape for slot in wanted}
    check_shapes(found, expected, f"{file}: does not fit the {stage} of config.yaml", _hint(found, expected, stage))


def check_shapes(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], complaint: str, hint: str = ""
) -> None:
    """Raises CheckpointError if keys or shapes differ: `complaint`, their number, `hint`, and up to 40 differences."""
    lines = [f"missing     {key} {list(shape)}" for key, shape in expected.items() if key not in found]
    lines += [f"unexpected  {_shown(key)} {list(shape)}" for key, shape in found.items() if key not in expected]
    lines += [
        f"shape       {key} is {list(found[key])}, the config says {list(shape)}"
        for key, shape in expected.items()
        if key in found and tuple(found[key]) != shape
    ]
    if lines:
        shown = lines[:40] + ([f"... and {len(lines) - 40} more"] if len(lines) > 40 else [])
        raise CheckpointError(f"{complaint}, {len(lines)} differences{hint}:\n  " + "\n  ".join(shown))


def to_float32(array: np.ndarray, file: str, key: str) -> np.ndarray:
    """Converts weights to float32. Raises CheckpointError for numbers that are no floats, NaN or infinite."""
    if array.dtype.name not in ("float32", "float16", "bfloat16", "float64"):
        raise CheckpointError(f"{file}: {key} is {array.dtype}, not floating point")
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf, which is refused below
        array = array.astype(np.float32, copy=False)
    # min and max pass NaN on, and need no temporary array.
    if array.size and not (np.isfinite(array.min()) and np.isfinite(array.max())):
        raise CheckpointError(f"{file}: {key} holds NaN or infinite values (in float32)")
    return array


def _shown(key: str) -> str:
    return key if len(key) <= 200 and key.isprintable() else repr(key[:200])


def _vqgan_slots(path: str, shape: tuple[int, ...], config: Config) -> list[Slot]:
    if path == "codebook":
        return [Slot(path, (), "quantize.embedding.weight", shape)]
    module, _, last = path.rpartition("/")
    key = f"{_match(module, VQGAN_ROWS)}.{SUFFIXES[last]}".replace("/", ".")
    torch_shape = (shape[3], shape[2], shape[0], shape[1]) if last == "kernel" else shape
    return [Slot(path, (), key, torch_shape)]


def _transformer_slots(path: str, shape: tuple[int, ...], config: Config) -> list[Slot]:
    module, _, last = path.rpartition("/")
    if module == "sos" and not config.stage2.use_cls_cond:  # one learned vector, a bare parameter [1, 1, d] in PyTorch
        return [Slot(path, (), "sos", (1, *shape))]
    templates = _match(module, TRANSFORMER_ROWS)
    keys = [f"{template}.{SUFFIXES[last]}" for template in templates]
    if not module.startswith("blocks/"):
        return [Slot(path, (), keys[0], shape)]
    result = []
    for layer in range(shape[0]):
        for i, key in enumerate(keys):
            index = (layer, i) if len(keys) > 1 else (layer,)
            result.append(Slot(path, index, key.format(l=layer), shape[len(index) :]))
    return result


def _match(module: str, rows: list[tuple[str, Any]]) -> Any:
    """Returns the template of the one row whose pattern matches all of `module`, with its groups filled in."""
    hits = [(match, template) for pattern, template in rows if (match := re.fullmatch(pattern, module))]
    if len(hits) != 1:
        raise AssertionError(f"{len(hits)} table rows match the Flax module {module!r}; there must be one")
    match, template = hits[0]
    return match.expand(template) if isinstance(template, str) else tuple(match.expand(t) for t in template)


def _hint(found: Mapping[str, Any], expected: Mapping[str, Any], stage: Stage) -> str:
    """Returns a guess of the mistake that explains the keys of the file, or ""."""
    if not found:
        return " (the file holds no tensors)"
    other = "quantize.embedding.weight" if stage == "stage2" else "tok_emb_img.weight"
    if other in found:
        return f" (this is a checkpoint of {'stage1' if stage == 'stage2' else 'stage2'})"
    if stage == "stage2" and "sos" in expected and "sos.weight" in found:
        return " (this is a class-conditional model: set stage2.use_cls_cond)"
    if stage == "stage2" and "sos.weight" in expected and "sos" in found:
        return " (this is an unconditional model: set stage2.use_cls_cond to false)"
    if stage == "stage2" and "head_txt.weight" in expected and "head.weight" in found:
        return " (this is an image-only model: set stage2.type to igpt)"
    if stage == "stage2" and "head_txt.weight" in found and "head.weight" in expected:
        return " (this is a text-to-image model: set stage2.type to transformer1d)"
    return ""
