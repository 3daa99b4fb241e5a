"""One measurement: runs a training command in this process and watches its optimizer steps, ours and a peer's alike.

``python clock.py WATCH STEPS OUT TARGET ARGUMENTS...``, where TARGET is a module or a script. The process ends after
STEPS optimizer steps, so that what a trainer saves at its end costs no time here. WATCH is ``time`` (when each step
ended, and the most memory that was resident) or ``count``, which counts the operators, scalar synchronisations and
arithmetic of one more step behind those. ``$BENCH_BEGAN`` is the monotonic clock's time when the process was asked for.
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
from torch.utils.flop_counter import FlopCounterMode

from sdtune.torch_compat import TorchDispatchMode

SYNCHRONISING = ("aten._local_scalar_dense.default", "aten.equal.default", "aten.nonzero.default")
"""Operators that make a program wait for its device."""


class Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators that reach the dispatcher, views and detaches included."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators[str(func)] += 1
        return func(*args, **(kwargs or {}))


def peak_memory() -> int:
    """Bytes: the most that was resident since the process began."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def watched(steps: int, out: Path, count: bool) -> Callable[..., None]:
    """A hook that notes when each step ended, and may count what happens in the one behind them."""
    began = float(os.environ["BENCH_BEGAN"])
    ends: list[float] = []
    seen: dict[str, Any] = {}
    operators, flops = Counted(), FlopCounterMode(display=False)

    def after(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        ends.append(time.monotonic() - began)
        if len(ends) == steps:
            seen.update(ends=list(ends), peak_memory_bytes=peak_memory(), threads=torch.get_num_threads())
            if not all(p.isfinite().all() for group in optimizer.param_groups for p in group["params"]):
                # Their products take other times than numbers' do.
                raise FloatingPointError(f"what is trained is not finite after {steps} steps")
            if not count:
                leave(out, seen)
            flops.__enter__()  # type: ignore[no-untyped-call]
            operators.__enter__()  # type: ignore[no-untyped-call]
        elif len(ends) > steps:
            operators.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            flops.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            found = operators.operators
            synchronisations = sum(found[name] for name in SYNCHRONISING)
            seen.update(operators=sum(found.values()), synchronisations=synchronisations)
            leave(out, {**seen, "flop": flops.get_total_flops(), "most": dict(found.most_common(20))})

    return after


def leave(out: Path, found: dict[str, Any]) -> None:
    """Write the metrics and end the process at once."""
    out.write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)


def main() -> None:
    watch, steps, out, target, *arguments = sys.argv[1:]
    register_optimizer_step_post_hook(watched(int(steps), Path(out), watch == "count"))
    if target == "sdtune":
        from sdtune.callbacks import cost

        # A run's own metric counts from each step anew; here all count from the start of the process.
        cost.reset_peak_memory = lambda device: None  # type: ignore[attr-defined]
    sys.argv = [target, *arguments]
    if target.endswith(".py"):
        sys.path[0] = str(Path(target).parent)
        runpy.run_path(target, run_name="__main__")
    else:
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    raise SystemExit(f"{target} ended before {steps} optimizer steps")


if __name__ == "__main__":
    main()
