"""A small HTTP server that answers like the Hugging Face hub where a model is published."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import yaml

TOKEN = "hf_of_the_stand_in"


class StandIn(ThreadingHTTPServer):
    """`repositories`: the files of each, by name. `broken`: endings of the addresses that are refused."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.broken: set[str] = set()
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: StandIn

    def do_GET(self) -> None:
        self.respond("GET", b"")

    def do_POST(self) -> None:
        self.respond("POST", self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def respond(self, method: str, body: bytes) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(f"{method} {path}")
        if any(path.endswith(end) for end in self.server.broken):
            return self.answer(403, {"error": "out of order"})  # the client tries errors 5xx again, for long
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid username or password."})
        if path == "/api/whoami-v2":
            return self.answer(200, {"type": "user", "name": "ann", "auth": {"type": "access_token"}})
        if path == "/api/validate-yaml":
            yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
            return self.answer(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            name = "ann/" + json.loads(body)["name"]
            existed = name in self.server.repositories
            self.server.repositories.setdefault(name, {})
            answer = {"url": f"{self.server.address}/{name}", "name": name, "id": name}
            return self.answer(409 if existed else 200, answer)
        if found := re.fullmatch(r"/api/models/(ann/[\w.-]+)/(preupload|commit)/main", path):
            files = self.server.repositories[found[1]]
            answer = self.preupload(body) if found[2] == "preupload" else self.commit(found[1], files, body)
            return self.answer(200, answer)
        if found := re.fullmatch(r"/api/models/(ann/[\w.-]+)(/revision/main)?", path):
            return self.answer(200, {"id": found[1], "sha": "0" * 40, "siblings": [], "private": False})
        return self.answer(404, {"error": f"the stand-in does not know {path}"})

    def preupload(self, body: bytes) -> dict[str, Any]:
        files = json.loads(body)["files"]
        return {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]}

    def commit(self, name: str, files: dict[str, bytes], body: bytes) -> dict[str, Any]:
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                assert entry["value"]["encoding"] == "base64"
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        return {"success": True, "commitOid": "1" * 40, "commitUrl": f"{self.server.address}/{name}/commit/{'1' * 40}"}

    def answer(self, status: int, content: dict[str, Any]) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *arguments: object) -> None:
        """Silence."""


@contextmanager
def stand_in() -> Iterator[StandIn]:
    server = StandIn()
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
