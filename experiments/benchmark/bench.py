"""``make bench``: step time, memory and start-up of each method, ours and diffusers' example scripts, on this machine.

Each measurement is a process of its own; what is compared alternates. A group of measurements goes
to results.json as soon as it is complete, and the next call goes on with those that are missing; README.md is made
from the file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import diffusers
import torch

from experiments.benchmark.commands import BEST, DOCUMENTED, Command, Shape, images, ours, peer
from experiments.benchmark.gate import gate
from experiments.benchmark.page import groups, page
from experiments.benchmark.sweep import sweeps
from experiments.real_shapes.measure import random_pipeline
from sdtune.files import write_json, write_text

HERE = Path(__file__).parent
ROUNDS = 3
STEPS = {"pocket": 40, "sd15": 5}
"""Optimizer steps of a measurement; the first quarter, at least two, is warm-up."""

HALF = ("amx_bf16", "avx512_bf16")
"""The flags of processors that multiply bfloat16 themselves; on others bf16-mixed is emulated, and its times say
nothing about those that do."""


def measured(watch: str, command: Command, steps: int, folder: Path) -> dict[str, Any]:
    """What ``clock.py`` saw of ``command`` in a fresh process."""
    out = folder / "seen.json"
    out.unlink(missing_ok=True)
    argv = [sys.executable, str(HERE / "clock.py"), watch, str(steps), str(out), command.target, *command.arguments]
    log = folder / "log"
    with log.open("w") as handle:
        began = {"BENCH_BEGAN": repr(time.monotonic()), "SDTUNE_CACHE": str(folder / "cache")}
        began |= {"HF_HOME": str(folder / "cache" / "hf"), "HF_HUB_OFFLINE": "1"}
        run = subprocess.Popen(
            argv, stdout=handle, stderr=subprocess.STDOUT, env=os.environ | began, start_new_session=True
        )
        run.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(run.pid, signal.SIGKILL)  # workers of a data loader
    if not out.is_file():
        raise RuntimeError(f"{' '.join(argv)}: no metrics; its output ends {log.read_text()[-2000:].strip()}")
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def figures(ends: list[float]) -> dict[str, Any]:
    """Of the times at which steps ended, since the process was asked for."""
    warm = max(2, len(ends) // 4)
    each = [later - sooner for sooner, later in zip(ends[warm - 1 :], ends[warm:], strict=False)]
    return {"first_step_seconds": ends[0], "step_seconds": each}


def compared(method: str, shape: Shape, precision: str, examples: Path | None, folder: Path) -> dict[str, Any]:
    """The variants of a method by turns, each several times in a fresh process; and what a step of each does."""
    data, run = folder / f"images-{shape.side}", folder / "run"
    variants = {
        "sdtune": ours(method, shape, data, run, precision),
        "sdtune, no caches": ours(
            method, shape, data, run, precision, "data.cache_latents=false", "data.cache_text=false"
        ),
    }
    if shape.batch > 1:  # to see how far from the machine's own rate a step is, which asks for no peer
        del variants["sdtune, no caches"]
    # Its script cannot be told that pocket's latents are a quarter as wide as the images.
    if examples is not None and (shape.name, method) != ("pocket", "controlnet"):
        documented = DOCUMENTED.get(method, ())
        variants["diffusers"] = peer(examples, method, shape, data, run, precision, *documented)
        if documented or method in BEST:
            variants["diffusers, best flags"] = peer(
                examples, method, shape, data, run, precision, *BEST.get(method, ())
            )
    found: dict[str, Any] = {name: {"step_seconds": [], "first_step_seconds": [], "peak": []} for name in variants}
    for turn in range(ROUNDS):
        for name, command in list(variants.items()):
            for kept in (run, folder / "cache"):
                shutil.rmtree(kept, ignore_errors=True)
            try:
                seen = measured("count" if turn == ROUNDS - 1 else "time", command, STEPS[shape.name], folder)
            except RuntimeError as error:
                if turn or command.target == "sdtune":
                    raise
                found.setdefault("does not run", {})[name] = reason(str(error))
                del variants[name], found[name]
                continue
            found[name] |= {key: seen[key] for key in ("operators", "synchronisations", "flop", "most") if key in seen}
            one = figures(seen["ends"])
            found[name]["step_seconds"].append(median(one["step_seconds"]))
            found[name]["first_step_seconds"].append(one["first_step_seconds"])
            found[name]["peak"].append(seen["peak_memory_bytes"])
            print(f"{shape.name} {method} {precision} {name} {turn}: {median(one['step_seconds']):.3f} s", flush=True)
    shutil.rmtree(run, ignore_errors=True)
    found["rate"] = rate(torch.float32 if precision == "32-true" else torch.bfloat16)
    return found


def reason(output: str) -> str:
    """The exception that a script of diffusers' ended with; its progress bar may be drawn once more behind it."""
    lines = output.splitlines()
    return next((line for line in reversed(lines) if re.match(r"[\w.]*(Error|Exception)\b", line)), lines[-1])


