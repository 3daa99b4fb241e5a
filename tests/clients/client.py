"""One artifact in plain diffusers, of whatever release this Python has: ``python client.py CASES NAME``.

Prints one line of JSON: for each check the largest difference of a pixel, 0 to 255. Imports nothing of sdtune.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DiffusionPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image

assert AutoencoderKL


def pipeline(case: dict[str, Any], place: str) -> Any:
    """Of a folder, or of a single file with the base's configs."""
    sdxl = case["family"] == "sdxl"
    more = {} if sdxl else {"safety_checker": None}
    if Path(place).is_dir():
        return DiffusionPipeline.from_pretrained(place, local_files_only=True, **more)
    kind: Any = StableDiffusionXLPipeline if sdxl else StableDiffusionPipeline
    pipe = kind.from_single_file(place, config=case["base"], local_files_only=True, **more)
    base = DiffusionPipeline.from_pretrained(case["base"], local_files_only=True, **more)
    pipe.scheduler = base.scheduler  # a single file names none, and programs choose their own
    return pipe


def draw(pipe: Any, case: dict[str, Any], **more: Any) -> np.ndarray:
    image = pipe(
        case["prompt"],
        negative_prompt="",
        num_inference_steps=case["steps"],
        guidance_scale=case["guidance"],
        generator=torch.Generator("cpu").manual_seed(case["seed"]),
        output_type="np",
        **more,
    ).images[0]
    return (image * 255).round()


def apart(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


def lora(case: dict[str, Any], wanted: np.ndarray) -> dict[str, int]:
    pipe = pipeline(case, case["base"])
    before = draw(pipe, case)
    place = Path(case["place"])
    pipe.load_lora_weights(str(place.parent), weight_name=place.name, adapter_name="it", use_safetensors=True)
    pipe.set_adapters(["it"], [case["strength"]])
    live = draw(pipe, case)
    pipe.set_adapters(["it"], [0.0])
    without = draw(pipe, case)
    pipe.set_adapters(["it"], [1.0])
    pipe.fuse_lora(lora_scale=case["strength"])
    fused = draw(pipe, case)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    return {
        "as sdtune": apart(live, wanted),
        "strength 0 = base": apart(without, before),
        "fused = live": apart(fused, live),
        "unloaded = base": apart(draw(pipe, case), before),
        "moved": apart(live, before),
    }


def word(case: dict[str, Any], wanted: np.ndarray) -> dict[str, int]:
    pipe = pipeline(case, case["base"])
    before = draw(pipe, case)
    place = Path(case["place"])
    if case["family"] == "sdxl":
        from safetensors.torch import load_file

        vectors = load_file(place)
        for key, end in (("clip_l", ""), ("clip_g", "_2")):
            encoder, tokenizer = getattr(pipe, f"text_encoder{end}"), getattr(pipe, f"tokenizer{end}")
            pipe.load_textual_inversion(vectors[key], token="<cat>", text_encoder=encoder, tokenizer=tokenizer)
        # With the config's `eos_token_id: 2` transformers pools at the largest id: that of the new word.
        inner = getattr(pipe.text_encoder_2, "text_model", pipe.text_encoder_2)
        inner.eos_token_id = pipe.tokenizer_2.eos_token_id
    else:
        pipe.load_textual_inversion(str(place.parent), weight_name=place.name, token="<cat>", use_safetensors=True)
    live = draw(pipe, case)
    found = {"as sdtune": apart(live, wanted), "moved": apart(live, before)}
    if case["family"] != "sdxl":
        pipe.unload_textual_inversion("<cat>")
        found["unloaded = base"] = apart(draw(pipe, case), before)
    return found


def controlnet(case: dict[str, Any], wanted: np.ndarray) -> dict[str, int]:
    base, place = pipeline(case, case["base"]), Path(case["place"])
    before = draw(base, case)
    if place.is_dir():
        net = ControlNetModel.from_pretrained(place, local_files_only=True, use_safetensors=True)
    else:
        net = ControlNetModel.from_single_file(
            str(place), config=str(place.parents[1] / "net" / "it"), local_files_only=True
        )
    sdxl = case["family"] == "sdxl"
    kind: Any = StableDiffusionXLControlNetPipeline if sdxl else StableDiffusionControlNetPipeline
    parts = {k: v for k, v in base.components.items() if k not in ("image_encoder",)}
    pipe = kind(**parts, controlnet=net, **({} if sdxl else {"requires_safety_checker": False}))
    shown = Image.open(case["map"])
    live = draw(pipe, case, image=shown, controlnet_conditioning_scale=1.0)
    without = draw(pipe, case, image=shown, controlnet_conditioning_scale=0.0)
    return {
        "as sdtune": apart(live, wanted),
        "strength 0 = base": apart(without, before),
        "moved": apart(live, before),
    }


def model(case: dict[str, Any], wanted: np.ndarray) -> dict[str, int]:
    found = {"as sdtune": apart(draw(pipeline(case, case["place"]), case), wanted)}
    if case["kind"] != "base":
        found["moved"] = apart(draw(pipeline(case, case["base"]), case), wanted)
    return found


KINDS = {"LoRA": lora, "word": word, "ControlNet": controlnet}


def main() -> None:
    case = next(c for c in json.loads(Path(sys.argv[1]).read_text()) if c["name"] == sys.argv[2])
    found = KINDS.get(case["kind"], model)(case, np.load(case["image"]))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
