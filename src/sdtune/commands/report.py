"""``sdtune report FOLDER``: one page about a run, a sweep, or any folder of runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_HELP = """usage: sdtune report FOLDER

Writes FOLDER/report.html, one file that needs no network: of a run, of a sweep, or of any folder with runs below it.
"""


def main(arguments: list[str]) -> None:
    """``arguments``: the folder, or ``--help``."""
    if arguments in (["-h"], ["--help"]):
        print(_HELP, end="")
        return
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("sdtune: report takes one folder: sdtune report outputs/sweeps/<time>", file=sys.stderr)
        raise SystemExit(2)
    from sdtune.reporting import collect, write_report

    folder = Path(arguments[0]).expanduser()
    try:
        file = write_report(collect(folder), folder, folder.resolve().name)
    except ValueError as error:
        if os.environ.get("SDTUNE_TRACEBACK"):
            raise
        print(f"sdtune: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    print(f"report: {file}")
