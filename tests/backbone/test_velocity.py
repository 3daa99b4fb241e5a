"""v-prediction and zero terminal SNR: in training, in the artifact and in sampling."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

import sdtune
from running import adamw, fit, folder_data
from sdtune.backbone import Pretrained
from sdtune.errors import UserError
from sdtune.methods import Full
from sdtune.sampling.loop import Sampling


def test_v_prediction_artifact_with_zero_terminal_snr_samples_as_in_diffusers(
    tiny: Path, images: Path, tmp_path: Path
) -> None:
    source = Pretrained(str(tiny), prediction_type="v_prediction", zero_terminal_snr=True)
    model = Full(backbone=source, optimizer=adamw(1e-3))
    fit(model, folder_data(images), 2)
    model.artifact(tmp_path, "mine")
    scheduler_config = json.loads((tmp_path / "mine/scheduler/scheduler_config.json").read_text(encoding="utf-8"))
    assert scheduler_config["prediction_type"] == "v_prediction"
    assert scheduler_config["rescale_betas_zero_snr"] is True
    assert scheduler_config["timestep_spacing"] == "trailing"

    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "mine", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe.scheduler, DDIMScheduler)
    settings = Sampling(steps=3, guidance=2.0)
    [image] = sdtune.sample("a fox", backbone=Pretrained(str(tmp_path / "mine")), seeds=[1], sampling=settings)
    expected = pipe("a fox", num_inference_steps=3, guidance_scale=2.0, generator=torch.Generator().manual_seed(1))
    assert np.abs(np.asarray(image).astype(int) - np.asarray(expected.images[0])).max() <= 1


def test_sampler_that_cannot_start_at_pure_noise_is_refused(tiny: Path) -> None:
    source = Pretrained(str(tiny), prediction_type="v_prediction", zero_terminal_snr=True)
    with pytest.raises(UserError, match="^sampling.sampler: pndm does not support zero terminal SNR"):
        sdtune.sample("a fox", backbone=source, sampling=Sampling(steps=2, sampler="pndm"))


def test_epsilon_with_zero_terminal_snr_is_refused_before_loading(tiny: Path) -> None:
    with pytest.raises(UserError, match="^backbone.zero_terminal_snr"):
        _ = Pretrained(str(tiny), zero_terminal_snr=True).facts
