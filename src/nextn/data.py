"""Text and prompts to packed blocks of token ids with labels; documents keep their borders."""

from __future__ import annotations

import copy
import csv
import functools
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, default_collate, get_worker_info
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from nextn.chat import chat_ids
from nextn.losses import IGNORE


class DataError(ValueError):
    """A data file that cannot be used; the message says why."""


_NO_TEXT = "{} has no usable text: expected records with `text`, with `prompt` and `answer`, or with `messages`."
_NO_TARGET = (
    "{} has nothing to predict within {} tokens (texts of one token, or prompts that are as long as a block): give "
    "longer text, or a larger length."
)
_PACKED = (".gz", ".zst", ".xz", ".bz2", ".zip", ".arrow", ".bin")  # no text to train on as it is
_ROLES = ("system", "developer", "user", "assistant", "tool")  # and those that a chat template names
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
        source: a file of JSON lines (`.jsonl`, `.json`), Parquet (`.parquet`) or comma- or tab-separated values with
            the names of the columns in the first line (`.csv`, `.tsv`), any other file as plain text, or the name of a
            dataset on the hub (`owner/name`, or `owner/name:config`).
        split: of a dataset on the hub.
        text_bytes: plain text comes in pieces of about so many bytes, cut at the ends of lines.

    Raises:
        DataError: where there is neither such a file nor such a dataset.
    """
    path = Path(source)
    if path.is_file() and path.suffix in (".jsonl", ".json"):
        yield from _json_lines(path)
    elif path.is_file() and path.suffix == ".parquet":
        yield from _parquet_rows(path)
    elif path.is_file() and path.suffix in (".csv", ".tsv"):
        yield from _csv_rows(path)
    elif path.is_file() and path.suffix in _PACKED:
        raise DataError(f"{path} is no plain text; give .jsonl, .parquet, .csv or text.")
    elif path.is_file():
        with path.open(encoding="utf-8", errors="replace") as lines:
            while piece := lines.readlines(text_bytes):
                yield {"text": "".join(piece)}
    elif str(source).count("/") == 1 and not str(source).startswith((".", "/")) and not path.suffix[1:].isalpha():
        name, _, config = str(source).partition(":")
        yield from _loaded(name, config or None, split)
    else:
        raise DataError(f"There is no data file {path}.")


def _csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a table as records of its cells that are not empty; a chat in `messages` is JSON."""
    csv.field_size_limit(2**31 - 1)  # the default ends a text at 131,072 characters
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
        rows = csv.DictReader(lines, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        try:
            columns = rows.fieldnames or []
            if not {"text", "answer", "messages"} & set(columns):
                raise DataError(
                    f"{path} has the columns {', '.join(columns) or '(none)'}; expected text, prompt and answer, or "
                    "messages in its first line."
                )
            for row in rows:
                if None in row:
                    raise DataError(f"{path}, line {rows.line_num}, has more cells than there are columns: quote it.")
                cells = {name: cell for name, cell in row.items() if cell}
                if "messages" in cells:
                    cells["messages"] = json.loads(cells["messages"])
                yield cells
        except (csv.Error, json.JSONDecodeError) as error:
            raise DataError(f"{path}, line {rows.line_num}, cannot be read: {error}.") from None


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise DataError(f"{path} is read by pyarrow: pip install 'nextn[parquet]'.") from None
    try:
        with parquet.ParquetFile(path) as table:
            for rows in table.iter_batches(batch_size=1024):
                yield from rows.to_pylist()
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {_first_line(error)}.") from None


def _loaded(name: str, config: str | None, split: str) -> Iterator[dict[str, Any]]:
    """The records of a dataset of the hub, streamed by the `datasets` library."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError(f"{name} is read by the datasets library: pip install 'nextn[eval]'.") from None
    try:
        yield from load_dataset(name, config, split=split, streaming=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"The dataset {name} cannot be read: {_first_line(error)}.") from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


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


def is_byte_tokenizer(tokenizer: Any) -> bool:
    """Whether each token of a tokenizer, special ones left out, is one of the 256 bytes."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or len(tokenizer) > 512:
        return False
    tokens = tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens)
    return len(tokens) == 256 and all(len(token) == 1 for token in tokens)


