"""Small CLIP models in every format, and the same networks in PyTorch: transformers' CLIPModel and OpenAI's layout.

Imports neither torch nor transformers until a function that needs one is called.
"""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mindalle_jax.interop.clip import ClipModel
from mindalle_jax.models.clip import CLIP, ClipConfig, ClipTextConfig, ClipVisionConfig
from mindalle_jax.text.clip_tokenizer import read_clip_tokenizer

MERGES = ["c a", "ca t</w>", "t h", "th e</w>", "a n", "an d</w>", "Ã ©</w>", "' s</w>", "d o", "do g</w>"]
"""Merges of the tiny vocabulary: cat, the, and, dog, 's, and é at the end of a word (its two bytes)."""


def tiny_vocab() -> dict[str, int]:
    """The symbols of all bytes, the same at the end of a word, the merges, and the two special tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [*map(chr, printable), *(chr(256 + i) for i in range(256 - len(printable)))]
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), *(merge.replace(" ", "") for merge in MERGES)]
    return {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}


VOCAB_SIZE = 512 + len(MERGES) + 2
# No two sizes of a model are equal where exchanging them would go unseen.
CONFIGS = {
    "quick-gelu": ClipConfig(
        ClipTextConfig(VOCAB_SIZE, 48, 80, 2, 4, 16, eos_token_id=VOCAB_SIZE - 1),
        ClipVisionConfig(40, 64, 3, 5, 32, 8),
        projection_dim=24,
    ),
    "gelu": ClipConfig(
        ClipTextConfig(VOCAB_SIZE + 5, 32, 72, 1, 2, 12, "gelu", 1e-6, eos_token_id=2),
        ClipVisionConfig(56, 60, 2, 7, 30, 7, "gelu", 1e-6),  # two rows of pixels are left over
        projection_dim=20,
    ),
    # What OpenAI's files can hold: heads of 64, MLPs of 4 widths, quick-GELU.
    "openai": ClipConfig(
        ClipTextConfig(VOCAB_SIZE, 64, 256, 2, 1, 20, eos_token_id=2),
        ClipVisionConfig(128, 512, 1, 2, 32, 16),
        projection_dim=36,
    ),
}


def write_vocab(folder: Path) -> Path:
    """vocab.json and merges.txt of the tiny vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(tiny_vocab(), ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]), encoding="utf-8")
    return folder


def random_model(name: str, folder: Path) -> ClipModel:
    """A model of CONFIGS[name] with random weights, every one off its initial value; `folder` is for its tokenizer."""
    config, rng = CONFIGS[name], np.random.default_rng(len(name))
    pixels = np.zeros((1, config.vision.image_size, config.vision.image_size, 3), np.float32)
    shapes = jax.eval_shape(CLIP(config).init, jax.random.key(0), np.zeros((1, 4), np.int32), pixels)["params"]

    def draw(path: Any, leaf: Any) -> np.ndarray:
        last = path[-1].key
        mean = {"scale": 1.0, "logit_scale": 2.66}.get(last, 0.0)
        std = float(np.prod(leaf.shape[:-1])) ** -0.5 if last == "kernel" else 0.2
        return np.asarray(mean + std * rng.standard_normal(leaf.shape), np.float32)

    params = jax.tree_util.tree_map_with_path(draw, shapes)
    return ClipModel(config, params, read_clip_tokenizer(write_vocab(folder), config.text))


def inputs(config: ClipConfig) -> tuple[np.ndarray, np.ndarray]:
    """int32[10, s] and f32[3, y, x, 3]. Five texts that end at different places, with lower ids behind, and the same
    five with nothing but end tokens behind."""
    rng = np.random.default_rng(0)
    length, size = config.text.max_position_embeddings, config.vision.image_size
    ids = rng.integers(0, VOCAB_SIZE - 2, (5, length)).astype(np.int32)
    ids[:, 0] = VOCAB_SIZE - 2
    ids[np.arange(5), [1, 3, 4, length - 2, length - 1]] = VOCAB_SIZE - 1
    has_ended = np.maximum.accumulate(ids == VOCAB_SIZE - 1, axis=1)
    ids = np.concatenate([ids, np.where(has_ended, VOCAB_SIZE - 1, ids)]).astype(np.int32)
    return ids, rng.standard_normal((3, size, size, 3)).astype(np.float32)


def features(model: ClipModel, dtype: Any = np.float32) -> tuple[np.ndarray, np.ndarray]:
    """Of inputs(): f32[10, e] of the texts and f32[3, e] of the pictures."""
    # Each network runs once: LLVM need not optimise what compiling takes 100 times as long as running.
    options = {"xla_backend_optimization_level": "0"}
    apply = jax.jit(CLIP(model.config, dtype=dtype).apply, compiler_options=options)
    with jax.default_matmul_precision("highest"):
        text, image, _ = apply({"params": model.params}, *inputs(model.config))
    return np.asarray(text), np.asarray(image)


