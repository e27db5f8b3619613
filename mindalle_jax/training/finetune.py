"""Training of the transformer: fine-tuning, transfer to another kind of model, or from scratch.

base model -> parameters on the mesh -> the loop -> model folder
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mindalle_jax.config.file import ConfigFile, load_config
from mindalle_jax.data.codes import vqgan_digest
from mindalle_jax.data.memory import Pairs
from mindalle_jax.errors import ConfigError
from mindalle_jax.hub.resolve import find_model
from mindalle_jax.models.transformer import Transformer
from mindalle_jax.models.vqgan import VQGAN
from mindalle_jax.runtime.devices import matmul_precision
from mindalle_jax.runtime.sharding import SplitByBatch, param_shardings
from mindalle_jax.sampling.codec import encode_pixels
from mindalle_jax.storage.adapters import BASE_FINGERPRINT, LORA_SCALE, adapter_shapes, matches, merged
from mindalle_jax.storage.card import run_card
from mindalle_jax.storage.results import write_model
from mindalle_jax.storage.weights import (
    fingerprint,
    leaf_shapes,
    load_params,
    load_stacked,
    map_weights,
    read_manifest,
)
from mindalle_jax.text.tokenizer import TextTokenizer
from mindalle_jax.training.config import SCRATCH, FinetuneConfig, TrainingConfig
from mindalle_jax.training.loop import Batch, Rows, Run, check_early, gather_to_host, run_training
from mindalle_jax.training.lora import init_adapters
from mindalle_jax.training.metrics import flops_per_sequence, read_metrics
from mindalle_jax.training.optimizer import make_optimizer
from mindalle_jax.training.previews import RECONSTRUCTIONS, Previewer, write_reconstructions
from mindalle_jax.training.run_dir import RECONSTRUCTIONS_FILE, check_base, start_folder
from mindalle_jax.training.step import (
    Metrics,
    Params,
    StepConfig,
    TrainState,
    compile_train_step,
    eval_step,
    init_state,
    model_params,
)

POOR_PSNR = 18.0
"""Decibels below which reconstructions by the VQGAN are called poor. The published VQGAN has about 20 on photographs
(Esser et al., 2021)."""


class FinetuneRun(Run):
    """One run of `mindalle finetune`."""

    result_is_best = True

    def __init__(self, config: FinetuneConfig, base: Path, out: Path, *, pairs: Mapping[str, Pairs] | None = None):
        """Checks everything that can be wrong, and writes nothing.

        config: as load_finetune_config gives it. base: the folder of the model to start from. out: the folder of the
        run. Raises ConfigError, CheckpointError, DataError or UsageError.
        """
        check_base(config, base)
        self.config, self.base = config, base
        self.model_config = config.model_config()
        self.task = "text"
        if config.image_only:
            self.task = "class" if config.stage2.use_cls_cond else "unconditional"
        super().__init__(
            config,
            out,
            image_size=config.stage1.hparams.resolution,
            tokenizer=None if config.image_only else _tokenizer(config, base),
            num_classes=config.stage2.hparams.n_classes,
            vqgan=vqgan_digest(base),
            pairs=pairs,
        )
        self.flops_per_sample = flops_per_sequence(self.model_config)
        self.origin = f"from {_origin(config)}; "

        # ---- what is trained
        training = config.training
        self.shapes = leaf_shapes(self.model_config, "stage2")
        for pattern in training.freeze:
            if not any(matches(path, [pattern]) for path in self.shapes):
                raise ConfigError(f"training.freeze: {pattern!r} matches none of {', '.join(self.shapes)}")
        if training.lora.rank:
            if training.freeze:
                raise ConfigError("training.freeze cannot be used with training.lora, which trains only the adapters")
            trained = adapter_shapes(self.shapes, training.lora)
        else:
            trained = {path: shape for path, shape in self.shapes.items() if not matches(path, training.freeze)}
        if not trained:
            raise ConfigError(
                f"training.freeze {list(training.freeze)} matches every parameter: nothing is left to train"
            )
        self.trained_shapes = trained
        if training.flash_attention and jax.default_backend() != "gpu":
            raise ConfigError(f"training.flash_attention needs an NVIDIA GPU; JAX uses {jax.default_backend()}")
        self.step_config = StepConfig(
            model=Transformer(
                config.stage2,
                dtype=self.dtype,
                remat=training.remat,
                flash_attention=training.flash_attention,
                constrain=SplitByBatch(self.mesh),
            ),
            optimizer=make_optimizer(config.optimizer, self.schedule, training.decay, trained),
            schedule=self.schedule,
            pad_id=None if self.tokenizer is None else self.tokenizer.pad_id,
            text_loss_weight=training.text_loss_weight,
            caption_dropout=training.caption_dropout,
            ema_decay=training.ema_decay,
            lora_scale=training.lora.alpha / training.lora.rank if training.lora.rank else 1.0,
            seed=training.seed,
        )

        self.frozen: Params = {}
        self.stage1: dict[str, Any] = {}  # the VQGAN, loaded by init_state if there are images to encode or to decode
        self.encoder = VQGAN(config.stage1)  # always in float32: stage 1 is small
        self.previewer: Previewer | None = None
        if training.sample_prompts and not training.sample_every_steps:
            self.notes.append("training.sample_prompts are not sampled: set training.sample_every_steps, such as 100")
        if training.sample_every_steps and not training.sample_prompts and self.task != "unconditional":
            self.notes.append("training.sample_every_steps does nothing without training.sample_prompts")
        if (training.sample_every_steps or not self.source.has_codes) and jax.process_count() == 1:
            prompts = training.sample_prompts or (("",) if self.task == "unconditional" else ())
            self.previewer = Previewer(self.model_config, prompts, self.tokenizer, self.source.classes)

    def prepare(self) -> None:
        """For a transfer or a run from scratch, writes the model to start from into the folder of the run."""
        self.base = start_folder(self.config, self.base, self.out)

    def base_fingerprint(self) -> str:
        """Returns the fingerprint of the weights that the run starts from."""
        return fingerprint(read_manifest(self.base)["tensors"])

    def init_state(self) -> TrainState:
        """Loads the parameters, sharded by the strategy: trained ones in float32, frozen ones in the compute dtype."""
        config = self.config
        shardings = param_shardings(self.shapes, config.sharding.strategy, self.mesh)
        dtypes = {path: np.dtype("float32" if path in self.trained_shapes else self.dtype) for path in self.shapes}
        leaves = load_stacked(self.base, "stage2", self.model_config, dtypes, shardings)
        params = {path: leaves.pop(path) for path in self.trained_shapes if path in leaves}
        if config.training.lora.rank:
            adapters = init_adapters(self.trained_shapes, config.training.seed)
            replicated = NamedSharding(self.mesh, PartitionSpec())
            params = {path: jax.device_put(array, replicated) for path, array in adapters.items()}
        self.frozen = leaves
        sources = [source for source in (self.source, self.valid_source) if source is not None]
        if self.previewer is not None or not all(source.has_codes for source in sources):
            self.stage1 = load_params(self.base, "stage1", self.model_config, jnp.dtype("float32"), self.mesh)
        return init_state(self.step_config, params)

    def compile_step(self, state: TrainState) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
        """Returns the compiled step.train_step."""
        step = compile_train_step(self.step_config, jax.tree.map(lambda leaf: leaf.sharding, state))
        return lambda state, batch: step(state, self.frozen, batch)

    def make_batch(self, rows: Rows) -> Batch:
        """Returns the batch of train_step: prefix, codes and index, in micro-batches."""
        batch = {"index": rows["index"].astype(np.uint32), "prefix": _prefix(rows)}
        return self._with_codes(self.shard_batch(batch | _images(rows), micro=True))

    def validate(self, state: TrainState) -> dict[str, float]:
        """Returns mean cross-entropies (nats) over the validation data, with the moving average if the run has one."""
        params, totals = state.ema or state.params, np.zeros(4)
        for rows in self.validation_rows():
            batch = {"prefix": _prefix(rows), "rows": rows["valid"].astype(np.float32)} | _images(rows)
            batch = self._with_codes(self.shard_batch(batch, micro=False))
            sums, counts = eval_step(self.step_config, params, self.frozen, batch)
            totals += np.array(jax.device_get([*sums, *counts]), np.float64)
        image, text = totals[0] / max(totals[2], 1), totals[1] / max(totals[3], 1)
        if self.config.image_only:
            return {"loss": image}
        return {"loss": image + self.config.training.text_loss_weight * text, "image_loss": image, "text_loss": text}

    def memory(self, state: TrainState) -> dict[str, Any]:
        """Returns the parameters, the optimizer's state, the average, and the VQGAN if it is loaded."""
        parts = {"trained": state.params, "frozen": self.frozen, "optimizer": state.opt_state, "average": state.ema}
        return parts | ({"vqgan": self.stage1} if self.stage1 else {})

    def preview_data(self) -> list[str]:
        """Writes reconstructions.png: images of the data above their reconstructions by the VQGAN; says how near.

        No sample of the model can be sharper than these.
        """
        path, source = self.out / RECONSTRUCTIONS_FILE, self.valid_source or self.source
        if self.previewer is None or source.has_codes or path.exists():
            return []
        part = source.part(0, RECONSTRUCTIONS)
        images = next(iter(self.load_rows(part, train=False)))["image"][: len(part)]
        psnr = write_reconstructions(
            self.config.stage1, self.stage1, images, path, dtype=self.dtype_name, mesh=self.mesh
        )
        lines = [f"{path.name}: the VQGAN reconstructs {len(images)} of your images with {psnr:.1f} dB (PSNR)"]
        if psnr < POOR_PSNR:
            lines.append(
                f"note: that is poor, and no sample of the model can be better: look at {path.name}, and train "
                "the VQGAN on your images first (mindalle train-vqgan)"
            )
        return lines

    def preview_samples(self, state: TrainState, step: int) -> None:
        """Writes samples/step_*.png: images of the sample prompts, by the moving average if the run has one."""
        if self.previewer is not None and self.previewer.prompts:
            stage2 = model_params(self.step_config, state.ema or state.params, self.frozen)
            path = self.out / "samples" / f"step_{step:06d}.png"
            params = {"stage1": self.stage1, "stage2": stage2}
            self.previewer.write_samples(params, path, dtype=self.dtype_name, mesh=self.mesh)

    def write_result(self, state: TrainState) -> None:
        """Turns the folder of the run into a model: of the moving average if the run has one, with adapters merged."""
        trained = {path: gather_to_host(leaf) for path, leaf in (state.ema or state.params).items()}
        if jax.process_index() == 0:
            captions = (caption for sample in self.source.samples for caption in sample.captions)
            data = f"{len(self.source):,} images, fingerprint {self.source.fingerprint()[:12]}"
            seen = int(state.step), self.batch_size
            write_finetuned(self.config, self.base, self.out, trained, captions, self.source.classes, seen, data)

    def _with_codes(self, batch: Batch) -> Batch:
        """Replaces the images of a batch by their codes."""
        if "image" in batch:
            with matmul_precision(jnp.float32):
                batch["codes"] = encode_batch(self.encoder, self.stage1, batch.pop("image"))
        return batch


