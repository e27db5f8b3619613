"""Checkpoints as trainings leave them: the weights are found beside the optimizer, and below wrappers of the module."""

import numpy as np
import pytest

from mindalle_jax.errors import CheckpointError
from mindalle_jax.interop.torch_archive import TorchArchive

torch = pytest.importorskip("torch", reason="the oracle is torch, pinned for Python 3.11 only")


def weights(prefix: str = "") -> dict:
    return {f"{prefix}head.weight": torch.arange(6.0).reshape(2, 3), f"{prefix}tok.bias": torch.ones(3)}


def optimizer() -> dict:
    return {"state": {0: {"step": 3, "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}


FILES = {
    "plain": weights,
    "Lightning": lambda: {"state_dict": weights(), "epoch": 3, "optimizer_states": [optimizer()]},
    "model and optimizer": lambda: {"model": weights(), "optimizer": optimizer(), "epoch": 3},
    "model_state_dict": lambda: {"epoch": 3, "model_state_dict": weights(), "optimizer_state_dict": optimizer()},
    "DeepSpeed": lambda: {"module": weights(), "optimizer": None, "global_steps": 7, "ds_config": {}},
    "net": lambda: {"net": weights(), "acc": 0.9},
    "the name of the architecture": lambda: {"arch": "vit", "module": "vit", "net": weights()},
    "two wrappers": lambda: {"model": {"state_dict": weights(), "version": 1}},
    "DistributedDataParallel": lambda: weights("module."),
    "Fabric": lambda: {"model": weights("_forward_module.")},
    "torch.compile": lambda: {"state_dict": weights("_orig_mod.")},
    "an averaged model": lambda: weights("module.") | {"n_averaged": torch.tensor(7)},
    "all at once": lambda: {"state_dict": weights("_forward_module.module._orig_mod."), "epoch": 1},
    "Lightning with a field model": lambda: {"state_dict": weights("model.")},
}


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("name", FILES)
def test_the_weights_are_found(tmp_path, name, is_zip):
    torch.save(FILES[name](), tmp_path / "a.pt", _use_new_zipfile_serialization=is_zip)
    with TorchArchive(tmp_path / "a.pt") as archive:
        found = {key: archive.read(ref) for key, ref in archive.state_dict().items()}
    expected = weights()
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        np.testing.assert_array_equal(found[key], tensor.numpy())


def test_a_module_that_is_called_model_is_no_wrapper(tmp_path):
    """Beside tensors "model" is a part of the network."""
    torch.save({"model": weights(), "scale": torch.ones(1)}, tmp_path / "a.pt")
    with TorchArchive(tmp_path / "a.pt") as archive:
        assert sorted(archive.state_dict()) == ["model.head.weight", "model.tok.bias", "scale"]


def test_a_beginning_that_only_some_keys_have_stays(tmp_path):
    torch.save(weights("module.") | weights(), tmp_path / "a.pt")
    with TorchArchive(tmp_path / "a.pt") as archive:
        assert len(archive.state_dict()) == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weights": 3, "epoch": 1}, "a dict with weights, epoch, and the weights are looked for in state_dict, model"),
        ({"ema": {"decay": 0.9}, "args": "x"}, "a dict with ema, args, and the weights are looked for in"),
        ({f"part{i}": {} for i in range(12)}, r"a dict with part0, .*part7, \.\.\., and the weights are looked for"),
        ({"state_dict": {"a": 3}}, "a: 3, not a tensor$"),
    ],
)
def test_the_message_names_the_shape_of_the_file(tmp_path, content, message):
    torch.save(content, tmp_path / "a.pt")
    with TorchArchive(tmp_path / "a.pt") as archive, pytest.raises(CheckpointError, match=message):
        archive.state_dict()
