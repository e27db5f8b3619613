"""The package itself: public names load when they are asked for, and what needs no network imports none."""

import importlib

import pytest
from commands import python

import mindalle_jax

NAMES = [name for name in mindalle_jax.__all__ if name != "__version__"]

LOADED = "print(*sorted({'jax', 'flax', 'mindalle_jax.pipeline'} & set(sys.modules)))"
"""Names what must not be imported before it is needed."""


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_what_its_module_calls_so(name):
    """And is looked up once: the next access finds it in the package."""
    home = importlib.import_module(f"mindalle_jax.{mindalle_jax._HOMES[name]}")
    assert getattr(mindalle_jax, name) is getattr(home, name)
    assert vars(mindalle_jax)[name] is getattr(home, name)


def test_dir_lists_the_public_names_alone():
    """What completion offers in a notebook; `importlib` and `Any` are no part of it."""
    assert dir(mindalle_jax) == sorted([*mindalle_jax._HOMES, "__version__"]) == sorted(mindalle_jax.__all__)


def test_an_unknown_name_is_an_attribute_error():
    """hasattr and copy rely on it; a KeyError would come out of them."""
    with pytest.raises(AttributeError, match="module 'mindalle_jax' has no attribute 'Dall_e'"):
        getattr(mindalle_jax, "Dall_e")  # noqa: B009
    with pytest.raises(ImportError, match="cannot import name 'Dall_e'"):
        from mindalle_jax import Dall_e  # noqa: F401


@pytest.mark.parametrize(
    "code",
    [
        "import mindalle_jax; mindalle_jax.__version__",
        "import mindalle_jax; dir(mindalle_jax)",
        "from mindalle_jax import SamplingOptions, Progress",
    ],
)
def test_what_needs_no_network_imports_none(code):
    """In a process of its own. JAX alone takes a second to import, and takes the memory of a GPU."""
    done = python("-c", f"import sys; {code}; {LOADED}")
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


def test_a_model_imports_what_it_needs():
    """The check above sees an import."""
    done = python("-c", f"import sys; from mindalle_jax import Dalle; {LOADED}")
    assert done.stdout.split() == ["flax", "jax", "mindalle_jax.pipeline"]


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["sample", "--help"], ["finetune", "--help"], []], ids=" ".join
)
def test_help_and_version_import_no_network(arguments):
    """Help that takes seconds to come is not asked for twice. The last has no verb, which shows the help."""
    run = f"import sys\nfrom mindalle_jax.cli import main\ntry:\n    main(sys.argv[1:])\nfinally:\n    {LOADED}"
    done = python("-c", run, *arguments)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "", done.stdout
    assert len(done.stdout) + len(done.stderr) > 10
