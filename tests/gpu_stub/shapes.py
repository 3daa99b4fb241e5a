"""Models with the shapes of SD 1.5, SDXL and CLIP whose weights are zeros in sparse files, which take no disk space."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import CLIPModel, Dinov2Config, Dinov2Model

from experiments.gpu.weights import clip_config
from sdtune.backbone.families import family_of_folder
from sdtune.backbone.models import from_config
from sdtune.backbone.single_file import included_configs
from sdtune.backbone.vocabulary import END, write_tokenizer

_TYPES = {torch.float16: ("F16", 2), torch.float32: ("F32", 4), torch.int64: ("I64", 8)}


def pipeline(folder: Path, kind: str) -> Path:
    """Folder ``folder/kind`` of a diffusers pipeline in float16; ``kind`` is ``sd15`` or ``sdxl``."""
    target = folder / kind
    if (target / "model_index.json").is_file():
        return target
    configs = included_configs(kind)
    assert configs is not None
    shutil.copytree(configs, target, dirs_exist_ok=True)
    index = json.loads((configs / "model_index.json").read_text(encoding="utf-8"))
    (target / "model_index.json").unlink()
    for name in sorted(family_of_folder(configs, "backbone.path").components):
        with torch.device("meta"):
            state = from_config(name, configs).state_dict()
        stem = "model" if name.startswith("text_encoder") else "diffusion_pytorch_model"
        zero_file(target / name / f"{stem}.safetensors", state)
    for name in ("tokenizer", "tokenizer_2") if (configs / "text_encoder_2").is_dir() else ("tokenizer",):
        write_tokenizer(target / name, "!" if name == "tokenizer_2" else END)
        index[name] = ["transformers", "CLIPTokenizer"]
    (target / "model_index.json").write_text(json.dumps(index), encoding="utf-8")  # marks the folder as complete
    return target


def clip(folder: Path) -> Path:
    """Folder of a CLIP model with the shapes of ViT-L/14."""
    target = folder / "clip"
    config = clip_config()
    with torch.device("meta"):
        state = CLIPModel(config).state_dict()
    config.save_pretrained(target)
    zero_file(target / "model.safetensors", state)
    write_tokenizer(target, END)
    (target / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "CLIPImageProcessor"}))
    return target


def dino(folder: Path) -> Path:
    """Folder of a DINOv2 model with the shapes of ViT-L/14."""
    target = folder / "dino"
    config = Dinov2Config(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=518, patch_size=14)
    with torch.device("meta"):
        state = Dinov2Model(config).state_dict()
    config.save_pretrained(target)
    zero_file(target / "model.safetensors", state)
    (target / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "BitImageProcessor"}))
    return target


def zero_file(path: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Safetensors file of zeros with the names and shapes of ``state``; floating-point tensors are float16."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in state.items():
        kind, size = _TYPES[torch.float16 if tensor.is_floating_point() else torch.int64]
        start, end = end, end + tensor.numel() * size
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as handle:
        handle.write(struct.pack("<Q", len(text)) + text)
        handle.truncate(8 + len(text) + end)
