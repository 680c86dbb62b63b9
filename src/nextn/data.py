"""Text and prompts to packed blocks of token ids with labels; documents keep their borders."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from nextn.losses import IGNORE


class DataError(ValueError):
    """A data file that cannot be used; the message says why."""


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file.

    Raises:
        DataError: for a missing file, a line that is not a JSON object, or no record at all.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"There is no data file {path}.")
    records = []
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    raise DataError(f"{path}, line {number}, is not JSON; expected one JSON object a line.") from None
                if not isinstance(record, dict):
                    raise DataError(f"{path}, line {number}, is no JSON object; expected one a line.")
                records.append(record)
    if not records:
        raise DataError(f"{path} has no records.")
    return records


def read_prompts(path: str | Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file that have a `prompt`.

    Raises:
        DataError: where none has.
    """
    records = [record for record in read_jsonl(path) if isinstance(record.get("prompt"), str) and record["prompt"]]
    if not records:
        raise DataError(f"{path} has no record with a `prompt`.")
    return records


def checked_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """A user's prompt as token ids.

    Raises:
        DataError: for a prompt without text.
    """
    if not prompt.strip():
        raise DataError("The prompt is empty: give some text.")
    return prompt_ids(tokenizer, prompt)


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """A user's prompt as token ids: through the chat template where there is one, else as it is."""
    if tokenizer.chat_template:
        message = [{"role": "user", "content": prompt}]
        return list(tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"])
    return list(tokenizer(prompt)["input_ids"])


class TextStream:
    """Token ids to text as they come; a character that takes several tokens appears with the last of them."""

    def __init__(self, tokenizer: Any) -> None:
        if not hasattr(tokenizer, "backend_tokenizer"):
            raise DataError(f"{type(tokenizer).__name__} cannot stream; load the fast version of this tokenizer.")
        self._backend = tokenizer.backend_tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)

    def push(self, token: int) -> str:
        """The text that `token` completes; may be empty."""
        return self._stream.step(self._backend, token) or ""


def example(tokenizer: Any, record: dict[str, Any]) -> tuple[list[int], list[int]] | None:
    """One record as (ids, labels); None where it holds no usable text.

    `{"prompt", "answer"}` trains on the answer only, its end token included unless `finish` says that it was cut
    (`tokens`, where `distill` wrote them, are the answer as it was emitted);
    `{"text"}` trains on all of it.
    """
    answer, text = record.get("answer"), record.get("text")
    if isinstance(record.get("prompt"), str) and isinstance(answer, str) and answer:
        head, tail = prompt_ids(tokenizer, record["prompt"]), _answer_ids(tokenizer, record)
        return head + tail, [IGNORE] * len(head) + tail
    if isinstance(text, str) and text.strip():
        ids = list(tokenizer(text)["input_ids"])
        return ids, [IGNORE, *ids[1:]]  # nothing predicts a text's first token
    return None


def _answer_ids(tokenizer: Any, record: dict[str, Any]) -> list[int]:
    """An answer as the model emitted it, its own end token included, where the record has such `tokens`.

    Else, or where they are another tokenizer's, the answer's text and the end token.
    """
    answer: str = record["answer"]
    tokens: Any = record.get("tokens")
    known = isinstance(tokens, list) and all(isinstance(id, int) and 0 <= id < len(tokenizer) for id in tokens)
    if known and tokenizer.decode(tokens, skip_special_tokens=True) == answer:
        return list(tokens)
    ids = list(tokenizer(answer, add_special_tokens=False)["input_ids"])
    whole = record.get("finish", "stop") == "stop" and tokenizer.eos_token_id is not None
    return [*ids, tokenizer.eos_token_id] if whole else ids


class PackedBlocks(Dataset):
    """Examples packed one after the other into blocks of `length` tokens.

    An example longer than a block is cut. Each item has `input_ids`, `labels` and `position_ids` [length]; positions
    start at 0 in each document, which is how a document's border is known; padding has label -100 and
    `attention_mask` 0.
    """

    def __init__(self, examples: Iterable[tuple[list[int], list[int]]], length: int, pad_id: int) -> None:
        self.length, self.pad_id = length, pad_id
        self.blocks: list[list[tuple[list[int], list[int]]]] = list(_first_fit(examples, length))
        if not self.blocks:
            raise DataError("The data has no usable text: expected records with `prompt` and `answer`, or `text`.")

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        documents = self.blocks[index]
        ids = [token for document, _ in documents for token in document]
        labels = [label for _, document in documents for label in document]
        positions = [place for document, _ in documents for place in range(len(document))]
        padding = self.length - len(ids)
        return {
            "input_ids": torch.tensor(ids + [self.pad_id] * padding),
            "labels": torch.tensor(labels + [IGNORE] * padding),
            "position_ids": torch.tensor(positions + list(range(padding))),
            "attention_mask": torch.tensor([1] * len(ids) + [0] * padding),
        }

    def batch(self, places: Iterable[int]) -> dict[str, Tensor]:
        """Several blocks as one batch [B, length]."""
        return default_collate([self[place] for place in places])

    @property
    def trained_tokens(self) -> int:
        """How many tokens carry a label."""
        return sum(label != IGNORE for block in self.blocks for _, labels in block for label in labels)


def _first_fit(
    examples: Iterable[tuple[list[int], list[int]]], length: int, open_blocks: int = 16
) -> Iterator[list[tuple[list[int], list[int]]]]:
    """Pack greedily into the first of a few open blocks that has room."""
    blocks: list[tuple[int, list[tuple[list[int], list[int]]]]] = []
    for ids, labels in examples:
        ids, labels = ids[:length], labels[:length]
        if all(label == IGNORE for label in labels):
            continue
        for place, (used, block) in enumerate(blocks):
            if used + len(ids) <= length:
                block.append((ids, labels))
                blocks[place] = used + len(ids), block
                break
        else:
            if len(blocks) == open_blocks:
                fullest = max(range(open_blocks), key=lambda place: blocks[place][0])
                yield blocks.pop(fullest)[1]
            blocks.append((len(ids), [(ids, labels)]))
    yield from (block for _, block in blocks)


def load_examples(paths: Iterable[str | Path], tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """The usable records of JSON-lines files as (ids, labels)."""
    records = [record for path in paths for record in read_jsonl(path)]
    return [made for record in records if (made := example(tokenizer, record)) is not None]
