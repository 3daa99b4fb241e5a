"""metrics.csv: a row a step, with what that step really used."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning.callbacks import Callback

from running import Rates, Spy, adamw, arguments, fit, folder_data, rows, train
from sdtune.backbone import Pretrained
from sdtune.callbacks.metrics_recorder import MetricsRecorder
from sdtune.lr_schedule import Cosine
from sdtune.methods import LoRA


def recorded(tiny: Path, images: Path, folder: Path, **settings: Any) -> tuple[list[dict[str, str]], Spy]:
    folder.mkdir()
    spy = Spy()
    model = LoRA(
        rank=2, backbone=Pretrained(str(tiny)), optimizer=adamw(1e-3), lr_schedule=Cosine(warmup_steps=2, floor=0.1)
    )
    trained = {"log_every_n_steps": 3, "gradient_clip_val": 1.0, **settings}
    fit(model, folder_data(images, batch_size=4), 20, [MetricsRecorder(folder), spy], **trained)
    return rows(folder), spy


def test_a_row_a_step_with_the_rate_that_was_used(tiny: Path, images: Path, tmp_path: Path) -> None:
    found, spy = recorded(tiny, images, tmp_path / "run")
    assert [row["step"] for row in found] == [str(step) for step in range(1, 21)]
    assert [float(row["loss"]) for row in found] == spy.losses
    assert [float(row["lr/unet"]) for row in found] == spy.rates
    assert spy.rates[0] == pytest.approx(1e-3 / 3)
    assert spy.rates[2] == max(spy.rates) == 1e-3
    assert all(float(row["grad_norm"]) > 0 for row in found)

    # Accumulation: the same samples with the same draws, so the same step, once.
    split, _ = recorded(tiny, images, tmp_path / "split", accumulate_grad_batches=2)
    assert [row["step"] for row in split] == [row["step"] for row in found]
    for column in ("loss", "grad_norm", "lr/unet"):
        assert [float(row[column]) for row in split] == pytest.approx([float(r[column]) for r in found], rel=2e-4)


def test_a_resumed_run_cuts_the_rows_that_it_makes_again(tmp_path: Path) -> None:
    record = MetricsRecorder(tmp_path)
    text = "step,loss,validation_loss\n1,0.5,\n2,0.4,\n2,,0.45\n3,0.3,\n3,,0.35\n"
    (tmp_path / "metrics.csv").write_text(text)

    class Trainer:
        is_global_zero = True

    record.cut(2, Trainer())  # type: ignore[arg-type]
    assert (tmp_path / "metrics.csv").read_text() == "step,loss,validation_loss\n1,0.5,\n2,0.4,\n2,,0.45\n"
    assert record.validation == {2: 0.45}
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_an_extended_run_trains_at_the_rate_of_its_new_length(tiny: Path, images: Path, tmp_path: Path) -> None:
    """A cosine ends at 0; going on, the first step must not be taken at that rate."""
    run = tmp_path / "run"
    own = arguments(tiny, images, run, "lr_schedule=cosine", "lr_schedule.warmup_steps=0", "trainer.max_steps=3")
    Rates.used.clear()
    assert train(*own, "+callbacks.rates._target_=running.Rates", "trust=[running]") == 0
    assert train(f"resume={run}", "trainer.max_steps=6") == 0
    wanted = [1e-4 * Cosine()(step, 3) for step in range(3)] + [1e-4 * Cosine()(step, 6) for step in (3, 4, 5)]
    assert Rates.used == pytest.approx(wanted)
    assert [float(row["lr/unet"]) for row in rows(run)] == pytest.approx(wanted)


class SlowValidation(Callback):
    def on_validation_batch_start(self, *args: Any) -> None:
        time.sleep(1.0)


@pytest.mark.slow
def test_validation_is_no_part_of_the_steps_time(tiny: Path, images: Path, tmp_path: Path) -> None:
    """At an interval that is no multiple of the flushes' own."""
    record = MetricsRecorder(tmp_path)
    model = LoRA(rank=2, backbone=Pretrained(str(tiny)), optimizer=adamw(1e-3))
    data = folder_data(images, hold_out=4)
    fit(model, data, 10, [record, SlowValidation()], log_every_n_steps=4, val_check_interval=3)
    assert sorted(record.validation) == [3, 6, 9]
    assert len(record.step_seconds) == 6
    assert all(0 < seconds < 0.9 for seconds in record.step_seconds)
