"""Pushing a saved directory to the hub of Hugging Face."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError

from nextn.formats.card import FILE, card, tagged

PUSHING = ("repo_id", "commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags")


def make_repository(
    repo_id: str, private: bool | None = None, token: str | bool | None = None, revision: str | None = None
) -> str:
    """Make a repository and a branch of it, where they are missing; returns its name in full."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return repo_id


def push(
    directory: Path,
    files: Iterable[str],
    description: dict[str, Any],
    repo_id: str,
    commit_message: str | None = None,
    tags: Iterable[str] = (),
    token: str | bool | None = None,
    **commit: Any,
) -> Any:
    """Upload files of a saved directory in one commit.

    The model card of the repository is kept and tagged; where it has none, that of the directory is, or, if nextn has
    just written that, one is uploaded that names the repository.

    Args:
        files: paths in the directory that were written.
        description: of the heads, as `nextn/config.json` has it.
        commit: `commit_description`, `revision` and `create_pr` of `HfApi.create_commit`.

    Returns:
        the CommitInfo of huggingface_hub.
    """
    files = set(files)
    try:
        text = str(tagged(ModelCard.load(repo_id, token=token), tags))  # type: ignore[arg-type]
    except EntryNotFoundError:
        if FILE in files:
            text = str(card(description, (directory / "config.json").is_file(), repo_id, tags, online=True))
        else:
            text = str(tagged(ModelCard((directory / FILE).read_text()), tags))
    return HfApi(token=token).create_commit(
        repo_id,
        [
            CommitOperationAdd(FILE, text.encode()),
            *(CommitOperationAdd(file, directory / file) for file in sorted(files - {FILE})),
        ],
        commit_message=commit_message or "Upload model with nextn",
        **commit,
    )