def read_prompts(path: str | Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file that have a `prompt`.

    Raises:
        DataError: where none has.
    """
    records = [record for record in read_jsonl(path) if isinstance(record.get("prompt"), str) and record["prompt"]]
    if not records:
        raise DataError(f"{path} has no record with a `prompt`.")
    return records


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """A user's prompt as token ids: through the chat template where there is one, else as it is."""
    if tokenizer.chat_template:
        message = [{"role": "user", "content": prompt}]
        return chat_ids(tokenizer, message, add_generation_prompt=True)
    return list(tokenizer(prompt)["input_ids"])


class TextStream:
    """Token ids to text as they come; a character that takes several tokens appears with the last of them.

    The pieces, that of `flush` included, make up what `tokenizer.decode` gives for all tokens without the special ones;
    only where bytes of a broken character follow those of a whole one, a decoder with byte fallback shows neither.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        # First tokens whose text is complete and shown: the context of the others: a decoder may strip a first space.
        # Then those whose text may still change.
        self._ids: list[int] = []
        self._shown, self._context = "", 0

    def push(self, token: int) -> str:
        """The text that `token` completes; may be empty."""
        self._ids.append(token)
        text = self._decoded()
        if len(text) <= len(self._shown) or text.endswith("\ufffd"):  # perhaps the first bytes of a character
            return ""
        piece = text[len(self._shown) :]
        self._ids, self._context = self._ids[self._context :], len(self._ids) - self._context
        self._shown = self._decoded()
        return piece

    def flush(self) -> str:
        """The text of what is left when no more tokens come: a character that was cut, as `decode` shows it."""
        piece = self._decoded()[len(self._shown) :]
        self._ids, self._shown, self._context = [], "", 0
        return piece

    def _decoded(self) -> str:
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def example(tokenizer: Any, record: dict[str, Any]) -> Example | None:
    """One record as (ids, labels); None where it holds no usable text.

    `{"messages"}` (a chat, with `role` and `content`) trains on what the assistant says in answer to something;
    `{"prompt", "answer"}` on the answer, its end included unless `finish` says that it was cut (`tokens`, where
    `distill` wrote them, are the answer as it was emitted); `{"text"}` on all of it. An answer may have a `system`
    message, and `messages` in place of a `prompt`. Answers end as the chat template ends a turn of the assistant, or
    without one, with the tokenizer's end token.

    Raises:
        DataError: for a chat that cannot be read.
    """
    answer, text, messages = record.get("answer"), record.get("text"), record.get("messages")
    has_question = _asks(messages) if isinstance(messages, list) else isinstance(record.get("prompt"), str)
    if has_question and isinstance(answer, str) and answer:
        head, tail = question_ids(tokenizer, record), _answer_ids(tokenizer, record)
        return head + tail, [IGNORE] * len(head) + tail
    if isinstance(messages, list):
        return _chat(tokenizer, messages)
    if isinstance(text, str) and text.strip():
        ids = list(tokenizer(text)["input_ids"])
        return ids, [IGNORE, *ids[1:]]  # nothing predicts a text's first token
    return None


def question_ids(tokenizer: Any, record: dict[str, Any]) -> list[int]:
    """What a record asks as token ids, up to where the answer begins: its `prompt` or `messages`, after its `system`.

    Raises:
        DataError: for a chat that cannot be answered.
        ChatTemplateError: where the template refuses the chat.
    """
    system, chat = record.get("system") or None, record.get("messages")
    if system is None and not isinstance(chat, list):
        return prompt_ids(tokenizer, record["prompt"])
    chat = chat if isinstance(chat, list) else [{"role": "user", "content": record["prompt"]}]
    if system is not None and any(isinstance(message, dict) and message.get("role") == "system" for message in chat):
        raise DataError("The chat has a system message of its own: leave the other one out.")
    return answerable_ids(tokenizer, chat if system is None else [{"role": "system", "content": system}, *chat])


def answerable_ids(tokenizer: Any, messages: list[Any]) -> list[int]:
    """A chat as token ids, up to where the assistant's answer begins.

    Raises:
        DataError: for a tokenizer without a chat template, or a chat that has no question at its end.
        ChatTemplateError: where the template refuses the chat.
    """
    check_chats(tokenizer)
    messages = checked_chat(tokenizer, messages)
    if not _asks(messages):
        raise DataError("The chat ends with the assistant; nothing is left to answer.")
    if not str(messages[-1]["content"]).strip():
        raise DataError("The last message is empty: give some text.")
    return chat_ids(tokenizer, messages, add_generation_prompt=True)


def check_chats(tokenizer: Any) -> None:
    """Refuse a tokenizer that reads no chats.

    Raises:
        DataError: where it has no chat template.
    """
    if not tokenizer.chat_template:
        raise DataError(
            f"{tokenizer.name_or_path or 'The tokenizer'} has no chat template, so that chats and system messages "
            "cannot be read: give a plain prompt."
        )


def _asks(messages: list[Any]) -> bool:
    """Whether a chat ends with something to answer."""
    return bool(messages) and isinstance(messages[-1], dict) and messages[-1].get("role") != "assistant"


def _chat(tokenizer: Any, messages: list[dict[str, Any]]) -> Example | None:
    """A chat, with labels on what the assistant says, its end token included; None where it answers nothing.

    A chat may begin with the assistant: there is no prompt for what it says first, which is read and not trained on.
    """
    if not tokenizer.chat_template:
        raise DataError(f"{tokenizer.name_or_path or 'The tokenizer'} has no chat template, but the data has messages.")
    messages = checked_chat(tokenizer, messages)
    after = len(_end_of_turn(tokenizer)[1])
    ids: list[int] = []
    labels: list[int] = []
    for place, message in enumerate(messages):
        if message["role"] != "assistant" or place == 0:
            continue
        asked = chat_ids(tokenizer, messages[:place], add_generation_prompt=True)
        said = chat_ids(tokenizer, messages[: place + 1])
        if asked[: len(ids)] != ids or said[: len(asked)] != asked:
            raise DataError("The chat template rewrites earlier turns, so that no answer can be told from its chat.")
        end = max(len(asked), len(said) - after)
        labels += [IGNORE] * (len(asked) - len(labels)) + said[len(asked) : end] + [IGNORE] * (len(said) - end)
        ids = said
    if not ids:
        return None
    end = len(ids) - after
    return ids[:end], labels[:end]


def checked_chat(tokenizer: Any, messages: list[Any]) -> list[dict[str, Any]]:
    """A chat that a template can read, with contents in parts of text joined: many templates would print the list.

    Raises:
        DataError: for what a template would misread, with the number of the message, counted from 1.
    """
    checked = []
    for number, message in enumerate(messages, start=1):
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str):
            raise DataError(f"message {number} has no role; expected objects with role and content.")
        if role not in _ROLES and role not in str(tokenizer.chat_template):
            raise DataError(f"message {number} has the role {role!r}; expected one of {', '.join(_ROLES)}.")
        content = message.get("content")
        if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            content = "".join(str(part.get("text", "")) for part in content)
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise DataError(f"the content of message {number} is no text.")
        checked.append(message | {"content": content})
    return checked


def _end_of_turn(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that end what the assistant says, and those that the chat template puts after them (a newline)."""
    return _template_end(tokenizer, str(tokenizer.chat_template), tokenizer.eos_token_id)


@functools.lru_cache(maxsize=1)
def _template_end(tokenizer: Any, template: str, eos: int | None) -> tuple[list[int], list[int]]:
    """`_end_of_turn`, found once for a template."""
    otherwise: list[int] = [] if eos is None else [eos]
    if not tokenizer.chat_template:
        return otherwise, []
    # What two chats end with that differ in what the assistant says.
    first, second = (
        chat_ids(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": content}])
        for content in ("a", "b")
    )
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(reversed(first), reversed(second), strict=False))
    end = [token for token, _ in same][::-1]
    special = [place for place, token in enumerate(end) if token in _special_ids(tokenizer)]
    if first == second or not special:  # no template of which an end can be known
        return otherwise, []
    return end[: special[0] + 1], end[special[0] + 1 :]


def _special_ids(tokenizer: Any) -> set[int]:
    added = {token for token, known in tokenizer.added_tokens_decoder.items() if known.special}
    return added | set(tokenizer.all_special_ids)


def _answer_ids(tokenizer: Any, record: dict[str, Any]) -> list[int]:
    """An answer as the model emitted it, its own end token included, where the record has such `tokens`.

    Else, or where they are another tokenizer's, the answer's text and the end of a turn.
    """
    answer: str = record["answer"]
    tokens: Any = record.get("tokens")
    known = isinstance(tokens, list) and all(isinstance(id, int) and 0 <= id < len(tokenizer) for id in tokens)
    if known and tokenizer.decode(tokens, skip_special_tokens=True) == answer:
        return list(tokens)
    ids = list(tokenizer(answer, add_special_tokens=False)["input_ids"])
    return ids + _end_of_turn(tokenizer)[0] if record.get("finish", "stop") == "stop" else ids


def check_ids(ids: Sequence[int], vocab_size: int) -> None:
    """Refuse token ids that a model does not have.

    Raises:
        DataError: where one is not below `vocab_size`.
    """
    if ids and max(ids) >= vocab_size:
        raise DataError(
            f"The tokenizer gives token {max(ids)}, but the model's vocabulary has {vocab_size}, counted from 0; a "
            "token was added to the tokenizer alone: resize the model's embeddings and train them, or remove the token."
        )


class PackedBlocks(Dataset):
    """Examples packed one after the other into blocks of `length` tokens.

    An example longer than a block is cut. Each item has `input_ids`, `labels` and `position_ids` [length]; positions
    start at 0 in each document, which is how a document's border is known; padding has label -100 and
    `attention_mask` 0.
    """

    def __init__(self, examples: Iterable[Example], length: int, pad_id: int) -> None:
        self.length, self.pad_id = length, pad_id
        self.left_out = 0  # examples without a target in their first `length` tokens
        self.blocks: list[list[Example]] = list(_first_fit(self._counted(examples), length))
        if not self.blocks:
            raise DataError(_NO_TARGET.format("The data", length) if self.left_out else _NO_TEXT.format("The data"))

    def _counted(self, examples: Iterable[Example]) -> Iterator[Example]:
        for ids, labels in examples:
            self.left_out += not reach((ids, labels), self.length)
            yield ids, labels

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
    def documents(self) -> Iterator[Example]:
        """The examples, block by block."""
        return itertools.chain.from_iterable(self.blocks)

    def check_tokens(self, vocab_size: int) -> None:
        """Refuse tokens that a model with so many does not have.

        Raises:
            DataError: where there is one.
        """
        for ids, _ in self.documents:
            check_ids(ids, vocab_size)

    def prompts(self, count: int, most: int = 32) -> list[list[int]]:
        """Prompts from documents all over the text: up to their first label, or the start of text without prompts.

        Args:
            count: how many, at most; documents of fewer than 8 tokens are left out.
            most: tokens of the start of a text without prompts.
        """
        prompts = []
        for ids, labels in self.documents:
            first = next((index for index, label in enumerate(labels) if label != IGNORE), 0)
            if len(ids) >= 8:
                prompts.append(ids[: first if first > 1 else min(most, len(ids) // 2)])
        return [prompts[index * len(prompts) // count] for index in range(count)] if len(prompts) > count else prompts

    @property
    def labels(self) -> Tensor:
        """The tokens that carry a label, one after the other."""
        return torch.tensor([label for _, labels in self.documents for label in labels if label != IGNORE])

    @property
    def trained_tokens(self) -> int:
        """How many tokens carry a label."""
        return sum(label != IGNORE for _, labels in self.documents for label in labels)


class StreamedBlocks(IterableDataset):
    """As `PackedBlocks`, packed as the text comes: for more text than memory holds.

    Args:
        examples: makes the examples anew for each pass over them.
    """

    def __init__(self, examples: Callable[[], Iterable[Example]], length: int, pad_id: int) -> None:
        self.examples, self.length, self.pad_id = examples, length, pad_id
        self.vocab_size: int | None = None

    def check_tokens(self, vocab_size: int) -> None:
        """Refuse tokens that a model with so many does not have, as the text comes.

        Raises:
            DataError: now, where the first block has one; later ones are checked when they are read.
        """
        self.vocab_size = vocab_size
        next(iter(self), None)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        blocks = _first_fit(self.examples(), self.length)
        worker = get_worker_info()  # each worker of a data loader packs all, and gives its share
        chosen = blocks if worker is None else itertools.islice(blocks, worker.id, None, worker.num_workers)
        found = False
        for documents in chosen:
            found = True
            if self.vocab_size is not None:
                for ids, _ in documents:
                    check_ids(ids, self.vocab_size)
            yield _block(documents, self.length, self.pad_id)
        if not found and worker is None:
            raise DataError(_NO_TEXT.format("The data"))


def reach(document: Example, length: int) -> int:
    """The deepest k for which some token of a document, cut to `length` tokens, has a target t+k; 0 for none."""
    labels = document[1][:length]
    return next((place for place in range(len(labels) - 1, 0, -1) if labels[place] != IGNORE), 0)


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


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Say which record an error is of.

    Raises:
        DataError: in place of any error: chat templates and tokenizers raise whatever they like.
    """
    try:
        yield
    except Exception as error:
        raise DataError(f"{where}: {_first_line(error)}.") from None


def examples_of(
    sources: Iterable[str | Path], tokenizer: PreTrainedTokenizerBase, length: int, split: str = "train"
) -> Iterator[Example]:
    """The usable records of data sources as (ids, labels), plain text in pieces of at most `length` tokens.

    Raises:
        DataError: for a record that cannot be read, with its number, counted from 1, and for a source without usable
            text or without a target.
    """
    for source in sources:
        found = usable = False
        for made in _pieces(source, tokenizer, length, split):
            found, usable = True, usable or reach(made, length) > 0
            yield made
        if not usable:
            raise DataError(_NO_TARGET.format(source, length) if found else _NO_TEXT.format(source))


def _pieces(source: str | Path, tokenizer: PreTrainedTokenizerBase, length: int, split: str) -> Iterator[Example]:
    """The usable records of one source."""
    for number, record in enumerate(records_of(source, split), start=1):
        with naming(f"{source}, record {number}"):
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
