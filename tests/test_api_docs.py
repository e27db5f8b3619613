"""The API reference: every public name has a place in it, and every docstring says what goes in, comes out and fails.

Docstrings are in Google's style, which mkdocstrings reads: `Args:`, `Returns:` or `Yields:`, `Raises:`.
"""

import dataclasses
import doctest
import importlib
import inspect
import re

import pytest
from commands import ROOT

import mindalle_jax
from mindalle_jax import errors
from mindalle_jax.sampling.options import SamplingOptions

PAGES = {page.stem: page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md")}
ERRORS = [name for name, value in vars(errors).items() if name.endswith("Error") and inspect.isclass(value)]
CLASSES = ["ClipRanker", "Dalle", "Generation", "ImageGPT", "Progress", "SamplingOptions"]
MAY_RAISE_NOTHING = {
    "Dalle.default_batch_size", "ImageGPT.default_batch_size", "SamplingOptions.keywords", "Studio.wait"
}  # fmt: skip


def public_callables() -> dict[str, object]:
    """Name -> function or method, of all public classes and of the notebook."""
    notebook = importlib.import_module("mindalle_jax.notebook")
    found: dict[str, object] = {
        "finetune": mindalle_jax.finetune,
        "studio": notebook.studio,
        "Studio.wait": notebook.Studio.wait,
    }
    for name in CLASSES:
        cls = getattr(mindalle_jax, name)
        for attribute in dir(cls):
            if isinstance(inspect.getattr_static(cls, attribute), property):
                continue
            value = getattr(cls, attribute)
            ours = (getattr(value, "__module__", None) or "").startswith("mindalle_jax")
            public = attribute == "__init__" or not attribute.startswith("_")
            if public and ours and inspect.isroutine(value) and not _is_made_by_dataclass(cls, attribute):
                found[f"{name}.{attribute}"] = value
    return found


def _is_made_by_dataclass(cls: type, attribute: str) -> bool:
    return attribute == "__init__" and dataclasses.is_dataclass(cls)


CALLABLES = public_callables()


def sections(docstring: str) -> dict[str, str]:
    """Heading -> text, indented once, of a docstring in Google's style."""
    found = re.findall(r"^(\w+):\n((?:(?: {4}.*)?\n)+)", inspect.cleandoc(docstring) + "\n", re.MULTILINE)
    return dict(found)


def entries(section: str) -> dict[str, str]:
    """Name -> text of the entries of a section."""
    joined = re.sub(r"\n {8,}", " ", section)
    return dict(re.findall(r"^ {4}([*\w]+)(?: \([^)]*\))?: (.+)$", joined, re.MULTILINE))


def arguments(function: object) -> list[str]:
    """Arguments as they stand in `Args:`; the options of sampling are **options."""
    signature = inspect.signature(inspect.unwrap(function))  # type: ignore[arg-type]
    code = function.__func__.__code__ if inspect.ismethod(function) else function.__code__  # type: ignore[attr-defined]
    own = [name for name in signature.parameters if name in code.co_varnames]
    names = [name for name in own if name not in ("self", "cls")]
    keywords = code.co_varnames[code.co_argcount + code.co_kwonlyargcount :][:1] if code.co_flags & 8 else ()
    return [name for name in names if name not in keywords] + [f"**{name}" for name in keywords]


@pytest.mark.parametrize("name", CALLABLES)
def test_every_argument_is_explained(name):
    explained = entries(sections(CALLABLES[name].__doc__ or "").get("Args", ""))
    assert list(explained) == arguments(CALLABLES[name])
    assert [text for text in explained.values() if not text.endswith(".")] == []


@pytest.mark.parametrize("name", CALLABLES)
def test_results_and_errors_are_explained(name):
    function = CALLABLES[name]
    parts = sections(function.__doc__ or "")
    returns = inspect.signature(function).return_annotation  # type: ignore[arg-type]
    if returns not in (None, "None", inspect.Signature.empty):
        assert len(parts.get("Returns", parts.get("Yields", ""))) > 10
    raised = entries(parts.get("Raises", ""))
    assert raised or name in MAY_RAISE_NOTHING
    known = [*ERRORS, "TypeError", "IndexError"]
    assert [error for error in raised if error not in known] == []


@pytest.mark.parametrize("name", CLASSES)
def test_every_attribute_has_words(name):
    """Properties and fields; those of SamplingOptions are in the table of options."""
    cls = getattr(mindalle_jax, name)
    properties = [p for n, p in inspect.getmembers(cls) if isinstance(p, property) and not n.startswith("_")]
    assert [p for p in properties if not p.__doc__] == []
    if dataclasses.is_dataclass(cls) and cls is not SamplingOptions:
        source = inspect.getsource(cls)
        fields = [field.name for field in dataclasses.fields(cls)]
        assert [name for name in fields if not re.search(rf'^    {name}: .*\n    """', source, re.MULTILINE)] == []


def test_every_public_name_has_a_place_in_the_reference():
    text = "\n".join(PAGES.values())
    directives = set(re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE))
    assert {f"mindalle_jax.{name}" for name in mindalle_jax.__all__ if name != "__version__"} <= directives
    assert {"mindalle_jax.notebook", *(f"mindalle_jax.errors.{name}" for name in ERRORS)} <= directives


def option_rows() -> list[str]:
    """The table of options, as docs/api/options.md has it."""
    types = {"ranker": "str, path, object or None", "callback": "function or None", "prompt_codes": "array or None"}
    rows = []
    for field in dataclasses.fields(SamplingOptions):
        doc, bound = field.metadata["doc"], field.metadata["bound"].rstrip(";")
        meaning = f"{doc[0].upper()}{doc[1:]}." + (f" It is {bound}." if bound else "")
        meaning = re.sub(r"\b(off|random) \(None\)", r"`None` (\1)", meaning)
        kind = types.get(field.name) or getattr(field.type, "__name__", None) or str(field.type).replace(" | ", " or ")
        rows.append(f"| `{field.name}` | {kind} | `{field.default!r}` | {meaning} |")
    return rows


def test_the_table_of_options_is_that_of_the_code():
    table = [line for line in PAGES["options"].splitlines() if line.startswith("| `")]
    assert table == option_rows()


@pytest.mark.parametrize("name", ["pipeline", "image_gpt", "ranking.ranker", "sampling.options", "sampling.result"])
def test_examples_in_docstrings_are_true(name):
    module = importlib.import_module(f"mindalle_jax.{name}")
    done = doctest.testmod(module)
    assert done.failed == 0 and (done.attempted > 0 or name not in ("pipeline", "ranking.ranker"))


# The tests of these tests


def wrong(prompt: str, seed: int) -> int:
    """Samples.

    Args:
        prompt: one
            prompt.

    Returns:
        A number.
    """
    return seed


def test_a_missing_argument_is_found():
    parts = sections(wrong.__doc__ or "")
    assert list(parts) == ["Args", "Returns"]
    assert entries(parts["Args"]) == {"prompt": "one prompt."} and arguments(wrong) == ["prompt", "seed"]
