"""The files that the fuzz tests use: tiny models of two families, adapters, images, captions, a finished run."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

from PIL import Image

from families import build_family
from lora_files import lora
from pipelines import build_pipeline
from running import arguments, export, train


@dataclass
class World:
    """Paths of valid files by kind, and of files and folders that are something else."""

    root: Path
    tiny: Path
    images: Path
    run: Path
    places: dict[str, Path] = field(default_factory=dict)

    def fingerprint(self) -> str:
        """Hash of the names and contents of all files that a command must not change."""
        digest = hashlib.sha256()
        for file in sorted(self.root.rglob("*")):
            if file.is_file() and file.suffix != ".log":
                digest.update(f"{file.relative_to(self.root)}\0".encode() + file.read_bytes())
        return digest.hexdigest()


def build_world(root: Path) -> World:
    """Create the files below ``root``."""
    tiny, images, run = build_pipeline(root / "tiny"), root / "images", root / "run"
    for kind in ("images", "classes", "masks"):
        _write_images(root / kind, 5 if kind == "images" else 2)
    code = train(*arguments(tiny, images, run, "trainer.max_steps=1", "name=mine"))
    assert code == 0, "the run for the fuzz tests failed"
    code = export(f"run={run}", "format=single_file", f"hydra.run.dir={root / 'single'}")
    assert code == 0, "the export for the fuzz tests failed"
    (root / "empty").mkdir()
    (root / "text.txt").write_text("a photo", encoding="utf-8")
    (root / "no tensors.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    sdxl = build_family(root / "sdxl", "sdxl")
    lora(sdxl, root / "sdxl_lora")
    places = {
        "tiny": tiny,
        "sdxl": sdxl,
        "sdxl lora": root / "sdxl_lora",
        "lora": run / "artifact" / "mine.safetensors",
        "single file": next((root / "single").glob("*.safetensors")),
        "vae": tiny / "vae",
        "images": images,
        "classes": root / "classes",
        "image": images / "0.png",
        "run": run,
        "artifact": run / "artifact",
        "checkpoint": next((run / "checkpoints").glob("*.ckpt")),
        "empty": root / "empty",
        "text": root / "text.txt",
        "no tensors": root / "no tensors.safetensors",
        "missing": root / "missing",
        "device": Path("/dev/null"),
    }
    return World(root, tiny, images, run, places)


def _write_images(folder: Path, count: int) -> None:
    folder.mkdir()
    for index in range(count):
        Image.new("RGB", (40, 36), (40 * index, 255 - 40 * index, 90)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"picture number {index}", encoding="utf-8")
    rows = [{"file_name": f"{index}.png", "text": "from the table"} for index in range(count)]
    (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def run_search(
    description: str,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    search: Callable[[World, argparse.Namespace], Sequence[tuple[str, str]]],
) -> int:
    """Run a search as a command: parse its arguments, build a world, print the problems; return the exit code.

    Args:
        description: text for ``--help``.
        add_arguments: adds the arguments of the search besides ``--seed``.
        search: returns the problems: what was tried, and what is wrong.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    add_arguments(parser)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, {"XDG_CACHE_HOME": f"{folder}/cache"}):
        problems = search(build_world(Path(folder) / "world"), args)
    for what, problem in problems:
        print(f"\n{what}\n{problem}")
    print(f"{len(problems)} problems with seed {args.seed}")
    return bool(problems)
