"""A small server with the part of the Hugging Face Hub's API that an upload uses."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """Stores what is uploaded: ``files`` by path, ``created`` repositories, and the ``tokens`` of all requests."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.blobs: dict[str, bytes] = {}
        self.created: list[dict[str, Any]] = []
        self.tokens: set[str | None] = set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def _body(self) -> bytes:
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))

            def _answer(self, content: Any, status: int = 200) -> None:
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_POST(self) -> None:
                body, token = self._body(), self.headers.get("Authorization")
                hub.tokens.add(token)
                if token != "Bearer hf_secret":
                    self._answer({"error": "Invalid username or password."}, 401)
                elif self.path == "/api/repos/create":
                    hub.created.append(json.loads(body))
                    self._answer({"url": f"{hub.url}/{json.loads(body)['organization']}/{json.loads(body)['name']}"})
                elif "/preupload/" in self.path:
                    files = [
                        {"path": file["path"], "uploadMode": hub.mode(file["path"]), "shouldIgnore": False, "oid": None}
                        for file in json.loads(body)["files"]
                    ]
                    self._answer({"files": files})
                elif self.path.endswith("/info/lfs/objects/batch"):
                    objects = [
                        {**item, "actions": {"upload": {"href": f"{hub.url}/blob/{item['oid']}", "header": {}}}}
                        for item in json.loads(body)["objects"]
                    ]
                    self._answer({"transfer": "basic", "objects": objects})
                elif "/commit/" in self.path:
                    for line in body.splitlines():
                        hub.add(json.loads(line))
                    self._answer({"commitUrl": f"{hub.url}/me/it/commit/0123", "commitOid": "0123"})
                else:
                    self._answer({})

            def do_PUT(self) -> None:
                hub.blobs[self.path.rpartition("/")[2]] = self._body()
                self._answer({})

            def do_GET(self) -> None:
                self._answer({"id": "me/it", "siblings": [], "sha": "0123", "private": True})

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                """Nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    @staticmethod
    def mode(path: str) -> str:
        return "lfs" if path.endswith((".safetensors", ".png")) else "regular"

    def add(self, operation: dict[str, Any]) -> None:
        """Apply one line of a commit."""
        value = operation["value"]
        if operation["key"] == "file":
            self.files[value["path"]] = base64.b64decode(value["content"])
        elif operation["key"] == "lfsFile":
            self.files[value["path"]] = self.blobs[value["oid"]]

    @contextmanager
    def running(self) -> Iterator[None]:
        thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self.server.shutdown()
            self.server.server_close()
