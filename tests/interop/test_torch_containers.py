"""interop/torch_containers.py: where the bytes of a storage are in a file. Whole files: test_torch_archive.py."""

import dataclasses
import os
import zipfile

import numpy as np
import pytest

from mindalle_jax.errors import CheckpointError
from mindalle_jax.interop.torch_archive import write_torch_archive
from mindalle_jax.interop.torch_containers import (
    DamagedError,
    ZipContainer,
    open_regular_file,
    read_into,
    what_it_is_instead,
)

ARRAY = np.arange(6, dtype=np.float32)


@pytest.fixture
def path(tmp_path):
    write_torch_archive(tmp_path / "a.ckpt", [("w", ARRAY.dtype, ARRAY.shape)], lambda _: ARRAY)
    return tmp_path / "a.ckpt"


def test_a_storage_is_found_in_a_zip(path):
    with open_regular_file(str(path)) as file:
        container = ZipContainer(file, str(path), path.stat().st_size)
        (storage,) = container.pickle.storages.values()
        extent, out = container.locate(storage), np.empty(ARRAY.nbytes, np.uint8)
        read_into(file, extent, out)
        assert (out.view(np.float32) == ARRAY).all() and extent.offset % 64 == 0
        with zipfile.ZipFile(path) as archive:
            assert extent.crc == archive.getinfo("archive/data/0").CRC
        with pytest.raises(DamagedError, match="CRC does not match"):
            read_into(file, dataclasses.replace(extent, crc=extent.crc ^ 1), out)
        with pytest.raises(DamagedError, match="truncated"):
            read_into(file, dataclasses.replace(extent, offset=path.stat().st_size - 4), out)
        with pytest.raises(DamagedError, match="missing from the file"):
            container.locate(dataclasses.replace(storage, key="7"))
        with pytest.raises(DamagedError, match="has 24 bytes, the pickle says 20"):
            container.locate(dataclasses.replace(storage, record_bytes=20))


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="not a regular file"):
        open_regular_file(str(tmp_path / "pipe"))


@pytest.mark.parametrize(
    ("head", "text"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1", "run `git lfs pull`"),
        (b"<!DOCTYPE html>", "looks like a web page"),
        (b"\x10\0\0\0\0\0\0\0{}", "looks like a safetensors file"),
        (b"GIF89a", "is not a torch checkpoint"),
    ],
)
def test_other_files_are_named(head, text):
    assert text in what_it_is_instead(head)
