"""Options of kohya's sd-scripts, and the overrides that replace them.

In the tables, VALUE stands for the value of the option.
"""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdtune.cli.kohya_sd3 import (
    SD3,
    SD3_CHANGED,
    SD3_REMARKS,
    SD3_UNAVAILABLE,
    TIMESTEP_KINDS,
    for_sd3,
    is_sd3,
    scheme_remark,
)
from sdtune.paths import config_folder
from sdtune.quoting import in_quotes, shell_override

TRAINING = {
    "network_dim": "method.rank=VALUE",
    "network_alpha": "method.alpha_policy=constant method.alpha=VALUE",
    "network_dropout": "method.dropout=VALUE",
    "network_weights": "method.weights=VALUE",
    "learning_rate": "optimizer.lr=VALUE",
    "unet_lr": "optimizer.lr=VALUE",
    "text_encoder_lr": "'method.targets=[cross_attention,self_attention,text_encoder]' method.text_encoder_lr=VALUE",
    "conv_dim": "'method.targets=[cross_attention,self_attention,convolutions]'",
    "lr_scheduler": "lr_schedule=VALUE",
    "lr_warmup_steps": "lr_schedule.warmup_steps=VALUE",
    "max_train_steps": "trainer.max_steps=VALUE",
    "max_train_epochs": "trainer.epochs=VALUE",
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
    "cache_latents_to_disk": "data.cache_latents=true",
    "cache_text_encoder_outputs_to_disk": "data.cache_text=true",
    "use_8bit_adam": "optimizer=adamw8bit",
    "seed": "seed=VALUE",
    "resume": "resume=VALUE",
    "token_string": "method=textual_inversion 'new_tokens=[{token: VALUE, init: WORD, vectors: N}]'",
    "init_word": "method=textual_inversion 'new_tokens=[{token: WORD, init: VALUE, vectors: N}]'",
    "num_vectors_per_token": "method=textual_inversion 'new_tokens=[{token: WORD, init: WORD, vectors: VALUE}]'",
    "fp8_base": "backbone.quantize=fp8",
    "max_data_loader_n_workers": "data.workers=VALUE",
    "conditioning_data_dir": "method=controlnet data/control=paired data.control.path=VALUE",
    "shuffle_caption": "data.captions.kind=tags data.captions.shuffle=true",
    "keep_tokens": "data.captions.kind=tags data.captions.keep_tokens=VALUE",
    "keep_tokens_separator": "data.captions.kind=tags data.captions.keep_tokens_separator=VALUE",
    "secondary_separator": "data.captions.kind=tags data.captions.secondary_separator=VALUE",
    "caption_separator": "data.captions.kind=tags data.captions.separator=VALUE",
    "caption_tag_dropout_rate": "data.captions.kind=tags data.captions.caption_tag_dropout_rate=VALUE",
    "enable_wildcard": "data.captions.wildcards=true data.captions.lines=true",
    "caption_prefix": "data.captions.prefix=VALUE",
    "caption_suffix": "data.captions.suffix=VALUE",
}
"""Overrides that replace the options of ``train_network.py`` and ``sdxl_train_network.py``."""

OPTIMIZERS = {"AdamW": "adamw", "AdamW8bit": "adamw8bit", "Prodigy": "prodigy", "Adafactor": "adafactor"}
"""kohya's name of an optimizer -> option of the group ``optimizer``."""

_VALUES = {
    "mixed_precision": {"bf16": "bf16-mixed", "fp16": "16-mixed", "no": "32-true"},
    "optimizer_type": OPTIMIZERS,
    "lr_scheduler": {"constant_with_warmup": "constant"},
    "sampler": {
        "euler_a": "euler_ancestral",
        "k_euler": "euler",
        "k_euler_a": "euler_ancestral",
        "dpmsolver++": "dpmpp_2m",
    },
    "save_precision": {"float": "fp32"},
    "weighting_scheme": TIMESTEP_KINDS,
}
"""Values of these options that have another name here."""

