"""One step: against the original's recorded runs, however it is split, and when it goes wrong."""

import shutil

import jax
import numpy as np
import pytest

from mindalle_jax.interop.mindalle import import_checkpoint
from mindalle_jax.models.transformer import Transformer
from mindalle_jax.runtime.sharding import SplitByBatch, make_mesh, param_shardings
from mindalle_jax.storage.weights import leaf_shapes, load_stacked
from mindalle_jax.training.config import load_finetune_config
from mindalle_jax.training.optimizer import learning_rate, make_optimizer
from mindalle_jax.training.step import StepConfig, compile_train_step, init_state


def make_config(config, shapes, *, max_steps=8, pad_id=None, mesh=None, **changes) -> StepConfig:
    schedule = learning_rate(config.optimizer, 0, max_steps)
    model = Transformer(config.stage2) if mesh is None else Transformer(config.stage2, constrain=SplitByBatch(mesh))
    values = {"text_loss_weight": 0.125, "caption_dropout": 0.0, "ema_decay": 0.0, "lora_scale": 1.0, "seed": 0}
    return StepConfig(
        model, make_optimizer(config.optimizer, schedule, "all", shapes), schedule, pad_id, **(values | changes)
    )


@pytest.fixture(scope="module", params=["cls", "uncond"])
def recorded(request, golden, tmp_path_factory):
    """(config, folder, arrays) of a recorded run of the original."""
    kind = request.param
    arrays = np.load(golden / "golden_igpt.npz")
    arrays = {name.removeprefix(f"{kind}_"): arrays[name] for name in arrays.files if name.startswith(f"{kind}_")}
    config_file = golden / f"igpt_{kind}.yaml"
    folder = tmp_path_factory.mktemp("init") / kind
    source = folder.with_name("source")
    source.mkdir()
    shutil.copyfile(golden / "model" / "stage1_last.ckpt", source / "stage1_last.ckpt")
    shutil.copyfile(golden / f"igpt_{kind}_init.ckpt", source / "stage2_last.ckpt")
    import_checkpoint(source, folder, config=config_file)
    return load_finetune_config(config_file), folder, arrays


STRATEGIES = {
    # name: strategy, devices, sizes of mesh axes, micro-batches. Four pictures are split into as many parts as fit.
    "one device": ("replicated", 1, {}, 2),
    "replicated": ("replicated", 4, {}, 1),
    "fsdp": ("fsdp", 2, {}, 2),
    "tensor": ("tensor", 8, {}, 2),
    "fsdp+tensor": ("fsdp+tensor", 8, {"tensor": 2}, 1),
}


def run_recorded(recorded, strategy, devices, sizes, micro_batches):
    config, folder, arrays = recorded
    mesh = make_mesh(strategy, sizes, jax.devices()[:devices])
    shapes = leaf_shapes(config.model_config(), "stage2")
    params = load_stacked(
        folder, "stage2", config.model_config(), dict.fromkeys(shapes, np.dtype("float32")),
        param_shardings(shapes, strategy, mesh),
    )  # fmt: skip
    step_config = make_config(config, shapes, mesh=mesh)
    labels = arrays.get("labels", np.zeros(4))
    batch = {
        "prefix": labels.astype(np.int32).reshape(micro_batches, -1, 1),
        "codes": arrays["codes"].astype(np.int32).reshape(micro_batches, -1, 256),
    }
    batch = jax.device_put(batch, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    state, metrics = init_state(step_config, params), []
    step = compile_train_step(step_config, jax.tree.map(lambda leaf: leaf.sharding, state))
    with jax.default_matmul_precision("highest"):
        for _ in range(8):
            state, step_metrics = step(state, {}, batch)
            metrics.append(jax.device_get(step_metrics))
    return state, {name: np.array([line[name] for line in metrics]) for name in metrics[0]}


@pytest.mark.parametrize(
    "strategy",
    [name if name in ("one device", "fsdp") else pytest.param(name, marks=pytest.mark.slow) for name in STRATEGIES],
)
def test_eight_steps_are_the_originals(recorded, strategy):
    """Losses, gradient norms before clipping, learning rates, and what is learned."""
    arrays = recorded[2]
    state, metrics = run_recorded(recorded, *STRATEGIES[strategy])
    print({k: np.abs(metrics[a] - arrays[k]).max() for k, a in (("train_loss", "loss"), ("train_gnorm", "grad_norm"))})
    np.testing.assert_allclose(metrics["loss"], arrays["train_loss"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(metrics["grad_norm"], arrays["train_gnorm"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(metrics["learning_rate"], arrays["train_lr"], rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(state.params["head/weight"][0], arrays["after_head_row0"], rtol=0, atol=1e-4)
    sos = np.asarray(state.params["sos/embedding"])
    np.testing.assert_allclose(sos.reshape(arrays["after_sos"].shape), arrays["after_sos"], rtol=0, atol=1e-4)
