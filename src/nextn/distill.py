"""Training text from the base model's own answers (self-distillation, as in FastMTP, arXiv:2509.18362).

Heads draft for the base model, so what they should learn is the base model's own greedy text. Answers are appended as
they come: the same command goes on where it was killed.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterator
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from nextn.data import prompt_ids, read_jsonl
from nextn.decoding.engine import Engine

Prompt = tuple[dict[str, Any], list[int]]  # a record with a `prompt`, and that prompt as token ids


def encoded(tokenizer: Any, records: list[dict[str, Any]], context: int) -> list[Prompt]:
    """The records whose prompt leaves room for an answer in the model's context, with the prompt as token ids."""
    prompts = [(record, prompt_ids(tokenizer, record["prompt"])) for record in records]
    return [(record, ids) for record, ids in prompts if len(ids) < context]


def distill(
    engine: Engine, tokenizer: Any, prompts: list[Prompt], out: Path, max_new_tokens: int = 256
) -> Iterator[int]:
    """Answer each prompt greedily and append its record, with `answer`, its `tokens` and `finish`, to `out`.

    Yields:
        the number of tokens of each answer, once it is written.
    """
    order = like_lengths_together([len(ids) for _, ids in prompts], 8 * engine.rows)
    with out.open("a", encoding="utf-8") as file:
        for place, result in engine.generate([prompts[index][1] for index in order], max_new_tokens):
            answer = tokenizer.decode(result.tokens, skip_special_tokens=True)
            record = {**prompts[order[place]][0], "answer": answer, "finish": result.finish, "tokens": result.tokens}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
            yield len(result.tokens)


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
    return [record for record in prompts if record["prompt"] not in done]


def answered(out: Path) -> set[str]:
    """The prompts that a file already answers; a last line that a kill cut short is removed from it."""
    if not out.exists():
        return set()
    text = out.read_bytes()
    end = text.rfind(b"\n") + 1
    if text[end:]:
        try:
            json.loads(text[end:])
            with out.open("ab") as file:
                file.write(b"\n")
        except ValueError:
            os.truncate(out, end)
    return {record.get("prompt", "") for record in read_jsonl(out)} if out.stat().st_size else set()


def interleaved(prompts: list[dict[str, Any]], key: str = "category") -> list[dict[str, Any]]:
    """Prompts in turn from each category, so that any first part of them is an even mix."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in prompts:
        groups[record.get(key, "")].append(record)
    turns = zip_longest(*groups.values())
    return [record for record in chain.from_iterable(turns) if record is not None]