TRAINING_REMARKS = {
    "save_every_n_epochs": "set save_every to a number of steps (a training prints the steps per epoch)",
    "sample_every_n_epochs": "set callbacks.samples.every_steps to a number of steps",
    "sample_prompts": "prompts are a list: 'callbacks.samples.prompts=[\"a frog, red background\"]'",
    "network_module": "choose the method: method=lora",
    "network_args": "set method.rank, method.alpha and method.targets (convolutions for conv_dim)",
    "train_text_encoder": "LoRA: 'method.targets=[cross_attention,self_attention,text_encoder]'; others: method.parts",
    "network_train_unet_only": "this is the default: only method.targets with text_encoder trains the text encoder",
    "config_file": "sdtune import-kohya CONFIG.toml prints the command of a config file",
    "dataset_config": "sdtune import-kohya DATASET.toml prints the settings of a dataset file",
    "caption_extension": "it is not needed: .txt and .caption files are read",
    "enable_bucket": "it is not needed: images are always sorted into buckets",
    "bucket_no_upscale": "it is not needed: images are never enlarged",
    "xformers": "it is not needed: the attention implementation is chosen for the device",
    "sdpa": "it is not needed: the attention implementation is chosen for the device",
    "save_model_as": "it is not needed: LoRA files are safetensors; see sdtune export for other formats",
    "save_precision": "set it when exporting: sdtune export RUN format=kohya dtype=fp16",
    "logging_dir": "choose a logger: logger=tensorboard or logger=wandb",
    "log_with": "choose a logger: logger=tensorboard or logger=wandb",
    "save_state": "it is not needed: checkpoints are always saved; resume=RUN continues a run",
    "conv_alpha": "convolutions have the alpha of the other layers",
    "optimizer_args": "set them one by one, such as optimizer.weight_decay=0.01",
    "v2": "choose the model: backbone=sd21",
}
"""What to do about the options of these scripts that no override replaces."""

SAMPLING = {
    "ckpt": "backbone.path=VALUE",
    "vae": "backbone.vae=VALUE",
    "prompt": "prompt=VALUE",
    "negative_prompt": "sampling.negative_prompt=VALUE",
    "from_file": "prompts_file=VALUE",
    "outdir": "hydra.run.dir=VALUE",
    "network_weights": "'adapters=[{path: VALUE}]'",
    "textual_inversion_embeddings": "'adapters=[{path: VALUE}]'",
    "network_mul": "'adapters=[{path: FILE, strength: VALUE}]'",
    "control_net_models": "'control=[{path: VALUE, image: FILE}]'",
    "guide_image_path": "'control=[{path: NET, image: VALUE}]'",
    "control_net_multipliers": "'control=[{path: NET, image: FILE, strength: VALUE}]'",
    "seed": "seeds=[VALUE]",
    "steps": "sampling.steps=VALUE",
    "scale": "sampling.guidance=VALUE",
    "sampler": "sampling.sampler=VALUE",
    "W": "sampling.width=VALUE",
    "H": "sampling.height=VALUE",
    "batch_size": "sampling.batch_size=VALUE",
    "clip_skip": "backbone.clip_skip=VALUE-1",
    "bf16": "hardware.precision=bf16-mixed",
    "fp16": "hardware.precision=16-mixed",
}
"""Overrides of ``sdtune sample`` that replace the options of ``gen_img.py``."""

SAMPLING_REMARKS = {
    "network_module": "it is not needed: the kind of a file is detected",
    "network_merge": "it is not needed: adapters are applied to the weights in memory",
    "images_per_prompt": "set one seed for each image: seeds=[0,1,2,3]",
    "n_iter": "set one seed for each image: seeds=[0,1,2,3]",
    "xformers": "it is not needed: the attention implementation is chosen for the device",
    "sdpa": "it is not needed: the attention implementation is chosen for the device",
    "v2": "choose the model: backbone=sd21",
    "sdxl": "choose the model: backbone=sdxl",
}
"""What to do about the options of ``gen_img.py`` that no override replaces."""

EXPORT = {
    "sd_model": "format=single_file backbone.path=VALUE",
    "model_org": "backbone.path=VALUE",
    "model": "artifact=VALUE",
    "models": "artifact=VALUE",
    "model_tuned": "artifact=VALUE",
    "ratios": "strength=VALUE",
    "dim": "format=kohya rank=VALUE",
    "new_rank": "format=kohya rank=VALUE",
    "dynamic_param": "format=kohya energy=VALUE^2",
    "save_precision": "dtype=VALUE",
    "save_to": "hydra.run.dir=VALUE",
}
"""Overrides of ``sdtune export`` that replace options of ``extract_lora_from_models.py``, ``merge_lora.py`` and
``resize_lora.py``."""

