"""Finds the folder or file of a model from its path or its name.

`find_model` and `find_clip` return a path that can be loaded, and `find_source` a path to convert.
"""

import contextlib
import hashlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path

from mindalle_jax.errors import CheckpointError, DownloadError, OutputError, UsageError, did_you_mean
from mindalle_jax.hub.download import RELEASES, fetch_release
from mindalle_jax.hub.huggingface import fetch_repo, is_repo_id
from mindalle_jax.interop.clip import INDEX, WEIGHT_FILES, is_clip
from mindalle_jax.interop.mindalle import import_checkpoint
from mindalle_jax.runtime.cache import cache_dir
from mindalle_jax.storage import weights
from mindalle_jax.storage.files import IN_PACKAGE, RANKER
from mindalle_jax.storage.model_folder import MODEL_FILES

CLIP_NAMES = {
    "ViT-B/32": "openai/clip-vit-base-patch32",
    "ViT-B/16": "openai/clip-vit-base-patch16",
    "ViT-L/14": "openai/clip-vit-large-patch14",
    "ViT-L/14@336px": "openai/clip-vit-large-patch14-336",
}
"""OpenAI's names of its CLIP models, as clip.load takes them -> their repositories on the hub."""
RESNETS = ("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64")


def find_model(
    path_or_name: str | os.PathLike[str], *, revision: str | None = None, local_files_only: bool = False
) -> Path:
    """Returns the converted folder of a model. It is named by a path, a known name, or a repository OWNER/NAME.

    A path that exists comes first, then known names, then the Hugging Face hub. Downloads and converts into the caches
    as needed. revision: branch, tag or commit of a repository. local_files_only: never downloads. Raises UsageError for
    a revision of anything but a repository; for other errors see Dalle.from_pretrained.
    """
    if not isinstance(path_or_name, (str, os.PathLike)) or not str(path_or_name):
        raise UsageError(f"a model is named by a path or a name, not {path_or_name!r}")
    path, name = Path(os.path.expanduser(path_or_name)), str(path_or_name)
    if revision is not None and (path.exists() or name in (*IN_PACKAGE, *RELEASES)):
        raise UsageError(f"{name} is {'a path' if path.exists() else 'a known name'} and has no revision {revision!r}")
    if not path.exists():
        if name in IN_PACKAGE:
            return IN_PACKAGE[name]
        if name in RELEASES:
            if local_files_only and not (cache_dir() / name).exists():
                raise DownloadError(
                    f"{name} is not in the cache {cache_dir()}, and nothing may be downloaded (local_files_only)"
                )
            path = fetch_release(name)
        elif is_repo_id(name):
            with _naming_the_nearest(name, RELEASES):
                path = fetch_repo(name, MODEL_FILES, revision=revision, local_files_only=local_files_only)
        else:
            known = [*IN_PACKAGE, *RELEASES]
            raise CheckpointError(
                f"{name}: no such folder, and no known name ({', '.join(known)}) or OWNER/NAME of the hub"
                f"{did_you_mean(name, known)}"
            )
    if (path / weights.MANIFEST).is_file():
        return path
    if (path / "run.yaml").is_file():
        raise CheckpointError(
            f"{name}: a training run that is not complete; the command that started it resumes it, mindalle sample "
            f"--model {name} uses its newest checkpoint, and mindalle export-checkpoint {name} DIR makes a model of it"
        )
    try:
        return _converted(path)
    except CheckpointError as error:
        hidden = "; this folder hides the model of that name in the package" if name in IN_PACKAGE else ""
        raise CheckpointError(f"{error}{hidden}") from error


