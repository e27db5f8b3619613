"""Batches that hold rows of several prompts: a row depends on its own request, the mode and the batch size alone."""

import dataclasses

import jax
import numpy as np
import pytest

from mindalle_jax import Dalle, SamplingOptions
from mindalle_jax.models.attention import PRIVATE_PREFIX, private_backend
from mindalle_jax.sampling.filters import Rows
from mindalle_jax.sampling.generate import RowRequest, request_rows, sample_codes

BATCH = 4
PROMPTS = ["the cat", "12 dogs", "é", "a dog and the cat", "cat", "the dog", "and"]


def codes_of(dalle: Dalle, request: RowRequest) -> np.ndarray:
    """int32[r, h * w]."""
    codes = np.full((len(request.prompt_of), dalle.code_size**2), -1, np.int32)
    for event in sample_codes(dalle._networks, request):
        codes[event.rows, event.start : event.start + event.values.shape[1]] = event.values
    return codes


def only(request: RowRequest, row: int) -> RowRequest:
    """The request of one row alone."""
    rows = Rows(*(setting[row : row + 1] for setting in request.rows))
    prompt = request.prompt_of[row]
    return dataclasses.replace(
        request, prompts=[request.prompts[prompt]], prefix_ids=request.prefix_ids[prompt : prompt + 1],
        prompt_of=np.zeros(1, int), rows=rows,
    )  # fmt: skip


@pytest.mark.parametrize("jacobi", [False, True])
def test_sixteen_rows_with_settings_of_their_own(tiny_dalle, jacobi):
    """Prompt, candidate, seed, temperature, top-k, top-p of each; every row as it is alone in a batch, bit by bit."""
    rng, count = np.random.default_rng(0), 16
    prompts = [" ".join(rng.choice(["cat", "dog", "the", "and", "12"], 3)) + f" {i}" for i in range(count)]
    options = SamplingOptions.of(prompts=tuple(prompts), num_candidates=1, mixed_batches=True, jacobi=jacobi)
    request = request_rows(options.check(tiny_dalle.config), tiny_dalle.tokenizer(prompts).ids, 80, count)
    rows = Rows(
        candidates=rng.integers(0, 50, count).astype(np.int32),
        seeds=rng.integers(0, 2**32, count).astype(np.uint32),
        temperature=rng.choice([0, 0.5, 1.0, 2.0], count).astype(np.float32),
        top_k=rng.choice([1, 5, 40, 80], count).astype(np.int32),
        top_p=rng.choice([0.3, 0.9, 1.0], count).astype(np.float32),
        guidance_scale=np.ones(count, np.float32),
    )
    assert all(len(set(setting.tolist())) > 1 for setting in rows[:5])
    request = dataclasses.replace(request, rows=rows)
    together = codes_of(tiny_dalle, request)
    for row in range(count):
        np.testing.assert_array_equal(codes_of(tiny_dalle, only(request, row))[0], together[row])
    assert len({row.tobytes() for row in together}) == count


@pytest.mark.parametrize("options", [{}, {"guidance_scale": 2.0}, {"keep_rows": 3}, {"jacobi": True}], ids=str)
def test_a_prompt_is_the_same_in_any_company(tiny_dalle, options):
    """Whatever else is in the list, in whatever order, and however many candidates."""
    options = options | {"batch_size": BATCH, "seed": 3, "mixed_batches": True, "ranker": "likelihood"}
    if "keep_rows" in options:
        options["prompt_codes"] = np.arange(options.pop("keep_rows") * tiny_dalle.code_size)
    many = tiny_dalle.generate(PROMPTS, num_candidates=2, **options)
    some = tiny_dalle.generate([PROMPTS[4], PROMPTS[1], PROMPTS[4]], num_candidates=3, **options)
    for at, p in ((0, 4), (1, 1), (2, 4)):
        np.testing.assert_array_equal(some.codes[at, :2], many.codes[p])
        np.testing.assert_array_equal(some.scores[at, :2], many.scores[p])
        np.testing.assert_array_equal(some.images[at, :2], many.images[p])


def test_a_prefix_of_its_own_differs_by_rounding_alone(tiny_dalle):
    """The same prompts in both modes: other programs, the same network. No code of this model differs."""
    options = {"num_candidates": 2, "batch_size": BATCH, "ranker": "likelihood"}
    shared = tiny_dalle.generate(PROMPTS, **options)
    private = tiny_dalle.generate(PROMPTS, mixed_batches=True, **options)
    np.testing.assert_array_equal(shared.codes, private.codes)
    np.testing.assert_allclose(shared.scores, private.scores, rtol=0, atol=1e-3)


