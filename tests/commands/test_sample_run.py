"""``sdtune sample PROMPT run=RUN``: the command that a finished run prints generates images with its artifact."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from method_cases import METHODS, Case
from running import arguments, sample, sdtune, train
from sample_commands import FEW, command, images
from sdtune.backbone import Pretrained
from sdtune.sampling.loop import Request, Sampling, generate
from sdtune.sampling.run_models import RunModels

LEARNS = ("trainer.max_steps=2", "optimizer.lr=0.05")
WORD = ('new_tokens=[{token: "<new>", init: "a word"}]', "data.templates=['<new> {}']")


def run_of(method: str, tiny: Path, images: Path, folder: Path, *more: str) -> Path:
    """A short training with ``method``."""
    common = [text for text in arguments(tiny, images, folder) if not text.startswith("method")]
    assert train(*common, *LEARNS, *Case(method).command(tiny, images), *more) == 0
    return folder


def pixels(folder: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(file)).astype(int) for file in images(folder)]


def trained(tiny: Path, run: Path, *prompts: str) -> list[np.ndarray]:
    """Images of the run's model as its evaluation loads it, in float32."""
    models = RunModels(Pretrained(str(tiny), guidance=3.0), run / "artifact", "images", torch.device("cpu"))
    requests = [Request(prompt, 3) for prompt in prompts]
    with models.trained() as backbone:
        return [image.astype(int) for image in generate(backbone, requests, Sampling(steps=2, guidance=3.0))]


def printed_command(log: Path) -> list[str]:
    [line] = [line for line in log.read_text(encoding="utf-8").splitlines() if "sample with it: " in line]
    return shlex.split(line.partition("sample with it: ")[2])


@pytest.mark.parametrize("method", METHODS)
def test_printed_command_generates_with_the_artifact(method: str, tiny: Path, images: Path, tmp_path: Path) -> None:
    run, out, base = run_of(method, tiny, images, tmp_path / "run"), tmp_path / "out", tmp_path / "base"
    program, name, assigned, *overrides = printed_command(run / "train.log")
    assert (program, name) == ("sdtune", "sample")
    prompt = assigned.removeprefix('prompt="').removesuffix('"')
    overrides = [text.replace("FILE", str(images / "0.png")) for text in overrides if "strengths" not in text]
    assert sdtune(name, assigned, *overrides, *FEW, "seeds=3", f"hydra.run.dir={out}") == 0
    assert sample(*command(tiny, base, assigned, "seeds=3")) == 0
    [image], [before] = pixels(out), pixels(base)
    assert np.abs(image - before).max() > 1
    if method != "controlnet":
        assert np.abs(image - trained(tiny, run, prompt)[0]).max() <= 1


@pytest.mark.parametrize("method", ["lora", "dreambooth"])
def test_new_word_beside_an_adapter_or_a_model_is_loaded(method: str, tiny: Path, images: Path, tmp_path: Path) -> None:
    run, out = run_of(method, tiny, images, tmp_path / "run", *WORD), tmp_path / "out"
    assert sample("a <new> fox, asleep", f"run={run}", *FEW, "seeds=3", f"hydra.run.dir={out}") == 0
    assert np.abs(pixels(out)[0] - trained(tiny, run, "a <new> fox, asleep")[0]).max() <= 1


def test_settings_of_the_backbone_may_be_changed(tiny: Path, images: Path, tmp_path: Path) -> None:
    """A moved backbone is named again; guidance of the command line applies."""
    run, moved, log = run_of("lora", tiny, images, tmp_path / "run"), tmp_path / "moved", []
    moved.symlink_to(tiny)
    for more in ([], [f"backbone.path={moved}"], ["backbone.guidance=9"]):
        out = tmp_path / f"out{len(log)}"
        few = [text for text in FEW if "guidance" not in text]
        assert sample("a fox", f"run={run}", *few, *more, f"hydra.run.dir={out}") == 0
        log.append(pixels(out)[0])
    assert np.array_equal(log[0], log[1])
    assert not np.array_equal(log[0], log[2])


@pytest.mark.parametrize(
    ("method", "more", "expected"),
    [
        ("lora", "backbone=sdxl", "sdtune: backbone: given by run={run}; remove one of the two"),
        ("full", "backbone.path=x", "sdtune: backbone.path: given by run={run}; remove one of the two"),
        ("controlnet", "seeds=1", "sdtune: control: a ControlNet needs an image; set 'control=[{{image: MAP}}]'"),
        ("lora", "++backbone.path=/nowhere", "sdtune: backbone.path: /nowhere does not exist"),
        ("lora", "adapters=otter.safetensors", "sdtune: adapters: expected a list, got otter.safetensors"),
        ("controlnet", "control=map.png", "sdtune: control: got"),
        ("lora", "run=/nowhere", "sdtune: run: /nowhere is not a run folder (.hydra/config.yaml is missing)"),
    ],
)
def test_refusals(
    method: str,
    more: str,
    expected: str,
    tiny: Path,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, out = run_of(method, tiny, images, tmp_path / "run"), tmp_path / "out"
    capsys.readouterr()
    assert sample("a fox", f"run={run}", more, *FEW, f"hydra.run.dir={out}") == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(expected.format(run=run))
    assert not out.exists()
