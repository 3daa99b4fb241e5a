"""``sdtune import-kohya CONFIG.toml [DATASET.toml]``: the sdtune command of a configuration of kohya's sd-scripts.

The formats are those of the options ``--config_file`` and ``--dataset_config`` of kohya's training scripts.
"""

from __future__ import annotations

import itertools
import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import yaml

from sdtune.cli.kohya_options import OPTIMIZERS, Option, translate
from sdtune.cli.kohya_sd3 import ZERO_IS_OFF, is_sd3, sd3_layers, with_sd3_defaults
from sdtune.errors import UserError
from sdtune.paths import config_folder
from sdtune.quoting import in_quotes, shell_override

_HELP = """usage: sdtune import-kohya CONFIG.toml [DATASET.toml]

Prints the sdtune command of a configuration of kohya's sd-scripts, and notes about what it cannot express. CONFIG is
the file of --config_file, DATASET that of --dataset_config. Of a dataset file alone, it prints the settings. Nothing is
trained.
"""

_DATASET_OPTIONS = (
    *("resolution", "flip_aug", "random_crop", "caption_dropout_rate", "alpha_mask", "keep_tokens", "shuffle_caption"),
    *("caption_extension", "color_aug", "face_crop_aug_range", "enable_bucket", "bucket_no_upscale", "min_bucket_reso"),
    *("max_bucket_reso", "bucket_reso_steps", "conditioning_data_dir", "keep_tokens_separator", "secondary_separator"),
    *("caption_separator", "caption_tag_dropout_rate", "enable_wildcard", "caption_prefix", "caption_suffix"),
)
"""Keys of a dataset file that are also options of the training scripts; so is ``batch_size``, ``train_batch_size``."""

_READ = ("image_dir", "class_tokens", "num_repeats", "is_reg", "subsets", "batch_size")
"""Keys of a dataset file that are translated here."""

_DEFAULTS = {"max_train_steps": 1600, "learning_rate": 2e-6, "train_batch_size": 1, "lr_warmup_steps": 0}
_LORA_DEFAULTS = {"network_dim": 4}
"""Defaults of kohya's scripts that differ from those of sdtune."""

_DEFAULT_USED = {
    "lr_scheduler": "; the command has the default, constant",
    "optimizer_type": "; the command has the default, adamw",
}
"""Ends of the notes on values that have no counterpart."""

_ZERO_IS_OFF = (
    *("min_snr_gamma", "max_train_epochs", "noise_offset", "caption_dropout_rate", "text_encoder_lr"),
    *(
        "keep_tokens",
        "caption_tag_dropout_rate",
        "network_dropout",
        "save_every_n_steps",
        "sample_every_n_steps",
        "clip_skip",
    ),
    *ZERO_IS_OFF,
)
"""Options for which 0 means that they are off."""


@dataclass(frozen=True)
class Subset:
    """A subset of a dataset file; ``settings`` also has those of its data set and of the table ``general``."""

    settings: Mapping[str, Any]

    @property
    def path(self) -> str:
        return str(self.settings["image_dir"])

    @property
    def is_class(self) -> bool:
        return bool(self.settings.get("is_reg"))


@dataclass(frozen=True)
class DataSet:
    """What a dataset file sets.

    Attributes:
        options: its settings that are also options of the training scripts.
        overrides: overrides of sdtune for its image folders.
        notes: what is not translated.
        has_class_images: whether subject images are paired with class images.
        has_maps: whether sources have control maps of their own.
        kind: option of the group ``data``.
    """

    options: Mapping[str, Any]
    overrides: Sequence[str]
    notes: Sequence[str]
    has_class_images: bool = False
    has_maps: bool = False
    kind: str = "folder"


def main(arguments: Sequence[str]) -> None:
    """Print the command, or the help.

    Raises:
        UserError: a file is missing, is not TOML, or is not a configuration of kohya.
    """
    if list(arguments) in (["-h"], ["--help"]):
        print(_HELP, end="")
        return
    if not 1 <= len(arguments) <= 2 or any(argument.startswith("-") for argument in arguments):
        raise _error(
            f"expected one or two files, got {' '.join(arguments) or 'nothing'}", "use CONFIG.toml DATASET.toml"
        )
    paths = [Path(argument).expanduser() for argument in arguments]
    contents = [_read(path) for path in paths]
    options = {key: value for content in contents if not _is_dataset(content) for key, value in _flat(content)}
    datasets = [content for content in contents if _is_dataset(content)]
    named = options.pop("dataset_config", None)
    if named is not None and not datasets:
        datasets = [_read(_beside(paths[0], str(named)))]
    if len(datasets) > 1:
        raise _error(f"{paths[0]} and {paths[1]} are dataset files", "name one of them")
    data = _data_set(datasets[0], options.get("prior_loss_weight", 1.0)) if datasets else DataSet({}, (), ())
    line, notes = converted(options, data)
    print(line)
    for note in notes:
        print(f"# {note}")


