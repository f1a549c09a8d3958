"""The Hugging Face hub: single files of a repository come from it, and a folder goes to it.

The library's own settings hold: its cache, its login, its offline mode and its endpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import HFValidationError, validate_repo_id

from omnisieve.compressors import CompressorError

_NOT_FOUND = "{} is no exported compressor: there is no such folder here, and {}"


class HubError(CompressorError):
    """The hub does not give, or does not take, a repository; the message says why and how to cure it."""


def is_repo_name(text: str) -> bool:
    """Whether a text reads as OWNER/NAME on the hub; where there is a folder OWNER here, it is a path."""
    owner, *rest = text.split("/")
    if len(rest) != 1 or Path(owner).is_dir():
        return False
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def fetch(repo: str, patterns: Sequence[str], revision: str | None = None) -> Path:
    """The folder in the local cache that holds files of a repository; what is not in the cache is downloaded.

    Args:
        repo: OWNER/NAME.
        patterns: of the names of files, with * for anything; nothing else is downloaded.
        revision: branch, tag or commit; the main branch if None.

    Raises:
        HubError: there is no such repository or revision, or the hub cannot be reached and the cache lacks it.
    """
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))
    except RepositoryNotFoundError as error:
        reason = "the hub has no such repository, or it is private: then log in with `hf auth login`"
        raise HubError(_NOT_FOUND.format(repo, reason)) from error
    except RevisionNotFoundError as error:
        raise HubError(f"{repo} on the hub has no revision {revision!r}") from error
    except (OSError, HTTPError) as error:
        unreachable = f"{constants.ENDPOINT} cannot be asked: {_reason(error)}"
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else unreachable
        reason = f"the hub's local cache {constants.HF_HUB_CACHE} does not have it, and {why}"
        raise HubError(_NOT_FOUND.format(repo, reason)) from error


def upload(folder: Path, repo: str, patterns: Sequence[str], message: str, private: bool | None = None) -> str:
    """Put files of a folder into a repository, in one commit; the repository is made if there is none.

    Args:
        folder: that holds them.
        repo: OWNER/NAME, or NAME for the owner that is logged in.
        patterns: see `fetch`.
        message: of the commit.
        private: whether a new repository is; the owner's default if None.

    Returns:
        the URL of the commit.

    Raises:
        HubError: the hub cannot be reached, or refuses.
    """
    api = HfApi()
    try:
        made = api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=made.repo_id, folder_path=folder, allow_patterns=list(patterns), commit_message=message
        )
    except (OSError, HTTPError, HFValidationError) as error:
        raise HubError(
            f"{repo} cannot be written on {constants.ENDPOINT}; log in with `hf auth login` if you have not: "
            f"{_reason(error)}"
        ) from error
    return commit.commit_url


def _reason(error: Exception) -> str:
    """What went wrong first, without the library's advice."""
    return str(error.__cause__ or error).partition("\n")[0]
