"""Single-file checkpoints, converted once to a pipeline folder in the cache."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock
from torch import Tensor

from sdtune.backbone.families import FAMILIES, STATED_PREDICTION, T5, Family, family_of_file, family_of_folder
from sdtune.backbone.families.base import VAE
from sdtune.backbone.models import model_shapes
from sdtune.backbone.vocabulary import write_tokenizer
from sdtune.errors import UserError
from sdtune.files import mark_used, read_json, replacing, write_json
from sdtune.formats.checkpoint_file import read_checkpoint
from sdtune.formats.files import check_finite, write_safetensors
from sdtune.formats.float8 import without_float8
from sdtune.formats.keys import check_keys
from sdtune.formats.original import split
from sdtune.formats.original.checkpoint import stated_prediction
from sdtune.formats.pipeline import weights_name
from sdtune.paths import cache_folder

log = logging.getLogger("sdtune")

CONFIGS = Path(__file__).parent / "configs"
_LAYOUT = 3  # version of the converted folders' layout; increase it to invalidate cached folders


def included_configs(name: str) -> Path | None:
    """Folder of the configs ``name`` (such as ``sd15``) that are included in sdtune; None if there are none."""
    folder = CONFIGS / name
    return folder if (folder / "model_index.json").is_file() else None


def convert_checkpoint(file: Path, config: Path | None, allow_pickle: bool, provided: Collection[str] = ()) -> Path:
    """Pipeline folder in the cache, converted from the checkpoint ``file`` on the first call.

    Args:
        file: ``.safetensors`` or a pickle, in the original layout.
        config: pipeline folder with the configs; if None, the configs of its family that are included in sdtune.
        allow_pickle: see :func:`sdtune.formats.checkpoint_file.read_checkpoint`.
        provided: components that are not used, or come from other files: the file may lack them.

    Raises:
        UserError: not a Stable Diffusion model that sdtune can train, or its tensors do not match the configs.
    """
    target = _cache_target(file, config)
    with FileLock(_lock_file(target)):
        if (target / "model_index.json").is_file() and not _lacking(target, provided):
            mark_used(target)
            return target
        checkpoint, metadata = read_checkpoint(file, allow_pickle, "backbone.path")
        try:
            tensors = _usual_names(without_float8(checkpoint))
            family = family_of_file(_shapes(tensors), FAMILIES.values())
            prediction = stated_prediction(tensors, metadata, family.layout.predictions)
        except UserError as error:
            raise UserError(f"{file} {error}", key="backbone.path") from error
        lacking = [name for name in family.layout.optional if name not in provided]
        if missing := [name for name in lacking if name not in family.layout.stored(tensors)]:
            raise _missing(file, missing)
        config_folder = config or CONFIGS / family.configs
        family_of_configs = family_of_folder(config_folder, "backbone.config")
        if family_of_configs is not family:
            raise UserError(
                f"{config_folder} is for {family_of_configs.title}, but {file} is {family.title}",
                key="backbone.config",
                remedy=f"set it to a folder of {family.title} configs, or to null for the included configs",
            )
        log.info("backbone: converting %s (%s) once to a pipeline folder in the cache", file.name, family.title)
        _write(target, config_folder, tensors, family, f"backbone.path: {file}", prediction)
    return target


def _lacking(target: Path, provided: Collection[str]) -> list[str]:
    """Components that the converted folder ``target`` has no weights of, except those in ``provided``."""
    components = family_of_folder(target, "backbone.path").components
    return [name for name in components if name not in provided and not (target / name / weights_name(name)).is_file()]


def _missing(file: Path, components: Sequence[str]) -> UserError:
    without = ", or backbone.t5=false" if T5 in components else ""
    return UserError(
        f"{file} contains no {', '.join('VAE' if name == 'vae' else name for name in components)}",
        key="backbone.path",
        remedy=f"set {' '.join(f'backbone.{name}=FILE' for name in components)}{without}",
    )


def convert_encoder(file: Path, component: str, pipeline: Path, allow_pickle: bool) -> Path:
    """Folder of a text encoder in the cache, converted from ``file`` on the first call.

    Args:
        file: a text encoder alone, with its transformers names, or a single file that contains it.
        component: folder of the text encoder in a pipeline.
        pipeline: pipeline folder whose config the file must match.
        allow_pickle: see :func:`sdtune.formats.checkpoint_file.read_checkpoint`.

    Raises:
        UserError: the tensors do not match the config.
    """
    key, target = f"backbone.{component}", _cache_target(file, pipeline / component)
    with FileLock(_lock_file(target)):
        if (target / "config.json").is_file():
            mark_used(target)
            return target
        family = family_of_folder(pipeline, "backbone.path")
        layout = family.layout.components[component]
        config = read_json(pipeline / component / "config.json", "backbone.path")
        expected = model_shapes(component, pipeline)
        try:
            tensors = without_float8(read_checkpoint(file, allow_pickle, key)[0])
        except UserError as error:
            raise UserError(f"{file} {error}", key=key) from error
        inside = {name: tensor for name, tensor in tensors.items() if name.startswith(layout.prefix)}
        found = {name.removeprefix(layout.prefix): tensor for name, tensor in (inside or tensors).items()}
        found = {name: tensor for name, tensor in found.items() if not family.layout.is_ignored(layout.prefix + name)}
        encoder = layout.read(found, config, expected)
        check_keys(f"{key}: {file}", _shapes(encoder), expected, "use the text encoder of this model")
        check_finite(encoder, f"{key}: {file}")
        with replacing(target, sync=False, alone=True) as partial:
            write_safetensors(partial / weights_name(component), encoder, {"format": "pt"})
            write_json(partial / "config.json", config)
    return target


def convert_vae(file: Path, pipeline: Path, allow_pickle: bool) -> Path:
    """VAE folder in the cache, converted from ``file`` on the first call.

    Args:
        file: a VAE in the original layout or with diffusers' names.
        pipeline: pipeline folder whose VAE config the file must match.
        allow_pickle: see :func:`sdtune.formats.checkpoint_file.read_checkpoint`.

    Raises:
        UserError: the tensors do not match the VAE config of ``pipeline``.
    """
    target = _cache_target(file, pipeline / "vae")
    with FileLock(_lock_file(target)):
        if (target / "config.json").is_file():
            mark_used(target)
            return target
        tensors, _ = read_checkpoint(file, allow_pickle, "backbone.vae")
        expected = model_shapes("vae", pipeline)
        config = read_json(pipeline / "vae" / "config.json", "backbone.path")
        try:
            plain = without_float8(tensors)
        except UserError as error:
            raise UserError(f"{file} {error}", key="backbone.vae") from error
        vae = VAE.read({key.removeprefix(VAE.prefix): tensor for key, tensor in plain.items()}, config, expected)
        check_keys(f"backbone.vae: {file}", _shapes(vae), expected)
        check_finite(vae, f"backbone.vae: {file}")
        with replacing(target, sync=False, alone=True) as partial:
            write_safetensors(partial / weights_name("vae"), vae, {"format": "pt"})
            write_json(partial / "config.json", config)
    return target


def _cache_target(file: Path, config: Path | None) -> Path:
    stat = file.stat()
    # All config files that are copied or read together with the checkpoint.
    configs = [f for f in sorted((config or CONFIGS).rglob("*")) if f.suffix in (".json", ".txt") and f.is_file()]
    digest = hashlib.sha256()
    for config_file in configs:
        digest.update(f"{config_file.relative_to(config or CONFIGS)}\0".encode() + config_file.read_bytes())
    cache_key = [str(file.resolve()), stat.st_size, stat.st_mtime_ns, _LAYOUT, digest.hexdigest()]
    return cache_folder() / "backbones" / hashlib.sha256(json.dumps(cache_key).encode()).hexdigest()[:32]


def _lock_file(target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    return target.with_name(f"{target.name}.lock")


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {key: list(tensor.shape) for key, tensor in tensors.items()}


def _usual_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` with the key prefixes that the families expect."""
    renamed = dict(tensors)
    for family in FAMILIES.values():
        renamed = family.usual_names(renamed)
    return renamed


