"""Where models and compiled programs are kept: variables of the environment, and the user's cache folder."""

from pathlib import Path

import jax
import pytest

from mindalle_jax.runtime.cache import cache_dir


@pytest.mark.parametrize(
    ("own", "xdg", "expected"),
    [
        ("/data/models", "/xdg", "/data/models"),
        ("~/models", None, "/home/someone/models"),
        ("relative", "/xdg", "relative"),
        (None, "/xdg", "/xdg/mindalle-jax"),
        ("", "/xdg", "/xdg/mindalle-jax"),
        (None, "~/xdg", "/home/someone/xdg/mindalle-jax"),
        (None, "", "/home/someone/.cache/mindalle-jax"),
        (None, None, "/home/someone/.cache/mindalle-jax"),
    ],
)
def test_the_cache_folder_by_the_environment(monkeypatch, own, xdg, expected):
    """An empty variable counts as none: or the cache would be the working folder."""
    monkeypatch.setenv("HOME", "/home/someone")
    for name, value in (("MINDALLE_CACHE", own), ("XDG_CACHE_HOME", xdg)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert cache_dir() == Path(expected)


def test_nothing_is_made_by_asking(monkeypatch, tmp_path):
    monkeypatch.setenv("MINDALLE_CACHE", str(tmp_path / "cache"))
    assert cache_dir() == tmp_path / "cache" and not (tmp_path / "cache").exists()


def test_the_compilation_cache_is_under_the_users_cache_folder(tiny_dalle, cache_folder):
    """The second start of a program must not compile for minutes again."""
    assert jax.config.values["jax_compilation_cache_dir"] == str(cache_folder / "xla")
    tiny_dalle.generate_codes("the cat", num_candidates=3)
    assert any((cache_folder / "xla").iterdir())
