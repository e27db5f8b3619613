"""The training loop that all runs share, and the function that starts or resumes a run.

    run_training: check the folder -> build the run -> create the folder -> train
    Run:          data -> batches -> (resume) -> steps, validation, previews, checkpoints -> result

If a run is interrupted, the same command resumes it after the last checkpoint, with the same samples and numbers.
"""

import abc
import math
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from mindalle_jax.config.file import ConfigFile
from mindalle_jax.data.check import MAX_CAPTIONS, describe
from mindalle_jax.data.loader import Loader
from mindalle_jax.data.memory import Pairs, memory_source
from mindalle_jax.data.records import Columns
from mindalle_jax.data.samples import DataTask, Source
from mindalle_jax.data.sources import check_path, open_source
from mindalle_jax.data.walk import Split
from mindalle_jax.errors import CheckpointError, ConfigError, NonFiniteError
from mindalle_jax.runtime.devices import DType, device_memory, pinned, prepare_process
from mindalle_jax.runtime.sharding import BATCH, batch_devices, make_mesh
from mindalle_jax.runtime.signals import stop_on_signals
from mindalle_jax.storage.files import disk_errors
from mindalle_jax.text.tokenizer import TextTokenizer
from mindalle_jax.training.checkpoint import Checkpoints
from mindalle_jax.training.config import DataConfig, RunConfig
from mindalle_jax.training.metrics import Monitor, memory_line
from mindalle_jax.training.optimizer import learning_rate
from mindalle_jax.training.run_dir import check_run_dir, create_run_dir, lock_run_dir, write_config
from mindalle_jax.training.step import Metrics
from mindalle_jax.training.summary import SUMMARY_FILE, ended_at, write_summary

MAX_SKIPPED = 10
"""A run stops after this many steps in a row without a finite loss."""

Batch = dict[str, jax.Array]
Rows = dict[str, np.ndarray]


def check_early(file: ConfigFile, kind: type[RunConfig], in_memory: str | None = None) -> None:
    """Checks what needs no model, before one is downloaded: names and types of all fields, and the data.

    in_memory: the name that stands for data in memory. Raises ConfigError or DataError.
    """
    file.check_fields(kind)
    data = file.section("data", DataConfig)
    for field, path in (("data.train", data.train), ("data.valid", data.valid)):
        if in_memory is None or path != in_memory:
            check_path(path, field, Columns(data.image_column, data.caption_column))


def run_training(
    config: RunConfig,
    out: Path,
    make_run: Callable[[], "Run"],
    *,
    ignore_fingerprint: bool = False,
    extend: bool = False,
) -> bool:
    """Starts or resumes the run of `config` in the folder `out`; returns whether the run is complete.

    make_run: builds the run, and raises if the configuration, the model or the data is wrong. Nothing is written before
    it returns. ignore_fingerprint: as for Run.__call__. extend: the run may be longer than it was. Raises as
    check_run_dir, make_run, Run.extend and Run.__call__.
    """
    with pinned():
        before = check_run_dir(out, config, extend=extend)
        run = make_run()
        if extend and before is not None:
            run.extend(before)
        multihost_utils.sync_global_devices("checked")  # the first process changes a folder that all have checked
        with lock_run_dir(out):
            create_run_dir(out, config)
            run.prepare()
            multihost_utils.sync_global_devices("created")  # all processes read what the first one wrote
            return run(ignore_fingerprint=ignore_fingerprint)