def _error(message: str, remedy: str) -> UserError:
    return UserError(message, key="import-kohya", remedy=remedy)


def _beside(config: Path, named: str) -> Path:
    """The file ``named`` in ``config``: relative to the working folder as for kohya, or else beside ``config``."""
    path = Path(named).expanduser()
    return path if path.is_file() else config.parent / path.name


def _is_dataset(content: Mapping[str, Any]) -> bool:
    return "datasets" in content


def _read(path: Path) -> dict[str, Any]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise _error(f"{path}: {error.strerror}", "use an existing TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise _error(f"{path}: not TOML ({error})", "correct this file") from error
    if not content:
        raise _error(f"{path} has no options", "use a file of --config_file")
    if _is_dataset(content):
        _check_dataset(path, content)
    return content


def _check_dataset(path: Path, content: Mapping[str, Any]) -> None:
    if not isinstance(content.get("general", {}), dict):
        raise _error(f"{path}: general is not a table", "write [general]")
    if not _is_list_of_tables(content["datasets"]):
        raise _error(f"{path}: datasets is not a list of tables", "write [[datasets]]")
    for dataset in content["datasets"]:
        subsets = dataset.get("subsets", [])
        if not _is_list_of_tables(subsets):
            raise _error(f"{path}: subsets is not a list of tables", "write [[datasets.subsets]]")
        if any("image_dir" not in subset for subset in subsets):
            raise _error(f"{path}: a subset has no image_dir", "add it")


def _is_list_of_tables(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


def _flat(content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Options of a config file; the names of its tables have no meaning."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value)
        else:
            yield key, value


def converted(options: Mapping[str, Any], data: DataSet) -> tuple[str, list[str]]:
    """The sdtune command of kohya's ``options`` and ``data``, and notes about what it does not contain.

    Without options, the settings of ``data`` alone.
    """
    notes = list(data.notes)
    given = {**options, **data.options}
    is_lora = any(key.startswith("network_") for key in given)
    of_sd3 = is_sd3(given)
    family, choices = _family(given, of_sd3)
    words = [f"method={_method(given, data)}", f"backbone={family}"]
    defaults = {**_DEFAULTS, **(_LORA_DEFAULTS if is_lora else {})} if options else {}
    given = with_sd3_defaults({**defaults, **given}, notes) if of_sd3 else {**defaults, **given}
    given = _as_set_by_kohya(given, is_lora, notes)
    layers = sd3_layers(given, notes) if of_sd3 and is_lora else _LAYERS
    translation = translate([Option.of(word) for key, value in given.items() if (word := _word(key, value))], "train")
    notes += [
        f"{option.name}: {remark}{_DEFAULT_USED.get(option.name, '')}"
        for option, remark in translation.remarks
        if option.name != "network_module" or "lycoris" in str(option.value)
    ]
    notes += [f"{option.name}: unknown, not translated" for option in translation.unknown]
    # Whether the text encoder is trained is in the command.
    notes += [remark for remark in translation.other_defaults if "text encoder" not in remark]
    if options:
        notes.append(f"backbone={family}: {choices}")
    overrides = _with_layers(translation.overrides, layers) if is_lora else translation.overrides
    if options and words[0] == "method=full":
        notes.append("method=full: there is no option of a network, so the options are those of a full fine-tuning")
    settings = [*([overrides] if overrides else []), *data.overrides]
    command = ["sdtune train", *words, f"data={data.kind}"] if options else [f"data={data.kind}"]
    return " ".join([*command, *settings]), notes


def _family(given: dict[str, Any], of_sd3: bool) -> tuple[str, str]:
    """Option of the group ``backbone``, and between which of them to choose; removes their options from ``given``."""
    is_sdxl, is_sd2 = given.pop("sdxl", False), given.pop("v2", False)
    if of_sd3:
        return "sd35_medium", "sd3_medium, sd35_medium or sd35_large, the model of the file"
    return "sdxl" if is_sdxl else "sd21" if is_sd2 else "sd15", "sd15, sd21 or sdxl, the family of the model"


_LAYERS = ("cross_attention", "self_attention", "feed_forward")
"""Layers of ``method.targets`` that a LoRA of kohya trains in a UNet."""


def _with_layers(overrides: str, layers: Sequence[str]) -> str:
    """``overrides`` with ``layers`` for the attention layers in ``method.targets``."""
    targets = f"method.targets=[{','.join(layers)}"
    changed, count = re.subn(r"method\.targets=\[\w+,self_attention", targets, overrides)
    return changed if count else f"{overrides} '{targets}]'"


def _method(given: Mapping[str, Any], data: DataSet) -> str:
    """The method of the training script that has these options."""
    if "token_string" in given:
        return "textual_inversion"
    if "conditioning_data_dir" in given or data.has_maps:
        return "controlnet"
    if any(key.startswith("network_") for key in given):
        return "lora"
    return "dreambooth" if "reg_data_dir" in given or data.has_class_images else "full"


def _as_set_by_kohya(given: dict[str, Any], is_lora: bool, notes: list[str]) -> dict[str, Any]:
    """``given`` with the options that kohya's scripts derive from others; appends to ``notes``."""
    trains_text_encoder = not given.pop("network_train_unet_only", False) and given.get("text_encoder_lr") != 0
    if given.get("network_alpha") == 0:  # the rank, as in LoRANetwork
        given["network_alpha"] = given["network_dim"]
    given = {key: value for key, value in given.items() if not (key in _ZERO_IS_OFF and value == 0)}
    if given.get("max_grad_norm") == 0:
        given["max_grad_norm"] = "null"
    if "max_train_epochs" in given:  # it takes precedence
        given.pop("max_train_steps", None)
    if is_lora and trains_text_encoder:
        given.setdefault("text_encoder_lr", given.get("learning_rate"))
    if given.pop("resume", None) is not None:
        notes.append("resume: a state of kohya's scripts cannot be continued")
    warmup = given.get("lr_warmup_steps")
    if isinstance(warmup, float) and 0 < warmup < 1 and "max_train_steps" in given:  # a share of the run
        given["lr_warmup_steps"] = round(warmup * given["max_train_steps"])
    accumulation = int(given.get("gradient_accumulation_steps", 1))
    if accumulation > 1 and "train_batch_size" in given:
        # kohya's is the size of a micro-batch
        given["train_batch_size"] = int(given["train_batch_size"]) * accumulation
    if given.get("optimizer_args"):
        given["optimizer_args"] = _known_arguments(given, notes)
    return given


def _known_arguments(given: Mapping[str, Any], notes: list[str]) -> list[str]:
    """The entries of ``optimizer_args`` that are settings of the optimizer in sdtune."""
    kohya = str(given.get("optimizer_type", "AdamW"))
    file = config_folder() / "optimizer" / f"{OPTIMIZERS.get(kohya, kohya)}.yaml"
    settings = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    known = [text for text in given["optimizer_args"] if text.partition("=")[0] in settings]
    notes += [f"optimizer_args: {text}: not translated" for text in given["optimizer_args"] if text not in known]
    return known


def _word(key: str, value: Any) -> str | None:
    """The option of the command line that sets ``key`` to ``value``; None for an option that is off."""
    if value is False or value in ("", [], None):
        return None
    if value is True:
        return f"--{key}"
    separator = "," if key == "resolution" else " "
    return f"--{key}={separator.join(map(str, value)) if isinstance(value, list) else value}"


def _data_set(content: Mapping[str, Any], prior_weight: float) -> DataSet:
    """Translate a dataset file: one folder of subject images with one of class images, or several as a mix."""
    folders = [
        Subset({**content.get("general", {}), **dataset, **subset})
        for dataset in content["datasets"]
        for subset in dataset.get("subsets", ())
    ]
    subjects = [folder for folder in folders if not folder.is_class]
    classes = [folder for folder in folders if folder.is_class]
    if not subjects:
        raise _error("the dataset file has no subset with images of the subject", "add one without is_reg")
    keys = dict.fromkeys(key for folder in folders for key in folder.settings)
    notes = [f"{key}: not translated" for key in keys if key not in (*_DATASET_OPTIONS, *_READ)]
    if len(subjects) > 1 or len(classes) > 1:
        return _mix(folders, prior_weight, notes)
    first = subjects[0]
    notes += [
        f"{folder.path}: num_repeats of class images is not translated" for folder in classes if _repeats(folder) > 1
    ]
    overrides = [shell_override("data.path", first.path), *_prompt("data.prompt", first)]
    if _repeats(first) != 1:
        overrides.append(f"data.repeats={_repeats(first)}")
    if classes:
        overrides += [shell_override("data.class_path", classes[0].path), *_prompt("data.class_prompt", classes[0])]
    return DataSet(_options(first.settings), overrides, notes, bool(classes))


def _options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The ``settings`` that are also options of the training scripts."""
    options = {key: value for key, value in settings.items() if key in _DATASET_OPTIONS}
    if "batch_size" in settings:
        options["train_batch_size"] = settings["batch_size"]
    return options


def _mix(folders: Sequence[Subset], prior_weight: float, notes: list[str]) -> DataSet:
    """Each subset as a source of ``data=mix``; options that all have in common are those of the mix."""
    every = [_options(folder.settings) for folder in folders]
    shared = {key: value for key, value in every[0].items() if all(options.get(key) == value for options in every)}
    if len({str(options.get("train_batch_size")) for options in every}) > 1:
        shared["train_batch_size"] = every[0].get("train_batch_size", 1)
        notes.append("batch_size: one for all sources; the command has that of the first data set")
    overrides = []
    for name, folder, options in zip(_names(folders), folders, every, strict=True):
        key = f"data.sources.{name}"
        overrides += [shell_override(f"{key}.path", folder.path), *_prompt(f"{key}.prompt", folder)]
        if _repeats(folder) != 1:
            overrides.append(f"{key}.repeats={_repeats(folder)}")
        if folder.is_class and prior_weight != 1:
            overrides.append(f"{key}.loss_weight={prior_weight}")
        own = {name: value for name, value in options.items() if name not in shared}
        overrides += _own_overrides(key, own, notes)
    if any(folder.is_class for folder in folders):
        notes.append(
            "is_reg: class images are a source of their own, used as often as their repeats; kohya uses as many as"
            " training images: in place of its repeats, set its weight (1: as many as the largest source)"
        )
    has_maps = any("conditioning_data_dir" in options for options in every)
    return DataSet(shared, overrides, notes, has_maps=has_maps, kind="mix")


def _own_overrides(key: str, options: Mapping[str, Any], notes: list[str]) -> list[str]:
    """Overrides of the source ``key`` for the options whose values differ between sources."""
    used = {name: value for name, value in options.items() if name != "train_batch_size"}
    maps = used.pop("conditioning_data_dir", None)
    words = [word for name, value in used.items() if (word := _word(name, value))]
    translation = translate([Option.of(word) for word in words], "train")
    notes += [f"{key}: {option.name}: {remark}" for option, remark in translation.remarks]
    notes += [f"{key}: {option.name}: unknown, not translated" for option in translation.unknown]
    # The settings of the caches are those of the mix.
    texts = [word for word in shlex.split(translation.overrides) if not word.startswith("data.cache_")]
    pairs = [text.removeprefix("data.").split("=", 1) for text in texts if text.startswith("data.")]
    overrides = [shlex.quote(f"{key}.{name}={value}") for name, value in pairs]
    if maps is not None:
        overrides.append(shlex.quote(f"{key}.control={{option: paired, path: {in_quotes(str(maps))}}}"))
    return overrides


def _names(folders: Sequence[Subset]) -> list[str]:
    """A name for each source, from the name of its folder without kohya's number of repeats."""
    names: list[str] = []
    for folder in folders:
        words = re.sub(r"^\d+_", "", PurePath(folder.path.replace("\\", "/")).name)
        name = re.sub(r"[^A-Za-z0-9_-]+", "_", words).strip("_-") or "images"
        number = next(n for n in itertools.count(1) if (name if n == 1 else f"{name}_{n}") not in names)
        names.append(name if number == 1 else f"{name}_{number}")
    return names


def _repeats(folder: Subset) -> int:
    return int(folder.settings.get("num_repeats", 1))


def _prompt(key: str, folder: Subset) -> list[str]:
    tokens = folder.settings.get("class_tokens")
    return [shell_override(key, tokens)] if tokens else []
