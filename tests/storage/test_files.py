"""files.py: whole folders or none, nothing overwritten by a slip, the free disk told beforehand."""

import errno
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from mindalle_jax.errors import CheckpointError, MindalleError, OutputError
from mindalle_jax.storage import files
from mindalle_jax.storage.files import check_free_disk, check_output, check_writable, new_folder

MARKS = ("manifest.json",)


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder, hidden ones too, with its text; folders end in a slash."""
    return {
        f"{path.relative_to(folder)}{'/' if path.is_dir() else ''}": path.read_text() if path.is_file() else ""
        for path in folder.rglob("*")
    }


def make(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)
    return folder


# new_folder


def test_the_folder_appears_when_the_block_ends(tmp_path):
    target = tmp_path / "a" / "b" / "new"
    with new_folder(target) as folder:
        (folder / "file").write_text("x")
        assert not target.exists()
        assert folder.parent == target.parent, "the last step must be a rename on one disk"
    assert contents(tmp_path) == {"a/": "", "a/b/": "", "a/b/new/": "", "a/b/new/file": "x"}


@pytest.mark.parametrize(
    "error",
    [
        ValueError("own"),
        KeyboardInterrupt(),
        SystemExit(3),
        CheckpointError("broken"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
    ids=repr,
)
def test_nothing_is_left_after_an_exception(tmp_path, error):
    with pytest.raises(BaseException) as caught:  # noqa: PT011 - the types are compared below
        with new_folder(tmp_path / "a" / "b" / "new") as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / "file").write_text("x")
            raise error
    assert isinstance(caught.value, OutputError if isinstance(error, OSError) else type(error))
    assert contents(tmp_path) == {}, "the parents that were made for it go too"


def test_parents_that_hold_something_else_stay(tmp_path):
    make(tmp_path / "a", note_txt="mine")
    with pytest.raises(ValueError):
        with new_folder(tmp_path / "a" / "b" / "new"):
            raise ValueError
    assert contents(tmp_path) == {"a/": "", "a/note.txt": "mine"}


def test_an_os_error_names_the_target_and_the_reason(tmp_path):
    """Once a full disk was the only one told; a missing right was a traceback about a hidden folder."""
    with pytest.raises(OutputError) as caught:
        with new_folder(tmp_path / "new") as folder:
            (folder / "missing" / "file").write_text("x")
    assert str(caught.value) == (
        f"{tmp_path / 'new'}: No such file or directory ({tmp_path / 'new' / 'missing' / 'file'}); "
        "nothing was left behind"
    )


def test_an_error_of_ours_names_the_target_too(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        with new_folder(tmp_path / "new") as folder:
            raise CheckpointError(f"{folder / 'x'}: damaged")
    assert str(caught.value) == f"{tmp_path / 'new' / 'x'}: damaged"


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_permissions_follow_the_umask(tmp_path, umask):
    """Temporary folders are private (0700); a model for the whole team must not stay so."""
    before = os.umask(umask)
    try:
        with new_folder(tmp_path / "new"):
            pass
        assert os.umask(umask) == umask, "the umask of the process was changed"
    finally:
        os.umask(before)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o777 & ~umask


@pytest.mark.parametrize("parent", ["file", "file/deeper"])
def test_a_place_that_cannot_be_written_is_told(tmp_path, parent):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="new: cannot be written: (Not a directory|File exists)"):
        with new_folder(tmp_path / parent / "new"):
            pytest.fail("the block must not run")
    assert contents(tmp_path) == {"file": "x"}


# What exists


def test_what_exists_is_an_error_before_the_block_runs(tmp_path):
    make(tmp_path / "old", manifest_json="old")
    with pytest.raises(OutputError, match="exists already; name another folder or pass --overwrite"):
        with new_folder(tmp_path / "old"):
            pytest.fail("the block must not run")
    assert contents(tmp_path) == {"old/": "", "old/manifest.json": "old"}


def test_what_came_into_being_meanwhile_is_not_replaced(tmp_path):
    with pytest.raises(OutputError, match="exists already"):
        with new_folder(tmp_path / "new"):
            make(tmp_path / "new", manifest_json="of another process")
    assert contents(tmp_path) == {"new/": "", "new/manifest.json": "of another process"}


@pytest.mark.parametrize("old", [{}, {"manifest_json": "old", "extra_txt": "old"}], ids=["empty", "model"])
def test_overwrite_swaps(tmp_path, old):
    make(tmp_path / "target", **old)
    with new_folder(tmp_path / "target", overwrite=True, marks=MARKS) as folder:
        (folder / "manifest.json").write_text("new")
        assert ("target/manifest.json" in contents(tmp_path)) == bool(old), (
            "the old one stays until the new is complete"
        )
    assert contents(tmp_path) == {"target/": "", "target/manifest.json": "new"}


def test_overwrite_keeps_the_old_one_when_the_block_fails(tmp_path):
    make(tmp_path / "target", manifest_json="old")
    with pytest.raises(KeyboardInterrupt):
        with new_folder(tmp_path / "target", overwrite=True, marks=MARKS):
            raise KeyboardInterrupt
    assert contents(tmp_path) == {"target/": "", "target/manifest.json": "old"}


@pytest.mark.parametrize("failing", [1, 2], ids=["old away", "new into place"])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()], ids=repr)
def test_overwrite_puts_the_old_one_back_when_the_swap_fails(tmp_path, monkeypatch, failing, error):
    make(tmp_path / "target", manifest_json="old")
    calls, rename = [], os.rename

    def fail(source, target):
        calls.append(source)
        if len(calls) == failing:
            raise error
        rename(source, target)

    with pytest.raises((OutputError, KeyboardInterrupt)):
        with new_folder(tmp_path / "target", overwrite=True, marks=MARKS):
            monkeypatch.setattr(os, "rename", fail)
    assert contents(tmp_path) == {"target/": "", "target/manifest.json": "old"}


@pytest.mark.parametrize("marks", [(), MARKS])
def test_overwrite_never_replaces_what_is_no_model(tmp_path, marks):
    """`convert SRC ~ --overwrite` must not cost a home folder."""
    make(tmp_path / "documents", thesis_txt="mine")
    with pytest.raises(OutputError, match="documents is not empty and holds none of .*--overwrite does not replace it"):
        with new_folder(tmp_path / "documents", overwrite=True, marks=marks):
            pytest.fail("the block must not run")
    assert contents(tmp_path) == {"documents/": "", "documents/thesis.txt": "mine"}


@pytest.mark.parametrize("kind", ["file", "dangling link"])
def test_overwrite_never_replaces_what_is_no_folder(tmp_path, kind):
    target = tmp_path / "target"
    target.write_text("mine") if kind == "file" else target.symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match="is not a folder"):
        check_output(target, overwrite=True, marks=MARKS)
    with pytest.raises(OutputError, match="exists already"):
        check_output(target, overwrite=False)


def test_overwrite_replaces_a_link_and_not_what_it_points_to(tmp_path):
    make(tmp_path / "real", manifest_json="old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with new_folder(tmp_path / "link", overwrite=True, marks=MARKS) as folder:
        (folder / "manifest.json").write_text("new")
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "link" / "manifest.json").read_text() == "new"
    assert (tmp_path / "real" / "manifest.json").read_text() == "old"


# check_free_disk


def test_too_little_disk_states_the_need_and_the_place(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(0, 0, 1_500_000_000))
    check_free_disk(tmp_path / "new", 1_500_000_000, "the model")
    with pytest.raises(OutputError) as caught:
        check_free_disk(tmp_path / "not" / "yet" / "there", 5_600_000_000, "the model")
    assert isinstance(caught.value, MindalleError) and caught.value.exit_code == 6
    assert str(caught.value) == (
        f"the model needs 5.6 GB under {tmp_path}, where 1.5 GB are free; "
        "free some space or name a place on another disk"
    )


def test_a_place_that_cannot_be_written_is_told_before_the_work(tmp_path):
    """Pictures that took minutes to draw are not lost for want of a folder."""
    check_writable(tmp_path / "new" / "folder")
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError, match="file is not a folder that can be written to; name another folder"):
            check_writable(path)


def test_a_file_is_never_half_replaced(tmp_path, monkeypatch):
    """A kill while summary.json was written left it empty: 1 of 50."""
    path = tmp_path / "summary.json"
    files.replace_text(path, "old")

    def die(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        files.replace_text(path, "new")
    assert path.read_text() == "old"
    monkeypatch.undo()
    files.replace_text(path, "n\u00e9w")
    assert path.read_text(encoding="utf-8") == "n\u00e9w" and [one.name for one in tmp_path.iterdir()] == [
        "summary.json"
    ]