class Run(abc.ABC):
    """One run. The constructor sets up mesh and data, and a call trains. A subclass defines what is trained.

    A state is a NamedTuple of trees of arrays on the mesh. This class uses two of its fields: `step`, int32, is the
    number of batches seen. `skipped`, int32, is the number of the last steps in a row that changed nothing, because a
    loss or gradient was not finite.
    """

    task: DataTask
    result_is_best: bool = False
    """Whether the result is the checkpoint with the lowest validation loss, if there is one, and not the last state."""
    origin: str = ""
    """The model that the run starts from, for its first line: "from demo; "."""
    flops_per_sample: float = 0.0
    """Number of operations of a forward and a backward pass over one sample, for MFU; 0: not counted."""

    _extended: bool = False
    """Whether the run goes on although it may be complete."""
    callbacks: Sequence[Callable[[dict[str, Any]], bool | None]] = ()
    """Called with the metrics of each step and validation; a run ends early if one returns True."""

    def __init__(
        self,
        config: RunConfig,
        out: Path,
        *,
        image_size: int,
        tokenizer: Any = None,
        pairs: Mapping[str, Pairs] | None = None,
        num_classes: int | None = None,
        vqgan: str | None = None,
    ):
        """Sets up mesh and data, and writes nothing.

        out: folder of the run. image_size: side in pixels. tokenizer: as for Loader. pairs: data in memory, "train" or
        "valid" -> pairs; the rest is opened. num_classes, vqgan: as for open_source.
        Raises ConfigError, DataError or UsageError.
        """
        self._config, self.out, self.tokenizer, self._image_size = config, out, tokenizer, image_size
        self.notes: list[str] = []  # about the configuration, for the start of the run
        prepare_process()

        # ---- mesh and batches
        self.mesh = make_mesh(config.sharding.strategy, config.sharding.sizes())
        experiment = config.experiment
        if batch_devices(self.mesh) % jax.process_count():
            raise ConfigError(
                f"sharding: a batch in {batch_devices(self.mesh)} parts cannot be shared by {jax.process_count()} "
                "processes; give tensor a size that divides the number of devices of one process"
            )
        self.valid_batch = -(-experiment.valid_batch_size // batch_devices(self.mesh)) * batch_devices(self.mesh)
        amp = experiment.use_amp and jax.default_backend() != "cpu"
        self.dtype_name: DType = "bfloat16" if amp else "float32"
        self.dtype = jnp.dtype(self.dtype_name)

        # ---- data
        columns = Columns(config.data.image_column, config.data.caption_column)

        def source(name: Split, path: str, classes: list[str] | None) -> Source:
            if pairs and name in pairs:
                return memory_source(pairs[name], self.task, num_classes=num_classes, known_classes=classes)
            options: Any = {"num_classes": num_classes, "vqgan": vqgan, "columns": columns, "classes": classes}
            return open_source(path, self.task, split=name, **options)

        self.source = source("train", config.data.train, None)
        self.valid_source: Source | None = None
        if config.data.valid is not None:
            self.valid_source = source("valid", config.data.valid, self.source.classes)
        plan = config.plan_batches(len(self.source), batch_devices(self.mesh), self.source.report)
        if plan.note:
            self.notes.append(plan.note)
        self.batch_size, self.micro_batches = plan.total, plan.total // (plan.local * batch_devices(self.mesh))
        self.max_steps = config.count_steps(len(self.source), self.batch_size)
        self.loader = self.load_rows(self.source, train=True)
        self.schedule = learning_rate(config.optimizer, plan.warmup_steps, self.max_steps)

    # ---- a subclass implements these

    @abc.abstractmethod
    def base_fingerprint(self) -> str:
        """Returns a digest of the weights or tokenizer that the run starts from; another one refuses a checkpoint."""

    @abc.abstractmethod
    def init_state(self) -> Any:
        """Returns the state before the first step."""

    @abc.abstractmethod
    def compile_step(self, state: Any) -> Callable[[Any, Batch], tuple[Any, Metrics]]:
        """Returns a function (state, batch) -> (next state, metrics) for states with the shardings of this one.

        It donates the state. Metrics are scalars: loss, grad_norm, learning_rate, skipped (as in the state), and the
        subclass's own.
        """

    @abc.abstractmethod
    def make_batch(self, rows: Rows) -> Batch:
        """Turns the loader's rows [total batch, ...] into the batch of a step on the mesh; see `shard_batch`."""

    @abc.abstractmethod
    def validate(self, state: Any) -> dict[str, float]:
        """Returns metrics over valid_source, see `validation_rows`. The best checkpoint has the lowest `loss`."""

    @abc.abstractmethod
    def write_result(self, state: Any) -> None:
        """Turns the folder of the run into a model."""

    def prepare(self) -> None:  # noqa: B027
        """Is called after the folder of the run is made and before init_state; may write the model to start from."""

    def memory(self, state: Any) -> dict[str, Any]:
        """Returns the trees of arrays that stay on the devices, by the names that the log shows."""
        return {"state": state}

    def preview_data(self) -> list[str]:
        """Is called before the first step, also when a run resumes; may write images of the data. Returns lines."""
        return []

    def preview_samples(self, state: Any, step: int) -> None:  # noqa: B027
        """Is called every training.sample_every_steps steps; may write images of the model."""

    # ---- a subclass can use these

    def load_rows(self, source: Source, train: bool) -> Loader:
        """Returns the batches of a source: endless and shuffled for training, else one pass in order."""
        config = self._config
        return Loader(
            source,
            batch_size=self.batch_size if train else self.valid_batch,
            train=train,
            seed=config.training.seed,
            image_size=self._image_size,
            tokenizer=self.tokenizer,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            threads=config.data.threads,
            group_size=config.data.group_size,
        )

    def validation_rows(self) -> Iterator[Rows]:
        """Yields rows [valid_batch, ...]; `valid` bool[valid_batch] is False for rows that only fill the last batch."""
        assert self.valid_source is not None
        return iter(self.load_rows(self.valid_source, train=False))

    def shard_batch(self, rows: Rows, micro: bool) -> Batch:
        """Splits the rows over the mesh. Returns arrays [a, b, ...] in micro-batches if `micro`, else [b, ...]."""
        sharded = {}
        for name, array in rows.items():
            if micro:
                array = array.reshape(self.micro_batches, -1, *array.shape[1:])
            sharding = NamedSharding(self.mesh, PartitionSpec(None, BATCH) if micro else PartitionSpec(BATCH))
            sharded[name] = jax.make_array_from_process_local_data(sharding, np.ascontiguousarray(array))
        return sharded

    # ---- the loop

    def extend(self, before: RunConfig) -> None:
        """Makes the call continue a run of the configuration `before`, which may be complete, up to the new length.

        Raises ConfigError if the new length is shorter.
        """
        steps = before.count_steps(len(self.source), self.batch_size)
        if self.max_steps < steps:
            raise ConfigError(f"{self.out}: --extend makes a run longer; it has {steps} steps, not {self.max_steps}")
        self._extended = True
        if self._config.optimizer.sched_type == "cosine" and self.max_steps > steps:
            self.notes.append(
                f"the learning rate fell along a cosine of {steps} steps, and now follows one of {self.max_steps}: the "
                f"result differs from that of {self.max_steps} steps in one run; optimizer.sched_type=constant does not"
            )

    def __call__(self, *, ignore_fingerprint: bool = False) -> bool:
        """Trains. Returns True if the run is complete, and False if SIGTERM or Ctrl-C stopped it after a save.

        Raises NonFiniteError after MAX_SKIPPED steps in a row without a finite loss, DeviceMemoryError if the
        parameters or a step do not fit, CheckpointError if the run cannot resume, OutputError if a write fails, and
        DataError if too many images cannot be read.
        """
        # Flax's remat keeps tracers in a cache, which jax_check_tracer_leaks would report as a leak.
        with pinned(self.dtype), jax.check_tracer_leaks(False), disk_errors(self.out):
            return self._train(ignore_fingerprint)

    def _train(self, ignore_fingerprint: bool) -> bool:
        config, training, batch_size = self._config, self._config.training, self.batch_size
        start_s = time.perf_counter()
        with device_memory(
            "the parameters do not fit into the memory of the devices: shard them (sharding.strategy=fsdp)"
        ):
            state = self.init_state()
        step_fn = self.compile_step(state)
        base_fingerprint = self.base_fingerprint()
        steps_per_epoch = max(1, len(self.source) // batch_size)
        checkpoint_every = training.checkpoint_every_steps or steps_per_epoch * config.experiment.save_ckpt_freq
        validate_every = training.validate_every_steps or steps_per_epoch * config.experiment.test_freq
        fingerprint = f"{len(self.source):,} samples, {self.source.fingerprint()}"
        too_large = "a step does not fit into the memory of the devices; lower experiment.local_batch_size"
        with Checkpoints(self.out / "checkpoints", keep=training.keep_checkpoints, fingerprint=fingerprint) as saved:
            # ---- resume
            done = position = 0  # steps, and place in the stream of samples
            target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
            if saved.latest_step() is not None:
                del state  # so that it is not in memory twice
                restored = saved.restore(target, ignore_fingerprint=ignore_fingerprint)
                if restored.data_state["base"] != base_fingerprint:
                    raise CheckpointError(f"{self.out}: the run started from another model than the one given now")
                state, done, position = restored.state, restored.step, restored.data_state["loader"]["next_index"]
                before = restored.data_state.get("batch_size", batch_size)
                if before != batch_size and not ignore_fingerprint:
                    raise CheckpointError(
                        f"{self.out}: a step took {before} images, and would take {batch_size} now; resume with as "
                        f"many devices as before, or set experiment.total_batch_size={before}"
                    )
                self.loader.set_state(restored.data_state["loader"])
                del restored
                write_config(self.out, config)

            if done and ended_at(self.out) == done and not (self._extended and done < self.max_steps):
                if jax.process_index() == 0:
                    print(f"{self.out}: the run is complete, after step {done}: nothing to do", file=sys.stderr)
                return True
            if jax.process_index() == 0:
                (self.out / SUMMARY_FILE).unlink(missing_ok=True)  # of a run that is extended
            self._end_asked = stopped = False
            first = done + 1

            def save(step: int, valid_loss: float | None) -> None:
                data_state = {
                    "loader": {"next_index": position + (step - first + 1) * batch_size},
                    "batch_size": batch_size,
                    "base": base_fingerprint,
                    "classes": self.source.classes,
                }
                monitor.log(f"step {step}: saving a checkpoint")
                saved.save(step, state, data_state=data_state, validation_loss=valid_loss)

            # ---- steps
            with (
                stop_on_signals("finishing this step, then saving; a second signal stops at once") as stop,
                Monitor(self.out, self.flops_per_sample, batch_size, done, self.max_steps) as monitor,
                device_memory(too_large),
            ):
                devices = self.mesh.devices
                monitor.log(f"{self.origin}{devices.size} x {devices.flat[0].device_kind}, {self.dtype_name}")
                monitor.log(memory_line(self.memory(state)))
                tokenizer = self.tokenizer if isinstance(self.tokenizer, TextTokenizer) else None
                for line in describe(self.source, tokenizer, max_captions=MAX_CAPTIONS):
                    monitor.log(line)
                if self.valid_source is not None:
                    monitor.log(f"validation: {self.valid_source.report}")
                for note in self.notes:
                    monitor.log(f"note: {note}")
                monitor.log(f"{self.max_steps} steps of {batch_size}{f'; resumes after step {done}' if done else ''}")
                for line in self.preview_data():
                    monitor.log(line)
                without_gain = 0  # validations since the lowest loss
                lowest = (math.inf, done)  # validation loss and its step, since the start of this process
                compiling_s = time.perf_counter()
                if first <= self.max_steps:
                    monitor.log("compiling the training step: minutes for a large model, less if it is in the cache")
                unlogged: list[Any] = []  # metrics of a step are fetched while the next one runs
                while done < self.max_steps:
                    rows = next(self.loader)
                    state, metrics = step_fn(state, self.make_batch(rows))
                    done += 1
                    if done == first:
                        monitor.log(f"compiled in {time.perf_counter() - compiling_s:.1f} s")
                    samples = _gathered(rows["sample"]).T.reshape(-1)  # process p has rows p, p + P, ... of the batch
                    unlogged.append((done, metrics, samples))
                    valid_loss = None
                    last = done == self.max_steps or _any_process(self._end_asked)
                    stopping = _any_process(stop.requested)
                    validating = self.valid_source is not None and (last or done % validate_every == 0)
                    sampling = training.sample_every_steps and (last or done % training.sample_every_steps == 0)
                    saving = last or stopping or done % checkpoint_every == 0
                    while len(unlogged) > (0 if validating or sampling or saving else 1):
                        self._log(monitor, *unlogged.pop(0))
                    if validating:
                        valid_metrics = self.validate(state)
                        valid_loss = valid_metrics["loss"]
                        self._end_asked |= self._tell(monitor.log_metrics(done, valid_metrics, "valid"))
                        without_gain += 1
                        if valid_loss < lowest[0]:
                            lowest, without_gain = (valid_loss, done), 0
                        self._end_asked |= 0 < training.early_stopping <= without_gain
                        best = f"the best so far is {lowest[0]:.4f} of step {lowest[1]}"
                        monitor.log(f"step {done}: validation loss {valid_loss:.4f}; {best}")
                    if sampling:
                        self.preview_samples(state, done)
                    if saving:
                        save(done, valid_loss)
                    if stopping and not last:
                        monitor.log(
                            f"stopped after step {done}; the same command resumes from there. Until then the folder "
                            "holds the model of its best checkpoint, or of this step"
                        )
                        stopped = True
                    if last or stopped:
                        break

            # ---- the result
            saved.wait()
            best = (saved.best_step() if self.result_is_best else None) or done
            if best != done:
                del state  # so that it is not in memory twice
                state = saved.restore(target, step=best, ignore_fingerprint=True).state
        self.write_result(state)
        if not stopped:
            if jax.process_index() == 0:
                images = position + (done - first + 1) * batch_size
                seconds = time.perf_counter() - start_s
                write_summary(self.out, step=done, step_of_the_model=best, images=images, seconds=seconds)
        multihost_utils.sync_global_devices("written")  # no process returns before the model is written
        return not stopped

    def _log(self, monitor: Monitor, step: int, metrics: Metrics, samples: np.ndarray) -> None:
        """Logs the metrics of a step. Raises NonFiniteError after MAX_SKIPPED steps in a row without a finite loss."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        skipped = int(values.pop("skipped"))
        if skipped:
            monitor.log(f"step {step} was skipped: its loss or gradient is not finite")
        crc = zlib.crc32(np.ascontiguousarray(samples).tobytes())
        bad_images = int(_gathered(np.array(self.loader.counts["bad_images"])).sum())
        line = values | {"samples_crc32": crc, "skipped": int(skipped > 0), "bad_images": bad_images}
        self._end_asked |= self._tell(monitor.log_metrics(step, line))
        if skipped >= MAX_SKIPPED:
            raise NonFiniteError(
                f"{MAX_SKIPPED} steps in a row without a finite loss, the last at step {step}: lower "
                f"optimizer.base_lr ({self._config.optimizer.base_lr}), or look at the data"
            )

    def _tell(self, line: dict[str, Any]) -> bool:
        """Calls all callbacks; returns whether one of them wants the run to end."""
        return any([callback(dict(line)) is True for callback in self.callbacks])


def gather_to_host(leaf: jax.Array) -> np.ndarray:
    """Returns the complete array on the host, with any sharding. Every process must call it."""
    if leaf.is_fully_addressable:
        return np.asarray(leaf)
    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))


def _any_process(flag: bool) -> bool:
    """Returns whether the flag is set in any process, so that all stop after the same step."""
    return bool(_gathered(np.array(flag)).any())


def _gathered(array: np.ndarray) -> np.ndarray:
    """Returns [P, ...]: the arrays of all P processes."""
    return array[None] if jax.process_count() == 1 else np.asarray(multihost_utils.process_allgather(array))
