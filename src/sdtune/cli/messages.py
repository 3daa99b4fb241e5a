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
    "network_dim": "method.rank=VALUE",
    "network_alpha": "method.alpha_policy=constant method.alpha=VALUE",
    "network_dropout": "method.dropout=VALUE",
    "network_weights": "method.weights=VALUE",
    "learning_rate": "optimizer.lr=VALUE",
    "unet_lr": "optimizer.lr=VALUE",
    "text_encoder_lr": "method.text_encoder_lr=VALUE",
    "lr_scheduler": "lr_schedule=VALUE",
    "lr_warmup_steps": "lr_schedule.warmup_steps=VALUE",
    "max_train_steps": "trainer.max_steps=VALUE",
    "train_batch_size": "data.batch_size=VALUE",
    "gradient_accumulation_steps": "trainer.accumulate_grad_batches=VALUE",
    "gradient_checkpointing": "hardware.gradient_checkpointing=true",
    "mixed_precision": "hardware.precision=VALUE",
    "max_grad_norm": "trainer.gradient_clip_val=VALUE",
    "optimizer_type": "optimizer=VALUE",
    "train_data_dir": "data=folder data.path=VALUE",
    "reg_data_dir": "data.class_path=VALUE",
    "prior_loss_weight": "data.prior_weight=VALUE",
    "pretrained_model_name_or_path": "backbone.path=VALUE",
    "vae": "backbone.vae=VALUE",
    "clip_skip": "backbone.clip_skip=VALUE-1",
    "output_dir": "hydra.run.dir=VALUE",
    "output_name": "name=VALUE",
    "save_every_n_steps": "save_every=VALUE",
    "min_snr_gamma": "objective=min_snr objective.weighting.gamma=VALUE",
    "noise_offset": "objective.offset_noise=VALUE",
    "flip_aug": "data.flip=true",
    "random_crop": "data.random_crop=true data.cache_latents=false",
    "caption_dropout_rate": "data.caption_dropout=VALUE",
    "sample_every_n_steps": "callbacks.samples.every_steps=VALUE",
    "resolution": "data.resolution=VALUE",
    "max_token_length": "backbone.max_tokens=VALUE",
    "v_parameterization": "backbone.prediction_type=v_prediction",
    "zero_terminal_snr": "backbone.zero_terminal_snr=true",
    "masked_loss": "data.mask=file",
    "alpha_mask": "data.mask=alpha",
    "cache_latents": "data.cache_latents=true",
    "cache_text_encoder_outputs": "data.cache_text=true",
    "use_8bit_adam": "optimizer=adamw8bit",
}
"""The overrides that replace an option of kohya's training scripts; VALUE stands for its value."""

_KOHYA_VALUES = {
    "mixed_precision": {"bf16": "bf16-mixed", "fp16": "16-mixed", "no": "32-true"},
    "optimizer_type": {"AdamW": "adamw", "AdamW8bit": "adamw8bit", "Prodigy": "prodigy", "Adafactor": "adafactor"},
    "lr_scheduler": {"constant_with_warmup": "constant"},
}
"""Values of kohya's options that have another name here."""

