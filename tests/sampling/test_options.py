"""options.py: one place for every option, what it may be, and what a person is told; no JAX, no weights."""

import dataclasses
import inspect
import subprocess
import sys
import types
import typing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sampling_helpers import settings_of

from mindalle_jax import Dalle, ImageGPT
from mindalle_jax.config.schema import Config
from mindalle_jax.errors import UsageError
from mindalle_jax.sampling.options import (
    DEFAULT_TOP_K,
    SamplingKeywords,
    SamplingOptions,
    as_array,
    as_prompts,
    check_every,
    default_batch_size,
)

FIELDS = {field.name: field for field in dataclasses.fields(SamplingOptions)}
NOT_KEYWORDS = {"prompts", "class_id"}


def test_the_keywords_are_the_fields():
    """SamplingKeywords is what an editor completes; it has the old name of prompt_codes besides."""
    hints = typing.get_type_hints(SamplingKeywords)
    assert set(hints) == FIELDS.keys() - NOT_KEYWORDS | {"kept_codes"}
    of_fields = typing.get_type_hints(SamplingOptions)
    assert {name: hints[name] for name in hints if name != "kept_codes"} == {
        name: of_fields[name] for name in of_fields.keys() - NOT_KEYWORDS
    }


def test_every_option_has_a_doc():
    for field in FIELDS.values():
        assert field.metadata["doc"] and "\n" not in field.metadata["doc"]
        assert bool(field.metadata["bound"]) == (field.metadata["holds"] is not None)


@pytest.mark.parametrize("method", ["generate", "stream", "complete", "generate_codes", "variations"])
def test_help_explains_every_option(method):
    """`help(Dalle.generate)` and its signature, defaults included."""
    for cls in (Dalle, ImageGPT):
        if not hasattr(cls, method):
            continue
        function = getattr(cls, method)
        parameters = inspect.signature(function).parameters
        for name in FIELDS.keys() - NOT_KEYWORDS:
            assert f"    {name}: " in function.__doc__
            expected = 16 if (cls, name) == (ImageGPT, "num_candidates") else FIELDS[name].default
            assert parameters[name].default == expected
            assert parameters[name].annotation == FIELDS[name].type
        assert not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


def test_the_defaults_are_valid():
    """And checking twice changes nothing."""
    checked = SamplingOptions.of(prompts=("a",)).check(Config())
    assert (checked.num_candidates, checked.seed, checked.top_k, checked.top_p) == (16, 0, 256, None)
    again = checked.check(Config())
    for name in FIELDS.keys() - {"prompt_codes"}:
        assert getattr(again, name) == getattr(checked, name)


@pytest.mark.parametrize(("terminal", "notebook"), [(False, False), (True, False), (False, True)])
def test_progress_is_shown_where_somebody_watches(monkeypatch, terminal, notebook):
    """Bars in a log file are kilobytes of one line."""
    monkeypatch.setattr(sys, "stderr", types.SimpleNamespace(isatty=lambda: terminal))
    if notebook:
        monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    else:
        monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    assert SamplingOptions().check().progress is (terminal or notebook)
    assert SamplingOptions(progress=False).check().progress is False
    monkeypatch.setattr(sys, "stderr", None)  # a program without a console
    assert SamplingOptions().check().progress is notebook


def test_off_is_none_for_a_ranker():
    """The command line's word; else it would be taken for the name of a CLIP model."""
    assert SamplingOptions(ranker="off").check().ranker is None
    assert SamplingOptions().check().ranker == "auto"


