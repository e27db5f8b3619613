"""Small data sets in every format, for the tests of data/."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from mindalle_jax.data.samples import Source


def picture(number: int = 0, extension: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((16, 16, 3), number * 7 % 256, np.uint8)).save(file, extension)
    return file.getvalue()


def fill(folder: Path, **files: str | bytes | None) -> Path:
    """Files by name (a__b is a/b, _jpg is .jpg); None is a picture."""
    for number, (name, content) in enumerate(files.items()):
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        content = picture(number) if content is None else content
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def captions(source: Source) -> dict[str, list[str]]:
    return {sample.id: list(sample.captions) for sample in source.samples}


def labels(source: Source) -> dict[str, int | None]:
    return {sample.id: sample.label for sample in source.samples}


def write_tar(path: Path, members: dict[str, bytes | str | tarfile.TarInfo], **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                content.name = name
                tar.addfile(content)
                continue
            data = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path
