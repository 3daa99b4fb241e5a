"""``sdtune report --follow`` and ``--serve``: pages while runs go on, and the server on this machine."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from run_folders import data_of, write_run
from sdtune.files import locked
from sdtune.reporting.follow import Follower, follow
from sdtune.reporting.serve import ReportServer


def finish(run: Path) -> None:
    (run / "metrics.json").write_text(json.dumps({"validation_loss": 0.1}), encoding="utf-8")


def test_page_is_written_while_a_run_goes_on(tmp_path: Path) -> None:
    run = write_run(tmp_path / "0", {"seed": 0}, None)
    follower, pages = Follower(tmp_path, "it"), []
    with ExitStack() as training:
        training.enter_context(locked(run))

        def written(file: Path) -> None:
            data = data_of(file)
            pages.append(data["reload"])
            follower.interval = 0.01
            if len(pages) == 2:
                finish(run)
                training.close()

        follow(follower, threading.Event(), written)
    assert None not in pages[:2]
    assert pages[-1] is None, "the last page does not reload itself"
    assert len(pages) == 3


def test_killed_run_does_not_go_on(tmp_path: Path) -> None:
    run = write_run(tmp_path / "0", {}, None)
    follower = Follower(tmp_path, "it")
    with locked(run):
        file = follower.write()
        assert file is not None
        assert "running." in file.read_text(encoding="utf-8")
        assert follower.goes_on
    assert not follower.goes_on


def test_run_that_is_being_written_stays_as_it_was(tmp_path: Path) -> None:
    write_run(tmp_path / "0", {"seed": 0}, {"validation_loss": 0.1})
    run = write_run(tmp_path / "1", {"seed": 1}, None)
    follower = Follower(tmp_path, "it")
    config = run / ".hydra" / "config.yaml"
    whole = config.read_text(encoding="utf-8")
    config.write_text("{", encoding="utf-8")
    file = follower.write()
    assert file is not None
    assert len(data_of(file)["runs"]) == 1
    config.write_text(whole, encoding="utf-8")
    for _ in range(2):
        file = follower.write()
        assert file is not None
        assert len(data_of(file)["runs"]) == 2
        config.write_text("{", encoding="utf-8")


def test_pages_take_one_percent_of_a_core_at_most(tmp_path: Path) -> None:
    write_run(tmp_path / "0", {}, None)
    follower = Follower(tmp_path, "it")
    start = time.process_time()
    file = follower.write()
    took = time.process_time() - start
    assert file is not None
    assert follower.interval == pytest.approx(max(100 * took, 5), rel=0.2)


def test_finished_runs_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "0", {}, {"validation_loss": 0.1})
    write_run(tmp_path / "1", {"seed": 1}, None)
    from sdtune.reporting import follow as module

    read, real = [], module.read_run
    monkeypatch.setattr(module, "read_run", lambda folder: read.append(folder.name) or real(folder))
    follower = Follower(tmp_path, "it")
    for _ in range(3):
        follower.write()
    assert read == ["0", "1", "1", "1"]


def test_folder_without_runs_is_waited_for(tmp_path: Path) -> None:
    follower = Follower(tmp_path, "it")
    assert follower.write() is None
    write_run(tmp_path / "0", {}, {"validation_loss": 0.1})
    assert follower.write() is not None
    assert not follower.goes_on
    with locked(tmp_path):
        assert follower.goes_on, "further jobs of the sweep may follow"


def request(port: int, path: str, method: str = "GET", host: str = "127.0.0.1") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, headers={"Host": f"{host}:{port}"})
    response = connection.getresponse()
    return response.status, response.read()


def test_server_serves_the_page_and_its_images_alone(tmp_path: Path) -> None:
    (tmp_path / "report" / "images").mkdir(parents=True)
    (tmp_path / "report" / "index.html").write_text("the page", encoding="utf-8")
    (tmp_path / "report" / "images" / "0af.webp").write_bytes(b"image")
    (tmp_path / "secret.txt").write_text("secret", encoding="utf-8")
    server = ReportServer(tmp_path / "report" / "index.html")
    port = server.server.server_address[1]
    assert server.server.server_address[0] == "127.0.0.1"
    with server.running():
        assert request(port, "/") == (200, b"the page")
        assert request(port, "/images/0af.webp") == (200, b"image")
        assert request(port, "/", "HEAD") == (200, b"")
        for path in (
            "/secret.txt",
            "/../secret.txt",
            "/images/../../secret.txt",
            "/images/",
            "/index.html/..",
            "/images/1.webp",
        ):
            assert request(port, path)[0] == 404, path
        assert request(port, "/", host="evil.example")[0] == 404
        assert request(port, "/", "POST")[0] == 501


def test_second_server_takes_a_free_port(tmp_path: Path) -> None:
    first, second = ReportServer(tmp_path / "a.html"), ReportServer(tmp_path / "b.html")
    with first.running(), second.running():
        assert first.url != second.url


def test_command_follows_a_run_serves_it_and_ends_with_ctrl_c(tmp_path: Path) -> None:
    run = write_run(tmp_path / "0", {}, None)
    training = ExitStack()
    training.enter_context(locked(run))
    process = subprocess.Popen(
        [sys.executable, "-m", "sdtune", "report", str(run), "--follow", "--serve"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == f"following {run}; Ctrl-C ends\n"
    assert process.stdout.readline() == f"report: {run / 'report.html'}\n"
    url = process.stdout.readline().split()[-1]
    port = int(url.rstrip("/").rpartition(":")[2])
    status, content = request(port, "/")
    assert status == 200
    assert re.search(rb'"reload": \d', content)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    assert data_of(run / "report.html")["reload"] is None
    training.close()
