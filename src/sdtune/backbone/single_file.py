"""Single-file checkpoints, unpacked once into a pipeline folder in the cache."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock
from torch import Tensor

from sdtune.backbone.families import FAMILIES, family_by
from sdtune.backbone.models import wanted_shapes
from sdtune.backbone.vocabulary import END, write_tokenizer
from sdtune.errors import UserError
from sdtune.files import replacing, write_json
from sdtune.formats.checkpoint_file import read_checkpoint
from sdtune.formats.files import write_safetensors
from sdtune.formats.keys import check_keys
from sdtune.formats.original import Family, Models, detect, split
from sdtune.formats.original.checkpoint import TEXT, VAE, split_vae
from sdtune.formats.pipeline import weights_name
from sdtune.paths import cache_folder

log = logging.getLogger("sdtune")

CONFIGS = Path(__file__).parent / "configs"
SHIPPED: dict[Family, str] = {"sd1": "sd15", "sd2": "sd21", "sdxl": "sdxl"}
_PADS = {"tokenizer": {"sd1": END, "sd2": "!", "sdxl": END}, "tokenizer_2": {"sdxl": "!"}}
_LAYOUT = 1  # of the unpacked folder; a change makes older ones be made again


def shipped(kind: str) -> Path | None:
    """The folder of the configs of ``kind``, ``sd15`` and so on, that come with sdtune."""
    folder = CONFIGS / kind
    return folder if (folder / "model_index.json").is_file() else None


def family_of(folder: Path) -> Family:
    """Which Stable Diffusion the pipeline ``folder`` is, from its configs."""
    unet = json.loads((folder / "unet" / "config.json").read_text())
    return family_by(unet, two_encoders=(folder / "text_encoder_2").is_dir())


def unpacked(file: Path, config: Path | None, allow_pickle: bool) -> Path:
    """The pipeline folder made of the checkpoint ``file``; made at most once.

    Args:
        file: ``.safetensors`` or a pickle, in the original layout.
        config: a pipeline folder's configs; those of the family that ship if None.
        allow_pickle: see :func:`sdtune.formats.checkpoint_file.read_checkpoint`.

    Raises:
        UserError: no Stable Diffusion that can be trained here, or other tensors than its configs say.
    """
    target = _place(file, config)
    with FileLock(_lock(target)):
        if (target / "model_index.json").is_file():
            return target
        tensors, _ = read_checkpoint(file, allow_pickle, "backbone.path")
        try:
            family = detect({key: list(tensor.shape) for key, tensor in tensors.items()})
        except UserError as error:
            raise UserError(f"{file} {error}", key="backbone.path") from error
        source = config or CONFIGS / SHIPPED[family]
        if family_of(source) != family:
            raise UserError(
                f"{source} is of {FAMILIES[family_of(source)][0]}, and {file} is {FAMILIES[family][0]}",
                key="backbone.config",
            )
        log.info("backbone: unpacking %s (%s) into the cache, once", file.name, FAMILIES[family][0])
        _write(target, source, tensors, family, f"backbone.path: {file}")
    return target


def unpacked_vae(file: Path, pipeline: Path, allow_pickle: bool) -> Path:
    """A folder in the diffusers layout of the VAE ``file``, in the original layout or diffusers', for ``pipeline``."""
    target = _place(file, pipeline / "vae")
    with FileLock(_lock(target)):
        if (target / "config.json").is_file():
            return target
        tensors, _ = read_checkpoint(file, allow_pickle, "backbone.vae")
        wanted = wanted_shapes("vae", pipeline)
        config = json.loads((pipeline / "vae" / "config.json").read_text())
        found = split_vae({key.removeprefix(VAE): tensor for key, tensor in tensors.items()}, config, wanted)
        check_keys(f"backbone.vae: {file}", _shapes(found), wanted)
        with replacing(target, sync=False, alone=True) as partial:
            write_safetensors(partial / weights_name("vae"), found, {"format": "pt"})
            write_json(partial / "config.json", config)
    return target


def _place(file: Path, config: Path | None) -> Path:
    stat = file.stat()
    # Everything that is copied or read beside the file.
    configs = [f for f in sorted((config or CONFIGS).rglob("*")) if f.suffix in (".json", ".txt") and f.is_file()]
    told = hashlib.sha256()
    for one in configs:
        told.update(f"{one.relative_to(config or CONFIGS)}\0".encode() + one.read_bytes())
    said = [str(file.resolve()), stat.st_size, stat.st_mtime_ns, _LAYOUT, told.hexdigest()]
    return cache_folder() / "backbones" / hashlib.sha256(json.dumps(said).encode()).hexdigest()[:32]


def _lock(target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    return target.with_name(f"{target.name}.lock")


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {key: list(tensor.shape) for key, tensor in tensors.items()}


def _write(target: Path, source: Path, tensors: dict[str, Tensor], family: Family, where: str) -> None:
    components = ["unet", "vae", *TEXT[family]]
    configs = {name: json.loads((source / name / "config.json").read_text()) for name in components}
    wanted = {name: wanted_shapes(name, source) for name in components}
    found = split(tensors, Models(family, **configs), wanted)
    try:
        for name in components:
            check_keys(f"{where} ({name})", _shapes(found[name]), wanted[name])
    except UserError as error:
        if not source.is_relative_to(CONFIGS):
            raise
        raise UserError(
            f"{error} Or a model of another shape: then give backbone.config=FOLDER, a pipeline of that shape"
            " (backbone.config=pocket for what was made from pocket)"
        ) from error
    index: dict[str, Any] = json.loads((source / "model_index.json").read_text())
    index |= {name: ["transformers", "CLIPTokenizer"] for name, pads in _PADS.items() if family in pads}
    with replacing(target, sync=False, alone=True) as partial:
        for name in components:
            write_safetensors(partial / name / weights_name(name), found[name], {"format": "pt"})
            write_json(partial / name / "config.json", configs[name])
        for name, pads in _PADS.items():
            if family not in pads:
                continue
            if (source / name).is_dir():
                shutil.copytree(source / name, partial / name)
            else:
                write_tokenizer(partial / name, pads[family])
        write_json(partial / "scheduler" / "scheduler_config.json", _scheduler(source, tensors))
        write_json(partial / "model_index.json", index)


def _scheduler(source: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The config's, with what ComfyUI's markers in the file say of it."""
    content: dict[str, Any] = json.loads((source / "scheduler" / "scheduler_config.json").read_text())
    if "v_pred" in tensors:
        content["prediction_type"] = "v_prediction"
    if "ztsnr" in tensors:
        content |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return content
