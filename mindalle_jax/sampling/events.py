"""The request that the host loop samples, the events that it yields, and the arrays and progress bars made from them.

Dimensions: r rows of a request, one per candidate of each prompt, prompt by prompt.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from mindalle_jax.errors import printable
from mindalle_jax.sampling.codec import ImageCodec
from mindalle_jax.sampling.filters import Rows
from mindalle_jax.sampling.options import Callback, Progress, Scorer
from mindalle_jax.sampling.result import Generation


@dataclasses.dataclass(frozen=True)
class RowRequest:
    """Rows to sample. A row depends only on its own entries, on `mixed` and on batch_size."""

    prompts: Sequence[str]
    """P texts, one per prefix, for rankers"""
    prefix_ids: np.ndarray
    """int32[P, p]; with guidance [P, 2, p]: the prompt, and the blank prompt that guidance leads away from"""
    prompt_of: np.ndarray
    """int[r]: the prompt of each row"""
    rows: Rows
    """arrays [r]"""
    prompt_codes: np.ndarray
    """int32[m]: whole rows of codes that every image begins with; often empty"""
    batch_size: int
    """rows per device per compiled call"""
    mixed: bool
    """True: a batch holds rows of several prompts, each with its prefix. False: rows of one prompt share a prefix"""
    jacobi: bool = False
    ranker: Scorer | Literal["likelihood"] | None = None

    @property
    def guided(self) -> bool:
        """Whether rows use guidance, for which the network runs on two prefixes."""
        return self.prefix_ids.ndim == 3


class SamplingEvent(NamedTuple):
    """New codes, images or scores of some rows of a request."""

    kind: Literal["codes", "images", "scores"]
    rows: np.ndarray
    """int[n]: the numbers of the rows"""
    values: np.ndarray
    """codes int32[n, row_length], images uint8[n, H, W, 3], or scores f32[n]"""
    start: int = 0
    """position of the first code"""
    log_likelihood: np.ndarray | None = None
    """f32[n], only with codes: log-likelihood of all codes sampled so far, in nats"""


class Sampled:
    """The codes, images and scores that the events of a request have given so far."""

    def __init__(self, request: RowRequest, codec: ImageCodec):
        """Makes empty arrays; only the given codes are filled in."""
        count, self._side = len(request.prompt_of), codec.side
        self.codes = np.full((count, codec.side**2), -1, np.int32)
        """int32[r, h * w]; -1 is a code that is not sampled yet"""
        self._given = len(request.prompt_codes)
        self.codes[:, : self._given] = request.prompt_codes
        self.images = np.zeros((count, codec.size, codec.size, 3), np.uint8)
        self.log_likelihood = np.zeros(count, np.float32)
        self.scores = None if request.ranker is None else np.full(count, np.nan, np.float32)
        """f32[r], NaN for images that are not complete; None without a ranker"""
        self.stopped = False
        """The caller sets it to stop sampling."""

    def add(self, event: SamplingEvent) -> None:
        """Stores the codes, images or scores of an event."""
        if event.kind == "codes":
            self.codes[event.rows, event.start : event.start + event.values.shape[1]] = event.values
            self.log_likelihood[event.rows] = event.log_likelihood
        elif event.kind == "images":
            self.images[event.rows] = event.values
        elif self.scores is not None:
            self.scores[event.rows] = event.values

    def generation(
        self, request: RowRequest, shape: tuple[int, ...], meta: dict[str, Any], *, final: bool = True
    ) -> Generation:
        """Returns the images so far. shape: (candidates,) or (prompts, candidates).

        final: True adds the scores and shares the arrays; False leaves out scores and copies the arrays.
        """

        def shaped(array: np.ndarray) -> np.ndarray:
            array = array.reshape(*shape, *array.shape[1:])
            return array if final else array.copy()

        scores = None if self.scores is None or not final else shaped(self.scores)
        seeds = shaped(request.rows.seeds)
        return Generation(shaped(self.images), shaped(self.codes), scores, seeds, list(request.prompts), meta)

    @property
    def started(self) -> np.ndarray:
        """bool[r]: whether any code of a row has been sampled."""
        return np.any(self.codes[:, self._given :] >= 0, axis=1)

    @property
    def complete(self) -> np.ndarray:
        """bool[r]: whether all codes of a row have been sampled."""
        return np.all(self.codes >= 0, axis=1)

    def grid(self, rows: np.ndarray) -> np.ndarray:
        """Returns the codes int32[n, h, w] of these rows."""
        return self.codes[rows].reshape(-1, self._side, self._side)


class Bars:
    """Progress bars of a request on stderr: one for codes (per prompt, if batches are not mixed) and one for images."""

    def __init__(self, request: RowRequest, codes_per_row: int, show: bool):
        """codes_per_row: number of codes to sample per row. show: False shows nothing."""
        self._request, self._codes_per_row, self._show = request, codes_per_row, show
        self._bar, self._shown = tqdm(disable=True), None

    def update(self, event: SamplingEvent) -> None:
        """Shows the progress of an event."""
        if event.kind == "scores":
            return
        by_prompt = event.kind == "codes" and not self._request.mixed
        of_prompt = int(self._request.prompt_of[event.rows[0]]) if by_prompt else -1
        if (event.kind, of_prompt) != self._shown:
            self.close()
            self._shown, rows = (event.kind, of_prompt), len(self._request.prompt_of)
            if event.kind == "images":
                self._bar = tqdm(total=rows, desc="images", unit="image", disable=not self._show)
            else:
                name = "codes" if self._request.mixed else printable(self._request.prompts[of_prompt][:30]) or "codes"
                rows = rows if self._request.mixed else int((self._request.prompt_of == of_prompt).sum())
                total = rows * self._codes_per_row
                self._bar = tqdm(total=total, desc=name, unit="code", disable=not self._show)
        self._bar.update(event.values.size if event.kind == "codes" else len(event.rows))

    def close(self) -> None:
        """Closes the current bar and leaves it visible."""
        self._bar.close()


def call_back(callback: Callback | None, request: RowRequest, event: SamplingEvent, length: int) -> bool:
    """Calls the callback once per prompt in an event of codes. Returns whether it asked to stop.

    length: number of codes per image.
    """
    if callback is None:
        return False
    done, stop = event.start + event.values.shape[1], False
    for p in dict.fromkeys(request.prompt_of[event.rows].tolist()):
        candidates = request.rows.candidates[event.rows[request.prompt_of[event.rows] == p]]
        stop |= callback(Progress(p, range(candidates[0], candidates[-1] + 1), done, length)) is True
    return stop
