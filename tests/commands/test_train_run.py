"""``TrainRun``: built once by the checks, then trained."""

from __future__ import annotations

import csv
import dataclasses
from collections import Counter
from functools import wraps
from pathlib import Path
from typing import Any

import pytest

from running import arguments, train
from sdtune.backbone import Pretrained
from sdtune.callbacks import EMA
from sdtune.commands.checks import check_run
from sdtune.config.compose import compose, search_path
from sdtune.config.settings import Settings, plain
from sdtune.data import Folder
from sdtune.methods import LoRA
from sdtune.objective import Objective


def constructor_calls(monkeypatch: pytest.MonkeyPatch, *kinds: type) -> Counter[str]:
    """Counter of the constructor calls of each of ``kinds``, updated from now on."""
    calls: Counter[str] = Counter()

    def count_calls_of(kind: Any) -> None:
        constructor = kind.__init__

        @wraps(constructor)  # the schema reads the signature
        def counting(self: Any, *args: Any, **kwargs: Any) -> None:
            calls[kind.__name__] += type(self) is kind
            constructor(self, *args, **kwargs)

        monkeypatch.setattr(kind, "__init__", counting)

    for kind in kinds:
        count_calls_of(kind)
    return calls


def test_each_part_is_built_once(tiny: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = constructor_calls(monkeypatch, LoRA, Pretrained, Objective, EMA, Settings, Folder)
    assert train(*arguments(tiny, images, tmp_path / "run", "callbacks=ema", "callbacks.samples=null"),
                 "trainer.max_steps=1") == 0  # fmt: skip
    assert calls == {"LoRA": 1, "Pretrained": 1, "Objective": 1, "EMA": 1, "Settings": 1, "Folder": 1}


def test_checked_run_is_frozen_and_has_loaded_no_weights(tiny: Path, images: Path, tmp_path: Path) -> None:
    config = compose("train", search_path(None), arguments(tiny, images, tmp_path / "run"))
    run = check_run(plain(config), tmp_path / "run")
    assert not hasattr(run.adapter, "backbone")
    assert run.source is run.adapter.source
    assert run.name == "images"
    assert not (tmp_path / "run").exists()
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.folder = tmp_path  # type: ignore[misc]


def test_end_of_a_run_prints_its_metrics_and_the_best_step(
    tiny: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    more = ("data.hold_out=5", "trainer.val_check_interval=5", "trainer.max_steps=10")
    assert train(*arguments(tiny, images, run, *more)) == 0
    lines = capsys.readouterr().out.splitlines()
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as handle:
        validated = [row for row in csv.DictReader(handle) if row["validation_loss"]]
    losses = {int(row["step"]): float(row["validation_loss"]) for row in validated}
    assert list(losses) == [5, 10]
    for step, loss in losses.items():
        assert f"step {step} of 10: validation loss {loss:.4f}" in lines
    best = min(losses, key=lambda step: losses[step])
    assert f"lowest validation loss: {losses[best]:.4f} at step {best} of 10" in lines
    assert any(line.startswith("cost of the training: ") and "steps 10" in line for line in lines)
