"""Generated configurations: each is checked without training, and some of those that are accepted are run.

    python tests/fuzz/configurations.py --seed 0 --count 1000 --runs 100

A configuration is a command line of sdtune on tiny models, with valid choices for its groups, in which one to three
settings have unusual values: another type, out of range, huge, null, NaN, text in other alphabets, other files.
Whatever it is, the answer must be one line or a run, never a traceback, and invalid input must leave no folder.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import random
import shlex
import shutil
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))

from omegaconf import DictConfig, OmegaConf

from fuzz.child import in_child, limited
from fuzz.world import World, run_search
from sdtune.cli import launch as launch_module
from sdtune.cli.main import COMMANDS, main
from sdtune.config.compose import compose, search_path, without_hydra
from sdtune.quoting import override
from sdtune.runs.compare import flat

CHECK_SECONDS, RUN_SECONDS = 60, 240
MEMORY = 8 * 2**30
"""Bytes that a run may allocate."""

VALUES: tuple[str, ...] = (
    *("null", "true", "false", "0", "1", "-1", "2", "3", "7", "0.5", "1.0", "-0.1", "1e-30", "1e30", "1e400", "nan"),
    *("inf", "-inf", "99999999999", "9223372036854775808", "''", "abc", "'ü漢🦊'", "'a b'", "'[bold]x[/bold]'"),
    *("'{}'", "'%s'", "'\\n'", "auto", "???", "[]", "[1]", "[null]", "[a,1]", "[[]]", "{}", "{a: 1}", "{a: {b: null}}"),
    *("{_target_: os.system}", "{_target_: sdtune.methods.LoRA}", "'${seed}'", "'${nothing}'"),
)
"""Values of any kind, as they are typed."""

CHOICES: dict[str, tuple[str, ...]] = {
    "method": ("lora", "lora", "lora", "full", "dreambooth", "textual_inversion", "controlnet"),
    "objective": ("simple", "min_snr"),
    "optimizer": ("adamw", "adafactor", "prodigy"),
    "lr_schedule": ("constant", "cosine", "linear", "polynomial"),
    "callbacks": ("default", "ema", "early_stopping"),
    "data/control": ("none", "none", "canny", "scribble", "paired"),
    "evaluation": ("none", "none", "clip"),
    "debug": ("none", "none", "none", "smoke", "overfit", "anomaly"),
}

_NEEDED = {
    "textual_inversion": ('new_tokens=[{token: "<cat>", init: a}]', "data.templates=['<cat> {}']"),
    "controlnet": ("data/control=canny",),
    "dreambooth": ("data.class_prompt=a dog", "data.class_images=2"),
}

_FIXED = ("hydra", "paths", "resume", "hardware.devices", "hardware.num_nodes", "logger", "exports.push_to", "push_to")
"""Keys that are not changed: folders of the test, processes, services on the network."""

_PATHS = ("path", "weights", "vae", "config", "run", "artifact", "clip", "dino", "prompts_file", "image")


_LISTS = {
    "adapters": ("path", "strength", "path", "other"),
    "control": ("path", "image", "strength", "preprocess"),
    "new_tokens": ("token", "init", "vectors", "weights", "overwrite"),
    "exports": ("format", "dtype", "rank", "strength"),
}
"""Keys of the entries of lists of mappings."""


class Accepted(Exception):
    """Raised in place of the work of a command whose configuration was accepted."""


@dataclass(frozen=True)
class Case:
    """A command line of sdtune, and the key that was changed last."""

    command: str
    overrides: tuple[str, ...]

    def __str__(self) -> str:
        return shlex.join(["sdtune", self.command, *self.overrides])


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its exit code, its lines on stderr, and what is wrong with that; None if nothing."""

    code: int
    errors: str
    problem: str | None


def generate(world: World, seed: int, number: int) -> Case:
    """Configuration ``number`` of ``seed``; it depends on nothing else."""
    rng = random.Random(f"{seed}/{number}")
    command = rng.choices(("train", "sample", "export", "plan", "prepare"), (70, 12, 6, 6, 6))[0]
    base = _base(command, world, rng)
    keys = _keys(command, tuple(o for o in base if not any(str(path) in o for path in world.places.values())))
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3))):
        key = rng.choice(keys)
        base.append(f"{key}={_value(key, world, rng)}")
    return Case(command, tuple(base))


def _base(command: str, world: World, rng: random.Random) -> list[str]:
    """A valid command line."""
    backbone = ["backbone=sd15", f"backbone.path={world.tiny}"]
    if command == "sample":
        adapters = [f"adapters=[{{path: '{world.places['lora']}'}}]"] if rng.random() < 0.5 else []
        return [*backbone, "prompt=a", "hardware=cpu", "sampling.steps=1", "seeds=[0]", *adapters]
    if command == "export":
        export_format = rng.choice(("diffusers", "kohya", "pipeline", "single_file"))
        return [f"run={world.run}", f"format={export_format}", *backbone]
    method = rng.choice(CHOICES["method"])
    chosen = {group: rng.choice(options) for group, options in CHOICES.items() if group != "method"}
    groups = {"method": method, **chosen, "data": "folder", "hardware": "cpu"}
    needed = _NEEDED.get(method, ())
    overrides = [
        f"{group}={option}" for group, option in groups.items() if group not in {n.partition("=")[0] for n in needed}
    ]
    small = ["trainer.max_steps=2", "callbacks.samples.sampling.steps=1", "lr_schedule.warmup_steps=0"]
    overrides += ["data.hold_out=2"] if chosen["callbacks"] == "early_stopping" else []
    overrides += [*backbone, f"data.path={world.images}", *small, *needed]
    if command == "plan":
        overrides += [] if rng.random() < 0.7 else ["methods=all"]
    return overrides


