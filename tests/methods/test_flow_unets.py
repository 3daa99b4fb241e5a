"""UNets that were turned to flow matching: a step equals plain diffusers; training, previews, export and sampling."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from families import Family, build_family
from image_data import noise
from running import adamw, folder_data, rows, train
from sdtune.backbone import Pretrained
from sdtune.data.control.edges import Canny
from sdtune.errors import UserError
from sdtune.files import read_json
from sdtune.methods import LoRA
from sdtune.objective import Objective, Timesteps
from sdtune.randomness import generator
from sdtune.sampling import Request, Sampling, generate

SHIFT = 2.0
FLOW: dict[str, Any] = {"prediction_type": "flow_prediction", "flow_shift": SHIFT}
POSITIONS, STEP, SEED = [4, 5], 7, 11


@pytest.fixture(scope="module", params=["sd1", pytest.param("sdxl", marks=pytest.mark.slow)])
def family(request: pytest.FixtureRequest) -> Family:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def folder(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_family(tmp_path_factory.mktemp(family), family)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for number in range(3):
        noise(tmp_path / "images" / f"{number}.png", 96, 80, number, f"image number {number}")
    return tmp_path / "images"


def drawn_times() -> Tensor:
    normal = [generator(SEED, "train/timestep", STEP, position).standard_normal() for position in POSITIONS]
    u = 1 / (1 + np.exp(-np.array(normal)))
    return torch.tensor(SHIFT * u / (1 + (SHIFT - 1) * u))


def stream_noise(stream: str) -> Tensor:
    drawn = [generator(SEED, stream, STEP, p).standard_normal((4, 8, 8), dtype="float32") for p in POSITIONS]
    return torch.stack([torch.from_numpy(row) for row in drawn]).double()


def test_loss_equals_that_of_a_rectified_flow(folder: Path) -> None:
    objective = Objective(timesteps=Timesteps("logit_normal"))
    model = LoRA(backbone=Pretrained(str(folder), **FLOW), optimizer=adamw(1e-3), seed=SEED, objective=objective)
    model.configure_model()
    model.double()
    backbone, t = model.backbone, drawn_times()
    moments = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    batch = {"prompts": ["a", "b"], "step": STEP, "positions": POSITIONS, "moments": moments, "conditions": {}}
    mean, log_variance = moments.chunk(2, dim=1)
    sample = mean + torch.exp(0.5 * log_variance) * stream_noise("train/vae")
    clean, added = sample * backbone.vae.config.scaling_factor, stream_noise("train/noise")
    sigma = t[:, None, None, None]
    with torch.no_grad():
        text = backbone.encode_text(["a", "b"])
        arguments = backbone.conditioning_arguments(text, clean)
        noisy = (1 - sigma) * clean + sigma * added
        velocity = backbone.denoiser(noisy, (1000 * t).float(), **arguments).sample
        losses = model.losses(batch)
    torch.testing.assert_close(losses, (velocity - (added - clean)).square().mean((1, 2, 3)), rtol=1e-8, atol=0)


def test_trained_flow_model_states_its_flow(family: Family, folder: Path, images: Path, tmp_path: Path) -> None:
    """Training with validation and previews, then sampling from the exported folder without any flow setting."""
    option = {"sd1": "sd15", "sd2": "sd21", "sdxl": "sdxl"}[family]
    held_out = shutil.copytree(images, tmp_path / "held out")
    overrides = [
        "method=full", f"backbone={option}", f"backbone.path={folder}", "backbone.prediction_type=flow_prediction",
        f"backbone.flow_shift={SHIFT}", "data=folder", f"data.path={images}", f"data.validation_path={held_out}",
        "data.batch_size=2", "trainer.max_steps=2", "trainer.val_check_interval=1", "hardware=cpu",
        "hardware.precision=32-true", "evaluation=none", "callbacks.samples.sampling.steps=3", "name=flow",
        "optimizer.lr=1e-2", f"hydra.run.dir={tmp_path}/run",
    ]  # fmt: skip
    assert train(*overrides) == 0
    losses = [float(row["validation_loss"]) for row in rows(tmp_path / "run") if row["validation_loss"]]
    assert len(losses) >= 2
    assert np.isfinite(losses).all()
    assert (tmp_path / "run/samples/before_after.png").is_file()
    exported = tmp_path / "run/artifact/flow"
    scheduler = read_json(exported / "scheduler/scheduler_config.json")
    assert scheduler["prediction_type"] == "flow_prediction"
    assert scheduler["flow_shift"] == SHIFT
    source = Pretrained(str(exported))
    assert source.facts.prediction_type == "flow_prediction"
    backbone = source.load()
    pixels = [
        next(generate(backbone, [Request("a", 4)], Sampling(steps=3, sampler=sampler)))
        for sampler in (None, "euler", "dpmpp_2m")
    ]
    assert np.array_equal(pixels[0], pixels[2])
    assert not np.array_equal(pixels[0], pixels[1])


def test_shift_of_a_diffusion_scheduler_is_not_that_of_the_flow(folder: Path, tmp_path: Path) -> None:
    """DPM++ in diffusers stores a flow_shift of 1, which it does not use."""
    shutil.copytree(folder, tmp_path / "model")
    file = tmp_path / "model/scheduler/scheduler_config.json"
    config = {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": False, "flow_shift": 1.0}
    file.write_text(str({**config, "num_train_timesteps": 1000}).replace("'", '"').replace("False", "false"), "utf-8")
    assert Pretrained(str(tmp_path / "model"), prediction_type="flow_prediction").scheduler()["flow_shift"] == 3.0


def test_control_maps_work_on_flows(folder: Path, images: Path) -> None:
    from running import Spy, fit
    from sdtune.methods import ControlNet

    spy = Spy()
    model = ControlNet(backbone=Pretrained(str(folder), **FLOW), optimizer=adamw(1e-2))
    fit(model, folder_data(images, control=Canny()), 2, [spy])
    assert np.isfinite(spy.losses).all()
    assert spy.losses[0] != spy.losses[1]


class OwnWeighting:
    def __call__(self, snr: Tensor, kind: str) -> Tensor:
        return torch.ones_like(snr)


def test_weighting_that_does_not_know_flows_is_refused() -> None:
    objective = Objective(weighting=OwnWeighting())  # type: ignore[arg-type]
    with pytest.raises(
        UserError, match=r"^objective\.weighting: OwnWeighting has no meaning for a flow model; set obj"
    ):
        objective.check("flow_prediction")
