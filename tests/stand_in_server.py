"""A stand-in for a server with OpenAI's chat API, such as vLLM's."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, Any]  # status and content
LOST: Reply = (0, None)  # the connection is closed instead


def completion(text: str | None, finish: str = "stop") -> Reply:
    """What a server sends for an answer."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return 200, {"choices": [choice], "usage": {"completion_tokens": len(text or "")}}


def failure(status: int, message: str) -> Reply:
    return status, {"error": {"message": message}}


class ChatApi:
    """A server on this machine that answers each chat by a function of it.

    reply: from what was asked to the reply.
    models: the names that it lists; None for no such list.
    key: asked for, where it is set.
    asked: the bodies of all requests, in order.
    most: the most requests that were under way at one time.
    """

    def __init__(self, reply: Callable[[dict[str, Any]], Reply]) -> None:
        self.reply = reply
        self.models: list[str] | None = ["teacher"]
        self.key = ""
        self.asked: list[dict[str, Any]] = []
        self.now = self.most = 0
        self.headers: dict[str, str] = {}
        self.lock = threading.Lock()
        self.server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"api": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_args: Any) -> None:
        """A client that goes away is no error of the server."""


class _Handler(BaseHTTPRequestHandler):
    api: ChatApi
    protocol_version = "HTTP/1.1"

    def log_message(self, *_args: Any) -> None:
        pass

    def answer(self, status: int, content: Any) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in self.api.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def is_let_in(self) -> bool:
        return not self.api.key or self.headers["Authorization"] == f"Bearer {self.api.key}"

    def do_GET(self) -> None:
        if not self.is_let_in():
            self.answer(*failure(401, "Incorrect API key"))
        elif self.path == "/v1/models" and self.api.models is not None:
            self.answer(200, {"data": [{"id": name} for name in self.api.models]})
        else:
            self.answer(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        api, asked = self.api, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with api.lock:
            api.asked.append(asked)
            api.now += 1
            api.most = max(api.most, api.now)
        reply = api.reply(asked) if self.is_let_in() else failure(401, "Incorrect API key")
        with api.lock:
            api.now -= 1
        if reply == LOST:
            self.close_connection = True
            return
        self.answer(*reply if self.path == "/v1/chat/completions" else failure(404, "Not Found"))
