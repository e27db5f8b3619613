"""Weights of LPIPS from the two PyTorch files that hold them, without PyTorch."""

from pathlib import Path
from typing import Any

import numpy as np

from mindalle_jax.interop.key_maps import check_shapes, to_float32
from mindalle_jax.interop.torch_archive import TorchArchive
from mindalle_jax.models.lpips import VGG_BLOCKS
from mindalle_jax.storage.weights import nest


def read_lpips(vgg: str | Path, linear: str | Path) -> dict[str, Any]:
    """Reads the parameters of models.lpips.LPIPS, as nested float32 arrays of NumPy.

    vgg: file with torchvision's state dict of vgg16 (features.0.weight, ...); its classifier is left out. linear: file
    with the state dict of LPIPS (lin0.model.1.weight, ...; `vgg.pth` of its authors). Raises CheckpointError, which
    lists all tensors that do not fit.
    """
    trunk, heads = {}, {}
    inputs = 3
    for block, (channels, numbers) in enumerate(VGG_BLOCKS):
        for number in numbers:
            trunk[f"features.{number}.weight"] = (channels, inputs, 3, 3)
            trunk[f"features.{number}.bias"] = (channels,)
            inputs = channels
        heads[f"lin{block}.model.1.weight"] = (1, channels, 1, 1)
    leaves = {}
    for key, array in _read(vgg, trunk, "is not the state dict of torchvision's vgg16", "classifier.").items():
        name, last = key.replace("features.", "features_").split(".")
        leaves[f"{name}/{'kernel' if last == 'weight' else last}"] = (
            array.transpose(2, 3, 1, 0) if last == "weight" else array
        )
    for key, array in _read(linear, heads, "does not hold the linear layers of LPIPS for vgg16").items():
        leaves[key.split(".")[0]] = array.reshape(-1)
    return nest(leaves)


def _read(
    file: str | Path, shapes: dict[str, tuple[int, ...]], complaint: str, ignored: str | None = None
) -> dict[str, np.ndarray]:
    """Reads the tensors with these keys and shapes, as float32. Keys that start with `ignored` are skipped."""
    with TorchArchive(file) as archive:
        refs = archive.state_dict()
        found = {key: ref.shape for key, ref in refs.items() if ignored is None or not key.startswith(ignored)}
        check_shapes(found, shapes, f"{file}: {complaint}")
        return {key: to_float32(archive.read(refs[key]), str(file), key) for key in shapes}