KOHYA_REMARKS = {
    "max_train_epochs": "training is counted in steps: set trainer.max_steps (a training prints the steps per epoch)",
    "save_every_n_epochs": "training is counted in steps: set save_every (a training prints the steps per epoch)",
    "sample_every_n_epochs": "training is counted in steps: set callbacks.samples.every_steps",
    "sample_prompts": "prompts are a list: 'callbacks.samples.prompts=[\"a frog, red background\"]'",
    "network_module": "choose the method: method=lora",
    "network_args": "set method.rank, method.alpha and method.targets (convolutions for conv_dim)",
    "train_text_encoder": "LoRA: 'method.targets=[cross_attention,self_attention,text_encoder]'; others: method.parts",
    "network_train_unet_only": "this is the default: only method.targets with text_encoder trains the text encoder",
    "dataset_config": "dataset files are not read: set data=folder data.path=DIR",
    "caption_extension": "it is not needed: .txt and .caption files are read",
    "shuffle_caption": "captions are not shuffled",
    "keep_tokens": "captions are not shuffled; data.trigger puts a word first",
    "enable_bucket": "it is not needed: images are always sorted into buckets",
    "bucket_no_upscale": "it is not needed: images are never enlarged",
    "xformers": "it is not needed: the attention implementation is chosen for the device",
    "sdpa": "it is not needed: the attention implementation is chosen for the device",
    "save_model_as": "it is not needed: LoRA files are safetensors; see sdtune export for other formats",
    "save_precision": "set it when exporting: sdtune export run=RUN format=kohya dtype=fp16",
    "logging_dir": "choose a logger: logger=tensorboard or logger=wandb",
    "log_with": "choose a logger: logger=tensorboard or logger=wandb",
    "max_data_loader_n_workers": "set data.workers",
    "token_string": "set 'new_tokens=[{token: \"<word>\", init: WORD, vectors: N}]'",
    "init_word": "set 'new_tokens=[{token: \"<word>\", init: WORD, vectors: N}]'",
    "num_vectors_per_token": "set 'new_tokens=[{token: \"<word>\", init: WORD, vectors: N}]'",
    "save_state": "it is not needed: checkpoints are always saved; resume=RUN continues a run",
    "optimizer_args": "set them one by one, such as optimizer.weight_decay=0.01",
}
"""What to do about options of kohya's training scripts that no single override replaces."""

_TRAINING = ("train", "prepare", "plan")
"""Commands with the settings of a training."""

_TEXTS = ("prompt", "name", "trigger", "path")
"""Ends of the keys whose values may contain spaces."""

_FOLDER_SETTINGS = ("data.path", "data.prompt", "data.trigger", "data.repeats", "data.hold_out", "data.validation_path")


def composition_error(error: Exception, command: str, typed: Sequence[str]) -> str:
    """One-line message for an error in the arguments ``typed`` of ``command``, or in the overrides of a resumed run."""
    line = _one_line(error, command, typed)
    resumed, key = resumed_folder(typed), re.split("[:=]", line)[0]
    if resumed is None or any(word.lstrip("+~").startswith(key) for word in typed):
        return line
    return f"{line}; {shell_override('resume', resumed)} repeats this override; {NOT_RESUMABLE_REMEDY}"


def _one_line(error: Exception, command: str, typed: Sequence[str]) -> str:
    for cause in _causes(error):
        if isinstance(cause, ConfigAttributeError | ConfigKeyError) and cause.full_key:
            return _unknown_setting(cause, typed, command)
        if isinstance(cause, MissingConfigException) and cause.missing_cfg_file:
            group, _, name = cause.missing_cfg_file.rpartition("/")
            return f"{group}={name}: unknown option{suggestion(name, cause.options or ())}"
        if isinstance(cause, OverrideParseException):
            key, _, value = str(cause.override).partition("=")
            if value.startswith(("[", "{")) and str(cause.override) in typed:
                if value.count("[") != value.count("]") or value.count("{") != value.count("}"):
                    return f"{key}: the shell has split the value; put the override in single quotes"
                return f"{key}: cannot parse {value}; put its texts in double quotes and the override in single quotes"
            if "=" not in str(cause.override):
                return _split_text(key, typed) or f"{key}: the value is missing; write {key}=VALUE"
            remedy = f"quote it for Hydra and the shell: {shell_override(key, value)}"
            return f"{key}: cannot parse {value}; {remedy}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{'; '.join(lines[:2])}; check the overrides ({' '.join(typed)})"


def _split_text(word: str, typed: Sequence[str]) -> str | None:
    """Message for a ``word`` without ``=`` that is part of an unquoted text; None if it follows no override."""
    for start, text in enumerate(typed):
        key, equals, value = text.partition("=")
        if not equals or key.startswith("-") or not key.endswith(_TEXTS):
            continue
        rest = list(takewhile(lambda other: "=" not in other and not is_option(other), typed[start + 1 :]))
        if word in rest:
            quoted = shell_override(key, " ".join([value, *rest]))
            return f"{key}: the shell has split the text at its spaces; quote it for Hydra and the shell: {quoted}"
    return None


