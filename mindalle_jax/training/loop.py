"""A run of fine-tuning, from a configuration to a model folder.

    base model, data -> parameters on the mesh -> (resume) -> updates, validation, samples, checkpoints -> model folder

Whatever a run is interrupted by, the same command goes on after the last checkpoint, with the same samples and numbers.
"""

import hashlib
import json
import time
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mindalle_jax.checkpoint import Checkpoints, stop_on_signals
from mindalle_jax.config import Config, load_config
from mindalle_jax.data.codes import vqgan_digest
from mindalle_jax.data.loader import Loader
from mindalle_jax.data.samples import Source
from mindalle_jax.data.samples import Task as DataTask
from mindalle_jax.data.sources import open_source
from mindalle_jax.devices import device_memory, matmul_precision, use_compilation_cache
from mindalle_jax.errors import CheckpointError, ConfigError, NonFiniteError
from mindalle_jax.interop.mindalle import find_model
from mindalle_jax.models.transformer import Transformer
from mindalle_jax.models.vqgan import VQGAN
from mindalle_jax.sharding import BATCH, SplitByBatch, batch_devices, make_mesh, param_shardings
from mindalle_jax.tokenizer import TextTokenizer
from mindalle_jax.training import lora
from mindalle_jax.training.config import FinetuneConfig, load_finetune_config
from mindalle_jax.training.folder import check_base, check_folder, claim_folder, transfer_base
from mindalle_jax.training.monitor import Monitor, memory_line
from mindalle_jax.training.optimizer import count_steps, learning_rate, make_optimizer
from mindalle_jax.training.samples import RECONSTRUCTIONS, Sampler
from mindalle_jax.training.step import Params, Task, TrainState, compile_train_step, eval_step, init_state, whole_params
from mindalle_jax.training.transfer import write_model
from mindalle_jax.weights import MANIFEST, leaf_shapes, load_params, load_stacked, map_weights, read_manifest

SUMMARY_FILE = "summary.json"
MAX_SKIPPED = 10
"""Updates in a row without a finite loss after which a run stops."""


