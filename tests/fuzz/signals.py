"""Stop trainings at random moments of each phase, resume them, and compare them with an uninterrupted training.

    python tests/fuzz/signals.py --seed 0 --method lora --moments 10
    python tests/fuzz/signals.py --seed 0 --method lora --moments 10 --kill
    python tests/fuzz/signals.py --seed 0 --method lora --moments 5 --kill --data all --phase training

SIGINT, SIGTERM and SIGHUP must be answered by a line within a second and end the run within one unit of the phase.
After them and after SIGKILL, ``resume=`` (or the same command, if there is no run folder yet) must end with the same
metrics and the same artifact, bit for bit.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from safetensors.torch import load_file

import default_signals  # noqa: F401
from fuzz.world import World, run_search
from sdtune.callbacks.samples import Samples
from sdtune.cli.main import main
from sdtune.data import Folder, ImageDataModule
from sdtune.evaluation import ClipMetrics
from sdtune.methods.base import Adapter
from sdtune.runs.metrics import OF_TRAINING

PHASES: dict[str, tuple[type, str]] = {
    "reading": (Folder, "read"),
    "class images": (ImageDataModule, "generate_class_images"),
    "caching": (ImageDataModule, "prepare"),
    "preview": (Samples, "draw"),
    "training": (Adapter, "training_step"),
    "validation": (Adapter, "validation_step"),
    "artifact": (Adapter, "artifact"),
    "evaluation": (ClipMetrics, "run"),
}
"""The function whose calls make up a phase."""

DATA: dict[str, tuple[str, ...]] = {
    "folder": (),
    "tags": (
        *("data.captions.kind=tags", "data.captions.shuffle=true", "data.captions.caption_tag_dropout_rate=0.3"),
        "data.captions.suffix=', a, b, c, d, e'",
    ),
    "drawn": ("data.captions.wildcards=true", "data.captions.prefix='{red|blue|green} {cat|dog}'"),
    "mix": (
        *("data.sources.a.path={images}", "data.sources.a.weight=0.7", "data.sources.a.hold_out=3"),
        *("data.sources.b.path={images}", "data.sources.b.loss_weight=0.5"),
        *("data.sources.b.captions.kind=tags", "data.sources.b.captions.shuffle=true"),
    ),
    "resolutions": ("data.resolution=[32,64]",),
}
"""Kinds of data, with the overrides that choose them."""

METHODS = ("lora", "full", "dreambooth", "textual_inversion", "controlnet")
ANSWER_SECONDS, SECONDS = 1.0, 240
TOO_LATE_SECONDS = 0.5
"""Limit from signal to end for a process that exits with 0: the signal came after its last file."""
END_SECONDS = 5.0
"""Limit from signal to end: one unit of a phase of the tiny models and its saving take well below a second."""


@dataclass(frozen=True)
class Moment:
    """When a signal is sent: ``delay`` seconds after call ``call`` of the function of ``phase`` has begun."""

    phase: str
    call: int
    delay: float
    number: signal.Signals

    def __str__(self) -> str:
        return f"{self.number.name} {self.delay:.3f} s into call {self.call} of {self.phase}"


@dataclass(frozen=True)
class Ended:
    """How a process ended; times in seconds, of :func:`time.monotonic`."""

    code: int
    sent: float | None
    answered: float | None
    at: float
    output: str


def command(world: World, method: str, data: str) -> list[str]:
    """Overrides of a short training with all phases."""
    source = ("data=mix",) if data == "mix" else ("data=folder", f"data.path={world.images}", "data.hold_out=3")
    own = [text.replace("{images}", str(world.images)) for text in DATA[data]]
    needed = {
        "textual_inversion": ('new_tokens=[{token: "<cat>", init: a}]', "data.templates=['<cat> {}']"),
        "controlnet": ("data/control=canny",),
    }.get(method, ())
    prior = () if method in ("textual_inversion", "controlnet") else ("data.class_prompt=a dog", "data.class_images=6")
    return [
        *(
            f"method={method}",
            "backbone=sd15",
            f"backbone.path={world.tiny}",
        ),
        *(*source, *own, "trainer.max_steps=8", "trainer.val_check_interval=3", "checkpoint.every_steps=2"),
        *("callbacks=ema", "callbacks.samples.every_steps=3", "callbacks.samples.sampling.steps=3"),
        *("evaluation.images=8", "evaluation.sampling.steps=3", "evaluation.clip=null", "trainer.log_every_n_steps=2"),
        *("hardware=cpu", "hardware.precision=32-true", "optimizer.lr=1e-3", "name=mine", *needed, *prior),
    ]


# --- one process


def run(overrides: Sequence[str], log: Path, moment: Moment | None = None, calls: Path | None = None) -> Ended:
    """Run ``sdtune train`` in a forked process.

    Args:
        overrides: its arguments.
        log: file for its output.
        moment: when it sends itself a signal.
        calls: file for the durations of the calls of each phase.
    """
    sent_file = log.with_suffix(".sent")
    sent_file.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        _child(overrides, log, moment, calls, sent_file)
    answered = None
    deadline = time.monotonic() + SECONDS
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if answered is None and sent_file.exists() and b"sdtune: stop" in log.read_bytes():
            answered = time.monotonic()
        if pid:
            break
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
    sent = float(sent_file.read_text(encoding="utf-8")) if sent_file.exists() else None
    code = os.waitstatus_to_exitcode(status)
    output = log.read_text(encoding="utf-8", errors="replace")
    if answered is None and sent is not None and "sdtune: stop" in output:
        answered = time.monotonic()
    return Ended(code, sent, answered, time.monotonic(), output)


def _child(overrides: Sequence[str], log: Path, moment: Moment | None, calls: Path | None, sent_file: Path) -> None:
    """Run the command and end the process."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(stream), "w", buffering=1) for stream in (1, 2))
    durations: dict[str, list[float]] = {phase: [] for phase in PHASES}
    code = 0
    faulthandler.dump_traceback_later(SECONDS - 40)
    try:
        with _watched(durations, moment, sent_file), patch.object(sys, "argv", ["sdtune", "train", *overrides]):
            main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    if calls is not None:
        calls.write_text(json.dumps(durations), encoding="utf-8")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def _watched(durations: dict[str, list[float]], moment: Moment | None, sent_file: Path) -> Iterator[None]:
    """Context manager that measures the calls of each phase and starts the timer of ``moment``."""

    def send(number: signal.Signals) -> None:
        sent_file.write_text(repr(time.monotonic()), encoding="utf-8")
        os.kill(os.getpid(), number)

    def watched(function: Callable[..., Any], phase: str, *args: Any, **kwargs: Any) -> Any:
        if moment is not None and (phase, len(durations[phase])) == (moment.phase, moment.call):
            timer = threading.Timer(moment.delay, send, (moment.number,))
            timer.daemon = True
            timer.start()
        durations[phase].append(0.0)
        start = time.monotonic()
        try:
            return function(*args, **kwargs)
        finally:
            durations[phase][-1] = time.monotonic() - start

    with ExitStack() as stack:
        for phase, (owner, name) in PHASES.items():
            original = getattr(owner, name)
            # A function, not a partial object, so that it becomes a method.
            stack.enter_context(patch.object(owner, name, _method(partial(watched, original, phase))))
        yield


