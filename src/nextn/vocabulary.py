"""Which tokens a trimmed output keeps: the most frequent of a text, of a domain or a language, or a list."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nextn.data import DataError, check_ids, example, naming, records_of
from nextn.losses import IGNORE


def most_frequent(counts: Tensor, size: int, always: Iterable[int] = (), never: Iterable[int] = ()) -> Tensor:
    """The `size` tokens of the highest counts [V], those of `always` first and those of `never` last; sorted [size]."""
    counts = counts.clone()
    counts[torch.tensor(list(never), dtype=torch.long)] = -1
    counts[torch.tensor(list(always), dtype=torch.long)] = counts.max() + 1
    # A stable sort: ties, unseen tokens among them, go to the lower id, in byte-pair vocabularies the more frequent.
    return counts.argsort(descending=True, stable=True)[:size].sort().values


def counted(
    sources: Iterable[str | Path], tokenizer: PreTrainedTokenizerBase, vocab_size: int, category: str | None = None
) -> Tensor:
    """How often each token is a target in some data [V]; see `nextn.data` for what data can be.

    Args:
        category: count only records whose `category` this is.

    Raises:
        DataError: where nothing is to be counted, or a token is not below `vocab_size`.
    """
    counts = torch.zeros(vocab_size, dtype=torch.long)
    for labels in _labels(sources, tokenizer, vocab_size, category):
        counts += torch.bincount(labels, minlength=vocab_size)
    if not counts.any():
        of = f" of category {category}" if category else ""
        raise DataError(f"{', '.join(map(str, sources))}: there is no text{of} to count tokens in.")
    return counts


def _labels(
    sources: Iterable[str | Path], tokenizer: PreTrainedTokenizerBase, vocab_size: int, category: str | None
) -> Iterator[Tensor]:
    for source in sources:
        for number, record in enumerate(records_of(source), start=1):
            if category is None or record.get("category") == category:
                with naming(f"{source}, record {number}"):
                    _, labels = example(tokenizer, record) or ([], [])
                check_ids(labels, vocab_size)
                yield torch.tensor([label for label in labels if label != IGNORE], dtype=torch.long)


def coverage(counts: Tensor, kept: Tensor) -> float:
    """The share of a text, as token counts [V], that kept tokens make."""
    return (counts[kept.long()].sum() / counts.sum()).item()


def listed(path: str | Path, vocab_size: int) -> Tensor:
    """Token ids from a JSON list; sorted.

    Raises:
        DataError: for anything else, or ids that the vocabulary does not have.
    """
    try:
        ids = json.loads(Path(path).read_text())
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError:
        ids = None
    if not isinstance(ids, list) or not ids or not all(type(token) is int for token in ids):
        raise DataError(f"{path} is not a JSON list of token ids.")
    if strange := [token for token in ids if not 0 <= token < vocab_size]:
        raise DataError(f"{path} names token {strange[0]}, but the vocabulary has {vocab_size}, counted from 0.")
    return torch.tensor(sorted(set(ids)))


def foreign_to(scripts: Iterable[str], tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[int]:
    """The tokens with a letter of another script than these, as Unicode calls them: latin, cyrillic, cjk, hangul, …

    Digits, marks and spaces belong to every script, and so do pieces of a character, which are told by frequency alone.

    Raises:
        DataError: for a script that no token has.
    """
    texts = tokenizer.batch_decode([[token] for token in range(min(vocab_size, len(tokenizer)))])
    scripts_of = [{_script(letter) for letter in text if letter.isalpha()} for text in texts]
    known = {script.upper() for script in scripts}
    if strange := known - set().union(*scripts_of):
        raise DataError(f"No token has letters of the script {strange.pop().lower()}; scripts are latin, cyrillic, …")
    return [token for token, found in enumerate(scripts_of) if not found <= known]


def _script(letter: str) -> str:
    """The first word of its name in Unicode, such as LATIN; of a piece of a character, nothing."""
    return unicodedata.name(letter, "").split(" ")[0]
