"""Grid of LoRA strengths, from the base model to the full LoRA."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from running import adamw, fit, folder_data
from sdtune.backbone import Pretrained
from sdtune.backbone.new_tokens import NewToken
from sdtune.evaluation.strengths import STRENGTHS, strength_grid
from sdtune.images.grids import grid
from sdtune.methods import LoRA, TextualInversion
from sdtune.sampling.loop import Request, Sampling
from sdtune.sampling.run_models import RunModels, generate_images

CPU = torch.device("cpu")


def test_grid_has_a_row_per_strength_from_base_to_lora(tiny: Path, images: Path, tmp_path: Path) -> None:
    source, settings = Pretrained(str(tiny)), Sampling(steps=2)
    model = LoRA(rank=2, backbone=source, optimizer=adamw(1e-1))
    fit(model, folder_data(images), 2)
    model.artifact(tmp_path / "artifact", "lora")
    requests = [Request(f"thing {i}", i) for i in range(5)]
    models = RunModels(source, tmp_path / "artifact", "lora", CPU)
    strength_grid(models, requests, settings, tmp_path)
    shown = np.asarray(Image.open(tmp_path / "strengths.png"))
    with models.base() as backbone:
        base_images = generate_images(backbone, requests[:4], settings)
    with models.trained() as backbone:
        lora_images = generate_images(backbone, requests[:4], settings)
    assert not np.array_equal(base_images[0], lora_images[0])
    sheet = np.asarray(grid([base_images, *[lora_images] * (len(STRENGTHS) - 1)]))
    # Cut off the labels on the left and at the top.
    rows = shown[-sheet.shape[0] :, -sheet.shape[1] :]
    tile = (sheet.shape[0] - 6) // len(STRENGTHS)
    assert np.array_equal(rows[:tile], sheet[:tile])
    assert np.abs(rows[-tile:].astype(int) - sheet[-tile:]).max() <= 1
    assert not np.array_equal(rows[2 * tile : 3 * tile], sheet[2 * tile : 3 * tile])


def test_textual_inversion_has_no_strengths_grid(tiny: Path, images: Path, tmp_path: Path) -> None:
    source = Pretrained(str(tiny))
    model = TextualInversion(backbone=source, optimizer=adamw(1e-2), new_tokens=[NewToken("<new>", "a")])
    fit(model, folder_data(images, templates=["<new> {}"]), 1)
    model.artifact(tmp_path / "artifact", "word")
    models = RunModels(source, tmp_path / "artifact", "word", CPU)
    strength_grid(models, [Request("<new>", 0)], Sampling(steps=1), tmp_path)
    assert not (tmp_path / "strengths.png").exists()