def _method(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: function(*args, **kwargs)


# --- comparison


def result(folder: Path) -> dict[str, Any]:
    """What must not depend on interruptions: metrics, except costs, and all tensors of the artifact."""
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    costs = set(OF_TRAINING) - {"steps", "validation_loss", "validation_step"}
    tensors = {
        f"{file.relative_to(folder)}: {key}": tensor
        for file in sorted((folder / "artifact").rglob("*.safetensors"))
        for key, tensor in load_file(file).items()
    }
    return {
        "metrics.csv": (folder / "metrics.csv").read_text(encoding="utf-8"),
        "metrics.json": {key: value for key, value in metrics.items() if key not in costs},
        **tensors,
    }


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of the entries of two results that differ."""
    return [name for name in sorted({*one, *other}) if not _equal(one.get(name), other.get(name))]


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)


# --- the search


def interrupted(
    world: World,
    method: str,
    data: str,
    seed: int,
    moments: int,
    kill: bool,
    phases: Sequence[str] = tuple(PHASES),
) -> list[tuple[str, str]]:
    """Interrupt ``moments`` trainings in each phase; return the problems: the moment, and what is wrong."""
    rng, base = random.Random(f"{seed}/{method}/{kill}"), world.root.parent / f"{method}-{data}-{seed}"
    overrides = command(world, method, data)
    base.mkdir()
    whole, calls = base / "whole", base / "calls.json"
    ended = _in_own_cache(base / "cache-whole", lambda: run(_in(whole, overrides), base / "log", calls=calls))
    assert ended.code == 0, ended.output
    expected, durations = result(whole), json.loads(calls.read_text(encoding="utf-8"))
    failures: list[tuple[str, str]] = []
    for phase in phases:
        outcomes: Counter[str] = Counter()
        answers, ends = [0.0], [0.0]
        for index in range(moments if durations[phase] and durations[phase][0] > 1e-4 else 0):
            call = rng.randrange(len(durations[phase]))
            number = signal.SIGKILL if kill else rng.choice((signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
            moment = Moment(phase, call, rng.uniform(0, durations[phase][call]), number)
            folder = base / f"{phase}-{index}"
            trial = partial(_trial, overrides, folder, moment, expected)
            ended, problem = _in_own_cache(base / f"cache-{phase}-{index}", trial)
            if problem is not None:
                failures.append((f"{method}, {data}: {moment}", problem))
            outcomes["not sent" if ended.sent is None else f"exit code {ended.code}"] += 1
            if ended.sent is not None:
                ends.append(ended.at - ended.sent)
                answers.append((ended.answered or ended.sent) - ended.sent)
        if outcomes and outcomes["not sent"] == outcomes.total():
            failures.append((f"{method}, {data}: {phase}", "no signal was sent: every run ended before its moment"))
        print(
            f"{method}, {data}, {phase}: {dict(outcomes)}, longest answer {max(answers):.2f} s,"
            f" longest end {max(ends):.2f} s",
            flush=True,
        )
    return failures


def _trial(training: Sequence[str], folder: Path, moment: Moment, expected: dict[str, Any]) -> tuple[Ended, str | None]:
    """Interrupt one training, resume it and compare it."""
    log = folder.with_suffix(".log")
    overrides = _in(folder, training)
    ended = run(overrides, log, moment)
    if ended.code == 0 and ended.sent is not None and ended.at - ended.sent > TOO_LATE_SECONDS:
        return ended, f"the signal was ignored: {ended.output[-2000:]}"
    if moment.number != signal.SIGKILL and ended.code != 0:
        if ended.code != 128 + moment.number:
            return ended, f"exit code {ended.code}: {ended.output[-2000:]}"
        assert ended.sent is not None
        if ended.answered is None or ended.answered - ended.sent > ANSWER_SECONDS:
            return ended, f"no answer within {ANSWER_SECONDS} s: {ended.output[-2000:]}"
        if ended.at - ended.sent > END_SECONDS:
            return ended, f"ended {ended.at - ended.sent:.1f} s after the signal: {ended.output[-2000:]}"
    if not (folder / "metrics.json").is_file():
        started = (folder / ".hydra" / "overrides.yaml").is_file()
        resumed = run([f"resume={folder}"] if started else overrides, log)
        if resumed.code != 0:
            return ended, f"resumed: exit code {resumed.code}: {resumed.output[-2000:]}"
    changed = differences(expected, result(folder))
    return ended, f"other results: {changed[:5]}" if changed else None


def _in(folder: Path, overrides: Sequence[str]) -> list[str]:
    return [*overrides, f"hydra.run.dir='{folder}'"]


def _in_own_cache(cache: Path, function: Callable[[], Any]) -> Any:
    with patch.dict(os.environ, {"XDG_CACHE_HOME": str(cache)}):
        return function()


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--method", choices=(*METHODS, "all"), default="all")
    parser.add_argument("--data", choices=(*DATA, "all"), default="folder")
    parser.add_argument("--moments", type=int, default=3, help="interruptions in each phase")
    parser.add_argument("--phase", choices=tuple(PHASES), action="append", help="only this phase")
    parser.add_argument("--kill", action="store_true", help="SIGKILL instead of SIGINT, SIGTERM and SIGHUP")


def _searched(world: World, args: argparse.Namespace) -> list[tuple[str, str]]:
    torch.set_num_threads(1)
    phases = args.phase or tuple(PHASES)
    methods = METHODS if args.method == "all" else (args.method,)
    kinds = tuple(DATA) if args.data == "all" else (args.data,)
    found = (
        interrupted(world, method, data, args.seed, args.moments, args.kill, phases)
        for method in methods
        for data in kinds
    )
    return [failure for failures in found for failure in failures]


if __name__ == "__main__":
    sys.exit(run_search(__doc__, _add_arguments, _searched))
