"""Fixtures of the tests of hub/."""

import pytest
from archives import Bars

from mindalle_jax.hub import download, unpack


@pytest.fixture
def bars(monkeypatch):
    bars = Bars()
    for user in (download, unpack):
        monkeypatch.setattr(user, "progress", bars)
    return bars
