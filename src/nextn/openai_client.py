"""Answers of a server with OpenAI's chat API (vLLM, SGLang, llama-server and others), many at once."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx2

TRIES = 6
FIRST_WAIT, LONGEST_WAIT = 1.0, 300.0  # seconds before a request is sent again; doubled each time
TIMEOUT = httpx2.Timeout(600.0, connect=20.0, pool=None)  # a long answer may take minutes


class ServerError(ValueError):
    """A server that cannot be used; the message says why."""


class NoAnswerError(ValueError):
    """A chat that a server does not answer; the message says why."""


@dataclass(frozen=True)
class Completion:
    """An answer.

    finish: as the server says: `stop`, `length` or another word of its own.
    num_tokens: as the server counts them; 0 where it does not.
    """

    text: str
    finish: str
    num_tokens: int


@dataclass(frozen=True)
class ChatServer:
    """A model behind a server; `connect` makes one that is known to answer."""

    url: str
    model: str
    key: str | None = None

    @classmethod
    def connect(cls, url: str, model: str | None = None, key: str | None = None) -> ChatServer:
        """Ask a server for its models and choose one.

        Args:
            url: where the API is, with or without the `/v1` at its end.
            model: its name on the server; None for the only one.
            key: sent as a bearer token.

        Raises:
            ServerError: for a server that cannot be reached, refuses the key, or does not have the model.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ServerError(f"{url} is no address of a server; expected one such as http://localhost:8000/v1.")
        url = url.rstrip("/") + ("" if parts.path.strip("/") else "/v1")
        names = asyncio.run(cls(url, "", key)._models())
        if names is None and model is None:
            raise ServerError(f"{url} lists no models: name one.")
        if names is not None and model not in [*names, *([None] if len(names) == 1 else [])]:
            which = "serves several models" if model is None else f"has no model {model}"
            raise ServerError(f"{url} {which}: name one of {', '.join(names) or '(none)'}.")
        return cls(url, model or (names or [""])[0], key)

    def complete(
        self, chats: Sequence[list[dict[str, Any]]], max_tokens: int, concurrency: int
    ) -> Generator[tuple[int, Completion | NoAnswerError]]:
        """Answer chats greedily; yields the place of each with its answer, as they come.

        Requests that meet a busy or failing server (429, 5xx, a lost connection) are sent again, later and later.

        Args:
            concurrency: how many chats are asked at once.

        Raises:
            ServerError: for a server that refuses the key or the model, or where more chats one after the other than
                are asked at once have no answer.
        """
        waiting, tasks, failed = enumerate(chats), dict[asyncio.Task[Completion], int](), 0
        client = self._client(concurrency)

        async def some() -> list[tuple[int, asyncio.Task[Completion]]]:
            while len(tasks) < concurrency and (item := next(waiting, None)) is not None:
                tasks[asyncio.create_task(self._complete(client, item[1], max_tokens))] = item[0]
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED) if tasks else ([], None)
            return [(tasks.pop(task), task) for task in done]

        async def stop() -> None:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await client.aclose()

        with asyncio.Runner() as runner:
            try:
                while finished := runner.run(some()):
                    fatal = [error for _, task in finished if isinstance(error := task.exception(), ServerError)]
                    for place, task in finished:
                        if (error := task.exception()) is None:
                            failed = 0
                            yield place, task.result()
                        elif isinstance(error, NoAnswerError):
                            failed += 1
                            yield place, error
                            if failed > concurrency:
                                fatal.append(ServerError(f"No prompt is answered any more: {error}."))
                        elif not isinstance(error, ServerError):
                            raise error
                    if fatal:
                        raise fatal[0]
            finally:
                runner.run(stop())

    def _client(self, connections: int) -> httpx2.AsyncClient:
        headers = {} if self.key is None else {"Authorization": f"Bearer {self.key}"}
        limits = httpx2.Limits(max_connections=connections, max_keepalive_connections=connections)
        return httpx2.AsyncClient(headers=headers, limits=limits, timeout=TIMEOUT)

    async def _models(self) -> list[str] | None:
        """The names of the models that are served; None where the server has no list of them."""
        async with self._client(1) as client:
            try:
                response = await client.get(f"{self.url}/models")
            except (httpx2.RequestError, httpx2.InvalidURL) as error:
                raise ServerError(
                    f"{self.url} cannot be reached ({_reason(error)}): is a server running there?"
                ) from None
        if response.status_code in (401, 403):
            raise self._refused(response)
        with suppress(ValueError, KeyError, TypeError):
            return [str(model["id"]) for model in response.json()["data"]]
        return None

    async def _complete(
        self, client: httpx2.AsyncClient, messages: list[dict[str, Any]], max_tokens: int
    ) -> Completion:
        body = {"model": self.model, "messages": messages, "max_tokens": max_tokens, "temperature": 0}
        response = await self._patiently(client, body)
        if response.status_code in (401, 403):
            raise self._refused(response)
        if response.status_code == 404:
            raise ServerError(f"{self.url} does not answer as {self.model}: {_said(response)}.")
        if response.status_code != 200:
            raise NoAnswerError(f"the server answers {response.status_code}: {_said(response)}")
        try:
            content = response.json()
            choice = content["choices"][0]
            text, finish = choice["message"].get("content"), str(choice.get("finish_reason") or "stop")
            num_tokens = int((content.get("usage") or {}).get("completion_tokens") or 0)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            raise NoAnswerError(f"the server sends no chat completion: {_said(response)}") from None
        if not isinstance(text, str) or not text.strip():
            raise NoAnswerError(f"the server's answer has no text (finish_reason: {finish})")
        return Completion(text, finish, num_tokens)

    async def _patiently(self, client: httpx2.AsyncClient, body: dict[str, Any]) -> httpx2.Response:
        """Send a request again and again, until the server deals with it."""
        for number in range(TRIES):
            wait = FIRST_WAIT * 2**number * random.uniform(1, 1.5)  # not all at the same time
            try:
                response = await client.post(f"{self.url}/chat/completions", json=body)
            except httpx2.RequestError as error:
                why = f"cannot be reached ({_reason(error)})"
            else:
                if response.status_code != 429 and response.status_code < 500:
                    return response
                why = f"answers {response.status_code}: {_said(response)}"
                with suppress(ValueError):  # it may be a date
                    wait = max(wait, min(float(response.headers.get("Retry-After", 0)), LONGEST_WAIT))
            if number < TRIES - 1:
                await asyncio.sleep(wait)
        raise NoAnswerError(f"{self.url}, asked {TRIES} times, {why}")

    def _refused(self, response: httpx2.Response) -> ServerError:
        key = "the API key" if self.key else "requests without an API key"
        return ServerError(f"{self.url} refuses {key} ({_said(response)}).")


def _said(response: httpx2.Response) -> str:
    """What a server says of an error, in a line."""
    said: Any = response.text
    with suppress(ValueError):
        content = response.json()
        error = content.get("error", content) if isinstance(content, dict) else content
        said = error.get("message") or error.get("detail") or error if isinstance(error, dict) else error
    return " ".join(str(said).split())[:200].rstrip(".") or response.reason_phrase


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
