"""metrics.csv: one row per optimizer step, with the values that the step used."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import Callback

from running import Rates, Spy, adamw, arguments, fit, folder_data, rows, train
from sdtune.backbone import Pretrained
from sdtune.callbacks.metrics_recorder import MetricsRecorder, suspect_captions, with_means
from sdtune.errors import UserError
from sdtune.lr_schedule import Cosine
from sdtune.methods import LoRA
from sdtune.runs.metrics import cut_metrics


def recorded(tiny: Path, images: Path, folder: Path, **settings: Any) -> tuple[list[dict[str, str]], Spy]:
    folder.mkdir()
    spy = Spy()
    model = LoRA(
        rank=2, backbone=Pretrained(str(tiny)), optimizer=adamw(1e-3), lr_schedule=Cosine(warmup_steps=2, floor=0.1)
    )
    trainer_arguments = {"log_every_n_steps": 3, "gradient_clip_val": 1.0, **settings}
    fit(model, folder_data(images, batch_size=4), 20, [MetricsRecorder(folder), spy], **trainer_arguments)
    return rows(folder), spy


def test_each_step_has_one_row_with_its_learning_rate(tiny: Path, images: Path, tmp_path: Path) -> None:
    recorded_rows, spy = recorded(tiny, images, tmp_path / "run")
    assert [row["step"] for row in recorded_rows] == [str(step) for step in range(1, 21)]
    assert [float(row["loss"]) for row in recorded_rows] == spy.losses
    assert [float(row["lr/denoiser"]) for row in recorded_rows] == spy.rates
    assert spy.rates[0] == pytest.approx(1e-3 / 3)
    assert spy.rates[2] == max(spy.rates) == 1e-3
    assert all(float(row["grad_norm"]) > 0 for row in recorded_rows)

    # With accumulation: the same samples and random numbers, so the same step, and still one row.
    split, _ = recorded(tiny, images, tmp_path / "split", accumulate_grad_batches=2)
    assert [row["step"] for row in split] == [row["step"] for row in recorded_rows]
    for column in ("loss", "grad_norm", "lr/denoiser"):
        assert [float(row[column]) for row in split] == pytest.approx(
            [float(r[column]) for r in recorded_rows], rel=2e-4
        )


def test_resumed_run_removes_the_rows_that_it_writes_again(tmp_path: Path) -> None:
    record = MetricsRecorder(tmp_path)
    text = "step,loss,validation_loss\n1,0.5,\n2,0.4,\n2,,0.45\n3,0.3,\n3,,0.35\n"
    (tmp_path / "metrics.csv").write_text(text, encoding="utf-8")

    class Trainer:
        is_global_zero = True

    state = {"columns": [], "step_seconds": torch.zeros(0), "validation": torch.tensor([[2, 0.45], [3, 0.35]])}
    record.load_state_dict(state)
    record.truncate(2, Trainer())  # type: ignore[arg-type]
    assert (tmp_path / "metrics.csv").read_text(
        encoding="utf-8"
    ) == "step,loss,validation_loss\n1,0.5,\n2,0.4,\n2,,0.45\n"
    assert record.validation == {2: pytest.approx(0.45)}
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


@pytest.mark.parametrize("rows", [0, 1, 2, 1000])
@pytest.mark.parametrize("keep_validation", [True, False])
def test_metrics_are_cut_after_every_step(tmp_path: Path, rows: int, keep_validation: bool) -> None:
    header, file = "step,loss,validation_loss\n", tmp_path / "metrics.csv"
    lines = [f"{step},{1 / step!r},\n" + (f"{step},,0.5\n" if step % 7 == 0 else "") for step in range(1, rows + 1)]
    for step in {0, 1, rows // 2, 7, rows - 1, rows, rows + 5} - {-1}:
        file.write_text(header + "".join(lines) + "12,0.5", encoding="utf-8")  # the last line is incomplete
        assert cut_metrics(file, step, keep_validation=keep_validation) == ["step", "loss", "validation_loss"]
        expected = "".join(lines[:step])
        if not keep_validation and step <= rows:
            expected = expected.removesuffix(f"{step},,0.5\n")
        assert file.read_text(encoding="utf-8") == header + expected


@pytest.mark.parametrize("text", ["step,loss\n1,2,3\n", "step,loss\nx,2\n", "loss\n1\n", "\0\0\n"])
def test_damaged_metrics_are_not_cut(tmp_path: Path, text: str) -> None:
    file = tmp_path / "metrics.csv"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"^resume: .*metrics\.csv is damaged"):
        cut_metrics(file, 1)
    assert file.read_text(encoding="utf-8") == text


def test_metrics_of_a_million_steps_are_cut_within_a_second(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    line = "{},0.046830497682094574,0.052252937108278275,0.0003333333333333333,\n"
    rows = "".join(map(line.format, range(1, 1_000_001)))
    file.write_text(f"step,loss,grad_norm,lr/denoiser,validation_loss\n{rows}", encoding="utf-8")
    start = time.perf_counter()
    cut_metrics(file, 999_000)
    assert time.perf_counter() - start < 1
    assert file.read_text(encoding="utf-8").count("\n") == 999_001


def test_mean_of_a_source_is_empty_if_a_step_had_none_of_its_samples() -> None:
    row = {"loss": 1.0, "loss/source/a#sum": 3.0, "loss/source/a#count": 2.0}
    row |= {"loss/source/b#sum": 0.0, "loss/source/b#count": 0.0}
    assert with_means(row) == {"loss": 1.0, "loss/source/a": 1.5, "loss/source/b": None}


def test_extended_run_uses_the_learning_rate_of_its_new_length(tiny: Path, images: Path, tmp_path: Path) -> None:
    """A cosine schedule ends at 0; the first step after resuming must not use that rate."""
    run = tmp_path / "run"
    command = arguments(tiny, images, run, "lr_schedule=cosine", "lr_schedule.warmup_steps=0", "trainer.max_steps=3")
    Rates.used.clear()
    assert train(*command, "+callbacks.rates._target_=running.Rates", "trust=[running]") == 0
    assert train(f"resume={run}", "trainer.max_steps=6") == 0
    expected = [1e-4 * Cosine()(step, 3) for step in range(3)] + [1e-4 * Cosine()(step, 6) for step in (3, 4, 5)]
    assert Rates.used == pytest.approx(expected)
    assert [float(row["lr/denoiser"]) for row in rows(run)] == pytest.approx(expected)


class SlowValidation(Callback):
    def on_validation_batch_start(self, *args: Any) -> None:
        time.sleep(1.0)


@pytest.mark.slow
def test_step_time_excludes_validation(tiny: Path, images: Path, tmp_path: Path) -> None:
    """With a validation interval that is not a multiple of the flush interval."""
    record = MetricsRecorder(tmp_path)
    model = LoRA(rank=2, backbone=Pretrained(str(tiny)), optimizer=adamw(1e-3))
    data = folder_data(images, hold_out=4)
    fit(model, data, 10, [record, SlowValidation()], log_every_n_steps=4, val_check_interval=3)
    assert sorted(record.validation) == [3, 6, 9]
    assert len(record.step_seconds) == 6
    assert all(0 < seconds < 0.9 for seconds in record.step_seconds)


@pytest.mark.parametrize(
    ("of_processes", "captions"),
    [
        ([(True, ["a"]), (False, ["b", "c"])], ["b", "c"]),
        ([(True, ["a"]), (True, ["b"])], ["a", "b"]),
        ([(False, ["a"]), (False, ["a"])], ["a"]),
    ],
)
def test_captions_after_a_nan_are_those_of_the_process_where_it_was(
    of_processes: list[tuple[bool, list[str]]], captions: list[str]
) -> None:
    assert suspect_captions(of_processes) == captions