@cache
def _keys(command: str, overrides: tuple[str, ...]) -> list[str]:
    """Keys of the composed config that may be changed."""
    config = compose(command, search_path(None), list(overrides))
    plain: Any = OmegaConf.to_container(without_hydra(config))
    keys = [key for key in flat(plain) if not key.startswith(_FIXED) and not key.endswith("_target_")]
    parents = sorted({key.rpartition(".")[0] for key in keys if "." in key})
    return [*keys, *(parent for parent in parents if not parent.startswith(_FIXED))]


def _value(key: str, world: World, rng: random.Random) -> str:
    name = key.rpartition(".")[2]
    if name in _PATHS and rng.random() < 0.7:
        place = rng.choice(sorted(world.places.values()))
        return f"'{place}'"
    if name in _LISTS and rng.random() < 0.7:
        entries = {entry: _value(entry, world, rng) for entry in rng.sample(_LISTS[name], rng.randint(1, 3))}
        return f"[{{{', '.join(f'{entry}: {value}' for entry, value in entries.items())}}}]"
    if rng.random() < 0.2:  # a plausible number
        return repr(rng.choice((rng.randint(0, 9), round(rng.random(), 3), 10.0 ** rng.randint(-8, 3))))
    return rng.choice(VALUES)


def check(case: Case, folder: Path) -> Outcome:
    """Check ``case`` as the command does before its work; ``folder`` is the output folder that it names."""

    def prepare_only(module: str) -> Callable[[DictConfig, Path], Any]:
        prepare = _lazy_command(module)

        def checked(config: DictConfig, output: Path) -> Any:
            prepare(config, output)
            raise Accepted

        return checked

    with patch.object(launch_module, "lazy_command", prepare_only):
        return _answer(case, folder, CHECK_SECONDS)


def run(case: Case, folder: Path) -> Outcome:
    """Run ``case`` in a process of its own with limited memory."""

    def answer() -> str:
        outcome = _answer(case, folder, RUN_SECONDS)
        return f"{outcome.code}\n{outcome.problem or outcome.errors}\n{outcome.problem is not None}"

    text = in_child(answer, RUN_SECONDS + 10, MEMORY)
    if text.startswith("Traceback"):
        return Outcome(-1, "", text)
    code, _, rest = text.partition("\n")
    errors, _, is_problem = rest.rpartition("\n")
    return Outcome(int(code), errors, errors if is_problem == "True" else None)


def _answer(case: Case, folder: Path, seconds: int) -> Outcome:
    argv = ["sdtune", case.command, *case.overrides]
    argv += [override("hydra.run.dir", folder)] if COMMANDS[case.command].writes else []
    out, err = io.StringIO(), io.StringIO()
    code, problem = 0, None
    with patch.object(sys, "argv", argv), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            with limited(seconds):
                main()
        except Accepted:
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            code, problem = 1, traceback.format_exc()
    lines = [line for line in err.getvalue().splitlines() if line.startswith("sdtune: ")]
    if problem is None and "Traceback" in err.getvalue() + out.getvalue():
        problem = err.getvalue()
    if problem is None and code == 2 and len(lines) != 1:
        problem = f"exit code 2 with {len(lines)} lines: {lines}"
    if problem is None and code not in (0, 1, 2):
        problem = f"exit code {code}"
    if problem is None and code == 2 and folder.exists():
        problem = f"{folder} was left: {[file.name for file in folder.iterdir()]}"
    shutil.rmtree(folder, ignore_errors=True)
    return Outcome(code, "\n".join(lines), problem)


_lazy_command = launch_module.lazy_command


def search(world: World, seed: int, count: int, runs: int) -> list[tuple[Case, str]]:
    """Check ``count`` configurations, run the first ``runs`` that were accepted, and return those with a problem."""
    before, failures, accepted = world.fingerprint(), [], []
    codes: Counter[str] = Counter()
    folder = world.root.parent / "output"
    start = time.monotonic()
    for number in range(count):
        case = generate(world, seed, number)
        outcome = check(case, folder)
        codes[f"checked: exit code {outcome.code}"] += 1
        if outcome.problem is not None:
            failures.append((case, outcome.problem))
        elif outcome.code == 0:
            accepted.append(case)
        if number % 100 == 99:
            print(f"{number + 1} checked, {len(failures)} problems, {time.monotonic() - start:.0f} s", flush=True)
    for number, case in enumerate(accepted[:runs]):
        outcome = run(case, folder)
        codes[f"run: exit code {outcome.code}"] += 1
        if outcome.problem is not None:
            failures.append((case, outcome.problem))
        if number % 10 == 9:
            print(f"{number + 1} run, {len(failures)} problems, {time.monotonic() - start:.0f} s", flush=True)
    if world.fingerprint() != before:
        failures.append((Case("", ()), "a command has changed its input files"))
    for name, times in sorted(codes.items()):
        print(f"{name}: {times}")
    return failures


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--count", type=int, default=1000, help="configurations to check")
    parser.add_argument("--runs", type=int, default=100, help="accepted configurations to run")


def _searched(world: World, args: argparse.Namespace) -> list[tuple[str, str]]:
    return [(str(case), problem) for case, problem in search(world, args.seed, args.count, args.runs)]


if __name__ == "__main__":
    sys.exit(run_search(__doc__, _add_arguments, _searched))
