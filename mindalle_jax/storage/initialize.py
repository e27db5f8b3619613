"""Makes fresh weights, from which a transfer or a model from scratch starts."""

import hashlib
import math
import zlib
from functools import partial
from pathlib import Path

import numpy as np

from mindalle_jax.config.file import dump_config, load_config
from mindalle_jax.config.schema import Config
from mindalle_jax.errors import ConfigError
from mindalle_jax.runtime.cache import cache_dir
from mindalle_jax.storage.files import new_folder
from mindalle_jax.storage.results import write_model
from mindalle_jax.storage.weights import fingerprint, map_weights, read_manifest

SHARED = ("tok_emb_img/", "pos_emb_img/", "blocks/", "ln_f/")
"""Starts of the paths of parameters that an image-only model takes over from a text-to-image model."""
CODE_ROWS = ("tok_emb_img/embedding", "head_img/weight", "head/weight")
"""Paths of parameters with one row per code."""


def check_upstream(upstream: Config, config: Config) -> None:
    """Raises ConfigError, which lists all differences, if a model of `config` cannot take weights from `upstream`."""
    theirs, ours = upstream.stage2.hparams, config.stage2.hparams
    fields = ("embed_dim", "n_layers", "n_heads", "ctx_len_img", "mlp_bias", "attn_bias", "gelu_use_approx")
    lines = [
        f"stage2.hparams.{name} {getattr(ours, name)!r}, upstream {getattr(theirs, name)!r}"
        for name in fields
        if getattr(ours, name) != getattr(theirs, name)
    ]
    if config.stage1 != upstream.stage1:
        lines.append("stage1 must be the same")
    if upstream.image_only or not config.image_only:
        lines.append("stage2.type: a transfer goes from transformer1d to igpt")
    if lines:
        raise ConfigError(f"the model to start from does not fit: {'; '.join(lines)}")


def cached_transfer(upstream: Path, config: Config, *, head: str, seed: int) -> Path:
    """Returns a cached folder that write_transfer wrote; it is made once per model, configuration, head and seed."""
    about = f"{fingerprint(read_manifest(upstream)['tensors'])}\n{dump_config(config)}\n{head} {seed}"
    target = cache_dir() / "transfer" / f"{upstream.name}-{hashlib.sha256(about.encode()).hexdigest()[:16]}"
    if not target.exists():
        write_transfer(upstream, config, target, head=head, seed=seed)
    return target


def write_transfer(upstream: Path, config: Config, target: Path, *, head: str = "fresh", seed: int = 0) -> None:
    """Writes a folder with an image-only model of `config` that starts from a text-to-image model.

    Embedding tables of codes and blocks are taken over. Start vectors are random: N(0, 0.02) with classes, N(0, 1)
    without. The head is random, N(0, 0.02), unless head is "head_img", which takes over the head of the text-to-image
    model. Raises ConfigError, CheckpointError or OutputError.
    """
    check_upstream(load_config(upstream / "config.yaml"), config)
    tensors = read_manifest(upstream)["tensors"]["stage2"]
    theirs = map_weights(upstream / "stage2.safetensors", tensors)

    def leaf(path: str, shape: tuple[int, ...]) -> np.ndarray:
        if path.startswith(SHARED):
            return theirs[path]
        if path == "head/weight" and head == "head_img":
            return theirs["head_img/weight"]
        if path == "pos_emb_img/embedding":
            return place_rows(config.stage1.code_size, shape[1])
        std = 1.0 if path.startswith("sos") and not config.stage2.use_cls_cond else 0.02
        draw = np.random.default_rng([seed, path == "head/weight"]).standard_normal(shape, np.float32)
        return draw * np.float32(std)

    with new_folder(target) as folder:
        write_model(upstream, config, folder, leaf, f"transfer from {upstream.name}")


def write_fresh(vqgan: Path, tokenizer: Path, config: Config, target: Path, *, seed: int = 0) -> None:
    """Writes a folder with a fresh transformer of `config` over the codes of the VQGAN in the folder `vqgan`.

    As in the original, weights are from N(0, 0.02), the start vector without classes from N(0, 1), biases are 0 and
    gains 1. Two things differ. Rows of embedding tables have the deviation 1 / sqrt(embed_dim). And codes that look
    alike start alike: their rows of the table and of the head are a random projection of their rows of the codebook.
    Positions of codes start as `place_rows`, and positions of text as `order_rows`.

    tokenizer: folder of the tokenizer, used only for text-to-image models. Raises CheckpointError or OutputError.
    """
    stage1 = map_weights(vqgan / "stage1.safetensors", read_manifest(vqgan)["tensors"]["stage1"])
    codebook = np.array(stage1["codebook"], np.float32)  # [n, e]
    codebook -= codebook.mean(axis=0)
    codebook /= max(float(codebook.std()), 1e-12) * math.sqrt(codebook.size / len(codebook))

    def leaf(path: str, shape: tuple[int, ...]) -> np.ndarray:
        if path.endswith(("/bias", "/scale")):
            return np.full(shape, path.endswith("/scale"), np.float32)
        normal = partial(np.random.default_rng([seed, zlib.crc32(path.encode())]).standard_normal, dtype=np.float32)
        if path in CODE_ROWS:
            return codebook @ normal((codebook.shape[1], shape[1])) / np.float32(math.sqrt(shape[1]))
        if path == "pos_emb_img/embedding":
            return place_rows(config.stage1.code_size, shape[1])
        if path == "pos_emb_txt/embedding":
            return order_rows(*shape)
        if path == "tok_emb_txt/embedding":
            return normal(shape) / np.float32(math.sqrt(shape[1]))
        std = 1.0 if path.startswith("sos") and not config.stage2.use_cls_cond else 0.02
        return normal(shape) * np.float32(std)

    with new_folder(target) as folder:
        about = {} if config.image_only else {"caption_dropout": 0.0}
        source = f"fresh, for the codes of {vqgan.name}"
        write_model(vqgan, config, folder, leaf, source, about=about, tokenizer=tokenizer)


def place_rows(side: int, width: int) -> np.ndarray:
    """Returns f32[side * side, width]: sines and cosines of the row and of the column of each code, row by row.

    So a code at a fixed distance is found in the same way from every position.
    """
    axis = _waves(side, math.ceil(width / 4))
    rows = np.concatenate([np.repeat(axis, side, axis=0), np.tile(axis, (side, 1))], axis=1)[:, :width]
    return (rows / math.sqrt(width)).astype(np.float32)


def order_rows(length: int, width: int) -> np.ndarray:
    """Returns f32[length, width]: sines and cosines of positions 0, 1, ..., with amplitude 1 / sqrt(width).

    Periods are from 2.5 positions to 4 * length, in equal ratios. Vaswani et al. 2017, arXiv:1706.03762, section 3.5.
    """
    return (_waves(length, math.ceil(width / 2))[:, :width] / math.sqrt(width)).astype(np.float32)


def _waves(length: int, count: int) -> np.ndarray:
    """Returns f64[length, 2 * count]: first the sines, then the cosines."""
    angles = 2 * np.pi * np.arange(length)[:, None] / np.geomspace(2.5, 4 * length, count)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
