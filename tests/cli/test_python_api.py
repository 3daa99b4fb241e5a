"""``sdtune.train()`` and ``sdtune.plan()`` from Python, and the example notebook."""

from __future__ import annotations

import logging
import os
import random
import signal
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from PIL import Image

import sdtune
from running import arguments
from sdtune.errors import Stopped, UserError

ROOT = Path(__file__).parents[2]


def state() -> dict[str, Any]:
    """Settings of the process that a command changes while it runs."""
    return {
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)],
        "environment": dict(os.environ),
        "logging": [(logging.root.level, logging.root.handlers[:]), logging.getLogger("sdtune").level],
        "warnings": warnings.filters[:],
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "torch": torch.get_rng_state().tolist(),
        "random": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
    }


def overrides(tiny: Path, images: Path, folder: Path, *more: str) -> list[str]:
    typed = [text for text in arguments(tiny, images, folder, *more) if text != "callbacks.samples=null"]
    return [*typed, "callbacks.samples.sampling.steps=1", "callbacks.samples.seeds=[0]"]


def test_training_leaves_the_process_as_it_was(tiny: Path, images: Path, tmp_path: Path) -> None:
    typed = overrides(tiny, images, tmp_path / "run", "trainer.max_steps=3", "hardware.threads=1")
    sdtune.train([*typed[:-1], f"hydra.run.dir={tmp_path / 'first'}"])  # imports add filters of warnings
    before = state()
    run = sdtune.train([*typed, "trainer.deterministic=true"])
    after = state()
    assert {key for key in before if before[key] != after[key]} == set()
    assert run.folder == tmp_path / "run"
    assert run.metrics["steps"] == 3
    assert "cost of the training" in (run.folder / "train.log").read_text(encoding="utf-8")


def test_run_gives_images_and_figures(tiny: Path, images: Path, tmp_path: Path) -> None:
    run = sdtune.train(overrides(tiny, images, tmp_path / "run", "trainer.max_steps=3"))
    figure = run.curve("loss", smoothing=0)
    assert isinstance(figure, go.Figure)
    assert list(figure.data[0].x) == [1, 2, 3]
    assert isinstance(run.before_after(), Image.Image)
    with pytest.raises(UserError, match="metrics.csv has no los; use one of loss, "):
        run.curve("los")
    few = sdtune.sampling.loop.Sampling(steps=2)
    first, second = run.sample("a thing", seeds=[0, 1], sampling=few)
    assert first.size == (32, 32)
    assert np.asarray(first).tolist() != np.asarray(second).tolist()
    [plain] = run.sample("a thing", strength=0.0, sampling=few)
    source = sdtune.backbone.Pretrained(str(tiny))
    [base] = sdtune.sample("a thing", backbone=source, sampling=few)
    assert np.array_equal(np.asarray(plain), np.asarray(base))
    assert run.report() == run.folder / "report.html"
    longer = sdtune.train([f"resume={run.folder}", "trainer.max_steps=4"])
    assert longer.folder == run.folder
    assert sdtune.TrainedRun(run.folder).metrics["steps"] == 4


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["methd.rank=4"], "methd.rank: unknown setting; did you mean method.rank?"),
        (["method.rank=four"], 'method.rank: got "four"; expected int >= 1 or null'),
        (["-m", "seed=0,1"], "-m: sweeps need the command line; use sdtune train -m seed=0,1"),
        (["hardware.devices=2"], "hardware.devices: several processes need the command line"),
        (["resume=nothing"], "resume: "),
    ],
)
def test_wrong_settings_raise_user_errors(
    typed: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        sdtune.train(typed)
    assert str(caught.value).startswith(message)
    assert list(tmp_path.iterdir()) == []


def test_interrupt_saves_the_run_and_restores_the_handlers(tiny: Path, images: Path, tmp_path: Path) -> None:
    handler = signal.getsignal(signal.SIGINT)
    run = tmp_path / "run"

    def interrupt() -> None:
        while not (run / "metrics.csv").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(Stopped, match="resume="):
        sdtune.train([*overrides(tiny, images, run, "trainer.max_steps=5000"), "callbacks.samples=null"])
    thread.join()
    assert signal.getsignal(signal.SIGINT) is handler
    assert any((run / "checkpoints").iterdir())


@pytest.mark.slow
def test_plan_has_text_numbers_and_a_figure() -> None:
    plan = sdtune.plan(["methods=lora,textual_inversion", "backbone=pocket"])
    assert "textual_inversion" in str(plan)
    assert list(plan.peaks) == ["lora", "textual_inversion"]
    assert plan.peaks["lora"]["a training step"] > 10_000_000
    assert [bar.name for bar in plan.figure().data] == ["lora", "textual_inversion"]
    with pytest.raises(UserError, match="methods: unknown method lara; did you mean lora?"):
        sdtune.plan(["methods=lara"])


@pytest.mark.slow
def test_example_notebook_runs(tmp_path: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(ROOT / "docs" / "notebook.ipynb", as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    kinds = [kind for cell in notebook.cells for output in cell.get("outputs", ()) for kind in output.get("data", ())]
    assert kinds.count("image/png") == 2
    assert kinds.count("application/vnd.plotly.v1+json") == 2
    errors = [output for cell in notebook.cells for output in cell.get("outputs", ()) if output.output_type == "error"]
    assert errors == []
