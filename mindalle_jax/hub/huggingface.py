"""Repositories of the Hugging Face hub, through the local cache of huggingface_hub.

The usual settings of Hugging Face apply: HF_HOME for the cache, HF_ENDPOINT for the hub, `hf auth login` for the user.
huggingface_hub is imported only when it is needed, because most models are folders.
"""

from collections.abc import Sequence
from pathlib import Path

from mindalle_jax.errors import DownloadError, one_line


def is_repo_id(name: str) -> bool:
    """Returns whether the hub could have a repository of that name: OWNER/NAME, in the characters that it allows."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def fetch_repo(
    repo_id: str, patterns: Sequence[str], *, revision: str | None = None, local_files_only: bool = False
) -> Path:
    """Returns a folder with the files of a repository that match one of `patterns`. Downloads only missing files.

    The files may be links. revision: a branch, a tag or a commit; None is the main branch. local_files_only: uses only
    the cache and makes no connection, as with HF_HUB_OFFLINE=1. If the hub cannot be reached, the cache is used too.

    Raises DownloadError if the repository or revision does not exist or may not be read, if the hub cannot be reached
    and the cache is incomplete, or if the disk is full.
    """
    from huggingface_hub import constants, errors, snapshot_download

    url = f"{constants.ENDPOINT}/{repo_id}"
    try:
        folder = snapshot_download(
            repo_id, revision=revision, allow_patterns=list(patterns), local_files_only=local_files_only
        )
    except errors.GatedRepoError:  # a subclass of the next error
        raise DownloadError(f"{url} is gated: accept its terms there, then run `hf auth login`") from None
    except errors.RepositoryNotFoundError:
        raise DownloadError(
            f"{repo_id}: no such folder, and no such repository at {url}; check the name, or if it is private run "
            "`hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise DownloadError(f"{url} has no revision {revision!r}; name a branch, a tag or a commit of it") from None
    except errors.LocalEntryNotFoundError as error:
        what = repo_id if revision is None else f"{repo_id}, revision {revision!r},"
        why = "nothing may be downloaded (local_files_only)" if local_files_only else one_line(error.__cause__ or error)
        raise DownloadError(
            f"{what} is no folder here and not complete in the cache {constants.HF_HUB_CACHE}: {why}; "
            "load it once with a connection to the hub"
        ) from error
    except Exception as error:  # also errors of its HTTP and Xet libraries, which differ between versions
        raise DownloadError(f"cannot download {url}: {one_line(error)}") from error
    if not Path(folder).is_dir():  # snapshot_download makes none if no file matches
        raise DownloadError(f"{url} holds no model: none of {', '.join(patterns)}")
    return Path(folder)
