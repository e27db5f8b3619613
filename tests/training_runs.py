"""What tests of fine-tuning share: small data sets, configurations, and runs as `mindalle finetune` makes them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from mindalle_jax.data.codes import vqgan_digest, write_codes
from mindalle_jax.data.sources import open_source

ROOT = Path(__file__).resolve().parents[1]


class Checkered:
    """Stands in for a VQGAN of 32 x 32 pixels, 8 x 8 codes: the red of one pixel of each cell is its code."""

    size, side, vocab_size = 32, 8, 80

    def encode(self, images: Any, *, batch_size: int) -> np.ndarray:
        return np.asarray(images)[:, ::4, ::4, 0].astype(np.int32)


def caption(number: int) -> str:
    """Another one for each number, of few tokens."""
    return f"{('the', 'cat', 'dog', 'and')[number % 4]} {number // 4}"


def write_pictures(folder: Path, count: int, seed: int = 0, num_codes: int = 80) -> Path:
    """`count` PNGs with a caption each; as codes by Checkered they are random, below num_codes."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        cells = np.repeat(np.repeat(rng.integers(0, num_codes, (8, 8, 1)), 4, 0), 4, 1)
        Image.fromarray(np.broadcast_to(cells, (32, 32, 3)).astype(np.uint8)).save(folder / f"{i:03}.png")
        (folder / f"{i:03}.txt").write_text(caption(i), encoding="utf-8")
    return folder


def write_code_set(folder: Path, model: Path, count: int, seed: int = 0, num_codes: int = 80) -> Path:
    """A data set of codes for the model, of captioned pictures."""
    pictures = write_pictures(folder.with_name(f"{folder.name}-pictures"), count, seed, num_codes)
    write_codes(open_source(pictures, "text"), Checkered(), folder, vqgan=vqgan_digest(model), batch_size=8, threads=1)
    return folder


def write_config(path: Path, model: Path, codes: Path, /, **sections: dict[str, Any]) -> Path:
    """A configuration of 20 updates of 8 pictures; sections: what else it says."""
    tree: dict[str, Any] = {
        "data": {"train": str(codes), "threads": 1},
        "training": {"init_from": str(model), "seed": 3},
        "optimizer": {"base_lr": 1e-3, "max_steps": 20},
        "experiment": {"local_batch_size": 1, "total_batch_size": 8},
    }
    for name, fields in sections.items():
        tree[name] = tree.get(name, {}) | fields
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def start(
    config: Path, out: Path, *overrides: str, devices: int = 1, verb: str = "finetune", **more: str
) -> subprocess.Popen:
    """`mindalle VERB` as a process of its own, with that many CPU devices; more: of its environment."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    if verb == "finetune":  # not for convolutions: what LLVM makes of their gradients runs 100 times as long then
        flags += " --xla_backend_optimization_level=0"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"} | more
    command = [sys.executable, "-m", "mindalle_jax", verb, "--config", config, "--out", out, *overrides]
    return subprocess.Popen(
        list(map(str, command)), cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def metrics(out: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that are whole."""
    path = out / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [entry for line in lines if line.endswith("\n") and (entry := json.loads(line))["kind"] == kind]


def weights_crc32(out: Path) -> dict[str, int]:
    """CRC-32 of every parameter of a model folder's transformer, by its manifest."""
    tensors = json.loads((out / "manifest.json").read_text(encoding="utf-8"))["tensors"]["stage2"]
    return {path: entry["crc32"] for path, entry in tensors.items()}


def checkpoint_arrays(out: Path, step: int | None = None) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by its path, as Orbax reads it without a target."""
    import orbax.checkpoint as ocp

    folder = (out / "checkpoints").absolute()
    step = max(int(path.name) for path in folder.iterdir() if path.name.isdecimal()) if step is None else step
    state = folder / str(step) / "state"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        paths = reader.metadata(state).item_metadata.tree
        as_numpy = {path: ocp.RestoreArgs(restore_type=np.ndarray) for path in paths}
        return reader.restore(state, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
