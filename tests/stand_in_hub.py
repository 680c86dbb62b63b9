"""A stand-in for the hub of Hugging Face: the part of its HTTP API that pushing and fetching models needs."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


class Hub:
    """Repositories in memory, behind a server on this machine.

    repositories: by name (owner/name), their revisions by name: the files of each by path.
    fetched: which files were downloaded, as owner/name/path, in order.
    private: repositories that were asked to be private.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.fetched: list[str] = []
        self.private: set[str] = set()
        self.messages: list[str] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def put(self, name: str, directory: Any, revision: str = "main") -> None:
        """A repository with the files of a directory."""
        files = {
            path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
        }
        self.repositories.setdefault(name, {"main": {}})[revision] = files

    def sha(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit that a revision names, and its files."""
        for branch, files in self.repositories[name].items():
            digest = hashlib.sha1(
                f"{branch}{sorted((k, hashlib.sha1(v).hexdigest()) for k, v in files.items())}".encode()
            )
            if revision in (branch, digest.hexdigest()):
                return digest.hexdigest(), files
        return None


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_args: Any) -> None:
        pass

    def answer(self, value: Any, status: int = 200, **headers: str) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, header in headers.items():
            self.send_header(name.replace("_", "-"), header)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, code: str) -> None:
        self.answer({"error": code}, 404, X_Error_Code=code)

    def do_POST(self) -> None:
        path, hub = unquote(urlsplit(self.path).path), self.hub
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            hub.repositories.setdefault(name, {"main": {}})
            if asked.get("visibility") == "private" or asked.get("private"):
                hub.private.add(name)
            return self.answer({"url": f"{hub.url}/{name}", "name": name, "id": name})
        _, _, _, owner, repository, action, revision = path.split("/", 6)
        branches = hub.repositories[f"{owner}/{repository}"]
        if action == "branch":
            branches.setdefault(revision, dict(branches["main"]))
            return self.answer({})
        if action == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        for line in body.decode().splitlines():  # action is "commit"
            operation = json.loads(line)
            if operation["key"] == "header":
                hub.messages.append(operation["value"]["summary"])
            if operation["key"] == "file":
                branches[revision][operation["value"]["path"]] = base64.b64decode(operation["value"]["content"])
        commit = hub.sha(f"{owner}/{repository}", revision)
        oid = commit[0] if commit else ""
        return self.answer(
            {"commitUrl": f"{hub.url}/{owner}/{repository}/commit/{oid}", "commitOid": oid, "success": True}
        )

    def do_GET(self) -> None:
        path, hub = unquote(urlsplit(self.path).path), self.hub
        is_api = path.startswith("/api/models/")
        owner, repository, *rest = path.removeprefix("/api/models").strip("/").split("/")
        name = f"{owner}/{repository}"
        if name not in hub.repositories:
            return self.missing("RepoNotFound")
        revision = rest[1] if len(rest) > 1 else "main"
        commit = hub.sha(name, revision)
        if commit is None:
            return self.missing("RevisionNotFound")
        sha, files = commit
        if is_api and rest[:1] == ["tree"]:
            return self.answer(
                [
                    {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for file, data in files.items()
                ]
            )
        if is_api:
            return self.answer({"id": name, "sha": sha, "siblings": [{"rfilename": file} for file in files]})
        file = "/".join(rest[2:])
        if file not in files:
            return self.answer({}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        if self.command == "GET":
            hub.fetched.append(f"{name}/{file}")
        etag = f'"{hashlib.sha1(files[file]).hexdigest()}"'
        return self.answer(files[file], X_Repo_Commit=sha, ETag=etag)

    def do_HEAD(self) -> None:
        self.do_GET()
