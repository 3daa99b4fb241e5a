"""Load one artifact with the installed release of diffusers: ``python client.py CASES NAME``.

Prints one line of JSON with the largest pixel difference (0 to 255) for each check. Does not import sdtune.
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
    SD3ControlNetModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image

assert AutoencoderKL


def pipeline(case: dict[str, Any], path: str) -> Any:
    """Load a pipeline folder, or a single file with the configs of the base model."""
    more: dict[str, Any] = {"safety_checker": None} if case["family"] in ("sd1", "sd2") else {}
    if Path(path).is_dir():
        return in_bfloat16(DiffusionPipeline.from_pretrained(path, local_files_only=True, **more))
    kind: Any = {"sdxl": StableDiffusionXLPipeline, "sd1": StableDiffusionPipeline, "sd2": StableDiffusionPipeline}.get(
        case["family"], StableDiffusion3Pipeline
    )
    pipe = kind.from_single_file(path, config=case["base"], local_files_only=True, **more)
    base = DiffusionPipeline.from_pretrained(case["base"], local_files_only=True, **more)
    pipe.scheduler = base.scheduler  # a single file has no scheduler config, and programs choose different defaults
    return in_bfloat16(pipe)


def in_bfloat16(pipe: Any) -> Any:
    """``pipe`` with T5 in bfloat16, as sdtune runs it, and without dropout.

    T5 is in training mode after ``from_single_file``, so that its states would be random.
    """
    if getattr(pipe, "text_encoder_3", None) is not None:
        pipe.text_encoder_3.to(torch.bfloat16).eval()
    return pipe


def generate(pipe: Any, case: dict[str, Any], **more: Any) -> np.ndarray:
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


def difference(image: np.ndarray, other: np.ndarray) -> int:
    """Largest difference of a pixel."""
    return int(np.abs(image.astype(int) - other.astype(int)).max())


def lora(case: dict[str, Any], expected: np.ndarray) -> dict[str, int]:
    pipe = pipeline(case, case["base"])
    base_image = generate(pipe, case)
    path = Path(case["place"])
    pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="it", use_safetensors=True)
    pipe.set_adapters(["it"], [case["strength"]])
    live = generate(pipe, case)
    pipe.set_adapters(["it"], [0.0])
    without = generate(pipe, case)
    pipe.set_adapters(["it"], [1.0])
    pipe.fuse_lora(lora_scale=case["strength"])
    fused = generate(pipe, case)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    return {
        "as sdtune": difference(live, expected),
        "strength 0 = base": difference(without, base_image),
        "fused = live": difference(fused, live),
        "unloaded = base": difference(generate(pipe, case), base_image),
        "moved": difference(live, base_image),
    }


def word(case: dict[str, Any], expected: np.ndarray) -> dict[str, int]:
    pipe = pipeline(case, case["base"])
    base_image = generate(pipe, case)
    path = Path(case["place"])
    if case["family"] == "sdxl":
        from safetensors.torch import load_file

        vectors = load_file(path)
        for key, end in (("clip_l", ""), ("clip_g", "_2")):
            encoder, tokenizer = getattr(pipe, f"text_encoder{end}"), getattr(pipe, f"tokenizer{end}")
            pipe.load_textual_inversion(vectors[key], token="<cat>", text_encoder=encoder, tokenizer=tokenizer)
        # With `eos_token_id: 2` in the config, transformers pools at the largest token ID, which is a new token.
        inner = getattr(pipe.text_encoder_2, "text_model", pipe.text_encoder_2)
        inner.eos_token_id = pipe.tokenizer_2.eos_token_id
    else:
        pipe.load_textual_inversion(str(path.parent), weight_name=path.name, token="<cat>", use_safetensors=True)
    live = generate(pipe, case)
    differences = {"as sdtune": difference(live, expected), "moved": difference(live, base_image)}
    if case["family"] != "sdxl":
        pipe.unload_textual_inversion("<cat>")
        differences["unloaded = base"] = difference(generate(pipe, case), base_image)
    return differences


def controlnet(case: dict[str, Any], expected: np.ndarray) -> dict[str, int]:
    base = pipeline(case, case["base"])
    base_image = generate(base, case)
    is_sd3 = case["family"].startswith("sd3")
    pipe = pipeline_with_sd3_controlnet(case, base) if is_sd3 else pipeline_with_controlnet(case, base)
    control = {"control_image" if is_sd3 else "image": Image.open(case["map"])}
    live = generate(pipe, case, controlnet_conditioning_scale=1.0, **control)
    without = generate(pipe, case, controlnet_conditioning_scale=0.0, **control)
    return {
        "as sdtune": difference(live, expected),
        "strength 0 = base": difference(without, base_image),
        "moved": difference(live, base_image),
    }


def pipeline_with_controlnet(case: dict[str, Any], base: Any) -> Any:
    path = Path(case["place"])
    if path.is_dir():
        net = ControlNetModel.from_pretrained(path, local_files_only=True, use_safetensors=True)
    else:
        net = ControlNetModel.from_single_file(
            str(path), config=str(path.parents[1] / "net" / "it"), local_files_only=True
        )
    sdxl = case["family"] == "sdxl"
    kind: Any = StableDiffusionXLControlNetPipeline if sdxl else StableDiffusionControlNetPipeline
    parts = {k: v for k, v in base.components.items() if k not in ("image_encoder",)}
    return kind(**parts, controlnet=net, **({} if sdxl else {"requires_safety_checker": False}))


def pipeline_with_sd3_controlnet(case: dict[str, Any], base: Any) -> Any:
    net = SD3ControlNetModel.from_pretrained(case["place"], local_files_only=True, use_safetensors=True)
    pipe = StableDiffusion3ControlNetPipeline(**base.components, controlnet=net)
    encode = pipe.vae.encode

    def mean_of(pixels: torch.Tensor) -> Any:  # the pipeline draws from the posterior of the map without the generator
        out = encode(pixels)
        out.latent_dist.sample = out.latent_dist.mode
        return out

    pipe.vae.encode = mean_of
    return pipe


def model(case: dict[str, Any], expected: np.ndarray) -> dict[str, int]:
    differences = {"as sdtune": difference(generate(pipeline(case, case["place"]), case), expected)}
    if case["kind"] != "base":
        differences["moved"] = difference(generate(pipeline(case, case["base"]), case), expected)
    return differences


KINDS = {"LoRA": lora, "word": word, "ControlNet": controlnet}


def main() -> None:
    case = next(c for c in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")) if c["name"] == sys.argv[2])
    differences = KINDS.get(case["kind"], model)(case, np.load(case["image"]))
    print(json.dumps(differences))


if __name__ == "__main__":
    main()