def write_finetuned(
    config: FinetuneConfig,
    base: Path,
    folder: Path,
    trained: dict[str, np.ndarray],
    captions: Iterable[str],
    classes: Sequence[str] | None,
    seen: tuple[int, int],
    data: str | None = None,
) -> None:
    """Writes the model of a run into an existing folder, with adapters merged; with LoRA also the adapters alone.

    base: the model that the run started from. trained: what the run trains, float32 by path. captions, classes: of the
    training data, the latter if they have names. seen: the step of the weights, and the number of images per step.
    data: a description of the data, for the model card. Raises as write_model.
    """
    manifest = read_manifest(base)
    before = map_weights(base / "stage2.safetensors", manifest["tensors"]["stage2"])
    lora = config.training.lora
    scale = lora.alpha / lora.rank if lora.rank else 1.0

    def leaf(path: str, shape: tuple[int, ...]) -> np.ndarray:
        weight = trained[path] if path in trained else np.asarray(before[path], np.float32)
        return merged(path, weight, trained, scale)

    about: dict[str, Any] = {"step": seen[0], "classes": classes or manifest.get("classes")}
    if not config.image_only:
        before_or_now = {manifest.get("caption_dropout"), config.training.caption_dropout or None} - {None}
        about["caption_dropout"] = max(before_or_now, default=None)
    card = run_card(base, folder, config.model_config(), _origin(config), _facts(config, folder, seen, data))
    files = {"README.md": card.encode()}
    if lora.rank:
        import safetensors.numpy

        metadata = {LORA_SCALE: str(scale), BASE_FINGERPRINT: fingerprint(manifest["tensors"])}
        files["adapters.safetensors"] = safetensors.numpy.save(trained, metadata=metadata)
    write_model(
        base,
        config.model_config(),
        folder,
        leaf,
        f"fine-tuned from {base.name}",
        about=about,
        captions=captions,
        files=files,
    )