def find_clip(
    path_or_name: str | os.PathLike[str], *, revision: str | None = None, local_files_only: bool = False
) -> Path:
    """Returns the folder or file of a CLIP model. It is named by a path, a model in the package, or a hub repository.

    A path that exists comes first. The name of a model in the package means its ranker. Names of OpenAI (CLIP_NAMES)
    stand for their repositories. From a repository only one weights file is fetched, the first of WEIGHT_FILES that
    exists. revision, local_files_only: as for fetch_repo. Raises CheckpointError, DownloadError, or UsageError for the
    revision of a path.
    """
    if not str(path_or_name):
        raise UsageError("the name of the ranker is empty; off uses no ranker")
    path, name = Path(os.path.expanduser(path_or_name)), str(path_or_name)
    if path.exists():
        if revision is not None:
            raise UsageError(f"{name} is a path and has no revision {revision!r}")
        return path
    if name in IN_PACKAGE:
        return IN_PACKAGE[name] / RANKER
    if name in RESNETS:
        raise CheckpointError(f"{name} is a ResNet, which is not supported; take one of {', '.join(CLIP_NAMES)}")
    known = [*CLIP_NAMES, *CLIP_NAMES.values(), *IN_PACKAGE, "likelihood"]
    name = CLIP_NAMES.get(name, name)
    if not is_repo_id(name):
        raise CheckpointError(
            f"{name}: no such file or folder, no CLIP model of OpenAI ({', '.join(CLIP_NAMES)}), and no OWNER/NAME of "
            f"the hub{did_you_mean('off' if name == 'none' else name, [*known, 'off'])}"
        )
    with _naming_the_nearest(name, known):
        for file in (*WEIGHT_FILES, *(f"{file}{INDEX}" for file in WEIGHT_FILES)):
            wanted = ["config.json", "preprocessor_config.json", "tokenizer.json", "vocab.json", "merges.txt", file]
            if file.endswith(INDEX):
                stem, extension = os.path.splitext(file.removesuffix(INDEX))
                wanted.append(f"{stem}-*-of-*{extension}")
            folder = fetch_repo(name, wanted, revision=revision, local_files_only=local_files_only)
            if (folder / file).is_file():
                break
    return folder  # read_clip reports missing files


def find_source(path_or_name: str, download_from: str | None = None) -> Path:
    """Returns the folder or file to convert, in any format. It is named by a path, a known name or a hub repository.

    download_from: another source (URL or file) of the archive of a known name. Raises DownloadError, and UsageError for
    download_from with any other name.
    """
    path = Path(os.path.expanduser(path_or_name))
    if path_or_name in IN_PACKAGE and not path.exists():
        return IN_PACKAGE[path_or_name]
    if path_or_name in CLIP_NAMES and not path.exists():
        return find_clip(path_or_name)
    if path_or_name in RELEASES and not path.exists():
        return fetch_release(path_or_name, source=download_from)
    if download_from:
        raise UsageError(f"--download-from works only with {' or '.join(RELEASES)} as the source, not {path_or_name!r}")
    if path.exists() or not is_repo_id(path_or_name):
        return path  # the function that reads it reports errors
    folder = fetch_repo(path_or_name, [*MODEL_FILES, "config.json"])
    return find_clip(path_or_name) if is_clip(folder) else folder


@contextlib.contextmanager
def _naming_the_nearest(name: str, known: Collection[str]) -> Iterator[None]:
    """Adds the nearest known name to a DownloadError, since a misspelled name looks like a missing repository."""
    try:
        yield
    except DownloadError as error:
        hint = "" if name in known else did_you_mean(name, known)
        raise DownloadError(f"{error}{hint}") from error


def _converted(path: Path) -> Path:
    """Returns the converted copy of `path` in the cache; converts it now if the cache does not have it.

    path: a model in the original's format.
    """
    # A file may be a link, as in the cache of the hub. Then config.yaml is beside the link, not beside its target.
    source = path.resolve() if path.is_dir() else path.parent.resolve() / path.name
    folder = source if source.is_dir() else source.parent
    files = [*(source.glob("*.*") if source.is_dir() else [source, *folder.glob("config.yaml")])]
    files += folder.glob("tokenizer/*")
    stamps = sorted(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)
    key = hashlib.sha256(os.fsencode("\n".join([str(source), *stamps]))).hexdigest()[:16]
    target = cache_dir() / "converted" / f"{source.name}-{key}"
    if not target.exists():
        try:
            import_checkpoint(source, target)
        except OutputError:
            if not (target / weights.MANIFEST).is_file():  # another process may have written it meanwhile
                raise
    return target