EXPORT_REMARKS = {
    "dynamic_method": "it is not needed: dynamic_param is that of sv_fro, the only available method",
    "device": "it is not needed: matrices are decomposed on the CPU",
    "v2": "choose the model: backbone=sd21",
    "sdxl": "choose the model: backbone=sdxl",
}
"""What to do about the options of these scripts that no override replaces."""


UNAVAILABLE = (
    *("scale_weight_norms", "ip_noise_gamma", "multires_noise_iterations", "multires_noise_discount"),
    *("lowram", "color_aug", "face_crop_aug_range", "debiased_estimation_loss"),
    *("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "lr_scheduler_num_cycles", "loss_type"),
    *SD3_UNAVAILABLE,
)
"""Options of kohya's scripts that have no counterpart in sdtune."""

SCRIPTS = {
    **dict.fromkeys(
        (
            *("train_network", "sdxl_train_network", "sd3_train_network", "sd3_train", "train_db", "fine_tune"),
            *("train_textual_inversion", "train_controlnet"),
        ),
        "train",
    ),
    "gen_img": "sample",
    **dict.fromkeys(("make_captions", "make_captions_by_git", "tag_images_by_wd14_tagger"), "caption"),
    **dict.fromkeys(("extract_lora_from_models", "merge_lora", "resize_lora", "sdxl_merge_lora"), "export"),
}
"""The command that does what a script of kohya does."""

WITH_ASSIGNMENTS = ("optimizer_args", "network_args")
"""Options whose values have the form ``NAME=VALUE``."""


@dataclass(frozen=True)
class Options:
    """Options of kohya's scripts: those with overrides that replace them, and those with only a remark."""

    overrides: Mapping[str, str]
    remarks: Mapping[str, str]


_SHORT = {
    "steps": "trainer.max_steps=VALUE",
    "epochs": "trainer.epochs=VALUE",
    "num_train_epochs": "trainer.epochs=VALUE",
    "alpha": "method.alpha_policy=constant method.alpha=VALUE",
}
"""Short names that are no options of kohya, whose most similar setting means something else."""

OPTIONS = {
    **dict.fromkeys(
        ("train", "prepare", "plan"), Options({**TRAINING, **SD3, **_SHORT}, {**TRAINING_REMARKS, **SD3_REMARKS})
    ),
    "sample": Options(SAMPLING, SAMPLING_REMARKS),
    "export": Options(EXPORT, EXPORT_REMARKS),
}
"""The options that each command explains."""


@dataclass(frozen=True)
class Option:
    """An option as typed, such as ``--network-dim``, its name in kohya's form, and its value if it has one."""

    typed: str
    name: str
    value: str | None

    @classmethod
    def of(cls, word: str) -> Option:
        """The option of ``--option=VALUE``, ``--option VALUE``, ``OPTION=VALUE`` or ``--option``."""
        typed, *value = re.split(r"[=\s]", word, maxsplit=1)
        return cls(typed, typed.lstrip("-+~").replace("-", "_"), value[0] if value else None)


def is_replaced(word: str, command: str) -> bool:
    """Whether ``word`` assigns a value to an option of kohya's scripts that is no setting of ``command``."""
    option, known = Option.of(word), OPTIONS.get(command)
    if known is None or option.value is None:
        return False
    is_setting = known.overrides.get(option.name, "").startswith(f"{option.name}=")
    return option.name in {*known.overrides, *known.remarks} and not is_setting


def explanation(words: Sequence[str], command: str) -> str | None:
    """Message for options of kohya's scripts, ``words`` such as ``--network_dim=8``; None if none of them is known.

    With several options, the message has the overrides for all of them, to be copied.
    """
    options = [Option.of(word) for word in words]
    translation = translate(options, command)
    if not (translation.replaced or translation.remarks):
        return None
    has_dashes = any(option.typed.startswith("-") for option in options)
    plural = "s" if len(options) > 1 else ""
    kind = f"unknown option{plural}" if has_dashes else f"option{plural} of kohya"
    overrides = translation.overrides
    remedies = [f"use {overrides}{' (settings have no dashes)' if has_dashes else ''}"] if overrides else []
    for option, remark in translation.remarks:
        remedies.append(f"{option.typed}: {remark}" if plural else remark)
    unknown = [option.typed for option in translation.unknown]
    remedies += [f"remove {', '.join(unknown)}, which is unknown"] if unknown else []
    remedies += translation.other_defaults
    names = {option.name for option in options}
    if _are_of_sd3(options):
        remedies.append("choose the model: backbone=sd3_medium|sd35_medium|sd35_large")
    elif "pretrained_model_name_or_path" in names and not names & {"token_string", "conditioning_data_dir"}:
        remedies.append("begin with experiment=sd15_lora, or with experiment=sdxl_lora for SDXL")
    typed = ", ".join(option.typed for option in options)
    return f"{typed}: {kind}; {'; '.join(remedies)}; see docs/from-kohya.md"


@dataclass(frozen=True)
class Translation:
    """Options of kohya's scripts in sdtune's settings.

    Attributes:
        replaced: the options that overrides replace.
        overrides: the overrides, as words of a shell.
        remarks: the other known options, and what to do about each.
        unknown: options that are not in the tables.
        other_defaults: remarks on defaults of kohya that differ from those of sdtune.
    """

    replaced: Sequence[Option]
    overrides: str
    remarks: Sequence[tuple[Option, str]]
    unknown: Sequence[Option]
    other_defaults: Sequence[str]


def translate(options: Sequence[Option], command: str) -> Translation:
    """Translate ``options`` for the sdtune command ``command``; nothing is known for a command without a table."""
    known = OPTIONS.get(command)
    if known is None:
        return Translation((), "", (), options, ())
    remarks: dict[str, str] = {**known.remarks, **dict.fromkeys(UNAVAILABLE, "not available")}
    remarks |= {option.name: remark for option in options if (remark := _remark_on_value(option))}
    for option in options:
        if _is_translated(option):
            remarks.pop(option.name, None)
    adapted = for_sd3 if _are_of_sd3(options) else str
    remarks |= SD3_CHANGED if _are_of_sd3(options) else {}
    replaced = [
        option
        for option in options
        if option.name not in remarks and (option.name in known.overrides or _is_translated(option))
    ]
    remarked = [(option, adapted(remarks[option.name])) for option in options if option.name in remarks]
    unknown = [option for option in options if option not in replaced and option.name not in remarks]
    overrides = adapted(_overrides(replaced, known.overrides))
    return Translation(replaced, overrides, remarked, unknown, _other_defaults(options))


def _are_of_sd3(options: Sequence[Option]) -> bool:
    return is_sd3({option.name: option.value for option in options})


def _is_translated(option: Option) -> bool:
    """Whether the value of an option that has only a remark in the tables can be translated."""
    if option.value is None:
        return False
    if option.name == "optimizer_args":
        return all("=" in word for word in option.value.split())
    if option.name == "network_args":
        names = {word.split("=")[0] for word in option.value.split()}
        return "conv_dim" in names and names <= {"conv_dim", "conv_alpha"}
    return option.name in ("n_iter", "images_per_prompt") and option.value.isdigit()


def _remark_on_value(option: Option) -> str | None:
    """Remark on a value that has no counterpart; None if it has one."""
    if option.value is None:
        return None
    group = {"lr_scheduler": "lr_schedule", "optimizer_type": "optimizer"}.get(option.name)
    if group is not None:
        value = _VALUES[option.name].get(option.value, option.value)
        choices = sorted(file.stem for file in (config_folder() / group).glob("*.yaml"))
        return None if value in choices else f"{value} is not available; use {group}={'|'.join(choices)}"
    if option.name == "weighting_scheme":
        return scheme_remark(option.value)
    if option.name == "models" and " " in option.value:
        first, *others = option.value.split()
        return (
            f"one LoRA is merged into a model per command: artifact={first}, then {' '.join(others)} into the written"
            " file; LoRAs are not merged into one LoRA: sdtune sample combines them"
        )
    if option.name == "ratios" and " " in option.value:
        return f"the strengths of these merges are {', '.join(option.value.split())}"
    if option.name == "network_module" and "lycoris" in option.value:
        return "LyCORIS networks are not available; method=lora trains a LoRA"
    if option.name == "text_encoder_lr" and len(set(option.value.replace(",", " ").split())) > 1:
        return "one learning rate is used for all text encoders: method.text_encoder_lr"
    if option.name == "lr_warmup_steps" and re.fullmatch(r"0?\.\d+", option.value):
        return "a number of steps is required, not a share of the run"
    if option.name == "resolution" and len(set(option.value.split(","))) > 1:
        return "one number sets the area of the buckets; each image keeps its aspect ratio"
    return None


def _overrides(options: Sequence[Option], templates: Mapping[str, str]) -> str:
    """Overrides that replace ``options``; those that belong to the same setting become one."""
    by_name = {option.name: option for option in options if option.value is not None}
    if "unet_lr" in by_name:  # it takes precedence over learning_rate
        options = [option for option in options if option.name != "learning_rate"]
    merged = {
        ("token_string", "init_word", "num_vectors_per_token"): _new_tokens,
        ("network_weights", "network_mul"): _adapters,
        ("n_iter", "images_per_prompt", "seed"): _seeds,
        ("optimizer_args",): _optimizer_settings,
        ("text_encoder_lr", "conv_dim", "network_args"): _targets,
        ("control_net_models", "guide_image_path", "control_net_multipliers"): _control,
    }
    takes_adapters = "adapters" in templates.get("network_weights", "")
    texts = []
    for option in options:
        names = next((names for names in merged if option.name in names), ())
        together = {name: str(by_name[name].value) for name in names if name in by_name}
        is_list = option.name == "network_weights" and " " in (option.value or "") and takes_adapters
        is_merged = len(together) > 1 or option.name not in templates or is_list
        texts.append(merged[names](together) if is_merged else _override(templates[option.name], option))
    texts += ["method.alpha_policy=constant method.alpha=1"] if _lacks_alpha(options) else []
    return " ".join(dict.fromkeys(word for text in texts for word in _words(text)))


def _words(text: str) -> list[str]:
    """Words of a shell line, each in quotes if a part of ``text`` has quotes and the word needs them."""
    if "'" not in text:
        return shlex.split(text)
    return [word if re.fullmatch(r"[\w./+:,=-]+", word) else shlex.quote(word) for word in shlex.split(text)]


def _other_defaults(options: Sequence[Option]) -> list[str]:
    """Remarks on defaults of kohya that differ from those of sdtune."""
    names = {option.name for option in options}
    remarks = ["kohya's default of network_alpha is 1"] if _lacks_alpha(options) else []
    if "network_dim" in names and not names & {"network_train_unet_only", "train_text_encoder", "text_encoder_lr"}:
        remarks.append("kohya also trains the text encoder: add text_encoder to method.targets")
    if names & {"conv_dim", "network_args"} and not _are_of_sd3(options):
        remarks.append("convolutions have the rank of the other layers")
    return remarks


def _control(values: Mapping[str, str]) -> str:
    columns = [values.get(name, default).split() for name, default in _CONTROL.items()]
    # one image or strength for all ControlNets
    count = max(map(len, columns))
    columns = [column * count if len(column) == 1 else column for column in columns]
    defaults = list(_CONTROL.values())
    rows = itertools.zip_longest(*columns)
    entries = []
    for row in rows:
        path, image, strength = (
            _scalar(default if value is None else value) for value, default in zip(row, defaults, strict=True)
        )
        entries.append(f"{{path: {path}, image: {image}, strength: {strength}}}")
    return f"'control=[{', '.join(entries)}]'"


_CONTROL = {"control_net_models": "NET", "guide_image_path": "FILE", "control_net_multipliers": "1.0"}
"""ControlNet options -> value to show for an option that is not given; in the order path, image, strength."""


def _lacks_alpha(options: Sequence[Option]) -> bool:
    """Whether kohya's default alpha of 1 applies: sdtune's is the rank."""
    return any(o.name == "network_dim" for o in options) and not any(o.name == "network_alpha" for o in options)


def _targets(values: Mapping[str, str]) -> str:
    """The layers of a LoRA that also trains convolutions, a text encoder, or both."""
    added = ["text_encoder"] if "text_encoder_lr" in values else []
    added += ["convolutions"] if {"conv_dim", "network_args"} & values.keys() else []
    rates = values.get("text_encoder_lr", "").replace(",", " ").split()[:1]
    rate = [f"method.text_encoder_lr={rates[0]}"] if rates else []
    return " ".join([f"'method.targets=[{','.join(['cross_attention', 'self_attention', *added])}]'", *rate])


def _new_tokens(values: Mapping[str, str]) -> str:
    word = values.get("token_string", "WORD")
    parts = [f"token: {_scalar(word)}", f"init: {_scalar(values.get('init_word', 'WORD'))}"]
    parts += [f"vectors: {values['num_vectors_per_token']}"] if "num_vectors_per_token" in values else []
    return f"method=textual_inversion 'new_tokens=[{{{', '.join(parts)}}}]'"


def _seeds(values: Mapping[str, str]) -> str:
    """One seed for each image of a prompt, from ``seed`` on."""
    first = int(values["seed"]) if values.get("seed", "").isdigit() else 0
    count = int(values.get("n_iter", "1")) * int(values.get("images_per_prompt", "1"))
    return f"seeds=[{','.join(str(first + number) for number in range(count))}]"


def _optimizer_settings(values: Mapping[str, str]) -> str:
    pairs = [word.split("=", 1) for word in values["optimizer_args"].split()]
    texts = []
    for name, value in pairs:
        plain = value.lower() if value in ("True", "False", "None") else value
        plain = "null" if plain == "none" else plain
        texts.append(f"'optimizer.{name}=[{value}]'" if "," in value else assigned(f"optimizer.{name}", plain))
    return " ".join(texts)


def _adapters(values: Mapping[str, str]) -> str:
    strengths = values.get("network_mul", "").split()
    entries = [
        f"{{path: {_scalar(path)}, strength: {strength}}}"
        for path, strength in itertools.zip_longest(values["network_weights"].split(), strengths, fillvalue="1.0")
    ]
    return f"'adapters=[{', '.join(entries)}]'"


def _override(template: str, option: Option) -> str:
    """``template`` with the value of ``option`` for VALUE; unchanged if the value is missing or does not fit."""
    value = option.value
    if value is None:
        return template
    if re.fullmatch(r"[\d.e+-]+([,\s]+[\d.e+-]+)+", value):  # equal values, such as two sides, or those of a sweep
        value = ",".join(dict.fromkeys(re.split(r"[,\s]+", value)))
    if "VALUE^2" in template:
        is_number = re.fullmatch(r"[\d.]+", value)
        return template.replace("VALUE^2", f"{float(value) ** 2:g}") if is_number else template
    if option.name == "save_to":
        value = str(Path(value).with_suffix(""))  # kohya's is a file
    value = _VALUES.get(option.name, {}).get(value, value)
    if "VALUE-1" in template:
        return template.replace("VALUE-1", str(int(value) - 1)) if re.fullmatch("[1-9]", value) else template
    if "[" in template:
        return re.sub(r"\bVALUE\b", lambda _: _scalar(value), template)
    words = (word.partition("=") for word in template.split())
    return " ".join(f"{key}={old}" if old != "VALUE" else assigned(key, value) for key, _, old in words)


def _scalar(value: str) -> str:
    """``value`` as an element of a list or a mapping in Hydra's grammar."""
    return value if re.fullmatch(r"[\w./+-]+", value) else in_quotes(value)


def assigned(key: str, value: str) -> str:
    """``key=value`` for the shell, quoted only if needed: Hydra would read a quoted number, or a sweep, as text."""
    plain = r"[\w./+:-]+" if key.endswith(TEXT_KEYS) else r"[\w./+:,-]+"
    return f"{key}={value}" if re.fullmatch(plain, value) else shell_override(key, value)


TEXT_KEYS = ("prompt", "name", "trigger", "path", "dir", "file", "separator", "prefix", "suffix")
"""Ends of the keys whose values may contain spaces and commas."""