class Run:
    """One run: what is built once, and the loop over it."""

    def __init__(self, config: FinetuneConfig, base: Path, out: Path):
        """config: as load_finetune_config gives it. base: the folder of the model to start from. out: of the run.

        Raises ConfigError, CheckpointError, DataError or UsageError before anything is written.
        """
        self.config, self.base, self.out = config, base, out
        self.model_config = config.model_config()
        use_compilation_cache()

        # ---- mesh and batches
        self.mesh = make_mesh(config.sharding.strategy, config.sharding.sizes())
        experiment = config.experiment
        rows = experiment.local_batch_size * batch_devices(self.mesh)
        if experiment.total_batch_size % rows:
            below = experiment.total_batch_size // rows * rows
            raise ConfigError(
                f"experiment.total_batch_size {experiment.total_batch_size} must be a multiple of {rows}: "
                f"local_batch_size {experiment.local_batch_size} on {batch_devices(self.mesh)} devices; "
                f"{f'{below} or ' if below else ''}{below + rows} would work"
            )
        self.micro_batches = experiment.total_batch_size // rows
        self.valid_batch = -(-experiment.valid_batch_size // batch_devices(self.mesh)) * batch_devices(self.mesh)

        # ---- data
        h = config.stage2.hparams
        task: DataTask = "text"
        if config.image_only:
            task = "class" if config.stage2.use_cls_cond else "unconditional"
        self.tokenizer = None if config.image_only else _tokenizer(base, self.model_config)
        options: dict[str, Any] = {"num_classes": h.n_classes, "vqgan": vqgan_digest(base)}
        self.source = open_source(config.data.train, task, **options)
        self.valid_source: Source | None = None
        if config.data.valid is not None:
            self.valid_source = open_source(config.data.valid, task, classes=self.source.classes, **options)
        self.max_steps = count_steps(
            config.optimizer.max_steps, len(self.source), experiment.total_batch_size, experiment.epochs
        )
        self.loader = self._loader(self.source, train=True)

        # ---- what is trained
        training = config.training
        self.shapes = leaf_shapes(self.model_config, "stage2")
        for pattern in training.freeze:
            if not any(lora.matches(path, [pattern]) for path in self.shapes):
                raise ConfigError(f"training.freeze: {pattern!r} matches none of {', '.join(self.shapes)}")
        if training.lora.rank:
            if training.freeze:
                raise ConfigError("training.freeze goes without training.lora, beside which nothing else is trained")
            trained = lora.adapter_shapes(self.shapes, training.lora)
        else:
            trained = {path: shape for path, shape in self.shapes.items() if not lora.matches(path, training.freeze)}
        if not trained:
            raise ConfigError(
                f"training.freeze {list(training.freeze)} matches every parameter: nothing is left to train"
            )
        self.trained_shapes = trained
        self.dtype = jnp.dtype("bfloat16" if experiment.use_amp and jax.default_backend() != "cpu" else "float32")
        schedule = learning_rate(config.optimizer, training.warmup_steps, self.max_steps)
        constrain = SplitByBatch(self.mesh)
        self.task = Task(
            model=Transformer(config.stage2, dtype=self.dtype, remat=training.remat, constrain=constrain),
            optimizer=make_optimizer(config.optimizer, schedule, training.decay, trained),
            schedule=schedule,
            pad_id=None if self.tokenizer is None else self.tokenizer.pad_id,
            text_loss_weight=training.text_loss_weight,
            caption_dropout=training.caption_dropout,
            ema_decay=training.ema_decay,
            lora_scale=training.lora.alpha / training.lora.rank if training.lora.rank else 1.0,
            seed=training.seed,
        )

        self.vqgan: Params = {}  # loaded if there are pictures to encode
        self.sampler: Sampler | None = None
        if (training.sample_every_steps or not self.source.has_codes) and jax.process_count() == 1:
            prompts = training.sample_prompts or (("",) if task == "unconditional" else ())
            self.sampler = Sampler(base, self.model_config, self.dtype, prompts, self.tokenizer)

    def __call__(self, *, ignore_fingerprint: bool = False) -> bool:
        """Trains, and returns whether the run is complete: not so after SIGTERM or Ctrl-C, which save and stop.

        Raises NonFiniteError after MAX_SKIPPED updates in a row without a finite loss, and as __init__.
        """
        training, experiment = self.config.training, self.config.experiment
        start_s = time.perf_counter()
        with device_memory(
            "the parameters do not fit into the memory of the devices: shard them (sharding.strategy=fsdp)"
        ):
            params, frozen = self._load()
            if not all(source.has_codes for source in (self.source, self.valid_source) if source is not None):
                self.vqgan = load_params(self.base, "stage1", self.model_config, jnp.dtype("float32"), self.mesh)
            state = init_state(self.task, params)
        del params
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
        step_fn = compile_train_step(self.task, shardings)
        steps_an_epoch = max(1, len(self.source) // experiment.total_batch_size)
        checkpoint_every = training.checkpoint_every_steps or steps_an_epoch * experiment.save_ckpt_freq
        validate_every = training.validate_every_steps or steps_an_epoch * experiment.test_freq
        fingerprint = self.source.fingerprint()
        too_large = "an update does not fit into the memory of the devices; lower experiment.local_batch_size"
        with Checkpoints(self.out / "checkpoints", keep=training.keep_checkpoints, fingerprint=fingerprint) as saved:
            # ---- resume
            done = 0
            if saved.latest_step() is not None:
                target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
                del state  # not twice in memory
                restored = saved.restore(target, ignore_fingerprint=ignore_fingerprint)
                if restored.data_state["base"] != _digest(self.base):
                    raise CheckpointError(f"{self.out}: the run began from another model than {self.base}")
                state, done = restored.state, restored.step
                self.loader.set_state(restored.data_state["loader"])
                del restored

            if done == self.max_steps and (self.out / SUMMARY_FILE).exists():
                return True

            def save(step: int, valid_loss: float | None) -> None:
                data_state = {"loader": {"next_index": step * experiment.total_batch_size}, "base": _digest(self.base)}
                saved.save(step, state, data_state=data_state, validation_loss=valid_loss)

            # ---- updates
            with (
                stop_on_signals() as stop,
                Monitor(self.out, self.model_config, experiment.total_batch_size, done, self.max_steps) as monitor,
                device_memory(too_large),
                matmul_precision(self.dtype),
            ):
                monitor.say(memory_line({"trained": state.params, "frozen": frozen, "optimizer": state.opt_state,
                                         "average": state.ema}))  # fmt: skip
                monitor.say(f"{self.source.report}; {self.max_steps} updates of {experiment.total_batch_size}")
                self._show_data()
                unlogged: list[Any] = []  # figures of an update are fetched while the next one is computed
                while done < self.max_steps:
                    samples, batch = self._next_batch()
                    state, figures = step_fn(state, frozen, batch)
                    done += 1
                    unlogged.append((done, figures, samples))
                    valid_loss = None
                    last, stopping = done == self.max_steps, _any_process(stop.requested)
                    validating = self.valid_source is not None and (last or done % validate_every == 0)
                    sampling = training.sample_every_steps and (last or done % training.sample_every_steps == 0)
                    saving = last or stopping or done % checkpoint_every == 0
                    while len(unlogged) > (0 if validating or sampling or saving else 1):
                        self._log(monitor, *unlogged.pop(0))
                    if validating:
                        figures = self._validate(state, frozen)
                        valid_loss = figures["loss"]
                        monitor.log(done, figures, "valid")
                    if sampling:
                        self._draw_samples(state, frozen, done)
                    if saving:
                        save(done, valid_loss)
                    if stopping and not last:
                        monitor.say(f"stopped after update {done}; the same command goes on from there")
                        return False
        self._write_model(state)
        self._write_summary(time.perf_counter() - start_s)
        return True

    def _load(self) -> tuple[Params, Params]:
        """What is trained, float32, and what is not, in the compute dtype; each on the mesh as the strategy says."""
        strategy = self.config.sharding.strategy
        shardings = param_shardings(self.shapes, strategy, self.mesh)
        dtypes = {path: np.dtype("float32" if path in self.trained_shapes else self.dtype) for path in self.shapes}
        leaves = load_stacked(self.base, "stage2", self.model_config, dtypes, shardings)
        params = {path: leaves.pop(path) for path in self.trained_shapes if path in leaves}
        if self.config.training.lora.rank:
            adapters = lora.init_adapters(self.trained_shapes, self.config.training.seed)
            everywhere = NamedSharding(self.mesh, PartitionSpec())
            params = {path: jax.device_put(array, everywhere) for path, array in adapters.items()}
        return params, leaves

    def _loader(self, source: Source, train: bool) -> Loader:
        return Loader(
            source,
            batch_size=self.config.experiment.total_batch_size if train else self.valid_batch,
            train=train,
            seed=self.config.training.seed,
            image_size=self.config.stage1.hparams.resolution,
            tokenizer=self.tokenizer,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            threads=self.config.data.threads,
        )

    def _next_batch(self) -> tuple[np.ndarray, dict[str, jax.Array]]:
        """Numbers of the samples int32[B], and the batch on the devices in micro-batches [a, b, ...]."""
        rows = next(self.loader)
        shape = (self.micro_batches, -1)
        batch = {"index": rows["index"].astype(np.uint32), "prefix": self._prefix(rows)}
        batch |= {name: rows[name] for name in ("image", "codes") if name in rows}
        placed = {
            name: self._place(array.reshape(*shape, *array.shape[1:]), PartitionSpec(None, BATCH))
            for name, array in batch.items()
        }
        return rows["sample"], self._with_codes(placed)

    def _prefix(self, rows: dict[str, np.ndarray]) -> np.ndarray:
        """int32[B, p]: text ids, class labels [B, 1], or zeros."""
        if "text" in rows:
            return rows["text"]
        return rows["label"][:, None] if "label" in rows else np.zeros((len(rows["index"]), 1), np.int32)

    def _place(self, array: np.ndarray, spec: PartitionSpec) -> jax.Array:
        return jax.make_array_from_process_local_data(NamedSharding(self.mesh, spec), np.ascontiguousarray(array))

    def _with_codes(self, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """The batch with codes in place of pictures."""
        if "image" in batch:
            batch["codes"] = self._encode(batch.pop("image"))
        return batch

    def _encode(self, images: jax.Array) -> jax.Array:
        """int32[..., t] of pictures uint8[..., S, S, 3], in float32, a micro-batch at a time."""
        with matmul_precision(jnp.float32):
            return _encode(VQGAN(self.config.stage1), self.mesh, self.vqgan, images)

    def _log(self, monitor: Monitor, step: int, figures: dict[str, Any], samples: np.ndarray) -> None:
        """Writes the figures of an update. Raises NonFiniteError after MAX_SKIPPED in a row without a finite loss."""
        values = {name: float(value) for name, value in jax.device_get(figures).items()}
        skipped = int(values.pop("skipped"))
        if self.config.image_only:
            del values["text_loss"]
        if skipped:
            monitor.say(f"update {step} was skipped: its loss or gradient is not finite")
        crc = zlib.crc32(np.ascontiguousarray(samples).tobytes())
        bad_images = self.loader.counts["bad_images"]
        monitor.log(step, values | {"samples_crc32": crc, "skipped": int(skipped > 0), "bad_images": bad_images})
        if skipped >= MAX_SKIPPED:
            raise NonFiniteError(
                f"{MAX_SKIPPED} updates in a row without a finite loss, the last at step {step}: lower "
                f"optimizer.base_lr ({self.config.optimizer.base_lr}), or look at the data"
            )

    def _validate(self, state: TrainState, frozen: Params) -> dict[str, Any]:
        """Mean cross-entropies over the validation data, of the moving average where there is one."""
        assert self.valid_source is not None
        params, totals = state.ema or state.params, np.zeros(4)
        for rows in self._loader(self.valid_source, train=False):
            batch = {"prefix": self._prefix(rows), "rows": rows["valid"].astype(np.float32)}
            batch |= {name: rows[name] for name in ("image", "codes") if name in rows}
            placed = {name: self._place(array, PartitionSpec(BATCH)) for name, array in batch.items()}
            sums, counts = eval_step(self.task, params, frozen, self._with_codes(placed))
            totals += np.array(jax.device_get([*sums, *counts]), np.float64)
        image, text = totals[0] / max(totals[2], 1), totals[1] / max(totals[3], 1)
        if self.config.image_only:
            return {"loss": image}
        return {"loss": image + self.config.training.text_loss_weight * text, "image_loss": image, "text_loss": text}

    def _show_data(self) -> None:
        """reconstructions.png: pictures of the data above what the VQGAN makes of them, the best that can be drawn."""
        path, source = self.out / "reconstructions.png", self.valid_source or self.source
        if self.sampler is None or source.has_codes or path.exists():
            return
        part = source.part(0, RECONSTRUCTIONS)
        images = next(iter(self._loader(part, train=False)))["image"][: len(part)]
        self.sampler.reconstruct(images, path)

    def _draw_samples(self, state: TrainState, frozen: Params, step: int) -> None:
        if self.sampler is not None and self.sampler.prompts:
            params = whole_params(self.task, state.ema or state.params, frozen)
            self.sampler.draw(params, self.out / "samples" / f"step_{step:06d}.png")

    def _write_model(self, state: TrainState) -> None:
        """The folder of the run becomes a model: the average where there is one, adapters merged."""
        trained = {path: _whole(leaf) for path, leaf in (state.ema or state.params).items()}
        if jax.process_index() != 0:
            return
        tensors = read_manifest(self.base)["tensors"]["stage2"]
        before = map_weights(self.base / "stage2.safetensors", tensors)

        def leaf(path: str, shape: tuple[int, ...]) -> np.ndarray:
            weight = trained[path] if path in trained else np.asarray(before[path], np.float32)
            return lora.merged(path, weight, trained, self.task.lora_scale)

        write_model(self.base, self.model_config, self.out, leaf, f"fine-tuned from {self.base.name}")
        if self.config.training.lora.rank:
            import safetensors.numpy

            about = {"lora_scale": str(self.task.lora_scale), "base_sha256": _digest(self.base)}
            safetensors.numpy.save_file(trained, self.out / "adapters.safetensors", metadata=about)

    def _write_summary(self, seconds: float) -> None:
        if jax.process_index() != 0:
            return
        lines = [json.loads(line) for line in (self.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        train, valid = ([line for line in lines if line["kind"] == kind] for kind in ("train", "valid"))
        summary = {
            "updates": self.max_steps,
            "skipped_updates": sum(line["skipped"] for line in train),
            "images": self.max_steps * self.config.experiment.total_batch_size,
            "first_loss": train[0]["loss"],
            "last_loss": train[-1]["loss"],
            "validation_loss": valid[-1]["loss"] if valid else None,
            "seconds_since_the_last_start": round(seconds, 1),
            "devices": jax.device_count(),
            "device": jax.devices()[0].device_kind,
            "base": str(self.base),
        }
        (self.out / SUMMARY_FILE).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def finetune(config_file: str | Path, overrides: Sequence[str], out: Path, *, ignore_fingerprint: bool = False) -> bool:
    """What `mindalle finetune` does: reads the configuration, finds the model to start from, and runs or goes on.

    Returns whether the run is complete.
    """
    # Read twice: what the file leaves out of dataset, stage1 and stage2 is as in the model that it names.
    init_from = load_finetune_config(config_file, overrides).training.init_from
    base = find_model(init_from)
    config = load_finetune_config(config_file, overrides, load_config(base / "config.yaml"))
    check_folder(out, config)
    check_base(config, base)
    run = Run(config, base, out)  # the rest of what can be wrong
    claim_folder(out, config)
    run.base = transfer_base(config, base, out)
    return run(ignore_fingerprint=ignore_fingerprint)


def _tokenizer(base: Path, config: Config) -> TextTokenizer:
    return TextTokenizer(base / "tokenizer", config.dataset.context_length, config.stage2.vocab_size_txt)


def _digest(folder: Path) -> str:
    return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()


def _whole(leaf: jax.Array) -> np.ndarray:
    """The array on the host, wherever its parts are."""
    if leaf.is_fully_addressable:
        return np.asarray(leaf)
    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))


def _any_process(flag: bool) -> bool:
    """Whether the flag is set in any process, so that all stop after the same update."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


@partial(jax.jit, static_argnames=("vqgan", "mesh"))
def _encode(vqgan: VQGAN, mesh: Mesh, params: dict[str, Any], images: jax.Array) -> jax.Array:
    def encode(params: dict[str, Any], images: jax.Array) -> jax.Array:
        codes: Any = vqgan.apply({"params": params}, images.astype(jnp.float32) / 255 * 2 - 1, method="encode")
        return codes.reshape(len(codes), -1)

    spread = jax.shard_map(
        encode,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(BATCH)),
        out_specs=PartitionSpec(BATCH),
        check_vma=False,
    )
    if images.ndim == 4:
        return spread(params, images)
    return jax.lax.map(lambda micro: spread(params, micro), images)
