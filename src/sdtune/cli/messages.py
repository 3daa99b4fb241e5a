"""One-line messages for errors of Hydra and OmegaConf while a config is composed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError

from sdtune.config.hydra_compat import full_key
from sdtune.config.overrides import resumed_folder
from sdtune.quoting import shell_override
from sdtune.runs.compare import NOT_RESUMABLE_REMEDY
from sdtune.suggest import closest_match, suggestion

KOHYA = {
    "network_dim": "method.rank",
    "network_alpha": "method.alpha_policy=constant method.alpha",
    "network_dropout": "method.dropout",
    "network_weights": "method.weights",
    "learning_rate": "optimizer.lr",
    "unet_lr": "optimizer.lr",
    "text_encoder_lr": "method.text_encoder_lr",
    "lr_scheduler": "lr_schedule",
    "lr_warmup_steps": "lr_schedule.warmup_steps",
    "max_train_steps": "trainer.max_steps",
    "train_batch_size": "data.batch_size",
    "gradient_accumulation_steps": "trainer.accumulate_grad_batches",
    "gradient_checkpointing": "hardware.gradient_checkpointing",
    "mixed_precision": "hardware.precision",
    "max_grad_norm": "trainer.gradient_clip_val",
    "optimizer_type": "optimizer",
    "train_data_dir": "data=folder data.path",
    "reg_data_dir": "data.class_path",
    "prior_loss_weight": "data.prior_weight",
    "pretrained_model_name_or_path": "backbone.path",
    "vae": "backbone.vae",
    "clip_skip": "backbone.clip_skip",
    "output_dir": "hydra.run.dir",
    "output_name": "name",
    "save_every_n_steps": "save_every",
    "min_snr_gamma": "objective=min_snr objective.weighting.gamma",
    "noise_offset": "objective.offset_noise",
    "flip_aug": "data.flip",
    "random_crop": "data.random_crop",
    "caption_dropout_rate": "data.caption_dropout",
    "sample_every_n_steps": "callbacks.samples.every_steps",
    "resolution": "data.resolution",
    "max_token_length": "backbone.max_tokens",
    "v_parameterization": "backbone.prediction_type=v_prediction",
    "zero_terminal_snr": "backbone.zero_terminal_snr=true",
    "masked_loss": "data.masked=true",
    "cache_latents": "data.cache_latents",
    "cache_text_encoder_outputs": "data.cache_text",
}
"""What kohya's options are in sdtune: a setting, or the overrides that have the same effect."""

_TEXTS = ("prompt", "name", "trigger", "path")
"""Ends of the keys whose values may contain spaces."""

_FOLDER_SETTINGS = ("data.path", "data.prompt", "data.trigger", "data.repeats", "data.hold_out", "data.validation_path")


def composition_error(error: Exception, typed: Sequence[str]) -> str:
    """One-line message for an error in the user's arguments ``typed`` or in the overrides of a resumed run."""
    line = _one_line(error, typed)
    resumed, key = resumed_folder(typed), re.split("[:=]", line)[0]
    if resumed is None or any(word.lstrip("+~").startswith(key) for word in typed):
        return line
    return f"{line}; {shell_override('resume', resumed)} repeats this override; {NOT_RESUMABLE_REMEDY}"


def _one_line(error: Exception, typed: Sequence[str]) -> str:
    for cause in _causes(error):
        if isinstance(cause, ConfigAttributeError | ConfigKeyError) and cause.full_key:
            return _unknown_setting(cause, typed)
        if isinstance(cause, MissingConfigException) and cause.missing_cfg_file:
            group, _, name = cause.missing_cfg_file.rpartition("/")
            return f"{group}={name}: unknown option{suggestion(name, cause.options or ())}"
        if isinstance(cause, OverrideParseException):
            key, _, value = str(cause.override).partition("=")
            if "=" not in str(cause.override):
                return _split_text(key, typed) or f"{key}: the value is missing; write {key}=VALUE"
            remedy = f"quote it for Hydra and the shell: {shell_override(key, value)}"
            return f"{key}: cannot parse {value}; {remedy}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return "; ".join(lines[:2])


def _split_text(word: str, typed: Sequence[str]) -> str | None:
    """Message for a ``word`` without ``=`` that is part of an unquoted text; None if it follows no override."""
    for start, text in enumerate(typed):
        key, equals, value = text.partition("=")
        if not equals or key.startswith("-") or not key.endswith(_TEXTS):
            continue
        rest = list(takewhile(lambda other: "=" not in other and not other.startswith("-"), typed[start + 1 :]))
        if word in rest:
            quoted = shell_override(key, " ".join([value, *rest]))
            return f"{key}: the shell has split the text at its spaces; quote it for Hydra and the shell: {quoted}"
    return None


def option_error(option: str, known: Sequence[str]) -> str:
    """Message for an unknown command-line option such as ``--network_dim``; ``known`` are Hydra's options."""
    name = option.lstrip("-").replace("-", "_")
    if name in KOHYA:
        return f"{option}: unknown option; settings have the form KEY=VALUE, use {_overrides_for(name)}"
    match = closest_match(option, known)
    if match is not None:
        return f"{option}: unknown option; did you mean {match}?"
    return f"{option}: unknown option; settings have the form KEY=VALUE, without dashes"


def _overrides_for(kohya_option: str) -> str:
    overrides = KOHYA[kohya_option]
    return overrides if "=" in overrides.split()[-1] else f"{overrides}=VALUE"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _unknown_setting(error: ConfigAttributeError | ConfigKeyError, typed: Sequence[str]) -> str:
    known = str(error.full_key)  # ends at the first part that is unknown
    keys = (word.split("=", 1)[0].lstrip("+~") for word in typed)
    full = next((key for key in keys if key.startswith(f"{known}.")), known)
    if full in _FOLDER_SETTINGS:
        return f"{full}: not a setting of this data group; for your own images set data=folder"
    if full in KOHYA:
        return f"{full}: unknown setting; for this option of kohya use {_overrides_for(full)}"
    return f"{full}: unknown setting{_suggested_key(full, error.parent_node)}"


def _suggested_key(full: str, node: Any) -> str:
    """Suggestion for the first unknown part of ``full`` among the keys of ``node``."""
    if not isinstance(node, DictConfig):
        return ""
    known, parts = [str(key) for key in node], full.split(".")
    parent_key = full_key(node)
    depth = len(parent_key.split(".")) if parent_key else 0
    depth = min(depth, len(parts) - 1)
    match = closest_match(parts[depth], known)
    if match is None:
        return suggestion(parts[depth], known)
    return f"; did you mean {'.'.join([*parts[:depth], match, *parts[depth + 1 :]])}?"