def _origin(config: FinetuneConfig) -> str:
    """Returns the name of the model that a run starts from: a name as it is, of a path its last part."""
    training = config.training
    name = training.vqgan if training.init_from == SCRATCH else training.init_from
    name = Path(name).name if os.path.exists(os.path.expanduser(name)) else name
    return f"scratch, over the codes of {name}" if training.init_from == SCRATCH else name


def _facts(config: FinetuneConfig, folder: Path, seen: tuple[int, int], data: str | None) -> dict[str, object]:
    """Returns what the model card says of a run."""
    metrics = folder / "metrics.jsonl"
    lines = read_metrics(metrics) if metrics.exists() else []
    losses = {line["step"]: line.get("loss") for line in lines if line["kind"] == "valid"}
    lora, freeze = config.training.lora.rank, config.training.freeze
    return {
        "Trained": f"adapters of rank {lora}" if lora else "all weights but a part" if freeze else "all weights",
        "Steps": f"{seen[0]:,} of {seen[1]} images",
        "Data": data,
        "Learning rate": f"{config.optimizer.base_lr:g}",
        "Caption dropout": config.training.caption_dropout or None,
        "Validation loss": None if losses.get(seen[0]) is None else f"{losses[seen[0]]:.4f} nats",
    }


def finetune(
    config_file: str | Path,
    overrides: Sequence[str],
    out: Path,
    *,
    ignore_fingerprint: bool = False,
    extend: bool = False,
) -> bool:
    """Runs `mindalle finetune`: reads the configuration, finds the model to start from, and starts or resumes the run.

    Returns True if the run is complete, and False if a signal stopped it. Raises as read_finetune and run_training.
    """
    check_early(ConfigFile(config_file, overrides), FinetuneConfig)
    config, base = read_finetune(config_file, overrides)
    out = Path(os.path.expanduser(out))
    make_run = lambda: FinetuneRun(config, base, out)  # noqa: E731
    return run_training(config, out, make_run, ignore_fingerprint=ignore_fingerprint, extend=extend)


