"""``sdtune report FOLDER``: one page about a run, a sweep, or any folder of runs."""

from __future__ import annotations

from pathlib import Path

from sdtune.errors import UserError

_HELP = """usage: sdtune report FOLDER

Writes FOLDER/report.html, one file that needs no network: of a run, of a sweep, or of any folder with runs below it.
"""


def main(arguments: list[str]) -> None:
    """``arguments``: the folder, or ``--help``."""
    if arguments in (["-h"], ["--help"]):
        print(_HELP, end="")
        return
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise UserError("report takes one folder: sdtune report outputs/sweeps/<time>")
    from sdtune.reporting import collect, write_report

    folder = Path(arguments[0]).expanduser()
    file = write_report(collect(folder), folder, folder.resolve().name)
    print(f"report: {file}")
