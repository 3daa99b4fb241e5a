"""Benchmark (``make bench``): step time, memory and start-up of each method, of sdtune and diffusers' example scripts.

Each measurement runs in a separate process; the compared variants alternate. Each completed group of measurements is
saved to results.json, and the next call continues with the missing groups. README.md is generated from that file.
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
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import diffusers
import torch

from experiments.benchmark.commands import BEST, DOCUMENTED, Command, Shape, images, kohya, ours, peer
from experiments.benchmark.gate import gate
from experiments.benchmark.page import KOHYA, WARM, groups, page
from experiments.benchmark.sweep import sweeps
from experiments.real_shapes.measure import random_pipeline
from sdtune.files import write_json, write_text

HERE = Path(__file__).parent
SOURCE = HERE.parents[1] / "src"
ROUNDS = 3
STEPS = {"pocket": 40, "sd15": 5}
"""Optimizer steps per measurement; the first quarter, at least two, is warm-up."""

HALF = ("amx_bf16", "avx512_bf16")
"""CPU flags of native bfloat16 multiplication; without them bf16-mixed is emulated, and its times are meaningless."""


def measured(watch: str, command: Command, steps: int, folder: Path) -> dict[str, Any]:
    """Metrics that ``clock.py`` records of ``command`` in a new process."""
    out = folder / "seen.json"
    out.unlink(missing_ok=True)
    argv = [command.python, str(HERE / "clock.py"), watch, str(steps), str(out), command.target, *command.arguments]
    log = folder / "log"
    with log.open("w") as handle:
        environment = {"BENCH_BEGAN": repr(time.monotonic()), "SDTUNE_CACHE": str(folder / "cache")}
        environment |= {"HF_HOME": str(folder / "cache" / "hf"), "HF_HUB_OFFLINE": "1"}
        if command.python != sys.executable:  # clock.py uses sdtune, which kohya's environment lacks
            environment |= {"PYTHONPATH": str(SOURCE)}
        run = subprocess.Popen(
            argv, stdout=handle, stderr=subprocess.STDOUT, env=os.environ | environment, start_new_session=True
        )
        run.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(run.pid, signal.SIGKILL)  # remaining data loader workers
    if not out.is_file():
        raise RuntimeError(
            f"{' '.join(argv)} wrote no metrics; end of its output: {log.read_text(encoding='utf-8')[-2000:].strip()}"
        )
    metrics: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return metrics


def figures(ends: list[float]) -> dict[str, Any]:
    """Step times and time to the first step in seconds, from the end times of the steps since the process start."""
    warmup = max(2, len(ends) // 4)
    step_seconds = [end - start for start, end in zip(ends[warmup - 1 :], ends[warmup:], strict=False)]
    return {"first_step_seconds": ends[0], "step_seconds": step_seconds}


@dataclass(frozen=True)
class Peers:
    """Other trainers that are measured.

    Args:
        examples: folder ``examples`` of a checkout of diffusers; None: it is not measured.
        kohya: checkout of kohya's sd-scripts; None: it is not measured.
        kohya_python: interpreter of the environment with their requirements.
    """

    examples: Path | None = None
    kohya: Path | None = None
    kohya_python: Path = HERE.parents[1] / ".venv-kohya" / "bin" / "python"


def variants_of(method: str, shape: Shape, precision: str, peers: Peers, data: Path, run: Path) -> dict[str, Command]:
    """Commands that are compared for a method, in the order in which they alternate."""
    own = ours(method, shape, data, run, precision)
    if shape.batch > 1:  # these groups only compare sdtune with the matrix rate
        return {"sdtune": own}
    uncached = ours(method, shape, data, run, precision, "data.cache_latents=false", "data.cache_text=false")
    variants = {"sdtune": own, WARM: own, "sdtune, no caches": uncached}
    # diffusers' ControlNet script does not support pocket's latents, whose side is a quarter of the image side.
    if peers.examples is not None and (shape.name, method) != ("pocket", "controlnet"):
        documented = DOCUMENTED.get(method, ())
        variants["diffusers"] = peer(peers.examples, method, shape, data, run, precision, *documented)
        if documented or method in BEST:
            best = BEST.get(method, ())
            variants["diffusers, best flags"] = peer(peers.examples, method, shape, data, run, precision, *best)
    if peers.kohya is not None and (shape.name, method) == ("sd15", "lora"):
        variants[KOHYA] = kohya(peers.kohya, peers.kohya_python, shape, data, run, precision)
    return variants


def compared(method: str, shape: Shape, precision: str, peers: Peers, folder: Path) -> dict[str, Any]:
    """Measure the variants of a method in turn, each several times in a new process, and the work of one step."""
    data, run = folder / f"images-{shape.side}", folder / "run"
    variants = variants_of(method, shape, precision, peers, data, run)
    results: dict[str, Any] = {name: {"step_seconds": [], "first_step_seconds": [], "peak": []} for name in variants}
    for turn in range(ROUNDS):
        for name, command in list(variants.items()):
            for stale in (run, *([folder / "cache"] if name != WARM else [])):
                shutil.rmtree(stale, ignore_errors=True)
            try:
                metrics = measured("count" if turn == ROUNDS - 1 else "time", command, STEPS[shape.name], folder)
            except RuntimeError as error:
                if turn or command.target == "sdtune":
                    raise
                results.setdefault("does not run", {})[name] = reason(str(error))
                del variants[name], results[name]
                continue
            results[name] |= {
                key: metrics[key] for key in ("operators", "synchronisations", "flop", "most") if key in metrics
            }
            times = figures(metrics["ends"])
            results[name]["step_seconds"].append(median(times["step_seconds"]))
            results[name]["first_step_seconds"].append(times["first_step_seconds"])
            results[name]["peak"].append(metrics["peak_memory_bytes"])
            print(f"{shape.name} {method} {precision} {name} {turn}: {median(times['step_seconds']):.3f} s", flush=True)
    shutil.rmtree(run, ignore_errors=True)
    results["rate"] = rate(torch.float32 if precision == "32-true" else torch.bfloat16)
    return results


def reason(output: str) -> str:
    """Exception that ended a diffusers script; its progress bar may print another line after it."""
    lines = output.splitlines()
    return next((line for line in reversed(lines) if re.match(r"[\w.]*(Error|Exception)\b", line)), lines[-1])


IMPORTS = {
    "torch": "torch",
    "torch and Lightning": "torch, pytorch_lightning",
    "diffusers, transformers and peft": "torch, pytorch_lightning, diffusers, transformers, peft",
    "all that sdtune train imports": "sdtune.commands.train, sdtune.methods, peft.tuners.lora, diffusers.models.unets",
}


def imports() -> dict[str, list[float]]:
    """Seconds that new processes need to import the modules of a training, measured in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for _ in range(ROUNDS):
        for name, modules in IMPORTS.items():
            began = time.monotonic()
            subprocess.run([sys.executable, "-c", f"import {modules}"], check=True, capture_output=True)
            seconds[name].append(time.monotonic() - began)
    return seconds


