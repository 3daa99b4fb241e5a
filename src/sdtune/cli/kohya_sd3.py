"""Options of kohya's scripts for SD 3, ``sd3_train_network.py`` and ``sd3_train.py``.

In the tables, VALUE stands for the value of the option.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SD3 = {
    "clip_l": "backbone.text_encoder=VALUE",
    "clip_g": "backbone.text_encoder_2=VALUE",
    "t5xxl": "backbone.text_encoder_3=VALUE",
    "t5xxl_max_token_length": "backbone.t5_tokens=VALUE",
    "weighting_scheme": "objective.timesteps.kind=VALUE",
    "training_shift": "objective.timesteps.shift=VALUE",
}
"""Overrides that replace the options that these scripts have besides those of ``train_network.py``."""

SD3_REMARKS = {
    "train_t5xxl": "T5 cannot be trained",
    "learning_rate_te1": "set method.text_encoder_lr, one rate for all text encoders",
    "learning_rate_te2": "set method.text_encoder_lr, one rate for all text encoders",
    "learning_rate_te3": "T5 cannot be trained",
    "use_t5xxl_cache_only": "set data.cache_text=true, which caches text embeddings unless a text encoder is trained",
    "blocks_to_swap": "not available; backbone.quantize=fp8 hardware.offload=true saves memory too",
    "text_encoder_batch_size": "it is not needed: captions are encoded in batches",
    "disable_mmap_load_safetensors": "it is not needed: it only changes how files are read",
    "save_clip": "it is not needed: it has no effect in kohya's scripts",
    "save_t5xxl": "it is not needed: it has no effect in kohya's scripts",
    "t5xxl_device": "it is not needed: it has no effect in kohya's scripts",
    "t5xxl_dtype": "it is not needed: it has no effect in kohya's scripts",
}
"""What to do about the options of these scripts that no override replaces."""

SD3_UNAVAILABLE = (
    *("apply_lg_attn_mask", "apply_t5_attn_mask", "clip_l_dropout_rate", "clip_g_dropout_rate", "t5_dropout_rate"),
    *("pos_emb_random_crop_rate", "enable_scaled_pos_embed", "logit_mean", "logit_std", "mode_scale"),
    *("num_last_block_to_freeze", "fused_backward_pass", "blockwise_fused_optimizers"),
)
"""Options of these scripts that have no counterpart in sdtune."""

SD3_CHANGED = {
    **dict.fromkeys(
        (
            *("clip_skip", "max_token_length", "v_parameterization", "zero_terminal_snr", "min_snr_gamma"),
            *("noise_offset", "conv_dim", "conv_alpha"),
        ),
        "it has no effect on SD 3 in kohya's scripts",
    ),
    "network_args": "set method.rank, method.alpha and method.targets",
}
"""Remarks, for SD 3, on options that mean something else for other models."""

TIMESTEP_KINDS = {
    "uniform": "uniform",
    "none": "uniform",
    # kohya's loss has the factor sigma^2, which this scheme removes.
    "sigma_sqrt": "uniform",
    "logit_normal": "logit_normal",
}
"""kohya's weighting scheme -> distribution of the timesteps."""

ZERO_IS_OFF = (
    *("clip_l_dropout_rate", "clip_g_dropout_rate", "t5_dropout_rate", "pos_emb_random_crop_rate"),
    *("blocks_to_swap", "num_last_block_to_freeze"),
)
"""Options for which 0 means that they are off."""

_DEFAULTS = {"weighting_scheme": "uniform", "training_shift": 1.0}
"""Defaults of kohya's scripts that differ from those of sdtune."""

_MARKS = (
    *("clip_g", "training_shift", "apply_lg_attn_mask", "clip_l_dropout_rate", "clip_g_dropout_rate"),
    *("t5_dropout_rate", "pos_emb_random_crop_rate", "enable_scaled_pos_embed", "save_clip", "save_t5xxl"),
    *("train_t5xxl", "use_t5xxl_cache_only", "num_last_block_to_freeze"),
)
"""Options that no other script of kohya has; its scripts for FLUX also have ``clip_l`` and ``t5xxl``."""

