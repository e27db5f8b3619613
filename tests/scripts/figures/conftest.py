"""The model in the package, loaded once for the tests of the figures."""

import pytest

from mindalle_jax import Dalle


@pytest.fixture(scope="session")
def demo() -> Dalle:
    return Dalle.from_pretrained("demo")
