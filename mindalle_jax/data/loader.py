"""Batches for training and validation, read ahead by threads.

A row depends only on its position in the stream and on the seed. So the state of a loader is the position of the next
row, and any number of threads, processes or restarts gives the same rows.
"""

import logging
import os
import threading
from collections.abc import Callable
from typing import Any, Self

import numpy as np
from PIL import Image

from mindalle_jax.data.images import ImageError, ShapeError, crop_square, decode_image
from mindalle_jax.data.samples import Source
from mindalle_jax.errors import CheckpointError, DataError, UsageError, install_hint, one_line
from mindalle_jax.text.tokenizer import TextTokenizer

MAX_BAD_FRACTION = 0.05
"""The run stops if a larger share of the images tried cannot be read. Before 1,000 images are tried, the share is that
of 1,000."""
MIN_BAD_ALLOWED = 3
"""Number of images that may always be unreadable."""
MAX_THREADS = 16

log = logging.getLogger(__name__)


class Loader:
    """Iterates over batches. Training: endless, with every sample once per epoch. Validation: one pass in order.

    A batch is a dict of arrays, with B = batch_size / process_count:

        index   int64[B]            position in the stream; process p of P has rows p, p + P, ... of a complete batch
        sample  int32[B]            index into the source
        image   uint8[B, S, S, 3]   pixels; absent if the source holds codes
        codes   int32[B, T]         only if the source holds codes
        text    int32[B, N]         task "text", with a tokenizer: one of the captions, in validation the first
        label   int32[B]            task "class"
        valid   bool[B]             validation only: False for rows that fill the last batch, and for damaged images

    An image that cannot be read is logged and counted. In training the next readable image replaces it.
    """

    def __init__(
        self,
        source: Source,
        *,
        batch_size: int,
        train: bool,
        seed: int = 0,
        image_size: int | None = None,
        tokenizer: TextTokenizer | None = None,
        process_index: int = 0,
        process_count: int = 1,
        threads: int | None = None,
        group_size: int = 1,
    ):
        """Sets up the stream of batches.

        batch_size: number of rows of all processes together. seed: in [0, 2**32), for shuffling, choice of captions and
        crops. image_size: S in pixels; not needed if the source holds codes. threads: number of threads that read; None
        is one per CPU, up to 16. Each thread holds one batch of this process in memory, and one more per thread waits
        ready. group_size: number of consecutive samples of the source that stay together when samples are shuffled.

        Raises UsageError for values out of range. In training, raises DataError for fewer samples than a batch, and for
        a number of samples that is no multiple of group_size.
        """
        _check(source, batch_size, train, seed, image_size, process_count, threads, group_size)
        try:
            import grain  # in the extra [train]; the import takes a second
        except ImportError:
            raise UsageError(f"reading training data needs grain: {install_hint('train')}") from None
        self.train, self._rows = train, _Rows(source, train, seed, image_size, tokenizer)
        if train:
            groups: Any = grain.MapDataset.range(len(source) // group_size).shuffle(seed=seed).repeat(None)
            self._rows.order = lambda index: groups[index // group_size] * group_size + index % group_size
            dataset = grain.MapDataset.range(len(source)).repeat(None)
        else:
            dataset = grain.MapDataset.range(-(-len(source) // batch_size) * batch_size)
        threads = threads or min(os.cpu_count() or 1, MAX_THREADS)
        # The state of this iterator is one index. Plain iterators restore wrong data if the number of workers changes.
        self._batches: Any = grain.experimental.ElasticIterator(
            dataset.map_with_index(self._rows),
            batch_size,
            grain.sharding.ShardOptions(process_index, process_count),
            read_options=grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads),
        )

    def __iter__(self) -> Self:
        """Starts a validation again from the first batch; training continues with the next batch."""
        if not self.train:
            self.set_state({"next_index": 0})
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        """Returns the next batch. Raises DataError if too many images cannot be read."""
        return next(self._batches)

    def get_state(self) -> dict[str, int]:
        """Returns the state after the last batch. set_state resumes from it, in any number of processes."""
        return {"next_index": self._batches.get_state()["global_next_index"]}

    def set_state(self, state: dict[str, int]) -> None:
        """Continues from a state of get_state. Raises CheckpointError if `state` is not such a state."""
        index = state.get("next_index")
        if type(index) is not int or index < 0:
            raise CheckpointError(f"the state of the training data must be {{'next_index': n >= 0}}, not {state!r:.80}")
        self._batches.set_state({"global_next_index": index})

    @property
    def counts(self) -> dict[str, int]:
        """Counts of this process, with images read ahead: images_read, and bad_images, each of which counts once."""
        return {"images_read": self._rows.images_read, "bad_images": len(self._rows.bad)}


class _Rows:
    """Makes a row from its position in the stream; called by several threads."""

    def __init__(self, source: Source, train: bool, seed: int, image_size: int | None, tokenizer: TextTokenizer | None):
        self.source, self.train, self.seed = source, train, seed
        self.image_size, self.tokenizer = image_size or 0, tokenizer
        self.images_read, self.damaged, self.bad = 0, 0, set[int]()
        self._lock = threading.Lock()
        self.order: Callable[[int], int] = lambda index: index % len(source)
        """Position in the stream -> number of the sample, before damaged images are replaced."""

    def __call__(self, index: int, _: int) -> dict[str, Any]:
        """Returns the row at the position `index` of the stream."""
        rng = np.random.default_rng([self.seed, index]) if self.train else None
        valid = index < len(self.source)  # meaningful in validation
        number = self.order(index)
        row: dict[str, Any] = {}
        if not self.source.has_codes:
            number, image = self._find_image(number)
            valid = valid and image is not None
            row["image"] = (
                np.zeros((self.image_size, self.image_size, 3), np.uint8)
                if image is None
                else crop_square(image, self.image_size, rng)
            )
        sample = self.source[number]
        row |= {"index": np.int64(index), "sample": np.int32(number)}
        if sample.codes is not None:
            row["codes"] = sample.codes.astype(np.int32)
        if self.source.task == "text" and self.tokenizer is not None:
            caption = sample.captions[0 if rng is None else int(rng.integers(len(sample.captions)))]
            row["text"] = self.tokenizer([caption]).ids[0]
        if self.source.task == "class" and isinstance(sample.label, int):
            row["label"] = np.int32(sample.label)
        return row if self.train else row | {"valid": np.bool_(valid)}

    def _find_image(self, number: int) -> tuple[int, Image.Image | None]:
        """Returns the first sample from `number` on with a readable image; validation looks only at `number`."""
        for candidate in range(number, number + len(self.source)):
            candidate %= len(self.source)
            image = self._decode(candidate)
            if image is not None or not self.train:
                return candidate, image
        raise DataError(f"{self.source.path}: none of the {len(self.source)} images can be read")

    def _decode(self, number: int) -> Image.Image | None:
        """Returns the image of a sample. If it cannot be read, counts it and returns None; DataError if too many."""
        sample = self.source[number]
        assert sample.image is not None
        image, problem, damaged = None, "", True
        try:
            image = decode_image(sample.image.read())
        except (ImageError, OSError) as error:
            problem, damaged = f"{sample.id}: {one_line(error)}", not isinstance(error, ShapeError)
        with self._lock:
            self.images_read += 1
            if image is not None or number in self.bad:
                return image
            self.bad.add(number)
            self.damaged += damaged
            tried = min(max(self.images_read, 1_000), len(self.source))
            too_many = self.damaged > max(MIN_BAD_ALLOWED, MAX_BAD_FRACTION * tried)
            share = f"{self.damaged} of the {min(self.images_read, len(self.source)):,}"
        log.warning("%s: left out: %s", self.source.path, problem)
        if too_many:
            raise DataError(
                f"{self.source.path}: {share} images tried cannot be read, over {MAX_BAD_FRACTION:.0%}; "
                f"the last one: {problem}"
            )
        return None


def _check(
    source: Source,
    batch_size: int,
    train: bool,
    seed: int,
    image_size: int | None,
    process_count: int,
    threads: int | None,
    group_size: int,
) -> None:
    """Raises as Loader does."""
    if type(batch_size) is not int or batch_size < 1:
        raise UsageError(f"batch_size must be an integer of at least 1, not {batch_size!r}")
    if batch_size % process_count:
        below = batch_size // process_count * process_count
        near = f"{below} or {below + process_count}" if below else process_count
        raise UsageError(f"batch_size {batch_size} must be a multiple of the {process_count} processes, such as {near}")
    if not 0 <= seed < 1 << 32:
        raise UsageError(f"seed must lie in [0, 4294967296), not {seed}")
    if threads is not None and threads < 1:
        raise UsageError(f"threads must be at least 1, not {threads}")
    if train and (group_size < 1 or len(source) % group_size):
        raise DataError(f"{source.path}: {len(source):,} samples are not a multiple of data.group_size {group_size}")
    if image_size is None and not source.has_codes:
        raise UsageError(f"{source.path} holds images: image_size must be given")
    if train and len(source) < batch_size:
        raise DataError(f"{source.path}: a batch of {batch_size} needs as many samples, but has {source.report}")
