"""Contrastive training of CLIP from scratch. The result is a folder that ranks images.

tokenizer, images with captions -> fresh parameters on the mesh -> the loop -> CLIP folder of Hugging Face
"""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tokenizers import Tokenizer

from mindalle_jax.config.file import ConfigFile
from mindalle_jax.errors import CheckpointError, ConfigError, DataError
from mindalle_jax.interop.clip import ClipModel, write_clip
from mindalle_jax.interop.clip_config import check_clip_config
from mindalle_jax.interop.clip_layouts import clip_leaf_shapes
from mindalle_jax.models.clip import CLIP, ClipConfig, ClipTextConfig
from mindalle_jax.storage.files import disk_errors
from mindalle_jax.storage.weights import nest
from mindalle_jax.text.clip_tokenizer import clip_ids, read_clip_tokenizer
from mindalle_jax.training.clip.step import ClipStepConfig, compile_clip_step, eval_sums, init_params
from mindalle_jax.training.config import LoopConfig, RunConfig
from mindalle_jax.training.loop import Batch, Rows, Run, check_early, gather_to_host, run_training
from mindalle_jax.training.optimizer import make_optimizer
from mindalle_jax.training.step import Metrics, TrainState, init_state


@dataclasses.dataclass(frozen=True)
class ClipTrainingConfig(LoopConfig):
    """The section `training` of a run that trains CLIP. Weight decay covers only matrices."""

    tokenizer: str = ""
    """A folder that `mindalle train-tokenizer --kind clip` wrote, or another folder that text.clip_tokenizer reads."""


@dataclasses.dataclass(frozen=True)
class ClipTrainConfig(RunConfig):
    """The configuration file of `mindalle train-clip`."""

    clip: ClipConfig = ClipConfig()
    """Sizes of the network. clip.text.vocab_size and eos_token_id follow from the tokenizer; leave them out."""
    training: ClipTrainingConfig = ClipTrainingConfig()

    def check(self) -> None:
        """As RunConfig.check; also checks the sizes of CLIP, the strategy and the tokenizer."""
        super().check()
        text = self.clip.text
        if (text.vocab_size, text.eos_token_id) != (ClipTextConfig.vocab_size, ClipTextConfig.eos_token_id):
            raise ConfigError("clip.text.vocab_size and eos_token_id follow from training.tokenizer; leave them out")
        if text.max_position_embeddings < 2:
            raise ConfigError(
                f"clip.text.max_position_embeddings must be at least 2, not {text.max_position_embeddings}: a text has "
                "a start and an end"
            )
        if self.sharding.strategy != "replicated":
            raise ConfigError(
                f"sharding.strategy must be 'replicated', not {self.sharding.strategy!r}: CLIP is trained with all "
                "parameters on every device"
            )
        if not self.training.tokenizer:
            raise ConfigError(
                "training.tokenizer must name a folder; mindalle train-tokenizer DATA --kind clip makes one"
            )


