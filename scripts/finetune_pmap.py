"""Fine-tunes with data parallelism by jax.pmap, in one file that you can read from top to bottom.

    python scripts/finetune_pmap.py --config finetune-captions --out cats data.train=photos \\
        training.init_from=models/mindalle training.caption_dropout=0 training.ema_decay=0

The loss, the optimizer, the data and the configuration are those of `mindalle finetune`, and so are the losses that it
logs. Every device of this machine holds the whole state, 20 bytes per parameter (25.8 GB for the published model), and
its activations. Use `mindalle finetune` for adapters, moving average, caption dropout, sharding, validation and
checkpoints.

    base model -> a copy on each device -> steps, gradients summed over micro-batches and devices -> model folder
"""

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import SingleDeviceSharding
from tqdm import tqdm

from mindalle_jax.cli.parser import path
from mindalle_jax.config.file import dump_config
from mindalle_jax.data.codes import vqgan_digest
from mindalle_jax.data.loader import Loader
from mindalle_jax.data.sources import open_source
from mindalle_jax.errors import ConfigError, MindalleError, NonFiniteError
from mindalle_jax.models.transformer import Transformer
from mindalle_jax.models.vqgan import VQGAN
from mindalle_jax.runtime.devices import matmul_precision, prepare_process
from mindalle_jax.storage.files import check_output, disk_errors
from mindalle_jax.storage.results import write_model
from mindalle_jax.storage.weights import Stage, leaf_shapes, load_stacked, nest
from mindalle_jax.text.tokenizer import TextTokenizer
from mindalle_jax.training.config import FinetuneConfig
from mindalle_jax.training.finetune import encode_batch, read_finetune
from mindalle_jax.training.optimizer import learning_rate, make_optimizer
from mindalle_jax.training.run_dir import check_base, start_folder
from mindalle_jax.training.step import Metrics, Terms, loss_sums, target_weights

AXIS = "devices"


def train_step(
    model: Transformer,
    vqgan: VQGAN,
    optimizer: optax.GradientTransformation,
    pad_id: int | None,
    text_loss_weight: float,
    state: Any,
    stage1: Any,
    batch: dict[str, jax.Array],
) -> tuple[Any, Metrics]:
    """One step on one of the devices: (parameters, state of the optimizer), and the metrics of the whole batch.

    batch: this device's micro-batches, prefix int32[a, b, p], and image uint8[a, b, S, S, 3] or codes int32[a, b, t].
    """
    params, opt_state = state
    if "image" in batch:
        with matmul_precision(jnp.float32):
            batch["codes"] = encode_batch(vqgan, stage1, batch.pop("image"))
    batch["rows"] = jnp.ones(batch["codes"].shape[:2], jnp.float32)
    # Captions differ in length, so the mean is over the targets of all devices and not a mean of means.
    counts = jax.lax.psum(Terms(*map(jnp.sum, target_weights(batch, pad_id))), AXIS)

    def share(params: dict[str, jax.Array], micro: dict[str, jax.Array]) -> tuple[jax.Array, Terms]:
        """The part of a micro-batch in the loss of the whole batch."""
        sums = loss_sums(model, nest(params), micro, pad_id)
        terms = Terms(*(total / jnp.maximum(count, 1) for total, count in zip(sums, counts, strict=True)))
        return terms.image + text_loss_weight * terms.text, terms

    def add(total: Any, micro: dict[str, jax.Array]) -> Any:
        (_, terms), grads = jax.value_and_grad(share, has_aux=True)(params, micro)
        return jax.tree.map(jnp.add, total, (grads, terms)), None

    nothing = jax.tree.map(jnp.zeros_like, params), Terms(jnp.float32(0), jnp.float32(0))
    (grads, terms), _ = jax.lax.scan(add, nothing, batch)
    grads, terms = jax.lax.psum((grads, terms), AXIS)  # shares of one mean: summed, not averaged again

    # Every device makes the same step with its copy.
    updates, opt_state = optimizer.update(grads, opt_state, params)
    loss = terms.image + text_loss_weight * terms.text
    metrics = {"loss": loss, "image_loss": terms.image, "text_loss": terms.text, "grad_norm": optax.tree.norm(grads)}
    return (optax.apply_updates(params, updates), opt_state), metrics


def check(config: FinetuneConfig, num_devices: int) -> None:
    """Raises ConfigError for settings that this script lacks, and for batches that cannot be split."""
    training, h = config.training, config.stage2.hparams
    asked = {
        "training.lora.rank": training.lora.rank,
        "training.ema_decay": training.ema_decay,
        "training.caption_dropout": training.caption_dropout,
        "training.freeze": training.freeze,
        "sharding.strategy": config.sharding.strategy != "replicated",
        "stage2.hparams.*_pdrop": h.embd_pdrop or h.resid_pdrop or h.attn_pdrop,
    }
    if names := [name for name, value in asked.items() if value]:
        raise ConfigError(f"{', '.join(names)}: not in this script; use `mindalle finetune`, or turn them off")


