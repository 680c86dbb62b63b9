"""Distilled answers are the model's own, and a run that was cut short goes on where it stood."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from conftest import greedy_reference, make_tokenizer
from nextn.data import prompt_ids
from nextn.decoding.engine import Engine
from nextn.distill import distill, encoded, interleaved, like_lengths_together, remaining
from nextn.trunk import Trunk

PROMPTS = [{"prompt": "abcdefghij"[:length], "category": "ab"[length % 2]} for length in range(1, 8)]


def test_answers_are_the_models_own_and_nothing_is_answered_twice(trained_host, tmp_path):
    tokenizer, out = make_tokenizer(), tmp_path / "answers.jsonl"
    engine = Engine(Trunk(trained_host), None, rows=3, stop_tokens=[2])
    cut = distill(engine, tokenizer, encoded(tokenizer, PROMPTS, 128), out, max_new_tokens=9)
    for _ in range(2):
        next(cut)
    cut.close()
    out.write_bytes(out.read_bytes() + b'{"prompt": "abc')  # a kill in the middle of a line
    todo = remaining(PROMPTS, out)
    assert len(todo) == len(PROMPTS) - 2
    list(distill(engine, tokenizer, encoded(tokenizer, todo, 128), out, max_new_tokens=9))

    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(record["prompt"] for record in records) == sorted(record["prompt"] for record in PROMPTS)
    for record in records:
        expected = greedy_reference(trained_host, prompt_ids(tokenizer, record["prompt"]), 9, stops=(2,))
        assert record["answer"] == tokenizer.decode(expected, skip_special_tokens=True)
        assert record["finish"] == ("stop" if expected[-1] == 2 else "length")
    assert remaining(PROMPTS, out) == []


def test_categories_take_turns():
    records = [{"category": name} for name in "aaabbc"]
    assert "".join(record["category"] for record in interleaved(records)) == "abcaba"


@given(st.lists(st.integers(1, 500)), st.integers(1, 64))
def test_like_lengths_are_a_permutation_within_windows(lengths, window):
    order = like_lengths_together(lengths, window)
    assert sorted(order) == list(range(len(lengths)))
    assert all(place // window == index // window for place, index in enumerate(order))
