"""Assemble pocket's pipeline: ``python -m sdtune.pocket.pretraining.assemble FOLDER [--unet DIR] [--ship]``.

Without ``--unet``, writes ``FOLDER/pipeline`` with a UNet config but no UNet weights; UNet training starts from it.
With ``--unet``, adds the weights of that UNet. ``--ship`` writes the models of the package instead, with UNet and CLIP
in half precision.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPTextModel

from sdtune.files import replacing, write_json
from sdtune.formats.pipeline import save_text_encoder, weights_name
from sdtune.pocket import clip_path, path
from sdtune.pocket.world.scenes import SIDE

_UNET = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": (64, 128, 192),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3,
    "up_block_types": ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": 192,
    "attention_head_dim": (1, 4, 6),  # diffusers' name for the number of heads
    "norm_num_groups": 16,
}

_PIXELS = {
    "image_processor_type": "CLIPImageProcessor",
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "size": {"height": SIDE, "width": SIDE},
    "do_center_crop": False,
}


def _text_encoder(clip: Path, target: Path) -> None:
    model = CLIPModel.from_pretrained(clip, dtype=torch.float32)
    encoder = CLIPTextModel(model.config.text_config)
    encoder.load_state_dict(
        {k.removeprefix("text_model."): v for k, v in model.state_dict().items() if k.startswith("text_model.")}
    )
    # Always store float32: transformers loads half precision unchanged, and the pipeline would then mix two dtypes.
    save_text_encoder(encoder, target)


def _convert_to_half(file: Path) -> None:
    half = {k: v.half() for k, v in load_file(file).items()}
    with replacing(file) as partial:
        save_file(half, partial, {"format": "pt"})


_INDEX: dict[str, Any] = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.36.0",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def assemble_pipeline(folder: Path, final: Path, unet: Path | None, ship: bool) -> None:
    """Atomically write the pipeline folder ``final`` from the trained parts in ``folder``."""
    with replacing(final) as target:
        target.mkdir()
        shutil.copytree(folder / "tokenizer", target / "tokenizer")
        AutoencoderKL.from_pretrained(folder / "vae").save_pretrained(target / "vae")
        _text_encoder(folder / "clip", target / "text_encoder")
        DDIMScheduler(
            num_train_timesteps=1000,
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type="epsilon",
        ).save_pretrained(target / "scheduler")
        if unet is None:
            UNet2DConditionModel(**_UNET).save_config(target / "unet")
        else:
            UNet2DConditionModel.from_pretrained(unet).save_pretrained(target / "unet")
        if ship:
            _convert_to_half(target / "unet" / weights_name("unet"))
        for config in target.glob("*/config.json"):
            content = json.loads(config.read_text(encoding="utf-8"))
            content.pop("_name_or_path", None)  # a local path of the training machine
            write_json(config, content)
        write_json(target / "model_index.json", _INDEX)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m sdtune.pocket.pretraining.assemble", description="Assemble pocket's pipeline."
    )
    parser.add_argument("folder", type=Path, help="folder that contains tokenizer, clip and vae")
    parser.add_argument("--unet", type=Path, help="folder of the trained UNet")
    parser.add_argument("--ship", action="store_true", help="write the models of the package")
    arguments = parser.parse_args()
    target = path() if arguments.ship else arguments.folder / "pipeline"
    assemble_pipeline(arguments.folder, target, arguments.unet, arguments.ship)
    if arguments.ship:
        with replacing(clip_path()) as clip:
            CLIPModel.from_pretrained(arguments.folder / "clip", dtype=torch.float16).save_pretrained(clip)
            write_json(clip / "preprocessor_config.json", _PIXELS)
        with replacing(clip_path().parent / "classifier") as classifier:
            shutil.copytree(arguments.folder / "classifier", classifier)
    size = sum(f.stat().st_size for f in target.parent.rglob("*") if f.is_file())
    print(f"wrote {target}; size of its parent folder: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