def finetune(
    config_file: str | Path, overrides: Sequence[str], out: Path, devices: Sequence[Any] | None = None
) -> None:
    """Trains the model that the configuration names, and writes a model folder with metrics.jsonl to `out`.

    devices: None is all devices of this machine. Raises as mindalle_jax.training.finetune.finetune, and NonFiniteError
    at the first step that is not finite.
    """
    # ---- configuration: fields that the file leaves out are as in the model that it names
    devices = jax.local_devices() if devices is None else devices
    config, base = read_finetune(config_file, overrides)
    check(config, len(devices))
    check_output(out, overwrite=out.is_dir())  # an empty folder may be used
    prepare_process()

    # ---- data: each batch is that of one step
    model_config, experiment = config.model_config(), config.experiment
    tokenizer, task = None, "text"
    if config.image_only:
        task = "class" if config.stage2.use_cls_cond else "unconditional"
    else:
        tokenizer = TextTokenizer(base / "tokenizer", config.dataset.context_length, config.stage2.vocab_size_txt)
    source = open_source(config.data.train, task, num_classes=config.stage2.hparams.n_classes, vqgan=vqgan_digest(base))
    plan = config.plan_batches(len(source), len(devices), source.report)
    loader = Loader(
        source,
        batch_size=plan.total,
        train=True,
        seed=config.training.seed,
        image_size=config.stage1.hparams.resolution,
        tokenizer=tokenizer,
        threads=config.data.threads,
    )
    max_steps = config.count_steps(len(source), plan.total)

    # ---- model and optimizer: float32 parameters; computation in bfloat16, and in float32 on CPU
    shapes = leaf_shapes(model_config, "stage2")
    dtype = jnp.dtype("bfloat16" if experiment.use_amp and devices[0].platform != "cpu" else "float32")
    schedule = learning_rate(config.optimizer, plan.warmup_steps, max_steps)
    optimizer = make_optimizer(config.optimizer, schedule, config.training.decay, shapes)
    step_fn = jax.pmap(
        partial(
            train_step,
            Transformer(
                config.stage2,
                dtype=dtype,
                remat=config.training.remat,
                flash_attention=config.training.flash_attention,
            ),
            VQGAN(config.stage1),
            optimizer,
            None if tokenizer is None else tokenizer.pad_id,
            config.training.text_loss_weight,
        ),
        axis_name=AXIS,
        devices=devices,
        donate_argnums=0,
    )

    # ---- folder: only now, after the configuration and the data are checked
    check_base(config, base)
    base = start_folder(config, base, out)  # for a transfer: with a fresh head and start vector
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        (out / "finetune_pmap.yaml").write_text(dump_config(config), encoding="utf-8")

    # ---- a copy on each device; the first argument is there because pmap needs one that is split
    def load(stage: Stage) -> dict[str, jax.Array]:
        paths = leaf_shapes(model_config, stage)
        first = SingleDeviceSharding(devices[0])
        return load_stacked(
            base, stage, model_config, dict.fromkeys(paths, np.dtype("float32")), dict.fromkeys(paths, first)
        )

    on_each, ranks = partial(jax.pmap, in_axes=(0, None), devices=devices), np.arange(len(devices))
    state = on_each(lambda _, params: (params, optimizer.init(params)))(ranks, load("stage2"))
    stage1 = None if source.has_codes else on_each(lambda _, leaves: nest(leaves))(ranks, load("stage1"))

    # ---- steps
    print(plan.note or source.report)
    print(f"{max_steps} steps of {plan.total} on {len(devices)} devices")
    with open(out / "metrics.jsonl", "w", encoding="utf-8") as file, matmul_precision(dtype):
        for step in (bar := tqdm(range(1, max_steps + 1), unit="step")):
            rows = next(loader)
            prefix = rows.get("text")
            if prefix is None:
                prefix = rows.get("label", np.zeros(len(rows["index"]), np.int32))[:, None]
            batch = {"prefix": prefix} | {name: rows[name] for name in ("image", "codes") if name in rows}
            # [B, ...] -> [devices, a, b, ...]
            shape = (len(devices), -1, plan.local)
            batch = {name: array.reshape(*shape, *array.shape[1:]) for name, array in batch.items()}
            state, metrics = step_fn(state, stage1, batch)
            line = {
                name: float(value[0]) for name, value in jax.device_get(metrics).items()
            }  # the same on every device
            line["learning_rate"] = np.asarray(schedule(step - 1)).item()
            file.write(json.dumps({"step": step, "kind": "train", **line}) + "\n")
            file.flush()
            bar.set_postfix(loss=f"{line['loss']:.4f}")
            if not np.isfinite(line["loss"] + line["grad_norm"]):
                raise NonFiniteError(f"step {step}: the loss or its gradient is not finite; lower optimizer.base_lr")

    # ---- model folder
    write_model(base, model_config, out, lambda path, _: np.asarray(state[0][path][0]), f"fine-tuned from {base.name}")


def main() -> None:
    """Parses the command line and trains."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="changes to the configuration (default: none)"
    )
    parser.add_argument(
        "--config",
        required=True,
        type=path,
        metavar="FILE",
        help="a preset or a YAML file; mindalle configs lists the presets",
    )
    parser.add_argument("--out", required=True, type=path, metavar="DIR", help="a new or empty folder for the model")
    arguments = parser.parse_args()
    try:
        finetune(arguments.config, arguments.overrides, arguments.out)
    except MindalleError as error:
        parser.exit(error.exit_code, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
