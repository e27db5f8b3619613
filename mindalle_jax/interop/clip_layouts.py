"""Maps tensors of CLIP files to parameters, for files of Flax, of Hugging Face's PyTorch and of OpenAI."""

import functools
import re
from typing import Any, Literal, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from mindalle_jax.interop.key_maps import SUFFIXES
from mindalle_jax.models.clip import CLIP, ClipConfig
from mindalle_jax.runtime.devices import pinned

# (part of Hugging Face's key, the part that replaces it in OpenAI's key), to be applied from top to bottom.
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
# Tensors that are no weights: sizes, which the shapes of the weights tell too, and the causal mask of some modules.
OPENAI_EXTRAS = re.compile(r"input_resolution|context_length|vocab_size|.*\.attn_mask")

Layout = Literal["flax", "torch", "openai"]
"""flax: paths and arrays of FlaxCLIP. torch: keys and tensors of Hugging Face's CLIPModel. openai: of OpenAI's CLIP."""


class Slot(NamedTuple):
    """One parameter and its place in a file."""

    path: str
    """Path of the Flax parameter, joined by `/`."""
    key: str
    """Key in the file. OpenAI has queries, keys and values under one key."""
    shape: tuple[int, ...]
    """Shape of the tensor `key` in the file."""
    axes: tuple[int, ...]
    """Axes of the file's tensor in the order of the parameter: (1, 0) for a matrix that the file has transposed."""
    third: int | None
    """0, 1 or 2: the third of the file's rows that is this parameter, if it has queries, keys and values in one; or
    None."""

    def from_file(self, array: np.ndarray) -> np.ndarray:
        """Takes the parameter out of the file's tensor `key`."""
        part = array if self.third is None else np.split(array, 3)[self.third]
        return np.asarray(part.transpose(self.axes), order="C")

    def to_file(self, array: np.ndarray) -> np.ndarray:
        """Works as the inverse of from_file, for files that have each parameter under its own key."""
        return array.transpose(np.argsort(self.axes))


def clip_slots(config: ClipConfig, layout: Layout) -> list[Slot]:
    """Returns the place of each parameter in a file of this layout."""
    return [_slot(path, shape, layout) for path, shape in clip_leaf_shapes(config).items()]


def _slot(path: str, shape: tuple[int, ...], layout: Layout) -> Slot:
    unmoved = tuple(range(len(shape)))
    if layout == "flax":
        return Slot(path, path, shape, unmoved, None)
    module, _, last = path.rpartition("/")
    key = f"{module}.{SUFFIXES[last]}".replace("/", ".") if last in SUFFIXES else path.replace("/", ".")
    axes, third = unmoved, None
    if last == "kernel":  # Dense [in, out] is [out, in] in PyTorch, Conv [y, x, in, out] is [out, in, y, x]
        axes = (1, 0) if len(shape) == 2 else (2, 3, 1, 0)
    if layout == "openai":
        if module in ("text_projection", "visual_projection"):
            axes = unmoved  # OpenAI multiplies features from the left with these matrices
        if match := re.search(r"/([qkv])_proj$", module):
            third = "qkv".index(match[1])
        for ours, theirs in OPENAI_NAMES:
            key = key.replace(ours, theirs)
    file_shape = tuple(shape[i] for i in np.argsort(axes))
    if third is not None:
        file_shape = (3 * file_shape[0], *file_shape[1:])
    return Slot(path, key, file_shape, axes, third)


@functools.cache  # tracing the network takes a second
def clip_leaf_shapes(config: ClipConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every parameter by its path. Allocates no arrays."""
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    pixels = jax.ShapeDtypeStruct((1, config.vision.image_size, config.vision.image_size, 3), jnp.float32)
    with pinned():
        variables = jax.eval_shape(CLIP(config).init, jax.random.key(0), ids, pixels)
    flat: dict[str, Any] = flax.traverse_util.flatten_dict(variables["params"], sep="/")
    return {path: tuple(leaf.shape) for path, leaf in flat.items()}
