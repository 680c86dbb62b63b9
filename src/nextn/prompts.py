"""Prompts as files give them: a text or a chat each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nextn.data import DataError, read_jsonl


def read_chat(path: Path) -> list[dict[str, Any]]:
    """A chat from a JSON file: a list of messages, or an object with `messages`.

    Raises:
        DataError: for a file that holds none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}.") from None
    messages = content.get("messages") if isinstance(content, dict) else content
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{path} holds no chat; expected a list of messages with role and content.")
    return messages


def read_questions(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file, each with a `prompt` or with `messages`.

    Raises:
        DataError: for a record that has neither, with its number, counted from 1.
    """
    records = read_jsonl(path)
    for number, record in enumerate(records, start=1):
        if not (question_of(record) or "").strip():
            raise DataError(f"{path}, record {number}, has neither a `prompt` nor `messages`.")
    return records


def question_of(record: dict[str, Any]) -> str | None:
    """What a record asks: its `prompt`, or its `messages` as JSON; None where it has neither."""
    prompt, messages = record.get("prompt"), record.get("messages")
    if isinstance(prompt, str) and prompt:
        return prompt
    return json.dumps(messages, sort_keys=True) if isinstance(messages, list) and messages else None
