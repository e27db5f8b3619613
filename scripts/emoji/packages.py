"""Fetches the packages of the emoji with npm, checks them, and reads them without unpacking.

The images of the two emoji-datasource packages have licenses of their own, which only the README names. package.json
and LICENSE are about the data.
"""

import hashlib
import subprocess
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from mindalle_jax.errors import DataError, UsageError


class Package(NamedTuple):
    """A package of the npm registry."""

    name: str
    version: str
    sha256: str
    licence_file: str
    """The file with the license of the part that is used."""
    licence_words: str
    """Text that this file must have."""
    credit: str
    """The authors of the part that is used, and its license."""

    @property
    def archive(self) -> str:
        """The file that `npm pack` writes."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"


NOTO = Package(
    "emoji-datasource-google", "16.0.0", "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    "README.md", "Android/Google/Noto images, are available under the [Apache License 2.0]",
    "Noto Emoji, by Google, Apache-2.0",
)  # fmt: skip
TWEMOJI = Package(
    "emoji-datasource-twitter", "16.0.0", "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    "README.md", "Twitter images are available under the [Creative Commons Attribution 4.0 license]",
    "Twemoji, by Twitter, Inc. and other contributors, CC-BY 4.0",
)  # fmt: skip
FLUENT = Package(
    "@lobehub/fluent-emoji-3d", "1.1.0", "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    "README.md", "This project is [MIT](./LICENSE) licensed.",
    "Fluent Emoji, by Microsoft, MIT, as packaged by LobeHub",
)  # fmt: skip
EMOJILIB = Package(
    "emojilib", "4.0.3", "7f9a6b43cff31d18985b7d65d11faba5bd971cbcc60020cf6d09322fbaaaf303",
    "LICENSE", "The MIT License (MIT)",
    "keywords: emojilib, by Mu-An Chiou, MIT",
)  # fmt: skip
EMOJIBASE = Package(
    "emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    "LICENSE", "MIT License",
    "names and keywords: emojibase, by Miles Johnson, MIT",
)  # fmt: skip
PACKAGES = (NOTO, TWEMOJI, FLUENT, EMOJILIB, EMOJIBASE)
MAX_MEMBER_BYTES = 32 << 20


def fetch_packages(folder: Path, packages: Iterable[Package] = PACKAGES) -> None:
    """Fetches the archives that are not in the folder yet, about 160 MB, and checks all of them.

    Raises UsageError if npm is missing or fails, and DataError as check_package does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for package in packages:
        if not (folder / package.archive).exists():
            wanted = f"{package.name}@{package.version}"
            command = ["npm", "pack", wanted, "--silent", "--pack-destination", str(folder)]
            try:
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            except (OSError, subprocess.CalledProcessError) as error:
                raise UsageError(
                    f"npm pack {wanted}: {error}; install npm, or put {package.archive} into {folder}"
                ) from None
        check_package(folder, package)


def check_package(folder: Path, package: Package) -> None:
    """Raises DataError unless the archive is the known one, and its license has not changed."""
    path = folder / package.archive
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != package.sha256:
        raise DataError(f"{path}: its digest is {digest}, not {package.sha256}; remove it, and it is fetched again")
    (text,) = read_members(path, [package.licence_file])
    if package.licence_words not in text.decode("utf-8"):
        raise DataError(f"{path}: {package.licence_file} does not say {package.licence_words!r}")


def read_members(path: Path, names: list[str]) -> list[bytes]:
    """The named files of an archive, from its folder package/, in the order of the names. Raises DataError."""
    places = {f"package/{name}": number for number, name in enumerate(names)}
    found: list[bytes | None] = [None] * len(names)
    with tarfile.open(path, "r:gz") as archive:
        for member in archive:
            number = places.get(member.name)
            if number is not None and member.isfile() and member.size <= MAX_MEMBER_BYTES:
                file = archive.extractfile(member)
                assert file is not None  # a plain file
                found[number] = file.read()
    missing = [name for name, data in zip(names, found, strict=True) if data is None]
    if missing:
        raise DataError(f"{path}: {len(missing)} files are not in it, {missing[0]} first")
    return [data for data in found if data is not None]
