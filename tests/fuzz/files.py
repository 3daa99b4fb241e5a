"""Damaged files: each reader gets copies of a valid file with seeded mutations, and must refuse or read them.

    python tests/fuzz/files.py --seed 0 --count 200

A reader may raise UserError; a command may exit with one line. Any other exception, more than ten seconds or more than
one GiB of memory is a problem.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from PIL import Image
from safetensors.torch import load, load_file, save, save_file

from fuzz.child import in_child
from fuzz.world import World, run_search
from sdtune.backbone import Pretrained
from sdtune.cli.main import main
from sdtune.data import Folder
from sdtune.errors import UserError
from sdtune.loaders.lora import AdapterFile, load_adapters
from sdtune.methods import ControlNet, LoRA

SECONDS, MEMORY = 10, 2**30


@dataclass(frozen=True)
class Reader:
    """A reader of a folder in which one file is damaged.

    Args:
        folder: folder of valid files; it is copied for each mutation.
        files: names of the files in it that are damaged, one at a time.
        read: reads the copied folder.
    """

    folder: Path
    files: tuple[str, ...]
    read: Callable[[Path], object]


# --- mutations


def cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def flip(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 4, 64)) if content else 0):
        # Most of a file is tensors or pixels; what decides is at its beginning and at its end.
        width = rng.choice((64, 1024, len(content)))
        index = rng.randrange(min(width, len(content)))
        changed[index if rng.random() < 0.7 else -1 - index] = rng.randrange(256)
    return bytes(changed)


def insert(content: bytes, rng: random.Random) -> bytes:
    index = rng.randrange(min(4096, len(content)) + 1)
    added = rng.choice((b"\0" * 100, b"\xff\xfe", b"\n", b'"', b"{", b"[" * 20_000, rng.randbytes(50)))
    return content[:index] + added + content[index:]


def overwrite(content: bytes, rng: random.Random) -> bytes:
    if not content:
        return b"\0"
    start = rng.randrange(len(content))
    length = rng.choice((1, 8, 1000, len(content)))
    return content[:start] + b"\0" * len(content[start : start + length]) + content[start + length :]


def other_content(content: bytes, rng: random.Random) -> bytes:
    git_lfs = b"version https://git-lfs.github.com/spec/v1\n"
    return rng.choice((b"", b"<!DOCTYPE html>", git_lfs, b"PK\x03\x04", b"\x80\x02}"))


_JUNK: tuple[Any, ...] = (None, True, 0, -1, 2**63, 1e308, "", "x", "../x", [], [1], {}, {"a": 1}, [[[]]], "null", -0.5)


def change_json(content: bytes, rng: random.Random) -> bytes:
    """Replace, remove, rename or repeat one value of a JSON document, or of one line of JSON lines."""
    lines = content.decode().split("\n") if content.count(b"\n{") else [content.decode()]
    index = rng.randrange(len(lines))
    try:
        document = json.loads(lines[index])
    except ValueError:
        return flip(content, rng)
    node, key = _some_place(document, rng)
    if node is None:
        document = rng.choice(_JUNK)
    elif rng.random() < 0.7:
        node[key] = rng.choice(_JUNK)
    elif isinstance(node, dict) and rng.random() < 0.5:
        node[rng.choice(("", "x", f"{key}_", "__class__"))] = node.pop(key)
    else:
        del node[key]
    lines[index] = json.dumps(document)
    return "\n".join(lines).encode()


def _some_place(document: Any, rng: random.Random) -> tuple[Any, Any]:
    """A container in ``document`` and a key of it; (None, None) for a document without entries."""
    places: list[tuple[Any, Any]] = []
    stack = [document]
    while stack and len(places) < 5000:
        node = stack.pop()
        entries = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        places += [(node, entry) for entry in entries]
        stack += [node[entry] for entry in entries]
    return rng.choice(places) if places else (None, None)


def change_header(content: bytes, rng: random.Random) -> bytes:
    """Change the header of a safetensors file: names, shapes, dtypes, offsets, metadata, or its length."""
    length = int.from_bytes(content[:8], "little")
    body = content[8 + length :]
    if rng.random() < 0.2:
        return rng.choice((0, 1, length - 1, length + 1, 2**31, 2**63, 100_000_000)).to_bytes(8, "little") + content[8:]
    header = json.loads(content[8 : 8 + length])
    name = rng.choice(sorted(header))
    if rng.random() < 0.3:
        new_names = (f"{name}x", name.replace(".", "_"), "", "a" * 5000, name.replace("0", "7"))
        header[rng.choice(new_names)] = header.pop(name)
    elif name == "__metadata__" or not header[name]:
        header["__metadata__"] = {"format": rng.choice(("pt", "", "x" * 10_000))}
    else:
        entry = header[name]
        key = rng.choice(sorted(entry))
        values = {
            "shape": ([], [0], [1], entry["shape"][::-1], [2**40], [*entry["shape"], 1], [-1], [2**63, 2**63]),
            "dtype": ("F16", "F64", "I64", "BOOL", "F8_E4M3", "X", "", "BF16", "U8"),
            "data_offsets": ([0, 0], [0, 2**62], [5, 1], [-1, 4], entry["data_offsets"][::-1]),
        }
        entry[key] = rng.choice(values[key])
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def change_tensors(content: bytes, rng: random.Random) -> bytes:
    """Rewrite a safetensors file consistently, with a tensor of another shape, dtype, name or value, or without it."""
    try:
        tensors = load(content)
    except Exception:
        return flip(content, rng)
    if not tensors:
        return content
    name = rng.choice(sorted(tensors))
    tensor = tensors.pop(name)
    replacement = rng.choice(
        (
            lambda: {name: tensor.to(rng.choice((torch.int8, torch.float64, torch.bool, torch.bfloat16, torch.int64)))},
            lambda: {name: tensor.flatten()},
            lambda: {name: tensor.new_zeros(0)},
            lambda: {name: tensor.new_full(tensor.shape, float("nan")) if tensor.is_floating_point() else tensor},
            lambda: {name: tensor.expand(2, *tensor.shape).contiguous()},
            lambda: {name: torch.zeros(())},
            lambda: {f"{name}.x": tensor, f"x.{name}": tensor.clone()},
            dict,
        )
    )()
    return save({**tensors, **replacement})


BYTES = (cut, flip, flip, insert, overwrite, other_content)
BY_SUFFIX: Mapping[str, tuple[Callable[[bytes, random.Random], bytes], ...]] = {
    ".safetensors": (*BYTES, change_header, change_header, change_tensors, change_tensors, change_tensors),
    ".json": (*BYTES, change_json, change_json, change_json, change_json),
    ".jsonl": (*BYTES, change_json, change_json, change_json, change_json),
}


def mutated(content: bytes, suffix: str, rng: random.Random) -> bytes:
    """``content`` of a file with ``suffix`` after one mutation."""
    return rng.choice(BY_SUFFIX.get(suffix, BYTES))(content, rng)


# --- readers


def readers(world: World) -> dict[str, Reader]:
    """The reader of each kind of file, by name."""
    extra = _extra_files(world)
    tiny = Pretrained(str(world.tiny))

    def command(*arguments: str) -> Callable[[Path], object]:
        return lambda folder: _command(*(text.replace("FOLDER", str(folder)) for text in arguments))

    def pipeline(folder: Path) -> object:
        source = Pretrained(str(folder))
        assert source.facts
        source.check()
        return source.load().encode_text(["a photo"])

    def single_file(folder: Path) -> object:
        source = Pretrained(str(folder / "model.safetensors"), config=str(world.tiny))
        source.check()
        return source.load()

    def folder_with(mask: Literal["file"] | None) -> Callable[[Path], object]:
        def read(folder: Path) -> object:
            data = Folder(path=str(folder), batch_size=1, mask=mask)
            data.open(32, 4)
            return [sample.pixels((32, 32), (0.5, 0.5), False) for sample in data.train]

        return read

    def adapter(folder: Path) -> object:
        return load_adapters(tiny.load(), [AdapterFile(str(folder / "file.safetensors"))], tiny)

    def initial_lora(folder: Path) -> object:
        method = LoRA(backbone=tiny, weights=str(folder / "file.safetensors"))
        method.configure_model()
        return method

    def controlnet(folder: Path) -> object:
        method = ControlNet(backbone=tiny, weights=str(folder))
        method.configure_model()
        return method

    models = tuple(sorted(str(f.relative_to(world.tiny)) for f in world.tiny.rglob("*") if f.is_file()))
    photos = tuple(sorted(file.name for file in (extra / "photos").iterdir()))
    run_files = (".hydra/config.yaml", ".hydra/overrides.yaml", ".hydra/hydra.yaml", "metrics.csv", "metrics.json")
    started_files = (*run_files[:4], "checkpoints/step00000001.ckpt")
    return {
        "LoRA of diffusers": Reader(extra / "diffusers", ("file.safetensors",), adapter),
        "LoRA of kohya": Reader(extra / "kohya", ("file.safetensors",), adapter),
        "LoRA to start from": Reader(extra / "kohya", ("file.safetensors",), initial_lora),
        "embedding": Reader(extra / "embedding", ("file.safetensors",), adapter),
        "single file": Reader(extra / "single", ("model.safetensors",), single_file),
        "pipeline folder": Reader(world.tiny, models, pipeline),
        "ControlNet": Reader(extra / "controlnet", ("config.json", "diffusion_pytorch_model.safetensors"), controlnet),
        "image and mask": Reader(extra / "photos", photos, folder_with("file")),
        "caption table": Reader(extra / "tables", ("metadata.jsonl",), folder_with(None)),
        "CSV table": Reader(extra / "csv", ("metadata.csv",), folder_with(None)),
        "caption file": Reader(world.images, ("0.txt",), folder_with(None)),
        "run folder, report": Reader(world.run, run_files, command("report", "FOLDER")),
        "run folder, export": Reader(
            world.run,
            (*run_files[:1], "artifact/mine.safetensors", "artifact/pytorch_lora_weights.safetensors"),
            command("export", "run=FOLDER", "format=kohya", "hydra.run.dir=FOLDER/out"),
        ),
        "checkpoint, resume": Reader(extra / "started", started_files, command("train", "resume=FOLDER")),
        "pickle": Reader(
            extra / "pickle",
            ("model.ckpt",),
            lambda folder: Pretrained(str(folder / "model.ckpt"), config=str(world.tiny), allow_pickle=True).check(),
        ),
    }


def _extra_files(world: World) -> Path:
    """Folders with one valid file of each kind."""
    extra = world.root / "extra"
    for name in ("diffusers", "kohya", "embedding", "single", "photos", "tables", "csv", "pickle"):
        (extra / name).mkdir(parents=True)
    shutil.copy(world.run / "artifact/pytorch_lora_weights.safetensors", extra / "diffusers/file.safetensors")
    shutil.copy(world.places["lora"], extra / "kohya/file.safetensors")
    shutil.copy(world.places["single file"], extra / "single/model.safetensors")
    method = ControlNet(backbone=Pretrained(str(world.tiny)))
    method.configure_model()
    method.controlnet.save_pretrained(extra / "controlnet")
    width = method.backbone.text_encoder.config.hidden_size
    save_file({"emb_params": torch.randn(2, width)}, extra / "embedding/file.safetensors")
    colors = Image.linear_gradient("L").resize((40, 36)).convert("RGB")
    for suffix in ("png", "jpg", "webp", "bmp", "gif", "tiff"):
        colors.save(extra / "photos" / f"{suffix}.{suffix}")
        colors.convert("L").save(extra / "photos" / f"{suffix}.mask.png")
        (extra / "photos" / f"{suffix}.txt").write_text("a photo", encoding="utf-8")
    for name in ("tables", "csv"):
        for index in range(3):
            colors.save(extra / name / f"{index}.png")
    rows = [{"file_name": f"{index}.png", "text": f'a "photo", ü {index}'} for index in range(3)]
    (extra / "tables/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (extra / "csv/metadata.csv").write_text('file_name,text\n0.png,"a, b"\n1.png,b\n2.png,c\n', encoding="utf-8")
    torch.save({"state_dict": load_file(world.places["single file"]), "global_step": 3}, extra / "pickle/model.ckpt")
    shutil.copytree(world.run, extra / "started")
    (extra / "started/metrics.json").unlink()
    return extra


def _command(*arguments: str) -> None:
    """Run a command in this process.

    Raises:
        AssertionError: it ends with another exit code than 0, 1 and 2, or with an error that is not one line.
    """
    out, err = io.StringIO(), io.StringIO()
    code = 0
    argv = patch.object(sys, "argv", ["sdtune", *arguments])
    with argv, contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
    lines = [line for line in err.getvalue().splitlines() if line.startswith("sdtune: ")]
    assert code in (0, 1, 2), f"exit code {code}"
    assert code == 0 or len(lines) == 1, err.getvalue()
    assert "Traceback" not in err.getvalue() + out.getvalue(), err.getvalue()


# --- the search


def search(world: World, seed: int, count: int, only: str | None = None) -> list[tuple[str, str]]:
    """Read ``count`` mutations with each reader; return the problems: what was mutated, and the traceback."""
    failures: list[tuple[str, str]] = []
    copy = world.root.parent / "copy"
    for name, reader in readers(world).items():
        if only is not None and only not in name:
            continue
        answers: Counter[str] = Counter()
        start = time.monotonic()
        for number in range(-1, count):
            rng = random.Random(f"{seed}/{name}/{number}")
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(reader.folder, copy)
            file = copy / rng.choice(reader.files)
            if number >= 0:
                file.write_bytes(mutated(file.read_bytes(), file.suffix, rng))
            answer = in_child(lambda reader=reader: _outcome(reader, copy), SECONDS, MEMORY)
            if answer.startswith("Traceback") or (number < 0 and answer != "read"):
                failures.append((f"{name}, mutation {number} of seed {seed}: {file.relative_to(copy)}", answer))
            answers[answer.partition(":")[0].partition("\n")[0]] += 1
        print(f"{name}: {dict(answers)}, {time.monotonic() - start:.0f} s", flush=True)
    shutil.rmtree(copy, ignore_errors=True)
    return failures


def _outcome(reader: Reader, folder: Path) -> str:
    try:
        reader.read(folder)
    except UserError as error:
        return f"UserError: {error}"
    return "read"


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--count", type=int, default=200, help="mutations for each reader")
    parser.add_argument("--only", help="part of the name of the readers to try")


def _searched(world: World, args: argparse.Namespace) -> list[tuple[str, str]]:
    return search(world, args.seed, args.count, args.only)


if __name__ == "__main__":
    sys.exit(run_search(__doc__, _add_arguments, _searched))
