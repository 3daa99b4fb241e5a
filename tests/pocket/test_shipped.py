"""Models shipped with the package: complete, small enough, and loadable by other programs."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

import sdtune
from sdtune.backbone import Pretrained

MODELS = sdtune.pocket.path().parent


def keys(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def test_all_models_together_have_at_most_45_mb() -> None:
    assert sum(f.stat().st_size for f in MODELS.rglob("*") if f.is_file()) <= 45e6


def test_plain_diffusers_generates_an_image_with_pocket() -> None:
    pipe = StableDiffusionPipeline.from_pretrained(sdtune.pocket.path(), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a big fox on a blue background", num_inference_steps=2, output_type="pt").images
    assert image.shape == (1, 3, 64, 64)
    assert torch.isfinite(image).all()


def test_tokenizer_and_text_encoder_have_the_files_and_keys_of_older_clients() -> None:
    tokenizer = sdtune.pocket.path() / "tokenizer"
    vocabulary = json.loads((tokenizer / "vocab.json").read_text(encoding="utf-8"))
    merges = (tokenizer / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    assert (tokenizer / "tokenizer.json").is_file()
    assert all(len(merge.split()) == 2 for merge in merges)
    assert {"<|startoftext|>", "<|endoftext|>"} <= vocabulary.keys()
    assert all(k.startswith("text_model.") for k in keys(sdtune.pocket.path() / "text_encoder" / "model.safetensors"))


def test_any_word_is_tokenized_losslessly() -> None:
    backbone = Pretrained().load()
    text = "watercolour of a Ünïcode 漢字 sks <my_cat>"
    ids = backbone.tokenizer(text).input_ids
    assert backbone.tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == text.lower().replace(" ", "")


def test_text_encoder_is_the_text_model_of_the_clip() -> None:
    from transformers import CLIPModel

    clip = CLIPModel.from_pretrained(sdtune.pocket.clip_path(), dtype=torch.float32, local_files_only=True)
    backbone = Pretrained().load()
    ids = backbone.tokenize(["a big fox on a blue background"])
    expected = clip.text_model(ids).last_hidden_state
    # The CLIP is stored in half precision.
    actual = backbone.encode_text(["a big fox on a blue background"]).states
    torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02)


def test_clip_matches_images_with_their_captions() -> None:
    """More than 90% of the images are closest to their own caption, among captions of 48 scenes."""
    import numpy as np

    from sdtune.evaluation.clip import Clip
    from sdtune.pocket.world.captions import full_caption
    from sdtune.pocket.world.scenes import draw_scene, held_out_scenes

    scenes = held_out_scenes(11, 48)
    clip = Clip("pocket", torch.device("cpu"))
    images = clip.images([np.asarray(draw_scene(scene)) for scene in scenes])
    prompts = clip.prompts([full_caption(scene) for scene in scenes])
    hits = (images @ prompts.T).argmax(1) == torch.arange(len(scenes))
    assert float(hits.float().mean()) > 0.9
