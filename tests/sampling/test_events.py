"""Rows, events and what they give: arrays, progress bars and calls of the callback. No network is run."""

import dataclasses
import re
from types import SimpleNamespace

import numpy as np
import pytest

from mindalle_jax import Progress
from mindalle_jax.sampling.events import Bars, RowRequest, Sampled, SamplingEvent, call_back
from mindalle_jax.sampling.filters import Rows

CODEC = SimpleNamespace(side=2, size=4)
"""Images of 2 x 2 codes and 4 x 4 pixels."""


@pytest.fixture
def request_() -> RowRequest:
    """Two prompts with two candidates each."""
    numbers = np.arange(4, dtype=np.int32)
    rows = Rows(numbers % 2, np.full(4, 7, np.uint32), np.ones(4), np.full(4, 9), np.ones(4), np.ones(4))
    return RowRequest(
        prompts=["the cat", ""],
        prefix_ids=np.zeros((2, 3), np.int32),
        prompt_of=numbers // 2,
        rows=rows,
        prompt_codes=np.zeros(0, np.int32),
        batch_size=2,
        mixed=False,
    )


def codes_event(rows: list[int], start: int, width: int = 2) -> SamplingEvent:
    """Code 10 * row + position for each position of a row of codes; the log-likelihood is minus the row."""
    at, values = np.array(rows), 10 * np.array(rows)[:, None] + np.arange(start, start + width)
    return SamplingEvent("codes", at, values.astype(np.int32), start, -at.astype(np.float32))


def test_rows_of_a_request_are_fed_twice_with_guidance_alone(request_):
    assert not request_.guided
    assert dataclasses.replace(request_, prefix_ids=np.zeros((2, 2, 3), np.int32)).guided


def test_codes_fill_their_rows_from_where_they_start(request_):
    """A row has begun with its first code, and is complete with its last; the other rows are -1 as before."""
    sampled = Sampled(request_, CODEC)
    assert sampled.codes.tolist() == [[-1] * 4] * 4 and not sampled.started.any() and not sampled.complete.any()
    sampled.add(codes_event([0, 1], 0))
    sampled.add(codes_event([1], 2))
    assert sampled.codes.tolist() == [[0, 1, -1, -1], [10, 11, 12, 13], [-1] * 4, [-1] * 4]
    assert sampled.started.tolist() == [True, True, False, False]
    assert sampled.complete.tolist() == [False, True, False, False]
    assert sampled.log_likelihood.tolist() == [0, -1, 0, 0]
    assert sampled.grid(np.array([1])).tolist() == [[[10, 11], [12, 13]]]


def test_codes_that_are_given_are_not_sampled(request_):
    """They are in every row at once, and no row has begun."""
    sampled = Sampled(dataclasses.replace(request_, prompt_codes=np.array([5, 6], np.int32)), CODEC)
    assert sampled.codes.tolist() == [[5, 6, -1, -1]] * 4 and not sampled.started.any()
    sampled.add(codes_event([3], 2))
    assert sampled.started.tolist() == sampled.complete.tolist() == [False, False, False, True]


def test_scores_are_nan_until_they_are_told(request_):
    """Without a ranker there are none, whatever an event tells."""
    scores = SamplingEvent("scores", np.array([2]), np.array([0.5], np.float32))
    ranked, bare = Sampled(dataclasses.replace(request_, ranker="likelihood"), CODEC), Sampled(request_, CODEC)
    for sampled in (ranked, bare):
        sampled.add(scores)
    np.testing.assert_array_equal(ranked.scores, np.array([np.nan, np.nan, 0.5, np.nan], np.float32))
    assert bare.scores is None


def test_a_preview_is_a_copy_and_has_no_scores(request_):
    """Someone who keeps a preview must not see it change. The result holds the arrays themselves, and the scores."""
    request_ = dataclasses.replace(request_, ranker="likelihood")
    sampled = Sampled(request_, CODEC)
    sampled.add(SamplingEvent("images", np.array([3]), np.full((1, 4, 4, 3), 200, np.uint8)))
    kept = sampled.generation(request_, (2, 2), {"seed": 7}, final=False)
    sampled.add(codes_event([0, 1, 2, 3], 0))
    sampled.add(SamplingEvent("images", np.arange(4), np.full((4, 4, 4, 3), 9, np.uint8)))
    assert kept.codes.shape == (2, 2, 4) and (kept.codes == -1).all()
    assert kept.images[1, 1].min() == 200 and kept.images[:, 0].max() == 0
    assert kept.seeds.tolist() == [[7, 7], [7, 7]] and kept.scores is None
    assert (kept.prompts, kept.meta) == (["the cat", ""], {"seed": 7})
    result = sampled.generation(request_, (4,), {})
    assert np.shares_memory(result.images, sampled.images) and result.images.shape == (4, 4, 4, 3)
    assert np.isnan(result.scores).all() and result.scores.shape == (4,)


def shown(err: str) -> list[tuple[str, str]]:
    """Name and count of each bar in its last state."""
    return [(name, count) for name, count in re.findall(r"([\w ]+): 100%.*? (\d+/\d+) \[", err)]


@pytest.mark.parametrize(
    ("mixed", "expected"),
    [
        (False, [("the cat", "8/8"), ("codes", "8/8"), ("images", "4/4")]),
        (True, [("codes", "16/16"), ("images", "4/4")]),
    ],
)
def test_bars_count_codes_by_prompt_and_images(request_, capsys, mixed, expected):
    """A prompt without a name is called codes; scores have no bar; standard output stays empty."""
    bars = Bars(dataclasses.replace(request_, mixed=mixed), 4, True)
    for rows in ([0, 1], [2, 3]):
        for start in (0, 2):
            bars.update(codes_event(rows, start))
    bars.update(SamplingEvent("scores", np.arange(4), np.zeros(4, np.float32)))
    for rows in ([0, 1, 2], [3]):
        bars.update(SamplingEvent("images", np.array(rows), np.zeros((len(rows), 4, 4, 3), np.uint8)))
    bars.close()
    out, err = capsys.readouterr()
    assert out == "" and list(dict.fromkeys(shown(err))) == expected


def test_bars_that_are_off_write_nothing(request_, capsys):
    bars = Bars(request_, 4, False)
    bars.update(codes_event([0, 1], 0))
    bars.close()
    assert capsys.readouterr() == ("", "")


def test_the_callback_of_a_mixed_batch_hears_of_each_prompt(request_):
    """Also of those after one that stops."""
    heard = []

    def stop_at_the_first(progress):
        heard.append(progress)
        return progress.prompt == 0

    assert call_back(stop_at_the_first, request_, codes_event([1, 2, 3], 2), 4)
    assert heard == [Progress(0, range(1, 2), 4, 4), Progress(1, range(0, 2), 4, 4)]


@pytest.mark.parametrize("answer", [None, False, 1, "stop", np.True_])
def test_nothing_but_true_asks_to_stop(request_, answer):
    """A callback that happens to return something, as a counter or a list does, goes on."""
    assert not call_back(lambda _: answer, request_, codes_event([0], 0), 4)
    assert not call_back(None, request_, codes_event([0], 0), 4)
