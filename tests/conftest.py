"""What all tests share: eight CPU devices, a cache folder of their own, and small models in every format.

The environment is set before anything imports jax, which reads it once.
"""

import os

DEVICES = 8
os.environ["JAX_PLATFORMS"] = "cpu"
flags = os.environ.get("XLA_FLAGS", "")
if "optimization_level" not in flags:
    # Most of the time goes into compiling programs that run once: without optimisation it takes two thirds as long.
    flags += " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={DEVICES}".strip()
# Where a person told JAX to keep compiled programs is none of the tests' business: they count compilations.
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)

import dataclasses
import json
import string
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from clip_oracle import random_model
from commands import ROOT, Installed
from golden_sets import GOLDEN_SETS

from mindalle_jax import Dalle
from mindalle_jax.config.file import dump_config, parse_config
from mindalle_jax.config.schema import Config
from mindalle_jax.interop.clip import write_clip
from mindalle_jax.interop.key_maps import slots
from mindalle_jax.interop.mindalle import import_checkpoint
from mindalle_jax.interop.torch_archive import write_torch_archive
from mindalle_jax.storage.model_folder import STAGE_FILES
from mindalle_jax.storage.weights import MANIFEST, Stage, leaf_shapes, nest
from mindalle_jax.text.tokenizer import MERGES_FILE, VOCAB_FILE

MERGES = ["c a", "ca t</w>", "t h", "th e</w>", "a n", "an d</w>", "d o", "do g</w>", "e r", "1 2</w>"]
"""Merges of the tiny vocabulary: cat, the, and, dog, and the ends of 12."""


def _tiny_vocab() -> dict[str, int]:
    characters = [*string.ascii_lowercase, *string.digits, *"!?,.-'&éü東"]
    tokens = ["[UNK]", "[PAD]", *characters, *(c + "</w>" for c in characters)]
    tokens += [merge.replace(" ", "") for merge in MERGES]
    return {token: i for i, token in enumerate(tokens)}


# 32 x 32 pixels, 8 x 8 codes out of 80, 2 layers of width 32 with 4 heads, 12 text positions. No two sizes are equal
# where exchanging them would go unseen.
TINY = """
dataset: {tokenizer_type: CharBPE, context_length: 12, image_resolution: 32}
stage1:
  type: vqgan
  embed_dim: 16
  n_embed: 80
  hparams: {z_channels: 24, resolution: 32, ch: 32, ch_mult: [1, 1, 2], num_res_blocks: 1, attn_resolutions: [8]}
stage2:
  type: transformer1d
  vocab_size_txt: 110
  vocab_size_img: 80
  hparams: {embed_dim: 32, n_layers: 2, n_heads: 4, ctx_len_img: 64, ctx_len_txt: 12}
"""


def pytest_configure(config: pytest.Config) -> None:
    if len(jax.devices()) != DEVICES:
        raise pytest.UsageError(f"the tests need {DEVICES} CPU devices, jax has {jax.devices()}")


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of this run: tests never touch that of the user."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["MINDALLE_CACHE"] = str(folder)
    return folder


@pytest.fixture
def compilations() -> Iterator[list[float]]:
    """A list that grows by one, the seconds taken, with every program that XLA compiles."""
    seconds: list[float] = []

    def listen(event: str, duration: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seconds
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="session", params=GOLDEN_SETS)
def golden(request: pytest.FixtureRequest) -> Path:
    """Folder of each set of arrays of the original implementation."""
    return GOLDEN_SETS[request.param]


@pytest.fixture(scope="session")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the source distribution, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