def is_option(word: str) -> bool:
    """Whether an argument is an option; a single dash is a part of a text that the shell has split."""
    return word.startswith("-") and word != "-"


def option_error(word: str, command: str, known: Sequence[str]) -> str:
    """Message for an unknown option of ``command`` such as ``--network_dim=8``; ``known`` are Hydra's options."""
    option = re.split(r"[=\s]", word)[0]
    name = option.lstrip("-").replace("-", "_")
    if name in KOHYA and command in _TRAINING:
        return f"{option}: unknown option; use {_kohya_override(name, _typed_value(word))} (settings have no dashes)"
    if name in KOHYA_REMARKS and command in _TRAINING:
        return f"{option}: unknown option; see docs/from-kohya.md ({KOHYA_REMARKS[name]})"
    # Of the short names, even the most similar one usually means something else.
    match = closest_match(option, [name for name in known if name.startswith("--")], cutoff=0.8)
    if match is not None:
        return f"{option}: unknown option; did you mean {match}?"
    return f"{option}: unknown option; write settings as KEY=VALUE, without dashes"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _unknown_setting(error: ConfigAttributeError | ConfigKeyError, typed: Sequence[str], command: str) -> str:
    known = str(error.full_key)  # ends at the first part that is unknown
    keys = (word.split("=", 1)[0].lstrip("+~") for word in typed)
    full = next((key for key in keys if key.startswith(f"{known}.")), known)
    if full in _FOLDER_SETTINGS:
        return f"{full}: not a setting of this data group; for your own images set data=folder"
    value = next((_typed_value(word) for word in typed if word.lstrip("+~").startswith(f"{full}=")), None)
    if full in KOHYA and command in _TRAINING:
        return f"{full}: unknown setting; for this option of kohya use {_kohya_override(full, value)}"
    if full in KOHYA_REMARKS and command in _TRAINING:
        return f"{full}: unknown setting; see docs/from-kohya.md ({KOHYA_REMARKS[full]})"
    if full == "trainer.max_epochs" and command in _TRAINING:
        return f"{full}: unknown setting; set trainer.max_steps (a training prints the steps per epoch)"
    return f"{full}: unknown setting{_suggested_key(full, error.parent_node)}"


def _typed_value(word: str) -> str | None:
    """Value in ``KEY=VALUE`` or ``--option VALUE``; None for a word without a value."""
    return (re.split(r"[=\s]", word, maxsplit=1)[1:] or [None])[0]


def _kohya_override(name: str, value: str | None) -> str:
    """Overrides that replace kohya's option ``name``; ``value`` replaces the word VALUE in them, unless it is None."""
    if name == "resolution" and value is not None:
        sides = set(value.split(","))
        value = sides.pop() if len(sides) == 1 else None
    if value is None:
        return KOHYA[name]
    value = _KOHYA_VALUES.get(name, {}).get(value, value)
    if name == "clip_skip":
        return KOHYA[name].replace("VALUE-1", str(int(value) - 1)) if re.fullmatch("[1-9]", value) else KOHYA[name]
    words = (word.partition("=") for word in KOHYA[name].split())
    return " ".join(f"{key}={old}" if old != "VALUE" else _override(key, value) for key, _, old in words)


def _override(key: str, value: str) -> str:
    """``key=value``, quoted only if the value needs it: Hydra would read a quoted number as text."""
    return f"{key}={value}" if re.fullmatch(r"[\w./+:-]+", value) else shell_override(key, value)


def _suggested_key(full: str, node: Any) -> str:
    """Suggestion for the first unknown part of ``full`` among the keys of ``node``."""
    if not isinstance(node, DictConfig) or not node:  # OmegaConf gives an empty node for the value of a setting
        return f"; set {full.rpartition('.')[0]}, which contains no other settings"
    known, parts = [str(key) for key in node], full.split(".")
    parent_key = full_key(node)
    depth = len(parent_key.split(".")) if parent_key else 0
    depth = min(depth, len(parts) - 1)
    match = closest_match(parts[depth], known)
    if match is None:
        return suggestion(parts[depth], known)
    return f"; did you mean {'.'.join([*parts[:depth], match, *parts[depth + 1 :]])}?"
