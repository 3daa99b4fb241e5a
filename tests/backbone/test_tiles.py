"""Large images decoded in tiles: nearly the same, in pieces of one size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from running import sample
from sdtune.backbone import Pretrained
from sdtune.backbone.backbone import Backbone
from sdtune.methods import LoRA
from sdtune.pocket.world.scenes import Scene, draw_scene


@pytest.fixture(scope="module")
def pocket() -> Backbone:
    backbone = Pretrained().load()
    backbone.prepare_for_device(torch.device("cpu"))
    return backbone


def latents(backbone: Backbone, images: np.ndarray) -> Tensor:
    pixels = torch.from_numpy(images).permute(2, 0, 1)[None].float() / 127.5 - 1
    moments = backbone.encode_images(pixels)
    return backbone.latents(moments, torch.zeros_like(moments[:, :4]))


def large() -> np.ndarray:
    """uint8 [128, 128, 3]: four images of pocket's world."""
    row = [np.asarray(draw_scene(Scene(name, "blue", "big", "in the middle"))) for name in ("fox", "rose")]
    return np.concatenate([np.concatenate(row, axis=1), np.concatenate(row[::-1], axis=1)], axis=0)


def test_tiles_come_close_to_the_whole(pocket: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    z = latents(pocket, large())
    whole = pocket.decode(z)
    assert whole.shape == (1, 3, 128, 128)
    seen: list[int] = []
    decoder = pocket.vae.decoder.forward

    def watched(x: Tensor, *more: Any) -> Tensor:
        seen.append(max(x.shape[2:]))
        return decoder(x, *more)

    monkeypatch.setattr(pocket.vae.decoder, "forward", watched)
    monkeypatch.setattr(pocket, "tiled", False)
    pocket.decode_in_tiles(64)
    tiled = pocket.decode(z)
    assert tiled.shape == whole.shape
    assert len(seen) == 9
    assert max(seen) == 64 // pocket.facts.factor
    psnr = -10 * torch.log10((tiled - whole).square().mean())
    assert 25 < psnr < 100


def test_what_is_no_larger_than_a_tile_is_whole(pocket: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    z = latents(pocket, large()[:64, :64])
    whole = pocket.decode(z)
    monkeypatch.setattr(pocket, "tiled", False)
    pocket.decode_in_tiles(64)
    assert torch.equal(pocket.decode(z), whole)


def test_encoding_stays_whole(pocket: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents of a cache must not hang on how previews are decoded."""
    before = latents(pocket, large())
    monkeypatch.setattr(pocket, "tiled", False)
    pocket.decode_in_tiles(64)
    assert torch.equal(latents(pocket, large()), before)


def test_the_switch_reaches_training_and_sampling(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for on in (True, False):
        model = LoRA(backbone=Pretrained(str(tiny)), vae_tiling=on)
        model.configure_model()
        assert model.backbone.tiled is on
    asked: list[Any] = []
    monkeypatch.setattr(Backbone, "decode_in_tiles", lambda self: asked.append(self))
    where = "backbone=sd15", f"backbone.path={tiny}", "prompt=a fox", "hardware=cpu", "sampling.steps=1"
    assert sample(*where, f"hydra.run.dir={tmp_path}/a") == 0
    assert not asked
    assert sample(*where, f"hydra.run.dir={tmp_path}/b", "hardware.vae_tiling=true") == 0
    assert len(asked) == 1