@pytest.fixture(scope="session")
def installed(distributions: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel, installed outside the checkout."""
    folder = tmp_path_factory.mktemp("installed")
    (wheel,) = distributions.glob("*.whl")
    options = ["--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", "--target", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(wheel)], check=True, timeout=120)
    return Installed(folder)


@pytest.fixture(scope="session")
def oracle():
    """The module torch_oracle: the same networks in PyTorch."""
    torch = pytest.importorskip("torch", reason="the oracle is torch, pinned for Python 3.11 only")
    import torch_oracle

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # thousands of tiny operations: waiting for a second thread costs more than the work
    yield torch_oracle
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_config() -> Config:
    """The configuration of the tiny text-to-image model."""
    return parse_config(TINY)


@pytest.fixture(scope="session")
def tiny_igpt_config(tiny_config: Config) -> Config:
    """A class-conditional image-only model of the same sizes, 5 classes."""
    hparams = dataclasses.replace(tiny_config.stage2.hparams, n_classes=5)
    stage2 = dataclasses.replace(tiny_config.stage2, type="igpt", use_cls_cond=True, hparams=hparams)
    return dataclasses.replace(tiny_config, stage2=stage2)


def random_tensors(config: Config, stage: Stage, seed: int = 0) -> dict[str, np.ndarray]:
    """A float32 state_dict of a stage, every parameter off its initial value, activations and logits of order one."""
    rng = np.random.default_rng([seed, stage == "stage2"])
    tensors = {}
    for slot in slots(config, stage):
        key, shape = slot.torch_key, slot.torch_shape
        if key.endswith("bias"):
            mean, std = 0.0, 0.1
        elif len(shape) == 1:  # gains of norms
            mean, std = 1.0, 0.2
        elif "emb" in key or key.startswith("sos"):  # embedding tables and the codebook
            mean, std = 0.0, 0.5
        else:
            mean, std = 0.0, float(np.prod(shape[1:])) ** -0.5
        tensors[key] = (mean + std * rng.standard_normal(shape)).astype(np.float32)
    return tensors


def write_original_folder(folder: Path, config: Config, seed: int = 0) -> Path:
    """A folder in the original's format with random weights: config.yaml, tokenizer/, the two .ckpt files."""
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    (folder / "tokenizer" / VOCAB_FILE).write_text(json.dumps(_tiny_vocab(), ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer" / MERGES_FILE).write_text("\n".join(["#version: 0.2", *MERGES, ""]), encoding="utf-8")
    for stage, name in STAGE_FILES.items():
        tensors = random_tensors(config, stage, seed)
        header = [(key, array.dtype, array.shape) for key, array in tensors.items()]
        write_torch_archive(folder / name, header, tensors.__getitem__)
    return folder


@pytest.fixture(scope="session")
def write_folder():
    """write_folder(folder, config, seed=0) -> folder: a folder in the original's format with random weights."""
    return write_original_folder


def flax_params(config: Config, stage: Stage, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters in the layout of training from a state_dict of NumPy arrays, by the project's own tables."""
    leaves = {path: np.full(shape, np.nan, np.float32) for path, shape in leaf_shapes(config, stage).items()}
    table = slots(config, stage)
    assert {slot.torch_key: slot.torch_shape for slot in table} == {k: tuple(v.shape) for k, v in tensors.items()}
    for slot in table:
        part = leaves[slot.path][slot.index]
        part[...] = slot.from_torch(np.asarray(tensors[slot.torch_key])).reshape(part.shape)
    assert not any(np.isnan(leaf).any() for leaf in leaves.values()), "a part of a parameter was not filled"
    return nest(leaves)


@pytest.fixture(scope="session")
def to_params():
    """to_params(config, stage, tensors) -> parameters of the Flax network from a PyTorch state_dict as NumPy arrays."""
    return flax_params


@pytest.fixture(scope="session")
def random_params():
    """random_params(config, stage, seed=0) -> random parameters of the Flax network in the layout of training."""
    return lambda config, stage, seed=0: flax_params(config, stage, random_tensors(config, stage, seed))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, tiny_config: Config) -> Path:
    """The tiny text-to-image model in the original's format. Read only: copy it before changing it."""
    return write_original_folder(tmp_path_factory.mktemp("original") / "tiny", tiny_config)


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """The tiny model converted, as if trained with caption dropout. Read only: copy it before changing it."""
    folder = import_checkpoint(tiny_folder, tmp_path_factory.mktemp("converted") / "tiny").target
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    (folder / MANIFEST).write_text(json.dumps(manifest | {"caption_dropout": 0.1}, indent=1), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_dalle(tiny_model_folder: Path) -> Dalle:
    """The tiny model loaded, float32, on one device."""
    return Dalle.from_pretrained(tiny_model_folder, mesh=jax.sharding.Mesh(jax.devices()[:1], ("data",)))


@pytest.fixture(scope="session")
def tiny_images(tiny_dalle: Dalle) -> np.ndarray:
    """f32[3, 32, 32, 3] in [0, 1]: images of random codes."""
    return tiny_dalle.decode_codes(np.random.default_rng(0).integers(0, 80, (3, 64)))


@pytest.fixture(scope="session")
def tiny_igpt_model_folder(tmp_path_factory: pytest.TempPathFactory, tiny_igpt_config: Config) -> Path:
    """The tiny image-only model converted. Read only: copy it before changing it."""
    source = write_original_folder(tmp_path_factory.mktemp("original") / "tiny-igpt", tiny_igpt_config)
    return import_checkpoint(source, tmp_path_factory.mktemp("converted") / "tiny-igpt").target


@pytest.fixture(scope="session")
def tiny_clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of random weights in a Hugging Face folder. Read only."""
    folder = tmp_path_factory.mktemp("clip")
    write_clip(folder / "tiny-clip", random_model("quick-gelu", folder / "tokenizer"))
    return folder / "tiny-clip"