_OF_SCHEMES = {
    "logit_mean": ("logit_normal", 0.0),
    "logit_std": ("logit_normal", 1.0),
    "mode_scale": ("mode", 1.29),
}
"""Option -> the only weighting scheme that reads it, and its default."""


def is_sd3(options: Mapping[str, Any]) -> bool:
    """Whether these options, by name, are those of a script for SD 3."""
    return not options.keys().isdisjoint(_MARKS) or str(options.get("network_module")).endswith("lora_sd3")


def for_sd3(text: str) -> str:
    """``text`` with the attention layers of SD 3 in ``method.targets``."""
    return text.replace("[cross_attention,", "[joint_attention,")


def scheme_remark(scheme: str) -> str | None:
    """Remark on a weighting scheme that has no counterpart; None if it has one."""
    if scheme in TIMESTEP_KINDS:
        return None
    return f"{scheme} is not available; use objective.timesteps.kind=uniform|logit_normal"


def with_sd3_defaults(given: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """``given`` with kohya's defaults for SD 3, without the options that have no effect; appends to ``notes``."""
    options = {**_DEFAULTS, **given}
    scheme = str(options["weighting_scheme"])
    for name, (reader, default) in _OF_SCHEMES.items():
        if scheme != reader or options.get(name) == default:
            options.pop(name, None)
    remark = scheme_remark(scheme)
    if remark is not None:
        notes.append(f"weighting_scheme: {remark}; the command has uniform")
        options["weighting_scheme"] = "uniform"
    if scheme != "sigma_sqrt":
        notes.append("objective: kohya multiplies the squared error of the velocity by sigma^2; sdtune does not")
    notes.append("backbone.tokenizer_3: set a folder or hub id with T5's vocabulary; kohya has google/t5-v1_1-xxl")
    rates = options.pop("text_encoder_lr", None)
    if isinstance(rates, list):  # of CLIP-L, CLIP-G and T5
        rates = rates[0] if len({*rates[:2]}) == 1 else rates[:2]
    if rates not in (None, []):
        options["text_encoder_lr"] = rates
    return options


def sd3_layers(given: dict[str, Any], notes: list[str]) -> Sequence[str]:
    """Layers of ``method.targets`` that kohya's LoRA trains in the transformer.

    Removes ``network_args`` from ``given``, and appends what is not translated to ``notes``.
    """
    arguments = given.pop("network_args", None) or []
    texts = arguments.split() if isinstance(arguments, str) else map(str, arguments)
    values = {name: value for name, _, value in (text.partition("=") for text in texts)}
    ranks = {part: [values.get(f"{stream}_{part}_dim") for stream in ("context", "x")] for part in _LAYERS}
    off = [part for part in _LAYERS if ranks[part] == ["0", "0"]]
    if len(off) == len(_LAYERS):  # method.targets would be empty
        off = []
    if values.get("train_t5xxl") == "True":
        notes.append("network_args: train_t5xxl=True: LoRA pairs of T5 are not available")
    if not values.get("context_mod_dim") == values.get("x_mod_dim") == "0":
        notes.append("method.targets: kohya also trains the modulation layers (adaLN) of the blocks")
    if "mlp" in off and given.get("text_encoder_lr") is not None:
        notes.append("method.targets: kohya also trains the feed-forward layers of the text encoders")
    ignored = {*_WITHOUT_EFFECT, *(f"{stream}_{part}_dim" for stream in ("context", "x") for part in ("mod", *off))}
    rest = [
        f"{name}={value}"
        for name, value in values.items()
        if name not in ignored and value not in (str(given["network_dim"]), "all")
    ]
    if rest:
        notes.append(f"network_args: {', '.join(rest)}: not translated")
    return [layer for part, layers in _LAYERS.items() if part not in off for layer in layers]


_LAYERS = {"attn": ("joint_attention", "self_attention"), "mlp": ("feed_forward",)}
"""Part of a block in ``network_args`` -> its layers in ``method.targets``."""

_WITHOUT_EFFECT = ("train_t5xxl", "verbose", "split_qkv", "conv_dim", "conv_alpha")
"""Entries of ``network_args`` that need no note of their own: sdtune's pairs of q, k and v are always separate."""