def test_mixed_batches_on_eight_devices(tiny_model_folder, tiny_dalle):
    """Each device has its own rows and prefixes."""
    eight = Dalle.from_pretrained(tiny_model_folder, mesh=jax.sharding.Mesh(np.array(jax.devices()), ("data",)))
    for options in ({}, {"guidance_scale": 3.0}):
        options = options | {"num_candidates": 3, "batch_size": 2, "mixed_batches": True}
        one, many = tiny_dalle.generate_codes(PROMPTS, **options), eight.generate_codes(PROMPTS, **options)
        np.testing.assert_array_equal(one, many)


@pytest.mark.parametrize("quantize", ["weights", "weights+cache"])
def test_mixed_batches_of_a_quantized_model(tiny_model_folder, quantize):
    """A private prefix lies in the int8 cache too: rows differ from those of a shared one, not by their company."""
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("data",))
    dalle = Dalle.from_pretrained(tiny_model_folder, quantize=quantize, mesh=mesh)
    options = {"num_candidates": 1, "batch_size": BATCH, "mixed_batches": True}
    many = dalle.generate_codes(PROMPTS, **options)
    np.testing.assert_array_equal(dalle.generate_codes(PROMPTS[2:3], **options)[0], many[2])


def test_batches_are_full(tiny_dalle):
    """Seven prompts with two images each at four rows per batch are four batches, in place of seven."""
    for mixed, expected in ((True, 4), (False, 7)):
        options = SamplingOptions.of(prompts=tuple(PROMPTS), num_candidates=2, mixed_batches=mixed)
        request = request_rows(options.check(tiny_dalle.config), tiny_dalle.tokenizer(PROMPTS).ids, 80, BATCH)
        starts = [event.rows for event in sample_codes(tiny_dalle._networks, request) if event.start == 0]
        assert len(starts) == expected and sorted(np.concatenate(starts)) == list(range(14))


def test_progress_and_callbacks_name_the_prompts(tiny_dalle, capsys):
    """A batch of several prompts is told once for each; one bar for all codes."""
    seen = []
    tiny_dalle.generate(
        PROMPTS[:3], num_candidates=2, batch_size=BATCH, mixed_batches=True, callback=seen.append, progress=True
    )
    first_row = [(p.prompt, list(p.candidates)) for p in seen if p.codes == 8]
    assert first_row == [(0, [0, 1]), (1, [0, 1]), (2, [0, 1])]
    assert f"{6 * 64}/{6 * 64}" in capsys.readouterr().err


def test_a_stream_of_mixed_batches_ends_in_what_generate_gives(tiny_dalle):
    options = {"num_candidates": 1, "batch_size": BATCH, "mixed_batches": True}
    *previews, last = tiny_dalle.stream(PROMPTS, every=32, **options)
    whole = tiny_dalle.generate(PROMPTS, **options)
    np.testing.assert_array_equal(last.images, whole.images)
    assert [(preview.codes >= 0).sum() for preview in previews] == [4 * 32, 4 * 64, 4 * 64 + 3 * 32]


def test_the_default_batch_size_is_that_of_all_rows(tiny_dalle):
    generation = tiny_dalle.generate(PROMPTS, num_candidates=1, mixed_batches=True)
    assert generation.meta["batch_size"] == tiny_dalle.default_batch_size(len(PROMPTS)) > 1
    assert generation.meta["mixed_batches"] is True


def test_of_prompt_is_what_that_prompt_gives(tiny_dalle):
    both = tiny_dalle.generate(PROMPTS[:2], num_candidates=2, batch_size=BATCH, mixed_batches=True)
    one = tiny_dalle.generate(PROMPTS[1], num_candidates=2, batch_size=BATCH, mixed_batches=True)
    part = both.of_prompt(1)
    np.testing.assert_array_equal(part.images, one.images)
    assert part.prompts == one.prompts and part.meta == one.meta


def test_every_backend_has_a_private_one():
    assert {private_backend(name) for name in ("xla", "xla-lanes", "pallas", "reference", "cudnn")} <= {*PRIVATE_PREFIX}
