"""``trainer.epochs=N``: the number of steps follows from the data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from running import arguments, rows, train

FIVE_IMAGES = ("data.batch_size=2", "checkpoint.every_steps=3")
"""Three steps per epoch."""


def steps(run: Path) -> int:
    return int(json.loads((run / "metrics.json").read_text(encoding="utf-8"))["steps"])


def test_steps_are_those_of_the_epochs(tiny: Path, images: Path, tmp_path: Path) -> None:
    """The warm-up and the learning rate schedule see the same number of steps as with ``trainer.max_steps``."""
    run, same = tmp_path / "run", tmp_path / "same"
    common = (*FIVE_IMAGES, "lr_schedule=cosine")
    assert train(*arguments(tiny, images, run, *common, "trainer.epochs=2")) == 0
    assert train(*arguments(tiny, images, same, *common, "trainer.max_steps=6")) == 0
    assert steps(run) == 6
    assert [(row["loss"], row["lr/denoiser"]) for row in rows(run)] == [
        (row["loss"], row["lr/denoiser"]) for row in rows(same)
    ]


def test_run_is_extended_by_epochs_or_by_steps(
    tiny: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(*arguments(tiny, images, run, *FIVE_IMAGES, "trainer.epochs=1")) == 0
    assert train(f"resume={run}") == 2
    assert "is complete at step 3; set a larger trainer.epochs to extend it" in capsys.readouterr().err
    assert train(f"resume={run}", "trainer.epochs=2") == 0
    assert steps(run) == 6
    assert train(f"resume={run}", "trainer.max_steps=7") == 0
    assert steps(run) == 7
    assert train(f"resume={run}", "trainer.epochs=2") == 2
    assert "trainer.epochs: 6 steps are less than step 7" in capsys.readouterr().err


def test_steps_of_the_command_line_replace_epochs_of_a_recipe(tiny: Path, images: Path, tmp_path: Path) -> None:
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    recipe = "# @package _global_\ntrainer:\n  epochs: 9\n"
    (tmp_path / "conf" / "experiment" / "long.yaml").write_text(recipe, encoding="utf-8")
    mine = ("-cd", str(tmp_path / "conf"), "experiment=long")
    run = tmp_path / "run"
    assert train(*arguments(tiny, images, run, *FIVE_IMAGES, *mine, "trainer.max_steps=2")) == 0
    assert steps(run) == 2
    assert train(f"resume={run}", "trainer.epochs=1") == 0
    assert steps(run) == 3


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (
            ["trainer.epochs=1", "trainer.max_steps=3"],
            "trainer.epochs: given together with trainer.max_steps; remove",
        ),
        (["trainer.epochs=0"], "trainer.epochs: got 0; expected int >= 1"),
        (["epochs=2"], "epochs: option of kohya; use trainer.epochs=2"),
    ],
)
def test_refusals(
    more: list[str], expected: str, tiny: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(*arguments(tiny, images, tmp_path / "run", *more)) == 2
    assert capsys.readouterr().err.startswith(f"sdtune: {expected}")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_runs_on_one_backbone_may_have_different_numbers_of_steps(tiny: Path, images: Path, tmp_path: Path) -> None:
    few = shutil.copytree(images, tmp_path / "few")
    (few / "0.png").unlink()
    sweep = [
        "-m",
        "hydra/launcher=shared_backbone",
        f"hydra.sweep.dir={tmp_path / 'sweep'}",
        f"data.path={images},{few}",
    ]
    common = [text for text in arguments(tiny, images, tmp_path) if not text.startswith(("hydra.run", "data.path"))]
    assert train(*common, *FIVE_IMAGES, *sweep, "trainer.epochs=2") == 0
    assert [steps(tmp_path / "sweep" / job) for job in ("0", "1")] == [6, 4]
