"""Trainings on a table of samples: the same run from every kind of source, resumed, and on changed data."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from running import arguments, rows, sdtune, train


def as_sources(images: Path, target: Path) -> dict[str, Path]:
    """The images as parquet file, tar and, if the library is there, as a folder of datasets."""
    target.mkdir()
    files = sorted(images.glob("*.png"))
    rows = [
        {"image": {"bytes": f.read_bytes(), "path": f.name}, "text": f.with_suffix(".txt").read_text("utf-8")}
        for f in files
    ]
    pq.write_table(pa.Table.from_pylist(rows), target / "rows.parquet")
    with tarfile.open(target / "rows.tar", "w") as archive:
        for file in files:
            for each in (file, file.with_suffix(".txt")):
                archive.add(each, each.name)
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_list(rows, features=features).save_to_disk(target / "saved")
    return {"parquet": target / "rows.parquet", "tar": target / "rows.tar", "datasets": target / "saved"}


def results(run: Path) -> tuple[str, dict[str, torch.Tensor]]:
    return (run / "metrics.csv").read_text("utf-8"), load_file(run / "artifact" / "pytorch_lora_weights.safetensors")


def overrides(tiny: Path, data: list[str], run: Path, *more: str) -> list[str]:
    kept = [a for a in arguments(tiny, Path("-"), run, "name=mine", *more) if not a.startswith("data")]
    return [*kept, *data, "data.hold_out=5", "trainer.max_steps=4", "trainer.val_check_interval=2"]


def test_every_kind_of_source_trains_the_same_artifact(tiny: Path, images: Path, tmp_path: Path) -> None:
    assert train(*overrides(tiny, ["data=folder", f"data.path={images}"], tmp_path / "folder")) == 0
    text, tensors = results(tmp_path / "folder")
    for name, source in as_sources(images, tmp_path / "sources").items():
        table = tmp_path / f"{name}.arrow"
        assert sdtune("index", str(source), f"out={table}") == 0
        assert train(*overrides(tiny, ["data=table", f"data.path={table}"], tmp_path / name)) == 0
        other_text, other = results(tmp_path / name)
        assert other_text == text, name
        assert other.keys() == tensors.keys()
        assert all(torch.equal(other[key], tensors[key]) for key in tensors), name


def test_run_is_resumed_on_a_moved_table_and_refused_on_a_changed_one(
    tiny: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, run = tmp_path / "images.arrow", tmp_path / "run"
    assert sdtune("index", str(images), f"out={table}") == 0
    assert train(*overrides(tiny, ["data=table", f"data.path={table}"], run)) == 0
    table.rename(tmp_path / "moved.arrow")
    assert train(f"resume={run}", f"data.path={tmp_path / 'moved.arrow'}", "trainer.max_steps=5") == 0
    (images / "0.txt").write_text("another caption", encoding="utf-8")
    assert sdtune("index", str(images), f"out={tmp_path / 'moved.arrow'}") == 0
    capsys.readouterr()
    assert train(f"resume={run}", f"data.path={tmp_path / 'moved.arrow'}", "trainer.max_steps=6") == 2
    assert "the data has changed since the run started" in capsys.readouterr().err


@pytest.mark.parametrize("interval", [1, 3])
def test_mix_with_class_images_in_one_source_has_constant_columns(
    tiny: Path, images: Path, tmp_path: Path, interval: int
) -> None:
    mix = [f"data.sources.{name}.path={images}" for name in "ab"]
    mix += ["data.sources.a.class_prompt=a dog", "data.sources.a.class_images=2", "data.sources.b.loss_weight=0.5"]
    kept = [a for a in arguments(tiny, images, tmp_path / "run") if not a.startswith("data")]
    more = ["trainer.max_steps=8", f"trainer.log_every_n_steps={interval}", "trainer.val_check_interval=4"]
    assert train(*kept, "data=mix", *mix, "data.sources.b.hold_out=3", *more) == 0
    table = rows(tmp_path / "run")
    assert [name for name in table[0] if "loss" in name] == [
        *("loss", "loss/diffusion", "loss/prior", "loss/source/a", "loss/source/b"),
        *("validation_loss", "validation_loss/source/b"),
    ]
    training = [row for row in table if row["loss"]]
    assert len(training) == 8
    with_class = [row for row in training if row["loss/prior"]]
    assert 0 < len(with_class) < 8
    for row in training:
        assert bool(row["loss/prior"]) == bool(row["loss/source/a"]) != bool(row["loss/source/b"])
        if row["loss/source/b"]:
            assert float(row["loss"]) == pytest.approx(0.5 * float(row["loss/source/b"]))
        else:
            assert float(row["loss"]) == pytest.approx(float(row["loss/diffusion"]) + float(row["loss/prior"]))
    assert all(row["validation_loss"] == row["validation_loss/source/b"] for row in table)
