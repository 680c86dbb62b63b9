"""Training text from the base model's own answers (self-distillation, as in FastMTP, arXiv:2509.18362).

Heads draft for the base model, so what they should learn is the base model's own greedy text. Answers are appended as
they come: the same command goes on where it was killed. The same goes for the answers of a server, which are another
model's unless it serves the base itself, and for those of `nextn generate --prompts`.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from io import FileIO
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from nextn.data import DataError, naming, question_ids
from nextn.decoding.engine import Engine
from nextn.decoding.rows import Generation
from nextn.decoding.sampling import GREEDY, Sampling
from nextn.lock import FileLock
from nextn.openai_client import ChatServer, Completion
from nextn.prompts import question_of

LONGEST_LINE = 2**26  # bytes; no answer takes as many

Prompt = tuple[dict[str, Any], list[int]]  # a record with a `prompt`, and that prompt as token ids


def encoded(tokenizer: Any, records: list[dict[str, Any]], context: int) -> list[Prompt]:
    """The records whose prompt leaves room for an answer in the model's context, with the prompt as token ids.

    Raises:
        DataError: for a prompt that the tokenizer or its chat template cannot read.
    """
    prompts = []
    for record in records:
        with naming(f"The prompt {str(question_of(record))[:40]!r}"):
            prompts.append((record, question_ids(tokenizer, record)))
    return [(record, ids) for record, ids in prompts if len(ids) < context]


def distill(
    engine: Engine,
    tokenizer: Any,
    prompts: list[Prompt],
    out: Path,
    max_new_tokens: int = 256,
    sampling: Sequence[Sampling] | None = None,
) -> Iterator[Generation]:
    """Answer each prompt and append its record, with `answer`, its `tokens` and `finish`, to `out`.

    Answers end where the model's context does: what a model writes past it is not what it was trained to write.

    Args:
        sampling: how the tokens of each answer are chosen; default: greedily.

    Yields:
        each answer, once it is written.

    Raises:
        DataError, LockedError: see `append_answers`.
    """
    order = like_lengths_together([len(ids) for _, ids in prompts], 8 * engine.rows)
    limits = [min(max_new_tokens, engine.trunk.max_length - len(prompts[index][1])) for index in order]
    chosen = GREEDY if sampling is None else [sampling[index] for index in order]
    written: list[Generation] = []

    def answers() -> Generator[tuple[int, dict[str, Any] | Exception]]:
        ids = [prompts[index][1] for index in order]
        for position, result in engine.generate(ids, limits, sampling=chosen):
            if result.error is None:
                written.append(result)
                text = tokenizer.decode(result.tokens, skip_special_tokens=True)
                yield order[position], {"answer": text, "finish": result.finish, "tokens": result.tokens}
            else:
                yield order[position], result.error

    for _ in append_answers([record for record, _ in prompts], answers(), out):
        yield written.pop()


def distill_from(
    server: ChatServer,
    records: list[dict[str, Any]],
    out: Path,
    max_new_tokens: int = 256,
    concurrency: int = 32,
) -> Iterator[Completion]:
    """Have a server answer each prompt greedily and append its record, with `answer`, `finish` and `model`, to `out`.

    Args:
        concurrency: how many prompts are asked at once.

    Yields:
        each answer, once it is written.

    Raises:
        ServerError: see `ChatServer.complete`. Answers that were written stay.
        DataError, LockedError: see `append_answers`.
    """
    chats = [[{"role": "user", "content": record["prompt"]}] for record in records]
    written: list[Completion] = []

    def answers() -> Generator[tuple[int, dict[str, Any] | Exception]]:
        with closing(server.complete(chats, max_new_tokens, concurrency)) as completions:
            for index, result in completions:
                if isinstance(result, Completion):
                    written.append(result)
                    yield index, {"answer": result.text, "finish": result.finish, "model": server.model}
                else:
                    yield index, result

    for _ in append_answers(records, answers(), out):
        yield written.pop()


def append_answers(
    records: list[dict[str, Any]], answers: Generator[tuple[int, dict[str, Any] | Exception]], out: Path
) -> Iterator[int]:
    """Append records to a file as their answers come.

    Args:
        answers: the place of a record, and what to add to it: `answer` and `finish` at least, or why there is none.

    Yields:
        the place of each record, once it is written.

    Raises:
        DataError: where `out` holds anything but answers or cannot be written, such as on a full disk, or, at the
            end, where prompts could not be answered. Answers that were written stay.
        LockedError: where another process writes to `out`.
    """
    failed: list[Exception] = []
    with FileLock(out), closing(answers):
        repair(out)
        with out.open("ab", buffering=0) as file:
            for place, answer in answers:
                if isinstance(answer, Exception):
                    failed.append(answer)
                    continue
                _append(file, _line(records[place] | answer), out)
                yield place
    if failed:
        reason = str(failed[0]).rstrip(".")
        raise DataError(
            f"{len(failed)} of {len(records)} prompts have no answer ({reason}); the same command tries again."
        )


def _line(record: dict[str, Any]) -> bytes:
    try:
        return json.dumps(record, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can escape and UTF-8 cannot hold
        return json.dumps(record).encode() + b"\n"


def _append(file: FileIO, line: bytes, out: Path) -> None:
    """Append a line as a whole, or leave the file as it was."""
    end, rest = os.fstat(file.fileno()).st_size, memoryview(line)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError as error:
        file.truncate(end)
        raise DataError(
            f"{out} cannot be written ({error.strerror}); the answers that it holds are whole, and the same command "
            "resumes after them."
        ) from None


def like_lengths_together(lengths: list[int], window: int) -> list[int]:
    """An order of prompts in which neighbours have similar lengths: a step costs what its longest row costs.

    Sorted within windows, up and down in turn, so that the mix of the whole order stays.
    """
    order: list[int] = []
    for start in range(0, len(lengths), window):
        places = range(start, min(start + window, len(lengths)))
        order += sorted(places, key=lambda place: lengths[place], reverse=start // window % 2 == 1)
    return order


def remaining(prompts: list[dict[str, Any]], out: Path) -> list[dict[str, Any]]:
    """The prompts that `out` does not answer yet."""
    done = answered(out)
    return [record for record in prompts if question_of(record) not in done]


def answered(out: Path) -> set[str]:
    """The prompts that a file already answers, see `question_of`.

    Raises:
        DataError: for what is no file, or holds anything but answers that `distill` wrote.
    """
    return _read(out)[0]


def repair(out: Path) -> None:
    """End a file of answers with a whole line: complete the last one, or remove what a kill left of it.

    Raises:
        DataError: see `answered`.
    """
    _, whole, rest = _read(out)
    if _prompt_of(rest) is not None:  # only the end of the line is missing
        with out.open("ab") as file:
            file.write(b"\n")
    elif rest:
        os.truncate(out, whole)


def _read(out: Path) -> tuple[set[str], int, bytes]:
    """The prompts that a file answers, how many bytes its whole lines take, and what is left after them."""
    if not out.exists():
        return set(), 0, b""
    if not out.is_file():
        raise DataError(f"{out} is no ordinary file; answers are appended to one, so name another.")
    done: set[str] = set()
    whole, number, rest = 0, 0, b""
    try:
        with out.open("rb") as file:
            while line := file.readline(LONGEST_LINE):
                number += 1
                prompt = _prompt_of(line)
                if line.endswith(b"\n") and (prompt is not None or not line.strip()):
                    whole += len(line)
                elif (done or prompt is not None) and len(line) < LONGEST_LINE and not line.endswith(b"\n"):
                    rest = line
                else:
                    raise DataError(
                        f"{out}, line {number}, is no answer that nextn distill wrote; nothing is appended to other "
                        "files, so name another."
                    )
                if prompt is not None:
                    done.add(prompt)
    except OSError as error:
        raise DataError(f"{out} cannot be read: {error.strerror}.") from None
    if not os.access(out, os.W_OK):
        raise DataError(f"{out} cannot be written to: permission denied.")
    return done, whole, rest


def _prompt_of(line: bytes) -> str | None:
    """The prompt of an answer as `distill` writes it; None for any other line."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(record, dict) and isinstance(record.get("answer"), str) and "finish" in record
    return question_of(record) if whole else None


def interleaved(prompts: list[dict[str, Any]], key: str = "category") -> list[dict[str, Any]]:
    """Prompts in turn from each category, so that any first part of them is an even mix."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in prompts:
        groups[record.get(key, "")].append(record)
    turns = zip_longest(*groups.values())
    return [record for record in chain.from_iterable(turns) if record is not None]