def transformers_model(config: ClipConfig, state: dict[str, np.ndarray]) -> Any:
    """transformers' CLIPModel with these weights."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    fields = {"text_config": dataclasses.asdict(config.text), "vision_config": dataclasses.asdict(config.vision)}
    model = CLIPModel(CLIPConfig(projection_dim=config.projection_dim, **fields)).eval()
    buffers = {key: value for key, value in model.state_dict().items() if key.endswith("position_ids")}
    model.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()} | buffers)
    return model


def transformers_features(model: Any, config: ClipConfig) -> tuple[np.ndarray, np.ndarray]:
    """features() of transformers' CLIPModel."""
    import torch

    ids, pixels = (torch.from_numpy(array) for array in inputs(config))
    with torch.inference_mode():
        text = model.get_text_features(input_ids=ids.long()).pooler_output
        image = model.get_image_features(pixel_values=pixels.permute(0, 3, 1, 2)).pooler_output
    return text.numpy(), image.numpy()


def openai_model(config: ClipConfig) -> Any:
    """A module with the parameter names of OpenAI's clip/model.py that computes its features of texts and pictures."""
    import torch
    from torch import nn

    class QuickGELU(nn.Module):
        def forward(self, x):
            return x * torch.sigmoid(1.702 * x)

    class Block(nn.Module):
        def __init__(self, width: int, mask: Any):
            super().__init__()
            self.attn = nn.MultiheadAttention(width, width // 64)
            self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.mlp = nn.Sequential()
            self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
            self.mlp.add_module("gelu", QuickGELU())
            self.mlp.add_module("c_proj", nn.Linear(4 * width, width))
            self.attn_mask = mask

        def forward(self, x):  # [s, b, d]
            y = self.ln_1(x)
            x = x + self.attn(y, y, y, need_weights=False, attn_mask=self.attn_mask)[0]
            return x + self.mlp(self.ln_2(x))

    class Transformer(nn.Module):
        def __init__(self, width: int, layers: int, mask: Any = None):
            super().__init__()
            self.resblocks = nn.Sequential(*(Block(width, mask) for _ in range(layers)))

        def forward(self, x):
            return self.resblocks(x.permute(1, 0, 2)).permute(1, 0, 2)

    class Visual(nn.Module):
        def __init__(self, c: ClipVisionConfig, features: int):
            super().__init__()
            self.conv1 = nn.Conv2d(3, c.hidden_size, c.patch_size, c.patch_size, bias=False)
            self.class_embedding = nn.Parameter(torch.randn(c.hidden_size))
            positions = (c.image_size // c.patch_size) ** 2 + 1
            self.positional_embedding = nn.Parameter(torch.randn(positions, c.hidden_size))
            self.ln_pre, self.ln_post = nn.LayerNorm(c.hidden_size), nn.LayerNorm(c.hidden_size)
            self.transformer = Transformer(c.hidden_size, c.num_hidden_layers)
            self.proj = nn.Parameter(c.hidden_size**-0.5 * torch.randn(c.hidden_size, features))

        def forward(self, x):
            x = self.conv1(x).flatten(2).permute(0, 2, 1)
            x = torch.cat([self.class_embedding.expand(x.shape[0], 1, -1), x], dim=1) + self.positional_embedding
            return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj

    class OpenAICLIP(nn.Module):
        def __init__(self, config: ClipConfig):
            super().__init__()
            c = config.text
            self.visual = Visual(config.vision, config.projection_dim)
            mask = torch.full((c.max_position_embeddings, c.max_position_embeddings), float("-inf")).triu(1)
            self.transformer = Transformer(c.hidden_size, c.num_hidden_layers, mask)
            self.token_embedding = nn.Embedding(c.vocab_size, c.hidden_size)
            self.positional_embedding = nn.Parameter(torch.randn(c.max_position_embeddings, c.hidden_size))
            self.ln_final = nn.LayerNorm(c.hidden_size)
            self.text_projection = nn.Parameter(c.hidden_size**-0.5 * torch.randn(c.hidden_size, config.projection_dim))
            self.logit_scale = nn.Parameter(torch.tensor(2.66))

        def forward(self, image, text):
            x = self.ln_final(self.transformer(self.token_embedding(text) + self.positional_embedding))
            return x[torch.arange(x.shape[0]), text.argmax(dim=-1)] @ self.text_projection, self.visual(image)

    torch.manual_seed(0)
    model = OpenAICLIP(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def openai_features(model: Any, config: ClipConfig) -> tuple[np.ndarray, np.ndarray]:
    """features() of openai_model()."""
    import torch

    ids, pixels = (torch.from_numpy(array) for array in inputs(config))
    with torch.inference_mode():
        text, image = model(pixels.permute(0, 3, 1, 2), ids.long())
    return text.numpy(), image.numpy()


def save_script(config: ClipConfig, path: Path, is_traced: bool) -> None:
    """openai_model() as a TorchScript archive like OpenAI's: float16, and three numbers as buffers."""
    import torch

    model = openai_model(config)
    for name in ("input_resolution", "context_length", "vocab_size"):
        model.register_buffer(name, torch.tensor(7))
    ids, pixels = (torch.from_numpy(array) for array in inputs(config))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # of checks in nn.MultiheadAttention
        script = (
            torch.jit.trace(model, (pixels.permute(0, 3, 1, 2), ids.long())) if is_traced else torch.jit.script(model)
        )
        script.half().save(path)
