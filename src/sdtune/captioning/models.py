"""Files of the models that write captions and masks: where they are, which kind they are, and their loading."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from safetensors import SafetensorError

from sdtune.errors import UserError
from sdtune.files import read_json
from sdtune.paths import download_model, is_hub_id

_KEY = "model"

TAGGER_FILES = ("model.onnx", "selected_tags.csv")
"""Weights and tags of a WD14 tagger."""

_CHECKED_FILES = ("config.json", "selected_tags.csv")
"""Small files that show whether a model is supported, before its weights are downloaded."""

_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.safetensors")
"""Files of a transformers model: no Python code, and weights as safetensors only."""

_REMEDIES = {
    "caption": "set an image-text-to-text model of transformers, such as BLIP, or a WD14 tagger (model.onnx and"
    " selected_tags.csv)",
    "mask": "set a CLIPSeg model",
}
"""Remedy for a model of another kind, by command."""


def is_tagger(folder: Path) -> bool:
    """Whether ``folder`` contains a WD14 tagger."""
    return (folder / TAGGER_FILES[1]).is_file()


def check_model_name(name: str, kind: str) -> None:
    """Check the setting ``model`` without downloading or loading anything.

    Args:
        name: a local folder or a hub id.
        kind: what the model makes: ``caption`` or ``mask``.

    Raises:
        UserError: it is neither, or the local folder contains no model of this kind.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        _check_files(folder, name, kind)
        _check_weights(folder, name)
    elif not is_hub_id(name):
        raise UserError(f"{name} is not a folder", key=_KEY, remedy="set a local folder with a model, or a hub id")


def locate_model(name: str, kind: str) -> Path:
    """Folder of the model ``name``; a hub id is downloaded, its config first.

    Raises:
        UserError: it cannot be downloaded, or is not a model of this ``kind``.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    folder = download_model(name, _CHECKED_FILES, _KEY)
    _check_files(folder, name, kind)
    folder = download_model(name, TAGGER_FILES if is_tagger(folder) and kind == "caption" else _FILES, _KEY)
    _check_weights(folder, name)
    return folder


def _check_files(folder: Path, name: str, kind: str) -> None:
    """Check from the configuration files in ``folder`` that its model is supported; errors call it ``name``."""
    if kind == "caption" and is_tagger(folder):
        if importlib.util.find_spec("onnxruntime") is None:
            raise UserError(
                f"the tagger {name} needs onnxruntime", key=_KEY, remedy="install it: pip install 'sdtune[tagger]'"
            )
        return
    if not (folder / "config.json").is_file():
        raise UserError(f"{name} contains no model (config.json is missing)", key=_KEY, remedy=_REMEDIES[kind])
    config = read_json(folder / "config.json", _KEY)
    if "auto_map" in config:
        raise UserError(
            f"{name} needs Python code of its author (auto_map in config.json), which sdtune does not run",
            key=_KEY,
            remedy="choose a model that transformers supports without trust_remote_code",
        )
    if config.get("model_type") not in _model_types(kind):
        raise UserError(
            f"{name} is a model of type {config.get('model_type')}, which makes no {kind}s",
            key=_KEY,
            remedy=_REMEDIES[kind],
        )


def _model_types(kind: str) -> set[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return {"clipseg"} if kind == "mask" else set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def _check_weights(folder: Path, name: str) -> None:
    expected = TAGGER_FILES[0] if is_tagger(folder) else "*.safetensors"
    if not any(folder.glob(expected)):
        raise UserError(
            f"{name} contains no weights ({expected} is missing)",
            key=_KEY,
            remedy="choose a model with such a file; weights in pickle files are not read",
        )


def load_transformers_model(
    model_class: Any, folder: Path, device: torch.device, dtype: torch.dtype | None
) -> tuple[Any, Any]:
    """Load the processor and the model of ``model_class`` from ``folder``, in eval mode.

    Args:
        dtype: data type of the weights; None: float32.

    Raises:
        UserError: a package is missing, or the folder has no complete model. transformers would initialize missing
            weights at random.
    """
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model, loading_info = model_class.from_pretrained(
            folder,
            dtype=dtype or torch.float32,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except ImportError as error:
        raise _missing_package(folder, error) from error
    except (OSError, ValueError, SafetensorError) as error:
        reason = shorten(str(error), 100, placeholder=" ...")
        raise UserError(f"{folder} cannot be loaded ({reason})", key=_KEY, remedy="choose another model") from error
    if loading_info["missing_keys"]:
        missing = sorted(loading_info["missing_keys"])
        raise UserError(
            f"{folder} is not complete ({len(missing)} weights are missing, the first is {missing[0]})",
            key=_KEY,
            remedy="choose another model",
        )
    if not hasattr(processor, "image_processor"):
        raise UserError(
            f"{folder} contains no image processor", key=_KEY, remedy="add its preprocessor_config.json and tokenizer"
        )
    return processor, model.eval().to(device)


def _missing_package(folder: Path, error: ImportError) -> UserError:
    """Error for a model that needs a package that is not installed; transformers' own text has several lines."""
    names = ("torchvision", "sentencepiece", "protobuf", "tiktoken", "timm", "einops")
    package = next((name for name in names if re.search(rf"\b{name}\b", str(error), re.IGNORECASE)), None)
    reason = package or shorten(str(error), 100, placeholder=" ...")
    return UserError(
        f"{folder} needs a package that is not installed ({reason})",
        key=_KEY,
        remedy="choose another model, or install this package",
    )
