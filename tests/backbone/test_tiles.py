"""Tiled decoding of large images: close to untiled decoding, in tiles of limited size."""

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


def large_image() -> np.ndarray:
    """uint8 [128, 128, 3]: a grid of four images of pocket's world."""
    row = [np.asarray(draw_scene(Scene(name, "blue", "big", "in the middle"))) for name in ("fox", "rose")]
    return np.concatenate([np.concatenate(row, axis=1), np.concatenate(row[::-1], axis=1)], axis=0)


def test_tiled_decoding_is_close_to_untiled_decoding(pocket: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    z = latents(pocket, large_image())
    untiled = pocket.decode(z)
    assert untiled.shape == (1, 3, 128, 128)
    tile_sides: list[int] = []
    decoder = pocket.vae.decoder.forward

    def recording_forward(x: Tensor, *more: Any) -> Tensor:
        tile_sides.append(max(x.shape[2:]))
        return decoder(x, *more)

    monkeypatch.setattr(pocket.vae.decoder, "forward", recording_forward)
    monkeypatch.setattr(pocket, "decodes_in_tiles", False)
    pocket.decode_in_tiles(64)
    tiled = pocket.decode(z)
    assert tiled.shape == untiled.shape
    assert len(tile_sides) == 9
    assert max(tile_sides) == 64 // pocket.facts.factor
    psnr = -10 * torch.log10((tiled - untiled).square().mean())
    assert 25 < psnr < 100


def test_image_no_larger_than_a_tile_is_decoded_untiled(pocket: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    z = latents(pocket, large_image()[:64, :64])
    untiled = pocket.decode(z)
    monkeypatch.setattr(pocket, "decodes_in_tiles", False)
    pocket.decode_in_tiles(64)
    assert torch.equal(pocket.decode(z), untiled)


def test_encoding_is_never_tiled(pocket: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cached latents must not depend on how previews are decoded."""
    expected = latents(pocket, large_image())
    monkeypatch.setattr(pocket, "decodes_in_tiles", False)
    pocket.decode_in_tiles(64)
    assert torch.equal(latents(pocket, large_image()), expected)


def test_vae_tiling_applies_to_training_and_sampling(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for enabled in (True, False):
        model = LoRA(backbone=Pretrained(str(tiny)), vae_tiling=enabled)
        model.configure_model()
        assert model.backbone.decodes_in_tiles is enabled
    tiled_backbones: list[Any] = []
    monkeypatch.setattr(Backbone, "decode_in_tiles", lambda self: tiled_backbones.append(self))
    overrides = "backbone=sd15", f"backbone.path={tiny}", "prompt=a fox", "hardware=cpu", "sampling.steps=1"
    assert sample(*overrides, f"hydra.run.dir={tmp_path}/a") == 0
    assert not tiled_backbones
    assert sample(*overrides, f"hydra.run.dir={tmp_path}/b", "hardware.vae_tiling=true") == 0
    assert len(tiled_backbones) == 1
