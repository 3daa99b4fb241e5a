"""Load each artifact in each client, in separate processes: ``python compare.py PYTHON...`` writes docs/clients.md."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
NEAR = 1
"""Largest accepted pixel difference, of 255: programs sum in different orders."""

_VERSIONS = (
    "import diffusers, transformers, peft; print(diffusers.__version__, transformers.__version__, peft.__version__)"
)
_KINDS = {"base": "the base model", "model": "full fine-tuning, DreamBooth", "word": "Textual Inversion"}
_FAMILIES = {
    "sd1": "SD 1.x",
    "sd2": "SD 2.x",
    "sdxl": "SDXL",
    "sd3_medium": "SD 3 medium",
    "sd35_medium": "SD 3.5 medium",
    "sd35_large": "SD 3.5 large",
}


def run(python: str, *arguments: str) -> str:
    """Last line that the script prints; RuntimeError with the last line of stderr if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run([python, *arguments], capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}")
    return done.stdout.strip().rpartition("\n")[2]


def failures_in(differences: dict[str, int]) -> str:
    """Description of the failed checks of a client; empty if all passed."""
    wrong = [f"{name}: {value} of 255" for name, value in differences.items() if name != "moved" and value > NEAR]
    if differences.get("moved", 255) <= 5 * NEAR:
        wrong.append("the artifact changes nothing")
    return "; ".join(wrong)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pythons", nargs="+")
    parser.add_argument(
        "--only", default="", help="run only cases whose name contains this; other rows of the page are not changed"
    )
    arguments = parser.parse_args()
    pythons = arguments.pythons
    clients = [
        dict(zip(("diffusers", "transformers", "peft"), run(p, "-c", _VERSIONS).split(), strict=True)) for p in pythons
    ]
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, str(HERE / "make.py"), folder)
        cases_file = Path(folder) / "cases.json"
        cases = [case for case in json.loads(cases_file.read_text(encoding="utf-8")) if arguments.only in case["name"]]
        rows, failed = [], 0
        for case in cases:
            cells = []
            for python in pythons:
                try:
                    differences = json.loads(run(python, str(HERE / "client.py"), str(cases_file), case["name"]))
                    wrong = failures_in(differences)
                    checks = ", ".join(f"{name} ({value})" for name, value in differences.items() if name != "moved")
                except RuntimeError as error:
                    wrong, checks = str(error), ""
                failed += bool(wrong)
                cells.append(f"**{wrong}**" if wrong else checks)
            print(f"{case['name']}: {' | '.join(cells)}", flush=True)
            rows.append((_FAMILIES[case["family"]], _KINDS.get(case["kind"], case["kind"]), case["form"], *cells))
    titles = [", ".join(f"{name} {version}" for name, version in client.items()) for client in clients]
    lines = [f"| family | artifact | form | {' | '.join(titles)} |", "|" + "---|" * (3 + len(titles))]
    lines_by_case = {row[:3]: f"| {' | '.join(row)} |" for row in rows}
    page = HERE.parents[1] / "docs" / "clients.md"
    text = page.read_text(encoding="utf-8")
    if arguments.only and lines[0] in text:
        old_lines = text.partition(lines[1])[2].partition("<!--")[0].strip().splitlines()
        lines_by_case = {tuple(line.strip("| ").split(" | ")[:3]): line for line in old_lines} | lines_by_case
    lines += lines_by_case.values()
    start, end = "<!-- table -->", "<!-- end -->"
    before, _, rest = text.partition(start)
    page.write_text(f"{before}{start}\n" + "\n".join(lines) + f"\n{end}{rest.partition(end)[2]}", encoding="utf-8")
    print(f"{len(rows)} artifacts in {len(pythons)} clients, {failed} failures: {page}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