class ClipRun(Run):
    """One run of `mindalle train-clip`. All parameters are on every device, and batches are split over devices."""

    task = "text"

    def __init__(self, config: ClipTrainConfig, out: Path):
        """Checks everything that can be wrong, and writes nothing.

        config: as load_config gives it. out: the folder of the run. Raises ConfigError, CheckpointError, DataError or
        UsageError.
        """
        self.clip_tokenizer, self.clip_config = read_tokenizer(config)
        length = self.clip_config.text.max_position_embeddings
        super().__init__(
            config,
            out,
            image_size=self.clip_config.vision.image_size,
            tokenizer=partial(clip_ids, self.clip_tokenizer, length=length),
        )
        for source in (self.source, self.valid_source):
            if source is not None and source.has_codes:
                raise DataError(f"{source.path} holds codes; CLIP is trained on images")
        if self.micro_batches > 1:
            total = self.batch_size
            raise ConfigError(
                f"experiment.local_batch_size must be {total // self.mesh.size}, total_batch_size {total} on "
                f"{self.mesh.size} devices, not {config.experiment.local_batch_size}: each image is compared with all "
                "texts of a step, so there are no micro-batches"
            )
        self.shapes = clip_leaf_shapes(self.clip_config)
        self.step_config = ClipStepConfig(
            model=CLIP(self.clip_config, dtype=self.dtype),
            optimizer=make_optimizer(config.optimizer, self.schedule, "matrices", self.shapes),
            schedule=self.schedule,
            ema_decay=config.training.ema_decay,
        )
        self.seed = config.training.seed

    def base_fingerprint(self) -> str:
        """Returns the digest of the tokenizer."""
        return hashlib.sha256(self.clip_tokenizer.to_str().encode()).hexdigest()

    def init_state(self) -> TrainState:
        """Returns a state with fresh parameters, on every device."""
        replicated = NamedSharding(self.mesh, PartitionSpec())
        fresh = init_params(self.clip_config, self.shapes, self.seed)
        return init_state(self.step_config, {path: jax.device_put(array, replicated) for path, array in fresh.items()})

    def compile_step(self, state: TrainState) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
        """Returns the compiled clip_step."""
        return compile_clip_step(self.step_config, jax.tree.map(lambda leaf: leaf.sharding, state))

    def make_batch(self, rows: Rows) -> Batch:
        """Returns the batch of clip_step: image and text."""
        return self.shard_batch({name: rows[name] for name in ("image", "text")}, micro=False)

    def validate(self, state: TrainState) -> dict[str, float]:
        """Returns the loss, and the shares of images and texts whose own partner is the best match in the batch.

        They are of the moving average if the run has one. All depend on experiment.valid_batch_size: among more images
        it is harder to find the right one.
        """
        params, totals = state.ema or state.params, np.zeros(4)
        for rows in self.validation_rows():
            chosen = {name: rows[name] for name in ("image", "text")} | {"rows": rows["valid"].astype(np.float32)}
            batch = self.shard_batch(chosen, micro=False)
            sums = eval_sums(self.step_config.model, params, batch, batch.pop("rows"))
            totals += np.array(jax.device_get(list(sums)), np.float64)
        loss, image_to_text, text_to_image = totals[:3] / max(totals[3], 1)
        return {"loss": loss, "image_to_text": image_to_text, "text_to_image": text_to_image}

    def memory(self, state: TrainState) -> dict[str, Any]:
        """Returns the parameters, the optimizer's state, and the average."""
        return {"trained": state.params, "optimizer": state.opt_state, "average": state.ema}

    def write_result(self, state: TrainState) -> None:
        """Turns the folder of the run into a CLIP model: of the moving average if the run has one."""
        params = {path: gather_to_host(leaf) for path, leaf in (state.ema or state.params).items()}
        if jax.process_index() != 0:
            return
        complete = self.out / "result"
        write_clip(complete, ClipModel(self.clip_config, nest(params), self.clip_tokenizer), overwrite=True)
        with disk_errors(self.out):
            for file in complete.iterdir():
                os.replace(file, self.out / file.name)
            complete.rmdir()


def train_clip(
    config_file: str | Path,
    overrides: Sequence[str],
    out: Path,
    *,
    ignore_fingerprint: bool = False,
    extend: bool = False,
) -> bool:
    """Runs `mindalle train-clip`: reads the configuration, and starts or resumes the run.

    Returns True if the run is complete, and False if a signal stopped it. Raises as load_config, ClipRun and
    run_training.
    """
    out, file = Path(os.path.expanduser(out)), ConfigFile(config_file, overrides)
    check_early(file, ClipTrainConfig)
    config = file.config(ClipTrainConfig)
    make_run = lambda: ClipRun(config, out)  # noqa: E731
    return run_training(config, out, make_run, ignore_fingerprint=ignore_fingerprint, extend=extend)


def read_tokenizer(config: ClipTrainConfig) -> tuple[Tokenizer, ClipConfig]:
    """Reads the tokenizer; returns it with the sizes of the network that fit it. Its end token must be its last one.

    Raises CheckpointError for a tokenizer that cannot be read, and ConfigError for sizes that do not fit together.
    """
    tokenizer = read_clip_tokenizer(Path(config.training.tokenizer), ClipTextConfig(vocab_size=1 << 20, eos_token_id=2))
    end = tokenizer.encode("").ids[-1]
    clip = dataclasses.replace(
        config.clip, text=dataclasses.replace(config.clip.text, vocab_size=end + 1, eos_token_id=end)
    )
    try:
        check_clip_config(clip, "clip")
    except CheckpointError as error:
        raise ConfigError(str(error)) from None
    return tokenizer, clip
