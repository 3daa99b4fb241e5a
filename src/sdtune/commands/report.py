"""``sdtune report FOLDER``: an HTML page about a run, a sweep, or any folder of runs."""

from __future__ import annotations

from pathlib import Path

from sdtune.errors import UserError

_HELP = """usage: sdtune report FOLDER

Writes FOLDER/report.html, a self-contained page about a run, a sweep, or any folder that contains runs.
"""


def main(arguments: list[str]) -> None:
    """Write the report of a folder, or print the help.

    Args:
        arguments: the folder, or ``--help``.
    """
    if arguments in (["-h"], ["--help"]):
        print(_HELP, end="")
        return
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise UserError(
            f"expected one folder, got {' '.join(arguments) or 'nothing'}",
            key="report",
            remedy="use sdtune report outputs/sweeps/<time>",
        )
    from sdtune.reporting import collect, ranking_lines, write_report

    folder = Path(arguments[0]).expanduser()
    runs = collect(folder)
    file = write_report(runs, folder, folder.resolve().name)
    for line in ranking_lines(runs):
        print(line)
    print(f"report: {file}")
