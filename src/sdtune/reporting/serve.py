"""Serve a report on this machine: 127.0.0.1 alone, read only."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

_ADDRESS = "127.0.0.1"
_PORT = 8765
"""Port that is tried first, so that the address stays the same; another free one if it is taken."""
_IMAGE = re.compile(r"/(images/[0-9a-f]+\.webp)")


class ReportServer:
    """Serves the page ``file`` at ``/`` and the images beside it; nothing else.

    ``file`` may be set again, because a page that grows becomes a folder.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        report = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(with_content=True)

            def do_HEAD(self) -> None:
                self._answer(with_content=False)

            def _answer(self, with_content: bool) -> None:
                path = report.path(self.path.partition("?")[0])
                # A page of another site could reach the server by a name of its own that resolves to this machine.
                host = self.headers.get("Host", "").rpartition(":")[0]
                if path is None or host not in ("localhost", _ADDRESS):
                    self.send_error(HTTPStatus.NOT_FOUND)
                    return
                try:
                    content = path.read_bytes()
                except OSError:
                    self.send_error(HTTPStatus.NOT_FOUND)
                    return
                self.send_response(HTTPStatus.OK)
                is_page = path.suffix == ".html"
                self.send_header("Content-Type", "text/html; charset=utf-8" if is_page else "image/webp")
                self.send_header("Content-Length", str(len(content)))
                self.send_header("Cache-Control", "no-store" if is_page else "max-age=86400")
                self.send_header("X-Content-Type-Options", "nosniff")
                self.end_headers()
                if with_content:
                    self.wfile.write(content)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name of the base class
                """Nothing: the terminal shows the log of the report."""

        try:
            self.server = ThreadingHTTPServer((_ADDRESS, _PORT), Handler)
        except OSError:
            self.server = ThreadingHTTPServer((_ADDRESS, 0), Handler)

    def path(self, address: str) -> Path | None:
        """File of an address of the page; None for everything that is not part of the report."""
        if address == "/":
            return self.file
        image = _IMAGE.fullmatch(address)
        return self.file.parent / image[1] if image is not None and self.file.name == "index.html" else None

    @property
    def url(self) -> str:
        """Address of the page."""
        return f"http://{_ADDRESS}:{self.server.server_address[1]}/"

    @contextmanager
    def running(self) -> Iterator[None]:
        """Context manager that serves in a thread."""
        thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self.server.shutdown()
            self.server.server_close()
            thread.join()