IMPORTS = {
    "torch": "torch",
    "torch and Lightning": "torch, pytorch_lightning",
    "diffusers, transformers and peft": "torch, pytorch_lightning, diffusers, transformers, peft",
    "all that sdtune train imports": "sdtune.commands.train, sdtune.methods, peft.tuners.lora, diffusers.models.unets",
}


def imports() -> dict[str, list[float]]:
    """Seconds that fresh processes take to import what a training does, by turns."""
    found: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for _ in range(ROUNDS):
        for name, modules in IMPORTS.items():
            began = time.monotonic()
            subprocess.run([sys.executable, "-c", f"import {modules}"], check=True, capture_output=True)
            found[name].append(time.monotonic() - began)
    return found


def rate(dtype: torch.dtype, side: int = 2048, times: int = 8) -> float:
    """TFLOP/s that the cores reach in the product of two square matrices, the best of several."""
    one, other = torch.randn(2, side, side).to(dtype)
    best = float("inf")
    for _ in range(times):
        began = time.perf_counter()
        one @ other
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best / 1e12


def machine() -> dict[str, Any]:
    """What the metrics were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    flags = next((line.split(":")[1].split() for line in lines if line.startswith("flags")), [])
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "multiplies bfloat16": [flag for flag in HALF if flag in flags],
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, help="a checkout of diffusers, whose examples are timed too")
    parser.add_argument("--folder", type=Path, default=Path("outputs/benchmark"), help="for weights and runs")
    parser.add_argument("groups", nargs="*", help="beginnings of names such as pocket/lora; all if there is none")
    arguments = parser.parse_args()
    folder: Path = arguments.folder.absolute()
    examples = arguments.peer / "examples" if arguments.peer else None
    if examples is not None and not examples.is_dir():
        raise SystemExit(f"--peer: {arguments.peer} has no folder examples; name a checkout of diffusers")
    names = groups(["32-true", *(["bf16-mixed"] if machine()["multiplies bfloat16"] else [])])
    for prefix in arguments.groups:
        if not any(name.startswith(prefix) for name in names):
            raise SystemExit(f"{prefix}: no group begins so; here there are {', '.join(names)}")
    folder.mkdir(parents=True, exist_ok=True)
    target = HERE / "results.json"
    found: dict[str, Any] = json.loads(target.read_text()) if target.is_file() else {}

    def wanted(name: str) -> bool:
        return name not in found and (not arguments.groups or name.startswith(tuple(arguments.groups)))

    def keep(name: str, figures: dict[str, Any]) -> None:
        found[name] = {**figures, "machine": machine()}
        write_json(target, found)
        write_text(HERE / "README.md", page(found))

    from sdtune.pocket import path

    shapes = {"pocket": Shape("pocket", path(), 64), "sd15": Shape("sd15", folder / "random-sd15", 256)}

    def figured(name: str) -> dict[str, Any]:
        kind, _, rest = name.partition("/")
        if kind == "imports":
            return {"seconds": imports()}
        if kind == "gate":
            return gate(shapes["pocket"])
        what, precision = rest.split("/")
        if kind == "sweep":
            return sweeps(int(what), precision, folder)
        # The floor is the machine's own rate, which asks for wide batches and for no peer.
        shape = replace(shapes["sd15"], batch=4) if kind == "floor" else shapes[kind]
        if shape.name == "sd15":
            # transformers loads in a file's own type, in which diffusers' textual_inversion.py then trains: in float16
            # AdamW's eps of 1e-8 is zero, and the words are infinite after one step.
            random_pipeline(shape.weights, text=torch.float32)
        images(folder / f"images-{shape.side}", shape.side)
        return compared(what, shape, precision, None if kind == "floor" else examples, folder)

    for name in names:
        if wanted(name):
            keep(name, figured(name))
    write_text(HERE / "README.md", page(found))


if __name__ == "__main__":
    main()
