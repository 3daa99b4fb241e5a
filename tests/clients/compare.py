"""``python compare.py PYTHON...``: every artifact in every client, each in its own process, and docs/clients.md."""

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
"""Of 255: two programs add up in other orders."""

_VERSIONS = (
    "import diffusers, transformers, peft; print(diffusers.__version__, transformers.__version__, peft.__version__)"
)
_KINDS = {"base": "the base model", "model": "full fine-tuning, DreamBooth", "word": "Textual Inversion"}
_FAMILIES = {"sd1": "SD 1.x", "sd2": "SD 2.x", "sdxl": "SDXL"}


def run(python: str, *words: str) -> str:
    threads = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run([python, *words], capture_output=True, text=True, env=threads, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}")
    return done.stdout.strip().rpartition("\n")[2]


def judged(found: dict[str, int]) -> str:
    """What to write of a client's answers; empty where all is well."""
    wrong = [f"{name}: {value} of 255" for name, value in found.items() if name != "moved" and value > NEAR]
    if found.get("moved", 255) <= 5 * NEAR:
        wrong.append("the artifact changes nothing")
    return "; ".join(wrong)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pythons", nargs="+")
    parser.add_argument("--only", default="", help="cases whose names hold this; the page's other rows stay")
    arguments = parser.parse_args()
    pythons = arguments.pythons
    clients = [
        dict(zip(("diffusers", "transformers", "peft"), run(p, "-c", _VERSIONS).split(), strict=True)) for p in pythons
    ]
    with tempfile.TemporaryDirectory() as place:
        run(sys.executable, str(HERE / "make.py"), place)
        listed = Path(place) / "cases.json"
        cases = [case for case in json.loads(listed.read_text()) if arguments.only in case["name"]]
        rows, failed = [], 0
        for case in cases:
            cells = []
            for python in pythons:
                try:
                    found = json.loads(run(python, str(HERE / "client.py"), str(listed), case["name"]))
                    wrong = judged(found)
                    checks = ", ".join(f"{name} ({value})" for name, value in found.items() if name != "moved")
                except RuntimeError as error:
                    wrong, checks = str(error), ""
                failed += bool(wrong)
                cells.append(f"**{wrong}**" if wrong else checks)
            print(f"{case['name']}: {' | '.join(cells)}", flush=True)
            rows.append((_FAMILIES[case["family"]], _KINDS.get(case["kind"], case["kind"]), case["form"], *cells))
    titles = [", ".join(f"{name} {version}" for name, version in client.items()) for client in clients]
    lines = [f"| family | artifact | form | {' | '.join(titles)} |", "|" + "---|" * (3 + len(titles))]
    made = {row[:3]: f"| {' | '.join(row)} |" for row in rows}
    page = HERE.parents[1] / "docs" / "clients.md"
    text = page.read_text()
    if arguments.only and lines[0] in text:
        kept = text.partition(lines[1])[2].partition("<!--")[0].strip().splitlines()
        made = {tuple(line.strip("| ").split(" | ")[:3]): line for line in kept} | made
    lines += made.values()
    start, end = "<!-- table -->", "<!-- end -->"
    before, _, rest = text.partition(start)
    page.write_text(f"{before}{start}\n" + "\n".join(lines) + f"\n{end}{rest.partition(end)[2]}")
    print(f"{len(rows)} artifacts in {len(pythons)} clients, {failed} failures: {page}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
