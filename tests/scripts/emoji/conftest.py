"""A few things of our own, read as the published ones are."""

import pytest

from scripts.emoji.things import Things, read_things
from tests.emoji_packages import write_packages


@pytest.fixture(scope="session")
def things(tmp_path_factory) -> Things:
    """Nine things in three styles."""
    folder = tmp_path_factory.mktemp("packages")
    write_packages(folder)
    return read_things(folder)