def test_no_jax_is_imported():
    """The command line makes its arguments from the fields, and --help must be quick."""
    code = "import sys, mindalle_jax.sampling.options; print('jax' in sys.modules, 'flax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("num_candidates", 0, "num_candidates must be an integer in [1, 1000], not 0"),
        ("seed", -1, "seed must be an integer in [0, 4294967296), or random (None); not -1"),
        ("top_p", 2, "top_p must be a number in (0, 1], or off (None); not 2"),
        ("temperature", float("inf"), "temperature must be a finite number > 0, or 0 for greedy; not inf"),
        ("batch_size", 0, "batch_size must be an integer in [1, 4096], not 0"),
        ("mixed_batches", 1, "mixed_batches must be True or False, not 1"),
        (
            "ranker",
            5,
            "ranker must be auto, likelihood, off (None), or a CLIP model: a name, a folder or a ClipRanker; not 5",
        ),
    ],
)
def test_a_wrong_value_is_told_without_a_model(name, value, said):
    """Before anything is downloaded, as generate tells it."""
    with pytest.raises(UsageError) as raised:
        SamplingOptions.of(**{name: value}).check()
    assert str(raised.value) == said


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("topk", "did you mean top_k?"),
        ("temprature", "did you mean temperature?"),
        ("zzz", "there are num_candidates, seed,"),
        ("num_images_per_prompt", "did you mean num_candidates?"),
    ],
)
def test_an_unknown_option_names_the_nearest(typed, said):
    with pytest.raises(TypeError, match=f"unknown option {typed}; ") as raised:
        SamplingOptions.of(**{typed: 1})
    assert said in str(raised.value)


def test_numpy_integers_count_everywhere(tiny_dalle):
    """They come out of arrays and sliders; Python's own come out of check."""
    given = {name: np.int64(4) for name in ("num_candidates", "seed", "top_k", "batch_size")}
    checked = SamplingOptions.of(prompts=("a",), **given).check(tiny_dalle.config)
    assert all(type(getattr(checked, name)) is int for name in given)
    check_every(np.int32(8), tiny_dalle.config.stage1)
    assert tiny_dalle.prompt_codes(np.zeros(64, int), np.int64(2)).shape == (16,)


def test_the_old_name_of_prompt_codes_is_taken(tiny_dalle):
    codes = np.arange(16)
    old = SamplingOptions.of(prompts=("a",), kept_codes=codes).check(tiny_dalle.config)
    np.testing.assert_array_equal(old.prompt_codes, codes)


@pytest.mark.parametrize("prompt", [None, b"a cat", {"prompt": "a cat"}, Path("cat.txt"), 5, {"a", "b"}])
def test_what_is_no_prompt_is_told(tiny_dalle, prompt):
    """By themselves: a TypeError about iteration, or the keys of a dict as prompts."""
    for call in (tiny_dalle.generate, tiny_dalle.generate_codes, tiny_dalle.tokenize):
        with pytest.raises(UsageError, match=f"a prompt is a text or a list of texts, not {type(prompt).__name__}"):
            call(prompt)


@pytest.mark.parametrize("prompts", [["a cat", None], [b"a cat"], ["a", 5]])
def test_what_is_no_prompt_in_a_list_is_told(tiny_dalle, prompts):
    with pytest.raises(UsageError, match="a prompt is text, not"):
        tiny_dalle.generate(prompts)


def test_prompts_come_in_lists_tuples_and_arrays():
    assert as_prompts("a") == as_prompts(["a"]) == as_prompts(("a",)) == as_prompts(np.array(["a"])) == ("a",)
    assert type(as_prompts(np.array(["a"]))[0]) is str


@pytest.mark.parametrize("image", [None, b"\x89PNG", {"image": 1}, Path("cat.png"), "cat.png", [[1], [1, 2]]])
def test_what_is_no_image_is_told(tiny_dalle, image):
    """One sentence with the type and the remedy."""
    for call in (tiny_dalle.encode_images, lambda image: tiny_dalle.complete("the cat", image, keep_rows=2)):
        with pytest.raises(UsageError, match="an array of numbers or a PIL image is wanted, not") as raised:
            call(image)
        assert "\n" not in str(raised.value)
    if isinstance(image, (str, Path, bytes)):
        assert "open it first (PIL.Image.open)" in str(raised.value)