def read_finetune(config_file: str | Path, overrides: Sequence[str]) -> tuple[FinetuneConfig, Path]:
    """Reads the configuration; returns it with the folder of the model to start from (from scratch: of the VQGAN).

    Fields of dataset, stage1 and stage2 that the file leaves out are as in that model. Raises ConfigError, and as
    find_model.
    """
    file = ConfigFile(config_file, overrides)
    training = file.section("training", TrainingConfig)
    training.check_init_from()
    base = find_model(training.vqgan if training.init_from == SCRATCH else training.init_from)
    return file.config(FinetuneConfig, load_config(base / "config.yaml")), base


def _tokenizer(config: FinetuneConfig, base: Path) -> TextTokenizer:
    folder = Path(config.training.tokenizer or base / "tokenizer")
    if config.training.init_from == SCRATCH and not config.training.tokenizer and not folder.exists():
        raise ConfigError(
            f"{base} has no tokenizer; name one under training.tokenizer (mindalle train-tokenizer DATA makes one)"
        )
    tokenizer = TextTokenizer(folder, config.dataset.context_length, config.stage2.vocab_size_txt)
    tokenizer.known_words = None  # no warnings at previews: the run teaches more words
    return tokenizer


def _images(rows: Rows) -> Rows:
    return {name: rows[name] for name in ("image", "codes") if name in rows}


def _prefix(rows: Rows) -> np.ndarray:
    """Returns int32[B, p]: text ids, or class labels [B, 1], or zeros [B, 1]."""
    if "text" in rows:
        return rows["text"]
    return rows["label"][:, None] if "label" in rows else np.zeros((len(rows["index"]), 1), np.int32)


@partial(jax.jit, static_argnames="encoder")
def encode_batch(encoder: VQGAN, params: dict[str, Any], images: jax.Array) -> jax.Array:
    """Encodes images uint8[..., b, S, S, 3], one micro-batch of b at a time, into codes int32[..., b, t].

    Images that are sharded over the batch are encoded on the device that holds them. params: parameters of the VQGAN,
    nested.
    """
    if images.ndim > 4:
        return jax.lax.map(partial(encode_batch, encoder, params), images)
    codes = encode_pixels(encoder, params, images.astype(jnp.float32) / 255 * 2 - 1)
    return codes.reshape(len(codes), -1)
