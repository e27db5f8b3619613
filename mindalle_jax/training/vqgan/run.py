"""Training of a VQGAN, from scratch or from existing weights.

images -> parameters on the mesh -> the loop -> model folder with a VQGAN alone
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mindalle_jax.config.file import ConfigFile, load_config
from mindalle_jax.config.schema import Config, DatasetConfig, Stage1Config, Stage2Config, Stage2Hparams
from mindalle_jax.data import codes
from mindalle_jax.errors import ConfigError, DataError
from mindalle_jax.hub.resolve import find_model
from mindalle_jax.interop.lpips import read_lpips
from mindalle_jax.models.vqgan import VQGAN
from mindalle_jax.storage.results import write_vqgan
from mindalle_jax.storage.weights import fingerprint, leaf_shapes, load_stacked, nest, read_manifest
from mindalle_jax.training.config import SCRATCH
from mindalle_jax.training.loop import Batch, Rows, Run, check_early, gather_to_host, run_training
from mindalle_jax.training.optimizer import make_optimizer
from mindalle_jax.training.previews import RECONSTRUCTIONS, write_reconstructions
from mindalle_jax.training.step import Metrics
from mindalle_jax.training.vqgan.codebook import perplexity, redundant, steps_to_fill
from mindalle_jax.training.vqgan.config import VqganTrainConfig, VqganTrainingConfig
from mindalle_jax.training.vqgan.discriminator import PatchDiscriminator
from mindalle_jax.training.vqgan.step import (
    EvalSums,
    VqganState,
    VqganStepConfig,
    compile_vqgan_step,
    discriminator_shapes,
    fresh_params,
    init_vqgan_state,
    vqgan_eval_step,
)


class VqganRun(Run):
    """One run of `mindalle train-vqgan`. All parameters are on every device, and batches are split over devices."""

    def __init__(self, config: VqganTrainConfig, base: Path | None, out: Path):
        """Checks everything that can be wrong, and writes nothing.

        base: the folder of the model whose VQGAN is trained further; None: from scratch. out: the folder of the run.
        Raises ConfigError, CheckpointError, DataError or UsageError.
        """
        self.config, self.base, self.task = config, base, "unconditional"
        self.model_config = vqgan_model_config(config.stage1)
        for path in (config.data.train, config.data.valid):
            if path and (Path(path) / codes.MANIFEST).exists():
                raise DataError(f"{path} holds codes; a VQGAN is trained on images")
        super().__init__(config, out, image_size=config.stage1.hparams.resolution)
        training, losses = config.training, config.training.losses
        batch, filling = self.batch_size, 0
        if base is None:
            filling = steps_to_fill(config.stage1.n_embed, batch * config.stage1.code_size**2)
        if training.quantise_from_step + filling >= self.max_steps:
            raise ConfigError(
                f"training.quantise_from_step {training.quantise_from_step} and the {filling} steps that fill a "
                f"fresh codebook must be fewer than all steps, {self.max_steps}: the codebook is learned after them"
            )
        if training.merge_codes and self.valid_source is None:
            raise ConfigError("training.merge_codes needs data.valid, to measure how far features are from their codes")
        if losses.locality and batch == self.micro_batches:
            raise ConfigError("training.losses.locality mixes images: experiment.local_batch_size must be at least 2")
        if base is not None:
            _check_same(config.stage1, load_config(base / "config.yaml").stage1, base)
        self.lpips: dict[str, Any] = {}
        if losses.perceptual:
            self.lpips = read_lpips(training.vgg_weights, training.lpips_weights)
        discriminator = None
        if losses.adversarial and losses.start_step < self.max_steps:
            sizes = training.discriminator
            discriminator = PatchDiscriminator(sizes.width, sizes.layers, self.dtype)
        self.step_config = VqganStepConfig(
            model=VQGAN(config.stage1, dtype=self.dtype),
            discriminator=discriminator,
            optimizer=make_optimizer(
                config.optimizer, self.schedule, "all", leaf_shapes(self.model_config, "stage1")
            ),
            # Its first step is step start_step of the run, and has the learning rate of that step.
            discriminator_optimizer=discriminator and make_optimizer(
                config.optimizer, lambda step: self.schedule(step + losses.start_step), "all",
                discriminator_shapes(discriminator, config.stage1.hparams.resolution),
            ),
            schedule=self.schedule,
            losses=losses,
            quantize_from_step=training.quantise_from_step,
            restart_after_steps=training.restart_after_steps,
            restart_redundant=training.merge_codes > 0,
            ema_decay=training.ema_decay,
            seed=training.seed,
        )  # fmt: skip

    def base_fingerprint(self) -> str:
        """Returns the fingerprint of the model whose VQGAN is trained further, or "scratch"."""
        return SCRATCH if self.base is None else fingerprint(read_manifest(self.base)["tensors"])

    def init_state(self) -> VqganState:
        """Returns a state with fresh or loaded parameters, float32, on every device."""
        replicated = NamedSharding(self.mesh, PartitionSpec())
        self.lpips = jax.device_put(self.lpips, replicated)
        if self.base is None:
            params = jax.device_put(fresh_params(self.config.stage1, self.config.training.seed), replicated)
        else:
            paths = leaf_shapes(self.model_config, "stage1")
            float32, shardings = dict.fromkeys(paths, np.dtype("float32")), dict.fromkeys(paths, replicated)
            params = load_stacked(self.base, "stage1", self.model_config, float32, shardings)
        return init_vqgan_state(self.step_config, params, self.mesh, fresh_codebook=self.base is None)

    def compile_step(self, state: VqganState) -> Callable[[VqganState, Batch], tuple[VqganState, Metrics]]:
        """Returns the compiled vqgan_train_step."""
        step = compile_vqgan_step(self.step_config, self.mesh)
        return lambda state, batch: step(state, self.lpips, batch)

    def make_batch(self, rows: Rows) -> Batch:
        """Returns the batch of vqgan_train_step: image, in micro-batches."""
        return self.shard_batch({"image": rows["image"]}, micro=True)

    def validate(self, state: VqganState) -> dict[str, float]:
        """Returns means over the validation images, and how codes are used, for the moving average if there is one."""
        totals = self._totals(state)
        num_images = max(totals.num_images, 1)
        return {
            "loss": float(totals.loss / num_images),
            "l1_loss": float(totals.l1 / num_images),
            "psnr": float(totals.psnr / num_images),
            "perplexity": float(perplexity(jnp.asarray(totals.counts, jnp.float32))),
            "codes_used": float(np.mean(totals.counts > 0)),
        }

    def _totals(self, state: VqganState) -> EvalSums:
        """Returns sums over the validation images, for the moving average if there is one."""
        totals: Any = EvalSums(0.0, 0.0, 0.0, 0.0, 0, 0.0)
        for rows in self.validation_rows():
            batch = self.shard_batch({"image": rows["image"], "rows": rows["valid"].astype(np.float32)}, micro=False)
            sums = jax.device_get(vqgan_eval_step(self.step_config, state.ema or state.params, self.lpips, batch))
            totals = EvalSums(*(total + np.asarray(part, np.float64) for total, part in zip(totals, sums, strict=True)))
        return totals

    def memory(self, state: VqganState) -> dict[str, Any]:
        """Returns the parameters, the optimizer's state, the average, and the networks that only training uses."""
        discriminator = (state.discriminator, state.discriminator_opt_state)
        return {"trained": state.params, "optimizer": state.opt_state, "average": state.ema,
                "discriminator": discriminator, "perceptual": self.lpips}  # fmt: skip

    def preview_samples(self, state: VqganState, step: int) -> None:
        """Writes samples/step_*.png: images above their reconstructions. Images are of the validation data if given."""
        if jax.process_count() > 1:
            return
        part = (self.valid_source or self.source).part(0, RECONSTRUCTIONS)
        images = next(iter(self.load_rows(part, train=False)))["image"][: len(part)]
        params, path = nest(state.ema or state.params), self.out / "samples" / f"step_{step:06d}.png"
        write_reconstructions(self.config.stage1, params, images, path, dtype=self.dtype_name, mesh=self.mesh)

    def write_result(self, state: VqganState) -> None:
        """Turns the folder of the run into a model without a transformer: of the moving average if there is one."""
        params = {path: gather_to_host(leaf) for path, leaf in (state.ema or state.params).items()}
        stage1, merge = self.config.stage1, self.config.training.merge_codes
        if merge:
            totals = self._totals(state)
            distance = jnp.float32(merge * totals.distance / max(totals.num_images, 1))
            codebook = params["codebook"][np.argsort(-totals.counts, kind="stable")]
            params["codebook"] = codebook[~np.asarray(redundant(jnp.asarray(codebook), distance))]
            stage1 = dataclasses.replace(stage1, n_embed=len(params["codebook"]))
            if jax.process_index() == 0:
                print(f"{stage1.n_embed} of {self.config.stage1.n_embed} codes are left", file=sys.stderr)
        if jax.process_index() == 0:
            about = "trained from scratch" if self.base is None else f"trained further from {self.base.name}"
            write_vqgan(vqgan_model_config(stage1), self.out, params, f"VQGAN, {about}")


