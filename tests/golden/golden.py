"""Golden runs: check that a change does not alter the results of ``sdtune``, bit for bit.

    python tests/golden/golden.py record --sdtune BASE/.venv/bin/sdtune --base    # of the commit before the change
    python tests/golden/golden.py compare                                         # of this checkout

``record`` runs each case of :mod:`cases` with the command ``--sdtune`` and saves sha256 hashes in ``records.json``
under a key for the machine: CPU, threads and torch version, on which the last bits depend. ``compare`` runs the cases
again and lists the differences. ``--base``: the command accepts only the names before :data:`RENAMED_KEYS`, so
arguments are translated to the old names, and its configs to the current ones. ``--work FOLDER`` keeps all outputs in
this folder and reuses complete cases in it. The script uses only the command line, so it works for both versions.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors import safe_open

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from cases import CASES, PLANS, Command  # noqa: E402
from renames import RENAMED_BLOCKS, RENAMED_COLUMNS, RENAMED_FILES, RENAMED_KEYS, RENAMED_TARGETS, RENAMED_WORDS  # noqa: E402

from families import FAMILIES, build_family  # noqa: E402

RECORDS = Path(__file__).with_name("records.json")
REPOSITORY = Path(__file__).parents[2]
THREADS = 1
AT_ONCE = 2
"""Commands that run concurrently, with one thread each. Their results do not depend on each other."""

_IGNORED_PARTS = ("seconds", "_per_second", "peak_memory_bytes", "artifact_bytes", "reasons")
"""Parts of ignored names in ``metrics.json``: times, memory, texts, and a size that includes the path of the shipped
model, which diffusers writes to configs."""

_NUMBER = re.compile(r"(?<![\w.-])\d[\d,]*(?:\.\d+)?(?![\w-])")


def machine() -> str:
    """Key of the record of this machine."""
    flags = ""
    model = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        fields = dict(
            re.split(r"\s*:\s*", line, maxsplit=1)
            for line in info.read_text(encoding="utf-8").split("\n\n")[0].splitlines()
        )
        # On rented machines, several processors have the same model name.
        model = f"{fields.get('model name')} {fields.get('cpu family')}/{fields.get('model')}/{fields.get('stepping')}"
        flags = " ".join(
            f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in fields.get("flags", "").split()
        )
    return f"{model} [{flags}], {THREADS} thread, torch {torch.__version__}"


# --- inputs


def make_inputs(folder: Path) -> None:
    """Create the input files of the cases; they are equal on all machines with the same version of torch."""
    for family in FAMILIES:
        build_family(folder / family, family, seed=3)
    images = folder / "images"
    images.mkdir(parents=True)
    down, across = np.mgrid[0:144, 0:160]
    for number in range(5):
        disc = (across - 60 - 10 * number) ** 2 + (down - 70) ** 2 < (30 + 4 * number) ** 2
        pixels = np.stack([across + 10 * number, 255 - down, 40 * number + 0 * down], -1).clip(0, 255).astype(np.uint8)
        pixels[disc] = (250, 120, 30 * number)
        Image.fromarray(pixels).save(images / f"{number}.png")
        Image.fromarray((255 * disc).astype(np.uint8)).save(images / f"{number}.mask.png")
        (images / f"{number}.txt").write_text(f"a photo of sks <otter> otter, number {number}", encoding="utf-8")
    Image.fromarray(pixels[20:84, 40:104]).save(folder / "map.png")


# --- commands


def translated(argument: str) -> str:
    """``argument`` with the names of the base commit."""
    for old, new in RENAMED_KEYS.items():
        if argument.startswith(f"{new}="):
            return f"{old}={argument.removeprefix(f'{new}=')}"
    if argument.startswith("method.parts="):
        for old, new in RENAMED_WORDS.items():
            argument = argument.replace(new, old)
    if argument.startswith("method.blocks="):
        for old, new in RENAMED_BLOCKS.items():
            argument = argument.replace(new, old)
    return argument


class Sdtune:
    """The command under test, with a separate cache for each case.

    Args:
        base: whether the command accepts only the names before :data:`RENAMED_KEYS`.
    """

    def __init__(self, executable: Path, base: bool) -> None:
        self.executable, self.base = executable, base

    def __call__(self, line: list[str], cwd: Path) -> str:
        """Run the command and return its stdout; a failure ends the script with the last lines of the output."""
        arguments = [translated(a) for a in line] if self.base else line
        environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "SDTUNE_CACHE": str(cwd / "cache")}
        done = subprocess.run(
            [str(self.executable), *arguments], cwd=cwd, env=environment, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"{cwd.name}: sdtune {' '.join(arguments)}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
        return done.stdout


# --- hashes


def sha(content: bytes | str) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def of_tensors(file: Path) -> str:
    """Hash of all tensors in ``file`` and their keys, without the metadata, which contains dates."""
    digest = hashlib.sha256()
    with safe_open(file, framework="pt") as handle:
        for key in sorted(handle.keys()):
            tensor = handle.get_tensor(key)
            digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def of_pixels(file: Path) -> str:
    with Image.open(file) as image:
        pixels = np.asarray(image.convert("RGB"))
    return sha(str(pixels.shape).encode() + pixels.tobytes())


def of_metrics(file: Path) -> str:
    content = json.loads(file.read_text(encoding="utf-8"))
    compared = {key: value for key, value in content.items() if not any(part in key for part in _IGNORED_PARTS)}
    return sha(json.dumps(compared, sort_keys=True))


def of_rows(file: Path) -> str:
    with file.open(newline="", encoding="utf-8") as handle:
        rows = list(csv.reader(handle))
    assert len(rows) > 1, file
    rows[0] = [RENAMED_COLUMNS.get(name, name) for name in rows[0]]
    return sha(json.dumps(rows))


def of_folder(folder: Path) -> dict[str, str]:
    """Relative path -> sha256 of each tensor file, image and metrics file in ``folder``."""
    hashes: dict[str, str] = {}
    for file in sorted(folder.rglob("*")):
        relative_path = file.relative_to(folder)
        name = str(relative_path)
        if {"checkpoints", "cache", ".hydra", "evaluation"} & set(relative_path.parts[:-1]):
            continue
        if file.suffix == ".safetensors":
            hashes[name] = of_tensors(file)
        elif file.suffix == ".png" and file.name != "strengths.png":
            hashes[name] = of_pixels(file)
        elif file.name in ("metrics.json", "evaluation.json"):
            hashes[name] = of_metrics(file)
        elif file.name == "metrics.csv":
            hashes[name] = of_rows(file)
    assert hashes, f"{folder} contains nothing to compare"
    return hashes


def of_config(text: str, base: bool) -> str:
    """Hash of a composed config, flattened, with the current names."""
    flat = flattened(yaml.safe_load(text))
    if base:
        flat = {RENAMED_KEYS.get(key, key): renamed_value(value) for key, value in flat.items()}
    return sha(json.dumps(flat, sort_keys=True))


def renamed_value(value: Any) -> Any:
    if isinstance(value, list):
        return [RENAMED_WORDS.get(one, one) if isinstance(one, str) else one for one in value]
    return RENAMED_TARGETS.get(value, value) if isinstance(value, str) else value


def flattened(node: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(node, Mapping) or not node:
        return {key: node}
    return {n: leaf for k, v in node.items() for n, leaf in flattened(v, f"{key}.{k}" if key else str(k)).items()}


# --- all cases


def of_case(sdtune: Sdtune, name: str, commands: list[Command], work: Path) -> dict[str, str]:
    """Hash the output of each command of a case; run the case first unless it is complete in ``work``."""
    complete = work / "complete"
    if not complete.exists():
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        for command in commands:
            sdtune(command.line(), work)
        complete.touch()
    folders = dict.fromkeys(command.folder for command in commands if command.folder is not None)
    hashes = {f"{name}/{folder}/{file}": h for folder in folders for file, h in of_folder(work / folder).items()}
    return {renamed(key): value for key, value in hashes.items()} if sdtune.base else hashes


def renamed(key: str) -> str:
    for old, new in RENAMED_FILES.items():
        key = key.replace(old, new)
    return key


def of_printed(sdtune: Sdtune, line: list[str], work: Path) -> str:
    """Stdout of a command; run it first unless its stdout is saved in ``work``."""
    work.mkdir(parents=True, exist_ok=True)
    saved = work / "stdout"
    if not saved.exists():
        saved.write_text(sdtune(line, work), encoding="utf-8")
    return saved.read_text(encoding="utf-8")


def recipes(root: Path) -> dict[str, list[str]]:
    """Recipe -> command line that prints its config, for the recipes of the checkout ``root``."""
    command_lines = {}
    for file in sorted((root / "experiments").rglob("*.yaml")):
        name = str(file.relative_to(root / "experiments").with_suffix(""))
        command = "sample" if name.startswith("sample/") else "train"
        command_lines[name] = [command, f"experiment={name}", "--cfg", "job"]
    return command_lines


def everything(sdtune: Sdtune, work: Path, only: list[str]) -> dict[str, str]:
    """All hashes by name; runs only the cases ``only`` if it is not empty."""
    if not (work / "inputs" / "complete").exists():
        shutil.rmtree(work / "inputs", ignore_errors=True)
        make_inputs(work / "inputs")
        (work / "inputs" / "complete").touch()
    hashes: dict[str, str] = {}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        tasks = [
            pool.submit(of_case, sdtune, name, commands, work / name)
            for name, commands in CASES.items()
            if not only or name in only
        ]
        plans = {
            f"plan/{name}": pool.submit(of_printed, sdtune, ["plan", *arguments], work / "plan" / name)
            for name, arguments in PLANS.items()
            if not only or "plan" in only
        }
        configs = {
            f"recipe/{name}": pool.submit(of_printed, sdtune, line, work / "recipe" / name)
            for name, line in recipes(sdtune.executable.parents[2] if sdtune.base else REPOSITORY).items()
            if not only or "recipe" in only
        }
        for task in tasks:
            hashes |= task.result()
        hashes |= {name: sha(json.dumps(_NUMBER.findall(t.result()))) for name, t in plans.items()}
        hashes |= {name: of_config(t.result(), sdtune.base) for name, t in configs.items()}
    return hashes


def records() -> dict[str, dict[str, str]]:
    """Key of the machine -> name -> sha256."""
    content: dict[str, dict[str, str]] = json.loads(RECORDS.read_text(encoding="utf-8")) if RECORDS.is_file() else {}
    return content


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Lines about missing, new and changed hashes."""
    lines = [f"missing: {name}" for name in before if name not in now]
    lines += [f"new: {name}" for name in now if name not in before]
    return lines + [f"differs: {name}" for name in before if name in now and before[name] != now[name]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Golden runs: compare the results of sdtune before and after a change."
    )
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("--sdtune", type=Path, default=Path(sys.executable).with_name("sdtune"))
    parser.add_argument("--base", action="store_true", help="the command accepts only the names before the renames")
    parser.add_argument("--work", type=Path, help="keep the outputs in this folder, and reuse complete cases in it")
    parser.add_argument(
        "--only", nargs="*", default=[], help="names of cases, plan, or recipe: run and compare only these"
    )
    arguments = parser.parse_args()
    all_records = records()
    if arguments.action == "compare" and machine() not in all_records:
        raise SystemExit(f"no record for {machine()}; record the base commit first")
    with tempfile.TemporaryDirectory() as temporary:
        work = (arguments.work or Path(temporary)).absolute()
        work.mkdir(parents=True, exist_ok=True)
        now = everything(Sdtune(arguments.sdtune.absolute(), arguments.base), work, arguments.only)
    if arguments.action == "record":
        others = all_records.get(machine(), {}) if arguments.only else {}
        RECORDS.write_text(
            json.dumps({**all_records, machine(): {**others, **now}}, indent=1, sort_keys=True) + "\n", encoding="utf-8"
        )
        print(f"{len(now)} hashes recorded for {machine()}")
        return
    before = all_records[machine()]
    if arguments.only:
        before = {key: value for key, value in before.items() if key.split("/")[0] in arguments.only}
    different = differences(before, now)
    print("\n".join(different))
    print(f"{len(before)} hashes for {machine()}: {len(different)} differ")
    raise SystemExit(1 if different else 0)


if __name__ == "__main__":
    main()
