"""Distilled answers are the model's own, and a run that was cut short goes on where it stood."""

from __future__ import annotations

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import greedy_reference, make_tokenizer
from nextn.data import DataError, prompt_ids
from nextn.decoding.engine import Engine
from nextn.decoding.rows import DecodingError
from nextn.distill import answered, distill, encoded, interleaved, like_lengths_together, remaining
from nextn.lock import FileLock, LockedError
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


def answer(prompt: str, **more) -> str:
    return json.dumps({"prompt": prompt, "answer": "x", "finish": "stop", "tokens": [5]} | more) + "\n"


@pytest.fixture
def answering(trained_host):
    """Run `distill` to its end on a file."""
    tokenizer = make_tokenizer()
    engine = Engine(Trunk(trained_host), None, rows=1, stop_tokens=[2])

    def run(out: Path, records=PROMPTS) -> list[dict]:
        list(distill(engine, tokenizer, encoded(tokenizer, remaining(records, out), 128), out, max_new_tokens=4))
        return [json.loads(line) for line in out.read_text().splitlines() if line]

    run.engine = engine
    return run


@pytest.mark.parametrize(
    "content",
    [
        bytes(range(256)) * 300,
        b"\x00" * 5000,
        b"no newline at all",
        b"a text\nof lines\n",
        b'{"prompt": "abc", "category": "a"}\n',
        b'{"prompt": "abc", "answer": "others wrote this"}\n',
        b'{"prompt": "abc", "ans',
        b"[" * 100_000,
        answer("abc").encode() + b"\xff\xfe binary\n" + answer("abcd").encode(),
        answer("abc").encode() + b'{"text": "a"}\n',
    ],
    ids=range(10),
)
def test_a_file_of_others_is_refused_and_left_as_it_is(answering, tmp_path, content):
    out = tmp_path / "file"
    out.write_bytes(content)
    for run in (answering, answered):
        with pytest.raises(DataError, match=r"line \d, is no answer that nextn distill wrote"):
            run(out)
    assert out.read_bytes() == content and [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there are no devices here")
def test_devices_pipes_and_directories_are_refused(answering, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    for out in (Path("/dev/full"), Path("/dev/zero"), tmp_path / "pipe", tmp_path / "link", tmp_path):
        with pytest.raises(DataError, match="is no ordinary file"):
            remaining(PROMPTS, out)


@pytest.mark.parametrize("rest", ["", '{"prompt": "abc', '{"prompt": "abc"}', "\0\0\0", answer("ab")[:-1]])
def test_only_the_last_line_is_repaired_and_only_when_answers_are_written(answering, tmp_path, rest):
    out = tmp_path / "answers.jsonl"
    out.write_text(answer("a") + "\n" + answer("abc") + rest)
    before = out.read_bytes()
    done = {"a", "abc"} | ({"ab"} if rest.startswith('{"prompt": "ab",') else set())
    assert answered(out) == done and out.read_bytes() == before
    answering(out, [{"prompt": "abcd"}])
    lines = [line for line in out.read_text().splitlines() if line]
    assert [json.loads(line)["prompt"] for line in lines] == [*sorted(done, key=["a", "abc", "ab"].index), "abcd"]


def test_a_full_disk_ends_with_a_sentence_and_whole_answers(answering, tmp_path):
    resource = pytest.importorskip("resource")
    out = tmp_path / "answers.jsonl"
    first = answering(out, PROMPTS[:2])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (out.stat().st_size + 20, hard))  # as a disk with 20 bytes left
    try:
        with pytest.raises(DataError, match=r"cannot be written .*; the answers that it holds are whole"):
            answering(out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert [json.loads(line) for line in out.read_text().splitlines()] == first
    assert len(answering(out)) == len(PROMPTS)


def test_a_prompt_without_an_answer_is_reported_and_tried_again(answering, tmp_path, monkeypatch):
    out, admit = tmp_path / "answers.jsonl", answering.engine.admit

    def refuse(waiting):
        for row in list(waiting):
            if len(row.result.prompt) == 3:
                row.fail(DecodingError("no memory"))
        return admit(waiting)

    monkeypatch.setattr(answering.engine, "admit", refuse)
    with pytest.raises(DataError, match=r"1 of 7 prompts have no answer \(no memory\)"):
        answering(out)
    assert [record["prompt"] for record in remaining(PROMPTS, out)] == ["abc"]
    monkeypatch.undo()
    assert len(answering(out)) == len(PROMPTS)


def test_half_a_character_in_a_record_ends_nothing(answering, tmp_path):
    out = tmp_path / "answers.jsonl"
    records = [{"prompt": "abc", "note": "\ud83d"}, {"prompt": "ab", "note": "ü"}]
    assert sorted(record["note"] for record in answering(out, records)) == ["ü", "\ud83d"]
    assert "ü" in out.read_text() and remaining(records, out) == []


def test_two_distills_on_one_file_are_refused(answering, tmp_path):
    out = tmp_path / "answers.jsonl"
    cut = distill(answering.engine, make_tokenizer(), [(PROMPTS[0], [5])], out, 4)
    next(cut)
    with ThreadPoolExecutor() as pool, pytest.raises(LockedError, match="in use by another thread"):
        pool.submit(list, distill(answering.engine, make_tokenizer(), [(PROMPTS[1], [5])], out, 4)).result()
    cut.close()
    assert not out.with_name("answers.jsonl.lock").exists()
    with FileLock(out) as lock:
        content = json.loads(lock.path.read_text()) | {"host": "elsewhere"}
    lock.path.write_text(json.dumps(content))
    with pytest.raises(LockedError, match="on elsewhere"):
        answering(out)


def test_categories_take_turns():
    records = [{"category": name} for name in "aaabbc"]
    assert "".join(record["category"] for record in interleaved(records)) == "abcaba"


@given(st.lists(st.integers(1, 500)), st.integers(1, 64))
def test_like_lengths_are_a_permutation_within_windows(lengths, window):
    order = like_lengths_together(lengths, window)
    assert sorted(order) == list(range(len(lengths)))
    assert all(place // window == index // window for place, index in enumerate(order))


def test_answers_end_with_the_context(trained_host, tmp_path, monkeypatch):
    tokenizer, out = make_tokenizer(), tmp_path / "answers.jsonl"
    engine = Engine(Trunk(trained_host), None, rows=3)
    monkeypatch.setattr(trained_host.config, "max_position_embeddings", 12)
    prompts = encoded(tokenizer, PROMPTS, 12)
    list(distill(engine, tokenizer, prompts, out, max_new_tokens=8))
    lengths = {record["prompt"]: len(ids) for record, ids in prompts}
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert {len(record["tokens"]) < 8 for record in records} == {True, False}
    for record in records:
        assert len(record["tokens"]) == min(8, 12 - lengths[record["prompt"]]) and record["finish"] == "length"
