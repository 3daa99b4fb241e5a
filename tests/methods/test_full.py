"""Full fine-tuning: the UNet is open, and plain diffusers loads what is left behind."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from running import Spy, adamw, fit, folder_data
from sdtune.backbone import Pretrained
from sdtune.methods import Full


def test_trains_the_unet_alone_and_leaves_a_pipeline(tiny: Path, pictures: Path, tmp_path: Path) -> None:
    model = Full(backbone=Pretrained(str(tiny)), optimizer=adamw(1e-3))
    spy = Spy()
    fit(model, folder_data(pictures), 2, [spy])
    names = {name for name, _ in model.trainable()}
    assert names == {f"backbone.unet.{name}" for name, _ in model.backbone.unet.named_parameters()}
    assert all(gradient.any() for gradient in spy.gradients[1].values())

    model.artifact(tmp_path / "artifact", "mine")
    base = StableDiffusionPipeline.from_pretrained(tiny, local_files_only=True)
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "artifact" / "mine", local_files_only=True)
    trained = model.backbone.unet.state_dict()
    assert loaded.unet.state_dict().keys() == trained.keys()
    for key, value in loaded.unet.state_dict().items():
        assert torch.equal(value, trained[key].contiguous()), key
    assert any(not torch.equal(v, base.unet.state_dict()[k]) for k, v in trained.items())
    for part in ("text_encoder", "vae"):
        ours, theirs = getattr(loaded, part).state_dict(), getattr(base, part).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    for file in ("tokenizer/vocab.json", "tokenizer/merges.txt", "scheduler/scheduler_config.json"):
        assert (tmp_path / "artifact" / "mine" / file).read_bytes() == (tiny / file).read_bytes()
    # The folder is a backbone again, with a hash of its own.
    assert Pretrained(str(tmp_path / "artifact" / "mine")).hash() != Pretrained(str(tiny)).hash()