def rate(dtype: torch.dtype, side: int = 2048, times: int = 8) -> float:
    """Matrix rate: TFLOP/s of the product of two square matrices on all cores, the best of ``times`` measurements."""
    a, b = torch.randn(2, side, side).to(dtype)
    best = float("inf")
    for _ in range(times):
        began = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best / 1e12


def machine() -> dict[str, Any]:
    """Processor, number of cores and library versions of this machine."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
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


def checked_peers(diffusers_checkout: Path | None, kohya_checkout: Path | None) -> Peers:
    examples = diffusers_checkout.absolute() / "examples" if diffusers_checkout else None
    if examples is not None and not examples.is_dir():
        raise SystemExit(f"--peer: {diffusers_checkout} has no folder named examples; use a checkout of diffusers")
    peers = Peers(examples, kohya_checkout.absolute() if kohya_checkout else None)
    if peers.kohya is not None and not (peers.kohya / "train_network.py").is_file():
        raise SystemExit(f"--kohya: {kohya_checkout} has no file train_network.py; use a checkout of sd-scripts")
    if peers.kohya is not None and not peers.kohya_python.is_file():
        raise SystemExit(f"--kohya: {peers.kohya_python} does not exist; run make bench KOHYA={kohya_checkout}")
    return peers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, help="checkout of diffusers; its example scripts are measured too")
    parser.add_argument("--kohya", type=Path, help="checkout of kohya's sd-scripts; train_network.py is measured too")
    parser.add_argument("--folder", type=Path, default=Path("outputs/benchmark"), help="folder for weights and runs")
    parser.add_argument("groups", nargs="*", help="prefixes of group names, such as pocket/lora; default: all groups")
    arguments = parser.parse_args()
    folder: Path = arguments.folder.absolute()
    peers = checked_peers(arguments.peer, arguments.kohya)
    names = groups(["32-true", *(["bf16-mixed"] if machine()["multiplies bfloat16"] else [])])
    for prefix in arguments.groups:
        if not any(name.startswith(prefix) for name in names):
            raise SystemExit(f"groups: no group name starts with {prefix}; available: {', '.join(names)}")
    folder.mkdir(parents=True, exist_ok=True)
    target = HERE / "results.json"
    results: dict[str, Any] = json.loads(target.read_text(encoding="utf-8")) if target.is_file() else {}

    def is_missing(name: str) -> bool:
        return name not in results and (not arguments.groups or name.startswith(tuple(arguments.groups)))

    def save(name: str, group: dict[str, Any]) -> None:
        results[name] = {**group, "machine": machine()}
        write_json(target, results)
        write_text(HERE / "README.md", page(results))

    from sdtune.pocket import path

    shapes = {"pocket": Shape("pocket", path(), 64), "sd15": Shape("sd15", folder / "random-sd15", 256)}

    def measure(name: str) -> dict[str, Any]:
        kind, _, rest = name.partition("/")
        if kind == "imports":
            return {"seconds": imports()}
        if kind == "gate":
            return gate(shapes["pocket"])
        method_or_batch, precision = rest.split("/")
        if kind == "sweep":
            return sweeps(int(method_or_batch), precision, folder)
        # The floor group compares sdtune with the matrix rate, at a larger batch size and without diffusers.
        shape = replace(shapes["sd15"], batch=4) if kind == "floor" else shapes[kind]
        if shape.name == "sd15":
            # diffusers' textual_inversion.py trains the text encoder in the dtype of its file. In float16, AdamW's eps
            # of 1e-8 is rounded to zero, and the trained embeddings are infinite after one step.
            random_pipeline(shape.weights, text=torch.float32)
        images(folder / f"images-{shape.side}", shape.side)
        return compared(method_or_batch, shape, precision, Peers() if kind == "floor" else peers, folder)

    for name in names:
        if is_missing(name):
            save(name, measure(name))
    write_text(HERE / "README.md", page(results))


if __name__ == "__main__":
    main()