def _write(
    target: Path, config_folder: Path, tensors: dict[str, Tensor], family: Family, where: str, prediction: str | None
) -> None:
    components = family.components
    configs = {name: read_json(config_folder / name / "config.json", "backbone.config") for name in components}
    expected = {name: model_shapes(name, config_folder) for name in components}
    with_weights = family.layout.stored(tensors)
    models = split(tensors, family.layout, configs, expected)
    remedy = "set backbone.config=FOLDER to a pipeline folder with the configs of this model"
    if config_folder.is_relative_to(CONFIGS):
        remedy += " (backbone.config=pocket if it was trained from pocket)"
    for name in with_weights:
        check_keys(f"{where} ({name})", _shapes(models[name]), expected[name], remedy)
        check_finite(models[name], f"{where} ({name})")
    index = read_json(config_folder / "model_index.json", "backbone.config")
    tokenizers = {name.replace("text_encoder", "tokenizer"): pad for name, pad in family.pads.items()}
    index |= {name: ["transformers", "CLIPTokenizer"] for name, pad in tokenizers.items() if pad is not None}
    with replacing(target, sync=False, alone=True) as partial:
        for name in components:
            if name in with_weights:
                write_safetensors(partial / name / weights_name(name), models[name], {"format": "pt"})
            write_json(partial / name / "config.json", configs[name])
        for name, pad in tokenizers.items():
            if (config_folder / name).is_dir():
                shutil.copytree(config_folder / name, partial / name)
            elif pad is not None:
                write_tokenizer(partial / name, pad)
        write_json(partial / "scheduler" / "scheduler_config.json", _scheduler(config_folder, tensors, prediction))
        write_json(partial / "model_index.json", index)


def _scheduler(config_folder: Path, tensors: Mapping[str, Tensor], prediction: str | None) -> dict[str, Any]:
    """Scheduler config of ``config_folder``, with the prediction type and terminal SNR that the checkpoint states."""
    settings = read_json(config_folder / "scheduler" / "scheduler_config.json", "backbone.config")
    if prediction is not None:
        settings["prediction_type"] = prediction
    if "v_pred" in tensors:
        settings[STATED_PREDICTION] = "v_prediction"
    if "ztsnr" in tensors:
        settings |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return settings