def test_arrays_of_many_kinds_are_arrays():
    for value in ([[1, 2]], np.ones((1, 2)), Image.new("L", (2, 1)), (1.0, 2.0), np.ones(2, np.uint8)):
        assert as_array(value, "x").size == 2


# ---------------------------------------- ranges


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("top_k", [0, -1, 81, 256, 2.5, True, "5", float("nan")], r"integer in \[1, 80\] .*off"),
        ("top_p", [0, 0.0, -0.1, 1.0000001, float("nan"), float("inf"), True, "0.5"], r"number in \(0, 1\], or .*off"),
        ("temperature", [-1, -1e-9, float("nan"), float("inf"), True, "1", None], "finite number > 0, or 0 for greedy"),
        ("seed", [-1, 2**32, 2**32 + 5, 1.0, True, "7"], r"integer in \[0, 4294967296\)"),
    ],
)
def test_settings_out_of_range_name_the_value_and_the_limits(name, values, message):
    """By themselves: index errors deep in JAX, an inverted distribution, or seed 5 for 2**32 + 5."""
    for value in values:
        with pytest.raises(UsageError, match=f"{name} must be .*{message}") as raised:
            settings_of(**{name: value})
        assert str(raised.value).endswith(repr(value))
        assert "\n" not in str(raised.value)


def test_settings_at_the_limits_are_taken():
    """Ends of the ranges, and NumPy's numbers, which come out of arrays and sliders."""

    def values(**settings) -> tuple:
        found = settings_of(**settings)
        return tuple(getattr(found, name) for name in ("seed", "temperature", "top_k", "top_p", "guidance_scale"))

    assert values(top_k=1, top_p=1, temperature=0, seed=0) == (0, 0.0, 1, 1.0, 1.0)
    numpy_values = {"top_k": np.int64(80), "top_p": np.float32(0.5), "temperature": np.float64(2), "seed": np.uint32(7)}
    assert values(**numpy_values) == (7, 2.0, 80, 0.5, 1.0)
    assert settings_of(seed=2**32 - 1).seed == 2**32 - 1
    assert settings_of(top_k=DEFAULT_TOP_K).top_k == 80
    assert settings_of(16384, top_k=DEFAULT_TOP_K).top_k == 256


def test_seed_none_draws_a_seed():
    """And tells it, so that a good image can be had again."""
    seeds = {settings_of(seed=None).seed for _ in range(8)}
    assert len(seeds) > 1 and all(0 <= seed < 2**32 for seed in seeds)


@pytest.mark.parametrize("value", [0, -1, 1001, 10**6, 1.0, True, "4", None])
def test_num_candidates_out_of_range(value):
    """0 gives empty arrays and a million runs for days."""
    with pytest.raises(UsageError, match=r"num_candidates must be an integer in \[1, 1000\], not"):
        settings_of(num_candidates=value)


def test_num_candidates_at_the_limits():
    assert [settings_of(num_candidates=n).num_candidates for n in (1, 1000, np.int32(96))] == [1, 1000, 96]


def test_default_batch_size():
    """A function of count, backend and size alone: powers of two, then what wastes least of the usual 96."""
    assert [default_batch_size(n, "cpu", small=False) for n in (1, 2, 3, 5, 8, 9, 1000)] == [1, 2, 4, 8, 8, 16, 16]
    assert [default_batch_size(n, "cpu", small=True) for n in (1, 2, 3, 5, 8, 9, 1000)] == [1, 1, 2, 4, 4, 8, 8]
    expected = {1: 1, 3: 4, 16: 16, 17: 32, 32: 32, 33: 64, 64: 64, 65: 96, 96: 96, 97: 128, 128: 128, 1000: 128}
    for backend in ("gpu", "tpu"):
        for small in (False, True):
            assert {n: default_batch_size(n, backend, small=small) for n in expected} == expected
