"""One measurement: runs a training command in this process and watches its optimizer steps, ours and a peer's alike.

``python clock.py WATCH STEPS OUT TARGET ARGUMENTS...``, where TARGET is a module or a script. The process ends after
STEPS optimizer steps, so that what a trainer saves at its end costs no time here. WATCH is ``time`` (when each step
ended, and the most memory that was resident) or ``count`` (operators, scalar synchronisations and arithmetic of the
last step). ``$BENCH_BEGAN`` is the monotonic clock's time when the process was asked for.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

SYNCHRONISING = ("aten._local_scalar_dense.default", "aten.equal.default", "aten.nonzero.default")
"""Operators that make a program wait for its device."""


class Counted(TorchDispatchMode):
    """Counts the operators that reach the dispatcher, views and detaches included."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators[str(func)] += 1
        return func(*args, **(kwargs or {}))


def peak_memory() -> int:
    """Bytes: the most that was resident since the process began."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def timed(steps: int, out: Path) -> Callable[..., None]:
    """A hook that notes when each step ended."""
    began = float(os.environ["BENCH_BEGAN"])
    ends: list[float] = []

    def after(*_: Any) -> None:
        ends.append(time.monotonic() - began)
        if len(ends) == steps:
            leave(out, {"ends": ends, "peak_memory_bytes": peak_memory(), "threads": torch.get_num_threads()})

    return after


def counted(steps: int, out: Path) -> Callable[..., None]:
    """A hook that counts what happens between the last two steps."""
    operators, flops = Counted(), FlopCounterMode(display=False)
    made = 0

    def after(*_: Any) -> None:
        nonlocal made
        made += 1
        if made == steps - 1:
            flops.__enter__()
            operators.__enter__()
        elif made == steps:
            operators.__exit__(None, None, None)
            flops.__exit__(None, None, None)
            found = operators.operators
            leave(
                out,
                {
                    "operators": sum(found.values()),
                    "synchronisations": sum(found[name] for name in SYNCHRONISING),
                    "flop": flops.get_total_flops(),
                    "most": dict(found.most_common(20)),
                },
            )

    return after


def leave(out: Path, found: dict[str, Any]) -> None:
    """Write the figures and end the process at once."""
    out.write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)


def main() -> None:
    watch, steps, out, target, *arguments = sys.argv[1:]
    hook = {"time": timed, "count": counted}[watch](int(steps), Path(out))
    register_optimizer_step_post_hook(hook)
    if target.startswith("sdtune."):
        from sdtune.callbacks import cost

        # A run's own figure counts from each step anew; here all count from the start of the process.
        cost.reset_peak_memory = lambda device: None
    sys.argv = [target, *arguments]
    if target.endswith(".py"):
        sys.path[0] = str(Path(target).parent)
        runpy.run_path(target, run_name="__main__")
    else:
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    raise SystemExit(f"{target} ended before {steps} optimizer steps")


if __name__ == "__main__":
    main()
