"""scripts/emoji/packages.py: what npm fetches is taken only as it is known, with its licence."""

import subprocess
from pathlib import Path

import pytest

from mindalle_jax.errors import DataError, UsageError
from scripts.emoji import packages as module
from scripts.emoji.packages import NOTO, PACKAGES, check_package, fetch_packages, read_members
from tests.emoji_packages import write_package, write_packages


def test_archives_that_lie_there_are_not_fetched(tmp_path, monkeypatch):
    known = write_packages(tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("npm was called"))
    fetch_packages(tmp_path, known)


def test_what_is_missing_is_fetched_by_npm(tmp_path, monkeypatch):
    """By name and version, into the folder, under the name that npm gives a scoped package."""
    (tmp_path / "there").mkdir()
    known, asked = write_packages(tmp_path / "there"), []

    def pack(command, **_):
        asked.append(command)
        package = next(package for package in known if f"{package.name}@{package.version}" == command[2])
        (Path(command[-1]) / package.archive).write_bytes((tmp_path / "there" / package.archive).read_bytes())

    monkeypatch.setattr(subprocess, "run", pack)
    fetch_packages(tmp_path / "new", known)
    assert [command[:3] for command in asked] == [
        ["npm", "pack", f"{package.name}@{package.version}"] for package in known
    ]
    assert (tmp_path / "new" / "lobehub-fluent-emoji-3d-1.1.0.tgz").exists()


@pytest.mark.parametrize("error", [FileNotFoundError("npm"), subprocess.CalledProcessError(1, "npm")])
def test_without_npm_it_says_what_to_do(tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(UsageError, match=f"install npm, or put {NOTO.archive} into {tmp_path}"):
        fetch_packages(tmp_path)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_another_archive_is_refused(tmp_path, package):
    write_packages(tmp_path)
    with pytest.raises(DataError, match=rf"its digest is [0-9a-f]{{64}}, not {package.sha256}"):
        check_package(tmp_path, package)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_another_licence_is_refused(tmp_path, package):
    other = write_package(tmp_path, package, {package.licence_file: b"All rights reserved."})
    with pytest.raises(DataError, match=f"{package.licence_file} does not say "):
        check_package(tmp_path, other)


def test_members_come_in_the_order_asked_for(tmp_path, monkeypatch):
    write_package(tmp_path, NOTO, {"a": b"1", "b": b"22", "c/d": b"333"})
    path = tmp_path / NOTO.archive
    assert read_members(path, ["c/d", "a"]) == [b"333", b"1"]
    with pytest.raises(DataError, match="2 files are not in it, x first"):
        read_members(path, ["x", "a", "y"])
    monkeypatch.setattr(module, "MAX_MEMBER_BYTES", 2)
    with pytest.raises(DataError, match="1 files are not in it, c/d first"):
        read_members(path, ["a", "c/d"])
