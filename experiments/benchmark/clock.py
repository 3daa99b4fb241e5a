"""Single measurement: runs a training command in this process and records its optimizer steps, for any trainer.

``python clock.py WATCH STEPS OUT TARGET ARGUMENTS...``, where TARGET is a module or a script. The process exits after
STEPS optimizer steps, so that saving at the end of the training is not measured. WATCH is ``time`` (end time of each
step, peak resident memory) or ``count``, which also counts operators, scalar synchronizations and FLOP of one more
step. ``$BENCH_BEGAN`` is the monotonic time at which the process was started.
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
"""Operators that block until the device has finished."""


class Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Dispatch mode that counts all operators, including views and detaches."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators[str(func)] += 1
        return func(*args, **(kwargs or {}))


def peak_memory() -> int:
    """Peak resident memory of this process in bytes."""
    line = next(
        line for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM")
    )
    return int(line.split()[1]) * 1024


def watched(steps: int, out: Path, count: bool) -> Callable[..., None]:
    """Optimizer post-step hook that records ``steps`` end times and, with ``count``, the work of the next step."""
    start = float(os.environ["BENCH_BEGAN"])
    ends: list[float] = []
    metrics: dict[str, Any] = {}
    operators, flops = Counted(), FlopCounterMode(display=False)

    def hook(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        ends.append(time.monotonic() - start)
        if len(ends) == steps:
            metrics.update(ends=list(ends), peak_memory_bytes=peak_memory(), threads=torch.get_num_threads())
            if not all(p.isfinite().all() for group in optimizer.param_groups for p in group["params"]):
                # Arithmetic with NaN or infinity takes a different time.
                raise FloatingPointError(f"trained parameters are not finite after {steps} steps")
            if not count:
                leave(out, metrics)
            flops.__enter__()  # type: ignore[no-untyped-call]
            operators.__enter__()  # type: ignore[no-untyped-call]
        elif len(ends) > steps:
            operators.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            flops.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            counts = operators.operators
            synchronisations = sum(counts[name] for name in SYNCHRONISING)
            metrics.update(operators=sum(counts.values()), synchronisations=synchronisations)
            leave(out, {**metrics, "flop": flops.get_total_flops(), "most": dict(counts.most_common(20))})

    return hook


def leave(out: Path, found: dict[str, Any]) -> None:
    """Write the metrics and exit the process immediately."""
    out.write_text(json.dumps(found), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)


def main() -> None:
    watch, steps, out, target, *arguments = sys.argv[1:]
    register_optimizer_step_post_hook(watched(int(steps), Path(out), watch == "count"))
    if target == "sdtune":
        from sdtune.callbacks import cost

        # sdtune resets the peak memory in a run; here the peak of every trainer counts from the process start.
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
