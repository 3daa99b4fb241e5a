"""Script that tests/methods/test_contract.py runs with torchrun: losses of each method in two processes, as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.callbacks import Callback

from method_cases import METHODS, MORE, Case
from running import fit


class MeanLoss(Callback):
    """Records the loss of each step, averaged over both processes."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        value = trainer.strategy.reduce(pl_module.step_metrics["loss"].clone(), reduce_op="mean")
        self.losses.append(float(value))


def main() -> None:
    tiny, images, out, *names = sys.argv[1:]
    losses_by_case: dict[str, list[float]] = {}
    for name in names:
        case = next(each for each in (*map(Case, METHODS), *MORE) if str(each) == name)
        model, data = case.model(Path(tiny), lr=1e-3), case.data(Path(tiny), Path(images), batch_size=4)
        recorder = MeanLoss()
        trainer = fit(model, data, 4, [recorder], strategy="ddp", devices=2, use_distributed_sampler=False)
        losses_by_case[name] = recorder.losses
        if trainer.is_global_zero:
            Path(out).write_text(json.dumps(losses_by_case), encoding="utf-8")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
