"""Models with the shapes of SD 1.5, SDXL and CLIP and random weights in half precision, written in seconds.

The values repeat after a million, because only their distribution matters: torch would need minutes for the normal
numbers of SDXL, whose files have 7 GB.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from experiments.benchmark.commands import images
from experiments.gpu.configurations import SIDES, images_folder
from sdtune.backbone import Pretrained
from sdtune.backbone.families import family_of_folder
from sdtune.backbone.models import from_config
from sdtune.backbone.single_file import included_configs
from sdtune.backbone.vocabulary import END, write_tokenizer
from sdtune.files import write_json

_PERIOD = 1_048_583
"""Number of different values: a prime, so that no two rows of a matrix are equal."""

_LORA_RANK = 16


def prepare(work: Path) -> None:
    """Write what the measurements at true shapes read into ``work``: images, pipelines, LoRAs, and CLIP."""
    for kind, count in (("sd15", 16), ("sdxl", 4)):
        images(images_folder(work, kind), SIDES[kind], count)
        random_pipeline(work / kind, kind)
        random_lora(work / f"{kind}-lora", work / kind)
        Pretrained(str(work / kind)).hash()  # into the cache of the hashes
    random_clip(work / "clip")


def random_pipeline(folder: Path, kind: str) -> None:
    """Write a diffusers pipeline with random weights in the shapes of ``kind`` (``sd15`` or ``sdxl``)."""
    if (folder / "model_index.json").is_file():
        return
    configs = included_configs(kind)
    assert configs is not None
    shutil.copytree(configs, folder, dirs_exist_ok=True)
    (folder / "model_index.json").unlink()
    for name in sorted(family_of_folder(configs, "backbone.path").components):
        with torch.device("meta"):
            state = from_config(name, configs).state_dict()
        stem = "model" if name.startswith("text_encoder") else "diffusion_pytorch_model"
        save_file(random_weights(state), folder / name / f"{stem}.safetensors", {"format": "pt"})
    index = json.loads((configs / "model_index.json").read_text(encoding="utf-8"))
    for name in ("tokenizer", "tokenizer_2") if (configs / "text_encoder_2").is_dir() else ("tokenizer",):
        write_tokenizer(folder / name, "!" if name == "tokenizer_2" else END)
        index[name] = ["transformers", "CLIPTokenizer"]
    write_json(folder / "model_index.json", index)  # written last, because it marks the folder as complete


def random_weights(shapes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Float16 tensors in the shapes of ``shapes``: matrices are normal with variance 1 / fan-in, norms 1, biases 0."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(_PERIOD, generator=generator)
    weights = {}
    for name, tensor in shapes.items():
        if not tensor.is_floating_point():  # positions
            weights[name] = torch.arange(tensor.shape[-1]).expand(tensor.shape).contiguous()
        elif tensor.ndim < 2:
            weights[name] = torch.full(tensor.shape, 0.0 if name.endswith("bias") else 1.0, dtype=torch.float16)
        else:
            first = int(torch.randint(_PERIOD, (1,), generator=generator))
            scaled = (values / math.sqrt(tensor[0].numel())).half()
            repeated = scaled.repeat(1 + (first + tensor.numel()) // _PERIOD)
            weights[name] = repeated[first : first + tensor.numel()].clone().view(tensor.shape)
    return weights


def random_lora(folder: Path, pipeline: Path) -> None:
    """Write a LoRA of the UNet's attention layers in the format of diffusers."""
    with torch.device("meta"):
        state = from_config("unet", pipeline).state_dict()
    targets = ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight")
    shapes = {}
    for name, weight in state.items():
        if name.endswith(targets):
            layer = f"unet.{name.removesuffix('.weight')}"
            shapes[f"{layer}.lora_A.weight"] = weight.new_empty(_LORA_RANK, weight.shape[1])
            shapes[f"{layer}.lora_B.weight"] = weight.new_empty(weight.shape[0], _LORA_RANK)
    pairs = {name: tensor * (0.01 if "lora_B" in name else 1) for name, tensor in random_weights(shapes).items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(pairs, folder / "pytorch_lora_weights.safetensors", {"format": "pt"})


def clip_config() -> CLIPConfig:
    """Config of CLIP ViT-L/14."""
    vision = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
    }
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=768)


def random_clip(folder: Path) -> None:
    """Write a CLIP model with random weights in the shapes of ViT-L/14, for the evaluation of a run."""
    if (folder / "preprocessor_config.json").is_file():
        return
    config = clip_config()
    with torch.device("meta"):
        state = CLIPModel(config).state_dict()
    config.save_pretrained(folder)
    save_file(random_weights(state), folder / "model.safetensors", {"format": "pt"})
    write_tokenizer(folder, END)
    write_json(folder / "preprocessor_config.json", {"image_processor_type": "CLIPImageProcessor"})
