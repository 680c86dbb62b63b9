"""Text and prompts to packed blocks of token ids with labels; documents keep their borders."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.decoders import DecodeStream
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, default_collate, get_worker_info
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from nextn.losses import IGNORE


class DataError(ValueError):
    """A data file that cannot be used; the message says why."""


_NO_TEXT = "The data has no usable text: expected records with `text`, with `prompt` and `answer`, or with `messages`."
_PACKED = (".gz", ".zst", ".xz", ".bz2", ".zip", ".arrow", ".bin", ".csv", ".tsv")  # no text to train on as it is
Example = tuple[list[int], list[int]]  # token ids, and the labels of the same places


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file.

    Raises:
        DataError: for a missing file, a line that is not a JSON object, or no record at all.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"There is no data file {path}.")
    records = list(_json_lines(path))
    if not records:
        raise DataError(f"{path} has no records.")
    return records


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    raise DataError(f"{path}, line {number}, is not JSON; expected one JSON object a line.") from None
                if not isinstance(record, dict):
                    raise DataError(f"{path}, line {number}, is no JSON object; expected one a line.")
                yield record


def records_of(source: str | Path, split: str = "train", text_bytes: int = 1 << 16) -> Iterator[dict[str, Any]]:
    """The records of a data source, one at a time.

    Args:
        source: a file of JSON lines (`.jsonl`, `.json`) or Parquet (`.parquet`), any other file as plain text, or the
            name of a dataset on the hub (`owner/name`, or `owner/name:config`).
        split: of a dataset on the hub.
        text_bytes: plain text comes in pieces of about so many bytes, cut at the ends of lines.

    Raises:
        DataError: where there is neither such a file nor such a dataset.
    """
    path = Path(source)
    if path.is_file() and path.suffix in (".jsonl", ".json"):
        yield from _json_lines(path)
    elif path.is_file() and path.suffix == ".parquet":
        yield from _loaded("parquet", None, "train", data_files=str(path))
    elif path.is_file() and path.suffix in _PACKED:
        raise DataError(f"{path} is no plain text; give .jsonl, .parquet or text.")
    elif path.is_file():
        with path.open(encoding="utf-8", errors="replace") as lines:
            while piece := lines.readlines(text_bytes):
                yield {"text": "".join(piece)}
    elif str(source).count("/") == 1 and not str(source).startswith((".", "/")) and not path.suffix[1:].isalpha():
        name, _, config = str(source).partition(":")
        yield from _loaded(name, config or None, split)
    else:
        raise DataError(f"There is no data file {path}.")


def _loaded(name: str, config: str | None, split: str, **kwargs: Any) -> Iterator[dict[str, Any]]:
    """The records of a dataset, streamed by the `datasets` library."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError(f"{name} is read by the datasets library: pip install 'nextn[eval]'.") from None
    try:
        yield from load_dataset(name, config, split=split, streaming=True, **kwargs)
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise DataError(f"The dataset {kwargs.get('data_files', name)} cannot be read: {reason}.") from None


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the 256 bytes, `<eos>` and `<pad>`: 258 in all, which any transformers can load."""
    # GPT-2's letters for bytes, in the order of the bytes: those that print stand for themselves.
    printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printing]
    letters = {byte: chr(byte) for byte in printing} | {byte: chr(256 + place) for place, byte in enumerate(others)}
    backend = Tokenizer(BPE(vocab={letters[byte]: byte for byte in range(256)}, merges=[]))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = ByteLevelDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


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


def example(tokenizer: Any, record: dict[str, Any]) -> Example | None:
    """One record as (ids, labels); None where it holds no usable text.

    `{"messages"}` (a chat, with `role` and `content`) trains on what the assistant says; `{"prompt", "answer"}` on the
    answer, its end token included unless `finish` says that it was cut (`tokens`, where `distill` wrote them, are the
    answer as it was emitted); `{"text"}` on all of it.
    """
    answer, text = record.get("answer"), record.get("text")
    if isinstance(record.get("messages"), list):
        return _chat(tokenizer, record["messages"])
    if isinstance(record.get("prompt"), str) and isinstance(answer, str) and answer:
        head, tail = prompt_ids(tokenizer, record["prompt"]), _answer_ids(tokenizer, record)
        return head + tail, [IGNORE] * len(head) + tail
    if isinstance(text, str) and text.strip():
        ids = list(tokenizer(text)["input_ids"])
        return ids, [IGNORE, *ids[1:]]  # nothing predicts a text's first token
    return None


def _chat(tokenizer: Any, messages: list[dict[str, Any]]) -> Example | None:
    """A chat, with labels on what the assistant says, its end token included."""
    if not tokenizer.chat_template:
        raise DataError(f"{tokenizer.name_or_path or 'The tokenizer'} has no chat template, but the data has messages.")
    ids: list[int] = []
    labels: list[int] = []
    for place, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        asked = _templated(tokenizer, messages[:place], add_generation_prompt=True)
        said = _templated(tokenizer, messages[: place + 1])
        if asked[: len(ids)] != ids or said[: len(asked)] != asked:
            raise DataError("The chat template rewrites earlier turns, so that no answer can be told from its chat.")
        labels += [IGNORE] * (len(asked) - len(labels)) + said[len(asked) :]
        ids = said
    return (ids, labels) if ids else None


def _templated(tokenizer: Any, messages: list[dict[str, Any]], **kwargs: Any) -> list[int]:
    return list(tokenizer.apply_chat_template(messages, return_dict=True, **kwargs)["input_ids"])


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

    def __init__(self, examples: Iterable[Example], length: int, pad_id: int) -> None:
        self.length, self.pad_id = length, pad_id
        self.blocks: list[list[Example]] = list(_first_fit(examples, length))
        if not self.blocks:
            raise DataError(_NO_TEXT)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return _block(self.blocks[index], self.length, self.pad_id)

    def batch(self, places: Iterable[int]) -> dict[str, Tensor]:
        """Several blocks as one batch [B, length]."""
        return default_collate([self[place] for place in places])

    def part(self, places: Iterable[int]) -> PackedBlocks:
        """Some of the blocks."""
        chosen = copy.copy(self)
        chosen.blocks = [self.blocks[place] for place in places]
        return chosen

    @property
    def labels(self) -> Tensor:
        """The tokens that carry a label, one after the other."""
        return torch.tensor(
            [label for block in self.blocks for _, labels in block for label in labels if label != IGNORE]
        )

    @property
    def trained_tokens(self) -> int:
        """How many tokens carry a label."""
        return sum(label != IGNORE for block in self.blocks for _, labels in block for label in labels)


class StreamedBlocks(IterableDataset):
    """As `PackedBlocks`, packed as the text comes: for more text than memory holds.

    Args:
        examples: makes the examples anew for each pass over them.
    """

    def __init__(self, examples: Callable[[], Iterable[Example]], length: int, pad_id: int) -> None:
        self.examples, self.length, self.pad_id = examples, length, pad_id

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        blocks = _first_fit(self.examples(), self.length)
        worker = get_worker_info()  # each worker of a data loader packs all, and gives its share
        chosen = blocks if worker is None else itertools.islice(blocks, worker.id, None, worker.num_workers)
        found = False
        for documents in chosen:
            found = True
            yield _block(documents, self.length, self.pad_id)
        if not found and worker is None:
            raise DataError(_NO_TEXT)


def _block(documents: list[Example], length: int, pad_id: int) -> dict[str, Tensor]:
    ids = [token for document, _ in documents for token in document]
    labels = [label for _, document in documents for label in document]
    positions = [place for document, _ in documents for place in range(len(document))]
    padding = length - len(ids)
    return {
        "input_ids": torch.tensor(ids + [pad_id] * padding),
        "labels": torch.tensor(labels + [IGNORE] * padding),
        "position_ids": torch.tensor(positions + list(range(padding))),
        "attention_mask": torch.tensor([1] * len(ids) + [0] * padding),
    }


def _first_fit(examples: Iterable[Example], length: int, open_blocks: int = 16) -> Iterator[list[Example]]:
    """Pack greedily into the first of a few open blocks that has room."""
    blocks: list[tuple[int, list[Example]]] = []
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


def examples_of(
    sources: Iterable[str | Path], tokenizer: PreTrainedTokenizerBase, length: int, split: str = "train"
) -> Iterator[Example]:
    """The usable records of data sources as (ids, labels), plain text in pieces of at most `length` tokens."""
    for source in sources:
        for record in records_of(source, split):
            made = example(tokenizer, record)
            if made is None:
                continue
            if "answer" in record or "messages" in record:
                yield made
                continue
            ids, _ = made
            for start in range(0, len(ids), length):
                piece = ids[start : start + length]
                yield piece, [IGNORE, *piece[1:]]
