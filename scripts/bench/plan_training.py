"""Reads the memory of a training step on each device from the compiled program; the devices are not needed.

    python -m scripts.bench.plan_training --config finetune-captions --devices 8
    python -m scripts.bench.plan_training --config finetune-captions --devices 16 sharding.strategy=fsdp

Compiles the step for this number of CPU devices, and allocates none of its arrays. The memory of the state is exact for
every backend. Temporaries are those of the CPU compiler, which fuses and schedules in another way than for a GPU or
TPU. They say which strategies split the work, but not how large a batch fits. Prints a table, then one JSON line.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mindalle_jax.cli.parser import path
from mindalle_jax.config.schema import Config
from mindalle_jax.models.transformer import Transformer
from mindalle_jax.runtime.sharding import BATCH, SplitByBatch, batch_devices, make_mesh, param_shardings
from mindalle_jax.storage.adapters import adapter_shapes, matches
from mindalle_jax.storage.weights import leaf_shapes
from mindalle_jax.training.config import load_finetune_config
from mindalle_jax.training.optimizer import learning_rate, make_optimizer
from mindalle_jax.training.step import StepConfig, TrainState, compile_train_step, state_shardings
from scripts.bench import common


def main() -> None:
    """Parses the command line, compiles, prints."""
    parser = common.make_parser(__doc__)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the configuration")
    parser.add_argument("--config", required=True, type=path, metavar="FILE", help="a preset or a YAML file")
    parser.add_argument("--devices", type=int, default=8, help="devices to compile for (default: %(default)s)")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", arguments.devices)
    common.report(*plan(arguments.config, arguments.overrides, jax.devices()))


def plan(config_file: Path, overrides: list[str], devices: list[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The conditions, and the memory on each device in GB."""
    config, mesh, state, frozen, _, compiled = compile_step(config_file, overrides, devices)
    memory = compiled.memory_analysis()

    def bytes_per_device(tree: object) -> int:
        leaves = jax.tree.leaves(tree)
        return sum(int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in leaves)

    head = common.conditions(
        "plan_training", f"{mesh.size} CPU devices, compiled for", compute_dtype(config),
        config.experiment.local_batch_size,
        strategy=config.sharding.strategy, devices=mesh.size, mesh=str(dict(mesh.shape)),
    )  # fmt: skip
    sizes = {
        "trained_GB": bytes_per_device(state.params),
        "frozen_GB": bytes_per_device(frozen),
        "optimizer_GB": bytes_per_device(state.opt_state),
        "average_GB": bytes_per_device(state.ema),
        "compiled_arguments_GB": memory.argument_size_in_bytes,
        "compiled_temporaries_GB": memory.temp_size_in_bytes,
        "compiled_reused_GB": memory.alias_size_in_bytes,
    }
    return head, {name: round(size / 1e9, 3) for name, size in sizes.items()}


def compute_dtype(config: Any) -> Any:
    """The dtype that a run of this configuration computes in."""
    return jnp.dtype("bfloat16" if config.experiment.use_amp else "float32")


def compile_step(
    config_file: Path, overrides: list[str], devices: list[Any], base: Config | None = None
) -> tuple[Any, Any, Any, Any, Any, Any]:
    """(config, mesh, abstract state, frozen parameters and batch, compiled program) of a step on these devices.

    base: configuration of the model that is trained; None is the published one.
    """
    config = load_finetune_config(config_file, overrides, base or Config())
    training, strategy = config.training, config.sharding.strategy
    mesh = make_mesh(strategy, config.sharding.sizes(), devices)
    shapes = leaf_shapes(config.model_config(), "stage2")
    trained = {path: shape for path, shape in shapes.items() if not matches(path, training.freeze)}
    if training.lora.rank:
        trained = adapter_shapes(shapes, training.lora)
    step_config = make_step_config(config, mesh, trained)
    shardings = param_shardings(trained, strategy, mesh)
    params = {path: _abstract(shape, np.dtype("float32"), shardings[path]) for path, shape in trained.items()}
    of_all = param_shardings(shapes, strategy, mesh)
    dtype = compute_dtype(config)
    frozen = {path: _abstract(shapes[path], dtype, of_all[path]) for path in shapes if path not in trained}
    step: Any = jax.ShapeDtypeStruct((), jnp.int32)
    state: Any = TrainState(
        step, params, jax.eval_shape(step_config.optimizer.init, params), params if training.ema_decay else {}, step
    )
    state_places = state_shardings(state, shardings)
    state = jax.tree.map(lambda leaf, place: _abstract(leaf.shape, leaf.dtype, place), state, state_places)
    batch = abstract_batch(config, mesh)
    compiled = compile_train_step(step_config, state_places).lower(state, frozen, batch).compile()
    return config, mesh, state, frozen, batch, compiled


def make_step_config(config: Any, mesh: Any, trained: dict[str, Any]) -> StepConfig:
    """The step of fine-tuning with this configuration."""
    training, schedule = config.training, learning_rate(config.optimizer, 0, 1_000)
    return StepConfig(
        model=Transformer(
            config.stage2,
            dtype=compute_dtype(config),
            remat=training.remat,
            flash_attention=training.flash_attention,
            constrain=SplitByBatch(mesh),
        ),
        optimizer=make_optimizer(config.optimizer, schedule, training.decay, trained),
        schedule=schedule,
        pad_id=None if config.image_only else 1,
        text_loss_weight=training.text_loss_weight,
        caption_dropout=training.caption_dropout,
        ema_decay=training.ema_decay,
        lora_scale=1.0,
        seed=0,
    )


def abstract_batch(config: Any, mesh: Any) -> dict[str, Any]:
    """One micro-batch, with experiment.local_batch_size rows per device."""
    rows = config.experiment.local_batch_size * batch_devices(mesh)
    h = config.stage2.hparams
    widths = {"prefix": (1 if config.image_only else h.ctx_len_txt,), "codes": (h.ctx_len_img,), "index": ()}
    split = NamedSharding(mesh, PartitionSpec(None, BATCH))
    return {
        name: _abstract((1, rows, *width), np.dtype("uint32" if name == "index" else "int32"), split)
        for name, width in widths.items()
    }


def _abstract(shape: tuple[int, ...], dtype: Any, sharding: Any) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


if __name__ == "__main__":
    main()
