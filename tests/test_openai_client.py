"""`nextn distill --server`: answers of another program, many at once, resumable."""

from __future__ import annotations

import json
import socket
import threading
from collections import Counter

import pytest
from typer.testing import CliRunner

from nextn import openai_client
from nextn.cli import app
from nextn.distill import distill_from
from nextn.openai_client import ChatServer, ServerError
from stand_in_server import LOST, ChatApi, completion, failure


def said(asked: dict) -> str:
    return asked["messages"][-1]["content"]


@pytest.fixture
def api(monkeypatch):
    """A server that repeats what it is asked."""
    monkeypatch.setattr(openai_client, "FIRST_WAIT", 0.001)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    made = ChatApi(lambda asked: completion(f"echo {said(asked)}"))
    yield made
    made.close()


@pytest.fixture
def distill(api, tmp_path):
    """Run `nextn distill --server` on some prompts; returns what it printed and the records of its file."""
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"

    def run(count: int, *words: object, fails: bool = False) -> tuple[str, list[dict]]:
        prompts.write_text("".join(json.dumps({"prompt": f"p{n}", "n": n}) + "\n" for n in range(count)))
        command = ["distill", "--server", api.url, "--prompts", prompts, "--out", out, *words]
        done = CliRunner().invoke(app, list(map(str, command)), env={"COLUMNS": "400", "NO_COLOR": "1"})
        assert done.exit_code == int(fails), done.output
        if fails:
            errors = [line for line in done.output.splitlines() if line.startswith("nextn:")]
            assert len(errors) == 1 and errors[0].endswith(".") and done.output.endswith(f"{errors[0]}\n"), done.output
        records = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
        return done.output, records

    return run


def test_every_prompt_is_answered_greedily_and_many_at_once(api, distill):
    gate = threading.Barrier(8, timeout=20)  # no answer comes before eight are asked for
    api.reply = lambda asked: (gate.wait(), completion(f"echo {said(asked)}", "length"))[1]
    output, records = distill(24, "--concurrency", 8, "--max-new-tokens", 77)
    assert sorted(record["n"] for record in records) == list(range(24)) and api.most == 8
    for record in records:
        echo = f"echo {record['prompt']}"
        assert record == record | {"answer": echo, "finish": "length", "model": "teacher"} and "tokens" not in record
    for asked in api.asked:
        assert asked["model"] == "teacher" and asked["temperature"] == 0 and asked["max_tokens"] == 77
    assert "teacher answers, at" in output


def test_what_is_answered_is_not_asked_again(api, tmp_path, distill):
    records = [{"prompt": f"p{n}", "n": n} for n in range(20)]
    cut = distill_from(ChatServer.connect(api.url), records, tmp_path / "answers.jsonl", concurrency=4)
    written = [next(cut) for _ in range(7)]
    cut.close()
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 7 == len(written)
    done = {json.loads(line)["prompt"] for line in (tmp_path / "answers.jsonl").read_text().splitlines()}
    api.asked.clear()
    _, answered = distill(20)
    assert sorted(record["n"] for record in answered) == list(range(20))
    assert not done & {said(asked) for asked in api.asked}
    output, _ = distill(20)
    assert "answers all 20 prompts: nothing is changed" in output and len(api.asked) == 13


@pytest.mark.parametrize("trouble", [failure(429, "busy"), failure(500, "oh"), failure(503, "busy"), LOST])
def test_a_server_in_trouble_is_asked_again_later(api, distill, trouble):
    seen: Counter[str] = Counter()

    def reply(asked):
        seen[said(asked)] += 1
        return completion("yes") if seen[said(asked)] > 3 else trouble

    api.reply = reply
    _, records = distill(5)
    assert len(records) == 5 and set(seen.values()) == {4}


def test_waits_grow_and_follow_what_the_server_says(api, distill, monkeypatch):
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(openai_client, "FIRST_WAIT", 1.0)
    monkeypatch.setattr(openai_client.asyncio, "sleep", sleep)
    api.reply = lambda asked: failure(503, "busy")
    output, _ = distill(1, fails=True)
    assert [2**n <= wait <= 1.5 * 2**n for n, wait in enumerate(waits)] == [True] * 5
    assert "asked 6 times, answers 503: busy" in output
    waits.clear()
    api.headers = {"Retry-After": "40"}
    distill(1, fails=True)
    assert waits == [40.0] * 5
    api.headers = {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}
    distill(1, fails=True)


def test_a_prompt_without_an_answer_stops_nothing_and_is_tried_again(api, distill):
    bad = {"p3": completion(None, "length"), "p4": failure(400, "too long"), "p5": completion("  "), "p6": (200, b"<>")}
    api.reply = lambda asked: bad.get(said(asked), completion("yes"))
    output, records = distill(12, "--concurrency", 2, fails=True)
    assert {record["n"] for record in records} == set(range(12)) - {3, 4, 5, 6}
    assert "4 of 12 prompts have no answer" in output and "the same command tries again" in output
    api.reply = lambda asked: completion("yes")
    assert len(distill(12)[1]) == 12


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (completion(None, "length"), "No prompt is answered any more: the server's answer has no text"),
        (
            failure(400, "Unknown parameter"),
            "No prompt is answered any more: the server answers 400: Unknown parameter",
        ),
        (failure(500, "out of memory"), "asked 6 times, answers 500: out of memory"),
        (failure(404, "The model does not exist."), "does not answer as teacher: The model does not exist."),
        (failure(401, "Expired"), "refuses requests without an API key (Expired)"),
        ((200, {"choices": []}), "the server sends no chat completion"),
    ],
)
def test_a_server_that_answers_nothing_ends_it_soon(api, distill, reply, message):
    api.reply = lambda asked: reply if said(asked) != "p0" else completion("yes")
    output, records = distill(100, "--concurrency", 3, fails=True)
    assert message in output and len(records) <= 1 and len({said(asked) for asked in api.asked}) < 12


def test_the_model_is_the_only_one_or_the_one_that_is_named(api, distill):
    assert "has no model student: name one of teacher." in distill(2, "--model", "student", fails=True)[0]
    api.models = ["a", "b"]
    assert "serves several models: name one of a, b." in distill(2, fails=True)[0]
    assert {record["model"] for record in distill(2, "--model", "b")[1]} == {"b"}
    api.models = None
    assert "lists no models: name one." in distill(3, fails=True)[0]
    assert {record["model"] for record in distill(3, "--model", "c")[1]} == {"b", "c"}


def test_the_key_comes_from_the_environment(api, distill, monkeypatch):
    api.key = "secret"
    assert "refuses requests without an API key" in distill(2, fails=True)[0]
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    output, _ = distill(2, fails=True)
    assert "refuses the API key (Incorrect API key)." in output and "wrong" not in output
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert len(distill(2)[1]) == 2


def test_a_server_that_is_not_there_is_one_sentence(api, distill):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    for address, message in ((url, "cannot be reached"), ("localhost:8000", "is no address of a server")):
        with pytest.raises(ServerError, match=message):
            ChatServer.connect(address)
    assert ChatServer.connect(f"{api.url}/v1/").url == ChatServer.connect(api.url).url == f"{api.url}/v1"


def test_options_of_the_other_way_are_refused(api, distill):
    for words, message in (
        (("--rows", 4), "--rows is of a model that runs here"),
        (("some/base",), "Give the model that answers, or --server; not both"),
    ):
        assert message in distill(1, *words, fails=True)[0]
