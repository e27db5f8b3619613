"""Memory of one update on each device, read from the compiled program, for devices that need not be there.

    python -m scripts.bench.plan_training --config configs/finetune-captions.yaml --devices 8
    python -m scripts.bench.plan_training --config configs/finetune-captions.yaml --devices 16 sharding.strategy=fsdp

Compiles the update for that many CPU devices and allocates nothing of it. What the state takes is exact for every
backend. Temporaries are those of the CPU compiler, which neither fuses nor schedules as that of a GPU or TPU; they say
which strategies split the work, and not how large a batch fits. Prints a table, then one JSON line.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any


def main() -> None:
    """Parses the command line, compiles, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the configuration")
    parser.add_argument("--config", required=True, type=Path, metavar="FILE", help="of mindalle finetune")
    parser.add_argument("--devices", type=int, default=8, help="how many to compile for (default: %(default)s)")
    arguments = parser.parse_args()
    # Before jax is imported, which reads it once.
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={arguments.devices}"
    import jax

    figures = plan(arguments.config, arguments.overrides, jax.devices())
    for name, value in figures.items():
        print(f"{name:>28}  {value}")
    print(json.dumps(figures))


def plan(config_file: Path, overrides: list[str], devices: list[Any]) -> dict:
    """The figures, in bytes on each device."""
    import jax
    import numpy as np

    config, mesh, state, frozen, _, compiled = compile_update(config_file, overrides, devices)
    memory = compiled.memory_analysis()

    def on_a_device(tree: object) -> int:
        leaves = jax.tree.leaves(tree)
        return sum(int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in leaves)

    return {
        "strategy": config.sharding.strategy,
        "devices": mesh.size,
        "mesh": str(dict(mesh.shape)),
        "rows_a_device": config.experiment.local_batch_size,
        "trained_GB": round(on_a_device(state.params) / 1e9, 3),
        "frozen_GB": round(on_a_device(frozen) / 1e9, 3),
        "optimizer_GB": round(on_a_device(state.opt_state) / 1e9, 3),
        "average_GB": round(on_a_device(state.ema) / 1e9, 3),
        "compiled_arguments_GB": round(memory.argument_size_in_bytes / 1e9, 3),
        "compiled_temporaries_GB": round(memory.temp_size_in_bytes / 1e9, 3),
        "compiled_reused_GB": round(memory.alias_size_in_bytes / 1e9, 3),
    }


def compile_update(
    config_file: Path, overrides: list[str], devices: list[Any], base: Any = None
) -> tuple[Any, Any, Any, Any, Any, Any]:
    """(config, mesh, abstract state, frozen parameters and batch, compiled program) of an update on these devices.

    base: Config of the model that is trained; None is the published one.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    from mindalle_jax.config.schema import Config
    from mindalle_jax.models.transformer import Transformer
    from mindalle_jax.runtime.sharding import BATCH, SplitByBatch, batch_devices, make_mesh, param_shardings
    from mindalle_jax.storage.adapters import adapter_shapes, matches
    from mindalle_jax.storage.weights import leaf_shapes
    from mindalle_jax.training.config import load_finetune_config
    from mindalle_jax.training.optimizer import learning_rate, make_optimizer
    from mindalle_jax.training.step import StepConfig, TrainState, compile_train_step, state_shardings

    config = load_finetune_config(config_file, overrides, base or Config())
    training, strategy = config.training, config.sharding.strategy
    mesh = make_mesh(strategy, config.sharding.sizes(), devices)
    shapes = leaf_shapes(config.model_config(), "stage2")
    trained = {path: shape for path, shape in shapes.items() if not matches(path, training.freeze)}
    if training.lora.rank:
        trained = adapter_shapes(shapes, training.lora)
    dtype = jnp.dtype("bfloat16" if config.experiment.use_amp else "float32")
    schedule = learning_rate(config.optimizer, 0, 1_000)
    step_config = StepConfig(
        model=Transformer(
            config.stage2,
            dtype=dtype,
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

    def abstract(shape: tuple[int, ...], dtype: np.dtype, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    places = param_shardings(trained, strategy, mesh)
    params: Any = {path: abstract(shape, np.dtype("float32"), places[path]) for path, shape in trained.items()}
    everywhere = param_shardings(shapes, strategy, mesh)
    frozen = {path: abstract(shapes[path], dtype, everywhere[path]) for path in shapes if path not in trained}
    step: Any = jax.ShapeDtypeStruct((), jnp.int32)
    ema: Any = params if training.ema_decay else {}
    state: Any = TrainState(step, params, jax.eval_shape(step_config.optimizer.init, params), ema, step)
    shardings = state_shardings(state, places)
    state = jax.tree.map(lambda leaf, place: abstract(leaf.shape, leaf.dtype, place), state, shardings)
    rows = config.experiment.local_batch_size * batch_devices(mesh)
    h = config.stage2.hparams
    widths = {"prefix": (1 if config.image_only else h.ctx_len_txt,), "codes": (h.ctx_len_img,), "index": ()}
    split = NamedSharding(mesh, PartitionSpec(None, BATCH))
    batch = {
        name: abstract((1, rows, *width), np.dtype("uint32" if name == "index" else "int32"), split)
        for name, width in widths.items()
    }
    compiled = compile_train_step(step_config, shardings).lower(state, frozen, batch).compile()
    return config, mesh, state, frozen, batch, compiled


if __name__ == "__main__":
    main()
