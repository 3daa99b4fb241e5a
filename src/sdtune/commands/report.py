"""``sdtune report FOLDER``: an HTML page about a run, a sweep, or any folder of runs."""

from __future__ import annotations

import threading
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from sdtune.errors import UserError

if TYPE_CHECKING:
    from sdtune.reporting.serve import ReportServer

_HELP = """usage: sdtune report FOLDER [--follow] [--serve]

Writes FOLDER/report.html, a self-contained page about a run, a sweep, or any folder that contains runs.
Above 15 MB, the page is FOLDER/report/index.html, with its images beside it.

  --follow    write the page again and again while runs go on; the page reloads itself
  --serve     serve the page on this machine (http://127.0.0.1:PORT/) until Ctrl-C
"""

_OPTIONS = ("--follow", "--serve")


def main(arguments: list[str]) -> None:
    """Write the report of a folder, or print the help.

    Args:
        arguments: the folder and options, or ``--help``.
    """
    if "-h" in arguments or "--help" in arguments:
        print(_HELP, end="")
        return
    folders = [text for text in arguments if not text.startswith("-")]
    unknown = [text for text in arguments if text.startswith("-") and text not in _OPTIONS]
    if len(folders) != 1 or unknown:
        raise UserError(
            f"expected one folder, got {' '.join(arguments) or 'nothing'}",
            key="report",
            remedy="use sdtune report outputs/sweeps/<time>; --follow and --serve are its options",
        )
    folder = Path(folders[0]).expanduser()
    if "--follow" in arguments:
        _follow(folder, serve="--serve" in arguments)
        return
    from sdtune.reporting import collect, ranking_lines, write_report

    runs = collect(folder)
    file = write_report(runs, folder, _title(folder))
    for line in ranking_lines(runs):
        print(line)
    print(f"report: {file}")
    if "--serve" in arguments:
        _serve(file)


def _title(folder: Path) -> str:
    """The last two parts of the path: the name of a run is often only its time or number."""
    return "/".join(folder.resolve().parts[-2:])


def _serve(file: Path) -> None:
    from sdtune.reporting.serve import ReportServer

    server = ReportServer(file)
    with server.running(), suppress(KeyboardInterrupt):
        print(f"serving {server.url} (Ctrl-C ends)", flush=True)
        threading.Event().wait()


def _follow(folder: Path, serve: bool) -> None:
    """Write pages until no run goes on; with ``serve``, serve them until Ctrl-C."""
    from sdtune.reporting.follow import Follower, follow
    from sdtune.reporting.serve import ReportServer

    follower, stop = Follower(folder, _title(folder)), threading.Event()
    server: ReportServer | None = None
    printed: set[Path] = set()
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder", remedy="use the folder of a run or of a sweep")
    print(f"following {folder}; Ctrl-C ends", flush=True)
    with ExitStack() as running:

        def written(file: Path) -> None:
            nonlocal server
            if file not in printed:
                print(f"report: {file}", flush=True)
                printed.add(file)
            if server is not None:
                server.file = file
            elif serve:
                server = ReportServer(file)
                running.enter_context(server.running())
                print(f"serving {server.url}", flush=True)

        try:
            follow(follower, stop, written)
            print("no run goes on" + ("; still serving, Ctrl-C ends" if server is not None else ""), flush=True)
            if server is not None:
                stop.wait()
        except KeyboardInterrupt:
            follower.write(last=True)
