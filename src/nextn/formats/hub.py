"""The hub of Hugging Face: which names are repositories there, and fetching files of theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from nextn.formats import FormatError

FETCHING = ("revision", "token", "cache_dir", "local_files_only", "force_download")  # arguments of whatever fetches


def is_hub_name(name: str | Path) -> bool:
    """Whether a name is that of a repository (owner/name), and of no file or directory here."""
    text = str(name)
    if text.count("/") != 1 or text.startswith((".", "~", "/")):
        return False
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return not Path(text).exists()


def fetched(name: str, patterns: list[str], **fetching: Any) -> Path:
    """The files of a repository that match patterns, in the hub's cache; without a connection what is there.

    Args:
        fetching: see `FETCHING`.

    Raises:
        FormatError: where there is no such repository, or it cannot be reached and is not in the cache.
    """
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, **fetching))
    except Exception as error:  # those of a connection are of the hub's HTTP library, which is not always the same
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise FormatError(
            f"There is no directory {name} here, and the hub does not give a repository of that name: "
            f"{lines[0].rstrip('.:')}."
        ) from None
