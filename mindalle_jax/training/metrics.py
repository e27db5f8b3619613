"""Shows a run while it trains: a progress bar, metrics.jsonl, TensorBoard, and the memory that the run takes."""

import io
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from mindalle_jax.config.schema import Config
from mindalle_jax.storage.files import replace_text
from mindalle_jax.storage.weights import leaf_shapes

# jax's device_kind -> dense bfloat16 FLOP/s, from the data sheets of the makers.
PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}

LOG_EVERY_S = 10.0
"""Seconds between two lines of progress, where standard error is no terminal."""


def flops_per_sequence(config: Config) -> float:
    """Returns the number of operations of a forward and a backward pass over one sequence.

    It counts 6 per weight of a matrix and position, and 12 per layer, width and pair of positions. Half of the pairs
    are masked and do not count. Nor do embedding tables, which are only looked up. Each head has its own positions.
    Recomputation to save memory does not count.
    Chowdhery et al., "PaLM", 2022, arXiv:2204.02311, appendix B.
    """
    c, h = config.stage2, config.stage2.hparams
    text = 1 if config.image_only else h.ctx_len_txt
    positions = text + h.ctx_len_img
    shapes = leaf_shapes(config, "stage2").items()
    blocks = sum(math.prod(shape) for name, shape in shapes if name.startswith("blocks/") and name.endswith("/weight"))
    heads = h.embed_dim * (c.vocab_size_img * h.ctx_len_img + (0 if config.image_only else c.vocab_size_txt * text))
    return 6 * (blocks * positions + heads) + 12 * h.n_layers * h.embed_dim * positions**2 / 2


class Monitor:
    """Writes the metrics of a run. It does so in the first process only and is silent in all other processes."""

    def __init__(self, out: Path, flops_per_sample: float, batch_size: int, first_step: int, max_steps: int):
        """Opens metrics.jsonl in the folder `out` and the progress bar.

        flops_per_sample: number of operations per sample, for MFU; 0: no MFU. first_step: number of steps that a
        resumed run has made; later lines of metrics.jsonl are removed.
        """
        self.is_first = jax.process_index() == 0
        # In a terminal a bar moves. In a file it would be one endless line, so its text is logged now and then.
        self._bar_moves, self._told_s = sys.stderr.isatty(), -math.inf
        self._bar = tqdm(
            total=max_steps, initial=first_step, unit="step", smoothing=0, disable=not self.is_first,
            **({} if self._bar_moves else {"file": io.StringIO(), "mininterval": math.inf}),
        )  # fmt: skip
        self._first_step = first_step + 1  # it compiles
        self._batch_size, self._since, self._since_step = batch_size, time.perf_counter(), first_step
        device = jax.devices()[0].device_kind
        self._flops = flops_per_sample
        self._peak = PEAK_FLOPS.get(device, 0.0) * jax.device_count() if flops_per_sample else 0.0
        self._board: Any = None
        if self.is_first:
            path = out / "metrics.jsonl"
            _drop_later_lines(path, first_step)
            self._file = path.open("a", encoding="utf-8")
            try:
                from tensorboardX import SummaryWriter  # tensorboardX is in the extra [train]

                self._board = SummaryWriter(str(out / "tensorboard"), purge_step=first_step)
            except ImportError:
                pass

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if self.is_first:
            self._file.close()
        if self._board is not None:
            self._board.close()

    def log_metrics(self, step: int, metrics: dict[str, Any], kind: str = "train") -> dict[str, Any]:
        """Writes the metrics of the training step `step`, or of the validation after it; returns the complete line."""
        if kind == "train":
            now = time.perf_counter()
            rate = (step - self._since_step) * self._batch_size / max(now - self._since, 1e-9)
            self._since, self._since_step = now, step
            metrics = metrics | {"images_per_s": round(rate, 3)}
            if self._peak:
                metrics["mfu"] = round(rate * self._flops / self._peak, 4)
            shown = {"loss": f"{metrics['loss']:.4f}", "lr": f"{metrics['learning_rate']:.2e}", "img/s": f"{rate:.3g}"}
            self._bar.set_postfix(shown | ({"MFU": f"{metrics['mfu']:.1%}"} if self._peak else {}))
            self._bar.update(step - self._bar.n)
            if step == self._first_step:  # the time that is left follows from the steps after it
                self._bar.initial, self._bar.start_t = step, time.time()
            if not self._bar_moves and (now - self._told_s >= LOG_EVERY_S or step == self._bar.total):
                self._told_s = now
                self.log(str(self._bar))
        # JSON has no NaN.
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        line = {"step": step, "kind": kind, **finite}
        if not self.is_first:
            return line
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in metrics.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(f"{kind}/{name}", value, step)
        return line

    def log(self, line: str) -> None:
        """Writes a line to stderr, above the bar. Only results go to stdout."""
        if self.is_first and self._bar_moves:
            self._bar.write(line, file=sys.stderr)
        elif self.is_first:
            print(line, file=sys.stderr, flush=True)


def memory_line(parts: dict[str, Any]) -> str:
    """Returns the memory of named trees of arrays on the first device: "weights 5.2 GB, optimizer 10.3 GB"."""
    device = jax.local_devices()[0]
    texts = []
    for name, tree in parts.items():
        size = sum(
            shard.data.nbytes
            for leaf in jax.tree.leaves(tree)
            for shard in leaf.addressable_shards
            if shard.device == device
        )
        texts.append(f"{name} {size / 1e9:.3g} GB")
    return ", ".join(texts)


def _drop_later_lines(path: Path, last_step: int) -> None:
    """Removes the lines after the step that a run resumes from; a killed run may have written some."""
    if not path.exists():
        return
    kept = [json.dumps(line) for line in read_metrics(path) if line["step"] <= last_step]
    replace_text(path, "".join(f"{line}\n" for line in kept))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a metrics.jsonl. It leaves out lines that a kill has cut off or a disk has damaged."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
            if type(line["step"]) is int and line["kind"] in ("train", "valid"):
                lines.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    return lines