def train_vqgan(
    config_file: str | Path,
    overrides: Sequence[str],
    out: Path,
    *,
    ignore_fingerprint: bool = False,
    extend: bool = False,
) -> bool:
    """Runs `mindalle train-vqgan`: reads the configuration, and starts or resumes the run.

    Fields of stage1 that the file leaves out are as in the model of training.init_from. Returns True if the run is
    complete, and False if a signal stopped it. Raises ConfigError, and as find_model and run_training.
    """
    out, file = Path(os.path.expanduser(out)), ConfigFile(config_file, overrides)
    check_early(file, VqganTrainConfig)
    init_from = file.section("training", VqganTrainingConfig).init_from
    base = None if init_from == SCRATCH else find_model(init_from)
    config = file.config(VqganTrainConfig, None if base is None else load_config(base / "config.yaml"))
    make_run = lambda: VqganRun(config, base, out)  # noqa: E731
    return run_training(config, out, make_run, ignore_fingerprint=ignore_fingerprint, extend=extend)


def vqgan_model_config(stage1: Stage1Config) -> Config:
    """Returns the config.yaml of a VQGAN alone. Its section `stage2` only holds the number and length of the codes."""
    hparams = Stage2Hparams(ctx_len_img=stage1.code_size**2)
    return Config(
        dataset=DatasetConfig(image_resolution=stage1.hparams.resolution),
        stage1=stage1,
        stage2=Stage2Config(vocab_size_img=stage1.n_embed, hparams=hparams),
    )


def _check_same(ours: Stage1Config, theirs: Stage1Config, base: Path) -> None:
    """Raises ConfigError if weights of `theirs` do not fit `ours`. Dropout may differ: it changes no shape."""
    before, now = (
        {f"stage1.{name}": value for name, value in dataclasses.asdict(config).items() if name != "hparams"}
        | {f"stage1.hparams.{name}": value for name, value in dataclasses.asdict(config.hparams).items()}
        for config in (theirs, ours)
    )
    lines = [
        f"{path} was {before[path]!r} and is {value!r}"
        for path, value in now.items()
        if before[path] != value and not path.endswith("pdrop")
    ]
    if lines:
        raise ConfigError(f"the model to start from, {base}, does not fit: {'; '.join(lines)}")
