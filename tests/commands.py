"""What the tests of the commands read: messages, results and folders."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mindalle_jax.interop.torch_archive import TorchArchive, write_torch_archive

ROOT = Path(__file__).resolve().parents[1]


def message(err: str, verb: str = "sample") -> str:
    """The one line of an error, where there is nothing else."""
    assert err.startswith(f"mindalle {verb}: ") and err.endswith("\n") and err.count("\n") == 1, err
    return err[len(f"mindalle {verb}: ") : -1]


def meta(folder: Path) -> dict:
    return json.loads((folder / "meta.json").read_text(encoding="utf-8"))


def codes(folder: Path) -> np.ndarray:
    """Codes [n, h * w] by meta.json."""
    return np.asarray([image["codes"] for image in meta(folder)["pictures"]])


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def edit_checkpoint(path: Path, edit) -> None:
    """Rewrites a checkpoint after `edit(tensors)` has changed the dict of its tensors, or returned another."""
    with TorchArchive(path) as archive:
        tensors = {key: archive.read(ref) for key, ref in archive.state_dict().items()}
    result = edit(tensors)
    tensors = result if isinstance(result, dict) else tensors
    path.unlink()
    write_torch_archive(path, [(key, a.dtype, a.shape) for key, a in tensors.items()], tensors.__getitem__)


class Installed(NamedTuple):
    """The package as its wheel installs it, in a folder outside the checkout."""

    folder: Path

    def run(
        self, *arguments: object, cwd: Path, timeout_s: int = 120, **environment: str
    ) -> subprocess.CompletedProcess:
        """Runs Python with this package in its path, and a terminal that is 80 columns wide."""
        variables = os.environ | {"PYTHONPATH": str(self.folder), "COLUMNS": "80", **environment}
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=timeout_s)


def python(*arguments, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, **options)
